"""compile(optimizer={...}): each over the part of the net that it names, one beside the other in all that fit does."""

import contextlib
import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import (
    EMA,
    SWA,
    Callback,
    LearningRateScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
    TensorBoard,
    TerminateOnNaN,
)
from kerastorch.optimizers import NamedOptimizers, make_optimizers


class Pair(nn.Module):
    """Two parts that learn at different rates; `rest` is in no optimizer unless it is named."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2))
        self.head, self.rest = nn.Linear(8, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Alternating(kt.ClassLoop):
    """The body steps on every batch, the head on every second, from the first on."""

    def train_step(self, x, y, sample_weight):
        outputs = self.net(x)
        loss = self.loss_fn(outputs, y, sample_weight)
        loss.backward()
        self.optimizer["body"].step()
        if self.run.batch % 2 == 0:
            self.optimizer["head"].step()
        self.optimizer.zero_grad()
        return loss, outputs


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def step_lr(optimizer):
    return schedulers.StepLR(optimizer, 2, gamma=0.5)


def exponential(optimizer):
    return schedulers.ExponentialLR(optimizer, 0.9)


OPTIMIZERS = {"body": "adam", "head": sgd}
SCHEDULERS = {"body": step_lr, "head": exponential}


def make_model(optimizer=None, loop=Alternating, net=None, loss="cross_entropy", **arguments):
    torch.manual_seed(0)
    model = kt.Model(Pair() if net is None else net, device="cpu")
    model.compile(loss, optimizer or OPTIMIZERS, loop=loop, **arguments)
    return model


def make_data(rows=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, generator=generator), torch.arange(rows) % 3


def fit(model, epochs=2, seed=2, **arguments):
    torch.manual_seed(seed)
    arguments = {"batch_size": 16, "verbose": 0, **arguments}
    return model.fit(*make_data(), epochs=epochs, **arguments)


def held(optimizer):
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def ids(module):
    return set(map(id, module.parameters()))


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ---- made ----


def test_each_optimizer_is_over_its_part():
    model = make_model()
    optimizer = model.optimizer
    assert isinstance(optimizer["body"], torch.optim.Adam)
    assert isinstance(optimizer["head"], torch.optim.SGD)
    assert held(optimizer["body"]) == ids(model.net.body)
    assert held(optimizer["head"]) == ids(model.net.head)
    assert held(optimizer) == ids(model.net.body) | ids(model.net.head)
    assert len(optimizer.param_groups) == 2
    assert optimizer["body"].param_groups[0]["fused"] is True  # a name gives what it gives alone
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_a_name_may_be_a_path_into_the_net():
    net = nn.Sequential(Pair(), nn.Linear(3, 3))
    optimizer = make_optimizers({"0.body.0": "adam", "1": torch.optim.SGD}, net)
    assert held(optimizer["0.body.0"]) == ids(net[0].body[0])
    assert held(optimizer["1"]) == ids(net[1])


def test_an_optimizer_object_may_have_any_name():
    net = Pair()
    given = torch.optim.SGD([*net.head.parameters(), *net.rest.parameters()], 0.1)
    model = make_model({"body": "adam", "the others": given}, net=net)
    assert model.optimizer["the others"] is given


def test_the_net_of_a_compiled_module_is_named_as_before_it():
    net = Pair()
    model = make_model(net=torch.compile(net))  # nothing is compiled before the first call
    assert held(model.optimizer["body"]) == ids(net.body)


def test_an_unknown_part_is_refused_naming_the_nearest():
    with pytest.raises(
        ValueError, match=r"optimizer\['haed'\] .* no part of that name; did you mean 'head'\? Parts: bo"
    ):
        make_model({"body": "adam", "haed": "sgd"})


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer 'adm' is not known; did you mean 'adam'"):
        make_model({"body": "adm", "head": "sgd"})


def test_an_object_of_another_net_is_refused():
    with pytest.raises(ValueError, match="holds none of the net's parameters"):
        make_model({"body": "adam", "head": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)})


def test_an_empty_dict_is_refused():
    with pytest.raises(ValueError, match="holds no optimizer"):
        kt.Model(Pair(), device="cpu").compile("cross_entropy", {}, loop=Alternating)


def test_a_part_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameters"):
        make_model({"body": "adam", "body.1": "sgd"})


def test_parts_that_share_parameters_are_refused():
    """ "body" and "body.0" would both step the same weights."""
    with pytest.raises(ValueError, match=r"body\.0"):
        make_model({"body": "adam", "body.0": "sgd"})


def test_a_loss_with_parameters_is_not_left_out_in_silence():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, outputs, y):
            return F.cross_entropy(outputs * self.log_scale.exp(), y)

    loss = Scaled()
    try:
        model = make_model(loss=loss)
    except ValueError as error:
        assert "loss" in str(error)  # noqa: PT017 - to refuse is as good as to train it
        return
    assert id(loss.log_scale) in held(model.optimizer)


@pytest.mark.parametrize("loop", ["script", "function", "class", kt.ClassLoop, kt.FunctionLoop()])
def test_the_built_in_steps_refuse_several(loop):
    with pytest.raises(ValueError, match="several optimizers need a train_step of your own"):
        make_model(loop=loop)


def test_param_groups_beside_several_are_refused():
    with pytest.raises(ValueError, match="no param_groups"):
        make_model(param_groups={"*.bias": {"weight_decay": 0.0}})


# ---- schedulers ----


def test_each_scheduler_is_over_its_optimizer():
    model = make_model(lr_scheduler=SCHEDULERS)
    fit(model, epochs=3)
    assert model.optimizer["body"].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5)
    assert model.optimizer["head"].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**3)


def test_schedulers_may_step_with_the_batches():
    model = make_model(lr_scheduler=SCHEDULERS, lr_scheduler_interval="step")
    fit(model, epochs=2)  # three batches each
    assert model.optimizer["body"].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**3)
    assert model.optimizer["head"].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**6)


def test_one_of_them_may_have_no_scheduler():
    model = make_model(lr_scheduler={"head": exponential})
    fit(model, epochs=2)
    assert model.optimizer["body"].param_groups[0]["lr"] == pytest.approx(1e-3)
    assert model.optimizer["head"].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**2)


def test_scheduler_objects_are_taken_with_optimizer_objects():
    net = Pair()
    body, head = torch.optim.Adam(net.body.parameters()), sgd(net.head.parameters())
    model = make_model({"body": body, "head": head}, net=net, lr_scheduler={"head": exponential(head)})
    fit(model, epochs=1)
    assert head.param_groups[0]["lr"] == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cosine", r"a dict by their names \(body, head\), not 'cosine'"),
        (step_lr, r"a dict by their names \(body, head\)"),
        ({"haed": step_lr}, "the name 'haed', but the optimizers are body, head"),
        ({"head": "cosine"}, r"lr_scheduler\['head'\]='cosine' spans a fit"),
        ({"head": "one_cycle"}, "spans a fit"),
        ({"head": "reduce_on_plateau"}, "reads its loss"),
        ({"head": "cosin"}, "did you mean 'cosine'"),
        ({"head": 3}, "must be a name, a torch scheduler"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_model(lr_scheduler=given)


def test_a_dict_of_schedulers_beside_one_optimizer_is_refused():
    with pytest.raises(ValueError, match="goes with a dict of optimizers; there is one"):
        make_model("adam", lr_scheduler={"head": step_lr})


def test_a_scheduler_of_the_other_optimizer_is_refused():
    net = Pair()
    body, head = torch.optim.Adam(net.body.parameters()), sgd(net.head.parameters())
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        make_model({"body": body, "head": head}, net=net, lr_scheduler={"head": exponential(body)})


def test_the_last_rates_can_be_read_as_from_one_scheduler():
    """A user's callback reads run.lr_scheduler.get_last_lr(), as torch's schedulers have it."""
    rates = []

    class Reads(Callback):
        def on_epoch_end(self, epoch, logs=None):
            rates.append(self.run.lr_scheduler.get_last_lr())

    fit(make_model(lr_scheduler=SCHEDULERS), epochs=1, callbacks=Reads())
    assert rates == [pytest.approx([1e-3, 0.09])]


def test_a_scheduler_is_reached_by_its_name():
    """As self.optimizer["head"] is."""
    found = []

    class Reads(Callback):
        def on_epoch_end(self, epoch, logs=None):
            found.append(self.run.lr_scheduler["head"])

    fit(make_model(lr_scheduler=SCHEDULERS), epochs=1, callbacks=Reads())
    assert isinstance(found[0], schedulers.ExponentialLR)


# ---- trained ----


def test_training_equals_the_loop_written_by_hand_to_the_bit():
    model = make_model(lr_scheduler=SCHEDULERS)
    loader = DataLoader(TensorDataset(*make_data()), 16, shuffle=True)
    torch.manual_seed(2)
    history = model.fit(loader, epochs=3, verbose=0).history

    torch.manual_seed(0)
    net = Pair()
    body, head = torch.optim.Adam(net.body.parameters(), fused=True), sgd(net.head.parameters())
    of_body, of_head = step_lr(body), exponential(head)
    torch.manual_seed(2)
    losses = []
    for _ in range(3):
        total = 0.0
        for i, (x, y) in enumerate(loader):
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            body.step()
            if i % 2 == 0:
                head.step()
            body.zero_grad()
            head.zero_grad()
            total += loss.item() * len(x)
        losses.append(total / 40)
        of_body.step()
        of_head.step()
    assert same(model.net.state_dict(), net.state_dict())
    assert history["loss"] == pytest.approx(losses, rel=1e-9)
    assert same(model.optimizer["body"].state_dict(), body.state_dict())


def test_a_part_in_no_optimizer_stays_as_it_is():
    model = make_model()
    before = copy.deepcopy(model.net.rest.state_dict())
    fit(model)
    assert same(model.net.rest.state_dict(), before)


def test_step_and_zero_grad_reach_all():
    class Together(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            loss, outputs = super().train_step(x, y, sample_weight)  # its optimizer.step() is that of both
            assert all(p.grad is None for p in self.net.parameters())
            return loss, outputs

    model = make_model(loop=Together)
    before = copy.deepcopy(model.net.state_dict())
    fit(model, epochs=1)
    for name in ("body.0.weight", "head.weight"):
        assert not torch.equal(model.net.state_dict()[name], before[name])


def test_the_inherited_step_clips_and_accumulates_over_all_parts():
    class Together(kt.ClassLoop):
        pass

    together = make_model({"body": sgd, "head": sgd}, Together, gradient_accumulation_steps=2, clip_grad_norm=0.1)
    net = Pair()
    one = kt.Model(net, device="cpu")
    one.compile("cross_entropy", sgd, gradient_accumulation_steps=2, clip_grad_norm=0.1)
    net.load_state_dict(together.net.state_dict())
    fit(together, epochs=2)
    fit(one, epochs=2)
    assert same(together.net.state_dict(), one.net.state_dict())


@pytest.mark.parametrize("optimizer", [sgd, "adam"], ids=["sgd", "adam"])
def test_fp16_scales_for_each_optimizer(optimizer):
    class Scaled(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            run = self.run
            with run.autocast():
                outputs = self.net(x)
                loss = self.loss_fn(outputs, y, sample_weight)
            run.scaler.scale(loss).backward()
            run.scaler.step(self.optimizer["body"])
            run.scaler.step(self.optimizer["head"])
            run.scaler.update()
            self.optimizer.zero_grad()
            return loss, outputs

    model = make_model({"body": optimizer, "head": optimizer}, Scaled, mixed_precision="fp16")
    before = copy.deepcopy(model.net.state_dict())
    fit(model, epochs=1)
    for name in ("body.0.weight", "head.weight"):
        assert 0 < (model.net.state_dict()[name] - before[name]).abs().max() < 1


def test_fp16_clips_once_where_each_part_is_stepped_through_the_scaler():
    """prepare_gradients() unscales them all; a scaler.step of one part must not unscale it again."""

    class Scaled(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            run = self.run
            outputs = self.net(x)
            loss = self.loss_fn(outputs, y, sample_weight)
            run.scaler.scale(loss).backward()
            run.prepare_gradients()
            for name in ("body", "head"):
                run.scaler.step(self.optimizer[name])
            run.scaler.update()
            self.optimizer.zero_grad()
            return loss, outputs

    nets = []
    for precision in ("fp16", None):
        model = make_model({"body": sgd, "head": sgd}, Scaled, mixed_precision=precision, clip_grad_norm=1e3)
        fit(model, epochs=1)
        nets.append(model.net)
    torch.testing.assert_close(nets[0].head.weight, nets[1].head.weight, rtol=1e-3, atol=1e-5)


# ---- checkpoints ----


class Death(Exception):
    pass


class Dies(Callback):
    def on_train_batch_end(self, batch, logs=None):
        if (self.run.epoch, batch) == (1, 2):
            raise Death


def dead_run(tmp_path, **arguments):
    """Leave a checkpoint of epoch 1, batch 1; return the callback that wrote it."""
    saver = ModelCheckpoint(tmp_path / "run.pt", save_freq=1)
    with pytest.raises(Death):
        fit(make_model(**{"lr_scheduler": SCHEDULERS, **arguments}), epochs=4, callbacks=[saver, Dies()])
    return saver


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_dead_run_goes_on_to_the_bit(interval, tmp_path):
    arguments = {"lr_scheduler": SCHEDULERS, "lr_scheduler_interval": interval}
    straight = make_model(**arguments)
    expected = fit(straight, epochs=4).history
    saver = dead_run(tmp_path, **arguments)
    resumed = make_model(**arguments)
    assert fit(resumed, epochs=4, seed=99, callbacks=saver, resume=True).history == expected
    assert same(resumed.net.state_dict(), straight.net.state_dict())
    assert same(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    rates = [[group["lr"] for group in model.optimizer.param_groups] for model in (resumed, straight)]
    assert rates[0] == rates[1]


def test_the_file_holds_each_optimizer_under_its_name(tmp_path):
    dead_run(tmp_path)
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    assert list(content["optimizer_state_dict"]) == ["body", "head"]
    assert list(content["lr_scheduler_state_dict"]) == ["body", "head"]
    optimizer = torch.optim.Adam(Pair().body.parameters())
    optimizer.load_state_dict(content["optimizer_state_dict"]["body"])  # plain torch can use it


CHANGED = {
    "other names": ({"optimizer": {"body": "adam", "rest": sgd}, "lr_scheduler": {"body": step_lr}}, "body, rest"),
    "one more": ({"optimizer": {**OPTIMIZERS, "rest": "sgd"}}, "body, head, rest"),
    "one fewer": ({"optimizer": {"body": "adam"}, "lr_scheduler": {"body": step_lr}}, "body, head"),
    "one alone": ({"optimizer": "adam", "lr_scheduler": step_lr}, "body: Adam, head: SGD"),
    "another kind": ({"optimizer": {"body": "sgd", "head": sgd}}, "Adam"),
    "no schedulers": ({"lr_scheduler": None}, "body: StepLR, head: ExponentialLR"),
    "one scheduler fewer": ({"lr_scheduler": {"head": exponential}}, "lr_scheduler"),
    "other schedulers": ({"lr_scheduler": {"body": exponential, "head": exponential}}, "StepLR"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_resume_with_other_optimizers_is_refused_before_anything_is_touched(case, tmp_path):
    arguments, message = CHANGED[case]
    saver = dead_run(tmp_path)
    model = make_model(**{"lr_scheduler": SCHEDULERS, **arguments})
    before = copy.deepcopy((model.net.state_dict(), model.optimizer.state_dict()))
    with pytest.raises(ValueError, match=f"does not fit this model[^?]*{message}"):
        fit(model, epochs=4, callbacks=saver, resume=True)
    assert same(before, (model.net.state_dict(), model.optimizer.state_dict()))


def test_the_order_of_the_names_does_not_matter_to_a_resume(tmp_path):
    straight = make_model(lr_scheduler=SCHEDULERS)
    expected = fit(straight, epochs=4).history
    saver = dead_run(tmp_path)
    backwards = {name: OPTIMIZERS[name] for name in reversed(OPTIMIZERS)}
    resumed = make_model(backwards, lr_scheduler=SCHEDULERS)
    assert fit(resumed, epochs=4, callbacks=saver, resume=True).history == expected


def test_a_checkpoint_of_one_optimizer_is_refused_by_several(tmp_path):
    saver = ModelCheckpoint(tmp_path / "run.pt", save_freq=1)
    one = make_model("adam", "class")
    with pytest.raises(Death):
        fit(one, epochs=4, callbacks=[saver, Dies()])
    with pytest.raises(ValueError, match="the checkpoint's optimizer is Adam, this run's body: Adam, head: SGD"):
        fit(make_model(), epochs=4, callbacks=saver, resume=True)


# ---- callbacks, copies ----


def test_a_schedule_by_callback_reaches_all():
    model = make_model()
    fit(model, epochs=1, callbacks=LearningRateScheduler(lambda epoch, rate: 0.25))
    assert [group["lr"] for group in model.optimizer.param_groups] == [0.25, 0.25]


def test_a_plateau_lowers_each_rate():
    model = make_model()
    plateau = ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100.0)
    fit(model, epochs=2, callbacks=plateau)
    assert [group["lr"] for group in model.optimizer.param_groups] == pytest.approx([5e-4, 0.05])


def test_nan_in_any_part_is_found():
    class Poisoned(Alternating):
        def train_step(self, x, y, sample_weight):
            self.net.head.weight.register_hook(lambda gradient: gradient * torch.nan)
            return super().train_step(x, y, sample_weight)

    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings(record=True) as warned:
        history = fit(make_model(loop=Poisoned), epochs=3, callbacks=TerminateOnNaN())
    assert len(history.epoch) < 3
    assert "head" in out.getvalue() + " ".join(str(one.message) for one in warned)


@pytest.mark.parametrize("average", [lambda: EMA(decay=0.9), lambda: SWA(start_epoch=0)], ids=["EMA", "SWA"])
def test_an_average_is_kept_of_all_parts(average):
    model = make_model()
    history = fit(model, epochs=2, callbacks=average(), validation_data=make_data()).history
    assert all(map(torch.isfinite, map(torch.tensor, history["val_loss"])))


def test_tensorboard_writes_beside_several(tmp_path):
    pytest.importorskip("tensorboard")
    fit(make_model(lr_scheduler=SCHEDULERS), epochs=2, callbacks=TensorBoard(tmp_path))
    assert list(tmp_path.rglob("events*"))


def test_check_looks_at_such_a_model():
    report = make_model().check(*make_data())
    assert "not in the optimizer" in str(report).lower()  # of `rest`


def test_check_leaves_the_optimizers_alone():
    model = make_model()
    fit(model, epochs=1)
    before = copy.deepcopy((model.net.state_dict(), model.optimizer["body"].state_dict()))
    model.check(*make_data())
    assert same(before, (model.net.state_dict(), model.optimizer["body"].state_dict()))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_whole(way):
    model = make_model()
    fit(model, epochs=1)
    given = model.optimizer
    made = copy.deepcopy(given) if way == "deepcopy" else pickle.loads(pickle.dumps(given))
    assert isinstance(made, NamedOptimizers)
    assert same(made["body"].state_dict(), given["body"].state_dict())
    made.step()


def test_a_copy_leaves_the_others_working():
    """torch patches the class's step when one of its objects is copied."""
    with contextlib.suppress(AttributeError):
        copy.deepcopy(make_model().optimizer)
    make_model().optimizer.step()


def test_a_copied_model_trains_as_the_first():
    model = make_model()
    fit(model, epochs=1)
    other = copy.deepcopy(model)
    fit(model, epochs=1)
    fit(other, epochs=1)
    assert same(model.net.state_dict(), other.net.state_dict())


def test_hooks_of_both_kinds_reach_each():
    optimizer = make_model().optimizer
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *arguments: calls.append("before")),
        optimizer.register_step_post_hook(lambda *arguments: calls.append("after")),
    ]
    optimizer.step()
    assert calls == ["before", "after"] * 2
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 4


def test_it_has_a_repr():
    text = repr(make_model().optimizer)
    assert "lr: 0.001" in text
    assert "lr: 0.1" in text


def test_training_goes_on_after_compile_with_others():
    model = make_model()
    fit(model, epochs=1)
    model.compile("cross_entropy", "adam")
    fit(model, epochs=1)
    model.compile("cross_entropy", OPTIMIZERS, loop=Alternating)
    fit(model, epochs=1)
    assert len(model.history.epoch) == 3
