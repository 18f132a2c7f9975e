"""A training step as one graph: compiled on a CPU, captured on a GPU. loops/graph_loop.py trains with it.

Sister: run.py below.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.optim import Optimizer

from kerastorch.device import Nested, leaves, map_nested, num_samples, preserved_random_state
from kerastorch.graph_scalars import scalars_once
from kerastorch.run import Run

Step = Callable[[Run, Any, Any, Tensor | None], tuple[Tensor, Any]]
Batch = tuple[Any, Any, Any]  # x, y, sample_weight
Result = tuple[Tensor, Any, dict[str, Tensor]]  # loss, outputs, the losses by output
Graph = Callable[[Any, Any, Tensor | None], Result]
NOT_THE_USERS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
PYTHON_CALL = re.compile(r'File "(.+)", line (\d+), in .+\n\s*(.+)')  # in a traceback
WARM_UP = 3  # eager steps before a capture
CHECKED_CALLS = 3  # of a compiled step, which show whether it is the same each time
MAX_CHANGES = 3  # of the optimizer's options in a fit
MAX_TOGETHER = 32  # steps in one capture: launching it costs some 10 us, and each step's share is small change then
MAX_RESULT_BYTES = 2**24  # of their outputs, which are kept until the last one's are there


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
        self._flags: list[bool] = []  # which parameters require gradients
        self._warm_up = WARM_UP
        self._settings = _settings(run)

    def fits(self, run: Run) -> bool:
        """Whether another fit is of the same net, loss, optimizer and options, so that its graphs can go on."""
        return all(one is other or one == other for one, other in zip(self._settings, _settings(run), strict=True))

    def begin(self, run: Run) -> None:
        """Take up a fit. Raises ValueError as GraphStep does."""
        _refuse(run)
        self.run, self._num_changes = run, 0

    def begin_epoch(self) -> None:
        """Look whether somebody froze or thawed a part of the net since the last epoch."""
        flags = [parameter.requires_grad for parameter in self.run.net.parameters()]
        if flags != self._flags:
            self._drop_gradients()
            self._parameters, self._gradients, self._graphs = [], [], {}
        self._flags = flags
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        for graph in self._graphs.values():
            graph.begin_epoch(self.run)
        self._train_together()

    def __call__(self, x: Nested, y: Nested, sample_weight: Tensor | None) -> tuple[Tensor, Any]:
        run, window = self.run, self.run.window
        is_first, is_due = len(window) == 1, run.step_is_due
        is_whole = window[-1] == window[0] and (not is_due or len(window) == run.gradient_accumulation_steps)
        if not self._parameters and is_first and is_whole and run.is_full_batch:
            self._prepare(x, y, sample_weight)
        batch, n = (x, y, sample_weight), run.num_together
        if not self._parameters or not is_whole or _form(batch, n) != self._batch_form:
            loss, outputs, run.loss_fn.parts = _join([self._step_eagerly(*part) for part in _parts(batch, n)])
            return loss, outputs
        if not self._twin.follow():
            self._note_change()
        graph = self._graphs.get((is_first, is_due, n))
        if graph is None:
            parts = StepParts(run, self._parameters, self._gradients, self._twin, is_first, is_due)
            graph = CapturedStep(parts, batch, n) if self._is_cuda else CompiledStep(parts)
            self._graphs[is_first, is_due, n] = graph
            self._train_together()
        loss, outputs, run.loss_fn.parts = graph(x, y, sample_weight)
        if is_due:
            self._twin.call_hooks()
        return loss, outputs

    def end(self) -> None:
        """Leave no gradients behind, which the next backward would add to, and hold no data."""
        self._drop_gradients()
        vars(self).pop("run")

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _train_together(self) -> None:
        """Ask for several batches at once where a capture has shown how large a step's results are."""
        graph, most = self._graphs.get((True, True, 1)), 1
        if isinstance(graph, CapturedStep) and graph.can_be_joined and not _hooks(self.run.optimizer):
            most = max(1, min(MAX_TOGETHER, MAX_RESULT_BYTES // max(1, graph.result_bytes)))
        self.run.train_together(most)

    def _prepare(self, x: Nested, y: Nested, sample_weight: Tensor | None) -> None:
        """Settle what the graph is of; on a GPU after the eager steps in which libraries choose their kernels."""
        run = self.run
        if self._is_cuda and self._warm_up:
            self._warm_up -= 1
            return
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
        with preserved_random_state(), _side_stream() if self._is_cuda else nullcontext():
            with run.autocast():
                loss = run.loss_fn(run.forward(x), y, sample_weight)
            loss.backward()
        seen = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in [*run.net.parameters(), *parameters]:
            parameter.grad = None
        for buffer, before in buffers:
            buffer.copy_(before)
        return seen

    def _step_eagerly(self, x: Nested, y: Nested, sample_weight: Tensor | None) -> Result:
        run = self.run
        if len(run.window) == 1:
            self._drop_gradients()
        loss, outputs = self.eager_step(run, x, y, sample_weight)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        return loss.detach(), map_nested(_detach, outputs), dict(run.loss_fn.parts)

    def _note_change(self) -> None:
        self._num_changes += 1
        if self._num_changes > MAX_CHANGES:
            raise ValueError(
                f"loop='graph': the optimizer's {self._twin.changed} changes again and again, but a graph holds it. "
                "Let schedules change lr alone, as OneCycleLR(..., cycle_momentum=False) does, or use loop='script'."
            )
        self._graphs = {}
        self._twin = OptimizerTwin(self.run.optimizer, is_captured=self._is_cuda)


class OptimizerTwin:
    """A second optimizer with the first one's parameters and state, which can be traced: its rates are in tensors.

    changed: the option that follow() found changed.
    """

    def __init__(self, optimizer: Optimizer, *, is_captured: bool) -> None:
        self.optimizer = optimizer
        self.twin = copy.copy(optimizer)
        self.twin.param_groups = [self._group(group, is_captured) for group in optimizer.param_groups]
        self.changed: str | None = None
        if is_captured:
            _move_step_counts(optimizer)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._options = self._read_options()

    def _group(self, group: dict[str, Any], is_captured: bool) -> dict[str, Any]:
        device = group["params"][0].device if is_captured else "cpu"
        # A capture's rate is a tensor, which fused kernels read; others ask the host for its value.
        traced = {"fused": True if is_captured else None, "foreach": False, "capturable": True}
        rate = torch.tensor(float(group["lr"]), device=device)
        return {**group, **{key: value for key, value in traced.items() if key in group}, "lr": rate}

    def follow(self) -> bool:
        """Take over the optimizer's rates; return False where its other options, or its state, are not as they were."""
        for i, group in enumerate(self.optimizer.param_groups):
            if group["lr"] != self._rates[i]:
                self._rates[i] = float(group["lr"])
                self.twin.param_groups[i]["lr"].fill_(self._rates[i])
        options = self._read_options()
        if options != self._options:
            self.changed = next(
                (
                    key
                    for one, other in zip(options, self._options, strict=False)
                    for key in one
                    if one[key] != other[key]
                ),
                "the number of param groups",
            )
            return False
        return self.twin.state is self.optimizer.state

    def _read_options(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]

    def step(self) -> None:
        """Update, without the decorators of step(), which no graph can hold."""
        inspect.unwrap(type(self.twin).step)(self.twin)

    def call_hooks(self) -> None:
        """Call what callbacks hung on the optimizer's step; the gradients are those of the update."""
        vars(self.optimizer)["_opt_called"] = True  # schedulers warn without it
        for hook in _hooks(self.optimizer):
            hook(self.optimizer, (), {})


@dataclass(frozen=True)
class StepParts:
    """What the graph of a step is made of.

    is_first, is_due: whether the step begins a window of accumulated gradients, and whether it ends one.
    """

    run: Run
    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    twin: OptimizerTwin
    is_first: bool
    is_due: bool


class CompiledStep:
    """The step as one function of torch.compile."""

    def __init__(self, parts: StepParts) -> None:
        run, twin, parameters, gradients = parts.run, parts.twin, parts.parameters, parts.gradients
        is_first, is_due = parts.is_first, parts.is_due
        whole = _NetAndLoss(run)
        buffers = dict(whole.named_buffers())
        names = {id(parameter): name for name, parameter in whole.named_parameters()}
        values = {names[id(parameter)]: parameter for parameter in parameters}
        # Where a parameter is tied, each place of it, but a module in two places once: functional_call's own way, to go
        # by names, would leave such a module changed.
        places = {
            place: names[id(parameter)]
            for prefix, module in whole.named_modules()
            for place, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False)
            if names[id(parameter)] in values
        }
        optimizer, raw_step = twin.twin, inspect.unwrap(type(twin.twin).step)
        autocast, device, dtype = run.mixed_precision is not None, run.device.type, run.autocast_dtype
        k, clip_norm, clip_value = run.gradient_accumulation_steps, run.clip_grad_norm, run.clip_grad_value

        def loss_of(values: Any, buffers: Any, x: Any, y: Any, sample_weight: Any) -> Any:
            with torch.autocast(device, dtype, enabled=autocast):
                given = {place: values[name] for place, name in places.items()}
                result = functional_call(whole, (given, buffers), (x, y, sample_weight), tie_weights=False)
            return result[0] / k if k > 1 else result[0], result

        def step(x: Any, y: Any, sample_weight: Any) -> Result:
            detached = {name: value.detach() for name, value in values.items()}
            grads, (_, result) = grad_and_value(loss_of, has_aux=True)(detached, buffers, x, y, sample_weight)
            for name, gradient in zip(values, gradients, strict=True):
                if is_first:
                    gradient.copy_(grads[name])
                else:
                    gradient.add_(grads[name])
            if is_due:
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, clip_norm)
                if clip_value is not None:
                    nn.utils.clip_grad_value_(parameters, clip_value)
                raw_step(optimizer)
            found: Result = result
            return found

        # A code object of its own, since compiled graphs are kept by it.
        own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
        options: dict[str, Any] = {"fallback_random": True, "post_grad_custom_post_pass": scalars_once()}
        self._step: Graph = torch.compile(own, fullgraph=True, dynamic=False, options=options)
        self._net, self._checks_left = run.net, CHECKED_CALLS
        self._is_made = self._is_different = False
        self.begin_epoch(run)

    def begin_epoch(self, run: Run) -> None:
        """Check again, at the next call, whether anything that the graph holds has changed."""
        self._say = run.progress.say
        self._looks_on = run.callbacks.has_train_batch_begin or run.callbacks.has_train_batch_end
        self._checks_left = max(1, self._checks_left)

    @torch.no_grad()
    def __call__(self, x: Any, y: Any, sample_weight: Tensor | None) -> Result:
        if not self._is_made or self._is_different:
            return self._compile(x, y, sample_weight)
        if self._checks_left or self._looks_on:
            self._checks_left = max(0, self._checks_left - 1)
            try:
                with torch.compiler.set_stance("fail_on_recompile"):
                    return self._step(x, y, sample_weight)
            except RuntimeError:  # it counts its calls, say: to be checked each time
                self._is_different = True
                return self._compile(x, y, sample_weight)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return self._step(x, y, sample_weight)

    def _compile(self, x: Any, y: Any, sample_weight: Tensor | None) -> Result:
        """Call the step, which torch compiles where it has to."""
        begun = time.monotonic()
        if not self._is_made:
            self._say("Compiling the training step ...")
        try:
            result = self._step(x, y, sample_weight)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise ValueError(
                "loop='graph': the step is another each time, as where the net counts its calls: use loop='script'."
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:
            raise _no_graph(error, self._net) from error
        if not self._is_made:
            self._say(f"Compiled the training step in {time.monotonic() - begun:.1f} s.")
        self._is_made = True
        return result


class CapturedStep:
    """One step, or several in a row, as a CUDA graph: kernels that were launched once, launched again all together.

    batch: joined from those of num_steps steps.   result_bytes: of its outputs.
    can_be_joined: whether these have a row for each of the batch, so that those of several steps can be one batch's.
    """

    def __init__(self, parts: StepParts, batch: Batch, num_steps: int) -> None:
        run = parts.run
        self._batch = map_nested(_clone, batch)

        def step(x: Any, y: Any, sample_weight: Tensor | None) -> Result:
            if parts.is_first:
                torch._foreach_zero_(parts.gradients)
            with run.autocast():
                outputs = run.forward(x)
                loss = run.loss_fn(outputs, y, sample_weight)
            run.share(loss).backward()
            if parts.is_due:
                run.prepare_gradients()
                with torch.no_grad():
                    parts.twin.step()
            return loss.detach(), map_nested(_detach, outputs), dict(run.loss_fn.parts)

        try:
            self._replay, self._result = _capture(
                lambda: _join([step(*part) for part in _parts(self._batch, num_steps)])
            )
        except (RuntimeError, AssertionError) as error:  # torch's optimizers assert what can be captured
            raise _no_graph(error, run.net) from error
        results = list(leaves(self._result[1]))
        rows = num_samples(self._batch[0])
        self.result_bytes = sum(result.nbytes for result in results if isinstance(result, Tensor))
        self.can_be_joined = all(isinstance(result, Tensor) and result.shape[:1] == (rows,) for result in results)

    def begin_epoch(self, run: Run) -> None:
        """Nothing is looked at again: a capture holds kernels alone."""

    def __call__(self, x: Any, y: Any, sample_weight: Tensor | None) -> Result:
        for held, new in zip(leaves(self._batch), leaves((x, y, sample_weight)), strict=True):
            if isinstance(held, Tensor):
                held.copy_(new, non_blocking=True)
        self._replay()
        result: Result = map_nested(_clone, self._result)
        return result


def _capture(step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """Return what launches a step's kernels, none of which runs here, and where its results will stand."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


class _NetAndLoss(nn.Module):
    """The net and its loss as one module, whose parameters and buffers are those of both."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.net, self.loss_fn = run.net, run.loss_fn
        self.of_loss = run.loss_fn.fn if isinstance(run.loss_fn.fn, nn.Module) else None
        self.kind = run.kinds[0]

    def forward(self, x: Any, y: Any, sample_weight: Any) -> Result:
        outputs = self.net(**x) if self.kind == "dict" else self.net(*x) if self.kind == "tuple" else self.net(x)
        if self.loss_fn.part_names:
            loss, parts = self.loss_fn.with_parts(outputs, y, sample_weight)
            return loss, outputs, parts
        return self.loss_fn(outputs, y, sample_weight), outputs, {}


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
    elif any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in run.net.parameters()):
        reason = "hooks on the parameters' gradients would not be called"
    elif _hooks(run.optimizer):
        reason = "hooks on the optimizer's step would not be called before it"
    if reason is not None:
        raise ValueError(f"loop='graph': {reason}; or use loop='script'.")


def _no_graph(error: Exception, net: nn.Module) -> ValueError:
    lines = [line for line in str(error).splitlines() if line]
    first = " ".join(lines[: 2 if lines[:1] and lines[0].endswith("raised:") else 1]) or type(error).__name__
    calls = [call for call in PYTHON_CALL.findall(str(error)) if not call[0].startswith(NOT_THE_USERS)]
    place = f" At {calls[-1][0]}:{calls[-1][1]}, {calls[-1][2]}." if calls else ""
    has_mask = any(isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)) for module in net.modules())
    hint = " To nn.Transformer's parts give is_causal=True or False beside a mask, which they look into otherwise."
    return ValueError(
        f"loop='graph' can't make one graph of this training step: {first}{place}{hint if has_mask else ''} Use "
        "loop='script', with jit_compile=True to compile the net alone."
    )


