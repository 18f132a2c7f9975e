"""Weights and whole models to files and back: save_weights, load_weights, save and load of a Model.

The files' form is in checkpoint.py, what a training state is in resume.py. Sisters: eject, check.py.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from kerastorch.checkpoint import (
    CheckpointError,
    UnsafeError,
    check_plain,
    copy_to_cpu,
    read_checkpoint,
    read_safetensors,
    read_trusted,
    write_checkpoint,
    write_safetensors,
    write_whole,
)
from kerastorch.compiled import Compiled
from kerastorch.device import bare_keys, bare_module, describe, get_random_state, set_random_state
from kerastorch.errors import check_choice
from kerastorch.history import History
from kerastorch.resume import (
    WEIGHTS_KEYS,
    check_form,
    find_misfits,
    find_weights,
    lazy_shapes,
    restore_states,
    tell_lazy_misfit,
    with_usual_keys,
    without_foreign_run,
)
from kerastorch.run import Run

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
HANDED_ON = (  # what save() writes of a state that no compile() has taken over
    *("epoch", "optimizer_state_dict", "loss", "lr_scheduler_state_dict", "scaler_state_dict", "loss_state_dict"),
    *("callbacks", "checkpointers", "run", "versions", "compile_arguments"),
)
NOT_PICKLED = ("_modules", "_parameters", "_buffers", "_compiled_call_impl")  # by themselves, or at all


@dataclass(frozen=True)
class LoadReport:
    """What load_weights did, by the net's keys; str() is a line or more.

    loaded: taken from the file.   missing: not in the file, left as they were.   unexpected: in the file alone.
    mismatched: in both but of another form, which is told; left as they were.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether file and net have the same keys and shapes."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        return "\n".join([f"{len(self.loaded)} loaded", *self.problems()])

    def problems(self) -> list[str]:
        """Return a line for each kind of misfit, with its keys."""
        mismatched = [f"{key!r} is {text}" for key, text in self.mismatched.items()]
        kinds = (
            ("missing in the file", list(map(repr, self.missing))),
            ("unexpected in the file", list(map(repr, self.unexpected))),
            ("mismatched", mismatched),
        )
        return [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in kinds if keys]


# ---- weights ----


