"""The three-way resume proof: training goes on after offline surgery as if it had happened in memory.

Train, save. Then (a) convert with a chain, load into a fresh model and optimizer, train on; (b) do the same surgery on
the live model and optimizer, train on: bit-identical. (c) With a cold optimizer it is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support import assert_same, load
from torch import nn

import vraxion_ckpt as vc
from vraxion_ckpt.errors import BindingError

RING, FEATURES, CLASSES = 12, 5, 4
MOVED = [1, 4, 9]


class Head(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        if experts == 1:
            self.single = nn.Linear(6, CLASSES)
        else:
            self.experts = nn.ModuleList(nn.Linear(6, CLASSES) for _ in range(experts))

    def of(self, expert: int) -> nn.Linear:
        return self.single if hasattr(self, "single") else self.experts[expert]


class Net(nn.Module):
    """Like VRAXION's model: root parameters, float and integer buffers, an unused layer, and a head, last or not."""

    def __init__(self, experts: int, head_last: bool) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(7))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("router_map", torch.arange(RING) % experts)
        self.register_buffer("bin_edges", torch.linspace(0, 1, 9))
        self.body = nn.Linear(FEATURES, 6)
        self.never_used = nn.Linear(2, 6, bias=False)  # never gets a gradient, so the optimizer never has state for it
        if head_last:
            self.tail = nn.Linear(6, 6)
        self.head = Head(experts)
        if not head_last:
            self.tail = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, addresses: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.tail(torch.tanh(self.body(x)))) * self.scale + self.theta.mean()
        owners = self.router_map[addresses]
        return torch.stack([self.head.of(int(owner))(row) for row, owner in zip(hidden, owners, strict=True)])


def adam(model: Net) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def adam_with_names(model: Net) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.named_parameters(), lr=0.01, amsgrad=True)


def adamw_decaying_weights_only(model: Net) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], 0.01)


def adamw_with_a_slower_head(model: Net) -> torch.optim.Optimizer:
    head = list(model.head.parameters())
    body = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    return torch.optim.AdamW([{"params": body}, {"params": head, "lr": 0.001}], lr=0.01)


def sgd(model: Net) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


OPTIMIZERS = [adam, adam_with_names, adamw_decaying_weights_only, adamw_with_a_slower_head, sgd]
MakeOptimizer = Callable[[Net], torch.optim.Optimizer]


def train(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, FEATURES, generator=generator)
        addresses = torch.randint(0, RING, (16,), generator=generator)
        labels = torch.randint(0, CLASSES, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, addresses), labels).backward()
        optimizer.step()


def trained(experts: int, head_last: bool, make: MakeOptimizer) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Net(experts, head_last)
    optimizer = make(model)
    train(model, optimizer, range(4))
    return model, optimizer


def save(model: Net, optimizer: torch.optim.Optimizer, experts: int, path: Path, names: bool) -> None:
    payload = {"model": model.state_dict(), "optim": optimizer.state_dict(), "scaler": None, "step": 4, "losses": [1.0]}
    payload["num_experts"] = experts
    if names:
        payload["param_names"] = [name for name, _ in model.named_parameters()]
    torch.save(payload, path)


def grown_in_memory(
    model: Net, optimizer: torch.optim.Optimizer, parent: int, experts: int, head_last: bool, make: MakeOptimizer
) -> tuple[Net, torch.optim.Optimizer]:
    """Do the surgery on live objects; uses nothing of the package."""
    grown = Net(experts + 1, head_last)

    def ancestor(name: str) -> str:
        old = "head.single." if experts == 1 else f"head.experts.{parent}."
        name = name.replace(f"head.experts.{experts}.", old)
        return name.replace("head.experts.0.", "head.single.") if experts == 1 else name

    old_state = model.state_dict()
    state = {name: old_state[ancestor(name)].clone() for name in grown.state_dict()}
    state["router_map"][MOVED] = experts
    grown.load_state_dict(state)
    return grown, carried(model, optimizer, grown, ancestor, make)


def carried(
    model: Net, optimizer: torch.optim.Optimizer, changed: Net, ancestor: Callable[[str], str], make: MakeOptimizer
) -> torch.optim.Optimizer:
    """Make an optimizer of a changed model, whose parameters have the state of their ancestors in `model`."""
    new_optimizer = make(changed)
    old_params = dict(model.named_parameters())
    for name, parameter in changed.named_parameters():
        if old_params[ancestor(name)] in optimizer.state:
            new_optimizer.state[parameter] = copy.deepcopy(optimizer.state[old_params[ancestor(name)]])
    return new_optimizer


