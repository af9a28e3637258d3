"""Call the methods of adapters. No other module calls them.

Each function calls the method of the same name within `plugin_call` and checks the type of the result. Each raises
`PluginError`, which names the adapter, if the method returns a wrong type or raises anything but a `CkptError` or an
`OSError`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from vraxion_ckpt.checkpoint.entries import without_entries
from vraxion_ckpt.checkpoint.model import Checkpoint, UnboundCheckpoint
from vraxion_ckpt.checkpoint.provenance import Neighbour
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.checkpoint.torch_optimizer import without_lost_optimizers
from vraxion_ckpt.checkpoint.type_checks import wrong_leaves, wrong_type
from vraxion_ckpt.formats.numpy_stand_ins import NUMPY_NAMES
from vraxion_ckpt.plugins.adapter import Adapter, Faults, IncrementalDirectoryAdapter, Loss, OutputFile
from vraxion_ckpt.plugins.discovery import dialects
from vraxion_ckpt.plugins.options import calling, defect_of
from vraxion_ckpt.plugins.read_context import ReadContext
from vraxion_ckpt.support.garbage import rare_collections
from vraxion_ckpt.wording import listed

_T = TypeVar("_T")
S = TypeVar("S", int, int | None)

OWN_GLOBALS = tuple(sorted(NUMPY_NAMES))
"""What pickles that this package writes may use besides plain data, if the source had such values."""
_ANY_CHECKPOINT = Checkpoint | UnboundCheckpoint


def detect(adapter: type[Adapter], path: Path) -> bool:
    """Return whether a path has this format."""
    with calling(adapter):
        found = adapter.detect(path)
    return _checked(adapter, "detect", found, bool)


def is_directory(adapter: Adapter) -> bool:
    """Return whether a target of this format, with these options, is a directory."""
    with calling(adapter):
        found = adapter.is_directory
    return _checked(adapter, "is_directory", found, bool)


def keeps_neighbours(adapter: Adapter) -> bool:
    """Return whether a target of this format, with these options, is a folder that may have neighbours."""
    with calling(adapter):
        found = adapter.keeps_neighbours
    return _checked(adapter, "keeps_neighbours", found, bool)


def neighbours(adapter: Adapter, path: Path) -> list[Neighbour]:
    """Return the files of a directory that belong to the checkpoint and that the format does not read."""
    with calling(adapter):
        found = adapter.neighbours(path)
    return _checked(adapter, "neighbours", found, list[Neighbour])


def as_stored(adapter: Adapter, path: Path) -> Adapter:
    """Return the adapter with the options that write a checkpoint as the one at `path` is stored."""
    with calling(adapter):
        found = adapter.as_stored(path)
    return _checked(adapter, "as_stored", found, Adapter)


@rare_collections()
def call_read(
    adapter: Adapter, path: Path, allow_globals: Sequence[str] = (), drop_keys: Sequence[str] = ()
) -> Checkpoint:
    """Read a checkpoint without some entries. Later calls of the adapter, to open an expert, use `plugin_call` too."""
    context = ReadContext(tuple(allow_globals), drop_keys=tuple(drop_keys), trainers=dialects())
    with calling(adapter):
        found = adapter.read(path, context)
    return _without_keys(_guarded(adapter, _checked(adapter, "read", found, _ANY_CHECKPOINT), context), context)


def read_overlay(
    adapter: IncrementalDirectoryAdapter,
    path: Path,
    staged: Path,
    removed: Collection[str],
    allow_globals: Sequence[str] = (),
) -> Checkpoint:
    """Read a directory with staged files in place of its own. Later calls use `plugin_call` as after `call_read`."""
    context = ReadContext(tuple(allow_globals), trainers=dialects())
    with calling(adapter):
        found = adapter.read_overlay(path, staged, removed, context)
    return _guarded(adapter, _checked(adapter, "read_overlay", found, _ANY_CHECKPOINT), context)


def examine(
    adapter: Adapter, path: Path, faults: Faults, allow_globals: Sequence[str] = (), drop_keys: Sequence[str] = ()
) -> Checkpoint | None:
    """Read as much of a checkpoint as possible, without some entries, and note every error in `faults`."""
    context = ReadContext(tuple(allow_globals), drop_keys=tuple(drop_keys), trainers=dialects())
    with calling(adapter):
        found = adapter.examine(path, faults, context)
    checked = _checked(adapter, "examine", found, _ANY_CHECKPOINT | None)
    return None if checked is None else _without_keys(_guarded(adapter, checked, context), context)


def dialect(adapter: Adapter, checkpoint: Checkpoint) -> str:
    """Return the variant of the format that a checkpoint was read from."""
    with calling(adapter):
        found = adapter.dialect(checkpoint)
    return _checked(adapter, "dialect", found, str)


def losses(adapter: Adapter, checkpoint: Checkpoint) -> list[Loss]:
    """Return the parts of a checkpoint that the format cannot hold."""
    with calling(adapter):
        found = adapter.losses(checkpoint)
    return _checked(adapter, "losses", found, list[Loss])


def lost_neighbours(adapter: Adapter, checkpoint: Checkpoint) -> list[Loss]:
    """Return the neighbours of a checkpoint as a loss, unless the target is a folder that may have some."""
    names = [neighbour.name for neighbour in checkpoint.origin.neighbours]
    if not names or keeps_neighbours(adapter):
        return []
    why = "the format has no place for them" if is_directory(adapter) else "the target is a single file"
    return [Loss(f"the files beside the weights ({listed(names, 8)})", why)]


def held(adapter: Adapter, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without the parts that the format cannot hold."""
    with calling(adapter):
        found = adapter.held(checkpoint)
    return _checked(adapter, "held", found, Checkpoint)


