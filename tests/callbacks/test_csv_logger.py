"""CSVLogger: the columns and rows of its file, read back with csv and pandas, and what it refuses."""

import csv
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchmetrics.wrappers import ClasswiseWrapper

import kerastorch as kt
from kerastorch.callbacks import CSVLogger, EarlyStopping, LambdaCallback, LearningRateScheduler, ModelCheckpoint

X, Y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.zeros(4, 1)
CLASSES = torch.tensor([0, 1, 0, 1])
is_root = hasattr(os, "geteuid") and os.geteuid() == 0


def make_model(metrics: Any = None, loop: str = "script") -> kt.Model:
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(0.5)
    model = kt.Model(net, device="cpu")
    model.compile("mse", lambda parameters: torch.optim.SGD(parameters, lr=0.01), metrics, loop=loop)
    return model


def make_classifier(metrics: Any) -> kt.Model:
    model = kt.Model(nn.Linear(1, 2), device="cpu")
    model.compile("cross_entropy", "sgd", metrics)
    return model


def fit(
    model: kt.Model, *callbacks: kt.Callback, epochs: int = 2, validate: bool = True, y: Any = Y, **arguments: Any
) -> kt.History:
    validation_data = (X, y) if validate else None
    return model.fit(
        X, y, epochs=epochs, shuffle=False, validation_data=validation_data, callbacks=callbacks, verbose=0, **arguments
    )


def read(path: Path, separator: str = ",") -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file, delimiter=separator))


# ---- columns and rows ----


@pytest.mark.parametrize("loop", ["script", "function", "class"])
def test_csv_reads_back_what_history_holds(tmp_path: Path, loop: str) -> None:
    history = fit(make_model({"error": "mae"}, loop), CSVLogger(tmp_path / "log.csv"), epochs=3).history
    header, *rows = read(tmp_path / "log.csv")
    assert header == ["epoch", "loss", "error", "val_loss", "val_error"]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    for i, name in enumerate(header[1:], start=1):
        assert [float(row[i]) for row in rows] == history[name]  # to the last bit


def test_pandas_reads_back_what_history_holds(tmp_path: Path) -> None:
    history = fit(make_model({"error": "mae"}), CSVLogger(tmp_path / "log.csv"), epochs=4, validation_freq=2)
    table = pd.read_csv(tmp_path / "log.csv", index_col="epoch")
    pd.testing.assert_frame_equal(table, history.to_pandas()[list(table.columns)], rtol=1e-14)
    assert table["val_loss"].isna().tolist() == [True, False, True, False]


def test_val_columns_are_there_though_the_first_epoch_does_not_validate(tmp_path: Path) -> None:
    fit(make_model(), CSVLogger(tmp_path / "log.csv"), epochs=3, validation_freq=[2])
    header, *rows = read(tmp_path / "log.csv")
    assert header == ["epoch", "loss", "val_loss"]
    assert [row[2] == "NA" for row in rows] == [True, False, True]


def test_val_columns_of_results_that_a_metric_names_are_there_from_the_first_epoch(tmp_path: Path) -> None:
    model = make_classifier({"by_class": ClasswiseWrapper(MulticlassAccuracy(2, average=None))})
    fit(model, CSVLogger(tmp_path / "log.csv"), epochs=2, y=CLASSES, validation_freq=2)
    header, *rows = read(tmp_path / "log.csv")
    names = ["loss", "multiclassaccuracy_0", "multiclassaccuracy_1"]
    assert header == ["epoch", *names, *(f"val_{name}" for name in names)]
    assert [row.count("NA") for row in rows] == [3, 0]


def test_without_validation_there_are_no_val_columns(tmp_path: Path) -> None:
    fit(make_model(), CSVLogger(tmp_path / "log.csv"), validate=False)
    assert read(tmp_path / "log.csv")[0] == ["epoch", "loss"]


def test_epochs_count_from_initial_epoch(tmp_path: Path) -> None:
    fit(make_model(), CSVLogger(tmp_path / "log.csv"), initial_epoch=3, epochs=5)
    assert [row[0] for row in read(tmp_path / "log.csv")] == ["epoch", "3", "4"]


def test_a_list_is_one_field_of_json(tmp_path: Path) -> None:
    model = make_classifier({"confusion": MulticlassConfusionMatrix(2)})
    history = fit(model, CSVLogger(tmp_path / "log.csv"), y=CLASSES).history
    header, *rows = read(tmp_path / "log.csv")
    column = header.index("val_confusion")
    assert [json.loads(row[column]) for row in rows] == history["val_confusion"]
    table = pd.read_csv(tmp_path / "log.csv")
    assert [json.loads(text) for text in table["val_confusion"]] == history["val_confusion"]


