"""Arrays in every accepted form become rows, with torch's dtypes; lengths are checked; the last rows validate."""

import warnings
from collections import namedtuple
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from kerastorch.data import make_dataset, make_source, split_dataset, to_tensors
from kerastorch.device import leaves

N = 10
X = np.arange(2 * N, dtype=np.float32).reshape(N, 2)
Y = np.arange(N) % 3
W = np.linspace(0, 1, N)


def equal(mine: Any, theirs: Any) -> bool:
    """Whether two nests hold the same tensors, dtypes included."""
    pairs = zip(leaves(mine), leaves(theirs), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def rows(data: Any) -> list[Any]:
    return [data[i] for i in range(len(data))]


class Squares(Dataset[Tensor]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index**2))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(N))


# ---- every accepted form ----

x, y, w = torch.from_numpy(X), torch.from_numpy(Y), torch.from_numpy(W.astype(np.float32))
FORMS: dict[str, tuple[Any, Any, list[Any]]] = {  # name -> (x, y, the rows by hand)
    "tensors": (x, y, [(x[i], y[i]) for i in range(N)]),
    "arrays": (X, Y, [(x[i], y[i]) for i in range(N)]),
    "tensor and array": (x, Y, [(x[i], y[i]) for i in range(N)]),
    "lists of numbers": (X.tolist(), Y.tolist(), [(x[i], y[i]) for i in range(N)]),
    "dataframe and series": (pd.DataFrame(X), pd.Series(Y), [(x[i], y[i]) for i in range(N)]),
    "x alone": (X, None, [(x[i],) for i in range(N)]),
    "list alone": (X.tolist(), None, [(x[i],) for i in range(N)]),
    "tuple (x,)": ((X,), None, [(x[i],) for i in range(N)]),
    "tuple (x, y)": ((X, Y), None, [(x[i], y[i]) for i in range(N)]),
    "tuple (x, y, w)": ((X, Y, W), None, [(x[i], y[i], w[i]) for i in range(N)]),
    "tuple of inputs": ((X, W), Y, [((x[i], w[i]), y[i]) for i in range(N)]),
    "list of inputs": ([X, W], Y, [((x[i], w[i]), y[i]) for i in range(N)]),
    "inputs in a batch": (((X, W),), None, [((x[i], w[i]),) for i in range(N)]),
    "inputs and y in a batch": (((X, W), Y), None, [((x[i], w[i]), y[i]) for i in range(N)]),
    "dict": ({"a": X, "b": W}, Y, [({"a": x[i], "b": w[i]}, y[i]) for i in range(N)]),
    "dict alone": ({"a": X}, None, [({"a": x[i]},) for i in range(N)]),
    "several targets": (X, {"a": Y, "b": X}, [(x[i], {"a": y[i], "b": x[i]}) for i in range(N)]),
    "nest": ({"a": [X, {"b": W}]}, Y, [({"a": (x[i], {"b": w[i]})}, y[i]) for i in range(N)]),
}


@pytest.mark.parametrize(("given", "target", "expected"), FORMS.values(), ids=FORMS)
def test_every_form_gives_the_rows_by_hand(given: Any, target: Any, expected: list[Any]) -> None:
    data = make_dataset(given, target, caller="fit")
    assert isinstance(data, Dataset)
    assert len(data) == N
    for mine, theirs in zip(rows(data), expected, strict=True):
        assert equal(mine, theirs)
        assert len(mine) == len(theirs)


def test_flat_arrays_are_a_tensor_dataset_and_nests_keep_dict_keys() -> None:
    assert type(make_dataset(X, Y, caller="fit")) is TensorDataset
    assert list(make_dataset({"b": X, "a": W}, Y, caller="fit")[0][0]) == ["b", "a"]


BATCHES = [(x[:5], y[:5]), (x[5:], y[5:])]


