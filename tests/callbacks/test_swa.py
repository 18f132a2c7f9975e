"""SWA: the average of torch's own recipe, AveragedModel and update_bn, what sees it, and what it leaves alone."""

import copy
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import SWA, EarlyStopping, LambdaCallback, ModelCheckpoint
from kerastorch.device import get_random_state
from kerastorch.loops import LOOPS

# All loops agree in test_loops.py; where they are not the point, the others are for the slow part.
mostly_one_loop = pytest.mark.parametrize(
    "loop", ["script", *(pytest.param(loop, marks=pytest.mark.slow) for loop in LOOPS if loop != "script")]
)
EPOCHS = 4


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12, momentum=0.3), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3)
    )


def without_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12, track_running_stats=False), nn.Linear(12, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "batch norm": with_batch_norm,
    "batch norm without statistics": without_statistics,
}


def make_net(name: str = "batch norm") -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


def tensors(rows: int = 29, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def make_data(**arguments: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Six batches, the last one short, and three others to validate on."""
    arguments = {"batch_size": 5, "shuffle": True, **arguments}
    return DataLoader(TensorDataset(*tensors()), **arguments), DataLoader(TensorDataset(*tensors(13, 7)), 5)


def make_model(net: nn.Module | None = None, **arguments: Any) -> kt.Model:
    net = make_net() if net is None else net
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9), ["accuracy"], **arguments)
    return model


def fit(
    model: kt.Model, callbacks: Any, epochs: int = EPOCHS, train: Any = None, seed: int = 2, **arguments: Any
) -> Any:
    own, val = make_data()
    torch.manual_seed(seed)
    arguments = {"validation_data": val, "verbose": 0, **arguments}
    return model.fit(own if train is None else train, epochs=epochs, callbacks=callbacks, **arguments)


def assert_same(weights: Any, other: Any) -> None:
    assert list(weights) == list(other)
    for name in weights:
        assert torch.equal(weights[name], other[name]), name


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(net.state_dict()))


def train_by_hand(net: nn.Module, start: int, epochs: int = EPOCHS) -> tuple[nn.Module | None, list[float]]:
    """Torch's recipe, its statistics taken after each epoch so that validation can use them."""
    train, val = make_data()
    torch.manual_seed(2)
    optimizer, loss_fn = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9), nn.CrossEntropyLoss()
    average: AveragedModel | None = None
    val_losses = []
    for epoch in range(epochs):
        net.train()
        for x, y in train:
            loss_fn(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if epoch >= start:
            average = AveragedModel(net) if average is None else average
            average.update_parameters(net)
            state = torch.get_rng_state()
            update_bn(train, average)
            torch.set_rng_state(state)
        seen = net if average is None else average
        seen.eval()
        with torch.no_grad():
            losses = [loss_fn(seen(x), y).item() * len(x) for x, y in val]
        val_losses.append(sum(losses) / 13)
    return None if average is None else average.module, val_losses


# ---- the average ----


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("name", NETS)
@mostly_one_loop
def test_average_training_weights_and_validation_equal_torchs_recipe_to_the_bit(
    loop: str, name: str, start: int
) -> None:
    by_hand = make_net(name)
    average, val_losses = train_by_hand(by_hand, start)
    assert average is not None
    model, swa = make_model(make_net(name), loop=loop), SWA(start, keep_average=False)
    history = fit(model, swa)
    assert swa.averaged_net is not None
    assert_same(swa.averaged_net.module.state_dict(), average.state_dict())
    assert_same(model.net.state_dict(), by_hand.state_dict())
    assert history.history["val_loss"] == val_losses


def test_average_is_the_mean_over_the_epochs_from_start_epoch_on() -> None:
    model, ends = make_model(make_net("plain")), []
    keep = LambdaCallback(on_train_epoch_end=lambda epoch, logs: ends.append(weights_of(model.net)))
    fit(model, [SWA(1), keep])
    for name, value in model.net.state_dict().items():
        torch.testing.assert_close(value, torch.stack([weights[name] for weights in ends[1:]]).mean(0))


def test_statistics_are_those_of_the_average_over_all_training_data() -> None:
    model = make_model()
    fit(model, SWA(1))
    linear, norm = model.net[0], model.net[1]
    with torch.no_grad():
        x, _ = tensors()
        hidden = linear(x)
    assert norm.num_batches_tracked == 6
    assert norm.momentum == 0.3
    torch.testing.assert_close(norm.running_mean, hidden.mean(0), atol=0.15, rtol=0.1)


@pytest.mark.parametrize("start", [EPOCHS, EPOCHS + 5])
def test_where_start_epoch_is_never_reached_the_net_is_left_alone(start: int) -> None:
    without, model, swa = make_model(), make_model(), SWA(start)
    expected = fit(without, None)
    history = fit(model, swa)
    assert swa.averaged_net is None
    assert history.history == expected.history
    assert_same(model.net.state_dict(), without.net.state_dict())


def test_start_epoch_counts_as_initial_epoch_does() -> None:
    swa = SWA(3)
    fit(make_model(), swa, epochs=5, initial_epoch=2)
    assert swa.averaged_net is not None
    assert swa.averaged_net.n_averaged == 2


def test_keep_average_decides_what_the_net_has_after_fit() -> None:
    by_hand = make_net()
    average, _ = train_by_hand(by_hand, 1)
    assert average is not None
    for keep, expected in ((True, average), (False, by_hand)):
        model = make_model()
        fit(model, SWA(1, keep_average=keep))
        assert_same(model.net.state_dict(), expected.state_dict())


def test_a_second_fit_averages_anew() -> None:
    model, swa = make_model(), SWA(1, keep_average=False)
    fit(model, swa, epochs=3)
    first = swa.averaged_net
    fit(model, swa, epochs=2)
    assert swa.averaged_net is not first
    assert swa.averaged_net is not None
    assert swa.averaged_net.n_averaged == 1
    fit(model, swa, epochs=1)
    assert swa.averaged_net is None


def test_a_scheduler_of_torchs_swa_works_beside_it() -> None:
    model = make_model(lr_scheduler=lambda optimizer: SWALR(optimizer, swa_lr=0.05, anneal_epochs=2))
    fit(model, SWA(2))
    assert model.optimizer is not None
    assert model.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_statistics_are_taken_under_accumulation_and_bf16_too() -> None:
    model, swa = make_model(gradient_accumulation_steps=4, mixed_precision="bf16"), SWA(1, keep_average=False)
    fit(model, swa)
    assert swa.averaged_net is not None
    statistics = swa.averaged_net.module[1]
    assert statistics.num_batches_tracked == 6
    assert not torch.equal(statistics.running_mean, model.net[1].running_mean)


# ---- what is left alone ----


def test_training_and_random_states_are_as_without() -> None:
    without, model = make_model(), make_model()
    states = []
    for one, callbacks in ((without, None), (model, SWA(1, keep_average=False))):
        random.seed(4)
        np.random.seed(4)
        history = fit(one, callbacks)
        states.append((random.random(), np.random.rand(), torch.rand(()).item(), history.history["loss"]))
    assert states[0] == states[1]
    assert_same(model.net.state_dict(), without.net.state_dict())


def test_generators_of_the_loader_are_left_where_they_were() -> None:
    losses, states = [], []
    for callbacks in (None, SWA(0, keep_average=False)):
        generator = torch.Generator().manual_seed(3)
        train, _ = make_data(generator=generator)
        losses.append(fit(make_model(), callbacks, train=train).history["loss"])
        states.append(generator.get_state())
    assert losses[0] == losses[1]
    assert torch.equal(states[0], states[1])


def test_transforms_draw_as_without() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.randn(6) + float(np.random.randn()) + random.random(), y

    losses = []
    for callbacks in (None, SWA(0, keep_average=False)):
        random.seed(4)
        np.random.seed(4)
        losses.append(fit(make_model(), callbacks, train=DataLoader(Noisy(*tensors()), 5)).history["loss"])
    assert losses[0] == losses[1]


def test_training_flags_are_as_before_and_weights_need_gradients() -> None:
    model, swa = make_model(), SWA(1)
    model.net[3].eval()
    flags = [module.training for module in model.net.modules()]
    fit(model, swa)
    assert [module.training for module in model.net.modules()] == flags
    assert all(parameter.requires_grad for parameter in model.net.parameters())


class FrozenNorm(nn.Module):
    """Batch norm that stays in eval mode, as fine-tuning on small batches keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)
        nn.init.constant_(self.norm.running_mean, 0.5)
        nn.init.constant_(self.norm.running_var, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)))

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.norm.eval()
        return self


def test_batch_norm_that_the_net_keeps_in_eval_mode_keeps_its_statistics() -> None:
    model = make_model(FrozenNorm())
    fit(model, SWA(1))
    assert torch.equal(model.net.norm.running_mean, torch.full((12,), 0.5))
    assert torch.equal(model.net.norm.running_var, torch.full((12,), 4.0))


# ---- what sees it ----


def test_validation_logs_are_those_of_the_average_from_start_epoch_on() -> None:
    model, swa, expected = make_model(), SWA(2, keep_average=False), []
    _, val = make_data()

    def evaluate(epoch: int, logs: Any) -> None:
        seen = model.net if swa.averaged_net is None else swa.averaged_net.module
        expected.append(make_model(copy.deepcopy(seen)).evaluate(val, verbose=0)["loss"])

    for order in (1, -1):
        expected.clear()
        history = fit(model, [swa, LambdaCallback(on_test_begin=lambda logs: evaluate(0, logs))][::order])
        assert history.history["val_loss"] == expected


def test_checkpoints_and_early_stopping_have_the_average_in_any_order(tmp_path: Path) -> None:
    results = []
    for i, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 0, 2)]):
        folder = tmp_path / str(i)
        callbacks = [
            SWA(1),
            ModelCheckpoint(folder / "last.pt"),
            EarlyStopping(patience=2, restore_best_weights=True),
        ]
        model = make_model()
        history = fit(model, [callbacks[j] for j in order], epochs=6)
        content = torch.load(folder / "last.pt", weights_only=True)
        results.append((history.history, content["model_state_dict"], model.net.state_dict()))
        _, val = make_data()
        assert model.evaluate(val, verbose=0)["loss"] == min(history.history["val_loss"])
    for history, *weights in results[1:]:
        assert history == results[0][0]
        for one, other in zip(weights, results[0][1:], strict=True):
            assert_same(one, other)


def test_checkpoints_before_start_epoch_hold_the_nets_weights_alone(tmp_path: Path) -> None:
    fit(make_model(), [SWA(1), ModelCheckpoint(tmp_path / "{epoch}.pt")], epochs=2)
    before, after = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in (1, 2))
    assert "training_model_state_dict" not in before
    assert "training_model_state_dict" in after


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_averages_as_if_it_had_not_stopped(tmp_path: Path, stop_after: int) -> None:
    whole, swa = make_model(), SWA(1, keep_average=False)
    fit(whole, swa, epochs=5)
    path = tmp_path / "run.pt"
    fit(make_model(), [SWA(1), ModelCheckpoint(path)], epochs=stop_after)
    model, resumed = make_model(with_batch_norm()), SWA(1, keep_average=False)
    fit(model, resumed, epochs=5, resume=path, seed=99)
    assert_same(model.net.state_dict(), whole.net.state_dict())
    assert swa.averaged_net is not None
    assert resumed.averaged_net is not None
    assert_same(resumed.averaged_net.state_dict(), swa.averaged_net.state_dict())


# ---- data of other kinds ----


def statistics_of(loader: Any, steps: int | None = None, **arguments: Any) -> nn.BatchNorm1d:
    model = make_model()
    fit(model, SWA(0), epochs=3, train=loader, steps_per_epoch=steps, validation_data=None, **arguments)
    return model.net[1]


@pytest.mark.parametrize("steps", [1, 4, 6, 8, 13])
def test_steps_per_epoch_read_the_same_batches_as_without(steps: int) -> None:
    losses = []
    for callbacks in (None, SWA(0, keep_average=False)):
        train, _ = make_data()
        losses.append(fit(make_model(), callbacks, train=train, steps_per_epoch=steps).history["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("steps", "batches"), [(4, 4), (6, 6), (8, 6), (None, 6)])
def test_statistics_are_taken_over_an_epochs_worth_of_data_at_most_a_pass(steps: int | None, batches: int) -> None:
    train, _ = make_data()
    assert statistics_of(train, steps).num_batches_tracked == batches


class Stream(IterableDataset[Any]):
    """The rows one by one, without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(zip(*tensors(), strict=True)))


@pytest.mark.parametrize("steps", [None, 4, 6, 8])
def test_a_stream_without_length_gives_statistics_without_a_warning(steps: int | None) -> None:
    assert statistics_of(DataLoader(Stream(), 5), steps).num_batches_tracked == min(steps or 6, 6)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Linear(3, 4), nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.norm(self.left(left) + self.right(right)))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda left, right: (left, right),
    "dict": lambda left, right: {"right": right, "left": left},
    "named tuple": Pair,
}


