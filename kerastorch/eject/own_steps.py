"""The user's own train_step and eval_step, word for word, what they need, and the small Run that they are given."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import symtable
import sys
from types import FunctionType, ModuleType
from typing import Any

from kerastorch.eject.describe import describe, refuse
from kerastorch.eject.lines import Lines, fill, indent, shifted
from kerastorch.eject.plan import MOVED, Plan
from kerastorch.loops import ClassLoop, FunctionLoop, function_loop
from kerastorch.run import Run

RUN = """
class Run:
    \"\"\"What the steps below ask of run.<unused>\"\"\"

    def __init__(self, net: nn.Module, plain_loss_fn: <type>, optimizer: Optimizer, device: torch.device) -> None:
        self.net, self.plain_loss_fn, self.optimizer, self.device = net, plain_loss_fn, optimizer, device
        <scaler>
        <counters>
        <logged>

    def loss_fn(self, outputs: Any, y: Any, sample_weight: Tensor | None = None) -> Any:
        return self.plain_loss_fn(outputs, y)<mean>
"""
LOG = """
def log(self, **values: Tensor | float) -> None:
    \"\"\"Average scalars over the samples of a pass, into its logs; they stay on the device.\"\"\"
    for name, value in values.items():
        total, count = self.logged.get(name, (torch.zeros((), <dtype>device=self.device), 0))
        scalar = torch.as_tensor(value, device=self.device).detach().reshape(())
        self.logged[name] = (total.add(scalar, alpha=self.num_samples), count + self.num_samples)

def take_logged(self) -> dict[str, float]:
    logged, self.logged = self.logged, {}
    return {name: total.item() / count for name, (total, count) in logged.items()}
