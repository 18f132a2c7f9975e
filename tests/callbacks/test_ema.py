"""EMA: the average a hand-written torch loop keeps, what sees it, what is left behind, and what is refused."""

import copy
import gc
import itertools
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import EMA, SWA, EarlyStopping, LambdaCallback, ModelCheckpoint
from kerastorch.loops import LOOPS, ClassLoop

# All loops agree in test_loops.py; where they are not the point, the others are for the slow part.
mostly_one_loop = pytest.mark.parametrize(
    "loop", ["script", *(pytest.param(loop, marks=pytest.mark.slow) for loop in LOOPS if loop != "script")]
)
DECAY, EPOCHS = 0.8, 3
Weights = dict[str, Tensor]


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(hidden)


class Counting(nn.Module):
    """Counts its training batches in an integer buffer, and keeps another that no state_dict holds."""

    count: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("last", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.last.copy_(x[0])
        return self.layer(x)


def frozen() -> nn.Module:
    net = plain()
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    return net


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 12)), nn.Tanh(), nn.Linear(12, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "batch norm": with_batch_norm,
    "tied": Tied,
    "frozen": frozen,
    "buffers": Counting,
    "weight norm": normed,
}


def make_net(name: str = "batch norm") -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


def make_data(rows: int = 29, batch_size: int = 5) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Six batches, the last one short; thirteen rows of others to validate on."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows + 13, 6, generator=generator), torch.randint(0, 3, (rows + 13,), generator=generator)
    train = DataLoader(TensorDataset(x[:rows], y[:rows]), batch_size, shuffle=True)
    return train, DataLoader(TensorDataset(x[rows:], y[rows:]), batch_size)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.2, momentum=0.9)


def make_model(net: nn.Module | None = None, **arguments: Any) -> kt.Model:
    net = make_net() if net is None else net
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", sgd(net.parameters()), ["accuracy"], **arguments)
    return model


def fit(model: kt.Model, callbacks: Any, epochs: int = EPOCHS, seed: int = 2, **arguments: Any) -> kt.History:
    train, val = make_data()
    torch.manual_seed(seed)
    arguments = {"validation_data": val, "verbose": 0, **arguments}
    return model.fit(train, epochs=epochs, callbacks=callbacks, **arguments)


def weights_of(net: nn.Module) -> Weights:
    return copy.deepcopy(dict(net.state_dict()))


def assert_same(weights: Any, other: Any) -> None:
    assert list(weights) == list(other)
    for name in weights:
        assert torch.equal(weights[name], other[name]), name


def are_same(weights: Any, other: Any) -> bool:
    return all(torch.equal(weights[name], other[name]) for name in other)


def train_by_hand(
    net: nn.Module, *, k: int = 1, dtype: torch.dtype | None = None, epochs: int = EPOCHS
) -> tuple[nn.Module, list[float]]:
    """The loop a torch user writes around torch's AveragedModel; returns the average and its validation losses."""
    train, val = make_data()
    torch.manual_seed(2)
    optimizer, loss_fn = sgd(net.parameters()), nn.CrossEntropyLoss()
    average, val_losses = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY)), []
    autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    for _ in range(epochs):
        net.train()
        sizes: list[int] = []
        for i, (x, y) in enumerate(train):
            with autocast:
                loss = loss_fn(net(x), y)
            sizes.append(len(x))
            n, b = sizes[-1], sizes[0]
            (loss / k if n == b else loss * n / (k * b)).backward()
            if len(sizes) == k or i + 1 == len(train):
                if sum(sizes) != k * b:
                    for parameter in net.parameters():
                        if parameter.grad is not None:
                            parameter.grad.mul_(k * b / sum(sizes))
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(net)
                sizes = []
        average.eval()
        loss_sum, seen = 0.0, 0
        with torch.no_grad():
            for x, y in val:
                with autocast:
                    loss_sum += loss_fn(average(x), y).item() * len(x)
                seen += len(x)
        val_losses.append(loss_sum / seen)
    return average.module, val_losses


# ---- the average ----


