"""A checkpoint is written whole or not at all, and opens without running code."""

import enum
import errno
import math
import os
import random
import re
import stat
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kerastorch.checkpoint import CheckpointError, num_bytes, read_checkpoint, write_checkpoint


def make_content(epoch: int) -> dict[str, Any]:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "epoch": epoch,
        "model_state_dict": net.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "loss": 0.5,
        "random": {"python": random.getstate(), "torch": torch.get_rng_state()},
        "history": [{"loss": 0.5}, {"loss": 0.25, "confusion": [[1, 0], [0, 1]]}],
        "best": None,
    }


def test_checkpoint_opens_with_weights_only_and_holds_the_same(tmp_path: Path) -> None:
    content = make_content(3)
    write_checkpoint(tmp_path / "a.pt", content)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(loaded) == list(content)
    for key in ("epoch", "loss", "history", "best"):
        assert loaded[key] == content[key]
    assert loaded["random"]["python"] == content["random"]["python"]
    assert torch.equal(loaded["random"]["torch"], content["random"]["torch"])
    for name, weight in content["model_state_dict"].items():
        assert torch.equal(loaded["model_state_dict"][name], weight)
    net = torch.nn.Linear(3, 2)
    torch.optim.Adam(net.parameters()).load_state_dict(loaded["optimizer_state_dict"])


@pytest.mark.parametrize("as_type", [str, Path])
def test_path_may_be_text_or_path_and_only_the_file_is_there(tmp_path: Path, as_type: Any) -> None:
    write_checkpoint(as_type(tmp_path / "any name.ckpt"), {"epoch": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["any name.ckpt"]


def test_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    for epoch in (1, 2):
        write_checkpoint(tmp_path / "a.pt", {"epoch": epoch})
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"epoch": 2}
    assert len(list(tmp_path.iterdir())) == 1


class Unpicklable:
    pass


def assert_old_file_is_intact_and_alone(folder: Path) -> None:
    assert torch.load(folder / "a.pt", weights_only=True) == {"epoch": 1}
    assert [path.name for path in folder.iterdir()] == ["a.pt"]


def test_content_that_can_not_be_saved_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pt", {"epoch": 1})
    with pytest.raises(TypeError, match=r"can't hold \['bad'\], a .*Unpicklable: it takes tensors"):
        write_checkpoint(tmp_path / "a.pt", {"weights": torch.ones(1000), "bad": Unpicklable()})
    assert_old_file_is_intact_and_alone(tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0")],
    ids=["of the system", "of torch's writer"],
)
def test_full_disk_leaves_the_old_file_and_is_an_os_error_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write_checkpoint(tmp_path / "a.pt", {"epoch": 1})

    def save_half(content: object, file: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(OSError, match=r"checkpoint '.*a\.pt' could not be written: .*") as raised:
        write_checkpoint(tmp_path / "a.pt", {"epoch": 2})
    assert str(error.args[-1]) in str(raised.value)
    assert_old_file_is_intact_and_alone(tmp_path)


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_failure_after_the_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    write_checkpoint(tmp_path / "a.pt", {"epoch": 1})

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError, match=r"could not be written: .*Input/output error"):
        write_checkpoint(tmp_path / "a.pt", {"epoch": 2})
    assert_old_file_is_intact_and_alone(tmp_path)


def test_interrupt_in_the_middle_goes_on_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "a.pt", {"epoch": 1})

    def interrupted(content: object, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "a.pt", {"epoch": 2})
    assert_old_file_is_intact_and_alone(tmp_path)


def test_file_reaches_the_disk_before_it_takes_the_old_one_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replace(old, new))[1])
    write_checkpoint(tmp_path / "a.pt", {"epoch": 1})
    assert calls[:2] == ["fsync", "replace"]
    assert calls == (["fsync", "replace", "fsync"] if os.name == "posix" else calls)  # the folder's entry as well


def test_missing_folder_is_an_os_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"checkpoint '.*missing.a\.pt' could not be written"):
        write_checkpoint(tmp_path / "missing" / "a.pt", {"epoch": 1})


