"""Metrics by name, torchmetrics object or function, and the sums of one pass over the data, kept on the device.

A classification metric given by name learns its task and its number of classes from the loss and the first outputs.
torchmetrics is imported when a metric is asked for. Sisters: losses.py, optimizers.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kerastorch.device import Nested, describe, num_samples
from kerastorch.errors import look_up

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

    MetricSpec = str | Metric | MetricCollection | Callable[[Any, Any], Tensor]

LogValue = float | list[Any]

# name -> (torchmetrics.classification class without its task, arguments, what it needs: "classes" or "scores")
CLASSIFICATION: dict[str, tuple[str, dict[str, Any], str]] = {
    "accuracy": ("Accuracy", {"average": "micro"}, "classes"),
    "acc": ("Accuracy", {"average": "micro"}, "classes"),
    "balanced_accuracy": ("Accuracy", {"average": "macro"}, "classes"),
    "precision": ("Precision", {"average": "macro"}, "classes"),
    "recall": ("Recall", {"average": "macro"}, "classes"),
    "f1": ("F1Score", {"average": "macro"}, "classes"),
    "f1_score": ("F1Score", {"average": "macro"}, "classes"),
    "auroc": ("AUROC", {"average": "macro"}, "scores"),
    "auc": ("AUROC", {"average": "macro"}, "scores"),
    "average_precision": ("AveragePrecision", {"average": "macro"}, "scores"),
}
# name -> (torchmetrics class, arguments)
REGRESSION: dict[str, tuple[str, dict[str, Any]]] = {
    "mse": ("MeanSquaredError", {}),
    "mean_squared_error": ("MeanSquaredError", {}),
    "rmse": ("MeanSquaredError", {"squared": False}),
    "root_mean_squared_error": ("MeanSquaredError", {"squared": False}),
    "mae": ("MeanAbsoluteError", {}),
    "mean_absolute_error": ("MeanAbsoluteError", {}),
    "r2": ("R2Score", {}),
    "r2_score": ("R2Score", {}),
}
_LOWER_IS_BETTER = {name for name in REGRESSION if not name.startswith("r2")}
METRICS = {**{name: "classification" for name in CLASSIFICATION}, **{name: "regression" for name in REGRESSION}}


class NamedMetric:
    """A metric known by name, made when the first outputs and targets tell what task it is."""

    def __init__(self, name: str, scale: str) -> None:
        self.name, self.scale = name, scale
        self.higher_is_better = name not in _LOWER_IS_BETTER
        self.metric: Metric | None = None

    def clone(self) -> NamedMetric:
        return NamedMetric(self.name, self.scale)

    def to(self, device: torch.device) -> NamedMetric:
        if self.metric is not None:
            self.metric.to(device)
        return self

    def update(self, outputs: Nested, y: Nested) -> None:
        if self.metric is None:
            self.infer(outputs, y)
        assert self.metric is not None
        self.metric.update(*self.prepare(outputs, y))

    def compute(self) -> Tensor:
        assert self.metric is not None
        result: Tensor = self.metric.compute()
        return result

    def reset(self) -> None:
        if self.metric is not None:
            self.metric.reset()

    def infer(self, outputs: Nested, y: Nested) -> None:
        """Settle task, class count and the torchmetrics object from a batch; ValueError where they can't be told."""
        if not isinstance(outputs, Tensor) or not isinstance(y, Tensor):
            raise self._ambiguous(outputs, y, "by name it takes one tensor of outputs and one of targets")
        import torchmetrics

        if self.name in REGRESSION:
            cls, arguments = REGRESSION[self.name]
            if outputs.numel() != y.numel():
                raise self._ambiguous(outputs, y, "outputs and targets differ in size")
            self.prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _same_shape
            self.metric = getattr(torchmetrics, cls)(**arguments).to(outputs.device)
            return
        cls, arguments, needs = CLASSIFICATION[self.name]
        task = self._task(outputs, y)
        if needs == "scores" and self.scale in ("unknown", "values"):
            raise self._ambiguous(outputs, y, "the loss does not tell whether outputs are logits or probabilities")
        arguments = dict(arguments, validate_args=False)  # its checks read values back from the device at every update
        scores: Callable[[Tensor], Tensor] = _SCORES.get(self.scale, _identity)
        if task == "Binary":
            del arguments["average"]
            self.prepare = lambda outputs, y: (scores(outputs.flatten().float()), y.flatten().long())
        elif task == "Multilabel":
            arguments["num_labels"] = outputs.shape[1]
            self.prepare = lambda outputs, y: (scores(outputs.float()), y.long())
        else:
            arguments["num_classes"] = outputs.shape[1]
            if needs == "classes":
                scores = _identity  # the largest logit is the largest probability
            one_hot = y.dim() == outputs.dim()
            self.prepare = lambda outputs, y: (scores(outputs.float()), y.argmax(1) if one_hot else y)
        self.metric = getattr(torchmetrics.classification, task + cls)(**arguments).to(outputs.device)

    def _task(self, outputs: Tensor, y: Tensor) -> str:
        wide = outputs.dim() > 1 and outputs.shape[1] > 1
        if self.scale == "values":
            raise self._ambiguous(outputs, y, "the loss is one for regression")
        if self.scale in ("label_logits", "probabilities"):
            if wide and y.shape == outputs.shape:
                return "Multilabel"
            if not wide and y.numel() == outputs.numel():
                return "Binary"
        elif wide:
            is_one_hot = self.scale == "class_logits" and y.shape == outputs.shape
            if is_one_hot or (not y.is_floating_point() and y.shape == outputs.shape[:1] + outputs.shape[2:]):
                return "Multiclass"
        raise self._ambiguous(outputs, y, "the task can't be told from them")

    def _ambiguous(self, outputs: Nested, y: Nested, reason: str) -> ValueError:
        return ValueError(
            f"metric {self.name!r} can't be inferred: {reason} (outputs {describe(outputs)}, targets {describe(y)}). "
            "Pass a torchmetrics object, for example torchmetrics.classification.MulticlassAccuracy(num_classes=10), "
            "or a function (outputs, y) -> tensor."
        )


