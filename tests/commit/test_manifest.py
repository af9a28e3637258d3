"""Manifests: the digests that `convert` and `edit` write equal those of hashlib, and `check` finds each flipped bit."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
from support import DATA, files_below

import vraxion_ckpt as vc
from vraxion_ckpt.commit import manifest
from vraxion_ckpt.errors import CkptError, InconsistentError, UsageError

NAMED = DATA / "named_experts3.pt"
EXPERTS3 = DATA / "modular_experts3"
SPLIT = "mitosis_split:parent=2,addresses=[44,47,50],noise=0"


def digests(path: Path) -> dict[str, dict]:
    files = {".": path} if path.is_file() else {str(name): path / name for name in files_below(path)}
    return {
        name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for name, file in files.items()
    }


def listed(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text())["files"]


@pytest.mark.parametrize(
    ("target", "to"),
    [("a.pt", None), ("b/", None), ("c.safetensors", None), ("d", "safetensors:max_shard_size=20KB")],
)
def test_a_conversion_lists_every_file_it_wrote(target, to, tmp_path):
    done = vc.convert(NAMED, f"{tmp_path}/{target}", to=to, manifest=tmp_path / "m.json")
    assert done.manifest == tmp_path / "m.json"
    assert listed(tmp_path / "m.json") == digests(tmp_path / target)
    checked = vc.check(tmp_path / target, manifest=tmp_path / "m.json")
    assert checked.sound
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([target.strip("/"), "m.json"])


@pytest.mark.parametrize(
    ("chain", "options"),
    [
        ([SPLIT], {}),
        (["prune_merge:merge_into=0,allow_tenured=true"], {}),
        (["prune_merge:merge_from=0,merge_into=1,renumber=true,allow_tenured=true"], {}),
        ([SPLIT], {"keep_old": True}),
        ([], {}),
    ],
)
def test_an_edit_lists_every_file_of_the_new_state_and_nobody_elses(chain, options, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(EXPERTS3, run)
    (run / "train.log").write_text("mine")
    vc.edit(run, transforms=chain, manifest=tmp_path / "m.json", **options)
    (run / "train.log").unlink()
    assert listed(tmp_path / "m.json") == digests(run)
    assert vc.check(run, manifest=tmp_path / "m.json").sound


def test_an_edit_replaces_a_manifest_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(EXPERTS3, run)
    vc.edit(run, manifest=tmp_path / "m.json")
    before = digests(run)
    vc.edit(run, transforms=[SPLIT], manifest=tmp_path / "m.json")
    assert listed(tmp_path / "m.json") == digests(run) != before
    (tmp_path / "notes.json").write_text('{"mine": true}')
    with pytest.raises(UsageError, match="is not a manifest"):
        vc.edit(run, transforms=["prune_merge:merge_into=0,allow_tenured=true"], manifest=tmp_path / "notes.json")
    assert (tmp_path / "notes.json").read_text() == '{"mine": true}'
    assert vc.check(run, manifest=tmp_path / "m.json").sound


def test_an_edit_vouches_for_no_shard_that_is_damaged(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(EXPERTS3, run)
    shard = bytearray((run / "experts/expert_000.pt").read_bytes())
    shard[len(shard) // 2] ^= 1
    (run / "experts/expert_000.pt").write_bytes(shard)
    before = digests(run)
    with pytest.raises(CkptError, match=r"expert_000\.pt"):
        vc.edit(run, transforms=[SPLIT], manifest=tmp_path / "m.json")
    with pytest.raises(CkptError, match=r"expert_000\.pt"):
        vc.edit(run, manifest=tmp_path / "m.json")
    assert digests(run) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("place", ["run.old", "run.old2"])
def test_a_manifest_does_not_take_the_place_of_the_state_that_is_kept(place, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(EXPERTS3, run)
    before = digests(run)
    with pytest.raises(UsageError, match="reserved for the previous state"):
        vc.edit(run, transforms=[SPLIT], keep_old=True, manifest=tmp_path / place)
    assert digests(run) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("what", ["m.json", "plan.json"])
def test_what_appears_meanwhile_is_not_replaced(what, tmp_path, monkeypatch):
    from vraxion_ckpt.conversion import convert

    original = convert.write_whole

    def write_whole(*args):
        written = original(*args)
        (tmp_path / what).write_text("precious")
        return written

    monkeypatch.setattr(convert, "write_whole", write_whole)
    visits = DATA / "expected/wallclock_experts3.visits.json"
    plan = ("arc_meta", {"visits": visits, "output": tmp_path / "plan.json"})
    with pytest.raises(UsageError, match="was created by another process"):
        vc.convert(NAMED, tmp_path / "a.pt", transforms=[plan], manifest=tmp_path / "m.json")
    assert (tmp_path / what).read_text() == "precious"


def test_the_manifest_of_another_checkpoint_is_not_replaced(tmp_path):
    for name in ("one", "two"):
        shutil.copytree(EXPERTS3, tmp_path / name)
    vc.edit(tmp_path / "one", manifest=tmp_path / "m.json")
    with pytest.raises(UsageError, match="is the manifest of one"):
        vc.edit(tmp_path / "two", manifest=tmp_path / "m.json")
    assert vc.check(tmp_path / "one", manifest=tmp_path / "m.json").sound


def test_a_conversion_does_not_replace_what_its_chain_reads(tmp_path):
    shutil.copy(DATA / "expected/wallclock_experts3.visits.json", tmp_path / "v.json")
    before = (tmp_path / "v.json").read_bytes()
    plan = ("arc_meta", {"visits": tmp_path / "v.json"})
    with pytest.raises(UsageError, match="an input of this run"):
        vc.convert(NAMED, tmp_path / "v.json", to="pt", transforms=[plan], overwrite=True)
    assert (tmp_path / "v.json").read_bytes() == before


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_manifest_that_is_no_path_is_refused(name, tmp_path):
    shutil.copy(NAMED, tmp_path / "in.pt")
    for call in (
        lambda: vc.convert(NAMED, tmp_path / "a.pt", manifest=name),
        lambda: vc.edit(tmp_path / "in.pt", manifest=name),
    ):
        with pytest.raises(UsageError, match=r"is not a valid path|is a directory|inside the source"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_a_dry_run_writes_none(tmp_path):
    vc.convert(NAMED, tmp_path / "a.pt", manifest=tmp_path / "m.json", dry_run=True)
    assert list(tmp_path.iterdir()) == []


def test_equal_checkpoints_have_equal_manifests(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        vc.convert(NAMED, tmp_path / name / "a.pt", transforms=[SPLIT], manifest=tmp_path / name / "m.json")
    assert (tmp_path / "one/m.json").read_bytes() == (tmp_path / "two/m.json").read_bytes()


@pytest.mark.parametrize("where", ["a.pt", "source.pt", "run/m.json", "visits.json", ".", "plan.json", "there.json"])
def test_a_manifest_is_not_written_over_what_is_needed(where, tmp_path):
    shutil.copy(NAMED, tmp_path / "source.pt")
    shutil.copy(DATA / "expected/wallclock_experts3.visits.json", tmp_path / "visits.json")
    (tmp_path / "there.json").write_text("mine")
    plan = ("arc_meta", {"visits": tmp_path / "visits.json", "output": tmp_path / "plan.json"})
    target = f"{tmp_path}/run/" if where.startswith("run") else tmp_path / "a.pt"
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    with pytest.raises(UsageError):
        vc.convert(tmp_path / "source.pt", target, transforms=[plan], manifest=tmp_path / where)
    assert {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)} == before


@pytest.mark.parametrize("source", ["a.safetensors", "a.pt", "run", "shards"])
def test_every_flipped_bit_is_found(source, tmp_path, exhaustive, figure):
    target = tmp_path / source
    to = "safetensors:max_shard_size=20KB" if source == "shards" else None
    vc.convert(NAMED, f"{target}/" if source == "run" else target, to=to, manifest=tmp_path / "m.json")
    expected = manifest.load_manifest(tmp_path / "m.json")
    files = [target] if target.is_file() else [target / name for name in files_below(target)]
    chance = random.Random(0)
    tried = missed = 0
    for file in files:
        data = bytearray(file.read_bytes())
        bits = range(8 * len(data))
        for bit in bits if exhaustive else chance.sample(bits, 60):
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            missed += not list(manifest.compare_manifest(expected, target, files))
            tried += 1
            data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    figure(5, f"{tried} flipped bits of {source}, with a manifest: {missed} not found")
    assert missed == 0
    assert not list(manifest.compare_manifest(expected, target, files))


def test_every_deviation_is_told_at_once(tmp_path, run_cli):
    run = tmp_path / "run"
    shutil.copytree(EXPERTS3, run)
    vc.edit(run, manifest=tmp_path / "m.json")
    vc.edit(run, transforms=[SPLIT])
    meta = run / "experts/meta.json"
    meta.write_text(meta.read_text().replace(" ", "", 1) + "\n")
    code, said, _ = run_cli("check", run, "--manifest", tmp_path / "m.json")
    assert code == 1
    assert "experts/expert_003.pt: is not in the manifest" in said
    assert "system/router.state: has" in said
    assert "experts/meta.json: " in said
    (run / "experts/expert_003.pt").unlink()
    said = run_cli("check", run, "--manifest", tmp_path / "m.json")[1]
    assert "expert_003.pt is missing" in said


GOOD = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("[]", "is not a manifest"),
        ('{"schema": "vraxion-ckpt/manifest/2"}', "is not a manifest"),
        ({"files": {}}, "required"),
        ({"checkpoint": "a", "format": "pt", "files": {"../x": GOOD}}, "not a path inside"),
        ({"checkpoint": "a", "format": "pt", "files": {"/x": GOOD}}, "not a path inside"),
        ({"checkpoint": "a", "format": "pt", "files": {"a\\b": GOOD}}, "not a path inside"),
        ({"checkpoint": "a", "format": "pt", "files": {"a//b": GOOD}}, "not a path inside"),
        ({"checkpoint": "a", "format": "pt", "files": {".": {**GOOD, "sha256": "0"}}}, "sha256"),
        ({"checkpoint": "a", "format": "pt", "files": {".": {**GOOD, "bytes": -1}}}, "bytes"),
        ({"checkpoint": "a", "format": "pt", "files": {}, "more": 1}, "more"),
    ],
)
def test_what_is_no_manifest_is_refused_with_the_reason(content, says, tmp_path, run_cli):
    if isinstance(content, dict):
        content = json.dumps({"schema": "vraxion-ckpt/manifest/1", **content})
    (tmp_path / "m.json").write_text(content)
    code, _, complained = run_cli("check", NAMED, "--manifest", tmp_path / "m.json")
    assert code in (4, 8)
    assert says in complained
    with pytest.raises(CkptError):
        manifest.load_manifest(tmp_path / "m.json")


def test_a_manifest_of_another_checkpoint_is_no_match(tmp_path):
    vc.convert(NAMED, tmp_path / "a.pt", manifest=tmp_path / "m.json")
    assert not vc.check(DATA / "wallclock_single.pt", manifest=tmp_path / "m.json").sound
    assert not vc.check(EXPERTS3, manifest=tmp_path / "m.json").sound
    with pytest.raises(InconsistentError):
        manifest.load_manifest(DATA / "expected/wallclock_experts3.visits.json")
