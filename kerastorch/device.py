"""Where the work runs: choosing a device, and moving nested batches to it."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from kerastorch.errors import check_int

Nested = Any  # a tensor, or tuples, lists and dicts of Nested; other leaves (strings, numbers, None) pass through
MAX_WRAPPERS = 3  # how often parallel wrappers may stand around a net whose weights are read
SIDE_BYTES = 2**20  # a batch of this size is worth a stream of its own: its copy takes some 50 us
MAX_AHEAD = 2  # such batches that may be copied before the work on an earlier one is through
OutputKey = str | int  # which of several outputs: a dict's key or a tuple's index


def try_gpu(i: int = 0) -> torch.device:
    """Return CUDA device i where it exists, else the CPU.

    i: index of the GPU, from 0.   Raises ValueError if i is negative.
    """
    if i < 0:
        raise ValueError(f"try_gpu(i) takes an index from 0, got {i}.")
    return torch.device("cuda", i) if i < torch.cuda.device_count() else torch.device("cpu")


def try_all_gpus() -> list[torch.device]:
    """Return every CUDA device, or [cpu] where there is none."""
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the torch.device meant; "auto" takes cuda, else mps, else cpu.

    Raises ValueError for a device that is not known or that this machine does not have.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps", 0) if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device {device!r} is not known. Use 'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or a torch.device."
        ) from None
    gpus = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= gpus:
        raise ValueError(f"device {str(device)!r} is not there: this machine has {gpus} CUDA devices. Try 'auto'.")
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not there on this machine. Try 'auto'.")
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.index is None and resolved.type in ("cuda", "mps"):  # parameters report the index too
        return torch.device(resolved.type, torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return resolved


def map_nested(function: Callable[[Any], Any], value: Nested) -> Nested:
    """Return value with function applied to each leaf; tuples, named tuples, lists and dicts keep their form."""
    if isinstance(value, Mapping):
        return {key: map_nested(function, item) for key, item in value.items()}
    if isinstance(value, PackedSequence):  # a tuple by birth, a tensor by nature
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_nested(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_nested(function, item) for item in value)
    return function(value)


def leaves(value: Nested) -> Iterator[Any]:
    """Yield the leaves of nested tuples, lists and dicts, in order."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)) or isinstance(value, PackedSequence):
        yield value
        return
    for item in value:
        yield from leaves(item)


def move_to_device(value: Nested, device: torch.device) -> Nested:
    """Return value with each tensor on device; a pinned tensor is copied without waiting for the copy to end."""
    if isinstance(value, torch.Tensor):
        return value if value.device == device else _move_leaf(value, device)
    if value is None:
        return None
    return map_nested(lambda leaf: _move_leaf(leaf, device), value)


def _move_leaf(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, (torch.Tensor, PackedSequence)):
        return leaf
    target: Any = leaf  # PackedSequence.to takes a device, whatever its annotation says
    return target.to(device, non_blocking=device.type == "cuda" and leaf.is_pinned())


class CopyStream:
    """Moves batches to a GPU and does not wait: a large one is copied beside the kernels that are still queued there.

    Nothing is read ahead for this. The host launches work faster than the GPU does it, so that there is work of earlier
    batches to copy beside; a host that is behind leaves nothing to gain.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = side_stream(device)
        self._marks: deque[torch.cuda.Event] = deque()  # of the work queued when a large batch was copied

    def __call__(self, batch: Nested) -> Nested:
        """Return batch with each tensor on the device, ready for work on its current stream."""
        nbytes = sum(leaf.nbytes for leaf in leaves(batch) if _is_plain(leaf))
        if nbytes < SIDE_BYTES:
            return map_nested(self._move, batch)
        compute = torch.cuda.current_stream(self.device)
        self._wait_for_room(compute)
        moved = map_nested(lambda leaf: self._move_beside(leaf, compute), batch)
        compute.wait_stream(self._stream)
        return moved

    def _move(self, leaf: Any) -> Any:
        return send(leaf, self.device) if _is_plain(leaf) else move_to_device(leaf, self.device)

    def _move_beside(self, leaf: Any, compute: torch.cuda.Stream) -> Any:
        if not _is_plain(leaf):
            return move_to_device(leaf, self.device)
        with torch.cuda.stream(self._stream):
            moved = send(leaf, self.device)
        moved.record_stream(compute)  # else its memory could go to the next copy while kernels still read it
        return moved

    def _wait_for_room(self, compute: torch.cuda.Stream) -> None:
        """Let the host be MAX_AHEAD batches ahead and no more: each of them takes memory."""
        if len(self._marks) == MAX_AHEAD:
            self._marks.popleft().synchronize()
        mark = torch.cuda.Event()
        mark.record(compute)
        self._marks.append(mark)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a GPU, whose copy may still be under way; the CPU's may be written to at once if not pinned.

    Only pinned memory is copied while the host goes on, so that others are copied there first.
    """
    if not tensor.is_pinned():
        try:
            tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
        except RuntimeError:  # no more memory may be pinned
            return tensor.to(device)
    return tensor.to(device, non_blocking=True)


def _is_plain(leaf: Any) -> bool:
    """Whether a leaf is a tensor on the CPU without anything that send() does not know of."""
    return (
        type(leaf) is torch.Tensor
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and not (leaf.requires_grad or leaf.is_quantized)
    )


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all runs, since memory that is freed is kept for the stream that it was taken on."""
    return torch.cuda.Stream(device)


def bare_module(net: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's or a parallel wrapper, whose keys have no prefix."""
    while isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(net, "_orig_mod"):
        inner = net._orig_mod if hasattr(net, "_orig_mod") else net.module
        assert isinstance(inner, nn.Module)
        net = inner
    return net


