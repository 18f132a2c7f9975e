"""The curves: a panel a name, training and validation in it, epochs counted from 1."""

import sys
from collections.abc import Iterator

import pytest

from kerastorch.plots import plot_curves

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def headless() -> Iterator[None]:
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


ROWS = [
    {"loss": 1.0, "accuracy": 0.5, "val_loss": 1.5},
    {"loss": 0.5, "accuracy": 0.75},
    {"loss": 0.25, "accuracy": 1.0, "val_loss": 0.5},
]


def test_training_and_validation_share_a_panel() -> None:
    loss, accuracy = plot_curves([0, 1, 2], ROWS)
    assert (loss.get_title(), accuracy.get_title()) == ("loss", "accuracy")
    assert [line.get_label() for line in loss.lines] == ["training", "validation"]
    assert [line.get_label() for line in accuracy.lines] == ["training"]
    assert loss.get_xlabel() == "epoch"


def test_epochs_are_drawn_from_1_and_gaps_are_left_out() -> None:
    loss, _ = plot_curves([0, 1, 2], ROWS)
    training, validation = loss.lines
    assert (list(training.get_xdata()), list(training.get_ydata())) == ([1, 2, 3], [1.0, 0.5, 0.25])
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([1, 3], [1.5, 0.5])


def test_epochs_that_count_from_elsewhere_keep_their_numbers() -> None:
    (panel,) = plot_curves([7, 8], [{"loss": 1.0}, {"loss": 2.0}])
    assert list(panel.lines[0].get_xdata()) == [8, 9]


def test_name_with_validation_only_has_its_panel() -> None:
    loss, rouge = plot_curves([0], [{"loss": 1.0, "val_rouge": 0.5}])
    assert (loss.get_title(), rouge.get_title()) == ("loss", "rouge")
    assert [line.get_label() for line in rouge.lines] == ["validation"]


def test_values_that_are_lists_are_left_out() -> None:
    panels = plot_curves([0], [{"loss": 1.0, "confusion": [[1, 0], [0, 1]], "val_confusion": [[1, 0], [0, 1]]}])
    assert [panel.get_title() for panel in panels] == ["loss"]


def test_one_epoch_and_nan_are_drawn() -> None:
    (panel,) = plot_curves([0], [{"loss": float("nan"), "val_loss": 1.0}])
    assert len(panel.lines) == 2
    panel.figure.canvas.draw()


def test_epoch_axis_has_whole_numbers_only() -> None:
    (panel,) = plot_curves([0, 1], [{"loss": 1.0}, {"loss": 2.0}])
    panel.figure.canvas.draw()
    assert all(tick == int(tick) for tick in panel.get_xticks())


def test_all_panels_lie_on_one_new_figure() -> None:
    first = plot_curves([0], [{"loss": 1.0}])
    second = plot_curves([0, 1, 2], ROWS)
    assert second[0].figure is second[1].figure
    assert second[0].figure is not first[0].figure
    assert second[0].figure.axes == second


def test_nothing_to_plot_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to plot: no epoch has ended yet"):
        plot_curves([], [])
    assert pyplot.get_fignums() == []


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "kerastorch\[plot\]"'):
        plot_curves([0], [{"loss": 1.0}])
