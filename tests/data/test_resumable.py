"""A pass that is taken up in its middle: the same batches, the same random states, no seen sample loaded again."""

import multiprocessing
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from kerastorch.data import BatchSource
from kerastorch.data.resumable import ResumableSampler, WorkerBatch, can_be_resumed, decode, resumable_loader
from kerastorch.device import get_random_state, set_random_state

ROWS = 41


class Rows(Dataset[Any]):
    """Row i is i and a draw from each of the three generators that a transform may use."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Tensor:
        noise = [torch.rand(()).item(), float(np.random.rand()), random.random()]
        return torch.tensor([float(index), *noise], dtype=torch.float64)


class Counted(Dataset[Any]):
    """Counts, across processes, how often a row was asked for."""

    def __init__(self) -> None:
        self.count = multiprocessing.Value("i", 0)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Tensor:
        with self.count.get_lock():
            self.count.value += 1
        return torch.tensor(float(index))


class Buckets:
    """A batch sampler that draws when a pass begins."""

    def __iter__(self) -> Iterator[list[int]]:
        for start in torch.randperm(10).tolist():
            yield list(range(4 * start, 4 * start + 4))

    def __len__(self) -> int:
        return 10


class EagerBuckets(Buckets):
    """The same, drawn by __iter__ itself, before the first list is asked for."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(4 * start, 4 * start + 4)) for start in torch.randperm(10).tolist()])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


WEIGHTS = torch.arange(1.0, ROWS + 1)
LOADERS: dict[str, Callable[[], dict[str, Any]]] = {
    "sequential": lambda: {"batch_size": 4},
    "shuffled": lambda: {"batch_size": 4, "shuffle": True},
    "drop_last": lambda: {"batch_size": 4, "shuffle": True, "drop_last": True},
    "replacement": lambda: {"batch_size": 4, "sampler": RandomSampler(range(ROWS), replacement=True)},
    "more samples than rows": lambda: {"batch_size": 4, "sampler": RandomSampler(range(ROWS), num_samples=90)},
    "weighted": lambda: {"batch_size": 4, "sampler": WeightedRandomSampler(WEIGHTS.tolist(), ROWS)},
    "subset": lambda: {"batch_size": 4, "sampler": SubsetRandomSampler(range(0, ROWS, 1))},
    "loader's generator": lambda: {"batch_size": 4, "shuffle": True, "generator": generator()},
    "sampler's generator": lambda: {"batch_size": 4, "sampler": SubsetRandomSampler(range(ROWS), generator())},
    "weighted, generator": lambda: {
        "batch_size": 4,
        "sampler": WeightedRandomSampler(WEIGHTS.tolist(), ROWS, generator=generator()),
    },
    "replacement, generator": lambda: {
        "batch_size": 4,
        "sampler": RandomSampler(range(ROWS), replacement=True, num_samples=150, generator=generator()),
    },
    "more samples than rows, generator": lambda: {
        "batch_size": 4,
        "sampler": RandomSampler(range(ROWS), num_samples=90, generator=generator()),
    },
    "batch sampler": lambda: {"batch_sampler": BatchSampler(SequentialSampler(range(ROWS)), 4, True)},
    "own batch sampler": lambda: {"batch_sampler": Buckets()},
    "one batch": lambda: {"batch_size": 50, "shuffle": True},
}
WORKERS = [0, pytest.param(2, id="2 workers")]
OFTEN = ("shuffled", "replacement, generator")  # the others with workers: in the slow part
KINDS = [(kind, 0) for kind in LOADERS] + [
    pytest.param(kind, 2, marks=() if kind in OFTEN else pytest.mark.slow) for kind in LOADERS
]


