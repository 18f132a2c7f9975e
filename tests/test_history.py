"""What fit returns: rows of logs as lists of floats, a table, a picture and a line."""

import math

import pytest
import torch

from kerastorch.history import History


def make_history() -> History:
    history = History(params={"epochs": 3})
    history.append(0, {"loss": 1.0})
    history.append(1, {"loss": 0.5, "val_loss": 0.75})
    history.append(2, {"loss": 0.25, "learning_rate": 0.1})
    return history


def test_new_history_is_empty() -> None:
    history = History()
    assert (history.epoch, history.history, history.params, history.model) == ([], {}, {}, None)
    assert repr(history) == "History(0 epochs)"


def test_history_has_a_list_a_name_in_the_order_they_came() -> None:
    history = make_history()
    assert history.epoch == [0, 1, 2]
    assert history.history == {"loss": [1.0, 0.5, 0.25], "val_loss": [0.75], "learning_rate": [0.1]}
    assert list(history.history) == ["loss", "val_loss", "learning_rate"]


def test_rows_and_params_are_copies_of_what_was_given() -> None:
    params, logs = {"epochs": 1}, {"loss": 1.0}
    history = History(params=params)
    history.append(0, logs)
    logs["loss"], params["epochs"] = 9.0, 9
    assert history.history == {"loss": [1.0]}
    assert history.params == {"epochs": 1}


def test_model_is_kept() -> None:
    model = torch.nn.Linear(1, 1)
    assert History(model).model is model


@pytest.mark.parametrize(
    ("mine", "theirs", "epochs"),
    [
        ([], [0, 1], [0, 1]),
        ([], [4, 5], [0, 1]),
        ([0, 1], [0, 1, 2], [0, 1, 2, 3, 4]),
        ([3, 4], [0], [3, 4, 5]),
        ([0], [], [0]),
    ],
)
def test_extend_counts_on(mine: list[int], theirs: list[int], epochs: list[int]) -> None:
    first, second = History(), History()
    for history, indices in ((first, mine), (second, theirs)):
        for index in indices:
            history.append(index, {"loss": float(index)})
    first.extend(second)
    assert first.epoch == epochs
    assert first.history.get("loss", []) == [float(index) for index in mine + theirs]
    assert second.epoch == theirs


def test_to_pandas_has_nan_where_an_epoch_lacks_a_name() -> None:
    table = make_history().to_pandas()
    assert list(table.columns) == ["loss", "val_loss", "learning_rate"]
    assert (table.index.name, list(table.index)) == ("epoch", [0, 1, 2])
    assert table["loss"].tolist() == [1.0, 0.5, 0.25]
    assert [math.isnan(value) for value in table["val_loss"]] == [True, False, True]
    assert table["learning_rate"][2] == 0.1


def test_to_pandas_keeps_epochs_that_count_from_elsewhere_and_lists() -> None:
    history = History()
    history.append(7, {"loss": 1.0, "confusion": [[1, 0], [0, 1]]})
    table = history.to_pandas()
    assert list(table.index) == [7]
    assert table["confusion"][7] == [[1, 0], [0, 1]]


def test_to_pandas_before_the_first_epoch_is_an_empty_table() -> None:
    table = History().to_pandas()
    assert len(table) == 0
    assert table.index.name == "epoch"


def test_repr_tells_the_last_epoch() -> None:
    history = make_history()
    assert repr(history) == "History(3 epochs; last loss: 0.2500, learning_rate: 0.1000)"
    history.append(3, {"loss": 0.125, "confusion": [1, 2]})
    assert repr(history) == "History(4 epochs; last loss: 0.1250)"


def test_plot_before_the_first_epoch_says_so() -> None:
    with pytest.raises(ValueError, match="nothing to plot: no epoch has ended yet"):
        History().plot()


def test_plot_draws_the_epochs_of_this_history() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    loss, rate = make_history().plot()
    assert (loss.get_title(), rate.get_title()) == ("loss", "learning_rate")
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3]
    pyplot.close("all")
