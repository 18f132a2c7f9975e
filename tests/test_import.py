"""import kerastorch is light, and works where torchvision is absent."""

import functools
import json
import subprocess
import sys

import pytest

HEAVY = ["torchmetrics", "torchvision", "matplotlib", "pandas", "IPython", "tqdm.notebook", "onnx", "tensorboard"]


def run_child(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@functools.cache
def find_loaded():
    """Return what is imported, beyond torch and its own, by kerastorch, and then by its modules for curves."""
    code = """
import json, sys, torch
before = set(sys.modules)
import kerastorch
print(json.dumps(sorted(set(sys.modules) - before)))
import kerastorch.plots, kerastorch.history
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    return [json.loads(line) for line in run_child(code).splitlines()]


def test_import_loads_no_heavy_package_beyond_torch():
    loaded, _ = find_loaded()
    assert "kerastorch.model" in loaded
    found = [name for name in loaded if any(name == heavy or name.startswith(heavy + ".") for heavy in HEAVY)]
    assert found == []
    foreign = {name.partition(".")[0] for name in loaded} - {"kerastorch"} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "numpy"}, foreign


@pytest.mark.slow
def test_the_verbs_work_where_torchvision_is_absent():
    code = """
import sys
sys.modules["torchvision"] = None  # import torchvision now raises ImportError
import torch, kerastorch as kt
model = kt.Model(torch.nn.Linear(3, 2), device="cpu")
model.compile("cross_entropy", "sgd")
x, y = torch.randn(8, 3), torch.arange(8) % 2
model.fit(x, y, verbose=0)
print(sorted(model.evaluate(x, y, verbose=0)), model.predict(x, verbose=0).shape)
(x_train, _), _ = kt.datasets.digits()
print(len(x_train))
"""
    assert run_child(code).split("\n")[:2] == ["['loss'] (8, 2)", "1438"]


def test_importing_tqdm_is_left_to_the_first_bar():
    loaded, _ = find_loaded()
    assert "tqdm.auto" not in loaded


def test_matplotlib_is_not_loaded_before_a_picture_is_asked_for():
    _, loaded = find_loaded()
    assert "kerastorch.plots" in loaded
    assert "matplotlib" not in loaded
