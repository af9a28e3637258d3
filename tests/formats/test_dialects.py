"""Trainers keep the model under many keys and below many prefixes. Each resumes from a changed checkpoint by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import vraxion_ckpt as vc
from vraxion_ckpt.errors import InconsistentError

RING = 16
SPLIT = ["single_to_experts:noise=0", "mitosis_split:parent=0,addresses=[0-3],noise=0"]
Payload = dict[str, Any]


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


class Model(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.register_buffer("router_map", torch.arange(RING) % max(experts, 1))
        self.head = Head(experts)

    def forward(self, x: torch.Tensor, addresses: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)), self.router_map[addresses])


class Wrapper(nn.Module):
    """As ``DistributedDataParallel`` or ``torch.compile`` wraps a model, without their processes and compilers."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return next(self.children())(*inputs)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(32, 8, generator=generator)
        addresses = torch.randint(RING, (32,), generator=generator)
        model(x, addresses).square().mean().backward()
        optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.named_parameters(), lr=0.01)


# --- what trainers save, and how they resume ---

KEYS = {
    "recipe": ("model_state_dict", "optimizer_state_dict", {"epoch": 1, "loss": 0.5}),
    "state_dict and optimizer": ("state_dict", "optimizer", {"epoch": 1, "best_acc": 0.1}),
    "net and optim": ("net", "optim", {"acc": 1.0, "epoch": 3}),
    "model and opt": ("model", "opt", {"step": 8}),
    "DeepSpeed": ("module", "optimizer", {"global_steps": 8, "ds_version": "0.14"}),
    "a step trainer": ("model", "optimizer", {"step": 8, "losses": [1.0], "scaler": None}),
}
PREFIXES = ["", "module.", "_orig_mod.module.", "net."]


