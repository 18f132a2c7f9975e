"""Model: what compile and fit refuse, the forms of data, what evaluate and predict leave alone, and what comes back."""

import math
import random
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import LambdaCallback

Weights = dict[str, Tensor]
sgd = partial(torch.optim.SGD, lr=0.1)

X = torch.linspace(-1, 1, 20).reshape(10, 2)
Y = X.sum(1, keepdim=True) ** 2


def make_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


def make_model(net: nn.Module | None = None, **compile_arguments: Any) -> kt.Model:
    model = kt.Model(net if net is not None else make_net(), device="cpu")
    model.compile(**{"loss": "mse", "optimizer": sgd, **compile_arguments})
    return model


def fit(model: kt.Model, x: Any = X, y: Any = Y, **arguments: Any) -> kt.History:
    return model.fit(x, y, **{"batch_size": 4, "shuffle": False, "verbose": 0, **arguments})


def train_by_hand(net: nn.Module, batches: Any, epochs: int = 1) -> list[float]:
    """The textbook loop; the mean loss of each epoch."""
    optimizer, losses = sgd(net.parameters()), []
    for _ in range(epochs):
        total, count = 0.0, 0
        for x, y in batches:
            loss = mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total, count = total + loss.item() * len(x), count + len(x)
        losses.append(total / count)
    return losses


def weights_of(net: nn.Module) -> Weights:
    return {name: value.clone() for name, value in net.state_dict().items()}


def is_same(net: nn.Module, other: nn.Module | Weights) -> bool:
    weights = other.state_dict() if isinstance(other, nn.Module) else other
    return all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def random_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


@contextmanager
def nothing_happens(model: kt.Model) -> Iterator[None]:
    """No weight changes, no optimizer steps, nothing is drawn, and the compile stands, while the body runs."""
    weights, optimizer, state, epochs = (
        weights_of(model.net),
        model.optimizer,
        random_state(),
        list(model.history.epoch),
    )
    steps: list[object] = []
    handle = optimizer.register_step_pre_hook(lambda *arguments: steps.append(arguments)) if optimizer else None
    yield
    if handle:
        handle.remove()
    assert steps == []
    assert is_same(model.net, weights)
    assert random_state() == state
    assert model.optimizer is optimizer
    assert model.history.epoch == epochs


def note_forwards(net: nn.Module) -> list[tuple[bool, list[float]]]:
    """Return a list that fills with (training, first column of x) as forward is called."""
    seen: list[tuple[bool, list[float]]] = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append((net.training, inputs[0][:, 0].tolist())))
    return seen


class Counting(IterableDataset[Any]):
    """Rows one by one, without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


class Batches:
    """An iterable that can be iterated anew and has no length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X.split(4), Y.split(4), strict=True))


# ---- Model itself ----


def test_call_returns_what_the_net_returns_with_gradients() -> None:
    model = kt.Model(make_net(), device="cpu")
    outputs = model(X)
    assert torch.equal(outputs, model.net(X))
    assert outputs.requires_grad


def test_call_passes_several_and_named_arguments() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor) -> tuple[Tensor, bool]:
            return a - b, self.training

    model = kt.Model(Two(), device="cpu")
    difference, training = model(torch.tensor([3.0]), b=torch.tensor([1.0]))
    assert difference.item() == 2.0
    assert training is True
    model.net.eval()
    assert model(torch.tensor([3.0]), b=torch.tensor([1.0]))[1] is False


def test_the_net_stays_the_users_object() -> None:
    net = make_net()
    model = kt.Model(net, device="cpu")
    assert model.net is net
    assert model.device == torch.device("cpu")
    assert model.optimizer is None


def test_repr_says_whether_it_is_compiled() -> None:
    model = kt.Model(make_net(), device="cpu")
    assert repr(model) == "Model(Sequential, device='cpu', not compiled)"
    model.compile("mse", sgd)
    assert repr(model) == "Model(Sequential, device='cpu', compiled)"


