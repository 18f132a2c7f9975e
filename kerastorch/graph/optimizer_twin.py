"""A second optimizer over the first one's parameters and state, which a graph can hold.

Sister: optimizers.py below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

LEAST_RATE = 1e-30  # stands for a rate of 0, which torch's traceable steps divide by; it changes no weight either


class OptimizerTwin:
    """A second optimizer with the first one's parameters and state, which can be traced: its rates are in tensors.

    changed: the option that follow() found changed.
    """

    def __init__(self, optimizer: Optimizer, *, is_captured: bool) -> None:
        self.optimizer = optimizer
        self.twin = object.__new__(type(optimizer))  # copy() would leave out what a subclass has of its own
        vars(self.twin).update(vars(optimizer))
        self.twin.param_groups = [_traceable(group, is_captured) for group in optimizer.param_groups]
        self.changed: str | None = None
        self._counts = _find_counts(optimizer) if is_captured else []
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._options = self._read_options()
        self.begin()
        self._places = self._find_places()

    def begin(self) -> None:
        """Let steps be counted on the device, as a capture has to."""
        for state, name, on_device in self._counts:
            on_device.copy_(state[name])
            state[name] = on_device

    def end(self) -> None:
        """Let steps be counted on the CPU again, where unfused optimizers count: they would wait for the device."""
        for state, name, on_device in self._counts:
            state[name] = on_device.cpu()

    def follow(self) -> bool:
        """Take over the optimizer's rates; return False where its other options, or its state, are not as they were."""
        for i, (group, twin) in enumerate(zip(self.optimizer.param_groups, self.twin.param_groups, strict=False)):
            rate = group["lr"]
            if isinstance(rate, Tensor) and not rate.is_cpu:
                twin["lr"].copy_(rate).clamp_(min=LEAST_RATE)  # without a look at it, which would be a sync
            elif rate != self._rates[i]:
                self._rates[i] = float(rate)
                twin["lr"].fill_(self._rates[i] or LEAST_RATE)
        options = self._read_options()
        if options != self._options:
            pairs = zip(options, self._options, strict=False)
            changed = (name for one, other in pairs for name in one if one[name] != other[name])
            self.changed = next(changed, "number of param groups")
            return False
        return self.twin.state is self.optimizer.state

    def has_moved(self) -> bool:
        """Whether the state lies elsewhere than a capture knows."""
        return self._find_places() != self._places

    def _find_places(self) -> list[int]:
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value.data_ptr() for value in values if isinstance(value, Tensor)]

    def _read_options(self) -> list[dict[str, Any]]:
        names = self.optimizer.defaults.keys() - {"lr"}  # schedulers note more in the groups, which no step reads
        return [{name: group.get(name) for name in names} for group in self.optimizer.param_groups]

    def step(self) -> None:
        """Update, without the decorators of step(), which no graph can hold."""
        inspect.unwrap(type(self.twin).step)(self.twin)

    def call_hooks(self) -> None:
        """Call what callbacks hung on the optimizer's step; the gradients are those of the update."""
        vars(self.optimizer)["_opt_called"] = True  # schedulers warn without it
        for hook in step_hooks(self.optimizer):
            hook(self.optimizer, (), {})


def _traceable(group: dict[str, Any], is_captured: bool) -> dict[str, Any]:
    device = group["params"][0].device if is_captured else "cpu"
    # A capture's rate is on the device. Fused steps read it there, and those of many tensors at once; others ask the
    # host for its value.
    traced = {
        "fused": True if is_captured else None,
        "foreach": is_captured and "fused" not in group,
        "capturable": True,
    }
    rate = torch.tensor(float(group["lr"]) or LEAST_RATE, dtype=torch.float32, device=device)
    return {**group, **{key: value for key, value in traced.items() if key in group}, "lr": rate}


def _find_counts(optimizer: Optimizer) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return each single number of the state that stands on the CPU, and a place for it on its parameter's device."""
    return [
        (state, name, value.to(parameter.device))
        for parameter, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dim() == 0 and value.is_cpu
    ]


def step_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """Return what was hung on an optimizer's step."""
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def pre_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """Return those that are to be called before the step."""
    return list(optimizer._optimizer_step_pre_hooks.values())
