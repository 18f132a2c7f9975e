"""eject: the file written out trains to the same weights, to the bit, as fit, in a process without kerastorch."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
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
from kerastorch.eject import STYLES, eject_model

ROOT = Path(kt.__file__).parent.parent
EPOCHS = 4
GENERATOR = torch.Generator().manual_seed(1)
X, X2 = torch.randn(45, 6, generator=GENERATOR), torch.randn(45, 6, generator=GENERATOR)
Y = torch.randint(0, 3, (45,), generator=GENERATOR)
W = torch.rand(45, generator=GENERATOR) + 0.5
YES = (Y > 1).float()[:, None]
VALUES = X.sum(1, keepdim=True)

# What the child does with each case: the lines at the top of the file build what train() takes, `extra` the rest.
CHILD = """
import importlib.util, math, re, sys, textwrap
sys.modules["kerastorch"] = None
import torch, torchmetrics
torch.set_num_threads(1)

class Recorder:
    def on_epoch_end(self, epoch, logs):
        logs["twice"] = 2 * logs["loss"]
    def on_train_begin(self):
        pass

results = {}
for name, case in torch.load(sys.argv[1], weights_only=False).items():
    spec = importlib.util.spec_from_file_location("ejected", case["path"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = textwrap.dedent(module.__doc__.split(":\\n\\n", 1)[1])
    recipe = re.sub(r"epochs = \\d+", f"epochs = {case['epochs']}", recipe)
    # The loaders are the case's own.
    recipe = re.sub(r"^(train|val)_data = .*", "", recipe, flags=re.M)
    for old, new in case["replace"].items():
        assert old in recipe, (name, old, recipe)
        recipe = recipe.replace(old, new)
    known = {"torch": torch, "nn": torch.nn, "torchmetrics": torchmetrics, "math": math, **vars(module)}
    known |= {"callbacks": [Recorder()], "schedule": lambda epoch, lr: 0.1 / (epoch + 1)}
    known |= {"unpack": lambda batch: (batch["x"], batch["y"]), **case["data"]}
    torch.manual_seed(2)
    runs = [case["epochs"]] if case["resume_from"] is None else [case["epochs"] // 2, case["epochs"]]
    for i, epochs in enumerate(runs):
        space = {**known, "net": torch.load(case["net"], weights_only=False)}
        text = recipe
        if i:
            text = text.replace(", epochs", f", epochs, resume_from={case['resume_from']!r}")
        if len(runs) > 1:
            text = re.sub("train\\\\((.*?), epochs", rf"train(\\1, {epochs}", text, flags=re.S)
        exec(text, space)
        torch.manual_seed(1000)  # a resumed run does not live on the seed of the one before
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


def loaders(*columns):
    rows = TensorDataset(*columns)
    return DataLoader(rows, 8, shuffle=True), DataLoader(TensorDataset(*(column[:13] for column in columns)), 5)


def nested_loaders(rows):
    return DataLoader(rows, 8, shuffle=True), DataLoader(rows[:13], 5)


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

    def run(self, folder, **compiled):
        train, val = self.data() if self.data is not None else loaders(X, Y)
        net = self.net()
        torch.save(net, folder / "net.pt")
        self.folder, self.loaders = folder, {"train_data": train, "val_data": val}
        model = kt.Model(net, "cpu")
        model.compile(self.loss, self.optimizer, list(self.metrics), **{**self.compiled, **compiled})
        torch.manual_seed(2)
        callbacks = [make(folder) for make in self.callbacks]
        fit = {"validation_data": val, "callbacks": callbacks, **self.fit_arguments}
        history = model.fit(train, epochs=self.epochs, verbose=0, **fit)
        return model, history

    def for_child(self, path):
        resume = self.resume_from and str(self.folder / self.resume_from)
        data = {**self.loaders, **({"val_data": None} if "validation_data" in self.fit_arguments else {})}
        return {
            "path": str(path),
            "net": str(self.folder / "net.pt"),
            "data": data,
            "replace": self.replace,
            "resume_from": resume,
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
        data=lambda: loaders(X, YES),
        fit={"class_weight": {1: 3.0}},
    ),
    "class weights, one-hot": Case(
        data=lambda: loaders(X, F.one_hot(Y, 3).float()),
        fit={"class_weight": {0: 0.5, 1: 3.0}},
    ),
    "scores of yes or no": Case(
        "bce_with_logits",
        metrics=["accuracy", "auroc", "f1"],
        net=lambda: make_net(1),
        data=lambda: loaders(X, YES),
    ),
    "a loss of one's own, weighted": Case(
        loss_of_each,
        metrics=[right_share],
        data=lambda: loaders(X, Y, W),
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
    "sample weights": Case(data=lambda: loaders(X, Y, W)),
    "sample weights of values": Case(
        "mse", metrics=["mae", "rmse"], net=lambda: make_net(1), data=lambda: loaders(X, VALUES, W)
    ),
    "both weights": Case(data=lambda: loaders(X, Y, W), fit={"class_weight": {0: 0.5, 1: 3.0}}),
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
    "unpack": Case(data=dicts, unpack=lambda batch: (batch["x"], batch["y"]), differs=False),
    "many metrics": Case(
        metrics=["accuracy", "f1", "auroc", "confusion_matrix"],
        differs=False,
    ),
    "a metric of one's own": Case(
        metrics=[right_share, torchmetrics.classification.MulticlassF1Score(3, average="micro")],
        replace={
            "MeanOf(...),  # your right_share": "MeanOf(lambda outputs, y: (outputs.argmax(1) == y).float().mean()),",
            "...,  # your MulticlassF1Score": "torchmetrics.classification.MulticlassF1Score(3, average='micro'),  #",
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
}


def load(path):
    """Return the weights of a checkpoint, or the cells of a table, as tensors by name."""
    if path.suffix == ".csv":
        header, *rows = (line.split(";") for line in path.read_text().splitlines())
        return {name: torch.tensor([float(row[i]) for row in rows]) for i, name in enumerate(header)}
    content = torch.load(path, weights_only=True)
    return content.get("model_state_dict", content)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each case trained by fit here and, from its ejected file, in one child: {(case, style): ...}."""
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
            cases[name, style] = case.for_child(path)
    torch.save(cases, root / "cases.pt")
    (root / "child.py.txt").write_text(CHILD)
    command = [sys.executable, str(root / "child.py.txt"), str(root / "cases.pt"), str(root / "results.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"root": root, "fits": fits, "texts": texts, "results": torch.load(root / "results.pt")}


RUNS = [(name, style) for name, case in CASES.items() for style in case.styles]


@pytest.mark.parametrize(("name", "style"), RUNS)
def test_the_ejected_file_equals_fit(trained, name, style):
    weights, history, _ = trained["fits"][name]
    result = trained["results"][name, style]
    for key, value in weights.items():
        assert torch.equal(result["weights"][key], value), key
    assert list(result["history"]) == list(history)
    for key, values in history.items():
        for value, expected in zip(result["history"][key], values, strict=True):
            torch.testing.assert_close(torch.tensor(value), torch.tensor(expected), rtol=1e-6, atol=1e-9)


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
        done = subprocess.run([sys.executable, "-m", "ruff", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("has_own_steps", [False, True])
def test_ejected_files_pass_mypy(trained, has_own_steps, tmp_path):
    """What is written passes strictly; a user's own step has the types that its author gave it."""
    runs = [(name, style) for name, style in RUNS if ("loop" in CASES[name].compiled) is has_own_steps]
    files = [str(trained["root"] / f"{CASES[name].folder.name}_{style}.py") for name, style in runs]
    strictness = [] if has_own_steps else ["--strict", "--untyped-calls-exclude", "torch"]
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--cache-dir", str(tmp_path), *strictness, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
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


def test_a_long_path_is_broken_into_lines(tmp_path):
    path = "/".join(["folder"] * 30) + "/{epoch}.pt"
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
    assert subprocess.run(command, capture_output=True).returncode == 0
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


class Logs(kt.ClassLoop):
    def train_step(self, x, y, sample_weight):
        self.log(one=1.0)


REFUSED = {
    "tensorboard": ({}, "script", [TensorBoard("logs")], "TensorBoard: leave it out.*SummaryWriter"),
    "backup": ({}, "script", [BackupAndRestore("backup")], "BackupAndRestore.*ModelCheckpoint"),
    "average": ({}, "script", [EMA()], "EMA.*swa_utils"),
    "plateau callback": ({}, "script", [ReduceLROnPlateau()], 'lr_scheduler="reduce_on_plateau"'),
    "within an epoch": ({}, "script", [ModelCheckpoint("a.pt", save_freq=3)], "save_freq='epoch'"),
    "deleting files": ({}, "script", [ModelCheckpoint("{epoch}.pt", keep_last=3)], "deletes files"),
    "three checkpoints": ({}, "script", [ModelCheckpoint("a.pt"), ModelCheckpoint("b.pt")], "several ModelCheckpoints"),
    "two of a kind": ({}, "script", [EarlyStopping(), EarlyStopping("val_accuracy")], "two callbacks"),
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
    "log": ({"loop": Logs()}, "class", [], "self.log"),
    "lambda": ({"loop": kt.FunctionLoop(lambda run, x, y, sample_weight: None)}, "function", [], "no def"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_written_is_refused_with_the_way_out(name):
    compiled, style, callbacks, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        eject_model(make_model(**compiled), style, callbacks=callbacks)


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