@mostly_one_loop
@pytest.mark.parametrize("name", NETS)
def test_average_and_training_weights_equal_a_hand_written_loop_to_the_bit(loop: str, name: str) -> None:
    by_hand = make_net(name)
    average, val_losses = train_by_hand(by_hand)
    model, ema = make_model(make_net(name), loop=loop), EMA(DECAY, keep_average=False)
    history = fit(model, ema)
    assert ema.averaged_net is not None
    assert_same(ema.averaged_net.module.state_dict(), average.state_dict())
    assert_same(model.net.state_dict(), by_hand.state_dict())
    assert history.history["val_loss"] == val_losses


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("k", [2, 4])
def test_with_accumulation_the_average_moves_once_an_optimizer_step(loop: str, k: int) -> None:
    by_hand = make_net()
    average, val_losses = train_by_hand(by_hand, k=k)
    model = make_model(loop=loop, gradient_accumulation_steps=k)
    history = fit(model, EMA(DECAY))
    assert_same(model.net.state_dict(), average.state_dict())
    assert history.history["val_loss"] == val_losses


@pytest.mark.parametrize("loop", LOOPS)
def test_average_equals_a_hand_written_loop_under_bf16(loop: str) -> None:
    by_hand = make_net()
    average, val_losses = train_by_hand(by_hand, dtype=torch.bfloat16)
    model = make_model(loop=loop, mixed_precision="bf16")
    history = fit(model, EMA(DECAY))
    assert_same(model.net.state_dict(), average.state_dict())
    assert history.history["val_loss"] == val_losses


def test_average_of_a_bf16_net_is_in_bf16_and_equals_a_hand_written_lerp() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 2).bfloat16()
    x, y = torch.randn(12, 4).bfloat16(), torch.randint(0, 2, (12,))
    model, ema, steps = kt.Model(net, device="cpu"), EMA(0.7), []
    model.compile("cross_entropy", torch.optim.SGD(net.parameters(), lr=0.5))
    watch = LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(weights_of(net)))
    model.fit(x, y, batch_size=3, epochs=2, verbose=0, callbacks=[ema, watch])
    average = steps[0]
    for weights in steps[1:]:
        average = {name: torch.lerp(average[name], weights[name], 1 - 0.7) for name in average}
    assert net.weight.dtype == torch.bfloat16
    assert_same(net.state_dict(), average)


def test_average_is_the_documented_formula_begun_at_the_first_step() -> None:
    model, steps = make_model(make_net("plain")), []
    watch = LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(weights_of(model.net)))
    fit(model, [EMA(DECAY), watch])
    average = steps[0]
    for weights in steps[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in average}
    for name, value in model.net.state_dict().items():
        torch.testing.assert_close(value, average[name])


def test_training_is_the_same_as_without() -> None:
    without, model = make_model(), make_model()
    expected = fit(without, None)
    state = torch.get_rng_state()
    history = fit(model, EMA(DECAY, keep_average=False))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(model.net.state_dict(), without.net.state_dict())
    assert history.history["loss"] == expected.history["loss"]
    assert history.history["accuracy"] == expected.history["accuracy"]
    assert history.history["val_loss"] != expected.history["val_loss"]


def test_tied_weights_stay_tied_in_net_and_average() -> None:
    model, ema = make_model(make_net("tied")), EMA(DECAY)
    fit(model, ema)
    assert ema.averaged_net is not None
    for net in (model.net, ema.averaged_net.module):
        assert isinstance(net, Tied)
        assert net.first.weight is net.second.weight


def test_parameters_stay_the_objects_that_the_optimizer_holds() -> None:
    model = make_model()
    before = [id(parameter) for parameter in model.net.parameters()]
    places = [parameter.data_ptr() for parameter in model.net.parameters()]
    fit(model, EMA(DECAY))
    assert [id(parameter) for parameter in model.net.parameters()] == before
    assert [parameter.data_ptr() for parameter in model.net.parameters()] == places


# ---- what sees it ----


def test_validation_logs_are_those_of_the_average() -> None:
    model, ema, expected = make_model(), EMA(DECAY, keep_average=False), []
    _, val = make_data()

    def evaluate_average(epoch: int, logs: Any) -> None:
        assert ema.averaged_net is not None
        other = make_model(copy.deepcopy(ema.averaged_net.module))
        expected.append(other.evaluate(val, verbose=0))

    history = fit(model, [ema, LambdaCallback(on_train_epoch_end=evaluate_average)])
    for name in ("loss", "accuracy"):
        assert history.history[f"val_{name}"] == [logs[name] for logs in expected]