@pytest.mark.parametrize(
    ("net", "message"),
    [(nn.Flatten, r"got the class: write Model\(Flatten\(\.\.\.\)\)"), (len, r"takes an nn.Module, got builtin")],
)
def test_what_is_no_module_is_refused(net: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kt.Model(net, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' is not"):
        kt.Model(make_net(), device=device)


# ---- compile refuses ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adam", "mse"), r"loss first, then the optimizer: write compile\('mse', 'adam'\)\."),
        (("SGD", "Cross_Entropy"), r"write compile\('Cross_Entropy', 'SGD'\)\."),
        (("adam", nn.MSELoss()), r"loss first, then the optimizer"),
        ((torch.optim.Adam, "mse"), r"loss first, then the optimizer"),
        ((torch.optim.Adam, nn.MSELoss), r"loss first, then the optimizer"),
        ((torch.optim.SGD([torch.zeros(1)], lr=0.1), nn.MSELoss()), r"loss first, then the optimizer"),
        ((torch.optim.SGD([torch.zeros(1)], lr=0.1), "mse"), r"loss first, then the optimizer"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, tuple) else "",
)
def test_compile_refuses_loss_and_optimizer_swapped(arguments: tuple[Any, Any], message: str) -> None:
    model = make_model()
    with nothing_happens(model), pytest.raises(ValueError, match=message):
        model.compile(*arguments)
    with nothing_happens(model), pytest.raises(ValueError, match=message):
        model.compile(loss=arguments[0], optimizer=arguments[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "crossentropy"}, ValueError, r"loss 'crossentropy' is not known; did you mean 'cross_entropy'"),
        ({"loss": "zzz"}, ValueError, r"loss 'zzz' is not known\. Known: .*mse"),
        ({"loss": 3}, TypeError, r"loss must be a name, .* got 3"),
        ({"loss": None}, TypeError, r"loss must be a name"),
        ({"optimizer": "adm"}, ValueError, r"optimizer 'adm' is not known; did you mean 'adam'"),
        ({"optimizer": 0.1}, TypeError, r"optimizer must be a name, .* got 0.1"),
        ({"optimizer": lambda parameters: None}, TypeError, r"must make a torch.optim.Optimizer, .* made a NoneType"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, ValueError, r"holds none of the net's parameters"),
        ({"metrics": ["acuracy"]}, ValueError, r"metric 'acuracy' is not known; did you mean 'accuracy'"),
        ({"metrics": ["mae", "mae"]}, ValueError, r"metrics has 'mae' twice"),
        ({"metrics": [3]}, TypeError, r"a metric must be a name, .* got 3"),
        ({"loop": "scirpt"}, ValueError, r"loop 'scirpt' is not known; did you mean 'script'"),
        ({"loop": 3}, TypeError, r"loop must be a name"),
        ({"lr_scheduler": "cosin"}, ValueError, r"lr_scheduler 'cosin' is not known; did you mean 'cosine'"),
        ({"lr_scheduler": 3}, TypeError, r"lr_scheduler must be a name"),
        ({"lr_scheduler": lambda optimizer: None}, TypeError, r"must make a torch scheduler"),
        (
            {"lr_scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 1)},
            ValueError,
            r"the StepLR given belongs to another optimizer",
        ),
        ({"lr_scheduler_interval": "step"}, ValueError, r"lr_scheduler_interval='step' beside no lr_scheduler"),
        (
            {"lr_scheduler": "reduce_on_plateau", "lr_scheduler_interval": "step"},
            ValueError,
            r"lr_scheduler_interval='step' beside ReduceLROnPlateau",
        ),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_interval": "steps"},
            ValueError,
            r"lr_scheduler_interval='steps' is not known; did you mean 'step'",
        ),
        ({"mixed_precision": "bf61"}, ValueError, r"mixed_precision='bf61' is not known; did you mean 'bf16'"),
        ({"mixed_precision": True}, ValueError, r"mixed_precision=True is not known"),
        ({"clip_grad_norm": 0}, ValueError, r"clip_grad_norm must be above 0, got 0"),
        ({"clip_grad_norm": -1.0}, ValueError, r"clip_grad_norm must be above 0, got -1.0"),
        ({"clip_grad_norm": math.nan}, ValueError, r"clip_grad_norm must be above 0, got nan"),
        ({"clip_grad_value": 0.0}, ValueError, r"clip_grad_value must be above 0, got 0.0"),
        ({"gradient_accumulation_steps": 0}, ValueError, r"gradient_accumulation_steps must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 2.5}, TypeError, r"gradient_accumulation_steps must be an int, got 2.5"),
        ({"gradient_accumulation_steps": True}, TypeError, r"gradient_accumulation_steps must be an int, got True"),
        ({"optimizer": "lbfgs"}, ValueError, r"LBFGS .*subclass ClassLoop"),
        ({"optimizer": torch.optim.LBFGS, "loop": "function"}, ValueError, r"LBFGS .*subclass ClassLoop"),
        ({"optimizer": torch.optim.LBFGS, "loop": kt.ClassLoop()}, ValueError, r"LBFGS .*subclass ClassLoop"),
        ({"param_groups": {"*.bais": {"lr": 0.1}}}, ValueError, r"pattern '\*\.bais' matches no parameter"),
        ({"metric": ["mae"]}, TypeError, r"compile\(\) has no argument 'metric'; did you mean 'metrics'"),
        (
            {"clip_gradnorm": 1.0},
            TypeError,
            r"compile\(\) has no argument 'clip_gradnorm'; did you mean 'clip_grad_norm'",
        ),
        ({"zzz": 1.0}, TypeError, r"compile\(\) has no argument 'zzz'\. Known: loss, optimizer, metrics, "),
    ],
)
def test_compile_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make_model()
    with nothing_happens(model), pytest.raises(error, match=message):
        model.compile(**{"loss": "mse", "optimizer": sgd, **arguments})


def test_a_refused_first_compile_leaves_the_model_uncompiled() -> None:
    model = kt.Model(make_net(), device="cpu")
    with pytest.raises(ValueError, match="not known"):
        model.compile("mse", "adm")
    assert model.optimizer is None
    with pytest.raises(RuntimeError, match=r"call compile\(\) before fit"):
        fit(model)


def test_a_net_without_parameters_is_refused() -> None:
    model = kt.Model(nn.Flatten(), device="cpu")
    with pytest.raises(ValueError, match="Flatten has no parameters"):
        model.compile("mse", "sgd")


def lbfgs_step(run: kt.Run, x: Any, y: Any, sample_weight: Any) -> tuple[Tensor, Any]:
    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = run.loss_fn(run.forward(x), y, sample_weight)
        loss.backward()
        return loss

    outputs = run.forward(x)
    return run.optimizer.step(closure).detach(), outputs


class LBFGSLoop(kt.ClassLoop):
    def train_step(self, x: Any, y: Any, sample_weight: Any) -> tuple[Tensor, Any]:
        return lbfgs_step(self.run, x, y, sample_weight)


@pytest.mark.parametrize("loop", [LBFGSLoop, LBFGSLoop(), kt.FunctionLoop(train_step=lbfgs_step)])
def test_lbfgs_trains_in_a_loop_with_a_step_of_its_own(loop: Any) -> None:
    model = make_model(optimizer=partial(torch.optim.LBFGS, max_iter=5), loop=loop)
    losses = fit(model, batch_size=10, epochs=3).history["loss"]
    assert losses[2] < losses[0]


# ---- fit refuses ----

LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)


