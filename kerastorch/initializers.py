"""Initial weights by name: initialize() fills a net's parameters, chosen by layer type or by glob on their names.

The names are torch.nn.init's and Keras's for the same thing. Sisters: losses.py, optimizers.py, metrics.py.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kerastorch.device import bare_module, preserved_random_state
from kerastorch.errors import check_int, did_you_mean, is_number, look_up

InitializerSpec = str | float | tuple[str, Mapping[str, Any]] | Callable[[Tensor], Any]
Pattern = str | type[nn.Module]
Net = TypeVar("Net", bound=nn.Module)

INITIALIZERS: dict[str, Callable[..., Tensor]] = {
    "uniform": nn.init.uniform_,
    "normal": nn.init.normal_,
    "trunc_normal": nn.init.trunc_normal_,
    "constant": nn.init.constant_,
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
    "eye": nn.init.eye_,
    "dirac": nn.init.dirac_,
    "orthogonal": nn.init.orthogonal_,
    "sparse": nn.init.sparse_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    # Keras's words; torch's numbers: *_normal is not cut off at two standard deviations
    "random_uniform": nn.init.uniform_,
    "random_normal": nn.init.normal_,
    "truncated_normal": nn.init.trunc_normal_,
    "identity": nn.init.eye_,
    "glorot_uniform": nn.init.xavier_uniform_,
    "glorot_normal": nn.init.xavier_normal_,
    "he_uniform": nn.init.kaiming_uniform_,
    "he_normal": nn.init.kaiming_normal_,
    "lecun_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="linear"),
    "lecun_normal": partial(nn.init.kaiming_normal_, nonlinearity="linear"),
}
# "bias" and "in_proj_bias", "bias_ih_l0_reverse" of recurrent layers, "bias_k" of attention; not "bias_scale"
BIAS = re.compile(r"(.+_)?bias|bias_(ih|hh)(_.+)?|bias_[kv]")


def initialize(net: Net, rules: Mapping[Pattern, InitializerSpec], seed: int | None = None) -> Net:
    """Fill parameters of net in place as rules say, and return net; those that no rule meets stay as they are.

    rules: {pattern: initializer}, for example {"nn.Linear": "xavier_uniform", "*.bias": "zeros"}; a parameter takes the
    first rule that matches it. A pattern is a layer type (its name or the class, subclasses too), which stands for the
    layer's own parameters but for its biases ("bias", "..._bias", "bias_ih_l0"), or a glob on parameter names. An
    initializer is a name, a number (fills), a pair of name and torch's arguments, ("normal", {"std": 0.02}), or a
    function that fills or returns a tensor.
    seed: the same seed gives the same weights on every device and leaves the global random states as they were; None
    draws from torch's global generator.
    A layer type leaves the padding_idx row of an embedding zero, as torch does; a glob fills that row too.
    Values are made on the CPU, all before the first is written: an error leaves net untouched.
    Raises TypeError for what is no module, pattern or initializer, ValueError for unknown names and arguments (naming
    the nearest), for a pattern that matches nothing or nothing more, and for what the initializer can't fill.
    """
    if not isinstance(net, nn.Module):
        hint = ": give its net, model.net" if isinstance(getattr(net, "net", None), nn.Module) else ""
        raise TypeError(f"initialize(net, rules) takes an nn.Module, got {type(net).__name__}{hint}.")
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules must be a dict, such as {{'nn.Linear': 'xavier_uniform'}}, got {rules!r}.")
    if seed is not None:
        check_int("seed", seed, at_least=0)
        if seed >= 2**64:
            raise ValueError(f"seed must be at most 2**64 - 1, got {seed}.")
    for pattern in rules:
        if not isinstance(pattern, str) and not (isinstance(pattern, type) and issubclass(pattern, nn.Module)):
            raise TypeError(
                f"a pattern must be a layer type or a string, such as nn.Linear or '*.bias', got {pattern!r}."
            )
    plan = _plan(bare_module(net), {pattern: make_initializer(spec) for pattern, spec in rules.items()})
    with torch.no_grad(), nullcontext() if seed is None else preserved_random_state():
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reach a GPU not yet in use
        values = [_make_values(step) for step in plan]
        for step, value in zip(plan, values, strict=True):
            step.parameter.copy_(value)
            if step.padding_row is not None:
                step.parameter[step.padding_row] = 0
    return net


def make_initializer(spec: InitializerSpec) -> Callable[[Tensor], Any]:
    """Return the function meant, which fills a tensor in place or returns another of its shape.

    spec: a name, a number, a pair (name, arguments), or a function, which is returned as it is.
    Raises ValueError for an unknown name or argument, or a missing one; TypeError for anything else.
    """
    if is_number(spec):
        spec = ("constant", {"val": spec})
    elif isinstance(spec, str):
        spec = (spec, {})
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], str) and isinstance(spec[1], Mapping):
        return _with_arguments(*spec)
    if not callable(spec):
        raise TypeError(
            "an initializer must be a name, a number, a pair such as ('normal', {'std': 0.02}) or a function of a "
            f"tensor, got {spec!r}. Names: {', '.join(sorted(INITIALIZERS))}."
        )
    return spec


def _with_arguments(name: str, arguments: Mapping[str, Any]) -> Callable[[Tensor], Any]:
    function = look_up("initializer", name, INITIALIZERS)
    _, *parameters = inspect.signature(function).parameters.values()  # the first is the tensor
    known = [parameter.name for parameter in parameters if parameter.name != "generator"]
    for argument in arguments:
        if argument not in known:
            raise ValueError(
                f"initializer {name!r} has no argument {argument!r}{did_you_mean(argument, known)} "
                f"Known: {', '.join(known) or 'none'}."
            )
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise ValueError(
                f"initializer {name!r} needs {parameter.name!r}: write ({name!r}, {{{parameter.name!r}: 0.1}})."
            )
    return partial(function, **arguments)


@dataclass(frozen=True)
class _Step:
    """One parameter to fill.   padding_row: the row that stays zero, since no gradient would undo what is written."""

    name: str
    parameter: nn.Parameter
    pattern: Pattern
    initializer: Callable[[Tensor], Any]
    padding_row: int | None


def _plan(net: nn.Module, initializers: Mapping[Pattern, Callable[[Tensor], Any]]) -> list[_Step]:
    """The steps, in the order of net's parameters: draws with a seed do not depend on the order of the rules."""
    named = dict(net.named_parameters(remove_duplicate=False))
    padding_rows = _padding_rows(net)
    chosen: dict[int, _Step] = {}  # by parameter: a shared one has several names
    for pattern, initializer in initializers.items():
        names = _matching(net, pattern, named)
        fresh = [name for name in names if id(named[name]) not in chosen]
        if not fresh:
            raise ValueError(
                f"pattern {_show(pattern)} comes too late: earlier patterns match all of its parameters "
                f"({_shorten(names)}), and the first match counts. Put it before them."
            )
        is_type = bool(_layers(net, pattern))
        for name in fresh:
            row = padding_rows.get(id(named[name])) if is_type else None
            chosen.setdefault(id(named[name]), _Step(name, named[name], pattern, initializer, row))
    steps = [chosen[id(parameter)] for parameter in net.parameters() if id(parameter) in chosen]
    for step in steps:
        if isinstance(step.parameter, UninitializedParameter):
            raise ValueError(
                f"the shape of {step.name!r} is not known yet: run one batch through the lazy net before initialize()."
            )
    return steps


