"""Arrays, tensors and nests of them as map-style datasets, and the split into training and validation rows.

Sister: source.py, which reads batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from kerastorch.device import Nested, describe, leaves, map_nested


class NestedDataset(Dataset[Any]):
    """Rows of nested tensors: item i is the same nest, each tensor indexed with i."""

    def __init__(self, rows: Nested, length: int) -> None:
        self.rows, self.length = rows, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Nested:
        return map_nested(lambda tensor: tensor[index], self.rows)


def make_dataset(x: Any, y: Any = None, *, caller: str) -> Any:
    """Return x as a DataLoader, a Dataset or an iterable of batches; arrays become a Dataset of their rows.

    x: a DataLoader, a Dataset or an iterable of batches (each as it is, then without y); or a tensor, an array, a list
    of numbers, or a tuple, list or dict of these. One tuple alone is read as a batch: (x,), (x, y) or
    (x, y, sample_weight).
    float64 numpy becomes float32, integer targets become int64.
    Raises ValueError for lengths that differ or no rows, TypeError for what can't be read as data.
    """
    if x is None:
        raise ValueError(f"{caller}() needs data: x is None.")
    if isinstance(x, (DataLoader, Dataset)) or not _is_arrays(x, y):
        if y is not None:
            raise ValueError(
                f"{caller}() got y beside a {type(x).__name__}: its batches hold their own targets, as (x, y)."
            )
        if not isinstance(x, (DataLoader, Dataset, Iterable)):
            raise TypeError(
                f"{caller}() can't read a {type(x).__name__} as data: give a DataLoader, a Dataset, arrays or tensors, "
                "or an iterable of batches (x, y)."
            )
        return x
    if y is not None:
        columns: tuple[Nested, ...] = (to_tensors(x), to_tensors(y, target=True))
    elif isinstance(x, tuple):
        if not 1 <= len(x) <= 3:
            raise ValueError(
                f"{caller}() got a tuple of {len(x)} as data; it is read as (x,), (x, y) or (x, y, sample_weight). "
                "Several inputs go together: ((a, b, ...), y)."
            )
        columns = tuple(to_tensors(column, target=i == 1) for i, column in enumerate(x))
    else:
        columns = (to_tensors(x),)
    length = _common_length(columns, caller)
    if all(isinstance(column, Tensor) for column in columns):
        return TensorDataset(*columns)
    return NestedDataset(columns, length)


def split_dataset(data: Any, fraction: float, *, caller: str = "fit") -> tuple[Any, Any]:
    """Return (training, validation): floor(n * (1 - fraction)) rows train, the last ones validate, never shuffled.

    data: a map-style Dataset.   fraction: between 0 and 1.
    Raises ValueError where a side would be empty or data has no rows to count.
    """
    if isinstance(data, (DataLoader, IterableDataset)) or not isinstance(data, Dataset):
        raise ValueError(
            f"{caller}(validation_split=...) needs arrays, tensors or a map-style Dataset, not a "
            f"{type(data).__name__}: split before making it (torch.utils.data.random_split) and pass validation_data."
        )
    rows = len(data)  # type: ignore[arg-type]  # map-style datasets have a length; the base class does not say so
    cut = math.floor(rows * (1 - fraction))
    if cut == 0 or cut == rows:
        raise ValueError(
            f"validation_split={fraction} leaves {cut} rows to train and {rows - cut} to validate, of {rows}: "
            "both sides need at least one."
        )
    if type(data) is TensorDataset:
        return TensorDataset(*(t[:cut] for t in data.tensors)), TensorDataset(*(t[cut:] for t in data.tensors))
    return Subset(data, range(cut)), Subset(data, range(cut, rows))


def to_tensors(value: Any, *, target: bool = False) -> Nested:
    """Return value with each array, number or list of numbers in it as a tensor (see make_dataset for dtypes)."""
    if isinstance(value, Mapping):
        return {key: to_tensors(item, target=target) for key, item in value.items()}
    if isinstance(value, tuple) or (isinstance(value, list) and any(map(_is_array_or_nest, value))):
        return tuple(to_tensors(item, target=target) for item in value)
    return _to_tensor(value, target=target)


def _to_tensor(value: Any, *, target: bool) -> Tensor:
    if not isinstance(value, Tensor):
        import numpy as np

        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        if array.dtype.kind not in "fiubc":
            raise TypeError(
                f"data must be numbers, got an array of dtype {array.dtype} and shape {array.shape}: "
                "encode text, dates and objects as numbers first."
            )
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
        tensor = torch.from_numpy(array)
    else:
        tensor = value
    is_integer = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    return tensor.long() if target and is_integer else tensor


def _is_arrays(value: Any, y: Any) -> bool:
    """Whether value is an array, or a nest of arrays; a list alone (without y) of tuples or dicts is one of batches."""
    if not isinstance(value, list):
        return _is_array_or_nest(value)
    if y is None and value and all(isinstance(item, Tensor) or _is_numpy(item) for item in value):
        raise ValueError(
            "a list of arrays alone could be several inputs or several batches: give ((a, b),) for one tuple of "
            "inputs, iter([...]) for batches."
        )
    return y is not None or not any(map(_is_array_or_nest, value))


def _is_array_or_nest(value: Any) -> bool:
    return isinstance(value, (Tensor, tuple, Mapping)) or _is_numpy(value)


def _is_numpy(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape")


def _common_length(columns: tuple[Nested, ...], caller: str) -> int:
    lengths: dict[str, int] = {}
    for name, column in zip(("x", "y", "sample_weight"), columns, strict=False):
        for leaf in leaves(column):
            if leaf.dim() == 0:
                raise ValueError(f"{caller}() got a single number in {name}; data needs a first dimension of samples.")
            lengths.setdefault(name, len(leaf))
            if len(leaf) != lengths[name]:
                raise ValueError(f"{caller}() got parts of {lengths[name]} and of {len(leaf)} samples in {name}.")
    first = next(iter(lengths), None)
    if first is None or lengths[first] == 0:
        raise ValueError(f"{caller}() got no samples: x is {describe(columns[0])}.")
    for name, length in lengths.items():
        if length != lengths[first]:
            raise ValueError(f"{caller}() got {lengths[first]} samples in {first} but {length} in {name}.")
    return lengths[first]
