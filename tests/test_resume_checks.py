"""A checkpoint that does not fit is refused in one error that names every key, and leaves the live model as it was."""

import io
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, StepLR

import kerastorch as kt
from kerastorch.callbacks import BackupAndRestore, ModelCheckpoint
from kerastorch.checkpoint import CheckpointError

X, Y = torch.linspace(-1, 1, 36).reshape(12, 3), torch.arange(12) % 2


class ScaledLoss(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, y) * self.scale.mean()


def make_model(
    hidden: int = 4,
    optimizer: Any = "adam",
    loss: Any = "cross_entropy",
    net: nn.Module | None = None,
    **arguments: Any,
) -> kt.Model:
    torch.manual_seed(1)
    model = kt.Model(net or nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 2)), device="cpu")
    model.compile(loss, optimizer, **arguments)
    return model


def fit(model: kt.Model, **arguments: Any) -> kt.History:
    return model.fit(X, Y, **{"batch_size": 4, "epochs": 3, "verbose": 0, **arguments})


def write(path: Path, **arguments: Any) -> Path:
    fit(make_model(**arguments), epochs=1, callbacks=ModelCheckpoint(path))
    return path


def snapshot(model: kt.Model) -> dict[str, Any]:
    """Return what a refused checkpoint must leave: weights, optimizer, random states, history, loss, training flags."""
    compiled = model._compiled
    assert compiled is not None
    loss = compiled.loss.state_dict() if isinstance(compiled.loss, nn.Module) else {}
    scheduler = compiled.lr_scheduler.state_dict() if hasattr(compiled.lr_scheduler, "state_dict") else {}
    buffer = io.BytesIO()
    torch.save((dict(model.net.state_dict()), compiled.optimizer.state_dict(), dict(loss), dict(scheduler)), buffer)
    with zipfile.ZipFile(buffer) as archive:
        parts = {name: archive.read(name) for name in archive.namelist() if "serialization_id" not in name}
    return {
        "states": parts,
        "random": (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()),
        "history": model.history.state_dict(),
        "training": [module.training for module in model.net.modules()],
    }


def assert_refused(
    model: kt.Model, path: Path, error: type[Exception] = ValueError, *, trains_first: bool = True
) -> str:
    """Return the message of the refusal; nothing of the model nor any file is touched, with every way to resume."""
    if trains_first:
        fit(model, epochs=1)
    before = snapshot(model)
    files = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(error) as raised:
        fit(model, resume=path)
    message = str(raised.value)
    assert repr(str(path)) in message
    after = snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == files
    return message


# ---- another net ----


def test_another_architecture_is_one_error_with_missing_unexpected_and_shapes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", net=nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)))
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 2))
    message = assert_refused(make_model(net=net), path)
    for part in (
        "'3.weight' is missing in the checkpoint",
        "'3.bias' is missing in the checkpoint",
        "'1.running_mean' of the checkpoint is unexpected",
        "'0.weight' has shape (5, 3) in the checkpoint, (4, 3) in this model",
        "'2.weight' has shape (2, 5) in the checkpoint, (2, 4) in this model",
    ):
        assert part in message
    assert "'2.bias'" not in message  # which fits


def test_wider_layer_is_named_with_both_shapes_though_all_keys_fit(tmp_path: Path) -> None:
    message = assert_refused(make_model(hidden=6), write(tmp_path / "a.pt"))
    assert "'0.weight' has shape (4, 3) in the checkpoint, (6, 3) in this model" in message


def test_tensor_of_one_element_does_not_spread_over_a_layer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    content["model_state_dict"]["0.bias"] = torch.ones(1)
    torch.save(content, path)
    assert "'0.bias' has shape (1,) in the checkpoint, (4,) in this model" in assert_refused(make_model(), path)


