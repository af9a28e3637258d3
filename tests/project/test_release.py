"""The sdist and wheel of `make dist` are complete, and the wheel works in a fresh environment.

With ``--exhaustive``, that environment installs its dependencies, including torch, from the package index.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path, PurePath, PurePosixPath

import pytest
from packaging.requirements import Requirement
from support import DATA, ROOT, files_below

from vraxion_ckpt import __version__

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = (ROOT / "vraxion_ckpt", ROOT / "adapters/vraxion_ckpt_adapters", ROOT / "transforms/vraxion_ckpt_transforms")
NAME = f"vraxion_ckpt-{__version__}"
# These must not be inherited from the environment of the tests.
SURROUNDINGS = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VRAXION_CKPT"))}

EXTRAS = {
    Requirement(text).name for extra in ("report", "png", "testing") for text in PROJECT["optional-dependencies"][extra]
}
# Import every module. Only the dependencies of extras may be missing.
IMPORT_ALL = """
import sys
from importlib import import_module
from pkgutil import walk_packages

packages, extras = (text.split(",") for text in sys.argv[1:])
for package in map(import_module, packages):
    for module in walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            try:
                import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name.partition(".")[0] not in extras:
                    raise
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=SURROUNDINGS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path, *what: str) -> Path:
    """Build without isolation, which would need the package index."""
    run(sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build(tmp_path_factory.mktemp("dist")) / f"{NAME}.tar.gz"


@pytest.fixture(scope="module")
def wheel(sdist):
    return sdist.parent / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def described(wheel):
    return metadata.PathDistribution(zipfile.Path(wheel) / f"{NAME}.dist-info")


def package_files() -> set[str]:
    """Return the files that belong in the packages, by their path in the wheel."""
    return {
        f"{package.name}/{path.as_posix()}"
        for package in PACKAGES
        for path in files_below(package)
        if not is_leftover(path)
    }


def is_leftover(path: PurePath) -> bool:
    """Return whether a path is a cache, a build result or hidden."""
    return any(part in ("__pycache__", "build", "dist") or part.startswith(".") for part in path.parts)


# --- what is in them ---


def test_a_wheel_and_a_source_archive_are_built_and_nothing_else(sdist, wheel):
    assert sorted(sdist.parent.iterdir()) == [wheel, sdist]


def test_twine_has_nothing_to_say(sdist, wheel):
    said = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", sdist, wheel, cwd=sdist.parent)
    assert [said.count(word) for word in ("PASSED", "WARNING", "ERROR")] == [2, 0, 0]


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(wheel):
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names == package_files() | {f"{NAME}.dist-info/{name}" for name in about}
    assert {f"{package.name}/py.typed" for package in PACKAGES} <= names
    assert {
        "vraxion_ckpt/demo_data/wallclock_single.pt",
        "vraxion_ckpt/demo_data/wallclock_single.visits.json",
    } <= names


def test_the_source_archive_holds_what_is_built_tested_and_read_and_no_leftovers(sdist):
    with tarfile.open(sdist) as archive:
        names = {PurePosixPath(name).relative_to(NAME) for name in archive.getnames()}
    wanted = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
    }
    for folder in ("vraxion_ckpt", "adapters", "transforms", "tests", "docs", "examples", "benchmarks"):
        kept = {f"{folder}/{path.as_posix()}" for path in files_below(ROOT / folder) if not is_leftover(path)}
        wanted |= {name for name in kept if name.endswith((".py", ".md", ".pt", ".json"))}
    assert wanted <= {str(name) for name in names}
    assert {str(name) for name in names if is_leftover(name)} == {".gitignore"}


def test_the_wheel_from_the_source_archive_is_the_one_from_the_tree(wheel, tmp_path):
    assert (build(tmp_path, "--wheel") / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_metadata_is_that_of_the_project(described):
    told = described.metadata
    assert (told["Name"], told["Version"]) == (PROJECT["name"], __version__)
    assert told["Requires-Python"] == PROJECT["requires-python"]
    assert (told["License-Expression"], told.get_all("License-File")) == (PROJECT["license"], ["LICENSE"])
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload() == (ROOT / "README.md").read_text()
    assert set(told.get_all("Provides-Extra")) == PROJECT["optional-dependencies"].keys()
    needed = {text.lower() for text in described.requires if "extra ==" not in text}
    assert needed == {text.lower() for text in PROJECT["dependencies"]}


def test_the_entry_points_are_those_of_the_project(described):
    wanted = {("console_scripts", *script) for script in PROJECT["scripts"].items()}
    wanted |= {(group, *entry) for group, table in PROJECT["entry-points"].items() for entry in table.items()}
    assert {(entry.group, entry.name, entry.value) for entry in described.entry_points} == wanted


# --- the wheel at work ---


def lend_dependencies(site: Path) -> None:
    """Link only the declared dependencies from the tests' environment into another one."""
    wanted, lent = [Requirement(text) for text in PROJECT["dependencies"]], set()
    while wanted:
        requirement = wanted.pop()
        if requirement.name in lent or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        lent.add(requirement.name)
        found = metadata.distribution(requirement.name)
        wanted += map(Requirement, found.requires or [])
        for entry in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / entry).exists():
                (site / entry).symlink_to(str(found.locate_file(entry)))


def test_it_installs_into_a_fresh_environment_and_works_there(wheel, described, exhaustive, tmp_path):
    # Torch takes a gigabyte, so it must not stay in the folders that pytest keeps.
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path)
        python, command = Path(folder, "bin/python"), Path(folder, "bin/vraxion-ckpt")
        pip = (sys.executable, "-m", "pip", "--python", python)
        install = ["install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
        if not exhaustive:
            lend_dependencies(
                Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip())
            )
            install.append("--no-index")  # all that it asks for is there
        run(*pip, *install, cwd=tmp_path)
        run(*pip, "check", cwd=tmp_path)

        code = "import json, vraxion_ckpt, importlib.metadata as m; about = m.distribution('vraxion-ckpt')"
        code += "; print(json.dumps([vraxion_ckpt.__file__, about.read_text('METADATA')]))"
        place, text = json.loads(run(python, "-c", code, cwd=tmp_path))
        assert Path(place).is_relative_to(folder)
        assert text == described.read_text("METADATA")

        run(python, "-c", IMPORT_ALL, ",".join(package.name for package in PACKAGES), ",".join(EXTRAS), cwd=tmp_path)

        assert run(command, "--version", cwd=tmp_path) == f"vraxion-ckpt, version {__version__}\n"
        found = json.loads(run(command, "plugins", "--json", cwd=tmp_path))
        offering = PROJECT["entry-points"]["vraxion_ckpt"].keys() - {"dialects"}  # which are not listed
        assert {plugin["entry_point"] for plugin in found["plugins"]} == offering
        assert {plugin["distribution"] for plugin in found["plugins"]} == {"vraxion-ckpt"}
        assert found["broken"] == []

        run(command, "demo", tmp_path / "demo", cwd=tmp_path)
        assert any((tmp_path / "demo").iterdir())
        source, target = DATA / "named_experts3.pt", tmp_path / "converted.safetensors"
        run(command, "convert", source, target, cwd=tmp_path)
        run(command, "diff", source, target, cwd=tmp_path)
