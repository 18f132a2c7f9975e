"""Sample weights beside any data, and class weights turned into sample weights on the device.

Sisters: arrays.py, source.py, predictions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from kerastorch.data.arrays import is_map_style, num_rows, rebuild_loader, to_tensors
from kerastorch.device import Nested, describe
from kerastorch.losses import OutputLosses, loss_scale


class WeightedBatch(NamedTuple):
    """A batch as its loader gives it, and a weight for each of its samples."""

    batch: Any
    sample_weight: Tensor


class WeightedDataset(Dataset[Any]):
    """Item i of a dataset with weight i."""

    def __init__(self, dataset: Dataset[Any], sample_weight: Tensor) -> None:
        self.dataset, self.sample_weight = dataset, sample_weight

    def __len__(self) -> int:
        return len(self.sample_weight)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.dataset[index], self.sample_weight[index]


class WeightedCollate:
    """Collates items as the loader does, weights beside them; a class, so that workers can pickle it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, pairs: list[tuple[Any, Tensor]]) -> WeightedBatch:
        return WeightedBatch(self.collate([item for item, _ in pairs]), torch.stack([weight for _, weight in pairs]))


def add_sample_weight(data: Any, sample_weight: Any, *, caller: str) -> Any:
    """Return a Dataset or a plain DataLoader of the same rows in the same order, each with its weight.

    sample_weight: (N,) for the N rows.   Raises ValueError for another length, or for data without rows to count.
    """
    dataset = data.dataset if isinstance(data, DataLoader) else data
    is_sequence = isinstance(data, DataLoader) and isinstance(dataset, (list, tuple))  # a loader takes these too
    if not is_sequence and not is_map_style(dataset):
        raise ValueError(
            f"{caller}(sample_weight=...) can't be matched with a {type(dataset).__name__}, which has no rows to "
            "count: give the weights in the batch, as (x, y, sample_weight)."
        )
    weights = to_tensors(sample_weight)
    rows = num_rows(dataset, what=f"{caller}(sample_weight=...)")
    if not isinstance(weights, Tensor) or weights.shape != (rows,):
        raise ValueError(
            f"{caller}() got {rows} samples in x but {describe(weights)} as sample_weight: it takes shape ({rows},)."
        )
    weighted = WeightedDataset(dataset, weights)
    if not isinstance(data, DataLoader):
        return weighted
    collate = WeightedCollate(data.collate_fn)
    return rebuild_loader(data, weighted, collate_fn=collate, batch_sampler=data.batch_sampler)


def is_weighted(dataset: object) -> bool:
    """Whether a dataset gives rows with weights, which WeightedCollate puts together."""
    return isinstance(dataset.dataset if isinstance(dataset, Subset) else dataset, WeightedDataset)


class ClassWeight:
    """Gives each sample the weight of its class, times its own.

    weights: {class index: weight}; 1 where missing.   y: class indices, one-hot rows, or 0 and 1 of one binary output.
    Raises ValueError for keys that are no indices, and for several outputs or labels, where a class is not one thing.
    """

    def __init__(self, weights: Mapping[int, float], loss: object, device: torch.device) -> None:
        if not weights or not all(isinstance(key, Integral) and int(key) >= 0 for key in weights):
            raise ValueError(f"class_weight takes {{class index from 0: weight}}, got {dict(weights)!r}.")
        if isinstance(loss, OutputLosses):
            raise ValueError("class_weight works with one output; give sample_weight for several.")
        if loss_scale(loss) == "values":
            raise ValueError("class_weight needs classes, but the loss is one for regression; give sample_weight.")
        table = [float(weights.get(index, 1.0)) for index in range(max(weights) + 1)]
        self._table = torch.tensor([*table, 1.0], device=device)
        self._is_one_of_many = loss_scale(loss) != "label_logits" and loss_scale(loss) != "probabilities"

    def __call__(self, y: Nested, sample_weight: Tensor | None) -> Tensor:
        if not isinstance(y, Tensor):
            raise ValueError(f"class_weight needs one tensor of targets, got {describe(y)}.")
        has_labels = y.is_floating_point() and y.dim() > 1 and y.shape[1] > 1
        if has_labels and not self._is_one_of_many and y.dim() == 3:
            has_labels = False  # yes or no for each pixel or step
        if has_labels:
            if not self._is_one_of_many:
                raise ValueError(
                    f"class_weight needs one class a sample, but targets are {describe(y)}: several labels."
                )
            y = y.argmax(1)
        indices = (y.round() if y.is_floating_point() else y).long()
        weights = self._table[indices.clamp(0, len(self._table) - 1)]
        if weights.dim() > 1 and weights.shape[1:].numel() == 1:
            weights = weights.flatten()
        if sample_weight is None:
            return weights
        return weights * sample_weight.reshape(-1, *[1] * (weights.dim() - 1))
