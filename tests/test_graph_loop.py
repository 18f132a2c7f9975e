"""The loop whose step is one compiled graph equals the eager loops within rounding, and refuses what no graph holds."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import EMA, Callback, ModelCheckpoint, TerminateOnNaN
from kerastorch.graph.compiled_step import CompiledStep
from kerastorch.optimizers import OPTIMIZERS

slow = pytest.mark.slow
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default:.*:UserWarning", "default:.*:DeprecationWarning"),  # inductor's own
]
X = torch.randn(67, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(67) % 3


def make_mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def make_normed():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))


class Partial(nn.Module):
    """A layer used twice, one that nothing uses, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.twice, self.unused, self.frozen, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(self.frozen(self.twice(torch.relu(self.twice(x)))))[:, :3]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, a, b):
        return self.a(a) * torch.sigmoid(self.b(b))


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x.reshape(-1, 3, 2))[0][:, -1])


class Counting(nn.Module):
    """Python state that changes with every call."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 3), 0

    def forward(self, x):
        self.calls += self.training
        return self.layer(x) / self.calls


def make_conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )


NETS = {
    "mlp": make_mlp,
    "batch norm, dropout": make_normed,
    "conv": make_conv,
    "partial": Partial,
    "two inputs": TwoInputs,
    "counting": Counting,
}


def train(loop, net="mlp", optimizer="adam", *, epochs=3, callbacks=(), data=None, val=True, resume=None, **options):
    """Train from the same start; return the model and its History."""
    torch.manual_seed(0)
    model = kt.Model(NETS[net](), device="cpu")
    if callable(optimizer):
        optimizer = optimizer(model.net.parameters())
    model.compile(options.pop("loss", "cross_entropy"), optimizer, ["accuracy"], loop=loop, **options)
    x = (X, X.flip(0)) if net == "two inputs" else X
    torch.manual_seed(1)
    history = model.fit(
        *((x, Y) if data is None else (data,)),
        **({"batch_size": 8} if data is None else {}),
        epochs=epochs,
        callbacks=[*callbacks],
        validation_data=(x, Y) if val else None,
        verbose=0,
        resume=resume,
    )
    return model, history


def assert_alike(one, other, tolerance=1e-5):
    for name, value in one[0].net.state_dict().items():
        torch.testing.assert_close(other[0].net.state_dict()[name], value, rtol=tolerance, atol=tolerance, msg=name)
    assert one[1].history.keys() == other[1].history.keys()
    for name, values in one[1].history.items():
        assert other[1].history[name] == pytest.approx(values, rel=1e-4, abs=1e-4), name


CASES = {
    "mlp": {},
    "batch norm, dropout": {"net": "batch norm, dropout", "optimizer": "sgd"},
    "conv": {"net": "conv", "optimizer": "sgd"},
    "partial": {"net": "partial", "optimizer": lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.1)},
    "two inputs": {"net": "two inputs"},
    "bf16": {"mixed_precision": "bf16"},
    "accumulation, clipping": {"gradient_accumulation_steps": 3, "clip_grad_norm": 0.1, "optimizer": "sgd"},
    "clipping by value": {"clip_grad_value": 0.01},
    "schedule by step": {"lr_scheduler": "cosine", "lr_scheduler_interval": "step"},
    "schedule by epoch": {"lr_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.3)},
    "param groups": {"param_groups": {"*.bias": {"lr": 0.1, "weight_decay": 0.5}}},
    "label smoothing": {"loss": nn.CrossEntropyLoss(label_smoothing=0.2)},
    "class weights": {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))},
}


COMPILED = ("mlp", "batch norm, dropout", "conv", "partial", "bf16", "accumulation, clipping")


@slow
@pytest.mark.parametrize("name", COMPILED)
def test_the_graph_loop_equals_the_eager_loop_within_rounding(name):
    assert_alike(train("function", **CASES[name]), train("graph", **CASES[name]))


@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=slow) for name in CASES if name not in COMPILED)])
def test_the_traced_step_equals_the_eager_one_within_rounding(name):
    assert_alike(train("function", **CASES[name]), train("graph", **CASES[name]))


@slow
@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("sparse_adam", "lbfgs", "adam")])
def test_every_optimizer_is_traced(name):
    assert_alike(train("function", optimizer=name), train("graph", optimizer=name), tolerance=1e-4)


@slow
@pytest.mark.usefixtures("only_traced")
def test_momentum_and_nesterov_are_traced():
    def make(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)

    assert_alike(train("function", optimizer=make), train("graph", optimizer=make))


@slow
@pytest.mark.usefixtures("only_traced")
def test_callbacks_see_what_they_see_in_an_eager_loop():
    seen = {}

    class Look(Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.setdefault(self.run.loop_name, []).append((batch, logs["loss"], self.run.step))

    results = []
    for loop in ("function", "graph"):
        look = Look()
        look.on_train_begin = lambda logs=None, look=look, loop=loop: setattr(look.run, "loop_name", loop)
        results.append(train(loop, callbacks=[look, EMA(0.9), TerminateOnNaN()]))
    assert_alike(*results)
    for one, other in zip(seen["function"], seen["graph"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@slow
@pytest.mark.usefixtures("only_traced")
def test_nan_ends_the_run_as_in_an_eager_loop():
    x = X.clone()
    x[40] = math.nan
    data = DataLoader(TensorDataset(x, Y), 8)
    one, other = (train(loop, data=data, callbacks=[TerminateOnNaN()], val=False) for loop in ("function", "graph"))
    assert one[1].epoch == other[1].epoch
    for name, value in one[0].net.state_dict().items():
        assert torch.equal(value.isnan(), other[0].net.state_dict()[name].isnan())


@slow
@pytest.mark.parametrize("save_freq", [3, "epoch"])
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(tmp_path, save_freq):
    class Dies(Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise RuntimeError("died")

    straight, _ = train("graph", "batch norm, dropout")
    with pytest.raises(RuntimeError, match="died"):
        train(
            "graph",
            "batch norm, dropout",
            callbacks=[ModelCheckpoint(tmp_path / "b.pt", save_freq=save_freq), Dies()],
        )
    resumed, _ = train(
        "graph", "batch norm, dropout", callbacks=[ModelCheckpoint(tmp_path / "b.pt", save_freq=save_freq)], resume=True
    )
    for name, value in straight.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], value), name


@slow
@pytest.mark.usefixtures("only_traced")
def test_an_eager_loop_goes_on_after_a_graph_loop():
    model, _ = train("graph")
    assert all(parameter.grad is None for parameter in model.net.parameters())
    assert all(isinstance(group["lr"], float) for group in model.optimizer.param_groups)
    model.compile("cross_entropy", model.optimizer, loop="script")
    model.fit(X, Y, epochs=1, verbose=0)


@slow
@pytest.mark.usefixtures("only_traced")
def test_one_graph_is_compiled_whatever_the_rate_mode_and_last_batch(monkeypatch):
    made = []
    compile_it = CompiledStep._compile

    def count(self, *batch):
        made.append(self)
        return compile_it(self, *batch)

    monkeypatch.setattr(CompiledStep, "_compile", count)
    torch._dynamo.utils.counters.clear()
    train("graph", lr_scheduler="cosine", lr_scheduler_interval="step", epochs=4)
    assert len(made) == 1
    assert not made[0]._is_different
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@slow
@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "nadam", "rmsprop"])
def test_the_rate_may_rise_from_zero(optimizer):
    """Torch's step for graphs divides by the rate: zero over zero where a unit had no gradient."""
    x = X.clone()
    x[:, 0] = 0
    options = {
        "lr_scheduler": lambda one: torch.optim.lr_scheduler.LambdaLR(one, lambda step: min(1.0, step / 12)),
        "lr_scheduler_interval": "step",
        "data": DataLoader(TensorDataset(x, Y), 8),
        "val": False,
    }
    assert_alike(train("function", optimizer=optimizer, **options), train("graph", optimizer=optimizer, **options))


