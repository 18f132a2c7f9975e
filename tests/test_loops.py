"""Agreement: every loop gives the weights, to the bit, and the history of a training loop written by hand in torch."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.loops import LOOPS, make_loop

EPOCHS = 3


def make_net():
    """Dropout, batch norm and enough depth that any change of order shows."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def make_data(rows=45, batch_size=8):
    """45 rows in batches of 8: the last batch is short."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator)
    train = DataLoader(TensorDataset(x, y), batch_size, shuffle=True)
    return train, DataLoader(TensorDataset(x[:13], y[:13]), 5)


def train_by_hand(
    net, optimizer, train, val, *, scheduler=None, interval="epoch", k=1, clip_norm=None, clip_value=None, dtype=None
):
    """The loop a torch user writes, with every feature; returns the history as fit's keys."""
    loss_fn = nn.CrossEntropyLoss()
    history = {"loss": [], "accuracy": [], "val_loss": [], "val_accuracy": []}
    for _ in range(EPOCHS):
        net.train()
        loss_sum, correct, seen, window = 0.0, 0, 0, []
        for i, (x, y) in enumerate(train):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                outputs = net(x)
                loss = loss_fn(outputs, y)
            window.append(len(x))
            n, b = window[-1], window[0]
            (loss / k if n == b else loss * n / (k * b)).backward()
            loss_sum, seen = loss_sum + loss.item() * len(x), seen + len(x)
            correct += (outputs.argmax(1) == y).sum().item()
            if len(window) == k or i + 1 == len(train):
                if sum(window) != k * b:
                    for parameter in net.parameters():
                        parameter.grad.mul_(k * b / sum(window))
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
                if clip_value is not None:
                    nn.utils.clip_grad_value_(net.parameters(), clip_value)
                optimizer.step()
                optimizer.zero_grad()
                window = []
                if scheduler is not None and interval == "step":
                    scheduler.step()
        history["loss"].append(loss_sum / seen)
        history["accuracy"].append(correct / seen)

        net.eval()
        loss_sum, correct, seen = 0.0, 0, 0
        with torch.no_grad():
            for x, y in val:
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    outputs = net(x)
                    loss_sum += loss_fn(outputs, y).item() * len(x)
                seen, correct = seen + len(x), correct + (outputs.argmax(1) == y).sum().item()
        history["val_loss"].append(loss_sum / seen)
        history["val_accuracy"].append(correct / seen)
        if scheduler is not None and interval == "epoch":
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(history["val_loss"][-1])
            else:
                scheduler.step()
    return history


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=100)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.3, threshold=0.5)


# name -> (optimizer by hand, compile's optimizer, compile's other arguments, the hand-written loop's)
CASES = {
    "plain sgd": (sgd, sgd, {}, {}),
    "adam by name": (lambda p: torch.optim.Adam(p, fused=True), "adam", {}, {}),
    "adamw by name": (lambda p: torch.optim.AdamW(p, fused=True), "adamw", {}, {}),
    "sgd by name": (lambda p: torch.optim.SGD(p, fused=True), "sgd", {}, {}),
    "rmsprop by name": (torch.optim.RMSprop, "rmsprop", {}, {}),
    "optimizer class": (torch.optim.Adam, torch.optim.Adam, {}, {}),
    "scheduler an epoch": (sgd, sgd, {"lr_scheduler": step_lr}, {"scheduler": step_lr}),
    "scheduler a step": (
        sgd,
        sgd,
        {"lr_scheduler": one_cycle, "lr_scheduler_interval": "step"},
        {"scheduler": one_cycle, "interval": "step"},
    ),
    "plateau": (sgd, sgd, {"lr_scheduler": plateau}, {"scheduler": plateau}),
    "accumulation": (sgd, sgd, {"gradient_accumulation_steps": 2}, {"k": 2}),
    "accumulation, uneven": (sgd, sgd, {"gradient_accumulation_steps": 4}, {"k": 4}),
    "accumulation, thirds": (sgd, sgd, {"gradient_accumulation_steps": 3}, {"k": 3}),
    "clipped norm": (sgd, sgd, {"clip_grad_norm": 0.1}, {"clip_norm": 0.1}),
    "clipped value": (sgd, sgd, {"clip_grad_value": 0.01}, {"clip_value": 0.01}),
    "bf16": (sgd, sgd, {"mixed_precision": "bf16"}, {"dtype": torch.bfloat16}),
    "all at once": (
        lambda p: torch.optim.AdamW(p, fused=True),
        "adamw",
        {
            "gradient_accumulation_steps": 4,
            "clip_grad_norm": 0.1,
            "clip_grad_value": 0.02,
            "mixed_precision": "bf16",
            "lr_scheduler": one_cycle,
            "lr_scheduler_interval": "step",
        },
        {
            "k": 4,
            "clip_norm": 0.1,
            "clip_value": 0.02,
            "dtype": torch.bfloat16,
            "scheduler": one_cycle,
            "interval": "step",
        },
    ),
}


