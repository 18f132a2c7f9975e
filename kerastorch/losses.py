"""Losses by name, and the one form in which a loop calls any of them: loss_fn(outputs, y, sample_weight).

Every classification loss given by name expects logits, as torch nets give them ("nll" alone takes log-probabilities,
as its definition says). Sisters: optimizers.py, metrics.py.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kerastorch.device import Nested, describe
from kerastorch.errors import look_up

LossFunction = Callable[[Any, Any], Tensor]

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mse": nn.MSELoss,
    "mse_loss": nn.MSELoss,
    "mean_squared_error": nn.MSELoss,
    "mae": nn.L1Loss,
    "l1": nn.L1Loss,
    "l1_loss": nn.L1Loss,
    "mean_absolute_error": nn.L1Loss,
    "smooth_l1": nn.SmoothL1Loss,
    "smooth_l1_loss": nn.SmoothL1Loss,
    "huber": nn.HuberLoss,
    "huber_loss": nn.HuberLoss,
    "cross_entropy": nn.CrossEntropyLoss,
    "sparse_categorical_crossentropy": nn.CrossEntropyLoss,
    "categorical_crossentropy": nn.CrossEntropyLoss,
    "nll": nn.NLLLoss,
    "nll_loss": nn.NLLLoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
    "binary_crossentropy": nn.BCEWithLogitsLoss,
    "kl_div": functools.partial(nn.KLDivLoss, reduction="batchmean"),
    "kl_divergence": functools.partial(nn.KLDivLoss, reduction="batchmean"),
    "poisson": nn.PoissonNLLLoss,
    "poisson_nll": nn.PoissonNLLLoss,
    "multi_margin": nn.MultiMarginLoss,
    "multilabel_soft_margin": nn.MultiLabelSoftMarginLoss,
}


class Loss:
    """A loss as the loops call it: loss_fn(outputs, y, sample_weight) gives the scalar to minimise.

    fn: a callable (outputs, y) -> scalar, or values per sample, whose mean is taken.
    outputs: what forward returned.   y: the batch's targets.   sample_weight: None or a tensor of shape (N,); the
    weighted loss is sum(sample_weight * loss_per_sample) / N, as in Keras.
    on_first_batch: called once with (outputs, y) before the first loss is taken, to check them.
    Raises ValueError where weights are given to a loss without values per sample.
    """

    def __init__(self, fn: LossFunction, on_first_batch: Callable[[Nested, Nested], None] | None = None) -> None:
        self.fn = fn
        self.on_first_batch = on_first_batch

    def __call__(self, outputs: Nested, y: Nested, sample_weight: Tensor | None = None) -> Tensor:
        if self.on_first_batch is not None:
            check, self.on_first_batch = self.on_first_batch, None
            check(outputs, y)
        if sample_weight is None:
            loss = self.fn(outputs, y)
            return loss if loss.dim() == 0 else loss.mean()
        losses = self.per_sample(outputs, y)
        if losses.dim() == 0 or len(losses) != len(sample_weight):
            raise ValueError(
                f"sample_weight has {len(sample_weight)} weights, but the loss {self.name} gives {describe(losses)}: "
                "weights need one value per sample."
            )
        return (losses.flatten(1).mean(1) * sample_weight if losses.dim() > 1 else losses * sample_weight).mean()

    @property
    def name(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    @functools.cached_property
    def per_sample(self) -> LossFunction:
        """The same loss with one value per sample: reduction="none" where the loss knows it, else the loss itself."""
        if isinstance(self.fn, nn.Module):
            if not hasattr(self.fn, "reduction"):
                return self.fn
            fn: Any = copy.copy(self.fn)  # shares weights and parameters
            fn.reduction = "none"
            return cast(LossFunction, fn)
        if "reduction" in _parameter_names(self.fn):
            return functools.partial(cast(Callable[..., Tensor], self.fn), reduction="none")
        return self.fn


def make_loss(loss: str | type[nn.Module] | LossFunction, device: torch.device) -> LossFunction:
    """Return the callable (outputs, y) for a name, an nn.Module (class or object; moved to device) or a callable.

    Raises ValueError for an unknown name, naming the nearest, and TypeError for anything that can't be called.
    """
    made: object = loss
    if isinstance(loss, str):
        made = look_up("loss", loss, LOSSES)()
    elif isinstance(loss, type) and issubclass(loss, nn.Module):
        made = loss()
    if not callable(made) or isinstance(made, type):
        raise TypeError(
            f"loss must be a name, an nn.Module or a callable (outputs, y) -> tensor, got {loss!r}."
            f" Names: {', '.join(sorted(LOSSES))}."
        )
    if isinstance(made, nn.Module):
        made.to(device)
    return made


def loss_scale(fn: object) -> str:
    """Return what this loss takes outputs for; metrics by name read it.

    "class_logits" (one class of C), "label_logits" (yes or no, for each of C labels), "log_probabilities",
    "probabilities", "values" (regression) or "unknown".
    """
    for scale, known in _SCALES.items():
        if any(isinstance(fn, loss) if isinstance(loss, type) else fn is loss for loss in known):
            return scale
    return "unknown"


_SCALES: dict[str, tuple[object, ...]] = {
    "class_logits": (nn.CrossEntropyLoss, nn.MultiMarginLoss, F.cross_entropy, F.multi_margin_loss),
    "label_logits": (
        *(nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss),
        *(F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss),
    ),
    "log_probabilities": (nn.NLLLoss, F.nll_loss),
    "probabilities": (nn.BCELoss, F.binary_cross_entropy),
    "values": (
        *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss),
        *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss),
    ),
}


def _parameter_names(function: Callable[..., object]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins without a signature
        return set()
