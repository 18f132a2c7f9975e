"""Tensors in memory read a batch of rows at a time: what a DataLoader over them gives, without its row-by-row work.

Sisters: arrays.py, weights.py and rows.py below, passes.py above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset, default_collate

from kerastorch.data.arrays import NestedDataset, default_sampler
from kerastorch.data.rows import Rows, RowsOnGPU
from kerastorch.data.weights import WeightedBatch, WeightedCollate, WeightedDataset
from kerastorch.device import CopyStream, Nested, leaves, map_nested

CHUNK_BYTES = 2**18  # rows of several small batches are read at once, up to this
GPU_CHUNK_BYTES = 2**20  # likewise for a GPU: there is no cache that they should stay in
GPU_ALIGNMENT = 256  # bytes; which kernel multiplies matrices may depend on it, and with it the last bits of a product


class BatchGroup(NamedTuple):
    """Full batches that follow one another, joined on the first axis, for a loop that does several steps at once."""

    joined: Any
    num_batches: int


class RowReader:
    """Gives the batches of a DataLoader over tensors: the same rows, order and random draws.

    loader: one that _find_rows() knows.   rows: what that returned.
    """

    def __init__(self, loader: DataLoader[Any], rows: Rows) -> None:
        self.loader, self.rows = loader, rows
        self._pins = loader.pin_memory and torch.cuda.is_available()
        self._copies: CopyStream | None = None
        self._keeper: RowsOnGPU | None = None
        self._most_together = 1
        self._was_read = False  # whether a pass came to its end
        self._copied: Rows | None = None  # the rows on the GPU that this pass reads
        self._versions: list[int] = []  # of those that they are copies of

    def read_to(self, copies: CopyStream, *, keeps: bool) -> None:
        """Give batches on a GPU, of small ones several with each copy, until release().

        keeps: whether the rows may stay there. They do from the second whole pass on: a single one would gain nothing
        by it, and the first one shows what training needs of the memory.
        """
        self._copies, self._keeper = copies, RowsOnGPU(copies.device) if keeps else None

    def read_together(self, most: int) -> None:
        """Give up to so many full batches as one BatchGroup from now on, where a GPU is sent small ones together."""
        self._most_together = most

    def release(self) -> None:
        """Let go of what is on the GPU."""
        self._copies = self._keeper = self._copied = None

    def __iter__(self) -> Iterator[Any]:
        loader = self.loader
        rows = _find_rows(loader.dataset, loader.collate_fn)  # anew: a callback may have set others
        if rows is None:
            return iter(loader)
        self.rows = rows
        if self._keeper is not None and self._was_read:
            self._copied = self._keeper.get(rows)
            self._versions = [] if self._copied is None else rows.versions
        lists = iter(cast(Any, loader.batch_sampler))
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # the seed that a loader draws here
        batches = self._in_order() if self._has_plain_order() else map(self._fetch, lists)
        if self._keeper is not None and not self._was_read:
            batches = self._to_the_end(batches)
        return map(_pin, batches) if self._pins else batches

    def _to_the_end(self, batches: Iterator[Any]) -> Iterator[Any]:
        yield from batches
        self._was_read = True

    def _has_plain_order(self) -> bool:
        """Whether the sampler's order may be drawn at once: no generator of the user's sees the moment."""
        sampler = default_sampler(self.loader)
        return sampler is not None and not (isinstance(sampler, RandomSampler) and sampler.generator is not None)

    def _in_order(self) -> Iterator[Any]:
        import numpy as np

        batch_sampler = cast(Any, self.loader.batch_sampler)
        size = batch_sampler.batch_size
        is_sequential = isinstance(batch_sampler.sampler, SequentialSampler)
        if is_sequential:
            order = torch.arange(len(batch_sampler.sampler))
        else:
            order = torch.from_numpy(np.fromiter(batch_sampler.sampler, np.int64))
        if batch_sampler.drop_last:
            order = order[: len(order) // size * size]
        at_once, start = self._batches_at_once(size), 0
        while start < len(order):
            together = self._batches_together(len(order) // size, at_once)
            if len(order) - start < size * together:
                together = 1
            chunk = order[start : start + size * (at_once if together == 1 else together)]
            versions = self.rows.versions if at_once > 1 else None
            for batch in self._read(chunk, size * together, start if is_sequential else None):
                yield batch if together == 1 else BatchGroup(batch, together)
                start += size * together
                if versions is not None and self.rows.versions != versions:  # a step wrote to the data: it may again
                    at_once = 1
                    break

    @property
    def _is_on_gpu(self) -> bool:
        return self._copies is not None or self.rows.gpu is not None

    def _batches_at_once(self, size: int) -> int:
        """Return how many batches to read together: one where a later one would not begin on a cache line."""
        tensors = self.rows.tensors
        nbytes = [tensor[:1].nbytes * size for tensor in tensors]
        if any(tensor.is_inference() for tensor in tensors):
            return 1
        if self._is_on_gpu:  # where _split() aligns them
            return max(1, GPU_CHUNK_BYTES // max(1, sum(nbytes)))
        return 1 if any(count % 64 for count in nbytes) else max(1, CHUNK_BYTES // max(1, sum(nbytes)))

    def _batches_together(self, num_full: int, at_once: int) -> int:
        """Return how many full batches to join, the same all through a pass of num_full, so that few are left over."""
        most = min(self._most_together, at_once, num_full) if self._is_on_gpu else 1
        if most <= 1:
            return 1
        even = num_full // math.ceil(num_full / most)
        return max((even, most), key=lambda n: num_full - num_full % n if n > 1 else 0)

    def _read(self, order: Tensor, size: int, start: int | None) -> Iterator[Any]:
        """Yield the batches of rows in this order; start: the first one, where they are consecutive."""
        try:
            parts = self._take(order, start)
        except (IndexError, RuntimeError):  # negative indices, or some out of range
            return map(self._fetch, [part.tolist() for part in order.split(size)])
        if self._copies is not None:
            parts = self._copies(parts)
        return map(self.rows.collate, zip(*(self._split(part, size) for part in parts), strict=True))

    def _take(self, order: Tensor, start: int | None) -> list[Tensor]:
        if self._copied is not None and self.rows.versions != self._versions:  # a step wrote to the data
            self._copied = self._keeper = None
        rows = self.rows if self._copied is None else self._copied
        try:
            return (
                rows.take(order)
                if start is None or rows.kept is not None
                else rows.take_range(start, start + len(order))
            )
        except torch.OutOfMemoryError:
            if self._copied is None:
                raise
            self._copied = self._keeper = None  # others need the memory more
            return self._take(order, start)

    def _split(self, part: Tensor, size: int) -> Iterable[Tensor]:
        # unsafe_split: no views of one another for autograd, which forbids to write to such
        pieces = part.unsafe_split(size)
        if self._is_on_gpu and len(pieces) > 1 and pieces[0].nbytes % GPU_ALIGNMENT:
            return map(Tensor.clone, pieces)
        return pieces

    def _fetch(self, indices: Any) -> Any:
        """Return the batch of a list of indices; anything but plain ones goes the loader's own way."""
        try:
            index = indices if isinstance(indices, Tensor) else torch.tensor(indices)
            if index.dtype == torch.int64 and index.dim() == 1:
                return self.rows.collate(self._take(index, None))
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
            inner is None or inner.kept is not None or not _are_plain([*inner.tensors, dataset.sample_weight])
        ):  # whose rows are numbered anew
            return None
        of_batch = inner.collate
        return Rows(
            [*inner.tensors, dataset.sample_weight],
            None,
            lambda parts: WeightedBatch(of_batch(parts[:-1]), parts[-1]),
            inner.gpu,
        )
    if collate is not default_collate:
        return None
    if type(dataset) is TensorDataset:
        tensors = list(dataset.tensors)
        return Rows(tensors, None, list, _gpu_of(tensors)) if _are_plain(tensors) else None
    if type(dataset) is NestedDataset and _are_plain(dataset.rows):
        nest = dataset.rows
        tensors = list(leaves(nest))
        return Rows(tensors, None, lambda parts: _nest_like(nest, iter(parts)), _gpu_of(tensors))
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
    tensors = list(leaves(nest))
    return all(
        type(leaf) is Tensor
        and leaf.device.type in ("cpu", "cuda")
        and leaf.device == tensors[0].device
        and leaf.layout is torch.strided
        and not (leaf.requires_grad or leaf.is_quantized)
        for leaf in tensors
    )


def _gpu_of(tensors: Sequence[Tensor]) -> torch.device | None:
    return tensors[0].device if tensors and tensors[0].device.type != "cpu" else None


def _nest_like(nest: Nested, parts: Iterator[Tensor]) -> Nested:
    """Return parts nested as nest is, with lists for plain tuples, as default_collate has them."""
    if isinstance(nest, Mapping):
        return {key: _nest_like(item, parts) for key, item in nest.items()}
    if isinstance(nest, (tuple, list)):
        items = [_nest_like(item, parts) for item in nest]
        return type(nest)(*items) if hasattr(nest, "_fields") else items
    return next(parts)


def _pin(batch: Any) -> Any:
    def pin(leaf: Any) -> Any:
        return leaf.pin_memory() if isinstance(leaf, Tensor) and leaf.device.type == "cpu" else leaf

    return map_nested(pin, batch)
