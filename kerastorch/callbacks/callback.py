"""Callback, the list of them that a run calls, and the monitor that the choosing ones share.

The order of the hooks, in fit:

    on_train_begin
    for each epoch:
        on_epoch_begin(epoch)
        for each batch:
            on_train_batch_begin(batch)
            on_train_batch_end(batch, logs)         logs: running averages, read from the device when looked at
            (ModelCheckpoint and BackupAndRestore write, where an optimizer step is complete)
        on_train_epoch_end(epoch)
        if validation is due:
            on_test_begin
            for each batch:
                on_test_batch_begin(batch)
                on_test_batch_end(batch, logs)
            on_test_end(logs)                       logs: without "val_"
        on_epoch_end(epoch, logs)                   logs: with "val_"; what a hook adds goes into History
        (ModelCheckpoint and BackupAndRestore write)
    on_train_end(logs)                              logs: the last epoch's; not called after an exception
    close                                           always, once; not after an evaluate inside the callback's own fit

A run that is resumed calls load_state_dict after on_train_begin and, where it goes on inside an epoch, once more after
that epoch's on_epoch_begin. One that is interrupted ends the epoch at an optimizer step, writes, and goes on with
on_train_end: without validation and on_epoch_end.
evaluate fires the test hooks alone, predict on_predict_begin, on_predict_batch_begin(batch),
on_predict_batch_end(batch, {"outputs": ...}), on_predict_end. Indices count from 0.
"""

from __future__ import annotations

import difflib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kerastorch.device import describe
from kerastorch.errors import check_choice, check_int, check_number, did_you_mean
from kerastorch.resume import is_built_in
from kerastorch.run import Run

if TYPE_CHECKING:
    from kerastorch.model import Model

Moment = Literal["epoch", "step", "interrupt"]
Logs = Any  # a dict; in batch hooks a Mapping that is read from the device when looked at


class Callback:
    """A callback of one's own overrides the hooks it needs; they return nothing.

    model: the Model.   run: the Run of the call, while it lasts: counters, optimizer, stop_training.
    params: {"verbose", "epochs", "steps"} of the call.
    """

    model: Model
    run: Run
    params: dict[str, Any]

    def set_model(self, model: Model) -> None:
        """Keep the Model that calls."""
        self.model = model

    def set_params(self, params: dict[str, Any]) -> None:
        """Keep the call's {"verbose", "epochs", "steps"}."""
        self.params = params

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Called when fit begins. logs: empty."""

    def on_train_end(self, logs: Logs | None = None) -> None:
        """Called when fit ends, not after an exception. logs: the last epoch's."""

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Called before an epoch. logs: empty."""

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Called after an epoch and its validation. logs: loss, metrics, val_loss, val_ metrics; floats."""

    def on_train_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Called after an epoch's training batches, before its validation. logs: empty."""

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """Called before a training batch. logs: empty."""
        self.on_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Called after a training batch. logs: loss and metrics as averages since the epoch began."""
        self.on_batch_end(batch, logs)

    def on_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """Another name for on_train_batch_begin."""

    def on_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Another name for on_train_batch_end."""

    def on_test_begin(self, logs: Logs | None = None) -> None:
        """Called before a validation pass or evaluate. logs: empty."""

    def on_test_end(self, logs: Logs | None = None) -> None:
        """Called after a validation pass or evaluate. logs: loss and metrics, without "val_"."""

    def on_test_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """Called before a validation batch. logs: empty."""

    def on_test_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Called after a validation batch. logs: loss and metrics as averages since the pass began."""

    def on_predict_begin(self, logs: Logs | None = None) -> None:
        """Called before predict. logs: empty."""

    def on_predict_end(self, logs: Logs | None = None) -> None:
        """Called after predict. logs: empty."""

    def on_predict_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """Called before a predict batch. logs: empty."""

    def on_predict_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Called after a predict batch. logs: {"outputs": numpy arrays}."""

    def close(self) -> None:
        """Called once when the call ends, after an exception too: give files and handles back."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to decide as this one would: tensors, numbers, strings, lists and dicts.

        A state with a part "watches" is for a callback of this class whose state has the same there.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what state_dict() returned, after on_train_begin and, inside an epoch, again after on_epoch_begin."""


