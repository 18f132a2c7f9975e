"""SWA: the mean of the weights at the ends of epochs, which validation and checkpoints see."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kerastorch.callbacks.callback import Callback, Logs
from kerastorch.device import preserved_random_state
from kerastorch.errors import check_int
from kerastorch.resume import bare_module


class SWA(Callback):
    """Average the weights at the end of each epoch from start_epoch on, each epoch counting the same.

    start_epoch: index, from 0, of the first epoch whose weights count.   keep_average: as in EMA.
    From that epoch on validation, ModelCheckpoint and EarlyStopping see the average, whatever the order of the
    callbacks; training weights come back after. Batch norm's statistics are taken anew for it, in a forward pass over
    the training data at the end of each such epoch; random states are left as they were. The learning rate is the
    user's: torch.optim.swa_utils.SWALR goes to compile(lr_scheduler=...).
    averaged_net: torch's AveragedModel of this fit, None before start_epoch.
    Raises ValueError beside a second average, and for batch norm with training data that can be read only once.
    Source: torch.optim.swa_utils; Izmailov et al. 2018, arXiv:1803.05407.
    """

    def __init__(self, start_epoch: int, keep_average: bool = True) -> None:
        check_int("start_epoch", start_epoch, at_least=0)
        self.start_epoch, self.keep_average = start_epoch, keep_average
        self.averaged_net: AveragedModel | None = None

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self.averaged_net = None
        if self.run.averaged_net is not None:
            raise ValueError("EMA and SWA beside each other, or two of one kind: a run publishes one average.")
        source = self.run.train_data
        if source is not None and source.is_one_shot and _batch_norms(self.run.net):
            raise ValueError(
                f"SWA takes batch norm's statistics in a second pass, but {source.name} is an iterator, which can be "
                "read once: give an object that can be iterated anew."
            )

    def on_train_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if epoch < self.start_epoch:
            return
        if self.averaged_net is None:
            self._begin()
        assert self.averaged_net is not None
        self.averaged_net.update_parameters(bare_module(self.run.net))
        self._take_statistics(self.averaged_net)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.averaged_net is None else dict(self.averaged_net.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.averaged_net is None:
            self._begin()
        assert self.averaged_net is not None
        self.averaged_net.load_state_dict(state_dict)

    def _begin(self) -> None:
        self.averaged_net = AveragedModel(bare_module(self.run.net))
        self.run.averaged_net, self.run.keeps_average = self.averaged_net, self.keep_average

    @torch.no_grad()
    def _take_statistics(self, net: AveragedModel) -> None:
        layers = _batch_norms(net)
        source = self.run.train_data
        if not layers or source is None:
            return
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches
        net.train()
        with preserved_random_state(*source.generators):
            self.run.forward_over(source.another(), net)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _batch_norms(net: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    layers = [layer for layer in net.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    return [layer for layer in layers if layer.track_running_stats]
