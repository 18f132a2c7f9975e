"""The README's python runs as it stands, and its links lead somewhere."""

import linecache
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the README writes into runs/
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace = {"__name__": "readme"}
    for i, block in enumerate(blocks):
        name = f"<README.md, block {i}>"  # in the cache, where a prompt's lines are too
        linecache.cache[name] = (len(block), None, block.splitlines(keepends=True), name)
        exec(compile(block, name, "exec"), namespace)
    assert len(blocks) == 5
    assert namespace["logits"].shape == (len(namespace["x_test"]), 10)
    assert "label_smoothing=smoothing" in (tmp_path / "train_digits.py").read_text(encoding="utf-8")
    assert namespace["model"].history.epoch == list(range(15 + len(namespace["history"].epoch)))
    assert namespace["model"].evaluate(namespace["x_test"], namespace["y_test"], verbose=0)["accuracy"] > 0.9


def test_the_links_of_the_readme_lead_to_files():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert len(targets) >= 4
    for target in targets:
        assert (ROOT / target).exists(), target
