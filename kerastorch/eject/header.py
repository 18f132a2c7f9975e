"""The lines that call train() with what the model was compiled with: at the head of the file, or at its end."""

from __future__ import annotations

import textwrap

from torch import nn

from kerastorch.eject.describe import Text, describe, describe_optimizer, describe_scheduler
from kerastorch.eject.lines import WIDTH, Lines, quote
from kerastorch.eject.plan import Plan


def header_lines(plan: Plan) -> Lines:
    """Return statements that need net and, where arrays were given, x, y, x_val and y_val; "..." is the user's own."""
    fit, compiled = plan.fit, plan.compiled
    moved = f'.to("{plan.device}")' if plan.device.type != "cpu" else ""
    lines = [f"epochs = {fit.epochs or 10}", *([f"net = net{moved}"] if moved else [])]
    loss = describe(plan.loss)
    of_loss = moved if isinstance(plan.loss, nn.Module) and loss.code != "..." else ""
    lines += _assign("loss_fn", Text(loss.code + of_loss, loss.note))
    tables, optimizer = describe_optimizer(compiled.optimizer, compiled.param_groups, plan.net, plan.loss)
    lines += [*tables, *_assign("optimizer", optimizer)]
    lines += _metrics(plan)
    has_val = fit.validated is not False
    lines += _loaders(plan, has_val=has_val)
    if compiled.lr_scheduler is not None:
        steps = f"(epochs - {fit.initial_epoch})" if fit.initial_epoch else "epochs"
        if plan.steps_lr:
            steps += " * len(train_data)" if plan.k == 1 else f" * math.ceil(len(train_data) / {plan.k})"
        steps = steps[1:-1] if steps.startswith("(") and steps.endswith(f"{fit.initial_epoch})") else steps
        lines += _assign("lr_scheduler", describe_scheduler(compiled.lr_scheduler, compiled.optimizer, steps))
    asked = {name: note for name, (_, default, note) in plan.keywords.items() if default is None}
    for name, note in asked.items():
        lines += _assign(name, Text("...", note)) if note else []
    given = ["net", "optimizer", "loss_fn", "metrics", "train_data", "val_data" if has_val else "None", "epochs"]
    return [*lines, f"history = train({', '.join([*given, *(f'{name}={name}' for name in asked)])})"]


def data_names(plan: Plan) -> list[str]:
    """Return the tensors that the lines above read; none where the data was the user's own Dataset or loader."""
    fit = plan.fit
    has_val = fit.validated is not False and not fit.is_split and fit.val_rows is not None
    names = plan.names(trains=True) if fit.rows is not None else []
    return [*names, *(f"{name}_val" for name in (plan.names(trains=False) if has_val else []))]


def _assign(name: str, text: Text) -> Lines:
    line = f"{name} = {text.code}"
    return _noted(line, text.note)


def _noted(line: str, note: str) -> Lines:
    """Return a line with a note behind it, or above it where there is no room."""
    if not note or len(line) + len(note) + 12 <= WIDTH:
        return [f"{line}  # {note}" if note else line]
    return [*textwrap.wrap(f"# {note}", WIDTH - 8, subsequent_indent="# "), line]


def _metrics(plan: Plan) -> Lines:
    if not plan.metric_texts:
        return ["metrics = {}"]
    lines = ["metrics = {"]
    for name, (code, note) in plan.metric_texts.items():
        lines += [f"    {line}" for line in _noted(f"{quote(name)}: {code},", note)]
    return [*lines, "}"]


def _loaders(plan: Plan, *, has_val: bool) -> Lines:
    fit = plan.fit
    lines: Lines = []
    if fit.is_split and fit.rows:
        for name in plan.names(trains=True):
            comment = "  # the last rows validate" if not lines else ""
            lines.append(f"{name}, {name}_val = {name}[:{fit.rows}], {name}[{fit.rows}:]{comment}")
    for trains in (True, False) if has_val else (True,):
        data, suffix = ("train_data", "") if trains else ("val_data", "_val")
        parts = plan.names(trains=trains)
        is_arrays = (fit.rows if trains else fit.val_rows) is not None
        if not is_arrays or plan.kind != "tensor" or plan.y_kind not in ("tensor", "none"):
            lines.append(f"{data} = ...  # your DataLoader")
            continue
        columns = ", ".join(f"{name}{suffix}" for name in parts)
        shuffles = ", shuffle=True" if trains and fit.shuffle else ""
        size = fit.batch_sizes[not trains] or 32
        lines.append(f"{data} = DataLoader(TensorDataset({columns}), batch_size={size}{shuffles})")
    return lines
