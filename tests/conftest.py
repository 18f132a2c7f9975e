"""For all tests."""

import gc
import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # each has a core, and threads that wait for one another would spin on it
    os.environ["OMP_NUM_THREADS"] = "1"  # for children too

import pytest
import torch

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


@pytest.fixture
def one_thread():
    """Compile for one thread, and leave nothing compiled behind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.fixture
def only_traced(monkeypatch):
    """Run the traced graph as torch would, without a compiler of C++, which takes seconds for each."""

    def compile_(function, *, fullgraph, dynamic, options):
        return plain_compile(function, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")

    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # some libraries complain of what is left at the end
