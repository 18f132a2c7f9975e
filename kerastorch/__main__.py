"""python -m kerastorch: train a small conv net on the embedded digits, test it, and say where things were written.

python -m kerastorch eject [--style script|function|class]: print the same training as a file of plain PyTorch.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import EarlyStopping, ModelCheckpoint
from kerastorch.eject import STYLES, eject_model
from kerastorch.loops import LOOPS

EPOCHS = 30
VALIDATION_SPLIT = 0.15


def make_net() -> nn.Module:
    """Return a conv net for 1x8x8 images of 10 classes."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 2 * 2, 10)),
    )


def make_model(device: str, loop: str) -> kt.Model:
    """Return the model of the job, compiled."""
    model = kt.Model(make_net(), device)
    model.compile("cross_entropy", "adam", ["accuracy"], loop=loop)
    return model


def make_callbacks(out: Path) -> tuple[ModelCheckpoint, EarlyStopping]:
    """Return the job's callbacks: the best weights on disk, and back in the net at the end."""
    checkpoint = ModelCheckpoint(out / "best.pt", save_best_only=True)
    return checkpoint, EarlyStopping(patience=5, restore_best_weights=True, verbose=1)


def main(argv: list[str] | None = None) -> int:
    """Run the job, or eject it; return the exit status: 0, or 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["eject"]:
        return _eject(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m kerastorch", description=__doc__.splitlines()[0])
    parser.add_argument("--loop", choices=list(LOOPS), default="script", help="the training loop (default: script)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"train at most so many epochs (default: {EPOCHS})")
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


class _OneBatch(kt.Callback):
    """Ends fit where it has shown what eject needs to know."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.stop_training = True


# What stands around train() in the ejected file: what it trains on, and what it reached.
BEFORE = """
# kerastorch is here for its digits alone: put tensors of your own, x, y, x_test, y_test, in place of these lines.
from kerastorch.datasets import digits

(x, y), (x_test, y_test) = digits()

torch.manual_seed(0)
net = {net}
"""
AFTER = """
net.eval()
with torch.no_grad():
    accuracy = (net(x_test).argmax(1) == y_test).double().mean().item()
print(f"test accuracy: {accuracy:.4f}")
"""


def _eject(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kerastorch eject", description="Print the job's training as a file of plain PyTorch."
    )
    parser.add_argument("--style", choices=STYLES, default="script", help="how its loop reads (default: script)")
    style = parser.parse_args(argv).style
    (x, y), _ = kt.datasets.digits()
    model = make_model("cpu", "script")
    model.fit(x, y, epochs=EPOCHS, validation_split=VALIDATION_SPLIT, callbacks=_OneBatch(), verbose=0)
    net = textwrap.dedent(inspect.getsource(make_net).partition("    return ")[2]).strip()
    net = "\n".join(line.removeprefix("    ") for line in net.splitlines())
    around = BEFORE.replace("{net}", net), AFTER
    print(eject_model(model, style, callbacks=make_callbacks(Path("runs/digits")), around=around), end="")
    return 0


def _train(loop: str, epochs: int, device: str, out: Path) -> None:
    begun = time.perf_counter()
    kt.set_seed(0)
    (x_train, y_train), (x_test, y_test) = kt.datasets.digits()
    model = make_model(device, loop)
    parameters = sum(parameter.numel() for parameter in model.net.parameters())
    print(
        f"{len(x_train)} training and {len(x_test)} test images, {parameters:,} parameters, {model.device}, {loop} loop"
    )

    checkpoint, stop = make_callbacks(out)
    model.fit(x_train, y_train, epochs=epochs, validation_split=VALIDATION_SPLIT, callbacks=[checkpoint, stop])

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
