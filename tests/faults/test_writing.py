"""A checkpoint that can't be written, or is damaged later, costs no more than itself (scenarios T12-T17, T27).

Run as a program this file forks a process for each job of the JSON list in its first argument, so that many real
processes can be killed for the price of one import of torch.
"""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import kerastorch as kt
from kerastorch.callbacks import BackupAndRestore, LambdaCallback, ModelCheckpoint
from kerastorch.callbacks.callback import Checkpointer
from kerastorch.checkpoint import CheckpointError, read_checkpoint, write_checkpoint

EPOCHS = 4
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] * 2
HALF = 6000  # bytes; a checkpoint of these runs has over 12000

KINDS: dict[str, Callable[..., Checkpointer]] = {
    "one file": lambda folder, **more: ModelCheckpoint(folder / "net.pt", **more),
    "every epoch": lambda folder, **more: ModelCheckpoint(folder / "{epoch}.pt", **more),
    "keep_last=1": lambda folder, **more: ModelCheckpoint(folder / "{epoch}.pt", keep_last=1, **more),
    "backup": lambda folder, **more: BackupAndRestore(folder, **more),
    "double backup": lambda folder, **more: BackupAndRestore(folder, double_checkpoint=True, **more),
}
FINAL_FILES = {"one file": ["net.pt"], "keep_last=1": [f"{EPOCHS}.pt"], "backup": [], "double backup": []}
every_kind = pytest.mark.parametrize("kind", FINAL_FILES)
sync_and_async = pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])


def make_model() -> kt.Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Dropout(0.2), nn.Linear(100, 1))
    model = kt.Model(net, device="cpu")
    model.compile("mse", "adam")
    return model


def train(*callbacks: kt.Callback, epochs: int = EPOCHS, **arguments: Any) -> tuple[kt.Model, kt.History]:
    """One life of a script: everything made anew."""
    model = make_model()
    return model, model.fit(X, Y, batch_size=4, epochs=epochs, callbacks=callbacks, verbose=0, **arguments)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for sums in one order, here and in the processes that are killed
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight() -> dict[str, torch.Tensor]:
    """The weights of a run that nothing happened to."""
    return train()[0].net.state_dict()


def assert_same_weights(model: kt.Model, weights: dict[str, torch.Tensor]) -> None:
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, weights[name]), name


def names(folder: Path) -> list[str]:
    """What stands in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def at_epoch(epoch: int, do: Callable[[], None]) -> LambdaCallback:
    def begin(now: int, logs: Any) -> None:
        if now == epoch:
            do()

    return LambdaCallback(on_epoch_begin=begin)


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def wait_for_writers() -> None:
    """Wait until no thread writes; that of an earlier bar, a daemon, never ends."""
    end = time.monotonic() + 30
    while sum(not thread.daemon for thread in threading.enumerate()) > 1:
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.001)


def fill() -> None:
    wait_for_writers()
    limit_file_size(HALF)


@contextmanager
def full_disk(size: int = resource.RLIM_INFINITY) -> Iterator[None]:
    """A file takes no more bytes than size, or than fill() says, here: pytest's own log may be a file, and longer."""
    limit_file_size(size)
    try:
        yield
    finally:
        limit_file_size(resource.RLIM_INFINITY)


# ---- T12: the disk is full ----


@every_kind
@sync_and_async
def test_t12_a_failing_save_says_all_and_a_resume_from_the_older_file_is_exact(
    tmp_path: Path, straight: dict[str, torch.Tensor], kind: str, async_save: bool
) -> None:
    callback = KINDS[kind](tmp_path, async_save=async_save)
    with full_disk(), pytest.raises(OSError, match="could not be written") as raised:
        train(callback, at_epoch(2, fill))

    message = str(raised.value)
    assert "enforce fail" not in message
    assert "inline_container" not in message
    assert raised.value.errno == errno.EFBIG
    failed = re.search(r"checkpoint '([^']+)' could not be written: File too large;", message)
    needed = re.search(r"it takes about (\S+) [kM]B, (\S+) [kM]B are free on its disk", message)
    good = re.search(r"; '([^']+)' of before is still whole", message)
    assert failed is not None
    assert needed is not None
    assert good is not None
    assert Path(failed[1]).parent == tmp_path
    assert read_checkpoint(good[1])["epoch"] in (0, 1)
    assert not [name for name in names(tmp_path) if name.endswith((".tmp", ".lock"))]
    files = callback.files()
    assert max(read_checkpoint(file)["epoch"] for file in files) == 1

    model, history = train(KINDS[kind](tmp_path, async_save=async_save), resume=True)
    assert history.epoch == [0, 1, 2, 3]
    assert_same_weights(model, straight)
    assert names(tmp_path) == FINAL_FILES[kind]


