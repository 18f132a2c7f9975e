"""A step that the loop could not call is refused at compile, with what it should take; one that it can call is not."""

import functools
import re

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.loops import _STEPS as STEPS
from kerastorch.loops import function_loop as page


def compile_with(loop):
    model = kt.Model(nn.Linear(4, 3), device="cpu")
    model.compile("cross_entropy", "sgd", loop=loop)
    return model


def own(name, function, base=kt.ClassLoop):
    return type("Own", (base,), {name: function})


def live(loop):
    """Go through all three verbs, so that every step is called."""
    model = compile_with(loop)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    model.fit(x, y, validation_data=(x, y), verbose=0)
    model.evaluate(x, y, verbose=0)
    return model.predict(x, verbose=0)


# ---- wrong ones ----

WRONG_STEPS = {
    "a batch, as in Keras": (lambda self, data: None, "(data)"),
    "batch and index, as in Lightning": (lambda self, batch, batch_idx: None, "(batch, batch_idx)"),
    "x and y alone": (lambda self, x, y: None, "(x, y)"),
    "run beside self": (lambda self, run, x, y, sample_weight: None, "(run, x, y, sample_weight)"),
    "self forgotten": (lambda x, y, sample_weight: None, "(y, sample_weight)"),
    "nothing": (lambda self: None, "()"),
    "a keyword that has no default": (
        lambda self, x, y, sample_weight, *, scale: None,
        "(x, y, sample_weight, *, scale)",
    ),
    "keywords alone": (lambda self, *, x, y, sample_weight: None, "(*, x, y, sample_weight)"),
    "keyword dict alone": (lambda self, **batch: None, "(**batch)"),
    "a staticmethod with self": (staticmethod(lambda self, x, y, sample_weight: None), "(self, x, y, sample_weight)"),
}


@pytest.mark.parametrize("form", ["class", "instance"])
@pytest.mark.parametrize("name", ["train_step", "eval_step"])
@pytest.mark.parametrize("case", WRONG_STEPS)
def test_a_method_of_another_signature_is_refused(case, name, form):
    function, taken = WRONG_STEPS[case]
    loop = own(name, function)
    expected = f"Own calls {name}(x, y, sample_weight), but its {name} takes {taken}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        compile_with(loop if form == "class" else loop())


WRONG_RUNGS = {
    "fit": (lambda self: None, "fit(run)"),
    "evaluate": (lambda self, run, eval_step: None, "evaluate(run)"),
    "predict": (lambda self: None, "predict(run)"),
    "train_epoch": (lambda self, run: None, "train_epoch()"),
    "predict_step": (lambda self, x, y: None, "predict_step(x)"),
}


@pytest.mark.parametrize("name", WRONG_RUNGS)
def test_another_rung_of_another_signature_is_refused(name):
    function, expected = WRONG_RUNGS[name]
    with pytest.raises(TypeError, match=re.escape(f"Own calls {expected}, but its {name} takes")):
        compile_with(own(name, function))


def test_every_step_is_in_the_table():
    methods = {name for name in vars(kt.ClassLoop) if not name.startswith("_")}
    assert methods == set(STEPS)


WRONG_FUNCTIONS = {
    "train_step": (lambda x, y, sample_weight: None, "train_step(run, x, y, sample_weight)"),
    "eval_step": (lambda run, x, y: None, "eval_step(run, x, y, sample_weight)"),
    "predict_step": (lambda x: None, "predict_step(run, x)"),
}


@pytest.mark.parametrize("name", WRONG_FUNCTIONS)
def test_a_function_of_another_signature_is_refused(name):
    function, expected = WRONG_FUNCTIONS[name]
    with pytest.raises(TypeError, match=re.escape(f"FunctionLoop calls {expected}, but its {name} takes")):
        compile_with(kt.FunctionLoop(**{name: function}))


@pytest.mark.parametrize("name", WRONG_FUNCTIONS)
@pytest.mark.parametrize("value", ["train_step", 3, None, (1, 2)], ids=repr)
def test_what_is_no_function_is_refused(name, value):
    expected = WRONG_FUNCTIONS[name][1]
    with pytest.raises(
        TypeError, match=re.escape(f"FunctionLoop.{name} must be a function, {expected}, got {value!r}")
    ):
        compile_with(kt.FunctionLoop(**{name: value}))


@pytest.mark.parametrize("name", STEPS)
def test_an_attribute_that_is_no_method_is_refused(name):
    with pytest.raises(TypeError, match=rf"Own\.{name} must be a function"):
        compile_with(own(name, 3))


def test_a_partial_that_binds_too_much_is_refused():
    step = functools.partial(page.train_step, None)
    with pytest.raises(TypeError, match=r"calls train_step\(run, x, y, sample_weight\)"):
        compile_with(kt.FunctionLoop(train_step=step))


