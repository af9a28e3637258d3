"""Checkpoints of trainers that are not known: what is bound, what is refused, and what must never be guessed.

The model's layers are all alike, so shapes tell nothing but weights from biases.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import DATA, assert_same, load
from test_incomplete_optimizer import resumed
from torch import nn

import vraxion_ckpt as vc
from vraxion_ckpt.errors import BindingError, UsageError

SPLIT = ["single_to_experts", "mitosis_split:parent=0,addresses=[0-7],noise=0"]


class Head(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        if experts:
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))
        else:
            self.single = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "single"):
            return self.single(x)
        return torch.stack([self.experts[int(owner)](row) for row, owner in zip(x, owners, strict=True)])


class Net(nn.Module):
    def __init__(self, experts: int = 0, norm: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        if norm:
            self.bn = nn.BatchNorm1d(8)
        self.register_buffer("router_map", torch.arange(16) % max(experts, 1))
        self.head = Head(experts)

    def forward(self, x: torch.Tensor, addresses: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.head(self.bn(x) if hasattr(self, "bn") else x, self.router_map[addresses])


def trained(make, experts: int = 0, norm: bool = False):
    torch.manual_seed(0)
    model = Net(experts, norm)
    optimizer = make(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(32, 8), torch.randint(0, 16, (32,))).square().mean().backward()
        optimizer.step()
    return model, optimizer


def saved(model, optimizer, path, **more):
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 4, **more}, path)
    return path


def wrong_moments(make, path, experts: int, old: nn.Module, old_optimizer, ancestor) -> list[str]:
    """Load a result into an optimizer of the same make; return whose moments are not those of their ancestors."""
    payload = load(path)
    model = Net(experts, norm=hasattr(old, "bn"))
    model.load_state_dict(payload["model"], strict=True)
    optimizer = make(model)
    optimizer.load_state_dict(payload["optim"])
    params = dict(old.named_parameters())
    return [
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(
            optimizer.state[parameter]["exp_avg"], old_optimizer.state[params[ancestor(name)]]["exp_avg"]
        )
    ]


def of_single(name: str) -> str:
    return name.replace("experts.0", "single").replace("experts.1", "single")


def adam(model: Net) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def adam_head_first(model: Net) -> torch.optim.Optimizer:
    return torch.optim.Adam([*model.head.parameters(), *model.a.parameters(), *model.b.parameters()])


def adamw_of_sorted_names(model: Net) -> torch.optim.Optimizer:
    """Decay and no-decay lists of sorted names, as minGPT made them."""
    params = dict(model.named_parameters())
    decay = [params[name] for name in sorted(params) if params[name].dim() > 1]
    others = [params[name] for name in sorted(params) if params[name].dim() < 2]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])


def test_the_head_first_of_one_expert_is_refused_unless_the_result_is_stated(tmp_path):
    model, optimizer = trained(adam_head_first)
    path = saved(model, optimizer, tmp_path / "in.pt")
    with pytest.raises(BindingError) as refusal:
        vc.convert(path, tmp_path / "out.pt", transforms=SPLIT)
    assert refusal.value.exit_code == 9
    assert not (tmp_path / "out.pt").exists()
    names = [f"{layer}.{leaf}" for layer in ("head.single", "a", "b") for leaf in ("weight", "bias")]
    with pytest.raises(BindingError):  # one expert alone does not show whether the head goes leaf by leaf
        vc.convert(path, tmp_path / "out.pt", transforms=SPLIT, param_names=names)
    order = [n for e in range(2) for n in (f"head.experts.{e}.weight", f"head.experts.{e}.bias")] + names[2:]
    vc.convert(path, tmp_path / "out.pt", transforms=SPLIT, param_names=names, result_order=order)
    assert not wrong_moments(adam_head_first, tmp_path / "out.pt", 2, model, optimizer, of_single)


def test_the_head_first_of_several_experts_is_placed_first(tmp_path):
    model, optimizer = trained(adam_head_first, 2)
    path = saved(model, optimizer, tmp_path / "in.pt")
    layers = ("head.experts.0", "head.experts.1", "a", "b")
    names = [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    chain = ["mitosis_split:parent=0,addresses=[0],noise=0"]
    vc.convert(path, tmp_path / "out.pt", transforms=chain, param_names=names)
    ancestor = {f"head.experts.2.{leaf}": f"head.experts.0.{leaf}" for leaf in ("weight", "bias")}
    wrong = wrong_moments(adam_head_first, tmp_path / "out.pt", 3, model, optimizer, lambda n: ancestor.get(n, n))
    assert not wrong


@pytest.mark.parametrize("order", [None, "sorted", "model"])
def test_groups_of_sorted_names_are_refused_unless_the_order_is_stated(order, tmp_path):
    model, optimizer = trained(adamw_of_sorted_names, 11)
    path = saved(model, optimizer, tmp_path / "in.pt")
    chain = ["mitosis_split:parent=2,addresses=[2],noise=0"]
    if order is None:
        with pytest.raises(BindingError):
            vc.convert(path, tmp_path / "out.pt", transforms=chain)
        return
    vc.convert(path, tmp_path / "out.pt", transforms=chain, optimizer_order=order)
    wrong = wrong_moments(
        adamw_of_sorted_names,
        tmp_path / "out.pt",
        12,
        model,
        optimizer,
        lambda n: n.replace("experts.11.", "experts.2."),
    )
    assert bool(wrong) == (order == "model")  # what the user states is not checked where nothing can check it


def test_a_state_dict_whose_names_stand_sorted_tells_no_order(tmp_path):
    model, optimizer = trained(adam, 2)
    payload = {"model": dict(sorted(model.state_dict().items())), "optim": optimizer.state_dict(), "step": 4}
    torch.save(payload, tmp_path / "in.pt")
    chain = ["mitosis_split:parent=0,addresses=[0],noise=0"]
    for order in (None, "model"):
        with pytest.raises(BindingError):
            vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", transforms=chain, optimizer_order=order)
    names = [name for name, _ in model.named_parameters()]
    vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", transforms=chain, param_names=names)
    assert not wrong_moments(
        adam, tmp_path / "out.pt", 3, model, optimizer, lambda n: n.replace("experts.2.", "experts.0.")
    )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrappers_prefix_is_seen_through_and_put_back(wrap, given, tmp_path):
    def make(model: Net) -> torch.optim.Optimizer:
        return torch.optim.Adam(wrap(model).named_parameters())

    model, optimizer = trained(make)
    path = saved(model, optimizer, tmp_path / "in.pt")
    names = [name for name, _ in model.named_parameters()] if given else None
    for target in ("out.pt", "out", "out.safetensors"):
        to = "modular" if target == "out" else None
        vc.convert(path, tmp_path / target, transforms=SPLIT, param_names=names, to=to)
        vc.convert(tmp_path / target, tmp_path / "again.pt", overwrite=True)
        assert not wrong_moments(make, tmp_path / "again.pt", 2, model, optimizer, of_single)
        prefix = optimizer.state_dict()["param_groups"][0]["param_names"][0].removesuffix("a.weight")
        listed = load(tmp_path / "again.pt")["optim"]["param_groups"][0]["param_names"]
        assert listed == [prefix + name for name, _ in Net(2).named_parameters()]


def test_names_without_the_state_dicts_prefix_are_bound_too(tmp_path):
    model, optimizer = trained(lambda m: torch.optim.Adam(m.named_parameters()))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "optim": optimizer.state_dict()}, tmp_path / "in.pt")
    bound = vc.open(tmp_path / "in.pt").optimizer
    assert bound.params == [f"module.{name}" for name, _ in model.named_parameters()]
    vc.convert(tmp_path / "in.pt", tmp_path / "out.pt")
    assert_same(load(tmp_path / "out.pt")["optim"], optimizer.state_dict())


def test_slots_that_are_not_shaped_like_their_parameters_are_carried_and_cloned(tmp_path):
    def make(model: Net) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(model.named_parameters())

    model, optimizer = trained(make)
    path = saved(model, optimizer, tmp_path / "in.pt")
    vc.convert(path, tmp_path / "same.pt")
    assert_same(load(tmp_path / "same.pt")["optim"], optimizer.state_dict())
    vc.convert(path, tmp_path / "out.pt", transforms=SPLIT)
    grown = Net(2)
    new = make(grown)
    new.load_state_dict(load(tmp_path / "out.pt")["optim"])
    old = optimizer.state[model.head.single.weight]
    for expert in grown.head.experts:
        assert_same(dict(new.state[expert.weight]), dict(old))


@pytest.mark.parametrize("order", [None, "model"])
def test_running_statistics_are_no_candidates(order, tmp_path):
    model, optimizer = trained(adam, norm=True)
    path = saved(model, optimizer, tmp_path / "in.pt")
    assert not {n for n in vc.open(path).optimizer.undecided if "running" in n or "batches" in n}
    if order is None:
        with pytest.raises(BindingError):
            vc.convert(path, tmp_path / "out.pt", transforms=SPLIT)
        return
    vc.convert(path, tmp_path / "out.pt", transforms=SPLIT, optimizer_order=order)
    assert not wrong_moments(adam, tmp_path / "out.pt", 2, model, optimizer, of_single)


def test_one_group_for_each_parameter_grows_groups(tmp_path):
    def make(model: Net) -> torch.optim.Optimizer:
        groups = [{"params": [(n, p)], "lr": 1e-3 * (i + 1)} for i, (n, p) in enumerate(model.named_parameters())]
        return torch.optim.AdamW(groups)

    model, optimizer = trained(make)
    vc.convert(saved(model, optimizer, tmp_path / "in.pt"), tmp_path / "out.pt", transforms=SPLIT)
    assert not wrong_moments(make, tmp_path / "out.pt", 2, model, optimizer, of_single)
    old = optimizer.state_dict()["param_groups"]
    rates = [group["lr"] for group in load(tmp_path / "out.pt")["optim"]["param_groups"]]
    assert rates == [group["lr"] for group in [*old, *old[-2:]]]


def test_one_group_for_each_expert_grows_groups(tmp_path):
    def make(model: Net) -> torch.optim.Optimizer:
        body = [(n, p) for n, p in model.named_parameters() if not n.startswith("head.")]
        named = [
            [(f"head.experts.{i}.{n}", p) for n, p in e.named_parameters()] for i, e in enumerate(model.head.experts)
        ]
        return torch.optim.AdamW([{"params": body}, *({"params": group} for group in named)])

    model, optimizer = trained(make, 2)
    chain = ["mitosis_split:parent=0,addresses=[0],noise=0"]
    vc.convert(saved(model, optimizer, tmp_path / "in.pt"), tmp_path / "out.pt", transforms=chain)
    ancestor = lambda n: n.replace("experts.2.", "experts.0.")  # noqa: E731
    assert not wrong_moments(make, tmp_path / "out.pt", 3, model, optimizer, ancestor)
    vc.convert(tmp_path / "out.pt", tmp_path / "back.pt", transforms=["prune_merge:merge_into=0"])
    assert_same(load(tmp_path / "back.pt")["optim"], optimizer.state_dict())


def test_noise_is_not_added_to_running_statistics(tmp_path):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 64)
            self.bn = nn.BatchNorm1d(64)

    head = nn.ModuleList(Normed() for _ in range(2))
    for each in head:
        each.bn.running_var.zero_()
    state = {"router_map": torch.arange(16) % 2, **{f"head.experts.{n}": t for n, t in head.state_dict().items()}}
    torch.save({"model": state, "step": 1}, tmp_path / "in.pt")
    vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", transforms=["mitosis_split:parent=1,addresses=[1],noise=0.1"])
    result = load(tmp_path / "out.pt")["model"]
    for leaf, tensor in head[1].state_dict().items():
        same = torch.equal(result[f"head.experts.2.{leaf}"], tensor)
        assert same == ("running" in leaf or "batches" in leaf), leaf


@pytest.mark.parametrize("listed", [False, True])
def test_noise_is_not_added_to_what_a_bound_optimizer_does_not_train(listed, tmp_path):
    state = {"router_map": torch.arange(4) % 2}
    state |= {f"head.experts.{i}.{leaf}": torch.ones(2, 2) for i in range(2) for leaf in ("weight", "scale")}
    names = [n for n in state if n.endswith("weight")] + [n for n in state if listed and n.endswith("scale")]
    names.sort(key=list(state).index)
    group = {"lr": 0.1, "params": list(range(len(names))), "param_names": names}
    torch.save({"model": state, "optim": {"state": {}, "param_groups": [group]}}, tmp_path / "in.pt")
    vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", transforms=["mitosis_split:parent=1,addresses=[1],noise=0.1"])
    result = load(tmp_path / "out.pt")["model"]
    assert not torch.equal(result["head.experts.2.weight"], state["head.experts.1.weight"])
    assert torch.equal(result["head.experts.2.scale"], state["head.experts.1.scale"]) != listed


@pytest.mark.parametrize(
    ("tensor", "noise"),
    [
        (torch.ones(4, 4, dtype=torch.bfloat16), 1e-6),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), 1e-3),
        (torch.ones(4, 4, dtype=torch.int8), 1.0),
        (torch.ones(4, 4, dtype=torch.complex64), 1.0),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_noise_that_changes_nothing_is_said(tensor, noise, tmp_path):
    state = {
        "router_map": torch.arange(4) % 2,
        "head.experts.0.weight": tensor,
        "head.experts.1.weight": tensor.clone(),
    }
    torch.save({"model": state}, tmp_path / "in.pt")
    chain = [("mitosis_split", {"parent": 0, "addresses": [0], "noise": noise})]
    with pytest.warns(vc.CkptWarning, match="has little or no effect on head.experts.2: weight"):
        vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", transforms=chain)


def test_two_explanations_that_place_differently_are_refused_with_a_way_out(tmp_path):
    """Ten experts without biases, named in order: counted upwards, or sorted by name?"""
    names = ["a.weight", *(f"head.experts.{i}.weight" for i in range(10))]
    state = {"router_map": torch.arange(20) % 10, **{name: torch.randn(2, 2) for name in names}}
    slots = {i: {"exp_avg": torch.full((2, 2), float(i))} for i in range(11)}
    group = {"lr": 0.1, "params": list(range(11)), "param_names": names}
    torch.save({"model": state, "optim": {"state": slots, "param_groups": [group]}}, tmp_path / "in.pt")
    chain = ["mitosis_split:parent=3,addresses=[3],noise=0"]
    with pytest.raises(BindingError) as refusal:
        vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", transforms=chain)
    assert "--result-order" in refusal.value.hint
    counted = [*names, "head.experts.10.weight"]
    for number, (wanted, options) in enumerate(
        [
            (counted, {"result_order": counted}),
            (sorted(counted), {"result_order": sorted(counted)}),
            (counted, {"optimizer_order": "model"}),
            (sorted(counted), {"optimizer_order": "sorted"}),
        ]
    ):
        target = tmp_path / f"out{number}.pt"
        vc.convert(tmp_path / "in.pt", target, transforms=chain, **options)
        result = load(target)["optim"]
        assert result["param_groups"][0]["param_names"] == wanted
        for i, name in enumerate(wanted):
            old = names.index("head.experts.3.weight" if name == "head.experts.10.weight" else name)
            assert torch.equal(result["state"][i]["exp_avg"], slots[old]["exp_avg"])


@pytest.mark.parametrize(
    "listed",
    [[], ["a.weight"], ["a.weight", "a.weight", "head.experts.0.weight"], ["a.weight", "head.experts.0.weight", "x"]],
)
def test_a_result_order_that_is_no_order_of_the_result_is_a_usage_error(listed, tmp_path):
    names = ["a.weight", "head.single.weight"]
    state = {"router_map": torch.zeros(4, dtype=torch.int64), **{name: torch.ones(2, 2) for name in names}}
    group = {"lr": 0.1, "params": [0, 1], "param_names": names}
    torch.save({"model": state, "optim": {"state": {}, "param_groups": [group]}}, tmp_path / "in.pt")
    with pytest.raises(UsageError):
        vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", transforms=["single_to_experts"], result_order=listed)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("name", ["before_the_original_split.pt", "mitosis_request.pt", "hibernated.pt"])
def test_what_vraxions_own_trainer_leaves_is_split_without_names_and_resumes(name, tmp_path):
    source = DATA / "trainers" / name
    before = load(source)
    parent = 1
    address = before["model"]["router_map"].tolist().index(parent)
    chain = [f"mitosis_split:parent={parent},addresses=[{address}],noise=0"]
    vc.convert(source, tmp_path / "out.pt", transforms=chain)
    count = before["num_experts"]
    names = vc.open(tmp_path / "out.pt").optimizer.params
    _, optimizer = resumed(tmp_path / "out.pt", names)
    assert len(optimizer.state) == len(names)
    result = load(tmp_path / "out.pt")
    old = {n: i for i, n in enumerate(vc.open(source).optimizer.params)}
    for i, n in enumerate(names):
        ancestor = old[n.replace(f"experts.{count}.", f"experts.{parent}.")]
        if ancestor in before["optim"]["state"]:
            assert_same(result["optim"]["state"][i], before["optim"]["state"][ancestor])


def test_inspect_and_the_summary_say_how_the_names_were_found(tmp_path):
    model, optimizer = trained(adam)
    path = saved(model, optimizer, tmp_path / "in.pt")
    facts = vc.inspect(path).optimizer
    assert facts.bound
    assert set(facts.undecided) == {name for name, _ in model.named_parameters()}
    stated = vc.inspect(path, optimizer_order="model").optimizer
    assert (stated.undecided, stated.order) == ((), "model")
    done = vc.convert(path, tmp_path / "out.pt", optimizer_order="model", transforms=SPLIT)
    assert "model order, as stated" in done.optimizer
    known = vc.convert(DATA / "wallclock_single.pt", tmp_path / "known.pt")
    assert "as VRAXION's wall-clock trainer builds it" in known.optimizer


def test_the_options_are_taken_from_files_on_the_command_line(run_cli, tmp_path):
    model, optimizer = trained(lambda m: torch.optim.Adam(m.named_parameters()))
    path = saved(model, optimizer, tmp_path / "in.pt")
    order = [name for name, _ in Net(2).named_parameters()][::-1]
    (tmp_path / "order.txt").write_text("\n".join(order))
    steps = [part for step in SPLIT for part in ("-t", step)]
    code, _, _ = run_cli("convert", path, tmp_path / "out.pt", *steps, "--result-order", tmp_path / "order.txt")
    assert code == 0
    assert load(tmp_path / "out.pt")["optim"]["param_groups"][0]["param_names"] == order
    assert run_cli("convert", path, tmp_path / "no.pt", *steps, "--result-order", tmp_path / "nowhere")[0] == 2
    assert run_cli("convert", path, tmp_path / "no.pt", *steps, "--companions", "burn")[0] == 2


# --- what could be taken for another order ---


def test_what_safetensors_returns_tells_no_order_either(tmp_path):
    """It sorts by dtype, then by name, so that the whole list is not sorted."""
    model, optimizer = trained(lambda m: torch.optim.Adam(m.parameters()), 2)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    keys = {"ptr_inertia": 0.1, "ptr_inertia_ema": 0.1, "ptr_inertia_floor": 0.1}  # as VRAXION's own trainer has
    for number, (more, options) in enumerate([({}, {"optimizer_order": "model"}), (keys, {})]):
        payload = {"model": load_file(tmp_path / "w.safetensors"), "optim": optimizer.state_dict(), **more}
        torch.save(payload, tmp_path / f"{number}.pt")
        chain = ["mitosis_split:parent=1,addresses=[1],noise=0"]
        with pytest.raises(BindingError):
            vc.convert(tmp_path / f"{number}.pt", tmp_path / "out.pt", transforms=chain, **options)


@pytest.mark.parametrize("order", [sorted, lambda named: named[::-1]])
def test_a_payloads_names_stay_in_the_optimizers_order(order, tmp_path):
    def make(model: Net) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for _, p in order(list(model.named_parameters()))])

    model, optimizer = trained(make, 11)
    names = [name for name, _ in order(list(model.named_parameters()))]
    path = saved(model, optimizer, tmp_path / "in.pt", param_names=names)
    chain = ["mitosis_split:parent=2,addresses=[2],noise=0"]
    vc.convert(path, tmp_path / "out.pt", transforms=chain)
    listed = load(tmp_path / "out.pt")["param_names"]
    assert listed == [name for name, _ in order(list(Net(12).named_parameters()))]
    assert not wrong_moments(make, tmp_path / "out.pt", 12, model, optimizer, lambda n: n.replace("s.11.", "s.2."))


def test_leaf_by_leaf_and_the_models_order_look_alike_where_the_body_has_one_leaf_only(tmp_path):
    names = ["a.weight", "head.single.weight", "head.single.bias"]
    state = {"router_map": torch.zeros(4, dtype=torch.int64), **{name: torch.randn(4) for name in names}}
    slots = {i: {"exp_avg": torch.full((4,), float(i))} for i in range(3)}
    group = {"lr": 0.1, "params": [0, 1, 2], "param_names": names}
    torch.save({"model": state, "optim": {"state": slots, "param_groups": [group]}}, tmp_path / "in.pt")
    chain = ["single_to_experts", "mitosis_split:parent=0,addresses=[1],noise=0"]
    with pytest.raises(BindingError):
        vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", transforms=chain)
    vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", transforms=chain, optimizer_order="model")


def test_the_groups_of_a_single_heads_leaves_grow_as_those_of_several_experts_do(tmp_path):
    def make(model: Net) -> torch.optim.Optimizer:
        named = list(model.named_parameters())
        head = [pair for pair in named if pair[0].startswith("head.")]
        body = [pair for pair in named if not pair[0].startswith("head.")]
        return torch.optim.Adam([{"params": g} for g in (body, *([p for p in head if p[1].ndim == n] for n in (2, 1)))])

    model, optimizer = trained(make)
    vc.convert(saved(model, optimizer, tmp_path / "in.pt"), tmp_path / "out.pt", transforms=SPLIT)
    assert not wrong_moments(make, tmp_path / "out.pt", 2, model, optimizer, of_single)


def test_rows_and_columns_as_other_adafactors_keep_them_are_carried(tmp_path):
    names = ["a.weight", "a.bias", "head.single.weight", "head.single.bias"]
    state = {n: torch.randn(4, 4) if n.endswith("weight") else torch.randn(4) for n in names}
    slots = {
        i: {"exp_avg_sq_row": torch.randn(4), "exp_avg_sq_col": torch.randn(4)}
        if i % 2 == 0
        else {"exp_avg_sq": torch.ones(4)}
        for i in range(4)
    }
    group = {"lr": 0.1, "params": list(range(4)), "param_names": names}
    payload = {"model": {"router_map": torch.zeros(16, dtype=torch.int64), **state}}
    payload["optim"] = {"state": slots, "param_groups": [group]}
    torch.save(payload, tmp_path / "in.pt")
    vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", transforms=SPLIT)
    result = load(tmp_path / "out.pt")["optim"]
    assert_same(result["state"][4], slots[2])


def test_an_optimizer_without_any_state_needs_no_names(tmp_path):
    model = Net(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = saved(model, optimizer, tmp_path / "in.pt")
    vc.convert(path, tmp_path / "out.pt", transforms=["mitosis_split:parent=0,addresses=[0],noise=0"])
    torch.optim.SGD(Net(3).parameters()).load_state_dict(load(tmp_path / "out.pt")["optim"])


def test_one_group_for_each_of_many_parameters_is_bound_by_a_stated_order(tmp_path):
    def make(model: Net) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": [p]} for p in model.parameters()])

    model, optimizer = trained(make, 10)
    path = saved(model, optimizer, tmp_path / "in.pt")
    chain = ["mitosis_split:parent=2,addresses=[2],noise=0"]
    vc.convert(path, tmp_path / "out.pt", transforms=chain, optimizer_order="model")
    assert not wrong_moments(make, tmp_path / "out.pt", 11, model, optimizer, lambda n: n.replace("s.10.", "s.2."))


def test_a_state_for_all_parameters_together_is_carried_and_not_cut(tmp_path):
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8), torch.arange(4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    path = saved(model, optimizer, tmp_path / "in.pt")
    vc.convert(path, tmp_path / "same.pt")
    assert_same(load(tmp_path / "same.pt")["optim"], optimizer.state_dict())
    with pytest.raises(vc.CkptError):
        vc.convert(path, tmp_path / "out.pt", transforms=SPLIT, optimizer_order="model")


@pytest.mark.parametrize("names", ["a.weight", 5, [1], {"a.weight"}])
def test_what_is_no_list_of_names_is_a_usage_error(names, tmp_path):
    for option in ("param_names", "result_order"):
        with pytest.raises(UsageError):
            vc.convert(DATA / "wallclock_experts3.pt", tmp_path / "out.pt", **{option: names})
