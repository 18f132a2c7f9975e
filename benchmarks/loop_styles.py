"""The three loops, their ejected twins and textbook loops against a bare loop: time of an epoch, interleaved, medians.

python benchmarks/loop_styles.py [--rounds 9] [--threads 1] [--json FILE] [--chart FILE.png]

The bare loop keeps loss and correct count on the device and shows nothing. The textbook loops call .item() and update a
metric at every step, as most tutorials do. All train the same net on the same DataLoader over a TensorDataset.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt

Epoch = Callable[[], object]
Style = Literal["script", "function", "class"]
STYLES: tuple[Style, ...] = ("script", "function", "class")


def make_workloads() -> dict[str, tuple[nn.Module, TensorDataset, int]]:
    """Return {name: (net, data, batch size)}; the data is random, since only time is measured."""
    torch.manual_seed(0)

    def data(n: int, *shape: int) -> TensorDataset:
        return TensorDataset(torch.randn(n, *shape), torch.randint(0, 10, (n,)))

    tiny = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10))
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    conv = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )
    return {
        "tiny MLP, batch 32": (tiny, data(8192, 20), 32),
        "MLP 784-256-10, batch 64": (mlp, data(6400, 1, 28, 28), 64),
        "small conv net, batch 64": (conv, data(1280, 1, 28, 28), 64),
    }


def bare_loop(net: nn.Module, loader: DataLoader[Any], device: torch.device) -> Epoch:
    """The loop that a good engineer writes: sums on the device, nothing else."""
    optimizer, loss_fn = torch.optim.Adam(net.parameters(), fused=True), nn.CrossEntropyLoss()

    def epoch() -> tuple[float, float]:
        net.train()
        loss_sum, correct, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            outputs = net(x)
            loss = loss_fn(outputs, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += loss.detach() * len(y)
            correct += (outputs.argmax(1) == y).sum()
            seen += len(y)
        return float(loss_sum) / seen, float(correct) / seen

    return epoch


def textbook_loop(net: nn.Module, loader: DataLoader[Any], device: torch.device) -> Epoch:
    """The loop of many tutorials: .item() and a torchmetrics forward at every step, and a bar."""
    from torchmetrics.classification import MulticlassAccuracy
    from tqdm import tqdm

    optimizer, loss_fn = torch.optim.Adam(net.parameters()), nn.CrossEntropyLoss()
    accuracy = MulticlassAccuracy(10, average="micro").to(device)

    def epoch() -> tuple[float, float]:
        net.train()
        losses, accuracies = [], []
        for x, y in tqdm(loader, file=_Nowhere(), mininterval=0.1):
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            outputs = net(x)
            loss = loss_fn(outputs, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            accuracies.append(accuracy(outputs, y).item())
        return statistics.mean(losses), statistics.mean(accuracies)

    return epoch


def make_model(net: nn.Module, style: str, device: torch.device) -> kt.Model:
    """Return the model that both fit and its ejected twin train."""
    model = kt.Model(net, device)
    model.compile("cross_entropy", "adam", ["accuracy"], loop=style)
    return model


def fit_loop(net: nn.Module, loader: DataLoader[Any], device: torch.device, style: str) -> Epoch:
    """model.fit with loss, accuracy and the bar on (it draws into nowhere)."""
    model = make_model(net, style, device)
    return lambda: model.fit(loader, epochs=1, verbose=1)


def ejected_loop(net: nn.Module, loader: DataLoader[Any], device: torch.device, style: Style) -> Epoch:
    """The file that model.eject writes."""
    from torchmetrics.classification import MulticlassAccuracy

    model = make_model(net, style, device)
    module = types.ModuleType("ejected")
    sys.modules["ejected"] = module
    exec(compile(model.eject(style), "ejected.py", "exec"), vars(module))
    metrics = {"accuracy": MulticlassAccuracy(10, average="micro").to(device)}
    return lambda: module.train(net, model.optimizer, nn.CrossEntropyLoss(), metrics, loader, None, 1)


def make_loops(net: nn.Module, loader: DataLoader[Any], device: torch.device) -> dict[str, Epoch]:
    """Return {name: a function that trains one epoch}, each on a copy of the net of its own."""
    loops: dict[str, Epoch] = {"bare": bare_loop(copy.deepcopy(net).to(device), loader, device)}
    for style in STYLES:
        loops[f"fit, {style}"] = fit_loop(copy.deepcopy(net), loader, device, style)
    for style in STYLES:
        loops[f"ejected, {style}"] = ejected_loop(copy.deepcopy(net), loader, device, style)
    loops["textbook"] = textbook_loop(copy.deepcopy(net).to(device), loader, device)
    return loops


def measure(loops: dict[str, Epoch], rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of an epoch of each, all in turn in every round, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds + 1):
        for name, epoch in loops.items():
            begun = time.perf_counter()
            epoch()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


class _Nowhere:
    """A terminal that shows nothing, so that bars draw as they would in one."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def main() -> None:
    """Print a table of medians and of their ratios to the bare loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="epochs of each loop, in turn (default: 9)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--chart", type=Path, help="write a bar chart to this picture (needs matplotlib)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    machine = f"torch {torch.__version__}, {platform.machine()}, {device}, {arguments.threads} thread(s)"
    print(f"{machine}, median of {arguments.rounds} interleaved epochs; a ratio below 1 is faster than the bare loop")

    stdout, stderr = sys.stdout, sys.stderr
    results: dict[str, dict[str, float]] = {}
    for workload, (net, dataset, batch_size) in make_workloads().items():
        loops = make_loops(net, DataLoader(dataset, batch_size, shuffle=True), device)
        sys.stdout = sys.stderr = _Nowhere()
        try:
            results[workload] = measure(loops, arguments.rounds, device)
        finally:
            sys.stdout, sys.stderr = stdout, stderr
        bare = results[workload]["bare"]
        print(f"\n{workload}")
        for name, median in results[workload].items():
            print(f"  {name:20}{median * 1e3:9.1f} ms{median / bare:8.2f}x")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "seconds": results}, indent=2) + "\n")
    if arguments.chart:
        draw(results, arguments.chart)


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """Write a bar chart of the ratios to the bare loop, a panel for each workload."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 3.5), sharey=True, squeeze=False)
    for panel, (workload, seconds) in zip(panels[0], results.items(), strict=True):
        panel.barh(list(seconds), [median / seconds["bare"] for median in seconds.values()])
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set(title=workload, xlabel="time / bare loop")
    panels[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
