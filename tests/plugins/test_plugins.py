"""Third-party plugins, installed as packages of their own, used from the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from support import DATA, ROOT, load

PAGE = (ROOT / "docs/reference/hooks.md").read_text()
(SCALE,) = re.findall(r"^```python\n(# my_package/scale.py\nfrom pydantic.*?)^```", PAGE, re.MULTILINE | re.DOTALL)

MISSPELT = """
from vraxion_ckpt import hookimpl

@hookimpl
def register_transform():
    return []
"""

RAISES = """
from vraxion_ckpt.plugin_api import Effect, Transform, hookimpl

class Changes(Transform):
    def effect(self):
        return Effect.changed()

class Fails(Changes):
    \"\"\"Fail in a way of its own.\"\"\"
    name = "fails"
    def apply(self, checkpoint):
        return {}["nothing"]

class Writes(Changes):
    \"\"\"Write into a tensor it was lent.\"\"\"
    name = "writes"
    def apply(self, checkpoint):
        checkpoint.core["theta_ptr_reduced"].zero_()
        return checkpoint

class Drops(Changes):
    \"\"\"Lose an expert.\"\"\"
    name = "drops"
    def apply(self, checkpoint):
        del checkpoint.head.experts[1]
        return checkpoint

@hookimpl
def register_transforms():
    return [Fails, Writes, Drops]
"""


def install(name: str, code: str, folder: Path) -> None:
    """Build a package with one plugin module and install it into `folder`, as pip does for anybody."""
    package = folder / "src" / name
    (package / name).mkdir(parents=True)
    (package / name / "__init__.py").write_text("")
    (package / name / "plugin.py").write_text(code)
    (package / "pyproject.toml").write_text(
        f'[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "{name}"\nversion = "1.2.3"\n'
        f'[project.entry-points.vraxion_ckpt]\n{name}_entry = "{name}.plugin"\n'
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(package)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("third_party")
    install("scale_package", SCALE, folder)
    install("does_not_import", "import no_such_module\n", folder)
    install("misspelt", MISSPELT, folder)
    install("no_class", MISSPELT.replace("register_transform()", "register_transforms()").replace("[]", "[3]"), folder)
    install("misbehaves", RAISES, folder)
    install("clashes", SCALE.replace('name = "scale"', 'name = "mitosis_split"'), folder)
    return folder / "site"


def vraxion(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [forked.python(), *forked.COMMAND, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_readmes_transform_appears_with_its_package(site):
    facts = json.loads(vraxion(site, "plugins", "--json").stdout)
    (scale,) = [plugin for plugin in facts["plugins"] if plugin["name"] == "scale"]
    assert (scale["distribution"], scale["version"]) == ("scale_package", "1.2.3")
    assert scale["summary"] == "Multiply the weights of one expert."


def test_broken_plugins_are_reported_with_their_reason_and_the_others_work(site):
    done = vraxion(site, "plugins", "--json")
    facts = json.loads(done.stdout)
    reasons = {broken["distribution"]: broken["reason"] for broken in facts["broken"]}
    assert reasons.keys() == {"does_not_import", "misspelt", "no_class"}
    assert "no_such_module" in reasons["does_not_import"]
    assert "register_transform" in reasons["misspelt"]
    assert "not a subclass of Transform" in reasons["no_class"]
    names = {plugin["name"] for plugin in facts["plugins"]}
    assert {"pt", "modular", "arc_meta", "single_to_experts", "scale"} <= names
    assert "does_not_import" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_runs_in_a_chain_by_name_with_its_options(site, tmp_path):
    # The clash takes mitosis_split away, and only that.
    target = tmp_path / "scaled.pt"
    chain = ["-t", "single_to_experts:experts=2", "-t", "scale:expert=1,factor=0.5"]
    done = vraxion(site, "convert", DATA / "wallclock_single.pt", target, *chain)
    assert done.returncode == 0, done.stderr
    assert "largest difference" not in done.stdout  # expert 1 owns no address yet
    model = load(target)["model"]
    assert model["head.experts.1.weight"].equal(model["head.experts.0.weight"] * 0.5)
    record = load(target)["vraxion_ckpt"]["history"][1]
    assert (record["name"], record["distribution"], record["version"]) == ("scale", "scale_package", "1.2.3")
    assert record["options"] == {"expert": 1, "factor": 0.5}


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ("expert=one,factr=2", ["'expert'", "'one'", "'factr'", "did you mean 'factor'"]),
        ("factor=2", ["'expert' is required"]),
    ],
)
def test_its_options_are_validated_all_at_once(options, reasons, site, tmp_path):
    done = vraxion(site, "convert", DATA / "named_experts3.pt", tmp_path / "x.pt", "-t", f"scale:{options}")
    assert done.returncode == 2
    for reason in reasons:
        assert reason in done.stderr


def test_two_plugins_of_one_name_are_an_error_that_names_both(site, tmp_path):
    done = vraxion(site, "convert", DATA / "named_experts3.pt", tmp_path / "x.pt", "-t", "mitosis_split")
    assert done.returncode == 15
    assert "vraxion-ckpt" in done.stderr
    assert "clashes" in done.stderr


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("fails", 15, "KeyError"),
        ("writes", 15, "wrote into a tensor"),
        ("drops", 11, "expert 2"),
    ],
)
def test_a_transform_that_misbehaves_writes_nothing(name, code, reason, site, tmp_path):
    done = vraxion(site, "convert", DATA / "named_experts3.pt", tmp_path / "x.pt", "-t", name)
    assert done.returncode == code
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_describe_shows_options_types_and_defaults(site):
    facts = json.loads(vraxion(site, "describe", "scale", "--json").stdout)
    assert facts["options"][1] == {
        "name": "factor",
        "type": "number",
        "required": False,
        "default": 1.0,
        "description": "what to multiply with",
    }
    text = vraxion(site, "describe", "scale").stdout
    assert "which expert" in text
    assert "required" in text


def test_describe_shows_what_an_option_is_if_it_is_not_given(run_cli):
    facts = json.loads(run_cli("describe", "arc_meta", "--json")[1])
    options = {option["name"]: (option["type"], option["default"]) for option in facts["options"]}
    assert options["arc_len"] == ("whole number or auto", "auto")
    assert options["top_k"] == ("whole number", 256)
    assert options["parent"] == ("whole number", None)
    said = {line.split()[0]: line for line in run_cli("describe", "arc_meta")[1].splitlines() if line[:1].strip()}
    assert re.search("auto +number of addresses", said["arc_len"])
    assert re.search("not set +expert to split", said["parent"])
    assert re.search("false +allow", said["allow_empty_parent"])
