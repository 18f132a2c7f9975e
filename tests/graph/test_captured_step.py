"""The step that a GPU captures, on the CPU: what would be captured is called at each replay, with the same tensors.

That shows which tensors a replay reads and writes, and what the loop does around it; not what CUDA lets be captured,
which the last tests show on a GPU.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import EMA, Callback, ModelCheckpoint
from kerastorch.data.in_memory import RowReader
from kerastorch.device import leaves, map_nested
from kerastorch.graph import GraphStep, captured_step
from kerastorch.graph import step as graph_step
from kerastorch.graph.captured_step import CapturedStep

X = torch.randn(67, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(67) % 3


class Capture:
    """Stands in for CUDA's: notes how often a step was captured and replayed."""

    def __init__(self, monkeypatch):
        self.num_captures = self.num_replays = 0
        make_step = GraphStep.__init__

        def init(step, run, eager_step):
            make_step(step, run, eager_step)
            step._is_cuda = True

        noted = []
        make_captured = CapturedStep.__init__

        def init_captured(captured, parts, *batch):
            noted[:] = [parts]
            make_captured(captured, parts, *batch)

        def capture(step, device, pool):
            self.num_captures += 1
            run = noted[0].run
            window, result = [*run.window], self.run_without_effect(noted[0], step)

            def replay():
                self.num_replays += 1
                run.window = [*window]  # a later fit has a run of its own
                for held, new in zip(leaves(result), leaves(step()), strict=True):
                    held.copy_(new)

            return replay, result, None

        monkeypatch.setattr(GraphStep, "__init__", init)
        monkeypatch.setattr(CapturedStep, "__init__", init_captured)
        monkeypatch.setattr(captured_step, "capture", capture)
        monkeypatch.setattr(graph_step, "as_in_a_capture", nullcontext)

    def run_without_effect(self, parts, step):
        net, optimizer = parts.run.net, parts.run.optimizer
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        tensors = [*net.parameters(), *net.buffers(), *parts.gradients, *filter(torch.is_tensor, state)]
        before, random_state = [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()
        result = map_nested(torch.clone, step())
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(random_state)
        return result


@pytest.fixture
def capture(monkeypatch):
    return Capture(monkeypatch)


@pytest.fixture
def rows_on_gpu(monkeypatch):
    """Read data in memory as a GPU's is read: many batches at once, those of several steps joined where they may be."""
    monkeypatch.setattr(RowReader, "_is_on_gpu", True)
    monkeypatch.setattr(graph_step, "MAX_TOGETHER", 3)


def make_net():
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))


def train(loop, optimizer="adam", callbacks=(), device="cpu", dropout=0.3, **options):
    torch.manual_seed(0)
    net = make_net()
    net[2].p = dropout
    model = kt.Model(net, device=device)
    if callable(optimizer):
        optimizer = optimizer(model.net.parameters())
    model.compile("cross_entropy", optimizer, ["accuracy"], loop=loop, **options)
    torch.manual_seed(1)
    for epochs in (2, 1):  # the second fit goes on with the first one's captures
        model.fit(X, Y, batch_size=8, epochs=epochs, callbacks=[*callbacks], validation_data=(X, Y), verbose=0)
    return model


