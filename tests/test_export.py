"""Exported files: they run without kerastorch, agree with the net, or are not left behind."""

import json
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kerastorch as kt

ROWS = torch.linspace(-1, 1, 24).reshape(6, 4)


def skip_on_torch_2_6(why: str) -> None:
    if torch.__version__.startswith("2.6."):
        pytest.skip(f"torch 2.6 {why}")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


class Words(nn.Module):
    """Takes several inputs, one with a default, and returns a nest with None in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        states = self.embedding(ids)
        states = states if mask is None else states * mask[..., None]
        return {"states": states, "pooled": (states.mean(1), states.amax(1)), "loss": None}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (self.body(first) - self.body(second)).abs()


class Block(nn.Module):
    """A part whose forward is given."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def leaves(nest: Any) -> list[Any]:
    if isinstance(nest, dict):
        nest = list(nest.values())
    return [leaf for item in nest for leaf in leaves(item)] if isinstance(nest, (list, tuple)) else [nest]


SUFFIXES = (".onnx", ".pt2")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_exported_file_predicts_as_the_model_for_any_number_of_rows(suffix: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        skip_on_torch_2_6("writes no batch norm to ONNX")
    model = kt.Model(small(), device="cpu")
    report = model.export(tmp_path / f"net{suffix}", (2, 4))
    assert report.batch_sizes == [1, 3]
    assert report.max_difference <= 1e-5
    assert f"{report.max_difference:.1e}, on fresh batches of 1 and 3." in str(report)
    loaded = kt.load_exported(report.path)
    for rows in (1, 5, 6):
        expected = model.predict(ROWS[:rows], verbose=0)
        np.testing.assert_allclose(loaded.predict(ROWS[:rows], verbose=0, batch_size=4), expected, atol=1e-5)
        np.testing.assert_allclose(loaded(ROWS[:rows].double().numpy()).numpy(), expected, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == [f"net{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_inputs_and_outputs_are_nested_as_the_net_s(form: str, suffix: str, tmp_path: Path) -> None:
    if (form, suffix) == ("dict", ".onnx"):
        skip_on_torch_2_6("writes the inputs in another order")
    ids, mask = torch.randint(10, (3, 5)), torch.ones(3, 5)
    x = {"tensor": ids, "tuple": (ids, mask), "dict": {"mask": mask, "ids": ids}}[form]
    model = kt.Model(Words(), device="cpu")
    report = model.export(tmp_path / f"net{suffix}", x)
    if suffix == ".onnx":
        assert report.input_names == {"tensor": ["ids"], "tuple": ["ids", "mask"], "dict": ["mask", "ids"]}[form]
        assert report.output_names == ["states", "pooled_0", "pooled_1"]
    loaded = kt.load_exported(report.path)
    found = loaded(**x) if form == "dict" else loaded(*x) if form == "tuple" else loaded(x)
    assert list(found) == ["states", "pooled", "loss"]
    assert type(found["pooled"]) is tuple
    assert found["loss"] is None
    rows = (x,) if form == "tuple" else x
    for one, other in zip(leaves(model.predict(rows, verbose=0)), leaves(loaded.predict(rows, verbose=0)), strict=True):
        assert other is None if one is None else np.allclose(one, other, atol=1e-5)


def test_names_are_those_given_and_the_batch_axis_has_a_name(tmp_path: Path) -> None:
    skip_on_torch_2_6("gives axes names of its own in ONNX")
    import onnxruntime

    model = kt.Model(Pair(), device="cpu")
    file = tmp_path / "pair.onnx"
    report = model.export(file, (ROWS, ROWS), input_names=["left", "right"], output_names=["distance"])
    assert (report.input_names, report.output_names) == (["left", "right"], ["distance"])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert {found.name: found.shape for found in session.get_inputs()} == {"left": ["batch", 4], "right": ["batch", 4]}
    assert [found.name for found in session.get_outputs()] == ["distance"]
    loaded = kt.load_exported(file)
    expected = model.predict(((ROWS, ROWS.flip(0)),), verbose=0)
    np.testing.assert_allclose(loaded(left=ROWS, right=ROWS.flip(0)).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_fixed_batch_takes_that_many_rows_alone(suffix: str, tmp_path: Path) -> None:
    net = Block(lambda x: x.view(3, -1))
    model = kt.Model(net, device="cpu")
    file = tmp_path / f"net{suffix}"
    with pytest.raises(
        ValueError,
        match=r"not take batches of any length.*dynamic_batch=False.*(specialized it|inferred) to be a constant \(3\)",
    ):
        model.export(file, ROWS[:3])
    assert model.export(file, ROWS[:3], dynamic_batch=False).batch_sizes == [3]
    loaded = kt.load_exported(file)
    expected = torch.cat([net(ROWS[:3]), net(ROWS[3:])]).detach()
    np.testing.assert_allclose(loaded.predict(ROWS, batch_size=3, verbose=0), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"the file takes '(x|input)' float32\(3, 4\), got Tensor\(6, 4\)"):
        loaded(ROWS)


@pytest.mark.slow
def test_files_run_in_plain_torch_and_onnxruntime_without_kerastorch(tmp_path: Path) -> None:
    model = kt.Model(small(), device="cpu")
    for suffix in SUFFIXES:
        model.export(tmp_path / f"net{suffix}", ROWS)
    program = textwrap.dedent(
        """
        import json, sys
        import numpy as np, onnxruntime, torch
        rows = torch.linspace(-1, 1, 24).reshape(6, 4)
        plain = torch.export.load("net.pt2").module()(rows).tolist()
        (onnx,) = onnxruntime.InferenceSession("net.onnx").run(None, {"input": rows.numpy()})
        print(json.dumps([plain, onnx.tolist(), "kerastorch" in sys.modules]))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    plain, onnx, has_kerastorch = json.loads(done.stdout)
    assert not has_kerastorch
    expected = model.predict(ROWS, verbose=0)
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    np.testing.assert_allclose(onnx, expected, atol=1e-5)


@pytest.mark.slow
def test_an_aot_inductor_package_predicts_as_the_model(tmp_path: Path) -> None:
    model = kt.Model(small(), device="cpu")
    report = model.export(tmp_path / "net.pt2", ROWS, aot_inductor=True)
    assert report.max_difference <= 1e-5
    loaded = kt.load_exported(report.path)
    assert loaded.device == torch.device("cpu")
    np.testing.assert_allclose(loaded.predict(ROWS, batch_size=4, verbose=0), model.predict(ROWS, verbose=0), atol=1e-5)


def test_the_example_is_not_in_the_file(tmp_path: Path) -> None:
    secret = torch.full((6, 4), 1234.5)
    kt.Model(small(), device="cpu").export(tmp_path / "net.pt2", secret)
    assert secret[0].numpy().tobytes() not in (tmp_path / "net.pt2").read_bytes()


def test_net_and_random_states_are_left_as_they_were(tmp_path: Path) -> None:
    net = small().train()
    net[1].eval()
    model = kt.Model(net, device="cpu")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    flags, state = [module.training for module in net.modules()], torch.get_rng_state()
    model.export(tmp_path / "net.pt2", ROWS)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compiled_net_is_exported_as_the_net(tmp_path: Path) -> None:
    model = kt.Model(small(), device="cpu")
    model.compile("cross_entropy", "sgd", jit_compile=True)
    assert model.export(tmp_path / "net.pt2", ROWS).max_difference <= 1e-5


# ---- what is refused ----


def branching(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_can_t_be_traced_is_named_with_its_place(suffix: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), Block(branching))
    place = r"test_export.py:\d+, return x \* 2 if x.sum\(\) > 0 else x"
    with pytest.raises(ValueError, match=rf"'1' \(Block\) goes by values that only a run shows, .* at .*{place}"):
        kt.Model(net, device="cpu").export(tmp_path / f"net{suffix}", ROWS)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_fails_leaves_no_hook_behind(tmp_path: Path) -> None:
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    before = list(hooks)
    with pytest.raises(ValueError, match="goes by values that only a run shows"):
        kt.Model(Block(branching), device="cpu").export(tmp_path / "net.pt2", ROWS)
    assert list(hooks) == before


def test_what_onnx_has_no_operator_for_is_named(tmp_path: Path) -> None:
    skip_on_torch_2_6("can not trace this for any number of rows")
    model = kt.Model(Block(torch.linalg.svdvals), device="cpu")
    with pytest.raises(ValueError, match=r"ONNX has nothing for aten._linalg_svd.*'.pt2' file can hold it"):
        model.export(tmp_path / "net.onnx", ROWS)
    assert model.export(tmp_path / "net.pt2", ROWS).max_difference <= 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]


def test_a_net_that_draws_random_numbers_is_refused_and_the_earlier_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "net.pt2"
    kt.Model(small(), device="cpu").export(file, ROWS)
    earlier = file.read_bytes()
    with pytest.raises(ValueError, match="Forward gives other outputs when it is called again"):
        kt.Model(Block(lambda x: x + torch.randn_like(x)), device="cpu").export(file, ROWS)
    assert file.read_bytes() == earlier
    assert [one.name for one in tmp_path.iterdir()] == ["net.pt2"]


def test_a_file_that_differs_from_the_net_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.export.save

    def save_another(program: Any, file: Any, **extra: Any) -> None:
        program.state_dict["4.bias"] = nn.Parameter(program.state_dict["4.bias"] + 0.01)
        save(program, file, **extra)

    monkeypatch.setattr(torch.export, "save", save_another)
    net = small()
    model = kt.Model(net, device="cpu")
    with pytest.raises(ValueError, match=r"for a batch of 1 its outputs differ .* give tolerance=0\.0"):
        model.export(tmp_path / "net.pt2", ROWS)
    assert list(tmp_path.iterdir()) == []
    assert model.export(tmp_path / "net.pt2", ROWS, tolerance=0.5).max_difference > 1e-4


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
import kerastorch as kt
model = kt.Model(torch.nn.Linear(64, 64), device="cpu")
for name in sys.argv[1:]:
    file = Path(name)
    model.export(file, (2, 64))
    earlier = file.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, -1))
    try:
        model.export(file, (2, 64))
    except OSError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    assert file.read_bytes() == earlier
    assert [one.name for one in Path().iterdir()] == [name]
    file.unlink()
"""


@pytest.mark.slow
def test_a_disk_that_is_full_is_an_error_and_leaves_the_earlier_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, "net.pt2", "net.onnx"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr  # torch's own writer would end the process
    message = "[Errno 27] export() could not write '{}': File too large"
    assert done.stdout.splitlines() == [message.format("net.pt2"), message.format("net.onnx")]


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(small())


class Boxed:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "net.txt"}, ValueError, r"export\(\) writes '.onnx' and '.pt2' files, got 'net.txt'"),
        ({"input_names": ["x"]}, ValueError, "input_names and output_names are for '.onnx' files"),
        ({"path": "n.onnx", "aot_inductor": True}, ValueError, "aot_inductor=True makes a '.pt2' file, got 'n.onnx'"),
        (
            {"path": "n.onnx", "input_names": ["a", "b"]},
            ValueError,
            r"a name for each of 1 tensors, .* got \['a', 'b'\]",
        ),
        ({"path": "n.onnx", "output_names": "ab"}, ValueError, "output_names must be a name for each of 1 tensors"),
        ({"example": "rows"}, TypeError, r"export\(path, example\) takes a size such as .* got str"),
        (
            {"net": Words(), "example": (2, 5)},
            TypeError,
            r"export\(path, example\) makes .* but Embedding takes integers",
        ),
        ({"example": (None, 4)}, ValueError, r"input size \(None, 4\) needs a number for each axis"),
        ({"net": Block(Boxed)}, TypeError, "needs outputs that are tensors, or nests of them, got Boxed"),
        ({"example": ROWS[:0]}, ValueError, r"needs an example of one row or more, got Tensor\(0, 4\)"),
        ({"tolerance": -1}, ValueError, "tolerance must be a number from 0, got -1"),
        ({"dynamic_batch": "no"}, ValueError, "dynamic_batch='no' is not known"),
        ({"path": "n.onnx", "input_names": [3]}, ValueError, r"a name for each of 1 tensors, .* got \[3\]"),
        ({"path": "."}, ValueError, r"writes '.onnx' and '.pt2' files, got '.'"),
        ({"net": scripted()}, TypeError, "can't trace 'the net', which torch.jit has compiled"),
        ({"net": Block(lambda x: {0: x})}, TypeError, "needs dicts whose keys are strings, got 0 among the outputs"),
        ({"net": Block(lambda x: x * torch.nan)}, ValueError, "hold no finite number, so that nothing could be comp"),
        ({"net": nn.LazyLinear(3)}, ValueError, "the shape of 'weight' is not known yet: run one batch through"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = kt.Model(arguments.pop("net", small()), device="cpu")
    with pytest.raises(error, match=message):
        model.export(**{"path": "net.pt2", "example": ROWS, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kt.Model(small(), device="cpu")
    for package in ("onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=r"kerastorch\[export\]"):
                model.export(tmp_path / "net.onnx", ROWS)
            model.export(tmp_path / "net.pt2", ROWS)


def test_what_is_no_exported_file_is_told(tmp_path: Path) -> None:
    skip_on_torch_2_6("writes no batch norm to ONNX")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        kt.load_exported(tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"reads '.onnx' and '.pt2' files"):
        kt.load_exported(tmp_path / "net.pt")
    model = kt.Model(small(), device="cpu")
    for suffix in SUFFIXES:
        file = tmp_path / f"net{suffix}"
        model.export(file, ROWS)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ValueError, match="can't be loaded; it is damaged, or no exported net"):
            kt.load_exported(file)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".onnx", {}), (".pt2", {}), pytest.param(".pt2", {"aot_inductor": True}, marks=pytest.mark.slow)],
)
def test_inputs_that_do_not_fit_are_told_with_what_would(suffix: str, options: Any, tmp_path: Path) -> None:
    model = kt.Model(Pair(), device="cpu")
    model.export(tmp_path / f"net{suffix}", (ROWS, ROWS), **options)
    loaded = kt.load_exported(tmp_path / f"net{suffix}")
    np.testing.assert_allclose(loaded(second=ROWS, first=ROWS.flip(0)), model(ROWS.flip(0), ROWS).detach(), atol=1e-5)
    turned = torch.stack(list(ROWS), 1).T  # of other strides
    np.testing.assert_allclose(loaded(turned, ROWS.flip(0)), model(turned, ROWS.flip(0)).detach(), atol=1e-5)
    short = (ROWS, ROWS[:3]), (ROWS, ROWS[:, :3]), (ROWS, ROWS.long()), (ROWS, ROWS[0])
    for given in ((ROWS,), (ROWS, ROWS, ROWS), (ROWS, "x"), *short):
        with pytest.raises(
            ValueError, match=r"takes 'first' float32\(batch, 4\), 'second' float32\(batch, 4\), got \("
        ):
            loaded(*given)
    with pytest.raises(ValueError, match="the file takes 'first'"):
        loaded(first=ROWS, third=ROWS)


class Counts(nn.Module):
    """Keeps how often it was called, and what with."""

    def __init__(self, through: str) -> None:
        super().__init__()
        self.linear, self.through, self.count = nn.Linear(4, 3), through, 0
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.through == "count":
            self.count += 1
            return self.linear(x) * self.count
        if self.through == "input":
            return self.linear(x.mul_(2))
        self.last.copy_(x[-1])
        return self.linear(x) + self.last.sum()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_forward_changes_is_neither_in_the_file_nor_hides_a_difference(suffix: str, tmp_path: Path) -> None:
    net = Counts("count")
    with pytest.raises(ValueError, match="Forward gives other outputs when it is called again"):
        kt.Model(net, device="cpu").export(tmp_path / f"net{suffix}", ROWS)
    assert net.count == 0
    rows = ROWS.clone()
    assert kt.Model(Counts("input"), device="cpu").export(tmp_path / f"net{suffix}", rows).max_difference <= 1e-5
    assert torch.equal(rows, ROWS)
    if suffix == ".pt2":
        secret = torch.full((6, 4), 1234.5)
        kt.Model(Counts("last"), device="cpu").export(tmp_path / "net.pt2", secret)
        assert secret[0].numpy().tobytes() not in (tmp_path / "net.pt2").read_bytes()


@pytest.mark.parametrize("scale", [1e-4, 1j], ids=["small", "complex"])
def test_small_and_complex_outputs_are_compared_too(
    scale: complex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scale == 1j:
        skip_on_torch_2_6("has no complex numbers in '.pt2' files")
    save = torch.export.save

    def save_another(program: Any, file: Any, **extra: Any) -> None:
        program.state_dict["linear.bias"] = nn.Parameter(program.state_dict["linear.bias"] + 0.1)
        save(program, file, **extra)

    model = kt.Model(Block(lambda x: x * scale), device="cpu")
    assert model.export(tmp_path / "net.pt2", ROWS).max_difference <= 1e-5
    monkeypatch.setattr(torch.export, "save", save_another)
    with pytest.raises(ValueError, match="its outputs differ from the net's"):
        model.export(tmp_path / "net.pt2", ROWS)


def test_names_that_clash_are_made_apart(tmp_path: Path) -> None:
    model = kt.Model(Block(lambda x: {"x": x, "a_b": x * 2, "a": {"b": x + 1}}), device="cpu")
    report = model.export(tmp_path / "net.onnx", ROWS)
    assert (report.input_names, report.output_names) == (["x"], ["x_", "a_b", "a_b_"])
    found = kt.load_exported(report.path)(ROWS)
    np.testing.assert_allclose(found["a"]["b"], model(ROWS)["a"]["b"].detach(), atol=1e-5)
    with pytest.raises(ValueError, match="the input name 'weight' is that of a weight"):
        kt.Model(nn.Linear(4, 3), device="cpu").export(tmp_path / "weight.onnx", ROWS, input_names=["weight"])
    skip_on_torch_2_6("has one name in ONNX for an input that is given back")
    model = kt.Model(nn.Identity(), device="cpu")
    assert model.export(tmp_path / "same.onnx", ROWS).input_names == ["input"]


def test_a_flipped_byte_is_met(tmp_path: Path) -> None:
    kt.Model(small(), device="cpu").export(tmp_path / "net.pt2", ROWS)
    content = bytearray((tmp_path / "net.pt2").read_bytes())
    at = content.index(small()[0].weight.detach().numpy().tobytes())
    content[at + 5] ^= 1
    (tmp_path / "net.pt2").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*the checksum of its part '.*(weight|state_dict).*' is wrong"):
        kt.load_exported(tmp_path / "net.pt2")


def test_a_file_of_torch_save_is_told(tmp_path: Path) -> None:
    torch.save({"x": ROWS}, tmp_path / "net.pt2")
    with pytest.raises(ValueError, match=r"it holds no exported program, but what torch.save or torch.jit writes"):
        kt.load_exported(tmp_path / "net.pt2")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "net.pt2").symlink_to(tmp_path / "real" / "first.pt2")
    kt.Model(small(), device="cpu").export(tmp_path / "net.pt2", ROWS)
    assert (tmp_path / "net.pt2").is_symlink()
    assert kt.load_exported(tmp_path / "real" / "first.pt2")(ROWS).shape == (6, 3)


def test_a_file_from_elsewhere_is_called_by_place_and_by_name(tmp_path: Path) -> None:
    torch.onnx.export(Pair().eval(), (ROWS, ROWS), tmp_path / "pair.onnx", dynamo=True, verbose=False)
    loaded = kt.load_exported(tmp_path / "pair.onnx")
    assert torch.equal(loaded(ROWS, ROWS + 1), loaded(second=ROWS + 1, first=ROWS))
    program = torch.export.export(small().eval(), (ROWS,))
    torch.export.save(program, tmp_path / "net.pt2")
    np.testing.assert_allclose(kt.load_exported(tmp_path / "net.pt2")(ROWS), small().eval()(ROWS).detach(), atol=1e-6)


def test_two_exports_at_once_both_come_out(tmp_path: Path) -> None:
    model = kt.Model(small(), device="cpu")
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda i: model.export(tmp_path / f"{i}.pt2", ROWS), range(3)))
    assert all(report.max_difference <= 1e-5 for report in reports)


def test_lists_of_inputs_are_taken_as_tuples_are(tmp_path: Path) -> None:
    model = kt.Model(Pair(), device="cpu")
    for suffix in SUFFIXES:
        model.export(tmp_path / f"net{suffix}", [ROWS, ROWS])
        found = kt.load_exported(tmp_path / f"net{suffix}").predict(((ROWS, ROWS.flip(0)),), verbose=0)
        np.testing.assert_allclose(found, model.predict(((ROWS, ROWS.flip(0)),), verbose=0), atol=1e-5)
