"""LearningRateScheduler: what schedule is given, what may come back, which rates are set, and what the logs hold."""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import (
    EarlyStopping,
    LambdaCallback,
    LearningRateScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
)

X, Y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.zeros(4, 1)


def make_net() -> nn.Linear:
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(0.0)
    return net


def make_model(lr: Any = 0.1, **arguments: Any) -> kt.Model:
    model = kt.Model(make_net(), device="cpu")
    model.compile("mse", lambda parameters: torch.optim.SGD(parameters, lr=lr), **arguments)
    return model


def fit(model: kt.Model, *callbacks: kt.Callback, epochs: int = 3, **arguments: Any) -> kt.History:
    arguments = {"validation_data": (X, Y), **arguments}
    return model.fit(X, Y, epochs=epochs, shuffle=False, callbacks=callbacks, verbose=0, **arguments)


def rates(schedule: Any, epochs: int = 3, lr: float = 1.0) -> list[Any]:
    return fit(make_model(lr), LearningRateScheduler(schedule), epochs=epochs).history["learning_rate"]


# ---- what schedule takes ----


def test_a_schedule_of_two_gets_the_epoch_and_the_rate_so_far() -> None:
    seen: list[tuple[int, float]] = []

    def schedule(epoch: int, lr: float) -> float:
        seen.append((epoch, lr))
        return lr / 2

    assert rates(schedule) == [0.5, 0.25, 0.125]
    assert seen == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_a_schedule_of_one_gets_the_epoch() -> None:
    assert rates(lambda epoch: 0.5**epoch) == [1.0, 0.5, 0.25]


def test_the_epoch_counts_from_initial_epoch() -> None:
    history = fit(make_model(), LearningRateScheduler(lambda epoch: epoch / 8), initial_epoch=2, epochs=4)
    assert history.history["learning_rate"] == [0.25, 0.375]


def drop(epoch: int, rate: float, step: int = 1) -> float:
    return rate / 2 if epoch >= step else rate


class Table:
    def __call__(self, index: int) -> float:
        return [0.5, 0.25, 0.125][index]

    def halve(self, epoch: int, lr: float) -> float:
        return lr / 2


def give_both(*arguments: float) -> float:
    assert len(arguments) == 2
    return 0.5


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (drop, [1.0, 0.5, 0.25]),
        (functools.partial(drop, step=2), [1.0, 1.0, 0.5]),
        (functools.partial(drop, rate=0.25), [0.25, 0.125, 0.125]),  # leaves (epoch)
        (Table(), [0.5, 0.25, 0.125]),
        (Table().halve, [0.5, 0.25, 0.125]),
        (lambda epoch, lr=0.0: lr / 2, [0.5, 0.25, 0.125]),
        (lambda epoch, learning_rate=0.0: learning_rate / 2, [0.5, 0.25, 0.125]),
        (lambda epoch, *, decay=0.5: decay**epoch, [1.0, 0.5, 0.25]),
        (give_both, [0.5, 0.5, 0.5]),
    ],
)
def test_the_signature_says_which_of_the_two_it_takes(schedule: Any, expected: list[float]) -> None:
    assert rates(schedule) == expected


@pytest.mark.parametrize(
    "schedule", [lambda: 0.1, lambda a, b, c: 0.1, lambda *, epoch: 0.1, lambda epoch, lr, *, decay: 0.1]
)
def test_another_signature_is_refused_when_made(schedule: Any) -> None:
    with pytest.raises(TypeError, match=r"schedule must take \(epoch, lr\) or \(epoch\), but it takes \("):
        LearningRateScheduler(schedule)


def test_a_second_parameter_with_a_default_that_is_not_the_rate_is_refused_when_made() -> None:
    with pytest.raises(TypeError, match=r"\(epoch, decay=0\.5\) has 'decay', with a default.* lambda epoch: \.\.\."):
        LearningRateScheduler(lambda epoch, decay=0.5: decay**epoch)


