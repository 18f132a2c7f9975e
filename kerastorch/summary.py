"""summarize: a net's layers, output shapes, parameters, memory and FLOPs, from one forward pass of a copy.

FLOPs are counted by torch's own FlopCounterMode. Sister: check.py, which looks for faults.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.rnn import PackedSequence

from kerastorch.device import Nested, leaves, move_to_device, preserved_random_state
from kerastorch.report import format_bytes, html_table
from kerastorch.trial import call_net, copy_net, make_example, refuse_made_floats

if TYPE_CHECKING:
    from kerastorch.model import Model

COLUMNS = ("layer", "kind", "output", "trainable", "frozen", "FLOPs", "notes")
NUMBERS = ("trainable", "frozen", "FLOPs")  # set to the right


@dataclass(frozen=True)
class Row:
    """One module, its submodules' figures left out, so that columns add up.

    output: shapes of its first call; "" without input.   trainable, frozen: values in parameters that no row above has.
    flops: of all its calls; None without input.   notes: what is shared, how often it was called.
    """

    name: str
    kind: str
    output: str
    trainable: int
    frozen: int
    flops: int | None
    notes: str


@dataclass(frozen=True, repr=False)
class Summary:
    """What summarize found; str() is a page, a notebook shows a table.

    rows: one for each module, in the order of the net.   trainable, frozen, shared: numbers of values in parameters,
    each counted once; shared are those with several names.   lazy: how many parameters have no shape yet, in no figure.
    Bytes: of parameters, of the gradients that training adds, of buffers, and, for the input given, of it and of what
    layers without inner layers return.
    flops: of one forward pass, as torch counts: some products of sparse matrices are left out, others are taken for
    dense.   The last three are None without input.
    """

    rows: list[Row]
    trainable: int
    frozen: int
    shared: int
    lazy: int
    parameter_bytes: int
    gradient_bytes: int
    buffer_bytes: int
    input_bytes: int | None
    output_bytes: int | None
    flops: int | None

    @property
    def parameters(self) -> int:
        """Trainable and frozen together."""
        return self.trainable + self.frozen

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        align = [str.rjust if name in NUMBERS else str.ljust for name in table[0]]
        lines = ["  ".join(a(c, w) for a, c, w in zip(align, row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, "", *self._totals()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._table()) + "".join(f"<p>{line}</p>" for line in self._totals())

    def _table(self) -> list[Sequence[str]]:
        """Rows of text under a row of names; a column in which nothing stands is left out."""
        rows = [
            (row.name, row.kind, row.output, *map(_number, (row.trainable, row.frozen, row.flops)), row.notes)
            for row in self.rows
        ]
        columns = [column for column in zip(COLUMNS, *rows, strict=True) if any(column[1:])]
        return list(zip(*columns, strict=True))

    def _totals(self) -> Iterator[str]:
        shared = f"; {self.shared:,} of them shared, counted once" if self.shared else ""
        lazy = f"; the shapes of {self.lazy:,} more are not known yet" if self.lazy else ""
        yield f"Parameters: {self.parameters:,} ({self.trainable:,} trainable, {self.frozen:,} frozen){shared}{lazy}."
        parts = {
            "parameters": self.parameter_bytes,
            "their gradients": self.gradient_bytes,
            "buffers": self.buffer_bytes,
            "input": self.input_bytes,
            "layer outputs": self.output_bytes,
        }
        yield "Memory: " + ", ".join(f"{k} {format_bytes(v)}" for k, v in parts.items() if v is not None) + "."
        if self.flops is not None:
            yield f"FLOPs: {self.flops:,} in one forward pass: matrix products, convolutions and attention."


def summarize(model: Model, x: Any = None) -> Summary:
    """Return the Summary of a model's net, after a forward pass in eval mode, without gradients, of a copy.

    x: a batch of inputs (a tensor or array; a tuple or list for net(*x), a dict for net(**x)), or its size with the
    batch axis in front, such as (32, 1, 28, 28), or a tuple, list or dict of sizes; sizes become random floats, so
    integers need a batch. None: no forward pass, thus no shapes and no FLOPs.
    Precision is the weights' own, whatever compile() was told. A multiply-add is two FLOPs. The net, its state and all
    random states are left as they were.
    Raises TypeError for what is no input and for a size where an embedding wants integers, ValueError for a size that
    can't be; an error in forward comes as it is.
    """
    with preserved_random_state():
        net = copy_net(model.net)
        if x is None:
            return _summary(net, None, None)
        batch = move_to_device(make_example(x, net, "summary(x)"), model.device)
        refuse_made_floats(net, x, "summary(x)")
        with torch.no_grad(), _slow_attention(), _Watch(net) as watch:
            call_net(net, batch)
        return _summary(net, watch, sum(tensor.nbytes for tensor in _tensors(batch)))


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Keep transformer layers from the fused path, which calls no inner layer and which no counter knows."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@dataclass
class _Calls:
    """What was seen of one module."""

    output: str = ""
    count: int = 0
    flops: int = 0


@dataclass
class _OpenCall:
    """A call under way."""

    module: nn.Module
    flops_before: int
    inner_flops: int = 0
    has_inner: bool = False


@dataclass
class _Watch:
    """Notes each module's calls while it is entered. Its hooks stay: net is a copy, thrown away after."""

    net: nn.Module
    calls: dict[nn.Module, _Calls] = field(default_factory=dict)
    output_bytes: int = 0
    _open: list[_OpenCall] = field(default_factory=list)

    def __enter__(self) -> _Watch:
        from torch.utils.flop_counter import FlopCounterMode  # it loads slowly

        aten = torch.ops.aten
        uncounted = {  # by torch, or by some releases of it
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten.mkldnn_rnn_layer: _layer_flops,
            aten._cudnn_rnn: _cudnn_flops,
            aten._trilinear: _bilinear_flops,
            **dict.fromkeys((aten.mv, aten.dot, aten.vdot), _vector_flops),
            **dict.fromkeys((aten.addmv, aten.addbmm), _added_flops),
        }
        self.counter = FlopCounterMode(display=False, custom_mapping=uncounted)
        for module in self.net.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True)  # nets may catch errors
        self.counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.counter.__exit__(*error)

    def _before(self, module: nn.Module, args: Any) -> None:
        if self._open:
            self._open[-1].has_inner = True
        self._open.append(_OpenCall(module, self.counter.get_total_flops()))

    def _after(self, module: nn.Module, args: Any, kwargs: Any, outputs: Nested) -> None:
        if not self._open or self._open[-1].module is not module:
            return  # an earlier hook raised, so that the call never began
        call = self._open.pop()
        flops = self.counter.get_total_flops() - call.flops_before
        if self._open:
            self._open[-1].inner_flops += flops
        calls = self.calls.setdefault(module, _Calls(_shapes(outputs)))
        calls.count += 1
        calls.flops += flops - call.inner_flops
        if not call.has_inner:
            inputs = {_address(tensor) for tensor in _tensors((args, kwargs))}  # views, and layers that work in place
            self.output_bytes += sum(t.nbytes for t in _tensors(outputs) if _address(t) not in inputs)


