"""Predictions grown batch by batch equal numpy's concatenation, in the nesting of the outputs."""

from collections import namedtuple

import numpy as np
import pytest
import torch

from kerastorch.data import Predictions, to_numpy

Pair = namedtuple("Pair", ["mean", "rows"])
SIZES = [4, 4, 3]
PARTS = [np.arange(n * 2, dtype=np.float32).reshape(n, 2) + 100 * i for i, n in enumerate(SIZES)]
WHOLE = np.concatenate(PARTS)


def join(parts, num_samples=None, sizes=None):
    predictions = Predictions(num_samples)
    for part, size in zip(parts, sizes or SIZES, strict=True):
        predictions.append(part, size)
    return predictions.joined()


@pytest.mark.parametrize("num_samples", [None, 11, 5, 1000], ids=["unknown", "right", "too few", "too many"])
def test_rows_are_in_order_whatever_number_was_expected(num_samples):
    joined = join(PARTS, num_samples)
    assert joined.dtype == np.float32
    assert np.array_equal(joined, WHOLE)


def test_a_known_number_of_rows_takes_memory_once():
    predictions = Predictions(11)
    predictions.append(PARTS[0], 4)
    first = predictions._rows._array.ctypes.data
    predictions.append(PARTS[1], 4)
    predictions.append(PARTS[2], 3)
    assert predictions.joined().ctypes.data == first


def test_the_result_holds_no_more_memory_than_its_rows():
    for num_samples in (None, 1000):
        joined = join(PARTS, num_samples)
        assert joined.flags.owndata
        assert joined.nbytes == WHOLE.nbytes


def test_parts_may_be_reused_after_they_were_added():
    buffer, predictions = np.zeros((4, 2), np.float32), Predictions()
    for i in range(3):
        buffer[:] = i
        predictions.append(buffer, 4)
    assert predictions.joined()[:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


FORMS = {
    "tuple": (lambda a, b: (a, b), lambda joined: joined),
    "list": (lambda a, b: [a, b], lambda joined: joined),
    "named tuple": (Pair, lambda joined: (joined.mean, joined.rows)),
    "dict": (lambda a, b: {"b": b, "a": a}, lambda joined: (joined["a"], joined["b"])),
    "nest": (lambda a, b: {"pair": (a, [b])}, lambda joined: (joined["pair"][0], joined["pair"][1][0])),
}


@pytest.mark.parametrize("form", FORMS)
def test_nests_come_back_as_they_were(form):
    build, take = FORMS[form]
    joined = join([build(part.mean(1), part) for part in PARTS])
    assert type(joined) is type(build(1, 2))
    mean, rows = take(joined)
    assert np.array_equal(mean, WHOLE.mean(1))
    assert np.array_equal(rows, WHOLE)
    if form == "dict":
        assert list(joined) == ["b", "a"]


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float64, np.complex64, np.uint8])
def test_dtypes_are_kept(dtype):
    joined = join([part.astype(dtype) for part in PARTS])
    assert joined.dtype == dtype
    assert np.array_equal(joined, WHOLE.astype(dtype))


def test_a_dtype_that_changes_loses_no_values():
    parts = [np.arange(4), np.full(4, 0.5, np.float32), np.full(3, 2.5, np.float32)]
    assert join(parts).tolist() == np.concatenate(parts).tolist()


def test_batches_without_rows_give_an_empty_array_of_their_width():
    joined = join([np.zeros((0, 5), np.float32)], sizes=[0])
    assert joined.shape == (0, 5)
    assert joined.dtype == np.float32


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (np.float32(3.0), r"forward returned .*float32"),
        (np.zeros((), np.float32), r"forward returned ndarray\(\) float32"),
        (np.zeros((7, 4)), r"forward returned ndarray\(7, 4\) float64 for a batch of 4"),
        ((np.zeros((4, 1)), np.zeros(1)), r"forward returned ndarray\(1,\) float64 for a batch of 4"),
        ({"a": "text"}, r"forward returned str"),
    ],
    ids=["scalar", "no axes", "time first", "one of two", "text"],
)
def test_outputs_without_a_batch_axis_are_refused_and_the_way_out_is_named(part, said):
    with pytest.raises(ValueError, match=rf"first, batch axis, but {said}.*predict_iter\(\)"):
        Predictions().append(part, 4)


def test_outputs_of_other_trailing_shapes_are_refused_and_the_way_out_is_named():
    predictions = Predictions()
    predictions.append(np.zeros((4, 7, 2)), 4)
    with pytest.raises(ValueError, match=r"shapes \(N, 7, 2\) and \(N, 9, 2\): use predict_iter\(\)"):
        predictions.append(np.zeros((4, 9, 2)), 4)


