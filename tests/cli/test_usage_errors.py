"""Usage errors: invalid options, names and paths. Nothing may be written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from support import DATA

import vraxion_ckpt as vc
from vraxion_ckpt.errors import (
    CorruptError,
    InconsistentError,
    OptionError,
    StorageError,
    TransformError,
    UnknownFormatError,
    UsageError,
)

EXPERTS3 = DATA / "wallclock_experts3.pt"


def refusal(error: type[vc.CkptError], source: Path, target: Path | str, *chain: Any, **options: Any) -> str:
    """Convert. Expect exactly the class `error`. Return its text."""
    with pytest.raises(vc.CkptError) as refused:
        vc.convert(source, target, transforms=chain, **options)
    assert type(refused.value) is error, refused.value
    return str(refused.value)


def snapshot(folder: Path) -> dict[str, Any]:
    """Return the names, kinds, contents and times of everything in a folder."""
    return {
        str(path): (path.lstat().st_mode, path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns))
        for path in folder.rglob("*")
    }


# --- Options ---


@pytest.mark.parametrize(
    ("chain", "says"),
    [
        (["mitosis_split:nose=0"], ["mitosis_split", "unknown option 'nose', did you mean 'noise'?"]),
        (["arc_meta:zzz=1"], ["unknown option 'zzz'", "options: visits, policy"]),
        (
            ["mitosis_split:parent=many,noise=-1,foreign_addresses=maybe"],
            ["'parent'", "'noise'", "'foreign_addresses'"],
        ),
        (
            [
                "single_to_experts:experts=0",
                "arc_meta:top_k=x,polcy=y",
                ("mitosis_split", {"noise": float("nan"), "seed": None}),
            ],
            ["single_to_experts: option 'experts'", "'top_k'", "did you mean 'policy'?", "'noise'", "'seed'"],
        ),
        (["mitosis_split:addresses=[1-x]"], ["'1-x' is neither a number nor a range"]),
        (["mitosis_split:addresses=[9-3]"], ["range 9-3 runs backwards"]),
        (["mitosis_split:addresses=[0-99999999999]"], ["more than 10,000,000 numbers"]),
        (["mitosis_split:addresses=3"], ["a list is written [1,3,8-15]"]),
        (["mitosis_split:allow_empty_parent=perhaps"], ["'allow_empty_parent'"]),
    ],
)
def test_every_wrong_option_of_the_whole_chain_is_told_at_once_and_first_of_all(chain, says, tmp_path):
    # The source does not exist, because options are checked before anything is read.
    message = refusal(OptionError, Path("nowhere.pt"), tmp_path / "new.pt", *chain)
    assert [part for part in says if part not in message] == [], message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("chain", "options", "says"),
    [
        (["mitosis_splt"], {}, "unknown transform 'mitosis_splt'\n  → did you mean 'mitosis_split'?"),
        (
            ["zzz"],
            {},
            "there are: arc_meta, experts_to_single, mitosis_split, prune_merge, restore_hibernated, single_to_experts",
        ),
        ([], {"to": "modulr"}, "unknown format 'modulr'\n  → did you mean 'modular'?"),
        ([], {"from_": "ptt"}, "unknown format 'ptt'"),
        ([], {"losses": "maybe"}, "must be one of raise, warn, ignore"),
        (["mitosis_split:noise"], {}, "'noise' in 'mitosis_split:noise' is not key=value"),
        (["mitosis_split:noise=0,noise=1"], {}, "given twice"),
        (["mitosis_split:addresses=[1,2"], {}, "left open"),
        (["mitosis_split:addresses=1]"], {}, "brackets do not match"),
        ([":noise=0"], {}, "no name in"),
    ],
)
def test_a_call_that_means_nothing_is_refused(chain, options, says, tmp_path):
    assert says in refusal(UsageError, EXPERTS3, tmp_path / "new.pt", *chain, **options)
    assert list(tmp_path.iterdir()) == []


# --- Places ---


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with a monolith `a.pt` and a directory `a/`. Nothing in it may change."""
    folder = tmp_path / "place"
    shutil.copytree(DATA / "modular_experts3", folder / "a")
    shutil.copy(EXPERTS3, folder / "a.pt")
    (folder / "link.pt").symlink_to("a.pt")
    (folder / "twin.pt").hardlink_to(folder / "a.pt")
    (folder / "linked").symlink_to("a")
    shutil.copytree(DATA / "modular_single", folder / "keeps")
    (folder / "keeps/experts/notes.txt").write_text("mine")
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


