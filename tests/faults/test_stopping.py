"""Ctrl-C, the stop button, SIGTERM and exceptions, at every place of a run: what is saved, what runs, what is left."""

import contextlib
import functools
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import EMA, BackupAndRestore, CSVLogger, EarlyStopping, ModelCheckpoint
from kerastorch.callbacks.callback import HOOKS
from kerastorch.device import get_random_state
from kerastorch.loops import LOOPS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals to itself and to children")

INT, TERM = signal.SIGINT, signal.SIGTERM
EPOCHS, BATCHES = 3, 6


class Noisy(Dataset):
    """Rows whose transform draws from python's, numpy's and torch's global generators."""

    def __init__(self, rows):
        generator = torch.Generator().manual_seed(rows)
        self.x, self.y = torch.randn(rows, 4, generator=generator), torch.arange(rows) % 3

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + random.random() + float(np.random.rand()) + torch.rand(4), self.y[i]


class Job:
    """A training script: the same seeds, net and loaders whenever it is made."""

    def __init__(self, loop="script", k=1, workers=0, persists=False, steps=None, ema=False, validates=True):
        kt.set_seed(3)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.net, self.model = net, kt.Model(net, device="cpu")
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.9)
        self.model.compile(
            "cross_entropy",
            self.optimizer,
            ["accuracy"],
            lr_scheduler=self.scheduler,
            lr_scheduler_interval="step",
            gradient_accumulation_steps=k,
            loop=loop,
        )
        loader = functools.partial(DataLoader, batch_size=4, num_workers=workers, persistent_workers=persists)
        self.train, self.val = loader(Noisy(22), shuffle=True), loader(Noisy(9))
        self.steps, self.ema, self.validates = steps, ema, validates
        self.history = None

    def fit(self, *callbacks, **arguments):
        arguments = {"epochs": EPOCHS, "verbose": 0, "steps_per_epoch": self.steps, **arguments}
        if self.validates:
            arguments = {"validation_data": self.val, **arguments}
        average = [EMA(0.8)] if self.ema else []
        self.history = self.model.fit(self.train, callbacks=[*average, *callbacks], **arguments)
        return self.history

    def state(self):
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history.history,
            "epochs": self.history.epoch,
            "random": get_random_state(),
        }


def difference(one, other, name="state"):
    """Name the first part in which two states differ, or return None."""
    if isinstance(one, torch.Tensor):
        return None if torch.equal(one, other) else name
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{name}: keys {sorted(one)} and {sorted(other)}"
        return next(filter(None, (difference(one[key], other[key], f"{name}.{key}") for key in one)), None)
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return f"{name}: {len(one)} and {len(other)} items"
        parts = enumerate(zip(one, other, strict=True))
        return next(filter(None, (difference(a, b, f"{name}[{i}]") for i, (a, b) in parts)), None)
    return None if one == other else f"{name}: {one!r} and {other!r}"


def assert_same(one, other):
    where = difference(one, other)
    assert where is None, where  # short, since the states are long


@functools.cache
def uninterrupted(**arguments):
    job = Job(**arguments)
    job.fit()
    return job.state()


class Trace(kt.Callback):
    """Keeps the names of all hooks that were called, close() too."""

    def __init__(self):
        self.calls, self.closed = [], 0
        for name in HOOKS:
            setattr(self, name, functools.partial(self._note, name))

    def _note(self, name, *arguments):
        self.calls.append(name)

    def close(self):
        self.closed += 1
        self.calls.append("close")


class At(kt.Callback):
    """Calls `action` in the nth call, from 0, of a hook."""

    def __init__(self, hook, nth, action):
        self.nth, self.calls, self.action = nth, 0, action
        setattr(self, hook, self._count)

    def _count(self, *arguments):
        self.calls += 1
        if self.calls == self.nth + 1:
            self.action()


def send(signum):
    """Send a real signal to this process, but never one that would kill it."""
    assert signal.getsignal(signum) not in (signal.SIG_DFL, None), "nothing catches this signal"
    os.kill(os.getpid(), signum)


def signal_at(hook, nth, *signums):
    return At(hook, nth, lambda: [send(signum) for signum in signums or (INT,)])


def outcome(call):
    """Return what call() returns or raises, KeyboardInterrupt and SystemExit too, which would end the tests."""
    try:
        return call()
    except BaseException as error:
        return error


def handlers():
    return signal.getsignal(INT), signal.getsignal(TERM)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny nets gain nothing from more, and lose much where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def plain_handlers():
    """Begin as a script does; whatever a test does, no handler of a fit is left."""
    before = handlers()
    signal.signal(INT, signal.default_int_handler)
    signal.signal(TERM, signal.SIG_DFL)
    yield
    left = handlers()
    signal.signal(INT, before[0])
    signal.signal(TERM, before[1])
    assert left == (signal.default_int_handler, signal.SIG_DFL)


# ---- the first signal: where the run ends, and what is called ----


@pytest.mark.parametrize(
    ("loop", "hook"), [(loop, "on_train_batch_end") for loop in LOOPS] + [("script", "on_train_batch_begin")]
)
@pytest.mark.parametrize(
    ("k", "at_batch", "trained"), [(1, 0, 1), (1, 2, 3), (1, 5, 6), (4, 0, 4), (4, 3, 4), (4, 4, 6), (9, 1, 6)]
)
def test_training_goes_on_to_the_next_optimizer_step_and_no_further(hook, k, at_batch, trained, loop):
    job, trace = Job(loop, k), Trace()
    history = outcome(lambda: job.fit(trace, signal_at(hook, BATCHES + at_batch), on_interrupt="return"))
    assert history.epoch == [0]
    assert {len(values) for values in history.history.values()} == {1}
    assert trace.calls.count("on_train_batch_end") == BATCHES + trained
    assert trace.calls[-3:] == ["on_train_batch_end", "on_train_end", "close"]
    assert all(parameter.grad is None for parameter in job.net.parameters())


class Interrupting(nn.Module):
    """Sends itself Ctrl-C in the middle of the nth forward or backward."""

    def __init__(self, nth, backward):
        super().__init__()
        self.layer, self.nth, self.backward = nn.Linear(4, 3), nth, backward

    def forward(self, x):
        self.nth -= 1
        if self.nth == -1 and not self.backward:
            send(INT)
        outputs = self.layer(x)
        if self.nth == -1 and self.backward:
            outputs.register_hook(lambda gradient: send(INT))
        return outputs


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_signal_in_the_midst_of_a_step_lets_the_step_end(backward):
    model = kt.Model(Interrupting(2, backward), device="cpu")
    model.compile("cross_entropy", "sgd", gradient_accumulation_steps=2)
    trace = Trace()
    rows = TensorDataset(torch.randn(32, 4), torch.arange(32) % 3)
    history = outcome(lambda: model.fit(rows, batch_size=4, callbacks=trace, verbose=0, on_interrupt="return"))
    assert history.epoch == []
    assert trace.calls.count("on_train_batch_end") == 4


