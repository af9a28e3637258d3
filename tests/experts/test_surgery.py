"""An expert is renamed, cloned or removed with all that belongs to it: tensors, optimizer, names, lifecycle, router."""

from __future__ import annotations

import hashlib

import pytest
import torch
from support import DATA, assert_same, bits, load

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.head import Expert, HeadKind
from vraxion_ckpt.checkpoint.model import Checkpoint, Lifecycle, SplitPlan
from vraxion_ckpt.checkpoint.optimizer_state import Optimizer, ParamGroup
from vraxion_ckpt.checkpoint.references import reference
from vraxion_ckpt.checkpoint.tensor_dict import referenced
from vraxion_ckpt.errors import CkptWarning, TransformError
from vraxion_ckpt.experts.noise import copy_of
from vraxion_ckpt.experts.optimizer_clones import is_master_copy
from vraxion_ckpt.experts.surgery import buffers_of, clone_expert, remove_expert, rename_head

EXPERTS = ["wallclock_experts3.pt", "wallclock_adapter_experts.pt", "named_experts3.pt", "modular_experts3"]


def opened(name: str) -> Checkpoint:
    return vc.open(DATA / name).copy()


def grown(checkpoint: Checkpoint, noise: float = 0.0, seed: int = 0, optimizer: str = "copy") -> Checkpoint:
    clone_expert(checkpoint, 0, checkpoint.num_experts, noise=noise, seed=seed, optimizer=optimizer)
    return checkpoint


# --- the head gets another name ---


@pytest.mark.parametrize("name", ["wallclock_single.pt", "steps_single.pt", "modular_single"])
def test_a_single_head_becomes_expert_0_wherever_its_name_stands(name):
    checkpoint = opened(name)
    before = checkpoint.copy()
    rename_head(checkpoint, HeadKind.EXPERTS)

    def renamed(names):
        return [n.replace("head.single.", "head.experts.0.") for n in names]

    assert checkpoint.head.kind is HeadKind.EXPERTS
    assert list(checkpoint.state_dict()) == renamed(before.state_dict())
    assert [t.data_ptr() for t in checkpoint.state_dict().values()] == [
        t.data_ptr() for t in before.state_dict().values()
    ]
    assert checkpoint.optimizer.params == renamed(before.optimizer.params)
    assert list(checkpoint.optimizer.state) == renamed(before.optimizer.state)
    assert list(checkpoint.param_names) == renamed(before.param_names)


@pytest.mark.parametrize("name", ["wallclock_single.pt", "modular_single"])
def test_there_and_back_nothing_is_left_of_it(name):
    checkpoint = opened(name)
    before = checkpoint.copy()
    rename_head(checkpoint, HeadKind.EXPERTS)
    rename_head(checkpoint, HeadKind.SINGLE)
    assert list(checkpoint.state_dict()) == list(before.state_dict())
    assert checkpoint.optimizer == before.optimizer
    assert checkpoint.param_names == before.param_names
    assert checkpoint.metadata == before.metadata
    assert checkpoint.ancestors == before.ancestors


def test_modules_are_listed_as_torch_lists_them():
    checkpoint = opened("wallclock_single.pt")
    rename_head(checkpoint, HeadKind.EXPERTS)
    model = torch.nn.Module()
    model.head = torch.nn.Module()
    model.head.experts = torch.nn.ModuleList([torch.nn.Linear(16, 4)])
    theirs = [module for module in model.state_dict()._metadata if module.startswith("head.")]
    assert [module for module in checkpoint.metadata if module.startswith("head.")] == theirs


# --- an expert is cloned ---


@pytest.mark.parametrize("name", EXPERTS)
def test_a_clone_has_the_bits_of_its_parent_and_a_storage_of_its_own(name):
    checkpoint = grown(opened(name))
    parent, child = checkpoint.head.experts[0], checkpoint.head.experts[3]
    assert list(child) == list(parent)
    for leaf in parent:
        assert bits(child[leaf]) == bits(parent[leaf])
        assert child[leaf].untyped_storage().data_ptr() != parent[leaf].untyped_storage().data_ptr()


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("policy", ["copy", "reset"])
def test_its_optimizer_state_is_the_parents_or_none(name, policy):
    checkpoint = grown(opened(name), optimizer=policy)
    state = checkpoint.optimizer.state
    leaves = list(checkpoint.head.experts[0])
    assert {f"head.experts.3.{leaf}" for leaf in leaves} <= set(checkpoint.optimizer.params)
    for leaf in leaves:
        old, new = state[f"head.experts.0.{leaf}"], state.get(f"head.experts.3.{leaf}")
        if policy == "reset":
            assert new is None
            continue
        assert_same(new, old)
        for slot, value in old.items():
            assert not isinstance(value, torch.Tensor) or value.data_ptr() != new[slot].data_ptr()


