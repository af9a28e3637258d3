"""The one door to safetensors' file format: look strictly, open mapped, write as a stream.

A file is eight bytes (the header's length, little-endian), a JSON object of tensor name → dtype, shape and place,
with text under ``__metadata__``, and then the tensors' bytes without a gap; see
https://huggingface.co/docs/safetensors. The library opens it, after a look of ours at what it lets through, such
as a key that stands there twice. It does not write it: its writer holds every copy that it needs at once, makes files
that only their owner may read, and takes names that no reader accepts.
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
NATIVE_DTYPES = frozenset(_CODES)
_BITS = {code: 8 * dtype.itemsize for dtype, code in _CODES.items()} | {"F4": 4}

LARGEST_SAFETENSORS_HEADER = 100_000_000  # the library's own bound
_MOST_TENSORS = 200_000
_MOST_ELEMENTS = 2**48  # of a tensor, were none of its dimensions empty
_PIECE = 2**24
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        sizes: each tensor's bytes, in the order of their places.
        metadata: text by key.
    """

    sizes: dict[str, int]
    metadata: dict[str, str]
    fingerprint: Fingerprint


def starts_like_safetensors(path: Path) -> bool:
    """Tell whether a file's first bytes could be a header's; never raises for a file that can be read."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and length <= path.stat().st_size - 8


def is_tensor_name(name: str) -> bool:
    """Tell whether a tensor may be called so: every reader finds it again."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name not in ("", _METADATA) and "\0" not in name


def check_safetensors(path: Path) -> Header:
    """Read a file's header and refuse whatever does not describe exactly the bytes that follow it.

    Raises:
        CorruptError: truncated, trailing bytes, holes, overlaps, sizes that do not fit, or a key that occurs twice.
        InconsistentError: a tensor's name that no reader accepts, or metadata that is not text.
        UnsupportedError: a dtype that torch does not have.
        LimitError: a header, a shape or a number of tensors beyond reason.
    """
    try:
        if not path.is_file():
            raise CorruptError("is not a regular file", path=path)
        fingerprint = Fingerprint.of(path)
        with path.open("rb") as file:
            first = file.read(8)
            if first == b"version ":
                raise CorruptError("is a git-lfs pointer, not the file itself", path=path, hint="run `git lfs pull`")
            length = int.from_bytes(first, "little")
            held = fingerprint.size - 8 - length
            if fingerprint.size < 8 or held < 0:
                raise CorruptError(
                    "is no safetensors file, or a truncated one: "
                    f"its header would take {length} of {fingerprint.size} bytes",
                    path=path,
                )
            if length > LARGEST_SAFETENSORS_HEADER:
                raise LimitError(
                    f"has a header of {length} bytes; {LARGEST_SAFETENSORS_HEADER} is the format's bound", path=path
                )
            raw = file.read(length)
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    if not raw.startswith(b"{"):
        raise CorruptError("its header does not begin with {", path=path)
    header = _parse(raw, path)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InconsistentError("must hold text by key", path=path, key=_METADATA)
    if len(header) > _MOST_TENSORS:
        raise LimitError(f"holds {len(header)} tensors; {_MOST_TENSORS} is the most", path=path)
    places = sorted((*_place(name, entry, path), name) for name, entry in header.items())
    end = 0
    for start, stop, name in places:
        if start != end:
            kind = "overlaps the one before it" if start < end else "leaves a hole before it"
            raise CorruptError(f"its place {kind}", path=path, key=name)
        end = stop
    if end != held:
        kind = f"{end - held} bytes are missing" if end > held else f"{held - end} bytes follow the last tensor"
        raise CorruptError(f"does not hold what its header says: {kind}", path=path)
    return Header({name: stop - start for start, stop, name in places}, metadata, fingerprint)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json_files.parse_json(raw, path)
    except (CorruptError, InconsistentError) as error:  # in a header it is damage: no writer makes such JSON
        raise CorruptError(f"its header is damaged: {error.message}", path=path, key=error.key) from error
    if not isinstance(header, dict):
        raise CorruptError("its header is not a JSON object", path=path)
    return header


def _place(name: str, entry: Any, path: Path) -> tuple[int, int]:
    """Return where a tensor's bytes start and stop, counted from the header's end."""
    if not is_tensor_name(name):
        raise InconsistentError(f"a tensor cannot be called {name!r}", path=path)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptError("must have dtype, shape and data_offsets", path=path, key=name)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CorruptError("its dtype, shape or place is not one", path=path, key=name)
    if code not in _BITS:
        raise UnsupportedError(f"is of dtype {code}", path=path, key=name)
    if len(shape) > 64 or math.prod(size or 1 for size in shape) > _MOST_ELEMENTS:
        raise LimitError("has an absurd shape", path=path, key=name)
    start, stop = offsets
    bits = math.prod(shape) * _BITS[code]
    if 8 * (stop - start) != bits:
        raise CorruptError(
            f"takes {stop - start} bytes, and its shape {shape} of {code} is {bits // 8}", path=path, key=name
        )
    return start, stop


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def load_safetensors(path: Path, header: Header, sources: Sources) -> dict[str, Tensor]:
    """Open the tensors of a file that was checked, mapped, in the order of their places.

    Each has a storage of its own. The file is registered in `sources`; the format has no checksum to verify.

    Raises:
        CorruptError: the library refuses it.
        ChangedError: the file was replaced meanwhile.
    """
    try:
        with safetensors.safe_open(path, framework="torch") as file:
            tensors = {name: file.get_tensor(name) for name in header.sizes}
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    except Exception as error:  # the library's own, which derives from nothing more telling
        raise_if_out_of_memory(error, path)
        raise CorruptError(f"cannot be opened: {error}", path=path) from error
    opened = Sources()
    opened.add(path, header.fingerprint)
    opened.check_unchanged()  # it was opened once more, by its name
    sources.files.extend(opened)
    # Others may have written tensors at odd places, where not every operation may read them; and an empty one would
    # lie at the address of the next.
    return {
        name: tensor.clone() if not tensor.numel() or tensor.data_ptr() % tensor.itemsize else tensor
        for name, tensor in tensors.items()
    }


def save_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write tensors of `NATIVE_DTYPES` and text to a new file; what is not contiguous is copied meanwhile.

    Wide elements come first, so that all are aligned; otherwise the order is kept.

    Raises:
        LimitError: the header would be larger than readers accept.
        StorageError: the file cannot be written; the message has the reason.
    """
    ordered = _in_order(tensors)
    with errors_at(path):
        raw = _header(ordered, metadata)
    try:
        with path.open("xb") as file, progress.progress_bar("writing", size_of(dict(tensors))) as count:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for _, tensor in ordered:
                for (piece,) in in_pieces(bytes_of(tensor), size=_PIECE):
                    count(file.write(piece.numpy().data))
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error


def safetensors_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Return how many bytes `save_safetensors` would write."""
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
        raise InconsistentError("holds text that is not Unicode", key=_METADATA) from error
    raw += b" " * (-len(raw) % 8)
    if len(raw) > LARGEST_SAFETENSORS_HEADER:
        raise LimitError(f"its header would take {len(raw)} bytes; {LARGEST_SAFETENSORS_HEADER} is the format's bound")
    return raw
