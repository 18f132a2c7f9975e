"""Callbacks as lines of the file: early stopping, checkpoints, tables, schedules, and calls of the user's own."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

from kerastorch import callbacks as kc
from kerastorch.callbacks.callback import HOOKS, Callback, Monitor
from kerastorch.eject.describe import describe, refuse
from kerastorch.eject.lines import Lines, fill, indent, quote
from kerastorch.eject.plan import Plan
from kerastorch.errors import did_you_mean
from kerastorch.loops import is_own_loop
from kerastorch.metrics import CLASSIFICATION, COUNTED_HERE, NamedMetric, known_logs

CSV = """
with open($csv_path, "a" if epoch > <first> else "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, ["epoch", *logs]<options>, lineterminator="\\n")
    if epoch == <first>:
        writer.writeheader()
    writer.writerow({"epoch": epoch, **logs})
"""


def plan_callbacks(plan: Plan, callbacks: Sequence[Callback]) -> None:
    """Add to plan what callbacks do, in their order, checkpoints last."""
    users = [callback for callback in callbacks if is_users(callback)]
    for callback in callbacks:
        if callback not in users:
            _plan_callback(plan, callback, users)
        elif callback is users[0]:
            _plan_users(plan, users)
    _plan_checkpoints(plan, [one for one in callbacks if isinstance(one, kc.ModelCheckpoint)], users)


def is_users(callback: Callback) -> bool:
    """Whether a callback is of the user's own making."""
    package = __name__.partition(".")[0]
    return type(callback) is kc.LambdaCallback or type(callback).__module__.partition(".")[0] != package


def _plan_callback(plan: Plan, callback: Callback, users: list[Callback]) -> None:
    if isinstance(callback, kc.ModelCheckpoint):
        return  # written after the others
    if isinstance(callback, kc.EarlyStopping):
        _plan_early_stopping(plan, callback, users)
    elif isinstance(callback, kc.CSVLogger):
        _plan_csv(plan, callback)
    elif isinstance(callback, kc.LearningRateScheduler):
        _plan_schedule(plan, callback)
    elif isinstance(callback, kc.TerminateOnNaN):
        _plan_nan(plan, callback)
    else:
        ways_out: dict[type[Callback], str] = {
            kc.BackupAndRestore: "use ModelCheckpoint, whose file the ejected train() can resume from",
            kc.ReduceLROnPlateau: 'use compile(lr_scheduler="reduce_on_plateau")',
            kc.TensorBoard: "give torch.utils.tensorboard.SummaryWriter the logs where the file prints them",
        }
        way_out = ways_out.get(type(callback), "write its work, torch.optim.swa_utils say, into the ejected file")
        refuse(f"the callback {type(callback).__name__}", f"leave it out, callbacks=[...], and {way_out}")


# ---- the user's own ----


def _plan_users(plan: Plan, users: list[Callback]) -> None:
    places = {
        "on_train_begin": ("{}", plan.before),
        "on_epoch_begin": ("epoch, {}", plan.epoch_begin),
        "on_epoch_end": ("epoch, logs", plan.epoch_end),
        "on_train_end": ("logs", plan.after),
    }
    called: dict[str, int] = {}  # hook -> how many have it
    needs = []
    for callback in users:
        name = type(callback).__name__
        hooks = [
            hook for hook in HOOKS if getattr(getattr(callback, hook), "__func__", None) is not getattr(Callback, hook)
        ]
        for hook in hooks:
            if hook not in places:
                refuse(f"{name}.{hook}(), which is called inside an epoch", "write its work into the ejected file")
            called[hook] = called.get(hook, 0) + 1
        if type(callback) is not kc.LambdaCallback:
            _refuse_what_it_lacks(callback)
        needs.append(f"{name}: {', '.join(f'{hook}({places[hook][0]})' for hook in hooks)}")
    plan.keyword("callbacks", "Sequence[Any]", note=f"your own objects, with these methods alone; {'; '.join(needs)}")
    for hook in sorted(called, key=HOOKS.index):
        given, lines = places[hook]
        call = [f"callback.{hook}({given})"]
        if called[hook] < len(users):
            call = [f'if hasattr(callback, "{hook}"):', *indent(call)]
        lines += ["for callback in $callbacks:  # your own objects", *indent(call)]
    if "on_train_end" in called:
        plan.state["logs"] = "{}"


def _refuse_what_it_lacks(callback: Callback) -> None:
    """Refuse a callback whose methods look at the model or the run, which the ejected file does not have."""
    cls = type(callback)
    for owner in cls.__mro__[: cls.__mro__.index(Callback)]:
        for name, member in vars(owner).items():
            if not inspect.isfunction(member):
                continue
            what = f"{cls.__name__}.{name}()"
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(member)))
            except (OSError, TypeError, SyntaxError):
                refuse(f"{what}, whose source can't be read", "define it in a file or a notebook cell")
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and node.attr in ("model", "run", "params"):
                    used = ast.unparse(node)
                    refuse(f"{what}, which uses {used}", "write its work into the ejected file")
                if isinstance(node, ast.Name) and node.id == "super":
                    refuse(f"{what}, which uses super()", "write its work into the ejected file")


