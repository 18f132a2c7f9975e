"""BackupAndRestore: a script that died goes on by itself when it is started again, and nothing of it stays behind.

Run as a program this file forks a process for each job of the JSON list in its first argument; each one is killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import BackupAndRestore, LambdaCallback, ModelCheckpoint
from kerastorch.checkpoint import CheckpointError, read_checkpoint

EPOCHS, STEPS = 4, 5
X = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] * 2

ARGUMENTS: dict[str, dict[str, Any]] = {
    "epoch": {},
    "batch": {"save_freq": 1},
    "batches": {"save_freq": 3},
    "double": {"double_checkpoint": True},
    "double batches": {"double_checkpoint": True, "save_freq": 3},
    "async": {"async_save": True},
    "async batches": {"async_save": True, "save_freq": 3},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for sums in one order, here and in the processes that are killed
    yield
    torch.set_num_threads(threads)


every_way = pytest.mark.parametrize("way", ARGUMENTS)


class Crash(Exception):
    pass


def make_model(**compiled: Any) -> kt.Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(20), nn.Dropout(0.2), nn.Linear(20, 1))
    model = kt.Model(net, device="cpu")
    model.compile("mse", "adam", ["mae"], **compiled)
    return model


def train(
    *callbacks: kt.Callback, model: kt.Model | None = None, epochs: int = EPOCHS, **arguments: Any
) -> tuple[kt.Model, kt.History]:
    """One life of a script: everything made anew."""
    model = model or make_model()
    return model, model.fit(
        X, Y, batch_size=4, epochs=epochs, validation_data=(X, Y), callbacks=callbacks, verbose=0, **arguments
    )


def at(epoch: int, batch: int, do: Callable[[], Any]) -> LambdaCallback:
    """Do something before a batch, counted from 0."""
    now = [0]

    def begin_batch(index: int, logs: Any) -> None:
        if (now[0], index) == (epoch, batch):
            do()

    return LambdaCallback(
        on_epoch_begin=lambda index, logs: now.__setitem__(0, index), on_train_batch_begin=begin_batch
    )


def crash() -> None:
    raise Crash


def life_that_ends(epoch: int, batch: int, *callbacks: kt.Callback, **arguments: Any) -> None:
    with pytest.raises(Crash):
        train(*callbacks, at(epoch, batch, crash), **arguments)


def names(folder: Path) -> list[str]:
    """What stands in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def weights(model: kt.Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.net.state_dict().items()}


def assert_same(model: kt.Model, expected: dict[str, torch.Tensor]) -> None:
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, expected[name]), name


