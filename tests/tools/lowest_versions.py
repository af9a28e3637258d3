"""Print the lowest versions that pyproject.toml allows, as constraints for pip.

The version of torch comes from the command line or from constraints.txt, because the lowest one on the package index
includes gigabytes of CUDA. Packages without a lower bound are left to pip.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BOUND = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)$")


def lowest() -> dict[str, str]:
    """Return the lower bound of every dependency that declares one, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = [*project["dependencies"], *(name for extra in extras for name in extra)]
    return {found[1]: found[2] for text in declared if (found := _BOUND.match(text))}


def pinned(name: str) -> str:
    """Return the version of a package in constraints.txt."""
    return dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)[name]


if __name__ == "__main__":
    torch = sys.argv[1] if sys.argv[1:] else pinned("torch")
    for name, version in {**lowest(), "torch": torch}.items():
        sys.stdout.write(f"{name}=={version}\n")
