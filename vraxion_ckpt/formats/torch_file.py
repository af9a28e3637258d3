"""The one door to torch's file format: load safely and mapped, save.

Before torch sees a file, its container is checked (`vraxion_ckpt.formats.torch_archive`) and its pickle is rehearsed
(`vraxion_ckpt.formats.pickle_dry_run`); after torch, whatever is not plain data is refused
(`vraxion_ckpt.checkpoint.plain_data`). Nothing else in this project opens or writes a ``.pt``.
"""

from __future__ import annotations

import pickle
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy
import torch

from vraxion_ckpt.checkpoint.plain_data import DEEPEST, check_plain, named_tensors, size_of
from vraxion_ckpt.checkpoint.source_files import Extent, MappedPart, Sources
from vraxion_ckpt.errors import (
    CkptError,
    CorruptError,
    LimitError,
    StorageError,
    UnsafeError,
    UsageError,
    errors_at,
    raise_if_out_of_memory,
)
from vraxion_ckpt.formats.pickle_dry_run import DryRun
from vraxion_ckpt.formats.torch_archive import Container, check_archive, fill_in_checksums, mapped
from vraxion_ckpt.support import progress, signals

# Modules that torch never lets a pickle call into, whatever is allowed.
_NEVER_ALLOWED = frozenset({"builtins", "nt", "os", "posix", "subprocess", "sys"})
_LARGE = 2**17  # what is worth being handed to another thread


def load_torch_file(path: Path, sources: Sources, allow_globals: Sequence[str] = ()) -> Any:
    """Load a file of ``torch.save``: safely, mapped, on the CPU, and only if it holds plain data.

    Args:
        path: the file; it is registered in `sources`, which later verifies the storages' checksums.
        sources: the files read so far.
        allow_globals: full names of further classes or functions that its pickle may use, such as
            ``numpy.dtype``; numpy scalars that come of it are turned into Python numbers.

    Returns:
        dicts, lists, tuples, text, numbers, None and tensors; tensors are views of the mapped file.

    Raises:
        SourceError: see `check_archive`; also `UnsafeError` naming what the pickle would have called.
        ChangedError: the file was replaced meanwhile.
    """
    _require_torch()
    allowed = _find_globals(allow_globals)
    container = check_archive(path)
    with mapped(path) as data:
        member = container.members[f"{container.prefix}/data.pkl"]
        pickled = bytes(data[member.start : member.start + member.size])
    try:
        with errors_at(path):
            DryRun(pickled, container).load()
    except CkptError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise_if_out_of_memory(error, path)
        raise CorruptError(f"its pickle is damaged: {_first_line(error)}", path=path) from error
    try:
        with torch.serialization.safe_globals(allowed):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise_if_out_of_memory(error, path)
        _refuse_pickle(path, error, allow_globals)
    except Exception as error:
        raise_if_out_of_memory(error, path)
        raise CorruptError(f"torch cannot read it: {_first_line(error)}", path=path) from error
    opened = Sources()
    opened.add(path, container.fingerprint, container.verify)
    opened.check_unchanged()  # torch has opened it once more, by its name
    if allow_globals:
        value = _plain(value, 0, path, {})
    check_plain(value, path)
    parts = dict(_parts(value, container))
    sources.add(path, container.fingerprint, container.verify, parts)
    return value


def _parts(value: Any, container: Container) -> Iterator[tuple[Extent, MappedPart]]:
    """Find out which storage is which member: torch maps the whole file, so they lie in memory as in the file.

    Where that is not so, less is found, and the checksums of the others are compared in a pass of their own.
    """
    found = (tensor.untyped_storage() for _, tensor in named_tensors(value))
    storages = {storage.data_ptr(): storage for storage in found if storage.nbytes()}
    members = {member.start: member for member in container.storages() if member.size}
    if storages and members:
        begin = min(storages) - min(members)
        for address, storage in storages.items():
            member = members.get(address - begin)
            if member and member.size == storage.nbytes():
                yield (address, member.size), MappedPart(partial(container.note, member.name), storage)


def _require_torch() -> None:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < (2, 10):
        raise UsageError(
            f"torch {torch.__version__} is installed; 2.10 is needed to load files safely",
            hint="pip install --upgrade torch",
        )


