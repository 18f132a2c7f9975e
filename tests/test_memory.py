"""gradient_accumulation_steps="auto": a batch that is too large is repeated in parts, and nothing else changes."""

import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import kerastorch as kt
from kerastorch.callbacks import Callback
from kerastorch.device import get_random_state
from kerastorch.loops import LOOPS, GraphLoop

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 3


class Small(nn.Module):
    """A net on a device whose memory is too small for more than `rows` rows in training."""

    def __init__(self, rows):
        super().__init__()
        self.layer, self.rows, self.seen = nn.Linear(6, 3), rows, []

    def forward(self, x):
        if self.training:
            self.seen.append(len(x))
            if len(x) > self.rows:
                held = self.layer(x)
                raise torch.OutOfMemoryError(f"no memory for {held.shape}")
        return self.layer(x)


class Noisy(Dataset):
    """Rows with a random draw each, so that a batch that was drawn anew would be another."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + torch.rand(6), Y[i]


class Calls(Callback):
    def __init__(self):
        self.calls = []

    def on_train_begin(self, logs=None):
        self.calls.append("train")

    def on_epoch_begin(self, epoch, logs=None):
        self.calls.append(f"epoch {epoch}")

    def on_train_batch_begin(self, batch, logs=None):
        self.calls.append(f"begin {batch}")

    def on_train_batch_end(self, batch, logs=None):
        self.calls.append(f"end {batch} of {self.run.batches_seen}, step {self.run.step}")


def train(rows, loop="script", *, verbose=0, data=None, **options):
    torch.manual_seed(3)
    model = kt.Model(Small(rows), device="cpu")
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1, momentum=0.9)
    arguments = {"gradient_accumulation_steps": "auto", "clip_grad_norm": 0.5, "weighted_metrics": ["accuracy"]}
    model.compile("cross_entropy", optimizer, ["accuracy"], loop=loop, **{**arguments, **options})
    calls = Calls()
    history = model.fit(
        DataLoader(Noisy(), 16, shuffle=True) if data is None else data,
        epochs=3,
        validation_data=(X, Y),
        class_weight={0: 2.0},
        callbacks=[calls],
        verbose=verbose,
    )
    return model, history, calls.calls, get_random_state()["torch"]


@functools.cache
def train_whole(loop):
    return train(100, loop)


@pytest.mark.parametrize(
    ("loop", "rows"), [*((loop, rows) for loop in LOOPS for rows in (15, 5)), ("script", 8), ("script", 1)]
)
def test_a_batch_that_is_too_large_is_repeated_in_parts_and_the_result_is_the_same(loop, rows):
    one, other = train_whole(loop), train(rows, loop)
    for name, value in one[0].net.state_dict().items():
        torch.testing.assert_close(other[0].net.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for name, values in one[1].history.items():
        assert other[1].history[name] == pytest.approx(values, rel=1e-5), name
    assert one[2] == other[2]
    assert torch.equal(one[3], other[3])
    assert max(other[0].net.seen[8:]) <= rows


def test_what_was_found_out_holds_for_the_next_fit_and_is_said_once(capsys):
    model, *_ = train(5, verbose=2)
    said = capsys.readouterr().out
    assert said.count("Out of memory: batches of 16 are cut into 2 parts for each update.") == 1
    assert said.count("Out of memory: batches of 16 are cut into 4 parts for each update.") == 1
    model.net.seen.clear()
    model.fit(X, Y, batch_size=16, verbose=0)
    assert max(model.net.seen) == 4


def test_a_row_that_is_too_large_is_torch_s_own_error():
    with pytest.raises(torch.OutOfMemoryError, match="no memory for"):
        train(0)


def test_without_auto_the_error_comes_out_and_the_model_trains_on():
    with pytest.raises(torch.OutOfMemoryError):
        train(8, gradient_accumulation_steps=1)
    with pytest.raises(torch.OutOfMemoryError):
        train(8, gradient_accumulation_steps=2)


def test_an_error_in_validation_comes_out():
    class Large(Small):
        def forward(self, x):
            if not self.training:
                raise torch.OutOfMemoryError("no memory to validate")
            return super().forward(x)

    model = kt.Model(Large(100), device="cpu")
    model.compile("cross_entropy", "sgd", gradient_accumulation_steps="auto")
    with pytest.raises(torch.OutOfMemoryError, match="no memory to validate"):
        model.fit(X, Y, validation_data=(X, Y), verbose=0)


def test_no_frame_of_ours_keeps_the_tensors_of_a_step_that_failed():
    alive = []

    class Watched(Small):
        def forward(self, x):
            outputs = self.layer(x)
            alive.append(weakref.ref(outputs))
            if self.training and len(x) > self.rows:
                raise torch.OutOfMemoryError("no memory")
            return outputs

    class Look(Callback):
        def on_train_batch_end(self, batch, logs=None):
            gc.collect()
            self.left = [ref() is not None for ref in alive[:2]]

    model, look = kt.Model(Watched(8), device="cpu"), Look()
    model.compile("cross_entropy", "sgd", gradient_accumulation_steps="auto")
    model.fit(X[:16], Y[:16], batch_size=16, callbacks=[look], verbose=0)
    assert look.left[0] is False


def test_several_inputs_are_cut_alike():
    class Two(Small):
        def forward(self, a, b):
            return super().forward(a["values"] + b)

    results = []
    for rows in (100, 4):
        torch.manual_seed(0)
        model = kt.Model(Two(rows), device="cpu")
        model.compile("cross_entropy", "sgd", gradient_accumulation_steps="auto")
        model.fit([(({"values": X[:16]}, X[16:32]), Y[:16])], epochs=2, verbose=0)
        results.append(model.net.layer.weight.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "loop", [kt.FunctionLoop(train_step=lambda run, x, y, sample_weight: None), "graph", GraphLoop, GraphLoop()]
)
def test_loops_that_take_whole_batches_refuse_it(loop):
    model = kt.Model(nn.Linear(6, 3), device="cpu")
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps='auto' cuts batches into parts"):
        model.compile("cross_entropy", "sgd", gradient_accumulation_steps="auto", loop=loop)
