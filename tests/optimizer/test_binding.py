"""Inference of optimizer names against brute force over all assignments."""

from __future__ import annotations

from itertools import combinations, permutations, product

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vraxion_ckpt.checkpoint.model import UnboundCheckpoint
from vraxion_ckpt.checkpoint.optimizer_state import UnboundOptimizer
from vraxion_ckpt.checkpoint.torch_optimizer import unbind
from vraxion_ckpt.optimizer.binding import bind

SHAPES = [(2,), (3,), (2, 2)]


@st.composite
def optimizers(draw):
    """Float tensors in state-dict order, some of them parameters, spread over one or two groups, some without state."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6))
    groups = draw(st.integers(1, 2))
    # For each tensor: its group, or None for a buffer.
    places = draw(
        st.lists(st.sampled_from([*range(groups), *range(groups), None]), min_size=len(shapes), max_size=len(shapes))
    )
    with_state = draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    return shapes, places, with_state, groups


def checkpoint_of(shapes, places, with_state, groups):
    core = {f"t{i}": torch.full(shape, float(i)) for i, shape in enumerate(shapes)}
    order = [[i for i, place in enumerate(places) if place == g] for g in range(groups)]
    flat = [i for group in order for i in group]
    state = {
        number: {"step": torch.tensor(1.0), "exp_avg": torch.full(shapes[i], float(i))}
        for number, i in enumerate(flat)
        if with_state[i]
    }
    ids = iter(range(len(flat)))
    raw = {"state": state, "param_groups": [{"lr": 0.1, "params": [next(ids) for _ in group]} for group in order]}
    return (
        UnboundCheckpoint(core=core, unbound=UnboundOptimizer(raw)),
        [[f"t{i}" for i in group] for group in order],
        state,
    )


def all_assignments(shapes, wanted, state):
    """List every way to give each id a tensor of its own that fits, the slow and obvious way; in whatever order."""
    count = sum(map(len, wanted))
    return [
        [f"t{i}" for i in chosen]
        for chosen in permutations(range(len(shapes)), count)
        if all(tuple(state[n]["exp_avg"].shape) == shapes[i] for n, i in enumerate(chosen) if n in state)
    ]


@settings(max_examples=400, deadline=None)
@given(optimizers())
def test_what_shapes_alone_leave_open_is_undecided_and_nothing_else(drawn):
    shapes = drawn[0]
    checkpoint, wanted, state = checkpoint_of(*drawn)
    possible = all_assignments(shapes, wanted, state)
    flat = [name for group in wanted for name in group]
    assert flat in possible
    bound = bind(checkpoint).optimizer
    assert bound.params in possible
    if not state and drawn[3] == 1 and len(flat) == len(shapes):
        assert not bound.undecided  # nothing depends on it
        return
    ids = {name: {ids.index(name) if name in ids else None for ids in possible} for name in checkpoint.core}
    assert bound.undecided == {name for name, places in ids.items() if len(places) > 1}
    for name, slots in bound.state.items():
        if name not in bound.undecided:
            assert torch.equal(slots["exp_avg"], checkpoint.core[name])


def in_order(shapes, wanted, state):
    """List every way to give each group an ordered selection of tensors that fits."""
    sizes = [len(group) for group in wanted]
    found = []
    for chosen in product(*(combinations(range(len(shapes)), size) for size in sizes)):
        flat = [i for group in chosen for i in group]
        if len(set(flat)) < len(flat):
            continue
        if all(tuple(state[n]["exp_avg"].shape) == shapes[i] for n, i in enumerate(flat) if n in state):
            found.append([f"t{i}" for i in flat])
    return found


@settings(max_examples=400, deadline=None)
@given(optimizers())
def test_where_the_order_is_stated_what_it_leaves_open_is_undecided_and_nothing_else(drawn):
    shapes = drawn[0]
    checkpoint, wanted, state = checkpoint_of(*drawn)
    if all(len(group) == 1 for group in wanted):
        wanted = [[name for group in wanted for name in group]]  # one group for each: the groups are in the order
        assume(wanted[0] == sorted(wanted[0]))
    possible = in_order(shapes, wanted, state)
    assert [name for group in wanted for name in group] in possible
    bound = bind(checkpoint, order="sorted").optimizer
    assert bound.params in possible
    if not state and drawn[3] == 1 and sum(map(len, wanted)) == len(shapes):
        assert not bound.undecided
        return
    ids = {name: {ids.index(name) if name in ids else None for ids in possible} for name in checkpoint.core}
    assert bound.undecided == {name for name, places in ids.items() if len(places) > 1}


@settings(max_examples=100, deadline=None)
@given(optimizers())
def test_unbinding_gives_back_what_was_bound(drawn):
    checkpoint, wanted, _ = checkpoint_of(*drawn)
    raw = checkpoint.unbound.state_dict
    bound = bind(checkpoint, [name for group in wanted for name in group]).optimizer
    again = unbind(bound)
    assert again["param_groups"] == raw["param_groups"]
    assert list(again["state"]) == list(raw["state"])
    assert all(again["state"][i]["exp_avg"].tensor() is raw["state"][i]["exp_avg"] for i in raw["state"])


def test_a_slot_that_has_dimensions_elsewhere_tells_a_scalar_parameter():
    """SGD keeps one slot only; that of a 0-d parameter has no dimensions, and must not count as unknown."""
    core = {"scale": torch.tensor(1.0), "buffer": torch.zeros(3), "weight": torch.zeros(4)}
    slots = {0: {"momentum_buffer": torch.tensor(5.0)}, 1: {"momentum_buffer": torch.zeros(4)}}
    raw = {"state": slots, "param_groups": [{"params": [0, 1]}]}
    bound = bind(UnboundCheckpoint(core=core, unbound=UnboundOptimizer(raw))).optimizer
    assert bound.params == ["scale", "weight"]


def test_integer_tensors_and_later_names_of_tied_ones_are_no_candidates():
    weight = torch.zeros(4)
    core = {"ids": torch.zeros(4, dtype=torch.int64), "first": weight, "tied": weight, "mask": torch.zeros(4).bool()}
    raw = {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"params": [0]}]}
    assert bind(UnboundCheckpoint(core=core, unbound=UnboundOptimizer(raw))).optimizer.params == ["first"]


def test_ids_need_not_be_in_order_for_names_to_follow_the_groups():
    core = {name: torch.zeros(size) for name, size in (("a", 2), ("b", 3), ("c", 5))}
    for order in permutations(range(3)):
        state = {i: {"exp_avg": torch.zeros(size)} for i, size in zip(order, (2, 3, 5), strict=True)}
        raw = {"state": state, "param_groups": [{"params": list(order)}]}
        bound = bind(UnboundCheckpoint(core=core, unbound=UnboundOptimizer(raw))).optimizer
        assert bound.params == ["a", "b", "c"]
