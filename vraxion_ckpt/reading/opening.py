"""Open a checkpoint of any format: find its adapter, read, bind the optimizer's names, refuse what is inconsistent."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Literal, Unpack, get_args

from vraxion_ckpt.checkpoint import invariants
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

_MOST_LISTED = 5  # checkpoints of a folder that are named in a message
_MOST_SEARCHED = 1000  # entries of a folder that are looked at for them


@memory_errors()
def read(path: PathLike, *, optimizer: OptimizerPolicy = "keep", **reading: Unpack[ReadKeywords]) -> Checkpoint:
    """Open a checkpoint of any format. Tensors are mapped; experts in files of their own are opened on first use.

    Args:
        path: a file or a directory.
        optimizer: ``drop`` leaves its state out; ``complete`` adds the parameters of experts that it lacks, without
            state; ``keep`` and ``partial`` take it as it is.
        reading: what the file does not tell, see `ReadOptions`.

    Raises:
        UsageError: there is no such file, or an unknown format.
        SourceError: what is wrong with it, and where.
        BindingError: its optimizer's parameters cannot be told apart.
    """
    return read_with(path, ReadOptions(**reading), optimizer)


def read_with(path: PathLike, options: ReadOptions, optimizer: OptimizerPolicy = "keep") -> Checkpoint:
    """Open a checkpoint as `read` does, with options that were collected before."""
    if optimizer not in get_args(OptimizerPolicy):
        raise UsageError(f"optimizer={optimizer!r}: none of {', '.join(get_args(OptimizerPolicy))}")
    if optimizer == "drop" and (options.param_names is not None or options.optimizer_order is not None):
        raise UsageError("names or an order are given for an optimizer that is to be dropped")
    checkpoint = read_unbound(path, options)
    if options.param_names is not None and not isinstance(checkpoint, UnboundCheckpoint):
        known = "knows its optimizer's names already" if checkpoint.optimizer else "has no optimizer to give names to"
        raise UsageError(known, path=path)
    if optimizer == "drop":
        return checkpoint.with_optimizer(None)
    try:
        bound = binding.bind(checkpoint, options.param_names, options.optimizer_order)
        return placement.with_missing_parameters(bound) if optimizer == "complete" else bound
    except (BindingError, SourceError) as error:
        error.path = error.path or checkpoint.origin.path
        raise


def read_unbound(path: PathLike, options: ReadOptions) -> Checkpoint:
    """Open a checkpoint as its adapter reads it, its optimizer perhaps without names; refuse an inconsistent one."""
    with os_errors_named(path):
        place = Path(path)
    try:
        with os_errors_named(path):
            adapter = detect_source(place, options.from_)
            check_allowed(adapter, options.allow_globals)
            checkpoint = adapter_calls.call_read(adapter, place, options.allow_globals)
        refuse(InconsistentError, invariants.invariant_findings(checkpoint), place)
    except SourceError as error:
        if was_interrupted(Path(os.path.realpath(place))):
            hint = f"an edit of it was interrupted; {_how_to_settle(place)}"
            raise error.with_facts(hint=hint) from error.__cause__
        raise
    if was_interrupted(Path(os.path.realpath(place))):
        message = f"{place}: an edit of it was interrupted; {_how_to_settle(place)}"
        warnings.warn(message, CkptWarning, stacklevel=3)
    return checkpoint


def _how_to_settle(place: Path) -> str:
    return f"`vraxion-ckpt edit {place}` takes it back, or finishes it"


def detect_source(path: Path, from_: AdapterLike | None = None) -> Adapter:
    """Return the adapter of an existing file or directory, found from its content.

    A file that no adapter recognises goes to the one whose suffix it bears, which can say what is wrong with it.
    """
    if not path.exists():
        raise UsageError("no such file or directory", path=path)
    if from_ is not None:
        adapter = resolve_adapter(from_)
        if path.is_dir() != adapter_calls.is_directory(adapter) and not adapter_calls.detect(type(adapter), path):
            kind = "directory" if path.is_dir() else "file"
            raise UsageError(f"is a {kind}, and holds no checkpoint of the format {adapter.name}", path=path)
        return adapter
    known = adapters()
    found = [adapter for adapter in known.values() if detects(adapter, path)]
    if not found and path.is_file():
        found = [adapter for adapter in known.values() if path.name.endswith(file_suffixes(adapter))]
    if len(found) == 1:
        return configure(found[0], {})
    if found:
        names = ", ".join(sorted(adapter.name for adapter in found))
        raise UnknownFormatError(f"could be any of {names}", path=path, hint="say which with --from")
    for adapter_class in known.values():
        adapter_calls.detect(adapter_class, path)  # one that fails could be the one; it is to blame, not the file
    inside = _checkpoints_in(path) if path.is_dir() else []
    if inside:
        names = ", ".join(inside[:_MOST_LISTED]) + (", …" if inside[_MOST_LISTED:] else "")
        hint = f"name one of them, such as {shlex.quote(os.path.join(path, inside[0]))}"  # noqa: PTH118 - with its slash
        raise UnknownFormatError(
            f"is a folder of checkpoints, not a checkpoint; it holds {names}", path=path, hint=hint
        )
    looked_for = "; ".join(f"{a.name} ({a.summary().rstrip('.')})" for a in known.values())
    raise UnknownFormatError("is of no known format", path=path, hint=f"looked for: {looked_for or 'nothing'}")


def _checkpoints_in(folder: Path) -> list[str]:
    """Return the names of the first checkpoints in a folder, those of directories with a slash at the end."""
    found: list[str] = []
    with suppress(OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore", CkptWarning)
        if any(detects(kind, folder.absolute().parent) for kind in adapters().values()):
            return []  # its files are parts of a checkpoint
        for entry in islice(sorted(folder.iterdir()), _MOST_SEARCHED):
            # A pipe or a device could block.
            if (entry.is_file() or entry.is_dir()) and any(detects(kind, entry) for kind in adapters().values()):
                found.append(entry.name + "/" * entry.is_dir())
            if len(found) > _MOST_LISTED:
                break
    return found


def detects(adapter: type[Adapter], path: Path) -> bool:
    """Ask an adapter whether a path is of its format; one that fails to tell is named in a warning."""
    try:
        return adapter_calls.detect(adapter, path)
    except OutOfMemoryError:
        raise
    except (CkptError, OSError) as error:  # one broken plugin must not take every other format down
        warnings.warn(f"format {adapter.name} could not look at {path}: {error}", CkptWarning, stacklevel=2)
        return False


def file_suffixes(adapter: type[Adapter]) -> tuple[str, ...]:
    """Return the endings of a file's name that mean this format."""
    return tuple(suffix for suffix in adapter.suffixes if not suffix.endswith("/"))