def test_what_cannot_be_called_or_read_is_refused_when_made() -> None:
    with pytest.raises(TypeError, match=r"must be a function of \(epoch, lr\) or \(epoch\), got float"):
        LearningRateScheduler(0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(make_net().parameters(), lr=0.1), 1)
    with pytest.raises(TypeError, match=r"got StepLR; a torch scheduler goes to compile\(lr_scheduler="):
        LearningRateScheduler(scheduler)
    with pytest.raises(TypeError, match=r"what schedule=.* takes can't be read"):
        LearningRateScheduler(min)


def test_a_type_error_inside_schedule_comes_out_as_it_is() -> None:
    calls: list[int] = []

    def schedule(epoch: int, lr: float) -> float:
        calls.append(epoch)
        raise TypeError("of the schedule's own")

    with pytest.raises(TypeError, match=r"^of the schedule's own$"):
        fit(make_model(), LearningRateScheduler(schedule))
    assert calls == [0]  # not tried again with the epoch alone


# ---- what may come back ----


@pytest.mark.parametrize("value", [0.5, 1, 0, np.float32(0.5), np.float64(0.5), np.int64(1), Fraction(1, 2)])
def test_any_finite_number_from_0_is_a_rate(value: Any) -> None:
    model = make_model()
    fit(model, LearningRateScheduler(lambda epoch: value), epochs=1)
    assert model.optimizer is not None
    rate = model.optimizer.param_groups[0]["lr"]
    assert rate == value
    assert type(rate) is float


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (math.nan, ValueError, r"finite rate >= 0; in epoch 1 it returned nan"),
        (math.inf, ValueError, r"finite rate >= 0; in epoch 1 it returned inf"),
        (-0.1, ValueError, r"finite rate >= 0; in epoch 1 it returned -0\.1"),
        (None, TypeError, r"must return a number, a float; in epoch 1 it returned None \(NoneType\)"),
        ("0.1", TypeError, r"in epoch 1 it returned '0\.1' \(str\)"),
        (True, TypeError, r"in epoch 1 it returned True \(bool\)"),
        (0.1 + 0j, TypeError, r"in epoch 1 it returned .* \(complex\)"),
        (torch.tensor(0.1), TypeError, r"in epoch 1 it returned tensor\(0\.1000\) \(Tensor\)"),
    ],
)
def test_anything_else_is_refused_naming_it_and_the_epoch(value: Any, error: type[Exception], message: str) -> None:
    model = make_model()
    with pytest.raises(error, match=message):
        fit(model, LearningRateScheduler(lambda epoch: 0.5 if epoch == 0 else value))
    assert model.optimizer is not None
    assert model.optimizer.param_groups[0]["lr"] == 0.5


# ---- what is set ----


def test_all_groups_get_the_rate() -> None:
    model = make_model(param_groups={"bias": {"lr": 0.7}})
    fit(model, LearningRateScheduler(lambda epoch, lr: lr / 2), epochs=1)
    assert model.optimizer is not None
    assert [group["lr"] for group in model.optimizer.param_groups] == [0.05, 0.05]


def test_a_tensor_is_filled_in_place() -> None:
    lr = torch.tensor(1.0)
    model = kt.Model(make_net(), device="cpu")
    model.compile("mse", lambda parameters: torch.optim.Adam(parameters, lr=lr))
    history = fit(model, LearningRateScheduler(lambda epoch, lr: lr / 2))
    assert model.optimizer is not None
    assert model.optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.125
    assert history.history["learning_rate"] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("loop", ["script", "function", "class"])
def test_every_loop_trains_with_the_rates_set(loop: str) -> None:
    model = make_model(loop=loop)
    fit(model, LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1)), batch_size=2)

    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (epoch + 1)
        for rows in (slice(0, 2), slice(2, 4)):
            nn.functional.mse_loss(net(X[rows]), Y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model.net.weight, net.weight)
    assert torch.equal(model.net.bias, net.bias)


def test_a_second_fit_begins_again_at_epoch_0() -> None:
    callback, model = LearningRateScheduler(lambda epoch: 0.5 ** (epoch + 1)), make_model()
    for _ in range(2):
        assert fit(model, callback, epochs=2).history["learning_rate"] == [0.5, 0.25]


