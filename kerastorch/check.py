"""check_model: a pre-flight look at net, loss, optimizer and data; all that it tries, it tries on copies.

The checks stand in the order in which they run: x, forward, targets, loss, gradients, a trial on one batch, speed.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

from kerastorch.callbacks import CallbackList
from kerastorch.compiled import Compiled
from kerastorch.data import Batch, BatchSource, make_dataset, make_source, needs_unpack
from kerastorch.data.arrays import NestedDataset
from kerastorch.device import Nested, leaves, map_nested, preserved_random_state
from kerastorch.errors import check_int
from kerastorch.lazy import lazy_copies
from kerastorch.loops.function_loop import train_step
from kerastorch.losses import Loss, loss_scale
from kerastorch.progress import Progress
from kerastorch.report import Finding, Layer, Level, Report, format_bytes
from kerastorch.run import Run

if TYPE_CHECKING:
    from kerastorch.model import Model

MAX_BATCHES, MAX_SECONDS, MAX_BYTES = 8, 5.0, 2**28  # drawn to look at; whichever is reached first ends it
SLOW_SECONDS, SLOW_RATIO = 0.005, 2.0  # a draw below either is never called slow: noise reaches that far
MIN_VALUES = 8  # of a unit in a batch, before it can be called dead


def check_model(model: Model, x: Any, y: Any = None, *, batch_size: int | None = None, steps: int = 50) -> Report:
    """Look for the faults that training would hide, on up to 8 batches and in a short trial; return a Report.

    x, y, batch_size: as in fit; arrays and Datasets are shuffled.   steps: of the trial, which tries to overfit the
    first batch, from the weights as they are and at the optimizer's own learning rate, before any scheduler; a loss
    that has fallen, but not by half, gets up to 4 times as many.
    Steps are plain ones (net(x), loss, backward, step), whatever the loop. Net, loss and optimizer are copied: weights,
    gradients, training flags, random states and generators held by the data are afterwards what they were.
    Raises RuntimeError before compile(), ValueError for an iterator (it can be read only once), and as fit does for
    data that can't be read; an error inside forward comes as it is.
    """
    compiled = model._compiled
    if compiled is None:
        raise RuntimeError('call compile() before check(), for example model.compile("cross_entropy", "adam").')
    check_int("steps", steps)
    if batch_size is not None:
        check_int("batch_size", batch_size)
    data = make_dataset(x, y, caller="check")
    if isinstance(data, Iterator):
        raise ValueError(
            f"check() got a {type(x).__name__}, an iterator, which can be read only once: the batches it looks at "
            "would be lost to fit(). Give a DataLoader, arrays or a list of batches."
        )
    if isinstance(data, DataLoader):
        data = copy.copy(data)
        data._iterator = None  # persistent workers are kept there: a pass under way must not be begun anew
    unpack = compiled.unpack if needs_unpack(x, y) else None
    source = make_source(data, name="check()'s data", batch_size=batch_size, shuffle=True, unpack=unpack)
    with preserved_random_state(), _kept_as_it_was(model.net, data), torch.enable_grad():
        is_trained = bool(compiled.optimizer.state) or bool(model.history.epoch)
        return _check(partial(_copied_run, model, compiled), source, compiled.optimizer, steps, is_trained)


def _check(
    copied_run: Callable[..., Run], source: BatchSource, optimizer: Optimizer, steps: int, is_trained: bool
) -> Report:
    batches, draw_seconds = _draw(source)
    findings = _check_x([x for x, _, _ in batches])

    # ---- forward ----
    run = copied_run(batches)
    passes = run.train_batches()
    x, y, sample_weight = next(passes)
    with run.autocast(), _Watch(run.net) as watch:
        outputs = run.forward(x)
    count = sum(parameter.numel() for parameter in run.net.parameters())
    findings.append(Finding("ok", "Layers", f"{len(watch.layers)} calls, {count:,} parameters."))
    findings += watch.findings or [Finding("ok", "Activations", "none dead, none saturated.")]
    memory = partial(_check_memory, watch.layers, run.num_samples)

    # ---- targets: against themselves, then against the outputs with the look that fit takes at a first batch ----
    findings += _check_y([y for _, y, _ in batches])
    look, run.loss_fn.on_first_batch = run.loss_fn.on_first_batch, None
    if look is not None and not _has_error(findings):
        findings += _look(look, outputs, y, "Outputs and targets")
        run.net.eval()  # in training, batch norm would refuse a batch of one row
        for batch, (x_next, y_next, _) in enumerate(passes, start=1):
            if not _has_error(findings):
                with run.autocast(), torch.no_grad():
                    found = _look(look, run.forward(x_next), y_next, f"Outputs and targets of batch {batch}")
                findings += [finding for finding in found if finding.level == "error"]
    if _has_error(findings):
        text = "loss, gradients, a batch to overfit, speed and memory: put the errors right first."
        return Report([*findings, Finding("ok", "Not tried", text)], watch.layers)

    # ---- loss and gradients ----
    with run.autocast():
        loss = run.loss_fn(outputs, y, sample_weight)
    chance = _chance(run.loss_fn, outputs, y, sample_weight)
    findings.append(_check_start(loss.item(), chance, is_trained))
    if not loss.requires_grad:
        text = "no parameter reaches the loss: all are frozen, or forward or loss detaches (.detach(), .data)."
        findings.append(Finding("error", "Nothing to train", text))
    if _has_error(findings):
        return Report(findings, watch.layers)
    run.scaler.scale(loss).backward()
    without_gradient = [name for name, p in run.net.named_parameters() if p.requires_grad and not _has_gradient(p)]

    # ---- a trial on one batch ----
    if _needs_closure(optimizer):
        text = f"{type(optimizer).__name__} needs a closure, which plain steps don't give it."
        findings += [Finding("ok", "One batch not tried", text), *_check_gradients(run, without_gradient, watch.read)]
        return Report([*findings, memory(run)], watch.layers)
    try_again = partial(_overfit, copied_run, batches[0], steps, chance)
    trial = try_again()
    findings.append(_check_trial(trial, try_again))
    if without_gradient and math.isfinite(trial.losses[-1]):
        # a gradient that only waits for a layer of zeros to move is there after the first step
        with trial.run.autocast():
            loss = trial.run.loss_fn(trial.run.forward(x), y, sample_weight)
        trial.run.scaler.scale(loss).backward()
        later = dict(trial.run.net.named_parameters())
        without_gradient = [name for name in without_gradient if not _has_gradient(later[name])]
    findings += _check_gradients(run, without_gradient, watch.read)
    findings += [_check_speed(source.batches, _median(draw_seconds), _median(trial.seconds)), memory(trial.run)]
    return Report(findings, watch.layers)


def _has_error(findings: Sequence[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def _copied_run(model: Model, compiled: Compiled, batches: Sequence[Batch]) -> Run:
    """A Run in training that gives these batches to copies of net, loss and optimizer, which refer to each other."""
    memo = lazy_copies(model.net)
    net, loss = copy.deepcopy((model.net, compiled.loss), memo)
    optimizer: Optimizer = object.__new__(type(compiled.optimizer))
    for name, value in vars(compiled.optimizer).items():  # deepcopy of the whole would lose a subclass's attributes
        if name.endswith("_hooks"):
            setattr(optimizer, name, type(value)())  # hooks act on the world outside: an average of weights, say
        elif name != "step":  # schedulers put a counter there, bound to the original
            setattr(optimizer, name, copy.deepcopy(value, memo))
    for parameter in net.parameters():
        parameter.grad = None
    for group in optimizer.param_groups:
        if "initial_lr" in group:  # a scheduler's warm-up begins near 0
            group["lr"] = group["initial_lr"]
    copied = dataclasses.replace(
        compiled,
        loss=loss,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(model.device.type, enabled=compiled.mixed_precision == "fp16"),
        metrics={},
        weighted_metrics={},
        lr_scheduler=None,
        gradient_accumulation_steps=1,
        looked_at=set(),
    )
    loader = DataLoader(cast(Dataset[Batch], batches), batch_size=None, collate_fn=lambda batch: batch)
    source = BatchSource(loader, name="check()'s data")
    net.train()
    run = Run(net, model.device, copied, callbacks=CallbackList(None), progress=Progress(0), train_data=source)
    next(run.epoch_range())  # begins the one epoch
    return run


@contextmanager
def _kept_as_it_was(net: nn.Module, data: object) -> Iterator[None]:
    """Put back what no copy protects: generators held by the data, gradients that a loss reaches by a closure."""
    put_back = list(_generator_setters(data, set()))
    gradients = [(parameter, parameter.grad) for parameter in net.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for set_state in put_back:
            set_state()


def _generator_setters(holder: object, seen: set[int]) -> Iterator[Callable[[], object]]:
    import numpy as np

    seen.add(id(holder))
    for part in getattr(holder, "__dict__", {}).values():
        if isinstance(part, torch.Generator):
            yield partial(part.set_state, part.get_state())
        elif isinstance(part, np.random.Generator):
            yield partial(setattr, part.bit_generator, "state", part.bit_generator.state)
        elif isinstance(part, random.Random):
            yield partial(part.setstate, part.getstate())
        elif isinstance(part, (Sampler, Dataset)) and id(part) not in seen:
            yield from _generator_setters(part, seen)


def _draw(source: BatchSource) -> tuple[list[Batch], list[float]]:
    """The first batches, and the seconds that each took."""
    batches: list[Batch] = []
    seconds: list[float] = []
    size, start = 0, time.perf_counter()
    for batch, _ in source.one_pass():
        seconds.append(time.perf_counter() - start)
        # cloned: an iterable may fill the same buffer again
        batches.append(map_nested(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch))
        size += sum(leaf.nbytes for leaf in leaves(batch) if isinstance(leaf, Tensor))
        if len(batches) == MAX_BATCHES or sum(seconds) > MAX_SECONDS or size > MAX_BYTES:
            break
        start = time.perf_counter()
    return batches, seconds


# ---- x and y by themselves ----


def _columns(name: str, values: Sequence[Nested]) -> dict[str, list[Tensor]]:
    """{"x": its tensors, one a batch}, or {"x['a']": ..., "x['b']": ...} where x is a nest."""
    columns: dict[str, list[Tensor]] = {}
    for value in values:
        if isinstance(value, Tensor):
            columns.setdefault(name, []).append(value)
        elif isinstance(value, (Mapping, tuple, list)):
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                for inner, parts in _columns(f"{name}[{key!r}]", [item]).items():
                    columns.setdefault(inner, []).extend(parts)
    return columns


def _check_x(xs: Sequence[Nested]) -> list[Finding]:
    findings: list[Finding] = []
    for name, parts in _columns("x", xs).items():
        if not parts[0].is_floating_point() or parts[0].dim() == 0:
            continue
        tables = [_by_feature(part) for part in parts]
        rows = torch.cat([table for table in tables if table.shape[1] == tables[0].shape[1]])
        if bad := int((~rows.isfinite()).sum()):
            feature = int((~rows.isfinite()).any(0).nonzero()[0])
            text = f"{bad} of {rows.numel()} values looked at, the first in feature {feature}: drop or fill these rows."
            findings.append(Finding("error", f"NaN or infinity in {name}", text))
        elif len(rows) > 1:
            findings += _check_scale(name, rows)
    return findings or [Finding("ok", "Scale of x", "finite; means near 0 and stds near 1 where it is floating point.")]


def _by_feature(x: Tensor) -> Tensor:
    """Rows by features: the last axis of (N, T, F), else axis 1, the channels of images."""
    axis = 2 if x.dim() == 3 else 1
    return x.movedim(axis, -1).reshape(-1, x.shape[axis]).float() if x.dim() > 1 else x[:, None].float()


def _check_scale(name: str, rows: Tensor) -> Iterator[Finding]:
    (std, mean), low, high = torch.std_mean(rows, 0), rows.min().item(), rows.max().item()
    if far := int(((mean.abs() > 10) | (std > 10)).sum()):
        fix = "pixels? Divide by 255" if low >= 0 and 100 < high <= 255 else "subtract the mean, divide by the std"
        text = (
            f"{far} of {len(std)} features are far from mean 0 and std 1 (means {_span(mean)}, stds {_span(std)}, "
            f"values {low:.4g} to {high:.4g}): {fix}."
        )
        yield Finding("warning", f"Scale of {name}", text)
    if constant := int((rows == rows[0]).all(0).sum()):
        text = f"{constant} of {len(std)} features never vary in {len(rows)} rows: they teach nothing."
        yield Finding("warning" if constant > len(std) / 2 else "ok", f"Constant features in {name}", text)


def _span(values: Tensor) -> str:
    return f"{values.min().item():.4g} to {values.max().item():.4g}"


def _check_y(ys: Sequence[Nested]) -> list[Finding]:
    findings = []
    for name, parts in _columns("y", ys).items():
        y = torch.cat([part.reshape(-1) for part in parts])
        values, counts = y.unique(return_counts=True)
        share, most = counts.max().item() / len(y), values[counts.argmax()].item()
        is_one_a_row = len(y) == sum(map(len, parts))
        is_class = is_one_a_row and (not y.is_floating_point() or set(values.tolist()) <= {0.0, 1.0})
        if bad := int((~y.isfinite()).sum()):
            text = f"{bad} of {len(y)} values looked at: drop or fill these rows."
            findings.append(Finding("error", f"NaN or infinity in {name}", text))
        elif len(values) == 1 and len(y) > 1:
            text = f"all {len(y)} values looked at are {most:.4g}: there is nothing to learn. Are the rows sorted?"
            findings.append(Finding("warning", f"Targets {name} never vary", text))
        elif is_class and share > 0.9:
            text = (
                f"class {most:.4g} has {share:.0%} of {len(y)} rows: always guessing it looks good. Weigh the classes, "
                "sample them evenly, and judge by balanced accuracy or AUROC."
            )
            findings.append(Finding("warning", f"Class imbalance in {name}", text))
        else:
            findings.append(Finding("ok", f"Targets {name}", f"{len(y)} values, {_span(y)}."))
    return findings


# ---- forward ----


class _Watch(TorchFunctionMode):
    """Notes, while forward runs, each leaf module's call and the parameters that a torch function is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.findings: list[Finding] = []
        self.read: set[int] = set()
        leaf_modules = [(name, module) for name, module in net.named_modules() if not any(module.children())]
        self._hooks = [
            module.register_forward_hook(partial(self._note, name or "net")) for name, module in leaf_modules
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # to ask for .shape or .device is no use of the values
        if getattr(func, "__name__", "") != "__get__" or func == vars(torch._C.TensorBase)["data"].__get__:
            self.read.update(id(leaf) for leaf in leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        TorchFunctionMode.__exit__(self, *exception)
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _note(self, name: str, module: nn.Module, _: object, output: Nested) -> None:
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        count = sum(parameter.numel() for parameter in module.parameters())
        self.layers.append(Layer(name, type(module).__name__, shapes, count, sum(map(_nbytes, tensors))))
        if isinstance(module, (nn.ReLU, nn.ReLU6)) and (share := _share_dead(tensors[0])) > 0.5:
            text = (
                f"{share:.0%} of the units of {name} are 0 for every row of the batch and learn nothing: look at the "
                "bias and the scale of the layer before it, lower the learning rate, or use LeakyReLU."
            )
            self.findings.append(Finding("warning", "Dead activations", text))
        if isinstance(module, (nn.Sigmoid, nn.Tanh)):
            low = -1 if isinstance(module, nn.Tanh) else 0
            share = ((tensors[0] < low + 1e-3) | (tensors[0] > 1 - 1e-3)).float().mean().item()
            if share > 0.9:
                text = (
                    f"{share:.0%} of the outputs of {name} are at the limits of {type(module).__name__}, where no "
                    "gradient passes: scale its inputs down, or the weights before it."
                )
                self.findings.append(Finding("warning", "Saturated activations", text))


def _share_dead(output: Tensor) -> float:
    """Share of units that are 0 throughout; units are channels (axis 1) or features (the last), the worse counts."""
    units = [(output == 0).movedim(axis, 0).flatten(1) for axis in (1, -1)] if output.dim() > 1 else []
    return max((unit.all(1).float().mean().item() for unit in units if unit.shape[1] >= MIN_VALUES), default=0.0)


def _look(look: Callable[[Nested, Nested], None], outputs: Nested, y: Nested, title: str) -> list[Finding]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            look(outputs, y)
        except ValueError as error:
            return [Finding("error", title, str(error))]
    return [Finding("warning", title, str(warning.message)) for warning in caught]


# ---- loss and gradients ----


def _chance(loss_fn: Loss, outputs: Nested, y: Nested, sample_weight: Nested) -> float | None:
    """The loss of outputs that know nothing of x: even odds for classes, the mean of y for values; None if unknown."""
    scale = loss_scale(loss_fn.fn)
    if scale == "unknown" or not isinstance(outputs, Tensor) or isinstance(loss_fn.fn, nn.PoissonNLLLoss):
        return None
    know_nothing = torch.zeros_like(outputs, dtype=torch.float32)
    if scale == "log_probabilities":
        know_nothing -= math.log(outputs.shape[1])
    elif scale == "probabilities":
        know_nothing += 0.5
    elif scale == "values":
        know_nothing += y.float().mean(0)
    return loss_fn(know_nothing, y, sample_weight).item()


def _check_start(loss: float, chance: float | None, is_trained: bool) -> Finding:
    if not math.isfinite(loss):
        text = f"the first loss is {loss}: look for log(0), a division by 0 or very large weights in net and loss."
        return Finding("error", "The loss is not finite", text)
    if chance is None:
        return Finding("ok", "Loss at the start", f"{loss:.4g}; what chance gives is not known for this loss.")
    figures = f"{loss:.4g}, where knowing nothing of x gives {chance:.4g}"
    if loss > 2 * chance + 0.5:
        text = f"{figures}: scale x (and y, in regression), or start with smaller weights in the last layer."
        return Finding("warning", "Loss at the start is far above chance", text)
    if loss < 0.5 * chance and not is_trained:
        text = f"{figures}: does x hold the target? Expected only of weights that are trained already."
        return Finding("warning", "Loss at the start is far below chance", text)
    return Finding("ok", "Loss at the start", f"{figures}.")


def _has_gradient(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    return bool((gradient.coalesce().values() if gradient.is_sparse else gradient).any())


def _check_gradients(run: Run, without_gradient: Sequence[str], read: set[int]) -> list[Finding]:
    named = dict(run.net.named_parameters())
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    no_grad = [name for name in without_gradient if named[name].grad is None]
    cut_text = (
        "forward reads them, but no gradient comes back: look for .detach(), .data, no_grad(), argmax or a result that "
        "is not returned. If it is meant, set requires_grad=False."
    )
    table: list[tuple[Level, str, list[str], str]] = [
        (
            *("warning", "Parameters never used", [name for name in no_grad if id(named[name]) not in read]),
            "forward does not read them: call the layer, or take it out.",
        ),
        (
            "warning",
            "Parameters cut off from the loss",
            [name for name in no_grad if id(named[name]) in read],
            cut_text,
        ),
        (
            *("warning", "Gradients are all 0", [name for name in without_gradient if name not in no_grad]),
            "look for dead activations after them, or a factor of 0.",
        ),
        ("ok", "Frozen parameters", [name for name, p in named.items() if not p.requires_grad], "requires_grad=False."),
        (
            *("ok", "Not in the optimizer", [n for n, p in named.items() if p.requires_grad and id(p) not in held]),
            "these stay as they are.",
        ),
    ]
    findings = [Finding(level, title, f"{_some(names)}: {text}") for level, title, names, text in table if names]
    return findings or [Finding("ok", "Gradients", f"all {len(named)} parameters get one.")]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---- a trial on one batch ----


@dataclass
class _Trial:
    """Steps on one batch: the loss before each, and the seconds that each took."""

    run: Run
    chance: float | None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def has_fallen(self, share: float) -> bool:
        return self.losses[-1] < self.losses[0] - share * abs(self.losses[0])

    @property
    def has_overfitted(self) -> bool:
        last = self.losses[-1]
        if self.chance is not None and last >= self.chance:  # no better than knowing nothing of x
            return False
        return self.has_fallen(0.5) or abs(last) < 1e-3 or (self.chance is not None and last < 0.1 * self.chance)


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _overfit(
    copied_run: Callable[..., Run], batch: Batch, steps: int, chance: float | None, factor: float = 1.0
) -> _Trial:
    """Train copies on one batch, the learning rate times factor, dropout off; stop at a loss that is not finite."""
    trial = _Trial(copied_run([batch] * (4 * steps + 1)), chance)
    for module in trial.run.net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    for group in trial.run.optimizer.param_groups:
        if "lr" in group:
            group["lr"] = group["lr"] * factor
    for x, y, sample_weight in trial.run.train_batches():
        trial.run.loss_fn.on_first_batch = None  # the look was taken before
        start = time.perf_counter()
        loss, _ = train_step(trial.run, x, y, sample_weight)
        trial.losses.append(loss.item())  # a sync: without it the seconds would be those of the launches
        trial.seconds.append(time.perf_counter() - start)
        is_due = len(trial.losses) > 1 and (len(trial.losses) - 1) % steps == 0
        if not math.isfinite(trial.losses[-1]) or (is_due and (trial.has_overfitted or not trial.has_fallen(0.1))):
            break  # a small net at Adam's usual rate is on its way, but not there, after 50 steps
    return trial


def _check_trial(trial: _Trial, try_again: Callable[..., _Trial]) -> Finding:
    first, last = trial.losses[0], trial.losses[-1]
    rates = dict.fromkeys(f"{float(group['lr']):.4g}" for group in trial.run.optimizer.param_groups if "lr" in group)
    figures = f"learning rate {', '.join(rates)}: " if rates else ""
    figures += f"{len(trial.losses) - 1} steps on one batch take the loss from {first:.4g} to {last:.4g}"
    if not math.isfinite(last):
        text = f"{figures}. Lower the learning rate, or set clip_grad_norm=1.0 in compile()."
        return Finding("error", "The loss is not finite", text)
    if trial.has_overfitted:
        return Finding("ok", "One batch can be overfitted", f"{figures}.")
    reason = "Look for a wrong loss, targets that don't belong to their rows, too small a net, too few steps."
    if not trial.has_fallen(0.01) and last <= first:
        reason = f"It hardly moves: the learning rate is too low, or gradients don't arrive. {reason}"
    elif last > first:
        reason = f"It rises: the learning rate is too high. {reason}"
    for factor in (10.0, 100.0, 0.1) if rates and sum(trial.seconds) < MAX_SECONDS else ():
        again = try_again(factor)
        if math.isfinite(again.losses[-1]) and again.has_overfitted:
            if factor == 10 and trial.has_fallen(0.1):
                text = f"{figures}; at 10 times the rate to {again.losses[-1]:.4g}."
                return Finding("ok", "One batch can be overfitted, slowly", text)
            what = "too low" if factor > 1 else "too high"
            reason = f"The learning rate is {what}: at {factor:g} times it the loss falls to {again.losses[-1]:.4g}."
            break
    return Finding("warning", "One batch can't be overfitted", f"{figures}. {reason}")


# ---- speed and memory ----


def _median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds[1:] or seconds)  # the first pays for what is set up once


def _check_speed(batches: object, draw: float, step: float) -> Finding:
    figures = f"a batch takes {1e3 * draw:.3g} ms to draw, a step {1e3 * step:.3g} ms"
    is_slow = draw > max(SLOW_SECONDS, SLOW_RATIO * step)
    if not is_slow or not isinstance(batches, DataLoader) or batches.num_workers or _is_in_memory(batches.dataset):
        return Finding("ok", "Speed", f"{figures}.")
    workers = min(math.ceil(draw / step), os.cpu_count() or 1)
    text = f"{figures}: drawing takes {draw / step:.1f} times as long. Give a DataLoader(..., num_workers={workers})."
    return Finding("warning", "Data is slower than the net", text)


def _is_in_memory(dataset: object) -> bool:
    """Whether these rows are tensors already: workers would only copy them."""
    return isinstance(dataset.dataset if isinstance(dataset, Subset) else dataset, (TensorDataset, NestedDataset))


def _check_memory(layers: Sequence[Layer], num_samples: int, run: Run) -> Finding:
    weights, trained = list(run.net.parameters()), [p for p in run.net.parameters() if p.requires_grad]
    state = [leaf for entry in run.optimizer.state.values() for leaf in leaves(entry) if isinstance(leaf, Tensor)]
    per_sample = sum(layer.bytes for layer in layers) / num_samples
    text = (
        f"weights {format_bytes(sum(map(_nbytes, weights)))}, gradients {format_bytes(sum(map(_nbytes, trained)))}, "
        f"optimizer {format_bytes(sum(map(_nbytes, state)))}; layer outputs {format_bytes(per_sample)} a sample, "
        f"{num_samples} in a batch."
    )
    if run.device.type == "cuda" and per_sample:
        free, _ = torch.cuda.mem_get_info(run.device)
        samples = int(0.8 * free / (2 * per_sample))  # outputs and their gradients; a fifth stays for workspaces
        text += f" About {samples:,} samples fit into the {format_bytes(free)} that are free."
    return Finding("ok", "Memory", text)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