CASES = {
    "adam": {},
    "sgd": {"optimizer": "sgd"},
    "unfused adamw": {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=False)},
    "unfused momentum": {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9)},
    "bf16": {"mixed_precision": "bf16"},
    "clipping": {"clip_grad_norm": 0.1},
    "accumulation, clipping by value": {"gradient_accumulation_steps": 3, "clip_grad_value": 0.01},
    "schedule by step": {"lr_scheduler": "cosine", "lr_scheduler_interval": "step"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_equals_the_eager_one(case, capture):
    expected, found = train("function", **CASES[case]), train("graph", **CASES[case])
    assert capture.num_replays > 15
    assert capture.num_captures == (3 if "accumulation" in case else 1)  # first, middle and last of a window
    for name, value in expected.net.state_dict().items():
        torch.testing.assert_close(found.net.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for name, values in expected.history.history.items():
        assert found.history.history[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert all(parameter.grad is None for parameter in found.net.parameters())


def test_averages_follow_each_replayed_update(capture):
    expected = train("function", callbacks=[EMA(decay=0.9)])
    found = train("graph", callbacks=[EMA(decay=0.9)])
    assert capture.num_replays > 15
    for name, value in expected.net.state_dict().items():
        torch.testing.assert_close(found.net.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_what_a_replay_gave_is_not_written_over_by_the_next(capture):
    class Keep(Callback):
        def __init__(self):
            self.losses, self.values = [], []

        def on_train_batch_end(self, batch, logs=None):
            self.losses.append(self.run.loss)
            self.values.append(self.run.loss.item())

    keep = Keep()
    train("graph", callbacks=[keep])
    assert capture.num_replays > 15
    assert [loss.item() for loss in keep.losses] == keep.values
    assert len(set(keep.values)) > 15


def test_a_part_frozen_between_epochs_is_captured_anew(capture):
    class Freeze(Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.net[0].requires_grad_(False)
            self.kept = self.model.net[0].weight.detach().clone()

    freeze = Freeze()
    found = train("graph", callbacks=[freeze])
    assert capture.num_captures == 2
    assert torch.equal(found.net[0].weight, freeze.kept)


TOGETHER = [case for case in CASES if case not in ("accumulation, clipping by value", "schedule by step")]


@pytest.mark.usefixtures("rows_on_gpu")
@pytest.mark.parametrize("case", CASES)
def test_several_steps_in_one_capture_equal_as_many_eager_ones(case, capture):
    expected, found = train("function", **CASES[case]), train("graph", **CASES[case])
    if case in TOGETHER:  # 3 batches for the warm-up and 5 by themselves; then 8 in twos
        assert (capture.num_captures, capture.num_replays) == (2, 5 + 2 * 4)
    for name, value in expected.net.state_dict().items():
        torch.testing.assert_close(found.net.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for name, values in expected.history.history.items():
        assert found.history.history[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert all(parameter.grad is None for parameter in found.net.parameters())


class Counts(Callback):
    def on_train_begin(self, logs=None):
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        run = self.run
        self.seen.append((run.batch, run.step, run.batches_done, run.batches_seen, *logs))


@pytest.mark.usefixtures("rows_on_gpu")
def test_counters_are_those_of_single_steps(capture):
    counts = {}
    for loop in ("function", "graph"):
        counts[loop] = Counts()
        train(loop, callbacks=[counts[loop]])
    assert capture.num_captures == 2
    assert counts["graph"].seen == counts["function"].seen


class OnBatch(Callback):
    def on_train_batch_end(self, batch, logs=None):
        pass


@pytest.mark.usefixtures("rows_on_gpu")
@pytest.mark.parametrize("watcher", ["batch hook", "average", "checkpoint", "optimizer hook"])
def test_steps_that_somebody_looks_between_are_taken_one_by_one(watcher, capture, tmp_path):
    class OnStep(Callback):
        def on_train_begin(self, logs=None):
            self.handle = self.run.optimizer.register_step_post_hook(lambda *_: None)

        def on_train_end(self, logs=None):
            self.handle.remove()

    watchers = {
        "batch hook": OnBatch(),
        "average": EMA(decay=0.9),
        "checkpoint": ModelCheckpoint(tmp_path / "c.pt", save_freq=3),
        "optimizer hook": OnStep(),
    }
    train("graph", callbacks=[watchers[watcher]])
    assert (capture.num_captures, capture.num_replays) == (1, 5 + 2 * 8)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)}


@pytest.mark.usefixtures("rows_on_gpu")
def test_weights_and_losses_of_several_outputs_go_together(capture):
    models = []
    for loop in ("function", "graph"):
        torch.manual_seed(0)
        model = kt.Model(TwoHeads(), device="cpu")
        model.compile({"a": "cross_entropy", "b": "cross_entropy"}, "adam", {"b": ["accuracy"]}, loop=loop)
        torch.manual_seed(1)
        weight = torch.linspace(0, 1, 67)
        model.fit(X, {"a": Y, "b": Y.flip(0)}, batch_size=8, epochs=3, sample_weight=weight, verbose=0)
        models.append(model)
    assert (capture.num_captures, capture.num_replays) == (2, 5 + 2 * 4)
    assert list(models[1].history.history) == ["loss", "b_accuracy", "a_loss", "b_loss"]
    for name, values in models[0].history.history.items():
        assert models[1].history.history[name] == pytest.approx(values, rel=1e-5), name
    for one, other in zip(models[0].net.parameters(), models[1].net.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("rows_on_gpu")
def test_batches_of_another_size_in_a_later_fit_are_captured_anew(capture):
    models = []
    for loop in ("function", "graph"):
        model = train(loop)
        torch.manual_seed(2)
        model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
        models.append(model)
    assert (capture.num_captures, capture.num_replays) == (4, 5 + 2 * 4 + 13 + 6)
    for name, value in models[0].net.state_dict().items():
        torch.testing.assert_close(models[1].net.state_dict()[name], value, rtol=1e-4, atol=1e-4, msg=name)


class Shrinks(nn.Module):
    """Outputs with a row for each two of the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x).unflatten(0, (-1, 2)).mean(1)


@pytest.mark.usefixtures("rows_on_gpu")
def test_outputs_that_can_not_be_joined_are_of_single_steps(capture):
    model = kt.Model(Shrinks(), device="cpu")
    model.compile(lambda outputs, y: outputs.square().mean(), "adam", loop="graph")
    model.fit(X[:64], Y[:64], batch_size=8, epochs=2, verbose=0)
    assert (capture.num_captures, capture.num_replays) == (1, 5 + 8)


def mean_of_batch(outputs, y):
    return outputs.square().mean().sqrt()


@pytest.mark.usefixtures("rows_on_gpu")
def test_a_metric_that_is_of_each_batch_has_steps_one_by_one(capture):
    histories = []
    for loop in ("function", "graph"):
        torch.manual_seed(0)
        model = kt.Model(make_net(), device="cpu")
        model.compile("cross_entropy", "sgd", [mean_of_batch], loop=loop)
        torch.manual_seed(1)
        histories.append(model.fit(X, Y, batch_size=8, epochs=3, verbose=0).history)
    assert (capture.num_captures, capture.num_replays) == (1, 5 + 2 * 8)
    assert histories[1]["mean_of_batch"] == pytest.approx(histories[0]["mean_of_batch"], rel=1e-5)


class Between(Callback):
    """Does something to the net after the first epoch."""

    def __init__(self, change):
        self.change = change

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            self.change(self.model.net)


def lift_rate(net):
    net[2].p = 0.9


def thaw(net):
    net[4].requires_grad_(True)


def move(net):
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.usefixtures("rows_on_gpu")
@pytest.mark.parametrize("change", [lift_rate, thaw, move])
def test_what_a_capture_holds_of_the_net_is_looked_at_between_epochs(change, capture):
    models = []
    for loop in ("function", "graph"):
        torch.manual_seed(0)
        net = make_net()
        net[4].requires_grad_(change is not thaw)
        model = kt.Model(net, device="cpu")
        model.compile("cross_entropy", "adam", loop=loop)
        torch.manual_seed(1)
        model.fit(X, Y, batch_size=8, epochs=4, callbacks=Between(change), verbose=0)
        models.append(model)
    # as at the first: 3 batches for the warm-up, 5 by themselves, then 8 in twos
    assert (capture.num_captures, capture.num_replays) == (3, 5 + 5 + 2 * 4)
    for name, value in models[0].net.state_dict().items():
        torch.testing.assert_close(models[1].net.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) / self.calls


class Replacing(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return super().forward(x) + self.mean


@pytest.mark.parametrize("kind", [Counting, Replacing])
def test_a_net_that_is_another_at_each_call_is_refused(kind, capture):
    model = kt.Model(kind(6, 3), device="cpu")
    model.compile("cross_entropy", "sgd", loop="graph")
    with pytest.raises(ValueError, match="the step is another each time, as where the net counts its calls or puts"):
        model.fit(X, Y, batch_size=8, epochs=2, verbose=0)


def test_an_optimizer_that_begins_its_state_in_a_capture_is_an_error(capture):
    class Clears(Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.run.step == graph_step.WARM_UP:
                self.model.optimizer.state.clear()

    with pytest.raises(RuntimeError, match="the optimizer began its state inside a graph"):
        train("graph", callbacks=[Clears()])


@pytest.mark.usefixtures("rows_on_gpu")
@pytest.mark.parametrize("change", ["state cleared", "momentum", "group added", "state loaded"])
def test_an_optimizer_changed_between_epochs_is_captured_anew(change, capture):
    class Changes(Callback):
        def on_epoch_end(self, epoch, logs=None):
            optimizer = self.model.optimizer
            if epoch == 0 and change == "state cleared":
                optimizer.state.clear()
            elif epoch == 0 and change == "momentum":
                optimizer.param_groups[0]["betas"] = (0.5, 0.9)
            elif epoch == 0 and change == "group added":
                optimizer.add_param_group({"params": [self.model.net[4].bias.requires_grad_(True)], "lr": 0.1})
            elif change == "state loaded":
                optimizer.load_state_dict(optimizer.state_dict())

    models = []
    for loop in ("function", "graph"):
        torch.manual_seed(0)
        net = make_net()
        net[4].bias.requires_grad_(change != "group added")
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        model = kt.Model(net, device="cpu")
        model.compile("cross_entropy", torch.optim.Adam(parameters), loop=loop)
        torch.manual_seed(1)
        model.fit(X, Y, batch_size=8, epochs=6, callbacks=Changes(), verbose=0)
        models.append(model)
    assert capture.num_captures > 2
    for name, value in models[0].net.state_dict().items():
        torch.testing.assert_close(models[1].net.state_dict()[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_an_option_changed_inside_a_window_of_gradients_loses_none_of_them(capture):
    class Changes(Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.run.epoch == 1 and batch == 3:  # the first of the second window
                self.model.optimizer.param_groups[0]["betas"] = (0.5, 0.9)

    expected, found = (
        train(loop, callbacks=[Changes()], gradient_accumulation_steps=3) for loop in ("function", "graph")
    )
    assert capture.num_captures == 3  # of the window before
    for name, value in expected.net.state_dict().items():
        torch.testing.assert_close(found.net.state_dict()[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_a_scheduler_made_between_fits_and_a_fit_in_a_callback_are_no_hindrance(capture):
    class TrainsInside(Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.train_on_batch(X[:8], Y[:8])

    models = []
    for loop in ("function", "graph"):
        torch.manual_seed(0)
        model = kt.Model(make_net(), device="cpu")
        model.compile("cross_entropy", torch.optim.Adam(model.net.parameters()), loop=loop)
        torch.manual_seed(1)
        model.fit(X, Y, batch_size=8, epochs=2, callbacks=TrainsInside(), verbose=0)
        torch.optim.lr_scheduler.StepLR(model.optimizer, 1)
        model.fit(X, Y, batch_size=8, epochs=2, verbose=0)
        models.append(model)
    assert capture.num_replays > 15
    for name, value in models[0].net.state_dict().items():
        torch.testing.assert_close(models[1].net.state_dict()[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_the_rate_may_rise_from_zero(capture):
    """Torch's step for graphs divides by the rate: zero over zero where a unit had no gradient."""
    x = X.clone()
    x[:, 0] = 0
    weights = []
    for loop in ("function", "graph"):
        torch.manual_seed(0)
        model = kt.Model(make_net(), device="cpu")
        optimizer = torch.optim.AdamW(model.net.parameters(), fused=False)
        rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 12))
        model.compile("cross_entropy", optimizer, loop=loop, lr_scheduler=rise, lr_scheduler_interval="step")
        torch.manual_seed(1)
        model.fit(x, Y, batch_size=8, epochs=3, shuffle=False, verbose=0)
        weights.append(model.net[0].weight.detach())
    assert capture.num_replays > 10
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-5)


def test_a_batch_that_holds_more_than_tensors_and_numbers_is_refused(capture):
    class Labelled(nn.Linear):
        def forward(self, x, label):
            return super().forward(x)

    model = kt.Model(Labelled(6, 3), device="cpu")
    model.compile("cross_entropy", "sgd", loop="graph")
    batches = [((X[:8], object()), Y[:8])] * 6
    with pytest.raises(ValueError, match="can't hold a object of a batch"):
        model.fit(batches, verbose=0)


def test_dicts_are_taken_by_their_keys_in_any_order():
    held = {"a": torch.zeros(2), "b": [torch.zeros(2), None]}
    captured_step._write(held, {"b": [torch.ones(2), None], "a": torch.full((2,), 2.0)})
    assert held["a"].tolist() == [2, 2]
    assert held["b"][0].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["adafactor", "sparse_adam", "own"])
def test_optimizers_without_a_step_for_captures_are_refused_on_cuda(name):
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

    net = make_net()
    kinds = {"adafactor": torch.optim.Adafactor, "sparse_adam": torch.optim.SparseAdam, "own": Own}
    run = SimpleNamespace(
        net=net,
        device=torch.device("cuda"),
        optimizer=kinds[name](list(net.parameters())),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    with pytest.raises(ValueError, match="torch can't capture the step of"):
        graph_step._refuse(run)
    run.optimizer = torch.optim.RMSprop(net.parameters())
    graph_step._refuse(run)


def test_a_subclass_of_an_optimizer_keeps_what_it_has_of_its_own(capture):
    class Scaled(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1, momentum=0.9)
            self.scale = 0.5

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(self.scale)
            super().step(closure)

    expected, found = train("function", Scaled), train("graph", Scaled)
    assert capture.num_replays > 15
    for name, value in expected.net.state_dict().items():
        torch.testing.assert_close(found.net.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)


# ---- on a GPU ----


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def captured(monkeypatch):
    """How many steps each real capture holds."""
    steps = []
    make_captured = CapturedStep.__init__

    def init(self, parts, batch, num_steps, pool):
        make_captured(self, parts, batch, num_steps, pool)
        steps.append(num_steps)

    monkeypatch.setattr(CapturedStep, "__init__", init)
    monkeypatch.setattr(graph_step, "MAX_TOGETHER", 3)
    return steps


def assert_alike_on_cuda(tolerance=1e-4, **arguments):
    expected, found = (train(loop, device="cuda", dropout=0.0, **arguments) for loop in ("function", "graph"))
    for name, value in expected.net.state_dict().items():
        torch.testing.assert_close(found.net.state_dict()[name], value, rtol=tolerance, atol=tolerance, msg=name)
    for name, values in expected.history.history.items():
        limit = 0.05 if name.endswith("accuracy") else tolerance  # a row or two that stand on the edge
        assert found.history.history[name] == pytest.approx(values, rel=limit, abs=limit), name


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("case", CASES)
def test_on_cuda_captures_equal_eager_steps(case, captured):
    """Without dropout, whose draws a capture numbers in its own way."""
    assert_alike_on_cuda(1e-2 if case == "bf16" else 1e-4, **CASES[case])
    assert captured == ([1, 2] if case in TOGETHER else [1] * len(captured))
    assert captured


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("optimizer", ["adamax", "adadelta", "nadam", "rmsprop", "rprop", "asgd"])
def test_on_cuda_every_optimizer_that_torch_can_capture_is(optimizer, captured):
    assert_alike_on_cuda(optimizer=optimizer, tolerance=1e-3)
    assert captured == [1, 2]


@pytest.mark.cuda
@needs_cuda
def test_on_cuda_a_thawed_part_is_trained_as_in_an_eager_loop(captured):
    models = []
    for loop in ("function", "graph"):
        torch.manual_seed(0)
        net = make_net()
        net[2].p = 0.0
        net[4].requires_grad_(False)
        model = kt.Model(net, device="cuda")
        model.compile("cross_entropy", "adam", loop=loop)
        torch.manual_seed(1)
        model.fit(X, Y, batch_size=8, epochs=4, callbacks=Between(thaw), verbose=0)
        models.append(model)
    assert captured == [1, 1, 2]
    for name, value in models[0].net.state_dict().items():
        torch.testing.assert_close(models[1].net.state_dict()[name], value, rtol=1e-4, atol=1e-4, msg=name)


class Syncs(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum().item() > -1e9 else -x)


@pytest.mark.cuda
@needs_cuda
def test_on_cuda_a_net_that_waits_for_the_gpu_is_refused_and_all_goes_on(captured):
    model = kt.Model(Syncs(6, 3), device="cuda")
    model.compile("cross_entropy", "sgd", loop="graph")
    with pytest.raises(ValueError, match=r"can't make one graph of this training step: .*synchroniz.*x\.sum\(\)\.item"):
        model.fit(X, Y, batch_size=8, verbose=0)
    assert not captured
    assert_alike_on_cuda()
    assert torch.nn.functional.dropout(torch.ones(1000, device="cuda"), 0.5).sum() > 0


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_gpu_than_the_current_one_steps_train(captured):
    expected, found = (train(loop, device="cuda:1", dropout=0.0) for loop in ("function", "graph"))
    assert captured == [1, 2]
    for one, other in zip(expected.net.parameters(), found.net.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@needs_cuda
def test_on_cuda_workers_that_pin_go_on_during_a_capture(captured):
    model = kt.Model(make_net(), device="cuda")
    model.compile("cross_entropy", "adam", loop="graph")
    loader = DataLoader(TensorDataset(X, Y), 8, num_workers=2, pin_memory=True)
    model.fit(loader, epochs=2, verbose=0)
    assert captured == [1]


@pytest.mark.cuda
@needs_cuda
def test_on_cuda_dropout_draws_anew_at_each_replay(captured):
    class Look(Callback):
        def on_train_begin(self, logs=None):
            self.losses = []

        def on_train_batch_end(self, batch, logs=None):
            self.losses.append(self.run.loss.item())

    look = Look()
    model = kt.Model(nn.Sequential(nn.Linear(6, 2000), nn.Dropout(0.5)), device="cuda")
    model.compile(lambda outputs, y: outputs.square().mean(), "sgd", loop="graph", param_groups={"*": {"lr": 0.0}})
    model.fit(X[:1].repeat(64, 1), Y[:64], batch_size=8, epochs=2, callbacks=look, verbose=0)
    assert captured == [1]
    assert len(set(look.losses)) > 10  # of 16: the same rows and weights, other draws