PLACES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "exists": ("a", "a.pt", {}, r"exists already\n.*--overwrite"),
    "directory exists": ("a.pt", "a", {}, r"exists already"),
    "same": ("a.pt", "a.pt", {"overwrite": True}, r"source and target are the same"),
    "same by another way": ("a.pt", "a/../a.pt", {"overwrite": True}, r"the same"),
    "same by a link": ("a.pt", "link.pt", {"overwrite": True}, r"the same"),
    "same behind a link": ("link.pt", "a.pt", {"overwrite": True}, r"the same"),
    "same by a hard link": ("a.pt", "twin.pt", {"overwrite": True}, r"the same"),
    "same directory": ("a", "a/", {"overwrite": True}, r"the same"),
    "same directory by a link": ("a", "linked", {"overwrite": True}, r"the same"),
    "inside": ("a", "a/new.pt", {}, r"the target is inside the source"),
    "inside by a link": ("a", "linked/experts/new.pt", {}, r"the target is inside the source"),
    "around": ("a/system/router.state", "a/", {"overwrite": True}, r"the target contains the source"),
    "holds other files": ("a.pt", "keeps", {"overwrite": True}, r"files that are not part.*notes.txt"),
    "no folder": ("a.pt", "none/new.pt", {}, r"no such folder.*\n.*mkdir -p"),
    "folder is a file": ("a.pt", "a.pt/new.pt", {}, r"is not a folder"),
    "no suffix": ("a.pt", "new", {}, r"does not determine the format\n.*\.pt → pt"),
    "unknown suffix": ("a.pt", "new.onnx", {}, r"does not determine the format"),
    "file, not a directory": ("a", "a.pt", {"to": "modular", "overwrite": True}, r"modular writes a directory"),
    "directory, not a file": ("a.pt", "a", {"to": "pt", "overwrite": True}, r"pt writes a file"),
    "a file with a slash": ("a", "new/", {"to": "pt"}, r"ends in /"),
    "no source": ("none.pt", "new.pt", {}, r"no such file or directory"),
}


@pytest.mark.parametrize(("source", "target", "options", "says"), PLACES.values(), ids=PLACES)
def test_a_place_that_must_not_be_written_is_refused(source, target, options, says, place):
    message = refusal(UsageError, place / source, f"{place}/{target}", **options)
    assert re.search(says, message), message


@pytest.mark.parametrize("output", ["a.pt", "new.pt", "new.pt/plan.json", "keeps", "none/plan.json", "twin.pt"])
def test_a_plan_is_not_written_over_anything(output, place, tmp_path):
    (tmp_path / "ones.json").write_text(json.dumps([1] * 64))
    step = ("arc_meta", {"visits": tmp_path / "ones.json", "output": place / output})
    assert f"{place}/" in refusal(UsageError, place / "a.pt", place / "new.pt", step)


def test_overwrite_does_not_replace_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")  # or /dev/null, or a disk
    assert "pipe.pt" in refusal(UsageError, EXPERTS3, tmp_path / "pipe.pt", overwrite=True)
    assert (tmp_path / "pipe.pt").is_fifo()


