"""TensorBoard: what tensorboard's own readers find in the files, after one fit, two, and a resumed one."""

import copy
import io
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn

import kerastorch as kt
from kerastorch.callbacks import LambdaCallback, LearningRateScheduler, ReduceLROnPlateau
from kerastorch.callbacks.tensorboard import TensorBoard

X, Y = torch.arange(8.0).reshape(8, 1) / 8, torch.tensor([0, 1] * 4)
EVERYTHING = {"histogram_freq": 1, "write_graph": True, "write_steps_per_second": True, "update_freq": 2}
is_root = hasattr(os, "geteuid") and os.geteuid() == 0


class DropNet(nn.Module):
    """Dropout, batch norm, a part that stays frozen in eval, and a count of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.calls = 0

    def train(self, mode: bool = True) -> "DropNet":
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.frozen(self.body(x)))


def make_model(net: nn.Module | None = None, metrics: Any = ("accuracy",), **arguments: Any) -> kt.Model:
    torch.manual_seed(0)
    model = kt.Model(net or nn.Linear(1, 2), device="cpu")
    arguments = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)} | arguments
    model.compile("cross_entropy", metrics=list(metrics), **arguments)
    return model


def fit(model: kt.Model, *callbacks: kt.Callback, x: Any = X, epochs: int = 2, **arguments: Any) -> kt.History:
    """Fit 4 batches an epoch."""
    arguments = {"validation_data": (x, Y), "batch_size": 2, "shuffle": False} | arguments
    return model.fit(x, arguments.pop("y", Y), epochs=epochs, callbacks=callbacks, verbose=0, **arguments)


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def steps(folder: Path, tag: str) -> list[int]:
    found = [step for step, _ in points(folder, tag)]
    server = PluginEventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()  # as `tensorboard` itself reads
    assert [event.step for event in server.Tensors(tag)] == found
    return found


def as_written(values: list[float]) -> list[tuple[int, float]]:
    return list(enumerate(np.float32(values).tolist()))  # the files hold float32


@pytest.fixture(autouse=True)
def fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let seconds pass in 20 ms: a writer waits for a second in which no other file was made."""
    begin, clock = time.time(), time.time
    monkeypatch.setattr(time, "time", lambda: begin + 50 * (clock() - begin))


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the writers' threads from being done before anyone looks."""
    write = RecordWriter.write

    def slow(self: RecordWriter, data: bytes) -> None:
        time.sleep(0.01)
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", slow)


# ---- scalars ----


@pytest.mark.parametrize("loop", ["script", "function", "class"])
def test_epoch_values_equal_history(tmp_path: Path, loop: str) -> None:
    history = fit(make_model(loop=loop), TensorBoard(tmp_path), epochs=3).history
    for tag, key in (("epoch_loss", "loss"), ("epoch_accuracy", "accuracy")):
        assert points(tmp_path / "train", tag) == as_written(history[key])
        assert points(tmp_path / "validation", tag) == as_written(history[f"val_{key}"])
    assert read(tmp_path / "train").Tags()["scalars"] == ["epoch_learning_rate", "epoch_loss", "epoch_accuracy"]
    assert read(tmp_path / "validation").Tags()["scalars"] == ["epoch_loss", "epoch_accuracy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "validation"]


def test_without_validation_there_is_no_validation_folder(tmp_path: Path) -> None:
    fit(make_model(), TensorBoard(tmp_path), validation_data=None)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_epochs_that_do_not_validate_write_no_validation_point(tmp_path: Path) -> None:
    history = fit(make_model(), TensorBoard(tmp_path), epochs=5, validation_freq=2).history
    assert steps(tmp_path / "train", "epoch_loss") == [0, 1, 2, 3, 4]
    values = [value for _, value in as_written(history["val_loss"])]
    assert points(tmp_path / "validation", "epoch_loss") == list(zip((1, 3), values, strict=True))


def test_values_that_are_lists_or_words_are_left_out_and_single_tensors_are_written(tmp_path: Path) -> None:
    def add(epoch: int, logs: dict[str, Any]) -> None:
        logs |= {
            "word": "yes",
            "tensor": torch.tensor(2.5),
            "array": np.ones(3),
            "number": np.float32(1.5),
            "nan": np.nan,
        }

    fit(make_model(metrics=["confusion_matrix"]), LambdaCallback(on_epoch_end=add), TensorBoard(tmp_path), epochs=1)
    scalars = {"epoch_learning_rate", "epoch_loss", "epoch_tensor", "epoch_number", "epoch_nan"}
    assert set(read(tmp_path / "train").Tags()["scalars"]) == scalars
    assert points(tmp_path / "train", "epoch_tensor") == [(0, 2.5)]
    assert points(tmp_path / "train", "epoch_number") == [(0, 1.5)]


def test_steps_per_second_are_the_epochs_batches_over_its_seconds(tmp_path: Path) -> None:
    slow = LambdaCallback(on_train_batch_end=lambda batch, logs: time.sleep(0.05))
    fit(make_model(), TensorBoard(tmp_path, write_steps_per_second=True), slow)
    rates = points(tmp_path / "train", "epoch_steps_per_second")
    assert [step for step, _ in rates] == [0, 1]
    assert all(2 < rate <= 20 for _, rate in rates)


@pytest.mark.usefixtures("slow_disk")
def test_points_are_on_disk_when_the_epoch_ends(tmp_path: Path) -> None:
    counts: list[int] = []
    look = LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(steps(tmp_path / "train", "epoch_loss"))))
    fit(make_model(), TensorBoard(tmp_path), look, epochs=3)
    assert counts == [1, 2, 3]


