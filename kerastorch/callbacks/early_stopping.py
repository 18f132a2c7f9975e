"""EarlyStopping: ends fit when a value stops getting better."""

from __future__ import annotations

import copy
from typing import Any, Literal

from kerastorch.callbacks.callback import Callback, Logs, Monitor
from kerastorch.device import are_finite, bare_module
from kerastorch.errors import check_int, check_number


class EarlyStopping(Callback):
    """Stop when `monitor` has not improved for `patience` epochs.

    monitor: a key of the epoch's logs.   min_delta: a gain must exceed it.   patience: epochs without a gain, from 0.
    verbose: 1 prints when it stops.   mode: "min", "max" or "auto" (from the metric).
    baseline: a value to beat; gains short of it do not reset the wait.
    restore_best_weights: put the best epoch's weights (its average under EMA or SWA) back when fit ends, stopped early
    or not, but not interrupted; the optimizer keeps its last state.   start_from_epoch: epochs to let pass first.
    Its state begins anew with each fit. NaN is never a gain. Raises ValueError for a monitor that can't exist.
    Source: arguments and rules of keras.callbacks.EarlyStopping.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0.0,
        patience: int = 0,
        verbose: int = 0,
        mode: Literal["auto", "min", "max"] = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
    ) -> None:
        check_int("patience", patience, at_least=0)
        check_int("start_from_epoch", start_from_epoch, at_least=0)
        if baseline is not None:
            check_number("baseline", baseline)
        self.monitor = monitor
        self.watched = Monitor(monitor, mode, min_delta)
        self.patience, self.verbose, self.baseline = patience, verbose, baseline
        self.restore_best_weights, self.start_from_epoch = restore_best_weights, start_from_epoch
        self.wait = 0
        self.best_epoch: int | None = None
        self.best_weights: dict[str, Any] | None = None
        self.stopped_epoch: int | None = None

    @property
    def best(self) -> float | None:
        """The best value of this fit so far."""
        return self.watched.best

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self.watched.begin(self.run)
        self.wait, self.best_epoch, self.best_weights, self.stopped_epoch = 0, None, None, None

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        value = self.watched.read(logs or {}, self.run)
        if value is None or epoch < self.start_from_epoch:
            return
        self.wait += 1
        if self.watched.is_better(value, self.watched.best):
            self.watched.best, self.best_epoch = value, epoch
            if self.restore_best_weights and are_finite(self.run.published_state_dict()):
                self.best_weights = copy.deepcopy(self.run.published_state_dict())
            if self.baseline is None or self.watched.is_better(value, self.baseline):
                self.wait = 0
        elif self.wait >= self.patience and epoch > 0:
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def on_train_end(self, logs: Logs | None = None) -> None:
        if self.run.interrupt is not None:
            return
        if self.stopped_epoch is not None and self.verbose:
            print(f"Epoch {self.stopped_epoch + 1}: early stopping, {self.monitor} did not improve.")
        if self.best_weights is not None:
            bare_module(self.run.net).load_state_dict(self.best_weights)
            if self.verbose and self.best_epoch is not None:
                print(f"Weights of epoch {self.best_epoch + 1} restored ({self.monitor}: {self.best:.4f}).")

    def close(self) -> None:
        self.best_weights = None  # a copy of the net's size

    def state_dict(self) -> dict[str, Any]:
        names = ("best", "wait", "best_epoch", "best_weights", "stopped_epoch")
        return {"watches": self.watched.watches, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watched.best = None if state_dict["best"] is None else float(state_dict["best"])
        self.wait, self.best_epoch = int(state_dict["wait"]), state_dict["best_epoch"]
        self.best_weights, self.stopped_epoch = state_dict["best_weights"], state_dict["stopped_epoch"]
        if self.stopped_epoch is not None and self.wait < self.patience:  # raised since: the run goes on
            self.run.stop_training = False
        if not self.run.stop_training:
            self.stopped_epoch = None
