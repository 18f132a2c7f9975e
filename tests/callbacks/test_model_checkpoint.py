"""ModelCheckpoint: when it writes, what stands in the file and in its name, and what it refuses."""

import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import ClasswiseWrapper

import kerastorch as kt
from kerastorch.callbacks import LambdaCallback, ModelCheckpoint

NAN = math.nan
X, Y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.zeros(4, 1)
is_root = hasattr(os, "geteuid") and os.geteuid() == 0


class Script(kt.Callback):
    """Sets val_loss to the next value of a list, and keeps the weights of each epoch."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["val_loss"] = self.values[epoch]
        self.weights.append({name: value.clone() for name, value in self.model.net.state_dict().items()})


def make_model(metrics: Any = None) -> kt.Model:
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(0.5)
    model = kt.Model(net, device="cpu")
    model.compile("mse", lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9), metrics)
    return model


def fit(
    model: kt.Model, *callbacks: kt.Callback, epochs: int = 1, validate: bool = True, **arguments: Any
) -> kt.History:
    validation_data = (X, Y) if validate else None
    return model.fit(
        X, Y, epochs=epochs, shuffle=False, validation_data=validation_data, callbacks=callbacks, verbose=0, **arguments
    )


def run(values: list[float], checkpoint: ModelCheckpoint) -> Script:
    script = Script(values)
    fit(make_model(), script, checkpoint, epochs=len(values))
    return script


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


# ---- when ----


def test_writes_after_every_epoch(tmp_path: Path) -> None:
    run([1.0, 2.0, 3.0], ModelCheckpoint(tmp_path / "at-{epoch}.pt"))
    assert names(tmp_path) == ["at-1.pt", "at-2.pt", "at-3.pt"]


def test_one_name_is_replaced_by_the_latest_epoch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "latest.pt")
    script = run([1.0, 2.0, 3.0], checkpoint)
    assert names(tmp_path) == ["latest.pt"]
    assert load(tmp_path / "latest.pt")["epoch"] == 2
    assert torch.equal(load(tmp_path / "latest.pt")["model_state_dict"]["weight"], script.weights[2]["weight"])


def test_writes_every_epoch_without_validation_though_monitor_is_val_loss(tmp_path: Path) -> None:
    fit(make_model(), ModelCheckpoint(tmp_path / "{epoch}.pt"), epochs=2, validate=False)
    assert names(tmp_path) == ["1.pt", "2.pt"]


def test_save_best_only_writes_when_the_monitor_got_better(tmp_path: Path) -> None:
    run([3.0, 4.0, 2.0, 2.0, 1.0], ModelCheckpoint(tmp_path / "{epoch}.pt", save_best_only=True))
    assert names(tmp_path) == ["1.pt", "3.pt", "5.pt"]


def test_save_best_only_keeps_the_best_under_one_name(tmp_path: Path) -> None:
    script = run([3.0, 1.0, 2.0], ModelCheckpoint(tmp_path / "best.pt", save_best_only=True))
    content = load(tmp_path / "best.pt")
    assert content["epoch"] == 1
    assert torch.equal(content["model_state_dict"]["weight"], script.weights[1]["weight"])
    assert not torch.equal(content["model_state_dict"]["weight"], script.weights[2]["weight"])


def test_mode_max_takes_higher_for_better(tmp_path: Path) -> None:
    run([3.0, 4.0, 2.0, 5.0], ModelCheckpoint(tmp_path / "{epoch}.pt", save_best_only=True, mode="max"))
    assert names(tmp_path) == ["1.pt", "2.pt", "4.pt"]


def test_nan_is_never_the_best(tmp_path: Path) -> None:
    run([NAN, 3.0, NAN, 2.0, NAN], ModelCheckpoint(tmp_path / "{epoch}.pt", save_best_only=True))
    assert names(tmp_path) == ["2.pt", "4.pt"]


def test_nothing_is_written_where_all_values_are_nan(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.pt", save_best_only=True)
    run([NAN, NAN], checkpoint)
    assert names(tmp_path) == []
    assert checkpoint.last_path is None


def test_nan_does_not_stop_writing_every_epoch(tmp_path: Path) -> None:
    run([NAN, NAN], ModelCheckpoint(tmp_path / "{epoch}.pt"))
    assert names(tmp_path) == ["1.pt", "2.pt"]


def test_the_best_begins_anew_with_each_fit(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "best.pt", save_best_only=True)
    run([1.0, 2.0], checkpoint)
    script = run([5.0, 6.0], checkpoint)
    assert torch.equal(load(tmp_path / "best.pt")["model_state_dict"]["weight"], script.weights[0]["weight"])
    (tmp_path / "best.pt").unlink()
    run([7.0], checkpoint)
    assert names(tmp_path) == ["best.pt"]


def test_save_best_only_passes_over_epochs_without_validation(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}-{val_loss:.1f}.pt", save_best_only=True)
    values = iter([2.0, 1.0])
    script = LambdaCallback(on_test_end=lambda logs: logs.update(loss=next(values)))
    fit(make_model(), script, checkpoint, epochs=5, validation_freq=2)
    assert names(tmp_path) == ["2-2.0.pt", "4-1.0.pt"]


# ---- what stands in the file ----


def test_file_holds_the_four_keys_and_opens_with_weights_only(tmp_path: Path) -> None:
    model, checkpoint = make_model(), ModelCheckpoint(tmp_path / "{epoch}.pt")
    history = fit(model, checkpoint, epochs=2)
    content = load(tmp_path / "2.pt")
    assert list(content)[:4] == ["epoch", "model_state_dict", "optimizer_state_dict", "loss"]
    assert content["epoch"] == 1
    assert content["loss"] == history.history["loss"][1]
    assert torch.equal(content["model_state_dict"]["weight"], model.net.weight)
    assert model.optimizer is not None
    state, now = content["optimizer_state_dict"], model.optimizer.state_dict()
    assert state["param_groups"] == now["param_groups"]
    for i in (0, 1):
        assert torch.equal(state["state"][i]["momentum_buffer"], now["state"][i]["momentum_buffer"])


def test_file_loads_into_a_bare_net_and_optimizer_and_training_goes_on_as_if_never_cut(tmp_path: Path) -> None:
    straight = make_model()
    fit(straight, epochs=4)
    fit(make_model(), ModelCheckpoint(tmp_path / "half.pt"), epochs=2)

    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    content = load(tmp_path / "half.pt")
    net.load_state_dict(content["model_state_dict"])
    optimizer.load_state_dict(content["optimizer_state_dict"])
    for _ in range(content["epoch"] + 1, 4):
        nn.functional.mse_loss(net(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(net.weight, straight.net.weight)
    assert torch.equal(net.bias, straight.net.bias)


def test_save_weights_only_writes_the_bare_state_dict(tmp_path: Path) -> None:
    model = make_model()
    fit(model, ModelCheckpoint(tmp_path / "weights.pt", save_weights_only=True))
    content = load(tmp_path / "weights.pt")
    assert list(content) == ["weight", "bias"]
    net = nn.Linear(1, 1)
    net.load_state_dict(content)
    assert torch.equal(net.weight, model.net.weight)


def test_adam_and_batch_norm_open_with_weights_only(tmp_path: Path) -> None:
    model = kt.Model(nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)), device="cpu")
    model.compile("mse", "adam")
    fit(model, ModelCheckpoint(tmp_path / "file.pt"))
    content = load(tmp_path / "file.pt")
    assert content["model_state_dict"]["0.num_batches_tracked"] == 1
    assert content["optimizer_state_dict"]["state"][0]["step"] == 1


def test_any_file_name_will_do(tmp_path: Path) -> None:
    fit(make_model(), ModelCheckpoint(str(tmp_path / "no extension")))
    assert set(load(tmp_path / "no extension")) >= {"epoch", "model_state_dict", "optimizer_state_dict", "loss"}


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    fit(make_model(), ModelCheckpoint(tmp_path / "a.pt"), epochs=2)
    assert [path.name for path in tmp_path.rglob("*")] == ["a.pt"]


# ---- the name ----


def test_template_takes_the_epoch_from_1_and_any_log(tmp_path: Path) -> None:
    model = make_model({"error": "mae"})
    checkpoint = ModelCheckpoint(tmp_path / "{epoch:03d}-{loss:.3f}-{val_error:.2f}-{val_loss:.1f}.pt")
    history = fit(model, checkpoint, epochs=2).history
    expected = [
        f"{i + 1:03d}-{history['loss'][i]:.3f}-{history['val_error'][i]:.2f}-{history['val_loss'][i]:.1f}.pt"
        for i in (0, 1)
    ]
    assert names(tmp_path) == expected


def test_template_takes_the_final_index_with_initial_epoch(tmp_path: Path) -> None:
    fit(make_model(), ModelCheckpoint(tmp_path / "{epoch:02d}.pt"), initial_epoch=4, epochs=6)
    assert names(tmp_path) == ["05.pt", "06.pt"]


def test_template_takes_a_key_that_a_callback_added(tmp_path: Path) -> None:
    add = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(rate=0.25))
    fit(make_model(), add, ModelCheckpoint(tmp_path / "{rate}.pt"))
    assert names(tmp_path) == ["0.25.pt"]


def test_template_may_name_folders(tmp_path: Path) -> None:
    fit(make_model(), ModelCheckpoint(tmp_path / "run" / "{epoch}" / "net.pt"), epochs=2)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt")) == [
        os.path.join("run", "1", "net.pt"),
        os.path.join("run", "2", "net.pt"),
    ]


def test_last_path_is_the_file_written_last(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.pt", save_best_only=True)
    assert checkpoint.last_path is None
    run([2.0, 1.0, 3.0], checkpoint)
    assert checkpoint.last_path == tmp_path / "2.pt"


def test_a_relative_path_is_taken_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(make_model(), ModelCheckpoint("net.pt"))
    assert names(tmp_path) == ["net.pt"]


# ---- what is refused, before the first step ----


def refused(
    model: kt.Model, checkpoint: ModelCheckpoint, error: type[Exception], message: str, **arguments: Any
) -> None:
    with pytest.raises(error, match=message):
        fit(model, checkpoint, epochs=2, **arguments)
    assert model.net.weight.item() == 1.0
    assert model.history.epoch == []


def test_unknown_name_in_the_template_is_a_key_error_before_the_first_step(tmp_path: Path) -> None:
    message = r"names 'val_los', which is not in the logs; did you mean 'val_loss'.* Known: epoch, loss, val_loss"
    refused(make_model(), ModelCheckpoint(tmp_path / "{val_los}.pt"), KeyError, message)
    assert names(tmp_path) == []


def test_a_name_without_a_key_in_the_template_is_a_key_error_before_the_first_step(tmp_path: Path) -> None:
    refused(make_model(), ModelCheckpoint(tmp_path / "{}.pt"), KeyError, r"which is not in the logs")


def test_val_loss_in_the_template_without_validation_is_refused_before_the_first_step(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{val_loss:.2f}.pt")
    refused(make_model(), checkpoint, KeyError, r"names 'val_loss', .* Known: epoch, loss", validate=False)


def test_val_loss_in_the_template_is_refused_before_the_first_step_where_an_epoch_lacks_it(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{val_loss:.2f}.pt")
    refused(make_model(), checkpoint, KeyError, r"val_loss", validation_freq=2)


def test_unknown_name_is_a_key_error_at_the_first_save_beside_a_callback_of_the_users_own(tmp_path: Path) -> None:
    model, epochs = make_model(), []
    mine = LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    with pytest.raises(KeyError, match=r"names 'score'"):
        fit(model, mine, ModelCheckpoint(tmp_path / "{score}.pt"), epochs=3)
    assert epochs == [0]


def test_a_metric_that_names_its_own_results_may_stand_in_the_template(tmp_path: Path) -> None:
    model = kt.Model(nn.Linear(1, 2), device="cpu")
    model.compile("cross_entropy", "sgd", {"by_class": ClasswiseWrapper(MulticlassAccuracy(2, average=None))})
    y = torch.tensor([0, 1, 0, 1])
    assert "multiclassaccuracy_1" in model.fit(X, y, verbose=0).history
    model.fit(X, y, callbacks=[ModelCheckpoint(tmp_path / "{multiclassaccuracy_1:.0f}.pt")], verbose=0)
    assert len(names(tmp_path)) == 1


def test_monitor_that_cannot_exist_is_refused_before_the_first_step(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "a.pt", save_best_only=True)
    refused(make_model(), checkpoint, ValueError, r"monitor='val_loss' .* no validation data", validate=False)
    misspelt = ModelCheckpoint(tmp_path / "a.pt", monitor="val_lss", save_best_only=True)
    refused(make_model(), misspelt, ValueError, r"monitor='val_lss' .* did you mean 'val_loss'")


def test_unknown_direction_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def gap(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (outputs - y).abs().mean()

    checkpoint = ModelCheckpoint(tmp_path / "a.pt", monitor="val_gap", save_best_only=True)
    refused(make_model([gap]), checkpoint, ValueError, r"monitor='val_gap'.* pass mode='min' or 'max'")


def test_missing_folders_are_made_when_fit_begins(tmp_path: Path) -> None:
    there: list[bool] = []
    look = LambdaCallback(on_epoch_begin=lambda epoch, logs: there.append((tmp_path / "a" / "b").is_dir()))
    fit(make_model(), ModelCheckpoint(tmp_path / "a" / "b" / "net.pt"), look)
    assert there == [True]
    assert names(tmp_path / "a" / "b") == ["net.pt"]


def test_a_folder_that_is_a_file_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(make_model(), ModelCheckpoint(tmp_path / "file" / "net.pt"), OSError, "file")
    refused(make_model(), ModelCheckpoint(tmp_path / "file" / "deeper" / "net.pt"), OSError, "file")


@pytest.mark.skipif(is_root, reason="root writes anywhere")
def test_a_folder_without_write_permission_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(make_model(), ModelCheckpoint(tmp_path / "closed" / "net.pt"), PermissionError, "closed")


def test_a_folder_said_to_be_unwritable_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(make_model(), ModelCheckpoint(tmp_path / "net.pt"), PermissionError, r"can't write into")


def test_a_filepath_that_is_a_folder_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    refused(make_model(), ModelCheckpoint(tmp_path / "runs"), OSError, "runs")


def test_bad_mode_is_refused_when_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mode='mim' is not known; did you mean 'min'"):
        ModelCheckpoint(tmp_path / "a.pt", mode="mim")


# ---- failures while it writes ----


def test_a_failing_write_leaves_the_older_file_whole_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pt"
    fit(make_model(), ModelCheckpoint(path))
    before = path.read_bytes()

    def full_disk(content: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"net\.pt.* could not be written: .*No space left"):
        fit(make_model(), ModelCheckpoint(path))
    assert path.read_bytes() == before
    assert names(tmp_path) == ["net.pt"]


def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    vanish = LambdaCallback(on_epoch_begin=lambda epoch, logs: shutil.rmtree(folder))
    fit(make_model(), ModelCheckpoint(folder / "net.pt"), vanish)
    assert names(folder) == ["net.pt"]


# ---- words ----


def test_verbose_prints_each_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([1.0, 2.0, 0.5], ModelCheckpoint(tmp_path / "{epoch}.pt", verbose=1, save_best_only=True))
    assert capsys.readouterr().out.splitlines() == [
        f"Epoch 1: saved {tmp_path / '1.pt'}",
        f"Epoch 3: saved {tmp_path / '3.pt'}",
    ]


def test_it_is_silent_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([1.0, 2.0], ModelCheckpoint(tmp_path / "{epoch}.pt"))
    assert capsys.readouterr().out == ""


# ---- inside an epoch ----


def fit_batches(*callbacks: kt.Callback, rows: int = 5, epochs: int = 2, model: Any = None, **arguments: Any) -> Any:
    """Fit batches of one row."""
    x = torch.arange(float(rows)).reshape(rows, 1)
    model = model or make_model()
    return model.fit(x, x * 0, batch_size=1, epochs=epochs, shuffle=False, callbacks=callbacks, verbose=0, **arguments)


def test_int_save_freq_counts_batches_across_epochs_as_keras_does(tmp_path: Path) -> None:
    fit_batches(ModelCheckpoint(tmp_path / "{epoch}-{batch}.pt", save_freq=3), epochs=3)
    assert names(tmp_path) == ["1-3.pt", "2-1.pt", "2-4.pt", "3-2.pt", "3-5.pt"]
    assert [load(tmp_path / name)["epoch"] for name in names(tmp_path)] == [-1, 0, 0, 1, 1]


def test_int_save_freq_beyond_an_epoch_writes_only_every_so_many_batches(tmp_path: Path) -> None:
    fit_batches(ModelCheckpoint(tmp_path / "{epoch}-{batch}.pt", save_freq=7), epochs=3)
    assert names(tmp_path) == ["2-2.pt", "3-4.pt"]


def test_int_save_freq_counts_anew_with_each_fit(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}-{batch}.pt", save_freq=4)
    fit_batches(checkpoint, epochs=1)
    (tmp_path / "1-4.pt").unlink()
    fit_batches(checkpoint, epochs=1)
    assert names(tmp_path) == ["1-4.pt"]


def test_int_save_freq_waits_for_the_optimizer_step_under_accumulation(tmp_path: Path) -> None:
    model = make_model()
    model.compile("mse", "sgd", gradient_accumulation_steps=2)  # steps after batches 2, 4 and 5
    fit_batches(ModelCheckpoint(tmp_path / "{epoch}-{batch}.pt", save_freq=3), model=model)
    assert names(tmp_path) == ["1-4.pt", "2-2.pt", "2-5.pt"]


def test_int_save_freq_has_the_running_average_in_file_and_name(tmp_path: Path) -> None:
    fit_batches(ModelCheckpoint(tmp_path / "{batch}-{loss:.6f}.pt", save_freq=2), epochs=1)
    net, losses = nn.Linear(1, 1), []
    net.load_state_dict(make_model().net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for i in range(2):
        loss = nn.functional.mse_loss(net(torch.tensor([[float(i)]])), torch.zeros(1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    mean = sum(losses) / 2
    assert names(tmp_path)[0] == f"2-{mean:.6f}.pt"
    content = load(tmp_path / names(tmp_path)[0])
    assert content["loss"] == pytest.approx(mean)
    assert torch.equal(content["model_state_dict"]["weight"], net.weight)


def test_int_save_freq_with_save_best_only_goes_by_the_running_loss(tmp_path: Path) -> None:
    seen: list[float] = []
    note = LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(float(logs["loss"])))
    checkpoint = ModelCheckpoint(
        tmp_path / "{epoch}-{batch}.pt", monitor="loss", mode="max", save_best_only=True, save_freq=2
    )
    fit_batches(note, checkpoint)
    expected, best = [], -math.inf
    for i in range(1, 10, 2):  # after batches 2, 4, ... 10
        if seen[i] > best:
            best = seen[i]
            expected.append(f"{i // 5 + 1}-{i % 5 + 1}.pt")
    assert names(tmp_path) == sorted(expected)
    assert checkpoint.best == best
    assert 1 < len(expected) < 5


def test_int_save_freq_with_a_val_monitor_is_refused_when_made(tmp_path: Path) -> None:
    for choice in ({"save_best_only": True}, {"keep_best": 1}):
        with pytest.raises(ValueError, match=r"save_freq=2 writes inside an epoch, where monitor='val_loss'"):
            ModelCheckpoint(tmp_path / "a.pt", save_freq=2, **choice)
    ModelCheckpoint(tmp_path / "a.pt", save_freq=2)  # which chooses nothing


def test_val_loss_or_batch_in_the_template_is_refused_where_the_save_does_not_know_it(tmp_path: Path) -> None:
    refused(make_model(), ModelCheckpoint(tmp_path / "{val_loss}.pt", save_freq=2), KeyError, "names 'val_loss'")
    refused(make_model(), ModelCheckpoint(tmp_path / "{batch}.pt"), KeyError, "names 'batch'")


def test_keep_last_counts_files_inside_epochs_too(tmp_path: Path) -> None:
    fit_batches(ModelCheckpoint(tmp_path / "{epoch}-{batch}.pt", save_freq=2, keep_last=2))
    assert names(tmp_path) == ["2-3.pt", "2-5.pt"]


# ---- which files stay ----


class Watch(kt.Callback):
    """Notes the folder's files at each epoch's begin, when those of the epoch before are written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, list[list[str]]()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.pt")))

    def on_train_end(self, logs: Any = None) -> None:
        self.on_epoch_begin(0)


