"""ModelCheckpoint: when it writes, what stands in the file and in its name, and what it refuses."""

import math
import os
import shutil
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
