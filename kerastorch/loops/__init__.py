"""The loop backends and the one table of their names.

The base is loop.py; script_loop.py, function_loop.py and class_loop.py show the same training in three styles.
"""

from __future__ import annotations

from kerastorch.errors import look_up
from kerastorch.loops.class_loop import ClassLoop
from kerastorch.loops.function_loop import FunctionLoop, eval_step, train_step
from kerastorch.loops.loop import Loop
from kerastorch.loops.script_loop import ScriptLoop

__all__ = ["LOOPS", "ClassLoop", "FunctionLoop", "Loop", "ScriptLoop", "is_own_loop", "make_loop"]

LOOPS: dict[str, type[Loop]] = {"script": ScriptLoop, "function": FunctionLoop, "class": ClassLoop}


def is_own_loop(loop: Loop) -> bool:
    """Whether the steps are the user's own: a subclass, or a FunctionLoop with a swapped train_step or eval_step."""
    if isinstance(loop, FunctionLoop) and (loop.train_step, loop.eval_step) != (train_step, eval_step):
        return True
    return type(loop) not in LOOPS.values()


def make_loop(loop: str | type[Loop] | Loop) -> Loop:
    """Return the loop for a name, a class or an object.

    Raises ValueError for an unknown name, naming the nearest, and TypeError for anything else.
    """
    if isinstance(loop, str):
        return look_up("loop", loop, LOOPS)()
    if isinstance(loop, type) and issubclass(loop, Loop):
        return loop()
    if isinstance(loop, Loop):
        return loop
    raise TypeError(f"loop must be a name ({', '.join(LOOPS)}), a Loop class or a Loop object, got {loop!r}.")
