"""Choosing a device, nested batches, and random states that are set and put back."""

import contextlib
import random
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from kerastorch.device import (
    CopyStream,
    describe,
    leaves,
    map_nested,
    move_to_device,
    num_samples,
    output_name,
    pick_output,
    preserved_random_state,
    resolve_device,
    set_seed,
    try_all_gpus,
    try_gpu,
)

Pair = namedtuple("Pair", ["image", "text"])
META = torch.device("meta")  # a device that every machine has, and that is not the CPU
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def packed() -> PackedSequence:
    return pack_sequence([torch.ones(3), torch.ones(2), torch.ones(2), torch.ones(1)])


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


# ---- choosing ----


def test_try_gpu_falls_back_to_the_cpu_beyond_the_last_gpu() -> None:
    assert try_gpu(torch.cuda.device_count()) == torch.device("cpu")


def test_try_gpu_refuses_a_negative_index() -> None:
    with pytest.raises(ValueError, match="index from 0, got -1"):
        try_gpu(-1)


def test_gpus_are_counted_from_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert try_gpu() == torch.device("cuda", 0)
    assert try_gpu(1) == torch.device("cuda", 1)
    assert try_gpu(2) == torch.device("cpu")
    assert try_all_gpus() == [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert try_all_gpus() == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("has_cuda", "has_mps", "expected"),
    [(True, True, "cuda:0"), (False, True, "mps:0"), (False, False, "cpu")],
)
def test_auto_takes_cuda_then_mps_then_cpu(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool, has_mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_cpu_is_taken_as_named(device: str | torch.device) -> None:
    assert resolve_device(device) == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", None])
def test_unknown_device_is_refused_with_the_known_forms(device: Any) -> None:
    with pytest.raises(ValueError, match=r"is not known\. Use 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'") as raised:
        resolve_device(device)
    assert repr(device) in str(raised.value)


@pytest.mark.parametrize("device", ["cuda:1", torch.device("cuda", 7)])
def test_absent_gpu_is_refused_with_the_number_there_is(
    monkeypatch: pytest.MonkeyPatch, device: str | torch.device
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda") == torch.device("cuda", 0)  # with the index that parameters report
    with pytest.raises(ValueError, match=rf"{device}' is not there: this machine has 1 CUDA devices\. Try 'auto'"):
        resolve_device(device)


def test_absent_mps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'mps' is not there"):
        resolve_device("mps")


# ---- nests ----


def test_map_nested_keeps_tuples_named_tuples_lists_and_dicts() -> None:
    value = {"a": (1, [2, 3]), "b": Pair(4, (5,)), "c": OrderedDict(d=6)}
    result = map_nested(lambda leaf: leaf * 10, value)
    assert result == {"a": (10, [20, 30]), "b": Pair(40, (50,)), "c": {"d": 60}}
    assert type(result["b"]) is Pair


def test_map_nested_hands_a_packed_sequence_over_whole() -> None:
    whole = packed()
    assert map_nested(lambda leaf: leaf is whole, (whole, 1)) == (True, False)


def test_leaves_come_in_order_and_a_packed_sequence_is_one() -> None:
    whole = packed()
    found = list(leaves({"a": (1, [2]), "b": Pair(3, {"c": None}), "d": whole}))
    assert found[:4] == [1, 2, 3, None]
    assert found[4] is whole
    assert len(found) == 5


def test_move_to_device_moves_every_tensor_of_a_nest() -> None:
    x = torch.ones(2)
    moved = move_to_device({"a": [x, (x,)], "b": Pair(x, "caption"), "c": None, "d": 3}, META)
    assert moved["a"][0].device == moved["a"][1][0].device == moved["b"].image.device == META
    assert type(moved["b"]) is Pair
    assert (moved["b"].text, moved["c"], moved["d"]) == ("caption", None, 3)
    assert x.device.type == "cpu"


def test_move_to_device_moves_a_packed_sequence_but_not_its_batch_sizes() -> None:
    moved = move_to_device((packed(), None), META)[0]
    assert isinstance(moved, PackedSequence)
    assert moved.data.device == META
    assert moved.batch_sizes.device.type == "cpu"


def test_move_to_device_copies_nothing_that_is_there_already() -> None:
    x, cpu = torch.ones(2), torch.device("cpu")
    assert move_to_device(x, cpu) is x
    assert move_to_device([x], cpu)[0] is x
    assert move_to_device(None, cpu) is None


@pytest.mark.cuda
@needs_cuda
def test_pinned_tensors_arrive_whole_on_the_gpu() -> None:
    x = torch.arange(1000.0).pin_memory()
    moved = move_to_device((x, packed()), torch.device("cuda", 0))
    assert moved[0].is_cuda
    assert moved[1].data.is_cuda
    assert torch.equal(moved[0].cpu(), x)


@pytest.mark.parametrize(
    ("x", "n"),
    [
        (torch.ones(5, 2), 5),
        ((torch.ones(4), torch.ones(9)), 4),
        ({"scale": torch.tensor(2.0), "ids": torch.ones(6, 3)}, 6),
        ([["text", torch.ones(3)]], 3),
        (packed(), 4),
        (Pair(None, packed()), 4),
    ],
)
def test_num_samples_is_the_first_dimension_of_the_first_tensor_that_has_one(x: Any, n: int) -> None:
    assert num_samples(x) == n


@pytest.mark.parametrize(
    ("x", "text"),
    [(torch.tensor(1.0), r"Tensor\(\) float32"), (("a", 1), r"\(str, int\)"), ({}, r"\{\}")],
)
def test_num_samples_without_a_batch_dimension_describes_what_it_met(x: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"first, batch dimension; got {text}"):
        num_samples(x)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.long), "Tensor(2, 3) int64"),
        (np.zeros(4, np.float32), "ndarray(4,) float32"),
        ({"a": torch.zeros(1), "b": "text"}, "{'a': Tensor(1,) float32, 'b': str}"),
        ((None, [1]), "(NoneType, [int])"),
        ([1, 2, 3, 4, 5], "[int, int, int, int, ...]"),
        (packed(), "PackedSequence"),
    ],
)
def test_describe_gives_shapes_and_dtypes_else_the_type(value: Any, text: str) -> None:
    assert describe(value) == text


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [({"a": 1, "b": 2}, "b", 2), ((1, 2), 1, 2), ([1, 2], 0, 1), (Pair(1, 2), "text", 2), (Pair(1, 2), 0, 1)],
)
def test_pick_output_takes_a_key_an_index_or_a_field(value: Any, key: Any, expected: int) -> None:
    assert pick_output(value, key, "the outputs") == expected


