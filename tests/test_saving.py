"""Weights and models come back from files to the bit, files of others are taken, and a refused file changes nothing."""

import json
import os
import random
import subprocess
import sys
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
from kerastorch.checkpoint import CheckpointError
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
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
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
    assert bare._metadata == make_net().state_dict()._metadata | {"": {"version": 1}}  # type: ignore[attr-defined]


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
    with pytest.raises(ValueError, match=r"'\.pt' or '\.safetensors'"):
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
    "scheduler": ({"lr_scheduler": None}, "lr_scheduler is StepLR, this run's NoneType"),
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


@pytest.mark.parametrize("name", ["a.safetensors", "a.keras", "a.h5"])
def test_a_model_is_not_saved_under_the_name_of_another_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"name it \.pt"):
        make_model().save(tmp_path / name)
    assert not os.listdir(tmp_path)


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
    with pytest.raises(CheckpointError, match="could run code"):
        kt.Model.load(tmp_path / "a.pt", make_net())
    with pytest.raises(ValueError, match="leave net away"):
        kt.Model.load(tmp_path / "a.pt", make_net(), trust=True)
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
