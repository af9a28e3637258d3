"""Damaged and hostile zip archives, and files that are no zip archives."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Entry, archive, read, refused, zip_bytes

from vraxion_ckpt.checkpoint.comparison import differences
from vraxion_ckpt.errors import CkptError, CkptWarning, CorruptError, LimitError, UnsupportedError

SMALL = {
    "model": {
        "embed.weight": torch.arange(48.0).reshape(8, 6),
        "head.single.bias": torch.ones(5, dtype=torch.bfloat16),
    },
    "optim": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.full((8, 6), 0.25)}}, "param_groups": []},
    "step": 7,
    "losses": [1.5, float("nan"), -0.0],
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.pt"
    torch.save(SMALL, path)
    return path


def tensor_archive(**replaced: Entry | None) -> list[Entry]:
    """Return the members of a file with one tensor, as torch.save writes it."""
    file = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, file)
    with zipfile.ZipFile(file) as zipped:
        pickled, storage = zipped.read("archive/data.pkl"), zipped.read("archive/data/0")
    return archive(pickled, {"0": storage}, **replaced)


# --- Truncated, flipped ---


def test_every_truncation_is_corrupt(small: Path) -> None:
    whole = small.read_bytes()
    assert 2048 < len(whole) < 5000
    for size in range(len(whole)):
        small.write_bytes(whole[:size])
        with pytest.raises(CorruptError):
            read(small)


def test_no_flipped_bit_is_accepted_with_other_contents(small: Path, exhaustive: bool) -> None:
    bits = range(8 * small.stat().st_size)
    assert len(bits) >= 20_000
    some = bits if exhaustive else random.Random(5).sample(bits, 2500)
    outcomes = flip(small, some)
    assert outcomes["other"] == 0
    assert outcomes["CorruptError"] > len(some) / 2  # most bits belong to contents, names and sizes
    assert outcomes["same"] > 0  # some belong to padding, dates and versions


def flip(path: Path, bits: Iterable[int]) -> Counter[str]:
    """Flip one bit at a time; count the classes of errors, and what was accepted with the same or other contents."""
    whole = path.read_bytes()
    outcomes: Counter[str] = Counter()
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            value = read(path)
        except CkptError as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes["other" if any(differences(SMALL, value)) else "same"] += 1
    return outcomes


def test_a_flipped_bit_in_a_storage_is_corrupt(small: Path) -> None:
    whole = bytearray(small.read_bytes())
    whole[whole.index(torch.arange(48.0).numpy().tobytes()) + 100] ^= 1
    small.write_bytes(whole)
    error = refused(small, CorruptError, "checksum")
    assert error.key == "small/data/0"


# --- Not an archive ---


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"these are not the weights\n" * 100, "not a torch archive"),
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"<html>" + b" " * 5000, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-lfs pointer"),
        (b"PK\3\4", "truncated"),
        (b"\0" * 4096, "not a torch archive"),
    ],
    ids=["empty", "text", "doctype", "html", "git-lfs", "signature only", "zeros"],
)
def test_a_file_that_is_no_checkpoint_is_corrupt(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    refused(path, CorruptError, match)


def test_a_folder_is_corrupt(tmp_path: Path) -> None:
    refused(tmp_path, CorruptError, "not a regular file")


def test_a_legacy_pickle_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(SMALL, path, _use_new_zipfile_serialization=False)
    assert "torch.save" in str(refused(path, UnsupportedError, "before 1.6").hint)


def test_a_legacy_tar_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            tar.addfile(tarfile.TarInfo(name))
    refused(path, UnsupportedError, "tar archive")


def test_a_bare_pickle_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x04}.")
    refused(path, UnsupportedError, "bare pickle")


def test_torchscript_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    code = Entry("archive/code/__torch__.py", b"class Model(Module): ...\n")
    path.write_bytes(zip_bytes(tensor_archive(code=code, constants=Entry("archive/constants.pkl", b"\x80\x02)."))))
    refused(path, UnsupportedError, "TorchScript")


# --- Archives that contradict themselves ---


def storage(**how: Any) -> dict[str, Entry]:
    return {"0": Entry("archive/data/0", torch.arange(4.0).numpy().tobytes(), **how)}


def test_an_archive_made_by_these_tests_is_read_where_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zip_bytes(tensor_archive(**storage())))
    assert not list(differences({"w": torch.arange(4.0)}, read(path)))


@pytest.mark.parametrize(
    ("replaced", "match"),
    [
        (storage(central={"attributes": 0x10}), "marked as a directory"),
        ({"more": Entry("archive/folder/")}, "marked as a directory"),
        ({"more": Entry("archive/data/0", b"other")}, "occurs twice"),
        ({"more": Entry("archive/DATA/0", b"other")}, "occurs twice"),
        ({"more": Entry("archive/data/1", b"abc", central={"offset": 0, "name": "archive/data.pkl"})}, "contradicts"),
        (storage(central={"offset": 0}), "names another member"),
        (storage(local={"name": "archive/data/1"}), "names another member"),
        (storage(local={"size": 15}), "contradicts"),
        (storage(local={"crc": 1}), "contradicts"),
        (storage(local={"flags": 1}), "contradicts"),
        (storage(local={"method": 8}), "contradicts"),
        (storage(central={"flags": 1}, local={"flags": 1}), "encrypted"),
        (storage(central={"packed": 15}), "header is damaged"),
        (storage(central={"offset": 2**31}), "beyond the directory"),
        (storage(central={"offset": 0xFFFFFFFF}), "zip64 sizes are missing"),
        (storage(central={"size": 2**31, "packed": 2**31}, local={"size": 2**31, "packed": 2**31}), "reaches into"),
        (storage(central={"size": 40, "packed": 40}, local={"size": 40, "packed": 40}), "overlaps"),
        ({"pickle": None}, "0 members called data.pkl"),
        ({"more": Entry("other/data.pkl", b"\x80\x02}.")}, "2 members called data.pkl"),
        ({"more": Entry("elsewhere/readme")}, "is not inside"),
        ({"more": Entry("archive/\0")}, "name is damaged"),
        ({"0": None}, "storage is missing"),
        ({"0": Entry("archive/data/0", bytes(12))}, "asks for 16 bytes, but its storage has 12"),
        ({"0": Entry("archive/data/0", bytes(20))}, "asks for 16 bytes, but its storage has 20"),
    ],
)
def test_an_archive_that_contradicts_itself_is_corrupt(
    tmp_path: Path, replaced: dict[str, Entry | None], match: str
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zip_bytes(tensor_archive(**replaced)))
    refused(path, CorruptError, match)


def test_overlapping_members_are_corrupt(tmp_path: Path) -> None:
    """The bytes of the outer member are a complete inner member with its header."""
    inner = zip_bytes([Entry("archive/data/0", bytes(16))])
    inner = inner[: inner.index(b"PK\1\2")]
    plain = tensor_archive(**{"0": None, "outer": Entry("archive/outer", inner)})
    at = zip_bytes(plain).index(inner)
    claimed = Entry("archive/data/0", bytes(16), central={"offset": at})
    path = tmp_path / "x.pt"
    path.write_bytes(zip_bytes([*plain, claimed]))
    refused(path, CorruptError, "overlaps")


def test_bytes_after_the_end_are_corrupt(small: Path) -> None:
    small.write_bytes(small.read_bytes() + b"\0")
    refused(small, CorruptError, "after its end")


def test_a_big_endian_file_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zip_bytes(tensor_archive(byteorder=Entry("archive/byteorder", b"big"))))
    refused(path, UnsupportedError, "big-endian")


# --- Compressed, or too many ---


def test_compressed_members_are_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for entry in tensor_archive():
            zipped.writestr(entry.name, entry.data)
    refused(path, UnsupportedError, "is compressed")


def test_a_deflate_bomb_is_refused_before_it_inflates(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for entry in tensor_archive(**{"0": Entry("archive/data/0", bytes(100 * 2**20))}):
            zipped.writestr(entry.name, entry.data)
    assert path.stat().st_size < 2**20
    refused(path, LimitError, "would inflate beyond the file")


def test_a_million_members_are_refused_by_their_number_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zip_bytes(tensor_archive(), count=10**6))
    refused(path, LimitError, "has 1000000 members")


@pytest.mark.parametrize("count", [3, 5, 10**5])
def test_a_wrong_number_of_members_is_corrupt(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zip_bytes(tensor_archive(), count=count))
    refused(path, CorruptError, "directory's size")


def test_the_most_members_that_are_looked_at_are_looked_at_in_time(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    many = [Entry(f"archive/more/{i}") for i in range(199_990)]
    path.write_bytes(zip_bytes([*tensor_archive(), *many, Entry("archive/more/0")]))
    refused(path, CorruptError, "occurs twice")


# --- No checksum ---


def test_a_checksum_that_was_not_computed_is_accepted_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(SMALL, path)
    finally:
        torch.serialization.set_crc32_options(before)
    with pytest.warns(CkptWarning, match="without a checksum"):
        value = read(path)
    assert not list(differences(SMALL, value))


def test_one_checksum_of_zero_is_accepted_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zip_bytes(tensor_archive(**storage(local={"crc": 0}, central={"crc": 0}))))
    with pytest.warns(CkptWarning, match="1 member without a checksum"):
        value = read(path)
    assert not list(differences({"w": torch.arange(4.0)}, value))