def test_a_folder_that_is_a_file_is_an_os_error_with_the_path_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"checkpoint '.*file.a\.pt' could not be written: Not a directory"):
        write_checkpoint(tmp_path / "file" / "a.pt", {"epoch": 1})
    assert (tmp_path / "file").read_text() == "mine"


def test_a_content_that_a_safe_file_can_not_hold_is_refused_by_key_before_anything_is_written(tmp_path: Path) -> None:
    class Kind(enum.Enum):
        A = 1

    cases: list[tuple[Any, str]] = [
        ({"a": {"b": [1, (2, Kind.A)]}}, r"\['a'\]\['b'\]\[1\]\[1\]"),
        ({"a": {Kind.A: 1}}, r"the key .*Kind.* of \['a'\]"),
        ({"f": lambda: None}, r"\['f'\], a builtins.function"),
        ({"f": open}, r"\['f'\]"),
        ({"n": np.float64(1)}, r"\['n'\], a numpy.float64"),
        ({"n": np.zeros(2)}, r"\['n'\], a numpy.ndarray"),
        ({"p": Path("x")}, r"\['p'\], a pathlib"),
        ({"d": defaultdict(int)}, r"\['d'\], a collections.defaultdict"),
        ({"i": type("MyInt", (int,), {})(3)}, r"\['i'\], a .*MyInt"),
    ]
    for content, message in cases:
        with pytest.raises(TypeError, match="a checkpoint can't hold " + message):
            write_checkpoint(tmp_path / "a.pt", content)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_every_plain_value_that_is_taken_comes_back_the_same(tmp_path: Path) -> None:
    content = {
        "values": [None, True, 3, -(2**70), 0.1, math.inf, 1j, "s\u00e9", b"\x00\xff", torch.Size([2]), torch.bfloat16],
        "nested": {1: (2, [3, {"a": {4}}]), (1, 2): OrderedDict(b=1)},
        "tensors": [torch.ones(2, dtype=torch.bfloat16), torch.eye(2).to_sparse(), torch.zeros(0, 3)],
    }
    write_checkpoint(tmp_path / "a.pt", content)
    loaded = read_checkpoint(tmp_path / "a.pt")
    assert loaded["values"] == content["values"]
    assert loaded["nested"] == content["nested"]
    for one, other in zip(loaded["tensors"], content["tensors"], strict=True):
        assert one.layout == other.layout
        assert torch.equal(one.to_dense(), other.to_dense())


def test_storages_that_are_shared_stay_shared_and_are_written_and_counted_once(tmp_path: Path) -> None:
    weight = torch.ones(100, 100)
    content = {"model_state_dict": {"a": weight, "b": weight, "c": weight[:10]}, "again": [weight]}
    assert num_bytes(content) == 40_000
    write_checkpoint(tmp_path / "a.pt", content)
    assert (tmp_path / "a.pt").stat().st_size < 50_000
    loaded = read_checkpoint(tmp_path / "a.pt")["model_state_dict"]
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() == loaded["c"].data_ptr()


