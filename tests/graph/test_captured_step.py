"""The step that a GPU captures, on the CPU: what would be captured is called at each replay, with the same tensors.

That shows which tensors a replay reads and writes, and what the loop does around it; not what CUDA lets be captured,
which the last tests show on a GPU.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

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

        def capture(step):
            self.num_captures += 1
            run = noted[0].run
            window, result = [*run.window], self.run_without_effect(noted[0], step)

            def replay():
                self.num_replays += 1
                run.window = [*window]  # a later fit has a run of its own
                for held, new in zip(leaves(result), leaves(step()), strict=True):
                    held.copy_(new)

            return replay, result

        monkeypatch.setattr(GraphStep, "__init__", init)
        monkeypatch.setattr(CapturedStep, "__init__", init_captured)
        monkeypatch.setattr(captured_step, "capture", capture)
        monkeypatch.setattr(graph_step, "side_stream", nullcontext)

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


TOGETHER = ("adam", "sgd", "bf16", "clipping")


@pytest.mark.usefixtures("rows_on_gpu")
@pytest.mark.parametrize("case", CASES)
def test_several_steps_in_one_capture_equal_as_many_eager_ones(case, capture):
    expected, found = train("function", **CASES[case]), train("graph", **CASES[case])
    if case in TOGETHER:  # a warm-up of 3 batches, 5 by themselves; then twice 3 together, 2 by themselves
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
def test_batches_of_another_size_in_a_later_fit_are_stepped_one_by_one(capture):
    models = []
    for loop in ("function", "graph"):
        model = train(loop)
        torch.manual_seed(2)
        model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
        models.append(model)
    assert (capture.num_captures, capture.num_replays) == (2, 5 + 2 * 4)
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


# ---- on a GPU ----


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_on_cuda_captures_equal_eager_steps(case, monkeypatch):
    """Without dropout, whose draws a capture numbers in its own way."""
    captured = []
    make_captured = CapturedStep.__init__

    def init(self, parts, batch, num_steps):
        make_captured(self, parts, batch, num_steps)
        captured.append(num_steps)

    monkeypatch.setattr(CapturedStep, "__init__", init)
    monkeypatch.setattr(graph_step, "MAX_TOGETHER", 3)
    expected, found = (train(loop, device="cuda", dropout=0.0, **CASES[case]) for loop in ("function", "graph"))
    assert captured == ([1, 3] if case in TOGETHER else [1] * len(captured))
    assert captured
    tolerance = 1e-2 if case == "bf16" else 1e-4
    for name, value in expected.net.state_dict().items():
        torch.testing.assert_close(found.net.state_dict()[name], value, rtol=tolerance, atol=tolerance, msg=name)
    for name, values in expected.history.history.items():
        assert found.history.history[name] == pytest.approx(values, rel=tolerance, abs=tolerance), name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_dropout_draws_anew_at_each_replay():
    class Look(Callback):
        def on_train_begin(self, logs=None):
            self.losses = []

        def on_train_batch_end(self, batch, logs=None):
            self.losses.append(self.run.loss.item())

    look = Look()
    model = kt.Model(nn.Sequential(nn.Linear(6, 2000), nn.Dropout(0.5)), device="cuda")
    model.compile(lambda outputs, y: outputs.square().mean(), "sgd", loop="graph", param_groups={"*": {"lr": 0.0}})
    model.fit(X[:1].repeat(64, 1), Y[:64], batch_size=8, epochs=2, callbacks=look, verbose=0)
    assert len(set(look.losses)) > 10  # of 16: the same rows and weights, other draws
