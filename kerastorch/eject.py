"""eject_model: the training of a compiled model, written out as one file of plain PyTorch in a loop's style.

Templates hold what every file has; "<block>" in them is filled with the lines that this model needs, or with none. A
"$" before a name becomes "self." in the class style, an argument in the function style, nothing in the script.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kerastorch import callbacks as kc
from kerastorch.callbacks.callback import HOOKS, Callback
from kerastorch.errors import check_choice
from kerastorch.loops import ClassLoop, FunctionLoop, function_loop, is_own_loop
from kerastorch.losses import OutputLosses, ignored_class, is_torch_own, loss_scale
from kerastorch.metrics import CLASSIFICATION, REGRESSION, MeanMetric, NamedMetric, known_logs
from kerastorch.optimizers import NamedOptimizers

if TYPE_CHECKING:
    from kerastorch.model import Model

STYLES = ("script", "function", "class")
WIDTH = 120
DOLLAR = "\0"  # stands for a "$" of the user's own until the last


def eject_model(
    model: Model,
    style: str,
    path: str | os.PathLike[str] | None = None,
    *,
    callbacks: Iterable[Callback] | None = None,
    class_weight: Mapping[int, float] | None = None,
) -> str:
    """Return, and write to path, a file of plain torch, torchmetrics and tqdm that trains as model.fit does.

    style: "script" (the whole loop in train), "function" or "class" (a Trainer, and train() that makes one).
    callbacks, class_weight: those of the last fit, unless given; [] and {} for none.
    The file's train(net, optimizer, loss_fn, metrics, train_data, val_data, epochs, *, ...) has what this model uses,
    no more; its first lines show how to call it. On a CPU it gives fit's weights to the bit and fit's history.
    Raises RuntimeError before compile(), ValueError for what can't be written out, with the way out.
    """
    check_choice("style", style, STYLES)
    if model._compiled is None:
        raise RuntimeError('call compile() before eject(), for example model.compile("cross_entropy", "adam").')
    if callbacks is None:
        callbacks = model.last_fit.callbacks
    if class_weight is None:
        class_weight = model.last_fit.class_weight
    source = _Writer(
        model, style, [callbacks] if isinstance(callbacks, Callback) else [*callbacks], class_weight
    ).file()
    if path is not None:
        temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        try:
            temporary.write_text(source, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return source


Lines = list[str]

FIT = """
history: dict[str, list[<number>]] = {}
<start>

for epoch in range(<epochs>):
    <epoch_begin>
    <train>
    <validate>
    <epoch_end>

    for name, value in logs.items():
        history.setdefault(name, []).append(value)
    print(f"Epoch {epoch + 1}/{epochs}:", ", ".join(f"{name} {value<format>}" for name, value in logs.items()))
    <save>
    <stop>
<after>
return history
"""
TRAIN_INLINE = """
# ---- train ----
$net.train()
<sums>
<batches>
    <forward>
    <backward>
    <add>
logs = {"loss": loss_sum.item() / num_samples}
logs |= {name: metric.compute().<read>() for name, metric in $metrics.items()}
"""
VALIDATE_INLINE = """
$net.eval()
<sums>
with torch.no_grad():
    <batches>
        <forward>
        <add>
logs["val_loss"] = loss_sum.item() / num_samples
logs |= {f"val_{name}": metric.compute().<read>() for name, metric in $metrics.items()}
"""
EPOCH = """
$net.<mode>()
<sums>
<batches>
    loss, outputs = <call>
    <own_lr_step>
    <add>
logs = {"loss": loss_sum.item() / num_samples}
return logs | {name: metric.compute().<read>() for name, metric in $metrics.items()}
"""
VALIDATE = """
val_logs = <call>
logs |= {f"val_{name}": value for name, value in val_logs.items()}
"""
STEP = """
<about>
<forward>
<backward>
return loss, outputs
"""
SUMS = """
for metric in $metrics.values():
    metric.reset()
loss_sum, num_samples = torch.zeros((), <dtype>device=$device), 0
"""
ADD = """
loss_sum.add_(<loss>, alpha=<n>)  # stays on the device: no sync
num_samples += <n>
for metric in $metrics.values():
    <update>
"""
SHARE = """
$window.append(<n>)
n, full = $window[-1], $accumulation_steps * $window[0]
# This batch's share of the window's mean loss.
share = loss / $accumulation_steps if n == $window[0] else loss * n / full
"""
UNEVEN = """
if sum($window) != full:  # a short window: its mean is over the samples that it has
    for parameter in <parameters>:
        if parameter.grad is not None:
            parameter.grad.mul_(full / sum($window))
$window.clear()
"""
CLASS_WEIGHTS = """
table = [$class_weight.get(index, 1.0) for index in range(max($class_weight) + 2)]
$class_weights = torch.tensor(table, device=$device)  # the last is that of all classes beyond
"""
TRAINER = """
class Trainer:
    \"\"\"Owns one training run; train_step and eval_step are the places to change.\"\"\"

"""
SAVE = """
def save(content: dict[str, Any], path: str) -> None:
    \"\"\"Write content to path so that a crash leaves the old file or the new one, whole.\"\"\"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


"""
CSV = """
with open($csv_path, "a" if epoch else "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, ["epoch", *logs]<options>, lineterminator="\\n")
    if epoch == 0:
        writer.writeheader()
    writer.writerow({"epoch": epoch, **logs})
"""
MEAN_OF = """
class MeanOf(Metric):
    \"\"\"The mean over samples of function(outputs, y): a scalar for the batch, or one value per sample.\"\"\"

    total: Tensor
    count: Tensor

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Any, y: Any) -> None:
        values = self.function(outputs, y)
        samples = len(y) if values.dim() == 0 else 1
        self.total += values.sum(dtype=torch.float64) * samples
        self.count += values.numel() * samples

    def compute(self) -> Tensor:
        return self.total / self.count


"""
RUN = """
class Run:
    \"\"\"What the steps below ask of run.\"\"\"

    def __init__(self, net: nn.Module, plain_loss_fn: <type>, optimizer: Optimizer, device: torch.device) -> None:
        self.net, self.plain_loss_fn, self.optimizer, self.device = net, plain_loss_fn, optimizer, device
        <scaler>

    def loss_fn(self, outputs: Any, y: Any, sample_weight: Tensor | None = None) -> Any:
        return self.plain_loss_fn(outputs, y)<mean>