def test_t12_the_bytes_needed_are_those_of_the_file(tmp_path: Path) -> None:
    with full_disk(HALF), pytest.raises(OSError, match=r"it takes about 4\.0 MB"):
        write_checkpoint(tmp_path / "a.pt", {"weights": torch.zeros(1000, 1000)})


def test_t12_a_first_save_that_fails_names_no_good_file(tmp_path: Path) -> None:
    with full_disk(HALF), pytest.raises(OSError, match=r"1\.pt' could not be written: File too large; .* on its disk$"):
        train(KINDS["every epoch"](tmp_path))
    assert names(tmp_path) == []


def test_t12_a_disk_that_is_full_at_any_byte_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"epoch": 0})
    content = {"epoch": 1, "model_state_dict": nn.Linear(20, 20).state_dict()}
    write_checkpoint(tmp_path / "b.pt", content)
    size = (tmp_path / "b.pt").stat().st_size
    (tmp_path / "b.pt").unlink()
    for limit in [*range(0, size, 37), size - 1]:
        with (
            full_disk(limit),
            pytest.raises(OSError, match=r"a\.pt' could not be written: File too large; .*a\.pt' of before is still"),
        ):
            write_checkpoint(path, content)
        assert names(tmp_path) == ["a.pt"], limit
        assert read_checkpoint(path) == {"epoch": 0}
    with full_disk(size):
        write_checkpoint(path, content)
    assert read_checkpoint(path)["epoch"] == 1


FULL_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_writing import KINDS, names, read_checkpoint, train
folder = Path({folder!r})
try:
    train(KINDS["every epoch"](folder), epochs=20)
except OSError as error:
    print(error.errno, str(error))
print(names(folder))
print(max(read_checkpoint(path)["epoch"] for path in folder.iterdir()))
for path in folder.iterdir():
    if path.name != "3.pt":
        path.unlink()
