"""The README's commands and code do what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import DATA

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def blocks(language: str, containing: str) -> list[str]:
    found = [text for kind, text in BLOCKS if kind == language and containing in text]
    assert found, f"no {language} block with {containing}"
    return found


@pytest.fixture
def newcomer(tmp_path):
    """A folder that looks like a fresh clone to the README's commands."""
    shutil.copytree(DATA, tmp_path / "tests" / "data")
    return tmp_path


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": path, "LANG": "C.UTF-8", "COLUMNS": "80"},
        check=False,
    )


def test_every_command_works_in_order(newcomer):
    script = "\n".join(blocks("sh", "vraxion-ckpt"))
    done = shell(script, newcomer)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "3 → 4" in done.stdout
    assert {path.name for path in (newcomer / "build").iterdir()} == {
        "two_experts.pt",
        "four_experts.pt",
        "by_hand.pt",
        "run",
        "run.old",
        "plan.json",
        "modular",
        "all.safetensors",
        "monolith.pt",
        "weights.safetensors",
        "shards",
        "one_head.pt",
    }


def test_the_python_example_works(newcomer):
    (code,) = blocks("python", "vc.convert")
    (newcomer / "build").mkdir()
    (newcomer / "example.py").write_text(code)
    done = shell("python example.py", newcomer)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "yes, bit-identical at all 64 addresses",
        "2 torch.Size([64]) torch.Size([4, 16])",
    ]


def test_the_transform_passes_the_suite_that_is_shown_beside_it(newcomer):
    (transform,) = blocks("python", "class Scale(Transform)")
    (suite,) = blocks("python", "class TestScale(TransformTests)")
    (newcomer / "my_package").mkdir()
    (newcomer / "my_package" / "scale.py").write_text(transform)
    (newcomer / "test_scale.py").write_text(suite)
    done = shell("python -m pytest -q -p no:cacheprovider test_scale.py", newcomer)
    assert done.returncode == 0, done.stdout
    broken = transform.replace("Expert({leaf: t * self.factor", "Expert({leaf: t.mul_(self.factor)")
    assert broken != transform
    (newcomer / "my_package" / "scale.py").write_text(broken)
    assert shell("python -m pytest -q -p no:cacheprovider test_scale.py", newcomer).returncode == 1


def test_every_make_target_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"make (\w+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "reliability", "lint", "bench"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_exit_codes_are_those_of_the_errors():
    from vraxion_ckpt import errors

    said = {int(code) for code in re.findall(r"`(\d+)`", (ROOT / "README.md").read_text())}
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.CkptError)]
    assert {cls.exit_code for cls in classes} - {1} <= said
