"""What the files of this folder share: what a graph is made of, batches and results, and why there is no graph.

Sister: run.py below.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kerastorch.device import leaves, map_nested, num_samples
from kerastorch.graph.optimizer_twin import OptimizerTwin
from kerastorch.run import Run

Batch = tuple[Any, Any, Any]  # x, y, sample_weight
Result = tuple[Tensor, Any, dict[str, Tensor]]  # loss, outputs, the losses by output
Graph = Callable[[Any, Any, Tensor | None], Result]
NOT_THE_USERS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
PLAIN = (bool, int, float, str)
PYTHON_CALL = re.compile(r'File "(.+)", line (\d+), in .+\n\s*(.+)')  # in a traceback


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


def no_graph(error: BaseException, net: nn.Module, earlier: BaseException | None = None) -> ValueError:
    """Return the error for a step that no graph can hold, with the line of the user's that is to blame, where known.

    earlier: what was being handled before, of which it is not.
    """
    if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
        while error.__context__ not in (None, earlier):  # a capture that is broken off fails once more at its end
            error = error.__context__
    lines = [line for line in str(error).splitlines() if line]
    first = " ".join(lines[: 2 if lines[:1] and lines[0].endswith("raised:") else 1]) or type(error).__name__
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        calls = PYTHON_CALL.findall(str(error))
    else:
        calls = [(frame.filename, frame.lineno, frame.line) for frame in traceback.extract_tb(error.__traceback__)]
    calls = [call for call in calls if not call[0].startswith(NOT_THE_USERS)]
    place = f" At {calls[-1][0]}:{calls[-1][1]}, {calls[-1][2]}." if calls else ""
    has_mask = any(isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)) for module in net.modules())
    hint = " To nn.Transformer's parts give is_causal=True or False beside a mask, which they look into otherwise."
    return ValueError(
        f"loop='graph' can't make one graph of this training step: {first}{place}{hint if has_mask else ''} Use "
        "loop='script', with jit_compile=True to compile the net alone."
    )


def another_each_time() -> ValueError:
    """Return the error for a net or loss whose step is another at each call."""
    return ValueError(
        "loop='graph': the step is another each time, as where the net counts its calls or puts another tensor in a "
        "buffer's place (self.mean.copy_(...) writes to it): use loop='script'."
    )


def what_is_held(run: Run) -> list[Any]:
    """Return what a graph takes from net and loss: what is trained, where tensors lie, types, numbers and texts."""
    modules = [*run.net.modules(), *(run.loss_fn.fn.modules() if isinstance(run.loss_fn.fn, nn.Module) else ())]
    held: list[Any] = []
    for module in modules:
        own = vars(module)
        held.append(type(module))
        for name, tensor in [*own["_parameters"].items(), *own["_buffers"].items()]:
            is_there = tensor is not None and not is_lazy(tensor)
            held.append((tensor.data_ptr(), tensor.requires_grad) if is_there else name)
        held += [value for name, value in own.items() if isinstance(value, PLAIN) and name != "training"]
    return held


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


def _rows(start: int, stop: int, leaf: Any) -> Any:
    return leaf[start:stop] if isinstance(leaf, Tensor) else leaf