print(train(KINDS["every epoch"](folder), resume=True)[1].epoch)
"""


@pytest.mark.slow
def test_t12_a_real_full_disk_says_so_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    code = FULL_DISK.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    (tmp_path.parent / f"{tmp_path.name}.py").write_text(code)
    mount = f"mount -t tmpfs -o size=128k tmpfs {tmp_path}"
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("a user may not mount a file system here")
    child = subprocess.run(
        [*unshare, f"{mount} && exec {sys.executable} {tmp_path.parent / tmp_path.name}.py"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    message, files, epoch, epochs = child.stdout.splitlines()
    assert message.startswith(f"{errno.ENOSPC} ")
    failed = int(re.findall(r"(\d+)\.pt' could not be written: No space left on device; it takes about", message)[0])
    assert files == str([f"{i}.pt" for i in range(1, failed)])
    assert failed > 3
    assert epoch == str(failed - 2)
    assert epochs == "[0, 1, 2, 3]"


# ---- T13: the process is killed in a write ----

KILLS: dict[str, int] = {
    "at byte 0": signal.SIGXFSZ,
    "at byte 6000": signal.SIGXFSZ,
    "at the last bytes": signal.SIGXFSZ,
    "before the sync": signal.SIGKILL,
    "before the rename": signal.SIGKILL,
    "after the rename": signal.SIGKILL,
    "before the older file is deleted": signal.SIGKILL,
}


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def prepare_death(how: str) -> None:
    """Make the next write of a checkpoint kill the process."""
    wait_for_writers()
    match how.split():
        case ["at", "byte", size]:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            limit_file_size(int(size))
        case ["at", "the", "last", "bytes"]:
            sizes: list[int] = []
            save = torch.save
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

            def save_all_but_the_end(content: Any, file: Any) -> None:
                if not sizes:
                    sizes.append(0)
                    with tempfile.TemporaryFile() as whole:
                        save(content, whole)
                        sizes[0] = whole.tell()
                    limit_file_size(sizes[0] - 1)
                save(content, file)

            torch.save = save_all_but_the_end
        case ["before", "the", "sync"]:
            os.fsync = die
        case ["before", "the", "rename"]:
            os.replace = die
        case ["after", "the", "rename"]:
            replace = os.replace
            os.replace = lambda *args: (replace(*args), die())
        case _:
            unlink = Path.unlink
            Path.unlink = lambda path, missing_ok=False: (
                die() if path.suffix == ".pt" else unlink(path, missing_ok=missing_ok)
            )


def killed_cases() -> list[tuple[str, bool, str]]:
    cases = [(kind, False, how) for kind in FINAL_FILES for how in KILLS]
    cases += [("keep_last=1", True, how) for how in KILLS] + [("backup", True, "at byte 6000")]
    return [case for case in cases if case[0] == "keep_last=1" or case[2] != "before the older file is deleted"]


def job_killed(folder: str, kind: str, async_save: bool, how: str) -> None:
    train(KINDS[kind](Path(folder), async_save=async_save), at_epoch(2, lambda: prepare_death(how)))


def folder_of(root: Path, kind: str, async_save: bool, how: str) -> Path:
    return root / f"{kind} {async_save} {how}"


def run_jobs(jobs: list[list[Any]]) -> list[int]:
    """Run each [name, *arguments] in a process of its own; return their statuses, negative for a signal."""
    child = subprocess.run(
        [sys.executable, __file__, json.dumps(jobs)], capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr
    statuses: list[int] = json.loads(child.stdout.splitlines()[-1])
    assert 1 not in statuses, child.stderr
    return statuses


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, bool, str], int]]:
    root = tmp_path_factory.mktemp("killed")
    cases = killed_cases()
    statuses = run_jobs([["killed", str(folder_of(root, *case)), *case] for case in cases])
    return root, dict(zip(cases, statuses, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "async_save", "how"), killed_cases())
def test_t13_a_run_killed_in_a_write_goes_on_exactly_and_its_leftovers_go_with_the_next_save(
    killed: tuple[Path, dict[tuple[str, bool, str], int]],
    straight: dict[str, torch.Tensor],
    kind: str,
    async_save: bool,
    how: str,
) -> None:
    root, statuses = killed
    folder = folder_of(root, kind, async_save, how)
    assert statuses[kind, async_save, how] == -KILLS[how]
    files = names(folder)
    is_renamed = how in ("after the rename", "before the older file is deleted")
    assert any(name.endswith(".tmp") for name in files) != is_renamed
    assert any(name.endswith(".lock") for name in files)
    contents = [read_checkpoint(folder / name) for name in files if name.endswith(".pt")]
    assert max(content["epoch"] for content in contents) == (2 if is_renamed else 1)

    left: list[list[str]] = []
    look = LambdaCallback(on_epoch_begin=lambda epoch, logs: left.append(names(folder)))
    model, history = train(look, KINDS[kind](folder, async_save=async_save), resume=True)
    assert history.epoch == [0, 1, 2, 3]
    assert_same_weights(model, straight)
    if not async_save:
        assert not [name for seen in left[1:] for name in seen if name.endswith(".tmp")]
    assert set(names(folder)) == set(FINAL_FILES[kind])


# ---- T14: told before the first step where it can be known ----


class Steps(kt.Callback):
    """Counts the training batches."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.count += 1


@pytest.mark.parametrize("kind", ["one file", "every epoch", "backup"])
def test_t14_a_file_in_the_folder_s_place_is_told_before_the_first_step(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        steps = Steps()
        with pytest.raises(OSError, match="file"):
            train(steps, KINDS[kind](folder))
        assert steps.count == 0
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["net.pt", "1.pt"])
def test_t14_a_folder_in_the_file_s_place_is_an_os_error_with_the_path(tmp_path: Path, place: str) -> None:
    (tmp_path / place / "deeper").mkdir(parents=True)
    kind, steps = "one file" if place == "net.pt" else "every epoch", Steps()
    with pytest.raises(OSError, match=re.escape(str(tmp_path / place))):
        train(steps, KINDS[kind](tmp_path))
    assert steps.count == (0 if place == "net.pt" else 4)
    assert names(tmp_path) == [place]


@every_kind
@sync_and_async
def test_t14_a_folder_removed_in_the_run_is_made_again_and_resumed_from(
    tmp_path: Path, straight: dict[str, torch.Tensor], kind: str, async_save: bool
) -> None:
    class Crash(Exception):
        pass

    def crash() -> None:
        raise Crash

    folder = tmp_path / "runs" / "a"

    def remove() -> None:
        wait_for_writers()
        shutil.rmtree(tmp_path / "runs")

    with pytest.raises(Crash):
        train(at_epoch(2, remove), at_epoch(3, crash), KINDS[kind](folder, async_save=async_save))
    assert [name for name in names(folder) if not name.endswith(".pt")] == []
    model, history = train(KINDS[kind](folder), resume=True)
    assert history.epoch == [0, 1, 2, 3]
    assert_same_weights(model, straight)


