"""An optimizer that lacks parameters of experts, as the original split leaves it: refused, or completed and resumed."""

from __future__ import annotations

import pytest
import torch
from support import DATA, assert_same, load
from torch import nn

import vraxion_ckpt as vc
from vraxion_ckpt.errors import BindingError, UsageError

SPLIT = DATA / "trainers/split_by_the_original_tool.pt"
BEFORE = DATA / "trainers/before_the_original_split.pt"
NAMES = (DATA / "trainers/split_by_the_original_tool.names.txt").read_text().split()
NEW = ["head.experts.2.weight", "head.experts.2.bias"]


class Like(nn.Module):
    """A module with the parameters and buffers of a state dict, in its order."""

    def __init__(self, state: dict[str, torch.Tensor], params: list[str]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            if name in params:
                module.register_parameter(leaf, nn.Parameter(torch.zeros_like(tensor)))
            else:
                module.register_buffer(leaf, torch.zeros_like(tensor))


def resumed(path, params):
    payload = load(path)
    model = Like(payload["model"], params)
    model.load_state_dict(payload["model"], strict=True)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(payload["optim"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_torch_refuses_what_the_original_tool_left(tmp_path):
    vc.convert(SPLIT, tmp_path / "same.pt", param_names=NAMES, optimizer="partial")
    with pytest.raises(ValueError, match="size"):
        resumed(tmp_path / "same.pt", [*NAMES, *NEW])


@pytest.mark.parametrize("chain", [[], ["mitosis_split:parent=0,addresses=[0],noise=0"]])
def test_it_is_refused_unless_told_what_to_do(chain, tmp_path):
    for options, key in (({}, "optimizer"), ({"param_names": NAMES}, NEW[0])):
        with pytest.raises(BindingError) as refusal:
            vc.convert(SPLIT, tmp_path / "out.pt", transforms=chain, **options)
        assert refusal.value.key == key
        assert "--optimizer complete" in refusal.value.hint
        assert not (tmp_path / "out.pt").exists()


def test_which_parameters_it_lacks_is_not_guessed(tmp_path):
    with pytest.raises(BindingError) as refusal:
        vc.convert(SPLIT, tmp_path / "out.pt", optimizer="complete")
    assert "--param-names" in refusal.value.hint


def test_completed_it_resumes_with_the_state_it_had(tmp_path):
    vc.convert(SPLIT, tmp_path / "whole.pt", param_names=NAMES, optimizer="complete")
    before, after = load(BEFORE)["optim"], load(tmp_path / "whole.pt")["optim"]
    assert vc.open(tmp_path / "whole.pt").optimizer.params == [*NAMES, *NEW]
    assert_same(after["state"], before["state"])
    model, optimizer = resumed(tmp_path / "whole.pt", [*NAMES, *NEW])
    steps = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    assert {steps[name] for name in NEW} == {1}  # they begin anew
    assert all(steps[name] > 1 for i, name in enumerate(NAMES) if i in before["state"])


@pytest.mark.parametrize("target", ["out.pt", "out/", "out.safetensors"])
def test_completed_and_split_it_resumes(target, tmp_path):
    chain = ["mitosis_split:parent=0,addresses=[0],noise=0"]
    vc.convert(SPLIT, f"{tmp_path}/{target}", transforms=chain, param_names=NAMES, optimizer="complete")
    vc.convert(tmp_path / target, tmp_path / "again.pt")
    names = [*NAMES, *NEW, "head.experts.3.weight", "head.experts.3.bias"]
    _, optimizer = resumed(tmp_path / "again.pt", names)
    assert len(optimizer.state) == len(names)


def test_an_edit_completes_in_place(tmp_path):
    (tmp_path / "run.pt").write_bytes(SPLIT.read_bytes())
    vc.edit(tmp_path / "run.pt", param_names=NAMES, optimizer="complete")
    resumed(tmp_path / "run.pt", [*NAMES, *NEW])


def sorted_optimizer(order: list[str], each_alone: bool = False) -> dict:
    groups = [[name] for name in order] if each_alone else [order]
    ids = iter(range(len(order)))
    state = {i: {"exp_avg": torch.full((2, 2), float(i))} for i in range(len(order))}
    return {
        "state": state,
        "param_groups": [{"lr": 0.1, "params": [next(ids) for _ in g], "param_names": g} for g in groups],
    }


@pytest.mark.parametrize("each_alone", [False, True])
def test_what_is_added_goes_where_the_trainers_order_puts_it(each_alone, tmp_path):
    names = [f"head.experts.{i}.weight" for i in range(11)]
    state = {"router_map": torch.arange(22) % 11, "z.weight": torch.ones(2, 2)}
    state |= {name: torch.ones(2, 2) for name in names}
    listed = sorted(["z.weight", *(name for name in names if name != "head.experts.10.weight")])
    torch.save({"model": state, "optim": sorted_optimizer(listed, each_alone)}, tmp_path / "in.pt")
    vc.convert(tmp_path / "in.pt", tmp_path / "out.pt", optimizer="complete", optimizer_order="sorted")
    groups = load(tmp_path / "out.pt")["optim"]["param_groups"]
    assert [name for group in groups for name in group["param_names"]] == sorted(["z.weight", *names])
    assert len(groups) == (12 if each_alone else 1)


def test_check_names_what_is_lacking():
    findings = [f for f in vc.check(SPLIT, param_names=NAMES).findings if f.rule == "trained alike"]
    assert [f.where for f in findings] == NEW


@pytest.mark.parametrize("options", [{"optimizer": "complete"}, {"optimizer": "partial"}])
def test_a_complete_optimizer_is_left_as_it_is(options, tmp_path):
    vc.convert(BEFORE, tmp_path / "out.pt", **options)
    assert_same(load(tmp_path / "out.pt")["optim"], load(BEFORE)["optim"])


def test_names_for_an_optimizer_that_is_dropped_are_a_usage_error(tmp_path):
    with pytest.raises(UsageError):
        vc.convert(SPLIT, tmp_path / "out.pt", optimizer="drop", optimizer_order="model")