@pytest.mark.parametrize(
    ("value", "key", "message"),
    [
        ({"a": 1}, "b", r"'b' needs the outputs as a dict with the key 'b', but they are \{'a': int\}"),
        ((1, 2), 2, r"'output_2' needs the outputs as a tuple with index 2, but they are \(int, int\)"),
        (torch.ones(2, 3), 0, r"'output_0' needs the outputs as a tuple with index 0, but they are Tensor\(2, 3\)"),
        (Pair(1, 2), "sound", r"'sound' needs the outputs as a dict with the key 'sound'"),
    ],
)
def test_pick_output_says_what_was_needed_and_met(value: Any, key: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pick_output(value, key, "the outputs")


def test_output_name_is_the_key_or_counts() -> None:
    assert (output_name("digit"), output_name(1)) == ("digit", "output_1")


# ---- random state ----


def test_set_seed_makes_python_numpy_and_torch_repeat() -> None:
    with preserved_random_state():
        set_seed(3)
        first = draws()
        assert first != draws()
        set_seed(3)
        assert draws() == first
        set_seed(4)
        assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_set_seed_draws_what_seeding_each_by_hand_draws() -> None:
    with preserved_random_state():
        set_seed(2**32 - 1)
        mine = draws()
        random.seed(2**32 - 1)
        np.random.seed(2**32 - 1)
        torch.manual_seed(2**32 - 1)
        assert draws() == mine


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "got -1"),
        (2**32, ValueError, "got 4294967296"),
        (1.5, TypeError, r"got 1\.5 \(float\)"),
        (True, TypeError, r"got True \(bool\)"),
        ("0", TypeError, r"got '0' \(str\)"),
    ],
)
def test_set_seed_refuses_what_numpy_could_not_take(seed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"seed.* an int.*{message}|seed must be at least 0, got -1"):
        set_seed(seed)