def test_keep_last_keeps_the_newest(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    fit(make_model(), watch, ModelCheckpoint(tmp_path / "{epoch}.pt", keep_last=2), epochs=4)
    assert watch.seen == [[], ["1.pt"], ["1.pt", "2.pt"], ["2.pt", "3.pt"], ["3.pt", "4.pt"]]


def test_keep_last_of_the_best_keeps_the_newest_of_them(tmp_path: Path) -> None:
    run([5.0, 4.0, 9.0, 3.0, 9.0], ModelCheckpoint(tmp_path / "{epoch}.pt", save_best_only=True, keep_last=2))
    assert names(tmp_path) == ["2.pt", "4.pt"]


def test_keep_last_1_takes_one_name_as_well(tmp_path: Path) -> None:
    run([1.0, 2.0], ModelCheckpoint(tmp_path / "a.pt", keep_last=1))
    assert names(tmp_path) == ["a.pt"]


def test_keep_last_with_folders_per_epoch_keeps_the_newest(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    fit(make_model(), watch, ModelCheckpoint(tmp_path / "run" / "{epoch}" / "net.pt", keep_last=1), epochs=3)
    assert watch.seen[-1] == [os.path.join("run", "3", "net.pt")]


def test_keep_best_keeps_the_best_k(tmp_path: Path) -> None:
    run([3.0, 1.0, 2.0, 5.0, 0.0], ModelCheckpoint(tmp_path / "{epoch}.pt", keep_best=2))
    assert names(tmp_path) == ["2.pt", "5.pt"]


SCRIPT = [3.0, NAN, 3.0, 1.0, 2.0, 2.0, NAN, 9.0, 1.0, 0.5, math.inf, 0.5, 7.0, 9.0, -math.inf, NAN, 0.25, 0.25]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_keep_best_has_after_every_epoch_the_best_k_values_with_nan_ties_and_infinities(
    tmp_path: Path, mode: Any
) -> None:
    watch = Watch(tmp_path)
    checkpoints = [
        ModelCheckpoint(tmp_path / str(k) / "{epoch}.pt", keep_best=k, mode=mode, save_weights_only=True)
        for k in (1, 2, 3, 50)
    ]
    fit(make_model(), Script(SCRIPT), watch, *checkpoints, epochs=len(SCRIPT))
    for epochs, seen in enumerate(watch.seen):
        values = [value for value in SCRIPT[:epochs] if not math.isnan(value)]
        for k in (1, 2, 3, 50):
            files = [Path(name).stem for name in seen if Path(name).parent.name == str(k)]
            kept = [SCRIPT[int(number) - 1] for number in files]
            assert sorted(kept) == sorted(sorted(values, reverse=mode == "max")[:k]), (epochs, k)


def test_keep_best_writes_nothing_for_a_tie_with_the_worst_that_is_kept(tmp_path: Path) -> None:
    run([1.0, 1.0, 1.0], ModelCheckpoint(tmp_path / "{epoch}.pt", keep_best=2))
    assert names(tmp_path) == ["1.pt", "2.pt"]


def test_keep_best_keeps_fewer_where_fewer_were_good(tmp_path: Path) -> None:
    run([NAN, 2.0, NAN], ModelCheckpoint(tmp_path / "{epoch}.pt", keep_best=3))
    assert names(tmp_path) == ["2.pt"]


def test_keep_best_never_replaces_a_better_file_by_a_worse_of_the_same_name(tmp_path: Path) -> None:
    run([1.2, 1.4], ModelCheckpoint(tmp_path / "{val_loss:.0f}.pt", keep_best=2))
    assert load(tmp_path / "1.pt")["epoch"] == 0


def test_initial_value_threshold_must_be_beaten(tmp_path: Path) -> None:
    values = [3.0, 2.0, 1.5, 1.0]
    for i, choice in enumerate(({"save_best_only": True}, {"keep_best": 3})):
        checkpoint = ModelCheckpoint(tmp_path / str(i) / "{epoch}.pt", initial_value_threshold=2.0, **choice)
        run(values, checkpoint)
        assert names(tmp_path / str(i)) == ["3.pt", "4.pt"]
        assert checkpoint.best == 1.0
        run([3.0], checkpoint)
        assert checkpoint.best == 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_freq": "batch"}, r"save_freq must be 'epoch' or a number of batches, got 'batch'"),
        ({"save_freq": 0}, r"save_freq"),
        ({"save_freq": -1}, r"save_freq"),
        ({"save_freq": 2.5}, r"save_freq"),
        ({"save_freq": True}, r"save_freq"),
        ({"save_freq": None}, r"save_freq"),
        ({"keep_last": 0}, r"keep_last"),
        ({"keep_last": 1.5}, r"keep_last"),
        ({"keep_best": 0}, r"keep_best"),
        ({"keep_best": True}, r"keep_best"),
        ({"keep_best": 2, "keep_last": 2}, r"keep_best and keep_last choose differently"),
        ({"keep_best": 2, "save_best_only": True}, r"keep_best and save_best_only choose differently"),
        ({"initial_value_threshold": NAN, "save_best_only": True}, r"initial_value_threshold"),
        ({"initial_value_threshold": "1", "save_best_only": True}, r"initial_value_threshold"),
    ],
)
def test_wrong_arguments_are_refused_when_made(tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ModelCheckpoint(tmp_path / "{epoch}.pt", **arguments)


def test_several_files_need_names_that_differ(tmp_path: Path) -> None:
    for arguments in ({"keep_last": 2}, {"keep_best": 2}):
        with pytest.raises(ValueError, match=r"=2 needs names that differ: put \{epoch\} into filepath"):
            ModelCheckpoint(tmp_path / "a.pt", **arguments)


def test_rotation_deletes_only_files_of_this_fit(tmp_path: Path) -> None:
    fit(make_model(), ModelCheckpoint(tmp_path / "{epoch}.pt"), epochs=5)
    for name in ("0.pt", "best.pt", "1.pt.bak", "notes.txt"):
        (tmp_path / name).write_text("mine")
    fit(make_model(), ModelCheckpoint(tmp_path / "{epoch}.pt", keep_last=1), epochs=3)
    assert names(tmp_path) == ["0.pt", "1.pt.bak", "3.pt", "4.pt", "5.pt", "best.pt", "notes.txt"]


def test_rotation_deletes_only_files_of_this_fit_with_one_callback_in_two_fits(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.pt", keep_last=1)
    fit(make_model(), checkpoint, epochs=2)
    fit(make_model(), checkpoint, initial_epoch=2, epochs=4)
    assert names(tmp_path) == ["2.pt", "4.pt"]


class Crash(Exception):
    pass


def crash_at(epoch: int) -> LambdaCallback:
    def crash(now: int, logs: Any) -> None:
        if now == epoch:
            raise Crash

    return LambdaCallback(on_epoch_begin=crash)


@pytest.mark.parametrize(
    "spelling", ["{folder}/{{epoch}}.pt", "./{{epoch}}.pt", "{{epoch}}.pt", "{folder}//{{epoch}}.pt"]
)
@pytest.mark.parametrize("choice", ["keep_last", "keep_best"])
def test_rotation_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str, choice: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.pt").write_bytes(b"not of this fit")
    filepath = spelling.format(folder=tmp_path)
    values = [3.0, 1.0, 2.0, 2.5, 0.5]
    with pytest.raises(Crash):
        fit(make_model(), Script(values), crash_at(3), ModelCheckpoint(filepath, **{choice: 2}), epochs=5)
    assert names(tmp_path) == ["0.pt", "2.pt", "3.pt"]
    os.utime(tmp_path / "0.pt", (0, 0))
    history = fit(make_model(), Script(values), ModelCheckpoint(filepath, **{choice: 2}), epochs=5, resume=True)
    assert history.epoch == [0, 1, 2, 3, 4]
    assert names(tmp_path) == (["0.pt", "4.pt", "5.pt"] if choice == "keep_last" else ["0.pt", "2.pt", "5.pt"])


def test_best_goes_on_after_a_resume(tmp_path: Path) -> None:
    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "best-{epoch}.pt", save_best_only=True)

    values = [1.0, 2.0, 1.5, 0.5]
    last = ModelCheckpoint(tmp_path / "last.pt")
    with pytest.raises(Crash):
        fit(make_model(), Script(values), crash_at(2), checkpoint(), last, epochs=4)
    fit(make_model(), Script(values), checkpoint(), last, epochs=4, resume=tmp_path / "last.pt")
    assert names(tmp_path) == ["best-1.pt", "best-4.pt", "last.pt"]


def test_names_with_braces_and_brackets_are_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "[a]*"
    for name, expected in (("{{x}}-{epoch}.pt", "{x}-2.pt"), ("{{x}}.pt", "{x}.pt")):
        checkpoint = ModelCheckpoint(folder / name)
        fit(make_model(), checkpoint, epochs=2)
        assert (folder / expected).is_file()
        assert checkpoint.files()[0] == folder / expected
        shutil.rmtree(folder)


@pytest.mark.parametrize("template", ["{epoch}.pt", "{loss:.2f}/net.pt", "net.pt"])
def test_paths_that_a_forged_file_lists_as_written_are_never_deleted(tmp_path: Path, template: str) -> None:
    runs = tmp_path / "runs"
    outside = [tmp_path / "net.pt", tmp_path / "other" / "1.pt", runs / "notes.txt", runs / "1.pt.txt"]
    forged = [*map(str, outside), str(runs / ".." / "net.pt"), str(runs / ".." / "other" / "1.pt"), "../other/1.pt"]
    for epochs in (1, 2):
        checkpoint = ModelCheckpoint(runs / template, keep_last=1)
        fit(make_model(), checkpoint, epochs=epochs, resume=tmp_path / "forged.pt" if epochs == 2 else None)
        if epochs == 1:
            assert checkpoint.last_path is not None
            content = load(checkpoint.last_path)
            content["checkpointers"]["ModelCheckpoint"]["written"] = [[name, NAN] for name in forged]
            content["checkpointers"]["ModelCheckpoint"]["last_path"] = forged[0]
            torch.save(content, tmp_path / "forged.pt")
            for path in outside:
                path.parent.mkdir(exist_ok=True)
                path.write_text("precious")
    assert [path.read_text() for path in outside] == ["precious"] * len(outside)


# ---- in a thread ----


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one)


