"""Load ``.pt`` files, without torch and without running code from them.

The archive is checked first (`vraxion_ckpt.formats.torch_archive`), then its pickle is read
(`vraxion_ckpt.formats.torch_pickle`). Everything that is not plain data is refused
(`vraxion_ckpt.checkpoint.plain_data`). Tensors are references to bytes of the file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint.plain_data import DEEPEST, check_plain
from vraxion_ckpt.checkpoint.source_files import SourceFile, Sources, StoredBytes
from vraxion_ckpt.checkpoint.tensor_dict import resolved
from vraxion_ckpt.errors import CkptError, CorruptError, LimitError, UsageError, errors_at, raise_if_out_of_memory
from vraxion_ckpt.formats.torch_archive import check_archive
from vraxion_ckpt.formats.torch_pickle import read_pickle

_ALIGNMENT = 16  # bytes of the largest element


def load_torch_file(path: Path, sources: Sources, allow_globals: Sequence[str] = ()) -> Any:
    """Load the plain data of a torch file, as `load_torch_references` does, with tensors that are views of the file."""
    return resolved(load_torch_references(path, sources, allow_globals))


def load_torch_references(path: Path, sources: Sources, allow_globals: Sequence[str] = ()) -> Any:
    """Load the plain data of a torch file.

    Args:
        path: the file. It is registered in `sources`, which verifies the checksums of its storages later.
        sources: the files read so far.
        allow_globals: full names of further classes or functions that the pickle may use, such as ``numpy.dtype``.
            Numpy scalars become Python numbers.

    Returns:
        dicts, lists, tuples, text, numbers, None, and a `TensorRef` for each tensor.

    Raises:
        CorruptError: see `check_archive`; or the pickle is damaged.
        UnsafeError: the pickle uses other classes or functions; the message lists them.
        UnsupportedError: see `check_archive`; or the file holds values that are not plain data.
        LimitError: see `check_archive`; or the values are too many or nested too deeply.
        InconsistentError: a dict has a key that is not text or a number.
        ChangedError: the file was replaced while it was read.
        StorageError: the file cannot be read.
        UsageError: `allow_globals` has an unknown name.
    """
    allowed = _find_globals(allow_globals)
    container = check_archive(path)
    source = SourceFile(path, container.fingerprint, states_checksums=True)
    storages = {
        key: StoredBytes(
            source,
            member.start,
            member.size,
            None if member.size and not member.crc else member.crc,  # some writers leave it 0
            member.name,
            _ALIGNMENT,
        )
        for key, member in container.storages.items()
    }
    try:
        with errors_at(path):
            value = read_pickle(container.pickled, storages, allowed)
    except CkptError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise_if_out_of_memory(error, path)
        raise CorruptError(f"its pickle is damaged: {_first_line(error)}", path=path) from error
    source.check_unchanged()  # another file may have its path
    source.keep_open()
    if allow_globals:
        value = _plain(value, 0, path, {})
    check_plain(value, path)
    source.parts = list(storages.values())
    sources.files.append(source)
    return value


def _find_globals(names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            found[name] = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError, TypeError):
            raise UsageError(f"--allow-global {name}: there is no such class or function") from None
    if "numpy.dtype" in names:  # a call of it returns instances of these classes, which the pickle does not name
        import numpy

        kinds = {type(numpy.dtype(code)) for code in numpy.typecodes["All"] if code not in "OV"}
        found |= {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}
    return found


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
