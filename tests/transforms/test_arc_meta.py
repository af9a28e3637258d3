"""Sources of visits, both policies, and the probe of the VRAXION runtime."""

from __future__ import annotations

import json
import sys
import types
from typing import ClassVar

import numpy as np
import pluggy
import pytest
import torch
from support import DATA, EXPECTED, load

import vraxion_ckpt as vc
from vraxion_ckpt.conversion.chain import apply_chain
from vraxion_ckpt.plugins import discovery

VISITS = json.loads((EXPECTED / "wallclock_experts3.visits.json").read_text())["visits"]
THEIRS = json.loads((EXPECTED / "wallclock_experts3.mitosis_meta.json").read_text())


def planned(options: dict, checkpoint: vc.Checkpoint | None = None) -> vc.SplitPlan:
    checkpoint = checkpoint or vc.open(DATA / "wallclock_experts3.pt")
    return apply_chain(checkpoint, discovery.resolve_chain([("arc_meta", options)]))[0].plan


def write(kind: str, folder, visits, loss_sum=None):
    path = folder / f"visits.{kind}"
    if kind == "npy":
        np.save(path, np.array(visits))
    elif kind == "csv":
        header = "address,visits" + ",loss_sum" * (loss_sum is not None)
        columns = zip(visits, loss_sum, strict=True) if loss_sum is not None else ((v,) for v in visits)
        rows = [",".join(map(str, (address, *row))) for address, row in enumerate(columns)]
        path.write_text("\n".join([header, *reversed(rows)]))
    else:
        path.write_text(json.dumps({"visits": visits, "loss_sum": loss_sum} if loss_sum is not None else visits))
    return path


@pytest.mark.parametrize("kind", ["json", "npy", "csv"])
def test_every_kind_of_file_gives_the_original_plan(kind, tmp_path):
    plan = planned({"visits": write(kind, tmp_path, VISITS)})
    assert (plan.parent, list(plan.addresses)) == (THEIRS["parent_expert"], THEIRS["hot_addresses"])
    assert plan.arc == (THEIRS["hot_arc"]["start"], THEIRS["hot_arc"]["len"])


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_topk_loss_weighs_by_loss_and_keeps_the_addresses_with_the_highest_mean(kind, tmp_path):
    """Compare with a direct implementation of the specification, on numbers that are exact in binary."""
    rng = np.random.default_rng(5)
    visits = rng.integers(0, 5, 64).tolist()
    losses = [v * float(rng.integers(1, 64)) / 8 for v in visits]
    plan = planned({"visits": write(kind, tmp_path, visits, losses), "policy": "topk_loss", "top_k": 3, "arc_len": 30})

    owners = [a % 3 for a in range(64)]
    sums = [sum(losses[a] for a in range(64) if owners[a] == e) for e in range(3)]
    parent = sums.index(max(sums))
    arcs = [sum(losses[a % 64] for a in range(s, s + 30) if owners[a % 64] == parent) for s in range(64)]
    start = arcs.index(max(arcs))
    owned = [a % 64 for a in range(start, start + 30) if owners[a % 64] == parent]
    best = sorted((a for a in owned if visits[a]), key=lambda a: -losses[a] / visits[a])[:3]
    assert (plan.parent, plan.arc) == (parent, (start, 30))
    assert list(plan.addresses) == [a for a in owned if a in best]
    assert plan.metrics["arc_score"] == max(arcs)
    of_parent = sum(v for v, owner in zip(visits, owners, strict=True) if owner == parent)
    assert plan.metrics["parent_share"] == of_parent / sum(visits)
    assert plan.metrics["ptr_samples"] == sum(visits)
    assert plan.metrics["dropped_non_parent"] == 30 - len(owned)


def test_the_parent_can_be_given_and_auto_is_the_default_arc(tmp_path):
    visits = write("json", tmp_path, VISITS)
    assert planned({"visits": visits, "parent": 0}).parent == 0
    assert planned({"visits": visits, "arc_len": "auto"}) == planned({"visits": visits})
    assert planned({"visits": visits, "arc_len": 10**6, "allow_empty_parent": True}).arc == (0, 64)


REQUEST = {"acc": 0.5, "slope": 0.0, "imbalance": 0.7, "window": 10, "parent_expert": 1, "hot_addresses": [61, 1, 4]}


