"""The real command, killed or interrupted by signals at random moments."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loader import resume
from scenarios import beside, read_tree
from support import DATA, EXPECTED

import vraxion_ckpt as vc

VISITS = EXPECTED / "wallclock_single.visits.json"
# Two experts in a modular directory: the final state of the demo.
START = ["single_to_experts", f"arc_meta:visits={VISITS}", "mitosis_split:noise=0"]
SPLITS = 5


def split(number: int = 0) -> str:
    return f"mitosis_split:parent=0,addresses=[{number}]"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vraxion_ckpt.cli", *map(str, arguments)]


def edit(target: Path, number: int = 0) -> list[str]:
    return command("edit", target, "-t", split(number))


def experts(target: Path) -> int:
    done = subprocess.run(command("inspect", target, "--json"), capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["num_experts"])


def stopped_at_random(run: list[str], target: Path, number: int, chance: random.Random) -> subprocess.Popen[str]:
    """Start an edit, and send it a signal at a random time after it has begun to write."""
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and not any(name.endswith(".stage") for name in beside(target)):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.05))
    process.send_signal(number)
    return process


def test_five_splits_that_are_killed_and_run_again_end_as_five_that_are_not(tmp_path, figure):
    quiet, killed = tmp_path / "quiet" / "run", tmp_path / "killed" / "run"
    for target in (quiet, killed):
        target.parent.mkdir()
        vc.convert(DATA / "wallclock_single.pt", f"{target}/", transforms=START)
    chance = random.Random(20)
    old = 0
    for number in range(SPLITS):
        vc.edit(quiet, transforms=[split(number)])
        stopped_at_random(edit(killed, number), killed, signal.SIGKILL, chance).communicate(timeout=120)
        subprocess.run(command("edit", killed), check=True, capture_output=True)  # recover from the kill
        if experts(killed) == number + 2:
            old += 1
            subprocess.run(edit(killed, number), check=True, capture_output=True)
        assert experts(killed) == number + 3
    assert read_tree(killed) == read_tree(quiet)
    assert resume(killed) == resume(quiet)
    assert beside(killed) == []
    figure(4, f"{SPLITS} splits killed at random points ({old} before the commit) and run again: as undisturbed")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_a_random_moment_leaves_the_old_state_or_comes_too_late(number, code, tmp_path, figure):
    source = tmp_path / "source" / "run"
    source.parent.mkdir()
    vc.convert(DATA / "wallclock_single.pt", f"{source}/", transforms=START)
    chance, codes = random.Random(int(number)), []
    for at in range(6):
        target = tmp_path / str(at) / "run"
        shutil.copytree(source, target)
        process = stopped_at_random(edit(target), target, number, chance)
        said = process.communicate(timeout=120)[1]
        codes.append(process.returncode)
        assert process.returncode in (0, code), said
        assert "Traceback" not in said
        assert (read_tree(target) == read_tree(source)) == (process.returncode == code)
        assert beside(target) == []
    stopped = f"{codes.count(code)} ended with {code} and the old state, the rest with 0 and the new one"
    figure(11, f"{signal.Signals(number).name} to the real command {len(codes)} times: {stopped}")


def test_a_signal_before_any_line_of_python_leaves_the_old_state_or_comes_too_late(tmp_path, figure):
    (tmp_path / "alone").mkdir()
    vc.convert(DATA / "wallclock_single.pt", f"{tmp_path / 'source'}/", transforms=START)
    script = Path(__file__).with_name("lines.py")
    done = subprocess.run([sys.executable, script, tmp_path, "200"], capture_output=True, text=True, check=True)
    ends = json.loads(done.stdout)
    assert ends["bad"] == []
    assert ends["old"] > 90 < ends["new"]
    figure(11, f"SIGINT before 200 lines of Python: {ends['old']} left the old state, {ends['new']} the new; 0 bad")


def test_a_signal_before_anything_is_staged_leaves_nothing(tmp_path):
    shutil.copytree(DATA / "modular_experts3", tmp_path / "run")
    before = read_tree(tmp_path / "run")
    process = subprocess.Popen(edit(tmp_path / "run"), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".run.vraxion-ckpt.lock").exists() and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    if process.returncode == 143:
        assert read_tree(tmp_path / "run") == before
    assert beside(tmp_path / "run") == []
