"""Metrics by name, object and function, fed in uneven batches, equal the reference on the whole data."""

import contextlib
import copy
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection, R2Score
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchmetrics.functional import classification as reference

from kerastorch.metrics import (
    CLASSIFICATION,
    METRICS,
    REGRESSION,
    WEIGHTED,
    known_logs,
    make_metrics,
    make_output_metrics,
)
from kerastorch.sums import PassSums

CPU = torch.device("cpu")
N, C = 50, 4
CUTS = (0, 7, 8, 30, 31, N)  # batches of 7, 1, 22, 1 and 19


def rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def in_uneven_batches(metrics: Any, scale: str, outputs: Tensor, y: Tensor) -> dict[str, Any]:
    """Return the logs of one pass over the data; a pass before it must leave no trace."""
    sums = PassSums(make_metrics(metrics, scale), CPU)
    sums.update(torch.tensor(9.0), outputs[:3], y[:3], 3)
    sums.reset()
    for start, stop in pairwise(CUTS):
        sums.update(torch.tensor(0.0), outputs[start:stop], y[start:stop], stop - start)
    return sums.compute()


# ---- by name: hand-made references; `said` and `true` are boolean, one entry a sample ----


def recall(said: np.ndarray, true: np.ndarray) -> float:
    return float(said[true].mean())


def precision(said: np.ndarray, true: np.ndarray) -> float:
    return float(true[said].mean())


def f1(said: np.ndarray, true: np.ndarray) -> float:
    return 2 * (said & true).sum() / (said.sum() + true.sum())


def auroc(scores: np.ndarray, true: np.ndarray) -> float:
    """The share of pairs (positive, negative) in the right order; ties count a half."""
    difference = scores[true][:, None] - scores[~true][None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def average_precision(scores: np.ndarray, true: np.ndarray) -> float:
    """The mean, over the positives, of the precision among all that score at least as high."""
    return float(np.mean([true[scores >= score].mean() for score in scores[true]]))


HAND_MADE: dict[str, tuple[str, Callable[..., float] | None]] = {  # name -> (what it reads, one class against the rest)
    **dict.fromkeys(("accuracy", "acc"), ("classes", None)),
    **dict.fromkeys(("balanced_accuracy", "recall"), ("classes", recall)),
    "precision": ("classes", precision),
    **dict.fromkeys(("f1", "f1_score"), ("classes", f1)),
    **dict.fromkeys(("auroc", "auc"), ("scores", auroc)),
    "average_precision": ("scores", average_precision),
}


def multiclass_reference(name: str, logits: Tensor, y: Tensor) -> float:
    reads, one = HAND_MADE[name]
    said, true = np.eye(C, dtype=bool)[logits.argmax(1)], np.eye(C, dtype=bool)[y]
    if one is None:
        return float((said == true).all(1).mean())
    read = said if reads == "classes" else logits.softmax(1).numpy()
    return float(np.mean([one(read[:, c], true[:, c]) for c in range(C)]))


def binary_reference(name: str, logits: Tensor, y: Tensor) -> float:
    reads, one = HAND_MADE[name]
    said, true = (logits > 0).numpy().ravel(), (y > 0.5).numpy().ravel()
    if one is None:
        return float((said == true).mean())
    if name == "balanced_accuracy":
        return (recall(said, true) + recall(~said, ~true)) / 2
    return one(said if reads == "classes" else logits.sigmoid().numpy().ravel(), true)


def multilabel_reference(name: str, logits: Tensor, y: Tensor) -> float:
    return float(np.mean([binary_reference(name, logits[:, c], y[:, c]) for c in range(C)]))


hand_made = pytest.mark.parametrize("name", HAND_MADE)


@hand_made
@pytest.mark.parametrize("targets", ["classes", "one-hot"])
@pytest.mark.parametrize("scale", [4.0, 1.0], ids=["wide", "in [0, 1]"])
def test_named_metric_is_the_multiclass_reference(name: str, targets: str, scale: float) -> None:
    logits = scale * (rand(N, C, seed=1) - (scale > 1) / 2)
    y = (logits / scale + 0.75 * rand(N, C, seed=2)).argmax(1)
    given = y if targets == "classes" else nn.functional.one_hot(y, C).float()
    logs = in_uneven_batches(name, "class_logits", logits, given)
    assert logs[name] == pytest.approx(multiclass_reference(name, logits, y), rel=1e-5)


# logits in [0, 1] are the trap: taken for probabilities, 0.3 would be "no", though its probability is 0.57
BINARY_LOGITS = {
    "wide": 6 * rand(N, 1, seed=3) - 3,
    "in [0, 1]": rand(N, 1, seed=3),
    "around [0, 1]": 1.2 * rand(N, 1, seed=3) - 0.2,
}


@hand_made
@pytest.mark.parametrize("form", ["(N, 1)", "(N,)", "(N, 1) with (N,)"])
@pytest.mark.parametrize("logits", BINARY_LOGITS.values(), ids=BINARY_LOGITS)
def test_named_metric_is_the_binary_reference(name: str, form: str, logits: Tensor) -> None:
    y = (rand(N, 1, seed=4) < 0.2 + 0.2 * (logits > logits.mean())).float()  # more "no" than "yes"
    outputs = logits.flatten() if form == "(N,)" else logits
    logs = in_uneven_batches(name, "label_logits", outputs, y if form == "(N, 1)" else y.flatten())
    assert logs[name] == pytest.approx(binary_reference(name, logits, y), rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(HAND_MADE) - {"balanced_accuracy"}))
