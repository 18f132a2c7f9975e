"""Rows read many at a time equal those of the plain loader to the bit, and so do all random states on the way."""

import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from kerastorch import Model
from kerastorch.callbacks import Callback, CallbackList
from kerastorch.compiled import Compiled
from kerastorch.data import BatchSource, in_memory
from kerastorch.data.arrays import NestedDataset
from kerastorch.data.in_memory import BatchGroup, RowReader, row_reader
from kerastorch.data.rows import Rows
from kerastorch.data.weights import WeightedCollate, WeightedDataset
from kerastorch.device import CopyStream, get_random_state, leaves, map_nested, set_random_state
from kerastorch.progress import Progress
from kerastorch.run import Run

ROWS = 41


# ---- what gives the order ----


class Backwards(Sampler[int]):
    """Draws as its iterator is made, before the first index is asked for."""

    def __iter__(self) -> Iterator[int]:
        torch.rand(())
        return iter(range(ROWS - 1, -1, -1))

    def __len__(self) -> int:
        return ROWS


class Lazy(Sampler[int]):
    """Draws from all three global generators with each index."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(ROWS):
            yield (int(torch.randint(ROWS, ())) + random.randrange(ROWS) + np.random.randint(ROWS)) % ROWS

    def __len__(self) -> int:
        return ROWS


class Buckets:
    """A batch sampler of shuffled runs of 4 rows, each given as `form` makes it."""

    def __init__(self, form: Callable[[list[int]], Any] = list) -> None:
        self.form = form

    def __iter__(self) -> Iterator[Any]:
        for start in torch.randperm(10).tolist():
            yield self.form(list(range(4 * start, 4 * start + 4)))

    def __len__(self) -> int:
        return 10


class EagerBuckets(Buckets):
    """The same, drawn by __iter__ itself, before the first list is asked for."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().__iter__()))


