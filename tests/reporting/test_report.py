"""`report`: the page, also in a real browser without network, and the picture."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from support import DATA, EXPECTED, load

import vraxion_ckpt as vc
from vraxion_ckpt.errors import UsageError

CHROMIUM = shutil.which("chromium")
VISITS = EXPECTED / "wallclock_experts3.visits.json"
SOURCE = DATA / "wallclock_experts3.pt"


def split(folder: Path, source: Path = SOURCE, visits: Path = VISITS) -> Path:
    vc.convert(source, folder / "after.pt", transforms=[("arc_meta", {"visits": visits}), "mitosis_split:noise=0.01"])
    return folder / "after.pt"


def ringed(path: Path, experts: int, router: torch.Tensor) -> Path:
    """Write a checkpoint with the given number of experts and router map."""
    payload = load(DATA / "wallclock_single.pt")
    model = {name: tensor for name, tensor in payload["model"].items() if not name.startswith("head.")}
    torch.manual_seed(0)
    for i in range(experts):
        model[f"head.experts.{i}.weight"] = torch.randn(4, 16)
    torch.save({"model": {**model, "router_map": router}, "step": 4, "num_experts": experts}, path)
    return path


def figures(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1])


def traces(figure: dict) -> dict:
    """Return the traces of a figure by their names."""
    return {trace["name"]: trace for trace in figure["data"]}


def norms(page: Path) -> dict:
    """Return the norms in the page's table, by expert."""
    rows = re.findall(r"<i style=[^>]*>(\d+)</i>\s*</td><td class=\"n\">([^<]*)</td>", page.read_text())
    return {int(expert): norm if norm == "not a number" else float(norm) for expert, norm in rows}


def colours(page: Path) -> dict:
    """Return the colours of the experts in the key, which must equal those in the rings and the norms."""
    shown = re.findall(r"<i style=\"background:(#\w+);color:#\w+\">(\d+)</i>", page.read_text())
    pairs = [(int(expert), colour) for colour, expert in shown]
    drawn = figures(page)
    for name, figure in drawn.items():
        if name.startswith("ring-"):
            owners = traces(figure)["owners"]
            experts = [int(re.match(r"expert (\d+)", text)[1]) for text in owners["text"]]
            pairs += zip(experts, owners["marker"]["color"], strict=True)
    for bars in drawn.get("norms", {}).get("data", []):
        pairs += zip(map(int, bars["x"]), bars["marker"]["color"], strict=True)
    found = dict(pairs)
    assert set(pairs) == set(found.items())
    return found


