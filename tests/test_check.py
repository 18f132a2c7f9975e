"""The pre-flight check names each planted fault, is silent on healthy models, and leaves everything as it was."""

import copy
import math
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kerastorch as kt
from kerastorch.check import check_model
from kerastorch.loops import LOOPS
from kerastorch.report import Finding, Layer, Report

FEATURES, CLASSES, ROWS = 8, 3, 96


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Steps of tiny nets take 100 times as long where threads wait for each other, and their time is a figure here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return x, x[:, :CLASSES].argmax(1)


def make_model(*layers, loss="cross_entropy", lr=0.02, loop="script", net=None, optimizer=None, **options):
    torch.manual_seed(0)
    if net is None:
        net = nn.Sequential(*layers) if layers else nn.Sequential(*make_layers(CLASSES))
    model = kt.Model(net, device="cpu")
    model.compile(loss, optimizer or (lambda params: torch.optim.Adam(params, lr=lr)), loop=loop, **options)
    return model


def make_layers(outputs):
    torch.manual_seed(0)
    return nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, outputs)


def troubles(report):
    return {finding.title: finding for finding in report.findings if finding.level != "ok"}


class TwoBranches(nn.Module):
    """Adds what `cut` makes of a second layer's output."""

    def __init__(self, cut):
        super().__init__()
        self.main, self.side, self.cut = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES), cut

    def forward(self, x):
        return self.main(x) + self.cut(self, x)


class SlowRows(Dataset):
    def __init__(self, rows, seconds):
        self.rows, self.seconds = list(zip(*rows, strict=True)), seconds

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        time.sleep(self.seconds)
        return self.rows[i]


# ---- healthy models ----


@pytest.mark.parametrize("loop", LOOPS)
def test_a_healthy_classifier_has_nothing_to_put_right_in_any_loop(loop):
    report = check_model(make_model(loop=loop, metrics=["accuracy"]), *make_rows())
    assert troubles(report) == {}
    assert report.ok


@pytest.mark.parametrize("seed", range(4))
def test_healthy_models_of_other_seeds_have_nothing_to_put_right(seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(FEATURES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, CLASSES)]
    model = make_model(net=nn.Sequential(*layers))
    assert troubles(check_model(model, DataLoader(TensorDataset(*make_rows(seed)), 16, shuffle=True))) == {}


def test_a_healthy_regression_has_nothing_to_put_right():
    x, _ = make_rows()
    report = check_model(make_model(*make_layers(1), loss="mse"), x, x[:, :1] + 0.5 * x[:, 1:2])
    assert troubles(report) == {}


def test_a_healthy_binary_model_has_nothing_to_put_right():
    x, _ = make_rows()
    report = check_model(make_model(*make_layers(1), loss="bce_with_logits"), x, (x[:, :1] > 0).float())
    assert troubles(report) == {}


def test_a_healthy_image_net_has_nothing_to_put_right():
    x = torch.randn(64, 1, 8, 8)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 2)]
    report = check_model(make_model(*layers), x, (x.mean((1, 2, 3)) > 0).long())
    assert troubles(report) == {}
    assert [layer.output for layer in report.layers][:2] == ["(32, 8, 6, 6)"] * 2


def test_clipping_accumulation_mixed_precision_and_a_warm_up_are_no_faults():
    model = make_model(
        clip_grad_norm=1.0,
        gradient_accumulation_steps=4,
        mixed_precision="bf16",
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100),
        lr_scheduler_interval="step",
    )
    assert model.optimizer.param_groups[0]["lr"] == 0.0
    assert troubles(check_model(model, *make_rows())) == {}
    assert model.optimizer.param_groups[0]["lr"] == 0.0


def test_layers_stand_in_call_order_with_shapes_and_parameters():
    report = check_model(make_model(), *make_rows(), batch_size=16)
    assert report.layers == [
        Layer("0", "Linear", "(16, 32)", 9 * 32, 16 * 32 * 4),
        Layer("1", "ReLU", "(16, 32)", 0, 16 * 32 * 4),
        Layer("2", "Linear", "(16, 3)", 33 * 3, 16 * 3 * 4),
    ]


def test_loss_at_the_start_is_set_beside_that_of_chance():
    (start,) = [f for f in check_model(make_model(), *make_rows()).findings if f.title == "Loss at the start"]
    assert f"{math.log(CLASSES):.4g}" in start.text
    x, _ = make_rows()
    y = 3 * torch.randn(ROWS, 1)
    report = check_model(make_model(*make_layers(1), loss="mse"), x, y, batch_size=ROWS)
    (start,) = [f for f in report.findings if f.title == "Loss at the start"]
    assert f"{y.var(correction=0).item():.4g}" in start.text


