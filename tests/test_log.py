"""self.log and run.log: a step's own numbers, averaged over samples, wherever the loss goes."""

import csv
import gc
import math
import types
import weakref

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kerastorch as kt
from kerastorch import progress
from kerastorch.callbacks import Callback, CSVLogger, EarlyStopping, ModelCheckpoint
from kerastorch.loops import function_loop as page
from kerastorch.sums import PassSums

ROWS, BATCH = 10, 4  # batches of 4, 4 and 2


def make_data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 3, generator=generator), torch.arange(ROWS) % 2


def logging_loop(**values):
    """A loop that logs, each step, name=function(loop, x)."""

    class Logging(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            self.log(**{name: value(self, x) for name, value in values.items()})
            return super().train_step(x, y, sample_weight)

    return Logging


def make_model(loop, metrics=None, loss="cross_entropy", net=None, **arguments):
    torch.manual_seed(0)
    model = kt.Model(net or nn.Linear(3, 2), device="cpu")
    model.compile(loss, "sgd", metrics, loop=loop, **arguments)
    return model


def fit(loop, epochs=1, callbacks=None, metrics=None, **arguments):
    model = make_model(loop, metrics)
    x, y = make_data()
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **arguments}
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **arguments)


def mean_of_x(loop, x):
    return x.mean()


# ---- what it is ----


def test_a_value_is_averaged_by_samples_the_short_last_batch_too():
    history = fit(logging_loop(mean=mean_of_x, first=lambda loop, x: float(x[0, 0]))).history
    x, _ = make_data()
    assert history["mean"] == [pytest.approx(x.mean().item(), rel=1e-6)]
    expected = (4 * x[0, 0] + 4 * x[4, 0] + 2 * x[8, 0]).item() / 10
    assert history["first"] == [pytest.approx(expected, rel=1e-6)]
    assert isinstance(history["first"][0], float)


