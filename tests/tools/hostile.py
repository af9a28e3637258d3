"""Make damaged and hostile ``.pt`` files, and read them as a conversion does."""

from __future__ import annotations

import resource
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from work import bounded

from vraxion_ckpt.checkpoint.source_files import Sources
from vraxion_ckpt.errors import CkptError
from vraxion_ckpt.formats.torch_reader import load_torch_file


def read(path: Path, allow_globals: Sequence[str] = ()) -> Any:
    """Read a file as a conversion does: checksums are compared last."""
    sources = Sources()
    value = load_torch_file(path, sources, allow_globals)
    sources.verify()
    return value


def refused(
    path: Path, error: type[CkptError], match: str | None = None, allow_globals: Sequence[str] = ()
) -> CkptError:
    """Read a file. Expect exactly this class of error, quickly and without much memory."""
    before = _peak()
    with bounded(), pytest.raises(CkptError, match=match) as caught:
        read(path, allow_globals)
    assert type(caught.value) is error
    assert caught.value.path == path
    assert _peak() - before < 2 * path.stat().st_size + 256 * 2**20
    return caught.value


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Entry:
    """A member of a zip archive. `local` and `central` replace fields of its two headers."""

    name: str
    data: bytes = b""
    local: dict[str, Any] = field(default_factory=dict)
    central: dict[str, Any] = field(default_factory=dict)


def archive(pickled: bytes, storages: dict[str, bytes] | None = None, **replaced: Entry | None) -> list[Entry]:
    """Return the members of a file of torch.save."""
    entries = {
        "pickle": Entry("archive/data.pkl", pickled),
        "byteorder": Entry("archive/byteorder", b"little"),
        **{key: Entry(f"archive/data/{key}", data) for key, data in (storages or {}).items()},
        "version": Entry("archive/version", b"3\n"),
        **replaced,
    }
    return [entry for entry in entries.values() if entry is not None]


def zip_bytes(entries: Sequence[Entry], count: int | None = None) -> bytes:
    """Return a zip archive whose end record states `count` members."""
    body, directory = bytearray(), bytearray()
    for entry in entries:
        true = {
            "name": entry.name,
            "flags": 0,
            "method": 0,
            "crc": zlib.crc32(entry.data),
            "packed": len(entry.data),
            "size": len(entry.data),
            "attributes": 0,
            "offset": len(body),
        }
        here, there = true | entry.local, true | entry.central
        name, central_name = here["name"].encode(), there["name"].encode()
        numbers = [here[key] for key in ("flags", "method")] + [0, 0] + [here[key] for key in ("crc", "packed", "size")]
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 0, *numbers, len(name), 0) + name + entry.data
        numbers = [there[key] for key in ("flags", "method")] + [0, 0]
        numbers += [there[key] for key in ("crc", "packed", "size")] + [len(central_name), 0, 0, 0, 0]
        numbers += [there[key] for key in ("attributes", "offset")]
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, *numbers) + central_name
    count = len(entries) if count is None else count
    start, end = len(body), len(body) + len(directory)
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return bytes(body + directory + end64 + locator + last)


# --- Pickles ---


def write_pickle(path: Path, operations: bytes, storages: dict[str, bytes] | None = None) -> None:
    """Write a torch file whose pickle is given as a list of opcodes."""
    path.write_bytes(zip_bytes(archive(b"\x80\x02" + operations + b".", storages)))


def call(name: str, *arguments: bytes) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def tensor(size: tuple[int, ...], stride: tuple[int, ...], held: int = 4) -> bytes:
    """Rebuild a float tensor from storage 0 of `held` elements."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(held) + b"tQ"
    shape, steps = (b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride))
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage, number(0), shape, steps, b"\x89", hooks)


FOUR = {"0": torch.arange(4.0).numpy().tobytes()}
