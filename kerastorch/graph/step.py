"""GraphStep: a training step as one graph, and when it is one. loops/graph_loop.py trains with it.

Sisters: compiled_step.py and captured_step.py, the graphs; parts.py, what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kerastorch.device import Nested, leaves, map_nested, preserved_random_state
from kerastorch.graph.captured_step import CapturedStep, as_in_a_capture
from kerastorch.graph.compiled_step import CompiledStep
from kerastorch.graph.optimizer_twin import OptimizerTwin, pre_hooks, step_hooks
from kerastorch.graph.parts import (
    Batch,
    Result,
    StepParts,
    another_each_time,
    detached,
    join_results,
    no_graph,
    split_batch,
    what_is_held,
)
from kerastorch.run import Run

Step = Callable[[Run, Any, Any, Tensor | None], tuple[Tensor, Any]]
WARM_UP = 3  # eager steps before a capture, in which libraries choose their kernels and optimizers make their state
MAX_CHANGES = 3  # of the optimizer's options in a fit
MAX_TOGETHER = 32  # steps in one capture: launching it costs some 10 us, and each step's share is small change then
MAX_RESULT_BYTES = 2**24  # of their outputs, which are kept until the last one's are there
SMALL_NET_BYTES = 2**22  # of a net whose steps are all launches; a larger one's take long enough by themselves


class GraphStep:
    """Does forward, loss, backward, clipping and update as one graph; returns (loss, outputs) as a train_step does.

    run: of the fit.   eager_step: does the same for batches that no graph is for: a short last one, any of another
    shape than the first full one, and on a GPU the first few.
    Raises ValueError for what a graph can't hold, with the reason and the way out.
    """

    def __init__(self, run: Run, eager_step: Step) -> None:
        self.eager_step = eager_step
        self._is_cuda = run.device.type == "cuda"
        self._parameters: list[nn.Parameter] = []  # that a step finds gradients of; none before the first graph
        self._gradients: list[Tensor] = []  # theirs, each in a place of its own
        self._graphs: dict[tuple[bool, bool, int], CompiledStep | CapturedStep] = {}
        self._twin: OptimizerTwin | None = None
        self._batch_form: Nested = None
        self._held: list[Any] = []  # what the graphs hold of net and loss
        self._warm_up = WARM_UP
        self._settings = _settings(run)

    @property
    def is_busy(self) -> bool:
        """Whether a fit is going on."""
        return "run" in vars(self)

    def fits(self, run: Run) -> bool:
        """Whether another fit is of the same net, loss, optimizer and options, so that its graphs can go on."""
        return all(one is other or one == other for one, other in zip(self._settings, _settings(run), strict=True))

    def begin(self, run: Run) -> None:
        """Take up a fit. Raises ValueError as GraphStep does."""
        _refuse(run)
        self.run, self._num_changes, self._is_fresh = run, 0, True
        if self._twin is not None:
            self._twin.begin()

    def begin_epoch(self) -> None:
        """Forget the graphs where what they hold has changed since the last epoch: a part is frozen, say."""
        _refuse_gradient_hooks(self.run.net)
        held = what_is_held(self.run)
        if held != self._held or (self._is_cuda and self._twin is not None and self._twin.has_moved()):
            self._forget()
        self._held = held
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        for graph in self._graphs.values():
            graph.begin_epoch(self.run)
        self._train_together()

    def __call__(self, x: Nested, y: Nested, sample_weight: Tensor | None) -> tuple[Tensor, Any]:
        run, window = self.run, self.run.window
        is_first, is_due = len(window) == 1, run.step_is_due
        is_whole = window[-1] == window[0] and (not is_due or len(window) == run.gradient_accumulation_steps)
        batch, n = (x, y, sample_weight), run.num_together
        if run.is_full_batch and is_first and is_whole:
            is_other = self._is_fresh and self._twin is not None and _form(batch, n) != self._batch_form
            if is_other and run.num_batches != 1:  # the last fit's batches were others
                self._forget()
                self._train_together()
            self._is_fresh = False
            if self._twin is None and n == 1:
                self._prepare(x, y, sample_weight)
        twin = self._twin
        if twin is None or not is_whole or _form(batch, n) != self._batch_form:
            return self._step_each_eagerly(batch, n)
        if not twin.follow():
            if is_first:  # else gradients of the window would be lost
                self._note_change(twin)
            return self._step_each_eagerly(batch, n)
        graph = self._graphs.get((is_first, is_due, n))
        if graph is None:
            parts = StepParts(run, self._parameters, self._gradients, twin, is_first, is_due)
            graph = CapturedStep(parts, batch, n, self._pool) if self._is_cuda else CompiledStep(parts)
            self._graphs[is_first, is_due, n] = graph
            self._train_together()
        loss, outputs, run.loss_fn.parts = graph(x, y, sample_weight)
        if is_due:
            twin.call_hooks()
        return loss, outputs

    def end(self) -> None:
        """Leave no gradients behind, which the next backward would add to, and hold no data."""
        self._drop_gradients()
        if self._twin is not None:
            self._twin.end()
        vars(self).pop("run")

    def _forget(self) -> None:
        self._drop_gradients()
        if self._twin is not None:
            self._twin.end()
        self._parameters, self._gradients, self._graphs, self._twin = [], [], {}, None
        self._warm_up = WARM_UP

    @property
    def _pool(self) -> Any:
        """Memory that captures share: none is replayed before another's results were copied."""
        return next((graph.pool for graph in self._graphs.values() if isinstance(graph, CapturedStep)), None)

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _train_together(self) -> None:
        """Ask for several batches at once where a capture has shown how large a step's results are."""
        graph, most = self._graphs.get((True, True, 1)), 1
        if isinstance(graph, CapturedStep) and graph.can_be_joined and not step_hooks(self.run.optimizer):
            net_bytes = sum(parameter.nbytes for parameter in self._parameters)
            limits = MAX_TOGETHER * SMALL_NET_BYTES // max(1, net_bytes), MAX_RESULT_BYTES // max(1, graph.result_bytes)
            most = max(1, min(MAX_TOGETHER, *limits))
        self.run.train_together(most)

    def _prepare(self, x: Nested, y: Nested, sample_weight: Tensor | None) -> None:
        """Settle what the graph is of; on a GPU after some eager steps."""
        run = self.run
        if self._is_cuda and self._warm_up:
            self._warm_up -= 1
            return
        for leaf in leaves((x, y, sample_weight)):
            if not (leaf is None or isinstance(leaf, (Tensor, bool, int, float, str))):
                raise ValueError(f"loop='graph' can't hold a {type(leaf).__name__} of a batch: use loop='script'.")
        self._parameters = self._try_out(x, y, sample_weight)
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._twin = OptimizerTwin(run.optimizer, is_captured=self._is_cuda)
        self._batch_form = _form((x, y, sample_weight), 1)

    def _try_out(self, x: Nested, y: Nested, sample_weight: Tensor | None) -> list[nn.Parameter]:
        """Go forward and back once, for the first look at a batch; return the parameters that got gradients.

        Weights, buffers and random states are left as they were.
        """
        run = self.run
        buffers = [(buffer, buffer.clone()) for buffer in run.net.buffers()]
        parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
        try:
            with preserved_random_state(), as_in_a_capture(run.device) if self._is_cuda else nullcontext():
                with run.autocast():
                    loss = run.loss_fn(run.forward(x), y, sample_weight)
                loss.backward()
        except RuntimeError as error:  # such a step went well before, but with waits for the GPU
            if not self._is_cuda or isinstance(error, torch.OutOfMemoryError):
                raise
            raise no_graph(error, run.net) from error
        seen = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in [*run.net.parameters(), *parameters]:
            parameter.grad = None
        for (buffer, before), now in zip(buffers, run.net.buffers(), strict=True):
            if now is not buffer:
                raise another_each_time()
            buffer.copy_(before)
        return seen

    def _step_each_eagerly(self, batch: Batch, n: int) -> tuple[Tensor, Any]:
        loss, outputs, self.run.loss_fn.parts = join_results(
            [self._step_eagerly(*part) for part in split_batch(batch, n)]
        )
        return loss, outputs

    def _step_eagerly(self, x: Nested, y: Nested, sample_weight: Tensor | None) -> Result:
        run = self.run
        if len(run.window) == 1:
            self._drop_gradients()
        loss, outputs = self.eager_step(run, x, y, sample_weight)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        return loss.detach(), map_nested(detached, outputs), dict(run.loss_fn.parts)

    def _note_change(self, twin: OptimizerTwin) -> None:
        """Forget the graphs of other options, or of another state, of the optimizer's."""
        self._num_changes += twin.changed is not None
        if self._num_changes > MAX_CHANGES:
            raise ValueError(
                f"loop='graph': the optimizer's {twin.changed} changes again and again, but a graph holds it. "
                "Let schedules change lr alone, as OneCycleLR(..., cycle_momentum=False) does, or use loop='script'."
            )
        self._forget()
        self._train_together()


