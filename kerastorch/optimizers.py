"""Optimizers and learning-rate schedulers by name, class, factory or object; parameter groups by glob.

Sisters: losses.py, metrics.py.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from kerastorch.device import bare_module
from kerastorch.errors import did_you_mean, look_up
from kerastorch.lazy import lazy_names

OptimizerFactory = Callable[[Any], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
OptimizerSpec = str | type[Optimizer] | OptimizerFactory | Optimizer
SchedulerSpec = str | type[LRScheduler] | SchedulerFactory | LRScheduler

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "sparse_adam": torch.optim.SparseAdam,
    "lbfgs": torch.optim.LBFGS,
}

# These two span a fit: name -> (optimizer, number of scheduler steps in the fit) -> scheduler.
SPANNING_SCHEDULERS: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "cosine": lambda optimizer, total: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total),
    "one_cycle": lambda optimizer, total: torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total,
        cycle_momentum=all(group.get("momentum") or "betas" in group for group in optimizer.param_groups),
    ),
}
_SCHEDULED = ("lr", "momentum", "betas")  # what they change
ONE_CYCLE_STEPS = 4
SCHEDULERS: dict[str, SchedulerFactory | str] = {
    **{name: name for name in SPANNING_SCHEDULERS},
    "reduce_on_plateau": ReduceLROnPlateau,
}


class NamedOptimizers(Optimizer):
    """Several optimizers under one roof: optimizer["generator"] is one of them, step() and zero_grad() reach all.

    param_groups and state are those of all, in order; state_dict() is {name: that optimizer's}.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:  # the parts hold what Optimizer.__init__ makes
        self.optimizers, self.defaults = dict(optimizers), {}

    def __getitem__(self, name: str) -> Optimizer:
        return self.optimizers[name]

    def __reduce__(self) -> tuple[type[NamedOptimizers], tuple[dict[str, Optimizer]]]:
        return NamedOptimizers, (self.optimizers,)  # copies and pickles

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        return {key: value for optimizer in self.optimizers.values() for key, value in optimizer.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers.values():
            optimizer.step()

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any:
        return _Handles([optimizer.register_step_pre_hook(hook) for optimizer in self.optimizers.values()])

    def register_step_post_hook(self, hook: Callable[..., Any]) -> Any:
        return _Handles([optimizer.register_step_post_hook(hook) for optimizer in self.optimizers.values()])

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])


@dataclass
class _Handles:
    handles: list[RemovableHandle]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class NamedSchedulers(LRScheduler):
    """The schedulers of NamedOptimizers, by the same names; step() reaches all."""

    def __init__(self, schedulers: Mapping[str, LRScheduler]) -> None:  # the parts hold what LRScheduler.__init__ makes
        self.schedulers = dict(schedulers)

    def __getitem__(self, name: str) -> LRScheduler:
        return self.schedulers[name]

    def get_last_lr(self) -> list[float | Tensor]:
        return [rate for scheduler in self.schedulers.values() for rate in scheduler.get_last_lr()]

    def step(self, epoch: int | None = None) -> None:
        for scheduler in self.schedulers.values():
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state_dict[name])


def make_optimizers(optimizers: Mapping[str, OptimizerSpec], net: nn.Module, loss: object = None) -> NamedOptimizers:
    """Return several optimizers, each over the submodule of net that its name names, or as given where it is an object.

    loss: its parameters, where it has some, must be in an optimizer given.
    Raises ValueError for a name that is no submodule, parameters in two optimizers, and as make_optimizer.
    """
    net = bare_module(net)
    if not optimizers:
        raise ValueError("optimizer={} holds no optimizer.")
    parts = {name for name, _ in net.named_modules() if name}
    made = {}
    for name, optimizer in optimizers.items():
        if not isinstance(optimizer, Optimizer) and name not in parts:
            raise ValueError(
                f"optimizer[{name!r}] is to be made, but the net has no part of that name{did_you_mean(name, parts)} "
                f"Parts: {', '.join(sorted(parts))}. Or give an optimizer object."
            )
        part = net if isinstance(optimizer, Optimizer) else net.get_submodule(name)
        made[name] = make_optimizer(optimizer, part)
    owner: dict[int, str] = {}
    for name, one in made.items():
        for parameter in (parameter for group in one.param_groups for parameter in group["params"]):
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"optimizers {owner[id(parameter)]!r} and {name!r} hold the same parameters.")
    if isinstance(loss, nn.Module) and not {id(parameter) for parameter in loss.parameters()} <= owner.keys():
        raise ValueError(
            "the loss has parameters, which none of the optimizers holds: give one as an object over them."
        )
    return NamedOptimizers(made)


