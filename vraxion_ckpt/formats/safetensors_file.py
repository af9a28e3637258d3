"""The only module that checks, opens and writes safetensors files.

A file has eight bytes with the header's length (little-endian), a JSON header, and the bytes of the tensors without
gaps. The header holds the dtype, shape and offsets of each tensor, and text under ``__metadata__``; see
https://huggingface.co/docs/safetensors. Files are checked for faults that the safetensors library accepts, such as
duplicate keys, and then opened with the library. They are not written with it, because its writer keeps all copies of
non-contiguous tensors in memory at once, makes files that only their owner can read, and accepts names that no reader
accepts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from vraxion_ckpt.checkpoint.plain_data import bytes_of, in_pieces, size_of
from vraxion_ckpt.checkpoint.source_files import Fingerprint, Sources
from vraxion_ckpt.errors import (
    CorruptError,
    InconsistentError,
    LimitError,
    StorageError,
    UnsupportedError,
    errors_at,
    raise_if_out_of_memory,
)
from vraxion_ckpt.support import json_files, progress
from vraxion_ckpt.wording import count

_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
NATIVE_DTYPES = frozenset(str(d)[6:] for d in _CODES)
_BITS = {code: 8 * dtype.itemsize for dtype, code in _CODES.items()} | {"F4": 4}

LARGEST_SAFETENSORS_HEADER = 100_000_000  # the limit of the safetensors library
_MOST_TENSORS = 200_000
_MOST_ELEMENTS = 2**48  # of a tensor; an empty dimension counts as 1
_PIECE = 2**24
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        sizes: the size in bytes of each tensor by name, in the order of the offsets.
        metadata: the text under ``__metadata__`` by key.
        fingerprint: the fingerprint of the file when the header was read.
    """

    sizes: dict[str, int]
    metadata: dict[str, str]
    fingerprint: Fingerprint


def starts_like_safetensors(path: Path) -> bool:
    """Tell whether a file begins like a safetensors file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and length <= path.stat().st_size - 8


def is_tensor_name(name: str) -> bool:
    """Tell whether all readers accept a name for a tensor."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name not in ("", _METADATA) and "\0" not in name


def check_safetensors(path: Path) -> Header:
    """Read a file's header, and check that it describes exactly the bytes that follow it.

    Raises:
        CorruptError: the file is truncated, or has trailing bytes, holes, overlaps, wrong sizes or duplicate keys.
        InconsistentError: a tensor has a name that no reader accepts, or the metadata is not text.
        UnsupportedError: torch does not have the dtype of a tensor.
        LimitError: the header, a shape or the number of tensors is too large.
        StorageError: the file cannot be read.
    """
    fingerprint, raw = _read_header(path)
    header = _parse(raw, path)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InconsistentError("must hold text by key", path=path, key=_METADATA)
    if len(header) > _MOST_TENSORS:
        raise LimitError(f"holds {len(header)} tensors; at most {_MOST_TENSORS} are supported", path=path)
    sizes = _check_offsets(header, fingerprint.size - 8 - len(raw), path)
    return Header(sizes, metadata, fingerprint)


def _read_header(path: Path) -> tuple[Fingerprint, bytes]:
    try:
        if not path.is_file():
            raise CorruptError("is not a regular file", path=path)
        fingerprint = Fingerprint.of(path)
        with path.open("rb") as file:
            first = file.read(8)
            if first == b"version ":
                raise CorruptError("is a git-lfs pointer, not the file itself", path=path, hint="run `git lfs pull`")
            length = int.from_bytes(first, "little")
            if fingerprint.size < 8 or length > fingerprint.size - 8:
                fault = f"its header would take {length} of {fingerprint.size} bytes"
                raise CorruptError(f"is not a safetensors file, or is truncated: {fault}", path=path)
            if length > LARGEST_SAFETENSORS_HEADER:
                message = f"has a header of {length} bytes; the format allows {LARGEST_SAFETENSORS_HEADER}"
                raise LimitError(message, path=path)
            raw = file.read(length)
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    if not raw.startswith(b"{"):
        raise CorruptError("its header does not begin with {", path=path)
    return fingerprint, raw


