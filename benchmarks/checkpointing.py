"""How long a checkpoint of a 100 MB net holds training up, against plain torch.save of the same content.

python benchmarks/checkpointing.py [--rounds 15] [--folder .]
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks.callback import Moment


class Timed(kt.callbacks.ModelCheckpoint):
    """A ModelCheckpoint that notes how long each save takes."""

    def __init__(self, filepath: Path, **arguments: Any) -> None:
        super().__init__(filepath, **arguments)
        self.seconds: list[float] = []

    def save(self, moment: Moment, logs: Any) -> None:
        self.seconds.append(seconds(lambda: super(Timed, self).save(moment, logs)))
        if self._writer is not None:
            self._writer.wait()  # outside the measured time: the next round has the disk for itself


class Plain(kt.Callback):
    """Saves the same content with torch.save, and copies it, in the same epochs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.save_seconds: list[float] = []
        self.copy_seconds: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        content = self.run.get_content(logs["loss"])
        self.save_seconds.append(seconds(lambda: torch.save(content, self.path)))
        self.copy_seconds.append(seconds(lambda: copy.deepcopy(content)))


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def main() -> None:
    """Print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="saves of each kind, in turn, after one that warms up")
    parser.add_argument("--folder", default=".", help="where the files go, on the disk to be measured")
    arguments = parser.parse_args()

    net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(25)))
    model = kt.Model(net, device="cpu")
    model.compile("mse", lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    x = torch.randn(4, 1024)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        plain = Plain(Path(folder, "plain.pt"))
        sync = Timed(Path(folder, "sync.pt"))
        background = Timed(Path(folder, "async.pt"), async_save=True)
        model.fit(x, x, epochs=arguments.rounds + 1, callbacks=[plain, sync, background], verbose=0)
        megabytes = Path(folder, "sync.pt").stat().st_size / 1e6

    print(
        f"torch {torch.__version__}, python {platform.python_version()}, {platform.machine()}, {megabytes:.0f} MB, "
        f"median of {arguments.rounds}"
    )
    for name, values, against in (
        ("torch.save", plain.save_seconds, plain.save_seconds),
        ("ModelCheckpoint", sync.seconds, plain.save_seconds),
        ("a copy", plain.copy_seconds, plain.copy_seconds),
        ("ModelCheckpoint(async_save=True)", background.seconds, plain.copy_seconds),
    ):
        median, base = statistics.median(values[1:]), statistics.median(against[1:])
        print(f"{name:34}{median * 1e3:8.1f} ms  {median / base:5.2f}x")


if __name__ == "__main__":
    main()
