"""Record the checksums that the writers have read back, so that the final check need not read the bytes again.

Imports without torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from vraxion_ckpt.checkpoint.source_files import Fingerprint, SourceFile


class WrittenFiles:
    """The CRC-32s of ranges of files that this process has written and read back."""

    def __init__(self) -> None:
        self._found: dict[_Change, dict[tuple[int, int], int]] = {}
        self._asked: dict[int, tuple[SourceFile, dict[tuple[int, int], int]]] = {}

    def note(self, descriptor: int, crcs: Mapping[tuple[int, int], int]) -> None:
        """Add an open file after the last write.

        Args:
            descriptor: of the file.
            crcs: the CRC-32 of each range, by its offset and its number of bytes.
        """
        self._found[_last_change(descriptor)] = dict(crcs)

    def crc(self, file: SourceFile, start: int, nbytes: int) -> int | None:
        """Return the CRC-32 of a range, or None if it was not read back or the file was written to since."""
        if id(file) not in self._asked:
            self._asked[id(file)] = file, self._found.get(_last_change(file.path), {})
        return self._asked[id(file)][1].get((start, nbytes))


# A file's fingerprint, and the time of the last change of its inode in nanoseconds, which no program can set.
_Change = tuple[Fingerprint, int]


def _last_change(file: Path | int) -> _Change:
    return Fingerprint.of(file), os.stat(file).st_ctime_ns  # noqa: PTH116 - it may be a descriptor


_recording: ContextVar[WrittenFiles | None] = ContextVar("_recording", default=None)


@contextmanager
def recording() -> Iterator[WrittenFiles]:
    """Collect the checksums of all files that are written in a ``with`` block."""
    written = WrittenFiles()
    token = _recording.set(written)
    try:
        yield written
    finally:
        _recording.reset(token)


def note_written(descriptor: int, crcs: Mapping[tuple[int, int], int]) -> None:
    """Add an open file, after the last write, to the record of the innermost `recording` block, if there is one."""
    written = _recording.get()
    if written is not None:
        written.note(descriptor, crcs)
