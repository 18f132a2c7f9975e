"""Several outputs: their losses, weights and metrics, and the log keys, equal a sum written by hand in torch."""

import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection

import kerastorch as kt
from kerastorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from kerastorch.loops import LOOPS

# All loops agree in test_loops.py; where they are not the point, the others are for the slow part.
mostly_one_loop = pytest.mark.parametrize(
    "loop", ["script", *(pytest.param(loop, marks=pytest.mark.slow) for loop in LOOPS if loop != "script")]
)
ROWS, SIZE, EPOCHS = 11, 4, 2
_draw = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, 3, generator=_draw)
PRICE = torch.randn(ROWS, 1, generator=_draw)
KIND = torch.randint(0, 3, (ROWS,), generator=_draw)
W = torch.rand(ROWS, generator=_draw) + 0.1
W2 = torch.rand(ROWS, generator=_draw) + 0.1

Both = namedtuple("Both", ["price", "kind"])

BUILD: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda price, kind: (price, kind),
    "list": lambda price, kind: [price, kind],
    "dict": lambda price, kind: {"kind": kind, "price": price},
    "named tuple": Both,
}
LISTED = ("tuple", "list")


class Heads(nn.Module):
    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        torch.default_generator.manual_seed(1)
        self.body, self.price, self.kind = nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(5, 3)
        self.drop = nn.Dropout(0.2)
        self.build = BUILD[form]

    def forward(self, x: Tensor) -> Any:
        hidden = self.drop(self.body(x).tanh())
        return self.build(self.price(hidden), self.kind(hidden))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def losses_for(form: str) -> Any:
    return ["mse", "cross_entropy"] if form in LISTED else {"price": "mse", "kind": "cross_entropy"}


def targets_for(form: str) -> Any:
    return (PRICE, KIND) if form in LISTED else {"price": PRICE, "kind": KIND}


def names_for(form: str) -> tuple[str, str]:
    return ("output_0", "output_1") if form in LISTED else ("price", "kind")


def make_model(form: str = "dict", **arguments: Any) -> kt.Model:
    model = kt.Model(Heads(form), device="cpu")
    model.compile(**{"loss": losses_for(form), "optimizer": sgd, **arguments})
    return model


def fit(model: kt.Model, y: Any, **arguments: Any) -> dict[str, list[Any]]:
    torch.default_generator.manual_seed(5)
    arguments = {"batch_size": SIZE, "shuffle": False, "epochs": EPOCHS, "verbose": 0, **arguments}
    return model.fit(X, y, **arguments).history


def batches() -> Any:
    """A loader, since it draws a seed a pass before dropout draws."""
    return DataLoader(TensorDataset(X, PRICE, KIND, W, W2), SIZE)


def parts_of(outputs: Any) -> tuple[Tensor, Tensor]:
    return (outputs["price"], outputs["kind"]) if isinstance(outputs, dict) else tuple(outputs)


def train_by_hand(net: nn.Module, price_factor: float, kind_factor: float, weights: str = "none") -> list[list[float]]:
    """Return [total, price, kind] of each epoch; weights: "none", "one" for both, or "each" its own."""
    optimizer, logs = sgd(net.parameters()), []
    torch.default_generator.manual_seed(5)
    for _ in range(EPOCHS):
        sums = np.zeros(3)
        for x, y_price, y_kind, w, w2 in batches():
            price, kind = parts_of(net(x))
            if weights == "none":
                price_loss, kind_loss = mse_loss(price, y_price), cross_entropy(kind, y_kind)
            else:
                price_loss = (mse_loss(price, y_price, reduction="none") * w[:, None]).mean()
                kind_loss = (cross_entropy(kind, y_kind, reduction="none") * (w if weights == "one" else w2)).mean()
            loss = price_factor * price_loss + kind_factor * kind_loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sums += len(x) * np.array([loss.item(), price_loss.item(), kind_loss.item()])
        logs.append((sums / ROWS).tolist())
    return logs