def make_loader(kind: str, workers: int = 0, dataset: Any = None, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(dataset or Rows(), num_workers=workers, **{**LOADERS[kind](), **arguments})


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def step() -> None:
    """What a training step draws between two batches."""
    torch.rand(3)
    np.random.rand()
    random.random()


def x_of(batch: Any) -> Tensor:
    (x, _, _), _ = batch
    return x


def read(source: BatchSource, steps: int | None = None, done: int = 0, limit: int | None = None) -> list[Tensor]:
    """Return the batches of an epoch, or its first `limit` ones, with a training step's draws after each."""
    batches: list[Tensor] = []
    for batch in source.epoch(steps, done=done):
        batches.append(x_of(batch))
        step()
        if len(batches) == limit:
            break
    return batches


def source_of(loader: Any) -> BatchSource:
    return BatchSource(loader, name="the data")


def same(batches: list[Tensor], others: list[Tensor]) -> bool:
    return len(batches) == len(others) and all(torch.equal(*pair) for pair in zip(batches, others, strict=True))


def assert_same_state(state: Any, other: Any) -> None:
    assert state["python"] == other["python"]
    assert torch.equal(state["torch"], other["torch"])
    assert torch.equal(state["numpy"][0], other["numpy"][0])
    assert state["numpy"][1:] == other["numpy"][1:]
    for generator_state, other_state in zip(state["generators"], other["generators"], strict=True):
        assert torch.equal(generator_state, other_state)


def save_inside(source: BatchSource, after: int, steps: int | None = None, epochs: int = 0) -> tuple[Any, Any]:
    """Read `epochs` whole epochs and `after` batches; return the position and the random states there."""
    source.keep_position()
    for _ in range(epochs):
        read(source, steps)
    for count, _ in enumerate(source.epoch(steps), 1):
        step()
        if count == after:
            return source.state_dict(), get_random_state()
    raise AssertionError("the epoch was too short")


# ---- a loader that keeps its position is the loader that it was made of ----


@pytest.mark.parametrize(("kind", "workers"), KINDS)
def test_a_resumable_loader_gives_the_same_batches_and_leaves_the_same_random_states(kind: str, workers: int) -> None:
    results = []
    for wraps in (False, True):
        seed()
        loader = make_loader(kind, workers)
        given = resumable_loader(loader) if wraps else loader
        assert len(given) == len(loader)
        batches = []
        for _ in range(2):
            for batch in given:
                batches.append(batch.batch if isinstance(batch, WorkerBatch) else batch)
                step()
        results.append((batches, get_random_state(*source_of(loader).generators)))
    assert same(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("workers", "steps", "persists"), [(0, None, False), (0, 4, False), (2, None, False), (2, 4, True)]
)
def test_keeping_the_position_changes_neither_batches_nor_random_states(
    workers: int, steps: int | None, persists: bool
) -> None:
    results = []
    for keeps in (False, True):
        seed()
        source = source_of(make_loader("shuffled", workers, persistent_workers=persists))
        if keeps:
            source.keep_position()
        results.append(([read(source, steps) for _ in range(3)], get_random_state()))
        source.release()
    for batches, others in zip(results[0][0], results[1][0], strict=True):
        assert same(batches, others)
    assert_same_state(results[0][1], results[1][1])


def test_settings_of_the_loader_are_kept() -> None:
    inits: list[int] = []
    loader = DataLoader(
        Rows(), 4, num_workers=1, collate_fn=torch.stack, worker_init_fn=inits.append, prefetch_factor=3, timeout=20
    )
    made = resumable_loader(loader)
    assert (made.num_workers, made.prefetch_factor, made.timeout) == (1, 3, 20)
    assert made.worker_init_fn.init == inits.append
    assert made.collate_fn.collate is torch.stack
    assert made.dataset is loader.dataset
    assert loader.collate_fn is torch.stack  # which stays as it was


class OwnLoader(DataLoader[Any]):
    pass


def test_only_plain_loaders_of_batches_over_map_style_datasets_can_be_resumed() -> None:
    assert can_be_resumed(DataLoader(Rows(), 4))
    assert not can_be_resumed(OwnLoader(Rows(), 4))
    assert not can_be_resumed(DataLoader(Rows(), batch_size=None))
    assert not can_be_resumed(DataLoader(Stream()))
    assert not can_be_resumed([1, 2])


# ---- going on inside a pass ----


PLACES = [(0, 2), (0, 7), (1, 3)]  # epochs behind it, batches done


def assert_goes_on(make: Callable[[], DataLoader[Any]], after: int, epochs: int = 0) -> None:
    """A pass saved inside, in a run that has `epochs` behind it, goes on, and so does the next one, to the bit."""
    seed()
    whole = source_of(make())
    expected = [read(whole) for _ in range(epochs + 2)][epochs:]
    expected_state = get_random_state(*whole.generators)
    seed()
    state, random_state = save_inside(source_of(make()), after, epochs=epochs)
    torch.manual_seed(77)  # another process
    resumed = source_of(make())
    set_random_state(random_state)
    resumed.load_state_dict(state)
    assert same(read(resumed, done=after), expected[0][after:])
    assert same(read(resumed), expected[1])
    assert_same_state(get_random_state(*resumed.generators), expected_state)


@pytest.mark.parametrize(
    ("kind", "workers", "epochs", "after"),
    [
        *((kind, 0, epochs, after) for kind in LOADERS if kind != "one batch" for epochs, after in PLACES),
        ("shuffled", 2, 0, 7),
        ("replacement, generator", 2, 1, 3),
        *(
            pytest.param(kind, 2, 0, 7, marks=pytest.mark.slow)
            for kind in LOADERS
            if kind not in ("shuffled", "one batch")
        ),
    ],
)
def test_the_rest_of_a_pass_and_the_next_one_are_those_of_the_uninterrupted_run(
    kind: str, workers: int, epochs: int, after: int
) -> None:
    assert_goes_on(lambda: make_loader(kind, workers), after, epochs)


@pytest.mark.parametrize("epochs", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_worker_that_has_not_given_a_batch_in_this_pass_is_not_set_to_its_state_in_the_last_one(epochs: int) -> None:
    assert_goes_on(lambda: make_loader("shuffled", 2), 1, epochs)


STEPS = [(3, 1, 0), (8, 5, 1), (25, 23, 0)]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_batch_sampler_that_draws_in_iter_itself_gives_the_same_rest(workers: int) -> None:
    assert_goes_on(lambda: DataLoader(Rows(), batch_sampler=EagerBuckets(), num_workers=workers), 3)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_batch_sampler_that_draws_in_iter_itself_gives_the_same_batches_when_the_position_is_kept(
    workers: int,
) -> None:
    results = []
    for keeps in (False, True):
        seed()
        source = source_of(DataLoader(Rows(), batch_sampler=EagerBuckets(), num_workers=workers))
        if keeps:
            source.keep_position()
        results.append(read(source))
    assert same(*results)


@pytest.mark.parametrize(
    ("workers", "persists", "steps", "after", "epochs"),
    [
        *((0, False, *place) for place in STEPS),
        (2, False, *STEPS[2]),
        (2, True, *STEPS[1]),
        *(pytest.param(2, False, *place, marks=pytest.mark.slow) for place in STEPS[:2]),
        *(pytest.param(2, True, *place, marks=pytest.mark.slow) for place in STEPS[::2]),
    ],
)
def test_steps_that_carry_on_between_epochs_go_on_where_they_stood(
    workers: int, persists: bool, steps: int, after: int, epochs: int
) -> None:
    arguments = {"persistent_workers": persists}
    seed()
    whole = source_of(make_loader("shuffled", workers, **arguments))
    expected = [read(whole, steps) for _ in range(epochs + 2)]
    whole.release()
    seed()
    saved = source_of(make_loader("shuffled", workers, **arguments))
    state, random_state = save_inside(saved, after, steps, epochs)
    saved.release()
    resumed = source_of(make_loader("shuffled", workers, **arguments))
    set_random_state(random_state)
    resumed.load_state_dict(state)
    assert same(read(resumed, steps, done=after), expected[epochs][after:])
    assert same(read(resumed, steps), expected[epochs + 1])
    resumed.release()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_run_resumed_twice_inside_one_pass_is_still_the_same(workers: int) -> None:
    seed()
    expected = read(source_of(make_loader("shuffled", workers)))
    seed()
    state, random_state = save_inside(source_of(make_loader("shuffled", workers)), 3)
    second = source_of(make_loader("shuffled", workers))
    set_random_state(random_state)
    second.load_state_dict(state)
    second.keep_position()
    for count, _ in enumerate(second.epoch(done=3)):
        step()
        if count == 1:
            state, random_state = second.state_dict(), get_random_state()
            break
    third = source_of(make_loader("shuffled", workers))
    set_random_state(random_state)
    third.load_state_dict(state)
    assert same(read(third, done=5), expected[5:])


@pytest.mark.parametrize("workers", WORKERS)
def test_no_seen_sample_is_loaded_again(workers: int) -> None:
    state, _ = save_inside(source_of(make_loader("shuffled", workers, Counted())), 7)
    rows = Counted()
    resumed = source_of(make_loader("shuffled", workers, rows))
    resumed.load_state_dict(state)
    assert len(read(resumed, done=7)) == 4
    assert rows.count.value == ROWS - 7 * 4


@pytest.mark.parametrize("after", [1, 3])
def test_a_dataset_that_loads_lists_of_rows_is_taken_up_too(after: int) -> None:
    class Lists(Rows):
        def __getitems__(self, indices: list[int]) -> list[Tensor]:
            return list(torch.arange(float(ROWS))[torch.tensor(indices)])

    state, _ = save_inside(source_of(DataLoader(Lists(), 4, num_workers=2)), after)
    resumed = source_of(DataLoader(Lists(), 4, num_workers=2))
    resumed.load_state_dict(state)
    assert torch.equal(torch.cat(read(resumed, done=after)), torch.arange(4.0 * after, ROWS))


def test_a_position_passes_through_a_file(tmp_path: Any) -> None:
    state, _ = save_inside(source_of(make_loader("loader's generator", 2)), 3)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = source_of(make_loader("loader's generator", 2))
    resumed.load_state_dict(loaded)
    assert len(read(resumed, done=3)) == 8


def test_a_lazily_drawing_sampler_is_warned_of() -> None:
    class Lazy(Dataset[Any]):
        def __iter__(self) -> Iterator[int]:
            for _ in range(ROWS):
                yield int(torch.randint(ROWS, ()))

        def __len__(self) -> int:
            return ROWS

    state, _ = save_inside(source_of(DataLoader(Rows(), 4, sampler=Lazy())), 3)
    resumed = source_of(DataLoader(Rows(), 4, sampler=Lazy()))
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match="Lazy draws from torch's global generator as it goes"):
        read(resumed, done=3)


@pytest.mark.parametrize(("saved", "now"), [(0, 2), (2, 0), (2, 1)])
def test_another_number_of_workers_is_warned_of_and_gives_the_same_rows(saved: int, now: int) -> None:
    seed()
    expected = read(source_of(make_loader("shuffled", saved)))
    seed()
    state, random_state = save_inside(source_of(make_loader("shuffled", saved)), 3)
    resumed = source_of(make_loader("shuffled", now))
    set_random_state(random_state)
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match=f"num_workers={saved}, this one is with {now}"):
        batches = read(resumed, done=3)
    assert same([batch[:, 0] for batch in batches], [batch[:, 0] for batch in expected[3:]])


