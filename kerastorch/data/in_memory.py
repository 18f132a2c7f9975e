"""Tensors in memory read a batch of rows at a time: what a DataLoader over them gives, without its row-by-row work.

Sisters: arrays.py and weights.py below, passes.py above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset, default_collate

from kerastorch.data.arrays import NestedDataset, default_sampler
from kerastorch.data.weights import WeightedBatch, WeightedCollate, WeightedDataset
from kerastorch.device import Nested, leaves, map_nested

CHUNK_BYTES = 2**18  # rows of several small batches are read at once, up to this


@dataclass
class Rows:
    """Tensors in memory whose first axis is rows.

    tensors: what rows are read of.   kept: which rows there are, all where None.   collate: makes a batch, as the
    loader's own would be, of the tensors of its rows.
    """

    tensors: list[Tensor]
    kept: Tensor | None
    collate: Callable[[Sequence[Tensor]], Any]

    def take(self, index: Tensor) -> list[Tensor]:
        """Return the tensors of these rows: index is int64 of shape (N,)."""
        if self.kept is not None:
            index = self.kept[index]
        return [tensor.index_select(0, index) for tensor in self.tensors]

    def take_range(self, start: int, stop: int) -> list[Tensor]:
        """Return the tensors of consecutive rows, where all are kept; copies, since a net may write to its input."""
        return [tensor[start:stop].clone(memory_format=torch.contiguous_format) for tensor in self.tensors]

    @property
    def versions(self) -> list[int]:
        """Numbers that change where a tensor is written to."""
        return [0 if tensor.is_inference() else tensor._version for tensor in self.tensors]


class RowReader:
    """Gives the batches of a DataLoader over tensors: the same rows, order and random draws.

    loader: one that _find_rows() knows.   rows: what that returned.
    """

    def __init__(self, loader: DataLoader[Any], rows: Rows) -> None:
        self.loader, self.rows = loader, rows
        self._pins = loader.pin_memory and torch.cuda.is_available()

    def __iter__(self) -> Iterator[Any]:
        loader = self.loader
        rows = _find_rows(loader.dataset, loader.collate_fn)  # anew: a callback may have set others
        if rows is None:
            return iter(loader)
        self.rows = rows
        lists = iter(cast(Any, loader.batch_sampler))
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # the seed that a loader draws here
        batches = self._in_order() if self._has_plain_order() else map(self._fetch, lists)
        return map(_pin, batches) if self._pins else batches

    def _has_plain_order(self) -> bool:
        """Whether the sampler's order may be drawn at once: no generator of the user's sees the moment."""
        sampler = default_sampler(self.loader)
        return sampler is not None and not (isinstance(sampler, RandomSampler) and sampler.generator is not None)

    def _in_order(self) -> Iterator[Any]:
        import numpy as np

        batch_sampler = cast(Any, self.loader.batch_sampler)
        size = batch_sampler.batch_size
        is_range = isinstance(batch_sampler.sampler, SequentialSampler) and self.rows.kept is None
        if isinstance(batch_sampler.sampler, SequentialSampler):
            order = torch.arange(len(batch_sampler.sampler))
        else:
            order = torch.from_numpy(np.fromiter(batch_sampler.sampler, np.int64))
        if batch_sampler.drop_last:
            order = order[: len(order) // size * size]
        at_once, start = self._batches_at_once(size), 0
        while start < len(order):
            chunk = order[start : start + size * at_once]
            versions = self.rows.versions
            parts = self.rows.take_range(start, start + len(chunk)) if is_range else None
            for batch in self._read(chunk, size, parts):
                yield batch
                start += size
                if self.rows.versions != versions:  # a step wrote to the data: it may do so again
                    at_once = 1
                    break

    def _batches_at_once(self, size: int) -> int:
        """Return how many batches to read together: one where a later one would not begin on a cache line."""
        tensors = self.rows.tensors
        nbytes = [tensor[:1].nbytes * size for tensor in tensors]
        if any(count % 64 for count in nbytes) or any(tensor.is_inference() for tensor in tensors):
            return 1
        return max(1, CHUNK_BYTES // max(1, sum(nbytes)))

    def _read(self, order: Tensor, size: int, parts: list[Tensor] | None) -> Iterator[Any]:
        try:
            parts = self.rows.take(order) if parts is None else parts
        except (IndexError, RuntimeError):  # negative indices, or some out of range
            return map(self._fetch, [part.tolist() for part in order.split(size)])
        # unsafe_split: no views of one another for autograd, which forbids to write to such
        return map(self.rows.collate, zip(*(part.unsafe_split(size) for part in parts), strict=True))

    def _fetch(self, indices: Any) -> Any:
        """Return the batch of a list of indices; anything but plain ones goes the loader's own way."""
        try:
            index = indices if isinstance(indices, Tensor) else torch.tensor(indices)
            if index.dtype == torch.int64 and index.dim() == 1:
                return self.rows.collate(self.rows.take(index))
        except (TypeError, ValueError, IndexError, RuntimeError):
            pass
        dataset: Any = self.loader.dataset
        return self.loader.collate_fn([dataset[i] for i in indices])