class Steps(kt.Callback):
    """Notes (epoch, batch) of every training batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append((self.run.epoch, batch))


@pytest.fixture(scope="module")
def straight() -> tuple[dict[str, torch.Tensor], dict[str, list[Any]]]:
    """Weights and history of a run that nothing happened to."""
    model, history = train()
    return weights(model), history.history


# ---- going on ----


@every_way
@pytest.mark.parametrize("batch", [0, 4])
def test_a_script_that_died_goes_on_by_itself_to_the_same_end(
    tmp_path: Path, straight: tuple[Any, Any], way: str, batch: int
) -> None:
    folder, steps = tmp_path / "backup", Steps()
    life_that_ends(2, batch, BackupAndRestore(folder, **ARGUMENTS[way]))
    saved = max(read_checkpoint(folder / name)["run"]["batches_seen"] for name in names(folder))
    model, history = train(steps, BackupAndRestore(folder, **ARGUMENTS[way]))
    assert_same(model, straight[0])
    assert history.history == straight[1]
    assert history.epoch == [0, 1, 2, 3]
    batches = [(epoch, batch) for epoch in range(EPOCHS) for batch in range(STEPS)]
    assert steps.seen == batches[saved:]
    freq = ARGUMENTS[way].get("save_freq", STEPS)
    assert saved == (2 * STEPS + batch) // freq * freq
    assert names(tmp_path) == []


def test_it_goes_on_through_many_deaths(tmp_path: Path, straight: tuple[Any, Any]) -> None:
    for epoch, batch in ((0, 3), (1, 1), (1, 4), (2, 0), (3, 4)):
        life_that_ends(epoch, batch, BackupAndRestore(tmp_path / "b", save_freq=2))
    model, history = train(BackupAndRestore(tmp_path / "b", save_freq=2))
    assert_same(model, straight[0])
    assert history.history == straight[1]


def test_a_death_before_the_first_backup_begins_anew(tmp_path: Path, straight: tuple[Any, Any]) -> None:
    life_that_ends(0, 3, BackupAndRestore(tmp_path / "b"))
    assert names(tmp_path) == []
    assert_same(train(BackupAndRestore(tmp_path / "b"))[0], straight[0])


def test_save_freq_counts_batches_across_epochs_and_deaths(tmp_path: Path) -> None:
    seen: list[int] = []

    def look() -> kt.Callback:
        def batch_begin(batch: int, logs: Any) -> None:
            if (tmp_path / "b" / "backup.pt").exists():
                done = read_checkpoint(tmp_path / "b" / "backup.pt")["run"]["batches_seen"]
                if done not in seen:
                    seen.append(done)

        return LambdaCallback(on_train_batch_begin=batch_begin)

    life_that_ends(2, 3, look(), BackupAndRestore(tmp_path / "b", save_freq=4))  # after 13 batches
    assert seen == [4, 8, 12]
    train(look(), BackupAndRestore(tmp_path / "b", save_freq=4))
    assert seen == [4, 8, 12, 16]


def test_save_freq_waits_for_the_optimizer_step_and_goes_on_exactly_under_accumulation(tmp_path: Path) -> None:
    straight, _ = train(model=make_model(gradient_accumulation_steps=2))
    life_that_ends(1, 3, BackupAndRestore(tmp_path, save_freq=1), model=make_model(gradient_accumulation_steps=2))
    assert read_checkpoint(tmp_path / "backup.pt")["run"]["batches_done"] == 2
    model, _ = train(BackupAndRestore(tmp_path, save_freq=1), model=make_model(gradient_accumulation_steps=2))
    assert_same(model, weights(straight))


def test_more_epochs_on_the_restart_are_trained(tmp_path: Path) -> None:
    life_that_ends(2, 0, BackupAndRestore(tmp_path / "b"))
    model, history = train(BackupAndRestore(tmp_path / "b"), epochs=6)
    assert history.epoch == [0, 1, 2, 3, 4, 5]
    assert_same(model, weights(train(epochs=6)[0]))


def test_resume_true_does_the_same(tmp_path: Path, straight: tuple[Any, Any]) -> None:
    life_that_ends(2, 2, BackupAndRestore(tmp_path / "b"))
    assert_same(train(BackupAndRestore(tmp_path / "b"), resume=True)[0], straight[0])


def test_resume_false_begins_anew_though_there_is_a_backup(tmp_path: Path, straight: tuple[Any, Any]) -> None:
    steps = Steps()
    life_that_ends(2, 2, BackupAndRestore(tmp_path / "b"))
    model, _ = train(steps, BackupAndRestore(tmp_path / "b"), resume=False)
    assert steps.seen[0] == (0, 0)
    assert_same(model, straight[0])


def test_a_backup_of_another_net_is_refused_and_kept(tmp_path: Path) -> None:
    life_that_ends(2, 2, BackupAndRestore(tmp_path))
    before = (tmp_path / "backup.pt").read_bytes()
    model = kt.Model(nn.Linear(8, 1), device="cpu")
    model.compile("mse", "adam")
    with pytest.raises(ValueError, match=r"backup\.pt' does not fit this model"):
        train(BackupAndRestore(tmp_path), model=model)
    assert (tmp_path / "backup.pt").read_bytes() == before
    assert names(tmp_path) == ["backup.pt"]


# ---- a real kill ----


def job(folder: str, arguments: dict[str, Any], epoch: int, batch: int) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    train(BackupAndRestore(folder, **arguments), at(epoch, batch, die))


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on_by_itself_to_the_same_end(tmp_path: Path, straight: tuple[Any, Any]) -> None:
    jobs = [[str(tmp_path / way), arguments, 2, 3] for way, arguments in ARGUMENTS.items()]
    child = subprocess.run(
        [sys.executable, __file__, json.dumps(jobs)], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.stdout.split() == ["-9"] * len(jobs), child.stderr
    for way, arguments in ARGUMENTS.items():
        assert ".backup.pt.lock" in names(tmp_path / way)
        model, history = train(BackupAndRestore(tmp_path / way, **arguments))
        assert_same(model, straight[0])
        assert history.history == straight[1]
    assert names(tmp_path) == []


# ---- what stays ----


@every_way
def test_a_completed_fit_deletes_backups_and_folder(tmp_path: Path, way: str) -> None:
    seen: list[list[str]] = []
    look = LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(names(tmp_path / "a" / "b")))
    train(look, BackupAndRestore(tmp_path / "a" / "b", **ARGUMENTS[way]))
    assert seen[0] == [".backup.pt.lock"]
    assert any(name.endswith(".pt") for name in seen[-1]) or "async" in way
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == []


def test_foreign_files_and_their_folder_stay(tmp_path: Path) -> None:
    for name in ("notes.txt", "backup.pt.bak", "backup_3.pt", ".hidden"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "sub").mkdir()
    train(BackupAndRestore(tmp_path, double_checkpoint=True))
    assert names(tmp_path) == [".hidden", "backup.pt.bak", "backup_3.pt", "notes.txt", "sub"]


def test_an_empty_folder_that_was_there_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    train(BackupAndRestore(tmp_path / "b"), epochs=1)
    assert names(tmp_path) == ["b"]
    monkeypatch.chdir(tmp_path / "b")
    train(BackupAndRestore("."), epochs=1)
    assert names(tmp_path) == ["b"]


def test_a_folder_that_the_run_made_goes_in_a_later_life(tmp_path: Path) -> None:
    life_that_ends(1, 0, BackupAndRestore(tmp_path / "b"))
    train(BackupAndRestore(tmp_path / "b"))
    assert names(tmp_path) == []


def test_an_exception_keeps_the_backup(tmp_path: Path) -> None:
    life_that_ends(1, 0, BackupAndRestore(tmp_path / "b"))
    assert names(tmp_path / "b") == ["backup.pt"]


@pytest.mark.parametrize("way", ["epoch", "batches", "double", "async"])
def test_an_interrupt_writes_the_step_it_ended_at_and_keeps_it(
    tmp_path: Path, straight: tuple[Any, Any], way: str
) -> None:
    steps = Steps()
    press = at(1, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    train(press, BackupAndRestore(tmp_path / "b", **ARGUMENTS[way]), on_interrupt="return")
    files = BackupAndRestore(tmp_path / "b").files()
    assert read_checkpoint(files[0])["run"]["batches_seen"] == STEPS + 2
    assert [name for name in names(tmp_path / "b") if not name.endswith(".pt")] == []
    model, history = train(steps, BackupAndRestore(tmp_path / "b", **ARGUMENTS[way]))
    assert steps.seen[0] == (1, 2)
    assert_same(model, straight[0])
    assert history.history == straight[1]
    assert names(tmp_path) == []


def test_delete_checkpoint_false_keeps_the_backup_and_the_same_script_trains_nothing_more(
    tmp_path: Path, straight: tuple[Any, Any]
) -> None:
    for life in (1, 2, 3):
        steps = Steps()
        model, history = train(steps, BackupAndRestore(tmp_path / "b", delete_checkpoint=False))
        assert len(steps.seen) == (EPOCHS * STEPS if life == 1 else 0)
        assert history.history == straight[1]
        assert history.epoch == [0, 1, 2, 3]
        assert_same(model, straight[0])
        assert names(tmp_path / "b") == ["backup.pt"]


def test_delete_checkpoint_false_and_more_epochs_train_on(tmp_path: Path) -> None:
    train(BackupAndRestore(tmp_path / "b", delete_checkpoint=False))
    model, history = train(BackupAndRestore(tmp_path / "b", delete_checkpoint=False), epochs=5)
    assert history.epoch == [0, 1, 2, 3, 4]
    assert_same(model, weights(train(epochs=5)[0]))


# ---- double_checkpoint ----


@pytest.mark.parametrize("save_freq", ["epoch", 2])
def test_double_checkpoint_keeps_the_two_newest(tmp_path: Path, save_freq: Any) -> None:
    callback = BackupAndRestore(tmp_path, save_freq, double_checkpoint=True)
    life_that_ends(3, 0, callback)
    done = [read_checkpoint(path)["run"]["batches_seen"] for path in callback.files()]
    assert done == ([15, 10] if save_freq == "epoch" else [14, 12])
    assert names(tmp_path) == ["backup.pt", "backup_2.pt"]


def test_without_double_checkpoint_there_is_one(tmp_path: Path) -> None:
    life_that_ends(3, 0, BackupAndRestore(tmp_path))
    assert names(tmp_path) == ["backup.pt"]


@pytest.mark.parametrize("dies_at", [2, 3])
def test_double_checkpoint_survives_a_damaged_newest_and_then_another(
    tmp_path: Path, straight: tuple[Any, Any], dies_at: int
) -> None:
    def callback() -> BackupAndRestore:
        return BackupAndRestore(tmp_path, double_checkpoint=True)

    life_that_ends(dies_at, 0, callback())
    newest, older = callback().files()
    newest.write_bytes(newest.read_bytes()[:500])
    with pytest.warns(UserWarning, match=f"{newest.name}.* Going on from .*{older.name}"):
        life_that_ends(dies_at, 0, callback())
    newest, older = callback().files()
    newest.write_bytes(b"")
    with pytest.warns(UserWarning, match=f"{newest.name}.* Going on from .*{older.name}"):
        model, history = train(callback())
    assert_same(model, straight[0])
    assert history.history == straight[1]
    assert names(tmp_path) == []


def test_double_checkpoint_replaces_a_damaged_file_before_the_good_one(tmp_path: Path) -> None:
    callback = BackupAndRestore(tmp_path, double_checkpoint=True)
    life_that_ends(3, 0, callback)
    newest, older = callback.files()
    newest.write_bytes(b"")
    with pytest.warns(UserWarning, match="Going on from"):
        life_that_ends(3, 0, callback)
    assert sorted(read_checkpoint(path)["epoch"] for path in (newest, older)) == [1, 2]


def test_without_double_checkpoint_a_damaged_backup_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    steps = Steps()
    life_that_ends(2, 0, BackupAndRestore(tmp_path))
    (tmp_path / "backup.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read, so the run can't go on: .*backup\.pt"):
        train(steps, BackupAndRestore(tmp_path))
    assert steps.seen == []
    assert names(tmp_path) == ["backup.pt"]


def test_a_second_backup_of_a_script_that_kept_two_is_found_and_deleted_without_double_checkpoint(
    tmp_path: Path, straight: tuple[Any, Any]
) -> None:
    life_that_ends(2, 0, BackupAndRestore(tmp_path / "b", double_checkpoint=True))
    assert_same(train(BackupAndRestore(tmp_path / "b"))[0], straight[0])
    assert names(tmp_path) == []


# ---- later fits ----


def test_it_leaves_no_trace_in_later_fits(tmp_path: Path) -> None:
    plain = make_model()
    train(model=plain, epochs=2)
    train(model=plain, epochs=3)
    backed, callback = make_model(), BackupAndRestore(tmp_path / "b", save_freq=3)
    train(callback, model=backed, epochs=2)
    _, history = train(callback, model=backed, epochs=3)
    assert history.epoch == [0, 1, 2]
    assert_same(backed, weights(plain))
    assert backed.history.epoch == plain.history.epoch
    assert backed.history.history == plain.history.history


def test_a_fit_after_one_that_went_on_is_as_after_an_uninterrupted_one(tmp_path: Path) -> None:
    plain = make_model()
    train(model=plain)
    train(model=plain, epochs=2)
    life_that_ends(2, 3, BackupAndRestore(tmp_path / "b", 2))
    model, callback = make_model(), BackupAndRestore(tmp_path / "b", 2)
    train(callback, model=model)
    _, history = train(model=model, epochs=2)
    assert history.epoch == [0, 1]
    assert_same(model, weights(plain))
    assert model.history.epoch == plain.history.epoch
    assert model.history.history == plain.history.history


def test_it_does_not_change_what_is_trained(tmp_path: Path, straight: tuple[Any, Any]) -> None:
    for way, arguments in ARGUMENTS.items():
        model, history = train(BackupAndRestore(tmp_path / way, **arguments))
        assert_same(model, straight[0])
        assert history.history == straight[1]


def test_beside_a_model_checkpoint_the_newer_of_the_backups_is_gone_on_from(
    tmp_path: Path, straight: tuple[Any, Any]
) -> None:
    def callbacks() -> list[kt.Callback]:
        return [ModelCheckpoint(tmp_path / "m" / "{epoch}.pt", keep_last=1), BackupAndRestore(tmp_path / "b", 2)]

    life_that_ends(2, 3, *callbacks())
    steps = Steps()
    model, _ = train(steps, *callbacks())
    assert steps.seen[0] == (2, 2)
    assert_same(model, straight[0])
    assert names(tmp_path) == ["m"]
    assert names(tmp_path / "m") == ["4.pt"]


def test_a_model_checkpoint_alone_never_goes_on_by_itself(tmp_path: Path) -> None:
    life_that_ends(2, 0, ModelCheckpoint(tmp_path / "{epoch}.pt"))
    steps = Steps()
    train(steps, ModelCheckpoint(tmp_path / "{epoch}.pt"))
    assert steps.seen[0] == (0, 0)


# ---- arguments ----


def test_the_arguments_are_those_of_keras(tmp_path: Path) -> None:
    callback = BackupAndRestore(str(tmp_path), 7, True, False)
    assert callback.backup_dir == tmp_path
    assert (callback.save_freq, callback.double_checkpoint, callback.delete_checkpoint) == (7, True, False)
    plain = BackupAndRestore(backup_dir=tmp_path)
    assert (plain.save_freq, plain.double_checkpoint, plain.delete_checkpoint) == ("epoch", False, True)


@pytest.mark.parametrize("save_freq", ["batch", 0, -1, 2.5, True, None])
def test_a_wrong_save_freq_is_refused_when_made(tmp_path: Path, save_freq: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="save_freq"):
        BackupAndRestore(tmp_path, save_freq)
    assert names(tmp_path) == []


def test_a_relative_folder_is_taken_from_where_fit_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    life_that_ends(2, 0, BackupAndRestore("b"))
    assert names(tmp_path / "b") == ["backup.pt"]


def run_jobs(jobs: list[list[Any]]) -> None:
    for arguments in jobs:
        pid = os.fork()
        if pid == 0:
            try:
                job(*arguments)
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_model()  # imports what torch imports late
    run_jobs(json.loads(sys.argv[1]))
