"""A DataLoader that can be taken up in the middle of a pass: seen batches are skipped by index, not by loading them.

Its workers send their random states along with each batch and are set to them again. Sisters: arrays.py below,
source.py above.
"""

from __future__ import annotations

import pickle
import random
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kerastorch.data.arrays import rebuild_loader
from kerastorch.device import set_cpu_random_state, set_random_state


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


def resumable_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a DataLoader of the same batches, in the same order, from the same random draws.

    Its batch_sampler is a ResumableSampler. With workers its batches are WorkerBatches.
    """
    sampler = ResumableSampler(loader.batch_sampler)
    if loader.num_workers == 0:
        return rebuild_loader(loader, loader.dataset, batch_sampler=sampler)
    return rebuild_loader(
        loader,
        loader.dataset,
        batch_sampler=sampler,
        collate_fn=StatefulCollate(loader.collate_fn),
        worker_init_fn=RestoringInit(loader.worker_init_fn),
    )


@dataclass
class Position:
    """Where a pass is taken up again.

    skip: batches that were seen.   start: random states to begin the order with, or None: those that it meets.
    now: random states after those batches.   blanks: empty batches first, so that the next one meets its own worker.
    """

    skip: int
    start: Mapping[str, Any] | None
    now: Mapping[str, Any]
    generators: list[torch.Generator]
    blanks: int = 0


class ResumableSampler:
    """Gives the index lists of a batch_sampler; with a position set, the next pass begins there."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.position: Position | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        position, self.position = self.position, None
        if position is not None and position.start is not None:
            set_random_state(position.start, *position.generators)
        lists = iter(self.sampler)
        if position is not None:
            _skip(lists, position.skip, type(getattr(self.sampler, "sampler", self.sampler)).__name__)
            set_random_state(position.now, *position.generators)
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
        warnings.warn(
            f"{name} draws from torch's global generator as it goes, between the steps that draw from it too: the "
            "order of the resumed epoch is another. Give the sampler a generator of its own.",
            stacklevel=2,
        )


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

    The workers leave Ctrl-C and SIGTERM to the main process, which may need one more batch to reach a full step.
    """

    init: Callable[[int], None] | None
    random_states: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _stay_once)
        if self.init is not None:
            self.init(worker)
        if worker in self.random_states:
            set_cpu_random_state(self.random_states[worker])


def _stay_once(signum: int, frame: object) -> None:
    signal.signal(signum, signal.SIG_DFL)


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
