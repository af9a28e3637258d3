"""Every kind of bad input, each made by code: what it is, how it is refused, and by which commands.

The tables of the formats' own tests are part of it; what is written here is what they lack as a table. None of these
files is to be believed, and some would run a command that leaves a file called `PROOF`, if they were.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import test_container as of_container
import test_document as of_document
import test_modular_errors as of_modular
import test_safetensors as of_safetensors
import test_torchfile as of_torchfile
import torch
from hostile import Entry, zip_bytes
from safetensors.torch import save_file
from scenarios import Tree, read_tree, write_tree
from support import DATA
from torch import nn

import vraxion_ckpt as vc
from vraxion_ckpt.errors import (
    CkptError,
    CorruptError,
    InconsistentError,
    LimitError,
    UnknownFormatError,
    UnsafeError,
    UnsupportedError,
    UsageError,
)

PROOF = "proof"  # what a pickle leaves beside the checkpoint, if it runs


@dataclass(frozen=True)
class Bad:
    """A checkpoint that must be refused.

    Attributes:
        build: puts it into an empty folder and returns its path.
        error: the class it is refused with.
        says: parts of the message, as regular expressions, once line breaks and runs of spaces are one space.
        parent: the expert that an edit must split to come across what is wrong; it opens no other shard.
        to: what an edit must be told to write this format.
        unseen: commands that do not look at what is wrong.
        live: the file below the checkpoint whose pickle runs a command, if anyone lets it.
    """

    build: Callable[[Path], Path]
    error: type[CkptError]
    says: tuple[str, ...]
    parent: int = 0
    to: str | None = None
    unseen: frozenset[str] = frozenset()
    live: str | None = None


INSPECT, EDIT = frozenset({"inspect"}), frozenset({"edit"})
Entries = Mapping[str, Bad]


# --- .pt ---


def raw(content: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / "x.pt").write_bytes(content)
        return folder / "x.pt"

    return build


def saved(value: Callable[[Path], Any], **options: Any) -> Callable[[Path], Path]:
    """Save what torch itself saves without a word; `value` is told where a proof would go."""

    def build(folder: Path) -> Path:
        torch.save(value(folder / PROOF), folder / "x.pt", **options)
        return folder / "x.pt"

    return build


def model(value: Callable[[], Any]) -> Callable[[Path], Path]:
    return saved(lambda _: {"model": {"w": value()}})


def real(change: Callable[[bytearray], Any]) -> Callable[[Path], Path]:
    """Change the bytes of a trainer's file; the file itself if `change` returns nothing."""

    def build(folder: Path) -> Path:
        content = bytearray((DATA / "wallclock_experts3.pt").read_bytes())
        changed = change(content)
        return raw(bytes(content if changed is None else changed))(folder)

    return build


def archive(count: int | None = None, **replaced: Entry | None) -> Callable[[Path], Path]:
    """Make an archive with one tensor and some members replaced."""
    return raw(zip_bytes(of_container.tensor_archive(**replaced), count))


def pickled(operations: bytes, storages: dict[str, bytes] | None = None) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        of_torchfile.write_pickle(folder / "x.pt", operations, storages)
        return folder / "x.pt"

    return build


