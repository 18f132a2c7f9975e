"""A run that dies and is started again ends as one that lived: weights, history, every step (scenarios T1-T10)."""

import ast
import csv
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resume_jobs as jobs  # loaded by conftest.py
import torch
import torchmetrics
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import kerastorch as kt
from kerastorch.callbacks import (
    EMA,
    SWA,
    BackupAndRestore,
    Callback,
    CSVLogger,
    EarlyStopping,
    ModelCheckpoint,
    ReduceLROnPlateau,
)

Job, Death, Dies, Result = jobs.Job, jobs.Death, jobs.Dies, jobs.Result
LOOPS = ("script", "function", "class")


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return values to parametrize with, all but the quick ones marked slow."""
    return [
        value
        if value in quick
        else pytest.param(*(value if isinstance(value, tuple) else [value]), marks=pytest.mark.slow)
        for value in values
    ]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal to the bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same(result: Any, straight: Any, begins_at: int) -> None:
    """result: a life that went on at step `begins_at` (from 0), as straight, which never died, did."""
    assert [step[:3] for step in result.steps] == [step[:3] for step in straight.steps[begins_at:]]
    for step, expected in zip(result.steps, straight.steps[begins_at:], strict=True):
        assert step == expected
    assert result.history == straight.history
    assert result.epochs == straight.epochs
    assert result.all_history == straight.all_history
    assert result.all_epochs == straight.all_epochs
    for name, weight in straight.weights.items():
        assert torch.equal(result.weights[name], weight), name
    assert same(result.optimizer, straight.optimizer)
    assert same(result.random_state, straight.random_state)


def die(job: Any, folder: Path, savers: Any, at: int = 17, hook: str = "on_train_batch_end", **arguments: Any) -> None:
    with pytest.raises(Death):
        jobs.start(job, folder, savers, dies=Dies(hook, at, jobs.raise_death), **arguments)


def resume(job: Any, folder: Path, savers: Any, *, warns: str | None = None, **arguments: Any) -> Any:
    """Start the script again; its seed is another, so that all must come from the checkpoint."""
    arguments = {"resume": True, "seed": 77, **arguments}
    if warns is None:
        return jobs.start(job, folder, savers, **arguments)
    with pytest.warns(UserWarning, match=warns):
        return jobs.start(job, folder, savers, **arguments)


# The files that a life which died in step 19 leaves: after an epoch; inside the next one, after its first batch, in its
# middle, before its last batch; and after an epoch's last batch, where nothing but its validation and end are left.
MOMENTS = (("epoch", 12), ("batch", 12), ("batch", 13), ("batch", 15), ("batch", 17))


BETWEEN = (("epoch", 12), ("batch", 12), ("batch", 15))  # where it is not the position in the data that matters


def check(job: Any, folder: Path, moments: Any = MOMENTS, *, steps: int = 6, dies_at: int = 19) -> None:
    """Live once without saving, once to a death, and go on from each file of moments (kind, steps done by then)."""
    straight = jobs.start(job, make_folder(folder / "straight"))
    dead = make_folder(folder / "dead")
    savers = [
        ModelCheckpoint(dead / "epoch-{epoch}.pt"),
        jobs.SavesAt(dead / "batch-{epoch}-{batch}.pt", {done for kind, done in moments if kind == "batch"}),
    ]
    die(job, dead, savers, dies_at)
    failures: list[str] = []
    first: Exception | None = None
    for kind, done in moments:
        epoch = (done - 1) // steps + 1 + job.fit.get("initial_epoch", 0)
        name = f"epoch-{epoch}" if kind == "epoch" else f"batch-{epoch}-{(done - 1) % steps + 1}"
        warns = job.warns if kind == "batch" or "steps_per_epoch" in job.fit else None
        saver = ModelCheckpoint(dead / f"from-{name}-{{epoch}}.pt", keep_last=1)
        try:
            assert_same(resume(job, dead, saver, resume=dead / f"{name}.pt", warns=warns), straight, done)
        except (Exception, pytest.fail.Exception) as error:
            failures.append(f"from {name}.pt: {type(error).__name__}: {error}")
            first = first or error
    if failures:
        raise AssertionError("\n".join(failures)) from first


@functools.cache
def live_plain() -> Any:
    """The plain job from its first line to its end."""
    return jobs.start(Job(), Path())


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


# ---- T1, T2, T3: processes that are really killed ----


def read(folder: Path) -> Any:
    return Result(**torch.load(folder / "result.pt", weights_only=True))


def live_straight(job: Any, folder: Path, **arguments: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return jobs.start(job, folder, **arguments)


@pytest.mark.parametrize("saver", ["ModelCheckpoint", pytest.param("BackupAndRestore", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loop", mostly_slow(LOOPS, "script"))
def test_t1_killed_in_step_17_a_run_that_saves_each_epoch_trains_12_steps_more_and_ends_the_same(
    loop: str, saver: str, forks: Any, tmp_path: Path
) -> None:
    straight = live_straight(Job(), tmp_path / "straight", loop=loop)
    order = {"job": "plain", "save_freq": "epoch", "saver": saver, "loop": loop}
    if saver == "BackupAndRestore":
        order["settings"] = {"delete_checkpoint": False}
    assert forks(tmp_path / "run", step=17, **order) == -9
    assert forks(tmp_path / "run", **order) == 0
    assert_same(read(tmp_path / "run"), straight, 12)
    assert len(read(tmp_path / "run").steps) == 12


@pytest.mark.parametrize("job", ["transforms", pytest.param("workers", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loop", LOOPS)
def test_t2_t3_killed_inside_an_epoch_a_run_sees_each_row_of_it_once_and_ends_the_same(
    loop: str, job: str, forks: Any, tmp_path: Path
) -> None:
    straight = live_straight(jobs.JOBS[job](), tmp_path / "straight", loop=loop)
    order = {"job": job, "save_freq": 5, "loop": loop}
    assert forks(tmp_path / "run", step=17, **order) == -9
    assert forks(tmp_path / "run", seed=3, **order) == 0
    result = read(tmp_path / "run")
    assert_same(result, straight, 15)
    rows = [row for step in straight.steps[12:15] + result.steps[:3] for row in step[-1]]
    assert sorted(rows) == list(range(96))


@pytest.mark.slow
def test_t1_t2_the_same_with_an_interpreter_of_its_own_for_each_life(tmp_path: Path) -> None:
    straight = live_straight(jobs.JOBS["workers"](), tmp_path / "straight")
    for kill in ({"step": 17}, {"step": 4}, {}):
        server = jobs.Forks()
        status = server(tmp_path / "run", job="workers", save_freq=5, **kill)
        server.close()
        assert status == (-9 if kill else 0)
    assert_same(read(tmp_path / "run"), straight, 15)


# ---- when it dies ----


@pytest.mark.parametrize(
    ("save_freq", "saver", "deaths"),
    [
        (5, "BackupAndRestore", (1, 5, 6, 7, 12, 13, 24)),
        pytest.param(5, "BackupAndRestore", range(1, 25), marks=pytest.mark.slow),
        pytest.param("epoch", "ModelCheckpoint", range(1, 25), marks=pytest.mark.slow),
        pytest.param(1, "ModelCheckpoint", range(1, 25), marks=pytest.mark.slow),
        pytest.param(6, "BackupAndRestore", range(1, 25), marks=pytest.mark.slow),
    ],
)
def test_t2_dead_at_any_step_a_run_goes_on_from_its_last_save(
    save_freq: Any, saver: str, deaths: Iterable[int], tmp_path: Path
) -> None:
    straight = live_plain()
    for dies_at in deaths:
        folder = tmp_path / str(dies_at)
        folder.mkdir()
        die(Job(), folder, jobs.make_saver(folder, save_freq, saver), dies_at)
        period = 6 if save_freq == "epoch" else save_freq
        begins_at = (dies_at - 1) // period * period
        result = resume(Job(), folder, jobs.make_saver(folder, save_freq, saver), seed=77 if begins_at else 0)
        assert_same(result, straight, begins_at)


HOOKS = {
    "on_epoch_begin": 3,
    "on_train_batch_begin": 14,
    "on_train_batch_end": 14,
    "on_train_epoch_end": 2,
    "on_test_begin": 2,
    "on_test_batch_begin": 5,
    "on_test_batch_end": 6,
    "on_test_end": 2,
    "on_epoch_end": 2,
    "on_train_end": 1,
}


@pytest.mark.parametrize("save_freq", mostly_slow(["epoch", 4], "epoch"))
@pytest.mark.parametrize("hook", HOOKS)
def test_t2_dead_in_any_hook_a_run_goes_on_from_its_last_save(hook: str, save_freq: Any, tmp_path: Path) -> None:
    straight = live_plain()
    die(Job(), tmp_path, jobs.make_saver(tmp_path, save_freq), HOOKS[hook], hook)
    result = resume(Job(), tmp_path, jobs.make_saver(tmp_path, save_freq))
    assert_same(result, straight, 24 - len(result.steps))
    done = {"on_train_end": 24, "on_train_batch_begin": 13, "on_train_batch_end": 13}.get(hook, 12)
    period = 6 if save_freq == "epoch" else save_freq
    if hook in ("on_train_epoch_end", "on_test_begin", "on_test_end", "on_epoch_end") or "on_test_batch" in hook:
        assert len(result.steps) == (18 if save_freq == "epoch" else 24 - 12 // period * period)
    else:
        assert len(result.steps) == 24 - done // period * period


def test_t2_dead_again_and_again_a_run_ends_the_same(tmp_path: Path) -> None:
    straight = live_plain()
    for life, dies_at in enumerate((7, 3, 4, 6, 1)):  # from 0, 5, 5, 5, 10
        with pytest.raises(Death):
            jobs.start(
                Job(),
                tmp_path,
                jobs.make_saver(tmp_path, 5),
                dies=Dies("on_train_batch_end", dies_at, jobs.raise_death),
                resume=True,
                seed=life,
            )
    assert_same(resume(Job(), tmp_path, jobs.make_saver(tmp_path, 5)), straight, 10)


@pytest.mark.parametrize("save_freq", ["epoch", 5])
def test_the_same_model_fitted_again_after_an_exception_goes_on_and_its_history_is_not_doubled(
    save_freq: Any, tmp_path: Path
) -> None:
    straight = live_plain()
    jobs.seed_all(0)
    model = jobs.make_model(Job())
    die(Job(), tmp_path, jobs.make_saver(tmp_path, save_freq), 17, model=model)
    result = resume(Job(), tmp_path, jobs.make_saver(tmp_path, save_freq), model=model)
    assert_same(result, straight, 12 if save_freq == "epoch" else 15)


def test_the_same_callbacks_again_after_an_exception_begin_where_the_checkpoint_stands(tmp_path: Path) -> None:
    job = Job(callbacks=lambda folder: [CSVLogger(folder / "log.csv"), EMA(0.9), EarlyStopping(patience=9)])
    straight = jobs.start(job, tmp_path)
    saver, own = jobs.make_saver(tmp_path, 5), job.callbacks(tmp_path)
    job.callbacks = lambda folder: own
    die(job, tmp_path, saver, 17)
    assert_same(resume(job, tmp_path, saver), straight, 15)


def test_a_second_fit_that_died_goes_on_and_the_models_history_holds_the_first_fit_once(tmp_path: Path) -> None:
    def script(folder: Path, seed: int, **arguments: Any) -> Any:
        jobs.seed_all(seed)
        model = jobs.make_model(Job())
        model.fit(jobs.shuffled()(), epochs=2, verbose=0)
        return jobs.start(Job(), folder, model=model, **arguments)

    straight = script(tmp_path, 0)
    dies = Dies("on_train_batch_end", 17, jobs.raise_death)
    with pytest.raises(Death):
        script(tmp_path, 0, savers=jobs.make_saver(tmp_path, 5), dies=dies)
    result = script(tmp_path, 5, savers=jobs.make_saver(tmp_path, 5), resume=True)
    assert_same(result, straight, 15)
    assert result.all_epochs == list(range(6))


def test_a_fit_with_an_initial_epoch_goes_on_inside_its_epochs(tmp_path: Path) -> None:
    check(Job(fit={"initial_epoch": 2, "epochs": 6}), tmp_path)


# ---- T3: transforms, workers, loaders, samplers, iterables ----


class Striding(Sampler[list[int]]):
    """Batches of a stride that moves each pass, from a generator of its own, drawn as they are asked for."""

    def __init__(self, seed: int = 5) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(jobs.STEPS):
            yield torch.randint(jobs.ROWS, (jobs.BATCH,), generator=self.generator).tolist()

    def __len__(self) -> int:
        return jobs.STEPS


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


ALL = ("python", "numpy", "torch")
dataset = jobs.Pictures
LOADERS: dict[str, Callable[..., DataLoader[Any]]] = {
    "shuffled": lambda **settings: DataLoader(dataset(*ALL), 16, shuffle=True, **settings),
    "ordered": lambda **settings: DataLoader(dataset(*ALL), 16, **settings),
    "own generator": lambda **settings: DataLoader(
        dataset(*ALL), 16, shuffle=True, generator=own_generator(), **settings
    ),
    "weighted": lambda **settings: DataLoader(
        dataset(*ALL), 16, sampler=WeightedRandomSampler(torch.arange(1.0, 97), 96), **settings
    ),
    "weighted, own generator": lambda **settings: DataLoader(
        dataset(*ALL),
        16,
        sampler=WeightedRandomSampler(torch.arange(1.0, 97), 96, generator=own_generator()),
        **settings,
    ),
    "subset": lambda **settings: DataLoader(dataset(*ALL), 12, sampler=SubsetRandomSampler(range(5, 75)), **settings),
    "replacement": lambda **settings: DataLoader(
        dataset(*ALL), 16, sampler=RandomSampler(range(96), replacement=True), **settings
    ),
    "replacement, own generator": lambda **settings: DataLoader(
        dataset(*ALL), 16, sampler=RandomSampler(range(96), replacement=True, generator=own_generator()), **settings
    ),
    "batch sampler": lambda **settings: DataLoader(
        dataset(*ALL), batch_sampler=BatchSampler(RandomSampler(range(96)), 16, drop_last=True), **settings
    ),
    "custom batch sampler, own generator": lambda **settings: DataLoader(
        dataset(*ALL), batch_sampler=Striding(), **settings
    ),
    "drop last": lambda **settings: DataLoader(dataset(*ALL, rows=110), 16, shuffle=True, drop_last=True, **settings),
}


class OwnDraws:
    """Something that draws from a generator of numpy's, which its state_dict tells."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": str(self.rng.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = ast.literal_eval(state["rng"])


