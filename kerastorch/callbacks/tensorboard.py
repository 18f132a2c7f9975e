"""TensorBoard: writes curves, histograms and the net's graph as TensorBoard's event files."""

from __future__ import annotations

import copy
import io
import os
import time
import warnings
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from kerastorch.callbacks.callback import Callback, Logs, user_path
from kerastorch.device import Nested, preserved_random_state
from kerastorch.errors import check_choice, check_int, warn

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

# One kind of step a folder: a resumed run hides what a killed one wrote from a step on, for all tags of a folder.
TRAIN, VALIDATION, BATCHES = "train", "validation", "train_batches"  # steps: epochs, epochs, training batches


class TensorBoard(Callback):
    """Write the logs of each epoch, and more if asked, for `tensorboard --logdir` to show.

    log_dir: a folder, made when fit begins; another run wants another.   histogram_freq: epochs from one histogram of
    each parameter to the next, 0 for none.   write_graph: write the net's graph from the first training batch; a copy
    of the net is traced, and one that can't be gives a warning.   write_steps_per_second: training batches a second in
    each epoch, validation included.   update_freq: "epoch", or "batch" or an int n to also write the running averages
    every batch or n batches; reading them is a sync.
    log_dir/train gets epoch_loss, epoch_<metric>, epoch_learning_rate (that of the epoch), epoch_steps_per_second;
    log_dir/validation the "val_" values, under the same tags; log_dir/train_batches batch_loss and batch_<metric>, by
    batches trained so far. What is no single number, as a confusion matrix, is left out. A second fit goes on after the
    first's last step; a resumed one hides what the killed run wrote after the checkpoint.
    Raises TypeError or ValueError for wrong arguments; when fit begins, ImportError without tensorboard and OSError for
    a log_dir that can't be written.
    Source: keras.callbacks.TensorBoard, whose write_graph is True by default; no images, profiles or embeddings here.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] = "logs",
        histogram_freq: int = 0,
        *,
        write_graph: bool = False,
        write_steps_per_second: bool = False,
        update_freq: Literal["epoch", "batch"] | int = "epoch",
    ) -> None:
        check_int("histogram_freq", histogram_freq, at_least=0)
        check_choice("write_graph", write_graph, (True, False))
        check_choice("write_steps_per_second", write_steps_per_second, (True, False))
        if isinstance(update_freq, str):
            check_choice("update_freq", update_freq, ("epoch", "batch"))
        else:
            check_int("update_freq", update_freq)
        self.log_dir = user_path("log_dir", log_dir)
        self.histogram_freq, self.write_graph = histogram_freq, write_graph
        self.write_steps_per_second, self.update_freq = write_steps_per_second, update_freq
        self._writers: dict[str, SummaryWriter] = {}
        self._to_purge: set[str] = set()  # folders in which a killed run may have written later steps
        self._offset = self._next_epoch = 0  # a step in TRAIN is an epoch's index plus the offset
        self._batches = self._batches_before = 0  # trained in all fits; those before this epoch
        self._has_graph = False
        for hook, is_used in (("on_train_batch_begin", write_graph), ("on_train_batch_end", update_freq != "epoch")):
            if not is_used and getattr(type(self), hook) is getattr(TensorBoard, hook):
                vars(self)[hook] = MethodType(getattr(Callback, hook), self)  # CallbackList calls none such

    def on_train_begin(self, logs: Logs | None = None) -> None:
        _import_summary_writer()
        folder = Path(self.log_dir)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"TensorBoard's log_dir {self.log_dir!r} is a file; give a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"TensorBoard can't write into its log_dir {self.log_dir!r}.")
        self._offset = max(0, self._next_epoch - self.run.initial_epoch)
        self._first_epoch: int | None = None
        self._to_purge = set()

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        if self._first_epoch is None:
            self._first_epoch = epoch
        self._batches_before = self._batches
        self._begin = time.perf_counter(), self._batches
        self._rate_at_begin = self._learning_rate()

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        super().on_train_batch_begin(batch, logs)
        if self.write_graph and not self._has_graph:
            self._has_graph = True
            _write_graph(self._writer(TRAIN), self.run.net, self.run.x)

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        super().on_train_batch_end(batch, logs)
        self._batches += 1
        if self.update_freq == "batch" or (self.update_freq != "epoch" and self._batches % self.update_freq == 0):
            for name, value in _numbers(logs).items():
                self._writer(BATCHES).add_scalar(f"batch_{name}", value, self._batches)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self._batches, step = self._batches_trained(), epoch + self._offset
        self._next_epoch = step + 1
        # A scheduler of compile() has already set the next epoch's rate; callbacks set it when an epoch begins.
        is_next = self.run.lr_scheduler is not None and self.run.lr_scheduler_interval == "epoch"
        values = (self._rate_at_begin if is_next else self._learning_rate()) | _numbers(logs)
        if self.write_steps_per_second:
            began, batches = self._begin
            values["steps_per_second"] = (self._batches - batches) / (time.perf_counter() - began)
        for name, value in values.items():
            folder = VALIDATION if name.startswith("val_") else TRAIN
            self._writer(folder).add_scalar(f"epoch_{name.removeprefix('val_')}", value, step)
        if self.histogram_freq and step % self.histogram_freq == 0:
            for name, parameter in self.run.net.named_parameters():
                weights = parameter.detach()[parameter.isfinite()]
                if weights.numel():
                    self._writer(TRAIN).add_histogram(name.replace(".", "/"), weights.float(), step)
        self._flush()

    def close(self) -> None:
        with ExitStack() as stack:  # closes every one, also where one fails
            for writer in self._writers.values():
                stack.callback(writer.close)
            self._writers = {}

    def state_dict(self) -> dict[str, Any]:
        self._flush()  # what a checkpoint counts as written must be on disk
        return {
            "offset": self._offset,
            "next_epoch": self._next_epoch,
            "batches": self._batches_trained(),
            "batches_before": self._batches_before,
            "has_graph": self._has_graph,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.close()
        self._offset, self._next_epoch = state_dict["offset"], state_dict["next_epoch"]
        self._batches, self._batches_before = state_dict["batches"], state_dict["batches_before"]
        self._has_graph = state_dict["has_graph"]
        self._first_batch = self._batches + 1
        self._to_purge = {TRAIN, VALIDATION, BATCHES}

    def _batches_trained(self) -> int:
        """Count this batch and epoch too, where a checkpoint is written before this callback's hook is called."""
        run = vars(self).get("run")
        return max(self._batches, self._batches_before + run.batch + 1) if run is not None else self._batches

    def _writer(self, folder: str) -> SummaryWriter:
        """Return the folder's writer, made when first asked for: load_state_dict comes before that."""
        if folder not in self._writers:
            purge_step = 2**62  # hides nothing, but must be there: a reader takes a folder's first for no restart
            if folder in self._to_purge:
                self._to_purge.remove(folder)
                assert self._first_epoch is not None
                purge_step = self._first_batch if folder == BATCHES else self._first_epoch + self._offset
            path = Path(self.log_dir, folder)
            # Readers take the files by name, which begins with the second; within one, order is not kept.
            while any(path.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
                time.sleep(0.02)
            self._writers[folder] = _import_summary_writer()(str(path), purge_step=purge_step)
        return self._writers[folder]

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def _learning_rate(self) -> dict[str, float]:
        group = self.run.optimizer.param_groups[0]
        return {"learning_rate": float(group["lr"])} if "lr" in group else {}  # a sync where it is on a GPU


@torch.no_grad()
def _write_graph(writer: SummaryWriter, net: nn.Module, x: Nested) -> None:
    """Trace a copy of net on a copy of x, which forward may write into; what they share is put back."""
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]  # a lambda kept in the copy calls net's own layers
    try:
        with preserved_random_state(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            traced, inputs = copy.deepcopy((net, x))
            if isinstance(x, dict):
                traced, inputs = _ByName(traced, list(x)), tuple(inputs.values())
            writer.add_graph(traced, inputs, use_strict_trace=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        what = f"{type(net).__name__} can't be copied and traced, {reason}"
        warn(f"TensorBoard(write_graph=True) writes no graph: {what}")
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


class _ByName(nn.Module):
    """Calls net(**x) from x's values alone: tracing takes no names."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.net, self.names = net, names

    def forward(self, *values: Nested) -> Nested:
        return self.net(**dict(zip(self.names, values, strict=True)))


def _numbers(logs: Logs | None) -> dict[str, float]:
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in (logs or {}).items()}
    return {name: float(value) for name, value in plain.items() if isinstance(value, (int, float))}


def _import_summary_writer() -> type[SummaryWriter]:
    try:
        with warnings.catch_warnings():  # of the packages that tensorboard itself imports
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('TensorBoard needs tensorboard: pip install "kerastorch[tensorboard]"') from error
    return SummaryWriter
