"""One stream of batches (x, y, sample_weight), read pass after pass from a loader, a dataset or an iterable.

Sister: arrays.py, which makes datasets of arrays.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from kerastorch.data.arrays import to_tensors
from kerastorch.device import Nested, describe

Batch = tuple[Nested, Nested, Tensor | None]


class BatchSource:
    """Batches of one loader or iterable.

    batches: any iterable of batches.   name: what errors call it.
    num_batches: batches in a pass, or None where that is not known before the pass ends.
    """

    def __init__(self, batches: Iterable[Any], *, name: str) -> None:
        self.batches, self.name = batches, name
        self.num_batches = _length(batches)
        self.is_one_shot = isinstance(batches, Iterator)
        self._converts = not isinstance(batches, DataLoader)
        self._iterator: Iterator[Any] | None = None  # goes on between epochs of a set number of steps
        if self.num_batches == 0:
            raise ValueError(
                f"{name} is empty: {type(batches).__name__} gives 0 batches"
                + (" (drop_last drops the only, short one)." if getattr(batches, "drop_last", False) else ".")
            )

    def epoch(self, steps: int | None = None, *, look_ahead: bool = False) -> Iterator[tuple[Batch, bool]]:
        """Yield (batch, is_last) over a training epoch: one pass, or `steps` batches that go on where the last ended.

        look_ahead: whether is_last must hold even where the length is not known: one batch is then read ahead.
        Raises ValueError for no batch at all, and where `steps` needs a new pass over what can be read only once.
        """
        return self.one_pass(look_ahead=look_ahead) if steps is None else self._steps(steps)

    def one_pass(self, limit: int | None = None, *, look_ahead: bool = False) -> Iterator[tuple[Batch, bool]]:
        """Yield (batch, is_last) over one pass from the beginning, or over its first `limit` batches.

        Raises ValueError for no batch at all; warns where there are fewer than `limit`.
        """
        count, total = 0, self.num_batches
        if total is None and look_ahead:
            batches: Iterable[tuple[Any, bool]] = _with_last(self.batches)
        else:
            batches = ((batch, False) for batch in self.batches)
        for batch, is_last in batches:
            count += 1
            yield self._unpack(batch), is_last or count == total
            if count == limit:
                return
        if count == 0:
            used_up = "; an iterator can be read only once" if self.is_one_shot else ""
            raise ValueError(f"{self.name} gave no batches{used_up}.")
        if limit is not None:
            warnings.warn(f"{self.name} gave {count} batches, fewer than the {limit} steps asked for.", stacklevel=2)
        if look_ahead and total is not None and count < total:
            raise ValueError(
                f"{self.name} says it has {total} batches but gave {count}, so the last accumulated gradients were not "
                "applied: correct its __len__."
            )

    def _steps(self, steps: int) -> Iterator[tuple[Batch, bool]]:
        for step in range(steps):
            yield self._unpack(self._next(step, steps)), step + 1 == steps

    def _next(self, step: int, steps: int) -> Any:
        if self._iterator is not None:
            try:
                return next(self._iterator)
            except StopIteration:
                if self.is_one_shot:
                    raise ValueError(
                        f"{self.name} ran dry after {step} of {steps} steps, and an iterator can't start again: give "
                        "fewer steps, more data, or an object that can be iterated anew."
                    ) from None
        self._iterator = iter(self.batches)
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError(f"{self.name} gave no batches.") from None

    def _unpack(self, batch: Any) -> Batch:
        """Return a batch as (x, y, sample_weight); ValueError for a tuple of more than three."""
        if not isinstance(batch, (tuple, list)) or isinstance(batch, PackedSequence):
            parts: tuple[Any, ...] | list[Any] = (batch,)
        else:
            parts = batch
        if self._converts:
            parts = [part if isinstance(part, Tensor) else _to_tensors(part, i == 1) for i, part in enumerate(parts)]
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
    data: Any, *, name: str, batch_size: int | None = None, shuffle: bool = False, steps: int | None = None
) -> BatchSource:
    """Return the BatchSource of what make_dataset gave: a DataLoader, a Dataset or an iterable of batches.

    A Dataset is read as DataLoader(dataset, batch_size, shuffle) reads it; batch_size defaults to 32, or to
    ceil(rows / steps) where steps are given.
    Raises ValueError for a batch_size beside batches that have their own.
    """
    if isinstance(data, Dataset):
        if isinstance(data, IterableDataset):
            return BatchSource(DataLoader(data, batch_size or 32), name=name)
        rows = len(data)  # type: ignore[arg-type]  # map-style datasets have a length; the base class does not say so
        if rows == 0:
            raise ValueError(f"{name} is empty: the {type(data).__name__} has 0 rows.")
        if batch_size is None:
            batch_size = 32 if steps is None else math.ceil(rows / steps)
        return BatchSource(DataLoader(data, batch_size, shuffle), name=name)
    if batch_size is not None:
        raise ValueError(f"batch_size={batch_size} beside a {type(data).__name__}: its batches have their own size.")
    return BatchSource(data, name=name)


def warn_if_shuffled(data: object) -> None:
    """Warn that shuffle=False does not reach into a DataLoader that shuffles."""
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        warnings.warn(
            "shuffle=False has no effect on a DataLoader, and this one shuffles: make it with shuffle=False.",
            stacklevel=3,
        )


def _length(batches: Iterable[Any]) -> int | None:
    if isinstance(batches, DataLoader) and isinstance(batches.dataset, IterableDataset):
        return None  # its len() is a guess
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _with_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    iterator = iter(batches)
    try:
        held = next(iterator)
    except StopIteration:
        return
    for batch in iterator:
        yield held, False
        held = batch
    yield held, True


def _to_tensors(part: Any, target: bool) -> Nested:
    return None if part is None else to_tensors(part, target=target)