def test_a_callable_object_of_another_signature_is_refused():
    class Step:
        def __call__(self, x, y):
            pass

    with pytest.raises(TypeError, match=r"its train_step takes \(x, y\)"):
        compile_with(kt.FunctionLoop(train_step=Step()))


def test_a_refused_loop_leaves_the_model_as_it_was():
    model = compile_with("class")
    before = model.optimizer
    with pytest.raises(TypeError):
        model.compile("cross_entropy", "adam", loop=own("train_step", lambda self, data: None))
    assert model.optimizer is before
    model.fit(torch.randn(6, 4), torch.arange(6) % 3, verbose=0)


def test_a_step_of_a_loop_that_has_none_is_refused():
    for base in (kt.ScriptLoop, kt.FunctionLoop):
        with pytest.raises(TypeError, match=rf"Own\.train_epoch is never called: a {base.__name__} has none"):
            compile_with(own("train_epoch", lambda self: None, base))
    with pytest.raises(TypeError, match=r"Own\.train_step is never called: a ScriptLoop has none; subclass ClassLoop"):
        compile_with(own("train_step", plain, kt.ScriptLoop))
    with pytest.raises(TypeError, match=r"a FunctionLoop takes functions, train_step=f"):
        compile_with(type("Below", (own("train_step", plain, kt.FunctionLoop),), {}))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("training_step", "train_step"), ("validation_step", "eval_step"), ("test_step", "eval_step")],
)
def test_a_step_under_another_librarys_name_is_refused_with_ours(name, meant):
    with pytest.raises(TypeError, match=rf"Own\.{name} is never called: call it {meant}"):
        compile_with(own(name, plain))


def test_a_script_loop_with_a_fit_of_its_own_may_call_its_steps():
    class Own(kt.ScriptLoop):
        def fit(self, run):
            for _ in run.epoch_range():
                for x, y, _ in run.train_batches():
                    run.record(*self.train_step(x, y), y)

        def train_step(self, x, y):
            outputs = self.net(x)
            return self.loss_fn(outputs, y), outputs

    live(Own)


# ---- wrong returns ----

WRONG_RETURNS = {
    "the loss alone": (lambda loss, outputs: loss, "must return (loss, outputs), got the loss alone"),
    "nothing": (lambda loss, outputs: None, "must return (loss, outputs), got None"),
    "a dict": (lambda loss, outputs: {"loss": loss, "outputs": outputs}, "must return (loss, outputs), got dict"),
    "three": (lambda loss, outputs: (loss, outputs, 0), "must return (loss, outputs), got tuple"),
    "no outputs": (lambda loss, outputs: (loss, None), "outputs is None, but the metrics (accuracy) read them"),
}


@pytest.mark.parametrize("style", ["class", "function"])
@pytest.mark.parametrize("name", ["train_step", "eval_step"])
@pytest.mark.parametrize("case", WRONG_RETURNS)
def test_a_step_that_returns_something_else_is_told(case, name, style):
    returned, message = WRONG_RETURNS[case]
    if style == "class":
        loop = own(name, lambda self, x, y, w: returned(*getattr(kt.ClassLoop, name)(self, x, y, w)))
    else:
        loop = kt.FunctionLoop(**{name: lambda run, x, y, w: returned(*getattr(page, name)(run, x, y, w))})
    model = kt.Model(nn.Linear(4, 3), device="cpu")
    model.compile("cross_entropy", "sgd", ["accuracy"], loop=loop)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(TypeError, match=re.escape(message)):
        model.fit(x, y, validation_data=(x, y), verbose=0)


def test_a_predict_step_without_outputs_is_told():
    model = compile_with(own("predict_step", lambda self, x: None))
    with pytest.raises(TypeError, match="predict_step must return the outputs"):
        model.predict(torch.randn(6, 4), verbose=0)


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("fit", lambda self, run: None, "trained no epoch"),
        ("train_epoch", lambda self: None, "recorded no training batch"),
        ("evaluate", lambda self, run: None, "recorded nothing"),
    ],
)
def test_a_rung_that_does_nothing_is_told(name, function, message):
    with pytest.raises(RuntimeError, match=message):
        live(own(name, function))


# ---- right ones ----


def plain(self, x, y, sample_weight):
    return kt.ClassLoop.train_step(self, x, y, sample_weight)


def with_default(self, x, y, sample_weight=None, scale=1.0):
    return kt.ClassLoop.train_step(self, x, y, sample_weight)


def with_other_names(self, inputs, targets, weights, /):
    return kt.ClassLoop.train_step(self, inputs, targets, weights)


def with_star(self, *batch):
    return kt.ClassLoop.train_step(self, *batch)


def with_star_after(self, x, *rest, **options):
    return kt.ClassLoop.train_step(self, x, *rest)


def with_keyword_default(self, x, y, sample_weight, *, scale=1.0):
    return kt.ClassLoop.train_step(self, x, y, sample_weight)


