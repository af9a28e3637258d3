"""Progress: on a terminal, after a second, on standard error; anywhere else, nothing."""

from __future__ import annotations

import subprocess
import sys

import forked
import pytest
from support import DATA, on_a_terminal

# The clock goes on only where a piece is done.
SLOW = """
import time
now = 0.0
time.time = time.monotonic = time.perf_counter = lambda: now
from vraxion_ckpt import progress
progress.wanted = {wanted}
with progress.progress_bar("writing", 400) as count:
    for _ in range(4):
        now += {pause}
        count(100)
print("done")
"""


def test_on_a_terminal_it_is_shown_and_nothing_of_it_stays():
    shown = on_a_terminal("-c", SLOW.format(wanted=True, pause=0.4), python=sys.executable)
    assert "writing" in shown
    assert "400" in shown
    last = shown.rstrip("\n").split("\r")[-1]
    assert last == "done"


@pytest.mark.parametrize(("wanted", "pause"), [(False, 0.4), (True, 0.01)])
def test_nothing_is_shown_where_it_is_not_wanted_or_not_worth_it(wanted, pause):
    assert on_a_terminal("-c", SLOW.format(wanted=wanted, pause=pause), python=sys.executable) == "done\n"


def test_off_a_terminal_nothing_is_shown():
    done = subprocess.run(
        [sys.executable, "-c", SLOW.format(wanted=True, pause=0.4)], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("options", [[], ["--no-progress"], ["-q"]])
def test_the_commands_want_it_unless_they_are_told_not_to(options):
    script = (
        "import sys; from vraxion_ckpt import progress; from vraxion_ckpt.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: print(progress.wanted, file=sys.stderr)"
    )
    command = [forked.python(), "-c", script, *options, "diff", DATA / "named_experts3.pt", DATA / "named_experts3.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == f"{not options}\n"
