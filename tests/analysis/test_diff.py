"""`diff`: what is different in a second checkpoint, measured by torch on the files themselves."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DATA, DIRECTORIES, EXPECTED, MONOLITHS, load

import vraxion_ckpt as vc
from vraxion_ckpt.analysis import expert_changes
from vraxion_ckpt.analysis.difference import diff_checkpoints
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.errors import CorruptError, UsageError
from vraxion_ckpt.reading.read_options import ReadOptions
from vraxion_ckpt.testing import checkpoints, samples

TARGETS = {"a.pt": None, "b/": None, "c.safetensors": None, "shards": "safetensors:max_shard_size=20KB"}
NAMED = DATA / "named_experts3.pt"


def changed(path: Path, change, source: Path = NAMED) -> Path:
    """Write a copy of a monolith with a change made by torch."""
    payload = copy.deepcopy(load(source))
    change(payload)
    torch.save(payload, path)
    return path


def with_more(payload):
    """Add what the real checkpoints do not have."""
    payload["ema"] = OrderedDict((name, tensor.clone()) for name, tensor in payload["model"].items())
    payload["ema"].version = 1
    payload["long"] = list(range(12))


# --- the same ---


@pytest.mark.one_in(3)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", [*MONOLITHS, *DIRECTORIES], ids=lambda path: path.name)
def test_a_checkpoint_and_its_conversion_to_each_format_are_identical(source, target, tmp_path, run_cli):
    vc.convert(source, f"{tmp_path}/{target}", to=TARGETS[target])
    code, said, complained = run_cli("diff", source, tmp_path / target)
    assert (code, complained) == (0, "")
    assert "identical" in said
    assert max(map(len, said.splitlines())) <= 80


@given(checkpoints())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_generated_checkpoint_is_identical_to_itself(checkpoint):
    found = diff_checkpoints(checkpoint, copy.deepcopy(checkpoint), ReadOptions())
    assert found.identical
    assert not found.experts
    assert found.ring is None


@pytest.mark.one_in(7)  # among them, each sample with itself
@pytest.mark.parametrize(("a", "b"), list(product(samples(), samples())))
def test_samples_are_identical_if_and_only_if_nothing_differs(a, b):
    one, other = samples()[a], samples()[b]
    assert diff_checkpoints(one, other, ReadOptions()).identical == (not any(checkpoint_differences(one, other)))


# --- experts ---


def with_owners(owners: list[int]) -> Checkpoint:
    """Return a checkpoint with a ring, and with experts that differ from each other."""
    experts = {i: Expert({"weight": torch.full((1,), float(i))}) for i in range(3)}
    return Checkpoint(core={"router_map": torch.tensor(owners)}, head=Head(HeadKind.EXPERTS, experts, 1))


def arcs_one_by_one(old: list[int], new: list[int]) -> set[tuple[int, int, int, int]]:
    """Return start, length and owners of the arcs that moved, found address by address."""
    pairs, length = list(zip(old, new, strict=True)), len(old)
    begins = [at for at in range(length) if pairs[at] != pairs[at - 1] and len(set(pairs[at])) > 1]
    if len(set(pairs)) == 1:
        return {(0, length, *pairs[0])}
    return {
        (at, next(n for n in range(1, length) if pairs[(at + n) % length] != pairs[at]), *pairs[at]) for at in begins
    }


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40), st.integers(1, 9))
def test_the_first_arcs_that_moved_are_listed_and_all_are_counted(owners, most):
    old, new = ([pair[side] for pair in owners] for side in (0, 1))
    with mock.patch.multiple(expert_changes, _PIECE=7, _MOST_ARCS=most):
        found = diff_checkpoints(with_owners(old), with_owners(new), ReadOptions()).ring
    if old == new:
        assert found is None
        return
    expected = sorted(arcs_one_by_one(old, new))
    assert found.arcs_in_all == len(expected)
    assert [(arc.start, arc.length, arc.before, arc.after) for arc in found.arcs] == expected[:most]
    assert found.moved == sum(x != y for x, y in owners)


def test_a_split_is_told_as_a_new_expert_that_is_equal_to_its_parent(run_cli):
    code, said, _ = run_cli("diff", NAMED, EXPECTED / "named_experts3.split.pt")
    assert code == 1
    parent, child, addresses = (
        load(EXPECTED / "named_experts3.split.pt")["mitosis"][k] for k in ("parent", "child", "addresses")
    )
    assert f"expert     {child} new, equal to expert {parent}" in said
    assert f"ring       {len(addresses)} addresses: expert {parent} → expert {child}" in said
    found = vc.diff(NAMED, EXPECTED / "named_experts3.split.pt")
    (expert,) = found.experts
    assert (expert.what, expert.after, expert.equal_to, expert.took_from) == ("added", child, parent, parent)
    assert [arc.start for arc in found.ring.arcs] == sorted(addresses)
    assert {change.after for change in found.model if change.what == "added"} == {
        f"head.experts.{child}.weight",
        f"head.experts.{child}.bias",
    }
    assert [change.after for change in found.model if change.what == "changed"] == ["router_map"]


def test_a_clone_with_noise_is_compared_with_the_expert_it_took_its_addresses_from(tmp_path):
    vc.convert(NAMED, tmp_path / "b.pt", transforms=["mitosis_split:parent=1,addresses=[1,4],noise=0.01"])
    model = load(tmp_path / "b.pt")["model"]
    (expert,) = vc.diff(NAMED, tmp_path / "b.pt").experts
    parent, child = (
        torch.cat([model[f"head.experts.{i}.{leaf}"].flatten() for leaf in ("weight", "bias")]).double() for i in (1, 3)
    )
    assert (expert.equal_to, expert.took_from) == (None, 1)
    assert expert.measure.max_abs == float((child - parent).abs().max())
    assert expert.measure.relative_l2 == pytest.approx(float((child - parent).norm() / parent.norm()), rel=1e-12)
    cosine = float(parent @ child / parent.norm() / child.norm())
    assert expert.measure.cosine == pytest.approx(cosine, rel=1e-12)


def test_a_head_that_became_a_list_of_experts_is_told_as_renamed(tmp_path, run_cli):
    source = DATA / "wallclock_single.pt"
    with pytest.warns(vc.CkptWarning, match="loaded by no runtime"):
        vc.convert(source, tmp_path / "b.pt", transforms=["single_to_experts"])
    found = vc.diff(source, tmp_path / "b.pt")
    renamed = [(change.before, change.after) for change in found.model]
    assert renamed == [(f"head.single.{leaf}", f"head.experts.0.{leaf}") for leaf in ("weight", "bias")]
    assert {change.what for change in found.model} == {"renamed"}
    assert [(change.before, change.after) for change in found.experts] == [(0, 0)]
    assert found.optimizer == ()
    assert found.ring is None
    assert "0 the same, under another name" in run_cli("diff", source, tmp_path / "b.pt")[1]


def test_a_renumbered_expert_is_the_same_expert_and_owns_what_it_owned(tmp_path):
    vc.convert(NAMED, tmp_path / "b.pt", transforms=["prune_merge:merge_from=0,merge_into=1,renumber=true"])
    found = vc.diff(NAMED, tmp_path / "b.pt")
    assert [(e.what, e.before, e.after) for e in found.experts] == [
        ("renamed", 1, 0),
        ("renamed", 2, 1),
        ("removed", 0, None),
    ]
    owners = load(NAMED)["model"]["router_map"]
    assert found.ring.moved == int((owners == 0).sum())
    assert [(flow.before, flow.after) for flow in found.ring.flows] == [(0, 0)]
    assert {change.what for change in found.optimizer} == {"removed"}
    assert found.lifecycle == ()  # no file states a row


def test_the_other_way_round_added_becomes_removed():
    one, other = NAMED, EXPECTED / "named_experts3.split.pt"
    there, back = vc.diff(one, other), vc.diff(other, one)
    assert there.tensors_identical == back.tensors_identical
    assert [e.what for e in back.experts] == ["removed"]
    assert back.experts[0].equal_to == there.experts[0].equal_to
    swapped = {"added": "removed", "removed": "added"}
    for section in ("model", "optimizer", "payload"):
        assert sorted(swapped.get(c.what, c.what) for c in getattr(there, section)) == sorted(
            c.what for c in getattr(back, section)
        )


def test_an_arc_that_goes_over_the_end_of_the_ring_is_one(tmp_path):
    def move(payload):
        router = payload["model"]["router_map"]
        router[[62, 63, 0, 1]] = torch.tensor([1, 1, 1, 1]).where(router[[62, 63, 0, 1]] == 0, router[[62, 63, 0, 1]])

    def everything_to_zero(payload):
        payload["model"]["router_map"][:] = 0

    a = changed(tmp_path / "a.pt", everything_to_zero)
    b = changed(tmp_path / "b.pt", move, a)
    (arc,) = vc.diff(a, b).ring.arcs
    assert (arc.start, arc.length, arc.before, arc.after) == (62, 4, 0, 1)


# --- values ---


def test_a_changed_tensor_is_measured_as_torch_measures_it(tmp_path):
    name = "input_proj.weight"

    def shift(payload):
        payload["model"][name][0] += 0.5

    b = changed(tmp_path / "b.pt", shift)
    found = vc.diff(NAMED, b)
    (change,) = found.model
    old, new = (load(path)["model"][name].double() for path in (NAMED, b))
    assert (change.what, change.after) == ("changed", name)
    assert change.measure.elements == int((old != new).sum())
    assert change.measure.max_abs == float((new - old).abs().max())
    assert change.measure.relative_l2 == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-12)
    assert change.measure.cosine == pytest.approx(float((old * new).sum() / old.norm() / new.norm()), rel=1e-12)
    assert found.optimizer == found.payload == found.lifecycle == found.other == ()


NAN = [0x7FC00000, 0x7FC00001, 0x7F800001]


@pytest.mark.parametrize(("a", "b"), list(product(NAN, NAN)))
def test_nans_compare_by_their_bits(a, b, tmp_path):
    files = []
    for number, pattern in enumerate((a, b)):

        def put(payload, pattern=pattern):
            payload["model"]["context_logit"] = torch.tensor(pattern, dtype=torch.int32).view(torch.float32)

        files.append(changed(tmp_path / f"{number}.pt", put))
    found = vc.diff(*files)
    assert found.identical == (a == b)
    for change in found.model:
        assert (change.measure.elements, change.measure.not_finite, change.measure.max_abs) == (1, 1, None)


def test_zeros_of_different_signs_differ_by_nothing_and_are_not_identical(tmp_path):
    files = [
        changed(tmp_path / f"{z}.pt", lambda p, z=z: p["model"].__setitem__("context_logit", torch.tensor(z)))
        for z in (0.0, -0.0)
    ]
    (change,) = vc.diff(*files).model
    assert (change.measure.elements, change.measure.max_abs, change.measure.relative_l2) == (1, 0.0, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_another_dtype_is_a_change_measured_by_value(dtype, tmp_path):
    name = "input_proj.weight"
    b = changed(tmp_path / "b.pt", lambda p: p["model"].__setitem__(name, p["model"][name].to(dtype)))
    (change,) = vc.diff(NAMED, b).model
    old, new = load(NAMED)["model"][name], load(b)["model"][name]
    assert change.old.startswith("float32")
    assert change.new.startswith(str(dtype).removeprefix("torch."))
    assert change.measure.max_abs == (float((old.double() - new.double()).abs().max()) or None)


def test_another_shape_is_a_change_that_is_not_measured(tmp_path):
    name = "input_proj.weight"
    b = changed(tmp_path / "b.pt", lambda p: p["model"].__setitem__(name, p["model"][name].flatten()))
    (change,) = vc.diff(NAMED, b, param_names=None).model
    assert change.measure is None
    assert change.old != change.new


@pytest.mark.parametrize(
    ("section", "name", "change"),
    [
        ("payload", "agc_scale_max", lambda p: p.__setitem__("agc_scale_max", 5)),
        ("payload", "agc_scale_max", lambda p: p.__setitem__("agc_scale_max", int(p["agc_scale_max"]))),
        ("payload", "update_scale", lambda p: p.__setitem__("update_scale", -p["update_scale"])),
        ("payload", "losses", lambda p: p["losses"].append(1.0)),
        ("payload", "losses", lambda p: p["losses"].__setitem__(1, 9.0)),
        ("payload", "new", lambda p: p.__setitem__("new", {"deep": [torch.zeros(2)]})),
        ("payload", "scaler", lambda p: p.pop("scaler")),
        ("optimizer", "group 0.lr", lambda p: p["optim"]["param_groups"][0].__setitem__("lr", 1.0)),
        ("optimizer", "group 0.betas", lambda p: p["optim"]["param_groups"][0].__setitem__("betas", (0.9, 0.99))),
        ("optimizer", "exp_avg", lambda p: p["optim"]["state"][0]["exp_avg"].add_(1)),
        ("optimizer", "exp_avg", lambda p: p["optim"]["state"][0].pop("exp_avg")),
        ("optimizer", "max_exp", lambda p: p["optim"]["state"][0].__setitem__("max_exp", torch.zeros(()))),
        ("model", "extra", lambda p: p["model"].__setitem__("extra", torch.zeros(1))),
        ("model", "router_map", lambda p: p["model"].__setitem__("router_map", p["model"]["router_map"].int())),
        ("other", "order", lambda p: p["model"].move_to_end("router_map")),
        ("other", "spelling", lambda p: p.__setitem__("step", p.pop("step"))),
        ("other", "spelling", lambda p: p.pop("num_experts")),
        ("other", "param_names", lambda p: p["param_names"].reverse()),
        ("payload", "ema attributes.version", lambda p: p["ema"].__setattr__("version", 2)),
        ("payload", "long", lambda p: p.__setitem__("long", tuple(p["long"]))),
        ("other", "module versions", lambda p: p["model"]._metadata.__setitem__("", {"version": 9})),
    ],
)  # fmt: skip
def test_whatever_differs_is_told_where_it_stands(section, name, change, tmp_path, run_cli):
    a = changed(tmp_path / "a.pt", with_more)
    b = changed(tmp_path / "b.pt", change, a)
    found = vc.diff(a, b)
    assert not found.identical
    sections = {"model", "optimizer", "payload", "lifecycle", "history", "other"}
    assert {s for s in sections if getattr(found, s)} == {section}
    told = " ".join(f"{c.before} {c.after}" for c in getattr(found, section))
    assert name in told
    code, said, _ = run_cli("diff", a, b)
    assert code == 1
    assert name in said


def test_one_tensor_under_two_names_is_not_the_same_as_two(tmp_path):
    """A training step updates both through one memory, or each."""

    def equal(payload):
        state, model = payload["optim"]["state"], payload["model"]
        names = payload["param_names"]
        for leaf in ("weight", "bias"):
            first, second = (names.index(f"head.experts.{i}.{leaf}") for i in (0, 1))
            model[f"head.experts.1.{leaf}"] = model[f"head.experts.0.{leaf}"].clone()
            state[second] = {slot: value.clone() for slot, value in state[first].items()}

    def shared(payload):
        equal(payload)
        names = payload["param_names"]
        first, second = (names.index(f"head.experts.{i}.weight") for i in (0, 1))
        payload["optim"]["state"][second] = payload["optim"]["state"][first]

    a, b = changed(tmp_path / "a.pt", equal), changed(tmp_path / "b.pt", shared)
    found = vc.diff(a, b)
    assert {change.what for change in found.other} == {"added"}
    assert "head.experts.1.weight.exp_avg" in " ".join(str(change.new) for change in found.other)
    assert vc.check(a).sound
    assert not vc.check(b).sound


@pytest.mark.parametrize(
    ("a", "b", "relative", "largest"),
    [
        ([1e200, 2e200], [1e200, 2.2e200], 0.2 / 5**0.5, 2e199),
        ([1e-200, 2e-200], [1e-200, 3e-200], 1 / 5**0.5, 1e-200),
        ([2**53, 1], [2**53 + 1, 1], None, 1.0),
        ([2**63 - 1, 0], [2**63 - 2, 0], None, 1.0),
    ],
)
def test_measures_neither_overflow_nor_vanish(a, b, relative, largest, tmp_path):
    for name, values in (("a", a), ("b", b)):
        torch.save(
            {"w": torch.tensor(values, dtype=torch.int64 if isinstance(values[0], int) else torch.float64)},
            tmp_path / f"{name}.pt",
        )
    (change,) = vc.diff(tmp_path / "a.pt", tmp_path / "b.pt").model
    assert change.measure.max_abs == pytest.approx(largest, rel=1e-6)
    assert change.measure.relative_l2 == (None if relative is None else pytest.approx(relative, rel=1e-6))


def test_an_optimizer_that_is_not_bound_is_compared_by_position(run_cli, tmp_path):
    payload = load(DATA / "wallclock_experts3.pt")
    payload["model"]["gru.weight_ih"] = payload["model"]["gru.weight_ih"][:-1].clone()  # fits no optimizer slot
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    torch.save(payload, one)
    torch.save({**payload, "step": 5}, other)
    found = vc.diff(one, other)
    assert "other.pt" in found.not_bound
    assert found.optimizer == ()
    assert found.slots_identical == sum(map(len, payload["optim"]["state"].values()))
    assert "compared by position" in run_cli("diff", one, other)[1]


def test_a_garbage_collected_expert_keeps_its_addresses():
    found = vc.diff(DATA / "modular_experts3", DATA / "modular_gc")
    assert [(e.what, e.before) for e in found.experts] == [("removed", 1)]
    assert found.ring is None


# --- the command ---


def test_quiet_only_answers_by_the_exit_code(run_cli):
    assert run_cli("-q", "diff", NAMED, NAMED) == (0, "", "")
    assert run_cli("-q", "diff", NAMED, EXPECTED / "named_experts3.split.pt") == (1, "", "")


def test_long_lists_are_cut_short_and_json_has_all(tmp_path, run_cli):
    def shift(payload):
        for name, tensor in payload["model"].items():
            if name != "router_map":
                payload["model"][name] = tensor + 1

    b = changed(tmp_path / "b.pt", shift)
    code, said, _ = run_cli("diff", NAMED, b)
    facts = json.loads(run_cli("diff", NAMED, b, "--json")[1])
    assert code == 1
    assert "more, see --json" in said
    assert len(facts["model"]) == len(load(NAMED)["model"]) - 2  # router_map, and one is empty
    assert max(map(len, said.splitlines())) <= 80


def test_a_damaged_side_is_refused_and_named(tmp_path):
    data = bytearray(NAMED.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b.pt").write_bytes(data)
    with pytest.raises(CorruptError, match=r"b\.pt"):
        vc.diff(NAMED, tmp_path / "b.pt")
    with pytest.raises(UsageError, match="no such file"):
        vc.diff(NAMED, tmp_path / "c.pt")


@pytest.mark.parametrize("router", [torch.zeros(2, 2, dtype=torch.int64), torch.tensor(3), torch.tensor([2**40, 0])])
def test_a_router_map_without_a_head_may_hold_anything(router, tmp_path, run_cli):
    for name, value in (("a", router), ("b", router + 1)):
        torch.save({"router_map": value, "w": torch.zeros(2)}, tmp_path / f"{name}.pt")
    assert run_cli("inspect", tmp_path / "a.pt")[0] == 0
    code, said, _ = run_cli("diff", tmp_path / "a.pt", tmp_path / "b.pt")
    assert code == 1
    assert "router_map" in said


def test_measures_of_large_tensors_are_those_of_the_whole(tmp_path):
    """More than one piece, and not contiguous."""
    torch.manual_seed(0)
    a = torch.randn(1500, 1500).T
    b = a.clone()
    b[3, ::7] *= 1.5
    torch.save({"w": a}, tmp_path / "a.pt")
    torch.save({"w": b}, tmp_path / "b.pt")
    (change,) = vc.diff(tmp_path / "a.pt", tmp_path / "b.pt").model
    assert change.measure.elements == int((a != b).sum())
    assert change.measure.max_abs == float((a.double() - b.double()).abs().max())
    assert change.measure.relative_l2 == pytest.approx(float((a.double() - b.double()).norm() / a.double().norm()))
    assert math.isclose(
        change.measure.cosine,
        float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)),
        rel_tol=1e-12,
    )
