"""Losses by name are torch's own; sample weights mean sum(w * l) / N; what a loss takes outputs for."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kerastorch.losses import LOSSES, Loss, loss_scale, make_loss

CPU = torch.device("cpu")
N, C = 7, 4


def data(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs and targets of each kind of loss."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(N, C, generator=generator)
    classes = torch.randint(0, C, (N,), generator=generator)
    values = torch.randn(N, C, generator=generator)
    return {
        "values": (outputs, values),
        "classes": (outputs, classes),
        "log_classes": (outputs.log_softmax(1), classes),
        "labels": (outputs, (values > 0).float()),
        "distribution": (outputs.log_softmax(1), values.softmax(1)),
        "counts": (outputs, values.abs().round()),
    }


# name -> (torch's function, kind of data)
mse, mae, huber = (F.mse_loss, "values"), (F.l1_loss, "values"), (F.huber_loss, "values")
cross_entropy = (F.cross_entropy, "classes")
bce = (F.binary_cross_entropy_with_logits, "labels")
kl_div = (partial(F.kl_div, reduction="batchmean"), "distribution")
EXPECTED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "mse": mse,
    "mse_loss": mse,
    "mean_squared_error": mse,
    "mae": mae,
    "l1": mae,
    "l1_loss": mae,
    "mean_absolute_error": mae,
    "smooth_l1": (F.smooth_l1_loss, "values"),
    "smooth_l1_loss": (F.smooth_l1_loss, "values"),
    "huber": huber,
    "huber_loss": huber,
    "cross_entropy": cross_entropy,
    "sparse_categorical_crossentropy": cross_entropy,
    "categorical_crossentropy": cross_entropy,
    "nll": (F.nll_loss, "log_classes"),
    "nll_loss": (F.nll_loss, "log_classes"),
    "bce_with_logits": bce,
    "binary_cross_entropy_with_logits": bce,
    "binary_crossentropy": bce,
    "kl_div": kl_div,
    "kl_divergence": kl_div,
    "poisson": (F.poisson_nll_loss, "counts"),
    "poisson_nll": (F.poisson_nll_loss, "counts"),
    "multi_margin": (F.multi_margin_loss, "classes"),
    "multilabel_soft_margin": (F.multilabel_soft_margin_loss, "labels"),
}
named = pytest.mark.parametrize("name", sorted(EXPECTED))


def by_name(name: str) -> tuple[Loss, Tensor, Tensor]:
    return Loss(make_loss(name, CPU)), *data()[EXPECTED[name][1]]


# ---- names ----


def test_every_named_loss_is_tested_here() -> None:
    assert set(EXPECTED) == set(LOSSES)


@named
def test_named_loss_equals_torch_to_the_bit(name: str) -> None:
    loss, outputs, y = by_name(name)
    assert torch.equal(loss(outputs, y), EXPECTED[name][0](outputs, y))


@named
def test_weights_of_one_change_nothing(name: str) -> None:
    loss, outputs, y = by_name(name)
    torch.testing.assert_close(loss(outputs, y, torch.ones(N)), loss(outputs, y))


@named
def test_weighted_loss_is_the_weighted_sum_over_n(name: str) -> None:
    loss, outputs, y = by_name(name)
    weight = torch.arange(float(N))
    one_by_one = torch.stack([loss(outputs[i : i + 1], y[i : i + 1]) for i in range(N)])
    torch.testing.assert_close(loss(outputs, y, weight), (weight * one_by_one).sum() / N)


@pytest.mark.parametrize(("name", "near"), [("crossentropy", "cross_entropy"), ("msse", "mse"), ("hubber", "huber")])
def test_unknown_name_gives_the_nearest_and_all(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"loss '{name}' is not known; did you mean '{near}'.*Known: .*smooth_l1"):
        make_loss(name, CPU)


def test_each_named_loss_is_an_object_of_its_own() -> None:
    assert make_loss("mse", CPU) is not make_loss("mse", CPU)


# ---- objects, classes, callables ----


def test_class_is_made_with_torch_s_defaults() -> None:
    outputs, y = data()["classes"]
    assert torch.equal(make_loss(nn.CrossEntropyLoss, CPU)(outputs, y), F.cross_entropy(outputs, y))


def test_object_and_function_are_used_as_given() -> None:
    module = nn.HuberLoss(delta=0.3)
    assert make_loss(module, CPU) is module
    assert make_loss(F.mse_loss, CPU) is F.mse_loss


def test_class_weights_move_to_the_device() -> None:
    module = nn.CrossEntropyLoss(weight=torch.ones(C))
    make_loss(module, torch.device("meta"))
    assert module.weight is not None
    assert module.weight.device.type == "meta"


@pytest.mark.parametrize("loss", [3, None, [3], {"a": None}, dict, int])
def test_what_can_not_be_called_is_refused_with_the_names(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"loss must be a name.*got .*Names: .*cross_entropy"):
        make_loss(loss, CPU)


# ---- sample weights ----


def test_mean_squared_error_of_two_rows_is_weighted_as_by_hand() -> None:
    outputs, y = torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.zeros(2, 2)
    loss = Loss(nn.MSELoss())(outputs, y, torch.tensor([2.0, 10.0]))
    assert loss.item() == (2 * (1 + 9) / 2 + 10 * (0 + 4) / 2) / 2  # 15: by N, not by the sum of the weights


def test_class_and_sample_weights_multiply() -> None:
    outputs, y = data()["classes"]
    class_weight, weight = torch.tensor([1.0, 2.0, 0.5, 4.0]), torch.arange(1.0, N + 1)
    loss = Loss(nn.CrossEntropyLoss(weight=class_weight))
    per_sample = -outputs.log_softmax(1)[torch.arange(N), y] * class_weight[y]
    torch.testing.assert_close(loss(outputs, y, weight), (weight * per_sample).sum() / N)
    # without sample weights torch's own rule holds: divided by the sum of the class weights
    torch.testing.assert_close(loss(outputs, y), per_sample.sum() / class_weight[y].sum())


def test_weighted_segmentation_loss_takes_the_mean_of_a_sample_s_pixels() -> None:
    outputs, y = torch.randn(N, C, 5, 3), torch.randint(0, C, (N, 5, 3))
    weight = torch.arange(float(N))
    pixels = F.cross_entropy(outputs, y, reduction="none")
    expected = sum(weight[i] * pixels[i].mean() for i in range(N)) / N
    torch.testing.assert_close(Loss(nn.CrossEntropyLoss())(outputs, y, weight), expected)


@pytest.mark.parametrize(
    "fn",
    [F.mse_loss, partial(F.mse_loss, reduction="mean"), nn.MSELoss(), lambda o, y: ((o - y) ** 2).mean(1)],
    ids=["function", "partial", "module", "values per sample"],
)
def test_weights_reach_every_form_of_loss(fn: Any) -> None:
    outputs, y = data()["values"]
    weight = torch.arange(float(N))
    expected = (weight * ((outputs - y) ** 2).mean(1)).sum() / N
    torch.testing.assert_close(Loss(fn)(outputs, y, weight), expected)
    torch.testing.assert_close(Loss(fn)(outputs, y), F.mse_loss(outputs, y))


def test_weighting_leaves_the_user_s_loss_as_it_was() -> None:
    module = nn.CrossEntropyLoss(weight=torch.ones(C))
    outputs, y = data()["classes"]
    Loss(module)(outputs, y, torch.ones(N))
    assert module.reduction == "mean"
    assert module(outputs, y).dim() == 0


def test_weighted_loss_trains_the_loss_s_own_parameters() -> None:
    class Scaled(nn.Module):
        reduction = "mean"

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(self.scale * outputs, y, reduction=self.reduction)

    module = Scaled()
    outputs, y = data()["values"]
    Loss(module)(outputs, y, torch.ones(N)).backward()
    weighted = module.scale.grad
    module.scale.grad = None
    module(outputs, y).backward()
    assert weighted is not None
    torch.testing.assert_close(weighted, module.scale.grad)


def test_weights_for_a_loss_without_values_per_sample_are_refused() -> None:
    def total(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).abs().mean()

    outputs, y = data()["values"]
    with pytest.raises(ValueError, match=r"sample_weight has .*7.*, but the loss total gives Tensor\(\) float32"):
        Loss(total)(outputs, y, torch.ones(N))


def test_weights_of_another_length_are_refused() -> None:
    outputs, y = data()["classes"]
    with pytest.raises(ValueError, match=r"sample_weight has .*3.*, but the loss CrossEntropyLoss gives Tensor\(7,\)"):
        Loss(nn.CrossEntropyLoss())(outputs, y, torch.ones(3))


def test_a_column_of_weights_is_never_spread_over_the_batch() -> None:
    outputs, y = data()["classes"]
    weight = torch.arange(float(N))
    loss = Loss(nn.CrossEntropyLoss())
    with contextlib.suppress(ValueError):  # refused: as good as read as it was meant
        torch.testing.assert_close(loss(outputs, y, weight[:, None]), loss(outputs, y, weight))


def test_weights_shaped_as_the_losses_weigh_each_value() -> None:
    outputs, y = torch.randn(N, C, 5), torch.randint(0, C, (N, 5))
    weight = torch.rand(N, 5)
    expected = (weight * F.cross_entropy(outputs, y, reduction="none")).sum() / (5 * N)
    torch.testing.assert_close(Loss(nn.CrossEntropyLoss())(outputs, y, weight), expected)


# ---- several outputs ----


@pytest.mark.parametrize("form", [list, dict])
def test_losses_of_several_outputs_are_summed_by_their_weights(form: type) -> None:
    (logits, classes), (outputs, values) = data()["classes"], data()["values"]
    ce, mse = F.cross_entropy(logits, classes), F.mse_loss(outputs, values)
    if form is list:
        loss = Loss(make_loss(["cross_entropy", nn.MSELoss()], CPU, [1.0, 0.25]))
        total, names = loss((logits, outputs), (classes, values)), ["output_0_loss", "output_1_loss"]
    else:
        loss = Loss(make_loss({"a": "cross_entropy", "b": F.mse_loss}, CPU, {"b": 0.25}))
        total, names = loss({"a": logits, "b": outputs}, {"b": values, "a": classes}), ["a_loss", "b_loss"]
    torch.testing.assert_close(total, ce + 0.25 * mse)
    assert list(loss.parts) == names
    assert all(map(torch.equal, loss.parts.values(), (ce, mse)))  # unweighted


def test_sample_weights_reach_the_loss_of_each_output() -> None:
    outputs, y = data()["values"]
    first, second = torch.arange(float(N)), torch.ones(N)
    error = ((outputs - y) ** 2).mean(1)
    loss = Loss(make_loss(["mse", "mse"], CPU))
    torch.testing.assert_close(loss((outputs, outputs), (y, y), first), 2 * (first * error).sum() / N)
    torch.testing.assert_close(
        loss((outputs, outputs), (y, y), (first, second)), (first * error).sum() / N + error.sum() / N
    )


def test_parameters_of_the_losses_of_several_outputs_are_seen() -> None:
    made = make_loss({"a": "mse", "b": nn.CrossEntropyLoss(weight=torch.ones(C))}, torch.device("meta"))
    assert isinstance(made, nn.Module)
    assert [buffer.device.type for buffer in made.buffers()] == ["meta"]


@pytest.mark.parametrize(
    ("loss", "loss_weights"),
    [(["mse", "mse"], [1.0, 1.0, 1.0]), ({"a": "mse"}, {"b": 1.0}), (["mse"], {"a": 1.0}), ("mse", [1.0]), ([], None)],
)
def test_loss_weights_that_do_not_fit_the_losses_are_refused(loss: Any, loss_weights: Any) -> None:
    with pytest.raises(ValueError, match="loss_weights"):
        make_loss(loss, CPU, loss_weights)


@pytest.mark.parametrize(
    ("outputs", "y", "message"),
    [
        (
            {"b": torch.ones(2)},
            {"a": torch.ones(2)},
            r"'a' needs the outputs .*key 'a', but they are \{'b': Tens",
        ),
        ({"a": torch.ones(2)}, torch.ones(2), r"'a' needs the targets .*key 'a', but they are Tensor\(2,\)"),
    ],
)
def test_output_without_its_part_is_named(outputs: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loss(make_loss({"a": "mse"}, CPU))(outputs, y)


# ---- the call ----


def test_values_per_sample_are_averaged() -> None:
    outputs, y = data()["values"]
    loss = Loss(lambda outputs, y: (outputs - y).abs())(outputs, y)
    torch.testing.assert_close(loss, F.l1_loss(outputs, y))


def test_scalar_losses_come_back_untouched() -> None:
    scalar = torch.tensor(3.0)
    assert Loss(lambda outputs, y: scalar)(None, None) is scalar


def test_first_batch_is_looked_at_once_and_before_the_loss() -> None:
    calls: list[str] = []

    def fn(outputs: Tensor, y: Tensor) -> Tensor:
        calls.append("loss")
        return outputs.sum()

    loss = Loss(fn, on_first_batch=lambda outputs, y: calls.append("look"))
    loss(torch.ones(2), None)
    loss(torch.ones(2), None)
    assert calls == ["look", "loss", "loss"]


# ---- scales ----


@pytest.mark.parametrize(
    ("loss", "scale"),
    [
        ("cross_entropy", "class_logits"),
        ("multi_margin", "class_logits"),
        (F.cross_entropy, "class_logits"),
        ("binary_crossentropy", "label_logits"),
        ("multilabel_soft_margin", "label_logits"),
        (F.binary_cross_entropy_with_logits, "label_logits"),
        ("nll", "log_probabilities"),
        (F.nll_loss, "log_probabilities"),
        (nn.BCELoss(), "probabilities"),
        (F.binary_cross_entropy, "probabilities"),
        ("mse", "values"),
        ("huber", "values"),
        (F.l1_loss, "values"),
        ("kl_div", "unknown"),
        (lambda outputs, y: outputs.sum(), "unknown"),
    ],
)
def test_loss_scale_tells_what_outputs_are(loss: Any, scale: str) -> None:
    assert loss_scale(make_loss(loss, CPU)) == scale


def test_loss_scale_knows_a_subclass() -> None:
    class Smoothed(nn.CrossEntropyLoss):
        pass

    assert loss_scale(Smoothed()) == "class_logits"
