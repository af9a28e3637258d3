"""The example package and the template work in a fresh environment."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cookiecutter.main import cookiecutter
from support import DATA, ROOT, assert_same, load

pytestmark = pytest.mark.slow

NPY, TEMPLATE = ROOT / "examples" / "npy", ROOT / "examples" / "template"


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Render the template with other names than the defaults."""
    folder = tmp_path_factory.mktemp("rendered")
    wishes = {"project": "acme-ckpt", "format": "acme", "transform": "acme_scale"}
    return Path(cookiecutter(str(TEMPLATE), no_input=True, extra_context=wishes, output_dir=str(folder)))


@pytest.fixture(scope="module")
def python(tmp_path_factory, rendered):
    """Make an environment with both packages. It shares torch and other dependencies, which take minutes to install."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    lent = sysconfig.get_path("purelib")
    Path(packages, "lent.pth").write_text(f"import site; site.addsitedir({lent!r})\n")
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, *install, NPY, rendered)
    return python


def test_the_commands_know_both_packages(python):
    listed = run(python, "-m", "vraxion_ckpt.cli", "plugins")
    for name in ("npy", "hand_over", "vraxion-ckpt-npy", "acme", "acme_scale", "acme-ckpt"):
        assert name in listed
    assert "addresses" in run(python, "-m", "vraxion_ckpt.cli", "describe", "hand_over")


def test_a_checkpoint_goes_through_both_formats_and_comes_back_bit_for_bit(python, tmp_path):
    source = DATA / "named_experts3.pt"
    for place in ("a.npyd/", "b.acme", "back.pt"):
        run(python, "-m", "vraxion_ckpt.cli", "convert", source, f"{tmp_path}/{place}")
        source = tmp_path / place
    assert_same(load(DATA / "named_experts3.pt"), load(tmp_path / "back.pt"))


def test_both_transforms_work_from_the_command_line(python, tmp_path):
    chain = ("-t", "hand_over:addresses=[0,3,6-8],to=2", "-t", "acme_scale:expert=1,factor=2")
    run(python, "-m", "vraxion_ckpt.cli", "convert", DATA / "named_experts3.pt", tmp_path / "a.pt", *chain)
    before, after = load(DATA / "named_experts3.pt")["model"], load(tmp_path / "a.pt")["model"]
    owners = [2 if a in (0, 3, 6, 7, 8) else a % 3 for a in range(64)]
    assert after["router_map"].tolist() == owners
    assert_same(after["head.experts.1.weight"], before["head.experts.1.weight"] * 2)


def test_the_example_passes_its_own_tests(python):
    run(python, "-m", "pytest", "-p", "no:cacheprovider", cwd=NPY)


def test_a_rendered_package_passes_its_own_tests_and_lints(python, rendered):
    run(python, "-m", "pytest", "-p", "no:cacheprovider", cwd=rendered)
    ruff = ("-m", "ruff", "check", "--config", ROOT / "pyproject.toml", "--ignore", "D", rendered)
    run(sys.executable, *ruff)
