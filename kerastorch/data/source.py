"""One stream of batches (x, y, sample_weight), read pass after pass from a loader, a dataset or an iterable.

Sisters: arrays.py, which makes datasets of arrays, and resumable.py, which makes loaders that begin inside a pass.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, default_collate

from kerastorch.data.arrays import default_sampler, is_map_style, is_numpy, num_rows, rebuild_loader, to_tensors
from kerastorch.data.resumable import (
    Position,
    RestoringInit,
    ResumableSampler,
    WorkerBatch,
    can_be_resumed,
    decode,
    resumable_loader,
    skip_by_reading,
)
from kerastorch.data.weights import WeightedBatch, WeightedCollate, is_weighted
from kerastorch.device import Nested, describe, get_random_state, map_nested, set_random_state

Batch = tuple[Nested, Nested, Tensor | None]


class BatchSource:
    """Batches of one loader or iterable.

    batches: any iterable of batches.   name: what errors call it.   unpack: makes each batch x, (x, y) or
    (x, y, sample_weight) first.   converts: whether arrays in batches that no DataLoader made become tensors.
    num_batches: batches in a pass, or None where that is not known before the pass ends.
    """

    def __init__(
        self, batches: Iterable[Any], *, name: str, unpack: Callable[[Any], Any] | None = None, converts: bool = True
    ) -> None:
        self.batches, self.name, self.unpack = batches, name, unpack
        self.num_batches = _length(batches)
        self.is_one_shot = isinstance(batches, Iterator)
        self._converts = converts and not isinstance(batches, DataLoader)
        self._reader = batches  # what is iterated: these batches, or a copy of their loader that keeps its position
        self._iterator: Iterator[Any] | None = None  # goes on between epochs of a set number of steps
        self._num_read = 0  # batches given in the running pass
        self._pass_start: Mapping[str, Any] = {}  # random states when it began
        self._passes = 0  # begun
        self._workers: dict[int, bytes] = {}  # random states after the last batch of each
        self._resume_from: Mapping[str, Any] | None = None
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
        holders = (self.batches, *_samplers(self.batches))
        return [generator for holder in holders if (generator := getattr(holder, "generator", None)) is not None]

    @property
    def batch_size(self) -> int | None:
        """Rows in a full batch, or None where that is not known."""
        return getattr(getattr(self.batches, "batch_sampler", None), "batch_size", None)

    @property
    def drop_last(self) -> bool:
        """Whether a short last batch is left out."""
        return getattr(getattr(self.batches, "batch_sampler", None), "drop_last", False)

    def release(self) -> None:
        """Let go of the running pass, and with it of a loader's workers."""
        self._iterator, self._reader = None, self.batches

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
        if can_be_resumed(self.batches) and cast("DataLoader[Any]", self.batches).num_workers:
            self._reader = resumable_loader(cast("DataLoader[Any]", self.batches))

    def state_dict(self) -> dict[str, Any]:
        """Return how far the running pass is, how it began, and the random states of workers and generators."""
        loader = self.batches if isinstance(self.batches, DataLoader) else None
        state: dict[str, Any] = {
            "batches": self._num_read,
            "num_batches": self.num_batches,
            "num_workers": 0 if loader is None else loader.num_workers,
            "generators": [generator.get_state() for generator in self.generators],
        }
        persists = loader is not None and loader.persistent_workers
        if self._num_read or persists:
            state["workers"] = {worker: decode(random_state) for worker, random_state in self._workers.items()}
        if self._num_read:
            state["pass_start"] = self._pass_start
            state["keeps_workers"] = persists and self._passes > 1
            if self._stateful is not None:
                state["loader"] = self._stateful.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass begin where state_dict() stood; random states now are those to go on with.

        Raises ValueError where the data has another number of batches than the pass that is to go on.
        """
        if state["batches"] and state["num_batches"] != self.num_batches:
            raise ValueError(
                f"the checkpoint stands after {state['batches']} of {state['num_batches']} batches of an epoch, but "
                f"{self.name} now has {self.num_batches}: give the data and batch_size of that run, or resume from a "
                "checkpoint of an epoch's end."
            )
        for generator, generator_state in zip(self.generators, state["generators"], strict=False):
            generator.set_state(generator_state)
        self._iterator = None
        self._resume_from = state if state["batches"] or state.get("workers") else None

    @property
    def _stateful(self) -> Any:
        """What keeps its own position: a loader with state_dict, or such a dataset that this process reads."""
        candidates: list[object] = [self.batches]
        if isinstance(self.batches, DataLoader) and self.batches.num_workers == 0:
            candidates.append(self.batches.dataset if isinstance(self.batches.dataset, IterableDataset) else None)
        for candidate in candidates:
            if hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict"):
                return candidate
        return None

    def _begin_pass(self) -> Iterator[Any]:
        state, self._resume_from = self._resume_from, None
        if state is None:
            self._num_read, self._pass_start = 0, get_random_state(*self.generators)
            iterator = iter(self._reader)
        else:
            iterator = self._take_up(state)
        self._passes += 1
        return iterator if self._reader is self.batches else self._from_workers(iterator)

    def _from_workers(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            if not isinstance(batch, WorkerBatch):
                yield batch
            elif batch.random_state is not None:
                self._workers[batch.worker] = batch.random_state
                yield batch.batch

    def _take_up(self, state: Mapping[str, Any]) -> Iterator[Any]:
        """Begin the pass as it was begun, pass over the batches seen, and go on with the random states of now."""
        skip, generators = state["batches"], self.generators
        now = get_random_state(*generators)
        self._num_read, self._pass_start = skip, state.get("pass_start", now)
        set_random_state(self._pass_start, *generators)
        if can_be_resumed(self.batches) and self._stateful is None:
            return self._take_up_loader(state, now)
        self._passes = 1
        if self._stateful is not None and "loader" in state:
            self._stateful.load_state_dict(state["loader"])
            iterator = iter(self.batches)
        elif isinstance(self.batches, Sequence):
            iterator = islice(iter(self.batches), skip, None)
        else:
            kind = type(self.batches).__name__
            warnings.warn(
                f"{self.name} is a {kind} without state_dict: the {skip} batches that were seen are read again and "
                "thrown away, and the rest of the epoch is the same only if they come in the same order.",
                stacklevel=2,
            )
            iterator = skip_by_reading(self.batches, skip, kind)
        set_random_state(now, *generators)
        return iterator

    def _take_up_loader(self, state: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Any]:
        loader = cast("DataLoader[Any]", self.batches)
        skip, workers = state["batches"], state.get("workers", {})
        if loader.num_workers != state["num_workers"] or (loader.num_workers and not loader.in_order):
            warnings.warn(
                f"the checkpoint's epoch was read with num_workers={state['num_workers']}, this one is with "
                f"{loader.num_workers}{'' if loader.in_order else ' and in_order=False'}: transforms that draw random "
                "numbers draw others.",
                stacklevel=2,
            )
            workers = {}
        self._reader = reader = resumable_loader(loader)
        sampler = cast(ResumableSampler, reader.batch_sampler)
        # Workers that persist were not started anew by the pass that goes on, which draws a seed.
        start = self._pass_start if skip == 0 or state["keeps_workers"] else None
        blanks = skip % loader.num_workers if loader.num_workers else 0
        sampler.position = Position(skip, start, now, self.generators, blanks)
        if loader.num_workers == 0:
            return iter(reader)
        init = cast(RestoringInit, reader.worker_init_fn)
        init.random_states = workers
        iterator = iter(reader)
        init.random_states = {}
        self._passes = max(self._passes, int(state.get("keeps_workers", skip == 0)))
        return iterator

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
        iterator = self._begin_pass()
        if total is None and look_ahead:
            batches: Iterable[tuple[Any, bool]] = _with_last(iterator, clones=self._converts)
        else:
            batches = ((batch, False) for batch in iterator)
        try:
            for batch, is_last in batches:
                count += 1
                if look_ahead and total is not None and count > total:
                    raise self._wrong_length(total, f"more than {total}")
                self._num_read = count
                yield self._unpack(batch), is_last or count == total
                if count == limit:
                    return
        finally:
            self._num_read = 0
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
        if self._iterator is None and self._resume_from is not None:
            self._iterator = self._begin_pass()
        if self._iterator is not None:
            try:
                batch = next(self._iterator)
                self._num_read += 1
                return batch
            except StopIteration:
                if self.is_one_shot:
                    raise ValueError(
                        f"{self.name} ran dry after {step} of {steps} steps, and an iterator can't start again: give "
                        "fewer steps, more data, or an object that can be iterated anew."
                    ) from None
        self._iterator = self._begin_pass()
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise ValueError(f"{self.name} gave no batches.") from None
        self._num_read += 1
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


def _samplers(batches: Iterable[Any]) -> tuple[object, object]:
    batch_sampler = getattr(batches, "batch_sampler", None)
    return getattr(batches, "sampler", None), getattr(batch_sampler, "sampler", None)


def _length(batches: Iterable[Any]) -> int | None:
    if isinstance(batches, DataLoader) and isinstance(batches.dataset, IterableDataset):
        return None  # its len() is a guess
    try:
        return len(cast(Sized, batches))
    except TypeError:
        return None


def _with_last(batches: Iterable[Any], *, clones: bool) -> Iterator[tuple[Any, bool]]:
    """Yield each batch, one late, and whether it is the last; clones: an opaque iterable may use its buffer again."""
    held: Any = None
    has_held = False
    for batch in batches:
        if has_held:
            yield held, False
        held, has_held = map_nested(_clone, batch) if clones else batch, True
    if has_held:
        yield held, True


def _clone(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    return leaf.copy() if is_numpy(leaf) else leaf
