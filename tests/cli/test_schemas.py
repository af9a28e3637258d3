"""All JSON output is valid under its published schema."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
from support import DATA, DIRECTORIES, EXPECTED, MONOLITHS

from vraxion_ckpt.cli.schemas import SCHEMAS, schema_of

NAMED = DATA / "named_experts3.pt"
SPLIT = "mitosis_split:parent=0,addresses=[0,3]"
VISITS = EXPECTED / "wallclock_experts3.visits.json"


def validate(said: str) -> dict:
    """Validate a printed document with the schema that it names."""
    facts = json.loads(said, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    name = facts["schema"].split("/")[1]
    published = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(published)
    jsonschema.validate(facts, published, cls=jsonschema.Draft202012Validator)
    return facts


@pytest.mark.parametrize("source", [*MONOLITHS, *DIRECTORIES], ids=lambda path: path.name)
def test_what_looks_at_real_checkpoints(source, run_cli):
    validate(run_cli("inspect", source, "--json")[1])
    validate(run_cli("inspect", source, "--values", "--json")[1])
    validate(run_cli("check", source, "--json")[1])
    validate(run_cli("diff", source, NAMED, "--json")[1])


def test_what_changes_checkpoints(tmp_path, run_cli):
    validate(run_cli("convert", NAMED, tmp_path / "a.pt", "-t", SPLIT, "--json")[1])
    validate(run_cli("convert", DATA / "raw_state_dict.pt", f"{tmp_path}/b/", "--json", "--dry-run")[1])
    weights = ["--to", "safetensors:weights_only=true", "--losses", "ignore"]
    lossy = validate(run_cli("convert", NAMED, tmp_path / "c.safetensors", *weights, "--json")[1])
    assert lossy["losses"]
    run_cli("convert", NAMED, f"{tmp_path}/run/")
    validate(run_cli("edit", tmp_path / "run", "-t", SPLIT, "--keep-old", "--json")[1])
    validate(run_cli("edit", tmp_path / "run", "--json")[1])


def test_what_is_infinite_or_no_number(tmp_path, run_cli):
    payload = torch.load(NAMED, weights_only=True)
    payload["optim"]["param_groups"][0]["lr"] = float("nan")
    payload["step"] = float("inf")
    payload["odd"] = {"deep": [float("-inf"), torch.tensor(1e300), 10**400, b"".hex(), None]}
    payload["model"]["input_proj.weight"][0] = float("inf")
    torch.save(payload, tmp_path / "a.pt")
    assert validate(run_cli("inspect", tmp_path / "a.pt", "--values", "--json")[1])["step"] == "inf"
    validate(run_cli("check", tmp_path / "a.pt", "--json")[1])
    assert validate(run_cli("diff", NAMED, tmp_path / "a.pt", "--json")[1])["identical"] is False
    split = "mitosis_split:parent=0,addresses=[1],foreign_addresses=allow"
    adapters = DATA / "wallclock_adapter_experts.pt"
    facts = validate(run_cli("convert", adapters, tmp_path / "b.pt", "-t", split, "--json")[1])
    assert facts["function_preserved"]["max_abs"] == "inf"


def test_signs_and_plans(tmp_path, run_cli):
    run_cli("convert", DATA / "wallclock_experts3.pt", tmp_path / "a.pt", "-t", f"arc_meta:visits={VISITS}")
    facts = validate(run_cli("inspect", tmp_path / "a.pt", "--visits", VISITS, "--json")[1])
    assert facts["plan"]
    assert facts["signs"]["predicted"]


def test_what_is_installed(run_cli):
    validate(run_cli("plugins", "--json")[1])
    for name in ("pt", "safetensors", "arc_meta", "mitosis_split"):
        validate(run_cli("describe", name, "--json")[1])


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_allows_nothing_that_it_does_not_name(name, run_cli):
    code, said, _ = run_cli("schema", name)
    published = json.loads(said)
    assert code == 0
    assert published["$id"] == SCHEMAS[name].schema_name()
    assert published["additionalProperties"] is False
    described = [value for key, value in published["properties"].items() if key == "schema" or "description" in value]
    assert described


def test_the_schemas_are_listed_and_an_unknown_one_is_refused(run_cli):
    code, said, _ = run_cli("schema")
    assert code == 0
    assert all(f"vraxion-ckpt/{name}/" in said for name in SCHEMAS)
    code, _, complained = run_cli("schema", "nonsense")
    assert code == 2
    assert "one of convert" in complained
