"""Progress: on a terminal, after a second, on standard error; anywhere else, nothing."""

from __future__ import annotations

import os
import re
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
from vraxion_ckpt.support import progress
progress.wanted = {wanted}
with progress.progress_bar("writing", 400) as count:
    for _ in range(4):
        now += {pause}
        count(100)
print("done")
"""


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows after all of this was written to it."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif part != "\r" and not part.endswith("m"):
            assert part.isprintable(), "a control sequence that is not expected"
            lines[row] += part
    return lines


def test_on_a_terminal_it_is_shown_and_nothing_of_it_stays():
    shown = on_a_terminal("-c", SLOW.format(wanted=True, pause=0.4), python=sys.executable)
    assert "writing" in shown
    assert "400/400" in shown
    assert screen(shown) == ["done", ""]


def test_the_cursor_is_never_hidden_as_a_killed_process_could_not_show_it_again():
    shown = on_a_terminal("-c", SLOW.format(wanted=True, pause=0.4))
    assert "writing" in shown
    assert "\x1b[?25l" not in shown


@pytest.mark.parametrize(("wanted", "pause"), [(False, 0.4), (True, 0.01)])
def test_nothing_is_shown_where_it_is_not_wanted_or_not_worth_it(wanted, pause):
    assert on_a_terminal("-c", SLOW.format(wanted=wanted, pause=pause), python=sys.executable) == "done\n"


def test_nothing_is_shown_on_a_terminal_that_cannot_erase():
    assert on_a_terminal("-c", SLOW.format(wanted=True, pause=0.4), TERM="dumb") == "done\n"


@pytest.mark.parametrize("surroundings", [{}, {"FORCE_COLOR": "1"}])
def test_off_a_terminal_nothing_is_shown(surroundings):
    command = [sys.executable, "-c", SLOW.format(wanted=True, pause=0.4)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | surroundings)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_work_goes_on_when_its_terminal_is_closed():
    reader, writer = os.openpty()
    command = [sys.executable, "-c", SLOW.format(wanted=True, pause=0.4)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writer, text=True) as process:
        os.close(writer)
        assert os.read(reader, 1)  # of the bar
        os.close(reader)
        assert process.stdout.read() == "done\n"
    assert process.returncode == 0


@pytest.mark.parametrize("options", [[], ["--no-progress"], ["-q"]])
def test_the_commands_want_it_unless_they_are_told_not_to(options):
    script = (
        "import sys; from vraxion_ckpt.support import progress; from vraxion_ckpt.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: print(progress.wanted, file=sys.stderr)"
    )
    command = [forked.python(), "-c", script, *options, "diff", DATA / "named_experts3.pt", DATA / "named_experts3.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == f"{not options}\n"
