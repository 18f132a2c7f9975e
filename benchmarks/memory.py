"""Peak memory of evaluate and predict on 100k rows, each in a new process, beyond what it holds before the call.

python benchmarks/memory.py [--rounds 3] [--json FILE]

The aim is the result, one batch and 64 MB for torch's own buffers. Needs Linux, which can tell a process its peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import make_data, make_model

ROWS, FEATURES, BATCH_SIZE = 100_000, 784, 256
FLOAT_BYTES = 4
OUTPUTS = {"small outputs": 10, "wide outputs": 1000}
KINDS = ("arrays", "loader")
COLUMNS = ("peak", "result", "batch", "rest")  # rest: what is left of the peak without result and batch


def measure(verb: str, kind: str, outputs: int) -> int:
    """Return the bytes that a call adds at its peak; a call on one batch comes first."""
    x, y = make_data(ROWS, FEATURES)
    model = make_model(nn.Linear(FEATURES, outputs))
    arrays = (x, y) if verb == "evaluate" else (x,)
    data: list[Any] = [array.numpy() for array in arrays]
    if kind == "loader":
        data = [DataLoader(TensorDataset(*arrays), BATCH_SIZE)]
    call = getattr(model, verb)
    call(*(array[:BATCH_SIZE] for array in arrays), batch_size=BATCH_SIZE, verbose=0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read_status("VmRSS")
    result = call(*data, batch_size=BATCH_SIZE if kind == "arrays" else None, verbose=0)
    peak = read_status("VmHWM")
    assert len(result) == (ROWS if verb == "predict" else 2)
    return peak - before


def read_status(name: str) -> int:
    """Return a number of this process's, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {name} in /proc/self/status")


def main() -> None:
    """Print a line for each verb, kind of data and width of outputs."""
    if sys.argv[1:2] == ["measure"]:
        torch.set_num_threads(1)
        print(measure(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each line (default: 3)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, {ROWS} rows of {FEATURES} floats, batches of {BATCH_SIZE}, median of {arguments.rounds}")
    print(f"  {'':38}" + "".join(f"{column:>9}" for column in COLUMNS))
    megabytes = {}
    for verb in ("evaluate", "predict"):
        for width, outputs in OUTPUTS.items():
            for kind in KINDS:
                name = f"{verb}, {kind}, {width}"
                command = [sys.executable, __file__, "measure", verb, kind, str(outputs)]
                peak = statistics.median(
                    float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                    for _ in range(arguments.rounds)
                )
                result = ROWS * outputs * FLOAT_BYTES if verb == "predict" else 0
                batch = BATCH_SIZE * (FEATURES + outputs) * FLOAT_BYTES
                numbers = [n / 1e6 for n in (peak, result, batch, peak - result - batch)]
                megabytes[name] = dict(zip(COLUMNS, numbers, strict=True))
                print(f"  {name:38}" + "".join(f"{number:6.1f} MB" for number in numbers), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "megabytes": megabytes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
