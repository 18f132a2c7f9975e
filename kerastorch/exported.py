"""load_exported: a file that Model.export wrote, called and predicting without the net's class.

Sister: export.py, which writes such files.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kerastorch.callbacks import CallbackList
from kerastorch.data import make_dataset, make_source, to_tensors
from kerastorch.device import Nested, describe, leaves, map_nested, move_to_device, preserved_random_state
from kerastorch.loops import ScriptLoop
from kerastorch.progress import Progress, Verbose
from kerastorch.run import Run

SUFFIXES = (".onnx", ".pt2")
METADATA_KEY = "kerastorch"  # under which a file holds its Form
ONE_AT_A_TIME = threading.RLock()  # torch traces and loads one net in a process
BATCH = "batch"  # the name of the batch axis
Specs = dict[str, tuple[str | None, list[Any]]]


@dataclass(frozen=True)
class Form:
    """How a file's inputs and outputs are nested and called.

    inputs, outputs: names, nested as the net's, lists for tuples.   specs: {input name: (dtype, shape)}, with "batch"
    for an axis of any length and None for a dtype that is not known.
    """

    inputs: Any
    specs: Specs
    outputs: Any

    def to_json(self) -> str:
        """Return it as text, for a file's metadata."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        return ", ".join(f"{name!r} {dtype or ''}({', '.join(map(str, s))})" for name, (dtype, s) in self.specs.items())

    def check(self, given: Nested) -> None:
        """Raise ValueError with what would be right, unless given has tensors as the file takes them."""
        found: dict[str, Tensor] = {}
        try:
            _fill(found, self.inputs, given)
            fits = all(_fits(tensor, *self.specs[name]) for name, tensor in found.items())
        except (KeyError, ValueError, AttributeError, TypeError):
            fits = False
        lengths = {len(found[name]) for name, (_, shape) in self.specs.items() if fits and shape[:1] == [BATCH]}
        if not fits or len(lengths) > 1:
            raise ValueError(f"the file takes {self}, got {describe(given)}.")

    def fill(self, given: Nested) -> dict[str, Tensor]:
        """Return {name: tensor} for what check() passed."""
        found: dict[str, Tensor] = {}
        _fill(found, self.inputs, given)
        return found


def load_exported(path: str | os.PathLike[str]) -> ExportedModel:
    """Return the net of an exported file, in eval mode, to be called as the net was and to predict with.

    path: .onnx, which ONNX Runtime runs on the CPU with as many threads as torch has; or .pt2, of torch.export or
    AOTInductor, which runs on the kind of device that it was exported from. Those of other programs will do. A .pt2
    file's checksums are verified; ONNX has none.
    Opening a .pt2 file may run code that it holds: open only files of people you trust.
    Raises FileNotFoundError; ValueError for another suffix, or a file that is damaged or of another kind; ImportError
    without onnxruntime (the extra "export").
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"load_exported() reads '.onnx' and '.pt2' files, got {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} to load.")
    ort = import_onnxruntime() if path.suffix == ".onnx" else None
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch tells its developers before it raises
    try:
        with ONE_AT_A_TIME:
            return _load_onnx(ort, path) if ort is not None else _load_pt2(path)
    except Exception as error:
        first = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{str(path)!r} can't be loaded; it is damaged, or no exported net: {first}") from error
    finally:
        logging.disable(level)


class ExportedModel:
    """A net out of an exported file.

    path: the file.   device: where it runs.   form: what it takes and returns, where the file says so.
    """

    def __init__(self, path: Path, function: Callable[..., Any], device: torch.device, form: Form | None) -> None:
        self.path, self.device, self.form = path, device, form
        self._net = _Net(function, form)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the net returns for tensors or arrays, as tensors; ValueError for what the file can't take."""
        args, kwargs = to_tensors(args, strict=False), to_tensors(kwargs, strict=False)
        return self._net(*move_to_device(args, self.device), **move_to_device(kwargs, self.device))

    def predict(
        self, x: Any, *, batch_size: int | None = None, steps: int | None = None, verbose: Verbose = "auto"
    ) -> Nested:
        """Return the outputs for all rows as numpy arrays, batch by batch; arguments and errors as Model.predict's."""
        source = make_source(make_dataset(x, caller="predict"), name="predict()'s data", batch_size=batch_size)
        run = Run(
            self._net,
            self.device,
            None,
            callbacks=CallbackList(None),
            progress=Progress(verbose),
            val_data=source,
            validation_steps=steps,
        )
        try:
            with preserved_random_state(*run.generators):
                run.progress.begin("Predict", steps or run.num_batches)
                ScriptLoop().predict(run)
                run.progress.end({})
            return run.predictions()
        finally:
            run.release()
            run.progress.close()

    def __repr__(self) -> str:
        takes = f", takes {self.form}" if self.form is not None else ""
        return f"ExportedModel({str(self.path)!r}, device={str(self.device)!r}{takes})"