class FunctionMetric:
    """The mean over samples of a function (outputs, y) -> a scalar, or one value per sample."""

    higher_is_better: bool | None = None

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        self.function = function
        self.sum: Tensor | float = 0.0
        self.count = 0

    def clone(self) -> FunctionMetric:
        return FunctionMetric(self.function)

    def to(self, device: torch.device) -> FunctionMetric:
        return self

    def update(self, outputs: Nested, y: Nested) -> None:
        value = torch.as_tensor(self.function(outputs, y)).detach()
        count = len(value) if value.dim() else num_samples(outputs)
        self.sum = self.sum + value.float().mean() * count
        self.count += count

    def compute(self) -> Tensor:
        return torch.as_tensor(self.sum / self.count)

    def reset(self) -> None:
        self.sum, self.count = 0.0, 0


AnyMetric = Any  # NamedMetric, FunctionMetric, a torchmetrics Metric or MetricCollection: clone, to, update, ...


def make_metrics(
    metrics: MetricSpec | Iterable[MetricSpec] | Mapping[str, MetricSpec] | None, scale: str
) -> dict[str, AnyMetric]:
    """Return {log name: metric} for a name, a torchmetrics object, a function, or a list or dict of these.

    Names are logged as given, objects and functions by their own name in snake case, dict entries by their key.
    scale (see losses.loss_scale) tells metrics by name what the outputs are.
    Raises ValueError for an unknown name (naming the nearest) or for two of one name, TypeError for anything else.
    """
    if metrics is None:
        return {}
    if isinstance(metrics, Mapping):
        pairs = [(str(name), spec) for name, spec in metrics.items()]
    elif isinstance(metrics, str) or callable(metrics) or not isinstance(metrics, Iterable):
        pairs = [(_name_of(metrics), metrics)]
    else:
        pairs = [(_name_of(spec), spec) for spec in metrics]
    made: dict[str, AnyMetric] = {}
    for name, spec in pairs:
        if name in made or name == "loss":
            raise ValueError(f"metrics has {name!r} twice (the loss is always there): give a dict of other names.")
        made[name] = _make_metric(spec, scale)
    return made


