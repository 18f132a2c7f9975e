"""A DataLoader that can be taken up in the middle of a pass: seen batches are skipped by index, not by loading them.

Its workers send their random states along with each batch and are set to them again. Sisters: arrays.py below,
source.py above.
"""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from kerastorch.data.arrays import rebuild_loader
from kerastorch.device import set_cpu_random_state, set_random_state
from kerastorch.errors import warn


class WorkerBatch(NamedTuple):
    """A batch, the worker that made it, and that worker's random states afterwards; none for a batch to throw away."""

    batch: Any
    worker: int
    random_state: bytes | None  # pickled in the worker: pinning memory passes bytes by, and a queue moves them cheaply


def can_be_resumed(loader: object) -> bool:
    """Whether resumable_loader() takes it: a plain DataLoader of batches over a map-style dataset."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def resumable_loader(loader: DataLoader[Any], *, blanks: int = 0) -> DataLoader[Any]:
    """Return a DataLoader of the same batches, in the same order, from the same random draws.

    Its batch_sampler is a ResumableSampler. With workers its batches are WorkerBatches.
    blanks: how many empty batches its first pass is to begin with.
    """
    sampler, dataset = ResumableSampler(loader.batch_sampler), loader.dataset
    if loader.num_workers == 0:
        return rebuild_loader(loader, dataset, batch_sampler=sampler)
    return rebuild_loader(
        loader,
        BlanksDataset(dataset) if blanks and hasattr(dataset, "__getitems__") else dataset,
        batch_sampler=sampler,
        collate_fn=StatefulCollate(loader.collate_fn),
        worker_init_fn=RestoringInit(loader.worker_init_fn),
    )


@dataclass
class Position:
    """Where a pass is taken up again.

    skip: batches that were seen.   start: brings samplers and random states to where the order began, or None: they
    are there.
    now: random states after those batches.   generators: the loader's and sampler's own.
    blanks: empty batches first, so that the next one meets its own worker.
    prefetches: whether index lists are drawn ahead: the generators' states of now are then beyond those batches.
    """

    skip: int
    start: Callable[[], None] | None
    now: Mapping[str, Any]
    generators: list[torch.Generator]
    blanks: int = 0
    prefetches: bool = False


class ResumableSampler:
    """Gives the index lists of a batch_sampler; with a position set, the next pass begins there."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.position: Position | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        lists = iter(self.sampler)  # now, since it may draw: a loader with workers does so twice, and reads the second
        return lists if self.position is None else self._rest(lists)

    def _rest(self, lists: Iterator[list[int]]) -> Iterator[list[int]]:
        position, self.position = self.position, None
        assert position is not None
        if position.start is not None:
            position.start()
            lists = iter(self.sampler)
        _skip(lists, position.skip, type(getattr(self.sampler, "sampler", self.sampler)).__name__)
        replayed = [generator.get_state() for generator in position.generators]
        set_random_state(position.now, *position.generators)
        if position.prefetches:
            for generator, state in zip(position.generators, replayed, strict=True):
                generator.set_state(state)
        for _ in range(position.blanks):
            yield []
        yield from lists


def _skip(lists: Iterator[list[int]], count: int, name: str) -> None:
    drawn: torch.Tensor | None = None
    for done in range(count):
        if next(lists, None) is None:
            raise ValueError(f"the checkpoint stands after {count} batches, but {name} now gives only {done}.")
        drawn = torch.get_rng_state() if drawn is None else drawn
    if drawn is not None and not torch.equal(drawn, torch.get_rng_state()):
        warn(
            f"{name} draws from torch's global generator as it goes, between the steps that draw from it too: the "
            "order of the resumed epoch is another. Give the sampler a generator of its own."
        )


class BlanksDataset(Dataset[Any]):
    """A dataset whose __getitems__, which takes a batch of indices, is never asked for none."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[Any]) -> Any:
        return self.dataset.__getitems__(indices) if indices else []

    def __getattr__(self, name: str) -> Any:  # a worker_init_fn may look at its worker's dataset
        if name == "dataset":  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


class StatefulCollate:
    """Collates as the loader does and adds the worker's random states; a class, so that workers can pickle it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> WorkerBatch:
        import numpy as np

        info = get_worker_info()
        assert info is not None
        if not items:
            return WorkerBatch(None, info.id, None)
        batch = self.collate(items)
        states = random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()
        return WorkerBatch(batch, info.id, pickle.dumps(states))


def decode(random_state: bytes) -> dict[str, Any]:
    """Return a WorkerBatch's random_state, as this process got it from its worker, as get_cpu_random_state() has it."""
    import numpy as np

    python_state, (_, key, *position), torch_state = pickle.loads(random_state)
    return {
        "python": python_state,
        "numpy": [torch.from_numpy(key.astype(np.int64)), *position],
        "torch": torch.from_numpy(torch_state),
    }


@dataclass
class RestoringInit:
    """Calls the loader's worker_init_fn, then sets the worker's random states; a class, so that workers can pickle it.

    The workers leave the terminal's process group: Ctrl-C and SIGTERM to the group are for the main process, which may
    need one more batch to reach a full step.
    """

    init: Callable[[int], None] | None
    random_states: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def __call__(self, worker: int) -> None:
        if hasattr(os, "setpgid"):
            os.setpgid(0, 0)
        if self.init is not None:
            self.init(worker)
        if worker in self.random_states:
            set_cpu_random_state(self.random_states[worker])


def skip_by_reading(batches: Iterable[Any], count: int, name: str) -> Iterator[Any]:
    """Return an iterator over batches that has thrown the first `count` away."""
    iterator = iter(batches)
    for done in range(count):
        try:
            next(iterator)
        except StopIteration:
            raise ValueError(
                f"the checkpoint stands after {count} batches, but {name} now gives only {done}."
            ) from None
    return iterator