def _layer_flops(x: Sequence[int], w_x: Sequence[int], w_h: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of one recurrent layer on a CPU; all arguments that are tensors come as shapes."""
    return 2 * prod(x[:-1]) * (prod(w_x) + prod(w_h))


def _cudnn_flops(x: Sequence[int], weights: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> int:
    """Of all recurrent layers on a GPU: each matrix meets each step of each row once."""
    return 2 * prod(x[:-1]) * sum(prod(shape) for shape in weights if len(shape) == 2)


def _bilinear_flops(x: Sequence[int], w: Sequence[int], y: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """x (n, i) with each of the matrices of w (outputs, i, j), and then with y (n, j); F.bilinear alone calls it."""
    return 2 * x[0] * (prod(w) + w[0] * w[2])


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """q (n, heads, queries, i) with the keys of k (n, heads, keys, i), and the weights with v (n, heads, keys, j)."""
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _vector_flops(a: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of a matrix or vector with a vector."""
    return 2 * prod(a)


def _added_flops(added: Any, a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of a product that is added to something: b is a vector, or the matrices of a batch."""
    return 2 * prod(a) * (b[-1] if len(b) == 3 else 1)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _tensors(value: Nested) -> Iterator[Tensor]:
    for leaf in leaves(value):
        if isinstance(leaf, PackedSequence):
            yield leaf.data
        elif isinstance(leaf, Tensor):
            yield leaf


def _shapes(outputs: Nested) -> str:
    """(2, 3) for a tensor, ((2, 3), (2,)) for a tuple, {a: (2, 3)} for a dict; a type's name for what is no tensor."""
    if isinstance(outputs, PackedSequence):
        return f"packed {tuple(outputs.data.shape)}"
    if isinstance(outputs, Tensor):
        return str(tuple(outputs.shape))
    if isinstance(outputs, Mapping):
        return "{" + ", ".join(f"{key}: {_shapes(item)}" for key, item in outputs.items()) + "}"
    if isinstance(outputs, (tuple, list)):
        return f"({', '.join(map(_shapes, outputs))})"
    return "None" if outputs is None else type(outputs).__name__


def _summary(net: nn.Module, watch: _Watch | None, input_bytes: int | None) -> Summary:
    parameters = [p for p in net.parameters() if not isinstance(p, UninitializedParameter)]
    trainable = [p for p in parameters if p.requires_grad]
    names = [id(p) for _, p in net.named_parameters(remove_duplicate=False)]
    return Summary(
        rows=list(_rows(net, watch)),
        trainable=_count(trainable),
        frozen=_count(parameters) - _count(trainable),
        shared=sum(p.numel() for p in parameters if names.count(id(p)) > 1),
        lazy=sum(isinstance(p, UninitializedParameter) for p in net.parameters()),
        parameter_bytes=sum(p.nbytes for p in parameters),
        gradient_bytes=sum(p.nbytes for p in trainable),
        buffer_bytes=sum(b.nbytes for b in net.buffers() if not isinstance(b, UninitializedParameter)),
        input_bytes=input_bytes,
        output_bytes=watch.output_bytes if watch is not None else None,
        flops=watch.counter.get_total_flops() if watch is not None else None,
    )


def _rows(net: nn.Module, watch: _Watch | None) -> Iterator[Row]:
    modules: dict[nn.Module, str] = {}
    parameters: dict[nn.Parameter, str] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        kind = type(module).__name__
        if module in modules:
            yield Row(name, kind, "", 0, 0, None, f"is {modules[module]}")
            continue
        modules[module] = name = name or "net"
        fresh, notes = [], []
        for own, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, UninitializedParameter):
                notes.append(f"{own}'s shape is not known yet")
            elif parameter in parameters:
                notes.append(f"{own} is {parameters[parameter]}")
            else:
                fresh.append(parameter)
                parameters[parameter] = f"{name}.{own}"
        calls = watch.calls.get(module, _Calls()) if watch is not None else None
        if calls is not None and calls.count > 1:
            notes.append(f"{calls.count} calls")
        trainable = _count([p for p in fresh if p.requires_grad])
        output, flops = (calls.output, calls.flops) if calls is not None else ("", None)
        yield Row(name, kind, output, trainable, _count(fresh) - trainable, flops, "; ".join(notes))


def _count(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _number(value: int | None) -> str:
    return f"{value:,}" if value else ""