def is_same(net: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


# ---- losses and their weights ----

LOSS_WEIGHTS: dict[str, tuple[Any, Any, tuple[float, float]]] = {  # given for a list, for a dict, the factors meant
    "none": (None, None, (1.0, 1.0)),
    "both": ([0.3, 2.0], {"kind": 2.0, "price": 0.3}, (0.3, 2.0)),
    "one missing": ([0.3], {"price": 0.3}, (0.3, 1.0)),
    "one is zero": ([1.0, 0.0], {"price": 1.0, "kind": 0.0}, (1.0, 0.0)),
}


@mostly_one_loop
@pytest.mark.parametrize("form", BUILD)
@pytest.mark.parametrize("case", LOSS_WEIGHTS)
def test_several_losses_train_as_their_weighted_sum_by_hand_to_the_bit(case: str, form: str, loop: str) -> None:
    as_list, as_dict, factors = LOSS_WEIGHTS[case]
    net = Heads(form)
    expected = train_by_hand(net, *factors)
    model = make_model(form, loss_weights=as_list if form in LISTED else as_dict, loop=loop)
    history = fit(model, targets_for(form))
    assert is_same(model.net, net)
    price, kind = names_for(form)
    assert list(history) == ["loss", f"{price}_loss", f"{kind}_loss"]
    for name, values in zip(history, zip(*expected, strict=True), strict=True):
        assert history[name] == pytest.approx(list(values), rel=1e-6), name


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("form", BUILD)
def test_validation_and_evaluate_log_the_total_weighted_and_the_parts_unweighted(form: str, loop: str) -> None:
    weights = [0.3, 2.0] if form in LISTED else {"price": 0.3, "kind": 2.0}
    model = make_model(form, loss_weights=weights, loop=loop)
    history = fit(model, targets_for(form), validation_data=(X, targets_for(form)))
    model.net.eval()
    price, kind = (part.detach() for part in parts_of(model.net(X)))
    price_loss, kind_loss = mse_loss(price, PRICE).item(), cross_entropy(kind, KIND).item()
    first, second = names_for(form)
    logs = {
        "loss": pytest.approx(0.3 * price_loss + 2.0 * kind_loss, rel=1e-6),
        f"{first}_loss": pytest.approx(price_loss, rel=1e-6),
        f"{second}_loss": pytest.approx(kind_loss, rel=1e-6),
    }
    assert model.evaluate(X, targets_for(form), batch_size=SIZE, verbose=0) == logs
    assert {name: history[f"val_{name}"][-1] for name in logs} == logs
    assert list(history) == [*logs, *(f"val_{name}" for name in logs)]
    predictions = parts_of(model.predict(X, batch_size=ROWS, verbose=0))
    assert np.array_equal(predictions[0], price.numpy())
    assert np.array_equal(predictions[1], kind.numpy())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loader_of_nested_targets_trains_as_the_arrays_do(loop: str) -> None:
    rows = [(x, {"price": price, "kind": kind}) for x, price, kind in zip(X, PRICE, KIND, strict=True)]
    models = [make_model(loop=loop) for _ in range(2)]
    history = fit(models[0], targets_for("dict"))
    torch.default_generator.manual_seed(5)
    assert models[1].fit(DataLoader(rows, SIZE), epochs=EPOCHS, verbose=0).history == history
    assert is_same(models[0].net, models[1].net)


def test_the_loss_of_one_output_alone_may_be_given_and_the_others_are_left() -> None:
    model = make_model(loss={"kind": "cross_entropy"})
    before = model.net.price.weight.clone()
    assert list(fit(model, {"kind": KIND})) == ["loss", "kind_loss"]
    assert torch.equal(model.net.price.weight, before)


def test_running_batch_logs_hold_the_losses_by_output() -> None:
    seen: list[dict[str, Any]] = []
    model = make_model()
    history = fit(
        model,
        targets_for("dict"),
        epochs=1,
        callbacks=[LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(dict(logs)))],
    )
    assert [list(logs) for logs in seen] == [["loss", "price_loss", "kind_loss"]] * 3
    assert {name: [value] for name, value in seen[-1].items()} == history
    assert all(logs["loss"] == pytest.approx(logs["price_loss"] + logs["kind_loss"], rel=1e-6) for logs in seen)