@pytest.mark.parametrize("logits", [6 * rand(N, C, seed=5) - 3, rand(N, C, seed=5) - 0.1], ids=["wide", "in [0, 1]"])
def test_named_metric_is_the_multilabel_reference(name: str, logits: Tensor) -> None:
    y = (rand(N, C, seed=6) < 0.3 + 0.3 * (logits > logits.mean())).float()
    logs = in_uneven_batches(name, "label_logits", logits, y)
    assert logs[name] == pytest.approx(multilabel_reference(name, logits, y), rel=1e-5)


def test_probabilities_of_bce_are_taken_as_they_are() -> None:
    probabilities = rand(N, 1, seed=7)
    y = (rand(N, 1, seed=8) < probabilities).float()
    logs = in_uneven_batches(["accuracy", "auroc"], "probabilities", probabilities, y)
    assert logs["accuracy"] == pytest.approx(((probabilities > 0.5) == y).float().mean().item())
    assert logs["auroc"] == pytest.approx(auroc(probabilities[:, 0].numpy(), y[:, 0].numpy() == 1))


def test_log_probabilities_of_nll_score_as_their_exponentials() -> None:
    logits = 4 * rand(N, C, seed=1)
    y = (logits + 3 * rand(N, C, seed=2)).argmax(1)
    logs = in_uneven_batches(["acc", "auroc"], "log_probabilities", logits.log_softmax(1), y)
    assert logs["acc"] == pytest.approx(multiclass_reference("acc", logits, y))
    assert logs["auroc"] == pytest.approx(multiclass_reference("auroc", logits, y))


def test_segmentation_counts_every_pixel() -> None:
    logits, y = rand(N, C, 3, 5, seed=9), (rand(N, 3, 5, seed=10) * C).long()
    logs = in_uneven_batches(["accuracy", "f1"], "class_logits", logits, y)
    assert logs["accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    flat = logits.movedim(1, -1).reshape(-1, C)
    assert logs["f1"] == pytest.approx(reference.multiclass_f1_score(flat, y.flatten(), C, average="macro").item())


@pytest.mark.parametrize("name", ["accuracy", "f1", "auroc"])
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_targets_that_the_loss_ignores_do_not_count(name: str, ignore_index: int) -> None:
    logits, y = rand(N, C, seed=11), (rand(N, seed=12) * C).long()
    kept = torch.arange(N) % 3 > 0
    y[~kept] = ignore_index
    sums = PassSums(make_metrics(name, "class_logits", ignore_index), CPU)
    sums.update(torch.tensor(0.0), logits[:20], y[:20], 20)
    sums.update(torch.tensor(0.0), logits[20:], y[20:], N - 20)
    assert sums.compute()[name] == pytest.approx(multiclass_reference(name, logits[kept], y[kept]))


@pytest.mark.parametrize("name", ["accuracy", "f1", "precision", "recall", "auroc"])
def test_smoothed_labels_count_as_the_nearer_one(name: str) -> None:
    logits = 6 * rand(N, 1, seed=3) - 3
    y = (rand(N, 1, seed=4) < 0.5).float()
    logs = in_uneven_batches(name, "label_logits", logits, 0.9 * y + 0.05)
    assert logs[name] == pytest.approx(binary_reference(name, logits, y))


# ---- by name: torchmetrics' functions of the whole data ----

OTHERS = sorted(set(CLASSIFICATION) - set(HAND_MADE))


def of_whole_data(task: str, name: str, *data: Tensor, **arguments: Any) -> np.ndarray:
    """Return torchmetrics' function of the whole data."""
    cls, own, _ = CLASSIFICATION[name]
    function = {"F1Score": "f1_score", "MatthewsCorrCoef": "matthews_corrcoef", "AUROC": "auroc"}.get(cls)
    function = function or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls).lower()
    result: Tensor = getattr(reference, f"{task}_{function}")(*data, **({} if task == "binary" else own), **arguments)
    return result.numpy()


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("top_5_accuracy", "top_10_accuracy")])
def test_other_named_metric_is_torchmetrics_own_of_classes(name: str) -> None:
    logits = rand(N, C, seed=1)
    y = (logits + 0.75 * rand(N, C, seed=2)).argmax(1)
    logs = in_uneven_batches(name, "class_logits", logits, y)
    np.testing.assert_allclose(
        logs[name], of_whole_data("multiclass", name, logits.softmax(1), y, num_classes=C), rtol=1e-5
    )