def command(way: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """Make a pickle that calls ``os.system``, spelt one way of several."""
    return lambda folder: pickled(way(of_torchfile.text(f"touch {folder / PROOF}")))(folder)


def tensor(size: tuple[int, ...], stride: tuple[int, ...]) -> Callable[[Path], Path]:
    """Make a tensor of four elements in its storage, whatever its shape says."""
    return pickled(b"}" + of_torchfile.text("w") + of_torchfile.tensor(size, stride) + b"s", of_torchfile.FOUR)


def deflated(size: int) -> Callable[[Path], Path]:
    """Compress an archive whose one storage is `size` zeros."""

    def build(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "x.pt", "w", zipfile.ZIP_DEFLATED) as zipped:
            for entry in of_container.tensor_archive(**{"0": Entry("archive/data/0", bytes(size))}):
                zipped.writestr(entry.name, entry.data)
        return folder / "x.pt"

    return build


def legacy_tar(folder: Path) -> Path:
    with tarfile.open(folder / "x.pt", "w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            tar.addfile(tarfile.TarInfo(name))
    return folder / "x.pt"


def overlapping() -> bytes:
    """Let a member's bytes be a whole other member, header and all."""
    inner = zip_bytes([Entry("archive/data/0", bytes(16))])
    inner = inner[: inner.index(b"PK\1\2")]
    plain = of_container.tensor_archive(**{"0": None, "outer": Entry("archive/outer", inner)})
    claimed = Entry("archive/data/0", bytes(16), central={"offset": zip_bytes(plain).index(inner)})
    return zip_bytes([*plain, claimed])


def flip(content: bytearray, at: int) -> None:
    content[at] ^= 1


def in_a_storage(content: bytearray) -> int:
    """Return a place within the first storage of some size."""
    with zipfile.ZipFile(io.BytesIO(content)) as zipped:
        entry = next(e for e in zipped.infolist() if "/data/" in e.filename and e.file_size > 64)
    n_name, n_extra = struct.unpack_from("<2H", content, entry.header_offset + 26)
    return int(entry.header_offset + 30 + n_name + n_extra + 50)


def storage(**how: Any) -> dict[str, Entry]:
    return of_container.storage(**how)


class Exec:
    """Runs Python when it is unpickled."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self._code,)


BOTH_HEADS = {"head.single.w": torch.ones(2), "head.experts.0.w": torch.ones(2)}
EVIL = r"would call posix\.system"

PT: Entries = {
    # corrupt
    "empty file": Bad(raw(b""), CorruptError, ("is empty",)),
    "text": Bad(raw(b"these are not the weights\n" * 100), CorruptError, ("not a torch archive",)),
    "HTML": Bad(raw(b"<!DOCTYPE html><html><body>404</body></html>"), CorruptError, ("web page", "download")),
    "git-lfs pointer": Bad(raw(of_safetensors.LFS), CorruptError, ("git-lfs pointer", "git lfs pull")),
    "zeros": Bad(raw(bytes(4096)), CorruptError, ("not a torch archive",)),
    "signature alone": Bad(raw(b"PK\3\4"), CorruptError, ("truncated",)),
    **{
        f"truncated to {percent} %": Bad(
            real(lambda c, p=percent: c[: len(c) * p // 100]), CorruptError, ("truncated",)
        )
        for percent in (1, 50, 99)
    },
    "one byte short": Bad(real(lambda c: c[:-1]), CorruptError, ("truncated",)),
    "byte after its end": Bad(real(lambda c: c + b"\0"), CorruptError, ("after its end",)),
    "bit flipped in a storage": Bad(
        real(lambda c: flip(c, in_a_storage(c))), CorruptError, (r"\[[^]]*/data/[0-9]+\]", "checksum"), unseen=INSPECT
    ),
    "bit flipped in the pickle": Bad(
        real(lambda c: flip(c, c.index(b"model") + 1)), CorruptError, (r"data\.pkl", "checksum")
    ),
    "member marked as a directory": Bad(
        archive(**storage(central={"attributes": 0x10})), CorruptError, ("archive/data/0", "marked as a directory")
    ),
    "member called as a directory": Bad(
        archive(more=Entry("archive/folder/")), CorruptError, ("archive/folder/", "marked as a directory")
    ),
    "member twice": Bad(archive(more=Entry("archive/data/0", b"x")), CorruptError, ("archive/data/0", "occurs twice")),
    "member twice, in capitals": Bad(archive(more=Entry("archive/DATA/0", b"x")), CorruptError, ("occurs twice",)),
    "members overlap": Bad(raw(overlapping()), CorruptError, ("archive/data/0", "overlaps")),
    "local name is another": Bad(
        archive(**storage(local={"name": "archive/data/1"})), CorruptError, ("archive/data/0", "names another member")
    ),
    "local size is another": Bad(archive(**storage(local={"size": 15})), CorruptError, ("contradicts",)),
    "encrypted": Bad(
        archive(**storage(central={"flags": 1}, local={"flags": 1})), CorruptError, ("archive/data/0", "encrypted")
    ),
    "no pickle": Bad(archive(pickle=None), CorruptError, (r"0 members called data\.pkl",)),
    "two pickles": Bad(
        archive(more=Entry("other/data.pkl", b"\x80\x02}.")), CorruptError, (r"2 members called data\.pkl",)
    ),
    "storage missing": Bad(archive(**{"0": None}), CorruptError, ("data/0", "storage is missing")),
    "record shorter than its tensor": Bad(
        archive(**{"0": Entry("archive/data/0", bytes(12))}), CorruptError, ("asks for 16 bytes, the storage has 12",)
    ),
    "record longer than its tensor": Bad(
        archive(**{"0": Entry("archive/data/0", bytes(20))}), CorruptError, ("asks for 16 bytes, the storage has 20",)
    ),
    "shape beyond the storage": Bad(tensor((5,), (1,)), CorruptError, ("torch cannot read it",)),
    "strides beyond the storage": Bad(tensor((2, 2), (1, 3)), CorruptError, ("torch cannot read it",)),
    "negative shape": Bad(tensor((-1,), (1,)), CorruptError, ("torch cannot read it",)),
    "pickle is noise": Bad(pickled(b"\xff\xfe"), CorruptError, ("pickle is damaged",)),
    # unsafe
    "reduce that calls os.system": Bad(
        saved(lambda proof: {"model": {}, "losses": [of_torchfile.Evil(f"touch {proof}")]}),
        UnsafeError,
        (EVIL, "do not load it with anything"),
        live=".",
    ),
    "os.system by NEWOBJ": Bad(
        command(lambda text: b"cos\nsystem\n" + text + b"\x85\x81"), UnsafeError, ("os.system",)
    ),
    "os.system by BUILD": Bad(command(lambda text: b"cos\nsystem\n" + text + b"b"), UnsafeError, ("os.system",)),
    "reduce that calls exec": Bad(
        saved(lambda proof: {"model": {}, "losses": [Exec(f"open({str(proof)!r}, 'w')")]}),
        UnsafeError,
        (r"would call builtins\.exec", "do not load it with anything"),
        live=".",
    ),
    "pickled module": Bad(
        saved(lambda _: nn.Linear(2, 2)), UnsafeError, ("--allow-global torch.nn.modules.linear.Linear",)
    ),
    "numpy number among the losses": Bad(
        saved(lambda _: {"model": {"w": torch.ones(2)}, "losses": [np.float64(0.1)]}),
        UnsafeError,
        (r"numpy\.dtype", r"--allow-global numpy\.dtype"),
    ),
    "class of the trainer's own": Bad(
        saved(lambda _: {"model": {}, "config": of_torchfile.Config()}),
        UnsafeError,
        (rf"--allow-global {re.escape(of_torchfile.Config.__module__)}\.Config",),
    ),
    "memory from elsewhere": Bad(
        pickled(b"}" + of_torchfile.text("w") + of_torchfile.call("torch.Tensor", of_torchfile.number(1000)) + b"s"),
        UnsafeError,
        ("memory that is not in the file",),
    ),
    # unsupported
    "TorchScript": Bad(
        archive(code=Entry("archive/code/x.py", b""), constants=Entry("archive/constants.pkl", b"\x80\x02).")),
        UnsupportedError,
        ("TorchScript", "state_dict"),
    ),
    "legacy tar": Bad(legacy_tar, UnsupportedError, ("tar archive", r"torch\.save")),
    "legacy pickle": Bad(
        saved(lambda _: of_container.SMALL, _use_new_zipfile_serialization=False),
        UnsupportedError,
        (r"before 1\.6", r"torch\.save"),
    ),
    "bare pickle": Bad(raw(b"\x80\x02}."), UnsupportedError, ("bare pickle",)),
    "compressed": Bad(deflated(16), UnsupportedError, ("is compressed", r"torch\.save")),
    "sparse tensor": Bad(model(lambda: torch.eye(3).to_sparse()), UnsupportedError, (r"\[model\.w\]", "sparse")),
    "quantised tensor": Bad(
        model(lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
        UnsupportedError,
        (r"\[model\.w\]", "quantised"),
    ),
    "meta tensor": Bad(
        model(lambda: torch.ones(2, device="meta")), UnsupportedError, (r"\[model\.w\]", "tensor without data")
    ),
    "tensor subclass": Bad(
        model(lambda: torch.ones(2).as_subclass(of_torchfile.Marked)), UnsupportedError, ("a tensor subclass",)
    ),
    "set": Bad(model(lambda: {1, 2}), UnsupportedError, (r"\[model\.w\]", r"builtins\.set")),
    # limit
    "deflate bomb": Bad(deflated(100 * 2**20), LimitError, ("archive/data/0", "inflate beyond the file")),
    "stride 0 giant": Bad(tensor((10**12,), (0,)), LimitError, (r"\[w\]", "repeats its storage")),
    "stride 0 giant, as torch saves it": Bad(
        model(lambda: torch.ones(1).expand(10**12)), LimitError, (r"\[model\.w\]", "repeats its storage")
    ),
    "shared lists": Bad(pickled(of_torchfile.bomb(90)), LimitError, ("more than 5000000 values",)),
    "list that holds itself": Bad(pickled(b"]q\0h\0a"), LimitError, ("nested deeper",)),
    "lists 200,000 deep": Bad(pickled(b"]" * 200_000 + b"a" * 199_999), LimitError, ("nested deeper",)),
    "tuples 200,000 deep": Bad(pickled(b"N" + b"\x85" * 200_000), LimitError, ("nested deeper",)),
    "a million members": Bad(archive(10**6), LimitError, ("has 1000000 members",)),
    # inconsistent
    "a list": Bad(saved(lambda _: [torch.ones(2)]), InconsistentError, ("holds a list, not a dict",)),
    "a tensor": Bad(saved(lambda _: torch.ones(2)), InconsistentError, ("holds a Tensor, not a dict",)),
    "whole numbers as keys": Bad(saved(lambda _: {"model": {0: torch.ones(2)}}), InconsistentError, ("must be text",)),
    "a tuple as a key": Bad(pickled(b"}N\x85Ns"), InconsistentError, ("key of type tuple",)),
    "both kinds of head": Bad(saved(lambda _: {"model": BOTH_HEADS}), InconsistentError, ("holds both",)),
}


# --- safetensors, one file ---


def header(content: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / "x.safetensors").write_bytes(content)
        return folder / "x.safetensors"

    return build


SAFETENSORS: Entries = {
    name: Bad(header(content), error, (re.escape(says),)) for name, (content, error, says) in of_safetensors.BAD.items()
} | {
    "truncated": Bad(header(of_safetensors.file_of({"w": of_safetensors.tensor()}, b"12")), CorruptError, ("missing",)),
}


# --- safetensors, our document in the metadata ---


def payload() -> dict[str, Any]:
    """Return a trainer's payload with something of every kind, as the changes of the document expect it."""
    wave = torch.tensor([1j, 2], dtype=torch.complex128)
    more = {"wave": wave, "x": (1, {2: 3}), "weight": nn.Parameter(torch.ones(2)), "nan": float("nan")}
    return of_document.trained(**more, many=OrderedDict(a=torch.ones(2, dtype=torch.uint8)))


@lru_cache
def sound() -> Tree:
    """Return a file of ours with something of every kind in its payload."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(payload(), f"{folder}/source.pt")
        vc.convert(
            f"{folder}/source.pt", f"{folder}/x.safetensors", transforms=["mitosis_split:parent=0,addresses=[0]"]
        )
        return read_tree(Path(folder) / "x.safetensors")


def document(damage: Callable[[Path], object]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        write_tree(folder / "x.safetensors", sound())
        damage(folder / "x.safetensors")
        return folder / "x.safetensors"

    return build


def without_tensors(path: Path) -> None:
    """Keep the document, and lose the last of the tensors that it speaks of."""
    header = of_document.header_of(path)
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    size = header[last]["data_offsets"][1] - header.pop(last)["data_offsets"][0]
    of_document.write_header(path, json.dumps(header).encode())
    os.truncate(path, path.stat().st_size - size)


DOCUMENTS: Entries = {
    **{
        name: Bad(document(partial(of_document.rewrite, change=change)), error, (re.escape(says),))
        for name, (change, error, says) in of_document.DOCUMENTS.items()
    },
    **{
        f"text: {name}": Bad(document(partial(of_document.rewrite_text, change=change)), error, (re.escape(says),))
        for name, (change, error, says) in of_document.TEXTS.items()
    },
    "a tensor is gone": Bad(document(without_tensors), InconsistentError, ("that is not there",)),
    "no metadata": Bad(
        document(
            lambda path: of_document.write_header(
                path, json.dumps({k: v for k, v in of_document.header_of(path).items() if k[:2] != "__"}).encode()
            )
        ),
        InconsistentError,
        ("the metadata that belongs to it was lost",),
    ),
}


# --- safetensors, shards and an index ---

SHARDS = "safetensors:max_shard_size=1MB"


def index(damage: Callable[[Path], object]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        root = of_safetensors.hf_folder(folder / "repo")
        bait = {"theta": of_safetensors.foreign_model()["theta"]}
        for place in (folder / "outside.safetensors", root / ".outside.safetensors"):
            save_file(bait, place)
        damage(root)
        return root

    return build


def absolute(root: Path) -> None:
    of_safetensors.index_says(str(root.parent / "outside.safetensors"))(root)


INDEX: Entries = {
    **{
        f"path: {name}": Bad(
            index(of_safetensors.index_says(file)), InconsistentError, (r"\[theta\]: is said to be in",), to=SHARDS
        )
        for name, file in of_safetensors.PATHS.items()
    },
    "path: absolute, and there": Bad(index(absolute), InconsistentError, (r"\[theta\]: is said to be in",), to=SHARDS),
    **{
        name: Bad(index(damage), error, (re.escape(says),), to=SHARDS)
        for name, (damage, error, says) in of_safetensors.INDEXES.items()
    },
}


# --- modular directories ---


def directory(damage: of_modular.Damage, stem: str = "modular_experts3") -> Callable[[Path], Path]:
    return lambda folder: of_modular.damaged(stem, folder, damage)


def evil_shard(expert: int) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        evil = of_modular.Evil(folder / PROOF)
        return directory(of_modular.shard(expert, lambda shard: {**shard, "bias": evil}))(folder)

    return build


def evil_router(folder: Path) -> Path:
    evil = of_modular.Evil(folder / PROOF)
    return directory(of_modular.router(lambda payload: payload.update(losses=[evil])))(folder)


# What is wrong inside a shard is seen where that is opened, by an edit if it is the one of the expert that is split.
WITHIN = {
    **dict.fromkeys(("truncated", "one byte short", "empty dict", "a list", "a number", "a leaf missing"), 1),
    **dict.fromkeys(("a leaf too many", "wrong shape", "wrong dtype"), 1),
    **{"wrong shape, the first": 0, "dtype of counts": 2},
}
BILLION = of_modular.router(lambda payload: payload.update(num_experts=10**9))

MODULAR: Entries = {
    **{
        f"shard: {name}": Bad(
            directory(damage),
            InconsistentError,
            (says,),
            parent=WITHIN.get(name, 0),
        )
        for name, (damage, says) in of_modular.SHARDS.items()
    },
    **{
        f"{kind}: {name}": Bad(directory(damage), InconsistentError, (says,))
        for kind, cases in (("number", of_modular.NUMBERS), ("row", of_modular.ROWS))
        for name, (damage, says) in cases.items()
    },
    **{
        name: Bad(directory(damage), error, (says,)) for name, (damage, error, says) in of_modular.OTHER_CLASSES.items()
    },
    "a bit of a shard flipped": Bad(
        directory(of_modular.flip_a_bit_of_expert_1),
        CorruptError,
        (r"expert_001\.pt \[.*checksum",),
        parent=1,
        unseen=INSPECT,
    ),
    "num_experts a billion": Bad(directory(BILLION), InconsistentError, (r"meta\.json \[num_experts\]",)),
    "num_experts a billion, in both": Bad(
        directory(of_modular.both(BILLION, of_modular.meta(lambda meta: meta.update(num_experts=10**9)))),
        InconsistentError,
        (r"expert_003\.pt is missing; num_experts is 1000000000",),
    ),
    **{
        f"evil shard of expert {expert}": Bad(
            evil_shard(expert),
            UnsafeError,
            (rf"expert_00{expert}\.pt", EVIL),
            parent=expert,
            live=f"experts/expert_00{expert}.pt",
        )
        for expert in (0, 1)
    },
    "evil router": Bad(evil_router, UnsafeError, (r"router\.state", EVIL), live="system/router.state"),
}


# --- no checkpoint at all ---


def made(name: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return build


NO_FORMAT = ("format not recognised",)

OTHER: Entries = {
    "empty folder": Bad(made("run", Path.mkdir), UnknownFormatError, NO_FORMAT),
    "folder called like a file": Bad(made("x.pt", Path.mkdir), UnknownFormatError, NO_FORMAT),
    "file of another name": Bad(made("x.bin", lambda path: path.write_bytes(bytes(99))), UnknownFormatError, NO_FORMAT),
    "FIFO": Bad(made("x.pt", os.mkfifo), UnknownFormatError, NO_FORMAT),
    "link to nothing": Bad(made("x.pt", lambda path: path.symlink_to("gone")), UsageError, ("no such file",)),
    "link to itself": Bad(made("x.pt", lambda path: path.symlink_to("x.pt")), UsageError, ("no such file",)),
}


CORPUS: Mapping[str, Entries] = {
    "pt": PT,
    "safetensors": SAFETENSORS,
    "document": DOCUMENTS,
    "index": INDEX,
    "modular": MODULAR,
    "other": OTHER,
}
