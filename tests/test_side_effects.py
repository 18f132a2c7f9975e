"""What fit adds to a loop by hand changes neither weights nor random streams, to the bit; and NaN stays in sight.

Sister: test_loops.py, which compares the plain loops.
"""

import math
import random
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import kerastorch as kt
from kerastorch.callbacks import (
    EMA,
    SWA,
    BackupAndRestore,
    CSVLogger,
    EarlyStopping,
    ModelCheckpoint,
    TensorBoard,
    TerminateOnNaN,
)
from kerastorch.device import get_random_state
from kerastorch.loops import LOOPS

EPOCHS, BATCHES = 3, 6


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny nets gain nothing from more, and lose much where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_workers_left():
    """End persistent workers here: torch waits 5 s for each one that the garbage collector finds."""
    yield
    while Setup.made:
        setup = Setup.made.pop()
        setup.train._iterator = setup.val._iterator = None


class Noisy(Dataset):
    """Rows whose transform draws from python's, numpy's and torch's global generators."""

    def __init__(self, rows):
        generator = torch.Generator().manual_seed(rows)
        self.x, self.y = torch.randn(rows, 4, generator=generator), torch.arange(rows) % 3

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + random.random() + float(np.random.rand()) + torch.rand(4), self.y[i]


LOADERS = {
    "plain": {},
    "own generator": {"generator": True},
    "workers": {"num_workers": 2},
    "workers, own generator": {"num_workers": 2, "generator": True},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}
WITH_WORKERS = [name for name in LOADERS if "num_workers" in LOADERS[name]]
every_loader = pytest.mark.parametrize("kind", LOADERS)