def body(page: Path) -> str:
    """Return the visible text, without scripts and tags."""
    text = re.sub(r"<script.*?</script>|<style.*?</style>|<wbr>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


# --- what it shows ---


def test_it_shows_the_ring_before_and_after_with_owners_visits_and_the_hot_arc(tmp_path):
    after = split(tmp_path)
    vc.report(after, tmp_path / "out.html", against=SOURCE, visits=VISITS)
    drawn = figures(tmp_path / "out.html")
    record = load(after)["mitosis"]
    visits = json.loads(VISITS.read_text())["visits"]
    for number, path in enumerate((SOURCE, after)):
        owners, counted, hot, labels = drawn[f"ring-{number}"]["data"]
        router = load(path)["model"]["router_map"].tolist()
        shown = [None] * 64
        for theta, width, text in zip(owners["theta"], owners["width"], owners["text"], strict=True):
            first, size = round((theta - width / 2) * 64 / 360), round(width * 64 / 360)
            for address in range(first, first + size):
                shown[address % 64] = int(re.match(r"expert (\d+)", text)[1])
        assert shown == router
        for theta, expert in zip(labels["theta"], labels["text"], strict=True):
            assert router[int(theta * 64 / 360) % 64] == int(expert)
        heights = np.array(counted["r"])
        np.testing.assert_allclose(heights / heights.sum(), np.array(visits) / sum(visits))
        covered = range(min(record["addresses"]), max(record["addresses"]) + 1)
        assert hot["width"] == [pytest.approx(len(covered) * 360 / 64)]
        assert hot["theta"] == [pytest.approx((covered[0] + len(covered) / 2) * 360 / 64)]


def test_it_shows_shares_and_signs_of_life_before_predicted_and_measured(tmp_path):
    after = split(tmp_path)
    (tmp_path / "later.json").write_text(json.dumps([5 + i % 7 for i in range(64)]))
    done = vc.report(after, tmp_path / "out.html", against=SOURCE, visits=VISITS, visits_after=tmp_path / "later.json")
    signs = vc.inspect(after, against=SOURCE, visits=VISITS, visits_after=tmp_path / "later.json").signs
    bars = {trace["name"]: trace["y"] for trace in figures(tmp_path / "out.html")["shares"]["data"]}
    text = body(tmp_path / "out.html")
    for name in ("before", "predicted", "measured"):
        load_ = getattr(signs, name)
        assert bars[name] == pytest.approx(load_.shares)
        assert f"{name} {load_.max_share:.1%} {load_.entropy:.3f}" in text
        assert f"{load_.max_share:.1%}" in done.headline
    assert done.headline in text


def test_it_shows_cosines_and_norms_as_torch_measures_them(tmp_path):
    after = split(tmp_path)
    vc.report(after, tmp_path / "out.html", against=SOURCE)
    model = load(after)["model"]
    vectors = [
        torch.cat([model[f"head.experts.{i}.{leaf}"].flatten() for leaf in ("weight", "bias")]).double()
        for i in range(4)
    ]
    (matrix,) = figures(tmp_path / "out.html")["similarity"]["data"]
    assert matrix["x"] == matrix["y"] == ["0", "1", "2", "3"]
    expected = [[float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for b in vectors] for a in vectors]
    np.testing.assert_allclose(matrix["z"], expected, atol=1e-6)
    assert norms(tmp_path / "out.html") == {i: pytest.approx(float(v.norm()), rel=1e-5) for i, v in enumerate(vectors)}


def test_the_norms_of_many_experts_are_bars_as_torch_measures_them(tmp_path):
    path = ringed(tmp_path / "a.pt", 9, torch.arange(64) % 9)
    vc.report(path, tmp_path / "out.html")
    model = load(path)["model"]
    expected = [float(model[f"head.experts.{i}.weight"].double().norm()) for i in range(9)]
    (bars,) = figures(tmp_path / "out.html")["norms"]["data"]
    assert bars["x"] == list("012345678")
    np.testing.assert_allclose(bars["y"], expected)


def test_a_clone_shows_by_what_it_differs(tmp_path):
    after = tmp_path / "after.pt"
    vc.convert(SOURCE, after, transforms=[("mitosis_split", {"parent": 2, "addresses": [2, 5], "noise": 1e-5})])
    vc.report(after, tmp_path / "out.html")
    (matrix,) = figures(tmp_path / "out.html")["similarity"]["data"]
    assert matrix["x"] == ["0", "1", "2, 3"]
    assert max(value for row in (0, 1, 2) for value in matrix["z"][row][:row] + matrix["z"][row][row + 1 :]) < 0.9
    (row,) = re.findall(
        r"compared with expert what differs 3 2 (weight, bias: .*?) Similarity", body(tmp_path / "out.html")
    )
    model = load(after)["model"]
    pairs = [[model[f"head.experts.{i}.{leaf}"].double().flatten() for leaf in ("weight", "bias")] for i in (2, 3)]
    parent, child = map(torch.cat, pairs)
    gap = re.fullmatch(r"weight, bias: (\d+) of (\d+) elements, max-abs ([\d.e-]+), relative L2 ([\d.e-]+), .*", row)
    assert (int(gap[1]), int(gap[2])) == (int((parent != child).sum()), len(parent))
    assert float(gap[3]) == pytest.approx(float((parent - child).abs().max()), rel=1e-2)
    assert float(gap[4]) == pytest.approx(float((parent - child).norm() / parent.norm()), rel=1e-2)


@pytest.mark.parametrize("number", [2, 40])
def test_clones_that_differ_in_nothing_are_a_sentence(number, tmp_path):
    chain = [f"single_to_experts:experts={number},route=modulo"]
    vc.convert(DATA / "wallclock_single.pt", tmp_path / "a.pt", transforms=chain)
    vc.report(tmp_path / "a.pt", tmp_path / "out.html")
    assert figures(tmp_path / "out.html").keys() == {"ring-0", "shares"}
    text = body(tmp_path / "out.html")
    assert ("Both experts are" if number == 2 else "All 40 experts are") + " bit-identical" in text
    assert f"The norms of {number} experts are equal: " in text
    assert "compared with" not in text


def test_identical_experts_are_found_also_if_they_are_not_numbers(tmp_path):
    payload = load(SOURCE)
    for leaf in ("weight", "bias"):
        payload["model"][f"head.experts.0.{leaf}"].fill_(float("nan"))
        payload["model"][f"head.experts.2.{leaf}"].fill_(float("nan"))
    torch.save(payload, tmp_path / "a.pt")
    vc.report(tmp_path / "a.pt", tmp_path / "out.html")
    text = body(tmp_path / "out.html")
    assert "what differs 2 0 nothing: bit-identical" in text
    assert "The cosine between experts 0, 2 and expert 1 is not defined." in text
    payload["model"]["head.experts.2.bias"][0] = 0
    torch.save(payload, tmp_path / "b.pt")
    vc.report(tmp_path / "b.pt", tmp_path / "other.html")
    assert "bit-identical" not in body(tmp_path / "other.html")


def test_it_tells_what_changed_the_lifecycle_and_the_history(tmp_path):
    after = split(tmp_path)
    vc.report(after, tmp_path / "out.html", against=SOURCE)
    text = body(tmp_path / "out.html")
    for label, line in vc.diff(SOURCE, after).summary():
        assert f"{label} {line}" in text
    assert "mitosis_split vraxion-ckpt" in text
    assert "created at step" in text


def test_a_planned_split_is_shown_with_what_it_predicts(tmp_path):
    vc.convert(SOURCE, tmp_path / "planned.pt", transforms=[("arc_meta", {"visits": VISITS})])
    done = vc.report(tmp_path / "planned.pt", tmp_path / "out.html", visits=VISITS)
    assert "a split is planned: expert 2 gives up 6 addresses" in done.headline
    assert "predicted" in done.headline
    assert "hot arc" in traces(figures(tmp_path / "out.html")["ring-0"])


@pytest.mark.parametrize(
    "name", ["raw_state_dict.pt", "evolution_latest.pt", "modular_gc", "wallclock_adapter_experts.pt"]
)
def test_every_kind_of_checkpoint_can_be_drawn(name, tmp_path):
    vc.report(DATA / name, tmp_path / "out.html", picture=tmp_path / "out.png")
    for figure in figures(tmp_path / "out.html").values():
        go.Figure(figure)  # plotly's own check of every property


def test_a_model_without_ring_or_head_is_told_to_have_none(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "a.pt")
    vc.report(tmp_path / "a.pt", tmp_path / "out.html", picture=tmp_path / "out.png")
    text = body(tmp_path / "out.html")
    assert "no router map" in text
    assert "no head" in text


def test_what_is_not_finite_leaves_gaps_and_is_told(tmp_path):
    payload = load(SOURCE)
    payload["model"]["head.experts.1.weight"][0, 0] = float("nan")
    torch.save(payload, tmp_path / "a.pt")
    vc.report(tmp_path / "a.pt", tmp_path / "out.html")
    drawn = figures(tmp_path / "out.html")
    assert norms(tmp_path / "out.html")[1] == "not a number"
    assert drawn["similarity"]["data"][0]["z"][0][1] is None
    assert "not a number: expert 1," in body(tmp_path / "out.html")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_experts_of_unusual_dtypes_have_norms_and_cosines(dtype, tmp_path):
    payload = load(SOURCE)
    model = {name: tensor for name, tensor in payload["model"].items() if "head" not in name}
    weights = [payload["model"][f"head.experts.{i}.weight"].to(dtype) for i in range(3)]
    for i, weight in enumerate(weights):
        model[f"head.experts.{i}.weight"] = weight * 1j if dtype.is_complex else weight
    torch.save({"model": model, "num_experts": 3}, tmp_path / "a.pt")
    vc.report(tmp_path / "a.pt", tmp_path / "out.html")
    drawn = figures(tmp_path / "out.html")
    plain = [weight.to(torch.complex128).real.flatten() for weight in weights]
    expected = {i: pytest.approx(float(one.norm()), rel=1e-5) for i, one in enumerate(plain)}
    assert norms(tmp_path / "out.html") == expected
    cosine = float(torch.nn.functional.cosine_similarity(plain[0], plain[1], dim=0))
    assert drawn["similarity"]["data"][0]["z"][0][1] == pytest.approx(cosine, abs=1e-6)


# --- what it says ---


def rerouted(path: Path, moves: dict[int, int], source: Path = SOURCE) -> Path:
    """Write a copy of a checkpoint with other owners for some addresses."""
    payload = load(source)
    for address, owner in moves.items():
        payload["model"]["router_map"][address] = owner
    torch.save(payload, path)
    return path


def test_addresses_that_moved_between_experts_are_told_though_there_is_no_new_one(tmp_path):
    router = load(SOURCE)["model"]["router_map"].tolist()
    moved = [address for address, owner in enumerate(router) if owner == 2][:5]
    changed = rerouted(tmp_path / "a.pt", dict.fromkeys(moved, 0))
    assert vc.report(changed, tmp_path / "one.html", against=SOURCE).headline == (
        "5 addresses went from expert 2 to expert 0"
    )
    assert "hot arc" in traces(figures(tmp_path / "one.html")["ring-1"])
    assert vc.report(SOURCE, tmp_path / "two.html", against=SOURCE).headline == "no address moved"


def test_every_split_since_the_old_checkpoint_is_told(tmp_path):
    router = load(SOURCE)["model"]["router_map"].tolist()
    taken = {
        parent: [i for i, owner in enumerate(router) if owner == parent][:size] for parent, size in ((2, 2), (0, 3))
    }
    chain = [("mitosis_split", {"parent": parent, "addresses": some, "noise": 0}) for parent, some in taken.items()]
    vc.convert(SOURCE, tmp_path / "a.pt", transforms=chain)
    told = vc.report(tmp_path / "a.pt", tmp_path / "out.html", against=SOURCE).headline
    assert told.startswith("3 → 5 experts")
    assert "3 addresses went from expert 0 to expert 4" in told
    assert "2 from expert 2 to expert 3" in told


def test_a_new_plan_counts_for_more_than_the_last_split(tmp_path):
    after = split(tmp_path)
    vc.convert(after, tmp_path / "planned.pt", transforms=[("arc_meta", {"visits": VISITS})])
    vc.convert(tmp_path / "planned.pt", tmp_path / "next.pt", transforms=["mitosis_split:noise=0"])
    expected = vc.inspect(tmp_path / "next.pt", against=after, visits=VISITS).signs
    for against in (None, after):
        found = vc.inspect(tmp_path / "planned.pt", against=against, visits=VISITS).signs
        assert (found.before, found.predicted) == (expected.before, expected.predicted)
    done = vc.report(tmp_path / "planned.pt", tmp_path / "out.html", against=SOURCE, visits=VISITS)
    assert "6 addresses went from expert 2 to expert 3" in done.headline
    assert "planned" not in done.headline


def test_a_single_expert_is_told_as_one(tmp_path):
    one = ringed(tmp_path / "a.pt", 1, torch.zeros(64, dtype=torch.int64))
    assert vc.report(one, tmp_path / "out.html").headline == "1 expert"
    assert vc.report(DATA / "modular_gc", tmp_path / "gc.html").headline == "3 experts, 1 of them deleted"
    assert "Deleted, without tensors: expert 1." in body(tmp_path / "gc.html")


# --- scale ---


@pytest.mark.parametrize(("experts", "length", "modulo"), [(64, 10**6, False), (4096, 10**6, True), (64, 64, True)])
def test_a_page_stays_small_and_readable_whatever_the_scale(experts, length, modulo, tmp_path):
    owners = torch.arange(length) % experts if modulo else torch.arange(length) * experts // length
    path = ringed(tmp_path / "a.pt", experts, owners)
    np.save(tmp_path / "visits.npy", np.arange(length) % 1000 + 1)
    done = vc.report(path, tmp_path / "out.html", visits=tmp_path / "visits.npy")
    assert done.page_bytes < 6 * 2**20
    drawn = figures(tmp_path / "out.html")
    owned, counted = drawn["ring-0"]["data"][:2]
    assert len(owned["theta"]) == (experts if not modulo or length == 64 else 1440)
    assert len(counted["r"]) <= 720
    assert sum(owned["width"]) == pytest.approx(360)
    assert len(drawn["norms"]["data"][0]["x"]) == 64
    assert ("equal parts" in body(tmp_path / "out.html")) == (modulo and length > 64)


def test_experts_that_own_the_same_are_drawn_as_often(tmp_path):
    path = ringed(tmp_path / "a.pt", 3, torch.arange(10**6) % 3)
    vc.report(path, tmp_path / "out.html")
    colours = figures(tmp_path / "out.html")["ring-0"]["data"][0]["marker"]["color"]
    assert {colours.count(colour) for colour in set(colours)} == {480}


def test_an_expert_has_the_same_colour_before_and_after_and_in_every_report(tmp_path):
    router = torch.arange(64) % 10
    before = ringed(tmp_path / "a.pt", 10, router)
    after = ringed(tmp_path / "b.pt", 11, torch.where(torch.arange(64) == 9, 10, router))
    vc.report(before, tmp_path / "before.html")
    vc.report(after, tmp_path / "split.html", against=before)
    vc.report(ringed(tmp_path / "c.pt", 40, torch.arange(640) % 40), tmp_path / "forty.html")
    vc.report(split(tmp_path), tmp_path / "real.html", against=SOURCE, visits=VISITS)
    forty = colours(tmp_path / "forty.html")
    assert forty.keys() == set(range(40))
    assert len(set(forty.values())) == 40
    for name, number in (("before", 10), ("split", 11), ("real", 4)):
        assert colours(tmp_path / f"{name}.html") == {i: forty[i] for i in range(number)}


def test_no_load_and_no_hot_arc_has_the_colour_of_an_expert(tmp_path):
    (tmp_path / "later.json").write_text(json.dumps([5 + i % 7 for i in range(64)]))
    options = {"against": SOURCE, "visits": VISITS, "visits_after": tmp_path / "later.json"}
    vc.report(split(tmp_path), tmp_path / "out.html", **options)
    vc.report(ringed(tmp_path / "c.pt", 40, torch.arange(640) % 40), tmp_path / "forty.html")
    drawn = figures(tmp_path / "out.html")
    loads = {trace["name"]: trace["marker"]["color"] for trace in drawn["shares"]["data"]}
    assert len(set(loads.values())) == len(loads) == 3
    ring = traces(drawn["ring-1"])
    others = {*loads.values(), *ring["hot arc"]["marker"]["color"], *ring["visits"]["marker"]["color"]}
    assert not others & set(colours(tmp_path / "forty.html").values())


def as_seen_without(missing: str, colour: str) -> np.ndarray:
    """Return a colour in Oklab as seen without one kind of cones (Machado, Oliveira and Fernandes 2009)."""
    simulated = {
        "none": np.eye(3),
        "L": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "M": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "S": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    lms = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.21190350, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.62997870],
    ]
    lab = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.97799850, -2.42859221, 0.45059371],
        [0.02590404, 0.78277177, -0.80867577],
    ]
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return np.array(lab) @ np.cbrt(np.array(lms) @ np.clip(np.array(simulated[missing]) @ linear, 0, 1))


