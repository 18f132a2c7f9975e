"""eject: the file written out trains to the same weights, to the bit, as fit, in a process without kerastorch."""

import ast
import copy
import functools
import inspect
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy as ce
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import (
    EMA,
    BackupAndRestore,
    Callback,
    CSVLogger,
    EarlyStopping,
    LambdaCallback,
    LearningRateScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
    TensorBoard,
    TerminateOnNaN,
)
from kerastorch.eject import STYLES

ROOT = Path(kt.__file__).parent.parent
EPOCHS = 4
GENERATOR = torch.Generator().manual_seed(1)
X, X2 = torch.randn(45, 6, generator=GENERATOR), torch.randn(45, 6, generator=GENERATOR)
Y = torch.randint(0, 3, (45,), generator=GENERATOR)
W = torch.rand(45, generator=GENERATOR) + 0.5
YES = (Y > 1).float()[:, None]
VALUES = X.sum(1, keepdim=True)

# What the child does with each case: it runs the lines at the top of the file as they stand. Only what those call the
# user's own, with "...", is put in.
CHILD = """
import importlib.util, re, sys, textwrap, traceback
sys.modules["kerastorch"] = None
import torch, torchmetrics
torch.set_num_threads(1)

class Recorder:
    def on_epoch_end(self, epoch, logs):
        logs["twice"] = 2 * logs["loss"]

class OtherRecorder:
    def on_train_begin(self, logs):
        self.begun = 1.0
    def on_epoch_begin(self, epoch, logs):
        self.epoch = epoch + self.begun
    def on_epoch_end(self, epoch, logs):
        logs["begun"] = self.epoch

results = {}
for name, case in torch.load(sys.argv[1], weights_only=False).items():
    spec = importlib.util.spec_from_file_location("ejected", case["path"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = textwrap.dedent(module.__doc__.split(":\\n\\n", 1)[1])
    for old, new in {"train_data = ...": "train_data = given[0]", "val_data = ...": "val_data = given[1]"}.items():
        recipe = recipe.replace(old, new)
    for old, new in case["replace"].items():
        assert old in recipe, (name, old, recipe)
        recipe = recipe.replace(old, new)
    recorders = {"Recorder": Recorder, "OtherRecorder": OtherRecorder, "TM": torchmetrics}
    known = {**vars(module), **recorders, "given": case["loaders"], **case["names"]}
    torch.manual_seed(2)
    runs = [case["epochs"]] if case["resume_from"] is None else [case["epochs"] // 2, case["epochs"]]
    for i, epochs in enumerate(runs):
        space = {**known, "net": torch.load(case["net"], weights_only=False)}
        text = recipe
        if i:
            text = text.replace(", epochs", f", epochs, resume_from={case['resume_from']!r}")
        if len(runs) > 1:
            text = re.sub("train\\\\((.*?), epochs", rf"train(\\1, {epochs}", text, flags=re.S)
        try:
            exec(text, space)
        except Exception:
            results[name] = traceback.format_exc() + text
            break
        torch.manual_seed(1000)  # a resumed run does not live on the seed of the one before
    else:
        results[name] = {"weights": space["net"].state_dict(), "history": space["history"]}
torch.save(results, sys.argv[2])
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, outputs),
    )


def make_pair_net():
    torch.manual_seed(0)
    return nn.Bilinear(6, 6, 3)


def arrays(*columns):
    """The columns to train on and, the first rows of them, to validate on; fit and the file make loaders of them."""
    return columns


def loaders(*columns):
    rows = TensorDataset(*columns)
    return [DataLoader(rows, 8, shuffle=True), DataLoader(TensorDataset(*(column[:13] for column in columns)), 5)]


def nested_loaders(rows):
    return [DataLoader(rows, 8, shuffle=True), DataLoader(rows[:13], 5)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.3, threshold=0.5)


def right_share(outputs, y):
    return (outputs.argmax(1) == y).float().mean()


def loss_of_each(outputs, y):
    return F.cross_entropy(outputs, y, reduction="none")


def square(outputs, y):
    return outputs.square().mean()


def first_target(outputs, y):
    return F.cross_entropy(outputs, y[0])


class Recorder(Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["twice"] = 2 * logs["loss"]


class Halved(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        run = self.run
        with run.autocast():
            outputs = run.forward(x)
            loss = self.loss_fn(outputs, y, sample_weight) / 2 + 0.01 * F.mse_loss(outputs, torch.zeros_like(outputs))
        run.scaler.scale(run.share(loss)).backward()
        if run.step_is_due:
            run.prepare_gradients()
            run.scaler.step(self.optimizer)
            run.scaler.update()
            self.optimizer.zero_grad()
        return loss, outputs


def doubled_step(run, x, y, sample_weight):
    outputs = run.forward(x)
    loss = 2 * run.loss_fn(outputs, y, sample_weight)
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss, outputs


class OtherRecorder(Callback):
    def on_train_begin(self, logs=None):
        self.begun = 1.0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch + self.begun

    def on_epoch_end(self, epoch, logs=None):
        logs["begun"] = self.epoch


TEMPERATURE = 1.5


class Crowded(kt.ClassLoop):
    """Keeps things, has a helper and a decorated step, counts and logs."""

    scale: float
    shift = 0.25

    def __init__(self, scale, teacher):
        self.scale = scale
        self.teacher = teacher

    def loss_of(self, outputs, y):
        """A string
        that keeps its margin."""
        return self.scale * self.loss_fn(outputs / TEMPERATURE, y) + self.shift * outputs.square().mean()

    def train_step(self, x, y, sample_weight):
        import math

        run = self.run
        outputs = self.net(x)
        loss = self.loss_of(
            outputs, y
        )  # this line is longer than a line of the file would be, and stays as it stands here, (as it is) word for word
        loss = loss * math.exp(-0.01 * run.step) * (1 - 0.01 * run.epoch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.log(right=self.teacher(outputs, y), rows=len(x), step=run.step)
        return loss, outputs

    @torch.no_grad()
    def eval_step(self, x, y, sample_weight):
        outputs = self.net(x)
        self.log(right=self.teacher(outputs, y))
        return ce(outputs, y), outputs


def noted_step(r, inputs, targets, weight=None):
    def twice(value):
        return 2 * value

    with r.autocast():
        outputs = r.forward(inputs)
        loss = twice(r.loss_fn(outputs, targets, weight)) * (1 - r.epoch / r.epochs)
    loss.backward()
    norm = clip_grad_norm_(r.net.parameters(), 0.5)
    r.optimizer.step()
    r.optimizer.zero_grad()
    r.log(norm=norm, size=float(r.num_samples))
    return loss, outputs


def noted_eval(run, x, y, sample_weight):
    outputs = run.net(x)
    run.log(size=run.num_samples)
    return run.loss_fn(outputs, y, sample_weight), outputs


class Unsupervised(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        with torch.enable_grad():
            outputs = self.net(x)
            loss = outputs.square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, outputs

    def eval_step(self, x, y, sample_weight):
        outputs = self.net(x)
        return outputs.abs().mean(), outputs


def make_identity():
    net = nn.Linear(6, 6)
    with torch.no_grad():
        net.weight.copy_(3 * torch.eye(6))
        net.bias.zero_()
    return net


ROWS = torch.eye(6).repeat(2, 1)[:10]
LABELS = ROWS.argmax(1).index_fill(0, torch.tensor([0, 1]), 5)
SCHEDULE = "schedule = lambda epoch, lr: 0.1 / (epoch + 1)  #"


class Case:
    """A model's settings, what fit was given, and what the model is known to remember of it."""

    def __init__(
        self,
        loss="cross_entropy",
        optimizer=sgd,
        metrics=("accuracy",),
        *,
        net=make_net,
        data=None,
        callbacks=(),
        styles=STYLES,
        fit=None,
        replace=None,
        resume_from=None,
        saved=None,
        differs=True,
        epochs=EPOCHS,
        **compiled,
    ):
        self.loss, self.optimizer, self.metrics, self.net, self.compiled = loss, optimizer, metrics, net, compiled
        self.data, self.callbacks, self.styles, self.fit_arguments = data, callbacks, styles, fit or {}
        self.replace, self.resume_from, self.saved, self.differs = replace or {}, resume_from, saved, differs
        self.epochs = epochs

    def run(self, folder):
        data = self.data() if self.data is not None else arrays(X, Y)
        net = self.net()
        torch.save(net, folder / "net.pt")
        self.folder, self.names, self.loaders = folder, {}, [None, None]
        if isinstance(data, tuple):
            columns = dict(zip(("x", "y", "sample_weight"), data, strict=False))
            val = tuple(column[:13] for column in data)
            self.names = {**columns, **{f"{name}_val": column[:13] for name, column in columns.items()}}
            fit = {"x": data if len(data) > 1 else data[0], "batch_size": 8, "validation_batch_size": 5}
            fit["validation_data"] = val if len(data) > 1 else val[0]
        else:
            self.loaders = data
            fit = {"x": data[0], "validation_data": data[1]}
        model = kt.Model(net, "cpu")
        metrics = self.metrics if isinstance(self.metrics, dict) else list(self.metrics)
        model.compile(self.loss, self.optimizer, metrics, **self.compiled)
        torch.manual_seed(2)
        fit |= {"callbacks": [make(folder) for make in self.callbacks], "epochs": self.epochs, **self.fit_arguments}
        if not ("validation_split" in fit or fit["validation_data"] is not None):
            fit.pop("validation_batch_size", None)
        history = model.fit(verbose=0, **fit)
        return model, history

    def for_child(self, path):
        return {
            "path": str(path),
            "net": str(self.folder / "net.pt"),
            "loaders": self.loaders,
            "names": self.names,
            "replace": self.replace,
            "resume_from": self.resume_from and str(self.folder / self.resume_from),
            "epochs": self.epochs,
        }