def wrapped(experts: int, prefix: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Model(experts)
    for name in reversed(prefix.split(".")[:-1]):
        model = Wrapper(name, model)
    return model


def grown(old: nn.Module, optimizer: torch.optim.Optimizer, prefix: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model with two experts and its optimizer, made from the live objects."""
    model = wrapped(2, prefix)
    source = dict(old.state_dict())
    former = {name: name.replace("experts.0", "single").replace("experts.1", "single") for name in model.state_dict()}
    state = {name: source[former[name]].clone() for name in model.state_dict()}
    state[f"{prefix}router_map"][:4] = 1
    model.load_state_dict(state)
    new, of_name = adam(model), dict(old.named_parameters())
    for name, parameter in model.named_parameters():
        new.state[parameter] = copy.deepcopy(optimizer.state[of_name[former[name]]])
    return model, new


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("dialect", KEYS)
def test_a_trainer_resumes_as_if_the_split_had_happened_in_memory(tmp_path, dialect, prefix):
    model_key, optimizer_key, others = KEYS[dialect]
    model = wrapped(0, prefix)
    optimizer = adam(model)
    trained(model, optimizer, 5, seed=1)
    saved = {model_key: model.state_dict(), optimizer_key: optimizer.state_dict(), **others}
    torch.save(saved, tmp_path / "source.pt")
    expected, expected_optimizer = grown(model, optimizer, prefix)
    trained(expected, expected_optimizer, 2, seed=2)

    for number, ways in enumerate([[".pt"], [".safetensors", ".pt"], ["/", ".pt"], ["/", ".safetensors", ".pt"]]):
        place, chain = tmp_path / "source.pt", SPLIT
        for step, suffix in enumerate(ways):
            target = f"{tmp_path}/{number}-{step}{suffix}"
            vc.convert(place, target, transforms=chain)
            place, chain = Path(target), []
        payload = torch.load(place)
        assert [key for key in payload if key in saved] == list(saved)
        assert {key: payload[key] for key in others} == others
        resumed = wrapped(2, prefix)
        resumed.load_state_dict(payload[model_key])
        again = adam(resumed)
        again.load_state_dict(payload[optimizer_key])
        trained(resumed, again, 2, seed=2)
        assert same(dict(resumed.state_dict()), dict(expected.state_dict()))
        assert same(again.state_dict()["state"], expected_optimizer.state_dict()["state"])


def test_an_average_and_a_model_with_different_prefixes_grow_together(tmp_path):
    model = wrapped(0, "_orig_mod.module.")
    optimizer = adam(model)
    average = AveragedModel(model.get_submodule("_orig_mod.module"))
    trained(model, optimizer, 3, seed=1)
    average.update_parameters(model.get_submodule("_orig_mod.module"))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": average.state_dict()}
    torch.save(saved, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=SPLIT)
    payload = torch.load(tmp_path / "b.pt")
    grown_average = AveragedModel(Model(2))
    grown_average.load_state_dict(payload["ema"])
    for expert in (0, 1):
        assert torch.equal(
            payload["ema"][f"module.head.experts.{expert}.weight"], saved["ema"]["module.head.single.weight"]
        )
    assert torch.equal(payload["ema"]["module.router_map"], payload["model"]["_orig_mod.module.router_map"])
    wrapped(2, "_orig_mod.module.").load_state_dict(payload["model"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "/"])
def test_the_head_below_a_prefix_is_found_in_every_format(tmp_path, suffix):
    torch.save({"model": wrapped(3, "module.").state_dict()}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", f"{tmp_path}/b{suffix}")
    found = vc.open(f"{tmp_path}/b{suffix}".rstrip("/"))
    assert found.num_experts == 3
    assert found.head is not None
    assert found.head.prefix(1) == "module.head.experts.1."
    assert found.router_map is not None
    assert vc.diff(tmp_path / "a.pt", f"{tmp_path}/b{suffix}".rstrip("/")).identical


TWO_HEADS = {
    f"{prefix}{name}": value for prefix in ("student.", "teacher.") for name, value in Model(2).state_dict().items()
}


@pytest.mark.parametrize("call", [vc.inspect, vc.open, lambda path: vc.convert(path, path.with_name("b.pt"))])
def test_heads_below_several_prefixes_are_refused_until_the_user_names_one(tmp_path, call):
    torch.save({"model": TWO_HEADS}, tmp_path / "a.pt")
    with pytest.raises(InconsistentError, match=r"several prefixes: 'student\.', 'teacher\.'") as caught:
        call(tmp_path / "a.pt")
    assert "--from pt:prefix=student." in caught.value.hint


@pytest.mark.filterwarnings("ignore:kept unchanged")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "/"])
def test_the_prefix_that_the_user_names_is_remembered(tmp_path, suffix):
    torch.save({"model": TWO_HEADS}, tmp_path / "a.pt")
    split = ["mitosis_split:parent=0,addresses=[0],noise=0"]
    target = f"{tmp_path}/b{suffix}"
    vc.convert(tmp_path / "a.pt", target, transforms=split, from_="pt:prefix=teacher.", companions="keep")
    found = vc.open(target.rstrip("/"))
    assert found.head is not None
    assert found.head.names.prefix == "teacher."
    assert found.num_experts == 3


UNKNOWN = {"weights": Model(2).state_dict(), "adam": {}, "epoch": 3}


@pytest.mark.parametrize("call", [vc.inspect, vc.open, lambda path: vc.convert(path, path.with_name("b.pt"))])
def test_an_unknown_dialect_is_refused_with_its_keys_and_the_way_out(tmp_path, call):
    torch.save(UNKNOWN, tmp_path / "a.pt")
    with pytest.raises(InconsistentError, match="no dialect recognises a model") as caught:
        call(tmp_path / "a.pt")
    assert "weights (OrderedDict), adam (dict), epoch (int)" in caught.value.hint
    assert "--from pt:model_key=KEY" in caught.value.hint
    findings = vc.check(tmp_path / "a.pt").findings
    assert any("weights (OrderedDict)" in str(finding.hint) for finding in findings)


def test_the_user_names_keys_that_no_dialect_knows(tmp_path):
    model = wrapped(0, "")
    optimizer = adam(model)
    trained(model, optimizer, 2, seed=1)
    torch.save({"weights": model.state_dict(), "adam": optimizer.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=SPLIT, from_="pt:model_key=weights,optimizer_key=adam")
    payload = torch.load(tmp_path / "b.pt")
    assert list(payload)[:3] == ["weights", "adam", "epoch"]
    resumed = wrapped(2, "")
    resumed.load_state_dict(payload["weights"])
    adam(resumed).load_state_dict(payload["adam"])


def test_keys_of_two_dialects_at_once_are_refused(tmp_path):
    state = Model(2).state_dict()
    torch.save({"model": state, "state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(InconsistentError, match="under 'model' or 'state_dict'") as caught:
        vc.open(tmp_path / "a.pt")
    assert "model_key=model" in caught.value.hint
    assert vc.open(tmp_path / "a.pt", from_="pt:model_key=state_dict").num_experts == 2


def test_a_prefix_without_a_head_is_refused(tmp_path):
    torch.save({"model": Model(2).state_dict()}, tmp_path / "a.pt")
    with pytest.raises(InconsistentError, match=r"no head stands below the prefix 'modul\.'"):
        vc.open(tmp_path / "a.pt", from_="pt:prefix=modul.")
