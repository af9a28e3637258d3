"""Open a checkpoint of any format: detect the format, read, bind the optimizer to parameter names, check invariants."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, Unpack, get_args

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.entries import refuse_missing
from vraxion_ckpt.checkpoint.model import Checkpoint, UnboundCheckpoint
from vraxion_ckpt.commit.staging import was_interrupted
from vraxion_ckpt.errors import (
    BindingError,
    CkptError,
    CkptWarning,
    InconsistentError,
    InvariantError,
    OptionError,
    OutOfMemoryError,
    SourceError,
    StorageError,
    UnknownFormatError,
    UsageError,
    errors_at,
    memory_errors,
)
from vraxion_ckpt.optimizer import binding, placement
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.discovery import AdapterLike, adapters, resolve_adapter
from vraxion_ckpt.plugins.options import configure
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.wording import listed

PathLike = str | os.PathLike[str]
OptimizerPolicy = Literal["keep", "drop", "complete", "partial"]

_MOST_LISTED = 5  # checkpoints of a folder in a message
_MOST_SEARCHED = 1000  # entries of a folder that are searched for checkpoints


@memory_errors()
def read(path: PathLike, *, optimizer: OptimizerPolicy = "keep", **reading: Unpack[ReadKeywords]) -> Checkpoint:
    """Open a checkpoint of any format.

    Tensors are read when they are used. Experts in files of their own are opened on first use.

    Args:
        path: a file or a directory.
        optimizer: ``keep`` and ``partial`` read the optimizer unchanged; ``drop`` omits it; ``complete`` adds missing
            expert parameters to it, without state.
        reading: see `ReadOptions`.

    Returns:
        The checkpoint, with its optimizer bound to parameter names.

    Raises:
        UsageError: the path does not exist, or an option is wrong.
        SourceError: the checkpoint is damaged, unsafe, inconsistent or not supported.
        BindingError: the optimizer's ids cannot be bound to parameter names.
        StorageError: the operating system cannot read a file.
    """
    return read_with(path, ReadOptions.of("open", reading), optimizer)


def read_with(path: PathLike, options: ReadOptions, optimizer: OptimizerPolicy = "keep") -> Checkpoint:
    """Open a checkpoint as `read` does. Raises the same errors."""
    if optimizer not in get_args(OptimizerPolicy):
        raise UsageError(f"optimizer={optimizer!r}: must be one of {', '.join(get_args(OptimizerPolicy))}")
    if optimizer == "drop" and (options.param_names is not None or options.optimizer_order is not None):
        raise UsageError("param_names and optimizer_order cannot be combined with optimizer=drop")
    checkpoint = read_unbound(path, options)
    if options.param_names is not None and not isinstance(checkpoint, UnboundCheckpoint):
        reason = "the optimizer already has parameter names" if checkpoint.optimizer else "has no optimizer"
        raise UsageError(f"{reason}; leave param_names out", path=path)
    if optimizer == "drop":
        return checkpoint.with_optimizer(None)
    with errors_at(checkpoint.origin.path):
        bound = binding.bind(checkpoint, options.param_names, options.optimizer_order)
        return placement.with_missing_parameters(bound) if optimizer == "complete" else bound


def read_unbound(path: PathLike, options: ReadOptions, *, may_lack_keys: bool = False) -> Checkpoint:
    """Open a checkpoint without binding its optimizer to parameter names.

    Args:
        path: as for `read`.
        options: as for `read`.
        may_lack_keys: whether `drop_keys` may list entries that the checkpoint does not have.

    Raises:
        UsageError: the path does not exist, or an option is wrong.
        SourceError: the checkpoint is damaged, unsafe, inconsistent or not supported.
        StorageError: the operating system cannot read a file.
    """
    with os_errors_named(path):
        place = Path(path)
    try:
        with os_errors_named(path):
            adapter = detect_source(place, options.from_)
            check_allowed(adapter, options.allow_globals)
            read = adapter_calls.call_read(adapter, place, options.allow_globals, options.drop_keys)
            checkpoint = _with_neighbours(read, adapter)
        refuse(InconsistentError, invariants.invariant_findings(checkpoint), place)
    except SourceError as error:
        if was_interrupted(Path(os.path.realpath(place))):
            hint = f"an edit of this checkpoint was interrupted; {how_to_recover(place)}"
            raise error.with_facts(hint=hint) from error.__cause__
        raise
    if was_interrupted(Path(os.path.realpath(place))):
        message = f"{place}: an edit of this checkpoint was interrupted; {how_to_recover(place)}"
        warnings.warn(message, CkptWarning, stacklevel=3)
    if not may_lack_keys:
        refuse_missing(options.drop_keys, checkpoint)
    return checkpoint


def _with_neighbours(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return the checkpoint with the files beside its own."""
    root = checkpoint.origin.path
    found = adapter_calls.neighbours(adapter, root) if root is not None and root.is_dir() else []
    return replace(checkpoint, origin=replace(checkpoint.origin, neighbours=tuple(found))) if found else checkpoint


def how_to_recover(path: Path) -> str:
    """Return the hint for a checkpoint with an interrupted edit."""
    return f"run `vraxion-ckpt edit {shlex.quote(str(path))}` to roll it back or to finish it"


