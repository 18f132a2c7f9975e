"""One forward pass, looked at layer by layer, the loss against chance, and where gradients arrive.

Sisters: copies.py, data.py, trial.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kerastorch.device import Nested, leaves
from kerastorch.losses import Loss, loss_scale
from kerastorch.report import Finding, Layer, Level
from kerastorch.run import Run

MIN_VALUES = 8  # of a unit in a batch, before it can be called dead


class Watch(TorchFunctionMode):
    """Notes, while forward runs, each leaf module's call and the parameters that a torch function is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.findings: list[Finding] = []
        self.read: set[int] = set()
        leaf_modules = [(name, module) for name, module in net.named_modules() if not any(module.children())]
        self._hooks = [
            module.register_forward_hook(partial(self._note, name or "net")) for name, module in leaf_modules
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # to ask for .shape or .device is no use of the values
        if getattr(func, "__name__", "") != "__get__" or func == vars(torch._C.TensorBase)["data"].__get__:
            self.read.update(id(leaf) for leaf in leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        TorchFunctionMode.__exit__(self, *exception)
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _note(self, name: str, module: nn.Module, _: object, output: Nested) -> None:
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        count = sum(parameter.numel() for parameter in module.parameters())
        self.layers.append(Layer(name, type(module).__name__, shapes, count, sum(tensor.nbytes for tensor in tensors)))
        if isinstance(module, (nn.ReLU, nn.ReLU6)) and (share := _share_dead(tensors[0])) > 0.5:
            text = (
                f"{share:.0%} of the units of {name} are 0 for every row of the batch and learn nothing: look at the "
                "bias and the scale of the layer before it, lower the learning rate, or use LeakyReLU."
            )
            self.findings.append(Finding("warning", "Dead activations", text))
        if isinstance(module, (nn.Sigmoid, nn.Tanh)):
            low = -1 if isinstance(module, nn.Tanh) else 0
            share = ((tensors[0] < low + 1e-3) | (tensors[0] > 1 - 1e-3)).float().mean().item()
            if share > 0.9:
                text = (
                    f"{share:.0%} of the outputs of {name} are at the limits of {type(module).__name__}, where no "
                    "gradient passes: scale its inputs down, or the weights before it."
                )
                self.findings.append(Finding("warning", "Saturated activations", text))


def _share_dead(output: Tensor) -> float:
    """Share of units that are 0 throughout; units are channels (axis 1) or features (the last), the worse counts."""
    units = [(output == 0).movedim(axis, 0).flatten(1) for axis in (1, -1)] if output.dim() > 1 else []
    return max((unit.all(1).float().mean().item() for unit in units if unit.shape[1] >= MIN_VALUES), default=0.0)


def take_look(look: Callable[[Nested, Nested], None], outputs: Nested, y: Nested, title: str) -> list[Finding]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            look(outputs, y)
        except ValueError as error:
            return [Finding("error", title, str(error))]
    return [Finding("warning", title, str(warning.message)) for warning in caught]


# ---- loss and gradients ----


def chance_loss(loss_fn: Loss, outputs: Nested, y: Nested, sample_weight: Nested) -> float | None:
    """The loss of outputs that know nothing of x: even odds for classes, the mean of y for values; None if unknown."""
    scale = loss_scale(loss_fn.fn)
    if scale == "unknown" or not isinstance(outputs, Tensor) or isinstance(loss_fn.fn, nn.PoissonNLLLoss):
        return None
    know_nothing = torch.zeros_like(outputs, dtype=torch.float32)
    if scale == "log_probabilities":
        know_nothing -= math.log(outputs.shape[1])
    elif scale == "probabilities":
        know_nothing += 0.5
    elif scale == "values":
        know_nothing += y.float().mean(0)
    return loss_fn(know_nothing, y, sample_weight).item()


def check_start(loss: float, chance: float | None, is_trained: bool) -> Finding:
    if not math.isfinite(loss):
        text = f"the first loss is {loss}: look for log(0), a division by 0 or very large weights in net and loss."
        return Finding("error", "The loss is not finite", text)
    if chance is None:
        return Finding("ok", "Loss at the start", f"{loss:.4g}; what chance gives is not known for this loss.")
    figures = f"{loss:.4g}, where knowing nothing of x gives {chance:.4g}"
    if loss > 2 * chance + 0.5:
        text = f"{figures}: scale x (and y, in regression), or start with smaller weights in the last layer."
        return Finding("warning", "Loss at the start is far above chance", text)
    if loss < 0.5 * chance and not is_trained:
        text = f"{figures}: does x hold the target? Expected only of weights that are trained already."
        return Finding("warning", "Loss at the start is far below chance", text)
    return Finding("ok", "Loss at the start", f"{figures}.")


def has_gradient(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    return bool((gradient.coalesce().values() if gradient.is_sparse else gradient).any())


def check_gradients(run: Run, without_gradient: Sequence[str], read: set[int]) -> list[Finding]:
    named = dict(run.net.named_parameters())
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    no_grad = [name for name in without_gradient if named[name].grad is None]
    cut_text = (
        "forward reads them, but no gradient comes back: look for .detach(), .data, no_grad(), argmax or a result that "
        "is not returned. If it is meant, set requires_grad=False."
    )
    table: list[tuple[Level, str, list[str], str]] = [
        (
            *("warning", "Parameters never used", [name for name in no_grad if id(named[name]) not in read]),
            "forward does not read them: call the layer, or take it out.",
        ),
        (
            "warning",
            "Parameters cut off from the loss",
            [name for name in no_grad if id(named[name]) in read],
            cut_text,
        ),
        (
            *("warning", "Gradients are all 0", [name for name in without_gradient if name not in no_grad]),
            "look for dead activations after them, or a factor of 0.",
        ),
        ("ok", "Frozen parameters", [name for name, p in named.items() if not p.requires_grad], "requires_grad=False."),
        (
            *("ok", "Not in the optimizer", [n for n, p in named.items() if p.requires_grad and id(p) not in held]),
            "these stay as they are.",
        ),
    ]
    findings = [Finding(level, title, f"{_some(names)}: {text}") for level, title, names, text in table if names]
    return findings or [Finding("ok", "Gradients", f"all {len(named)} parameters get one.")]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
