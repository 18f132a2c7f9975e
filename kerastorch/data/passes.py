"""Pass after pass over a loader's or iterable's batches, with a position that can be saved and taken up again.

Sisters: resumable.py below, which makes loaders that begin inside a pass; source.py above.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset

from kerastorch.data.in_memory import row_reader
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
from kerastorch.device import get_random_state, set_random_state


class Passes:
    """Begins each pass over batches; `position` is counted by the reader, as it takes them.

    batches: any iterable of batches.   name: what errors call it.   position: batches taken in the running pass.
    """

    def __init__(self, batches: Iterable[Any], name: str) -> None:
        self.batches, self.name = batches, name
        self.position = 0
        self._loader = batches if isinstance(batches, DataLoader) else None
        self._plain_reader: Iterable[Any] = row_reader(batches) or batches
        self._reader = self._plain_reader  # what is iterated; or a copy of the loader that keeps its workers' position
        self._count = 0  # of passes begun
        self._start: Mapping[str, Any] = {}  # random states when the running pass began
        self._workers: dict[int, bytes | Mapping[str, Any]] = {}  # random states after the last batch of each
        self._resume_from: Mapping[str, Any] | None = None
        self._held: Any = None  # the state of what keeps its own position, before the batch that was read ahead

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators that the loader and its sampler have of their own."""
        batch_sampler = getattr(self.batches, "batch_sampler", None)
        sampler = getattr(self.batches, "sampler", None)
        holders = (self.batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
        return [generator for holder in holders if (generator := getattr(holder, "generator", None)) is not None]

    @property
    def is_resumed(self) -> bool:
        """Whether the next pass begins where a saved one stood."""
        return self._resume_from is not None

    def begin(self) -> Iterator[Any]:
        """Return an iterator over a pass."""
        state, self._resume_from = self._resume_from, None
        self._held = None
        if self._loader is None or not self._loader.persistent_workers:
            self._workers = {}  # this pass starts its own
        if state is None:
            self.position, self._start = 0, get_random_state(*self.generators)
            iterator = iter(self._reader)
        else:
            iterator = self._take_up(state)
        self._count += 1
        return iterator if self._reader is self._plain_reader else self._from_workers(iterator)

    def end(self) -> None:
        """Note that the pass is over."""
        self.position, self._held = 0, None

    def release(self) -> None:
        """Let go of a copied loader, and with it of its workers."""
        self._reader = self._plain_reader

    def keep_position(self) -> None:
        """Read from now on in such a way that state_dict() tells all that an exact resume needs."""
        if self._loader is not None and can_be_resumed(self._loader) and self._loader.num_workers:
            self._reader = resumable_loader(self._loader)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the running pass is, how it began, and the random states of workers and generators."""
        if self._resume_from is not None:
            return dict(self._resume_from)
        persists = self._loader is not None and self._loader.persistent_workers
        state: dict[str, Any] = {
            "batches": self.position,
            "num_workers": 0 if self._loader is None else self._loader.num_workers,
            "generators": [generator.get_state() for generator in self.generators],
        }
        if self.position or persists:
            states = self._workers.items()
            state["workers"] = {worker: decode(one) if isinstance(one, bytes) else one for worker, one in states}
        if self.position:
            state["start"] = self._start
            state["keeps_workers"] = persists and self._count > 1
        stateful = self._stateful
        if stateful is not None and (self.position or stateful is not self.batches):
            state["loader"] = stateful.state_dict() if self._held is None else self._held
        return state

    def hold(self) -> None:
        """Note where a loader or dataset that keeps its own position stands, before a batch is read ahead."""
        self._held = None if self._stateful is None else copy.deepcopy(self._stateful.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass begin where state_dict() stood; random states now are those to go on with."""
        for generator, generator_state in zip(self.generators, state["generators"], strict=False):
            generator.set_state(generator_state)
        if "loader" in state and not state["batches"] and self._stateful is not None:
            self._stateful.load_state_dict(state["loader"])
        self._resume_from = state if state["batches"] or state.get("workers") else None

    @property
    def _stateful(self) -> Any:
        """What keeps its own position: a loader with state_dict, or such a dataset that this process reads."""
        dataset = self._loader.dataset if self._loader is not None and self._loader.num_workers == 0 else None
        for candidate in (self.batches, dataset if isinstance(dataset, IterableDataset) else None):
            if hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict"):
                return candidate
        return None

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
        self.position, self._start = skip, state.get("start", now)
        set_random_state(self._start, *generators)
        if can_be_resumed(self.batches) and self._stateful is None:
            return self._take_up_loader(cast("DataLoader[Any]", self.batches), state, now)
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

    def _take_up_loader(
        self, loader: DataLoader[Any], state: Mapping[str, Any], now: Mapping[str, Any]
    ) -> Iterator[Any]:
        skip, workers = state["batches"], state.get("workers", {})
        if loader.num_workers != state["num_workers"] or (loader.num_workers and not loader.in_order):
            warnings.warn(
                f"the checkpoint's epoch was read with num_workers={state['num_workers']}, this one is with "
                f"{loader.num_workers}{'' if loader.in_order else ' and in_order=False'}: transforms that draw random "
                "numbers draw others.",
                stacklevel=2,
            )
            workers = {}
        blanks = skip % loader.num_workers if loader.num_workers else 0
        reader = resumable_loader(loader, blanks=blanks)
        sampler = cast(ResumableSampler, reader.batch_sampler)
        # Workers that persist are not started anew by a later pass; here they are, and that draws a seed.
        keeps_workers = state.get("keeps_workers", True)
        start = self._start if keeps_workers else None
        sampler.position = Position(skip, start, now, self.generators, blanks, prefetches=loader.num_workers > 0)
        if loader.num_workers == 0:
            return iter(row_reader(reader) or reader)
        self._reader = reader
        self._count = max(self._count, int(keeps_workers))
        self._workers = dict(workers)
        init = cast(RestoringInit, reader.worker_init_fn)
        init.random_states = workers
        iterator = iter(reader)
        init.random_states = {}
        return iterator