def _make_metric(spec: MetricSpec, scale: str) -> AnyMetric:
    if isinstance(spec, str):
        look_up("metric", spec, METRICS)
    import torchmetrics  # seconds, the first time: here, in compile, not in the first step

    if isinstance(spec, str):
        return NamedMetric(spec.lower().replace("-", "_"), scale)
    if isinstance(spec, (torchmetrics.Metric, torchmetrics.MetricCollection)):
        return spec.clone()
    if isinstance(spec, type) or not callable(spec):
        example = f": give an object, {spec.__name__}(...)" if isinstance(spec, type) else ""
        raise TypeError(
            f"a metric must be a name, a torchmetrics object or a function (outputs, y), got {spec}{example}."
        )
    return FunctionMetric(spec)


def _name_of(spec: object) -> str:
    if isinstance(spec, str):
        return spec
    name = getattr(spec, "__name__", None) or type(spec).__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def known_logs(metrics: Mapping[str, AnyMetric]) -> dict[str, bool | None]:
    """Return {log name: whether higher is better, None where that is not known} for the loss and these metrics."""
    known: dict[str, bool | None] = {"loss": False}
    for name, metric in metrics.items():
        if hasattr(metric, "keys"):  # a MetricCollection
            known |= {key: part.higher_is_better for key, part in metric.items()}
        else:
            known[name] = metric.higher_is_better
    return known


class PassSums:
    """The sample-weighted loss and the metrics of one pass over the data; sums stay on the device until read."""

    def __init__(self, metrics: Mapping[str, AnyMetric], device: torch.device) -> None:
        self.metrics = {name: metric.clone().to(device) for name, metric in metrics.items()}
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._loss_sum = torch.zeros((), dtype=dtype, device=device)
        self._num_samples = 0

    def reset(self) -> None:
        """Start a new pass."""
        self._loss_sum.zero_()
        self._num_samples = 0
        for metric in self.metrics.values():
            metric.reset()

    def infer(self, outputs: Nested, y: Nested) -> None:
        """Settle the metrics given by name from a first batch; ValueError where that would be a guess."""
        for metric in self.metrics.values():
            if isinstance(metric, NamedMetric) and metric.metric is None:
                metric.infer(outputs, y)

    def update(self, loss: Tensor, outputs: Nested, y: Nested, num_samples: int) -> None:
        """Add a batch. No sync: loss and outputs (detached) are on the device and stay there."""
        self._loss_sum.add_(loss, alpha=num_samples)
        self._num_samples += num_samples
        for metric in self.metrics.values():
            metric.update(outputs, y)

    def compute(self) -> dict[str, LogValue]:
        """Return {"loss": ..., metric: ...} as python numbers (a sync); empty where nothing was added."""
        if self._num_samples == 0:
            return {}
        logs: dict[str, LogValue] = {"loss": self._loss_sum.item() / self._num_samples}
        for name, metric in self.metrics.items():
            value = metric.compute()
            for key, part in value.items() if isinstance(value, Mapping) else [(name, value)]:
                logs[key] = _to_number(part)
        return logs

    def running(self) -> dict[str, LogValue]:
        """Return the loss and the metrics that are cheap to read in mid-pass (a sync); the bar shows them."""
        if self._num_samples == 0:
            return {}
        logs: dict[str, LogValue] = {"loss": self._loss_sum.item() / self._num_samples}
        for name, metric in self.metrics.items():
            if _has_sum_state(metric):
                logs[name] = _to_number(metric.compute())
        return logs


def _has_sum_state(metric: AnyMetric) -> bool:
    inner = metric.metric if isinstance(metric, NamedMetric) else metric
    state = getattr(inner, "metric_state", None)
    return isinstance(metric, FunctionMetric) or (
        isinstance(state, Mapping) and not any(isinstance(part, list) for part in state.values())
    )


def _to_number(value: object) -> LogValue:
    tensor = torch.as_tensor(value)
    return float(tensor) if tensor.numel() == 1 else tensor.tolist()


def _same_shape(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if outputs.shape == y.shape:
        return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs, y
    return outputs.flatten(), y.flatten()  # (N, 1) beside (N,)


def _softmax(outputs: Tensor) -> Tensor:
    return outputs.softmax(1)


def _identity(outputs: Tensor) -> Tensor:
    return outputs


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "label_logits": torch.sigmoid,
    "class_logits": _softmax,
    "log_probabilities": torch.exp,
}