class Gone(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("data", "arguments", "error", "message"),
    [
        ((None,), {}, ValueError, r"fit\(\) needs data: x is None"),
        ((X, Y[:9]), {}, ValueError, r"fit\(\) got 10 samples in x but 9 in y"),
        ((X, Y, 3), {}, TypeError, r"positional"),
        (((X, Y, Y, Y),), {}, ValueError, r"fit\(\) got a tuple of 4 as data"),
        (((X, Y[:5]),), {}, ValueError, r"fit\(\) got 10 samples in x but 5 in y"),
        (((X, Y, torch.ones(3)),), {}, ValueError, r"fit\(\) got 10 samples in x but 3 in sample_weight"),
        (((X, X[:4]), Y), {}, ValueError, r"fit\(\) got parts of 10 and of 4 samples in x"),
        ((X[:0], Y[:0]), {}, ValueError, r"fit\(\) got no samples"),
        (([],), {}, ValueError, r"fit\(\)"),
        ((DataLoader(TensorDataset(X[:0], Y[:0])),), {}, ValueError, r"training data is empty: DataLoader gives 0"),
        ((DataLoader(TensorDataset(X, Y), 16, drop_last=True),), {}, ValueError, r"is empty.*drop_last drops"),
        ((TensorDataset(X[:0], Y[:0]),), {}, ValueError, r"is empty: the TensorDataset has 0 rows"),
        ((3,), {}, TypeError, r"fit\(\) can't read a int as data"),
        ((LOADER, Y), {}, ValueError, r"fit\(\) got y beside a DataLoader"),
        ((Batches(), Y), {}, ValueError, r"fit\(\) got y beside a Batches"),
        ((LOADER,), {"batch_size": 4}, ValueError, r"batch_size=4 beside a DataLoader"),
        ((iter(Batches()),), {"epochs": 2}, ValueError, r"iterator, which can be read once, but 2 epochs"),
        ((X, Y), {"epochs": 0}, ValueError, r"epochs must be at least 1, got 0"),
        ((X, Y), {"epochs": -1}, ValueError, r"epochs must be at least 1, got -1"),
        ((X, Y), {"epochs": 1.5}, TypeError, r"epochs must be an int, got 1.5"),
        ((X, Y), {"epochs": 2, "initial_epoch": 2}, ValueError, r"initial_epoch=2 must be .*below epochs=2"),
        ((X, Y), {"epochs": 2, "initial_epoch": 3}, ValueError, r"initial_epoch=3"),
        ((X, Y), {"initial_epoch": -1}, ValueError, r"initial_epoch must be at least 0, got -1"),
        ((X, Y), {"epochs": 2, "initial_epoch": 0.5}, TypeError, r"initial_epoch must be an int"),
        ((X, Y), {"batch_size": 0}, ValueError, r"batch_size must be at least 1, got 0"),
        ((X, Y), {"batch_size": 2.5}, TypeError, r"batch_size must be an int"),
        ((X, Y), {"steps_per_epoch": 0}, ValueError, r"steps_per_epoch must be at least 1"),
        ((X, Y), {"validation_split": 1.0}, ValueError, r"validation_split must be between 0 and 1, got 1.0"),
        ((X, Y), {"validation_split": -0.1}, ValueError, r"validation_split must be between 0 and 1, got -0.1"),
        ((X, Y), {"validation_split": 0.99}, ValueError, r"leaves 0 rows to train and 10 to validate, of 10"),
        ((X[:1], Y[:1]), {"validation_split": 0.5}, ValueError, r"leaves 0 rows to train and 1 to validate, of 1"),
        ((Batches(),), {"validation_split": 0.5}, ValueError, r"validation_split=\.\.\.\) needs arrays"),
        ((X, Y), {"validation_steps": 2}, ValueError, r"need validation_data"),
        ((X, Y), {"validation_batch_size": 2}, ValueError, r"need validation_data"),
        ((X, Y), {"validation_freq": 2}, ValueError, r"need validation_data"),
        ((X, Y), {"validation_data": (X, Y[:9])}, ValueError, r"validation_data.* got 10 samples in x but 9 in y"),
        ((X, Y), {"validation_data": (X, Y, Y, Y)}, ValueError, r"validation_data.* got a tuple of 4"),
        ((X, Y), {"validation_data": []}, ValueError, r"validation_data"),
        (
            (X, Y),
            {"validation_data": (X, Y), "validation_steps": 0},
            ValueError,
            r"validation_steps must be at least 1",
        ),
        ((X, Y), {"validation_data": iter(Batches()), "epochs": 2}, ValueError, r"iterator.* but 2 epochs validate"),
        ((X, Y), {"validation_data": LOADER, "validation_batch_size": 2}, ValueError, r"batch_size=2 beside a DataL"),
        ((X, Y), {"validation_data": (X, Y), "validation_freq": 0}, ValueError, r"validation_freq"),
        ((X, Y), {"validation_data": (X, Y), "validation_freq": 1.5}, TypeError, r"validation_freq"),
        ((X, Y), {"validation_data": (X, Y), "validation_freq": [0, 2]}, ValueError, r"validation_freq"),
        ((X, Y), {"verbose": 3}, ValueError, r"verbose=3 is not known"),
        ((X, Y), {"epoch": 3}, TypeError, r"fit\(\) has no argument 'epoch'; did you mean 'epochs'"),
        ((X, Y), {"batchsize": 3}, TypeError, r"fit\(\) has no argument 'batchsize'; did you mean 'batch_size'"),
        ((X, Y), {"zzz": 3}, TypeError, r"fit\(\) has no argument 'zzz'\. Known: x, y, batch_size, "),
    ],
)
def test_fit_refuses_before_the_first_step(
    data: tuple[Any, ...], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make_model()
    with nothing_happens(model), pytest.raises(error, match=message):
        model.fit(*data, **{"verbose": 0, **arguments})


def test_a_batch_of_four_parts_is_refused_before_the_first_step() -> None:
    model = make_model()
    with nothing_happens(model), pytest.raises(ValueError, match=r"gave a batch of 4 parts, \(Tensor\(10, 2\)"):
        model.fit([(X, Y, Y, Y)], verbose=0)


def test_batches_without_targets_are_refused_before_the_first_step() -> None:
    model = make_model()
    with nothing_happens(model), pytest.raises(ValueError, match="the batches hold no targets"):
        model.fit([(X,)], verbose=0)


def test_an_iterable_without_length_that_gives_nothing_is_refused() -> None:
    model = make_model()
    before = weights_of(model.net)
    with pytest.raises(ValueError, match=r"training data gave no batches"):
        model.fit(Gone(), verbose=0)
    assert is_same(model.net, before)


@pytest.mark.parametrize("verb", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_verbs_that_need_compile_say_so(verb: str) -> None:
    model = kt.Model(make_net(), device="cpu")
    with pytest.raises(RuntimeError, match=rf"call compile\(\) before {verb}\(\), for example model\.compile\("):
        getattr(model, verb)(X, Y)


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batchsize": 3}, TypeError, r"has no argument 'batchsize'; did you mean 'batch_size'"),
        ({"batch_size": 0}, ValueError, r"batch_size must be at least 1"),
        ({"steps": 0}, ValueError, r"steps must be at least 1"),
        ({"x": X[:0]}, ValueError, r"got no samples"),
        ({"x": None}, ValueError, r"needs data: x is None"),
        ({"x": LOADER, "batch_size": 4}, ValueError, r"batch_size=4 beside a DataLoader"),
    ],
)
def test_evaluate_and_predict_refuse(
    verb: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make_model()
    with nothing_happens(model), pytest.raises(error, match=message):
        getattr(model, verb)(**{"x": X, "verbose": 0, **arguments})


@pytest.mark.parametrize("verb", ["train_on_batch", "test_on_batch"])
def test_a_batch_of_unequal_lengths_is_refused(verb: str) -> None:
    model = make_model()
    with nothing_happens(model), pytest.raises(ValueError, match=rf"{verb}\(\).* 10 samples in x but 9 in y"):
        getattr(model, verb)(X, Y[:9])


# ---- forms of data ----

FORMS: dict[str, Callable[[], tuple[Any, Any, dict[str, Any]]]] = {
    "loader": lambda: (LOADER, None, {}),
    "dataset": lambda: (TensorDataset(X, Y), None, {"batch_size": 4}),
    "iterable dataset": lambda: (Counting(), None, {"batch_size": 4}),
    "tensors": lambda: (X, Y, {"batch_size": 4}),
    "numpy": lambda: (X.numpy(), Y.numpy(), {"batch_size": 4}),
    "numpy float64": lambda: (X.numpy().astype(np.float64), Y.numpy().astype(np.float64), {"batch_size": 4}),
    "data frames": lambda: (pd.DataFrame(X.numpy()), pd.DataFrame(Y.numpy()), {"batch_size": 4}),
    "lists of numbers": lambda: (X.tolist(), Y.tolist(), {"batch_size": 4}),
    "pair": lambda: ((X, Y), None, {"batch_size": 4}),
    "list of batches": lambda: (list(Batches()), None, {}),
    "iterable of batches": lambda: (Batches(), None, {}),
    "generator": lambda: (((x, y) for _ in range(2) for x, y in Batches()), None, {"steps_per_epoch": 3}),
    "generator of numpy": lambda: (
        ((x.numpy(), y.numpy()) for _ in range(2) for x, y in Batches()),
        None,
        {"steps_per_epoch": 3},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_fit_reads_every_form_as_the_same_batches(form: str) -> None:
    x, y, arguments = FORMS[form]()
    net, model = make_net(), make_model()
    losses = train_by_hand(net, Batches(), epochs=2)
    history = model.fit(x, y, epochs=2, shuffle=False, verbose=0, **arguments)
    assert is_same(model.net, net)
    assert history.history["loss"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("form", [form for form in FORMS if "generator" not in form])
def test_evaluate_and_predict_read_every_form(form: str) -> None:
    x, y, arguments = FORMS[form]()
    model = make_model()
    expected = torch.cat([model.net(x) for x, _ in Batches()]).detach()
    logs = model.evaluate(x, y, verbose=0, **arguments)
    assert logs == {"loss": pytest.approx(mse_loss(expected, Y).item(), rel=1e-6)}
    assert torch.equal(torch.from_numpy(model.predict(x, verbose=0, **arguments)), expected)


@pytest.mark.parametrize("form", [form for form in FORMS if "generator" not in form])
def test_validation_data_is_read_in_every_form(form: str) -> None:
    x, y, _ = FORMS[form]()
    model = make_model()
    history = fit(model, validation_data=(x, y) if y is not None else x, epochs=2)
    assert history.history["val_loss"][1] == pytest.approx(mse_loss(model.net(X), Y).item(), rel=1e-6)


def test_a_generator_trains_one_epoch_without_steps() -> None:
    net, model = make_net(), make_model()
    train_by_hand(net, Batches())
    model.fit((batch for batch in Batches()), verbose=0)
    assert is_same(model.net, net)


def test_a_generator_that_ran_dry_is_an_error_and_not_a_short_epoch() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"ran dry after 1 of 2 steps, and an iterator can't start again"):
        model.fit(iter(Batches()), epochs=2, steps_per_epoch=2, verbose=0)
    assert model.history.epoch == [0]


class Named(nn.Module):
    """Two inputs of unlike meaning, so that a swap shows."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(1, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) - 2 * self.right(b)


def make_named() -> Named:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Named()


class OneNamed(nn.Module):
    """Named, taking its inputs as a pair: what the loop by hand calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_named()

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.net(*inputs)


B = torch.linspace(0, 3, 10).reshape(10, 1)


@pytest.mark.parametrize(
    "x",
    [(X, B), {"a": X, "b": B}, {"b": B, "a": X}, (X.numpy(), B.numpy()), [X, B]],
    ids=["tuple", "dict", "dict in another order", "tuple of numpy", "list"],
)
def test_several_inputs_reach_forward_as_arguments(x: Any) -> None:
    pair, model = OneNamed(), make_model(make_named())
    optimizer = sgd(pair.parameters())
    for a, b, y in zip(X.split(4), B.split(4), Y.split(4), strict=True):
        mse_loss(pair((a, b)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    fit(model, x, Y)
    assert is_same(model.net, pair.net)


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_several_inputs_come_from_a_loader(form: str) -> None:
    rows = {
        "tuple": [((a, b), y) for a, b, y in zip(X, B, Y, strict=True)],
        "list": [([a, b], y) for a, b, y in zip(X, B, Y, strict=True)],
        "dict": [({"a": a, "b": b}, y) for a, b, y in zip(X, B, Y, strict=True)],
    }[form]
    model, expected = make_model(make_named()), make_model(make_named())
    fit(expected, (X, B), Y)
    model.fit(DataLoader(rows, batch_size=4), verbose=0)
    assert is_same(model.net, expected.net)


W = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 3.0, 0.0, 1.0, 1.0, 4.0])


@pytest.mark.parametrize(
    "data", [(X, Y, W), DataLoader(TensorDataset(X, Y, W), batch_size=4), TensorDataset(X, Y, W)], ids=type
)
def test_third_item_weighs_the_loss_and_divides_by_the_count(data: Any) -> None:
    net, model = make_net(), make_model()
    optimizer = sgd(net.parameters())
    for x, y, w in zip(X.split(4), Y.split(4), W.split(4), strict=True):
        ((net(x) - y).square().mean(1) * w).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    arguments = {} if isinstance(data, DataLoader) else {"batch_size": 4}
    model.fit(data, shuffle=False, verbose=0, **arguments)
    for name, value in model.net.state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[name], rtol=1e-6, atol=1e-7)
    unweighted = make_model()
    fit(unweighted)
    assert not is_same(model.net, unweighted.net)


def test_third_item_weighs_evaluate_and_validation_too() -> None:
    model = make_model()
    expected = ((model.net(X) - Y).square().mean(1) * W).mean().item()
    assert model.evaluate((X, Y, W), verbose=0) == {"loss": pytest.approx(expected, rel=1e-6)}
    history = fit(model, validation_data=(X, Y, W))
    expected = ((model.net(X) - Y).square().mean(1) * W).mean().item()
    assert history.history["val_loss"] == [pytest.approx(expected, rel=1e-6)]


# ---- validation ----


def test_validation_split_takes_the_last_rows_before_shuffling() -> None:
    model = make_model()
    seen = note_forwards(model.net)
    model.fit(X, Y, batch_size=32, validation_split=0.25, shuffle=True, verbose=0)
    assert [training for training, _ in seen] == [True, False]
    assert sorted(seen[0][1]) == X[:7, 0].tolist()
    assert seen[1][1] == X[7:, 0].tolist()


def test_validation_split_takes_the_last_rows_of_a_dataset() -> None:
    model = make_model()
    seen = note_forwards(model.net)
    model.fit(TensorDataset(X, Y), validation_split=0.3, verbose=0)
    assert sorted(seen[0][1]) == X[:7, 0].tolist()
    assert seen[1][1] == X[7:, 0].tolist()


def test_validation_data_wins_over_validation_split() -> None:
    model = make_model()
    seen = note_forwards(model.net)
    fit(model, batch_size=32, validation_split=0.5, validation_data=(X[:2], Y[:2]))
    assert seen == [(True, X[:, 0].tolist()), (False, X[:2, 0].tolist())]


def test_val_loss_is_of_the_weights_after_the_epoch_in_eval_mode() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    model = make_model(net)
    history = fit(model, validation_data=(X, Y), validation_batch_size=10)
    net.eval()
    assert history.history["val_loss"] == [mse_loss(net(X), Y).item()]


def test_validation_batch_size_defaults_to_batch_size() -> None:
    for arguments, sizes in (({}, [4, 4, 2]), ({"validation_batch_size": 5}, [5, 5])):
        model = make_model()
        seen = note_forwards(model.net)
        fit(model, validation_data=(X, Y), **arguments)
        assert [len(rows) for training, rows in seen if not training] == sizes


def test_validation_steps_begin_again_each_time() -> None:
    model = make_model()
    seen = note_forwards(model.net)
    fit(model, batch_size=10, epochs=2, validation_data=(X, Y), validation_batch_size=3, validation_steps=2)
    validated = [rows for training, rows in seen if not training]
    assert validated == [X[:3, 0].tolist(), X[3:6, 0].tolist()] * 2


def test_too_many_validation_steps_warn() -> None:
    with pytest.warns(UserWarning, match=r"validation_data gave 3 batches, fewer than the 5 steps asked for"):
        fit(make_model(), validation_data=(X, Y), validation_steps=5)


@pytest.mark.parametrize(
    ("freq", "validated"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), ([1, 4], [0, 3]), ((5,), [4]), ({2}, [1])]
)
def test_validation_freq_counts_epochs_from_1(freq: Any, validated: list[int]) -> None:
    epochs: list[int] = []
    note = LambdaCallback(on_epoch_end=lambda epoch, logs: "val_loss" in logs and epochs.append(epoch))
    history = fit(make_model(), epochs=5, validation_data=(X, Y), validation_freq=freq, callbacks=[note])
    assert epochs == validated
    assert len(history.history["val_loss"]) == len(validated)
    assert len(history.history["loss"]) == 5


def test_an_epoch_without_validation_does_not_repeat_the_last_val_loss() -> None:
    logs_of: dict[int, list[str]] = {}
    note = LambdaCallback(on_epoch_end=lambda epoch, logs: logs_of.update({epoch: list(logs)}))
    fit(make_model(), epochs=3, validation_data=(X, Y), validation_freq=[1], callbacks=[note])
    assert logs_of == {0: ["loss", "val_loss"], 1: ["loss"], 2: ["loss"]}


def test_an_iterator_validates_once() -> None:
    model = make_model()
    history = fit(model, epochs=3, validation_data=iter(Batches()), validation_freq=[3])
    assert history.history["val_loss"] == [pytest.approx(mse_loss(model.net(X), Y).item(), rel=1e-6)]


# ---- steps, epochs, shuffling ----


def test_steps_per_epoch_carries_on_between_epochs_and_starts_again() -> None:
    model = make_model()
    seen = note_forwards(model.net)
    history = model.fit(list(zip(X.split(2), Y.split(2), strict=True)), steps_per_epoch=2, epochs=3, verbose=0)
    firsts = [rows[0] for _, rows in seen]
    assert firsts == X[[0, 2, 4, 6, 8, 0], 0].tolist()
    assert history.epoch == [0, 1, 2]
    assert history.params["steps"] == 2


def test_steps_per_epoch_may_exceed_the_data() -> None:
    model = make_model()
    seen = note_forwards(model.net)
    model.fit(LOADER, steps_per_epoch=5, verbose=0)
    assert [rows[0] for _, rows in seen] == X[[0, 4, 8, 0, 4], 0].tolist()


def test_steps_per_epoch_settles_the_batch_size_of_arrays() -> None:
    model = make_model()
    seen = note_forwards(model.net)
    model.fit(X, Y, steps_per_epoch=3, shuffle=False, verbose=0)
    assert [len(rows) for _, rows in seen] == [4, 4, 2]


def test_batch_size_defaults_to_32() -> None:
    model = make_model()
    seen = note_forwards(model.net)
    x = torch.zeros(70, 2)
    model.fit(x, torch.zeros(70, 1), verbose=0)
    assert [len(rows) for _, rows in seen] == [32, 32, 6]


def test_initial_epoch_counts_towards_epochs() -> None:
    net, model = make_net(), make_model()
    train_by_hand(net, Batches(), epochs=2)
    history = fit(model, initial_epoch=3, epochs=5)
    assert history.epoch == [3, 4]
    assert is_same(model.net, net)


def test_shuffle_draws_as_a_shuffling_loader_does() -> None:
    net, model = make_net(), make_model()
    torch.manual_seed(7)
    train_by_hand(net, DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True), epochs=3)
    by_hand = torch.get_rng_state()
    torch.manual_seed(7)
    fit(model, shuffle=True, epochs=3)
    assert is_same(model.net, net)
    assert torch.equal(torch.get_rng_state(), by_hand)