@pytest.mark.parametrize(
    "data",
    [DataLoader(TensorDataset(x)), Squares(), Stream(), BATCHES, [{"a": x}], iter(BATCHES), (b for b in BATCHES)],
    ids=["loader", "dataset", "stream", "list of batches", "list of dicts", "iterator", "generator"],
)
def test_loaders_datasets_and_iterables_of_batches_stay_as_they_are(data: Any) -> None:
    assert make_dataset(data, caller="fit") is data


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, N, 32])
def test_batches_equal_the_plain_loader_s_and_so_does_the_random_state_after(shuffle: bool, batch_size: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        plain = DataLoader(TensorDataset(x, y), batch_size, shuffle)
        expected = [tuple(batch) for _ in range(2) for batch in plain]
        state = torch.get_rng_state()
        torch.manual_seed(7)
        source = make_source(make_dataset(X, Y, caller="fit"), name="data", batch_size=batch_size, shuffle=shuffle)
        mine = [batch[:2] for _ in range(2) for batch, _ in source.epoch()]
        assert torch.equal(torch.get_rng_state(), state)
    assert len(mine) == len(expected)
    assert all(map(equal, mine, expected))


def test_nests_are_drawn_in_the_same_order_as_flat_arrays() -> None:
    drawn = []
    with torch.random.fork_rng():
        for given in (X, {"a": X}):
            torch.manual_seed(7)
            source = make_source(make_dataset(given, Y, caller="fit"), name="data", batch_size=3, shuffle=True)
            drawn.append([(x["a"] if isinstance(x, dict) else x, y) for (x, y, _), _ in source.epoch()])
    assert all(map(equal, *drawn))


# ---- dtypes ----


@pytest.mark.parametrize(
    ("given", "as_x", "as_target"),
    [
        (np.float64, torch.float32, torch.float32),
        (np.float32, torch.float32, torch.float32),
        (np.float16, torch.float16, torch.float16),
        (np.int64, torch.int64, torch.int64),
        (np.int32, torch.int32, torch.int64),
        (np.uint8, torch.uint8, torch.int64),
        (np.uint16, torch.uint16, torch.int64),
        (np.bool_, torch.bool, torch.bool),
        (np.complex64, torch.complex64, torch.complex64),
    ],
)
def test_float64_arrays_become_float32_and_integer_targets_int64(
    given: Any, as_x: torch.dtype, as_target: torch.dtype
) -> None:
    values = np.array([0, 1, 1, 0]).astype(given)
    data = make_dataset(values, values, caller="fit")
    assert (data.tensors[0].dtype, data.tensors[1].dtype) == (as_x, as_target)
    assert data.tensors[1].tolist() == [0, 1, 1, 0]


def test_what_was_converted_is_memory_of_torch_s() -> None:
    """A GPU keeps such rows, while numpy's may be written to without torch's knowledge."""
    assert to_tensors(np.zeros(3)).untyped_storage().resizable()
    assert not to_tensors(np.zeros(3, np.float32)).untyped_storage().resizable()


def test_tensors_keep_float64_and_int32_becomes_int64_in_targets_only() -> None:
    data = make_dataset(x.double(), y.int(), caller="fit")
    assert [t.dtype for t in data.tensors] == [torch.float64, torch.int64]
    data = make_dataset(y.int(), x.double(), caller="fit")
    assert [t.dtype for t in data.tensors] == [torch.int32, torch.float64]


def test_targets_and_weights_in_a_tuple_have_their_own_rules() -> None:
    data = make_dataset((Y.astype(np.int32), Y.astype(np.int32), Y.astype(np.int32)), caller="fit")
    assert [t.dtype for t in data.tensors] == [torch.int32, torch.int64, torch.int32]


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[::-1],
        lambda array: array[:, ::-1],
        read_only,
        lambda array: np.broadcast_to(array[:1], array.shape),
        lambda array: array.T[:2].T,
        np.asfortranarray,
        lambda array: array.astype(array.dtype.newbyteorder()),
        lambda array: np.zeros(N, [("id", np.uint8), ("values", array.dtype, 2)])["values"],
    ],
    ids=["rows back", "columns back", "read-only", "broadcast", "transposed", "fortran", "byte order", "record field"],
)
def test_any_array_is_read_as_numpy_reads_it_without_a_warning(view: Any, dtype: Any) -> None:
    array = view(X.astype(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tensor,) = make_dataset(array, caller="fit").tensors
    assert tensor.tolist() == array.tolist()


def test_data_is_not_copied_where_torch_can_share_it() -> None:
    array = X.copy()
    (tensor,) = make_dataset(array, caller="fit").tensors
    array[0, 0] = 77
    assert tensor[0, 0] == 77
    assert make_dataset(x, caller="fit").tensors[0] is x


def test_named_tuple_is_read_as_a_tuple() -> None:
    Pair = namedtuple("Pair", ["x", "y"])
    assert equal(to_tensors(Pair(X, W)), (x, w))


# ---- refused ----


def test_length_mismatch_says_both_numbers() -> None:
    with pytest.raises(ValueError, match="samples") as raised:
        make_dataset(np.zeros((100, 2)), np.zeros(99), caller="fit")
    assert str(raised.value) == "fit() got 100 samples in x but 99 in y."


@pytest.mark.parametrize(
    ("given", "target", "message"),
    [
        ((X, Y, W[:9]), None, "evaluate() got 10 samples in x but 9 in sample_weight."),
        ({"a": X, "b": W[:9]}, Y, "evaluate() got parts of 10 and of 9 samples in x."),
        (X, (Y, Y[:4]), "evaluate() got parts of 10 and of 4 samples in y."),
        (X, np.float32(3), "evaluate() got a single number in y; data needs a first dimension of samples."),
        (5 * x[0, 0], None, "evaluate() got a single number in x; data needs a first dimension of samples."),
        (X[:0], Y[:0], "evaluate() got no samples: x is Tensor(0, 2) float32."),
        ([], None, "evaluate() got no samples: x is Tensor(0,) float32."),
        ({}, None, "evaluate() got no samples: x is {}."),
        (None, None, "evaluate() needs data: x is None."),
        (None, Y, "evaluate() needs data: x is None."),
        (
            (X, Y, W, W),
            None,
            "evaluate() got a tuple of 4 as data; it is read as (x,), (x, y) or (x, y, sample_weight). "
            "Several inputs go together: ((a, b, ...), y).",
        ),
        (
            DataLoader(TensorDataset(x)),
            Y,
            "evaluate() got y beside a DataLoader: its batches hold their own targets, as (x, y).",
        ),
        (Squares(), Y, "evaluate() got y beside a Squares: its batches hold their own targets, as (x, y)."),
        (iter(BATCHES), Y, "evaluate() got y beside a list_iterator: its batches hold their own targets, as (x, y)."),
    ],
)
def test_slip_is_named_with_the_value_met(given: Any, target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"evaluate\(\)") as raised:
        make_dataset(given, target, caller="evaluate")
    assert str(raised.value) == message


@pytest.mark.parametrize("given", [[X, X], [x, x], [x]])
def test_list_of_arrays_alone_is_ambiguous(given: Any) -> None:
    with pytest.raises(ValueError, match=r"several inputs or several batches: give .*a, b.* iter\("):
        make_dataset(given, caller="fit")


@pytest.mark.parametrize("given", [3, torch.nn.ReLU(), len])
def test_what_is_no_data_is_refused_by_its_type(given: Any) -> None:
    with pytest.raises(TypeError, match=rf"fit\(\) can't read a {type(given).__name__} as data: give a DataLoader"):
        make_dataset(given, caller="fit")


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (np.array(["a", "b"]), "<U1"),
        (["a", "b"], "<U1"),
        (pd.DataFrame({"n": [1, 2], "city": ["a", "b"]}), "object"),
        (np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"), "datetime64"),
    ],
    ids=["text", "list of text", "mixed table", "dates"],
)
def test_data_that_is_no_numbers_is_refused_with_its_dtype(given: Any, dtype: str) -> None:
    with pytest.raises(TypeError, match=rf"data must be numbers, got an array of dtype {dtype}.*shape \(2,"):
        make_dataset(given, np.zeros(2), caller="fit")


