"""What tensors and optimizers may look like, and what becomes of them on the way and in a clone."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict

import pytest
import torch
from support import DATA, assert_same, bits, load

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.comparison import same_bits
from vraxion_ckpt.errors import LossError

ODD = {
    "bf16": torch.tensor([1.5, float("nan"), -0.0]).bfloat16(),
    "fp8": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    "half": torch.tensor([1e-8, 65504.0]).half(),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j, 3 - 4j]),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "empty": torch.empty(0, 7),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "view": torch.arange(10.0)[3:6],
    "nan_payload": torch.tensor([0x7FC01234, 0x7F800001, -1], dtype=torch.int32).view(torch.float32),
    "bytes": torch.tensor([1, 255], dtype=torch.uint8),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def payload(**entries):
    model = OrderedDict(ODD)
    model["router_map"] = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    for i in range(2):
        model[f"head.experts.{i}.down.weight"] = torch.randn(3 + i, 4).bfloat16()
        model[f"head.experts.{i}.up.weight"] = torch.randn(2, 3 + i).T.contiguous().T
    return {"model": model, "step": 7, "losses": [0.1, float("inf")], "extra": {"t": (1, "x", None)}, **entries}


@pytest.mark.parametrize("way", ["out.pt", "out/"])
def test_every_kind_of_tensor_comes_through_bit_by_bit(way, tmp_path):
    torch.save(payload(), tmp_path / "odd.pt")
    vc.convert(tmp_path / "odd.pt", f"{tmp_path}/{way}")
    vc.convert(tmp_path / way, tmp_path / "back.pt")
    assert_same(load(tmp_path / "back.pt"), load(tmp_path / "odd.pt"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_noise_has_the_size_asked_for_depends_on_seed_and_name_alone_and_leaves_the_parent(dtype, tmp_path):
    weight = torch.ones(200, 100).to(dtype)
    model = {"router_map": torch.zeros(8, dtype=torch.int64), "head.experts.0.weight": weight}
    torch.save({"model": model}, tmp_path / "a.pt")
    torch.save({"step": 3, "model": {"other": torch.ones(3), **model}}, tmp_path / "b.pt")

    def child(source, seed):
        split = f"mitosis_split:parent=0,addresses=[1],noise=0.25,seed={seed}"
        vc.convert(tmp_path / source, tmp_path / "out.pt", transforms=[split], overwrite=True)
        saved = load(tmp_path / "out.pt")["model"]
        assert bits(saved["head.experts.0.weight"]) == bits(weight)
        return saved["head.experts.1.weight"]

    torch.manual_seed(0)
    first = child("a.pt", 1)
    torch.rand(5)  # the global generator plays no part
    assert bits(child("b.pt", 1)) == bits(first)
    assert bits(child("a.pt", 2)) != bits(first)
    noise = first.double() - 1
    assert abs(float(noise.mean())) < 0.02
    assert 0.23 < float(noise.std()) < 0.27


def test_a_clone_shares_nothing_and_is_of_the_same_kind(tmp_path):
    model = {"router_map": torch.zeros(4, dtype=torch.int64)}
    model |= {
        "head.experts.0.weight": torch.nn.Parameter(torch.ones(3, 2).T),
        "head.experts.0.mask": torch.ones(2).bool(),
    }
    torch.save({"model": model}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=["mitosis_split:parent=0,addresses=[2]"])
    grown = load(tmp_path / "b.pt")["model"]
    assert_same(grown["head.experts.0.weight"], model["head.experts.0.weight"])
    child = grown["head.experts.1.weight"]
    assert isinstance(child, torch.nn.Parameter)
    assert child.stride() == (1, 2)
    assert child.untyped_storage().data_ptr() != grown["head.experts.0.weight"].untyped_storage().data_ptr()
    assert grown["head.experts.1.mask"].equal(model["head.experts.0.mask"])


def test_slots_of_any_kind_are_cloned(tmp_path):
    """Nothing is known of any optimizer: whatever stands under a parameter goes along."""
    model = {"router_map": torch.zeros(4, dtype=torch.int64), "head.experts.0.weight": torch.ones(2, 2)}
    slots = {
        "step": 5,
        "history": [torch.ones(2, 2), torch.zeros(2, 2)],
        "flag": None,
        "nested": {"x": torch.ones(2, 2)},
    }
    groups = [{"lr": torch.tensor(0.1), "params": [0], "note": "kept"}, {"lr": 0.2, "params": []}]
    torch.save({"model": model, "optim": {"state": {0: slots}, "param_groups": groups, "more": 1}}, tmp_path / "a.pt")
    chain = ["mitosis_split:parent=0,addresses=[2],noise=0"]  # one parameter alone shows no order
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=chain, optimizer_order="model")
    grown = load(tmp_path / "b.pt")["optim"]
    assert_same(grown["state"][1], slots)
    assert_same(grown["param_groups"], [{**groups[0], "params": [0, 1]}, groups[1]])
    assert grown["more"] == 1
    places = [grown["state"][i]["history"][0].untyped_storage().data_ptr() for i in (0, 1)]
    assert places[0] != places[1]


def test_tied_tensors_stay_tied_in_a_monolith_and_are_a_declared_loss_in_a_directory(tmp_path):
    tied = torch.randn(2, 2)
    model = {"router_map": torch.tensor([0, 1]), "embedding": tied, "decoder": tied}
    model |= {"head.experts.0.weight": tied, "head.experts.1.weight": torch.ones(2, 2)}
    torch.save({"model": model}, tmp_path / "tied.pt")
    vc.convert(tmp_path / "tied.pt", tmp_path / "copy.pt")
    copied = load(tmp_path / "copy.pt")["model"]
    assert copied["embedding"].data_ptr() == copied["decoder"].data_ptr() == copied["head.experts.0.weight"].data_ptr()

    with pytest.raises(LossError, match=r"head\.experts\.0\.weight"):
        vc.convert(tmp_path / "tied.pt", tmp_path / "modular", to="modular")
    assert not (tmp_path / "modular").exists()
    with pytest.warns(vc.CkptWarning, match="tied tensors"):
        done = vc.convert(tmp_path / "tied.pt", tmp_path / "modular", to="modular", losses="warn")
    assert len(done.losses) == 1
    assert len(vc.convert(tmp_path / "tied.pt", tmp_path / "quiet", to="modular", losses="ignore").losses) == 1
    core = load(tmp_path / "modular/system/router.state")["model"]
    assert core["embedding"].data_ptr() == core["decoder"].data_ptr()
    assert vc.inspect(tmp_path / "tied.pt").losses["modular"]
    # A tensor of the payload lies in another file than the expert, too.
    best = torch.ones(2, 2)
    apart = {"router_map": torch.tensor([0]), "head.experts.0.weight": best}
    torch.save({"model": apart, "best": [best]}, tmp_path / "kept.pt")
    with pytest.raises(LossError, match=r"head\.experts\.0\.weight"):
        vc.convert(tmp_path / "kept.pt", tmp_path / "kept", to="modular")


def test_experts_that_are_views_of_one_tensor_are_written_to_files_of_their_own_size(tmp_path):
    stacked = torch.randn(2, 100, 100)
    model = {"router_map": torch.tensor([0, 1]), **{f"head.experts.{i}.weight": stacked[i] for i in range(2)}}
    torch.save({"model": model}, tmp_path / "stacked.pt")
    vc.convert(tmp_path / "stacked.pt", tmp_path / "modular", to="modular")
    for i in range(2):
        shard = tmp_path / f"modular/experts/expert_{i:03d}.pt"
        assert bits(load(shard)["weight"]) == bits(stacked[i])
        assert shard.stat().st_size < 45_000


def test_python_opens_lazily_and_shows_the_documented_names():
    checkpoint = vc.open(DATA / "named_experts3.pt")
    assert (checkpoint.num_experts, checkpoint.step) == (3, 4)
    assert checkpoint.router_map.tolist() == [a % 3 for a in range(64)]
    assert list(checkpoint.head.experts[2]) == ["weight", "bias"]
    assert checkpoint.optimizer.groups[0].options["lr"] == 0.001
    assert "head.experts.2.bias" in checkpoint.optimizer.state


def test_an_expert_with_tied_tensors_is_not_cloned_since_the_clone_would_come_untied(tmp_path):
    tied = torch.ones(2, 2)
    model = {"router_map": torch.zeros(4, dtype=torch.int64), "head.experts.0.a": tied, "head.experts.0.b": tied}
    torch.save({"model": model}, tmp_path / "a.pt")
    with pytest.raises(vc.TransformError, match=r"tied to head\.experts\.0\.a"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=["mitosis_split:parent=0,addresses=[2]"])


def test_tensors_that_are_resolved_before_they_are_compared_are_compared_with_each_other():
    for n in (1, 100, 10_000, 1_000_000):
        turned, other = torch.full((n,), 1 + 2j).conj(), torch.full((n,), 7 - 1j)
        assert not same_bits(turned, other)
        assert same_bits(turned, torch.full((n,), 1 - 2j))
        assert same_bits(torch.full((n,), 1 - 2j), turned)


def test_a_digit_of_another_script_is_no_digit_of_an_expert(tmp_path):
    model = {"head.experts.0.w": torch.ones(1), "head.experts.1\u0663.w": torch.ones(1)}
    torch.save({"model": model}, tmp_path / "a.pt")
    with pytest.raises(vc.CkptError, match="an expert's tensor must be called"):
        vc.open(tmp_path / "a.pt")


def test_lifecycle_rows_in_any_order_are_the_rows_of_their_experts(tmp_path):
    shutil.copytree(DATA / "modular_experts3", tmp_path / "a")
    meta = json.loads((tmp_path / "a/experts/meta.json").read_text())
    rows = {row["id"]: row for row in meta["experts"]}
    meta["experts"].reverse()
    (tmp_path / "a/experts/meta.json").write_text(json.dumps(meta))
    for target in ("b.pt", "c.safetensors", "d/"):
        vc.convert(tmp_path / "a", f"{tmp_path}/{target}")
        found = vc.open(tmp_path / target).lifecycle
        assert {i: (row.contrib, row.created_step) for i, row in found.items()} == {
            i: (row["contrib"], row["created_step"]) for i, row in rows.items()
        }
