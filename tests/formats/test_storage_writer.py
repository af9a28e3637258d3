"""Copies are verified piece by piece: damage in the source, in flight and in the target is found."""

from __future__ import annotations

import errno
import os
import signal
import threading
import zlib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from vraxion_ckpt.checkpoint.references import ComputedBytes, MadeBytes, Storage, TensorRef
from vraxion_ckpt.checkpoint.source_files import Fingerprint, SourceFile, Sources, StoredBytes
from vraxion_ckpt.checkpoint.written_files import note_written, recording
from vraxion_ckpt.errors import ChangedError, CkptError, CorruptError, StorageError
from vraxion_ckpt.formats.safetensors_writer import save_safetensors
from vraxion_ckpt.formats.storage_writer import Placement, write_storages
from vraxion_ckpt.formats.torch_writer import save_torch_file
from vraxion_ckpt.support import checksums, file_copy, signals
from vraxion_ckpt.support.checksums import crc32_combined
from vraxion_ckpt.support.file_copy import PIECE, OpenFile

SIZES = [0, 1, 4095, 4096, PIECE, PIECE + 1, 3 * 2**22 + 5]


def content_of(size: int) -> bytes:
    return torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes()


@pytest.fixture(params=[1, 4], ids=["one thread", "four threads"], autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_copy, "THREADS", request.param)


def without_kernel_copy(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse)


def short_kernel_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda i, o, size, *at: copy(i, o, min(size, 1000), *at))


WAYS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "kernel": lambda _: None,
    "short": short_kernel_copy,
    "none at all": lambda patch: patch.delattr(os, "copy_file_range"),
    "nothing copied": lambda patch: patch.setattr(os, "copy_file_range", lambda *_: 0),
    **{
        errno.errorcode[number]: lambda patch, number=number: without_kernel_copy(patch, number)
        for number in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
    },
}


def stored(path: Path, content: bytes, *, start: int = 0, stated: bool = True) -> StoredBytes:
    path.write_bytes(bytes(start) + content + b"more")
    file = SourceFile(path, Fingerprint.of(path))
    crc = zlib.crc32(content) if stated else None
    part = StoredBytes(file, start, len(content), crc, "the part")
    file.parts = [part]
    return part


def write(path: Path, storages: list[Any], start: int = 100) -> tuple[bytes, list[int]]:
    placements = []
    at = start
    for storage in storages:
        placements.append(Placement(storage, 0, storage.nbytes, at))
        at += storage.nbytes
    with path.open("x+b", buffering=0) as file:
        crcs = write_storages(placements, OpenFile(file.fileno(), path), lambda _: None)
    return path.read_bytes()[start:], crcs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "not stated"])
@pytest.mark.parametrize("shift", [0, 7], ids=["same offset in a block", "another offset"])
def test_bytes_of_files_are_copied(tmp_path, monkeypatch, way, stated, shift):
    contents, parts, at = [content_of(size) for size in SIZES], [], 100
    for number, content in enumerate(contents):
        start = (at + shift) % file_copy.BLOCK
        parts.append(stored(tmp_path / f"{number}", content, start=start, stated=stated))
        at += len(content)
    with monkeypatch.context() as patch:
        WAYS[way](patch)
        found, crcs = write(tmp_path / "target", parts)

    assert found == b"".join(contents)
    assert crcs == [zlib.crc32(each) for each in contents]
    assert [part.proven for part in parts] == [stated] * len(parts)
    assert [part.found_crc for part in parts] == ([None] * len(parts) if stated else crcs)


