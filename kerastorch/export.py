"""export_model: a net as an ONNX, torch.export or AOTInductor file, loaded again and compared before it counts.

Sister: exported.py, which loads such files.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from kerastorch.checkpoint import sync_folder
from kerastorch.device import (
    Nested,
    describe,
    leaves,
    map_nested,
    move_to_device,
    num_samples,
    preserved_random_state,
)
from kerastorch.errors import check_choice, is_number
from kerastorch.exported import (
    BATCH,
    METADATA_KEY,
    ONE_AT_A_TIME,
    SUFFIXES,
    Form,
    Specs,
    import_onnxruntime,
    load_exported,
)
from kerastorch.lazy import lazy_names
from kerastorch.trial import call_net, copy_net, make_example, refuse_made_floats

if TYPE_CHECKING:
    from kerastorch.model import Model

NOT_THE_USERS = (os.path.dirname(torch.__file__), os.path.dirname(__file__), os.path.dirname(os.__file__), "<")
LEAST_TOLERANCE = 1e-6  # absolute: what float32 leaves where outputs are all but 0


@dataclass(frozen=True)
class ExportReport:
    """What export wrote and how near it is; str() is a line.

    path: the file.   batch_sizes: of the fresh inputs that it was compared on.   max_difference: the largest between
    an output of the file and the net's; max_output: the largest of the net's.   input_names, output_names: of an ONNX
    file; empty otherwise.
    """

    path: Path
    batch_sizes: list[int]
    max_difference: float
    max_output: float
    input_names: list[str]
    output_names: list[str]

    def __str__(self) -> str:
        names = f" ({', '.join(self.input_names)} -> {', '.join(self.output_names)})" if self.input_names else ""
        sizes = " and ".join(map(str, self.batch_sizes))
        return (
            f"{self.path}{names}: loaded again, its outputs differ from the net's, of up to {self.max_output:.2g}, by "
            f"at most {self.max_difference:.1e}, on fresh batches of {sizes}."
        )


def export_model(
    model: Model,
    path: str | os.PathLike[str],
    example: Any,
    *,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    aot_inductor: bool = False,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write the net in eval mode to path; return what a comparison with the net showed. See Model.export."""
    path = Path(path).expanduser()
    check_choice("dynamic_batch", dynamic_batch, (True, False))
    _check_path(path, input_names, output_names, aot_inductor)
    if not is_number(tolerance) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a number from 0, got {tolerance!r}.")
    _check_net(model.net)
    with preserved_random_state(), torch.no_grad():
        x = move_to_device(make_example(example, model.net, "export(path, example)"), model.device)
        for leaf in leaves(x):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"export() needs inputs that are tensors, got {describe(leaf)} in example.")
        if num_samples(x) == 0:
            raise ValueError(f"export() needs an example of one row or more, got {describe(x)}.")
        # Torch takes a length of 1 for one that never changes, and a tensor given twice for one input.
        x = _draw_rows(x, 2) if dynamic_batch and num_samples(x) == 1 else _clone(x)
        sizes = [1, num_samples(x) + 1] if dynamic_batch else [num_samples(x)]
        net = copy_net(model.net)
        refuse_made_floats(net, example, "export(path, example)")
        form = _find_form(net, x, dynamic_batch, input_names, output_names)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder, path.name)
            with ONE_AT_A_TIME, _quiet(), _without_left_hooks():
                program = _trace(copy_net(model.net), x, dynamic_batch, path)  # copies: what forward keeps stays there
                if input_names is None:
                    form = _with_own_names(form, program)
                form = _write(program, written, x, form, path, aot_inductor=aot_inductor)
                del program
            difference, largest = _compare(copy_net(model.net), written, x, sizes, tolerance, path)
            _put_in_place(Path(folder), path)
    is_onnx = path.suffix == ".onnx"
    return ExportReport(
        path,
        sizes,
        difference,
        largest,
        list(leaves(form.inputs)) if is_onnx else [],
        [name for name in leaves(form.outputs) if name is not None] if is_onnx else [],
    )


