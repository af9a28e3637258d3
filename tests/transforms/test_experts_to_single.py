"""Identical experts become a single head. The inverse of `single_to_experts` is exact."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import DATA, assert_same, files_below, load
from test_prune_merge import NAMES, all_deleted_but_expert_0, middle, optimizer_of, prune, saved, state_of

import vraxion_ckpt as vc
from vraxion_ckpt.errors import TransformError

SINGLE = DATA / "wallclock_single.pt"


@pytest.mark.parametrize("target", ["back.pt", "back/"])
@pytest.mark.parametrize("source", [SINGLE, DATA / "steps_single.pt", DATA / "modular_single"], ids=lambda p: p.stem)
@pytest.mark.parametrize("first", ["single_to_experts", "single_to_experts:experts=3,route=modulo"])
def test_there_and_back_again_nothing_has_changed(first, source, target, tmp_path):
    done = vc.convert(source, f"{tmp_path}/{target}", transforms=[first, "experts_to_single"])
    assert str(done.function_preserved) == "yes, bit-identical at all 64 addresses"
    assert (done.tensors.changed, done.tensors.renamed, done.addresses_moved) == (0, 0, 0)
    vc.convert(source, tmp_path / "plain.pt")
    vc.convert(tmp_path / target, tmp_path / "again.pt")
    again, plain = load(tmp_path / "again.pt"), load(tmp_path / "plain.pt")
    del again["vraxion_ckpt"]
    plain.pop("vraxion_ckpt", None)
    assert_same(again, plain)


def test_there_and_back_in_one_format_gives_the_very_payload_back(tmp_path):
    vc.convert(SINGLE, tmp_path / "back.pt", transforms=["single_to_experts:experts=3", "experts_to_single"])
    back = load(tmp_path / "back.pt")
    del back["vraxion_ckpt"]
    assert_same(back, load(SINGLE))


@pytest.mark.parametrize("target", ["single.pt", "single/"])
def test_the_last_expert_becomes_the_single_head(target, tmp_path):
    chain = [middle(0, 1), prune(1, 0, allow_tenured=True), "experts_to_single"]
    vc.convert(DATA / "modular_experts3", f"{tmp_path}/{target}", transforms=chain)
    single = vc.open(tmp_path / target)
    assert single.head.kind == "single"
    assert_same(dict(single.head.experts[0]), load(DATA / "modular_experts3/experts/expert_001.pt"))
    assert single.router_map.tolist() == [0] * 64
    rows = json.loads((DATA / "modular_experts3/experts/meta.json").read_text())["experts"]
    assert single.lifecycle[0].contrib == rows[1]["contrib"]
    assert single.optimizer.params == [
        name.replace("experts.1", "single") for name in NAMES if not re.search(r"experts\.[02]", name)
    ]


def test_one_expert_that_is_left_in_a_list_is_warned_of(tmp_path):
    with pytest.warns(vc.CkptWarning, match="let mitosis_split or experts_to_single follow"):
        vc.convert(DATA / "steps_experts2_sgd.pt", tmp_path / "one.pt", transforms=[prune()])
    vc.convert(tmp_path / "one.pt", tmp_path / "single.pt", transforms=["experts_to_single"])
    assert_same(
        load(tmp_path / "single.pt")["model"]["head.single.weight"],
        load(DATA / "steps_experts2_sgd.pt")["model"]["head.experts.0.weight"],
    )


def test_a_single_head_with_inner_layers_is_warned_of(tmp_path):
    chain = [prune(2, 1), prune(1, 0), "experts_to_single"]
    with pytest.warns(vc.CkptWarning, match=r"inner layers \(down.weight\)"):
        vc.convert(DATA / "wallclock_adapter_experts.pt", tmp_path / "single.pt", transforms=chain)
    model = load(tmp_path / "single.pt")["model"]
    modules = [module for module in model._metadata if module.startswith("head")]
    assert modules == ["head", "head.single", "head.single.down", "head.single.up"]
    leaves = ("down.weight", "down.bias", "up.weight", "up.bias")
    assert [name for name in model if name.startswith("head")] == [f"head.single.{leaf}" for leaf in leaves]


def test_what_an_earlier_tool_left_of_a_pruned_expert_goes(tmp_path):
    original = DATA / "expected/named_experts3.prune_2_into_0.pt"  # with an entry of expert 2 in _metadata
    vc.convert(original, tmp_path / "single.pt", transforms=[prune(), "experts_to_single"])
    modules = load(tmp_path / "single.pt")["model"]._metadata
    assert list(modules) == list(load(SINGLE)["model"]._metadata)


def alike(*experts: int, **changes: float) -> dict[str, torch.Tensor]:
    """Return a state dict of bit-identical experts with a NaN. `e1=5.0` changes expert 1."""
    state = state_of(*experts, leaves=("weight",))
    for i in experts:
        state[f"head.experts.{i}.weight"] = torch.tensor([[1.0, float("nan")], [0.0, changes.get(f"e{i}", 4.0)]])
    return state


TO_SINGLE = "experts_to_single:allow_nan=true"


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, None])
def test_experts_that_are_alike_in_every_bit_become_one(dtype, tmp_path):
    model, names = alike(2, 0, 1), [f"head.experts.{i}.weight" for i in (2, 0, 1)]
    router = model.pop("router_map")
    if dtype is not None:
        model["router_map"] = router.to(dtype)
    # Expert 1 has never had a gradient, and expert 2 is frozen.
    payload = {"model": model, "optim": optimizer_of(["theta"], names[1:], without=names[2]), "num_experts": 3}
    torch.save(payload, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[TO_SINGLE], optimizer="partial")
    after = load(tmp_path / "b.pt")
    assert after["num_experts"] == 1
    assert [group["param_names"] for group in after["optim"]["param_groups"]] == [["theta"], ["head.single.weight"]]
    assert_same(after["optim"]["state"], {i: payload["optim"]["state"][i] for i in (0, 1)})
    assert_same(after["model"]["head.single.weight"], model[names[1]])
    zeros = None if dtype is None else torch.zeros(40, dtype=dtype)
    assert_same(after["model"].get("router_map"), zeros)


@pytest.mark.parametrize(("experts", "dropped"), [((0,), False), ((0, 1), True)])
def test_a_request_outlives_what_changes_nothing_about_its_expert(experts, dropped, tmp_path):
    request = {"parent_expert": 0, "hot_addresses": [0, 2]}
    torch.save({"model": alike(*experts), "mitosis": request}, tmp_path / "a.pt")
    with pytest.warns(vc.CkptWarning) if dropped else contextlib.nullcontext():
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[TO_SINGLE])
    assert load(tmp_path / "b.pt").get("mitosis") == (None if dropped else request)


@pytest.mark.parametrize("experts", [(0,), (0, 1)])
def test_a_plan_is_forgotten(experts, tmp_path):
    visits = tmp_path / "visits.json"
    visits.write_text(json.dumps([1] * 40))
    torch.save({"model": alike(*experts)}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[("arc_meta", {"visits": visits}), TO_SINGLE])
    assert vc.open(tmp_path / "b.pt").plan is None


# --- refusals ---

W0, W1 = "head.experts.0.weight", "head.experts.1.weight"
TWO = ["theta", W0, W1]
TIED = alike(0, 1)
TIED[W1] = TIED[W0]
SOURCES: dict[str, Callable[[Path], Path]] = {
    "experts": lambda _: DATA / "wallclock_experts3.pt",
    "adapter experts": lambda _: DATA / "modular_adapter_experts",
    "single": lambda _: SINGLE,
    "one deleted": lambda _: DATA / "modular_gc",
    "two deleted": all_deleted_but_expert_0,
    "no head": saved(model={"router_map": torch.zeros(4, dtype=torch.int64)}),
    "third unlike": saved(model=alike(0, 1, 2, e2=-4.0)),
    "unlike in sign": saved(model=alike(0, 1, e0=0.0, e1=-0.0)),
    "state unlike": saved(model=alike(0, 1), optim=optimizer_of(TWO)),
    "state of 1 only": saved(model=alike(0, 1), optim=optimizer_of(TWO, without=W0)),
    "groups unlike": saved(model=alike(0, 1), optim=optimizer_of(["theta", W0], [W1], without="head")),
    "0 frozen": saved(model=alike(0, 1), optim=optimizer_of(["theta", W1], without="head")),
    "tied": saved(model=TIED),
}

REFUSED = [
    ("no head", r"^\[experts_to_single\]: the model has no head"),
    ("single", r"single already\n.*leave this step out"),
    ("one deleted", r"expert 1 was deleted, .*\n.*prune_merge"),
    ("two deleted", r"expert 1 was deleted, .*\n.*prune_merge"),
    ("experts", r"experts 0 and 1 differ in weight; .*\n.*prune_merge"),
    ("adapter experts", r"experts 0 and 1 differ in down.weight"),
    ("third unlike", r"experts 0 and 2 differ in weight"),
    ("unlike in sign", r"experts 0 and 1 differ in weight"),
    ("state unlike", r"identical, but the optimizer's state for weight is not\n.*prune_merge"),
    ("state of 1 only", r"the optimizer's state for weight is not"),
    ("groups unlike", r"the optimizer's param group for weight is not"),
    ("0 frozen", r"the optimizer's param group for weight is not"),
    ("tied", rf"\[{W1}\]: is tied to {W0}"),
]


@pytest.mark.parametrize(("source", "says"), REFUSED)
def test_experts_that_one_head_cannot_stand_for_are_refused_and_nothing_is_written(source, says, tmp_path):
    made = SOURCES[source](tmp_path)
    before = files_below(tmp_path)
    for target in ("new.pt", "new/"):
        with pytest.raises(TransformError, match=says):
            vc.convert(made, f"{tmp_path}/{target}", transforms=[TO_SINGLE], optimizer="partial")
    assert files_below(tmp_path) == before