class Longer(BatchSampler):
    """A subclass of torch's, which gives what it likes."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from super().__iter__()
        yield [0, 0, 1]

    def __len__(self) -> int:
        return super().__len__() + 1


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def drawn(*arguments: Any, **settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"batch_size": 4, "sampler": RandomSampler(*arguments, **settings)}


UNEVEN = [[0], [1, 2, 3], list(range(4, 30)), [40, 7], [7], [7, 7, 7, 1]]
WEIGHTS = torch.arange(1.0, ROWS + 1).tolist()
LOADERS: dict[str, Callable[[], dict[str, Any]]] = {
    "sequential": lambda: {"batch_size": 4},
    "sequential, single rows": dict,
    "sequential, odd batches": lambda: {"batch_size": 3},
    "sequential, drop_last": lambda: {"batch_size": 4, "drop_last": True},
    "one large batch": lambda: {"batch_size": 50},
    "one batch": lambda: {"batch_size": ROWS, "shuffle": True},
    "shuffled": lambda: {"batch_size": 4, "shuffle": True},
    "shuffled, odd batches": lambda: {"batch_size": 7, "shuffle": True},
    "shuffled, drop_last": lambda: {"batch_size": 4, "shuffle": True, "drop_last": True},
    "loader's generator": lambda: {"batch_size": 4, "shuffle": True, "generator": generator()},
    "loader's generator, sequential": lambda: {"batch_size": 4, "generator": generator()},
    "sampler's generator": lambda: {"batch_size": 4, "sampler": RandomSampler(range(ROWS), generator=generator())},
    "a generator each": lambda: {
        "batch_size": 4,
        "sampler": RandomSampler(range(ROWS), generator=generator()),
        "generator": generator(),
    },
    "replacement": drawn(range(ROWS), replacement=True),
    "replacement, generator": lambda: drawn(range(ROWS), True, 150, generator())(),
    "more samples than rows": drawn(range(ROWS), num_samples=90),
    "more samples than rows, generator": lambda: drawn(range(ROWS), num_samples=90, generator=generator())(),
    "fewer samples": drawn(range(ROWS), num_samples=10),
    "fewer samples, generator": lambda: drawn(range(ROWS), num_samples=10, generator=generator())(),
    "some rows twice": drawn(range(20), num_samples=ROWS),
    "weighted": lambda: {"batch_size": 4, "sampler": WeightedRandomSampler(WEIGHTS, ROWS)},
    "weighted, generator": lambda: {
        "batch_size": 4,
        "sampler": WeightedRandomSampler(WEIGHTS, ROWS, generator=generator()),
    },
    "subset": lambda: {"batch_size": 4, "sampler": SubsetRandomSampler(range(3, 33, 2))},
    "subset, generator": lambda: {"batch_size": 4, "sampler": SubsetRandomSampler(range(3, 33, 2), generator())},
    "own sampler": lambda: {"batch_size": 4, "sampler": Backwards()},
    "own lazy sampler": lambda: {"batch_size": 4, "sampler": Lazy(), "drop_last": True},
    "list as sampler": lambda: {"batch_size": 4, "sampler": list(range(0, ROWS, 3))},
    "batch sampler": lambda: {"batch_sampler": BatchSampler(SequentialSampler(range(ROWS)), 4, True)},
    "batch sampler, replacement": lambda: {
        "batch_sampler": BatchSampler(RandomSampler(range(ROWS), replacement=True), 4, False)
    },
    "batch sampler's subclass": lambda: {"batch_sampler": Longer(RandomSampler(range(ROWS)), 4, False)},
    "own batch sampler": lambda: {"batch_sampler": Buckets()},
    "own batch sampler, generator": lambda: {"batch_sampler": Buckets(), "generator": generator()},
    "own eager batch sampler": lambda: {"batch_sampler": EagerBuckets()},
    "tuples": lambda: {"batch_sampler": Buckets(tuple)},
    "tensors": lambda: {"batch_sampler": Buckets(torch.tensor)},
    "lists of scalar tensors": lambda: {"batch_sampler": Buckets(lambda rows: list(torch.tensor(rows)))},
    "arrays": lambda: {"batch_sampler": Buckets(np.array)},
    "arrays of int32": lambda: {"batch_sampler": Buckets(lambda rows: np.array(rows, np.int32))},
    "lists of numpy ints": lambda: {"batch_sampler": Buckets(lambda rows: list(np.array(rows)))},
    "read-only arrays": lambda: {"batch_sampler": Buckets(lambda rows: np.broadcast_to(rows[0], (3,)))},
    "negative": lambda: {"batch_sampler": Buckets(lambda rows: [row - ROWS for row in rows])},
    "some negative": lambda: {"batch_sampler": [[0, -1], [1, 2], [-3, -4, 5]]},
    "uneven": lambda: {"batch_sampler": UNEVEN},
}
ONE_BY_ONE = ("lists of scalar tensors", "arrays of int32", "negative", "some negative")  # rows that are not collected

# ---- what is read ----


class Pair(NamedTuple):
    left: Any
    right: Any


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 100
    return drawn.to(dtype)


def special(*shape: int) -> Tensor:
    """With values whose bits an operation may change."""
    tensor = values(*shape)
    tensor.view(-1)[:5] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42, -float("nan")])
    return tensor


X, Y = values(ROWS, 3), torch.arange(ROWS)
PLAIN = TensorDataset(X, Y)
LARGE = TensorDataset(values(3 * ROWS, 16), torch.arange(3 * ROWS))
NEST = {"a": X, "b": (Y, [values(ROWS, 2, 2)]), "c": Pair(values(ROWS, seed=1), {"d": Y.float()})}
ORDER = torch.randperm(3 * ROWS, generator=generator())[:ROWS]

DATASETS: dict[str, Callable[[], Dataset[Any]]] = {
    "tensors": lambda: PLAIN,
    "one tensor": lambda: TensorDataset(values(ROWS, 5)),
    "rows of 64 bytes": lambda: TensorDataset(special(ROWS, 16), values(ROWS, 4, 8)),
    "batches of 64 bytes": lambda: TensorDataset(values(ROWS, 4), values(ROWS, 2, dtype=torch.float64)),
    "three of one size": lambda: TensorDataset(values(ROWS, 16), values(ROWS, 16), values(ROWS, 16)),
    "dtypes": lambda: TensorDataset(
        *(values(ROWS, 4, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.int32)),
        values(ROWS, 2) > 0,
        values(ROWS, 4).abs().to(torch.uint8),
        torch.complex(values(ROWS, 8), values(ROWS, 8, seed=1)),
    ),
    "channels_last": lambda: TensorDataset(values(ROWS, 4, 2, 2).to(memory_format=torch.channels_last), Y),
    "channels_last of one": lambda: TensorDataset(values(ROWS, 1, 4, 4).to(memory_format=torch.channels_last)),
    "transposed": lambda: TensorDataset(values(3, ROWS).T, values(ROWS, 4, 4).transpose(1, 2)),
    "every second": lambda: TensorDataset(values(2 * ROWS, 32)[::2, ::2]),
    "expanded": lambda: TensorDataset(values(ROWS, 1).expand(ROWS, 16), values(1, 16).expand(ROWS, 16)),
    "conjugated": lambda: TensorDataset(torch.complex(values(ROWS, 8), values(ROWS, 8, seed=1)).conj()),
    "empty rows": lambda: TensorDataset(values(ROWS, 0), Y),
    "subset of a list": lambda: Subset(LARGE, ORDER.tolist()),
    "subset of a range": lambda: Subset(LARGE, range(100, 100 - 2 * ROWS, -2)),
    "subset of a tuple": lambda: Subset(LARGE, tuple(ORDER.tolist())),
    "subset of an array": lambda: Subset(LARGE, ORDER.numpy()),
    "subset of a tensor": lambda: Subset(LARGE, ORDER),
    "subset of numpy ints": lambda: Subset(LARGE, list(ORDER.numpy())),
    "subset of negative": lambda: Subset(LARGE, [-1 - i for i in ORDER.tolist()]),
    "subset of some negative": lambda: Subset(LARGE, [*range(30), *range(-11, 0)]),
    "subset of one row": lambda: Subset(LARGE, [7] * ROWS),
    "subset of a subset": lambda: Subset(Subset(LARGE, range(120, 20, -1)), (ORDER % 100).numpy()),
    "subset of negative of a subset": lambda: Subset(Subset(LARGE, ORDER.tolist()), list(range(-ROWS, 0))),
    "nest": lambda: NestedDataset(NEST, ROWS),
    "nest of one": lambda: NestedDataset(values(ROWS, 16), ROWS),
    "nested tuples": lambda: NestedDataset(((values(ROWS, 16), values(ROWS, 32)), Y), ROWS),
    "nest of a named tuple": lambda: NestedDataset(Pair(X, (Y,)), ROWS),
    "subset of a nest": lambda: Subset(NestedDataset(NEST, ROWS), range(ROWS - 1, -1, -1)),
    "weighted": lambda: WeightedDataset(PLAIN, values(ROWS, seed=3)),
    "weighted rows of 64 bytes": lambda: WeightedDataset(TensorDataset(values(ROWS, 16)), values(ROWS, seed=3)),
    "weighted nest": lambda: WeightedDataset(NestedDataset(NEST, ROWS), values(ROWS, seed=3)),
    "subset of weighted": lambda: Subset(WeightedDataset(LARGE, values(3 * ROWS, seed=3)), ORDER.tolist()),
}


def make_loader(dataset: Dataset[Any], kind: str = "sequential", **changes: Any) -> DataLoader[Any]:
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    collate = WeightedCollate(default_collate) if isinstance(inner, WeightedDataset) else None
    return DataLoader(dataset, **{"collate_fn": collate, **LOADERS[kind](), **changes})


def reader_of(loader: DataLoader[Any]) -> RowReader:
    reader = row_reader(loader)
    assert reader is not None
    return reader


# ---- what is the same ----


def assert_same(part: Any, other: Any) -> None:
    """Both are the same nest of tensors, to the bit and the stride."""
    assert type(part) is type(other)
    if isinstance(part, Tensor):
        assert (part.dtype, part.shape, part.stride()) == (other.dtype, other.shape, other.stride())
        assert (part.is_conj(), part.requires_grad) == (other.is_conj(), other.requires_grad)
        assert part.data_ptr() % 64 == other.data_ptr() % 64  # of which the last bits of a product may depend
        assert bits(part) == bits(other)
    elif isinstance(part, dict):
        assert list(part) == list(other)
        assert_same(list(part.values()), list(other.values()))
    elif isinstance(part, (tuple, list)):
        assert len(part) == len(other)
        for item, other_item in zip(part, other, strict=True):
            assert_same(item, other_item)
    else:
        assert part == other


def bits(tensor: Tensor) -> bytes:
    return tensor.resolve_conj().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same_state(state: Any, other: Any) -> None:
    assert state["python"] == other["python"]
    assert torch.equal(state["torch"], other["torch"])
    assert torch.equal(state["numpy"][0], other["numpy"][0])
    assert state["numpy"][1:] == other["numpy"][1:]
    for generator_state, other_state in zip(state["generators"], other["generators"], strict=True):
        assert torch.equal(generator_state, other_state)


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def step() -> None:
    """What a training step draws between two batches."""
    torch.rand(3)
    np.random.rand()
    random.random()


def generators_of(loader: DataLoader[Any]) -> list[torch.Generator]:
    holders = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return [own for holder in holders if (own := getattr(holder, "generator", None)) is not None]


def trace(loader: DataLoader[Any], reads_rows: bool, limits: Sequence[int | None] = (None, None)) -> list[Any]:
    """Return each batch and the random states at its time, over passes that break off after so many batches."""
    seed()
    generators = generators_of(loader)
    batches = reader_of(loader) if reads_rows else loader
    seen: list[Any] = []
    for limit in limits:
        iterator = iter(batches)
        seen.append((None, get_random_state(*generators)))
        for batch in islice(iterator, limit):
            seen.append((batch, get_random_state(*generators)))
            step()
        seen.append((None, get_random_state(*generators)))
    return seen


def assert_same_trace(seen: list[Any], expected: list[Any]) -> None:
    assert len(seen) == len(expected)
    for (batch, state), (other, other_state) in zip(seen, expected, strict=True):
        assert_same(batch, other)
        assert_same_state(state, other_state)


OFTEN = ("tensors", "rows of 64 bytes", "subset of some negative", "nest", "subset of weighted")
KINDS = ("sequential", "shuffled", "loader's generator", "uneven")


@pytest.mark.parametrize(
    ("kind", "data"), [(kind, data) for kind in LOADERS for data in DATASETS if kind in KINDS or data in OFTEN]
)
def test_batches_and_random_states_are_those_of_the_plain_loader(kind: str, data: str) -> None:
    expected = trace(make_loader(DATASETS[data](), kind), reads_rows=False)
    assert_same_trace(trace(make_loader(DATASETS[data](), kind), reads_rows=True), expected)


@pytest.mark.parametrize("data", ["tensors", "rows of 64 bytes"])
@pytest.mark.parametrize("kind", LOADERS)
def test_so_they_are_when_passes_break_off(kind: str, data: str) -> None:
    limits = (2, 0, 1, None, 2)
    expected = trace(make_loader(DATASETS[data](), kind), False, limits)
    assert_same_trace(trace(make_loader(DATASETS[data](), kind), True, limits), expected)


@pytest.mark.parametrize("kind", ["shuffled", "sampler's generator", "own batch sampler"])
def test_two_passes_at_a_time_are_those_of_the_plain_loader(kind: str) -> None:
    dataset = DATASETS["rows of 64 bytes"]()
    seed()
    loader = make_loader(dataset, kind)
    expected = list(zip(loader, loader, strict=True))
    seed()
    reader = reader_of(make_loader(dataset, kind))
    assert_same(list(zip(reader, reader, strict=True)), expected)


def test_many_batches_are_read_together_and_in_several_turns() -> None:
    """The data is larger than what is read at once."""
    dataset = TensorDataset(values(5000, 32), torch.arange(5000))
    for changes in ({"batch_size": 32}, {"batch_size": 32, "shuffle": True}, {"batch_size": 8, "drop_last": True}):
        loader = DataLoader(dataset, **changes)
        assert_same_trace(trace(loader, True, (None,)), trace(loader, False, (None,)))


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind not in ONE_BY_ONE])
def test_rows_are_not_asked_for_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, index: object) -> None:
        raise AssertionError("a row was asked for")

    monkeypatch.setattr(TensorDataset, "__getitem__", refuse)
    for data in ("tensors", "rows of 64 bytes", "subset of a list", "subset of a subset", "weighted"):
        assert list(reader_of(make_loader(DATASETS[data](), kind)))


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("shape", [(), (16,)])
def test_no_batch_comes_of_too_few_rows(rows: int, shape: tuple[int, ...]) -> None:
    loader = DataLoader(TensorDataset(values(rows, *shape)), 4, drop_last=True)
    assert list(loader) == []
    assert list(reader_of(loader)) == []
    assert list(reader_of(DataLoader(TensorDataset(values(0, *shape)), 4))) == []


def test_tensors_made_in_inference_mode_are_read() -> None:
    with torch.inference_mode():
        dataset = TensorDataset(values(ROWS, 16).clone())
    loader = make_loader(dataset, "shuffled")
    assert_same_trace(trace(loader, reads_rows=True), trace(loader, reads_rows=False))


# ---- what a training step may do ----


@pytest.mark.parametrize("data", ["one tensor", "rows of 64 bytes", "subset of a list"])
@pytest.mark.parametrize("kind", ["sequential", "shuffled", "own batch sampler"])
def test_what_a_step_writes_to_the_data_is_in_later_batches(kind: str, data: str) -> None:
    results = []
    for reads_rows in (False, True):
        seed()
        dataset: Any = DATASETS[data]()
        tensor = (dataset.dataset if isinstance(dataset, Subset) else dataset).tensors[0]
        original = tensor.clone()
        loader = make_loader(dataset, kind)
        batches = []
        for count, batch in enumerate(reader_of(loader) if reads_rows else loader):
            batches.append(batch)
            if count in (1, 2, 6):
                tensor[:, 0] += count
        results.append(batches)
        tensor.copy_(original)
    assert_same(results[1], results[0])


def test_a_step_may_write_to_the_data_with_every_batch() -> None:
    tensor = torch.zeros(16 * 1500)
    for count, (x,) in enumerate(reader_of(DataLoader(TensorDataset(tensor), 16))):
        assert x[0] == x[-1] == count
        tensor.add_(1)


def test_what_is_written_between_passes_is_read_however_it_was_written() -> None:
    array = np.zeros((64, 16), np.float32)
    reader = reader_of(DataLoader(TensorDataset(torch.from_numpy(array)), 8))
    for expected in range(3):
        assert all((x == expected).all() for (x,) in reader)
        array += 1


def test_what_a_step_writes_to_its_batch_is_neither_in_the_data_nor_in_other_batches() -> None:
    dataset = TensorDataset(values(ROWS, 16))
    expected = list(DataLoader(dataset, 4))
    batches = []
    for batch in reader_of(DataLoader(dataset, 4)):
        batches.append([batch[0].clone()])
        batch[0].zero_()
    assert_same(batches, expected)


def test_a_step_may_multiply_its_batch_in_place_by_a_parameter() -> None:
    scale = torch.ones(16, requires_grad=True)
    batches = list(reader_of(DataLoader(TensorDataset(torch.ones(64, 16)), 8)))
    for (x,) in batches[:3]:
        x.mul_(scale)
    batches[0][0].sum().backward()
    assert scale.grad is not None
    assert (scale.grad == 8).all()
    assert not batches[3][0].requires_grad


def test_a_graph_may_keep_a_batch_while_a_later_one_is_written_to() -> None:
    weight = torch.ones(16, requires_grad=True)
    iterator = iter(reader_of(DataLoader(TensorDataset(torch.ones(64, 16)), 8)))
    loss = (next(iterator)[0] * weight).sum()
    next(iterator)[0].mul_(2)
    loss.backward()
    assert (weight.grad == 8).all()


def test_rows_set_anew_between_passes_are_read() -> None:
    subset = Subset(TensorDataset(torch.arange(8)), [0, 1])
    for dataset in (subset, WeightedDataset(TensorDataset(torch.arange(8)), torch.ones(8))):
        source = BatchSource(make_loader(dataset), name="the data")
        for _ in source.epoch():
            pass
        subset.indices = [6, 7]
        if isinstance(dataset, WeightedDataset):
            dataset.dataset.tensors = (torch.full((8,), 6),)
        assert next(iter(source.epoch()))[0][0][0] == 6


# ---- what is left to the loader ----


class OwnLoader(DataLoader[Any]):
    pass


class OwnTensors(TensorDataset):
    pass


class OwnNest(NestedDataset):
    pass


class OwnWeighted(WeightedDataset):
    pass


class OwnSubset(Subset[Any]):
    pass


class OwnTensor(Tensor):
    pass


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(8.0))


def own_collate(rows: list[Any]) -> Any:
    return default_collate(rows)


def weighted(dataset: Dataset[Any], weight: Tensor, collate: Any = default_collate) -> DataLoader[Any]:
    return DataLoader(WeightedDataset(dataset, weight), 4, collate_fn=WeightedCollate(collate))


LEFT: dict[str, Callable[[], Any]] = {
    "a list": lambda: [(X, Y)],
    "a tensor": lambda: X,
    "a loader's subclass": lambda: OwnLoader(PLAIN, 4),
    "workers": lambda: DataLoader(PLAIN, 4, num_workers=1),
    "no batches": lambda: DataLoader(PLAIN, batch_size=None),
    "own collate": lambda: DataLoader(PLAIN, 4, collate_fn=own_collate),
    "own collate of a nest": lambda: DataLoader(NestedDataset(NEST, ROWS), 4, collate_fn=own_collate),
    "own collate of weighted rows": lambda: weighted(PLAIN, torch.ones(ROWS), own_collate),
    "weighted rows in pairs": lambda: DataLoader(WeightedDataset(PLAIN, torch.ones(ROWS)), 4),
    "a stream": lambda: DataLoader(Stream(), 4),
    "a list of rows": lambda: DataLoader([1.0, 2.0]),
    "several datasets": lambda: DataLoader(ConcatDataset([PLAIN, PLAIN])),
    "stacked datasets": lambda: DataLoader(StackDataset(PLAIN, PLAIN)),
    "own tensor dataset": lambda: DataLoader(OwnTensors(X), 4),
    "own nested dataset": lambda: DataLoader(OwnNest(X, ROWS), 4),
    "own subset": lambda: DataLoader(OwnSubset(PLAIN, [0, 1]), 4),
    "a subset of own rows": lambda: DataLoader(Subset(OwnTensors(X), [0, 1]), 4),
    "own weighted dataset": lambda: DataLoader(
        OwnWeighted(PLAIN, torch.ones(ROWS)), 4, collate_fn=WeightedCollate(default_collate)
    ),
    "weights of a subset": lambda: weighted(Subset(PLAIN, [3, 4]), torch.ones(2)),
    "sparse tensors": lambda: DataLoader(TensorDataset(X.to_sparse()), 4),
    "tensors with gradients": lambda: DataLoader(TensorDataset(X, X.clone().requires_grad_()), 4),
    "parameters": lambda: DataLoader(TensorDataset(nn.Parameter(X, requires_grad=False)), 4),
    "a tensor's subclass": lambda: DataLoader(TensorDataset(X.as_subclass(OwnTensor)), 4),
    "one such tensor in a nest": lambda: DataLoader(NestedDataset({"a": X, "b": [X.to_sparse()]}, ROWS), 4),
    "tensors elsewhere": lambda: DataLoader(TensorDataset(torch.empty(ROWS, device="meta")), 4),
    "other leaves": lambda: DataLoader(NestedDataset({"a": X, "b": "text"}, ROWS), 4),
    "weights with gradients": lambda: weighted(PLAIN, torch.ones(ROWS, requires_grad=True)),
    "sparse weights": lambda: weighted(PLAIN, torch.ones(ROWS).to_sparse()),
    "weights elsewhere": lambda: weighted(PLAIN, torch.empty(ROWS, device="meta")),
    "a subset of flags": lambda: DataLoader(Subset(PLAIN, [True, False]), 4),
    "a subset of floats": lambda: DataLoader(Subset(PLAIN, [0.0, 1.0]), 4),
    "a subset of lists": lambda: DataLoader(Subset(PLAIN, [[0, 1], [2, 3]]), 4),
    "a subset by key": lambda: DataLoader(Subset(PLAIN, {0: 5, 1: 7}), 4),
    "a subset by label": lambda: DataLoader(Subset(PLAIN, pd.Series([5, 7], index=[1, 0])), 4),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_not_known_is_left_to_the_loader(kind: str) -> None:
    assert row_reader(LEFT[kind]()) is None


@pytest.mark.parametrize("kind", ["workers", "no batches", "a subset by label", "weights of a subset", "own collate"])
def test_a_source_of_such_gives_the_loader_s_batches(kind: str) -> None:
    loader = LEFT[kind]()
    for batch, ((x, y, _), _) in zip(loader, BatchSource(loader, name="the data").epoch(), strict=True):
        assert_same([x, y], list(getattr(batch, "batch", batch)))


def pass_until_error(batches: Any) -> tuple[list[Any], str]:
    """Return the batches before the error, and the error."""
    seen: list[Any] = []
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what the test compares
        seen.extend(batches)
    return seen, repr(caught.value)


ROWS_OF_64 = TensorDataset(values(ROWS, 16))
WRONG: dict[str, Callable[[], DataLoader[Any]]] = {
    "past the end": lambda: DataLoader(PLAIN, batch_sampler=[[0, 1], [2, ROWS]]),
    "before the beginning": lambda: DataLoader(PLAIN, batch_sampler=[[0, 1], [2, -ROWS - 1]]),
    "past a subset's end": lambda: DataLoader(Subset(PLAIN, [5, 6]), batch_sampler=[[0, 1], [2]]),
    "a subset past the end": lambda: DataLoader(Subset(PLAIN, [5, 6, 7, ROWS]), 2),
    "a subset past the end, read together": lambda: DataLoader(Subset(ROWS_OF_64, [*range(9), ROWS]), 2),
    "a subset past a subset's end": lambda: DataLoader(Subset(Subset(PLAIN, [5, 6, 7]), [0, 1, 2, 3]), 2),
    "a sampler past the end": lambda: DataLoader(ROWS_OF_64, 4, sampler=RandomSampler(range(99), num_samples=ROWS)),
    "floats": lambda: DataLoader(PLAIN, batch_sampler=[[0, 1], [2.0]]),
    "texts": lambda: DataLoader(PLAIN, batch_sampler=[[0, 1], ["a"]]),
    "no rows": lambda: DataLoader(PLAIN, batch_sampler=[[0, 1], []]),
    "a number": lambda: DataLoader(PLAIN, batch_sampler=[[0, 1], 7]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_indices_give_the_loader_s_own_error_at_the_same_batch(kind: str) -> None:
    seed()
    seen, error = pass_until_error(WRONG[kind]())
    seed()
    loader = WRONG[kind]()
    others, other_error = pass_until_error(row_reader(loader) or loader)
    assert other_error == error
    assert_same(others, seen)


@pytest.mark.parametrize(
    "make",
    [lambda: [True, True], lambda: torch.tensor([[0, 1], [2, 3]]), lambda: range(3), lambda: iter([1, 2])],
    ids=["flags", "matrix", "range", "iterator"],
)
def test_odd_indices_give_what_the_loader_gives(make: Callable[[], Any]) -> None:
    """True is no number of a row, and a matrix of indices takes several rows each."""
    loaders = [DataLoader(TensorDataset(X), batch_sampler=[make()]) for _ in range(2)]
    assert_same(list(reader_of(loaders[0])), list(loaders[1]))


# ---- going on inside a pass ----


def read(source: BatchSource, done: int = 0, limit: int | None = None) -> list[Any]:
    batches = []
    for batch, _ in islice(source.epoch(done=done), limit):
        batches.append(batch)
        step()
    return batches


NO_REST = ("one batch", "one large batch", "own lazy sampler")  # or one whose order can't be repeated
RESUMABLE = [kind for kind in LOADERS if kind not in NO_REST]


@pytest.mark.parametrize("data", ["tensors", "rows of 64 bytes", "subset of weighted"])
@pytest.mark.parametrize("kind", RESUMABLE)
@pytest.mark.filterwarnings("ignore:the data is ordered by:UserWarning")
def test_a_pass_goes_on_where_it_stood(kind: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest, the next pass and the random states then are those of the plain loader that nothing interrupts."""
    after = 2

    def source() -> BatchSource:
        return BatchSource(make_loader(DATASETS[data](), kind), name="the data")

    seed()
    with monkeypatch.context() as patch:
        patch.setattr("kerastorch.data.passes.row_reader", lambda batches: None)
        whole = source()
        expected = [read(whole), read(whole)]
        expected_state = get_random_state(*whole.generators)
    seed()
    saved = source()
    saved.keep_position()
    for count, _ in enumerate(saved.epoch(), 1):
        step()
        if count == after:
            state, random_state = saved.state_dict(), get_random_state()
            break
    torch.manual_seed(77)  # another process
    resumed = source()
    set_random_state(random_state)
    resumed.load_state_dict(state)
    assert_same(read(resumed, done=after), expected[0][after:])
    assert_same(read(resumed), expected[1])
    assert_same_state(get_random_state(*resumed.generators), expected_state)


