"""The look at a first batch: what is wrong is said in the data's own words before a step, and right data pass silently.

Warnings are errors in these tests, so a fit that only runs also shows that nothing was said.
"""

import copy
import math
import random
import subprocess
import sys
import textwrap
import traceback
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import kerastorch as kt
from kerastorch.loops import LOOPS

pytestmark = pytest.mark.parametrize("loop", LOOPS)

N = 8
X = torch.linspace(-1, 1, N * 2).reshape(N, 2)
VALUES = torch.linspace(0, 1, N)[:, None]
CLASSES = torch.arange(N) % 3
ONE_HOT = F.one_hot(CLASSES, 3)
YES = (torch.arange(N) % 2).float()[:, None]
IMAGES = torch.linspace(-1, 1, N * 3 * 4 * 4).reshape(N, 3, 4, 4)
MASKS = torch.arange(N * 16).reshape(N, 4, 4) % 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Squeezed(nn.Module):
    """A linear layer whose one output has shape (N,)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x).squeeze(1)


class Filled(nn.Module):
    """Takes what is not finite for 0, as a net with missing features does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(torch.where(x.isfinite(), x, 0.0))


class Masked(nn.Module):
    """Logits of which class 2 is never possible."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x).masked_fill(torch.tensor([False, False, True]), -math.inf)


class Pixels(nn.Module):
    """Takes bytes and scales them itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x.float() / 255)


class Forked(nn.Module):
    """Two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 3)

    def forward(self, x):
        return self.a(x), self.b(x)


class Root(nn.Module):
    """A net that makes NaN of its own finite weights and inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return (-1 - self.layer(x).square()).sqrt()


