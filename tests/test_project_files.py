"""The Makefile, and the files that services and editors read: they name only what exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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


# --- what services read ---


def parsed(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def steps() -> list[dict[str, Any]]:
    return [step for job in parsed(".github/workflows/ci.yml")["jobs"].values() for step in job["steps"]]


def test_the_workflow_runs_every_check_and_only_targets_that_exist():
    called = {target for step in steps() for target in re.findall(r"make ([\w-]+)", step.get("run", ""))}
    assert called <= TARGETS
    assert {"demo", "docs", "lint", "reliability", "test"} <= called


def test_the_workflow_tries_the_oldest_python_and_newer_ones():
    pythons = parsed(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert f">={pythons[0]}" == PROJECT["requires-python"]
    assert pythons == ["3.11", "3.12", "3.13", "3.14"]  # as text: the number 3.10 would be 3.1


def test_the_hook_runs_the_pinned_tools_and_downloads_nothing():
    (repo,) = parsed(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    assert [(hook["entry"], hook["language"]) for hook in repo["hooks"]] == [("make lint", "system")]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_has_the_fields_that_a_form_needs(name):
    form = parsed(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked) > 0
    assert all(field["attributes"]["label"] for field in asked)


def test_the_make_targets_of_the_pull_request_template_exist():
    named = set(re.findall(r"`make ([\w-]+)`", (ROOT / ".github/pull_request_template.md").read_text()))
    assert named
    assert named <= TARGETS
