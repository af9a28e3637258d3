"""The only module that writes safetensors files.

The safetensors library is not used, because its writer keeps all copies of non-contiguous tensors in memory at once,
makes files that only their owner can read, and accepts names that no reader accepts. Imports without torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vraxion_ckpt.checkpoint.references import ComputedBytes, TensorRef, as_reference, as_written
from vraxion_ckpt.checkpoint.tensor_dict import TensorDict
from vraxion_ckpt.checkpoint.written_files import note_written
from vraxion_ckpt.errors import InconsistentError, LimitError, StorageError, errors_at, raise_if_out_of_memory
from vraxion_ckpt.formats.safetensors_file import (
    DTYPE_CODES,
    LARGEST_SAFETENSORS_HEADER,
    METADATA,
    is_tensor_name,
)
from vraxion_ckpt.formats.storage_writer import Placement, write_storages
from vraxion_ckpt.support import progress, signals
from vraxion_ckpt.support.checksums import crc32_combined
from vraxion_ckpt.support.file_bytes import write_at
from vraxion_ckpt.support.file_copy import OpenFile

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 2**24  # bytes of a non-contiguous tensor that are copied at a time


def save_safetensors(tensors: Mapping[str, Tensor | TensorRef], metadata: Mapping[str, str], path: Path) -> None:
    """Write tensors of `NATIVE_DTYPE_NAMES` and text to a new file. Bytes of source files go from file to file.

    Tensors with larger elements come first, so that all are aligned; otherwise the order is kept. Non-contiguous
    tensors are copied in pieces.

    Raises:
        InconsistentError: readers would not accept a name or text.
        LimitError: the header would be larger than readers accept.
        CorruptError: a source file is damaged. The error names the file and the part.
        ChangedError: a source file was replaced, written to or removed.
        StorageError: the file cannot be written, or it differs when it is read back.
    """
    ordered = _in_order(tensors)
    with errors_at(path):
        raw = _header(ordered, metadata)
    size = sum(ref.nbytes for _, ref in ordered)
    try:
        with (
            path.open("x+b", buffering=0) as file,
            progress.progress_bar("writing", size) as advance,
            signals.deferred(),
        ):
            target = OpenFile(file.fileno(), path)
            start = 8 + len(raw)
            file.truncate(start + size)
            write_at(target.descriptor, 0, len(raw).to_bytes(8, "little") + raw, path)
            groups = []
            for _, ref in ordered:
                groups.append(list(_placements(ref, start)))
                start += ref.nbytes
            crcs = write_storages([each for group in groups for each in group], target, advance)
            note_written(file.fileno(), _joined(groups, iter(crcs)))
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except RuntimeError as error:
        raise_if_out_of_memory(error, path)
        raise


def _placements(ref: TensorRef, start: int) -> Iterator[Placement]:
    """Yield where the bytes of a tensor go, which begins at an offset in the target."""
    if ref.is_contiguous() and not (ref.conj or ref.neg):
        yield Placement(as_written(ref.storage), ref.first * ref.itemsize, ref.nbytes, start)
    elif isinstance(ref.storage, ComputedBytes):  # computing it for each block would take too long
        whole = ComputedBytes(ref.nbytes, lambda: _plain(ref.read_only_tensor()))
        yield Placement(whole, 0, ref.nbytes, start)
    else:
        values = ref.read_only_tensor().detach()
        for index in _blocks(ref.shape, ref.itemsize):
            block = values[index]
            yield Placement(ComputedBytes(block.nbytes, partial(_plain, block)), 0, block.nbytes, start)
            start += block.nbytes


def _blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int | slice, ...]]:
    """Yield the indices of blocks of at most `_BLOCK` bytes, in the order of their elements."""
    row = math.prod(shape[1:]) * itemsize
    if not shape or row * shape[0] <= _BLOCK:
        yield ()
    elif row <= _BLOCK:
        rows = _BLOCK // row
        for first in range(0, shape[0], rows):
            yield (slice(first, first + rows),)
    else:
        for first in range(shape[0]):
            for rest in _blocks(shape[1:], itemsize):
                yield (first, *rest)


def _plain(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor with the values that a view shows."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def _joined(groups: list[list[Placement]], crcs: Iterator[int]) -> dict[tuple[int, int], int]:
    """Return the CRC-32 of each tensor by its offset and size, from those of the parts in which it was written."""
    found: dict[tuple[int, int], int] = {}
    for group in groups:
        crc = 0
        for placement in group:
            crc = crc32_combined(crc, next(crcs), placement.nbytes)
        found[group[0].target_start, sum(placement.nbytes for placement in group)] = crc
    return found


def safetensors_size(tensors: Mapping[str, Tensor | TensorRef], metadata: Mapping[str, str]) -> int:
    """Return how many bytes `save_safetensors` would write.

    Raises:
        InconsistentError: see `save_safetensors`.
        LimitError: see `save_safetensors`.
    """
    ordered = _in_order(tensors)
    return 8 + len(_header(ordered, metadata)) + sum(ref.nbytes for _, ref in ordered)


def _in_order(tensors: Mapping[str, Tensor | TensorRef]) -> list[tuple[str, TensorRef]]:
    references = tensors.references() if isinstance(tensors, TensorDict) else tensors
    named = [(name, as_reference(tensor)) for name, tensor in references.items()]
    return sorted(named, key=lambda item: -item[1].itemsize)


def _header(ordered: list[tuple[str, TensorRef]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name, ref in ordered:
        if not is_tensor_name(name):
            raise InconsistentError(f"a tensor cannot be called {name!r}")
        start, end = end, end + ref.nbytes
        header[name] = {"dtype": DTYPE_CODES[ref.dtype], "shape": list(ref.shape), "data_offsets": [start, end]}
    try:
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InconsistentError("has text that is not valid Unicode", key=METADATA) from error
    raw += b" " * (-len(raw) % 8)
    if len(raw) > LARGEST_SAFETENSORS_HEADER:
        raise LimitError(f"its header would take {len(raw)} bytes; the format allows {LARGEST_SAFETENSORS_HEADER}")
    return raw
