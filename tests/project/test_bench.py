"""The benchmarks: their table, JSON and comparison, and that every row is measured, even with small sizes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from benchmarks import compare, machine
from benchmarks.__main__ import main, parse
from benchmarks.measuring import BenchmarkError, bytes_read_and_written, in_child, watched
from benchmarks.rows import GROUPS
from benchmarks.rows.conversions import split_on_shared_blocks
from benchmarks.settings import FULL, Settings, Sizes
from benchmarks.table import HEADING, Goal, Row, ratios, skipped

NAMES = [goal.what for group in GROUPS for goal in group.goals]
TINY = {
    "gib": 0.01,
    "cast_gib": 0.05,
    "limited_gib": 0.05,
    "experts": 5,
    "losses": 1000,
    "ring": 1000,
    "repeat": 1,
}
OPTIONS = [f"--{name.replace('_', '-')}={size}" for name, size in TINY.items()]


# --- the table ---


def test_a_row_of_ratios_is_judged_by_the_median_of_its_pairs():
    row = ratios(Goal("copy", 1.2), [3.0, 2.0, 9.0], [2.0, 2.0, 3.0])
    assert row.repeats == (1.5, 1.0, 3.0)
    assert row.measured == 1.5
    assert row.met is False
    assert " 1.50 " in str(row)
    assert "1.00–3.00" in str(row)
    assert str(row).endswith("NOT met")


def test_memory_is_judged_by_its_largest_repeat():
    row = Row(Goal.memory("copy"), (10.0, 70.0, 20.0))
    assert row.measured == 70
    assert row.met is False
    assert Row(row.goal, (10.0, 64.0)).met is True


def test_a_row_without_a_goal_is_neither_met_nor_missed():
    row = Row(Goal("busy", None), (3.0,))
    assert row.met is None
    assert "met" not in str(row)


def test_a_skipped_row_says_why_and_breaks_its_lines():
    (row,) = skipped([Goal("copy", 1.2)], "mkfs is not installed " * 10)
    assert row.met is None
    first, *reason = str(row).splitlines()
    assert first.endswith("skipped")
    assert "mkfs is not installed" in reason[0]
    assert max(map(len, reason)) <= 80


def test_no_row_is_wider_than_the_terminal():
    wide = (0.001, 99999.0, 123456.0)
    for group in GROUPS:
        for goal in group.goals:
            assert len(goal.what) <= 39
            assert len(str(Row(goal, wide))) <= 80
    assert len(HEADING) <= 80


@pytest.mark.parametrize("row", [ratios(Goal("a", 1.0), [1.0], [3.0]), *skipped([Goal.memory("b")], "no room")])
def test_a_row_survives_json(row):
    assert Row.from_json(json.loads(json.dumps(row.as_json()))) == row


def test_names_of_rows_are_unique():
    assert len(set(NAMES)) == len(NAMES)


# --- the comparison ---


@pytest.mark.parametrize(
    ("old", "new", "slower"),
    [
        ([1.0, 1.0], [1.05, 1.09], False),
        ([1.0, 1.0], [1.2, 1.3], True),
        ([1.0, 1.25, 1.0], [1.2, 1.3, 1.3], False),  # the spreads overlap
        ([1.0, 1.1], [0.5, 0.6], False),
        ([0.0], [1.0], True),
        ([], [9.0], False),
        ([1.0], [], False),
    ],
)
def test_slower_is_more_than_a_tenth_and_outside_the_spread(old, new, slower):
    goal = Goal("copy", 1.2)
    assert compare.slower(Row(goal, tuple(old)), Row(goal, tuple(new))) is slower


def test_memory_may_grow_by_a_tenth_of_its_bound():
    goal = Goal.memory("copy")
    assert not compare.slower(Row(goal, (1.0,)), Row(goal, (7.0,)))
    assert compare.slower(Row(goal, (1.0,)), Row(goal, (8.0,)))


def test_the_comparison_lists_what_got_slower_and_what_differs():
    goals = [Goal("copy", 1.2), Goal("open", 0.3), Goal("new", 1.0)]
    older = {"machine": {"cores": 2, "kernel": "6"}, "rows": [Row(goal, (1.0,)).as_json() for goal in goals[:2]]}
    text, worse = compare.report(older, {"cores": 4, "kernel": "6"}, [Row(goal, (1.0,)) for goal in goals])
    assert not worse
    assert "2 of 3 rows" in text
    assert "cores" in text
    text, worse = compare.report(older, older["machine"], [Row(goals[0], (1.0,)), Row(goals[1], (2.0,))])
    assert worse
    assert re.search(r"^open +1\.00 → +2\.00 ×$", text, re.MULTILINE)
    assert "copy" not in text
    assert "note" not in text


def test_runs_with_other_sizes_and_other_files_are_refused(tmp_path):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"machine": {}, "sizes": {"gib": 2, "cast_gib": 1}, "rows": []}))
    assert compare.read_older(old, {"gib": 2, "cast_gib": 1})["rows"] == []
    with pytest.raises(compare.NotComparableError, match=r"--cast-gib=1$"):
        compare.read_older(old, {"gib": 2, "cast_gib": 3})
    for content in ("{", "[]", "{}", '{"sizes": {}, "rows": [{}]}'):
        old.write_text(content)
        with pytest.raises(compare.NotComparableError, match="not the JSON of a run"):
            compare.read_older(old, {})
    with pytest.raises(compare.NotComparableError):
        compare.read_older(tmp_path / "absent", {})


# --- options and processes ---


def test_full_sizes_can_be_replaced_one_by_one():
    assert parse([]).sizes == Sizes()
    assert parse(["--full"]).sizes == FULL
    sizes = parse(["--full", "--limited-gib", "0.5", "--ring=9"]).sizes
    assert (sizes.limited_gib, sizes.ring, sizes.gib) == (0.5, 9, FULL.gib)


def test_a_child_returns_json_and_reports_its_failure():
    assert in_child("measuring.anonymous_bytes") > 2**20
    with pytest.raises(BenchmarkError, match=r"(?s)find_memory failed.*TypeError"):
        in_child("measuring.find_memory", size="many")


def test_memory_and_bytes_are_counted(tmp_path):
    kept = []
    before = watched(lambda: None).peak
    size = 2**27  # so large that memory that was freed before is not used for it
    assert watched(lambda: kept.append(b"x" * size)).peak - before > size / 2
    read, written = bytes_read_and_written()
    (tmp_path / "a").write_bytes(bytes(2**16))
    (tmp_path / "a").read_bytes()
    after = bytes_read_and_written()
    assert after[0] - read >= 2**16
    assert after[1] - written >= 2**16


@pytest.mark.parametrize(
    ("makers", "reason"), [((("mkfs.none",),), "mkfs.none is installed"), ((("false",),), "false failed")]
)
def test_a_machine_without_shared_blocks_skips_the_row_and_says_why(makers, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MAKERS", makers)
    (row,) = split_on_shared_blocks(Settings(Sizes(gib=0.01), tmp_path))
    assert reason in row.skipped
    assert list(tmp_path.iterdir()) == []


def test_one_row_is_measured_written_and_compared(tmp_path, capsys):
    (tmp_path / "work").mkdir()
    table = tmp_path / "table.json"
    arguments = ["--only=^--version", "--repeat=1", f"--folder={tmp_path / 'work'}"]
    assert main([*arguments, f"--json={table}"]) == 0
    found = json.loads(table.read_text())
    (row,) = found["rows"]
    assert row["what"] == "--version / import torch"
    assert row["repeats"] == [row["measured"]] == [row["ours"][0] / row["others"][0]]
    assert {"processor", "cores", "kernel", "torch", "file_system"} <= found["machine"].keys()
    assert found["sizes"]["repeat"] == 1
    row.update(measured=0.0, repeats=[0.0])
    table.write_text(json.dumps(found))
    capsys.readouterr()
    assert main([*arguments, f"--compare={table}"]) == 1
    assert "1 got slower" in capsys.readouterr().out
    assert main([*arguments, "--gib=3", f"--compare={table}"]) == 2
    assert "--gib=" in capsys.readouterr().err
    assert list((tmp_path / "work").iterdir()) == []


def test_the_manual_explains_every_row():
    page = (ROOT / "docs" / "reference" / "benchmarks.md").read_text()
    explained = {name for line in page.splitlines() if line.startswith("| `") for name in re.findall("`(.*?)`", line)}
    unexplained = [name for name in NAMES if name not in explained]
    assert unexplained == []


@pytest.mark.slow
def test_every_row_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", *OPTIONS, f"--folder={tmp_path}", f"--json={tmp_path}/table.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr  # so the bounds on memory hold
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["sizes"] == TINY
    assert [row["what"] for row in found["rows"]] == NAMES
    for row in found["rows"]:
        assert row["skipped"] or row["unit"] == "MiB" or row["measured"] >= 0  # less memory than torch takes
        if row["measured"] is not None and row["to_reach"] is not None:
            assert row["met"] is (row["measured"] <= row["to_reach"])
        assert row["what"] in done.stdout
    assert {row["what"] for row in found["rows"] if row["skipped"]} <= {
        ".pt → .pt, split, shared blocks / cp",
        "larger than RAM: split to .pt, memory",
    }
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