"""
PARTS = {
    "forward": "def forward(self, x: Any) -> Any:\n    return self.<forward>",
    "autocast": "def autocast(self) -> AbstractContextManager[Any]:\n    return <autocast>",
    "share": "def share(self, loss: Tensor) -> Tensor:\n    return loss  # all of it, without accumulation",
    "prepare_gradients": "def prepare_gradients(self) -> None:\n    <clip>",
    "step_is_due": "@property\ndef step_is_due(self) -> bool:\n    return True",
}
COUNTERS = ("epoch", "epochs", "step", "num_samples")
PLAIN = ("net", "loss_fn", "optimizer")
UNUSED = {"share": "accumulation", "step_is_due": "accumulation", "scaler": "fp16"}
RUNGS = {name for name in vars(ClassLoop) if not name.startswith("_")} | {"bind", "unbind"}
DEFINED = ("train", "train_epoch", "evaluate", "save", "weighted_loss")  # what the file itself defines


class OwnSteps:
    """calls: name of a step -> its call.   sources: name -> source, steps and what they call on self.

    imports, used: what the sources need of other packages, and of run.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.loop, cls = plan, plan.loop, type(plan.loop)
        self.kind = cls.__name__
        style = "function" if cls is FunctionLoop else "class" if issubclass(cls, ClassLoop) else None
        if style is None:
            refuse(
                f"the loop {self.kind}",
                "override train_step or eval_step of ClassLoop instead, or compile another loop",
            )
        if plan.style != style:
            refuse(f"the steps of {self.kind} in the {plan.style!r} style", f"use eject({style!r})")
        if plan.k > 1 or plan.class_weight is not None or any(plan.weighted):
            refuse(f"the steps of {self.kind} beside accumulation or weights", "write those into the ejected file")
        self.imports, self.used = set[str](), set[str]()
        self.calls: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.members: dict[str, Any] = {}
        if style == "function":
            self._take_functions()
        else:
            for owner in cls.__mro__[: cls.__mro__.index(ClassLoop)][::-1]:
                self.members |= {name: one for name, one in vars(owner).items() if not name.startswith("__")}
            self._take_methods()
        plan.types["loss_fn"] = "Callable[..., Any]"
        plan.counts_steps = "step" in self.used
        for name in ("clip_grad_norm", "clip_grad_value") if "train_step" in self.calls else ():
            plan.keywords.pop(name, None)  # Run knows them

    def _take_functions(self) -> None:
        for name in ("train_step", "eval_step"):
            function = getattr(self.loop, name)
            if function is getattr(function_loop, name):
                continue
            own = self._take(function, f"{self.kind}({name}=...)", None)
            other = {"train_step": "eval_step", "eval_step": "train_step"}[name]
            if own in DEFINED or (own == other and getattr(self.loop, other) is not function):
                refuse(f"a function called {own}, which the file defines itself", "give it another name")
            self.calls[name] = f"{own}($run, x, {self.plan.y}, None)"

    def _take_methods(self) -> None:
        cls = type(self.loop)
        for name in RUNGS - {"train_step", "eval_step"}:
            if not name.startswith("predict") and name in self.members:
                refuse(f"{cls.__name__}.{name}", "only train_step, eval_step and what they call go along")
        for name in ("train_step", "eval_step"):
            member = vars(self.loop).get(name, self.members.get(name))
            if member is not None:
                self._take_member(name, member)
                self.calls[name] = f"${name}(x, {self.plan.y}, None)"

    def _take_member(self, name: str, member: Any) -> None:
        if name in self.sources:
            return
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        own = self._take(function, f"{self.kind}.{name}", name, is_static=isinstance(member, staticmethod))
        if own != name:
            refuse(f"{self.kind}.{name}, which is defined as {own}", f"define it as {name}, in the class")

    def _take(self, function: Any, what: str, key: str | None, *, is_static: bool = False) -> str:
        """Keep the source of a function, and what it needs; return the name that it is defined under."""
        inner = inspect.unwrap(function)
        if not isinstance(inner, FunctionType) or inner.__name__ == "<lambda>":
            refuse(f"{what}, which is no def", "define it with def")
        try:
            text = shifted(inspect.getsource(inner), 0)
            body = ast.parse(text).body
        except (OSError, TypeError, SyntaxError):
            refuse(f"{what}, whose source can't be found", "define it with def, in a file or a notebook cell")
        definition = body[0]
        if not isinstance(definition, ast.FunctionDef):
            refuse(f"{what}, which is no plain def", "define it with def")
        self.sources[key or definition.name] = text
        arguments = [*definition.args.posonlyargs, *definition.args.args]
        if not arguments and not is_static:
            refuse(f"{what}, whose first argument has no name", "write its arguments out")
        self._read_attributes(definition, None if is_static else arguments[0].arg, what)
        for name in sorted(_outer_names(text)):
            self._take_along(name, inner, what)
        return definition.name

    # ---- what a step asks of self and of run ----

    def _read_attributes(self, definition: ast.FunctionDef, first: str | None, what: str) -> None:
        parents = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
        is_class = self.plan.style == "class"
        runs = set() if is_class else {first}

        def is_run(node: ast.AST) -> bool:
            if isinstance(node, ast.Attribute):
                return is_class and node.attr == "run" and isinstance(node.value, ast.Name) and node.value.id == first
            return isinstance(node, ast.Name) and node.id in runs

        for node in ast.walk(definition):  # run = self.run
            if isinstance(node, ast.Assign) and is_run(node.value):
                runs |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        for node, parent in parents.items():
            if not isinstance(node, (ast.Name, ast.Attribute)) or not isinstance(node.ctx, ast.Load):
                continue
            owner = ast.unparse(node)
            is_self = is_class and isinstance(node, ast.Name) and node.id == first
            if not is_run(node) and not is_self:
                continue
            if isinstance(parent, ast.Assign) and is_run(node):
                continue
            if not isinstance(parent, ast.Attribute):
                refuse(f"{what}, which hands {owner} on", f"use what it needs of it there, {owner}.net say")
            if not isinstance(parent.ctx, ast.Load):
                refuse(f"{what}, which changes {owner}.{parent.attr}", "keep it in a local name, or log it")
            if is_run(node):
                self._ask_run(owner, parent.attr, what)
            elif parent.attr != "run":
                self._ask_self(parent.attr, what)

    def _ask_run(self, owner: str, attribute: str, what: str) -> None:
        if attribute not in (*PARTS, *PLAIN, *COUNTERS, "device", "scaler", "log"):
            refuse(f"{what}, which uses {owner}.{attribute}", "write its work into the ejected file")
        self.used.add(attribute)

    def _ask_self(self, attribute: str, what: str) -> None:
        if attribute in PLAIN:
            return
        if attribute == "log":
            self.used.add("log")
        elif attribute in RUNGS and attribute not in self.members:
            refuse(f"{what}, which calls self.{attribute} of kerastorch", "write its work out")
        elif attribute in vars(self.loop) or not _is_method(self.members.get(attribute)):
            if not hasattr(self.loop, attribute):
                refuse(f"{what}, which uses self.{attribute}", "put what it needs into it")
            self._take_value(attribute, getattr(self.loop, attribute))
        else:
            self._take_member(attribute, self.members[attribute])

    def _take_value(self, name: str, value: Any) -> None:
        """Let train() take what the loop keeps: a number as a default, an object of the user's own as it is."""
        if name in self.plan.keywords:
            return
        text = describe(value)
        is_plain = isinstance(value, (bool, int, float, str))
        annotation = type(value).__name__ if is_plain else "Any"
        self.plan.keyword(
            name, annotation, text.code if is_plain else None, f"the loop's {name}, a {type(value).__name__}"
        )

    # ---- what it takes from around it ----

    def _take_along(self, alias: str, function: FunctionType, what: str) -> None:
        """Note the import, or the number, that a name from outside the step stands for; refuse the user's own."""
        way_out = "import or define it inside"
        if alias == "__class__":  # super() comes after it
            return
        if alias in function.__code__.co_freevars or alias == "super":
            refuse(f"{what}, which uses {alias!r} of around it", way_out)
        if alias not in function.__globals__:
            if not hasattr(builtins, alias):
                refuse(f"{what}, which uses {alias!r} of around it", way_out)
            return
        value = function.__globals__[alias]
        if value is Run and alias == "Run":
            return
        if isinstance(value, (bool, int, float, str)):
            line = f"{alias} = {describe(value).code}"
            self.plan.constants += [line] if line not in self.plan.constants else []
            return
        imported = _import_of(alias, value)
        if imported is None:
            refuse(f"{what}, which uses {alias!r} of around it", way_out)
        self.imports.add(imported)

    # ---- Run ----

    def run_class(self, clip: Lines) -> Lines:
        """Return the class Run with the parts that the steps use.   clip: the lines that clip."""
        plan = self.plan
        has_scaler = plan.scales or "scaler" in self.used
        scaler = f"self.scaler = torch.amp.GradScaler(device.type{'' if plan.scales else ', enabled=False'})"
        counters = [name for name in COUNTERS if name in self.used or (name == "num_samples" and "log" in self.used)]
        unused = {UNUSED[name]: None for name in UNUSED if name in self.used and not (name == "scaler" and plan.scales)}
        lines = fill(
            RUN,
            type=plan.types["loss_fn"],
            scaler=scaler if has_scaler else [],
            counters=f"{' = '.join(f'self.{name}' for name in counters)} = 0" if counters else [],
            logged="self.logged: dict[str, tuple[Tensor, int]] = {}" if "log" in self.used else [],
            mean=plan.mean,
            unused=f" Without {' and '.join(unused)} some of it does nothing." if unused else "",
        )
        clip = [
            re.sub(r"\$(clip_\w+)", lambda found: repr(float(getattr(plan.compiled, found[1]))), line) for line in clip
        ]
        for name, part in PARTS.items():
            if name in self.used:
                filled = fill(
                    f"\n{part}\n",
                    forward=MOVED[plan.kind][1],
                    autocast=plan.autocast or "nullcontext()",
                    clip=clip or "pass  # nothing is clipped",
                )
                lines += ["", *indent(filled)]
        if "log" in self.used:
            dtype = "" if plan.device.type == "mps" else "dtype=torch.float64, "
            lines += ["", *indent(fill(LOG, dtype=dtype))]
        return [*(line.replace("$", "self.") for line in lines), "", ""]