def fit(loop, optimizer, arguments):
    net = make_net()
    train, val = make_data()
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", optimizer, ["accuracy"], loop=loop, **arguments)
    torch.manual_seed(2)
    return net, model.fit(train, validation_data=val, epochs=EPOCHS, verbose=0).history


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("case", CASES)
def test_a_loop_equals_the_hand_written_one_to_the_bit(case, loop):
    by_hand, optimizer, arguments, hand_arguments = CASES[case]
    net, history = fit(loop, optimizer, arguments)

    expected_net = make_net()
    train, val = make_data()
    expected_optimizer = by_hand(expected_net.parameters())
    hand_arguments = dict(hand_arguments)
    if "scheduler" in hand_arguments:
        hand_arguments["scheduler"] = hand_arguments["scheduler"](expected_optimizer)
    torch.manual_seed(2)
    expected = train_by_hand(expected_net, expected_optimizer, train, val, **hand_arguments)

    for name, value in expected_net.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        assert history[name] == pytest.approx(values, rel=1e-6), name


@pytest.mark.parametrize("case", ["plain sgd", "all at once"])
def test_the_loops_give_the_same_history_to_the_bit(case):
    _, optimizer, arguments, _ = CASES[case]
    histories = [fit(loop, optimizer, arguments)[1] for loop in LOOPS]
    assert all(history == histories[0] for history in histories)


def test_the_cases_differ_from_the_plain_one():
    """A case whose feature does nothing would prove nothing."""
    plain = fit("script", sgd, {})[0].state_dict()
    for case in CASES:
        if case != "plain sgd":
            _, optimizer, arguments, _ = CASES[case]
            other = fit("script", optimizer, arguments)[0].state_dict()
            assert any(not torch.equal(plain[name], other[name]) for name in plain), case


@pytest.mark.parametrize("loop", LOOPS)
def test_accumulated_gradients_are_those_of_the_whole_window(loop):
    """Without batch norm and dropout, windows of 4 batches equal one batch of their rows, the last, short one too."""
    x, y = torch.randn(45, 6), torch.randint(0, 3, (45,))
    nets = [nn.Linear(6, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, batch_size, k in ((nets[0], 8, 4), (nets[1], 32, 1)):
        model = kt.Model(net, device="cpu")
        model.compile("cross_entropy", sgd, loop=loop, gradient_accumulation_steps=k)
        model.fit(x, y, batch_size=batch_size, shuffle=False, epochs=2, verbose=0)
    torch.testing.assert_close(nets[0].weight, nets[1].weight)


@pytest.mark.parametrize("loop", LOOPS)
def test_accumulation_ends_its_last_window_where_the_length_is_not_known(loop):
    class Stream:
        def __iter__(self):
            return iter([(x[i : i + 8], y[i : i + 8]) for i in range(0, 45, 8)])

    x, y = torch.randn(45, 6), torch.randint(0, 3, (45,))
    nets = [nn.Linear(6, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, data in ((nets[0], Stream()), (nets[1], list(Stream()))):
        model = kt.Model(net, device="cpu")
        model.compile("cross_entropy", sgd, loop=loop, gradient_accumulation_steps=4)
        model.fit(data, epochs=2, verbose=0)
    assert torch.equal(nets[0].weight, nets[1].weight)


@pytest.mark.parametrize("loop", LOOPS)
def test_fp16_scales_the_loss_and_steps_with_unscaled_gradients(loop):
    net = nn.Linear(6, 3)
    before = copy.deepcopy(net.state_dict())
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", sgd, loop=loop, mixed_precision="fp16", clip_grad_norm=1.0)
    history = model.fit(torch.randn(16, 6), torch.randint(0, 3, (16,)), epochs=3, verbose=0)
    assert math.isfinite(history.history["loss"][-1])
    moved = (net.weight - before["weight"]).abs().max()
    assert 0 < moved < 1  # gradients left scaled by 65536 would throw the weights far off


@pytest.mark.parametrize("loop", [*LOOPS.values(), *LOOPS, *(cls() for cls in LOOPS.values())])
def test_a_loop_is_taken_by_name_class_or_instance(loop):
    made = make_loop(loop)
    assert isinstance(made, kt.Loop)
    assert type(made) in LOOPS.values()


def test_an_overridden_train_step_is_what_trains():
    class Halved(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            outputs = self.net(x)
            loss = self.loss_fn(outputs, y, sample_weight) / 2
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss, outputs

    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    nets = [nn.Linear(6, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, loop, lr in ((nets[0], Halved, 0.2), (nets[1], "class", 0.1)):
        model = kt.Model(net, device="cpu")
        model.compile("cross_entropy", lambda p, lr=lr: torch.optim.SGD(p, lr), loop=loop)
        model.fit(x, y, epochs=1, verbose=0)
    torch.testing.assert_close(nets[0].weight, nets[1].weight)


def test_a_swapped_function_is_what_trains():
    seen = []

    def train_step(run, x, y, sample_weight):
        seen.append(len(x))
        return kt.loops.function_loop.train_step(run, x, y, sample_weight)

    model = kt.Model(nn.Linear(6, 3), device="cpu")
    model.compile("cross_entropy", "sgd", loop=kt.FunctionLoop(train_step=train_step))
    model.fit(torch.randn(10, 6), torch.randint(0, 3, (10,)), batch_size=4, verbose=0)
    assert seen == [4, 4, 2]


def test_each_loop_file_stays_a_page():
    import inspect

    for cls in LOOPS.values():
        assert len(inspect.getsource(inspect.getmodule(cls)).splitlines()) < 120
