"""The three loops, their ejected twins and textbook loops against a bare loop: time of an epoch, interleaved, medians.

python benchmarks/loop_styles.py [--rounds 9] [--threads 1] [--device cpu] [--only WORD] [--json FILE] [--chart FILE]

The bare loop keeps loss and correct count on the device and shows nothing. The textbook loops call .item() and update a
metric at every step, as most tutorials do. All train the same net on the same DataLoader over a TensorDataset.
"""

from __future__ import annotations

import copy
import statistics
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from timing import Nowhere, Tables, Turn, machine, make_parser, measure, settle, show, silence, write
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import conv_net, make_data, make_model, mlp, tiny_mlp, train_by_hand

Style = Literal["script", "function", "class"]
STYLES: tuple[Style, ...] = ("script", "function", "class")
WORKS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...], int]] = {  # net, rows, shape of one, batch size
    "tiny MLP, batch 32": (tiny_mlp, 8192, (20,), 32),
    "MLP 784-256-10, batch 64": (partial(mlp, 784, 256, 10), 6400, (1, 28, 28), 64),
    "conv net, batch 64": (conv_net, 1280, (1, 28, 28), 64),
}


def textbook_loop(net: nn.Module, loader: DataLoader[Any], device: str) -> Turn:
    """The loop of many tutorials: .item() and a torchmetrics forward at every step, and a bar."""
    from torchmetrics.classification import MulticlassAccuracy
    from tqdm import tqdm

    net = copy.deepcopy(net).to(device)
    optimizer, loss_fn = torch.optim.Adam(net.parameters()), nn.CrossEntropyLoss()
    accuracy = MulticlassAccuracy(10, average="micro").to(device)

    def epoch() -> tuple[float, float]:
        net.train()
        losses, accuracies = [], []
        for x, y in tqdm(loader, file=Nowhere(), mininterval=0.1):
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


def ejected_loop(net: nn.Module, loader: DataLoader[Any], device: str, style: Style) -> Turn:
    """The file that model.eject writes."""
    from torchmetrics.classification import MulticlassAccuracy

    model = make_model(net, style, device)
    module = types.ModuleType("ejected")
    sys.modules["ejected"] = module
    exec(compile(model.eject(style), "ejected.py", "exec"), vars(module))
    metrics = {"accuracy": MulticlassAccuracy(10, average="micro").to(device)}
    return lambda: module.train(model.net, model.optimizer, nn.CrossEntropyLoss(), metrics, loader, None, 1)


def make_turns(net: nn.Module, loader: DataLoader[Any], device: str) -> dict[str, Turn]:
    """Return {name: a function that trains one epoch}, each on a copy of the net of its own."""
    turns: dict[str, Turn] = {"bare": train_by_hand(net, loader, device)}
    loops = (*STYLES, "graph") if torch.device(device).type == "cuda" else STYLES  # the CPU's graph is fit.py's
    for style in loops:  # with loss, accuracy and the bar on, which draws into nowhere
        turns[f"fit, {style}"] = partial(make_model(net, style, device).fit, loader, verbose=1)
    for style in STYLES:
        turns[f"ejected, {style}"] = ejected_loop(net, loader, device, style)
    turns["textbook"] = textbook_loop(net, loader, device)
    return turns


def main() -> None:
    """Print a table of medians and of their ratios to the bare loop."""
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    arguments = parser.parse_args()
    settle(arguments.threads)
    torch.manual_seed(0)
    print(f"{machine(arguments.device)}, median of {arguments.rounds} interleaved epochs")
    tables: Tables = {}
    for title, (make_net, n, shape, batch_size) in WORKS.items():
        if arguments.only in title:
            loader = DataLoader(TensorDataset(*make_data(n, *shape)), batch_size, shuffle=True)
            with silence():
                tables[title] = measure(make_turns(make_net(), loader, arguments.device), arguments.rounds)
            show(title, tables[title])
    write(arguments, tables, arguments.device)


if __name__ == "__main__":
    main()