def test_bytes_in_memory_are_copied(tmp_path):
    tensors = [torch.randint(256, (size,), dtype=torch.uint8) for size in SIZES]
    made = [MadeBytes(tensor.untyped_storage()) for tensor in tensors]
    computed = [ComputedBytes(size, tensor.clone) for size, tensor in zip(SIZES, tensors, strict=True)]
    contents = [tensor.numpy().tobytes() for tensor in tensors]
    storages: list[Storage] = [storage for pair in zip(made, computed, strict=True) for storage in pair]
    found, crcs = write(tmp_path / "target", storages)

    assert found == b"".join(content + content for content in contents)
    assert [storage.crc for storage in storages] == crcs
    assert crcs[::2] == crcs[1::2] == [zlib.crc32(each) for each in contents]


def test_many_source_files_are_not_open_together(tmp_path):
    contents = [content_of(10) for _ in range(300)]
    parts = [stored(tmp_path / f"{n}", each) for n, each in enumerate(contents)]
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    most = 0

    def advance(_: int) -> None:
        nonlocal most
        most = max(most, len(list(descriptors.iterdir())) - before)

    with (tmp_path / "target").open("x+b") as file:
        places = [Placement(part, 0, 10, 10 * n) for n, part in enumerate(parts)]
        write_storages(places, OpenFile(file.fileno(), tmp_path / "target"), advance)

    assert (tmp_path / "target").read_bytes() == b"".join(contents)
    assert 60 < most < 80


@pytest.mark.parametrize(("first", "second"), list(product([0, 1, 5, 2**18, 2**22 + 3], repeat=2)))
def test_checksums_of_two_runs_are_combined(first, second):
    one, two = content_of(first), content_of(second)
    assert crc32_combined(zlib.crc32(one), zlib.crc32(two), second) == zlib.crc32(one + two)


def test_checksums_are_those_of_zlib():
    content = content_of(100_001)
    assert checksums.crc32(content, 5) == zlib.crc32(content, 5)


# --- damage ---


