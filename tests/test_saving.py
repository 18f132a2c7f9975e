"""Weights and models come back from files to the bit, files of others are taken, and a refused file changes nothing."""

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

import kerastorch as kt
from kerastorch.callbacks import EMA, ModelCheckpoint
from kerastorch.checkpoint import CheckpointError, read_checkpoint
from kerastorch.device import bare_keys

SUFFIXES = (".pt", ".pth", ".safetensors")


class Net(nn.Module):
    """Batch norm's buffers, dropout's random draws and a layer that is used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.tied = self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.body(x))


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_model(seed: int = 0, **arguments: Any) -> kt.Model:
    model = kt.Model(make_net(seed), device="cpu")
    model.compile(**{"loss": "cross_entropy", "optimizer": "adam", "metrics": ["accuracy"], **arguments})
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(20, 3, generator=generator), torch.randint(0, 2, (20,), generator=generator)


def fit(model: kt.Model, epochs: int = 2, **arguments: Any) -> kt.History:
    return model.fit(*data(), batch_size=8, epochs=epochs, verbose=0, **arguments)


def equal(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def copied(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


# ---- weights ----


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_come_back_to_the_bit(tmp_path: Path, suffix: str) -> None:
    model, other = make_model(0), make_model(1)
    fit(model)
    path = tmp_path / "new" / f"net{suffix}"
    model.save_weights(path)
    assert not equal(other.net.state_dict(), model.net.state_dict())
    report = other.load_weights(str(path))
    assert equal(other.net.state_dict(), model.net.state_dict())
    assert report.ok
    assert sorted(report.loaded) == sorted(model.net.state_dict())
    assert os.listdir(path.parent) == [path.name]


def test_files_open_without_kerastorch(tmp_path: Path) -> None:
    model = make_model()
    fit(model)
    for suffix in SUFFIXES:
        model.save_weights(tmp_path / f"net{suffix}")
    model.save(tmp_path / "model.pt")
    code = """
import sys, torch, safetensors.torch
folder = sys.argv[1]
weights = torch.load(folder + "/net.pt", weights_only=True)
content = torch.load(folder + "/model.pt", weights_only=True)
assert "kerastorch" not in sys.modules
for same in (safetensors.torch.load_file(folder + "/net.safetensors"), content["model_state_dict"]):
    assert weights.keys() == same.keys() and all(torch.equal(weights[key], same[key]) for key in same)