# ---- planted faults ----


@pytest.mark.parametrize("row", [0, 95], ids=["first_batch", "last_batch"])
def test_finds_labels_out_of_range(row):
    x, y = make_rows()
    y[row] = CLASSES
    report = check_model(make_model(), DataLoader(TensorDataset(x, y), 32))
    (fault,) = troubles(report).values()
    assert fault.level == "error"
    assert f"labels run from 0 to {CLASSES}" in fault.text


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_finds_nan_and_infinity_in_x(bad):
    x, y = make_rows()
    x[40, 5] = bad
    (fault,) = troubles(check_model(make_model(), x, y)).values()
    assert (fault.level, fault.title) == ("error", "NaN or infinity in x")
    assert "1 of 768 values looked at, the first in feature 5" in fault.text


def test_finds_nan_in_y():
    x, _ = make_rows()
    y = x[:, :1].clone()
    y[7] = math.nan
    assert list(troubles(check_model(make_model(*make_layers(1), loss="mse"), x, y))) == ["NaN or infinity in y"]


@pytest.mark.parametrize(
    "cut",
    [
        lambda net, x: net.side(x).detach(),
        lambda net, x: net.side(x).data,
        lambda net, x: x @ net.side.weight.data.T + net.side.bias.data,
        lambda net, x: nn.functional.one_hot(net.side(x).argmax(1), CLASSES),
    ],
    ids=["detach", "data", "weight_data", "argmax"],
)
def test_finds_a_branch_that_is_cut_off(cut):
    found = troubles(check_model(make_model(net=TwoBranches(cut)), *make_rows()))
    assert list(found) == ["Parameters cut off from the loss"]
    assert found["Parameters cut off from the loss"].text.startswith("side.weight, side.bias: ")


@pytest.mark.parametrize("cut", [lambda net, x: 0, lambda net, x: 0 * net.side.weight.shape[0]], ids=["none", "shape"])
def test_finds_a_layer_that_is_never_used(cut):
    found = troubles(check_model(make_model(net=TwoBranches(cut)), *make_rows()))
    assert list(found) == ["Parameters never used"]
    assert found["Parameters never used"].text.startswith("side.weight, side.bias: ")


def test_frozen_parameters_are_named_and_are_no_fault():
    net = TwoBranches(lambda net, x: net.side(x))
    net.side.requires_grad_(False)
    report = check_model(make_model(net=net), *make_rows())
    assert report.ok
    assert [f.text for f in report.findings if f.title == "Frozen parameters"] == [
        "side.weight, side.bias: requires_grad=False."
    ]


def test_a_gradient_that_waits_for_a_layer_of_zeros_is_no_fault():
    layers = make_layers(CLASSES)
    nn.init.zeros_(layers[2].weight)
    assert troubles(check_model(make_model(*layers), *make_rows())) == {}


def test_a_net_cut_off_from_the_loss_altogether_is_an_error():
    class Cut(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    assert "Nothing to train" in troubles(check_model(make_model(Cut(FEATURES, CLASSES)), *make_rows()))


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU6(), nn.ReLU(inplace=True)])
def test_finds_dead_relus(relu):
    first, _, last = make_layers(CLASSES)
    nn.init.constant_(first.bias, -1000.0)
    found = troubles(check_model(make_model(first, relu, last), *make_rows()))
    assert "100% of the units of 1 are 0 for every row" in found["Dead activations"].text
    assert found["Gradients are all 0"].text.startswith("0.weight, 0.bias, 2.weight: ")


@pytest.mark.parametrize("kind", [nn.Tanh, nn.Sigmoid])
def test_finds_saturated_activations(kind):
    first, _, last = make_layers(CLASSES)
    nn.init.constant_(first.bias, 1000.0)
    found = troubles(check_model(make_model(first, kind(), last), *make_rows()))
    assert f"limits of {kind.__name__}" in found["Saturated activations"].text


def test_finds_a_learning_rate_so_small_that_one_batch_is_not_overfitted():
    found = troubles(check_model(make_model(lr=1e-9), *make_rows()))
    assert list(found) == ["One batch can't be overfitted"]
    assert "learning rate 1e-09: 50 steps" in found["One batch can't be overfitted"].text
    assert "the learning rate is too low" in found["One batch can't be overfitted"].text


def test_tries_the_learning_rate_that_would_do():
    found = troubles(check_model(make_model(lr=1e-4), *make_rows()))
    assert "The learning rate is too low: at 10 times it the loss falls" in found["One batch can't be overfitted"].text