@pytest.mark.parametrize("missing", ["none", "L", "M", "S"])
def test_the_first_experts_can_be_told_apart_with_any_colour_vision(missing, tmp_path):
    vc.report(ringed(tmp_path / "a.pt", 8, torch.arange(64) % 8), tmp_path / "out.html")
    seen = [as_seen_without(missing, colour) for colour in colours(tmp_path / "out.html").values()]
    nearest = min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i])
    assert nearest > 0.06  # 0.02 is the least difference that is seen at all


@pytest.mark.slow
def test_the_key_lists_forty_experts_and_of_thousands_those_of_the_split(tmp_path):
    (tmp_path / "visits.json").write_text(json.dumps([1] * 8192))
    forty = ringed(tmp_path / "a.pt", 40, torch.arange(640) % 40)
    vc.report(forty, tmp_path / "forty.html")
    assert f"experts: {' '.join(map(str, range(40)))} Now" in body(tmp_path / "forty.html")
    many = ringed(tmp_path / "b.pt", 4096, torch.arange(8192) % 4096)
    vc.convert(many, tmp_path / "c.pt", transforms=[("mitosis_split", {"parent": 7, "addresses": [7], "noise": 0})])
    vc.report(tmp_path / "c.pt", tmp_path / "many.html", against=many)
    listed = "experts: 7 gave up addresses 4096 got them hot arc (colours repeat every 40 experts) Before"
    assert listed in body(tmp_path / "many.html")


