"""LambdaCallback: hooks given as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kerastorch.callbacks.callback import HOOKS, Callback
from kerastorch.errors import did_you_mean


class LambdaCallback(Callback):
    """Calls the functions given, each named after its hook and with that hook's arguments.

        LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch, logs["loss"]))

    None is no function. Raises TypeError for a name that is no hook, naming the nearest, or for what can't be called.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, function in hooks.items():
            if name not in HOOKS:
                hint = did_you_mean(name, HOOKS)
                raise TypeError(f"LambdaCallback has no hook {name!r}{hint} Hooks: {', '.join(HOOKS)}.")
            if function is None:
                continue
            if not callable(function):
                raise TypeError(f"LambdaCallback({name}=...) takes a function, got {function!r}.")
            setattr(self, name, function)