@pytest.mark.parametrize("kind", ["one file", "every epoch", "backup"])
@sync_and_async
def test_t14_a_folder_that_became_a_file_in_the_run_is_an_os_error_at_the_save(
    tmp_path: Path, kind: str, async_save: bool
) -> None:
    folder = tmp_path / "runs"

    def replace() -> None:
        wait_for_writers()
        shutil.rmtree(folder)
        folder.write_text("mine")

    with pytest.raises(OSError, match=r"could not be written") as raised:
        train(at_epoch(2, replace), KINDS[kind](folder, async_save=async_save))
    assert str(folder) in str(raised.value)
    assert folder.read_text() == "mine"
    folder.unlink()
    train(KINDS[kind](folder))  # the place is free again


def job_read_only(root: str, kind: str, when: str) -> None:
    """A folder that may not be written, as a user who is not root sees it."""
    folder = Path(root) / "runs"
    folder.mkdir()
    os.chmod(folder, 0o777)
    if os.geteuid() == 0:
        train(KINDS[kind](Path(root) / "first"), epochs=1)  # loads what that user may have no right to read
        os.setuid(65534)
        folder = Path(root) / "runs" / "own"
        folder.mkdir()
    steps = Steps()

    def close() -> None:
        os.chmod(folder, 0o555)

    if when == "from the start":
        close()
    with pytest.raises(OSError, match=re.escape(str(folder))) as raised:
        train(steps, at_epoch(2, close), KINDS[kind](folder))
    os.chmod(folder, 0o755)
    if when == "from the start":
        assert steps.count == 0
        assert names(folder) == []
        return
    assert steps.count == 12
    assert raised.value.errno == errno.EACCES
    assert "could not be written: Permission denied" in str(raised.value)
    good = re.search(r"; '([^']+)' of before is still whole", str(raised.value))
    assert good is not None
    assert read_checkpoint(good[1])["epoch"] == 1


@pytest.mark.slow
def test_t14_a_folder_without_write_permission_is_told_before_the_first_step_or_at_the_save() -> None:
    kinds, moments, roots = ["one file", "every epoch", "backup"], ["from the start", "in the run"], []
    jobs: list[list[Any]] = []
    for kind in kinds:
        for when in moments:
            roots.append(tempfile.mkdtemp())
            os.chmod(roots[-1], stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
            jobs.append(["read_only", roots[-1], kind, when])
    try:
        assert run_jobs(jobs) == [0] * len(jobs)
    finally:
        for root in roots:
            shutil.rmtree(root)


# ---- T15: the old file goes only when the new one is there ----


@sync_and_async
@pytest.mark.parametrize("choice", ["keep_last", "keep_best"])
def test_t15_the_one_kept_file_stays_when_the_next_can_not_be_written(
    tmp_path: Path, async_save: bool, choice: str
) -> None:
    better = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(loss=-epoch))
    checkpoint = ModelCheckpoint(
        tmp_path / "{epoch}.pt", monitor="loss", mode="min", async_save=async_save, **{choice: 1}
    )
    error = r"3\.pt' could not be written: .*2\.pt' of before is still whole"
    with full_disk(), pytest.raises(OSError, match=error):
        train(better, at_epoch(2, fill), checkpoint)
    assert names(tmp_path) == ["2.pt"]
    assert read_checkpoint(tmp_path / "2.pt")["epoch"] == 1


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_t15_the_one_kept_file_stays_when_the_next_fails_at_the_end_of_its_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match=r"3\.pt' could not be written: Input/output error"):
        train(at_epoch(2, lambda: monkeypatch.setattr(os, stage, fail)), KINDS["keep_last=1"](tmp_path))
    assert names(tmp_path) == ["2.pt"]


# ---- T16: the newest file is damaged ----


