"""Data in any form, turned into one stream of batches (x, y, sample_weight) on the CPU.

arrays.py makes datasets of arrays, source.py reads batches from loaders, datasets and iterables, pass after pass.
"""

from kerastorch.data.arrays import make_dataset, split_dataset, to_tensors
from kerastorch.data.source import Batch, BatchSource, make_source, warn_if_shuffled

__all__ = ["Batch", "BatchSource", "make_dataset", "make_source", "split_dataset", "to_tensors", "warn_if_shuffled"]