def test_what_would_fill_pages_is_cut_and_told(tmp_path):
    payload = load(EXPECTED / "named_experts3.split.pt")
    record = dict.fromkeys(("name", "distribution", "version", "source"), "x") | {"options": {}}
    payload["vraxion_ckpt"] = {"history": [{**record, "summary": f"number {i}"} for i in range(5000)]}
    torch.save(payload, tmp_path / "a.pt")
    vc.report(tmp_path / "a.pt", tmp_path / "out.html")
    text = body(tmp_path / "out.html")
    assert "4,960 earlier steps" in text
    assert "number 4999" in text
    assert "number 4959 " not in text


# --- safety ---


EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def hostile(tmp_path) -> Path:
    """Return a page of a checkpoint in which every text contains a script."""
    payload = load(EXPECTED / "named_experts3.split.pt")
    record = {
        "name": EVIL, "options": {EVIL: EVIL}, "distribution": EVIL, "version": EVIL, "source": EVIL, "summary": EVIL,
    }  # fmt: skip
    payload["vraxion_ckpt"] = {"history": [record]}
    payload[EVIL] = EVIL
    (tmp_path / "x<script>").mkdir()
    torch.save(payload, tmp_path / "x<script>/a&<b>.pt")
    vc.report(tmp_path / "x<script>/a&<b>.pt", tmp_path / "out.html", against=DATA / "named_experts3.pt")
    return tmp_path / "out.html"