class InterruptingRows(Noisy):
    def __getitem__(self, i):
        if i == 7:
            send(INT)
        return super().__getitem__(i)


def test_a_signal_while_a_batch_is_loaded_trains_on_it_and_stops():
    job, trace = Job(), Trace()
    job.train = DataLoader(InterruptingRows(22), 4)
    outcome(lambda: job.fit(trace, on_interrupt="return"))
    assert trace.calls.count("on_train_batch_end") == 2


def test_a_signal_while_validation_rows_are_loaded_cuts_the_validation():
    job, trace = Job(), Trace()
    job.val = DataLoader(InterruptingRows(22), 4)
    outcome(lambda: job.fit(trace, on_interrupt="return"))
    assert trace.calls.count("on_test_batch_end") == 2
    assert trace.calls[-2:] == ["on_train_end", "close"]


AFTER_THE_SIGNAL = {  # all that is still called in a run that is interrupted in its second epoch
    ("on_train_begin", 0): [],
    ("on_epoch_begin", 1): ["on_train_batch_begin", "on_batch_begin", "on_train_batch_end", "on_batch_end"],
    ("on_train_batch_begin", 7): ["on_train_batch_end", "on_batch_end"],
    ("on_train_epoch_end", 1): ["on_test_begin", "on_test_batch_begin", "on_test_batch_end"],
    ("on_test_begin", 1): ["on_test_batch_begin", "on_test_batch_end"],
    ("on_test_batch_begin", 4): ["on_test_batch_end"],
    ("on_test_batch_end", 4): [],
    ("on_test_batch_end", 5): [],
    ("on_test_end", 1): ["on_epoch_end"],
    ("on_epoch_end", 1): [],
}


@pytest.mark.parametrize(
    ("place", "loop"),
    [(place, "script") for place in AFTER_THE_SIGNAL]
    + [(place, loop) for loop in ("function", "class") for place in list(AFTER_THE_SIGNAL)[1:6:2]],
    ids=str,
)
def test_what_is_still_called_after_a_signal(place, loop):
    job, trace, length = Job(loop), Trace(), []
    at = signal_at(*place)
    at.action = lambda: (length.append(len(trace.calls)), send(INT))
    history = outcome(lambda: job.fit(trace, at, on_interrupt="return"))
    rest = [name for name in trace.calls[length[0] :] if name not in ("on_batch_begin", "on_batch_end")]
    expected = [name for name in AFTER_THE_SIGNAL[place] if name not in ("on_batch_begin", "on_batch_end")]
    assert rest == [*expected, "on_train_end", "close"]
    rows = trace.calls.count("on_epoch_end")
    assert history.epoch == list(range(rows))
    assert {len(values) for values in history.history.values()} <= {rows}
    assert job.model.history.epoch == history.epoch


def test_a_cut_epoch_has_no_row_in_any_log(tmp_path):
    job = Job()
    log = CSVLogger(tmp_path / "log.csv")
    outcome(lambda: job.fit(log, signal_at("on_test_batch_end", 4), on_interrupt="return"))
    assert [line[:2] for line in (tmp_path / "log.csv").read_text().splitlines()[1:]] == ["0,"]
    assert len(job.model.history.to_pandas()) == 1


def test_an_epochs_scheduler_is_not_stepped_for_a_cut_epoch():
    job = Job()
    job.model.compile(
        "cross_entropy", job.optimizer, lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(job.optimizer, 0.5)
    )
    for place in (("on_train_batch_end", BATCHES + 1), ("on_test_batch_end", 4)):
        before = job.optimizer.param_groups[0]["lr"]
        outcome(functools.partial(job.fit, signal_at(*place), on_interrupt="return"))
        assert job.optimizer.param_groups[0]["lr"] == before / 2


@pytest.mark.parametrize("place", [("on_train_batch_end", 14), ("on_test_batch_end", 7), ("on_epoch_end", 2)])
def test_early_stopping_restores_no_weights_and_ema_gives_no_average(place):
    weights = {}

    def keep():
        weights.update({name: value.clone() for name, value in job.net.state_dict().items()})

    job = Job(ema=True)
    best = EarlyStopping("loss", mode="max", patience=9, restore_best_weights=True)
    # The last hook that trains is on_train_batch_end; after it no weight may change.
    keeper = kt.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: keep())
    outcome(lambda: job.fit(best, keeper, signal_at(*place), on_interrupt="return"))
    assert_same(job.net.state_dict(), weights)


# ---- the last checkpoint ----


def make_checkpointers(folder):
    return {
        "epochs": ModelCheckpoint(folder / "last.pt"),
        "batches": ModelCheckpoint(folder / "last.pt", save_freq=100),
        "async": ModelCheckpoint(folder / "last.pt", save_freq=100, async_save=True),
        "named": ModelCheckpoint(folder / "{epoch}_{val_loss:.2f}.pt"),
        "backup": BackupAndRestore(folder / "backup", save_freq=100),
        "two backups": BackupAndRestore(folder / "backup", double_checkpoint=True),
        "best": ModelCheckpoint(folder / "best.pt", save_best_only=True),
        "some best": ModelCheckpoint(folder / "{epoch}.pt", keep_best=2),
        "weights": ModelCheckpoint(folder / "weights.pt", save_weights_only=True),
    }


@pytest.mark.parametrize("kind", ["epochs", "batches", "async", "named", "backup", "two backups"])
def test_the_last_checkpoint_is_written_before_on_train_end(kind, tmp_path):
    job, writer, found = Job(), make_checkpointers(tmp_path)[kind], []
    look = kt.callbacks.LambdaCallback(on_train_end=lambda logs: found.extend(tmp_path.rglob("*.pt")))
    outcome(lambda: job.fit(writer, look, signal_at("on_train_batch_end", BATCHES + 1), on_interrupt="return"))
    content = torch.load(max(found, key=lambda path: path.stat().st_mtime_ns), weights_only=True)
    assert content["run"]["batches_done"] == 2
    assert content["epoch"] == 0
    assert content["loss"] > 0
    assert_same(content["model_state_dict"], dict(job.net.state_dict()))


