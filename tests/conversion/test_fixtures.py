"""Real checkpoints, and what the original tools made of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from support import DATA, DIRECTORIES, EXPECTED, MONOLITHS, assert_same, files_below, load

import vraxion_ckpt as vc

PLANNED = ["wallclock_single", "wallclock_experts3", "modular_experts3"]


def source_of(stem: str) -> Path:
    return DATA / stem if stem.startswith("modular") else DATA / f"{stem}.pt"


@pytest.mark.parametrize("stem", PLANNED)
def test_arc_meta_chooses_what_the_original_planner_chose(stem, tmp_path):
    plan = tmp_path / "plan.json"
    arc_meta = ("arc_meta", {"visits": EXPECTED / f"{stem}.visits.json", "output": plan})
    vc.convert(source_of(stem), tmp_path / "planned.pt", transforms=[arc_meta])
    ours, theirs = json.loads(plan.read_text()), json.loads((EXPECTED / f"{stem}.mitosis_meta.json").read_text())
    assert list(ours) == list(theirs)
    ours["metrics"] = {key: ours["metrics"][key] for key in theirs["metrics"]}
    assert json.dumps(ours) == json.dumps(theirs)


@pytest.mark.parametrize("stem", PLANNED)
def test_the_predicted_shares_come_true(stem):
    visits = json.loads((EXPECTED / f"{stem}.visits.json").read_text())["visits"]
    chain = ["single_to_experts"] if stem.endswith("single") else []
    planned = run(vc.open(source_of(stem)), *chain, ("arc_meta", {"visits": EXPECTED / f"{stem}.visits.json"}))
    split = run(planned, "mitosis_split:noise=0")
    counts = [0] * split.num_experts
    for address, owner in enumerate(split.router_map.tolist()):
        counts[owner] += visits[address]
    metrics = planned.plan.metrics
    assert metrics["predicted_parent_share"] == counts[planned.plan.parent] / sum(visits)
    assert metrics["predicted_max_share"] == max(counts) / sum(visits)


def run(checkpoint: vc.Checkpoint, *chain: str | tuple[str, dict[str, object]]) -> vc.Checkpoint:
    from vraxion_ckpt.conversion.chain import apply_chain
    from vraxion_ckpt.plugins.discovery import resolve_chain

    return apply_chain(checkpoint, resolve_chain(chain))[0]


def split(stem: str, target: Path) -> dict:
    meta = EXPECTED / "wallclock_experts3.mitosis_meta.json"
    vc.convert(DATA / f"{stem}.pt", target, transforms=[("mitosis_split", {"meta": meta, "noise": 0})])
    return load(target)


def test_the_split_equals_the_original_tools_entirely(tmp_path):
    ours = split("named_experts3", tmp_path / "split.pt")
    assert ours.pop("vraxion_ckpt")["history"][0]["name"] == "mitosis_split"
    theirs = load(EXPECTED / "named_experts3.split.pt")
    # The original left the new expert's module version out.
    del ours["model"]._metadata["head.experts.3"]
    assert_same(ours, theirs)


def test_the_split_without_names_equals_the_original_tools_but_for_its_unusable_optimizer(tmp_path):
    ours, theirs = split("wallclock_experts3", tmp_path / "split.pt"), load(EXPECTED / "wallclock_experts3.split.pt")
    named = load(EXPECTED / "named_experts3.split.pt")
    del ours["vraxion_ckpt"], ours["model"]._metadata["head.experts.3"]
    # Both checkpoints come from one run, so the optimizer must be the one of the split that had names.
    assert_same(ours.pop("optim"), named["optim"])
    del theirs["optim"]
    assert_same(ours, theirs)


def test_the_modular_form_equals_the_original_exploders(tmp_path):
    vc.convert(DATA / "named_experts3.pt", tmp_path / "modular", to="modular")
    original = EXPECTED / "named_experts3.modular"
    assert files_below(tmp_path / "modular") == files_below(original)
    for file in files_below(original):
        ours, theirs = tmp_path / "modular" / file, original / file
        if file.suffix == ".json":
            assert ours.read_bytes() == theirs.read_bytes()
            continue
        mine, wanted = load(ours), load(theirs)
        if "model" in mine:
            del mine["model"]._metadata  # which the exploder dropped
        assert_same(mine, wanted, str(file))


@pytest.mark.parametrize("source", MONOLITHS, ids=lambda path: path.stem)
def test_a_monolith_comes_back_from_modular_bit_by_bit(source, tmp_path):
    vc.convert(source, tmp_path / "modular", to="modular")
    vc.convert(tmp_path / "modular", tmp_path / "back.pt")
    assert_same(load(tmp_path / "back.pt"), load(source))


@pytest.mark.parametrize("source", DIRECTORIES, ids=lambda path: path.name)
def test_a_modular_directory_comes_back_from_a_monolith_bit_by_bit(source, tmp_path):
    vc.convert(source, tmp_path / "monolith.pt")
    vc.convert(tmp_path / "monolith.pt", tmp_path / "back", to="modular")
    assert files_below(tmp_path / "back") == files_below(source)
    for file in files_below(source):
        if file.suffix == ".json":
            ours, theirs = json.loads((tmp_path / "back" / file).read_text()), json.loads((source / file).read_text())
            if "source_checkpoint" in theirs:
                # This names what the directory was made from, which now is another file.
                assert ours["source_checkpoint"] == "monolith.pt"
                ours["source_checkpoint"] = theirs["source_checkpoint"]
            assert json.dumps(ours) == json.dumps(theirs)
        else:
            assert_same(load(tmp_path / "back" / file), load(source / file), str(file))


@pytest.mark.parametrize("source", DIRECTORIES, ids=lambda path: path.name)
def test_a_modular_directory_is_copied_file_by_file(source, tmp_path):
    vc.convert(source, tmp_path / "copy", to="modular")
    for file in files_below(source):
        if file.suffix == ".json":
            assert (tmp_path / "copy" / file).read_bytes() == (source / file).read_bytes()
        else:
            assert_same(load(tmp_path / "copy" / file), load(source / file), str(file))


@pytest.mark.parametrize("source", [*MONOLITHS, *DIRECTORIES], ids=lambda path: path.name)
@pytest.mark.parametrize("target", ["out.pt", "out/"])
def test_writing_twice_gives_the_same_bytes_and_leaves_the_source_alone(source, target, tmp_path):
    before = digests(source)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        vc.convert(source, f"{tmp_path}/{folder}/{target}", losses="raise")
    assert digests(tmp_path / "one" / target) == digests(tmp_path / "two" / target)
    assert digests(source) == before


def digests(path: Path) -> dict[str, tuple[str, int]]:
    files = [path] if path.is_file() else [path / file for file in files_below(path)]
    return {file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size) for file in files}


@pytest.mark.parametrize("target", ["grown.pt", "grown/"])
def test_a_single_head_grows_in_one_chain_and_keeps_its_function(target, tmp_path):
    visits = EXPECTED / "wallclock_single.visits.json"
    chain = ["single_to_experts", ("arc_meta", {"visits": visits}), "mitosis_split:noise=0"]
    done = vc.convert(DATA / "wallclock_single.pt", f"{tmp_path}/{target}", transforms=chain)
    assert (done.experts_before, done.experts_after, done.addresses_moved) == (1, 2, 32)
    assert str(done.function_preserved).startswith("yes")
    assert [record.name for record in vc.open(tmp_path / target).history] == [
        "single_to_experts",
        "arc_meta",
        "mitosis_split",
    ]
    before, after = load(DATA / "wallclock_single.pt")["model"], vc.open(tmp_path / target)
    for expert in after.head.experts.values():
        for leaf, tensor in expert.items():
            assert torch.equal(tensor, before[f"head.single.{leaf}"])


@pytest.mark.parametrize("stem", ["modular_gc", "modular_adapter_experts", "modular_experts3"])
def test_a_modular_checkpoint_is_split_and_its_old_rows_stay(stem, tmp_path):
    done = vc.convert(
        DATA / stem, f"{tmp_path}/split/", transforms=["mitosis_split:parent=2,addresses=[2,5,8],noise=0"]
    )
    assert done.addresses_moved == 3
    old = json.loads((DATA / stem / "experts/meta.json").read_text())
    new = json.loads((tmp_path / "split/experts/meta.json").read_text())
    assert new["experts"][:3] == old["experts"]
    assert new["deleted"] == old["deleted"]
    assert new["experts"][3] == {
        "id": 3,
        "contrib": 0.0,
        "created_step": 4,
        "last_used_step": 4,
        "age_steps": 0,
        "probation": True,
        "tenured": False,
    }
    for file in files_below(DATA / stem):
        if file.name.startswith("expert_"):
            assert_same(load(tmp_path / "split" / file), load(DATA / stem / file))
    assert_same(
        load(tmp_path / "split/experts/expert_003.pt"), load(DATA / stem / "experts/expert_002.pt"), "the clone"
    )


def test_ids_from_a_thousand_on_have_four_digits(tmp_path):
    state = {"router_map": torch.zeros(8, dtype=torch.int64)}
    state |= {f"head.experts.{i}.weight": torch.full((2, 3), float(i)) for i in range(1002)}
    torch.save({"model": state, "num_experts": 1002}, tmp_path / "many.pt")
    vc.convert(tmp_path / "many.pt", tmp_path / "many", to="modular")
    shards = files_below(tmp_path / "many" / "experts")
    assert Path("expert_999.pt") in shards
    assert Path("expert_1001.pt") in shards
    assert load(tmp_path / "many/experts/expert_1001.pt")["weight"][0, 0] == 1001
    vc.convert(tmp_path / "many", tmp_path / "back.pt")
    assert_same(load(tmp_path / "back.pt")["model"], state)


def test_opening_a_modular_directory_opens_no_shard():
    checkpoint = vc.open(DATA / "modular_experts3")
    assert not any(expert.is_open for expert in checkpoint.head.experts.values())
    assert checkpoint.head.experts[1]["weight"].shape == (4, 16)
    assert [expert.is_open for expert in checkpoint.head.experts.values()] == [False, True, False]


def test_tenure_all_marks_every_expert(tmp_path):
    vc.convert(DATA / "wallclock_experts3.pt", tmp_path / "modular", to="modular:tenure_all=true")
    rows = json.loads((tmp_path / "modular/experts/meta.json").read_text())["experts"]
    assert [row["tenured"] for row in rows] == [True] * 3