@pytest.mark.parametrize("form", FORMS)
def test_several_inputs_reach_the_net_as_in_training(form: str) -> None:
    x, y = tensors()
    batches = [(FORMS[form](x[i : i + 5, :3], x[i : i + 5, 3:]), y[i : i + 5]) for i in range(0, 25, 5)]
    torch.manual_seed(0)
    net = TwoInputs()
    by_hand = copy.deepcopy(net)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.2, momentum=0.9)
    average = AveragedModel(by_hand)
    for _ in range(2):
        for i in range(0, 25, 5):
            nn.functional.cross_entropy(by_hand(x[i : i + 5, :3], x[i : i + 5, 3:]), y[i : i + 5]).backward()
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(by_hand)
    norm = average.module.norm
    norm.reset_running_stats()
    norm.momentum = None
    with torch.no_grad():
        for i in range(0, 25, 5):
            average(x[i : i + 5, :3], x[i : i + 5, 3:])
    model = make_model(net)
    model.fit(batches, epochs=2, verbose=0, callbacks=SWA(0))
    assert_same(model.net.state_dict(), average.module.state_dict())


def test_unpack_and_weights_of_samples_reach_the_second_pass() -> None:
    x, y = tensors()
    batches = [{"image": x[i : i + 5], "label": y[i : i + 5]} for i in range(0, 25, 5)]
    model = make_model(unpack=lambda batch: (batch["image"], batch["label"], torch.ones(len(batch["label"]))))
    model.fit(batches, epochs=2, verbose=0, callbacks=SWA(0), class_weight={0: 2.0})
    assert model.net[1].num_batches_tracked == 5


