"""The main job: python -m kerastorch."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from kerastorch.__main__ import main, make_net
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
