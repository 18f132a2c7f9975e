"""The main job: python -m kerastorch."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

import kerastorch as kt
from kerastorch.__main__ import main, make_net
from kerastorch.eject import STYLES
from kerastorch.loops import LOOPS


def run_main(capsys, *argv):
    status = main(list(argv))
    out = capsys.readouterr().out
    return status, re.sub(r"\d+\.\d+ ?s\b", "_ s", out)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two epochs of the job: its status, what it printed, and its folder."""
    out, folder = io.StringIO(), tmp_path_factory.mktemp("job") / "out"
    with contextlib.redirect_stdout(out):
        status = main(["--epochs", "2", "--device", "cpu", "--out", str(folder)])
    return status, out.getvalue(), folder


def test_all_loops_print_the_same_numbers(capsys, job):
    outputs = {"script": re.sub(r"\d+\.\d+ ?s\b", "_ s", job[1]).replace("script loop", "")}
    assert job[0] == 0
    for loop in LOOPS:
        if loop != "script":
            status, out = run_main(capsys, "--loop", loop, "--epochs", "2", "--device", "cpu", "--out", str(job[2]))
            assert status == 0
            outputs[loop] = out.replace(f"{loop} loop", "")
    assert "val_accuracy" in outputs["script"]
    assert len(set(outputs.values())) == 1


def test_the_best_checkpoint_opens_with_plain_torch(job):
    checkpoint = torch.load(job[2] / "best.pt", weights_only=True)
    make_net().load_state_dict(checkpoint["model_state_dict"])
    lines = (job[2] / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,accuracy,val_loss,val_accuracy"
    assert [line.partition(",")[0] for line in lines[1:]] == ["0", "1"]


@pytest.mark.slow
def test_the_default_job_is_accurate_and_quick(tmp_path):
    begun = time.monotonic()
    command = [sys.executable, "-m", "kerastorch", "--device", "cpu", "--out", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert time.monotonic() - begun < 60
    (accuracy,) = re.findall(r"test accuracy: ([\d.]+)", out)
    assert float(accuracy) >= 0.98
    assert str(tmp_path / "best.pt") in out


def test_ctrl_c_ends_the_job_with_130(capsys, tmp_path, monkeypatch):
    at_once = kt.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("kerastorch.__main__.make_callbacks", lambda out: (at_once, at_once))
    status, out = run_main(capsys, "--device", "cpu", "--out", str(tmp_path))
    assert status == 130
    assert out.endswith("\nStopped.\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a child")
def test_ctrl_c_leaves_quietly(tmp_path):
    command = [sys.executable, "-m", "kerastorch", "--epochs", "1000", "--device", "cpu", "--out", str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = threading.Timer(60, child.kill)  # which ends the lines
    deadline.start()
    for line in child.stdout:
        if line.startswith("Epoch 1/"):
            break
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate()
    deadline.cancel()
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
def test_the_ejected_job_runs_as_it_is_and_equals_the_job(capsys, tmp_path, monkeypatch, job, style):
    monkeypatch.chdir(tmp_path)  # the file writes into runs/
    assert main(["eject", "--style", style]) == 0
    source = capsys.readouterr().out
    code, _, rest = source.partition('if __name__ == "__main__":')
    assert "kerastorch" not in code
    assert rest.count("from kerastorch") == 1  # the digits
    assert "epochs = 30\n" in rest
    source = source.replace("epochs = 30\n", "epochs = 2\n")
    (accuracy,) = re.findall(r"test accuracy: \S+", job[1])
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # no thread of its own
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(compile(source, "ejected.py", "exec"), vars(module))
    assert accuracy in capsys.readouterr().out
    ejected, fitted = (torch.load(path, weights_only=True) for path in ("runs/digits/best.pt", job[2] / "best.pt"))
    for name, value in fitted["model_state_dict"].items():
        assert torch.equal(ejected["model_state_dict"][name], value), name
    assert ejected["loss"] == pytest.approx(fitted["loss"], abs=1e-6)


def test_the_ejected_job_is_lint_free_and_formatted(capsys, tmp_path):
    for style in STYLES:
        main(["eject", "--style", style])
        (tmp_path / f"{style}.py").write_text(capsys.readouterr().out)
    config = Path(kt.__file__).parent.parent / "pyproject.toml"
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        arguments = [*command, "--config", str(config), str(tmp_path)]
        done = subprocess.run([sys.executable, "-m", "ruff", *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout
