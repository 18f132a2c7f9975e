"""compile(jit_compile=...): the net compiled in place by torch.compile. Sister: graph/, for a whole step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kerastorch.device import Nested, leaves
from kerastorch.errors import did_you_mean


def compile_arguments(
    net: nn.Module, jit_compile: bool | Mapping[str, Any], device: torch.device
) -> dict[str, Any] | None:
    """Return the arguments of net.compile(), which keeps its class and its state_dict's keys; None for False.

    jit_compile: True, or arguments of torch.compile ("mode", "backend", "dynamic", ...).   On a CPU True also makes
    dropout draw as it does uncompiled.
    Raises ValueError for an argument that is not known, or a net that torch.compile has wrapped already.
    """
    if jit_compile is False:
        return None
    if not isinstance(jit_compile, (bool, Mapping)):
        raise TypeError(f"jit_compile must be True, False or a dict of torch.compile's arguments, got {jit_compile!r}.")
    if hasattr(net, "_orig_mod"):
        raise ValueError(
            "jit_compile=True on a net that torch.compile has wrapped: give the net itself, or leave it out."
        )
    options = {} if isinstance(jit_compile, bool) else dict(jit_compile)
    known = [name for name in inspect.signature(torch.compile).parameters if name not in ("model", "disable")]
    for name in options:
        if name not in known:
            raise ValueError(
                f"jit_compile has {name!r}, which torch.compile does not take{did_you_mean(name, known)} "
                f"It takes {', '.join(known)}."
            )
    if not options and device.type == "cpu":
        options["options"] = {"fallback_random": True}
    return options


def compile_in_place(net: nn.Module, arguments: dict[str, Any]) -> None:
    """Compile the net as net.compile(**arguments) does."""
    if not type(net).forward.__module__.startswith("torch."):
        net.compile(**arguments)
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        return net._call_impl(*args, **kwargs)

    # Some releases of torch compile no frame of torch's own files, and so nothing of a Sequential.
    net._compiled_call_impl = torch.compile(call, **arguments)


def mark_batch_axis(x: Nested) -> None:
    """Let a graph made with this batch serve others of another number of rows."""
    for leaf in leaves(x):
        if isinstance(leaf, Tensor) and leaf.dim():
            torch._dynamo.maybe_mark_dynamic(leaf, 0)


@contextmanager
def told_apart(jit_compile: object) -> Iterator[None]:
    """Let an error of the compiler name the option that it comes with."""
    try:
        yield
    except Exception as error:
        if not jit_compile or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        first = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"jit_compile={jit_compile!r}: the net can't be compiled: {first} Leave jit_compile out, or give "
            "torch.compile's arguments in it, as jit_compile={'fullgraph': False}."
        ) from error
