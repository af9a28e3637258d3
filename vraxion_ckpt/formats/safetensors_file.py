"""The only module that checks and reads safetensors files. Imports without torch.

A file has eight bytes with the header's length (little-endian), a JSON header, and the bytes of the tensors without
gaps. The header holds the dtype, shape and offsets of each tensor, and text under ``__metadata__``; see
https://huggingface.co/docs/safetensors. Files are checked for faults that the safetensors library accepts, such as
duplicate keys.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vraxion_ckpt.checkpoint.references import ITEMSIZES, TensorRef
from vraxion_ckpt.checkpoint.source_files import Fingerprint, Sources, StoredBytes
from vraxion_ckpt.errors import (
    CorruptError,
    InconsistentError,
    LimitError,
    StorageError,
    UnsupportedError,
)
from vraxion_ckpt.support import json_files
from vraxion_ckpt.wording import count

DTYPE_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
}
NATIVE_DTYPE_NAMES = frozenset(DTYPE_CODES)
_PACKED = "F4"  # two elements in a byte, which torch counts as one element
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()} | {_PACKED: "float4_e2m1fn_x2"}

LARGEST_SAFETENSORS_HEADER = 100_000_000  # the limit of the safetensors library
_MOST_TENSORS = 200_000
_MOST_ELEMENTS = 2**48  # of a tensor; an empty dimension counts as 1
METADATA = "__metadata__"


@dataclass(frozen=True)
class HeaderEntry:
    """A tensor in a file.

    Attributes:
        dtype: name of the dtype, such as ``float32``.
        shape: number of elements in each dimension.
        start: offset in the file of the first byte.
        nbytes: number of bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        tensors: each tensor by name, in the order of the offsets.
        metadata: the text under ``__metadata__`` by key.
        fingerprint: the fingerprint of the file when the header was read.
    """

    tensors: dict[str, HeaderEntry]
    metadata: dict[str, str]
    fingerprint: Fingerprint

    @property
    def sizes(self) -> dict[str, int]:
        """The number of bytes of each tensor by name, in the order of the offsets."""
        return {name: entry.nbytes for name, entry in self.tensors.items()}


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
    return name not in ("", METADATA) and "\0" not in name


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
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InconsistentError("must hold text by key", path=path, key=METADATA)
    try:
        "".join(itertools.chain(metadata, metadata.values())).encode()
    except UnicodeEncodeError:
        raise CorruptError("has text that is not valid Unicode", path=path, key=METADATA) from None
    if len(header) > _MOST_TENSORS:
        raise LimitError(f"holds {len(header)} tensors; at most {_MOST_TENSORS} are supported", path=path)
    return Header(_check_entries(header, 8 + len(raw), fingerprint.size, path), metadata, fingerprint)


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


def _check_entries(header: dict[str, Any], start: int, size: int, path: Path) -> dict[str, HeaderEntry]:
    """Check that the tensors fill the file from `start` on without gaps, and return them by their offsets."""
    entries = {name: _entry(name, entry, start, path) for name, entry in header.items()}
    ordered = sorted(entries, key=lambda name: (entries[name].start, entries[name].nbytes, name))
    end = start
    for name in ordered:
        entry = entries[name]
        if entry.start != end:
            fault = "overlap the tensor before it" if entry.start < end else "leave a hole before it"
            raise CorruptError(f"its bytes {fault}", path=path, key=name)
        end += entry.nbytes
    if end != size:
        fault = "missing" if end > size else "left after the last tensor"
        raise CorruptError(f"its size does not match its header: {count(abs(end - size), 'byte')} {fault}", path=path)
    return {name: entries[name] for name in ordered}


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json_files.parse_json(raw, path)
    except (CorruptError, InconsistentError) as error:  # no writer makes such a header
        raise CorruptError(f"its header is damaged: {error.message}", path=path, key=error.key) from error
    if not isinstance(header, dict):
        raise CorruptError("its header is not a JSON object", path=path)
    return header


def _entry(name: str, entry: Any, header_end: int, path: Path) -> HeaderEntry:
    if not is_tensor_name(name):
        raise InconsistentError(f"a tensor cannot be called {name!r}", path=path)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptError("must have dtype, shape and data_offsets", path=path, key=name)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CorruptError("its dtype, shape or data_offsets are not valid", path=path, key=name)
    if code not in _DTYPES:
        raise UnsupportedError(f"is of dtype {code}, which torch does not have", path=path, key=name)
    if len(shape) > 64 or math.prod(size or 1 for size in shape) > _MOST_ELEMENTS:
        raise LimitError("has a shape with too many dimensions or elements", path=path, key=name)
    start, stop = offsets
    bits = math.prod(shape) * (4 if code == _PACKED else 8 * ITEMSIZES[_DTYPES[code]])
    if 8 * (stop - start) != bits:
        message = f"takes {stop - start} bytes, but its shape {shape} of {code} needs {bits // 8}"
        raise CorruptError(message, path=path, key=name)
    if code == _PACKED:
        if not shape or shape[-1] % 2:
            raise CorruptError(f"has shape {shape}, but {code} packs two elements of a row", path=path, key=name)
        shape = [*shape[:-1], shape[-1] // 2]
    return HeaderEntry(_DTYPES[code], tuple(shape), header_end + start, stop - start)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def load_safetensors(path: Path, header: Header, sources: Sources) -> dict[str, TensorRef]:
    """Return references to the tensors of a checked file by name, in the order of their offsets.

    Args:
        path: the file. It is registered in `sources` without checksums, because the format has none.
        header: the result of `check_safetensors`.
        sources: the files read so far.
    """
    file = sources.add(path, header.fingerprint)
    found = {
        name: TensorRef.contiguous(
            StoredBytes(file, entry.start, entry.nbytes, name=name, alignment=ITEMSIZES[entry.dtype]),
            entry.dtype,
            entry.shape,
        )
        for name, entry in header.tensors.items()
    }
    file.parts = [ref.storage for ref in found.values() if isinstance(ref.storage, StoredBytes)]
    return found
