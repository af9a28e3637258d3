"""Checkpoints that lived on: what a trainer carried along, tied, renamed or put elsewhere must not mislead us."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from support import DATA, EXPECTED, assert_same, files_below, load

import vraxion_ckpt as vc
from vraxion_ckpt.errors import BindingError, InconsistentError, InvariantError, UsageError

SPLIT = "mitosis_split:parent=0,addresses=[0],noise=0"
VISITS = EXPECTED / "wallclock_experts3.visits.json"


def experts(count: int, **more) -> dict:
    """A state dict whose experts are all alike in shape."""
    state = {"router_map": torch.arange(8) % count, "theta": torch.ones(3), **more}
    return state | {f"head.experts.{i}.weight": torch.full((2, 2), float(i + 1)) for i in range(count)}


def optimizer(*groups: list[str], named: tuple[int, ...] = ()) -> dict:
    """An optimizer whose slots tell whose they are: expert i's moments are filled with i."""
    names = [name for group in groups for name in group]

    def slot(name):
        return torch.full((2, 2), float(name.split(".")[2])) if name.startswith("head") else torch.ones(3)

    param_groups, start = [], 0
    for number, group in enumerate(groups):
        ids = list(range(start, start + len(group)))
        extra = {"param_names": group} if number in named else {}
        param_groups.append({"lr": 0.1, **extra, "params": ids})
        start += len(group)
    return {"state": {i: {"exp_avg": slot(n)} for i, n in enumerate(names)}, "param_groups": param_groups}


E0, E1 = "head.experts.0.weight", "head.experts.1.weight"


# --- names ---


