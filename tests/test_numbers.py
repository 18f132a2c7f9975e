"""Numbers: what the logs, the history and evaluate say is what the definitions give, and no batch size changes it."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import LambdaCallback
from kerastorch.loops import LOOPS
from kerastorch.metrics import CLASSIFICATION, METRICS, REGRESSION, WEIGHTED

ROWS, SIZE = 10, 4  # batches of 4, 4 and 2
_draw = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, 3, generator=_draw)
Y = torch.randn(ROWS, 2, generator=_draw)
CLASSES = torch.randint(0, 3, (ROWS,), generator=_draw)
W = torch.tensor([5.0, 5.0, 5.0, 5.0, 0.1, 0.1, 0.1, 0.1, 2.0, 2.0])  # no two batches weigh the same


def seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def make_net(outputs: int = 2, dropout: float = 0.0) -> nn.Sequential:
    seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, outputs))


def make_model(net: nn.Module | None = None, **arguments: Any) -> kt.Model:
    model = kt.Model(net if net is not None else make_net(), device="cpu")
    model.compile(**{"loss": "mse", "optimizer": sgd, **arguments})
    return model


def fit(model: kt.Model, x: Any = X, y: Any = Y, **arguments: Any) -> dict[str, list[Any]]:
    seed(5)
    return model.fit(x, y, **{"batch_size": SIZE, "shuffle": False, "verbose": 0, **arguments}).history


def freeze(model: kt.Model) -> kt.Model:
    assert model.optimizer is not None
    model.optimizer.param_groups[0]["lr"] = 0.0
    return model


def absolute(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).abs().mean()  # one number a batch


# ---- averages ----


@pytest.mark.parametrize("loop", LOOPS)
def test_weighted_loss_divides_by_the_elements_and_the_epoch_averages_by_rows_alone(loop: str) -> None:
    model = freeze(make_model(loop=loop))
    logs = fit(model, sample_weight=W)
    errors = (model.net(X) - Y).square().detach() * W[:, None]
    by_batch = [batch.sum().item() / batch.numel() for batch in errors.split(SIZE)]
    assert logs["loss"] == [pytest.approx(np.average(by_batch, weights=[4, 4, 2]), rel=1e-6)]
    assert logs["loss"] == [pytest.approx(errors.mean().item(), rel=1e-6)]
    by_weight_sum = errors.sum().item() / (2 * W.sum().item())
    assert logs["loss"][0] != pytest.approx(by_weight_sum, rel=0.1)


def test_epoch_averages_by_the_first_dimension_of_x_and_not_by_tokens() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor, y_hat: Tensor) -> Tensor:
            return y_hat

    hats = [torch.zeros(2, 3, 9), torch.ones(6, 3, 1)]
    targets = [torch.zeros(2, 9).long(), torch.full((6, 1), 2)]
    hats[0][:, 0] = 2.0
    batches = [((torch.zeros(len(hat), 1), hat), y) for hat, y in zip(hats, targets, strict=True)]
    net = nn.ModuleDict({"tokens": Tokens(), "unused": nn.Linear(1, 1)})
    net.forward = net["tokens"].forward
    model = make_model(net, loss="cross_entropy", metrics=["accuracy"])
    losses = [cross_entropy(hat, y).item() for hat, y in zip(hats, targets, strict=True)]
    logs = model.evaluate(batches, verbose=0)
    assert logs["loss"] == pytest.approx((2 * losses[0] + 6 * losses[1]) / 8, rel=1e-6)
    assert logs["accuracy"] == pytest.approx(18 / 24)  # a metric of tokens counts each


@pytest.mark.parametrize("loop", LOOPS)
def test_training_metrics_are_of_train_mode_while_weights_move(loop: str) -> None:
    net, model = make_net(dropout=0.5), make_model(make_net(dropout=0.5), metrics={"error": "mae"}, loop=loop)
    history = fit(model, validation_data=(X, Y), validation_batch_size=ROWS)
    optimizer, errors = sgd(net.parameters()), []
    seed(5)
    for x, y in DataLoader(TensorDataset(X, Y), SIZE):
        outputs = net(x)
        errors += (outputs - y).abs().flatten().tolist()
        mse_loss(outputs, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert history["error"] == [pytest.approx(np.mean(errors), rel=1e-6)]
    net.eval()
    after = (net(X) - Y).abs().mean().item()
    assert history["val_error"] == [pytest.approx(after, rel=1e-6)]
    assert history["error"][0] != pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_function_of_the_batch_is_averaged_by_rows_in_fit_and_evaluate(loop: str) -> None:
    model = freeze(make_model(metrics={"error": absolute}, loop=loop))
    history = fit(model, validation_data=(X, Y), validation_batch_size=3)
    expected = [pytest.approx((model.net(X) - Y).abs().mean().item(), rel=1e-6)]
    assert history["error"] == expected
    assert history["val_error"] == expected


# ---- weights in metrics ----


@pytest.mark.parametrize("loop", LOOPS)
def test_plain_metrics_ignore_sample_weight_and_weighted_metrics_use_it_in_fit(loop: str) -> None:
    model = freeze(make_model(metrics=["mae"], weighted_metrics=["mae", "rmse"], loop=loop))
    history = fit(model, sample_weight=W, validation_data=(X, Y, W))
    errors = (model.net(X) - Y).abs().detach()
    expected = {
        "mae": errors.mean().item(),
        "weighted_mae": (errors.mean(1) * W).sum().item() / W.sum().item(),
        "rmse": math.sqrt((errors.square().mean(1) * W).sum().item() / W.sum().item()),
    }
    for name, value in expected.items():
        assert history[name] == [pytest.approx(value, rel=1e-6)], name
        assert history[f"val_{name}"] == [pytest.approx(value, rel=1e-6)], name


def test_class_weight_weighs_the_training_loss_and_weighted_metrics_but_not_validation() -> None:
    model = freeze(
        make_model(make_net(3), loss="cross_entropy", metrics=["accuracy"], weighted_metrics={"weighted": "accuracy"})
    )
    history = fit(model, X, CLASSES, class_weight={0: 3.0, 2: 0.5}, validation_data=(X, CLASSES))
    outputs = model.net(X).detach()
    w = torch.tensor([3.0, 1.0, 0.5])[CLASSES]  # class 1 is missing: 1
    losses, right = cross_entropy(outputs, CLASSES, reduction="none"), (outputs.argmax(1) == CLASSES).float()
    assert history["loss"] == [pytest.approx((losses * w).mean().item(), rel=1e-6)]
    assert history["val_loss"] == [pytest.approx(losses.mean().item(), rel=1e-6)]
    assert history["weighted"] == [pytest.approx(((right * w).sum() / w.sum()).item(), rel=1e-6)]
    assert history["accuracy"] == history["val_accuracy"] == history["val_weighted"] == [pytest.approx(right.mean())]


@pytest.mark.parametrize("form", ["arrays", "loader", "weights in the batch"])
def test_class_weight_and_sample_weight_multiply(form: str) -> None:
    model = freeze(make_model(make_net(3), loss="cross_entropy"))
    table = {0: 3.0, 2: 0.5}
    if form == "arrays":
        history = fit(model, X, CLASSES, class_weight=table, sample_weight=W)
    elif form == "loader":
        loader = DataLoader(TensorDataset(X, CLASSES), SIZE)
        history = model.fit(loader, class_weight=table, sample_weight=W, verbose=0).history
    else:
        loader = DataLoader(TensorDataset(X, CLASSES, W), SIZE)
        history = model.fit(loader, class_weight=table, verbose=0).history
    w = torch.tensor([3.0, 1.0, 0.5])[CLASSES] * W
    losses = cross_entropy(model.net(X), CLASSES, reduction="none").detach()
    assert history["loss"] == [pytest.approx((losses * w).mean().item(), rel=1e-6)]


# ---- keys ----


@pytest.mark.parametrize("loop", LOOPS)
def test_keys_stand_in_compile_order_the_loss_first_and_validation_last(loop: str) -> None:
    model = make_model(metrics=["rmse", "mae"], weighted_metrics={"b": "mse", "a": "mae"}, loop=loop)
    order = ["loss", "rmse", "mae", "b", "a"]
    seen: dict[str, list[str]] = {}
    callback = LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.update(train=list(logs)),
        on_test_batch_end=lambda batch, logs: seen.update(test=list(logs)),
        on_epoch_end=lambda epoch, logs: seen.update(epoch=list(logs)),
    )
    history = fit(model, validation_data=(X, Y), callbacks=[callback])
    assert seen["train"] == seen["test"] == order
    assert seen["epoch"] == list(history) == [*order, *(f"val_{name}" for name in order)]
    logs = model.evaluate(X, Y, verbose=0)
    assert list(logs) == order
    assert model.evaluate(X, Y, verbose=0, return_dict=False) == list(logs.values())


@pytest.mark.parametrize("name", ["acc", "accuracy", "Accuracy"])
def test_a_name_is_the_log_key_as_it_was_given(name: str) -> None:
    model = make_model(make_net(3), loss="cross_entropy", metrics=[name])
    assert list(model.evaluate(X, CLASSES, verbose=0)) == ["loss", name]


# ---- validation ----


@pytest.mark.parametrize(("split", "cut"), [(0.25, 7), (0.1, 9), (0.8, 2), (0.55, 4)])
@pytest.mark.parametrize("form", ["arrays", "dataset", "loader"])
def test_validation_split_logs_the_last_rows_of_which_none_trains(form: str, split: float, cut: int) -> None:
    data = {
        "arrays": ((X, Y, W), {"batch_size": SIZE, "shuffle": True}),
        "dataset": (TensorDataset(X, Y, W), {"batch_size": SIZE, "shuffle": True}),
        "loader": (DataLoader(TensorDataset(X, Y, W), SIZE, shuffle=True), {}),
    }[form]
    model = freeze(make_model(weighted_metrics=["mae"]))
    history = model.fit(data[0], validation_split=split, epochs=2, verbose=0, **data[1]).history
    for name, rows in (("", slice(None, cut)), ("val_", slice(cut, None))):
        errors = (model.net(X[rows]) - Y[rows]).detach()
        loss = (errors.square().mean(1) * W[rows]).mean().item()
        mae = (errors.abs().mean(1) * W[rows]).sum().item() / W[rows].sum().item()
        assert history[f"{name}loss"] == [pytest.approx(loss, rel=1e-6)] * 2
        assert history[f"{name}mae"] == [pytest.approx(mae, rel=1e-6)] * 2


@pytest.mark.parametrize("loop", LOOPS)
def test_validation_steps_average_the_same_first_batches_in_every_epoch(loop: str) -> None:
    model = freeze(make_model(metrics={"error": absolute}, loop=loop))
    history = fit(model, epochs=3, validation_data=(X, Y), validation_batch_size=3, validation_steps=2)
    expected = model.evaluate(X[:6], Y[:6], batch_size=3, verbose=0)
    assert history["val_loss"] == [expected["loss"]] * 3
    assert history["val_error"] == [expected["error"]] * 3
    assert model.evaluate(X, Y, batch_size=3, steps=2, verbose=0) == expected


def test_history_has_a_value_for_each_epoch_that_validated_and_the_table_a_gap_for_the_others() -> None:
    model = make_model(metrics=["mae"])
    seed(5)
    history = model.fit(X, Y, epochs=5, validation_data=(X, Y), validation_freq=2, verbose=0)
    assert {name: len(values) for name, values in history.history.items()} == {
        "loss": 5,
        "mae": 5,
        "val_loss": 2,
        "val_mae": 2,
    }
    assert all(type(value) is float for values in history.history.values() for value in values)
    assert history.epoch == [0, 1, 2, 3, 4]
    table = history.to_pandas()
    assert table["val_loss"].isna().tolist() == [True, False, True, False, True]
    assert table["val_loss"].dropna().tolist() == history.history["val_loss"]


def test_history_joins_a_fit_with_and_one_without_validation() -> None:
    model = make_model()
    first, second = fit(model), fit(model, epochs=2, validation_data=(X, Y))
    assert model.history.history == {"loss": first["loss"] + second["loss"], "val_loss": second["val_loss"]}


# ---- steps ----


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_an_epoch_of_set_steps_logs_its_own_batches_whatever_the_length(steps: int, loop: str) -> None:
    loader = DataLoader(TensorDataset(X, Y), SIZE, shuffle=True)
    net, model = make_net(), make_model(loop=loop)
    optimizer, expected = sgd(net.parameters()), []

    def carried_on() -> Iterator[Any]:
        while True:
            yield from loader

    seed(5)
    batches = carried_on()
    for _ in range(3):
        total, count = 0.0, 0
        for _ in range(steps):
            x, y = next(batches)
            loss = mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total, count = total + loss.item() * len(x), count + len(x)
        expected.append(total / count)
    seed(5)
    history = model.fit(loader, epochs=3, steps_per_epoch=steps, verbose=0).history
    assert history["loss"] == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(value, model.net.state_dict()[name]) for name, value in net.state_dict().items())


# ---- one batch ----


@pytest.mark.parametrize("loop", LOOPS)
def test_train_and_test_on_batch_begin_their_metrics_anew(loop: str) -> None:
    model = freeze(make_model(metrics=["rmse"], weighted_metrics=["mae"], loop=loop))
    fit(model)
    for rows in (slice(0, 3), slice(3, 10), slice(0, 3)):
        errors = (model.net(X[rows]) - Y[rows]).detach()
        w = W[rows]
        expected = {
            "loss": pytest.approx((errors.square().mean(1) * w).mean().item(), rel=1e-6),
            "rmse": pytest.approx(errors.square().mean().sqrt().item(), rel=1e-6),
            "mae": pytest.approx(((errors.abs().mean(1) * w).sum() / w.sum()).item(), rel=1e-6),
        }
        assert model.train_on_batch(X[rows], Y[rows], w) == expected
        assert model.test_on_batch(X[rows], Y[rows], w) == expected


def test_train_on_batch_weighs_by_class_and_sample() -> None:
    model = freeze(make_model(make_net(3), loss="cross_entropy"))
    losses = cross_entropy(model.net(X), CLASSES, reduction="none").detach()
    logs = model.train_on_batch(X, CLASSES, W, {1: 4.0})
    w = torch.tensor([1.0, 4.0, 1.0])[CLASSES] * W
    assert logs == {"loss": pytest.approx((losses * w).mean().item(), rel=1e-6)}


def test_train_on_batch_inside_a_fit_leaves_the_sums_of_its_epoch_alone() -> None:
    plain, model = freeze(make_model(metrics=["mae"])), freeze(make_model(metrics=["mae"]))
    call = LambdaCallback(on_train_batch_end=lambda batch, logs: model.test_on_batch(X[:2], Y[:2]))
    assert fit(model, callbacks=[call]) == fit(plain)


# ---- every metric by name: no batch size changes it, and it is that of the whole data at once ----

N, C, T = 203, 12, 3  # 29 batches of 7; 101, 101 and 1
DATA = torch.randn(N, 4, generator=_draw)  # standardised
MIX = torch.randn(4, C, generator=_draw)
SCORES = DATA @ MIX + 1.5 * torch.randn(N, C, generator=_draw)

TASKS: dict[str, tuple[str, Tensor]] = {  # task -> (loss, targets)
    "binary": ("bce_with_logits", (SCORES[:, :1] > 0.5).float()),
    "multiclass": ("cross_entropy", SCORES.argmax(1)),
    "multilabel": ("bce_with_logits", (SCORES[:, :4] > 0.5).float()),
    "regression": ("mse", SCORES[:, :1] / 2),
    "tokens": ("cross_entropy", torch.stack([SCORES.roll(i, 1)[:, :5].argmax(1) for i in range(T)], 1)),
}
TOP = [name for name in CLASSIFICATION if name.startswith("top_")]
NAMES = {
    "binary": [name for name in CLASSIFICATION if name not in TOP],
    "multiclass": [*CLASSIFICATION, "perplexity"],
    "multilabel": [name for name in CLASSIFICATION if name not in (*TOP, "cohen_kappa")],
    "regression": [*REGRESSION],
    "tokens": [*(name for name in CLASSIFICATION if name != "top_10_accuracy"), "perplexity"],
}


class Fixed(nn.Module):
    """A linear net whose outputs say something of the targets."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.weight, self.task = nn.Parameter(MIX / 2), task

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.weight
        if self.task == "tokens":
            return torch.stack([scores.roll(i, 1)[:, :5] for i in range(T)], 2)
        return scores[:, : {"binary": 1, "multilabel": 4, "regression": 1}.get(self.task, C)]