class NoisyRows(OwnDraws, dataset):
    def __init__(self) -> None:
        OwnDraws.__init__(self)
        dataset.__init__(self, *ALL)

    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        x[1] += float(self.rng.normal())
        return x, y


class Permutation(OwnDraws, Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.permutation(jobs.ROWS).tolist())

    def __len__(self) -> int:
        return jobs.ROWS


class Groups(OwnDraws, Sampler[list[int]]):
    """Batches that are drawn when a pass begins."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.rng.permutation(jobs.ROWS).reshape(jobs.STEPS, -1).tolist())

    def __len__(self) -> int:
        return jobs.STEPS


WITH_STATE: dict[str, Callable[..., Any]] = {
    "dataset": lambda **settings: DataLoader(NoisyRows(), 16, shuffle=True, **settings),
    "wrapped dataset": lambda **settings: DataLoader(Subset(NoisyRows(), range(96)), 16, shuffle=True, **settings),
    "sampler": lambda **settings: DataLoader(dataset(*ALL), 16, sampler=Permutation(), **settings),
    "batch sampler": lambda **settings: DataLoader(dataset(*ALL), batch_sampler=Groups(), **settings),
}


@pytest.mark.parametrize("loader", mostly_slow(WITH_STATE, "wrapped dataset", "batch sampler"))
def test_t3_datasets_and_samplers_with_a_state_of_their_own(loader: str, tmp_path: Path) -> None:
    check(Job(data=WITH_STATE[loader]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loader", WITH_STATE)
def test_t3_datasets_and_samplers_with_a_state_in_epochs_of_a_set_number_of_steps(loader: str, tmp_path: Path) -> None:
    check(Job(data=WITH_STATE[loader], fit={"steps_per_epoch": 4}), tmp_path, STEPS[4], steps=4, dies_at=15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loader", "workers"),
    [
        ("batch sampler", "two"),
        ("sampler", "two"),
        ("sampler", "persistent"),
        ("batch sampler", "persistent"),
    ],
)
def test_t3_samplers_with_a_state_of_their_own_and_workers(loader: str, workers: str, tmp_path: Path) -> None:
    job = Job(data=lambda: WITH_STATE[loader](**WORKERS[workers]), validation_data=None)
    check(job, tmp_path, MOMENTS[2:4])


class NoState(Sampler[int]):
    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)  # not torch's: nothing knows to save it

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(jobs.ROWS).tolist())

    def __len__(self) -> int:
        return jobs.ROWS


INEXACT: dict[str, tuple[Callable[[], Any], str]] = {
    "sampler": (
        lambda: DataLoader(dataset(), 16, sampler=NoState()),
        "ordered by NoState, which has neither generator nor state_dict",
    ),
    "dataset in workers": (
        lambda: DataLoader(NoisyRows(), 16, num_workers=1),
        "has a NoisyRows with a state_dict, but each of the num_workers=1 has a copy",
    ),
}


@pytest.mark.parametrize(("kind", "save_freq"), [("sampler", "epoch"), ("sampler", 4), ("dataset in workers", 4)])
def test_t3_data_that_can_not_be_taken_up_exactly_is_said_once(kind: str, save_freq: Any, tmp_path: Path) -> None:
    data, message = INEXACT[kind]
    jobs.start(Job(data=data), tmp_path, jobs.make_saver(tmp_path, save_freq), epochs=2)
    with pytest.warns(UserWarning, match=message) as warned:
        jobs.start(Job(data=data), tmp_path, jobs.make_saver(tmp_path, save_freq), epochs=3, resume=True)
    assert sum("multi-threaded" not in str(one.message) for one in warned) == 1  # Python 3.12 says that of a fork
    assert warned[0].filename == jobs.__file__  # where fit was called


@pytest.mark.parametrize("loader", mostly_slow(LOADERS, "shuffled", "batch sampler"))
def test_t3_each_kind_of_loader_without_workers(loader: str, tmp_path: Path) -> None:
    check(Job(data=LOADERS[loader]), tmp_path)


WORKERS: dict[str, dict[str, Any]] = {
    "two": {"num_workers": 2},
    "three": {"num_workers": 3, "prefetch_factor": 1},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}
many_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


@many_workers
@pytest.mark.parametrize(
    ("loader", "workers"),
    [
        ("shuffled", "two"),
        pytest.param("shuffled", "persistent", marks=pytest.mark.slow),
        pytest.param("own generator", "two", marks=pytest.mark.slow),
        pytest.param("shuffled", "three", marks=pytest.mark.slow),
        pytest.param("own generator", "three", marks=pytest.mark.slow),
        pytest.param("own generator", "persistent", marks=pytest.mark.slow),
    ],
)
def test_t3_workers_whose_transforms_draw_random_numbers(loader: str, workers: str, tmp_path: Path) -> None:
    check(Job(data=lambda: LOADERS[loader](**WORKERS[workers]), validation_data=None), tmp_path, MOMENTS[::2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loader", "workers"),
    [
        *((loader, "two") for loader in sorted(LOADERS.keys() - {"shuffled", "own generator"})),
        *((loader, "persistent") for loader in ("custom batch sampler, own generator", "replacement", "drop last")),
    ],
)
def test_t3_each_kind_of_loader_with_workers(loader: str, workers: str, tmp_path: Path) -> None:
    job = Job(data=lambda: LOADERS[loader](**WORKERS[workers]), validation_data=None)
    check(job, tmp_path, MOMENTS[1:4:2])


@pytest.mark.slow
def test_t3_spawned_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    settings = {"num_workers": 1, "multiprocessing_context": "spawn"}
    job = Job(data=jobs.shuffled(*ALL, **settings), fit={"epochs": 2})
    check(job, tmp_path, [("batch", 9)], dies_at=10)


def seeded_init(worker: int) -> None:
    import random

    random.seed(worker)


@pytest.mark.slow
def test_t3_a_worker_init_fn_that_seeds_does_not_reset_the_streams(tmp_path: Path) -> None:
    job = Job(data=jobs.shuffled(*ALL, num_workers=2, worker_init_fn=seeded_init))
    check(job, tmp_path)


@pytest.mark.slow
def test_another_number_of_workers_is_warned_of_and_keeps_the_order_of_rows(tmp_path: Path) -> None:
    straight = jobs.start(Job(data=jobs.shuffled(*ALL, num_workers=2)), tmp_path)
    die(Job(data=jobs.shuffled(*ALL, num_workers=2)), tmp_path, jobs.make_saver(tmp_path, 5))
    job = Job(data=jobs.shuffled(*ALL, num_workers=1))
    result = resume(job, tmp_path, jobs.make_saver(tmp_path, 5), warns="num_workers=2, this one is with 1")
    assert [step[-1] for step in result.steps[:3]] == [step[-1] for step in straight.steps[15:18]]


class Stream(IterableDataset[Any]):
    """Rows in their order, from the beginning in each pass."""

    draws: tuple[str, ...] = ()

    def __init__(self, *draws: str) -> None:
        self.rows = dataset(*draws)

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self.rows)):
            yield self.rows[i]


class StatefulStream(Stream):
    """Rows that an own generator draws, pass after pass; tells where it stands."""

    def __init__(self, *draws: str) -> None:
        super().__init__(*draws)
        self.generator, self.given = own_generator(), 0

    def __iter__(self) -> Iterator[Any]:
        while self.given < jobs.ROWS:
            self.given += 1
            yield self.rows[int(torch.randint(jobs.ROWS, (), generator=self.generator))]
        self.given = 0

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.given = state["given"]


class Batches:
    """Batches that a generator yields, shuffled by torch's global seed when a pass begins; no length."""

    def __init__(self, *draws: str) -> None:
        self.rows = dataset(*draws)

    def __iter__(self) -> Iterator[Any]:
        for part in torch.randperm(96).split(16):
            pairs = [self.rows[int(i)] for i in part]
            yield torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def listed() -> list[Any]:
    return list(DataLoader(dataset(), 16))