# ---- the learning rate ----


def rates(tmp_path: Path) -> list[float]:
    return [round(value, 6) for _, value in points(tmp_path / "train", "epoch_learning_rate")]


@pytest.mark.parametrize("is_first", [True, False])
def test_learning_rate_is_that_of_the_epoch_wherever_the_schedule_stands(tmp_path: Path, is_first: bool) -> None:
    both = [TensorBoard(tmp_path), LearningRateScheduler(lambda epoch: 0.5**epoch)]
    fit(make_model(), *(both if is_first else reversed(both)), epochs=3)
    assert rates(tmp_path) == [1.0, 0.5, 0.25]


def test_learning_rate_of_a_compiled_scheduler_is_that_of_the_epoch(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD((net := nn.Linear(1, 2)).parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    fit(make_model(net, optimizer=optimizer, lr_scheduler=scheduler), TensorBoard(tmp_path), epochs=3)
    assert rates(tmp_path) == [1.0, 0.5, 0.25]


def test_learning_rate_before_a_plateaus_cut_is_that_of_the_epoch(tmp_path: Path) -> None:
    reduce = ReduceLROnPlateau("loss", factor=0.5, patience=0, mode="max", min_delta=9.0)
    fit(make_model(), reduce, TensorBoard(tmp_path), epochs=3)
    assert rates(tmp_path) == [0.1, 0.1, 0.05]


# ---- batches ----


def test_every_batch_has_its_running_loss_and_metrics(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    look = LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append((logs["loss"], logs["accuracy"])))
    fit(make_model(), look, TensorBoard(tmp_path, update_freq="batch"))
    for tag, values in zip(("batch_loss", "batch_accuracy"), zip(*seen, strict=True), strict=True):
        assert points(tmp_path / "train_batches", tag) == [(s + 1, v) for s, v in as_written(list(values))]
    assert len(seen) == 8


def test_every_third_batch_is_counted_through_the_epochs(tmp_path: Path) -> None:
    fit(make_model(), TensorBoard(tmp_path, update_freq=3), epochs=3)
    assert steps(tmp_path / "train_batches", "batch_loss") == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("arguments", "hooks"),
    [
        ({}, []),
        ({"histogram_freq": 1, "write_steps_per_second": True}, []),
        ({"write_graph": True}, ["begin"]),
        ({"update_freq": 10}, ["end"]),
        (EVERYTHING, ["begin", "end"]),
    ],
)
def test_batch_hooks_are_there_only_where_they_are_needed(arguments: dict[str, Any], hooks: list[str]) -> None:
    callbacks = kt.callbacks.CallbackList([TensorBoard(**arguments)])
    assert callbacks.has_train_batch_begin == ("begin" in hooks)
    assert callbacks.has_train_batch_end == ("end" in hooks)


@pytest.mark.parametrize("update_freq", ["epoch", "batch"])
def test_a_subclass_keeps_its_own_batch_hooks(tmp_path: Path, update_freq: Any) -> None:
    class Own(TensorBoard):
        calls = aliases = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.calls += 1
            super().on_train_batch_end(batch, logs)

        def on_batch_end(self, batch: int, logs: Any = None) -> None:
            self.aliases += 1

    callback = Own(tmp_path, update_freq=update_freq)
    fit(make_model(), callback)
    assert (callback.calls, callback.aliases) == (8, 8)
    assert (tmp_path / "train_batches").exists() == (update_freq == "batch")


# ---- histograms ----


def test_histograms_of_every_parameter_come_every_second_epoch(tmp_path: Path) -> None:
    model = make_model()
    weights: list[list[float]] = []
    keep = LambdaCallback(on_epoch_end=lambda epoch, logs: weights.append(model.net.weight.flatten().tolist()))
    fit(model, TensorBoard(tmp_path, histogram_freq=2), keep, epochs=4)
    events = read(tmp_path / "train")
    assert set(events.Tags()["histograms"]) == {"weight", "bias"}
    histograms = events.Histograms("weight")
    assert [event.step for event in histograms] == [0, 2]
    for event in histograms:
        value = event.histogram_value
        assert (value.num, value.min, value.max) == (2, min(weights[event.step]), max(weights[event.step]))


def test_no_histograms_unless_asked(tmp_path: Path) -> None:
    fit(make_model(), TensorBoard(tmp_path))
    assert read(tmp_path / "train").Tags()["histograms"] == []


def test_parameters_are_grouped_by_their_module(tmp_path: Path) -> None:
    fit(make_model(DropNet()), TensorBoard(tmp_path, histogram_freq=1), epochs=1)
    assert {"body/0/weight", "head/bias"} <= set(read(tmp_path / "train").Tags()["histograms"])


def test_weights_that_are_not_finite_are_left_out_of_histograms(tmp_path: Path) -> None:
    net = nn.Linear(1, 2)
    net.empty = nn.Parameter(torch.zeros(0))
    net.short = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    net.mixed = nn.Parameter(torch.tensor([1.0, torch.nan, torch.inf]))

    def spoil(epoch: int, logs: Any) -> None:
        net.weight.data.fill_(torch.nan)

    fit(make_model(net), LambdaCallback(on_epoch_end=spoil), TensorBoard(tmp_path, histogram_freq=1), epochs=1)
    events = read(tmp_path / "train")
    assert set(events.Tags()["histograms"]) == {"bias", "mixed", "short"}
    assert events.Histograms("mixed")[0].histogram_value.num == 1


# ---- the graph ----


def graph(tmp_path: Path) -> str:
    return str(read(tmp_path / "train").Graph())


def test_graph_has_the_nets_layers(tmp_path: Path) -> None:
    fit(make_model(DropNet()), TensorBoard(tmp_path, write_graph=True))
    assert {"body", "frozen", "head"} <= {part for part in ("body", "frozen", "head") if f"[{part}]" in graph(tmp_path)}
    assert "aten::batch_norm" in graph(tmp_path)


def test_no_graph_unless_asked(tmp_path: Path) -> None:
    fit(make_model(), TensorBoard(tmp_path))
    assert not read(tmp_path / "train").Tags()["graph"]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, b: Tensor, a: Tensor) -> Tensor:
        return self.layer(a - 2 * b)


