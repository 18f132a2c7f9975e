"""What a checkpoint holds of a run and how it is found, without any process dying: tests/faults has those."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

import kerastorch as kt
from kerastorch.callbacks import EMA, BackupAndRestore, EarlyStopping, ModelCheckpoint, ReduceLROnPlateau
from kerastorch.checkpoint import CheckpointError, check_plain, write_checkpoint
from kerastorch.metrics import METRICS, WEIGHTED, make_metrics, make_output_metrics
from kerastorch.resume import bare_module, check_callbacks, find_checkpoint, training_weights
from kerastorch.sums import PassSums

CPU = torch.device("cpu")


def make_model() -> kt.Model:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    return model


def fit(model: kt.Model, callbacks: Any = None, epochs: int = 2, **arguments: Any) -> kt.History:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 3, generator=generator), torch.randint(0, 2, (12,), generator=generator)
    return model.fit(
        x, y, batch_size=4, epochs=epochs, callbacks=callbacks, verbose=0, validation_data=(x, y), **arguments
    )


# ---- the states of sums and metrics ----


def batches(kind: str) -> list[tuple[Any, Any]]:
    """Six batches of outputs and targets, the last one short."""
    torch.manual_seed(3)
    made: list[tuple[Any, Any]] = []
    for rows in (8, 8, 8, 8, 8, 5):
        if kind == "classes":
            made.append((torch.randn(rows, 12), torch.randint(0, 12, (rows,))))
        elif kind == "binary":
            made.append((torch.randn(rows, 1), torch.randint(0, 2, (rows, 1)).float()))
        elif kind == "labels":
            made.append((torch.randn(rows, 4), torch.randint(0, 2, (rows, 4)).float()))
        elif kind == "images":
            made.append((torch.randn(rows, 3, 4, 4), torch.randint(0, 3, (rows, 4, 4))))
        elif kind == "values":
            made.append((torch.randn(rows, 2) + 3, torch.randn(rows, 2) + 3))
        else:
            outputs = {"a": torch.randn(rows, 3), "b": torch.randn(rows, 1)}
            made.append((outputs, {"a": torch.randint(0, 3, (rows,)), "b": torch.randn(rows, 1)}))
    return made


def update(sums: PassSums, batch: tuple[Any, Any], weighs: bool = False) -> None:
    outputs, y = batch
    rows = len(outputs["a"]) if isinstance(outputs, dict) else len(outputs)
    loss = torch.rand((), generator=torch.Generator().manual_seed(rows))
    weight = torch.linspace(0.5, 2.0, rows) if weighs else None
    sums.update(loss, outputs, y, rows, weight, {"a_loss": loss * 0.5})


def through_a_file(state: Any, folder: Path) -> Any:
    check_plain(state)
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def assert_round_trip(
    make: Callable[[], PassSums], kind: str, folder: Path, weighs: bool = False, looks_on_the_way: bool = True
) -> None:
    """Saved after each of the first batches and taken up again, the sums end where uninterrupted ones do."""
    data = batches(kind)
    whole = make()
    for batch in data:
        update(whole, batch, weighs)
    expected = whole.compute()
    for after in (1, 3):
        first = make()
        for batch in data[:after]:
            update(first, batch, weighs)
            if looks_on_the_way:
                first.running()  # the bar does
        state = through_a_file(first.state_dict(), folder)
        resumed = make()
        resumed.load_state_dict(state)
        if looks_on_the_way:
            assert repr(resumed.running()) == repr(first.running())
        for batch in data[after:]:
            update(resumed, batch, weighs)
        assert repr(resumed.compute()) == repr(expected)  # nan equals nan
        resumed.reset()
        for batch in data:
            update(resumed, batch, weighs)
        assert repr(resumed.compute()) == repr(expected)


SCALES = {"classes": "class_logits", "binary": "label_logits", "labels": "label_logits", "values": "values"}
BINARY = [name for name, task in METRICS.items() if task == "classes" and not name.startswith("top_")]
BY_NAME = [
    *((name, "values" if task == "values" else "classes") for name, task in METRICS.items()),
    *((name, "binary") for name in BINARY),
    *((name, "labels") for name in BINARY if name not in ("balanced_accuracy", "cohen_kappa")),
]


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")  # of classes that a batch lacks
@pytest.mark.parametrize(("name", "kind"), BY_NAME)
def test_every_metric_by_name_ends_where_an_uninterrupted_one_does(name: str, kind: str, tmp_path: Path) -> None:
    assert_round_trip(lambda: PassSums(make_metrics(name, SCALES[kind]), CPU), kind, tmp_path)


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_weighted_metric_by_name_ends_where_an_uninterrupted_one_does(name: str, tmp_path: Path) -> None:
    kind = "values" if METRICS[name] == "values" else "classes"
    made = make_metrics(name, SCALES[kind], weighted=True)
    assert_round_trip(lambda: PassSums({}, CPU, made), kind, tmp_path, weighs=True)


@pytest.mark.parametrize("name", ["accuracy", "iou", "perplexity"])
def test_metrics_of_images_with_an_ignored_class_end_where_uninterrupted_ones_do(name: str, tmp_path: Path) -> None:
    assert_round_trip(lambda: PassSums(make_metrics(name, "class_logits", 2), CPU), "images", tmp_path)


def top_share(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs.argmax(1) == y).float()


def mean_of_outputs(outputs: Tensor, y: Tensor) -> Tensor:
    return outputs.mean()


def collection() -> torchmetrics.MetricCollection:
    """Three whose states are the same, which torchmetrics then updates once, and one with another."""
    return torchmetrics.MetricCollection(
        {
            "precision": MulticlassPrecision(12, average="macro"),
            "recall": MulticlassRecall(12, average="macro"),
            "f1": MulticlassF1Score(12, average="macro"),
            "confusion": MulticlassConfusionMatrix(12),
        }
    )


class Shape(torchmetrics.Metric):
    """States of every kind: a sum, a list, and a number that grows by cat."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("rows", [], dist_reduce_fx=None)
        self.add_state("all", [], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, y: Tensor) -> None:
        self.total += outputs.sum()
        self.rows.append(torch.tensor(len(y)))
        self.all.append(outputs[:, 0])

    def compute(self) -> Tensor:
        return self.total + 10 * torch.cat(self.all).median() + sum(self.rows)


