"""Outputs of many batches joined into numpy arrays as they come, in little more memory than the result.

Sisters: arrays.py, source.py, weights.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kerastorch.device import Nested, describe

if TYPE_CHECKING:
    import numpy as np

MAX_WAITING, MAX_WAITING_BYTES = 32, 2**22


class Predictions:
    """Grows one array for each leaf of the outputs.

    num_samples: rows to expect, if known: memory is then taken once.
    """

    def __init__(self, num_samples: int | None = None) -> None:
        self.num_samples = num_samples
        self._rows: Nested = None
        self._waiting: list[Tensor] = []  # all of one shape and dtype
        self._shape: torch.Size | None = None  # theirs
        self._dtype: torch.dtype | None = None
        self._first: tuple[Tensor, int] | None = None  # the first of them and its address, until there is a second
        self._room = 1  # how many may wait

    def append(self, outputs: Nested, num_samples: int) -> None:
        """Add a batch of nested numpy arrays; ValueError for a leaf without a first axis of num_samples."""
        self._add_waiting()
        self._rows = self._append(self._rows, outputs, num_samples)

    def append_later(self, outputs: Tensor, num_samples: int) -> None:
        """Add a batch of outputs, many like it at once: one copy, and from a GPU one wait, for all of them."""
        shape = outputs.shape
        if shape != self._shape or shape[0] != num_samples or outputs.dtype != self._dtype:
            self.append(to_numpy(outputs), num_samples)
            self._shape, self._dtype, self._first = shape, outputs.dtype, (outputs, outputs.data_ptr())
            return
        if self._first is not None:
            # A net that writes its outputs to the same memory each time would write over those that wait.
            is_reused = outputs.data_ptr() == self._first[1]
            room = MAX_WAITING_BYTES // max(1, outputs.untyped_storage().nbytes())
            self._room, self._first = 1 if is_reused else min(room, MAX_WAITING), None
        self._waiting.append(outputs.detach() if outputs.requires_grad else outputs)
        if len(self._waiting) >= self._room:
            self._add_waiting()

    def _add_waiting(self) -> None:
        if self._waiting:
            outputs, self._waiting = self._waiting, []
            joined = torch.cat(outputs)
            self._rows = self._append(self._rows, to_numpy(joined), len(joined))

    def joined(self) -> Nested:
        """Return all rows in order, nested as the outputs are. Nothing can be appended after."""
        self._add_waiting()
        return _map_rows(self._rows)

    def _append(self, rows: Nested, part: Nested, num_samples: int) -> Nested:
        if isinstance(part, Mapping):
            return {key: self._append(rows and rows[key], value, num_samples) for key, value in part.items()}
        if isinstance(part, (tuple, list)):
            grown = [self._append(rows and rows[i], value, num_samples) for i, value in enumerate(part)]
            return type(part)(*grown) if hasattr(part, "_fields") else type(part)(grown)
        if part is None:
            return None
        rows = rows or _Rows(part, max(self.num_samples or 0, num_samples))
        rows.append(part, num_samples)
        return rows


class _Rows:
    """One array that grows at its end. realloc lets it grow without a second copy of what is large."""

    def __init__(self, first: np.ndarray[Any, Any], capacity: int) -> None:
        import numpy as np

        _check_batch_axis(first, None)
        self._array = np.empty((capacity, *first.shape[1:]), first.dtype)
        self._length = 0

    def append(self, part: np.ndarray[Any, Any], num_samples: int) -> None:
        _check_batch_axis(part, num_samples)
        if part.shape[1:] != self._array.shape[1:]:
            raise ValueError(
                f"predict() can't join outputs of shapes (N, {', '.join(map(str, self._array.shape[1:]))}) and "
                f"(N, {', '.join(map(str, part.shape[1:]))}): use predict_iter(), which gives them batch by batch."
            )
        if part.dtype != self._array.dtype:
            import numpy as np

            of_both = np.empty(self._array.shape, np.result_type(self._array, part))
            of_both[: self._length] = self._array[: self._length]  # what lies beyond may be no number
            self._array = of_both
        end = self._length + len(part)
        if end > len(self._array):
            self._array.resize((end + end // 4, *self._array.shape[1:]), refcheck=False)
        self._array[self._length : end] = part
        self._length = end

    def finished(self) -> np.ndarray[Any, Any]:
        if self._length < len(self._array):
            self._array.resize((self._length, *self._array.shape[1:]), refcheck=False)
        return self._array


def to_numpy(output: Any) -> Any:
    """Return a tensor as a numpy array on the CPU (bfloat16 as float32), anything else as it is."""
    if not isinstance(output, Tensor):
        return output
    output = output.detach()
    return (output.float() if output.dtype == torch.bfloat16 else output).cpu().numpy()


def _map_rows(rows: Nested) -> Nested:
    if isinstance(rows, _Rows):
        return rows.finished()
    if isinstance(rows, Mapping):
        return {key: _map_rows(value) for key, value in rows.items()}
    if rows is None:
        return None
    joined = [_map_rows(value) for value in rows]
    return type(rows)(*joined) if hasattr(rows, "_fields") else type(rows)(joined)


def _check_batch_axis(part: Any, num_samples: int | None) -> None:
    shape = getattr(part, "shape", None)
    if not shape or (num_samples is not None and shape[0] != num_samples):
        batch = f" for a batch of {num_samples}" if num_samples is not None else ""
        raise ValueError(
            f"predict() joins outputs on their first, batch axis, but forward returned {describe(part)}{batch}: "
            "return outputs with the batch first, or use predict_iter(), which gives them as they are."
        )