@pytest.mark.parametrize("kind", ["best", "some best", "weights"])
def test_callbacks_that_choose_or_keep_weights_alone_write_nothing_more(kind, tmp_path):
    job, writer = Job(), make_checkpointers(tmp_path)[kind]
    files = []
    at = At("on_train_batch_end", BATCHES + 1, lambda: (files.append(sorted(tmp_path.iterdir())), send(INT)))
    stamps = At("on_train_batch_end", BATCHES, lambda: files.append({p: p.stat().st_mtime_ns for p in files_now()}))

    def files_now():
        return sorted(tmp_path.glob("*.pt"))

    outcome(lambda: job.fit(writer, stamps, at, on_interrupt="return"))
    assert files[0] == {path: path.stat().st_mtime_ns for path in files_now()} != {}


def test_an_interrupt_before_the_first_step_writes_no_checkpoint(tmp_path):
    outcome(lambda: Job().fit(ModelCheckpoint(tmp_path / "last.pt"), signal_at("on_train_begin", 0)))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_at_an_epochs_end_writes_that_epoch_once(tmp_path, monkeypatch):
    job, paths = Job(), []
    writer = ModelCheckpoint(tmp_path / "{epoch}.pt")
    monkeypatch.setattr(writer, "_path", lambda *a, f=writer._path, **k: paths.append(f(*a, **k)) or paths[-1])
    outcome(lambda: job.fit(writer, signal_at("on_epoch_end", 1), on_interrupt="return"))
    assert [path.name for path in paths] == ["1.pt", "2.pt"]


def test_backups_stay_after_an_interrupt_and_go_when_the_run_has_ended(tmp_path):
    folder = tmp_path / "backup"
    outcome(lambda: Job().fit(BackupAndRestore(folder), signal_at("on_train_batch_end", 3), on_interrupt="return"))
    assert [path.name for path in folder.iterdir()] == ["backup.pt"]
    Job().fit(BackupAndRestore(folder))
    assert not folder.exists()


# ---- resume after an interrupt equals the uninterrupted run ----

PLACES = [
    ("on_epoch_begin", 1),
    ("on_train_batch_begin", 0),
    ("on_train_batch_end", 7),
    ("on_train_batch_end", 11),
    ("on_train_epoch_end", 1),
    ("on_test_begin", 1),
    ("on_test_batch_begin", 0),
    ("on_test_batch_end", 4),
    ("on_test_batch_end", 8),
    ("on_test_end", 0),
    ("on_epoch_end", 1),
    ("on_epoch_end", 2),
]


def interrupt_and_resume(folder, *places, **arguments):
    """Run a job cut at each of places in turn, each time as a new process would, then to its end."""
    for place in places:
        outcome(functools.partial(Job(**arguments).fit, BackupAndRestore(folder), signal_at(*place)))
        assert any(folder.iterdir())
    job = Job(**arguments)
    kt.set_seed(999)  # nothing may depend on where the new process's generators stand
    job.fit(BackupAndRestore(folder))
    return job


@pytest.mark.parametrize(
    ("loop", "place", "k"),
    [
        *(("script", place, 4) for place in PLACES),
        *((loop, place, 4) for loop in ("function", "class") for place in PLACES[2::5]),  # a step, a validation, an end
        *(pytest.param("script", place, 1, marks=pytest.mark.slow) for place in PLACES),
    ],
    ids=str,
)
def test_resume_equals_the_uninterrupted_run_to_the_bit(loop, place, k, tmp_path):
    job = interrupt_and_resume(tmp_path / "backup", place, loop=loop, k=k)
    assert_same(job.state(), uninterrupted(loop=loop, k=k))


@pytest.mark.parametrize("place", PLACES[1::2], ids=lambda place: f"{place[0]}-{place[1]}")
def test_resume_under_an_average_of_the_weights_equals_the_uninterrupted_run(place, tmp_path):
    job = interrupt_and_resume(tmp_path / "backup", place, ema=True, k=2)
    assert_same(job.state(), uninterrupted(ema=True, k=2))


@pytest.mark.parametrize("place", [("on_train_batch_end", 2), ("on_train_batch_end", 5), ("on_test_batch_end", 3)])
@pytest.mark.parametrize("k", [1, 3])
def test_resume_of_epochs_of_a_set_number_of_steps_equals_the_uninterrupted_run(k, place, tmp_path):
    job = interrupt_and_resume(tmp_path / "backup", place, steps=4, k=k)
    assert_same(job.state(), uninterrupted(steps=4, k=k))


IN_EPOCHS = [("on_train_batch_end", 7), ("on_train_batch_end", 8), ("on_test_batch_end", 4)]


@pytest.mark.parametrize(
    ("k", "persists", "place"),
    [
        (4, False, IN_EPOCHS[0]),
        *(pytest.param(4, False, place, marks=pytest.mark.slow) for place in IN_EPOCHS[1:]),
        *(
            pytest.param(1, persists, place, marks=pytest.mark.slow)
            for persists in (False, True)
            for place in IN_EPOCHS
        ),
    ],
    ids=str,
)
def test_resume_with_two_workers_equals_the_uninterrupted_run(k, persists, place, tmp_path):
    job = interrupt_and_resume(tmp_path / "backup", place, workers=2, k=k, persists=persists)
    assert_same(job.state(), uninterrupted(workers=2, k=k, persists=persists))


def test_a_run_interrupted_at_every_step_and_validation_batch_ends_as_if_it_never_was(tmp_path):
    steps = [("on_train_batch_end", 0)] * (EPOCHS * BATCHES)
    validations = [("on_test_batch_end", 1)] * 2
    job = interrupt_and_resume(tmp_path / "backup", *steps[:6], *validations, *steps[6:])
    assert_same(job.state(), uninterrupted())


@pytest.mark.parametrize("first", [("on_train_batch_end", 1), ("on_train_batch_end", 7), ("on_test_batch_end", 4)])
@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin", "on_train_batch_begin"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_may_be_interrupted_before_it_has_trained(workers, hook, first, tmp_path):
    if (hook, first[0]) == ("on_train_batch_begin", "on_test_batch_end"):
        pytest.skip("the resumed run begins with the validation")
    job = interrupt_and_resume(tmp_path / "backup", first, (hook, 0), workers=workers)
    assert_same(job.state(), uninterrupted(workers=workers))


def test_the_same_model_goes_on_by_resume_in_the_same_process(tmp_path):
    job, writer = Job(k=4), ModelCheckpoint(tmp_path / "last.pt")
    outcome(lambda: job.fit(writer, signal_at("on_train_batch_end", 8), on_interrupt="return"))
    torch.rand(3)
    job.fit(writer, resume=True)
    assert_same(job.state(), uninterrupted(k=4))


def test_validation_begins_anew_and_counts_every_row(tmp_path):
    """The reported val_loss is that of all rows, not of those behind the cut."""
    place = ("on_test_batch_end", 4)
    job = interrupt_and_resume(tmp_path / "backup", place)
    assert job.history.history["val_loss"] == uninterrupted()["history"]["val_loss"]


# ---- training on without resume ----


