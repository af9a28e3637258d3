"""Call adapters: the only module that calls what an adapter defines.

Each function calls the method of its name within `plugin_call`, and checks the type of what it returns.

Raises of all of them:
    PluginError: naming the adapter, if it raises what is no error of ours or the operating system's, or returns
        another type than it declares.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.type_checks import wrong_leaves, wrong_type
from vraxion_ckpt.plugins.adapter import Adapter, Faults, Loss, Part
from vraxion_ckpt.plugins.options import calling, defect_of

_T = TypeVar("_T")
S = TypeVar("S", int, int | None)


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


def call_read(adapter: Adapter, path: Path) -> Checkpoint:
    """Read a checkpoint; what it opens later is called in the same way."""
    with calling(adapter):
        found = adapter.read(path)
    return _guarded(adapter, _checked(adapter, "read", found, Checkpoint))


def read_over(adapter: Adapter, path: Path, staged: Path, removed: Collection[str]) -> Checkpoint:
    """Read a directory with staged files over it, as `call_read` does."""
    with calling(adapter):
        found = adapter.read_over(path, staged, removed)
    return _guarded(adapter, _checked(adapter, "read_over", found, Checkpoint))


def examine(adapter: Adapter, path: Path, faults: Faults) -> Checkpoint | None:
    """Read a checkpoint as far as possible, and note every fault."""
    with calling(adapter):
        found = adapter.examine(path, faults)
    checked = _checked(adapter, "examine", found, Checkpoint | None)
    return None if checked is None else _guarded(adapter, checked)


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


def foreign_files(adapter: Adapter, path: Path) -> list[Path]:
    """Ask what in a directory is not part of the checkpoint."""
    with calling(adapter):
        found = adapter.foreign_files(path)
    return _checked(adapter, "foreign_files", found, list[Path])


def parts(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Part]:
    """Ask for the files of a directory; what they write and measure is called in the same way."""
    with calling(adapter):
        found = adapter.parts(checkpoint)
    checked = _checked(adapter, "parts", found, Mapping[str, Part])

    def write_part(write: Callable[[Path], None], path: Path) -> None:
        with calling(adapter):
            write(path)

    def size_part(size: Callable[[], int]) -> int:
        with calling(adapter):
            told = size()
        return _checked_size(adapter, told, int)

    return {
        name: replace(part, write=partial(write_part, part.write), size=partial(size_part, part.size))
        for name, part in checked.items()
    }


def unseen(adapter: Adapter, name: str, before: Checkpoint, after: Checkpoint, reader: Checkpoint) -> bool:
    """Ask whether it makes no difference which state a file is in."""
    with calling(adapter):
        told = adapter.unseen(name, before, after, reader)
    return _checked(adapter, "unseen", told, bool)


def _checked(adapter: Adapter | type[Adapter], method: str, value: _T, expected: Any) -> _T:
    if wrong := wrong_type(value, expected):
        raise defect_of(adapter, f"{method} returned what it must not: {wrong}")
    return value


def _checked_size(adapter: Adapter, value: S, expected: Any) -> S:
    if (_checked(adapter, "size", value, expected) or 0) < 0:
        raise defect_of(adapter, f"size returned {value}, a negative number")
    return value


def _guarded(adapter: Adapter, checkpoint: Checkpoint) -> Checkpoint:
    """Call what opens an expert, or verifies a file, as the adapter's own code."""

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
    checkpoint.sources.verify_through(verified)
    return checkpoint
