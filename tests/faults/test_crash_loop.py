"""A run killed again and again, also inside its writes, ends as one that lived, and its folder does not grow."""

import random
from pathlib import Path
from typing import Any

import pytest
import resume_jobs as jobs  # loaded by conftest.py
import torch

KILLED = -9


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("straight")
    result = jobs.start(jobs.JOBS["long"](), folder)
    torch.set_num_threads(threads)
    return result, (folder / "log.csv").read_bytes()


def assert_ends_as(straight: Any, folder: Path) -> None:
    """Same weights, optimizer, history, log and random states."""
    result, log = torch.load(folder / "result.pt", weights_only=True), straight[1]
    straight = straight[0]
    assert result["weights"].keys() == straight.weights.keys()
    for name, weight in straight.weights.items():
        assert torch.equal(result["weights"][name], weight), name
    assert result["history"] == straight.history
    assert result["epochs"] == straight.epochs
    assert result["all_history"] == straight.all_history
    for i, state in straight.optimizer["state"].items():
        for name, value in state.items():
            assert torch.equal(result["optimizer"]["state"][i][name], value), (i, name)
    assert torch.equal(result["random_state"]["torch"], straight.random_state["torch"])
    assert (folder / "log.csv").read_bytes() == log


def left_in(folder: Path) -> list[str]:
    own = ("result.pt", "log.csv")
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name not in own
    )


SAVERS: dict[str, tuple[dict[str, Any], int]] = {
    "a file kept": ({"saver": "ModelCheckpoint", "settings": {"keep_last": 1}}, 1),
    "three files kept": ({"saver": "ModelCheckpoint", "settings": {"keep_last": 3}}, 3),
    "written in a thread": ({"saver": "ModelCheckpoint", "settings": {"keep_last": 2, "async_save": True}}, 2),
    "a backup": ({"saver": "BackupAndRestore"}, 1),
    "two backups": (
        {"saver": "BackupAndRestore", "settings": {"double_checkpoint": True, "delete_checkpoint": False}},
        2,
    ),
}


QUICK_AND_SLOW = [("two backups", 5), *(pytest.param(name, 20, marks=pytest.mark.slow) for name in SAVERS)]


@pytest.mark.parametrize(("saver", "times"), QUICK_AND_SLOW)
def test_killed_again_and_again_at_random_moments_a_run_ends_the_same_with_no_more_files_than_it_keeps(
    saver: str, times: int, forks: Any, straight: Any, tmp_path: Path
) -> None:
    """The parent sends SIGKILL some milliseconds after the first, second or third step of each life begins."""
    moments = random.Random(saver)
    settings, most = SAVERS[saver]
    order = {"job": "long", "save_freq": 1, **settings}
    for life in range(times):
        after = [moments.randint(1, 3), moments.uniform(0, 0.012)]
        assert forks(tmp_path, seed=0 if life < 2 else life, after=after, **order) == KILLED
    assert forks(tmp_path, **order) == 0
    assert_ends_as(straight, tmp_path)
    assert not [name for name in left_in(tmp_path) if name.endswith((".tmp", ".lock"))]
    assert len(left_in(tmp_path)) <= most


@pytest.mark.parametrize(("saver", "times"), QUICK_AND_SLOW)
def test_killed_again_and_again_inside_a_write_a_run_ends_the_same_with_no_more_files_than_it_keeps(
    saver: str, times: int, forks: Any, straight: Any, tmp_path: Path
) -> None:
    """Each life dies half way in a buffer, or before it syncs, renames or deletes, at a place that chance draws."""
    moments = random.Random(saver)
    settings, most = SAVERS[saver]
    order = {"job": "long", "save_freq": 1, **settings}
    for life in range(times):
        inside = (moments.randint(1, 500), "buffer") if life % 2 else (moments.randint(1, 9), "call")
        assert forks(tmp_path, inside=inside, **order) == KILLED
    assert forks(tmp_path, **order) == 0
    assert_ends_as(straight, tmp_path)
    assert not [name for name in left_in(tmp_path) if name.endswith((".tmp", ".lock"))]
    assert len(left_in(tmp_path)) <= most
