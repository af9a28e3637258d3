"""Copy the neighbours of a source into a staged target, and say what is not carried along."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.provenance import Neighbour
from vraxion_ckpt.checkpoint.source_files import Fingerprint, SourceFile
from vraxion_ckpt.errors import CkptWarning, InconsistentError, StorageError, UsageError
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.support import signals
from vraxion_ckpt.support.file_copy import Copy, OpenFile, copy_all
from vraxion_ckpt.wording import listed

# Every format keeps the dialects of a checkpoint, so the names of neighbours are recorded among them.
_LEFT_BEHIND = "neighbours"
_MOST_NAMED = 20


def copy_neighbours(checkpoint: Checkpoint, neighbours: Sequence[Neighbour], target: Path) -> None:
    """Copy neighbours into a staged folder, read them back, and add them to the sources of the checkpoint.

    Raises:
        InconsistentError: one is a link that leads out of its folder.
        UsageError: a file of the new state has the name of one.
        ChangedError: one is written to at the same time.
        StorageError: the operating system cannot read or write, or a copy differs when it is read back.
    """
    root = checkpoint.origin.path
    for neighbour in neighbours:
        assert root is not None  # only a folder has neighbours
        file = root / neighbour.name
        if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
            hint = "copy the folder with cp -rL, which follows links"
            raise InconsistentError("is a link that leads out of the checkpoint", path=file, hint=hint)
        source = SourceFile(file, Fingerprint.of(file))
        checkpoint.sources.files.append(source)
        _copy(source, target / neighbour.name)


def _copy(source: SourceFile, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    copy = Copy(memoryview(b""), 0, source.fingerprint.size, 0, sums_source=True)
    try:
        with source.opened() as descriptor, place.open("x+b", buffering=0) as file, signals.deferred():
            copy.source = OpenFile(descriptor, source.path)
            copy_all([copy], OpenFile(file.fileno(), place), lambda _: None)
    except FileExistsError:
        message = "has the name of a file of the new checkpoint"
        raise UsageError(message, path=source.path, hint="move it away") from None
    if copy.crc != copy.source_crc:
        source.check_unchanged()
        hint = "the disk or the memory may be faulty"
        raise StorageError("differs from what was written when it is read back", path=place, hint=hint)


def say_what_is_not_read(before: Checkpoint, carried: Sequence[Neighbour], adapter: Adapter, place: Path) -> None:
    """Warn about what a user may expect in a target with neighbours, and what it does not hold.

    Args:
        before: the source.
        carried: its neighbours that are copied.
        adapter: the adapter of the source.
        place: the target.
    """
    unread = [neighbour for neighbour in carried if neighbour.holds]
    if unread:
        names = listed([neighbour.name for neighbour in unread])
        kinds = listed(list(dict.fromkeys(neighbour.holds for neighbour in unread)))
        _warn(f"{place}: copied as they are, and not read: {names} ({kinds})")
    root = before.origin.path
    if root is not None and root.is_dir():
        others = adapter_calls.foreign_files(adapter, root) or ()
        names = listed([other.name for other in others if not other.name.startswith(".")])
        if names:
            _warn(f"{place}: not copied, because they are not part of the checkpoint: {names}")
    elif isinstance(lost := before.origin.dialect(_LEFT_BEHIND), list) and lost:
        _warn(f"{place}: lacks the files that an earlier conversion has left behind: {listed(lost, _MOST_NAMED)}")


def with_record(held: Checkpoint, neighbours: Sequence[Neighbour], adapter: Adapter) -> Checkpoint:
    """Return a checkpoint that records which neighbours its file cannot have, so that the way back can name them.

    Args:
        held: the checkpoint to write.
        neighbours: the neighbours of the source.
        adapter: writes the target.
    """
    if adapter_calls.keeps_neighbours(adapter):
        return replace(held, origin=held.origin.without_dialects(_LEFT_BEHIND))
    if not neighbours:
        return held
    names = [neighbour.name for neighbour in neighbours[:_MOST_NAMED]]
    return replace(held, origin=held.origin.with_dialect(_LEFT_BEHIND, names))


def _warn(message: str) -> None:
    warnings.warn(message, CkptWarning, stacklevel=4)
