"""The three-way resume proof for optimizers in every order, with names in every place.

A trainer orders its parameters by some rule; the file has their names in the param groups, in the payload, given by
the user, or nowhere. After a split or a merge, the checkpoint is loaded into an optimizer that the same rule builds.
Either every parameter has the state that surgery in memory gives it, and training goes on bit by bit the same, or the
chain was refused with exit code 9. All layers of the model are alike, so that shapes tell as little as possible.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import assert_same, load
from torch import nn

import vraxion_ckpt as vc
from vraxion_ckpt.errors import BindingError

WIDTH, RING = 4, 24
Named = list[tuple[str, nn.Parameter]]


class Head(nn.Module):
    def __init__(self, experts: int, layered: bool) -> None:
        super().__init__()
        if experts == 1:
            self.single = expert(layered)
        else:
            self.experts = nn.ModuleList(expert(layered) for _ in range(experts))

    def of(self, number: int) -> nn.Module:
        return self.single if hasattr(self, "single") else self.experts[number]


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(torch.tanh(self.down(x)))


def expert(layered: bool) -> nn.Module:
    return Layered() if layered else nn.Linear(WIDTH, WIDTH)


class Net(nn.Module):
    """A trunk, a head that is not last, and a tail, all of layers with the same shape."""

    def __init__(self, experts: int, layered: bool) -> None:
        super().__init__()
        self.register_buffer("router_map", torch.arange(RING) % experts)
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.core = nn.Linear(WIDTH, WIDTH)
        self.head = Head(experts, layered)
        self.tail = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, addresses: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.core(torch.tanh(self.trunk(x))))
        owners = self.router_map[addresses]
        rows = [self.head.of(int(owner))(row) for row, owner in zip(hidden, owners, strict=True)]
        return self.tail(torch.stack(rows))


def leaf_by_leaf(named: Named) -> Named:
    return sorted(named, key=lambda pair: pair[0].rpartition(".")[2], reverse=True)  # all weights, then all biases


def layer_by_layer(named: Named) -> Named:
    return sorted(named, key=lambda pair: (".down." in pair[0]) + 2 * (".up." in pair[0]))


def shuffled(named: Named) -> Named:
    return random.Random(5).sample(named, len(named))


ORDERS: dict[str, Callable[[Named], Named]] = {
    "model": list,
    "sorted": sorted,
    "reversed": lambda named: named[::-1],
    "head first": lambda named: sorted(named, key=lambda pair: not pair[0].startswith("head.")),
    "head last": lambda named: sorted(named, key=lambda pair: pair[0].startswith("head.")),
    "leaf by leaf": leaf_by_leaf,
    "layer by layer": layer_by_layer,
    "shuffled": shuffled,
}


def one_group(named: Named) -> list[Named]:
    return [named]


def decay_groups(named: Named) -> list[Named]:
    return [[p for p in named if p[1].ndim > 1], [p for p in named if p[1].ndim <= 1]]


def head_group(named: Named) -> list[Named]:
    return [[p for p in named if not p[0].startswith("head.")], [p for p in named if p[0].startswith("head.")]]


def group_each(named: Named) -> list[Named]:
    return [[pair] for pair in named]


GROUPINGS = {"one group": one_group, "decay": decay_groups, "head apart": head_group, "each alone": group_each}
PLACES = ["groups", "payload", "given", "none"]
COUNTS = {"1 to 2": (1, 2), "2 to 3": (2, 3), "11 to 12": (11, 12), "12 to 11": (12, 11)}


class Case:
    """One trainer: the rule by which it orders, its groups, and how many experts there are before and after."""

    def __init__(self, order: str, grouping: str, counts: tuple[int, int], layered: bool, named: bool) -> None:
        self.order, self.grouping, self.layered, self.named = ORDERS[order], GROUPINGS[grouping], layered, named
        self.before, self.after = counts

    def optimizer(self, model: Net) -> torch.optim.Optimizer:
        groups = self.grouping(self.order(list(model.named_parameters())))
        return torch.optim.AdamW(
            [
                {"params": g if self.named else [p for _, p in g], "weight_decay": 0.1 * (g[0][1].ndim > 1)}
                for g in groups
            ],
            lr=0.01,
        )

    def names(self, model: Net) -> list[str]:
        return [name for group in self.grouping(self.order(list(model.named_parameters()))) for name, _ in group]

    def shows_in_the_file(self, other: Case) -> bool:
        """Tell whether the files of two trainers differ, if the optimizers of the grown models do.

        One expert's layers stand in the same order whether a trainer goes expert by expert or layer by layer.
        """
        before, after = Net(self.before, self.layered), Net(self.after, self.layered)
        return self.names(before) != other.names(before) or self.names(after) == other.names(after)

    def trained(self) -> tuple[Net, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = Net(self.before, self.layered)
        optimizer = self.optimizer(model)
        train(model, optimizer, range(2))
        return model, optimizer

    def ancestor(self, name: str) -> str:
        """Return which of the old parameters a new one comes from; of 12 experts, the 4th is taken out."""
        if self.before == 1:
            return name.replace("head.experts.0.", "head.single.").replace("head.experts.1.", "head.single.")
        parts = name.split(".")
        if parts[:2] == ["head", "experts"]:
            number = int(parts[2])
            if self.after > self.before:
                parts[2] = str(1 if number == self.before else number)
            else:
                parts[2] = str(number + (number >= 3))
        return ".".join(parts)

    def chain(self) -> list:
        if self.before == 1:
            return ["single_to_experts", f"mitosis_split:parent=0,addresses=[0-{RING // 2}],noise=0"]
        if self.after > self.before:
            return ["mitosis_split:parent=1,addresses=[1],noise=0"]
        return ["prune_merge:merge_from=3,merge_into=0,renumber=true"]

    def changed_in_memory(self, model: Net, optimizer: torch.optim.Optimizer) -> tuple[Net, torch.optim.Optimizer]:
        """Do the surgery on live objects; uses nothing of the package."""
        changed = Net(self.after, self.layered)
        old = model.state_dict()
        state = {name: old[self.ancestor(name)].clone() for name in changed.state_dict()}
        router = state["router_map"]
        if self.before == 1:
            router[: RING // 2 + 1] = 1
        elif self.after > self.before:
            router[1] = self.before
        else:
            router[router == 3] = 0
            router[router > 3] -= 1
        changed.load_state_dict(state)
        new = self.optimizer(changed)
        params = dict(model.named_parameters())
        for name, parameter in changed.named_parameters():
            new.state[parameter] = copy.deepcopy(optimizer.state[params[self.ancestor(name)]])
        return changed, new


def train(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(RING, WIDTH, generator=generator)
        optimizer.zero_grad()
        model(x, torch.arange(RING)).square().mean().backward()
        optimizer.step()


def state_by_name(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def resumed(case: Case, path: Path) -> tuple[Net, torch.optim.Optimizer]:
    """Load a checkpoint as trainers do, into an optimizer that the same rule builds."""
    if path.suffix == ".safetensors":  # which no trainer reads; it is a stop on the way
        vc.convert(path, path.with_suffix(".again.pt"))
        path = path.with_suffix(".again.pt")
    payload = load(path / "system/router.state" if path.is_dir() else path)
    state = dict(payload["model"])
    for shard in sorted(path.glob("experts/expert_*.pt")):
        number = int(shard.stem.removeprefix("expert_"))
        state |= {f"head.experts.{number}.{leaf}": tensor for leaf, tensor in load(shard).items()}
    model = Net(case.after, case.layered)
    model.load_state_dict(state, strict=True)
    optimizer = case.optimizer(model)
    optimizer.load_state_dict(payload["optim"])
    return model, optimizer


def outcome(case: Case, place: str, vehicle: str, folder: Path) -> str:
    """Return whether the checkpoint resumes as surgery in memory does, or was refused; anything else fails."""
    folder.mkdir()
    model, optimizer = case.trained()
    payload = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 2}
    if place == "payload":
        payload["param_names"] = case.names(model)
    torch.save(payload, folder / "saved.pt")
    given = case.names(model) if place == "given" else None
    target = folder / {"pt": "out.pt", "modular": "out", "safetensors": "out.safetensors", "edit": "saved.pt"}[vehicle]
    try:
        if vehicle == "edit":
            vc.edit(target, transforms=case.chain(), param_names=given)
        else:
            vc.convert(
                folder / "saved.pt",
                f"{target}{'/' * (vehicle == 'modular')}",
                transforms=case.chain(),
                param_names=given,
            )
    except BindingError:
        return "refused"
    again, again_optimizer = resumed(case, target)
    live, live_optimizer = case.changed_in_memory(model, optimizer)
    assert_same(dict(again.state_dict()), dict(live.state_dict()))
    assert_same(state_by_name(again, again_optimizer), state_by_name(live, live_optimizer))
    for net, opt in ((live, live_optimizer), (again, again_optimizer)):
        train(net, opt, range(2, 4))
    assert_same(dict(again.state_dict()), dict(live.state_dict()))
    assert_same(state_by_name(again, again_optimizer), state_by_name(live, live_optimizer))
    return "right"


def table_row(order: str, grouping: str, counts: str, layered: bool, vehicles: list[str], folder: Path) -> str:
    """Try names in every place; return how many results were right, and how many refused."""
    found: Counter[str] = Counter()
    for place in PLACES:
        case = Case(order, grouping, COUNTS[counts], layered, named=place == "groups")
        if order != "model" and not case.shows_in_the_file(Case("model", grouping, COUNTS[counts], layered, False)):
            continue
        for vehicle in vehicles:
            result = outcome(case, place, vehicle, folder / f"{place}{vehicle}")
            found[result] += 1
            natural = order == "model" and place != "none"
            assert not (natural and result == "refused"), (place, vehicle)
    layers = "two layers" if layered else "one layer"
    kind = f"{order:14} {grouping:10} {counts:8} {layers:10}"
    return f"{kind} right {found['right']:2}, refused {found['refused']:2}, wrong 0"


def for_every_trainer(test: Callable) -> Callable:
    for name, values in (("counts", COUNTS), ("grouping", GROUPINGS), ("order", ORDERS)):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@pytest.mark.one_in(5)
@for_every_trainer
def test_every_order_with_names_in_every_place_is_resumed_rightly_or_refused(order, grouping, counts, tmp_path):
    assert table_row(order, grouping, counts, layered=False, vehicles=["pt"], folder=tmp_path)
