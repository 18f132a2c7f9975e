"""What one call of fit, evaluate or predict reads and writes, and the work that no textbook loop shows.

The loops in loops/ hold the training recipe; Run moves data, counts, keeps sums, fires hooks and draws the bar.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from kerastorch.data import BatchSource
from kerastorch.device import Nested, describe, map_nested, move_to_device, num_samples
from kerastorch.history import History, LogValue
from kerastorch.losses import Loss, LossFunction
from kerastorch.metrics import AnyMetric, PassSums, known_logs
from kerastorch.progress import Progress

if TYPE_CHECKING:
    from kerastorch.callbacks import CallbackList

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
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None


class RunningLogs(Mapping[str, LogValue]):
    """The running averages that batch hooks get; they are read from the device when first looked at (a sync)."""

    def __init__(self, sums: PassSums) -> None:
        self._sums = sums
        self._values: dict[str, LogValue] | None = None

    def _read(self) -> dict[str, LogValue]:
        if self._values is None:
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


class Run:
    """One call of fit, evaluate or predict.

    net, loss_fn, optimizer, scaler, lr_scheduler: what the loop works with; loss_fn takes (outputs, y, sample_weight).
    forward: calls net with x as it came: net(x) for a tensor (then it is net itself), net(*x), net(**x).
    epoch, batch: indices from 0.   step: optimizer updates since fit began.   num_samples: rows in this batch.
    step_is_due: whether this batch ends an accumulation window.   stop_training: set it to end fit after this batch.
    history: the finished epochs.   val_logs: the last evaluation's logs, without "val_".
    """

    loss_fn: Loss
    optimizer: Optimizer
    scaler: torch.amp.GradScaler

    def __init__(
        self,
        net: nn.Module,
        device: torch.device,
        compiled: Compiled | None,
        *,
        callbacks: CallbackList,
        progress: Progress,
        train_data: BatchSource | None = None,
        val_data: BatchSource | None = None,
        epochs: int = 1,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_freq: int | Collection[int] = 1,
        history: History | None = None,
        logs_are_known: bool = False,
    ) -> None:
        self.net, self.device = net, device
        self.callbacks, self.progress = callbacks, progress
        self.train_data, self.val_data = train_data, val_data
        self.epochs, self.initial_epoch, self.steps_per_epoch = epochs, initial_epoch, steps_per_epoch
        self.validation_steps, self.validation_freq = validation_steps, validation_freq
        self.history = history if history is not None else History()
        self.logs_are_known = logs_are_known  # whether log_names lists all that can ever be monitored

        self.mixed_precision: str | None = None
        self.lr_scheduler: LRScheduler | None = None
        if compiled is not None:
            self.loss_fn = Loss(compiled.loss, on_first_batch=self._look_at_first_batch)
            self.optimizer, self.scaler = compiled.optimizer, compiled.scaler
            self.lr_scheduler_interval = compiled.lr_scheduler_interval
            self.mixed_precision = compiled.mixed_precision
            self.gradient_accumulation_steps = compiled.gradient_accumulation_steps
            self.clip_grad_norm, self.clip_grad_value = compiled.clip_grad_norm, compiled.clip_grad_value
            self.train_sums = PassSums(compiled.metrics, device)
            self.val_sums = PassSums(compiled.metrics, device)
            self.sums = self.train_sums
            self.higher_is_better = known_logs(compiled.metrics)

        self.epoch = self.initial_epoch
        self.batch = self.step = self.num_samples = 0
        self.step_is_due = True
        self.stop_training = False
        self.val_logs: dict[str, LogValue] = {}
        self.forward: Callable[..., Any] = net
        self._forward_tuple = lambda x: net(*x)
        self._forward_dict = lambda x: net(**x)
        self._epoch_logs: dict[str, LogValue] | None = None
        self._window: list[int] = []  # samples of each batch since the last optimizer step
        self._predictions: list[Nested] = []

    def check_readable(self) -> None:
        """Raise ValueError where data that can be read only once would be needed again."""
        passes = self.epochs - self.initial_epoch
        if self.train_data is not None and self.train_data.is_one_shot and self.steps_per_epoch is None and passes > 1:
            raise ValueError(
                f"{self.train_data.name} is an iterator, which can be read once, but {passes} epochs were asked for: "
                "give a DataLoader, a list or another object that can be iterated anew, or steps_per_epoch."
            )
        if self.val_data is not None and self.val_data.is_one_shot:
            freq = self.validation_freq
            due = [e for e in range(self.initial_epoch + 1, self.epochs + 1) if _is_due(e, freq)]
            if len(due) > 1:
                raise ValueError(
                    f"{self.val_data.name} is an iterator, which can be read once, but {len(due)} epochs validate: "
                    "give an object that can be iterated anew."
                )

    # ---- epochs ----

    def epoch_range(self) -> Iterator[int]:
        """Yield the index of each epoch to train; fires the train and epoch hooks, ends early when told to stop."""
        self.optimizer.zero_grad()  # an earlier fit may have been cut between backward and step
        self.callbacks.on_train_begin({})
        logs: dict[str, LogValue] = {}
        for epoch in range(self.initial_epoch, self.epochs):
            if self.stop_training:
                break
            self.epoch, self.batch = epoch, -1
            self.val_logs, self._epoch_logs = {}, None
            self.train_sums.reset()
            self.progress.begin(f"Epoch {epoch + 1}/{self.epochs}", self.num_batches)
            self.callbacks.on_epoch_begin(epoch, {})
            yield epoch
            logs = self.epoch_logs()
            self.callbacks.on_epoch_end(epoch, logs)
            self.history.append(epoch, logs)
            self.progress.end(logs)
        self.callbacks.on_train_end(logs)

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch, or None where that is not known."""
        assert self.train_data is not None
        return self.steps_per_epoch or self.train_data.num_batches

    @property
    def validation_is_due(self) -> bool:
        """Whether this epoch ends with a validation pass."""
        return self.val_data is not None and _is_due(self.epoch + 1, self.validation_freq)

    @property
    def num_eval_batches(self) -> int | None:
        """Batches in an evaluation or prediction pass, or None where that is not known."""
        assert self.val_data is not None
        return self.validation_steps or self.val_data.num_batches

    def epoch_logs(self) -> dict[str, LogValue]:
        """Return this epoch's logs so far, validation under "val_" (a sync, the first time in an epoch)."""
        if self._epoch_logs is None:
            self._epoch_logs = self.train_sums.compute()
            self._epoch_logs |= {f"val_{name}": value for name, value in self.val_logs.items()}
        return self._epoch_logs

    @property
    def log_names(self) -> list[str]:
        """The names that the logs of an epoch hold, metrics that name their own results left out."""
        names = list(self.higher_is_better)
        return names + [f"val_{name}" for name in names] if self.val_data is not None else names

    # ---- training batches ----

    def train_batches(self) -> Iterator[tuple[Nested, Nested, Tensor | None]]:
        """Yield (x, y, sample_weight) on the device for each batch of an epoch; fires the train-batch hooks.

        After the loop's body it counts the step, draws the bar and, told to stop, ends the epoch on an optimizer step.
        """
        assert self.train_data is not None
        callbacks, sums, k = self.callbacks, self.train_sums, self.gradient_accumulation_steps
        self.sums = sums
        self._window = []
        for (x, y, sample_weight), is_last in self.train_data.epoch(self.steps_per_epoch, look_ahead=k > 1):
            self.batch += 1
            x, y, sample_weight = self._begin_batch(x, y, sample_weight)
            self._window.append(self.num_samples)
            self.step_is_due = is_last or len(self._window) == k
            if callbacks.has_train_batch_begin:
                callbacks.on_train_batch_begin(self.batch, {})
            yield x, y, sample_weight
            if self.step_is_due:
                self.step += 1
                self._window = []
            if callbacks.has_train_batch_end:
                callbacks.on_train_batch_end(self.batch, RunningLogs(sums))
            self.progress.update(self.batch + 1, sums.running)
            if self.stop_training and self.step_is_due:
                break

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast of compile(mixed_precision=...), or a context that does nothing."""
        if self.mixed_precision is None:
            return _NO_AUTOCAST
        return torch.autocast(self.device.type, AUTOCAST_DTYPES[self.mixed_precision])

    def share(self, loss: Tensor) -> Tensor:
        """Return this batch's share of its window's loss; without accumulation the loss itself.

        loss * n / (k * b) for n samples now, b in the window's first batch, k batches a window: loss / k where n is b.
        prepare_gradients() makes a short or uneven window exact.
        """
        k = self.gradient_accumulation_steps
        if k == 1:
            return loss
        n, b = self._window[-1], self._window[0]
        return loss / k if n == b else loss * n / (k * b)

    def prepare_gradients(self) -> None:
        """Make the gradients those of the mean loss of the window's samples, and clip them as compile() was told.

        Unscales fp16 gradients where they are clipped. No sync.
        """
        n, kb = sum(self._window), self.gradient_accumulation_steps * self._window[0]
        clips = self.clip_grad_norm is not None or self.clip_grad_value is not None
        if n == kb and not clips:
            return
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if clips:
            self.scaler.unscale_(self.optimizer)
        if n != kb:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(kb / n)
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        if self.clip_grad_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_grad_value)

    def advance_lr_scheduler(self, interval: Literal["epoch", "step"]) -> None:
        """Step the scheduler of compile() where it steps by this interval; "step" counts optimizer updates.

        ReduceLROnPlateau is given val_loss, or loss in an epoch without validation.
        """
        if self.lr_scheduler is None or interval != self.lr_scheduler_interval:
            return
        if interval == "step" and not self.step_is_due:
            return
        if isinstance(self.lr_scheduler, ReduceLROnPlateau):
            logs = self.epoch_logs()
            self.lr_scheduler.step(cast(float, logs.get("val_loss", logs["loss"])))
        else:
            self.lr_scheduler.step()

    def record(self, loss: Tensor, outputs: Nested, y: Nested, sample_weight: Tensor | None = None) -> None:
        """Add this batch to the sums of the running pass. They stay on the device: no sync."""
        outputs = map_nested(_detach, outputs) if self.sums.metrics else None
        self.sums.update(loss.detach(), outputs, y, self.num_samples)

    # ---- evaluation and prediction ----

    def eval_batches(self) -> Iterator[tuple[Nested, Nested, Tensor | None]]:
        """Yield (x, y, sample_weight) on the device for each validation batch; fires the test hooks."""
        assert self.val_data is not None
        callbacks, sums = self.callbacks, self.val_sums
        self.sums = sums
        sums.reset()
        callbacks.on_test_begin({})
        for batch, ((x, y, sample_weight), _) in enumerate(self.val_data.one_pass(self.validation_steps)):
            x, y, sample_weight = self._begin_batch(x, y, sample_weight)
            if callbacks.has_test_batch_begin:
                callbacks.on_test_batch_begin(batch, {})
            yield x, y, sample_weight
            if callbacks.has_test_batch_end:
                callbacks.on_test_batch_end(batch, RunningLogs(sums))
            if self.train_data is None:
                self.progress.update(batch + 1, sums.running)
        self.val_logs = sums.compute()
        callbacks.on_test_end(self.val_logs)

    def predict_batches(self) -> Iterator[Nested]:
        """Yield x on the device for each batch, targets left out; fires the predict hooks."""
        assert self.val_data is not None
        callbacks = self.callbacks
        callbacks.on_predict_begin({})
        for batch, ((x, _, _), _) in enumerate(self.val_data.one_pass(self.validation_steps)):
            x, _, _ = self._begin_batch(x, None, None)
            if callbacks.has_predict_batch_begin:
                callbacks.on_predict_batch_begin(batch, {})
            yield x
            if callbacks.has_predict_batch_end:
                callbacks.on_predict_batch_end(batch, {"outputs": self._predictions[-1]})
            self.progress.update(batch + 1, dict)
        callbacks.on_predict_end({})

    def collect(self, outputs: Nested) -> None:
        """Keep a batch of predictions, on the CPU as numpy arrays; bfloat16 becomes float32."""
        self._predictions.append(map_nested(_to_numpy, outputs))

    def predictions(self) -> Nested:
        """Return all that was collected, joined on the first axis, nested as the outputs are."""
        return _join(self._predictions)

    def _begin_batch(self, x: Nested, y: Nested, sample_weight: Tensor | None) -> tuple[Nested, Nested, Tensor | None]:
        x, y = move_to_device(x, self.device), move_to_device(y, self.device)
        if sample_weight is not None:
            sample_weight = move_to_device(sample_weight, self.device)
        self.num_samples = num_samples(x)
        if isinstance(x, Tensor):
            self.forward = self.net
        elif isinstance(x, dict):
            self.forward = self._forward_dict
        else:
            self.forward = self._forward_tuple if isinstance(x, (tuple, list)) else self.net
        return x, y, sample_weight

    def _look_at_first_batch(self, outputs: Nested, y: Nested) -> None:
        if y is None:
            raise ValueError(
                "the batches hold no targets, but the loss needs them: give fit(x, y), or batches (x, y). "
                "Two inputs without a target are ((a, b),)."
            )
        self.sums.infer(map_nested(_detach, outputs), y)


def _is_due(epoch: int, freq: int | Collection[int]) -> bool:
    return epoch % freq == 0 if isinstance(freq, int) else epoch in freq


_NO_AUTOCAST: AbstractContextManager[None] = nullcontext()


def _detach(output: Any) -> Any:
    if not isinstance(output, Tensor):
        return output
    return output.detach().float() if output.dtype in (torch.bfloat16, torch.float16) else output.detach()


def _to_numpy(output: Any) -> Any:
    if not isinstance(output, Tensor):
        return output
    output = output.detach()
    return (output.float() if output.dtype == torch.bfloat16 else output).cpu().numpy()


def _join(parts: list[Nested]) -> Nested:
    import numpy as np

    first = parts[0]
    if isinstance(first, Mapping):
        return {key: _join([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_join(list(column)) for column in zip(*parts, strict=True)))
    if isinstance(first, (tuple, list)):
        return type(first)(_join(list(column)) for column in zip(*parts, strict=True))
    if not isinstance(first, np.ndarray) or first.ndim == 0:
        raise ValueError(f"predict() joins outputs on their first, batch axis, but forward returned {describe(first)}.")
    return np.concatenate(parts)