class Rows(torch.utils.data.Dataset):
    """Rows kept in a class of one's own, as most Datasets are."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def linear(features=2, outputs=1):
    return lambda: nn.Linear(features, outputs)


def ending_in(layer, outputs=1):
    return lambda: nn.Sequential(nn.Linear(2, outputs), layer)


def with_broken_weights():
    net = nn.Linear(2, 1)
    with torch.no_grad():
        net.weight[0, 1] = math.nan
    return net


def with_bias(value, outputs):
    """A linear layer without weights to speak of, whose outputs all are value."""

    def make():
        net = nn.Linear(2, outputs)
        nn.init.zeros_(net.weight)
        nn.init.constant_(net.bias, value)
        return net

    return make


def replaced(tensor, value):
    tensor = tensor.clone()
    tensor.flatten()[3] = value
    return tensor


def make_model(net, loss, loop, **arguments):
    """A compiled Model whose SGD already holds momentum."""
    model = kt.Model(net, device="cpu")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    model.compile(loss, optimizer, loop=loop, **arguments)
    return model


def state_of(model):
    """Weights, optimizer state and random states, in a form that == compares to the bit, NaN too."""
    optimizer = copy.deepcopy(model.optimizer.state_dict())
    momentum = {i: s["momentum_buffer"].numpy().tobytes() for i, s in optimizer["state"].items()}
    weights = {name: value.numpy().tobytes() for name, value in model.net.state_dict().items()}
    return weights, momentum, optimizer["param_groups"], random_state()


def random_state():
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


# what is wrong -> (net, loss, the batch, words of the message)
REFUSED = {
    # ---- sizes ----
    "fewer targets than rows": (
        *(linear(), "mse", (X, VALUES[:5])),
        ["8 samples in x but 5 in y", "Tensor(8, 2) float32", "Tensor(5, 1) float32", "first batch"],
    ),
    "fewer weights than rows": (
        *(linear(), "mse", (X, VALUES, torch.ones(3))),
        ["8 samples in x but 3 in sample_weight", "Tensor(3,) float32"],
    ),
    "one number as the targets": (
        *(linear(), "mse", (X, torch.tensor(1.0))),
        ["8 samples in x but no in y", "Tensor() float32"],
    ),
    # ---- x against the first layer ----
    "int x": (
        *(linear(), "mse", (X.long(), VALUES)),
        ["x is Tensor(8, 2) int64", "first layer Linear(in_features=2", "float32 weights", "x.to(torch.float32)."],
    ),
    "uint8 x": (
        *(lambda: nn.Sequential(nn.Conv2d(3, 1, 4), nn.Flatten()), "mse", (IMAGES.byte(), VALUES)),
        ["Tensor(8, 3, 4, 4) uint8", "first layer Conv2d(3, 1", "x.to(torch.float32)", "x / 255."],
    ),
    "bool x behind a flatten": (
        *(lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 1)), "mse", (IMAGES > 0, VALUES)),
        ["Tensor(8, 3, 4, 4) bool", "first layer Linear(in_features=48", "x.to(torch.float32)."],
    ),
    "float64 x": (
        *(linear(), "mse", (X.double(), VALUES)),
        ["x is Tensor(8, 2) float64", "float32 weights", "x.to(torch.float32)."],
    ),
    "float32 x into a float64 net": (
        *(lambda: nn.Linear(2, 1).double(), "mse", (X, VALUES.double())),
        ["x is Tensor(8, 2) float32", "float64 weights", "x.to(torch.float64)."],
    ),
    "another number of features": (
        *(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)), "mse", (X, VALUES)),
        ["x is Tensor(8, 2) float32", "last dimension is 2", "Linear(in_features=5", "takes 5 features"],
    ),
    "features behind a dropout": (
        *(lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(5, 1)), "mse", (X, VALUES)),
        ["last dimension is 2", "takes 5 features"],
    ),
    # ---- values that are not finite ----
    "NaN in x": (
        *(linear(), "mse", (replaced(X, math.nan), VALUES)),
        ["x has 1 NaN in the first batch", "Tensor(8, 2) float32", "drop, fill or clip"],
    ),
    "NaN and inf in x": (
        *(
            linear(),
            "mse",
            (replaced(replaced(X, math.nan), math.nan).index_fill(0, torch.tensor([5]), math.inf), VALUES),
        ),
        ["x has 1 NaN and 2 inf", "drop, fill or clip"],
    ),
    "NaN in x, a loss of one's own": (
        *(linear(), lambda outputs, y: (outputs - y).abs().mean(), (replaced(X, math.nan), VALUES)),
        ["x has 1 NaN", "outputs are not finite"],
    ),
    "NaN in y": (
        *(linear(), "mse", (X, replaced(VALUES, math.nan))),
        ["y has 1 NaN in the first batch", "Tensor(8, 1) float32", "drop or fill those rows"],
    ),
    "inf in y": (
        *(linear(), "mae", (X, replaced(VALUES, -math.inf))),
        ["y has 1 inf in the first batch", "Tensor(8, 1) float32"],
    ),
    "NaN in the weights": (
        *(with_broken_weights, "mse", (X, VALUES)),
        ["parameter 'weight' holds 1 NaN", "broken before fit()"],
    ),
    # ---- no targets, or several ----
    "no targets": (
        *(linear(), "mse", (X,)),
        ["no targets", "fit(x, y)", "(x, y)", "((a, b),)"],
    ),
    "several outputs under one loss": (
        *(Forked, "mse", (X, VALUES)),
        ["MSELoss", "one tensor of outputs", "(Tensor(8, 1) float32, Tensor(8, 3) float32)", "list or dict of losses"],
    ),
    "several targets under one loss": (
        *(linear(), "mse", (X, {"a": VALUES, "b": YES})),
        ["MSELoss", "targets {'a': Tensor(8, 1) float32", "list or dict of losses"],
    ),
    "a slip in one of several outputs": (
        *(Forked, ["mse", "cross_entropy"], (X, (VALUES, CLASSES + 5))),
        ["labels run from 5 to 7", "3 classes, 0 to 2"],
    ),
    # ---- classes ----
    "one output under cross-entropy": (
        *(linear(), "cross_entropy", (X, YES.long().flatten())),
        ["CrossEntropyLoss", "a score for each class, (N, C)", "Tensor(8, 1) float32", "'bce_with_logits'"],
    ),
    "outputs without a class axis": (
        *(Squeezed, nn.CrossEntropyLoss(), (X, YES.long().flatten())),
        ["CrossEntropyLoss", "(N, C)", "Tensor(8,) float32", "'bce_with_logits'"],
    ),
    "one-hot rows of ints": (
        *(linear(2, 3), "cross_entropy", (X, ONE_HOT)),
        ["CrossEntropyLoss", "Tensor(8, 3) int64", "one-hot", "y.argmax(1)", "y.float()"],
    ),
    "indices as a column": (
        *(linear(2, 3), "cross_entropy", (X, CLASSES[:, None])),
        ["CrossEntropyLoss", "of shape (8,)", "Tensor(8, 1) int64", "y.squeeze(-1)"],
    ),
    "masks with a channel": (
        *(lambda: nn.Conv2d(3, 3, 1), F.cross_entropy, (IMAGES, MASKS[:, None])),
        ["cross_entropy", "of shape (8, 4, 4)", "Tensor(8, 1, 4, 4) int64", "y.squeeze(1)"],
    ),
    "masks of another size": (
        *(lambda: nn.Conv2d(3, 3, 1), "cross_entropy", (IMAGES, MASKS[:, :2])),
        ["CrossEntropyLoss", "of shape (8, 4, 4)", "Tensor(8, 3, 4, 4) float32", "Tensor(8, 2, 4) int64"],
    ),
    "float labels": (
        *(linear(2, 3), "cross_entropy", (X, CLASSES.float())),
        ["CrossEntropyLoss", "class indices as integers", "Tensor(8,) float32", "y.long()"],
    ),
    "int32 labels in a batch": (
        *(linear(2, 3), "cross_entropy", (X, CLASSES.int())),
        ["CrossEntropyLoss", "Tensor(8,) int32", "y.long()"],
    ),
    "bool labels": (
        *(linear(2, 3), "cross_entropy", (X, CLASSES > 1)),
        ["CrossEntropyLoss", "Tensor(8,) bool", "y.long()"],
    ),
    "label 7 of 3 classes": (
        *(linear(2, 3), "cross_entropy", (X, replaced(CLASSES, 7))),
        ["labels run from 0 to 7", "Tensor(8, 3) float32", "3 classes, 0 to 2."],
    ),
    "labels from 1": (
        *(linear(2, 3), "cross_entropy", (X, CLASSES + 1)),
        ["labels run from 1 to 3", "3 classes, 0 to 2: count the labels from 0."],
    ),
    "label -1": (
        *(linear(2, 3), F.cross_entropy, (X, replaced(CLASSES, -1))),
        ["labels run from -1 to 2", "3 classes, 0 to 2."],
    ),
    "logits under NLLLoss": (
        *(with_bias(2.5, 3), nn.NLLLoss(), (X, CLASSES)),
        ["NLLLoss", "log-probabilities", "nn.LogSoftmax(1)", "'cross_entropy' on logits"],
    ),
    # ---- number against number ----
    "int targets under mse": (
        *(linear(), "mse", (X, VALUES.long())),
        ["MSELoss", "float targets", "Tensor(8, 1) int64", "y.float()", "astype('float32')"],
    ),
    "int labels under bce": (
        *(Squeezed, "bce_with_logits", (X, YES.long().flatten())),
        ["BCEWithLogitsLoss", "float targets", "Tensor(8,) int64", "y.float()"],
    ),
    "bool labels under bce": (
        *(linear(), F.binary_cross_entropy_with_logits, (X, YES > 0)),
        ["binary_cross_entropy_with_logits", "float targets", "Tensor(8, 1) bool", "y.float()"],
    ),
    "float64 targets": (
        *(linear(), "mse", (X, VALUES.double())),
        ["targets are Tensor(8, 1) float64", "outputs Tensor(8, 1) float32", "y.float()"],
    ),
    "(N, 1) against (N,)": (
        *(linear(), "mse", (X, VALUES.flatten())),
        ["MSELoss", "Tensor(8, 1) float32", "Tensor(8,) float32", "stretch", "outputs.squeeze(1)", "y.unsqueeze(1)"],
    ),
    "(N,) against (N, 1)": (
        *(Squeezed, F.mse_loss, (X, VALUES)),
        ["mse_loss", "Tensor(8,) float32", "Tensor(8, 1) float32", "stretch", "y.squeeze(1)"],
    ),
    "indices under bce": (
        *(linear(2, 3), "bce_with_logits", (X, CLASSES.float())),
        ["BCEWithLogitsLoss", "Tensor(8, 3) float32", "Tensor(8,) float32", "for class indices use 'cross_entropy'"],
    ),
    "other widths": (
        *(linear(2, 3), "mae", (X, VALUES.repeat(1, 2))),
        ["L1Loss", "Tensor(8, 3) float32", "Tensor(8, 2) float32", "stretch one over the other."],
    ),
    "labels beyond 1 under bce": (
        *(linear(), "bce_with_logits", (X, YES + 1)),
        ["BCEWithLogitsLoss", "from 0 to 1", "they run from 1 to 2"],
    ),
    "logits under BCELoss": (
        *(with_bias(2.5, 1), nn.BCELoss(), (X, YES)),
        ["BCELoss", "probabilities", "outputs run from 2.47 to 2.51", "sigmoid", "'bce_with_logits'"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_slip_is_named_before_the_first_step_and_leaves_everything_as_it_was(case, loop):
    make, loss, batch, words = REFUSED[case]
    model = make_model(make(), loss, loop)
    before = state_of(model)
    with pytest.raises(ValueError, match=r".") as error:
        model.fit([batch], epochs=2, verbose=0)
    for word in words:
        assert word in str(error.value)
    assert state_of(model) == before
    assert all(p.grad is None for p in model.net.parameters())
    assert model.history.epoch == []


@pytest.mark.parametrize("form", ["arrays", "Dataset", "DataLoader"])
def test_a_refusal_draws_no_more_than_reading_the_first_batch_does(form, loop):
    rows = TensorDataset(X, CLASSES + 7)
    given = {"arrays": (X, CLASSES + 7), "Dataset": (rows,), "DataLoader": (DataLoader(rows, 4, shuffle=True),)}[form]
    model = make_model(nn.Linear(2, 3), "cross_entropy", loop)
    torch.manual_seed(3)
    next(iter(DataLoader(rows, 4, shuffle=True)))
    before = state_of(model)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match=r"labels run from 7 to 9"):
        model.fit(*given, batch_size=None if form == "DataLoader" else 4, verbose=0)
    assert state_of(model) == before


def test_a_slip_in_the_validation_data_is_named(loop):
    model = make_model(nn.Linear(2, 3), "cross_entropy", loop)
    with pytest.raises(ValueError, match=r"labels run from 3 to 5.*3 classes"):
        model.fit(X, CLASSES, validation_data=(X, CLASSES + 3), verbose=0)
    with pytest.raises(ValueError, match=r"evaluate\(\)'s data: the first batch has 8 samples in x but 5 in y"):
        model.evaluate([(X, CLASSES[:5])], verbose=0)


def test_outputs_that_are_not_finite_though_all_else_is_warn(loop):
    model = make_model(Root(), lambda outputs, y: outputs.nan_to_num(0.0).mean(), loop)
    with pytest.warns(UserWarning, match="outputs for the first batch are not finite, though x and the weights are"):
        model.fit([(X, VALUES)], verbose=0)


# ---- activations under a loss that takes logits ----

ACTIVATED = {
    "softmax": (ending_in(nn.Softmax(1), 3), "cross_entropy", CLASSES, ["CrossEntropyLoss", "softmax", "'nll'"]),
    "sigmoid": (ending_in(nn.Sigmoid()), "bce_with_logits", YES, ["BCEWithLogitsLoss", "sigmoid", "torch.nn.BCELoss"]),
}


@pytest.mark.parametrize("case", ACTIVATED)
def test_an_activation_before_a_loss_of_logits_warns_once_per_compile_and_shape(case, loop):
    make, loss, y, words = ACTIVATED[case]
    model = make_model(make(), loss, loop)
    with pytest.warns(UserWarning, match=case) as caught:
        model.fit(X, y, batch_size=3, epochs=2, verbose=0)
    assert len(caught) == 1
    model.fit(X, y, batch_size=4, verbose=0)
    for word in words:
        assert word in str(caught[0].message)
    model.compile(loss, "sgd", loop=loop)
    with pytest.warns(UserWarning, match=case) as caught:
        model.fit(X, y, verbose=0)
    assert len(caught) == 1


@pytest.mark.parametrize("case", ACTIVATED)
def test_validation_does_not_repeat_the_warning_of_training(case, loop):
    make, loss, y, _ = ACTIVATED[case]
    model = make_model(make(), loss, loop)
    with pytest.warns(UserWarning, match=case) as caught:
        model.fit(X, y, validation_data=(X, y), verbose=0)
    assert len(caught) == 1


class Applied(nn.Module):
    """A linear layer and a function, which no module shows."""

    def __init__(self, outputs, function):
        super().__init__()
        self.layer, self.function = nn.Linear(2, outputs), function

    def forward(self, x):
        return self.function(self.layer(x))


APPLIED = {
    "sigmoid": (1, torch.sigmoid, "bce_with_logits", YES),
    "hardsigmoid": (1, F.hardsigmoid, "bce_with_logits", YES),
    "sigmoid, other shape and dtype": (
        1,
        lambda z: z.double().sigmoid().float().squeeze(1),
        "bce_with_logits",
        YES[:, 0],
    ),
    "softmax": (3, lambda z: (z / 1e4).softmax(1), "cross_entropy", CLASSES),
    "sigmoid, clamped": (1, lambda z: z.sigmoid().clamp(1e-6, 1 - 1e-6), "bce_with_logits", YES),
    "sigmoid under classes": (3, torch.sigmoid, "cross_entropy", CLASSES),
    "softmax over rows": (3, lambda z: z.softmax(0), "cross_entropy", CLASSES),
    "softmax, written out": (3, lambda z: z.exp() / z.exp().sum(1, keepdim=True), "cross_entropy", CLASSES),
    "softmax, by its logarithm": (3, lambda z: (4 * z).log_softmax(1).exp(), "cross_entropy", CLASSES),
}


@pytest.mark.parametrize("case", APPLIED)
@pytest.mark.parametrize("evaluates", [False, True])
def test_an_activation_in_forward_warns_once_at_the_latest_in_training(case, evaluates, loop):
    outputs, function, loss, y = APPLIED[case]
    model = make_model(Applied(outputs, function), loss, loop)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if evaluates:
            model.evaluate(X, y, verbose=0)
        model.fit(X, y, validation_data=(X, y), verbose=0)
    assert [str(one.message).count(f"like a {case.split(',')[0].split()[0]}'s") for one in caught] == [1]


def test_the_activation_of_a_compiled_net_is_known_by_its_layer(loop):
    model = kt.Model(ending_in(nn.Sigmoid())(), device="cpu")
    model.compile("bce_with_logits", "sgd", loop=loop, jit_compile={"backend": "aot_eager"})
    with pytest.warns(UserWarning, match="sigmoid"):
        model.fit(X, YES, verbose=0)
    torch._dynamo.reset()


def biased(outputs, *last):
    """Logits near the bias, all from 0 to 1; the rows of two sum to 1."""
    layer = nn.Linear(2, outputs)
    with torch.no_grad():
        layer.weight.mul_(1e-4)
        layer.bias.copy_(torch.tensor([0.4, 0.6])[-outputs:])
    return nn.Sequential(layer, *last)


LOGITS = {
    "one": (lambda: biased(1), "bce_with_logits", torch.ones(64, 1)),
    "one, other shape": (lambda: biased(1, nn.Flatten(0)), "bce_with_logits", torch.ones(64)),
    "several labels": (lambda: biased(2), "bce_with_logits", torch.ones(64, 2)),
    "two classes": (lambda: biased(2), "cross_entropy", torch.arange(64) % 2),
}


@pytest.mark.parametrize("case", LOGITS)
def test_a_bias_that_brings_logits_between_0_and_1_is_no_activation(case, loop):
    make, loss, y = LOGITS[case]
    x = torch.linspace(-1, 1, 128).reshape(64, 2)
    for verb in ("fit", "evaluate"):
        model = kt.Model(make(), device="cpu")
        model.compile(loss, "sgd", loop=loop)
        getattr(model, verb)(x, y, batch_size=64, verbose=0)


class Gated(nn.Module):
    """A score of its own, and a gate that is registered last."""

    def __init__(self):
        super().__init__()
        self.score, self.gate, self.sigmoid = biased(1), nn.Linear(2, 1), nn.Sigmoid()

    def forward(self, x):
        return self.score(x) + 0 * self.sigmoid(self.gate(x))


def identity_of(rows):
    layer = nn.Linear(rows, rows)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


MADE_OTHERWISE = {
    "an identity of histograms": (lambda: identity_of(3), "cross_entropy", torch.rand(64, 3).softmax(1), CLASSES),
    "an embedding of one-hot rows": (
        lambda: nn.Embedding.from_pretrained(torch.eye(3), freeze=False),
        "cross_entropy",
        torch.arange(64) % 3,
        CLASSES,
    ),
    "a gate registered last": (Gated, "bce_with_logits", torch.linspace(-1, 1, 128).reshape(64, 2), torch.ones(64, 1)),
}


@pytest.mark.parametrize("case", MADE_OTHERWISE)
@pytest.mark.parametrize("verb", ["fit", "evaluate"])
def test_values_that_only_look_like_an_activation_s_are_let_through(case, verb, loop):
    make, loss, x, y = MADE_OTHERWISE[case]
    model = kt.Model(make(), device="cpu")
    model.compile(loss, "sgd", loop=loop)
    getattr(model, verb)(x, (torch.arange(64) % 3) if y is CLASSES else y, batch_size=64, verbose=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_softmax_in_short_floats_is_seen(dtype, loop):
    model = kt.Model(ending_in(nn.Softmax(1), 3)().to(dtype), device="cpu")
    model.compile("cross_entropy", lambda parameters: torch.optim.SGD(parameters, lr=1e-3), loop=loop)
    with pytest.warns(UserWarning, match="like a softmax's"):
        model.fit(X.to(dtype), CLASSES, verbose=0)


@pytest.mark.parametrize("rows", [32, 64])
def test_a_last_layer_that_begins_at_zero_is_no_sigmoid(rows, loop):
    model = kt.Model(with_bias(0.0, 1)(), device="cpu")
    model.compile("bce_with_logits", "sgd", loop=loop)
    model.fit(torch.randn(rows, 2), torch.ones(rows, 1), batch_size=rows, verbose=0)


# ---- right data ----

CUSTOM_TARGETS = {
    "none": None,
    "NaN": replaced(VALUES, math.nan),
    "ints": CLASSES,
    "strings": ["a", "b"] * 4,
    "a dict": {"a": VALUES, "b": CLASSES},
    "values out of any range": VALUES * 1e6 - 5,
    "nested, as concatenated sequences and their lengths": (torch.ones(50), torch.full((N,), 6)),
    "boxes of each image": [{"boxes": torch.zeros(i % 3, 4)} for i in range(N)],
    "one number": torch.tensor(3.0),
}


@pytest.mark.parametrize("targets", CUSTOM_TARGETS)
def test_a_loss_of_ones_own_takes_any_targets(targets, loop):
    y, seen = CUSTOM_TARGETS[targets], []

    def loss(outputs, y):
        seen.append(y)
        return outputs.square().mean()

    model = make_model(nn.Linear(2, 1), loss, loop)
    batch = (X,) if y is None else (X, y)
    history = model.fit([batch], verbose=0).history
    assert math.isfinite(history["loss"][0])
    assert type(seen[0]) is type(y)


# what is right -> (net, loss, the batch, compile's arguments)
SILENT = {
    "-inf logits": (Masked, "cross_entropy", (X, CLASSES % 2), {}),
    "-inf in x that is masked": (Filled, "mse", (replaced(X, -math.inf), VALUES), {}),
    "ignored targets": (linear(2, 3), "cross_entropy", (X, replaced(CLASSES, -100)), {}),
    "targets ignored by another index": (
        *(linear(2, 3), nn.CrossEntropyLoss(ignore_index=255), (X, replaced(CLASSES, 255))),
        {},
    ),
    "ignored targets of the function": (linear(2, 3), F.cross_entropy, (X, replaced(CLASSES, -100)), {}),
    "probabilities as targets": (linear(2, 3), "cross_entropy", (X, torch.full((N, 3), 1 / 3)), {}),
    "one-hot floats as targets": (linear(2, 3), "categorical_crossentropy", (X, ONE_HOT.float()), {}),
    "segmentation": (lambda: nn.Conv2d(3, 3, 1), "cross_entropy", (IMAGES, MASKS), {}),
    "binary segmentation": (lambda: nn.Conv2d(3, 1, 1), "bce_with_logits", (IMAGES, (MASKS[:, None] > 0).float()), {}),
    "NaN in x that the net fills": (Filled, "mse", (replaced(X, math.nan), VALUES), {}),
    "ints into an embedding": (
        *(lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 1)), "mse"),
        *((torch.arange(N * 2).reshape(N, 2) % 9, VALUES), {}),
    ),
    "bytes that the net scales": (Pixels, "mse", ((X * 100 + 100).byte(), VALUES), {}),
    "float64 throughout": (lambda: nn.Linear(2, 1).double(), "mse", (X.double(), VALUES.double()), {}),
    "float32 under bf16": (linear(), "mse", (X, VALUES), {"mixed_precision": "bf16"}),
    "float32 under bf16, classes": (linear(2, 3), "cross_entropy", (X, CLASSES), {"mixed_precision": "bf16"}),
    "bfloat16 x under bf16": (linear(), "mse", (X.bfloat16(), VALUES), {"mixed_precision": "bf16"}),
    "(N,) against (N,)": (Squeezed, "mse", (X, VALUES.flatten()), {}),
    "a softmax under NLLLoss's log": (ending_in(nn.LogSoftmax(1), 3), "nll", (X, CLASSES), {}),
    "a sigmoid under BCELoss": (ending_in(nn.Sigmoid()), nn.BCELoss(), (X, YES), {}),
    "smoothed labels under bce": (linear(), "bce_with_logits", (X, YES * 0.8 + 0.1), {}),
    "multi-hot labels": (linear(2, 3), "bce_with_logits", (X, ONE_HOT.float()), {}),
    "a sequence into a linear layer": (linear(4, 1), "mse", (IMAGES, IMAGES[..., :1]), {}),
    "two outputs": (Forked, ["mse", "cross_entropy"], (X, (VALUES, CLASSES)), {}),
    "weights": (linear(), "mse", (X, VALUES, torch.ones(N)), {}),
    "counts under poisson": (linear(), "poisson", (X, CLASSES[:, None].float()), {}),
    "integer counts under poisson": (linear(), "poisson", (X, CLASSES[:, None]), {}),
}


@pytest.mark.parametrize("case", SILENT)
def test_right_data_pass_silently(case, loop):
    make, loss, batch, arguments = SILENT[case]
    model = make_model(make(), loss, loop, **arguments)
    before = state_of(model)
    history = model.fit([batch], validation_data=[batch], verbose=0).history
    assert math.isfinite(history["loss"][0])
    assert math.isfinite(history["val_loss"][0])
    assert state_of(model)[0] != before[0]


def test_a_hook_that_converts_x_is_the_net_s_business(loop):
    net = nn.Linear(2, 1)
    net.register_forward_pre_hook(lambda module, inputs: (inputs[0].float() / 255,))
    model = make_model(net, "mse", loop)
    assert math.isfinite(model.fit([((X * 100 + 100).byte(), VALUES)], verbose=0).history["loss"][0])


def test_float64_x_under_mixed_precision_is_named(loop):
    """Autocast leaves float64 alone, so the first layer can't take it."""
    model = make_model(nn.Linear(2, 1), "mse", loop, mixed_precision="bf16")
    with pytest.raises(ValueError, match=r"x is Tensor\(8, 2\) float64.*x\.to\(torch\.float32\)"):
        model.fit([(X.double(), VALUES)], verbose=0)


