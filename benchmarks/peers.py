# mypy: disable-error-code="import-not-found,import-untyped,misc,no-any-return"
"""kerastorch against the other trainers that are installed, each in its ordinary way of use: same nets, same data.

python benchmarks/peers.py [--rounds 5] [--threads 1] [--only WORD] [--json FILE] [--chart FILE]
pip install poutyne torchkeras keras lightning skorch pytorch-ignite accelerate transformers fastai datasets ipython

Loss and accuracy are on, the bar is on and draws into nowhere; there are no checkpoints and no loggers, but for
torchkeras, which always writes one. Each trainer has a process of its own, and they take turns: a turn is one call, of
several epochs, after some that warm up. The optimizer is Adam, fused wherever the trainer takes torch's. A ratio above
1 is slower than kerastorch.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from timing import Clocks, Nowhere, Tables, compare, machine, make_parser, settle, show, timed, write
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training import conv_net, fused_adam, make_data, make_model, mlp, tiny_mlp, train_by_hand

Loader = DataLoader[Any]
Fit = Callable[[], object]

EPOCHS = 3
WORKS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...], int]] = {  # net, rows, shape of one, batch size
    "tiny MLP, batch 32": (tiny_mlp, 8192, (20,), 32),
    "MLP 784-256-10, batch 64": (partial(mlp, 784, 256, 10), 4800, (1, 28, 28), 64),
    "conv net, batch 64": (conv_net, 960, (1, 28, 28), 64),
}


# ---- each returns what a turn calls: fit over EPOCHS of the loader ----


def by_hand(net: nn.Module, loader: Loader) -> Fit:
    epoch = train_by_hand(net, loader)
    return lambda: [epoch() for _ in range(EPOCHS)]


def kerastorch(net: nn.Module, loader: Loader) -> Fit:
    return partial(make_model(net).fit, loader, epochs=EPOCHS, verbose=1)


def poutyne(net: nn.Module, loader: Loader) -> Fit:
    from poutyne import Model

    model = Model(net, fused_adam(net.parameters()), "cross_entropy", batch_metrics=["accuracy"])
    return lambda: model.fit_generator(loader, epochs=EPOCHS)


def torchkeras(net: nn.Module, loader: Loader) -> Fit:
    from torchkeras import KerasModel
    from torchmetrics import Accuracy

    optimizer, path = fused_adam(net.parameters()), os.path.join(tempfile.mkdtemp(), "checkpoint")

    def fit() -> object:
        metrics = {"acc": Accuracy(task="multiclass", num_classes=10)}
        model = KerasModel(net, nn.CrossEntropyLoss(), metrics, optimizer)
        return model.fit(loader, epochs=EPOCHS, ckpt_path=path, monitor="train_loss", plot=False, cpu=True)

    return fit


def keras(net: nn.Module, loader: Loader) -> Fit:
    """The same net out of Keras's layers."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.config.set_image_data_format("channels_first")
    model = keras.Sequential([keras.Input(loader.dataset[0][0].shape)])
    for layer in net.children():
        if isinstance(layer, nn.Linear):
            model.add(keras.layers.Dense(layer.out_features))
        elif isinstance(layer, nn.Conv2d):
            model.add(keras.layers.Conv2D(layer.out_channels, 3, padding="same"))
        else:
            twins = {nn.Flatten: keras.layers.Flatten, nn.ReLU: keras.layers.ReLU, nn.MaxPool2d: keras.layers.MaxPool2D}
            model.add(twins[type(layer)]())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return lambda: model.fit(loader, epochs=EPOCHS, verbose=1)


def lightning(net: nn.Module, loader: Loader) -> Fit:
    import lightning as L
    from lightning.pytorch.callbacks import TQDMProgressBar
    from torchmetrics import Accuracy

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss_fn = net, nn.CrossEntropyLoss()
            self.accuracy = Accuracy(task="multiclass", num_classes=10)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            outputs = self.net(x)
            loss = self.loss_fn(outputs, y)
            self.accuracy(outputs, y)
            self.log_dict({"loss": loss, "accuracy": self.accuracy}, prog_bar=True, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return fused_adam(self.parameters())

    module = Module()

    def fit() -> None:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            callbacks=[TQDMProgressBar()],  # faster than the one that it takes where rich is installed
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)

    return fit


def fastai(net: nn.Module, loader: Loader) -> Fit:
    import fastai.callback.progress  # noqa: F401 - it gives every Learner a bar
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import OptimWrapper

    data: Any = loader.dataset
    nothing = DataLoader(TensorDataset(*data[:0]))  # to validate on
    learner = Learner(
        DataLoaders(loader, nothing),
        net,
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.Adam, fused=True),
        metrics=accuracy,
    )
    learner.recorder.train_metrics, learner.recorder.valid_metrics = True, False
    return lambda: learner.fit(EPOCHS, lr=1e-3)


def skorch(net: nn.Module, loader: Loader) -> Fit:
    from skorch import NeuralNetClassifier
    from skorch.callbacks import EpochScoring, ProgressBar

    data: Any = loader.dataset
    x, y = data.tensors
    classifier = NeuralNetClassifier(
        net,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        optimizer__fused=True,
        lr=1e-3,  # Adam's own; skorch's is 0.01, with which a net soon has other activations, and other speed
        max_epochs=EPOCHS,
        batch_size=loader.batch_size,
        iterator_train__shuffle=True,
        train_split=None,
        callbacks=[EpochScoring("accuracy", lower_is_better=False, on_train=True, name="train_acc"), ProgressBar()],
    )
    classifier.initialize()
    return lambda: classifier.partial_fit(x, y.numpy())


