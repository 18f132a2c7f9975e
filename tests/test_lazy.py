"""A lazy net, whose shapes the first batch settles, trains as the same net called once by hand before fit()."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import EMA, SWA, BackupAndRestore, EarlyStopping, ModelCheckpoint
from kerastorch.device import preserved_random_state
from kerastorch.lazy import lazy_names
from kerastorch.loops import LOOPS

EPOCHS = 3
X = torch.randn(45, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (45,), generator=torch.Generator().manual_seed(2))


class CallCounter(nn.Module):
    """Counts its calls in a buffer, whatever the mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def make_net():
    """Dropout between the lazy layers, whose draws would change theirs, and lazy statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Dropout(0.1), nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.LazyLinear(16), CallCounter(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.LazyLinear(3)),
    )


def call_once(net, x=X):
    """What a torch user does before he makes the optimizer."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers() if name.endswith("calls")}
    with preserved_random_state(), torch.no_grad():
        net.eval()(x)
    net.load_state_dict(buffers, strict=False)
    return net.train()


def train_by_hand(net, batches, epochs=EPOCHS):
    optimizer, loss_fn = torch.optim.Adam(net.parameters(), fused=True), nn.CrossEntropyLoss()
    for _ in range(epochs):
        for x, y in batches:
            loss_fn(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()


def loader():
    return DataLoader(TensorDataset(X, Y), 8, shuffle=True)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


DATA = {
    "a loader": (loader, EPOCHS),
    "a list": (lambda: list(zip(X.split(9), Y.split(9), strict=True)), EPOCHS),
    "an iterator": (lambda: iter(zip(X.split(9), Y.split(9), strict=True)), 1),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("data", DATA)
def test_training_is_that_of_a_loop_by_hand_after_one_call_by_hand(data, loop):
    make, epochs = DATA[data]
    theirs = call_once(make_net())
    train_by_hand(theirs, make(), epochs)
    expected = torch.get_rng_state()
    mine = make_net()
    model = kt.Model(mine, device="cpu")
    model.compile("cross_entropy", "adam", metrics=["accuracy"], loop=loop)
    history = model.fit(make(), epochs=epochs, verbose=0).history
    assert same(mine, theirs)
    assert torch.equal(torch.get_rng_state(), expected)
    assert len(history["accuracy"]) == epochs
    assert mine[6].calls == epochs * len(list(make()))


# ---- what compile() and fit() can add ----

COMPILED = {
    "clipping by norm": {"clip_grad_norm": 0.1},
    "clipping by value": {"clip_grad_value": 0.01},
    "accumulation": {"gradient_accumulation_steps": 4},
    "accumulation as memory allows": {"gradient_accumulation_steps": "auto"},
    "bf16": {"mixed_precision": "bf16"},
    "a scheduler": {"lr_scheduler": "one_cycle", "lr_scheduler_interval": "step"},
    "groups": {"param_groups": {"*.bias": {"lr": 0.1}}},
    "a class": {"optimizer": torch.optim.AdamW},
    "a factory": {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)},
    "compiled": {"jit_compile": {"backend": "eager"}},
}
FITTED = {
    "arrays": {"x": X, "y": Y, "batch_size": 8},
    "a split": {"x": X, "y": Y, "validation_split": 0.2},
    "validation": {"validation_data": (X, Y)},
    "class weights": {"class_weight": {0: 2.0}},
    "steps": {"steps_per_epoch": 4},
    "an iterator": {"x": lambda: iter(zip(X.split(9), Y.split(9), strict=True)), "epochs": 1},
    "EMA": {"callbacks": lambda: EMA(0.9), "validation_data": (X, Y)},
    "SWA": {"callbacks": lambda: SWA(1), "validation_data": (X, Y)},
    "best weights": {"callbacks": lambda: EarlyStopping("loss", restore_best_weights=True)},
}


def fit_model(net, compiled=None, fitted=None):
    model = kt.Model(net, device="cpu")
    model.compile(**{"loss": "cross_entropy", "optimizer": "adam", **(compiled or {})})
    arguments = {"x": loader, "epochs": EPOCHS, "verbose": 0, **(fitted or {})}
    model.fit(**{name: value() if callable(value) else value for name, value in arguments.items()})
    return model


@pytest.mark.parametrize("option", [*COMPILED, *FITTED])
def test_every_option_does_to_a_lazy_net_what_it_does_to_one_with_shapes(option):
    options = COMPILED.get(option), FITTED.get(option)
    mine = fit_model(make_net(), *options)
    theirs = fit_model(call_once(make_net()), *options)
    assert same(mine.net, theirs.net)
    assert mine.history.history == theirs.history.history
    torch._dynamo.reset()


def test_a_batch_alone_trains_as_in_fit():
    mine, theirs = (kt.Model(make_net(), device="cpu") for _ in range(2))
    for model in (mine, theirs):
        model.compile("cross_entropy", "adam")
    torch.manual_seed(3)
    mine.train_on_batch(X, Y)
    torch.manual_seed(3)
    theirs.fit([(X, Y)], verbose=0)
    assert same(mine.net, theirs.net)


def test_the_call_that_settles_the_shapes_is_not_compiled():
    numbers = []
    for settle in (lambda net: net, call_once):
        compiled = []

        def backend(graph, inputs, compiled=compiled):
            compiled.append(graph)
            return graph.forward

        fit_model(settle(make_net()), {"jit_compile": {"backend": backend}})
        numbers.append(len(compiled))
        torch._dynamo.reset()
    assert numbers[0] == numbers[1] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default:.*:UserWarning", "default:.*:DeprecationWarning")  # inductor's own
def test_the_graph_loop_begins_with_the_same_weights_and_draws():
    results = []
    for settle in (lambda net: net, call_once):
        model = fit_model(settle(make_net()), {"loop": "graph"}, {"x": X, "y": Y, "batch_size": 9})
        results.append((model, torch.get_rng_state()))
    assert same(results[0][0].net, results[1][0].net)
    assert torch.equal(results[0][1], results[1][1])
    torch._dynamo.reset()


BEFORE = {
    "evaluate": lambda model: model.evaluate(X, Y, verbose=0),
    "evaluate, a loader": lambda model: model.evaluate(loader(), verbose=0),
    "predict": lambda model: model.predict(X, verbose=0),
    "predict_on_batch": lambda model: model.predict_on_batch(X),
    "test_on_batch": lambda model: model.test_on_batch(X, Y),
    "summary": lambda model: model.summary(X),
    "check": lambda model: model.check(X, Y, steps=2),
}


@pytest.mark.parametrize("verb", BEFORE)
def test_what_is_called_before_fit_changes_nothing_of_it(verb):
    expected = fit_model(make_net()).net
    mine = make_net()
    model = kt.Model(mine, device="cpu")
    model.compile("cross_entropy", "adam")
    BEFORE[verb](model)
    assert bool(lazy_names(mine)) == (verb in ("summary", "check"))
    mine[6].calls.zero_()
    model.fit(loader(), epochs=EPOCHS, verbose=0)
    assert same(mine, expected)


def test_predict_before_compile_settles_the_shapes():
    model = kt.Model(make_net(), device="cpu")
    first = model.predict(X, verbose=0)
    assert not lazy_names(model.net)
    assert (model.predict(X, verbose=0) == first).all()


# ---- files ----


@pytest.mark.parametrize("save_freq", ["epoch", 4])
@pytest.mark.parametrize("average", [None, EMA, SWA])
def test_a_new_lazy_net_goes_on_from_a_checkpoint_to_the_bit(average, save_freq, tmp_path):
    def callbacks():
        own = [] if average is None else [EMA(0.9) if average is EMA else SWA(1)]
        return [ModelCheckpoint(tmp_path / "{epoch}.pt", save_freq=save_freq), *own]

    whole = fit_model(make_net(), {}, {"callbacks": callbacks, "validation_data": (X, Y)})
    file = min(tmp_path.glob("*.pt"))
    torch.manual_seed(9)
    resumed = fit_model(make_net(), {}, {"callbacks": callbacks, "validation_data": (X, Y), "resume": file})
    assert same(resumed.net, whole.net)
    assert resumed.history.history == whole.history.history


def test_backup_and_restore_begins_and_goes_on_with_a_lazy_net(tmp_path):
    def fitted(folder, epochs):
        return {"callbacks": BackupAndRestore(tmp_path / folder, delete_checkpoint=False), "epochs": epochs}

    whole = fit_model(make_net(), {}, fitted("a", EPOCHS))
    fit_model(make_net(), {}, fitted("b", 1))
    assert same(fit_model(make_net(), {}, fitted("b", EPOCHS)).net, whole.net)


def test_a_resumed_lazy_net_compiles(tmp_path):
    compiled = {"jit_compile": {"backend": "eager"}}
    callbacks = ModelCheckpoint(tmp_path / "{epoch}.pt")
    whole = fit_model(make_net(), compiled, {"callbacks": callbacks})
    torch._dynamo.reset()
    resumed = fit_model(make_net(), compiled, {"callbacks": callbacks, "resume": tmp_path / "1.pt"})
    assert same(resumed.net, whole.net)
    torch._dynamo.reset()


def test_a_checkpoint_that_fails_half_way_is_an_error_that_names_it(tmp_path):
    fit_model(make_net(), {}, {"callbacks": ModelCheckpoint(tmp_path / "a.pt")})
    content = torch.load(tmp_path / "a.pt")
    content["run"]["random_state"]["torch"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(RuntimeError, match=r"b\.pt' can't be taken up"):
        fit_model(make_net(), {}, {"resume": tmp_path / "b.pt", "epochs": 5})


def test_a_saved_model_and_saved_weights_go_into_a_lazy_net(tmp_path):
    model = fit_model(make_net())
    model.save(tmp_path / "a.pt")
    model.save_weights(tmp_path / "b.pt")
    torch.manual_seed(9)
    loaded = kt.Model.load(tmp_path / "a.pt", make_net(), device="cpu")
    for one in (model, loaded):
        torch.manual_seed(4)
        one.fit(loader(), verbose=0)
    assert same(loaded.net, model.net)
    weighed = kt.Model(make_net(), device="cpu")
    weighed.compile("cross_entropy", "adam")
    assert weighed.load_weights(tmp_path / "b.pt").ok
    before = copy.deepcopy(weighed.net)
    weighed.compile("cross_entropy", lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    weighed.fit(X, Y, verbose=0)
    assert torch.equal(weighed.net[1].weight, before[1].weight)
    assert torch.equal(weighed.net[1].weight, torch.load(tmp_path / "b.pt")["1.weight"])


LAZY_LAYERS = {  # sizes of the file's layer in, out, then what the lazy one may know otherwise
    "linear": (lambda out, **_: nn.LazyLinear(out), lambda out, **_: nn.Linear(5, out)),
    "convolution": (lambda out, **o: nn.LazyConv2d(out, **o), lambda out, **o: nn.Conv2d(4, out, **o)),
    "transposed": (lambda out, **o: nn.LazyConvTranspose1d(out, **o), lambda out, **o: nn.ConvTranspose1d(4, out, **o)),
}
SIZES = {"linear": {}, "convolution": {"kernel_size": 3, "groups": 2}, "transposed": {"kernel_size": 3, "groups": 2}}


@pytest.mark.parametrize("kind", LAZY_LAYERS)
def test_a_lazy_layer_takes_no_sizes_that_it_knows_otherwise(kind, tmp_path):
    make_lazy, make = LAZY_LAYERS[kind]
    sizes = SIZES[kind]
    wrong = [(8, sizes)] + ([(6, {**sizes, "kernel_size": 5})] if sizes else [])
    for out, others in wrong:
        torch.save(nn.Sequential(make(out, **others)).state_dict(), tmp_path / "a.pt")
        net = nn.Sequential(make_lazy(6, **sizes))
        model = kt.Model(net, device="cpu")
        with pytest.raises(ValueError, match=r"'0\.weight' is \(\d.* in the file, \(.*\?.* in the net"):
            model.load_weights(tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"'0\.weight' is "):
            kt.Model.load(tmp_path / "a.pt", net, device="cpu")
        assert isinstance(net[0].weight, nn.parameter.UninitializedParameter)
    right = nn.Sequential(make(6, **sizes))
    torch.save(right.state_dict(), tmp_path / "a.pt")
    assert model.load_weights(tmp_path / "a.pt").ok
    assert same(net, right)


def test_a_lazy_head_of_another_size_is_left_out_where_not_strict(tmp_path):
    torch.save({"0.weight": torch.ones(4, 5), "0.bias": torch.ones(4), "1.weight": torch.ones(7, 4)}, tmp_path / "a.pt")
    net = nn.Sequential(nn.Linear(5, 4), nn.LazyLinear(3))
    report = kt.Model(net, device="cpu").load_weights(tmp_path / "a.pt", strict=False)
    assert report.mismatched == {"1.weight": "(7, 4) in the file, (3, ?) in the net"}
    assert report.missing == ["1.bias"]
    assert net(torch.ones(2, 5)).shape == (2, 3)


def test_a_checkpoint_of_another_size_is_not_resumed_in_a_lazy_net(tmp_path):
    def build(classes):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

    fit_model(build(5), {}, {"epochs": 1, "callbacks": kt.callbacks.ModelCheckpoint(tmp_path / "a.pt")})
    with pytest.raises(ValueError, match=r"net: '1\.weight' is \(5, \d+\) in the file, \(3, \?\) in the net"):
        fit_model(build(3), {}, {"epochs": 2, "resume": tmp_path / "a.pt"})


@pytest.mark.parametrize("save", ["save", "save_weights", "save whole", "save_weights .safetensors"])
def test_a_net_without_shapes_is_not_saved(save, tmp_path):
    model = kt.Model(make_net(), device="cpu")
    model.compile("cross_entropy", "adam")
    verb, _, how = save.partition(" ")
    path = tmp_path / f"a{how if how.startswith('.') else '.pt'}"
    with pytest.raises(ValueError, match=r"the shape of '1\.weight' is not known yet: .*model\.predict\(x\[:1\]\)"):
        getattr(model, verb)(path, **({"whole": True} if how == "whole" else {}))
    assert not path.exists()
    model.predict(X[:1], verbose=0)
    getattr(model, verb)(path, **({"whole": True} if how == "whole" else {}))


# ---- what can't be ----


class WithHead(nn.Module):
    """An auxiliary head that only training calls."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.LazyLinear(8), nn.LazyLinear(3), nn.LazyLinear(3)

    def forward(self, x):
        x = self.body(x)
        return self.head(x) + self.auxiliary(x) if self.training else self.head(x)


def test_a_layer_that_the_first_forward_leaves_out_is_refused_with_the_way_out():
    model = kt.Model(WithHead(), device="cpu")
    model.compile("cross_entropy", "adam")
    with pytest.raises(ValueError, match=r"'auxiliary\.weight' is not known after .* net\.train\(\)\(x\[:2\]\)"):
        model.fit(X, Y, verbose=0)
    assert model.predict(X, verbose=0).shape == (45, 3)
    model.net.train()(X[:2])
    model.compile("cross_entropy", "adam")
    model.fit(X, Y, verbose=0)


def test_channels_last_needs_the_shapes():
    model = kt.Model(nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2)), device="cpu")
    with pytest.raises(ValueError, match=r"channels_last .* shape of '0\.weight' .*net\(x\[:1\]\)"):
        model.compile("cross_entropy", "adam", channels_last=True)
    images = torch.randn(8, 3, 8, 8)
    model.net(images)
    model.compile("cross_entropy", "adam", channels_last=True)
    model.fit(images, torch.arange(8) % 2, verbose=0)


def test_a_wrong_dtype_is_told_as_of_any_net():
    model = kt.Model(nn.Sequential(nn.LazyLinear(3)), device="cpu")
    model.compile("cross_entropy", "adam")
    with pytest.raises(ValueError, match="x / 255"):
        model.fit(X.to(torch.uint8), Y, verbose=0)
    model.fit(X, Y, verbose=0)


# ---- loops of one's own ----


class Pair(nn.Module):
    """Two nets side by side, which are never called as one."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.LazyLinear(4), nn.LazyLinear(6)


class Autoencoding(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        outputs = self.net.decoder(self.net.encoder(x))
        loss = self.loss_fn(outputs, y, sample_weight)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, outputs


@pytest.mark.parametrize("optimizer", ["adam", {"encoder": "adam", "decoder": "sgd"}])
def test_a_step_of_ones_own_settles_the_shapes_as_it_calls_the_parts(optimizer, tmp_path):
    torch.manual_seed(0)
    model = kt.Model(Pair(), device="cpu")
    model.compile("mse", optimizer, loop=Autoencoding)
    callbacks = [EMA(0.5, keep_average=False), ModelCheckpoint(tmp_path / "a.pt")]
    losses = model.fit(X, X, epochs=5, verbose=0, callbacks=callbacks).history["loss"]
    assert losses[-1] < losses[0]
    assert not lazy_names(model.net)


class Replaces(nn.Module):
    """Counts its calls in a buffer that is another tensor each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x


def test_a_buffer_that_forward_replaces_is_put_back_too():
    model = kt.Model(nn.Sequential(nn.LazyLinear(3), Replaces()), device="cpu")
    model.compile("cross_entropy", "sgd")
    model.train_on_batch(torch.randn(4, 2), torch.arange(4) % 3)
    assert model.net[1].calls == 1