# ---- what is known before the first batch ----


def normalised(layer=nn.BatchNorm1d):
    first = nn.Linear(2, 3) if layer is nn.BatchNorm1d else nn.Conv2d(2, 3, 1)
    return nn.Sequential(first, layer(3), nn.Flatten(), nn.Linear(3 if layer is nn.BatchNorm1d else 12, 1))


@pytest.mark.parametrize("form", ["arrays", "DataLoader"])
def test_a_last_batch_of_one_before_batch_norm_warns_beforehand(form, loop):
    x, y = torch.randn(9, 2), torch.randn(9, 1)
    model = make_model(normalised(), "mse", loop)
    before = state_of(model)
    given = (x, y) if form == "arrays" else (DataLoader(TensorDataset(x, y), 4, shuffle=True),)
    with (
        pytest.warns(UserWarning, match=r"9 rows in batches of 4 .* one sample, .*BatchNorm1d .*drop_last=True"),
        pytest.raises(ValueError, match="more than 1 value per channel"),
    ):
        model.fit(*given, batch_size=4 if form == "arrays" else None, verbose=0)
    assert state_of(model)[0] != before[0]  # torch's own error, in the last batch


@pytest.mark.parametrize("rows", [8, 10])
def test_batches_of_more_than_one_do_not_warn_before_batch_norm(rows, loop):
    make_model(normalised(), "mse", loop).fit(torch.randn(rows, 2), torch.randn(rows, 1), batch_size=4, verbose=0)


