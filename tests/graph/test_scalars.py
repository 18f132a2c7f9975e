"""Numbers that a compiled step computes once instead of in each turn of a large loop."""

import pytest
import torch

from kerastorch.graph.scalars import MIN_ELEMENTS, scalars_once


@pytest.mark.slow
@pytest.mark.parametrize("num_elements", [MIN_ELEMENTS // 2, 2 * MIN_ELEMENTS])
def test_a_number_is_stored_before_a_large_kernel_alone_and_results_stay(num_elements):
    graphs = []
    one_pass = scalars_once()

    def note(graph):
        one_pass(graph)
        graphs.append([node for node in graph.nodes if node.target is torch.ops.aten.as_strided.default])

    def scale(values, step):
        values.mul_(1 - 0.9**step)

    values, step = torch.linspace(0, 1, num_elements), torch.tensor(3.0)
    expected = values * (1 - 0.9**step)
    torch.compile(scale, options={"post_grad_custom_post_pass": note})(values, step)
    torch._dynamo.reset()
    assert len(graphs[0]) == (1 if num_elements >= MIN_ELEMENTS else 0)
    torch.testing.assert_close(values, expected)


def test_compiled_code_is_kept_by_what_the_pass_does():
    assert scalars_once().uuid() == scalars_once().uuid()
