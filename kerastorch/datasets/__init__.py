"""Small data sets that ship inside the package, so that examples and tests need no network.

Each lives in a file of its own name, source and licence in its docstring, and is read only when called.
"""

from kerastorch.datasets.digits import digits

__all__ = ["digits"]