def test_preserved_random_state_puts_back_python_numpy_and_torch() -> None:
    with preserved_random_state():
        set_seed(0)
        expected = draws()
        set_seed(0)
        with preserved_random_state():
            assert draws() == expected
            torch.randn(7)  # leaves a spare normal number in the generator
            random.gauss(0, 1)
            np.random.randn()
        assert draws() == expected


def test_preserved_random_state_puts_back_after_an_exception() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with contextlib.suppress(KeyError), preserved_random_state():
        set_seed(99)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


@pytest.mark.cuda
@needs_cuda
def test_preserved_random_state_puts_back_cuda() -> None:
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    with preserved_random_state():
        torch.rand(3, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)


# ---- copies to a GPU ----


class FakeStream:
    """Notes what is asked of it, in the order of all that is asked."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def wait_stream(self, other: "FakeStream") -> None:
        self.notes.append(f"{self.name} waits for {other.name}")


class FakeGPU:
    """Stands for torch.cuda, with the meta device as its memory; notes: what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, can_pin: bool = True) -> None:
        self.notes: list[str] = []
        self.can_pin = can_pin
        self.pinned: list[torch.Tensor] = []
        self.marks = 0
        self.side, self.compute = FakeStream("side", self.notes), FakeStream("compute", self.notes)
        self.current = self.compute
        monkeypatch.setattr("kerastorch.device.side_stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.switched)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: any(tensor is one for one in self.pinned))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *parts: self.record_stream(*parts))
        monkeypatch.setattr(torch.Tensor, "to", self.to(torch.Tensor.to))
        monkeypatch.setattr(torch, "empty_like", self.empty_like(torch.empty_like))

    @contextlib.contextmanager
    def switched(self, stream: FakeStream) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before

    def event(self) -> Any:
        gpu, number = self, self.marks
        self.marks += 1

        class Event:
            def record(self, stream: FakeStream) -> None:
                gpu.notes.append(f"mark {number} on {stream.name}")

            def synchronize(self) -> None:
                gpu.notes.append(f"host waits for mark {number}")

        return Event()

    def record_stream(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        self.notes.append(f"{tuple(tensor.shape)} is used on {stream.name}")

    def to(self, real: Any) -> Any:
        def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
            how = "sent" if non_blocking else "copied"
            self.notes.append(f"{tuple(tensor.shape)} {how} on {self.current.name}")
            assert not non_blocking or tensor.is_pinned()
            return real(tensor, device)

        return to

    def empty_like(self, real: Any) -> Any:
        def empty_like(tensor: torch.Tensor, pin_memory: bool) -> torch.Tensor:
            assert pin_memory
            if not self.can_pin:
                raise RuntimeError("no more memory may be pinned")
            self.pinned.append(real(tensor))
            return self.pinned[-1]

        return empty_like


SMALL, LARGE = torch.arange(4.0), torch.arange(2.0**19).reshape(2**9, 2**10)


def test_a_small_batch_is_pinned_and_sent_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    x, y, nothing, text = CopyStream(META)((SMALL, [SMALL[:2]], None, "text"))
    assert gpu.notes == ["(4,) sent on compute", "(2,) sent on compute"]
    assert x.device == y[0].device == META
    assert (nothing, text) == (None, "text")
    assert torch.equal(gpu.pinned[0], SMALL)


def test_a_pinned_tensor_is_sent_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    gpu.pinned.append(SMALL)
    CopyStream(META)(SMALL)
    assert gpu.notes == ["(4,) sent on compute"]
    assert len(gpu.pinned) == 1


def test_where_no_memory_can_be_pinned_the_copy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch, can_pin=False)
    assert CopyStream(META)(SMALL).device == META
    assert gpu.notes == ["(4,) copied on compute"]


def test_what_is_on_the_device_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    there = torch.empty(2**20, device=META)
    assert CopyStream(META)((there, None))[0] is there
    assert gpu.notes == []


def test_a_large_batch_is_sent_beside_the_work_that_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is not used again before the work on it, which begins when all of it is there."""
    gpu = FakeGPU(monkeypatch)
    CopyStream(META)({"a": LARGE, "b": SMALL})
    assert gpu.notes == [
        "mark 0 on compute",
        "(512, 1024) sent on side",
        "(512, 1024) is used on compute",
        "(4,) sent on side",
        "(4,) is used on compute",
        "compute waits for side",
    ]


def test_the_host_is_two_large_batches_ahead_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    copies = CopyStream(META)
    for _ in range(4):
        copies(LARGE)
        copies(SMALL)
    waits = [note for note in gpu.notes if "mark" in note]
    assert waits == [
        *("mark 0 on compute", "mark 1 on compute"),
        *("host waits for mark 0", "mark 2 on compute", "host waits for mark 1", "mark 3 on compute"),
    ]


def test_tensors_of_other_kinds_are_moved_as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stream of the work, beside large ones as well."""
    gpu = FakeGPU(monkeypatch)
    learnt, sparse = torch.ones(3, requires_grad=True), torch.eye(2).to_sparse()
    moved = CopyStream(META)((LARGE, learnt, sparse))
    assert all(part.device == META for part in moved)
    assert moved[1].requires_grad
    assert "(3,) copied on compute" in gpu.notes
    assert "(2, 2) copied on compute" in gpu.notes


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("rows", [4, 2**11], ids=["small", "large"])
@pytest.mark.parametrize("is_pinned", [False, True])
def test_on_cuda_batches_are_right_however_far_the_host_is_ahead(rows: int, is_pinned: bool) -> None:
    """Each is written over on the CPU once it is sent, and its memory on the GPU is free once it is used."""
    device, seen = torch.device("cuda", 0), []
    copies, weight = CopyStream(device), torch.randn(1024, 1024, device=device)
    buffer = torch.empty(rows, 1024)
    for i in range(60):
        batch = torch.full((rows, 1024), float(i)).pin_memory() if is_pinned else buffer.fill_(i)
        x, y = copies((batch, torch.full((rows,), i)))
        for _ in range(20):
            weight = torch.tanh(weight @ weight)  # work that the host does not wait for
        seen.append(torch.stack([*torch.aminmax(x), *torch.aminmax(y.float())]))
        del x, y, batch
    assert torch.equal(torch.stack(seen).cpu(), torch.arange(60.0)[:, None].expand(60, 4))


@pytest.mark.cuda
@needs_cuda
def test_on_cuda_layouts_and_dtypes_are_those_of_a_plain_copy() -> None:
    device = torch.device("cuda", 0)
    copies, values = CopyStream(device), torch.randn(64, 4, 32, 32)
    kinds = [values, values.to(memory_format=torch.channels_last), values.transpose(1, 3), values[::2, :, ::2]]
    kinds += [values.half(), values > 0, values[:1].expand(64, 4, 32, 32), values[0, 0, 0, 0], values[:0]]
    for tensor in kinds:
        moved, plain = copies(tensor), tensor.to(device)
        assert (moved.dtype, moved.stride()) == (plain.dtype, plain.stride())
        assert torch.equal(moved, plain)
