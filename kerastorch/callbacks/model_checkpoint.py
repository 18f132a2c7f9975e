"""ModelCheckpoint: writes the model to disk as it trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from kerastorch.callbacks.callback import Callback, Logs, Monitor
from kerastorch.checkpoint import write_checkpoint
from kerastorch.errors import did_you_mean


class ModelCheckpoint(Callback):
    """Write a checkpoint after every epoch, or only when `monitor` got better.

    filepath: the file; "{epoch:02d}" (counted from 1) and any key of the logs may stand in it, as "{val_loss:.3f}".
    Missing folders are made when fit begins.   monitor: what save_best_only goes by.   verbose: 1 prints each save.
    save_best_only: write only when monitor improved; NaN never does.
    save_weights_only: write net.state_dict() alone instead of the recipe's dict.   mode: "min", "max" or "auto".
    The file holds {"epoch" (index of the finished epoch), "model_state_dict", "optimizer_state_dict", "loss"}, opens
    with torch.load(path, weights_only=True), and replaces an older one only when it is wholly written.
    last_path: the file written last, or None.
    Raises ValueError for a monitor that can't exist, KeyError for an unknown name in filepath, OSError for a folder
    that can't be written; all when fit begins where that can be known.
    Source: arguments and rules of keras.callbacks.ModelCheckpoint.
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: Literal["auto", "min", "max"] = "auto",
    ) -> None:
        self.filepath = os.fspath(filepath)
        self.monitor = monitor
        self._watched = Monitor(monitor, mode)
        self.verbose, self.save_best_only, self.save_weights_only = verbose, save_best_only, save_weights_only
        self.last_path: Path | None = None

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if self.save_best_only:
            self._watched.begin(self.run)
        path = Path(self.filepath)
        if self.run.logs_are_known:
            names = self.run.log_names
            if not self.run.validates_every_epoch and not (self.save_best_only and self.monitor.startswith("val_")):
                names = [name for name in names if not name.startswith("val_")]  # an epoch to save would lack them
            path = self._path(self.run.initial_epoch, dict.fromkeys(names, 0.0))
        if path.is_dir():
            raise IsADirectoryError(f"ModelCheckpoint's filepath {self.filepath!r} is a folder; give a file in it.")
        if "{" not in str(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(f"ModelCheckpoint can't write into {str(path.parent)!r}.")

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        logs = logs or {}
        if self.save_best_only:
            value = self._watched.read(logs, self.run)
            if value is None or not self._watched.is_better(value, self._watched.best):
                return
            self._watched.best = value
        path = self._path(epoch, logs)
        path.parent.mkdir(parents=True, exist_ok=True)
        net, optimizer = self.run.net, self.run.optimizer
        if self.save_weights_only:
            write_checkpoint(path, net.state_dict())
        else:
            content = {
                "epoch": epoch,
                "model_state_dict": net.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                "loss": logs["loss"],
            }
            write_checkpoint(path, content)
        self.last_path = path
        if self.verbose:
            print(f"Epoch {epoch + 1}: saved {path}")

    def _path(self, epoch: int, logs: Logs) -> Path:
        try:
            return Path(self.filepath.format(epoch=epoch + 1, **logs))
        except (KeyError, IndexError) as error:
            known = ["epoch", *logs]
            name = str(error.args[0])
            raise KeyError(
                f"ModelCheckpoint's filepath {self.filepath!r} names {name!r}, which is not in the logs;"
                f"{did_you_mean(name, known)} Known: {', '.join(known)}."
            ) from None
