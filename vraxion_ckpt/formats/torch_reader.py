"""Load ``.pt`` files, without torch and without running code from them.

The archive is checked first (`vraxion_ckpt.formats.torch_archive`), then its pickle is read
(`vraxion_ckpt.formats.torch_pickle`). Everything that is not plain data is refused
(`vraxion_ckpt.checkpoint.plain_data`). Tensors are references to bytes of the file.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint.entries import OPTION, Entry, find_entries, without_entries
from vraxion_ckpt.checkpoint.foreign_values import NumpyArray, NumpyNumber
from vraxion_ckpt.checkpoint.plain_data import PLAIN_TYPES, NotPlain, check_plain
from vraxion_ckpt.checkpoint.source_files import SourceFile, Sources, StoredBytes
from vraxion_ckpt.checkpoint.tensor_dict import resolved
from vraxion_ckpt.errors import CkptError, CorruptError, UnsupportedError, UsageError, errors_at, raise_if_out_of_memory
from vraxion_ckpt.formats.numpy_stand_ins import NUMPY_NAMES
from vraxion_ckpt.formats.torch_archive import check_archive
from vraxion_ckpt.formats.torch_pickle import Unread, not_allowed, read_pickle

_ALIGNMENT = 16  # bytes of the largest element
_MOST_NAMED = 10  # entries in a hint


def load_torch_file(path: Path, sources: Sources, allow_globals: Sequence[str] = ()) -> Any:
    """Load the plain data of a torch file, as `load_torch_references` does, with tensors that are views of the file."""
    return resolved(load_torch_references(path, sources, allow_globals))


def load_torch_references(path: Path, sources: Sources, allow_globals: Sequence[str] = ()) -> Any:
    """Load the plain data of a torch file.

    Args:
        path: the file. It is registered in `sources`, which verifies the checksums of its storages later.
        sources: the files read so far.
        allow_globals: full names of further classes or functions that the pickle may use, such as ``numpy.dtype``.

    Returns:
        dicts, lists, tuples, sets, text, bytes, numbers, None, a `TensorRef` for each tensor, and stand-ins for other
        values of torch and numpy.

    Raises:
        CorruptError: see `check_archive`; or the pickle is damaged.
        UnsafeError: the pickle uses other classes or functions; the message lists them.
        UnsupportedError: see `check_archive`; or the file holds values that are not plain data.
        LimitError: see `check_archive`; or the values are too many or nested too deeply.
        InconsistentError: a dict has a key that cannot be one.
        ChangedError: the file was replaced while it was read.
        StorageError: the file cannot be read.
        UsageError: `allow_globals` has an unknown name.
    """
    return load_torch_payload(path, sources, allow_globals, ())[0]


def load_torch_payload(
    path: Path, sources: Sources, allow_globals: Sequence[str], drop_keys: Sequence[str]
) -> tuple[Any, list[str]]:
    """Load a torch file as `load_torch_references` does, but leave out entries that cannot be read.

    Args:
        path: the file.
        sources: the files read so far.
        allow_globals: as for `load_torch_references`.
        drop_keys: the entries that may be left out. Those that can be read are not left out.

    Returns:
        the plain data, and the keys of the entries that were left out.

    Raises:
        SourceError: as `load_torch_references`; the error's hint names the entries to leave out.
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
            value, refused = read_pickle(container.pickled, storages, allowed)
    except CkptError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise_if_out_of_memory(error, path)
        raise CorruptError(f"its pickle is damaged: {_first_line(error)}", path=path) from error
    source.keep_open()  # fails if another file has its path now
    value, dropped = without_entries(value, drop_keys, _is_odd)
    with errors_at(path):
        if refused:
            _refuse(value, refused, found_all=bool(dropped))
        try:
            check_plain(value)
        except UnsupportedError as error:
            raise error.with_facts(hint=_how_to_drop(find_entries(value, _is_odd))) from None
    source.parts = list(storages.values())
    sources.files.append(source)
    return value, dropped


def _is_odd(value: Any) -> bool:
    """Return whether a value is not plain data. A value that was not read is none."""
    return type(value) not in PLAIN_TYPES


def _refuse(value: Any, refused: frozenset[str], *, found_all: bool) -> None:
    """Raise an error if a value holds what classes and functions that are not allowed have made.

    Args:
        value: the value.
        refused: the full names of the classes and functions.
        found_all: whether to accept that there is no such entry, because all were left out.
    """
    numpy = refused & NUMPY_NAMES
    kinds = (NumpyArray, NumpyNumber) if numpy else ()
    entries = list(find_entries(value, lambda entry: _is_odd(entry) or isinstance(entry, kinds)))
    if not entries:
        if found_all:
            return
        raise not_allowed(refused)
    hints = []
    if any(isinstance(entry.value, kinds) for entry in entries):
        hints.append("allow numpy's values: " + " ".join(f"--allow-global {name}" for name in sorted(numpy)))
    if drop := _how_to_drop(entry for entry in entries if _is_odd(entry.value)):
        hints.append(drop)
    first, hint = entries[0], "; ".join(hints) or None
    if isinstance(first.value, NotPlain) and not isinstance(first.value, Unread):
        raise UnsupportedError(f"{first.value.description}; only plain data can be written", key=first.place, hint=hint)
    raise not_allowed(refused, first.place or None, hint)


def _how_to_drop(entries: Iterable[Entry]) -> str | None:
    """Return a hint that names the options with which the entries are left out."""
    keys = list(dict.fromkeys(entry.key for entry in entries))
    if "" in keys:
        return "save a dict with the model's state_dict()"
    named = " ".join(f"{OPTION} {shlex.quote(key)}" for key in keys[:_MOST_NAMED])
    return f"leave out what cannot be carried: {named}{' …' * (len(keys) > _MOST_NAMED)}" if keys else None


def _find_globals(names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(NUMPY_NAMES.intersection(names))  # these have stand-ins
    for name in sorted({*names} - NUMPY_NAMES):
        module, _, attribute = name.rpartition(".")
        try:
            found[name] = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError, TypeError):
            raise UsageError(f"--allow-global {name}: there is no such class or function") from None
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