def arrays() -> tuple[Any, Any]:
    return dataset().x.numpy(), dataset().y.numpy()


REREAD = "read again and thrown away"


def test_an_iterable_dataset_without_state_is_warned_of_and_the_same_where_it_gives_the_same_order(
    tmp_path: Path,
) -> None:
    check(Job(data=lambda: DataLoader(Stream(*ALL), 16), warns=REREAD), tmp_path)


def test_an_iterable_dataset_with_state_dict_goes_on_where_it_stood(tmp_path: Path) -> None:
    check(Job(data=lambda: DataLoader(StatefulStream(*ALL), 16)), tmp_path)


def test_an_iterable_given_as_a_generator_function_is_read_again_and_the_same(tmp_path: Path) -> None:
    check(Job(data=lambda: Batches(*ALL), warns=REREAD), tmp_path)


@pytest.mark.parametrize("data", [listed, arrays, dataset])
def test_lists_of_batches_arrays_and_datasets(data: Callable[[], Any], tmp_path: Path) -> None:
    check(Job(data=data, fit={} if data is listed else {"batch_size": 16}), tmp_path)


def test_arrays_with_validation_split_sample_and_class_weights(tmp_path: Path) -> None:
    fit = {
        "batch_size": 13,
        "validation_split": 0.2,
        "sample_weight": torch.arange(96.0) / 96,
        "class_weight": {1: 2.0},
    }
    check(Job(data=arrays, fit=fit, validation_data=None), tmp_path)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_of_ready_batches_with_batch_size_none(num_workers: int, tmp_path: Path) -> None:
    def data() -> DataLoader[Any]:
        return DataLoader(listed(), batch_size=None, shuffle=True, num_workers=num_workers)

    check(Job(data=data, warns=REREAD), tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:torchdata")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_torchdatas_stateful_loader_goes_on_where_it_stood(num_workers: int, tmp_path: Path) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def data() -> Any:
        return StatefulDataLoader(dataset(), batch_size=16, shuffle=True, num_workers=num_workers)

    check(Job(data=data), tmp_path)


STEPPED: dict[str, Callable[[], Any]] = {
    "loader": jobs.shuffled(*ALL),
    "own generator": LOADERS["own generator"],
    "list": listed,
    "stateful stream": lambda: DataLoader(StatefulStream(*ALL), 16),
}


STEPS = {
    4: [("epoch", 8), ("batch", 9), ("batch", 12), ("batch", 13), ("epoch", 12)],
    6: [("epoch", 12), ("batch", 12), ("batch", 13)],
    9: [("epoch", 9), ("batch", 12), ("batch", 13), ("batch", 25), ("epoch", 18)],
}


@pytest.mark.parametrize(
    ("data", "steps"),
    mostly_slow([(data, steps) for data in STEPPED for steps in STEPS], ("loader", 4), ("own generator", 9)),
)
def test_steps_per_epoch_shorter_and_longer_than_a_pass(data: str, steps: int, tmp_path: Path) -> None:
    job = Job(data=STEPPED[data], fit={"steps_per_epoch": steps})
    check(job, tmp_path, STEPS[steps], steps=steps, dies_at=STEPS[steps][-2][1] + 2)


@many_workers
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "steps"), [("two", 4), ("three", 9), ("persistent", 4), ("persistent", 9)])
def test_steps_per_epoch_with_workers(workers: str, steps: int, tmp_path: Path) -> None:
    job = Job(data=jobs.shuffled(*ALL, **WORKERS[workers]), fit={"steps_per_epoch": steps})
    check(job, tmp_path, STEPS[steps], steps=steps, dies_at=STEPS[steps][-2][1] + 2)


