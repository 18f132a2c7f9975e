"""The loops of notebooks/04_own_loops.ipynb, run from its own cells: what they learn, and that all else works.

The cells are the one source; nothing of them is repeated here.
"""

import copy
import json
import linecache
import math
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from kerastorch.loops import make_loop

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "04_own_loops.ipynb"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def code_cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source_of(name):
    """The one cell that defines the loop of this name."""
    (source,) = [cell for cell in code_cells() if f"class {name}(" in cell or f"def {name}(" in cell]
    return source


def run_cell(name, *, instead=("", ""), until=None):
    """Run the notebook's first cell and the case's own; return the names they made.

    instead: (a part of the case's source, what to put in its place).   until: run the case up to this text.
    """
    names: dict[str, Any] = {"__name__": "notebook"}
    exec(code_cells()[0], names)
    old, new = instead
    source = source_of(name)
    assert old in source
    source = source.replace(old, new, 1).partition(until or "\0")[0]
    file = f"<cell of {name}>"  # in the cache, where a notebook's cells are too
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)
    return names


CASES = ["GAN", "Contrastive", "Distillation", "TruncatedBPTT", "mixup_step", "Poisson", "lbfgs_step", "PlainLoop"]


def test_each_case_is_one_short_cell():
    for name in CASES:
        lines = [line for line in source_of(name).splitlines() if line.strip()]
        assert len(lines) < 40, (name, len(lines))


# ---- what they learn ----


def gan_figures(names):
    """Share of samples within three standard deviations of a mode, and the smallest mode's share."""
    distance, mode = torch.cdist(names["samples"], names["modes"]).min(1)
    near = distance < 3 * 0.15
    counts = mode[near].bincount(minlength=8)
    return near.float().mean().item(), counts.min().item() / len(distance)


@pytest.mark.slow
def test_the_gan_covers_every_mode_and_stays_near_them():
    names = run_cell("GAN")
    near, smallest = gan_figures(names)
    assert near > 0.8
    assert smallest > 0.05  # an even share is 0.125
    history = names["gan_history"].history
    assert list(history) == ["loss", "d_loss", "penalty"]
    assert history["d_loss"][-1] == pytest.approx(2 * math.log(2), rel=0.05)  # it can't tell them apart any more
    rates = [group["lr"] for group in names["gan"].optimizer.param_groups]
    assert rates == pytest.approx([5e-5, 5e-5])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize(
    "instead",
    [
        ('        self.optimizer["discriminator"].step()\n', ""),
        ('        self.optimizer["generator"].step()\n', ""),
        (
            "g_loss = self.loss_fn(discriminator(fake), real_label)",
            "g_loss = self.loss_fn(discriminator(fake), fake_label)",
        ),
        ("fake.detach()", "x.detach()"),
    ],
    ids=["discriminator stands still", "generator stands still", "generator helps", "real as fake"],
)
def test_a_gan_with_a_wrong_step_misses_the_figures(instead):
    near, smallest = gan_figures(run_cell("GAN", instead=instead))
    assert near < 0.6 or smallest < 0.02


def test_contrastive_learning_separates_the_classes():
    names = run_cell("Contrastive")
    assert names["accuracy_before"] < 0.5
    assert names["accuracy_after"] > 0.75
    found = names["contrastive_history"].history["found"]
    assert found[-1] > 3 * found[0]


@pytest.mark.slow
def test_contrastive_learning_with_wrong_partners_separates_nothing():
    names = run_cell("Contrastive", instead=(".roll(len(x))", ".roll(1)"))
    assert names["accuracy_after"] < 0.6


@pytest.mark.slow
def test_the_student_agrees_with_a_teacher_that_stays_as_it_was():
    names = run_cell("Distillation")
    student, history = names["student"], names["student_history"].history
    results = student.evaluate(names["x_test"], names["y_test"], verbose=0)
    assert results["accuracy"] > 0.9
    assert results["agreement"] > 0.93
    assert results["agreement"] == pytest.approx(max(history["val_agreement"]), abs=1e-6)  # the best weights are back
    for name, value in names["teacher_before"].items():
        assert torch.equal(names["teacher"].state_dict()[name], value), name
    held = {id(parameter) for group in student.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in student.net.parameters()}
    assert held.isdisjoint(map(id, names["teacher"].parameters()))
    assert all(parameter.grad is None for parameter in names["teacher"].parameters())
    assert not names["teacher"].training