# ---- what is monitored ----


def _check_known(plan: Plan, name: str, users: list[Callback], what: str) -> None:
    """Refuse a name that no epoch's logs will have, unless own callbacks or steps may add it."""
    known = {*known_logs(plan.compiled.metrics), *plan.metric_texts}
    if "schedule" in plan.keywords:
        known.add("learning_rate")
    if name.startswith("val_") and plan.fit.validated is False:
        raise ValueError(f"{what} is not in the logs: the last fit() got no validation data.")
    if name.removeprefix("val_") not in known and not users and not is_own_loop(plan.loop):
        raise ValueError(f"{what} is not in the logs{did_you_mean(name, known)} Known: {', '.join(sorted(known))}.")


def _gain(plan: Plan, watched: Monitor, best: str, min_delta: str = "") -> tuple[str, str, bool]:
    """Return the texts of the value and of the test that it beats best, and whether greater is better."""
    name, is_max = watched.name, watched.mode == "max"
    if watched.mode == "auto":
        known = known_logs(plan.compiled.metrics).get(name.removeprefix("val_"))
        if known is None:
            raise ValueError(f"monitor={name!r}: whether higher is better is not known; pass mode='min' or 'max'.")
        is_max = known
    value = f"logs[{quote(name)}]"
    metric = plan.compiled.metrics.get(name.removeprefix("val_"))
    if isinstance(metric, NamedMetric) and metric.name in COUNTED_HERE & CLASSIFICATION.keys():
        value = f"round({value}, 6)"  # torchmetrics' accuracy is a float32: 0.8 of it would beat 0.8
    sign, relation = ("-", ">") if is_max else ("+", "<")
    return value, f"{value} {sign} {min_delta} {relation} {best}" if min_delta else f"{value} {relation} {best}", is_max


def _when_known(plan: Plan, watched: Monitor) -> str:
    return f"{quote(watched.name)} in logs" if plan.due and watched.name.startswith("val_") else ""


def _worst(is_max: bool) -> str:
    return "-math.inf" if is_max else "math.inf"


def _plan_early_stopping(plan: Plan, callback: kc.EarlyStopping, users: list[Callback]) -> None:
    watched, delta = callback.watched, ""
    _check_known(plan, watched.name, users, f"EarlyStopping(monitor={watched.name!r})")
    plan.keyword("patience", "int", str(callback.patience))
    if watched.min_delta:
        delta = "$min_delta"
        plan.keyword("min_delta", "float", repr(float(watched.min_delta)))
    value, is_better, is_max = _gain(plan, watched, "best", delta)
    plan.state |= {"best": _worst(is_max), "wait": "0", "should_stop": "False"}
    gained = [f"best = {value}" if callback.baseline is not None else f"best, wait = {value}, 0"]
    if callback.restore_best_weights:
        plan.state["best_weights"] = "None"
        gained.append("best_weights = copy.deepcopy($net.state_dict())")
        plan.after += ["if best_weights is not None:", "    $net.load_state_dict(best_weights)"]
    if callback.baseline is not None:
        plan.keyword("baseline", "float", describe(float(callback.baseline)).code)
        gained += [f"if {_gain(plan, watched, '$baseline', delta)[1]}:", "    wait = 0"]
    lines = ["wait += 1", f"if {is_better}:", *indent(gained)]
    if callback.patience > 1 or callback.start_from_epoch or plan.fit.initial_epoch:
        lines += ["elif wait >= $patience:"]
    else:
        lines += ["elif wait >= $patience and epoch > 0:  # the first epoch has nothing to be compared with"]
    lines += ["    should_stop = True"]
    conditions = [_when_known(plan, watched)] if _when_known(plan, watched) else []
    if callback.start_from_epoch:
        plan.keyword("start_from_epoch", "int", str(callback.start_from_epoch))
        conditions.append("epoch >= $start_from_epoch")
    plan.epoch_end += ["", "# ---- early stopping ----"]
    plan.epoch_end += [f"if {' and '.join(conditions)}:", *indent(lines)] if conditions else lines