def _move_step_counts(optimizer: Optimizer) -> None:
    """Let a capture count steps on the device, where unfused optimizers have their counts on the CPU."""
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device)


def _hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def _form(batch: Batch, n: int) -> list[Any]:
    """Return what each of n joined batches must have in common with the one that a graph was made of."""
    return [
        ((len(leaf) // n, *leaf.shape[1:]) if n > 1 else leaf.shape, leaf.dtype, leaf.stride())
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in leaves(batch)
    ]


def _parts(batch: Batch, n: int) -> list[Batch]:
    """Return n joined batches one by one, as views."""
    if n == 1:
        return [batch]
    size = num_samples(batch[0]) // n
    return [map_nested(partial(_rows, i * size, (i + 1) * size), batch) for i in range(n)]


def _rows(start: int, stop: int, leaf: Any) -> Any:
    return leaf[start:stop] if isinstance(leaf, Tensor) else leaf


def _join(results: list[Result]) -> Result:
    """Return the results of steps of one size as one step's: their mean losses, their outputs on the first axis."""
    if len(results) == 1:
        return results[0]
    losses, outputs, parts = zip(*results, strict=True)
    joined = iter([torch.cat(rows) for rows in zip(*map(leaves, outputs), strict=True)])
    means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    return torch.stack(losses).mean(), map_nested(lambda _: next(joined), outputs[0]), means


@contextmanager
def _side_stream() -> Iterator[None]:
    """Work on another stream than the default one, as a capture does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