def test_a_dropped_last_batch_of_one_does_not_warn(loop):
    loader = DataLoader(TensorDataset(torch.randn(9, 2), torch.randn(9, 1)), 4, drop_last=True)
    make_model(normalised(), "mse", loop).fit(loader, verbose=0)


def test_batch_norm_over_pixels_takes_one_image(loop):
    model = make_model(normalised(nn.BatchNorm2d), "mse", loop)
    model.fit(torch.randn(9, 2, 2, 2), torch.randn(9, 1), batch_size=4, verbose=0)


def test_batch_norm_over_a_sequence_takes_one_sequence(loop):
    """BatchNorm1d counts the values of a channel, of which a sequence has several."""
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 1))
    make_model(net, "mse", loop).fit(torch.randn(9, 2, 4), torch.randn(9, 1), batch_size=4, verbose=0)


def test_parameters_on_another_device_are_refused(loop):
    model = make_model(nn.Linear(2, 1), "mse", loop)
    model.device = torch.device("meta")  # as if the net, which is on the CPU, had been moved away from it
    before = state_of(model)
    with pytest.raises(ValueError, match=r"parameter 'weight' is on cpu, but the Model is on meta.*Model\(net, device"):
        model.fit([(X, VALUES)], verbose=0)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((X[:0], VALUES[:0]), "got no samples"),
        (([], []), "got no samples"),
        ((np.zeros((0, 2)), np.zeros(0)), "got no samples"),
        ((TensorDataset(X[:0], VALUES[:0]),), "is empty: the TensorDataset has 0 rows"),
        ((DataLoader(TensorDataset(X, VALUES), 16, drop_last=True),), "gives 0 batches .drop_last drops"),
        ((iter([]),), "gave no batches; an iterator can be read only once"),
        (([(X[:0], YES[:0])],), "0 samples|no samples|0 rows"),
    ],
    ids=["tensors", "lists", "numpy", "Dataset", "dropped", "iterator", "a batch without rows"],
)
def test_empty_data_are_refused(data, words, loop):
    model = make_model(nn.Linear(2, 1), "bce_with_logits", loop)
    before = state_of(model)
    with pytest.raises(ValueError, match=words):
        model.fit(*data, verbose=0)
    assert state_of(model) == before