def test_nothing_that_a_checkpoint_holds_becomes_markup(hostile):
    page = hostile.read_text()
    assert EVIL not in page
    assert "&lt;img src=x" in page
    assert "default-src 'none'" in page


def test_half_a_surrogate_pair_is_written_out(tmp_path):
    payload = load(EXPECTED / "named_experts3.split.pt")
    record = dict.fromkeys(("name", "distribution", "version", "source", "summary"), "half \ud800") | {"options": {}}
    payload["vraxion_ckpt"] = {"history": [record]}
    torch.save(payload, tmp_path / "a.pt")
    vc.report(tmp_path / "a.pt", tmp_path / "out.html")
    assert "half \\ud800" in body(tmp_path / "out.html")


@pytest.mark.parametrize("name", [r"a$\foo$.pt", "a$b_.pt", "\u6c49\u5b57.pt"])
def test_a_name_is_only_a_name(name, tmp_path, recwarn):
    shutil.copy(SOURCE, tmp_path / name)
    vc.report(tmp_path / name, tmp_path / "out.html", picture=tmp_path / "out.png")
    assert name in body(tmp_path / "out.html")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


@pytest.mark.parametrize(
    "router",
    [
        torch.zeros(4, 4, dtype=torch.int64),
        torch.tensor([-1, 0]),
        torch.zeros(0),
        torch.tensor(3),
        torch.tensor([2**60]),
    ],
    ids=["square", "negative", "empty", "number", "huge"],
)
def test_a_router_map_without_a_head_is_no_ring(router, tmp_path):
    torch.save({"model": {"router_map": router, "w": torch.zeros(2)}, "step": 1}, tmp_path / "a.pt")
    vc.report(tmp_path / "a.pt", tmp_path / "out.html", picture=tmp_path / "out.png")
    assert "no head whose experts own its addresses" in body(tmp_path / "out.html")


