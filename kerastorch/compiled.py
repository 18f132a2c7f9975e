"""What compile() settled, and what eject needs to know of the last fit. A Run reads both; run.py is above."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kerastorch.losses import LossFunction
from kerastorch.metrics import AnyMetric

if TYPE_CHECKING:
    from kerastorch.callbacks import Callback

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Compiled:
    """What compile() settled; a Run reads it, the next compile() replaces it whole."""

    loss: LossFunction
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    metrics: dict[str, AnyMetric] = field(default_factory=dict)
    lr_scheduler: LRScheduler | str | None = None
    lr_scheduler_interval: str = "epoch"
    mixed_precision: str | None = None
    gradient_accumulation_steps: int = 1
    cuts_batches: bool = False  # where memory is too small
    num_parts: int = 1  # what a batch is cut into
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    weighted_metrics: dict[str, AnyMetric] = field(default_factory=dict)
    unpack: Callable[[Any], Any] | None = None
    jit_compile: bool | Mapping[str, Any] = False
    channels_last: bool = False
    param_groups: list[dict[str, Any]] = field(default_factory=list)  # their options before any scheduler changed them
    looked_at: set[tuple[object, ...]] = field(default_factory=set)  # kinds of batches that passed the first look


@dataclass
class LastFit:
    """What eject needs to know of the last fit; as it is before the first.

    kind, target_kind: "tensor", "tuple" or "dict" of tensors, "none" or "other", by the first batch.
    target: shape of a sample's target and its dtype, where it is one tensor.   epochs: asked for, a final index.
    validated: None where that is open.   has_length: whether the number of batches is known.
    is_tuple: whether a batch without target is (x,), not x.   rows: of the arrays given to train on; None where they
    were a Dataset or a loader.   val_rows: likewise.   is_split: whether those are the last rows of the same arrays.
    sample_weights, unpacks, batch_sizes: of training and validation.   inferred: {metric: what it was inferred from}.
    """

    callbacks: list[Callback] = field(default_factory=list)
    class_weight: Mapping[int, float] | None = None
    kind: str = "tensor"
    target_kind: str = "tensor"
    target: tuple[tuple[int, ...], torch.dtype] | None = None
    epochs: int | None = None
    initial_epoch: int = 0
    validated: bool | None = None
    has_length: bool = True
    is_tuple: bool = True
    rows: int | None = 0
    val_rows: int | None = 0
    is_split: bool = False
    shuffle: bool = True
    validation_freq: int | Collection[int] = 1
    steps_per_epoch: int | None = None
    validation_steps: int | None = None
    batch_sizes: tuple[int | None, int | None] = (None, None)
    sample_weights: tuple[bool, bool] = (False, False)
    unpacks: tuple[bool, bool] = (False, False)
    inferred: dict[str, list[Any]] = field(default_factory=dict)
