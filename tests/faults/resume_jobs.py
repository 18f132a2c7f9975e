"""Training scripts to kill and start again: 96 samples, 6 steps an epoch, 4 epochs, shuffled, dropout, Adam, StepLR.

start() is one life of such a script, everything made anew. Run as a program this file forks a process for each job
that it reads from stdin, so that many real processes can be killed for the price of one import of torch.
"""

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset

import kerastorch as kt
from kerastorch import checkpoint
from kerastorch.callbacks import BackupAndRestore, Callback, ModelCheckpoint
from kerastorch.device import get_cpu_random_state

ROWS, BATCH, STEPS = 96, 16, 6


class Death(Exception):
    """Stands in for a kill where the process has to live on."""


class Pictures(Dataset[tuple[Tensor, int]]):
    """Rows whose column 0 tells which they are; draws: the generators that each row's noise comes from."""

    def __init__(self, *draws: str, rows: int = ROWS, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, 8, generator=generator)
        self.y = self.x[:, 1:4].argmax(1)
        self.x[:, 0] = torch.arange(rows) / ROWS
        self.draws = draws

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x = self.x[i].clone()
        if "python" in self.draws:
            x[1] += random.random()
        if "numpy" in self.draws:
            x[2] += float(np.random.rand())
        if "torch" in self.draws:
            x[3:] += torch.rand(5)
        return x, int(self.y[i])


def shuffled(*draws: str, **settings: Any) -> Callable[[], DataLoader[Any]]:
    """Return a maker of the loader that most scripts have."""
    return lambda: DataLoader(Pictures(*draws), **{"batch_size": BATCH, "shuffle": True, **settings})


def held_out() -> DataLoader[Any]:
    return DataLoader(Pictures(rows=40, seed=2), batch_size=BATCH)


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


@dataclass
class Job:
    """data, net, callbacks(folder): called in each life.   compile, fit: arguments beside the usual ones.

    warns: what fit warns of when it is resumed inside an epoch.
    """

    data: Callable[[], Any] = field(default_factory=shuffled)
    net: Callable[[], nn.Module] = make_net
    compile: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    validation_data: Callable[[], Any] | None = held_out
    callbacks: Callable[[Path], list[Callback]] = lambda folder: []
    warns: str | None = None


class Recorder(Callback):
    """What each step was, as numbers that can be compared with ==; the random states at the end."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []
        self.random_state: dict[str, Any] = {}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        run = self.run
        x = run.x["x"] if isinstance(run.x, dict) else run.x
        rows = (x[:, 0] * ROWS).round().int().tolist()
        rates = [float(group["lr"]) for group in run.optimizer.param_groups]
        momenta = [group.get("momentum") or group.get("betas", (0,))[0] for group in run.optimizer.param_groups]
        self.steps.append((run.epoch, batch, run.step, run.loss.item(), rates, momenta, rows))

    def on_train_end(self, logs: Any = None) -> None:
        self.random_state = get_cpu_random_state()


class Dies(Callback):
    """Calls die() when `hook` comes for the count-th time; on_train_batch_end comes before that step's save."""

    def __init__(self, hook: str, count: int, die: Callable[[], None]) -> None:
        self.count, self.die, self.calls = count, die, 0
        setattr(self, hook, self._called)

    def _called(self, *arguments: Any) -> None:
        self.calls += 1
        if self.calls == self.count:
            self.die()


@dataclass
class Result:
    """What a finished life leaves."""

    weights: dict[str, Any]
    optimizer: dict[str, Any]
    history: dict[str, Any]
    epochs: list[int]
    all_history: dict[str, Any]
    all_epochs: list[int]
    steps: list[tuple[Any, ...]]
    random_state: dict[str, Any]
    callbacks: list[Callback] = field(default_factory=list)
    model: Any = None


def raise_death() -> None:
    raise Death


def make_saver(folder: Path, save_freq: int | str, kind: str = "ModelCheckpoint", **settings: Any) -> Callback:
    if kind == "BackupAndRestore":
        return BackupAndRestore(folder / "backup", save_freq, **{"delete_checkpoint": False, **settings})
    name = "run-{epoch:02d}.pt" if save_freq == "epoch" else "run-{epoch:02d}-{batch:02d}.pt"
    return ModelCheckpoint(folder / name, save_freq=save_freq, **{"keep_last": 2, **settings})


class SavesAt(ModelCheckpoint):
    """A file for each of these counts of batches since the life began, and no others."""

    def __init__(self, filepath: Path, batches: set[int]) -> None:
        super().__init__(filepath, save_freq=1)
        self.batches = batches

    def save(self, moment: Any, logs: Any) -> None:
        if moment == "step" and self.run.batches_seen in self.batches:
            super().save(moment, logs)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_model(job: Job, loop: str = "script") -> kt.Model:
    model = kt.Model(job.net(), device="cpu")
    arguments: dict[str, Any] = {
        "loss": "cross_entropy",
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        "metrics": ["accuracy"],
        "lr_scheduler": lambda optimizer: StepLR(optimizer, 2, 0.5),
        "loop": loop,
        **job.compile,
    }
    model.compile(**arguments)
    return model