def train_by_hand(job, sizes):
    """Train epochs cut after so many batches, without validation."""
    for size in sizes:
        job.net.train()
        for i, (x, y) in enumerate(job.train):
            nn.functional.cross_entropy(job.net(x), y).backward()
            job.optimizer.step()
            job.optimizer.zero_grad()
            job.scheduler.step()
            if i + 1 == size:
                break


def test_fit_after_an_interrupted_fit_goes_on_as_a_loop_by_hand_would():
    job, by_hand = Job(validates=False), Job()
    train_by_hand(by_hand, [6, 3, 6])
    expected = [by_hand.net.state_dict(), by_hand.optimizer.state_dict(), by_hand.scheduler.state_dict()]
    expected_random = get_random_state()
    kt.set_seed(3)
    job = Job(validates=False)
    outcome(lambda: job.fit(signal_at("on_train_batch_end", 8), on_interrupt="return"))
    job.fit(epochs=1)
    assert_same([job.net.state_dict(), job.optimizer.state_dict(), job.scheduler.state_dict()], expected)
    assert_same(get_random_state(), expected_random)
    assert job.model.history.epoch == [0, 1]


def test_gradients_of_a_window_that_a_second_signal_broke_are_gone():
    job = Job(k=4, validates=False)
    error = outcome(lambda: job.fit(signal_at("on_train_batch_end", 1, INT, INT)))
    assert isinstance(error, KeyboardInterrupt)
    assert any(parameter.grad is not None for parameter in job.net.parameters())
    twin = Job(k=4, validates=False)
    twin.net.load_state_dict(job.net.state_dict())
    for one in (job, twin):
        kt.set_seed(5)
        one.fit(epochs=1)
    assert_same(job.net.state_dict(), twin.net.state_dict())


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_a_scheduler_by_name_puts_the_rate_back_after_an_interrupt(name):
    job = Job()
    job.model.compile("cross_entropy", job.optimizer, lr_scheduler=name, lr_scheduler_interval="step")
    outcome(lambda: job.fit(signal_at("on_train_batch_end", 8), on_interrupt="return"))
    assert job.optimizer.param_groups[0]["lr"] == 0.05


# ---- the second signal ----


@pytest.mark.parametrize(
    ("signums", "kind"),
    [((INT, INT), KeyboardInterrupt), ((TERM, TERM), SystemExit), ((INT, TERM), SystemExit), ((TERM, INT), None)],
    ids=["INT-INT", "TERM-TERM", "INT-TERM", "TERM-INT"],
)
@pytest.mark.parametrize(
    "place", [("on_train_batch_begin", 7), ("on_test_batch_end", 4), ("on_epoch_end", 1), ("on_train_begin", 0)]
)
def test_a_second_signal_breaks_at_once_saves_nothing_and_closes(place, signums, kind, tmp_path):
    job, trace, writer = Job(), Trace(), ModelCheckpoint(tmp_path / "last.pt")
    before = []
    at = signal_at(*place)
    at.action = lambda: (before.append(files(tmp_path)), [send(signum) for signum in signums])
    error = outcome(lambda: job.fit(at, trace, writer, on_interrupt="return"))
    assert type(error) is (kind or KeyboardInterrupt)
    assert getattr(error, "code", 143) == 143
    assert files(tmp_path) == before[0]
    assert trace.closed == 1
    assert "on_train_end" not in trace.calls
    assert outcome(lambda: job.fit(epochs=1)).epoch == [0]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


def test_a_second_signal_while_the_last_checkpoint_is_written_leaves_the_file_before_whole(tmp_path, monkeypatch):
    from kerastorch import checkpoint

    job, writer = Job(), ModelCheckpoint(tmp_path / "last.pt")
    outcome(lambda: job.fit(writer, epochs=1))
    before = files(tmp_path)
    replace = os.replace

    def interrupted_replace(one, other):
        send(INT)
        replace(one, other)

    monkeypatch.setattr(checkpoint.os, "replace", interrupted_replace)
    error = outcome(lambda: job.fit(writer, signal_at("on_train_batch_end", 2)))
    assert isinstance(error, KeyboardInterrupt)
    monkeypatch.undo()
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]  # neither a temporary file nor a lock


# ---- how fit ends ----


@pytest.mark.parametrize(
    ("on_interrupt", "at_prompt", "kind"),
    [
        ("auto", False, KeyboardInterrupt),
        ("auto", True, kt.History),
        ("return", False, kt.History),
        ("raise", True, KeyboardInterrupt),
    ],
)
def test_ctrl_c_returns_or_raises_as_asked(on_interrupt, at_prompt, kind, monkeypatch):
    monkeypatch.delattr(sys, "ps1", raising=False)
    if at_prompt:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    job, trace = Job(), Trace()
    assert isinstance(
        outcome(lambda: job.fit(trace, signal_at("on_train_batch_end", 7), on_interrupt=on_interrupt)), kind
    )
    assert trace.calls[-2:] == ["on_train_end", "close"]
    assert job.model.history.epoch == [0]


@pytest.mark.parametrize("wrong", ["retrun", None, True])
def test_a_wrong_on_interrupt_is_refused_before_anything_is_touched(wrong):
    job, trace = Job(), Trace()
    before = {name: value.clone() for name, value in job.net.state_dict().items()}
    with pytest.raises(ValueError, match="on_interrupt"):
        job.fit(trace, on_interrupt=wrong)
    assert trace.calls == []
    assert_same(job.net.state_dict(), before)


@pytest.mark.parametrize("kind", ["epochs", "backup", "best", "some best"])
@pytest.mark.parametrize("on_interrupt", ["auto", "return"])
def test_sigterm_exits_with_143_where_a_callback_writes_resume_points(on_interrupt, kind, tmp_path):
    job, trace, writer = Job(), Trace(), make_checkpointers(tmp_path)[kind]
    error = outcome(lambda: job.fit(writer, trace, signal_at("on_train_batch_end", 7, TERM), on_interrupt=on_interrupt))
    assert isinstance(error, SystemExit)
    assert error.code == 143
    assert trace.calls[-3:] == ["on_train_batch_end", "on_train_end", "close"]


@pytest.mark.parametrize("kind", [None, "weights"])
def test_sigterm_is_left_to_the_system_where_none_does(kind, tmp_path):
    seen = []
    callbacks = [make_checkpointers(tmp_path)[kind]] if kind else []
    Job().fit(At("on_train_batch_end", 1, lambda: seen.append(signal.getsignal(TERM))), *callbacks, epochs=1)
    assert seen == [signal.SIG_DFL]


