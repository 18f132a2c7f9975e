"""The file: the stages of training in their templates, framed as a script, as functions or as a Trainer."""

from __future__ import annotations

import ast
import re
import textwrap

from torch import nn

from kerastorch.eject.callbacks import resume_lines
from kerastorch.eject.header import data_names, header_lines
from kerastorch.eject.lines import (
    DOLLAR,
    KEPT,
    Lines,
    define,
    fill,
    find_imports,
    fold,
    indent,
    shifted,
    sorted_imports,
)
from kerastorch.eject.own_steps import OwnSteps
from kerastorch.eject.plan import MOVED, TYPES, Plan
from kerastorch.losses import ignored_class, keyword_of, loss_scale, parameter_names

FIT = """
history: dict[str, list[<number>]] = {}
<start>

for epoch in range(<epochs>):
    <epoch_begin>
    <train>
    <validate>
    <epoch_end>

    for name, value in logs.items():
        history.setdefault(name, []).append(value)
    print(f"Epoch {epoch + 1}/{epochs}:", ", ".join(f"{name} {value<format>}" for name, value in logs.items()))
    <save>
    <stop>
<after>
return history
"""
TRAIN_INLINE = """
# ---- train ----
$net.train()
<sums>
<batches>
    <forward>
    <backward>
    <add>
    <batch_end>
logs = {"loss": loss_sum.item() / num_samples}
logs |= {name: metric.compute().<read>() for name, metric in $metrics.items()}
"""
VALIDATE_INLINE = """
$net.eval()
<sums>
with torch.no_grad():
    <batches>
        <forward>
        <add>
logs["val_loss"] = loss_sum.item() / num_samples
logs |= {f"val_{name}": metric.compute().<read>() for name, metric in $metrics.items()}
"""
EPOCH = """
$net.<mode>()
<sums>
<batches>
    <own_size>
    loss, outputs = <call>
    <own_step>
    <add>
    <batch_end>
logs = {"loss": loss_sum.item() / num_samples}
return logs | {name: metric.compute().<read>() for name, metric in $metrics.items()}<logged>
"""
VALIDATE = """
val_logs = <call>
logs |= {f"val_{name}": value for name, value in val_logs.items()}
"""
STEP = """
<about>
<forward>
<backward>
return loss, outputs
"""
SUMS = """
for metric in $metrics.values():
    metric.reset()
loss_sum, num_samples = torch.zeros((), <dtype>device=$device), 0
"""
ADD = """
loss_sum.add_(<loss>, alpha=<n>)  # stays on the device: no sync
num_samples += <n>
for metric in $metrics.values():
    <update>
"""
SHARE = """
$window.append(<n>)
n, full = $window[-1], $gradient_accumulation_steps * $window[0]
# This batch's share of the window's mean loss.
share = loss / $gradient_accumulation_steps if n == $window[0] else loss * n / full
"""
UNEVEN = """
if sum($window) != full:  # a short window: its mean is over the samples that it has
    for parameter in <parameters>:
        if parameter.grad is not None:
            parameter.grad.mul_(full / sum($window))
$window.clear()
"""
CLASS_WEIGHTS = """
table = [$class_weight.get(index, 1.0) for index in range(max($class_weight) + 2)]
$class_weights = torch.tensor(table, device=$device)  # the last is that of all classes beyond
"""
TRAINER = """
class Trainer:
    \"\"\"Owns one training run; train_step and eval_step are the places to change.\"\"\"

"""
SAVE = """
def save(content: dict[str, Any], path: str) -> None:
    \"\"\"Write content to path so that a crash leaves the old file or the new one, whole.\"\"\"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


"""
MEAN_OF = """
class MeanOf(Metric):
    \"\"\"The mean over samples of function(outputs, y): a scalar for the batch, or one value per sample.\"\"\"

    total: Tensor
    count: Tensor

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Any, y: Any) -> None:
        values = self.function(outputs, y)
        samples = len(outputs) if values.dim() == 0 else 1
        self.total += values.sum(dtype=torch.float64) * samples
        self.count += values.numel() * samples

    def compute(self) -> Tensor:
        return self.total / self.count


"""


