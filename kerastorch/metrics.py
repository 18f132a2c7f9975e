"""Metrics by name, torchmetrics object or function, and the sums of one pass over the data, kept on the device.

A metric given by name learns its task and its number of classes from the loss and the first outputs; where that would
be a guess it says what to pass. torchmetrics is imported when a metric is asked for. Sisters: losses.py, optimizers.py.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from kerastorch.device import Nested, OutputKey, describe, num_samples, output_name, pick_output
from kerastorch.errors import canonical, look_up

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

    MetricSpec = str | Metric | MetricCollection | Callable[[Any, Any], Tensor]

LogValue = float | list[Any]  # a list where a metric gives more than one number, as a confusion matrix does

# Classification: name -> (torchmetrics class without its task, arguments, what it reads: "classes" or "scores").
# Averages are over the classes ("macro"), where the name does not say otherwise; None: the class takes no average.
_AVERAGED = {
    "precision": ("Precision", "classes"),
    "recall": ("Recall", "classes"),
    "f1": ("F1Score", "classes"),
    "f1_score": ("F1Score", "classes"),
    "specificity": ("Specificity", "classes"),
    "iou": ("JaccardIndex", "classes"),
    "jaccard_index": ("JaccardIndex", "classes"),
    "auroc": ("AUROC", "scores"),
    "auc": ("AUROC", "scores"),
    "average_precision": ("AveragePrecision", "scores"),
}
CLASSIFICATION: dict[str, tuple[str, dict[str, Any], str]] = {
    "accuracy": ("", {}, "classes"),  # counted here, without a sync
    "acc": ("", {}, "classes"),
    "balanced_accuracy": ("Accuracy", {"average": "macro"}, "classes"),
    **{f"top_{k}_accuracy": ("Accuracy", {"average": "micro", "top_k": k}, "classes") for k in (2, 3, 5, 10)},
    **{name: (cls, {"average": "macro"}, reads) for name, (cls, reads) in _AVERAGED.items()},
    **{
        f"{name}_{average}": (cls, {"average": average}, reads)
        for name, (cls, reads) in _AVERAGED.items()
        for average in ("macro", "micro", "weighted")
        if reads == "classes" or average != "micro"
    },
    "matthews_corrcoef": ("MatthewsCorrCoef", {}, "classes"),
    "mcc": ("MatthewsCorrCoef", {}, "classes"),
    "cohen_kappa": ("CohenKappa", {}, "classes"),
    "confusion_matrix": ("ConfusionMatrix", {}, "classes"),
}
# Regression: name -> (torchmetrics class, arguments)
REGRESSION: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("mse", "mean_squared_error"), ("", {})),  # these three are summed here, in float64
    **dict.fromkeys(("rmse", "root_mean_squared_error"), ("", {})),
    **dict.fromkeys(("mae", "mean_absolute_error"), ("", {})),
    **dict.fromkeys(("mape", "mean_absolute_percentage_error"), ("MeanAbsolutePercentageError", {})),
    **dict.fromkeys(("r2", "r2_score"), ("R2Score", {})),
    "explained_variance": ("ExplainedVariance", {}),
    "cosine_similarity": ("CosineSimilarity", {"reduction": "mean"}),
}
METRICS = {**dict.fromkeys(CLASSIFICATION, "classes"), **dict.fromkeys(REGRESSION, "values"), "perplexity": "scores"}
_HIGHER_IS_BETTER: dict[str, bool | None] = {
    **dict.fromkeys(CLASSIFICATION, True),
    **dict.fromkeys(REGRESSION, False),
    **dict.fromkeys(("r2", "r2_score", "explained_variance", "cosine_similarity"), True),
    "perplexity": False,
    "confusion_matrix": None,
}
# Of torchmetrics' own objects: not those that look in each update whether scores are logits, nor sums that cancel.
_JOINED_CLASSES = {"MeanAbsolutePercentageError", "CosineSimilarity"} | {
    f"Multiclass{cls}" for cls, _, reads in CLASSIFICATION.values() if cls and reads == "classes"
}
MAX_ELEMENTS = 10**8  # of one sample, in a checkpoint that may be forged
COUNTED_HERE = {name for name, (cls, *_) in {**CLASSIFICATION, **REGRESSION}.items() if not cls} | {"perplexity"}
WEIGHTED = (
    "acc",
    "accuracy",
    "mae",
    "mean_absolute_error",
    "mean_squared_error",
    "mse",
    "perplexity",
    "rmse",
    "root_mean_squared_error",
)


class Recipe(NamedTuple):
    """A metric in plain torchmetrics: the object torchmetrics.cls(**arguments), updated with outputs and y, as code."""

    cls: str
    arguments: dict[str, Any]
    outputs: str = "outputs"
    y: str = "y"
    suffix: str = ""  # code after the call


class NamedMetric:
    """A metric known by name, made when the first outputs and targets tell what task it is.

    scale: what the loss takes outputs for (losses.loss_scale).   ignore_index: targets of this class do not count.
    recipe: the same in torchmetrics, once it is made; None where torchmetrics has none.
    """

    def __init__(self, name: str, scale: str, ignore_index: int | None = None) -> None:
        self.name, self.scale, self.ignore_index = name, scale, ignore_index
        self.higher_is_better = _HIGHER_IS_BETTER[name]
        self.metric: Any = None
        self.recipe: Recipe | None = None
        self.inferred_from: list[Any] = []  # shape and dtype of the outputs, and of the targets

    def clone(self) -> NamedMetric:
        return NamedMetric(self.name, self.scale, self.ignore_index)

    def to(self, device: torch.device) -> NamedMetric:
        return self

    def update(self, outputs: Nested, y: Nested, sample_weight: Tensor | None = None) -> None:
        if self.metric is None:
            self.infer(outputs, y)
        if isinstance(self.metric, MeanMetric):
            self.metric.update(outputs, y, sample_weight)
        else:
            self.metric.update(*self.prepare(outputs, y))

    def compute(self) -> Tensor:
        result: Tensor = self.metric.compute()
        return result

    def reset(self) -> None:
        if self.metric is not None:
            self.metric.reset()

    def infer(self, outputs: Nested, y: Nested) -> None:
        """Settle the task, the class count and the sums from a batch; ValueError where they can't be told."""
        if not isinstance(outputs, Tensor) or not isinstance(y, Tensor):
            raise self._ambiguous(outputs, y, "by name it takes one tensor of outputs and one of targets")
        self.inferred_from = [[1, *outputs.shape[1:]], outputs.dtype, [1, *y.shape[1:]], y.dtype]
        if self.name in REGRESSION:
            self._infer_regression(outputs, y)
        elif self.name == "perplexity":
            self._infer_perplexity(outputs, y)
        else:
            self._infer_classification(outputs, y)

    def _infer_regression(self, outputs: Tensor, y: Tensor) -> None:
        cls, arguments = REGRESSION[self.name]
        if self.scale in ("class_logits", "label_logits", "log_probabilities", "log_rates"):
            raise self._ambiguous(outputs, y, f"it compares values, but under this loss outputs are {self.scale}")
        if self.name in ("r2", "r2_score") and outputs.dim() > 2:
            raise self._ambiguous(outputs, y, "it takes (N,) or (N, D)")
        if outputs.numel() != y.numel():
            raise self._ambiguous(outputs, y, "outputs and targets differ in size")
        flat = "" if outputs.shape == y.shape else ".flatten()"
        of_double = (f"outputs{flat}.double()", f"y{flat}.double()", ".set_dtype(torch.float64)")
        if not cls:
            is_absolute = self.name in ("mae", "mean_absolute_error")
            same = "regression.MeanAbsoluteError" if is_absolute else "regression.MeanSquaredError"
            self.recipe = Recipe(same, {"squared": False} if self.name.startswith("r") else {}, *of_double)
            self.metric = MeanMetric(_absolute_error if is_absolute else _squared_error, root=self.name.startswith("r"))
            return
        if self.name == "cosine_similarity" and outputs.dim() != 2:
            raise self._ambiguous(outputs, y, "it compares rows of a matrix")
        torchmetrics = _import_torchmetrics()
        dtype = torch.float32 if outputs.device.type == "mps" else torch.float64  # their sums cancel in float32

        def prepare(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            outputs, y = _same_shape(outputs, y)
            return outputs.to(dtype), y.to(dtype)

        self.prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = prepare
        self.metric = getattr(torchmetrics, cls)(**arguments).set_dtype(dtype).to(outputs.device)
        self.recipe = Recipe(f"regression.{cls}", arguments, *of_double)

    def _infer_perplexity(self, outputs: Tensor, y: Tensor) -> None:
        if (
            self.scale not in ("class_logits", "log_probabilities")
            or self._task(outputs, y) != "Multiclass"
            or y.shape == outputs.shape
        ):
            raise self._ambiguous(outputs, y, "it needs logits (N, C, ...) and class indices (N, ...)")
        ignored = -100 if self.ignore_index is None else self.ignore_index

        def values(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            log_probabilities = outputs.float().log_softmax(1)  # of log-probabilities: themselves
            losses = torch.nn.functional.nll_loss(log_probabilities, y, ignore_index=ignored, reduction="none")
            return losses, y != ignored

        self.metric = MeanMetric(values, exponential=True)

    def _infer_classification(self, outputs: Tensor, y: Tensor) -> None:
        cls, arguments, reads = CLASSIFICATION[self.name]
        task = self._task(outputs, y)
        if reads == "scores" and self.scale == "unknown":
            raise self._ambiguous(outputs, y, "the loss does not tell whether outputs are logits or probabilities")
        if cls and outputs.dim() == 3 and task == "Multilabel":
            raise self._ambiguous(outputs, y, "dimension 1 could be labels, rows of an image or steps in time")
        scores: Callable[[Tensor], Tensor] = _SCORES.get(self.scale, _identity)
        is_one_hot = task == "Multiclass" and y.dim() == outputs.dim()
        flat = ".flatten()" if task == "Binary" and outputs.shape != y.shape else ""
        of_outputs = f"outputs{flat}{_SCORES_TEXTS.get(self.scale, '')}"
        of_y = f"(y{flat} > 0.5).long()"
        if task == "Multiclass":
            of_outputs = of_outputs if reads == "scores" else "outputs"
            of_y = "y.argmax(1)" if is_one_hot else "y"
        if not cls:
            counts: dict[str, Any] = {}
            if task != "Binary":
                counts = {"num_classes" if task == "Multiclass" else "num_labels": outputs.shape[1], "average": "micro"}
            if task == "Multiclass" and self.ignore_index is not None:
                counts["ignore_index"] = self.ignore_index
            self.recipe = Recipe(f"classification.{task}Accuracy", counts, of_outputs, of_y)
            threshold = 0.0 if self.scale == "label_logits" else 0.5
            ignored = self.ignore_index

            def right(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
                if task != "Multiclass":
                    return (outputs.reshape(y.shape) > threshold) == (y > 0.5), None
                y = y.argmax(1) if is_one_hot else y
                return outputs.argmax(1) == y, None if ignored is None else y != ignored

            self.metric = MeanMetric(right)
            return
        if "top_k" in arguments and (task != "Multiclass" or arguments["top_k"] > outputs.shape[1]):
            raise self._ambiguous(outputs, y, f"it needs more than {arguments['top_k']} classes")
        if task == "Multiclass" and outputs.shape[1] == 2 and self.name in _AVERAGED and reads == "classes":
            raise self._ambiguous(
                outputs,
                y,
                f"of two classes it could be class 1's or the mean of both, which is {self.name + '_macro'!r}",
            )
        torchmetrics = _import_torchmetrics()
        arguments = {**arguments, "validate_args": False}  # its checks read values back from the device at every update
        if task == "Binary" and "average" in arguments and self.name not in _AVERAGED:
            task = "Multiclass"  # an average that the name asks for is over both classes
            arguments["num_classes"] = 2

            def of_both(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                yes = scores(outputs.flatten().float())
                return torch.stack((1 - yes, yes), 1), (y.flatten() > 0.5).long()

            self.prepare = of_both
            of_outputs = f"(outputs{flat} > {0 if self.scale == 'label_logits' else 0.5}).long()"
        elif task == "Binary":
            arguments.pop("average", None)
            self.prepare = lambda outputs, y: (scores(outputs.flatten().float()), (y.flatten() > 0.5).long())
        elif task == "Multilabel":
            arguments["num_labels"] = outputs.shape[1]
            self.prepare = lambda outputs, y: (scores(outputs.float()), (y > 0.5).long())
        else:
            arguments |= {"num_classes": outputs.shape[1], "ignore_index": self.ignore_index}
            if reads == "classes":
                scores = _identity  # the largest logit is the largest probability
            self.prepare = lambda outputs, y: (scores(outputs.float()), y.argmax(1) if is_one_hot else y)
        made = getattr(torchmetrics.classification, task + cls, None)
        if made is None:
            raise self._ambiguous(outputs, y, f"it is not defined for a {task.lower()} task")
        self.metric = made(**arguments).to(outputs.device)
        shown = {name: value for name, value in arguments.items() if name != "validate_args" and value is not None}
        shown = {name: shown[name] for name in sorted(shown, key=lambda name: not name.startswith("num_"))}
        if reads == "classes" or "num_classes" not in shown or self.scale not in ("label_logits", "probabilities"):
            self.recipe = Recipe(f"classification.{task}{cls}", shown, of_outputs, of_y)

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
            is_outside = not y.is_floating_point() and bool(((y < 0) | (y >= outputs.shape[1])).any())
            if self.scale == "unknown" and is_outside:
                raise self._ambiguous(outputs, y, "labels are outside the classes, and the loss does not tell why")
            if is_one_hot or (not y.is_floating_point() and y.shape == outputs.shape[:1] + outputs.shape[2:]):
                return "Multiclass"
        raise self._ambiguous(outputs, y, "the task can't be told from them")

    def _ambiguous(self, outputs: Nested, y: Nested, reason: str) -> ValueError:
        return ValueError(
            f"metric {self.name!r} can't be inferred: {reason} (outputs {describe(outputs)}, targets {describe(y)}). "
            "Pass a torchmetrics object, for example torchmetrics.classification.MulticlassAccuracy(num_classes=10), "
            "or a function (outputs, y) -> tensor."
        )


class MeanMetric:
    """The mean over samples, weighted where weights are given, of values(outputs, y); sums stay on the device.

    values: gives a scalar for the batch, values per sample or element, or (values, which of them count).
    root, exponential: take the square root, or exp, of the mean.
    """

    higher_is_better: bool | None = None

    def __init__(self, values: Callable[[Any, Any], Any], *, root: bool = False, exponential: bool = False) -> None:
        self.values, self.root, self.exponential = values, root, exponential
        self.sum: Tensor | float = 0.0
        self.count: Tensor | float = 0.0

    def clone(self) -> MeanMetric:
        return MeanMetric(self.values, root=self.root, exponential=self.exponential)

    def to(self, device: torch.device) -> MeanMetric:
        return self

    def update(self, outputs: Nested, y: Nested, sample_weight: Tensor | None = None) -> None:
        values = self.values(outputs, y)
        values, counts = values if isinstance(values, tuple) else (values, None)
        values = torch.as_tensor(values).detach()
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        if sample_weight is not None:
            if values.dim() == 0:
                raise ValueError("weighted_metrics needs functions that give one value per sample, not a mean.")
            weight = sample_weight
            if weight.shape != values.shape:
                weight = weight.reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
            counts = weight if counts is None else weight * counts
        if values.dim() == 0:
            samples = num_samples(outputs)
            self.sum, self.count = self.sum + values.to(dtype) * samples, self.count + samples
        elif counts is None:
            self.sum, self.count = self.sum + values.sum(dtype=dtype), self.count + values.numel()
        else:
            self.sum = self.sum + (values.to(dtype) * counts).sum()
            self.count = self.count + counts.sum(dtype=dtype)

    def compute(self) -> Tensor:
        mean = torch.as_tensor(self.sum / self.count)
        if self.root:
            return mean.sqrt()
        return mean.exp() if self.exponential else mean

    def reset(self) -> None:
        self.sum, self.count = 0.0, 0.0


class OutputMetric:
    """A metric of one of several outputs."""

    def __init__(self, metric: AnyMetric, key: OutputKey) -> None:
        self.metric, self.key = metric, key
        self.higher_is_better = metric.higher_is_better

    def clone(self) -> OutputMetric:
        return OutputMetric(self.metric.clone(), self.key)

    def to(self, device: torch.device) -> OutputMetric:
        self.metric.to(device)
        return self

    def update(self, outputs: Nested, y: Nested, sample_weight: Nested = None) -> None:
        parts = pick_output(outputs, self.key, "the outputs"), pick_output(y, self.key, "the targets")
        if sample_weight is None:
            self.metric.update(*parts)
            return
        if not isinstance(sample_weight, Tensor):
            sample_weight = pick_output(sample_weight, self.key, "sample_weight")
        self.metric.update(*parts, sample_weight)

    def compute(self) -> Any:
        return self.metric.compute()

    def reset(self) -> None:
        self.metric.reset()


AnyMetric = Any  # one of the classes above, a torchmetrics Metric or a MetricCollection: clone, to, update, ...


def make_metrics(
    metrics: MetricSpec | Iterable[MetricSpec] | Mapping[str, MetricSpec] | None,
    scale: str,
    ignore_index: int | None = None,
    *,
    weighted: bool = False,
) -> dict[str, AnyMetric]:
    """Return {log name: metric} for a name, a torchmetrics object, a function, or a list or dict of these.

    Names are logged as given, objects and functions by their own name in snake case, dict entries by their key.
    scale, ignore_index: those of the loss (losses.loss_scale); metrics by name read them.
    weighted: whether they will be given sample weights, which only the names in WEIGHTED and functions can take.
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
        metric = _make_metric(spec, scale, ignore_index, weighted)
        taken = known_logs(made)
        for key in [*metric.keys()] if is_collection(metric) else [name]:
            if key in taken:
                raise ValueError(f"metrics has {key!r} twice (the loss is always there): give a dict of other names.")
        made[name] = metric
    return made


def make_output_metrics(
    metrics: Mapping[str, Any] | Sequence[Any] | None,
    scales: Mapping[Any, tuple[str, int | None]],
    *,
    weighted: bool = False,
) -> dict[str, AnyMetric]:
    """Return {"<output>_<name>": metric} for metrics given by output: a dict by key or a list in the outputs' order.

    scales: {output: (scale, ignore_index)} of the losses.   Raises ValueError where keys or lengths do not fit.
    """
    if metrics is None:
        return {}
    is_mapping = isinstance(metrics, Mapping)
    is_list = isinstance(metrics, (list, tuple)) and len(metrics) == len(scales)
    by_output: dict[Any, Any] = dict(metrics) if isinstance(metrics, Mapping) else dict(enumerate(metrics))
    if not (is_mapping or is_list) or any(key not in scales for key in by_output):
        raise ValueError(
            f"metrics={metrics!r} does not fit the losses of {list(scales)}: give metrics for each output, as "
            f"{{{next(iter(scales))!r}: ['accuracy']}} or as a list of {len(scales)} lists."
        )
    made: dict[str, AnyMetric] = {}
    for key, spec in by_output.items():
        for name, metric in make_metrics(spec, *scales[key], weighted=weighted).items():
            parts = metric.items() if is_collection(metric) else [(name, metric)]
            made |= {f"{output_name(key)}_{part_name}": OutputMetric(part, key) for part_name, part in parts}
    return made


def _make_metric(spec: MetricSpec, scale: str, ignore_index: int | None, weighted: bool) -> AnyMetric:
    if isinstance(spec, str):
        look_up("metric", spec, METRICS)
        name = canonical(spec)
        if name not in COUNTED_HERE:
            _import_torchmetrics()  # seconds, the first time: here, in compile, not in the first step
        if weighted and name not in WEIGHTED:
            raise ValueError(f"weighted_metrics can't weigh {spec!r}; it takes {', '.join(WEIGHTED)} and functions.")
        return NamedMetric(name, scale, ignore_index)
    torchmetrics = sys.modules.get("torchmetrics")  # not loaded: then none of its objects was given
    if torchmetrics is not None and isinstance(spec, (torchmetrics.Metric, torchmetrics.MetricCollection)):
        if weighted:
            raise ValueError(
                f"weighted_metrics can't give sample weights to {type(spec).__name__}; it takes {', '.join(WEIGHTED)} "
                "and functions (outputs, y) -> one value per sample."
            )
        return cast(AnyMetric, spec).clone()
    if isinstance(spec, type) or not callable(spec):
        example = f": give an object, {spec.__name__}(...)" if isinstance(spec, type) else ""
        raise TypeError(
            f"a metric must be a name, a torchmetrics object or a function (outputs, y), got {spec}{example}."
        )
    return MeanMetric(spec)


def _import_torchmetrics() -> Any:
    try:
        import torchmetrics
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"torchmetrics can't be loaded ({error}). It loads torchvision where that is installed: if that was built "
            f"for another torch than {torch.__version__}, install the torchvision that matches, or remove it."
        ) from error
    return torchmetrics


def _name_of(spec: object) -> str:
    if isinstance(spec, str):
        return spec
    name = getattr(spec, "__name__", None) or type(spec).__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def known_logs(metrics: Mapping[str, AnyMetric]) -> dict[str, bool | None]:
    """Return {log name: whether higher is better, None where that is not known} for the loss and these metrics."""
    known: dict[str, bool | None] = {"loss": False}
    for name, metric in metrics.items():
        if is_collection(metric):
            known |= {key: part.higher_is_better for key, part in metric.items()}
        else:
            known[name] = metric.higher_is_better
    return known


def may_name_results(metric: AnyMetric) -> bool:
    """Whether compute() may give a dict, whose keys are not known before; torchmetrics says so by annotation."""
    while isinstance(metric, OutputMetric):
        metric = metric.metric
    if isinstance(metric, (NamedMetric, MeanMetric)) or is_collection(metric):
        return False
    return inspect.signature(type(metric).compute).return_annotation not in (Tensor, "Tensor")


def takes_batches_together(metric: AnyMetric) -> bool:
    """Whether an update with several batches joined is the same, up to rounding, as one with each.

    It is for the metrics that names stand for, and torchmetrics objects of their classes; a function's value may be of
    its batch.
    """
    if is_collection(metric):
        return all(map(takes_batches_together, metric.values()))
    if isinstance(metric, OutputMetric):
        return takes_batches_together(metric.metric)
    return isinstance(metric, NamedMetric) or (
        type(metric).__module__.partition(".")[0] == "torchmetrics" and type(metric).__name__ in _JOINED_CLASSES
    )


def is_collection(metric: AnyMetric) -> bool:
    return hasattr(metric, "keys")  # a torchmetrics.MetricCollection, without importing it


def _same_shape(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (outputs, y) if outputs.shape == y.shape else (outputs.flatten(), y.flatten())  # (N, 1) beside (N,)


def _squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    outputs, y = _same_shape(outputs, y)
    return (outputs - y).square()


def _absolute_error(outputs: Tensor, y: Tensor) -> Tensor:
    outputs, y = _same_shape(outputs, y)
    return (outputs - y).abs()


def _softmax(outputs: Tensor) -> Tensor:
    return outputs.softmax(1)


def _identity(outputs: Tensor) -> Tensor:
    return outputs


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "label_logits": torch.sigmoid,
    "class_logits": _softmax,
    "log_probabilities": torch.exp,
}
_SCORES_TEXTS = {"label_logits": ".sigmoid()", "class_logits": ".softmax(1)", "log_probabilities": ".exp()"}