def test_a_small_net_at_the_usual_learning_rate_is_no_fault():
    (x, y), _ = kt.datasets.digits()
    model = make_model(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), optimizer="adam")
    assert troubles(check_model(model, x, y)) == {}


def test_a_loss_that_blows_up_is_an_error():
    model = make_model(optimizer=lambda params: torch.optim.SGD(params, lr=1e6), loss="mse", net=nn.Linear(FEATURES, 1))
    fault = troubles(check_model(model, make_rows()[0], torch.randn(ROWS, 1)))["The loss is not finite"]
    assert fault.level == "error"
    assert "Lower the learning rate" in fault.text


def test_finds_softmax_before_cross_entropy():
    found = troubles(check_model(make_model(*make_layers(CLASSES), nn.Softmax(1)), *make_rows()))
    assert any("softmax" in finding.text for finding in found.values())


def test_finds_sigmoid_before_a_loss_that_takes_logits():
    x, _ = make_rows()
    model = make_model(*make_layers(1), nn.Sigmoid(), loss="bce_with_logits")
    assert any(
        "sigmoid" in finding.text for finding in troubles(check_model(model, x, (x[:, :1] > 0).float())).values()
    )


def test_finds_pixels_that_were_not_scaled():
    x, y = make_rows()
    pixels = (255 * (x - x.min()) / (x.max() - x.min())).round()
    fault = troubles(check_model(make_model(), pixels, y))["Scale of x"]
    assert "values 0 to 255" in fault.text
    assert "Divide by 255" in fault.text


def test_constant_features_are_named_and_a_fault_only_where_they_are_the_most():
    x, y = make_rows()
    x[:, 6:] = 0
    report = check_model(make_model(), x, y)
    assert [f.text[:6] for f in report.findings if f.title == "Constant features in x"] == ["2 of 8"]
    assert report.ok
    x[:, 3:] = 0
    assert "Constant features in x" in troubles(check_model(make_model(), x, y))


def test_finds_class_imbalance_and_targets_that_never_vary():
    x, y = make_rows()
    y[5:] = 1
    assert "class 1 has 9" in troubles(check_model(make_model(), x, y))["Class imbalance in y"].text
    y[:] = 1
    assert "Targets y never vary" in troubles(check_model(make_model(), x, y))


def test_finds_a_start_far_above_chance():
    layers = make_layers(CLASSES)
    nn.init.normal_(layers[2].weight, std=50.0)
    assert "Loss at the start is far above chance" in troubles(check_model(make_model(*layers), *make_rows()))


def test_finds_a_target_that_leaks_into_x():
    _, y = make_rows()
    net = nn.Linear(CLASSES, CLASSES)
    net.weight.data = 9 * torch.eye(CLASSES)
    report = check_model(make_model(net=net), nn.functional.one_hot(y, CLASSES).float(), y)
    assert "Loss at the start is far below chance" in troubles(report)


def test_finds_data_that_is_slower_than_the_net():
    found = troubles(check_model(make_model(), DataLoader(SlowRows(make_rows(), 0.004), 8)))
    assert list(found) == ["Data is slower than the net"]
    assert "num_workers=" in found["Data is slower than the net"].text


# ---- what it leaves as it was ----


def test_weights_states_flags_gradients_and_generators_are_unchanged_to_the_bit():
    class Noisy(SlowRows):
        def __init__(self, rows):
            super().__init__(rows, 0.0)
            self.rng, self.own = np.random.default_rng(1), random.Random(2)

        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + float(self.rng.normal()) + self.own.random() + random.random() + float(np.random.rand()), y

    layers = make_layers(CLASSES)
    model = make_model(layers[0], nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), layers[2], lr_scheduler="cosine")
    loader = DataLoader(Noisy(make_rows()), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    model.fit(loader, epochs=1, verbose=0)
    model.net[3].eval()
    model.net(torch.randn(4, FEATURES)).sum().backward()

    def tensors():
        gradients = [parameter.grad for parameter in model.net.parameters()]
        states = [torch.get_rng_state(), loader.generator.get_state()]
        return copy.deepcopy([model.net.state_dict(), model.optimizer.state_dict(), gradients, states])

    def others():
        flags = [module.training for module in model.net.modules()]
        own = [loader.dataset.own.getstate(), loader.dataset.rng.bit_generator.state]
        looked_at, history = set(model._compiled.looked_at), model.history.history
        return [flags, own, random.getstate(), str(np.random.get_state()), looked_at, history]

    tensors_before, others_before, step = tensors(), others(), model.optimizer.step
    check_model(model, loader)
    torch.testing.assert_close(tensors(), tensors_before, rtol=0, atol=0)
    assert others() == others_before
    assert model.optimizer.step == step
    assert [not module._forward_hooks for module in model.net.modules()] == [True] * 6


def test_fit_after_check_gives_the_weights_of_fit_alone():
    ends = []
    for checks in (False, True):
        model = make_model()
        kt.set_seed(4)
        if checks:
            check_model(model, *make_rows())
        model.fit(*make_rows(), epochs=2, verbose=0)
        ends.append(model.net.state_dict())
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_loader_with_persistent_workers_keeps_the_pass_that_is_under_way():
    loader = DataLoader(TensorDataset(*make_rows()), 32, num_workers=1, persistent_workers=True)
    under_way = iter(loader)
    first = next(under_way)
    check_model(make_model(), loader)
    assert len(list(under_way)) == 2
    torch.testing.assert_close(first[0], make_rows()[0][:32])


def test_a_loss_that_reaches_the_net_by_a_closure_leaves_no_gradients_behind():
    net = nn.Linear(FEATURES, CLASSES)
    model = make_model(
        net=net, loss=lambda outputs, y: nn.functional.cross_entropy(outputs, y) + net.weight.square().sum()
    )
    check_model(model, *make_rows())
    assert [parameter.grad for parameter in net.parameters()] == [None, None]


def test_optimizer_hooks_are_not_called():
    model, calls = make_model(), []
    model.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    check_model(model, *make_rows())
    assert calls == []


# ---- forms of data, optimizers, refusals ----


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*make_layers(CLASSES))

    def forward(self, a, b):
        return self.layers(torch.cat([a, b], 1))