def make_larger_model() -> kt.Model:
    torch.manual_seed(0)
    tied = nn.Linear(4, 4)
    model = kt.Model(
        nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), tied, nn.Dropout(0.5), tied, nn.Linear(4, 1)), device="cpu"
    )
    model.compile("mse", "adam", ["mae"], lr_scheduler="cosine")
    return model


class Gate(kt.Callback):
    """Holds each write in a thread until a batch later, when weights and moments have moved on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.held = threading.Event(), 0
        save = torch.save

        def save_later(content: Any, file: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.held += 1
                assert self.open.wait(10)
                self.open.clear()
            save(content, file)

        monkeypatch.setattr(torch, "save", save_later)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch % 2 == 0:
            self.open.set()

    def on_train_end(self, logs: Any = None) -> None:
        self.open.set()


@pytest.mark.parametrize("save_freq", ["epoch", 2])
def test_async_save_writes_the_moment_of_the_save_though_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_freq: Any
) -> None:
    name = "{epoch}.pt" if save_freq == "epoch" else "{epoch}-{batch}.pt"
    x = torch.arange(8.0).reshape(8, 1)
    for kind in ("sync", "async"):
        is_async = kind == "async"
        checkpoint = ModelCheckpoint(tmp_path / kind / name, save_freq=save_freq, async_save=is_async)
        callbacks: list[kt.Callback] = [checkpoint]
        if is_async:
            gate = Gate(monkeypatch)
            callbacks.insert(0, gate)
        make_larger_model().fit(x, x, batch_size=2, epochs=3, callbacks=callbacks, verbose=0)
    files = names(tmp_path / "sync")
    assert names(tmp_path / "async") == files
    assert len(files) == (3 if save_freq == "epoch" else 6) == gate.held
    for file in files:
        one, other = load(tmp_path / "sync" / file), load(tmp_path / "async" / file)
        for content in (one, other):
            for state in content["checkpointers"].values():
                state["written"] = state["last_path"] = None  # other folders
            assert content["run"].pop("history") is not None  # with times
        assert same(one, other), file


def test_async_save_keeps_the_versions_of_modules_in_the_state_dict(tmp_path: Path) -> None:
    found = []
    for is_async in (False, True):
        fit(make_larger_model(), ModelCheckpoint(tmp_path / "a.pt", async_save=is_async))
        found.append(getattr(load(tmp_path / "a.pt")["model_state_dict"], "_metadata", None))
    assert found[0]["1"] == {"version": 2}
    assert found[1] == found[0]


def test_async_save_keeps_tied_weights_tied(tmp_path: Path) -> None:
    fit(make_larger_model(), ModelCheckpoint(tmp_path / "a.pt", async_save=True))
    weights = load(tmp_path / "a.pt")["model_state_dict"]
    assert weights["2.weight"].data_ptr() == weights["4.weight"].data_ptr()


def test_async_save_rotates_and_leaves_no_temporary(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.pt", keep_last=2, async_save=True)
    fit(make_model(), checkpoint, epochs=5)
    assert names(tmp_path) == ["4.pt", "5.pt"]
    assert checkpoint.last_path == tmp_path / "5.pt"


class FailingSave:
    """torch.save that fails at the given calls, half way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
        self.calls, self.at, self.save = 0, at, torch.save
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, content: Any, file: Any) -> None:
        self.calls += 1
        if self.calls in self.at:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        self.save(content, file)