def test_train_and_test_on_batch_give_the_losses_by_output() -> None:
    model = make_model(loss_weights={"price": 0.5})
    for verb in (model.test_on_batch, model.train_on_batch):
        logs = verb(X, {"price": PRICE.numpy(), "kind": KIND.numpy()})
        assert list(logs) == ["loss", "price_loss", "kind_loss"]
        assert logs["loss"] == pytest.approx(0.5 * logs["price_loss"] + logs["kind_loss"], rel=1e-6)


def test_evaluate_as_a_list_puts_the_losses_by_output_after_the_metrics() -> None:
    model = make_model(metrics={"kind": "accuracy"})
    values = model.evaluate(X, targets_for("dict"), verbose=0, return_dict=False)
    logs = model.evaluate(X, targets_for("dict"), verbose=0)
    assert list(logs) == ["loss", "kind_accuracy", "price_loss", "kind_loss"]
    assert values == list(logs.values())


# ---- sample weights ----


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("form", BUILD)
@pytest.mark.parametrize("weights", ["one", "each"])
def test_sample_weight_of_one_tensor_or_of_each_output_weighs_as_by_hand(weights: str, form: str, loop: str) -> None:
    net = Heads(form)
    expected = train_by_hand(net, 0.3, 2.0, weights)
    factors = [0.3, 2.0] if form in LISTED else {"price": 0.3, "kind": 2.0}
    model = make_model(form, loss_weights=factors, loop=loop)
    each: Any = (W, W2) if form in LISTED else {"kind": W2, "price": W}
    history = fit(model, targets_for(form), sample_weight=W if weights == "one" else each)
    assert is_same(model.net, net)
    for name, values in zip(history, zip(*expected, strict=True), strict=True):
        assert history[name] == pytest.approx(list(values), rel=1e-6), name


def test_sample_weight_of_each_output_weighs_evaluate() -> None:
    model = make_model()
    logs = model.evaluate(X, targets_for("dict"), sample_weight={"price": W, "kind": W2}, batch_size=SIZE, verbose=0)
    model.net.eval()
    price, kind = parts_of(model.net(X))
    assert logs["price_loss"] == pytest.approx(((price - PRICE).square()[:, 0] * W).mean().item(), rel=1e-6)
    expected = (cross_entropy(kind, KIND, reduction="none") * W2).mean().item()
    assert logs["kind_loss"] == pytest.approx(expected, rel=1e-6)


def test_sample_weight_that_misses_an_output_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"the loss of 'kind' needs sample_weight as a dict with the key 'kind'"):
        fit(make_model(), targets_for("dict"), sample_weight={"price": W})


def test_class_weight_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="class_weight works with one output; give sample_weight for several"):
        fit(make_model(), targets_for("dict"), class_weight={0: 2.0})


# ---- metrics ----


def second_class(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs.argmax(1) == 1).float()


def price_and_kind(form: str, price: Any, kind: Any) -> Any:
    return [price, kind] if form in LISTED else {"kind": kind, "price": price}


METRICS: dict[str, tuple[Any, Any, set[str], set[str]]] = {  # of price, of kind, and their names
    "names": (["mae"], ["accuracy", "f1"], {"mae"}, {"accuracy", "f1"}),
    "a bare name": ("mae", "accuracy", {"mae"}, {"accuracy"}),
    "objects": ([MeanAbsoluteError()], "acc", {"mean_absolute_error"}, {"acc"}),
    "functions": ([], [second_class], set(), {"second_class"}),
    "dicts of names": ({"off": "mae", "far": "rmse"}, {"right": "acc"}, {"off", "far"}, {"right"}),
    "a collection": (
        MetricCollection({"mae": MeanAbsoluteError(), "mse": MeanSquaredError()}),
        "acc",
        {"mae", "mse"},
        {"acc"},
    ),
}


