"""EMA: an exponential moving average of the weights, which validation and checkpoints see."""

from __future__ import annotations

from typing import Any

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kerastorch.averaging import WeightAverage
from kerastorch.callbacks.callback import Callback, Logs


class EMA(Callback):
    """Average the weights after every optimizer step: average = decay * average + (1 - decay) * weights.

    decay: above 0, below 1.   keep_average: whether the net has the average when fit has ended, else the trained
    weights; after an interrupt it always has the trained weights, so that a following fit goes on.
    fit's validation, ModelCheckpoint and EarlyStopping see the average, whatever the order of the callbacks; then the
    trained weights come back, and are what an evaluate() of your own in a callback sees. Buffers, as batch norm's
    statistics, are those of the net. The average begins anew with each fit, at the weights of its first step.
    averaged_net: torch's AveragedModel of this fit, its module the net with averaged weights; None before the first.
    Raises ValueError for another decay, or beside a second average; TypeError for a net that can't be copied.
    Source: torch.optim.swa_utils.AveragedModel; Polyak and Juditsky 1992, doi:10.1137/0330046.
    """

    def __init__(self, decay: float = 0.999, keep_average: bool = True) -> None:
        if not isinstance(decay, (int, float)) or not 0 < decay < 1:
            raise ValueError(f"decay must be above 0 and below 1, got {decay!r}.")
        self.decay, self.keep_average = decay, keep_average
        self.averaged_net: AveragedModel | None = None

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if self.run.average is not None:
            raise ValueError("EMA and SWA beside each other, or two of one kind: a run publishes one average.")
        average = get_ema_multi_avg_fn(self.decay)
        self.run.average = WeightAverage(self.run.net, "EMA", keeps=self.keep_average, multi_avg_fn=average)
        self.averaged_net = self.run.average.averaged_net

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        super().on_train_batch_end(batch, logs)
        if self.run.step_is_due and self.run.average is not None:
            self.run.average.update()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.averaged_net is None else dict(self.averaged_net.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.averaged_net is not None
        self.averaged_net.load_state_dict(state_dict)