@pytest.mark.parametrize("name", [n for n in OTHERS if not n.startswith("top_") and n not in ("cohen_kappa",)])
def test_other_named_metric_is_torchmetrics_own_of_labels(name: str) -> None:
    logits = rand(N, C, seed=5) - 0.1
    y = (rand(N, C, seed=6) < 0.3 + 0.3 * (logits > logits.mean())).float()
    logs = in_uneven_batches(name, "label_logits", logits, y)
    np.testing.assert_allclose(
        logs[name], of_whole_data("multilabel", name, logits.sigmoid(), y.long(), num_labels=C), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["specificity", "iou", "jaccard_index", "mcc", "matthews_corrcoef", "cohen_kappa"])
def test_other_named_metric_is_torchmetrics_own_of_yes_and_no(name: str) -> None:
    logits = 1.2 * rand(N, 1, seed=3) - 0.4
    y = (rand(N, 1, seed=4) < 0.3 + 0.3 * (logits > logits.mean())).float()
    logs = in_uneven_batches(name, "label_logits", logits, y)
    np.testing.assert_allclose(
        logs[name], of_whole_data("binary", name, logits.sigmoid().ravel(), y.ravel().long()), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["f1_macro", "precision_weighted", "recall_micro", "iou_macro", "auroc_macro"])
def test_average_of_a_yes_or_no_task_is_over_both_classes_or_refused(name: str) -> None:
    logits = 6 * rand(N, 1, seed=3) - 3
    y = (rand(N, 1, seed=4) < 0.2 + 0.2 * (logits > 0)).float()
    both = torch.cat([1 - logits.sigmoid(), logits.sigmoid()], 1)
    with contextlib.suppress(ValueError):
        logs = in_uneven_batches(name, "label_logits", logits, y)
        np.testing.assert_allclose(
            logs[name], of_whole_data("multiclass", name, both, y.ravel().long(), num_classes=2), rtol=1e-5
        )


@pytest.mark.parametrize("name", ["precision", "recall", "f1", "iou", "specificity"])
def test_class_metric_of_two_logits_is_refused_and_its_macro_is_not(name: str) -> None:
    logits, y = rand(N, 2, seed=1), (rand(N, seed=2) * 2).long()
    with pytest.raises(ValueError, match=rf"'{name}' can't be inferred: .* class 1's or the mean.*'{name}_macro'"):
        in_uneven_batches(name, "class_logits", logits, y)
    macro = f"{name}_macro"
    logs = in_uneven_batches(macro, "class_logits", logits, y)
    np.testing.assert_allclose(
        logs[macro], of_whole_data("multiclass", macro, logits.softmax(1), y, num_classes=2), rtol=1e-5
    )


@pytest.mark.parametrize("scale", ["class_logits", "log_probabilities"])
def test_perplexity_is_the_exponential_of_the_mean_loss_of_all_tokens(scale: str) -> None:
    logits, y = 3 * rand(N, C, 6, seed=1), (rand(N, 6, seed=2) * C).long()
    y[::4, 2:] = -100
    outputs = logits if scale == "class_logits" else logits.log_softmax(1)
    logs = in_uneven_batches("perplexity", scale, outputs, y)
    assert logs["perplexity"] == pytest.approx(nn.functional.cross_entropy(logits, y).exp().item(), rel=1e-5)


