"""CSVLogger: writes the logs of each epoch as a row of a CSV file."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from kerastorch.callbacks.callback import Callback, Logs, user_path
from kerastorch.errors import warn


class CSVLogger(Callback):
    """Write a row after each epoch: the epoch's index, from 0, then the values of the logs.

    filename: the file; missing folders are made when fit begins.   separator: one character.
    append: go on in an existing file, which must have the same columns, instead of replacing it.
    The columns are the keys of the first epoch's logs, and the "val_" keys that only later epochs have; a key that
    comes later is left out with a warning. A missing value is "NA"; one that is a list is written as JSON.
    Each row is in the file when the epoch ends, and on disk before a checkpoint that counts it; an older file is
    replaced by the first row, not before. A resumed run keeps the rows of the epochs before and cuts later ones.
    Raises OSError for a file that can't be written, when fit begins, and ValueError for a file to append to that has
    other columns, there too where that can be known.   Source: arguments and rules of keras.callbacks.CSVLogger.
    """

    def __init__(self, filename: str | os.PathLike[str], separator: str = ",", append: bool = False) -> None:
        if not isinstance(separator, str) or len(separator) != 1 or separator in '"\r\n':
            raise ValueError(f"separator must be one character, not a quote or a line end, got {separator!r}.")
        self.filename = user_path("filename", filename)
        self.separator, self.append = separator, append
        self._file: TextIO | None = None
        self._header: list[str] = []
        self._writer: csv.DictWriter[str] | None = None
        self._left_out: set[str] = set()

    def on_train_begin(self, logs: Logs | None = None) -> None:
        path = Path(self.filename)
        if path.is_dir():
            raise IsADirectoryError(f"CSVLogger's filename {self.filename!r} is a folder; give a file in it.")
        self._writer, self._header, self._left_out = None, [], set()
        if self.append and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self._header = next(csv.reader(file, delimiter=self.separator), [])
            if self._header and self.run.logs_are_known:
                self._check_header(["epoch", *self.run.log_names])
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", newline="", encoding="utf-8")

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        row = {name: _field(value) for name, value in (logs or {}).items()} | {"epoch": epoch}
        assert self._file is not None
        if self._writer is None:
            self._writer = self._begin(self._file, row)
        for name in sorted(row.keys() - set(self._writer.fieldnames) - self._left_out):
            self._left_out.add(name)
            warn(
                f"CSVLogger leaves out {name!r}: the first epoch's logs, which make the columns of {self.filename!r}, "
                "did not have it."
            )
        self._writer.writerow(row)
        self._file.flush()

    def state_dict(self) -> dict[str, Any]:
        columns = list(self._writer.fieldnames) if self._writer is not None else []
        if self._file is None:
            return {"columns": columns, "bytes": 0}
        with suppress(OSError):  # where it is no ordinary file
            os.fsync(self._file.fileno())
        return {"columns": columns, "bytes": self._file.tell()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        columns, size = state_dict["columns"], state_dict["bytes"]
        assert self._file is not None
        if not columns and not self.append:
            return  # the first row replaces the file
        rows = Path(self.filename).read_bytes()[:size]
        whole = rows[: rows.rfind(b"\n") + 1]
        if len(whole) < size:
            warn(
                f"CSVLogger's {self.filename!r} is not as long as it was when the run was saved: rows of the epochs "
                "before may be missing in it."
            )
        self._file.truncate(len(whole))  # rows of epochs that are trained again, and half a row
        self._file.seek(0, os.SEEK_END)  # a checkpoint before the next row counts what is left
        if not whole:
            self._header = []
        if columns:
            self._writer = self._make_writer(self._file, columns)
            if not whole:
                self._writer.writeheader()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self, file: TextIO, row: Iterable[str]) -> csv.DictWriter[str]:
        names = [name for name in row if name != "epoch"]
        if self.run.val_data is not None and not self.run.validation_is_due:
            names += [f"val_{name}" for name in self.run.train_sums.compute()]
        columns = list(dict.fromkeys(["epoch", *names]))
        if self._header:
            self._check_header(columns)
            columns = self._header
        writer = self._make_writer(file, columns)
        if not self._header:
            file.truncate(0)
            writer.writeheader()
        elif not Path(self.filename).read_bytes().endswith(b"\n"):
            file.write("\n")
        return writer

    def _make_writer(self, file: TextIO, columns: list[str]) -> csv.DictWriter[str]:
        return csv.DictWriter(file, columns, "NA", "ignore", delimiter=self.separator, lineterminator="\n")

    def _check_header(self, columns: list[str]) -> None:
        if set(columns) != set(self._header):
            raise ValueError(
                f"CSVLogger(append=True) can't go on in {self.filename!r}: its columns are "
                f"{', '.join(self._header)}; this fit's are {', '.join(columns)}."
            )


def _field(value: Any) -> Any:
    if hasattr(value, "tolist"):  # a tensor, array or numpy number
        value = value.tolist()
    return json.dumps(value) if isinstance(value, list) else value