def test_the_trainers_request_is_taken_if_there_is_no_file(tmp_path):
    payload = load(DATA / "wallclock_experts3.pt")
    torch.save({**payload, "mitosis": REQUEST}, tmp_path / "asks.pt")
    plan = planned({}, vc.open(tmp_path / "asks.pt"))
    assert (plan.parent, plan.addresses, plan.arc) == (1, (61, 1, 4), (61, 8))
    from_file = planned({"visits": write("json", tmp_path, VISITS)}, vc.open(tmp_path / "asks.pt"))
    assert from_file.parent == THEIRS["parent_expert"]
    # mitosis_split alone also uses it, and replaces it by a record of the split.
    vc.convert(tmp_path / "asks.pt", tmp_path / "done.pt", transforms=["mitosis_split:noise=0"])
    done = load(tmp_path / "done.pt")
    assert done["mitosis"] == {"parent": 1, "child": 3, "addresses": [61, 1, 4], "noise": 0.0}
    # That record is not a request for another split.
    with pytest.raises(vc.TransformError, match="there is no plan"):
        vc.convert(tmp_path / "done.pt", tmp_path / "again.pt", transforms=["mitosis_split"])


def test_a_plan_waits_in_the_checkpoint_until_it_is_carried_out(tmp_path):
    visits = write("json", tmp_path, VISITS)
    for target in ("planned.pt", "planned/"):
        vc.convert(
            DATA / "wallclock_experts3.pt", f"{tmp_path}/{target}", transforms=[("arc_meta", {"visits": visits})]
        )
        assert vc.open(tmp_path / target).plan == planned({"visits": visits})
        vc.convert(tmp_path / target, tmp_path / "split.pt", transforms=["mitosis_split"], overwrite=True)
        split = vc.open(tmp_path / "split.pt")
        assert (split.num_experts, split.plan) == (4, None)
        assert [int(a) for a in (split.router_map == 3).nonzero()] == THEIRS["hot_addresses"]


# --- probes ---


@pytest.fixture
def probe():
    """Return a function that registers a probe for the duration of the test."""
    manager = discovery.registry().manager
    registered = []

    def register(function):
        plugin = types.SimpleNamespace(probe_visits=pluggy.HookimplMarker("vraxion_ckpt")(function))
        registered.append(manager.register(plugin))

    yield register
    for name in registered:
        manager.unregister(name=name)


def test_a_probe_answers_last_and_is_checked(probe):
    answers = [vc.Visits(np.array(VISITS))]
    probe(lambda checkpoint: answers[0] if checkpoint.num_experts == 3 else None)
    assert list(planned({}).addresses) == THEIRS["hot_addresses"]
    answers[0] = vc.Visits(np.array(VISITS[:-1]))
    with pytest.raises(vc.CkptError, match="63 visits for 64 addresses"):
        planned({})
    answers[0] = vc.Visits(np.array([float("nan")] * 64))
    with pytest.raises(vc.CkptError, match="not finite"):
        planned({})
    with pytest.raises(vc.TransformError, match="no visit counts"):
        planned({}, vc.open(DATA / "wallclock_single.pt"))


def test_a_probe_that_fails_is_named(probe):
    def fails(checkpoint):  # noqa: ARG001 - the hook passes it by name
        raise RuntimeError("no GPU")

    probe(fails)
    with pytest.raises(vc.CkptError, match="no GPU") as refusal:
        planned({})
    assert refusal.value.exit_code == 15


