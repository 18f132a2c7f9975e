"""The step as a CUDA graph.

Sister: compiled_step.py, on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kerastorch.device import Nested, leaves, map_nested, num_samples, side_stream
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


class CapturedStep:
    """One step, or several in a row, as a CUDA graph: kernels that were launched once, launched again all together.

    batch: joined from those of num_steps steps.   pool: memory of an earlier capture, which this one may use too.
    result_bytes: of its outputs.   can_be_joined: whether these have a row for each of the batch, so that those of
    several steps can be one batch's.
    """

    def __init__(self, parts: StepParts, batch: Batch, num_steps: int, pool: Any) -> None:
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
            return loss.detach(), map_nested(detached, outputs), dict(run.loss_fn.parts)

        def steps() -> Result:
            return join_results([step(*part) for part in split_batch(self._batch, num_steps)])

        held, state_size, earlier = what_is_held(run), _state_size(parts), sys.exc_info()[1]
        try:
            self._replay, self._result, self.pool = capture(steps, run.device, pool)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: torch's optimizers assert what can be captured
            raise no_graph(error, run.net, earlier) from error
        if what_is_held(run) != held:
            raise another_each_time()
        if _state_size(parts) != state_size:
            raise RuntimeError("loop='graph': the optimizer began its state inside a graph, which would begin it anew.")
        results = list(leaves(self._result[1]))
        rows = num_samples(self._batch[0])
        self.result_bytes = sum(result.nbytes for result in results if isinstance(result, Tensor))
        self.can_be_joined = all(isinstance(result, Tensor) and result.shape[:1] == (rows,) for result in results)

    def begin_epoch(self, run: Run) -> None:
        """GraphStep has looked at what a capture holds."""

    def __call__(self, x: Any, y: Any, sample_weight: Tensor | None) -> Result:
        _write(self._batch, (x, y, sample_weight))
        self._replay()
        result: Result = map_nested(_clone, self._result)
        return result


def capture(steps: Callable[[], Result], device: torch.device, pool: Any) -> tuple[Callable[[], None], Result, Any]:
    """Return what launches the kernels of steps, none of which runs here, where the results will stand, and the memory.

    Loaders' threads may go on meanwhile, and after an error work goes on where it was.
    """
    graph = torch.cuda.CUDAGraph()
    captured = torch.cuda.graph(graph, pool, side_stream(device), capture_error_mode="thread_local")
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)), captured:
        result = steps()
    return graph.replay, result, graph.pool()


@contextmanager
def as_in_a_capture(device: torch.device) -> Iterator[None]:
    """Work on the stream of captures, and raise where the host would wait for the GPU.

    To do so in a capture leaves torch before 2.12 unable to draw random numbers and to free memory.
    """
    side, mode = side_stream(device), torch.cuda.get_sync_debug_mode()
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream(device).wait_stream(side)


def _state_size(parts: StepParts) -> int:
    return sum(map(len, parts.run.optimizer.state.values()))


def _write(held: Nested, new: Nested) -> None:
    if isinstance(held, Mapping):
        for key, part in held.items():
            _write(part, new[key])
    elif isinstance(held, (tuple, list)):
        for part, new_part in zip(held, new, strict=True):
            _write(part, new_part)
    elif isinstance(held, Tensor):
        held.copy_(new, non_blocking=True)


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