def test_a_resumed_pass_is_read_by_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = BatchSource(make_loader(PLAIN, "shuffled"), name="the data")
    iterator = saved.epoch()
    next(iterator), next(iterator)
    resumed = BatchSource(make_loader(PLAIN, "shuffled"), name="the data")
    resumed.load_state_dict(saved.state_dict())
    monkeypatch.setattr(TensorDataset, "__getitem__", None)
    assert len(read(resumed, done=2)) == 9


# ---- a fit ----


def test_fit_gives_the_weights_and_logs_of_the_plain_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, whose draws come between those of the order."""
    results = []
    for reads_rows in (True, False):
        if not reads_rows:
            monkeypatch.setattr("kerastorch.data.passes.row_reader", lambda batches: None)
        seed()
        net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        model = Model(net, device="cpu")
        model.compile("mse", torch.optim.SGD(net.parameters(), 0.1), metrics=["mae"])
        dataset = TensorDataset(values(70, 16) / 100, values(70, 1) / 100)
        weights = torch.rand(70)
        by_loader = model.fit(DataLoader(dataset, 16, shuffle=True), epochs=2, verbose=0)
        by_array = model.fit(*dataset.tensors, sample_weight=weights, batch_size=16, validation_split=0.2, verbose=0)
        results.append((by_loader.history, by_array.history, list(net.state_dict().values())))
    assert results[0][:2] == results[1][:2]
    assert_same(results[0][2], results[1][2])


# ---- pinned memory ----


@pytest.mark.parametrize("kind", ["sequential", "own batch sampler"])
def test_each_tensor_of_a_batch_is_pinned_where_the_loader_pins(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        pinned.append(id(copy))
        return copy

    loaders = {
        data: make_loader(DATASETS[data](), kind, pin_memory=True) for data in ("tensors", "nest", "weighted nest")
    }
    expected = {data: list(make_loader(DATASETS[data](), kind, generator=generator())) for data in loaders}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    for data, loader in loaders.items():
        loader.generator = generator()
        torch.manual_seed(0)
        batches = list(reader_of(loader))
        assert all(id(leaf) in pinned for batch in batches for leaf in leaves(batch))
        if kind == "sequential":
            assert_same(batches, expected[data])
    pinned.clear()
    list(reader_of(make_loader(PLAIN, kind)))
    assert not pinned  # it did not ask for it


def test_nothing_is_pinned_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Tensor, "pin_memory", None)
    list(reader_of(make_loader(PLAIN, pin_memory=True)))


# ---- on a GPU, for which the CPU stands here ----


class Copies:
    """Stands for a CopyStream to a GPU; sent: the bytes of each batch, or of several together."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sent: list[int] = []

    def __call__(self, batch: Any) -> Any:
        self.sent.append(sum(leaf.nbytes for leaf in leaves(batch) if leaf is not None))
        return map_nested(lambda leaf: leaf if leaf is None else leaf.clone(), batch)


