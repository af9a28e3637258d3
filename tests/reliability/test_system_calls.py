"""Figures 1 and 2 with real system calls: a process is killed at each of them, or the kernel lets it fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from scenarios import Scenario, beside, read_tree, write_tree

from vraxion_ckpt.commit.staging import exclusive

# All system calls that change a file system, under their names on all processors.
CALLS = (
    "openat,write,pwrite64,writev,fsync,fdatasync,ftruncate,rename,renameat,renameat2,link,linkat,symlink,symlinkat,"
    "unlink,unlinkat,mkdir,mkdirat,rmdir,chmod,fchmod,fchmodat,chown,fchown,fchownat,flock"
)
DRIVER = Path(__file__).with_name("driver.py")
KINDS = ("grow: modular_experts3", "shrink: modular_experts3", "rewrite: modular_experts3", "replace: ")


def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    done = subprocess.run(["strace", "-f", "-e", "trace=openat", "true"], capture_output=True, check=False)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not can_trace(), reason="needs strace, and leave to trace; test_kill.py needs neither")


def traced(case: Scenario, target: Path, new: Path, inject: str | None = None) -> tuple[int, str, list[str]]:
    """Run an edit under strace; return its exit code, its output on standard error, and its system calls."""
    log = target.parent.parent / "log"
    command = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace=?{CALLS.replace(',', ',?')}"]
    if inject:
        command += ["-e", f"inject={inject}"]
    command += [sys.executable, str(DRIVER), str(target), str(new), json.dumps(asdict(case.change))]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    return done.returncode, done.stderr, re.findall(r"^\d+ +(\w+\(.*)$", log.read_text(), re.MULTILINE)


def points(case: Scenario, ram: Callable[[str], Path]) -> tuple[Path, list[tuple[str, int]]]:
    """Return the new state as files, and each call that an edit makes after it has found its target.

    As in strace, a call is identified by its name and its number among the calls of that name.
    """
    new = ram("") / "new"
    write_tree(new, case.new)
    target = case.lay(ram(""))
    code, said, calls = traced(case, target, new)
    assert (code, read_tree(target)) == (0, case.new), said
    ours = [i for i, call in enumerate(calls) if f"{target.parent}/" in call]
    names = [call.partition("(")[0] for call in calls]
    return new, [(names[i], names[: i + 1].count(names[i])) for i in range(ours[0], ours[-1] + 1)]


def test_a_process_killed_at_any_system_call_leaves_the_old_state_or_the_new_one(cases, ram, figure):
    states, bad = Counter(), []
    for case in (case for kind in KINDS for case in cases if case.name.startswith(kind) and "," not in case.name):
        new, calls = points(case, ram)
        for name, number in calls:
            target = case.lay(ram(""))
            code, said, _ = traced(case, target, new, f"{name}:signal=SIGKILL:when={number}")
            assert code in (-9, 137), said
            which = case.judge(target)
            states[which] += 1
            with exclusive(target):
                pass
            if which not in ("old", "new") or read_tree(target) != (case.old if which == "old" else case.new):
                bad.append(f"{case.name}, {name} {number}: {which}")
            if beside(target):
                bad.append(f"{case.name}, {name} {number}: there is left {beside(target)}")
            shutil.rmtree(target.parent)
    found = f"{states['old']} old, {states['new']} new, {len(bad)} bad"
    figure(1, f"SIGKILL at {sum(states.values())} real system calls: {found}")
    assert not bad, "\n".join(bad[:20])
    assert min(states["old"], states["new"]) > 10


def test_a_system_call_that_fails_is_told_and_loses_nothing(cases, ram, figure):
    codes, bad = Counter(), []
    case = next(case for case in cases if case.name == "grow: modular_experts3")
    new, calls = points(case, ram)
    for name, number in calls:
        for reason, text in (("ENOSPC", "No space left on device"), ("EIO", "Input/output error")):
            target = case.lay(ram(""))
            code, said, _ = traced(case, target, new, f"{name}:error={reason}:when={number}")
            which = case.judge(target)
            codes[code] += 1
            where = f"{reason} at {name} {number}"
            if which not in ("old", "new") or read_tree(target) != (case.old if which == "old" else case.new):
                bad.append(f"{where}: {which}")
            if code == 0 and which == "old":
                bad.append(f"{where}: it says that it is done, and is not")
            if code not in (0, 14) or (code == 14 and (text not in said or not _names_a_file(said, target, new))):
                bad.append(f"{where}: exit {code}, {said}")
            if left := [name for name in beside(target) if not name.endswith(".lock")]:
                bad.append(f"{where}: there is left {left}")
            shutil.rmtree(target.parent)
    figure(2, f"ENOSPC and EIO at {sum(codes.values())} real system calls: {codes[14]} refused, {len(bad)} bad")
    assert not bad, "\n".join(bad[:20])


def _names_a_file(said: str, *files: Path) -> bool:
    return any(str(file.parent) in said for file in files)