@pytest.fixture
def runtime(monkeypatch):
    """Install a fake of VRAXION's runtime with the interface that the probe uses."""

    class AbsoluteHallway(torch.nn.Module):
        built: ClassVar[list] = []
        parts: ClassVar[dict] = {}  # further parameters, by the name and the shape

        def __init__(self, input_dim, num_classes, ring_len, slot_dim):
            super().__init__()
            torch.randn(3)  # building draws random numbers, as the real one does
            body = load(DATA / "wallclock_experts3.pt")["model"]
            shapes = {name: t.shape for name, t in body.items() if not name.startswith("head.")} | self.parts
            for name, shape in shapes.items():
                place = self
                *modules, leaf = name.split(".")
                for module_name in modules:
                    if not hasattr(place, module_name):
                        place.add_module(module_name, torch.nn.Module())
                    place = getattr(place, module_name)
                place.register_buffer(leaf, torch.zeros(shape))
            self.built.append((input_dim, num_classes, ring_len, slot_dim, module.EXPERT_HEADS))

        def forward(self, x):
            # Some positions are outside the ring at both ends, to be clamped.
            self.last_ptr_int = (x.sum(dim=(1, 2)) * 4 + 32).round().long()
            assert not self.training
            assert float(self.theta_ptr_reduced.abs().sum()) > 0

    module = types.ModuleType("vraxion.instnct.absolute_hallway")
    module.__spec__ = types.SimpleNamespace(name=module.__name__)
    module.EXPERT_HEADS = 1
    module.AbsoluteHallway = AbsoluteHallway
    for name in ("vraxion", "vraxion.instnct"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_the_runtime_probe_builds_the_model_from_the_checkpoint_and_leaves_no_trace(runtime):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    visits = discovery.run_probes(vc.open(DATA / "wallclock_experts3.pt")).visits
    assert torch.equal(before, torch.get_rng_state())
    assert runtime.EXPERT_HEADS == 1
    assert runtime.AbsoluteHallway.built == [(1, 4, 64, 16, 3)]

    torch.manual_seed(1337)
    wanted = torch.zeros(64, dtype=torch.int64)
    for _ in range(64):
        ended = (torch.randn(64, 16, 1).sum(dim=(1, 2)) * 4 + 32).round().long().clamp(0, 63)
        wanted += torch.bincount(ended, minlength=64)
    assert visits.tolist() == wanted.tolist()
    assert visits.sum() == 4096


def test_the_environment_that_the_runtime_reads_is_recorded_with_the_plan(runtime, monkeypatch, tmp_path, run_cli):  # noqa: ARG001
    monkeypatch.setenv("VRX_SENSORY_RING", "0")
    source = DATA / "wallclock_experts3.pt"
    code, said, _ = run_cli("-v", "convert", source, tmp_path / "a.pt", "-t", f"arc_meta:output={tmp_path}/plan.json")
    assert code == 0
    assert "VRX_SENSORY_RING=0" in said
    assert "VRX_SENSORY_RING=0" in json.loads((tmp_path / "plan.json").read_text())["note"]
    facts = vc.inspect(tmp_path / "a.pt")
    assert "with VRX_SENSORY_RING=0" in facts.plan.note
    assert "with VRX_SENSORY_RING=0" in facts.history[-1].summary
    monkeypatch.delenv("VRX_SENSORY_RING")
    assert "no VRX_* environment variable" in discovery.run_probes(vc.open(source)).note


def test_weights_that_do_not_match_the_runtimes_are_named(runtime):
    body = vc.open(DATA / "wallclock_experts3.pt")
    body.core["vault_up.weight"] = torch.ones(2, 2)
    with pytest.warns(vc.CkptWarning, match=r"1 weight of the checkpoint not used .*\(vault_up.weight\)"):
        discovery.run_probes(body)
    runtime.AbsoluteHallway.parts = {"think_gru.weight": (2, 2), "head.experts.0.weight": (2, 2)}
    with pytest.warns(
        vc.CkptWarning, match=r"1 weight of VRAXION's runtime not in the checkpoint.*\(think_gru.weight\)"
    ) as told:
        discovery.run_probes(vc.open(DATA / "wallclock_experts3.pt"))
    assert len(told) == 1
    runtime.AbsoluteHallway.parts = {"theta_ptr_reduced": (128,)}
    with pytest.raises(vc.CkptError, match="builds another model") as refusal:
        discovery.run_probes(vc.open(DATA / "wallclock_experts3.pt"))
    assert refusal.value.exit_code == 15


def test_without_the_runtime_the_probe_is_silent_and_the_error_says_what_is_missing():
    assert discovery.run_probes(vc.open(DATA / "wallclock_experts3.pt")) is None
    with pytest.raises(vc.TransformError) as refusal:
        planned({})
    assert "VRAXION's runtime is missing" in refusal.value.hint
    assert "PYTHONPATH" in refusal.value.hint


def test_a_runtime_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    package = tmp_path / "vraxion" / "instnct"
    package.mkdir(parents=True)
    (package / "absolute_hallway.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("vraxion", "vraxion.instnct", "vraxion.instnct.absolute_hallway"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what the import leaves there goes again
        del sys.modules[name]
    with pytest.raises(
        vc.CkptError, match=r"cannot be imported: ModuleNotFoundError: .*no_such_module_at_all"
    ) as refusal:
        planned({})
    assert refusal.value.exit_code == 15
    foreign = vc.open(DATA / "wallclock_experts3.pt")
    del foreign.core["input_proj.weight"]
    assert discovery.run_probes(foreign) is None  # no model of VRAXION's, so its runtime is not asked for
