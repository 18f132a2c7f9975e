"""The numbers of one pass over the data: loss, metrics and what steps log, summed on the device without a sync.

Sisters: metrics.py below, run.py above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kerastorch.device import Nested, move_to_device, pick_output
from kerastorch.metrics import (
    MAX_ELEMENTS,
    AnyMetric,
    LogValue,
    MeanMetric,
    NamedMetric,
    OutputMetric,
    is_collection,
    takes_batches_together,
)

MAX_COLLECTED, MAX_COLLECTED_BYTES = 32, 16 * 2**20


class PassSums:
    """The sample-weighted loss and the metrics of one pass over the data; sums stay on the device until read.

    Adding to a sum can cost as much as a small net's step, so losses, outputs and targets are collected and added many
    batches at once, to metrics that do not mind: at batches 1, 2, 4, 8, 16, every 32nd one, and at MAX_COLLECTED_BYTES.
    A clock has no say in it, so that numbers are the same in every run.

    metrics: see make_metrics; cloned.   weighted_metrics: likewise, given the sample weights too.
    """

    def __init__(
        self,
        metrics: Mapping[str, AnyMetric],
        device: torch.device,
        weighted_metrics: Mapping[str, AnyMetric] | None = None,
    ) -> None:
        self.metrics = {name: metric.clone().to(device) for name, metric in metrics.items()}
        self.weighted_metrics = {name: metric.clone().to(device) for name, metric in (weighted_metrics or {}).items()}
        self.all_metrics = {**self.metrics, **self.weighted_metrics}
        collecting = {name for name, metric in self.all_metrics.items() if takes_batches_together(metric)}
        self._eager = [metric for name, metric in self.metrics.items() if name not in collecting]
        self._eager_weighted = [metric for name, metric in self.weighted_metrics.items() if name not in collecting]
        self._collecting = [metric for name, metric in self.metrics.items() if name in collecting]
        self._collecting_weighted = [metric for name, metric in self.weighted_metrics.items() if name in collecting]
        self._collects = bool(collecting)
        self.clones_targets = False  # whether what they come from may reuse their memory
        self._collected: list[tuple[Tensor, Tensor, Nested]] = []
        self._collected_bytes = 0
        self._losses: list[Tensor] = []  # of batches of one size
        self._size = 0
        self._shapes: tuple[Any, ...] = ()  # of the last batch collected
        self._batch_bytes = 0
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._loss_sum = torch.zeros((), dtype=dtype, device=device)
        self._part_sums: dict[str, Tensor] = {}
        self._logged: dict[str, list[Any]] = {}  # name -> [sum, samples]
        self._num_samples = self._num_batches = 0
        self._num_added = 0  # samples whose loss is in the sum

    @property
    def takes_batches_together(self) -> bool:
        """Whether several batches may be added as one: whether no metric minds."""
        return not self._eager and not self._eager_weighted

    @property
    def inferred_from(self) -> dict[str, list[Any]]:
        """Shapes and dtypes of outputs and targets that each metric given by name was inferred from."""
        return {
            name: metric.inferred_from
            for name, metric in self.all_metrics.items()
            if isinstance(metric, NamedMetric) and metric.inferred_from
        }

    def reset(self) -> None:
        """Start a new pass."""
        self._loss_sum.zero_()
        self._part_sums = {}
        self._logged = {}
        self._num_samples = self._num_batches = self._num_added = 0
        self._collected, self._collected_bytes, self._losses = [], 0, []
        for metric in self.all_metrics.values():
            metric.reset()

    def infer(self, outputs: Nested, y: Nested) -> None:
        """Settle the metrics given by name from a first batch; ValueError where that would be a guess."""
        for metric in self.all_metrics.values():
            part = (outputs, y)
            if isinstance(metric, OutputMetric):
                part = (pick_output(outputs, metric.key, "the outputs"), pick_output(y, metric.key, "the targets"))
                metric = metric.metric
            if isinstance(metric, NamedMetric) and metric.metric is None:
                metric.infer(*part)

    def update(
        self,
        loss: Tensor,
        outputs: Nested,
        y: Nested,
        num_samples: int,
        sample_weight: Nested = None,
        parts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a batch. No sync: loss, outputs and parts (detached; the losses by output) stay on the device."""
        if num_samples != self._size:
            self._add_losses()
            self._size = num_samples
        self._losses.append(loss)
        self._num_samples += num_samples
        self._num_batches += 1
        for name, part in (parts or {}).items():
            if name not in self._part_sums:
                self._part_sums[name] = torch.zeros_like(self._loss_sum)
            self._part_sums[name].add_(part, alpha=num_samples)
        for metric in self._eager:
            metric.update(outputs, y)
        for metric in self._eager_weighted:
            metric.update(outputs, y, sample_weight)
        if self._collects:
            self._collect(outputs, y, sample_weight)
        n = self._num_batches
        if n % MAX_COLLECTED == 0 or n in (1, 2, 4, 8, 16) or self._collected_bytes > MAX_COLLECTED_BYTES:
            self.flush()

    def _collect(self, outputs: Nested, y: Nested, sample_weight: Nested) -> None:
        if not (isinstance(outputs, Tensor) and isinstance(y, Tensor) and outputs.dim() and y.dim()):
            self._update_together()
            self._update_collecting(outputs, y, sample_weight)
            return
        if not self._collecting_weighted:
            sample_weight = None
        if self.clones_targets:
            y, sample_weight = y.clone(), None if sample_weight is None else sample_weight.clone()
        if self.clones_targets or outputs.untyped_storage().nbytes() != outputs.nbytes:
            outputs = outputs.clone()  # it may be the inputs, or a part of what is larger, or of a parameter
        shapes = (outputs.shape, y.shape, None if sample_weight is None else sample_weight.shape)
        if shapes != self._shapes:
            if self._collected and not _can_be_joined(self._collected[-1], (outputs, y, sample_weight)):
                self._update_together()
            self._shapes, self._batch_bytes = (
                shapes,
                sum(t.nbytes for t in (outputs, y, sample_weight) if t is not None),
            )
        self._collected.append((outputs, y, sample_weight))
        self._collected_bytes += self._batch_bytes

    def flush(self) -> None:
        """Add what was collected. No sync."""
        self._add_losses()
        self._update_together()

    def _add_losses(self) -> None:
        if self._losses:
            losses, self._losses = self._losses, []
            total = losses[0] if len(losses) == 1 else torch.stack(losses).sum(dtype=self._loss_sum.dtype)
            self._loss_sum.add_(total, alpha=self._size)
            self._num_added += self._size * len(losses)

    def _update_together(self) -> None:
        if not self._collected:
            return
        batches, self._collected, self._collected_bytes = self._collected, [], 0
        if len(batches) == 1:
            self._update_collecting(*batches[0])
            return
        outputs, y, weights = zip(*batches, strict=True)
        weight = None if weights[0] is None else torch.cat(weights)
        self._update_collecting(torch.cat(outputs), torch.cat(y), weight)

    def _update_collecting(self, outputs: Nested, y: Nested, sample_weight: Nested) -> None:
        for metric in self._collecting:
            metric.update(outputs, y)
        for metric in self._collecting_weighted:
            metric.update(outputs, y, sample_weight)

    def log(self, name: str, value: Tensor | float, num_samples: int) -> None:
        """Add a scalar of a batch to the mean, over samples, of those logged under this name. No sync."""
        try:
            tensor = torch.as_tensor(value).detach()
        except (TypeError, ValueError, RuntimeError):
            tensor = torch.zeros(0)
        if tensor.numel() != 1 or tensor.is_complex():
            what = f"shape {tuple(tensor.shape)}" if hasattr(value, "shape") or isinstance(value, list) else repr(value)
            raise ValueError(f"log({name}=...) takes one number, got {what}: log its mean.")
        if name == "loss" or name in self.all_metrics or name in self._part_sums:
            raise ValueError(f"log({name}=...): the logs have a {name!r} already; log it under another name.")
        logged = self._logged.setdefault(name, [torch.zeros_like(self._loss_sum), 0])
        logged[0].add_(tensor.reshape(()), alpha=num_samples)  # a number's own tensor is on the CPU: no copy, no sync
        logged[1] += num_samples

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, the states of the metrics by name; tensors are the live ones."""
        self.flush()
        return {
            "loss": self._loss_sum,
            "num_samples": self._num_samples,
            "num_batches": self._num_batches,
            "parts": dict(self._part_sums),
            "logged": {name: list(pair) for name, pair in self._logged.items()},
            "metrics": {name: _get_state(metric) for name, metric in self.all_metrics.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what state_dict() returned; a metric that it does not know starts empty."""
        self._loss_sum.copy_(state["loss"])
        self._num_samples = self._num_added = state["num_samples"]
        self._num_batches = state["num_batches"]
        device = self._loss_sum.device
        self._part_sums = {name: part.to(device) for name, part in state["parts"].items()}
        self._logged = {name: [total.to(device), samples] for name, (total, samples) in state.get("logged", {}).items()}
        for name, metric in self.all_metrics.items():
            if state["metrics"].get(name) is not None:
                _set_state(metric, state["metrics"][name], device)

    def compute(self) -> dict[str, LogValue]:
        """Return {"loss": ..., metric: ...} as python numbers (a sync); empty where nothing was added.

        The losses by output come last.
        """
        self.flush()
        return self._read(self.all_metrics)

    def running(self) -> dict[str, LogValue]:
        """Return the loss, and the metrics that are cheap to read in mid-pass as they were last updated (a sync)."""
        return self._read({name: metric for name, metric in self.all_metrics.items() if _is_cheap(metric)})

    def _read(self, metrics: Mapping[str, AnyMetric]) -> dict[str, LogValue]:
        if self._num_samples == 0:
            return {}
        logs: dict[str, LogValue] = {"loss": self._loss_sum.item() / self._num_added}
        for name, metric in metrics.items():
            value = metric.compute()
            for key, part in value.items() if isinstance(value, Mapping) else [(name, value)]:
                logs[key] = _to_number(part)
        logs |= {name: part.item() / self._num_samples for name, part in self._part_sums.items()}
        return logs | {name: total.item() / samples for name, (total, samples) in self._logged.items()}


