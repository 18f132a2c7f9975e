"""LearningRateScheduler: sets the learning rate from a function of the epoch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Real

from kerastorch.callbacks.callback import Callback, Logs
from kerastorch.optimizers import set_option

LR_NAMES = ("lr", "learning_rate")


class LearningRateScheduler(Callback):
    """Set the learning rate at the beginning of each epoch to schedule(epoch, lr), or schedule(epoch).

    schedule: takes the epoch's index, from 0, and the rate of the first parameter group, or the index alone; returns a
    finite number >= 0. Which of the two it takes is read from its signature.   verbose: 1 prints each rate.
    All parameter groups get the same rate. The logs gain "learning_rate", the first group's.
    Raises TypeError for a schedule of another signature or a result that is no number, ValueError for a negative or
    infinite result or NaN, and beside compile(lr_scheduler=...).
    Source: arguments and rules of keras.callbacks.LearningRateScheduler.
    """

    def __init__(self, schedule: Callable[[int, float], float] | Callable[[int], float], verbose: int = 0) -> None:
        self.takes_lr = _takes_lr(schedule)
        self.schedule: Callable[..., float] = schedule
        self.verbose = verbose

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if self.run.lr_scheduler is not None:
            raise ValueError(
                f"LearningRateScheduler and compile(lr_scheduler=...), a {type(self.run.lr_scheduler).__name__}, both "
                "set the learning rate and would fight: leave one of them out."
            )
        self.run.added_logs.append("learning_rate")

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        rate = self.schedule(epoch, self._rate()) if self.takes_lr else self.schedule(epoch)
        if isinstance(rate, bool) or not isinstance(rate, Real):
            kind = type(rate).__name__
            raise TypeError(f"schedule must return a number, a float; in epoch {epoch} it returned {rate!r} ({kind}).")
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"schedule must return a finite rate >= 0; in epoch {epoch} it returned {rate}.")
        for group in self.run.optimizer.param_groups:
            set_option(group, "lr", float(rate))
        if self.verbose:
            print(f"Epoch {epoch + 1}: learning rate set to {float(rate):g}.")

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if logs is not None:
            logs["learning_rate"] = self._rate()

    def _rate(self) -> float:
        return float(self.run.optimizer.param_groups[0]["lr"])  # a sync where it is on a GPU


def _takes_lr(schedule: object) -> bool:
    """Whether schedule takes (epoch, lr), not (epoch) alone; TypeError where it takes neither or that can't be told."""
    advice = "write it as lambda epoch, lr: ... or lambda epoch: ..."
    if not callable(schedule):
        raise TypeError(
            f"schedule must be a function of (epoch, lr) or (epoch), got {type(schedule).__name__}; "
            "a torch scheduler goes to compile(lr_scheduler=...)."
        )
    try:
        signature = inspect.signature(schedule)
    except ValueError:
        raise TypeError(f"what schedule={schedule!r} takes can't be read: {advice}.") from None
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if _accepts(signature, 0, 0.0):
        second = positional[1] if len(positional) > 1 else None
        if second is not None and second.default is not second.empty and second.name not in LR_NAMES:
            raise TypeError(  # def schedule(epoch, decay=0.5) does not want the rate there
                f"schedule{signature} has {second.name!r}, with a default, where it would be given the learning rate: "
                f"call it {LR_NAMES[0]!r} if that is meant, else {advice}."
            )
        return True
    if _accepts(signature, 0):
        return False
    raise TypeError(f"schedule must take (epoch, lr) or (epoch), but it takes {signature}: {advice}.")


def _accepts(signature: inspect.Signature, *arguments: object) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True
