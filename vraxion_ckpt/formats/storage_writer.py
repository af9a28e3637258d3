"""Write storages into an open file, verified piece by piece.

Each piece is read back from the target. Its CRC-32 must be the one that the source states, or that of the source's
bytes if it states none. So one pass proves that the source was intact and that the target is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from vraxion_ckpt.checkpoint.references import ComputedBytes, Storage
from vraxion_ckpt.checkpoint.source_files import SourceFile, StoredBytes, buffer_of
from vraxion_ckpt.errors import CorruptError, StorageError
from vraxion_ckpt.support.checksums import checksums_of_ranges
from vraxion_ckpt.support.file_copy import Copy, OpenFile, copy_all

_MOST_OPEN = 64  # source files that are open at the same time


@dataclass(frozen=True)
class Placement:
    """Bytes of a storage, and where they go.

    Attributes:
        storage: the storage.
        first: the first byte in the storage.
        nbytes: number of bytes.
        target_start: offset in the target.
    """

    storage: Storage
    first: int
    nbytes: int
    target_start: int

    @property
    def whole(self) -> bool:
        """Whether these are all bytes of the storage."""
        return self.nbytes == self.storage.nbytes

    @property
    def stated(self) -> int | None:
        """The CRC-32 that a source file states for these bytes, or None."""
        return self.storage.crc if self.whole and isinstance(self.storage, StoredBytes) else None


def write_storages(placements: Sequence[Placement], target: OpenFile, advance: Callable[[int], object]) -> list[int]:
    """Write bytes of storages into an open file.

    If a source states a checksum for a storage, the copy proves it (`StoredBytes.proven`). Computed storages are
    computed one at a time, and freed. What lies between placements in the target may be overwritten with zeros.

    Args:
        placements: what goes where, in the order of the offsets in the target.
        target: the file, open for reading and writing.
        advance: called with the number of bytes copied since the last call.

    Returns:
        the CRC-32 of each, read back from the target.

    Raises:
        CorruptError: a source file is damaged, or ends before. The error names the file and the part.
        ChangedError: a source file was replaced, written to or removed since it was registered.
        StorageError: the operating system cannot read or write, or the target differs when it is read back.
    """
    found: list[int] = []
    for group in _groups(placements):
        found += _write_group(group, target, advance)
    return found


def _groups(placements: Sequence[Placement]) -> Iterator[list[Placement]]:
    """Yield groups that are copied together: a storage that is computed, or some with few source files."""
    group: list[Placement] = []
    files: set[SourceFile] = set()
    for placement in placements:
        storage = placement.storage
        computed = isinstance(storage, ComputedBytes) and storage.given is None
        if group and (computed or len(files) == _MOST_OPEN):
            yield group
            group, files = [], set()
        group.append(placement)
        if computed:
            yield group
            group = []
        elif isinstance(storage, StoredBytes):
            files.add(storage.file)
    if group:
        yield group


def _write_group(group: Sequence[Placement], target: OpenFile, advance: Callable[[int], object]) -> list[int]:
    opened: dict[SourceFile, OpenFile] = {}
    with ExitStack() as stack:
        copies = []
        for placement in group:
            storage, first = placement.storage, placement.first
            source: OpenFile | memoryview
            if isinstance(storage, StoredBytes):
                file, first = storage.file, storage.start + first
                if file not in opened:
                    opened[file] = OpenFile(stack.enter_context(file.opened()), file.path)
                source = opened[file]
            else:
                source = buffer_of(storage.view())
            copies.append(
                Copy(source, first, placement.nbytes, placement.target_start, sums_source=placement.stated is None)
            )
        try:
            copy_all(copies, target, advance)
        except CorruptError:
            for file in opened:
                file.check_unchanged()
            raise
    for placement, copy in zip(group, copies, strict=True):
        _judge(placement, copy, target)
    return [copy.crc for copy in copies]


def _judge(placement: Placement, copy: Copy, target: OpenFile) -> None:
    """Compare the checksums of a copy, and note them on the storage."""
    storage, stated = placement.storage, placement.stated
    if copy.crc != (copy.source_crc if stated is None else stated):
        if isinstance(storage, StoredBytes):
            _refuse_source(storage, stated)
        hint = "the disk or the memory may be faulty"
        raise StorageError("differs from what was written when it is read back", path=target.path, hint=hint)
    if not placement.whole:
        return
    if isinstance(storage, StoredBytes):
        if stated is None:
            storage.found_crc = copy.crc
        else:
            storage.proven = True
    elif storage.crc is None:
        storage.crc = copy.crc


def _refuse_source(storage: StoredBytes, stated: int | None) -> None:
    """Raise an error if the source is at fault: it has changed, or its bytes do not have the stated checksum."""
    storage.file.check_unchanged()
    if stated is None:
        return
    with storage.file.opened() as descriptor:
        found = checksums_of_ranges(descriptor, [(storage.start, storage.nbytes)], storage.file.path)
    if found != [stated]:
        storage.file.verify()  # names all parts that are damaged
        raise CorruptError("its checksum does not match its bytes", path=storage.file.path, key=storage.name)