def test_tensors_and_arrays_of_other_callbacks_are_written_as_numbers(tmp_path: Path) -> None:
    add = LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(a=torch.tensor(0.5), b=torch.tensor([1.0, math.nan]))
    )
    fit(make_model(), add, CSVLogger(tmp_path / "log.csv"), epochs=1)
    assert read(tmp_path / "log.csv")[1][-2:] == ["0.5", "[1.0, NaN]"]


def test_nan_is_not_the_missing_value(tmp_path: Path) -> None:
    spoil = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(loss=math.nan, val_loss=math.inf))
    fit(make_model(), spoil, CSVLogger(tmp_path / "log.csv"), epochs=1)
    assert read(tmp_path / "log.csv")[1] == ["0", "nan", "inf"]


def test_separator_parts_the_fields(tmp_path: Path) -> None:
    fit(make_model(), CSVLogger(tmp_path / "log.tsv", separator="\t"))
    assert (tmp_path / "log.tsv").read_text().startswith("epoch\tloss\tval_loss\n0\t")
    assert pd.read_csv(tmp_path / "log.tsv", sep="\t").columns.tolist() == ["epoch", "loss", "val_loss"]


def test_a_key_with_the_separator_in_it_is_quoted(tmp_path: Path) -> None:
    add = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update({'a,"b"': 1.0}))
    fit(make_model(), add, CSVLogger(tmp_path / "log.csv"), epochs=1)
    assert read(tmp_path / "log.csv")[0][-1] == 'a,"b"'


def test_a_key_that_an_earlier_callback_added_is_a_column_and_a_later_ones_is_not(tmp_path: Path) -> None:
    schedule = LearningRateScheduler(lambda epoch: 0.5**epoch)
    fit(make_model(), CSVLogger(tmp_path / "a.csv"), schedule, CSVLogger(tmp_path / "b.csv"))
    assert read(tmp_path / "a.csv")[0] == ["epoch", "loss", "val_loss"]
    header, *rows = read(tmp_path / "b.csv")
    assert header == ["epoch", "loss", "val_loss", "learning_rate"]
    assert [row[-1] for row in rows] == ["1.0", "0.5"]


def test_learning_rate_gets_no_val_column(tmp_path: Path) -> None:
    schedule = LearningRateScheduler(lambda epoch: 0.5**epoch)
    fit(make_model(), schedule, CSVLogger(tmp_path / "log.csv"), validation_freq=2)
    assert read(tmp_path / "log.csv")[0] == ["epoch", "loss", "learning_rate", "val_loss"]


def test_a_key_that_comes_later_is_left_out_with_one_warning(tmp_path: Path) -> None:
    late = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=1.0) if epoch else None)
    with pytest.warns(UserWarning, match=r"CSVLogger leaves out 'score': the first epoch's") as caught:
        fit(make_model(), late, CSVLogger(tmp_path / "log.csv"), epochs=4)
    assert len(caught) == 1
    assert [len(row) for row in read(tmp_path / "log.csv")] == [3] * 5


def test_a_key_that_goes_away_is_na(tmp_path: Path) -> None:
    early = LambdaCallback(on_epoch_end=lambda epoch, logs: None if epoch else logs.update(score=1.0))
    fit(make_model(), early, CSVLogger(tmp_path / "log.csv"))
    assert [row[-1] for row in read(tmp_path / "log.csv")] == ["score", "1.0", "NA"]


def test_early_stopping_leaves_a_row_for_each_epoch_that_ended(tmp_path: Path) -> None:
    flat = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(val_loss=1.0))
    history = fit(make_model(), flat, EarlyStopping(patience=2), CSVLogger(tmp_path / "log.csv"), epochs=9)
    assert [row[0] for row in read(tmp_path / "log.csv")[1:]] == [str(epoch) for epoch in history.epoch] == list("012")


# ---- the file ----


def test_each_row_is_on_disk_when_the_epoch_ends(tmp_path: Path) -> None:
    counts: list[int] = []
    look = LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(read(tmp_path / "log.csv"))))
    fit(make_model(), CSVLogger(tmp_path / "log.csv"), look, epochs=3)
    assert counts == [2, 3, 4]


def test_the_file_is_closed_also_after_an_exception(tmp_path: Path) -> None:
    class Trouble(Exception):
        pass

    def fail(epoch: int, logs: Any) -> None:
        raise Trouble

    logger = CSVLogger(tmp_path / "log.csv")
    files: list[Any] = []
    look = LambdaCallback(on_epoch_begin=lambda epoch, logs: files.append(logger._file))
    with pytest.raises(Trouble):
        fit(make_model(), logger, look, LambdaCallback(on_epoch_end=fail))
    assert [file.closed for file in files] == [True]
    assert len(read(tmp_path / "log.csv")) == 2
    fit(make_model(), logger)
    assert len(read(tmp_path / "log.csv")) == 3