def test_arrays_and_validation_split_leave_validation_rows_out_of_the_statistics() -> None:
    x, y = tensors()
    x[20:] += 1000
    model = make_model()
    model.fit(x, y, batch_size=5, validation_split=9 / 29, epochs=2, verbose=0, callbacks=SWA(0))
    assert model.net[1].num_batches_tracked == 4
    assert model.net[1].running_mean.abs().max() < 50


def test_an_iterator_is_refused_with_batch_norm_before_the_first_step() -> None:
    model = make_model()
    before = weights_of(model.net)
    batches = [(x.unsqueeze(0), y.unsqueeze(0)) for x, y in zip(*tensors(), strict=True)]
    with pytest.raises(ValueError, match=r"SWA.*iterator.*read once"):
        model.fit(iter(batches), verbose=0, callbacks=SWA(0))
    assert_same(model.net.state_dict(), before)


@pytest.mark.parametrize("name", ["plain", "batch norm without statistics"])
def test_an_iterator_will_do_where_there_are_no_statistics(name: str) -> None:
    x, y = tensors()
    model, swa = make_model(make_net(name)), SWA(0)
    model.fit(iter([(x, y), (x, y)]), verbose=0, callbacks=swa)
    assert swa.averaged_net is not None


LOADERS: dict[str, dict[str, Any]] = {
    "workers": {"num_workers": 2},
    "persistent workers": {"num_workers": 2, "persistent_workers": True},
}


