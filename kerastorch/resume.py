"""A run's whole state as the content of a checkpoint, and a run taken up from one. Sisters: checkpoint.py, run.py."""

from __future__ import annotations

import copy
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from kerastorch.checkpoint import CheckpointError, check_plain, copy_to_cpu, newest_first, read_checkpoint
from kerastorch.device import bare_keys, bare_module, describe, get_random_state, set_random_state
from kerastorch.errors import warn
from kerastorch.optimizers import NamedOptimizers, describe_kinds

if TYPE_CHECKING:
    from kerastorch.callbacks.callback import Callback, Checkpointer
    from kerastorch.run import Run

COUNTERS = ("initial_epoch", "epochs", "batches_done", "batches_seen", "step")
FLAGS = ("epoch_is_trained", "train_end_is_due", "stop_training")
WEIGHTS_KEYS = ("model_state_dict", "state_dict", "model")  # under which training scripts keep them
OTHER_STATES = {  # other names for training states, and a key that tells such a state from a dict of settings
    "optimizer_state_dict": (("optimizer",), "param_groups"),
    "lr_scheduler_state_dict": (("lr_scheduler", "scheduler", "scheduler_state_dict"), "last_epoch"),
    "scaler_state_dict": (("scaler",), "_growth_tracker"),
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SLOTS_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "acc_delta", "prev", "ax")


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
    if run.average is not None and run.average.has_begun:
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
        **{name: getattr(run, name) for name in (*COUNTERS, *FLAGS)},
        "optimizer": describe_kinds(run.optimizer),
        "lr_scheduler": describe_kinds(run.lr_scheduler),
        "history": run.history.state_dict(),
        "earlier_history": run.earlier_history.state_dict(),
        "sums": run.train_sums.state_dict() if run.batches_done else None,
        "train_data": run.train_data.state_dict() if run.train_data is not None else None,
        "val_data": run.val_state or (run.val_data.state_dict() if run.val_data is not None else None),
        "random_state": get_random_state(),
    }
    content["versions"] = {"torch": torch.__version__.split("+")[0], "python": platform.python_version()}
    return content


def find_checkpoint(
    resume: bool | str | os.PathLike[str] | None, checkpointers: Sequence[Checkpointer]
) -> tuple[dict[str, Any], Path] | None:
    """Return the content to go on from and its file, or None where there is none yet.

    resume: a file; True: the newest that can be read of the checkpointing callbacks; None: of one that resumes by
    itself; False: none. Warns, naming them, of newer files that can't be read. Raises CheckpointError where none can,
    OSError for a path that is not there, ValueError for True without such a callback.
    """
    if resume is False:
        return None
    if resume is not None and resume is not True:
        if not isinstance(resume, (str, os.PathLike)):
            raise TypeError(f"resume must be True, False, None or a checkpoint's path, got {resume!r}.")
        path = Path(resume).expanduser()
        return without_foreign_run(read_checkpoint(path)), path
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
            warn(f"{' '.join(failures)} Going on from {str(path)!r} instead.")
        return without_foreign_run(content), path
    if failures:
        raise CheckpointError(f"no checkpoint can be read, so the run can't go on: {' '.join(failures)}")
    return None


