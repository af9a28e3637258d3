"""The Makefile, and the files that services and editors read: they name only what exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.search(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)[1].split())


def make(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    # A `make` around this one would pass on its own options.
    surroundings = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    command = ["make", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, check=False)


def test_help_lists_every_target_and_how_long_it_takes(tmp_path):
    listed = make(tmp_path, "help").stdout.splitlines()
    assert {line.split()[1] for line in listed} == TARGETS
    for line in listed:
        assert line.startswith("make help") or re.search(r"\(\d+ (second|minute)s?\b.*\)$", line), line


def python(path: Path, before: str) -> Path:
    """Write an interpreter that runs something before the code that it is given with ``-c``."""
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; {before}; exec(sys.argv[2])' \"$@\"\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize(
    ("before", "complaint"),
    [
        ("sys.version_info = (3, 10, 14)", "is not Python 3.11 or newer"),
        ('sys.modules["ensurepip"] = None', "has no module venv or ensurepip"),
        ('sys.modules["venv"] = None', "has no module venv or ensurepip"),
    ],
)
def test_an_unsuitable_python_is_named_before_anything_is_installed(target, before, complaint, tmp_path):
    interpreter = python(tmp_path / "python", before)
    done = make(tmp_path, target, f"PYTHON={interpreter}")
    assert done.returncode == 2
    assert f"{interpreter} {complaint}" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_python_that_runs_the_tests_is_suitable(tmp_path):
    """The same interpreter passes both checks, and only then is the environment made."""
    interpreter = python(tmp_path / "python", "pass")
    done = make(tmp_path, "demo", f"PYTHON={interpreter}")
    assert f"{interpreter} -m venv .venv" in done.stdout
    assert done.returncode == 2  # it cannot make one