def _can_be_joined(batch: tuple[Tensor, Tensor, Nested], other: tuple[Tensor, Tensor, Nested]) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or a.shape[1:] == b.shape[1:])
        for a, b in zip(batch, other, strict=True)
    )


def _get_state(metric: AnyMetric) -> Any:
    if isinstance(metric, OutputMetric):
        return _get_state(metric.metric)
    if isinstance(metric, NamedMetric):
        if metric.metric is None:
            return None
        return {"inferred_from": metric.inferred_from, "metric": _get_state(metric.metric)}
    if isinstance(metric, MeanMetric):
        return {"sum": metric.sum, "count": metric.count}
    parts = {path: part for path, part in metric.named_modules() if hasattr(part, "update_count")}
    return {path: {"updates": part.update_count, **part.metric_state} for path, part in parts.items()}


def _set_state(metric: AnyMetric, state: Mapping[str, Any], device: torch.device) -> None:
    if isinstance(metric, OutputMetric):
        _set_state(metric.metric, state, device)
    elif isinstance(metric, NamedMetric):
        shape, dtype, y_shape, y_dtype = state["inferred_from"]
        if max(math.prod(shape), math.prod(y_shape)) > MAX_ELEMENTS:
            raise ValueError(f"a sample can't have outputs of shape {shape} or targets of shape {y_shape}.")
        outputs, y = (
            torch.zeros((), dtype=d, device=device).expand(s) for s, d in ((shape, dtype), (y_shape, y_dtype))
        )
        metric.infer(outputs, y)
        _set_state(metric.metric, state["metric"], device)
    elif isinstance(metric, MeanMetric):
        metric.sum, metric.count = (torch.as_tensor(state[name]).to(device) for name in ("sum", "count"))
    else:
        for path, part in metric.named_modules():
            if path in state:
                part._update_count = int(
                    state[path]["updates"]
                )  # without which compute() warns; nothing public sets it
                for name in part.metric_state:
                    setattr(part, name, move_to_device(state[path][name], device))


def _is_cheap(metric: AnyMetric) -> bool:
    while isinstance(metric, (NamedMetric, OutputMetric)):
        metric = metric.metric
    if isinstance(metric, MeanMetric):
        return True
    if is_collection(metric):
        return all(map(_is_cheap, metric.values()))
    state = getattr(metric, "metric_state", None)
    is_list = not isinstance(state, Mapping) or any(isinstance(part, list) for part in state.values())
    return not is_list and type(metric).__name__ != "R2Score"  # which fails on a single sample


def _to_number(value: object) -> LogValue:
    tensor = torch.as_tensor(value)
    return float(tensor) if tensor.numel() == 1 else tensor.tolist()


class RunningLogs(Mapping[str, LogValue]):
    """The running averages that batch hooks get; they are read from the device when first looked at (a sync)."""

    def __init__(self, sums: PassSums) -> None:
        self._sums = sums
        self._values: dict[str, LogValue] | None = None

    def _read(self) -> dict[str, LogValue]:
        if self._values is None:
            self._sums.flush()
            self._values = self._sums.running()
        return self._values

    def __getitem__(self, name: str) -> LogValue:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(self._read())
