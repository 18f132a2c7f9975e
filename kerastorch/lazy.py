"""Lazy nets, whose layers learn their shapes at the first batch: which weights wait, and one call that settles them.

Sister: device.py below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kerastorch.device import preserved_random_state, set_random_state


def lazy_names(net: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers whose shapes no forward has settled yet."""
    return [name for name, value in (*net.named_parameters(), *net.named_buffers()) if is_lazy(value)]


def lazy_copies(net: nn.Module) -> dict[int, Any]:
    """Return copies of the buffers that have no shape yet, as deepcopy's memo: torch can't copy these."""
    lazy: list[Any] = [buffer for buffer in net.buffers() if is_lazy(buffer)]
    return {id(buffer): type(buffer)(device=buffer.device, dtype=buffer.dtype) for buffer in lazy}


@torch.no_grad()
def settle_shapes(net: nn.Module, forward: Callable[[], object], random_state: Mapping[str, Any]) -> None:
    """Call forward once, with net in eval mode and these random states; training flags and buffers stay as they were.

    random_state: as get_random_state() returns it; the present ones are put back.
    """
    training = {module: module.training for module in net.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in net.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    with preserved_random_state():
        set_random_state(random_state)
        net.eval()
        forward()
    for module, flag in training.items():
        module.training = flag
    for module, name, buffer, value in buffers:
        setattr(module, name, buffer)  # forward may have put another in its place
        buffer.copy_(value)