@pytest.mark.parametrize("form", [lambda a, b: {"a": a, "b": b}, lambda a, b: (a, b)], ids=["dict", "tuple"])
def test_inputs_may_be_dicts_and_tuples_and_are_named(form):
    x, y = make_rows()
    assert check_model(make_model(net=Concat()), form(x[:, :3], x[:, 3:]), y).ok
    found = troubles(check_model(make_model(net=Concat()), form(x[:, :3], 100 * x[:, 3:]), y))
    assert {"Scale of x['b']", "Scale of x[1]"} & set(found)


def test_a_list_of_batches_and_three_part_batches_can_be_read():
    x, y = make_rows()
    weight = torch.ones(32)
    assert check_model(make_model(), [(x[i : i + 32], y[i : i + 32], weight) for i in (0, 32, 64)]).ok


def test_an_iterator_is_refused_and_not_read():
    batches = iter([make_rows()])
    with pytest.raises(ValueError, match="iterator, which can be read only once"):
        check_model(make_model(), batches)
    assert len(list(batches)) == 1


def test_before_compile_it_is_refused():
    with pytest.raises(RuntimeError, match=r"call compile\(\) before check\(\)"):
        check_model(kt.Model(nn.Linear(FEATURES, CLASSES), device="cpu"), *make_rows())


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_below_one_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        check_model(make_model(), *make_rows(), steps=steps)


def test_a_closure_optimizer_is_not_tried_and_nothing_else_is_left_out():
    class OwnLoop(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            raise AssertionError("a closure is not tried")

    model = make_model(optimizer=torch.optim.LBFGS, loop=OwnLoop)
    report = check_model(model, *make_rows())
    assert report.ok
    assert {"One batch not tried", "Gradients", "Memory"} <= {finding.title for finding in report.findings}


def test_an_error_in_forward_comes_as_it_is():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(FEATURES, CLASSES)

        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        check_model(make_model(net=Broken()), *make_rows())


# ---- the report ----


def test_text_and_html_hold_every_finding_and_layer():
    report = check_model(make_model(lr=1e-9), *make_rows())
    page, table = str(report), report._repr_html_()
    assert page.splitlines()[0] == "Pre-flight check: 1 warning"
    assert page.splitlines()[2].startswith("warning  One batch can't be overfitted: ")
    for finding in report.findings:
        assert finding.title in page
        assert finding.text in " ".join(page.split())
    for layer in report.layers:
        assert layer.output in page
        assert layer.output in table
    assert table.count("<tr>") == len(report.findings) + len(report.layers) + 1
    assert repr(report) == page


def test_html_is_escaped():
    report = Report([Finding("error", "<b>", "a < b & c")], [Layer("<i>", "Linear", "(1,)", 1, 4)])
    table = report._repr_html_()
    assert "&lt;b&gt;" in table
    assert "a &lt; b &amp; c" in table
    assert "&lt;i&gt;" in table
    assert not report.ok


def test_a_report_has_no_truth_of_its_own():
    assert "__bool__" not in vars(Report)
    assert Report([Finding("ok", "a", "b")], []).ok
    assert not Report([Finding("warning", "a", "b")], []).ok