# ---- logs and neighbours ----


def test_later_callbacks_and_history_see_the_rate() -> None:
    seen: list[float] = []
    look = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["learning_rate"]))
    history = fit(make_model(), LearningRateScheduler(lambda epoch: 0.5**epoch), look)
    assert seen == [1.0, 0.5, 0.25]
    assert list(history.history) == ["loss", "val_loss", "learning_rate"]


ADDERS: list[Callable[[], kt.Callback]] = [lambda: LearningRateScheduler(lambda epoch: 0.5**epoch), ReduceLROnPlateau]


@pytest.mark.parametrize("make", ADDERS)
def test_learning_rate_can_be_monitored_and_named_in_a_file_by_later_callbacks(
    tmp_path: Path, make: Callable[[], kt.Callback]
) -> None:
    stopper = EarlyStopping("learning_rate", mode="max")
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}-{learning_rate:.2f}.pt")
    history = fit(make_model(0.5), make(), stopper, checkpoint)
    assert stopper.best == history.history["learning_rate"][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{epoch + 1}-{rate:.2f}.pt" for epoch, rate in enumerate(history.history["learning_rate"])
    ]


@pytest.mark.parametrize("make", ADDERS)
def test_learning_rate_is_refused_before_the_first_step_in_callbacks_that_stand_earlier(
    tmp_path: Path, make: Callable[[], kt.Callback]
) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"monitor='learning_rate' is not in the logs"):
        fit(model, EarlyStopping("learning_rate", mode="max"), make())
    with pytest.raises(KeyError, match=r"names 'learning_rate'"):
        fit(model, ModelCheckpoint(tmp_path / "{learning_rate}.pt"), make())
    assert model.history.epoch == []


@pytest.mark.parametrize("make", ADDERS)
def test_a_misspelt_monitor_beside_it_is_still_refused_before_the_first_step(make: Callable[[], kt.Callback]) -> None:
    model = make_model()
    for name in ("val_lss", "val_learning_rate"):
        with pytest.raises(ValueError, match=rf"monitor='{name}' is not in the logs; .* Known: .*, learning_rate\."):
            fit(model, make(), make(), EarlyStopping(name))
    assert model.history.epoch == []


def test_early_stopping_ends_the_schedule() -> None:
    epochs: list[int] = []

    def schedule(epoch: int, lr: float) -> float:
        epochs.append(epoch)
        return 0.0  # nothing is learnt

    assert fit(make_model(), LearningRateScheduler(schedule), EarlyStopping(patience=2), epochs=9).epoch == [0, 1, 2]
    assert epochs == [0, 1, 2]


def test_a_schedule_of_the_rate_so_far_goes_on_from_what_a_plateau_left() -> None:
    pair = LearningRateScheduler(lambda epoch, lr: lr), ReduceLROnPlateau(factor=0.5, patience=1, min_delta=1e6)
    history = fit(make_model(0.1), *pair, epochs=4)
    assert history.history["learning_rate"] == [0.1, 0.1, 0.05, 0.025]


def test_it_is_refused_beside_a_scheduler_of_compile() -> None:
    factories: list[Callable[..., Any] | str] = [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "reduce_on_plateau",
    ]
    for factory, name in zip(factories, ("StepLR", "ReduceLROnPlateau"), strict=True):
        model = make_model(lr_scheduler=factory)
        message = rf"LearningRateScheduler and compile\(lr_scheduler=\.\.\.\), a {name}, .* leave one of them out"
        with pytest.raises(ValueError, match=message):
            fit(model, LearningRateScheduler(lambda epoch: 0.1))
        assert model.history.epoch == []


def test_verbose_prints_each_rate(capsys: pytest.CaptureFixture[str]) -> None:
    fit(make_model(), LearningRateScheduler(lambda epoch: 0.5**epoch, verbose=1), epochs=2)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 1: learning rate set to 1.",
        "Epoch 2: learning rate set to 0.5.",
    ]


def test_it_is_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    fit(make_model(), LearningRateScheduler(lambda epoch: 0.1))
    assert capsys.readouterr().out == ""