def test_evaluate_and_predict_leave_ctrl_c_to_python():
    job, seen = Job(), []
    look = kt.callbacks.LambdaCallback(
        on_test_begin=lambda logs: seen.append(handlers()), on_predict_begin=lambda logs: seen.append(handlers())
    )
    job.model.evaluate(job.val, callbacks=[look], verbose=0)
    job.model.predict(job.val, callbacks=[look], verbose=0)
    assert seen == [(signal.default_int_handler, signal.SIG_DFL)] * 2


# ---- handlers: every test above ends with plain ones, see the fixture ----


@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda signum, frame: None], ids=["ignored", "a function"])
def test_a_handler_of_the_users_own_is_left_alone(own, tmp_path):
    signal.signal(INT, own)
    signal.signal(TERM, own)
    job, seen = Job(), []
    at = At("on_train_batch_end", 1, lambda: (seen.append(handlers()), send(INT), send(TERM)))
    history = outcome(lambda: job.fit(at, ModelCheckpoint(tmp_path / "last.pt")))
    after = handlers()
    signal.signal(INT, signal.default_int_handler)
    signal.signal(TERM, signal.SIG_DFL)
    assert history.epoch == [0, 1, 2]
    assert [*seen, after] == [(own, own)] * 2


def test_a_callback_that_lends_a_handler_and_gives_it_back_in_close_leaves_none_of_fits():
    class Own(kt.Callback):
        def on_train_begin(self, logs=None):
            self.before = signal.signal(INT, lambda signum, frame: None)

        def close(self):
            signal.signal(INT, self.before)

    outcome(lambda: Job().fit(Own(), epochs=1))
    left = signal.getsignal(INT)
    signal.signal(INT, signal.default_int_handler)  # for the tests after this one
    assert left is signal.default_int_handler


def test_a_handler_that_a_callback_sets_for_good_stays():
    def own(signum, frame):
        pass

    outcome(lambda: Job().fit(At("on_epoch_begin", 0, lambda: signal.signal(INT, own)), epochs=1))
    left = signal.getsignal(INT)
    signal.signal(INT, signal.default_int_handler)
    assert left is own


# ---- threads and fits within fits ----


def test_fit_in_a_thread_trains_as_in_the_main_one_and_touches_no_handler(tmp_path):
    job, seen, results = Job(), [], []
    look = At("on_train_batch_end", 1, lambda: seen.append(handlers()))
    thread = threading.Thread(
        target=lambda: results.append(outcome(lambda: job.fit(look, ModelCheckpoint(tmp_path / "last.pt"))))
    )
    thread.start()
    thread.join()
    assert results[0].epoch == [0, 1, 2]
    assert seen == [(signal.default_int_handler, signal.SIG_DFL)]
    assert_same(job.state(), uninterrupted())


def test_ctrl_c_in_the_main_thread_leaves_a_fit_in_another_alone():
    job, results, begun = Job(), [], threading.Event()

    class Slow(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            begun.set()
            time.sleep(0.005)

    thread = threading.Thread(target=lambda: results.append(outcome(lambda: job.fit(Slow()))))
    with contextlib.suppress(KeyboardInterrupt):
        thread.start()
        begun.wait(60)
        send(INT)
        time.sleep(1)
    thread.join()
    assert results[0].epoch == [0, 1, 2]


@pytest.mark.parametrize("place", [("on_train_batch_end", 1), ("on_epoch_end", 0)])
def test_a_fit_within_a_fit_is_stopped_with_it(place):
    outer, inner, results = Job(validates=False), Job(validates=False), []

    def fit_inner():
        results.append(inner.fit(signal_at(*place), on_interrupt="return"))

    history = outcome(lambda: outer.fit(At("on_train_batch_end", 7, fit_inner), on_interrupt="return"))
    assert history.epoch == [0]
    assert outer.model.history.epoch == [0]
    assert isinstance(results[0], kt.History)


def test_a_second_signal_within_a_fit_within_a_fit_breaks_both():
    outer, inner, trace = Job(), Job(), Trace()
    at = At("on_train_batch_end", 1, lambda: inner.fit(signal_at("on_train_batch_end", 1, INT, INT)))
    error = outcome(lambda: outer.fit(at, trace, on_interrupt="return"))
    assert isinstance(error, KeyboardInterrupt)
    assert trace.closed == 1
    assert outcome(lambda: inner.fit(epochs=1)).epoch == [0]
    assert outcome(lambda: outer.fit(epochs=1)).epoch == [0]


# ---- exceptions ----


class Trouble(Exception):
    pass


class Fatal(BaseException):
    pass


FIT_HOOKS = [name for name in HOOKS if "predict" not in name]
REACHED = [
    *(("fit", name) for name in FIT_HOOKS),
    *(("evaluate", name) for name in HOOKS if "test" in name),
    *(("predict", name) for name in HOOKS if "predict" in name),
]
ERRORS = [Trouble("hook"), SystemExit(7), KeyboardInterrupt("hook"), Fatal("hook")]


def name_of(value):
    return type(value).__name__ if isinstance(value, BaseException) else "-".join(map(str, value))


every_error = pytest.mark.parametrize("error", ERRORS, ids=name_of)


class BadClose(Trace):
    def close(self):
        super().close()
        raise ValueError("close")


def call(job, verb, callbacks):
    if verb == "fit":
        return job.fit(*callbacks, epochs=2)
    return getattr(job.model, verb)(job.val, callbacks=callbacks, verbose=0)


def throw(error):
    raise error


def test_the_three_verbs_reach_every_hook():
    for verb in ("fit", "evaluate", "predict"):
        job, trace = Job(), Trace()
        call(job, verb, [trace])
        batches = {"on_batch_begin", "on_batch_end"} if verb == "fit" else set()  # the base calls them
        assert {*trace.calls} - {"close"} | batches == {name for other, name in REACHED if other == verb}


# An Exception at every place; what is none takes another way out only where something waits for it: these.
IN_HOOKS = [(place, ERRORS[0]) for place in REACHED] + [
    ((verb, hook), error)
    for verb, hook in [
        *(
            ("fit", f"on_{hook}")
            for hook in ("train_begin", "train_batch_end", "test_batch_end", "epoch_end", "train_end")
        ),
        *(("evaluate", "on_test_batch_end"), ("predict", "on_predict_batch_end")),
    ]
    for error in ERRORS[1:]
]


@pytest.mark.parametrize(("place", "error"), IN_HOOKS, ids=name_of)
def test_an_error_in_a_hook_comes_out_as_it_is_and_leaves_the_model_usable(place, error, tmp_path):
    job, (verb, hook) = Job(), place
    job.net[1].eval()  # a user's own choice, to be found again
    flags = [module.training for module in job.net.modules()]
    failing = At(hook, 1 if "batch" in hook else 0, lambda: throw(error))
    callbacks = [BadClose(), failing, Trace(), BadClose()]
    writers = [CSVLogger(tmp_path / "log.csv"), ModelCheckpoint(tmp_path / "last.pt", save_freq=1)]
    random_state = get_random_state()
    error.__traceback__ = error.__context__ = None
    result = outcome(lambda: call(job, verb, [*callbacks, *(writers if verb == "fit" else [])]))
    assert result is error
    assert error.__cause__ is None
    assert [callbacks[i].closed for i in (0, 2, 3)] == [1, 1, 1]
    assert handlers() == (signal.default_int_handler, signal.SIG_DFL)
    assert [module.training for module in job.net.modules()] == flags
    assert not any("run" in vars(callback) for callback in callbacks)
    with pytest.raises(RuntimeError, match="only while fit"):
        job.model.stop_training = True
    if verb != "fit":
        assert_same(get_random_state(), random_state)
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".tmp", ".lock")] == []
    assert job.fit(*writers, epochs=1).epoch == [0]
    assert all(torch.isfinite(parameter).all() for parameter in job.net.parameters())