class _Net(nn.Module):
    """A file's function as a module; it is no part of it, since exported programs can't be told to evaluate."""

    def __init__(self, function: Callable[..., Any], form: Form | None) -> None:
        super().__init__()
        self._function, self._form = (function,), form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        form = self._form
        if form is None:
            return self._function[0](*args, **kwargs)
        given: Nested = kwargs or (args[0] if isinstance(form.inputs, str) and len(args) == 1 else args)
        if kwargs and not args and not isinstance(form.inputs, Mapping) and kwargs.keys() == form.specs.keys():
            left = iter(form.specs)
            given = map_nested(lambda _: kwargs[next(left)], form.inputs)
        form.check(given)
        given = map_nested(torch.Tensor.contiguous, given)  # machine code takes the layout that it was made for
        if isinstance(form.inputs, str):
            return self._function[0](given)
        return self._function[0](**given) if isinstance(given, Mapping) else self._function[0](*given)


def _fits(tensor: Tensor, dtype: str | None, shape: Sequence[Any]) -> bool:
    if dtype is not None and str(tensor.dtype) != f"torch.{dtype}":
        return False
    return all(not isinstance(one, int) or one == other for one, other in zip(shape, tensor.shape, strict=True))


def _fill(found: dict[str, Tensor], names: Any, given: Any) -> None:
    """Put each tensor under the name that stands in its place."""
    if isinstance(names, str):
        found[names] = given
        return
    if isinstance(names, Mapping):
        if names.keys() != given.keys():
            raise KeyError
        names, given = list(names.values()), [given[key] for key in names]
    for name, part in zip(names, given, strict=True):
        _fill(found, name, part)


# ---- the kinds of files ----


def import_onnxruntime() -> Any:
    """Return the module onnxruntime; ImportError, naming the extra, where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "an .onnx file needs onnx, onnxscript and onnxruntime: pip install 'kerastorch[export]'. A .pt2 file needs "
            "nothing more."
        ) from error
    return onnxruntime


def _load_onnx(ort: Any, path: Path) -> ExportedModel:
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    output_names = [found.name for found in session.get_outputs()]
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is not None:
        form = Form(**json.loads(text))
    else:
        specs: Specs = {found.name: (None, list(found.shape)) for found in session.get_inputs()}
        form = Form(_one_or_all(list(specs)), specs, _one_or_all(output_names))
    outputs = _with_tuples(form.outputs)

    def function(*args: Any, **kwargs: Any) -> Any:
        tensors = form.fill(kwargs or (args[0] if isinstance(form.inputs, str) else args))
        feeds = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
        found = dict(zip(output_names, session.run(None, feeds), strict=True))
        return map_nested(lambda name: None if name is None else torch.from_numpy(found[name]), outputs)

    return ExportedModel(path, function, torch.device("cpu"), form)


def _one_or_all(names: Sequence[str]) -> Any:
    return names[0] if len(names) == 1 else list(names)


def _with_tuples(nest: Any) -> Any:
    """Return what came out of JSON with tuples for lists, as nets return them."""
    if isinstance(nest, dict):
        return {key: _with_tuples(item) for key, item in nest.items()}
    return tuple(map(_with_tuples, nest)) if isinstance(nest, list) else nest


def _load_pt2(path: Path) -> ExportedModel:
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:  # torch.export.load passes a flipped byte
            raise ValueError(f"the checksum of its part {damaged!r} is wrong")
        names = archive.namelist()
        text = next((archive.read(name).decode() for name in names if name.endswith(f"/{METADATA_KEY}")), None)
    if any("data/aotinductor/" in name for name in names):
        compiled = torch._inductor.aoti_load_package(os.fspath(path))
        metadata = compiled.get_metadata()
        device = torch.device(metadata.get("AOTI_DEVICE_KEY", "cpu"))
        return ExportedModel(path, compiled, device, _find_form(metadata.get(METADATA_KEY)))
    if not any(name.endswith(("models/model.json", "serialized_exported_program.json")) for name in names):
        raise ValueError("it holds no exported program, but what torch.save or torch.jit writes, perhaps")
    with warnings.catch_warnings():  # of memory that nothing writes to
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        program = torch.export.load(path)
    held = [value for value in leaves((program.state_dict, program.constants)) if isinstance(value, Tensor)]
    return ExportedModel(path, program.module(), held[0].device if held else torch.device("cpu"), _find_form(text))


def _find_form(text: str | None) -> Form | None:
    return Form(**json.loads(text)) if text else None