def single_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers that step."""
    return list(optimizer.optimizers.values()) if isinstance(optimizer, NamedOptimizers) else [optimizer]


def describe_kinds(value: Optimizer | LRScheduler | None) -> str:
    """Return the class's name, "Adam", or those of several, "discriminator: Adam, generator: SGD"."""
    parts: Mapping[str, object] = {}
    if isinstance(value, NamedOptimizers):
        parts = value.optimizers
    elif isinstance(value, NamedSchedulers):
        parts = value.schedulers
    else:
        return type(value).__name__
    return ", ".join(f"{name}: {type(parts[name]).__name__}" for name in sorted(parts))


def make_optimizer(
    optimizer: OptimizerSpec,
    net: nn.Module,
    loss: object = None,
    param_groups: Mapping[str, Mapping[str, Any]] | None = None,
) -> Optimizer:
    """Return the optimizer meant, over the parameters of net (and of loss, where that is a module with parameters).

    optimizer: a name (torch's defaults, and fused=True where torch supports it for these parameters); a class or a
    factory, called with the parameters only; an object, used as given.
    param_groups: {glob on parameter names: options}; a parameter joins the first pattern that matches it.
    A lazy net's parameters get their shapes in place, at the first batch.
    Raises ValueError for an unknown name (naming the nearest), a pattern that matches nothing, an option the optimizer
    does not have, an object that holds none of net's parameters, or an optimizer that needs to know the shapes of a
    lazy net's; TypeError for anything else.
    """
    named = dict(net.named_parameters())
    if isinstance(loss, nn.Module):
        of_net = set(map(id, named.values()))  # a loss may hold the net, or a layer of it
        named |= {f"loss.{name}": part for name, part in loss.named_parameters() if id(part) not in of_net}
    if isinstance(optimizer, Optimizer):
        if param_groups is not None:
            raise ValueError(
                "param_groups needs an optimizer given by name or class: an object has its groups already."
            )
        _check_holds(optimizer, named)
        return optimizer
    if not isinstance(optimizer, str) and not callable(optimizer):
        raise TypeError(
            "optimizer must be a name, a torch.optim class, a callable parameters -> optimizer or an optimizer, "
            f"got {optimizer!r}. Names: {', '.join(sorted(OPTIMIZERS))}."
        )
    cls = look_up("optimizer", optimizer, OPTIMIZERS) if isinstance(optimizer, str) else optimizer
    if not named:
        raise ValueError(f"{type(net).__name__} has no parameters: there is nothing for the optimizer to train.")
    lazy = [name for name, parameter in named.items() if is_lazy(parameter)]
    if of_loss := [name for name in lazy if name not in lazy_names(net)]:
        raise ValueError(
            f"the shape of {of_loss[0]!r} is not known yet: call the loss once, loss(outputs, y), before compile()."
        )
    groups = _group_parameters(named, param_groups)
    factory = cast(OptimizerFactory, cls)
    try:
        made = _make_fused(factory, groups, net) if isinstance(optimizer, str) else factory(groups)
    except (ValueError, RuntimeError) as error:
        if not lazy:
            raise
        raise _needs_shape(lazy[0]) from error
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, but {cls!r} made a {type(made).__name__}.")
    if lazy and not _has_groups(made, groups):  # it may have gone by ndim, which is 1 until the shape is known
        raise _needs_shape(lazy[0])
    _check_options(made, param_groups)
    return made


def _needs_shape(name: str) -> ValueError:
    return ValueError(
        f"this optimizer can't be made while the shape of {name!r} is not known: run one batch through the lazy net "
        "before compile(), for example net(x[:1])."
    )