@pytest.mark.parametrize("target", ["new.pt", "new/"])
def test_a_folder_without_write_permission_is_refused(target):
    """The command drops root's privileges, because root may write to any folder."""
    script = (
        "import os, sys; from vraxion_ckpt import convert; from vraxion_ckpt.cli import main, show_changes\n"
        "from vraxion_ckpt.plugins.discovery import registry; registry()\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "main(sys.argv[1:])"
    )
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder cannot be entered without rights
        folder = Path(name)
        shutil.copy(EXPERTS3, folder / "a.pt")
        folder.chmod(0o555)
        command = [forked.python(), "-c", script, "convert", f"{name}/a.pt", f"{name}/{target}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        folder.chmod(0o755)
        assert (done.returncode, list(folder.iterdir())) == (2, [folder / "a.pt"]), done.stderr
        assert f"error: {name}: the folder is not writable" in done.stderr


# --- Exit codes ---


@pytest.mark.parametrize(
    ("code", "error", "arguments", "says"),
    [
        (2, UsageError, ["a.pt", "a.pt", "--overwrite"], "the same"),
        (2, UsageError, ["a.pt", "new.pt", "-t", "mitosis_splt"], "did you mean 'mitosis_split'?"),
        (2, OptionError, ["a.pt", "new.pt", "-t", "mitosis_split:nose=0"], "did you mean 'noise'?"),
        (3, UnknownFormatError, ["keeps/experts", "new.pt"], "format not recognised"),
        (4, CorruptError, ["a.pt", "new.pt", "-t", "arc_meta:visits=a.pt"], "UTF-8"),
        (8, InconsistentError, ["a.pt", "new.pt", "-t", "arc_meta:visits=a/experts/meta.json"], "object with `visits`"),
        (10, TransformError, ["a.pt", "new.pt", "-t", "mitosis_split"], "there is no plan"),
        (14, StorageError, ["a.pt", f"{'x' * 250}.pt"], "File name too long"),
    ],
)
def test_each_class_of_error_has_its_exit_code_and_shows_no_traceback(
    code, error, arguments, says, place, cli, monkeypatch
):
    monkeypatch.chdir(place)
    exit_code, said = cli("convert", *arguments)
    assert (exit_code, error.exit_code) == (code, code)
    assert "error: " in said
    assert says in said
    assert "Traceback" not in said


def test_a_folder_of_shards_is_not_given_the_name_of_a_file(cli, tmp_path):
    target = tmp_path / "x.safetensors"
    shards = "safetensors:max_shard_size=20KB"
    code, said = cli("convert", DATA / "named_experts3.pt", target, "--to", shards)
    assert code == 2
    assert "is the name of a file, but" in said
    assert not target.exists()


# --- Arguments of the wrong type ---


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"transforms": None}, "transforms"),
        ({"transforms": 5}, "transforms"),
        ({"transforms": [5]}, "transforms"),
        ({"transforms": [("mitosis_split",)]}, "transforms"),
        ({"transforms": [(5, {})]}, "transforms"),
        ({"losses": None}, "losses"),
        ({"losses": 5}, "losses"),
        ({"from_": 5}, "format"),
        ({"to": []}, "format"),
        ({"optimizer": None}, "optimizer"),
        ({"companions": []}, "companions"),
        ({"param_names": 5}, "param_names"),
        ({"result_order": "ab"}, "result_order"),
        ({"optimizer_order": 5}, "optimizer_order"),
        ({"allow_globals": "os.system"}, "allow_globals"),
        ({"allow_globals": 5}, "allow_globals"),
        ({"manifest": 5}, "path"),
    ],
    ids=str,
)
def test_an_argument_of_the_wrong_type_is_named(options, names, tmp_path):
    for call in (lambda: vc.convert(EXPERTS3, tmp_path / "a.pt", **options), lambda: vc.edit(EXPERTS3, **options)):
        with pytest.raises(UsageError, match=names):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [5, None, b"a.pt", []], ids=str)
def test_a_path_of_the_wrong_type_is_named(path):
    calls = [
        lambda: vc.open(path),
        lambda: vc.convert(path, "a.pt"),
        lambda: vc.convert(EXPERTS3, path),
        lambda: vc.edit(path),
        lambda: vc.inspect(path),
        lambda: vc.check(path),
        lambda: vc.diff(path, EXPERTS3),
        lambda: vc.diff(EXPERTS3, path),
        lambda: vc.run(path),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="path"):
            call()


# --- A folder of checkpoints ---


def test_a_folder_of_checkpoints_is_refused_with_a_list_of_them(tmp_path):
    folder = tmp_path / "my runs"
    folder.mkdir()
    for i in range(3):
        shutil.copy(EXPERTS3, folder / f"{i}.pt")
    shutil.copytree(DATA / "modular_single", folder / "a_directory")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UnknownFormatError) as refused:
        vc.open(folder)
    assert "0.pt, 1.pt, 2.pt, a_directory/" in refused.value.message
    assert "notes.txt" not in str(refused.value)
    assert f"'{folder}/0.pt'" in refused.value.hint


def test_of_many_checkpoints_in_a_folder_the_first_five_are_listed(tmp_path):
    for i in range(9):
        shutil.copy(EXPERTS3, tmp_path / f"{i}.pt")
    with pytest.raises(UnknownFormatError) as refused:
        vc.open(tmp_path)
    assert refused.value.message.endswith("0.pt, 1.pt, 2.pt, 3.pt, 4.pt, … (9 in all)")


def test_a_folder_without_checkpoints_is_of_no_known_format(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe.pt")  # which nothing waits for
    with pytest.raises(UnknownFormatError, match="format not recognised"):
        vc.open(tmp_path)


@pytest.mark.parametrize("function", ["open", "inspect", "check", "convert", "edit", "diff", "report"])
def test_an_unknown_keyword_names_the_function_that_was_called(function):
    two = ["a.pt", "b.pt"] if function in ("convert", "diff", "report") else ["a.pt"]
    with pytest.raises(TypeError, match=rf"^{function}\(\) got an unexpected keyword argument 'overwite'"):
        getattr(vc, function)(*two, overwite=True)


def test_a_command_runs_with_standard_error_closed(tmp_path):
    shutil.copy(DATA / "named_experts3.pt", tmp_path / "a.pt")
    command = f"{sys.executable} -m vraxion_ckpt.cli convert a.pt b.pt >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "b.pt").exists()