def detect_source(path: Path, from_: AdapterLike | None = None) -> Adapter:
    """Return the adapter of an existing file or directory, detected from its content.

    A file that no adapter recognises is assigned by its suffix, so that the adapter can report what is wrong with it.

    Args:
        path: a file or a directory.
        from_: the format, if the user named it.

    Raises:
        UsageError: the path does not exist, or has another type than `from_`.
        UnknownFormatError: no adapter, or more than one, recognises it.
        PluginError: an adapter failed, and no other recognises the path.
    """
    if not path.exists():
        raise UsageError("no such file or directory", path=path)
    if from_ is not None:
        adapter = resolve_adapter(from_)
        if path.is_dir() != adapter_calls.is_directory(adapter) and not adapter_calls.detect(type(adapter), path):
            kind = "directory" if path.is_dir() else "file"
            raise UsageError(f"is a {kind} without a checkpoint of the format {adapter.name}", path=path)
        return adapter
    known = adapters()
    found = [adapter for adapter in known.values() if detects(adapter, path)]
    if not found and path.is_file():
        found = [adapter for adapter in known.values() if path.name.endswith(file_suffixes(adapter))]
    if len(found) == 1:
        return configure(found[0], {})
    if found:
        names = ", ".join(sorted(adapter.name for adapter in found))
        raise UnknownFormatError(f"several formats match: {names}", path=path, hint="choose one with --from")
    for adapter_class in known.values():
        adapter_calls.detect(adapter_class, path)  # raises the error of one that failed: it could be the right one
    inside = _checkpoints_in(path) if path.is_dir() else []
    if inside:
        names = listed(inside, _MOST_LISTED)
        hint = f"name one of them, such as {shlex.quote(os.path.join(path, inside[0]))}"  # noqa: PTH118 - with its slash
        raise UnknownFormatError(
            f"is a folder of checkpoints, not a checkpoint; it contains {names}", path=path, hint=hint
        )
    looked_for = "; ".join(f"{a.name} ({a.summary().rstrip('.')})" for a in known.values())
    raise UnknownFormatError("format not recognised", path=path, hint=f"known formats: {looked_for or 'none'}")


def _checkpoints_in(folder: Path) -> list[str]:
    """Return the names of the first checkpoints in a folder. A name of a directory ends with a slash."""
    found: list[str] = []
    with suppress(OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore", CkptWarning)
        if any(detects(kind, folder.absolute().parent) for kind in adapters().values()):
            return []  # its files are parts of a checkpoint
        for entry in islice(sorted(folder.iterdir()), _MOST_SEARCHED):
            # Opening a pipe or a device could block.
            if (entry.is_file() or entry.is_dir()) and any(detects(kind, entry) for kind in adapters().values()):
                found.append(entry.name + "/" * entry.is_dir())
    return found


def detects(adapter: type[Adapter], path: Path) -> bool:
    """Return whether a path has an adapter's format. If the adapter fails, warn and return False."""
    try:
        return adapter_calls.detect(adapter, path)
    except OutOfMemoryError:
        raise
    except (CkptError, OSError) as error:  # one broken plugin must not disable every other format
        warnings.warn(f"format {adapter.name} could not examine {path}: {error}", CkptWarning, stacklevel=2)
        return False


def file_suffixes(adapter: type[Adapter]) -> tuple[str, ...]:
    """Return the suffixes of file names that select this format."""
    return tuple(suffix for suffix in adapter.suffixes if not suffix.endswith("/"))


def check_allowed(adapter: Adapter, allow_globals: Sequence[str]) -> None:
    """Check that `allow_globals` is empty for a format without pickles.

    Raises:
        OptionError: it is not.
    """
    if allow_globals and not adapter.loads_pickles:
        raise OptionError(f"the format {adapter.name} loads no pickles; leave --allow-global out")


def bound_if_possible(
    checkpoint: Checkpoint, options: ReadOptions
) -> tuple[Checkpoint, BindingError | SourceError | None]:
    """Bind the optimizer to parameter names. On failure, return the unchanged checkpoint and the error."""
    try:
        if isinstance(checkpoint, UnboundCheckpoint):
            checkpoint = binding.bind(checkpoint, options.param_names, options.optimizer_order)
        return checkpoint, None
    except (BindingError, SourceError) as refused:
        return checkpoint, refused


def files_of(adapter: Adapter, path: Path, leftovers: Sequence[str] = ()) -> list[Path]:
    """List the files of a checkpoint. Foreign files in its directory and `leftovers` are excluded.

    Args:
        adapter: the adapter of the checkpoint.
        path: the file or directory.
        leftovers: relative paths of files that an interrupted save has left.
    """
    if not path.is_dir():
        return [path]
    foreign = set(map(os.fspath, adapter_calls.foreign_files(adapter, path) or ()))
    foreign |= {os.path.join(path, name) for name in leftovers}  # noqa: PTH118 - as below
    found = []
    for folder, below, names in os.walk(path):
        below[:] = [name for name in below if os.path.join(folder, name) not in foreign]  # noqa: PTH118 - thousands
        found += [place for name in names if (place := os.path.join(folder, name)) not in foreign]  # noqa: PTH118
    return list(map(Path, sorted(found)))


@contextmanager
def os_errors_named(*paths: PathLike) -> Iterator[None]:
    """Convert an `OSError` of a ``with`` block to a `StorageError`, and check that `paths` can be opened.

    Raises:
        UsageError: a path is empty, contains NUL or is not UTF-8.
        StorageError: the block raised an `OSError`.
    """
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            raise UsageError(f"a path must be a string or a pathlib.Path, not {path!r:.60}")
        if not os.fspath(path) or "\0" in str(path):
            raise UsageError(f"{os.fspath(path)!r} is not a valid path")
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UsageError(f"{os.fspath(path)!r} is not UTF-8; torch cannot open such a name") from None
    try:
        yield
    except OSError as error:
        raise StorageError.from_os_error(error, error.filename or paths[0]) from error


def refuse(error: type[InconsistentError] | type[InvariantError], findings: Iterator[str], path: Path | None) -> None:
    """Raise `error` with the first few findings, if there are any."""
    found = list(islice(findings, 20))
    if found:
        raise error(listed(found, 3, "; "), path=path)