def _settings(run: Run) -> tuple[Any, ...]:
    """Return what a graph is made for."""
    options = (run.mixed_precision, run.gradient_accumulation_steps, run.clip_grad_norm, run.clip_grad_value)
    return run.net, run.optimizer, run.loss_fn.fn, *options


def _refuse(run: Run) -> None:
    reason = None
    if run.scaler.is_enabled():
        reason = "the fp16 scaler decides on the host whether to step: use mixed_precision='bf16'"
    elif run.device.type not in ("cpu", "cuda"):
        reason = f"it is for 'cpu' and 'cuda', not {run.device.type!r}"
    elif run.device.type == "cpu" and any(isinstance(module, nn.RNNBase) for module in run.net.modules()):
        reason = "torch.compile does not trace nn.RNN, nn.LSTM and nn.GRU"
    elif pre_hooks(run.optimizer):
        reason = "hooks on the optimizer's step would not be called before it"
    elif not all("lr" in group for group in run.optimizer.param_groups):
        reason = f"{type(run.optimizer).__name__} has no rate, lr, in its param groups"
    elif run.device.type == "cuda" and not all(
        {"fused", "capturable"} & {*group} for group in run.optimizer.param_groups
    ):
        reason = f"torch can't capture the step of {type(run.optimizer).__name__}"
    if reason is not None:
        raise ValueError(f"loop='graph': {reason}; or use loop='script'.")


def _refuse_gradient_hooks(net: nn.Module) -> None:
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in net.parameters()):
        raise ValueError("loop='graph': hooks on the parameters' gradients would not be called; or use loop='script'.")


def _form(batch: Batch, n: int) -> Nested:
    """Return what each of n joined batches must have in common with the one that a graph was made of."""

    def form(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (len(leaf) // n, *leaf.shape[1:]) if n > 1 else leaf.shape, leaf.dtype, leaf.stride()

    return map_nested(form, batch)
