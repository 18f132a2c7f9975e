"""Copies of net, loss and optimizer to try things on, the first batches, and all else left as it was.

Sisters: data.py, net.py, trial.py.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from kerastorch.callbacks import CallbackList
from kerastorch.compiled import Compiled
from kerastorch.data import Batch, BatchSource
from kerastorch.device import leaves, map_nested
from kerastorch.lazy import lazy_copies
from kerastorch.progress import Progress
from kerastorch.run import Run

if TYPE_CHECKING:
    from kerastorch.model import Model


MAX_BATCHES, MAX_SECONDS, MAX_BYTES = 8, 5.0, 2**28  # drawn to look at; whichever is reached first ends it


def copied_run(model: Model, compiled: Compiled, batches: Sequence[Batch]) -> Run:
    """A Run in training that gives these batches to copies of net, loss and optimizer, which refer to each other."""
    memo = lazy_copies(model.net)
    net, loss = copy.deepcopy((model.net, compiled.loss), memo)
    optimizer: Optimizer = object.__new__(type(compiled.optimizer))
    for name, value in vars(compiled.optimizer).items():  # deepcopy of the whole would lose a subclass's attributes
        if name.endswith("_hooks"):
            setattr(optimizer, name, type(value)())  # hooks act on the world outside: an average of weights, say
        elif name != "step":  # schedulers put a counter there, bound to the original
            setattr(optimizer, name, copy.deepcopy(value, memo))
    for parameter in net.parameters():
        parameter.grad = None
    for group in optimizer.param_groups:
        if "initial_lr" in group:  # a scheduler's warm-up begins near 0
            group["lr"] = group["initial_lr"]
    copied = dataclasses.replace(
        compiled,
        loss=loss,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(model.device.type, enabled=compiled.mixed_precision == "fp16"),
        metrics={},
        weighted_metrics={},
        lr_scheduler=None,
        gradient_accumulation_steps=1,
        looked_at=set(),
    )
    loader = DataLoader(cast(Dataset[Batch], batches), batch_size=None, collate_fn=lambda batch: batch)
    source = BatchSource(loader, name="check()'s data")
    net.train()
    run = Run(net, model.device, copied, callbacks=CallbackList(None), progress=Progress(0), train_data=source)
    next(run.epoch_range())  # begins the one epoch
    return run


@contextmanager
def kept_as_it_was(net: nn.Module, data: object) -> Iterator[None]:
    """Put back what no copy protects: generators held by the data, gradients that a loss reaches by a closure."""
    put_back = list(_generator_setters(data, set()))
    gradients = [(parameter, parameter.grad) for parameter in net.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for set_state in put_back:
            set_state()


def _generator_setters(holder: object, seen: set[int]) -> Iterator[Callable[[], object]]:
    import numpy as np

    seen.add(id(holder))
    for part in getattr(holder, "__dict__", {}).values():
        if isinstance(part, torch.Generator):
            yield partial(part.set_state, part.get_state())
        elif isinstance(part, np.random.Generator):
            yield partial(setattr, part.bit_generator, "state", part.bit_generator.state)
        elif isinstance(part, random.Random):
            yield partial(part.setstate, part.getstate())
        elif isinstance(part, (Sampler, Dataset)) and id(part) not in seen:
            yield from _generator_setters(part, seen)


def draw(source: BatchSource) -> tuple[list[Batch], list[float]]:
    """The first batches, and the seconds that each took."""
    batches: list[Batch] = []
    seconds: list[float] = []
    size, start = 0, time.perf_counter()
    for batch, _ in source.one_pass():
        seconds.append(time.perf_counter() - start)
        # cloned: an iterable may fill the same buffer again
        batches.append(map_nested(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch))
        size += sum(leaf.nbytes for leaf in leaves(batch) if isinstance(leaf, Tensor))
        if len(batches) == MAX_BATCHES or sum(seconds) > MAX_SECONDS or size > MAX_BYTES:
            break
        start = time.perf_counter()
    return batches, seconds