def _check_path(path: Path, input_names: object, output_names: object, aot_inductor: bool) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"export() writes '.onnx' and '.pt2' files, got {str(path)!r}.")
    if path.is_dir():
        raise IsADirectoryError(f"export() writes a file, but {str(path)!r} is a folder.")
    if path.suffix == ".onnx":
        if aot_inductor:
            raise ValueError(f"aot_inductor=True makes a '.pt2' file, got {str(path)!r}.")
        import_onnxruntime()
        if importlib.util.find_spec("onnxscript") is None:
            raise ImportError("export() to '.onnx' needs onnxscript: pip install 'kerastorch[export]'.")
    elif input_names is not None or output_names is not None:
        raise ValueError(
            "input_names and output_names are for '.onnx' files; a '.pt2' file is called as the net is, with its own "
            "names."
        )


def _check_net(net: nn.Module) -> None:
    for name in lazy_names(net):
        raise ValueError(f"the shape of {name!r} is not known yet: run one batch through the lazy net first.")
    for name, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"export() can't trace {name or 'the net'!r}, which torch.jit has compiled: give it as it was."
            )


# ---- names and axes ----


def _find_form(
    net: nn.Module,
    x: Nested,
    dynamic_batch: bool,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Form:
    """Return how inputs and outputs are nested and called; an error in forward comes as it is."""
    outputs = call_net(net, _clone(x))
    inputs = _name(x, "input", input_names)
    n = num_samples(x)
    specs: Specs = {
        name: (
            str(leaf.dtype).removeprefix("torch."),
            [BATCH if dynamic_batch and i == 0 and size == n else size for i, size in enumerate(leaf.shape)],
        )
        for name, leaf in zip(leaves(inputs), leaves(x), strict=True)
    }
    return Form(inputs, specs, _name(outputs, "output", output_names))


def _name(nest: Nested, kind: str, names: Sequence[str] | None) -> Any:
    """Return nest with a name for each tensor: those given, else keys, else output_0 and so on.

    Raises ValueError for names that don't fit, TypeError for outputs that hold something else than tensors.
    """
    taken: set[str] = set()

    def visit(part: Any, name: str) -> Any:
        if isinstance(part, Mapping):
            for key in part:
                if not isinstance(key, str):
                    raise TypeError(f"export() needs dicts whose keys are strings, got {key!r} among the {kind}s.")
            return {key: visit(item, f"{name}_{key}" if name else key) for key, item in part.items()}
        if isinstance(part, (tuple, list)):
            return [visit(item, f"{name or kind}_{i}") for i, item in enumerate(part)]
        if part is None:
            return None
        if not isinstance(part, Tensor):
            raise TypeError(f"export() needs {kind}s that are tensors, or nests of them, got {describe(part)}.")
        return _unique(name or kind, taken)

    named = visit(nest, "")
    if names is None:
        return named
    count = sum(name is not None for name in leaves(named))
    given = [] if isinstance(names, str) or not isinstance(names, Sequence) else list(names)
    if len(given) != count or len(set(given)) != count or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"{kind}_names must be a name for each of {count} tensors, {describe(nest)}, got {names!r}.")
    left = iter(given)
    return map_nested(lambda name: None if name is None else next(left), named)


def _unique(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _as_arguments(x: Nested) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, dict):
        return (), x
    return (tuple(x) if isinstance(x, (tuple, list)) else (x,)), {}


def _batch_axes(net: nn.Module, x: Nested) -> Any:
    """Return torch.export's dynamic_shapes with one name for the first axis of all that has the batch's rows."""
    collection, n, batch = ShapesCollection(), num_samples(x), Dim(BATCH)
    for leaf in leaves(x):
        if leaf.dim() and len(leaf) == n:
            collection[leaf] = {0: batch}
    return collection.dynamic_shapes(net, *_as_arguments(x))


# ---- tracing and writing ----


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep in what torch says to its developers: the file is compared, and errors are told in our own words."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _without_left_hooks() -> Iterator[None]:
    """Remove the hooks that some releases of torch leave where a trace fails: they stand in the graph loop's way."""
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)
    try:
        yield
    finally:
        for key in set(hooks) - before:
            del hooks[key]