@pytest.mark.parametrize("name", ["wallclock_experts3.pt", "modular_experts3"])
def test_its_row_is_new_and_its_names_follow_the_last_experts(name):
    checkpoint = grown(opened(name))
    old = checkpoint.lifecycle[0]
    assert checkpoint.lifecycle[3] == Lifecycle.fresh(checkpoint.step, old)
    names = list(checkpoint.param_names)
    at = names.index("head.experts.3.weight")
    assert names[at - 1].startswith("head.experts.2.")
    assert names[at + 1] == "head.experts.3.bias"


def test_noise_is_drawn_anew_by_the_seed_and_the_name_alone():
    first, again, other = (grown(opened("wallclock_experts3.pt"), 0.25, seed) for seed in (1, 1, 2))
    child = {leaf: tensor.clone() for leaf, tensor in first.head.experts[3].items()}
    assert_same(dict(again.head.experts[3].tensors), child)
    for leaf, tensor in child.items():
        parent = load(DATA / "wallclock_experts3.pt")["model"][f"head.experts.0.{leaf}"]
        digest = hashlib.sha256(f"1:head.experts.3.{leaf}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        assert_same(tensor, parent + 0.25 * torch.randn(parent.numel(), generator=generator).view_as(parent))
        assert bits(other.head.experts[3][leaf]) != bits(tensor)


def test_the_source_is_left_as_it_is():
    before = vc.open(DATA / "wallclock_experts3.pt")
    grown(before.copy(), noise=0.5)
    assert_same(dict(before.state_dict()), dict(load(DATA / "wallclock_experts3.pt")["model"]))
    assert before.num_experts == 3


def test_noise_that_is_lost_in_the_numbers_is_said():
    checkpoint = opened("wallclock_experts3.pt")
    coarse = {leaf: tensor.to(torch.bfloat16) + 1000 for leaf, tensor in checkpoint.head.experts[0].items()}
    checkpoint.head.experts[0] = Expert(coarse)
    with pytest.warns(CkptWarning, match="noise"):
        grown(checkpoint, noise=1e-6)


def test_buffers_get_no_noise():
    checkpoint = opened("wallclock_experts3.pt")
    for number in range(3):
        checkpoint.head.experts[number] = Expert({**checkpoint.head.experts[number], "scale": torch.ones(2)})
    assert buffers_of(checkpoint, 0) == {"scale"}  # no optimizer lists it
    grown(checkpoint, noise=0.5)
    assert checkpoint.head.experts[3]["scale"].tolist() == [1, 1]


# --- an expert is removed ---


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize(("gone", "into"), [(0, 1), (1, 0), (2, 0), (0, 2)])
def test_ids_above_move_down_wherever_they_stand(name, gone, into):
    checkpoint = opened(name)
    before = checkpoint.copy()
    remove_expert(checkpoint, gone, into)
    stay = [i for i in range(3) if i != gone]
    assert list(checkpoint.head.experts) == [0, 1]
    for new, old in enumerate(stay):
        assert_same(dict(checkpoint.head.experts[new].tensors), dict(before.head.experts[old].tensors))
        for leaf in before.head.experts[old]:
            slots = (c.optimizer.state[f"head.experts.{n}.{leaf}"] for c, n in ((checkpoint, new), (before, old)))
            assert_same(*slots)
    owners = [stay.index(into if owner == gone else owner) for owner in before.router_map.tolist()]
    assert checkpoint.router_map.tolist() == owners
    assert checkpoint.router_map.dtype == before.router_map.dtype
    assert checkpoint.lifecycle == {new: before.lifecycle[old] for new, old in enumerate(stay)}
    assert not any(n.startswith("head.experts.2.") for n in (*checkpoint.optimizer.params, *checkpoint.param_names))


def test_expert_1_is_not_taken_for_the_beginning_of_expert_10():
    checkpoint = opened("wallclock_experts3.pt")
    while checkpoint.num_experts < 12:
        clone_expert(checkpoint, 2, checkpoint.num_experts, noise=0.1, seed=0, optimizer="copy")
    tenth, eleventh = (bits(checkpoint.head.experts[i]["weight"]) for i in (10, 11))
    remove_expert(checkpoint, 1, 0)
    assert [bits(checkpoint.head.experts[i]["weight"]) for i in (9, 10)] == [tenth, eleventh]
    assert [n for n in checkpoint.optimizer.params if n.endswith("0.weight") and "experts" in n] == [
        "head.experts.0.weight",
        "head.experts.10.weight",
    ]


def test_a_collected_expert_can_be_removed():
    checkpoint = opened("modular_gc")
    (collected,) = checkpoint.head.deleted
    live = next(iter(checkpoint.head.experts))
    count = checkpoint.num_experts
    remove_expert(checkpoint, collected, live)
    assert not checkpoint.head.deleted
    assert sorted(checkpoint.head.experts) == list(range(count - 1))


def test_a_plan_does_not_outlive_the_experts_that_it_is_for():
    checkpoint = opened("wallclock_experts3.pt")
    checkpoint.plan = SplitPlan(0, (1,), (1, 1), "greedy", router_map_len=64, num_experts=3)
    remove_expert(checkpoint, 2, 0)
    assert checkpoint.plan is None


@pytest.mark.parametrize(("parent", "stays"), [(0, False), (1, True), (2, False)])
def test_a_trainers_request_is_dropped_with_a_warning_if_its_expert_changed(parent, stays):
    checkpoint = opened("wallclock_experts3.pt")
    checkpoint.payload["mitosis"] = {"parent_expert": parent}
    if stays:
        remove_expert(checkpoint, 2, 0)
    else:
        with pytest.warns(CkptWarning, match="mitosis"):
            remove_expert(checkpoint, 2, 0)
    assert ("mitosis" in checkpoint.payload) is stays


# --- what cannot be done ---


def clone_0(checkpoint):
    grown(checkpoint)


def remove_2(checkpoint):
    remove_expert(checkpoint, 2, 0)


@pytest.mark.parametrize(("operation", "tied"), [(clone_0, 0), (remove_2, 2)])
def test_an_expert_tied_to_what_stays_is_refused(operation, tied):
    checkpoint = opened("wallclock_experts3.pt")
    checkpoint.core["other"] = checkpoint.head.experts[tied]["weight"]
    with pytest.raises(TransformError) as refused:
        operation(checkpoint)
    assert refused.value.key == f"head.experts.{tied}.weight"


@pytest.mark.parametrize("operation", [clone_0, remove_2])
def test_one_state_for_all_parameters_is_refused(operation):
    checkpoint = opened("wallclock_experts3.pt")
    names = checkpoint.optimizer.params
    state = {names[0]: {"prev_flat_grad": torch.zeros(5)}}
    checkpoint.optimizer = Optimizer([ParamGroup({}, list(names))], state)
    with pytest.raises(TransformError) as refused:
        operation(checkpoint)
    assert refused.value.key == names[0]
    assert "--optimizer drop" in refused.value.hint


@pytest.mark.parametrize("operation", [clone_0, remove_2, lambda c: rename_head(c, HeadKind.SINGLE)])
def test_without_a_head_nothing_can_be_done(operation):
    with pytest.raises(ValueError, match="no head"):
        operation(Checkpoint(core={}, head=None))


# --- copies ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64])
def test_a_copy_keeps_bits_strides_and_kind(dtype):
    tensor = torch.arange(6.0).reshape(2, 3).to(dtype).T
    copy = copy_of(reference(tensor), (), "weight").tensor()
    assert_same(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr()
    noisy = copy_of(reference(tensor), ((0.5, "1:x."),), "weight").tensor()
    assert noisy.stride() == tensor.stride()
    assert (bits(noisy) == bits(tensor)) is (dtype == torch.int64)


def test_a_parameter_stays_one():
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    copy = copy_of(reference(parameter), ((1.0, "1:x."),), "weight").tensor()
    assert isinstance(copy, torch.nn.Parameter)
    assert not copy.requires_grad


NARROW = torch.tensor([1.5, -2.0]).bfloat16()


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        (NARROW.float(), "anything", True),
        (NARROW.float() + 1, "anything", False),
        (NARROW.float() + 1, "master_param", True),
        (NARROW.clone(), "anything", False),
        (torch.ones(3), "master_param", False),
        (torch.ones(2, dtype=torch.int64), "master_param", False),
        (1.5, "master_param", False),
    ],
)
def test_a_master_copy_is_a_wider_copy_of_the_parameter(value, name, expected):
    assert is_master_copy(referenced(value), name, reference(NARROW)) is expected