def bare_keys(weights: Mapping[str, Any], known: Iterable[str] = ()) -> Mapping[str, Any]:
    """Return a state_dict without the prefixes that torch.compile and parallel wrappers gave its keys.

    known: the keys of the net that it is for; "module." goes where more of them are met then.
    """
    if not all(isinstance(key, str) for key in weights):
        return weights
    own = {_bare_key(key, 0): key for key in known}
    depth = max(range(MAX_WRAPPERS + 1), key=lambda depth: sum(_bare_key(key, depth) in own for key in weights))
    names = {key: _bare_key(key, depth) for key in weights}
    names = {key: own.get(name, name) for key, name in names.items()}
    if all(key == name for key, name in names.items()) or len(set(names.values())) < len(names):
        return weights
    renamed: OrderedDict[str, Any] = OrderedDict((name, weights[key]) for key, name in names.items())
    if hasattr(weights, "_metadata"):  # versions of modules, by their names, for what modules do as they load
        versions = {_bare_key(f"{key}.", depth).removesuffix("."): item for key, item in weights._metadata.items()}
        vars(renamed)["_metadata"] = versions
    return renamed


def _bare_key(key: str, depth: int) -> str:
    name = ".".join(part for part in key.split(".") if part != "_orig_mod")
    for _ in range(depth):
        name = name.removeprefix("module.")
    return name


def are_finite(state_dict: Mapping[str, Any]) -> bool:
    """Whether no tensor in a state_dict holds NaN or infinity (one sync)."""
    tensors = [value for value in state_dict.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    flags = [tensor.isfinite().all() for tensor in tensors]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def num_samples(x: Nested) -> int:
    """Return the number of samples in a batch: the first dimension of the first tensor in x.

    Raises ValueError where x holds no tensor with a batch dimension.
    """
    if isinstance(x, torch.Tensor) and (shape := x.shape):
        return shape[0]
    for leaf in leaves(x):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])  # a CPU tensor always: no sync
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ValueError(f"a batch's x must hold a tensor with a first, batch dimension; got {describe(x)}.")


def output_name(key: OutputKey) -> str:
    """Return what logs call one of several outputs: its key in a dict, "output_0" and so on in a tuple."""
    return key if isinstance(key, str) else f"output_{key}"


def pick_output(value: Nested, key: OutputKey, what: str) -> Nested:
    """Return the part of outputs or targets that belongs to one output; ValueError naming `what` if there is none."""
    if isinstance(value, Mapping) and key in value:
        return value[key]
    if isinstance(value, (tuple, list)) and isinstance(key, int) and key < len(value):
        return value[key]
    if isinstance(value, tuple) and key in getattr(value, "_fields", ()):
        return getattr(value, str(key))
    form = f"a tuple with index {key}" if isinstance(key, int) else f"a dict with the key {key!r}"
    raise ValueError(f"the loss of {output_name(key)!r} needs {what} as {form}, but they are {describe(value)}.")


def describe(value: Nested) -> str:
    """Return a short text for a value: shapes and dtypes of tensors and arrays, else the type's name."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence):
        inner = ", ".join(describe(item) for item in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__}{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def set_seed(seed: int) -> None:
    """Seed python's, numpy's and torch's global generators, those of every CUDA and MPS device included.

    seed: an int from 0 to 2**32 - 1 (numpy's range).   Raises TypeError or ValueError otherwise.
    """
    check_int("seed", seed, at_least=0)
    if seed >= 2**32:
        raise ValueError(f"set_seed(seed) takes an int from 0 to 2**32 - 1, got {seed}.")
    import numpy as np

    seed = int(seed)

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_random_state(*generators: torch.Generator) -> dict[str, Any]:
    """Return python's, numpy's, torch's and CUDA's random states, and those of the generators given.

    Tensors, numbers and plain containers only, as a checkpoint takes them.
    """
    return {
        **get_cpu_random_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "generators": [generator.get_state() for generator in generators],
    }


def get_cpu_random_state() -> dict[str, Any]:
    """Return the random states that a DataLoader's worker has: python's, numpy's and torch's."""
    import numpy as np

    _, key, *position = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(key).astype(np.int64)), *position],
        "torch": torch.get_rng_state(),
    }


def set_random_state(state: Mapping[str, Any], *generators: torch.Generator) -> None:
    """Set what get_random_state returned, for the same generators; states of devices that are not there are left."""
    set_cpu_random_state(state)
    if state["cuda"] is not None and torch.cuda.is_available():
        for i, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, i)
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    for generator, own_state in zip(generators, state["generators"], strict=True):
        generator.set_state(own_state)


def set_cpu_random_state(state: Mapping[str, Any]) -> None:
    """Set what get_cpu_random_state returned."""
    import numpy as np

    key, *position = state["numpy"]
    if len(key) != 624 or not 0 <= position[0] <= 624:  # numpy reads beyond its memory
        raise ValueError("numpy's random state must be 624 numbers and a position among them.")
    random.setstate(state["python"])
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *position))
    torch.set_rng_state(state["torch"])


@contextmanager
def preserved_random_state(*generators: torch.Generator) -> Iterator[None]:
    """Put python's, numpy's, torch's and CUDA's random states back, at the end, to what they were at the start.

    generators: others to put back too.
    """
    state = get_random_state(*generators)
    try:
        yield
    finally:
        set_random_state(state, *generators)
