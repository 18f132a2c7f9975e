"""For all tests."""

import gc
import os
import signal

import pytest

# Started in the background of a script, python ignores Ctrl-C, and so would every child that a test sends it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test pulls the plug, so none waits for the disk; a wrong descriptor is still an error. Children have the real one.
os.fsync = os.fstat


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> None:
    """Let a collection look at what a file's own tests make, not at the half million objects of torch, 0.2 s each."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # some libraries complain of what is left at the end
