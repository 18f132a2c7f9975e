"""What every callback that kerastorch exports keeps: the base's signatures, state anew each fit, one close a call."""

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch import callbacks
from kerastorch.callbacks.callback import HOOKS

CLASSES = [cls for cls in vars(callbacks).values() if isinstance(cls, type) and issubclass(cls, kt.Callback)]
# A class that can't be made without arguments has a line here.
ARGUMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "BackupAndRestore": lambda folder: {"backup_dir": folder / "backup"},
    "CSVLogger": lambda folder: {"filename": folder / "log.csv"},
    "EarlyStopping": lambda folder: {"patience": 3},
    "LearningRateScheduler": lambda folder: {"schedule": lambda epoch, lr: lr / 2},
    "ModelCheckpoint": lambda folder: {"filepath": folder / "checkpoint.pt"},
    "SWA": lambda folder: {"start_epoch": 0},
    "TensorBoard": lambda folder: {"log_dir": folder / "logs"},
}
X, Y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.zeros(4, 1)

every_class = pytest.mark.parametrize("cls", CLASSES)


def make(cls: type[kt.Callback], folder: Path) -> kt.Callback:
    return cls(**ARGUMENTS.get(cls.__name__, lambda folder: {})(folder))


def make_model() -> kt.Model:
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(0.0)
    model = kt.Model(net, device="cpu")
    model.compile("mse", lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
    return model


def plain(state: object) -> str:
    return repr(state)


def fit(model: kt.Model, callback: kt.Callback, *, others: Sequence[kt.Callback] = (), **arguments: Any) -> kt.History:
    return model.fit(
        X,
        Y,
        batch_size=2,
        epochs=3,
        shuffle=False,
        validation_data=(X, Y),
        callbacks=[callback, *others],
        verbose=0,
        **arguments,
    )


def spy_on(callback: kt.Callback, name: str, calls: list[tuple[str, object]]) -> None:
    original = getattr(callback, name)

    def noting(*arguments: Any) -> None:
        calls.append((name, original(*arguments)))

    setattr(callback, name, noting)


def test_the_base_and_the_four_named_ones_are_found() -> None:
    names = {cls.__name__ for cls in CLASSES}
    assert {"Callback", "EarlyStopping", "LambdaCallback", "ModelCheckpoint"} <= names


@every_class
def test_hooks_have_the_base_signature(cls: type[kt.Callback]) -> None:
    for name in (*HOOKS, "set_model", "set_params", "close"):
        base, own = inspect.signature(getattr(kt.Callback, name)), inspect.signature(getattr(cls, name))
        assert [(p.name, p.default) for p in own.parameters.values()] == [
            (p.name, p.default) for p in base.parameters.values()
        ], name


@every_class
def test_every_hook_is_called_through_the_verbs_and_returns_nothing(cls: type[kt.Callback], tmp_path: Path) -> None:
    callback, calls, model = make(cls, tmp_path), [], make_model()
    for name in HOOKS:
        spy_on(callback, name, calls)
    fit(model, callback)
    model.evaluate(X, Y, callbacks=[callback], verbose=0)
    model.predict(X, callbacks=[callback], verbose=0)
    assert {name for name, _ in calls} == set(HOOKS)
    assert {result for _, result in calls} == {None}


@every_class
def test_close_is_called_once_a_call(cls: type[kt.Callback], tmp_path: Path) -> None:
    callback, calls, model = make(cls, tmp_path), [], make_model()
    spy_on(callback, "close", calls)
    for count, call in enumerate((lambda: fit(model, callback), lambda: fit(model, callback)), start=1):
        call()
        assert len(calls) == count
    model.evaluate(X, Y, callbacks=[callback], verbose=0)
    assert len(calls) == 3
    model.predict(X, callbacks=[callback], verbose=0)
    assert len(calls) == 4


@every_class
def test_close_is_called_once_after_an_exception(cls: type[kt.Callback], tmp_path: Path) -> None:
    class Trouble(Exception):
        pass

    def fail(epoch: int, logs: Any) -> None:
        raise Trouble

    callback, calls = make(cls, tmp_path), []
    spy_on(callback, "close", calls)
    failing = callbacks.LambdaCallback(on_epoch_end=fail)
    with pytest.raises(Trouble):
        make_model().fit(X, Y, validation_data=(X, Y), callbacks=[callback, failing], verbose=0)
    assert len(calls) == 1


@every_class
def test_a_second_fit_with_the_same_object_does_what_the_first_did(cls: type[kt.Callback], tmp_path: Path) -> None:
    callback = make(cls, tmp_path)
    first_model, second_model = make_model(), make_model()
    first, second = fit(first_model, callback), fit(second_model, callback)
    assert first.epoch
    assert (second.epoch, second.history) == (first.epoch, first.history)
    assert torch.equal(first_model.net.weight, second_model.net.weight)


@every_class
def test_a_second_fit_of_the_same_model_goes_through(cls: type[kt.Callback], tmp_path: Path) -> None:
    callback, model = make(cls, tmp_path), make_model()
    first, second = fit(model, callback), fit(model, callback)
    assert first.epoch
    assert second.epoch
    assert second.epoch[0] == 0


@every_class
def test_it_works_beside_evaluate_and_predict_without_a_fit(cls: type[kt.Callback], tmp_path: Path) -> None:
    callback, model = make(cls, tmp_path), make_model()
    assert model.evaluate(X, Y, callbacks=[callback], verbose=0) == {"loss": 3.5}
    assert model.predict(X, callbacks=[callback], verbose=0).tolist() == X.tolist()


@every_class
def test_its_state_survives_a_checkpoint_and_a_resumed_run_takes_it_up(cls: type[kt.Callback], tmp_path: Path) -> None:
    states: list[dict[str, Any]] = []

    class Look(kt.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            states.append(copy.deepcopy(observed.state_dict()))

    class Killed(Exception):
        pass

    class Kill(kt.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise Killed

    path = tmp_path / "elsewhere" / "run.pt"
    observed = make(cls, tmp_path / "a")
    whole = fit(make_model(), observed, others=[callbacks.ModelCheckpoint(path), Look()])
    expected, states = states[2], []
    observed = make(cls, tmp_path / "b")
    with pytest.raises(Killed):
        fit(make_model(), observed, others=[callbacks.ModelCheckpoint(path), Kill()])
    observed = make(cls, tmp_path / "b")
    resumed = fit(make_model(), observed, others=[Look()], resume=path)
    assert resumed.history == whole.history
    assert plain(states[0]) == plain(expected).replace(f"{tmp_path}/a", f"{tmp_path}/b")


@every_class
def test_it_leaves_the_random_state_alone(cls: type[kt.Callback], tmp_path: Path) -> None:
    states = []
    for callback in (kt.Callback(), make(cls, tmp_path)):
        torch.manual_seed(0)
        make_model().fit(X, Y, batch_size=2, validation_data=(X, Y), callbacks=[callback], verbose=0)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
