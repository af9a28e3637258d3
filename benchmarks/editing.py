"""Edits in place as they are measured. The functions of this module run in processes of their own."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks import inputs
from benchmarks.converting import memory_with_torch
from benchmarks.measuring import MIB, bytes_read_and_written, watched


def grow(root: str, addresses: list[int]) -> dict[str, float]:
    """Split expert 0 of a modular directory in place, which gives one more expert.

    Returns:
        ``seconds``; ``added``, the peak of anonymous memory in MiB over a process with torch imported; ``shards``, the
        number of experts' files that were opened. The bytes that were ``read``, ``written`` and ``opened`` are ratios
        to the size of the files that must be: the three that the edit replaces or copies, and for ``read`` also the
        three that it writes, since they are read back.
    """
    before = memory_with_torch()
    import vraxion_ckpt as vc

    _warm_up(Path(root).parent)
    place = Path(root)
    sizes = {str(file): file.stat().st_size for file in place.rglob("*") if file.is_file()}
    opened: set[str] = set()

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]) in sizes:
            opened.add(str(arguments[0]))

    sys.addaudithook(note)
    start = bytes_read_and_written()
    split = f"mitosis_split:parent=0,addresses={addresses},noise=0".replace(" ", "")
    found = watched(lambda: vc.edit(place, transforms=[split]))
    read, written = (after - first for after, first in zip(bytes_read_and_written(), start, strict=True))
    experts = sum(1 for name in sizes if name.endswith(".pt"))
    needed = ("system/router.state", "experts/meta.json", "experts/expert_000.pt")
    new = ("system/router.state", "experts/meta.json", f"experts/expert_{experts:03d}.pt")
    old_bytes = sum(sizes[str(place / name)] for name in needed)
    new_bytes = sum((place / name).stat().st_size for name in new)
    return {
        "seconds": found.seconds,
        "added": (found.peak - before) / MIB,
        "shards": sum(1 for name in opened if name.endswith(".pt")),
        "opened": sum(sizes[name] for name in opened) / old_bytes,
        "read": read / (old_bytes + new_bytes),
        "written": written / new_bytes,
    }


def _warm_up(folder: Path) -> None:
    import vraxion_ckpt as vc

    with tempfile.TemporaryDirectory(dir=folder) as place:
        inputs.directory(f"{place}/tiny", 2, 2**16)
        vc.edit(f"{place}/tiny", transforms=["mitosis_split:parent=0,addresses=[0],noise=0"])