def test_a_one_shot_iterator_with_steps_per_epoch_is_read_again(tmp_path: Path) -> None:
    def data() -> Iterator[Any]:
        while True:
            yield from listed()

    check(Job(data=data, fit={"steps_per_epoch": 4}, warns=REREAD), tmp_path, STEPS[4], steps=4, dies_at=15)


VALIDATION: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "every 2 epochs": (jobs.held_out, {"validation_freq": 2}),
    "named epochs": (jobs.held_out, {"validation_freq": [1, 4]}),
    "shuffled by torch's seed": (lambda: DataLoader(dataset(*ALL), 16, shuffle=True), {"validation_steps": 2}),
    "own generator": (LOADERS["own generator"], {"validation_steps": 3}),
    "workers": (lambda: LOADERS["own generator"](num_workers=2), {}),
    "persistent workers": (lambda: LOADERS["shuffled"](num_workers=2, persistent_workers=True), {}),
}


@pytest.mark.parametrize("validation", mostly_slow(VALIDATION, "named epochs", "shuffled by torch's seed"))
def test_validation_that_draws_random_numbers_or_is_not_always_due(validation: str, tmp_path: Path) -> None:
    data, fit = VALIDATION[validation]
    check(Job(validation_data=data, fit=fit), tmp_path, BETWEEN)


def test_other_data_than_the_checkpoint_stands_in_is_refused(tmp_path: Path) -> None:
    die(Job(), tmp_path, jobs.make_saver(tmp_path, 5))
    with pytest.raises(ValueError, match=r"3 of 6 batches of an epoch, but .* now has 12"):
        resume(Job(data=jobs.shuffled(batch_size=8)), tmp_path, jobs.make_saver(tmp_path, 5))


# ---- T4: history, CSV ----