def pairs():
    return nested_loaders([((a, b), y) for a, b, y in zip(X, X2, Y, strict=True)])


def named_pairs():
    return nested_loaders([({"input1": a, "input2": b}, y) for a, b, y in zip(X, X2, Y, strict=True)])


def dicts():
    return nested_loaders([{"x": x, "y": y} for x, y in zip(X, Y, strict=True)])


EVERY = {"gradient_accumulation_steps": 4, "clip_grad_norm": 0.1, "clip_grad_value": 0.02}
CASES = {
    "no feature": Case(differs=False),
    "plain": Case(optimizer="adam"),
    "accumulation": Case(gradient_accumulation_steps=2),
    "uneven accumulation": Case(gradient_accumulation_steps=4),
    "clip norm": Case(clip_grad_norm=0.1),
    "clip value": Case(clip_grad_value=0.01),
    "bf16": Case(mixed_precision="bf16"),
    "fp16": Case(mixed_precision="fp16", clip_grad_norm=1.0, gradient_accumulation_steps=4),
    "scheduler a step": Case(lr_scheduler=step_lr, lr_scheduler_interval="step"),
    "scheduler an epoch": Case(lr_scheduler=step_lr),
    "cosine": Case(lr_scheduler="cosine"),
    "one cycle": Case(
        lr_scheduler="one_cycle", lr_scheduler_interval="step", gradient_accumulation_steps=4, optimizer="adamw"
    ),
    "plateau": Case(lr_scheduler=plateau),
    "param groups": Case(
        optimizer="adamw", param_groups={"*.bias": {"weight_decay": 0.0, "lr": 0.1}}, clip_grad_norm=0.1
    ),
    "all at once": Case(
        optimizer="adamw", **EVERY, mixed_precision="bf16", lr_scheduler=step_lr, lr_scheduler_interval="step"
    ),
    "class weights": Case(fit={"class_weight": {0: 0.5, 1: 3.0}}),
    "class weights, yes or no": Case(
        "bce_with_logits",
        net=lambda: make_net(1),
        data=lambda: arrays(X, YES),
        fit={"class_weight": {1: 3.0}},
    ),
    "class weights, one-hot": Case(
        data=lambda: arrays(X, F.one_hot(Y, 3).float()),
        fit={"class_weight": {0: 0.5, 1: 3.0}},
    ),
    "scores of yes or no": Case(
        "bce_with_logits",
        metrics=["accuracy", "auroc", "f1"],
        net=lambda: make_net(1),
        data=lambda: arrays(X, YES),
    ),
    "a loss of one's own, weighted": Case(
        loss_of_each,
        metrics=[right_share],
        data=lambda: arrays(X, Y, W),
        replace={
            "...  # your loss_of_each": 'lambda outputs, y: nn.functional.cross_entropy(outputs, y, reduction="none")',
            "MeanOf(...),  # your right_share": "MeanOf(lambda outputs, y: (outputs.argmax(1) == y).float().mean()),",
        },
    ),
    "a loss of one's own": Case(
        loss_of_each,
        metrics=(),
        replace={
            "...  # your loss_of_each": 'lambda outputs, y: nn.functional.cross_entropy(outputs, y, reduction="none")',
        },
        differs=False,
    ),
    "sample weights": Case(data=lambda: arrays(X, Y, W)),
    "sample weights of values": Case(
        "mse", metrics=["mae", "rmse"], net=lambda: make_net(1), data=lambda: arrays(X, VALUES, W)
    ),
    "both weights": Case(data=lambda: arrays(X, Y, W), fit={"class_weight": {0: 0.5, 1: 3.0}}),
    "early stopping": Case(
        callbacks=[lambda folder: EarlyStopping("val_accuracy", patience=1, restore_best_weights=True)], epochs=12
    ),
    "early stopping, all arguments": Case(
        callbacks=[
            lambda folder: EarlyStopping(
                "val_loss", 0.02, 2, baseline=1.05, start_from_epoch=1, restore_best_weights=True
            )
        ],
        epochs=12,
    ),
    "best checkpoint": Case(
        callbacks=[lambda folder: ModelCheckpoint(folder / "best.pt", save_best_only=True)],
        saved="best.pt",
        differs=False,
    ),
    "best weights at each epoch's path": Case(
        callbacks=[lambda folder: ModelCheckpoint(folder / "{epoch:02d}.pt", save_weights_only=True)],
        saved="04.pt",
        differs=False,
    ),
    "checkpoint and resume": Case(
        callbacks=[lambda folder: ModelCheckpoint(folder / "{epoch}.pt")],
        lr_scheduler=step_lr,
        resume_from="2.pt",
        saved="4.pt",
        **EVERY,
    ),
    "resume with early stopping and the best": Case(
        callbacks=[
            lambda folder: ModelCheckpoint(folder / "last.pt"),
            lambda folder: EarlyStopping("val_accuracy", patience=4, restore_best_weights=True),
            lambda folder: ModelCheckpoint(folder / "best.pt", "val_accuracy", save_best_only=True),
        ],
        resume_from="last.pt",
        saved="best.pt",
        epochs=8,
    ),
    "resume of a stopped run": Case(
        callbacks=[
            lambda folder: ModelCheckpoint(folder / "last.pt"),
            lambda folder: EarlyStopping("val_accuracy", patience=3, restore_best_weights=True),
        ],
        resume_from="last.pt",
        epochs=8,
    ),
    "several inputs, tuple": Case(net=make_pair_net, data=pairs, **EVERY),
    "several inputs, dict": Case(net=make_pair_net, data=named_pairs),
    "no validation": Case(fit={"validation_data": None}, lr_scheduler=plateau),
    "every second epoch": Case(
        fit={"validation_freq": 2},
        differs=False,
        callbacks=[
            lambda folder: EarlyStopping(patience=5),
            lambda folder: ModelCheckpoint(folder / "b.pt", save_best_only=True),
        ],
    ),
    "unpack": Case(
        data=dicts,
        unpack=lambda batch: (batch["x"], batch["y"]),
        replace={"unpack = ...": 'unpack = lambda batch: (batch["x"], batch["y"])  #'},
        differs=False,
    ),
    "unpack in training": Case(
        data=lambda: [dicts()[0], loaders(X, Y)[1]],
        fit={"validation_data": (X[:13], Y[:13]), "validation_batch_size": 5},
        unpack=lambda batch: (batch["x"], batch["y"]),
        replace={
            "unpack = ...": 'unpack = lambda batch: (batch["x"], batch["y"])  #',
            "TensorDataset(x_val, y_val)": "given[1].dataset",
        },
        differs=False,
    ),
    "many metrics": Case(
        metrics=["accuracy", "f1", "auroc", "confusion_matrix"],
        differs=False,
    ),
    "a metric of one's own": Case(
        metrics=[right_share, torchmetrics.classification.MulticlassF1Score(3, average="micro")],
        replace={
            "MeanOf(...),  # your right_share": "MeanOf(lambda outputs, y: (outputs.argmax(1) == y).float().mean()),",
            "...,  # your MulticlassF1Score": "TM.classification.MulticlassF1Score(3, average='micro'),  #",
        },
        differs=False,
    ),
    "callbacks": Case(
        callbacks=[
            lambda folder: LearningRateScheduler(lambda epoch, lr: 0.1 / (epoch + 1)),
            lambda folder: Recorder(),
            lambda folder: CSVLogger(folder / "log.csv", separator=";"),
            lambda folder: TerminateOnNaN(),
        ],
        replace={"callbacks = ...": "callbacks = [Recorder()]", "schedule = ...": SCHEDULE},
        saved="log.csv",
    ),
    "a train_step of one's own": Case(loop=Halved(), styles=["class"], mixed_precision="bf16", clip_grad_norm=0.1),
    "a train_step of one's own, scaled and resumed": Case(
        loop=Halved(),
        styles=["class"],
        mixed_precision="fp16",
        clip_grad_norm=0.1,
        callbacks=[lambda folder: ModelCheckpoint(folder / "last.pt")],
        resume_from="last.pt",
        saved="last.pt",
    ),
    "a function of one's own": Case(
        loop=kt.FunctionLoop(train_step=doubled_step),
        styles=["function"],
        lr_scheduler=step_lr,
        lr_scheduler_interval="step",
    ),
    "own loaders": Case(data=lambda: loaders(X, Y), differs=False),
    "a split": Case(fit={"validation_data": None, "validation_split": 0.3}),
    "no shuffling": Case(fit={"shuffle": False}),
    "from a later epoch": Case(
        callbacks=[
            lambda folder: LearningRateScheduler(lambda epoch, lr: 0.1 / (epoch + 1)),
            lambda folder: CSVLogger(folder / "new" / "log.csv", separator=";"),
            lambda folder: EarlyStopping(patience=1),
        ],
        fit={"initial_epoch": 2},
        replace={"schedule = ...": SCHEDULE},
        saved="new/log.csv",
        epochs=6,
    ),
    "epochs in a list": Case(fit={"validation_freq": [2, 4]}, differs=False),
    "part of the net": Case(optimizer=lambda parameters: torch.optim.SGD(list(parameters)[2:], lr=0.1)),
    "one group with its own rate": Case(
        optimizer=lambda parameters: torch.optim.SGD([{"params": list(parameters), "lr": 0.3}], lr=0.1)
    ),
    "groups of a scheduler": Case(
        optimizer="sgd",
        param_groups={"*.bias": {"lr": 0.05}, "4.*": {"lr": 0.5, "momentum": 0.5}},
        lr_scheduler=plateau,
    ),
    "stopped before its schedule's end": Case(
        lr_scheduler="cosine",
        callbacks=[lambda folder: EarlyStopping("val_loss", min_delta=9, patience=1)],
        epochs=20,
    ),
    "many metrics of yes or no": Case(
        "bce_with_logits",
        metrics=["f1", "auroc", "matthews_corrcoef"],
        net=lambda: make_net(1),
        data=lambda: arrays(X, YES),
    ),
    "averages of yes and no": Case(
        "bce_with_logits", metrics=["f1_macro"], net=lambda: make_net(1), data=lambda: arrays(X, YES)
    ),
    "labels": Case(
        "bce_with_logits", metrics=["accuracy", "f1", "auroc"], data=lambda: arrays(X, F.one_hot(Y, 3).float())
    ),
    "ignored targets": Case(data=lambda: arrays(X, torch.where(torch.arange(45) % 5 == 0, -100, Y))),
    "another ignored target": Case(nn.CrossEntropyLoss(ignore_index=2), metrics=["accuracy", "f1"]),
    "values": Case(
        "mse",
        metrics=["r2", "mae", "rmse", "explained_variance"],
        net=lambda: make_net(1),
        data=lambda: arrays(X, VALUES),
    ),
    "a partial": Case(functools.partial(F.cross_entropy, label_smoothing=0.1), fit={"class_weight": {0: 0.5}}),
    "an accuracy as large as the baseline": Case(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-9),
        net=make_identity,
        data=lambda: arrays(ROWS, ROWS.argmax(1).index_fill(0, torch.tensor([0, 1]), 5)),
        fit={"batch_size": 10, "validation_batch_size": 10, "validation_data": (ROWS, LABELS)},
        callbacks=[lambda folder: EarlyStopping("val_accuracy", baseline=0.8, patience=2)],
        replace={"TensorDataset(x_val, y_val)": "TensorDataset(x, y)"},
        epochs=9,
    ),
    "a loss that is not finite": Case(
        "mse",
        metrics=["mae"],
        net=lambda: make_net(1),
        data=lambda: arrays(torch.where(torch.arange(45)[:, None] == 20, 1e38, X), VALUES),
        callbacks=[lambda folder: TerminateOnNaN()],
    ),
    "a loss that is not finite, in a window": Case(
        "mse",
        metrics=(),
        net=lambda: make_net(1),
        data=lambda: arrays(torch.where(torch.arange(45)[:, None] == 20, 1e38, X), VALUES),
        callbacks=[lambda folder: TerminateOnNaN()],
        gradient_accumulation_steps=4,
    ),
    "no targets": Case(
        square,
        metrics=(),
        data=lambda: arrays(X),
        replace={"loss_fn = ...": "loss_fn = lambda outputs, y: outputs.square().mean()"},
    ),
    "several targets": Case(
        first_target,
        metrics=(),
        data=lambda: nested_loaders([(x, (y, v)) for x, y, v in zip(X, Y, VALUES, strict=True)]),
        replace={"loss_fn = ...": "loss_fn = lambda outputs, y: torch.nn.functional.cross_entropy(outputs, y[0])"},
        differs=False,
    ),
    "names and paths that need care": Case(
        metrics={'a "b" \\d {c} $e': "accuracy", '"""': "accuracy"},
        callbacks=[lambda folder: ModelCheckpoint(str(folder / "{{a}} 'b' $HOME.pt"), save_weights_only=True)],
        saved="{a} 'b' $HOME.pt",
        differs=False,
    ),
    "callbacks of one's own": Case(
        callbacks=[lambda folder: Recorder(), lambda folder: OtherRecorder()],
        replace={"callbacks = ...": "callbacks = [Recorder(), OtherRecorder()]"},
        differs=False,
    ),
    "a loop of one's own": Case(
        loop=Crowded(scale=0.5, teacher=right_share),
        styles=["class"],
        lr_scheduler=step_lr,
        lr_scheduler_interval="step",
        callbacks=[lambda folder: ModelCheckpoint(folder / "last.pt")],
        replace={"teacher = ...": "teacher = lambda outputs, y: (outputs.argmax(1) == y).float().mean()"},
        resume_from="last.pt",
        saved="last.pt",
    ),
    "a function with other names": Case(
        loop=kt.FunctionLoop(train_step=noted_step, eval_step=noted_eval), styles=["function"]
    ),
    "a step without targets": Case(
        square,
        metrics=(),
        data=lambda: arrays(X),
        loop=Unsupervised,
        styles=["class"],
        replace={"loss_fn = ...": "loss_fn = None"},
    ),
}


