"""Model.eject: the training of a compiled model, written out as one file of plain PyTorch in a loop's style.

plan.py finds out what is in use, callbacks.py and own_steps.py add theirs, stages.py fills the templates, header.py
shows the call; lines.py and describe.py below know Python's text and torch's objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kerastorch.callbacks import Callback, CallbackList
from kerastorch.eject.callbacks import plan_callbacks
from kerastorch.eject.own_steps import OwnSteps
from kerastorch.eject.plan import Plan
from kerastorch.eject.stages import Writer
from kerastorch.errors import check_choice
from kerastorch.loops import is_own_loop

if TYPE_CHECKING:
    from kerastorch.model import Model

__all__ = ["STYLES", "eject_model"]

STYLES = ("script", "function", "class")


def eject_model(
    model: Model,
    style: str,
    path: str | os.PathLike[str] | None = None,
    *,
    callbacks: Iterable[Callback] | Callback | None = None,
    class_weight: Mapping[int, float] | None = None,
    around: tuple[str, str] | None = None,
) -> str:
    """Return, and write to path, a file of plain torch, torchmetrics and tqdm that trains as model.fit does.

    style: "script" (the whole loop in train), "function" or "class" (a Trainer, and train() that makes one).
    callbacks, class_weight: those of the last fit, unless given; [] and {} for none.
    around: code that makes net, x and y, and code that follows train(): the file then runs by itself.
    The file's train(net, optimizer, loss_fn, metrics, train_data, val_data, epochs, *, ...) has what this model uses,
    no more; its first lines show how to call it. On a CPU it gives fit's weights to the bit and fit's history.
    Raises RuntimeError before compile(), ValueError or TypeError for what can't be written out, with the way out.
    """
    check_choice("style", style, STYLES)
    compiled, loop = model.compiled, model.loop
    if compiled is None:
        raise RuntimeError('call compile() before eject(), for example model.compile("cross_entropy", "adam").')
    given = CallbackList(model.last_fit.callbacks if callbacks is None else callbacks).callbacks
    if class_weight is None:
        class_weight = model.last_fit.class_weight
    plan = Plan(model, compiled, loop, style, class_weight)
    own = OwnSteps(plan) if is_own_loop(loop) else None
    plan_callbacks(plan, given)
    plan.keywords = dict(sorted(plan.keywords.items(), key=lambda item: item[1][1] is not None))
    source = Writer(plan, own, around).file()
    if path is not None:
        temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        try:
            temporary.write_text(source, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return source
