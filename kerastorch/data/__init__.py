"""Data in any form, turned into one stream of batches (x, y, sample_weight) on the CPU, and outputs joined again.

From below: arrays.py makes tensors and datasets, weights.py adds weights, dataset.py reads what the verbs are given,
source.py gives batches, pass after pass; predictions.py joins outputs.
"""

from kerastorch.data.arrays import is_map_style, to_tensors
from kerastorch.data.dataset import make_dataset, needs_unpack, split_dataset
from kerastorch.data.predictions import Predictions, to_numpy
from kerastorch.data.source import Batch, BatchSource, make_source, warn_if_shuffled
from kerastorch.data.weights import ClassWeight

__all__ = [
    "Batch",
    "BatchSource",
    "ClassWeight",
    "Predictions",
    "is_map_style",
    "make_dataset",
    "make_source",
    "needs_unpack",
    "split_dataset",
    "to_numpy",
    "to_tensors",
    "warn_if_shuffled",
]