@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
def test_an_error_in_close_alone_comes_out_after_all_were_closed(verb):
    job, callbacks = Job(), [Trace(), BadClose(), Trace(), BadClose()]
    assert str(outcome(lambda: call(job, verb, callbacks))) == "close"
    assert [callback.closed for callback in callbacks] == [1, 1, 1, 1]
    assert outcome(lambda: job.fit(epochs=1)).epoch == [0]


@every_error
def test_no_on_train_end_and_no_row_after_an_error(error):
    job, trace = Job(), Trace()
    assert outcome(lambda: job.fit(trace, At("on_test_batch_end", 4, lambda: throw(error)))) is error
    assert "on_train_end" not in trace.calls
    assert job.model.history.epoch == [0]


IN_STEP, IN_TEST, AT_END = (("on_train_batch_end", 3), 3), (("on_test_batch_end", 1), 6), (("on_epoch_end", 0), 6)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("place", "batches", "error"),
    [*((*broken, ERRORS[0]) for broken in (IN_STEP, IN_TEST, AT_END)), *((*IN_STEP, error) for error in ERRORS[1:])],
    ids=["step-Trouble", "test-Trouble", "end-Trouble", *(f"step-{name_of(error)}" for error in ERRORS[1:])],
)
def test_no_checkpoint_is_made_of_a_broken_state_and_the_last_good_one_resumes(
    place, batches, error, is_async, tmp_path
):
    path = tmp_path / "last.pt"
    writer = ModelCheckpoint(path, save_freq=1, async_save=is_async)
    assert outcome(lambda: Job().fit(writer, At(*place, lambda: throw(error)))) is error
    assert torch.load(path, weights_only=True)["run"]["batches_seen"] == batches
    job = Job()
    job.fit(ModelCheckpoint(path, save_freq=1), resume=True)
    assert_same(job.state(), uninterrupted())


@every_error
@pytest.mark.parametrize("place", [("on_test_begin", 1), ("on_test_batch_end", 4), ("on_epoch_end", 1)])
def test_an_error_in_validation_leaves_the_training_weights_and_not_the_average(place, error):
    weights = {}
    job = Job(ema=True)
    keep = kt.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: weights.update(
            {name: value.clone() for name, value in job.net.state_dict().items()}
        )
    )
    assert outcome(lambda: job.fit(keep, At(*place, lambda: throw(error)))) is error
    assert_same(dict(job.net.state_dict()), weights)


class FailingRows(Noisy):
    def __getitem__(self, i):
        if i == 6:
            raise Trouble("row 6")
        return super().__getitem__(i)


def break_dataset(job):
    job.train = DataLoader(FailingRows(22), 4)


def break_validation(job):
    job.val = DataLoader(FailingRows(22), 4)


def break_workers(job):
    job.train = DataLoader(FailingRows(22), 4, num_workers=2)


def break_forward(job):
    job.net[0].register_forward_pre_hook(lambda module, x: throw(Trouble("forward")))


def break_backward(job):
    job.net[4].register_full_backward_hook(lambda module, x, y: throw(Trouble("backward")))


def break_optimizer(job):
    job.optimizer.register_step_pre_hook(lambda *arguments: throw(Trouble("step")))


def break_scheduler(job):
    job.scheduler.step = lambda: throw(Trouble("schedule"))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "break_it",
    [
        *(break_dataset, break_validation, break_workers, break_forward, break_backward),
        *(break_optimizer, break_scheduler),
    ],
)
def test_an_error_in_the_users_own_parts_comes_out_and_everything_is_closed(break_it, loop):
    job, callbacks = Job(loop), [BadClose(), Trace(), BadClose()]
    flags = [module.training for module in job.net.modules()]
    break_it(job)
    result = outcome(lambda: job.fit(*callbacks))
    assert isinstance(result, Trouble)
    assert [callback.closed for callback in callbacks] == [1, 1, 1]
    assert [module.training for module in job.net.modules()] == flags
    assert handlers() == (signal.default_int_handler, signal.SIG_DFL)
    result.__traceback__ = None  # it holds the frames, and they the workers
    assert multiprocessing.active_children() == []


def test_an_error_after_an_interrupt_comes_out_instead_of_it():
    job, trace, error = Job(), Trace(), Trouble("late")
    at = At("on_train_end", 0, lambda: throw(error))
    assert outcome(lambda: job.fit(signal_at("on_train_batch_end", 1), at, trace)) is error
    assert trace.closed == 1


def test_a_checkpoint_that_cannot_be_written_at_an_interrupt_is_told_and_everything_is_closed(tmp_path, monkeypatch):
    from kerastorch import checkpoint

    job, trace, writer = Job(), Trace(), ModelCheckpoint(tmp_path / "last.pt")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint.os, "fsync", lambda descriptor: throw(full))
    error = outcome(lambda: job.fit(writer, trace, signal_at("on_train_batch_end", 1)))
    monkeypatch.undo()
    assert isinstance(error, OSError)
    assert "No space left" in str(error)
    assert trace.closed == 1
    assert list(tmp_path.iterdir()) == []
    assert outcome(lambda: job.fit(writer, epochs=1)).epoch == [0]


def test_workers_of_a_fit_with_checkpoints_end_when_their_own_parent_ends_them(tmp_path):
    """Torch ends with terminate(), once, the workers of an iterator that is garbage-collected after an error."""
    job, left = Job(workers=2, validates=False), []

    def end_workers():
        for worker in multiprocessing.active_children():
            worker.terminate()
            worker.join(1)
            if worker.is_alive():
                left.append(worker.pid)
                worker.kill()

    outcome(lambda: job.fit(At("on_train_batch_end", 1, end_workers), ModelCheckpoint(tmp_path / "last.pt")))
    assert left == []


