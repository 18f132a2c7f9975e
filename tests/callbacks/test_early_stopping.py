"""EarlyStopping, driven by a script of values: when it stops, what it takes for a gain, which weights it puts back."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import ClasswiseWrapper

import kerastorch as kt
from kerastorch.callbacks import EarlyStopping, LambdaCallback

NAN = math.nan
X, Y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.zeros(4, 1)
Weights = dict[str, torch.Tensor]


class Script(kt.Callback):
    """Sets a key of the logs to the next value of a list, and keeps the weights of each epoch."""

    def __init__(self, values: list[float], key: str = "val_loss") -> None:
        self.values, self.key = values, key
        self.weights: list[Weights] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs[self.key] = self.values[epoch - self.run.initial_epoch]
        self.weights.append({name: value.clone() for name, value in self.model.net.state_dict().items()})


def make_model(metrics: Any = None) -> kt.Model:
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(0.5)
    model = kt.Model(net, device="cpu")
    model.compile("mse", lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9), metrics)
    return model


def run(values: list[float], stopper: EarlyStopping, *, model: kt.Model | None = None, key: str = "val_loss") -> int:
    """Return the number of epochs that were trained, of len(values)."""
    script = Script(values, key)
    return len(fit(model or make_model(), [script, stopper], len(values)).epoch)


def fit(model: kt.Model, callbacks: list[kt.Callback], epochs: int, **arguments: Any) -> kt.History:
    return model.fit(
        X, Y, epochs=epochs, shuffle=False, validation_data=(X, Y), callbacks=callbacks, verbose=0, **arguments
    )


def is_same(weights: Weights, other: Weights) -> bool:
    return all(torch.equal(weights[name], other[name]) for name in weights)


# ---- patience ----


@pytest.mark.parametrize(("patience", "epochs"), [(0, 3), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7), (6, 7)])
def test_stops_after_patience_epochs_without_gain(patience: int, epochs: int) -> None:
    assert run([2.0, 1.0, 1.5, 1.4, 1.3, 1.2, 1.1], EarlyStopping(patience=patience)) == epochs


def test_runs_to_the_end_while_the_value_gets_better() -> None:
    stopper = EarlyStopping(patience=1)
    assert run([5.0, 4.0, 3.0, 2.0], stopper) == 4
    assert stopper.stopped_epoch is None
    assert (stopper.best, stopper.best_epoch) == (2.0, 3)


def test_a_gain_resets_the_wait() -> None:
    assert run([5.0, 6.0, 4.0, 6.0, 3.0, 6.0, 6.0, 6.0], EarlyStopping(patience=2)) == 7


def test_an_equal_value_is_no_gain() -> None:
    assert run([1.0, 1.0, 1.0, 1.0], EarlyStopping(patience=2)) == 3


def test_stopped_epoch_and_best_epoch_count_from_0() -> None:
    stopper = EarlyStopping(patience=2)
    assert run([2.0, 1.0, 1.5, 1.5, 0.0], stopper) == 4
    assert (stopper.stopped_epoch, stopper.best_epoch, stopper.best) == (3, 1, 1.0)


def test_never_stops_at_epoch_0() -> None:
    assert run([NAN, NAN, NAN], EarlyStopping(patience=0)) == 2


def test_a_fit_that_begins_later_may_stop_at_its_first_epoch() -> None:
    script = Script([NAN, 1.0, 1.0])
    assert fit(make_model(), [script, EarlyStopping(patience=0)], 5, initial_epoch=2).epoch == [2]


def test_the_epoch_that_stops_is_complete() -> None:
    ends: list[Any] = []
    model = make_model()
    last = LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(epoch), on_train_end=lambda logs: ends.append(logs)
    )
    history = fit(model, [Script([1.0, 2.0, 3.0]), EarlyStopping(), last], 3)
    assert ends == [0, 1, {"loss": history.history["loss"][1], "val_loss": 2.0}]
    assert history.history["val_loss"] == [1.0, 2.0]


def test_epochs_without_validation_do_not_count() -> None:
    stopper = EarlyStopping(patience=2)
    values = iter([1.0, 2.0, 2.0, 2.0])
    script = LambdaCallback(on_test_end=lambda logs: logs.update(loss=next(values)))
    history = fit(make_model(), [script, stopper], 8, validation_freq=2)
    assert history.epoch == [0, 1, 2, 3, 4, 5]
    assert stopper.stopped_epoch == 5


# ---- what is a gain ----


@pytest.mark.parametrize(
    ("min_delta", "values", "epochs"),
    [
        (0.0, [2.0, 1.99, 1.98, 1.97], 4),
        (0.25, [2.0, 1.625, 1.25, 0.875], 4),
        (0.5, [2.0, 1.5, 0.0, 0.0], 2),  # a gain of just min_delta is none
        (0.5, [2.0, 1.75, 0.0, 0.0], 2),
        (-0.5, [2.0, 1.75, 0.0, 0.0], 2),  # its sign does not matter
    ],
)
def test_a_gain_must_exceed_min_delta(min_delta: float, values: list[float], epochs: int) -> None:
    assert run(values, EarlyStopping(patience=1, min_delta=min_delta)) == epochs


def test_small_gains_add_up_against_the_best_not_the_last_value() -> None:
    stopper = EarlyStopping(patience=3, min_delta=0.5)
    assert run([2.0, 1.75, 1.25, 1.25, 1.25, 1.25], stopper) == 6
    assert (stopper.best, stopper.best_epoch) == (1.25, 2)


def test_min_delta_counts_upwards_for_a_maximum() -> None:
    stopper = EarlyStopping(patience=1, min_delta=0.5, mode="max")
    assert run([1.0, 1.75, 2.25, 9.0], stopper) == 3
    assert stopper.best == 1.75


def test_mode_max_takes_higher_for_better() -> None:
    stopper = EarlyStopping(mode="max")
    assert run([1.0, 2.0, 3.0, 2.5, 4.0], stopper) == 4
    assert stopper.best == 3.0


def test_mode_overrides_the_direction_of_the_metric() -> None:
    stopper = EarlyStopping("val_r2", mode="min")
    assert run([3.0, 2.0, 2.5, 9.0], stopper, model=make_model(["r2"]), key="val_r2") == 3


@pytest.mark.parametrize(
    ("values", "epochs", "best"),
    [
        ([NAN, NAN, NAN, NAN], 2, None),
        ([1.0, NAN, NAN, 0.5], 3, 1.0),
        ([NAN, 1.0, NAN, NAN, 0.5], 4, 1.0),
    ],
)
def test_nan_is_never_a_gain(values: list[float], epochs: int, best: float | None) -> None:
    stopper = EarlyStopping(patience=2)
    assert run(values, stopper) == epochs
    assert stopper.best == best


def test_a_number_after_nan_is_a_gain() -> None:
    stopper = EarlyStopping(patience=2)
    assert run([NAN, 3.0, NAN, 2.0, NAN, NAN, 1.0], stopper) == 6
    assert (stopper.best, stopper.best_epoch) == (2.0, 3)


def test_infinity_is_beaten_by_a_number() -> None:
    stopper = EarlyStopping(patience=1)
    assert run([math.inf, 3.0, math.inf], stopper) == 3
    assert stopper.best == 3.0


# ---- baseline and start_from_epoch ----


def test_gains_short_of_the_baseline_do_not_reset_the_wait() -> None:
    # The wait is 1, 2, 3 over three gains that miss the baseline; the first epoch without a gain finds it used up.
    assert run([1.0, 0.9, 0.8, 0.85, 0.1], EarlyStopping(patience=2, baseline=0.5)) == 4


def test_without_the_baseline_the_same_values_go_on() -> None:
    assert run([1.0, 0.9, 0.8, 0.85, 0.1], EarlyStopping(patience=2)) == 5


def test_a_gain_beyond_the_baseline_resets_the_wait() -> None:
    assert run([1.0, 0.4, 0.6, 0.6, 0.6], EarlyStopping(patience=2, baseline=0.5)) == 4


def test_a_value_beyond_the_baseline_that_is_no_gain_does_not_reset_the_wait() -> None:
    assert run([0.1, 0.2, 0.3, 0.4], EarlyStopping(patience=2, baseline=0.5)) == 3


def test_the_baseline_is_beaten_only_beyond_min_delta() -> None:
    assert run([1.0, 0.4375, 0.5, 0.0], EarlyStopping(patience=2, baseline=0.5, min_delta=0.125)) == 3


def test_epochs_before_start_from_epoch_are_not_looked_at() -> None:
    stopper = EarlyStopping(patience=1, start_from_epoch=3)
    assert run([0.0, 9.0, 9.0, 5.0, 4.0, 4.5, 1.0], stopper) == 6
    assert (stopper.best, stopper.best_epoch) == (4.0, 4)


# ---- restore_best_weights ----


def test_restores_the_best_weights_after_stopping() -> None:
    model, script = make_model(), Script([3.0, 1.0, 2.0, 2.0, 2.0])
    fit(model, [script, EarlyStopping(patience=2, restore_best_weights=True)], 5)
    assert len(script.weights) == 4
    assert is_same(model.net.state_dict(), script.weights[1])
    assert not is_same(model.net.state_dict(), script.weights[3])


def test_restores_the_best_weights_without_stopping_early() -> None:
    model, script = make_model(), Script([3.0, 1.0, 2.0, 2.0])
    stopper = EarlyStopping(patience=9, restore_best_weights=True)
    fit(model, [script, stopper], 4)
    assert stopper.stopped_epoch is None
    assert is_same(model.net.state_dict(), script.weights[1])


def test_keeps_the_last_weights_without_restore_best_weights() -> None:
    model, script = make_model(), Script([3.0, 1.0, 2.0, 2.0, 2.0])
    fit(model, [script, EarlyStopping(patience=2)], 5)
    assert is_same(model.net.state_dict(), script.weights[3])


def test_restores_nothing_where_all_values_were_nan() -> None:
    model, script = make_model(), Script([NAN, NAN, NAN])
    fit(model, [script, EarlyStopping(patience=9, restore_best_weights=True)], 3)
    assert is_same(model.net.state_dict(), script.weights[2])


def test_restores_nothing_from_before_start_from_epoch() -> None:
    model, script = make_model(), Script([0.0, 3.0, 2.0, 2.5])
    fit(model, [script, EarlyStopping(patience=9, restore_best_weights=True, start_from_epoch=1)], 4)
    assert is_same(model.net.state_dict(), script.weights[2])


def test_restores_a_best_that_misses_the_baseline() -> None:
    model, script = make_model(), Script([3.0, 1.0, 2.0, 2.0])
    fit(model, [script, EarlyStopping(patience=9, baseline=0.5, restore_best_weights=True)], 4)
    assert is_same(model.net.state_dict(), script.weights[1])


def test_restored_weights_take_batch_norm_buffers_along() -> None:
    model = kt.Model(nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)), device="cpu")
    model.compile("mse", "sgd")
    script = Script([3.0, 1.0, 2.0, 2.0])
    fit(model, [script, EarlyStopping(patience=9, restore_best_weights=True)], 4)
    assert model.net[0].num_batches_tracked == 2
    assert is_same(model.net.state_dict(), script.weights[1])


def test_restoring_leaves_the_optimizer_its_last_state() -> None:
    buffers = []
    for restore in (False, True):
        model = make_model()
        fit(model, [Script([1.0, 2.0, 3.0]), EarlyStopping(patience=9, restore_best_weights=restore)], 3)
        assert model.optimizer is not None
        buffers.append([state["momentum_buffer"] for state in model.optimizer.state_dict()["state"].values()])
    assert len(buffers[0]) == 2
    assert all(map(torch.equal, *buffers))


def test_restores_nothing_after_an_exception() -> None:
    def fail(epoch: int, logs: Any) -> None:
        if epoch == 2:
            raise ZeroDivisionError

    model, script = make_model(), Script([1.0, 2.0, 3.0])
    callbacks = [script, EarlyStopping(patience=9, restore_best_weights=True), LambdaCallback(on_epoch_end=fail)]
    with pytest.raises(ZeroDivisionError):
        fit(model, callbacks, 3)
    assert is_same(model.net.state_dict(), script.weights[2])


# ---- state ----


def test_state_begins_anew_with_each_fit() -> None:
    stopper, model = EarlyStopping(patience=2), make_model()
    assert run([0.0, 1.0, 1.0, 1.0], stopper, model=model) == 3
    assert run([9.0, 8.0, 7.0, 6.0], stopper, model=model) == 4
    assert (stopper.best, stopper.best_epoch, stopper.stopped_epoch) == (6.0, 3, None)


def test_best_weights_of_an_earlier_fit_are_forgotten() -> None:
    stopper, model = EarlyStopping(patience=9, restore_best_weights=True), make_model()
    fit(model, [Script([0.0, 1.0]), stopper], 2)
    second = Script([5.0, 4.0, 6.0])
    fit(model, [second, stopper], 3)
    assert is_same(model.net.state_dict(), second.weights[1])


# ---- the monitor ----


def refused(model: kt.Model, stopper: EarlyStopping, message: str, validation_data: Any = (X, Y)) -> None:
    """fit raises ValueError with this message, before the first step."""
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.fit(X, Y, validation_data=validation_data, callbacks=[stopper], verbose=0)
    assert is_same(model.net.state_dict(), before)
    assert model.history.epoch == []


def test_val_loss_without_validation_data_is_refused_before_the_first_step() -> None:
    refused(
        make_model(),
        EarlyStopping(),
        r"monitor='val_loss' is not in the logs: fit\(\) got no validation data\. Known: loss",
        None,
    )


def test_val_loss_without_validation_data_is_refused_beside_a_callback_of_the_users_own() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"fit\(\) got no validation data"):
        model.fit(X, Y, callbacks=[LambdaCallback(), EarlyStopping()], verbose=0)
    assert model.net.weight.item() == 1.0


def test_misspelt_monitor_is_refused_before_the_first_step_naming_the_nearest() -> None:
    message = r"monitor='val_los' is not in the logs; did you mean 'val_loss'.* Known: loss, error, val_loss, val_error"
    refused(make_model({"error": "mae"}), EarlyStopping("val_los"), message)


def test_monitor_that_a_callback_might_have_added_is_refused_at_the_first_check() -> None:
    model, epochs = make_model(), []
    mine = LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    with pytest.raises(ValueError, match=r"monitor='score' is not in the logs\. Known: loss, val_loss"):
        fit(model, [mine, EarlyStopping("score", mode="max")], 3)
    assert epochs == [0]


def test_monitor_of_a_key_that_a_callback_adds_is_followed() -> None:
    assert run([1.0, 2.0, 1.5, 9.0], EarlyStopping("score", mode="max"), key="score") == 3


@pytest.mark.parametrize(("metric", "higher"), [("mae", False), ("rmse", False), ("r2", True)])
def test_auto_takes_the_direction_of_a_metric_by_name(metric: str, higher: bool) -> None:
    values = [1.0, 2.0, 3.0, 4.0] if higher else [4.0, 3.0, 2.0, 1.0]
    assert run(values, EarlyStopping(f"val_{metric}"), model=make_model([metric]), key=f"val_{metric}") == 4
    assert run(values[::-1], EarlyStopping(f"val_{metric}"), model=make_model([metric]), key=f"val_{metric}") == 2


def test_auto_takes_the_direction_of_accuracy() -> None:
    model = kt.Model(nn.Linear(1, 2), device="cpu")
    model.compile("cross_entropy", "sgd", ["accuracy"])
    script, stopper = Script([0.1, 0.2, 0.3, 0.2, 0.9], "val_accuracy"), EarlyStopping("val_accuracy")
    y = torch.tensor([0, 1, 0, 1])
    history = model.fit(X, y, epochs=5, validation_data=(X, y), callbacks=[script, stopper], verbose=0)
    assert history.epoch == [0, 1, 2, 3]


def test_auto_takes_the_direction_of_a_torchmetrics_object_and_of_a_collection() -> None:
    falling = [4.0, 3.0, 2.0, 1.0]
    named, collected = {"error": MeanAbsoluteError()}, MetricCollection({"error": MeanAbsoluteError()}, prefix="my_")
    assert run(falling, EarlyStopping("error"), model=make_model(named), key="error") == 4
    assert run(falling, EarlyStopping("val_my_error"), model=make_model(collected), key="val_my_error") == 4
    assert run(falling[::-1], EarlyStopping("val_my_error"), model=make_model(collected), key="val_my_error") == 2


def test_auto_minimises_the_training_loss() -> None:
    assert run([1.0, 2.0, 3.0], EarlyStopping("loss"), key="loss") == 2


def test_unknown_direction_is_refused_before_the_first_step() -> None:
    def gap(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (outputs - y).abs().mean()

    refused(make_model([gap]), EarlyStopping("val_gap"), r"monitor='val_gap'.* pass mode='min' or 'max'")
    assert run([3.0, 2.0, 1.0], EarlyStopping("val_gap", mode="min"), model=make_model([gap]), key="val_gap") == 3


def test_a_metric_that_names_its_own_results_can_be_monitored() -> None:
    net = nn.Linear(1, 2)
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", "sgd", {"by_class": ClasswiseWrapper(MulticlassAccuracy(2, average=None))})
    y = torch.tensor([0, 1, 0, 1])
    key = "val_multiclassaccuracy_1"
    assert key in model.fit(X, y, validation_data=(X, y), verbose=0).history
    history = model.fit(X, y, validation_data=(X, y), callbacks=[EarlyStopping(key, mode="max")], verbose=0)
    assert key in history.history


# ---- arguments and words ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "maximum"}, ValueError, r"mode='maximum' is not known;.* 'auto', 'min', 'max'"),
        ({"mode": "mim"}, ValueError, r"did you mean 'min'"),
        ({"patience": -1}, ValueError, r"patience must be at least 0, got -1"),
        ({"patience": 2.5}, TypeError, r"patience must be an int, got 2.5"),
        ({"patients": 2}, TypeError, r"patients"),
    ],
)
def test_bad_arguments_are_refused_when_made(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EarlyStopping(**arguments)


def test_verbose_prints_the_stop_and_the_restored_epoch_counted_from_1(capsys: pytest.CaptureFixture[str]) -> None:
    run([2.0, 1.0, 1.5, 1.5, 0.0], EarlyStopping(patience=2, verbose=1, restore_best_weights=True))
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 4: early stopping, val_loss did not improve.",
        "Weights of epoch 2 restored (val_loss: 1.0000).",
    ]


def test_it_is_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    run([1.0, 2.0, 3.0], EarlyStopping(restore_best_weights=True))
    assert capsys.readouterr().out == ""