# ---- tables, schedules, losses that are not finite ----


def _plan_csv(plan: Plan, callback: kc.CSVLogger) -> None:
    if callback.append or plan.due:
        what = "CSVLogger(append=True)" if callback.append else "CSVLogger beside validation_freq"
        refuse(what, "leave it out and write the history that train() returns")
    plan.path("csv_path", callback.filename)
    options = "" if callback.separator == "," else f", delimiter={quote(callback.separator)}"
    plan.before += ["Path($csv_path).parent.mkdir(parents=True, exist_ok=True)"]
    plan.epoch_end += fill(CSV, options=options, first=plan.first_epoch)


def _plan_schedule(plan: Plan, callback: kc.LearningRateScheduler) -> None:
    if plan.compiled.lr_scheduler is not None:
        raise ValueError("LearningRateScheduler and compile(lr_scheduler=...) would fight: leave one of them out.")
    takes = "int, float" if callback.takes_lr else "int"
    form = "(epoch, lr)" if callback.takes_lr else "(epoch)"
    plan.keyword("schedule", f"Callable[[{takes}], float]", note=f"your function, {form} -> rate")
    given = 'epoch, $optimizer.param_groups[0]["lr"]' if callback.takes_lr else "epoch"
    plan.epoch_begin += [f"lr = float($schedule({given}))", "for group in $optimizer.param_groups:"]
    plan.epoch_begin += ['    group["lr"] = lr']
    plan.epoch_end += ['logs["learning_rate"] = lr']


def _plan_nan(plan: Plan, callback: kc.TerminateOnNaN) -> None:
    note = "" if plan.device.type == "cpu" else "  # reads the loss: a sync a step"
    if callback.raise_error:
        plan.batch_end += [f"if not math.isfinite(loss.item()):{note}"]
        plan.batch_end += ['    raise RuntimeError(f"Epoch {epoch + 1}: the loss is not finite.")']
        return
    plan.state["should_stop"] = "False"
    window = "not $window and " if plan.k > 1 else ""
    plan.batch_end += [f"if {window}not math.isfinite(loss_sum.item()):{note}", "    break"]
    plan.epoch_end += [
        'if not math.isfinite(logs["loss"]):',
        '    print(f"Epoch {epoch + 1}: the loss is not finite.")',
    ]
    plan.epoch_end += ["    should_stop = True"]


# ---- checkpoints ----