"""
RUN_PARTS = {
    "forward": "def forward(self, x: Any) -> Any:\n    return self.<forward>",
    "autocast": "def autocast(self) -> AbstractContextManager[Any]:\n    return <autocast>",
    "share": "def share(self, loss: Tensor) -> Tensor:\n    return loss",
    "prepare_gradients": "def prepare_gradients(self) -> None:\n    <clip>",
    "step_is_due": "@property\ndef step_is_due(self) -> bool:\n    return True",
}
IMPORTS = {  # what a use of the name looks like -> the line
    r"copy\.": "import copy",
    r"csv\.": "import csv",
    r"math\.": "import math",
    r"os\.": "import os",
    r"Callable\[": "from collections.abc import Callable",
    r"Sequence\[": "from collections.abc import Sequence",
    r"AbstractContextManager\[": "from contextlib import AbstractContextManager",
    r"nullcontext\(": "from contextlib import nullcontext",
    r"Path\(": "from pathlib import Path",
    r"Any\b": "from typing import Any",
    r"torch\.": "import torch",
    r"Tensor\b": "from torch import Tensor",
    r"nn\.": "from torch import nn",
    r"Optimizer\b": "from torch.optim import Optimizer",
    r"LRScheduler\b": "from torch.optim.lr_scheduler import LRScheduler",
    r"ReduceLROnPlateau\b": "from torch.optim.lr_scheduler import ReduceLROnPlateau",
    r"DataLoader\[": "from torch.utils.data import DataLoader",
    r"Metric\b": "from torchmetrics import Metric",
    r"tqdm\(": "from tqdm import tqdm",
}
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
    "epochs": "int",
    "device": "torch.device",
    "scaler": "torch.amp.GradScaler",
    "class_weights": "Tensor",
    "sample_weight": "Tensor",
    "window": "list[int]",
    "is_last": "bool",
    "title": "str",
    "run": "Run",
}


class _Writer:
    """Finds out what the model uses, refuses what can't be written out, and fills the templates."""

    def __init__(
        self, model: Model, style: str, callbacks: list[Callback], class_weight: Mapping[int, float] | None
    ) -> None:
        assert model._compiled is not None
        self.model, self.compiled, self.style, self.class_weight = model, model._compiled, style, class_weight or None
        self.types = dict(TYPES)
        self.constants: Lines = []
        self.keywords: dict[str, tuple[str, str | None]] = {}  # of train(): name -> type, default
        self.state: dict[str, str] = {}  # what is kept from epoch to epoch: name -> first value
        self.before: Lines = []
        self.epoch_begin: Lines = []
        self.epoch_end: Lines = []
        self.saving: Lines = []
        self.after: Lines = []
        self._plan_data()
        self._plan_step()
        self._plan_metrics()
        self.own = _OwnSteps(self) if is_own_loop(model._loop) else None
        if self.own is not None:
            self.types["loss_fn"] = "Callable[..., Any]"
            for name in ("clip_grad_norm", "clip_grad_value") if "train_step" in self.own.steps else ():
                self.keywords.pop(name, None)  # Run knows them
        users = [one for one in callbacks if type(one) is kc.LambdaCallback or not _is_own(type(one).__module__)]
        for callback in callbacks:
            if callback not in users:
                self._plan_callback(callback)
            elif callback is users[0]:
                self._plan_user_callbacks(users)
        self._plan_checkpoints([one for one in callbacks if isinstance(one, kc.ModelCheckpoint)])
        self.keywords = dict(sorted(self.keywords.items(), key=lambda item: item[1][1] is not None))

    # ---- what is in use ----

    def _plan_data(self) -> None:
        model = self.model
        self.kind = model.last_fit.kind
        self.y_kind = model.last_fit.target_kind
        for name, kind in (("inputs", self.kind), ("targets", self.y_kind)):
            if kind not in MOVED:
                _refuse(f"{name} that are {kind!r}", "let the batches hold a tensor, or a tuple or dict of tensors")
        for name in ("steps_per_epoch", "validation_steps"):
            if getattr(model.last_fit, name) is not None:
                _refuse(
                    f"fit({name}=...), which reads a part of the data", "fit whole passes over a smaller DataLoader"
                )
        self.weighted, self.val_weighted = model.last_fit.sample_weights
        self.freq = model.last_fit.validation_freq
        self.always_validates = model.last_fit.validated is True
        if self.compiled.unpack is not None:
            self._keyword("unpack", "Callable[[Any], Any]")

    def _plan_step(self) -> None:
        compiled = self.compiled
        self.loss = compiled.loss
        if isinstance(self.loss, OutputLosses):
            _refuse("several losses, one an output", "compile one function (outputs, y) -> loss that sums them")
        if isinstance(compiled.optimizer, NamedOptimizers):
            _refuse("several optimizers", "write the loop round your train_step by hand")
        self.types["loss_fn"] = "nn.Module" if isinstance(self.loss, nn.Module) else "Callable[..., Tensor]"
        is_scalar = is_torch_own(self.loss) and _keyword_of(self.loss, "reduction", "mean") != "none"
        self.mean = "" if is_scalar else ".mean()"
        if self.class_weight is not None:
            entries = [f"{int(key)}: {float(value)}" for key, value in self.class_weight.items()]
            line = f"CLASS_WEIGHT = {{{', '.join(entries)}}}"
            is_long = len(line) > WIDTH
            self.constants += ["CLASS_WEIGHT = {", *(f"    {entry}," for entry in entries), "}"] if is_long else [line]
            self._keyword("class_weight", "dict[int, float]", "CLASS_WEIGHT")
        self.k = compiled.gradient_accumulation_steps
        if not isinstance(self.k, int):
            _refuse(f"gradient_accumulation_steps={self.k!r}", "give the number of batches that it settled on")
        if self.k > 1:
            self._keyword("accumulation_steps", "int", str(self.k))
        for name in ("clip_grad_norm", "clip_grad_value"):
            if getattr(compiled, name) is not None:
                self._keyword(name, "float", repr(float(getattr(compiled, name))))
        dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}.get(compiled.mixed_precision or "")
        self.autocast = f"torch.autocast($device.type, {dtype})" if dtype else ""
        self.scales = compiled.mixed_precision == "fp16"
        scheduler = compiled.lr_scheduler
        self.steps_lr = scheduler is not None and compiled.lr_scheduler_interval == "step"
        if isinstance(scheduler, ReduceLROnPlateau):
            self._keyword("lr_scheduler", "ReduceLROnPlateau")
            value = 'logs["val_loss"]' if self.always_validates else 'logs.get("val_loss", logs["loss"])'
            line = f"$lr_scheduler.step({value})"
            self.epoch_end += ['if "val_loss" in logs:', f"    {line}"] if self.freq != 1 else [line]
        elif scheduler is not None:
            self._keyword("lr_scheduler", "LRScheduler")
            self.epoch_end += [] if self.steps_lr else ["$lr_scheduler.step()"]

    def _plan_metrics(self) -> None:
        """Settle how the header shows each metric, and what its update() is given."""
        self.metric_texts: dict[str, str] = {}
        changes = {("", "")}
        inferred = self.model.last_fit.inferred
        metrics = self.compiled.metrics
        if self.compiled.weighted_metrics:
            _refuse("weighted_metrics", "torchmetrics objects take no sample weights; compile without")
        for name, metric in metrics.items():
            if isinstance(metric, NamedMetric):
                self.metric_texts[name], change = _describe_metric(metric, inferred.get(name), self.model.device)
                changes.add(change)
            elif isinstance(metric, MeanMetric):
                function, _, whose = _describe(metric.values).partition("  # ")
                self.metric_texts[name] = f"MeanOf({function}),  # {whose}" if whose else f"MeanOf({function})"
            else:
                parts = metric.items() if hasattr(metric, "keys") else [(name, metric)]
                self.metric_texts |= {key: f"...,  # your {type(part).__name__} object" for key, part in parts}
                if "dict" in str(inspect.signature(type(metric).compute).return_annotation).lower() and len(parts) == 1:
                    _refuse(f"the metric {name!r}, which gives a dict", "give its parts as metrics of their own")
        are_named = all(isinstance(metric, NamedMetric) for metric in metrics.values())
        if len(changes) > 2 or (len(changes) > 1 and not are_named):
            _refuse(
                f"the metrics {', '.join(metrics)}, which take the outputs in different forms",
                "give all of them as torchmetrics objects",
            )
        of_outputs, of_y = max(changes)  # the class of the largest logit is that of the largest score
        self.has_functions = any(isinstance(metric, MeanMetric) for metric in metrics.values())
        give_one_number = are_named and not any(metric.name == "confusion_matrix" for metric in metrics.values())
        self.read, self.number, self.format = ("item", "float", ":.4g") if give_one_number else ("tolist", "Any", "")
        single = "" if self.compiled.mixed_precision is None else ".float()"
        self.update = f"metric.update(outputs{{}}{single}{of_outputs}, y{of_y})"

    def _keyword(self, name: str, annotation: str, default: str | None = None) -> None:
        if name in self.keywords:
            _refuse(f"two callbacks that need {name!r}", "leave one of them out, callbacks=[...]")
        self.keywords[name] = (annotation, default)

    def _path(self, name: str, path: str) -> None:
        """Give train() the keyword of a path; a long one becomes a constant, in parts that fit a line."""
        default = _quote(path)
        if len(default) > 80:
            parts = [path[i : i + 80] for i in range(0, len(path), 80)]
            line = f"{name.upper()} = {default}"
            folded = [f"{name.upper()} = (", *(f"    {_quote(part)}" for part in parts), ")"]
            self.constants += [line] if len(line) <= WIDTH else folded
            default = name.upper()
        self._keyword(name, "str", default)

    # ---- callbacks ----

    def _plan_callback(self, callback: Callback) -> None:
        if isinstance(callback, kc.ModelCheckpoint):
            return  # written after the others
        planners: dict[type[Callback], Callable[[Any], None]] = {
            kc.EarlyStopping: self._plan_early_stopping,
            kc.CSVLogger: self._plan_csv,
            kc.LearningRateScheduler: self._plan_schedule,
            kc.TerminateOnNaN: self._plan_nan,
        }
        kind = type(callback)
        if kind in planners:
            planners[kind](callback)
            return
        ways_out: dict[type[Callback], str] = {
            kc.BackupAndRestore: "use ModelCheckpoint, whose file the ejected train() can resume from",
            kc.ReduceLROnPlateau: 'use compile(lr_scheduler="reduce_on_plateau")',
            kc.TensorBoard: "give torch.utils.tensorboard.SummaryWriter the logs where the file prints them",
        }
        way_out = ways_out.get(kind, "write its work, torch.optim.swa_utils say, into the ejected file")
        _refuse(f"the callback {kind.__name__}", f"leave it out, callbacks=[...], and {way_out}")

    def _plan_user_callbacks(self, users: list[Callback]) -> None:
        places = {
            "on_train_begin": ("{}", self.before),
            "on_epoch_begin": ("epoch, {}", self.epoch_begin),
            "on_epoch_end": ("epoch, logs", self.epoch_end),
            "on_train_end": ("logs", self.after),
        }
        called = set()
        for callback in users:
            for hook in HOOKS:
                function, name = getattr(callback, hook), f"{type(callback).__name__}.{hook}()"
                if getattr(function, "__func__", None) is getattr(Callback, hook):
                    continue
                if hook not in places:
                    _refuse(f"{name}, which is called inside an epoch", "write its work into the ejected file")
                source = _source_of(function, name) if hasattr(function, "__func__") else ""
                if used := re.search(r"\bself\.(model|run|params)\b", source):
                    _refuse(f"{name}, which uses {used[0]}", "write its work into the ejected file")
                called.add(hook)
        self._keyword("callbacks", "Sequence[Any]")
        for hook in sorted(called, key=HOOKS.index):
            given, lines = places[hook]
            lines += ["for callback in $callbacks:  # your own objects", f"    callback.{hook}({given})"]
        if "on_train_end" in called:
            self.state["logs"] = "{}"

    def _plan_early_stopping(self, callback: kc.EarlyStopping) -> None:
        watched, delta = callback._watched, ""
        self._keyword("patience", "int", str(callback.patience))
        if watched.min_delta:
            delta = "$min_delta"
            self._keyword("min_delta", "float", repr(float(watched.min_delta)))
        value, is_better = self._gain(watched, "best", delta)
        self.state |= {"best": _worst(is_better), "wait": "0", "should_stop": "False"}
        gained = [f"best = {value}" if callback.baseline is not None else f"best, wait = {value}, 0"]
        if callback.restore_best_weights:
            self.state["best_weights"] = "None"
            gained.append("best_weights = copy.deepcopy($net.state_dict())")
            self.after += ["if best_weights is not None:", "    $net.load_state_dict(best_weights)"]
        if callback.baseline is not None:
            self._keyword("baseline", "float", repr(float(callback.baseline)))
            gained += [f"if {self._gain(watched, '$baseline', delta)[1]}:", "    wait = 0"]
        lines = ["wait += 1", f"if {is_better}:", *_indent(gained)]
        lines += ["elif wait >= $patience and epoch > 0:  # the first epoch has nothing to be compared with"]
        lines += ["    should_stop = True"]
        conditions = [self._when_known(watched)] if self._when_known(watched) else []
        if callback.start_from_epoch:
            self._keyword("start_from_epoch", "int", str(callback.start_from_epoch))
            conditions.append("epoch >= $start_from_epoch")
        self.epoch_end += ["", "# ---- early stopping ----"]
        self.epoch_end += [f"if {' and '.join(conditions)}:", *_indent(lines)] if conditions else lines

    def _gain(self, watched: Any, best: str, min_delta: str = "") -> tuple[str, str]:
        """Return the texts of the value and of the test that it beats best."""
        is_max: bool | None = watched.mode == "max"
        if watched.mode == "auto":
            is_max = known_logs(self.compiled.metrics).get(watched.name.removeprefix("val_"))
        if is_max is None:
            raise ValueError(
                f"monitor={watched.name!r}: whether higher is better is not known; pass mode='min' or 'max'."
            )
        value, (sign, relation) = f'logs["{watched.name}"]', ("-", ">") if is_max else ("+", "<")
        return value, f"{value} {sign} {min_delta} {relation} {best}" if min_delta else f"{value} {relation} {best}"

    def _when_known(self, watched: Any) -> str:
        return f'"{watched.name}" in logs' if self.freq != 1 and watched.name.startswith("val_") else ""

    def _plan_csv(self, callback: kc.CSVLogger) -> None:
        if callback.append or self.freq != 1:
            what = "CSVLogger(append=True)" if callback.append else "CSVLogger beside validation_freq"
            _refuse(what, "leave it out and write the history that train() returns")
        self._path("csv_path", callback.filename)
        options = "" if callback.separator == "," else f", delimiter={_quote(callback.separator)}"
        self.epoch_end += _fill(CSV, options=options)

    def _plan_schedule(self, callback: kc.LearningRateScheduler) -> None:
        self._keyword("schedule", f"Callable[[{'int, float' if callback.takes_lr else 'int'}], float]")
        given = 'epoch, $optimizer.param_groups[0]["lr"]' if callback.takes_lr else "epoch"
        self.epoch_begin += [f"lr = float($schedule({given}))", "for group in $optimizer.param_groups:"]
        self.epoch_begin += ['    group["lr"] = lr']
        self.epoch_end += ['logs["learning_rate"] = lr']

    def _plan_nan(self, callback: kc.TerminateOnNaN) -> None:
        self.state["should_stop"] = "False"
        stop = 'raise RuntimeError(f"Epoch {epoch + 1}: the loss is not finite.")' if callback.raise_error else ""
        note = "  # read once an epoch: no sync a step"
        self.epoch_end += [f'if not math.isfinite(logs["loss"]):{note}', f"    {stop or 'should_stop = True'}"]

    def _plan_checkpoints(self, writers: list[kc.ModelCheckpoint]) -> None:
        writers.sort(key=lambda writer: not writer.chooses)
        for writer in writers:
            if writer.save_freq != "epoch":
                _refuse(f"ModelCheckpoint(save_freq={writer.save_freq}), inside an epoch", "use save_freq='epoch'")
            if writer.keep_last is not None or writer.keep_best is not None:
                _refuse(
                    "ModelCheckpoint(keep_last=, keep_best=), which deletes files", "use save_best_only, or neither"
                )
        if len(writers) > 2 or len({writer.chooses for writer in writers}) < len(writers):
            _refuse(
                "several ModelCheckpoints of one kind", "give one for the best epoch and one for every epoch at most"
            )
        self.resumes = any(not writer.chooses and not writer.save_weights_only for writer in writers)
        tests: Lines = []
        saves: Lines = []
        for writer in writers:
            name = "best_path" if writer.chooses and len(writers) > 1 else "checkpoint_path"
            self._path(name, writer.filepath)
            path = f"${name}.format(epoch=epoch + 1, **logs)" if writer._fields else f"${name}"
            save = f"save({'$net.state_dict()' if writer.save_weights_only else 'checkpoint'}, {path})"
            if not writer.chooses:
                saves.append(save)
                continue
            value, is_better = self._gain(writer._watched, "best_saved")
            threshold = writer.initial_value_threshold
            self.state["best_saved"] = _worst(is_better) if threshold is None else repr(float(threshold))
            known = self._when_known(writer._watched)
            tests = [
                f"is_best = {known + ' and ' if known else ''}{is_better}",
                "if is_best:",
                f"    best_saved = {value}",
            ]
            saves += ["if is_best:", f"    {save}"]
        makes_dict = not all(writer.save_weights_only for writer in writers)
        if self.resumes:
            self._keyword("resume_from", "str | None", "None")
        if len(writers) == 1 and tests:  # all under one condition
            made = _indent(self._checkpoint()) if makes_dict else []
            self.saving = [tests[0].replace("is_best =", "if") + ":", tests[2], *made, saves[1]]
        else:
            self.saving = [*tests, *(self._checkpoint() if makes_dict else []), *saves]

    @property
    def _parts(self) -> dict[str, str]:
        """What has a state_dict in a checkpoint: key -> name."""
        parts = {"model_state_dict": "$net", "optimizer_state_dict": "$optimizer"}
        parts |= {"lr_scheduler_state_dict": "$lr_scheduler"} if self.compiled.lr_scheduler is not None else {}
        parts |= {"scaler_state_dict": "$scaler"} if self.scales else {}
        has_state = isinstance(self.loss, nn.Module) and self.loss.state_dict()
        return parts | ({"loss_state_dict": "$loss_fn"} if has_state else {})

    @property
    def _kept(self) -> list[str]:
        return [name for name in self.state if name not in ("should_stop", "logs")]

    def _checkpoint(self) -> Lines:
        """Return the lines that make the usual recipe's dict and, to resume from, what else the run goes on with."""
        entries = {"epoch": "epoch", "loss": 'logs["loss"]'}
        entries |= {key: f"{name}.state_dict()" for key, name in self._parts.items()}
        if self.resumes:
            stop = ["should_stop"] if "should_stop" in self.state else []
            entries |= {name: name for name in [*self._kept, *stop, "history"]}
            entries["rng_state"] = "torch.get_rng_state()"
            if self.model.device.type == "cuda":
                entries["cuda_rng_state"] = "torch.cuda.get_rng_state($device)"
        return ["checkpoint = {", *(f'    "{key}": {value},' for key, value in entries.items()), "}"]

    def _resume(self) -> Lines:
        lines = ['checkpoint = torch.load($resume_from, map_location="cpu", weights_only=True)']
        lines += [f'{name}.load_state_dict(checkpoint["{key}"])' for key, name in self._parts.items()]
        lines += ['start_epoch, history = checkpoint["epoch"] + 1, checkpoint["history"]']
        if "should_stop" in self.state:
            lines += ['if checkpoint["should_stop"]:', "    start_epoch = epochs  # that run was over"]
        lines += [f'{name} = checkpoint["{name}"]' for name in self._kept]
        lines += ['torch.set_rng_state(checkpoint["rng_state"])  # shuffling and dropout go on as they would have']
        if self.model.device.type == "cuda":
            lines += ['torch.cuda.set_rng_state(checkpoint["cuda_rng_state"], $device)']
        return ["start_epoch = 0", "if $resume_from is not None:", *_indent(lines)]

    # ---- the stages ----

    def _names(self, trains: bool) -> list[str]:
        return ["x", "y", *(["sample_weight"] if (self.weighted if trains else self.val_weighted) else [])]

    def _batches(self, trains: bool, title: str) -> Lines:
        """Return the head of the loop over the data, and the batch's move to the device."""
        names = ", ".join(self._names(trains))
        batches = f"tqdm(train_data, desc={title}, leave=False)" if trains else "val_data"
        batch = "batch" if self.compiled.unpack is not None else names
        counts = trains and self.k > 1
        if counts:
            batch, batches = f"i, {batch}" if batch == "batch" else f"i, ({batch})", f"enumerate({batches})"
        moved = [MOVED[self.kind][0].format("x"), MOVED[self.y_kind][0].format("y")]
        moved += ["sample_weight.to($device)"] if "sample_weight" in names else []
        return [
            f"for {batch} in {batches}:",
            *([f"    {names} = $unpack(batch)"] if self.compiled.unpack is not None else []),
            f"    {names} = {', '.join(moved)}",
            *(["    is_last = i + 1 == len(train_data)"] if counts else []),
        ]

    def _forward(self, trains: bool) -> Lines:
        lines, weights = [f"outputs = ${MOVED[self.kind][1]}"], "sample_weight"
        if trains and self.class_weight is not None:
            shapes = list(self.model.last_fit.inferred.values())
            is_one_hot = shapes and loss_scale(self.loss) == "class_logits" and len(shapes[0][0]) == len(shapes[0][2])
            y, weights = "y.argmax(1)" if is_one_hot else "y", "weights"
            if loss_scale(self.loss) in ("label_logits", "probabilities"):
                y = "y.round().long()"
            lines.append(f"weights = $class_weights[{y}.clamp(0, len($class_weights) - 1)]")
            if self.weighted:
                lines.append("weights = weights * sample_weight.reshape(-1, *[1] * (weights.dim() - 1))")
        if weights == "weights" or "sample_weight" in self._names(trains):
            lines.append(f"loss = weighted_loss($loss_fn, outputs, y, {weights})")
        else:
            lines.append(f"loss = $loss_fn(outputs, y){self.mean}")
        return [f"with {self.autocast}:", *_indent(lines)] if self.autocast else lines

    def _backward(self) -> Lines:
        loss = "loss" if self.k == 1 else "share"
        lines = [f"$scaler.scale({loss}).backward()" if self.scales else f"{loss}.backward()"]
        step = ["$scaler.step($optimizer)", "$scaler.update()"] if self.scales else ["$optimizer.step()"]
        step += ["$optimizer.zero_grad()", *(["$lr_scheduler.step()"] if self.steps_lr else [])]
        if self.k == 1:
            return [*lines, *self._clip(), *step]
        clip = self._clip()
        unscale = [clip.pop(0)] if clip and self.scales else []  # before the uneven window is looked at
        return [
            *_fill(SHARE, n=MOVED[self.kind][2]),
            *lines,
            "if is_last or len($window) == $accumulation_steps:",
            *_indent([*unscale, *_fill(UNEVEN, parameters=self._parameters()), *clip, *step]),
        ]

    def _parameters(self) -> str:
        held = [id(p) for group in self.compiled.optimizer.param_groups for p in group["params"]]
        if held == [id(p) for p in self.model.net.parameters()]:
            return "$net.parameters()"
        return '[p for group in $optimizer.param_groups for p in group["params"]]'

    def _clip(self) -> Lines:
        lines = [
            f"nn.utils.clip_grad_{kind}_({self._parameters()}, $clip_grad_{kind})"
            for kind in ("norm", "value")
            if getattr(self.compiled, f"clip_grad_{kind}") is not None
        ]
        return (
            ["$scaler.unscale_($optimizer)  # to clip the true gradients", *lines] if lines and self.scales else lines
        )

    def _stages(self, trains: bool, title: str = 'f"Epoch {epoch + 1}/{epochs}"') -> dict[str, str | Lines]:
        n = "len(x)" if self.kind == "tensor" else "n"
        update = self.update.format(".detach()" if trains and not self.has_functions else "")
        dtype = "" if self.model.device.type == "mps" else "dtype=torch.float64, "
        return {
            "sums": _fill(SUMS, dtype=dtype),
            "batches": self._batches(trains, title),
            "forward": self._forward(trains),
            "backward": self._backward() if trains else [],
            "add": [
                *([] if n == "len(x)" else [f"n = {MOVED[self.kind][2]}"]),
                *_fill(ADD, loss="loss.detach()" if trains else "loss", n=n, update=update),
            ],
            "read": self.read,
        }

    # ---- the frames ----

    def file(self) -> str:
        """Return the whole file."""
        code: Lines = []
        if self.weighted or self.val_weighted or self.class_weight is not None:
            code += self._weighted_loss()
        code += _fill(MEAN_OF) if self.has_functions else []
        code += _fill(SAVE) if self.saving else []
        code += self.own.run_class() if self.own is not None else []
        if self.style == "script":
            validate = _fill(VALIDATE_INLINE, **self._stages(False))
            fit = self._fit(_fill(TRAIN_INLINE, **self._stages(True)), validate, ["", "# ---- validate ----"])
            body = [*self._setup(), *fit]
        else:
            body = self._functions(code)
        keywords = [f"{n}: {kind}" + ("" if d is None else f" = {d}") for n, (kind, d) in self.keywords.items()]
        arguments = [*self._typed(["net", "optimizer", "loss_fn", "metrics"]), *self._data()]
        arguments += ["*", *keywords] if keywords else []
        code += _define("train", arguments, f"dict[str, list[{self.number}]]", [*self._about(), *body])
        text = "\n".join(_folded(line.replace("$", "")) for line in code).strip("\n")
        imports = {line for name, line in IMPORTS.items() if re.search(rf"(?<![\w.\"]){name}", text)}
        imports |= self.own.imports if self.own is not None else set()
        constants = ["", *self.constants] if self.constants else []
        header = [f'"""{self._header()}"""', "", "# mypy: disable-error-code=import-untyped", ""]
        file = "\n".join([*header, *_sorted_imports(imports), *constants, "", "", text]) + "\n"
        return file.replace(DOLLAR, "$")

    def _functions(self, code: Lines) -> Lines:
        """Add the functions, or the Trainer, to code; return the body of train()."""
        pieces: Lines = []
        calls = {}
        for trains, kind, epoch, data in (
            (True, "train", "train_epoch", "train_data"),
            (False, "eval", "evaluate", "val_data"),
        ):
            stages = self._stages(trains, "title")
            if self.own is not None and f"{kind}_step" in self.own.steps:
                step, call = self.own.steps[f"{kind}_step"]
                stages["own_lr_step"] = ["$lr_scheduler.step()"] if trains and self.steps_lr else []
            else:
                about = "Update the weights on one batch; return" if trains else "Return"
                stages["about"] = f'"""{about} the loss and the outputs{"" if trains else " of one batch"}."""'
                names = self._names(trains) + (["is_last"] if trains and self.k > 1 else [])
                step, call = self._piece(f"{kind}_step", names, "tuple[Tensor, Tensor]", _fill(STEP, **stages))
            stages |= {"call": call, "mode": kind}
            extra = [data, "title"] if trains else [data]
            body = _fill(EPOCH, **{"own_lr_step": [], **stages})
            epoch_lines, call = self._piece(epoch, extra, f"dict[str, {self.number}]", body)
            calls[epoch] = call.replace("title", 'f"Epoch {epoch + 1}/{epochs}"')
            epoch_lines = epoch_lines if trains else ["@torch.no_grad()", *epoch_lines]
            pieces += [*step, *epoch_lines] if self.style == "function" else [*epoch_lines, *step]
        fit = self._fit([f"logs = {calls['train_epoch']}"], _fill(VALIDATE, call=calls["evaluate"]), [])
        if self.style == "function":
            code += pieces
            return [*self._setup(), *fit]
        given = ["net", "optimizer", "loss_fn", "metrics", *self.keywords]
        init = ["self", *self._typed(given[:4]), *(["*", *self._typed(given[4:])] if given[4:] else [])]
        methods = [
            *_define("__init__", init, "None", [*(f"${name} = {name}" for name in given), *self._setup()]),
            *_define("fit", ["self", *self._data()], f"dict[str, list[{self.number}]]", fit),
            *pieces,
        ]
        methods = [line for i, line in enumerate(methods) if line or methods[i - 1]]  # one empty line between them
        code += [line.replace("$", "self.") for line in [*_fill(TRAINER), *_indent(methods), ""]]
        call = ", ".join([*given[:4], *(f"{name}={name}" for name in given[4:])])
        return [f"trainer = Trainer({call})", "return trainer.fit(train_data, val_data, epochs)"]

    def _piece(self, name: str, extra: list[str], returns: str, body: Lines) -> tuple[Lines, str]:
        """Return a function, or a method, of the lines in body, and a call of it."""
        if self.style == "class":
            return _define(name, ["self", *self._typed(extra)], returns, body), f"${name}({', '.join(extra)})"
        found = re.findall(r"\$(\w+)", "\n".join(body))
        needed = sorted(dict.fromkeys(found), key=lambda one: list(TYPES).index(one) if one in TYPES else len(TYPES))
        lines = _define(name, self._typed([*needed, *extra]), returns, body)
        return lines, f"{name}({', '.join([*(f'${one}' for one in needed), *extra])})"

    def _fit(self, train: Lines, validate: Lines, title: Lines) -> Lines:
        conditions = [] if self.always_validates else ["val_data is not None"]
        if self.freq != 1:
            due = (
                f"(epoch + 1) % {self.freq} == 0" if isinstance(self.freq, int) else f"epoch + 1 in {sorted(self.freq)}"
            )
            conditions.append(due)
        if conditions:
            validate = [f"if {' and '.join(conditions)}:", *_indent(validate)]
        kept = [f"{n}: dict[str, Any] = {v}" if n == "logs" else f"{n} = {v}" for n, v in self.state.items()]
        return _fill(
            FIT,
            number=self.number,
            start=[*kept, *(self._resume() if self.resumes else []), *self.before],
            epochs="start_epoch, epochs" if self.resumes else "epochs",
            epoch_begin=self.epoch_begin,
            train=train,
            validate=[*title, *validate],
            epoch_end=self.epoch_end,
            format=self.format,
            save=["", "# ---- checkpoint ----", *self.saving] if self.saving else [],
            stop=["if should_stop:", "    break"] if "should_stop" in self.state else [],
            after=self.after,
        )

    def _setup(self) -> Lines:
        lines = ["$device = next($net.parameters()).device"]
        lines += ["for metric in $metrics.values():", "    metric.to($device)"]
        has_own_step = self.own is not None and "train_step" in self.own.steps
        if self.own is not None:
            lines.append("$run = Run($net, $loss_fn, $optimizer, $device)")
            lines += ["$loss_fn = $run.loss_fn"] if self.style == "class" else []
        if self.scales and has_own_step and self.saving:
            lines.append("$scaler = $run.scaler")
        elif self.scales and not has_own_step:
            lines.append("$scaler = torch.amp.GradScaler($device.type)")
        if self.class_weight is not None:
            lines += _fill(CLASS_WEIGHTS)
        if self.k > 1:
            lines.append("$window: list[int] = []  # samples of each batch since the last optimizer step")
        return lines

    def _data(self) -> Lines:
        train_data, val_data, epochs = self._typed(["train_data", "val_data", "epochs"])
        return [train_data, val_data + ("" if self.always_validates else " | None"), epochs]

    def _typed(self, names: list[str]) -> list[str]:
        types = {**self.types, **{name: kind for name, (kind, _) in self.keywords.items()}}
        types |= {"x": types[self.kind], "y": types[self.y_kind]}
        return [f"{name}: {types[name]}" for name in names]

    def _about(self) -> Lines:
        x = {"tensor": "x", "tuple": "(x, ...)", "dict": "{argument of forward: x}"}[self.kind]
        maker = "that unpack makes " if self.compiled.unpack is not None else ""
        batches = [f"batches {maker}({', '.join([x, *self._names(trains)[1:]])})." for trains in (True, False)]
        lines = [
            '"""Train net in place; return the history, {"loss": [one an epoch], each metric, and both as val_...}.',
            "",
        ]
        if batches[0] == batches[1]:
            lines += [f"train_data, val_data: {batches[0]}   metrics: torchmetrics objects by name."]
        else:
            lines += [f"train_data: {batches[0]}   val_data: {batches[1]}   metrics: torchmetrics objects by name."]
        if self.resumes:
            lines.append("resume_from: a file that an earlier run wrote at checkpoint_path, to go on after its epoch.")
        return [*lines, '"""']

    def _weighted_loss(self) -> Lines:
        """Return a function of the weighted loss that calls the loss as kerastorch does."""
        mean, comment = "(losses * weights).mean()", ""
        reduction, ignored = _keyword_of(self.loss, "reduction", "mean"), ignored_class(self.loss)
        if reduction in ("sum", "batchmean"):
            mean = "(losses * weights).sum()" + (" / len(losses)" if reduction == "batchmean" else "")
        elif ignored is not None:
            mean += f" * (y.numel() / (y != {ignored}).sum())"
            comment = f"  # targets of {ignored} do not count"
        losses = ["losses: Tensor = loss_fn(outputs, y)"]
        if isinstance(self.loss, nn.Module) and hasattr(self.loss, "reduction"):
            losses = ["one_each: Any = copy.copy(loss_fn)  # shares parameters", 'one_each.reduction = "none"']
            losses += ["losses: Tensor = one_each(outputs, y)"]
        elif not isinstance(self.loss, nn.Module) and "reduction" in inspect.signature(self.loss).parameters:
            losses = ['losses = loss_fn(outputs, y, reduction="none")']
        if self.weighted or self.val_weighted:
            losses += ["if weights.dim() == 1:", "    weights = weights.reshape(-1, *[1] * (losses.dim() - 1))"]
        about = '"""Return the mean of the samples\' losses, each times its weight."""'
        arguments = [f"loss_fn: {self.types['loss_fn']}", "outputs: Tensor", "y: Tensor", "weights: Tensor"]
        return _define("weighted_loss", arguments, "Tensor", [about, *losses, f"return {mean}{comment}"])

    # ---- the header ----

    def _header(self) -> str:
        """Return the module's docstring: the lines that call train() with what the model was compiled with."""
        device = self.model.device
        moved = f'.to("{device}")' if device.type != "cpu" else ""
        of_loss = moved if isinstance(self.loss, nn.Module) else ""
        lines = [f"epochs = {len(self.model.history.epoch) or 10}", *([f"net = net{moved}"] if moved else [])]
        lines += [f"optimizer = {self._optimizer_text()}", f"loss_fn = {_describe(self.loss)}{of_loss}"]
        entries = [
            f"    {_quote(name)}: {text}" + ("" if ",  #" in text else ",") for name, text in self.metric_texts.items()
        ]
        lines += ["metrics = {", *entries, "}"] if entries else ["metrics = {}"]
        val_data = "None" if self.model.last_fit.validated is False else "val_data"
        lines += self._loader_texts(val_data != "None")
        if self.compiled.lr_scheduler is not None:
            lines.append(f"lr_scheduler = {self._scheduler_text()}")
        given = ["net", "optimizer", "loss_fn", "metrics", "train_data", val_data]
        given.append("epochs")
        given += [f"{name}={name}" for name, (_, default) in self.keywords.items() if default is None]
        lines.append(f"history = train({', '.join(given)})")
        text = "\n".join(textwrap.fill(f"    {line}", WIDTH, subsequent_indent="        ") for line in lines)
        head = f'Training in plain PyTorch, written by Model.eject("{self.style}").'
        return f"{head}\n\nWith what the model was compiled with:\n\n{text}\n"

    def _loader_texts(self, validates: bool) -> Lines:
        size = self.model.last_fit.batch_size or 32
        lines = []
        for data, trains, suffix in (("train_data", True, ""), ("val_data", False, "_val")):
            columns = ", ".join(f"{name}{suffix}" for name in self._names(trains))
            rows = f"TensorDataset({columns})"
            if self.kind != "tensor" or self.y_kind != "tensor" or self.compiled.unpack is not None:
                rows = f"dataset{suffix}"
            shuffles = ", shuffle=True" if trains else ""
            lines.append(f"{data} = DataLoader({rows}, batch_size={size}{shuffles})")
        lines[0] += "  # or a loader of your own"
        return lines if validates else lines[:1]

    def _optimizer_text(self) -> str:
        optimizer = self.compiled.optimizer
        named = {id(p): name for name, p in self.model.net.named_parameters()}
        texts = []
        for group in optimizer.param_groups:
            names = [named.get(id(p), "") for p in group["params"]]
            options = {key: group[key] for key in optimizer.defaults if group[key] != optimizer.defaults[key]}
            options |= {"lr": group["initial_lr"]} if "lr" in options and "initial_lr" in group else {}
            shown = "".join(f', "{key}": {_describe(value)}' for key, value in options.items())
            texts.append(f'{{"params": [net.get_parameter(name) for name in {_describe(names)}]{shown}}}')
        parameters = f"[{', '.join(texts)}]"
        if len(texts) == 1:
            held = {id(p) for p in optimizer.param_groups[0]["params"]}
            parameters = "net.parameters()" if held <= named.keys() else "[*net.parameters(), *loss_fn.parameters()]"
        return _describe_call(type(optimizer), optimizer.defaults, parameters, always="lr")

    def _scheduler_text(self) -> str:
        scheduler, steps = self.compiled.lr_scheduler, "epochs"
        if self.steps_lr:
            steps += " * len(train_data)" if self.k == 1 else f" * math.ceil(len(train_data) / {self.k})"
        if scheduler == "cosine":
            return f"torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max={steps})"
        if scheduler == "one_cycle":
            groups = self.compiled.optimizer.param_groups
            cycles = "" if all(g.get("momentum") or "betas" in g for g in groups) else ", cycle_momentum=False"
            rates = '[group["lr"] for group in optimizer.param_groups]'
            return f"torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr={rates}, total_steps={steps}{cycles})"
        return _describe_call(type(scheduler), vars(scheduler), "optimizer")