def test_recorded_names_are_not_taken_for_an_optimizer_that_has_gone_on(tmp_path):
    payload = {"model": experts(2), "optim": optimizer(["theta", E1], [E0]), "step": 4}
    torch.save(payload, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", param_names=["theta", E1, E0])
    assert vc.open(tmp_path / "b.pt").optimizer.params == ["theta", E1, E0]  # recorded, so not asked again
    later = load(tmp_path / "b.pt")
    later["optim"] = optimizer(["theta", E0], [E1])
    torch.save(later, tmp_path / "c.pt")
    with pytest.raises(BindingError, match="not known for certain"):
        vc.convert(tmp_path / "c.pt", tmp_path / "d.pt", transforms=[SPLIT])


def test_names_in_some_groups_only_are_refused_and_not_overwritten(tmp_path):
    torch.save({"model": experts(2), "optim": optimizer(["theta", E1], [E0], named=(0,))}, tmp_path / "a.pt")
    with pytest.raises(BindingError, match="only some"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", param_names=["theta", E1, E0])
    assert vc.open(tmp_path / "b.pt").optimizer.params == ["theta", E1, E0]


def test_a_given_list_that_contradicts_the_groups_is_refused(tmp_path):
    torch.save({"model": experts(2), "optim": optimizer(["theta", E1, E0], named=(0,))}, tmp_path / "a.pt")
    with pytest.raises(BindingError, match="contradict"):
        vc.open(tmp_path / "a.pt", param_names=["theta", E0, E1])


def test_two_unnamed_groups_are_bound_in_a_modular_directory_too(tmp_path):
    payload = load(DATA / "wallclock_experts3.pt")
    names = load(DATA / "named_experts3.pt")["param_names"]
    flat = payload["optim"]["param_groups"][0]["params"]
    weights = [i for i in flat if payload["model"][names[i]].ndim > 1]
    others = [i for i in flat if payload["model"][names[i]].ndim <= 1]
    old = payload["optim"]
    options = {k: v for k, v in old["param_groups"][0].items() if k != "params"}
    groups = [
        {**options, "params": list(range(len(weights)))},
        {**options, "weight_decay": 0.1, "params": list(range(len(weights), len(flat)))},
    ]
    state = {new: old["state"][i] for new, i in enumerate([*weights, *others]) if i in old["state"]}
    # The layer that never had a gradient would make two assignments possible.
    for new, i in enumerate([*weights, *others]):
        state.setdefault(new, {"exp_avg": torch.zeros_like(payload["model"][names[i]])})
    payload["optim"] = {"state": state, "param_groups": groups}
    torch.save(payload, tmp_path / "two.pt")
    vc.convert(tmp_path / "two.pt", tmp_path / "two", to="modular")
    bound = vc.open(tmp_path / "two").optimizer
    assert bound.params == [names[i] for i in [*weights, *others]]
    vc.convert(tmp_path / "two", tmp_path / "back.pt")
    assert_same(load(tmp_path / "back.pt")["optim"], payload["optim"])


def test_an_optimizer_without_an_expert_is_refused_unless_told_that_it_is_frozen(tmp_path):
    torch.save({"model": experts(2), "optim": optimizer(["theta", E1])}, tmp_path / "a.pt")
    names = ["theta", E1]
    with pytest.raises(BindingError) as refusal:
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", param_names=names, transforms=[SPLIT])
    assert refusal.value.key == E0
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", param_names=names, transforms=[SPLIT], optimizer="partial")
    assert vc.open(tmp_path / "b.pt").optimizer.params == names


# --- what a trainer carried along under our key ---


def test_a_plan_of_an_earlier_step_is_not_carried_out(tmp_path):
    vc.convert(DATA / "wallclock_experts3.pt", tmp_path / "a.pt", transforms=[("arc_meta", {"visits": VISITS})])
    torch.save({**load(tmp_path / "a.pt"), "step": 500}, tmp_path / "b.pt")
    with pytest.raises(InconsistentError, match="made at step 4, but the checkpoint is at step 500"):
        vc.convert(tmp_path / "b.pt", tmp_path / "c.pt", transforms=["mitosis_split"])


def test_a_childs_row_keeps_the_step_it_was_born_at(tmp_path):
    vc.convert(DATA / "wallclock_experts3.pt", tmp_path / "a.pt", transforms=[SPLIT])
    torch.save({**load(tmp_path / "a.pt"), "step": 100}, tmp_path / "b.pt")
    assert vc.open(tmp_path / "b.pt").lifecycle[3].created_step == 4


def test_rows_of_a_model_that_has_grown_since_are_completed_with_a_warning(tmp_path):
    vc.convert(DATA / "modular_experts3", tmp_path / "a.pt")
    payload = load(tmp_path / "a.pt")
    for leaf in ("weight", "bias"):
        payload["model"][f"head.experts.3.{leaf}"] = torch.zeros_like(payload["model"][f"head.experts.0.{leaf}"])
    payload |= {"num_experts": 4, "optim": None, "step": 9}
    torch.save(payload, tmp_path / "b.pt")
    with pytest.warns(vc.CkptWarning, match="for 3 experts, but the model has 4"):
        rows = vc.open(tmp_path / "b.pt").lifecycle
    assert rows[0].contrib == 12.0
    assert rows[3] == vc.Lifecycle(created_step=9, last_used_step=9)


def test_a_bare_state_dict_that_became_a_payload_is_written_as_one(tmp_path):
    vc.convert(DATA / "raw_state_dict.pt", tmp_path / "a", to="modular")
    router = tmp_path / "a/system/router.state"
    torch.save({**load(router), "step": 9, "losses": [0.5]}, router)
    vc.convert(tmp_path / "a", tmp_path / "b.pt")
    assert load(tmp_path / "b.pt")["step"] == 9
    assert_same(dict(load(tmp_path / "b.pt")["model"]), dict(load(DATA / "raw_state_dict.pt")))


@pytest.mark.parametrize(
    "ours",
    [
        {"version": 1, "deleted": [-1]},
        {"version": 1, "history": [{"name": torch.zeros(2)}]},
        {"version": 1, "lifecycle": {"0": {"contrib": float("nan")}}},
        {"version": 1, "dialects": {"router": {"keys": 3}}},
        {"version": 1, "unheard": 1},
        [1],
    ],
    ids=str,
)
def test_nonsense_under_our_key_is_inconsistent(ours, tmp_path):
    model = experts(3)
    del model[E1]
    state = experts(2) if ours != {"version": 1, "deleted": [-1]} else model
    torch.save({"model": state, "vraxion_ckpt": ours}, tmp_path / "a.pt")
    with pytest.raises(InconsistentError):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt")


# --- ties, types, and optimizers in other places ---


def test_a_router_map_that_is_tied_to_another_tensor_is_not_changed_under_one_name(tmp_path):
    state = experts(2)
    torch.save({"model": {**state, "alias": state["router_map"]}}, tmp_path / "a.pt")
    with pytest.raises(InvariantError, match="shared memory before and no longer do"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[SPLIT])


def test_a_head_that_is_tied_to_the_body_is_not_cloned(tmp_path):
    state = experts(2)
    torch.save({"model": {"embedding": state[E0], **state}}, tmp_path / "a.pt")
    with pytest.raises(vc.TransformError, match="tied to embedding"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[SPLIT])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64])
