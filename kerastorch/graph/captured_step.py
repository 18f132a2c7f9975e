"""The step as a CUDA graph.

Sister: compiled_step.py, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kerastorch.device import Nested, leaves, map_nested, num_samples, side_stream
from kerastorch.graph.parts import Batch, Result, StepParts, no_graph
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

        held, state_size = held_of_net(run.net), _state_size(parts)
        try:
            self._replay, self._result, self.pool = capture(steps, run.device, pool)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: torch's optimizers assert what can be captured
            raise no_graph(error, run.net) from error
        if held_of_net(run.net) != held:
            raise ValueError(
                "loop='graph': the step is another each time, as where the net counts its calls or puts another tensor "
                "in a buffer's place (self.mean.copy_(...) writes to it): use loop='script'."
            )
        if _state_size(parts) != state_size:
            raise RuntimeError("loop='graph': the optimizer began its state inside a graph, which would begin it anew.")
        results = list(leaves(self._result[1]))
        rows = num_samples(self._batch[0])
        self.result_bytes = sum(result.nbytes for result in results if isinstance(result, Tensor))
        self.can_be_joined = all(isinstance(result, Tensor) and result.shape[:1] == (rows,) for result in results)

    def begin_epoch(self, run: Run) -> None:
        """Nothing is looked at again: a capture holds kernels alone."""

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


def held_of_net(net: nn.Module) -> list[Any]:
    """Return what a capture takes from a net and does not look at again: where its tensors lie, and plain values."""
    tensors = [(tensor.data_ptr(), tensor.requires_grad) for tensor in (*net.parameters(), *net.buffers())]
    values = [
        value
        for module in net.modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and name != "training"
    ]
    return [*tensors, *values]


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


def split_batch(batch: Batch, n: int) -> list[Batch]:
    """Return n joined batches one by one, as views."""
    if n == 1:
        return [batch]
    size = num_samples(batch[0]) // n
    return [map_nested(partial(_rows, i * size, (i + 1) * size), batch) for i in range(n)]


def join_results(results: list[Result]) -> Result:
    """Return the results of steps of one size as one step's: their mean losses, their outputs on the first axis."""
    if len(results) == 1:
        return results[0]
    losses, outputs, parts = zip(*results, strict=True)
    joined = iter([torch.cat(rows) for rows in zip(*map(leaves, outputs), strict=True)])
    means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    return torch.stack(losses).mean(), map_nested(lambda _: next(joined), outputs[0]), means


def detached(leaf: Any) -> Any:
    """Return a leaf of outputs without its graph."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _rows(start: int, stop: int, leaf: Any) -> Any:
    return leaf[start:stop] if isinstance(leaf, Tensor) else leaf
