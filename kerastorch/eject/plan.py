"""Plan: what a model's training uses, what of it can't be written out, and what the stages are made of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kerastorch.data import ClassWeight
from kerastorch.eject.describe import describe, describe_metric, refuse
from kerastorch.eject.lines import WIDTH, Lines, quote
from kerastorch.losses import OutputLosses, is_torch_own, keyword_of, loss_scale
from kerastorch.metrics import MeanMetric, NamedMetric, is_collection
from kerastorch.optimizers import NamedOptimizers

if TYPE_CHECKING:
    from kerastorch.compiled import Compiled
    from kerastorch.loops import Loop
    from kerastorch.model import Model

MOVED = {  # kind of x (and of y): how it goes to the device, how the net takes it, its number of samples
    "tensor": ("{0}.to($device)", "net(x)", "len(x)"),
    "tuple": ("[part.to($device) for part in {0}]", "net(*x)", "len(x[0])"),
    "dict": ("{{name: part.to($device) for name, part in {0}.items()}}", "net(**x)", "len(next(iter(x.values())))"),
}
TYPES = {
    "tensor": "Tensor",
    "tuple": "Sequence[Tensor]",
    "dict": "dict[str, Tensor]",
    "net": "nn.Module",
    "optimizer": "Optimizer",
    "loss_fn": "nn.Module",
    "metrics": "dict[str, Metric]",
    "train_data": "DataLoader[Any]",
    "val_data": "DataLoader[Any]",
    "epoch": "int",
    "epochs": "int",
    "device": "torch.device",
    "scaler": "torch.amp.GradScaler",
    "class_weights": "Tensor",
    "sample_weight": "Tensor",
    "window": "list[int]",
    "is_last": "bool",
    "run": "Run",
}


class Plan:
    """What is in use; callbacks.py and own_steps.py add their parts.

    keywords: of train(), name -> (type, default, the user's own thing that it is).   state: kept from epoch to epoch,
    name -> first value.   before, epoch_begin, batch_end, epoch_end, saving, after: lines for those places.
    """

    def __init__(
        self, model: Model, compiled: Compiled, loop: Loop, style: str, class_weight: Mapping[int, float] | None
    ) -> None:
        self.net, self.device, self.fit = model.net, model.device, model.last_fit
        self.compiled, self.loop, self.style, self.class_weight = compiled, loop, style, class_weight or None
        self.types = dict(TYPES)
        self.constants: Lines = []
        self.keywords: dict[str, tuple[str, str | None, str]] = {}
        self.state: dict[str, str] = {}
        self.before: Lines = []
        self.epoch_begin: Lines = []
        self.batch_end: Lines = []
        self.epoch_end: Lines = []
        self.saving: Lines = []
        self.after: Lines = []
        self.resumes = False
        self.counts_steps = False  # whether own steps read run.step
        self._plan_data()
        self._plan_step()
        self._plan_metrics()

    def keyword(self, name: str, annotation: str, default: str | None = None, note: str = "") -> None:
        """Give train() a keyword; note: what it is, where that is the user's own."""
        if name in self.keywords or name in TYPES:
            refuse(f"two things that need the name {name!r}", "leave one out, callbacks=[...], or rename yours")
        self.keywords[name] = (annotation, default, note)

    def path(self, name: str, path: str) -> None:
        """Give train() the keyword of a path; a long one becomes a constant, in parts that fit a line."""
        default = quote(path)
        if len(default) > 80:
            fits_alone = len(default) + 4 <= WIDTH
            parts = [path] if fits_alone else [path[i : i + 80] for i in range(0, len(path), 80)]
            line = f"{name.upper()} = {default}"
            folded = [f"{name.upper()} = (", *(f"    {quote(part)}" for part in parts), ")"]
            self.constants += [line] if len(line) <= WIDTH else folded
            default = name.upper()
        self.keyword(name, "str", default)

    def names(self, *, trains: bool) -> list[str]:
        """Return what a batch holds."""
        y = ["y"] if self.y_kind != "none" else []
        return ["x", *y, *(["sample_weight"] if self.weighted[not trains] else [])]

    @property
    def y(self) -> str:
        """The target as code."""
        return "y" if self.y_kind != "none" else "None"

    @property
    def first_epoch(self) -> str:
        return "$initial_epoch" if self.fit.initial_epoch else "0"

    @property
    def due(self) -> str:
        """The test, as code, whether an epoch validates; "" where all do."""
        if self.freq == 1:
            return ""
        return "(epoch + 1) % $validation_freq == 0" if isinstance(self.freq, int) else "epoch + 1 in $validation_freq"

    def _plan_data(self) -> None:
        fit = self.fit
        self.kind, self.y_kind = fit.kind, fit.target_kind
        for name, kind in (("inputs", self.kind), ("targets", self.y_kind)):
            if kind not in MOVED and (name, kind) != ("targets", "none"):
                refuse(f"such {name}", "let the batches hold a tensor, or a flat tuple or dict of tensors")
        if self.y_kind == "none" and (not fit.is_tuple or any(fit.unpacks)):
            refuse("batches that are x alone", "let them be (x,), as those of a TensorDataset are")
        for name in ("steps_per_epoch", "validation_steps"):
            if getattr(fit, name) is not None:
                refuse(f"fit({name}=...), which reads a part of the data", "fit whole passes over a smaller DataLoader")
        self.weighted = fit.sample_weights
        self.freq = fit.validation_freq
        self.always_validates = fit.validated is True
        if any(fit.unpacks):
            self.keyword("unpack", "Callable[[Any], Any]", note="your function, batch -> (x, y)")
        if fit.initial_epoch:
            self.keyword("initial_epoch", "int", str(fit.initial_epoch))
        if isinstance(self.freq, int) and self.freq != 1:
            self.keyword("validation_freq", "int", str(self.freq))
        elif not isinstance(self.freq, int):
            self.keyword("validation_freq", "Sequence[int]", describe(tuple(sorted(self.freq))).code)

    def _plan_step(self) -> None:
        compiled = self.compiled
        self.loss = compiled.loss
        if isinstance(self.loss, OutputLosses):
            refuse("several losses, one an output", "compile one function (outputs, y) -> loss that sums them")
        if isinstance(compiled.optimizer, NamedOptimizers):
            refuse("several optimizers", "write the loop round your train_step by hand")
        self.types["loss_fn"] = "nn.Module" if isinstance(self.loss, nn.Module) else "Callable[..., Tensor]"
        is_scalar = is_torch_own(self.loss) and keyword_of(self.loss, "reduction", "mean") != "none"
        self.mean = "" if is_scalar else ".mean()"
        if self.class_weight is not None:
            ClassWeight(self.class_weight, self.loss, self.device)  # which refuses what fit refuses
            entries = [f"{int(key)}: {float(value)!r}" for key, value in self.class_weight.items()]
            line = f"CLASS_WEIGHT = {{{', '.join(entries)}}}"
            is_long = len(line) > WIDTH
            self.constants += ["CLASS_WEIGHT = {", *(f"    {entry}," for entry in entries), "}"] if is_long else [line]
            self.keyword("class_weight", "dict[int, float]", "CLASS_WEIGHT")
        if compiled.jit_compile:
            refuse("jit_compile", "compile without it, and call net.compile() before the ejected train()")
        self.k = compiled.gradient_accumulation_steps
        if compiled.num_parts > 1:
            refuse(
                "gradient_accumulation_steps='auto'",
                f"it cut batches into {compiled.num_parts} parts: give smaller batches, and the number that makes one",
            )
        if self.k > 1:
            if not self.fit.has_length:
                refuse("accumulation over data of unknown length", "give a DataLoader over a Dataset with a length")
            self.keyword("gradient_accumulation_steps", "int", str(self.k))
        for name in ("clip_grad_norm", "clip_grad_value"):
            if getattr(compiled, name) is not None:
                self.keyword(name, "float", describe(float(getattr(compiled, name))).code)
        dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}.get(compiled.mixed_precision or "")
        self.autocast = f"torch.autocast($device.type, {dtype})" if dtype else ""
        self.scales = compiled.mixed_precision == "fp16"
        scheduler = compiled.lr_scheduler
        self.steps_lr = scheduler is not None and compiled.lr_scheduler_interval == "step"
        if isinstance(scheduler, ReduceLROnPlateau):
            self.keyword("lr_scheduler", "ReduceLROnPlateau")
            value = 'logs["val_loss"]' if self.always_validates else 'logs.get("val_loss", logs["loss"])'
            line = f"$lr_scheduler.step({value})"
            self.epoch_end += ['if "val_loss" in logs:', f"    {line}"] if self.due else [line]
        elif scheduler is not None:
            self.keyword("lr_scheduler", "LRScheduler")
            self.epoch_end += [] if self.steps_lr else ["$lr_scheduler.step()"]

    def _plan_metrics(self) -> None:
        """Settle how the head of the file shows each metric, and what its update() is given."""
        self.metric_texts: dict[str, tuple[str, str]] = {}  # code, note
        metrics = self.compiled.metrics
        if self.compiled.weighted_metrics:
            refuse("weighted_metrics", "torchmetrics objects take no sample weights; compile without")
        forms: dict[tuple[str, str], None] = {}
        for name, metric in metrics.items():
            if isinstance(metric, NamedMetric):
                text = describe_metric(metric, self.fit.inferred.get(name), self.device)
                self.metric_texts[name] = (text.code, "")
                forms[text.outputs, text.y] = None
                continue
            forms["outputs", "y"] = None
            if isinstance(metric, MeanMetric):
                function = describe(metric.values)
                self.metric_texts[name] = (f"MeanOf({function.code})", function.note)
            else:
                parts = [*metric.items()] if is_collection(metric) else [(name, metric)]
                self.metric_texts |= {key: ("...", f"your {type(part).__name__} object") for key, part in parts}
                if "dict" in str(inspect.signature(type(metric).compute).return_annotation).lower() and len(parts) == 1:
                    refuse(f"the metric {name!r}, which gives a dict", "give its parts as metrics of their own")
        self.has_functions = any(isinstance(metric, MeanMetric) for metric in metrics.values())
        are_named = all(isinstance(metric, NamedMetric) for metric in metrics.values())
        outputs, y = _one_form([*forms], metrics, are_named=are_named)
        gives_one_number = are_named and not any(metric.name == "confusion_matrix" for metric in metrics.values())
        self.read, self.number, self.format = ("item", "float", ":.4g") if gives_one_number else ("tolist", "Any", "")
        single = "" if self.compiled.mixed_precision is None else ".float()"
        self.update = (
            f"metric.update({outputs.replace('outputs', f'outputs<>{single}')}, {y if self.y == 'y' else 'None'})"
        )

    @property
    def has_flat_weights(self) -> bool:
        """Whether targets are (N, 1), whose class weights are (N,)."""
        shape = self.fit.target[0] if self.fit.target is not None else ()
        return bool(shape) and not self.one_hot and set(shape) == {1}

    @property
    def one_hot(self) -> bool:
        """Whether targets are one-hot rows of one class a sample."""
        shape, dtype = self.fit.target or ((), None)
        is_wide = dtype is not None and dtype.is_floating_point and bool(shape) and shape[0] > 1
        return is_wide and loss_scale(self.loss) not in ("label_logits", "probabilities")


def _one_form(forms: list[tuple[str, str]], metrics: Mapping[str, Any], *, are_named: bool) -> tuple[str, str]:
    """Return what update() is given of outputs and y; of classes and of their scores the scores do for both."""
    if not forms:
        return "outputs", "y"
    scores = max(forms)
    if any(y != scores[1] or outputs not in ("outputs", scores[0]) for outputs, y in forms) or (
        len(forms) > 1 and not are_named
    ):
        refuse(
            f"the metrics {', '.join(metrics)}, which take the outputs in different forms",
            "give all of them as torchmetrics objects",
        )
    return scores
