"""What belongs to the model and stands elsewhere (averages, master copies, lists) follows the head, or is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from support import DATA, assert_same, load
from test_optimizer_order import Net, train
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vraxion_ckpt as vc
from vraxion_ckpt.errors import TransformError

SPLIT = ["single_to_experts", "mitosis_split:parent=0,addresses=[0-11],noise=0"]
NOISY = ["single_to_experts", "mitosis_split:parent=0,addresses=[0-11],noise=0.01"]
GROW = ["mitosis_split:parent=1,addresses=[1],noise=0"]
PRUNE = ["prune_merge:merge_from=0,merge_into=1,renumber=true"]


def trained(experts: int, make=lambda model: torch.optim.Adam(model.named_parameters())):
    torch.manual_seed(2)
    model = Net(experts, layered=False)
    optimizer = make(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
    return model, optimizer, average


def payload_of(model: nn.Module, optimizer: torch.optim.Optimizer, **more: object) -> dict:
    return {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 3, **more}


def converted(payload: dict, chain: list, tmp_path, target: str = "out.pt", **options: object) -> dict:
    torch.save(payload, tmp_path / "in.pt")
    vc.convert(tmp_path / "in.pt", f"{tmp_path}/{target}", transforms=chain, **options)
    if not target.endswith(".pt"):
        vc.convert(tmp_path / target, tmp_path / "again.pt")
        target = "again.pt"
    return load(tmp_path / target)


@pytest.mark.parametrize("target", ["out.pt", "out/", "out.safetensors"])
@pytest.mark.parametrize(("before", "chain", "parents"), [(1, SPLIT, [0, 0]), (2, GROW, [0, 1, 1]), (3, PRUNE, [1, 2])])
def test_an_averaged_model_is_loaded_by_torch_and_has_its_parents_values(before, chain, parents, target, tmp_path):
    model, optimizer, average = trained(before)
    result = converted(payload_of(model, optimizer, ema=average.state_dict()), chain, tmp_path, target)
    again = AveragedModel(Net(len(parents), layered=False))
    again.load_state_dict(result["ema"], strict=True)
    assert again.n_averaged == 3
    assert torch.equal(again.module.router_map, result["model"]["router_map"])
    for i, parent in enumerate(parents):
        assert_same(dict(again.module.head.of(i).state_dict()), dict(average.module.head.of(parent).state_dict()))
    assert_same(dict(again.module.trunk.state_dict()), dict(average.module.trunk.state_dict()))


def test_the_average_of_a_clone_with_noise_has_the_same_noise(tmp_path):
    model, optimizer, average = trained(1)
    result = converted(payload_of(model, optimizer, ema=average.state_dict()), NOISY, tmp_path)
    state, ema = result["model"], result["ema"]
    noise = state["head.experts.1.weight"] - state["head.experts.0.weight"]
    assert noise.abs().max() > 0.001
    expected = ema["module.head.experts.0.weight"] + noise
    torch.testing.assert_close(ema["module.head.experts.1.weight"], expected, rtol=0, atol=1e-7)


def test_an_average_inside_the_model_follows_it(tmp_path):
    class Whole(Net):
        def __init__(self, experts: int) -> None:
            super().__init__(experts, layered=False)
            self.ema = copy.deepcopy(Net(experts, layered=False)).requires_grad_(False)

    torch.manual_seed(0)
    model = Whole(1)
    optimizer = torch.optim.Adam([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    train(model, optimizer, range(2))
    result = converted(payload_of(model, optimizer), SPLIT, tmp_path)
    grown = Whole(2)
    grown.load_state_dict(result["model"], strict=True)
    assert list(grown.state_dict()) == list(result["model"])
    for i in range(2):
        assert_same(dict(grown.ema.head.of(i).state_dict()), dict(model.ema.head.single.state_dict()))
    assert torch.equal(grown.ema.router_map, grown.router_map) == torch.equal(model.ema.router_map, model.router_map)


def shadow(model: nn.Module) -> dict:
    """Return what torch-ema keeps: a list in the order of parameters()."""
    return {"decay": 0.9, "shadow_params": [p.detach() * 2 for p in model.parameters()]}


def test_a_list_with_an_entry_for_each_parameter_follows_the_models_order(tmp_path):
    model, optimizer, _ = trained(1)
    with pytest.warns(vc.CkptWarning, match="ema.shadow_params: assumed to have one tensor for each parameter"):
        result = converted(payload_of(model, optimizer, ema=shadow(model)), SPLIT, tmp_path)
    grown = Net(2, layered=False)
    old = {name: p.detach() * 2 for name, p in model.named_parameters()}
    names = [n.replace("experts.0", "single").replace("experts.1", "single") for n, _ in grown.named_parameters()]
    assert_same(result["ema"]["shadow_params"], [old[name] for name in names])


def by_name(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(sorted(model.named_parameters()))


def flattened(model: nn.Module) -> dict:
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(1))
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))


def another_part(model: nn.Module) -> dict:
    return {**model.state_dict(), "head.single.scale": torch.ones(1)}


# What stands in the payload, the key that is named, and how the optimizer is built.
UNKNOWN = {
    "a list where the optimizer's order is not the model's": ("ema", shadow, by_name),
    "an optimizer keyed by names, and more": ("optim_state", lambda model: {**flattened(model), "epoch": 1}, None),
    "groups of another optimizer": (
        "second",
        lambda _: {"param_groups": [{"params": [0, 1]}]},
        None,
    ),
    "a list of names": ("frozen", lambda _: ["head.single.weight"], None),
    "an average of another head": ("ema", lambda _: Net(2, layered=False).state_dict(), None),
    "an average with an unknown part": ("ema", another_part, None),
}


def in_groups(model: nn.Module) -> list:
    named = list(model.named_parameters())
    return [[p.detach() for _, p in named if p.ndim > 1], [p.detach() for _, p in named if p.ndim < 2]]


def nested(model: nn.Module) -> dict:
    return {"head": {"single": dict(model.head.single.state_dict())}}


UNKNOWN |= {
    "a list with the buffers": ("ema", lambda model: [t.clone() for t in model.state_dict().values()], None),
    "a dict by number": ("ema", lambda model: {i: p.detach() for i, p in enumerate(model.parameters())}, by_name),
    "a list of the head's": ("ema", lambda model: [p.detach() for p in model.head.parameters()], None),
    "pairs": ("ema", lambda model: [(name, p.detach()) for name, p in model.named_parameters()], None),
    "one vector": ("flat", lambda model: torch.cat([p.detach().reshape(-1) for p in model.parameters()]), None),
    "names below the head": ("ema", lambda model: dict(model.head.state_dict()), None),
    "nested names": ("ema", nested, None),
    "names without dots": ("ema", lambda m: {n.replace(".", ""): t for n, t in m.state_dict().items()}, None),
    "lists in groups in the payload": ("masters", in_groups, None),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_companion_that_cannot_be_updated_is_refused_unless_the_user_decides(kind, tmp_path):
    key, extra, make = UNKNOWN[kind]
    model, optimizer, _ = trained(1, make) if make else trained(1)
    top = key.split(".")[0]
    payload = payload_of(model, optimizer, **{top: extra(model)})
    with pytest.raises(TransformError) as refusal:
        converted(payload, SPLIT, tmp_path)
    assert refusal.value.key.split(" ")[0] == key
    assert "--companions" in refusal.value.hint
    assert not (tmp_path / "out.pt").exists()
    with pytest.warns(vc.CkptWarning, match="kept unchanged"):
        kept = converted(payload, SPLIT, tmp_path, "kept.pt", companions="keep")
    assert_same(kept[top], payload[top])
    with pytest.warns(vc.CkptWarning, match="dropped"):
        assert top not in converted(payload, SPLIT, tmp_path, "dropped.pt", companions="drop")
    unchanged = converted(payload, [], tmp_path, "same.pt")
    assert_same(unchanged[top], payload[top])


def test_master_copies_beside_the_optimizers_state_are_ordered_as_it_is(tmp_path):
    model, optimizer, _ = trained(2, by_name)
    saved = {
        **optimizer.state_dict(),
        "fp32_master": [p.detach().double() for _, p in sorted(model.named_parameters())],
    }
    result = converted({**payload_of(model, optimizer), "optim": saved}, GROW, tmp_path)
    wanted = sorted(n for n, _ in Net(3, layered=False).named_parameters())
    assert result["optim"]["param_groups"][0]["param_names"] == wanted
    for name, master in zip(wanted, result["optim"]["fp32_master"], strict=True):
        assert torch.equal(master.float(), result["model"][name])


def test_a_master_param_of_a_noisy_clone_gets_the_clones_value(tmp_path):
    weights = {name: torch.randn(64, 4).bfloat16() for name in ("trunk.weight", "core.weight", "head.single.weight")}
    state = {"router_map": torch.zeros(8, dtype=torch.int64), **weights}
    slots = {i: {"master_param": weight.float()} for i, weight in enumerate(weights.values())}
    groups = [{"lr": 0.1, "params": [0, 1, 2], "param_names": list(weights)}]
    payload = {"model": state, "optim": {"state": slots, "param_groups": groups}}
    chain = ["single_to_experts", "mitosis_split:parent=0,addresses=[1],noise=0.5"]
    result = converted(payload, chain, tmp_path)
    assert not torch.equal(result["model"]["head.experts.1.weight"], state["head.single.weight"])
    for i, name in enumerate(result["optim"]["param_groups"][0]["param_names"]):
        assert torch.equal(result["optim"]["state"][i]["master_param"], result["model"][name].float())


def test_values_by_name_that_are_no_tensors_follow_too(tmp_path):
    model, optimizer, _ = trained(1)
    scales = {"trunk.weight": 1.0, "head.single.weight": 0.5, "head.single.bias": {"lr": 2}}
    result = converted(payload_of(model, optimizer, scales=scales), SPLIT, tmp_path)
    assert result["scales"] == {
        "trunk.weight": 1.0,
        **{f"head.experts.{i}.weight": 0.5 for i in range(2)},
        **{f"head.experts.{i}.bias": {"lr": 2} for i in range(2)},
    }


def test_a_chain_that_only_moves_addresses_moves_them_in_the_average_too(tmp_path):
    model, optimizer, average = trained(2)
    state = average.state_dict()
    payload = payload_of(model, optimizer, ema=state)
    chain = ["prune_merge:merge_into=0", "experts_to_single"]
    result = converted(payload, chain, tmp_path)
    assert result["ema"]["module.router_map"].tolist() == [0] * len(model.router_map)


def test_an_average_that_has_not_followed_is_a_finding(tmp_path):
    model, optimizer, _ = trained(2)
    _, _, old = trained(1)
    torch.save(payload_of(model, optimizer, ema=old.state_dict()), tmp_path / "stale.pt")
    torch.save(payload_of(model, optimizer, ema=trained(2)[2].state_dict()), tmp_path / "fine.pt")
    findings = [each for each in vc.check(tmp_path / "stale.pt").findings if each.rule == "companion"]
    assert [each.where for each in findings] == ["ema (module.*)"]
    assert not [each for each in vc.check(tmp_path / "fine.pt").findings if each.rule == "companion"]


@pytest.mark.parametrize(
    "spell", [lambda n: "ema." + n.replace(".", ""), lambda n: "ema_" + n, lambda n: n.replace(".", "_")]
)
def test_a_copy_inside_the_model_with_other_punctuation_is_refused(spell, tmp_path):
    model, optimizer, _ = trained(1)
    copies = {spell(name): tensor.clone() for name, tensor in model.state_dict().items() if "head" in name}
    payload = payload_of(model, optimizer)
    payload["model"] = {**model.state_dict(), **copies}
    with pytest.raises(TransformError) as refusal:
        converted(payload, SPLIT, tmp_path)
    assert refusal.value.key.startswith("model")
    with pytest.warns(vc.CkptWarning, match="dropped"):
        result = converted(payload, SPLIT, tmp_path, companions="drop")
    assert list(result["model"]) == list(Net(2, layered=False).state_dict())


def decayed(model: nn.Module) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    groups = [[p for p in named if p[1].ndim > 1], [p for p in named if p[1].ndim < 2]]
    return torch.optim.AdamW([{"params": group} for group in groups])


def test_master_copies_in_a_list_for_each_group_follow(tmp_path):
    model, optimizer, _ = trained(2, decayed)
    saved = {**optimizer.state_dict(), "fp32_from_fp16": in_groups(model)}
    result = converted({**payload_of(model, optimizer), "optim": saved}, GROW, tmp_path)
    for group, masters in zip(result["optim"]["param_groups"], result["optim"]["fp32_from_fp16"], strict=True):
        for name, master in zip(group["param_names"], masters, strict=True):
            assert torch.equal(master, result["model"][name])


class Plain(nn.Module):
    """A body without biases, and a head whose layers have any leaves."""

    def __init__(self, experts: int, make) -> None:
        super().__init__()
        self.register_buffer("router_map", torch.arange(24) % experts)
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.head = nn.Module()
        if experts == 1:
            self.head.single = make()
        else:
            self.head.experts = nn.ModuleList(make() for _ in range(experts))


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def test_a_list_in_the_models_order_stays_in_it_whatever_the_optimizers_order(tmp_path):
    """Ten experts without biases: sorted by name, the eleventh comes second."""

    def make() -> nn.Module:
        return nn.Linear(4, 4, bias=False)

    model = Plain(10, make)
    optimizer = stepped(torch.optim.Adam(sorted(model.named_parameters())))
    payload = payload_of(model, optimizer, ema=[p.detach() * 2 for p in model.parameters()])
    with pytest.raises(TransformError) as refusal:
        converted(payload, GROW, tmp_path, optimizer_order="sorted")
    assert refusal.value.key == "ema"


def test_schedulers_get_an_entry_for_each_new_group(tmp_path):
    def each_alone(model: nn.Module) -> torch.optim.Optimizer:
        named = enumerate(model.named_parameters())
        return torch.optim.Adam([{"params": [pair], "lr": 0.1 * (i + 1)} for i, pair in named])

    model, optimizer, _ = trained(1, each_alone)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    result = converted(payload_of(model, optimizer, scheduler=scheduler.state_dict()), SPLIT, tmp_path)
    new = each_alone(Net(2, layered=False))
    new.load_state_dict(result["optim"])
    again = torch.optim.lr_scheduler.StepLR(new, 2)
    again.load_state_dict(result["scheduler"])
    again.step()
    rates = {g["param_names"][0]: rate for g, rate in zip(new.param_groups, again.base_lrs, strict=True)}
    assert rates["head.experts.0.weight"] == rates["head.experts.1.weight"]
    assert rates["tail.bias"] == scheduler.base_lrs[-1]


def test_a_model_of_another_shape_is_no_average(tmp_path):
    state = torch.load(DATA / "named_experts3.pt")["model"]
    body = next(name for name, value in state.items() if value.ndim == 2 and not name.startswith("head."))
    other = {**state, body: torch.cat([state[body], state[body]])}
    torch.save({"model": state, "disc": other}, tmp_path / "a.pt")
    with pytest.raises(vc.CkptError, match=r"disc.*has shape"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=["prune_merge:merge_from=2,merge_into=0"])
