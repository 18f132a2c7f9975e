"""What does not depend on the data: the import, the first call of fit in a new process, and a later call. Medians.

python benchmarks/startup.py [--rounds 9] [--threads 1] [--json FILE]

A call of fit trains one batch of a tiny MLP, with loss, accuracy and the bar, which draws into nowhere; the bare step
beside it does forward, backward and step. The first call comes after the imports and compile(), and makes what torch
makes in its first step, as the bare step in its own process does.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from timing import Turn, machine, make_parser, settle, silence, timed
from torch import nn
from training import fused_adam, make_data, make_model, tiny_mlp

CALLS = 20  # a round times so many later calls

IMPORTS = """
import time
begun = time.perf_counter()
import torch
middle = time.perf_counter()
import kerastorch
print(middle - begun, time.perf_counter() - middle)
"""

FIRST = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import startup
print(startup.first_call(sys.argv[1], int(sys.argv[2])))
"""


def bare_step() -> Turn:
    """Return a training step by hand on one batch."""
    net, (x, y) = tiny_mlp(), make_data(32, 20)
    optimizer, loss_fn = fused_adam(net.parameters()), nn.CrossEntropyLoss()

    def step() -> None:
        loss_fn(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fit_batch() -> Turn:
    """Return a call of fit on one batch."""
    model, (x, y) = make_model(tiny_mlp()), make_data(32, 20)
    return partial(model.fit, x, y, batch_size=32, verbose=1)


def first_call(kind: str, threads: int) -> float:
    """Return the seconds of the first call in this process; kind: "bare" or "fit"."""
    settle(threads)
    call = bare_step() if kind == "bare" else fit_batch()
    with silence():
        return timed(call)[0]


def later_call(call: Turn) -> float:
    """Return the mean seconds of CALLS calls."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    with silence():
        return timed(calls)[0] / CALLS


def child(*arguments: str) -> list[float]:
    """Return the numbers that a new process prints."""
    command = [sys.executable, "-c", *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(number) for number in printed.split()]


def main() -> None:
    """Print the medians and what kerastorch adds; the kinds take turns, after one round that warms up."""
    arguments = make_parser(__doc__, rounds=9).parse_args()
    settle(arguments.threads)
    bare, fit, threads = bare_step(), fit_batch(), str(arguments.threads)
    rounds = [
        [
            *child(IMPORTS),
            *child(FIRST, "bare", threads),
            *child(FIRST, "fit", threads),
            later_call(bare),
            later_call(fit),
        ]
        for _ in range(arguments.rounds + 1)
    ][1:]
    torch_import, own_import, first_bare, first_fit, bare_seconds, fit_seconds = zip(*rounds, strict=True)
    print(f"{machine()}, median of {arguments.rounds}")
    lines = {
        "import torch": torch_import,
        "import kerastorch, beside it": own_import,
        "first bare step": first_bare,
        "first fit of one batch": first_fit,
        "later bare step": bare_seconds,
        "later fit of one batch": fit_seconds,
        "fit beyond the bare step, first": [a - b for a, b in zip(first_fit, first_bare, strict=True)],
        "fit beyond the bare step, later": [a - b for a, b in zip(fit_seconds, bare_seconds, strict=True)],
    }
    for name, values in lines.items():
        low, median, high = (seconds * 1e3 for seconds in statistics.quantiles(values, n=4, method="inclusive"))
        print(f"  {name:32}{median:9.2f} ms   {low:.2f} to {high:.2f}")
    if arguments.json:
        medians = {name: statistics.median(values) for name, values in lines.items()}
        arguments.json.write_text(json.dumps({"machine": machine(), "seconds": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
