"""What x and y look like by themselves. Sisters: copies.py, net.py, trial.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kerastorch.device import Nested
from kerastorch.report import Finding


def _columns(name: str, values: Sequence[Nested]) -> dict[str, list[Tensor]]:
    """{"x": its tensors, one a batch}, or {"x['a']": ..., "x['b']": ...} where x is a nest."""
    columns: dict[str, list[Tensor]] = {}
    for value in values:
        if isinstance(value, Tensor):
            columns.setdefault(name, []).append(value)
        elif isinstance(value, (Mapping, tuple, list)):
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                for inner, parts in _columns(f"{name}[{key!r}]", [item]).items():
                    columns.setdefault(inner, []).extend(parts)
    return columns


def check_x(xs: Sequence[Nested]) -> list[Finding]:
    findings: list[Finding] = []
    for name, parts in _columns("x", xs).items():
        if not parts[0].is_floating_point() or parts[0].dim() == 0:
            continue
        tables = [_by_feature(part) for part in parts]
        rows = torch.cat([table for table in tables if table.shape[1] == tables[0].shape[1]])
        if bad := int((~rows.isfinite()).sum()):
            feature = int((~rows.isfinite()).any(0).nonzero()[0])
            text = f"{bad} of {rows.numel()} values looked at, the first in feature {feature}: drop or fill these rows."
            findings.append(Finding("error", f"NaN or infinity in {name}", text))
        elif len(rows) > 1:
            findings += _check_scale(name, rows)
    return findings or [Finding("ok", "Scale of x", "finite; means near 0 and stds near 1 where it is floating point.")]


def _by_feature(x: Tensor) -> Tensor:
    """Rows by features: the last axis of (N, T, F), else axis 1, the channels of images."""
    axis = 2 if x.dim() == 3 else 1
    return x.movedim(axis, -1).reshape(-1, x.shape[axis]).float() if x.dim() > 1 else x[:, None].float()


def _check_scale(name: str, rows: Tensor) -> Iterator[Finding]:
    (std, mean), low, high = torch.std_mean(rows, 0), rows.min().item(), rows.max().item()
    if far := int(((mean.abs() > 10) | (std > 10)).sum()):
        fix = "pixels? Divide by 255" if low >= 0 and 100 < high <= 255 else "subtract the mean, divide by the std"
        text = (
            f"{far} of {len(std)} features are far from mean 0 and std 1 (means {_span(mean)}, stds {_span(std)}, "
            f"values {low:.4g} to {high:.4g}): {fix}."
        )
        yield Finding("warning", f"Scale of {name}", text)
    if constant := int((rows == rows[0]).all(0).sum()):
        text = f"{constant} of {len(std)} features never vary in {len(rows)} rows: they teach nothing."
        yield Finding("warning" if constant > len(std) / 2 else "ok", f"Constant features in {name}", text)


def _span(values: Tensor) -> str:
    return f"{values.min().item():.4g} to {values.max().item():.4g}"


def check_y(ys: Sequence[Nested]) -> list[Finding]:
    findings = []
    for name, parts in _columns("y", ys).items():
        y = torch.cat([part.reshape(-1) for part in parts])
        values, counts = y.unique(return_counts=True)
        share, most = counts.max().item() / len(y), values[counts.argmax()].item()
        is_one_a_row = len(y) == sum(map(len, parts))
        is_class = is_one_a_row and (not y.is_floating_point() or set(values.tolist()) <= {0.0, 1.0})
        if bad := int((~y.isfinite()).sum()):
            text = f"{bad} of {len(y)} values looked at: drop or fill these rows."
            findings.append(Finding("error", f"NaN or infinity in {name}", text))
        elif len(values) == 1 and len(y) > 1:
            text = f"all {len(y)} values looked at are {most:.4g}: there is nothing to learn. Are the rows sorted?"
            findings.append(Finding("warning", f"Targets {name} never vary", text))
        elif is_class and share > 0.9:
            text = (
                f"class {most:.4g} has {share:.0%} of {len(y)} rows: always guessing it looks good. Weigh the classes, "
                "sample them evenly, and judge by balanced accuracy or AUROC."
            )
            findings.append(Finding("warning", f"Class imbalance in {name}", text))
        else:
            findings.append(Finding("ok", f"Targets {name}", f"{len(y)} values, {_span(y)}."))
    return findings