class Setup:
    """The same net, optimizer and loaders, and the same seeds, whenever it is made."""

    made: ClassVar[list["Setup"]] = []

    def __init__(self, kind="plain", loop="script"):
        self.made.append(self)
        kt.set_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        arguments = dict(LOADERS[kind])
        self.generators = []
        for name, rows in (("train", 22), ("val", 9)):
            if "generator" in LOADERS[kind]:
                self.generators.append(torch.Generator().manual_seed(rows))
                arguments["generator"] = self.generators[-1]
            setattr(self, name, DataLoader(Noisy(rows), 4, shuffle=name == "train", **arguments))
        self.loop = loop

    def train_by_hand(self):
        for _ in range(EPOCHS):
            self.net.train()
            for x, y in self.train:
                nn.functional.cross_entropy(self.net(x), y).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.net.eval()
            with torch.no_grad():
                for x, _ in self.val:
                    self.net(x)
        return self.state()

    def fit(self, *callbacks, **arguments):
        model = kt.Model(self.net, device="cpu")
        model.compile("cross_entropy", self.optimizer, ["accuracy"], loop=self.loop)
        model.fit(
            self.train, epochs=EPOCHS, validation_data=self.val, callbacks=callbacks, **{"verbose": 0, **arguments}
        )
        return self.state()

    def state(self):
        return {
            "net": dict(self.net.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "random": get_random_state(*self.generators),
        }


def difference(one, other, name="state"):
    """Name the first part in which two states differ, or return None."""
    if isinstance(one, torch.Tensor):
        return None if torch.equal(one, other) else name
    if isinstance(one, dict):
        return next(filter(None, (difference(one[key], other[key], f"{name}.{key}") for key in one)), None)
    if isinstance(one, (list, tuple)):
        parts = enumerate(zip(one, other, strict=True))
        return next(filter(None, (difference(a, b, f"{name}[{i}]") for i, (a, b) in parts)), None)
    return None if one == other else name


def assert_same(one, other):
    where = difference(one, other)
    assert where is None, where  # short, since the states are long


_by_hand = {}


def by_hand(kind):
    if kind not in _by_hand:
        _by_hand[kind] = Setup(kind).train_by_hand()
    return _by_hand[kind]


class Draws(kt.Callback):
    """Calls a verb of the model, on data of any kind, in the midst of training."""

    def __init__(self, verb, data, hooks=("on_train_begin", "on_train_batch_end", "on_test_batch_end", "on_epoch_end")):
        self.verb, self.data, self.calls = verb, data, 0
        for hook in hooks:
            setattr(self, hook, self._call)

    def _call(self, *arguments):
        self.calls += 1
        if self.calls % 3 == 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a report of check() may have something to say
                result = getattr(self.model, self.verb)(*self.data, **({} if self.verb == "check" else {"verbose": 0}))
            assert result is not None


X, Y = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3
CALLBACKS = {
    "none": lambda setup, folder: [],
    "checkpoints": lambda setup, folder: [ModelCheckpoint(folder / "{epoch}_{batch}.pt", save_freq=1, keep_last=2)],
    "async checkpoints": lambda setup, folder: [ModelCheckpoint(folder / "a.pt", save_freq=2, async_save=True)],
    "best": lambda setup, folder: [ModelCheckpoint(folder / "best.pt", save_best_only=True)],
    "backup": lambda setup, folder: [BackupAndRestore(folder / "backup", save_freq=2)],
    "csv": lambda setup, folder: [CSVLogger(folder / "log.csv")],
    "tensorboard": lambda setup, folder: [
        TensorBoard(folder / "logs", histogram_freq=1, write_graph=True, update_freq="batch")
    ],
    "ema": lambda setup, folder: [EMA(0.9, keep_average=False)],
    "swa": lambda setup, folder: [SWA(1, keep_average=False)],
    "nan": lambda setup, folder: [TerminateOnNaN()],
    "early stopping": lambda setup, folder: [EarlyStopping(patience=9)],
    "evaluate arrays": lambda setup, folder: [Draws("evaluate", (X, Y))],
    "predict arrays": lambda setup, folder: [Draws("predict", (X,))],
    "evaluate the validation loader": lambda setup, folder: [Draws("evaluate", (setup.val,))],
    "evaluate the training loader": lambda setup, folder: [Draws("evaluate", (setup.train,))],
    "predict the training loader": lambda setup, folder: [Draws("predict", (setup.train,))],
    "check": lambda setup, folder: [Draws("check", (X, Y), ["on_train_begin", "on_epoch_end"])],
}
COSTLY = ("check", "tensorboard")


def everything(setup, folder):
    names = [name for name in CALLBACKS if name not in ("swa", "check")]  # beside EMA no SWA; check takes long
    return [callback for name in names for callback in CALLBACKS[name](setup, folder)]


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("kind", [name for name in LOADERS if name not in WITH_WORKERS])
def test_what_is_added_changes_neither_weights_nor_random_streams(kind, name, tmp_path):
    setup = Setup(kind)
    assert_same(setup.fit(*CALLBACKS[name](setup, tmp_path)), by_hand(kind))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("workers", "checkpoints"),
        *(
            pytest.param("workers", name, marks=pytest.mark.slow)
            for name in CALLBACKS
            if name not in ("checkpoints", *COSTLY)
        ),
        *(  # the kind of workers matters to those alone that read a loader, or keep its position
            pytest.param(kind, name, marks=pytest.mark.slow)
            for kind in WITH_WORKERS[1:]
            for name in CALLBACKS
            if name in ("none", "checkpoints", "swa") or "loader" in name
        ),
    ],
)
def test_what_is_added_changes_nothing_where_workers_draw(kind, name, tmp_path):
    setup = Setup(kind)
    assert_same(setup.fit(*CALLBACKS[name](setup, tmp_path)), by_hand(kind))


@pytest.mark.parametrize(
    "loop", ["script", *(pytest.param(loop, marks=pytest.mark.slow) for loop in LOOPS if loop != "script")]
)
def test_all_of_it_together_changes_nothing(loop, tmp_path):
    setup = Setup("own generator", loop)
    assert_same(setup.fit(*everything(setup, tmp_path), verbose=2), by_hand("own generator"))


@pytest.mark.parametrize(  # a checkpointing callback reads a loader through a copy, whose workers are its fit's
    ("kind", "saves"),
    [
        ("plain", False),
        ("plain", True),
        ("own generator", False),
        ("own generator", True),
        pytest.param("persistent", False, marks=pytest.mark.slow),
    ],
)
def test_two_fits_are_one_loop_by_hand_twice_as_long(kind, saves, tmp_path):
    setup = Setup(kind)
    setup.train_by_hand()
    expected = setup.train_by_hand()
    setup = Setup(kind)
    callbacks = [ModelCheckpoint(tmp_path / "last.pt")] if saves else []
    setup.fit(*callbacks)
    assert_same(setup.fit(*callbacks), expected)