def start(
    job: Job,
    folder: Path,
    savers: list[Callback] | Callback | None = None,
    *,
    seed: int = 0,
    dies: Callback | None = None,
    resume: Any = None,
    loop: str = "script",
    model: kt.Model | None = None,
    **arguments: Any,
) -> Result:
    """Run a script from its first line to its end."""
    if model is None:
        seed_all(seed)
        model = make_model(job, loop)
    data = job.data()
    recorder = Recorder()
    callbacks = [recorder, *job.callbacks(folder)]
    callbacks += [dies] if dies is not None else []
    callbacks += savers if isinstance(savers, list) else [savers] if savers is not None else []
    validation = {"validation_data": job.validation_data()} if job.validation_data is not None else {}
    x, y = data if isinstance(data, tuple) else (data, None)
    history = model.fit(
        x,
        y,
        **{"epochs": 4, "verbose": 0, "callbacks": callbacks, "resume": resume} | validation | job.fit | arguments,
    )
    return Result(
        weights={name: part.clone() for name, part in model.net.state_dict().items()},
        optimizer=model._compiled.optimizer.state_dict(),
        history=history.history,
        epochs=history.epoch,
        all_history=model.history.history,
        all_epochs=model.history.epoch,
        steps=recorder.steps,
        random_state=recorder.random_state,
        callbacks=callbacks,
        model=model,
    )


# ---- real processes ----

JOBS: dict[str, Callable[[], Job]] = {
    "plain": Job,
    "transforms": lambda: Job(data=shuffled("python", "numpy", "torch")),
    "workers": lambda: Job(data=shuffled("python", "numpy", "torch", num_workers=2)),
    "long": lambda: Job(fit={"epochs": 12}, callbacks=lambda folder: [kt.callbacks.CSVLogger(folder / "log.csv")]),
}


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class StepPipe(Callback):
    """Writes a byte when a step begins."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        os.write(self.descriptor, b".")


def kill_inside_write(count: int, kind: str) -> None:
    """Let this process die in its count-th buffer, half of it written, or before its count-th call that syncs, renames
    or deletes a file.
    """
    done = 0

    def is_last() -> bool:
        nonlocal done
        done += 1
        return done == count

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            if kind == "call" and is_last():
                kill_self()
            return function(*arguments, **settings)

        return call

    def half(writer: Any, data: Any) -> int:
        if kind == "buffer" and is_last():
            view = memoryview(data).cast("B")
            writer.file.write(view[: len(view) // 2])
            kill_self()
        return whole(writer, data)

    whole = checkpoint._WholeWriter.write
    checkpoint._WholeWriter.write = half
    os.fsync, os.replace, Path.unlink = killing(os.fsync), killing(os.replace), killing(Path.unlink)


def live(order: dict[str, Any], pipe: int | None = None) -> None:
    """Do one job in this process, which it may not survive; what it leaves goes to result.pt."""
    torch.set_num_threads(1)
    folder = Path(order["folder"])
    if order.get("inside"):
        kill_inside_write(*order["inside"])
    dies = None
    if order.get("step"):
        dies = Dies("on_train_batch_end", order["step"], kill_self)
    elif pipe is not None:
        dies = StepPipe(pipe)
    saver = make_saver(folder, order["save_freq"], order.get("saver", "ModelCheckpoint"), **order.get("settings", {}))
    resume = None if order.get("saver") == "BackupAndRestore" else True
    result = start(
        JOBS[order["job"]](),
        folder,
        saver,
        dies=dies,
        resume=resume,
        loop=order.get("loop", "script"),
        seed=order["seed"],
    )
    names = ("weights", "optimizer", "history", "epochs", "all_history", "all_epochs", "steps", "random_state")
    torch.save({name: getattr(result, name) for name in names}, folder / "result.pt")


def fork(order: dict[str, Any]) -> int:
    """Do a job in a process of its own; return its exit status, -9 where it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            live(order, writer if "after" in order else None)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    if "after" in order:
        steps, seconds = order["after"]
        for _ in range(steps):
            select.select([reader], [], [])
            if not os.read(reader, 1):
                break
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    return os.waitstatus_to_exitcode(status)


class Forks:
    """A process that has imported torch and forks one for each job."""

    def __init__(self) -> None:
        known = "ignore:Detected call of `lr_scheduler.step()` before"  # test_t2_dead_at_any_step asks for its absence
        command = [sys.executable, "-W", "error", "-W", known, __file__]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, start_new_session=True, **pipes)

    def __call__(self, folder: Path, **order: Any) -> int:
        """Return the exit status of the job, -9 where it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        folder.mkdir(exist_ok=True)
        json.dump({"folder": str(folder), "seed": 0, **order}, self.process.stdin)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], 60)[0]:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise TimeoutError(f"no end of {order} in a minute")
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed
            self.process.stdin.write("null\n")  # its end alone would not do: workers that were forked here hold it open
            self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(60) == 0


def orders() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        order = json.loads(line)
        if order is None:
            return
        yield order


if __name__ == "__main__":
    torch.set_num_threads(1)
    start(Job(), Path())  # what the first fit imports need not be imported in each child
    for order in orders():
        print(fork(order), flush=True)
