"""predict joins outputs in little more memory than the result; predict_iter streams them and leaves all else alone."""

import random
import subprocess
import sys
import textwrap
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import kerastorch as kt
from kerastorch.loops import LOOPS

# All loops agree in test_loops.py; where they are not the point, the others are for the slow part.
mostly_one_loop = pytest.mark.parametrize(
    "loop", ["script", *(pytest.param(loop, marks=pytest.mark.slow) for loop in LOOPS if loop != "script")]
)
N = 11
X = torch.linspace(-2, 2, N * 2).reshape(N, 2).sin()
Pair = namedtuple("Pair", ["mean", "rows"])


class Shaped(nn.Module):
    """A linear layer whose output goes through a function of one's own."""

    def __init__(self, shape=lambda h, x: h):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout, self.shape = nn.Linear(2, 3), nn.Dropout(0.5), shape

    def forward(self, x):
        return self.shape(self.dropout(self.layer(x)), x)


class Noisy(nn.Module):
    """Draws from every generator in forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x) + torch.rand(len(x), 1) + random.random() + float(np.random.rand())


class Rows(Dataset):
    """Rows with noise, as augmentation makes it."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index] + torch.rand(()) + random.random() + float(np.random.rand())


class Stream(IterableDataset):
    def __init__(self, rows=N):
        self.rows = rows

    def __iter__(self):
        return iter(X[: self.rows])


class Batches:
    """Batches of 4 rows, with no length."""

    def __iter__(self):
        return iter(X.split(4))


def make_model(net=None, loop=None, **arguments):
    model = kt.Model(net or Shaped(), device="cpu")
    if loop is not None or arguments:
        model.compile("mse", "sgd", loop=loop or "script", **arguments)
    return model


def by_hand(net):
    """The outputs for all rows at once, in eval mode."""
    net.eval()
    with torch.no_grad():
        outputs = net(X)
    net.train()
    return outputs


def random_state():
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


def join(parts):
    return np.concatenate(list(parts))


# ---- predict ----

DATA = {
    "tensor": lambda: {"x": X, "batch_size": 4},
    "numpy": lambda: {"x": X.numpy(), "batch_size": 4},
    "Dataset": lambda: {"x": TensorDataset(X), "batch_size": 4},
    "loader": lambda: {"x": DataLoader(TensorDataset(X, torch.zeros(N)), 4)},
    "loader with workers": lambda: {"x": DataLoader(TensorDataset(X), 4, num_workers=2)},
    "stream": lambda: {"x": Stream(), "batch_size": 4},
    "list": lambda: {"x": [(batch, torch.zeros(len(batch))) for batch in X.split(4)]},
    "iterator": lambda: {"x": iter([(batch,) for batch in X.split(4)])},
    "iterable": lambda: {"x": Batches()},
}


@mostly_one_loop
@pytest.mark.parametrize("form", DATA)
def test_rows_come_in_order_with_a_short_last_batch(form, loop):
    model = make_model(loop=loop)
    predictions = model.predict(**DATA[form](), verbose=0)
    assert type(predictions) is np.ndarray
    assert predictions.dtype == np.float32
    np.testing.assert_allclose(predictions, by_hand(model.net).numpy(), rtol=1e-6)