def test_tensors_become_numpy_on_the_cpu_and_bfloat16_float32():
    given = torch.tensor([1.5, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert to_numpy(given).dtype == np.float32
    assert to_numpy(given).tolist() == [1.5, 2.0]
    for dtype in (torch.float16, torch.float64, torch.int32, torch.bool):
        assert to_numpy(torch.ones(2, dtype=dtype)).dtype.name == str(dtype).removeprefix("torch.")
    assert to_numpy("text") == "text"


def test_a_part_that_is_none_in_every_batch_stays_none():
    predictions = Predictions()
    for _ in range(2):
        predictions.append((np.zeros((4, 1)), None), 4)
    scores, nothing = predictions.joined()
    assert scores.shape == (8, 1)
    assert nothing is None


# ---- many at once ----

LATER = [torch.arange(8.0).reshape(4, 2) + 100 * i for i in range(70)]


def join_later(parts, num_samples=None):
    predictions = Predictions(num_samples)
    for part in parts:
        predictions.append_later(part, len(part))
    return predictions.joined()


@pytest.mark.parametrize(
    "parts",
    [
        LATER,
        LATER[:1],
        LATER[:2],
        [*LATER[:40], LATER[40][:3]],
        [part[: 1 + i % 3] for i, part in enumerate(LATER)],
        [*LATER[:3], *(part.long() for part in LATER[3:6]), *LATER[6:]],
        [part.t()[:, 0] for part in LATER],
        [part.clone().requires_grad_() for part in LATER],
    ],
    ids=["many", "one", "two", "a short last one", "of several sizes", "of several dtypes", "views", "with gradients"],
)
@pytest.mark.parametrize("num_samples", [None, 280, 3])
def test_joined_many_at_once_they_are_in_order(parts, num_samples):
    expected = np.concatenate([part.detach().numpy() for part in parts])
    joined = join_later(parts, num_samples)
    assert joined.dtype == expected.dtype
    assert np.array_equal(joined, expected)


def test_memory_that_is_not_filled_yet_is_not_cast(monkeypatch):
    def empty(shape, dtype):
        array = np.zeros(shape, dtype)
        if array.dtype == np.float32:
            array.view(np.uint32).fill(0x7FA00000)  # a NaN that makes a cast warn
        return array

    monkeypatch.setattr(np, "empty", empty)
    parts = [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)]
    assert (join_later(parts, 8) == 1).all()


def test_bfloat16_joined_many_at_once_is_float32():
    joined = join_later([part.bfloat16() for part in LATER])
    assert joined.dtype == np.float32
    assert np.array_equal(joined, torch.cat([part.bfloat16() for part in LATER]).float().numpy())


def test_outputs_in_memory_that_the_net_uses_again_are_joined_one_by_one():
    buffer, predictions = torch.empty(4, 2), Predictions()
    for part in LATER:
        buffer.copy_(part)
        predictions.append_later(buffer[:], 4)
    assert np.array_equal(predictions.joined(), torch.cat(LATER).numpy())


def test_few_bytes_wait_to_be_joined(monkeypatch):
    monkeypatch.setattr("kerastorch.data.predictions.MAX_WAITING_BYTES", 5 * 32)
    predictions, waiting = Predictions(), []
    for part in LATER[:12]:
        predictions.append_later(part.clone(), 4)
        waiting.append(len(predictions._waiting))
    assert waiting == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    hidden = torch.zeros(10, 4, 8)  # whose parts hold the whole in memory
    predictions = Predictions()
    for part in hidden:
        predictions.append_later(part[:, :2], 4)
    assert not predictions._waiting


def test_one_by_one_and_many_at_once_may_alternate():
    predictions = Predictions()
    for i, part in enumerate(LATER):
        if i % 7 == 5:
            predictions.append(part.numpy(), 4)
        else:
            predictions.append_later(part, 4)
    assert np.array_equal(predictions.joined(), torch.cat(LATER).numpy())


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("part", [torch.zeros(()), torch.zeros(7, 4), torch.zeros(4, 3)], ids=["no axes", "7", "wide"])
def test_what_can_t_be_joined_is_refused_at_its_batch_many_at_once_too(before, part):
    predictions = Predictions()
    for good in LATER[:before]:
        predictions.append_later(good, 4)
    if before or part.shape != (4, 3):
        with pytest.raises(ValueError, match=r"predict\(\) (joins outputs on|can't join outputs of shapes)"):
            predictions.append_later(part, 4)


def test_the_same_outputs_for_a_batch_of_another_size_are_refused():
    predictions = Predictions()
    for part in LATER[:4]:
        predictions.append_later(part, 4)
    with pytest.raises(ValueError, match=r"ndarray\(4, 2\) float32 for a batch of 3"):
        predictions.append_later(LATER[4], 3)
