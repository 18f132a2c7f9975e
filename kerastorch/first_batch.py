"""The look at a first batch: inputs when it is drawn, outputs and targets inside the first loss call, before backward.

No extra forward and no random draw; a few values are read back from the device, once per compile and data shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kerastorch.device import Nested, describe, leaves, num_samples, output_name, pick_output
from kerastorch.losses import OutputLosses, is_torch_own, loss_scale

_FIRST_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.modules.batchnorm._BatchNorm)
_SHAPELESS = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)
_RESHAPING = {"View", "UnsafeView", "Squeeze", "Unsqueeze", "Select", "Slice", "T", "Transpose", "Permute", "Expand"}
_RESHAPING |= {"Clone", "ToCopy", "Cat", "Stack", "Index", "Gather", "Clamp"}  # autograd's names: values stay


def signature(x: Nested, y: Nested) -> tuple[object, ...]:
    """Return what makes two batches alike to the checks: dtypes and shapes without the batch dimension."""
    return tuple(
        (leaf.dtype, leaf.shape[1:], leaf.dim()) if isinstance(leaf, Tensor) else type(leaf)
        for part in (x, y)
        for leaf in leaves(part)
    )


def check_inputs(
    name: str, net: nn.Module, fn: object, x: Nested, y: Nested, sample_weight: Nested, mixed_precision: bool
) -> None:
    """Raise ValueError for a batch whose parts differ in size, or whose x the net's first layer can't take.

    name: what the data is called.   fn: the loss. Targets are held against the outputs, in check_outputs.
    """
    samples = num_samples(x)
    if samples == 0:
        raise ValueError(f"{name}: the first batch has 0 samples: x is {describe(x)}.")
    for leaf in leaves(sample_weight):
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != samples):
            raise _other_size(name, x, "sample_weight", sample_weight, leaf)
    if y is None and isinstance(x, Mapping) and is_torch_own(fn) and loss_scale(fn) != "unknown":
        raise ValueError(
            f"{name}: a batch is a dict, {describe(x)}, which is x alone, without targets. Say what is what with "
            "compile(unpack=lambda batch: (batch['inputs'], batch['labels']))."
        )
    layer, is_flattened = _first_layer(net)
    if layer is None or not isinstance(x, Tensor):
        return
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), x.dtype)
    is_autocast = mixed_precision and x.is_floating_point() and x.dtype != torch.float64  # which autocast leaves alone
    if x.dtype != dtype and not is_autocast:
        wanted = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"x is {describe(x)}, but the first layer {layer} has {wanted} weights: convert it, x.to(torch.{wanted})"
            + (", and scale it, as x / 255." if x.dtype == torch.uint8 else ".")
            + (" Arrays become float32, tensors stay as they are." if dtype == torch.float64 else "")
        )
    if isinstance(layer, nn.Linear) and not is_flattened:
        # Before torch 2.7 a lazy layer whose shape a checkpoint settled says 0.
        in_features = layer.in_features or layer.weight.shape[-1]
        if x.shape[-1] != in_features:
            raise ValueError(
                f"x is {describe(x)}: its last dimension is {x.shape[-1]}, but the first layer {layer} takes "
                f"{in_features} features."
            )


@contextmanager
def watched_layers(net: nn.Module) -> Iterator[None]:
    """Let the layers of torch's own in net refuse an input of another dtype than their weights, while this lasts.

    For a net whose forward is the user's, only its layers see what reaches them. No frame stands above his forward.
    """
    kinds = {kind for kind in _known_layers() if not issubclass(kind, nn.modules.batchnorm._BatchNorm)}
    layers = [layer for layer in net.modules() if type(layer) in kinds]
    handles = [layer.register_forward_pre_hook(_check_layer_input) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_layer_input(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    x = inputs[0] if inputs else None
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), None)
    if not isinstance(x, Tensor) or dtype is None or x.dtype == dtype or x.is_complex():
        return
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return
    wanted = str(dtype).removeprefix("torch.")
    raise ValueError(
        f"the layer {layer} was given {describe(x)}, but has {wanted} weights: convert it, x.to(torch.{wanted}), in "
        "the data or in forward" + (", and scale it, as x / 255." if x.dtype == torch.uint8 else ".")
    )


def _other_size(name: str, x: Nested, what: str, part: Nested, leaf: Tensor) -> ValueError:
    size = len(leaf) if leaf.dim() else "no"
    return ValueError(
        f"{name}: the first batch has {num_samples(x)} samples in x but {size} in {what}: x is {describe(x)}, "
        f"{what} is {describe(part)}."
    )


def check_outputs(
    data_name: str,
    net: nn.Module,
    fn: object,
    x: Nested,
    outputs: Nested,
    y: Nested,
    *,
    warns: bool = True,
    was_trained: bool = False,
    of: str = "",
) -> bool:
    """Raise ValueError, or warn, where outputs and targets are not what a torch loss takes; return whether it warned.

    data_name: what the data is called.   fn: the loss, or OutputLosses; of one's own only NaN is looked for.
    warns: whether to warn too.   was_trained: whether this fit has changed the weights, which may have become NaN.
    of: which of several outputs this is, for the messages.
    """
    if isinstance(fn, OutputLosses):
        if isinstance(y, (tuple, list, Mapping)) and len(y) > len(fn.losses):
            raise ValueError(
                f"the batch has {len(y)} targets, but there are losses for {len(fn.losses)} outputs "
                f"({', '.join(map(output_name, fn.losses))}): nothing would be learnt from the rest. Drop it with "
                "compile(unpack=...), or give it a loss."
            )
        warned = False
        for key, part in fn.losses.items():
            parts = pick_output(outputs, key, "the outputs"), pick_output(y, key, "the targets")
            of = f" of {output_name(key)}"
            warned |= check_outputs(data_name, net, part, x, *parts, warns=warns, was_trained=was_trained, of=of)
        return warned
    scale = loss_scale(fn)
    if y is None and scale != "unknown" and is_torch_own(fn):
        raise ValueError(
            "the batches hold no targets, but the loss needs them: give fit(x, y), or batches (x, y). "
            "Two inputs without a target are ((a, b),)."
        )
    _check_outputs_finite(net, x, outputs, was_trained)
    if scale == "unknown" or not is_torch_own(fn):
        return False
    same_length = isinstance(outputs, Tensor) and outputs.dim() > 0 and len(outputs) == num_samples(x)
    if same_length and isinstance(y, Tensor) and (y.dim() == 0 or len(y) != len(outputs)):
        raise _other_size(data_name, x, "y", y, y)
    if not _is_finite(y):
        raise ValueError(f"y has {_count_bad(y)} in the first batch ({describe(y)}): drop or fill those rows.")
    name = getattr(fn, "__name__", type(fn).__name__) + of
    if not isinstance(outputs, Tensor) or not isinstance(y, Tensor):
        raise ValueError(
            f"the loss {name} takes one tensor of outputs and one of targets, but outputs are {describe(outputs)} and "
            f"targets {describe(y)}: for several outputs give a list or dict of losses, one for each."
        )
    made_by, outputs = _made_by(outputs), outputs.detach()
    if scale in ("class_logits", "log_probabilities"):
        _check_classes(name, fn, outputs, y)
    else:
        takes_counts = isinstance(fn, nn.PoissonNLLLoss) or fn is nn.functional.poisson_nll_loss
        _check_same_shape(name, outputs, y, takes_counts)
        if scale in ("label_logits", "probabilities"):
            _check_labels(name, scale, outputs, y)
    if scale == "log_probabilities" and bool((outputs > 1e-3).any()):
        raise ValueError(
            f"the loss {name} takes log-probabilities, but the outputs reach {float(outputs.max()):.3g}: end the net "
            "in nn.LogSoftmax(1), or use 'cross_entropy' on logits."
        )
    return warns and _warn_of_activation(name, scale, net, outputs.float(), made_by)


def _check_outputs_finite(net: nn.Module, x: Nested, outputs: Nested, was_trained: bool) -> None:
    if all(_is_finite(leaf) or not bool((leaf.isnan() | leaf.isposinf()).any()) for leaf in leaves(outputs)):
        return  # -inf is how logits are masked
    for leaf in leaves(x):
        if not _is_finite(leaf):
            raise ValueError(
                f"x has {_count_bad(leaf)} in the first batch ({describe(x)}), and the outputs are not finite: "
                "drop, fill or clip them."
            )
    for name, parameter in net.named_parameters():
        if not _is_finite(parameter):
            if was_trained:
                return  # the History shows it
            raise ValueError(f"the parameter {name!r} holds {_count_bad(parameter)}: the net was broken before fit().")
    warnings.warn("the net's outputs for the first batch are not finite, though x and the weights are.", stacklevel=2)


def _check_classes(name: str, fn: object, outputs: Tensor, y: Tensor) -> None:
    if outputs.dim() < 2 or outputs.shape[1] == 1:
        raise ValueError(
            f"the loss {name} needs a score for each class, (N, C), but outputs are {describe(outputs)}: "
            "for one yes-or-no output use 'bce_with_logits'."
        )
    classes, indices_shape = outputs.shape[1], outputs.shape[:1] + outputs.shape[2:]
    if y.shape == outputs.shape:
        if not y.is_floating_point():
            raise ValueError(
                f"the loss {name} takes class indices or probabilities, but targets are {describe(y)}, as one-hot "
                "rows: use y.argmax(1), or y.float()."
            )
        return
    if y.shape == (*indices_shape, 1) or y.shape == (len(outputs), 1, *indices_shape[1:]):
        raise ValueError(
            f"the loss {name} takes class indices of shape {tuple(indices_shape)}, but targets are {describe(y)}: "
            f"use y.squeeze({-1 if y.shape[-1] == 1 else 1})."
        )
    if y.shape != indices_shape:
        raise ValueError(
            f"the loss {name} takes targets of shape {tuple(indices_shape)} for outputs {describe(outputs)}, "
            f"but they are {describe(y)}."
        )
    if y.dtype not in (torch.int64, torch.uint8):
        raise ValueError(
            f"the loss {name} takes class indices as integers (int64), but targets are {describe(y)}: use y.long()."
        )
    ignored = getattr(fn, "ignore_index", -100)
    counted = y[y != ignored]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= classes):
        raise ValueError(
            f"labels run from {int(counted.min())} to {int(counted.max())}, but the outputs {describe(outputs)} have "
            f"{classes} classes, 0 to {classes - 1}"
            + (": count the labels from 0." if int(counted.min()) >= 1 else ".")
        )


def _check_same_shape(name: str, outputs: Tensor, y: Tensor, takes_counts: bool) -> None:
    if outputs.dim() == 2 and outputs.shape[1] > 1 and y.shape == outputs.shape[:1]:
        raise ValueError(
            f"the loss {name} compares number with number, but outputs are {describe(outputs)} and targets "
            f"{describe(y)}: for class indices use 'cross_entropy'."
        )
    if not y.is_floating_point() and not y.is_complex() and not takes_counts:
        raise ValueError(
            f"the loss {name} takes float targets, but they are {describe(y)}: use y.float(), or numpy's "
            "y.astype('float32')."
        )
    if y.dtype == torch.float64 and outputs.dtype != torch.float64:
        raise ValueError(f"targets are {describe(y)}, but outputs {describe(outputs)}: use y.float().")
    if y.shape == outputs.shape:
        return
    fix = ""
    if outputs.shape == (*y.shape, 1):
        fix = ": use outputs.squeeze(1) in the net, or y.unsqueeze(1)"
    elif y.shape == (*outputs.shape, 1):
        fix = ": use y.squeeze(1)"
    raise ValueError(
        f"the loss {name} compares number with number, but outputs are {describe(outputs)} and targets {describe(y)}; "
        f"torch would stretch one over the other{fix}."
    )


def _check_labels(name: str, scale: str, outputs: Tensor, y: Tensor) -> None:
    low, high = float(y.min()), float(y.max())
    if low < 0 or high > 1:
        raise ValueError(f"the loss {name} takes targets from 0 to 1, but they run from {low:g} to {high:g}.")
    if scale == "probabilities" and not (0 <= float(outputs.min()) <= float(outputs.max()) <= 1):
        raise ValueError(
            f"the loss {name} takes probabilities, but outputs run from {float(outputs.min()):.3g} to "
            f"{float(outputs.max()):.3g}: end the net in a sigmoid, or use 'bce_with_logits'."
        )


def _warn_of_activation(name: str, scale: str, net: nn.Module, outputs: Tensor, made_by: str) -> bool:
    """Warn where an activation made the outputs of a loss that takes logits; return whether it warned.

    Values alone tell nothing: a bias may bring logits between 0 and 1, and rows of weights may sum to 1.
    """
    if scale not in ("class_logits", "label_logits") or not bool(((outputs >= 0) & (outputs <= 1)).all()):
        return False
    kind = (made_by or _kind_of(_last_layer(net))).lower()
    if scale == "class_logits" and kind in ("exp", "div"):  # a softmax written out
        sums = outputs.sum(1)
        kind = "softmax" if torch.allclose(sums, torch.ones_like(sums), atol=1e-3) else kind
    if kind not in ("softmax", "sigmoid", "hardsigmoid"):
        return False
    range_, instead = "all from 0 to 1", "use torch.nn.BCELoss()"
    if scale == "class_logits":
        range_, instead = "rows sum to 1" if kind == "softmax" else range_, "use 'nll' on a log_softmax"
    warnings.warn(
        f"the loss {name} takes logits, but the outputs look like a {kind}'s ({range_}), which trains slowly: remove "
        f"the {kind} from the net, or {instead}.",
        stacklevel=2,
    )
    return True


def _kind_of(layer: nn.Module) -> str:
    return type(layer).__name__ if isinstance(layer, (nn.Softmax, nn.Sigmoid, nn.Hardsigmoid)) else ""


def _last_layer(net: nn.Module) -> nn.Module:
    """Return the layer that a Sequential calls last; the net itself where that is not known."""
    while isinstance(net, nn.Sequential) and len(net):
        net = net[-1]
    return net


def _made_by(outputs: Tensor) -> str:
    """Return the name of torch's operation that computed the values, "Sigmoid" or "Addmm"; "" where it is not known."""
    node = outputs.grad_fn
    while node is not None:
        kind, _, number = node.name().partition("Backward")
        if kind not in _RESHAPING:
            return kind if number.isdigit() else ""  # a function of the user's own, or compiled code, has no number
        node = node.next_functions[0][0]
    return ""