def test_workers_that_give_batches_out_of_order_are_warned_of() -> None:
    state, _ = save_inside(source_of(make_loader("shuffled", 2)), 3)
    resumed = source_of(make_loader("shuffled", 2, in_order=False))
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match="in_order=False"):
        assert len(read(resumed, done=3)) == 8


def test_data_of_another_length_is_refused_inside_a_pass_and_welcome_between_two() -> None:
    source = source_of(make_loader("shuffled"))
    state, _ = save_inside(source, 3)
    other = source_of(DataLoader(Rows(), 5))
    assert "after 3 of 11 batches of an epoch, but the data now has 9" in str(other.find_misfit(state))
    read(source)
    assert other.find_misfit(source.state_dict()) is None
    other.load_state_dict(source.state_dict())
    assert len(read(other)) == 9


def test_fewer_batches_than_were_seen_are_refused_where_the_length_is_not_known() -> None:
    state, _ = save_inside(source_of(Numbers(9)), 7)
    short = source_of(Numbers(5))
    short.load_state_dict(state)
    with pytest.warns(UserWarning, match="read again"), pytest.raises(ValueError, match=r"after 7 batches.*only 5"):
        read(short, done=7)


# ---- counting ----


@pytest.mark.parametrize("workers", WORKERS)
def test_position_counts_the_batches_taken_in_a_pass_and_is_0_between_passes(workers: int) -> None:
    source = source_of(make_loader("shuffled", workers))
    source.keep_position()
    counts = [source.state_dict()["batches"] for _ in source.epoch()]
    assert counts == list(range(1, 12))
    assert source.state_dict()["batches"] == 0


