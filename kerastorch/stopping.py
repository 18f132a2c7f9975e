"""What Ctrl-C, a notebook's stop button and SIGTERM do to a running fit. Sister: resume.py."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from kerastorch.errors import check_choice

OnInterrupt = Literal["auto", "return", "raise"]
SIGCHLD = getattr(signal, "SIGCHLD", None)  # not on Windows
SIGTERM_STATUS = 128 + signal.SIGTERM  # 143, as a shell reports a process that SIGTERM ended


@contextmanager
def caught_signals(note: Callable[[int], None], *, sigterm: bool) -> Iterator[None]:
    """Call note(signal) at the first Ctrl-C and, if sigterm, the first SIGTERM; the second one ends the call at once.

    Only handlers that python or the system set are replaced, and put back at the end; outside the main thread none is.
    """
    noted = False

    def handle(signum: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(SIGTERM_STATUS)
        noted = True
        if SIGCHLD is not None and callable(signal.getsignal(SIGCHLD)):  # torch's, which raises when a worker has died
            own[SIGCHLD], before[SIGCHLD] = _let_be, signal.signal(SIGCHLD, _let_be)
        note(signum)

    before: dict[int, Any] = {}
    own: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            own[signal.SIGINT], before[signal.SIGINT] = handle, signal.signal(signal.SIGINT, handle)
        if sigterm and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            own[signal.SIGTERM], before[signal.SIGTERM] = handle, signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) is own[signum]:  # not one that a callback set for good
                signal.signal(signum, handler)


def _let_be(signum: int, frame: object) -> None:
    pass


def end_interrupted(signum: int, on_interrupt: OnInterrupt) -> None:
    """After SIGTERM raise SystemExit(143); after Ctrl-C KeyboardInterrupt, or return: in a notebook, with "auto"."""
    if signum == signal.SIGTERM:
        raise SystemExit(SIGTERM_STATUS)
    if on_interrupt == "raise" or (on_interrupt == "auto" and not _is_interactive()):
        raise KeyboardInterrupt


def check_on_interrupt(on_interrupt: object) -> None:
    """Raise ValueError for what end_interrupted does not take."""
    check_choice("on_interrupt", on_interrupt, ("auto", "return", "raise"))


def _is_interactive() -> bool:
    """Whether somebody types: a notebook, IPython or python's own prompt."""
    ipython = sys.modules.get("IPython")
    return hasattr(sys, "ps1") or (ipython is not None and ipython.get_ipython() is not None)