def check_content(run: Run, content: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError, naming every key that does not fit, before anything of the run is touched."""
    name = repr(str(path))
    check_form(content, name)
    for key, kind in (("epoch", int), ("model_state_dict", Mapping), ("optimizer_state_dict", Mapping)):
        if not isinstance(content.get(key), kind):
            raise CheckpointError(
                f"{name} is no training checkpoint: it has no {key!r} to go on from (its keys: {', '.join(content)})."
                + _other_way(content)
            )
    own = bare_module(run.net).state_dict()
    saved = bare_keys(training_weights(content), own)
    problems = _compare("net", own, saved, lazy_shapes(bare_module(run.net))) + find_misfits(run, content)
    state = content.get("run", {})
    if problems:
        raise ValueError(f"{name} does not fit this model:\n  " + "\n  ".join(problems))
    source = state.get("train_data")
    if source is not None and run.train_data is not None:
        misfit = run.train_data.find_misfit(source)
        if misfit is None and state["batches_done"] > (run.num_batches or math.inf):
            misfit = f"it stands after {state['batches_done']} batches of an epoch of {run.num_batches}"
        if misfit is not None:
            raise ValueError(f"{name} does not fit the data: {misfit}.")
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


def _other_way(content: Mapping[str, Any]) -> str:
    if not find_weights(content):
        return ""
    has_optimizer = isinstance(with_usual_keys(content).get("optimizer_state_dict"), Mapping)
    rest = " and, at the next compile(), its optimizer's state" if has_optimizer else ""
    return f" Model.load(path, net) takes its weights{rest}."


def find_misfits(run: Run, content: Mapping[str, Any]) -> list[str]:
    """Return what of the loss, the optimizer and the scheduler in content does not fit run's, key by key."""
    loss = run.loss_fn.fn.state_dict() if isinstance(run.loss_fn.fn, nn.Module) else {}
    problems = _compare("loss", loss, content.get("loss_state_dict", {}))
    state = content.get("run", {})
    own = describe_kinds(run.optimizer)
    saved = state.get("optimizer", own)
    if saved != own:
        problems.append(_tell_kinds("optimizer", saved, own))
    problems += _compare_optimizers(run.optimizer, content["optimizer_state_dict"])
    own = describe_kinds(run.lr_scheduler)
    is_open = run.lr_scheduler_spans and run.lr_scheduler is None  # until a fit begins
    if (saved := state.get("lr_scheduler", own)) != own and not is_open:
        problems.append(_tell_kinds("lr_scheduler", saved, own))
    elif state and run.lr_scheduler is not None and "lr_scheduler_state_dict" not in content:
        problems.append("'lr_scheduler_state_dict' is missing in the checkpoint")
    return problems


def _tell_kinds(part: str, saved: str, own: str) -> str:
    none = describe_kinds(None)
    if saved == none:
        return f"the checkpoint has no {part}, this run's is {own}"
    return f"the checkpoint's {part} is {saved}, this run" + (" has none" if own == none else f"'s {own}")


def find_weights(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the weights in a file's content, which may be a training script's dict around them; None without any."""
    for key in WEIGHTS_KEYS:
        if isinstance(content.get(key), Mapping):
            inner: Mapping[str, Any] = content[key]
            return inner
    has_any = not content or any(isinstance(value, Tensor) for value in content.values())
    return content if has_any else None


def with_usual_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content with training states of other names under those of the usual recipe."""
    renamed = dict(content)
    for key, (names, mark) in OTHER_STATES.items():
        found = [content[name] for name in names if isinstance(content.get(name), Mapping) and mark in content[name]]
        if found:
            renamed.setdefault(key, found[0])
    return renamed


def without_foreign_run(content: dict[str, Any]) -> dict[str, Any]:
    """Return content without a "run" of the user's own, {"id": 3} for example; one of ours stays, whatever it lacks."""
    state = content.get("run")
    ours = {*COUNTERS, *FLAGS} - {"epochs", "step"}  # which others may count too
    if "checkpointers" in content or (isinstance(state, Mapping) and not ours.isdisjoint(state)):
        return content
    return {key: value for key, value in content.items() if key != "run"}


def check_form(content: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError where the counters and histories are not of the form that get_content gives them."""
    problem = None
    state = content.get("run", {})
    if not isinstance(content.get("epoch", 0), int) or content.get("epoch", 0) < -1:
        problem = f"its epoch is {describe(content['epoch'])}"
    elif not isinstance(state, dict) or (state and {*COUNTERS, *FLAGS} - set(state)):
        problem = "its run has not all counters"
    elif state:
        for counter in COUNTERS:
            if type(state[counter]) is not int or not 0 <= state[counter] < 2**63:
                problem = f"its {counter} is not a count"
        for flag in FLAGS:
            if type(state[flag]) is not bool:
                problem = f"its {flag} is not a flag"
        for key in ("history", "earlier_history"):
            rows = state.get(key)
            if not isinstance(rows, dict) or not all(isinstance(rows.get(part), list) for part in ("epoch", "logs")):
                problem = f"its {key} is not two lists"
            elif len(rows["epoch"]) != len(rows["logs"]) or not all(isinstance(row, dict) for row in rows["logs"]):
                problem = f"its {key} has {len(rows['epoch'])} epochs but {len(rows['logs'])} rows"
        for key in ("callbacks", "checkpointers"):
            if not isinstance(content.get(key), dict):
                problem = f"it has no {key}"
        for key in ("train_data", "val_data"):
            source = state.get(key)
            is_whole = isinstance(source, dict) and isinstance(source.get("generators"), list)
            if source is not None and not (
                is_whole and all(_is_count(source.get(k)) for k in ("batches", "num_workers"))
            ):
                problem = f"its {key} has no counts of batches and workers"
        sums = state.get("sums")
        if sums is not None and not (isinstance(sums, dict) and _is_count(sums.get("num_samples"))):
            problem = "its sums have no count of samples"
        if not isinstance(state.get("optimizer"), str) or not isinstance(state.get("lr_scheduler"), str):
            problem = "its optimizer and lr_scheduler have no names"
    for key in ("training_model_state_dict", "loss_state_dict"):
        if not isinstance(content.get(key, {}), Mapping):
            problem = f"its {key} is no dict"
    if problem is not None:
        raise CheckpointError(f"{name} is no checkpoint that a run wrote: {problem}.")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def restore(run: Run, content: Mapping[str, Any]) -> None:
    """Bring run to where content was saved; callbacks' states, random states and the data's position come last.

    Raises CheckpointError, and leaves net, optimizer and random states as they were, where a part can't be taken up;
    what a callback of the user's own raises comes out as it is.
    """
    before = copy_to_cpu(get_content(run, 0.0))
    weights = before.setdefault("training_model_state_dict", before["model_state_dict"])
    for key in [key for key, value in weights.items() if is_lazy(value)]:  # which can't be put back
        del weights[key]
    try:
        with _as_checkpoint_error(run):
            _restore_own(run, content)
        if "run" in content:
            _restore_callbacks(run, content)
            with _as_checkpoint_error(run):
                _restore_streams(run, content["run"])
    except BaseException:
        _restore_modules(run, before, strict=False)
        for name in (*COUNTERS, *FLAGS):
            setattr(run, name, before["run"][name])
        run.history.load_state_dict(before["run"]["history"])
        run.earlier_history.load_state_dict(before["run"]["earlier_history"])
        set_random_state(before["run"]["random_state"])
        raise


@contextmanager
def _as_checkpoint_error(run: Run) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{run.resume_path!r} can't be taken up: {type(error).__name__}: {error}") from error


def restore_states(run: Run, content: Mapping[str, Any]) -> None:
    """Load the states of the optimizer, the scheduler, the scaler and the loss, those that content has."""
    run.optimizer.load_state_dict(dict(content["optimizer_state_dict"]))
    if run.lr_scheduler is not None and "lr_scheduler_state_dict" in content:
        run.lr_scheduler.load_state_dict(copy.deepcopy(content["lr_scheduler_state_dict"]))  # CyclicLR takes parts out
    if run.scaler.is_enabled() and "scaler_state_dict" in content:
        run.scaler.load_state_dict(content["scaler_state_dict"])
    if isinstance(run.loss_fn.fn, nn.Module) and "loss_state_dict" in content:
        run.loss_fn.fn.load_state_dict(content["loss_state_dict"])


def _restore_modules(run: Run, content: Mapping[str, Any], *, strict: bool = True) -> None:
    restore_states(run, content)
    net = bare_module(run.net)
    net.load_state_dict(bare_keys(training_weights(content), net.state_dict()), strict=strict)


def _restore_own(run: Run, content: Mapping[str, Any]) -> None:
    _restore_modules(run, content)
    run.epochs_done = content["epoch"] + 1
    state = content.get("run")
    if state is None:
        warn(
            "the checkpoint is of the plain recipe, without random states and counters: training goes on after its "
            "epoch, but not exactly as an uninterrupted run would; an lr_scheduler starts anew."
        )
        return
    for name in {*COUNTERS, *FLAGS} - {"epochs"}:
        setattr(run, name, state[name])
    if run.epochs > state["epochs"]:
        run.stop_training = False  # more was asked for since
    for optimizer in (
        run.optimizer.optimizers.values() if isinstance(run.optimizer, NamedOptimizers) else [run.optimizer]
    ):
        vars(optimizer)["_opt_called"] = run.step > 0  # or torch warns of a scheduler that steps first
    run.history.load_state_dict(state["history"])
    run.earlier_history.load_state_dict(state["earlier_history"])
    if state["sums"] is not None:
        run.train_sums.load_state_dict(state["sums"])


def _restore_callbacks(run: Run, content: Mapping[str, Any]) -> None:
    """Load the states of callbacks; warn of those that decided something and have no callback here."""
    writers = run.callbacks.checkpointers
    others = [one for one in run.callbacks.callbacks if one not in writers]
    unknown = _set_states(run, others, content["callbacks"])
    states = content["checkpointers"]
    unknown += [name for name in _set_states(run, writers, states) if "monitor" in _watches(states[name])]
    for name in unknown:
        watches = _watches({**content["callbacks"], **states}[name])
        watched = f" (it had {', '.join(f'{part}={value!r}' for part, value in watches.items())})" if watches else ""
        warn(f"the checkpoint holds the state of {name}, which this fit does not have{watched}: it is left out.")


def _restore_streams(run: Run, state: Mapping[str, Any]) -> None:
    set_random_state(state["random_state"])
    for source, position in ((run.val_data, state["val_data"]), (run.train_data, state["train_data"])):
        if source is not None and position is not None:
            source.load_state_dict(position)
            source.warn_where_inexact()


def check_states(run: Run) -> None:
    """Raise TypeError, naming callback or part and key, for a state that a checkpoint can't hold."""
    check_callbacks(run.callbacks.callbacks)
    check_plain(get_content(run, 0.0), takes_lazy=True)


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Raise TypeError, naming callback and key, for a state that a checkpoint can't hold."""
    for name, callback in _named(callbacks):
        check_plain(callback.state_dict(), f"the state_dict() of {name}", takes_lazy=True)


def training_weights(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the weights that the optimizer worked on."""
    weights: Mapping[str, Any] = content.get("training_model_state_dict", content["model_state_dict"])
    return weights


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


def _set_states(run: Run, callbacks: Iterable[Callback], states: Mapping[str, Any]) -> list[str]:
    """Load each state into its callback; return the names of those that have none here."""
    waiting, without = _named(callbacks), []
    for name, state in states.items():
        found = next((pair for pair in waiting if _is_for(pair, name, state)), None)
        if found is None:
            without.append(name)
            continue
        waiting.remove(found)
        with _as_checkpoint_error(run) if is_built_in(found[1]) else nullcontext():
            found[1].load_state_dict(state)
    return without


def _is_for(named: tuple[str, Callback], name: str, state: object) -> bool:
    """Whether a state is that callback's: by its place among those of its class or, better, by what it watches."""
    own_name, callback = named
    watches = _watches(state)
    if not watches:
        return own_name == name
    kind = type(callback).__name__
    return name.partition(" ")[0] == kind and _watches(callback.state_dict()) == watches


def _watches(state: object) -> Mapping[str, Any]:
    watches = state.get("watches") if isinstance(state, Mapping) else None
    return watches if isinstance(watches, Mapping) else {}


def is_built_in(thing: object) -> bool:
    """Whether a thing's class is kerastorch's own."""
    return type(thing).__module__.partition(".")[0] == __name__.partition(".")[0]


def lazy_shapes(net: nn.Module) -> dict[str, tuple[int | None, ...]]:
    """Return what lazy layers know of their weights' shapes, by key: None for a size that the first batch tells."""
    shapes: dict[str, tuple[int | None, ...]] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if not isinstance(module, LazyModuleMixin):
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Linear):
            shapes[f"{prefix}weight"], shapes[f"{prefix}bias"] = (module.out_features, None), (module.out_features,)
        elif isinstance(module, CONVOLUTIONS):
            shapes[f"{prefix}weight"] = (module.out_channels, None, *module.kernel_size)
            shapes[f"{prefix}bias"] = (module.out_channels,)
        elif isinstance(module, TRANSPOSED_CONVOLUTIONS):
            shapes[f"{prefix}weight"] = (None, module.out_channels // module.groups, *module.kernel_size)
            shapes[f"{prefix}bias"] = (module.out_channels,)
    return shapes


def tell_lazy_misfit(shape: tuple[int | None, ...] | None, other: object) -> str | None:
    """Return how a loaded value differs from what a lazy layer knows of its weight's shape, None where it does not."""
    if shape is None or not isinstance(other, Tensor) or is_lazy(other):
        return None
    is_like = len(shape) == other.ndim and all(a in (None, b) for a, b in zip(shape, other.shape, strict=True))
    known = ", ".join("?" if size is None else str(size) for size in shape)
    return None if is_like else f"{tuple(other.shape)} in the file, ({known}{',' * (len(shape) == 1)}) in the net"


def _compare(
    what: str,
    own: Mapping[str, Any],
    saved: Mapping[str, Any],
    lazy: Mapping[str, tuple[int | None, ...]] | None = None,
) -> list[str]:
    missing = [key for key in own if key not in saved]
    unexpected = [key for key in saved if key not in own]
    problems = [f"{what}: {key!r} is missing in the checkpoint" for key in missing]
    problems += [f"{what}: {key!r} of the checkpoint is unexpected" for key in unexpected]
    for key, value in own.items():
        other = saved.get(key, value)
        if is_lazy(value) and (misfit := tell_lazy_misfit((lazy or {}).get(key), other)):
            problems.append(f"{what}: {key!r} is {misfit}")
        if is_lazy(value) or not isinstance(value, Tensor):
            continue
        if isinstance(other, Tensor) and (other.layout, other.is_complex()) != (value.layout, value.is_complex()):
            problems.append(f"{what}: {key!r} is {other.dtype}, {other.layout} in the checkpoint")
        elif not isinstance(other, Tensor) or other.shape != value.shape:
            shape = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
            problems.append(f"{what}: {key!r} has shape {shape} in the checkpoint, {tuple(value.shape)} in this model")
    return problems


def _compare_optimizers(optimizer: Optimizer, saved: Mapping[str, Any]) -> list[str]:
    if isinstance(optimizer, NamedOptimizers):
        if set(saved) != set(optimizer.optimizers):
            return [f"optimizers: {', '.join(saved)} in the checkpoint, {', '.join(optimizer.optimizers)} in this run"]
        return [problem for name in saved for problem in _compare_optimizers(optimizer[name], saved[name])]
    saved_groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    is_whole = isinstance(saved_groups, list) and isinstance(saved.get("state"), Mapping)
    if not is_whole or not all(_is_group(group) for group in saved_groups or []):
        return ["the checkpoint's optimizer_state_dict has no param_groups with params, or no state"]
    groups = optimizer.param_groups
    assert saved_groups is not None
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        sizes = (", ".join(str(len(group["params"])) for group in part) for part in (saved_groups, groups))
        return ["parameters in the optimizer's groups: {} in the checkpoint, {} in this run".format(*sizes)]
    problems = []
    for i, (other, group) in enumerate(zip(saved_groups, groups, strict=True)):
        for key in sorted((other.keys() ^ group.keys()) - {"initial_lr", "swa_lr", "max_lr", "min_lr", "max_momentum"}):
            where = "the checkpoint" if key in other else "this run"
            problems.append(f"optimizer: only {where} has {key!r} in group {i}")
        for key in other.keys() & group.keys() - {"params"}:
            if not _is_alike(other[key], group[key]):
                problems.append(f"optimizer: {key!r} of group {i} is {describe(other[key])} in the checkpoint")
    return problems + _compare_slots(saved, groups)


def _is_group(group: object) -> bool:
    params = group.get("params") if isinstance(group, dict) else None
    return isinstance(params, list) and all(isinstance(index, int) for index in params)


def _is_alike(one: object, other: object) -> bool:
    """Whether two options of an optimizer are of one kind: both numbers, both flags or None, or of one type."""
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_is_alike, one, other))
    if isinstance(one, (bool, type(None))):
        return isinstance(other, (bool, type(None)))
    if isinstance(one, (int, float)) or (isinstance(one, Tensor) and one.numel() == 1):
        return isinstance(other, (int, float, Tensor))
    return type(one) is type(other)


def _compare_slots(saved: Mapping[str, Any], groups: list[dict[str, Any]]) -> list[str]:
    problems = []
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        slots = saved["state"].get(index, {})
        if not isinstance(slots, Mapping):
            problems.append(f"optimizer: the state of parameter {index} is {describe(slots)}")
            continue
        for slot, value in slots.items():
            kinds = (Tensor, type(None)) if slot in SLOTS_LIKE_PARAMETER else (Tensor, int, float)
            if slot in (*SLOTS_LIKE_PARAMETER, "step") and not isinstance(value, kinds):
                problems.append(f"optimizer: {slot!r} of parameter {index} is {describe(value)}")
            if slot == "step" and isinstance(value, Tensor) and value.numel() != 1:
                problems.append(f"optimizer: 'step' of parameter {index} has shape {tuple(value.shape)}")
            is_like = slot in SLOTS_LIKE_PARAMETER and isinstance(value, Tensor) and not is_lazy(parameter)
            if is_like and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)} in the checkpoint, but parameter {index} is {tuple(parameter.shape)}"
                problems.append(f"optimizer: {slot!r} has shape {shapes}")
    return problems
