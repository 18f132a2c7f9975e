"""The main job: python -m kerastorch."""

import copy
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import kerastorch as kt
from kerastorch.__main__ import main, make_callbacks, make_model, make_net
from kerastorch.data import split_dataset
from kerastorch.loops import LOOPS


def run_main(capsys, *argv):
    status = main(list(argv))
    out = capsys.readouterr().out
    return status, re.sub(r"\d+\.\d+ ?s\b", "_ s", out)


def test_all_loops_print_the_same_numbers(capsys, tmp_path):
    outputs = {}
    for loop in LOOPS:
        status, out = run_main(
            capsys, "--loop", loop, "--epochs", "2", "--device", "cpu", "--out", str(tmp_path / "out")
        )
        assert status == 0
        outputs[loop] = out.replace(f"{loop} loop", "")
    assert "val_accuracy" in outputs["script"]
    assert len(set(outputs.values())) == 1


def test_the_best_checkpoint_opens_with_plain_torch(capsys, tmp_path):
    run_main(capsys, "--epochs", "2", "--device", "cpu", "--out", str(tmp_path))
    checkpoint = torch.load(tmp_path / "best.pt", weights_only=True)
    make_net().load_state_dict(checkpoint["model_state_dict"])
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,accuracy,val_loss,val_accuracy"
    assert [line.partition(",")[0] for line in lines[1:]] == ["0", "1"]


@pytest.mark.slow
def test_the_default_job_is_accurate_and_quick(tmp_path):
    begun = time.monotonic()
    command = [sys.executable, "-m", "kerastorch", "--device", "cpu", "--out", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert time.monotonic() - begun < 60
    (accuracy,) = re.findall(r"test accuracy: ([\d.]+)", out)
    assert float(accuracy) >= 0.98
    assert str(tmp_path / "best.pt") in out


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a child")
def test_ctrl_c_leaves_quietly(tmp_path):
    command = [sys.executable, "-m", "kerastorch", "--epochs", "1000", "--device", "cpu", "--out", str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("Epoch 1/"):
            break
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Stopped." in out
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--loop", "while"], "invalid choice"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(argv, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main([*argv, "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told_before_training(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "file" / "below")])
    captured = capsys.readouterr()
    assert str(tmp_path / "file") in captured.err
    assert "Epoch" not in captured.out


@pytest.mark.parametrize(
    "style", ["script", *(pytest.param(style, marks=pytest.mark.slow) for style in ("function", "class"))]
)
def test_the_ejected_job_trains_as_the_job_does(capsys, tmp_path, monkeypatch, style):
    monkeypatch.chdir(tmp_path)  # the file writes into runs/
    assert main(["eject", "--style", style]) == 0
    source = capsys.readouterr().out
    assert "kerastorch" not in source.partition('"""')[2].partition("import")[2]
    assert "epochs = 30" in source
    module = types.ModuleType("ejected")
    monkeypatch.setitem(sys.modules, "ejected", module)
    exec(compile(source, "ejected.py", "exec"), vars(module))

    (x, y), _ = kt.datasets.digits()
    train, val = split_dataset(TensorDataset(x, y), 0.15)
    model = make_model("cpu", style)
    twin = copy.deepcopy(model.net)
    torch.manual_seed(1)
    history = model.fit(x, y, epochs=2, validation_split=0.15, callbacks=make_callbacks(tmp_path), verbose=0)
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.001, fused=True)
    metrics = {"accuracy": MulticlassAccuracy(num_classes=10, average="micro")}
    loaders = DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=32)
    ejected = module.train(twin, optimizer, torch.nn.CrossEntropyLoss(), metrics, *loaders, 2)
    for name, value in model.net.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name
    assert list(ejected) == list(history.history)
    for name, values in ejected.items():
        assert values == pytest.approx(history.history[name], abs=1e-6), name
    assert (tmp_path / "runs" / "digits" / "best.pt").exists()