def _trace(net: nn.Module, x: Nested, dynamic_batch: bool, path: Path) -> ExportedProgram:
    """Return net as a graph. Raises ValueError that says which part can't be traced, and why."""
    running: list[str] = []

    def enter(name: str, module: nn.Module, args: object) -> None:
        if not name:
            running.clear()
        running.append(name)

    def leave(module: nn.Module, args: object, outputs: object) -> None:
        running.pop()

    hooks = [
        hook
        for name, module in net.named_modules()
        for hook in (module.register_forward_pre_hook(partial(enter, name)), module.register_forward_hook(leave))
    ]
    args, kwargs = _as_arguments(x)
    try:
        shapes = _batch_axes(net, x) if dynamic_batch else None
        return torch.export.export(net, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        part = next(
            (f"{name!r} ({type(net.get_submodule(name)).__name__})" for name in running[-1:] if name), "forward"
        )
        raise ValueError(f"export() can't write {str(path)!r}: {_reason(error, part)}") from error
    finally:
        for hook in hooks:
            hook.remove()


def _reason(error: Exception, part: str) -> str:
    text = re.sub(r"For more information, run with TORCH_LOGS=\S+", "", str(error).split("\n\n")[0])
    text = " ".join(text.split())[:400] or type(error).__name__
    if "Constraints violated" in text:
        return (
            "forward does not take batches of any length: it makes the length a number, as x.view(32, -1) or "
            "int(len(x)) do, or asks about it; or an input that is no batch has by chance as many rows as one. Write "
            "x.shape[0] there, take an example of another length, or give dynamic_batch=False, for a file that takes "
            f"batches of this length alone. ({text})"
        )
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(NOT_THE_USERS)]
    place = f" at {own[-1].filename}:{own[-1].lineno}, {own[-1].line}" if own else ""
    if "data-dependent" in text:
        return (
            f"{part} goes by values that only a run shows, as if x.sum() > 0 does{place}: use torch.where, say; to "
            f"nn.Transformer's parts give is_causal beside a mask. ({text})"
        )
    return f"{part} stops the tracing{place}: {text}"


def _with_own_names(form: Form, program: ExportedProgram) -> Form:
    """Return form with inputs called as forward calls them."""
    own, specs = iter(map(str, program.graph_signature.user_inputs)), iter(form.specs.values())
    names = map_nested(lambda _: next(own), form.inputs)
    return Form(names, {name: next(specs) for name in leaves(names)}, form.outputs)


def _write(program: ExportedProgram, written: Path, x: Nested, form: Form, path: Path, *, aot_inductor: bool) -> Form:
    """Write a graph with its form; return the form as the file has it. Raises ValueError with the reason."""
    try:
        if path.suffix == ".onnx":
            return _write_onnx(program, written, x, form)
        content = io.BytesIO()  # torch's own file writer ends the process where the disk is full
        if aot_inductor:
            configs = {"aot_inductor.metadata": {METADATA_KEY: form.to_json()}}
            torch._inductor.aoti_compile_and_package(program, package_path=content, inductor_configs=configs)
        else:
            # One number each instead of the user's data, which would be in the file.
            program.example_inputs = _as_arguments(map_nested(lambda leaf: leaf.new_zeros(()).expand(leaf.shape), x))
            torch.export.save(program, content, extra_files={METADATA_KEY: form.to_json()})
        written.write_bytes(content.getbuffer())
    except OSError as error:
        raise OSError(error.errno, f"export() could not write {str(path)!r}: {error.strerror or error}") from error
    except ValueError:
        raise
    except Exception as error:
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        text = next(filter(None, str(causes[-1]).splitlines()), type(error).__name__)
        operator = re.search(r"op='([\w.:]+)'", text)
        reason = (
            f"ONNX has nothing for {operator[1]}, which forward uses: a '.pt2' file can hold it. " if operator else ""
        )
        raise ValueError(f"export() can't write {str(path)!r}: {reason}({text})") from error
    return form


def _write_onnx(program: ExportedProgram, path: Path, x: Nested, form: Form) -> Form:
    """Write an ONNX file, and beside it one for weights of more than 1.5 GB."""
    args, kwargs = _as_arguments(x)
    is_dynamic = any(BATCH in shape for _, shape in form.specs.values())
    shapes = _batch_axes(program.module(), x) if is_dynamic else None
    made = torch.onnx.export(program, args, kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False)
    assert made is not None
    graph = made.model.graph
    weights = set(graph.initializers)
    for name in leaves(form.inputs):
        if name in weights:
            raise ValueError(f"the input name {name!r} is that of a weight: give input_names.")
    taken = {*weights, *leaves(form.inputs)}
    form = Form(
        form.inputs, form.specs, map_nested(lambda name: None if name is None else _unique(name, taken), form.outputs)
    )
    for names, values in ((form.outputs, graph.outputs), (form.inputs, graph.inputs)):
        for value, name in zip(values, [name for name in leaves(names) if name is not None], strict=True):
            value.name = name
    made.model.metadata_props[METADATA_KEY] = form.to_json()
    made.save(path)
    return form


