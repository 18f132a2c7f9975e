"""What `import kerastorch` adds to `import torch`: fresh child processes, medians.

python benchmarks/startup.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys

CHILD = """
import time
begun = time.perf_counter()
import torch
middle = time.perf_counter()
import kerastorch
print(middle - begun, time.perf_counter() - middle, torch.__version__)
"""


def main() -> None:
    """Print the two medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="child processes, after one that warms the disk cache")
    rounds = parser.parse_args().rounds
    children = [
        subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(rounds + 1)
    ][1:]
    torch_seconds = statistics.median(float(child[0]) for child in children)
    own_seconds = statistics.median(float(child[1]) for child in children)
    print(f"torch {children[0][2]}, python {platform.python_version()}, {platform.machine()}, median of {rounds}")
    print(f"import torch       {torch_seconds * 1e3:8.1f} ms")
    print(f"import kerastorch  {own_seconds * 1e3:8.1f} ms more ({own_seconds / torch_seconds:.3f}x)")


if __name__ == "__main__":
    main()