# ---- split ----


@pytest.mark.parametrize(
    ("n", "fraction", "train"),
    [(10, 0.25, 7), (10, 0.5, 5), (10, 0.1, 9), (3, 0.5, 1), (2, 0.01, 1), (1000, 0.2, 800)],
)
@pytest.mark.parametrize("as_dataset", [TensorDataset, lambda t: Subset(TensorDataset(t), range(len(t)))])
def test_last_rows_validate_in_order(as_dataset: Any, n: int, fraction: float, train: int) -> None:
    first, last = split_dataset(as_dataset(torch.arange(n)), fraction)
    assert [int(row) for (row,) in rows(first)] == list(range(train))
    assert [int(row) for (row,) in rows(last)] == list(range(train, n))


def test_ten_rows_at_a_quarter_validate_on_rows_7_to_9() -> None:
    train, val = split_dataset(make_dataset(X, Y, caller="fit"), 0.25)
    assert type(train) is type(val) is TensorDataset
    assert equal(val.tensors, (x[7:], y[7:]))
    assert equal(train.tensors, (x[:7], y[:7]))


def test_nests_and_own_datasets_are_split_without_a_copy() -> None:
    data = Squares()
    train, val = split_dataset(data, 0.3)
    assert isinstance(train, Subset)
    assert train.dataset is val.dataset is data
    assert [float(row) for row in rows(val)] == [49.0, 64.0, 81.0]
    _, nested = split_dataset(make_dataset({"a": X}, Y, caller="fit"), 0.25)
    assert equal(nested[0], ({"a": x[7]}, y[7]))


