"""The step that a GPU captures, on the CPU: what would be captured is called at each replay, with the same tensors.

That shows which tensors a replay reads and writes, and what the loop does around it; not what CUDA lets be captured.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch import graph
from kerastorch.callbacks import EMA, Callback

X = torch.randn(67, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(67) % 3


class Capture:
    """Stands in for CUDA's: notes how often a step was captured and replayed."""

    def __init__(self, monkeypatch):
        self.num_captures = self.num_replays = 0
        make_step = graph.GraphStep.__init__

        def init(step, run, eager_step):
            make_step(step, run, eager_step)
            step._is_cuda = True

        noted = []
        make_captured = graph.CapturedStep.__init__

        def init_captured(captured, parts, batch):
            noted[:] = [parts]
            make_captured(captured, parts, batch)

        def capture(step):
            self.num_captures += 1
            run = noted[0].run
            window, result = [*run.window], self.run_without_effect(noted[0], step)

            def replay():
                self.num_replays += 1
                run.window = [*window]  # a later fit has a run of its own
                for held, new in zip(graph.leaves(result), graph.leaves(step()), strict=True):
                    held.copy_(new)

            return replay, result

        monkeypatch.setattr(graph.GraphStep, "__init__", init)
        monkeypatch.setattr(graph.CapturedStep, "__init__", init_captured)
        monkeypatch.setattr(graph, "_capture", capture)
        monkeypatch.setattr(graph, "_side_stream", nullcontext)

    def run_without_effect(self, parts, step):
        net, optimizer = parts.run.net, parts.run.optimizer
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        tensors = [*net.parameters(), *net.buffers(), *parts.gradients, *filter(torch.is_tensor, state)]
        before, random_state = [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()
        result = graph.map_nested(torch.clone, step())
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(random_state)
        return result


@pytest.fixture
def capture(monkeypatch):
    return Capture(monkeypatch)


def make_net():
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))


def train(loop, optimizer="adam", callbacks=(), **options):
    torch.manual_seed(0)
    model = kt.Model(make_net(), device="cpu")
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
