"""The output, errors and exit codes of the commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from support import DATA, DIRECTORIES, EXPECTED, MONOLITHS, load

from vraxion_ckpt import convert

SPLIT = ["-t", "mitosis_split:parent=0,addresses=[0,3],noise=0"]


def vraxion(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [forked.python(), *forked.COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80", **environment}, check=False
    )


@pytest.mark.parametrize("source", [*MONOLITHS, *DIRECTORIES], ids=lambda path: path.name)
def test_inspect_tells_the_facts_of_every_real_checkpoint(source):
    facts = json.loads(vraxion("inspect", source, "--json").stdout)
    assert facts["format"] == ("modular" if source.is_dir() else "pt")
    state = load(source / "system/router.state" if source.is_dir() else source)
    model = state.get("model", state)
    assert facts["ring"]["owners"] == model["router_map"].tolist()
    assert sum(expert["addresses"] for expert in facts["experts"]) == 64
    single = "head.single.weight" in model
    assert facts["head"] == ("single" if single else "experts")
    optimizer = state.get("optim", state.get("optimizer"))
    if optimizer is None:
        assert facts["optimizer"] is None
    else:
        assert facts["optimizer"]["bound"]
        assert facts["optimizer"]["with_state"] == len(optimizer["state"])
    assert {"modular", "pt"} <= facts["losses"].keys()
    assert not any(facts["losses"].values())


def test_inspect_draws_the_ring_in_80_columns_without_escape_codes_off_a_terminal():
    done = vraxion("inspect", DATA / "named_experts3.pt")
    assert "012012012" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "bound by param_names of the payload" in " ".join(done.stdout.split())


def test_inspect_says_that_and_why_an_optimizer_is_not_bound(tmp_path):
    core = {"a": torch.zeros(3)}
    state = {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(1.0)}}
    optim = {"state": state, "param_groups": [{"params": [0]}]}
    torch.save({"model": core, "optim": optim}, tmp_path / "x.pt")
    done = vraxion("inspect", tmp_path / "x.pt")
    assert done.returncode == 0
    assert "NOT BOUND" in done.stdout
    facts = json.loads(vraxion("inspect", tmp_path / "x.pt", "--json").stdout)
    assert facts["optimizer"]["bound"] is False
    assert "no tensor has shape [2], which optimizer id 0 needs" in facts["optimizer"]["how"]
    torch.save({"model": {"a": torch.zeros(2), "b": torch.zeros(2)}, "optim": optim}, tmp_path / "x.pt")
    (tmp_path / "names.txt").write_text("b\n")
    facts = json.loads(vraxion("inspect", tmp_path / "x.pt", "--json", "--param-names", tmp_path / "names.txt").stdout)
    assert facts["optimizer"]["how"] == "given names"


def test_convert_prints_a_summary_and_the_same_as_json(tmp_path):
    text = vraxion("convert", DATA / "named_experts3.pt", tmp_path / "a.pt", *SPLIT).stdout
    assert "3 → 4, 2 addresses moved" in text
    assert "33 copied, 2 created, 1 changed" in text
    assert "bit-identical at all 64 addresses" in text
    assert max(map(len, text.splitlines())) <= 80
    facts = json.loads(vraxion("convert", DATA / "named_experts3.pt", tmp_path / "b.pt", *SPLIT, "--json").stdout)
    assert facts["schema"] == "vraxion-ckpt/convert/1"
    assert (facts["experts_before"], facts["experts_after"], facts["addresses_moved"]) == (3, 4, 2)
    assert facts["tensors"] == {"copied": 33, "renamed": 0, "created": 2, "changed": 1, "dropped": 0}
    assert facts["function_preserved"] == {"addresses": 64, "changed": 0, "max_abs": 0.0, "noise": 0.0, "nonfinite": 0}
    assert facts["bytes_written"] == (tmp_path / "b.pt").stat().st_size
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_noise_is_reported_as_what_it_is(tmp_path):
    split = "mitosis_split:parent=0,addresses=[0,3],noise=0.01"
    done = vraxion("convert", DATA / "named_experts3.pt", tmp_path / "a.pt", "-t", split, "--json")
    kept = json.loads(done.stdout)["function_preserved"]
    model = load(tmp_path / "a.pt")["model"]
    leaves = ("weight", "bias")
    noise = torch.cat([(model[f"head.experts.3.{n}"] - model[f"head.experts.0.{n}"]).flatten() for n in leaves])
    assert kept["changed"] == 2
    assert kept["max_abs"] == pytest.approx(float(noise.abs().max()), rel=1e-5)
    assert 0.005 < float(noise.std()) < 0.02


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path):
    chain = ["-t", f"arc_meta:visits={EXPECTED}/wallclock_experts3.visits.json,output={tmp_path}/plan.json"]
    arguments = ["convert", DATA / "named_experts3.pt", tmp_path / "a.pt", *chain, "--json"]
    dry = json.loads(vraxion(*arguments, "--dry-run").stdout)
    assert list(tmp_path.iterdir()) == []
    wet = json.loads(vraxion(*arguments).stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "plan.json"}
    for key in wet.keys() - {"seconds", "bytes_written", "dry_run"}:
        assert dry[key] == wet[key]


@pytest.mark.parametrize("target", ["there.pt", "there/"])
def test_overwrite_replaces_and_keeps_the_mode_bits(target, tmp_path):
    path = tmp_path / target
    assert vraxion("convert", DATA / "named_experts3.pt", f"{tmp_path}/{target}").returncode == 0
    file = path if path.is_file() else path / "system/router.state"
    file.chmod(0o640)
    refused = vraxion("convert", DATA / "named_experts3.pt", path, *SPLIT)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert vraxion("convert", DATA / "named_experts3.pt", path, *SPLIT, "--overwrite").returncode == 0
    assert load(file)["num_experts"] == 4
    assert file.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_link_to_the_target_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "latest.pt").symlink_to("real/ckpt.pt")
    assert vraxion("convert", DATA / "named_experts3.pt", tmp_path / "latest.pt").returncode == 0
    assert (tmp_path / "latest.pt").is_symlink()
    assert load(tmp_path / "real/ckpt.pt")["num_experts"] == 3


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path):
    """A limit on the file size simulates a full disk: writes fail in the same place."""
    old = (DATA / "named_experts3.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(old)
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from vraxion_ckpt.cli import main; main(sys.argv[1:])"
    )
    arguments = ["convert", str(DATA / "wallclock_single.pt"), str(tmp_path / "old.pt"), "--overwrite"]
    done = subprocess.run([forked.python(), "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 14, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["old.pt"]
    assert (tmp_path / "old.pt").read_bytes() == old


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_conversion_leaves_nothing(number, code, tmp_path):
    """The probe below sleeps while the result is being staged, so the signal arrives at that time."""
    script = (
        "import sys, time, vraxion_ckpt.formats.torch_writer as t; save = t.save_torch_file\n"
        "def slow(value, path):\n"
        "    save(value, path); print('staged', file=sys.stderr, flush=True); time.sleep(300)\n"
        "t.save_torch_file = slow\n"
        "from vraxion_ckpt.cli import main; main(sys.argv[1:])"
    )
    arguments = ["convert", str(DATA / "named_experts3.pt"), f"{tmp_path}/out/"]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "staged\n"
    assert list(tmp_path.iterdir()) != []
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert"], ["inspect", "nowhere.pt"], ["nonsense"]])
def test_help_version_and_usage_errors_do_not_import_torch(arguments):
    script = (
        "import sys; from vraxion_ckpt.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False"
    assert done.returncode == (0 if arguments[0].startswith("--") else 2)


@pytest.fixture(scope="module")
def in_each_format(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    return [convert(DATA / "named_experts3.pt", f"{folder}/{name}").target for name in ("a.pt", "a.safetensors", "a/")]


@pytest.mark.parametrize("place", range(3), ids=["pt", "safetensors", "modular"])
@pytest.mark.parametrize("options", [[], ["--tensors"], ["--json"]], ids=" ".join)
def test_inspect_imports_neither_torch_nor_safetensors(place, options, in_each_format):
    assert not imported("inspect", in_each_format[place], *options)


@pytest.mark.parametrize("arguments", [["plugins"], ["describe", "mitosis_split"], ["schema", "inspect"]], ids=" ".join)
def test_what_is_known_of_plugins_needs_no_torch(arguments):
    assert not imported(*arguments)


def test_a_conversion_without_transforms_needs_no_torch(in_each_format, tmp_path):
    assert not imported("convert", in_each_format[0], tmp_path / "b.safetensors")


def test_the_search_for_imported_libraries_finds_them(in_each_format):
    assert imported("inspect", in_each_format[0], "--values") == {"torch"}


def imported(*arguments: object) -> set[str]:
    """Return which of torch and safetensors a successful command imports."""
    script = (
        "import sys; from vraxion_ckpt.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*{'torch', 'safetensors'} & {*sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_quiet_prints_nothing_and_debug_prints_a_traceback(tmp_path):
    done = vraxion("-q", "convert", DATA / "named_experts3.pt", tmp_path / "a.pt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "Traceback" in vraxion("inspect", "nowhere", VRAXION_CKPT_DEBUG="1").stderr


def test_verbose_tells_each_step_and_defaults_come_from_the_environment(tmp_path):
    done = vraxion("convert", DATA / "named_experts3.pt", tmp_path / "a.pt", *SPLIT, VRAXION_CKPT_VERBOSE="1")
    assert "mitosis_split (vraxion-ckpt" in done.stdout


def test_the_demo_proves_what_it_says_twice_in_a_row(tmp_path):
    for _ in range(2):
        done = vraxion("demo", tmp_path / "demo")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("function preserved per address: yes, bit-identical at all 64 addresses") == 2
        assert done.stdout.count("27 parameters and takes a step") == 2
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {"ckpt_post_split.pt", "ckpt_post_split_modular"}


def test_output_into_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m vraxion_ckpt.cli plugins | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_the_installed_command_is_the_same():
    script = Path(sys.executable).parent / "vraxion-ckpt"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == vraxion("--version").stdout


def test_the_summary_says_within_the_noise_where_noise_was_asked_for(tmp_path):
    split = "mitosis_split:parent=0,addresses=[0,3],noise=0.01"
    assert (
        "within the noise of 0.01"
        in vraxion("convert", DATA / "named_experts3.pt", tmp_path / "a.pt", "-t", split).stdout
    )


def test_a_summary_that_cannot_be_printed_says_that_the_target_was_written(tmp_path):
    command = f"{sys.executable} -m vraxion_ckpt.cli convert {DATA}/named_experts3.pt {tmp_path}/a.pt"
    fork = command.replace(sys.executable, forked.python())
    full = subprocess.run(f"{fork} > /dev/full", shell=True, capture_output=True, text=True, check=False)
    assert full.returncode == 14
    assert "a.pt was written, but the summary could not be printed: No space left on device" in full.stderr
    closed = subprocess.run(f"{command} --overwrite >&-", shell=True, capture_output=True, text=True, check=False)
    assert (closed.returncode, closed.stderr) == (0, "")
    assert load(tmp_path / "a.pt")["num_experts"] == 3


def test_json_is_json_even_where_a_difference_is_infinite(tmp_path):
    split = "mitosis_split:parent=0,addresses=[1],foreign_addresses=allow"
    done = vraxion("convert", DATA / "wallclock_adapter_experts.pt", tmp_path / "a.pt", "-t", split, "--json")

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(done.stdout, parse_constant=refuse)["function_preserved"]["max_abs"] == "inf"