def _plan_checkpoints(plan: Plan, writers: list[kc.ModelCheckpoint], users: list[Callback]) -> None:
    writers.sort(key=lambda writer: not writer.chooses)
    for writer in writers:
        if writer.save_freq != "epoch":
            refuse(f"ModelCheckpoint(save_freq={writer.save_freq}), inside an epoch", "use save_freq='epoch'")
        if writer.keep_last is not None or writer.keep_best is not None:
            refuse("ModelCheckpoint(keep_last=, keep_best=), which deletes files", "use save_best_only, or neither")
        for name in writer.fields - {"epoch"}:
            if name == "batch":
                refuse("ModelCheckpoint with {batch} in its path", "use {epoch}, it writes once an epoch")
            _check_known(plan, name, users, f"ModelCheckpoint's {{{name}}}")
    if len(writers) > 2 or len({writer.chooses for writer in writers}) < len(writers):
        refuse("several ModelCheckpoints of one kind", "give one for the best epoch and one for every epoch at most")
    plan.resumes = any(not writer.chooses and not writer.save_weights_only for writer in writers)
    tests: Lines = []
    saves: Lines = []
    for writer in writers:
        name = "best_path" if writer.chooses and len(writers) > 1 else "checkpoint_path"
        plan.path(name, writer.filepath if writer.fields else writer.filepath.format())
        path = f"${name}.format(epoch=epoch + 1, **logs)" if writer.fields else f"${name}"
        save = f"save({'$net.state_dict()' if writer.save_weights_only else 'checkpoint'}, {path})"
        if not writer.chooses:
            saves.append(save)
            continue
        _check_known(plan, writer.watched.name, users, f"ModelCheckpoint(monitor={writer.watched.name!r})")
        value, is_better, is_max = _gain(plan, writer.watched, "best_saved")
        threshold = writer.initial_value_threshold
        plan.state["best_saved"] = _worst(is_max) if threshold is None else describe(float(threshold)).code
        known = _when_known(plan, writer.watched)
        tests = [
            f"is_best = {known + ' and ' if known else ''}{is_better}",
            "if is_best:",
            f"    best_saved = {value}",
        ]
        saves += ["if is_best:", f"    {save}"]
    makes_dict = not all(writer.save_weights_only for writer in writers)
    if plan.resumes:
        plan.keyword("resume_from", "str | None", "None")
    if len(writers) == 1 and tests:  # all under one condition
        made = indent(_checkpoint(plan)) if makes_dict else []
        plan.saving = [tests[0].replace("is_best =", "if") + ":", tests[2], *made, saves[1]]
    else:
        plan.saving = [*tests, *(_checkpoint(plan) if makes_dict else []), *saves]


def _parts(plan: Plan) -> dict[str, str]:
    """Return what has a state_dict in a checkpoint: key -> name."""
    parts = {"model_state_dict": "$net", "optimizer_state_dict": "$optimizer"}
    parts |= {"lr_scheduler_state_dict": "$lr_scheduler"} if plan.compiled.lr_scheduler is not None else {}
    parts |= {"scaler_state_dict": "$scaler"} if plan.scales else {}
    loss: Any = plan.loss
    return parts | ({"loss_state_dict": "$loss_fn"} if hasattr(loss, "state_dict") and loss.state_dict() else {})


def _kept(plan: Plan) -> list[str]:
    return [name for name in plan.state if name not in ("should_stop", "logs")]


def _checkpoint(plan: Plan) -> Lines:
    """Return the lines that make the usual recipe's dict and, to resume from, what else the run goes on with."""
    entries = {"epoch": "epoch", "loss": 'logs["loss"]'}
    entries |= {key: f"{name}.state_dict()" for key, name in _parts(plan).items()}
    if plan.resumes:
        stop = ["should_stop"] if "should_stop" in plan.state else []
        entries |= {name: name for name in [*_kept(plan), *stop, "history"]}
        entries["rng_state"] = "torch.get_rng_state()"
        if plan.device.type == "cuda":
            entries["cuda_rng_state"] = "torch.cuda.get_rng_state($device)"
    entries |= {"step": "$run.step"} if plan.resumes and plan.counts_steps else {}
    return ["checkpoint = {", *(f'    "{key}": {value},' for key, value in entries.items()), "}"]


def resume_lines(plan: Plan) -> Lines:
    """Return the lines that go on from a checkpoint."""
    lines = ['checkpoint = torch.load($resume_from, map_location="cpu", weights_only=True)']
    lines += [f'{name}.load_state_dict(checkpoint["{key}"])' for key, name in _parts(plan).items()]
    lines += ['start_epoch, history = checkpoint["epoch"] + 1, checkpoint["history"]']
    lines += ['$run.step = checkpoint["step"]'] if plan.counts_steps else []
    if "should_stop" in plan.state:
        lines += ['if checkpoint["should_stop"]:', "    start_epoch = epochs  # that run was over"]
    lines += [f'{name} = checkpoint["{name}"]' for name in _kept(plan)]
    lines += ["# torch's generator: dropout goes on as it would have, and shuffling by a loader without one of its own"]
    lines += ['torch.set_rng_state(checkpoint["rng_state"])']
    if plan.device.type == "cuda":
        lines += ['torch.cuda.set_rng_state(checkpoint["cuda_rng_state"], $device)']
    return [f"start_epoch = {plan.first_epoch}", "if $resume_from is not None:", *indent(lines)]
