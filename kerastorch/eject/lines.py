"""Lines of Python: templates filled, blocks indented, long lines folded, imports sorted, a user's source moved.

"<block>" in a template is filled with the lines that this model needs, or with none. A "$" before a name becomes
"self." in the class style, an argument in the function style, nothing in the script.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterable

Lines = list[str]
WIDTH = 120
DOLLAR = "\0"  # stands for a "$" of the user's own until the last
KEPT = "\1"  # "\1name" is a line that the user's source of this name takes the place of, at the last

IMPORTS = {  # what a use of the name looks like -> the line
    r"copy\.": "import copy",
    r"csv\.": "import csv",
    r"functools\.": "import functools",
    r"math\.": "import math",
    r"os\.": "import os",
    r"Callable\[": "from collections.abc import Callable",
    r"Sequence\[": "from collections.abc import Sequence",
    r"AbstractContextManager\[": "from contextlib import AbstractContextManager",
    r"nullcontext\(": "from contextlib import nullcontext",
    r"Path\(": "from pathlib import Path",
    r"Any\b": "from typing import Any",
    r"torch\.": "import torch",
    r"torchmetrics\.": "import torchmetrics",
    r"Tensor\b": "from torch import Tensor",
    r"nn\.": "from torch import nn",
    r"Optimizer\b": "from torch.optim import Optimizer",
    r"LRScheduler\b": "from torch.optim.lr_scheduler import LRScheduler",
    r"ReduceLROnPlateau\b": "from torch.optim.lr_scheduler import ReduceLROnPlateau",
    r"DataLoader[\[(]": "from torch.utils.data import DataLoader",
    r"TensorDataset\(": "from torch.utils.data import TensorDataset",
    r"Metric\b": "from torchmetrics import Metric",
    r"tqdm\(": "from tqdm import tqdm",
}
TQDM_NOTE = "  # type: ignore[import-untyped]  # tqdm.auto begins each pass twice, which draws random numbers"


def indent(lines: Iterable[str], levels: int = 1) -> Lines:
    return [textwrap.indent(line, "    " * levels) for line in lines]


def fill(template: str, **blocks: str | Lines) -> Lines:
    """Return the template's lines with each "<block>" filled in; a line that is one empty block falls away."""
    lines: Lines = []
    for line in template[1:-1].split("\n"):
        whole = re.fullmatch(r"( *)<(\w+)>", line)
        if whole:
            block = blocks[whole[2]]
            lines += [textwrap.indent(part, whole[1]) for part in ([block] if isinstance(block, str) else block)]
        else:
            lines.append(re.sub(r"<(\w+)>", lambda found: str(blocks[found[1]]), line))
    return lines


def define(name: str, arguments: Lines, returns: str, body: Lines) -> Lines:
    return [f"def {name}({', '.join(arguments)}) -> {returns}:", *indent(body), "", ""]


def quote(text: str | os.PathLike[str]) -> str:
    return json.dumps(os.fspath(text), ensure_ascii=False).replace("$", DOLLAR)


def fold(line: str, *, packs: bool = False) -> str:
    """Return a line that is too long with what its outer bracket holds on lines of their own, again where need be.

    packs: put as many parts on a line as it holds, where a formatter has no say.
    """
    start = re.match(r"\s*[\[{]", line) or re.search(r"\(", line) or re.search(r"[\[{]", line)
    if len(line) <= WIDTH or not start or line.lstrip().startswith("#"):
        return line
    head, rest = line[: start.end()], line[start.end() :]
    parts, depth = [""], 1
    tokens = iter(re.findall(r'"(?:[^"\\]|\\.)*"|.', rest))
    for token in tokens:
        depth += (token in "([{") - (token in ")]}")
        if not depth:
            break
        if token == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += token
    margin = line[: len(line) - len(line.lstrip())]
    middle: Lines = []
    for part in (part.strip() for part in parts if part.strip()):
        if packs and middle and len(middle[-1]) + len(part) + 2 <= WIDTH:
            middle[-1] += f" {part},"
        else:
            middle.append(fold(f"{margin}    {part},", packs=packs))
    return "\n".join([head, *middle, f"{margin}{token}{''.join(tokens)}"])


def find_imports(text: str) -> set[str]:
    """Return the imports that a text's names need."""
    return {line for name, line in IMPORTS.items() if re.search(rf"(?<![\w.\"]){name}", text)}


def sorted_imports(lines: Iterable[str]) -> Lines:
    """Return imports as isort orders them: the standard library first, "import" before "from", names joined."""
    lines = set(lines)
    plain = sorted(line for line in lines if line.startswith("import"))
    froms: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        if line.startswith("from"):
            _, module, _, names = line.split(" ", 3)
            froms.setdefault((module, names if " as " in names else ""), set()).add(names)
    joined = [f"from {key[0]} import {', '.join(sorted(froms[key], key=_import_key))}" for key in sorted(froms)]
    blocks: Lines = []
    for is_standard in (True, False):
        part = [one for one in [*plain, *joined] if (_root(one) in sys.stdlib_module_names) is is_standard]
        blocks += ["", *part] if part and blocks else part
    return [line + TQDM_NOTE if line == "from tqdm import tqdm" else line for line in blocks]


def _import_key(name: str) -> tuple[int, str]:
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)


def _root(line: str) -> str:
    return line.split()[1].partition(".")[0]


def shifted(source: str, margin: int) -> str:
    """Return a user's source with its first line at this margin, the others moved as far; strings stay as they are."""
    lines = source.splitlines()
    old = len(lines[0]) - len(lines[0].lstrip())
    inside: set[int] = set()  # lines that begin within a string
    begun = 0
    text = "\n".join(["if 1:", *lines] if old else lines) + "\n"
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        first = token.start[0]
        if name in ("FSTRING_START", "TSTRING_START"):
            begun = first
        elif name in ("FSTRING_END", "TSTRING_END"):
            first = begun
        if name in ("STRING", "FSTRING_END", "TSTRING_END"):
            inside |= set(range(first + 1, token.end[0] + 1))
    offset = 2 if old else 1
    return "\n".join(
        line if i + offset in inside or not line.strip() else " " * margin + line[min(old, _blanks(line)) :]
        for i, line in enumerate(lines)
    )


def _blanks(line: str) -> int:
    return len(line) - len(line.lstrip())
