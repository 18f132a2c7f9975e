"""Arrays and nests of them as tensors and as map-style datasets, and plain loaders made anew over other rows.

Sisters, in the order in which they use each other: weights.py, dataset.py, source.py, predictions.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from numbers import Number
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from kerastorch.device import Nested, map_nested


class NestedDataset(Dataset[Any]):
    """Rows of nested tensors: item i is the same nest, each tensor indexed with i."""

    def __init__(self, rows: Nested, length: int) -> None:
        self.rows, self.length = rows, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Nested:
        return map_nested(lambda tensor: tensor[index], self.rows)


def default_sampler(loader: DataLoader[Any]) -> SequentialSampler | RandomSampler | None:
    """Return the sampler of a loader that makes batches of consecutive or of shuffled rows; None for any other."""
    batch_sampler = loader.batch_sampler
    if type(batch_sampler) is not BatchSampler:
        return None
    sampler = batch_sampler.sampler
    is_plain = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    has_all = is_plain and len(cast(Sized, sampler)) == len(cast(Sized, loader.dataset))
    return cast("SequentialSampler | RandomSampler", sampler) if has_all else None


def rebuild_loader(loader: DataLoader[Any], dataset: Dataset[Any], **changes: Any) -> DataLoader[Any]:
    """Return a DataLoader over dataset with the settings of a plain DataLoader over a map-style dataset.

    changes: DataLoader's arguments that say which rows make a batch, and what else is to differ.
    Raises ValueError for a subclass of DataLoader, an IterableDataset or a loader without batches.
    """
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise ValueError(
            "validation_split and sample_weight need a plain DataLoader with batches over a map-style Dataset, not a "
            f"{type(loader).__name__} over {type(loader.dataset).__name__}: give validation_data, or weights in the "
            "batch, as (x, y, sample_weight)."
        )
    settings: dict[str, Any] = {
        name: getattr(loader, name)
        for name in (
            *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"),
            *("generator", "prefetch_factor", "persistent_workers", "in_order"),
        )
        if hasattr(loader, name)
    }
    return DataLoader(dataset, **{**settings, **changes})


def to_tensors(value: Any, *, target: bool = False, strict: bool = True) -> Nested:
    """Return value with each array, number or list of numbers in it as a tensor (see dataset.make_dataset for dtypes).

    strict: raise TypeError for what is no number, which is passed through otherwise, as a DataLoader does.
    """
    if isinstance(value, Mapping):
        return {key: to_tensors(item, target=target, strict=strict) for key, item in value.items()}
    is_number = isinstance(value, (Tensor, Number, tuple, list)) or is_numpy(value)
    if isinstance(value, PackedSequence) or (not strict and not is_number):
        return value
    is_nest = isinstance(value, tuple) or (isinstance(value, list) and any(map(is_array_or_nest, value)))
    if is_nest or (not strict and isinstance(value, list) and any(isinstance(item, (str, bytes)) for item in value)):
        items = [to_tensors(item, target=target, strict=strict) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return _to_tensor(value, target=target)


def _to_tensor(value: Any, *, target: bool) -> Tensor:
    tensor = value if isinstance(value, Tensor) else _from_numpy(value)
    is_integer = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    return tensor.long() if target and is_integer else tensor


def _from_numpy(value: Any) -> Tensor:
    import numpy as np

    array = np.asarray(value)
    if array.dtype == object and all(isinstance(item, (Number, np.bool_)) for item in array.flat):
        array = array.astype(np.float64)  # columns of a DataFrame that are numbers of several kinds
    if array.dtype.kind not in "fiubc":
        raise TypeError(
            f"data must be numbers, got an array of dtype {array.dtype} and shape {array.shape}: "
            "encode text, dates and objects as numbers first."
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype == np.float64:
        # Memory of torch's own: it knows what is written to it, so that a GPU may keep a copy.
        return torch.from_numpy(array.astype(np.float32)).clone()
    if not array.flags.writeable or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()  # torch shares memory only with arrays like its own
    return torch.from_numpy(array)


def num_rows(dataset: Dataset[Any], *, what: str) -> int:
    """Return the length of a map-style dataset; ValueError, naming what needs it, where it has none."""
    try:
        return len(cast(Sized, dataset))  # the base class does not say that map-style ones have a length
    except TypeError:
        raise ValueError(f"{what} needs a Dataset with __len__, and {type(dataset).__name__} has none.") from None


def is_map_style(data: Any) -> bool:
    """Whether data is a map-style Dataset, or has the two methods of one; lists and arrays are no Datasets."""
    if isinstance(data, (IterableDataset, DataLoader, list, tuple, str, bytes, Mapping)) or is_numpy(data):
        return False
    return isinstance(data, Dataset) or (
        not isinstance(data, Tensor) and hasattr(data, "__len__") and hasattr(data, "__getitem__")
    )


def is_array_or_nest(value: Any) -> bool:
    return isinstance(value, (Tensor, tuple, Mapping)) or is_numpy(value)


def is_numpy(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape")