def regression_reference(name: str, outputs: Tensor, y: Tensor) -> float:
    outputs, y = outputs.double(), y.reshape(outputs.shape).double()
    error, spread = outputs - y, y - y.mean(0)
    if name.startswith("r2"):
        return 1 - (error.square().sum(0) / spread.square().sum(0)).mean().item()
    if name == "explained_variance":
        return 1 - (error.var(0) / spread.var(0)).mean().item()
    if name == "cosine_similarity":
        return ((outputs * y).sum(1) / outputs.norm(dim=1) / y.norm(dim=1)).mean().item()
    if "percentage" in name or name == "mape":
        return (error / y).abs().mean().item()
    if "absolute" in name or name == "mae":
        return error.abs().mean().item()
    return error.square().mean().item() ** (0.5 if name.startswith("r") else 1)


@pytest.mark.parametrize("name", sorted(set(REGRESSION) - {"cosine_similarity"}))
@pytest.mark.parametrize("columns", [(), (1,)], ids=["(N,)", "(N, 1) with (N,)"])
def test_named_metric_is_the_regression_reference(name: str, columns: tuple[int, ...]) -> None:
    y = 3 * rand(N, seed=13) + 0.1
    outputs = (y + rand(N, seed=14) - 0.3).reshape(N, *columns)
    logs = in_uneven_batches(name, "values", outputs, y)
    assert logs[name] == pytest.approx(regression_reference(name, outputs, y), rel=1e-6)


@pytest.mark.parametrize("name", sorted(REGRESSION))
def test_named_metric_is_the_regression_reference_of_several_values(name: str) -> None:
    y, outputs = rand(N, 3, seed=13) + 0.1, rand(N, 3, seed=14)
    logs = in_uneven_batches(name, "values", outputs, y)
    assert logs[name] == pytest.approx(regression_reference(name, outputs, y), rel=1e-6)


@pytest.mark.parametrize("name", ["r2", "explained_variance"])
def test_regression_far_from_zero_loses_no_digits(name: str) -> None:
    y = rand(N, seed=13) + 1000
    outputs = y + 0.1 * rand(N, seed=14)
    logs = in_uneven_batches(name, "values", outputs, y)
    assert logs[name] == pytest.approx(regression_reference(name, outputs, y), rel=1e-6)


# ---- inference refused ----


@pytest.mark.parametrize(
    ("name", "scale", "outputs", "y", "reason"),
    [
        ("accuracy", "values", rand(4, 3, seed=0), torch.zeros(4).long(), "the loss is one for regression"),
        ("accuracy", "unknown", rand(4, 1, seed=0), torch.zeros(4, 1), "the task can't be told"),
        ("accuracy", "unknown", rand(4, 3, seed=0), rand(4, 3, seed=1), "the task can't be told"),
        ("accuracy", "class_logits", rand(4, 3, seed=0), torch.zeros(4), "the task can't be told"),
        ("accuracy", "class_logits", rand(4, 3, seed=0), torch.zeros(4, 1).long(), "the task can't be told"),
        ("accuracy", "class_logits", rand(4, 1, seed=0), torch.zeros(4).long(), "the task can't be told"),
        ("f1", "label_logits", rand(4, 3, seed=0), torch.zeros(4).long(), "the task can't be told"),
        ("auroc", "unknown", rand(4, 3, seed=0), torch.zeros(4).long(), "logits or probabilities"),
        ("auroc", "values", rand(4, 3, seed=0), torch.zeros(4).long(), "the loss is one for regression"),
        ("mse", "values", rand(4, 3, seed=0), torch.zeros(4), "outputs and targets differ in size"),
        ("cosine_similarity", "values", rand(4, seed=0), torch.zeros(4), "it compares rows of a matrix"),
        ("perplexity", "values", rand(4, 3, seed=0), torch.zeros(4, 3), "class indices"),
        ("perplexity", "class_logits", rand(4, 3, seed=0), rand(4, 3, seed=1), "class indices"),
        ("top_5_accuracy", "class_logits", rand(4, 3, seed=0), torch.zeros(4).long(), "5 classes"),
        ("top_2_accuracy", "label_logits", rand(4, 1, seed=0), torch.zeros(4, 1), "classes"),
        ("cohen_kappa", "label_logits", rand(4, 3, seed=0), torch.zeros(4, 3), "not defined for a multilabel task"),
        ("mae", "values", (rand(4, 3, seed=0),), torch.zeros(4), "one tensor of outputs and one of targets"),
        ("accuracy", "class_logits", rand(4, 3, seed=0), {"a": torch.zeros(4)}, "one tensor of outputs"),
    ],
)
def test_metric_that_would_be_a_guess_is_refused(name: str, scale: str, outputs: Any, y: Any, reason: str) -> None:
    sums = PassSums(make_metrics(name, scale), CPU)
    with pytest.raises(ValueError, match=rf"metric '{name}' can't be inferred: .*{reason}.*targets .*Pass a torchm"):
        sums.infer(outputs, y)


