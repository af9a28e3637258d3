"""What the suites for plugins print about a plugin that is broken: which one, with which options, on what, and why."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest

pytestmark = pytest.mark.slow  # each runs a whole suite in a process of its own

ADAPTER = '''
from dataclasses import replace
from pydantic import Field
from vraxion_ckpt.testing import AdapterTests
from vraxion_ckpt_adapters.pt import PtAdapter

RUNS = []

class Forgetful(PtAdapter):
    """Forgets losses, and writes other bytes each time."""

    name = "forgetful"
    depth: int = Field(1, description="how deep")

    def write(self, checkpoint, path):
        RUNS.append(path)
        payload = {key: value for key, value in checkpoint.payload.items() if key != "step"}
        super().write(replace(checkpoint, payload=payload | {"run": len(RUNS)}), path)

class TestForgetful(AdapterTests):
    adapter = Forgetful(depth=7)
    examples = 20
'''

TRANSFORM = '''
import torch
from pydantic import Field
from vraxion_ckpt.plugin_api import Effect, Expert, Transform, TransformError
from vraxion_ckpt.testing import TransformTests

RUNS = []

class Broken(Transform):
    """Refuses expert 2 in other words than it should, breaks its promise, and gives something else each time."""

    name = "broken"
    expert: int = Field(description="which")

    def effect(self):
        return Effect.exact()

    def apply(self, checkpoint):
        if self.expert == 2:
            raise TransformError("I would rather not")
        RUNS.append(self.expert)
        for name in checkpoint.core if self.expert == 1 else ():
            if name != "router_map":
                checkpoint.core[name] = torch.ones_like(checkpoint.core[name])
        checkpoint.payload["runs"] = len(RUNS)
        return checkpoint

class TestBroken(TransformTests):
    transform = Broken
    accepted = [({"expert": 0}, "single"), ({"expert": 1}, "experts")]
    refused = [({"expert": 2}, "two_groups", "no expert 2"), ({"expert": 3}, "headless", "no head")]
    examples = 20
'''


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> Callable[[str], dict[str, str]]:
    """Run the tests of a broken plugin; return what pytest prints about each that fails."""

    @cache
    def run(kind: str) -> dict[str, str]:
        place = tmp_path_factory.mktemp("broken") / "test_broken.py"
        place.write_text(ADAPTER if kind == "adapter" else TRANSFORM)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", place.name]
        done = subprocess.run(command, cwd=place.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        parts = re.split(r"^_+ \w+\.(test_\S+) _+$", done.stdout, flags=re.MULTILINE)
        return {test: _raised(text) for test, text in zip(parts[1::2], parts[2::2], strict=True)}

    return run


def _raised(text: str) -> str:
    """Return the lines that pytest marks as what was raised."""
    return "\n".join(line[4:].strip() for line in text.splitlines() if line.startswith(("E   ", "  | ")))


@pytest.mark.parametrize(
    ("kind", "test", "names"),
    [
        (
            "adapter",
            "test_a_sample_comes_back_bit_for_bit[single]",
            ["plugin: forgetful, options: ", "depth=7", "sample: single", "target.pt came back changed", "step"],
        ),
        (
            "adapter",
            "test_every_loss_is_declared[experts]",
            ["sample: experts", "`losses` declares nothing", "step"],
        ),
        (
            "adapter",
            "test_the_same_checkpoint_gives_the_same_bytes[headless]",
            ["depth=7", "sample: headless", "other bytes", "differs"],
        ),
        ("adapter", "test_generated_checkpoints_come_back_bit_for_bit", ["depth=7", "came back changed"]),
        (
            "transform",
            "test_accepted_calls_give_a_consistent_result",
            ["plugin: broken, options: expert=1, sample: experts", "theta has changed"],
        ),
        (
            "transform",
            "test_a_second_run_gives_the_same",
            ["options: expert=0, sample: single", "a second run gave another result", "runs"],
        ),
        (
            "transform",
            "test_refused_calls_raise_the_given_message",
            ["options: expert=2, sample: two_groups", "'no expert 2'", "I would rather not"],
        ),
        (
            "transform",
            "test_any_checkpoint_is_transformed_soundly_or_refused[layered_experts]",
            ["options: expert=1, sample: layered_experts", "has changed"],
        ),
        (
            "transform",
            "test_generated_checkpoints_are_transformed_soundly_or_refused",
            ["options: expert=1", "has changed"],
        ),
    ],
)
def test_a_failure_names_the_plugin_its_options_the_sample_and_the_difference(kind, test, names, printed):
    said = printed(kind)[test]
    assert [name for name in names if name not in said] == [], said


@pytest.mark.parametrize(("kind", "name"), [("adapter", "forgetful"), ("transform", "broken")])
def test_every_failure_says_what_is_wrong_and_in_which_plugin(kind, name, printed):
    failures = printed(kind)
    assert len(failures) > 6
    for test, said in failures.items():
        assert f"plugin: {name}, options: " in said, test
        assert said.splitlines()[0] not in ("AssertionError", "assert False"), test
