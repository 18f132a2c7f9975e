"""A pass over the graph of a compiled step: numbers that large kernels would compute anew for each vector, once.

Sister: compiled_step.py above.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MIN_ELEMENTS = 2**14  # of a kernel in which it pays: storing a number costs about a microsecond


def scalars_once() -> Any:
    """Return a pass for torch.compile's option "post_grad_custom_post_pass".

    It stores single numbers, such as Adam's bias corrections with a pow in each, before kernels over many elements. The
    compiler writes what makes a number into each loop that reads it, and can't move it out of the loop, since what the
    loop writes may overlap with what the number is made of: on a 784-512-512-10 MLP an eighth of the step.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass  # loads the whole compiler

    class ScalarsOnce(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            _store_scalars(graph)

        def uuid(self) -> bytes:
            """Return what compiled code is kept by."""
            return f"kerastorch scalars once, {MIN_ELEMENTS}".encode()

    return ScalarsOnce()


def _store_scalars(graph: torch.fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or _num_elements(node) != 1 or node.meta["val"].dim():
            continue
        readers = [user for user in node.users if _num_elements(user) >= MIN_ELEMENTS]
        if not readers:
            continue
        with graph.inserting_after(node):
            stored = graph.call_function(torch.ops.aten.as_strided.default, (node, [], []))  # needs memory to view
        stored.meta.update(node.meta)
        for reader in readers:
            reader.replace_input_with(node, stored)


def _num_elements(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0
