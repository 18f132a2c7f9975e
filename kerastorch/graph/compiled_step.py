"""The step as one function of torch.compile, on a CPU.

Sister: captured_step.py, on a GPU.
"""

from __future__ import annotations

import inspect
import time
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from kerastorch.graph.parts import Graph, Result, StepParts, another_each_time, no_graph
from kerastorch.graph.scalars import scalars_once
from kerastorch.run import Run

CHECKED_CALLS = 3  # which show whether the step is the same each time


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
        self._parameters, self._gradients = parameters, gradients
        self._is_made = self._is_different = False
        self.begin_epoch(run)

    def begin_epoch(self, run: Run) -> None:
        """Check again, at the next call, whether anything that the graph holds has changed."""
        self._say = run.progress.say
        self._looks_on = run.callbacks.has_train_batch_begin or run.callbacks.has_train_batch_end
        self._checks_left = max(1, self._checks_left)

    @torch.no_grad()
    def __call__(self, x: Any, y: Any, sample_weight: Tensor | None) -> Result:
        if self._looks_on:  # somebody may have called zero_grad()
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
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
            raise another_each_time() from error
        except RuntimeError as error:  # the step went well in eager mode, but for what happens in a trace alone
            if self._is_made and not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            raise no_graph(error, self._net) from error
        if not self._is_made:
            self._say(f"Compiled the training step in {time.monotonic() - begun:.1f} s.")
        self._is_made = True
        return result


class _NetAndLoss(nn.Module):
    """The net and its loss as one module, whose parameters and buffers are those of both."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.net, self.loss_fn = run.net, run.loss_fn
        self.of_loss = run.loss_fn.fn if isinstance(run.loss_fn.fn, nn.Module) else None

    def forward(self, x: Any, y: Any, sample_weight: Any) -> Result:
        outputs = (
            self.net(**x) if isinstance(x, dict) else self.net(*x) if isinstance(x, (tuple, list)) else self.net(x)
        )
        if self.loss_fn.part_names:
            loss, parts = self.loss_fn.with_parts(outputs, y, sample_weight)
            return loss, outputs, parts
        return self.loss_fn(outputs, y, sample_weight), outputs, {}
