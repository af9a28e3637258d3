"""Where a result may go: the format that a name tells, and the places that are refused, before anything is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from support import DATA, files_below

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.conversion.targets import (
    check_apart,
    check_inputs,
    check_manifest,
    check_places,
    check_several,
    check_side_files,
    detect_target,
    files_read,
    formats_named,
    say_what_names_deny,
)
from vraxion_ckpt.errors import CkptWarning, UsageError
from vraxion_ckpt.plugin_api import Effect
from vraxion_ckpt.plugins.discovery import resolve_adapter, resolve_chain
from vraxion_ckpt.plugins.transform import Step

FILE, FOLDER = "named_experts3.pt", "modular_experts3"


class Reads(vc.Transform):
    """Read a file or a folder."""

    name: ClassVar[str] = "reads"
    path: Path
    output: Path | None = None

    def effect(self):
        return Effect.exact()

    def apply(self, checkpoint):
        return checkpoint


@pytest.fixture
def place(tmp_path):
    """A folder with a monolith, a directory of the modular format, a file of another kind, and a folder of others."""
    shutil.copy(DATA / FILE, tmp_path / "a.pt")
    shutil.copytree(DATA / FOLDER, tmp_path / "run")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "diary").write_text("mine")
    return Path(os.path.realpath(tmp_path))


@pytest.fixture(autouse=True)
def nothing_is_written(request):
    """None of these functions changes a file."""
    folder = request.getfixturevalue("place") if "place" in request.fixturenames else None
    before = {path: (folder / path).read_bytes() for path in files_below(folder)} if folder else {}
    yield
    if folder:
        assert {path: (folder / path).read_bytes() for path in files_below(folder)} == before


def chain_reading(path: Path, output: Path | None = None) -> list[Step]:
    return [Step(Reads(path=path, output=output), "tests", "0")]


def refusal(call, *arguments, **options) -> UsageError:
    with pytest.raises(UsageError) as refused:
        call(*arguments, **options)
    assert refused.value.exit_code == UsageError.exit_code
    return refused.value


# --- the format ---


@pytest.mark.parametrize(
    ("name", "to", "expected"),
    [
        ("out.pt", None, "pt"),
        ("out.pth", None, "pt"),
        ("out/", None, "modular"),
        ("out.safetensors", None, "safetensors"),
        ("run", None, "modular"),
        ("out.bin", "pt", "pt"),
        ("out.pt", "safetensors", "safetensors"),
        ("out", "modular", "modular"),
        ("out.parts", "safetensors:max_shard_size=1MB", "safetensors"),
    ],
)
def test_a_name_or_what_is_asked_for_tells_the_format(name, to, expected, place):
    adapter, target = detect_target(f"{place}/{name}", to)
    assert adapter.name == expected
    assert target == place / name.rstrip("/")


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("out", None),
        ("out.bin", None),
        ("others", None),
        ("a.pt", "modular"),
        ("run", "pt"),
        ("out/", "pt"),
        ("out.safetensors", "safetensors:max_shard_size=1MB"),
    ],
)
def test_a_name_that_tells_none_or_another_is_refused(name, to, place):
    error = refusal(detect_target, f"{place}/{name}", to)
    assert str(error.path).startswith(str(place))
    if name in ("out", "out.bin"):
        assert "--to" in error.hint


def test_a_link_is_followed_and_stays_a_link(place):
    (place / "link.pt").symlink_to("elsewhere.pt")
    assert detect_target(place / "link.pt")[1] == place / "elsewhere.pt"
    (place / "link.pt").unlink()


def test_what_is_neither_file_nor_folder_is_not_replaced(place):
    os.mkfifo(place / "pipe.pt")
    assert refusal(detect_target, place / "pipe.pt").path == place / "pipe.pt"
    (place / "pipe.pt").unlink()


def test_the_root_is_no_place():
    refusal(detect_target, "/", "modular")


@pytest.mark.parametrize(
    ("name", "formats"), [("a.pt", ["pt"]), ("A.PT", ["pt"]), ("a.safetensors", ["safetensors"]), ("a.txt", [])]
)
def test_the_ending_of_a_name_is_that_of_formats(name, formats):
    assert formats_named(name) == formats


@pytest.mark.parametrize(
    ("name", "written", "warns"),
    [("a.pt", "pt", False), ("a.bin", "pt", False), ("a.safetensors", "pt", True), ("a.pt", "safetensors", True)],
)
def test_a_name_that_denies_the_format_is_said(name, written, warns, recwarn):
    said = [(Path(name), resolve_adapter(written))]
    say_what_names_deny(said, [])
    assert [w.category for w in recwarn] == [CkptWarning] * warns
    assert all(name in str(w.message) for w in recwarn)


# --- source and target ---


@pytest.mark.parametrize(
    ("source", "target"),
    [("a.pt", "a.pt"), ("run", "run"), ("run", "run/out.pt"), ("run", "run/deep/out.pt"), ("others/a.pt", "others")],
)
def test_source_and_target_lie_apart(source, target, place):
    error = refusal(check_places, place / source, place / target, resolve_adapter("pt"), overwrite=True)
    assert error.path == place / target
    assert error.hint


@pytest.mark.parametrize("make", ["symlink_to", "hardlink_to"])
def test_the_source_by_another_name_is_the_source(make, place):
    other = place / "other.pt"
    getattr(other, make)(place / "a.pt")
    refusal(check_places, other, place / "a.pt", resolve_adapter("pt"), overwrite=True)
    other.unlink()


@pytest.mark.parametrize(
    ("target", "format", "overwrite", "allowed"),
    [
        ("new.pt", "pt", False, True),
        ("notes.txt", "pt", False, False),
        ("notes.txt", "pt", True, True),
        ("missing/new.pt", "pt", False, False),
        ("run", "modular", False, False),
        ("run", "modular", True, True),
        ("others", "modular", True, False),
    ],
)
def test_only_what_is_ours_or_may_be_replaced_is_replaced(target, format, overwrite, allowed, place):
    arguments = (place / "a.pt", place / target, resolve_adapter(format))
    if allowed:
        check_places(*arguments, overwrite=overwrite)
    else:
        refusal(check_places, *arguments, overwrite=overwrite)


def test_a_directory_with_files_of_others_is_not_deleted(place):
    error = refusal(check_places, place / "a.pt", place / "others", resolve_adapter("modular"), overwrite=True)
    assert error.path == place / "others"
    assert "diary" in error.message


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("a.pt", "new.pt", True),
        ("a.pt", "a.pt", False),
        ("run", "new", True),
        ("run", "run/system/router.state", False),
        ("run", "run/experts/new.pt", False),
        ("run", ".", False),
    ],
)
def test_what_the_open_source_is_made_of_is_not_written(source, target, allowed, place):
    before = vc.open(place / source)
    real = Path(os.path.realpath(place / target))
    if allowed:
        check_apart(real, before)
    else:
        assert refusal(check_apart, real, before).path == real


# --- files beside ---


def side_file(name: str, place: Path, *, chain: list[Step] = (), overwrite: bool = False, content: bytes = b"new"):
    before = vc.open(place / "a.pt")
    return check_side_files({place / name: content}, before, place / "out", chain, overwrite=overwrite)


@pytest.mark.parametrize(
    ("name", "overwrite", "replace"),
    [("plan.json", False, False), ("plan.json", True, False), ("notes.txt", True, True)],
)
def test_a_side_file_goes_beside_the_target(name, overwrite, replace, place):
    (beside,) = side_file(name, place, overwrite=overwrite)
    assert (beside.path, beside.replace) == (place / name, replace)


def test_one_that_says_the_same_already_is_replaced_unasked(place):
    (beside,) = side_file("notes.txt", place, content=b"mine")
    assert beside.replace


@pytest.mark.parametrize("name", ["out", "out/plan.json", "a.pt", "notes.txt", "others", "nul\0"])
def test_a_side_file_replaces_nothing_unasked_and_lies_in_no_target(name, place):
    refusal(side_file, name, place)


@pytest.mark.parametrize("name", ["out", "out/plan.json", "a.pt", "others"])
def test_nor_when_it_may_replace(name, place):
    refusal(side_file, name, place, overwrite=True)


@pytest.mark.parametrize(("read", "name"), [("notes.txt", "notes.txt"), ("others", "others/plan.json")])
def test_nor_over_or_into_what_the_chain_reads(read, name, place):
    chain = chain_reading(place / read, place / name)  # and the side file is what it writes
    refusal(side_file, name, place, chain=chain, overwrite=True)


def test_the_chain_reads_the_paths_of_its_options_but_not_those_it_writes(place):
    chain = chain_reading(place / "notes.txt", place / "plan.json")
    assert files_read(chain, {place / "plan.json": b""}) == {place / "notes.txt"}
    assert files_read(chain, {}) == {place / "notes.txt", place / "plan.json"}
    assert files_read(resolve_chain(["single_to_experts"]), {}) == set()


@pytest.mark.parametrize(
    ("written", "allowed"),
    [("new.pt", True), ("others", False), ("others/diary", False), ("others/diary/x", False), ("other", True)],
)
def test_no_place_is_written_over_around_or_into_what_is_read(written, allowed, place):
    arguments = ([place / written], chain_reading(place / "others" / "diary"), {}, set())
    if allowed:
        check_inputs(*arguments)
    else:
        assert refusal(check_inputs, *arguments).path == place / written


def test_nor_over_another_file_that_is_read(place):
    refusal(check_inputs, [place / "recipe.yaml"], [], {}, {place / "recipe.yaml"})


# --- manifests ---


def manifest(name: str, place: Path, target: str, *, overwrite: bool):
    before: Checkpoint = vc.open(place / "a.pt")
    return check_manifest(place / name, before, place / target, [], {}, overwrite=overwrite)


def test_a_manifest_replaces_only_the_manifest_of_the_same_checkpoint(tmp_path):
    shutil.copy(DATA / FILE, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "done.pt", manifest=tmp_path / "done.json")
    assert manifest("done.json", tmp_path, "done.pt", overwrite=True).replace
    assert not manifest("new.json", tmp_path, "done.pt", overwrite=True).replace
    for target, overwrite in (("done.pt", False), ("another.pt", True)):
        assert refusal(manifest, "done.json", tmp_path, target, overwrite=overwrite).path == tmp_path / "done.json"


def test_a_manifest_replaces_nothing_else(place):
    assert refusal(manifest, "notes.txt", place, "out.pt", overwrite=True).path == place / "notes.txt"


# --- several ---


@pytest.mark.parametrize(
    ("targets", "at_fault"),
    [
        (["a", "b", "c"], None),
        (["a", "ab"], None),
        ([], None),
        (["a", "b", "a"], "a"),
        (["a", "a/b"], "a/b"),
        (["a/b/c", "a"], "a"),
    ],
)
def test_several_places_are_apart(targets, at_fault):
    places = [Path("/x") / target for target in targets]
    if at_fault is None:
        check_several(places)
    else:
        assert refusal(check_several, places).path == Path("/x") / at_fault
