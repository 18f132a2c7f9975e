"""The pictures: curves over epochs. matplotlib is loaded when a picture is asked for. Sister: progress.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_curves(epochs: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> list[Axes]:
    """Draw a panel for each name, its "val_" twin in it, on a new pyplot figure; return the panels' Axes.

    epochs: indices from 0, drawn from 1.   rows: one dict of logs an epoch; values that are lists are left out.
    As with pandas, Axes are returned so that a notebook shows the figure once.   Raises ValueError if there is no row.
    """
    if not rows:
        raise ValueError("there is nothing to plot: no epoch has ended yet.")
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError('plot() needs matplotlib: pip install "kerastorch[plot]"') from error
    names = list(dict.fromkeys(k.removeprefix("val_") for row in rows for k, v in row.items() if isinstance(v, float)))
    _, (panels,) = plt.subplots(1, len(names), squeeze=False, figsize=(4.5 * len(names), 3.2), layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "validation")):
            points = [(epoch + 1, row[key]) for epoch, row in zip(epochs, rows, strict=True) if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set(xlabel="epoch", title=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return list(panels)
