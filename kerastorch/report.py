"""Report: what the pre-flight check found, as text and as HTML for a notebook; tables and sizes for other pages too.

Sisters: progress.py, plots.py.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One result.   level: how bad it is.   title: what holds.   text: the figures met, and the fix."""

    level: Level
    title: str
    text: str


@dataclass(frozen=True)
class Layer:
    """One call of a leaf module.   output: its shapes.   parameters: their number.   bytes: the output's."""

    name: str
    kind: str
    output: str
    parameters: int
    bytes: int


@dataclass(frozen=True, repr=False)
class Report:
    """What check_model found; str() is a page, a notebook shows tables.

    findings: in the order of the checks.   layers: leaf modules, in the order in which forward called them.
    """

    findings: list[Finding]
    layers: list[Layer]

    @property
    def ok(self) -> bool:
        """Whether there is neither a warning nor an error."""
        return all(finding.level == "ok" for finding in self.findings)

    def __str__(self) -> str:
        lines = [self._headline(), ""]
        for level, title, text in self._findings():
            lines += textwrap.wrap(f"{level:8} {title}: {text}", 110, subsequent_indent=" " * 9)
        widths = [max(map(len, column)) for column in zip(*self._layers(), strict=True)]
        lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in self._layers())]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{self._headline()}</p>{html_table(self._findings())}{html_table(self._layers())}"

    def _headline(self) -> str:
        counts = [(sum(finding.level == level for finding in self.findings), level) for level in ("error", "warning")]
        text = ", ".join(f"{count} {level}{'s' * (count > 1)}" for count, level in counts if count)
        return f"Pre-flight check: {text or 'nothing to put right'}"

    def _findings(self) -> list[tuple[str, ...]]:
        worst_first = sorted(self.findings, key=lambda finding: ("error", "warning", "ok").index(finding.level))
        return [(finding.level, finding.title, finding.text) for finding in worst_first]

    def _layers(self) -> list[tuple[str, ...]]:
        rows = [(layer.name, layer.kind, layer.output, f"{layer.parameters:,}") for layer in self.layers]
        return [("layer", "kind", "output", "parameters"), *rows]


def html_table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as an HTML table, their text escaped."""
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def format_bytes(count: float) -> str:
    """Return a number of bytes as text, three digits and a binary unit."""
    power = min(3, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**power:.3g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
