"""FileLock: keeps two writers from one place, in this process and among processes. Sister: checkpoint.py."""

from __future__ import annotations

import errno
import os
import sys
import weakref
from contextlib import suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

CAN_NOT_LOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # some network file systems
HELD: weakref.WeakSet[FileLock] = weakref.WeakSet()


class FileLock:
    """Holds the file at path, made for it, until release() or until the process ends, however it does.

    Raises BlockingIOError where another holds it. Where the file system has no locks it keeps nobody away.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = _open_locked(path)
        HELD.add(self)

    def release(self) -> None:
        """Remove the file and let others have the place; harmless a second time."""
        if self._descriptor is None:
            return
        if sys.platform != "win32":  # where an open file can't be removed
            self._remove()  # while it is locked: afterwards it may be another's
        self.close()
        if sys.platform == "win32":
            self._remove()

    def close(self) -> None:
        """Close the file; as long as another process has it open too, it stays locked."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _remove(self) -> None:
        with suppress(OSError):  # where the folder has gone
            self.path.unlink(missing_ok=True)


def _close_all() -> None:
    for lock in list(HELD):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)  # or a loader's worker that outlives us would hold the place


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between our two calls


def _lock(descriptor: int) -> None:
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise BlockingIOError(error.errno, "the file is locked") from None
        if error.errno not in CAN_NOT_LOCK:
            raise


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