def test_shuffle_is_the_default() -> None:
    orders = []
    for arguments in ({}, {"shuffle": True}, {"shuffle": False}):
        torch.manual_seed(7)
        model = make_model()
        seen = note_forwards(model.net)
        model.fit(X, Y, batch_size=10, verbose=0, **arguments)
        orders.append(seen[0][1])
    assert orders[0] == orders[1]
    assert orders[2] == X[:, 0].tolist() != orders[0]


def test_shuffle_false_warns_only_beside_a_loader_that_shuffles() -> None:
    model = make_model()
    model.fit(LOADER, shuffle=False, verbose=0)  # warnings are errors here
    with pytest.warns(UserWarning, match="shuffle=False has no effect on a DataLoader"):
        model.fit(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True), shuffle=False, verbose=0)


# ---- history, and fit after fit ----


def test_history_holds_the_epochs_of_its_fit_and_model_history_joins_them() -> None:
    model = make_model()
    first = fit(model, epochs=2)
    second = fit(model, epochs=3, validation_data=(X, Y))
    assert (first.epoch, second.epoch) == ([0, 1], [0, 1, 2])
    assert model.history.epoch == [0, 1, 2, 3, 4]
    assert model.history.history["loss"] == first.history["loss"] + second.history["loss"]
    assert model.history.history["val_loss"] == second.history["val_loss"]
    assert first.model is second.model is model
    assert first.params == {"verbose": 0, "epochs": 2, "steps": 3}