def save_weights(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state_dict of net, keys bare, to a file; missing folders are made.

    path: .pt, .pth, .bin or .ckpt, all torch's format, or .safetensors.
    Raises ValueError for another suffix and for a lazy net without shapes, TypeError for what the file can't hold,
    ImportError and OSError as checkpoint.py says.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(
            f"save_weights() writes '.safetensors' files, and torch's as {_suffixes()}; got {str(path)!r}."
        )
    weights = bare_keys(bare_module(net).state_dict())
    _refuse_lazy(weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        write_safetensors(path, weights)
    else:
        write_checkpoint(path, weights)


def _suffixes() -> str:
    return f"{', '.join(map(repr, TORCH_SUFFIXES[:-1]))} or {TORCH_SUFFIXES[-1]!r}"


def _refuse_lazy(weights: Mapping[str, Any]) -> None:
    for key, value in weights.items():
        if is_lazy(value):
            raise ValueError(
                f"the shape of {key!r} is not known yet: run one batch through the lazy net before it is saved, for "
                "example model.predict(x[:1])."
            )


def load_weights(net: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> LoadReport:
    """Load the weights of a file into net; where it raises, net is as it was.

    path: a state_dict in a file of torch.save, or a training script's dict around it ("model_state_dict", "state_dict",
    "model"); a .safetensors file; the .index.json of sharded ones. Prefixes of wrappers in the keys do not matter.
    strict: False loads what fits and leaves the rest.
    Raises ValueError with all missing, unexpected and mismatched keys, where strict, or where nothing fits;
    CheckpointError and OSError for files that can't be read.
    """
    check_choice("strict", strict, (True, False))
    path = Path(path).expanduser()
    return _load_into(net, read_weights(path), path, strict=strict)


def read_weights(path: Path) -> Mapping[str, Any]:
    """Return the weights that a file of one of load_weights' forms holds, by the names in it; on the CPU."""
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    return read_safetensors(path) if path.suffix == ".safetensors" else _get_weights(_read_data(path), path)


def _read_data(path: Path) -> dict[str, Any]:
    """Return what read_checkpoint does; where it refuses what could run code, name the one way that runs it."""
    try:
        return read_checkpoint(path)
    except UnsafeError as error:
        raise UnsafeError(
            f"{error} Model.load(path, net, trust=True) runs it all the same, if you trust the file's author; leave "
            "net away where the file holds its own."
        ) from error


def _get_weights(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    weights = find_weights(content)
    if weights is None:
        raise CheckpointError(
            f"{str(path)!r} holds no weights: neither tensors nor one of {', '.join(map(repr, WEIGHTS_KEYS))} (its "
            f"keys: {', '.join(map(str, content))})."
        )
    return weights


def _read_shards(path: Path) -> dict[str, Any]:
    """Return the weights of the files that an index names, which must lie beside it."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(names.values()))
        is_plain = all(Path(file).name == file and "\\" not in file for file in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is no index of weights: it has no 'weight_map' of file names.") from error
    if not is_plain or any(Path(file).suffix not in (".safetensors", *TORCH_SUFFIXES) for file in files):
        raise CheckpointError(f"{str(path)!r} names files elsewhere or of another kind: {', '.join(files)}.")
    weights: dict[str, Any] = {}
    for file in files:
        weights |= read_weights(path.with_name(file))
    if missing := [key for key in names if key not in weights]:
        raise CheckpointError(f"{str(path)!r} names weights that its files lack: {', '.join(missing)}.")
    return weights


def _load_into(
    net: nn.Module, weights: Mapping[str, Any], path: Path, *, strict: bool, way_out: str = "strict=False"
) -> LoadReport:
    """Load what fits, or where strict all; else raise ValueError.   way_out: what would load what fits."""
    net = bare_module(net)
    own = net.state_dict()
    weights = bare_keys(weights, own)
    lazy = lazy_shapes(net)  # torch gives a lazy weight whatever shape the file has
    mismatched = {
        key: text for key in own if key in weights and (text := _misfit(own[key], weights[key], lazy.get(key)))
    }
    fitting = cast("dict[str, Any]", copy.copy(weights))  # with its _metadata
    for key in mismatched:
        del fitting[key]
    if strict and any(map(is_lazy, own.values())):  # which could not be put back
        loaded = [key for key in own if key in fitting]
        missing = [key for key in own if key not in weights]
        report = LoadReport(loaded, missing, [key for key in weights if key not in own], mismatched)
        _refuse(report, path, strict, way_out)
    with restored_on_error(net):
        try:
            left = net.load_state_dict(fitting, strict=False)
        except RuntimeError as error:  # torch's, of what the net's own hooks made of the keys
            raise ValueError(f"{str(path)!r} does not fit this net: {error}") from error
        unexpected = list(left.unexpected_keys)
        loaded = [key for key in weights if key not in mismatched and key not in unexpected]
        tied = {_place(own[key]) for key in loaded if key in own} - {None}
        missing = [key for key in left.missing_keys if key not in mismatched and _place(own.get(key)) not in tied]
        report = LoadReport(loaded, missing, unexpected, mismatched)
        _refuse(report, path, strict, way_out)
    return report


def _refuse(report: LoadReport, path: Path, strict: bool, way_out: str) -> None:
    """Raise ValueError with all that does not fit, where that is not wanted."""
    nothing = not report.loaded and bool(report.missing or report.mismatched)
    if (strict and not report.ok) or nothing:
        problems = "\n  ".join(report.problems())
        hint = f" {way_out} would load what fits." if report.loaded else " None of its weights fits."
        raise ValueError(f"{str(path)!r} does not fit this net, which is left as it was.{hint}\n  {problems}")


def _misfit(own: object, other: object, lazy_shape: tuple[int | None, ...] | None) -> str | None:
    """Return what keeps a loaded value from its place."""
    if not isinstance(own, Tensor):
        return None
    if not isinstance(other, Tensor):
        return f"a {type(other).__name__} in the file, a tensor in the net"
    if is_lazy(own):
        return tell_lazy_misfit(lazy_shape, other)
    if other.shape != own.shape:
        return f"{tuple(other.shape)} in the file, {tuple(own.shape)} in the net"
    loses = (other.is_complex() and not own.is_complex()) or (other.is_floating_point() and not _is_inexact(own))
    if other.layout != own.layout or loses:
        return f"{other.dtype}, {other.layout} in the file, {own.dtype}, {own.layout} in the net"
    return None


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _place(value: object) -> tuple[object, ...] | None:
    """Return what tied parameters have in common."""
    if not isinstance(value, Tensor) or is_lazy(value) or value.layout is not torch.strided or not value.numel():
        return None
    return value.data_ptr(), value.shape, value.stride(), value.device


@contextmanager
def restored_on_error(net: nn.Module) -> Iterator[None]:
    """Put the weights of net back where the body raises; a copy of them is held on the CPU meanwhile."""
    own = {key: value for key, value in bare_module(net).state_dict().items() if isinstance(value, Tensor)}
    own = {key: value for key, value in own.items() if not is_lazy(value)}
    before = copy_to_cpu(own)
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(before[key])
        raise


# ---- models ----


@dataclass(frozen=True)
class SavedState:
    """Optimizer, scheduler and scaler state of a file, which the next compile() takes over."""

    content: Mapping[str, Any]
    path: Path


def plain_arguments(**arguments: Any) -> dict[str, Any] | None:
    """Return a copy of compile()'s arguments where all are names and plain values, else None."""
    try:
        check_plain(arguments)
    except TypeError:
        return None
    return copy.deepcopy(arguments)


def get_model_content(
    run: Run | None, history: History, arguments: Mapping[str, Any] | None, saved: SavedState | None
) -> dict[str, Any]:
    """Return what save() writes beside the weights.

    run: as it stands before a fit; None before compile().   arguments: those of compile(), where they are plain.
    saved: the state that a model loaded has not taken over yet.
    """
    if run is None:
        return dict(saved.content) if saved is not None else {"epoch": -1}
    run.history, run.epochs_done = history, len(history.epoch)
    run.epochs, run.initial_epoch = run.epochs_done, 0
    loss = history.last_logs.get("loss", math.nan)
    content = run.get_content(loss if isinstance(loss, float) else math.nan)
    return {**content, "compile_arguments": arguments}


def standing_run(run: Run, compiled: Compiled) -> Run:
    """Return run with the scheduler that belongs to no fit."""
    run.lr_scheduler = compiled.lr_scheduler if isinstance(compiled.lr_scheduler, LRScheduler) else None
    return run


def write_model(net: nn.Module, path: str | os.PathLike[str], content: Mapping[str, Any], *, whole: bool) -> None:
    """Write a model's content with the weights of net or, where whole, with net itself, pickled.

    Raises ValueError for a suffix that is not one of torch's and for a lazy net without shapes; TypeError, naming the
    attribute, for what can't be pickled; OSError as write_checkpoint.
    """
    path = Path(path).expanduser()
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(
            f"save() writes torch's format, to a file named {_suffixes()}; got {str(path)!r}. For '.safetensors' there "
            "is save_weights()."
        )
    content = {**content, "model_state_dict": bare_keys(bare_module(net).state_dict())}
    _refuse_lazy(content["model_state_dict"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if not whole:
        write_checkpoint(path, content)
        return
    try:
        write_whole(path, {**content, "net": bare_module(net)})
    except Exception as error:
        part = _find_unpicklable(bare_module(net))
        if part is None:
            raise
        raise TypeError(
            f"save(whole=True) can't pickle {part}. save() without whole needs only the weights."
        ) from error


def read_model(
    path: str | os.PathLike[str], net: nn.Module | None, *, trust: bool
) -> tuple[dict[str, Any], nn.Module, Path]:
    """Return a model's content, the net for it (the one given, or with trust that of the file), and its file.

    Raises ValueError where neither net nor trust is given, and for files of weights alone; CheckpointError for a file
    without what is needed.
    """
    path = Path(path).expanduser()
    if path.suffix == ".safetensors" or path.name.endswith(".index.json"):
        raise ValueError(
            f"{str(path)!r} is of a format for weights alone, not one of Model.save(): Model(net).load_weights(path) "
            "takes it."
        )
    if not trust:
        if net is None:
            raise ValueError(
                "Model.load(path, net) needs the net that the file's weights are for. Only a file of save(whole=True) "
                "holds its net, as code that opening it runs: Model.load(path, trust=True), if you trust its author."
            )
        content = with_usual_keys(without_foreign_run(_read_data(path)))
        check_form(content, repr(str(path)))
        return {**content, "model_state_dict": _get_weights(content, path)}, net, path
    loaded = read_trusted(path)
    content = with_usual_keys(without_foreign_run(loaded if isinstance(loaded, dict) else {"net": loaded}))
    found = content.pop("net", None)
    if isinstance(found, nn.Module):
        return {"model_state_dict": found.state_dict(), **content}, found if net is None else net, path
    if net is None:
        raise CheckpointError(
            f"{str(path)!r} holds no net, so give the one for its weights: Model.load(path, net), and trust=True only "
            "where it is refused without."
        )
    return {**content, "model_state_dict": _get_weights(content, path)}, net, path


@contextmanager
def taking_up(net: nn.Module, content: Mapping[str, Any], path: Path) -> Iterator[None]:
    """Load a model's weights for the body, then its random states; where something raises, all is as it was.

    The weights are those that a run published. Raises as load_weights.
    """
    random_state = get_random_state()
    with restored_on_error(net):
        way_out = "Model(net).load_weights(path, strict=False)"
        _load_into(net, content["model_state_dict"], path, strict=True, way_out=way_out)
        yield
        if "run" in content:
            try:
                set_random_state(content["run"]["random_state"])
            except Exception as error:
                set_random_state(random_state)
                raise CheckpointError(f"{str(path)!r} has no random states that can be set: {error}.") from error


def find_history(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the epochs of all fits that content knows, as History's state_dict."""
    joined = History()
    for part in ("earlier_history", "history"):
        one = History()
        one.load_state_dict(content.get("run", {}).get(part, {"epoch": [], "logs": []}))
        joined.extend(one)
    return joined.state_dict()


def find_state(content: Mapping[str, Any], path: Path) -> SavedState | None:
    """Return the training state that compile() is to take over, None where the file has none."""
    if not isinstance(content.get("optimizer_state_dict"), Mapping):
        return None
    return SavedState({key: content[key] for key in HANDED_ON if key in content}, path)


def find_arguments(content: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the arguments to compile with, None where the file has none or not all."""
    arguments = content.get("compile_arguments")
    if arguments is None:
        return None
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise CheckpointError(f"{str(path)!r} has {describe(arguments)} for the arguments of compile().")
    return arguments


def take_over(run: Run, saved: SavedState) -> None:
    """Load the states of optimizer, scheduler, scaler and loss into those of run.

    Raises ValueError, naming each, for what does not fit, before anything is touched.
    """
    problems = find_misfits(run, saved.content)
    has_scaler = "scaler_state_dict" in saved.content
    if "run" in saved.content and has_scaler != run.scaler.is_enabled():
        with_it, without = ("the file", "this compile()") if has_scaler else ("this compile()", "the file")
        problems.append(f"mixed_precision='fp16': {with_it} has a GradScaler, {without} none")
    if problems:
        raise ValueError(
            f"compile() can't take over the training state of {str(saved.path)!r}; to go on from the weights alone "
            "compile Model(model.net), or call load_weights() before:\n  " + "\n  ".join(problems)
        )
    restore_states(run, saved.content)


def _find_unpicklable(net: nn.Module) -> str | None:
    """Return the first attribute of net or a part of it that pickle refuses, as text."""
    for name, module in net.named_modules():
        where = ".".join(filter(None, ("net", name)))
        for key, value in [("", type(module)), *vars(module).items()]:
            if key in NOT_PICKLED:
                continue
            try:
                pickle.dumps(value)
            except Exception as error:
                what = f"{where}.{key}" if key else f"the class of {where}"
                return f"{what}: {error}"
    return None