def _check_offsets(header: dict[str, Any], held: int, path: Path) -> dict[str, int]:
    """Check that the tensors fill `held` bytes without gaps, and return their sizes in the order of their offsets."""
    offsets = sorted((*_offsets(name, entry, path), name) for name, entry in header.items())
    end = 0
    for start, stop, name in offsets:
        if start != end:
            fault = "overlap the tensor before it" if start < end else "leave a hole before it"
            raise CorruptError(f"its bytes {fault}", path=path, key=name)
        end = stop
    if end != held:
        fault = "missing" if end > held else "left after the last tensor"
        raise CorruptError(f"its size does not match its header: {count(abs(end - held), 'byte')} {fault}", path=path)
    return {name: stop - start for start, stop, name in offsets}


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json_files.parse_json(raw, path)
    except (CorruptError, InconsistentError) as error:  # no writer makes such a header
        raise CorruptError(f"its header is damaged: {error.message}", path=path, key=error.key) from error
    if not isinstance(header, dict):
        raise CorruptError("its header is not a JSON object", path=path)
    return header


def _offsets(name: str, entry: Any, path: Path) -> tuple[int, int]:
    """Return the offsets at which a tensor's bytes start and stop, relative to the end of the header."""
    if not is_tensor_name(name):
        raise InconsistentError(f"a tensor cannot be called {name!r}", path=path)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptError("must have dtype, shape and data_offsets", path=path, key=name)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CorruptError("its dtype, shape or data_offsets are not valid", path=path, key=name)
    if code not in _BITS:
        raise UnsupportedError(f"is of dtype {code}, which torch does not have", path=path, key=name)
    if len(shape) > 64 or math.prod(size or 1 for size in shape) > _MOST_ELEMENTS:
        raise LimitError("has a shape with too many dimensions or elements", path=path, key=name)
    start, stop = offsets
    bits = math.prod(shape) * _BITS[code]
    if 8 * (stop - start) != bits:
        message = f"takes {stop - start} bytes, but its shape {shape} of {code} needs {bits // 8}"
        raise CorruptError(message, path=path, key=name)
    return start, stop


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def load_safetensors(path: Path, header: Header, sources: Sources) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of a checked file by name, in the order of their offsets.

    Args:
        path: the file. It is registered in `sources` without checksums, because the format has none.
        header: the result of `check_safetensors`.
        sources: the files read so far.

    Raises:
        CorruptError: the safetensors library rejects the file.
        ChangedError: the file was replaced after it was checked.
        StorageError: the file cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="torch") as file:
            tensors = {name: file.get_tensor(name) for name in header.sizes}
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except Exception as error:  # the library's own error class has no more specific base
        raise_if_out_of_memory(error, path)
        raise CorruptError(f"cannot be opened: {error}", path=path) from error
    sources.add(path, header.fingerprint)
    # Copy tensors that are not aligned, as some operations need, and empty ones, which share the next one's address.
    return {
        name: tensor.clone() if not tensor.numel() or tensor.data_ptr() % tensor.itemsize else tensor
        for name, tensor in tensors.items()
    }


def save_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write tensors of `NATIVE_DTYPES` and text to a new file. Non-contiguous tensors are copied in pieces.

    Tensors with larger elements come first, so that all are aligned; otherwise the order is kept.

    Raises:
        InconsistentError: readers would not accept a name or text.
        LimitError: the header would be larger than readers accept.
        StorageError: the file cannot be written.
    """
    from vraxion_ckpt.checkpoint.references import resolved

    tensors = resolved(dict(tensors))
    ordered = _in_order(tensors)
    with errors_at(path):
        raw = _header(ordered, metadata)
    try:
        with path.open("xb") as file, progress.progress_bar("writing", size_of(dict(tensors))) as advance:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for _, tensor in ordered:
                for (piece,) in in_pieces(bytes_of(tensor), size=_PIECE):
                    advance(file.write(piece.numpy().data))
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error


def safetensors_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Return how many bytes `save_safetensors` would write.

    Raises:
        InconsistentError: see `save_safetensors`.
        LimitError: see `save_safetensors`.
    """
    from vraxion_ckpt.checkpoint.references import resolved

    tensors = resolved(dict(tensors))
    return 8 + len(_header(_in_order(tensors), metadata)) + size_of(dict(tensors))


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: -item[1].itemsize)


def _header(ordered: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in ordered:
        if not is_tensor_name(name):
            raise InconsistentError(f"a tensor cannot be called {name!r}")
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    try:
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InconsistentError("has text that is not valid Unicode", key=_METADATA) from error
    raw += b" " * (-len(raw) % 8)
    if len(raw) > LARGEST_SAFETENSORS_HEADER:
        raise LimitError(f"its header would take {len(raw)} bytes; the format allows {LARGEST_SAFETENSORS_HEADER}")
    return raw