def test_narrow_router_maps_are_filled_and_redirected_rightly(dtype, tmp_path):
    state = {"router_map": torch.zeros(300, dtype=dtype), "head.single.weight": torch.ones(2, 2)}
    torch.save({"model": state}, tmp_path / "a.pt")
    chain = ["single_to_experts:experts=7,route=modulo", "mitosis_split:parent=4,addresses=[256,263],noise=0"]
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=chain)
    router = load(tmp_path / "b.pt")["model"]["router_map"]
    assert router.dtype == dtype
    assert router.tolist() == [7 if a in (256, 263) else a % 7 for a in range(300)]


def test_a_router_map_too_narrow_for_the_next_id_is_refused(tmp_path):
    torch.save({"model": {**experts(128), "router_map": torch.zeros(4, dtype=torch.int8)}}, tmp_path / "a.pt")
    with pytest.raises(vc.TransformError, match="cannot hold expert id 128"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[SPLIT])


@pytest.mark.parametrize("where", [lambda o: {"optimizer_state_dict": o}, lambda o: {"all": {"optimizers": [o]}}])
def test_an_optimizer_in_another_place_is_carried_and_grown(where, tmp_path):
    payload = {"model": experts(2), **where(optimizer(["theta", E0, E1]))}
    torch.save(payload, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "same.pt")
    assert_same(load(tmp_path / "same.pt"), payload)
    with pytest.raises(BindingError, match="not known for certain"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[SPLIT])
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[SPLIT], optimizer_order="model")
    found = load(tmp_path / "b.pt")
    grown = found["optimizer_state_dict"] if "optimizer_state_dict" in found else found["all"]["optimizers"][0]
    assert grown["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert grown["state"].keys() == {0, 1, 2, 3}


def test_a_parent_with_nan_or_infinity_is_cloned_only_if_allowed_and_what_noise_cannot_touch_is_said(tmp_path):
    state = experts(2)
    state[E0] = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]])
    torch.save({"model": state}, tmp_path / "a.pt")
    split = "mitosis_split:parent=0,addresses=[0,2]"
    with pytest.raises(vc.TransformError, match="expert 0 has weights that are NaN or infinite"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[split])
    done = vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[f"{split},allow_nan=true"])
    preserved = done.function_preserved
    assert preserved.as_asked
    assert (preserved.changed, preserved.nonfinite) == (2, 2)
    assert str(preserved).startswith("finite weights within the noise")
    assert "NaN and infinite weights at 2 of them are as before" in str(preserved)
    clone = load(tmp_path / "b.pt")["model"]["head.experts.2.weight"]
    assert clone.isfinite().tolist() == [[True, False], [False, True]]


def test_a_clone_of_nothing_but_nan_is_judged_by_its_bits(tmp_path):
    torch.save({"model": experts(2) | {E0: torch.full((2, 2), float("nan"))}}, tmp_path / "a.pt")
    chain = ["mitosis_split:parent=0,addresses=[0],allow_nan=true"]
    with pytest.warns(vc.CkptWarning, match="0 of 4 elements changed"):
        done = vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=chain)
    assert str(done.function_preserved) == "yes, bit-identical at all 8 addresses"


# --- places ---


@pytest.mark.parametrize("target", ["experts/expert_003.pt", "experts/expert_001.pt", "new.pt", "deeper/"])
def test_a_source_named_by_its_router_state_is_not_written_into(target, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(DATA / "modular_experts3", source)
    before = files_below(source)
    with pytest.raises(UsageError, match="inside the source"):
        vc.convert(source / "system/router.state", f"{source}/{target}", overwrite=True)
    assert files_below(source) == before
    vc.convert(source, tmp_path / "still_fine.pt")


@pytest.mark.parametrize("output", ["source/experts/expert_003.pt", "source/plan.json", "visits.json"])
def test_a_plan_is_not_written_into_the_source_or_over_what_the_chain_reads(output, tmp_path):
    shutil.copytree(DATA / "modular_experts3", tmp_path / "source")
    shutil.copy(VISITS, tmp_path / "visits.json")
    chain = [("arc_meta", {"visits": tmp_path / "visits.json", "output": tmp_path / output})]
    with pytest.raises(UsageError):
        vc.convert(tmp_path / "source", tmp_path / "out.pt", transforms=chain, overwrite=True)
    assert (tmp_path / "visits.json").read_bytes() == VISITS.read_bytes()
    assert files_below(tmp_path / "source") == files_below(DATA / "modular_experts3")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("arguments", [["describe", "arc_meta"], ["inspect", str(DATA / "modular_gc")], ["--help"]])
def test_a_terminal_without_unicode_gets_an_answer_too(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "vraxion_ckpt.cli", *arguments],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
