"""What the benchmarks train, and how a good engineer would by hand. Sister: timing.py.

The nets are those of a first tutorial; data is random, since only time is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

import kerastorch as kt

Batches = Iterable[Any]  # of (x, y)
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def tiny_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10))


def mlp(*widths: int) -> nn.Module:
    """Return an MLP for 28 x 28 images, as mlp(784, 256, 10)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


def make_data(n: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Return n rows of this shape and a class out of ten for each."""
    return torch.randn(n, *shape), torch.randint(0, 10, (n,))


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A Dataset as people write it: a row at a time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Slices:
    """Batches sliced by hand: in a new random order each time, or, in order, views."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, shuffle: bool = True) -> None:
        self.x, self.y, self.batch_size, self.shuffle = x, y, batch_size, shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x)) if self.shuffle else None
        for start in range(0, len(self.x), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield (self.x[rows], self.y[rows]) if order is None else (self.x[order[rows]], self.y[order[rows]])


def fused_adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, fused=True)


# ---- by hand: sums on the device, nothing shown ----


def train_by_hand(
    net: nn.Module, batches: Batches, device: torch.device | str = "cpu", make_optimizer: MakeOptimizer = fused_adam
) -> Callable[[], tuple[float, float]]:
    """Return a function that trains a copy of the net for an epoch and returns loss and accuracy."""
    net = copy.deepcopy(net).to(device)
    optimizer, loss_fn = make_optimizer(net.parameters()), nn.CrossEntropyLoss()

    def epoch() -> tuple[float, float]:
        net.train()
        loss_sum, correct, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
        for x, y in batches:
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


def evaluate_by_hand(
    net: nn.Module, batches: Batches, device: torch.device | str = "cpu"
) -> Callable[[], tuple[float, float]]:
    """Return a function that returns loss and accuracy over the batches."""
    net, loss_fn = copy.deepcopy(net).to(device), nn.CrossEntropyLoss()

    @torch.no_grad()
    def evaluate() -> tuple[float, float]:
        net.eval()
        loss_sum, correct, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            outputs = net(x)
            loss_sum += loss_fn(outputs, y) * len(y)
            correct += (outputs.argmax(1) == y).sum()
            seen += len(y)
        return float(loss_sum) / seen, float(correct) / seen

    return evaluate


def predict_by_hand(net: nn.Module, batches: Batches, device: torch.device | str = "cpu") -> Callable[[], Any]:
    """Return a function that returns the outputs for all batches, a numpy array."""
    net = copy.deepcopy(net).to(device)

    @torch.no_grad()
    def predict() -> Any:
        net.eval()
        return torch.cat([net(x.to(device)).cpu() for x, _ in batches]).numpy()

    return predict


# ---- by kerastorch: loss and accuracy ----


def make_model(
    net: nn.Module, loop: str = "script", device: torch.device | str = "cpu", optimizer: str | MakeOptimizer = "adam"
) -> kt.Model:
    """Return a compiled Model of a copy of the net."""
    model = kt.Model(copy.deepcopy(net), device)
    model.compile("cross_entropy", optimizer, ["accuracy"], loop=loop)
    return model
