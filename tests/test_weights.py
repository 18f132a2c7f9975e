"""sample_weight, class_weight and weighted_metrics through Model, against a loss weighted by hand: sum(w * l) / N."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import kerastorch as kt
from kerastorch.callbacks import LambdaCallback
from kerastorch.loops import LOOPS

# All loops agree in test_loops.py; where they are not the point, the others are for the slow part.
mostly_one_loop = pytest.mark.parametrize(
    "loop", ["script", *(pytest.param(loop, marks=pytest.mark.slow) for loop in LOOPS if loop != "script")]
)
N, BATCH = 10, 4
X = torch.linspace(-1, 1, N * 3).reshape(N, 3).cos()
CLASSES = torch.arange(N) % 3
YES = (torch.arange(N) % 2).float()[:, None]
VALUES = X.sum(1, keepdim=True) ** 2
W = torch.linspace(0.25, 2.0, N)
OWN = torch.linspace(3.0, 1.0, N)

TARGETS = {
    "integer": ("cross_entropy", CLASSES, CLASSES),
    "one-hot": ("cross_entropy", F.one_hot(CLASSES, 3).float(), CLASSES),
    "binary": ("bce_with_logits", YES, YES.long().flatten()),
}


class Rows(Dataset):
    def __init__(self, y=CLASSES):
        self.y = y

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], self.y[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, CLASSES, strict=True))


class OwnLoader(DataLoader):
    pass


def as_dict(items):
    x, y = default_collate(items)
    return {"x": x, "y": y}


def unpack(batch):
    return batch["x"], batch["y"]


def make_net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))


def make_model(loss="cross_entropy", loop="script", outputs=3, **arguments):
    model = kt.Model(make_net(outputs), device="cpu")
    model.compile(loss, lambda parameters: torch.optim.SGD(parameters, 0.5), loop=loop, **arguments)
    return model


def losses_of(loss, outputs, y):
    """One value per sample, as torch gives it."""
    if loss == "cross_entropy":
        return F.cross_entropy(outputs, y, reduction="none")
    if loss == "bce_with_logits":
        return F.binary_cross_entropy_with_logits(outputs, y, reduction="none")
    return F.mse_loss(outputs, y, reduction="none")


def train_by_hand(batches, loss="cross_entropy", outputs=3):
    """Plain SGD on sum(w * l) / N over batches (x, y, w); returns the weights and the epoch's loss."""
    net = make_net(outputs)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    loss_sum = 0.0
    for x, y, w in batches:
        losses = losses_of(loss, net(x), y)
        batch_loss = (losses * w.reshape(-1, *[1] * (losses.dim() - 1))).sum() / losses.numel()
        batch_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += batch_loss.item() * len(x)
    return net.state_dict(), loss_sum / sum(len(x) for x, _, _ in batches)


def cut(y=CLASSES, w=W, order=range(N)):
    """The rows in batches (x, y, w), in the order given."""
    order = torch.tensor(list(order))
    return [(X[i], y[i], w[i]) for i in order.split(BATCH)]


def shuffled(seed):
    """The order in which a shuffling loader reads the rows."""
    torch.manual_seed(seed)
    return [int(i) for (batch,) in DataLoader(TensorDataset(torch.arange(N)), BATCH, shuffle=True) for i in batch]


def assert_trained(model, history, expected):
    weights, loss = expected
    for name, value in weights.items():
        assert torch.equal(model.net.state_dict()[name], value), name
    assert history.history["loss"][0] == pytest.approx(loss, rel=1e-6)


