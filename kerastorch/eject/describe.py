"""Values as the text that makes them again: losses, optimizers, schedulers and metrics for the head of the file."""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from kerastorch.eject.lines import Lines, quote
from kerastorch.losses import is_torch_own
from kerastorch.metrics import NamedMetric

MAX_ELEMENTS = 32  # of a tensor that is written out


class Text(NamedTuple):
    """Code, and what of the user's own its "..." stands for."""

    code: str
    note: str = ""


def refuse(what: str, way_out: str) -> NoReturn:
    raise ValueError(f"eject() can't write out {what}: {way_out}.")


def describe(value: Any) -> Text:
    """Return the text that makes value again, or "..." and what it is."""
    if isinstance(value, float) and not math.isfinite(value):
        return Text(f'float("{value}")')
    if value is None or isinstance(value, (bool, int, float)):
        return Text(repr(value))
    if isinstance(value, str):
        return Text(quote(value))
    if isinstance(value, Counter):  # as MultiStepLR keeps its milestones
        value = sorted(value.elements())
    if type(value) in (tuple, list):
        parts = [describe(part) for part in value]
        inner = ", ".join(part.code for part in parts)
        code = f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
        return Text(code, next((part.note for part in parts if part.note), ""))
    if isinstance(value, Tensor) and value.numel() <= MAX_ELEMENTS:
        is_default = value.dtype in (torch.float32, torch.int64, torch.bool)
        return Text(f"torch.tensor({describe(value.tolist()).code}{'' if is_default else f', dtype={value.dtype}'})")
    if isinstance(value, nn.Module) and is_torch_own(value) and type(value).__module__.startswith("torch."):
        names = inspect.signature(type(value)).parameters
        return describe_call(type(value), {name: getattr(value, name) for name in names if hasattr(value, name)})
    if isinstance(value, functools.partial) and not value.args:
        inner_text = describe(value.func)
        options = {name: describe(option) for name, option in value.keywords.items()}
        if not inner_text.note and not any(option.note for option in options.values()):
            shown = "".join(f", {name}={option.code}" for name, option in options.items())
            return Text(f"functools.partial({inner_text.code}{shown})")
    name = getattr(value, "__name__", type(value).__name__)
    if getattr(F, name, None) is value:
        return Text(f"torch.nn.functional.{name}")
    return Text("...", f"your {'function' if name == '<lambda>' else name}")


def describe_call(cls: type, values: Mapping[str, Any], first: str = "", always: str = "") -> Text:
    """Return the text of a call of cls with those of values that are no defaults, or "..." where they do not tell.

    A value may stand in a list under its name and an "s", one for each param group.
    """
    public = {"torch.optim.lr_scheduler": lr_scheduler, "torch.optim": torch.optim, "torch.nn": nn}
    module = next((name for name, one in public.items() if getattr(one, cls.__name__, None) is cls), None)
    unknown = Text("...", f"your {cls.__name__}")
    given, note = [first] if first else [], ""
    for name, parameter in list(inspect.signature(cls).parameters.items())[len(given) :]:
        if name in ("last_epoch", "size_average", "reduce", "verbose"):  # a default, or deprecated in some releases
            continue
        if name not in values and f"{name}s" not in values:
            return unknown
        value = values[name] if name in values else _one_of(values[f"{name}s"])
        if name != always and (value is parameter.default or _is_equal(value, parameter.default)):
            continue
        text = describe(value)
        given.append(f"{name}={text.code}")
        note = note or text.note
    return Text(f"{module}.{cls.__name__}({', '.join(given)})", note) if module else unknown


def _one_of(several: Sequence[Any]) -> Any:
    return several[0] if all(one is several[0] or _is_equal(one, several[0]) for one in several) else list(several)


def _is_equal(value: object, default: object) -> bool:
    return isinstance(value, (int, float, str, tuple)) and type(value) is type(default) and value == default


