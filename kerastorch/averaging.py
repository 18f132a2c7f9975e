"""An average of the net's weights that stands in for them in validation and checkpoints. Sisters: resume.py, run.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kerastorch.device import bare_module
from kerastorch.lazy import lazy_copies, lazy_names

EXTRA_STATE = "_extra_state"  # the last part of its key in a state_dict


class WeightAverage:
    """What EMA and SWA keep: torch's AveragedModel of the net, and the exchange of the two.

    net: the module that is trained.   owner: what errors call the callback.   keeps: whether the net gets the average
    when fit has ended.   averaged_net: an AveragedModel, its module a copy of the net with averaged weights.
    Raises TypeError for a net that can't be copied.
    """

    def __init__(
        self, net: nn.Module, owner: str, *, keeps: bool, multi_avg_fn: Callable[..., None] | None = None
    ) -> None:
        self.net, self.keeps = bare_module(net), keeps
        self.is_swapped = False
        try:
            copied = copy.deepcopy(self.net, lazy_copies(self.net))
            self.averaged_net = AveragedModel(nn.Identity(), multi_avg_fn=multi_avg_fn)
            self.averaged_net.module = copied
            self.averaged_net.eval()
        except (TypeError, RuntimeError) as error:
            kind = type(self.net).__name__
            raise TypeError(f"{owner} averages a copy of the net, but this {kind} can't be copied: {error}") from error

    @property
    def has_begun(self) -> bool:
        """Whether there is anything in it yet."""
        return int(self.averaged_net.n_averaged) > 0  # on the CPU always: no sync

    def take_shapes(self) -> None:
        """Give a copy that was made of a lazy net the shapes that the net has by now."""
        if not self.has_begun and lazy_names(self.averaged_net):
            module: nn.Module = self.averaged_net.module
            module.load_state_dict(self.net.state_dict())

    def update(self) -> None:
        """Take the net's weights into the average; buffers follow the net's."""
        self.take_shapes()
        self.averaged_net.update_parameters(self.net)

    def published_state_dict(self) -> dict[str, Any]:
        """Return the averaged weights under the net's keys; the net's own before the average has begun.

        What the net's modules keep as extra state can't be averaged: it is the net's.
        """
        own: dict[str, Any] = self.net.state_dict()
        if self.is_swapped or not self.has_begun:
            return own
        module: nn.Module = self.averaged_net.module
        average: dict[str, Any] = module.state_dict()
        average.update({key: own[key] for key in own if key.rpartition(".")[2] == EXTRA_STATE})
        return average

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the net's weights and the average's, in place, since optimizers and graphs hold on to them."""
        average: nn.Module = self.averaged_net.module
        own_tensors = [*self.net.parameters(), *self.net.buffers()]
        for own, other in zip(own_tensors, [*average.parameters(), *average.buffers()], strict=True):
            held = own.clone()
            own.copy_(other)
            other.copy_(held)
        self.is_swapped = not self.is_swapped

    def adopt(self) -> None:
        """Give the net the average for good, where that was asked for and there is one."""
        if self.keeps and self.has_begun:
            self.net.load_state_dict(self.published_state_dict())
