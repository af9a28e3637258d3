"""Figures 9 and 10: two runs at the same time, and sources that are never changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from scenarios import Scenario, beside, read_tree, watched_disk
from support import DATA, DIRECTORIES, MONOLITHS

import vraxion_ckpt as vc
from vraxion_ckpt.errors import BusyError

RACES = 100
DONE, BUSY, FAILED = 0, 16, 1


def test_of_two_runs_at_once_one_works_and_one_is_busy(cases, ram, figure):
    case = next(case for case in cases if case.name == "grow: modular_experts3")
    mixed = 0
    for _ in range(RACES):
        target = case.lay(ram(case.name))
        assert sorted(race(case, target)) == [DONE, BUSY]
        mixed += read_tree(target) != case.new or bool(beside(target))
    figure(9, f"{RACES} races of two runs: one worked and one was busy each time, {mixed} mixed")
    assert not mixed


def race(case: Scenario, target: Path) -> list[int]:
    """Start two runs at the same moment; the one that gets the lock holds it until the other has failed to get it."""
    start, go = os.pipe()
    told, tell = os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            code = FAILED
            try:
                os.close(go)  # otherwise the other end of the pipe would wait forever
                os.read(start, 1)
                with watched_disk(lambda now, *_: now == 1 and os.read(told, 1), case):
                    case.perform(target)
                code = DONE
            except BusyError:
                os.write(tell, b"!")
                code = BUSY
            finally:
                os._exit(code)
        children.append(child)
    os.close(start)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(told)
    os.close(tell)
    return codes


def test_no_conversion_changes_its_source(tmp_path, figure):
    sources = [*MONOLITHS, *DIRECTORIES]
    before = {path: stamp(path) for path in DATA.rglob("*") if path.is_file()}
    conversions = 0
    for source in sources:
        for number, target in enumerate(("a.pt", "a/", "a.safetensors")):
            folder = tmp_path / f"{source.name}{number}"
            folder.mkdir()
            vc.convert(source, f"{folder}/{target}")
            conversions += 1
    changed = [path for path, was in before.items() if stamp(path) != was]
    figure(10, f"{conversions} conversions of {len(sources)} sources: {len(changed)} of {len(before)} files changed")
    assert changed == []


def stamp(path: Path) -> tuple[str, int, int]:
    """Return the content, modification time and inode of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns, path.stat().st_ino