@pytest.mark.parametrize("x", [(X, X), [X, X], {"a": X, "b": X}], ids=["tuple", "list", "dict"])
def test_graph_of_several_inputs_is_written(tmp_path: Path, x: Any) -> None:
    fit(make_model(TwoInputs()), TensorBoard(tmp_path, write_graph=True), x=x, epochs=1)
    assert "aten::sub" in graph(tmp_path)


def test_graph_is_written_once(tmp_path: Path) -> None:
    class Count(TwoInputs):
        traced = 0

        def forward(self, b: Tensor, a: Tensor) -> Tensor:
            Count.traced += torch.jit.is_tracing()
            return super().forward(b, a)

    callback, model = TensorBoard(tmp_path, write_graph=True), make_model(Count())
    fit(model, callback, x=(X, X))
    traced = Count.traced
    fit(model, callback, x=(X, X))
    assert Count.traced == traced > 0


def test_a_net_that_can_not_be_traced_gives_one_warning_with_the_reason_and_trains_on(tmp_path: Path) -> None:
    class Stubborn(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.jit.is_tracing():
                raise RuntimeError("not today\nnor tomorrow")
            return super().forward(x)

    printed = io.StringIO()
    message = r"Stubborn can't be copied and traced, RuntimeError: not today$"
    with pytest.warns(UserWarning, match=message) as caught, redirect_stdout(printed):
        history = fit(make_model(Stubborn(1, 2)), TensorBoard(tmp_path, write_graph=True))
    assert len(caught) == 1
    assert printed.getvalue() == ""
    assert history.epoch == [0, 1]
    assert steps(tmp_path / "train", "epoch_loss") == [0, 1]


def test_a_net_that_can_not_be_copied_gives_the_warning_too(tmp_path: Path) -> None:
    net = nn.Linear(1, 2)
    net.kept = (net.weight * 1,)
    with pytest.warns(UserWarning, match=r"writes no graph: Linear can't be copied and traced, RuntimeError: Only"):
        fit(make_model(net), TensorBoard(tmp_path, write_graph=True))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"histogram_freq": 1}, {"write_graph": True}, {"write_steps_per_second": True}, {"update_freq": "batch"},
     {"update_freq": 2}, EVERYTHING],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_is_the_same_to_the_bit_as_without_it(
    tmp_path: Path, arguments: dict[str, Any], accumulation: int
) -> None:
    ends = []
    for callbacks in ([], [TensorBoard(tmp_path, **arguments)]):
        kt.set_seed(3)
        model = make_model(DropNet(), gradient_accumulation_steps=accumulation)
        history = fit(model, *callbacks, shuffle=True).history
        net, optimizer = model.net.state_dict(), model.optimizer.state_dict()["state"]
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        ends.append((net, optimizer, history, states, model.net.calls))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_tracing_changes_no_flag_buffer_gradient_input_or_random_state(tmp_path: Path) -> None:
    class Meddler(DropNet):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.BatchNorm1d(1, affine=False)
            self.alias = lambda x: self.plain(x)  # a copy of the net still calls this one's layer

        def forward(self, x: Tensor) -> Tensor:
            random.random()
            np.random.rand()
            torch.rand(1)
            if torch.jit.is_tracing():
                x.add_(1)
            return super().forward(self.alias(x))

    def state(net: Meddler, run: Any) -> list[Any]:
        flags = [module.training for module in net.modules()]
        grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        randoms = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
        return [flags, copy.deepcopy(net.state_dict()), grads, run.x.clone(), randoms, net.calls]

    model = make_model(Meddler())
    states: list[Any] = []
    callback = TensorBoard(tmp_path, write_graph=True)
    note = LambdaCallback(
        on_train_batch_begin=lambda batch, logs: states.append(state(model.net, model._run)) if batch == 0 else None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it can be traced is not asked here
        fit(model, note, callback, copy.copy(note), epochs=1)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


# ---- several fits ----


def test_a_second_fit_goes_on_after_the_first(tmp_path: Path) -> None:
    callback, model = TensorBoard(tmp_path, histogram_freq=1, update_freq=2), make_model()
    first, second = fit(model, callback, epochs=2).history, fit(model, callback, epochs=3).history
    assert points(tmp_path / "train", "epoch_loss") == as_written(first["loss"] + second["loss"])
    assert points(tmp_path / "validation", "epoch_loss") == as_written(first["val_loss"] + second["val_loss"])
    assert steps(tmp_path / "train_batches", "batch_loss") == list(range(2, 21, 2))
    assert [event.step for event in read(tmp_path / "train").Histograms("weight")] == [0, 1, 2, 3, 4]


def test_a_second_fit_with_initial_epoch_has_its_own_numbers(tmp_path: Path) -> None:
    callback, model = TensorBoard(tmp_path), make_model()
    fit(model, callback, epochs=2)
    fit(model, callback, initial_epoch=2, epochs=4)
    assert steps(tmp_path / "train", "epoch_loss") == [0, 1, 2, 3]


def test_files_of_quick_fits_are_read_in_their_order(tmp_path: Path) -> None:
    callback, model = TensorBoard(tmp_path), make_model()
    for _ in range(3):
        fit(model, callback, epochs=1)
    seconds = [path.name.split(".")[3] for path in (tmp_path / "train").iterdir()]
    assert len(set(seconds)) == 3  # within a second names, and so readers, put file 10 before file 9


def test_evaluate_and_predict_write_nothing(tmp_path: Path) -> None:
    callback, model = TensorBoard(tmp_path, **EVERYTHING), make_model()
    model.evaluate(X, Y, callbacks=[callback], verbose=0)
    model.predict(X, callbacks=[callback], verbose=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", [False, True])
def test_writers_are_closed_when_fit_ends_also_by_an_exception(tmp_path: Path, fails: bool) -> None:
    class Trouble(Exception):
        pass

    callback, writers = TensorBoard(tmp_path, update_freq="batch"), []

    def end(epoch: int, logs: Any) -> None:
        writers.extend(callback._writers.values())
        if fails:
            raise Trouble

    try:
        fit(make_model(), callback, LambdaCallback(on_epoch_end=end), epochs=1)
    except Trouble:
        assert fails
    assert len(writers) == 3
    assert [writer.file_writer for writer in writers] == [None] * 3
    assert callback._writers == {}


# ---- resume ----


class Killed(Exception):
    pass


def batches_of_each_epoch(*counts: int) -> Any:
    """Data whose passes have these numbers of batches."""

    left = list(counts)

    class Data:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter([(X[:2], Y[:2])] * left.pop(0))

    return Data()


def take_state_at(callback: TensorBoard, states: list[Any], epoch: int, batch: int | None = None) -> LambdaCallback:
    """Take callback's state, as a checkpoint does, when this batch or epoch ends."""

    def at_batch(b: int, logs: Any) -> None:
        if (callback.run.epoch, b) == (epoch, batch):
            states.append(callback.state_dict())

    def at_epoch(e: int, logs: Any) -> None:
        if e == epoch and batch is None:
            states.append(callback.state_dict())

    return LambdaCallback(on_train_batch_end=at_batch, on_epoch_end=at_epoch)


def kill_at(epoch: int) -> LambdaCallback:
    def kill(e: int, logs: Any) -> None:
        if e == epoch:
            raise Killed

    return LambdaCallback(on_epoch_end=kill)


@pytest.mark.parametrize(
    "moment", ["epoch end, before", "epoch end, after", "epoch begin, before", "epoch begin, after"]
)
def test_a_run_resumed_between_epochs_doubles_and_loses_no_point(tmp_path: Path, moment: str) -> None:
    killed, states = TensorBoard(tmp_path, histogram_freq=1, update_freq="batch"), []
    take = take_state_at(killed, states, epoch=1)
    if "next" in moment:
        take = LambdaCallback(
            on_epoch_begin=lambda epoch, logs: states.append(killed.state_dict()) if epoch > 1 else None
        )
    callbacks = [take, killed] if "before" in moment else [killed, take]
    with pytest.raises(Killed):
        fit(make_model(), *callbacks, kill_at(3), epochs=9)
    before = points(tmp_path / "train", "epoch_loss")
    assert len(before) == 4

    resumed = TensorBoard(tmp_path, histogram_freq=1, update_freq="batch")
    load = LambdaCallback(on_train_begin=lambda logs: resumed.load_state_dict(states[0]))
    history = fit(make_model(), resumed, load, initial_epoch=2, epochs=5).history
    assert points(tmp_path / "train", "epoch_loss")[:2] == before[:2]
    assert points(tmp_path / "train", "epoch_loss")[2:] == [(s + 2, v) for s, v in as_written(history["loss"])]
    assert steps(tmp_path / "validation", "epoch_loss") == [0, 1, 2, 3, 4]
    assert steps(tmp_path / "train", "epoch_learning_rate") == [0, 1, 2, 3, 4]
    assert [event.step for event in read(tmp_path / "train").Histograms("bias")] == [0, 1, 2, 3, 4]
    assert steps(tmp_path / "train_batches", "batch_loss") == list(range(1, 21))


@pytest.mark.parametrize(
    ("checkpoint_is_first", "update_freq", "epochs_before"),
    [(False, 1, 0), (False, 3, 1), (True, 3, 0), (True, 1, 1)],  # all pairs
)
def test_a_run_resumed_inside_an_epoch_doubles_and_loses_no_point(
    tmp_path: Path, checkpoint_is_first: bool, update_freq: int, epochs_before: int
) -> None:
    killed, states = TensorBoard(tmp_path, update_freq=update_freq, write_graph=True), []
    if epochs_before:  # an earlier fit of the same object
        fit(make_model(), killed, epochs=epochs_before)
    take = take_state_at(killed, states, epoch=1, batch=1)
    callbacks = [take, killed] if checkpoint_is_first else [killed, take]
    with pytest.raises(Killed):
        fit(make_model(), *callbacks, kill_at(2), epochs=9)

    resumed = TensorBoard(tmp_path, update_freq=update_freq, write_graph=True)

    def load_again(epoch: int, logs: Any) -> None:
        if epoch == 1:
            resumed.load_state_dict(states[0])
            resumed.run.batch = 1  # the epoch goes on with batch 2

    load = LambdaCallback(on_train_begin=lambda logs: resumed.load_state_dict(states[0]), on_epoch_begin=load_again)
    data = batches_of_each_epoch(2, 4, 4)
    fit(make_model(), resumed, load, x=data, y=None, batch_size=None, validation_data=(X, Y), initial_epoch=1, epochs=4)
    end = 4 + epochs_before
    for folder in ("train", "validation"):
        assert steps(tmp_path / folder, "epoch_loss") == list(range(end))
    expected = range(update_freq, 4 * end + 1, update_freq)
    assert steps(tmp_path / "train_batches", "batch_loss") == list(expected)
    files = (tmp_path / "train").iterdir()
    events = [event for file in files for event in LegacyEventFileLoader(str(file)).Load()]
    assert sum(event.HasField("graph_def") for event in events) == 1


def test_points_after_the_checkpoint_are_hidden_before_the_resumed_run_reaches_them(tmp_path: Path) -> None:
    killed, states = TensorBoard(tmp_path, update_freq="batch"), []
    fit(make_model(), killed, take_state_at(killed, states, epoch=0), epochs=5)
    resumed = TensorBoard(tmp_path, update_freq="batch")
    load = LambdaCallback(on_train_begin=lambda logs: resumed.load_state_dict(states[0]))
    fit(make_model(), resumed, load, initial_epoch=1, epochs=2)
    for folder in ("train", "validation"):
        assert steps(tmp_path / folder, "epoch_loss") == [0, 1]
    assert steps(tmp_path / "train_batches", "batch_loss") == list(range(1, 9))


def test_a_fit_after_a_resumed_one_hides_nothing_and_goes_on(tmp_path: Path) -> None:
    killed, states = TensorBoard(tmp_path, update_freq="batch"), []
    fit(make_model(), killed, take_state_at(killed, states, epoch=0), epochs=2)
    resumed = TensorBoard(tmp_path, update_freq="batch")
    load = LambdaCallback(on_train_begin=lambda logs: resumed.load_state_dict(states[0]))
    fit(make_model(), resumed, load, initial_epoch=1, epochs=3)
    fit(make_model(), resumed, epochs=2)
    assert steps(tmp_path / "train", "epoch_loss") == [0, 1, 2, 3, 4]
    assert steps(tmp_path / "train_batches", "batch_loss") == list(range(1, 21))


@pytest.mark.usefixtures("slow_disk")
def test_state_is_saved_with_weights_only_and_what_came_before_is_on_disk(tmp_path: Path) -> None:
    callback, found = TensorBoard(tmp_path / "logs", update_freq="batch"), []

    def save(batch: int, logs: Any) -> None:
        if batch == 2:
            state = callback.state_dict()
            found.append(steps(tmp_path / "logs" / "train_batches", "batch_loss"))
            torch.save(state, tmp_path / "state.pt")
            found.append(torch.load(tmp_path / "state.pt", weights_only=True) == state)

    fit(make_model(), callback, LambdaCallback(on_train_batch_end=save), epochs=1)
    assert found == [[1, 2, 3], True]


def test_the_same_object_resumes(tmp_path: Path) -> None:
    callback, states, model = TensorBoard(tmp_path, update_freq="batch"), [], make_model()
    with pytest.raises(Killed):
        fit(model, callback, take_state_at(callback, states, epoch=1), kill_at(3), epochs=9)
    load = LambdaCallback(on_train_begin=lambda logs: callback.load_state_dict(states[0]))
    fit(model, callback, load, initial_epoch=2, epochs=4)
    for folder in ("train", "validation"):
        assert steps(tmp_path / folder, "epoch_loss") == [0, 1, 2, 3]
    assert steps(tmp_path / "train_batches", "batch_loss") == list(range(1, 17))


def test_evaluate_inside_a_resumed_fit_hides_nothing(tmp_path: Path) -> None:
    killed, states, model = TensorBoard(tmp_path), [], make_model()
    fit(model, killed, take_state_at(killed, states, epoch=0), epochs=3)
    resumed = TensorBoard(tmp_path)

    def evaluate(epoch: int, logs: Any) -> None:
        model.evaluate(X, Y, callbacks=[resumed], verbose=0)

    load = LambdaCallback(on_train_begin=lambda logs: resumed.load_state_dict(states[0]), on_epoch_end=evaluate)
    fit(model, resumed, load, initial_epoch=1, epochs=4)
    assert steps(tmp_path / "train", "epoch_loss") == [0, 1, 2, 3]


def test_state_can_be_taken_and_loaded_before_any_fit(tmp_path: Path) -> None:
    callback = TensorBoard(tmp_path)
    callback.load_state_dict(TensorBoard(tmp_path).state_dict())
    fit(make_model(), callback)
    assert steps(tmp_path / "train", "epoch_loss") == [0, 1]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"update_freq": "step"}, ValueError, r"update_freq='step' is not known\. Use one of: 'epoch', 'batch'"),
        ({"update_freq": 0}, ValueError, "update_freq must be at least 1, got 0"),
        ({"update_freq": 1.5}, TypeError, "update_freq must be an int, got 1.5"),
        ({"histogram_freq": -1}, ValueError, "histogram_freq must be at least 0, got -1"),
        ({"histogram_freq": True}, TypeError, "histogram_freq must be an int, got True"),
        ({"write_graph": "no"}, ValueError, "write_graph='no' is not known"),
        ({"write_steps_per_second": None}, ValueError, "write_steps_per_second=None is not known"),
        ({"log_dir": 3}, TypeError, "int"),
    ],
)
def test_wrong_arguments_are_refused_when_made(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TensorBoard(**arguments)


def refused(path: Path, error: type[Exception], message: str) -> None:
    model = make_model()
    before = model.net.weight.tolist()
    with pytest.raises(error, match=message):
        fit(model, TensorBoard(path))
    assert model.net.weight.tolist() == before


def test_a_log_dir_that_is_a_file_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", NotADirectoryError, r"file' is a file; give a folder")
    refused(tmp_path / "file" / "logs", OSError, r"file/logs")


@pytest.mark.skipif(is_root, reason="root writes anywhere")
def test_a_log_dir_without_write_permission_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(tmp_path / "closed", PermissionError, r"can't write into its log_dir .*closed'")
    refused(tmp_path / "closed" / "logs", PermissionError, r"closed/logs")


def test_a_log_dir_that_the_system_calls_unwritable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(tmp_path, PermissionError, r"can't write into its log_dir")


def test_missing_tensorboard_names_the_extra_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(tmp_path / "logs", ImportError, r'pip install "kerastorch\[tensorboard\]"')
    assert not (tmp_path / "logs").exists()


def test_missing_folders_are_made(tmp_path: Path) -> None:
    fit(make_model(), TensorBoard(str(tmp_path / "a" / "b")))
    assert steps(tmp_path / "a" / "b" / "train", "epoch_loss") == [0, 1]


def test_what_follows_histogram_freq_is_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        TensorBoard("logs", 0, True)