def _refuse(what: str, way_out: str) -> NoReturn:
    raise ValueError(f"eject() can't write out {what}: {way_out}.")


def _indent(lines: Lines, levels: int = 1) -> Lines:
    return [textwrap.indent(line, "    " * levels) for line in lines]


def _fill(template: str, **blocks: str | Lines) -> Lines:
    """Return the template's lines with each "<block>" filled in; a line that is one empty block falls away."""
    lines: Lines = []
    for line in template[1:-1].split("\n"):
        whole = re.fullmatch(r"( *)<(\w+)>", line)
        if whole:
            block = blocks[whole[2]]
            lines += [textwrap.indent(part, whole[1]) for part in ([block] if isinstance(block, str) else block)]
        else:
            lines.append(re.sub(r"<(\w+)>", lambda found: str(blocks[found[1]]), line))
    return lines


def _define(name: str, arguments: Lines, returns: str, body: Lines) -> Lines:
    return [f"def {name}({', '.join(arguments)}) -> {returns}:", *_indent(body), "", ""]


def _worst(is_better: str) -> str:
    return "-math.inf" if ">" in is_better else "math.inf"


def _is_own(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


def _folded(line: str) -> str:
    """Return a line that is too long with what its first bracket holds on lines of their own."""
    head, bracket, rest = line.partition("(")
    if len(line) <= WIDTH or not bracket:
        return line
    parts, depth = [""], 1
    tokens = iter(re.findall(r'"(?:[^"\\]|\\.)*"|.', rest))
    for token in tokens:
        depth += (token in "([{") - (token in ")]}")
        if not depth:
            break
        if token == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += token
    margin = line[: len(line) - len(line.lstrip())]
    middle = [f"{margin}    {part.strip()}," for part in parts]
    return "\n".join([f"{head}(", *middle, f"{margin}){''.join(tokens)}"])


def _sorted_imports(lines: Iterable[str]) -> Lines:
    """Return imports as isort orders them: the standard library first, "import" before "from", names joined."""
    plain = sorted(line for line in lines if line.startswith("import"))
    froms: dict[str, set[str]] = {}
    for line in lines:
        if line.startswith("from"):
            _, module, _, names = line.split(" ", 3)
            froms.setdefault(module, set()).add(names)
    joined = [f"from {m} import {', '.join(sorted(froms[m], key=_import_key))}" for m in sorted(froms)]
    blocks: Lines = []
    for is_standard in (True, False):
        part = [one for one in [*plain, *joined] if (_root(one) in sys.stdlib_module_names) is is_standard]
        blocks += ["", *part] if part and blocks else part
    return [line + TQDM_NOTE if line == "from tqdm import tqdm" else line for line in blocks]


TQDM_NOTE = "  # tqdm.auto begins each pass twice, which draws random numbers"


def _import_key(name: str) -> tuple[int, str]:
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)