def test_refusal_describes_outputs_and_targets() -> None:
    sums = PassSums(make_metrics("accuracy", "values"), CPU)
    with pytest.raises(ValueError, match=r"\(outputs Tensor\(4, 3\) float32, targets Tensor\(4,\) int64\)"):
        sums.infer(torch.zeros(4, 3), torch.zeros(4).long())


def test_classes_alone_are_inferred_for_an_unknown_loss() -> None:
    logits, y = rand(N, C, seed=1), (rand(N, seed=2) * C).long()
    logs = in_uneven_batches("accuracy", "unknown", logits, y)
    assert logs["accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())


# ---- the table and what it makes ----


@pytest.mark.parametrize(("name", "near"), [("acuracy", "accuracy"), ("aucroc", "auroc"), ("msee", "mse")])
def test_unknown_metric_gives_the_nearest_and_all(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"metric '{name}' is not known; did you mean .*'{near}'.*Known: .*recall"):
        make_metrics(name, "class_logits")


def absolute_gap(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).abs()


@pytest.mark.parametrize(
    ("metrics", "names"),
    [
        (None, []),
        ("Accuracy", ["Accuracy"]),
        (["acc", "f1"], ["acc", "f1"]),
        (("mse", absolute_gap), ["mse", "absolute_gap"]),
        (absolute_gap, ["absolute_gap"]),
        (MulticlassAccuracy(C), ["multiclass_accuracy"]),
        ([MulticlassF1Score(C), nn.L1Loss()], ["multiclass_f1_score", "l1_loss"]),
        ({"top": "accuracy", "gap": absolute_gap}, ["top", "gap"]),
    ],
)
def test_log_names_are_as_given_or_the_object_s_own_or_the_key(metrics: Any, names: list[str]) -> None:
    made = make_metrics(metrics, "class_logits")
    assert list(made) == names
    assert list(known_logs(made)) == ["loss", *names]


@pytest.mark.parametrize("name", ["accuracy", "Accuracy", "ACCURACY", " accuracy"])
def test_name_in_any_case_is_the_same_metric(name: str) -> None:
    logits, y = rand(N, C, seed=1), (rand(N, seed=2) * C).long()
    expected = (logits.argmax(1) == y).float().mean().item()
    assert in_uneven_batches(name, "class_logits", logits, y)[name] == pytest.approx(expected)


@pytest.mark.parametrize(
    "metrics",
    [
        ["accuracy", "accuracy"],
        {"loss": "accuracy"},
        [MulticlassAccuracy(C), MulticlassAccuracy(C, average="macro")],
        ["accuracy", MetricCollection({"accuracy": MulticlassAccuracy(C)})],
        MetricCollection({"loss": MulticlassAccuracy(C)}),
    ],
    ids=["names", "loss", "objects", "name and collection", "loss in a collection"],
)
def test_two_metrics_of_one_log_name_are_refused(metrics: Any) -> None:
    with pytest.raises(ValueError, match="twice"):
        make_metrics(metrics, "class_logits")


@pytest.mark.parametrize("metric", [3, [None], [MulticlassAccuracy], {"a": 1.5}])
def test_what_is_no_metric_is_refused(metric: Any) -> None:
    with pytest.raises(TypeError, match="a metric must be a name, a torchmetrics object or a function"):
        make_metrics(metric, "class_logits")


def test_class_instead_of_object_is_refused_with_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"give an object, MulticlassAccuracy\(\.\.\.\)"):
        make_metrics([MulticlassAccuracy], "class_logits")


def test_direction_is_torchmetrics_own_and_unknown_for_functions() -> None:
    names = ["accuracy", "auroc", "r2", "mse", "rmse", "mae"]
    collection = MetricCollection({"top": MulticlassAccuracy(C), "gap": MeanSquaredError()}, prefix="my_")
    metrics = {name: name for name in names} | {"gap": absolute_gap, "all": collection, "mean": MeanMetric()}
    by_name = {"accuracy": True, "auroc": True, "r2": True, "mse": False, "rmse": False, "mae": False}
    others = {"gap": None, "my_top": True, "my_gap": False, "mean": None}
    assert known_logs(make_metrics(metrics, "values")) == {"loss": False} | by_name | others