def metric_by_hand(name: str, price: Tensor, kind: Tensor) -> float:
    from torchmetrics.functional.classification import multiclass_f1_score

    error = price - PRICE
    if name in ("mae", "mean_absolute_error", "off"):
        return error.abs().mean().item()
    if name in ("mse", "far"):
        return error.square().mean().item() ** (0.5 if name == "far" else 1)
    if name == "second_class":
        return (kind.argmax(1) == 1).float().mean().item()
    if name == "f1":
        return multiclass_f1_score(kind, KIND, 3, average="macro").item()
    return (kind.argmax(1) == KIND).float().mean().item()


@pytest.mark.parametrize("form", ["tuple", "dict", "named tuple"])
@pytest.mark.parametrize("case", METRICS)
def test_metrics_of_each_output_are_logged_under_its_name_and_read_it_alone(case: str, form: str) -> None:
    of_price, of_kind, price_names, kind_names = METRICS[case]
    model = make_model(form, metrics=price_and_kind(form, of_price, of_kind))
    first, second = names_for(form)
    history = fit(model, targets_for(form), validation_data=(X, targets_for(form)))
    expected = {f"{first}_{name}" for name in price_names} | {f"{second}_{name}" for name in kind_names}
    losses = {"loss", f"{first}_loss", f"{second}_loss"}
    names = expected | losses
    assert set(history) == names | {f"val_{name}" for name in names}
    model.net.eval()
    price, kind = (part.detach() for part in parts_of(model.net(X)))
    for name in expected:
        by_hand = metric_by_hand(name.removeprefix(f"{first}_").removeprefix(f"{second}_"), price, kind)
        assert history[f"val_{name}"][-1] == pytest.approx(by_hand, rel=1e-5), name
    logs = model.evaluate(X, targets_for(form), batch_size=3, verbose=0)
    assert logs == {name: pytest.approx(history[f"val_{name}"][-1], rel=1e-6) for name in names}


def test_metrics_of_one_output_alone_may_be_given() -> None:
    logs = make_model(metrics={"kind": ["accuracy"]}).evaluate(X, targets_for("dict"), verbose=0)
    assert list(logs) == ["loss", "kind_accuracy", "price_loss", "kind_loss"]


def test_the_same_metric_object_for_both_outputs_is_two_metrics() -> None:
    class Prices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.layer(x), "b": 3 + self.layer(x)}

    metric, model = MeanAbsoluteError(), kt.Model(Prices(), device="cpu")
    model.compile({"a": "mse", "b": "mse"}, "sgd", {"a": metric, "b": metric})
    logs = model.evaluate(X, {"a": PRICE, "b": PRICE}, batch_size=SIZE, verbose=0)
    outputs = model(X)
    assert logs["a_mean_absolute_error"] == pytest.approx((outputs["a"] - PRICE).abs().mean().item(), rel=1e-6)
    assert logs["b_mean_absolute_error"] == pytest.approx((outputs["b"] - PRICE).abs().mean().item(), rel=1e-6)


@pytest.mark.parametrize("weights", ["one", "each"])
def test_weighted_metrics_of_each_output_use_the_weights_and_plain_ones_do_not(weights: str) -> None:
    model = make_model(metrics={"kind": "accuracy"}, weighted_metrics={"kind": "accuracy", "price": "mae"})
    given: Any = W if weights == "one" else {"price": W, "kind": W2}
    logs = model.evaluate(X, targets_for("dict"), sample_weight=given, batch_size=SIZE, verbose=0)
    model.net.eval()
    price, kind = (part.detach() for part in parts_of(model.net(X)))
    right, w = (kind.argmax(1) == KIND).float(), W if weights == "one" else W2
    assert logs["kind_accuracy"] == pytest.approx(right.mean().item(), rel=1e-6)
    assert logs["weighted_kind_accuracy"] == pytest.approx(((right * w).sum() / w.sum()).item(), rel=1e-6)
    error = (price - PRICE).abs()[:, 0]
    assert logs["price_mae"] == pytest.approx(((error * W).sum() / W.sum()).item(), rel=1e-6)


