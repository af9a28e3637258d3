"""Bytes of source files are those of the file that was registered, or an error."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import zlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from support import DATA, bits

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint import source_files
from vraxion_ckpt.checkpoint.references import TensorRef
from vraxion_ckpt.checkpoint.source_files import Fingerprint, SourceFile, Sources, StoredBytes, buffer_of
from vraxion_ckpt.errors import ChangedError, CkptWarning, CorruptError

CONTENT = bytes(range(256)) * 8192  # several pieces


def register(path: Path, sources: Sources | None = None) -> StoredBytes:
    """Return all bytes of a file but its first 16 and its last, as a part of the file."""
    file = (sources or Sources()).add(path, Fingerprint.of(path))
    part = StoredBytes(file, 16, len(CONTENT) - 17, zlib.crc32(CONTENT[16:-1]), "part", alignment=16)
    file.parts = [part]
    return part


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(CONTENT)
    return tmp_path / "a"


def test_all_ways_to_read_give_the_bytes_of_the_file(path):
    part = register(path)
    assert part.read(0, part.nbytes) == CONTENT[16:-1]
    assert part.read(5, 7) == CONTENT[21:28]
    assert b"".join(piece for _, piece in part.pieces()) == CONTENT[16:-1]
    assert [first for first, _ in part.pieces()] == [0, 2**20]
    assert buffer_of(part.view()) == CONTENT[16:-1]
    unseen = part.view().data_ptr()
    assert buffer_of(part.memory()) == CONTENT[16:-1]
    assert part.read(5, 7) == CONTENT[21:28]
    assert part.memory().data_ptr() == part.memory().data_ptr() == part.view().data_ptr() != unseen


@pytest.mark.parametrize("start", [0, 1, 8, 16, 24])
def test_memory_of_plugins_is_aligned(start, path):
    file = Sources().add(path, Fingerprint.of(path))
    for is_copy in (False, True):
        storage = StoredBytes(file, start, 64, alignment=16, is_copy=is_copy)
        for memory in (storage.memory(), storage.view()):
            assert memory.data_ptr() % 16 == 0
            assert buffer_of(memory) == CONTENT[start : start + 64]


def test_a_copy_shares_no_memory_and_a_write_into_one_is_found(path):
    part = register(path)
    other = part.copied()
    assert other.memory().data_ptr() != part.memory().data_ptr()
    buffer_of(other.memory())[3] ^= 1
    assert other.was_written_into()
    assert not part.was_written_into()
    assert path.read_bytes() == CONTENT


def overwritten(path: Path) -> None:
    path.write_bytes(CONTENT[:-1])


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replaced(path: Path) -> None:
    path.with_name("b").write_bytes(CONTENT[::-1])
    path.with_name("b").replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "overwritten": overwritten,
    "touched": touched,
    "replaced": replaced,
    "removed": Path.unlink,
}
READS: dict[str, Callable[[StoredBytes], object]] = {
    "read": lambda part: part.read(0, 1),
    "pieces": lambda part: list(part.pieces()),
    "view": lambda part: part.view(),
    "verify": lambda part: part.file.verify(),
    "check": lambda part: part.file.check_unchanged(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", READS)
def test_a_file_that_changed_is_not_read(name, change, path, monkeypatch):
    """A file that is not kept open is found by its path, so every change is noticed."""
    monkeypatch.setattr(SourceFile, "keep_open", lambda _: None)
    part = register(path)
    change(path)
    with pytest.raises(ChangedError, match="changed while it was being read") as caught:
        READS[name](part)
    assert caught.value.path == path


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("most", [0, 1000])
def test_a_file_that_changed_before_it_was_registered_is_refused(most, change, path, monkeypatch):
    monkeypatch.setattr(source_files, "_MOST_OPEN", most)
    fingerprint = Fingerprint.of(path)
    change(path)
    with pytest.raises(ChangedError):
        Sources().add(path, fingerprint)


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_file_that_is_kept_open_stays_readable_when_its_path_goes(change, path):
    part = register(path)
    CHANGES[change](path)
    assert part.read(0, part.nbytes) == CONTENT[16:-1]
    assert buffer_of(part.view()) == CONTENT[16:-1]
    with pytest.raises(ChangedError):
        part.file.check_unchanged()


@pytest.mark.parametrize("change", ["overwritten", "touched"])
@pytest.mark.parametrize("name", ["read", "pieces", "view", "verify", "check"])
def test_a_write_into_a_file_that_is_kept_open_is_noticed(name, change, path):
    part = register(path)
    CHANGES[change](path)
    with pytest.raises(ChangedError):
        READS[name](part)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_more_files_than_are_kept_open_can_be_read(tmp_path):
    """And more than the process may have open: 200 files, with room for 160."""
    sources, parts = Sources(), []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    before = open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 160, hard))
    try:
        for number in range(200):
            path = tmp_path / str(number)
            torch.save(torch.tensor([number]), path)
            (start,) = [at for at in range(path.stat().st_size) if path.read_bytes()[at : at + 8] == _word(number)][:1]
            parts.append(StoredBytes(sources.add(path, Fingerprint.of(path)), start, 8))
        opened = open_files() - before
        assert 0 < opened <= 128
        assert [int.from_bytes(part.read(0, 8), "little") for part in parts] == list(range(200))
        refs = [TensorRef.contiguous(part, "int64", (1,)) for part in parts]
        assert [int(ref.tensor()) for ref in refs] == [int(ref.read_only_tensor()) for ref in refs] == list(range(200))
        sources.check_unchanged()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    del sources, parts, refs
    gc.collect()
    assert open_files() == before


def _word(number: int) -> bytes:
    return number.to_bytes(8, "little")


def test_parts_are_proven_once_and_damage_is_named(path, monkeypatch):
    sources = Sources()
    part = register(path, sources)
    sources.verify()
    assert part.proven
    monkeypatch.setattr(SourceFile, "opened", None)  # a second look would fail
    sources.verify()


def test_damage_is_named_with_all_parts(path):
    sources = Sources()
    file = sources.add(path, Fingerprint.of(path))
    right = zlib.crc32(CONTENT[:100])
    file.parts = [
        StoredBytes(file, 0, 100, right, "good"),
        StoredBytes(file, 0, 100, right ^ 1, "first"),
        StoredBytes(file, 0, 100, right ^ 2, "second"),
        StoredBytes(file, 0, 100, right ^ 4, "proven already", proven=True),
    ]
    with pytest.raises(CorruptError, match="does not match its bytes; the same holds for second") as caught:
        sources.verify()
    assert (caught.value.path, caught.value.key) == (path, "first")
    assert [part.proven for part in file.parts] == [True, False, False, True]


def test_parts_without_a_checksum_are_reported_if_the_format_has_them(path):
    file = Sources().add(path, Fingerprint.of(path))
    file.parts = [StoredBytes(file, 0, 100), StoredBytes(file, 100, 0)]
    file.verify()
    file.states_checksums = True
    with pytest.warns(CkptWarning, match="has 1 member without a checksum"):
        file.verify()


def test_a_mapping_has_the_bytes_of_the_registered_file(path):
    part = register(path)
    replaced(path)
    ref = TensorRef.contiguous(part, "uint8", (part.nbytes,))
    assert bits(ref.tensor()) == CONTENT[16:-1] == bits(ref.read_only_tensor())


def test_a_copied_or_pickled_checkpoint_leaves_the_files_of_the_first_open() -> None:
    """A second owner of a descriptor would close it, and later perhaps a file of somebody else."""
    first = vc.open(DATA / "named_experts3.pt")
    gc.collect()  # closes files of earlier tests
    before = set(Path("/proc/self/fd").iterdir())
    for copy in (deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert all(torch.equal(copy.state_dict()[name], tensor) for name, tensor in first.state_dict().items())
        assert isinstance(copy.core, vc.TensorDict)
        assert isinstance(copy.optimizer.state, vc.TensorDict)
    del copy
    gc.collect()
    assert before <= set(Path("/proc/self/fd").iterdir())
    assert first.sources.files[0].read(0, 2) == b"PK"


def test_what_torch_saves_of_a_checkpoint_can_be_loaded_safely(tmp_path: Path) -> None:
    checkpoint = vc.open(DATA / "named_experts3.pt")
    torch.save({"model": checkpoint.state_dict(), "core": checkpoint.core}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(torch.equal(saved["model"][name], tensor) for name, tensor in checkpoint.state_dict().items())
    assert list(saved["core"]) == list(checkpoint.core)