def test_direction_of_every_name_is_known_but_of_a_matrix() -> None:
    known = known_logs(make_metrics({name: name for name in METRICS}, "values"))
    errors = ("mse", "rmse", "mae", "mape", "mean_", "root_mean", "perplexity", "loss")
    for name, higher_is_better in known.items():
        expected = None if name == "confusion_matrix" else not name.startswith(errors)
        assert (name, higher_is_better) == (name, expected)


# ---- objects and functions ----


def test_user_s_metric_object_is_cloned_and_stays_untouched() -> None:
    metric = MulticlassAccuracy(C)
    state = copy.deepcopy(metric.metric_state)
    made = make_metrics({"a": metric, "b": metric}, "class_logits")
    sums = PassSums(made, CPU)
    sums.update(torch.tensor(0.0), rand(N, C, seed=1), (rand(N, seed=2) * C).long(), N)
    sums.compute()
    assert made["a"] is not metric
    for untouched in (metric, made["a"]):
        assert not untouched.update_called
        assert all(torch.equal(state[key], value) for key, value in untouched.metric_state.items())


def test_object_fed_in_batches_equals_its_functional_on_all() -> None:
    logits, y = rand(N, C, seed=1), (rand(N, seed=2) * C).long()
    logs = in_uneven_batches(MulticlassF1Score(C, average="weighted"), "unknown", logits, y)
    expected = reference.multiclass_f1_score(logits, y, C, average="weighted").item()
    assert logs["multiclass_f1_score"] == pytest.approx(expected)


def test_collection_logs_each_of_its_metrics() -> None:
    logits, y = rand(N, C, seed=1), (rand(N, seed=2) * C).long()
    collection = MetricCollection({"top": MulticlassAccuracy(C, average="micro"), "f": MulticlassF1Score(C)})
    logs = in_uneven_batches(collection, "unknown", logits, y)
    assert set(logs) == {"loss", "top", "f"}
    assert logs["top"] == pytest.approx((logits.argmax(1) == y).float().mean().item())


def test_metric_of_several_numbers_is_logged_as_a_list() -> None:
    logits, y = rand(N, C, seed=1), (rand(N, seed=2) * C).long()
    logs = in_uneven_batches({"confusion": MulticlassConfusionMatrix(C)}, "unknown", logits, y)
    expected = np.zeros((C, C), int)
    np.add.at(expected, (y.numpy(), logits.argmax(1).numpy()), 1)
    assert logs["confusion"] == expected.tolist()


@pytest.mark.parametrize(
    "function",
    [absolute_gap, lambda outputs, y: (outputs - y).abs().mean(), nn.L1Loss()],
    ids=["per sample", "scalar", "module"],
)
def test_function_is_averaged_over_samples_not_batches(function: Any) -> None:
    outputs, y = rand(N, 2, seed=1), rand(N, 2, seed=2)
    logs = in_uneven_batches({"gap": function}, "values", outputs, y)
    assert logs["gap"] == pytest.approx((outputs - y).abs().mean().item(), rel=1e-5)


# ---- sums of a pass ----


def test_loss_is_weighted_by_samples_with_a_short_last_batch() -> None:
    sums = PassSums({}, CPU)
    for loss, n in ((1.0, 32), (2.0, 32), (10.0, 4)):
        sums.update(torch.tensor(loss), None, None, n)
    assert sums.compute() == {"loss": (32 * 1.0 + 32 * 2.0 + 4 * 10.0) / 68}
    assert sums.running() == sums.compute()


def test_loss_sum_does_not_drift_over_many_batches() -> None:
    sums, loss = PassSums({}, CPU), torch.tensor(0.1)
    for _ in range(20_000):
        sums.update(loss, None, None, 3)
    assert sums.compute()["loss"] == pytest.approx(loss.item(), rel=1e-12)


def test_pass_without_a_batch_has_no_logs() -> None:
    sums = PassSums(make_metrics(["accuracy", MulticlassAccuracy(C)], "class_logits"), CPU)
    assert sums.compute() == {}
    assert sums.running() == {}


