"""ModelCheckpoint: writes the run to disk as it trains."""

from __future__ import annotations

import glob
import math
import os
import re
import string
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from kerastorch.callbacks.callback import Checkpointer, Logs, Moment, Monitor, user_path
from kerastorch.checkpoint import CheckpointWriter, newest_first, remove_leftovers
from kerastorch.device import are_finite
from kerastorch.errors import check_int, did_you_mean

SEPARATORS = tuple(separator for separator in (os.sep, os.altsep) if separator is not None)


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
        super().__init__(save_freq)
        self.filepath = user_path("filepath", filepath)
        self.monitor = monitor
        self.watched = Monitor(monitor, mode)
        self.verbose, self.save_best_only, self.save_weights_only = verbose, save_best_only, save_weights_only
        self.initial_value_threshold = initial_value_threshold
        self.keep_last, self.keep_best, self.async_save = keep_last, keep_best, async_save
        self._parts = _parse(str(Path(self.filepath)))
        self.fields = {name for _, name in self._parts if name is not None}
        self._check_arguments()
        self.chooses = save_best_only or keep_best is not None
        self.writes_resume_points = not save_weights_only
        self.writes_first = self.chooses or save_weights_only
        self.last_path: Path | None = None
        self._written: list[tuple[Path, float]] = []  # files that are kept, and their values, oldest first
        self._stale: list[tuple[Path, float]] = []  # files that go when the next one is on disk
        self._writer: CheckpointWriter | None = None

    @property
    def best(self) -> float | None:
        """The best value of this fit so far, or initial_value_threshold."""
        return self.watched.best

    def on_train_begin(self, logs: Logs | None = None) -> None:
        super().on_train_begin(logs)
        if self.chooses:
            self.watched.begin(self.run)
            self.watched.best = self.initial_value_threshold
        self._check_template()
        self._written, self._stale, self.last_path = [], [], None
        self._check_others()
        path = Path(self._template())
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
        pattern = self._pattern()
        remove_leftovers(folder, lambda name: pattern.fullmatch(str(folder / name)))

    def save(self, moment: Moment, logs: Logs) -> None:
        run = self.run
        if (moment == "interrupt" and (self.chooses or self.save_weights_only)) or not self.is_due(moment, logs):
            return
        value = math.nan
        if self.chooses:
            read = self.watched.read(logs, run)
            if read is None or not self._is_wanted(read) or not are_finite(run.published_state_dict()):
                return
            value = read
            if self.watched.is_better(value, self.watched.best):
                self.watched.best = value
        path = self._path(logs, fills_missing=moment == "interrupt")
        if any(kept == path and self.watched.is_better(its_value, value) for kept, its_value in self._written):
            return  # among the best too, but a better one has this name
        stale = [entry for entry in [*self._stale, *self._keep(path, value)] if entry[0] != path]
        self._stale = stale
        content = run.published_state_dict() if self.save_weights_only else run.get_content(float(logs["loss"]))
        epoch = run.epoch
        assert self._writer is not None
        self._writer.write(path, content, lambda: self._end_save(epoch, path, stale))

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
        watches = {"file": Path(self._template()).name}  # the folder may be moved
        return {
            **super().state_dict(),
            "watches": watches | self.watched.watches if self.chooses else watches,
            "best": self.watched.best,
            "written": [[str(path), value] for path, value in self._written],
            "stale": [[str(path), value] for path, value in self._stale],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.watched.best = state_dict["best"]
        pattern = self._pattern()  # what a forged file names elsewhere is not ours to delete
        self._written, self._stale = (
            [(Path(path), value) for path, value in state_dict[name] if pattern.fullmatch(path)]
            for name in ("written", "stale")
        )
        self.last_path = self._written[-1][0] if self._written else None
        if self.last_path is not None and self.last_path.exists():  # it was written, and the run died then
            self._commit(self.last_path, self._stale)

    def _is_wanted(self, value: float) -> bool:
        if self.save_best_only or math.isnan(value):
            return self.watched.is_better(value, self.watched.best)
        assert self.keep_best is not None
        if not self.watched.is_better(value, self.initial_value_threshold):
            return False
        return len(self._written) < self.keep_best or self.watched.is_better(value, self._worst()[1])

    def _worst(self) -> tuple[Path, float]:
        sign = 1 if self.watched.higher_is_better else -1
        return min(self._written, key=lambda entry: sign * entry[1])

    def _keep(self, path: Path, value: float) -> list[tuple[Path, float]]:
        """Note a file that is about to be written; return those that it makes superfluous."""
        self._written = [entry for entry in self._written if entry[0] != path]
        stale: list[tuple[Path, float]] = []
        if self.keep_best is not None:
            while len(self._written) >= self.keep_best:
                stale.append(self._worst())
                self._written.remove(self._worst())
        elif self.keep_last is not None:
            stale = self._written[: len(self._written) + 1 - self.keep_last]
            self._written = self._written[len(stale) :]
        self._written.append((path, value))
        return stale

    def _end_save(self, epoch: int, path: Path, stale: list[tuple[Path, float]]) -> None:
        self._commit(path, stale)
        if self.verbose:
            print(f"Epoch {epoch + 1}: saved {path}")

    def _commit(self, path: Path, stale: list[tuple[Path, float]]) -> None:
        self.last_path = path
        for old, _ in stale:
            old.unlink(missing_ok=True)
        self._stale = [entry for entry in self._stale if entry not in stale]

    def _path(self, logs: Logs, *, fills_missing: bool = False) -> Path:
        missing = dict.fromkeys(self.fields, math.nan) if fills_missing else {}
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
                f"ModelCheckpoint's filepath {self.filepath!r} names {name!r}, which is not in the logs"
                f"{did_you_mean(name, values)} Known: {', '.join(values)}."
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"ModelCheckpoint's filepath {self.filepath!r} can't be filled in: {error}.") from None

    def _template(self) -> str:
        """Return filepath with its fields' names alone, in which templates that differ in spelling are the same."""
        return "".join(text if name is None else f"{text}{{{name}}}" for text, name in self._parts)

    def _check_others(self) -> None:
        """Refuse another callback's fixed path that this one's template would write too."""
        for other in self.run.callbacks.checkpointers:
            if not isinstance(other, ModelCheckpoint) or other.fields or not self.fields:
                continue
            if self._pattern().fullmatch(str(Path(other.filepath))):
                raise ValueError(
                    f"ModelCheckpoint's filepath {self.filepath!r} would write {other.filepath!r} too, which another "
                    "callback writes: give them names that differ."
                )

    def _pattern(self) -> re.Pattern[str]:
        """Return what the names of the files look like."""
        parts = []
        for text, name in self._parts:
            parts.append(re.escape(text))
            if name is not None:
                parts.append("[ 0-9]+" if name in ("epoch", "batch") else r"(?!\.\.?(?:/|$))[^/]+")
        return re.compile("".join(parts))

    def _check_arguments(self) -> None:
        if self.filepath.endswith(SEPARATORS):
            raise ValueError(f"filepath {self.filepath!r} is a folder: give a file in it, as '{{epoch}}.pt'.")
        threshold = self.initial_value_threshold
        if threshold is not None and (not isinstance(threshold, Real) or math.isnan(threshold)):
            raise ValueError(f"initial_value_threshold must be a number to beat, got {threshold!r}.")
        for argument, value in (("keep_last", self.keep_last), ("keep_best", self.keep_best)):
            if value is None:
                continue
            check_int(argument, value)
            if value > 1 and not self.fields:
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


def _parse(filepath: str) -> list[tuple[str, str | None]]:
    """Return each piece of text in filepath with the name of the field that follows it, if one does."""
    try:
        return [(text, name) for text, name, _, _ in string.Formatter().parse(filepath)]
    except ValueError as error:
        raise ValueError(
            f"filepath {filepath!r} is no template: {error}. A brace of a name is written twice."
        ) from None
