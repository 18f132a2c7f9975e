"""One stream of batches, pass after pass: where a pass ends, where steps go on, and what a batch may be."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from kerastorch.data import BatchSource, make_source, warn_if_shuffled


def numbered(n: int) -> list[Tensor]:
    """n batches of x alone; batch i holds i."""
    return [torch.full((2,), float(i)) for i in range(n)]


class Counted:
    """n batches, again and again; counts the passes begun and the batches read."""

    def __init__(self, n: int) -> None:
        self.n, self.passes, self.read = n, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for batch in numbered(self.n):
            self.read += 1
            yield batch


class Sized(Counted):
    """n batches, but len() says `says`."""

    def __init__(self, n: int, says: int) -> None:
        super().__init__(n)
        self.says = says

    def __len__(self) -> int:
        return self.says


class Stream(IterableDataset[Tensor]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(float(self.n)))

    def __len__(self) -> int:
        return self.n


def source(batches: Any) -> BatchSource:
    return BatchSource(batches, name="the data")


def ids(stream: Iterator[tuple[Any, bool]]) -> list[int]:
    return [int(x[0]) for (x, _, _), _ in stream]


def lasts(stream: Iterator[tuple[Any, bool]]) -> list[bool]:
    return [is_last for _, is_last in stream]


# ---- one pass ----


def test_each_epoch_is_a_fresh_pass() -> None:
    data = source(Counted(3))
    assert [ids(data.epoch()), ids(data.epoch())] == [[0, 1, 2], [0, 1, 2]]
    assert data.batches.passes == 2


@pytest.mark.parametrize("look_ahead", [False, True])
def test_last_batch_of_known_length_is_marked_without_reading_ahead(look_ahead: bool) -> None:
    data = source(Sized(3, says=3))
    assert data.num_batches == 3
    for read, (_, is_last) in enumerate(data.epoch(look_ahead=look_ahead), start=1):
        assert (data.batches.read, is_last) == (read, read == 3)


def test_last_batch_of_unknown_length_is_not_known_unless_read_ahead() -> None:
    assert source(Counted(3)).num_batches is None
    assert lasts(source(Counted(3)).epoch()) == [False, False, False]
    assert lasts(source(Counted(3)).epoch(look_ahead=True)) == [False, False, True]
    assert lasts(source(Counted(1)).epoch(look_ahead=True)) == [True]
    assert ids(source(Counted(3)).epoch(look_ahead=True)) == [0, 1, 2]


def test_looking_ahead_reads_one_batch_and_no_more() -> None:
    data = source(Counted(3))
    stream = data.epoch(look_ahead=True)
    next(stream)
    assert data.batches.read == 2


def test_without_look_ahead_no_batch_is_read_before_it_is_needed() -> None:
    data = source(Counted(3))
    next(data.epoch())
    assert data.batches.read == 1


def test_reading_ahead_keeps_batches_of_a_buffer_that_is_used_again() -> None:
    def batches() -> Iterator[tuple[np.ndarray, Tensor]]:
        x, y = np.zeros(2, np.float32), torch.zeros(2)
        for i in range(3):
            x[:], y[:] = i, i
            yield x, y

    seen = [(int(x[0]), int(y[0])) for (x, y, _), _ in source(batches()).epoch(look_ahead=True)]
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_limit_ends_a_pass_and_the_next_begins_anew() -> None:
    data = source(Counted(5))
    assert [ids(data.one_pass(2)), ids(data.one_pass(2))] == [[0, 1], [0, 1]]
    assert data.batches.read == 4  # nothing was read beyond the limit


def test_fewer_batches_than_the_limit_are_given_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"the data gave 3 batches, fewer than the 5 steps asked for\."):
        assert ids(source(Counted(3)).one_pass(5)) == [0, 1, 2]


def test_limit_that_is_met_exactly_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(source(Counted(3)).one_pass(3)) == [0, 1, 2]


# ---- steps ----


def test_steps_go_on_between_epochs_and_start_again_at_the_end() -> None:
    data = source(Counted(5))
    assert [ids(data.epoch(3)) for _ in range(4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_steps_mark_their_last_batch_whatever_the_length() -> None:
    data = source(Counted(2))
    assert lasts(data.epoch(3)) == [False, False, True]
    assert lasts(data.epoch(1)) == [True]


def test_steps_of_a_whole_pass_begin_each_epoch_at_the_first_batch() -> None:
    data = source(Counted(3))
    assert [ids(data.epoch(3)) for _ in range(3)] == [[0, 1, 2]] * 3
    assert data.batches.passes == 3


def test_steps_over_a_loader_draw_as_passes_by_hand() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10.0)), 2, shuffle=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        by_hand = [x.tolist() for _ in range(2) for (x,) in loader][:8]
        torch.manual_seed(3)
        data = source(loader)
        mine = [x.tolist() for _ in range(2) for (x, _, _), _ in data.epoch(4)]
    assert mine == by_hand


def test_endless_generator_serves_steps() -> None:
    def endless() -> Iterator[Tensor]:
        i = 0
        while True:
            yield torch.full((2,), float(i))
            i += 1

    data = source(endless())
    assert [ids(data.epoch(2)) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_iterator_that_runs_dry_says_at_which_step() -> None:
    data = source(iter(numbered(5)))
    assert data.is_one_shot
    assert ids(data.epoch(3)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"the data ran dry after 2 of 3 steps, and an iterator can't start again"):
        ids(data.epoch(3))


def test_iterator_used_up_by_the_epoch_before_runs_dry_at_once() -> None:
    data = source(iter(numbered(3)))
    ids(data.epoch(3))
    with pytest.raises(ValueError, match="ran dry after 0 of 3 steps"):
        ids(data.epoch(3))


# ---- nothing, and wrong lengths ----


def test_empty_loader_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match=r"^the data is empty: list gives 0 batches\.$"):
        source([])


def test_loader_that_drops_its_only_batch_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"is empty: DataLoader gives 0 batches \(drop_last drops the only, short one"):
        source(DataLoader(TensorDataset(torch.ones(3)), 4, drop_last=True))


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("look_ahead", [False, True])
def test_iterable_that_gives_nothing_is_an_error(steps: int | None, look_ahead: bool) -> None:
    with pytest.raises(ValueError, match=r"the data gave no batches\."):
        ids(source(Counted(0)).epoch(steps, look_ahead=look_ahead))


def test_second_pass_over_an_iterator_tells_why_it_is_empty() -> None:
    data = source(iter(numbered(2)))
    assert ids(data.epoch()) == [0, 1]
    with pytest.raises(ValueError, match="gave no batches; an iterator can be read only once"):
        ids(data.epoch())


@pytest.mark.parametrize("n", [2, 4])
def test_wrong_length_is_an_error_where_the_last_batch_matters(n: int) -> None:
    with pytest.raises(ValueError, match=r"the data says it has 3 batches but gave .*__len__"):
        ids(source(Sized(n, says=3)).epoch(look_ahead=True))


@pytest.mark.parametrize("n", [2, 4])
def test_wrong_length_costs_no_batch_elsewhere(n: int) -> None:
    assert ids(source(Sized(n, says=3)).epoch()) == list(range(n))


def test_length_of_a_stream_s_loader_is_not_trusted() -> None:
    assert source(DataLoader(Stream(5), 2)).num_batches is None
    assert source(DataLoader(TensorDataset(torch.ones(5)), 2)).num_batches == 3


# ---- what a batch may be ----

x, y, w = torch.ones(2, 3), torch.zeros(2).long(), torch.ones(2)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (x, (x, None, None)),
        ((x,), (x, None, None)),
        ([x], (x, None, None)),
        ((x, y), (x, y, None)),
        ([x, y], (x, y, None)),
        ((x, y, w), (x, y, w)),
        ((x, y, None), (x, y, None)),
        ((x, None), (x, None, None)),
    ],
)
@pytest.mark.parametrize("in_loader", [False, True])
def test_batch_is_x_or_a_pair_or_a_triple(batch: Any, expected: tuple[Any, ...], in_loader: bool) -> None:
    batches = DataLoader([batch], batch_size=None, collate_fn=lambda batch: batch) if in_loader else [batch]
    ((mine, _),) = source(batches).epoch()
    assert len(mine) == 3
    assert all(a is b for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("batch", [{"a": x, "b": y}, ((x, w),), [[x, w]]])
def test_inputs_that_go_together_stay_together(batch: Any) -> None:
    ((mine, _),) = source([batch]).epoch()
    inputs = list(mine[0].values()) if isinstance(mine[0], dict) else list(mine[0])
    assert (inputs[0] is x, len(inputs), mine[1:]) == (True, 2, (None, None))


@pytest.mark.parametrize("batch", [(x, y, w, w), [x, y, w, w]])
def test_batch_of_four_parts_is_refused_with_its_shapes(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"the data gave a batch of 4 parts, .Tensor\(2, 3\) float32, .*\(\(a, b, "):
        list(source([batch]).epoch())


def test_batch_of_no_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 0 parts"):
        list(source([()]).epoch())


def test_numpy_batches_become_tensors_with_torch_s_dtypes() -> None:
    batch = ({"a": np.ones((2, 3)), "b": [np.ones(2, np.float32)]}, np.array([0, 1], np.int32), np.ones(2))
    ((mine, _),) = source([batch]).epoch()
    inputs, targets, weight = mine
    assert (inputs["a"].dtype, inputs["b"][0].dtype) == (torch.float32, torch.float32)
    assert (targets.dtype, targets.tolist(), weight.dtype) == (torch.int64, [0, 1], torch.float32)


def test_packed_sequences_stay_whole_in_loaders_and_iterables() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    for batches in ([packed], [(packed, y)], DataLoader([(packed, y)], batch_size=None, collate_fn=lambda b: b)):
        ((mine, _),) = source(batches).epoch()
        assert isinstance(mine[0], PackedSequence)
        assert mine[0] is packed


@pytest.mark.parametrize("extra", [None, ["a.png", "b.png"], "train"], ids=["None", "texts", "text"])
def test_leaves_that_are_no_numbers_pass_as_they_do_from_a_loader(extra: Any) -> None:
    batch = ({"image": x, "extra": extra}, y)
    for batches in ([batch], DataLoader([batch], batch_size=None, collate_fn=lambda b: b)):
        ((mine, _),) = source(batches).epoch()
        assert mine[0]["image"] is x
        assert mine[0]["extra"] == extra


# ---- sources of datasets ----


@pytest.mark.parametrize(
    ("batch_size", "steps", "sizes"),
    [(None, None, [32, 32, 6]), (40, None, [40, 30]), (None, 4, [18, 18, 18, 16]), (25, 4, [25, 25, 20])],
)
def test_batch_size_is_32_or_what_the_steps_ask_for(
    batch_size: int | None, steps: int | None, sizes: list[int]
) -> None:
    data = make_source(TensorDataset(torch.ones(70)), name="the data", batch_size=batch_size, steps=steps)
    assert [len(x) for (x, _, _), _ in data.one_pass()] == sizes


def test_stream_is_read_in_batches_of_32_or_as_asked() -> None:
    for batch_size, sizes in ((None, [32, 8]), (25, [25, 15])):
        data = make_source(Stream(40), name="the data", batch_size=batch_size)
        assert [len(x) for (x, _, _), _ in data.one_pass()] == sizes


def test_shuffle_is_off_unless_asked_for() -> None:
    data = make_source(TensorDataset(torch.arange(64.0)), name="the data")
    assert ids(data.one_pass()) == [0, 32]


@pytest.mark.parametrize("data", [DataLoader(TensorDataset(torch.ones(4))), numbered(2), iter(numbered(2))])
def test_batch_size_beside_batches_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=rf"batch_size=8 beside a {type(data).__name__}: its batches have their own"):
        make_source(data, name="the data", batch_size=8)


def test_loader_is_taken_as_it_is() -> None:
    loader = DataLoader(TensorDataset(torch.ones(4)), 3)
    assert make_source(loader, name="the data", shuffle=True).batches is loader


def test_dataset_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="the data is empty: the TensorDataset has 0 rows"):
        make_source(TensorDataset(torch.ones(0)), name="the data")


# ---- shuffle=False on a loader ----


def test_shuffling_loader_warns_that_it_keeps_shuffling() -> None:
    with pytest.warns(UserWarning, match="shuffle=False has no effect on a DataLoader, and this one shuffles"):
        warn_if_shuffled(DataLoader(TensorDataset(torch.ones(4)), shuffle=True))


@pytest.mark.parametrize("sampler", [SubsetRandomSampler([0, 1]), WeightedRandomSampler([1.0, 1.0], 2), None])
def test_plain_loader_and_own_sampler_do_not_warn(sampler: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_shuffled(DataLoader(TensorDataset(torch.ones(4)), sampler=sampler))
        warn_if_shuffled([1, 2])
