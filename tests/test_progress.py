"""The bar refreshes at most ten times a second and reads no logs between; without a terminal it is a line an epoch."""

import io
import sys
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from kerastorch import progress
from kerastorch.progress import REFRESH_SECONDS, Progress, format_logs


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still until it is moved."""
    clock = Clock()
    monkeypatch.setattr("kerastorch.progress.time.monotonic", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def set_stderr(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None) -> None:
    """Give Progress another stderr (pytest keeps the real one to itself), and no notebook."""
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream, modules=sys.modules))
    monkeypatch.delitem(sys.modules, "IPython", raising=False)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    set_stderr(monkeypatch, Terminal())


@pytest.fixture
def log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    set_stderr(monkeypatch, io.StringIO())


class Reader:
    """Counts how often logs are read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> Mapping[str, float]:
        self.reads += 1
        return {"loss": self.reads / 8}


class FakeBar:
    """Keeps what a bar was told."""

    def __init__(self, total: int | None = None, **options: Any) -> None:
        self.total, self.n, self.shown, self.is_open, self.postfix = total, 0, [], True, ""

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        assert not refresh  # update() draws; drawing here as well would be twice
        self.postfix = text

    def update(self, n: int) -> None:
        self.n += n
        self.shown.append((self.n, self.postfix))

    def close(self) -> None:
        self.is_open = False


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch, terminal: None) -> list[FakeBar]:
    made: list[FakeBar] = []

    def make(**options: Any) -> FakeBar:
        made.append(FakeBar(**options))
        return made[-1]

    monkeypatch.setattr(progress, "_tqdm", lambda: make)
    return made


# ---- which form ----


@pytest.mark.parametrize("verbose", ["auto", 1])
def test_terminal_gets_a_bar(terminal: None, verbose: Any) -> None:
    assert (Progress(verbose).shows_bar, Progress(verbose).shows_line) == (True, False)


@pytest.mark.parametrize("verbose", ["auto", 1, 2])
def test_log_file_gets_a_line(log_file: None, verbose: Any) -> None:
    assert (Progress(verbose).shows_bar, Progress(verbose).shows_line) == (False, True)


def test_verbose_2_is_a_line_in_a_terminal_too(terminal: None) -> None:
    assert (Progress(2).shows_bar, Progress(2).shows_line) == (False, True)


