"""Losses and metrics of many batches, added together, are those of adding each batch by itself."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

import kerastorch.sums
from kerastorch import Model
from kerastorch.callbacks import Callback
from kerastorch.data import BatchSource
from kerastorch.data.weights import add_sample_weight
from kerastorch.metrics import CLASSIFICATION, METRICS, WEIGHTED, NamedMetric, make_metrics, takes_batches_together
from kerastorch.sums import PassSums

CPU = torch.device("cpu")
C = 11  # classes, or labels
Batches = list[tuple[Tensor, Tensor]]  # outputs and targets
COUNTED = {name for name, (_, _, reads) in CLASSIFICATION.items() if reads == "classes"}  # the rest sum floats


def uneven(count: int = 42) -> list[int]:
    """Return sizes of batches: many of one row, some in a row alike."""
    sizes = torch.randint(1, 7, (count,), generator=torch.Generator().manual_seed(4)).tolist()
    sizes[20:30], sizes[-1] = [5] * 10, 1
    return sizes


def rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def cut(outputs: Tensor, y: Tensor, sizes: list[int] | None = None) -> Batches:
    sizes = sizes or uneven()
    return list(zip(outputs.split(sizes), y.split(sizes), strict=True))


def losses_of(batches: Iterable[Any]) -> Iterator[Tensor]:
    return (torch.tensor(0.1 * (i % 7)) for i, _ in enumerate(batches))


def logs_of(sums: PassSums, batches: Batches, weights: Iterable[Tensor | None] | None = None) -> dict[str, Any]:
    weights = [None] * len(batches) if weights is None else weights
    for (outputs, y), loss, weight in zip(batches, losses_of(batches), weights, strict=True):
        sums.update(loss, outputs, y, len(outputs), weight)
    return sums.compute()


def one_by_one(make: Callable[[], PassSums], *data: Any) -> dict[str, Any]:
    """Return the logs where no metric takes batches together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kerastorch.sums, "takes_batches_together", lambda metric: False)
        sums = make()
    return logs_of(sums, *data)


def assert_agree(logs: dict[str, Any], expected: dict[str, Any], counted: Iterable[str] = ()) -> None:
    assert list(logs) == list(expected)
    for name, value in expected.items():
        if name in counted:
            assert logs[name] == value
        else:
            np.testing.assert_allclose(logs[name], value, rtol=1e-6, err_msg=name)


# ---- the same numbers ----

