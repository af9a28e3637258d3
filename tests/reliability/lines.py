"""Run the real command with a signal before one of its lines of Python; each run is a fork that has torch imported.

``python lines.py FOLDER POINTS`` splits a checkpoint in FOLDER POINTS times, and prints the outcomes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import click

import vraxion_ckpt as vc
from vraxion_ckpt.cli import cli, main
from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.file_marks import survey

SPLIT = ["-t", "mitosis_split:parent=0,addresses=[0]"]
# Lines of these files count: this package, click and contextlib, which run before a ``with`` block or process ends.
TRACED = (*(str(Path(str(module.__file__)).parent) for module in (vc, click)), contextlib.__file__)


def edited(target: Path, said: Path, at: int, done: Callable[[int, int], None] = lambda *_: None) -> int:
    """Edit in a fork, with SIGINT before line `at`; `done` gets the numbers of lines in all and before the commit."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    line, commit, exchange = 0, 0, system_calls.exchange

    def noting(source: Path, target: Path) -> None:
        nonlocal commit
        exchange(source, target)
        commit = commit or line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal line
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        line += event == "line"
        if event == "line" and line == at:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace

    system_calls.exchange = noting
    sys.settrace(trace)
    code: object = "an exception"
    try:
        main(["edit", str(target), *SPLIT])
    except SystemExit as end:
        sys.settrace(None)
        code = end.code
        done(line, commit)
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 99)


def tried(folder: Path, points: int) -> dict[str, object]:
    """Edit with a signal at random lines, half of them after the commit; count the outcomes, and list the bad ones."""
    source, target, said = folder / "source", folder / "alone" / "run", folder / "said"
    before, counts = read(source), folder / "counts"
    with contextlib.redirect_stdout(io.StringIO()):  # imports everything once for all forks
        cli.main(["edit", str(shutil.copytree(source, folder / "first")), *SPLIT], standalone_mode=False)
    shutil.copytree(source, target)
    edited(target, said, 0, lambda *found: counts.write_text(json.dumps(found)) and None)
    lines, commit = json.loads(counts.read_text())
    chance = random.Random(7)
    after = [chance.randrange(commit - 20, lines + 1) for _ in range(points // 4)]
    last = [chance.randrange(lines - 300, lines + 1) for _ in range(points // 4)]
    old, new, bad = 0, 0, []
    for at in [*(chance.randrange(1, commit) for _ in range(points // 2)), *after, *last]:
        shutil.rmtree(target)
        shutil.copytree(source, target)
        code = edited(target, said, at)
        is_old, left = read(target) == before, sorted(path.name for path in target.parent.iterdir())
        old, new = old + is_old, new + (not is_old)
        if code != (130 if is_old else 0) or left != ["run"] or "Traceback" in said.read_text():
            bad.append(f"line {at} of {lines}, commit {commit}: {code}, {is_old=}, {left}: {said.read_text()[-400:]}")
            for name in left:
                if name != "run":
                    (shutil.rmtree if (target.parent / name).is_dir() else os.unlink)(target.parent / name)
    return {"old": old, "new": new, "bad": bad}


def read(target: Path) -> dict[str, bytes]:
    return {name: (target / name).read_bytes() for name in survey(target)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(tried(Path(sys.argv[1]), int(sys.argv[2]))))
