"""SWA: the mean of the weights at the ends of epochs, which validation and checkpoints see."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from kerastorch.averaging import WeightAverage
from kerastorch.callbacks.callback import Callback, Logs
from kerastorch.device import preserved_random_state
from kerastorch.errors import check_int


class SWA(Callback):
    """Average the weights at the end of each epoch from start_epoch on, each epoch counting the same.

    start_epoch: index, from 0, of the first epoch whose weights count; a fit that does not come to it is left alone.
    keep_average: as in EMA.
    From that epoch on fit's validation, ModelCheckpoint and EarlyStopping see the average, whatever the order of the
    callbacks; then the trained weights come back. Batch norm's statistics are taken anew for it, in a forward pass over
    the training data at the end of each such epoch; random states are left as they were. An interrupt cuts that pass:
    the resumed run takes it anew, and calls every on_train_epoch_end of that epoch again. The learning rate is the
    user's: torch.optim.swa_utils.SWALR goes to compile(lr_scheduler=...).
    Raises ValueError beside a second average, and for batch norm with training data that can be read only once;
    TypeError for a net that can't be copied.
    Source: torch.optim.swa_utils; Izmailov et al. 2018, arXiv:1803.05407.
    """

    def __init__(self, start_epoch: int, keep_average: bool = True) -> None:
        check_int("start_epoch", start_epoch, at_least=0)
        self.start_epoch, self.keep_average = start_epoch, keep_average
        self._average: WeightAverage | None = None

    @property
    def averaged_net(self) -> AveragedModel | None:
        """torch's AveragedModel of this fit, its module the net with averaged weights; None before start_epoch."""
        return self._average.averaged_net if self._average is not None and self._average.has_begun else None

    def on_train_begin(self, logs: Logs | None = None) -> None:
        run = self.run
        if run.average is not None:
            raise ValueError("EMA and SWA beside each other, or two of one kind: a run publishes one average.")
        source = run.train_data
        if source is not None and source.is_one_shot and _batch_norms(run.net):
            raise ValueError(
                f"SWA takes batch norm's statistics in a second pass, but {source.name} is an iterator, which can be "
                "read once: give an object that can be iterated anew."
            )
        run.average = self._average = WeightAverage(run.net, "SWA", keeps=self.keep_average)

    def on_train_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if epoch >= self.start_epoch and self._average is not None:
            self._average.take_shapes()
            net = self._average.averaged_net
            before = copy.deepcopy(net.state_dict()) if _batch_norms(net) else {}
            self._average.update()
            if not self._take_statistics(net):
                net.load_state_dict(before)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.averaged_net is None else dict(self.averaged_net.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self._average is not None
        self._average.averaged_net.load_state_dict(state_dict)

    @torch.no_grad()
    def _take_statistics(self, net: nn.Module) -> bool:
        """Set batch norm's statistics to those of the training data; return whether no interrupt cut the pass."""
        is_whole = True
        net.train()  # layers that a train() of the net's own keeps in eval mode keep their statistics too
        layers = [layer for layer in _batch_norms(net) if layer.training]
        source = self.run.train_data
        if layers and source is not None:
            momenta = [layer.momentum for layer in layers]
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the plain mean over batches
            with preserved_random_state(*source.generators):
                is_whole = self.run.forward_over(source.another(), net)
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
        net.eval()
        return is_whole


def _batch_norms(net: nn.Module) -> list[_BatchNorm]:
    layers = [layer for layer in net.modules() if isinstance(layer, _BatchNorm)]
    return [layer for layer in layers if layer.track_running_stats]
