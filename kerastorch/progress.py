"""The bar: one tqdm bar an epoch in a terminal or notebook, one plain line an epoch elsewhere. Sister: plots.py."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from kerastorch.errors import check_choice

REFRESH_SECONDS = 0.1  # the bar is drawn, and sums are read from the device, at most this often
Verbose = Literal["auto", 0, 1, 2]


class Progress:
    """What a call shows of its passes over the data.

    verbose: 0 nothing; 1 or "auto" a bar (a line where there is neither terminal nor notebook); 2 a line an epoch.
    """

    def __init__(self, verbose: Verbose) -> None:
        check_choice("verbose", verbose, ("auto", 0, 1, 2))
        self.verbose = verbose
        self.shows_line = verbose == 2 or (verbose in ("auto", 1) and not _is_interactive())
        self.shows_bar = verbose in ("auto", 1) and not self.shows_line
        self._bar: Any = None
        self._title, self._done, self._begun, self._next_refresh = "", 0, 0.0, 0.0

    def begin(self, title: str, total: int | None) -> None:
        """Begin a bar or line; total: number of batches, or None."""
        self._title, self._done, self._begun = title, 0, time.monotonic()
        self._next_refresh = self._begun + REFRESH_SECONDS
        if self.shows_bar:
            self._bar = _tqdm()(
                total=total, desc=title, unit="batch", mininterval=0, miniters=1, leave=False, **_size()
            )

    def update(self, done: int, read_logs: Callable[[], Mapping[str, Any]]) -> None:
        """Show `done` batches and the logs, unless the last refresh is too near: then nothing is read."""
        self._done = done
        if self._bar is None or time.monotonic() < self._next_refresh:
            return
        self._bar.set_postfix_str(format_logs(read_logs(), ", "), refresh=False)
        self._bar.update(done - self._bar.n)
        self._next_refresh = time.monotonic() + REFRESH_SECONDS

    def clear(self) -> None:
        """Take the bar off the screen, so that callbacks print on a line of their own."""
        if self._bar is not None:
            self._bar.clear()

    def end(self, logs: Mapping[str, Any]) -> None:
        """Put a line with the final logs in the bar's place."""
        self.close()
        if self.shows_bar or self.shows_line:
            seconds = time.monotonic() - self._begun
            print(" - ".join(filter(None, (self._title, f"{seconds:.1f}s", format_logs(logs, " - ")))), flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own, unless the call is silent."""
        self.clear()
        if self.shows_bar or self.shows_line:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar off the screen for good; harmless where there is none."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def format_logs(logs: Mapping[str, Any], separator: str) -> str:
    """Return "loss: 0.1234, accuracy: 0.9876"; values that are not single numbers are left out."""
    return separator.join(
        f"{name}: {_format(value)}" for name, value in logs.items() if isinstance(value, (int, float))
    )


def _format(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def _is_interactive() -> bool:
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _size() -> dict[str, Any]:
    """Return tqdm's size arguments: the terminal's, as it changes; 80 by 24 for one that has no size (a bare pty)."""
    try:
        has_size = 0 not in os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # a notebook, or stderr replaced
        has_size = True
    return {"dynamic_ncols": True} if has_size else {"ncols": 80, "nrows": 24}


def _tqdm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm.auto warns where ipywidgets is missing; its text bar does as well
        from tqdm.auto import tqdm
    return tqdm