def load(path):
    """Return the weights of a checkpoint, or the cells of a table, as tensors by name."""
    if path.suffix == ".csv":
        header, *rows = (line.split(";") for line in path.read_text().splitlines())
        return {name: torch.tensor([float(row[i]) for row in rows]) for i, name in enumerate(header)}
    content = torch.load(path, weights_only=True)
    return content.get("model_state_dict", content)


RUNS = [(name, style) for name, case in CASES.items() for style in case.styles]
# Each case in one style, and the styles by turns; all of them in the slow part.
QUICK = {(name, case.styles[i % len(case.styles)]) for i, (name, case) in enumerate(CASES.items())}


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """Each case trained by fit here and, from its ejected file, in one child: {(case, style): ...}."""
    asked = [item.callspec.params for item in request.session.items if item.name.startswith("test_the_ejected_file_eq")]
    runs = QUICK | {(params["name"], params["style"]) for params in asked}
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ejected")
    fits, cases, texts = {}, {}, {}
    for name, case in CASES.items():
        folder = root / re.sub(r"\W+", "_", name)
        folder.mkdir()
        model, history = case.run(folder)
        saved = load(folder / case.saved) if case.saved else None
        fits[name] = (copy.deepcopy(model.net.state_dict()), history.history, saved)
        for style in case.styles:
            path = root / f"{folder.name}_{style}.py"
            texts[name, style] = model.eject(style, path)
            if (name, style) in runs:
                cases[name, style] = case.for_child(path)
    torch.save(cases, root / "cases.pt")
    (root / "child.py.txt").write_text(CHILD)
    command = [sys.executable, str(root / "child.py.txt"), str(root / "cases.pt"), str(root / "results.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"root": root, "fits": fits, "texts": texts, "results": torch.load(root / "results.pt")}


@pytest.mark.parametrize(
    ("name", "style"), [pytest.param(*run, marks=() if run in QUICK else pytest.mark.slow) for run in RUNS]
)
def test_the_ejected_file_equals_fit(trained, name, style):
    weights, history, _ = trained["fits"][name]
    result = trained["results"][name, style]
    assert not isinstance(result, str), result
    for key, value in weights.items():
        torch.testing.assert_close(result["weights"][key], value, rtol=0, atol=0, equal_nan=True, msg=key)
    assert list(result["history"]) == list(history)
    for key, values in history.items():
        for value, expected in zip(result["history"][key], values, strict=True):
            torch.testing.assert_close(
                torch.tensor(value), torch.tensor(expected), rtol=1e-6, atol=1e-9, equal_nan=True
            )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.saved])
