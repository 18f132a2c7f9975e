"""What the files of this folder share: what a graph is made of, batches and results, and why there is no graph.

Sister: run.py below.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kerastorch.graph.optimizer_twin import OptimizerTwin
from kerastorch.run import Run

Batch = tuple[Any, Any, Any]  # x, y, sample_weight
Result = tuple[Tensor, Any, dict[str, Tensor]]  # loss, outputs, the losses by output
Graph = Callable[[Any, Any, Tensor | None], Result]
NOT_THE_USERS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
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


def no_graph(error: BaseException, net: nn.Module) -> ValueError:
    """Return the error for a step that no graph can hold, with the line of the user's that is to blame, where known."""
    if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
        while error.__context__ is not None:  # a capture that is broken off fails once more at its end
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
