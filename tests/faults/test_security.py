"""A checkpoint from elsewhere runs nothing, eats neither memory nor time, and spoils nothing before it is refused.

Run as a script, with a folder, this file makes the attacks that could kill or hang a process, each in a fork.
"""

import ast
import copy
import functools
import importlib
import inspect
import io
import json
import os
import pickle
import random
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kerastorch as kt
from kerastorch.callbacks import EMA, BackupAndRestore, CSVLogger, EarlyStopping, ModelCheckpoint
from kerastorch.checkpoint import CheckpointError, read_checkpoint, read_trusted, write_checkpoint
from kerastorch.device import set_cpu_random_state
from kerastorch.saving import read_model

REFUSALS = (CheckpointError, ValueError, OSError)
X, Y = torch.linspace(-1, 1, 36).reshape(12, 3), torch.arange(12) % 2
posix_only = pytest.mark.skipif(os.name != "posix", reason="forks, FIFOs and resource limits")


def make_model(lr_scheduler: Any = None) -> kt.Model:
    torch.manual_seed(0)
    model = kt.Model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), device="cpu")
    model.compile("cross_entropy", "adam", ["accuracy", "f1_macro"], lr_scheduler=lr_scheduler)
    return model


def make_callbacks(folder: Path) -> list[kt.Callback]:
    stopping = EarlyStopping("loss", patience=5, restore_best_weights=True)
    checkpoint = ModelCheckpoint(folder / "at-{epoch}.pt", save_freq=2, keep_last=2)
    return [checkpoint, stopping, EMA(0.9), CSVLogger(folder / "log.csv", append=True)]


def fit(model: kt.Model, callbacks: list[kt.Callback], **arguments: Any) -> kt.History:
    return model.fit(X, Y, batch_size=4, epochs=3, verbose=0, callbacks=callbacks, **arguments)


class CutError(Exception):
    pass


class Cut(kt.Callback):
    """Ends a run in its fifth batch, the second of epoch 1, as a crash would."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.run.batches_seen >= 5:
            raise CutError


def make_run(folder: Path) -> dict[str, Any]:
    """Cut a run inside epoch 1; leave its log.csv and return the content of its last checkpoint."""
    with pytest.raises(CutError):
        fit(make_model(), [*make_callbacks(folder), Cut()])
    return read_checkpoint(folder / "at-2.pt")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("run")
    return make_run(folder), folder


# ---- files that would run code ----


class Call:
    """Pickles as a call that unpickling makes."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


def poisons(marker: Path) -> dict[str, Any]:
    script = marker.with_suffix(".py")
    text = f"open({str(marker)!r}, 'w').close()"
    script.write_text(text)
    (marker.parent / "hubconf.py").write_text(f"def entry(): {text}")
    whole = pickle.dumps(Call(eval, text))
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "os.mkdir": Call(os.mkdir, str(marker)),
        "eval": Call(eval, text),
        "exec": Call(exec, text),
        "open": Call(open, str(marker), "w"),
        "__import__": Call(__import__, "antigravity"),
        "importlib": Call(importlib.import_module, "this"),
        "runpy": Call(runpy.run_path, str(script)),
        "subprocess": Call(subprocess.Popen, ["touch", str(marker)]),
        "torch.hub": Call(torch.hub.load, str(marker.parent), "entry", "local"),
        "torch.load": Call(torch.load, str(script), None),
        "pickle.loads": Call(pickle.loads, whole),
        "partial": Call(functools.partial, Call(eval, text)),
        "a partial object": functools.partial(os.system, f"touch {marker}"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "types": Call(types.SimpleNamespace),
        "numpy": Call(np.fromfile, str(script)),
        "OrderedDict of a call": OrderedDict(a=Call(eval, text)),
        "module": nn.Linear(1, 1),
    }


POISONS = (
    "os.system",
    "os.mkdir",
    "eval",
    "exec",
    "open",
    "__import__",
    "importlib",
    "runpy",
    "subprocess",
    "torch.hub",
    "torch.load",
    "pickle.loads",
    "partial",
    "getattr",
    "types",
    "numpy",
    "module",
)
MORE_POISONS = ("a partial object", "OrderedDict of a call")


def assert_refused(path: Path, marker: Path, act: Callable[[], object], says: str = "") -> str:
    modules = set(sys.modules)
    with pytest.raises(REFUSALS) as raised:
        act()
    message = str(raised.value)
    assert not marker.exists()
    assert not {"antigravity", "this"} & (set(sys.modules) - modules)
    assert str(path) in message
    for advice in ("weights_only", "add_safe_globals", "safe_globals", "trust this"):
        assert advice not in message
    assert says in message
    return message


def message_of_refusal(act: Callable[[], object]) -> str | None:
    """Return the message of a clear error, None where there is no error; others come out."""
    try:
        act()
    except REFUSALS as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", [*POISONS, *MORE_POISONS])
