"""Losses by name, and the one form in which a loop calls any of them: loss_fn(outputs, y, sample_weight).

Every classification loss given by name expects logits, as torch nets give them ("nll" alone takes log-probabilities,
as its definition says). Sisters: optimizers.py, metrics.py.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kerastorch.device import Nested, OutputKey, describe, output_name, pick_output
from kerastorch.errors import look_up

LossFunction = Callable[[Any, Any], Tensor]
LossSpec = str | type[nn.Module] | LossFunction

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

_TRUSTED: WeakSet[Any] = WeakSet()  # users' own modules whose values per sample were seen to average to what they give


class Loss:
    """A loss as the loops call it: loss_fn(outputs, y, sample_weight) gives the scalar to minimise.

    fn: a callable (outputs, y) -> scalar, or values per sample, whose mean is taken; or OutputLosses, one an output.
    outputs: what forward returned.   y: the batch's targets.   sample_weight: None, a tensor of shape (N,), or one
    shaped as the losses before reduction: sum(sample_weight * losses) / their number is the loss, as in Keras
    (targets of the loss's ignore_index are not counted; its class weights do not change the number).
    parts: after a call with OutputLosses, the loss of each output, unweighted, by log name.
    on_first_batch: called once with (outputs, y) before the first loss is taken, to check them.
    Raises ValueError where weights are given to a loss without values per sample.
    """

    def __init__(self, fn: LossFunction, on_first_batch: Callable[[Nested, Nested], None] | None = None) -> None:
        self.fn = fn
        self.on_first_batch = on_first_batch
        self.parts: dict[str, Tensor] = {}
        is_mean = isinstance(fn, nn.Module) and getattr(fn, "reduction", None) == "mean"
        self._is_trusted = not is_mean or is_torch_own(fn) or fn in _TRUSTED
        self._of_outputs = (
            {key: Loss(part) for key, part in fn.losses.items()} if isinstance(fn, OutputLosses) else None
        )

    def __call__(self, outputs: Nested, y: Nested, sample_weight: Nested = None) -> Tensor:
        if self.on_first_batch is not None:
            check, self.on_first_batch = self.on_first_batch, None
            check(outputs, y)
        if self._of_outputs is not None:
            total, self.parts = self.with_parts(outputs, y, sample_weight)
            return total
        if sample_weight is None:
            loss = self._checked(self.fn(outputs, y))
            return loss if loss.dim() == 0 else loss.mean()
        losses = self._checked(self.per_sample(outputs, y))
        self._check_per_sample(losses, outputs, y)
        if losses.dim() > 0 and sample_weight.shape == losses.shape[:1]:
            sample_weight = sample_weight.reshape(-1, *[1] * (losses.dim() - 1))
        elif losses.dim() == 0 or sample_weight.shape != losses.shape:
            raise ValueError(
                f"sample_weight has shape {tuple(sample_weight.shape)}, but the loss {self.name} gives "
                f"{describe(losses.detach())}: weights need shape (N,), and a loss that gives one value per sample."
            )
        weighted: Tensor = losses * sample_weight
        reduction = keyword_of(self.fn, "reduction", "mean")
        if reduction == "sum":
            return weighted.sum()
        if reduction == "batchmean":
            return weighted.sum() / len(weighted)
        ignored = ignored_class(self.fn)
        if ignored is None or not isinstance(y, Tensor) or y.shape != losses.shape:
            return weighted.mean()
        return weighted.mean() * (y.numel() / (y != ignored).sum())  # targets left out are no elements

    def _check_per_sample(self, losses: Tensor, outputs: Nested, y: Nested) -> None:
        """Refuse, once, a module of the user's own that is another loss when its reduction is "none"."""
        if self._is_trusted or losses.dim() == 0:
            return
        with torch.no_grad():
            if not torch.allclose(losses.mean(), self.fn(outputs, y).mean(), rtol=1e-3, atol=1e-6):
                raise ValueError(
                    f"the loss {self.name} can't be weighted: with reduction='none' its values do not average to what "
                    "it gives. Let it return one value per sample."
                )
        self._is_trusted = True
        _TRUSTED.add(self.fn)

    def _checked(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss {self.name} must return a tensor, got {type(loss).__name__}.")
        return loss

    def with_parts(self, outputs: Nested, y: Nested, sample_weight: Nested = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and what parts would be after the call; for OutputLosses alone."""
        fn = cast(OutputLosses, self.fn)
        total: Any = 0.0
        parts: dict[str, Tensor] = {}
        for key, loss in cast(dict[OutputKey, Loss], self._of_outputs).items():
            weight = sample_weight
            if weight is not None and not isinstance(weight, Tensor):
                weight = pick_output(weight, key, "sample_weight")
            part = loss(pick_output(outputs, key, "the outputs"), pick_output(y, key, "the targets"), weight)
            parts[f"{output_name(key)}_loss"] = part.detach()
            total = total + fn.loss_weights.get(key, 1.0) * part
        return cast(Tensor, total), parts

    @property
    def part_names(self) -> list[str]:
        """The log names of the losses by output; empty for a single loss."""
        return [f"{output_name(key)}_loss" for key in self._of_outputs or {}]

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
        if "reduction" in parameter_names(self.fn):
            return functools.partial(cast(Callable[..., Tensor], self.fn), reduction="none")
        return self.fn


class OutputLosses(nn.Module):
    """One loss for each of several outputs; a module, so that parameters of the losses are seen and moved.

    losses: {key of the output: loss}; keys are those of a dict of outputs or indices into a tuple of them.
    loss_weights: {key: factor in the sum}, 1 where missing.
    """

    def __init__(self, losses: dict[OutputKey, LossFunction], loss_weights: dict[OutputKey, float]) -> None:
        super().__init__()
        self.losses, self.loss_weights = losses, loss_weights
        self.modules_of_losses = nn.ModuleList(loss for loss in losses.values() if isinstance(loss, nn.Module))


def make_loss(
    loss: LossSpec | Sequence[LossSpec] | Mapping[str, LossSpec],
    device: torch.device,
    loss_weights: Sequence[float] | Mapping[str, float] | None = None,
) -> LossFunction:
    """Return the callable (outputs, y) for a name, an nn.Module (class or object; moved to device) or a callable.

    A list or dict of losses, one for each output, gives OutputLosses, their sum weighted by loss_weights.
    Raises ValueError for an unknown name, naming the nearest, and TypeError for anything that can't be called.
    """
    if isinstance(loss, (Sequence, Mapping)) and not isinstance(loss, str):
        specs: dict[Any, LossSpec] = dict(loss) if isinstance(loss, Mapping) else dict(enumerate(loss))
        weights: dict[Any, float] = {}
        if loss_weights is not None:
            weights = dict(loss_weights) if isinstance(loss_weights, Mapping) else dict(enumerate(loss_weights))
        is_fitting = loss_weights is None or isinstance(loss_weights, Mapping) == isinstance(loss, Mapping)
        if not specs or not is_fitting or any(key not in specs for key in weights):
            raise ValueError(
                f"loss_weights={loss_weights!r} does not fit losses of {list(specs)}: give a factor for each, "
                f"as a {type(loss).__name__}."
            )
        return OutputLosses({key: make_loss(spec, device) for key, spec in specs.items()}, weights)
    if loss_weights is not None:
        raise ValueError("loss_weights needs several losses: give loss as a list or a dict, one for each output.")
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
    "probabilities", "values" (regression), "log_rates" (poisson) or "unknown".
    """
    fn = _unwrapped(fn)
    for scale, known in _SCALES.items():
        if any(isinstance(fn, loss) if isinstance(loss, type) else fn is loss for loss in known):
            return scale
    return "unknown"


def ignored_class(fn: object) -> int | None:
    """Return the class index that this loss leaves out, None where it leaves none out."""
    if _unwrapped(fn) in (F.cross_entropy, F.nll_loss):
        given: int = keyword_of(fn, "ignore_index", -100)
        return given
    return getattr(fn, "ignore_index", None)


def is_torch_own(fn: object) -> bool:
    """Whether fn is a loss of torch's, not a function, or a subclass with a forward, of the user's own."""
    fn = _unwrapped(fn)
    owner = type(fn).forward if isinstance(fn, nn.Module) else fn
    return str(getattr(owner, "__module__", "")).partition(".")[0] == "torch"


def _unwrapped(fn: Any) -> Any:
    return _unwrapped(fn.func) if isinstance(fn, functools.partial) else fn


def keyword_of(fn: object, name: str, default: Any) -> Any:
    """Return a setting of a loss: a keyword of a partial, an attribute of anything else."""
    return fn.keywords.get(name, default) if isinstance(fn, functools.partial) else getattr(fn, name, default)


_SCALES: dict[str, tuple[object, ...]] = {
    "class_logits": (nn.CrossEntropyLoss, nn.MultiMarginLoss, F.cross_entropy, F.multi_margin_loss),
    "label_logits": (
        *(nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss),
        *(F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss),
    ),
    "log_probabilities": (nn.NLLLoss, F.nll_loss),
    "probabilities": (nn.BCELoss, F.binary_cross_entropy),
    "values": (
        *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss),
        *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
    ),
    "log_rates": (nn.PoissonNLLLoss, F.poisson_nll_loss),
}


def parameter_names(function: Callable[..., object]) -> set[str]:
    """Return the names of what a function takes; none for a builtin without a signature."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()