# data -> (fit's arguments, the rows in the order they are read, compile's arguments)
FORMS = {
    "arrays": lambda: ({"x": X, "y": CLASSES, "batch_size": BATCH, "shuffle": False}, range(N), {}),
    "numpy": lambda: ({"x": X.numpy(), "y": CLASSES.numpy(), "batch_size": BATCH, "shuffle": False}, range(N), {}),
    "arrays, shuffled": lambda: ({"x": X, "y": CLASSES, "batch_size": BATCH}, shuffled(5), {}),
    "Dataset": lambda: ({"x": Rows(), "batch_size": BATCH, "shuffle": False}, range(N), {}),
    "Dataset, shuffled": lambda: ({"x": Rows(), "batch_size": BATCH}, shuffled(5), {}),
    "loader": lambda: ({"x": DataLoader(Rows(), BATCH)}, range(N), {}),
    "loader, shuffled": lambda: ({"x": DataLoader(Rows(), BATCH, shuffle=True)}, shuffled(5), {}),
    "loader, workers": lambda: ({"x": DataLoader(Rows(), BATCH, shuffle=True, num_workers=2)}, shuffled(5), {}),
    "loader, batch_sampler": lambda: (
        {"x": DataLoader(Rows(), batch_sampler=BatchSampler(SequentialSampler(range(N)), BATCH, False))},
        range(N),
        {},
    ),
    "loader, collate and unpack": lambda: (
        {"x": DataLoader(Rows(), BATCH, shuffle=True, collate_fn=as_dict)},
        shuffled(5),
        {"unpack": unpack},
    ),
    "loader, collate, unpack and workers": lambda: (
        {"x": DataLoader(Rows(), BATCH, shuffle=True, collate_fn=as_dict, num_workers=2)},
        shuffled(5),
        {"unpack": unpack},
    ),
}


@mostly_one_loop
@pytest.mark.parametrize("form", FORMS)
def test_sample_weight_trains_to_the_bit_as_by_hand(form, loop):
    arguments, order, compile_arguments = FORMS[form]()
    model = make_model(loop=loop, **compile_arguments)
    torch.manual_seed(5)
    history = model.fit(**arguments, sample_weight=W, verbose=0)
    assert_trained(model, history, train_by_hand(cut(order=order)))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", TARGETS)
