"""Optimizers and learning-rate schedulers by name, class, factory or object; parameter groups by glob.

Sisters: losses.py, metrics.py.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from kerastorch.errors import did_you_mean, look_up

OptimizerFactory = Callable[[Any], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

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


def make_optimizer(
    optimizer: str | type[Optimizer] | OptimizerFactory | Optimizer,
    net: nn.Module,
    loss: object = None,
    param_groups: Mapping[str, Mapping[str, Any]] | None = None,
) -> Optimizer:
    """Return the optimizer meant, over the parameters of net (and of loss, where that is a module with parameters).

    optimizer: a name (torch's defaults, and fused=True where torch supports it for these parameters); a class or a
    factory, called with the parameters only; an object, used as given.
    param_groups: {glob on parameter names: options}; a parameter joins the first pattern that matches it.
    Raises ValueError for an unknown name (naming the nearest), a pattern that matches nothing, an option the optimizer
    does not have, or an object that holds none of net's parameters; TypeError for anything else.
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
    lazy = [name for name, parameter in named.items() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"the shape of {lazy[0]!r} is not known yet: run one batch through the lazy net before compile(), "
            "for example net(x[:1])."
        )
    groups = _group_parameters(named, param_groups)
    factory = cast(OptimizerFactory, cls)
    made = _make_fused(factory, groups, net) if isinstance(optimizer, str) else factory(groups)
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, but {cls!r} made a {type(made).__name__}.")
    _check_options(made, param_groups)
    return made


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
                f"param_groups pattern {pattern!r} matches no parameter;{did_you_mean(pattern, named)} "
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


def _check_options(optimizer: Optimizer, param_groups: Mapping[str, Mapping[str, Any]] | None) -> None:
    for pattern, options in (param_groups or {}).items():
        for option in options:
            if option not in optimizer.defaults:
                raise ValueError(
                    f"param_groups[{pattern!r}] sets {option!r}, which {type(optimizer).__name__} does not have;"
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
    lr_scheduler: str | type[LRScheduler] | SchedulerFactory | LRScheduler | None, optimizer: Optimizer
) -> LRScheduler | str | None:
    """Return the scheduler meant; a name that spans a fit ("cosine", "one_cycle") stays a name until fit begins.

    Raises ValueError for an unknown name or a scheduler of another optimizer, TypeError for anything else.
    """
    if lr_scheduler is None:
        return None
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
