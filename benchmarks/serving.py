"""A trained net in service: eager, compiled, and as exported files; latency of one row and throughput of many.

python benchmarks/serving.py [--rounds 9] [--threads 1] [--only WORD] [--json FILE] [--chart FILE]

Needs `pip install "kerastorch[export]"`, and a C++ compiler for AOTInductor. Exported files are called through
kt.load_exported, as a server would; all return tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Figure, Tables, Turn, machine, make_parser, measure, settle, show, write
from torch import Tensor, nn
from training import conv_net, mlp

import kerastorch as kt

WORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # net, shape of a row
    "MLP 784-256-10": (partial(mlp, 784, 256, 10), (1, 28, 28)),
    "conv net": (conv_net, (1, 28, 28)),
}
CALLS = {1: 200, 64: 10}  # of a turn, by batch size


def make_services(net: nn.Module, shape: tuple[int, ...], folder: Path) -> dict[str, Callable[[Tensor], Any]]:
    """Return {name: what answers a batch}, each having answered batches of both sizes."""
    model = kt.Model(net, device="cpu")
    example = (8, *shape)
    net.eval()
    compiled = torch.compile(net)
    services: dict[str, Callable[[Tensor], Any]] = {
        "eager": net,
        "torch.compile": compiled,
        "torch.export, .pt2": kt.load_exported(model.export(folder / "net.pt2", example).path),
        "AOTInductor, .pt2": kt.load_exported(model.export(folder / "aot.pt2", example, aot_inductor=True).path),
        "ONNX Runtime, .onnx": kt.load_exported(model.export(folder / "net.onnx", example).path),
    }
    for service in services.values():
        for rows in CALLS:
            with torch.inference_mode():
                service(torch.rand(rows, *shape))
    return services


def answer(service: Callable[[Tensor], Any], x: Tensor, calls: int) -> None:
    """Answer the same batch so many times."""
    with torch.inference_mode():
        for _ in range(calls):
            service(x)


def show_rates(figures: dict[str, Figure], rows: int) -> None:
    """Print what a turn's time means for one call."""
    for name, figure in figures.items():
        seconds = figure.seconds / CALLS[rows]
        print(f"  {name:28}{seconds * 1e6:8.0f} us a call {rows / seconds:12,.0f} rows a second")


def main() -> None:
    """Print a table for each net and batch size."""
    arguments = make_parser(__doc__, rounds=9).parse_args()
    settle(arguments.threads)
    torch.manual_seed(0)
    print(f"{machine()}, median of {arguments.rounds} interleaved rounds")
    tables: Tables = {}
    for name, (make_net, shape) in WORKS.items():
        if arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            services = make_services(make_net(), shape, Path(folder))
            for rows, calls in CALLS.items():
                title = f"{name}, {rows} {'row' if rows == 1 else 'rows'}"
                x = torch.rand(rows, *shape)
                turns: dict[str, Turn] = {key: partial(answer, one, x, calls) for key, one in services.items()}
                tables[title] = measure(turns, arguments.rounds)
                show(f"{title}, {calls} calls", tables[title])
                show_rates(tables[title], rows)
    write(arguments, tables)


if __name__ == "__main__":
    main()
