"""A checkpoint is written whole or not at all, and opens without running code."""

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kerastorch.checkpoint import write_checkpoint


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