def check_batch_norm(net: nn.Module, rows: int | None, batch_size: int | None, drop_last: bool) -> None:
    """Warn where the last batch of training rows holds one sample, which BatchNorm1d can't normalise."""
    if rows is None or batch_size is None or (batch_size > 1 and (drop_last or rows % batch_size != 1)):
        return
    kinds = {type(module) for module in net.modules()}
    if nn.BatchNorm1d in kinds and kinds.isdisjoint((nn.Conv1d, nn.ConvTranspose1d)):  # over (N, C, L) one will do
        warnings.warn(
            f"{rows} rows in batches of {batch_size} leave a batch of one sample, which BatchNorm1d refuses in "
            "training: use drop_last=True or another batch_size.",
            stacklevel=3,
        )


def check_devices(net: nn.Module, device: torch.device) -> None:
    """Raise ValueError where the net was moved off the Model's device after the Model was made."""
    for name, parameter in net.named_parameters():
        if parameter.device != device:
            raise ValueError(
                f"the parameter {name!r} is on {parameter.device}, but the Model is on {device}: give "
                "Model(net, device=...) the device, and leave the net there."
            )


def _first_layer(net: nn.Module) -> tuple[nn.Module | None, bool]:
    """Return the layer that x meets first, where plain Sequentials make that sure, and whether x is reshaped before."""
    is_reshaped = False
    while type(net) is nn.Sequential and not net._forward_pre_hooks:  # a hook may convert x
        layers = list(net)
        while layers and isinstance(layers[0], _SHAPELESS):
            is_reshaped |= isinstance(layers.pop(0), (nn.Flatten, nn.Unflatten))
        if not layers:
            return None, is_reshaped
        net = layers[0]
    return (net if type(net) in _known_layers() and not net._forward_pre_hooks else None), is_reshaped


def _known_layers() -> set[type[Any]]:
    return {cls for cls in vars(nn).values() if isinstance(cls, type) and issubclass(cls, _FIRST_LAYERS)}


def _is_finite(value: object) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value).all())


def _count_bad(value: Tensor) -> str:
    nans, infs = int(value.isnan().sum()), int(value.isinf().sum())
    return " and ".join(f"{count} {kind}" for count, kind in ((nans, "NaN"), (infs, "inf")) if count)