def whole(task: str, name: str, outputs: Tensor, y: Tensor) -> Any:
    """The metric of all rows in one call, by torchmetrics or torch."""
    if name == "perplexity":
        return cross_entropy(outputs, y).exp()
    if task == "regression":
        cls, arguments = REGRESSION[name]
        if name in ("mae", "mean_absolute_error"):
            return (outputs - y).abs().mean()
        if not cls:
            mean = (outputs - y).square().mean()
            return mean.sqrt() if name.startswith("r") else mean
        metric = getattr(torchmetrics, cls)(**arguments).set_dtype(torch.float64)
        matrix = name == "cosine_similarity"
        return metric(*((part if matrix else part.flatten()).double() for part in (outputs, y)))
    cls, arguments, _ = CLASSIFICATION[name]
    made: Any = torchmetrics.classification
    if task in ("multiclass", "tokens"):
        if not cls:
            return (outputs.argmax(1) == y).float().mean()
        return getattr(made, f"Multiclass{cls}")(outputs.shape[1], **arguments)(outputs.softmax(1), y)
    probabilities = outputs.sigmoid()
    if not cls:
        return ((probabilities > 0.5) == (y > 0.5)).float().mean()
    if task == "multilabel":
        return getattr(made, f"Multilabel{cls}")(4, **arguments)(probabilities, y.long())
    if name == "balanced_accuracy" or name.endswith(("_macro", "_micro", "_weighted")):  # over both classes
        both = torch.cat([1 - probabilities, probabilities], 1)
        return getattr(made, f"Multiclass{cls}")(2, **arguments)(both, y.flatten().long())
    return getattr(made, f"Binary{cls}")()(probabilities.flatten(), y.flatten().long())