def _find_globals(names: Sequence[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            found.append((getattr(import_module(module), attribute), name))
        except (ImportError, AttributeError, ValueError, TypeError):
            raise UsageError(f"--allow-global {name}: there is no such class or function") from None
    if "numpy.dtype" in names:  # makes instances of these, which no pickle names
        found += [type(numpy.dtype(code)) for code in numpy.typecodes["All"] if code not in "OV"]
    return found


def _refuse_pickle(path: Path, error: Exception, allowed: Sequence[str]) -> NoReturn:
    try:
        unsafe = [n for n in torch.serialization.get_unsafe_globals_in_checkpoint(path) if n not in allowed]
    except Exception:  # torch's own look at the pickle failed too
        unsafe = []
    if unsafe:
        raise UnsafeError(
            f"its pickle would call {', '.join(sorted(unsafe))}",
            path=path,
            hint=_how_to_allow(sorted(unsafe)),
        ) from error
    # torch puts its reason between advice to load the file unsafely and where to read on.
    paragraphs = str(error).split("\n\n")
    reason = paragraphs[-2 if len(paragraphs) > 1 else 0].strip()
    raise UnsafeError(f"torch refuses its pickle: {reason[:200]}", path=path) from error


def _how_to_allow(names: Sequence[str]) -> str:
    if any(name.split(".")[0] in _NEVER_ALLOWED for name in names):
        return "it would run commands: do not load it with anything; --allow-global does not allow that"
    return "if you trust each of them: " + " ".join(f"--allow-global {name}" for name in names)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _plain(value: Any, depth: int, path: Path, done: dict[int, Any]) -> Any:
    """Turn numpy scalars into Python numbers of the same value, in new containers; `done` holds those, by id."""
    if depth > DEEPEST:
        raise LimitError(f"is nested deeper than {DEEPEST}", path=path)
    if id(value) in done:
        return done[id(value)]
    new: Any = value
    if isinstance(value, OrderedDict):
        new = OrderedDict((k, _plain(v, depth + 1, path, done)) for k, v in value.items())
        new.__dict__.update(value.__dict__)
    elif type(value) is dict:
        new = {k: _plain(v, depth + 1, path, done) for k, v in value.items()}
    elif type(value) in (list, tuple):
        new = type(value)(_plain(v, depth + 1, path, done) for v in value)
    elif type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    else:
        return value
    done[id(value)] = new
    return new


def save_torch_file(value: Any, path: Path) -> None:
    """Write plain data as ``torch.save`` does, to a new file; tensors are streamed, not copied.

    The archive's inner name does not depend on `path`, so the same data gives the same bytes. The checksums are
    ours: torch would compute each before it writes the bytes, here another thread does it meanwhile.

    Raises:
        UsageError: torch would read a file of that name with safetensors.
        UnsupportedError: `value` holds something that is not plain data.
        StorageError: the file cannot be written; the message has the reason.
    """
    if path.name.endswith(".safetensors"):
        raise UsageError("torch takes a file of this name for another format", path=path, hint="call it *.pt")
    check_plain(value)
    writer = None
    try:
        with (
            path.open("xb") as file,
            ThreadPoolExecutor(1) as pool,
            progress.progress_bar("writing", size_of(value)) as count,
            _as_a_whole(),
        ):
            writer = _Writer(file, pool, count)
            try:
                torch.save(value, cast("BinaryIO", writer))
            finally:
                writer.end()
        fill_in_checksums(path, writer.checksums)
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except RuntimeError as error:
        # torch reports a failed write in words of its own; the reason is what the file said.
        if writer is None or writer.error is None:
            raise_if_out_of_memory(error, path)
            raise
        raise_if_out_of_memory(writer.error, path)
        if isinstance(writer.error, OSError):
            raise StorageError.from_os_error(writer.error, path) from error
        raise writer.error from None


def torch_file_size(value: Any) -> int:
    """Return how many bytes `save_torch_file` would write, without writing any."""
    check_plain(value)
    counted = _Counter()
    with _as_a_whole():
        torch.save(value, cast("BinaryIO", counted))
    return counted.size


class _Counter:
    """A file that goes nowhere."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: memoryview) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None: ...


@contextmanager
def _as_a_whole() -> Iterator[None]:
    """Let torch write without checksums of its own, and put off signals: `_Writer` lets them through.

    An exception from anywhere else in torch makes it end the archive, and what that then says is all that is known.
    """
    with signals.deferred():
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


class _Writer:
    """A file that takes checksums, and remembers why a write failed or was interrupted, since torch forgets.

    Attributes:
        checksums: the CRC-32 of the larger pieces that were written, by where each starts and its size.
    """

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor, count: Callable[[int], object]) -> None:
        self._file = file
        self._pool = pool
        self._count = count
        self._size = 0
        self._ended = False
        self.checksums: dict[tuple[int, int], int] = {}
        self.error: BaseException | None = None

    def end(self) -> None:
        """Let further writes go nowhere: torch ends an archive even when it is cleaned up, and aborts if it cannot."""
        self._ended = True

    def write(self, data: memoryview) -> int:
        if self._ended:
            return len(data)
        try:
            signals.deliver_pending()
            if len(data) < _LARGE:
                self._file.write(data)
            else:
                crc = self._pool.submit(zlib.crc32, data)
                try:
                    self._file.write(data)
                finally:
                    self.checksums[self._size, len(data)] = crc.result()  # `data` is torch's again afterwards
            self._size += len(data)
            self._count(len(data))
        except BaseException as error:  # a signal's too
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        if not self._ended:
            self._file.flush()
