"""The three-way resume proof for optimizers in every form, and for several in one file; see `test_resume`.

torch itself writes each form, and loads the converted one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, load
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import vraxion_ckpt as vc
from vraxion_ckpt.errors import BindingError, TransformError, UsageError

RING, FEATURES, CLASSES = 24, 5, 4
Optimizers = dict[str, torch.optim.Optimizer]


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
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 6)
        self.register_buffer("router_map", torch.arange(RING) % experts)
        self.head = Head(experts)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor, addresses: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x)) * self.scale
        owners = self.router_map[addresses]
        return torch.stack([self.head.of(int(owner))(row) for row, owner in zip(hidden, owners, strict=True)])


def one(model: Net) -> Optimizers:
    return {"all": torch.optim.AdamW(model.named_parameters(), lr=0.01)}


def two(model: Net) -> Optimizers:
    """Make an optimizer of the head and the scale, with a group for weights and one for others, and one of the body."""
    head = [(n, p) for n, p in model.named_parameters() if not n.startswith("body.")]
    rest = [(n, p) for n, p in model.named_parameters() if n.startswith("body.")]
    groups = [
        {"params": [(n, p) for n, p in head if (p.ndim > 1) is w], "weight_decay": 0.1 * w} for w in (True, False)
    ]
    return {"head": torch.optim.AdamW(groups, lr=0.01), "rest": torch.optim.SGD(rest, lr=0.1, momentum=0.9)}


def two_without_names(model: Net) -> Optimizers:
    made = two(model)
    for optimizer in made.values():
        for group in optimizer.param_groups:
            group.pop("param_names", None)
    return made


def train(model: Net, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(48, FEATURES, generator=generator)
        addresses = torch.arange(48) % RING
        labels = torch.randint(0, CLASSES, (48,), generator=generator)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, addresses), labels).backward()
        for optimizer in optimizers.values():
            optimizer.step()


# --- forms: how a state dict is written, and loaded ---


def write_nested(model: Net, optimizer: torch.optim.Optimizer) -> dict:
    return copy.deepcopy(get_optimizer_state_dict(model, optimizer))


def write_flattened(model: Net, optimizer: torch.optim.Optimizer) -> dict:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))


def read_flattened(model: Net, optimizer: torch.optim.Optimizer, saved: dict) -> None:
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(flatten_optimizer_state_dict=True))


FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "numbered": (lambda _, optimizer: optimizer.state_dict(), lambda _, optimizer, s: optimizer.load_state_dict(s)),
    "nested": (write_nested, set_optimizer_state_dict),
    "flattened": (write_flattened, read_flattened),
}

# --- layouts: where the state dicts of several optimizers are ---

LAYOUTS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "one": (one, lambda s: {"optim_state": s["all"]}, lambda p: {"all": p["optim_state"]}),
    "list": (
        two,
        lambda s: {"optimizer_states": [s["head"], s["rest"]]},
        lambda p: dict(zip(("head", "rest"), p["optimizer_states"], strict=True)),
    ),
    "dict": (two, lambda s: {"training": {"epoch": 1, "optimizers": s}}, lambda p: p["training"]["optimizers"]),
    "keys": (
        two,
        lambda s: {"optim": s["rest"], "optim_head": s["head"]},
        lambda p: {"head": p["optim_head"], "rest": p["optim"]},
    ),
}

CHAINS: dict[str, tuple[int, int, list[Any], dict[int, int]]] = {
    "1 to 2": (1, 2, ["single_to_experts", "mitosis_split:parent=0,addresses=[0-11],noise=0"], {1: 0}),
    "2 to 3": (2, 3, ["mitosis_split:parent=1,addresses=[1,3,5],noise=0"], {2: 1}),
    "3 to 2": (3, 2, ["prune_merge:merge_from=0,merge_into=2,renumber=true"], {0: 1, 1: 2}),
    "11 to 12": (11, 12, ["mitosis_split:parent=2,addresses=[2],noise=0"], {11: 2}),
}


def ancestor_of(name: str, experts: int, ancestors: dict[int, int]) -> str:
    if not name.startswith("head.experts."):
        return name
    _, _, number, leaf = name.split(".")
    old = ancestors.get(int(number), int(number))
    return f"head.single.{leaf}" if experts == 1 else f"head.experts.{old}.{leaf}"


def saved(path: Path, layout: str, form: str, experts: int) -> tuple[Net, Optimizers]:
    make, place, _ = LAYOUTS[layout]
    torch.manual_seed(3)
    model = Net(experts)
    optimizers = make(model)
    train(model, optimizers, range(4))
    states = {name: FORMS[form][0](model, optimizer) for name, optimizer in optimizers.items()}
    torch.save({"model": model.state_dict(), "step": 4, **place(states), "note": "x"}, path)
    return model, optimizers


def changed_in_memory(
    model: Net, optimizers: Optimizers, make: Callable[[Net], Optimizers], after: int, ancestors: dict[int, int]
) -> tuple[Net, Optimizers]:
    """Do the surgery on live objects; uses nothing of the package."""
    experts = 1 if hasattr(model.head, "single") else len(model.head.experts)
    changed = Net(after)
    old_state, old_params = model.state_dict(), dict(model.named_parameters())
    changed.load_state_dict({n: old_state[ancestor_of(n, experts, ancestors)].clone() for n in changed.state_dict()})
    new = make(changed)
    for name, parameter in changed.named_parameters():
        old = old_params[ancestor_of(name, experts, ancestors)]
        for key, optimizer in optimizers.items():
            if old in optimizer.state:
                new[key].state[parameter] = copy.deepcopy(optimizer.state[old])
    return changed, new


def payload_at(path: Path) -> dict:
    """Return the payload of a file or directory, with the whole model."""
    if path.suffix == ".safetensors":
        vc.convert(path, path.with_suffix(".again.pt"))
        path = path.with_suffix(".again.pt")
    payload = load(path / "system" / "router.state" if path.is_dir() else path)
    model = dict(payload["model"])
    for shard in sorted((path / "experts").glob("*.pt")) if path.is_dir() else ():
        number = int(shard.stem.split("_")[1])
        model |= {f"head.experts.{number}.{leaf}": tensor for leaf, tensor in load(shard).items()}
    return {**payload, "model": model}


def slots_of(model: Net, optimizers: Optimizers) -> dict[str, dict]:
    return {
        f"{key} {name}": dict(optimizer.state[parameter])
        for key, optimizer in optimizers.items()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


@pytest.mark.one_in(6)
@pytest.mark.parametrize("target", ["out.pt", "out/", "out.safetensors"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_training_goes_on_as_if_the_surgery_had_happened_in_memory(form, layout, chain, target, tmp_path):
    experts, after, steps, ancestors = CHAINS[chain]
    make, _, pick = LAYOUTS[layout]
    model, optimizers = saved(tmp_path / "saved.pt", layout, form, experts)
    vc.convert(tmp_path / "saved.pt", f"{tmp_path}/{target}", transforms=steps)

    payload = payload_at(tmp_path / target)
    resumed = Net(after)
    resumed.load_state_dict(payload["model"], strict=True)
    resumed_optimizers = make(resumed)
    for name, state in pick(payload).items():
        FORMS[form][1](resumed, resumed_optimizers[name], state)
    cold = copy.deepcopy(resumed)
    cold_optimizers = make(cold)
    live, live_optimizers = changed_in_memory(model, optimizers, make, after, ancestors)
    live.router_map.copy_(resumed.router_map)

    assert_same(slots_of(resumed, resumed_optimizers), slots_of(live, live_optimizers))
    for net, them in ((live, live_optimizers), (resumed, resumed_optimizers), (cold, cold_optimizers)):
        train(net, them, range(4, 6))
    assert_same(dict(resumed.state_dict()), dict(live.state_dict()))
    assert_same(slots_of(resumed, resumed_optimizers), slots_of(live, live_optimizers))
    assert not torch.equal(cold.body.weight, live.body.weight)
    for name, optimizer in resumed_optimizers.items():
        listed = [group["param_names"] for group in optimizer.param_groups]
        assert listed == [group["param_names"] for group in live_optimizers[name].param_groups]


@pytest.mark.parametrize(
    ("through", "to"), [("on.pt", None), ("on/", None), ("shards/", "safetensors:max_shard_size=2KB")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_conversion_there_and_back_changes_nothing(form, layout, through, to, tmp_path):
    saved(tmp_path / "saved.pt", layout, form, 3)
    vc.convert(tmp_path / "saved.pt", f"{tmp_path}/{through}", to=to)
    vc.convert(tmp_path / through, tmp_path / "back.pt")
    before, after = load(tmp_path / "saved.pt"), load(tmp_path / "back.pt")
    assert_same({key: after[key] for key in before}, before)
    pick = LAYOUTS[layout][2]
    for name, state in pick(before).items():
        assert list(pick(after)[name]) == list(state)


def test_the_entries_keep_an_unusual_order(tmp_path):
    saved(tmp_path / "saved.pt", "one", "flattened", 3)
    payload = load(tmp_path / "saved.pt")
    payload["optim_state"] = dict(sorted(payload["optim_state"].items(), reverse=True))
    torch.save(payload, tmp_path / "saved.pt")
    vc.convert(tmp_path / "saved.pt", tmp_path / "on.safetensors")
    vc.convert(tmp_path / "on.safetensors", tmp_path / "back.pt")
    assert list(load(tmp_path / "back.pt")["optim_state"]) == list(payload["optim_state"])


def test_of_a_list_only_one_has_names_and_the_order_of_the_other_is_stated(tmp_path):
    model, optimizers = saved(tmp_path / "saved.pt", "list", "numbered", 2)
    payload = load(tmp_path / "saved.pt")
    for group in payload["optimizer_states"][0]["param_groups"]:
        del group["param_names"]
    torch.save(payload, tmp_path / "saved.pt")
    chain = CHAINS["2 to 3"][2]
    with pytest.raises(BindingError, match="not known for certain"):
        vc.convert(tmp_path / "saved.pt", tmp_path / "no.pt", transforms=chain)
    names = [n for w in (True, False) for n, p in model.named_parameters() if n[0] != "b" and (p.ndim > 1) is w]
    for number, options in enumerate([{"optimizer_order": "model"}, {"param_names": names}]):
        vc.convert(tmp_path / "saved.pt", tmp_path / f"{number}.pt", transforms=chain, **options)
        found = load(tmp_path / f"{number}.pt")["optimizer_states"]
        assert found[1]["param_groups"][0]["param_names"] == ["body.weight", "body.bias"]
        grown = Net(3)
        again = two(grown)["head"]
        again.load_state_dict(found[0])
        for i, old in enumerate([0, 1, 1]):
            expected = optimizers["head"].state[model.head.experts[old].weight]
            assert_same(dict(again.state[grown.head.experts[i].weight]), dict(expected))


def test_a_parameter_in_two_optimizers_is_refused(tmp_path):
    saved(tmp_path / "saved.pt", "list", "nested", 2)
    payload = load(tmp_path / "saved.pt")
    payload["another"] = copy.deepcopy(payload["optimizer_states"][1])
    torch.save(payload, tmp_path / "saved.pt")
    with pytest.raises(BindingError, match=r"optimizer_states\.1 and another") as refusal:
        vc.convert(tmp_path / "saved.pt", tmp_path / "no.pt")
    assert refusal.value.key == "body.weight"
    assert "--drop-key" in refusal.value.hint
    assert not vc.inspect(tmp_path / "saved.pt").optimizer.bound
    vc.convert(tmp_path / "saved.pt", tmp_path / "out.pt", transforms=CHAINS["2 to 3"][2], optimizer="drop")
    dropped = load(tmp_path / "out.pt")
    assert dropped["optimizer_states"] == [None, None]
    assert dropped["another"] is None


def test_two_optimizers_without_names_for_the_same_parameters_are_refused(tmp_path):
    model = Net(2)
    state = torch.optim.Adam(model.parameters()).state_dict()
    torch.save({"model": model.state_dict(), "optim": state, "backup": state}, tmp_path / "saved.pt")
    with pytest.raises(BindingError, match="optimizer, backup have 14 parameters"):
        vc.convert(tmp_path / "saved.pt", tmp_path / "no.pt")


@pytest.mark.parametrize("form", ["nested", "flattened"])
def test_a_clone_without_state_is_refused_where_torch_could_not_load_it(form, tmp_path):
    saved(tmp_path / "saved.pt", "one", form, 2)
    chain = ["mitosis_split:parent=1,addresses=[1],noise=0,optimizer=reset"]
    with pytest.raises(TransformError, match="would have no optimizer state") as refusal:
        vc.convert(tmp_path / "saved.pt", tmp_path / "no.pt", transforms=chain)
    assert refusal.value.key == "head.experts.2.weight"


def test_wrapped_names_stay_wrapped(tmp_path):
    saved(tmp_path / "saved.pt", "one", "nested", 2)
    payload = load(tmp_path / "saved.pt")
    state = payload["optim_state"]
    (group,) = state["param_groups"]
    state["state"] = {f"module.{name}": slots for name, slots in state["state"].items()}
    group["params"] = [f"module.{name}" for name in group["params"]]
    group["param_names"] = [f"module._orig_mod.{name}" for name in group["param_names"]]
    torch.save(payload, tmp_path / "saved.pt")
    vc.convert(tmp_path / "saved.pt", tmp_path / "out.safetensors", transforms=CHAINS["2 to 3"][2])
    vc.convert(tmp_path / "out.safetensors", tmp_path / "out.pt")
    grown = load(tmp_path / "out.pt")["optim_state"]
    names = [name for name, _ in Net(3).named_parameters()]
    assert set(grown["state"]) == {f"module.{name}" for name in names}
    assert grown["param_groups"][0]["params"] == [f"module.{name}" for name in names]
    assert grown["param_groups"][0]["param_names"] == [f"module._orig_mod.{name}" for name in names]


def test_master_copies_beside_each_of_several_optimizers_follow(tmp_path):
    model, _ = saved(tmp_path / "saved.pt", "dict", "numbered", 2)
    payload = load(tmp_path / "saved.pt")
    named = dict(model.named_parameters())
    for state in payload["training"]["optimizers"].values():
        state["masters"] = [[named[n].detach() * 2 for n in group["param_names"]] for group in state["param_groups"]]
    torch.save(payload, tmp_path / "saved.pt")
    vc.convert(tmp_path / "saved.pt", f"{tmp_path}/out/", transforms=CHAINS["2 to 3"][2])
    found = payload_at(tmp_path / "out")["training"]["optimizers"]
    for state in found.values():
        names = [[ancestor_of(n, 2, {2: 1}) for n in group["param_names"]] for group in state["param_groups"]]
        assert_same(state["masters"], [[named[n].detach() * 2 for n in own] for own in names])
    with pytest.warns(vc.CkptWarning, match="dropped, as requested"):
        vc.convert(tmp_path / "saved.pt", tmp_path / "d.pt", transforms=CHAINS["2 to 3"][2], companions="drop")
    assert "masters" not in load(tmp_path / "d.pt")["training"]["optimizers"]["head"]


def test_a_list_that_fits_one_of_several_optimizers_is_not_left_as_it_is(tmp_path):
    model, _ = saved(tmp_path / "saved.pt", "list", "nested", 2)
    payload = load(tmp_path / "saved.pt")
    payload["shadow"] = [
        p.detach() for n, p in model.named_parameters() if n in payload["optimizer_states"][0]["state"]
    ]
    torch.save(payload, tmp_path / "saved.pt")
    with pytest.raises(TransformError) as refusal:
        vc.convert(tmp_path / "saved.pt", tmp_path / "no.pt", transforms=CHAINS["2 to 3"][2])
    assert refusal.value.key == "shadow"


def test_head_groups_of_one_parameter_each_are_refused_as_unclear(tmp_path):
    model = Net(1)
    groups = [{"params": [pair]} for pair in model.named_parameters() if pair[0].startswith("head.")]
    state = torch.optim.SGD(groups, lr=0.1).state_dict()
    torch.save({"model": model.state_dict(), "optim": state}, tmp_path / "saved.pt")
    with pytest.raises(TransformError, match="get groups of their own"):
        vc.convert(tmp_path / "saved.pt", tmp_path / "no.pt", transforms=CHAINS["1 to 2"][2])


def each(model: Net, part: str) -> torch.optim.Optimizer:
    """Make an optimizer with a group for each parameter."""
    named = [(n, p) for n, p in model.named_parameters() if n.startswith("body.") == (part == "body")]
    return torch.optim.SGD([{"params": [pair], "lr": 0.1 + i / 10} for i, pair in enumerate(named)], momentum=0.9)


def test_the_schedule_of_each_optimizer_gets_entries_for_its_new_groups(tmp_path):
    model = Net(2)
    optimizers = [each(model, part) for part in ("head", "body")]
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 10) for optimizer in optimizers]
    payload = {
        "model": model.state_dict(),
        "optimizer_states": [optimizer.state_dict() for optimizer in optimizers],
        "lr_schedulers": [schedule.state_dict() for schedule in schedules][::-1],
    }
    torch.save(payload, tmp_path / "saved.pt")
    vc.convert(tmp_path / "saved.pt", tmp_path / "out.pt", transforms=CHAINS["2 to 3"][2])
    found = load(tmp_path / "out.pt")
    grown = each(Net(3), "head")
    grown.load_state_dict(found["optimizer_states"][0])
    old = payload["lr_schedulers"][1]["base_lrs"]
    assert found["lr_schedulers"][1]["base_lrs"] == [*old, *old[3:]]
    assert [group["initial_lr"] for group in grown.param_groups] == found["lr_schedulers"][1]["base_lrs"]
    assert_same(found["lr_schedulers"][0], payload["lr_schedulers"][0])


def test_result_order_is_for_optimizers_that_are_loaded_by_position(tmp_path):
    saved(tmp_path / "saved.pt", "one", "nested", 2)
    with pytest.raises(UsageError, match="loaded by name"):
        vc.convert(
            tmp_path / "saved.pt", tmp_path / "no.pt", transforms=CHAINS["2 to 3"][2], result_order=["body.weight"]
        )


def test_inspect_lists_every_optimizer_with_its_place_and_form(tmp_path):
    saved(tmp_path / "saved.pt", "keys", "flattened", 2)
    facts = vc.inspect(tmp_path / "saved.pt").optimizer
    assert [(part.place, part.form, part.parameters) for part in facts.parts] == [
        ((), "flattened", 2),
        (("optim_head",), "flattened", 5),
    ]


def test_an_edit_and_a_diff_see_every_optimizer(tmp_path):
    saved(tmp_path / "saved.pt", "list", "nested", 2)
    vc.convert(tmp_path / "saved.pt", f"{tmp_path}/run/")
    vc.edit(tmp_path / "run/", transforms=CHAINS["2 to 3"][2])
    found = vc.diff(tmp_path / "saved.pt", tmp_path / "run")
    assert not [change for change in found.optimizer if change.what in ("changed", "removed")]
    assert vc.check(tmp_path / "run").sound


@pytest.mark.parametrize("missing", ["state", "param_groups"])
def test_half_an_optimizer_is_not_left_behind_when_the_head_changes(missing, tmp_path):
    saved(tmp_path / "saved.pt", "one", "nested", 2)
    payload = load(tmp_path / "saved.pt")
    del payload["optim_state"][missing]
    torch.save(payload, tmp_path / "saved.pt")
    vc.convert(tmp_path / "saved.pt", tmp_path / "as_it_is.pt")
    with pytest.raises(TransformError, match="in no known form") as refusal:
        vc.convert(tmp_path / "saved.pt", tmp_path / "no.pt", transforms=CHAINS["2 to 3"][2])
    assert refusal.value.key == "optim_state"
    assert "--companions" in refusal.value.hint


def test_names_that_fit_several_parts_of_the_model_are_not_given_to_one_of_them(tmp_path):
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3), "head": Head(2)})
    for part, is_clear in (("two", False), ("head", True)):
        optimizer = torch.optim.Adam(model[part].named_parameters())
        torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "saved.pt")
        if is_clear:
            assert vc.open(tmp_path / "saved.pt").optimizer.params[0] == "head.experts.0.weight"
            continue
        with pytest.raises(BindingError, match="has no such parameter"):
            vc.convert(tmp_path / "saved.pt", tmp_path / "no.pt")


@pytest.mark.parametrize("empty", [[], [None], {"gen": None}])
def test_a_container_without_optimizers_is_carried(empty, tmp_path):
    torch.save({"model": Net(2).state_dict(), "optimizer": empty}, tmp_path / "saved.pt")
    vc.convert(tmp_path / "saved.pt", tmp_path / "out.pt", transforms=CHAINS["2 to 3"][2])
    assert load(tmp_path / "out.pt")["optimizer"] == empty


@pytest.mark.parametrize("through", ["saved.pt", "on.safetensors"])
def test_one_of_several_optimizers_can_be_left_out(through, tmp_path):
    saved(tmp_path / "saved.pt", "keys", "numbered", 2)
    if through != "saved.pt":
        vc.convert(tmp_path / "saved.pt", tmp_path / through)
    payload = load(tmp_path / "saved.pt")
    vc.convert(tmp_path / through, tmp_path / "out.pt", drop_keys=["optim_head"], losses="warn")
    found = load(tmp_path / "out.pt")
    assert "optim_head" not in found
    assert_same(found["optim"], payload["optim"])
    assert vc.open(tmp_path / "out.pt").optimizer.params == ["body.weight", "body.bias"]


def divided(model, how):
    """Return optimizers in which experts are divided by their ids, which names in the groups tell."""
    named = dict(model.named_parameters())
    of = {i: [(n, p) for n, p in named.items() if n.startswith(f"head.experts.{i}.")] for i in range(3)}
    body = [(n, p) for n, p in named.items() if not n.startswith("head.experts.")]
    if how == "an optimizer for each":
        return [torch.optim.Adam(of[i]) for i in range(3)]
    if how == "by parity":
        return [torch.optim.Adam([*body, *of[0], *of[2]]), torch.optim.Adam(of[1])]
    if how == "a group for the last":
        return [torch.optim.Adam([{"params": [*body, *of[0], *of[1]]}, {"params": of[2], "lr": 0.1}])]
    weights = [{"params": [of[i][0]]} for i in range(3)]
    return [torch.optim.Adam([{"params": body}, *weights, {"params": [of[i][1] for i in range(3)]}])]


@pytest.mark.parametrize("how", ["an optimizer for each", "by parity", "a group for the last", "weights for each"])
@pytest.mark.parametrize(
    "chain", ["mitosis_split:parent=1,addresses=[1],noise=0", "prune_merge:merge_from=0,merge_into=1,renumber=true"]
)
def test_experts_that_are_divided_by_their_ids_are_refused(tmp_path, how, chain):
    class Divided(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(4, 4)
            self.register_buffer("router_map", torch.arange(12) % 3)
            self.head = torch.nn.Module()
            self.head.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    model = Divided()
    optimizers = divided(model, how)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "same.pt")
    with pytest.raises(vc.CkptError, match="experts are divided over several optimizers or param groups"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[chain])
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[chain], optimizer="drop")
