"""The on-disk format: the usual PyTorch recipe's dict in one file, written whole or not at all, read without pickle.

The only file that calls torch.save and torch.load, and safetensors. Sisters: history.py, data/.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import shutil
import stat
import threading
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kerastorch.file_lock import FileLock

PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype)
LARGE_WRITE = 2**20  # bytes
MAX_DEPTH, MAX_VALUES, MAX_EXPANDED_BYTES = 100, 10**7, 10**6  # of a file that may be forged
IS_FOLDER = 0x10  # in a zip entry's attributes, as DOS had them
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 begin
NUMPY_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
CAN_NOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # what a file system says that syncs no folders


class CheckpointError(RuntimeError):
    """A file that can't be used as a checkpoint: damaged, unsafe or of another kind."""


class UnsafeError(CheckpointError):
    """A file that asks for more than data, so that opening it could run code."""


def write_checkpoint(
    path: str | os.PathLike[str], content: Mapping[str, Any], *, last_good: str | os.PathLike[str] | None = None
) -> None:
    """Write content (tensors and plain containers) to path so that a crash leaves the old file or the new one, whole.

    The file opens with torch.load(path, weights_only=True); where path is a link it is the link's target. What killed
    writers of this file left behind is removed.
    last_good: the file that the error names as still whole, where path itself does not exist yet.
    Raises TypeError, naming the key, for content that such a file can't hold; OSError, with the path, the reason and
    the bytes needed, where it can't be written.
    """
    check_plain(content)
    _write_archive(path, content, last_good)


def write_whole(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write content with modules in it, which only read_trusted opens, as safely as write_checkpoint.

    Raises what pickle does of things that it can't hold; OSError as write_checkpoint.
    """
    _write_archive(path, content, None)


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors to a .safetensors file, as safely as write_checkpoint; each name with data of its own.

    Raises ImportError where safetensors is not installed (the extra "safetensors"); TypeError, naming the key, for what
    such a file can't hold; OSError as write_checkpoint.
    """
    safetensors = _import_safetensors()
    dense: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
            kind = str(value.layout) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"a .safetensors file holds dense tensors, but {key!r} is a {kind}: write to a .pt file.")
        dense[key] = value.detach().to("cpu").contiguous()
        if dense[key].untyped_storage().data_ptr() in storages:  # tied, or a view: the format has no such thing
            dense[key] = dense[key].clone()
        storages.add(dense[key].untyped_storage().data_ptr())

    def write(temporary: Path) -> None:
        try:
            safetensors.save_file(dense, temporary, metadata={"format": "pt"})
        except Exception as error:  # its own kind, which holds the disk's error as text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise TypeError(f"a .safetensors file can't hold these weights: {error}.") from error
            raise OSError(int(number[1]), str(error)) from error
        with open(temporary, "rb+", buffering=0) as file:
            os.fsync(file.fileno())

    _write_atomically(path, tensors, None, write)


def _write_archive(
    path: str | os.PathLike[str], content: Mapping[str, Any], last_good: str | os.PathLike[str] | None
) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "xb", buffering=0) as file:
            torch.save(content, cast(IO[bytes], _WholeWriter(file)))
            os.fsync(file.fileno())

    _write_atomically(path, content, last_good, write)


