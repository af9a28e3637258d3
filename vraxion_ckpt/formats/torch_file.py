"""Load and save torch files; the only module that calls ``torch.load`` and ``torch.save``.

Before torch reads a file, its archive is checked (`vraxion_ckpt.formats.torch_archive`) and its pickle is run with
inert stubs (`vraxion_ckpt.formats.pickle_dry_run`). Afterwards, everything that is not plain data is rejected
(`vraxion_ckpt.checkpoint.plain_data`).
"""

from __future__ import annotations

import pickle
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy
import torch

from vraxion_ckpt.checkpoint.plain_data import DEEPEST, check_plain, size_of
from vraxion_ckpt.checkpoint.references import resolved
from vraxion_ckpt.checkpoint.source_files import Sources
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
from vraxion_ckpt.formats.torch_archive import check_archive
from vraxion_ckpt.formats.zip_directory import fill_in_checksums, mapped
from vraxion_ckpt.support import progress, signals

# Modules that torch never lets a pickle use, even with allow_globals.
_NEVER_ALLOWED = frozenset({"builtins", "nt", "os", "posix", "subprocess", "sys"})
_LARGE = 2**17  # bytes; the checksum of a piece of this size or more is computed in another thread


def load_torch_file(path: Path, sources: Sources, allow_globals: Sequence[str] = ()) -> Any:
    """Load the plain data of a torch file onto the CPU, memory-mapped and without running code from it.

    Args:
        path: the file. It is registered in `sources`, which verifies the checksums of its storages later.
        sources: the files read so far.
        allow_globals: full names of further classes or functions that the pickle may use, such as ``numpy.dtype``.
            Numpy scalars become Python numbers.

    Returns:
        dicts, lists, tuples, text, numbers, None and tensors; the tensors are views of the mapped file.

    Raises:
        CorruptError: see `check_archive`; or the pickle is damaged.
        UnsafeError: the pickle uses other classes or functions; the message lists them.
        UnsupportedError: see `check_archive`; or the file holds values that are not plain data.
        LimitError: see `check_archive`; or the values are too many or nested too deeply.
        InconsistentError: a dict has a key that is not text or a number.
        ChangedError: the file was replaced while it was read.
        StorageError: the file cannot be read.
        UsageError: `allow_globals` has an unknown name, or torch is too old.
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
    if allow_globals:
        value = _plain(value, 0, path, {})
    check_plain(value, path)
    sources.add(path, container.fingerprint)
    return value


def _require_torch() -> None:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < (2, 10):
        message = f"torch {torch.__version__} is installed, but 2.10 or newer is needed to load files safely"
        raise UsageError(message, hint="pip install --upgrade torch")


def _find_globals(names: Sequence[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            found.append((getattr(import_module(module), attribute), name))
        except (ImportError, AttributeError, ValueError, TypeError):
            raise UsageError(f"--allow-global {name}: there is no such class or function") from None
    if "numpy.dtype" in names:  # a call of it returns instances of these classes, which the pickle does not name
        found += [type(numpy.dtype(code)) for code in numpy.typecodes["All"] if code not in "OV"]
    return found


def _refuse_pickle(path: Path, error: Exception, allowed: Sequence[str]) -> NoReturn:
    try:
        unsafe = sorted({*torch.serialization.get_unsafe_globals_in_checkpoint(path)} - {*allowed})
    except Exception:  # torch cannot parse the pickle either
        unsafe = []
    if unsafe:
        message = f"its pickle would call {', '.join(unsafe)}"
        raise UnsafeError(message, path=path, hint=_how_to_allow(unsafe)) from error
    # torch's message has the reason between advice to load the file unsafely and a link.
    paragraphs = str(error).split("\n\n")
    reason = paragraphs[-2 if len(paragraphs) > 1 else 0].strip()
    raise UnsafeError(f"torch rejects its pickle: {reason[:200]}", path=path) from error


def _how_to_allow(names: Sequence[str]) -> str:
    if any(name.split(".")[0] in _NEVER_ALLOWED for name in names):
        return "it would run commands, which --allow-global cannot permit; do not load this file with any program"
    return "if you trust each of them: " + " ".join(f"--allow-global {name}" for name in names)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _plain(value: Any, depth: int, path: Path, done: dict[int, Any]) -> Any:
    """Return a copy of a value with Python numbers for numpy scalars. `done` maps ids of containers to their copies."""
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
    """Write plain data to a new file with ``torch.save``; tensors are streamed, not copied.

    The name inside the archive does not depend on `path`, so equal data gives equal bytes. Checksums are computed in
    another thread while the bytes are written, because torch would compute them before it writes.

    Raises:
        UsageError: the name of the file ends in ``.safetensors``, which torch would read as another format.
        UnsupportedError: `value` is not plain data.
        StorageError: the file cannot be written.
    """
    if path.name.endswith(".safetensors"):
        raise UsageError(
            "torch would read a file of this name as safetensors", path=path, hint="use a name that ends in .pt"
        )
    value = resolved(value)
    check_plain(value)
    writer = None
    try:
        with (
            path.open("xb") as file,
            ThreadPoolExecutor(1) as pool,
            progress.progress_bar("writing", size_of(value)) as count,
            _uninterrupted(),
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
        # torch hides why a write failed; `_Writer` has the reason.
        if writer is None or writer.error is None:
            raise_if_out_of_memory(error, path)
            raise
        raise_if_out_of_memory(writer.error, path)
        if isinstance(writer.error, OSError):
            raise StorageError.from_os_error(writer.error, path) from error
        raise writer.error from None


def torch_file_size(value: Any) -> int:
    """Return how many bytes `save_torch_file` would write.

    Raises:
        UnsupportedError: `value` is not plain data.
    """
    value = resolved(value)
    check_plain(value)
    counted = _Counter()
    with _uninterrupted():
        torch.save(value, cast("BinaryIO", counted))
    return counted.size


class _Counter:
    """A file that only counts bytes."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: memoryview) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None: ...


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let torch write without computing checksums, and defer signals, which `_Writer` delivers between two writes.

    An exception at any other place would make torch finish the archive, and would be lost.
    """
    with signals.deferred():
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


class _Writer:
    """A file that computes checksums and records why a write failed, which torch does not report.

    Attributes:
        checksums: the CRC-32 of the larger pieces written, by offset and size.
        error: the exception of the write that failed, if one did.
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
        """Ignore further writes, because torch finishes an archive even after an error, and aborts if it cannot."""
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
                    self.checksums[self._size, len(data)] = (
                        crc.result()
                    )  # before returning, because torch then reuses `data`
            self._size += len(data)
            self._count(len(data))
        except BaseException as error:  # also from a signal
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        if not self._ended:
            self._file.flush()