def resume(path: Path, experts: int, head_last: bool, make: MakeOptimizer) -> tuple[Net, torch.optim.Optimizer]:
    """Load a converted checkpoint as the trainers do."""
    model = Net(experts, head_last)
    if path.suffix == ".safetensors":  # which no trainer reads; it is a stop on the way
        vc.convert(path, path.with_suffix(".again.pt"))
        path = path.with_suffix(".again.pt")
    payload = load(path / "system" / "router.state" if path.is_dir() else path)
    state = dict(payload["model"])
    if path.is_dir() and experts > 1:
        for i in range(experts):
            shard = load(path / "experts" / f"expert_{i:03d}.pt")
            state |= {f"head.experts.{i}.{leaf}": tensor for leaf, tensor in shard.items()}
    model.load_state_dict(state, strict=True)
    optimizer = make(model)
    optimizer.load_state_dict(payload["optim"])
    return model, optimizer


def state_by_name(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("target", ["split.pt", "split/", "split.safetensors"])
@pytest.mark.parametrize("names", [True, False], ids=["names", "no_names"])
@pytest.mark.parametrize("head_last", [True, False], ids=["head_last", "head_first"])
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_training_goes_on_as_if_the_split_had_happened_in_memory(make, experts, head_last, names, target, tmp_path):
    model, optimizer = trained(experts, head_last, make)
    save(model, optimizer, experts, tmp_path / "saved.pt", names)
    live, live_optimizer = grown_in_memory(model, optimizer, 0, experts, head_last, make)
    moved = [a for a in MOVED if int(model.router_map[a]) == 0]
    live.router_map.copy_(model.router_map)
    live.router_map[moved] = experts

    chain = ["single_to_experts"] if experts == 1 else []
    split = ("mitosis_split", {"parent": 0, "addresses": moved, "noise": 0})
    order = None if names else "model"  # of an unknown trainer, without names, it must be said
    vc.convert(tmp_path / "saved.pt", f"{tmp_path}/{target}", transforms=[*chain, split], optimizer_order=order)
    resumed, resumed_optimizer = resume(tmp_path / target, experts + 1, head_last, make)
    cold = copy.deepcopy(resumed)
    cold_optimizer = make(cold)

    assert_same(state_by_name(resumed, resumed_optimizer), state_by_name(live, live_optimizer))
    for net, opt in ((live, live_optimizer), (resumed, resumed_optimizer), (cold, cold_optimizer)):
        train(net, opt, range(4, 7))
    assert_same(dict(resumed.state_dict()), dict(live.state_dict()))
    assert_same(state_by_name(resumed, resumed_optimizer), state_by_name(live, live_optimizer))
    child = f"head.experts.{experts}.weight"
    assert not torch.equal(cold.state_dict()[child], live.state_dict()[child])
    for one, other in pairwise([*range(experts + 1)]):
        slots = state_by_name(resumed, resumed_optimizer)
        for slot, value in slots[f"head.experts.{one}.weight"].items():
            assert value.data_ptr() != slots[f"head.experts.{other}.weight"][slot].data_ptr()


@pytest.mark.parametrize("target", ["split.pt", "split/"])
def test_reset_gives_the_child_no_state_and_leaves_the_rest(target, tmp_path):
    model, optimizer = trained(2, True, adam)
    save(model, optimizer, 2, tmp_path / "saved.pt", names=False)
    split = "mitosis_split:parent=0,addresses=[0,2,4,6,8],noise=0,optimizer=reset"
    vc.convert(tmp_path / "saved.pt", f"{tmp_path}/{target}", transforms=[split], optimizer_order="model")
    resumed, resumed_optimizer = resume(tmp_path / target, 3, True, adam)
    assert_same(state_by_name(resumed, resumed_optimizer), state_by_name(model, optimizer))
    train(resumed, resumed_optimizer, range(4, 5))
    assert resumed_optimizer.state[resumed.head.experts[2].weight]["step"] == 1


@pytest.mark.parametrize("target", ["out.pt", "out/"])
def test_single_to_experts_makes_clones_that_resume(target, tmp_path):
    model, optimizer = trained(1, False, adam)
    save(model, optimizer, 1, tmp_path / "saved.pt", names=False)
    chain = ["single_to_experts:experts=3,route=modulo"]
    done = vc.convert(tmp_path / "saved.pt", f"{tmp_path}/{target}", transforms=chain)
    assert str(done.function_preserved).startswith("yes")
    resumed, resumed_optimizer = resume(tmp_path / target, 3, False, adam)
    assert resumed.router_map.tolist() == [address % 3 for address in range(RING)]
    for i in range(3):
        old = optimizer.state[model.head.single.weight]
        assert_same(dict(resumed_optimizer.state[resumed.head.experts[i].weight]), dict(old))
    train(resumed, resumed_optimizer, range(4, 6))
    assert {int(slots["step"]) for slots in resumed_optimizer.state.values()} == {6}


# --- an optimizer that cannot be bound ---


@pytest.fixture
def ambiguous(tmp_path):
    """A checkpoint with a float buffer that looks just like the parameter beside it."""
    torch.manual_seed(0)
    model = nn.Module()
    model.before = nn.Parameter(torch.randn(4))
    model.register_buffer("running", torch.randn(4))
    model.register_buffer("router_map", torch.zeros(6, dtype=torch.int64))
    model.head = Head(1)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    path = tmp_path / "ambiguous.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}, path)
    return path, model, optimizer


CHAIN = ["single_to_experts", "mitosis_split:parent=0,addresses=[1,2],noise=0"]


def test_an_optimizer_that_cannot_be_bound_is_refused_with_the_three_ways_out(ambiguous, tmp_path):
    with pytest.raises(BindingError) as refusal:
        vc.convert(ambiguous[0], tmp_path / "out.pt", transforms=CHAIN)
    assert refusal.value.key == "head.single.bias"
    text = str(refusal.value)
    for way in ("--param-names", "--optimizer-order", "--optimizer drop"):
        assert way in text
    assert not (tmp_path / "out.pt").exists()


def assert_bound(path, model, optimizer):
    payload = load(path)
    names = ["before", *(f"head.experts.{i}.{leaf}" for i in range(2) for leaf in ("weight", "bias"))]
    wanted = [optimizer.state[p] for p in (model.before, *2 * [model.head.single.weight, model.head.single.bias])]
    assert vc.open(path).optimizer.params == names
    for i, slots in enumerate(wanted):
        assert_same(payload["optimizer"]["state"][i], dict(slots))


def test_first_way_out_names_from_the_user(ambiguous, tmp_path):
    path, model, optimizer = ambiguous
    names = ["before", "head.single.weight", "head.single.bias"]
    vc.convert(path, tmp_path / "out.pt", transforms=CHAIN, param_names=names)
    assert_bound(tmp_path / "out.pt", model, optimizer)


def test_second_way_out_leaving_the_optimizer_behind(ambiguous, tmp_path):
    done = vc.convert(ambiguous[0], tmp_path / "out.pt", transforms=CHAIN, optimizer="drop")
    assert done.optimizer.startswith("dropped, as asked")
    assert load(tmp_path / "out.pt")["optimizer"] is None


def test_third_way_out_saving_with_names(ambiguous, tmp_path):
    path, model, optimizer = ambiguous
    named = torch.optim.Adam(model.named_parameters())
    named.load_state_dict(optimizer.state_dict())
    torch.save({**load(path), "optimizer": named.state_dict()}, path)
    vc.convert(path, tmp_path / "out.pt", transforms=CHAIN)
    assert_bound(tmp_path / "out.pt", model, optimizer)
    assert load(tmp_path / "out.pt")["optimizer"]["param_groups"][0]["param_names"][1] == "head.experts.0.weight"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["before", "head.single.weight"], "2 in given names, 3 in the optimizer"),
        (["before", "head.single.bias", "head.single.weight"], "shape"),
        (["before", "before", "head.single.weight"], "twice"),
        (["nowhere", "head.single.weight", "head.single.bias"], "nowhere"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, reason, ambiguous, tmp_path):
    with pytest.raises(vc.CkptError, match=reason) as refusal:
        vc.convert(ambiguous[0], tmp_path / "out.pt", param_names=names)
    assert refusal.value.exit_code == 9
    assert not (tmp_path / "out.pt").exists()


def test_names_in_the_payload_are_not_taken_for_the_order_of_several_groups(tmp_path):
    """All layers are alike, so nothing but a guess could tell which layer is in which group."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    odd, even = [model[1].weight, model[3].weight], [model[0].weight, model[2].weight]
    optimizer = torch.optim.Adam([{"params": odd}, {"params": even}])
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i + 1))
    optimizer.step()
    payload = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    payload["param_names"] = [name for name, _ in model.named_parameters()]
    torch.save(payload, tmp_path / "groups.pt")
    assert vc.open(tmp_path / "groups.pt").optimizer.undecided == set(payload["param_names"])
    names = ["1.weight", "3.weight", "0.weight", "2.weight"]
    vc.convert(tmp_path / "groups.pt", tmp_path / "named.pt", param_names=names)
    bound = vc.open(tmp_path / "named.pt").optimizer
    for i in range(4):
        assert torch.equal(bound.state[f"{i}.weight"]["exp_avg"], optimizer.state[model[i].weight]["exp_avg"])