def test_poison_is_refused_and_named_without_advice_to_run_it(tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    torch.save({"epoch": 0, "bad": poisons(marker)[name]}, path)
    says = {"module": "torch.nn.modules.linear.Linear", "numpy": "fromfile", "runpy": "run_path"}.get(name, "")
    message = assert_refused(path, marker, lambda: read_checkpoint(path), says)
    assert "could run code" in message


def put(content: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return a copy of content with value at place; ... takes the key away."""
    content = copy.deepcopy(content)
    holder: Any = content
    for key in place[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return content


PLACES = {
    "top level": ("extra",),
    "epoch": ("epoch",),
    "weights": ("model_state_dict", "0.weight"),
    "optimizer's state": ("optimizer_state_dict", "state", 0, "exp_avg"),
    "param group": ("optimizer_state_dict", "param_groups", 0, "lr"),
    "callback's state": ("callbacks", "EarlyStopping", "best_weights"),
    "checkpointer's state": ("checkpointers", "ModelCheckpoint", "written"),
    "history": ("run", "history", "logs"),
    "sums": ("run", "sums", "loss"),
    "random state": ("run", "random_state", "numpy"),
    "worker's random state": ("run", "train_data", "workers"),
}


@pytest.mark.parametrize("place", PLACES)
def test_poison_in_any_place_is_refused_by_every_way_in(tmp_path: Path, base: Any, place: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "backup.pt"
    torch.save(put(base[0], PLACES[place], Call(os.system, f"touch {marker}")), path)
    shutil.copy(path, tmp_path / "at-1.pt")
    ways: list[tuple[Path, list[kt.Callback], Any]] = [
        (path, [], path),
        (path, [BackupAndRestore(tmp_path, delete_checkpoint=False)], True),
        (path, [BackupAndRestore(tmp_path, delete_checkpoint=False)], None),
        (tmp_path / "at-1.pt", [ModelCheckpoint(tmp_path / "at-{epoch}.pt")], True),
    ]
    for named, callbacks, resume in ways:
        model = make_model()
        before = snapshot(model)
        assert_refused(
            named, marker, functools.partial(fit, model, callbacks, resume=resume), "'posix.system'" * is_posix
        )
        assert snapshot(model) == before
        assert path.exists()


is_posix = os.name == "posix"


def snapshot(model: kt.Model) -> bytes:
    """Return all of a model that a refused file must leave: weights, optimizer, random states, history."""
    assert model.optimizer is not None
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().numpy().tobytes()
    history = model.history.state_dict()
    buffer = io.BytesIO()
    torch.save((dict(model.net.state_dict()), model.optimizer.state_dict(), history), buffer)
    with zipfile.ZipFile(buffer) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist() if "serialization_id" not in entry}
    return repr((parts, states)).encode()


@pytest.mark.parametrize("name", POISONS[:4])
@pytest.mark.parametrize("form", ["raw pickle", "legacy", "tar", "tar of a pickle", "prefix", "script", "legacy + zip"])
def test_poison_in_another_form_of_file_is_refused(tmp_path: Path, name: str, form: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    bad = {"epoch": 0, "bad": poisons(marker)[name]}
    data = pickle.dumps(bad, 2)
    if form == "raw pickle":
        path.write_bytes(data)
    elif form == "legacy":
        torch.save(bad, path, _use_new_zipfile_serialization=False)
    elif form == "tar":
        with tarfile.open(path, "w") as tar:
            for entry in ("storages", "tensors", "pickle"):
                info = tarfile.TarInfo(entry)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    elif form == "tar of a pickle":
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("../data.pkl")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    elif form == "prefix":
        write_zip(path, data, prefix="../other")
    elif form == "script":
        write_zip(path, data, {"constants.pkl": data, "code/a.py": b"import os"})
    else:  # python's zipfile finds a zip at the end; torch looks at the beginning
        torch.save(bad, path, _use_new_zipfile_serialization=False)
        write_zip(tmp_path / "good.zip", PROTO + b"}.")
        path.write_bytes(path.read_bytes() + (tmp_path / "good.zip").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of TorchScript
        assert_refused(path, marker, lambda: read_checkpoint(path))


def test_harmless_pickle_before_a_zip_is_no_checkpoint(tmp_path: Path) -> None:
    """Whose checksums are verified must be what is loaded."""
    path = tmp_path / "a.pt"
    torch.save({"epoch": 1}, path, _use_new_zipfile_serialization=False)
    write_zip(tmp_path / "good.zip", PROTO + b"}.")
    path.write_bytes(path.read_bytes() + (tmp_path / "good.zip").read_bytes())
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


@pytest.mark.parametrize("first", [True, False])
def test_second_data_pkl_does_not_run(tmp_path: Path, first: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    good, bad = PROTO + b"}.", pickle.dumps(poisons(marker)["eval"], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, of the duplicate
        write_zip(path, bad if first else good, {"data.pkl": good if first else bad})
    message = message_of_refusal(lambda: read_checkpoint(path))
    assert message is None or str(path) in message
    assert not marker.exists()


def test_advice_to_load_unsafely_is_never_passed_on(tmp_path: Path) -> None:
    """Torch gives it for what its unpickler can't do, even where no class is named."""
    bad = {
        "class": PROTO + b"}" + text("x") + reduce("collections", "OrderedDict") + b"}ba",
        "set item": PROTO + b"]" + text("a") + text("b") + b"s.",
        "append": PROTO + b"}" + text("a") + b"a.",
        "reduce": PROTO + text("a") + b")R.",
        "newobj": PROTO + text("a") + b")\x81.",
        "persistent": PROTO + text("a") + b"Q.",
        "persistent tuple": PROTO + b"(" + text("module") + text("os") + b"tQ.",
        "build": PROTO + text("a") + b"}b.",
        "inst": PROTO + b"(ios\nsystem\n.",
        "stack global": PROTO + b"\x8c\x02os\x8c\x06system\x93.",
        "extension": PROTO + b"\x82\x01.",
        "empty": b"",
        "no memo": PROTO + b"h\x05.",
    }
    for name, data in bad.items():
        path = tmp_path / f"{name}.pt"
        write_zip(path, data)
        assert_refused(path, tmp_path / "marker", functools.partial(read_checkpoint, path))


def test_class_and_function_names_in_a_file_are_never_imported(
    tmp_path: Path, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "kt_probe.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    content = base[0]
    path = tmp_path / "a.pt"
    for place in (("run", "optimizer"), ("run", "lr_scheduler"), ("versions", "torch"), ("run", "loop")):
        for name in ("kt_probe.Thing", "os.system", "builtins.eval"):
            write_checkpoint(path, put(content, place, name))
            model = make_model()
            if place[1] in ("optimizer", "lr_scheduler"):
                with pytest.raises(ValueError, match=name):
                    fit(model, [], resume=path)
    forged = put(content, ("callbacks",), {"kt_probe.Thing": {"a": 1}, "builtins.eval": {"a": "1"}})
    forged["run"]["sums"]["metrics"] = {"kt_probe.Thing": {"inferred_from": "kt_probe.Thing", "metric": {}}}
    write_checkpoint(path, forged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the states that have no callback
        fit(make_model(), [], resume=path)
    write_zip(path, PROTO + b"}" + text("x") + b"ckt_probe\nThing\ns.")
    assert_refused(path, marker, lambda: read_checkpoint(path), "kt_probe.Thing")
    assert "kt_probe" not in sys.modules
    assert not marker.exists()


def test_bytes_in_the_place_of_a_worker_s_random_state_are_not_unpickled(tmp_path: Path, base: Any) -> None:
    marker = tmp_path / "marker"
    poison = pickle.dumps(poisons(marker)["eval"])
    with pytest.raises((TypeError, ValueError)):
        set_cpu_random_state(poison)
    path = tmp_path / "a.pt"
    write_checkpoint(path, put(base[0], ("run", "train_data", "workers"), {0: poison}))
    shutil.copy(base[1] / "log.csv", tmp_path)
    fit(make_model(), make_callbacks(tmp_path), resume=path)
    assert not marker.exists()


def test_package_unpickles_and_evaluates_nothing_that_a_file_holds() -> None:
    """The one pickle.loads is of random states that the process's own workers sent it; one function trusts files."""
    found, trusting = [], []
    root = Path(kt.__file__).parent
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            if last == "read_trusted":
                trusting.append(file.relative_to(root).as_posix())
            is_risky = name in ("eval", "exec", "compile", "__import__", "torch.load") or last in (
                *("import_module", "loads", "Unpickler", "run_path", "run_module", "find_class", "system", "Popen"),
                *("add_safe_globals", "safe_globals", "load_from_checkpoint", "load_state_dict_from_url"),
            )
            if is_risky and name != "json.loads":
                keywords = [f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords]
                found.append(f"{file.relative_to(root).as_posix()}: {name}({', '.join(keywords)})")
            if last == "load" and name.startswith(("np.", "numpy.")):
                assert "allow_pickle=False" in ast.unparse(node)
    loads = [line for line in found if "torch.load" in line]
    only = "checkpoint.py: torch.load(map_location='cpu', weights_only={})"
    assert sorted(loads) == [only.format(False), only.format(True)]
    assert "weights_only=False" in inspect.getsource(read_trusted)
    assert trusting == ["saving.py"]
    assert "if not trust:" in inspect.getsource(read_model).partition("read_trusted(")[0]
    numbers = "checkpoint.py: torch.serialization.safe_globals()"  # stand-ins for numpy's, in plain python
    assert found.count(numbers) == 1
    others = [line for line in found if line not in (*loads, numbers)]
    assert len(others) == 1
    assert others[0].startswith("data/")
    assert others[0].endswith(": pickle.loads()")


# ---- what is no regular file ----


def test_symlink_to_a_checkpoint_is_read_and_a_dangling_one_is_not_found(tmp_path: Path, base: Any) -> None:
    path = tmp_path / "a.pt"
    path.symlink_to(base[1] / "at-2.pt")
    assert read_checkpoint(path)["epoch"] == 0
    dangling = tmp_path / "dangling.pt"
    dangling.symlink_to(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"dangling\.pt"):
        read_checkpoint(dangling)


def test_loop_of_symlinks_and_a_folder_are_os_errors_with_the_path(tmp_path: Path) -> None:
    loop = tmp_path / "loop.pt"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match=r"loop\.pt"):
        read_checkpoint(loop)
    with pytest.raises(IsADirectoryError, match="folder"):
        read_checkpoint(tmp_path)


def test_link_planted_under_the_temporary_name_is_not_written_through(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "a.pt"
    victim.write_text("precious")
    for name in (f".a.pt.{os.getpid()}.tmp", f".a.pt.{os.getpid()}.0.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_checkpoint(path, {"epoch": 1})
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


# ---- pickles by hand ----

PROTO = b"\x80\x02"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def reduce(module: str, name: str, *args: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


def storage(numel: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(size: tuple[int, ...], stride: tuple[int, ...], numel: int, offset: int = 0) -> bytes:
    parts = storage(numel), number(offset), numbers(*size), numbers(*stride), b"\x89"
    return reduce("torch._utils", "_rebuild_tensor_v2", *parts, reduce("collections", "OrderedDict"))


def nest(depth: int) -> bytes:
    """A tuple of two that are the same tuple of two that ...: 2 ** depth leaves in `depth` objects."""
    return b")q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(depth))


def dict_of(value: bytes) -> bytes:
    return PROTO + b"}" + text("x") + value + b"s."


def write_zip(
    path: Path, data: bytes, records: dict[str, bytes] | None = None, prefix: str = "archive", compression: int = 0
) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{prefix}/data.pkl", data)
        archive.writestr(f"{prefix}/byteorder", "little")
        for name, record in (records or {}).items():
            archive.writestr(f"{prefix}/{name}", record)
        archive.writestr(f"{prefix}/version", "3\n")


FOUR = {"data/0": bytes(4)}
FORGED: dict[str, tuple[bytes, dict[str, bytes]]] = {
    "storage that claims a million": (dict_of(tensor((10**6,), (1,), 10**6)), FOUR),
    "storage that claims 10**12": (dict_of(tensor((10**12,), (1,), 10**12)), FOUR),
    "storage that claims less than nothing": (dict_of(tensor((1,), (1,), -1)), FOUR),
    "negative offset": (dict_of(tensor((1,), (1,), 1, offset=-100)), FOUR),
    "offset beyond": (dict_of(tensor((1,), (1,), 1, offset=10**9)), FOUR),
    "negative stride": (dict_of(tensor((4,), (-1,), 1)), FOUR),
    "size beyond": (dict_of(tensor((100,), (1,), 1)), FOUR),
    "size that overflows": (dict_of(tensor((2**62, 4), (1, 1), 1)), FOUR),
    "no record": (dict_of(tensor((1,), (1,), 1)), {}),
    "set_ beyond": (
        dict_of(reduce("torch", "Tensor") + b"(" + storage(1) + number(0) + numbers(10**6) + numbers(1) + b"tb"),
        FOUR,
    ),
    "text that claims 4 GB": (PROTO + b"X\xff\xff\xff\xffabc.", {}),
    "bytearray of 10**15": (dict_of(reduce("builtins", "bytearray", number(10**15))), {}),
    "Tensor of 10**15": (dict_of(reduce("torch", "Tensor", number(10**15))), {}),
    "list": (PROTO + b"].", {}),
    "tensor": (PROTO + tensor((1,), (1,), 1) + b".", FOUR),
    "keys that are no text": (PROTO + b"}" + number(1) + b"Ns.", {}),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_pickle_is_refused_with_the_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pt"
    write_zip(path, *FORGED[name])
    assert_refused(path, tmp_path / "marker", lambda: read_checkpoint(path))


# ---- zips that lie ----


def test_compressed_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_zip(path, PROTO + b"}.", {"data/0": bytes(10**6)}, compression=compression)
        with pytest.raises(CheckpointError, match=r"a\.pt.*compressed"):
            read_checkpoint(path)


def rewrite(data: bytearray, signature: bytes, offset: int, form: str, value: int, nth: int = 0) -> None:
    at = -1
    for _ in range(nth + 1):
        at = data.index(signature, at + 1)
    struct.pack_into(form, data, at + offset, value)


LIES: dict[str, Callable[[bytearray], None]] = {
    "central size": lambda data: rewrite(data, b"PK\x01\x02", 24, "<I", 2**31, nth=2),
    "both central sizes": lambda data: (
        [rewrite(data, b"PK\x01\x02", at, "<I", 10**6, nth=2) for at in (20, 24)] and None
    ),
    "one byte more": lambda data: [rewrite(data, b"PK\x01\x02", at, "<I", 5, nth=2) for at in (20, 24)] and None,
    "offset beyond the end": lambda data: rewrite(data, b"PK\x01\x02", 42, "<I", 2**31),
    "offset of another entry": lambda data: rewrite(data, b"PK\x01\x02", 42, "<I", 0, nth=2),
    "checksum": lambda data: rewrite(data, b"PK\x01\x02", 16, "<I", 1),
    "unknown compression": lambda data: rewrite(data, b"PK\x01\x02", 10, "<H", 77),
    "encrypted": lambda data: rewrite(data, b"PK\x01\x02", 8, "<H", 1),
    "more entries than there are": lambda data: rewrite(data, b"PK\x05\x06", 10, "<H", 60000),
    "directory beyond the end": lambda data: rewrite(data, b"PK\x05\x06", 16, "<I", 2**31),
    "directory of 2 GB": lambda data: rewrite(data, b"PK\x05\x06", 12, "<I", 2**31),
    "version needed": lambda data: rewrite(data, b"PK\x01\x02", 6, "<H", 99),
}


@pytest.mark.parametrize("lie", LIES)
def test_zip_whose_directory_lies_is_refused_or_read_as_it_is(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "a.pt"
    write_zip(path, dict_of(tensor((1,), (1,), 1)), {"data/0": struct.pack("<f", 7.0)})
    assert read_checkpoint(path)["x"].item() == 7
    data = bytearray(path.read_bytes())
    LIES[lie](data)
    path.write_bytes(data)
    message = message_of_refusal(lambda: read_checkpoint(path))
    if message is None:  # as with a count of entries that neither reader takes at its word
        assert read_checkpoint(path)["x"].item() == 7
    else:
        assert str(path) in message
        assert "weights_only" not in message


def test_many_entries_over_one_record_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", PROTO + b"}.")
        archive.writestr("archive/data/0", bytes(10**5))
        archive.filelist += [archive.filelist[-1]] * 50
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"a\.pt.*unpack"):
        read_checkpoint(path)


# ---- whole and well-formed, with values that make no sense ----

NUMPY = ("run", "random_state", "numpy")
SUMS = ("run", "sums")
STOPPING = ("callbacks", "EarlyStopping")
WRITTEN = ("checkpointers", "ModelCheckpoint", "written")
OPTIMIZER = ("optimizer_state_dict",)
GROUP = (*OPTIMIZER, "param_groups", 0)
SLOTS = (*OPTIMIZER, "state", 0)
WEIGHTS = ("training_model_state_dict",)
F1 = (*SUMS, "metrics", "f1_macro")
KEY = torch.zeros(624, dtype=torch.int64)


def without_memory(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)


NONSENSE: list[tuple[tuple[Any, ...], Any]] = [
    *[(("epoch",), value) for value in (-5, 10**12, "3", None, 1.5)],
    *[(("run",), value) for value in (3, [], {}, "x", None)],
    *[(("run", "batches_done"), value) for value in ("3", -7, 10**12, None, ...)],
    *[(("run", "batches_seen"), value) for value in ("3", -7, None, ...)],
    *[(("run", "step"), value) for value in ("3", -7, None, ...)],
    *[(("run", name), ...) for name in ("initial_epoch", "epoch_is_trained", "stop_training")],
    (("run", "stop_training"), 0),
    (("run", "optimizer"), ...),
    *[(("run", "history"), value) for value in (3, {}, [1], ...)],
    (("run", "history", "epoch"), 3),
    (("run", "history", "epoch"), [0, 1, 2]),
    (("run", "history", "logs"), "abc"),
    (("run", "history", "logs"), [3]),
    *[(("run", "earlier_history"), value) for value in (3, {}, ...)],
    *[(SUMS, value) for value in (3, {}, ...)],
    *[((*SUMS, "loss"), value) for value in (torch.zeros(5), "x", None, without_memory(10**12))],
    *[((*SUMS, "num_samples"), value) for value in ("x", -3, None)],
    ((*SUMS, "parts"), 3),
    ((*SUMS, "metrics"), 3),
    *[
        ((*F1, "inferred_from"), value)
        for value in (
            3,
            [["a"], torch.float32, [4], torch.int64],
            [[4, 2], "float32", [4], torch.int64],
            [[-4, 2], torch.float32, [4], torch.int64],
        )
    ],
    ((*F1, "metric", "", "updates"), "x"),
    ((*F1, "metric", "", "updates"), ...),
    ((*SUMS, "metrics", "accuracy", "metric", "sum"), "x"),
    *[(("run", "random_state"), value) for value in (3, {}, ...)],
    *[(("run", "random_state", "python"), value) for value in (3, (3, (1,) * 5, None), (3, (-1,) * 625, None), ...)],
    *[
        (("run", "random_state", "torch"), value)
        for value in (3, torch.zeros(3), torch.zeros(3, dtype=torch.uint8), torch.zeros(5056, dtype=torch.uint8), ...)
    ],
    *[(NUMPY, value) for value in (3, [KEY[:3], 0, 0, 0.0], [KEY, "x", 0, 0.0], ...)],
    *[(NUMPY, [KEY, position, 0, 0.0]) for position in (10**9, -50)],
    (("run", "random_state", "generators"), [torch.zeros(3)]),
    (("run", "random_state", "cuda"), ...),
    *[(("run", "train_data"), value) for value in (3, {}, [1], ...)],
    *[(("run", "train_data", "batches"), value) for value in ("3", -5, 10**12, ...)],
    *[(("run", "train_data", "num_batches"), value) for value in (10**12, ...)],
    (("run", "train_data", "num_workers"), ...),
    (("run", "train_data", "generators"), 3),
    *[(("callbacks",), value) for value in (3, [], None, "x")],
    *[(("checkpointers",), value) for value in (3, [], None, ...)],
    *[(STOPPING, value) for value in (3, [], {}, None)],
    *[((*STOPPING, "best"), value) for value in ("x", {})],
    *[((*STOPPING, "wait"), value) for value in ("x", ...)],
    *[(("callbacks", "CSVLogger"), value) for value in (3, {})],
    *[(("callbacks", "CSVLogger", "bytes"), value) for value in ("x",)],
    *[(("callbacks", "EMA"), value) for value in (3, {})],
    (("callbacks", "EMA", "module.0.weight"), torch.zeros(1)),
    *[(WRITTEN, value) for value in (3, "x", [[3, 1.0]], [["a"]], ...)],
    *[(("checkpointers", "ModelCheckpoint", "batches_at_save"), value) for value in ("x", ...)],
    *[(OPTIMIZER, value) for value in (3, {}, {"state": {}}, {"state": {}, "param_groups": 3})],
    *[((*OPTIMIZER, "param_groups"), value) for value in ([3], [{}], [{"params": 3}], [])],
    *[((*OPTIMIZER, "state"), value) for value in (3, ...)],
    *[((*GROUP, "lr"), value) for value in ("x", None, ...)],
    *[((*GROUP, "betas"), value) for value in (3, ("a", "b"), ...)],
    ((*GROUP, "params"), [[1]] * 6),
    ((*GROUP, "params"), [0] * 6),
    ((*GROUP, "other"), 5),
    (SLOTS, 3),
    *[((*SLOTS, "exp_avg"), value) for value in ("x", 3, torch.zeros(1))],
    ((*SLOTS, "exp_avg"), torch.zeros(4, 3, device="meta")),
    *[((*SLOTS, "step"), value) for value in ("x", torch.zeros(5), ...)],
    ((*SLOTS, "step"), without_memory(10**12)),
    ((*SLOTS, "other"), without_memory(10**12, dtype=torch.float64)),
    (WEIGHTS, 3),
    ((*WEIGHTS, "2.bias"), torch.zeros(2, device="meta")),
    ((*WEIGHTS, "2.bias"), torch.zeros(2, dtype=torch.complex64)),
    ((*WEIGHTS, "0.weight"), torch.zeros(4, 3).to_sparse()),
    ((*WEIGHTS, "0.weight"), "x"),
]


def label(place: tuple[Any, ...], value: Any) -> str:
    shown = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(value)
    shown = f"position {value[1]}" if place == NUMPY and isinstance(value, list) and len(value[0]) == 624 else shown
    shown = "nothing" if value is ... else shown
    return f"{'.'.join(map(str, place))} = {' '.join(shown.split())[:50]}"


@pytest.mark.parametrize(("place", "value"), NONSENSE, ids=[label(*case) for case in NONSENSE])
def test_nonsense_is_refused_and_nothing_is_touched(
    tmp_path: Path, base: tuple[dict[str, Any], Path], place: tuple[Any, ...], value: Any
) -> None:
    path = tmp_path / "file.pt"
    torch.save(put(base[0], place, value), path)
    assert_refused_untouched(tmp_path, base[1], path)


def assert_refused_untouched(folder: Path, origin: Path, path: Path) -> None:
    for name in ("log.csv", "at-1.pt", "at-2.pt"):
        shutil.copy(origin / name, folder / name)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = make_model()
    before = snapshot(model)
    random_state = np.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            message = message_of_refusal(lambda: fit(model, make_callbacks(folder), resume=path))
    finally:
        np.random.set_state(random_state)  # one with a position beyond its key would read memory of others
    assert message is not None, "it was taken"
    problems = [] if str(path) in message else [f"does not name the file: {message}"]
    problems += [] if snapshot(model) == before else ["the model, optimizer, random states or history were touched"]
    left = {file.name: file.read_bytes() for file in folder.iterdir()}
    problems += [] if left == files else ["files were touched"]
    assert not problems


def test_hostile_versions_of_modules_are_refused_or_let_be(tmp_path: Path, base: tuple[dict[str, Any], Path]) -> None:
    """What nn.Module.load_state_dict reads beside the weights."""
    for metadata in ({"": {"version": "x"}, "1": {"version": "x"}}, 3, {"1": 3}):
        content = copy.deepcopy(base[0])
        content[WEIGHTS[0]]._metadata = metadata
        path = tmp_path / "file.pt"
        torch.save(content, path)
        model = make_model()
        before = snapshot(model)
        shutil.copy(base[1] / "log.csv", tmp_path)
        message = message_of_refusal(functools.partial(fit, model, make_callbacks(tmp_path), resume=path))
        assert message is None or (str(path) in message and snapshot(model) == before)


HARMLESS: list[tuple[tuple[Any, ...], Any]] = [
    (("run", "epochs"), 10**12),
    (("extra",), ["os.system"]),
    (("versions",), ...),
    ((*SUMS, "metrics", "os.system"), {"inferred_from": 3}),
    (("callbacks", "EMA", "n_averaged"), torch.tensor(5)),
    (("model_state_dict",), {"other": torch.zeros(1)}),
    ((*WEIGHTS, "2.bias"), torch.full((2,), torch.nan)),
    ((*WEIGHTS, "2.bias"), torch.zeros(2, dtype=torch.float64)),
    ((*F1, "metric", "", "compute"), "x"),
    ((*F1, "metric", "", "__class__"), "x"),
    (WRITTEN, [["/etc/hostname", 1.0], ["../../x.pt", 0.0], ["", 0.0]]),
    (("checkpointers", "ModelCheckpoint", "last_path"), "/etc/hostname"),
]


@pytest.mark.parametrize(("place", "value"), HARMLESS, ids=[label(*case) for case in HARMLESS])
def test_oddity_that_harms_nothing_lets_the_run_go_on(tmp_path: Path, base: Any, place: Any, value: Any) -> None:
    shutil.copy(base[1] / "log.csv", tmp_path)
    path = tmp_path / "file.pt"
    torch.save(put(base[0], place, value), path)
    assert fit(make_model(), make_callbacks(tmp_path), resume=path).epoch == [0, 1, 2]


def test_nan_in_a_resumed_file_shows_in_the_history(tmp_path: Path, base: Any) -> None:
    path = tmp_path / "file.pt"
    torch.save(put(base[0], (*GROUP, "lr"), torch.nan), path)
    shutil.copy(base[1] / "log.csv", tmp_path)
    history = fit(make_model(), make_callbacks(tmp_path), resume=path)
    assert history.history["loss"][-1] != history.history["loss"][-1]


@pytest.mark.parametrize("template", ["{epoch}.pt", "{loss:.2f}/model.pt", "{epoch}-{loss:.2f}.pt", "run {epoch}/a.pt"])
def test_forged_list_of_written_files_deletes_nothing_elsewhere(tmp_path: Path, base: Any, template: str) -> None:
    folder = tmp_path / "inner" / "folder"
    folder.mkdir(parents=True)
    precious = [tmp_path / "inner" / name for name in ("model.pt", "1.pt", "a.pt", "1-x.pt")]
    for file in precious:
        file.write_text("precious")
    forged = [[str(file), 1.0] for file in precious]
    forged += [[str(folder / ".." / file.name), 1.0] for file in precious]
    forged += [[f"{folder}/1/../../{file.name}", 1.0] for file in precious]
    path = folder / "file.pt"
    torch.save(put(base[0], WRITTEN, forged), path)
    checkpoint = ModelCheckpoint(folder / template, keep_last=1, save_freq="epoch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the states that have no callback
        fit(make_model(), [checkpoint], resume=path)
    assert [file.read_text() for file in precious] == ["precious"] * 4


# ---- what could kill, hang or starve the process: each in a fork of one child ----


def laughs(depth: int = 40) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def deep(depth: int = 150) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


PICKLE_BOMBS: dict[str, bytes] = {
    "value of 2**60 leaves": dict_of(nest(60)),
    "value a hundred thousand deep": dict_of(b")" + b"\x85" * 10**5),
    "lists a hundred thousand deep": dict_of(b"]" * 10**5 + b"a" * (10**5 - 1)),
    "bytearray of 3 GB": dict_of(reduce("builtins", "bytearray", number(3 * 10**9))),
    "Tensor of 4 GB": dict_of(reduce("torch", "Tensor", number(10**9))),
}
VALUE_BOMBS: dict[str, tuple[tuple[Any, ...], Callable[[], Any]]] = {
    "laughs for the optimizer's name": (("run", "optimizer"), laughs),
    "laughs in a callback's state": ((*STOPPING, "best_epoch"), laughs),
    "laughs in the history": (("run", "history", "logs"), lambda: [{"loss": laughs()}]),
    "laughs in a param group": ((*GROUP, "other"), laughs),
    "laughs in a counter": (("run", "initial_epoch"), laughs),
    "laughs for the number of batches": (("run", "train_data", "num_batches"), laughs),
    "a deep list in a param group": ((*GROUP, "other"), deep),
    "a deep list in the history": (("run", "history", "logs"), lambda: [{"loss": deep()}]),
    "a list in itself": ((*GROUP, "other"), cyclic),
    "a wide metric": ((*F1, "inferred_from"), lambda: [[4, 10**8], torch.float32, [4], torch.int64]),
    "a tall metric": (
        (*SUMS, "metrics", "accuracy", "inferred_from"),
        lambda: [[3 * 10**8, 2], torch.float32, [3 * 10**8], torch.int64],
    ),
    "a slot of 10**8 doubles in 8 bytes": ((*SLOTS, "other"), lambda: without_memory(10**8, dtype=torch.float64)),
    "a stride of 0 in the sums": ((*SUMS, "loss"), lambda: without_memory(10**9)),
    "numpy's random state read beyond its end": (NUMPY, lambda: [KEY, 2**31 - 1, 0, 0.0]),
}
DEVICES = ("FIFO", "/dev/zero", "/dev/urandom", "/dev/null", "FIFO in the backup folder")


def attack(name: str, folder: Path, content: dict[str, Any]) -> None:
    path = folder / "file.pt"
    if name in PICKLE_BOMBS:
        write_zip(path, PICKLE_BOMBS[name])
        read_checkpoint(path)
    elif name in VALUE_BOMBS:
        place, make = VALUE_BOMBS[name]
        torch.save(put(content, place, make()), path)
        fit(make_model(), make_callbacks(folder), resume=path)
        np.random.rand()
    elif name == "FIFO in the backup folder":
        os.mkfifo(folder / "backup.pt")
        fit(make_model(), [BackupAndRestore(folder)])
    else:
        if name == "FIFO":
            os.mkfifo(path)
        else:
            path.symlink_to(name)
        fit(make_model(), [], resume=path)


ATTACKS = (*PICKLE_BOMBS, *VALUE_BOMBS, *DEVICES)


def run_in_fork(name: str, folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    import resource

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(4)
        resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + 10**9
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result: dict[str, Any] = {"error": None, "message": ""}
        try:
            attack(name, folder, content)
        except BaseException as error:
            result = {"error": type(error).__name__, "message": str(error)[:2000]}
            result["is_clear"] = isinstance(error, REFUSALS)
        result["kilobytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(answer) if answer else {"died": signal.Signals(os.WTERMSIG(status)).name}


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    warnings.simplefilter("ignore")
    content = make_run(folder)
    for i, name in enumerate(ATTACKS):
        inner = folder / str(i)
        inner.mkdir()
        print(json.dumps([name, run_in_fork(name, inner, content)]), flush=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("attacks")
    root = str(Path(kt.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return dict(json.loads(line) for line in done.stdout.splitlines())


def assert_survived(outcome: dict[str, Any]) -> None:
    assert "died" not in outcome, f"hung, or was killed: {outcome}"
    assert outcome["kilobytes"] < 200_000, f"took memory: {outcome}"
    assert outcome["error"] is None or outcome["is_clear"], f"no clear error: {outcome}"


@pytest.mark.slow
@posix_only
@pytest.mark.parametrize("name", PICKLE_BOMBS)
def test_pickle_that_torch_itself_chokes_on_does_not_hang_kill_or_starve(outcomes: Any, name: str) -> None:
    assert_survived(outcomes[name])


@pytest.mark.slow
@posix_only
@pytest.mark.parametrize("name", VALUE_BOMBS)
def test_value_that_unfolds_when_looked_at_does_not_hang_kill_or_starve(outcomes: Any, name: str) -> None:
    assert_survived(outcomes[name])


@pytest.mark.slow
@posix_only
@pytest.mark.parametrize("name", DEVICES)
def test_device_or_fifo_does_not_hang_or_starve(outcomes: Any, name: str) -> None:
    assert_survived(outcomes[name])
    if name != "FIFO in the backup folder":
        assert outcomes[name]["error"] is not None
        assert "file.pt" in outcomes[name]["message"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