class Writer:
    """Fills the templates with what a Plan holds.

    around: code that makes net, x and y, and code that follows train(): the file then runs by itself.
    """

    def __init__(self, plan: Plan, own: OwnSteps | None, around: tuple[str, str] | None) -> None:
        self.plan, self.own, self.around = plan, own, around
        self.calls = own.calls if own is not None else {}
        self.used = own.used if own is not None else set[str]()

    def file(self) -> str:
        """Return the whole file."""
        plan = self.plan
        code: Lines = []
        if any(plan.weighted) or plan.class_weight is not None:
            code += self._weighted_loss()
        code += fill(MEAN_OF) if plan.has_functions else []
        code += fill(SAVE) if plan.saving else []
        code += self.own.run_class(self._clip()) if self.own is not None else []
        if plan.style == "script":
            validate = fill(VALIDATE_INLINE, **self._stages(trains=False))
            fit = self._fit(fill(TRAIN_INLINE, **self._stages(trains=True)), validate, ["", "# ---- validate ----"])
            body = [*self._setup(), *fit]
        else:
            body = self._functions(code)
        keywords = [f"{n}: {kind}" + ("" if d is None else f" = {d}") for n, (kind, d, _) in plan.keywords.items()]
        arguments = [*self._typed(["net", "optimizer", "loss_fn", "metrics"]), *self._data()]
        arguments += ["*", *keywords] if keywords else []
        code += define("train", arguments, f"dict[str, list[{plan.number}]]", [*self._about(), *body])
        if self.around is not None:
            before, after = (one.strip("\n").splitlines() for one in self.around)
            code += ['if __name__ == "__main__":', *indent([*before, *header_lines(plan), *after])]
        text = "\n".join(fold(line.replace("$", "")) for line in code).strip("\n")
        imports = find_imports(text) | (self.own.imports if self.own is not None else set())
        constants = ["", *plan.constants] if plan.constants else []
        file = "\n".join([self._docstring(), "", *sorted_imports(imports), *constants, "", "", text]) + "\n"
        for name, source in self.own.sources.items() if self.own is not None else ():
            place = re.search(rf"^( *){KEPT}{name}$", file, re.MULTILINE)
            assert place is not None
            file = file[: place.start()] + shifted(source, len(place[1])).replace("$", DOLLAR) + file[place.end() :]
        file = file.replace(DOLLAR, "$")
        ast.parse(file)
        return file

    def _docstring(self) -> str:
        head = f'Training in plain PyTorch, written by Model.eject("{self.plan.style}").'
        if self.around is not None:
            return f'"""{head}"""'
        lines = header_lines(self.plan)
        imports = sorted_imports(find_imports("\n".join(lines)))
        lines = [fold(f"    {line}", packs=True) for line in [*(one for one in imports if one), *lines]]
        text = "\n".join(lines)
        ast.parse(textwrap.dedent(text).replace(DOLLAR, "$"))
        needs = ", ".join(data_names(self.plan))
        what = f"a net and the tensors {needs}" if needs else "a net"
        mark = "r" if "\\" in text else ""
        return f'{mark}"""{head}\n\nWith what the model was compiled with, for {what}:\n\n{text}\n"""'

    # ---- stages ----

    def _batches(self, *, trains: bool) -> Lines:
        """Return the head of the loop over the data, and the batch's move to the device."""
        plan = self.plan
        parts = plan.names(trains=trains)
        names = ", ".join(parts)
        unpacks = plan.fit.unpacks[not trains]
        batches = 'tqdm(train_data, desc=f"Epoch {epoch + 1}", leave=False)' if trains else "val_data"
        batch = "batch" if unpacks else names if len(parts) > 1 else "(x,)"
        if trains and plan.k > 1:
            batch = f"i, {batch}" if batch in ("batch", "(x,)") else f"i, ({batch})"
            batches = f"enumerate({batches})"
        kinds = {"x": plan.kind, "y": plan.y_kind, "sample_weight": "tensor"}
        moved = [MOVED[kinds[name]][0].format(name) for name in parts]
        return [
            f"for {batch} in {batches}:",
            *([f"    {names} = $unpack(batch)"] if unpacks else []),
            f"    {names} = {', '.join(moved)}",
            *(["    is_last = i + 1 == len(train_data)"] if trains and plan.k > 1 else []),
        ]

    def _forward(self, *, trains: bool) -> Lines:
        plan = self.plan
        lines, weights = [f"outputs = ${MOVED[plan.kind][1]}"], "sample_weight"
        if trains and plan.class_weight is not None:
            dtype = plan.fit.target[1] if plan.fit.target is not None else None
            y, weights = "y.argmax(1)" if plan.one_hot else "y", "weights"
            if not plan.one_hot and (
                dtype.is_floating_point
                if dtype is not None
                else loss_scale(plan.loss) in ("label_logits", "probabilities")
            ):
                y = "y.round().long()"
            flat = ".flatten()" if plan.has_flat_weights else ""
            lines.append(f"weights = $class_weights[{y}.clamp(0, len($class_weights) - 1)]{flat}")
            if plan.weighted[0]:
                lines.append("weights = weights * sample_weight.reshape(-1, *[1] * (weights.dim() - 1))")
        if weights == "weights" or "sample_weight" in plan.names(trains=trains):
            lines.append(f"loss = weighted_loss($loss_fn, outputs, y, {weights})")
        else:
            lines.append(f"loss = $loss_fn(outputs, {plan.y}){plan.mean}")
        return [f"with {plan.autocast}:", *indent(lines)] if plan.autocast else lines

    def _backward(self) -> Lines:
        plan = self.plan
        loss = "loss" if plan.k == 1 else "share"
        lines = [f"$scaler.scale({loss}).backward()" if plan.scales else f"{loss}.backward()"]
        step = ["$scaler.step($optimizer)", "$scaler.update()"] if plan.scales else ["$optimizer.step()"]
        step += ["$optimizer.zero_grad()", *(["$lr_scheduler.step()"] if plan.steps_lr else [])]
        if plan.k == 1:
            return [*lines, *self._clip(), *step]
        clip = self._clip()
        unscale = [clip.pop(0)] if clip and plan.scales else []  # before the uneven window is looked at
        return [
            *fill(SHARE, n=MOVED[plan.kind][2]),
            *lines,
            "if is_last or len($window) == $gradient_accumulation_steps:",
            *indent([*unscale, *fill(UNEVEN, parameters=self._parameters()), *clip, *step]),
        ]

    def _parameters(self) -> str:
        held = [id(p) for group in self.plan.compiled.optimizer.param_groups for p in group["params"]]
        if held == [id(p) for p in self.plan.net.parameters()]:
            return "$net.parameters()"
        return '[p for group in $optimizer.param_groups for p in group["params"]]'

    def _clip(self) -> Lines:
        lines = [
            f"nn.utils.clip_grad_{kind}_({self._parameters()}, $clip_grad_{kind})"
            for kind in ("norm", "value")
            if getattr(self.plan.compiled, f"clip_grad_{kind}") is not None
        ]
        unscale = ["$scaler.unscale_($optimizer)  # to clip the true gradients"]
        return [*unscale, *lines] if lines and self.plan.scales else lines

    def _stages(self, *, trains: bool) -> dict[str, str | Lines]:
        plan = self.plan
        n = "len(x)" if plan.kind == "tensor" else "n"
        update = plan.update.replace("<>", ".detach()" if trains and not plan.has_functions else "")
        dtype = "" if plan.device.type == "mps" else "dtype=torch.float64, "
        return {
            "sums": fill(SUMS, dtype=dtype),
            "batches": self._batches(trains=trains),
            "forward": self._forward(trains=trains),
            "backward": self._backward() if trains else [],
            "add": [
                *([] if n == "len(x)" else [f"n = {MOVED[plan.kind][2]}"]),
                *fill(ADD, loss="loss.detach()" if trains else "loss", n=n, update=update),
            ],
            "batch_end": plan.batch_end if trains else [],
            "read": plan.read,
        }

    # ---- frames ----

    def _functions(self, code: Lines) -> Lines:
        """Add the functions, or the Trainer, to code; return the body of train()."""
        plan, calls = self.plan, {}
        pieces: Lines = []
        for trains, kind, epoch, data in (
            (True, "train", "train_epoch", "train_data"),
            (False, "eval", "evaluate", "val_data"),
        ):
            stages = self._stages(trains=trains)
            step: Lines = []
            if f"{kind}_step" in self.calls:
                call = self.calls[f"{kind}_step"]
            else:
                about = "Update the weights on one batch; return" if trains else "Return"
                stages["about"] = f'"""{about} the loss and the outputs{"" if trains else " of one batch"}."""'
                names = plan.names(trains=trains) + (["is_last"] if trains and plan.k > 1 else [])
                step, call = self._piece(f"{kind}_step", names, "tuple[Tensor, Tensor]", fill(STEP, **stages))
            own_step = ["$run.step += 1"] if trains and "step" in self.used else []
            own_step += ["$lr_scheduler.step()"] if trains and plan.steps_lr and "train_step" in self.calls else []
            counts = self.used & {"log", "num_samples"}
            stages |= {
                "call": call,
                "mode": kind,
                "own_step": own_step,
                "own_size": [f"$run.num_samples = {MOVED[plan.kind][2]}"] if counts else [],
                "logged": " | $run.take_logged()" if "log" in self.used else "",
            }
            extra = [data, "epoch"] if trains else [data]
            epoch_lines, calls[epoch] = self._piece(epoch, extra, f"dict[str, {plan.number}]", fill(EPOCH, **stages))
            epoch_lines = epoch_lines if trains else ["@torch.no_grad()", *epoch_lines]
            pieces += [*step, *epoch_lines] if plan.style == "function" else [*epoch_lines, *step]
        own = self.own.sources if self.own is not None else {}
        sources = [line for name in own for line in (f"{KEPT}{name}", "", "")]
        fit = self._fit([f"logs = {calls['train_epoch']}"], fill(VALIDATE, call=calls["evaluate"]), [])
        if plan.style == "function":
            code += [*sources, *pieces]
            return [*self._setup(), *fit]
        given = ["net", "optimizer", "loss_fn", "metrics", *plan.keywords]
        init = ["self", *self._typed(given[:4]), *(["*", *self._typed(given[4:])] if given[4:] else [])]
        methods = [
            *define("__init__", init, "None", [*(f"${name} = {name}" for name in given), *self._setup()]),
            *define("fit", ["self", *self._data()], f"dict[str, list[{plan.number}]]", fit),
            *pieces,
            *sources,
        ]
        methods = [line for i, line in enumerate(methods) if line or methods[i - 1]]  # one empty line between them
        code += [line.replace("$", "self.") for line in [*fill(TRAINER), *indent(methods), ""]]
        call = ", ".join([*given[:4], *(f"{name}={name}" for name in given[4:])])
        return [f"trainer = Trainer({call})", "return trainer.fit(train_data, val_data, epochs)"]

    def _piece(self, name: str, extra: list[str], returns: str, body: Lines) -> tuple[Lines, str]:
        """Return a function, or a method, of the lines in body, and a call of it."""
        if self.plan.style == "class":
            return define(name, ["self", *self._typed(extra)], returns, body), f"${name}({', '.join(extra)})"
        text = "\n".join(body)
        extra = [one for one in extra if one != "epoch" or re.search(r"\bepoch\b", text)]
        found = re.findall(r"\$(\w+)", text)
        needed = sorted(dict.fromkeys(found), key=lambda one: list(TYPES).index(one) if one in TYPES else len(TYPES))
        lines = define(name, self._typed([*needed, *extra]), returns, body)
        return lines, f"{name}({', '.join([*(f'${one}' for one in needed), *extra])})"

    def _fit(self, train: Lines, validate: Lines, title: Lines) -> Lines:
        plan = self.plan
        conditions = [] if plan.always_validates else ["val_data is not None"]
        conditions += [plan.due] if plan.due else []
        if conditions:
            validate = [f"if {' and '.join(conditions)}:", *indent(validate)]
        kept = [f"{n}: dict[str, Any] = {v}" if n == "logs" else f"{n} = {v}" for n, v in plan.state.items()]
        start = f"{plan.first_epoch}, " if plan.fit.initial_epoch else ""
        counted = [f"$run.{name} = {name}" for name in ("epoch",) if name in self.used]
        before = ["$run.epochs = epochs"] if "epochs" in self.used else []
        return fill(
            FIT,
            number=plan.number,
            start=[*kept, *before, *(resume_lines(plan) if plan.resumes else []), *plan.before],
            epochs="start_epoch, epochs" if plan.resumes else f"{start}epochs",
            epoch_begin=[*counted, *plan.epoch_begin],
            train=train,
            validate=[*title, *validate],
            epoch_end=plan.epoch_end,
            format=plan.format,
            save=["", "# ---- checkpoint ----", *plan.saving] if plan.saving else [],
            stop=["if should_stop:", "    break"] if "should_stop" in plan.state else [],
            after=plan.after,
        )

    def _setup(self) -> Lines:
        plan = self.plan
        lines = ["$device = next($net.parameters()).device"]
        lines += ["for metric in $metrics.values():", "    metric.to($device)"]
        if self.own is not None:
            lines.append("$run = Run($net, $loss_fn, $optimizer, $device)")
            if plan.style == "class":
                lines += ["$loss_fn = $run.loss_fn", *(["$log = $run.log"] if "log" in self.used else [])]
        if plan.scales and "train_step" in self.calls and plan.saving:
            lines.append("$scaler = $run.scaler")
        elif plan.scales and "train_step" not in self.calls:
            lines.append("$scaler = torch.amp.GradScaler($device.type)")
        if plan.class_weight is not None:
            lines += fill(CLASS_WEIGHTS)
        if plan.k > 1:
            lines.append("$window: list[int] = []  # samples of each batch since the last optimizer step")
        return lines

    def _data(self) -> Lines:
        train_data, val_data, epochs = self._typed(["train_data", "val_data", "epochs"])
        return [train_data, val_data + ("" if self.plan.always_validates else " | None"), epochs]

    def _typed(self, names: list[str]) -> list[str]:
        plan = self.plan
        types = {**plan.types, **{name: kind for name, (kind, _, _) in plan.keywords.items()}}
        types |= {"x": types[plan.kind], "y": types.get(plan.y_kind, "")}
        return [f"{name}: {types[name]}" for name in names]

    def _about(self) -> Lines:
        plan = self.plan
        x = {"tensor": "x", "tuple": "(x, ...)", "dict": "{argument of forward: x}"}[plan.kind]
        batches = []
        for trains in (True, False):
            maker = "that unpack makes " if plan.fit.unpacks[not trains] else ""
            parts = [x, *plan.names(trains=trains)[1:]]
            batches.append(f"batches {maker}({', '.join(parts)}{',' * (len(parts) == 1)}).")
        lines = [
            '"""Train net in place; return the history, {"loss": [one an epoch], each metric, and both as val_...}.',
            "",
        ]
        if batches[0] == batches[1]:
            lines += [f"train_data, val_data: {batches[0]}   metrics: torchmetrics objects by name."]
        else:
            lines += [f"train_data: {batches[0]}   val_data: {batches[1]}   metrics: torchmetrics objects by name."]
        if plan.resumes:
            lines.append("resume_from: a file that an earlier run wrote at checkpoint_path, to go on after its epoch.")
        return [*lines, '"""']

    def _weighted_loss(self) -> Lines:
        """Return a function of the weighted loss that calls the loss as kerastorch does."""
        plan = self.plan
        mean, comment = "(losses * weights).mean()", ""
        reduction, ignored = keyword_of(plan.loss, "reduction", "mean"), ignored_class(plan.loss)
        if reduction in ("sum", "batchmean"):
            mean = "(losses * weights).sum()" + (" / len(losses)" if reduction == "batchmean" else "")
        elif ignored is not None and not plan.one_hot:
            mean += f" * (y.numel() / (y != {ignored}).sum())"
            comment = f"  # targets of {ignored} do not count"
        losses = ["losses: Tensor = loss_fn(outputs, y)"]
        if isinstance(plan.loss, nn.Module) and hasattr(plan.loss, "reduction"):
            losses = ["one_each: Any = copy.copy(loss_fn)  # shares parameters", 'one_each.reduction = "none"']
            losses += ["losses: Tensor = one_each(outputs, y)"]
        elif not isinstance(plan.loss, nn.Module) and "reduction" in parameter_names(plan.loss):
            losses = ['losses = loss_fn(outputs, y, reduction="none")']
        if any(plan.weighted):
            losses += ["if weights.dim() == 1:", "    weights = weights.reshape(-1, *[1] * (losses.dim() - 1))"]
        elif plan.has_flat_weights:
            losses += ["weights = weights.reshape(-1, *[1] * (losses.dim() - 1))"]
        about = '"""Return the mean of the samples\' losses, each times its weight."""'
        arguments = [f"loss_fn: {plan.types['loss_fn']}", "outputs: Tensor", "y: Tensor", "weights: Tensor"]
        return define("weighted_loss", arguments, "Tensor", [about, *losses, f"return {mean}{comment}"])
