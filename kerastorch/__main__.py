"""python -m kerastorch: train a small conv net on the embedded digits, test it, and say where things were written."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import EarlyStopping, ModelCheckpoint
from kerastorch.loops import LOOPS


def make_net() -> nn.Module:
    """Return a conv net for 1x8x8 images of 10 classes."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 2 * 2, 10)),
    )


def main(argv: list[str] | None = None) -> int:
    """Run the job; return the exit status: 0, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m kerastorch", description=__doc__)
    parser.add_argument("--loop", choices=list(LOOPS), default="script", help="the training loop (default: script)")
    parser.add_argument("--epochs", type=int, default=30, help="train at most so many epochs (default: 30)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits"), help="folder to write to (default: runs/digits)"
    )
    arguments = parser.parse_args(argv)
    try:
        _train(arguments.loop, arguments.epochs, arguments.device, arguments.out)
    except KeyboardInterrupt:
        print("\nStopped.")
        return 130
    except (ValueError, OSError) as error:  # a device that is not there, a folder that can't be written
        parser.error(str(error))
    return 0


def _train(loop: str, epochs: int, device: str, out: Path) -> None:
    begun = time.perf_counter()
    kt.set_seed(0)
    (x_train, y_train), (x_test, y_test) = kt.datasets.digits()
    net = make_net()
    model = kt.Model(net, device)
    model.compile("cross_entropy", "adam", ["accuracy"], loop=loop)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    print(
        f"{len(x_train)} training and {len(x_test)} test images, {parameters:,} parameters, {model.device}, {loop} loop"
    )

    checkpoint = ModelCheckpoint(out / "best.pt", save_best_only=True)
    stop = EarlyStopping(patience=5, restore_best_weights=True, verbose=1)
    model.fit(x_train, y_train, epochs=epochs, validation_split=0.15, callbacks=[checkpoint, stop])

    history_path = out / "history.csv"
    columns = model.history.history
    rows = zip(model.history.epoch, *columns.values(), strict=True)
    lines = [",".join(["epoch", *columns]), *(",".join(map(str, row)) for row in rows)]
    history_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    test = model.evaluate(x_test, y_test, verbose=0)
    assert isinstance(test, dict)
    print(f"test accuracy: {test['accuracy']:.4f}   test loss: {test['loss']:.4f}")
    print(f"best weights: {checkpoint.last_path}   history: {history_path}")
    print(f"{len(model.history.epoch)} epochs, {time.perf_counter() - begun:.1f} s, torch {torch.__version__}")


if __name__ == "__main__":
    raise SystemExit(main())
