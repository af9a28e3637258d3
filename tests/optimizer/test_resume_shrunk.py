"""The three-way resume proof for models that shrink; see test_resume for the model, its trainers and the proof."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import assert_same
from test_resume import OPTIMIZERS, MakeOptimizer, Net, carried, resume, save, state_by_name, train, trained

import vraxion_ckpt as vc

SHRINK = {
    "the last of 3": (3, 2, 0),
    "the middle of 3": (3, 1, 2),
    "the first of 3": (3, 0, 1),
    "the last of 2": (2, 1, 0),
    "the first of 2": (2, 0, 1),
}


def shrunk_in_memory(
    model: Net, optimizer: torch.optim.Optimizer, gone: int, into: int, head_last: bool, make: MakeOptimizer
) -> tuple[Net, torch.optim.Optimizer]:
    """Do the surgery on live objects; uses nothing of the package."""
    stay = [i for i in range(len(model.head.experts)) if i != gone]
    shrunk = Net(len(stay), head_last)

    def ancestor(name: str) -> str:
        if name.startswith("head.single."):
            return name.replace("head.single.", f"head.experts.{stay[0]}.")
        if name.startswith("head.experts."):
            _, _, number, leaf = name.split(".")
            return f"head.experts.{stay[int(number)]}.{leaf}"
        return name

    old_state = model.state_dict()
    state = {name: old_state[ancestor(name)].clone() for name in shrunk.state_dict()}
    owners = [into if owner == gone else owner for owner in model.router_map.tolist()]
    state["router_map"] = torch.tensor([stay.index(owner) for owner in owners])
    shrunk.load_state_dict(state)
    return shrunk, carried(model, optimizer, shrunk, ancestor, make)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("target", ["pruned.pt", "pruned/", "pruned.safetensors"])
@pytest.mark.parametrize("head_last", [True, False], ids=["head_last", "head_first"])
@pytest.mark.parametrize(("experts", "gone", "into"), SHRINK.values(), ids=SHRINK)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_training_goes_on_as_if_the_merge_had_happened_in_memory(
    make, experts, gone, into, head_last, target, tmp_path
):
    model, optimizer = trained(experts, head_last, make)
    save(model, optimizer, experts, tmp_path / "saved.pt", names=head_last)
    live, live_optimizer = shrunk_in_memory(model, optimizer, gone, into, head_last, make)

    chain: list[Any] = [("prune_merge", {"merge_from": gone, "merge_into": into, "renumber": gone < experts - 1})]
    chain += ["experts_to_single"] if experts == 2 else []
    order = None if head_last else "model"
    vc.convert(tmp_path / "saved.pt", f"{tmp_path}/{target}", transforms=chain, optimizer_order=order)
    resumed, resumed_optimizer = resume(tmp_path / target, experts - 1, head_last, make)
    cold = copy.deepcopy(resumed)
    cold_optimizer = make(cold)

    assert_same(dict(resumed.state_dict()), dict(live.state_dict()))
    assert_same(state_by_name(resumed, resumed_optimizer), state_by_name(live, live_optimizer))
    for net, opt in ((live, live_optimizer), (resumed, resumed_optimizer), (cold, cold_optimizer)):
        train(net, opt, range(4, 7))
    assert_same(dict(resumed.state_dict()), dict(live.state_dict()))
    assert_same(state_by_name(resumed, resumed_optimizer), state_by_name(live, live_optimizer))
    for i in range(experts - 1):
        assert not torch.equal(cold.head.of(i).weight, live.head.of(i).weight)