@pytest.mark.slow
def test_a_student_that_is_not_told_learns_nothing():
    names = run_cell("Distillation", instead=("loss = 16 *", "loss = 0 *"))
    assert names["student"].evaluate(names["x_test"], names["y_test"], verbose=0)["accuracy"] < 0.5


@pytest.mark.slow
def test_truncated_bptt_remembers_over_chunks():
    names = run_cell("TruncatedBPTT")
    assert names["latch_accuracy"] > 0.98
    assert names["latch_history"].history["val_loss"][-1] < 0.1


@pytest.mark.slow
def test_bptt_that_forgets_between_chunks_misses_the_figure():
    names = run_cell("TruncatedBPTT", instead=("hidden = hidden.detach()", "hidden = None"))
    assert names["latch_history"].history["loss"][-1] > 0.15  # impulses are rare: many chunks hold none
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        run_cell("TruncatedBPTT", instead=("hidden = hidden.detach()", "pass"))


def test_mixup_is_the_loop_written_by_hand_to_the_bit():
    names = run_cell("mixup_step")
    assert names["mixed"].evaluate(names["x_test"], names["y_test"], verbose=0)["accuracy"] > 0.92
    shares = names["mixed_history"].history["share"]
    assert all(0 < share < 1 for share in shares)
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.1)  # of a symmetric Beta

    x, y = names["x_train"][:100], names["y_train"][:100]
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    model = kt.Model(nets[0], device="cpu")
    model.compile("cross_entropy", "adam", loop=kt.FunctionLoop(train_step=names["mixup_step"]))
    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(x, y), 32)  # which draws a number of its own an epoch
    history = model.fit(loader, epochs=2, verbose=0).history

    optimizer = torch.optim.Adam(nets[1].parameters(), fused=True)
    torch.manual_seed(1)
    by_hand = {"loss": [], "share": []}
    for _ in range(2):
        losses, shares = 0.0, 0.0
        for x_batch, y_batch in loader:
            share = torch.distributions.Beta(0.4, 0.4).sample().item()
            other = torch.randperm(len(x_batch))
            outputs = nets[1](share * x_batch + (1 - share) * x_batch[other])
            loss = share * F.cross_entropy(outputs, y_batch) + (1 - share) * F.cross_entropy(outputs, y_batch[other])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses, shares = losses + loss.item() * len(x_batch), shares + share * len(x_batch)
        by_hand["loss"].append(losses / 100)
        by_hand["share"].append(shares / 100)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert history["loss"] == pytest.approx(by_hand["loss"], rel=1e-9)
    assert history["share"] == pytest.approx(by_hand["share"], rel=1e-9)


def test_the_equation_is_solved():
    names = run_cell("Poisson")
    assert names["largest_error"] < 0.005
    history = names["solution_history"].history
    assert history["loss"][-1] == pytest.approx(history["equation"][-1] + 100 * history["boundary"][-1], rel=1e-5)
    assert history["val_loss"][-1] < 0.1  # from eval_step, with gradients on
    assert all(parameter.grad is None for parameter in names["solution"].net.parameters())  # eval_step left none


@pytest.mark.slow
def test_another_equation_has_another_solution():
    names = run_cell("Poisson", instead=("curvature + math.pi", "curvature - math.pi"))
    assert names["largest_error"] > 1


def test_lbfgs_finds_the_least_squares_solution():
    names = run_cell("lbfgs_step")
    values = torch.cat([names["values"], torch.ones(len(names["values"]), 1)], 1).double()
    target = names["brightness"].double()
    best = torch.linalg.lstsq(values, target, driver="gelsd").solution
    smallest = (values @ best - target).square().mean().item()
    history = names["regression_history"].history
    assert history["loss"][0] > 10 * smallest
    assert history["loss"][-1] == pytest.approx(smallest, rel=1e-3)