def test_two_passes_over_the_same_metrics_do_not_mix() -> None:
    made = make_metrics({"gap": absolute_gap}, "values")
    train, val = PassSums(made, CPU), PassSums(made, CPU)
    train.update(torch.tensor(1.0), torch.ones(2), torch.zeros(2), 2)
    val.update(torch.tensor(3.0), torch.ones(2), torch.ones(2), 2)
    assert (train.compute(), val.compute()) == ({"loss": 1.0, "gap": 1.0}, {"loss": 3.0, "gap": 0.0})


def test_running_logs_leave_out_metrics_that_keep_every_sample() -> None:
    logits, y = rand(N, C, seed=1), (rand(N, seed=2) * C).long()
    sums = PassSums(make_metrics(["accuracy", "auroc"], "class_logits"), CPU)
    sums.update(torch.tensor(0.5), logits, y, N)
    assert sums.running() == {"loss": 0.5, "accuracy": sums.compute()["accuracy"]}
    assert list(sums.compute()) == ["loss", "accuracy", "auroc"]


def test_running_logs_read_in_mid_pass_do_not_change_the_result() -> None:
    outputs, y = rand(N, seed=1), rand(N, seed=2)
    sums = PassSums(make_metrics("mse", "values"), CPU)
    for start, stop in pairwise(CUTS):
        sums.update(torch.tensor(0.0), outputs[start:stop], y[start:stop], stop - start)
        expected = (outputs[:stop] - y[:stop]).square().mean().item()
        sums.flush()
        assert sums.running()["mse"] == pytest.approx(expected, rel=1e-5)


def test_running_logs_can_be_read_with_a_collection() -> None:
    logits, y = rand(N, C, seed=1), (rand(N, seed=2) * C).long()
    sums = PassSums(make_metrics(MetricCollection({"top": MulticlassAccuracy(C)}), "class_logits"), CPU)
    sums.update(torch.tensor(0.5), logits, y, N)
    assert sums.running()["loss"] == 0.5


def test_running_logs_can_be_read_after_a_single_sample() -> None:
    sums = PassSums(make_metrics(["r2", "mse"], "values"), CPU)
    sums.update(torch.tensor(0.5), torch.ones(1), torch.zeros(1), 1)
    logs = sums.running()
    assert (logs["loss"], logs["mse"]) == (0.5, 1.0)


@pytest.mark.parametrize("keeper", [R2Score(), MulticlassAUROC(C)])
def test_running_logs_leave_out_such_metrics_in_a_collection_too(keeper: Any) -> None:
    outputs = rand(1, C, seed=1)
    y = outputs[:, 0] if isinstance(keeper, R2Score) else torch.tensor([1])
    sums = PassSums(make_metrics(MetricCollection({"kept": keeper}), "unknown"), CPU)
    sums.update(torch.tensor(0.5), outputs[:, 0] if isinstance(keeper, R2Score) else outputs, y, 1)
    assert sums.running() == {"loss": 0.5}


# ---- weighted metrics ----


def weighted_logs(metrics: Any, scale: str, outputs: Tensor, y: Tensor, weight: Tensor | None) -> dict[str, Any]:
    sums = PassSums({}, CPU, make_metrics(metrics, scale, weighted=True))
    for start, stop in pairwise(CUTS):
        part = None if weight is None else weight[start:stop]
        sums.update(torch.tensor(0.0), outputs[start:stop], y[start:stop], stop - start, part)
    return sums.compute()


@pytest.mark.parametrize("name", [*WEIGHTED, "root_mean_squared_error"])
def test_weighted_metric_is_the_weighted_sum_over_the_sum_of_weights(name: str) -> None:
    outputs, weight = rand(N, C, seed=1), rand(N, seed=3)
    if name.startswith(("acc", "perplexity")):
        scale, y = "class_logits", (rand(N, seed=2) * C).long()
        right, losses = outputs.argmax(1) == y, nn.functional.cross_entropy(outputs, y, reduction="none")
        values = right.double() if name.startswith("acc") else losses.double()
    else:
        scale, y = "values", rand(N, C, seed=2)
        error = (outputs - y).double()
        values = (error.abs() if name in ("mae", "mean_absolute_error") else error.square()).mean(1)
    mean = ((weight * values).sum() / weight.sum()).item()
    expected = mean**0.5 if name.startswith("r") else np.exp(mean) if name == "perplexity" else mean
    assert weighted_logs(name, scale, outputs, y, weight)[name] == pytest.approx(expected, rel=1e-5)


def test_weighted_metric_without_weights_is_the_plain_one() -> None:
    outputs, y = rand(N, C, seed=1), (rand(N, seed=2) * C).long()
    assert weighted_logs("acc", "class_logits", outputs, y, None) == in_uneven_batches(
        "acc", "class_logits", outputs, y
    )


