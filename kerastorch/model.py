"""Model: Keras's verbs for any nn.Module. Signatures stand here; the training stands in loops/, the work in run.py."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kerastorch.callbacks import Callback, CallbackList
from kerastorch.check import check_model
from kerastorch.compiled import AUTOCAST_DTYPES, Compiled, LastFit
from kerastorch.data import (
    BatchSource,
    is_map_style,
    make_dataset,
    make_source,
    needs_unpack,
    split_dataset,
    to_tensors,
    warn_if_shuffled,
)
from kerastorch.device import (
    Nested,
    get_random_state,
    move_to_device,
    preserved_random_state,
    resolve_device,
    set_random_state,
)
from kerastorch.eject import eject_model
from kerastorch.errors import check_choice, check_int, did_you_mean
from kerastorch.export import ExportReport, export_model
from kerastorch.history import History
from kerastorch.jit import compile_arguments, compile_in_place, told_apart
from kerastorch.lazy import lazy_names
from kerastorch.loops import GraphLoop, Loop, has_own_train_step, is_own_loop, make_loop
from kerastorch.losses import LOSSES, LossFunction, LossSpec, OutputLosses, ignored_class, loss_scale, make_loss
from kerastorch.metrics import AnyMetric, LogValue, make_metrics, make_output_metrics
from kerastorch.optimizers import (
    OPTIMIZERS,
    OptimizerSpec,
    SchedulerSpec,
    check_clipping,
    copy_options,
    make_optimizer,
    make_optimizers,
    make_scheduler,
    spanning_scheduler,
)
from kerastorch.progress import Progress, Verbose
from kerastorch.report import Report
from kerastorch.resume import check_content, find_checkpoint
from kerastorch.run import Run
from kerastorch.saving import (
    LoadReport,
    SavedState,
    find_arguments,
    find_history,
    find_state,
    get_model_content,
    load_weights,
    plain_arguments,
    read_model,
    save_weights,
    standing_run,
    take_over,
    taking_up,
    write_model,
)
from kerastorch.stopping import OnInterrupt, caught_signals, check_on_interrupt, end_interrupted
from kerastorch.summary import Summary, summarize

if TYPE_CHECKING:
    from kerastorch.metrics import MetricSpec


class Model:
    """Adds compile, fit, evaluate and predict to a module, which stays as it is.

    net: any nn.Module; it is moved to device at once.
    device: "auto" (cuda, else mps, else cpu), "cpu", "cuda:1", ... or a torch.device.
    history: the History of all fits so far, joined.
    Raises TypeError if net is not an nn.Module, ValueError for a device that is not there.
    """

    def __init__(self, net: nn.Module, device: str | torch.device = "auto") -> None:
        if isinstance(net, type) and issubclass(net, nn.Module):
            raise TypeError(f"Model(net) takes an nn.Module object, got the class: write Model({net.__name__}(...)).")
        if not isinstance(net, nn.Module):
            raise TypeError(f"Model(net) takes an nn.Module, got {type(net).__name__}.")
        self.device = resolve_device(device)
        self.net = net.to(self.device)
        self.history = History(self)
        self._compiled: Compiled | None = None
        self._loop = make_loop("script")
        self._is_jit = self._is_channels_last = False
        self._run: Run | None = None
        self._arguments: dict[str, Any] | None = None  # compile()'s, where a file can hold them
        self._saved: SavedState | None = None  # what the next compile() takes over
        self.last_fit = LastFit()

    def compile(
        self,
        loss: LossSpec | Sequence[LossSpec] | Mapping[str, LossSpec],
        optimizer: OptimizerSpec | Mapping[str, OptimizerSpec],
        metrics: MetricSpec | Iterable[Any] | Mapping[str, Any] | None = None,
        *,
        loss_weights: Sequence[float] | Mapping[str, float] | None = None,
        weighted_metrics: MetricSpec | Iterable[Any] | Mapping[str, Any] | None = None,
        lr_scheduler: SchedulerSpec | Mapping[str, SchedulerSpec] | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        param_groups: Mapping[str, Mapping[str, Any]] | None = None,
        mixed_precision: Literal["bf16", "fp16"] | None = None,
        gradient_accumulation_steps: int | Literal["auto"] = 1,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        unpack: Callable[[Any], Any] | None = None,
        jit_compile: bool | Mapping[str, Any] = False,
        channels_last: bool = False,
        loop: str | type[Loop] | Loop = "script",
        **unknown: NoReturn,
    ) -> None:
        """Settle how to train; a later compile() forgets this one wholly.

        loss: a name, an nn.Module (class or object; moved to the device, its parameters join an optimizer made here) or
        a callable (outputs, y) -> scalar or values per sample. Classification losses by name expect logits. A list or
        dict of losses, one for each output, is summed, times loss_weights, and logged as "<output>_loss".
        optimizer: a name (torch's defaults, fused where torch can), a class or factory called with the parameters, or
        an object; for a loop of your own also a dict of them, each over the part of the net that its key names.
        A lazy net's weights are drawn at the first batch, as net(x) in eval mode would draw them before the call.
         metrics: a name, torchmetrics object or function (outputs, y) -> tensor, or a list or dict of them;
        with several losses a dict by output or a list of lists, logged as "<output>_<metric>".
        weighted_metrics: as metrics, averaged with the sample weights.
        lr_scheduler: an object, class, factory (optimizer -> scheduler) or name ("cosine", "one_cycle",
        "reduce_on_plateau"), stepped each epoch or, with lr_scheduler_interval="step", each optimizer update; a dict
        beside a dict of optimizers.
        param_groups: {glob on parameter names: optimizer options}, the first match counts.
        mixed_precision: autocast in "bf16" or "fp16" (with a GradScaler).
        gradient_accumulation_steps: batches to an optimizer update; exact for short batches and at the epoch's end.
        "auto": one, cut into parts where a GPU's memory is too small for it (the same within rounding, but for batch
        norm and dropout, which see the parts).
        clip_grad_norm, clip_grad_value: > 0, in the gradients' units, after accumulation.
        unpack: batch -> x, (x, y) or (x, y, sample_weight), for loaders and Datasets whose batches have another form.
        jit_compile: compile the net in place by torch.compile; a dict holds its arguments. The first batches take
        seconds; what follows is the same within rounding.
        channels_last: keep images and convolutions' weights with the channels last in memory, which GPUs' tensor cores
        and bf16 on CPUs like.
        loop: "script", "function", "class" (equal to the bit), "graph" (the whole step as one graph, equal within
        rounding), a Loop class or object.
        Raises ValueError or TypeError for what is not known or does not fit, naming the nearest known.
        """
        _refuse_unknown("compile", unknown, Model.compile)
        _refuse_swapped(loss, optimizer)
        check_choice("lr_scheduler_interval", lr_scheduler_interval, ("epoch", "step"))
        check_choice("mixed_precision", mixed_precision, (None, *AUTOCAST_DTYPES))
        cuts_batches = gradient_accumulation_steps == "auto"
        num_steps = 1 if gradient_accumulation_steps == "auto" else gradient_accumulation_steps
        check_int("gradient_accumulation_steps", num_steps)
        for argument, value in (("clip_grad_norm", clip_grad_norm), ("clip_grad_value", clip_grad_value)):
            if value is not None and (isinstance(value, (bool, str)) or not value > 0):
                raise ValueError(f"{argument} must be above 0, got {value!r}.")
        if unpack is not None and not callable(unpack):
            raise TypeError(f"unpack must be a function of a batch, got {unpack!r}.")
        if channels_last and (lazy := lazy_names(self.net)):
            raise ValueError(
                f"channels_last lays out the weights, but the shape of {lazy[0]!r} is not known yet: run one batch "
                "through the lazy net before compile(), for example net(x[:1])."
            )
        jit_arguments = compile_arguments(self.net, jit_compile, self.device)
        made_loop = make_loop(loop)
        if cuts_batches and (has_own_train_step(made_loop) or isinstance(made_loop, GraphLoop)):
            raise ValueError(
                "gradient_accumulation_steps='auto' cuts batches into parts, for which a train_step of your own and "
                "loop='graph' are not made: give a number, or use loop='script'."
            )
        loss_fn = make_loss(loss, self.device, loss_weights)
        if not isinstance(optimizer, Mapping):
            made_optimizer = make_optimizer(optimizer, self.net, loss_fn, param_groups)
        elif mixed_precision == "fp16" and not has_own_train_step(made_loop):
            raise ValueError("several optimizers under fp16 need a train_step that gives each to the scaler.")
        elif is_own_loop(made_loop) and param_groups is None:
            made_optimizer = make_optimizers(optimizer, self.net, loss_fn)
        else:
            raise ValueError(
                "several optimizers need a train_step of your own, which says when each steps, and no param_groups: "
                "subclass ClassLoop, or give FunctionLoop(train_step=...)."
            )
        if isinstance(made_optimizer, torch.optim.LBFGS) and not has_own_train_step(made_loop):
            raise ValueError(
                "LBFGS calls the loss several times a step through a closure, which the built-in loops do not give it: "
                "subclass ClassLoop and call self.optimizer.step(closure) in train_step."
            )
        if not has_own_train_step(made_loop):
            check_clipping(self.net, made_optimizer, clip_grad_value)
        options = copy_options(made_optimizer)  # before a scheduler changes them
        scheduler = make_scheduler(lr_scheduler, made_optimizer)
        if lr_scheduler_interval == "step" and (scheduler is None or isinstance(scheduler, ReduceLROnPlateau)):
            given = "no lr_scheduler" if scheduler is None else "ReduceLROnPlateau, which reads an epoch's loss"
            raise ValueError(f"lr_scheduler_interval='step' beside {given}.")
        made_metrics = _make_metrics(metrics, loss_fn)
        made_weighted = _make_metrics(weighted_metrics, loss_fn, weighted=True)
        made_weighted = {f"weighted_{k}" if k in made_metrics else k: v for k, v in made_weighted.items()}
        compiled = Compiled(
            loss=loss_fn,
            optimizer=made_optimizer,
            scaler=torch.amp.GradScaler(self.device.type, enabled=mixed_precision == "fp16"),
            metrics=made_metrics,
            weighted_metrics=made_weighted,
            lr_scheduler=scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=num_steps,
            cuts_batches=cuts_batches,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=clip_grad_value,
            unpack=unpack,
            jit_compile=jit_compile,
            channels_last=channels_last,
            param_groups=options,
        )
        if self._saved is not None:
            take_over(standing_run(self._make_run(compiled), compiled), self._saved)
        self._compiled, self._saved = compiled, None
        self._arguments = plain_arguments(
            loss=loss,
            optimizer=optimizer,
            metrics=metrics,
            loss_weights=loss_weights,
            weighted_metrics=weighted_metrics,
            lr_scheduler=lr_scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            param_groups=param_groups,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=clip_grad_value,
            unpack=unpack,
            jit_compile=jit_compile,
            channels_last=channels_last,
            loop=loop,
        )
        self._loop = made_loop
        if self._is_jit:
            self.net._compiled_call_impl = None  # what Module.compile() set; nothing public takes it back
        self._is_jit = jit_arguments is not None
        if jit_arguments is not None:
            compile_in_place(self.net, jit_arguments)
        if channels_last or self._is_channels_last:
            self.net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self._is_channels_last = channels_last
        self.last_fit = LastFit()

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Verbose = "auto",
        callbacks: Iterable[Callback] | Callback | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Collection[int] = 1,
        resume: bool | str | os.PathLike[str] | None = None,
        on_interrupt: OnInterrupt = "auto",
        **unknown: NoReturn,
    ) -> History:
        """Train, and return the History of this call; called again it trains on.

        x: a DataLoader, a Dataset, tensors or arrays (y beside them, or x alone as (x, y)), or an iterable of batches.
        A batch is x, (x, y) or (x, y, sample_weight); x a tensor calls net(x), a tuple net(*x), a dict net(**x).
        batch_size: for arrays and Datasets; 32, or ceil(rows / steps_per_epoch).
        epochs: the index at which to end, counted from initial_epoch.
        verbose: "auto" and 1 a bar (a line an epoch without a terminal), 2 a line an epoch, 0 nothing.
        validation_split: share of rows, the last ones, that validate (arrays, map-style Datasets, plain loaders).
        validation_data: as x, (x, y) or (x, y, sample_weight); wins over validation_split.
        validation_freq: every n epochs, or the epochs (from 1) to validate.   shuffle: for arrays and Datasets.
        class_weight: {class index: weight}, 1 where missing, in training; multiplies sample_weight.
        sample_weight: (N,), one for each row of arrays, of a Dataset or of a plain loader's; also a batch's third item.
        steps_per_epoch: batches an epoch; the data goes on between epochs and starts again when used up.
        validation_steps: batches of each validation, from the beginning.
        resume: True goes on, to the bit, from the newest good file of the checkpointing callback given, or begins where
        there is none; a path from that file; False never, BackupAndRestore or not. epochs is the final index then, and
        the History holds the epochs before.
        on_interrupt: Ctrl-C or the stop button ends fit at the next optimizer step, after a last checkpoint and
        on_train_end; then fit may "return" its History or "raise" KeyboardInterrupt; "auto" returns where somebody
        types (a notebook, a prompt). With a callback that writes resume points SIGTERM does the same and exits with
        status 143. A second signal ends fit at once; an evaluate or predict of a callback's own runs to its end first.
        A loss of NaN goes on and shows in the History; callbacks.TerminateOnNaN ends it.
        Shuffling and dropout draw from torch's seed as a hand-written loop over the same loader does.
        Raises RuntimeError before compile(), ValueError or TypeError for arguments and data that don't fit.
        """
        _refuse_unknown("fit", unknown, Model.fit)
        check_on_interrupt(on_interrupt)
        compiled = self._get_compiled("fit")
        _check_steps(
            epochs=epochs,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
        )
        check_int("initial_epoch", initial_epoch, at_least=0)
        if initial_epoch >= epochs:
            raise ValueError(f"initial_epoch={initial_epoch} must be below epochs={epochs}, the final index.")
        for freq in validation_freq if isinstance(validation_freq, Collection) else [validation_freq]:
            check_int("validation_freq", freq)
        if isinstance(validation_freq, Collection) and not validation_freq:
            raise ValueError("validation_freq=[] names no epoch to validate in; leave validation_data away instead.")
        check_choice("shuffle", shuffle, (True, False))
        data = make_dataset(x, y, sample_weight, caller="fit")
        if not shuffle:
            warn_if_shuffled(data)
        val_data: BatchSource | None = None
        val_given = validation_data
        val_unpack = compiled.unpack if needs_unpack(validation_data, None) else None
        if validation_data is None and validation_split:
            if not isinstance(validation_split, Real) or not 0 < validation_split < 1:
                raise ValueError(f"validation_split must be between 0 and 1, got {validation_split!r}.")
            data, validation_data = split_dataset(data, validation_split)
            val_given = x
            val_unpack = compiled.unpack if needs_unpack(x, y) else None
        source = make_source(
            data,
            name="fit()'s training data",
            batch_size=batch_size,
            shuffle=shuffle,
            steps=steps_per_epoch,
            unpack=compiled.unpack if needs_unpack(x, y) else None,
        )
        if validation_data is not None:
            rows = make_dataset(validation_data, caller="validation_data of fit")
            if validation_batch_size is None and (isinstance(rows, Dataset) or is_map_style(rows)):
                validation_batch_size = batch_size
            val_data = make_source(
                rows, name="fit()'s validation_data", batch_size=validation_batch_size, unpack=val_unpack
            )
        elif (validation_steps, validation_batch_size, validation_freq) != (None, None, 1):
            raise ValueError("validation_steps, validation_batch_size and validation_freq need validation_data.")

        given = {
            "rows": _array_rows(x, source),
            "val_rows": _array_rows(val_given, val_data),
            "is_split": bool(validation_split) and val_given is x,
            "is_tuple": isinstance(getattr(source.batches, "dataset", None), TensorDataset),
            "shuffle": shuffle,
        }
        progress = Progress(verbose)
        callback_list = CallbackList(callbacks)
        run = Run(
            self.net,
            self.device,
            compiled,
            callbacks=callback_list,
            progress=progress,
            train_data=source,
            val_data=val_data,
            epochs=epochs,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_freq=validation_freq,
            class_weight=class_weight,
            logs_are_known=not is_own_loop(self._loop) and callback_list.are_all_built_in,
            earlier_history=self.history,
        )
        run.check_before_start()
        run.history = History(self, run.params)
        found = find_checkpoint(resume, callback_list.checkpointers)
        if resume is True and found is None:
            progress.say("No checkpoint yet: training begins at the beginning.")
        try:
            with (
                caught_signals(run.note_interrupt, sigterm=callback_list.writes_resume_points),
                self._running(run),
                self._scheduler(run, compiled) as run.lr_scheduler,
            ):
                if found is not None:
                    run.resume_from, path = found
                    run.resume_path = str(path)
                    check_content(run, run.resume_from, path)
                    progress.say(f"Going on from {path}.")
                try:
                    if compiled.cuts_batches:
                        self._fit_in_memory(run, compiled)
                    else:
                        self._loop.fit(run)
                    if not (run.history.epoch or found or run.stop_training or run.interrupt):
                        raise RuntimeError("the loop's fit trained no epoch: it must go over run.epoch_range().")
                finally:
                    self.last_fit = run.describe_fit(class_weight, **given)
        finally:
            self.history.extend(run.history)
        if run.interrupt is not None:
            progress.say(f"Interrupted in epoch {run.epoch + 1}, after batch {run.batch + 1}.")
            end_interrupted(run.interrupt, on_interrupt)
        return run.history

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        *,
        batch_size: int | None = None,
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Iterable[Callback] | Callback | None = None,
        verbose: Verbose = "auto",
        return_dict: bool = True,
        **unknown: NoReturn,
    ) -> dict[str, LogValue] | LogValue | list[LogValue]:
        """Return {"loss": ..., metric: ...} over the data, weighted by samples, in eval mode.

        x, y, sample_weight, batch_size, verbose: as in fit; no shuffling.   steps: batches to read, from the beginning.
        return_dict=False: a list, loss first, or the loss alone where there are no metrics, as Keras does.
        Random states and training flags are left as they were.   Raises as fit does.
        """
        _refuse_unknown("evaluate", unknown, Model.evaluate)
        compiled = self._get_compiled("evaluate")
        run = self._make_reading_run(compiled, "evaluate", x, y, sample_weight, batch_size, steps, callbacks, verbose)
        with preserved_random_state(*run.generators), self._running(run):
            run.progress.begin("Evaluate", steps or run.num_batches)
            self._loop.evaluate(run)
            if not run.val_logs:
                raise RuntimeError("the loop's evaluate recorded nothing: it must go over run.eval_batches().")
            run.progress.end(run.val_logs)
        if return_dict:
            return run.val_logs
        values = list(run.val_logs.values())
        return values if len(values) > 1 else values[0]

    def predict(
        self,
        x: Any = None,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        callbacks: Iterable[Callback] | Callback | None = None,
        verbose: Verbose = "auto",
        **unknown: NoReturn,
    ) -> Nested:
        """Return what forward returns for all rows, in order, in eval mode: numpy arrays, nested as the outputs are.

        Logits stay logits. Targets in the batches are ignored; bfloat16 comes out as float32. Works before compile().
        x, batch_size, verbose: as in fit; no shuffling.   steps: batches to read, from the beginning.
        Random states and training flags are left as they were.   Raises as fit does.
        """
        _refuse_unknown("predict", unknown, Model.predict)
        run = self._make_reading_run(self._compiled, "predict", x, None, None, batch_size, steps, callbacks, verbose)
        with preserved_random_state(*run.generators), self._running(run):
            run.progress.begin("Predict", steps or run.num_batches)
            self._loop.predict(run)
            run.progress.end({})
        return run.predictions()

    def predict_iter(
        self, x: Any = None, *, batch_size: int | None = None, steps: int | None = None
    ) -> Iterator[Nested]:
        """Yield what predict joins, batch by batch: numpy arrays, nested as the outputs are; memory for one batch.

        x, batch_size, steps: as in predict. Outputs need no batch axis. Random states and training flags are left as
        they were, also between two batches.   Raises as predict does, when the first batch is asked for.
        """
        _check_steps(batch_size=batch_size, steps=steps)
        unpack = self._compiled.unpack if self._compiled is not None and needs_unpack(x, None) else None
        data = make_dataset(x, caller="predict_iter")
        source = make_source(data, name="predict_iter()'s data", batch_size=batch_size, unpack=unpack)
        batches, generators = source.one_pass(steps), source.generators
        own_state = get_random_state(*generators)  # a stream of its own, so that the caller's is never moved
        while True:
            with preserved_random_state(*generators):
                set_random_state(own_state, *generators)
                batch = next(batches, None)
                if batch is None:
                    return
                (x, _, _), _ = batch
                one = BatchSource([(x,)], name="predict_iter()'s batch", converts=False)
                run = self._make_run(self._compiled, val_data=one, joins=False)
                with self._running(run):
                    self._loop.predict(run)
                own_state = get_random_state(*generators)
            yield run.last_outputs

    def check(self, x: Any, y: Any = None, *, batch_size: int | None = None, steps: int = 50) -> Report:
        """Return a Report of what looks wrong before training, found on a copy of the model.

        Shapes by layer, the loss at the start against chance, parameters without a gradient, dead units, scales of
        inputs and targets, whether one batch can be learnt in `steps` steps, loader against step time, memory.
        x, y, batch_size: as in fit. Weights, random states and the data's position are left as they were.
        Raises RuntimeError before compile(), ValueError for data that can be read only once.
        """
        return check_model(self, x, y, batch_size=batch_size, steps=steps)

    def summary(self, x: Any = None) -> Summary:
        """Return a Summary: layers, output shapes, parameters, memory and FLOPs; text, or a table in a notebook.

        x: a batch of inputs, as in predict_on_batch, or its size, (32, 1, 28, 28); a tuple, list or dict of either for
        several; sizes become random floats: integers, for an embedding, need a batch. None: no shapes and no FLOPs. The
        net is left as it was.
        Raises TypeError or ValueError for what is neither batch nor size.
        """
        return summarize(self, x)

    def eject(
        self,
        style: Literal["script", "function", "class"],
        path: str | os.PathLike[str] | None = None,
        *,
        callbacks: Iterable[Callback] | Callback | None = None,
        class_weight: Mapping[int, float] | None = None,
    ) -> str:
        """Return the training of this model as one file of plain PyTorch, and write it to path if given.

        style: how its loop reads: "script" (all in train), "function" or "class".
        callbacks, class_weight: those of the last fit, unless given; [] and {} mean none.
        Its train(net, optimizer, loss_fn, metrics, train_data, val_data, epochs, *, ...) has what this model uses and
        no more, its first lines show how to call it. On a CPU it gives fit's weights to the bit and fit's history.
        Raises RuntimeError before compile(), ValueError for what can't be written out, with the way out.
        """
        return eject_model(self, style, path, callbacks=callbacks, class_weight=class_weight)

    def export(
        self,
        path: str | os.PathLike[str],
        example: Any,
        *,
        dynamic_batch: bool = True,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        aot_inductor: bool = False,
        tolerance: float = 1e-4,
    ) -> ExportReport:
        """Write the net, in eval mode, to a file that runs without its class; return how near the file is.

        path: .onnx (needs the extra "export") or .pt2, of torch.export; kt.load_exported(path) opens either.
        example: a batch of inputs, as in predict_on_batch, or its size, (32, 1, 28, 28); a tuple, list or dict for
        several.   dynamic_batch: let the file take any number of rows, otherwise only as many as example has; an input
        with as many rows as the first has is taken for batched.
        input_names, output_names: for .onnx, in order; forward's own, and the outputs' keys or "output", by default.
        aot_inductor: compile the .pt2 to machine code for this kind of device (needs a C++ compiler; it takes a while).
        tolerance: how far an output may differ, as a share of its largest value; 1e-6 is let through always.
        Precision is the weights' own, whatever compile() was told. The file is loaded again and compared with the net,
        on fresh inputs of two batch sizes, before it takes its name; weights beyond 1.5 GB of an .onnx stand beside it,
        in path + ".data". Net and random states stay as they were.
        Raises ValueError, naming the part, for what can't be exported or comes out otherwise (no file is left, an
        earlier one stays), TypeError for inputs and outputs that are not tensors, ImportError without the extra.
        """
        return export_model(
            self,
            path,
            example,
            dynamic_batch=dynamic_batch,
            input_names=input_names,
            output_names=output_names,
            aot_inductor=aot_inductor,
            tolerance=tolerance,
        )

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Write the net's state_dict to a file that plain torch opens or to .safetensors (an extra).

        path: .pt, .pth, .bin or .ckpt for torch's format, whichever, or .safetensors.
        Its keys are the bare net's. A crash leaves the old file or the new one, whole.
        Raises ValueError for another suffix and for a lazy net before its first batch, TypeError for what such a file
        can't hold, OSError where it can't be written, ImportError without safetensors.
        """
        save_weights(self.net, path)

    def load_weights(self, path: str | os.PathLike[str], strict: bool = True) -> LoadReport:
        """Load weights into the net; return what was loaded, missing, unexpected and mismatched.

        path: a state_dict written by torch.save, by itself or as a training script's "model_state_dict", "state_dict"
        or "model"; .safetensors; the .index.json of sharded files. Prefixes "module." and "_orig_mod." do not matter.
        strict: False loads what fits. The optimizer's state stays as it is; states of Model.load's file, which the next
        compile() was to take over, are dropped.
        Raises ValueError with all keys that do not fit, where strict, or where none fits; CheckpointError for a file
        that is damaged or would run code. The net is as it was then.
        """
        report = load_weights(self.net, path, strict=strict)
        self._saved = None
        return report

    def save(self, path: str | os.PathLike[str], *, whole: bool = False) -> None:
        """Write weights, states of optimizer, scheduler and scaler, history and random states, for Model.load.

        The file has the keys of ModelCheckpoint's and opens with torch.load(path, weights_only=True); compile()'s
        arguments are in it where all are names or plain values. Between fits: inside one use ModelCheckpoint.
        path: .pt, .pth, .bin or .ckpt.
        whole: pickle the net too, so that Model.load needs only its classes; opening the file runs code.
        Raises ValueError for another suffix and for a lazy net before its first batch, TypeError, naming the part, for
        what the file can't hold, OSError where it can't be written.
        """
        history = History()
        for one in (self.history, *([self._run.history] if self._run is not None else [])):
            history.extend(one)
        compiled = self._compiled
        run = standing_run(self._make_run(compiled), compiled) if compiled is not None else None
        write_model(self.net, path, get_model_content(run, history, self._arguments, self._saved), whole=whole)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        net: nn.Module | None = None,
        *,
        device: str | torch.device = "auto",
        trust: bool = False,
    ) -> Model:
        """Return the Model that save() wrote, over net, whose weights are replaced; fit goes on to the bit.

        Random states are set to those saved. Where compile()'s arguments are not all in the file the model comes
        uncompiled: the next compile() takes over the states of optimizer, scheduler and scaler, or names what does not
        fit. path: also a checkpoint of ModelCheckpoint's (its published weights) or of a training script's, whose
        states are "optimizer_state_dict" or "optimizer", "lr_scheduler_state_dict", "lr_scheduler" or "scheduler".
        trust: run whatever code the file holds; without net it gives the net too, by save(whole=True) or torch.save.
        Raises ValueError with all keys that do not fit, and for a file of weights alone in another format than torch's;
        CheckpointError for a file that is damaged or, without trust, would run code.
        net and random states are as they were then.
        """
        content, net, file = read_model(path, net, trust=trust)
        model = cls(net, device)
        with taking_up(model.net, content, file):
            model.history.load_state_dict(find_history(content))
            model._saved = find_state(content, file)
            arguments = find_arguments(content, file)
            if arguments is not None:
                model.compile(**arguments)
        return model

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Mapping[int, float] | None = None
    ) -> dict[str, LogValue]:
        """Train on one batch, with an optimizer update; return {"loss": ..., metric: ...} of this batch alone.

        x, y, sample_weight, class_weight: as in fit. A scheduler that steps by update advances; one that steps by
        epoch, or that spans a fit, does not; no History.   Raises as fit does.
        """
        compiled = self._get_compiled("train_on_batch")
        source = _one_batch(compiled, x, y, sample_weight, "train_on_batch")
        run = self._make_run(compiled, train_data=source, class_weight=class_weight)
        if compiled.lr_scheduler_interval == "step" and not isinstance(compiled.lr_scheduler, str):
            run.lr_scheduler = compiled.lr_scheduler
        with self._running(run):
            self._loop.fit(run)
        return run.epoch_logs()

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None) -> dict[str, LogValue]:
        """Return {"loss": ..., metric: ...} of one batch in eval mode.   Raises as fit does."""
        compiled = self._get_compiled("test_on_batch")
        run = self._make_run(compiled, val_data=_one_batch(compiled, x, y, sample_weight, "test_on_batch"))
        with preserved_random_state(), self._running(run):
            self._loop.evaluate(run)
        return run.val_logs

    def predict_on_batch(self, x: Any) -> Nested:
        """Return the outputs for one batch in eval mode: numpy arrays, nested as the outputs are."""
        run = self._make_run(self._compiled, val_data=_one_batch(self._compiled, x, None, None, "predict_on_batch"))
        with preserved_random_state(), self._running(run):
            self._loop.predict(run)
        return run.predictions()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return net(*args, **kwargs), tensors moved to the device; in the mode that the net is in."""
        return self.net(*move_to_device(args, self.device), **move_to_device(kwargs, self.device))

    def __repr__(self) -> str:
        compiled = "compiled" if self._compiled is not None else "not compiled"
        return f"Model({type(self.net).__name__}, device={str(self.device)!r}, {compiled})"

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer of compile(), None before it."""
        return self._compiled.optimizer if self._compiled is not None else None

    @property
    def compiled(self) -> Compiled | None:
        """What compile() settled, None before it; to be read."""
        return self._compiled

    @property
    def loop(self) -> Loop:
        """The loop that trains."""
        return self._loop

    @property
    def stop_training(self) -> bool:
        """Set it to True, from a callback, to end fit after this batch; validation and on_epoch_end still come."""
        return self._run is not None and self._run.stop_training

    @stop_training.setter
    def stop_training(self, value: bool) -> None:
        if self._run is None:
            raise RuntimeError("stop_training can be set only while fit() runs, from a callback.")
        self._run.stop_training = value

    def _get_compiled(self, verb: str) -> Compiled:
        if self._compiled is None:
            raise RuntimeError(f'call compile() before {verb}(), for example model.compile("cross_entropy", "adam").')
        return self._compiled

    def _make_run(self, compiled: Compiled | None, **arguments: Any) -> Run:
        arguments = {"callbacks": CallbackList(None), "progress": Progress(0), **arguments}
        return Run(self.net, self.device, compiled, **arguments)

    def _make_reading_run(
        self,
        compiled: Compiled | None,
        verb: str,
        x: Any,
        y: Any,
        sample_weight: Any,
        batch_size: int | None,
        steps: int | None,
        callbacks: Iterable[Callback] | Callback | None,
        verbose: Verbose,
    ) -> Run:
        _check_steps(batch_size=batch_size, steps=steps)
        source = make_source(
            make_dataset(x, y, sample_weight, caller=verb),
            name=f"{verb}()'s data",
            batch_size=batch_size,
            unpack=compiled.unpack if compiled is not None and needs_unpack(x, y) else None,
        )
        run = self._make_run(
            compiled,
            callbacks=CallbackList(callbacks),
            progress=Progress(verbose),
            val_data=source if self._run is None else source.another(),
            validation_steps=steps,
        )
        run.check_before_start()
        return run

    @contextmanager
    def _running(self, run: Run) -> Iterator[None]:
        """Lend the loop to run; a call from inside another's callback gives it back to that one."""
        outer, self._run = self._run, run
        bound: Run | None = vars(self._loop).get("run")  # another Model's, where two share a loop
        training = {module: module.training for module in self.net.modules()}
        self._loop.bind(run)
        if not is_own_loop(self._loop):  # whose steps may call the net in another way
            run.await_shapes()
        try:
            run.callbacks.begin(self, run, run.params)
            with told_apart(self._compiled is not None and self._compiled.jit_compile):
                yield
        except BaseException:
            with suppress(Exception):  # what went wrong first comes out
                run.callbacks.close()
            raise
        else:
            run.callbacks.close()
        finally:
            self._run = outer
            self._loop.unbind()
            if bound is not None:
                self._loop.bind(bound)
            run.release()
            for module, flag in training.items():
                module.training = flag
            run.progress.close()

    def _fit_in_memory(self, run: Run, compiled: Compiled) -> None:
        """Train; begin again at the batch that was too large, in parts, where compile() was told to."""
        while True:
            try:
                return self._loop.fit(run)
            except torch.OutOfMemoryError as error:
                run.cut_more(error)
                compiled.num_parts = run.num_parts
                traceback.clear_frames(error.__traceback__)  # which hold the tensors of the step
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _scheduler(self, run: Run, compiled: Compiled) -> AbstractContextManager[LRScheduler | None]:
        if not isinstance(compiled.lr_scheduler, str):
            return nullcontext(compiled.lr_scheduler)
        return spanning_scheduler(compiled.lr_scheduler, compiled.optimizer, run.num_scheduler_steps)