@pytest.mark.parametrize("option", ["--visits", "--visits-after"])
def test_nothing_is_written_over_the_visits(option, tmp_path, run_cli):
    shutil.copy(VISITS, tmp_path / "v.json")
    code, _, complained = run_cli(
        "report", SOURCE, option, tmp_path / "v.json", "-o", tmp_path / "v.json", "--overwrite"
    )
    assert code == 2
    assert "input" in complained
    assert (tmp_path / "v.json").read_bytes() == VISITS.read_bytes()


def test_outputs_are_refused_where_they_must_not_be(tmp_path, run_cli):
    shutil.copy(SOURCE, tmp_path / "a.pt")
    (tmp_path / "there.html").write_text("mine")
    for arguments, says in (
        ([], "no output is given"),
        (["-o", tmp_path / "there.html"], "--overwrite"),
        (["-o", tmp_path / "a.pt", "--overwrite"], "inside the source"),
        (["-o", tmp_path / "x", "--png", tmp_path / "x"], "two outputs"),
        (["-o", tmp_path / "x.png"], "use --png for a picture"),
        (["-o", tmp_path / "nowhere/x.html"], "nowhere"),
        (["-o", tmp_path], "--overwrite"),
    ):
        code, _, complained = run_cli("report", tmp_path / "a.pt", *arguments)
        assert code == 2
        assert says in complained
    assert (tmp_path / "there.html").read_text() == "mine"
    assert (tmp_path / "a.pt").read_bytes() == SOURCE.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "there.html"]