def test_a_metric_whose_key_would_be_that_of_its_outputs_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="metrics has 'loss' twice"):
        make_model(metrics={"price": {"loss": "mae"}})


# ---- callbacks ----


@pytest.mark.parametrize("monitor", ["val_kind_loss", "val_output_1_loss", "val_price_mae"])
def test_early_stopping_monitors_a_key_of_one_output(monitor: str) -> None:
    form = "tuple" if "output" in monitor else "dict"
    model = make_model(form, metrics=None if form == "tuple" else {"price": "mae"})
    history = fit(
        model,
        targets_for(form),
        epochs=6,
        validation_data=(X, targets_for(form)),
        callbacks=[EarlyStopping(monitor, min_delta=100.0, patience=2)],
    )
    assert len(history["loss"]) == 3
    assert len(history[monitor]) == 3


def test_early_stopping_on_an_output_that_is_not_there_is_refused_before_the_first_step() -> None:
    model = make_model()
    before = model.net.body.weight.clone()
    with pytest.raises(ValueError, match=r"val_kid_loss.*did you mean 'val_kind_loss'"):
        fit(
            model,
            targets_for("dict"),
            validation_data=(X, targets_for("dict")),
            callbacks=[EarlyStopping("val_kid_loss")],
        )
    assert torch.equal(model.net.body.weight, before)


def test_model_checkpoint_keeps_the_best_by_one_output(tmp_path: Any) -> None:
    model = make_model()
    path = tmp_path / "best-{epoch}.pt"
    callback = ModelCheckpoint(str(path), monitor="val_kind_loss", save_best_only=True)
    history = fit(model, targets_for("dict"), epochs=3, validation_data=(X, targets_for("dict")), callbacks=[callback])
    best = int(np.argmin(history["val_kind_loss"])) + 1
    assert (tmp_path / f"best-{best}.pt").exists()


