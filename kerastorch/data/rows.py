"""Rows of tensors in memory, and the copy of them that a GPU holds from the second pass over them on.

Sister: in_memory.py above, which reads them as a DataLoader would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kerastorch.device import send

FREE_SHARE = 1 / 8  # what the rows of one source may take of the GPU memory that is free after a pass over them
COPY_BYTES = 2**26  # they are copied in parts of about this size, so that the CPU needs no second copy


@dataclass
class Rows:
    """Tensors in memory whose first axis is rows.

    tensors: what rows are read of.   kept: which rows there are, all where None.   collate: makes a batch, as the
    loader's own would be, of the tensors of its rows.   gpu: where the tensors are, None for the CPU.
    """

    tensors: list[Tensor]
    kept: Tensor | None
    collate: Callable[[Sequence[Tensor]], Any]
    gpu: torch.device | None = None

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor with no other rows than those that are kept."""
        return [
            ((len(tensor if self.kept is None else self.kept), *tensor.shape[1:]), tensor.dtype)
            for tensor in self.tensors
        ]

    def take(self, index: Tensor) -> list[Tensor]:
        """Return the tensors of these rows: index is int64 of shape (N,), on the CPU."""
        if self.kept is not None:
            index = self.kept[index]
        if self.gpu is not None:
            if not self._has(index):  # a GPU would not raise: it would be of no more use
                raise IndexError("a row's index is out of range")
            index = send(index, self.gpu)
        return [tensor.index_select(0, index) for tensor in self.tensors]

    def take_range(self, start: int, stop: int) -> list[Tensor]:
        """Return the tensors of consecutive rows, where all are kept; copies, since a net may write to its input."""
        return [tensor[start:stop].clone(memory_format=torch.contiguous_format) for tensor in self.tensors]

    @property
    def can_be_copied(self) -> bool:
        """Whether the tensors are on the CPU, tell by their versions that they change, and have all rows kept."""
        is_known = self.gpu is None and not any(tensor.is_inference() for tensor in self.tensors)
        return is_known and (self.kept is None or self._has(self.kept))

    def _has(self, index: Tensor) -> bool:
        low, high = index.aminmax()
        return bool(low >= 0 and high < len(self.tensors[0]))

    @property
    def versions(self) -> list[int]:
        """Numbers that change where a tensor is written to by torch; not of tensors made in inference mode."""
        return [tensor._version for tensor in self.tensors]


class RowsOnGPU:
    """The copy of rows on a GPU.

    What torch writes to the rows is seen, and memory that numpy owns is copied anew for each pass; what numpy writes to
    memory of torch's (tensor.numpy()) is not seen.
    """

    def __init__(self, gpu: torch.device) -> None:
        self.gpu = gpu
        self._of: Rows | None = None  # what it is a copy of
        self._versions: list[int] = []  # and of which state
        self._copy: Rows | None = None

    def get(self, rows: Rows) -> Rows | None:
        """Return the copy of rows as they are now; None where there is no room for one, or rows can't be copied."""
        if self._copy is None or not self._is_current(rows):
            try:
                self._renew(rows)
            except RuntimeError:  # out of memory
                self._copy = None
            self._of = rows
        return self._copy

    def _is_current(self, rows: Rows) -> bool:
        assert self._of is not None
        kept, other = rows.kept, self._of.kept
        return (
            list(map(id, rows.tensors)) == list(map(id, self._of.tensors))
            and (kept is other or (kept is not None and other is not None and torch.equal(kept, other)))
            and rows.versions == self._versions
            and all(tensor.untyped_storage().resizable() for tensor in rows.tensors)
        )

    def _renew(self, rows: Rows) -> None:
        if self._copy is None or self._copy.shapes != rows.shapes or not rows.can_be_copied:
            self._copy = None  # its memory first
            nbytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in rows.shapes)
            if not rows.can_be_copied or nbytes > FREE_SHARE * torch.cuda.mem_get_info(self.gpu)[0]:
                return
            tensors = [torch.empty(shape, dtype=dtype, device=self.gpu) for shape, dtype in rows.shapes]
            self._copy = Rows(tensors, None, rows.collate, self.gpu)
        self._copy.collate, self._versions = rows.collate, rows.versions
        (num_rows, *_), _ = rows.shapes[0]
        step = max(1, num_rows * COPY_BYTES // max(1, sum(tensor.nbytes for tensor in self._copy.tensors)))
        for start in range(0, num_rows, step):
            stop = min(num_rows, start + step)
            are_all = rows.kept is None
            parts = [t[start:stop] for t in rows.tensors] if are_all else rows.take(torch.arange(start, stop))
            for tensor, part in zip(self._copy.tensors, parts, strict=True):
                tensor[start:stop].copy_(send(part, self.gpu))