def test_t4_a_csv_log_has_each_epoch_once_to_the_byte(tmp_path: Path) -> None:
    job = Job(callbacks=lambda folder: [CSVLogger(folder / "log.csv")], fit={"validation_freq": 2})
    check(job, tmp_path)
    assert (tmp_path / "dead/log.csv").read_bytes() == (tmp_path / "straight/log.csv").read_bytes()


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize(
    ("save_freq", "dies_at", "older"),
    [
        ("epoch", 10, "an older log"),
        (5, 10, None),
        (5, 10, "an older log"),
        pytest.param(10, 14, None, marks=pytest.mark.slow),
    ],
)
def test_t4_a_csv_log_that_ran_ahead_of_the_checkpoint_has_each_epoch_once(
    save_freq: Any, dies_at: int, older: str | None, append: bool, tmp_path: Path
) -> None:
    """The checkpoint of 5 or 10 batches is older than the row of its epoch."""
    job = Job(callbacks=lambda folder: [CSVLogger(folder / "log.csv", append=append)])
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
        if older is not None:
            jobs.start(job, tmp_path / name, epochs=2)
    straight = jobs.start(job, tmp_path / "straight")
    die(job, tmp_path / "resumed", jobs.make_saver(tmp_path / "resumed", save_freq), dies_at)
    result = resume(job, tmp_path / "resumed", jobs.make_saver(tmp_path / "resumed", save_freq))
    assert result.history == straight.history
    with (tmp_path / "resumed/log.csv").open(newline="") as file:
        epochs = [row["epoch"] for row in csv.DictReader(file)]
    assert epochs == [*(["0", "1"] if older and append else []), "0", "1", "2", "3"]
    assert (tmp_path / "resumed/log.csv").read_bytes() == (tmp_path / "straight/log.csv").read_bytes()


# ---- T5: stateful callbacks ----


class Counting(Callback):
    """Stops, changes the loss's log and the learning rate, by counters that only state_dict() carries over."""

    def __init__(self) -> None:
        self.batches, self.seen = 0, [0.0]

    def on_train_begin(self, logs: Any = None) -> None:
        self.batches, self.seen = 0, [0.0]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        self.run.optimizer.param_groups[0]["lr"] *= 1 + 0.001 * self.batches

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(logs["loss"])
        logs["batches"], logs["mean"] = self.batches, sum(self.seen) / len(self.seen)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "seen": list(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches, self.seen = state_dict["batches"], list(state_dict["seen"])


NO_SCHEDULER: dict[str, Any] = {"lr_scheduler": None}
HARD: dict[str, Any] = {  # a rate at which val_loss goes up and down
    "lr_scheduler": None,
    "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.3),
}
CALLBACKS: dict[str, tuple[Callable[[], list[Callback]], dict[str, Any]]] = {
    "EarlyStopping": (lambda: [EarlyStopping(patience=2, min_delta=0.05)], {}),
    "EarlyStopping, best weights": (
        lambda: [EarlyStopping("val_loss", mode="max", patience=3, restore_best_weights=True)],
        {},
    ),
    "ReduceLROnPlateau": (lambda: [ReduceLROnPlateau(patience=1, cooldown=1, min_delta=0.2, factor=0.5)], NO_SCHEDULER),
    "ReduceLROnPlateau without cooldown": (lambda: [ReduceLROnPlateau(patience=1, factor=0.5)], HARD),
    "EMA": (lambda: [EMA(0.9)], {}),
    "EMA, weights kept": (lambda: [EMA(0.9, keep_average=False)], {}),
    "EMA, best weights": (lambda: [EMA(0.9), EarlyStopping(patience=2, restore_best_weights=True)], HARD),
    "SWA": (lambda: [SWA(1)], {}),
    "SWA, weights kept": (lambda: [SWA(0, keep_average=False)], {}),
    "SWA later": (lambda: [SWA(2)], {}),
    "user callback": (lambda: [Counting()], NO_SCHEDULER),
    "two of a kind": (
        lambda: [EarlyStopping(patience=2), EarlyStopping("loss", patience=3, min_delta=0.25), Counting()],
        {},
    ),
}


def states(result: Any) -> list[Any]:
    return [callback.state_dict() for callback in result.callbacks if type(callback) in (EarlyStopping, Counting, EMA)]


@pytest.mark.parametrize("callbacks", mostly_slow(CALLBACKS, "EMA, best weights", "user callback"))
def test_t5_stateful_callbacks_decide_as_in_an_uninterrupted_run(callbacks: str, tmp_path: Path) -> None:
    make, compiled = CALLBACKS[callbacks]
    check(Job(callbacks=lambda folder: make(), compile=compiled), tmp_path, BETWEEN)


def test_t5_early_stopping_stops_in_the_same_epoch_and_restores_the_same_weights(tmp_path: Path) -> None:
    job = Job(
        callbacks=lambda folder: [EarlyStopping(patience=2, restore_best_weights=True)],
        fit={"epochs": 40},
        compile=HARD,
    )
    straight = jobs.start(job, tmp_path)
    stopped = straight.callbacks[1].stopped_epoch
    assert stopped is not None
    assert len(straight.steps) < 240
    for dies_at in (len(straight.steps), len(straight.steps) - 6, len(straight.steps) - 13):
        folder = tmp_path / str(dies_at)
        folder.mkdir()
        die(job, folder, jobs.make_saver(folder, "epoch"), dies_at)
        result = resume(job, folder, jobs.make_saver(folder, "epoch"))
        assert_same(result, straight, (dies_at - 1) // 6 * 6)
        assert result.callbacks[1].stopped_epoch == stopped
        assert result.callbacks[1].best == straight.callbacks[1].best


@pytest.mark.parametrize("hook", ["on_test_begin", "on_epoch_end", "on_train_end"])
@pytest.mark.parametrize("callback", mostly_slow(["EMA", "SWA", "EMA, best weights"], "EMA"))
def test_t5_averages_are_the_same_where_death_comes_after_the_last_batch(
    callback: str, hook: str, tmp_path: Path
) -> None:
    make, compiled = CALLBACKS[callback]
    job = Job(callbacks=lambda folder: make(), compile=compiled)
    straight = jobs.start(job, tmp_path)
    die(job, tmp_path, jobs.make_saver(tmp_path, 6), {"on_train_end": 1}.get(hook, 3), hook)
    result = resume(job, tmp_path, jobs.make_saver(tmp_path, 6))
    assert_same(result, straight, 24 if hook == "on_train_end" else 18)


class StopsInside(Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.run.batches_seen == 15:
            self.run.stop_training = True


@pytest.mark.parametrize(
    ("hook", "count", "average"),
    [("on_train_epoch_end", 3, None), ("on_test_begin", 3, SWA), ("on_epoch_end", 3, None), ("on_epoch_end", 3, SWA)],
)
def test_t5_a_run_stopped_inside_an_epoch_by_a_callback_ends_there_again(
    hook: str, count: int, average: Any, tmp_path: Path
) -> None:
    job = Job(callbacks=lambda folder: [StopsInside(), *([average(1)] if average else [])])
    straight = jobs.start(job, tmp_path)
    assert len(straight.steps) == 15
    die(job, tmp_path, jobs.make_saver(tmp_path, 5), count, hook)
    assert_same(resume(job, tmp_path, jobs.make_saver(tmp_path, 5)), straight, 15)


@pytest.mark.parametrize("resume_freq", mostly_slow(["epoch", 5, 1], 5))
@pytest.mark.parametrize("dies_at", [7, 13, 17, 23])
def test_t5_the_best_file_is_never_replaced_by_a_worse_one(dies_at: int, resume_freq: Any, tmp_path: Path) -> None:
    def best(folder: Path) -> Callback:
        return ModelCheckpoint(folder / "best.pt", "loss", mode="max", save_best_only=True)  # falls: epoch 0 is best

    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight = jobs.start(Job(), tmp_path / "straight", best(tmp_path / "straight"))
    folder = tmp_path / "resumed"
    die(Job(), folder, [jobs.make_saver(folder, resume_freq), best(folder)], dies_at)
    savers = [jobs.make_saver(folder, resume_freq), best(folder)]
    result = resume(Job(), folder, savers)
    assert result.history == straight.history
    assert savers[1].best == straight.callbacks[-1].best == max(straight.history["loss"])
    for name in ("best.pt",):
        ours, theirs = (torch.load(at / name, weights_only=True) for at in (folder, tmp_path / "straight"))
        assert ours["epoch"] == theirs["epoch"]
        assert same(ours["model_state_dict"], theirs["model_state_dict"])


@pytest.mark.parametrize(
    ("resume_freq", "weights_only"),
    [(5, False), *(pytest.param(n, True, marks=pytest.mark.slow) for n in ("epoch", 1))],
)
@pytest.mark.parametrize("dies_at", [7, 15, 24])
def test_t5_keep_best_keeps_the_files_that_an_uninterrupted_run_keeps(
    dies_at: int, resume_freq: Any, weights_only: bool, tmp_path: Path
) -> None:
    def best(folder: Path) -> Callback:
        return ModelCheckpoint(folder / "best-{epoch}-{val_loss:.4f}.pt", keep_best=2, save_weights_only=weights_only)

    job = Job(compile=HARD)
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight = jobs.start(job, tmp_path / "straight", best(tmp_path / "straight"))
    folder = tmp_path / "resumed"
    die(job, folder, [jobs.make_saver(folder, resume_freq), best(folder)], dies_at)
    result = resume(job, folder, [jobs.make_saver(folder, resume_freq), best(folder)])
    assert result.history == straight.history
    assert sorted(path.name for path in folder.glob("best*")) == sorted(
        path.name for path in (tmp_path / "straight").glob("best*")
    )


# ---- T6: schedulers ----

Make = Callable[[torch.optim.Optimizer], Any]


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    return schedulers.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))


SCHEDULERS: dict[str, tuple[Any, str]] = {
    "StepLR": (lambda o: schedulers.StepLR(o, 2, 0.5), "epoch"),
    "MultiStepLR": (lambda o: schedulers.MultiStepLR(o, [1, 3]), "epoch"),
    "ExponentialLR": (lambda o: schedulers.ExponentialLR(o, 0.9), "step"),
    "ConstantLR": (lambda o: schedulers.ConstantLR(o, total_iters=8), "step"),
    "LinearLR": (lambda o: schedulers.LinearLR(o, total_iters=20), "step"),
    "PolynomialLR": (lambda o: schedulers.PolynomialLR(o, 24), "step"),
    "MultiplicativeLR": (lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.95), "step"),
    "LambdaLR warm-up": (warm_up, "step"),
    "OneCycleLR": (lambda o: schedulers.OneCycleLR(o, 0.05, total_steps=24), "step"),
    "'one_cycle'": ("one_cycle", "step"),
    "'one_cycle' by epoch": ("one_cycle", "epoch"),
    "'cosine'": ("cosine", "epoch"),
    "'cosine' by step": ("cosine", "step"),
    "'reduce_on_plateau'": ("reduce_on_plateau", "epoch"),
    "ReduceLROnPlateau": (lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.3, cooldown=1), "epoch"),
    "CosineAnnealingWarmRestarts": (lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5, 2), "step"),
    "SequentialLR": (
        lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, total_iters=8), schedulers.CosineAnnealingLR(o, 16)], [8]
        ),
        "step",
    ),
    "CyclicLR": (lambda o: schedulers.CyclicLR(o, 1e-3, 1e-2, step_size_up=7), "step"),
    "CyclicLR scale_fn": (
        lambda o: schedulers.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, scale_fn=lambda x: 0.9**x),
        "step",
    ),
    "ChainedScheduler": (
        lambda o: schedulers.ChainedScheduler([schedulers.StepLR(o, 7), schedulers.ExponentialLR(o, 0.97)]),
        "step",
    ),
    "SWALR": (lambda o: torch.optim.swa_utils.SWALR(o, 0.001, anneal_epochs=3), "epoch"),
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("scheduler", mostly_slow(SCHEDULERS, "'one_cycle'", "ReduceLROnPlateau"))
def test_t6_the_learning_rate_of_every_step_is_that_of_an_uninterrupted_run(scheduler: str, tmp_path: Path) -> None:
    made, interval = SCHEDULERS[scheduler]
    compiled = {"lr_scheduler": made, "lr_scheduler_interval": interval, "optimizer": sgd}
    check(Job(compile=compiled), tmp_path, BETWEEN)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", sorted(set(kt.optimizers.OPTIMIZERS) - {"lbfgs", "sparse_adam"}))
