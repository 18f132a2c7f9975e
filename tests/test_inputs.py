"""Inputs: every kind of data that fit takes trains every loop as a hand-written one does, over the same batches."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import kerastorch as kt
from kerastorch.loops import LOOPS

# All loops agree in test_loops.py; where they are not the point, the others are for the slow part.
mostly_one_loop = pytest.mark.parametrize(
    "loop", ["script", *(pytest.param(loop, marks=pytest.mark.slow) for loop in LOOPS if loop != "script")]
)
ROWS, EPOCHS = 11, 2  # batches of 4, 4 and 3
_draw = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, 3, generator=_draw)
B = torch.randn(ROWS, 2, generator=_draw)
Y = torch.randn(ROWS, 1, generator=_draw)
W = torch.rand(ROWS, generator=_draw) + 0.1
CLASSES = torch.randint(0, 3, (ROWS,), generator=_draw)
LENGTHS = [5, 2, 4, 3, 3, 1, 2, 5, 4, 2, 3]
SEQUENCES = [torch.randn(n, 3, generator=_draw) for n in LENGTHS]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# ---- nets: each tells its inputs apart, so that a swap shows ----


class Plain(nn.Sequential):
    def __init__(self, outputs: int = 1) -> None:
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


class Flat(Plain):
    """One number a row, (N,)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(1)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 1), nn.Linear(2, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) - 2 * self.right(b)