def test_a_stream_that_gives_nothing_is_refused(loop):
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    model = make_model(nn.Linear(2, 1), "mse", loop)
    weights = state_of(model)[0]
    with pytest.raises(ValueError, match=r"fit.*training data gave no batches"):
        model.fit(Nothing(), verbose=0)
    assert state_of(model)[0] == weights


# ---- workers, tracebacks ----

INTERACTIVE = """
    import torch
    from torch.utils.data import DataLoader, Dataset
    import kerastorch as kt

    class Rows(Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            return torch.ones(2), torch.ones(1)

    def attempt(name, dataset, workers=1, method="spawn", **arguments):
        loader = DataLoader(dataset, 2, num_workers=workers, multiprocessing_context=method if workers else None)
        model = kt.Model(torch.nn.Linear(2, 1), device="cpu")
        model.compile("mse", "sgd", loop=LOOP)
        try:
            model.fit(loader, verbose=0, **arguments)
            print(name, "fine")
        except Exception as error:
            print(name, type(error).__name__, str(error).splitlines()[0])

    attempt("own:", Rows())
    attempt("split:", Rows(), validation_split=0.5)
    attempt("weighted:", Rows(), sample_weight=torch.ones(4))
    attempt("no workers:", Rows(), workers=0)
    attempt("fork:", Rows(), method="fork")
"""


