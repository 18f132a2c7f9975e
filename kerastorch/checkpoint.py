"""The on-disk format: the usual PyTorch recipe's dict in one file, written whole or not at all.

The only file that calls torch.save. Sisters: history.py, data/.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def write_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write content (tensors and plain containers) to path so that a crash leaves the old file or the new one, whole.

    The file opens with torch.load(path, weights_only=True).   Raises OSError naming the path where it can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch's zip writer turns a full disk into a RuntimeError
            raise OSError(f"checkpoint {str(path)!r} could not be written: {error}") from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # a folder can't be opened for fsync elsewhere
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