def test_a_second_fit_trains_on_as_one_longer_fit() -> None:
    one, two = make_model(), make_model()
    whole = fit(one, epochs=5)
    first, second = fit(two, epochs=2), fit(two, epochs=3)
    assert is_same(one.net, two.net)
    assert first.history["loss"] + second.history["loss"] == whole.history["loss"]


def test_a_second_fit_keeps_the_optimizer_state() -> None:
    one, two = make_model(optimizer="adam"), make_model(optimizer="adam")
    fit(one, epochs=4)
    fit(two, epochs=2)
    fit(two, epochs=2)
    assert is_same(one.net, two.net)


def test_a_second_fit_goes_on_in_the_order_of_one_longer_fit_with_the_same_loader() -> None:
    one, two = make_model(), make_model()
    for model, epochs in ((one, [4]), (two, [1, 3])):
        loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
        for n in epochs:
            model.fit(loader, epochs=n, verbose=0)
    assert is_same(one.net, two.net)


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_a_scheduler_by_name_gives_a_second_fit_the_rates_of_the_first(name: str) -> None:
    model = make_model(lr_scheduler=name)
    assert model.optimizer is not None
    (group,), rates = model.optimizer.param_groups, []
    note = LambdaCallback(on_epoch_begin=lambda epoch, logs: rates.append(group["lr"]))
    fit(model, epochs=4, callbacks=[note])
    fit(model, epochs=4, callbacks=[note])
    assert len(set(rates[:4])) == 4
    assert rates[4:] == pytest.approx(rates[:4])


