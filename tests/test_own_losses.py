"""Losses as users write them, partials and subclasses: what metrics, weights and the first look make of them."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import kerastorch as kt
from kerastorch.loops import LOOPS


class Through(nn.Module):
    """Gives x, with a parameter to train."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.shift


def make_model(net, loss, **arguments):
    model = kt.Model(net, device="cpu")
    model.compile(loss, "sgd", **arguments)
    return model


TOKENS = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0))
RIGHT = TOKENS.argmax(1)
RIGHT[:, 3:] = -100  # padding


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(), F.cross_entropy, partial(F.cross_entropy, label_smoothing=0.1)],
    ids=["module", "function", "partial"],
)
def test_padded_targets_do_not_count_in_metrics(loss):
    logs = make_model(Through(), loss, metrics=["accuracy", "f1_micro"]).evaluate(TOKENS, RIGHT, verbose=0)
    assert logs["accuracy"] == 1.0
    assert logs["f1_micro"] == pytest.approx(1.0)


def test_padded_targets_under_a_function_of_ones_own_are_refused_by_metrics_by_name():
    model = make_model(Through(), lambda outputs, y: F.cross_entropy(outputs, y), metrics=["accuracy"])
    with pytest.raises(ValueError, match="labels are outside the classes"):
        model.evaluate(TOKENS, RIGHT, verbose=0)


def test_masks_of_one_channel_without_its_axis_are_ambiguous_to_iou_and_not_to_accuracy():
    x, y = torch.randn(4, 5, 6), torch.randint(0, 2, (4, 5, 6)).float()
    expected = ((x > 0) == (y > 0.5)).float().mean()
    assert make_model(Through(), "bce_with_logits", metrics=["accuracy"]).evaluate(x, y, verbose=0)[
        "accuracy"
    ] == pytest.approx(float(expected))
    with pytest.raises(ValueError, match="dimension 1 could be labels, rows of an image or steps"):
        make_model(Through(), "bce_with_logits", metrics=["iou"]).evaluate(x, y, verbose=0)


@pytest.mark.parametrize(("loss", "y"), [("poisson", torch.ones(8, 1)), ("bce_with_logits", torch.ones(8, 1))])
def test_errors_of_values_are_refused_where_outputs_are_on_another_scale(loss, y):
    with pytest.raises(ValueError, match="'mae' can't be inferred: it compares values"):
        make_model(Through(), loss, metrics=["mae"]).evaluate(torch.randn(8, 1), y, verbose=0)


def test_weights_keep_the_sum_of_a_partial_that_sums():
    x, y = torch.randn(8, 2), torch.randn(8, 2)
    model = make_model(Through(), partial(F.mse_loss, reduction="sum"))
    plain = model.evaluate(x, y, verbose=0)["loss"]
    assert model.evaluate(x, y, sample_weight=torch.ones(8), verbose=0)["loss"] == pytest.approx(plain)


def test_weights_are_refused_by_a_subclass_that_works_on_the_mean():
    class RootMeanSquare(nn.MSELoss):
        def forward(self, outputs, y):
            return super().forward(outputs, y).sqrt()

    x, y = torch.randn(8, 2), torch.randn(8, 2)
    model = make_model(Through(), RootMeanSquare())
    assert model.evaluate(x, y, verbose=0)["loss"] == pytest.approx(float((x - y).square().mean().sqrt()))
    for _ in range(2):
        with pytest.raises(ValueError, match="RootMeanSquare can't be weighted"):
            model.evaluate(x, y, sample_weight=torch.ones(8), verbose=0)


def test_a_module_of_ones_own_is_looked_at_once_and_not_in_each_call(monkeypatch):
    looks = []
    monkeypatch.setattr(torch, "allclose", lambda *values, **tolerances: looks.append(values) or True)

    class Own(nn.MSELoss):
        def forward(self, outputs, y):
            return super().forward(outputs, y)

    model = make_model(Through(), Own())
    for _ in range(3):
        model.evaluate(torch.randn(8, 2), torch.randn(8, 2), sample_weight=torch.ones(8), verbose=0)
    assert len(looks) == 1


def test_weights_are_taken_by_a_module_of_ones_own_that_knows_reduction():
    class Focal(nn.Module):
        reduction = "mean"

        def forward(self, outputs, y):
            losses = F.cross_entropy(outputs, y, reduction="none")
            losses = (1 - (-losses).exp()) ** 2 * losses
            return losses if self.reduction == "none" else losses.mean()

    x, y = torch.randn(8, 3), torch.arange(8) % 3
    weights = torch.arange(8.0)
    expected = (
        ((1 - x.softmax(1).gather(1, y[:, None])[:, 0]) ** 2) * F.cross_entropy(x, y, reduction="none") * weights
    ).mean()
    loss = make_model(Through(), Focal()).evaluate(x, y, sample_weight=weights, verbose=0)["loss"]
    assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loop", LOOPS)
def test_subclasses_with_a_forward_of_their_own_take_targets_of_their_own(loop):
    class TokenLoss(nn.CrossEntropyLoss):
        def forward(self, outputs, y):
            return super().forward(outputs.flatten(0, 1), y.flatten())

    x, y = torch.randn(16, 6, 4), torch.randint(0, 3, (16, 6))
    model = make_model(nn.Linear(4, 3), TokenLoss(), loop=loop)
    assert model.fit(x, y, verbose=0).history["loss"][0] > 0


@pytest.mark.parametrize("loop", LOOPS)
def test_time_may_come_first_in_x(loop):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][-1])

    batches = [(torch.randn(8, 4, 3), torch.tensor([0, 1, 0, 1]))]  # 8 steps of 4 sequences
    history = make_model(Tagger(), "cross_entropy", metrics=["accuracy"], loop=loop).fit(batches, verbose=0)
    assert history.history["loss"][0] > 0


class Records(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"inputs": torch.full((4,), float(index)), "labels": index % 2}


def test_a_dict_batch_without_unpack_is_told_of_it():
    with pytest.raises(ValueError, match=r"a batch is a dict.*compile\(unpack=lambda batch"):
        make_model(nn.Linear(4, 2), "cross_entropy").fit(Records(), verbose=0)


def test_single_batches_go_through_unpack_too():
    model = make_model(nn.Linear(4, 2), "cross_entropy", unpack=lambda batch: (batch["inputs"], batch["labels"]))
    batch = next(iter(DataLoader(Records(), 6)))
    expected = F.cross_entropy(model.net(batch["inputs"]), batch["labels"]).item()
    assert model.test_on_batch(batch)["loss"] == pytest.approx(expected)
    assert model.train_on_batch(batch)["loss"] == pytest.approx(expected)
    assert model.predict_on_batch(batch).shape == (6, 2)


def test_weights_beside_rows_without_targets():
    class Rows(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.full((3,), float(index))

    weights = torch.arange(8.0)
    model = make_model(Through(), lambda outputs, y: outputs.square().mean(1))
    expected = (torch.arange(8.0).square() * weights).mean()
    assert model.evaluate(Rows(), sample_weight=weights, verbose=0)["loss"] == pytest.approx(float(expected))


def test_predict_iter_passes_on_what_predict_does():
    class Length(nn.Module):
        def forward(self, values, note):
            return values * len(note)

    loader = DataLoader([torch.ones(2)] * 4, 2, collate_fn=lambda rows: {"values": torch.stack(rows), "note": "abc"})
    (first, second) = kt.Model(Length(), "cpu").predict_iter(loader)
    assert first.tolist() == second.tolist() == [[3.0, 3.0]] * 2