# ---- real processes ----

SERVER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import test_stopping  # torch and all, once
import torch
torch.set_num_threads(1)
test_stopping.Job().fit(epochs=1)  # what the first fit imports need not be imported in each script
if __name__ == "__main__":
    for line in sys.stdin:
        folder = line.strip()
        if not folder:
            sys.exit()
        pid = os.fork()
        if pid == 0:  # falls through to the script, and ends as any script does
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            os.chdir(folder)
            break
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        sys.exit()
    exec(compile(open("script.py").read(), "script.py", "exec"))
"""

SCRIPT = """
import multiprocessing, os, time
import torch
import kerastorch as kt
from kerastorch.callbacks import BackupAndRestore, ModelCheckpoint
from test_stopping import At, Job, Noisy

def tell(text):
    os.write(1, f"{text}\\n".encode())

class Tell(kt.Callback):
    def on_train_end(self, logs=None):
        tell("train end")
    def close(self):
        tell("close")

def wait():
    for worker in multiprocessing.active_children():
        tell(f"worker {worker.pid}")
    tell("ready")
    while True:
        time.sleep(0.005)
        if job.model._run.interrupt is not None and not keeps_waiting:
            return
"""


class Child:
    """A script in a process group of its own, as a terminal or a batch system starts it."""

    running = None  # the one whose end was not waited for yet

    def __init__(self, server, folder, script):
        self.server, self.folder, self.pid = server, folder, None
        Child.running = self
        (folder / "script.py").write_text(SCRIPT + textwrap.dedent(script))
        for name in ("out", "err"):
            (folder / name).write_text("")
        server.stdin.write(f"{folder}\n".encode())
        self.pid = self._read_number()
        self._wait_for("ready")

    @property
    def lines(self):
        return (self.folder / "out").read_text().splitlines()

    @property
    def errors(self):
        return (self.folder / "err").read_text()

    def _wait_for(self, line):
        begun = time.monotonic()
        while line not in self.lines:
            assert time.monotonic() - begun < 30, (self.lines, self.errors)
            time.sleep(0.01)

    def signal_all(self, signum):
        os.killpg(self.pid, signum)

    def end(self):
        """Wait for the end; return the exit status as subprocess has it, and the seconds."""
        begun = time.monotonic()
        status = self._read_number()
        Child.running = None
        return status, time.monotonic() - begun

    def kill(self):
        with contextlib.suppress(ProcessLookupError, TypeError):  # it has ended, or never began
            self.signal_all(signal.SIGKILL)
        self.end()

    def _read_number(self):
        """Return the server's next line; after a minute without one, end the server and fail with what was printed."""
        if not select.select([self.server.stdout], [], [], 60)[0]:
            Child.running = None
            if self.pid is not None:
                self.signal_all(signal.SIGKILL)
            self.server.kill()
            pytest.fail(f"no answer in a minute; printed: {self.lines}, {self.errors}")
        return int(self.server.stdout.readline())

    @property
    def workers_left(self):
        """The workers that are still there a moment after."""
        pids = [int(line.split()[1]) for line in self.lines if line.startswith("worker")]
        assert pids
        begun = time.monotonic()
        while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() - begun < 3:
            time.sleep(0.05)
        return left


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module", autouse=True)
def started_server(tmp_path_factory):
    """A process that imports torch once, while the first tests run, and forks for each script."""
    file = tmp_path_factory.mktemp("server") / "server.py"
    file.write_text(SERVER)
    command = [sys.executable, str(file), str(Path(__file__).parent)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}  # what is read is all that select knows
    with subprocess.Popen(command, **pipes) as process:
        yield process
        with contextlib.suppress(BrokenPipeError):  # it was killed
            process.stdin.write(b"\n")  # the end of the pipe would not do: workers that live still hold it open
        try:
            process.wait(60)
        finally:
            process.kill()


@pytest.fixture
def server(started_server):
    if not Path("/proc/self/stat").exists():
        pytest.skip("reads /proc")
    yield started_server
    if Child.running is not None:  # the test has failed before
        Child.running.kill()


SECONDS = 10  # to save and end; under one on a quiet machine, while torch finds a lost worker after five
LOADERS = {
    "plain": "job = Job(workers=2, k=6)",
    "persistent": "job = Job(workers=2, k=6, persists=True)",
    "a subclass": """
        job = Job(workers=2, k=6)
        class Loader(torch.utils.data.DataLoader):
            pass
        job.train.__class__ = Loader
    """,
    "iterable": """
        class Stream(torch.utils.data.IterableDataset):
            rows = Noisy(22)
            def __iter__(self):
                worker = torch.utils.data.get_worker_info().id
                return (self.rows[i] for i in range(worker, 22, 2))
        job = Job(workers=2, k=6)
        job.train = torch.utils.data.DataLoader(Stream(), 4, num_workers=2)
    """,
}
FIT = """
if job.train.num_workers:  # little is read ahead, so that more must be after the signal
    job.train.prefetch_factor = job.val.prefetch_factor = 1
keeps_waiting = {keeps_waiting}
job.fit(Tell(), At("{hook}", {nth}, wait), {callbacks})
tell("returned")
"""
IN_TRAINING, IN_VALIDATION = ("on_train_batch_end", 6), ("on_test_batch_end", 4)
every_place_in_a_script = pytest.mark.parametrize("place", [IN_TRAINING, IN_VALIDATION], ids=["training", "validation"])


def run_script(server, folder, make_job, place=IN_TRAINING, *, callbacks="", keeps_waiting=False):
    """Start a script that waits in a hook for the signal; k=6 needs five more batches from IN_TRAINING on."""
    rest = FIT.format(callbacks=callbacks, hook=place[0], nth=place[1], keeps_waiting=keeps_waiting)
    return Child(server, folder, textwrap.dedent(make_job) + rest)


def assert_ended_by_ctrl_c(child, status, seconds):
    assert status == -INT, (status, child.errors)  # as a shell wants to see it: python ends itself with the signal
    assert child.errors.count("Traceback") == 1, child.errors
    assert child.errors.strip().endswith("KeyboardInterrupt"), child.errors
    assert "DataLoader" not in child.errors, child.errors
    assert seconds < SECONDS


def assert_ended_by_sigterm(child, status, seconds):
    assert status == 143, child.errors
    assert child.errors == ""
    assert seconds < SECONDS


@every_place_in_a_script
def test_ctrl_c_in_a_script_raises_after_the_last_checkpoint_and_resume_is_exact(place, server, tmp_path):
    child = run_script(server, tmp_path, "job = Job(k=4)", place, callbacks="BackupAndRestore('backup')")
    child.signal_all(INT)
    assert_ended_by_ctrl_c(child, *child.end())
    assert child.lines[-2:] == ["train end", "close"]
    job = Job(k=4)
    job.fit(BackupAndRestore(tmp_path / "backup"))
    assert_same(job.state(), uninterrupted(k=4))