def test_fit_leaves_training_flags_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model = make_model(net)
    net.train()
    net[1].eval()
    flags = [module.training for module in net.modules()]
    fit(model, validation_data=(X, Y))
    assert [module.training for module in net.modules()] == flags
    net.eval()
    fit(model)
    assert not any(module.training for module in net.modules())


def test_verbose_0_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    fit(model, epochs=2, validation_data=(X, Y))
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# ---- compile, again ----


def test_a_second_compile_forgets_the_first_wholly() -> None:
    plain, twice = (
        make_model(),
        make_model(
            loss="mae",
            optimizer="adam",
            metrics=["mse"],
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
            lr_scheduler_interval="step",
            mixed_precision="bf16",
            gradient_accumulation_steps=2,
            clip_grad_norm=1e-3,
            clip_grad_value=1e-3,
            loop="class",
        ),
    )
    first = twice.optimizer
    twice.compile("mse", sgd)
    assert twice.optimizer is not first
    expected, history = fit(plain, epochs=3), fit(twice, epochs=3)
    assert is_same(plain.net, twice.net)
    assert history.history == expected.history
    assert list(history.history) == ["loss"]


def test_a_second_compile_begins_a_new_optimizer_state() -> None:
    model = make_model(optimizer="adam")
    fit(model, epochs=2)
    fresh = make_model(optimizer="adam", net=make_net())
    fresh.net.load_state_dict(model.net.state_dict())
    model.compile("mse", "adam")
    fit(model)
    fit(fresh)
    assert is_same(model.net, fresh.net)


def test_metrics_of_one_fit_do_not_leak_into_the_next() -> None:
    model = make_model(metrics={"error": "mae"})
    fit(model, epochs=2)
    logs = model.evaluate(X, Y, verbose=0)
    assert logs["error"] == pytest.approx((model.net(X) - Y).abs().mean().item(), rel=1e-6)
    assert model.evaluate(X, Y, verbose=0) == logs