def squared() -> torchmetrics.Metric:
    return torchmetrics.MeanSquaredError()


OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "accuracy": (lambda: MulticlassAccuracy(12), "classes"),
    "accuracy a class": (lambda: MulticlassAccuracy(12, average=None), "classes"),
    "confusion matrix": (lambda: MulticlassConfusionMatrix(12), "classes"),
    "exact auroc": (lambda: torchmetrics.classification.MulticlassAUROC(12), "classes"),
    "binned auroc": (lambda: torchmetrics.classification.MulticlassAUROC(12, thresholds=7), "classes"),
    "calibration error": (lambda: torchmetrics.classification.MulticlassCalibrationError(12), "classes"),
    "r2": (lambda: torchmetrics.R2Score(), "values"),
    "pearson": (lambda: torchmetrics.PearsonCorrCoef(num_outputs=2), "values"),
    "spearman": (lambda: torchmetrics.SpearmanCorrCoef(num_outputs=2), "values"),
    "cosine": (lambda: torchmetrics.CosineSimilarity(reduction="mean"), "values"),
    "composed": (lambda: squared() + torchmetrics.MeanAbsoluteError(), "values"),
    "collection": (collection, "classes"),
    "collection without groups": (
        lambda: torchmetrics.MetricCollection([MulticlassRecall(12), MulticlassPrecision(12)], compute_groups=False),
        "classes",
    ),
    "class-wise": (
        lambda: torchmetrics.wrappers.ClasswiseWrapper(MulticlassAccuracy(12, average=None)),
        "classes",
    ),
    "multi-output": (lambda: torchmetrics.wrappers.MultioutputWrapper(torchmetrics.MeanSquaredError(), 2), "values"),
    "minimum and maximum": (lambda: torchmetrics.wrappers.MinMaxMetric(torchmetrics.MeanSquaredError()), "values"),
    "running": (lambda: torchmetrics.wrappers.Running(torchmetrics.MeanSquaredError(), window=2), "values"),
    "own": (Shape, "classes"),
    "function of samples": (lambda: top_share, "classes"),
    "function of a batch": (lambda: mean_of_outputs, "classes"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
@pytest.mark.parametrize("looks_on_the_way", [False, True])
@pytest.mark.parametrize("name", OBJECTS)
def test_torchmetrics_objects_and_functions_end_where_uninterrupted_ones_do(
    name: str, looks_on_the_way: bool, tmp_path: Path
) -> None:
    if name == "minimum and maximum" and looks_on_the_way:
        pytest.skip("looking is what it counts")
    make, kind = OBJECTS[name]
    assert_round_trip(
        lambda: PassSums(make_metrics([make()], SCALES[kind]), CPU), kind, tmp_path, looks_on_the_way=looks_on_the_way
    )


def test_metrics_of_several_outputs_end_where_uninterrupted_ones_do(tmp_path: Path) -> None:
    def make() -> PassSums:
        specs = {
            "a": ["accuracy", "f1_macro", collection_of_3()],
            "b": ["mae", "r2", torchmetrics.MeanSquaredError()],
        }
        scales = {"a": ("class_logits", None), "b": ("values", None)}
        return PassSums(make_output_metrics(specs, scales), CPU)

    assert_round_trip(make, "outputs", tmp_path)


def collection_of_3() -> torchmetrics.MetricCollection:
    return torchmetrics.MetricCollection([MulticlassPrecision(3), MulticlassRecall(3)])


def test_several_metrics_at_once_keep_their_order(tmp_path: Path) -> None:
    metrics = ["accuracy", collection(), top_share, "auroc", "f1_macro"]
    assert_round_trip(lambda: PassSums(make_metrics(metrics, "class_logits"), CPU), "classes", tmp_path)


def test_a_metric_that_the_saved_state_does_not_know_begins_empty(tmp_path: Path) -> None:
    data = batches("classes")
    first = PassSums(make_metrics("accuracy", "class_logits"), CPU)
    update(first, data[0])
    resumed = PassSums(make_metrics(["accuracy", "f1"], "class_logits"), CPU)
    resumed.load_state_dict(through_a_file(first.state_dict(), tmp_path))
    only = PassSums(make_metrics("f1", "class_logits"), CPU)
    for sums in (resumed, only):
        update(sums, data[1])
    assert resumed.compute()["f1"] == only.compute()["f1"]


def test_sums_before_the_first_batch_round_trip_to_nothing(tmp_path: Path) -> None:
    made = make_metrics(["accuracy", "f1", BinaryAUROC()], "class_logits")
    resumed = PassSums(made, CPU)
    resumed.load_state_dict(through_a_file(PassSums(made, CPU).state_dict(), tmp_path))
    assert resumed.compute() == {}


# ---- which checkpoint is found ----


def written(folder: Path, name: str = "run.pt", epochs: int = 1) -> Path:
    fit(make_model(), ModelCheckpoint(folder / name), epochs)
    return folder / name


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def at(path: Path, seconds: int) -> None:
    os.utime(path, ns=(seconds * 10**9, seconds * 10**9))


def test_a_path_is_read_whatever_callbacks_there_are(tmp_path: Path) -> None:
    path = written(tmp_path)
    for resume in (path, str(path)):
        found = find_checkpoint(resume, [])
        assert found is not None
        assert found[1] == path
        assert found[0]["epoch"] == 0


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_checkpoint(tmp_path / "nowhere.pt", [ModelCheckpoint(tmp_path / "run.pt")])
    with pytest.raises(IsADirectoryError, match="is a folder"):
        find_checkpoint(tmp_path, [])


def test_none_and_false_find_nothing_beside_a_model_checkpoint(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert find_checkpoint(None, [ModelCheckpoint(path)]) is None
    assert find_checkpoint(False, [ModelCheckpoint(path)]) is None


def test_true_without_a_callback_that_writes_resume_points_is_refused(tmp_path: Path) -> None:
    for checkpointers in ([], [ModelCheckpoint(tmp_path / "weights.pt", save_weights_only=True)]):
        with pytest.raises(ValueError, match=r"resume=True\) needs a checkpointing callback"):
            find_checkpoint(True, checkpointers)


def test_true_finds_nothing_where_no_file_is_yet(tmp_path: Path) -> None:
    assert find_checkpoint(True, [ModelCheckpoint(tmp_path / "run.pt"), BackupAndRestore(tmp_path / "b")]) is None


def test_true_finds_the_newest_file_of_all_callbacks(tmp_path: Path) -> None:
    first, second = written(tmp_path, "a.pt"), written(tmp_path, "b.pt", epochs=2)
    checkpointers = [ModelCheckpoint(first), ModelCheckpoint(second)]
    for newer, older in ((first, second), (second, first)):
        at(older, 1000)
        at(newer, 2000)
        found = find_checkpoint(True, checkpointers)
        assert found is not None
        assert found[1] == newer


def test_true_finds_the_highest_epoch_among_files_of_one_moment(tmp_path: Path) -> None:
    fit(make_model(), ModelCheckpoint(tmp_path / "{epoch}.pt"), epochs=11)
    for file in tmp_path.iterdir():
        at(file, 1000)
    found = find_checkpoint(True, [ModelCheckpoint(tmp_path / "{epoch}.pt")])
    assert found is not None
    assert found[1] == tmp_path / "11.pt"


def test_only_files_that_the_template_could_have_named_are_looked_at(tmp_path: Path) -> None:
    path = written(tmp_path, "net-1.pt")
    at(path, 1000)
    for other in ("net-1.pt.bak", "other-2.pt", "net-x.pt", ".net-2.pt.7.tmp"):
        (tmp_path / other).write_bytes(path.read_bytes())
    found = find_checkpoint(True, [ModelCheckpoint(tmp_path / "net-{epoch}.pt")])
    assert found is not None
    assert found[1] == path


def test_a_damaged_newest_file_is_passed_over_with_a_warning_that_names_both(tmp_path: Path) -> None:
    old, new = written(tmp_path, "a.pt"), written(tmp_path, "b.pt")
    at(old, 1000)
    at(new, 2000)
    damage(new)
    with pytest.warns(UserWarning, match=r"b\.pt.*damaged.*Going on from .*a\.pt"):
        found = find_checkpoint(
            True, [ModelCheckpoint(tmp_path / "{epoch}.pt"), ModelCheckpoint(old), ModelCheckpoint(new)]
        )
    assert found is not None
    assert found[1] == old


def test_files_of_which_none_can_be_read_are_an_error(tmp_path: Path) -> None:
    path = written(tmp_path)
    damage(path)
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        find_checkpoint(True, [ModelCheckpoint(path)])


def test_a_backup_is_found_without_being_asked_for(tmp_path: Path) -> None:
    backup = BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    fit(make_model(), backup)
    found = find_checkpoint(None, [ModelCheckpoint(written(tmp_path)), backup])
    assert found is not None
    assert found[1].parent == tmp_path / "backup"


# ---- callbacks' states by name ----


class Counter(kt.Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def test_several_callbacks_of_one_class_get_their_own_states_back(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    counters = [Counter(), Counter(), Counter()]
    for i, counter in enumerate(counters):
        counter.count = 10 * i
    stoppers = [EarlyStopping("loss", patience=9), EarlyStopping("val_loss", patience=5)]
    fit(make_model(), [*counters, *stoppers, ModelCheckpoint(path)])
    states = torch.load(path, weights_only=True)["callbacks"]
    assert list(states) == ["Counter", "Counter 2", "Counter 3", "EarlyStopping", "EarlyStopping 2"]

    resumed, others = [Counter(), Counter(), Counter()], [EarlyStopping("loss"), EarlyStopping("val_loss")]
    fit(make_model(), [*resumed, *others], resume=path)
    assert [counter.count for counter in resumed] == [2, 12, 22]
    assert [stopper.best for stopper in others] == [stopper.best for stopper in stoppers]


def test_callbacks_of_one_class_in_another_place_of_the_list_keep_their_order_among_themselves(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first, second = Counter(), Counter()
    second.count = 10
    fit(make_model(), [first, EarlyStopping(patience=9), second, ModelCheckpoint(path)])
    resumed = [Counter(), Counter()]
    fit(make_model(), [EarlyStopping(patience=9), *resumed], resume=path)
    assert [counter.count for counter in resumed] == [2, 12]


def test_a_state_without_its_callback_is_warned_of_and_a_callback_without_state_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    fit(make_model(), [Counter(), EarlyStopping(patience=9), ModelCheckpoint(path)])
    counter = Counter()
    with pytest.warns(UserWarning, match="state of EarlyStopping, which this fit does not have"):
        fit(make_model(), [counter, ReduceLROnPlateau()], epochs=3, resume=path)
    assert counter.count == 3


STOPPERS: dict[str, Callable[[], EarlyStopping]] = {
    "loss": lambda: EarlyStopping("loss", patience=9),
    "val_loss": lambda: EarlyStopping("val_loss", patience=9),
    "highest": lambda: EarlyStopping("val_loss", patience=9, mode="max"),
}


def test_states_go_to_the_callbacks_that_watch_the_same_value_in_the_same_direction(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    stoppers = {name: make() for name, make in STOPPERS.items()}
    fit(make_model(), [*stoppers.values(), ModelCheckpoint(path)], epochs=3)
    resumed = {name: make() for name, make in reversed(STOPPERS.items())}
    fit(make_model(), list(resumed.values()), epochs=3, resume=path)
    for name, stopper in stoppers.items():
        assert (resumed[name].best, resumed[name].wait) == (stopper.best, stopper.wait)


@pytest.mark.parametrize("kind", [EarlyStopping, ReduceLROnPlateau])
def test_a_callback_that_watches_another_value_begins_anew_with_a_warning(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    fit(make_model(), [kind("val_loss"), ModelCheckpoint(path)])
    other = kind("loss")
    with pytest.warns(UserWarning, match=f"state of {kind.__name__}, .*it had monitor='val_loss', mode='min'"):
        fit(make_model(), other, resume=path)
    assert other.best is None


def test_one_more_checkpoint_callback_takes_no_others_best_value(tmp_path: Path) -> None:
    def callbacks(*names: str) -> list[kt.Callback]:
        by_name = {"last": ModelCheckpoint(tmp_path / "last.pt")} | {
            name: ModelCheckpoint(tmp_path / f"{name}.pt", name, save_best_only=True) for name in ("loss", "val_loss")
        }
        return [by_name[name] for name in names]

    fit(make_model(), callbacks("val_loss", "last"))
    (tmp_path / "moved").mkdir()
    more = callbacks("loss", "val_loss", "last")
    fit(make_model(), more, resume=tmp_path / "last.pt")  # nothing is left to train
    assert isinstance(more[0], ModelCheckpoint)
    assert isinstance(more[1], ModelCheckpoint)
    assert more[0].best is None
    assert more[1].best is not None


def test_a_best_file_of_another_value_is_warned_of_and_other_checkpoint_callbacks_are_not(tmp_path: Path) -> None:
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    fit(make_model(), [ModelCheckpoint(best, save_best_only=True), ModelCheckpoint(last)])
    other = ModelCheckpoint(best, "loss", save_best_only=True)
    with pytest.warns(UserWarning, match=r"state of ModelCheckpoint, .*file='best.pt', monitor='val_loss'") as warned:
        fit(make_model(), other, resume=last)
    assert len(warned) == 1
    assert other.best is None


class Stops(kt.Callback):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.stop_training = epoch == 1


def test_a_run_that_a_callback_stopped_says_so_and_trains_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.pt"
    fit(make_model(), [ModelCheckpoint(path), Stops()], epochs=4)
    assert make_and_resume(path, 4) == [0, 1]
    assert "A callback ended this run in epoch 2: no more is trained; epochs above 4 would" in capsys.readouterr().out


def test_a_run_that_a_callback_stopped_goes_on_where_more_epochs_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.pt"
    fit(make_model(), [ModelCheckpoint(path), Stops()], epochs=4)
    assert make_and_resume(path, 6) == [0, 1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("A callback ended this run in epoch 2; now it goes on.") == 1


def make_and_resume(path: Path, epochs: int) -> list[int]:
    model, (x, y) = make_model(), (torch.randn(12, 3), torch.randint(0, 2, (12,)))
    return model.fit(x, y, batch_size=4, epochs=epochs, verbose=2, validation_data=(x, y), resume=path).epoch


class Broken(Counter):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise ZeroDivisionError("of the user's own")


def test_an_error_in_a_users_load_state_dict_comes_out_as_it_is_and_the_net_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    fit(make_model(), [Counter(), ModelCheckpoint(path)])
    model, broken = make_model(), Broken()
    type(broken).__name__ = "Counter"
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        fit(model, broken, resume=path)
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


@pytest.mark.parametrize("resume", [1, 0, b"a.pt"])
def test_a_resume_that_is_neither_flag_nor_path_is_refused(resume: Any) -> None:
    with pytest.raises(TypeError, match="resume must be True, False, None or a checkpoint's path, got"):
        fit(make_model(), resume=resume)


def test_training_weights_go_on_where_the_average_is_left_away(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    model = make_model()
    fit(model, [EMA(0.9, keep_average=False), ModelCheckpoint(path)])
    resumed = make_model()
    with pytest.warns(UserWarning, match="state of EMA"):
        fit(resumed, resume=path)
    for name, value in model.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], value)


class Odd(kt.Callback):
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"held": {"deep": self.state}}


@pytest.mark.parametrize("state", [object(), Path("x"), {1, object()}, range(3), torch.Generator()])
def test_a_state_that_a_checkpoint_can_not_hold_is_refused_by_callback_and_key(state: Any) -> None:
    with pytest.raises(TypeError, match=r"state_dict\(\) of Odd 2\['held'\]\['deep'\]"):
        check_callbacks([Odd(1), Odd(state)])


def test_a_state_that_a_checkpoint_can_not_hold_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    with pytest.raises(TypeError, match="Odd"):
        fit(model, [Odd(object()), ModelCheckpoint(tmp_path / "run.pt")])
    assert all(torch.equal(before[name], value) for name, value in model.net.state_dict().items())
    fit(model, Odd(object()))  # without a checkpoint nobody asks


# ---- nets in wrappers ----


def test_the_bare_module_is_the_one_inside_every_wrapper() -> None:
    net = nn.Linear(3, 2)
    assert bare_module(net) is net
    assert bare_module(nn.DataParallel(net)) is net
    assert bare_module(torch.compile(net)) is net
    assert bare_module(nn.DataParallel(torch.compile(net))) is net
    assert bare_module(torch.compile(nn.DataParallel(net))) is net


class Holder(nn.Module):
    """A net of the user's own with an attribute called module."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_a_net_with_an_attribute_called_module_is_no_wrapper() -> None:
    net = Holder()
    assert bare_module(net) is net


def test_keys_in_the_file_have_no_prefix_and_load_into_any_wrapping(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    net = nn.Linear(3, 2)
    model = kt.Model(nn.DataParallel(net), device="cpu")
    model.compile("cross_entropy", torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    fit(model, ModelCheckpoint(path))
    content = torch.load(path, weights_only=True)
    assert list(content["model_state_dict"]) == ["weight", "bias"]
    assert training_weights(content) is content["model_state_dict"]
    resumed = make_model()
    fit(resumed, resume=path)
    assert torch.equal(resumed.net.weight, net.weight)


# ---- what does not fit ----


MISFITS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a key less": (lambda content: content["model_state_dict"].pop("bias"), "'bias' is missing in the checkpoint"),
    "a key more": (lambda content: content["model_state_dict"].update(extra=torch.ones(1)), "'extra'.*unexpected"),
    "another shape": (
        lambda content: content["model_state_dict"].update(weight=torch.ones(5, 3)),
        r"'weight' has shape \(5, 3\) in the checkpoint, \(2, 3\) in this model",
    ),
    "another optimizer": (lambda content: content["run"].update(optimizer="Adam"), "optimizer is Adam, this run's SGD"),
    "another scheduler": (lambda content: content["run"].update(lr_scheduler="StepLR"), "lr_scheduler is StepLR"),
    "no weights": (lambda content: content.pop("model_state_dict"), "no 'model_state_dict'"),
    "no epoch": (lambda content: content.pop("epoch"), "no 'epoch'"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_with_nothing_touched(misfit: str, tmp_path: Path) -> None:
    change, message = MISFITS[misfit]
    path = written(tmp_path)
    content = torch.load(path, weights_only=True)
    change(content)
    write_checkpoint(path, content)
    model = make_model()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    with pytest.raises((ValueError, CheckpointError), match=message):
        fit(model, resume=path)
    assert all(torch.equal(before[name], value) for name, value in model.net.state_dict().items())
    assert model.optimizer is not None
    assert not model.optimizer.state
    fit(model)
