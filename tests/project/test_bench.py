"""The benchmark measures every row of its table, even with small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

pytestmark = pytest.mark.slow

BENCH = ROOT / "benchmarks" / "bench.py"
CONVERSIONS = [".pt → .pt, a split", ".pt → modular", ".pt → safetensors", "modular → .pt", "safetensors → .pt"]
ROWS = [
    f"{CONVERSIONS[0]} / by hand",
    *(f"{conversion} / cp" for conversion in CONVERSIONS),
    *(f"{conversion}, peak memory" for conversion in CONVERSIONS),
    *(f"{command} / import torch" for command in ("inspect, many experts", "--help", "--version", "a usage error")),
    "arc_meta / numpy.cumsum",
    *(f"edit, grow: {what}" for what in ("read / three files", "written / three files", "shards opened")),
    "edit, grow: many / few experts, time",
]


def test_every_row_is_measured(tmp_path: Path) -> None:
    sizes = {"gib": 0.01, "experts": 5, "ring": 1000, "repeat": 1}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    places = [f"--folder={tmp_path}", f"--json={tmp_path}/table.json"]
    done = subprocess.run([sys.executable, BENCH, *options, *places], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # so the bounds on memory hold
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["sizes"] == sizes
    assert sorted(row["what"] for row in found["rows"]) == sorted(ROWS)
    for row in found["rows"]:
        assert row["measured"] > 0
        assert row["met"] is (row["measured"] <= row["to_reach"])
        assert row["what"] in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