@pytest.mark.parametrize(("n", "fraction", "counts"), [(1, 0.5, "0 rows to train and 1"), (3, 0.99, "0 rows to train")])
def test_split_that_empties_a_side_is_refused(n: int, fraction: float, counts: str) -> None:
    with pytest.raises(ValueError, match=rf"validation_split={fraction} leaves {counts}.*of {n}: both sides need"):
        split_dataset(TensorDataset(torch.ones(n)), fraction)


@pytest.mark.parametrize(("fraction", "counts"), [(0.0, "10 rows to train and 0"), (1.0, "0 rows to train and 10")])
def test_split_of_nothing_or_everything_is_refused(fraction: float, counts: str) -> None:
    with pytest.raises(ValueError, match=rf"validation_split={fraction} leaves {counts} to validate"):
        split_dataset(TensorDataset(torch.ones(10)), fraction)


@pytest.mark.parametrize("data", [Stream(), BATCHES])
def test_split_of_what_has_no_rows_is_refused_with_the_way_out(data: Any) -> None:
    with pytest.raises(ValueError, match=rf"not a {type(data).__name__}: split before .* pass validation_data"):
        split_dataset(data, 0.5)


@pytest.mark.parametrize("shuffle", [False, True])
def test_split_of_a_loader_gives_loaders_over_the_last_rows_with_its_settings(shuffle: bool) -> None:
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=shuffle, drop_last=True)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        train, val = split_dataset(loader, 0.25)
        mine = list(train)
        torch.manual_seed(5)
        by_hand = list(DataLoader(TensorDataset(x[:7], y[:7]), 4, shuffle=shuffle, drop_last=True))
    assert equal(mine, by_hand)
    assert equal(list(val), [[x[7:], y[7:]]])  # in order, and none dropped


def test_split_of_a_loader_with_a_sampler_of_its_own_is_refused() -> None:
    loader = DataLoader(TensorDataset(x), sampler=SubsetRandomSampler(range(N)))
    with pytest.raises(ValueError, match="can't split a DataLoader with a sampler of its own"):
        split_dataset(loader, 0.25)


@pytest.mark.parametrize("form", [(X, Y), ((X, Y), None)])
def test_sample_weight_joins_arrays_as_a_third_column(form: tuple[Any, Any]) -> None:
    data = make_dataset(*form, W, caller="fit")
    assert equal(data.tensors, (x, y, w))
    with pytest.raises(ValueError, match=r"fit\(\) got 10 samples in x but .*9"):
        make_dataset(*form, W[:9], caller="fit")


def test_split_of_a_dataset_without_a_length_is_refused() -> None:
    class Endless(Dataset[Tensor]):
        def __getitem__(self, index: int) -> Tensor:
            return torch.ones(1)

    with pytest.raises(ValueError, match="Endless"):
        split_dataset(Endless(), 0.5)