N = sum(uneven())
CLASSES = (rand(N, seed=2) * C).long()
LOGITS = rand(N, C, seed=1) - 0.1 + 0.3 * nn.functional.one_hot(CLASSES, C)  # whole batches lie in [0, 1]
LABELS = (rand(N, C, seed=3) < 0.4).float()
CASES: dict[str, tuple[str, Tensor, Tensor]] = {  # scale, outputs, targets
    "classes": ("class_logits", LOGITS, CLASSES),
    "one-hot": ("class_logits", LOGITS, nn.functional.one_hot(CLASSES, C).float()),
    "log-probabilities": ("log_probabilities", LOGITS.log_softmax(1), CLASSES),
    "unknown": ("unknown", LOGITS, CLASSES),
    "pixels": ("class_logits", LOGITS[:, :, None].repeat(1, 1, 2), CLASSES[:, None].repeat(1, 2)),
    "labels": ("label_logits", LOGITS, LABELS),
    "probabilities": ("probabilities", LOGITS.sigmoid(), LABELS),
    "yes or no": ("label_logits", LOGITS[:, :1], LABELS[:, :1]),
    "yes or no, flat": ("label_logits", LOGITS[:, 0], LABELS[:, 0]),
    "probabilities of yes": ("probabilities", LOGITS[:, 0].sigmoid(), LABELS[:, 0]),
    "values": ("values", LOGITS, LOGITS + rand(N, C, seed=5) + 0.1),
    "one value": ("values", LOGITS[:, :1], LOGITS[:, 0] + rand(N, seed=5) + 0.1),
    "values far from zero": ("values", LOGITS + 1000, LOGITS + rand(N, C, seed=5) + 1000),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_named_metric_is_that_of_each_batch_by_itself(name: str) -> None:
    known = 0
    for scale, outputs, y in CASES.values():
        if name == "cosine_similarity" and outputs.shape != y.shape:
            continue
        made = make_metrics(name, scale)
        try:
            made[name].clone().infer(outputs, y)
        except ValueError:
            continue
        known += 1
        assert takes_batches_together(made[name])
        data = cut(outputs, y)
        expected = one_by_one(lambda made=made: PassSums(made, CPU), data)
        assert_agree(logs_of(PassSums(made, CPU), data), expected, COUNTED)
    assert known


def test_targets_that_do_not_count_are_left_out_of_all_batches() -> None:
    y = CLASSES.clone()
    y[::3] = -100
    names = ["accuracy", "f1", "perplexity", "auroc"]
    made = make_metrics(names, "class_logits", -100)
    expected = one_by_one(lambda: PassSums(made, CPU), cut(LOGITS, y))
    assert_agree(logs_of(PassSums(made, CPU), cut(LOGITS, y)), expected, ["accuracy", "f1"])


def objects() -> dict[str, Metric]:
    """Return an object of each torchmetrics class of classification and regression that batches are joined for."""
    made: dict[str, Metric] = {}
    for module in (torchmetrics.classification, torchmetrics.regression):
        for name, cls in inspect.getmembers(module, inspect.isclass):
            size = {"Multiclass": {"num_classes": C}, "Multilabel": {"num_labels": C}}
            arguments = next((size[task] for task in size if name.startswith(task)), {})
            try:
                with warnings.catch_warnings():  # of how much some of them keep
                    warnings.simplefilter("ignore")
                    metric = cls(**arguments)
            except (TypeError, ValueError, ImportError):
                continue  # a class that needs more
            if isinstance(metric, Metric) and takes_batches_together(metric):
                made[name] = metric
    return made


OBJECTS = objects() | {
    name: metric
    for name, metric in {
        "macro": MulticlassAccuracy(C, average="none"),
        "top 3": MulticlassAccuracy(C, top_k=3, average="micro"),
        "confusion": MulticlassConfusionMatrix(C, normalize="true"),
        "AUROC of thresholds": torchmetrics.classification.MulticlassAUROC(C, thresholds=20),
        "similarity of each": torchmetrics.CosineSimilarity(reduction="none"),
        "collection": MetricCollection([MulticlassAccuracy(C), MulticlassF1Score(C)]),
    }.items()
    if takes_batches_together(metric)
}


def data_for(name: str, metric: Any) -> list[Batches]:
    if name.startswith("Binary"):
        return [cut(LOGITS[:, 0], LABELS[:, 0].long()), cut(LOGITS[:, 0].sigmoid(), LABELS[:, 0].long())]
    if name.startswith("Multilabel"):
        return [cut(LOGITS, LABELS.long()), cut(LOGITS.sigmoid(), LABELS.long())]
    if "imilarity" in name:
        return [cut(LOGITS, rand(N, C, seed=5))]
    if isinstance(metric, MetricCollection) or type(metric).__module__.startswith("torchmetrics.classification"):
        return [cut(LOGITS, CLASSES), cut(LOGITS.softmax(1), CLASSES)]
    values = LOGITS[:, 0]
    return [cut(values, values + rand(N, seed=5) + 0.1), cut(values + 100, values + rand(N, seed=5) + 100)]


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_is_that_of_each_batch_by_itself(name: str) -> None:
    for data in data_for(name, OBJECTS[name]):
        made = make_metrics({"metric": OBJECTS[name]}, "unknown")
        expected = one_by_one(lambda made=made: PassSums(made, CPU), data)
        assert_agree(logs_of(PassSums(made, CPU), data), expected)


def test_objects_of_classes_are_collected() -> None:
    assert {"MulticlassAccuracy", "MulticlassF1Score", "MulticlassConfusionMatrix"} <= set(OBJECTS)


def test_each_loss_counts_by_its_samples() -> None:
    data = cut(LOGITS, CLASSES)
    pairs = zip(losses_of(data), uneven(), strict=True)
    expected = sum(loss.double().item() * size for loss, size in pairs) / N
    assert logs_of(PassSums({}, CPU), data)["loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", ["class_logits", "values"])
@pytest.mark.parametrize("form", ["all", "(N, 1)", "some", "shapes that change"])
def test_a_weighted_metric_is_that_of_each_batch_by_itself(form: str, scale: str) -> None:
    names = [name for name in WEIGHTED if (METRICS[name] == "values") == (scale == "values")]
    y = CLASSES if scale == "class_logits" else rand(N, C, seed=5)
    weights: list[Tensor | None] = list(rand(N, seed=6).split(uneven()))
    if form == "(N, 1)":
        weights = [weight[:, None] for weight in weights if weight is not None]
    elif form == "some":
        weights = [None if i % 5 < 2 else weight for i, weight in enumerate(weights)]
    elif form == "shapes that change":
        weights = [weight if i % 3 else weight[:, None] for i, weight in enumerate(weights) if weight is not None]

    def make() -> PassSums:  # plain ones beside them, which take no weights
        return PassSums(make_metrics(names, scale), CPU, made)

    made = {f"weighted_{name}": metric for name, metric in make_metrics(names, scale, weighted=True).items()}
    expected = one_by_one(make, cut(LOGITS, y), weights)
    logs = logs_of(make(), cut(LOGITS, y), weights)
    assert_agree(logs, expected)
    assert logs[f"weighted_{names[0]}"] != logs[names[0]]


def test_trailing_shapes_may_change_from_batch_to_batch() -> None:
    lengths = [1 + (i // 3) % 4 for i in range(42)]
    sizes = uneven()
    outputs = [rand(n, C, t, seed=i) for i, (n, t) in enumerate(zip(sizes, lengths, strict=True))]
    y = [(rand(n, t, seed=100 + i) * C).long() for i, (n, t) in enumerate(zip(sizes, lengths, strict=True))]
    data = list(zip(outputs, y, strict=True))
    made = make_metrics(["accuracy", "f1", "perplexity"], "class_logits")
    assert_agree(logs_of(PassSums(made, CPU), data), one_by_one(lambda: PassSums(made, CPU), data), ["accuracy", "f1"])


def test_rows_keep_their_order() -> None:
    metric = torchmetrics.CosineSimilarity(reduction="none")
    logs = logs_of(PassSums(make_metrics({"each": metric}, "values"), CPU), cut(LOGITS, rand(N, C, seed=5)))
    expected = nn.functional.cosine_similarity(LOGITS, rand(N, C, seed=5))
    np.testing.assert_allclose(logs["each"], expected, rtol=1e-5)


# ---- what is not joined ----


def test_a_function_is_called_with_each_batch() -> None:
    calls: list[int] = []

    def largest_gap(outputs: Tensor, y: Tensor) -> Tensor:
        calls.append(len(outputs))
        return (outputs - y).abs().max()  # of its batch

    data = cut(LOGITS[:, 0], LABELS[:, 0])
    logs = logs_of(PassSums(make_metrics([largest_gap, "mse"], "values"), CPU), data)
    assert calls == uneven()
    expected = sum(len(y) * (outputs - y).abs().max().item() for outputs, y in data) / N
    assert logs["largest_gap"] == pytest.approx(expected)


def test_a_weighted_function_is_called_with_each_batch() -> None:
    calls: list[int] = []

    def gap(outputs: Tensor, y: Tensor) -> Tensor:
        calls.append(len(outputs))
        return (outputs - y).abs()

    made = make_metrics([gap, "mse"], "values", weighted=True)
    logs_of(PassSums({}, CPU, made), cut(LOGITS[:, 0], LABELS[:, 0]), rand(N, seed=1).split(uneven()))
    assert calls == uneven()


UPDATES: list[int] = []


class OwnAccuracy(MulticlassAccuracy):
    """A subclass of what would be joined; that it updates alike is not known."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        UPDATES.append(len(preds))
        super().update(preds, target)


class OwnMetric(Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("batches", torch.tensor(0))

    def update(self, outputs: Tensor, y: Tensor) -> None:
        UPDATES.append(len(outputs))
        self.batches += 1

    def compute(self) -> Tensor:
        return self.batches


@pytest.mark.parametrize(
    "metric",
    [
        OwnAccuracy(C),
        type("MulticlassAccuracy", (OwnAccuracy,), {})(C),
        OwnMetric(),
        MetricCollection({"own": OwnMetric(), "accuracy": MulticlassAccuracy(C)}),
    ],
    ids=["subclass", "subclass of its name", "own", "collection"],
)
def test_an_object_of_a_class_that_is_not_known_is_updated_with_each_batch(metric: Any) -> None:
    UPDATES.clear()
    assert not takes_batches_together(metric)
    logs_of(PassSums(make_metrics({"own": metric, "beside": "accuracy"}, "class_logits"), CPU), cut(LOGITS, CLASSES))
    assert uneven() == UPDATES


def test_a_torchmetrics_class_that_is_not_known_is_updated_with_each_batch() -> None:
    sums = PassSums(make_metrics({"mse": MeanSquaredError()}, "values"), CPU)
    logs_of(sums, cut(LOGITS, LABELS))
    assert sums.metrics["mse"].update_count == len(uneven())


def test_what_looks_whether_scores_are_logits_looks_at_each_batch() -> None:
    """A batch within [0, 1] is taken for probabilities, whatever others there are."""
    logits, y = torch.tensor([0.4, -4.0, 4.0, 0.6] * 8), torch.tensor([0, 0, 1, 1] * 8)
    for metric in (BinaryAUROC(), torchmetrics.classification.BinaryAccuracy()):
        sums = PassSums(make_metrics({"metric": metric}, "unknown"), CPU)
        assert logs_of(sums, cut(logits, y, [1] * 32))["metric"] == 1.0


# ---- when they are added ----


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each update of a named metric."""
    seen: list[int] = []
    update = NamedMetric.update

    def spy(self: NamedMetric, outputs: Any, y: Any, *weight: Any) -> None:
        seen.append(len(outputs))
        update(self, outputs, y, *weight)

    monkeypatch.setattr(NamedMetric, "update", spy)
    return seen


def test_batches_are_added_at_1_2_4_8_16_and_each_32nd_and_at_the_end(updates: list[int]) -> None:
    sums = PassSums(make_metrics("mse", "values"), CPU)
    for _ in range(2):  # passes
        updates.clear()
        added_at = []
        for batch in range(1, 101):
            before = len(updates)
            sums.update(torch.tensor(1.0), torch.ones(2), torch.zeros(2), 2)
            if len(updates) > before:
                added_at.append(batch)
        assert added_at == [1, 2, 4, 8, 16, 32, 64, 96]
        sums.compute()
        assert updates == [2 * batches for batches in (1, 1, 2, 4, 8, 16, 32, 32, 4)]
        sums.compute()
        assert len(updates) == 9
        sums.reset()


def test_what_a_reset_finds_collected_is_dropped(updates: list[int]) -> None:
    sums = PassSums(make_metrics("mse", "values"), CPU)
    for _ in range(7):
        sums.update(torch.tensor(9.0), torch.ones(2), torch.zeros(2), 2)
    sums.reset()
    sums.update(torch.tensor(1.0), torch.zeros(2), torch.zeros(2), 2)
    assert sums.compute() == {"loss": 1.0, "mse": 0.0}


def test_batches_are_added_where_they_hold_many_bytes(updates: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kerastorch.sums, "MAX_COLLECTED_BYTES", 1000)
    sums = PassSums(make_metrics("mse", "values"), CPU)
    for _ in range(70):
        sums.update(torch.tensor(1.0), torch.ones(10), torch.zeros(10), 10)  # 80 bytes
    assert updates == [10 * batches for batches in (1, 1, 2, 4, 8, 13, 3, 13, 13, 6)]
    for _ in range(20):
        sums.update(torch.tensor(1.0), torch.ones(500), torch.zeros(500), 500)
    assert updates[10:] == [60 + 500] + [500] * 19


def test_what_outputs_are_parts_of_is_not_held() -> None:
    """The last step of a long sequence is small; the sequence is not."""
    sums = PassSums(make_metrics("mse", "values"), CPU)
    most = 0
    for _ in range(31):
        outputs = torch.zeros(2, 2**17)[:, -1]  # of 1 MB
        sums.update(torch.tensor(1.0), outputs, torch.zeros(2), 2)
        most = max(most, sum(held.untyped_storage().nbytes() for held, _, _ in sums._collected))
    assert most <= 2**20


def test_weights_that_no_metric_takes_do_not_matter(updates: list[int]) -> None:
    sums = PassSums(make_metrics("mse", "values"), CPU)
    for batch in range(1, 33):
        sums.update(torch.tensor(1.0), torch.ones(2), torch.zeros(2), 2, torch.ones(2) if batch % 2 else None)
    assert updates == [2 * batches for batches in (1, 1, 2, 4, 8, 16)]


def test_trailing_shapes_that_change_are_added_first(updates: list[int]) -> None:
    sums = PassSums(make_metrics("mse", "values"), CPU)
    for batch in range(1, 25):
        rows = (batch, 2 if batch < 19 else 3)
        sums.update(torch.tensor(1.0), torch.ones(rows), torch.zeros(rows), batch)
    sums.compute()
    assert updates == [1, 2, 3 + 4, 5 + 6 + 7 + 8, sum(range(9, 17)), 17 + 18, sum(range(19, 25))]


def test_losses_by_output_and_logged_values_need_no_end() -> None:
    sums = PassSums(make_metrics("mse", "values"), CPU)
    for batch in range(3):
        sums.update(torch.tensor(1.0), torch.ones(2), torch.zeros(2), 2, parts={"a_loss": torch.tensor(float(batch))})
        sums.log("batch", batch, 2)
    assert sums.running() == {"loss": 1.0, "mse": 1.0, "a_loss": 1.0, "batch": 1.0}


# ---- read, saved and taken up in mid-pass ----

NAMES = ["accuracy", "f1", "auroc", "confusion_matrix"]


def make_sums() -> PassSums:
    weighted = {"weighted": make_metrics("accuracy", "class_logits", weighted=True)["accuracy"]}
    metrics = {**make_metrics(NAMES, "class_logits"), **make_metrics([OwnAccuracy(C)], "class_logits")}
    return PassSums(metrics, CPU, weighted)


def test_running_does_not_change_the_numbers() -> None:
    data, weights = cut(LOGITS, CLASSES), rand(N, seed=6).split(uneven())
    expected = logs_of(make_sums(), data, weights)
    sums = make_sums()
    for (outputs, y), loss, weight in zip(data, losses_of(data), weights, strict=True):
        sums.update(loss, outputs, y, len(outputs), weight)
        sums.running()
    assert sums.compute() == expected


def test_running_is_as_of_when_batches_were_last_added() -> None:
    sums = PassSums(make_metrics("mse", "values"), CPU)
    seen = []
    for batch in range(1, 18):
        sums.update(torch.tensor(float(batch)), torch.full((1,), float(batch)), torch.zeros(1), 1)
        seen.append(sums.running())
    for batch, logs in enumerate(seen, 1):
        last = max(n for n in (1, 2, 4, 8, 16) if n <= batch)
        squares = [n**2 for n in range(1, last + 1)]
        assert logs == {"loss": pytest.approx((last + 1) / 2), "mse": pytest.approx(sum(squares) / last)}


@pytest.mark.parametrize("after", [1, 3, 16, 23, 35, 42])
def test_sums_saved_in_mid_pass_go_on(after: int) -> None:
    data, weights = cut(LOGITS, CLASSES), list(rand(N, seed=6).split(uneven()))
    losses = list(losses_of(data))
    expected = logs_of(make_sums(), data, weights)

    def go_on(sums: PassSums, batches: range) -> list[dict[str, Any]]:
        running = []
        for i in batches:
            sums.update(losses[i], *data[i], len(data[i][0]), weights[i])
            running.append(sums.running())
        return running

    saved, resumed = make_sums(), make_sums()
    go_on(saved, range(after))
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert resumed.running() == saved.running()
    assert go_on(resumed, range(after, 42)) == go_on(saved, range(after, 42))
    logs = resumed.compute()
    assert logs == saved.compute()
    assert_agree(logs, expected, ["accuracy", "f1", "confusion_matrix"])


# ---- what outputs and targets come from ----


class Reusing:
    """Batches in memory that is written over."""

    def __init__(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        self.data, self.buffers = (x, y, weight), [torch.empty_like(part[:4]) for part in (x, y, weight)]

    def __len__(self) -> int:
        return len(self.data[0]) // 4

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in range(len(self)):
            for part, buffer in zip(self.data, self.buffers, strict=True):
                buffer.copy_(part[4 * batch : 4 * batch + 4])
            yield self.buffers


def collate_anew(rows: list[Any]) -> Any:
    return default_collate(rows)


def test_all_but_torch_s_collate_may_reuse_memory() -> None:
    dataset = TensorDataset(torch.zeros(8, 1), torch.zeros(8))

    def may(batches: Any) -> bool:
        return BatchSource(batches, name="the data").may_reuse_memory

    plain, own = DataLoader(dataset, 4), DataLoader(dataset, 4, collate_fn=collate_anew)
    assert not may(plain)
    assert not may(add_sample_weight(plain, torch.ones(8), caller="fit"))
    assert not may(DataLoader(dataset, 4, num_workers=1))
    assert may(own)
    assert may(add_sample_weight(own, torch.ones(8), caller="fit"))
    assert may(DataLoader(dataset, batch_size=None))
    assert may(list(plain))
    assert may(Reusing(torch.zeros(8), torch.zeros(8), torch.ones(8)))


class OneOf(nn.Module):
    """Gives its inputs, where it has no more to do."""

    def __init__(self, is_identity: bool) -> None:
        super().__init__()
        self.is_identity, self.linear = is_identity, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = x if self.is_identity else self.linear(x)
        return outputs


@pytest.mark.parametrize("is_identity", [False, True])
def test_outputs_and_targets_are_right_though_their_memory_is_written_over(is_identity: bool) -> None:
    x, y, weight = rand(100, 2, seed=1), rand(100, 2, seed=2), rand(100, seed=3)
    net = OneOf(is_identity)
    model = Model(net, device="cpu")
    model.compile("mse", "sgd", metrics=["mae"], weighted_metrics={"weighted": "mae"})
    logs = model.evaluate(Reusing(x, y, weight), verbose=0)
    with torch.no_grad():
        error = (net(x) - y).abs().mean(1)
    assert logs["mae"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert logs["weighted"] == pytest.approx(((error * weight).sum() / weight.sum()).item(), rel=1e-5)
    if not is_identity:
        optimizer = torch.optim.SGD(net.parameters(), 0.0)
        model.compile("mse", optimizer, metrics=["mae"])
        history = model.fit(Reusing(x, y, weight), verbose=0).history
        assert history["mae"][0] == pytest.approx(error.mean().item(), rel=1e-5)


class Constant(nn.Module):
    """The same for each sample: a view of a parameter, which the optimizer writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(len(x))


def test_outputs_that_are_a_parameter_s_are_those_of_their_batch() -> None:
    def mse_of_batch(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).square()

    net = Constant()
    model = Model(net, device="cpu")
    model.compile("mse", torch.optim.SGD(net.parameters(), 0.01), metrics=["mse", mse_of_batch])
    history = model.fit(torch.zeros(200, 1), torch.ones(200), batch_size=4, shuffle=False, verbose=0).history
    assert history["mse"] == pytest.approx(history["mse_of_batch"])


# ---- the logs of batch hooks ----


class Reader(Callback):
    """Keeps what batch hooks are told, of training or of validation."""

    def __init__(self) -> None:
        self.train: list[dict[str, Any]] = []
        self.test: list[dict[str, Any]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.train.append(dict(logs))

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.test.append(dict(logs))


def test_logs_of_batch_hooks_hold_all_batches_so_far() -> None:
    x, y = rand(190, 2, seed=1), rand(190, 2, seed=2)
    net = nn.Linear(2, 2)
    model, reader = Model(net, device="cpu"), Reader()
    model.compile("mse", torch.optim.SGD(net.parameters(), 0.0), metrics=["mae"])
    history = model.fit(x, y, batch_size=4, shuffle=False, validation_data=(x, y), callbacks=[reader], verbose=0)
    with torch.no_grad():
        error = net(x) - y
    for seen in (reader.train, reader.test):
        rows = [min(n, 190) for n in accumulate([4] * 48)]
        assert len(seen) == len(rows)
        for n, logs in zip(rows, seen, strict=True):
            expected = {"loss": error[:n].square().mean().item(), "mae": error[:n].abs().mean().item()}
            assert logs == pytest.approx(expected, rel=1e-5)
    assert reader.train[-1]["mae"] == history.history["mae"][0]


def test_reading_logs_in_hooks_changes_no_count_and_no_weight() -> None:
    x, y = rand(190, 2, seed=1), (rand(190, seed=2) * 3).long()
    results = []
    for callbacks in ([], [Reader()]):
        torch.manual_seed(0)
        net = nn.Linear(2, 3)
        model = Model(net, device="cpu")
        model.compile("cross_entropy", torch.optim.SGD(net.parameters(), 0.1), metrics=["accuracy", "f1"])
        history = model.fit(x, y, batch_size=4, callbacks=callbacks, verbose=0).history
        results.append((history, net.weight.detach()))
    (history, weight), (other_history, other_weight) = results
    assert torch.equal(weight, other_weight)
    assert history["accuracy"] == other_history["accuracy"]
    assert history["f1"] == other_history["f1"]
    assert history["loss"] == pytest.approx(other_history["loss"], rel=1e-12)
