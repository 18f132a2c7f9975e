"""LambdaCallback: hooks given as functions."""

from typing import Any

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import LambdaCallback
from kerastorch.callbacks.callback import HOOKS

X, Y = torch.ones(4, 1), torch.zeros(4, 1)


def make_model() -> kt.Model:
    model = kt.Model(nn.Linear(1, 1), device="cpu")
    model.compile("mse", "sgd")
    return model


def run_all(callback: kt.Callback) -> None:
    model = make_model()
    model.fit(X, Y, validation_data=(X, Y), callbacks=[callback], verbose=0)
    model.predict(X, callbacks=[callback], verbose=0)


@pytest.mark.parametrize("hook", HOOKS)
def test_function_is_called_with_the_arguments_of_its_hook(hook: str) -> None:
    calls: list[tuple[Any, ...]] = []
    run_all(LambdaCallback(**{hook: lambda *arguments: calls.append(arguments)}))
    assert len(calls) == 1
    if "epoch" in hook or "batch" in hook:
        index, logs = calls[0]
        assert index == 0
    else:
        (logs,) = calls[0]
    assert isinstance(logs.get("loss", 0.0), float)


def test_several_hooks_share_one_callback() -> None:
    order: list[str] = []
    run_all(
        LambdaCallback(
            on_train_end=lambda logs: order.append("end"),
            on_train_begin=lambda logs: order.append("begin"),
            on_epoch_end=lambda epoch, logs: order.append("epoch"),
        )
    )
    assert order == ["begin", "epoch", "end"]


def test_what_the_function_returns_is_ignored() -> None:
    history = make_model().fit(
        X, Y, epochs=2, callbacks=[LambdaCallback(on_epoch_end=lambda epoch, logs: "stop")], verbose=0
    )
    assert history.epoch == [0, 1]


def test_a_bound_method_serves_as_a_function() -> None:
    losses: list[Any] = []
    make_model().fit(X, Y, callbacks=[LambdaCallback(on_train_end=losses.append)], verbose=0)
    assert [list(logs) for logs in losses] == [["loss"]]


def test_misspelt_hook_is_refused_naming_the_nearest() -> None:
    with pytest.raises(
        TypeError, match=r"no hook 'on_epoch_ends'; did you mean 'on_epoch_end'.* Hooks: .*on_train_end"
    ):
        LambdaCallback(on_epoch_ends=print)


def test_a_name_far_from_any_hook_is_refused_with_the_list() -> None:
    with pytest.raises(TypeError, match=r"no hook 'zzz'\. Hooks: on_train_begin, "):
        LambdaCallback(zzz=print)


@pytest.mark.parametrize("value", [3, "print"])
def test_what_cannot_be_called_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"LambdaCallback\(on_epoch_end=\.\.\.\) takes a function, got "):
        LambdaCallback(on_epoch_end=value)


def test_none_is_no_function() -> None:
    make_model().fit(X, Y, callbacks=LambdaCallback(on_epoch_end=None), verbose=0)


def test_it_may_stop_training_through_the_model() -> None:
    model = make_model()

    def stop(epoch: int, logs: Any) -> None:
        model.stop_training = epoch == 1

    assert model.fit(X, Y, epochs=5, callbacks=[LambdaCallback(on_epoch_end=stop)], verbose=0).epoch == [0, 1]
