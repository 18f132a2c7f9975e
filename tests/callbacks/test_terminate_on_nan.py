"""TerminateOnNaN over planted NaN and infinity: when it stops, what it says began it, and what it leaves alone."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import kerastorch as kt
from kerastorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint, terminate_on_nan
from kerastorch.callbacks.terminate_on_nan import TerminateOnNaN
from kerastorch.loops import LOOPS

NAN, INF = math.nan, math.inf
POISON = 7.0  # an input that spoils the gradient, and nothing else
NUM_BATCHES = 6

every_loop = pytest.mark.parametrize("loop", list(LOOPS))


class Poison(torch.autograd.Function):
    """Gives x forward and gradient * factor backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


class Net(nn.Module):
    """Two layers; where a batch holds POISON the gradient behind the second one is multiplied by factor."""

    def __init__(self, factor: float = NAN) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.factor = factor
        self.first, self.drop, self.second = nn.Linear(2, 3), nn.Dropout(0.2), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.tanh(self.first(x)))
        if (x == POISON).any():
            hidden = Poison.apply(hidden, self.factor)
        return self.second(hidden)


class Batches:
    """Six batches of two rows that can be read anew; plant is called on one of them, in one epoch."""

    def __init__(self, plant: Callable[[Any, torch.Tensor], None], epoch: int = 1, batch: int = 3) -> None:
        self.plant, self.place = plant, (epoch, batch)
        self.epoch = -1

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        self.epoch += 1
        generator = torch.Generator().manual_seed(1)
        for batch in range(NUM_BATCHES):
            x = torch.rand(2, 2, generator=generator)
            y = x.sum(1, keepdim=True)
            if (self.epoch, batch) == self.place:
                self.plant(x, y)
            yield x, y


def plant_nothing(x: torch.Tensor, y: torch.Tensor) -> None:
    pass


def plant_in_inputs(x: torch.Tensor, y: torch.Tensor) -> None:
    x[1, 0] = NAN


def plant_in_loss(x: torch.Tensor, y: torch.Tensor) -> None:
    y[1] = INF


def plant_in_gradient(x: torch.Tensor, y: torch.Tensor) -> None:
    x[1, 0] = POISON


PLANTS = {"inputs": plant_in_inputs, "loss": plant_in_loss, "gradient": plant_in_gradient}
CAUSES = {
    "inputs": "the inputs of the batch hold NaN; the loss is NaN.",
    "loss": "the loss is inf, from finite inputs.",
    "gradient": "the gradient became non-finite first: 'first.bias'; the loss was ",
}
every_kind = pytest.mark.parametrize("kind", list(PLANTS))
every_mode = pytest.mark.parametrize("raise_error", [False, True])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def make_model(net: nn.Module | None = None, optimizer: Any = sgd, **arguments: Any) -> kt.Model:
    model = kt.Model(net or Net(), device="cpu")
    model.compile("mse", optimizer, **arguments)
    return model


def fit(model: kt.Model, data: Any, callbacks: Any, epochs: int = 3, **arguments: Any) -> kt.History:
    return model.fit(data, epochs=epochs, callbacks=callbacks, verbose=0, **arguments)


def outcome(model: kt.Model, data: Any, callback: TerminateOnNaN, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line printed, or the error's message."""
    if not callback.raise_error:
        fit(model, data, callback)
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 1
        assert printed[0].endswith(" Training stops.")
        return printed[0].removesuffix(" Training stops.")
    with pytest.raises(RuntimeError) as caught:
        fit(model, data, callback)
    assert capsys.readouterr().out == ""
    return str(caught.value)


def is_finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in weights.values())


def num_hooks(model: kt.Model) -> int:
    assert model.optimizer is not None
    return len(model.optimizer._optimizer_step_pre_hooks)


# ---- what began it ----


@every_loop
@every_kind
@every_mode
def test_says_where_it_began_with_epoch_batch_and_step_from_1(
    loop: str, kind: str, raise_error: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    message = outcome(make_model(loop=loop), Batches(PLANTS[kind]), TerminateOnNaN(raise_error), capsys)
    assert message.startswith(f"Epoch 2, batch 4 (optimizer step 10): {CAUSES[kind]}")


def test_the_loss_of_a_bad_gradient_is_the_one_it_came_with(capsys: pytest.CaptureFixture[str]) -> None:
    model, losses = make_model(), []
    note = LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(float(note.run.loss)))
    fit(model, Batches(plant_in_gradient, 0, 2), [note, TerminateOnNaN()])
    assert math.isfinite(losses[2])
    assert math.isnan(losses[3])
    assert f"'first.bias'; the loss was {losses[2]:.4g}." in capsys.readouterr().out