def test_the_ejected_file_writes_what_the_callback_writes(trained, name):
    case, (_, _, saved) = CASES[name], trained["fits"][name]
    written = load(case.folder / case.saved)
    assert list(written) == list(saved)
    for key, value in saved.items():
        torch.testing.assert_close(written[key], value, rtol=1e-6, atol=0)


def test_the_cases_differ_from_the_plain_one(trained):
    """A case whose feature does nothing would prove nothing."""
    plain = trained["fits"]["no feature"][0]
    for name, case in CASES.items():
        if case.differs:
            weights = trained["fits"][name][0]
            assert any(key not in weights or not torch.equal(weights[key], value) for key, value in plain.items()), name


def test_ejected_files_are_lint_free_and_formatted(trained):
    for command in ("check", "format --check"):
        arguments = [*command.split(), "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(trained["root"])]
        done = subprocess.run([sys.executable, "-m", "ruff", *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("has_own_steps", [False, True])
def test_ejected_files_pass_mypy(trained, has_own_steps, tmp_path):
    """What is written passes strictly; a user's own step has the types that its author gave it."""
    runs = [(name, style) for name, style in RUNS if ("loop" in CASES[name].compiled) is has_own_steps]
    files = [str(trained["root"] / f"{CASES[name].folder.name}_{style}.py") for name, style in runs]
    strictness = [] if has_own_steps else ["--strict", "--untyped-calls-exclude", "torch"]
    if not hasattr(torch.amp, "__all__"):  # then torch's types leave out what its documentation names
        strictness += [] if has_own_steps else ["--implicit-reexport"]
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--cache-dir", str(tmp_path), *strictness, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("style", STYLES)
def test_the_plain_file_is_a_page(trained, style):
    text = trained["texts"]["plain", style]
    assert len(text.splitlines()) < 150
    for word in ("copy", "scaler", "autocast", "clip_", "window", "_weight", "best", "stop", "checkpoint", "*,"):
        assert word not in text, word


def test_no_file_speaks_of_the_library_that_wrote_it(trained):
    assert not any("kerastorch" in text or "kt." in text for text in trained["texts"].values())


def make_model(**compiled):
    model = kt.Model(nn.Linear(6, 3), "cpu")
    model.compile(**{"loss": "cross_entropy", "optimizer": "sgd", "metrics": ["accuracy"], **compiled})
    return model


def test_the_text_is_written_as_utf_8(tmp_path):
    model = make_model()
    path = tmp_path / "train.py"
    path.write_text("an older file")
    checkpoint = ModelCheckpoint("läufe/best.pt", save_best_only=True)
    text = model.eject("script", path, callbacks=[checkpoint])
    assert path.read_text(encoding="utf-8") == text
    assert 'checkpoint_path: str = "läufe/best.pt"' in text
    assert [one.name for one in tmp_path.iterdir()] == ["train.py"]


def test_a_dollar_and_brackets_in_a_path_stay():
    checkpoint = ModelCheckpoint("$HOME/a (1, 2.pt", save_best_only=True)
    text = make_model().eject("class", callbacks=[checkpoint])
    assert 'checkpoint_path: str = "$HOME/a (1, 2.pt",\n' in text
    compile(text, "train.py", "exec")


@pytest.mark.parametrize("length", [79, 98, 99, 114, 115, 220])
def test_a_long_path_is_broken_into_lines(length, tmp_path):
    path = "folder/" * 30 + "{epoch}.pt"
    path = path[len(path) - length :]
    text = make_model().eject("script", tmp_path / "train.py", callbacks=[ModelCheckpoint(path)])
    assert max(map(len, text.splitlines())) <= 120
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--check",
        "--config",
        str(ROOT / "pyproject.toml"),
        str(tmp_path),
    ]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    space = {}
    exec(text.partition("def save")[0], space)
    assert space["CHECKPOINT_PATH"] == path


def test_many_class_weights_stand_one_a_line():
    text = make_model().eject("script", class_weight=dict.fromkeys(range(50), 1.0))
    assert "CLASS_WEIGHT = {\n    0: 1.0,\n" in text
    assert max(map(len, text.splitlines())) <= 120


def test_callbacks_and_class_weight_are_those_of_the_last_fit():
    model = make_model()
    model.fit(X, Y, validation_data=(X, Y), verbose=0, callbacks=[EarlyStopping(patience=7)], class_weight={0: 2.0})
    text = model.eject("script")
    assert "patience: int = 7" in text
    assert "CLASS_WEIGHT = {0: 2.0}" in text
    text = model.eject("script", callbacks=[], class_weight={})
    assert "patience" not in text
    assert "CLASS_WEIGHT" not in text


def test_an_unknown_style_names_the_near_one():
    with pytest.raises(ValueError, match="'scrip' is not known; did you mean 'script'"):
        make_model().eject("scrip")


def test_it_needs_compile():
    with pytest.raises(RuntimeError, match="call compile"):
        kt.Model(nn.Linear(6, 3), "cpu").eject("script")


class UsesModel(Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


class CountsBatches(Callback):
    def on_train_batch_end(self, batch, logs=None):
        pass


class OwnEpoch(kt.ClassLoop):
    def train_epoch(self):
        pass


class UsesAround(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        return right_share(self.net(x), y), self.net(x)


class UsesSuper(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        return super().train_step(x, y, sample_weight)


class UsesBatch(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        return self.run.batch


REFUSED = {
    "tensorboard": ({}, "script", [TensorBoard("logs")], "TensorBoard: leave it out.*SummaryWriter"),
    "backup": ({}, "script", [BackupAndRestore("backup")], "BackupAndRestore.*ModelCheckpoint"),
    "average": ({}, "script", [EMA()], "EMA.*swa_utils"),
    "plateau callback": ({}, "script", [ReduceLROnPlateau()], 'lr_scheduler="reduce_on_plateau"'),
    "within an epoch": ({}, "script", [ModelCheckpoint("a.pt", save_freq=3)], "save_freq='epoch'"),
    "deleting files": ({}, "script", [ModelCheckpoint("{epoch}.pt", keep_last=3)], "deletes files"),
    "three checkpoints": ({}, "script", [ModelCheckpoint("a.pt"), ModelCheckpoint("b.pt")], "several ModelCheckpoints"),
    "two of a kind": (
        {},
        "script",
        [EarlyStopping(), EarlyStopping("val_accuracy")],
        "two things that need the name 'patience'",
    ),
    "self.model": ({}, "script", [UsesModel()], "uses self.model"),
    "batch hook": ({}, "script", [CountsBatches()], "inside an epoch"),
    "lambda batch hook": ({}, "script", [LambdaCallback(on_batch_end=print)], "inside an epoch"),
    "losses": ({"loss": ["mse", "mse"], "metrics": None}, "script", [], "several losses"),
    "weighted metrics": ({"weighted_metrics": ["accuracy"]}, "script", [], "weighted_metrics"),
    "metrics of two forms": (
        {"metrics": ["auroc", torchmetrics.classification.MulticlassAccuracy(3)]},
        "script",
        [],
        "different forms",
    ),
    "perplexity": ({"metrics": ["perplexity"]}, "script", [], "perplexity"),
    "own loop, other style": ({"loop": Halved()}, "script", [], r"eject\('class'\)"),
    "own function, other style": ({"loop": kt.FunctionLoop(doubled_step)}, "class", [], r"eject\('function'\)"),
    "own loop, accumulation": (
        {"loop": Halved(), "gradient_accumulation_steps": 2},
        "class",
        [],
        "beside accumulation",
    ),
    "own epoch": ({"loop": OwnEpoch()}, "class", [], "OwnEpoch.train_epoch"),
    "a name of around": ({"loop": UsesAround()}, "class", [], "uses 'right_share' of around it"),
    "super": ({"loop": UsesSuper()}, "class", [], "'super'"),
    "a counter": ({"loop": UsesBatch()}, "class", [], "self.run.batch"),
    "lambda": ({"loop": kt.FunctionLoop(lambda run, x, y, sample_weight: None)}, "function", [], "no def"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_written_is_refused_with_the_way_out(name):
    compiled, style, callbacks, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make_model(**compiled).eject(style, callbacks=callbacks)


def test_several_optimizers_are_refused():
    model = kt.Model(nn.Sequential(nn.Linear(6, 3)), "cpu")
    model.compile("cross_entropy", {"0": "sgd"}, loop=Halved())
    with pytest.raises(ValueError, match="several optimizers"):
        model.eject("class")


def test_the_header_builds_the_optimizer_with_its_settings():
    net = nn.Linear(6, 3)
    model = kt.Model(net, "cpu")
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, betas=(0.8, 0.99), weight_decay=0.02, amsgrad=True)
    model.compile(nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=7), optimizer)
    text = model.eject("script")
    assert "torch.optim.AdamW(net.parameters(), lr=0.0003, betas=(0.8, 0.99), weight_decay=0.02, amsgrad=True)" in text
    assert "loss_fn = torch.nn.CrossEntropyLoss(ignore_index=7, label_smoothing=0.1)" in text


def header_of(text):
    doc = ast.get_docstring(ast.parse(text), clean=False)
    return textwrap.dedent(doc.partition(":\n\n")[2])


def test_the_header_is_python_in_every_case(trained):
    for text in trained["texts"].values():
        ast.parse(header_of(text))


def test_the_header_says_what_it_reads(trained):
    said = {
        "plain": "a net and the tensors x, y, x_val, y_val",
        "a split": "a net and the tensors x, y",
        "sample weights": "a net and the tensors x, y, sample_weight, x_val, y_val, sample_weight_val",
        "own loaders": "a net",
        "no targets": "a net and the tensors x, x_val",
    }
    for name, what in said.items():
        assert f"compiled with, for {what}:\n" in trained["texts"][name, "script"]
    lines = header_of(trained["texts"]["plain", "script"]).splitlines()
    assert "loss_fn = torch.nn.CrossEntropyLoss()" in lines
    assert "train_data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)" in lines
    assert "val_data = DataLoader(TensorDataset(x_val, y_val), batch_size=5)" in lines


def unread_names(text):
    """Names that a function of the file is given, or binds, and never reads."""
    unread = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            inside = [one for one in ast.walk(node) if isinstance(one, ast.Name)]
            bound = {one.id for one in inside if isinstance(one.ctx, ast.Store)} | {one.arg for one in node.args.args}
            unread += sorted(bound - {one.id for one in inside if isinstance(one.ctx, ast.Load)} - {"self", "cls"})
    return unread


def test_no_file_has_a_name_that_nothing_reads(trained):
    for (name, style), text in trained["texts"].items():
        if "loop" not in CASES[name].compiled:  # the user's own steps are as they are
            assert unread_names(text) == [], (name, style)


def test_the_users_source_stands_word_for_word(trained):
    text = trained["texts"]["a loop of one's own", "class"]
    for function in (Crowded.loss_of, Crowded.train_step, Crowded.eval_step):
        assert inspect.getsource(function).rstrip() in text
    text = trained["texts"]["a function with other names", "function"]
    assert inspect.getsource(noted_step) in text
    assert "from torch.nn.functional import cross_entropy as ce\n" in trained["texts"]["a loop of one's own", "class"]


def test_compile_forgets_the_fit_before():
    model = make_model()
    model.fit(X, Y, epochs=3, callbacks=EarlyStopping("loss"), class_weight={0: 2.0}, verbose=0)
    model.compile("mse", "sgd")
    text = model.eject("script")
    assert "patience" not in text
    assert "CLASS_WEIGHT" not in text
    assert "epochs = 10" in text


def test_the_header_shows_rates_as_they_were_compiled():
    model = make_model(optimizer="adam", lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.1))
    model.fit(X, Y, epochs=2, verbose=0)
    assert "torch.optim.Adam(net.parameters(), lr=0.001, fused=True)" in model.eject("script")
    assert "torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)" in model.eject("script")


def test_what_the_header_can_not_write_is_marked():
    schedulers = torch.optim.lr_scheduler

    class Mine(torch.optim.SGD):
        pass

    made = {
        "MultiStepLR(optimizer, milestones=[2, 5])": lambda o: schedulers.MultiStepLR(o, [5, 2]),
        "LambdaLR(optimizer, lr_lambda=...)  # your function": lambda o: schedulers.LambdaLR(o, lambda e: 0.5**e),
        "lr_scheduler = ...  # your CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    }
    for expected, factory in made.items():
        assert expected in make_model(lr_scheduler=factory).eject("script")
    assert "optimizer = ...  # your Mine" in make_model(optimizer=lambda p: Mine(p, lr=0.1)).eject("script")
    metrics = [torchmetrics.classification.MulticlassF1Score(3)]
    text = make_model(loss=square, metrics=metrics).eject("script")
    assert "loss_fn = ...  # your square" in text
    assert '"multiclass_f1_score": ...,  # your MulticlassF1Score object' in text


def test_many_parameters_of_a_group_are_packed():
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    model = kt.Model(net, "cpu")
    model.compile("mse", lambda parameters: torch.optim.SGD(list(parameters)[1:], lr=0.1))
    text = model.eject("script")
    assert max(map(len, text.splitlines())) <= 120
    space = {"net": net}
    exec(header_of(text).partition("metrics =")[0], space)
    held = space["optimizer"].param_groups[0]["params"]
    assert [id(one) for one in held] == [id(one) for one in list(net.parameters())[1:]]


def test_parameters_of_the_loss_are_in_the_header():
    class Center(nn.Module):
        def __init__(self):
            super().__init__()
            self.center = nn.Parameter(torch.zeros(3))

        def forward(self, outputs, y):
            return F.cross_entropy(outputs + self.center, y)

    assert "torch.optim.Adam([*net.parameters(), *loss_fn.parameters()]" in make_model(
        loss=Center(), optimizer="adam", metrics=None
    ).eject("script")
    text = make_model(loss=Center(), optimizer="adam", metrics=None, param_groups={"bias": {"lr": 0.1}}).eject("script")
    assert 'loss_parameters["center"]' in text


def shadow_pow(value):
    return value**2


class TakesPow(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        return pow(self.net(x)), None


TakesPow.train_step.__globals__["pow"] = shadow_pow
CRITERION = nn.CrossEntropyLoss()


class TakesObject(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        return CRITERION(self.net(x), y), None


class ChangesItself(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        self.count = 1
        return self.loss_fn(self.net(x), y), None


class HandsRunOn(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        return print(self.run), None


def make_step(alpha):
    def step(run, x, y, sample_weight):
        return alpha * run.loss_fn(run.net(x), y), None

    return step


class Helps(Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.report()

    def report(self):
        me = self
        return me.run


STEPS_REFUSED = {
    "a function under a builtin's name": ({"loop": TakesPow()}, "class", "'pow' of around it"),
    "an object of the module": ({"loop": TakesObject()}, "class", "'CRITERION' of around it"),
    "state": ({"loop": ChangesItself()}, "class", "changes self.count"),
    "run handed on": ({"loop": HandsRunOn()}, "class", "hands self.run on"),
    "a closure": ({"loop": kt.FunctionLoop(make_step(0.5))}, "function", "'alpha' of around it"),
}


@pytest.mark.parametrize("name", STEPS_REFUSED)
def test_steps_that_can_not_go_along_are_refused(name):
    compiled, style, message = STEPS_REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make_model(**compiled).eject(style)


def test_callbacks_and_class_weight_are_checked_as_fit_does():
    model = make_model()
    with pytest.raises(TypeError, match=r"callbacks\[0\] must be"):
        model.eject("script", callbacks=[3])
    with pytest.raises(TypeError, match="is the class EarlyStopping"):
        model.eject("script", callbacks=EarlyStopping)
    with pytest.raises(ValueError, match="class_weight takes"):
        model.eject("script", class_weight={"cat": 2.0})
    with pytest.raises(ValueError, match=r"'val_acuracy'.*did you mean 'accuracy'"):
        model.eject("script", callbacks=EarlyStopping("val_acuracy", mode="max"))
    with pytest.raises(ValueError, match=r"\{val_acc\}"):
        model.eject("script", callbacks=ModelCheckpoint("{val_acc}.pt"))
    with pytest.raises(ValueError, match=r"Helps.report\(\), which uses me.run"):
        model.eject("script", callbacks=Helps())
    model.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match="got no validation data"):
        model.eject("script", callbacks=EarlyStopping())


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x, more):
        return self.layer(x)


def test_data_that_the_file_could_not_take_is_refused():
    batches = {
        "nested": [((x, {"b": x}), y) for x, y in zip(X, Y, strict=True)],
        "strings": [((x, "name"), y) for x, y in zip(X, Y, strict=True)],
    }
    for rows in batches.values():
        model = kt.Model(Pairs(), "cpu")
        model.compile("cross_entropy", "sgd")
        model.fit(DataLoader(rows, 8), verbose=0)
        with pytest.raises(ValueError, match="such inputs"):
            model.eject("script")
    model = make_model(gradient_accumulation_steps=2)
    model.fit(((x[None], y[None]) for x, y in zip(X, Y, strict=True)), verbose=0)
    with pytest.raises(ValueError, match="unknown length"):
        model.eject("script")


def test_the_needs_of_callbacks_of_ones_own_are_told(trained):
    text = trained["texts"]["callbacks of one's own", "script"]
    header = re.sub(r"\n *# ", " ", header_of(text))
    assert "OtherRecorder: on_train_begin({}), on_epoch_begin(epoch, {}), on_epoch_end(epoch, logs)" in header
    assert 'if hasattr(callback, "on_train_begin"):' in text
    assert 'if hasattr(callback, "on_epoch_end"):' not in text  # both have it


@pytest.mark.parametrize("style", STYLES)
def test_a_loss_that_is_not_finite_can_be_an_error(style, monkeypatch):
    model = kt.Model(nn.Linear(6, 1), "cpu")
    model.compile("mse", "sgd")
    x = X.index_fill(0, torch.tensor(20), 1e38)
    with pytest.raises(RuntimeError, match="Epoch 1, batch"):
        model.fit(x, VALUES, callbacks=TerminateOnNaN(raise_error=True), verbose=0)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # no thread of its own
    module = types.ModuleType("ejected")
    monkeypatch.setitem(sys.modules, "ejected", module)
    text = model.eject(style)
    exec(compile(text, "ejected.py", "exec"), vars(module))
    with pytest.raises(RuntimeError, match="Epoch 1: the loss is not finite"):
        exec(header_of(text), {**vars(module), "net": nn.Linear(6, 1), "x": x, "y": VALUES})
