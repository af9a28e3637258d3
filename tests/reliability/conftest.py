"""Fixtures of the reliability suite."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import scenarios


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore the warnings about interrupted runs, which are expected here."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::vraxion_ckpt.errors.CkptWarning"))


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[scenarios.Scenario]:
    """One edit of each kind, and variants."""
    return scenarios.build(tmp_path_factory.mktemp("cases"))


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make folders on a RAM disk, if there is one, because thousands of tries would be slow on a real disk."""
    disk = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="vraxion-", dir=disk if disk.is_dir() else tmp_path))

    def make(_: str) -> Path:
        return Path(tempfile.mkdtemp(dir=root))

    yield make
    shutil.rmtree(root)