NESTS = {
    "tuple": (lambda h, x: (h, x), lambda made: made),
    "list": (lambda h, x: [h, x], lambda made: made),
    "named tuple": (Pair, lambda made: (made.mean, made.rows)),
    "dict": (lambda h, x: {"x": x, "h": h}, lambda made: (made["h"], made["x"])),
    "nest": (lambda h, x: ({"h": h}, [x]), lambda made: (made[0]["h"], made[1][0])),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("form", NESTS)
@pytest.mark.parametrize("data", ["tensor", "iterable"])
def test_predictions_nest_as_the_outputs_do(data, form, loop):
    build, take = NESTS[form]
    model = make_model(Shaped(build), loop=loop)
    predictions = model.predict(**DATA[data](), verbose=0)
    assert type(predictions) is type(build(1, 2))
    h, x = take(predictions)
    np.testing.assert_allclose(h, take(by_hand(model.net))[0].numpy(), rtol=1e-6)
    assert np.array_equal(x, X.numpy())


def test_dict_keys_keep_forward_s_order():
    assert list(make_model(Shaped(NESTS["dict"][0])).predict(X, verbose=0)) == ["x", "h"]


@pytest.mark.parametrize("loop", LOOPS)
def test_bfloat16_outputs_come_as_float32(loop):
    short = make_model(Shaped(lambda h, x: {"short": h.bfloat16(), "ints": h.long()}), loop=loop)
    predictions = short.predict(X, verbose=0)
    assert predictions["short"].dtype == np.float32
    assert predictions["ints"].dtype == np.int64
    assert np.array_equal(predictions["short"], by_hand(short.net)["short"].float().numpy())
    mixed = make_model(loop=loop, mixed_precision="bf16")
    assert mixed.predict(X, verbose=0).dtype == np.float32
    assert next(mixed.predict_iter(X)).dtype == np.float32


REFUSED = {
    "a scalar": (lambda h, x: h.sum(), r"first, batch axis, but forward returned .*predict_iter\(\)"),
    "a scalar among outputs": (lambda h, x: (h, h.sum()), r"first, batch axis.*predict_iter\(\)"),
    "time first": (
        lambda h, x: torch.zeros(7, len(x)),
        r"first, batch axis, but forward returned ndarray\(7, 4\) float32 for a batch of 4.*predict_iter\(\)",
    ),
    "other trailing shapes": (
        lambda h, x: torch.zeros(len(x), 5 if len(x) == 4 else 6, 2),
        r"can't join outputs of shapes \(N, 5, 2\) and \(N, 6, 2\): use predict_iter\(\)",
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("case", REFUSED)
def test_outputs_that_can_not_be_joined_are_refused_but_streamed(case, loop):
    shape, message = REFUSED[case]
    model = make_model(Shaped(shape), loop=loop)
    with pytest.raises(ValueError, match=message):
        model.predict(X, batch_size=4, verbose=0)
    streamed = list(model.predict_iter(X, batch_size=4))
    assert len(streamed) == 3
    last = model.net.eval()(X[8:])
    for given, expected in zip(
        streamed[2] if type(last) is tuple else [streamed[2]], last if type(last) is tuple else [last], strict=True
    ):
        np.testing.assert_allclose(given, expected.detach().numpy(), rtol=1e-6)


EMPTY = {
    "tensor": (lambda: X[:0], r"predict(_iter)?\(\) got no samples"),
    "list": (list, r"predict(_iter)?\(\) got no samples"),
    "Dataset": (lambda: TensorDataset(X[:0]), r"predict(_iter)?\(\)'s data is empty: the TensorDataset has 0 rows"),
    "loader": (
        lambda: DataLoader(TensorDataset(X), 16, drop_last=True),
        r"predict(_iter)?\(\)'s data is empty: DataLoader gives 0 batches",
    ),
    "stream": (lambda: Stream(0), r"predict(_iter)?\(\)'s data gave no batches"),
    "iterator": (lambda: iter([]), r"predict(_iter)?\(\)'s data gave no batches; an iterator can be read only once"),
    "none": (lambda: None, r"predict(_iter)?\(\) needs data: x is None"),
}


@pytest.mark.parametrize("verb", ["predict", "predict_iter"])
@pytest.mark.parametrize("form", EMPTY)
def test_no_rows_are_an_error_that_says_so(form, verb):
    make, message = EMPTY[form]
    with pytest.raises(ValueError, match=message):
        make_model().predict(make(), verbose=0) if verb == "predict" else list(make_model().predict_iter(make()))


def test_a_batch_without_rows_gives_an_empty_array_of_the_right_width():
    assert make_model().predict(iter([X[:0]]), verbose=0).shape == (0, 3)


# ---- predict_iter ----


@mostly_one_loop
@pytest.mark.parametrize("form", DATA)
def test_streamed_batches_joined_are_predict_s(form, loop):
    model = make_model(loop=loop)
    parts = list(model.predict_iter(**DATA[form]()))
    assert [len(part) for part in parts] == [4, 4, 3]
    assert np.array_equal(join(parts), model.predict(**DATA[form](), verbose=0))


def test_streaming_works_before_compile_and_with_unpack_after_it():
    model = make_model()
    plain = join(model.predict_iter(X, batch_size=4))
    np.testing.assert_allclose(plain, by_hand(model.net).numpy(), rtol=1e-6)
    model.compile("mse", "sgd", unpack=lambda batch: (batch["image"], batch["label"]))
    batches = [{"image": x, "label": 0} for x in X.split(4)]
    assert np.array_equal(join(model.predict_iter(batches)), plain)


def test_batches_are_read_as_they_are_asked_for():
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield X[:4]

    stream = make_model().predict_iter(endless())
    assert read == []
    assert next(stream).shape == (4, 3)
    assert read == [0]
    next(stream)
    assert read == [0, 1]
    stream.close()
    assert len(list(make_model().predict_iter(endless(), steps=3))) == 3


@pytest.mark.parametrize("loop", LOOPS)
def test_flags_and_random_state_are_left_alone_between_batches_too(loop):
    model = make_model(loop=loop)
    model.net.train()
    model.net.layer.eval()
    flags, state = [module.training for module in model.net.modules()], random_state()
    loader = DataLoader(Rows(), 4, shuffle=True)
    for part in model.predict_iter(loader):
        assert part.shape[1] == 3
        assert [module.training for module in model.net.modules()] == flags
        assert random_state() == state
    assert random_state() == state
    assert torch.is_grad_enabled()


def test_the_loader_s_own_generator_is_left_alone():
    generator = torch.Generator().manual_seed(4)
    state, loader = generator.get_state(), DataLoader(TensorDataset(X), 4, shuffle=True, generator=generator)
    make_model().predict(loader, verbose=0)
    assert torch.equal(generator.get_state(), state)
    list(make_model().predict_iter(loader))
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("part", ["net", "data"])
def test_what_is_drawn_at_random_is_drawn_as_predict_draws_it(part):
    model = make_model(Noisy() if part == "net" else None)
    data = {"x": X, "batch_size": 4} if part == "net" else {"x": DataLoader(Rows(), 4)}
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    whole = model.predict(**data, verbose=0)
    assert np.array_equal(join(model.predict_iter(**data)), whole)


def test_training_between_two_streamed_batches_is_as_without_them():
    y = X.sum(1, keepdim=True)
    nets = [nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, streams in zip(nets, (True, False), strict=True):
        model = make_model(net, loop="script")
        stream = model.predict_iter(X, batch_size=4) if streams else None
        torch.manual_seed(2)
        for _ in range(2):
            if stream is not None:
                next(stream)
            model.fit(X, y, batch_size=4, verbose=0)
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


def test_an_exception_in_forward_leaves_flags_and_random_state_alone():
    def fail(h, x):
        torch.rand(1)
        raise ZeroDivisionError

    model = make_model(Shaped(fail))
    model.net.train()
    state = random_state()
    with pytest.raises(ZeroDivisionError):
        next(model.predict_iter(X))
    assert model.net.training
    assert random_state() == state


def test_steps_must_be_counts_and_fewer_batches_than_asked_for_warn():
    with pytest.raises((ValueError, TypeError), match="steps"):
        next(make_model().predict_iter(X, steps=0))
    with pytest.warns(UserWarning, match=r"predict_iter\(\)'s data gave 3 batches, fewer than the 5 steps"):
        list(make_model().predict_iter(X, batch_size=4, steps=5))


# ---- memory ----

# VmHWM is the peak of this process alone; ru_maxrss may begin with that of the process that started it.
MEASURE = """
    import resource, sys
    import torch
    import kerastorch as kt

    def peak():
        if sys.platform == "linux":
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    class Batches:
        def __iter__(self):
            return (x[i : i + 1000] for i in range(0, len(x), 1000))

    torch.set_num_threads(1)
    x = torch.ones(100_500, 4)
    model = kt.Model(torch.nn.Linear(4, 400), device="cpu")
    model.predict(x[:2000], batch_size=1000, verbose=0)
    before = peak()
    predictions = model.predict(DATA, batch_size=BATCH_SIZE, verbose=0)
    assert predictions.shape == (100_500, 400)
    print(before, peak(), predictions.nbytes, 1000 * 400 * 4)
"""


@pytest.mark.parametrize("form", [pytest.param("arrays", marks=pytest.mark.slow), "an iterable of unknown length"])
def test_predict_takes_the_memory_of_its_result_and_one_batch(form):
    given = ("x", "1000") if form == "arrays" else ("Batches()", "None")
    code = textwrap.dedent(MEASURE).replace("DATA", given[0]).replace("BATCH_SIZE", given[1])
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    before, peak, result, batch = map(int, child.stdout.split())
    slack = 64 * 2**20
    assert result > 2 * slack  # so that a second copy would show
    assert before + result - slack < peak <= before + result + batch + slack