def test_hooks_find_training_weights_outside_and_the_average_inside_validation() -> None:
    model, ema, seen = make_model(), EMA(DECAY), []

    def note(hook: str) -> Callable[..., None]:
        return lambda *arguments: seen.append((hook, weights_of(model.net), ema.run.published_state_dict()))

    hooks = ("on_train_epoch_end", "on_test_begin", "on_test_batch_end", "on_test_end", "on_epoch_end")
    fit(model, [LambdaCallback(**{hook: note(hook) for hook in hooks}), ema], epochs=1)
    training, average = seen[0][1], seen[0][2]
    assert not are_same(training, average)
    for hook, weights, published in seen:
        assert_same(weights, average if hook == "on_test_batch_end" else training)
        assert_same(published, average)


def test_evaluate_in_a_callback_measures_the_weights_the_net_has_then() -> None:
    _, val = make_data()
    other, model, inside, outside = make_model(), make_model(), [], []
    fit(other, None, epochs=1)
    ema = EMA(DECAY)
    watch = LambdaCallback(
        on_epoch_end=lambda epoch, logs: outside.append(model.evaluate(val, verbose=0)),
        on_test_batch_end=lambda batch, logs: (
            inside.append(model.evaluate(val, verbose=0)) if batch == 0 and len(inside) < 1 else None
        ),
    )
    history = fit(model, [ema, watch], epochs=1)
    assert outside[0] == other.evaluate(val, verbose=0)
    assert inside[0]["loss"] == history.history["val_loss"][0]


def test_without_validation_the_average_and_the_training_weights_are_the_same() -> None:
    model, other = make_model(), make_model()
    _, val = make_data()
    other_ema, ema = EMA(DECAY, keep_average=False), EMA(DECAY, keep_average=False)
    fit(model, ema, validation_data=None)
    fit(other, other_ema, epochs=3, validation_data=val, validation_freq=[3])  # after all training
    assert ema.averaged_net is not None
    assert other_ema.averaged_net is not None
    assert_same(model.net.state_dict(), other.net.state_dict())
    assert_same(ema.averaged_net.state_dict(), other_ema.averaged_net.state_dict())


class Failing(TensorDataset):
    """Raises at row `bad`, once armed."""

    bad = 7
    armed = False

    def __getitem__(self, index: int) -> Any:
        if self.armed and index == self.bad:
            raise RuntimeError("a broken row")
        return super().__getitem__(index)


def test_training_weights_are_back_when_a_validation_batch_raises() -> None:
    model, ema, kept = make_model(), EMA(DECAY), []
    _, val = make_data()
    rows = Failing(*val.dataset.tensors)

    def arm(epoch: int, logs: Any) -> None:
        kept.append(weights_of(model.net))
        rows.armed = epoch == 1

    with pytest.raises(RuntimeError, match="a broken row"):
        fit(model, [ema, LambdaCallback(on_train_epoch_end=arm)], validation_data=DataLoader(rows, 5))
    assert_same(model.net.state_dict(), kept[1])
    rows.armed = False
    fit(model, EMA(DECAY))  # and training goes on


@pytest.mark.parametrize("hook", ["on_test_begin", "on_test_batch_begin", "on_test_batch_end", "on_test_end"])
@pytest.mark.parametrize("loop", LOOPS)
def test_training_weights_are_back_when_a_hook_of_validation_raises(loop: str, hook: str) -> None:
    model, kept = make_model(loop=loop), []

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no")

    keep = LambdaCallback(on_train_epoch_end=lambda epoch, logs: kept.append(weights_of(model.net)))
    with pytest.raises(RuntimeError, match="no"):
        fit(model, [EMA(DECAY), keep, LambdaCallback(**{hook: fail})])
    assert_same(model.net.state_dict(), kept[0])


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_test_batch_begin", "on_test_batch_end"])
@pytest.mark.parametrize("loop", LOOPS)
def test_an_interrupt_leaves_the_training_weights(loop: str, hook: str) -> None:
    model, kept = make_model(loop=loop), []

    def interrupt(batch: int, logs: Any) -> None:
        if len(model.history.epoch) == 0 and batch == 1 and len(kept) >= 1:
            signal.raise_signal(signal.SIGINT)

    keep = LambdaCallback(on_train_batch_end=lambda batch, logs: kept.append(weights_of(model.net)))
    history = fit(model, [EMA(DECAY), keep, LambdaCallback(**{hook: interrupt})], on_interrupt="return")
    assert len(history.epoch) == 0
    assert_same(model.net.state_dict(), kept[-1])


