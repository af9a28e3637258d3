"""Errors of transforms and of files with visits and plans. Nothing may be written."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import DATA, load

import vraxion_ckpt as vc
from vraxion_ckpt.errors import CorruptError, InconsistentError, TransformError, UsageError

RING = 64
EXPERTS3 = DATA / "wallclock_experts3.pt"  # address a belongs to expert a % 3
SINGLE = DATA / "wallclock_single.pt"
Step = str | tuple[str, dict[str, Any]]


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Return the folder for results. It must be empty after the test."""
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def refusal(error: type[vc.CkptError], source: Path, target: Path | str, *chain: Step, **options: Any) -> str:
    """Convert. Expect exactly the class `error`. Return its text."""
    with pytest.raises(vc.CkptError) as refused:
        vc.convert(source, target, transforms=chain, **options)
    assert type(refused.value) is error, refused.value
    return str(refused.value)


# --- Checkpoints that a transform cannot work on ---


def variant(source: Path, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    """Return a function that makes a changed copy of a monolith in a folder."""

    def make(folder: Path) -> Path:
        payload = load(source)
        change(payload)
        torch.save(payload, folder / "variant.pt")
        return folder / "variant.pt"

    return make


def without(*prefixes: str) -> Callable[[dict[str, Any]], None]:
    def change(payload: dict[str, Any]) -> None:
        payload["optim"] = None
        for name in [name for name in payload["model"] if name.startswith(prefixes)]:
            del payload["model"][name]

    return change


def asks(**request: Any) -> Callable[[dict[str, Any]], None]:
    return lambda payload: payload.update(mitosis=request)


SOURCES: dict[str, Callable[[Path], Path]] = {
    "experts": lambda _: EXPERTS3,
    "single": lambda _: SINGLE,
    "expert 1 deleted": lambda _: DATA / "modular_gc",
    "no head": variant(SINGLE, without("head.")),
    "both heads": variant(SINGLE, lambda p: p["model"].update({"head.experts.0.weight": torch.zeros(4, 16)})),
    "single, no ring": variant(SINGLE, without("router_map")),
    "experts, no ring": variant(EXPERTS3, without("router_map")),
    "asks for no expert": variant(EXPERTS3, asks(parent_expert=7, hot_addresses=[0])),
    "asks off the ring": variant(EXPERTS3, asks(parent_expert=0, hot_addresses=[64])),
    "asks for all": variant(EXPERTS3, asks(parent_expert=1, hot_addresses=list(range(1, RING, 3)))),
    "asks for text": variant(EXPERTS3, asks(parent_expert=0, hot_addresses="0")),
    "asks of text": variant(EXPERTS3, asks(parent_expert="0", hot_addresses=[0])),
    "was split": variant(EXPERTS3, asks(parent=0, child=2, addresses=[0], noise=0.0)),
}
ALL_OF_1 = list(range(1, RING, 3))


def arc_meta(**options: Any) -> Step:
    return "arc_meta", options


def split(**options: Any) -> Step:
    return "mitosis_split", options


ONES, BY_LOSS = "ones.json", "loss.json"  # files that every test of this table finds in its folder

REFUSED: list[tuple[str, list[Step], type[vc.CkptError], str]] = [
    ("experts", ["single_to_experts"], TransformError, r"already has 3 experts"),
    ("both heads", ["single_to_experts"], InconsistentError, r"both head.single.* and head.experts"),
    ("no head", ["single_to_experts"], TransformError, r"no head"),
    ("single, no ring", ["single_to_experts"], TransformError, r"no router_map\n.*ring_len=N"),
    ("single", ["single_to_experts:ring_len=32"], TransformError, r"ring_len is 32, .* has 64"),
    ("no head", [arc_meta(visits=ONES)], TransformError, r"no head"),
    ("experts, no ring", [arc_meta(visits=ONES)], TransformError, r"no router_map"),
    ("experts", ["arc_meta"], TransformError, r"no visit counts available\n.*visits=FILE"),
    ("was split", ["arc_meta"], TransformError, r"no visit counts available"),
    ("experts", [arc_meta(visits=ONES, parent=3)], TransformError, r"no expert 3; there are 3"),
    ("experts", [arc_meta(visits=ONES, arc_len=RING)], TransformError, r"takes all 22 addresses of expert 0"),
    ("expert 1 deleted", [arc_meta(visits=ONES, parent=1)], TransformError, r"expert 1 was deleted"),
    ("experts", [arc_meta(visits=ONES, policy="topk_loss")], TransformError, r"needs the loss.*\n.*loss_sum"),
    ("experts", [arc_meta(visits=BY_LOSS, policy="topk_loss", parent=2)], TransformError, r"no address of expert 2"),
    ("asks for no expert", ["arc_meta"], TransformError, r"no expert 7"),
    ("asks off the ring", ["arc_meta"], InconsistentError, r"outside the ring"),
    ("asks for all", ["arc_meta"], TransformError, r"takes all 21 addresses of expert 1"),
    ("asks for text", ["arc_meta"], InconsistentError, r"hot_addresses\]: must be a list"),
    ("asks of text", ["arc_meta"], InconsistentError, r"parent_expert\]: must be an integer"),
    ("single", [split(parent=0, addresses=[0])], TransformError, r"head is single.*\n.*single_to_experts before"),
    ("no head", [split(parent=0, addresses=[0])], TransformError, r"no head"),
    ("experts, no ring", [split(parent=0, addresses=[0])], TransformError, r"no router_map"),
    ("experts", ["mitosis_split"], TransformError, r"there is no plan\n.*arc_meta before"),
    ("experts", [split(parent=0)], TransformError, r"there is no plan"),
    ("experts", [split(addresses=[0])], TransformError, r"there is no plan"),
    ("was split", ["mitosis_split"], TransformError, r"there is no plan"),
    ("experts", [split(parent=3, addresses=[0])], TransformError, r"no expert 3; there are 3"),
    ("expert 1 deleted", [split(parent=1, addresses=[1])], TransformError, r"expert 1 was deleted"),
    ("experts", [split(parent=0, addresses=[])], TransformError, r"list of addresses is empty"),
    ("experts", [split(parent=0, addresses=[0, 3, 0])], TransformError, r"address 0 is listed twice"),
    (
        "experts",
        [split(parent=0, addresses=[0, 64])],
        TransformError,
        r"address 64 is outside the ring of 64 addresses",
    ),
    ("experts", [split(parent=0, addresses=[-1])], TransformError, r"address -1 is outside the ring"),
    ("experts", [split(parent=0, addresses=[10**30])], TransformError, r"outside the ring"),
    ("experts", [split(parent=0, addresses=[0, 4])], TransformError, r"address 4 belongs to expert 1, not to 0"),
    ("experts", [split(parent=1, addresses=ALL_OF_1)], TransformError, r"expert 1 would be left without"),
    ("asks for no expert", ["mitosis_split"], TransformError, r"no expert 7"),
    ("asks off the ring", ["mitosis_split"], TransformError, r"address 64 is outside the ring"),
    (
        "single",
        [arc_meta(visits=ONES), "single_to_experts:experts=2,route=modulo", "mitosis_split"],
        InconsistentError,
        r"plan was made for 64 addresses and 1 expert\n.*arc_meta right before",
    ),
]


@pytest.mark.parametrize(("source", "chain", "error", "says"), REFUSED)
def test_a_transform_refuses_what_it_cannot_do(source, chain, error, says, tmp_path, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(ONES).write_text(json.dumps([1] * RING))
    # Nobody visited the addresses of expert 2.
    visits = [int(a % 3 != 2) for a in range(RING)]
    Path(BY_LOSS).write_text(json.dumps({"visits": visits, "loss_sum": [0.5] * RING}))
    made = SOURCES[source](tmp_path)
    message = refusal(error, made, out / "new.pt", *chain)
    assert re.search(says, message), message
    assert message == refusal(error, made, f"{out}/new/", *chain, dry_run=True)


@pytest.mark.parametrize(
    ("chain", "moved"),
    [
        ([split(parent=1, addresses=ALL_OF_1, allow_empty_parent=True)], 21),
        ([split(parent=0, addresses=[0, 4], foreign_addresses="allow")], 2),
        ([arc_meta(visits=ONES, arc_len=RING, allow_empty_parent=True), split(allow_empty_parent=True)], 22),
    ],
)
def test_what_is_refused_by_default_can_be_allowed(chain, moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(ONES).write_text(json.dumps([1] * RING))
    assert vc.convert(EXPERTS3, "new.pt", transforms=chain).addresses_moved == moved


# --- Files with visits and plans ---


def npy(array: Any, **header: Any) -> bytes:
    """Return a .npy file. Entries of `header` replace those that describe the array."""
    file = io.BytesIO()
    described = {**np.lib.format.header_data_from_array_1_0(array), **header}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue() + array.tobytes()


def table(*changes: tuple[int, str], header: str = "address,visits", skip: int | None = None) -> bytes:
    lines = {a: f"{a},1" for a in range(RING) if a != skip} | dict(changes)
    return "\n".join([header, *lines.values()]).encode()


def numbers(**at: Any) -> bytes:
    """Return a JSON list of ones. `a5=…` sets the value at index 5."""
    return json.dumps([at.get(f"a{a}", 1) for a in range(RING)]).encode()


VISITS: dict[str, tuple[str, bytes, type[vc.CkptError], str]] = {
    "short": ("v.json", b"[1, 2]", InconsistentError, r"has 2 values, but the ring has 64"),
    "long": ("v.json", json.dumps([1] * 65).encode(), InconsistentError, r"has 65 values, but the ring has 64"),
    "empty": ("v.json", b"[]", InconsistentError, r"\[visits\]"),
    "zero": ("v.json", json.dumps([0] * RING).encode(), InconsistentError, r"all values are zero"),
    "negative": ("v.json", numbers(a5=-1), InconsistentError, r"value 5 is negative"),
    "NaN": ("v.json", numbers(a5=float("nan")), InconsistentError, r"NaN is not a JSON number"),
    "text": ("v.json", numbers(a5="1"), InconsistentError, r"list of numbers"),
    "a bool": ("v.json", numbers(a5=True), InconsistentError, r"list of numbers"),
    "nested": ("v.json", numbers(a5=[1]), InconsistentError, r"list of numbers"),
    "a number": ("v.json", b"7", InconsistentError, r"a list, or an object"),
    "no visits": ("v.json", b'{"loss_sum": [1]}', InconsistentError, r"object with `visits`"),
    "visits twice": ("v.json", b'{"visits": [1], "visits": [2]}', InconsistentError, r"occurs twice"),
    "loss short": ("v.json", b'{"visits": %s, "loss_sum": [1]}' % numbers(), InconsistentError, r"\[loss_sum\]: has 1"),
    "cut": ("v.json", numbers()[:50], CorruptError, r"is not JSON"),
    "not UTF-8": ("v.json", b"\xff\xfe[", CorruptError, r"UTF-8"),
    "npy short": ("v.npy", npy(np.ones(63)), InconsistentError, r"63 values"),
    "npy square": ("v.npy", npy(np.ones((8, 8))), InconsistentError, r"a flat list"),
    "npy negative": ("v.npy", npy(np.full(RING, -1)), InconsistentError, r"value 0 is negative"),
    "npy NaN": ("v.npy", npy(np.full(RING, np.nan)), InconsistentError, r"value 0 is not finite"),
    "npy zero": ("v.npy", npy(np.zeros(RING)), InconsistentError, r"all values are zero"),
    "npy bools": ("v.npy", npy(np.ones(RING, dtype=bool)), InconsistentError, r"numbers"),
    "npy of objects": ("v.npy", npy(np.ones(RING), descr="|O"), CorruptError, r"not a plain .npy array"),
    "npy cut": ("v.npy", npy(np.ones(RING))[:-8], CorruptError, r"not a plain .npy array"),
    "npy header cut": ("v.npy", npy(np.ones(RING))[:40], CorruptError, r"not a plain .npy array"),
    "npy empty": ("v.npy", b"", CorruptError, r"not a plain .npy array"),
    "npy huge": ("v.npy", npy(np.ones(RING), shape=(10**30,)), CorruptError, r"not a plain .npy array"),
    "npy below 0": ("v.npy", npy(np.ones(RING), shape=(-RING,)), CorruptError, r"not a plain .npy array"),
    "npy is a zip": ("v.npy", b"PK\x03\x04" + bytes(60), CorruptError, r"not a plain .npy array"),
    "npy is a pickle": ("v.npy", b"\x80\x04cos\nsystem\n.", CorruptError, r"not a plain .npy array"),
    "csv header": ("v.csv", table(header="address,count"), InconsistentError, r"must have the first line"),
    "csv empty": ("v.csv", b"", InconsistentError, r"must have the first line"),
    "csv gap": ("v.csv", table(skip=7), InconsistentError, r"no row for address 7"),
    "csv twice": ("v.csv", table((5, "4,1")), InconsistentError, r"line 7\]: has address 4, .* twice"),
    "csv off": ("v.csv", table((5, "64,1")), InconsistentError, r"line 7\]: has address 64, which is off the ring"),
    "csv text": ("v.csv", table((5, "5,many")), InconsistentError, r"line 7\]: .*numbers, not 5,many"),
    "csv NaN": ("v.csv", table((5, "5,nan")), InconsistentError, r"value 5 is not finite"),
    "csv negative": ("v.csv", table((5, "5,-1")), InconsistentError, r"value 5 is negative"),
    "csv fields": ("v.csv", table((5, "5,1,1")), InconsistentError, r"line 7\]: has 3 fields, the header has 2"),
    "csv no text": ("v.csv", table() + b"\n\xff\xff", CorruptError, r"not CSV text"),
}


@pytest.mark.parametrize(("name", "content", "error", "says"), VISITS.values(), ids=VISITS)
def test_visits_that_cannot_be_right_are_refused(name, content, error, says, tmp_path, out):
    (tmp_path / name).write_bytes(content)
    message = refusal(error, EXPERTS3, out / "new.pt", arc_meta(visits=tmp_path / name))
    assert re.search(says, message), message
    assert name in message


PLANS: dict[str, tuple[Any, type[vc.CkptError], str]] = {
    "other ring": ({"router_map_len": 32}, InconsistentError, r"\[router_map_len\]: is 32 in the plan, but 64"),
    "other experts": ({"num_experts": 4}, InconsistentError, r"\[num_experts\]: is 4 in the plan, but 3"),
    "parent as text": ({"parent_expert": "0"}, InconsistentError, r"\[parent_expert\]"),
    "addresses as text": ({"hot_addresses": ["0"]}, InconsistentError, r"\[hot_addresses\]"),
    "parent below 0": ({"parent_expert": -1}, TransformError, r"no expert -1"),
    "off the ring": ({"hot_addresses": [10**30]}, TransformError, r"outside the ring"),
    "no addresses": ({"hot_addresses": []}, TransformError, r"list of addresses is empty"),
}


@pytest.mark.parametrize(("changes", "error", "says"), PLANS.values(), ids=PLANS)
def test_a_plan_file_that_does_not_fit_is_refused(changes, error, says, tmp_path, out):
    plan = {"parent_expert": 0, "hot_addresses": [0], **changes}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    message = refusal(error, EXPERTS3, out / "new.pt", split(meta=tmp_path / "plan.json"))
    assert re.search(says, message), message


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"parent_expert": 0}'])
def test_a_plan_file_without_a_plan_is_refused(content, tmp_path, out):
    (tmp_path / "plan.json").write_bytes(content)
    assert "plan.json" in refusal(InconsistentError, EXPERTS3, out / "new.pt", split(meta=tmp_path / "plan.json"))


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (arc_meta(visits="nowhere.json"), "no such file"),
        (arc_meta(visits="/"), "is not a regular file"),
        (split(meta="nowhere.json"), "no such file"),
    ],
)
def test_a_file_that_is_not_there_is_a_mistake_of_the_call(step, says, out):
    assert says in refusal(UsageError, EXPERTS3, out / "new.pt", step)