@pytest.mark.parametrize(("value", "text"), [(NAN, "hold NaN"), (INF, "hold inf"), (-INF, "hold inf")])
def test_names_nan_and_infinite_inputs(value: float, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        fit(make_model(), Batches(lambda x, y: x.fill_(value)), TerminateOnNaN(True))


def test_a_nan_that_forward_writes_into_its_inputs_is_not_blamed_on_the_data() -> None:
    class Writing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.div_(x - x if (x == POISON).any() else 1.0))

    with pytest.raises(RuntimeError, match="the loss is NaN, from finite inputs"):
        fit(make_model(Writing()), Batches(plant_in_gradient), TerminateOnNaN(True))


def test_a_gradient_that_grew_bad_after_nan_inputs_is_blamed_on_the_inputs() -> None:
    class Masked(Net):  # the loss is finite, the gradient of the side not taken is NaN
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x.isnan().any(1, keepdim=True), self.second.bias, super().forward(x))

    with pytest.raises(RuntimeError, match=r"batch 4 .* the inputs of the batch hold NaN; the loss is \d"):
        fit(make_model(Masked()), Batches(plant_in_inputs), TerminateOnNaN(True))


def test_names_the_bad_parameter_nearest_to_the_loss_whatever_the_order_of_groups() -> None:
    def grouped(parameters: Any) -> torch.optim.Optimizer:
        listed = list(parameters)
        return torch.optim.SGD([{"params": listed[1::2]}, {"params": listed[0::2]}], lr=0.05)

    net = Net()
    net.first.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'first\.weight'"):
        fit(make_model(net, grouped), Batches(plant_in_gradient), TerminateOnNaN(True))