class Switched(nn.Module):
    """A part that is off at first, and a mask that somebody may set anew."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.on = nn.Linear(6, 3), nn.Linear(6, 3), False
        self.register_buffer("mask", torch.ones(6))

    def forward(self, x):
        x = x * self.mask
        return self.a(x) + self.b(x) if self.on else self.a(x)


class Smooth(nn.CrossEntropyLoss):
    """A loss whose weight is trained, or frozen."""

    def __init__(self):
        super().__init__()
        self.scale, self.beta = nn.Parameter(torch.ones(())), 0.0

    def forward(self, outputs, y):
        return super().forward(outputs, y) * self.scale.exp() + self.scale + self.beta * outputs.square().mean()


def switch(net, loss):
    net.on = True


def mask(net, loss):
    net.mask = torch.tensor([1.0, 0, 1, 0, 1, 0])


def freeze_loss(net, loss):
    loss.scale.requires_grad_(False)


def weigh(net, loss):
    loss.beta = 0.5


@slow
@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("change", [switch, mask, freeze_loss, weigh])
def test_what_a_callback_changes_between_epochs_is_followed(change, monkeypatch):
    monkeypatch.setitem(NETS, "switched", Switched)
    results = []
    for loop in ("function", "graph"):
        loss = Smooth()

        class Changes(Callback):
            def on_epoch_end(self, epoch, logs=None, loss=loss):
                if epoch == 0:
                    change(self.model.net, loss)

        results.append(train(loop, "switched", loss=loss, callbacks=[Changes()], epochs=4))
    assert_alike(*results)


@slow
@pytest.mark.usefixtures("only_traced")
def test_gradients_dropped_by_a_batch_hook_stop_nothing():
    class Drops(Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.optimizer.zero_grad()

    assert_alike(*(train(loop, callbacks=[Drops()]) for loop in ("function", "graph")))


def test_a_buffer_that_forward_replaces_is_refused_with_what_to_write():
    class Replacing(nn.Linear):
        def __init__(self):
            super().__init__(6, 3)
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
            return super().forward(x) + self.mean

    model = kt.Model(Replacing(), device="cpu")
    model.compile("cross_entropy", "sgd", loop="graph")
    with pytest.raises(ValueError, match=r"puts another tensor in a buffer's place \(self.mean.copy_"):
        model.fit(X, Y, verbose=0)


@slow
@pytest.mark.usefixtures("only_traced")
def test_calls_with_batches_of_many_sizes_make_one_graph(monkeypatch):
    made = []
    compile_it = CompiledStep._compile
    monkeypatch.setattr(CompiledStep, "_compile", lambda self, *batch: (made.append(self), compile_it(self, *batch))[1])
    model = kt.Model(make_mlp(), device="cpu")
    model.compile("cross_entropy", "sgd", loop="graph")
    for i in range(6):
        model.train_on_batch(X[: 8 if i % 2 else 4], Y[: 8 if i % 2 else 4])
    assert len(made) == 1


@slow
@pytest.mark.usefixtures("only_traced")
def test_nested_inputs_are_given_as_in_the_other_loops(monkeypatch):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, a, pair):
            return self.layer(a + pair[0] - pair[1])

    monkeypatch.setitem(NETS, "nested", Nested)
    batches = [((X[i : i + 8], (X[i : i + 8].flip(0), X[i : i + 8])), Y[i : i + 8]) for i in range(0, 64, 8)]
    assert_alike(*(train(loop, "nested", data=batches, val=False) for loop in ("function", "graph")))


@slow
@pytest.mark.usefixtures("only_traced")
def test_a_part_frozen_between_epochs_stays_as_it_is():
    class Freeze(Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.net[0].requires_grad_(False)
            self.kept = self.model.net[0].weight.detach().clone()

    freeze = Freeze()
    one, other = train("function", callbacks=[Freeze()]), train("graph", callbacks=[freeze])
    assert_alike(one, other)
    assert torch.equal(other[0].net[0].weight, freeze.kept)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


@slow
@pytest.mark.usefixtures("only_traced")
def test_a_net_that_counts_its_calls_is_refused():
    with pytest.raises(ValueError, match="the step is another each time, as where the net counts its calls"):
        train("graph", "counting", epochs=2, data=DataLoader(TensorDataset(X, Y), 4), val=False)


@slow
def test_control_flow_that_hangs_on_data_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setitem(NETS, "branching", Branching)
    with pytest.raises(ValueError, match=r"can't make one graph of this training step: .*Use loop='script'"):
        train("graph", "branching")


@slow
@pytest.mark.usefixtures("only_traced")
def test_an_option_that_changes_with_every_step_is_refused_by_name():
    with pytest.raises(ValueError, match=r"the optimizer's betas changes again and again.*change lr alone"):
        train("graph", lr_scheduler="one_cycle", lr_scheduler_interval="step")


def test_what_a_graph_can_not_hold_is_refused_before_the_first_step():
    model = kt.Model(make_mlp(), device="cpu")
    model.compile("cross_entropy", "sgd", loop="graph", mixed_precision="fp16")
    before = model.net[0].weight.detach().clone()
    with pytest.raises(ValueError, match="loop='graph': the fp16 scaler decides on the host"):
        model.fit(X, Y, verbose=0)
    assert torch.equal(model.net[0].weight, before)

    model.compile("cross_entropy", "sgd", loop="graph")
    handle = model.net[0].weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(ValueError, match="hooks on the parameters' gradients"):
        model.fit(X, Y, verbose=0)
    handle.remove()
    model.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: None)
    with pytest.raises(ValueError, match="hooks on the optimizer's step"):
        model.fit(X, Y, verbose=0)

    model = kt.Model(Sequences(), device="cpu")
    model.compile("cross_entropy", "sgd", loop="graph")
    with pytest.raises(ValueError, match=r"torch\.compile does not trace nn\.RNN, nn\.LSTM and nn\.GRU"):
        model.fit(X, Y, verbose=0)


def test_evaluate_and_predict_are_those_of_the_other_loops():
    model = kt.Model(make_mlp(), device="cpu")
    results = []
    for loop in ("function", "graph"):
        model.compile("cross_entropy", "sgd", ["accuracy"], loop=loop)
        results.append((model.evaluate(X, Y, verbose=0), model.predict(X, verbose=0)))
    assert results[0][0] == results[1][0]
    assert (results[0][1] == results[1][1]).all()


@slow
@pytest.mark.usefixtures("only_traced")
def test_a_later_fit_goes_on_with_the_graph_and_equals_the_eager_loop(monkeypatch):
    made = []
    compile_it = CompiledStep._compile
    monkeypatch.setattr(CompiledStep, "_compile", lambda self, *batch: (made.append(self), compile_it(self, *batch))[1])
    results = []
    for loop in ("function", "graph"):
        model, history = train(loop)
        for callbacks in ([], [TerminateOnNaN()]):
            torch.manual_seed(2)
            history = model.fit(X, Y, batch_size=8, epochs=2, callbacks=callbacks, verbose=0)
        assert all(parameter.grad is None for parameter in model.net.parameters())
        results.append((model, history))
    assert_alike(*results)
    assert len(made) == 1
    assert not made[0]._is_different


@slow
@pytest.mark.usefixtures("only_traced")
def test_several_outputs_have_their_losses_summed_and_logged():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return {"a": self.a(x), "b": self.b(x)}

    results = []
    for loop in ("function", "graph"):
        torch.manual_seed(0)
        model = kt.Model(TwoHeads(), device="cpu")
        losses = {"a": "cross_entropy", "b": "cross_entropy"}
        model.compile(losses, "sgd", loss_weights={"a": 1.0, "b": 0.5}, loop=loop)
        torch.manual_seed(1)
        results.append((model, model.fit(X, {"a": Y, "b": Y.flip(0)}, batch_size=8, epochs=2, verbose=0)))
    assert_alike(*results)
