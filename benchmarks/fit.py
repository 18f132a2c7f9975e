"""fit, evaluate and predict against loops written by hand: time of an epoch, interleaved, medians.

python benchmarks/fit.py [--rounds 7] [--threads 1] [--device cpu] [--only WORD] [--json FILE] [--chart FILE]

A ratio below 1 is faster than the first line of its table. The loops by hand keep loss and correct count on the device
and show nothing; fit shows loss, accuracy and the bar, which draws into nowhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from timing import Turn, machine, make_parser, measure, settle, show, silence, write
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import (
    Pairs,
    Slices,
    conv_net,
    evaluate_by_hand,
    make_data,
    make_model,
    mlp,
    predict_by_hand,
    tiny_mlp,
    train_by_hand,
)

import kerastorch as kt

EAGER = ("script", "function", "class")
GRAPH_EPOCHS = 4


def fit_loader(net: nn.Module, loader: DataLoader[Any], device: str) -> dict[str, Turn]:
    """The three loops against the loop by hand, on one loader."""
    turns: dict[str, Turn] = {"by hand": train_by_hand(net, loader, device)}
    for loop in EAGER:
        turns[f"fit, {loop}"] = partial(make_model(net, loop, device).fit, loader, verbose=1)
    return turns


def over_tensor_dataset(device: str) -> dict[str, Turn]:
    return fit_loader(tiny_mlp(), DataLoader(TensorDataset(*make_data(16384, 20)), 32, shuffle=True), device)


def over_own_dataset(net: nn.Module, n: int, device: str) -> dict[str, Turn]:
    return fit_loader(net, DataLoader(Pairs(*make_data(n, 1, 28, 28)), 64, shuffle=True), device)


def over_arrays(device: str) -> dict[str, Turn]:
    net, (x, y) = tiny_mlp(), make_data(16384, 20)
    turns: dict[str, Turn] = {"slices by hand": train_by_hand(net, Slices(x, y, 32), device)}
    for loop in EAGER:
        turns[f"fit(tensors), {loop}"] = partial(make_model(net, loop, device).fit, x, y, batch_size=32, verbose=1)
    turns["fit(arrays), script"] = partial(
        make_model(net, "script", device).fit, x.numpy(), y.numpy(), batch_size=32, verbose=1
    )
    return turns


def read_loader(verb: str, device: str) -> dict[str, Turn]:
    net, loader = tiny_mlp(), DataLoader(TensorDataset(*make_data(100_000, 20)), 32)
    by_hand: Callable[..., Turn] = evaluate_by_hand if verb == "evaluate" else predict_by_hand
    return {
        "by hand": by_hand(net, loader, device),
        verb: partial(getattr(make_model(net, device=device), verb), loader, verbose=1),
    }


def read_tensors(verb: str, device: str) -> dict[str, Turn]:
    net, (x, y) = tiny_mlp(), make_data(100_000, 20)
    by_hand: Callable[..., Turn] = evaluate_by_hand if verb == "evaluate" else predict_by_hand
    data = (x, y) if verb == "evaluate" else (x,)
    return {
        "slices by hand": by_hand(net, Slices(x, y, 32, shuffle=False), device),
        verb: partial(getattr(make_model(net, device=device), verb), *data, batch_size=32, verbose=1),
    }


def graph(net: nn.Module, n: int, shape: tuple[int, ...], batch_size: int, adam: bool, device: str) -> dict[str, Turn]:
    """The graph loop against slices by hand, GRAPH_EPOCHS a turn; its first call, which compiles, is in no figure.

    By hand with the fused optimizer, and with torch's default one, which is what most people write.
    """
    x, y = make_data(n, *shape)
    plain: Any = torch.optim.Adam if adam else partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    epochs = [train_by_hand(net, Slices(x, y, batch_size), device, one) for one in (partial(plain, fused=True), plain)]
    fit = make_model(net, "graph", device, plain).fit
    fused_by_hand, by_hand = (lambda epoch=epoch: [epoch() for _ in range(GRAPH_EPOCHS)] for epoch in epochs)
    return {
        "slices by hand": fused_by_hand,
        "with torch's default optimizer": by_hand,
        "fit, graph": partial(fit, x, y, batch_size=batch_size, epochs=GRAPH_EPOCHS, verbose=1),
    }


WORKS: dict[str, Callable[[str], dict[str, Turn]]] = {
    "DataLoader over a TensorDataset, tiny MLP": over_tensor_dataset,
    "arrays, tiny MLP": over_arrays,
    "DataLoader over a Dataset, MLP 784-256-10": lambda device: over_own_dataset(mlp(784, 256, 10), 6400, device),
    "DataLoader over a Dataset, conv net": lambda device: over_own_dataset(conv_net(), 1280, device),
    "evaluate, DataLoader of 100k rows": partial(read_loader, "evaluate"),
    "evaluate, tensors of 100k rows": partial(read_tensors, "evaluate"),
    "predict, DataLoader of 100k rows": partial(read_loader, "predict"),
    "predict, tensors of 100k rows": partial(read_tensors, "predict"),
    "graph loop, tiny MLP, SGD": lambda device: graph(tiny_mlp(), 16384, (20,), 32, False, device),
    "graph loop, tiny MLP, Adam": lambda device: graph(tiny_mlp(), 16384, (20,), 32, True, device),
    "graph loop, MLP 784-512-512-10": lambda device: graph(mlp(784, 512, 512, 10), 3200, (1, 28, 28), 64, True, device),
    "graph loop, conv net": lambda device: graph(conv_net(), 1280, (1, 28, 28), 64, True, device),
}


def count_idle_hooks() -> int:
    """Return how many batch hooks an epoch of 10 batches calls for a callback that overrides none."""
    model, (x, y) = make_model(tiny_mlp()), make_data(320, 20)
    calls: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        name = frame.f_code.co_name
        if event == "call" and name.startswith("on_") and "_batch_" in name:
            calls.append(name)

    sys.setprofile(note)
    try:
        model.fit(x, y, batch_size=32, callbacks=[kt.Callback()], verbose=0)
    finally:
        sys.setprofile(None)
    return len(calls)


def main() -> None:
    """Print a table of medians and of ratios for each work."""
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    arguments = parser.parse_args()
    settle(arguments.threads)
    torch.manual_seed(0)
    print(f"{machine(arguments.device)}, median of {arguments.rounds} interleaved rounds")
    tables = {}
    for title, make_turns in WORKS.items():
        if arguments.only in title:
            with silence():
                tables[title] = measure(make_turns(arguments.device), arguments.rounds)
            show(title, tables[title])
    print(f"\ncalls of batch hooks that nobody overrides, in an epoch of 10 batches: {count_idle_hooks()}")
    write(arguments, tables, arguments.device)


if __name__ == "__main__":
    main()
