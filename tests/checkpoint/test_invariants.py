"""What must be true of a checkpoint, what must not become shared, and whether the function is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import DATA, DIRECTORIES, MONOLITHS, bits, load

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.head import Expert, HeadKind
from vraxion_ckpt.checkpoint.invariants import (
    Preservation,
    invariant_findings,
    preservation,
    router_owners,
    shared_names,
    sharing_findings,
)
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle

SOUND = "wallclock_experts3.pt"
E0, E1 = "head.experts.0.weight", "head.experts.1.weight"


def opened(name: str = SOUND) -> Checkpoint:
    checkpoint = vc.open(DATA / name).copy()
    checkpoint.open_experts()
    return checkpoint


def with_expert(checkpoint: Checkpoint, number: int, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of an expert; None takes one out."""
    changed = {**checkpoint.head.experts[number], **tensors}
    checkpoint.head.experts[number] = Expert({leaf: t for leaf, t in changed.items() if t is not None})


# --- one checkpoint ---


@pytest.mark.parametrize("path", [*MONOLITHS, *DIRECTORIES], ids=lambda path: path.name)
def test_a_real_checkpoint_has_no_findings(path):
    checkpoint = vc.open(path)
    assert list(invariant_findings(checkpoint)) == []
    assert shared_names(checkpoint) == []


def owners(*values, dtype=torch.int64):
    def spoil(checkpoint):
        checkpoint.core["router_map"] = torch.tensor(values, dtype=dtype)

    return spoil


def hole(checkpoint):
    checkpoint.head.experts[5] = checkpoint.head.experts.pop(2)


def live_and_deleted(checkpoint):
    checkpoint.head = replace(checkpoint.head, deleted=frozenset({1}))


def no_expert(checkpoint):
    checkpoint.head = replace(checkpoint.head, experts={})


def single_with_three(checkpoint):
    checkpoint.head = replace(checkpoint.head, kind=HeadKind.SINGLE)


def one_object(checkpoint):
    checkpoint.head.experts[2] = checkpoint.head.experts[1]


def other_leaf(checkpoint):
    with_expert(checkpoint, 2, bias=None)


def other_shape(checkpoint):
    with_expert(checkpoint, 2, weight=torch.zeros(4, 15))


def other_dtype(checkpoint):
    with_expert(checkpoint, 2, bias=checkpoint.head.experts[2]["bias"].double())


def row_too_many(checkpoint):
    checkpoint.lifecycle[3] = Lifecycle()


def listed_twice(checkpoint):
    checkpoint.optimizer.groups[0].params.append(E0)


def state_of_nobody(checkpoint):
    checkpoint.optimizer.state["nobody"] = {"step": torch.tensor(1.0)}


def listed_of_nobody(checkpoint):
    checkpoint.optimizer.groups[0].params.append("nobody")


def state_of_another_shape(checkpoint):
    checkpoint.optimizer.state[E1]["exp_avg"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (owners(0, 1, 3), ["address 2", "expert 3", "head has 3 experts"]),
        (owners(0, -1, -1), ["address 1", "expert -1"]),
        (owners(0.0, 1.0, dtype=torch.float32), ["router_map", "float32"]),
        (owners(True, False, dtype=torch.bool), ["router_map", "bool"]),
        (owners(), ["router_map", "[0]"]),
        (owners([0, 1], [1, 0]), ["router_map", "[2, 2]"]),
        (hole, ["expert 2"]),
        (live_and_deleted, ["1", "deleted"]),
        (no_expert, ["no expert"]),
        (single_with_three, ["single"]),
        (one_object, ["storage"]),
        (other_leaf, ["expert 2", "bias"]),
        (other_shape, ["expert 2", "weight", "[4, 15]", "[4, 16]"]),
        (other_dtype, ["expert 2", "bias", "float64", "float32"]),
        (row_too_many, ["lifecycle", "3"]),
        (listed_twice, [E0, "twice"]),
        (state_of_nobody, ["state", "nobody"]),
        (listed_of_nobody, ["lists", "nobody"]),
        (state_of_another_shape, [E1]),
    ],
)
def test_what_is_not_true_is_found_and_named(spoil, named):
    checkpoint = opened()
    spoil(checkpoint)
    found = list(invariant_findings(checkpoint))
    assert any(all(word in line for word in named) for line in found), found


def test_experts_with_inner_layers_may_differ_in_their_width():
    checkpoint = opened("wallclock_adapter_experts.pt")
    assert len({checkpoint.head.experts[i]["down.weight"].shape for i in range(3)}) > 1
    assert list(invariant_findings(checkpoint)) == []
    with_expert(checkpoint, 1, **{"down.weight": torch.zeros(2, 3, 4)})
    assert any("expert 1" in line and "down.weight" in line for line in invariant_findings(checkpoint))


def test_an_expert_that_is_not_open_stays_closed():
    checkpoint = vc.open(DATA / "modular_experts3")
    closed = [i for i, expert in checkpoint.head.experts.items() if not expert.is_open]
    assert closed
    list(invariant_findings(checkpoint))
    list(sharing_findings(checkpoint, checkpoint.copy()))
    shared_names(checkpoint)
    assert [i for i, expert in checkpoint.head.experts.items() if not expert.is_open] == closed


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_owners_are_read_from_any_type_and_stride(dtype):
    router = torch.tensor([0, 9, 1, 9, 2, 9], dtype=dtype)[::2]
    assert router_owners(router).tolist() == [0, 1, 2]


# --- sharing ---