class Checkpointer(Callback, ABC):
    """The base of the callbacks that write checkpoints; save() comes when all hooks of the moment are through.

    save_freq: "epoch", or a number of batches, counted across epochs, after which the next optimizer step is due.
    writes_resume_points: whether fit(resume=True) can go on from what it writes.
    resumes_by_itself: whether any fit does.
    writes_first: whether it writes before the others, so that their files never know of one that is not there.
    """

    writes_resume_points = True
    resumes_by_itself = False
    writes_first = False

    def __init__(self, save_freq: int | Literal["epoch"] = "epoch") -> None:
        if save_freq != "epoch":
            if isinstance(save_freq, str):
                raise ValueError(f"save_freq must be 'epoch' or a number of batches, got {save_freq!r}.")
            check_int("save_freq", save_freq)
        self.save_freq = save_freq
        self._batches_at_save = 0
        self._saved_at: tuple[int, int] | None = None

    @property
    def saves_within_epochs(self) -> bool:
        """Whether it wants to be asked after every optimizer step."""
        return self.save_freq != "epoch"

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self._batches_at_save, self._saved_at = 0, None

    def is_due(self, moment: Moment, logs: Logs) -> bool:
        """Whether to write now; an interrupt is the last chance, unless this very place has been written."""
        position = self.run.epochs_done, self.run.batches_done
        if moment == "interrupt":
            return position != self._saved_at and "loss" in logs
        if isinstance(self.save_freq, str) or moment == "epoch":
            is_due = (moment == "epoch") == (self.save_freq == "epoch")
        else:
            is_due = self.run.batches_seen - self._batches_at_save >= self.save_freq
        if is_due:
            self._batches_at_save, self._saved_at = self.run.batches_seen, position
        return is_due

    @abstractmethod
    def save(self, moment: Moment, logs: Logs) -> None:
        """Write, if it is time. moment: an epoch's end, an optimizer step inside it, or an interrupt's last chance."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return the files that a run can be resumed from, the newest first."""

    def state_dict(self) -> dict[str, Any]:
        return {"batches_at_save": self._batches_at_save}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches_at_save = int(state_dict["batches_at_save"])


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class CallbackList:
    """The callbacks of one call, in the user's order.

    Batch hooks that nobody overrides are never called: has_train_batch_end and its like say so.
    """

    def __init__(self, callbacks: Iterable[Callback] | Callback | None) -> None:
        if isinstance(callbacks, (Callback, type)):
            callbacks = [callbacks]
        self.callbacks = list(callbacks or [])
        for i, callback in enumerate(self.callbacks):
            _check_callback(callback, i)
        self._outer_runs: list[Run | None] = []
        checkpointers = [callback for callback in self.callbacks if isinstance(callback, Checkpointer)]
        self.checkpointers = sorted(checkpointers, key=lambda callback: not callback.writes_first)
        self.writes_resume_points = any(callback.writes_resume_points for callback in checkpointers)
        self.saves_within_epochs = any(callback.saves_within_epochs for callback in checkpointers)
        self.has_train_batch_begin = self._has("on_train_batch_begin") or self._has("on_batch_begin")
        self.has_train_batch_end = self._has("on_train_batch_end") or self._has("on_batch_end")
        self.has_test_batch_begin = self._has("on_test_batch_begin")
        self.has_test_batch_end = self._has("on_test_batch_end")
        self.has_predict_batch_begin = self._has("on_predict_batch_begin")
        self.has_predict_batch_end = self._has("on_predict_batch_end")

    def _has(self, hook: str) -> bool:
        base = getattr(Callback, hook)
        return any(getattr(getattr(callback, hook), "__func__", None) is not base for callback in self.callbacks)

    @property
    def are_all_built_in(self) -> bool:
        """Whether all are kerastorch's own, which add no keys of their own to the logs."""
        return all(is_built_in(callback) and type(callback).__name__ != "LambdaCallback" for callback in self.callbacks)

    def begin(self, model: Model, run: Run, params: dict[str, Any]) -> None:
        """Tell each callback what it works on."""
        self._outer_runs = [vars(callback).get("run") for callback in self.callbacks]
        for callback in self.callbacks:
            callback.run = run
            callback.set_model(model)
            callback.set_params(params)

    def end(self) -> None:
        """Take the run from each callback again; one that called evaluate with itself gets its fit's run back."""
        for callback, outer_run in zip(self.callbacks, self._outer_runs, strict=False):
            vars(callback).pop("run", None)
            if outer_run is not None:
                callback.run = outer_run

    def on_train_begin(self, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_train_begin(logs)

    def on_train_end(self, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_train_end(logs)

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_epoch_end(epoch, logs)

    def on_train_epoch_end(self, epoch: int, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_train_epoch_end(epoch, logs)

    def save(self, moment: Moment, logs: Logs) -> None:
        """Let the checkpointing callbacks write, those that must come first before the others."""
        for callback in self.checkpointers:
            callback.save(moment, logs)

    def on_train_batch_begin(self, batch: int, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_train_batch_end(batch, logs)

    def on_test_begin(self, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_test_begin(logs)

    def on_test_end(self, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_test_end(logs)

    def on_test_batch_begin(self, batch: int, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_test_batch_begin(batch, logs)

    def on_test_batch_end(self, batch: int, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_test_batch_end(batch, logs)

    def on_predict_begin(self, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_predict_begin(logs)

    def on_predict_end(self, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_predict_end(logs)

    def on_predict_batch_begin(self, batch: int, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_predict_batch_begin(batch, logs)

    def on_predict_batch_end(self, batch: int, logs: Logs) -> None:
        for callback in self.callbacks:
            callback.on_predict_batch_end(batch, logs)

    def close(self) -> None:
        """Close every callback, each one even where an earlier one fails; the first error comes out.

        One that called evaluate with itself stays open, for its fit.
        """
        failure: BaseException | None = None
        for callback, outer_run in zip(self.callbacks, self._outer_runs, strict=False):
            if outer_run is not None:
                continue
            try:
                callback.close()
            except BaseException as error:
                failure = failure or error
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # this frame and its traceback would hold each other, and with them the loader's workers


class Monitor:
    """Follows one value of the logs and tells whether it got better; NaN never is.

    name: the value's key, as "val_loss".   mode: "min", "max" or "auto" (from the metric; the loss is minimised).
    min_delta: gains must exceed it, in the value's units.   best: the best value so far, None before the first.
    """

    def __init__(self, name: str, mode: Literal["auto", "min", "max"], min_delta: float = 0.0) -> None:
        check_choice("mode", mode, ("auto", "min", "max"))
        check_number("min_delta", min_delta)
        self.name, self.mode, self.min_delta = name, mode, abs(min_delta)
        self.higher_is_better: bool | None = None if mode == "auto" else mode == "max"
        self.best: float | None = None

    @property
    def watches(self) -> dict[str, str]:
        """What a callback's state says of the value that it is about."""
        settled = {None: "auto", True: "max", False: "min"}
        return {"monitor": self.name, "mode": settled[self.higher_is_better]}

    def begin(self, run: Run) -> None:
        """Settle the direction and forget the best; ValueError where the value can't exist in this run."""
        self.best = None
        cannot_exist = run.logs_are_known or (self.name.startswith("val_") and run.val_data is None)
        if self.name not in run.log_names and cannot_exist:
            raise self._missing(run.log_names, run)
        self.higher_is_better = self._direction(run)

    def read(self, logs: Logs, run: Run) -> float | None:
        """Return the value, or None in an epoch without validation; ValueError where it is missing or no number."""
        if self.name in logs:
            return self._number(logs[self.name])
        if self.name.startswith("val_") and run.val_data is not None and not run.validation_is_due:
            return None
        raise self._missing(list(logs), run)

    def is_better(self, value: float, reference: float | None) -> bool:
        """Whether value beats reference by more than min_delta; anything but NaN beats None."""
        if math.isnan(value):
            return False
        if reference is None:
            return True
        return value - self.min_delta > reference if self.higher_is_better else value + self.min_delta < reference

    def _number(self, value: Any) -> float:
        try:
            if not isinstance(value, str):
                return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass
        raise ValueError(
            f"monitor={self.name!r} is {describe(value)} in the logs, not one number: monitor another value, or let "
            "a callback before this one add a number made of it to the logs."
        )

    def _direction(self, run: Run) -> bool:
        if self.mode != "auto":
            return self.mode == "max"
        direction = run.higher_is_better.get(self.name.removeprefix("val_"))
        if direction is None:
            raise ValueError(f"monitor={self.name!r}: whether higher is better is not known; pass mode='min' or 'max'.")
        return direction

    def _missing(self, known: list[str], run: Run) -> ValueError:
        no_validation = self.name.startswith("val_") and run.val_data is None
        hint = ": fit() got no validation data." if no_validation else did_you_mean(self.name, known)
        return ValueError(f"monitor={self.name!r} is not in the logs{hint} Known: {', '.join(known)}.")


def user_path(argument: str, path: str | os.PathLike[str]) -> str:
    """Return the path with "~" written out; TypeError, naming the argument, for what is none."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument} must be a path, got {path!r} ({type(path).__name__}).")
    return os.path.expanduser(os.fspath(path))


def _check_callback(callback: object, i: int) -> None:
    if isinstance(callback, type) and issubclass(callback, Callback):
        raise TypeError(f"callbacks[{i}] is the class {callback.__name__}; give an object, {callback.__name__}(...).")
    if not isinstance(callback, Callback):
        raise TypeError(f"callbacks[{i}] must be a kerastorch.callbacks.Callback, got {type(callback).__name__}.")
    for name in dir(type(callback)):
        if name.startswith("on_") and name not in HOOKS:
            near = difflib.get_close_matches(name[3:], [hook[3:] for hook in HOOKS], n=2, cutoff=0.55)
            if near:  # a name of another kind is the user's own affair
                raise ValueError(
                    f"callbacks[{i}], {type(callback).__name__}, has {name}(), which nothing calls; did you mean "
                    + " or ".join(f"'on_{name}'" for name in near)
                    + "?"
                )