@functools.wraps(plain)
def wrapped(*arguments):
    return plain(*arguments)


def through_static(x, y, sample_weight):
    loss = torch.zeros((), requires_grad=True)
    return loss, torch.zeros(len(x), 3)


METHODS = {
    "plain": plain,
    "defaults": with_default,
    "other names": with_other_names,
    "*batch": with_star,
    "x, *rest, **options": with_star_after,
    "keyword with default": with_keyword_default,
    "wrapped": wrapped,
    "no_grad": torch.enable_grad()(plain),
    "lambda": lambda self, x, y, w: plain(self, x, y, w),
    "partialmethod": functools.partialmethod(with_keyword_default, scale=2.0),
    "staticmethod": staticmethod(through_static),
    "classmethod": classmethod(lambda cls, x, y, w: through_static(x, y, w)),
}


@pytest.mark.parametrize("case", METHODS)
def test_a_method_that_can_be_called_is_accepted_and_called(case):
    assert live(own("train_step", METHODS[case])).shape == (6, 3)


class Step:
    calls = 0

    def __call__(self, run, x, y, sample_weight=None):
        self.calls += 1
        return page.train_step(run, x, y, sample_weight)

    def method(self, run, x, y, sample_weight):
        return self(run, x, y, sample_weight)


def scaled(scale, run, x, y, sample_weight, *, shift=0.0):
    loss, outputs = page.train_step(run, x, y, sample_weight)
    return loss * scale + shift, outputs


def by_keyword(run, x, y, sample_weight, *, scale):
    return scaled(scale, run, x, y, sample_weight)


FUNCTIONS = {
    "function": page.train_step,
    "defaults": lambda run, x, y=None, sample_weight=None: page.train_step(run, x, y, sample_weight),
    "*arguments": lambda *arguments: page.train_step(*arguments),
    "run, *batch": lambda run, *batch, **options: page.train_step(run, *batch),
    "partial": functools.partial(scaled, 2.0),
    "partial by keyword": functools.partial(by_keyword, scale=2.0),
    "callable object": Step(),
    "bound method": Step().method,
    "decorated": torch.enable_grad()(page.train_step),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_that_can_be_called_is_accepted_and_called(case):
    assert live(kt.FunctionLoop(train_step=FUNCTIONS[case])).shape == (6, 3)


def test_functions_may_be_given_by_position():
    live(kt.FunctionLoop(page.train_step, page.eval_step, page.predict_step))


def test_a_step_set_on_an_object_of_the_class_form_takes_no_run():
    loop = kt.ClassLoop()
    loop.train_step = lambda x, y, sample_weight: through_static(x, y, sample_weight)
    live(loop)
    loop.train_step = page.train_step
    with pytest.raises(TypeError, match=r"ClassLoop calls train_step\(x, y, sample_weight\)"):
        compile_with(loop)


def test_a_loop_from_nothing_may_have_steps_of_its_own_in_helper_names():
    class Own(kt.Loop):
        def fit(self, run, *, verbose=False):
            for _ in run.epoch_range():
                for batch in run.train_batches():
                    self.one_batch(run, batch)

        def one_batch(self, run, batch):
            x, y, _ = batch
            outputs = run.net(x)
            run.record(run.loss_fn(outputs, y), outputs, y)

        def evaluate(self, run):
            for x, y, _ in run.eval_batches():
                outputs = run.net(x)
                run.record(run.loss_fn(outputs, y), outputs, y)

        def predict(self, run):
            for x in run.predict_batches():
                run.collect(run.net(x).detach())

    live(Own())


def test_a_loop_from_nothing_may_call_its_own_steps_as_it_likes():
    """The table is of what ClassLoop and FunctionLoop call; a Loop's own train_step is called by its own fit."""

    class Own(kt.Loop):
        def fit(self, run):
            for _ in run.epoch_range():
                for batch in run.train_batches():
                    run.record(*self.train_step(run, batch))

        def train_step(self, run, batch):
            x, y, _ = batch
            outputs = run.net(x)
            return run.loss_fn(outputs, y), outputs, y

        def evaluate(self, run):
            for x, y, _ in run.eval_batches():
                outputs = run.net(x)
                run.record(run.loss_fn(outputs, y), outputs, y)

        def predict(self, run):
            for x in run.predict_batches():
                run.collect(run.net(x).detach())

    live(Own())


def test_a_method_of_a_function_loop_is_what_trains():
    """FunctionLoop.__init__ sets the steps on the object, which must not hide those of a subclass in silence."""
    calls = []

    class Own(kt.FunctionLoop):
        def train_step(self, run, x, y, sample_weight):
            calls.append(len(x))
            return page.train_step(run, x, y, sample_weight)

    try:
        live(Own)
    except TypeError:
        return  # refused is as good
    assert calls == [6]