def _write_atomically(
    path: str | os.PathLike[str],
    content: Mapping[str, Any],
    last_good: str | os.PathLike[str] | None,
    write: Callable[[Path], None],
) -> None:
    path = Path(os.path.realpath(path))
    good = path if os.path.exists(path) else last_good
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link may have been planted there
        write(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # where the folder has gone too
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch's zip writer makes a RuntimeError of a full disk
            raise _not_written(error, path, content, good) from error
        raise
    remove_leftovers(path.parent, path.name.__eq__)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what write_checkpoint, or the usual torch.save of a dict, wrote; tensors on the CPU. Runs no code.

    Numbers of numpy's come as python's own.
    Raises FileNotFoundError or another OSError where there is no file to read; CheckpointError, saying what is wrong
    and with which part, for a damaged file, one of before torch 1.6, one that unpacks to more bytes than it has, or one
    that holds no dict; its kind UnsafeError for one that could run code.
    """
    path = Path(path)
    with _open_archive(path) as file:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_stand_ins()):
                warnings.simplefilter("ignore")  # torch's, about sparse tensors
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a forged file makes torch raise
            kind = UnsafeError if _could_run_code(error) else CheckpointError
            raise kind(f"{str(path)!r} can't be loaded: {_reason(error)}.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, not a checkpoint's dict.")
    try:
        _check_size(content)
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is no checkpoint that a run wrote: {error}.") from None
    return content


def read_trusted(path: str | os.PathLike[str]) -> Any:
    """Return what write_whole wrote, or any torch.save; tensors on the CPU. Runs whatever code the file holds.

    Raises as read_checkpoint for a file that is not there or damaged; what unpickling raises comes out.
    """
    with _open_archive(Path(path)) as file:
        return torch.load(file, map_location="cpu", weights_only=False)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file by name, on the CPU. The format has no checksums.

    Raises ImportError where safetensors is not installed (the extra "safetensors"); OSError where there is no file;
    CheckpointError for one that is cut short or of another kind.
    """
    safetensors = _import_safetensors()
    _check_is_file(Path(path))
    try:
        tensors: dict[str, Tensor] = safetensors.load_file(path)
    except Exception as error:  # its own kind, or whatever a forged header makes it raise
        raise CheckpointError(f"{str(path)!r} is damaged, or no .safetensors file: {error}.") from error
    return tensors


class CheckpointWriter:
    """What a callback writes through: one file at a time, into a place that no other writer has.

    owner: what errors call the callback.   place: the path, or template of paths, that it writes to.
    is_async: copy the content to the CPU and write it in a thread, while training goes on.
    """

    def __init__(self, owner: str, place: Path, *, is_async: bool) -> None:
        self.is_async = is_async
        self.last_path: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        name = re.sub(r"[^\w.-]", "_", place.name)
        lock = place.with_name(f".{name}.lock")
        try:
            self._lock = FileLock(lock)
        except BlockingIOError:
            raise ValueError(
                f"{owner} can't write to {str(place)!r}: another callback or run writes there (it holds {str(lock)!r})."
            ) from None

    def write(self, path: Path, content: Mapping[str, Any], after: Callable[[], None]) -> None:
        """Write content to path, then call after(). Raises as write_checkpoint; in a thread, at the next call."""
        self.wait()
        if not self.is_async:
            self._write(path, content, after)
            return
        check_plain(content)
        self._thread = threading.Thread(target=self._try_to_write, args=(path, copy_to_cpu(content), after))
        self._thread.start()

    def wait(self) -> None:
        """Wait for the file that is being written; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait, and let others write there."""
        try:
            self.wait()
        finally:
            self._lock.release()

    def _write(self, path: Path, content: Mapping[str, Any], after: Callable[[], None]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_written(error, path, content, self.last_path) from error
        write_checkpoint(path, content, last_good=self.last_path)
        self.last_path = path
        after()

    def _try_to_write(self, path: Path, content: Mapping[str, Any], after: Callable[[], None]) -> None:
        try:
            self._write(path, content, after)
        except Exception as error:
            self._error = error


def remove_leftovers(folder: Path, is_ours: Callable[[str], object]) -> None:
    """Delete what killed writers of files in folder, of names that are ours, left half written."""
    for path in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
        if match is not None and is_ours(match[1]):
            path.unlink(missing_ok=True)


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Return paths by the time they were written; within one tick of the clock by the numbers in their names."""

    def age(path: Path) -> tuple[int, list[int]]:
        return path.stat().st_mtime_ns, [int(number) for number in re.findall(r"\d+", path.name)]

    return sorted(paths, key=age, reverse=True)


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "a .safetensors file needs safetensors, which is not installed: pip install 'kerastorch[safetensors]'. "
            "A .pt file needs nothing more."
        ) from error
    return safetensors.torch


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a checkpoint is a file, but this is a folder", str(path))
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise CheckpointError(f"{str(path)!r} is no ordinary file.")


@contextmanager
def _open_archive(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that torch.save wrote, after its checksums are verified."""
    _check_is_file(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        is_legacy = file.read(len(LEGACY)) == LEGACY
        file.seek(0)
        if is_legacy:  # without checksums, and with sizes that only loading it tells
            raise CheckpointError(
                f"{str(path)!r} is of torch's format of before 1.6, which has no checksums: "
                "torch.save(torch.load(path, map_location='cpu'), path) rewrites it."
            )
        damage = _find_damage(file, size)
        if damage is not None:
            raise CheckpointError(f"{str(path)!r} ({size} bytes) is damaged, or no checkpoint: {damage}.")
        file.seek(0)
        yield file


def _find_damage(file: IO[bytes], size: int) -> str | None:
    """Return what is wrong with a zip archive as torch writes it: torch.load itself passes a flipped byte."""
    if file.read(4) != b"PK\x03\x04":
        return "it does not begin as a zip archive"  # torch.load would take it for the older format
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return "its parts are compressed, which torch.save does not do"
            if sum(entry.file_size for entry in entries) > size:
                return "it would unpack to more bytes than it has"
            if any(entry.is_dir() or entry.external_attr & IS_FOLDER for entry in entries):
                return "a part of it is a folder"
            bad = archive.testzip()
            return None if bad is None else f"its part {bad!r} has another checksum than when it was written"
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, OverflowError, OSError) as error:
        return str(error) or type(error).__name__


def _check_size(content: Any) -> None:
    """Raise ValueError for what in a loaded file would take time or memory out of proportion to its size."""
    measured: dict[int, tuple[int, int]] = {}  # (values, levels) of a container; one may stand in many places

    def measure(value: Any, depth: int) -> tuple[int, int]:
        if isinstance(value, Tensor):
            _check_tensor(value)
        if isinstance(value, _NumpyDtype):
            raise ValueError("it has a numpy.dtype")
        if not isinstance(value, (Mapping, list, tuple, set)):
            return 1, 0
        if id(value) not in measured:
            if depth > MAX_DEPTH:
                raise ValueError(f"it nests deeper than {MAX_DEPTH}")
            items = [*value, *value.values()] if isinstance(value, Mapping) else value
            sizes = [measure(item, depth + 1) for item in items]
            measured[id(value)] = (
                1 + sum(count for count, _ in sizes),
                1 + max((level for _, level in sizes), default=0),
            )
        count, levels = measured[id(value)]
        if count > MAX_VALUES or depth + levels > MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_VALUES} values or nests deeper than {MAX_DEPTH}")
        return count, levels

    measure(content, 0)


def _check_tensor(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"it has a tensor on {tensor.device}")
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.layout is torch.strided and nbytes > max(tensor.untyped_storage().nbytes(), MAX_EXPANDED_BYTES):
        raise ValueError(f"it has a tensor of shape {tuple(tensor.shape)} with less data than that")


def check_plain(value: Any, key: str = "", *, takes_lazy: bool = False) -> None:
    """Raise TypeError, naming the key, unless value is made of what torch.load(weights_only=True) reads.

    takes_lazy: whether weights may wait for their shape, as before the first batch.
    """
    if type(value) in (dict, OrderedDict, Counter):
        for name, item in value.items():
            check_plain(name, f"the key {name!r} of {key or 'the checkpoint'}")
            check_plain(item, f"{key}[{name!r}]", takes_lazy=takes_lazy)
    elif type(value) in (list, tuple, set):
        for i, item in enumerate(value):
            check_plain(item, f"{key}[{i}]", takes_lazy=takes_lazy)
    elif is_lazy(value):
        if not takes_lazy:
            raise TypeError(
                f"a checkpoint can't hold {key}, whose shape is not known yet: run one batch through the lazy net "
                "before compile(), for example net(x[:1])."
            )
    elif type(value) not in (*PLAIN_TYPES, Tensor, nn.Parameter):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(
            f"a checkpoint can't hold {key}, a {kind}: it takes tensors, numbers, strings, None, and lists, tuples and "
            "dicts of them, so that it opens without running code."
        )


def num_bytes(value: Any) -> int:
    """Return the bytes of the tensors in content, each storage once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(value)
    return sum(storages.values())


def copy_to_cpu(value: Any, copies: dict[tuple[object, ...], Tensor] | None = None) -> Any:
    """Return content with its tensors copied to the CPU; one that stands in it twice is copied once."""
    copies = {} if copies is None else copies
    if is_lazy(value):  # there is nothing in it
        return value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return value.detach().to("cpu", copy=True)
        key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if key not in copies or value.numel() == 0:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        copied = type(value)((name, copy_to_cpu(item, copies)) for name, item in value.items())
        if hasattr(value, "_metadata"):  # the versions of modules, beside a state_dict's items
            vars(copied)["_metadata"] = value._metadata
        return copied
    if type(value) in (list, tuple):
        return type(value)(copy_to_cpu(item, copies) for item in value)
    return value


class _WholeWriter(io.RawIOBase):
    """Writes all of each buffer to an unbuffered file, which may take a part at a time; torch takes that for an end."""

    def __init__(self, file: io.RawIOBase) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[self.file.write(rest) or 0 :]
        count = memoryview(data).nbytes
        if count >= LARGE_WRITE and hasattr(os, "posix_fadvise"):  # the disk begins now: fsync then waits less
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return count


def _not_written(
    error: BaseException, path: Path, content: Mapping[str, Any], good: str | os.PathLike[str] | None
) -> OSError:
    first: BaseException | None = error
    while first is not None and not isinstance(first, OSError):
        first = first.__context__
    number = first.errno if isinstance(first, OSError) and first.errno is not None else errno.EIO
    reason = os.strerror(number) if first is not None else str(error)
    needed = f"it takes about {_format_bytes(num_bytes(content))}"
    if path.parent.is_dir():
        needed += f", {_format_bytes(shutil.disk_usage(path.parent).free)} are free on its disk"
    still = f"; {str(good)!r} of before is still whole" if good is not None else ""
    return OSError(number, f"checkpoint {str(path)!r} could not be written: {reason}; {needed}{still}")


def _format_bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


class _NumpyDtype:
    """What "numpy.dtype" makes of a file: numpy's own believes forged flags and reads memory that is not its own."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _numpy_number(dtype: Any, data: Any) -> Any:
    """Return the python number that a scalar of numpy's stands for, from its bytes."""
    import numpy as np

    if type(dtype) is not _NumpyDtype or type(dtype.code) is not str or type(data) is not bytes:
        raise ValueError("it has a scalar of numpy's without its dtype or its bytes")
    if dtype.code not in NUMPY_NUMBERS or dtype.order not in ("<", ">", "=", "|"):
        raise ValueError(f"it has a scalar of numpy's of type {dtype.code[:20]!r}, which is no plain number")
    values = np.frombuffer(data, dtype.order + dtype.code)
    if len(values) != 1:
        raise ValueError(f"it has a scalar of numpy's of type {dtype.code!r} with {len(data)} bytes")
    return values[0].item()


def _numpy_stand_ins() -> list[Any]:
    """Return what torch is to call for the names of numpy's that a pickled np.float64(0.5) has; it runs nothing."""
    import numpy as np

    theirs = {np.dtype, np.float64(0).__reduce__()[0]}
    allowed = torch.serialization.get_safe_globals()
    if any((one[0] if isinstance(one, tuple) else one) in theirs for one in allowed):
        return []  # torch would choose by chance between them and what the user allowed
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # numpy 1 and 2
    return [(_NumpyDtype, "numpy.dtype"), *[(_numpy_number, name) for name in names]]


def _could_run_code(error: Exception) -> bool:
    return isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)


def _reason(error: Exception) -> str:
    """Say what a file needed that is not loaded; torch's own text advises to load it in the way that runs code."""
    text = str(error)
    if _could_run_code(error):
        name = re.search(r"GLOBAL (\S+)", text)
        what = f"it asks for {name[1].rstrip('.,')!r}" if name else "it asks for more than data"
        return f"{what}, which could run code. Only tensors and plain containers are loaded"
    return text.splitlines()[0] if text else type(error).__name__


def sync_folder(folder: Path) -> None:
    """Let what was renamed in a folder outlive a crash of the machine."""
    if os.name != "posix":  # a folder can't be opened for fsync elsewhere
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CAN_NOT_SYNC:
            raise
    finally:
        os.close(descriptor)