@pytest.mark.parametrize(("shell", "is_bar"), [(SimpleNamespace(kernel=1), True), (SimpleNamespace(), False)])
def test_notebook_gets_a_bar_and_a_plain_ipython_in_a_file_a_line(
    monkeypatch: pytest.MonkeyPatch, log_file: None, shell: object, is_bar: bool
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert Progress("auto").shows_bar is is_bar


def test_process_without_stderr_gets_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    set_stderr(monkeypatch, None)
    assert Progress("auto").shows_line


@pytest.mark.parametrize(
    ("verbose", "message"),
    [
        ("atuo", "verbose='atuo' is not known; did you mean 'auto'"),
        (3, r"verbose=3 is not known\. Use one of: 'auto', 0, 1, 2"),
    ],
)
def test_unknown_verbose_is_refused(verbose: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Progress(verbose)


# ---- the line ----


def test_line_has_title_seconds_and_logs(clock: Clock, log_file: None, capsys: pytest.CaptureFixture[str]) -> None:
    shown, reader = Progress("auto"), Reader()
    shown.begin("Epoch 1/2", 3)
    for done in (1, 2, 3):
        clock.seconds += 0.5
        shown.update(done, reader)
    assert capsys.readouterr().out == ""
    shown.end({"loss": 0.25, "accuracy": 0.5, "confusion": [[1, 2]]})
    assert capsys.readouterr() == ("Epoch 1/2 - 1.5s - loss: 0.2500 - accuracy: 0.5000\n", "")
    assert reader.reads == 0


def test_line_without_logs_has_no_trailing_dash(
    clock: Clock, log_file: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress(2)
    shown.begin("Predict", None)
    shown.end({})
    assert capsys.readouterr().out == "Predict - 0.0s\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_verbose_0_shows_and_reads_nothing(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    set_stderr(monkeypatch, Terminal() if is_terminal else io.StringIO())
    shown, reader = Progress(0), Reader()
    shown.begin("Epoch 1/1", 2)
    clock.seconds += 5
    shown.update(1, reader)
    shown.end({"loss": 1.0})
    shown.close()
    assert reader.reads == 0
    assert capsys.readouterr() == ("", "")


# ---- the bar ----


def test_bar_refreshes_at_most_ten_times_a_second_and_reads_no_logs_between(clock: Clock, bars: list[FakeBar]) -> None:
    shown, reader = Progress("auto"), Reader()
    shown.begin("Epoch 1/1", 1000)
    for done in range(1, 1001):  # a batch a millisecond: one second
        clock.seconds += 0.001
        shown.update(done, reader)
        assert len(bars[0].shown) == reader.reads
    assert 9 <= reader.reads <= 10


def test_slow_batches_are_each_shown_with_their_logs(clock: Clock, bars: list[FakeBar]) -> None:
    shown, reader = Progress("auto"), Reader()
    shown.begin("Epoch 1/1", 3)
    for done in (1, 2, 3):
        clock.seconds += 0.2
        shown.update(done, reader)
    assert bars[0].shown == [(1, "loss: 0.1250"), (2, "loss: 0.2500"), (3, "loss: 0.3750")]


def test_bar_s_own_drawing_time_counts_as_pause(clock: Clock, bars: list[FakeBar]) -> None:
    shown = Progress("auto")
    shown.begin("Epoch 1/1", 3)

    def slow() -> Mapping[str, float]:
        clock.seconds += 1.0
        return {}

    clock.seconds += 0.2
    shown.update(1, slow)
    shown.update(2, slow)  # at once after a slow reading: no second one
    assert [n for n, _ in bars[0].shown] == [1]


def test_end_puts_a_line_with_the_final_logs_in_the_bar_s_place(
    clock: Clock, bars: list[FakeBar], capsys: pytest.CaptureFixture[str]
) -> None:
    shown, reader = Progress("auto"), Reader()
    shown.begin("Epoch 1/1", None)
    for done in range(1, 6):
        shown.update(done, reader)
    shown.end({"loss": 2.0})
    (bar,) = bars
    assert (reader.reads, bar.shown, bar.is_open) == (0, [], False)
    assert capsys.readouterr().out == "Epoch 1/1 - 0.0s - loss: 2.0000\n"


def test_each_epoch_has_its_own_bar(clock: Clock, bars: list[FakeBar]) -> None:
    shown = Progress("auto")
    for epoch in (1, 2):
        shown.begin(f"Epoch {epoch}/2", 1)
        shown.update(1, dict)
        shown.end({})
        assert [bar.is_open for bar in bars] == [False] * epoch


def test_close_leaves_a_bar_half_way_and_is_harmless_again(clock: Clock, bars: list[FakeBar]) -> None:
    shown = Progress("auto")
    shown.begin("Epoch 1/1", 10)
    clock.seconds += 1
    shown.update(3, dict)
    shown.close()
    shown.close()
    assert (bars[0].n, bars[0].total, bars[0].is_open) == (3, 10, False)


def test_real_bar_shows_title_count_and_logs_and_goes(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress("auto")
    shown.begin("Epoch 1/1", 3)
    read: Callable[[], Mapping[str, float]] = lambda: {"loss": 9.0}  # noqa: E731
    time.sleep(1.5 * REFRESH_SECONDS)
    shown.update(2, read)
    bar = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert bar.startswith("Epoch 1/1:  67%")
    assert "2/3" in bar
    assert "loss: 9.0000" in bar
    shown.end({"loss": 0.125})
    out, err = capsys.readouterr()
    assert err.replace("\r", "").strip() == ""  # wiped
    assert out.endswith("s - loss: 0.1250\n")


# ---- numbers ----


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (1, "1.0000"),
        (0.12345, "0.1235"),
        (-0.5, "-0.5000"),
        (0.001, "0.0010"),
        (0.0009, "9.000e-04"),
        (99999.0, "99999.0000"),
        (1e5, "1.000e+05"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_have_four_decimals_unless_that_hides_them(value: float, text: str) -> None:
    assert format_logs({"loss": value}, ", ") == f"loss: {text}"


def test_logs_are_joined_in_order_and_lists_are_left_out() -> None:
    assert format_logs({"b": 1.0, "list": [1.0], "a": 2.0}, " - ") == "b: 1.0000 - a: 2.0000"
