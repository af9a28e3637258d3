"""The README's blocks run with the shown output, its picture is current, and its make targets exist."""

from __future__ import annotations

import re

import numpy as np
import pytest
from blocks import ROOT, clone, hold

README = ROOT / "README.md"
TEXT = README.read_text()
PICTURE = ROOT / "docs" / "_static" / "report.png"


@pytest.mark.slow
def test_it_can_be_followed_in_a_fresh_clone_and_prints_what_it_shows():
    image = pytest.importorskip("matplotlib.image")
    with clone() as fresh:
        hold(README, fresh)
        assert {path.name for path in (fresh.root / "build" / "readme").iterdir()} == {
            "two_experts.pt",
            "report.png",
            "run",
        }
        drawn = image.imread(fresh.root / "build" / "readme" / "report.png")
    shown = image.imread(PICTURE)
    again = "the picture has changed; make it anew with the command above it in README.md"
    assert drawn.shape == shown.shape, again
    assert np.abs(drawn - shown).mean() < 0.005, again


def test_the_picture_is_small():
    assert 10_000 < PICTURE.stat().st_size < 150_000


def test_every_make_target_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"make (\w+)", TEXT))
    assert {"demo", "test", "reliability", "lint", "bench"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