def test_sample_and_class_weights_and_those_of_the_batch_multiply(kind, loop):
    loss, y, classes = TARGETS[kind]
    outputs = 1 if kind == "binary" else 3
    class_weight = {0: 0.5, 1: 3.0}
    by_class = torch.tensor([class_weight.get(int(c), 1.0) for c in classes])
    cases = (
        ({"class_weight": class_weight}, TensorDataset(X, y), by_class),
        ({"class_weight": class_weight, "sample_weight": W}, TensorDataset(X, y), by_class * W),
        ({}, TensorDataset(X, y, OWN), OWN),
        ({"class_weight": class_weight, "sample_weight": W}, TensorDataset(X, y, OWN), OWN * W * by_class),
    )
    for arguments, rows, weights in cases:
        model = make_model(loss, loop, outputs)
        history = model.fit(DataLoader(rows, BATCH), **arguments, verbose=0)
        weights_by_hand, loss_by_hand = train_by_hand(cut(y, weights), loss, outputs)
        for name, value in weights_by_hand.items():
            torch.testing.assert_close(model.net.state_dict()[name], value, rtol=1e-6, atol=1e-7)
        assert history.history["loss"][0] == pytest.approx(loss_by_hand, rel=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_class_weight_trains_to_the_bit_as_by_hand(loop):
    for kind, (loss, y, classes) in TARGETS.items():
        outputs = 1 if kind == "binary" else 3
        model = make_model(loss, loop, outputs)
        history = model.fit(X, y, batch_size=BATCH, shuffle=False, class_weight={0: 0.5, 1: 3.0}, verbose=0)
        weights = torch.tensor([0.5, 3.0, 1.0])[classes]
        assert_trained(model, history, train_by_hand(cut(y, weights), loss, outputs))


def test_class_weight_weighs_training_alone():
    model = make_model()
    history = model.fit(X, CLASSES, validation_data=(X, CLASSES), class_weight={0: 50.0}, verbose=0)
    by_hand = F.cross_entropy(model.net(X), CLASSES).item()
    assert history.history["val_loss"][0] == pytest.approx(by_hand, rel=1e-6)


def test_weights_in_the_validation_data_weigh_val_loss():
    model = make_model()
    history = model.fit(X, CLASSES, validation_data=(X, CLASSES, W), verbose=0)
    by_hand = (F.cross_entropy(model.net(X), CLASSES, reduction="none") * W).sum() / N
    assert history.history["val_loss"][0] == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_evaluate_and_the_batch_verbs_take_weights(loop):
    model = make_model(loop=loop)
    by_hand = ((F.cross_entropy(model.net(X), CLASSES, reduction="none") * W).sum() / N).item()
    for data in ((X, CLASSES), (Rows(),), (DataLoader(Rows(), BATCH),)):
        assert model.evaluate(*data, sample_weight=W, verbose=0)["loss"] == pytest.approx(by_hand, rel=1e-6)
    assert model.test_on_batch(X, CLASSES, W)["loss"] == pytest.approx(by_hand, rel=1e-6)
    by_class = torch.tensor([2.0, 1.0, 1.0])[CLASSES]
    logs = model.train_on_batch(X, CLASSES, W, class_weight={0: 2.0})
    weights, loss = train_by_hand([(X, CLASSES, W * by_class)])
    assert logs["loss"] == pytest.approx(loss, rel=1e-6)
    assert all(torch.equal(model.net.state_dict()[name], value) for name, value in weights.items())


@mostly_one_loop
@pytest.mark.parametrize("form", ["Dataset, shuffled", "loader, shuffled", "loader, workers"])
def test_weights_leave_batches_and_random_state_as_they_are_without(form, loop):
    def train(**weights):
        arguments, _, _ = FORMS[form]()
        seen, model = [], make_model(loop=loop)
        model.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        torch.manual_seed(9)
        model.fit(**arguments, **weights, epochs=2, verbose=0)
        return seen, torch.get_rng_state()

    (plain, plain_state), (weighted, state) = train(), train(sample_weight=W)
    assert all(torch.equal(a, b) for a, b in zip(weighted, plain, strict=True))
    assert torch.equal(state, plain_state)


def mean_absolute(outputs, y):
    """A loss of one's own that gives a value per sample."""
    return (outputs - y).abs().mean(1)


class Cubed(nn.Module):
    """A loss without a reduction that gives values per sample."""

    def forward(self, outputs, y):
        return (outputs - y).abs().pow(3).flatten()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("loss", [mean_absolute, Cubed()], ids=["function", "module"])
def test_losses_without_a_reduction_that_give_values_per_sample_are_weighted(loss, loop):
    model = make_model(loss, loop, 1)
    by_hand = ((loss(model.net(X), VALUES) * W).sum() / N).item()
    assert model.fit(X, VALUES, sample_weight=W, verbose=0).history["loss"][0] == pytest.approx(by_hand, rel=1e-6)


# ---- with a split ----

SPLIT = {
    "arrays": lambda: {"x": X, "y": CLASSES, "batch_size": BATCH},
    "Dataset": lambda: {"x": Rows(), "batch_size": BATCH},
    "loader": lambda: {"x": DataLoader(Rows(), BATCH, shuffle=True)},
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("form", SPLIT)
def test_a_split_takes_the_last_rows_and_their_weights(form, loop):
    seen, model = [], make_model(loop=loop)
    model.net.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0])))
    history = model.fit(**SPLIT[form](), sample_weight=W, validation_split=0.3, verbose=0)
    train = torch.cat([x for training, x in seen if training])
    val = torch.cat([x for training, x in seen if not training])
    assert torch.equal(val, X[7:])
    assert sorted(train.tolist()) == sorted(X[:7].tolist())
    by_hand = (F.cross_entropy(model.net(X[7:]), CLASSES[7:], reduction="none") * W[7:]).sum() / 3
    assert history.history["val_loss"][0] == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize("form", SPLIT)
