"""What fit, evaluate and predict are given, as a Dataset, a DataLoader or an iterable; and its split in two.

Sisters: arrays.py and weights.py below, source.py above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from kerastorch.data.arrays import (
    NestedDataset,
    default_sampler,
    is_array_or_nest,
    is_map_style,
    is_numpy,
    num_rows,
    rebuild_loader,
    to_tensors,
)
from kerastorch.data.weights import add_sample_weight
from kerastorch.device import Nested, describe, leaves


def make_dataset(x: Any, y: Any = None, sample_weight: Any = None, *, caller: str) -> Any:
    """Return x as a DataLoader, a Dataset or an iterable of batches; arrays become a Dataset of their rows.

    x: a DataLoader, a Dataset or an iterable of batches (each as it is, then without y); or a tensor, an array, a list
    of numbers, or a tuple, list or dict of these. One tuple alone is read as a batch: (x,), (x, y) or
    (x, y, sample_weight).
    float64 numpy becomes float32, integer targets become int64.
    sample_weight: (N,), one for each row of arrays x and y, of a Dataset or of a plain loader's.
    Raises ValueError for lengths that differ or no rows, TypeError for what can't be read as data.
    """
    if x is None:
        raise ValueError(f"{caller}() needs data: x is None.")
    if isinstance(x, (DataLoader, Dataset)) or is_map_style(x) or not _is_arrays(x, y, caller):
        if y is not None:
            raise ValueError(
                f"{caller}() got y beside a {type(x).__name__}: its batches hold their own targets, as (x, y)."
            )
        if not isinstance(x, (DataLoader, Dataset, Iterable)) and not is_map_style(x):
            raise TypeError(
                f"{caller}() can't read a {type(x).__name__} as data: give a DataLoader, a Dataset, arrays or tensors, "
                "or an iterable of batches (x, y)."
            )
        return x if sample_weight is None else add_sample_weight(x, sample_weight, caller=caller)
    if y is None and isinstance(x, tuple):
        if not 1 <= len(x) <= 3:
            raise ValueError(
                f"{caller}() got a tuple of {len(x)} as data; it is read as (x,), (x, y) or (x, y, sample_weight). "
                "Several inputs go together: ((a, b, ...), y)."
            )
        columns = x
    else:
        columns = (x,) if y is None else (x, y)
    if sample_weight is not None:
        if len(columns) != 2:
            raise ValueError(f"{caller}(sample_weight=...) needs x and y, and no other weights.")
        columns = (*columns, sample_weight)
    columns = tuple(to_tensors(column, target=i == 1) for i, column in enumerate(columns))
    length = _common_length(columns, caller)
    if all(isinstance(column, Tensor) for column in columns):
        return TensorDataset(*columns)
    is_one_dict = len(columns) == 1 and isinstance(columns[0], Mapping)
    return NestedDataset(columns[0] if is_one_dict else columns, length)


def split_dataset(data: Any, fraction: float, *, caller: str = "fit") -> tuple[Any, Any]:
    """Return (training, validation): floor(n * (1 - fraction)) rows train, the last ones validate, never shuffled.

    data: a map-style Dataset, or a plain DataLoader over one, which gives two loaders of its settings.
    fraction: between 0 and 1.
    Raises ValueError where a side would be empty, data has no rows to count, or the loader has a sampler of its own.
    """
    if isinstance(data, DataLoader):
        sampler = default_sampler(data)
        if sampler is None:
            raise ValueError(
                f"{caller}(validation_split=...) can't split a DataLoader with a sampler of its own: split the dataset "
                "and pass validation_data."
            )
        train, val = split_dataset(data.dataset, fraction, caller=caller)
        batches = cast(BatchSampler, data.batch_sampler)  # default_sampler knows no other
        batch_size, drop_last = batches.batch_size, batches.drop_last
        order = RandomSampler(train, generator=sampler.generator) if isinstance(sampler, RandomSampler) else None
        return (
            rebuild_loader(data, train, batch_size=batch_size, drop_last=drop_last, sampler=order),
            rebuild_loader(data, val, batch_size=batch_size, shuffle=False, generator=None),
        )
    if not is_map_style(data):
        raise ValueError(
            f"{caller}(validation_split=...) needs arrays, tensors or a map-style Dataset, not a "
            f"{type(data).__name__}: split before making it (torch.utils.data.random_split) and pass validation_data."
        )
    rows = num_rows(data, what=f"{caller}(validation_split=...)")
    cut = math.floor(rows * (1 - fraction) + 1e-9)  # 10 rows at 0.8 train 2, whatever 1 - 0.8 is in binary
    if cut == 0 or cut == rows:
        raise ValueError(
            f"validation_split={fraction} leaves {cut} rows to train and {rows - cut} to validate, of {rows}: "
            "both sides need at least one."
        )
    if type(data) is TensorDataset:
        return TensorDataset(*(t[:cut] for t in data.tensors)), TensorDataset(*(t[cut:] for t in data.tensors))
    return Subset(data, range(cut)), Subset(data, range(cut, rows))


def needs_unpack(x: Any, y: Any) -> bool:
    """Whether batches of this data go through compile(unpack=...): arrays given as x and y, or as a tuple, do not."""
    return y is None and not (isinstance(x, (Tensor, tuple)) or is_numpy(x))


def _is_arrays(value: Any, y: Any, caller: str) -> bool:
    """Whether value is an array, or a nest of arrays; a list alone (without y) of tuples or dicts is one of batches."""
    if not isinstance(value, list):
        return is_array_or_nest(value)
    if y is None and value and all(isinstance(item, Tensor) or is_numpy(item) for item in value):
        raise ValueError(
            f"{caller}() got a list of arrays alone, which could be inputs and targets, several inputs or several "
            "batches: give the tuple (x, y), the tuple ((a, b),) of one tuple of inputs, or iter([...]) of batches."
        )
    return y is not None or not any(is_array_or_nest(item) or _is_list_of_arrays(item) for item in value)


def _is_list_of_arrays(value: Any) -> bool:
    return isinstance(value, list) and any(map(is_array_or_nest, value))


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