def describe_optimizer(
    optimizer: Optimizer, options: Sequence[Mapping[str, Any]], net: nn.Module, loss: object
) -> tuple[Lines, Text]:
    """Return the lines that name parameters, and the optimizer over them.

    options: those of each param group when it was compiled, before a scheduler or a callback changed them.
    """
    tables = {"parameters": dict(net.named_parameters())}
    if isinstance(loss, nn.Module):
        tables["loss_parameters"] = dict(loss.named_parameters())
    owners = {"parameters": "net", "loss_parameters": "loss_fn"}
    texts = {id(p): f"{table}[{quote(name)}]" for table, named in tables.items() for name, p in named.items()}
    whole = [id(p) for named in tables.values() for p in named.values()]
    used: set[str] = set()

    def of_group(group: Mapping[str, Any]) -> str:
        held = [id(p) for p in group["params"]]
        if held == [id(p) for p in net.parameters()]:
            return "net.parameters()"
        if held == whole:
            return "[*net.parameters(), *loss_fn.parameters()]"
        if not texts.keys() >= set(held):
            refuse("an optimizer over parameters outside the net", "let the net or the loss hold them")
        shown = [texts[one] for one in held]
        used.update(text.partition("[")[0] for text in shown)
        return f"[{', '.join(shown)}]"

    defaults, cls, note = optimizer.defaults, type(optimizer), ""
    start = [
        {**group, "lr": group.get("initial_lr", group["lr"])} if "lr" in group else dict(group) for group in options
    ]
    groups = optimizer.param_groups
    if len(groups) == 1:
        text = describe_call(cls, {**defaults, **start[0]}, of_group(groups[0]), always="lr")
    else:
        shown = []
        for group, own in zip(groups, start, strict=True):
            own = {key: describe(own[key]) for key in defaults if not _is_same(own[key], defaults[key])}
            note = next((text.note for text in own.values() if text.note), note)
            shown.append(f'{{"params": {of_group(group)}{"".join(f", {quote(k)}: {v.code}" for k, v in own.items())}}}')
        text = describe_call(cls, defaults, f"[{', '.join(shown)}]", always="lr")
    lines = [f"{table} = dict({owners[table]}.named_parameters())" for table in tables if table in used]
    return lines if text.code != "..." else [], Text(text.code, text.note or note)


def _is_same(value: Any, default: Any) -> bool:
    return value is default or bool(value == default)


def describe_scheduler(scheduler: LRScheduler | str, optimizer: Optimizer, steps: str) -> Text:
    """Return a scheduler's text; steps: how often it steps, as code, for one that spans the fit."""
    if scheduler == "cosine":
        return Text(f"torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max={steps})")
    if scheduler == "one_cycle":
        cycles = all(group.get("momentum") or "betas" in group for group in optimizer.param_groups)
        rates = '[group["lr"] for group in optimizer.param_groups]'
        if len(optimizer.param_groups) == 1:
            rates = 'optimizer.param_groups[0]["lr"]'
        cycle = "" if cycles else ", cycle_momentum=False"
        return Text(f"torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr={rates}, total_steps={steps}{cycle})")
    if next(iter(inspect.signature(type(scheduler)).parameters)) != "optimizer":
        return Text("...", f"your {type(scheduler).__name__}")
    return describe_call(type(scheduler), vars(scheduler), "optimizer")


class MetricText(NamedTuple):
    """A torchmetrics object as code, and what its update() is given."""

    code: str
    outputs: str
    y: str


def describe_metric(metric: NamedMetric, inferred: Sequence[Any] | None, device: torch.device) -> MetricText:
    """Return the torchmetrics object that equals a metric by name.

    inferred: shape and dtype of the outputs and of the targets that it has seen, None before the first fit.
    """
    metric = metric.clone()
    if inferred is None:  # any that fit the loss: the number of classes stays open
        is_one = metric.scale in ("label_logits", "probabilities", "values")
        outputs, y = (
            torch.zeros(1, 1 if is_one else 16),
            torch.zeros(1, 1) if is_one else torch.zeros(1, dtype=torch.long),
        )
    else:
        outputs, y = (torch.zeros((), dtype=inferred[i + 1]).expand(inferred[i]) for i in (0, 2))
    metric.infer(outputs, y)
    recipe = metric.recipe
    if recipe is None:
        refuse(
            f"the metric {metric.name!r}", "torchmetrics has none that takes the same tensors; give one as an object"
        )
    arguments = {name: describe(value).code for name, value in recipe.arguments.items()}
    if inferred is None:
        arguments |= {name: "..." for name in arguments if name.startswith("num_")}
    if device.type != "cpu" and recipe.cls.startswith("classification"):
        arguments["validate_args"] = "False"  # else an update reads values back from the device
    shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
    return MetricText(f"torchmetrics.{recipe.cls}({shown}){recipe.suffix}", recipe.outputs, recipe.y)