def test_a_second_fit_replaces_the_file(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "log.csv")
    fit(make_model(), logger, epochs=5)
    fit(make_model({"error": "mae"}), logger, epochs=1)
    header, *rows = read(tmp_path / "log.csv")
    assert header == ["epoch", "loss", "error", "val_loss", "val_error"]
    assert len(rows) == 1


def test_a_fit_that_is_refused_leaves_an_older_file_as_it_was(tmp_path: Path) -> None:
    fit(make_model(), CSVLogger(tmp_path / "log.csv"))
    before = (tmp_path / "log.csv").read_bytes()
    with pytest.raises(ValueError, match="val_lss"):
        fit(make_model(), CSVLogger(tmp_path / "log.csv"), EarlyStopping("val_lss"))
    assert (tmp_path / "log.csv").read_bytes() == before


def test_missing_folders_are_made(tmp_path: Path) -> None:
    fit(make_model(), CSVLogger(str(tmp_path / "a" / "b" / "log.csv")))
    assert len(read(tmp_path / "a" / "b" / "log.csv")) == 3


# ---- append ----


def test_append_goes_on_in_a_file_of_the_same_columns(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    fit(make_model(), CSVLogger(path))
    before = path.read_text()
    logger = CSVLogger(path, append=True)
    fit(make_model(), logger, initial_epoch=2, epochs=4)
    fit(make_model(), logger, initial_epoch=4, epochs=5)
    assert path.read_text().startswith(before)
    assert [row[0] for row in read(path)] == ["epoch", "0", "1", "2", "3", "4"]
    assert pd.read_csv(path).dtypes.astype(str).tolist() == ["int64", "float64", "float64"]


@pytest.mark.parametrize("is_there", [True, False])
def test_append_to_an_empty_or_missing_file_begins_it(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        (tmp_path / "log.csv").touch()
    fit(make_model(), CSVLogger(tmp_path / "log.csv", append=True))
    assert [row[0] for row in read(tmp_path / "log.csv")] == ["epoch", "0", "1"]


def test_append_keeps_the_order_of_the_files_columns(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("val_loss,loss,epoch\n7.0,8.0,0\n")
    history = fit(make_model(), CSVLogger(path, append=True), epochs=1).history
    assert [float(value) for value in read(path)[2]] == [*history["val_loss"], *history["loss"], 0.0]


def test_append_to_a_file_without_a_last_line_end_begins_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("epoch,loss,val_loss\n0,8.0,7.0")
    fit(make_model(), CSVLogger(path, append=True), initial_epoch=1, epochs=2)
    assert [row[0] for row in read(path)] == ["epoch", "0", "1"]


def test_append_to_a_file_of_other_columns_is_refused_before_the_first_step_naming_both(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    fit(make_model({"error": "mae"}), CSVLogger(path))
    before, model = path.read_bytes(), make_model()
    message = r"log\.csv'.* are epoch, loss, error, val_loss, val_error; this fit's are epoch, loss, val_loss\."
    with pytest.raises(ValueError, match=message):
        fit(model, CSVLogger(path, append=True))
    assert path.read_bytes() == before
    assert model.net.weight.item() == 1.0


def test_append_with_another_separator_is_refused(tmp_path: Path) -> None:
    fit(make_model(), CSVLogger(tmp_path / "log.csv", separator=";"))
    with pytest.raises(ValueError, match=r"its columns are epoch;loss;val_loss; this fit's are epoch, loss, val_loss"):
        fit(make_model(), CSVLogger(tmp_path / "log.csv", append=True))


def test_append_beside_a_callback_that_adds_keys_is_refused_at_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    fit(make_model(), CSVLogger(path))
    before = path.read_bytes()
    add = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=1.0))
    with pytest.raises(ValueError, match=r"are epoch, loss, val_loss; this fit's are epoch, loss, val_loss, score"):
        fit(make_model(), add, CSVLogger(path, append=True))
    assert path.read_bytes() == before


def test_append_goes_on_where_another_callback_adds_the_learning_rate(tmp_path: Path) -> None:
    schedule = LearningRateScheduler(lambda epoch: 0.5**epoch)
    for _ in range(2):
        fit(make_model(), schedule, CSVLogger(tmp_path / "log.csv", append=True), epochs=1)
    assert [row[-1] for row in read(tmp_path / "log.csv")] == ["learning_rate", "1.0", "1.0"]


@pytest.mark.parametrize("first_has_rate", [True, False])
def test_a_learning_rate_column_too_many_or_too_few_is_refused_before_the_first_step(
    tmp_path: Path, first_has_rate: bool
) -> None:
    with_rate: list[kt.Callback] = [LearningRateScheduler(lambda epoch: 0.1)]
    first, second = (with_rate, []) if first_has_rate else ([], with_rate)
    fit(make_model(), *first, CSVLogger(tmp_path / "log.csv"))
    model = make_model()
    with pytest.raises(ValueError, match="its columns are epoch, loss, val_loss"):
        fit(model, *second, CSVLogger(tmp_path / "log.csv", append=True))
    assert model.net.weight.item() == 1.0


# ---- what is refused ----


@pytest.mark.parametrize("separator", ["", ", ", '"', "\n"])
def test_a_separator_that_is_not_one_plain_character_is_refused_when_made(tmp_path: Path, separator: str) -> None:
    with pytest.raises(ValueError, match="separator must be one character"):
        CSVLogger(tmp_path / "log.csv", separator=separator)


def refused(path: Path, error: type[Exception], message: str) -> None:
    model = make_model()
    with pytest.raises(error, match=message):
        fit(model, CSVLogger(path))
    assert model.net.weight.item() == 1.0
    assert model.history.epoch == []


def test_a_folder_is_refused_before_the_first_step(tmp_path: Path) -> None:
    refused(tmp_path, IsADirectoryError, r"is a folder; give a file in it")


def test_a_folder_that_is_a_file_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "log.csv", OSError, "file")


@pytest.mark.skipif(is_root, reason="root writes anywhere")
def test_a_place_without_write_permission_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(tmp_path / "closed" / "log.csv", PermissionError, r"log\.csv")
    (tmp_path / "log.csv").touch(mode=0o400)
    refused(tmp_path / "log.csv", PermissionError, r"log\.csv")


def test_nothing_warns_in_an_ordinary_fit(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(make_model({"error": "mae"}), CSVLogger(tmp_path / "log.csv"), epochs=5, validation_freq=3)


# ---- resumed ----


@pytest.mark.parametrize("half", [0, 5])
@pytest.mark.parametrize("kept", [1, 3])
def test_a_resumed_run_keeps_the_whole_rows_of_a_file_that_lost_its_end(kept: int, half: int, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    callbacks = [CSVLogger(log), ModelCheckpoint(tmp_path / "a.pt")]
    fit(make_model(), *callbacks, epochs=4)
    rows = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(rows[: kept + 1]) + rows[kept + 1][:half])
    with pytest.warns(UserWarning, match="is not as long as it was"):
        fit(make_model(), *callbacks, epochs=6, resume=True)
    left = log.read_bytes().splitlines(keepends=True)
    assert left[: kept + 1] == rows[: kept + 1]
    assert [row.split(b",")[0] for row in left[kept + 1 :]] == [b"4", b"5"]


def test_a_checkpoint_before_the_next_row_of_a_resumed_run_counts_the_rows_that_are_left(tmp_path: Path) -> None:
    """The second life goes on before a row that the first one wrote, and ends after a checkpoint of its own."""

    class Dies(kt.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if (self.run.epoch, batch) in deaths:
                raise RuntimeError("died")

    straight, log = tmp_path / "straight.csv", tmp_path / "log.csv"
    fit(make_model(), CSVLogger(straight), epochs=4, batch_size=1)
    callbacks = [CSVLogger(log), ModelCheckpoint(tmp_path / "{epoch}-{batch}.pt", save_freq=1), Dies()]
    for life, resume in ((2, 0), None), ((1, 3), tmp_path / "2-2.pt"):
        deaths = [life]
        with pytest.raises(RuntimeError, match="died"):
            fit(make_model(), *callbacks, epochs=4, batch_size=1, resume=resume)
    deaths = []
    fit(make_model(), *callbacks, epochs=4, batch_size=1, resume=tmp_path / "2-3.pt")
    assert log.read_text() == straight.read_text()


def test_a_resumed_run_begins_a_file_that_lost_all_with_its_columns(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    callbacks = [CSVLogger(log), ModelCheckpoint(tmp_path / "a.pt")]
    fit(make_model(), *callbacks, epochs=2)
    log.unlink()
    with pytest.warns(UserWarning, match="is not as long as it was"):
        fit(make_model(), *callbacks, epochs=3, resume=True)
    assert [row.split(",")[0] for row in log.read_text().splitlines()] == ["epoch", "2"]


def test_rows_that_a_checkpoint_counts_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), sync(descriptor)))
    fit(make_model(), CSVLogger(tmp_path / "log.csv"), ModelCheckpoint(tmp_path / "a.pt"), epochs=1)
    assert (tmp_path / "log.csv").stat().st_ino in synced
