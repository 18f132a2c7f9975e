"""Loop: what a loop backend must have. A loop reads and writes one Run a call; it keeps no training state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from kerastorch.losses import Loss
from kerastorch.run import Run


class Loop(ABC):
    """The base of the loop backends: fit, evaluate and predict, each over the Run it is given.

    bind() sets run, net, loss_fn and optimizer on the loop for the time of each call, for methods that take no run.
    """

    run: Run
    net: nn.Module
    loss_fn: Loss
    optimizer: Optimizer

    def bind(self, run: Run) -> None:
        """Take up a new call's Run."""
        self.run, self.net = run, run.net
        if hasattr(run, "optimizer"):  # predict works before compile()
            self.loss_fn, self.optimizer = run.loss_fn, run.optimizer

    def unbind(self) -> None:
        """Let go of the call's Run, and with it of the data."""
        for name in ("run", "net", "loss_fn", "optimizer"):
            vars(self).pop(name, None)

    def log(self, **values: Tensor | float) -> None:
        """Average scalars of a step into the logs; see Run.log."""
        self.run.log(**values)

    @abstractmethod
    def fit(self, run: Run) -> None:
        """Train over run.epoch_range() and run.train_batches(); validate over run.eval_batches() where it is due."""

    @abstractmethod
    def evaluate(self, run: Run) -> None:
        """Record loss and outputs of run.eval_batches(), without training."""

    @abstractmethod
    def predict(self, run: Run) -> None:
        """Collect the outputs for run.predict_batches()."""


def as_pair(returned: object, step: str) -> tuple[Tensor, Any]:
    """Return a step's (loss, outputs) as it is; TypeError, naming the step, for anything else."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        return cast("tuple[Tensor, Any]", returned)
    what = "the loss alone" if isinstance(returned, Tensor) and returned.numel() == 1 else type(returned).__name__
    what = "None" if returned is None else what
    raise TypeError(f"{step} must return (loss, outputs), got {what}.")
