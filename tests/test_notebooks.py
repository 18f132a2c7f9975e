"""The notebooks run from a clean kernel, and the bar shows in one."""

import itertools
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # the warnings are Jupyter's own


def execute(notebook):
    nbclient = pytest.importorskip("nbclient")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def kinds(outputs):
    return [kind for kind, _ in itertools.groupby(output.output_type for output in outputs)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_committed_with_its_outputs(path):
    committed = nbformat.read(path, as_version=4)
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    fresh = nbformat.read(path, as_version=4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    execute(fresh)
    for before, after in zip(committed.cells, fresh.cells, strict=True):
        if before.cell_type == "code":
            assert kinds(before.outputs) == kinds(after.outputs)


def test_a_notebook_shows_one_bar_an_epoch():
    source = """
import torch, kerastorch as kt
model = kt.Model(torch.nn.Linear(3, 2), device="cpu")
model.compile("cross_entropy", "sgd")
model.fit(torch.randn(8, 3), torch.arange(8) % 2, epochs=2)
"""
    outputs = execute(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]))
    shown = " ".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert "Epoch 1/2" in shown
    assert "Epoch 2/2" in shown
    assert "batch" in shown  # a bar with its rate, not the plain line
