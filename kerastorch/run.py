"""What one call of fit, evaluate or predict reads and writes, and the work that no textbook loop shows.

The loops in loops/ hold the training recipe; Run moves data, counts, keeps sums, fires hooks and draws the bar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from kerastorch.averaging import WeightAverage
from kerastorch.checkpoint import check_plain
from kerastorch.compiled import AUTOCAST_DTYPES, Compiled, LastFit
from kerastorch.data import BatchSource, ClassWeight, Predictions, to_numpy
from kerastorch.device import (
    CopyStream,
    Nested,
    bare_module,
    get_random_state,
    map_nested,
    move_to_device,
    num_samples,
    set_random_state,
)
from kerastorch.first_batch import (
    check_batch_norm,
    check_devices,
    check_inputs,
    check_outputs,
    signature,
    watched_layers,
)
from kerastorch.history import History
from kerastorch.jit import mark_batch_axis
from kerastorch.lazy import lazy_names, settle_shapes
from kerastorch.losses import Loss
from kerastorch.metrics import LogValue, known_logs, may_name_results
from kerastorch.optimizers import single_optimizers, sparse_clipping
from kerastorch.progress import Progress
from kerastorch.resume import check_states, get_content, restore
from kerastorch.sums import PassSums, RunningLogs

if TYPE_CHECKING:
    from kerastorch.callbacks import CallbackList


class Run:
    """One call of fit, evaluate or predict.

    net, loss_fn, optimizer, scaler, lr_scheduler: what the loop works with; loss_fn takes (outputs, y, sample_weight).
    forward: calls net with x as it came: net(x) for a tensor (then it is net itself), net(*x), net(**x).
    epoch, batch: indices from 0.   step: optimizer updates since fit began.   num_samples: rows in this batch.
    step_is_due: whether this batch ends an accumulation window.   stop_training: set it to end fit after this batch.
    window: samples of each batch since the last update.   Where batches are trained on together, see train_together(),
    x, loss and num_samples are of all of them.
    x, loss: this training batch's inputs and detached loss, on the device; None before the first.
    epochs_done: the index after the last finished epoch's.   batches_done: batches of the running epoch, 0 at its end.
    batches_seen: batches since fit began.   interrupt: the signal that asked to stop (SIGINT, SIGTERM), or None.
    average: of the weights, which EMA and SWA let stand in for the net's, or None.
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
        class_weight: Mapping[int, float] | None = None,
        joins: bool = True,
        logs_are_known: bool = False,
        earlier_history: History | None = None,
    ) -> None:
        self.net, self.device = net, device
        self.callbacks, self.progress = callbacks, progress
        self.train_data, self.val_data = train_data, val_data
        self.epochs, self.initial_epoch, self.steps_per_epoch = epochs, initial_epoch, steps_per_epoch
        self.validation_steps, self.validation_freq = validation_steps, validation_freq
        self.history = History()
        self.earlier_history = earlier_history or History()  # of the fits before this one
        self.resume_from: Mapping[str, Any] | None = None  # a checkpoint's content
        self.resume_path = ""  # and its file
        self.logs_are_known = False  # whether log_names lists all that can ever be monitored
        self.added_logs: list[str] = []  # keys that callbacks say, in on_train_begin, they will add to an epoch's logs

        self.is_jit = compiled is not None and compiled.jit_compile is not False
        self._copies = CopyStream(device) if device.type == "cuda" else None
        may_keep = compiled is None or not compiled.cuts_batches  # else memory is known to be short
        for source in (train_data, val_data):
            if self._copies is not None and source is not None:
                source.read_to(self._copies, keeps=may_keep)
        self._is_channels_last = compiled is not None and compiled.channels_last
        self.mixed_precision: str | None = None
        self.lr_scheduler: LRScheduler | None = None
        self.lr_scheduler_spans = compiled is not None and isinstance(compiled.lr_scheduler, str)  # this fit's epochs
        if compiled is not None:
            self.loss_fn = Loss(compiled.loss)
            self.optimizer, self.scaler = compiled.optimizer, compiled.scaler
            self.lr_scheduler_interval = compiled.lr_scheduler_interval
            self.mixed_precision = compiled.mixed_precision
            self.gradient_accumulation_steps = compiled.gradient_accumulation_steps
            self.cuts_batches, self.num_parts = compiled.cuts_batches, compiled.num_parts
            self.clip_grad_norm, self.clip_grad_value = compiled.clip_grad_norm, compiled.clip_grad_value
            self.train_sums = PassSums(compiled.metrics, device, compiled.weighted_metrics)
            self.val_sums = PassSums(compiled.metrics, device, compiled.weighted_metrics)
            self.sums = self.train_sums
            metrics = {**compiled.metrics, **compiled.weighted_metrics}
            self.higher_is_better = known_logs(metrics)
            self.logs_are_known = logs_are_known and not any(map(may_name_results, metrics.values()))
            self.higher_is_better |= dict.fromkeys(self.loss_fn.part_names, False)
            self.class_weight = ClassWeight(class_weight, compiled.loss, device) if class_weight is not None else None
            self._looked_at = compiled.looked_at

        self._watch = ExitStack()  # of the layers, until the first loss
        self._shapes_state: dict[str, Any] | None = None  # random states to draw a lazy net's weights with
        self.epoch = self.epochs_done = self.initial_epoch
        self.batch = self.step = self.num_samples = 0
        self.batches_done = self.batches_seen = 0
        self.epoch_is_trained = False  # and may lack its validation
        self.train_end_is_due = False  # whether it lacks what on_train_epoch_end does as well
        self.interrupt: int | None = None
        self._is_cut = False  # whether an interrupt ended the running epoch
        self.average: WeightAverage | None = None
        self.step_is_due = True
        self.stop_training = False
        self.kinds = ("tensor", "tensor")  # of x and y
        self.target: tuple[tuple[int, ...], torch.dtype] | None = None  # shape of a sample's, and dtype
        self.has_sample_weight = self.has_val_sample_weight = False
        self.x: Nested = None
        self.loss: Tensor | None = None
        self.val_logs: dict[str, LogValue] = {}
        self.val_state: dict[str, Any] | None = None  # of the validation data, when a pass over it began
        self.forward: Callable[..., Any] = net
        self._forward_tuple = lambda x: net(*x)
        self._forward_dict = lambda x: net(**x)
        self._epoch_logs: dict[str, LogValue] | None = None
        self.window: list[int] = []
        self._batches: Iterator[tuple[Any, bool]] = iter(())  # of the running epoch
        self._held: tuple[Any, ...] | None = None  # the batch that is trained on, where it may have to be repeated
        self._held_random_state: dict[str, Any] = {}  # and those that it began with
        self._unrecorded: list[tuple[Any, ...]] = []  # what its parts gave
        self._predictions = Predictions()
        self.joins, self.last_outputs = joins, None  # whether predictions of all batches are kept, or the last
        self._collects_later = False  # whether many are joined at once

    def check_before_start(self) -> None:
        """Raise ValueError for what can be known to fail: data read only once but needed again, a net moved elsewhere.

        Warns where the last batch leaves batch norm a single sample.
        """
        check_devices(self.net, self.device)
        if self.train_data is not None:
            check_batch_norm(self.net, self.train_data.num_rows, self.train_data.batch_size, self.train_data.drop_last)
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

    def await_shapes(self) -> None:
        """Let the first batch give a lazy net its weights, drawn as net(x) would draw them now."""
        if lazy_names(self.net):
            self._shapes_state = get_random_state()

    def release(self) -> None:
        """Let go of what the call no longer needs: its callbacks' hold on it, and loader workers between two epochs."""
        self.callbacks.end()
        self._watch.close()
        self.x = self.loss = self.resume_from = self._held = None
        self._batches, self._unrecorded = iter(()), []
        if self.average is not None and self.average.is_swapped:  # by a validation that failed
            self.average.swap()
        self.average = None
        if hasattr(self, "loss_fn"):
            self.loss_fn.on_first_batch = None
        for source in (self.train_data, self.val_data):
            if source is not None:
                source.release()
        self.train_data = self.val_data = None  # a loader's workers end with it, not when garbage is collected

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators that the evaluated data has of its own."""
        return self.val_data.generators if self.val_data is not None else []

    # ---- epochs ----

    def epoch_range(self) -> Iterator[int]:
        """Yield the index of each epoch to train; fires the train and epoch hooks, ends early when told to stop.

        A resumed run goes on where its checkpoint was written, which is when all other hooks of the moment are through.
        """
        self.optimizer.zero_grad()  # an earlier fit may have been cut between backward and step
        if self._held is None:
            self.callbacks.on_train_begin({})
            self._prepare_checkpoints()
        if self.resume_from is not None:
            restore(self, self.resume_from)
            self._say_if_stopped(self.resume_from)
        logs = self.history.last_logs
        for epoch in range(self.epochs_done, self.epochs):
            if (self.stop_training and not self.batches_done) or self.interrupt is not None:
                break
            if self._held is None:
                self.epoch, self.batch = epoch, self.batches_done - 1
                self.val_logs, self._epoch_logs = {}, None
                if not self.batches_done:
                    self.train_sums.reset()
                self.progress.begin(f"Epoch {epoch + 1}/{self.epochs}", self.num_batches)
                self.callbacks.on_epoch_begin(epoch, {})
            if self.resume_from is not None and self.batches_done:  # in the run that goes on, the hook came before
                restore(self, self.resume_from)
            self.resume_from = None  # it is of the net's size
            yield epoch
            if self._is_cut:
                break
            logs = self.epoch_logs()
            if "loss" not in logs:
                raise RuntimeError(
                    f"epoch {epoch + 1} recorded no training batch: the loop must call "
                    "run.record(loss, outputs, y, sample_weight) for each."
                )
            self.progress.clear()
            self.callbacks.on_epoch_end(epoch, logs)
            self.history.append(epoch, logs)
            self.epochs_done, self.batches_done, self.epoch_is_trained = epoch + 1, 0, False
            self.callbacks.save("epoch", logs)
            self.progress.end(logs)
        if self.interrupt is None:
            if self.average is not None:
                self.average.adopt()
                self.average = None
        elif not self._is_cut:
            self.callbacks.save("interrupt", logs)
        self.callbacks.on_train_end(logs)

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch, or in the pass of evaluate or predict; None where that is not known."""
        if self.train_data is not None:
            return self.steps_per_epoch or self.train_data.num_batches
        assert self.val_data is not None
        return self.validation_steps or self.val_data.num_batches

    @property
    def num_scheduler_steps(self) -> int | None:
        """How often advance_lr_scheduler will step in this fit, or None where that is not known."""
        epochs = self.epochs - self.initial_epoch
        if self.lr_scheduler_interval == "epoch":
            return epochs
        return epochs * math.ceil(self.num_batches / self.gradient_accumulation_steps) if self.num_batches else None

    @property
    def params(self) -> dict[str, Any]:
        """What callbacks and History are told of the call: {"verbose", "epochs", "steps"}."""
        return {"verbose": self.progress.verbose, "epochs": self.epochs, "steps": self.num_batches}

    @property
    def validation_is_due(self) -> bool:
        """Whether this epoch ends with a validation pass."""
        return self.val_data is not None and not self._is_cut and _is_due(self.epoch + 1, self.validation_freq)

    @property
    def validates_every_epoch(self) -> bool:
        """Whether no epoch of this call ends without a validation pass."""
        epochs = range(self.initial_epoch, self.epochs)
        return self.val_data is not None and all(_is_due(epoch + 1, self.validation_freq) for epoch in epochs)

    def epoch_logs(self) -> dict[str, LogValue]:
        """Return this epoch's logs so far, validation under "val_" (a sync, the first time in an epoch)."""
        if self._epoch_logs is None:
            self._epoch_logs = self.train_sums.compute()
            self._epoch_logs |= {f"val_{name}": value for name, value in self.val_logs.items()}
        return self._epoch_logs

    @property
    def log_names(self) -> list[str]:
        """The names that the logs of an epoch hold, added_logs too; metrics that name their own results left out."""
        names = list(self.higher_is_better)
        val_names = [f"val_{name}" for name in names] if self.val_data is not None else []
        return list(dict.fromkeys(names + val_names + self.added_logs))

    # ---- training batches ----

    def train_batches(self) -> Iterator[tuple[Nested, Nested, Tensor | None]]:
        """Yield (x, y, sample_weight) on the device for each batch of an epoch; fires the train-batch hooks.

        After the loop's body it counts the step, draws the bar, lets checkpoints be written and, told to stop, ends the
        epoch on an optimizer step.
        """
        assert self.train_data is not None
        if self.epoch_is_trained:  # as a resumed run may find it
            if self.train_end_is_due:
                self._end_training()
            return
        callbacks, sums = self.callbacks, self.train_sums
        self.sums = sums
        self.window = []
        is_stopped = self.stop_training and self.batches_done > 0  # in the life before this one
        for x, y, sample_weight, is_last in () if is_stopped else self._begun_batches():
            for part in ((x, y, sample_weight),) if not self.cuts_batches else self._parts(x, y, sample_weight):
                self.window.append(self.num_samples)
                is_whole = len(self.window) == self.gradient_accumulation_steps
                self.step_is_due = is_whole or (is_last and not self.cuts_batches)
                yield part
            self._watch.close()
            if self.cuts_batches:
                self._end_parts()
            if self.step_is_due:
                self.step += self.num_together
                self.window = []
            self.batches_done, self.batches_seen = self.batch + 1, self.batches_seen + self.num_together
            if callbacks.has_train_batch_end:
                callbacks.on_train_batch_end(self.batch, RunningLogs(sums))
            self.progress.update(self.batch + 1, sums.running)
            if self.step_is_due:
                if self.interrupt is not None:
                    return self._cut_epoch()
                if callbacks.saves_within_epochs:
                    callbacks.save("step", RunningLogs(sums))
                if self.stop_training:
                    break
        if self._is_cut:
            return self._cut_epoch()
        self._end_training()

    def _begun_batches(self) -> Iterator[tuple[Nested, Nested, Tensor | None, bool]]:
        """Yield (x, y, sample_weight, is_last) for each batch, its hook fired; one to repeat comes first."""
        assert self.train_data is not None
        if self._held is not None:
            set_random_state(self._held_random_state)
            yield self._held
        else:
            self.train_sums.clones_targets = self.train_data.may_reuse_memory
            look_ahead = self.gradient_accumulation_steps > 1
            batches = self.train_data.epoch(self.steps_per_epoch, done=self.batches_done, look_ahead=look_ahead)
            self._batches = self._until_cut(batches)
        is_first = self._held is None
        for (x, y, sample_weight), is_last in self._batches:
            self.batch += self.num_together
            x, y, sample_weight = self._begin_batch(x, y, sample_weight)
            if is_first:
                self.kinds, self.has_sample_weight = (_kind(x), _kind(y)), sample_weight is not None
                self.target = (tuple(y.shape[1:]), y.dtype) if isinstance(y, Tensor) else None
                self._look_at_inputs(x, y, sample_weight)
                is_first = False
            if self.class_weight is not None:
                sample_weight = self.class_weight(y, sample_weight)
            self.x = x
            if self.callbacks.has_train_batch_begin:
                self.callbacks.on_train_batch_begin(self.batch, {})
            if self.cuts_batches:
                self._held, self._held_random_state = (x, y, sample_weight, is_last), get_random_state()
            yield x, y, sample_weight, is_last

    def _parts(self, x: Nested, y: Nested, sample_weight: Tensor | None) -> Iterator[tuple[Any, Any, Any]]:
        """Yield a batch in num_parts parts, between whose gradients no update is made."""
        n = self.num_samples
        size = math.ceil(n / self.num_parts)
        self.gradient_accumulation_steps = math.ceil(n / size)
        for start in range(0, n, size):
            self.num_samples = min(size, n - start)
            yield tuple(_rows(part, n, slice(start, start + size)) for part in (x, y, sample_weight))
        self.num_samples = n

    def _end_parts(self) -> None:
        """Record what a batch's parts gave, now that none of them has to be repeated."""
        for arguments in self._unrecorded:
            self.train_sums.update(*arguments)
        self._unrecorded, self._held = [], None

    def cut_more(self, error: torch.OutOfMemoryError) -> None:
        """Let the loop's next fit repeat the batch that was too large in twice as many parts.

        Raises the error again where batches are not to be cut, or can't be.
        """
        rows = num_samples(self._held[0]) if self._held is not None else 0
        if self.sums is not self.train_sums or rows < 2 * self.num_parts:
            raise error
        self.num_parts *= 2
        self._unrecorded = []
        self.num_samples = rows
        self.progress.say(f"Out of memory: batches of {rows} are cut into {self.num_parts} parts for each update.")

    def _end_training(self) -> None:
        """Fire the hook that follows an epoch's training; an interrupt may cut what it does in forward_over()."""
        self.epoch_is_trained = True
        self.callbacks.on_train_epoch_end(self.epoch, {})
        self.train_end_is_due = self._is_cut  # then the resumed run fires it again
        if self._is_cut:
            self._cut_epoch()

    @property
    def num_together(self) -> int:
        """How many batches, each to be trained on by itself, are joined in the one that train_batches() gave."""
        assert self.train_data is not None
        return self.train_data.num_together

    def train_together(self, most: int) -> None:
        """Let train_batches() join up to so many full batches in memory, where nothing looks on between their steps."""
        assert self.train_data is not None
        callbacks = self.callbacks
        is_watched = callbacks.has_train_batch_begin or callbacks.has_train_batch_end or callbacks.saves_within_epochs
        is_scheduled = self.lr_scheduler is not None and self.lr_scheduler_interval == "step"
        is_whole = self.gradient_accumulation_steps == 1 and not self.cuts_batches and self.steps_per_epoch is None
        can_be_joined = is_whole and not is_watched and not is_scheduled and self.train_sums.takes_batches_together
        self.train_data.read_together(most if can_be_joined else 1)

    @property
    def is_full_batch(self) -> bool:
        """Whether this batch, or each of those joined in it, is no short one; True where the size is not known."""
        assert self.train_data is not None
        return self.train_data.batch_size in (None, self.num_samples // self.num_together)

    # ---- checkpoints, interrupts, averaged weights ----

    def describe_fit(self, class_weight: Mapping[int, float] | None, **data: Any) -> LastFit:
        """Return what eject needs to know of this fit.   data: how the data was given, in LastFit's words."""
        assert self.train_data is not None
        return LastFit(
            **data,
            callbacks=self.callbacks.callbacks,
            class_weight=class_weight,
            kind=self.kinds[0],
            target_kind=self.kinds[1],
            target=self.target,
            epochs=self.epochs,
            initial_epoch=self.initial_epoch,
            has_length=self.train_data.num_batches is not None,
            validated=self.val_data is not None,
            validation_freq=self.validation_freq,
            steps_per_epoch=self.steps_per_epoch,
            validation_steps=self.validation_steps,
            batch_sizes=(self.train_data.batch_size, self.val_data.batch_size if self.val_data is not None else None),
            sample_weights=(self.has_sample_weight, self.has_val_sample_weight),
            unpacks=(
                self.train_data.unpack is not None,
                self.val_data is not None and self.val_data.unpack is not None,
            ),
            inferred=self.train_sums.inferred_from,
        )

    def note_interrupt(self, signum: int) -> None:
        """Ask the run to end at the next optimizer step; a signal handler calls it."""
        self.interrupt = signum

    def _prepare_checkpoints(self) -> None:
        if self.callbacks.checkpointers:
            check_plain(self.published_state_dict(), "model_state_dict", takes_lazy=True)
        if self.callbacks.writes_resume_points:
            check_states(self)
            for source in (self.train_data, self.val_data):
                if source is not None:
                    source.keep_position()

    def get_content(self, loss: float) -> dict[str, Any]:
        """Return what a checkpoint holds now; tensors are the live ones. loss: the epoch's so far."""
        return get_content(self, loss)

    def published_state_dict(self) -> dict[str, Any]:
        """Return the weights that validation sees: the average where EMA or SWA keep one, else the net's. Bare keys."""
        return bare_module(self.net).state_dict() if self.average is None else self.average.published_state_dict()

    def _say_if_stopped(self, content: Mapping[str, Any]) -> None:
        """Tell why a run that a callback ended is not trained on when it is resumed, or that it is."""
        state = content.get("run", {})
        if not state.get("stop_training") or self.epochs_done >= self.epochs:
            return
        stopped = f"A callback ended this run in epoch {self.epochs_done + bool(self.batches_done)}"
        if self.stop_training:
            self.progress.say(f"{stopped}: no more is trained; epochs above {state['epochs']} would go on.")
        else:
            self.progress.say(f"{stopped}; now it goes on.")

    def _until_cut(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches; cut the epoch where they fail because the signal that interrupts ended the workers too."""
        try:
            yield from batches
        except Exception:
            if self.interrupt is None:
                raise
            self._is_cut = True

    def _cut_epoch(self) -> None:
        """End an interrupted epoch where it is, after the last checkpoint; within an accumulation there is none."""
        self._is_cut = True
        self.progress.clear()
        if not self.window:
            self.callbacks.save("interrupt", RunningLogs(self.train_sums))

    @contextmanager
    def _published_weights(self) -> Iterator[None]:
        """Let the average stand in the net, where there is one."""
        if self.average is None or not self.average.has_begun:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            if self.average is not None and self.average.is_swapped:
                self.average.swap()

    def forward_over(self, source: BatchSource, net: nn.Module) -> bool:
        """Call net with each x of an epoch's worth of a source, as the loops call the run's net.

        Returns whether it came to the end; an interrupt cuts it, and the epoch with it.
        """
        for (x, _, _), _ in self._until_cut(islice(source.one_pass(), self.steps_per_epoch)):
            x = move_to_device(x, self.device)
            with self.autocast():
                if isinstance(x, dict):
                    net(**x)
                elif _is_tuple(x):
                    net(*x)
                else:
                    net(x)
            if self.interrupt is not None:
                self._is_cut = True
                break
        return not self._is_cut

    # ---- the step ----

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast of compile(mixed_precision=...), or a context that does nothing."""
        if self.mixed_precision is None:
            return _NO_AUTOCAST
        return torch.autocast(self.device.type, self.autocast_dtype)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast computes in, or None."""
        return AUTOCAST_DTYPES.get(self.mixed_precision or "")

    def share(self, loss: Tensor) -> Tensor:
        """Return this batch's share of its window's loss; without accumulation the loss itself.

        loss * n / (k * b) for n samples now, b in the window's first batch, k batches a window: loss / k where n is b.
        prepare_gradients() makes a short or uneven window exact.
        """
        k = self.gradient_accumulation_steps
        if k == 1:
            return loss
        n, b = self.window[-1], self.window[0]
        return loss / k if n == b else loss * n / (k * b)

    def prepare_gradients(self) -> None:
        """Make the gradients those of the mean loss of the window's samples, and clip them as compile() was told.

        Unscales fp16 gradients where they are clipped. No sync.
        """
        n, kb = sum(self.window), self.gradient_accumulation_steps * self.window[0]
        clips = self.clip_grad_norm is not None or self.clip_grad_value is not None
        if n == kb and not clips:
            return
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if clips:
            for optimizer in single_optimizers(self.optimizer):
                self.scaler.unscale_(optimizer)
        if n != kb:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(kb / n)
        if self.clip_grad_norm is not None:
            with self._told_if_sparse("clip_grad_norm", self.clip_grad_norm):
                nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        if self.clip_grad_value is not None:
            with self._told_if_sparse("clip_grad_value", self.clip_grad_value):
                nn.utils.clip_grad_value_(parameters, self.clip_grad_value)

    @contextmanager
    def _told_if_sparse(self, option: str, value: float) -> Iterator[None]:
        try:
            yield
        except NotImplementedError as error:
            for name, parameter in self.net.named_parameters():
                if parameter.grad is not None and parameter.grad.is_sparse:
                    raise sparse_clipping(name, option, value) from error
            raise

    def advance_lr_scheduler(self, interval: Literal["epoch", "step"]) -> None:
        """Step the scheduler of compile() where it steps by this interval; "step" counts optimizer updates.

        ReduceLROnPlateau is given val_loss, or loss where there is no validation; it waits for an epoch that validates.
        """
        if self.lr_scheduler is None or interval != self.lr_scheduler_interval or self._is_cut:
            return
        if interval == "step" and not self.step_is_due:
            return
        if isinstance(self.lr_scheduler, ReduceLROnPlateau):
            name = "loss" if self.val_data is None else "val_loss"
            if name in self.epoch_logs():
                self.lr_scheduler.step(cast(float, self.epoch_logs()[name]))
        else:
            self.lr_scheduler.step()

    def record(self, loss: Tensor, outputs: Nested, y: Nested, sample_weight: Tensor | None = None) -> None:
        """Add this batch to the sums of the running pass. They stay on the device: no sync."""
        if outputs is None and self.sums.all_metrics:
            names = ", ".join(self.sums.all_metrics)
            raise TypeError(
                f"a step must return (loss, outputs); outputs is None, but the metrics ({names}) read them."
            )
        if not isinstance(loss, Tensor):
            raise TypeError(f"a step must return (loss, outputs) with a tensor as loss, got {type(loss).__name__}.")
        if loss.dim() and loss.numel() != 1:
            raise ValueError(f"a step must return a scalar loss, got shape {tuple(loss.shape)}: return its mean.")
        if not self.sums.all_metrics:
            outputs = None
        else:
            outputs = _detach(outputs) if isinstance(outputs, Tensor) else map_nested(_detach, outputs)
        self.loss = loss.detach() if loss.dim() == 0 else loss.detach().reshape(())
        if self._held is not None:
            parts = dict(self.loss_fn.parts)
            self._unrecorded.append((self.loss, outputs, y, self.num_samples, sample_weight, parts))
        else:
            self.sums.update(self.loss, outputs, y, self.num_samples, sample_weight, self.loss_fn.parts)

    def log(self, **values: Tensor | float) -> None:
        """Average scalars of a step, weighted by samples, into logs, History, bar and callbacks. No sync.

        Raises ValueError for what is not one number, and for a name that the logs have already.
        """
        for name, value in values.items():
            if name in self.higher_is_better or name.startswith("val_"):
                raise ValueError(f"log({name}=...): the logs have a {name!r} already; log it under another name.")
            self.sums.log(name, value, self.num_samples)

    # ---- evaluation and prediction ----

    def eval_batches(self) -> Iterator[tuple[Nested, Nested, Tensor | None]]:
        """Yield (x, y, sample_weight) on the device for each validation batch; fires the test hooks."""
        assert self.val_data is not None
        callbacks, sums = self.callbacks, self.val_sums
        self.sums = sums
        sums.reset()
        sums.clones_targets = self.val_data.may_reuse_memory
        is_in_fit = self.train_data is not None
        random_state = get_random_state(*self.generators) if is_in_fit else None
        if is_in_fit and callbacks.writes_resume_points:
            self.val_state = self.val_data.state_dict()  # a resumed run validates from the beginning
        callbacks.on_test_begin({})
        with self._published_weights():
            for batch, ((x, y, sample_weight), _) in enumerate(
                self._until_cut(self.val_data.one_pass(self.validation_steps))
            ):
                x, y, sample_weight = self._begin_batch(x, y, sample_weight)
                if batch == 0:
                    self.has_val_sample_weight = sample_weight is not None
                    self._look_at_inputs(x, y, sample_weight)
                if callbacks.has_test_batch_begin:
                    callbacks.on_test_batch_begin(batch, {})
                yield x, y, sample_weight
                if batch == 0:
                    self._watch.close()
                if callbacks.has_test_batch_end:
                    callbacks.on_test_batch_end(batch, RunningLogs(sums))
                if not is_in_fit:
                    self.progress.update(batch + 1, sums.running)
                elif self.interrupt is not None:
                    break
        if random_state is not None and self.interrupt is not None:
            set_random_state(random_state, *self.generators)
            return self._cut_epoch()
        self.val_state = None
        self.val_logs = sums.compute()
        callbacks.on_test_end(self.val_logs)

    def predict_batches(self) -> Iterator[Nested]:
        """Yield x on the device for each batch, targets left out; fires the predict hooks."""
        assert self.val_data is not None
        callbacks = self.callbacks
        self._predictions = Predictions(self.val_data.num_rows if self.validation_steps is None else None)
        # nobody looks at a batch's outputs as they come, nor writes over what they may be a view of
        is_watched = callbacks.has_predict_batch_end or self.val_data.may_reuse_memory
        self._collects_later = self.joins and not is_watched
        callbacks.on_predict_begin({})
        for batch, ((x, _, _), _) in enumerate(self.val_data.one_pass(self.validation_steps)):
            x, _, _ = self._begin_batch(x, None, None)
            if batch == 0:
                self._settle_shapes(x)
            if callbacks.has_predict_batch_begin:
                callbacks.on_predict_batch_begin(batch, {})
            yield x
            if callbacks.has_predict_batch_end:
                callbacks.on_predict_batch_end(batch, {"outputs": self.last_outputs})
            self.progress.update(batch + 1, dict)
        callbacks.on_predict_end({})

    def collect(self, outputs: Nested) -> None:
        """Keep a batch of predictions, on the CPU as numpy arrays; bfloat16 becomes float32.

        Raises ValueError for outputs without a batch axis.
        """
        if outputs is None:
            raise TypeError("predict_step must return the outputs of the batch, got None.")
        if self._collects_later and type(outputs) is Tensor:
            self._predictions.append_later(outputs, self.num_samples)
            return
        self.last_outputs = to_numpy(outputs) if isinstance(outputs, Tensor) else map_nested(to_numpy, outputs)
        if self.joins:
            self._predictions.append(self.last_outputs, self.num_samples)

    def predictions(self) -> Nested:
        """Hand over all that was collected, joined on the first axis, nested as the outputs are."""
        predictions, self._predictions, self.last_outputs = self._predictions, Predictions(), None
        return predictions.joined()

    def _begin_batch(self, x: Nested, y: Nested, sample_weight: Nested) -> tuple[Nested, Nested, Nested]:
        if self._copies is not None:
            x, y, sample_weight = self._copies((x, y, sample_weight))
        else:
            x, y = move_to_device(x, self.device), move_to_device(y, self.device)
            if sample_weight is not None:
                sample_weight = move_to_device(sample_weight, self.device)
        self.num_samples = num_samples(x)
        if self._is_channels_last:
            x = map_nested(_channels_last, x)
        if self.is_jit:
            mark_batch_axis(x)
        if isinstance(x, Tensor):
            self.forward = self.net
        elif isinstance(x, dict):
            self.forward = self._forward_dict
        else:
            self.forward = self._forward_tuple if _is_tuple(x) else self.net
        return x, y, sample_weight

    def _look_at_inputs(self, x: Nested, y: Nested, sample_weight: Nested) -> None:
        """Check a pass's first batch, and its outputs inside the next loss call, unless one of its kind has passed."""
        is_training = self.sums is self.train_sums
        kind = signature(x, y)
        if (is_training, kind) in self._looked_at:
            return
        knows_less = not is_training and (True, kind) in self._looked_at
        warns = ("warned", kind) not in self._looked_at and not knows_less
        data = self.train_data if is_training else self.val_data
        assert data is not None
        check_inputs(data.name, self.net, self.loss_fn.fn, x, y, sample_weight, self.mixed_precision is not None)

        def look_at_outputs(outputs: Nested, y: Nested) -> None:
            fn, was_trained = self.loss_fn.fn, self.step > 0
            if check_outputs(data.name, self.net, fn, x, outputs, y, warns=warns, was_trained=was_trained):
                self._looked_at.add(("warned", kind))
            self.sums.infer(map_nested(_detach, outputs), y)
            self._looked_at.add((is_training, kind))
            self._watch.close()

        self.loss_fn.on_first_batch = look_at_outputs
        self._watch.close()
        if not self.is_jit:  # hooks that come and go would compile the net anew
            self._watch.enter_context(watched_layers(self.net))
        self._settle_shapes(x)

    def _settle_shapes(self, x: Nested) -> None:
        """Give a lazy net its weights before anything reads them."""
        state, self._shapes_state = self._shapes_state, None
        if state is None or not lazy_names(self.net):  # a checkpoint had them
            return
        eagerly = torch.compiler.set_stance("force_eager") if self.is_jit else nullcontext()
        with self.autocast(), eagerly:
            settle_shapes(self.net, partial(self.forward, x), state)
        left = lazy_names(self.net)
        if left and self.train_data is not None:
            raise ValueError(
                f"the shape of {left[0]!r} is not known after a forward of the first batch in eval mode: run a batch "
                "through the lazy net before compile(), as net.train()(x[:2]), or take that layer out."
            )


def _kind(value: Nested) -> str:
    if value is None or isinstance(value, Tensor):
        return "none" if value is None else "tensor"
    kind = "dict" if isinstance(value, dict) else "tuple" if _is_tuple(value) else "other"
    parts = value.values() if isinstance(value, dict) else value
    return kind if kind != "other" and all(isinstance(part, Tensor) for part in parts) else "other"


def _is_tuple(x: Nested) -> bool:
    return isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence)


def _is_due(epoch: int, freq: int | Collection[int]) -> bool:
    return epoch in freq if isinstance(freq, Collection) else epoch % freq == 0


_NO_AUTOCAST: AbstractContextManager[None] = nullcontext()


def _rows(part: Nested, n: int, rows: slice) -> Nested:
    """Return some rows of a batch of n; what has none stays whole."""

    def take(leaf: Any) -> Any:
        return leaf[rows] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == n else leaf

    return map_nested(take, part)


def _channels_last(leaf: Any) -> Any:
    is_image = isinstance(leaf, Tensor) and leaf.dim() == 4
    return leaf.contiguous(memory_format=torch.channels_last) if is_image else leaf


def _detach(output: Any) -> Any:
    if not isinstance(output, Tensor):
        return output
    return output.detach().float() if output.dtype in (torch.bfloat16, torch.float16) else output.detach()
