"""Hibernated experts are detected, not cloned by default, and restored from their snapshots."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from support import DATA, assert_same, files_below, load

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.expert_health import has_nonfinite, is_zero, refuse_unhealthy
from vraxion_ckpt.errors import CkptError, CorruptError, InconsistentError, TransformError, UsageError
from vraxion_ckpt.plugin_api import Effect

HIBERNATED = DATA / "trainers/hibernated.pt"
SNAPSHOTS = DATA / "trainers/hibernation"
LEAVES = ("weight", "bias")
E0 = "head.experts.0."

restoring = pytest.mark.filterwarnings("ignore:the weights of expert:vraxion_ckpt.errors.CkptWarning")
reading = pytest.mark.filterwarnings("ignore:all weights of expert:vraxion_ckpt.errors.CkptWarning")


def restore(snapshots: Path = SNAPSHOTS, **more: object) -> list[tuple[str, dict]]:
    return [("restore_hibernated", {"snapshots": snapshots, **more})]


def zero(*experts: int, source: Path = HIBERNATED) -> dict:
    payload = load(source)
    for i in experts:
        for leaf in LEAVES:
            payload["model"][f"head.experts.{i}.{leaf}"].zero_()
    return payload


def all_zero_single() -> dict:
    payload = load(DATA / "steps_single.pt")
    for leaf in LEAVES:
        payload["model"][f"head.single.{leaf}"].zero_()
    return payload


# --- seen ---


def test_an_expert_of_zeros_is_told_by_inspect_and_check(run_cli, tmp_path):
    code, said, warned = run_cli("inspect", HIBERNATED)
    assert code == 0
    assert "all weights of expert 0 are zero" in warned
    assert "restore_hibernated" in warned
    assert "0 zero" in said
    with pytest.warns(vc.CkptWarning, match="expert 0 are zero"):
        assert [expert.zero for expert in vc.inspect(HIBERNATED).experts] == [True, False, False]
    checked = vc.check(HIBERNATED)
    assert checked.sound
    assert [(f.what, "restore_hibernated" in f.hint) for f in checked.findings if f.rule == "hibernated"] == [
        ("all weights of expert 0 are zero", True)
    ]
    torch.save(zero(1), tmp_path / "two.pt")
    assert "experts 0, 1" in next(f.what for f in vc.check(tmp_path / "two.pt").findings if f.rule == "hibernated")


def test_inspect_says_nothing_of_experts_whose_files_it_does_not_open(tmp_path):
    payload = load(DATA / "wallclock_single.pt")
    torch.save(payload, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", f"{tmp_path}/run/", transforms=["single_to_experts:experts=18,route=modulo"])
    shard = load(tmp_path / "run/experts/expert_017.pt")
    torch.save(
        {leaf: torch.zeros_like(tensor) for leaf, tensor in shard.items()}, tmp_path / "run/experts/expert_017.pt"
    )
    assert vc.inspect(tmp_path / "run").experts[17].zero is None
    with pytest.warns(vc.CkptWarning, match="expert 17 are zero"):
        vc.inspect(tmp_path / "run", tensors=True)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"weight": torch.zeros(3, 2), "bias": torch.tensor([0.0, -0.0])}, True),
        ({"weight": torch.zeros(3, 2), "bias": torch.tensor([0.0, 1e-45])}, False),
        ({"weight": torch.zeros(5_000_000).index_fill_(0, torch.tensor(4_999_999), 1.0)}, False),
        ({"weight": torch.zeros(2, dtype=torch.bfloat16), "ids": torch.ones(2, dtype=torch.int64)}, True),
        ({"weight": torch.zeros(2, dtype=torch.complex64)}, True),
        ({"weight": torch.zeros(4).to(torch.float8_e4m3fn)}, True),
        ({"weight": torch.zeros(2), "bn.running_var": torch.ones(2), "bn.num_batches_tracked": torch.tensor(3)}, True),
        ({"bn.running_mean": torch.zeros(2)}, False),
        ({"weight": torch.full((2,), float("nan"))}, False),
        ({"weight": torch.zeros(0, 3)}, False),
        ({}, False),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_what_counts_as_zero(tensors, expected):
    assert is_zero(tensors) is expected


def test_what_counts_as_not_finite():
    assert has_nonfinite({"a": torch.ones(2), "b": torch.tensor([1.0, float("-inf")])})
    assert has_nonfinite({"a": torch.tensor([complex(0, float("nan"))])})
    assert has_nonfinite({"a": torch.tensor([float("nan")]).to(torch.float8_e5m2)})
    assert not has_nonfinite({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)})


# --- not cloned, and given no addresses ---


def with_nan(payload: dict, *names: str) -> dict:
    for name in names:
        payload["model"][name].fill_(0.5)[0] = float("nan")
    return payload


UNHEALTHY = {
    "mitosis_split:parent=0,addresses=[0],noise=0": lambda: load(HIBERNATED),
    "mitosis_split:parent=0,addresses=[0,1],noise=0,foreign_addresses=allow": lambda: load(HIBERNATED),
    "prune_merge:merge_into=0": lambda: load(HIBERNATED),
    "single_to_experts:experts=2": all_zero_single,
}


@pytest.mark.parametrize("chain", UNHEALTHY)
@pytest.mark.parametrize("option", ["allow_zero", "allow_nan"])
def test_an_expert_of_zeros_or_nan_is_not_cloned_and_gets_no_addresses_unless_allowed(chain, option, tmp_path):
    payload = UNHEALTHY[chain]()
    if option == "allow_nan":
        head = "head.single." if chain.startswith("single") else E0
        payload = with_nan(payload, f"{head}weight", f"{head}bias")
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(TransformError) as refusal:
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[chain])
    assert f"{option}=true" in refusal.value.hint
    assert refusal.value.exit_code == 10
    assert not (tmp_path / "b.pt").exists()
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[f"{chain},{option}=true"])


def test_experts_of_zeros_do_not_become_one_head_unless_allowed(tmp_path):
    payload = zero(0, 1, 2)
    payload["optim"] = None
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(TransformError, match="expert 0 are zero"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=["experts_to_single"])
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=["experts_to_single:allow_zero=true"])


def test_a_hibernated_expert_can_be_removed_and_others_split(tmp_path):
    for number, chain in enumerate(["mitosis_split:parent=1,addresses=[1]", "prune_merge:merge_into=1"]):
        vc.convert(HIBERNATED, tmp_path / f"{number}.pt", transforms=[chain])
    removed = "prune_merge:merge_from=0,merge_into=1,renumber=true"
    vc.convert(HIBERNATED, tmp_path / "removed.pt", transforms=[removed])


def test_a_third_partys_transform_can_ask_the_same():
    checkpoint = vc.open(HIBERNATED)
    with pytest.raises(TransformError, match="all weights of expert 0"):
        refuse_unhealthy(checkpoint, 0, allow_zero=False, allow_nan=True)
    refuse_unhealthy(checkpoint, 0, allow_zero=True, allow_nan=False)
    refuse_unhealthy(checkpoint, 1, allow_zero=False, allow_nan=False)


# --- put back ---


def test_a_snapshot_is_put_back_bit_by_bit_and_all_else_stays(tmp_path, run_cli):
    code, said, warned = run_cli(
        "-v", "convert", HIBERNATED, tmp_path / "b.pt", "-t", f"restore_hibernated:snapshots={SNAPSHOTS}"
    )
    assert code == 0
    assert "the weights of expert 0 were replaced" in warned
    assert "do not record their step" in warned
    assert "expert 0 replaced" in " ".join(said.split())
    before, after = load(HIBERNATED), load(tmp_path / "b.pt")
    snapshot = load(SNAPSHOTS / "expert_0.pt")
    for leaf in LEAVES:
        assert_same(after["model"][E0 + leaf], snapshot[leaf])
        before["model"][E0 + leaf] = snapshot[leaf]
    del after["vraxion_ckpt"]
    assert_same(after, before)
    assert vc.open(tmp_path / "b.pt").history[-1].options["snapshots"] == str(SNAPSHOTS)
    assert not [f for f in vc.check(tmp_path / "b.pt").findings if f.rule == "hibernated"]


@restoring
def test_it_resumes_as_the_expert_that_was_never_away(tmp_path):
    """Compare with torch: a linear head with the snapshot's weights gives the same output."""
    vc.convert(HIBERNATED, tmp_path / "b.pt", transforms=[*restore(), "mitosis_split:parent=0,addresses=[0],noise=0"])
    head = torch.nn.Linear(16, 8)
    head.load_state_dict(load(SNAPSHOTS / "expert_0.pt"))
    model = load(tmp_path / "b.pt")["model"]
    x = torch.randn(5, 16)
    for i in (0, 3):
        again = torch.nn.Linear(16, 8)
        again.load_state_dict({leaf: model[f"head.experts.{i}.{leaf}"] for leaf in LEAVES})
        assert torch.equal(again(x), head(x))


