"""One stream of batches (x, y, sample_weight), read pass after pass from a loader, a dataset or an iterable.

Sisters: arrays.py, which makes datasets of arrays, and passes.py, which begins each pass and knows its position.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, default_collate

from kerastorch.data.arrays import default_sampler, is_map_style, is_numpy, num_rows, rebuild_loader, to_tensors
from kerastorch.data.in_memory import BatchGroup
from kerastorch.data.passes import Passes
from kerastorch.data.resumable import can_be_resumed
from kerastorch.data.weights import WeightedBatch, WeightedCollate, is_weighted
from kerastorch.device import CopyStream, Nested, describe, map_nested

Batch = tuple[Nested, Nested, Tensor | None]


class BatchSource:
    """Batches of one loader or iterable.

    batches: any iterable of batches.   name: what errors call it.   unpack: makes each batch x, (x, y) or
    (x, y, sample_weight) first.   converts: whether arrays in batches that no DataLoader made become tensors.
    num_batches: batches in a pass, or None where that is not known before the pass ends.
    num_together: how many batches the last one given stands for.
    """

    def __init__(
        self, batches: Iterable[Any], *, name: str, unpack: Callable[[Any], Any] | None = None, converts: bool = True
    ) -> None:
        self.batches, self.name, self.unpack = batches, name, unpack
        self.num_batches = _length(batches)
        self.num_together = 1
        self.is_one_shot = isinstance(batches, Iterator)
        self._converts = converts and not isinstance(batches, DataLoader)
        self._passes = Passes(batches, name)
        self._iterator: Iterator[Any] | None = None  # goes on between epochs of a set number of steps
        if self.num_batches == 0:
            raise ValueError(
                f"{name} is empty: {type(batches).__name__} gives 0 batches"
                + (" (drop_last drops the only, short one)." if getattr(batches, "drop_last", False) else ".")
            )

    @property
    def num_rows(self) -> int | None:
        """Rows in a pass, or None where that is not known."""
        sampler = default_sampler(self.batches) if isinstance(self.batches, DataLoader) else None
        return None if sampler is None else len(sampler)

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators that the loader and its sampler have of their own."""
        return self._passes.generators

    @property
    def batch_size(self) -> int | None:
        """Rows in a full batch, or None where that is not known."""
        return getattr(getattr(self.batches, "batch_sampler", None), "batch_size", None)

    @property
    def drop_last(self) -> bool:
        """Whether a short last batch is left out."""
        return getattr(getattr(self.batches, "batch_sampler", None), "drop_last", False)

    @property
    def may_reuse_memory(self) -> bool:
        """Whether a batch's tensors may be written over with the next one's: all but torch's own collate may do so."""
        collate = getattr(self.batches, "collate_fn", None)
        while isinstance(collate, WeightedCollate):
            collate = collate.collate
        return collate is not default_collate

    def release(self) -> None:
        """Let go of the running pass, and with it of a loader's workers."""
        self._iterator = None
        self._passes.release()

    def read_to(self, copies: CopyStream, *, keeps: bool) -> None:
        """Give what is in memory on the GPU, until release(), unless `unpack` may expect it on the CPU.

        keeps: whether all of it may stay there after the first pass, where it takes little of what is free.
        """
        if self.unpack is None:
            self._passes.read_to(copies, keeps=keeps)

    def read_together(self, most: int) -> None:
        """Let one_pass() give up to so many full batches joined as one, where several are read at once to a GPU."""
        if self.unpack is None:
            self._passes.read_together(most)

    def another(self) -> BatchSource:
        """Return a source of the same batches whose passes leave this one's alone."""
        batches = self.batches
        if can_be_resumed(batches) and cast("DataLoader[Any]", batches).persistent_workers:
            loader = cast("DataLoader[Any]", batches)  # has one iterator, which a second pass would begin anew
            batches = rebuild_loader(
                loader, loader.dataset, batch_sampler=loader.batch_sampler, persistent_workers=False
            )
        return BatchSource(batches, name=self.name, unpack=self.unpack, converts=self._converts)

    # ---- position ----

    def keep_position(self) -> None:
        """Read from now on in such a way that state_dict() tells all that an exact resume needs."""
        self._passes.keep_position()

    def state_dict(self) -> dict[str, Any]:
        """Return how far the running pass is, how it began, and the random states of workers and generators."""
        return {"num_batches": self.num_batches, **self._passes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass begin where state_dict() stood; random states now are those to go on with."""
        self._iterator = None
        self._passes.load_state_dict(state)

    def warn_where_inexact(self) -> None:
        """Say once that a resumed run may get other batches, where a sampler or workers keep a state of their own."""
        self._passes.warn_where_inexact()

    def find_misfit(self, state: Mapping[str, Any]) -> str | None:
        """Return what is wrong where the data has another number of batches than the pass that is to go on."""
        count = state.get("num_batches")
        if state["batches"] and (count != self.num_batches or state["batches"] > (count or math.inf)):
            return (
                f"it stands after {state['batches']} of {count!s:.20} batches of an epoch, but {self.name} now has "
                f"{self.num_batches}; give the data and batch_size of that run, or a checkpoint of an epoch's end"
            )
        return None

    # ---- passes ----

    def epoch(
        self, steps: int | None = None, *, done: int = 0, look_ahead: bool = False
    ) -> Iterator[tuple[Batch, bool]]:
        """Yield (batch, is_last) over a training epoch: one pass, or `steps` batches that go on where the last ended.

        done: batches of the epoch that a resumed run has behind it.
        look_ahead: whether is_last must hold even where the length is not known: one batch is then read ahead.
        Raises ValueError for no batch at all, and where `steps` needs a new pass over what can be read only once.
        """
        return self.one_pass(done=done, look_ahead=look_ahead) if steps is None else self._steps(steps, done)

    def one_pass(
        self, limit: int | None = None, *, done: int = 0, look_ahead: bool = False
    ) -> Iterator[tuple[Batch, bool]]:
        """Yield (batch, is_last) over one pass from the beginning, or over its first `limit` batches.

        done: batches that load_state_dict() told to pass over.
        Raises ValueError for no batch at all; warns where there are fewer than `limit`.
        """
        count, total = done, self.num_batches
        iterator = self._passes.begin()
        if total is None and look_ahead:
            batches: Iterable[tuple[Any, bool]] = _with_last(iterator, self._passes.hold, clones=self._converts)
        else:
            batches = zip(iterator, repeat(False))
        try:
            for batch, is_last in batches:
                self.num_together = 1
                if isinstance(batch, BatchGroup):
                    batch, self.num_together = batch
                count += self.num_together
                if look_ahead and total is not None and count > total:
                    raise self._wrong_length(total, f"more than {total}")
                self._passes.position = count
                yield self._unpack(batch), is_last or count == total
                if count == limit:
                    return
        finally:
            self._passes.end()
        if count == 0:
            used_up = "; an iterator can be read only once" if self.is_one_shot else ""
            raise ValueError(f"{self.name} gave no batches{used_up}.")
        if limit is not None:
            warnings.warn(f"{self.name} gave {count} batches, fewer than the {limit} steps asked for.", stacklevel=2)
        if look_ahead and total is not None and count < total:
            raise self._wrong_length(total, str(count))

    def _wrong_length(self, total: int, given: str) -> ValueError:
        return ValueError(
            f"{self.name} says it has {total} batches but gave {given}, so the last accumulated gradients would be "
            "lost: correct its __len__."
        )

    def _steps(self, steps: int, done: int) -> Iterator[tuple[Batch, bool]]:
        for step in range(done, steps):
            yield self._unpack(self._next(step, steps)), step + 1 == steps

    def _next(self, step: int, steps: int) -> Any:
        if self._iterator is None and self._passes.is_resumed:
            self._iterator = self._passes.begin()
        if self._iterator is not None:
            try:
                batch = next(self._iterator)
                self._passes.position += 1
                return batch
            except StopIteration:
                if self.is_one_shot:
                    raise ValueError(
                        f"{self.name} ran dry after {step} of {steps} steps, and an iterator can't start again: give "
                        "fewer steps, more data, or an object that can be iterated anew."
                    ) from None
        self._iterator = self._passes.begin()
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise ValueError(f"{self.name} gave no batches.") from None
        self._passes.position += 1
        return batch

    def _unpack(self, batch: Any) -> Batch:
        """Return a batch as (x, y, sample_weight); ValueError for a tuple of more than three."""
        added_weight: Tensor | None = None
        if isinstance(batch, WeightedBatch):
            batch, added_weight = batch
        if self.unpack is not None:
            batch = self.unpack(batch)
        if not isinstance(batch, (tuple, list)) or isinstance(batch, PackedSequence):
            parts: tuple[Any, ...] | list[Any] = (batch,)
        else:
            parts = batch
        if self._converts:
            parts = [
                part if isinstance(part, Tensor) else to_tensors(part, target=i == 1, strict=False)
                for i, part in enumerate(parts)
            ]
        if added_weight is not None:
            own_weight = parts[2] if len(parts) > 2 else None
            y = parts[1] if len(parts) > 1 else None
            return parts[0], y, added_weight if own_weight is None else own_weight * added_weight
        if len(parts) == 2:
            return parts[0], parts[1], None
        if len(parts) == 1:
            return parts[0], None, None
        if len(parts) == 3:
            return parts[0], parts[1], parts[2]
        raise ValueError(
            f"{self.name} gave a batch of {len(parts)} parts, {describe(batch)}; a batch is x, (x, y) or "
            "(x, y, sample_weight). Several inputs go together: ((a, b, ...), y)."
        )


def make_source(
    data: Any,
    *,
    name: str,
    batch_size: int | None = None,
    shuffle: bool = False,
    steps: int | None = None,
    unpack: Callable[[Any], Any] | None = None,
) -> BatchSource:
    """Return the BatchSource of what make_dataset gave: a DataLoader, a Dataset or an iterable of batches.

    A Dataset is read as DataLoader(dataset, batch_size, shuffle) reads it; batch_size defaults to 32, or to
    ceil(rows / steps) where steps are given.
    unpack: see BatchSource.   Raises ValueError for a batch_size beside batches that have their own.
    """
    if isinstance(data, DataLoader):
        _check_workers(data)
    if isinstance(data, IterableDataset) or is_map_style(data):
        if isinstance(data, IterableDataset):
            return BatchSource(DataLoader(data, int(batch_size or 32)), name=name, unpack=unpack)
        rows = num_rows(data, what=name)
        if rows == 0:
            raise ValueError(f"{name} is empty: the {type(data).__name__} has 0 rows.")
        if batch_size is None:
            batch_size = 32 if steps is None else math.ceil(rows / steps)
        collate = WeightedCollate(default_collate) if is_weighted(data) else None
        data = DataLoader(data, int(batch_size), shuffle, collate_fn=collate)
    elif batch_size is not None:
        raise ValueError(f"batch_size={batch_size} beside a {type(data).__name__}: its batches have their own size.")
    return BatchSource(data, name=name, unpack=unpack)


def _check_workers(loader: DataLoader[Any]) -> None:
    context = loader.multiprocessing_context or multiprocessing
    method = context.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    in_notebook = not hasattr(sys.modules["__main__"], "__file__")
    sent: list[object] = [loader.collate_fn, loader.worker_init_fn]  # what the workers get besides the samplers
    dataset: object = loader.dataset
    while dataset is not None:
        sent.append(type(dataset))
        dataset = getattr(dataset, "dataset", None)
    own = [getattr(part, "__name__", "") for part in sent if getattr(part, "__module__", "") == "__main__"]
    if loader.num_workers and method != "fork" and in_notebook and own:
        raise ValueError(
            f"the DataLoader has num_workers={loader.num_workers}, but its workers can't see {own[0]!r}, which was "
            "defined in this notebook: move it into a .py file and import it, or use num_workers=0."
        )


def warn_if_shuffled(data: object) -> None:
    """Warn that shuffle=False does not reach into a DataLoader that shuffles."""
    if isinstance(data, DataLoader) and isinstance(default_sampler(data), RandomSampler):
        warnings.warn(
            "shuffle=False has no effect on a DataLoader, and this one shuffles: make it with shuffle=False.",
            stacklevel=3,
        )


def _length(batches: Iterable[Any]) -> int | None:
    if isinstance(batches, DataLoader) and isinstance(batches.dataset, IterableDataset):
        return None  # its len() is a guess
    try:
        return len(cast(Sized, batches))
    except TypeError:
        return None


def _with_last(iterator: Iterator[Any], hold: Callable[[], None], *, clones: bool) -> Iterator[tuple[Any, bool]]:
    """Yield each batch, one late, and whether it is the last.

    hold: called before a batch is read ahead.   clones: an opaque iterable may use its buffer again.
    """
    nothing = object()
    batch = next(iterator, nothing)
    while batch is not nothing:
        held = map_nested(_clone, batch) if clones else batch
        hold()
        batch = next(iterator, nothing)
        yield held, batch is nothing


def _clone(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    return leaf.copy() if is_numpy(leaf) else leaf