def test_a_failing_async_write_comes_out_at_the_next_save_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FailingSave(monkeypatch, 2)
    watch = Watch(tmp_path)
    with pytest.raises(OSError, match=r"2\.pt' could not be written: No space left.*1\.pt' of before is still whole"):
        fit(make_model(), watch, ModelCheckpoint(tmp_path / "{epoch}.pt", keep_last=1, async_save=True), epochs=9)
    assert names(tmp_path) == ["1.pt"]
    assert len(watch.seen) == 3


def test_a_failing_last_async_write_comes_out_of_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FailingSave(monkeypatch, 2)
    with pytest.raises(OSError, match=r"2\.pt' could not be written: No space left"):
        fit(make_model(), ModelCheckpoint(tmp_path / "{epoch}.pt", async_save=True), epochs=2)
    assert names(tmp_path) == ["1.pt"]


def test_a_file_being_written_is_whole_when_fit_ends_with_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def save_slowly(content: Any, file: Any) -> None:
        time.sleep(0.3)
        save(content, file)

    monkeypatch.setattr(torch, "save", save_slowly)
    with pytest.raises(Crash):
        fit(make_model(), ModelCheckpoint(tmp_path / "a.pt", async_save=True), crash_at(1), epochs=2)
    assert names(tmp_path) == ["a.pt"]
    assert load(tmp_path / "a.pt")["epoch"] == 0
    assert threading.active_count() == 1