def _has_groups(optimizer: Optimizer, groups: list[Any]) -> bool:
    """Whether the optimizer holds the parameters as they were given to it."""
    given = groups if isinstance(groups[0], dict) else [{"params": groups}]
    ids, given_ids = ([list(map(id, group["params"])) for group in part] for part in (optimizer.param_groups, given))
    return ids == given_ids


def _group_parameters(
    named: Mapping[str, nn.Parameter], param_groups: Mapping[str, Mapping[str, Any]] | None
) -> list[nn.Parameter] | list[dict[str, Any]]:
    if param_groups is None:
        return list(named.values())
    groups: dict[str | None, dict[str, Any]] = {None: {"params": []}}
    groups |= {pattern: {"params": [], **options} for pattern, options in param_groups.items()}
    for name, parameter in named.items():
        pattern = next((pattern for pattern in param_groups if fnmatch.fnmatchcase(name, pattern)), None)
        groups[pattern]["params"].append(parameter)
    for pattern in param_groups:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"param_groups pattern {pattern!r} matches no parameter{did_you_mean(pattern, named)} "
                f"Parameters: {', '.join(list(named)[:8])}{', ...' if len(named) > 8 else ''}."
            )
    return [group for group in groups.values() if group["params"]]


def _make_fused(cls: OptimizerFactory, groups: list[Any], net: nn.Module) -> Optimizer:
    parameters = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    is_sparse = any(getattr(module, "sparse", False) is True for module in net.modules())
    has_fused = "fused" in inspect.signature(cls).parameters
    # Some torch releases have fused Adagrad on the CPU alone, and say so no earlier than at the first step.
    on_its_device = cls is not torch.optim.Adagrad or all(parameter.is_cpu for parameter in parameters)
    is_dense = not is_sparse and all(parameter.is_floating_point() for parameter in parameters)
    if has_fused and is_dense and on_its_device:
        try:
            return cast(Callable[..., Optimizer], cls)(groups, fused=True)
        except RuntimeError:  # torch says so where it has no fused step for this device
            pass
    return cls(groups)


def check_clipping(net: nn.Module, optimizer: Optimizer, clip_grad_value: float | None) -> None:
    """Raise ValueError where a layer gives sparse gradients to a parameter of the optimizer: no value clips those."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in net.named_modules() if clip_grad_value is not None else ():
        for part, parameter in layer.named_parameters(prefix=name, recurse=False):
            is_sparse = isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse
            if is_sparse and parameter.requires_grad and id(parameter) in held:
                raise sparse_clipping(part, "clip_grad_value", clip_grad_value)


def sparse_clipping(name: str, option: str, value: float | None) -> ValueError:
    """Return the error for a parameter whose gradient is sparse: no value clips one, nor some releases' norm."""
    other = ", clip_grad_norm" if option == "clip_grad_value" else ", a newer torch"
    return ValueError(
        f"{option}={value} can't clip the gradient of {name!r}, which is sparse: use a dense embedding "
        f"(sparse=False){other} or no clipping."
    )


def _check_options(optimizer: Optimizer, param_groups: Mapping[str, Mapping[str, Any]] | None) -> None:
    for pattern, options in (param_groups or {}).items():
        for option in options:
            if option not in optimizer.defaults:
                raise ValueError(
                    f"param_groups[{pattern!r}] sets {option!r}, which {type(optimizer).__name__} does not have"
                    f"{did_you_mean(option, optimizer.defaults)} Options: {', '.join(sorted(optimizer.defaults))}."
                )


