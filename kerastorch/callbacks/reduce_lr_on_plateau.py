"""ReduceLROnPlateau: lowers the learning rate when a value stops getting better."""

from __future__ import annotations

from typing import Any, Literal

from kerastorch.callbacks.callback import Callback, Logs, Monitor
from kerastorch.errors import check_int, is_number
from kerastorch.optimizers import set_option


class ReduceLROnPlateau(Callback):
    """Multiply the learning rates by `factor` when `monitor` has not improved for `patience` epochs.

    monitor: a key of the epoch's logs.   factor: above 0, below 1.   patience: epochs without a gain, from 0.
    verbose: 1 prints each reduction.   mode: "min", "max" or "auto" (from the metric).
    min_delta: a gain must exceed it.   cooldown: epochs after a reduction that do not count as waiting.
    min_lr: no rate is brought below it.
    Every parameter group keeps its own rate. The logs gain "learning_rate", the first group's during the epoch.
    NaN is never a gain; an epoch without the validation that monitor needs counts for nothing, cooldown included.
    Its state begins anew with each fit; the rates stay. Raises ValueError for a monitor that can't exist, or beside
    compile(lr_scheduler=...).   Source: arguments and rules of keras.callbacks.ReduceLROnPlateau.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: Literal["auto", "min", "max"] = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        if not is_number(factor) or not 0 < factor < 1:
            raise ValueError(f"factor must be above 0 and below 1, got {factor!r}.")
        if not is_number(min_lr) or not min_lr >= 0:
            raise ValueError(f"min_lr must be at least 0, got {min_lr!r}.")
        check_int("patience", patience, at_least=0)
        check_int("cooldown", cooldown, at_least=0)
        self.monitor = monitor
        self.watched = Monitor(monitor, mode, min_delta)
        self.factor, self.patience, self.verbose = factor, patience, verbose
        self.cooldown, self.min_lr = cooldown, min_lr
        self.wait = self.cooldown_counter = 0

    @property
    def best(self) -> float | None:
        """The best value of this fit so far."""
        return self.watched.best

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if self.run.lr_scheduler is not None:
            raise ValueError(
                f"ReduceLROnPlateau and compile(lr_scheduler=...), a {type(self.run.lr_scheduler).__name__}, both set "
                "the learning rate and would fight: leave one of them out."
            )
        self.watched.begin(self.run)
        self.run.added_logs.append("learning_rate")
        self.wait = self.cooldown_counter = 0

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        logs = {} if logs is None else logs
        logs["learning_rate"] = self._rates()[0]
        value = self.watched.read(logs, self.run)
        if value is None:
            return
        is_cooling = self.cooldown_counter > 0
        self.cooldown_counter -= is_cooling
        if self.watched.is_better(value, self.watched.best):
            self.watched.best, self.wait = value, 0
        elif not is_cooling:
            self.wait += 1
            if self.wait >= self.patience and self._reduce():
                self.wait, self.cooldown_counter = 0, self.cooldown
                if self.verbose:
                    rates = ", ".join(f"{rate:g}" for rate in self._rates())
                    print(f"Epoch {epoch + 1}: {self.monitor} did not improve, learning rate reduced to {rates}.")

    def state_dict(self) -> dict[str, Any]:
        return {
            "watches": self.watched.watches,
            "best": self.best,
            "wait": self.wait,
            "cooldown_counter": self.cooldown_counter,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watched.best, self.wait = state_dict["best"], state_dict["wait"]
        self.cooldown_counter = state_dict["cooldown_counter"]

    def _rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.run.optimizer.param_groups]  # a sync where it is on a GPU

    def _reduce(self) -> bool:
        """Lower every rate above min_lr; return whether any changed."""
        before = self._rates()
        for group, rate in zip(self.run.optimizer.param_groups, before, strict=True):
            if rate <= self.min_lr:
                continue
            set_option(group, "lr", max(rate * self.factor, self.min_lr))
        return self._rates() != before
