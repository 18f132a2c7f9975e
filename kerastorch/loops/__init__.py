"""The loop backends and the one table of their names.

The base is loop.py; script_loop.py, function_loop.py and class_loop.py show the same training in three styles,
which graph_loop.py does as one graph.
"""

from __future__ import annotations

import inspect

from kerastorch.errors import look_up
from kerastorch.loops.class_loop import ClassLoop
from kerastorch.loops.function_loop import FunctionLoop, eval_step, train_step
from kerastorch.loops.graph_loop import GraphLoop
from kerastorch.loops.loop import Loop
from kerastorch.loops.script_loop import ScriptLoop

__all__ = [
    "ALL_LOOPS",
    "LOOPS",
    "ClassLoop",
    "FunctionLoop",
    "GraphLoop",
    "Loop",
    "ScriptLoop",
    "has_own_train_step",
    "is_own_loop",
    "make_loop",
]

LOOPS: dict[str, type[Loop]] = {"script": ScriptLoop, "function": FunctionLoop, "class": ClassLoop}  # equal to the bit
ALL_LOOPS: dict[str, type[Loop]] = {**LOOPS, "graph": GraphLoop}


def is_own_loop(loop: Loop) -> bool:
    """Whether the steps are the user's own: a subclass, or a FunctionLoop with a swapped train_step or eval_step."""
    if isinstance(loop, FunctionLoop) and (loop.train_step, loop.eval_step) != (train_step, eval_step):
        return True
    return type(loop) not in ALL_LOOPS.values()


_STEPS = {  # what each method takes after self; a FunctionLoop's functions take run first
    "fit": ["run"],
    "evaluate": ["run"],
    "predict": ["run"],
    "train_epoch": [],
    "train_step": ["x", "y", "sample_weight"],
    "eval_step": ["x", "y", "sample_weight"],
    "predict_step": ["x"],
}


def has_own_train_step(loop: Loop) -> bool:
    """Whether the updates are the user's own."""
    if isinstance(loop, FunctionLoop):
        return loop.train_step is not train_step or type(loop).fit is not FunctionLoop.fit
    if isinstance(loop, ClassLoop):
        cls = type(loop)
        own, base = (
            (cls.train_step, cls.train_epoch, cls.fit),
            (ClassLoop.train_step, ClassLoop.train_epoch, ClassLoop.fit),
        )
        return own != base
    return type(loop) not in ALL_LOOPS.values()


def make_loop(loop: str | type[Loop] | Loop) -> Loop:
    """Return the loop for a name, a class or an object.

    Raises ValueError for an unknown name, naming the nearest, and TypeError for a step of another signature and for
    anything else.
    """
    if isinstance(loop, str):
        return look_up("loop", loop, ALL_LOOPS)()
    if isinstance(loop, type) and issubclass(loop, Loop):
        loop = loop()
    if isinstance(loop, Loop):
        _check_signatures(loop)
        return loop
    raise TypeError(f"loop must be a name ({', '.join(ALL_LOOPS)}), a Loop class or a Loop object, got {loop!r}.")


_MEANT = {  # other libraries' names -> ours, for a method that would never be called
    "training_step": "train_step",
    "validation_step": "eval_step",
    "val_step": "eval_step",
    "test_step": "eval_step",
}


def _check_called(loop: Loop) -> None:
    """Refuse a step that nothing calls: of a loop that has none, or under another library's name."""
    cls = type(loop)
    own = {
        name
        for owner in cls.__mro__[: cls.__mro__.index(Loop)]
        if owner not in ALL_LOOPS.values()
        for name in vars(owner)
    }
    if isinstance(loop, (ScriptLoop, FunctionLoop)):
        has_own_verbs = bool(own & {"fit", "evaluate", "predict"})  # which may call what they like
        for name in own & {"train_epoch", "train_step", "eval_step", "predict_step"}:
            if isinstance(loop, FunctionLoop) and name.endswith("_step"):
                raise TypeError(f"{cls.__name__}.{name} is never called: a FunctionLoop takes functions, {name}=f.")
            if not has_own_verbs:
                base = "ScriptLoop" if isinstance(loop, ScriptLoop) else "FunctionLoop"
                raise TypeError(
                    f"{cls.__name__}.{name} is never called: a {base} has none; subclass ClassLoop instead."
                )
    elif isinstance(loop, ClassLoop):
        for name, meant in _MEANT.items():
            if name in own and meant not in own and "fit" not in own:
                raise TypeError(f"{cls.__name__}.{name} is never called: call it {meant}.")


def _check_signatures(loop: Loop) -> None:
    _check_called(loop)
    calls_steps = isinstance(loop, (ClassLoop, FunctionLoop))
    for name, arguments in _STEPS.items():
        if not hasattr(loop, name) or (name not in ("fit", "evaluate", "predict") and not calls_steps):
            continue
        step = getattr(loop, name)
        if isinstance(loop, FunctionLoop) and name.endswith("_step"):
            arguments = ["run", *arguments]
        expected = f"{name}({', '.join(arguments)})"
        if not callable(step):
            raise TypeError(f"{type(loop).__name__}.{name} must be a function, {expected}, got {step!r}.")
        try:
            signature = inspect.signature(step)
            signature.bind(*arguments)
        except TypeError:
            raise TypeError(f"{type(loop).__name__} calls {expected}, but its {name} takes {signature}.") from None
        except ValueError:  # a builtin without one
            continue
