"""ModelCheckpoint: writes the run to disk as it trains."""

from __future__ import annotations

import glob
import math
import os
import re
import string
from pathlib import Path
from typing import Any, Literal

from kerastorch.callbacks.callback import Checkpointer, Logs, Moment, Monitor
from kerastorch.checkpoint import CheckpointWriter, newest_first
from kerastorch.errors import check_int, did_you_mean


class ModelCheckpoint(Checkpointer):
    """Write a checkpoint after every epoch or every n batches, or only when `monitor` got better.

    filepath: the file; "{epoch:02d}" and "{batch}" (counted from 1) and any key of the logs may stand in it, as
    "{val_loss:.3f}". Missing folders are made when fit begins.   monitor: what save_best_only and keep_best go by.
    verbose: 1 prints each save.   save_best_only: write only when monitor improved; NaN never does.
    save_weights_only: write the weights' state_dict alone.   mode: "min", "max" or "auto".
    save_freq: "epoch", or a number of batches, counted across epochs; it then writes at the next optimizer step, with
    the running averages as logs (reading them is a sync).   initial_value_threshold: a value that monitor must beat.
    keep_last: how many of the newest files stay.   keep_best: write when monitor is among its k best values, and keep
    those k files.   async_save: training waits for a copy to the CPU only, a thread writes it.

    The file holds {"epoch" (index of the last finished epoch), "model_state_dict" (what validation saw: the average
    under EMA or SWA), "optimizer_state_dict", "loss"} and all that fit(resume=...) needs to go on to the bit. It opens
    with torch.load(path, weights_only=True). A new file is on disk, whole, before an old one is replaced or deleted;
    only files of this fit are deleted. An interrupted fit writes once more, unless monitor chooses.
    last_path: the file written last, or None.
    Raises ValueError for a monitor that can't exist or a path that another callback or run writes to, KeyError for an
    unknown name in filepath, OSError for a folder that can't be written; all when fit begins where that can be known.
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
        save_freq: int | Literal["epoch"] = "epoch",
        initial_value_threshold: float | None = None,
        *,
        keep_last: int | None = None,
        keep_best: int | None = None,
        async_save: bool = False,
    ) -> None:
        self.filepath = os.fspath(filepath)
        self.monitor = monitor
        self._watched = Monitor(monitor, mode)
        self.verbose, self.save_best_only, self.save_weights_only = verbose, save_best_only, save_weights_only
        self.save_freq, self.initial_value_threshold = save_freq, initial_value_threshold
        self.keep_last, self.keep_best, self.async_save = keep_last, keep_best, async_save
        self._fields = {name for _, name, _, _ in string.Formatter().parse(self.filepath) if name is not None}
        self._check_arguments()
        self.chooses = save_best_only or keep_best is not None
        self.writes_resume_points = not save_weights_only
        self.saves_within_epochs = save_freq != "epoch"
        self.writes_first = self.chooses or save_weights_only
        self.last_path: Path | None = None
        self._written: list[tuple[Path, float]] = []  # files that are kept, and their values, oldest first
        self._batches_at_save = 0
        self._saved_at: tuple[int, int] | None = None
        self._writer: CheckpointWriter | None = None

    @property
    def best(self) -> float | None:
        """The best value of this fit so far, or initial_value_threshold."""
        return self._watched.best

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if self.chooses:
            self._watched.begin(self.run)
            self._watched.best = self.initial_value_threshold
        self._check_template()
        self._written, self._batches_at_save, self._saved_at, self.last_path = [], 0, None, None
        path = Path(self.filepath)
        if path.is_dir():
            raise IsADirectoryError(f"ModelCheckpoint's filepath {self.filepath!r} is a folder; give a file in it.")
        while "{" in str(path.parent):
            path = path.parent
        folder = path.parent
        for parent in (folder, *folder.parents):
            if parent.exists() and not parent.is_dir():
                raise NotADirectoryError(f"ModelCheckpoint's filepath {self.filepath!r}: {str(parent)!r} is a file.")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"ModelCheckpoint can't write into {str(folder)!r}.")
        self._writer = CheckpointWriter("ModelCheckpoint", path, is_async=self.async_save)

    def save(self, moment: Moment, logs: Logs) -> None:
        run = self.run
        position = (run.epochs_done, run.batches_done)
        if moment == "interrupt":
            if self.chooses or self.save_weights_only or position == self._saved_at or "loss" not in logs:
                return
        elif (moment == "epoch") != (self.save_freq == "epoch"):
            return
        elif self.save_freq != "epoch":
            if run.batches_seen - self._batches_at_save < self.save_freq:
                return
            self._batches_at_save = run.batches_seen
        value = math.nan
        if self.chooses:
            read = self._watched.read(logs, run)
            if read is None or not self._is_wanted(read):
                return
            value = read
            if self._watched.is_better(value, self._watched.best):
                self._watched.best = value
        path = self._path(logs, fills_missing=moment == "interrupt")
        stale = self._keep(path, value)
        self.last_path, self._saved_at = path, position
        content = run.published_state_dict() if self.save_weights_only else run.get_content(float(logs["loss"]))
        assert self._writer is not None
        self._writer.write(path, content, lambda: _delete(stale))
        if self.verbose:
            print(f"Epoch {run.epoch + 1}: saved {path}")

    def files(self) -> list[Path]:
        pattern, parts = self._pattern(), Path(self.filepath).parts
        fixed = next((i for i, part in enumerate(parts) if "{" in part), len(parts) - 1)
        rest = "/".join("*" if "{" in part else glob.escape(part) for part in parts[fixed:])
        found = Path(*parts[:fixed]).glob(rest)
        return newest_first(file for file in found if file.is_file() and pattern.fullmatch(str(file)))

    def on_train_end(self, logs: Logs | None = None) -> None:
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self._watched.best,
            "written": [[str(path), value] for path, value in self._written],
            "batches_at_save": self._batches_at_save,
            "last_path": self.last_path and str(self.last_path),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._watched.best = state_dict["best"]
        pattern = self._pattern()  # what a forged file names elsewhere is not ours to delete
        self._written = [(Path(path), value) for path, value in state_dict["written"] if pattern.fullmatch(path)]
        self._batches_at_save = state_dict["batches_at_save"]
        self.last_path = state_dict["last_path"] and Path(state_dict["last_path"])

    def _is_wanted(self, value: float) -> bool:
        if self.save_best_only or math.isnan(value):
            return self._watched.is_better(value, self._watched.best)
        assert self.keep_best is not None
        if not self._watched.is_better(value, self.initial_value_threshold):
            return False
        return len(self._written) < self.keep_best or self._watched.is_better(value, self._worst()[1])

    def _worst(self) -> tuple[Path, float]:
        sign = 1 if self._watched.higher_is_better else -1
        return min(self._written, key=lambda entry: sign * entry[1])

    def _keep(self, path: Path, value: float) -> list[Path]:
        """Note a file that is about to be written; return those that it makes superfluous."""
        self._written = [entry for entry in self._written if entry[0] != path]
        stale: list[Path] = []
        if self.keep_best is not None:
            while len(self._written) >= self.keep_best:
                stale.append(self._worst()[0])
                self._written.remove(self._worst())
        elif self.keep_last is not None:
            stale = [entry[0] for entry in self._written[: len(self._written) + 1 - self.keep_last]]
            self._written = self._written[len(stale) :]
        self._written.append((path, value))
        return stale

    def _path(self, logs: Logs, *, fills_missing: bool = False) -> Path:
        missing = dict.fromkeys(self._fields, math.nan) if fills_missing else {}
        return self._format({**self._counters(), **missing, **logs, **self._counters()})

    def _counters(self) -> dict[str, int]:
        counters = {"epoch": self.run.epoch + 1}
        return counters if self.save_freq == "epoch" else {**counters, "batch": self.run.batch + 1}

    def _format(self, values: Logs) -> Path:
        try:
            return Path(self.filepath.format(**values))
        except (KeyError, IndexError) as error:
            name = str(error.args[0])
            raise KeyError(
                f"ModelCheckpoint's filepath {self.filepath!r} names {name!r}, which is not in the logs;"
                f"{did_you_mean(name, values)} Known: {', '.join(values)}."
            ) from None

    def _pattern(self) -> re.Pattern[str]:
        """Return what the names of the files look like."""
        parts = []
        for text, name, _, _ in string.Formatter().parse(str(Path(self.filepath))):
            parts.append(re.escape(text))
            if name is not None:
                parts.append("[ 0-9]+" if name in ("epoch", "batch") else "[^/]+")
        return re.compile("".join(parts))

    def _check_arguments(self) -> None:
        if self.save_freq != "epoch":
            if isinstance(self.save_freq, str):
                raise ValueError(f"save_freq must be 'epoch' or a number of batches, got {self.save_freq!r}.")
            check_int("save_freq", self.save_freq)
        for argument, value in (("keep_last", self.keep_last), ("keep_best", self.keep_best)):
            if value is None:
                continue
            check_int(argument, value)
            if value > 1 and not self._fields:
                raise ValueError(
                    f"{argument}={value} needs names that differ: put {{epoch}} into filepath {self.filepath!r}."
                )
        if self.keep_best is not None and (self.keep_last is not None or self.save_best_only):
            other = "keep_last" if self.keep_last is not None else "save_best_only"
            raise ValueError(f"keep_best and {other} choose differently which files stay: give one of them.")
        if self.save_freq != "epoch" and (self.save_best_only or self.keep_best) and self.monitor.startswith("val_"):
            raise ValueError(
                f"save_freq={self.save_freq} writes inside an epoch, where monitor={self.monitor!r} is not known: use "
                "save_freq='epoch' or monitor='loss'."
            )

    def _check_template(self) -> None:
        """Format the path with the names that this run's logs will have, where all are known."""
        if not self.run.logs_are_known:
            return
        names = self.run.log_names
        is_always_validated = self.run.validates_every_epoch or (self.chooses and self.monitor.startswith("val_"))
        if self.save_freq != "epoch" or not is_always_validated:
            names = [name for name in names if not name.startswith("val_")]  # a save would lack them
        self._format({**self._counters(), **dict.fromkeys(names, 0.0)})


def _delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