def _root(line: str) -> str:
    return line.split()[1].partition(".")[0]


def _quote(text: str | os.PathLike[str]) -> str:
    return json.dumps(os.fspath(text), ensure_ascii=False).replace("$", DOLLAR)


def _keyword_of(loss: object, name: str, default: Any) -> Any:
    return loss.keywords.get(name, default) if isinstance(loss, partial) else getattr(loss, name, default)


def _describe(value: Any) -> str:
    """Return the text that makes value again, or "..." and what it is."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(_describe, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, Tensor) and value.numel() <= 32:
        return f"torch.tensor({value.tolist()})"
    if isinstance(value, nn.Module) and is_torch_own(value) and type(value).__module__.startswith("torch."):
        return _describe_call(type(value), {**vars(value), **value._buffers})
    name = getattr(value, "__name__", type(value).__name__)
    if getattr(F, name, None) is value:
        return f"torch.nn.functional.{name}"
    return f"...  # your {'function' if name == '<lambda>' else name}"


def _describe_call(cls: type, values: Mapping[str, Any], first: str = "", always: str = "") -> str:
    """Return the text of a call of cls with those of values that are no defaults; "..." where they do not tell."""
    given, note = [first] if first else [], ""
    for name, parameter in list(inspect.signature(cls).parameters.items())[len(given) :]:
        several = values.get(f"{name}s", [])  # as a scheduler keeps them, one a group
        value = values.get(name, several[0] if several else parameter.default)
        if name in ("last_epoch", "size_average", "reduce"):
            continue
        if value is parameter.empty:
            given.append(f"{name}=...")
        elif name == always or (value is not parameter.default and not _is_equal(value, parameter.default)):
            given.append(f"{name}={_describe(value).partition('  #')[0]}")
        elif name not in values and not several:
            note = "  # and what else you gave it"
    public = {"torch.optim.lr_scheduler": lr_scheduler, "torch.optim": torch.optim, "torch.nn": nn}
    module = next((name for name, one in public.items() if getattr(one, cls.__name__, None) is cls), cls.__module__)
    return f"{module}.{cls.__name__}({', '.join(given)}){note}"


def _is_equal(value: object, default: object) -> bool:
    return isinstance(value, (int, float, str, tuple)) and value == default


def _describe_metric(
    metric: NamedMetric, inferred: list[Any] | None, device: torch.device
) -> tuple[str, tuple[str, str]]:
    """Return the torchmetrics object that equals a metric by name, and how outputs and y are changed for it.

    inferred: shape and dtype of the outputs and of the targets that it has seen, where that is known.
    """
    name, scale = metric.name, metric.scale
    if name in REGRESSION:
        cls, arguments = REGRESSION[name]
        if not cls:  # one of those that are summed without torchmetrics
            cls = "MeanAbsoluteError" if name in ("mae", "mean_absolute_error") else "MeanSquaredError"
            arguments = {"squared": False} if name.startswith("r") else {}
        text = ", ".join(f"{key}={_describe(value)}" for key, value in arguments.items())
        flat = ".flatten()" if inferred is not None and inferred[0] != inferred[2] else ""
        change = (f".double(){flat}", f".double(){flat}")
        return f"torchmetrics.regression.{cls}({text}).set_dtype(torch.float64)", change
    if name not in CLASSIFICATION:
        _refuse(f"the metric {name!r}", "torchmetrics has none that takes the same tensors; it is exp of the mean loss")
    cls, arguments, reads = CLASSIFICATION[name]
    cls, arguments = (cls, dict(arguments)) if cls else ("Accuracy", {"average": "micro"})
    task, count = "Binary" if scale in ("label_logits", "probabilities") else "Multiclass", "..."
    of_outputs, of_y = ".sigmoid()" if scale == "label_logits" else "", ""
    has_ignored = metric.ignore_index not in (None, -100)
    if inferred is not None:
        shape, y_shape = inferred[0], inferred[2]
        outputs = torch.zeros((), dtype=inferred[1]).expand(shape)
        task = metric._task(outputs, torch.zeros((), dtype=inferred[3]).expand(y_shape))
        count = str(shape[1]) if len(shape) > 1 else count
        if task == "Multiclass" and len(y_shape) == len(shape):
            of_y = ".argmax(1)"
        elif task == "Binary" and shape != y_shape:
            of_outputs, of_y = of_outputs + ".flatten()", ".flatten()"
        has_ignored |= metric.ignore_index is not None and len(y_shape) > 1 and not of_y
    if task == "Multiclass":
        arguments = {
            "num_classes": count,
            **arguments,
            **({"ignore_index": metric.ignore_index} if has_ignored else {}),
        }
        if reads == "scores":
            of_outputs = {"log_probabilities": ".exp()", "class_logits": ".softmax(1)"}.get(scale, "")
    else:
        of_y += ".round().long()"
        if name not in ("accuracy", "acc") and name.startswith(("balanced", "top")):
            _refuse(f"the metric {name!r} of one output for two classes", "give a torchmetrics object")
        average = {"num_labels": count} if task == "Multilabel" else {"average": None}
        arguments = {
            key: value for key, value in {**average, **arguments}.items() if task == "Multilabel" or key != "average"
        }
    if device.type != "cpu":
        arguments["validate_args"] = False  # else an update reads values back from the device
    text = ", ".join(f"{k}={v if k.startswith('num_') else _describe(v)}" for k, v in arguments.items())
    return f"torchmetrics.classification.{task}{cls}({text})", (of_outputs, of_y)


def _source_of(function: Callable[..., Any], name: str) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        _refuse(f"{name}, whose source can't be found", "define it in a file or a notebook cell")


class _OwnSteps:
    """The source of the user's own train_step and eval_step, and the small Run that they are given."""

    def __init__(self, writer: _Writer) -> None:
        loop = writer.model._loop
        kind, cls = type(loop).__name__, type(loop)
        style = "function" if cls is FunctionLoop else "class" if issubclass(cls, ClassLoop) else None
        if style is None:
            _refuse(
                f"the loop {kind}", "override train_step or eval_step of ClassLoop instead, or compile another loop"
            )
        if writer.style != style:
            _refuse(f"the steps of {kind} in the {writer.style!r} style", f"use eject({style!r})")
        if writer.k > 1 or writer.class_weight is not None or writer.weighted or writer.val_weighted:
            _refuse(f"the steps of {kind} beside accumulation or weights", "write those into the ejected file")
        self.writer, self.imports, self.used = writer, set[str](), set[str]()
        self.steps: dict[str, tuple[Lines, str]] = {}  # name -> source, call
        members = dict(vars(loop))
        if style == "class":
            for owner in cls.__mro__[: cls.__mro__.index(ClassLoop)][::-1]:
                members |= {n: value for n, value in vars(owner).items() if n not in DUNDERS}
        for name, member in members.items():
            if name.startswith("predict") or member is getattr(function_loop, name, None):
                continue
            if name not in ("train_step", "eval_step"):
                _refuse(f"{kind}.{name}", "only train_step and eval_step go along: put what they need into them")
            text = self._text(member, f"{kind}.{name}")
            text = re.sub(r"def \w+\(", f"def {name}(", text, count=1)
            call = f"${name}(x, y, None)" if style == "class" else f"{name}($run, x, y, None)"
            self.steps[name] = ([*text.splitlines(), "", ""], call)

    def _text(self, function: Callable[..., Any], name: str) -> str:
        text = _source_of(function, name)
        definition = ast.parse(text).body[0] if text.startswith("def ") else None
        if definition is None:
            _refuse(f"{name}, which is no def", "define it with def")
        nodes = list(ast.walk(definition))
        local = {node.arg for node in nodes if isinstance(node, ast.arg)}
        local |= {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
        for node in nodes:
            if isinstance(node, ast.Attribute):
                self._check_attribute(ast.unparse(node.value), node.attr, name)
            elif isinstance(node, ast.Name) and node.id not in local:
                self._take_along(node.id, function.__globals__.get(node.id), name)
        return text.replace("$", DOLLAR)

    def _check_attribute(self, owner: str, attribute: str, name: str) -> None:
        plain = ("net", "loss_fn", "optimizer")
        if owner == "self" and attribute not in ("run", *plain):
            _refuse(f"{name}, which uses self.{attribute}", "put what it needs into it")
        if owner in ("self.run", "run"):
            if attribute not in (*RUN_PARTS, "device", "scaler", *plain):
                _refuse(f"{name}, which uses run.{attribute}", "write its work into the ejected file")
            self.used.add(attribute)

    def _take_along(self, alias: str, value: object, name: str) -> None:
        """Note the import of a name from outside the step; refuse one of the user's own files."""
        if hasattr(builtins, alias) and alias != "super":
            return
        module = value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", ""))
        root = module.partition(".")[0]
        if _is_own(module) and alias == "Run":
            return
        if (
            root not in (*sys.stdlib_module_names, "torch", "torchmetrics", "torchvision", "numpy")
            or root == "__main__"
        ):
            _refuse(f"{name}, which uses {alias!r} of around it", "import or define it inside")
        if not isinstance(value, ModuleType):
            self.imports.add(f"from {'torch' if getattr(torch, alias, None) is value else module} import {alias}")
        elif module == alias:
            self.imports.add(f"import {module}")
        else:
            package, _, last = module.rpartition(".")
            renamed = f"{last} as {alias}" if last != alias else last
            self.imports.add(f"from {package} import {renamed}" if package else f"import {module} as {alias}")

    def run_class(self) -> Lines:
        """Return the class Run with the parts that the steps use."""
        writer = self.writer
        scaler = f"self.scaler = torch.amp.GradScaler(device.type, enabled={writer.scales})"
        lines = _fill(
            RUN,
            type=writer.types["loss_fn"],
            scaler=scaler if writer.scales or "scaler" in self.used else [],
            mean=writer.mean,
        )
        clip = [
            re.sub(r"\$(clip_\w+)", lambda found: repr(float(getattr(writer.compiled, found[1]))), line)
            for line in writer._clip()
        ]
        for name, part in RUN_PARTS.items():
            if name in self.used:
                filled = _fill(
                    f"\n{part}\n",
                    forward=MOVED[writer.kind][1],
                    autocast=writer.autocast or "nullcontext()",
                    clip=clip or "pass  # nothing is clipped",
                )
                lines += ["", *_indent(filled)]
        return [*(line.replace("$", "self.") for line in lines), "", ""]


DUNDERS = (
    "__module__",
    "__doc__",
    "__dict__",
    "__weakref__",
    "__abstractmethods__",
    "_abc_impl",
    "__firstlineno__",
    "__static_attributes__",
)