def test_the_look_at_the_first_batch_draws_nothing():
    """An array's and a list's batches are iterated without a draw, so neither may fit draw."""
    model = kt.Model(nn.Linear(4, 3), device="cpu")
    model.compile("cross_entropy", "sgd", ["accuracy"])
    before = get_random_state()
    model.fit([(X[:5], Y[:5]), (X[5:], Y[5:])], epochs=2, validation_data=[(X, Y)], verbose=0)
    assert_same(get_random_state(), before)


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
@every_loader
def test_evaluate_and_predict_alone_leave_every_stream(kind, verb):
    setup = Setup(kind)
    model = kt.Model(setup.net, device="cpu")
    model.compile("cross_entropy", setup.optimizer)
    before = setup.state()
    before["net"] = {name: value.clone() for name, value in before["net"].items()}
    getattr(model, verb)(setup.train, verbose=0)
    assert_same(setup.state(), before)


# ---- NaN ----

_X = torch.randn(24, 4, generator=torch.Generator().manual_seed(5))
ROWS = DataLoader(list(zip(_X, torch.arange(24) % 3, strict=True)), 4)


class Poison(kt.Callback):
    """Makes the net's weights NaN after the nth training batch, as a step with a bad gradient does."""

    def __init__(self, nth):
        self.left = nth

    def on_train_batch_end(self, batch, logs=None):
        if self.left == 0:
            with torch.no_grad():
                self.model.net.weight[0, 0] = math.nan
        self.left -= 1


def fit_poisoned(nth, *callbacks, validates=True, **arguments):
    torch.manual_seed(1)
    model = kt.Model(nn.Linear(4, 3), device="cpu")
    model.compile("cross_entropy", torch.optim.SGD(model.net.parameters(), lr=0.05))
    validation = {"validation_data": ROWS} if validates else {}
    # Poison first: checkpoints of a step are written after all hooks, whatever the order.
    history = model.fit(ROWS, epochs=EPOCHS, callbacks=[Poison(nth), *callbacks], verbose=0, **validation, **arguments)
    return model, history.history


def is_finite(weights):
    return all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loss_of_nan_goes_on_by_default_and_shows(loop):
    _, history = fit_poisoned(BATCHES + 1)
    assert [math.isnan(loss) for loss in history["loss"]] == [False, True, True]
    assert [math.isnan(loss) for loss in history["val_loss"]] == [False, True, True]


def test_one_nan_batch_among_many_makes_the_epochs_loss_nan():
    rows = [(X[:5], Y[:5]), (X[5:], Y[5:])]

    def loss_fn(outputs, y):
        return nn.functional.cross_entropy(outputs, y) * (math.nan if len(y) == 5 and y[0] == 0 else 1.0)

    model = kt.Model(nn.Linear(4, 3), device="cpu")
    model.compile(loss_fn, "sgd")
    assert math.isnan(model.evaluate(rows, verbose=0)["loss"])
    assert math.isnan(model.fit(rows, verbose=0).history["loss"][0])


@pytest.mark.parametrize("monitor", ["loss", "val_loss"])
@pytest.mark.parametrize("after", [0, BATCHES + 1, 2 * BATCHES - 1, 2 * BATCHES])
@pytest.mark.parametrize(
    "options", [{"save_best_only": True}, {"keep_best": 3}], ids=lambda options: next(iter(options))
)
def test_no_best_file_ever_holds_nan(options, after, monitor, tmp_path):
    fit_poisoned(after, ModelCheckpoint(tmp_path / "{epoch}.pt", monitor, **options))
    files = sorted(tmp_path.glob("*.pt"))
    for path in files:
        content = torch.load(path, weights_only=True)
        assert is_finite(content["model_state_dict"]), path.name
        assert not math.isnan(content["loss"])
    assert bool(files) == (after >= BATCHES)


@pytest.mark.parametrize("monitor", ["loss", "val_loss"])
@pytest.mark.parametrize("after", [BATCHES + 1, 2 * BATCHES - 1, 2 * BATCHES])
def test_the_best_weights_that_come_back_are_never_nan(after, monitor):
    stop = EarlyStopping(monitor, patience=9, restore_best_weights=True)
    model, _ = fit_poisoned(after, stop)
    assert is_finite(model.net.state_dict())
    assert not math.isnan(stop.best)


def test_early_stopping_counts_epochs_of_nan_as_without_gain():
    stop = EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    _, history = fit_poisoned(BATCHES + 1, stop)
    assert len(history["loss"]) == 2


def test_nan_from_the_first_batch_on_leaves_no_best_file_and_no_best_weights(tmp_path):
    stop = EarlyStopping("loss", patience=9, restore_best_weights=True)
    _, history = fit_poisoned(0, stop, ModelCheckpoint(tmp_path / "best.pt", "loss", save_best_only=True))
    assert list(tmp_path.iterdir()) == []
    assert stop.best is None
    assert all(math.isnan(loss) for loss in history["loss"])