def test_the_loss_logged_under_another_name_is_the_loss_to_the_bit():
    class Logging(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            loss, outputs = super().train_step(x, y, sample_weight)
            self.log(again=loss)
            return loss, outputs

        def eval_step(self, x, y, sample_weight):
            loss, outputs = super().eval_step(x, y, sample_weight)
            self.log(again=loss)
            return loss, outputs

    history = fit(Logging, epochs=3, validation_data=make_data(), shuffle=True).history
    assert history["again"] == history["loss"]
    assert history["val_again"] == history["val_loss"]


def test_the_function_form_logs_through_run():
    def train_step(run, x, y, sample_weight):
        run.log(mean=x.mean())
        return page.train_step(run, x, y, sample_weight)

    def eval_step(run, x, y, sample_weight):
        run.log(largest=x.max())
        return page.eval_step(run, x, y, sample_weight)

    loop = kt.FunctionLoop(train_step=train_step, eval_step=eval_step)
    by_function = fit(loop, validation_data=make_data()).history
    by_class = fit(logging_loop(mean=mean_of_x), validation_data=make_data()).history
    assert by_function["mean"] == by_class["mean"]
    assert list(by_function) == ["loss", "mean", "val_loss", "val_largest"]


@pytest.mark.parametrize(
    "value",
    [2, 2.0, True, np.float32(2), np.float64(2), np.array(2.0), torch.tensor(2), torch.tensor([[2.0]])]
    + [torch.tensor(2, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.uint8)],
    ids=repr,
)
def test_any_one_number_is_taken(value):
    assert fit(logging_loop(value=lambda loop, x: value)).history["value"] == [float(value)]


def test_nan_shows():
    assert math.isnan(fit(logging_loop(value=lambda loop, x: math.nan)).history["value"][0])


def test_epochs_do_not_mix():
    history = fit(logging_loop(epoch=lambda loop, x: loop.run.epoch), epochs=3).history
    assert history["epoch"] == [0.0, 1.0, 2.0]


def test_several_values_in_one_call_or_several():
    class Twice(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            self.log(a=1.0, b=2.0)
            self.log(c=3.0)
            return super().train_step(x, y, sample_weight)

    history = fit(Twice).history
    assert [history[name] for name in "abc"] == [[1.0], [2.0], [3.0]]


def test_a_name_logged_twice_in_a_step_is_the_mean_of_both():
    class Twice(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            for value in (1.0, 2.0):
                self.log(value=value)
            return super().train_step(x, y, sample_weight)

    assert fit(Twice).history["value"] == [1.5]


def test_a_value_logged_in_some_batches_is_averaged_over_those():
    class Some(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            if self.run.batch != 1:
                self.log(rows=float(len(x)))
            return super().train_step(x, y, sample_weight)

    assert fit(Some).history["rows"] == [pytest.approx((4 * 4 + 2 * 2) / 6)]


def test_a_value_logged_in_some_epochs_is_in_those_alone():
    class Some(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            if self.run.epoch == 1:
                self.log(value=5.0)
            return super().train_step(x, y, sample_weight)

    history = fit(Some, epochs=3)
    assert history.history["value"] == [5.0]
    assert len(history.history["loss"]) == 3
    assert history.to_pandas()["value"].isna().tolist() == [True, False, True]


def test_a_tensor_that_changes_later_was_read_when_it_was_logged():
    box = torch.zeros(())

    def count(loop, x):
        return box.add_(1)

    assert fit(logging_loop(count=count)).history["count"] == [pytest.approx((4 * 1 + 4 * 2 + 2 * 3) / 10)]


def test_what_is_logged_keeps_no_graph():
    class Mark:
        pass

    marks = []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark = Mark()  # lives as long as the graph
            marks.append(weakref.ref(ctx.mark))
            return x.clone()

    class Logging(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            assert all(mark() is None for mark in marks)
            value = Marked.apply(self.net(x).mean())
            assert marks[-1]() is not None
            self.log(value=value)
            return super().train_step(x, y, sample_weight)

    fit(Logging)
    gc.collect()
    assert [mark() for mark in marks] == [None] * 3


def test_logging_changes_no_weight():
    nets = []
    for loop in (logging_loop(mean=mean_of_x, one=lambda loop, x: 1.0), "class"):
        model = make_model(loop)
        model.fit(*make_data(), batch_size=BATCH, epochs=2, verbose=0)
        nets.append(model.net)
    assert torch.equal(nets[0].weight, nets[1].weight)


@pytest.mark.parametrize("value", [torch.tensor(2.0), 2.0], ids=["tensor", "float"])
def test_logging_reads_nothing_back(value):
    """No item() (a sync on a GPU) and, for a tensor that is there already, no copy to the device."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    sums = PassSums({}, torch.device("cpu"))
    with Watch():
        for _ in range(2):
            sums.log("value", value, 4)
    assert any("add_" in name for name in seen)
    assert not [name for name in seen if "_local_scalar_dense" in name or "nonzero" in name]


@pytest.mark.parametrize("kind", ["tensor", "float"])
def test_logging_copies_nothing_to_the_device(kind):
    """A copy from the CPU waits for the GPU; a plain number needs none. "meta" stands in for a GPU."""
    device = torch.device("meta")
    value = torch.zeros((), device=device) if kind == "tensor" else 2.0
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    sums = PassSums({}, device)
    with Watch():
        sums.log("value", value, 4)
    assert not [name for name in seen if "_to_copy" in name or "copy_" in name]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["tensor", "float"])
def test_logging_does_not_sync_on_a_gpu(kind):
    device = torch.device("cuda")
    sums = PassSums({}, device)
    value = torch.tensor(2.0, device=device) if kind == "tensor" else 2.0
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            sums.log("value", value, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- where it goes ----


def test_batch_hooks_see_the_running_average():
    seen = []

    class Reads(Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(dict(logs)["mean"])

    fit(logging_loop(mean=mean_of_x), callbacks=Reads())
    x, _ = make_data()
    assert seen == pytest.approx([x[:n].mean().item() for n in (4, 8, 10)], rel=1e-5)


def test_test_batch_hooks_see_the_running_average_of_eval_step():
    seen = []

    class Reads(Callback):
        def on_test_batch_end(self, batch, logs=None):
            seen.append(logs["rows"])

        def on_test_end(self, logs=None):
            seen.append(logs["rows"])

    class Logging(kt.ClassLoop):
        def eval_step(self, x, y, sample_weight):
            self.log(rows=len(x))
            return super().eval_step(x, y, sample_weight)

    model = make_model(Logging)
    results = model.evaluate(*make_data(), batch_size=BATCH, callbacks=Reads(), verbose=0)
    assert seen == pytest.approx([4, 4, 3.6, 3.6])
    assert results == {"loss": results["loss"], "rows": pytest.approx(3.6)}
    assert fit(Logging, validation_data=make_data()).history["val_rows"] == [pytest.approx(3.6)]


def test_one_name_in_both_steps_is_kept_apart():
    class Logging(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            self.log(value=1.0)
            return super().train_step(x, y, sample_weight)

        def eval_step(self, x, y, sample_weight):
            self.log(value=2.0)
            return super().eval_step(x, y, sample_weight)

    history = fit(Logging, epochs=2, validation_data=make_data()).history
    assert (history["value"], history["val_value"]) == ([1.0, 1.0], [2.0, 2.0])


def test_single_batches_give_it_too():
    model = make_model(logging_loop(mean=mean_of_x))
    x, y = make_data()
    assert model.train_on_batch(x, y)["mean"] == pytest.approx(x.mean().item(), rel=1e-5)


def test_it_stands_behind_loss_and_metrics_in_logs_file_and_line(tmp_path, capsys):
    path = tmp_path / "log.csv"
    history = fit(logging_loop(mean=mean_of_x), callbacks=CSVLogger(path), metrics=["accuracy"], verbose=2)
    assert list(history.history) == ["loss", "accuracy", "mean"]
    with open(path, newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["mean"]) == pytest.approx(history.history["mean"][0])
    assert f" - mean: {history.history['mean'][0]:.4f}" in capsys.readouterr().out


def test_the_bar_shows_it(monkeypatch):
    shown = []

    class Bar:
        n = 0

        def __init__(self, **options):
            pass

        def set_postfix_str(self, text, refresh):
            shown.append(text)

        def update(self, n):
            self.n += n

        def clear(self):
            pass

        def close(self):
            pass

    monkeypatch.setattr(progress, "_is_interactive", lambda: True)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_tqdm", lambda: Bar)
    fit(logging_loop(four=lambda loop, x: 4.0), verbose=1)
    assert len(shown) == 3
    assert all("four: 4.0000" in text for text in shown)


def test_early_stopping_goes_by_it():
    values = [3.0, 2.0, 1.0, 2.0, 3.0, 4.0]

    def value(loop, x):
        return values[loop.run.epoch]

    stop = EarlyStopping("value", mode="min", patience=2)
    assert fit(logging_loop(value=value), epochs=6, callbacks=stop).history["value"] == [3.0, 2.0, 1.0, 2.0, 3.0]


def test_early_stopping_by_a_validation_value():
    class Logging(kt.ClassLoop):
        def eval_step(self, x, y, sample_weight):
            self.log(worse=self.run.epoch)
            return super().eval_step(x, y, sample_weight)

    stop = EarlyStopping("val_worse", mode="min", patience=1)
    assert fit(Logging, epochs=9, callbacks=stop, validation_data=make_data()).epoch == [0, 1]


def test_a_monitor_that_is_never_logged_is_told_with_the_names_that_are():
    with pytest.raises(ValueError, match=r"did you mean 'value'.* Known: loss, value"):
        fit(logging_loop(value=lambda loop, x: 1.0), callbacks=EarlyStopping("valeu", mode="min"))


# ---- resumed ----


class Death(Exception):
    pass


class Dies(Callback):
    def __init__(self, epoch, batch):
        self.place = (epoch, batch)

    def on_train_batch_end(self, batch, logs=None):
        if (self.run.epoch, batch) == self.place:
            raise Death


@pytest.mark.parametrize("place", [(1, 1), (1, 2), (2, 0)])
def test_a_run_resumed_inside_an_epoch_has_the_same_values(place, tmp_path):
    class Logging(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            self.log(mean=x.mean(), noise=torch.rand(()))
            if self.run.batch == 0:
                self.log(first=x[0, 0])  # the second life of this epoch does not log it again
            return super().train_step(x, y, sample_weight)

        def eval_step(self, x, y, sample_weight):
            self.log(mean=x.mean())
            return super().eval_step(x, y, sample_weight)

    def live(*callbacks, seed=3, **arguments):
        torch.manual_seed(seed)
        return fit(
            Logging, epochs=4, shuffle=True, validation_data=make_data(), callbacks=[*callbacks], **arguments
        ).history

    straight = live()

    def saver():
        return ModelCheckpoint(tmp_path / "run.pt", save_freq=1)

    with pytest.raises(Death):
        live(saver(), Dies(*place))
    assert live(saver(), seed=99, resume=True) == straight


def test_a_checkpoint_without_logged_sums_still_opens(tmp_path):
    """As one that was written inside an epoch before there was log()."""
    saver = ModelCheckpoint(tmp_path / "run.pt", save_freq=1)
    model = make_model("class")
    with pytest.raises(Death):
        model.fit(*make_data(), batch_size=BATCH, callbacks=[saver, Dies(0, 2)], verbose=0)
    sums = torch.load(tmp_path / "run.pt", weights_only=True)["run"]["sums"]
    assert sums.pop("logged") == {}
    PassSums({}, torch.device("cpu")).load_state_dict(sums)


# ---- what is refused ----


@pytest.mark.parametrize(
    "value",
    [torch.zeros(3), torch.zeros(2, 2), np.zeros(3), [1.0, 2.0], torch.zeros(0)],
    ids=repr,
)
def test_several_numbers_are_refused_with_their_shape(value):
    with pytest.raises(ValueError, match=r"log\(many=\.\.\.\) takes one number, got shape \(.*\): log its mean"):
        fit(logging_loop(many=lambda loop, x: value))


@pytest.mark.parametrize(
    "value", [None, "good", {"a": 1.0}, object(), torch.tensor(1j)], ids=lambda v: type(v).__name__
)
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises((TypeError, ValueError), match=r"log\(what=\.\.\.\)"):
        fit(logging_loop(what=lambda loop, x: value))


@pytest.mark.parametrize("name", ["loss", "accuracy", "f1_macro"])
def test_the_name_of_loss_or_metric_is_refused_at_the_first_step(name):
    with pytest.raises(ValueError, match=f"the logs have a '{name}' already; log it under another name"):
        fit(logging_loop(**{name: mean_of_x}), metrics=["accuracy", "f1_macro"])


def test_the_name_of_a_weighted_metric_is_refused():
    model = make_model(logging_loop(weighted_accuracy=mean_of_x), ["accuracy"], weighted_metrics=["accuracy"])
    x, y = make_data()
    with pytest.raises(ValueError, match="'weighted_accuracy' already"):
        model.fit(x, y, sample_weight=torch.ones(ROWS), verbose=0)


def test_the_name_of_an_outputs_loss_is_refused_at_the_first_step():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return {"a": self.a(x), "b": self.b(x)}

    model = make_model(logging_loop(a_loss=lambda loop, x: 99.0), loss={"a": "mse", "b": "mse"}, net=Two())
    x, _ = make_data()
    y = {"a": torch.zeros(ROWS, 1), "b": torch.zeros(ROWS, 1)}
    with pytest.raises(ValueError, match="'a_loss' already"):
        model.fit(x, y, batch_size=ROWS, verbose=0)  # a single batch


def test_the_name_of_a_collections_result_is_refused():
    metrics = torchmetrics.MetricCollection({"hits": torchmetrics.Accuracy("multiclass", num_classes=2)})
    with pytest.raises(ValueError, match="'hits' already"):
        fit(logging_loop(hits=lambda loop, x: 99.0), metrics=[metrics])


def test_a_training_value_does_not_hide_behind_a_validation_value():
    """log(val_loss=...) in train_step would be overwritten by the validation's val_loss, or pass for it."""
    with pytest.raises(ValueError, match="val_loss"):
        fit(logging_loop(val_loss=lambda loop, x: 99.0), validation_data=make_data())


def test_a_refused_name_leaves_the_loop_usable():
    model = make_model(logging_loop(loss=mean_of_x))
    with pytest.raises(ValueError, match="already"):
        model.fit(*make_data(), verbose=0)
    model.compile("cross_entropy", "sgd", loop=logging_loop(mean=mean_of_x))
    assert list(model.fit(*make_data(), verbose=0).history) == ["loss", "mean"]


def test_log_outside_a_call_is_told():
    with pytest.raises((RuntimeError, AttributeError), match="run"):
        kt.ClassLoop().log(value=1.0)


def test_log_in_predict_step_is_told_or_does_no_harm():
    class Logging(kt.ClassLoop):
        def predict_step(self, x):
            self.log(value=1.0)
            return super().predict_step(x)

    model = make_model(Logging)
    x, y = make_data()
    try:
        outputs = model.predict(x, verbose=0)
    except (RuntimeError, ValueError) as error:
        assert "predict" in str(error)  # noqa: PT017 - either is right
        return
    assert isinstance(outputs, np.ndarray)
    assert list(model.fit(x, y, verbose=0).history) == ["loss"]


def test_names_may_be_any_keyword():
    loop = logging_loop(**{"critic/real": lambda loop, x: 1.0, "self_": lambda loop, x: 2.0})
    assert set(fit(loop).history) == {"loss", "critic/real", "self_"}
    assert isinstance(kt.Run.log, types.FunctionType)
