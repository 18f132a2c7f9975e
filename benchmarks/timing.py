"""What the benchmarks share: two clocks, medians of interleaved rounds, tables, charts. Sister: training.py."""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

Turn = Callable[[], object]  # what a contestant does in a round: an epoch, say
Clocks = tuple[float, float]  # seconds by the wall's clock, and seconds of CPU time of this process


@dataclass
class Figure:
    """What the rounds say of one contestant.

    seconds, cpu_seconds: medians.   ratio, cpu_ratio: medians of the ratio to the first contestant's turn in the same
    round.   low, high: quartiles of ratio.
    """

    seconds: float
    cpu_seconds: float
    ratio: float
    low: float
    high: float
    cpu_ratio: float


Tables = dict[str, dict[str, Figure]]  # {title: {contestant: figure}}


class Nowhere(io.TextIOBase):
    """A terminal that shows nothing, so that bars draw as they would in one."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return True


@contextmanager
def silence() -> Iterator[None]:
    """Let all that is printed go nowhere."""
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = Nowhere()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr


def timed(turn: Turn) -> Clocks:
    """Return how long a turn takes."""
    gc.collect()  # what the turn before left is not this one's
    begun, cpu_begun = time.perf_counter(), time.process_time()
    turn()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, time.process_time() - cpu_begun


def measure(turns: Mapping[str, Turn], rounds: int) -> dict[str, Figure]:
    """Return the figures of contestants in this process; see compare."""
    return compare({name: partial(timed, turn) for name, turn in turns.items()}, rounds)


def compare(turns: Mapping[str, Callable[[], Clocks]], rounds: int) -> dict[str, Figure]:
    """Return the figures of each contestant, against the first, after one round that warms up.

    All have their turn in every round, which goes forwards and backwards by turns. turns: each returns its clocks.
    """
    clocks: dict[str, list[Clocks]] = {name: [] for name in turns}
    for i in range(rounds + 1):
        for name in list(turns)[:: 1 if i % 2 else -1]:
            clocks[name].append(turns[name]())
    base = next(iter(clocks.values()))[1:]
    return {name: _figure(values[1:], base) for name, values in clocks.items()}


def _figure(values: list[Clocks], base: list[Clocks]) -> Figure:
    ratios = [wall / base_wall for (wall, _), (base_wall, _) in zip(values, base, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Figure(
        seconds=statistics.median(wall for wall, _ in values),
        cpu_seconds=statistics.median(cpu for _, cpu in values),
        ratio=ratio,
        low=low,
        high=high,
        cpu_ratio=statistics.median(cpu / base_cpu for (_, cpu), (_, base_cpu) in zip(values, base, strict=True)),
    )


def make_parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each, at least 2 (default: {rounds})")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads, 0: as many as it likes (default: 1)")
    parser.add_argument("--only", default="", help="only the tables with this in their title")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--chart", type=Path, help="write a bar chart to this picture (needs matplotlib)")
    return parser


def settle(threads: int) -> None:
    """Set torch's threads, 0 for as many as it likes, and let glibc keep the memory that is freed.

    Else it hands freed memory back at some steps and takes it anew, more or less often as its heap happens to lie, and
    a conv net's time moves by up to a third from one process to the next, whoever trains it.
    """
    if threads:
        torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**31 - 1)


def machine(device: torch.device | str = "cpu") -> str:
    """Return what the numbers depend on."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    return f"{versions}, {platform.machine()}, {gpu}, {torch.get_num_threads()} thread(s)"


def show(title: str, figures: Mapping[str, Figure]) -> None:
    """Print a table; a ratio below 1 is faster than the first line."""
    width = max(28, *map(len, figures))
    print(f"\n{title:{width + 2}}{'median':>11}{'ratio':>8}  {'quartiles':14}{'CPU ratio':>9}")
    for name, figure in figures.items():
        spread = f"{figure.low:.2f} to {figure.high:.2f}"
        print(
            f"  {name:{width}}{figure.seconds * 1e3:8.1f} ms{figure.ratio:7.2f}x  {spread:14}{figure.cpu_ratio:8.2f}x",
            flush=True,
        )


def write(arguments: argparse.Namespace, tables: Tables, device: torch.device | str = "cpu") -> None:
    """Write the JSON file and the chart that were asked for."""
    if arguments.json:
        content = {
            "machine": machine(device),
            "rounds": arguments.rounds,
            "tables": {
                title: {name: asdict(figure) for name, figure in figures.items()} for title, figures in tables.items()
            },
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    if arguments.chart and tables:
        _draw(tables, arguments.chart)


def _draw(tables: Tables, path: Path) -> None:
    """Write a bar chart of the ratios, a panel for each table; the whiskers are quartiles."""
    import matplotlib.pyplot as plt

    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(6 * columns, 3 * rows), squeeze=False)
    for panel in panels.flat[len(tables) :]:
        panel.remove()
    for panel, (title, figures) in zip(panels.flat, tables.items(), strict=False):
        ratios = [one.ratio for one in figures.values()]
        whiskers = [
            [one.ratio - one.low for one in figures.values()],
            [one.high - one.ratio for one in figures.values()],
        ]
        panel.barh(list(figures), ratios, xerr=whiskers)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set(title=title, xlabel=f"time / {next(iter(figures))}")
        panel.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