def test_what_a_chain_puts_on_one_storage_is_found():
    before, after = opened(), opened()
    after = before.copy()
    with_expert(after, 2, weight=before.head.experts[1]["weight"])
    (line,) = sharing_findings(before, after)
    assert "head.experts.1.weight" in line
    assert "head.experts.2.weight" in line
    assert list(sharing_findings(after, after.copy())) == []  # as it was before


def test_two_slots_on_one_storage_are_found():
    before = opened()
    after = before.copy()
    after.optimizer.state[E1]["exp_avg"] = after.optimizer.state[E0]["exp_avg"]
    (line,) = sharing_findings(before, after)
    assert f"{E0}.exp_avg" in line
    assert f"{E1}.exp_avg" in line


def test_a_tie_that_a_chain_cuts_is_found():
    before = opened()
    before.core["tied"] = before.core["theta_ptr_reduced"]
    assert shared_names(before) == [("theta_ptr_reduced", "tied")]
    after = before.copy()
    assert list(sharing_findings(before, after)) == []
    after.core["tied"] = after.core["tied"].clone()
    (line,) = sharing_findings(before, after)
    assert "theta_ptr_reduced" in line
    assert "tied" in line


def test_shared_memory_is_seen_across_model_optimizer_and_payload():
    checkpoint = opened()
    tensor = checkpoint.head.experts[0]["weight"]
    checkpoint.optimizer.state[E0]["master"] = tensor
    checkpoint.payload["average"] = {"w": tensor}
    ((*names,),) = shared_names(checkpoint)
    assert names[:2] == [E0, f"{E0}.master"]
    assert names[2].startswith("payload.average")


# --- the function ---


def by_hand(before: Checkpoint, after: Checkpoint) -> int:
    """Count the addresses whose owner has other bits, with torch alone."""

    def owner(checkpoint, address):
        return checkpoint.head.experts[int(checkpoint.router_map[address])]

    return sum(
        [bits(t) for t in owner(before, a).values()] != [bits(t) for t in owner(after, a).values()]
        for a in range(len(before.router_map))
    )


@pytest.mark.parametrize("path", [path for path in MONOLITHS if path.name != "raw_state_dict.pt"], ids=lambda p: p.name)
def test_a_checkpoint_computes_what_it_computes(path):
    found = preservation(vc.open(path), vc.open(path))
    assert (found.addresses, found.changed, found.max_abs) == (64, 0, 0.0)
    assert found.as_asked


@pytest.mark.parametrize("factor", [1e-3, 1.0])
@pytest.mark.parametrize("number", [0, 2])
def test_addresses_of_a_changed_expert_are_counted_and_measured(number, factor):
    before = opened()
    after = before.copy()
    weight = load(DATA / SOUND)["model"][f"head.experts.{number}.weight"]
    with_expert(after, number, weight=weight + factor)
    found = preservation(before, after)
    assert found.changed == by_hand(before, after) == int((before.router_map == number).sum())
    assert found.max_abs == float(((weight + factor).double() - weight.double()).abs().max())
    assert not found.as_asked


def test_addresses_that_move_to_an_equal_expert_do_not_count():
    before = opened()
    after = before.copy()
    after.head.experts[3] = Expert({leaf: t.clone() for leaf, t in before.head.experts[0].items()})
    after.core["router_map"] = torch.where(before.router_map == 0, 3, before.router_map)
    assert preservation(before, after).changed == 0
    after.core["router_map"] = torch.where(before.router_map == 0, 1, before.router_map)
    assert preservation(before, after).changed == by_hand(before, after) == int((before.router_map == 0).sum())


@pytest.mark.parametrize(
    ("before", "after", "finite"),
    [(float("nan"), float("nan"), True), (float("inf"), float("inf"), True), (1.0, float("nan"), False)],
)
def test_weights_that_are_no_numbers_count_as_equal_only_if_they_stay_so(before, after, finite):
    one = opened()
    weight = one.head.experts[0]["weight"].clone()
    weight[0, 0] = before
    with_expert(one, 0, weight=weight)
    other, changed = one.copy(), weight.clone()
    changed[0, 0], changed[0, 1] = after, weight[0, 1] + 0.5
    with_expert(other, 0, weight=changed)
    found = preservation(one, other, noise=0.5)
    assert found.nonfinite == found.changed == int((one.router_map == 0).sum())
    assert (found.max_abs < 1) is finite
    assert found.as_asked is finite


@pytest.mark.parametrize("what", ["head", "router_map", "length"])
def test_without_two_rings_and_heads_there_is_nothing_to_compare(what):
    before = opened()
    after = before.copy()
    if what == "head":
        after.head = None
    elif what == "router_map":
        del after.core["router_map"]
    else:
        after.core["router_map"] = after.core["router_map"][:32].clone()
    assert preservation(before, after) is None


def test_an_expert_of_another_shape_cannot_be_compared():
    before = opened()
    after = before.copy()
    with_expert(after, 0, weight=torch.zeros(4, 17))
    found = preservation(before, after, noise=100.0)
    assert found.max_abs == float("inf")
    assert not found.as_asked


@pytest.mark.parametrize(
    ("changed", "max_abs", "noise", "as_asked"),
    [
        (0, 0.0, 0.0, True),
        (3, 0.1, 0.0, False),
        (3, 0.1, 0.01, True),
        (3, 0.2, 0.01, False),
        (3, float("inf"), 1.0, False),
        (3, 5.0, None, True),
    ],
)
def test_what_is_asked_for_is_sixteen_times_the_noise_at_most(changed, max_abs, noise, as_asked):
    assert Preservation(64, changed, max_abs, noise).as_asked is as_asked