def row_reader(batches: object) -> RowReader | None:
    """Return the reader of a plain DataLoader of batches over tensors in memory, without workers; None for any other.

    Such are a TensorDataset, arrays as fit takes them, either with sample weights, and a Subset of one; of ordinary
    tensors on one device, put together by torch's default_collate.
    """
    if type(batches) is not DataLoader or batches.num_workers or batches.batch_sampler is None:
        return None
    rows = _find_rows(batches.dataset, batches.collate_fn)
    return None if rows is None else RowReader(batches, rows)


def _find_rows(dataset: Any, collate: object) -> Rows | None:
    if type(dataset) is Subset:
        inner, index = _find_rows(dataset.dataset, collate), _as_index(dataset.indices)
        if inner is None or index is None:
            return None
        try:
            return replace(inner, kept=index if inner.kept is None else inner.kept[index])
        except IndexError:
            return None
    if type(dataset) is WeightedDataset and type(collate) is WeightedCollate:
        inner = _find_rows(dataset.dataset, collate.collate)
        if (
            inner is None or inner.kept is not None or not _are_plain(dataset.sample_weight)
        ):  # whose rows are numbered anew
            return None
        of_batch = inner.collate
        return Rows(
            [*inner.tensors, dataset.sample_weight], None, lambda parts: WeightedBatch(of_batch(parts[:-1]), parts[-1])
        )
    if collate is not default_collate:
        return None
    if type(dataset) is TensorDataset:
        return Rows(list(dataset.tensors), None, list) if _are_plain(dataset.tensors) else None
    if type(dataset) is NestedDataset and _are_plain(dataset.rows):
        nest = dataset.rows
        return Rows(list(leaves(nest)), None, lambda parts: _nest_like(nest, iter(parts)))
    return None


def _as_index(indices: Any) -> Tensor | None:
    if not isinstance(indices, (list, tuple, range, Tensor)) and type(indices).__module__ != "numpy":
        return None
    try:
        index = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices))
    except (TypeError, ValueError, RuntimeError):
        return None
    return index if index.dtype == torch.int64 and index.dim() == 1 else None


def _are_plain(nest: Nested) -> bool:
    return all(
        type(leaf) is Tensor
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and not (leaf.requires_grad or leaf.is_quantized)
        for leaf in leaves(nest)
    )


def _nest_like(nest: Nested, parts: Iterator[Tensor]) -> Nested:
    """Return parts nested as nest is, with lists for plain tuples, as default_collate has them."""
    if isinstance(nest, Mapping):
        return {key: _nest_like(item, parts) for key, item in nest.items()}
    if isinstance(nest, (tuple, list)):
        items = [_nest_like(item, parts) for item in nest]
        return type(nest)(*items) if hasattr(nest, "_fields") else items
    return next(parts)


def _pin(batch: Any) -> Any:
    return map_nested(lambda tensor: tensor.pin_memory(), batch)
