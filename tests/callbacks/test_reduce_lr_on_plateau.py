"""ReduceLROnPlateau, driven by a script of values: when it reduces, by how much, which rates, what the logs hold."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import EarlyStopping, LambdaCallback, ReduceLROnPlateau

NAN = math.nan
X, Y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.zeros(4, 1)


class Script(kt.Callback):
    """Sets a key of the logs to the next value of a list."""

    def __init__(self, values: list[float], key: str = "val_loss") -> None:
        self.values, self.key = values, key

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs[self.key] = self.values[epoch]


def make_model(lr: Any = 1.0, loop: str = "script", **arguments: Any) -> kt.Model:
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(0.0)
        net.bias.fill_(0.0)  # the outputs are the targets: nothing moves, whatever the rate
    model = kt.Model(net, device="cpu")
    model.compile("mse", lambda parameters: torch.optim.SGD(parameters, lr=lr), loop=loop, **arguments)
    return model


def fit(model: kt.Model, *callbacks: kt.Callback, epochs: int = 1, **arguments: Any) -> kt.History:
    arguments = {"validation_data": (X, Y), **arguments}
    return model.fit(X, Y, epochs=epochs, shuffle=False, callbacks=callbacks, verbose=0, **arguments)


def rates(values: list[float], callback: ReduceLROnPlateau, *, key: str = "val_loss", lr: float = 1.0) -> list[float]:
    """Return the rate that each epoch trained with, and the one left at the end."""
    model = make_model(lr)
    history = fit(model, Script(values, key), callback, epochs=len(values))
    return [*history.history["learning_rate"], rate_of(model)]


def rate_of(model: kt.Model, group: int = 0) -> float:
    assert model.optimizer is not None
    return float(model.optimizer.param_groups[group]["lr"])


# ---- when ----


@pytest.mark.parametrize(
    ("patience", "expected"),
    [
        (0, [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625]),
        (1, [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625]),
        (2, [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]),
        (3, [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]),
        (4, [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]),
        (5, [1.0] * 6),
    ],
)
def test_reduces_after_patience_epochs_without_gain(patience: int, expected: list[float]) -> None:
    assert rates([1.0] * 5, ReduceLROnPlateau(factor=0.5, patience=patience)) == expected


def test_a_gain_resets_the_wait() -> None:
    values = [5.0, 6.0, 4.0, 6.0, 3.0, 6.0, 6.0, 6.0]
    assert rates(values, ReduceLROnPlateau(factor=0.5, patience=2)) == [1.0] * 7 + [0.5, 0.5]


def test_it_compares_with_the_best_and_not_with_the_last_value() -> None:
    assert rates([1.0, 4.0, 3.0, 2.0], ReduceLROnPlateau(factor=0.5, patience=3)) == [1.0] * 4 + [0.5]


@pytest.mark.parametrize(
    ("min_delta", "values", "reduces"),
    [
        (0.0, [2.0, 1.99], False),
        (0.5, [2.0, 1.5], True),  # a gain of just min_delta is none
        (0.5, [2.0, 1.25], False),
        (1e-4, [2.0, 1.99995], True),
    ],
)
def test_a_gain_must_exceed_min_delta(min_delta: float, values: list[float], reduces: bool) -> None:
    callback = ReduceLROnPlateau(factor=0.5, patience=1, min_delta=min_delta)
    assert (rates(values, callback)[-1] == 0.5) is reduces


def test_min_delta_is_a_ten_thousandth_by_default() -> None:
    assert rates([2.0, 1.99995], ReduceLROnPlateau(patience=1))[-1] == pytest.approx(0.1)
    assert rates([2.0, 1.9998], ReduceLROnPlateau(patience=1))[-1] == 1.0


def test_ten_epochs_and_a_tenth_are_the_defaults() -> None:
    assert rates([1.0] * 11, ReduceLROnPlateau()) == [1.0] * 11 + [0.1]


def test_nan_is_never_a_gain() -> None:
    callback = ReduceLROnPlateau(factor=0.5, patience=2)
    assert rates([NAN, NAN, 3.0, NAN, 2.0, NAN, NAN], callback) == [1.0, 1.0] + [0.5] * 5 + [0.25]
    assert callback.best == 2.0


def test_mode_max_takes_higher_for_better() -> None:
    callback = ReduceLROnPlateau("score", factor=0.5, patience=1, mode="max")
    assert rates([1.0, 2.0, 1.5, 3.0], callback, key="score") == [1.0, 1.0, 1.0, 0.5, 0.5]


def test_mode_auto_asks_the_metric() -> None:
    model = make_model(metrics={"error": "mae"})
    script = Script([1.0, 2.0, 0.5], "error")
    fit(model, script, ReduceLROnPlateau("error", factor=0.5, patience=1), epochs=3)
    assert rate_of(model) == 0.5


@pytest.mark.parametrize(
    ("cooldown", "expected"),  # of a value that never gets better, with a patience of 1
    [
        (0, [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        (1, [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125]),
        (2, [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]),
        (3, [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25]),
    ],
)
def test_cooldown_is_that_many_epochs(cooldown: int, expected: list[float]) -> None:
    assert rates([1.0] * 6, ReduceLROnPlateau(factor=0.5, patience=1, cooldown=cooldown)) == expected


def test_a_gain_during_cooldown_is_the_best_from_then_on() -> None:
    callback = ReduceLROnPlateau(factor=0.5, patience=1, cooldown=1)
    assert rates([2.0, 2.0, 1.0, 1.5], callback) == [1.0, 1.0, 0.5, 0.5, 0.25]
    assert callback.best == 1.0


def test_epochs_without_validation_count_for_nothing() -> None:
    values = iter([1.0, 1.0, 1.0, 1.0])
    script = LambdaCallback(on_test_end=lambda logs: logs.update(loss=next(values)))
    callback = ReduceLROnPlateau(factor=0.5, patience=1, cooldown=1)
    history = fit(make_model(), script, callback, epochs=8, validation_freq=2)
    assert history.history["learning_rate"] == [1.0] * 4 + [0.5] * 4  # validated: first, reduces, cools, reduces
    assert rate_of(callback.model) == 0.25


# ---- by how much ----


def test_min_lr_is_the_floor() -> None:
    callback = ReduceLROnPlateau(factor=0.5, patience=1, min_lr=0.3)
    assert rates([1.0] * 5, callback) == [1.0, 1.0, 0.5, 0.3, 0.3, 0.3]


def test_a_rate_below_min_lr_is_not_raised() -> None:
    assert rates([1.0] * 3, ReduceLROnPlateau(factor=0.5, patience=1, min_lr=0.3), lr=0.1) == [0.1] * 4


def test_each_group_keeps_its_own_rate() -> None:
    model = make_model(1.0, param_groups={"bias": {"lr": 0.25}})
    history = fit(model, Script([1.0] * 4), ReduceLROnPlateau(factor=0.5, patience=1, min_lr=0.2), epochs=4)
    assert history.history["learning_rate"] == [1.0, 1.0, 0.5, 0.25]
    assert (rate_of(model, 0), rate_of(model, 1)) == (0.2, 0.2)


def test_a_tensor_is_filled_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    lr = torch.tensor(1.0)
    model = kt.Model(nn.Linear(1, 1), device="cpu")
    model.compile("mse", lambda parameters: torch.optim.Adam(parameters, lr=lr))
    callback = ReduceLROnPlateau(factor=0.1, patience=1, min_lr=0.001, verbose=1)
    fit(model, Script([1.0] * 6), callback, epochs=6)
    assert model.optimizer is not None
    assert model.optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.001)
    assert len(capsys.readouterr().out.splitlines()) == 3  # 0.1, 0.01, 0.001, and not the same again in float32


# ---- logs and neighbours ----


def test_learning_rate_is_in_history_also_in_epochs_without_validation() -> None:
    callback = ReduceLROnPlateau(patience=1)
    history = fit(make_model(0.5), callback, epochs=3, validation_freq=3)
    assert history.history["learning_rate"] == [0.5, 0.5, 0.5]
    assert list(history.history) == ["loss", "learning_rate", "val_loss"]


def test_later_callbacks_see_the_rate_that_the_epoch_trained_with() -> None:
    seen: list[float] = []
    look = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["learning_rate"]))
    fit(make_model(), Script([1.0] * 3), ReduceLROnPlateau(factor=0.5, patience=1), look, epochs=3)
    assert seen == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("stopper_is_first", [True, False])
def test_it_reduces_until_early_stopping_ends_the_fit(stopper_is_first: bool) -> None:
    stopper, reducer = EarlyStopping(patience=4), ReduceLROnPlateau(factor=0.5, patience=2)
    pair = (stopper, reducer) if stopper_is_first else (reducer, stopper)
    history = fit(make_model(), Script([1.0] * 9), *pair, epochs=9)
    assert history.history["learning_rate"] == [1.0, 1.0, 1.0, 0.5, 0.5]
    assert rate_of(reducer.model) == 0.25


def test_its_state_begins_anew_with_each_fit_and_the_rate_stays() -> None:
    callback, model = ReduceLROnPlateau(factor=0.5, patience=2, cooldown=5), make_model()
    fit(model, Script([1.0, 1.0, 1.0, 1.0]), callback, epochs=4)
    assert (callback.best, callback.cooldown_counter) == (1.0, 4)
    history = fit(model, Script([9.0, 9.0, 9.0]), callback, epochs=3)
    assert history.history["learning_rate"] == [0.5, 0.5, 0.5]
    assert (callback.best, rate_of(model)) == (9.0, 0.25)


@pytest.mark.parametrize("loop", ["script", "function", "class"])
def test_every_loop_trains_with_the_reduced_rate(loop: str) -> None:
    model = make_model(0.1, loop)
    with torch.no_grad():
        model.net.weight.fill_(1.0)
    history = fit(model, Script([1.0] * 3), ReduceLROnPlateau(factor=0.5, patience=1), epochs=3)
    assert history.history["learning_rate"] == [0.1, 0.1, 0.05]

    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(0.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for rate in (0.1, 0.1, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        nn.functional.mse_loss(net(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.net.weight, net.weight)


def test_verbose_prints_each_reduction(capsys: pytest.CaptureFixture[str]) -> None:
    rates([1.0] * 3, ReduceLROnPlateau(factor=0.5, patience=1, verbose=1, min_lr=0.5))
    line = "Epoch 2: val_loss did not improve, learning rate reduced to 0.5."
    assert capsys.readouterr().out.splitlines() == [line]


def test_it_is_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    rates([1.0] * 3, ReduceLROnPlateau(patience=1))
    assert capsys.readouterr().out == ""


# ---- what is refused ----


@pytest.mark.parametrize("factor", [1, 1.0, 2.0, 0, 0.0, -0.5, NAN])
def test_a_factor_outside_0_and_1_is_refused_when_made(factor: float) -> None:
    with pytest.raises(ValueError, match=rf"factor must be above 0 and below 1, got {factor}"):
        ReduceLROnPlateau(factor=factor)


def test_other_bad_arguments_are_refused_when_made() -> None:
    with pytest.raises(ValueError, match=r"patience must be at least 0, got -1"):
        ReduceLROnPlateau(patience=-1)
    with pytest.raises(TypeError, match=r"cooldown must be an int, got 1\.5"):
        ReduceLROnPlateau(cooldown=1.5)
    with pytest.raises(ValueError, match=r"min_lr must be at least 0, got -0\.1"):
        ReduceLROnPlateau(min_lr=-0.1)
    with pytest.raises(ValueError, match=r"mode='mim' is not known; did you mean 'min'"):
        ReduceLROnPlateau(mode="mim")


def test_a_monitor_that_cannot_exist_is_refused_before_the_first_step() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"monitor='val_loss' .* no validation data"):
        fit(model, ReduceLROnPlateau(), validation_data=None)
    with pytest.raises(ValueError, match=r"monitor='val_lss' .* did you mean 'val_loss'"):
        fit(model, ReduceLROnPlateau("val_lss"))
    assert model.history.epoch == []


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_it_is_refused_beside_a_scheduler_of_compile(interval: str) -> None:
    model = make_model(lr_scheduler="cosine", lr_scheduler_interval=interval)
    message = r"ReduceLROnPlateau and compile\(lr_scheduler=\.\.\.\), a CosineAnnealingLR, .* leave one of them out"
    with pytest.raises(ValueError, match=message):
        fit(model, ReduceLROnPlateau())
    assert model.history.epoch == []