@pytest.mark.parametrize("workers", WORKERS)
def test_position_counts_within_the_pass_where_steps_carry_on(workers: int) -> None:
    source = source_of(make_loader("shuffled", workers))
    source.keep_position()
    counts = [[source.state_dict()["batches"] for _ in source.epoch(4)] for _ in range(4)]
    assert counts == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 1], [2, 3, 4, 5]]
    source.release()


def test_position_is_not_ahead_where_a_batch_is_read_ahead() -> None:
    source = source_of(Numbers(4))
    assert [source.state_dict()["batches"] for _ in source.epoch(look_ahead=True)] == [1, 2, 3, 4]


# ---- data that is no plain loader ----


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(float(ROWS)))


class Numbers:
    """An iterable without a length that counts what was read."""

    def __init__(self, n: int) -> None:
        self.n, self.read = n, 0

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.n):
            self.read += 1
            yield torch.full((2,), float(i))


class StatefulNumbers(Numbers):
    """Knows its position."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.next = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.next < self.n:
            self.next += 1
            self.read += 1
            yield torch.full((2,), float(self.next - 1))
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def test_a_list_of_batches_is_taken_up_by_index_without_a_warning() -> None:
    batches = [torch.full((2,), float(i)) for i in range(6)]
    state, _ = save_inside(source_of(batches), 4)
    resumed = source_of(batches)
    resumed.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [batch[0].item() for batch in read(resumed, done=4)] == [4.0, 5.0]


@pytest.mark.parametrize("data", [lambda: DataLoader(Stream(), 4), lambda: OwnLoader(Rows(), 4), lambda: Numbers(11)])
def test_what_can_only_be_read_is_read_again_with_a_warning(data: Callable[[], Any]) -> None:
    expected = read(source_of(data()))
    state, _ = save_inside(source_of(data()), 4)
    resumed = source_of(data())
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match="4 batches that were seen are read again"):
        batches = read(resumed, done=4)
    assert [batch.flatten()[0].item() for batch in batches] == [batch.flatten()[0].item() for batch in expected[4:]]


def test_data_with_a_state_of_its_own_goes_on_from_that() -> None:
    state, _ = save_inside(source_of(StatefulNumbers(9)), 4)
    data = StatefulNumbers(9)
    resumed = source_of(data)
    resumed.load_state_dict(state)
    assert [batch[0].item() for batch in read(resumed, done=4)] == [4.0, 5.0, 6.0, 7.0, 8.0]
    assert data.read == 5


# ---- workers' random states ----


def test_a_workers_random_states_are_decoded_as_this_process_keeps_its_own() -> None:
    batches = list(resumable_loader(DataLoader(Rows(), 4, num_workers=2)))
    assert [batch.worker for batch in batches] == [i % 2 for i in range(11)]
    decoded = decode(batches[0].random_state)
    own = get_random_state()
    assert {name: type(value) for name, value in decoded.items()} == {name: type(own[name]) for name in decoded}
    set_random_state({**own, **decoded})


def test_the_users_worker_init_fn_runs_before_the_states_are_set() -> None:
    def init(worker: int) -> None:
        torch.manual_seed(worker)
        np.random.seed(worker)
        random.seed(worker)

    seed()
    expected = read(source_of(make_loader("shuffled", 2, worker_init_fn=init)))
    seed()
    state, random_state = save_inside(source_of(make_loader("shuffled", 2, worker_init_fn=init)), 5)
    resumed = source_of(make_loader("shuffled", 2, worker_init_fn=init))
    set_random_state(random_state)
    resumed.load_state_dict(state)
    assert same(read(resumed, done=5), expected[5:])


def test_an_empty_list_first_makes_no_batch_and_draws_nothing() -> None:
    loader = resumable_loader(DataLoader(Rows(), 4, num_workers=2))
    sampler = loader.batch_sampler
    assert isinstance(sampler, ResumableSampler)
    assert loader.collate_fn.collate is not None
    batches = list(DataLoader(Rows(), batch_sampler=[[], [0, 1]], num_workers=2, collate_fn=loader.collate_fn))
    assert batches[0] == WorkerBatch(None, 0, None)
    assert batches[1].batch.shape == (2, 4)