@pytest.mark.parametrize(
    ("workers", "steps"),
    [
        ("persistent workers", 4),
        *(pytest.param("workers", steps, marks=pytest.mark.slow) for steps in (None, 4)),
        pytest.param("persistent workers", None, marks=pytest.mark.slow),
    ],
)
def test_with_workers_average_and_training_are_as_without_workers(workers: str, steps: int | None) -> None:
    results = []
    for arguments in ({}, LOADERS[workers]):
        rows = TensorDataset(*tensors())
        order = RandomSampler(rows, generator=torch.Generator().manual_seed(3))
        model, swa = make_model(plain_norm()), SWA(1, keep_average=False)
        train = DataLoader(rows, 5, sampler=order, **arguments)
        fit(model, swa, epochs=3, train=train, steps_per_epoch=steps, validation_data=None)
        assert swa.averaged_net is not None
        results.append((model.net.state_dict(), swa.averaged_net.state_dict()))
    for with_workers, without in zip(results[1], results[0], strict=True):
        assert_same(with_workers, without)


def plain_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))


@pytest.mark.parametrize("steps", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_persistent_workers_read_the_same_training_batches_as_without_swa(steps: int | None) -> None:
    losses = []
    for callbacks in (None, SWA(0, keep_average=False)):
        train = DataLoader(TensorDataset(*tensors()), 5, num_workers=2, persistent_workers=True)
        model = make_model(plain_norm())
        history = fit(model, callbacks, epochs=3, train=train, steps_per_epoch=steps, validation_data=None)
        losses.append(history.history["loss"])
    assert losses[0] == losses[1]


# ---- arguments ----


@pytest.mark.parametrize("start", [-1, 1.5, "3", None])
def test_a_start_epoch_that_is_no_index_is_refused_by_name(start: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="start_epoch"):
        SWA(start)


def test_state_dict_is_empty_before_the_average_begins() -> None:
    assert SWA(3).state_dict() == {}


def test_the_states_that_fit_leaves_are_those_of_a_fit_without_checkpoints_too(tmp_path: Path) -> None:
    states = []
    for callbacks in ([SWA(1)], [SWA(1), ModelCheckpoint(tmp_path / "last.pt")]):
        fit(make_model(), callbacks)
        states.append(get_random_state()["torch"])
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("nth", [1, 4, 6])
@mostly_one_loop
def test_an_interrupt_cuts_the_statistics_at_a_batch_and_the_resumed_run_ends_the_same(
    loop: str, nth: int, tmp_path: Path
) -> None:
    read: list[int] = []  # batches since the last epoch's training ended

    def collate(rows: Any) -> Any:
        read.append(len(rows))
        if is_armed and len(read) == nth:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.utils.data.default_collate(rows)

    def arm(epoch: int, logs: Any) -> None:
        nonlocal is_armed
        read.clear()
        is_armed = epoch == 2

    is_armed = False
    data, _ = make_data(collate_fn=collate)
    straight = make_model(loop=loop)
    fit(straight, SWA(1), train=data)

    model, callbacks = make_model(loop=loop), [LambdaCallback(on_train_epoch_end=arm), SWA(1)]
    path = tmp_path / "a.pt"
    history = fit(model, [*callbacks, ModelCheckpoint(path)], train=data, on_interrupt="return")
    assert history.epoch == [0, 1]
    assert len(read) == nth
    assert torch.load(path, weights_only=True)["callbacks"]["SWA"]["n_averaged"] == 1

    resumed = make_model(loop=loop)
    history = fit(resumed, [SWA(1), ModelCheckpoint(path)], train=data, resume=True, seed=9)
    assert history.epoch == [0, 1, 2, 3]
    assert_same(resumed.net.state_dict(), straight.net.state_dict())