def _is_method(member: Any) -> bool:
    return inspect.isfunction(member) or isinstance(member, (staticmethod, classmethod, property))


def _outer_names(text: str) -> set[str]:
    """Return the names that a definition takes from the module around it, builtins too."""
    found: set[str] = set()

    def walk(table: symtable.SymbolTable, *, is_top: bool) -> None:
        for symbol in table.get_symbols():
            is_outer = symbol.is_referenced() and not symbol.is_assigned() and not symbol.is_imported()
            if symbol.is_global() or (is_top and is_outer and not symbol.is_namespace()):
                found.add(symbol.get_name())
        for child in table.get_children():
            walk(child, is_top=False)

    walk(symtable.symtable(text, "step", "exec"), is_top=True)
    definition = ast.parse(text).body[0]
    return found - {getattr(definition, "name", "")}


def _import_of(alias: str, value: object) -> str | None:
    """Return the import that gives this name this value; None where none does."""
    module = value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", None) or "torch")
    if not _is_installed(module.partition(".")[0]):
        return None
    if not isinstance(value, ModuleType):
        name = getattr(value, "__name__", "")
        for home in (module, "torch"):
            if name and getattr(sys.modules.get(home), name, None) is value:
                return f"from {home} import {name}{f' as {alias}' if alias != name else ''}"
        return None
    if module == alias:
        return f"import {module}"
    package, _, last = module.rpartition(".")
    renamed = f"{last} as {alias}" if last != alias else last
    return f"from {package} import {renamed}" if package else f"import {module} as {alias}"


def _is_installed(root: str) -> bool:
    """Whether a package is of the standard library or installed, not a file of the user's own or kerastorch."""
    if root in sys.stdlib_module_names and root != "__main__":
        return True
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root != __name__.partition(".")[0] and ("site-packages" in file or "dist-packages" in file)
