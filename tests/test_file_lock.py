"""A place has one writer, however its holder ends and whatever it leaves behind."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from kerastorch import file_lock
from kerastorch.checkpoint import CheckpointWriter
from kerastorch.file_lock import FileLock

fcntl = pytest.importorskip("fcntl")


def test_a_second_lock_is_refused_until_the_first_is_released(tmp_path: Path) -> None:
    first = FileLock(tmp_path / "a.lock")
    with pytest.raises(BlockingIOError):
        FileLock(tmp_path / "a.lock")
    first.release()
    assert list(tmp_path.iterdir()) == []
    second = FileLock(tmp_path / "a.lock")
    first.release()
    assert second.path.exists()
    second.release()


def test_the_message_names_the_file_that_is_held(tmp_path: Path) -> None:
    writer = CheckpointWriter("ModelCheckpoint", tmp_path / "a.pt", is_async=False)
    with pytest.raises(ValueError, match=r"another callback or run writes there \(it holds .*\.a\.pt\.lock'\)"):
        CheckpointWriter("ModelCheckpoint", tmp_path / "a.pt", is_async=False)
    writer.close()


def test_a_forked_child_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, time
        from pathlib import Path
        sys.path.append(sys.argv[2])  # without kerastorch, whose torch would take seconds
        from file_lock import FileLock

        lock = FileLock(Path(sys.argv[1]))
        if os.fork() == 0:
            lock.release()  # not the child's to remove
            print(os.getpid(), flush=True)
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a.lock")]
    arguments.append(str(Path(file_lock.__file__).parent))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            process.wait(60)
            assert (tmp_path / "a.lock").exists()
            FileLock(tmp_path / "a.lock").release()
            os.kill(child, 0)  # it lives still
        finally:
            os.kill(child, 9)


def test_a_file_that_its_holder_removes_at_that_moment_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def flock_after_removal(*arguments: Any) -> None:
        if not calls:
            (tmp_path / "a.lock").unlink()
        calls.append(arguments)
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    lock = FileLock(tmp_path / "a.lock")
    assert len(calls) == 2
    with pytest.raises(BlockingIOError):
        FileLock(tmp_path / "a.lock")
    lock.release()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_keeps_nobody_away(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for lock in [FileLock(tmp_path / "a.lock"), FileLock(tmp_path / "a.lock")]:
        lock.release()
    assert list(tmp_path.iterdir()) == []