@pytest.mark.slow
@every_place_in_a_script
@pytest.mark.parametrize("loader", ["plain", "persistent"])
def test_sigterm_to_a_whole_group_exits_with_143_within_seconds_and_resume_is_exact(loader, place, server, tmp_path):
    child = run_script(server, tmp_path, LOADERS[loader], place, callbacks="BackupAndRestore('backup')")
    child.signal_all(TERM)
    assert_ended_by_sigterm(child, *child.end())
    assert child.lines[-2:] == ["train end", "close"]
    assert child.workers_left == []
    arguments = {"workers": 2, "k": 6, "persists": loader == "persistent"}
    job = Job(**arguments)
    job.fit(BackupAndRestore(tmp_path / "backup"))
    assert_same(job.state(), uninterrupted(**arguments))


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", ["", "ModelCheckpoint('last.pt')"], ids=["alone", "checkpoint"])
@pytest.mark.parametrize(
    ("loader", "place"),
    [*((loader, IN_TRAINING) for loader in LOADERS), ("plain", IN_VALIDATION)],
    ids=[*LOADERS, "plain, in validation"],
)
def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_they_keep_quiet(loader, callbacks, place, server, tmp_path):
    child = run_script(server, tmp_path, LOADERS[loader], place, callbacks=callbacks)
    child.signal_all(INT)
    assert_ended_by_ctrl_c(child, *child.end())
    assert child.lines[-2:] == ["train end", "close"]
    assert child.workers_left == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loader", "callbacks"),
    [("spawned", "ModelCheckpoint('last.pt')"), ("begun before", ""), ("begun before", "ModelCheckpoint('last.pt')")],
    ids=["spawned, checkpoint", "begun before", "begun before, checkpoint"],
)
def test_ctrl_c_stops_at_the_step_where_workers_have_their_own_handlers(loader, callbacks, server, tmp_path):
    make_job = {
        "spawned": """
            job = Job(workers=2, k=6)
            job.train.multiprocessing_context = "spawn"
        """,
        "begun before": """
            job = Job(workers=2, k=6, persists=True)
            job.train.prefetch_factor = 1
            next(iter(job.train))
        """,
    }[loader]
    child = run_script(server, tmp_path, make_job, callbacks=callbacks)
    child.signal_all(INT)
    status, seconds = child.end()
    assert status == -INT
    errors = child.errors[child.errors.rindex("Traceback") :]  # a worker that still imports prints python's own first
    assert errors.strip().endswith("KeyboardInterrupt"), errors
    assert "DataLoader" not in child.errors, child.errors
    assert seconds < SECONDS
    assert child.workers_left == []


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["a subclass", "iterable"])
def test_sigterm_to_a_whole_group_exits_with_143_whatever_the_loader(loader, server, tmp_path):
    child = run_script(server, tmp_path, LOADERS[loader], callbacks="ModelCheckpoint('last.pt')")
    child.signal_all(TERM)
    assert_ended_by_sigterm(child, *child.end())
    assert child.workers_left == []


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", ["", "ModelCheckpoint('last.pt')"], ids=["alone", "checkpoint"])
def test_two_ctrl_c_end_a_script_with_workers_at_once(callbacks, server, tmp_path):
    child = run_script(server, tmp_path, LOADERS["plain"], callbacks=callbacks, keeps_waiting=True)
    child.signal_all(INT)
    time.sleep(0.1)
    child.signal_all(INT)
    assert_ended_by_ctrl_c(child, *child.end())
    assert child.lines[-1] == "close"
    assert "train end" not in child.lines
    assert child.workers_left == []


def test_sigterm_ends_a_script_without_checkpoints_as_the_system_does(server, tmp_path):
    child = run_script(server, tmp_path, "job = Job()")
    child.signal_all(TERM)
    assert child.end()[0] == -TERM


def test_many_signals_while_the_last_checkpoint_is_written_leave_a_whole_file(server, tmp_path):
    """A batch system's next SIGTERM may come soon after the first; one after fit ends the process by itself."""
    child = run_script(server, tmp_path, "job = Job()", callbacks="ModelCheckpoint('last.pt', save_freq=1)")
    for _ in range(20):
        with contextlib.suppress(ProcessLookupError):
            child.signal_all(TERM)
        time.sleep(0.0005)
    assert child.end()[0] in (143, -TERM), child.errors
    job = Job()
    job.fit(resume=tmp_path / "last.pt")
    assert_same(job.state(), uninterrupted())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the warnings are Jupyter's own
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stop_button_of_a_notebook_returns_the_history_and_the_next_cell_trains_on(workers):
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()

    def run_cell(source, stop_at=None):
        client.execute(textwrap.dedent(source), allow_stdin=False)
        text, stopped = "", False
        while True:
            message = client.get_iopub_msg(timeout=60)
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text += content["text"]
            elif kind in ("execute_result", "display_data"):
                text += content["data"].get("text/plain", "")
            elif kind == "error":
                text += f"{content['ename']}: {content['evalue']}"
            elif kind == "status" and content["execution_state"] == "idle":
                return text
            if stop_at is not None and stop_at in text and not stopped:
                stopped = True
                manager.interrupt_kernel()

    try:
        client.wait_for_ready(timeout=60)
        run_cell(f"""
            import time, torch, kerastorch as kt
            from torch.utils.data import DataLoader, TensorDataset
            rows = TensorDataset(torch.randn(64, 4), torch.arange(64) % 3)
            loader = DataLoader(rows, 4, num_workers={workers})
            model = kt.Model(torch.nn.Linear(4, 3), device="cpu")
            model.compile("cross_entropy", "sgd")
            ends = []
            class Slow(kt.Callback):
                def on_train_batch_end(self, batch, logs=None):
                    if batch == 3:
                        print("READY", flush=True)
                    time.sleep(0.02)
                def on_train_end(self, logs=None):
                    ends.append("train end")
                def close(self):
                    ends.append("close")
        """)
        stopped = run_cell("history = model.fit(loader, epochs=1000, callbacks=[Slow()], verbose=0)", stop_at="READY")
        assert "Error" not in stopped
        assert "KeyboardInterrupt" not in stopped
        assert "Traceback" not in stopped
        shown = run_cell("print(type(history).__name__, len(history.epoch) < 999, ends)")
        assert shown.strip() == "History True ['train end', 'close']"
        again = run_cell("print('AGAIN', model.fit(loader, epochs=2, verbose=0).epoch)")
        assert "AGAIN [0, 1]" in again
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