def flip(path: Path) -> None:
    """Flip a byte of the weights."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    whole = bytearray(path.read_bytes())
    whole[entry.header_offset + 30 + len(entry.filename) + 200] ^= 1
    path.write_bytes(whole)


def drop_part(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = [(entry, archive.read(entry)) for entry in archive.infolist()]
    parts.remove(max(parts, key=lambda part: part[0].file_size))
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in parts:
            archive.writestr(entry, data)


def set_bit_in_directory(path: Path, offset: int, bit: int) -> None:
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        name = max(archive.infolist(), key=lambda entry: entry.file_size).filename
    for entry in re.finditer(b"PK\x01\x02", bytes(whole)):
        if whole[entry.start() + 46 :].startswith(name.encode()):
            whole[entry.start() + offset] ^= bit
    path.write_bytes(whole)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "without its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
    "a part missing": drop_part,
    "a byte flipped": flip,
    "a bit flipped: encrypted": lambda path: set_bit_in_directory(path, 8, 0x01),
    "a bit flipped: a folder": lambda path: set_bit_in_directory(path, 38, 0x10),
    "another kind of file": lambda path: torch.save([1], path),
}


def stop_after(epochs: int, *callbacks: kt.Callback) -> None:
    """Train so many epochs and die, the files staying as they are."""

    class Crash(Exception):
        pass

    def crash() -> None:
        raise Crash

    with pytest.raises(Crash):
        train(*callbacks, at_epoch(epochs, crash))


def keep_times(path: Path, damage: Callable[[Path], object]) -> None:
    status = path.stat()
    damage(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", ["every epoch", pytest.param("double backup", marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", DAMAGES)
def test_t16_a_damaged_newest_file_is_named_and_the_next_older_goes_on_exactly(
    tmp_path: Path, straight: dict[str, torch.Tensor], kind: str, damage: str
) -> None:
    callback = KINDS[kind](tmp_path)
    stop_after(3, callback)
    newest, older = callback.files()[:2]
    assert read_checkpoint(newest)["epoch"] == 2
    keep_times(newest, DAMAGES[damage])
    resume = None if kind == "double backup" else True
    message = rf"{re.escape(repr(str(newest)))}.* Going on from {re.escape(repr(str(older)))} instead"
    with pytest.warns(UserWarning, match=message):
        model, history = train(KINDS[kind](tmp_path), resume=resume)
    assert history.epoch == [0, 1, 2, 3]
    assert_same_weights(model, straight)


def test_t16_two_damaged_files_are_both_named(tmp_path: Path, straight: dict[str, torch.Tensor]) -> None:
    callback = KINDS["every epoch"](tmp_path)
    stop_after(3, callback)
    keep_times(tmp_path / "3.pt", DAMAGES["truncated"])
    keep_times(tmp_path / "2.pt", DAMAGES["a byte flipped"])
    with pytest.warns(UserWarning, match=r"3\.pt' .*2\.pt' .* is damaged.* Going on from '.*1\.pt' instead"):
        model, _ = train(callback, resume=True)
    assert_same_weights(model, straight)


@pytest.mark.parametrize("kind", ["one file", "every epoch", "backup", "double backup"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "a byte flipped", "a bit flipped: encrypted"])
def test_t16_where_no_file_is_good_it_is_an_error_and_nothing_is_trained_or_deleted(
    tmp_path: Path, kind: str, damage: str
) -> None:
    callback, steps = KINDS[kind](tmp_path), Steps()
    stop_after(2, callback)
    files = callback.files()
    for path in files:
        DAMAGES[damage](path)
    with pytest.raises(CheckpointError, match="no checkpoint can be read, so the run can't go on") as raised:
        train(steps, callback, resume=None if "backup" in kind else True)
    assert all(str(path) in str(raised.value) for path in files)
    assert steps.count == 0
    assert names(tmp_path) == sorted(path.name for path in files)


# ---- T17: two writers, one place ----


SPELLINGS = {
    "the same": ("{folder}/net.pt", "{folder}/net.pt"),
    "relative": ("{folder}/net.pt", "net.pt"),
    "with a dot": ("net.pt", "./net.pt"),
    "through a folder and back": ("{folder}/net.pt", "{folder}/sub/../net.pt"),
    "through a link": ("{folder}/net.pt", "{folder}/link/net.pt"),
    "a template": ("{folder}/{{epoch}}.pt", "{folder}/{{epoch}}.pt"),
    "templates that differ in spelling": ("{folder}/{{epoch}}.pt", "{folder}/{{epoch:d}}.pt"),
    "templates with widths": ("{folder}/{{epoch}}.pt", "{folder}/{{epoch:1d}}.pt"),
    "a folder's template": ("{folder}/{{epoch}}/net.pt", "{folder}/{{epoch:d}}/net.pt"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_t17_two_callbacks_with_one_path_are_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    steps = Steps()
    one, other = (ModelCheckpoint(path.format(folder=tmp_path)) for path in SPELLINGS[spelling])
    with pytest.raises(ValueError, match=r"ModelCheckpoint can't write to .*: another callback or run writes there"):
        train(steps, one, other)
    assert steps.count == 0
    assert names(tmp_path) == ["link", "sub"]


def test_t17_two_backups_in_one_folder_are_refused_before_the_first_step(tmp_path: Path) -> None:
    steps = Steps()
    with pytest.raises(ValueError, match=r"BackupAndRestore can't write to .*: another callback or run writes there"):
        train(steps, BackupAndRestore(tmp_path / "b"), BackupAndRestore(tmp_path / "b", double_checkpoint=True))
    assert steps.count == 0
    assert names(tmp_path) == []


def test_t17_a_callback_given_twice_is_refused_before_the_first_step(tmp_path: Path) -> None:
    checkpoint, steps = ModelCheckpoint(tmp_path / "a.pt"), Steps()
    with pytest.raises(ValueError, match="another callback or run writes there"):
        train(steps, checkpoint, checkpoint)
    assert steps.count == 0
    assert names(tmp_path) == []


def test_t17_writers_of_different_files_share_a_folder(tmp_path: Path) -> None:
    train(
        ModelCheckpoint(tmp_path / "last.pt"),
        ModelCheckpoint(tmp_path / "best-{epoch}.pt", monitor="loss", save_best_only=True),
        BackupAndRestore(tmp_path),
        epochs=1,
    )
    assert names(tmp_path) == ["best-1.pt", "last.pt"]


@every_kind
def test_t17_a_fit_inside_a_fit_with_one_path_is_refused_and_the_outer_one_goes_on(tmp_path: Path, kind: str) -> None:
    def train_inside() -> None:
        with pytest.raises(ValueError, match="another callback or run writes there"):
            train(KINDS[kind](tmp_path))

    _, history = train(at_epoch(1, train_inside), KINDS[kind](tmp_path))
    assert len(history.epoch) == EPOCHS
    assert names(tmp_path) == FINAL_FILES[kind]


def test_t17_the_place_is_free_after_a_fit_and_after_an_exception(tmp_path: Path) -> None:
    train(ModelCheckpoint(tmp_path / "a.pt"), epochs=1)
    stop_after(1, ModelCheckpoint(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match="another callback"):
        train(ModelCheckpoint(tmp_path / "a.pt"), ModelCheckpoint(tmp_path / "a.pt"))
    train(ModelCheckpoint(tmp_path / "a.pt"), epochs=1)
    assert names(tmp_path) == ["a.pt"]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


def job_two_processes(root: str, kind: str) -> None:
    """A second process is refused while the first one trains, and gets the place when that one was killed."""
    folder, ready = Path(root) / "runs", Path(root) / "ready"
    first = os.fork()
    if first == 0:
        try:
            train(at_epoch(1, lambda: (ready.touch(), time.sleep(60))), KINDS[kind](folder))
        finally:
            os._exit(1)
    wait_for(ready)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    steps = Steps()
    with pytest.raises(ValueError, match="another callback or run writes there"):
        train(steps, KINDS[kind](folder))
    assert steps.count == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    _, history = train(KINDS[kind](folder), resume=True)
    assert history.epoch == [0, 1, 2, 3]
    assert names(folder) == FINAL_FILES[kind]


class Slow(Dataset[Any]):
    """Rows that the second epoch's workers wait for; each touches a file of its own first."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> Any:
        if (self.root / "first epoch").exists():
            (self.root / f"worker {torch.utils.data.get_worker_info().id}").touch()
            time.sleep(1.5)
        return X[i], Y[i]