# ---- parameters of the losses ----


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return mse_loss(self.scale * outputs, y) + self.scale.square()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_parameters_of_losses_in_a_dict_join_a_named_optimizer_and_train_as_by_hand(optimizer: str, loop: str) -> None:
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    net, by_hand = Heads(), Scaled()
    hand_optimizer = made([*net.parameters(), *by_hand.parameters()], fused=True)
    torch.default_generator.manual_seed(5)
    for _ in range(EPOCHS):
        for x, y_price, y_kind, _, _ in batches():
            price, kind = parts_of(net(x))
            (by_hand(price, y_price) + cross_entropy(kind, y_kind)).backward()
            hand_optimizer.step()
            hand_optimizer.zero_grad()
    loss = Scaled()
    model = make_model(loss={"price": loss, "kind": "cross_entropy"}, optimizer=optimizer, loop=loop)
    fit(model, targets_for("dict"))
    assert loss.scale.item() != 1.5
    assert torch.equal(loss.scale, by_hand.scale)
    assert is_same(model.net, net)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("form", "arguments", "message"),
    [
        ("dict", {"loss_weights": {"prise": 1.0}}, r"loss_weights=.*does not fit losses of \['price', 'kind'\]"),
        ("dict", {"loss_weights": [1.0, 2.0]}, r"loss_weights=.*does not fit losses of \['price', 'kind'\].*as a dict"),
        ("tuple", {"loss_weights": {"price": 1.0}}, r"loss_weights=.*does not fit losses of \[0, 1\].*as a list"),
        ("tuple", {"loss_weights": [1.0, 2.0, 3.0]}, r"loss_weights=.*does not fit losses of \[0, 1\]"),
        ("tuple", {"loss": []}, r"does not fit losses of \[\]"),
        ("tuple", {"loss": "mse", "loss_weights": [1.0]}, r"loss_weights needs several losses"),
        ("dict", {"metrics": {"prise": "mae"}}, r"metrics=.*does not fit the losses of \['price', 'kind'\]"),
        ("dict", {"metrics": ["mae"]}, r"metrics=.*does not fit the losses of \['price', 'kind'\]"),
        ("dict", {"metrics": "mae"}, r"metrics='mae' does not fit the losses"),
        ("tuple", {"metrics": [["mae"]]}, r"metrics=.*does not fit the losses of \[0, 1\].*list of 2 lists"),
        (
            "dict",
            {"loss": {"price": "mse", "kind": "cros_entropy"}},
            r"'cros_entropy' is not known; did you mean 'cross_",
        ),
        ("dict", {"metrics": {"kind": "acuracy"}}, r"'acuracy' is not known; did you mean 'accuracy'"),
    ],
)
def test_compile_refuses_what_does_not_fit_the_losses(form: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(form, **arguments)


@pytest.mark.parametrize(
    ("form", "loss", "y", "message"),
    [
        (
            "dict",
            {"prise": "mse"},
            {"prise": PRICE},
            r"the loss of 'prise' needs the outputs as a dict with the key 'prise'",
        ),
        (
            "dict",
            ["mse", "cross_entropy"],
            (PRICE, KIND),
            r"the loss of 'output_0' needs the outputs as a tuple with index 0",
        ),
        (
            "tuple",
            {"price": "mse"},
            {"price": PRICE},
            r"the loss of 'price' needs the outputs as a dict with the key 'price'",
        ),
        (
            "tuple",
            ["mse", "cross_entropy", "mse"],
            (PRICE, KIND, PRICE),
            r"'output_2' needs the outputs as a tuple with ind",
        ),
        ("tuple", ["mse", "cross_entropy"], (PRICE,), r"'output_1' needs the targets as a tuple with index 1"),
        ("tuple", ["mse", "cross_entropy"], PRICE, r"'output_0' needs the targets as a tuple with index 0"),
        ("dict", None, {"price": PRICE}, r"the loss of 'kind' needs the targets as a dict with the key 'kind'"),
        (
            "dict",
            None,
            KIND,
            r"the loss of 'price' needs the targets as a dict with the key 'price', but they are Tensor\(4,",
        ),
        ("dict", "mse", PRICE, r"takes one tensor of outputs .* give a list or dict of losses, one for each"),
        ("tuple", "cross_entropy", (PRICE, KIND), r"takes one tensor of outputs .* give a list or dict of losses"),
        (
            "dict",
            None,
            {"price": PRICE[:, 0], "kind": KIND},
            r"compares number with number, but outputs are Tensor\(4, 1\)",
        ),
        ("dict", None, {"price": PRICE, "kind": KIND + 1}, r"labels run from 1 to 3"),
    ],
)
def test_outputs_and_targets_that_do_not_fit_the_losses_are_refused_before_the_first_step(
    form: str, loss: Any, y: Any, message: str
) -> None:
    model = make_model(form, loss=loss or losses_for(form))
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(model, y)
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    with pytest.raises(ValueError, match=message):
        model.evaluate(X, y, batch_size=SIZE, verbose=0)


def test_more_targets_than_losses_are_not_dropped_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, UserWarning), match="target"):
            fit(make_model("tuple"), (PRICE, KIND, PRICE))


def test_a_loader_that_gives_targets_as_parts_of_the_batch_is_refused() -> None:
    model = make_model("tuple")
    with pytest.raises(ValueError, match=r"sample_weight|'output_0' needs the targets as a tuple"):
        model.fit(DataLoader(TensorDataset(X, PRICE, KIND), SIZE), verbose=0)