class ScaledError(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (self.scale * outputs - y).square().mean() + self.scale.square()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", sgd], ids=["sgd", "adam", "factory"])
def test_parameters_of_a_loss_join_an_optimizer_made_by_compile(optimizer: Any) -> None:
    loss = ScaledError()
    model = make_model(loss=loss, optimizer=optimizer)
    assert model.optimizer is not None
    held = [id(parameter) for group in model.optimizer.param_groups for parameter in group["params"]]
    assert id(loss.scale) in held
    fit(model)
    assert loss.scale.item() != 1.0


def test_parameters_of_a_loss_train_as_by_hand() -> None:
    net, loss_fn = make_net(), ScaledError()
    optimizer = sgd([*net.parameters(), *loss_fn.parameters()])
    for x, y in Batches():
        loss_fn(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss = ScaledError()
    model = make_model(loss=loss)
    fit(model)
    assert is_same(model.net, net)
    assert torch.equal(loss.scale, loss_fn.scale)


def test_an_optimizer_object_is_used_as_given() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    model = make_model(net, optimizer=optimizer)
    assert model.optimizer is optimizer
    before = weights_of(net)
    fit(model)
    assert torch.equal(net[0].weight, before["0.weight"])
    assert not torch.equal(net[2].weight, before["2.weight"])


# ---- evaluate ----


def test_evaluate_returns_loss_and_metrics_in_compile_order() -> None:
    model = make_model(metrics={"z": "mae", "a": lambda outputs, y: (outputs - y).square()})
    logs = model.evaluate(X, Y, batch_size=4, verbose=0)
    outputs = model.net(X).detach()
    assert list(logs) == ["loss", "z", "a"]
    assert logs["loss"] == pytest.approx(mse_loss(outputs, Y).item(), rel=1e-6)
    assert logs["z"] == pytest.approx((outputs - Y).abs().mean().item(), rel=1e-6)
    assert logs["a"] == pytest.approx(logs["loss"], rel=1e-6)
    assert all(type(value) is float for value in logs.values())


def test_evaluate_as_a_list_puts_the_loss_first_and_alone_it_is_a_number() -> None:
    model = make_model(metrics={"z": "mae", "a": "rmse"})
    logs = model.evaluate(X, Y, verbose=0)
    assert model.evaluate(X, Y, verbose=0, return_dict=False) == list(logs.values())
    model.compile("mse", sgd)
    loss = model.evaluate(X, Y, verbose=0, return_dict=False)
    assert loss == logs["loss"]
    assert type(loss) is float


def test_evaluate_changes_no_weights_and_reads_in_eval_mode() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model = make_model(net)
    with nothing_happens(model):
        first, second = (model.evaluate(X, Y, batch_size=4, verbose=0) for _ in range(2))
    assert first == second


def test_evaluate_reads_the_first_steps_batches() -> None:
    model = make_model()
    seen = note_forwards(model.net)
    model.evaluate(X, Y, batch_size=3, steps=2, verbose=0)
    assert seen == [(False, X[:3, 0].tolist()), (False, X[3:6, 0].tolist())]


class Noisy(nn.Module):
    """Draws from every generator in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand(len(x), 1) + random.random() + float(np.random.rand())


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_random_state_is_left_alone(verb: str) -> None:
    model = make_model(Noisy())
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    with nothing_happens(model):
        getattr(model, verb)(loader, verbose=0)


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_training_flags_are_left_alone(verb: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model = make_model(net)
    net.train()
    net[1].eval()
    getattr(model, verb)(LOADER, verbose=0)
    assert [net.training, *(module.training for module in net)] == [True, True, False, True]


@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
def test_training_flags_and_random_state_are_put_back_after_an_exception(verb: str) -> None:
    class Failing(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ZeroDivisionError

    model = make_model(Failing())
    model.net.train()
    model.net.layer.eval()
    state = random_state()
    with pytest.raises(ZeroDivisionError):
        getattr(model, verb)(LOADER, verbose=0)
    assert (model.net.training, model.net.layer.training) == (True, False)
    if verb != "fit":
        assert random_state() == state


@pytest.mark.parametrize("loop", ["script", "function", "class"])
@pytest.mark.parametrize("hook", ["on_train_batch_begin", "on_train_batch_end", "on_test_batch_end", "on_epoch_end"])
def test_evaluate_and_predict_inside_fit_change_nothing_in_it(hook: str, loop: str) -> None:
    def make() -> kt.Model:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        return make_model(
            net,
            optimizer="adam",
            metrics={"error": "mae"},
            loop=loop,
            gradient_accumulation_steps=2,
            clip_grad_norm=1.0,
        )

    def train(model: kt.Model, callbacks: list[kt.Callback]) -> dict[str, Any]:
        torch.manual_seed(5)
        history = fit(model, epochs=2, shuffle=True, validation_data=(X, Y), callbacks=callbacks)
        return history.history

    calls: list[int] = []

    def look(index: int, logs: Any) -> None:
        calls.append(index)
        flags = [module.training for module in model.net.modules()]
        model.evaluate(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True), verbose=0)
        model.predict(X, batch_size=4, verbose=0)
        assert [module.training for module in model.net.modules()] == flags

    plain, model = make(), make()
    expected = train(plain, [])
    state = torch.get_rng_state()
    assert train(model, [LambdaCallback(**{hook: look})]) == expected
    assert calls
    assert is_same(model.net, plain.net)
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_training_still_reaches_the_fit_after_evaluate_in_the_same_hook() -> None:
    model = make_model()

    def look(epoch: int, logs: Any) -> None:
        model.evaluate(X, Y, verbose=0)
        model.stop_training = True

    assert fit(model, epochs=3, callbacks=[LambdaCallback(on_epoch_end=look)]).epoch == [0]


# ---- predict ----


def test_predict_gives_rows_in_order_with_a_short_last_batch() -> None:
    model = make_model()
    expected = torch.cat([model.net(x) for x in X.split(4)]).detach().numpy()
    predictions = model.predict(X, batch_size=4, verbose=0)
    assert isinstance(predictions, np.ndarray)
    assert predictions.dtype == np.float32
    assert np.array_equal(predictions, expected)


def test_predict_ignores_targets() -> None:
    model = make_model()
    assert np.array_equal(model.predict(LOADER, verbose=0), model.predict(X, batch_size=4, verbose=0))


def test_predict_works_before_compile() -> None:
    model = kt.Model(make_net(), device="cpu")
    assert np.array_equal(model.predict(X, verbose=0), model.net(X).detach().numpy())
    assert np.array_equal(model.predict_on_batch(X), model.net(X).detach().numpy())


Pair = namedtuple("Pair", ["mean", "rows"])


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "named tuple", "nested"])
def test_predict_nests_as_the_outputs_do(form: str) -> None:
    build: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "tuple": lambda a, b: (a, b),
        "list": lambda a, b: [a, b],
        "dict": lambda a, b: {"b": b, "a": a},
        "named tuple": Pair,
        "nested": lambda a, b: {"pair": (a, [b])},
    }

    class Forked(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return build[form](x.mean(1), x)

    predictions = kt.Model(Forked(), device="cpu").predict(X, batch_size=4, verbose=0)
    expected = build[form](X.mean(1), X)
    assert type(predictions) is type(expected)
    if form == "nested":
        assert list(predictions) == ["pair"]
        assert type(predictions["pair"]) is tuple
        assert type(predictions["pair"][1]) is list
        mean, rows = predictions["pair"][0], predictions["pair"][1][0]
    elif form == "dict":
        assert list(predictions) == ["b", "a"]
        mean, rows = predictions["a"], predictions["b"]
    else:
        mean, rows = predictions
    assert np.array_equal(mean, X.mean(1).numpy())
    assert np.array_equal(rows, X.numpy())


def test_predict_gives_bfloat16_as_float32() -> None:
    class Short(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.bfloat16()

    predictions = kt.Model(Short(), device="cpu").predict(X, verbose=0)
    assert predictions.dtype == np.float32
    assert np.array_equal(predictions, X.bfloat16().float().numpy())
    model = make_model(mixed_precision="bf16")
    predictions = model.predict(X, verbose=0)
    assert predictions.dtype == np.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(predictions, model.net(X).detach().float().numpy())


def test_predict_reads_the_first_steps_batches_of_an_endless_generator() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield from X.split(4)

    assert len(make_model().predict(endless(), steps=4, verbose=0)) == 4 + 4 + 2 + 4


def test_predict_takes_several_inputs_from_batches() -> None:
    model = make_model(make_named())
    batches = [((a, b),) for a, b in zip(X.split(4), B.split(4), strict=True)]
    expected = torch.cat([model.net(a, b) for ((a, b),) in batches]).detach().numpy()
    assert np.array_equal(model.predict(batches, verbose=0), expected)
    assert np.array_equal(model.predict({"a": X, "b": B}, batch_size=4, verbose=0), expected)


def test_predict_refuses_outputs_without_a_batch_axis() -> None:
    class Scalar(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    with pytest.raises(ValueError, match="joins outputs on their first, batch axis"):
        kt.Model(Scalar(), device="cpu").predict(X, verbose=0)


# ---- one batch ----


def test_train_on_batch_is_one_step_by_hand_and_returns_the_loss_before_it() -> None:
    net, model = make_net(), make_model()
    before = mse_loss(net(X), Y).item()
    losses = [model.train_on_batch(X, Y)["loss"] for _ in range(2)]
    by_hand = train_by_hand(net, [(X, Y)], epochs=2)
    assert losses == by_hand
    assert losses[0] == before
    assert is_same(model.net, net)


@pytest.mark.parametrize("loop", ["script", "function", "class"])
def test_train_on_batch_uses_the_loop_and_gives_metrics(loop: str) -> None:
    model = make_model(metrics={"error": "mae"}, loop=loop)
    error = (model.net(X) - Y).abs().mean().item()
    logs = model.train_on_batch(X.numpy(), Y.numpy())
    assert list(logs) == ["loss", "error"]
    assert logs["error"] == pytest.approx(error, rel=1e-6)


def test_train_on_batch_updates_though_gradients_accumulate() -> None:
    net, model = make_net(), make_model(gradient_accumulation_steps=4)
    model.train_on_batch(X, Y)
    train_by_hand(net, [(X, Y)])
    assert is_same(model.net, net)


def test_train_on_batch_leaves_flags_and_history_alone() -> None:
    model = make_model()
    model.net.eval()
    model.train_on_batch(X, Y)
    assert not model.net.training
    assert model.history.epoch == []


@pytest.mark.parametrize(("interval", "rates"), [("step", [0.1, 0.05, 0.025]), ("epoch", [0.1, 0.1, 0.1])])
def test_train_on_batch_advances_a_scheduler_that_steps_by_update(interval: Any, rates: list[float]) -> None:
    model = make_model(
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        lr_scheduler_interval=interval,
    )
    assert model.optimizer is not None
    seen = []
    for _ in range(3):
        seen.append(model.optimizer.param_groups[0]["lr"])
        model.train_on_batch(X, Y)
    assert seen == rates


def test_test_on_batch_gives_loss_and_metrics_in_eval_mode_and_trains_nothing() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model = make_model(net, metrics={"error": "mae"})
    with nothing_happens(model):
        logs = model.test_on_batch(X, Y)
    assert net.training
    net.eval()
    outputs = net(X).detach()
    assert logs == {
        "loss": mse_loss(outputs, Y).item(),
        "error": pytest.approx((outputs - Y).abs().mean().item(), rel=1e-6),
    }


def test_predict_on_batch_gives_numpy_in_eval_mode() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model = make_model(net)
    predictions = model.predict_on_batch(X.numpy())
    assert net.training
    net.eval()
    assert np.array_equal(predictions, net(X).detach().numpy())


# ---- stopping ----


@pytest.mark.parametrize("loop", ["script", "function", "class"])
def test_stop_inside_an_epoch_cuts_it_but_validation_and_epoch_end_still_run(loop: str) -> None:
    model = make_model(loop=loop)
    seen = note_forwards(model.net)
    calls: list[Any] = []

    def stop(batch: int, logs: Any) -> None:
        model.stop_training = batch == 1

    callback = LambdaCallback(
        on_train_batch_end=stop,
        on_epoch_end=lambda epoch, logs: calls.append((epoch, list(logs))),
        on_train_end=lambda logs: calls.append(list(logs)),
    )
    history = fit(model, batch_size=2, epochs=3, validation_data=(X, Y), validation_batch_size=10, callbacks=[callback])
    assert seen == [(True, X[:2, 0].tolist()), (True, X[2:4, 0].tolist()), (False, X[:, 0].tolist())]
    assert calls == [(0, ["loss", "val_loss"]), ["loss", "val_loss"]]
    assert history.epoch == [0]


def test_the_logs_of_a_cut_epoch_are_of_its_batches() -> None:
    net, model = make_net(), make_model()
    stop = LambdaCallback(on_train_batch_end=lambda batch, logs: setattr(model, "stop_training", True))
    history = fit(model, callbacks=[stop])
    assert history.history["loss"] == train_by_hand(net, [(X[:4], Y[:4])])
    assert is_same(model.net, net)


def test_a_stop_inside_an_accumulation_window_waits_for_its_step() -> None:
    model, cut = make_model(gradient_accumulation_steps=3), make_model(gradient_accumulation_steps=3)
    seen = note_forwards(cut.net)
    stop = LambdaCallback(on_train_batch_end=lambda batch, logs: setattr(cut, "stop_training", True))
    fit(cut, batch_size=2, callbacks=[stop])
    assert len(seen) == 3
    fit(model, X[:6], Y[:6], batch_size=2)
    assert is_same(cut.net, model.net)


def test_a_fit_after_a_stopped_one_runs_in_full() -> None:
    model = make_model()
    stop = LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True))
    assert fit(model, epochs=3, callbacks=[stop]).epoch == [0]
    assert model.stop_training is False
    assert fit(model, epochs=3).epoch == [0, 1, 2]


def test_stop_training_outside_fit_is_refused() -> None:
    model = make_model()
    with pytest.raises(RuntimeError, match=r"can be set only while fit\(\) runs"):
        model.stop_training = True


# ---- exceptions ----


class FailsAt(nn.Module):
    """Raises in one call of forward, counted from 0."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.net, self.call, self.calls = make_net(), call, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call + 1:
            raise ZeroDivisionError("of the user's")
        return self.net(x)


@pytest.mark.parametrize("loop", ["script", "function", "class"])
@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch"])
def test_traceback_of_an_error_in_forward_ends_in_the_users_file(verb: str, loop: str) -> None:
    model = make_model(FailsAt(0), loop=loop)
    with pytest.raises(ZeroDivisionError, match=r"^of the user's$") as caught:
        getattr(model, verb)(*((X,) if "predict" in verb else (X, Y)))
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.name) == (__file__, "forward")
    assert last.line == 'raise ZeroDivisionError("of the user\'s")'
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("loop", ["script", "function", "class"])
def test_the_fit_after_an_exception_has_no_stale_gradients(loop: str, accumulation: int) -> None:
    model = make_model(FailsAt(1), gradient_accumulation_steps=accumulation, loop=loop)
    with pytest.raises(ZeroDivisionError):
        fit(model, batch_size=2)
    fresh = make_model(gradient_accumulation_steps=accumulation, loop=loop)
    fresh.net.load_state_dict(model.net.net.state_dict())
    expected, history = fit(fresh, batch_size=2, epochs=2), fit(model, batch_size=2, epochs=2)
    assert is_same(model.net.net, fresh.net)
    assert history.history == expected.history


def test_an_exception_in_a_callback_between_backward_and_step_leaves_no_stale_gradients() -> None:
    def fail(batch: int, logs: Any) -> None:
        raise ZeroDivisionError

    model, fresh = make_model(gradient_accumulation_steps=3), make_model(gradient_accumulation_steps=3)
    with pytest.raises(ZeroDivisionError):
        fit(model, batch_size=2, callbacks=[LambdaCallback(on_train_batch_end=fail)])
    assert is_same(model.net, fresh.net)
    model.train_on_batch(X, Y)
    fresh.train_on_batch(X, Y)
    assert is_same(model.net, fresh.net)


def test_history_keeps_the_epochs_finished_before_an_exception() -> None:
    model = make_model(FailsAt(4))
    with pytest.raises(ZeroDivisionError):
        fit(model, epochs=3)  # three batches an epoch
    assert model.history.epoch == [0]
    fit(model, epochs=1)
    assert model.history.epoch == [0, 1]


def test_evaluate_and_predict_work_after_an_exception() -> None:
    model = make_model(FailsAt(1))
    with pytest.raises(ZeroDivisionError):
        fit(model)
    expected = mse_loss(model.net(X), Y).item()
    assert model.evaluate(X, Y, verbose=0) == {"loss": pytest.approx(expected, rel=1e-6)}
    assert model.predict(X, verbose=0).shape == (10, 1)
    with pytest.raises(RuntimeError, match=r"only while fit\(\) runs"):
        model.stop_training = True