def test_a_class_of_the_notebook_is_refused_where_spawned_workers_could_not_see_it(loop):
    if loop != "script":
        pytest.skip("the loops share this check, and a child process takes seconds")
    code = f"LOOP = {loop!r}\n" + textwrap.dedent(INTERACTIVE)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    said = dict(line.split(": ", 1) for line in child.stdout.splitlines())
    assert said["no workers"] == said["fork"] == "fine"
    for case in ("own", "split", "weighted"):
        for word in ("num_workers=1", "can't see 'Rows'", "notebook", ".py file", "num_workers=0"):
            assert word in said.get(case, child.stderr[-500:]), case


@pytest.mark.parametrize("place", ["forward", "loss"])
def test_traceback_of_an_error_in_the_user_s_code_ends_in_his_file(place, loop):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            return self.layer(x) if place == "loss" else self.layer(x) + {}["missing"]

    def loss(outputs, y):
        return {}["missing"]

    model = make_model(Broken(), loss, loop)
    with pytest.raises(KeyError) as error:
        model.fit([(X, VALUES)], verbose=0)
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert (last.filename, last.name) == (__file__, place)
    assert error.value.__cause__ is None
    assert error.value.__context__ is None


class Own(nn.Module):
    """A forward of the user's own: what reaches the layer is known only there."""

    def __init__(self, converts=False):
        super().__init__()
        self.linear, self.converts = nn.Linear(4, 3), converts

    def forward(self, x):
        return self.linear(x.float() if self.converts else x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8], ids=str)
def test_a_layer_inside_a_forward_of_ones_own_names_the_dtype_it_was_given(dtype, loop):
    x, y = torch.ones(8, 4).to(dtype), torch.arange(8) % 3
    net = Own()
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", "sgd", loop=loop)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"the layer Linear\(.*was given Tensor\(8, 4\) {name}.*float32 weights"):
        model.fit(x, y, verbose=0)
    assert not net.linear._forward_pre_hooks
    model.net.converts = True
    model.fit(x, y, verbose=0)
    assert not net.linear._forward_pre_hooks