def write(adapter: Adapter, checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint to a staging path."""
    with calling(adapter):
        adapter.write(checkpoint, path)


def size(adapter: Adapter, checkpoint: Checkpoint) -> int | None:
    """Return how many bytes `write` would write, or None if the format cannot tell."""
    with calling(adapter):
        found = adapter.size(checkpoint)
    return _checked_size(adapter, found, int | None)


def foreign_files(adapter: Adapter, path: Path) -> list[Path] | None:
    """Return the files in a directory that are not part of the checkpoint, or None if the format cannot tell."""
    with calling(adapter):
        found = adapter.foreign_files(path)
    must_list = isinstance(adapter, IncrementalDirectoryAdapter)
    return _checked(adapter, "foreign_files", found, list[Path] if must_list else list[Path] | None)


def output_files(adapter: IncrementalDirectoryAdapter, checkpoint: Checkpoint) -> dict[str, OutputFile]:
    """Return the files of a directory. `write_file` and `file_size` call their functions."""
    with calling(adapter):
        found = adapter.output_files(checkpoint)
    checked = _checked(adapter, "output_files", found, Mapping[str, OutputFile])
    for name in checked:
        if not {"", ".", ".."}.isdisjoint(name.split("/")) or "\0" in name:
            raise defect_of(adapter, f"output_files names {name!r}, which is not a path below the directory")
    if adapter.index_file not in checked:
        raise defect_of(adapter, f"output_files lacks the index file {adapter.index_file!r}")

    return dict(checked)


def write_file(adapter: IncrementalDirectoryAdapter, file: OutputFile, path: Path) -> None:
    """Write one file of a directory."""
    with calling(adapter):
        file.write(path)


def file_size(adapter: IncrementalDirectoryAdapter, file: OutputFile) -> int:
    """Return the size in bytes of one file of a directory."""
    with calling(adapter):
        found = file.size()
    return _checked_size(adapter, found, int)


def same_files(
    adapter: IncrementalDirectoryAdapter, old: Mapping[str, OutputFile], new: Mapping[str, OutputFile]
) -> set[str]:
    """Return the names of the files that have the same content in both, as their `OutputFile.content` compares."""
    both = [name for name in new if name in old]
    with calling(adapter):
        found = [old[name].content == new[name].content for name in both]
    _checked(adapter, "a comparison of OutputFile.content", found, list[bool])
    return {name for name, same in zip(both, found, strict=True) if same}


def is_ignored(
    adapter: IncrementalDirectoryAdapter, name: str, before: Checkpoint, after: Checkpoint, reader: Checkpoint
) -> bool:
    """Return whether a reader gets the same checkpoint with the old and with the new version of a file."""
    with calling(adapter):
        found = adapter.is_ignored(name, before, after, reader)
    return _checked(adapter, "is_ignored", found, bool)


def _checked(adapter: Adapter | type[Adapter], method: str, value: _T, expected: Any) -> _T:
    if wrong := wrong_type(value, expected):
        raise defect_of(adapter, f"{method} returned a wrong value: {wrong}")
    return value


def _checked_size(adapter: Adapter, value: S, expected: Any) -> S:
    if (_checked(adapter, "size", value, expected) or 0) < 0:
        raise defect_of(adapter, f"size returned {value}, a negative number")
    return value


def _without_keys(checkpoint: Checkpoint, context: ReadContext) -> Checkpoint:
    """Leave out the entries of the payload that the user drops, and record those that were left out."""
    if not context.drop_keys:
        return checkpoint
    payload = checkpoint.payload.references()
    others = [key for key in dict.fromkeys(context.drop_keys) if key not in context.dropped]
    left, dropped = without_entries(payload, others)
    origin = replace(checkpoint.origin, dropped=(*sorted(context.dropped), *dropped))
    return without_lost_optimizers(replace(checkpoint, payload=TensorDict(left), origin=origin))


def _guarded(adapter: Adapter, checkpoint: Checkpoint, context: ReadContext) -> Checkpoint:
    """Attach the context's files to the checkpoint. Experts are opened within `plugin_call`."""

    def opened(opener: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        with calling(adapter):
            leaves = opener()
        if wrong := wrong_leaves(leaves):
            raise defect_of(adapter, f"opening an expert returned a wrong value: {wrong}")
        return leaves

    for expert in checkpoint.head.experts.values() if checkpoint.head else ():
        expert.open_through(opened)
    origin = replace(checkpoint.origin, known_dialects=context.trainers)
    return replace(checkpoint, sources=context.sources, origin=origin)