def _one_batch(compiled: Compiled | None, x: Any, y: Any, sample_weight: Any, verb: str) -> BatchSource:
    if compiled is not None and compiled.unpack is not None and sample_weight is None and needs_unpack(x, y):
        return BatchSource([to_tensors(x, strict=False)], name=f"{verb}()'s batch", unpack=compiled.unpack)
    parts: tuple[Any, ...] = (x,) if y is None else (x, y)
    if sample_weight is not None:
        parts = (x, y, sample_weight)
    batch = tuple(to_tensors(part, target=i == 1) for i, part in enumerate(parts))
    return BatchSource([batch], name=f"{verb}()'s batch")


def _array_rows(given: Any, source: BatchSource | None) -> int | None:
    """Return the rows of arrays, None for data that came as a Dataset or in batches."""
    dataset = getattr(source.batches, "dataset", None) if source is not None else None
    if type(dataset) is not TensorDataset or isinstance(given, (Dataset, DataLoader)):
        return None
    return len(dataset)


def _make_metrics(metrics: Any, loss_fn: LossFunction, *, weighted: bool = False) -> dict[str, AnyMetric]:
    if not isinstance(loss_fn, OutputLosses):
        return make_metrics(metrics, loss_scale(loss_fn), ignored_class(loss_fn), weighted=weighted)
    scales = {key: (loss_scale(part), ignored_class(part)) for key, part in loss_fn.losses.items()}
    return make_output_metrics(metrics, scales, weighted=weighted)


def _check_steps(**arguments: int | None) -> None:
    for argument, value in arguments.items():
        if value is not None:
            check_int(argument, value)


def _refuse_unknown(verb: str, unknown: Mapping[str, Any], function: Callable[..., Any]) -> None:
    for name in unknown:
        code = function.__code__
        known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        raise TypeError(f"{verb}() has no argument {name!r}{did_you_mean(name, known)} Known: {', '.join(known)}.")


def _refuse_swapped(loss: object, optimizer: object) -> None:
    is_optimizer = isinstance(loss, Optimizer) or (isinstance(loss, type) and issubclass(loss, Optimizer))
    if (isinstance(loss, str) and loss.lower() in OPTIMIZERS and loss.lower() not in LOSSES) or is_optimizer:
        is_loss = isinstance(optimizer, str) and optimizer.lower() in LOSSES
        line = f"compile({optimizer!r}, {loss!r})" if is_loss and isinstance(loss, str) else "compile(loss, optimizer)"
        raise ValueError(f"compile() takes the loss first, then the optimizer: write {line}.")
