"""The step as a CUDA graph.

Sister: compiled_step.py, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kerastorch.device import leaves, map_nested, num_samples
from kerastorch.graph.parts import Batch, Result, StepParts, no_graph
from kerastorch.run import Run


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
            return loss.detach(), map_nested(detached, outputs), dict(run.loss_fn.parts)

        try:
            self._replay, self._result = capture(
                lambda: join_results([step(*part) for part in split_batch(self._batch, num_steps)])
            )
        except (RuntimeError, AssertionError) as error:  # torch's optimizers assert what can be captured
            raise no_graph(error, run.net) from error
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


def capture(step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """Return what launches a step's kernels, none of which runs here, and where its results will stand."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


@contextmanager
def side_stream() -> Iterator[None]:
    """Work on another stream than the default one, as a capture does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


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
