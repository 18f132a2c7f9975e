"""Pass after pass over a loader's or iterable's batches, with a position that can be saved and taken up again.

Sisters: resumable.py below, which makes loaders that begin inside a pass; source.py above.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset

from kerastorch.data.in_memory import RowReader, row_reader
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
from kerastorch.device import CopyStream, get_random_state, set_random_state
from kerastorch.errors import warn


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
        self._sampler_starts: list[Any] = []  # states of the samplers that have one, when the running pass began
        self._held: dict[str, Any] | None = None  # the states of _own_states(), before the batch that was read ahead
        self._has_warned = False

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators that the loader and its sampler have of their own."""
        holders = (self.batches, getattr(self.batches, "sampler", None), *self._all_samplers)
        generators = [getattr(holder, "generator", None) for holder in holders]
        return [generator for generator in generators if isinstance(generator, torch.Generator)]

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
            self._sampler_starts = [copy.deepcopy(sampler.state_dict()) for sampler in self._samplers]
            iterator = iter(self._reader)
        else:
            iterator = self._take_up(state)
            self._set_dataset(state)  # batches that were seen may have been read again
        self._count += 1
        return iterator if self._reader is self._plain_reader else self._from_workers(iterator)

    def end(self) -> None:
        """Note that the pass is over."""
        self.position, self._held = 0, None

    def release(self) -> None:
        """Let go of a copied loader, and with it of its workers, and of a copy on the GPU."""
        self._reader = self._plain_reader
        if isinstance(self._plain_reader, RowReader):
            self._plain_reader.release()

    def read_to(self, copies: CopyStream, *, keeps: bool) -> None:
        """Give what is in memory on the GPU; see BatchSource.read_to."""
        if isinstance(self._plain_reader, RowReader):
            self._plain_reader.read_to(copies, keeps=keeps)

    def read_together(self, most: int) -> None:
        """Give up to so many full batches as one BatchGroup; see RowReader.read_together."""
        if isinstance(self._plain_reader, RowReader):
            self._plain_reader.read_together(most)

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
        state["samplers"] = self._sampler_starts if self.position else [one.state_dict() for one in self._samplers]
        if self.position or self._stateful is not self.batches:
            state |= self._own_states() if self._held is None else self._held
        return state

    def hold(self) -> None:
        """Note where a loader or dataset that keeps its own position stands, before a batch is read ahead."""
        self._held = copy.deepcopy(self._own_states())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass begin where state_dict() stood; random states now are those to go on with."""
        for generator, generator_state in zip(self.generators, state["generators"], strict=False):
            generator.set_state(generator_state)
        self._set_samplers(state)
        self._set_dataset(state)
        if "loader" in state and not state["batches"] and self._stateful is not None:
            self._stateful.load_state_dict(state["loader"])
        self._resume_from = state if state["batches"] or state.get("workers") else None

    def warn_where_inexact(self) -> None:
        """Say once that a resumed run may get other batches: a sampler or workers keep a state of their own."""
        if self._has_warned or _keeps_state(self.batches):
            return
        self._has_warned = True
        own = [one for one in self._all_samplers if not type(one).__module__.startswith("torch.")]
        if own and not self._samplers and not self.generators:
            warn(
                f"{self.name} is ordered by {type(own[0]).__name__}, which has neither generator nor state_dict: the "
                "order of the resumed run is the same only if it is always one, or drawn from the global generators."
            )
        if self._loader is not None and self._loader.num_workers and self._dataset is not None:
            warn(
                f"{self.name} has a {type(self._dataset).__name__} with a state_dict, but each of the num_workers="
                f"{self._loader.num_workers} has a copy of its own, whose state no checkpoint holds: the rows of the "
                "resumed run may be others. Use num_workers=0 or torchdata's StatefulDataLoader."
            )

    @property
    def _stateful(self) -> Any:
        """What keeps its own position: a loader with state_dict, or such a dataset that this process reads."""
        dataset = self._loader.dataset if self._loader is not None and self._loader.num_workers == 0 else None
        for candidate in (self.batches, dataset if isinstance(dataset, IterableDataset) else None):
            if _keeps_state(candidate):
                return candidate
        return None

    @property
    def _dataset(self) -> Any:
        """What rows are read from, a wrapped one too, where it has a state of its own beside its loader's."""
        if self._loader is None or self._stateful is not None or isinstance(self._loader.dataset, IterableDataset):
            return None
        dataset: Any = self._loader.dataset
        while not _keeps_state(dataset) and hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        return dataset if _keeps_state(dataset) else None

    @property
    def _all_samplers(self) -> list[Any]:
        """The loader's batch_sampler and the sampler under it."""
        batch_sampler = getattr(self.batches, "batch_sampler", None)
        return [one for one in (batch_sampler, getattr(batch_sampler, "sampler", None)) if one is not None]

    @property
    def _samplers(self) -> list[Any]:
        """The samplers with a state of their own, which is where they are before a pass."""
        return [] if _keeps_state(self.batches) else list(filter(_keeps_state, self._all_samplers))

    def _own_states(self) -> dict[str, Any]:
        has_workers = self._loader is not None and self._loader.num_workers > 0
        holders = {"loader": self._stateful, "dataset": None if has_workers else self._dataset}
        return {name: holder.state_dict() for name, holder in holders.items() if holder is not None}

    def _set_samplers(self, state: Mapping[str, Any]) -> None:
        for sampler, sampler_state in zip(self._samplers, state.get("samplers", []), strict=False):
            sampler.load_state_dict(copy.deepcopy(sampler_state))

    def _set_dataset(self, state: Mapping[str, Any]) -> None:
        if self._dataset is not None and "dataset" in state:
            self._dataset.load_state_dict(copy.deepcopy(state["dataset"]))

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
        self._sampler_starts = state.get("samplers", [])
        self._begin_order()
        if can_be_resumed(self.batches) and self._stateful is None:
            return self._take_up_loader(cast("DataLoader[Any]", self.batches), state, now)
        if self._stateful is not None and "loader" in state:
            self._stateful.load_state_dict(state["loader"])
            iterator = iter(self.batches)
        elif isinstance(self.batches, Sequence):
            iterator = islice(iter(self.batches), skip, None)
        else:
            kind = type(self.batches).__name__
            warn(
                f"{self.name} is a {kind} without state_dict: the {skip} batches that were seen are read again and "
                "thrown away, and the rest of the epoch is the same only if they come in the same order."
            )
            iterator = skip_by_reading(self.batches, skip, kind)
        set_random_state(now, *generators)
        return iterator

    def _begin_order(self) -> None:
        """Bring samplers and random states to where the running pass began."""
        self._set_samplers({"samplers": self._sampler_starts})
        set_random_state(self._start, *self.generators)

    def _take_up_loader(
        self, loader: DataLoader[Any], state: Mapping[str, Any], now: Mapping[str, Any]
    ) -> Iterator[Any]:
        skip, workers = state["batches"], state.get("workers", {})
        if loader.num_workers != state["num_workers"] or (loader.num_workers and not loader.in_order):
            warn(
                f"the checkpoint's epoch was read with num_workers={state['num_workers']}, this one is with "
                f"{loader.num_workers}{'' if loader.in_order else ' and in_order=False'}: transforms that draw random "
                "numbers draw others."
            )
            workers = {}
        blanks = skip % loader.num_workers if loader.num_workers else 0
        reader = resumable_loader(loader, blanks=blanks)
        sampler = cast(ResumableSampler, reader.batch_sampler)
        # Workers that persist are not started anew by a later pass; here they are, and that draws a seed.
        keeps_workers = state.get("keeps_workers", True)
        start = self._begin_order if keeps_workers else None
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


def _keeps_state(thing: object) -> bool:
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
