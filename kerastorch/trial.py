"""Trying a net out away from training: a copy of it, a batch for it, a call. summary.py and export.py do so."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from kerastorch.data import to_tensors
from kerastorch.device import Nested, bare_module, describe, leaves
from kerastorch.errors import check_int
from kerastorch.lazy import lazy_copies


def copy_net(net: nn.Module) -> nn.Module:
    """Return a deep copy of the bare net in eval mode: what forward writes, buffer or attribute, stays in it."""
    net = bare_module(net)
    kept = [leaf for m in net.modules() for leaf in leaves(vars(m)) if isinstance(leaf, Tensor) and not leaf.is_leaf]
    memo = {id(tensor): tensor.detach().clone() for tensor in kept}  # torch can't copy these
    return copy.deepcopy(net, memo | lazy_copies(net)).eval()


def make_example(x: Any, net: nn.Module, verb: str) -> Nested:
    """Return a batch of inputs: x itself as tensors, or random floats of the net's dtype for a size, batch axis first.

    verb: what the user called.   Raises TypeError for what is neither batch nor size, ValueError for a size of no rows.
    """
    if _is_size(x):
        for length in x:
            if length is None:
                raise ValueError(f"input size {x} needs a number for each axis, the batch too: {(1, *x[1:])}, say.")
            check_int("each axis of an input size", length)
        x = tuple(map(int, x))
        dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.get_default_dtype())
        return torch.rand(x).to(dtype)
    if isinstance(x, Mapping):
        return {key: make_example(item, net, verb) for key, item in x.items()}
    if _is_list(x):
        items = [make_example(item, net, verb) for item in x]
        return items if isinstance(x, list) else tuple(items)
    if isinstance(x, (Tensor, PackedSequence)) or hasattr(x, "__array__"):
        return to_tensors(x)
    raise TypeError(
        f"{verb} takes a size such as (32, 1, 28, 28), or a batch of inputs (a tensor, an array, or a tuple, list "
        f"or dict of them; of a loader, next(iter(loader))[0]), got {describe(x)}."
    )


def refuse_made_floats(net: nn.Module, x: Any, verb: str) -> None:
    """Where x holds a size, let the embeddings of net, a copy, say that the floats made of it are none for them."""
    if not _has_size(x):
        return

    def check(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            raise TypeError(
                f"{verb} makes random floats of a size, but {type(module).__name__} takes integers: give a batch of "
                f"them in place of the size, such as torch.zeros({tuple(args[0].shape)}, dtype=torch.long)."
            )

    for module in net.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.register_forward_pre_hook(check)


def call_net(net: Any, x: Nested) -> Any:
    """Return net(x), net(*x) or net(**x), by the kind of x, as the loops call it."""
    if isinstance(x, dict):
        return net(**x)
    return net(*x) if _is_list(x) else net(x)


def _is_size(x: Any) -> bool:
    return _is_list(x) and len(x) > 0 and all(n is None or _is_int(n) for n in x)


def _is_int(n: Any) -> bool:
    return isinstance(n, Integral) and not isinstance(n, bool)  # numpy's are Integral


def _has_size(x: Any) -> bool:
    parts = x.values() if isinstance(x, Mapping) else x if _is_list(x) else []
    return _is_size(x) or any(map(_has_size, parts))


def _is_list(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence)