def test_a_bad_parameter_outside_the_net_is_said_to_be_so() -> None:
    net, outside = nn.Linear(2, 1), nn.Parameter(torch.ones(1))

    def loss(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (outputs - y).square().mean() + (outside - 1).square().sum().sqrt()

    model = kt.Model(net, device="cpu")
    model.compile(loss, lambda parameters: torch.optim.SGD([*parameters, outside], lr=0.01))
    with pytest.raises(RuntimeError, match="of a parameter outside the net"):
        fit(model, Batches(plant_nothing), TerminateOnNaN(True))


# ---- when it stops ----


@every_loop
@every_kind
def test_stops_at_the_bad_loss_and_ends_the_epoch_as_ever(
    loop: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks: list[Any] = []
    note = LambdaCallback(
        on_train_batch_end=lambda batch, logs: hooks.append(batch),
        on_test_end=lambda logs: hooks.append("validation"),
        on_epoch_end=lambda epoch, logs: hooks.append("epoch"),
        on_train_end=lambda logs: hooks.append("end"),
    )
    validation = torch.rand(2, 2), torch.rand(2, 1)
    fit(make_model(loop=loop), Batches(PLANTS[kind]), [TerminateOnNaN(), note], validation_data=validation)
    last = 4 if kind == "gradient" else 3  # the loss that follows a bad gradient
    first_epoch = [*range(NUM_BATCHES), "validation", "epoch"]
    assert hooks == [*first_epoch, *range(last + 1), "validation", "epoch", "end"]


@every_kind
def test_history_shows_the_bad_loss(kind: str) -> None:
    history = fit(make_model(), Batches(PLANTS[kind]), TerminateOnNaN())
    assert history.epoch == [0, 1]
    assert math.isfinite(history.history["loss"][0])
    assert not math.isfinite(history.history["loss"][1])


@every_mode
def test_a_bad_gradient_in_the_last_batch_ends_fit_with_its_epoch(
    raise_error: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    data = Batches(plant_in_gradient, 1, NUM_BATCHES - 1)
    message = outcome(model, data, TerminateOnNaN(raise_error), capsys)
    assert message.startswith("Epoch 2, batch 6 (optimizer step 12): the gradient became")
    assert model.history.epoch == ([0] if raise_error else [0, 1])


def test_data_of_unknown_length_is_told_of_at_the_end_of_the_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    class Stream:
        def __init__(self, batches: Batches) -> None:
            self.batches = batches

        def __iter__(self) -> Iterator[Any]:
            return iter(self.batches)

    history = fit(make_model(), Stream(Batches(plant_in_gradient, 0, NUM_BATCHES - 1)), TerminateOnNaN())
    assert history.epoch == [0]
    assert capsys.readouterr().out.startswith("Epoch 1, batch 6 (optimizer step 6): the gradient became")


@pytest.mark.parametrize(("batch", "step"), [(0, 7), (1, 7), (2, 7), (3, 8), (5, 8)])
def test_under_accumulation_the_step_is_the_one_the_batch_counts_into(
    batch: int, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    batches: list[int] = []
    note = LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch))
    model = make_model(gradient_accumulation_steps=3)
    fit(model, Batches(plant_in_inputs, 3, batch), [note, TerminateOnNaN()], epochs=5)
    assert capsys.readouterr().out.startswith(f"Epoch 4, batch {batch + 1} (optimizer step {step}): the inputs")
    assert batches[3 * NUM_BATCHES :] == list(range(3 if batch < 3 else 6))  # to the end of its window, said once


def test_under_accumulation_a_bad_gradient_is_seen_where_its_window_ends() -> None:
    model = make_model(gradient_accumulation_steps=3)
    with pytest.raises(RuntimeError, match=r"batch 3 \(optimizer step 3\): the gradient became non-finite"):
        fit(model, Batches(plant_in_gradient, 1, 1), TerminateOnNaN(True))


@every_loop
@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 4}, {"mixed_precision": "bf16"}, {"clip_grad_norm": 0.1}],
    ids=["plain", "accumulation", "bf16", "clipped"],
)
def test_a_healthy_fit_is_left_as_it_was_to_the_bit(
    loop: str, arguments: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for callbacks in ([], [TerminateOnNaN()], [TerminateOnNaN(raise_error=True)]):
        model = make_model(loop=loop, **arguments)
        torch.manual_seed(3)
        history = fit(model, Batches(plant_nothing), callbacks)
        results.append((history.history, model.net.state_dict(), torch.get_rng_state()))
    assert capsys.readouterr().out == ""
    for history, weights, random_state in results[1:]:
        assert history == results[0][0]
        assert all(torch.equal(weights[name], value) for name, value in results[0][1].items())
        assert torch.equal(random_state, results[0][2])


@every_kind
def test_bf16_is_watched_like_float32(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = outcome(make_model(mixed_precision="bf16"), Batches(PLANTS[kind]), TerminateOnNaN(), capsys)
    assert message.startswith(f"Epoch 2, batch 4 (optimizer step 10): {CAUSES[kind]}")


@pytest.mark.parametrize("optimizer", [sgd, "sgd"], ids=["skipped by the scaler", "fused, skips itself"])
def test_infinite_gradients_under_fp16_are_left_to_the_scaler(optimizer: Any) -> None:
    model = make_model(Net(factor=INF), optimizer, mixed_precision="fp16")
    assert fit(model, Batches(plant_in_gradient), TerminateOnNaN(True)).epoch == [0, 1, 2]
    assert is_finite(model.net.state_dict())


def test_a_bad_loss_under_fp16_stops() -> None:
    with pytest.raises(RuntimeError, match=r"Epoch 2, batch 4 .* the loss is inf"):
        fit(make_model(mixed_precision="fp16"), Batches(plant_in_loss), TerminateOnNaN(True))


def test_huge_gradients_that_are_finite_do_not_stop() -> None:
    model = make_model(Net(factor=1e30), lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    assert fit(model, Batches(plant_in_gradient), TerminateOnNaN(True)).epoch == [0, 1, 2]


def test_infinite_gradients_that_are_clipped_to_a_value_do_not_stop() -> None:
    net = Net()
    net.first.weight.register_hook(lambda gradient: torch.full_like(gradient, INF))
    assert fit(make_model(net, clip_grad_value=0.1), Batches(plant_nothing), TerminateOnNaN(True)).epoch == [0, 1, 2]
    with pytest.raises(RuntimeError, match=r"batch 1 .* 'first\.weight'"):
        fit(make_model(net), Batches(plant_nothing), TerminateOnNaN(True))


def test_nan_inputs_that_the_net_copes_with_do_not_stop() -> None:
    class Filling(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.nan_to_num())

    assert fit(make_model(Filling()), Batches(plant_in_inputs), TerminateOnNaN(True)).epoch == [0, 1, 2]


def test_a_bad_validation_loss_does_not_stop() -> None:
    validation = Batches(plant_in_inputs)
    history = fit(make_model(), Batches(plant_nothing), TerminateOnNaN(True), validation_data=validation)
    assert history.epoch == [0, 1, 2]
    assert [math.isnan(value) for value in history.history["val_loss"]] == [False, True, False]


# ---- read seldom, as on an accelerator ----


class Seldom(TerminateOnNaN):
    """Goes by the clock, as on an accelerator, and counts its reads."""

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._reads_each_batch, self.reads = False, 0

    def _read(self, ends_epoch: bool) -> None:
        self.reads += 1
        super()._read(ends_epoch)


@every_kind
@every_mode
def test_read_at_the_end_of_the_epoch_it_names_the_first_bad_batch(
    kind: str, raise_error: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminate_on_nan, "REFRESH_SECONDS", 1e9)
    model, callback = make_model(), Seldom(raise_error)
    message = outcome(model, Batches(PLANTS[kind]), callback, capsys)
    assert message.startswith(f"Epoch 2, batch 4 (optimizer step 10): {CAUSES[kind]}")
    assert model.history.epoch == ([0] if raise_error else [0, 1])
    assert callback.reads == (3 if raise_error else 4)  # the last batch and the end of each epoch


def test_is_read_again_once_the_interval_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminate_on_nan, "REFRESH_SECONDS", 0.0)
    callback = Seldom()
    fit(make_model(), Batches(plant_nothing), callback, epochs=1)
    assert callback.reads == NUM_BATCHES + 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_on_cuda_it_names_the_same_batch_without_a_sync_in_its_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminate_on_nan, "REFRESH_SECONDS", 1e9)

    class Strict(TerminateOnNaN):
        def _look_at_gradients(self, *arguments: Any) -> None:
            self._strictly(super()._look_at_gradients, *arguments)

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self._strictly(super().on_train_batch_begin, batch, logs)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch + 1 < NUM_BATCHES:
                self._strictly(super().on_train_batch_end, batch, logs)
            else:
                super().on_train_batch_end(batch, logs)

        def _strictly(self, hook: Callable[..., None], *arguments: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                hook(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    model = kt.Model(Net(), device="cuda")
    model.compile("mse", sgd)
    with pytest.raises(RuntimeError) as caught:
        fit(model, Batches(PLANTS[kind]), Strict(raise_error=True))
    assert str(caught.value).startswith(f"Epoch 2, batch 4 (optimizer step 10): {CAUSES[kind]}")


# ---- kinds of inputs and gradients ----


def test_integer_inputs_are_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.tensor([[1], [2], [3], [4]]), torch.tensor([[1.0], [1.0], [INF], [1.0]])
    model = make_model(nn.Sequential(nn.Embedding(5, 1), nn.Flatten()))
    model.fit(x, y, batch_size=2, epochs=2, shuffle=False, callbacks=TerminateOnNaN(), verbose=0)
    assert capsys.readouterr().out.startswith("Epoch 1, batch 2 (optimizer step 2): the loss is inf, from finite")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floating_inputs_are_found_in_nested_ones(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(5, 2), nn.Linear(2, 1)

        def forward(self, index: torch.Tensor, pair: Any) -> torch.Tensor:
            return self.linear(self.embedding(index) + pair[0].float() + pair[1])

    index, left, right = torch.tensor([0, 1, 2, 3]), torch.ones(4, 2, dtype=dtype), torch.ones(4, 2)
    left[3, 1] = NAN
    batches = [
        ({"index": index[rows], "pair": (left[rows], right[rows])}, torch.ones(2, 1))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    fit(make_model(Two()), batches, TerminateOnNaN())
    assert capsys.readouterr().out.startswith("Epoch 1, batch 2 (optimizer step 2): the inputs of the batch hold NaN")


def test_packed_sequences_are_looked_into(capsys: pytest.CaptureFixture[str]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(2, 1)

        def forward(self, x: PackedSequence) -> torch.Tensor:
            return self.rnn(x)[1][0]

    good, bad = torch.ones(3, 2), torch.full((2, 2), NAN)
    batches = [(pack_sequence([good, other]), torch.zeros(2, 1)) for other in (good[:2], bad)]
    fit(make_model(Recurrent()), batches, TerminateOnNaN())
    assert capsys.readouterr().out.startswith("Epoch 1, batch 2 (optimizer step 2): the inputs of the batch hold NaN")


def test_complex_and_empty_inputs_are_passed_over() -> None:
    class Absolute(Net):
        def forward(self, x: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
            return super().forward(x.abs().nan_to_num())

    x = torch.tensor([[1 + 1j, 2j], [NAN, 1]], dtype=torch.complex64)
    batches = [((x, torch.empty(2, 0)), torch.ones(2, 1))]
    assert fit(make_model(Absolute()), batches, TerminateOnNaN(True)).epoch == [0, 1, 2]


def test_sparse_empty_and_missing_gradients_are_passed_over() -> None:
    class Odd(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(2, 1))
            self.unused, self.empty = nn.Parameter(torch.full((1,), NAN)), nn.Parameter(torch.empty(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (self[0], self[1], self[2]):
                x = layer(x)
            return x + self.empty.sum()

    model = make_model(Odd(), lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    x, y = torch.tensor([[1], [2]]), torch.ones(2, 1)
    assert model.fit(x, y, epochs=2, callbacks=TerminateOnNaN(True), verbose=0).epoch == [0, 1]


# ---- beside others, and over several calls ----


@every_kind
@pytest.mark.parametrize("is_first", [True, False])
def test_a_checkpoint_of_the_best_loss_is_never_of_the_bad_epoch(kind: str, is_first: bool, tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / "best.pt"
    callbacks = [TerminateOnNaN(), ModelCheckpoint(path, monitor="loss", save_best_only=True)]
    fit(model, Batches(PLANTS[kind]), callbacks if is_first else callbacks[::-1])
    saved = torch.load(path, weights_only=True)
    assert saved["epoch"] == 0
    assert is_finite(saved["model_state_dict"])
    assert not is_finite(model.net.state_dict())


@every_kind
@pytest.mark.parametrize("batch", [3, NUM_BATCHES - 1])
def test_raise_error_comes_before_a_checkpoint_of_the_bad_epoch(kind: str, batch: int, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(RuntimeError, match="Epoch 2"):
        fit(make_model(), Batches(PLANTS[kind], 1, batch), [ModelCheckpoint(path), TerminateOnNaN(True)])
    saved = torch.load(path, weights_only=True)
    assert saved["epoch"] == 0
    assert is_finite(saved["model_state_dict"])


@every_kind
@pytest.mark.parametrize("monitor", ["loss", "val_loss"])
def test_early_stopping_beside_it_restores_finite_weights(kind: str, monitor: str) -> None:
    model, weights = make_model(), []
    note = LambdaCallback(on_epoch_end=lambda epoch, logs: weights.append(copy.deepcopy(model.net.state_dict())))
    stopper = EarlyStopping(monitor, patience=5, restore_best_weights=True)
    validation = torch.rand(2, 2), torch.rand(2, 1)
    fit(model, Batches(PLANTS[kind]), [note, TerminateOnNaN(), stopper], validation_data=validation)
    assert len(weights) == 2
    assert not is_finite(weights[1])
    assert all(torch.equal(value, weights[0][name]) for name, value in model.net.state_dict().items())


def test_state_begins_anew_with_each_fit(capsys: pytest.CaptureFixture[str]) -> None:
    callback = TerminateOnNaN()
    for kind, epoch in (("gradient", 1), ("loss", 0), ("inputs", 2)):
        message = outcome(make_model(), Batches(PLANTS[kind], epoch), callback, capsys)
        assert message.startswith(f"Epoch {epoch + 1}, batch 4 (optimizer step {6 * epoch + 4}): {CAUSES[kind]}")
    assert fit(make_model(), Batches(plant_nothing), callback).epoch == [0, 1, 2]


@every_mode
@every_kind
def test_the_optimizer_has_its_hook_in_fit_alone(kind: str, raise_error: bool) -> None:
    model, during = make_model(), []
    note = LambdaCallback(on_train_batch_begin=lambda batch, logs: during.append(num_hooks(model)))
    try:
        fit(model, Batches(PLANTS[kind]), [note, TerminateOnNaN(raise_error)])
    except RuntimeError:
        assert raise_error
    assert set(during) == {1}
    assert num_hooks(model) == 0


@pytest.mark.parametrize("hook", ["on_train_begin", "on_train_batch_end", "on_epoch_end"])
def test_the_hook_is_gone_after_an_exception_elsewhere(hook: str) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    model = make_model()
    with pytest.raises(ZeroDivisionError):
        fit(model, Batches(plant_nothing), [TerminateOnNaN(), LambdaCallback(**{hook: fail})])
    assert num_hooks(model) == 0


def test_an_evaluate_with_it_inside_fit_does_not_end_its_watch() -> None:
    model, callback = make_model(), TerminateOnNaN(True)
    x, y = torch.rand(2, 2), torch.rand(2, 1)
    note = LambdaCallback(on_epoch_end=lambda epoch, logs: model.evaluate(x, y, callbacks=callback, verbose=0))
    with pytest.raises(RuntimeError, match=r"Epoch 2, batch 4 .* the gradient became"):
        fit(model, Batches(plant_in_gradient), [callback, note])
    assert num_hooks(model) == 0