@restoring
@pytest.mark.parametrize("kind", ["pt", "modular", "safetensors"])
def test_it_works_in_place_in_every_format(kind, tmp_path):
    target = {"pt": "run.pt", "modular": "run", "safetensors": "run.safetensors"}[kind]
    (tmp_path / "work").mkdir()
    path = tmp_path / "work" / target
    vc.convert(HIBERNATED, path, to=kind)
    done = vc.edit(path, transforms=restore())
    assert done.function_preserved.changed == 22
    expert = vc.open(path).head.experts[0]
    assert_same(dict(expert), dict(load(SNAPSHOTS / "expert_0.pt")))
    if kind == "modular":
        assert set(done.written) == {"system/router.state", "experts/expert_000.pt"}
    assert vc.check(path).sound


@restoring
def test_it_works_in_a_recipe_and_for_a_single_head(tmp_path):
    torch.save(all_zero_single(), tmp_path / "a.pt")
    (tmp_path / "snapshots").mkdir()
    single = {leaf: load(DATA / "steps_single.pt")["model"][f"head.single.{leaf}"].clone() for leaf in LEAVES}
    torch.save(single, tmp_path / "snapshots/expert_0.pt")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"source: {tmp_path}/a.pt\nchain:\n  - restore_hibernated:\n      snapshots: {tmp_path}/snapshots\n"
        f"targets:\n  - {tmp_path}/b.pt\n"
    )
    vc.run(recipe)
    assert_same(load(tmp_path / "b.pt")["model"], load(DATA / "steps_single.pt")["model"])