class GPU:
    """Its free memory, and how often that was asked for; error: what that raises."""

    def __init__(self) -> None:
        self.free, self.asked = 2**30, 0
        self.error: Exception | None = None

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.free, 2**40


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GPU:
    gpu = GPU()
    monkeypatch.setattr(torch.cuda, "mem_get_info", gpu.mem_get_info)
    monkeypatch.setattr("kerastorch.data.rows.send", lambda tensor, device: tensor)
    monkeypatch.setattr("kerastorch.data.rows.COPY_BYTES", 1000)
    return gpu


def reader_to_gpu(loader: DataLoader[Any], keeps: bool = True) -> tuple[RowReader, Copies]:
    reader, copies = reader_of(loader), Copies()
    reader.read_to(copies, keeps=keeps)
    return reader, copies


def trace_to_gpu(loader: DataLoader[Any], limits: Sequence[int | None], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    reader, _ = reader_to_gpu(loader)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "reader_of", lambda loader: reader)
        return trace(loader, True, limits)


NOT_COPIED = ("subset of negative", "subset of some negative")


@pytest.mark.parametrize(
    ("kind", "data"), [(kind, data) for kind in LOADERS for data in DATASETS if kind in KINDS or data in OFTEN]
)
def test_on_a_gpu_batches_and_random_states_are_those_of_the_plain_loader(
    kind: str, data: str, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a pass that copies batches, and one whose rows are there; the next ones break off or are whole."""
    limits = (None, None, 2, None)
    expected = trace(make_loader(DATASETS[data](), kind), False, limits)
    assert_same_trace(trace_to_gpu(make_loader(DATASETS[data](), kind), limits, monkeypatch), expected)
    assert gpu.asked == (0 if data in NOT_COPIED else 1)


def test_small_batches_are_copied_together_and_rows_once_the_first_pass_is_over(gpu: GPU) -> None:
    reader, copies = reader_to_gpu(DataLoader(TensorDataset(values(5000, 32), torch.arange(5000)), 32, shuffle=True))
    list(reader)
    assert len(copies.sent) == 1  # all are smaller than GPU_CHUNK_BYTES
    assert reader._copied is None
    list(islice(reader, 3))
    assert reader._copied is not None
    assert not any(copy is tensor for copy, tensor in zip(reader._copied.tensors, reader.rows.tensors, strict=True))
    assert reader._copied.gpu == copies.device


def test_batches_that_are_cut_off_a_larger_copy_begin_where_a_copy_of_their_own_would() -> None:
    for dataset, size in ((values(999, 3), 5), (values(999, 64), 32), (values(999), 1)):
        reader, copies = reader_to_gpu(DataLoader(TensorDataset(dataset), size), keeps=False)
        starts = [x.data_ptr() % 64 for (x,) in list(reader)]
        assert set(starts) == {0}
        assert len(copies.sent) == 1


def test_rows_of_a_pass_that_breaks_off_are_not_copied(gpu: GPU) -> None:
    reader, _ = reader_to_gpu(make_loader(PLAIN))
    for _ in range(3):
        list(islice(reader, 9))
    assert gpu.asked == 0


@pytest.mark.parametrize("room", [-1, 0])
def test_rows_are_copied_where_they_take_no_more_than_their_share_of_free_memory(room: int, gpu: GPU) -> None:
    dataset = Subset(TensorDataset(values(100, 16), torch.arange(100)), range(0, 100, 2))
    reader, _ = reader_to_gpu(make_loader(dataset))
    gpu.free = 8 * (50 * 16 * 4 + 50 * 8) + room
    list(reader), list(reader)
    assert (reader._copied is not None) == (room == 0)


def test_rows_are_not_kept_where_that_is_not_asked_for(gpu: GPU) -> None:
    reader, _ = reader_to_gpu(make_loader(PLAIN), keeps=False)
    expected = list(reader)
    assert_same(list(reader), expected)
    assert gpu.asked == 0


@pytest.mark.parametrize("kind", ["sequential", "shuffled", "own batch sampler"])
def test_a_gpu_without_memory_for_the_rows_gets_batches(kind: str, gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (None, None, None)
    expected = trace(make_loader(PLAIN, kind), False, limits)
    gpu.error = torch.OutOfMemoryError("no memory")
    assert_same_trace(trace_to_gpu(make_loader(PLAIN, kind), limits, monkeypatch), expected)
    assert gpu.asked == 2


@pytest.mark.parametrize("kind", ["sequential", "shuffled", "own batch sampler"])
def test_memory_that_runs_out_as_rows_are_read_takes_them_off_the_gpu(
    kind: str, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(read: Callable[..., Any]) -> Callable[..., Any]:
        def read_or_fail(rows: Rows, *arguments: Any) -> Any:
            if rows.gpu is not None:
                raise torch.OutOfMemoryError("no memory")
            return read(rows, *arguments)

        return read_or_fail

    loader = make_loader(PLAIN, kind)
    reader, _ = reader_to_gpu(loader)
    list(reader)
    for name in ("take", "take_range"):
        monkeypatch.setattr(Rows, name, without_memory(getattr(Rows, name)))
    for _ in range(2):
        seed()
        expected = list(loader)
        seed()
        assert_same(list(reader), expected)
        assert reader._copied is None
    assert gpu.asked == 1


@pytest.mark.parametrize("kind", ["sequential", "shuffled", "own batch sampler", "uneven"])
@pytest.mark.parametrize("data", ["rows of 64 bytes", "subset of a list", "weighted rows of 64 bytes"])
def test_what_is_written_between_passes_is_on_the_gpu_too(kind: str, data: str, gpu: GPU) -> None:
    dataset: Any = DATASETS[data]()
    loader = make_loader(dataset, kind)
    while not isinstance(dataset, TensorDataset):
        dataset = dataset.dataset
    original, (reader, _) = dataset.tensors[0].clone(), reader_to_gpu(loader)
    for number in range(4):
        seed()
        expected = list(loader)
        seed()
        assert_same(list(reader), expected)
        dataset.tensors[0][:, 0] = number
    assert reader._copied is not None
    assert gpu.asked == 1  # the copy's memory is used again
    dataset.tensors[0].copy_(original)


def test_what_numpy_writes_to_its_own_memory_is_on_the_gpu_too(gpu: GPU) -> None:
    array = np.zeros((64, 16), np.float32)
    reader, _ = reader_to_gpu(DataLoader(TensorDataset(torch.from_numpy(array)), 8))
    for expected in range(4):
        assert all((x == expected).all() for (x,) in reader)
        array += 1
    assert reader._copied is not None


def test_rows_that_stay_as_they_are_are_copied_once(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, _ = reader_to_gpu(make_loader(DATASETS["subset of weighted"]()))
    list(reader), list(reader)
    monkeypatch.setattr(Tensor, "copy_", None)
    list(reader)
    assert reader._copied is not None


def test_rows_set_anew_between_passes_are_on_the_gpu_too(gpu: GPU) -> None:
    subset = Subset(TensorDataset(torch.arange(8)), [0, 1])
    reader, _ = reader_to_gpu(DataLoader(subset, 4))
    for indices in ([0, 1], [0, 1], [6, 7], [5, 4, 3], [2, 99]):
        subset.indices = indices
        if 99 in indices:
            with pytest.raises(IndexError):
                list(reader)
        else:
            assert [x.tolist() for (x,) in reader] == [indices]
    subset.indices = [3, 1]
    for first in (10, 20):
        subset.dataset = TensorDataset(torch.arange(first, first + 8))
        assert [x.tolist() for (x,) in reader] == [[first + 3, first + 1]]
    subset.dataset = TensorDataset(torch.arange(8), torch.arange(8))
    assert [[x.tolist() for x in batch] for batch in reader] == [[[3, 1], [3, 1]]]


@pytest.mark.parametrize("kind", ["sequential", "shuffled", "own batch sampler"])
@pytest.mark.parametrize("data", ["one tensor", "rows of 64 bytes", "subset of a list"])
def test_what_a_step_writes_to_the_data_is_in_later_batches_on_a_gpu(kind: str, data: str, gpu: GPU) -> None:
    results: list[Any] = []
    for reads_rows in (False, True):
        dataset: Any = DATASETS[data]()
        tensor = (dataset.dataset if isinstance(dataset, Subset) else dataset).tensors[0]
        original, loader = tensor.clone(), make_loader(dataset, kind)
        reader = reader_to_gpu(loader)[0] if reads_rows else loader
        batches = []
        for _ in range(3):
            seed()
            for count, batch in enumerate(reader):
                batches.append(batch)
                if count in (1, 2, 6) and len(batches) > 15:
                    tensor[:, 0] += count
        results.append(batches)
        tensor.copy_(original)
    assert_same(results[1], results[0])
    assert gpu.asked == 1


def test_a_net_that_writes_to_its_batch_leaves_the_rows_on_the_gpu_as_they_are(gpu: GPU) -> None:
    for shuffle in (False, True):
        reader, _ = reader_to_gpu(DataLoader(TensorDataset(torch.ones(ROWS, 16)), 4, shuffle=shuffle))
        for _ in range(3):
            for (x,) in reader:
                assert (x == 1).all()
                x.zero_()


@pytest.mark.parametrize("index", [[0, ROWS], [3, -1]])
def test_no_index_that_is_out_of_range_gets_to_a_gpu(index: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kerastorch.data.rows.send", None)
    with pytest.raises(IndexError):
        Rows([X], None, list, torch.device("cpu")).take(torch.tensor(index))


def test_a_wrong_index_is_the_loader_s_own_error_on_a_gpu_too(gpu: GPU) -> None:
    lists = [[0, 1], [2, 3]]
    reader, _ = reader_to_gpu(DataLoader(PLAIN, batch_sampler=lists))
    list(reader)
    lists[1] = [2, ROWS]
    seen, error = pass_until_error(reader)
    others, other_error = pass_until_error(DataLoader(PLAIN, batch_sampler=lists))
    assert error == other_error
    assert_same(seen, others)
    lists[1] = [2, -1]
    assert_same(list(reader), list(DataLoader(PLAIN, batch_sampler=lists)))


def test_what_is_on_a_gpu_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", None)
    there = torch.empty(3, device="meta")
    assert in_memory._pin([there])[0] is there


def test_unpack_gets_batches_on_the_cpu(gpu: GPU) -> None:
    copies, loader = Copies(), DataLoader(PLAIN, 4)
    for unpack, count in ((lambda batch: batch, 0), (None, 1)):
        copies.sent.clear()
        source = BatchSource(loader, name="the data", unpack=unpack)
        source.read_to(copies, keeps=True)
        list(source.epoch())
        assert len(copies.sent) == count


def test_a_source_lets_go_of_the_rows_on_the_gpu(gpu: GPU) -> None:
    source = BatchSource(DataLoader(TensorDataset(values(ROWS, 16)), 4), name="the data")
    source.read_to(Copies(), keeps=True)
    list(source.epoch()), list(source.epoch())
    reader = source._passes._plain_reader
    assert isinstance(reader, RowReader)
    assert reader._copied is not None
    copy = weakref.ref(reader._copied.tensors[0])
    source.release()
    assert copy() is None


@pytest.mark.parametrize("cuts_batches", [False, True])
def test_a_run_on_cuda_reads_to_the_gpu(cuts_batches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows do not stay there where memory is known to be short."""
    copies = Copies()
    monkeypatch.setattr("kerastorch.run.CopyStream", lambda device: copies)
    monkeypatch.setattr("kerastorch.run.PassSums", lambda *arguments: None)
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    compiled = Compiled(mse_loss, optimizer, torch.amp.GradScaler(enabled=False), cuts_batches=cuts_batches)
    source = BatchSource(DataLoader(PLAIN, 4), name="the data")
    run = Run(
        net, torch.device("cuda", 0), compiled, callbacks=CallbackList(None), progress=Progress(0), train_data=source
    )
    reader: Any = source._passes._plain_reader
    assert reader._copies is copies
    assert (reader._keeper is None) == cuts_batches
    assert run._begin_batch(torch.ones(2, 3), torch.ones(2, 1), None)[0].shape == (2, 3)
    assert copies.sent == [32]


def test_fit_gives_the_same_on_a_gpu(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, all_copies = Run.__init__, []

    def begin_on_gpu(run: Run, *arguments: Any, **options: Any) -> None:
        begin(run, *arguments, **options)
        copies: Any = Copies()
        run._copies = copies
        all_copies.append(copies)
        for source in (run.train_data, run.val_data):
            if source is not None:
                source.read_to(copies, keeps=True)

    results = []
    for is_on_gpu in (False, True):
        if is_on_gpu:
            monkeypatch.setattr(Run, "__init__", begin_on_gpu)
        seed()
        net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        model = Model(net, device="cpu")
        model.compile("mse", torch.optim.SGD(net.parameters(), 0.1), metrics=["mae"], gradient_accumulation_steps=2)
        x, y = values(70, 16) / 100, values(70, 1) / 100
        settings = {"batch_size": 16, "epochs": 3, "validation_split": 0.2, "verbose": 0}
        history = model.fit(x, y, sample_weight=torch.rand(70), class_weight=None, **settings)
        predicted = model.predict(x, batch_size=8, verbose=0)
        results.append((history.history, predicted.tolist(), list(net.state_dict().values()), get_random_state()))
    assert results[0][:2] == results[1][:2]
    assert_same(results[0][2], results[1][2])
    assert_same_state(results[0][3], results[1][3])
    assert gpu.asked == 2  # training and validation rows
    assert all(copies.sent for copies in all_copies)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize("kind", ["sequential", "shuffled", "loader's generator", "uneven", "some negative"])
def test_on_cuda_batches_are_those_of_the_plain_loader_moved(kind: str, data: str) -> None:
    """Also those that the CPU has overwritten since, and after the rows went to the GPU."""
    copies = CopyStream(torch.device("cuda", 0))
    reader = reader_of(make_loader(DATASETS[data](), kind))
    reader.read_to(copies, keeps=True)
    loader = make_loader(DATASETS[data](), kind)
    for count in range(3):
        seed()
        expected = list(loader)
        seed()
        batches = [copies(batch) for batch in reader]
        assert all(leaf.device == copies.device for batch in batches for leaf in leaves(batch))
        moved = map_nested(lambda leaf: leaf.to(copies.device), expected)
        assert_same(map_nested(Tensor.cpu, batches), map_nested(Tensor.cpu, moved))
        assert (reader._copied is not None) == (count > 0 and data not in NOT_COPIED)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_tensors_that_lie_there_are_read_by_rows() -> None:
    dataset = TensorDataset(values(ROWS, 16).cuda(), torch.arange(ROWS).cuda())
    for kind in KINDS:
        seed()
        expected = list(make_loader(dataset, kind))
        seed()
        batches = list(reader_of(make_loader(dataset, kind)))
        assert all(leaf.is_cuda for leaf in leaves(batches))
        assert all(torch.equal(one, two) for one, two in zip(leaves(batches), leaves(expected), strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_fit_takes_rows_there_and_gives_the_memory_back() -> None:
    x, y = values(4096, 64), values(4096, 1)
    model = Model(nn.Linear(64, 1), device="cuda")
    model.compile("mse", "sgd")
    model.fit(x, y, batch_size=64, epochs=1, verbose=0)
    before, held = torch.cuda.memory_allocated(), []

    class Look(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            held.append(torch.cuda.memory_allocated())

    model.fit(x, y, batch_size=64, epochs=3, callbacks=[Look()], verbose=0)
    assert held[1] - held[0] >= x.nbytes
    assert torch.cuda.memory_allocated() <= before + 2**16


@pytest.mark.parametrize("data", ["tensors", "nest", "subset of weighted", "subset of some negative"])
@pytest.mark.parametrize("kind", ["sequential", "shuffled"])
def test_full_batches_read_together_are_those_of_the_plain_loader_joined(kind: str, data: str) -> None:
    expected = trace(make_loader(DATASETS[data](), kind), reads_rows=False)
    batches = [batch for batch, _ in expected if batch is not None]
    seed()
    reader, _ = reader_to_gpu(make_loader(DATASETS[data](), kind), keeps=False)
    reader.read_together(4)  # 10 full batches of a pass: 3 groups of 3
    found: list[Any] = []
    for _ in range(2):
        for batch in reader:
            is_group = isinstance(batch, BatchGroup)
            found.append(batch if is_group else BatchGroup(batch, 1))
            for _ in range(found[-1].num_batches):
                step()
    counts = [group.num_batches for group in found]
    assert counts == [3, 3, 3, 1, 1] * 2
    for group in found:
        part, batches = batches[: group.num_batches], batches[group.num_batches :]
        for joined, *leaf_parts in zip(leaves(group.joined), *map(leaves, part), strict=True):
            assert_same(joined, torch.cat(leaf_parts))
    assert not batches
    assert_same_state(get_random_state(*generators_of(reader.loader)), expected[-1][1])


def test_batches_are_read_together_on_a_gpu_alone_and_from_the_next_ones_on() -> None:
    loader = DataLoader(TensorDataset(values(200_000, 16)), 64)  # more than one reading for a GPU
    on_cpu, (to_gpu, _) = reader_of(loader), reader_to_gpu(loader, keeps=False)
    on_cpu.read_together(5)
    assert not any(isinstance(batch, BatchGroup) for batch in on_cpu)
    counts = []
    for i, batch in enumerate(to_gpu):
        counts.append(batch.num_batches if isinstance(batch, BatchGroup) else 1)
        if i in (10, 500):
            to_gpu.read_together(5 if i == 10 else 1)
    at_once = in_memory.GPU_CHUNK_BYTES // (64 * 16 * 4)
    assert counts[:at_once] == [1] * at_once
    assert counts[at_once:501] == [5] * (501 - at_once)
    assert set(counts[501:]) == {1}
    assert sum(counts) == 200_000 // 64


def test_a_source_counts_each_batch_of_those_it_gives_together() -> None:
    source = BatchSource(DataLoader(TensorDataset(values(67, 3)), 8), name="x")
    source.read_to(Copies(), keeps=False)
    source.read_together(5)
    seen = [(len(x), source.num_together, is_last) for (x, _, _), is_last in source.one_pass()]
    assert seen == [(32, 4, False), (32, 4, False), (3, 1, True)]
