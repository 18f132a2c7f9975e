"""BackupAndRestore: lets a run that was killed go on by itself when it is started again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from kerastorch.callbacks.callback import Checkpointer, Logs, Moment, user_path
from kerastorch.checkpoint import CheckpointError, CheckpointWriter, newest_first, read_checkpoint, remove_leftovers


class BackupAndRestore(Checkpointer):
    """Keep a backup of the run in a folder; a fit that finds one goes on from it, to the bit, also inside an epoch.

    backup_dir: a folder of its own, made when fit begins; one that the run made goes, once empty, when it has ended.
    save_freq: "epoch", or a number of batches; it then writes at the next optimizer step.
    double_checkpoint: keep the backup before as well, for when the newest is damaged.
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
        super().__init__(save_freq)
        self.backup_dir, self.async_save = Path(user_path("backup_dir", backup_dir)), async_save
        self.double_checkpoint, self.delete_checkpoint = double_checkpoint, delete_checkpoint
        self._writer: CheckpointWriter | None = None
        self._made_folder = False

    def on_train_begin(self, logs: Logs | None = None) -> None:
        super().on_train_begin(logs)
        self._has_saved = False
        if self.backup_dir.exists() and not self.backup_dir.is_dir():
            raise NotADirectoryError(f"BackupAndRestore's backup_dir {str(self.backup_dir)!r} is a file.")
        self._made_folder = not self.backup_dir.exists()
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(self.backup_dir, os.W_OK):
            raise PermissionError(f"BackupAndRestore can't write into {str(self.backup_dir)!r}.")
        self._writer = CheckpointWriter("BackupAndRestore", self._paths()[0], is_async=self.async_save)
        remove_leftovers(self.backup_dir, [path.name for path in self._paths(True)].__contains__)

    def save(self, moment: Moment, logs: Logs) -> None:
        if not self.is_due(moment, logs):
            return
        assert self._writer is not None
        self._writer.wait()  # for a file that may become the newest
        self._writer.write(self._target(), self.run.get_content(float(logs["loss"])), lambda: None)

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
        try:
            writer.close()
        finally:
            if self._made_folder:
                with suppress(OSError):  # where it holds something, or has gone
                    self.backup_dir.rmdir()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "made_folder": self._made_folder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._made_folder = bool(state_dict["made_folder"])

    def _paths(self, both: bool = False) -> list[Path]:
        names = ["backup.pt", "backup_2.pt"] if both or self.double_checkpoint else ["backup.pt"]
        return [self.backup_dir / name for name in names]

    def _target(self) -> Path:
        """Return the file to replace: one that is not there yet, or is damaged, or the older."""
        paths = self._paths()
        useless = [path for path in paths if not path.exists()]
        if len(paths) > 1 and not self._has_saved:  # found at the start: it may be damaged
            useless += [path for path in paths if path.exists() and not _can_be_read(path)]
        self._has_saved = True
        return useless[0] if useless else newest_first(paths)[-1]


def _can_be_read(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except (CheckpointError, OSError):
        return False
    return True
