"""A training step as one graph: compiled on a CPU, captured on a GPU.

From below: scalars.py and optimizer_twin.py, parts.py, compiled_step.py and captured_step.py, step.py.
"""

from kerastorch.graph.step import GraphStep

__all__ = ["GraphStep"]