def test_every_metric_name_is_tried_in_some_task() -> None:
    assert {name for names in NAMES.values() for name in names} == set(METRICS)


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in NAMES.items() for name in names])
def test_a_metric_by_name_is_the_same_in_batches_of_7_and_of_101_and_that_of_the_whole_data(
    task: str, name: str
) -> None:
    loss, y = TASKS[task]
    model = kt.Model(Fixed(task), device="cpu")
    model.compile(loss, sgd, [name])
    small, large = (model.evaluate(DATA, y, batch_size=size, verbose=0)[name] for size in (7, 101))
    np.testing.assert_allclose(small, large, rtol=1e-5)
    with torch.no_grad():
        expected = whole(task, name, model.net(DATA), y)
    np.testing.assert_allclose(small, expected.numpy(), rtol=1e-5)
    assert np.ndim(small) == np.ndim(expected)
    assert np.isfinite(small).all()


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weighted_metric_by_name_is_the_same_in_batches_of_7_and_of_101_and_repeats_rows_by_whole_weights(
    name: str,
) -> None:
    task = "regression" if name in REGRESSION else "multiclass"
    loss, y = TASKS[task]
    times = torch.arange(N) % 4  # a row of weight 2 is two rows, one of weight 0 none
    model = kt.Model(Fixed(task), device="cpu")
    model.compile(loss, sgd, weighted_metrics=[name])
    weights = times.float()
    small, large = (
        model.evaluate(DATA, y, sample_weight=weights, batch_size=size, verbose=0)[name] for size in (7, 101)
    )
    assert small == pytest.approx(large, rel=1e-5)
    repeated = torch.arange(N).repeat_interleave(times)
    with torch.no_grad():
        expected = whole(task, name, model.net(DATA[repeated]), y[repeated])
    assert small == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", TOP)
def test_top_k_of_more_than_the_classes_or_of_yes_and_no_is_refused(name: str) -> None:
    model = kt.Model(Fixed("binary"), device="cpu")
    model.compile("bce_with_logits", sgd, [name])
    with pytest.raises(ValueError, match=f"metric {name!r} can't be inferred"):
        model.evaluate(DATA, TASKS["binary"][1], verbose=0)


@pytest.mark.parametrize("logit", [-0.2, 0.2, 0.7])
def test_accuracy_of_logits_of_a_binary_loss_is_cut_at_probability_a_half(logit: float) -> None:
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.fill_(logit)
    model = make_model(net, loss="bce_with_logits", metrics=["accuracy"])
    logs = model.evaluate(torch.zeros(4, 1), torch.tensor([[1.0], [1.0], [1.0], [0.0]]), verbose=0)
    assert logs["accuracy"] == (0.75 if logit > 0 else 0.25)
