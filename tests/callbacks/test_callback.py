"""The hooks: their order, indices and logs in fit, evaluate and predict; what the list refuses; what close promises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import (
    BackupAndRestore,
    CallbackList,
    CSVLogger,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    ReduceLROnPlateau,
    TensorBoard,
    TerminateOnNaN,
)
from kerastorch.callbacks.callback import HOOKS
from kerastorch.sums import PassSums

X = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
Y = torch.zeros(4, 1)
Call = tuple[object, ...]


def make_model(metrics: Any = None, lr: float = 0.0) -> kt.Model:
    """y = x, so that with lr=0 the squared errors of the rows of X stay 0, 1, 4 and 9."""
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(0.0)
    model = kt.Model(net, device="cpu")
    model.compile("mse", lambda parameters: torch.optim.SGD(parameters, lr=lr), metrics)
    return model


class Recorder(LambdaCallback):
    """Notes each hook with its index and the names in its logs."""

    def __init__(self, hooks: tuple[str, ...] = HOOKS) -> None:
        self.calls: list[Call] = []
        super().__init__(**{name: self._noting(name) for name in hooks})

    def _noting(self, name: str) -> Callable[..., None]:
        def note(*arguments: Any) -> None:
            *index, logs = arguments
            self.calls.append((name, *index, list(logs)))

        return note

    def close(self) -> None:
        self.calls.append(("close",))


# ---- order, indices, keys ----


def test_fit_with_validation_fires_the_hooks_in_the_order_drawn() -> None:
    recorder = Recorder()
    make_model({"error": "mae"}).fit(
        X, Y, batch_size=2, epochs=2, validation_data=(X[:3], Y[:3]), callbacks=[recorder], verbose=0
    )
    logs = ["loss", "error"]
    batches = [
        ("on_train_batch_begin", 0, []),
        ("on_train_batch_end", 0, logs),
        ("on_train_batch_begin", 1, []),
        ("on_train_batch_end", 1, logs),
    ]
    validation = [
        ("on_test_begin", []),
        ("on_test_batch_begin", 0, []),
        ("on_test_batch_end", 0, logs),
        ("on_test_batch_begin", 1, []),
        ("on_test_batch_end", 1, logs),
        ("on_test_end", logs),
    ]
    all_logs = [*logs, "val_loss", "val_error"]
    assert recorder.calls == [
        ("on_train_begin", []),
        ("on_epoch_begin", 0, []),
        *batches,
        ("on_train_epoch_end", 0, []),
        *validation,
        ("on_epoch_end", 0, all_logs),
        ("on_epoch_begin", 1, []),
        *batches,
        ("on_train_epoch_end", 1, []),
        *validation,
        ("on_epoch_end", 1, all_logs),
        ("on_train_end", all_logs),
        ("close",),
    ]


@pytest.mark.parametrize("loop", ["function", "class"])
def test_every_loop_fires_the_hooks_that_the_script_loop_fires(loop: str) -> None:
    calls = []
    for name in ("script", loop):
        recorder, model = Recorder(), make_model()
        model.compile("mse", "sgd", loop=name)
        model.fit(X, Y, batch_size=2, epochs=2, validation_data=(X, Y), callbacks=[recorder], verbose=0)
        model.evaluate(X, Y, callbacks=[recorder], verbose=0)
        model.predict(X, callbacks=[recorder], verbose=0)
        calls.append(recorder.calls)
    assert calls[0] == calls[1]


def test_fit_without_validation_fires_no_test_hooks() -> None:
    recorder = Recorder()
    make_model().fit(X, Y, callbacks=[recorder], verbose=0)
    assert [call[0] for call in recorder.calls] == [
        "on_train_begin",
        "on_epoch_begin",
        "on_train_batch_begin",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_epoch_end",
        "on_train_end",
        "close",
    ]


def test_epoch_indices_begin_at_initial_epoch() -> None:
    recorder = Recorder(("on_epoch_begin", "on_epoch_end"))
    make_model().fit(X, Y, initial_epoch=3, epochs=5, callbacks=[recorder], verbose=0)
    assert recorder.calls == [
        ("on_epoch_begin", 3, []),
        ("on_epoch_end", 3, ["loss"]),
        ("on_epoch_begin", 4, []),
        ("on_epoch_end", 4, ["loss"]),
        ("close",),
    ]


def test_evaluate_fires_the_test_hooks_alone() -> None:
    recorder = Recorder()
    make_model().evaluate(X, Y, batch_size=3, callbacks=[recorder], verbose=0)
    assert recorder.calls == [
        ("on_test_begin", []),
        ("on_test_batch_begin", 0, []),
        ("on_test_batch_end", 0, ["loss"]),
        ("on_test_batch_begin", 1, []),
        ("on_test_batch_end", 1, ["loss"]),
        ("on_test_end", ["loss"]),
        ("close",),
    ]


def test_predict_fires_the_predict_hooks_alone() -> None:
    recorder = Recorder()
    make_model().predict(X, batch_size=3, callbacks=[recorder], verbose=0)
    assert recorder.calls == [
        ("on_predict_begin", []),
        ("on_predict_batch_begin", 0, []),
        ("on_predict_batch_end", 0, ["outputs"]),
        ("on_predict_batch_begin", 1, []),
        ("on_predict_batch_end", 1, ["outputs"]),
        ("on_predict_end", []),
        ("close",),
    ]


def test_predict_batch_end_gets_the_outputs_of_its_batch() -> None:
    outputs = []
    callback = LambdaCallback(on_predict_batch_end=lambda batch, logs: outputs.append(logs["outputs"].tolist()))
    make_model().predict(X, batch_size=3, callbacks=[callback], verbose=0)
    assert outputs == [[[0.0], [1.0], [2.0]], [[3.0]]]


def test_on_batch_hooks_are_other_names_of_the_train_batch_hooks() -> None:
    recorder = Recorder(("on_batch_begin", "on_batch_end"))
    make_model().fit(X, Y, batch_size=2, validation_data=(X, Y), callbacks=[recorder], verbose=0)
    assert recorder.calls == [
        ("on_batch_begin", 0, []),
        ("on_batch_end", 0, ["loss"]),
        ("on_batch_begin", 1, []),
        ("on_batch_end", 1, ["loss"]),
        ("close",),
    ]


def test_callbacks_run_in_the_order_of_the_list() -> None:
    order: list[str] = []
    callbacks = [LambdaCallback(on_epoch_end=lambda epoch, logs, name=name: order.append(name)) for name in "cab"]
    make_model().fit(X, Y, epochs=2, callbacks=callbacks, verbose=0)
    assert order == list("cabcab")


# ---- what the logs hold ----


def test_batch_end_logs_are_averages_since_the_epoch_began() -> None:
    seen = []
    callback = LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["loss"]))
    make_model().fit(X, Y, batch_size=1, epochs=2, shuffle=False, callbacks=[callback], verbose=0)
    assert seen == [0.0, 0.5, 5 / 3, 3.5] * 2  # of the squared errors 0, 1, 4, 9


def test_batch_end_logs_weigh_batches_by_their_samples() -> None:
    seen = []
    callback = LambdaCallback(on_test_batch_end=lambda batch, logs: seen.append(logs["loss"]))
    make_model().evaluate(X, Y, batch_size=3, callbacks=[callback], verbose=0)
    assert seen == pytest.approx([5 / 3, 14 / 4])


def test_epoch_end_logs_are_floats_of_the_whole_epoch() -> None:
    seen: list[dict[str, float]] = []
    callback = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
    make_model().fit(X, Y, batch_size=2, shuffle=False, validation_data=(X[2:], Y[2:]), callbacks=[callback], verbose=0)
    assert seen == [{"loss": 3.5, "val_loss": 6.5}]
    assert all(type(value) is float for value in seen[0].values())


def test_validation_gets_its_own_averages_in_the_test_hooks() -> None:
    seen = []
    callback = LambdaCallback(
        on_test_batch_end=lambda batch, logs: seen.append(logs["loss"]),
        on_test_end=lambda logs: seen.append(logs["loss"]),
    )
    make_model().fit(X, Y, validation_data=(X, Y), validation_batch_size=2, epochs=2, callbacks=[callback], verbose=0)
    assert seen == [0.5, 3.5, 3.5] * 2


def test_train_end_gets_the_logs_of_the_last_epoch() -> None:
    ends: list[dict[str, float]] = []
    callback = LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(dict(logs)), on_train_end=lambda logs: ends.append(dict(logs))
    )
    make_model(lr=0.1).fit(X, Y, epochs=3, validation_data=(X, Y), callbacks=[callback], verbose=0)
    assert ends[-1] == ends[-2]
    assert ends[-1] != ends[-3]


def test_a_key_added_in_epoch_end_reaches_later_callbacks_train_end_and_history() -> None:
    seen: list[float] = []
    first = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(rate=epoch * 10.0))
    second = LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(logs["rate"]), on_train_end=lambda logs: seen.append(logs["rate"])
    )
    model = make_model()
    history = model.fit(X, Y, epochs=3, callbacks=[first, second], verbose=0)
    assert seen == [0.0, 10.0, 20.0, 20.0]
    assert history.history["rate"] == [0.0, 10.0, 20.0]
    assert model.history.history["rate"] == [0.0, 10.0, 20.0]


def test_a_key_added_in_test_end_is_returned_by_evaluate_and_becomes_a_val_key_in_fit() -> None:
    model = make_model()
    callback = LambdaCallback(on_test_end=lambda logs: logs.update(extra=7.0))
    assert model.evaluate(X, Y, callbacks=[callback], verbose=0) == {"loss": 3.5, "extra": 7.0}
    history = model.fit(X, Y, validation_data=(X, Y), callbacks=[callback], verbose=0)
    assert history.history["val_extra"] == [7.0]


# ---- batch hooks that nobody overrides ----


@pytest.mark.parametrize("hook", [name for name in HOOKS if "batch" in name])
def test_only_the_flag_of_an_overridden_batch_hook_is_up(hook: str) -> None:
    callbacks = CallbackList([LambdaCallback(), LambdaCallback(**{hook: print})])
    flags = {name for name, value in vars(callbacks).items() if name.startswith("has_") and value}
    alias = {"on_batch_begin": "on_train_batch_begin", "on_batch_end": "on_train_batch_end"}.get(hook, hook)
    assert flags == {alias.replace("on_", "has_", 1)}


def test_epoch_hooks_alone_raise_no_batch_flag() -> None:
    hooks = {name: print for name in HOOKS if "batch" not in name}
    callbacks = CallbackList([LambdaCallback(**hooks), kt.Callback(), kt.callbacks.EarlyStopping()])
    flags = {name: value for name, value in vars(callbacks).items() if name.startswith("has_")}
    assert len(flags) == 6
    assert not any(flags.values())


def test_an_override_in_a_subclass_raises_the_flag() -> None:
    class Mine(kt.Callback):
        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            pass

    class Child(Mine):
        pass

    callbacks = CallbackList([Child()])
    assert callbacks.has_test_batch_end
    assert not callbacks.has_train_batch_end


def test_batch_hooks_that_nobody_overrides_are_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: CallbackList, *arguments: object) -> None:
        raise AssertionError("a batch hook was called")

    for name in HOOKS:
        if "batch" in name and hasattr(CallbackList, name):
            monkeypatch.setattr(CallbackList, name, fail)
    epochs: list[int] = []
    callback = LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    model = make_model()
    model.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[callback], verbose=0)
    model.predict(X, callbacks=[callback], verbose=0)
    assert epochs == [0, 1]


def test_batch_end_logs_are_computed_only_when_looked_at_and_then_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    running = PassSums.running
    monkeypatch.setattr(PassSums, "running", lambda self: (reads.append(1), running(self))[1])
    batches: list[int] = []
    unread = LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch))
    make_model().fit(X, Y, batch_size=1, callbacks=[unread], verbose=0)
    assert (batches, reads) == ([0, 1, 2, 3], [])

    read_at_2 = LambdaCallback(on_train_batch_end=lambda batch, logs: batch == 2 and (logs["loss"], dict(logs)))
    make_model().fit(X, Y, batch_size=1, callbacks=[read_at_2, read_at_2], verbose=0)
    assert len(reads) == 1


# ---- what a callback is given ----


def test_callback_has_model_run_and_params() -> None:
    seen: dict[str, Any] = {}

    class Look(kt.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            seen.update(model=self.model, params=self.params, epochs=self.run.epochs)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.setdefault("counters", []).append(
                (self.run.epoch, self.run.batch, self.run.step, self.run.num_samples)
            )

    model = make_model()
    model.fit(X, Y, batch_size=3, epochs=2, callbacks=[Look()], verbose=0)
    assert seen["model"] is model
    assert seen["params"] == {"verbose": 0, "epochs": 2, "steps": 2}
    assert seen["epochs"] == 2
    assert seen["counters"] == [(0, 0, 1, 3), (0, 1, 2, 1), (1, 0, 3, 3), (1, 1, 4, 1)]


def test_set_model_and_set_params_come_before_the_first_hook() -> None:
    order: list[str] = []

    class Look(kt.Callback):
        def set_model(self, model: kt.Model) -> None:
            super().set_model(model)
            order.append("set_model")

        def set_params(self, params: dict[str, Any]) -> None:
            super().set_params(params)
            order.append("set_params")

        def on_train_begin(self, logs: Any = None) -> None:
            order.append("on_train_begin")

    make_model().fit(X, Y, callbacks=[Look()], verbose=0)
    assert order == ["set_model", "set_params", "on_train_begin"]


# ---- what the list refuses ----


@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize(
    ("callbacks", "error", "message"),
    [
        ([kt.callbacks.EarlyStopping], TypeError, r"callbacks\[0\] is the class EarlyStopping; give an object"),
        ([kt.Callback(), print], TypeError, r"callbacks\[1\] must be a kerastorch.callbacks.Callback, got builtin"),
        (["early_stopping"], TypeError, r"callbacks\[0\] must be a kerastorch.callbacks.Callback, got str"),
        ([None], TypeError, r"callbacks\[0\] must be .* got NoneType"),
    ],
)
def test_what_is_no_callback_is_refused(verb: str, callbacks: Any, error: type[Exception], message: str) -> None:
    model = make_model(lr=0.1)
    arguments = (X,) if verb == "predict" else (X, Y)
    with pytest.raises(error, match=message):
        getattr(model, verb)(*arguments, callbacks=callbacks, verbose=0)
    assert model.net.weight.item() == 1.0


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("on_epoch_ends", "on_epoch_end"),
        ("on_train_batch_ends", "on_train_batch_end"),
        ("on_batch_ended", "on_batch_end"),
        ("on_epoch_start", "on_epoch_end"),
        ("on_training_begin", "on_train_begin"),
    ],
)
def test_a_misspelt_hook_is_refused(misspelt: str, meant: str) -> None:
    callback = type("Mine", (kt.Callback,), {misspelt: lambda self, *arguments: None})()
    model = make_model(lr=0.1)
    with pytest.raises(ValueError, match=rf"Mine, has {misspelt}\(\), which nothing calls; did you mean .*{meant}'"):
        model.fit(X, Y, callbacks=[callback], verbose=0)
    assert model.net.weight.item() == 1.0


def test_a_method_far_from_any_hook_is_the_users_own() -> None:
    callback = type("Mine", (kt.Callback,), {"on_gpu": lambda self: None})()
    assert CallbackList([callback]).callbacks == [callback]


def test_one_callback_may_stand_without_a_list() -> None:
    recorder = Recorder(("on_epoch_end",))
    make_model().fit(X, Y, callbacks=recorder, verbose=0)
    assert recorder.calls == [("on_epoch_end", 0, ["loss"]), ("close",)]


# ---- exceptions and close ----


class Trouble(Exception):
    pass


@pytest.mark.parametrize("hook", [name for name in HOOKS if "predict" not in name])
def test_close_runs_once_after_an_exception_in_a_hook_which_comes_out_unchanged(hook: str) -> None:
    error = Trouble(hook)

    def fail(*arguments: object) -> None:
        raise error

    recorder, failing = Recorder(()), LambdaCallback(**{hook: fail})
    with pytest.raises(Trouble) as caught:
        make_model().fit(X, Y, validation_data=(X, Y), callbacks=[failing, recorder], verbose=0)
    assert caught.value is error
    assert error.__cause__ is None
    assert recorder.calls == [("close",)]


@pytest.mark.parametrize("hook", [name for name in HOOKS if "predict" in name])
def test_close_runs_once_after_an_exception_in_predict(hook: str) -> None:
    def fail(*arguments: object) -> None:
        raise Trouble

    recorder = Recorder(())
    with pytest.raises(Trouble):
        make_model().predict(X, callbacks=[LambdaCallback(**{hook: fail}), recorder], verbose=0)
    assert recorder.calls == [("close",)]


class FailingNet(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(1, 1), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize("error", [Trouble("in forward"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_close_runs_once_after_an_exception_in_forward_which_comes_out_unchanged(
    verb: str, error: BaseException
) -> None:
    model = kt.Model(FailingNet(error), device="cpu")
    model.compile("mse", "sgd")
    recorder = Recorder()
    with pytest.raises(type(error)) as caught:
        getattr(model, verb)(*((X,) if verb == "predict" else (X, Y)), callbacks=[recorder], verbose=0)
    assert caught.value is error
    assert error.__cause__ is None
    names = [call[0] for call in recorder.calls]
    assert names.count("close") == 1
    assert names[-1] == "close"
    assert not {"on_epoch_end", "on_train_end", "on_test_end", "on_predict_end"} & set(names)


def test_train_end_is_not_called_after_an_exception_in_a_later_epoch() -> None:
    def fail_in_second(epoch: int, logs: Any) -> None:
        if epoch == 1:
            raise Trouble

    recorder = Recorder(("on_epoch_end", "on_train_end"))
    with pytest.raises(Trouble):
        make_model().fit(X, Y, epochs=3, callbacks=[recorder, LambdaCallback(on_epoch_end=fail_in_second)], verbose=0)
    assert recorder.calls == [("on_epoch_end", 0, ["loss"]), ("on_epoch_end", 1, ["loss"]), ("close",)]


def test_every_callback_is_closed_though_an_earlier_close_fails_and_the_first_error_comes_out() -> None:
    class Failing(kt.Callback):
        def __init__(self, error: Exception) -> None:
            self.error = error

        def close(self) -> None:
            raise self.error

    first, second, recorder = Trouble("first"), Trouble("second"), Recorder(())
    with pytest.raises(Trouble) as caught:
        make_model().fit(X, Y, callbacks=[Failing(first), Failing(second), recorder], verbose=0)
    assert caught.value is first
    assert recorder.calls == [("close",)]


@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
def test_an_exception_in_forward_comes_out_though_close_fails_too(verb: str) -> None:
    class Failing(kt.Callback):
        def close(self) -> None:
            raise OSError("in close")

    error, recorder = Trouble("in forward"), Recorder(())
    model = kt.Model(FailingNet(error), device="cpu")
    model.compile("mse", "sgd")
    with pytest.raises(Trouble) as caught:
        getattr(model, verb)(*((X,) if verb == "predict" else (X, Y)), callbacks=[Failing(), recorder], verbose=0)
    assert caught.value is error
    assert recorder.calls == [("close",)]


@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
def test_close_runs_though_a_later_callback_refuses_its_model(verb: str) -> None:
    class Refusing(kt.Callback):
        def set_model(self, model: kt.Model) -> None:
            raise Trouble

    recorder, model = Recorder(()), make_model()
    with pytest.raises(Trouble):
        getattr(model, verb)(*((X,) if verb == "predict" else (X, Y)), callbacks=[recorder, Refusing()], verbose=0)
    assert recorder.calls == [("close",)]


class EvaluatesWith(kt.Callback):
    """Calls evaluate and predict with callbacks of its own fit, and counts how often it was closed."""

    def __init__(self, *others: kt.Callback) -> None:
        self.others, self.closed = others, 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.evaluate(X, Y, callbacks=[self, *self.others], verbose=0)
        self.model.predict(X, callbacks=[self, *self.others], verbose=0)
        assert self.closed == 0

    def close(self) -> None:
        self.closed += 1


def test_callbacks_that_are_lent_to_an_evaluate_inside_their_fit_are_closed_once_when_fit_ends(tmp_path: Path) -> None:
    log = CSVLogger(tmp_path / "log.csv")
    others = [log, ModelCheckpoint(tmp_path / "a.pt"), BackupAndRestore(tmp_path / "b"), TerminateOnNaN()]
    lender = EvaluatesWith(*others)
    make_model().fit(X, Y, epochs=2, callbacks=[lender, *others], verbose=0)
    assert lender.closed == 1
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3
    assert torch.load(tmp_path / "a.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("value", [[[1, 2], [3, 4]], "0.5", None, torch.zeros(2)], ids=repr)
def test_a_monitored_value_that_is_not_one_number_is_refused_by_name_and_form(value: Any) -> None:
    adds = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(matrix=value))
    with pytest.raises(ValueError, match=r"monitor='matrix' is .* in the logs, not one number"):
        make_model().fit(X, Y, callbacks=[adds, EarlyStopping("matrix", mode="max")], verbose=0)


def test_a_monitored_value_may_be_any_kind_of_one_number() -> None:
    for value in (1, torch.tensor([0.5]), torch.tensor(0.5).numpy()):
        stopper = EarlyStopping("value", mode="max")
        adds = LambdaCallback(on_epoch_end=lambda epoch, logs, value=value: logs.update(value=value))
        make_model().fit(X, Y, callbacks=[adds, stopper], verbose=0)
        assert stopper.best == float(value)


BAD_NUMBERS: dict[str, tuple[type[Exception], Callable[[], kt.Callback]]] = {
    "baseline must be a number, got '0.3'": (TypeError, lambda: EarlyStopping(baseline="0.3")),
    "baseline must be a number, got nan": (ValueError, lambda: EarlyStopping(baseline=float("nan"))),
    "min_delta must be a number, got '0.3'": (TypeError, lambda: EarlyStopping(min_delta="0.3")),
    "min_delta must be a number, got nan": (ValueError, lambda: ReduceLROnPlateau(min_delta=float("nan"))),
    "factor must be above 0 and below 1, got '0.1'": (ValueError, lambda: ReduceLROnPlateau(factor="0.1")),
    r"min_lr must be at least 0, got \[0.1\]": (ValueError, lambda: ReduceLROnPlateau(min_lr=[0.1])),
    "separator must be one character, .* got 1": (ValueError, lambda: CSVLogger("a.csv", separator=1)),
    "filename must be a path, got 1": (TypeError, lambda: CSVLogger(1)),
    "filepath must be a path, got b'a.pt'": (TypeError, lambda: ModelCheckpoint(b"a.pt")),
}


@pytest.mark.parametrize("message", BAD_NUMBERS)
def test_an_argument_of_the_wrong_kind_is_refused_when_made(message: str) -> None:
    kind, make = BAD_NUMBERS[message]
    with pytest.raises(kind, match=message):
        make()


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert ModelCheckpoint("~/a.pt").filepath == str(tmp_path / "a.pt")
    assert BackupAndRestore("~/b").backup_dir == tmp_path / "b"
    assert CSVLogger("~/log.csv").filename == str(tmp_path / "log.csv")
    assert TensorBoard("~/logs").log_dir == str(tmp_path / "logs")
    make_model().fit(X, Y, callbacks=ModelCheckpoint("~/a.pt"), verbose=0)
    make_model().fit(X, Y, epochs=2, verbose=0, resume="~/a.pt")
