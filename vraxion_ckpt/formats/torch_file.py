"""Save torch files with ``torch.save``."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from vraxion_ckpt.checkpoint.plain_data import check_plain, size_of
from vraxion_ckpt.errors import StorageError, UsageError, raise_if_out_of_memory
from vraxion_ckpt.formats.torch_reader import load_torch_file as load_torch_file
from vraxion_ckpt.formats.zip_directory import fill_in_checksums
from vraxion_ckpt.support import progress, signals

_LARGE = 2**17  # bytes; the checksum of a piece of this size or more is computed in another thread


def save_torch_file(value: Any, path: Path) -> None:
    """Write plain data to a new file with ``torch.save``; tensors are streamed, not copied.

    The name inside the archive does not depend on `path`, so equal data gives equal bytes. Checksums are computed in
    another thread while the bytes are written, because torch would compute them before it writes.

    Raises:
        UsageError: the name of the file ends in ``.safetensors``, which torch would read as another format.
        UnsupportedError: `value` is not plain data.
        StorageError: the file cannot be written.
    """
    if path.name.endswith(".safetensors"):
        raise UsageError(
            "torch would read a file of this name as safetensors", path=path, hint="use a name that ends in .pt"
        )
    from vraxion_ckpt.checkpoint.references import resolved

    value = resolved(value)
    check_plain(value)
    writer = None
    try:
        with (
            path.open("xb") as file,
            ThreadPoolExecutor(1) as pool,
            progress.progress_bar("writing", size_of(value)) as count,
            _uninterrupted(),
        ):
            writer = _Writer(file, pool, count)
            try:
                torch.save(value, cast("BinaryIO", writer))
            finally:
                writer.end()
        fill_in_checksums(path, writer.checksums)
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except RuntimeError as error:
        # torch hides why a write failed; `_Writer` has the reason.
        if writer is None or writer.error is None:
            raise_if_out_of_memory(error, path)
            raise
        raise_if_out_of_memory(writer.error, path)
        if isinstance(writer.error, OSError):
            raise StorageError.from_os_error(writer.error, path) from error
        raise writer.error from None


def torch_file_size(value: Any) -> int:
    """Return how many bytes `save_torch_file` would write.

    Raises:
        UnsupportedError: `value` is not plain data.
    """
    from vraxion_ckpt.checkpoint.references import resolved

    value = resolved(value)
    check_plain(value)
    counted = _Counter()
    with _uninterrupted():
        torch.save(value, cast("BinaryIO", counted))
    return counted.size


class _Counter:
    """A file that only counts bytes."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: memoryview) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None: ...


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let torch write without computing checksums, and defer signals, which `_Writer` delivers between two writes.

    An exception at any other place would make torch finish the archive, and would be lost.
    """
    with signals.deferred():
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


class _Writer:
    """A file that computes checksums and records why a write failed, which torch does not report.

    Attributes:
        checksums: the CRC-32 of the larger pieces written, by offset and size.
        error: the exception of the write that failed, if one did.
    """

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor, count: Callable[[int], object]) -> None:
        self._file = file
        self._pool = pool
        self._count = count
        self._size = 0
        self._ended = False
        self.checksums: dict[tuple[int, int], int] = {}
        self.error: BaseException | None = None

    def end(self) -> None:
        """Ignore further writes, because torch finishes an archive even after an error, and aborts if it cannot."""
        self._ended = True

    def write(self, data: memoryview) -> int:
        if self._ended:
            return len(data)
        try:
            signals.deliver_pending()
            if len(data) < _LARGE:
                self._file.write(data)
            else:
                crc = self._pool.submit(zlib.crc32, data)
                try:
                    self._file.write(data)
                finally:
                    self.checksums[self._size, len(data)] = (
                        crc.result()
                    )  # before returning, because torch then reuses `data`
            self._size += len(data)
            self._count(len(data))
        except BaseException as error:  # also from a signal
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        if not self._ended:
            self._file.flush()