@pytest.mark.parametrize(
    ("module", "option", "extra"),
    [("jinja2", "-o", "report"), ("plotly", "-o", "report"), ("matplotlib", "--png", "png")],
)
def test_a_missing_extra_is_named(module, option, extra, tmp_path):
    script = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *rest: None if name == {module!r} else find(name, *rest)\n"
        "from vraxion_ckpt.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "report", SOURCE, option, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"pip install 'vraxion-ckpt[{extra}]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_reading_again_is_refused_where_the_rings_do_not_fit(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="no ring of the same length"):
        vc.report(SOURCE, tmp_path / "out.html", against=tmp_path / "a.pt", visits=VISITS)


def test_the_picture_is_a_picture_and_the_same_twice(tmp_path):
    after = split(tmp_path)
    for name in ("one.png", "two.png"):
        vc.report(after, picture=tmp_path / name, against=SOURCE, visits=VISITS)
    data = (tmp_path / "one.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert data == (tmp_path / "two.png").read_bytes()


# --- in a browser ---


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium here; `apt-get install chromium` brings it")
    from playwright.sync_api import sync_playwright

    quiet = ["background-networking", "component-update", "sync", "gpu", "quic"]
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet)]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open a page without network. Return it, its errors and its requests."""
    contexts = []

    def visit(path: Path, **options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        context.set_offline(True)
        page, complaints, requests = context.new_page(), [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        drawn = len(figures(path))
        page.wait_for_function(f"document.querySelectorAll('div.js-plotly-plot .main-svg').length >= {drawn}")
        return page, complaints, requests

    yield visit
    for context in contexts:
        context.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_offline_asks_for_nothing_and_complains_of_nothing(scheme, visit, tmp_path):
    vc.report(split(tmp_path), tmp_path / "out.html", against=SOURCE, visits=VISITS)
    page, complaints, requests = visit(tmp_path / "out.html", color_scheme=scheme)
    assert page.locator("div.js-plotly-plot").count() == len(figures(tmp_path / "out.html"))
    assert page.locator("#ring-1 .barlayer path").count() >= 64
    ink = page.evaluate("getComputedStyle(document.body).color")
    ticks = page.locator("#shares .xtick text").first.evaluate("text => getComputedStyle(text).fill")
    assert ink == ticks
    assert (max(map(int, re.findall(r"\d+", ink)[:3])) < 100) == (scheme == "light")
    assert complaints == []
    assert requests == [(tmp_path / "out.html").as_uri()]


@pytest.mark.slow
def test_hovering_over_the_ring_names_the_owner(visit, tmp_path):
    vc.report(split(tmp_path), tmp_path / "out.html", against=SOURCE, visits=VISITS)
    page, _, _ = visit(tmp_path / "out.html")
    ring = page.locator("#ring-1 .polarsublayer.plotbg").first
    ring.scroll_into_view_if_needed()
    box = page.locator("#ring-1 .barlayer").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0], middle[1])
    page.mouse.move(middle[0] + 1, middle[1] - box["height"] * 0.27, steps=4)
    page.wait_for_selector("#ring-1 .hovertext")
    told = re.fullmatch(r"expert (\d+)address (\d+)", page.locator("#ring-1 .hovertext").text_content())
    router = load(tmp_path / "after.pt")["model"]["router_map"]
    assert router[int(told[2])] == int(told[1])
    assert int(told[2]) in (62, 63, 0, 1, 2)


def forty_with_long_names(folder: Path) -> Path:
    """Report a split of one of 40 experts, with long names of files and tensors."""
    before, after = folder / "before", folder / f"{'a_long_name_of_a_checkpoint_' * 3}.pt"
    payload = load(ringed(before, 40, torch.arange(640) % 40))
    torch.save(payload, before)
    payload["model"]["decoder." + "layer_with_a_long_name." * 8 + "weight"] = torch.zeros(2)
    payload["an_entry_with_a_long_name_" * 6] = 1
    torch.save(payload, folder / "longer")
    chain = [("mitosis_split", {"parent": 7, "addresses": [7, 47], "noise": 0.01})]
    vc.convert(folder / "longer", after, transforms=chain, from_="pt")
    vc.report(after, folder / "out.html", against=before)
    return folder / "out.html"


def split_with_visits(folder: Path) -> Path:
    """Report a split of real experts."""
    vc.report(split(folder), folder / "out.html", against=SOURCE, visits=VISITS)
    return folder / "out.html"


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 480, 1200])
@pytest.mark.parametrize("drawn", [split_with_visits, forty_with_long_names])
def test_nothing_overlaps_or_hangs_out(drawn, width, visit, tmp_path):
    page, _, _ = visit(drawn(tmp_path), viewport={"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    text = page.locator("h1, p, figcaption, .key, .scroll, td, h3")
    wider = "all => all.filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.outerHTML)"
    assert text.evaluate_all(wider) == []
    for figure in page.locator("figure").all():
        caption = figure.locator("figcaption").bounding_box()
        titles = figure.locator(".xtitle, .ytitle, .xtick text, .angularaxistick text").all()
        lowest = max(title.bounding_box()["y"] + title.bounding_box()["height"] for title in titles)
        assert lowest + 4 <= caption["y"]
    keys = [entry.bounding_box() for entry in page.locator(".key span").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in keys)
    boxes = [figure.bounding_box() for figure in page.locator("figure").all()]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = a["x"] >= b["x"] + b["width"] or b["x"] >= a["x"] + a["width"]
            assert apart or a["y"] >= b["y"] + b["height"] or b["y"] >= a["y"] + a["height"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [480, 1200])
def test_the_numbers_beside_a_long_ring_are_not_cut_off(width, visit, tmp_path):
    path = ringed(tmp_path / "a.pt", 3, torch.arange(10**6) * 3 // 10**6)
    np.save(tmp_path / "visits.npy", np.arange(10**6) % 1000 + 1)
    vc.report(path, tmp_path / "out.html", visits=tmp_path / "visits.npy")
    page, _, _ = visit(tmp_path / "out.html", viewport={"width": width, "height": 900})
    around = page.locator("#ring-0").bounding_box()
    for text in page.locator("#ring-0 .angularaxistick text").all():
        box = text.bounding_box()
        assert around["x"] <= box["x"]
        assert box["x"] + box["width"] <= around["x"] + around["width"]


@pytest.mark.slow
def test_a_hostile_checkpoint_runs_no_script(hostile, visit):
    page, complaints, requests = visit(hostile)
    assert page.title() == "a&<b>.pt"
    assert page.locator("img").count() == 0
    assert complaints == []
    assert len(requests) == 1