@pytest.mark.parametrize("loop", ["script", "function", "class"])
def test_lbfgs_is_refused_by_the_built_in_steps(loop):
    model = kt.Model(nn.Linear(3, 1), device="cpu")
    with pytest.raises(ValueError, match=r"optimizer\.step\(closure\) in train_step"):
        model.compile("mse", "lbfgs", loop=loop)


def test_the_loop_from_nothing_gives_the_weights_of_the_built_in_ones():
    names = run_cell("PlainLoop")
    plain, built_in = names["plain"], names["built_in"]
    for name, value in built_in.net.state_dict().items():
        assert torch.equal(plain.net.state_dict()[name], value), name
    assert plain.history.history == built_in.history.history
    x, y = names["x_test"], names["y_test"]
    assert plain.evaluate(x, y, verbose=0) == built_in.evaluate(x, y, verbose=0)
    assert (plain.predict(x, verbose=0) == built_in.predict(x, verbose=0)).all()


# ---- the rest stays: checkpoints, resume, metrics, callbacks, bar ----


class Death(Exception):
    """What ends a run in the midst of an epoch."""


class Dies(Callback):
    """Raises at the end of the count-th training batch, before that step's checkpoint."""

    def __init__(self, count):
        self.count = count

    def on_train_batch_end(self, batch, logs=None):
        self.count -= 1
        if self.count == 0:
            raise Death


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)


def small(name, names):
    """A small job for the notebook's loop: (net, compile's arguments, x, y). 40 rows, dropout wherever it can be."""
    torch.manual_seed(5)
    x = torch.rand(40, 6)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    y = torch.arange(40) % 3
    if name == "GAN":
        net = nn.ModuleDict(
            {"generator": nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 6)), "discriminator": body[:3]}
        )
        net["discriminator"].append(nn.Linear(8, 1))
        optimizers = {"generator": "adam", "discriminator": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)}
        schedulers = {"generator": step_lr, "discriminator": step_lr}
        arguments = {"optimizer": optimizers, "lr_scheduler": schedulers, "lr_scheduler_interval": "step"}
        return net, {"loss": "bce_with_logits", "loop": names["GAN"], **arguments}, x, None
    if name == "Contrastive":
        return body, {"loss": "cross_entropy", "optimizer": "adam", "loop": names["Contrastive"]}, x, None
    if name == "Distillation":
        loop = names["Distillation"](copy.deepcopy(body))
        return body, {"loss": "cross_entropy", "optimizer": "adam", "metrics": ["accuracy"], "loop": loop}, x, y
    if name == "TruncatedBPTT":
        x, y = torch.randn(40, 50, 1), torch.randint(2, (40, 50, 1)).float()
        return names["Latch"](), {"loss": "bce_with_logits", "optimizer": "adam", "loop": names[name]}, x, y
    if name == "mixup_step":
        loop = kt.FunctionLoop(train_step=names[name])
        return body, {"loss": "cross_entropy", "optimizer": "adam", "metrics": ["accuracy"], "loop": loop}, x, y
    if name == "Poisson":
        net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
        return net, {"loss": "mse", "optimizer": "adam", "loop": names[name]}, x[:, :1], None
    if name == "lbfgs_step":
        loop = kt.FunctionLoop(train_step=names[name])
        body[2].p = 0.0  # it needs the same loss from the same weights
        lbfgs = lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, history_size=4)  # noqa: E731
        return body, {"loss": "cross_entropy", "optimizer": lbfgs, "metrics": ["accuracy"], "loop": loop}, x, y
    arguments = {"lr_scheduler": step_lr, "lr_scheduler_interval": "step", "metrics": ["accuracy"]}
    return body, {"loss": "cross_entropy", "optimizer": "adam", "loop": names[name], **arguments}, x, y


FIT_BEGINS = {  # where the part of the cell ends that only defines the loop
    "Distillation": "\nkt.set_seed",
    "PlainLoop": "\nfirst = ",
}


def make_small(name):
    names = run_cell(name, until=FIT_BEGINS.get(name, "\nkt.set_seed"))
    net, arguments, x, y = small(name, names)
    model = kt.Model(net, device="cpu")
    model.compile(**arguments)
    return model, x, y


