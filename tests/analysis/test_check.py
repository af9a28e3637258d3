"""`check`: every finding at once, and an exit code that can be relied on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import DATA, DIRECTORIES, MONOLITHS, load

import vraxion_ckpt as vc
from vraxion_ckpt.errors import UnknownFormatError, UsageError

NAMED = DATA / "named_experts3.pt"
EXPERTS3 = DATA / "modular_experts3"


def lay(folder: Path) -> Path:
    shutil.copytree(EXPERTS3, folder)
    return folder


def told(checked, severity="error"):
    return [f"{finding.where}: {finding.what}" for finding in checked.findings if finding.severity == severity]


@pytest.mark.parametrize("source", [*MONOLITHS, *DIRECTORIES], ids=lambda path: path.name)
def test_every_real_checkpoint_is_sound_in_every_format(source, tmp_path, run_cli):
    vc.convert(source, tmp_path / "a.safetensors")
    vc.convert(source, tmp_path / "shards", to="safetensors:max_shard_size=20KB")
    for path in (source, tmp_path / "a.safetensors", tmp_path / "shards"):
        code, said, complained = run_cli("check", path)
        assert (code, complained) == (0, "")
        assert "sound" in said
        assert max(map(len, said.splitlines())) <= 80


def test_everything_that_is_wrong_with_a_directory_is_told_at_once(tmp_path, run_cli):
    path = lay(tmp_path / "run")
    meta = json.loads((path / "experts/meta.json").read_text())
    (path / "experts/meta.json").write_text(json.dumps(meta | {"step": meta["step"] + 1}))
    damaged = bytearray((path / "experts/expert_000.pt").read_bytes())
    place = damaged.find(load(path / "experts/expert_000.pt")["weight"].numpy().tobytes())
    damaged[place] ^= 1
    (path / "experts/expert_000.pt").write_bytes(damaged)
    shard = load(path / "experts/expert_001.pt")
    torch.save({"weight": shard["weight"][:2].clone(), "bias": shard["bias"]}, path / "experts/expert_001.pt")
    (path / "experts/expert_002.pt").write_bytes(b"")
    errors = told(vc.check(path))
    for part in (
        "parts of two saves",
        "data/0]: its checksum does not match its bytes",
        "expert_001.pt [weight]: is float32 [2, 16] in the shard of expert 1",
        "the shard of expert 2 is empty",
    ):
        assert any(part in line for line in errors), (part, errors)
    code, said, _ = run_cli("check", path)
    assert code == 1
    assert "NOT SOUND" in said
    assert max(map(len, said.splitlines())) <= 80


def test_a_mixed_save_of_a_killed_trainer_is_told_with_what_to_do(tmp_path):
    path = lay(tmp_path / "run")
    payload = load(path / "system/router.state")
    payload["step"] += 1
    torch.save(payload, path / "system/router.state")
    (path / "experts/expert_002.pt").unlink()
    checked = vc.check(path)
    assert not checked.sound
    assert [finding.hint for finding in checked.findings if "two saves" in finding.what] == [
        "a trainer was probably killed while saving; use an older checkpoint"
    ]
    assert any("expert_002.pt is missing" in line for line in told(checked))


def test_one_expert_in_a_list_is_loaded_by_no_runtime(tmp_path, run_cli):
    with pytest.warns(vc.CkptWarning, match="loaded by no runtime"):
        vc.convert(DATA / "wallclock_single.pt", tmp_path / "a.pt", transforms=["single_to_experts"])
    code, said, _ = run_cli("check", tmp_path / "a.pt")
    assert code == 1
    assert "a runtime with one expert expects head.single" in said
    assert run_cli("check", DATA / "wallclock_single.pt")[0] == 0


def test_every_damaged_member_of_a_file_is_named(tmp_path):
    data = bytearray(NAMED.read_bytes())
    model = load(NAMED)["model"]
    names = ["input_proj.weight", "head.experts.1.weight", "head.experts.2.weight"]
    for name in names:
        place = bytes(data).find(model[name].numpy().tobytes())
        assert place > 0
        data[place] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    (line,) = told(vc.check(tmp_path / "a.pt"))
    assert "its checksum does not match its bytes" in line
    assert line.count("/data/") == len(names)


def test_what_loads_and_is_not_meant_is_a_warning_and_the_exit_code_stays_0(tmp_path, run_cli):
    payload = load(NAMED)
    payload["model"]["input_proj.weight"][0, 0] = float("nan")
    payload["optim"]["state"][0]["exp_avg"][0] = float("inf")
    payload["model"]["router_map"][payload["model"]["router_map"] == 1] = 0
    torch.save(payload, tmp_path / "a.pt")
    checked = vc.check(tmp_path / "a.pt")
    assert checked.sound
    warnings = told(checked, "warning")
    assert "input_proj.weight: 1 NaN of" in " ".join(warnings)
    assert "1 infinite of" in " ".join(warnings)
    assert "no address belongs to expert 1" in " ".join(warnings)
    assert run_cli("check", tmp_path / "a.pt")[0] == 0


def test_an_optimizer_that_no_chain_can_carry_is_a_warning_and_an_undecided_one_a_note(tmp_path):
    state = {0: {"exp_avg": torch.zeros(2)}}
    optim = {"state": state, "param_groups": [{"params": [0]}]}
    model = {"head.single.weight": torch.ones(2), "a": torch.ones(2)}
    torch.save({"model": model, "optim": optim}, tmp_path / "x.pt")
    checked = vc.check(tmp_path / "x.pt")
    assert checked.sound
    assert [f.where for f in checked.findings if f.rule == "binding" and f.severity == "note"] == ["optimizer"]
    assert told(vc.check(tmp_path / "x.pt", param_names=["a"]), "warning") == []
    torch.save({"model": {"a": torch.ones(3)}, "optim": optim}, tmp_path / "y.pt")
    checked = vc.check(tmp_path / "y.pt")
    assert checked.sound
    assert [f.severity for f in checked.findings if f.rule == "binding"] == ["warning"]


def test_a_missing_meta_json_and_other_peoples_files_are_told(tmp_path):
    path = lay(tmp_path / "run")
    (path / "experts/meta.json").unlink()
    (path / "notes.txt").write_text("hello")
    checked = vc.check(path)
    assert checked.sound
    assert "meta.json is missing" in " ".join(told(checked, "warning"))
    assert "notes.txt" in " ".join(told(checked, "note"))


def test_rows_of_a_later_step_are_told(tmp_path):
    path = lay(tmp_path / "run")
    meta = json.loads((path / "experts/meta.json").read_text())
    meta["experts"][1]["last_used_step"] = 1_000
    (path / "experts/meta.json").write_text(json.dumps(meta))
    assert "the lifecycle row of expert 1 is later than" in " ".join(told(vc.check(path), "warning"))


def test_invariants_are_all_told(tmp_path):
    payload = load(NAMED)
    payload["num_experts"] = 4
    payload["model"]["router_map"][3] = 7
    payload["model"]["head.experts.1.bias"] = payload["model"]["head.experts.1.bias"].double()
    torch.save(payload, tmp_path / "a.pt")
    errors = " ".join(told(vc.check(tmp_path / "a.pt")))
    assert "num_experts is 4, but the model has 3" in errors
    assert "address 3 to expert 7" in errors
    assert "bias is float64 [4] in expert 1" in errors


def test_a_shard_of_a_folder_that_is_damaged_does_not_hide_another(tmp_path):
    vc.convert(NAMED, tmp_path / "shards", to="safetensors:max_shard_size=5KB")
    first, second, *_ = sorted((tmp_path / "shards").glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    errors = told(vc.check(tmp_path / "shards"))
    assert any(first.name in line for line in errors)
    assert any(second.name in line for line in errors)


def test_what_is_no_checkpoint_is_an_error_of_the_call(tmp_path, run_cli):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UnknownFormatError):
        vc.check(tmp_path / "a.txt")
    with pytest.raises(UsageError, match="no such file"):
        vc.check(tmp_path / "nowhere.pt")
    with pytest.raises(UsageError, match="no such file"):
        vc.check(NAMED, manifest=tmp_path / "nowhere.json")
    assert run_cli("check", tmp_path / "a.txt")[0] == 3
    (tmp_path / "empty.pt").write_bytes(b"")
    assert run_cli("check", tmp_path / "empty.pt")[0] == 1


def test_quiet_only_answers_by_the_exit_code(tmp_path, run_cli):
    assert run_cli("-q", "check", NAMED) == (0, "", "")
    (tmp_path / "empty.pt").write_bytes(b"")
    assert run_cli("-q", "check", tmp_path / "empty.pt") == (1, "", "")


def test_a_parameter_that_the_model_lacks_is_an_error(tmp_path):
    payload = load(NAMED)
    payload["model"].pop("walk_head.bias")
    torch.save(payload, tmp_path / "a.pt")
    payload["optim"] = None
    torch.save(payload, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        assert "the model lacks walk_head.bias" in " ".join(told(vc.check(tmp_path / name)))


def test_numbers_that_are_not_finite_are_named_with_their_place(tmp_path):
    payload = load(NAMED)
    payload["optim"]["param_groups"][0]["lr"] = float("nan")
    payload["losses"][1] = float("inf")
    payload["optim"]["state"][3]["exp_avg"][0] = float("nan")
    torch.save(payload, tmp_path / "a.pt")
    warnings = " ".join(told(vc.check(tmp_path / "a.pt"), "warning"))
    assert "optimizer.groups[0].lr: is nan" in warnings
    assert "payload.losses[1]: is inf" in warnings
    assert f"optimizer.state.{payload['param_names'][3]}.exp_avg: 1 NaN" in warnings


def test_a_part_of_a_directory_stands_for_all_of_it(tmp_path):
    run = lay(tmp_path / "run")
    vc.edit(run, manifest=tmp_path / "m.json")
    assert vc.check(run / "system/router.state", manifest=tmp_path / "m.json").sound


# --- manifests ---


def test_a_manifest_finds_a_flipped_bit_where_the_format_has_no_checksum(tmp_path, run_cli):
    vc.convert(NAMED, tmp_path / "a.safetensors", manifest=tmp_path / "a.json")
    assert run_cli("check", tmp_path / "a.safetensors", "--manifest", tmp_path / "a.json")[0] == 0
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    assert run_cli("check", tmp_path / "a.safetensors")[0] == 0
    code, said, _ = run_cli("check", tmp_path / "a.safetensors", "--manifest", tmp_path / "a.json")
    assert code == 1
    assert "sha256" in said
