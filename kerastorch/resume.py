"""A run's whole state as the content of a checkpoint, and a run taken up from one. Sisters: checkpoint.py, run.py."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from kerastorch.checkpoint import CheckpointError, check_plain, newest_first, read_checkpoint
from kerastorch.device import get_random_state, set_random_state

if TYPE_CHECKING:
    from kerastorch.callbacks.callback import Callback, Checkpointer
    from kerastorch.run import Run


def get_content(run: Run, loss: float) -> dict[str, Any]:
    """Return all that an exact resume of run needs: the usual recipe's four keys, then the rest; live tensors.

    epoch: index of the last finished epoch, -1 before that.   loss: the epoch's loss so far.
    model_state_dict: what the run publishes; where that is an average, training_model_state_dict is beside it.
    """
    content: dict[str, Any] = {
        "epoch": run.epochs_done - 1,
        "model_state_dict": run.published_state_dict(),
        "optimizer_state_dict": run.optimizer.state_dict(),
        "loss": loss,
    }
    if run.averaged_net is not None:
        content["training_model_state_dict"] = bare_module(run.net).state_dict()
    if run.lr_scheduler is not None:
        content["lr_scheduler_state_dict"] = run.lr_scheduler.state_dict()
    if run.scaler.is_enabled():
        content["scaler_state_dict"] = run.scaler.state_dict()
    if isinstance(run.loss_fn.fn, nn.Module) and run.loss_fn.fn.state_dict():
        content["loss_state_dict"] = run.loss_fn.fn.state_dict()
    writers = run.callbacks.checkpointers
    content["callbacks"] = _get_states(one for one in run.callbacks.callbacks if one not in writers)
    content["checkpointers"] = _get_states(writers)
    content["run"] = {
        **{name: getattr(run, name) for name in _COUNTERS},
        "optimizer": type(run.optimizer).__name__,
        "lr_scheduler": type(run.lr_scheduler).__name__,
        "history": run.history.state_dict(),
        "earlier_history": run.earlier_history.state_dict(),
        "sums": run.train_sums.state_dict() if run.batches_done else None,
        "train_data": run.train_data.state_dict() if run.train_data is not None else None,
        "val_data": run.val_data.state_dict() if run.val_data is not None else None,
        "random_state": get_random_state(),
    }
    content["versions"] = {"torch": torch.__version__.split("+")[0], "python": platform.python_version()}
    return content


_COUNTERS = ("initial_epoch", "epochs", "batches_done", "batches_seen", "step", "epoch_is_trained", "stop_training")


def find_checkpoint(
    resume: bool | str | os.PathLike[str] | None, checkpointers: Sequence[Checkpointer]
) -> tuple[dict[str, Any], Path] | None:
    """Return the content to go on from and its file, or None where there is none yet.

    resume: a file; True: the newest that can be read of the checkpointing callbacks; None: of one that resumes by
    itself. Warns, naming them, of newer files that can't be read. Raises CheckpointError where none can, OSError for
    a path that is not there, ValueError for True without such a callback.
    """
    if resume is not None and not isinstance(resume, bool):
        path = Path(resume)
        return read_checkpoint(path), path
    writers = [one for one in checkpointers if one.writes_resume_points and (resume or one.resumes_by_itself)]
    if resume and not writers:
        raise ValueError(
            "fit(resume=True) needs a checkpointing callback to find the newest checkpoint of: ModelCheckpoint (not of "
            "weights only) or BackupAndRestore. Or give the file, resume='...'."
        )
    failures: list[str] = []
    for path in newest_first(dict.fromkeys(file for one in writers for file in one.files())):
        try:
            content = read_checkpoint(path)
        except (CheckpointError, OSError) as error:
            failures.append(str(error))
            continue
        if failures:
            warnings.warn(f"{' '.join(failures)} Going on from {str(path)!r} instead.", stacklevel=3)
        return content, path
    if failures:
        raise CheckpointError(f"no checkpoint can be read, so the run can't go on: {' '.join(failures)}")
    return None


def check_content(run: Run, content: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError, naming every key that does not fit, before anything of the run is touched."""
    name = repr(str(path))
    for key, kind in (("epoch", int), ("model_state_dict", Mapping), ("optimizer_state_dict", Mapping)):
        if not isinstance(content.get(key), kind):
            raise CheckpointError(
                f"{name} is no training checkpoint: it has no {key!r} to go on from (its keys: {', '.join(content)})."
            )
    problems = _compare("net", bare_module(run.net).state_dict(), training_weights(content))
    if isinstance(run.loss_fn.fn, nn.Module):
        problems += _compare("loss", run.loss_fn.fn.state_dict(), content.get("loss_state_dict", {}))
    state = content.get("run", {})
    saved, own = state.get("optimizer", type(run.optimizer).__name__), type(run.optimizer).__name__
    if saved != own:
        problems.append(f"the checkpoint's optimizer is {saved}, this run's {own}")
    saved_groups, groups = content["optimizer_state_dict"]["param_groups"], run.optimizer.param_groups
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        sizes = (", ".join(str(len(group["params"])) for group in part) for part in (saved_groups, groups))
        problems.append("parameters in the optimizer's groups: {} in the checkpoint, {} in this run".format(*sizes))
    else:
        problems += _compare_slots(content["optimizer_state_dict"], groups)
    own = type(run.lr_scheduler).__name__
    if (saved := state.get("lr_scheduler", own)) != own:
        problems.append(f"the checkpoint's lr_scheduler is {saved}, this run's {own}")
    if problems:
        raise ValueError(f"{name} does not fit this model:\n  " + "\n  ".join(problems))
    done, epochs = content["epoch"] + 1 + bool(state.get("batches_done", 0)), run.epochs
    if done > epochs:
        raise ValueError(
            f"{name} has come to epoch {done}, beyond epochs={epochs}, which is the index to end at when a run is "
            "resumed: nothing is trained or changed."
        )
    if run.lr_scheduler_spans and state and state["epochs"] != epochs:
        raise ValueError(
            f"the lr_scheduler spans the {state['epochs']} epochs that the run of {name} began with, and can't be "
            f"stretched to epochs={epochs}: give compile() a scheduler object instead of a name."
        )