def fit_small(name, callbacks, seed=0, **arguments):
    model, x, y = make_small(name)
    torch.manual_seed(seed)
    model.fit(x, y, batch_size=16, epochs=4, callbacks=callbacks, verbose=0, **arguments)
    return model


def same(one, other):
    """Whether two nested values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("save_freq", [1, *(pytest.param(freq, marks=pytest.mark.slow) for freq in (2, "epoch"))])
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_died_inside_an_epoch_goes_on_to_the_bit(name, save_freq, tmp_path):
    straight = fit_small(name, [])

    def saver():
        return ModelCheckpoint(tmp_path / "{epoch}.pt", save_freq=save_freq)

    with pytest.raises(Death):
        fit_small(name, [saver(), Dies(8)])  # in the third of four epochs, three batches each
    resumed = fit_small(name, [saver()], seed=99, resume=True)
    for key, value in straight.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[key], value), key
    assert same(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    assert resumed.history.history == straight.history.history
    assert resumed.history.epoch == straight.history.epoch == [0, 1, 2, 3]
    scheduler = straight._compiled.lr_scheduler
    if scheduler is not None:
        assert resumed._compiled.lr_scheduler.state_dict() == scheduler.state_dict()


@pytest.mark.parametrize("name", CASES)
def test_training_moves_every_weight(name):
    model, x, y = make_small(name)
    before = copy.deepcopy(dict(model.net.named_parameters()))
    model.fit(x, y, batch_size=16, verbose=0)
    for key, parameter in model.net.named_parameters():
        assert not torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("name", CASES)
def test_hooks_come_as_in_a_built_in_loop(name):
    seen = []

    class Notes(Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append("begin")

        def on_train_batch_end(self, batch, logs=None):
            assert math.isfinite(logs["loss"])
            seen.append(batch)

        def on_epoch_end(self, epoch, logs=None):
            names.append(list(logs))
            seen.append("end")

    names = []
    model = fit_small(name, [Notes()])
    assert names == [list(model.history.history)] * 4
    assert seen == ["begin", 0, 1, 2, "end"] * 4


@pytest.mark.parametrize("name", CASES)
def test_a_stop_inside_an_epoch_is_heeded(name):
    class Stops(Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = self.run.epoch == 1

    model = fit_small(name, [Stops()])
    assert model.history.epoch == [0, 1]


def test_early_stopping_goes_by_a_logged_name():
    stop = EarlyStopping("d_loss", mode="min", patience=0, min_delta=100)
    assert fit_small("GAN", [stop]).history.epoch == [0, 1]
    with pytest.raises(ValueError, match="pass mode='min' or 'max'"):
        fit_small("GAN", [EarlyStopping("d_loss")])
    with pytest.raises(ValueError, match="did you mean 'd_loss'"):
        fit_small("GAN", [EarlyStopping("d_los", mode="min")])


def test_the_best_file_goes_by_a_logged_name(tmp_path):
    saver = ModelCheckpoint(tmp_path / "{epoch}_{penalty:.3f}.pt", "penalty", mode="min", save_best_only=True)
    model = fit_small("GAN", [saver])
    penalties = model.history.history["penalty"]
    best = penalties.index(min(penalties))
    assert saver.last_path.name == f"{best + 1}_{penalties[best]:.3f}.pt"
    assert torch.load(saver.last_path, weights_only=True)["epoch"] == best


def test_a_value_of_eval_step_is_in_evaluate_and_with_val_in_the_history():
    model, x, y = make_small("Distillation")
    history = model.fit(x, y, batch_size=16, validation_data=(x, y), verbose=0).history
    assert list(history) == ["loss", "accuracy", "val_loss", "val_accuracy", "val_agreement"]
    results = model.evaluate(x, y, verbose=0)
    assert list(results) == ["loss", "accuracy", "agreement"]
    assert results["agreement"] == pytest.approx(history["val_agreement"][0])


def test_the_line_of_an_epoch_shows_the_logged_values(capsys):
    model, x, y = make_small("GAN")
    model.fit(x, y, verbose=2)
    assert " - d_loss: " in capsys.readouterr().out


def test_metrics_by_name_work_where_a_step_takes_the_loss_of_chunks():
    names = run_cell("TruncatedBPTT", until="\nkt.set_seed")
    x, y = torch.randn(20, 50, 1), torch.randint(2, (20, 50, 1)).float()
    model = kt.Model(names["Latch"](), device="cpu")
    model.compile("bce_with_logits", "adam", ["accuracy"], loop=names["TruncatedBPTT"])
    history = model.fit(x, y, validation_data=(x, y), verbose=0).history
    predicted = torch.from_numpy(model.predict(x, verbose=0)) > 0
    assert history["val_accuracy"][0] == pytest.approx((predicted == y).float().mean().item(), abs=1e-6)


# ---- the ladder ----

RUNGS = {
    "fit": "fit",
    "train_epoch": "fit",
    "train_step": "fit",
    "evaluate": "evaluate",
    "eval_step": "evaluate",
    "predict": "predict",
    "predict_step": "predict",
}


def ladder_model(loop):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", "adam", ["accuracy"], loop=loop)
    return model


def live(model):
    """Train, evaluate and predict; return all that came of it."""
    torch.manual_seed(4)
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    history = model.fit(x, y, batch_size=8, epochs=2, validation_data=(x, y), verbose=0).history
    results = model.evaluate(x, y, batch_size=8, verbose=0)
    return history, results, torch.from_numpy(model.predict(x, batch_size=8, verbose=0)), model.net.state_dict()


@pytest.mark.parametrize("rung", RUNGS)
def test_each_rung_can_be_overridden_alone(rung):
    calls = []

    def override(self, *arguments):
        calls.append(self.run.train_data is not None)
        return getattr(super(Own, self), rung)(*arguments)

    Own = type("Own", (kt.ClassLoop,), {rung: override})
    assert same(live(ladder_model(Own)), live(ladder_model("class")))
    in_fit = {"fit": 1, "train_epoch": 2, "train_step": 6, "evaluate": 2, "eval_step": 2 * 3}
    alone = {"evaluate": 1, "eval_step": 3, "predict": 1, "predict_step": 3}
    assert calls.count(True) == in_fit.get(rung, 0)
    assert calls.count(False) == alone.get(rung, 0)


def test_a_train_epoch_of_ones_own_may_go_over_the_batches_in_its_own_way():
    class EverySecond(kt.ClassLoop):
        def train_epoch(self):
            self.net.train()
            for x, y, sample_weight in self.run.train_batches():
                if self.run.batch % 2:
                    loss, outputs = self.eval_step(x, y, sample_weight)
                else:
                    loss, outputs = self.train_step(x, y, sample_weight)
                self.run.record(loss, outputs, y, sample_weight)

    x, y = torch.randn(32, 6), torch.arange(32) % 3
    model, expected = ladder_model(EverySecond), ladder_model("class")
    for one in (model, expected):
        one.net[2].p = 0.0
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    rows = torch.arange(32) // 8 % 2 == 0
    expected.fit(x[rows], y[rows], batch_size=8, shuffle=False, verbose=0)
    assert same(model.net.state_dict(), expected.net.state_dict())


def test_a_swapped_eval_step_and_predict_step_of_the_function_loop_are_used():
    def eval_step(run, x, y, sample_weight):
        outputs = run.net(x)
        return torch.tensor(7.0), outputs

    def predict_step(run, x):
        return run.net(x).argmax(1)

    model = ladder_model(kt.FunctionLoop(eval_step=eval_step, predict_step=predict_step))
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    assert model.fit(x, y, validation_data=(x, y), verbose=0).history["val_loss"] == [7.0]
    assert model.predict(x, verbose=0).shape == (20,)


@pytest.mark.parametrize("form", ["class", "instance"])
def test_a_loop_of_ones_own_is_taken_as_a_class_or_an_object(form):
    class Own(kt.ClassLoop):
        pass

    given = Own if form == "class" else Own()
    made = make_loop(given)
    assert type(made) is Own
    assert (made is given) == (form == "instance")
    assert same(live(ladder_model(given)), live(ladder_model("class")))


@pytest.mark.parametrize("loop", ["clas", "classs", "Script loop", ""])
def test_an_unknown_name_is_refused_at_compile(loop):
    with pytest.raises(ValueError, match=r"loop .* is not known"):
        ladder_model(loop)


@pytest.mark.parametrize("loop", [None, 3, dict, nn.Linear(1, 1), lambda run: None])
def test_what_is_no_loop_is_refused_at_compile(loop):
    with pytest.raises(
        TypeError, match=r"loop must be a name \(script, function, class, graph\), a Loop class or a Loop obj"
    ):
        ladder_model(loop)


def test_a_class_that_lacks_a_verb_is_refused_at_compile():
    class Half(kt.Loop):
        def fit(self, run):
            pass

    with pytest.raises(TypeError, match="evaluate"):
        ladder_model(Half)


def test_a_class_that_needs_arguments_is_refused_with_what_to_do():
    names = run_cell("Distillation", until="\nkt.set_seed")
    with pytest.raises(TypeError, match="teacher"):
        ladder_model(names["Distillation"])


def test_one_loop_object_serves_two_models_by_turns():
    loop = kt.ClassLoop()
    one, other = ladder_model(loop), ladder_model(loop)
    assert same(live(one), live(ladder_model("class")))
    assert same(live(other), live(ladder_model("class")))
    assert not hasattr(loop, "run")


def test_a_step_that_returns_a_loss_a_sample_is_told():
    class Unreduced(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            outputs = self.net(x)
            losses = F.cross_entropy(outputs, y, reduction="none")
            losses.mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return losses, outputs

    with pytest.raises((TypeError, ValueError), match="step must return"):
        live(ladder_model(Unreduced))


def test_a_step_without_outputs_may_return_none_where_no_metric_wants_them():
    class Silent(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            return super().train_step(x, y, sample_weight)[0], None

    model = kt.Model(nn.Linear(6, 3), device="cpu")
    model.compile("cross_entropy", "sgd", loop=Silent)
    assert math.isfinite(model.fit(torch.randn(8, 6), torch.arange(8) % 3, verbose=0).history["loss"][0])


def test_lbfgs_is_refused_where_only_another_step_is_ones_own():
    class OwnValidation(kt.ClassLoop):
        def eval_step(self, x, y, sample_weight):
            return super().eval_step(x, y, sample_weight)

    for loop in (OwnValidation, kt.FunctionLoop(eval_step=lambda run, x, y, sample_weight: None)):
        with pytest.raises(ValueError, match="LBFGS"):
            kt.Model(nn.Linear(3, 1), device="cpu").compile("mse", "lbfgs", loop=loop)


# ---- ejected ----


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("GAN", "PlainLoop")])
def test_the_case_ejects_and_trains_the_same(name, capsys, monkeypatch):
    model, x, y = make_small(name)
    start = copy.deepcopy(model.net)
    rows = {"x": x, "x_val": x[:10]} | ({"y": y, "y_val": y[:10]} if y is not None else {})
    val = x[:10] if y is None else (x[:10], y[:10])
    val = None if name == "Contrastive" else val  # its loss reads targets that there are not
    torch.manual_seed(3)
    history = model.fit(x, y, batch_size=16, epochs=2, validation_data=val, verbose=0).history
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # no thread of its own
    module = types.ModuleType("ejected")
    monkeypatch.setitem(sys.modules, "ejected", module)
    exec(compile(model.eject("function" if name.endswith("step") else "class"), "ejected.py", "exec"), vars(module))
    recipe = textwrap.dedent(module.__doc__.partition(":\n\n")[2])
    recipe = recipe.replace("teacher = ...", "teacher = given")
    names = {**vars(module), **rows, "net": start, "given": getattr(model.loop, "teacher", None)}
    torch.manual_seed(3)
    exec(recipe, names)
    for key, value in model.net.state_dict().items():
        assert torch.equal(start.state_dict()[key], value), key
    assert list(names["history"]) == list(history)
    for key, values in history.items():
        assert names["history"][key] == pytest.approx(values, rel=1e-6, abs=1e-7), key


@pytest.mark.parametrize(("name", "message"), [("GAN", "several optimizers"), ("PlainLoop", "the loop PlainLoop")])
def test_the_case_that_does_not_eject_says_why(name, message):
    model, x, y = make_small(name)
    model.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match=message):
        model.eject("class")
