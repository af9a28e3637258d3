"""Modular directories of VRAXION's trainers and tools are read as their loader reads them.

The loader reads ``router.state``, then the shard of each expert if the file exists, then ``meta.json``. The tests
compute its result with torch alone.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DATA, assert_same, files_below, load

import vraxion_ckpt as vc
from vraxion_ckpt.errors import CkptWarning, InconsistentError, TransformError, UsageError

TRAINERS = DATA / "trainers"
GC, LEFTOVER, EXPLODED = "modular_gc_shards_left", "modular_leftover_shard", "exploded_single"
DIRECTORIES = [GC, LEFTOVER, EXPLODED]
ROUTER, META = "system/router.state", "experts/meta.json"
SPLIT = "mitosis_split:parent=0,addresses=[0],noise=0"
RENUMBER = "prune_merge:merge_from=0,merge_into=1,renumber=true"
SAYS = {GC: "lists experts 0, 1, 2, 3, 4, 5 as deleted", LEFTOVER: "expert_002.pt is left from an earlier save"}

pytestmark = pytest.mark.usefixtures("no_reader_waits_for_ever")


@pytest.fixture(autouse=True)
def odd_is_no_error() -> Iterator[None]:
    """Do not turn our warnings into errors. Tests about a warning expect it explicitly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CkptWarning)
        yield


def lay(folder: Path, name: str) -> Path:
    return shutil.copytree(TRAINERS / name, folder / "run")


def shard(root: Path, expert: int) -> Path:
    return root / f"experts/expert_{expert:03d}.pt"


def meta_of(root: Path) -> dict[str, Any]:
    return json.loads((root / META).read_text())


def list_as_deleted(root: Path, ids: list[int]) -> None:
    (root / META).write_text(json.dumps(meta_of(root) | {"deleted": ids}))


def resumed(root: Path) -> dict[str, torch.Tensor]:
    """Return the model that VRAXION's loader would build. Every expert must have a shard."""
    payload = load(root / ROUTER)
    model = dict(payload["model"])
    if "head.single.weight" not in model:
        for expert in range(payload["num_experts"]):
            model |= {f"head.experts.{expert}.{leaf}": tensor for leaf, tensor in load(shard(root, expert)).items()}
    return model