def job_orphans(root: str) -> None:
    """Workers that outlive their killed run hold nothing, and the run is begun again at once."""
    folder, path = Path(root), Path(root) / "a.pt"
    first = os.fork()
    if first == 0:
        try:
            ends = at_epoch(1, (folder / "first epoch").touch)
            loader = DataLoader(Slow(folder), 4, num_workers=2)
            make_model().fit(loader, epochs=2, callbacks=[ends, ModelCheckpoint(path)], verbose=0)
        finally:
            os._exit(1)
    for worker in range(2):  # torch's watchdog, set later, would not see the death of a parent that is gone already
        wait_for(folder / f"worker {worker}")
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert len(train(ModelCheckpoint(path), epochs=2, resume=True)[1].epoch) == 2


@pytest.mark.slow
def test_t17_workers_that_outlive_a_killed_run_do_not_hold_its_place(tmp_path: Path) -> None:
    assert run_jobs([["orphans", str(tmp_path)]]) == [0]


@pytest.mark.slow
def test_t17_two_processes_with_one_path_are_kept_apart_until_the_first_is_dead(tmp_path: Path) -> None:
    kinds = ["one file", "keep_last=1", "backup"]
    for kind in kinds:
        (tmp_path / kind).mkdir()
    assert run_jobs([["two_processes", str(tmp_path / kind), kind] for kind in kinds]) == [0, 0, 0]