@restoring
def test_chosen_experts_only_and_others_with_replace(tmp_path):
    torch.save(zero(2), tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=restore(experts=[2]))
    model = load(tmp_path / "b.pt")["model"]
    assert_same(model["head.experts.2.weight"], load(SNAPSHOTS / "expert_2.pt")["weight"])
    assert not model[E0 + "weight"].any()
    with pytest.raises(TransformError, match="expert 2 is not hibernated") as refusal:
        vc.convert(HIBERNATED, tmp_path / "c.pt", transforms=restore(experts=[2]))
    assert "replace=true" in refusal.value.hint
    vc.convert(HIBERNATED, tmp_path / "c.pt", transforms=restore(experts=[2], replace=True))
    assert_same(load(tmp_path / "c.pt")["model"]["head.experts.2.weight"], load(SNAPSHOTS / "expert_2.pt")["weight"])


@restoring
def test_statistics_of_a_normalisation_come_with_the_snapshot(tmp_path):
    def expert(fill: float) -> dict:
        return {
            "fc.weight": torch.full((2, 2), fill),
            "bn.running_var": torch.full((2,), 1 + fill),
            "bn.num_batches_tracked": torch.tensor(int(fill)),
        }

    model = {f"head.experts.{i}.{leaf}": t for i in (0, 1) for leaf, t in expert(float(i)).items()}
    torch.save({"model": {**model, "router_map": torch.arange(4) % 2}}, tmp_path / "a.pt")
    (tmp_path / "s").mkdir()
    torch.save(expert(7.0), tmp_path / "s/expert_0.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=restore(tmp_path / "s"))
    assert_same(dict(vc.open(tmp_path / "b.pt").head.experts[0]), expert(7.0))


@restoring
def test_a_snapshot_whose_tensors_share_a_storage_becomes_tensors_of_their_own(tmp_path):
    whole = torch.arange(8 * 16 + 8 + 5, dtype=torch.float32)
    torch.save({"weight": whole[:128].view(8, 16), "bias": whole[128:136]}, tmp_path / "expert_0.pt")
    (tmp_path / "out").mkdir()
    vc.convert(HIBERNATED, tmp_path.parent / f"{tmp_path.name}.pt", transforms=restore(tmp_path))
    model = load(tmp_path.parent / f"{tmp_path.name}.pt")["model"]
    assert model[E0 + "bias"].tolist() == list(range(128, 136))
    assert model[E0 + "bias"].untyped_storage().nbytes() == 32
    assert model[E0 + "weight"].flatten().tolist() == list(range(128))


# --- refused ---


def laid(folder: Path, snapshot: object | None = None) -> Path:
    folder.mkdir()
    if snapshot is not None:
        torch.save(snapshot, folder / "expert_0.pt")
    return folder


def fitting(**more: torch.Tensor) -> dict:
    return load(SNAPSHOTS / "expert_0.pt") | more


@pytest.mark.parametrize(
    ("snapshot", "error", "says"),
    [
        (None, TransformError, "no snapshot of expert 0"),
        (
            fitting(weight=torch.ones(8, 15)),
            TransformError,
            r"weight is float32 \[8, 15\] in the snapshot",
        ),
        (fitting(bias=torch.ones(8, dtype=torch.float64)), TransformError, r"float64 \[8\] in the snapshot"),
        (fitting(scale=torch.ones(8)), TransformError, "lacks scale, which the snapshot has"),
        ({"weight": torch.ones(8, 16)}, TransformError, "bias"),
        (
            {"down.weight": torch.ones(8, 16), "bias": torch.ones(8)},
            TransformError,
            "which expert 0 has",
        ),
        (fitting(weight=torch.zeros(8, 16), bias=torch.zeros(8)), TransformError, "also all zero"),
        ({"weight": 1.0, "bias": torch.ones(8)}, InconsistentError, "dict of leaf name"),
        ([torch.ones(8, 16)], InconsistentError, "dict of leaf name"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(snapshot, error, says, tmp_path):
    folder = laid(tmp_path / "s", snapshot)
    with pytest.raises(error, match=says):
        vc.convert(HIBERNATED, tmp_path / "b.pt", transforms=restore(folder))
    assert not (tmp_path / "b.pt").exists()


def test_what_cannot_be_restored_is_refused(tmp_path):
    for options, says in (
        ({"experts": [3]}, "no expert 3"),
        ({"experts": [-1]}, "no expert -1"),
        ({"experts": []}, "list of experts is empty"),
        ({"experts": [1], "replace": True}, "no snapshot of expert 1"),
    ):
        with pytest.raises(TransformError, match=says):
            vc.convert(HIBERNATED, tmp_path / "b.pt", transforms=restore(**options))
    with pytest.raises(TransformError, match="no expert whose weights are all zero"):
        vc.convert(DATA / "named_experts3.pt", tmp_path / "b.pt", transforms=restore())
    with pytest.raises(TransformError, match="expert 1 was deleted"):
        vc.convert(DATA / "modular_gc", tmp_path / "b.pt", transforms=restore(experts=[1]))
    for place in (tmp_path / "nowhere", SNAPSHOTS / "expert_0.pt"):
        with pytest.raises(UsageError, match="no such directory"):
            vc.convert(HIBERNATED, tmp_path / "b.pt", transforms=restore(place))
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
def test_what_is_no_file_of_the_directory_is_refused(kind, tmp_path, no_reader_waits_for_ever):  # noqa: ARG001
    place = laid(tmp_path / "s") / "expert_0.pt"
    if kind == "link":
        place.symlink_to(SNAPSHOTS / "expert_0.pt")
    elif kind == "dangling":
        place.symlink_to("expert_7.pt")
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(TransformError, match="regular file in the given directory"):
        vc.convert(HIBERNATED, tmp_path / "b.pt", transforms=restore(tmp_path / "s"))


@restoring
def test_a_snapshot_that_is_damaged_changes_or_asks_for_code_is_not_used(tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(SNAPSHOTS, folder)
    data = bytearray((folder / "expert_0.pt").read_bytes())
    data[data.find(load(SNAPSHOTS / "expert_0.pt")["weight"].numpy().tobytes()) + 9] ^= 1
    (folder / "expert_0.pt").write_bytes(data)
    with pytest.raises(CorruptError, match="checksum"):
        vc.convert(HIBERNATED, tmp_path / "b.pt", transforms=restore(folder))
    torch.save({"weight": Path("x")}, folder / "expert_0.pt")
    with pytest.raises(CkptError) as refusal:
        vc.convert(HIBERNATED, tmp_path / "b.pt", transforms=restore(folder))
    assert refusal.value.exit_code == 5
    assert not (tmp_path / "b.pt").exists()


class Retouch(vc.Transform):
    """Change the time stamp of a snapshot while the chain runs."""

    name = "retouch"
    path: Path

    def effect(self):
        return Effect.exact()

    def apply(self, checkpoint):
        os.utime(self.path, ns=(1, 1))
        return checkpoint


@restoring
def test_a_snapshot_that_is_overwritten_meanwhile_is_noticed(tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(SNAPSHOTS, folder)
    with pytest.raises(vc.CkptError, match="changed while it was being read") as refusal:
        vc.convert(HIBERNATED, tmp_path / "b.pt", transforms=[*restore(folder), Retouch(path=folder / "expert_0.pt")])
    assert refusal.value.exit_code == 13


@restoring
@pytest.mark.parametrize("target", ["s/b.pt", "s/deep/b.pt", "s"])
def test_nothing_is_written_into_the_snapshots(target, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(SNAPSHOTS, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError):
        vc.convert(HIBERNATED, tmp_path / target, to="pt", transforms=restore(folder), overwrite=True)
    with pytest.raises(UsageError):
        vc.convert(HIBERNATED, tmp_path / "b.pt", transforms=restore(folder), manifest=folder / "m.json")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