def test_weighted_function_gives_one_value_per_sample() -> None:
    outputs, y, weight = rand(N, seed=1), rand(N, seed=2), rand(N, seed=3)
    logs = weighted_logs(absolute_gap, "values", outputs, y, weight)
    assert logs["absolute_gap"] == pytest.approx(((outputs - y).abs() * weight).sum().item() / weight.sum().item())
    with pytest.raises(ValueError, match="functions that give one value per sample, not a mean"):
        weighted_logs({"gap": lambda outputs, y: (outputs - y).mean()}, "values", outputs, y, weight)


@pytest.mark.parametrize(("metric", "name"), [("f1", "f1"), (MulticlassAccuracy(C), "MulticlassAccuracy")])
def test_metric_that_can_not_be_weighted_is_refused_with_those_that_can(metric: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"weighted_metrics can't .*{name}.*; it takes .*accuracy.* and functions"):
        make_metrics(metric, "class_logits", weighted=True)


def test_plain_metrics_ignore_the_weights() -> None:
    made = make_metrics({"gap": absolute_gap}, "values")
    sums = PassSums(made, CPU)
    sums.update(torch.tensor(0.0), torch.tensor([1.0, 3.0]), torch.zeros(2), 2, torch.tensor([0.0, 1.0]))
    assert sums.compute()["gap"] == 2.0


# ---- several outputs ----

SCALES = {"digit": ("class_logits", None), "size": ("values", None)}


@pytest.mark.parametrize("metrics", [{"digit": ["accuracy", "f1"], "size": "mae"}, [["accuracy", "f1"], ["mae"]]])
def test_metrics_by_output_read_their_own_output(metrics: Any) -> None:
    logits, y = rand(N, C, seed=1), (rand(N, seed=2) * C).long()
    size, true_size = rand(N, 1, seed=3), rand(N, 1, seed=4)
    is_dict = isinstance(metrics, dict)
    scales = SCALES if is_dict else dict(enumerate(SCALES.values()))
    sums = PassSums(make_output_metrics(metrics, scales), CPU)
    outputs, targets = {"digit": logits, "size": size}, {"size": true_size, "digit": y}
    if not is_dict:
        outputs, targets = (logits, size), (y, true_size)
    sums.infer(outputs, targets)
    sums.update(torch.tensor(3.0), outputs, targets, N, parts={"a_loss": torch.tensor(1.0)})
    first, second = ("digit", "size") if is_dict else ("output_0", "output_1")
    assert sums.compute() == {
        "loss": 3.0,
        f"{first}_accuracy": pytest.approx(multiclass_reference("accuracy", logits, y)),
        f"{first}_f1": pytest.approx(multiclass_reference("f1", logits, y)),
        f"{second}_mae": pytest.approx((size - true_size).abs().mean().item(), rel=1e-5),
        "a_loss": 1.0,
    }


def test_losses_by_output_are_weighted_by_samples() -> None:
    sums = PassSums({}, CPU)
    sums.update(torch.tensor(0.0), None, None, 3, parts={"a_loss": torch.tensor(1.0)})
    sums.update(torch.tensor(0.0), None, None, 1, parts={"a_loss": torch.tensor(5.0)})
    assert sums.compute() == sums.running() == {"loss": 0.0, "a_loss": 2.0}
    sums.reset()
    assert sums.compute() == {}


def test_collection_of_one_output_is_logged_under_its_name() -> None:
    collection = MetricCollection({"top": MulticlassAccuracy(C, average="micro")})
    made = make_output_metrics({"digit": collection}, SCALES)
    assert list(known_logs(made)) == ["loss", "digit_top"]
    logits, y = rand(N, C, seed=1), (rand(N, seed=2) * C).long()
    sums = PassSums(made, CPU)
    sums.update(torch.tensor(0.0), {"digit": logits}, {"digit": y}, N)
    assert sums.compute()["digit_top"] == pytest.approx(multiclass_reference("accuracy", logits, y))


@pytest.mark.parametrize("metrics", [{"digt": "accuracy"}, [["accuracy"]], "accuracy", [["accuracy"], [], []]])
def test_metrics_that_do_not_fit_the_outputs_are_refused(metrics: Any) -> None:
    with pytest.raises(
        ValueError, match=r"does not fit the losses of \['digit', 'size'\]: give metrics for each output"
    ):
        make_output_metrics(metrics, SCALES)
