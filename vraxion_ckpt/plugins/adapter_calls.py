"""Call adapters: the only module that calls what an adapter defines.

Each function calls the method of its name within `plugin_call`, and checks the type of what it returns.

Raises of all of them:
    PluginError: naming the adapter, if it raises what is no error of ours or the operating system's, or returns
        another type than it declares.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from vraxion_ckpt.checkpoint.model import Checkpoint, UnboundCheckpoint
from vraxion_ckpt.checkpoint.type_checks import wrong_leaves, wrong_type
from vraxion_ckpt.plugins.adapter import Adapter, Faults, IncrementalDirectoryAdapter, Loss, OutputFile
from vraxion_ckpt.plugins.options import calling, defect_of
from vraxion_ckpt.plugins.read_context import ReadContext

_T = TypeVar("_T")
S = TypeVar("S", int, int | None)

_ANY_CHECKPOINT = Checkpoint | UnboundCheckpoint


def detect(adapter: type[Adapter], path: Path) -> bool:
    """Ask whether a path is of this format."""
    with calling(adapter):
        found = adapter.detect(path)
    return _checked(adapter, "detect", found, bool)


def is_directory(adapter: Adapter) -> bool:
    """Ask whether a target of this format, with these options, is a directory."""
    with calling(adapter):
        found = adapter.is_directory
    return _checked(adapter, "is_directory", found, bool)


def call_read(adapter: Adapter, path: Path, allow_globals: Sequence[str] = ()) -> Checkpoint:
    """Read a checkpoint. Later calls that open an expert or verify a file are guarded in the same way."""
    context = ReadContext(tuple(allow_globals))
    with calling(adapter):
        found = adapter.read(path, context)
    return _guarded(adapter, _checked(adapter, "read", found, _ANY_CHECKPOINT), context)


def read_overlay(
    adapter: IncrementalDirectoryAdapter,
    path: Path,
    staged: Path,
    removed: Collection[str],
    allow_globals: Sequence[str] = (),
) -> Checkpoint:
    """Read a directory with staged files in place of its own, as `call_read` does."""
    context = ReadContext(tuple(allow_globals))
    with calling(adapter):
        found = adapter.read_overlay(path, staged, removed, context)
    return _guarded(adapter, _checked(adapter, "read_overlay", found, _ANY_CHECKPOINT), context)


def examine(adapter: Adapter, path: Path, faults: Faults, allow_globals: Sequence[str] = ()) -> Checkpoint | None:
    """Read a checkpoint as far as possible, and note every fault."""
    context = ReadContext(tuple(allow_globals))
    with calling(adapter):
        found = adapter.examine(path, faults, context)
    checked = _checked(adapter, "examine", found, _ANY_CHECKPOINT | None)
    return None if checked is None else _guarded(adapter, checked, context)


def dialect(adapter: Adapter, checkpoint: Checkpoint) -> str:
    """Ask how the format is spelt in a checkpoint."""
    with calling(adapter):
        told = adapter.dialect(checkpoint)
    return _checked(adapter, "dialect", told, str)


def losses(adapter: Adapter, checkpoint: Checkpoint) -> list[Loss]:
    """Ask what the format cannot hold."""
    with calling(adapter):
        told = adapter.losses(checkpoint)
    return _checked(adapter, "losses", told, list[Loss])


def held(adapter: Adapter, checkpoint: Checkpoint) -> Checkpoint:
    """Ask for the checkpoint as the format will hold it."""
    with calling(adapter):
        found = adapter.held(checkpoint)
    return _checked(adapter, "held", found, Checkpoint)


def write(adapter: Adapter, checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint to a staged path."""
    with calling(adapter):
        adapter.write(checkpoint, path)


def size(adapter: Adapter, checkpoint: Checkpoint) -> int | None:
    """Ask how many bytes `write` would write."""
    with calling(adapter):
        told = adapter.size(checkpoint)
    return _checked_size(adapter, told, int | None)


def foreign_files(adapter: Adapter, path: Path) -> list[Path] | None:
    """Ask which files in a directory are not part of the checkpoint; None if the format cannot tell."""
    with calling(adapter):
        found = adapter.foreign_files(path)
    must_tell = isinstance(adapter, IncrementalDirectoryAdapter)
    return _checked(adapter, "foreign_files", found, list[Path] if must_tell else list[Path] | None)


def output_files(adapter: IncrementalDirectoryAdapter, checkpoint: Checkpoint) -> dict[str, OutputFile]:
    """Ask for the files of a directory. Calls that write or measure one are guarded in the same way."""
    with calling(adapter):
        found = adapter.output_files(checkpoint)
    checked = _checked(adapter, "output_files", found, Mapping[str, OutputFile])

    def write_file(write: Callable[[Path], None], path: Path) -> None:
        with calling(adapter):
            write(path)

    def size_of_file(size: Callable[[], int]) -> int:
        with calling(adapter):
            told = size()
        return _checked_size(adapter, told, int)

    return {
        name: replace(file, write=partial(write_file, file.write), size=partial(size_of_file, file.size))
        for name, file in checked.items()
    }


def is_ignored(
    adapter: IncrementalDirectoryAdapter, name: str, before: Checkpoint, after: Checkpoint, reader: Checkpoint
) -> bool:
    """Ask whether a reader gets the same checkpoint from either of two versions of a file."""
    with calling(adapter):
        told = adapter.is_ignored(name, before, after, reader)
    return _checked(adapter, "is_ignored", told, bool)


def _checked(adapter: Adapter | type[Adapter], method: str, value: _T, expected: Any) -> _T:
    if wrong := wrong_type(value, expected):
        raise defect_of(adapter, f"{method} returned what it must not: {wrong}")
    return value


def _checked_size(adapter: Adapter, value: S, expected: Any) -> S:
    if (_checked(adapter, "size", value, expected) or 0) < 0:
        raise defect_of(adapter, f"size returned {value}, a negative number")
    return value


def _guarded(adapter: Adapter, checkpoint: Checkpoint, context: ReadContext) -> Checkpoint:
    """Let the checkpoint watch the files of its context, and guard what opens an expert or verifies a file."""

    def opened(opener: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        with calling(adapter):
            leaves = opener()
        if wrong := wrong_leaves(leaves):
            raise defect_of(adapter, f"opened an expert wrongly: {wrong}")
        return leaves

    def verified(verify: Callable[[], None]) -> None:
        with calling(adapter):
            verify()

    for expert in checkpoint.head.experts.values() if checkpoint.head else ():
        expert.open_through(opened)
    context.sources.verify_through(verified)
    return replace(checkpoint, sources=context.sources)
