"""Imports run one way: a file imports only from lower rows of the map; only heavy packages load inside functions."""

import ast
from pathlib import Path

import pytest

import kerastorch

PACKAGE = Path(kerastorch.__file__).parent
ROWS = [  # lowest first; a folder's base file lies below its sisters, its __init__ above them
    {"datasets.digits", "errors", "file_lock"},
    {"device", "datasets"},
    {"lazy"},
    {"jit", "losses", "optimizers", "metrics", "initializers", "progress", "plots", "report"},
    {"averaging", "checkpoint", "distributed", "stopping", "history", "first_batch", "data.arrays"},
    {"data.weights", "data.rows", "data.predictions", "data.resumable", "sums"},
    {"data.in_memory"},
    {"data.dataset", "data.passes"},
    {"data.source"},
    {"data"},
    {"resume", "trial", "compiled"},
    {"run"},
    {"callbacks.callback"},
    {"callbacks.*"},
    {"callbacks"},
    {"loops.loop"},
    {"graph.scalars", "graph.optimizer_twin"},
    {"graph.parts"},
    {"graph.captured_step", "graph.compiled_step"},
    {"graph.step"},
    {"graph", "loops.*"},
    {"loops.graph_loop"},
    {"loops"},
    {"eject.lines"},
    {"eject.describe"},
    {"eject.plan"},
    {"eject.callbacks", "eject.own_steps", "eject.header"},
    {"eject.stages"},
    {"exported", "check.copies", "check.data", "check.net", "check.trial"},
    {"eject", "export", "summary", "check", "saving"},
    {"model"},
    {"", "__main__"},
]
HEAVY = {
    "numpy",
    "pandas",
    "matplotlib",
    "torchmetrics",
    "torchvision",
    "tqdm",
    "IPython",
    "safetensors",
    "onnxruntime",
    "onnxscript",
}
HEAVY_OF_TORCH = {"torch.utils.tensorboard", "torch.utils.flop_counter", "torch._inductor.custom_graph_pass"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def row_of(module: str) -> int:
    for row, names in enumerate(ROWS):
        if module in names:
            return row
    pattern = module.rpartition(".")[0] + ".*"
    return next(row for row, names in enumerate(ROWS) if pattern in names)


def imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are written in full"
        named = [f"{node.module}.{alias.name}" for alias in node.names]
        return named if node.module == "kerastorch" else [str(node.module)]
    return []


def outside_type_checking(tree: ast.Module) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        nodes.append(node)
        waiting.extend(ast.iter_child_nodes(node))
    return nodes


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_imports_only_from_lower_rows(path):
    here = module_name(path)
    for node in outside_type_checking(ast.parse(path.read_text())):
        for name in imports(node):
            if name.startswith("kerastorch."):
                target = name.removeprefix("kerastorch.")
                assert row_of(target) < row_of(here), f"{here or '__init__'} imports {target}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_heavy_packages_are_imported_inside_a_function(path):
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                for name in imports(node):
                    is_heavy = name.partition(".")[0] in HEAVY or name in HEAVY_OF_TORCH
                    assert is_heavy, f"{function.name} imports {name}"


def test_the_walk_sees_an_upward_import():
    tree = ast.parse("from kerastorch.model import Model")
    (name,) = [name for node in outside_type_checking(tree) for name in imports(node)]
    assert row_of(name.removeprefix("kerastorch.")) > row_of("run")
