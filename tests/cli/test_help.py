"""What the commands say about themselves, and about options that are given in the wrong place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from support import DATA, ROOT, load

from vraxion_ckpt.cli import cli

EXPERTS3 = DATA / "named_experts3.pt"
DEMO = ROOT / "vraxion_ckpt" / "demo_data"
EVERY = sorted(cli.commands)


def help_of(command: str, run_cli) -> str:
    code, text, said = run_cli(command, "--help")
    assert (code, said) == (0, "")
    return text


# --- help ---


@pytest.mark.parametrize("command", EVERY)
def test_help_fits_80_columns(command, run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, help_of(command, run_cli).splitlines())) <= 80


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Path:
    """Give a folder with the command in it."""
    folder = tmp_path_factory.mktemp("commands")
    forked.install(folder / "vraxion-ckpt", folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Give a current directory in which everything lies that the examples name."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DEMO / "wallclock_single.pt", "run.pt")
    visits = (DATA / "expected" / "wallclock_experts3.visits.json").read_bytes()
    Path("visits.json").write_bytes(visits)
    for folder in ("runs/r1", "runs/r2"):
        Path(folder).mkdir(parents=True)
        shutil.copy(DATA / "wallclock_experts3.pt", f"{folder}/ckpt_pre_split.pt")
        Path(folder, "visits.json").write_bytes(visits)
    return tmp_path


def examples(text: str) -> list[str]:
    """Return each paragraph of a help text that is for a shell: the lines exactly as they are printed."""
    paragraphs = text.partition("Options:")[0].split("\n\n")
    return [one for one in paragraphs if one.split()[:1] in (["vraxion-ckpt"], ["source"])]


def test_every_command_with_an_example_is_found(run_cli):
    assert [name for name in EVERY if examples(help_of(name, run_cli))] == ["completion", "convert", "edit", "run"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("command", ["convert", "edit", "run"])
def test_examples_work_as_they_are_pasted(shell, command, commands, place, run_cli):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    text = help_of(command, run_cli)
    (recipe,) = [one for one in text.split("\n\n") if one.startswith("  vars:")] or [""]
    Path("refine.yaml").write_text(recipe)
    if command == "edit":
        assert run_cli("convert", DATA / "wallclock_experts3.pt", "run_modular/")[0] == 0
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"}
    for example in examples(text):
        pasted = [shell, "-f", "-e"] if shell == "zsh" else [shell, "--norc", "-e"]
        done = subprocess.run(pasted, input=example, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, ""), example
    results = {"convert": "split.pt", "edit": "run_modular/system/router.state", "run": "runs/r2/ckpt_post_split.pt"}
    assert load(place / results[command])["num_experts"] == (2 if command == "convert" else 4)


@pytest.mark.parametrize(("number", "shell"), [(0, "bash"), (1, "zsh"), (2, "fish")])
def test_examples_of_completion_work_as_they_are_pasted(number, shell, commands, run_cli):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    example = examples(help_of("completion", run_cli))[number].strip()
    before = "autoload -Uz compinit; compinit -D\n" if shell == "zsh" else ""
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"}
    done = subprocess.run([shell], input=before + example, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- global options ---


@pytest.mark.parametrize("order", [["-q", "convert"], ["convert", "-q"], ["convert", "--quiet"]])
def test_quiet_is_taken_before_and_after_the_command(order, run_cli, tmp_path):
    assert run_cli(*order, EXPERTS3, tmp_path / "a.pt") == (0, "", "")


@pytest.mark.parametrize("order", [["-v", "convert"], ["convert", "-v"], ["convert", "--verbose", "--no-progress"]])
def test_verbose_is_taken_before_and_after_the_command(order, run_cli, tmp_path):
    split = ["-t", "mitosis_split:parent=0,addresses=[0,3],noise=0"]
    code, text, _ = run_cli(*order, EXPERTS3, tmp_path / "a.pt", *split)
    assert code == 0
    assert "mitosis_split (vraxion-ckpt" in text


@pytest.mark.parametrize("order", [["--no-progress", "plugins"], ["plugins", "--no-progress"]])
def test_no_progress_is_taken_before_and_after_the_command(order, run_cli, monkeypatch):
    monkeypatch.setattr("vraxion_ckpt.support.progress.wanted", True)
    assert run_cli(*order)[0] == 0
    from vraxion_ckpt.support import progress

    assert not progress.wanted
    assert run_cli("plugins")[0] == 0
    assert progress.wanted


@pytest.mark.parametrize(
    "command",
    [["inspect", EXPERTS3], ["check", EXPERTS3], ["diff", EXPERTS3, EXPERTS3], ["plugins"], ["describe", "pt"]],
    ids=lambda command: command[0],
)
def test_json_is_taken_before_and_after_the_command(command, run_cli):
    before, after = run_cli("--json", *command), run_cli(*command, "--json")
    assert before == after
    assert json.loads(before[1])["schema"].startswith(f"vraxion-ckpt/{command[0]}/")


# --- options in the wrong place ---


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["demo", "--json"], ["`demo` has no option --json", "inspect, ", "describe"]),
        (["--json", "demo"], ["`demo` has no option --json", "inspect, ", "describe"]),
        (["--json", "schema"], ["`schema` has no option --json"]),
        (["inspect", EXPERTS3, "--losses", "warn"], ["`inspect` has no option --losses", "convert and edit have it"]),
        (["inspect", EXPERTS3, "--keep-old"], ["`inspect` has no option --keep-old", "edit has it"]),
        (["--losses", "warn", "convert", "a", "b"], ["--losses belongs after the command", "convert and edit have it"]),
        (["-t", "x", "edit", "a"], ["-t belongs after the command", "convert and edit have it"]),
        (["run", "a.yaml", "--losses", "warn"], ["`run` has no option --losses", "recipe", "`losses`"]),
        (["run", "a.yaml", "--param-names", "x"], ["recipe", "`source.param_names`"]),
        (["inspect", EXPERTS3, "--version"], ["--version belongs before the command"]),
        (["inspect", EXPERTS3, "--tensor"], ["no such option: --tensor", "did you mean --tensors"]),
        (["--quite", "inspect", EXPERTS3], ["no such option: --quite", "did you mean --quiet"]),
        (["inspect", EXPERTS3, "--zzz"], ["no such option: --zzz"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40].replace("/", "_"),
)
def test_an_option_in_the_wrong_place_is_told_where_it_belongs(arguments, names, run_cli):
    code, text, said = run_cli(*arguments)
    assert (code, text) == (2, "")
    said = " ".join(said.split())
    assert [name for name in names if name not in said] == [], said


# --- a reader that stops reading ---


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--help", 141),
        ("inspect --help", 141),
        ("schema", 141),
        ("schema inspect", 141),
        ("completion bash", 141),
        ("plugins", 141),
        ("describe pt --json", 141),
        ("inspect {data}/named_experts3.pt", 141),
        ("demo {folder}/demo", 141),
        ("check {data}/named_experts3.pt", 0),
        ("diff {data}/named_experts3.pt {data}/named_experts3.pt", 0),
        ("diff {data}/named_experts3.pt {data}/wallclock_experts3.pt", 1),
        ("convert {data}/named_experts3.pt {folder}/a.pt", 0),
    ],
)
def test_a_closed_pipe_is_1_only_where_that_is_the_answer(arguments, code, commands, tmp_path):
    command = arguments.format(data=DATA, folder=tmp_path)
    script = f"{commands}/vraxion-ckpt {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_real_process_ends_like_any_program_whose_pipe_is_closed():
    """The others run in a fork of a process that has imported everything; its exit is not an interpreter's."""
    script = f"{sys.executable} -m vraxion_ckpt.cli plugins | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