def _matching(net: nn.Module, pattern: Pattern, named: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of the parameters that pattern stands for.   Raises ValueError, with near matches, for none."""
    if layers := _layers(net, pattern):
        for name, module in layers:
            if _is_parametrized(module):  # its weight is computed from others, which a rule for weights does not suit
                made_of = [f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters()]
                raise ValueError(
                    f"pattern {_show(pattern)} matches {name or 'the net'!r}, whose parameters are parametrized "
                    "(weight_norm, say): call initialize() before that, or reach what it is made of by globs. "
                    f"Parameters: {_shorten(made_of)}."
                )
        own = [f"{prefix}.{name}".lstrip(".") for prefix, m in layers for name, _ in m.named_parameters(recurse=False)]
        matching = [name for name in own if not BIAS.fullmatch(name.rpartition(".")[2])]
        if not matching:
            raise ValueError(
                f"pattern {_show(pattern)} matches layers that have no parameters of their own beside biases, which "
                f"are reached by a glob, such as '*.bias'. Parameters: {_shorten(named)}."
            )
        return matching
    matching = [name for name in named if isinstance(pattern, str) and fnmatch.fnmatchcase(name, pattern)]
    if not matching:
        text = pattern if isinstance(pattern, str) else pattern.__name__
        names_of = {type(m).__name__: [n for n in _type_names(type(m)) if isinstance(n, str)] for m in net.modules()}
        meant = [kind for kind in sorted(names_of) if fnmatch.filter(names_of[kind], text)]
        known = [name for names in names_of.values() for name in names if "._" not in f".{name}"]  # not nn._ConvNd
        hint = f"; a layer type is no glob: give {_shorten([*map(repr, meant)])} a rule each."
        raise ValueError(
            f"pattern {_show(pattern)} matches no layer type and no parameter"
            f"{hint if meant else did_you_mean(text, [*known, *named])} "
            f"Layer types: {_shorten(sorted(names_of))}. Parameters: {_shorten(named)}."
        )
    return matching


def _layers(net: nn.Module, pattern: Pattern) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in net.named_modules() if pattern in _type_names(type(module))]


def _type_names(cls: type[nn.Module]) -> set[Pattern]:
    """All that a layer's type may be called: "Linear", "nn.Linear", "torch.nn.Linear", the class; its bases' too."""
    names: set[Pattern] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        names |= {base, base.__name__, f"{base.__module__}.{base.__qualname__}"}
        if base.__module__.startswith("torch.nn."):
            names |= {f"nn.{base.__name__}", f"torch.nn.{base.__name__}"}
    return names


def _is_parametrized(module: nn.Module) -> bool:
    old = (WeightNorm, SpectralNorm)  # of nn.utils.weight_norm and spectral_norm, which work by hooks
    return is_parametrized(module) or any(isinstance(hook, old) for hook in module._forward_pre_hooks.values())


def _padding_rows(net: nn.Module) -> dict[int, int]:
    """The rows that padding_idx names, by the id of their parameter."""
    embeddings = [module for module in net.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    return {id(module.weight): module.padding_idx for module in embeddings if module.padding_idx is not None}


def _make_values(step: _Step) -> Tensor:
    values = step.parameter.detach().to("cpu", copy=True)
    function = getattr(step.initializer, "func", step.initializer)
    errors = Exception if getattr(function, "__module__", None) == nn.init.__name__ else ValueError
    try:
        returned = step.initializer(values)
    except errors as error:  # torch's words do not say which tensor
        where = f"{step.name!r} of shape {tuple(values.shape)}"
        is_missing = isinstance(error, NotImplementedError) or "not implemented for" in str(error)
        way_out = " Call initialize() before .half() or .bfloat16()." if is_missing else ""
        raise (TypeError if isinstance(error, TypeError) else ValueError)(
            f"the initializer for {_show(step.pattern)} can't fill {where}: {str(error).rstrip('.')}.{way_out}"
        ) from error
    made = returned if isinstance(returned, Tensor) else values
    if made.shape != values.shape:
        raise ValueError(
            f"the initializer for {_show(step.pattern)} made shape {tuple(made.shape)} for {step.name!r}, "
            f"which has shape {tuple(values.shape)}."
        )
    return made


def _show(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else pattern.__name__


def _shorten(names: Mapping[str, Any] | list[str]) -> str:
    return ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")