def _put_in_place(folder: Path, path: Path) -> None:
    """Move the files of a folder beside path, or to where path links, once they are on the disk."""
    target = Path(os.path.realpath(path))
    for file in sorted(folder.iterdir(), reverse=True):  # weights beside an ONNX file come before it
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(file, target.with_name(target.name + file.name.removeprefix(path.name)))
    sync_folder(target.parent)


# ---- comparing ----


def _compare(
    net: nn.Module, written: Path, x: Nested, sizes: Sequence[int], tolerance: float, path: Path
) -> tuple[float, float]:
    """Return the largest difference between the outputs of net and file for fresh inputs, and the largest output.

    Raises ValueError where they differ by more than tolerance times the largest value of that output.
    """
    left = f"export() left no {str(path)!r}"
    try:
        loaded = load_exported(written)
    except ValueError as error:
        is_small = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in net.parameters())
        hint = " ONNX Runtime lacks operators for such short floats: export net.float(), or to '.pt2'."
        raise ValueError(
            f"{left}: what it wrote can't run: {error.__cause__ or error}{hint if is_small else ''}"
        ) from error
    most, largest, num_compared = 0.0, 0.0, 0
    for size in sizes:
        fresh = _draw_rows(x, size)
        try:
            expected = call_net(net, _clone(fresh))
        except Exception as error:
            raise ValueError(
                f"{left}: it is compared on batches of {' and '.join(map(str, sizes))}, made of example's rows, and "
                f"the net fails for {size}: {error} Where it takes no batches of any length give dynamic_batch=False."
            ) from error
        try:
            found = call_net(loaded, _clone(fresh))
        except Exception as error:
            raise ValueError(f"{left}: it fails for a batch of {size}: {error}") from error
        for one, other in zip(leaves(expected), leaves(found), strict=True):
            if one is None:
                continue
            if one.shape != other.shape or one.dtype != other.dtype:
                raise ValueError(
                    f"{left}: for a batch of {size} the net gives {describe(one)}, the file {describe(other)}. Does "
                    "forward ask for the length of the batch, or squeeze() it away?"
                )
            difference, scale, count = _difference(one, other)
            if not difference <= max(tolerance * scale, LEAST_TOLERANCE):
                again = call_net(net, _clone(fresh))
                same = all(
                    a is None or torch.equal(a.nan_to_num(), b.nan_to_num())
                    for a, b in zip(leaves(again), leaves(expected), strict=True)
                )
                why = (
                    f"If that is near enough, give tolerance={1.1 * difference / max(scale, 1e-30):.1g}."
                    if same
                    else "Forward gives other outputs when it is called again with the same input: it draws random "
                    "numbers or keeps a state, so that no file can agree with it."
                )
                raise ValueError(
                    f"{left}: for a batch of {size} its outputs differ from the net's, of up to {scale:.2g}, by "
                    f"{difference:.1e}. {why}"
                )
            most, largest, num_compared = max(most, difference), max(largest, scale), num_compared + count
    if num_compared == 0:
        raise ValueError(f"{left}: the net's outputs hold no finite number, so that nothing could be compared.")
    return most, largest


def _difference(one: Tensor, other: Tensor) -> tuple[float, float, int]:
    """Return the largest difference, inf where only one is finite, the largest value, and how many are finite."""
    one, other = (
        (torch.view_as_real(value) if value.is_complex() else value).detach().cpu().double() for value in (one, other)
    )
    is_same = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(is_same, 0.0, (one - other).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    finite = one[one.isfinite()].abs()
    return (
        float(difference.max()) if difference.numel() else 0.0,
        float(finite.max()) if finite.numel() else 0.0,
        finite.numel(),
    )


def _clone(x: Nested) -> Nested:
    return map_nested(lambda leaf: leaf.contiguous().clone(), x)


def _draw_rows(x: Nested, size: int) -> Nested:
    """Return `size` rows out of x, in all inputs the same, with floats moved a little."""
    n = num_samples(x)
    index = torch.arange(size) if size <= n else torch.randint(n, (size,))

    def draw(leaf: Tensor) -> Tensor:
        rows = leaf[index.to(leaf.device)] if leaf.dim() and len(leaf) == n else leaf.clone()
        if not (leaf.is_floating_point() or leaf.is_complex()):
            return rows
        return torch.randn_like(rows) if not bool(rows.any()) else rows * (1 + 0.1 * torch.randn_like(rows))

    return map_nested(draw, x)