def test_a_leftover_of_a_killed_writer_goes_with_the_next_write_of_the_same_file(tmp_path: Path) -> None:
    (tmp_path / ".a[1].pt.99999.tmp").write_bytes(b"half")
    (tmp_path / ".b.pt.99999.tmp").write_bytes(b"another file's")
    write_checkpoint(tmp_path / "a[1].pt", {"epoch": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.pt.99999.tmp", "a[1].pt"]


def test_a_write_leaves_the_running_write_of_a_file_with_a_longer_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, began = os.fsync, []

    def write_the_other_meanwhile(descriptor: int) -> None:
        if not began:
            began.append(1)
            write_checkpoint(tmp_path / "net", {"epoch": 1})
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", write_the_other_meanwhile)
    write_checkpoint(tmp_path / "net.best", {"epoch": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "net.best"]
    assert read_checkpoint(tmp_path / "net.best") == {"epoch": 2}


# ---- reading ----


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def assert_same_or_refused(path: Path, damaged: bytes, content: Any, what: str) -> None:
    path.write_bytes(damaged)
    try:
        loaded = read_checkpoint(path)
    except CheckpointError:
        return
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert same(loaded, content), f"{what}: other content than was written"


@pytest.mark.parametrize("part", range(4))  # T16
def test_a_flipped_byte_is_refused_as_damage_or_does_no_harm(tmp_path: Path, part: int) -> None:
    content = {"epoch": 1, "model_state_dict": torch.nn.Linear(3, 2).state_dict()}
    path = tmp_path / "a.pt"
    write_checkpoint(path, content)
    whole, failures = path.read_bytes(), []
    for i in range(part, len(whole), 4):
        damaged = bytearray(whole)
        damaged[i] ^= 0xFF
        try:
            assert_same_or_refused(path, bytes(damaged), content, f"byte {i} of {len(whole)}")
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures


@pytest.mark.parametrize(("offset", "bit"), [(8, 0x01), (38, 0x10)], ids=["says encrypted", "says it is a folder"])
def test_a_flipped_bit_in_the_zip_s_directory_is_refused_or_does_no_harm(tmp_path: Path, offset: int, bit: int) -> None:
    content = {"epoch": 1, "weights": torch.arange(6.0)}
    path = tmp_path / "a.pt"
    write_checkpoint(path, content)
    whole = path.read_bytes()
    for entry in re.finditer(b"PK\x01\x02", whole):
        damaged = bytearray(whole)
        damaged[entry.start() + offset] ^= bit
        assert_same_or_refused(path, bytes(damaged), content, f"entry at byte {entry.start()}")


def test_a_file_cut_anywhere_is_refused_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"epoch": 1, "weights": torch.ones(3)})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.pt' \(\d+ bytes\) is damaged, or no checkpoint"):
            read_checkpoint(path)


@pytest.mark.parametrize("garbage", [b"\0" * 4096, random.Random(0).randbytes(4096), b"PK\x03\x04", b"PK\x05\x06"])
def test_zeros_and_noise_are_refused_as_damaged(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(garbage)
    with pytest.raises(CheckpointError, match=r"a\.pt' \(\d+ bytes\) is damaged"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("part", ["data.pkl", "data/0", "byteorder", "version"])
def test_a_file_without_one_of_its_parts_is_refused_or_holds_the_same(tmp_path: Path, part: str) -> None:
    content = {"epoch": 1, "weights": torch.arange(6.0)}
    write_checkpoint(tmp_path / "whole.pt", content)
    path, dropped = tmp_path / "a.pt", []
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w") as less:
        for entry in whole.infolist():
            if entry.filename.partition("/")[2] == part:
                dropped.append(entry)
            else:
                less.writestr(entry, whole.read(entry))
    assert len(dropped) == 1
    assert_same_or_refused(path, path.read_bytes(), content, part)
    if part.startswith("data"):
        with pytest.raises(CheckpointError, match=r"can't be loaded"):
            read_checkpoint(path)


def test_another_kind_of_file_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt' holds a list, not a checkpoint's dict"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(IsADirectoryError, match="a checkpoint is a file"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        read_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_syncs_no_folders_is_written_to(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_sync_folders(monkeypatch, number)
    write_checkpoint(tmp_path / "a.pt", make_content(1))
    assert read_checkpoint(tmp_path / "a.pt")["epoch"] == 1


def test_an_error_after_the_rename_names_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_sync_folders(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=r"'before\.pt' of before is still whole"):
        write_checkpoint(tmp_path / "a.pt", make_content(1), last_good="before.pt")


def fail_to_sync_folders(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_link_is_written_at_its_target(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "big" / "real.pt")
    for epoch in (1, 2):
        write_checkpoint(tmp_path / "link.pt", make_content(epoch))
        assert (tmp_path / "link.pt").is_symlink()
        assert read_checkpoint(tmp_path / "big" / "real.pt")["epoch"] == epoch