def test_every_optimizer_known_by_name(optimizer: str, tmp_path: Path) -> None:
    check(Job(compile={"optimizer": optimizer}), tmp_path, BETWEEN[2:])


def test_param_groups_keep_their_own_rates(tmp_path: Path) -> None:
    compiled = {
        "optimizer": torch.optim.AdamW,
        "param_groups": {"*.bias": {"weight_decay": 0.0, "lr": 0.1}, "4.*": {"lr": 0.02}},
    }
    check(Job(compile=compiled), tmp_path, BETWEEN)


# ---- T7: accumulation ----


# Windows of an epoch of 6 batches are 4 and 2: optimizer steps come after batches 4, 6, 10, 12, 16, 18, 22, 24.
WINDOWS = (("epoch", 12), ("batch", 10), ("batch", 12), ("batch", 16), ("batch", 18))


@pytest.mark.parametrize(
    ("save_freq", "dies_at", "begins_at"), [(1, 5, 4), (2, 6, 4), (3, 17, 16), (5, 7, 6), (5, 12, 6)]
)
def test_t7_a_save_due_inside_an_accumulation_window_waits_for_its_end(
    save_freq: int, dies_at: int, begins_at: int, tmp_path: Path
) -> None:
    job = Job(data=jobs.shuffled(*ALL), compile={"gradient_accumulation_steps": 4})
    straight = jobs.start(job, tmp_path)
    die(job, tmp_path, jobs.make_saver(tmp_path, save_freq), dies_at)
    assert_same(resume(job, tmp_path, jobs.make_saver(tmp_path, save_freq)), straight, begins_at)