def test_a_second_ctrl_c_in_validation_leaves_the_training_weights() -> None:
    model, kept = make_model(), []

    def interrupt(batch: int, logs: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    keep = LambdaCallback(on_train_epoch_end=lambda epoch, logs: kept.append(weights_of(model.net)))
    with pytest.raises(KeyboardInterrupt):
        fit(model, [EMA(DECAY), keep, LambdaCallback(on_test_batch_end=interrupt)])
    assert_same(model.net.state_dict(), kept[0])


class Impatient(ClassLoop):
    """Leaves validation after its first batch."""

    @torch.no_grad()
    def evaluate(self, run: Any) -> None:
        run.net.eval()
        for x, y, sample_weight in run.eval_batches():
            loss, outputs = self.eval_step(x, y, sample_weight)
            run.record(loss, outputs, y, sample_weight)
            break


def test_training_weights_are_back_after_a_loop_that_leaves_validation_early() -> None:
    without, model = make_model(), make_model(loop=Impatient)
    fit(without, None)
    fit(model, EMA(DECAY, keep_average=False))
    assert_same(model.net.state_dict(), without.net.state_dict())


# ---- what is left behind ----


def test_keep_average_decides_what_the_net_has_after_fit() -> None:
    trained, averaged = make_model(), make_model()
    for model, keep in ((trained, False), (averaged, True)):
        ema = EMA(DECAY, keep_average=keep)
        fit(model, ema)
        assert ema.averaged_net is not None
        assert are_same(model.net.state_dict(), ema.averaged_net.module.state_dict()) is keep
    assert not are_same(trained.net.state_dict(), averaged.net.state_dict())


@pytest.mark.parametrize("keep", [False, True])
def test_evaluate_and_predict_after_fit_use_and_keep_the_nets_weights(keep: bool) -> None:
    model = make_model()
    _, val = make_data()
    history = fit(model, EMA(DECAY, keep_average=keep))
    before = weights_of(model.net)
    logs = model.evaluate(val, verbose=0)
    predicted = torch.from_numpy(model.predict(val, verbose=0))
    model.net.eval()
    with torch.no_grad():
        assert torch.equal(predicted, torch.cat([model.net(x) for x, _ in val]))
    assert_same(model.net.state_dict(), before)
    assert (logs["loss"] == history.history["val_loss"][-1]) is keep


def test_a_second_fit_begins_the_average_anew() -> None:
    ema, steps = EMA(DECAY, keep_average=False), []
    model = make_model(make_net("plain"))
    fit(model, ema, epochs=1)
    first = ema.averaged_net
    watch = LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(weights_of(model.net)))
    fit(model, [ema, watch], epochs=1)
    assert ema.averaged_net is not first
    average = AveragedModel(plain(), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for weights in steps:
        net = plain()
        net.load_state_dict(weights)
        average.update_parameters(net)
    assert ema.averaged_net is not None
    assert_same(ema.averaged_net.module.state_dict(), average.module.state_dict())


def test_averaged_net_is_none_before_the_first_fit() -> None:
    assert EMA().averaged_net is None


def test_the_average_is_freed_with_model_and_callback() -> None:
    ema, model = EMA(DECAY), make_model()
    fit(model, ema)
    assert ema.averaged_net is not None
    average = weakref.ref(ema.averaged_net)
    del ema, model
    gc.collect()
    assert average() is None


def test_the_run_is_freed_when_fit_has_ended() -> None:
    runs: list[Any] = []
    ema = EMA(DECAY)
    note = LambdaCallback(on_train_begin=lambda logs: runs.append(weakref.ref(ema.run)))
    fit(make_model(), [ema, note])
    gc.collect()
    assert runs[0]() is None


def test_model_and_callback_can_be_copied_after_fit() -> None:
    model, ema = make_model(), EMA(DECAY)
    fit(model, ema)
    assert_same(copy.deepcopy(model).net.state_dict(), model.net.state_dict())


# ---- beside other callbacks ----


def test_checkpoints_hold_the_average_for_use_and_the_training_weights_for_going_on(tmp_path: Path) -> None:
    model, ema, path = make_model(), EMA(DECAY, keep_average=False), tmp_path / "last.pt"
    fit(model, [ModelCheckpoint(path), ema])
    content = torch.load(path, weights_only=True)
    assert ema.averaged_net is not None
    assert_same(content["model_state_dict"], ema.averaged_net.module.state_dict())
    assert_same(content["training_model_state_dict"], model.net.state_dict())


def test_the_best_checkpoint_gives_the_best_val_loss_again(tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / "best.pt"
    history = fit(model, [EMA(DECAY), ModelCheckpoint(path, save_best_only=True)], epochs=6)
    net = make_net()
    net.load_state_dict(torch.load(path, weights_only=True)["model_state_dict"])
    _, val = make_data()
    assert make_model(net).evaluate(val, verbose=0)["loss"] == min(history.history["val_loss"])


def test_weights_only_checkpoints_hold_the_average(tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / "weights.pt"
    fit(model, [ModelCheckpoint(path, save_weights_only=True), EMA(DECAY)])
    assert_same(torch.load(path, weights_only=True), model.net.state_dict())


@pytest.mark.parametrize("async_save", [False, True])
def test_a_checkpoint_stores_the_average_once(tmp_path: Path, async_save: bool) -> None:
    torch.manual_seed(0)
    net = nn.Linear(300, 300)
    model, path = kt.Model(net, device="cpu"), tmp_path / "last.pt"
    model.compile("mse", "adam")
    x = torch.randn(8, 300)
    model.fit(x, x, epochs=2, verbose=0, callbacks=[EMA(DECAY), ModelCheckpoint(path, async_save=async_save)])
    size = sum(parameter.nbytes for parameter in net.parameters())
    assert path.stat().st_size < 4 * size + 60_000  # net, average, Adam's two slots


ORDERS = list(itertools.permutations(range(4)))


def run_in_order(order: tuple[int, ...], folder: Path, keep: bool) -> tuple[Any, ...]:
    model = make_model()
    callbacks: list[kt.Callback] = [
        EMA(DECAY, keep_average=keep),
        EarlyStopping(patience=1, restore_best_weights=True),
        ModelCheckpoint(folder / "best.pt", save_best_only=True),
        ModelCheckpoint(folder / "last.pt"),
    ]
    history = fit(model, [callbacks[i] for i in order], epochs=8)
    best, last = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("best", "last"))
    return history.history, model.net.state_dict(), best["model_state_dict"], last["model_state_dict"]


@pytest.mark.parametrize(("keep", "orders"), [(False, ORDERS), (True, ORDERS[::5])], ids=["trained", "averaged"])
def test_every_order_of_callbacks_gives_the_same_history_weights_and_files(
    tmp_path: Path, keep: bool, orders: list[tuple[int, ...]]
) -> None:
    results = []
    for i, order in enumerate(orders):
        folder = tmp_path / str(i)
        folder.mkdir()
        results.append(run_in_order(order, folder, keep))
    for result in results[1:]:
        assert result[0] == results[0][0]
        for weights, expected in zip(result[1:], results[0][1:], strict=True):
            assert_same(weights, expected)


def test_early_stopping_restores_the_best_average(tmp_path: Path) -> None:
    history, weights, best, _ = run_in_order(ORDERS[0], tmp_path, False)
    assert len(history["loss"]) < 8
    assert_same(weights, best)
    net = make_net()
    net.load_state_dict(weights)
    _, val = make_data()
    assert make_model(net).evaluate(val, verbose=0)["loss"] == min(history["val_loss"])


PAIRS: dict[str, Callable[[], list[kt.Callback]]] = {
    "EMA, SWA": lambda: [EMA(), SWA(1)],
    "SWA, EMA": lambda: [SWA(1), EMA()],
    "EMA, EMA": lambda: [EMA(), EMA()],
    "SWA, SWA": lambda: [SWA(1), SWA(2)],
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_averages_beside_each_other_are_refused_in_any_order(pair: str) -> None:
    model = make_model()
    before = weights_of(model.net)
    with pytest.raises(ValueError, match="one average"):
        fit(model, PAIRS[pair]())
    assert_same(model.net.state_dict(), before)


# ---- resuming ----


def test_a_resumed_run_keeps_averaging_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, ema = make_model(), EMA(DECAY, keep_average=False)
    fit(whole, ema, epochs=4)
    path = tmp_path / "run.pt"
    fit(make_model(), [EMA(DECAY), ModelCheckpoint(path)], epochs=2)
    model, resumed = make_model(), EMA(DECAY, keep_average=False)
    fit(model, resumed, epochs=4, resume=path, seed=99)
    assert_same(model.net.state_dict(), whole.net.state_dict())
    assert ema.averaged_net is not None
    assert resumed.averaged_net is not None
    assert_same(resumed.averaged_net.state_dict(), ema.averaged_net.state_dict())


def test_a_finished_run_taken_up_again_has_its_average(tmp_path: Path) -> None:
    whole, path = make_model(), tmp_path / "run.pt"
    fit(whole, [EMA(DECAY), ModelCheckpoint(path)])
    model = make_model(with_batch_norm())
    fit(model, EMA(DECAY), resume=path)
    assert_same(model.net.state_dict(), whole.net.state_dict())


def test_a_finished_run_taken_up_with_an_average_that_it_did_not_have_keeps_its_weights(tmp_path: Path) -> None:
    whole, path = make_model(), tmp_path / "run.pt"
    fit(whole, ModelCheckpoint(path))
    model = make_model(with_batch_norm())
    fit(model, EMA(DECAY), resume=path)
    assert_same(model.net.state_dict(), whole.net.state_dict())


# ---- what is refused, and wrapped nets ----


@pytest.mark.parametrize("decay", [0, 1, 0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_decay_outside_0_and_1_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be above 0 and below 1"):
        EMA(decay)


@pytest.mark.parametrize("decay", ["0.9", None, [0.9]])
def test_a_decay_that_is_no_number_is_refused_by_name(decay: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="decay"):
        EMA(decay)


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lock = nn.Linear(6, 3), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.cached = self.layer.weight * 2  # no leaf

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("cls", [Locked, Caching])
def test_a_net_that_can_not_be_copied_is_refused_saying_so(cls: type[nn.Module]) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"EMA.*{cls.__name__}|{cls.__name__}.*EMA"):
        fit(make_model(cls()), EMA())


def test_a_data_parallel_net_is_averaged_as_the_net_inside(tmp_path: Path) -> None:
    expected, path = make_model(), tmp_path / "last.pt"
    fit(expected, EMA(DECAY))
    model = make_model(nn.DataParallel(make_net()))
    fit(model, [EMA(DECAY), ModelCheckpoint(path)])
    assert_same(model.net.module.state_dict(), expected.net.state_dict())
    assert_same(torch.load(path, weights_only=True)["model_state_dict"], expected.net.state_dict())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_net_is_averaged_and_validated_on_its_average(in_place: bool, tmp_path: Path) -> None:
    expected, path = make_model(make_net("plain")), tmp_path / "last.pt"
    expected_history = fit(expected, EMA(DECAY))
    net = make_net("plain")
    if in_place:
        net.compile(backend="eager")
    else:
        net = torch.compile(net, backend="eager")
    model = make_model(net)
    history = fit(model, [EMA(DECAY), ModelCheckpoint(path)])
    assert_same(torch.load(path, weights_only=True)["model_state_dict"], expected.net.state_dict())
    assert history.history == expected_history.history


class Remembering(nn.Linear):
    """Counts its training batches outside of parameters and buffers."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += self.training
        return super().forward(x)

    def get_extra_state(self) -> Any:
        return {"batches": self.batches}

    def set_extra_state(self, state: Any) -> None:
        self.batches = state["batches"]


@pytest.mark.parametrize("average", [EMA(DECAY), SWA(0)])
def test_extra_state_is_the_nets_in_the_file_and_after_fit(average: kt.Callback, tmp_path: Path) -> None:
    net = Remembering()
    model = kt.Model(nn.Sequential(net), device="cpu")
    model.compile("cross_entropy", "sgd")
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    model.fit(x, y, batch_size=4, epochs=2, callbacks=[average, ModelCheckpoint(tmp_path / "a.pt")], verbose=0)
    assert net.batches == 6
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["model_state_dict"]["0._extra_state"] == {"batches": 6}
    assert not torch.equal(content["model_state_dict"]["0.weight"], content["training_model_state_dict"]["0.weight"])