class Nest(Two):
    def forward(self, a: Tensor, rest: dict[str, Any]) -> Tensor:
        return super().forward(a, rest["b"][0]) * rest["scale"]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.classes = nn.Linear(3, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.value(x), self.classes(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 4), nn.Linear(4, 1)

    def forward(self, x: PackedSequence) -> Tensor:
        return self.head(self.rnn(x)[1][0])


# ---- data of other forms ----


class Rows(Dataset[Any]):
    """A map-style Dataset of one's own; row(i) says what an item is."""

    def __init__(self, row: Callable[[int], Any] = lambda i: (X[i], Y[i])) -> None:
        self.row = row

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


class Stream(IterableDataset[Any]):
    """Rows one by one."""

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


class StreamWithLength(Stream):
    def __len__(self) -> int:
        return ROWS


class WholeBatches(Rows):
    """Item i is a batch."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return pairs()[index]


class Anew:
    """An iterable without a length that can be iterated anew."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class OwnBatches:
    """A batch_sampler of uneven, overlapping batches."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[10, 0], [3, 4, 5, 6, 7], [1, 0, 2]])

    def __len__(self) -> int:
        return 3


def doubled_collate(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return 2 * x, y + 1


def packed_collate(items: list[Any]) -> Any:
    return pack_sequence([x for x, _ in items], enforce_sorted=False), torch.stack([y for _, y in items])


def pairs(x: Tensor = X, y: Tensor = Y, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def triples() -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(X.split(4), Y.split(4), W.split(4), strict=True))


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def packed() -> list[tuple[PackedSequence, Tensor]]:
    return [(pack_sequence(SEQUENCES[i : i + 4], enforce_sorted=False), Y[i : i + 4]) for i in range(0, ROWS, 4)]


def from_dict(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["image"], batch["label"]


def from_dict_weighted(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return batch["image"], batch["label"], batch["weight"]


# ---- losses of one's own ----


def size_of(outputs: Tensor, y: None) -> Tensor:
    assert y is None
    return outputs.square().mean()


def of_pair(outputs: Any, y: Any) -> Tensor:
    return mse_loss(outputs[0], y[0]) + cross_entropy(outputs[1], y[1])


def of_dict(outputs: Any, y: Any) -> Tensor:
    return mse_loss(outputs[0], y["value"]) + cross_entropy(outputs[1], y["more"]["classes"])


# ---- the loop by hand: a batch is (inputs of forward, y, sample_weight) ----


def weighted_mse(outputs: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
    if w is None:
        return mse_loss(outputs, y)
    return (mse_loss(outputs, y, reduction="none") * w[:, None]).mean()


def by_hand_batches(kind: "Kind") -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    for batch in kind.batches():
        x, y, w = (*batch, None, None)[:3]
        yield (tuple(x) if isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence) else (x,)), y, w


@dataclass
class Kind:
    """One kind of input.

    data: gives what fit is given, anew: x, or (x, y) under `x_and_y`.   batches: the same, batch by batch, by hand.
    net, loss, by_hand: the net, the loss given to compile, and the loss by hand (outputs, y, sample_weight).
    fit, read: other arguments of fit, and of evaluate and predict.   epochs: how often the data is read.
    """

    data: Callable[[], Any]
    batches: Callable[[], Iterable[Any]] = pairs
    net: Callable[[], nn.Module] = Plain
    loss: Any = "mse"
    by_hand: Callable[[Any, Any, Any], Tensor] = weighted_mse
    fit: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    compile: dict[str, Any] = field(default_factory=dict)
    x_and_y: bool = False
    epochs: int = EPOCHS


def rows(data: Callable[[], Any], **changes: Any) -> Kind:
    """Data that fit cuts into batches itself."""
    return Kind(data, **{"fit": {"batch_size": 4, "shuffle": False}, "read": {"batch_size": 4}, **changes})


def arrays(x: Any, y: Any, **changes: Any) -> Kind:
    return rows(lambda: (x, y), x_and_y=True, **changes)


def classes(x: Any, y: Any, **changes: Any) -> Kind:
    return arrays(
        x,
        y,
        batches=lambda: pairs(X, CLASSES),
        net=lambda: Plain(3),
        loss="cross_entropy",
        by_hand=lambda outputs, y, w: cross_entropy(outputs, y),
        **changes,
    )


def two_inputs(x: Any, **changes: Any) -> Kind:
    return arrays(x, Y, batches=two_input_batches, net=Two, **changes)


def two_input_batches() -> list[Any]:
    return [((a, b), y) for a, b, y in zip(X.split(4), B.split(4), Y.split(4), strict=True)]


NO_TARGETS: dict[str, Any] = {
    "batches": lambda: [(x,) for x in X.split(4)],
    "loss": size_of,
    "by_hand": lambda outputs, y, w: outputs.square().mean(),
}
TWO_HEADS: dict[str, Any] = {"net": TwoHeads, "by_hand": lambda outputs, y, w: of_pair(outputs, y)}
TWO_TARGETS: dict[str, Any] = {
    "batches": lambda: [(x, (y, c)) for x, y, c in zip(X.split(4), Y.split(4), CLASSES.split(4), strict=True)],
    **TWO_HEADS,
}
FRAME = pd.DataFrame(
    {"a": [1, 3, 0, 2, 5, 1, 4, 2, 0, 1, 2], "b": X[:, 1].double().numpy(), "c": X[:, 2].numpy()},
    index=range(50, 50 - ROWS, -1),  # labels of its own, out of order
)
FRAME_X = torch.tensor(FRAME.to_numpy(dtype=np.float32))
NUMPY_BATCHES = [(x.double().numpy(), y.numpy()) for x, y in pairs()]


def weighted_sampler() -> WeightedRandomSampler:
    return WeightedRandomSampler(W.tolist(), 10, generator=torch.Generator().manual_seed(4))


def loader(**arguments: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), **{"batch_size": 4, **arguments})


KINDS = {
    # arrays
    "tensors": arrays(X, Y),
    "numpy float32": arrays(X.numpy(), Y.numpy()),
    "numpy float64": arrays(X.double().numpy(), Y.double().numpy()),
    "numpy x beside tensor y": arrays(X.numpy(), Y),
    "numpy int32 targets": classes(X.numpy(), CLASSES.numpy().astype(np.int32)),
    "numpy uint8 targets": classes(X, CLASSES.numpy().astype(np.uint8)),
    "tensor int32 targets": classes(X, CLASSES.int()),
    "numpy in another order": arrays(np.asfortranarray(X.numpy()), Y.numpy()[::-1][::-1]),
    "lists of numbers": arrays(X.tolist(), Y.tolist()),
    "list of class indices": classes(X.tolist(), CLASSES.tolist()),
    "frames": arrays(pd.DataFrame(X.numpy()), pd.DataFrame(Y.numpy())),
    "frame of ints and floats": arrays(FRAME, Y, batches=lambda: pairs(FRAME_X)),
    "frame and float series": arrays(
        FRAME,
        pd.Series(Y[:, 0].double().numpy(), index=FRAME.index[::-1]),
        batches=lambda: pairs(FRAME_X, Y[:, 0]),
        net=Flat,
    ),
    "frame and int32 series": classes(pd.DataFrame(X.numpy()), pd.Series(CLASSES.numpy().astype(np.int32))),
    "pair": rows(lambda: (X, Y)),
    "pair of numpy": rows(lambda: (X.double().numpy(), Y.double().numpy())),
    "triple": rows(lambda: (X, Y, W), batches=triples),
    "triple of numpy": rows(lambda: (X.numpy(), Y.numpy(), W.double().numpy()), batches=triples),
    "pair with frame": rows(lambda: (FRAME, Y), batches=lambda: pairs(FRAME_X)),
    # several inputs
    "tuple of inputs": two_inputs((X, B)),
    "list of inputs": two_inputs([X, B]),
    "list of numpy inputs": two_inputs([X.numpy(), B.double().numpy()]),
    "dict of inputs": two_inputs({"b": B, "a": X}),
    "dict of frames": two_inputs({"b": pd.DataFrame(B.numpy()), "a": X}),
    "pair of a tuple of inputs": rows(lambda: ((X, B), Y), batches=two_input_batches, net=Two),
    "triple of a dict of inputs": rows(
        lambda: ({"b": B, "a": X}, Y, W),
        batches=lambda: [(x, y, w) for (x, y), (_, _, w) in zip(two_input_batches(), triples(), strict=True)],
        net=Two,
    ),
    "nested inputs": arrays(
        {"rest": {"b": (B, X), "scale": W[:, None]}, "a": X},
        Y,
        batches=lambda: [
            ((a, {"b": (b, a), "scale": w[:, None]}), y)
            for ((a, b), y), w in zip(two_input_batches(), W.split(4), strict=True)
        ],
        net=Nest,
    ),
    # several targets
    "tuple of targets": arrays(X, (Y, CLASSES.int()), loss=of_pair, **TWO_TARGETS),
    "nested dict of targets": arrays(
        X,
        {"value": Y.double().numpy(), "more": {"classes": CLASSES.numpy().astype(np.int16)}},
        loss=of_dict,
        **TWO_TARGETS,
    ),
    "loader of nested targets": Kind(
        lambda: DataLoader(Rows(lambda i: (X[i], {"value": Y[i], "more": {"classes": CLASSES[i]}})), 4),
        loss=of_dict,
        **TWO_TARGETS,
    ),
    # Datasets
    "own Dataset": rows(Rows),
    "TensorDataset": rows(lambda: TensorDataset(X, Y)),
    "TensorDataset with weights": rows(lambda: TensorDataset(X, Y, W), batches=triples),
    "Dataset beside sample_weight": rows(
        Rows,
        batches=triples,
        fit={"batch_size": 4, "shuffle": False, "sample_weight": W.double().numpy()},
    ),
    "Subset": rows(
        lambda: Subset(Rows(), [9, 2, 2, 7, 0]), batches=lambda: pairs(X[[9, 2, 2, 7, 0]], Y[[9, 2, 2, 7, 0]])
    ),
    "Subset of a TensorDataset": rows(
        lambda: Subset(TensorDataset(X, Y), range(2, 9)), batches=lambda: pairs(X[2:9], Y[2:9])
    ),
    "ConcatDataset": rows(lambda: ConcatDataset([TensorDataset(X[:5], Y[:5]), TensorDataset(X[5:], Y[5:])])),
    "StackDataset of dicts": rows(lambda: StackDataset(image=X, label=Y), compile={"unpack": from_dict}),
    "Dataset of dicts": rows(lambda: Rows(lambda i: {"label": Y[i], "image": X[i]}), compile={"unpack": from_dict}),
    "Dataset of dicts with weights": rows(
        lambda: Rows(lambda i: {"label": Y[i], "image": X[i], "weight": W[i]}),
        batches=triples,
        compile={"unpack": from_dict_weighted},
    ),
    "IterableDataset": rows(Stream),
    "IterableDataset with a length": rows(StreamWithLength),
    # loaders
    "loader": Kind(loader),
    "loader that shuffles": Kind(lambda: loader(shuffle=True), batches=lambda: loader(shuffle=True)),
    "loader with a generator": Kind(
        lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(6)),
        batches=lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(6)),
    ),
    "loader with workers and a collate": Kind(
        lambda: DataLoader(Rows(), 4, num_workers=2, collate_fn=doubled_collate),
        batches=lambda: pairs(2 * X, Y + 1),
    ),
    "loader of dicts": Kind(
        lambda: DataLoader(Rows(lambda i: {"label": Y[i], "image": X[i]}), 4), compile={"unpack": from_dict}
    ),
    "loader that drops the last": Kind(lambda: loader(drop_last=True), batches=lambda: pairs()[:2]),
    "loader with a sampler": Kind(
        lambda: loader(sampler=weighted_sampler()), batches=lambda: loader(sampler=weighted_sampler())
    ),
    "loader with a batch_sampler": Kind(
        lambda: DataLoader(TensorDataset(X, Y), batch_sampler=OwnBatches()),
        batches=lambda: [(X[rows], Y[rows]) for rows in OwnBatches()],
    ),
    "loader without batches": Kind(lambda: DataLoader(WholeBatches(), batch_size=None)),
    "loader over a stream": Kind(lambda: DataLoader(StreamWithLength(), 4)),
    "loader of two inputs": Kind(
        lambda: DataLoader(Rows(lambda i: ((X[i], B[i]), Y[i])), 4), batches=two_input_batches, net=Two
    ),
    "loader beside sample_weight": Kind(loader, batches=triples, fit={"sample_weight": W}),
    # iterables of batches
    "list of batches": Kind(pairs),
    "list of a loader": Kind(lambda: list(loader())),
    "list of weighted batches": Kind(triples, batches=triples),
    "iterable": Kind(lambda: Anew(pairs())),
    "list of numpy batches": Kind(lambda: NUMPY_BATCHES),
    "iterable of dicts": Kind(
        lambda: Anew([{"label": y, "image": x} for x, y in pairs()]), compile={"unpack": from_dict}
    ),
    "generator": Kind(lambda: (pair for pair in pairs()), epochs=1),
    "generator over the steps of all epochs": Kind(
        lambda: islice(endless(pairs()), 3 * EPOCHS), fit={"steps_per_epoch": 3}, read={"steps": 3}
    ),
    "endless generator": Kind(
        lambda: endless(pairs()),
        batches=lambda: pairs() + pairs()[:1],
        epochs=1,
        fit={"steps_per_epoch": 4},
        read={"steps": 4},
    ),
    "endless generator of numpy": Kind(lambda: endless(NUMPY_BATCHES), fit={"steps_per_epoch": 3}, read={"steps": 3}),
    # sequences of unequal lengths
    "packed sequences": Kind(packed, batches=packed, net=Recurrent),
    "loader of packed sequences": Kind(
        lambda: DataLoader(Rows(lambda i: (SEQUENCES[i], Y[i])), 4, collate_fn=packed_collate),
        batches=packed,
        net=Recurrent,
    ),
    # no targets
    "a tensor without targets": rows(lambda: X, **NO_TARGETS),
    "a tuple without targets": rows(lambda: (X,), **NO_TARGETS),
    "batches without targets": Kind(lambda: [(x,) for x in X.split(4)], **NO_TARGETS),
    "bare batches": Kind(lambda: Anew(X.split(4)), **NO_TARGETS),
    "loader without targets": Kind(lambda: DataLoader(Rows(lambda i: X[i]), 4), **NO_TARGETS),
    "two inputs without targets": Kind(
        lambda: [(x,) for x, _ in two_input_batches()],
        **{**NO_TARGETS, "batches": lambda: [(x,) for x, _ in two_input_batches()], "net": Two},
    ),
    "dict batches without targets": Kind(
        lambda: [{"b": b, "a": a} for (a, b), _ in two_input_batches()],
        **{**NO_TARGETS, "batches": lambda: [(x,) for x, _ in two_input_batches()], "net": Two},
    ),
}


def seed(seed: int) -> None:
    """torch.manual_seed for the CPU alone, which is much quicker."""
    torch.default_generator.manual_seed(seed)


def make_net(kind: Kind) -> nn.Module:
    seed(1)
    return kind.net()


def make_model(kind: Kind, loop: str) -> kt.Model:
    model = kt.Model(make_net(kind), device="cpu")
    model.compile(kind.loss, sgd, loop=loop, **kind.compile)
    return model


def given(kind: Kind) -> tuple[Any, Any]:
    return kind.data() if kind.x_and_y else (kind.data(), None)


def train_by_hand(kind: Kind, net: nn.Module) -> list[float]:
    """Train; return the mean loss of each epoch."""
    optimizer, losses = sgd(net.parameters()), []
    batches = kind.batches()
    for _ in range(kind.epochs):
        total, count = 0.0, 0
        for x, y, w in by_hand_batches(Kind(kind.data, batches=lambda: batches)):
            outputs = net(*x)
            loss = kind.by_hand(outputs, y, w)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            n = len(outputs[0] if isinstance(outputs, tuple) else outputs)
            total, count = total + loss.item() * n, count + n
        losses.append(total / count)
    return losses


@mostly_one_loop
@pytest.mark.parametrize("name", KINDS)
def test_fit_on_every_kind_of_input_is_the_loop_by_hand_to_the_bit(name: str, loop: str) -> None:
    kind = KINDS[name]
    net, model = make_net(kind), make_model(kind, loop)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    seed(5)
    losses = train_by_hand(kind, net)
    drawn = torch.get_rng_state()
    seed(5)
    x, y = given(kind)
    history = model.fit(x, y, epochs=kind.epochs, verbose=0, **kind.fit)
    for key, value in net.state_dict().items():
        assert torch.equal(model.net.state_dict()[key], value), key
        assert not torch.equal(before[key], value), key
    assert history.history == {"loss": pytest.approx(losses, rel=1e-6)}
    if name == "loader that shuffles":
        assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("name", KINDS)
def test_evaluate_and_predict_on_every_kind_of_input_agree_with_torch_in_every_loop(name: str) -> None:
    kind = KINDS[name]
    net = make_net(kind)
    seed(5)
    losses, outputs, sizes = [], [], []
    with torch.no_grad():
        for x, y, w in by_hand_batches(kind):
            outputs.append(net(*x))
            losses.append(kind.by_hand(outputs[-1], y, w).item())
            sizes.append(len(outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]))
    weights = {"sample_weight": kind.fit["sample_weight"]} if "sample_weight" in kind.fit else {}
    mean = float(np.average(losses, weights=sizes))
    several = isinstance(outputs[0], tuple)
    expected = [torch.cat(parts).numpy() for parts in (zip(*outputs, strict=True) if several else [outputs])]
    for loop in LOOPS:
        model = make_model(kind, loop)
        x, y = given(kind)
        seed(5)
        assert model.evaluate(x, y, verbose=0, **kind.read, **weights) == {"loss": pytest.approx(mean, rel=1e-6)}
        x, _ = given(kind)
        seed(5)
        predictions = model.predict((x,) if kind.x_and_y else x, verbose=0, **kind.read)
        assert (type(predictions) is tuple) is several
        for part, expected_part in zip(predictions if several else (predictions,), expected, strict=True):
            assert np.array_equal(part, expected_part)


DRAWING = ("loader that shuffles", "loader with a generator", "loader with a sampler")


@pytest.mark.parametrize("name", [name for name in KINDS if "generator" not in name and name not in DRAWING])
def test_every_kind_of_input_validates_the_same_in_each_epoch(name: str) -> None:
    kind = KINDS[name]
    model = make_model(kind, "script")
    model.optimizer.param_groups[0]["lr"] = 0.0
    x, y = given(kind)
    arguments = {key: value for key, value in kind.fit.items() if key in ("batch_size", "shuffle")}
    sizes = {"validation_batch_size": 4} if "batch_size" in arguments else {}
    validation_data = x if y is None else (x, y)
    history = model.fit(*given(kind), epochs=2, validation_data=validation_data, verbose=0, **arguments, **sizes)
    expected = model.evaluate(*given(kind), verbose=0, **kind.read)["loss"]
    assert history.history["val_loss"] == [expected, expected]


# ---- what is refused ----


def refuses(data: Any, message: str, error: type[Exception] = ValueError, **arguments: Any) -> None:
    """Refused before a weight moves or a hook of an epoch fires."""
    model = kt.Model(make_net(KINDS["tensors"]), device="cpu")
    model.compile("mse", sgd)
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    x, y = data if isinstance(data, tuple) else (data, None)
    with pytest.raises(error, match=message):
        model.fit(x, y, verbose=0, **arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.net.state_dict().items())
    assert model.history.epoch == []


@pytest.mark.parametrize("column", [["a", "b"] * 5 + ["c"], pd.date_range("2020", periods=ROWS), [{}] * ROWS])
def test_a_frame_with_a_column_of_text_dates_or_objects_is_refused(column: Any) -> None:
    frame = FRAME.assign(b=column)
    refuses(
        (frame, Y), r"data must be numbers, got an array of dtype object and shape \(11, 3\): encode text", TypeError
    )


def test_a_series_of_text_targets_is_refused() -> None:
    labels = pd.Series(["cat", "dog"] * 5 + ["cat"], dtype=object)
    refuses((X, labels), "data must be numbers, got an array of dtype object", TypeError)


def one_pass() -> Iterator[Any]:
    yield from pairs()


@pytest.mark.parametrize(
    "make",
    [one_pass, lambda: iter(pairs()), lambda: zip(X.split(4), Y.split(4), strict=True), lambda: map(tuple, pairs())],
)
def test_an_iterator_for_two_epochs_is_refused_before_the_first_step(make: Callable[[], Any]) -> None:
    refuses(make(), r"an iterator, which can be read once, but 2 epochs .* or steps_per_epoch", epochs=2)


def test_a_function_that_makes_a_generator_is_refused_as_no_data() -> None:
    refuses(one_pass, "can't read a function as data", TypeError)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("steps", "dry"), [(2, "after 1 of 2"), (3, "after 0 of 3"), (5, "after 3 of 5")])
def test_a_generator_that_runs_dry_within_its_steps_is_an_error_in_every_loop(loop: str, steps: int, dry: str) -> None:
    model = make_model(KINDS["tensors"], loop)
    with pytest.raises(ValueError, match=f"training data ran dry {dry} steps, and an iterator can't start again"):
        model.fit(one_pass(), epochs=2, steps_per_epoch=steps, verbose=0)
    assert model.history.epoch == ([] if steps == 5 else [0])


@pytest.mark.parametrize("loop", LOOPS)
def test_an_iterable_that_gives_nothing_the_second_time_is_an_error_and_not_an_empty_epoch(loop: str) -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = one_pass()

        def __iter__(self) -> Iterator[Any]:
            return self.batches

    model = make_model(KINDS["tensors"], loop)
    with pytest.raises(ValueError, match="training data gave no batches"):
        model.fit(Once(), epochs=2, verbose=0)
    assert model.history.epoch == [0]


@pytest.mark.parametrize("steps", [None, 1])
@pytest.mark.parametrize("make", [one_pass, lambda: endless(pairs())])
def test_a_generator_that_must_validate_two_epochs_is_refused(make: Callable[[], Any], steps: int | None) -> None:
    message = r"validation_data is an iterator, which can be read once, but 2 epochs validate"
    refuses((X, Y), message, epochs=2, validation_data=make(), validation_steps=steps)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_generator_validates_one_epoch(loop: str) -> None:
    model = make_model(KINDS["tensors"], loop)
    history = model.fit(X, Y, validation_data=endless(pairs()), validation_steps=3, verbose=0)
    assert history.history["val_loss"] == [model.evaluate(X, Y, batch_size=4, verbose=0)["loss"]]


@pytest.mark.parametrize("loop", LOOPS)
def test_an_endless_iterable_validates_each_epoch_from_its_beginning(loop: str) -> None:
    class Endless:
        def __iter__(self) -> Iterator[Any]:
            return endless(pairs())

    model = make_model(KINDS["tensors"], loop)
    model.optimizer.param_groups[0]["lr"] = 0.0
    history = model.fit(X, Y, epochs=3, validation_data=Endless(), validation_steps=2, verbose=0)
    assert history.history["val_loss"] == [model.evaluate(X[:8], Y[:8], batch_size=4, verbose=0)["loss"]] * 3


@pytest.mark.parametrize("verb", ["fit", "evaluate"])
@pytest.mark.parametrize("make", [loader, Rows, pairs, one_pass])
def test_targets_beside_batches_are_refused(verb: str, make: Callable[[], Any]) -> None:
    model = make_model(KINDS["tensors"], "script")
    if make is pairs:  # a list beside y is a list of inputs
        with pytest.raises(ValueError, match=r"samples in x"):
            getattr(model, verb)(make(), Y, verbose=0)
    else:
        with pytest.raises(ValueError, match=r"got y beside a \w+: its batches hold their own targets"):
            getattr(model, verb)(make(), Y, verbose=0)


@pytest.mark.parametrize("make", [Stream, pairs, one_pass])
def test_sample_weight_beside_batches_without_rows_to_count_is_refused(make: Callable[[], Any]) -> None:
    refuses(make(), r"can't be matched with a \w+, which has no rows to count", sample_weight=W)


def test_a_list_of_arrays_alone_is_refused_as_two_things_at_once() -> None:
    refuses([X, X], "a list of arrays alone, which could be inputs and targets, several inputs")


@pytest.mark.parametrize("unpack", [lambda batch: batch["image"], from_dict, from_dict_weighted])
def test_arrays_of_validation_do_not_go_through_unpack(unpack: Callable[[Any], Any]) -> None:
    model = kt.Model(make_net(KINDS["tensors"]), device="cpu")
    model.compile(lambda outputs, y: (outputs - (0 if y is None else y)).square().mean(1), sgd, unpack=unpack)
    data = Rows(lambda i: {"label": Y[i], "image": X[i], "weight": W[i]})
    history = model.fit(data, validation_data=(X, Y), verbose=0)
    assert history.history["val_loss"] == [pytest.approx(mse_loss(model.net(X), Y).item(), rel=1e-6)]