@pytest.mark.parametrize("data", [listed, LOADERS["own generator"]], ids=["list", "own generator"])
def test_t7_files_written_between_accumulation_windows(data: Any, tmp_path: Path) -> None:
    check(Job(data=data, compile={"gradient_accumulation_steps": 4}), tmp_path, WINDOWS)


UNKNOWN_LENGTH: dict[str, tuple[Callable[[], Any], str | None]] = {
    "stream": (lambda: DataLoader(Stream(), 16), REREAD),
    "stateful stream": (lambda: DataLoader(StatefulStream(), 16), None),
    "generator function": (lambda: Batches(), REREAD),
}


@pytest.mark.parametrize("data", mostly_slow(UNKNOWN_LENGTH, "stateful stream", "generator function"))
def test_t7_accumulation_over_data_of_unknown_length_which_is_read_one_batch_ahead(data: str, tmp_path: Path) -> None:
    make, warns = UNKNOWN_LENGTH[data]
    job = Job(data=make, compile={"gradient_accumulation_steps": 4}, warns=warns)
    check(job, tmp_path, WINDOWS)


@pytest.mark.slow
def test_t7_accumulation_with_workers_clipping_ema_and_a_scheduler_by_step(tmp_path: Path) -> None:
    job = Job(
        data=jobs.shuffled(*ALL, num_workers=2, batch_size=15),
        compile={
            "gradient_accumulation_steps": 4,
            "clip_grad_norm": 0.5,
            "lr_scheduler": warm_up,
            "lr_scheduler_interval": "step",
        },
        callbacks=lambda folder: [EMA(0.9)],
    )
    check(job, tmp_path, [("batch", 11), ("batch", 18)], steps=7, dies_at=20)


# ---- T8 and what else a run consists of ----


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_t8_mixed_precision_and_the_loss_scaler_on_a_cpu(precision: str, tmp_path: Path) -> None:
    check(Job(compile={"mixed_precision": precision}), tmp_path, BETWEEN)


classification = torchmetrics.classification
METRICS: dict[str, Callable[[], Any]] = {
    "names": lambda: ["accuracy", "f1", "top_5_accuracy"][:2],
    "objects": lambda: {"mean": classification.MulticlassAccuracy(3), "kappa": classification.MulticlassCohenKappa(3)},
    "list states": lambda: [classification.MulticlassAUROC(3), classification.MulticlassAveragePrecision(3)],
    "binned": lambda: classification.MulticlassAUROC(3, thresholds=10),
    "collection": lambda: torchmetrics.MetricCollection(
        [
            classification.MulticlassPrecision(3),
            classification.MulticlassRecall(3),
            classification.MulticlassAUROC(3),
        ]
    ),
    "wrapped": lambda: torchmetrics.ClasswiseWrapper(classification.MulticlassAccuracy(3, average=None)),
    "function": lambda: lambda outputs, y: (outputs.argmax(1) == y).float(),
}


@pytest.mark.parametrize("metrics", mostly_slow(METRICS, "function"))
def test_metrics_of_the_epoch_that_was_cut_are_those_of_a_whole_one(metrics: str, tmp_path: Path) -> None:
    check(Job(compile={"metrics": METRICS[metrics]()}), tmp_path, BETWEEN)


def test_weighted_metrics(tmp_path: Path) -> None:
    job = Job(
        data=arrays,
        fit={"batch_size": 16, "sample_weight": torch.arange(96.0) / 50},
        compile={"weighted_metrics": ["accuracy"], "metrics": []},
    )
    check(job, tmp_path, BETWEEN)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = nn.Linear(8, 16), nn.Dropout(0.3)
        self.kind, self.size = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.drop(self.body(x).relu())
        return {"kind": self.kind(hidden), "size": self.size(hidden)}


def two_targets() -> Any:
    rows = dataset()
    targets = [{"kind": y, "size": x[1:2]} for x, y in zip(rows.x, rows.y, strict=True)]
    return DataLoader(list(zip(rows.x, targets, strict=True)), 16, shuffle=True)


def test_several_outputs_with_losses_and_metrics_of_their_own(tmp_path: Path) -> None:
    job = Job(
        data=two_targets,
        validation_data=two_targets,
        net=TwoHeads,
        compile={
            "loss": {"kind": "cross_entropy", "size": "mse"},
            "loss_weights": {"size": 0.3},
            "metrics": {"kind": ["accuracy"], "size": ["mae"]},
        },
    )
    check(job, tmp_path, BETWEEN)


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(outputs / self.temperature, y) + self.calls * 1e-4


def test_a_loss_module_with_parameters_and_buffers(tmp_path: Path) -> None:
    def make_compile() -> dict[str, Any]:
        return {"loss": Tempered, "metrics": None}

    check(Job(compile=make_compile()), tmp_path, BETWEEN)


@pytest.mark.parametrize(("saver", "save_freq"), [("ModelCheckpoint", 5), ("BackupAndRestore", "epoch")])
def test_files_written_in_a_thread_hold_the_step_that_they_were_asked_at(
    saver: str, save_freq: Any, tmp_path: Path
) -> None:
    job = Job(
        callbacks=lambda folder: [EMA(0.9), CSVLogger(folder / "log.csv")],
        compile={"metrics": [classification.MulticlassAUROC(3)]},
    )
    straight = jobs.start(job, tmp_path)
    die(job, tmp_path, jobs.make_saver(tmp_path, save_freq, saver, async_save=True))
    result = resume(job, tmp_path, jobs.make_saver(tmp_path, save_freq, saver, async_save=True))
    assert_same(result, straight, 12 if save_freq == "epoch" else 15)


# ---- T9, T10, and what there is to resume from ----


@pytest.mark.parametrize(
    "callbacks", [[], *mostly_slow(["EMA", "SWA", "EarlyStopping, best weights", "ReduceLROnPlateau"], "EMA")]
)
@pytest.mark.parametrize("save_freq", mostly_slow(["epoch", 6], "epoch"))
def test_t9_a_finished_run_started_again_trains_no_step(callbacks: Any, save_freq: Any, tmp_path: Path) -> None:
    make, compiled = CALLBACKS[callbacks] if callbacks else (list, {})
    job = Job(callbacks=lambda folder: make(), compile=compiled)
    straight = jobs.start(job, tmp_path, jobs.make_saver(tmp_path, save_freq))
    before = sorted(path.name for path in tmp_path.iterdir())
    for _ in range(2):
        result = resume(job, tmp_path, jobs.make_saver(tmp_path, save_freq))
        assert_same(result, straight, 24 if len(straight.steps) == 24 else len(straight.steps))
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_t9_with_backup_and_restore_that_keeps_its_backup_a_finished_run_trains_no_step(tmp_path: Path) -> None:
    straight = jobs.start(Job(), tmp_path, BackupAndRestore(tmp_path, delete_checkpoint=False))
    assert_same(jobs.start(Job(), tmp_path, BackupAndRestore(tmp_path, delete_checkpoint=False)), straight, 24)