@pytest.mark.parametrize("resume", [True, None])
def test_callbacks_that_find_a_file_of_another_net_raise_and_delete_nothing(tmp_path: Path, resume: Any) -> None:
    write(tmp_path / "backup.pt")
    model, files = make_model(hidden=6), {file: file.read_bytes() for file in tmp_path.iterdir()}
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)backup\.pt.*'0\.weight' has shape"):
        fit(model, resume=resume, callbacks=BackupAndRestore(tmp_path))
    assert snapshot(model) == before
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_model_can_train_on_after_a_refusal(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt")
    straight, refused = make_model(hidden=6), make_model(hidden=6)
    with pytest.raises(ValueError, match="does not fit"):
        fit(refused, resume=path)
    torch.manual_seed(2)
    expected = fit(straight)
    torch.manual_seed(2)
    assert fit(refused).history == expected.history
    assert refused.history.epoch == [0, 1, 2]


# ---- another optimizer ----


def test_another_kind_of_optimizer_is_named(tmp_path: Path) -> None:
    message = assert_refused(make_model(optimizer="sgd"), write(tmp_path / "a.pt"))
    assert "the checkpoint's optimizer is Adam, this run's SGD" in message


def test_another_kind_of_optimizer_is_told_beside_the_net_s_keys(tmp_path: Path) -> None:
    message = assert_refused(make_model(hidden=6, optimizer="sgd"), write(tmp_path / "a.pt"))
    assert "'0.weight' has shape" in message
    assert "optimizer is Adam, this run's SGD" in message


def test_plain_recipe_of_another_kind_of_optimizer_is_refused(tmp_path: Path) -> None:
    """Whose file does not name the optimizer: its options and states tell."""
    path = write_plain(tmp_path / "a.pt")
    message = assert_refused(make_model(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)), path)
    assert "optimizer" in message


def halves(model: nn.Module) -> list[Any]:
    return [{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()]}]


def test_another_number_of_param_groups_is_told_with_their_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt")
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    message = assert_refused(make_model(net=net, optimizer=torch.optim.Adam(halves(net))), path)
    assert "4 in the checkpoint, 2, 2 in this run" in message


def test_groups_of_other_sizes_are_told(tmp_path: Path) -> None:
    nets = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    path = write(tmp_path / "a.pt", net=nets[0], optimizer=torch.optim.Adam(halves(nets[0])))
    first, *rest = nets[1].parameters()
    optimizer = torch.optim.Adam([{"params": [first]}, {"params": rest}])
    assert "2, 2 in the checkpoint, 1, 3 in this run" in assert_refused(
        make_model(net=nets[1], optimizer=optimizer), path
    )


def test_optimizer_whose_parameters_come_in_another_order_is_named_by_shapes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt")
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(list(net.parameters())[::-1])
    message = assert_refused(make_model(net=net, optimizer=optimizer), path, trains_first=False)
    assert "'exp_avg' has shape (4, 3) in the checkpoint, but parameter 0 is (2,)" in message


# ---- another scheduler or loss ----


def scheduled(kind: Any, **arguments: Any) -> dict[str, Any]:
    return {"lr_scheduler": lambda optimizer: kind(optimizer, **arguments)}


@pytest.mark.parametrize(
    ("saved", "own", "names"),
    [
        (scheduled(StepLR, step_size=1), scheduled(ExponentialLR, gamma=0.5), ("StepLR", "ExponentialLR")),
        (scheduled(StepLR, step_size=1), {}, ("StepLR",)),
        ({}, scheduled(StepLR, step_size=1), ("StepLR",)),
    ],
    ids=["another", "none now", "none then"],
)
def test_another_scheduler_is_named(tmp_path: Path, saved: Any, own: Any, names: Any) -> None:
    message = assert_refused(make_model(**own), write(tmp_path / "a.pt", **saved))
    assert "lr_scheduler" in message
    assert all(name in message for name in names)


def test_scheduler_s_state_that_is_missing_is_told(tmp_path: Path) -> None:
    arguments = scheduled(StepLR, step_size=1)
    path = write(tmp_path / "a.pt", **arguments)
    content = torch.load(path, weights_only=True)
    del content["lr_scheduler_state_dict"]
    torch.save(content, path)
    assert "lr_scheduler" in assert_refused(make_model(**arguments), path)


def test_loss_with_other_parameters_is_named_with_both_shapes(tmp_path: Path) -> None:
    message = assert_refused(make_model(loss=ScaledLoss(2)), write(tmp_path / "a.pt", loss=ScaledLoss(3)))
    assert "loss: 'scale' has shape (3,) in the checkpoint, (2,) in this model" in message


def test_loss_parameters_that_only_one_side_has_are_named(tmp_path: Path) -> None:
    message = assert_refused(make_model(loss=ScaledLoss(2)), write(tmp_path / "a.pt"))
    assert "loss: 'scale' is missing in the checkpoint" in message


def test_loss_parameters_that_this_run_lacks_are_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(net.parameters())  # without the loss's
    path = write(tmp_path / "a.pt", net=net, optimizer=optimizer, loss=ScaledLoss(2))
    assert "'scale'" in assert_refused(make_model(loss=nn.CrossEntropyLoss()), path)