# ---- T27: what can't be pickled ----


class Transformed(Dataset[Any]):
    def __init__(self) -> None:
        self.transform = lambda x: x * 2
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> Any:
        return {"x": self.transform(X[i]), "y": Y[i]}


class HoldsALock(kt.Callback):
    def __init__(self, path: Path) -> None:
        self.lock, self.file, self.epochs = threading.Lock(), path.open("w"), 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with self.lock:
            self.epochs += 1
            self.file.write(f"{epoch}\n")

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]


@pytest.mark.parametrize(("kind", "workers"), [("every epoch", 0), ("backup", 2)])
def test_t27_lambdas_locks_and_open_files_do_not_hinder_training_saving_or_a_resume(
    tmp_path: Path, kind: str, workers: int
) -> None:
    def life(epochs: int, *callbacks: kt.Callback, **arguments: Any) -> tuple[kt.Model, kt.History]:
        model = make_model()
        model.compile(
            lambda outputs, y: ((outputs - y) ** 2).mean(),
            lambda parameters: torch.optim.Adam(parameters),
            {"gap": lambda outputs, y: (outputs - y).abs().mean()},
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
            unpack=lambda batch: (batch["x"], batch["y"]),
        )
        loader = DataLoader(Transformed(), 4, shuffle=True, num_workers=workers)
        return model, model.fit(loader, epochs=epochs, callbacks=callbacks, verbose=0, **arguments)

    def crash() -> None:
        raise KeyError("crash")

    expected, _ = life(3)
    mine = HoldsALock(tmp_path / "mine.txt")
    with pytest.raises(KeyError, match="crash"):
        life(3, mine, at_epoch(2, crash), KINDS[kind](tmp_path / "runs"))
    mine.file.close()
    mine = HoldsALock(tmp_path / "mine.txt")
    model, history = life(3, mine, KINDS[kind](tmp_path / "runs"), resume=True)
    mine.file.close()
    assert history.epoch == [0, 1, 2]
    assert mine.epochs == 3
    assert_same_weights(model, expected.net.state_dict())


class Stateful(kt.Callback):
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"fine": 1, "inner": {"bad": self.state}}


@every_kind
@pytest.mark.parametrize(
    "state", [threading.Lock(), lambda: None, Path("x"), KeyError("x")], ids=["lock", "lambda", "path", "exception"]
)
def test_t27_a_state_that_a_file_can_not_hold_is_refused_by_callback_and_key_before_the_first_step(
    tmp_path: Path, kind: str, state: Any
) -> None:
    steps = Steps()
    message = r"can't hold the state_dict\(\) of Stateful\['inner'\]\['bad'\], a "
    with pytest.raises(TypeError, match=message):
        train(steps, KINDS[kind](tmp_path / "runs"), Stateful(state))
    assert steps.count == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_t27_such_a_state_is_nobody_s_affair_where_only_weights_are_saved(tmp_path: Path) -> None:
    train(ModelCheckpoint(tmp_path / "a.pt", save_weights_only=True), Stateful(threading.Lock()), epochs=1)
    assert names(tmp_path) == ["a.pt"]


class Extra(nn.Linear):
    def __init__(self, extra: Any) -> None:
        super().__init__(8, 1)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("before_the_first_step", [False, True])
def test_t27_an_extra_state_that_a_file_can_not_hold_is_refused_by_key(
    tmp_path: Path, weights_only: bool, before_the_first_step: bool
) -> None:
    model, steps = kt.Model(nn.Sequential(Extra(threading.Lock())), device="cpu"), Steps()
    model.compile("mse", "sgd")
    checkpoint = ModelCheckpoint(tmp_path / "a.pt", save_weights_only=weights_only)
    key = r"model_state_dict\['0\._extra_state'\]"
    with pytest.raises(TypeError, match=rf"a checkpoint can't hold {key}, a _thread\.lock"):
        model.fit(X, Y, callbacks=[steps, checkpoint], verbose=0)
    assert names(tmp_path) == []
    if before_the_first_step:
        assert steps.count == 0