@pytest.mark.parametrize(
    ("scheduler", "save_freq"),
    [("StepLR", "epoch"), ("StepLR", 6), ("LambdaLR warm-up", 6), ("ReduceLROnPlateau", "epoch")],
)
def test_t10_epochs_raised_from_4_to_6_train_2_more(scheduler: str, save_freq: Any, tmp_path: Path) -> None:
    made, interval = SCHEDULERS[scheduler]
    job = Job(compile={"lr_scheduler": made, "lr_scheduler_interval": interval})
    straight = jobs.start(job, tmp_path, epochs=6)
    jobs.start(job, tmp_path, jobs.make_saver(tmp_path, save_freq))
    assert_same(resume(job, tmp_path, jobs.make_saver(tmp_path, save_freq), epochs=6), straight, 24)


def test_t10_epochs_raised_inside_an_epoch(tmp_path: Path) -> None:
    straight = jobs.start(Job(), tmp_path, epochs=6)
    die(Job(), tmp_path, jobs.make_saver(tmp_path, 5))
    assert_same(resume(Job(), tmp_path, jobs.make_saver(tmp_path, 5), epochs=6), straight, 15)


@pytest.mark.parametrize(("save_freq", "dies_at"), [("epoch", 24), (5, 17)])
def test_t10_epochs_lowered_to_2_is_refused_and_nothing_is_trained_or_deleted(
    save_freq: Any, dies_at: int, tmp_path: Path
) -> None:
    die(Job(), tmp_path, jobs.make_saver(tmp_path, save_freq), dies_at)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    jobs.seed_all(3)
    model = jobs.make_model(Job())
    weights = {name: part.clone() for name, part in model.net.state_dict().items()}
    with pytest.raises(ValueError, match=r"has come to epoch 3, beyond epochs=2.*nothing is trained or changed"):
        resume(Job(), tmp_path, jobs.make_saver(tmp_path, save_freq), epochs=2, model=model)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == before
    assert same(dict(model.net.state_dict()), weights)
    assert not model._compiled.optimizer.state


@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
def test_t10_a_schedule_that_spans_the_fit_is_not_stretched(name: str, tmp_path: Path) -> None:
    job = Job(compile={"lr_scheduler": name, "optimizer": sgd})
    die(job, tmp_path, jobs.make_saver(tmp_path, "epoch"))
    with pytest.raises(ValueError, match=r"spans the 4 epochs .* can't be stretched to epochs=6"):
        resume(job, tmp_path, jobs.make_saver(tmp_path, "epoch"), epochs=6)


def test_with_nothing_to_resume_from_a_run_trains_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = live_plain()
    result = jobs.start(Job(), tmp_path, jobs.make_saver(tmp_path, "epoch"), resume=True, verbose=2)
    assert "No checkpoint yet: training begins at the beginning." in "".join(capsys.readouterr())
    assert_same(result, straight, 0)


@pytest.mark.parametrize("savers", [[], "weights"])
def test_resume_true_without_a_callback_that_writes_resume_points_is_refused(savers: Any, tmp_path: Path) -> None:
    savers = [ModelCheckpoint(tmp_path / "weights.pt", save_weights_only=True)] if savers else []
    with pytest.raises(ValueError, match="needs a checkpointing callback"):
        jobs.start(Job(), tmp_path, savers, resume=True)


def test_a_file_to_resume_from_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        jobs.start(Job(), tmp_path, resume=tmp_path / "none.pt")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_goes_on_from_the_file_given_with_no_checkpointing_callback(kind: type, tmp_path: Path) -> None:
    straight = live_plain()
    die(Job(), tmp_path, jobs.make_saver(tmp_path, 5, keep_last=None))
    for name, begins_at in (("run-01-05.pt", 5), ("run-02-04.pt", 10), ("run-03-03.pt", 15)):
        result = jobs.start(Job(), tmp_path, resume=kind(tmp_path / name), seed=3)
        assert_same(result, straight, begins_at)


class Interrupts(Callback):
    """Sends Ctrl-C when a hook comes for the count-th time."""

    def __init__(self, hook: str, count: int) -> None:
        self.count = count
        setattr(self, hook, self._called)

    def _called(self, *arguments: Any) -> None:
        import os
        import signal

        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("saver", "save_freq"), [("ModelCheckpoint", 5), pytest.param("BackupAndRestore", "epoch", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("hook", "count", "begins_at"),
    mostly_slow(
        [
            ("on_train_batch_begin", 1, 1),
            ("on_train_batch_end", 15, 15),
            ("on_train_batch_begin", 17, 17),
            ("on_train_batch_end", 18, 18),
            ("on_test_batch_end", 5, 12),
            ("on_test_end", 2, 12),
            ("on_epoch_end", 3, 18),
            ("on_epoch_begin", 3, 13),
            ("on_test_batch_end", 12, 24),
        ],
        *(("on_train_batch_end", 15, 15), ("on_test_batch_end", 5, 12), ("on_epoch_end", 3, 18)),
    ),
)
def test_a_run_goes_on_from_where_it_was_interrupted(
    hook: str, count: int, begins_at: int, save_freq: Any, saver: str, tmp_path: Path
) -> None:
    job = Job(data=jobs.shuffled(*ALL), callbacks=lambda folder: [CSVLogger(folder / "log.csv")])
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight = jobs.start(job, tmp_path / "straight")
    folder = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        jobs.start(
            job, folder, jobs.make_saver(folder, save_freq, saver), dies=Interrupts(hook, count), on_interrupt="raise"
        )
    result = resume(job, folder, jobs.make_saver(folder, save_freq, saver))
    assert_same(result, straight, begins_at)
    assert (folder / "log.csv").read_bytes() == (tmp_path / "straight/log.csv").read_bytes()


@pytest.mark.parametrize(
    ("callbacks", "hook", "count", "begins_at"),
    [
        *((callbacks, "on_train_batch_end", 15, 15) for callbacks in ("SWA", "user callback")),
        *((callbacks, "on_test_batch_end", 8, 18) for callbacks in ("EMA", "EarlyStopping, best weights")),
    ],
)
def test_stateful_callbacks_of_a_run_that_was_interrupted(
    callbacks: str, hook: str, count: int, begins_at: int, tmp_path: Path
) -> None:
    make, compiled = CALLBACKS[callbacks]
    job = Job(callbacks=lambda folder: make(), compile=compiled)
    straight = jobs.start(job, tmp_path)
    history = jobs.start(
        job, tmp_path, jobs.make_saver(tmp_path, "epoch"), dies=Interrupts(hook, count), on_interrupt="return"
    ).history
    assert len(history["loss"]) == 2
    assert_same(resume(job, tmp_path, jobs.make_saver(tmp_path, "epoch")), straight, begins_at)


@pytest.mark.parametrize("metrics", mostly_slow(METRICS, "function"))
def test_metrics_of_a_run_that_was_interrupted_in_its_validation(metrics: str, tmp_path: Path) -> None:
    job = Job(compile={"metrics": METRICS[metrics]()})
    straight = jobs.start(job, tmp_path)
    jobs.start(
        job, tmp_path, jobs.make_saver(tmp_path, 5), dies=Interrupts("on_test_batch_end", 8), on_interrupt="return"
    )
    assert_same(resume(job, tmp_path, jobs.make_saver(tmp_path, 5)), straight, 18)