def test_loss_parameters_are_named_where_the_loss_by_name_has_none(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    path = write(tmp_path / "a.pt", net=net, optimizer=torch.optim.Adam(net.parameters()), loss=ScaledLoss(2))
    assert "'scale'" in assert_refused(
        make_model(loss=lambda outputs, y: nn.functional.cross_entropy(outputs, y)), path
    )


def test_number_of_epochs_below_the_checkpoint_s_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    fit(make_model(), epochs=3, callbacks=ModelCheckpoint(path))
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"a\.pt.*epoch 3, beyond epochs=2"):
        fit(model, epochs=2, resume=path)
    assert snapshot(model) == before


# ---- files of other making ----


def write_plain(path: Path, **more: Any) -> Path:
    """Write what the recipe of PyTorch's tutorial writes, after two epochs."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(2):
        loss = nn.functional.cross_entropy(net(X), Y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    states = {"model_state_dict": net.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save({"epoch": 1, **states, "loss": loss.item(), **more}, path)
    return path


@pytest.mark.parametrize("with_tensor", [False, True], ids=["a loss of float", "a loss of tensor"])
def test_plain_recipe_goes_on_after_its_epoch_with_one_warning(tmp_path: Path, with_tensor: bool) -> None:
    path = write_plain(tmp_path / "a.pt", **({"loss": torch.tensor(0.5, requires_grad=True)} if with_tensor else {}))
    model, content = make_model(), torch.load(path, weights_only=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(4)
        history = fit(model, resume=path)
    assert [str(warning.message).split(":")[0] for warning in caught] == [
        "the checkpoint is of the plain recipe, without random states and counters"
    ]
    assert history.epoch == [2]
    assert model.optimizer is not None
    assert model.optimizer.state_dict()["state"][0]["step"] == 2 + 3

    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    by_hand = kt.Model(net, device="cpu")
    by_hand.compile("cross_entropy", "adam")
    assert by_hand.optimizer is not None
    net.load_state_dict(content["model_state_dict"])
    by_hand.optimizer.load_state_dict(content["optimizer_state_dict"])
    torch.manual_seed(4)
    fit(by_hand, epochs=1)
    for name, value in by_hand.net.state_dict().items():
        assert torch.equal(model.net.state_dict()[name], value)


def test_plain_recipe_without_the_scheduler_s_state_says_so(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.pt")
    model = make_model(**scheduled(StepLR, step_size=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(model, resume=path)
        except ValueError as error:
            told = str(error)
        else:
            told = " ".join(str(warning.message) for warning in caught)
    assert "scheduler" in told


def other_kinds() -> dict[str, Any]:
    net = nn.Linear(3, 2)
    weights, optimizer = net.state_dict(), torch.optim.Adam(net.parameters()).state_dict()
    return {
        "a bare state_dict": weights,
        "an optimizer's state_dict": optimizer,
        "a tensor": torch.ones(3),
        "a list": [1, 2],
        "a number": 3,
        "None": None,
        "an empty dict": {},
        "weights in state_dict": {"state_dict": weights, "epoch": 1},
        "Lightning's": {"state_dict": weights, "optimizer_states": [optimizer], "epoch": 1, "global_step": 3},
        "numbers for keys": {0: weights, 1: optimizer},
        "without the optimizer": {"epoch": 1, "model_state_dict": weights, "loss": 0.5},
        "without the epoch": {"model_state_dict": weights, "optimizer_state_dict": optimizer},
        "with a tensor for the epoch": {
            "epoch": torch.tensor(1.5),
            "model_state_dict": weights,
            "optimizer_state_dict": optimizer,
        },
    }


@pytest.mark.parametrize("kind", other_kinds())
def test_file_of_another_kind_is_no_checkpoint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.pt"
    torch.save(other_kinds()[kind], path)
    message = assert_refused(make_model(), path, CheckpointError, trains_first=False)
    assert "checkpoint" in message
    if kind == "without the epoch":
        assert "'epoch'" in message
    if kind in ("without the optimizer", "Lightning's"):
        assert "_state_dict'" in message


def test_weights_only_file_says_that_the_rest_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    fit(make_model(), epochs=1, callbacks=ModelCheckpoint(path, save_weights_only=True))
    assert "no training checkpoint" in assert_refused(make_model(), path, CheckpointError)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "one bit"])
def test_damaged_file_is_refused_untouched(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.pt")
    data = path.read_bytes()
    at = data.index(torch.load(path, weights_only=True)["model_state_dict"]["0.weight"].numpy().tobytes())
    path.write_bytes(
        {
            "empty": b"",
            "half": data[: len(data) // 2],
            "text": b"<html>404 Not Found</html>",
            "one bit": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        }[damage]
    )
    assert "damaged" in assert_refused(make_model(), path, CheckpointError)


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = make_model()
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        fit(model, resume=tmp_path / "missing.pt")
    assert snapshot(model) == before