def restore(run: Run, content: Mapping[str, Any]) -> None:
    """Bring run to where content was saved; random states and callbacks' states come last."""
    run.optimizer.load_state_dict(dict(content["optimizer_state_dict"]))
    if run.lr_scheduler is not None and "lr_scheduler_state_dict" in content:
        run.lr_scheduler.load_state_dict(content["lr_scheduler_state_dict"])
    if run.scaler.is_enabled() and "scaler_state_dict" in content:
        run.scaler.load_state_dict(content["scaler_state_dict"])
    if isinstance(run.loss_fn.fn, nn.Module) and "loss_state_dict" in content:
        run.loss_fn.fn.load_state_dict(content["loss_state_dict"])
    bare_module(run.net).load_state_dict(training_weights(content))
    run.epochs_done = content["epoch"] + 1
    state = content.get("run")
    if state is None:
        warnings.warn(
            "the checkpoint is of the plain recipe, without random states and counters: training goes on after its "
            "epoch, but not exactly as an uninterrupted run would.",
            stacklevel=2,
        )
        return
    for name in set(_COUNTERS) - {"epochs"}:
        setattr(run, name, state[name])
    run.history.load_state_dict(state["history"])
    run.earlier_history.load_state_dict(state["earlier_history"])
    if state["sums"] is not None:
        run.train_sums.load_state_dict(state["sums"])
    writers = run.callbacks.checkpointers
    unknown = _set_states((one for one in run.callbacks.callbacks if one not in writers), content["callbacks"])
    for name in unknown:
        warnings.warn(f"the checkpoint holds the state of a {name}, which this fit does not have.", stacklevel=2)
    _set_states(writers, content["checkpointers"])
    set_random_state(state["random_state"])
    for source, position in ((run.val_data, state["val_data"]), (run.train_data, state["train_data"])):
        if source is not None and position is not None:
            source.load_state_dict(position)


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Raise TypeError, naming callback and key, for a state that a checkpoint can't hold."""
    for name, callback in _named(callbacks):
        check_plain(callback.state_dict(), f"the state_dict() of {name}")


def training_weights(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the weights that the optimizer worked on."""
    weights: Mapping[str, Any] = content.get("training_model_state_dict", content["model_state_dict"])
    return weights


def bare_module(net: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's or a parallel wrapper, whose keys have no prefix."""
    while isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(net, "_orig_mod"):
        inner = net._orig_mod if hasattr(net, "_orig_mod") else net.module
        assert isinstance(inner, nn.Module)
        net = inner
    return net


def _named(callbacks: Iterable[Callback]) -> list[tuple[str, Callback]]:
    """Return each callback with its class's name; a second one of a class is "ModelCheckpoint 2"."""
    named: dict[str, Callback] = {}
    for callback in callbacks:
        kind = type(callback).__name__
        names = [kind, *(f"{kind} {i}" for i in range(2, len(named) + 2))]
        named[next(name for name in names if name not in named)] = callback
    return list(named.items())


def _get_states(callbacks: Iterable[Callback]) -> dict[str, Any]:
    return {name: state for name, callback in _named(callbacks) if (state := callback.state_dict())}


def _set_states(callbacks: Iterable[Callback], states: Mapping[str, Any]) -> list[str]:
    """Load the states that have a callback here; return the names of those that have none."""
    named = dict(_named(callbacks))
    for name, state in states.items():
        if name in named:
            named[name].load_state_dict(state)
    return [name for name in states if name not in named]


def _compare(what: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    missing = [key for key in own if key not in saved]
    unexpected = [key for key in saved if key not in own]
    problems = [f"{what}: {key!r} is missing in the checkpoint" for key in missing]
    problems += [f"{what}: {key!r} of the checkpoint is unexpected" for key in unexpected]
    for key, value in own.items():
        other = saved.get(key, value)
        if isinstance(value, (UninitializedParameter, UninitializedBuffer)) or not isinstance(value, Tensor):
            continue
        if not isinstance(other, Tensor) or other.shape != value.shape:
            shape = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
            problems.append(f"{what}: {key!r} has shape {shape} in the checkpoint, {tuple(value.shape)} in this model")
    return problems


_SLOTS_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "acc_delta", "prev", "ax")


def _compare_slots(saved: Mapping[str, Any], groups: list[dict[str, Any]]) -> list[str]:
    problems = []
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for slot, value in saved["state"].get(index, {}).items():
            if slot in _SLOTS_LIKE_PARAMETER and isinstance(value, Tensor) and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)} in the checkpoint, but parameter {index} is {tuple(parameter.shape)}"
                problems.append(f"optimizer: {slot!r} has shape {shapes}")
    return problems
