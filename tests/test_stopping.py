"""caught_signals, end_interrupted and check_on_interrupt alone; tests/faults/test_stopping.py has them in fit."""

import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from kerastorch.stopping import SIGTERM_STATUS, caught_signals, check_on_interrupt, end_interrupted

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals to itself")

BOTH = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture(autouse=True)
def handlers():
    """Every test begins with the handlers of a plain script, and leaves the ones that pytest has."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def send(signum):
    """Send a real signal to this process, but never one that would kill it."""
    assert signal.getsignal(signum) is not signal.SIG_DFL
    os.kill(os.getpid(), signum)


def are_plain():
    return (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )


@BOTH
def test_the_first_signal_is_noted_and_the_block_goes_on(signum):
    noted, went_on = [], False
    with caught_signals(noted.append, sigterm=True):
        send(signum)
        went_on = True
    assert noted == [signum]
    assert went_on


@BOTH
@pytest.mark.parametrize(
    ("second", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_the_second_signal_breaks_at_once_whatever_the_first_was(signum, second, error):
    noted = []

    def block():
        with caught_signals(noted.append, sigterm=True):
            send(signum)
            send(second)
            noted.append("too late")

    with pytest.raises(error) as raised:
        block()
    assert noted == [signum]
    assert are_plain()
    if error is SystemExit:
        assert raised.value.code == 143


def test_sigterm_is_left_to_the_system_unless_asked_for():
    with caught_signals(lambda signum: None, sigterm=False):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_handlers_are_put_back_however_the_block_ends(error):
    def block():
        with caught_signals(lambda signum: None, sigterm=True):
            assert not are_plain()
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(error):
            block()
    assert are_plain()


@BOTH
@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda signum, frame: None], ids=["ignored", "a function"])
def test_a_handler_of_the_user_stays_in_place(signum, own):
    signal.signal(signum, own)
    noted = []
    with caught_signals(noted.append, sigterm=True):
        assert signal.getsignal(signum) is own
        send(signum)
    assert signal.getsignal(signum) is own
    assert noted == []


def test_an_inner_block_leaves_the_outer_ones_handlers():
    outer, inner = [], []
    with caught_signals(outer.append, sigterm=True):
        handler = signal.getsignal(signal.SIGINT)
        with caught_signals(inner.append, sigterm=True):
            assert signal.getsignal(signal.SIGINT) is handler
        assert signal.getsignal(signal.SIGINT) is handler
        send(signal.SIGINT)
    assert outer == [signal.SIGINT]
    assert inner == []
    assert are_plain()


def test_a_block_in_a_thread_replaces_no_handler():
    seen = []

    def work():
        with caught_signals(lambda signum: None, sigterm=True):
            seen.append(are_plain())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_each_block_counts_its_signals_anew():
    noted = []
    for _ in range(3):
        with caught_signals(noted.append, sigterm=False):
            send(signal.SIGINT)
    assert noted == [signal.SIGINT] * 3


@pytest.mark.parametrize("on_interrupt", ["auto", "return", "raise"])
def test_after_sigterm_the_process_exits_with_143(on_interrupt):
    with pytest.raises(SystemExit) as raised:
        end_interrupted(signal.SIGTERM, on_interrupt)
    assert raised.value.code == SIGTERM_STATUS == 143


def make_script(monkeypatch):
    monkeypatch.delattr(sys, "ps1", raising=False)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)


def make_prompt(monkeypatch):
    make_script(monkeypatch)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)


def make_notebook(monkeypatch):
    make_script(monkeypatch)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None)))


def make_script_that_imports_ipython(monkeypatch):
    make_script(monkeypatch)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))


@pytest.mark.parametrize(
    ("place", "on_interrupt", "raises"),
    [
        (make_script, "auto", True),
        (make_script_that_imports_ipython, "auto", True),
        (make_prompt, "auto", False),
        (make_notebook, "auto", False),
        (make_script, "return", False),
        (make_notebook, "return", False),
        (make_script, "raise", True),
        (make_notebook, "raise", True),
    ],
)
def test_ctrl_c_raises_in_scripts_and_returns_where_somebody_types(place, on_interrupt, raises, monkeypatch):
    place(monkeypatch)
    if raises:
        with pytest.raises(KeyboardInterrupt):
            end_interrupted(signal.SIGINT, on_interrupt)
    else:
        assert end_interrupted(signal.SIGINT, on_interrupt) is None


@pytest.mark.parametrize("on_interrupt", ["auto", "return", "raise"])
def test_the_three_choices_are_taken(on_interrupt):
    assert check_on_interrupt(on_interrupt) is None


@pytest.mark.parametrize("wrong", ["Return", "retrun", "", None, True, 0, signal.SIGINT, ["return"]])
def test_any_other_choice_is_refused_with_those_that_there_are(wrong):
    with pytest.raises(ValueError, match=r"on_interrupt.*auto.*return.*raise"):
        check_on_interrupt(wrong)
