"""TerminateOnNaN: ends fit when the loss is NaN or infinite, and says where that began."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kerastorch.callbacks.callback import Callback, Logs
from kerastorch.device import leaves
from kerastorch.progress import REFRESH_SECONDS


class TerminateOnNaN(Callback):
    """Stop when a training batch's loss is NaN or infinite; a printed line says where that began.

    raise_error: raise RuntimeError with that line instead, after a gradient that is not finite too.
    The line has epoch, batch and optimizer step, from 1, and what was not finite first: the batch's inputs, its loss,
    or the gradient of the named parameter (the last such in the net, the nearest to the loss).
    Without raise_error a bad gradient stops fit at the bad loss that follows, at the latest when the epoch ends.
    Not looked at are sparse gradients, and all gradients under fp16, whose scaler skips the step where one is bad.
    On the CPU every batch is read; elsewhere ten times a second and when an epoch ends, so the stop may come later.
    Its state begins anew with each fit.   Source: keras.callbacks.TerminateOnNaN.
    """

    def __init__(self, raise_error: bool = False) -> None:
        self.raise_error = raise_error
        self._hook: RemovableHandle | None = None

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self._zeros = torch.zeros(1, device=self.run.device)
        self._gradients: tuple[list[nn.Parameter], Tensor] = ([], self._zeros)
        self._unread: list[_Batch] = []
        self._reads_each_batch = self.run.device.type == "cpu"  # where it costs nothing: no stop depends on the clock
        self._next_read = time.monotonic() + REFRESH_SECONDS
        self._message: str | None = None
        self._has_stopped = False
        if not self.run.scaler.is_enabled():  # a hook, since gradients are zeroed before the batch ends
            self._hook = self.run.optimizer.register_step_pre_hook(self._look_at_gradients)

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        super().on_train_batch_begin(batch, logs)
        tensors = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves(self.run.x)]
        tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor) and _has_peak(tensor)]
        self._input_peak = _peaks(tensors or [self._zeros]).amax()  # now, since forward may write into its inputs

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        super().on_train_batch_end(batch, logs)
        run, (parameters, gradient_peaks) = self.run, self._gradients
        self._gradients = ([], self._zeros)
        assert run.loss is not None
        values = torch.stack((run.loss.to(run.device), self._input_peak, gradient_peaks.amax()))
        step = run.step if run.step_is_due else run.step + 1  # the update that this batch counts into, from 1
        self._unread.append(_Batch(batch + 1, step, parameters, gradient_peaks, values))
        is_last = batch + 1 == run.num_batches  # read then, so that an error comes before any checkpoint is written
        if is_last or self._reads_each_batch or time.monotonic() >= self._next_read:
            self._read(ends_epoch=is_last)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self._read(ends_epoch=True)

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook, self._gradients, self._unread = None, ([], self._zeros), []

    def _look_at_gradients(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        pairs = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        pairs = [(parameter, gradient) for parameter, gradient in pairs if _has_peak(gradient)]
        if pairs:
            self._gradients = [parameter for parameter, _ in pairs], _peaks([gradient for _, gradient in pairs])

    def _read(self, ends_epoch: bool) -> None:
        batches, self._unread = self._unread, []
        self._next_read = time.monotonic() + REFRESH_SECONDS
        rows = torch.stack([batch.values for batch in batches]).tolist() if batches else []  # the one sync
        for batch, (loss, input_peak, gradient_peak) in zip(batches, rows, strict=True):
            if self._message is None and not (math.isfinite(loss) and math.isfinite(gradient_peak)):
                self._message = self._describe(batch, loss, input_peak)
        if self._message is None or self._has_stopped:
            return
        if self.raise_error:
            raise RuntimeError(self._message)
        # A bad gradient waits for the bad loss, which keeps an epoch with ruined weights from being taken for the best.
        if ends_epoch or not all(math.isfinite(loss) for loss, _, _ in rows):
            self._has_stopped = True
            self.run.progress.clear()
            print(f"{self._message} Training stops.")
            self.model.stop_training = True

    def _describe(self, batch: _Batch, loss: float, input_peak: float) -> str:
        place = f"Epoch {self.run.epoch + 1}, batch {batch.number} (optimizer step {batch.step})"
        if not math.isfinite(input_peak):
            return f"{place}: the inputs of the batch hold {_text(input_peak)}; the loss is {_text(loss)}."
        if not math.isfinite(loss):
            return f"{place}: the loss is {_text(loss)}, from finite inputs."
        peaks = zip(batch.parameters, batch.gradient_peaks.tolist(), strict=True)
        bad = {id(parameter) for parameter, peak in peaks if not math.isfinite(peak)}
        names = [repr(name) for name, parameter in self.run.net.named_parameters() if id(parameter) in bad]
        where = names[-1] if names else "of a parameter outside the net"
        return f"{place}: the gradient became non-finite first: {where}; the loss was {_text(loss)}."


class _Batch(NamedTuple):
    number: int
    step: int
    parameters: list[nn.Parameter]
    gradient_peaks: Tensor  # one a parameter
    values: Tensor  # the loss, the peak of the inputs, the peak of the gradients


def _has_peak(tensor: Tensor) -> bool:
    is_plain = tensor.layout is torch.strided and not tensor.is_nested
    return is_plain and tensor.is_floating_point() and tensor.numel() > 0


@torch.no_grad()
def _peaks(tensors: list[Tensor]) -> Tensor:
    """Return the largest absolute value of each tensor, NaN where it holds one. No sync."""
    if tensors[0].is_cpu:  # aminmax takes a tenth of the norm's time there
        return torch.stack([end for tensor in tensors for end in tensor.aminmax()]).view(-1, 2).abs().amax(1)
    return torch.stack(torch._foreach_norm(tensors, math.inf))


def _text(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.4g}"
