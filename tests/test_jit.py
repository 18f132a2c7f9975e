"""jit_compile: the net compiled in place gives what it gives uncompiled, within rounding, and is compiled once."""

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import EMA, ModelCheckpoint
from kerastorch.loops import LOOPS

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(67, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(67) % 3


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))


def train(jit_compile, loop="script", epochs=3, callbacks=(), **options):
    model = kt.Model(make_net(), device="cpu")
    model.compile(
        "cross_entropy",
        "sgd",
        ["accuracy"],
        loop=loop,
        jit_compile=jit_compile,
        lr_scheduler="cosine",
        lr_scheduler_interval="step",
    )
    torch.manual_seed(1)
    history = model.fit(
        X, Y, batch_size=16, epochs=epochs, validation_data=(X, Y), verbose=0, callbacks=[*callbacks], **options
    )
    return model, history


def assert_alike(one, other):
    for name, value in one.net.state_dict().items():
        torch.testing.assert_close(other.net.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)


@slow
@pytest.mark.parametrize("loop", LOOPS)
def test_a_compiled_net_trains_as_it_does_uncompiled_and_keeps_its_keys(loop):
    torch._dynamo.utils.counters.clear()
    (one, history), (other, jit_history) = train(False, loop), train(True, loop)
    assert_alike(one, other)
    assert list(other.net.state_dict()) == list(make_net().state_dict())
    for name, values in history.history.items():
        assert jit_history.history[name] == pytest.approx(values, rel=1e-4, abs=1e-4)
    # One for training and one for evaluation, whatever the short last batch, the rate and the epoch.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert other.predict(X[:5], verbose=0) == pytest.approx(one.predict(X[:5], verbose=0), abs=1e-4)


@slow
def test_a_compiled_run_is_resumed_and_averaged(tmp_path):
    straight, _ = train(True, callbacks=[EMA(0.9)])
    train(True, epochs=1, callbacks=[EMA(0.9, keep_average=False), ModelCheckpoint(tmp_path / "a.pt")])
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(content["model_state_dict"]) == list(make_net().state_dict())
    uncompiled = kt.Model(make_net(), device="cpu")
    uncompiled.net.load_state_dict(content["model_state_dict"])
    assert straight.evaluate(X, Y, verbose=0)["loss"] < uncompiled_loss(uncompiled)


def uncompiled_loss(model):
    model.compile("cross_entropy", "sgd")
    return model.evaluate(X, Y, verbose=0)["loss"]


@slow
def test_the_next_compile_takes_it_back():
    model, _ = train(True, epochs=1)
    assert model.net._compiled_call_impl is not None
    model.compile("cross_entropy", "sgd")
    assert model.net._compiled_call_impl is None
    model.fit(X, Y, verbose=0)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


@slow
def test_what_can_not_be_compiled_names_the_option():
    model = kt.Model(Branching(), device="cpu")
    model.compile("cross_entropy", "sgd", jit_compile={"fullgraph": True, "backend": "eager"})
    with pytest.raises(ValueError, match=r"jit_compile=\{'fullgraph': True, .*\}: the net can't be compiled: "):
        model.fit(X, Y, verbose=0)
    model.compile("cross_entropy", "sgd", jit_compile={"backend": "eager"})
    model.fit(X, Y, verbose=0)


def test_arguments_that_torch_compile_does_not_take_are_refused():
    model = kt.Model(make_net(), device="cpu")
    with pytest.raises(
        ValueError, match=r"jit_compile has 'fulgraph', which torch\.compile does not take; .*'fullgraph'"
    ):
        model.compile("cross_entropy", "sgd", jit_compile={"fulgraph": True})
    with pytest.raises(TypeError, match="jit_compile must be True, False or a dict"):
        model.compile("cross_entropy", "sgd", jit_compile="inductor")
    assert model.net._compiled_call_impl is None


def test_a_net_that_is_wrapped_already_is_refused():
    model = kt.Model(torch.compile(make_net(), backend="eager"), device="cpu")
    with pytest.raises(ValueError, match=r"torch\.compile has wrapped already|that torch\.compile has wrapped"):
        model.compile("cross_entropy", "sgd", jit_compile=True)


def test_images_and_weights_lie_channels_last_where_that_was_asked_for():
    seen = []

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return self.head(self.conv(x).mean((2, 3)))

    model = kt.Model(Conv(), device="cpu")
    images = torch.randn(20, 3, 8, 8)
    results = []
    for channels_last in (True, False):
        model.compile("cross_entropy", "sgd", channels_last=channels_last)
        results.append(model.evaluate(images, Y[:20], verbose=0)["loss"])
        assert all(seen) == channels_last
        assert model.net.conv.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        seen.clear()
    assert results[0] == pytest.approx(results[1], rel=1e-5)