def test_t27_a_plain_extra_state_is_saved_and_comes_back(tmp_path: Path) -> None:
    model = kt.Model(Extra({"words": ["a", "b"]}), device="cpu")
    model.compile("mse", "sgd")
    model.fit(X, Y, callbacks=[ModelCheckpoint(tmp_path / "a.pt")], verbose=0)
    other = kt.Model(Extra(None), device="cpu")
    other.compile("mse", "sgd")
    other.fit(X, Y, epochs=2, callbacks=[ModelCheckpoint(tmp_path / "a.pt")], resume=True, verbose=0)
    assert other.net.extra == {"words": ["a", "b"]}


# ---- a stranger's view ----


def wrapped(net: nn.Module, how: str) -> nn.Module:
    if "parallel" in how:
        net = nn.DataParallel(net)
    if "compiled" in how:
        net = torch.compile(net, backend="eager")
    return net


@pytest.mark.parametrize("how", ["bare", "parallel", "compiled", "compiled parallel"])
@sync_and_async
def test_keys_are_the_bare_net_s_however_it_was_wrapped(
    tmp_path: Path, straight: dict[str, torch.Tensor], how: str, async_save: bool
) -> None:
    def make() -> kt.Model:
        model = kt.Model(wrapped(make_model().net, how), device="cpu")
        model.compile("mse", "adam")
        return model

    def paths() -> list[kt.Callback]:
        weights = ModelCheckpoint(tmp_path / "weights.pt", save_weights_only=True, async_save=async_save)
        return [ModelCheckpoint(tmp_path / "{epoch}.pt", async_save=async_save), weights]

    if "compiled" in how and async_save:
        pytest.skip("costs seconds and differs in nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's own
        make().fit(X, Y, batch_size=4, epochs=EPOCHS, callbacks=paths(), verbose=0)
    keys = list(make_model().net.state_dict())
    assert list(read_checkpoint(tmp_path / "1.pt")["model_state_dict"]) == keys
    assert list(read_checkpoint(tmp_path / "weights.pt")) == keys
    model, _ = train(ModelCheckpoint(tmp_path / "{epoch}.pt"), resume=tmp_path / "2.pt")  # into a bare one
    assert_same_weights(model, straight)


STRANGER = """
import sys
sys.modules["kerastorch"] = None  # so that it can't be imported
import torch
from torch import nn
net = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Dropout(0.2), nn.Linear(100, 1))
optimizer = torch.optim.Adam(net.parameters())
content = torch.load(sys.argv[1], weights_only=True)
net.load_state_dict(content["model_state_dict"])
optimizer.load_state_dict(content["optimizer_state_dict"])
first_epoch, loss = content["epoch"] + 1, content["loss"]
x, y = torch.load(sys.argv[2], weights_only=True)
net.eval()
for epoch in range(first_epoch, 4):
    for i in range(0, 16, 4):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[i : i + 4]), y[i : i + 4]).backward()
        optimizer.step()
print(loss)
torch.save(net.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
def test_a_stranger_opens_a_file_without_kerastorch_and_trains_on_as_kerastorch_would(tmp_path: Path) -> None:
    def fit(epochs: int, *callbacks: kt.Callback) -> kt.Model:
        model = make_model()
        model.net[2].p = 0.0
        model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, callbacks=callbacks, verbose=0)
        return model

    model = fit(2, ModelCheckpoint(tmp_path / "a.pt", async_save=True))
    torch.save((X, Y), tmp_path / "data.pt")
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", STRANGER, tmp_path / "a.pt", tmp_path / "data.pt"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert child.returncode == 0, child.stderr
    assert float(child.stdout) == model.history.history["loss"][-1]
    weights = torch.load(tmp_path / "data.pt", weights_only=True)
    for name, value in fit(4).net.state_dict().items():
        assert torch.allclose(weights[name], value, rtol=1e-5, atol=1e-6), name


# ---- the jobs ----


def run_all(jobs: list[list[Any]]) -> list[int]:
    statuses = []
    for name, *arguments in jobs:
        pid = os.fork()
        if pid == 0:
            try:
                globals()[f"job_{name}"](*arguments)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return statuses


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_model()  # imports what torch imports late
    print(json.dumps(run_all(json.loads(sys.argv[1]))))