def check_allowed(adapter: Adapter, allow_globals: Sequence[str]) -> None:
    """Refuse classes that pickles may use for a format that loads no pickles."""
    if allow_globals and not adapter.loads_pickles:
        raise OptionError(f"the format {adapter.name} loads no pickles; --allow-global has no meaning for it")


def bound_if_possible(
    checkpoint: Checkpoint, options: ReadOptions
) -> tuple[Checkpoint, BindingError | SourceError | None]:
    """Bind an optimizer to names, for whoever only looks; if that fails, return the checkpoint as it was, and why."""
    try:
        if isinstance(checkpoint, UnboundCheckpoint):
            checkpoint = binding.bind(checkpoint, options.param_names, options.optimizer_order)
        return checkpoint, None
    except (BindingError, SourceError) as refused:
        return checkpoint, refused


def files_of(adapter: Adapter, path: Path, leftovers: Sequence[str] = ()) -> list[Path]:
    """List the files of a checkpoint, without other people's files in its directory and without `leftovers`."""
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
    """Turn what the operating system says of a path, wherever it says it, into an error of ours."""
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            raise UsageError(f"a path must be text or a pathlib.Path, not {path!r:.60}")
        if not os.fspath(path) or "\0" in str(path):
            raise UsageError(f"{os.fspath(path)!r} is no path")
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UsageError(f"{os.fspath(path)!r} is not UTF-8; torch cannot open such a name") from None
    try:
        yield
    except OSError as error:
        raise StorageError.from_os_error(error, error.filename or paths[0]) from error


def refuse(error: type[InconsistentError] | type[InvariantError], findings: Iterator[str], path: Path | None) -> None:
    """Raise `error` with the first few findings, if there is any."""
    found = list(islice(findings, 20))
    if found:
        raise error(listed(found, 3, "; "), path=path)
