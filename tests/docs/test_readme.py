"""The README does what it says, as the manual does (`test_docs`); and what else it says is so."""

from __future__ import annotations

import re

import pytest
from blocks import blocks, clone, hold
from support import ROOT

README = ROOT / "README.md"
TEXT = README.read_text()


@pytest.mark.slow
def test_it_can_be_followed_in_a_fresh_clone_and_prints_what_it_shows():
    with clone() as fresh:
        hold(README, fresh)
        assert {path.name for path in (fresh.root / "build").iterdir()} == {
            "two_experts.pt",
            "run",
            "run.manifest.json",
            "report.html",
            "modular",
            "all.safetensors",
            "monolith.pt",
            "weights.safetensors",
            "shards",
            "one_head.pt",
            "run_0001",
            "from_python.pt",
        }


@pytest.mark.slow
def test_the_suite_beside_the_transform_would_notice_a_careless_one():
    files = {block.file: block for block in blocks(TEXT) if block.file}
    (suite,) = [block for block in blocks(TEXT) if block.is_run and "test_scale.py" in block.text]
    with clone() as fresh:
        for name, block in files.items():
            careless = block.text.replace("Expert({leaf: t * self.factor", "Expert({leaf: t.mul_(self.factor)")
            assert (careless != block.text) == (name == "my_package/scale.py")
            (fresh.root / name).parent.mkdir(exist_ok=True)
            (fresh.root / name).write_text(careless)
        code, printed = fresh.run(suite)
    assert code == 1
    assert "wrote into a tensor" in printed


def test_every_make_target_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"make (\w+)", TEXT))
    assert {"demo", "test", "reliability", "lint", "bench"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_exit_codes_are_those_of_the_errors():
    from vraxion_ckpt import errors

    said = {int(code) for code in re.findall(r"`(\d+)`", TEXT)}
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.CkptError)]
    assert {cls.exit_code for cls in classes} <= said
