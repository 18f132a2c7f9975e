"""The words of an error: "did you mean", lists of what is known, checks of arguments, and names turned into objects.

Every table of names in the package (losses, optimizers, schedulers, metrics, loops) is looked up through here.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import TypeVar

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence: "; did you mean 'x'?" (or two names) for names close to `name`, or a full stop."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(by_lower[match]) for match in near)}?" if near else "."


def canonical(name: str) -> str:
    """Return a name as the tables spell it."""
    return name.strip().lower().replace("-", "_")


def look_up(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Return table[name]; the case of letters and "-" for "_" do not matter.

    Raises ValueError with the nearest and all known names when there is no such name.
    """
    key = canonical(name)
    if key in table:
        return table[key]
    raise ValueError(f"{kind} {name!r} is not known{did_you_mean(key, table)} Known: {', '.join(sorted(table))}.")


def check_choice(argument: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError naming the argument, the value met and the choices, unless value is one of them."""
    choices = list(choices)
    if value in choices:
        return
    hint = did_you_mean(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else "."
    raise ValueError(f"{argument}={value!r} is not known{hint} Use one of: {', '.join(map(repr, choices))}.")


def check_int(argument: str, value: object, at_least: int = 1) -> None:
    """Raise TypeError or ValueError naming the argument and the value met, unless value is an int >= at_least."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument} must be an int, got {value!r} ({type(value).__name__}).")
    if int(value) < at_least:
        raise ValueError(f"{argument} must be at least {at_least}, got {value}.")


def is_number(value: object) -> bool:
    """Whether value is a real number, of python or numpy, and no flag."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(argument: str, value: object) -> None:
    """Raise TypeError or ValueError naming the argument and the value met, unless value is a number and not NaN."""
    if not is_number(value):
        raise TypeError(f"{argument} must be a number, got {value!r} ({type(value).__name__}).")
    if value != value:  # only NaN is not itself
        raise ValueError(f"{argument} must be a number, got {value!r}.")


def warn(message: str) -> None:
    """Warn at the line outside the package that led here: the user's fit(), as a rule."""
    package, level, frame = __name__.partition(".")[0], 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (package, "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