def test_a_split_without_weights_shuffles_the_rest_alone(form):
    orders, model = [], make_model()
    model.net.register_forward_pre_hook(
        lambda module, inputs: orders.append(inputs[0].tolist()) if module.training else None
    )
    torch.manual_seed(1)
    model.fit(**SPLIT[form](), validation_split=0.3, epochs=2, verbose=0)
    first, second = [*orders[0], *orders[1]], [*orders[2], *orders[3]]
    assert sorted(first) == sorted(second) == sorted(X[:7].tolist())
    assert first != second


def test_a_split_of_a_loader_with_a_sampler_of_its_own_is_refused():
    sampler = WeightedRandomSampler([1.0] * N, N)
    for loader in (
        DataLoader(Rows(), BATCH, sampler=sampler),
        DataLoader(Rows(), batch_sampler=BatchSampler(sampler, BATCH, False)),
    ):
        with pytest.raises(ValueError, match=r"validation_split.* sampler of its own.*validation_data"):
            make_model().fit(loader, validation_split=0.3, verbose=0)


# ---- what can't be weighted ----


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 3)

    def forward(self, x):
        return self.a(x), self.b(x)


def scalar_loss(outputs, y):
    return (outputs - y).square().mean()


# what can't be weighted -> (loss, outputs, fit's arguments, the reason)
REFUSED = {
    "a scalar loss": (
        *(scalar_loss, 1, {"x": X, "y": VALUES, "sample_weight": W}),
        r"sample_weight has shape \(10,\), but the loss scalar_loss gives Tensor\(\) float32: .*one value per sample",
    ),
    "a stream": (
        *("cross_entropy", 3, {"x": Stream(), "sample_weight": W}),
        r"fit\(sample_weight=...\).* Stream, which has no rows to count.*\(x, y, sample_weight\)",
    ),
    "batches": (
        *("cross_entropy", 3, {"x": [(X, CLASSES)], "sample_weight": W}),
        r"list, which has no rows to count.*\(x, y, sample_weight\)",
    ),
    "a loader's subclass": (
        *("cross_entropy", 3, {"x": OwnLoader(Rows(), BATCH), "sample_weight": W}),
        r"need a plain DataLoader.*OwnLoader over Rows.*\(x, y, sample_weight\)",
    ),
    "a wrong length": (
        *("cross_entropy", 3, {"x": DataLoader(Rows(), BATCH), "sample_weight": W[:7]}),
        r"fit\(\) got 10 samples in x but Tensor\(7,\) float32 as sample_weight: it takes shape \(10,\)",
    ),
    "a wrong length beside arrays": (
        *("cross_entropy", 3, {"x": X, "y": CLASSES, "sample_weight": W[:7]}),
        r"fit\(\) got 10 samples in x but 7 in sample_weight",
    ),
    "weights without targets": (
        *(lambda outputs, y: outputs.mean(1), 3, {"x": X, "sample_weight": W}),
        r"fit\(sample_weight=...\) needs x and y",
    ),
    "class_weight in regression": (
        *("mse", 1, {"x": X, "y": VALUES, "class_weight": {0: 1.0}}),
        r"class_weight needs classes, but the loss is one for regression; give sample_weight",
    ),
    "class_weight by name": (
        *("cross_entropy", 3, {"x": X, "y": CLASSES, "class_weight": {"cat": 1.0}}),
        r"class_weight takes \{class index from 0: weight\}, got \{'cat': 1.0\}",
    ),
    "class_weight of several labels": (
        *("bce_with_logits", 3, {"x": X, "y": F.one_hot(CLASSES, 3).float(), "class_weight": {0: 2.0}}),
        r"class_weight needs one class a sample, but targets are Tensor\(10, 3\) float32: several labels",
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_weighted_is_refused_with_the_reason(case, loop):
    loss, outputs, arguments, reason = REFUSED[case]
    model = make_model(loss, loop, outputs)
    before = copy.deepcopy(model.net.state_dict())
    with pytest.raises(ValueError, match=reason):
        model.fit(**arguments, verbose=0)
    assert all(torch.equal(model.net.state_dict()[name], value) for name, value in before.items())


def test_class_weight_with_several_outputs_is_refused():
    model = kt.Model(Forked(), device="cpu")
    model.compile(["mse", "cross_entropy"], "sgd")
    with pytest.raises(ValueError, match="class_weight works with one output; give sample_weight for several"):
        model.fit(X, (VALUES, CLASSES), class_weight={0: 2.0}, verbose=0)


# ---- weighted metrics ----


def absolute(outputs, y):
    return (outputs - y).abs()


@pytest.mark.parametrize("loop", LOOPS)
def test_weighted_metrics_equal_numpy_s_averages(loop):
    model = make_model("mse", loop, 1, metrics=["mae"], weighted_metrics=["mse", "mae", "rmse", absolute])
    logs = model.evaluate(DataLoader(TensorDataset(X, VALUES, W), BATCH), verbose=0)
    error = (model.net(X) - VALUES).detach().double().numpy().ravel()
    w = W.double().numpy()
    assert logs["mse"] == pytest.approx(np.average(error**2, weights=w), rel=1e-6)
    assert logs["rmse"] == pytest.approx(math.sqrt(np.average(error**2, weights=w)), rel=1e-6)
    assert logs["absolute"] == pytest.approx(np.average(np.abs(error), weights=w), rel=1e-6)
    assert logs["weighted_mae"] == pytest.approx(np.average(np.abs(error), weights=w), rel=1e-6)
    assert logs["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-6)
    assert list(logs) == ["loss", "mae", "mse", "weighted_mae", "rmse", "absolute"]


@pytest.mark.parametrize("kind", TARGETS)
def test_weighted_accuracy_equals_numpy_s_average(kind):
    loss, y, classes = TARGETS[kind]
    model = make_model(loss, outputs=1 if kind == "binary" else 3, metrics="accuracy", weighted_metrics="accuracy")
    logs = model.evaluate(X, y, sample_weight=W, batch_size=BATCH, verbose=0)
    outputs = model.net(X).detach()
    guesses = (outputs.flatten() > 0).long() if kind == "binary" else outputs.argmax(1)
    right = (guesses == classes).numpy()
    assert 0 < right.mean() < 1
    assert logs["accuracy"] == pytest.approx(right.mean())
    assert logs["weighted_accuracy"] == pytest.approx(np.average(right, weights=W.numpy()), rel=1e-6)


def test_class_weight_reaches_weighted_metrics_in_training():
    model = make_model(weighted_metrics={"share": lambda outputs, y: (y == 0).float()})
    model.fit(X, CLASSES, class_weight={0: 3.0}, validation_data=(X, CLASSES), verbose=0)
    zeros = int((CLASSES == 0).sum())
    logs = {name: values[0] for name, values in model.history.history.items()}
    assert logs["share"] == pytest.approx(3 * zeros / (3 * zeros + N - zeros))
    assert logs["val_share"] == pytest.approx(zeros / N)


def test_weighted_metrics_are_in_the_batch_logs_and_reset_each_epoch():
    seen = []
    model = make_model("mse", outputs=1, weighted_metrics=["mae"])
    watch = LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["mae"]))
    history = model.fit(X, VALUES, sample_weight=W, batch_size=BATCH, epochs=2, callbacks=[watch], verbose=0)
    assert history.history["mae"] == [pytest.approx(seen[2]), pytest.approx(seen[5])]


def test_weighted_functions_must_give_values_per_sample():
    model = make_model("mse", outputs=1, weighted_metrics=[scalar_loss])
    with pytest.raises(ValueError, match="weighted_metrics needs functions that give one value per sample"):
        model.fit(X, VALUES, sample_weight=W, verbose=0)