def ignite(net: nn.Module, loader: Loader) -> Fit:
    from ignite.engine import create_supervised_trainer
    from ignite.handlers import ProgressBar
    from ignite.metrics import Accuracy, Average

    trainer = create_supervised_trainer(
        net,
        fused_adam(net.parameters()),
        nn.CrossEntropyLoss(),
        output_transform=lambda x, y, outputs, loss: (loss.item(), outputs, y),
    )
    Average(output_transform=lambda output: output[0]).attach(trainer, "loss")
    Accuracy(output_transform=lambda output: output[1:]).attach(trainer, "accuracy")
    ProgressBar(persist=True).attach(trainer, output_transform=lambda output: {"loss": output[0]})
    return lambda: trainer.run(loader, max_epochs=EPOCHS)


def accelerate(net: nn.Module, loader: Loader) -> Fit:
    """The loop by hand, as Accelerate's guide has it, with a bar."""
    from accelerate import Accelerator
    from accelerate.utils import tqdm

    accelerator, loss_fn = Accelerator(cpu=True), nn.CrossEntropyLoss()
    net, optimizer, batches = accelerator.prepare(net, fused_adam(net.parameters()), loader)

    def fit() -> None:
        for _ in range(EPOCHS):
            net.train()
            loss_sum, correct = torch.zeros(()), torch.zeros(())
            for x, y in tqdm(batches):
                outputs = net(x)
                loss = loss_fn(outputs, y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                loss_sum += loss.detach() * len(y)
                correct += (outputs.argmax(1) == y).sum()
            print(float(loss_sum), float(correct))

    return fit


class Named(Dataset[dict[str, Tensor]]):
    """The rows as the HF Trainer takes them."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.rows[index]
        return {"x": x, "labels": y}


class WithLoss(nn.Module):
    """A net as the HF Trainer takes it; it counts what is correct, since the Trainer has no metric in training."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.correct = net, torch.zeros(())

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.net(x)
        self.correct += (outputs.argmax(1) == labels).sum()
        return {"loss": nn.functional.cross_entropy(outputs, labels), "logits": outputs}


def transformers(net: nn.Module, loader: Loader) -> Fit:
    from transformers import Trainer, TrainingArguments

    model = WithLoss(net)
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        per_device_train_batch_size=loader.batch_size,
        num_train_epochs=EPOCHS,
        report_to="none",
        save_strategy="no",
        logging_strategy="epoch",
    )
    return lambda: Trainer(model, settings, train_dataset=Named(loader.dataset)).train()


TRAINERS: dict[str, Callable[[nn.Module, Loader], Fit]] = {
    "kerastorch": kerastorch,  # first, as what the others are measured against
    "by hand": by_hand,
    "poutyne": poutyne,
    "torchkeras": torchkeras,
    "keras": keras,
    "lightning": lightning,
    "fastai": fastai,
    "skorch": skorch,
    "ignite": ignite,
    "accelerate": accelerate,
    "transformers": transformers,
}


# ---- a process for each, which trains when it is told ----


def serve(name: str, threads: int, connection: Connection) -> None:
    """For each name of a work that comes in, have a turn at it and send back its clocks, or what went wrong."""
    sys.stdout = sys.stderr = Nowhere()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    settle(threads)
    fits: dict[str, Fit] = {}
    while work := connection.recv():
        try:
            if work not in fits:
                torch.manual_seed(0)
                make_net, n, shape, batch_size = WORKS[work]
                loader = DataLoader(TensorDataset(*make_data(n, *shape)), batch_size, shuffle=True)
                fits[work] = TRAINERS[name](make_net(), loader)
            connection.send(timed(fits[work]))
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


def start(name: str, threads: int) -> Connection:
    """Return the line to a trainer's new process, which ends with this one."""
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.Process(target=serve, args=(name, threads, theirs), daemon=True).start()
    return ours


def have_turn(connection: Connection, work: str) -> Clocks:
    """Return the clocks of a turn; RuntimeError if it failed."""
    connection.send(work)
    answer = connection.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def main() -> None:
    """Print a table for each work, fastest first, and kerastorch's lead over the best of the others."""
    arguments = make_parser(__doc__, rounds=5).parse_args()
    settle(arguments.threads)
    multiprocessing.set_start_method("spawn")
    connections = {}
    for name in TRAINERS:
        if name == "by hand" or importlib.util.find_spec(name):
            connections[name] = start(name, arguments.threads)
        else:
            print(f"{name} is not installed: skipped")
    print(f"{machine()}, median of {arguments.rounds} interleaved calls of fit, {EPOCHS} epochs each")
    tables: Tables = {}
    for work in WORKS:
        if arguments.only not in work:
            continue
        turns = {}
        for name, connection in connections.items():
            turns[name] = partial(have_turn, connection, work)
            try:
                turns[name]()
            except RuntimeError as error:
                print(f"{name} can't do it: skipped ({error})")
                del turns[name]
        figures = compare(turns, arguments.rounds)
        tables[work] = dict(sorted(figures.items(), key=lambda pair: pair[1].ratio))
        show(work, tables[work])
        others = [figure.ratio for name, figure in figures.items() if name not in ("by hand", "kerastorch")]
        if others:
            print(f"  kerastorch is {min(others):.2f}x as fast as the fastest of the others")
    write(arguments, tables)


if __name__ == "__main__":
    main()