def flip(path: Path, at: int) -> None:
    """Flip a bit, and leave the fingerprint of the file as it is."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


SIZE = 2**23 + 77
PLACES = [0, 1, PIECE - 1, PIECE, 2**22, SIZE - 1]


@pytest.mark.parametrize("at", PLACES)
def test_a_flipped_bit_in_the_source_is_found(tmp_path, at):
    part = stored(tmp_path / "source", content_of(SIZE), start=50)
    flip(tmp_path / "source", 50 + at)
    with pytest.raises(CorruptError, match="its checksum does not match its bytes") as caught:
        write(tmp_path / "target", [part])

    assert (caught.value.path, caught.value.key) == (tmp_path / "source", "the part")
    assert not part.proven


def damaged_copy(monkeypatch: pytest.MonkeyPatch, damage: Callable[[int, int], bool], in_kernel: bool) -> None:
    """Flip a bit of what is copied to some offset of the target."""
    copy, write_all = os.copy_file_range, os.pwrite

    def copied(source: int, target: int, size: int, start: int, target_start: int) -> int:
        if not in_kernel:
            raise OSError(errno.EXDEV, "no")
        done = copy(source, target, size, start, target_start)
        if damage(target_start, done):
            byte = os.pread(target, 1, target_start)[0]
            write_all(target, bytes([byte ^ 1]), target_start)
        return done

    def written(target: int, content: memoryview, start: int) -> int:
        if damage(start, len(content)):
            content = memoryview(bytes([content[0] ^ 1]) + bytes(content[1:]))
        return write_all(target, content, start)

    monkeypatch.setattr(os, "copy_file_range", copied)
    monkeypatch.setattr(os, "pwrite", written)


@pytest.mark.parametrize("piece", [0, 1, 17, 32])
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "not stated"])
@pytest.mark.parametrize("in_kernel", [True, False], ids=["in the kernel", "read and written"])
def test_a_flipped_bit_in_flight_is_found(tmp_path, monkeypatch, piece, stated, in_kernel):
    part = stored(tmp_path / "source", content_of(SIZE), start=100, stated=stated)
    damaged_copy(monkeypatch, lambda start, _: start // PIECE == piece, in_kernel)
    with pytest.raises(StorageError, match="differs from what was written") as caught:
        write(tmp_path / "target", [part])

    assert caught.value.path == tmp_path / "target"
    assert (part.proven, part.found_crc) == (False, None)


def test_a_flipped_bit_of_memory_in_flight_is_found(tmp_path, monkeypatch):
    damaged_copy(monkeypatch, lambda start, _: start // PIECE == 3, True)
    tensor = torch.zeros(SIZE, dtype=torch.uint8)
    storages: list[Storage] = [MadeBytes(tensor.untyped_storage()), ComputedBytes(SIZE, tensor.clone)]
    for number, storage in enumerate(storages):
        with pytest.raises(StorageError, match="differs from what was written"):
            write(tmp_path / f"{number}", [storage])
        assert storage.crc is None


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "not stated"])
def test_a_flipped_bit_in_the_target_is_found(tmp_path, monkeypatch, stated):
    """The bit flips after the piece was written, and before it is read back."""
    part = stored(tmp_path / "source", content_of(SIZE), stated=stated)
    copy = file_copy.copy_range

    def copied(source: OpenFile, start: int, target: OpenFile, target_start: int, buffer: memoryview) -> None:
        copy(source, start, target, target_start, buffer)
        if target_start <= 5_000_000 < target_start + len(buffer):
            byte = os.pread(target.descriptor, 1, 5_000_000)[0]
            os.pwrite(target.descriptor, bytes([byte ^ 128]), 5_000_000)

    monkeypatch.setattr(file_copy, "copy_range", copied)
    with pytest.raises(StorageError, match="differs from what was written"):
        write(tmp_path / "target", [part])


def test_swapped_pieces_are_found(tmp_path, monkeypatch):
    part = stored(tmp_path / "source", content_of(SIZE))
    copy = file_copy.copy_range

    def copied(source: OpenFile, start: int, target: OpenFile, target_start: int, buffer: memoryview) -> None:
        other = {2 * PIECE: 3 * PIECE, 3 * PIECE: 2 * PIECE}.get(start, start)
        copy(source, other, target, target_start, buffer)

    monkeypatch.setattr(file_copy, "copy_range", copied)
    with pytest.raises(StorageError, match="differs from what was written"):
        write(tmp_path / "target", [part], start=0)


def test_swapped_parts_of_a_source_are_found(tmp_path):
    contents = [content_of(100), content_of(100)]
    path = tmp_path / "source"
    path.write_bytes(contents[1] + contents[0])
    file = SourceFile(path, Fingerprint.of(path))
    parts = [StoredBytes(file, 100 * n, 100, zlib.crc32(each), f"part {n}") for n, each in enumerate(contents)]
    file.parts = parts
    with pytest.raises(CorruptError, match="the same holds for part 1") as caught:
        write(tmp_path / "target", parts)
    assert caught.value.key == "part 0"


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "not stated"])
def test_a_truncated_source_is_found(tmp_path, monkeypatch, stated):
    part = stored(tmp_path / "source", content_of(SIZE), stated=stated)
    os.truncate(tmp_path / "source", SIZE - 10)
    with pytest.raises(ChangedError):
        write(tmp_path / "before", [part])

    part = stored(tmp_path / "source", content_of(SIZE), stated=stated)
    copy = file_copy.copy_range

    def copied(*arguments: Any) -> None:
        os.truncate(tmp_path / "source", SIZE - 10)
        copy(*arguments)

    monkeypatch.setattr(file_copy, "copy_range", copied)
    with pytest.raises(ChangedError):
        write(tmp_path / "meanwhile", [part])


def test_a_replaced_source_is_found(tmp_path):
    part = stored(tmp_path / "source", content_of(50))
    (tmp_path / "source").rename(tmp_path / "old")
    (tmp_path / "source").write_bytes((tmp_path / "old").read_bytes())
    with pytest.raises(ChangedError):
        write(tmp_path / "target", [part])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_errors_of_the_operating_system_name_the_file(tmp_path, monkeypatch, number):
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    part = stored(tmp_path / "source", content_of(SIZE), start=100)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(StorageError, match=os.strerror(number)) as caught:
        write(tmp_path / "target", [part])
    assert caught.value.path == tmp_path / "target"

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(StorageError, match=os.strerror(number)) as caught:
        write(tmp_path / "other", [part])
    assert caught.value.path == tmp_path / "source"


def interrupted(write: Callable[[], None]) -> None:
    with signals.deferred(), signals.interruptible():
        write()


@pytest.mark.parametrize("run", [interrupted, lambda write: write()], ids=["interruptible", "not in a block"])
def test_a_signal_ends_a_copy_and_its_threads(tmp_path, monkeypatch, run):
    part = stored(tmp_path / "source", content_of(16 * 2**20))
    copied = []
    copy = file_copy.copy_range

    def slow(*arguments: Any) -> None:
        copied.append(arguments[1])
        if len(copied) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.01)  # so that the main thread runs
        copy(*arguments)

    monkeypatch.setattr(file_copy, "copy_range", slow)
    before = threading.active_count()
    ref = TensorRef.contiguous(part, "uint8", (part.nbytes,))
    with pytest.raises(KeyboardInterrupt):
        run(lambda: save_torch_file(ref, tmp_path / "target.pt"))
    copied.clear()
    with pytest.raises(KeyboardInterrupt):
        run(lambda: save_safetensors({"a": ref}, {}, tmp_path / "target.safetensors"))
    assert len(copied) < 30
    assert threading.active_count() == before


# --- the record ---


def test_checksums_that_were_read_back_are_recorded(tmp_path):
    tensors = {"a": torch.rand(10), "b": torch.rand(3, 4).t(), "c": torch.empty(0)}
    with recording() as written:
        save_torch_file(tensors["a"], tmp_path / "x.pt")
        save_safetensors(tensors, {}, tmp_path / "x.safetensors")
    crc = zlib.crc32(tensors["a"].numpy().tobytes())
    pt = Sources().add(tmp_path / "x.pt", Fingerprint.of(tmp_path / "x.pt"))
    at = (tmp_path / "x.pt").read_bytes().index(tensors["a"].numpy().tobytes())
    assert written.crc(pt, at, 40) == crc
    assert written.crc(pt, at, 39) is None

    place = tmp_path / "x.safetensors"
    other = SourceFile(place, Fingerprint.of(place))
    content = place.read_bytes()
    for tensor in tensors.values():
        data = tensor.contiguous().numpy().tobytes()
        start = content.index(data) if data else len(content)
        assert written.crc(other, start, len(data)) == zlib.crc32(data)

    # Neither a write nor one that restores the time of the file goes unnoticed.
    times = place.stat().st_atime_ns, place.stat().st_mtime_ns
    place.write_bytes(content)
    os.utime(place, ns=times)
    changed = SourceFile(place, Fingerprint.of(place))
    assert changed.fingerprint == other.fingerprint
    assert written.crc(changed, len(content), 0) is None


def test_nothing_is_recorded_outside(tmp_path):
    with recording() as written:
        pass
    with (tmp_path / "x").open("wb") as file:
        note_written(file.fileno(), {(0, 0): 0})
    assert written.crc(SourceFile(tmp_path / "x", Fingerprint.of(tmp_path / "x")), 0, 0) is None


def test_an_error_in_another_thread_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr(file_copy, "THREADS", 4)
    part = stored(tmp_path / "source", content_of(16 * 2**20))
    copied = []

    def fail(*_: Any) -> None:
        copied.append(1)
        if threading.current_thread() is not threading.main_thread():
            raise StorageError("no")
        threading.Event().wait(0.2)

    monkeypatch.setattr(file_copy, "copy_range", fail)
    with pytest.raises(CkptError, match=r"no|truncated"):
        write(tmp_path / "target", [part])
    assert len(copied) < 10