print(sorted(same), weights["head.weight"].tolist(), content["epoch"], content["loss"])
"""
    weight, loss = model.net.state_dict()["head.weight"].tolist(), model.history.history["loss"][-1]
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert child.stdout == f"{sorted(model.net.state_dict())} {weight} 1 {loss}\n", child.stderr


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_dtypes_and_channels_last_come_back(tmp_path: Path, suffix: str) -> None:
    net = nn.Conv2d(3, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    kt.Model(net, device="cpu").save_weights(tmp_path / f"net{suffix}")
    other = nn.Conv2d(3, 4, 3).to(torch.bfloat16)
    kt.Model(other, device="cpu").load_weights(tmp_path / f"net{suffix}")
    assert equal(other.state_dict(), net.state_dict())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_keys_are_bare_whatever_stands_around_the_net(tmp_path: Path, suffix: str) -> None:
    net = make_net()
    bare = copied(net)
    net.body = torch.compile(net.body)
    wrapped = torch.compile(nn.DataParallel(net))
    kt.Model(wrapped, device="cpu").save_weights(tmp_path / f"net{suffix}")
    other = make_net(1)
    kt.Model(other, device="cpu").load_weights(tmp_path / f"net{suffix}")
    assert equal(other.state_dict(), bare)
    fresh = make_net(2)
    fresh.body = torch.compile(fresh.body)
    assert kt.Model(fresh, device="cpu").load_weights(tmp_path / f"net{suffix}").ok
    assert list(map(torch.Tensor.tolist, fresh.state_dict().values())) == [v.tolist() for v in bare.values()]


PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.")
RECIPES: dict[str, Any] = {
    "alone": lambda weights: weights,
    "model_state_dict": lambda weights: {"epoch": 3, "model_state_dict": weights, "loss": 0.5},
    "state_dict": lambda weights: {"state_dict": weights, "arch": "net"},
    "model": lambda weights: {"model": weights},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_files_of_others_are_taken(tmp_path: Path, prefix: str, recipe: str) -> None:
    net, model = make_net(), make_model(1)
    torch.save(RECIPES[recipe]({prefix + key: value for key, value in net.state_dict().items()}), tmp_path / "a.pt")
    assert model.load_weights(tmp_path / "a.pt").ok
    assert equal(model.net.state_dict(), net.state_dict())


def test_module_in_the_net_s_own_keys_stays(tmp_path: Path) -> None:
    net = nn.ModuleDict({"module": nn.Linear(2, 2)})
    model = kt.Model(net, device="cpu")
    model.save_weights(tmp_path / "a.pt")
    assert list(torch.load(tmp_path / "a.pt", weights_only=True)) == ["module.weight", "module.bias"]
    assert model.load_weights(tmp_path / "a.pt").ok
    torch.save(nn.DataParallel(net).state_dict(), tmp_path / "b.pt")
    assert model.load_weights(tmp_path / "b.pt").ok


def test_versions_of_modules_follow_their_names() -> None:
    weights = nn.DataParallel(make_net()).state_dict()
    bare = bare_keys(weights, make_net().state_dict())
    assert bare._metadata == make_net().state_dict()._metadata | {"": {"version": 1}}


def write_shards(folder: Path, suffix: str = ".safetensors") -> Path:
    weights = {key: value.clone() for key, value in make_net().state_dict().items()}
    names = {key: f"part-{i % 2}{suffix}" for i, key in enumerate(weights)}
    for file in set(names.values()):
        part = {key: weights[key] for key in weights if names[key] == file}
        if suffix == ".safetensors":
            safetensors.torch.save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    path = folder / f"model{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_files_are_taken(tmp_path: Path, suffix: str) -> None:
    model = make_model(1)
    assert model.load_weights(write_shards(tmp_path, suffix)).ok
    assert equal(model.net.state_dict(), make_net().state_dict())


def test_a_tied_weight_may_be_in_the_file_once(tmp_path: Path) -> None:
    safetensors.torch.save_model(make_net(), str(tmp_path / "a.safetensors"))
    model = make_model(1)
    assert model.load_weights(tmp_path / "a.safetensors").ok
    assert equal(model.net.state_dict(), make_net().state_dict())


def test_a_lazy_net_takes_its_shapes_from_the_file(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    torch.save({"weight": net.weight}, tmp_path / "b.pt")
    lazy = nn.LazyLinear(2)
    model = kt.Model(lazy, device="cpu")
    with pytest.raises(ValueError, match="missing in the file: 'bias'"):
        model.load_weights(tmp_path / "b.pt")
    assert isinstance(lazy.weight, UninitializedParameter)
    assert model.load_weights(tmp_path / "a.pt").ok
    assert equal(lazy.state_dict(), net.state_dict())


def misfitting() -> dict[str, torch.Tensor]:
    weights = copied(make_net())
    del weights["body.0.bias"]
    weights |= {"extra": torch.ones(1), "head.weight": torch.ones(9, 4), "body.1.running_mean": torch.ones(4) * 1j}
    return weights


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_error_names_all_that_does_not_fit_and_nothing_changes(tmp_path: Path, suffix: str) -> None:
    weights, path = misfitting(), tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(weights | {"tied.weight": weights["tied.weight"].clone()}, path)
    else:
        torch.save(weights, path)
    model = make_model(1)
    before = copied(model.net)
    with pytest.raises(ValueError, match="strict=False would load what fits") as raised:
        model.load_weights(path)
    lines = str(raised.value).split("\n")[1:]
    assert lines[0] == "  1 missing in the file: 'body.0.bias'"
    assert lines[1] == "  1 unexpected in the file: 'extra'"
    assert "'head.weight' is (9, 4) in the file, (2, 4) in the net" in lines[2]
    assert "'body.1.running_mean' is torch.complex64" in lines[2]
    assert str(path) in str(raised.value)
    assert equal(model.net.state_dict(), before)


def test_partial_loading_takes_what_fits_and_reports_the_rest(tmp_path: Path) -> None:
    torch.save(misfitting(), tmp_path / "a.pt")
    model, source = make_model(1), make_net()
    before = copied(model.net)
    report = model.load_weights(tmp_path / "a.pt", strict=False)
    assert not report.ok
    assert report.missing == ["body.0.bias"]
    assert report.unexpected == ["extra"]
    assert list(report.mismatched) == ["body.1.running_mean", "head.weight"]
    assert set(report.loaded) == set(before) - {"body.0.bias", *report.mismatched}
    assert str(report).startswith(f"{len(report.loaded)} loaded\n1 missing")
    after = model.net.state_dict()
    assert torch.equal(after["body.0.weight"], source.state_dict()["body.0.weight"])
    for key in ("body.0.bias", "body.1.running_mean"):
        assert torch.equal(after[key], before[key])


@pytest.mark.parametrize("strict", [True, False])
def test_a_file_of_which_nothing_fits_is_an_error(tmp_path: Path, strict: bool) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    model = make_model()
    with pytest.raises(ValueError, match="None of its weights fits"):
        model.load_weights(tmp_path / "a.pt", strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_an_error_of_the_net_s_own_while_it_loads_puts_all_back(tmp_path: Path, strict: bool) -> None:
    class Breaks(nn.Linear):
        def _load_from_state_dict(self, *arguments: Any) -> None:
            raise KeyError("mine")

    net = nn.Sequential(nn.Linear(2, 2), Breaks(2, 2))
    before = copied(net)
    torch.save({key: value + 1 for key, value in before.items()}, tmp_path / "a.pt")
    with pytest.raises(KeyError, match="mine"):
        kt.Model(net, device="cpu").load_weights(tmp_path / "a.pt", strict=strict)
    assert equal(net.state_dict(), before)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model = make_model(1)
    before = copied(model.net)
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"a{suffix}"
        model.save_weights(path)
        whole = path.read_bytes()
        for damaged in (whole[:-30], whole[:50], b"", b"<html>"):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="damaged"):
                model.load_weights(path)
        with pytest.raises(FileNotFoundError):
            model.load_weights(tmp_path / f"none{suffix}")
        (tmp_path / f"folder{suffix}").mkdir()
        with pytest.raises(IsADirectoryError):
            model.load_weights(tmp_path / f"folder{suffix}")
    torch.save({"epoch": 1, "net": {}}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"holds no weights.*epoch, net"):
        model.load_weights(tmp_path / "b.pt")
    assert equal(model.net.state_dict(), before)


FORGED: dict[str, Any] = {
    "elsewhere": {"weight_map": {"a": "../part-0.safetensors"}},
    "elsewhere on Windows": {"weight_map": {"a": "..\\part-0.safetensors"}},
    "itself": {"weight_map": {"a": "model.safetensors.index.json"}},
    "a number": {"weight_map": {"a": 3}},
    "a list": [1],
    "no map": {"weights": {}},
    "a key that the files lack": {"weight_map": {"a": "part-0.safetensors"}},
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_index_is_refused(tmp_path: Path, case: str) -> None:
    path = write_shards(tmp_path)
    path.write_text(json.dumps(FORGED[case]))
    with pytest.raises(CheckpointError, match="index"):
        make_model().load_weights(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = write_shards(tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-1\.safetensors"):
        make_model().load_weights(path)


class Poison:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_poison_runs_through_no_loader_but_the_trusting_one(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    torch.save({"model_state_dict": {}, "net": Poison(marker)}, path)
    torch.save(Poison(marker), tmp_path / "part.bin")
    index = tmp_path / "model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part.bin"}}))
    model = make_model()
    for act in (
        lambda: model.load_weights(path),
        lambda: model.load_weights(index),
        lambda: kt.Model.load(path, make_net()),
        lambda: fit(model, resume=path),
    ):
        with pytest.raises(CheckpointError, match="could run code"):
            act()
    with pytest.raises(ValueError, match="trust=True"):
        kt.Model.load(path)
    assert not marker.exists()
    with pytest.raises(CheckpointError, match="holds no net"):
        kt.Model.load(path, trust=True)
    assert marker.exists()  # or this test could not fail


@pytest.mark.parametrize("name", ["net.h5", "net.weights.h5", "net.keras", "net", "net.onnx"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"'\.safetensors' files, and torch's as '\.pt', .* or '\.ckpt'"):
        make_model().save_weights(tmp_path / name)
    assert not os.listdir(tmp_path)


def test_safetensors_says_what_it_can_not_hold(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            assert state == {"a": 1}

    model = kt.Model(Extra(2, 2), device="cpu")
    with pytest.raises(TypeError, match=r"'_extra_state' is a dict: write to a \.pt file"):
        model.save_weights(tmp_path / "a.safetensors")
    assert not os.listdir(tmp_path)
    model.save_weights(tmp_path / "a.pt")
    assert model.load_weights(tmp_path / "a.pt").ok


def test_missing_safetensors_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model = make_model()
    for act in (model.save_weights, model.load_weights):
        with pytest.raises(ImportError, match=r"pip install 'kerastorch\[safetensors\]'"):
            act(tmp_path / "a.safetensors")
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="resource limits")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_write_that_fails_leaves_the_file_of_before(tmp_path: Path, suffix: str) -> None:
    import resource
    import signal

    model, path = make_model(), tmp_path / f"a{suffix}"
    model.save_weights(path)
    before = path.read_bytes()
    big = kt.Model(nn.Linear(100, 100), device="cpu")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: File too large.*still whole"):
            big.save_weights(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


# ---- models ----

PLAIN: dict[str, dict[str, Any]] = {
    "adam": {},
    "momentum and groups": {"optimizer": "rmsprop", "param_groups": {"*.bias": {"weight_decay": 0.1}}},
    "cosine": {"lr_scheduler": "cosine", "lr_scheduler_interval": "step"},
    "plateau": {"lr_scheduler": "reduce_on_plateau", "clip_grad_norm": 1.0},
    "fp16": {"mixed_precision": "fp16", "gradient_accumulation_steps": 2},
    "class loop": {"loop": "class", "metrics": {"acc": "accuracy"}, "channels_last": True},
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_model_of_names_goes_on_to_the_bit(tmp_path: Path, case: str) -> None:
    model = make_model(**PLAIN[case])
    fit(model, callbacks=None)
    model.save(tmp_path / "a.pt")
    fit(model)
    loaded = kt.Model.load(tmp_path / "a.pt", make_net(7), device="cpu")
    assert "not compiled" not in repr(loaded)
    fit(loaded)
    assert equal(loaded.net.state_dict(), model.net.state_dict())
    assert loaded.history.history == model.history.history
    assert loaded.history.epoch == [0, 1, 2, 3]


def test_saving_moves_no_random_stream(tmp_path: Path) -> None:
    model = make_model()
    fit(model, 1)
    before = random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())
    model.save(tmp_path / "a.pt")
    model.save(tmp_path / "b.pt", whole=True)
    model.save_weights(tmp_path / "c.pt")
    model.load_weights(tmp_path / "c.pt")
    assert before == (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state()))


def step_lr(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


OWN: dict[str, Any] = {
    "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "lr_scheduler": step_lr,
    "mixed_precision": "fp16",
    "loss": lambda outputs, y: nn.functional.cross_entropy(outputs, y),
}


def test_the_next_compile_takes_over_where_objects_were_given(tmp_path: Path) -> None:
    model = make_model(**OWN)
    fit(model)
    model.save(tmp_path / "a.pt")
    fit(model)
    loaded = kt.Model.load(tmp_path / "a.pt", make_net(7), device="cpu")
    assert "not compiled" in repr(loaded)
    loaded.save(tmp_path / "b.pt")  # hands the state on
    for name in ("a.pt", "b.pt"):
        one = kt.Model.load(tmp_path / name, make_net(8), device="cpu")
        one.compile(metrics=["accuracy"], **OWN)
        fit(one)
        assert equal(one.net.state_dict(), model.net.state_dict())
        assert one.history.history == model.history.history
        one.compile("mse", "adam")  # forgets it wholly
        assert one.optimizer is not None
        assert not one.optimizer.state


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"optimizer": "adam"}, "optimizer is SGD, this run's Adam"),
    "scheduler": ({"lr_scheduler": None}, "checkpoint's lr_scheduler is StepLR, this run has none"),
    "scaler": ({"mixed_precision": None}, "the file has a GradScaler, this compile.* none"),
    "groups": (
        {"optimizer": lambda ps: torch.optim.SGD([{"params": [p]} for p in ps], lr=0.1, momentum=0.9)},
        "parameters in the optimizer's groups: 6 in the checkpoint, 1, 1, 1, 1, 1, 1 in this run",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_compile_that_does_not_fit_is_refused_and_a_right_one_still_takes_over(tmp_path: Path, case: str) -> None:
    model = make_model(**OWN)
    fit(model)
    model.save(tmp_path / "a.pt")
    fit(model)
    loaded = kt.Model.load(tmp_path / "a.pt", make_net(7), device="cpu")
    arguments, message = MISFITS[case]
    with pytest.raises(ValueError, match=message) as raised:
        loaded.compile(**{**OWN, **arguments})
    assert str(tmp_path / "a.pt") in str(raised.value)
    assert "not compiled" in repr(loaded)
    loaded.compile(**OWN)
    fit(loaded)
    assert equal(loaded.net.state_dict(), model.net.state_dict())


def test_fit_resumes_from_a_saved_model(tmp_path: Path) -> None:
    model = make_model()
    fit(model)
    model.save(tmp_path / "a.pt")
    fit(model)
    other = make_model(3)
    fit(other, 4, resume=tmp_path / "a.pt")
    assert equal(other.net.state_dict(), model.net.state_dict())


def test_a_model_that_was_never_compiled_is_saved_too(tmp_path: Path) -> None:
    kt.Model(make_net(), device="cpu").save(tmp_path / "a.pt")
    net = make_net(7)
    state = torch.get_rng_state()
    loaded = kt.Model.load(tmp_path / "a.pt", net, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.net is net
    assert equal(net.state_dict(), make_net().state_dict())
    loaded.compile("mse", "sgd")


def test_a_refused_model_file_changes_neither_net_nor_random_states(tmp_path: Path) -> None:
    model = make_model()
    fit(model)
    model.save(tmp_path / "a.pt")
    good = torch.load(tmp_path / "a.pt", weights_only=True)
    optimizer = good["optimizer_state_dict"]
    states = good["run"]["random_state"] | {"torch": torch.zeros(3, dtype=torch.uint8)}
    cases = {
        "does not fit this net": good | {"model_state_dict": good["model_state_dict"] | {"extra": torch.ones(1)}},
        "can't take over": good | {"optimizer_state_dict": optimizer | {"param_groups": []}},
        "no argument 'lose'": good | {"compile_arguments": good["compile_arguments"] | {"lose": 1}},
        "arguments of compile": good | {"compile_arguments": [1]},
        "no random states": good | {"run": good["run"] | {"random_state": {"cuda": None}}},
        "random states that can be set": good | {"run": good["run"] | {"random_state": states}},
        "no checkpoint that a run wrote": good | {"run": {}, "epoch": "1"},
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "b.pt")
        net = make_net(7)
        random.random()
        before, own_states = copied(net), (random.getstate(), torch.get_rng_state().tolist())
        with pytest.raises((ValueError, TypeError, CheckpointError), match=message):
            kt.Model.load(tmp_path / "b.pt", net, device="cpu")
        assert equal(net.state_dict(), before)
        assert own_states == (random.getstate(), torch.get_rng_state().tolist())


def test_a_checkpoint_of_a_callback_loads_with_the_weights_that_it_published(tmp_path: Path) -> None:
    model = make_model()
    fit(model, callbacks=[EMA(0.5), ModelCheckpoint(tmp_path / "a.pt")])
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert not equal(content["model_state_dict"], content["training_model_state_dict"])
    loaded = kt.Model.load(tmp_path / "a.pt", make_net(7), device="cpu")
    assert equal(loaded.net.state_dict(), content["model_state_dict"])
    assert loaded.history.history == model.history.history
    loaded.save(tmp_path / "b.pt")
    assert "training_model_state_dict" not in torch.load(tmp_path / "b.pt", weights_only=True)
    loaded.compile("cross_entropy", "adam")
    assert loaded.optimizer is not None
    assert loaded.optimizer.state_dict()["state"][0]["step"] == 6
    fit(loaded, 1)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_checkpoint_of_the_plain_recipe_goes_on(tmp_path: Path, prefix: str) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x, y = data()

    def train(num_steps: int) -> torch.Tensor:
        net.eval()  # no random draws
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
        return loss

    loss = train(2)
    content = {
        "epoch": 1,
        "model_state_dict": {prefix + key: value for key, value in net.state_dict().items()},
        "optimizer_state_dict": optimizer.state_dict(),
        "loss": loss,
    }
    torch.save(content, tmp_path / "a.pt")
    train(2)

    class EvalMode(Net):
        def train(self, mode: bool = True) -> Any:
            return super().train(False)

    def compiled(model: kt.Model) -> kt.Model:
        model.compile("cross_entropy", lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        return model

    loaded = compiled(kt.Model.load(tmp_path / "a.pt", EvalMode(), device="cpu"))
    loaded.fit(x, y, batch_size=20, epochs=2, shuffle=False, verbose=0)
    assert equal(loaded.net.state_dict(), net.state_dict())
    resumed = compiled(kt.Model(EvalMode(), device="cpu"))
    with pytest.warns(UserWarning, match="plain recipe"):
        resumed.fit(x, y, batch_size=20, epochs=4, shuffle=False, verbose=0, resume=tmp_path / "a.pt")
    assert equal(resumed.net.state_dict(), net.state_dict())


def test_weights_alone_make_a_model_that_is_not_compiled(tmp_path: Path) -> None:
    make_model().save_weights(tmp_path / "a.pt")
    loaded = kt.Model.load(tmp_path / "a.pt", make_net(7), device="cpu")
    assert equal(loaded.net.state_dict(), make_net().state_dict())
    assert "not compiled" in repr(loaded)


@pytest.mark.parametrize("name", ["a.safetensors", "a.keras", "a.h5", "a", "model.v2"])
def test_a_model_is_not_saved_under_the_name_of_another_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"named '\.pt', '\.pth', '\.bin' or '\.ckpt'; got .*save_weights"):
        make_model().save(tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_every_suffix_of_torch_s_is_written_and_read(tmp_path: Path, suffix: str) -> None:
    model = make_model()
    model.save(tmp_path / f"a{suffix}")
    model.save_weights(tmp_path / f"b{suffix}")
    loaded = kt.Model.load(tmp_path / f"a{suffix}", make_net(7), device="cpu")
    assert equal(loaded.net.state_dict(), model.net.state_dict())
    assert make_model(3).load_weights(tmp_path / f"b{suffix}").ok


def test_a_file_of_weights_alone_is_pointed_to_load_weights(tmp_path: Path) -> None:
    make_model().save_weights(tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", write_shards(tmp_path)):
        with pytest.raises(ValueError, match=r"Model\(net\)\.load_weights\(path\)"):
            kt.Model.load(path, make_net())


# ---- ways out, and files of other scripts ----


def test_load_weights_drops_the_state_that_compile_was_to_take_over(tmp_path: Path) -> None:
    model = make_model(**OWN)
    fit(model)
    model.save(tmp_path / "a.pt")
    loaded = kt.Model.load(tmp_path / "a.pt", make_net(7), device="cpu")
    with pytest.raises(ValueError, match=r"Model\(model\.net\), or call load_weights\(\)"):
        loaded.compile("cross_entropy", "adam")
    again = kt.Model(loaded.net, device="cpu")
    again.compile("cross_entropy", "adam")
    with pytest.raises(ValueError, match="strict"):
        loaded.load_weights(tmp_path / "a.pt", strict="no")
    assert loaded.load_weights(tmp_path / "a.pt").ok
    loaded.compile("cross_entropy", "adam")
    assert loaded.optimizer is not None
    assert not loaded.optimizer.state
    assert equal(loaded.net.state_dict(), model.net.state_dict())


def test_a_net_that_does_not_fit_has_a_way_out_that_is_there(tmp_path: Path) -> None:
    make_model().save(tmp_path / "a.pt")
    net = make_net(7)
    net.body[0].register_buffer("extra", torch.ones(1))
    with pytest.raises(ValueError, match=r"Model\(net\)\.load_weights\(path, strict=False\) would load what fits"):
        kt.Model.load(tmp_path / "a.pt", net, device="cpu")
    assert kt.Model(net, device="cpu").load_weights(tmp_path / "a.pt", strict=False).missing == ["body.0.extra"]


def test_a_scheduler_on_one_side_alone_is_told_plainly(tmp_path: Path) -> None:
    arguments = {**OWN, "mixed_precision": None}
    model = make_model(**{**arguments, "lr_scheduler": None})
    model.save(tmp_path / "a.pt")
    loaded = kt.Model.load(tmp_path / "a.pt", make_net(7), device="cpu")
    with pytest.raises(ValueError, match="checkpoint has no lr_scheduler, this run's is StepLR"):
        loaded.compile(**arguments)


def trained_elsewhere(**others: Any) -> tuple[dict[str, Any], torch.optim.Optimizer]:
    """Return what the ImageNet example and its like save, and the optimizer whose states are in it."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = step_lr(optimizer)
    for _ in range(2):
        nn.functional.cross_entropy(net(data()[0]), data()[1]).backward()
        optimizer.step()
        scheduler.step()
    weights, states = net.state_dict(), {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    return {"epoch": 2, "arch": "net", "state_dict": weights, "best_acc1": torch.tensor(0.5), **states}, optimizer


@pytest.mark.parametrize("name", ["scheduler", "lr_scheduler", "scheduler_state_dict"])
def test_states_under_the_names_of_the_imagenet_example_are_taken_over(tmp_path: Path, name: str) -> None:
    content, optimizer = trained_elsewhere()
    content[name] = content.pop("scheduler")
    torch.save(content, tmp_path / "a.pt")
    loaded = kt.Model.load(tmp_path / "a.pt", make_net(7), device="cpu")
    loaded.save(tmp_path / "b.pt")  # hands the state on, and the weights once
    assert not {"state_dict", "optimizer", "arch"} & set(torch.load(tmp_path / "b.pt", weights_only=True))
    for path in (tmp_path / "a.pt", tmp_path / "b.pt"):
        loaded = kt.Model.load(path, make_net(7), device="cpu")
        with pytest.raises(ValueError, match="can't take over"):
            loaded.compile("cross_entropy", "adam")
        loaded.compile("cross_entropy", OWN["optimizer"], lr_scheduler=step_lr)
        assert loaded.optimizer is not None
        assert loaded.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.1 * 0.5**2
        momenta = [one.state_dict()["state"][0]["momentum_buffer"] for one in (loaded.optimizer, optimizer)]
        assert torch.equal(*momenta)
        compiled = loaded.compiled
        assert compiled is not None
        assert compiled.lr_scheduler.last_epoch == 2


def test_settings_under_the_name_of_a_state_are_none(tmp_path: Path) -> None:
    content = trained_elsewhere()[0] | {"optimizer": {"name": "sgd", "lr": 0.1}, "scheduler": {"name": "step"}}
    torch.save(content, tmp_path / "a.pt")
    loaded = kt.Model.load(tmp_path / "a.pt", make_net(7), device="cpu")
    loaded.compile("cross_entropy", "adam")


def test_resume_says_what_such_a_file_lacks_and_what_takes_it(tmp_path: Path) -> None:
    content = trained_elsewhere()[0]
    torch.save(content, tmp_path / "a.pt")
    takes = r"has no 'model_state_dict'.*Model\.load\(path, net\) takes its weights and, .* its optimizer's state"
    with pytest.raises(CheckpointError, match=takes):
        fit(make_model(), resume=tmp_path / "a.pt")
    del content["optimizer"]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"takes its weights\.$"):
        fit(make_model(), resume=tmp_path / "a.pt")
    torch.save({"epoch": 1, "net": {}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"\(its keys: epoch, net\)\.$"):
        fit(make_model(), resume=tmp_path / "a.pt")


def plain(**others: Any) -> dict[str, Any]:
    """Return what the usual recipe saves."""
    model = make_model()
    fit(model, 1)
    assert model.optimizer is not None
    weights, state = model.net.state_dict(), model.optimizer.state_dict()
    return {"epoch": 0, "model_state_dict": weights, "optimizer_state_dict": state, "loss": 0.5, **others}


def assert_plain_recipe(path: Path, content: dict[str, Any]) -> None:
    loaded = kt.Model.load(path, make_net(7), device="cpu")
    loaded.compile("cross_entropy", "adam")
    assert equal(loaded.net.state_dict(), content["model_state_dict"])
    assert loaded.optimizer is not None
    assert loaded.optimizer.state_dict()["state"][0]["step"] == 3
    resumed = make_model(3)
    with pytest.warns(UserWarning, match="plain recipe"):
        history = fit(resumed, 2, resume=path)
    assert history.epoch == [1]


NUMPY_TYPES = ("bool_", "int8", "int16", "int32", "int64", "uint8", "uint64", "float16", "float32", "float64")


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_numbers_of_numpy_s_come_as_python_s(tmp_path: Path, module: str) -> None:
    values: dict[str, Any] = {name: getattr(np, name)(1) for name in NUMPY_TYPES}
    values |= {"complex64": np.complex64(1 - 2j), "loss": np.mean([0.25, 0.5]), "nested": [{"a": np.float64("nan")}]}
    content = plain(**values)
    torch.save(content, tmp_path / "a.pt")
    own = np.float64(0).__reduce__()[0].__module__
    path = tmp_path / "b.pt"
    rename_in_archive(tmp_path / "a.pt", path, f"c{own}\n".encode(), f"c{module}\n".encode())
    read = read_checkpoint(path)
    for key, value in values.items():
        if key != "nested":
            assert type(read[key]) is type(value.item())
            assert read[key] == value
    assert type(read["nested"][0]["a"]) is float
    assert np.isnan(read["nested"][0]["a"])
    assert_plain_recipe(path, content)
    kt.Model.load(path, make_net(), device="cpu").save(tmp_path / "c.pt")
    assert not any("numpy" in str(one) for one in torch.serialization.get_safe_globals())


def rename_in_archive(source: Path, path: Path, old: bytes, new: bytes) -> None:
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as other:
        for entry in archive.infolist():
            data = archive.read(entry)
            is_pickle = entry.filename.endswith("data.pkl")
            assert old in data or not is_pickle
            other.writestr(entry.filename, data.replace(old, new) if is_pickle else data)


class Forged:
    """Pickles as a call of one of numpy's functions, then as what sets its state."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def scalar(dtype: Any, data: Any) -> Forged:
    return Forged(np.float64(0).__reduce__()[0], (dtype, data))


def dtype(*state: Any, code: Any = "f8") -> Forged:
    return Forged(np.dtype, (code, False, True), state or (3, "<", None, None, None, -1, -1, 0))


FORGED_NUMBERS: dict[str, Any] = {
    "dtype alone": np.dtype("f8"),
    "text": np.str_("a"),
    "object": scalar(np.dtype("O"), [1]),
    "object by name": scalar(dtype(code="O"), b"12345678"),
    "fields with pointers": scalar(dtype(3, "|", None, ("a",), {"a": ("O", 0)}, 8, 1, 0, code="V8"), b"12345678"),
    "code that is no text": scalar(dtype(code=["f8"]), b"12345678"),
    "code of 2**40 leaves": scalar(dtype(code=functools.reduce(lambda value, _: [value, value], range(40), [1])), b""),
    "code that is long": scalar(dtype(code="f8" * 10**6), b"12345678"),
    "order": scalar(dtype(3, "f8,", None, None, None, -1, -1, 0), b"12345678"),
    "no state": scalar(dtype(3), b"12345678"),
    "too few bytes": scalar(dtype(), b"1234"),
    "too many bytes": scalar(dtype(), b"1" * 16),
    "no bytes": scalar(dtype(), 3),
    "tensor for bytes": scalar(dtype(), torch.zeros(8)),
    "array": np.zeros(3),
    "datetime": np.datetime64(3, "s"),
    "long double": np.longdouble(1),
}


@pytest.mark.parametrize("case", FORGED_NUMBERS)
def test_what_is_no_plain_number_of_numpy_s_is_refused(tmp_path: Path, case: str) -> None:
    torch.save({"epoch": 0, "value": FORGED_NUMBERS[case]}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt") as raised:
        read_checkpoint(tmp_path / "a.pt")
    assert len(str(raised.value)) < 500


def test_what_the_user_allowed_of_numpy_s_stays_his(tmp_path: Path) -> None:
    torch.save({"value": np.float64(2)}, tmp_path / "a.pt")
    allowed = [np.dtype, np.float64(0).__reduce__()[0], type(np.dtype("f8"))]
    with torch.serialization.safe_globals(allowed):
        assert type(read_checkpoint(tmp_path / "a.pt")["value"]) is np.float64
        assert set(allowed) <= set(torch.serialization.get_safe_globals())


@pytest.mark.parametrize("verb", ["load", "load_weights", "resume"])
def test_torch_s_older_format_is_named_and_can_be_rewritten(tmp_path: Path, verb: str) -> None:
    content, path = plain(), tmp_path / "a.pt"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    model = make_model(3)
    verbs: dict[str, Any] = {
        "load": lambda: kt.Model.load(path, make_net(7), device="cpu"),
        "load_weights": lambda: model.load_weights(path),
        "resume": lambda: fit(model, resume=path),
    }
    with pytest.raises(
        CheckpointError, match=r"before 1\.6.*torch\.save\(torch\.load\(path, map_location='cpu'\), path\)"
    ):
        verbs[verb]()
    torch.save(torch.load(path, map_location="cpu"), path)
    assert_plain_recipe(path, content)


@pytest.mark.parametrize("run", [{"id": 3}, {}, {"step": 9, "epochs": 2}, "brave-owl-7", None, [1]])
def test_a_run_of_the_user_s_own_leaves_a_plain_recipe(tmp_path: Path, run: Any) -> None:
    content = plain(run=run)
    torch.save(content, tmp_path / "a.pt")
    assert_plain_recipe(tmp_path / "a.pt", content)


@pytest.mark.parametrize("verb", ["load", "resume"])
def test_a_run_of_ours_that_is_incomplete_is_refused(tmp_path: Path, verb: str) -> None:
    model = make_model()
    model.save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    verbs: dict[str, Any] = {
        "load": lambda path: kt.Model.load(path, make_net(), device="cpu"),
        "resume": lambda path: fit(model, resume=path),
    }
    for without in ("step", "history", "stop_training"):
        run = {key: value for key, value in content["run"].items() if key != without}
        for rest in (content, {key: content[key] for key in ("model_state_dict", "optimizer_state_dict", "epoch")}):
            torch.save({**rest, "run": run}, tmp_path / "b.pt")
            with pytest.raises(CheckpointError, match="no checkpoint that a run wrote"):
                verbs[verb](tmp_path / "b.pt")


@pytest.mark.parametrize("name", ["model_state_dict", "state_dict"])
def test_a_file_with_an_object_beside_the_weights_loads_with_trust(tmp_path: Path, name: str) -> None:
    content = plain(args=argparse.Namespace(lr=0.1), run={"id": 3})
    content[name] = content.pop("model_state_dict")
    path = tmp_path / "a.pt"
    torch.save(content, path)
    for act in (lambda: kt.Model.load(path, make_net()), lambda: make_model().load_weights(path)):
        with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*Model\.load\(path, net, trust=True\)"):
            act()
    with pytest.raises(CheckpointError, match=r"holds no net.*Model\.load\(path, net\)"):
        kt.Model.load(path, trust=True)
    loaded = kt.Model.load(path, make_net(7), trust=True, device="cpu")
    assert equal(loaded.net.state_dict(), content[name])
    loaded.save(tmp_path / "b.pt")
    loaded.compile("cross_entropy", "adam")
    assert loaded.optimizer is not None
    assert loaded.optimizer.state_dict()["state"][0]["step"] == 3


# ---- whole models ----


def test_a_whole_model_comes_back_with_its_net(tmp_path: Path) -> None:
    model = make_model()
    fit(model)
    model.save(tmp_path / "a.pt", whole=True)
    fit(model)
    loaded = kt.Model.load(tmp_path / "a.pt", trust=True, device="cpu")
    assert type(loaded.net) is Net
    assert loaded.net.tied is loaded.net.head
    fit(loaded)
    assert equal(loaded.net.state_dict(), model.net.state_dict())
    assert loaded.history.history == model.history.history


def test_a_whole_model_needs_trust(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "a.pt", whole=True)
    with pytest.raises(ValueError, match="needs the net"):
        kt.Model.load(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"could run code.*trust=True.*leave net away"):
        kt.Model.load(tmp_path / "a.pt", make_net())
    net = make_net(7)
    assert kt.Model.load(tmp_path / "a.pt", net, trust=True, device="cpu").net is net
    assert equal(net.state_dict(), model.net.state_dict())
    model.save(tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="holds no net"):
        kt.Model.load(tmp_path / "b.pt", trust=True)


def test_a_net_pickled_by_plain_torch_loads_with_trust(tmp_path: Path) -> None:
    torch.save(make_net(), tmp_path / "a.pt")
    loaded = kt.Model.load(tmp_path / "a.pt", trust=True, device="cpu")
    assert equal(loaded.net.state_dict(), make_net().state_dict())


def test_what_can_not_be_pickled_is_named_and_the_file_of_before_stays(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "a.pt", whole=True)
    before = (tmp_path / "a.pt").read_bytes()
    model.net.body[0].scale = lambda x: x
    with pytest.raises(TypeError, match=r"can't pickle net\.body\.0\.scale"):
        model.save(tmp_path / "a.pt", whole=True)
    assert (tmp_path / "a.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]
    model.save(tmp_path / "b.pt")

    class Local(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"can't pickle the class of net"):
        kt.Model(Local(2, 2), device="cpu").save(tmp_path / "c.pt", whole=True)
