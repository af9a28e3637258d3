"""What `check` sees in an optimizer's state, on real checkpoints that were spoilt in one place each."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support import DATA, DIRECTORIES, EXPECTED, MONOLITHS, load
from torch import nn

import vraxion_ckpt as vc

NAMED = DATA / "named_experts3.pt"
TRUE_WARNINGS = {"hibernated.pt": ["hibernated"]}
TRAINERS = [
    DATA / "trainers" / name for name in ("before_the_original_split.pt", "hibernated.pt", "mitosis_request.pt")
]
ORIGINALS = [EXPECTED / name for name in ("named_experts3.split.pt", "named_experts3.prune_2_into_0.pt")]


def found(path, *, severity=None, rule=None):
    findings = vc.check(path).findings
    return [
        f"{f.where}: {f.what}"
        for f in findings
        if (severity is None or f.severity == severity) and (rule is None or f.rule == rule)
    ]


def spoilt(tmp_path, change, source=NAMED):
    payload = load(source)
    change(payload)
    torch.save(payload, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def slots(payload, name):
    return payload["optim"]["state"][payload["param_names"].index(name)]


E1 = "head.experts.1.weight"


@pytest.mark.parametrize("source", [*MONOLITHS, *DIRECTORIES, *TRAINERS, *ORIGINALS], ids=lambda path: path.name)
def test_real_checkpoints_are_free_of_errors_and_of_warnings_that_are_not_true(source):
    bad = [finding.rule for finding in vc.check(source).findings if finding.severity != "note"]
    assert bad == TRUE_WARNINGS.get(source.name, [])


# --- values ---


@pytest.mark.parametrize("named", [True, False])
def test_a_negative_mean_of_squares_is_told_with_its_place_and_number(named, tmp_path):
    def change(payload):
        slots(payload, E1)["exp_avg_sq"].view(-1)[:3] = -1e-9
        slots(payload, E1)["exp_avg"].fill_(-1.0)  # which may be
        slots(payload, E1)["exp_avg_sq"].view(-1)[5] = -0.0
        if not named:
            payload["model"]["twin"] = payload["model"]["head.experts.0.bias"].clone()
            del payload["param_names"]

    (line,) = found(spoilt(tmp_path, change), severity="warning", rule="negative")
    assert "3 of 64 elements are negative" in line
    if named:
        assert line.startswith(f"optimizer.state.{E1}.exp_avg_sq:")


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "Adafactor": torch.optim.Adafactor,
    "SGD": lambda p: torch.optim.SGD(p, momentum=0.9),
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
}


def trained(make, tmp_path, change=lambda _: None):
    """Train a small model with an optimizer of torch's and save both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    optimizer = make(model.named_parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    state = optimizer.state_dict()
    change(state["state"])
    torch.save({"model": model.state_dict(), "optim": state, "step": 3}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def ours(path):
    rules = ("negative", "state", "step", "dtype", "names")
    return [f"{f.rule}: {f.what}" for f in vc.check(path).findings if f.rule in rules]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_of_torchs_looks_wrong_as_it_is(name, tmp_path):
    assert ours(trained(OPTIMIZERS[name], tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("Adam", "exp_avg_sq"),
        ("Adam", "max_exp_avg_sq"),
        ("RMSprop", "square_avg"),
        ("Adagrad", "sum"),
        ("Adadelta", "acc_delta"),
        ("Adamax", "exp_inf"),
        ("NAdam", "exp_avg_sq"),
        ("Adafactor", "row_var"),
        ("Adafactor", "col_var"),
    ],
)
def test_what_no_optimizer_of_torchs_can_make_negative_is_known(name, slot, tmp_path):
    def change(state):
        state[0][slot].view(-1)[0] = -1.0

    assert [line.partition(":")[0] for line in ours(trained(OPTIMIZERS[name], tmp_path, change))] == ["negative"]


# --- slots, steps, dtypes ---


def test_a_slot_that_one_parameter_lacks_is_told(tmp_path):
    (line,) = found(
        spoilt(tmp_path, lambda payload: slots(payload, E1).pop("exp_avg_sq")), severity="warning", rule="state"
    )
    assert "slot exp_avg_sq is missing" in line
    assert E1 in line


def test_a_parameter_without_state_among_others_that_have_some_is_a_note(tmp_path):
    def change(payload):
        del payload["optim"]["state"][payload["param_names"].index(E1)]

    (line,) = found(spoilt(tmp_path, change), severity="note", rule="state")
    assert line.startswith("optimizer group 0: 3 of 31 parameters have no state")
    assert E1 in line
    (before,) = found(NAMED, severity="note", rule="state")
    assert "2 of 31 parameters have no state (input_proj.weight, input_proj.bias)" in before
    assert found(spoilt(tmp_path, lambda payload: payload["optim"]["state"].clear()), rule="state") == []


def test_steps_that_differ_are_a_note_that_says_whose():
    assert found(NAMED, rule="step") == []
    (line,) = found(DATA / "trainers/hibernated.pt", rule="step", severity="note")
    assert "step is 4 for 21 parameters, but 3 for 2 (head.experts.0.weight, head.experts.0.bias)" in line


@pytest.mark.parametrize(("value", "says"), [(-4, "is negative"), ("four", "not a number"), (torch.tensor(-1.0), "-1")])
def test_a_step_of_a_parameter_that_is_none_is_a_warning(value, says, tmp_path):
    (line,) = found(
        spoilt(tmp_path, lambda payload: slots(payload, E1).update(step=value)), severity="warning", rule="step"
    )
    assert says in line
    assert f"optimizer.state.{E1}.step" in line


def test_a_slot_of_another_dtype_than_its_siblings_is_told(tmp_path):
    def change(payload):
        slots(payload, E1)["exp_avg"] = slots(payload, E1)["exp_avg"].double()

    (line,) = found(spoilt(tmp_path, change), severity="warning", rule="dtype")
    assert f"slot exp_avg is float32 for 28 parameters, but float64 for {E1}" in line


def test_slots_that_follow_the_dtypes_of_their_parameters_are_as_they_should_be(tmp_path):
    def change(payload):
        for number, name in enumerate(payload["param_names"]):
            if name.startswith("head.") and number in payload["optim"]["state"]:
                payload["model"][name] = payload["model"][name].bfloat16()
                for slot in ("exp_avg", "exp_avg_sq"):
                    payload["optim"]["state"][number][slot] = payload["optim"]["state"][number][slot].bfloat16()

    assert found(spoilt(tmp_path, change), rule="dtype") == []


# --- the step of the payload, and the order of param_names ---


@pytest.mark.parametrize("step", [-4, "4", 4.0, True, [4], torch.tensor(4)], ids=repr)
def test_a_step_that_is_no_whole_number_is_a_warning_and_taken_for_no_fact(step, tmp_path):
    path = spoilt(tmp_path, lambda payload: payload.update(step=step))
    (line,) = found(path, severity="warning", rule="step")
    assert line.startswith("payload.step: is ")
    assert (vc.open(path).step, vc.open(path).known_step) == (0, None)
    vc.convert(path, tmp_path / "b.pt", transforms=["mitosis_split:parent=0,addresses=[0]"])
    assert vc.open(tmp_path / "b.pt").lifecycle[3].created_step == 0


def test_without_a_step_there_is_nothing_to_tell(tmp_path):
    assert found(spoilt(tmp_path, lambda payload: payload.pop("step")), rule="step") == []
    assert found(spoilt(tmp_path, lambda payload: payload.update(step=None)), rule="step") == []


@pytest.mark.parametrize("step", [-4, "4"])
def test_rows_are_not_compared_with_a_step_that_is_none(step, tmp_path):
    shutil.copytree(DATA / "modular_experts3", tmp_path / "run")
    router, meta = tmp_path / "run/system/router.state", tmp_path / "run/experts/meta.json"
    torch.save({**load(router), "step": step}, router)
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"step": step}))
    assert found(tmp_path / "run", rule="mixed saves") == []
    assert len(found(tmp_path / "run", rule="step")) == 1
    vc.edit(tmp_path / "run", transforms=["mitosis_split:parent=0,addresses=[0]"])
    assert json.loads(meta.read_text())["step"] == step
    assert vc.open(tmp_path / "run").num_experts == 4


def test_a_plan_and_a_step_that_is_not_known_do_not_match(tmp_path):
    visits = EXPECTED / "wallclock_experts3.visits.json"
    vc.convert(NAMED, tmp_path / "a.pt", transforms=[("arc_meta", {"visits": visits})])
    torch.save({**load(tmp_path / "a.pt"), "step": "5"}, tmp_path / "b.pt")
    with pytest.raises(vc.CkptError, match="made at step 4, but the checkpoint has no known step"):
        vc.convert(tmp_path / "b.pt", tmp_path / "c.pt", transforms=["mitosis_split"])


def test_param_names_in_another_order_than_the_model_are_a_note(tmp_path):
    assert found(NAMED, rule="names") == []

    def change(payload):
        names = payload["param_names"]
        a, b = names.index(E1), names.index("head.experts.2.weight")
        names[a], names[b] = names[b], names[a]

    (line,) = found(spoilt(tmp_path, change), rule="names", severity="note")
    assert "param_names: lists head.experts.2.weight before" in line

    def with_sorted_model(payload):
        payload["model"] = dict(sorted(payload["model"].items()))

    assert found(spoilt(tmp_path, with_sorted_model), rule="names") == []