def same_values(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(path: Path) -> list[Any]:
    return [expert.lifecycle for expert in vc.inspect(path).experts]


# --- every directory ---


@pytest.mark.parametrize("name", DIRECTORIES)
def test_it_is_read_as_the_loader_reads_it(name):
    assert same_values(vc.open(TRAINERS / name).state_dict(), resumed(TRAINERS / name))


@pytest.mark.parametrize("name", [GC, LEFTOVER])
def test_what_is_odd_is_said_in_one_sentence_and_is_no_error(name, tmp_path, run_cli):
    with pytest.warns(CkptWarning) as told:
        vc.convert(TRAINERS / name, tmp_path / "new/", to="modular")
    assert [SAYS[name] in str(warning.message) for warning in told] == [True]
    code, facts, _ = run_cli("check", TRAINERS / name, "--json")
    found = json.loads(facts)["findings"]
    assert code == 0
    assert {finding["severity"] for finding in found} <= {"warning", "note"}
    assert sum(SAYS[name] in finding["what"] for finding in found) == 1


@pytest.mark.parametrize("form", ["pt", "safetensors", "safetensors:max_shard_size=20KB", "modular"])
@pytest.mark.parametrize("name", DIRECTORIES)
def test_it_comes_back_from_every_format(name, form, tmp_path):
    source = TRAINERS / name
    there, back = tmp_path / "there", tmp_path / "back" / name
    back.parent.mkdir()
    vc.convert(source, there, to=form)
    vc.convert(there, back, to="modular")
    assert same_values(resumed(back), resumed(source))
    if form == "pt":
        assert same_values(load(there)["model"], resumed(source))
    router, expected = load(back / ROUTER), load(source / ROUTER)
    if name == EXPLODED:  # where the source says None, the names that were found are written
        names = router.pop("param_names")
        assert (expected.pop("param_names"), names == [key for key in resumed(source) if key in names]) == (None, True)
    assert_same(router, expected)
    own = {} if name != EXPLODED else {"source_checkpoint": "there"}  # as the exploder names its source
    assert meta_of(back) == meta_of(source) | own or form == "modular"
    assert list(meta_of(back)) == list(meta_of(source))
    left = {Path("experts/expert_002.pt")} if name == LEFTOVER else set()
    assert set(files_below(back)) == set(files_below(source)) - left


@pytest.mark.parametrize("name", DIRECTORIES)
def test_it_is_split_in_place(name, tmp_path):
    target = lay(tmp_path, name)
    before = resumed(target)
    old = load(target / ROUTER)
    experts = old["num_experts"]
    first = ["single_to_experts"] if name == EXPLODED else []
    done = vc.edit(target, transforms=[*first, SPLIT])
    assert (done.experts_before, done.experts_after) == (experts, experts + 1)
    assert done.kind == ("rewrite" if name == EXPLODED else "grow")
    # torch itself reads router and shards.
    router, after = load(target / ROUTER), resumed(target)
    expected = {key.replace("head.single.", "head.experts.0."): tensor for key, tensor in before.items()}
    parent = {key: tensor for key, tensor in expected.items() if key.startswith("head.experts.0.")}
    expected |= {key.replace("experts.0", f"experts.{experts}"): tensor for key, tensor in parent.items()}
    expected["router_map"] = expected["router_map"].clone().index_fill_(0, torch.tensor([0]), experts)
    assert same_values(after, expected)
    assert (router["num_experts"], router["step"]) == (experts + 1, old["step"])
    was, now = old["optim"], router["optim"]
    assert len(now["param_groups"][0]["params"]) == len(was["param_groups"][0]["params"]) + len(parent)
    assert [row["id"] for row in meta_of(target)["experts"]] == list(range(experts + 1))
    assert not [found for found in vc.check(target).findings if found.severity == "error"]
    assert list(tmp_path.iterdir()) == [target]


# --- experts that are listed as deleted, whose shards are there ---


def test_listed_experts_are_live_and_stay_listed_and_the_child_is_not(tmp_path):
    target = lay(tmp_path, GC)
    head = vc.open(target).head
    assert (set(head.experts), head.deleted) == (set(range(6)), frozenset())
    old = {path: (target / path).read_bytes() for path in files_below(target) if path.suffix == ".pt"}
    vc.edit(target, transforms=[SPLIT])
    assert meta_of(target)["deleted"] == [0, 1, 2, 3, 4, 5]
    assert {path: (target / path).read_bytes() for path in old} == old
    assert [row.collected for row in rows(target)] == [True] * 6 + [False]


def test_the_list_follows_the_experts_when_they_are_renumbered(tmp_path):
    target = lay(tmp_path, GC)
    list_as_deleted(target, [1, 4])
    vc.edit(target, transforms=[RENUMBER])
    assert meta_of(target)["deleted"] == [0, 3]
    assert load(target / ROUTER)["num_experts"] == 5


@pytest.mark.parametrize("form", ["pt", "safetensors", "modular"])
def test_some_listed_experts_with_shards_and_some_without(form, tmp_path):
    target = lay(tmp_path, GC)
    list_as_deleted(target, [1, 3, 4])
    shard(target, 3).unlink()
    with pytest.warns(CkptWarning, match="lists experts 1, 4 as deleted"):
        found = vc.open(target)
    assert (set(found.head.experts), found.head.deleted) == ({0, 1, 2, 4, 5}, {3})
    vc.convert(target, tmp_path / "there", to=form)
    vc.convert(tmp_path / "there", tmp_path / "back", to="modular")
    assert meta_of(tmp_path / "back") == meta_of(target)
    assert not shard(tmp_path / "back", 3).exists()
    vc.edit(target, transforms=[SPLIT])
    assert (meta_of(target)["deleted"], shard(target, 3).exists()) == ([1, 3, 4], False)


def test_a_single_head_that_is_listed_is_live_too(tmp_path):
    target = shutil.copytree(DATA / "modular_single", tmp_path / "run")
    list_as_deleted(target, [0])
    with pytest.warns(CkptWarning, match="lists expert 0 as deleted"):
        assert set(vc.open(target).head.experts) == {0}
    vc.edit(target, transforms=["single_to_experts", SPLIT])
    assert meta_of(target)["deleted"] == [0]
    assert shard(target, 1).exists()


@pytest.mark.parametrize("damage", ["truncated", "missing, and not listed"])
def test_what_a_killed_save_leaves_is_refused_all_the_same(damage, tmp_path):
    target = lay(tmp_path, GC)
    if damage == "truncated":
        shard(target, 2).write_bytes(shard(target, 2).read_bytes()[:500])
    else:
        list_as_deleted(target, [0, 1])
        shard(target, 2).unlink()
    with pytest.raises(InconsistentError, match=r"expert_002\.pt"):
        vc.convert(target, tmp_path / "new.pt")


# --- shards that are left over ---


def garbage(path: Path) -> None:
    path.write_bytes(b"no archive")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


UNREADABLE: list[Callable[[Path], None]] = [garbage, empty, link, pipe]


@pytest.mark.parametrize("damage", UNREADABLE)
def test_a_shard_left_over_is_never_opened(damage, tmp_path):
    target = lay(tmp_path, LEFTOVER)
    damage(shard(target, 2))
    assert vc.check(target).sound
    assert vc.inspect(target).files == 4
    assert vc.open(target).origin.leftovers == ("experts/expert_002.pt",)
    vc.convert(target, tmp_path / "new/", to="modular")
    assert same_values(resumed(tmp_path / "new"), resumed(TRAINERS / LEFTOVER))


EDITS: dict[str, dict[str, Any]] = {
    "grow": {"transforms": [SPLIT]},
    "shrink": {"transforms": ["prune_merge:merge_into=0"]},
    "rewrite": {"transforms": [RENUMBER]},
    "router only": {"optimizer": "drop"},
    "kept": {"transforms": [SPLIT], "keep_old": True},
}


@pytest.mark.parametrize("damage", UNREADABLE)
@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_keeps_a_shard_left_over(kind, damage, tmp_path):
    target, other = lay(tmp_path, GC), shard(TRAINERS / LEFTOVER, 2)
    near, far = shard(target, 6), shard(target, 17)
    for path in (near, far):
        shutil.copy(other, path)
    damage(far)
    was = far.lstat()
    dry = vc.edit(target, dry_run=True, **EDITS[kind])
    done = vc.edit(target, **EDITS[kind])
    assert done.kind == ("rewrite" if kind == "kept" else kind)
    assert (dry.bytes_written, dry.untouched) == (done.bytes_written, done.untouched)
    assert far.lstat().st_mode == was.st_mode
    if damage in (garbage, empty):
        assert far.read_bytes() == (b"no archive" if damage is garbage else b"")
    # Of the two old shards, the one whose name no new shard has is kept.
    if kind in ("grow", "kept"):
        assert same_values(load(near), load(shard(target, 0)))
    else:
        assert near.read_bytes() == other.read_bytes()
    if kind == "kept":
        old = tmp_path / "run.old"
        assert shard(old, 6).read_bytes() == other.read_bytes()
        assert os.path.lexists(shard(old, 17))
    assert vc.check(target).sound


@pytest.mark.parametrize("damage", [link, pipe])
def test_what_is_no_file_is_not_replaced_by_a_new_shard(damage, tmp_path):
    target = lay(tmp_path, LEFTOVER)
    damage(shard(target, 2))
    with pytest.raises(UsageError, match=r"expert_002\.pt: is not a regular file"):
        vc.edit(target, transforms=[SPLIT])
    shard(target, 2).unlink()
    shard(target, 2).mkdir()
    with pytest.raises(UsageError, match=r"expert_002\.pt: is not a regular file"):
        vc.edit(target, transforms=[SPLIT])
    assert list(tmp_path.iterdir()) == [target]


def test_a_manifest_lists_no_shard_left_over(tmp_path):
    target, manifest = lay(tmp_path, LEFTOVER), tmp_path / "manifest.json"
    for chain in ([], ["mitosis_split:parent=0,addresses=[0]"], [RENUMBER]):
        shutil.copy(shard(TRAINERS / LEFTOVER, 2), shard(target, 5))
        vc.edit(target, transforms=chain, manifest=manifest)
        assert "experts/expert_005.pt" not in json.loads(manifest.read_text())["files"]
        assert vc.check(target, manifest=manifest).sound


def test_a_conversion_over_a_directory_replaces_its_shards_left_over(tmp_path):
    target = lay(tmp_path, LEFTOVER)
    vc.convert(TRAINERS / EXPLODED, f"{target}/", overwrite=True)
    assert sorted(map(str, files_below(target))) == [META, ROUTER]
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not part of a modular checkpoint"):
        vc.convert(TRAINERS / LEFTOVER, f"{target}/", overwrite=True)


def test_shards_beside_a_single_head_are_left_over(tmp_path):
    """The exploder's ``--force`` leaves such a directory if the target had experts."""
    target = lay(tmp_path, EXPLODED)
    for expert in range(3):
        shutil.copy(shard(TRAINERS / LEFTOVER, expert), shard(target, expert))
    theirs = shard(target, 2).read_bytes()
    with pytest.warns(CkptWarning, match=r"expert_000\.pt, expert_001\.pt, expert_002\.pt are left .*single"):
        assert same_values(vc.open(target).state_dict(), resumed(TRAINERS / EXPLODED))
    vc.edit(target, transforms=["single_to_experts", SPLIT])
    assert same_values(load(shard(target, 1)), load(shard(target, 0)))
    assert torch.equal(load(shard(target, 0))["weight"], resumed(TRAINERS / EXPLODED)["head.single.weight"])
    assert shard(target, 2).read_bytes() == theirs
    assert vc.open(target).origin.leftovers == ("experts/expert_002.pt",)


@pytest.mark.parametrize("name", ["expert_2.pt", "expert_0002.pt", "expert_x.pt"])
def test_a_name_that_no_trainer_writes_is_refused_also_beyond_the_experts(name, tmp_path):
    target = lay(tmp_path, LEFTOVER)
    shard(target, 2).rename(target / "experts" / name)
    with pytest.raises(InconsistentError, match="a shard must be named"):
        vc.open(target)


# --- the exploder's single head ---


def test_a_directory_without_rows_is_written_back_without_rows(tmp_path):
    target = lay(tmp_path, EXPLODED)
    before = (target / META).read_bytes()
    done = vc.edit(target, optimizer="drop")
    assert (done.kind, (target / META).read_bytes()) == ("router only", before)
    vc.edit(target, to="modular:tenure_all=true")
    assert [row["tenured"] for row in meta_of(target)["experts"]] == [True]


# --- rows that no file states ---


@pytest.mark.parametrize("stem", ["trainers/exploded_single", "wallclock_experts3.pt", "raw_state_dict.pt", "no meta"])
def test_rows_that_no_file_states_are_not_shown(stem, tmp_path, run_cli):
    path = tmp_path / Path(stem).name
    if stem == "no meta":
        shutil.copytree(DATA / "modular_experts3", path)
        (path / META).unlink()
    else:
        (shutil.copytree if (DATA / stem).is_dir() else shutil.copy)(DATA / stem, path)
    assert rows(path)
    assert set(rows(path)) == {None}
    table = run_cli("inspect", path)[1].partition("contrib")[2].splitlines()
    figures = [line.count(" – ") for line in table if line[:1].isdigit()]
    assert figures == [3] * len(rows(path))
    vc.report(path, tmp_path / "page.html")
    assert "created at step" not in (tmp_path / "page.html").read_text()
    assert not [finding for finding in vc.check(path).findings if finding.rule == "mixed saves"]


def test_rows_that_somebody_wrote_are_shown(tmp_path):
    assert [row.last_used_step for row in rows(TRAINERS / LEFTOVER)] == [0, 900]
    vc.convert(TRAINERS / LEFTOVER, tmp_path / "new.pt")
    assert [row.last_used_step for row in rows(tmp_path / "new.pt")] == [0, 900]
    assert [finding.rule for finding in vc.check(tmp_path / "new.pt").findings] == ["mixed saves"]


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_of_a_chain_the_child_has_a_row_and_the_others_still_have_none(form, tmp_path):
    step = load(DATA / "named_experts3.pt")["step"]
    chain = ["prune_merge:merge_from=0,merge_into=1,renumber=true", "mitosis_split:parent=0,addresses=[1]"]
    vc.convert(DATA / "named_experts3.pt", tmp_path / "one", to=form, transforms=chain)
    vc.convert(tmp_path / "one", tmp_path / "two", to=form)
    for path in (tmp_path / "one", tmp_path / "two"):
        assert [row and row.created_step for row in rows(path)] == [None, None, step]


def test_weights_alone_have_no_rows(tmp_path):
    vc.convert(TRAINERS / LEFTOVER, tmp_path / "new", to="safetensors:weights_only=true", losses="ignore")
    assert rows(tmp_path / "new") == [None, None]


def test_a_difference_between_rows_that_no_file_states_is_none(tmp_path):
    payload = load(DATA / "named_experts3.pt")
    torch.save(payload | {"step": payload["step"] + 100}, tmp_path / "later.pt")
    assert vc.diff(DATA / "named_experts3.pt", tmp_path / "later.pt").lifecycle == ()


# --- a request that names neither parent nor addresses ---

REQUEST = TRAINERS / "mitosis_request.pt"
NULLS: dict[str, dict[str, Any]] = {
    "both null": {"parent_expert": None, "hot_addresses": None},
    "parent null": {"parent_expert": None, "hot_addresses": [0]},
    "addresses null": {"parent_expert": 0, "hot_addresses": None},
    "parent missing": {"hot_addresses": [0]},
    "parent missing, addresses null": {"hot_addresses": None},
    "addresses missing": {"parent_expert": 0},
    "parent null, addresses missing": {"parent_expert": None},
    "both missing": {},
}


@pytest.mark.parametrize("asked", NULLS.values(), ids=NULLS)
@pytest.mark.parametrize("step", ["mitosis_split", "arc_meta"])
def test_a_request_without_parent_or_addresses_says_why_and_what_to_do(step, asked, tmp_path):
    payload = load(REQUEST)
    wish = {key: value for key, value in payload["mitosis"].items() if key not in ("parent_expert", "hot_addresses")}
    torch.save(payload | {"mitosis": wish | asked}, tmp_path / "x.pt")
    with pytest.raises(TransformError) as refused:
        vc.convert(tmp_path / "x.pt", tmp_path / "y.pt", transforms=[step])
    told = str(refused.value)
    assert refused.value.key == step
    assert all(part in told for part in ("does not count visits", "arc_meta:visits=FILE", "parent= and addresses="))
    lacking = [key for key in ("parent_expert", "hot_addresses") if asked.get(key) is None]
    assert all((key in told) is (key in lacking) for key in ("parent_expert", "hot_addresses"))
    assert not (tmp_path / "y.pt").exists()


@pytest.mark.parametrize("asked", NULLS.values(), ids=NULLS)
def test_a_trainers_file_without_parent_or_addresses_says_the_same(asked, tmp_path):
    data = json.loads((TRAINERS / "mitosis_request_meta.json").read_text())
    data = {key: value for key, value in data.items() if key not in ("parent_expert", "hot_addresses")} | asked
    (tmp_path / "meta.json").write_text(json.dumps(data))
    with pytest.raises(InconsistentError, match="does not count visits") as refused:
        vc.convert(REQUEST, tmp_path / "y.pt", transforms=[f"mitosis_split:meta={tmp_path}/meta.json"])
    assert refused.value.path == tmp_path / "meta.json"
    assert "arc_meta:visits=FILE" in str(refused.value)


def test_visits_or_explicit_addresses_serve_instead_of_the_request(tmp_path):
    (tmp_path / "visits.json").write_text(json.dumps([1] * 64))
    chains = [[f"arc_meta:visits={tmp_path}/visits.json", "mitosis_split"], ["mitosis_split:parent=0,addresses=[0]"]]
    for number, chain in enumerate(chains):
        vc.convert(REQUEST, tmp_path / f"{number}.pt", transforms=chain)
        assert load(tmp_path / f"{number}.pt")["num_experts"] == 3
