"""BackupAndRestore: lets a run that was killed go on by itself when it is started again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from kerastorch.callbacks.callback import Checkpointer, Logs, Moment
from kerastorch.checkpoint import CheckpointWriter, newest_first
from kerastorch.errors import check_int


class BackupAndRestore(Checkpointer):
    """Keep a backup of the run in a folder; a fit that finds one goes on from it, to the bit, also inside an epoch.

    backup_dir: a folder of its own, made when fit begins.   save_freq: "epoch", or a number of batches; it then writes
    at the next optimizer step.   double_checkpoint: keep the backup before as well, for when the newest is damaged.
    delete_checkpoint: delete the backups when fit has ended, not after an interrupt.   async_save: training waits for a
    copy to the CPU only, a thread writes it.
    Ctrl-C, a notebook's stop button and SIGTERM write a backup before fit ends; after SIGTERM the process exits with
    status 143.
    Raises OSError for a folder that can't be written, ValueError for one that another run writes to, when fit begins;
    CheckpointError where there are backups and none can be read.
    Source: arguments of keras.callbacks.BackupAndRestore.
    """

    resumes_by_itself = True

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: int | Literal["epoch"] = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        *,
        async_save: bool = False,
    ) -> None:
        if save_freq != "epoch":
            if isinstance(save_freq, str):
                raise ValueError(f"save_freq must be 'epoch' or a number of batches, got {save_freq!r}.")
            check_int("save_freq", save_freq)
        self.backup_dir = Path(backup_dir)
        self.save_freq, self.async_save = save_freq, async_save
        self.double_checkpoint, self.delete_checkpoint = double_checkpoint, delete_checkpoint
        self.saves_within_epochs = save_freq != "epoch"
        self._batches_at_save = 0
        self._saved_at: tuple[int, int] | None = None
        self._writer: CheckpointWriter | None = None

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self._batches_at_save, self._saved_at = 0, None
        if self.backup_dir.exists() and not self.backup_dir.is_dir():
            raise NotADirectoryError(f"BackupAndRestore's backup_dir {str(self.backup_dir)!r} is a file.")
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(self.backup_dir, os.W_OK):
            raise PermissionError(f"BackupAndRestore can't write into {str(self.backup_dir)!r}.")
        self._writer = CheckpointWriter("BackupAndRestore", self._paths()[0], is_async=self.async_save)

    def save(self, moment: Moment, logs: Logs) -> None:
        run = self.run
        position = (run.epochs_done, run.batches_done)
        if moment == "interrupt":
            if position == self._saved_at or "loss" not in logs:
                return
        elif (moment == "epoch") != (self.save_freq == "epoch"):
            return
        elif self.save_freq != "epoch":
            if run.batches_seen - self._batches_at_save < self.save_freq:
                return
            self._batches_at_save = run.batches_seen
        self._saved_at = position
        assert self._writer is not None
        self._writer.wait()  # for a file that may become the newest
        self._writer.write(self._target(), run.get_content(float(logs["loss"])), lambda: None)

    def files(self) -> list[Path]:
        return newest_first(path for path in self._paths(True) if path.is_file())

    def on_train_end(self, logs: Logs | None = None) -> None:
        assert self._writer is not None
        self._writer.wait()
        if self.delete_checkpoint and self.run.interrupt is None:
            for path in self.files():
                path.unlink(missing_ok=True)

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        writer.close()
        if self.backup_dir.is_dir() and not any(self.backup_dir.iterdir()):
            self.backup_dir.rmdir()

    def state_dict(self) -> dict[str, Any]:
        return {"batches_at_save": self._batches_at_save}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches_at_save = state_dict["batches_at_save"]

    def _paths(self, both: bool = False) -> list[Path]:
        names = ["backup.pt", "backup_2.pt"] if both or self.double_checkpoint else ["backup.pt"]
        return [self.backup_dir / name for name in names]

    def _target(self) -> Path:
        """Return the file to replace: one that is not there yet, or the older."""
        paths = self._paths()
        missing = [path for path in paths if not path.exists()]
        return missing[0] if missing else newest_first(paths)[-1]