def test_an_exception_of_fit_comes_out_before_that_of_a_write_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FailingSave(monkeypatch, 1)
    with pytest.raises(Crash):
        fit(make_model(), ModelCheckpoint(tmp_path / "a.pt", async_save=True), crash_at(1), epochs=2)
    assert names(tmp_path) == []


@pytest.mark.parametrize("async_save", [False, True])
def test_last_path_is_not_a_file_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    FailingSave(monkeypatch, 2)
    checkpoint = ModelCheckpoint(tmp_path / "{epoch}.pt", async_save=async_save)
    with pytest.raises(OSError, match="could not be written"):
        fit(make_model(), checkpoint, epochs=2)
    assert checkpoint.last_path == tmp_path / "1.pt"


@pytest.mark.parametrize("filepath", ["newdir/", "newdir/{epoch}/"])
def test_a_path_that_ends_as_a_folder_does_is_refused_when_made(filepath: str) -> None:
    with pytest.raises(ValueError, match=r"filepath 'newdir/.*' is a folder: give a file in it"):
        ModelCheckpoint(filepath)


def test_a_template_that_does_not_end_is_refused_when_made() -> None:
    with pytest.raises(ValueError, match=r"filepath 'a\{epoch' is no template: expected '\}'"):
        ModelCheckpoint("a{epoch")


@pytest.mark.parametrize("filepath", ["{loss:d}.pt", "{loss[0]}.pt", "{epoch.x}.pt", "{loss!s:d}.pt"])
def test_a_template_that_can_not_be_filled_in_is_refused_before_the_first_step(filepath: str, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"ModelCheckpoint's filepath .* can't be filled in: "):
        fit(model, ModelCheckpoint(tmp_path / filepath))
    assert model.net.weight.item() == 1.0


def test_saved_is_printed_after_the_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = []
    monkeypatch.setattr("builtins.print", lambda *text, **how: there.append((tmp_path / "a.pt").exists()))
    fit(make_model(), ModelCheckpoint(tmp_path / "a.pt", verbose=1, async_save=True))
    assert there == [True]