def _check_holds(optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if named and held.isdisjoint(map(id, named.values())):
        raise ValueError(
            f"the {type(optimizer).__name__} given holds none of the net's parameters: make it from this net, "
            "for example torch.optim.SGD(net.parameters(), lr=0.1)."
        )


def make_scheduler(
    lr_scheduler: SchedulerSpec | Mapping[str, SchedulerSpec] | None, optimizer: Optimizer
) -> LRScheduler | str | None:
    """Return the scheduler meant; a name that spans a fit ("cosine", "one_cycle") stays a name until fit begins.

    With several optimizers: a dict of schedulers, objects or factories, by the optimizers' names.
    Raises ValueError for an unknown name or a scheduler of another optimizer, TypeError for anything else.
    """
    if lr_scheduler is None:
        return None
    if isinstance(optimizer, NamedOptimizers):
        return _make_schedulers(lr_scheduler, optimizer)
    if isinstance(lr_scheduler, Mapping):
        raise ValueError("lr_scheduler is a dict, which goes with a dict of optimizers; there is one.")
    given = lr_scheduler
    if isinstance(lr_scheduler, str):
        known = look_up("lr_scheduler", lr_scheduler, SCHEDULERS)
        if isinstance(known, str):
            return known
        lr_scheduler = known
    if not isinstance(lr_scheduler, LRScheduler):
        if not callable(lr_scheduler):
            raise TypeError(
                "lr_scheduler must be a name, a torch scheduler, its class or a callable optimizer -> scheduler, "
                f"got {given!r}. Names: {', '.join(sorted(SCHEDULERS))}."
            )
        lr_scheduler = lr_scheduler(optimizer)
        if not isinstance(lr_scheduler, LRScheduler):
            raise TypeError(f"lr_scheduler must make a torch scheduler, but {given!r} made a {type(lr_scheduler)}.")
    if isinstance(lr_scheduler, ReduceLROnPlateau) and lr_scheduler.mode == "max":
        raise ValueError("ReduceLROnPlateau is given val_loss, or loss, which falls: make it with mode='min'.")
    if lr_scheduler.optimizer is not optimizer:
        name = type(lr_scheduler).__name__
        raise ValueError(
            f"the {name} given belongs to another optimizer: give compile() the optimizer object it was made with, "
            f"or a factory, lr_scheduler=lambda optimizer: {name}(optimizer, ...)."
        )
    return lr_scheduler


def _make_schedulers(
    lr_schedulers: SchedulerSpec | Mapping[str, SchedulerSpec], optimizers: NamedOptimizers
) -> NamedSchedulers:
    names = ", ".join(optimizers.optimizers)
    if not isinstance(lr_schedulers, Mapping):
        raise ValueError(
            f"with several optimizers lr_scheduler is a dict by their names ({names}), not {lr_schedulers!r}."
        )
    made: dict[str, LRScheduler] = {}
    for name, spec in lr_schedulers.items():
        if name not in optimizers.optimizers:
            raise ValueError(f"lr_scheduler has the name {name!r}, but the optimizers are {names}.")
        scheduler = make_scheduler(spec, optimizers[name])
        if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                f"lr_scheduler[{name!r}]={spec!r} spans a fit or reads its loss, which needs one optimizer: give a "
                "scheduler that steps by itself, or a factory, lambda optimizer: StepLR(optimizer, 10)."
            )
        made[name] = scheduler
    return NamedSchedulers(made)


def copy_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return each param group's options as they are now, without the parameters."""
    return [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def set_option(group: dict[str, Any], key: str, value: Any) -> None:
    """Set an option of a param group; a tensor in place, since the optimizer may hold it in a compiled step."""
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


@contextmanager
def spanning_scheduler(name: str, optimizer: Optimizer, total: int | None) -> Iterator[LRScheduler]:
    """Give the scheduler of this name over the `total` scheduler steps of one fit; at the end put the rates back.

    "cosine" anneals to 0 over the fit; "one_cycle" rises to the optimizer's rate and falls, momentum the other way.
    Raises ValueError where the number of steps is not known, or too small for one_cycle's rise and fall.
    """
    if total is None:
        raise ValueError(
            f"lr_scheduler={name!r} spans the fit, but the training data has no length: give steps_per_epoch, "
            "or a scheduler object."
        )
    if name == "one_cycle" and total < ONE_CYCLE_STEPS:
        raise ValueError(
            f"lr_scheduler='one_cycle' would rise and fall within {total} steps; it needs {ONE_CYCLE_STEPS}: "
            "use lr_scheduler_interval='step', or more epochs."
        )
    before = [
        {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items() if key in _SCHEDULED}
        for group in optimizer.param_groups
    ]
    try:
        yield SPANNING_SCHEDULERS[name](optimizer, total)
    finally:
        for group, options in zip(optimizer.param_groups, before, strict=False):
            for key, value in options.items():
                set_option(group, key, value)
            group.pop("initial_lr", None)  # from which the next fit's scheduler would start
