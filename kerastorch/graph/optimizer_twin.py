"""A second optimizer over the first one's parameters and state, which a graph can hold.

Sister: optimizers.py below.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class OptimizerTwin:
    """A second optimizer with the first one's parameters and state, which can be traced: its rates are in tensors.

    changed: the option that follow() found changed.
    """

    def __init__(self, optimizer: Optimizer, *, is_captured: bool) -> None:
        self.optimizer = optimizer
        self.twin = copy.copy(optimizer)
        self.twin.param_groups = [self._group(group, is_captured) for group in optimizer.param_groups]
        self.changed: str | None = None
        if is_captured:
            _move_step_counts(optimizer)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._options = self._read_options()

    def _group(self, group: dict[str, Any], is_captured: bool) -> dict[str, Any]:
        device = group["params"][0].device if is_captured else "cpu"
        # A capture's rate is a tensor, which fused kernels read; others ask the host for its value.
        traced = {"fused": True if is_captured else None, "foreach": False, "capturable": True}
        rate = torch.tensor(float(group["lr"]), device=device)
        return {**group, **{key: value for key, value in traced.items() if key in group}, "lr": rate}

    def follow(self) -> bool:
        """Take over the optimizer's rates; return False where its other options, or its state, are not as they were."""
        for i, group in enumerate(self.optimizer.param_groups):
            if group["lr"] != self._rates[i]:
                self._rates[i] = float(group["lr"])
                self.twin.param_groups[i]["lr"].fill_(self._rates[i])
        options = self._read_options()
        if options != self._options:
            self.changed = next(
                (
                    key
                    for one, other in zip(options, self._options, strict=False)
                    for key in one
                    if one[key] != other[key]
                ),
                "the number of param groups",
            )
            return False
        return self.twin.state is self.optimizer.state

    def _read_options(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]

    def step(self) -> None:
        """Update, without the decorators of step(), which no graph can hold."""
        inspect.unwrap(type(self.twin).step)(self.twin)

    def call_hooks(self) -> None:
        """Call what callbacks hung on the optimizer's step; the gradients are those of the update."""
        vars(self.optimizer)["_opt_called"] = True  # schedulers warn without it
        for hook in step_hooks(self.optimizer):
            hook(self.optimizer, (), {})


def _move_step_counts(optimizer: Optimizer) -> None:
    """Let a capture count steps on the device, where unfused optimizers have their counts on the CPU."""
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device)


def step_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """Return what was hung on an optimizer's step."""
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
