"""`inspect`: the facts about a checkpoint, held against the files as torch reads them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import DATA, DIRECTORIES, EXPECTED, MONOLITHS, files_below, load, on_a_terminal

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.source_files import SourceFile
from vraxion_ckpt.errors import InconsistentError, UsageError

EXPERTS3 = DATA / "modular_experts3"
VISITS = EXPECTED / "wallclock_experts3.visits.json"
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("source", [*MONOLITHS, *DIRECTORIES], ids=lambda path: path.name)
def test_every_tensor_is_listed_with_its_dtype_shape_and_values(source):
    facts = vc.inspect(source, values=True)
    state = load(source / "system/router.state" if source.is_dir() else source)
    model = dict(state.get("model", state))
    for shard in sorted((source / "experts").glob("*.pt")) if source.is_dir() else ():
        number = int(shard.stem.removeprefix("expert_"))
        model |= {f"head.experts.{number}.{leaf}": tensor for leaf, tensor in load(shard).items()}
    assert facts.tensors.model.keys() == model.keys()
    for name, tensor in model.items():
        told = facts.tensors.model[name]
        assert (told.dtype, told.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert told.bytes == tensor.nbytes
        if tensor.numel():
            assert (told.values.minimum, told.values.maximum) == (float(tensor.min()), float(tensor.max()))
        assert (told.values.nans, told.values.infinities) == (0, 0)
    optimizer = state.get("optim", state.get("optimizer")) or {"state": {}}
    slots = [value for slots in optimizer["state"].values() for value in slots.values()]
    assert len(facts.tensors.optimizer) == len([value for value in slots if isinstance(value, torch.Tensor)])


def test_sizes_are_those_of_the_checkpoints_own_files(tmp_path):
    shutil.copytree(EXPERTS3, tmp_path / "run")
    (tmp_path / "run/train.log").write_text("x" * 10_000)
    facts = vc.inspect(tmp_path / "run")
    ours = files_below(EXPERTS3)
    assert facts.files == len(ours)
    assert facts.bytes_on_disk == sum((EXPERTS3 / name).stat().st_size for name in ours)


def test_what_is_not_finite_is_counted_and_the_rest_still_has_its_extremes(tmp_path, run_cli):
    odd = torch.tensor([1.0, float("nan"), -3.0, float("inf"), float("nan")])
    torch.save({"odd": odd, "all": torch.full((2,), float("nan")), "none": torch.zeros(0)}, tmp_path / "a.pt")
    tensors = vc.inspect(tmp_path / "a.pt", values=True).tensors.model
    assert tensors["odd"].values.model_dump() == {"minimum": -3.0, "maximum": 1.0, "nans": 2, "infinities": 1}
    assert tensors["all"].values.model_dump() == {"minimum": None, "maximum": None, "nans": 2, "infinities": 0}
    assert tensors["none"].values.minimum is None
    said = run_cli("inspect", tmp_path / "a.pt", "--values")[1]
    assert "odd  float32 [5], 20 B, -3 … 1, 2 NaN, 1 infinite" in said


def test_arcs_go_round_the_ring(tmp_path):
    payload = load(DATA / "named_experts3.pt")
    payload["model"]["router_map"][:] = torch.tensor([1] * 3 + [0] * 20 + [2] * 40 + [1])
    torch.save(payload, tmp_path / "a.pt")
    ring = vc.inspect(tmp_path / "a.pt").ring
    assert (ring.arcs, ring.longest_arc) == (3, 40)
    payload["model"]["router_map"][:] = 0
    torch.save(payload, tmp_path / "b.pt")
    assert vc.inspect(tmp_path / "b.pt").ring.arcs == 1


def test_many_experts_are_all_listed_and_only_a_few_are_opened(tmp_path, run_cli, monkeypatch):
    vc.convert(
        DATA / "wallclock_single.pt", f"{tmp_path}/run/", transforms=["single_to_experts:experts=40,route=modulo"]
    )
    opened = []
    original = SourceFile.__init__

    def note(self, path, *args, **more):
        opened.append(path.name)
        original(self, path, *args, **more)

    monkeypatch.setattr(SourceFile, "__init__", note)
    facts = vc.inspect(tmp_path / "run")
    assert len(facts.experts) == 40
    assert sum(name.startswith("expert") for name in opened) == 16
    assert [expert.id for expert in facts.experts if expert.tensors is None] == list(range(16, 40))
    assert all(expert.lifecycle and expert.addresses for expert in facts.experts)
    assert all(expert.tensors for expert in vc.inspect(tmp_path / "run", tensors=True).experts)
    said = run_cli("inspect", tmp_path / "run", "--tensors")[1]
    assert "24 more" in said
    assert "… 16 more, see --json" in said
    assert max(map(len, said.splitlines())) <= 80


# --- signs of life ---


def load_of(visits, owners, experts):
    """Compute what VRAXION's trainers log, as they do."""
    counts = torch.zeros(experts, dtype=torch.float64).index_add_(0, owners, torch.as_tensor(visits).double())
    p = counts / counts.sum()
    return float(p.max()), float(-(p * torch.log(p + 1e-12)).sum() / np.log(experts)) if experts > 1 else 0.0


def test_signs_of_life_before_predicted_and_measured_are_what_trainers_log(tmp_path, run_cli):
    source = DATA / "wallclock_experts3.pt"
    visits = json.loads(VISITS.read_text())["visits"]
    vc.convert(source, tmp_path / "b.pt", transforms=[("arc_meta", {"visits": VISITS}), "mitosis_split:noise=0"])
    later = [count + 7 * (i % 5) for i, count in enumerate(visits)]
    (tmp_path / "later.json").write_text(json.dumps(later))
    old, new = (load(path)["model"]["router_map"] for path in (source, tmp_path / "b.pt"))
    expected = [load_of(visits, old, 3), load_of(visits, new, 4), load_of(later, new, 4)]
    for against in (source, None):  # what the payload records of the split tells the same
        found = vc.inspect(
            tmp_path / "b.pt", visits=VISITS, visits_after=tmp_path / "later.json", against=against
        ).signs
        loads = [found.before, found.predicted, found.measured]
        assert [load.max_share for load in loads] == pytest.approx([share for share, _ in expected])
        assert [load.entropy for load in loads] == pytest.approx([entropy for _, entropy in expected], abs=1e-9)
    said = run_cli("inspect", tmp_path / "b.pt", "--visits", VISITS, "--visits-after", tmp_path / "later.json")[1]
    for name, (share, entropy) in zip(("before", "predicted", "measured"), expected, strict=True):
        assert re.search(rf"{name} +{share:.1%} +{entropy:.3f}", said)


def test_a_plan_predicts_what_its_split_then_brings(tmp_path):
    chain = [("arc_meta", {"visits": VISITS})]
    vc.convert(DATA / "wallclock_experts3.pt", tmp_path / "planned.pt", transforms=chain)
    vc.convert(tmp_path / "planned.pt", tmp_path / "split.pt", transforms=["mitosis_split:noise=0"])
    planned = vc.inspect(tmp_path / "planned.pt", visits=VISITS)
    assert planned.signs == vc.inspect(tmp_path / "split.pt", visits=VISITS).signs
    assert planned.signs.measured is None
    assert planned.plan.metrics["predicted_max_share"] == pytest.approx(planned.signs.predicted.max_share)


def test_visits_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "short.json").write_text("[1, 2, 3]")
    with pytest.raises(InconsistentError, match="has 3 values, but the ring has 64 addresses"):
        vc.inspect(EXPERTS3, visits=tmp_path / "short.json")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="no ring of experts"):
        vc.inspect(tmp_path / "a.pt", visits=VISITS)
    with pytest.raises(UsageError, match="no ring of the same length"):
        vc.inspect(EXPERTS3, visits=VISITS, against=tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int64, torch.bool])
def test_whole_numbers_of_every_kind_have_exact_extremes(dtype, tmp_path):
    top = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    torch.save({"w": torch.tensor([0, top], dtype=dtype)}, tmp_path / "a.pt")
    values = vc.inspect(tmp_path / "a.pt", values=True).tensors.model["w"].values
    assert (values.minimum, values.maximum) == (0, top)


EVIL = "\x1b]0;owned\x07\x1b[2J\x9b1m\u202e[red]x[/]\nsound  all is well"


@pytest.mark.parametrize("command", ["inspect", "check", "diff"])
def test_what_a_checkpoint_holds_moves_no_cursor(command, tmp_path):
    payload = load(DATA / "named_experts3.pt")
    payload["model"][EVIL] = torch.tensor([float("nan")])
    payload[EVIL] = EVIL
    torch.save(payload, tmp_path / "a.pt")
    more = [DATA / "named_experts3.pt"] if command == "diff" else ["--values"] if command == "inspect" else []
    shown = on_a_terminal("-m", "vraxion_ckpt.cli", command, tmp_path / "a.pt", *more)
    rest = ESCAPE.sub("", shown)
    assert not set(rest) & set("\x1b\x07\x9b\u202e")
    assert "owned" in rest


def test_a_signal_of_a_closed_pipe_is_not_an_answer():
    command = f"{sys.executable} -m vraxion_ckpt.cli check {DATA}/named_experts3.pt | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


# --- on a terminal ---


def entry_of_256(colour: str) -> int:
    """Return the entry of the 256-colour palette that is exactly a colour of a report."""
    levels = (0, 95, 135, 175, 215, 255)
    red, green, blue = (levels.index(int(colour[place : place + 2], 16)) for place in (1, 3, 5))
    return 16 + 36 * red + 6 * green + blue


def test_on_a_terminal_experts_have_the_colours_of_the_report_and_no_line_is_too_long(tmp_path):
    path = DATA / "named_experts3.pt"
    shown = on_a_terminal("-m", "vraxion_ckpt.cli", "inspect", path, "--tensors")
    vc.report(path, tmp_path / "out.html")
    key = re.findall(r'<i style="background:(#\w+);color:#\w+">(\d+)</i>', (tmp_path / "out.html").read_text())
    expected = {expert: entry_of_256(colour) for colour, expert in key}
    cells = re.findall(r"\x1b\[38;5;\d+;48;5;(\d+)m(\d)+\x1b", shown)
    assert len(cells) == 64 + 3  # the addresses of the ring, and the experts of the table
    assert {(expert, int(entry)) for entry, expert in cells} == set(expected.items())
    assert max(len(line) for line in ESCAPE.sub("", shown).splitlines()) <= 80
    plain = on_a_terminal("-m", "vraxion_ckpt.cli", "inspect", path, NO_COLOR="1")
    assert "48;5;" not in plain
    assert "0120120" in plain


# The commands that print tables, and words that a table of 40 columns would break.
NARROW = [
    (("inspect", EXPERTS3, "--visits", VISITS), "ptr_expert_max_share"),
    (("describe", "arc_meta"), "allow_empty_parent"),
    (("plugins",), "restore_hibernated"),
]


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize(("arguments", "word"), NARROW, ids=lambda part: part[0] if isinstance(part, tuple) else "")
def test_no_word_of_a_table_is_broken(arguments, word, columns):
    shown = ESCAPE.sub("", on_a_terminal("-m", "vraxion_ckpt.cli", *arguments, columns=columns))
    assert max(map(len, shown.splitlines())) <= columns
    assert word in shown


# --- what is printed ---


def sections(said: str) -> list[list[str]]:
    """Return what stands between empty lines."""
    return [section.splitlines() for section in said.split("\n\n")]


def test_tables_stand_apart_under_headings(run_cli):
    said = run_cli("inspect", DATA / "wallclock_experts3.pt", "--visits", VISITS)[1]
    _, experts, visits = sections(said)
    assert experts[0] == "experts"
    assert experts[1].split()[:3] == ["expert", "owns", "share"]
    assert [line.split()[0] for line in experts[2:] if line[0] != " "] == ["0", "1", "2"]
    assert visits[0] == "visits"
    assert [line.split()[0] for line in visits[2:]] == ["before", "predicted", "measured"]


def test_what_formats_would_lose_is_said_once(run_cli):
    said = run_cli("inspect", EXPERTS3)[1]
    assert re.search(r"^would lose +nothing as modular, pt or safetensors$", said, re.MULTILINE)
    assert said.count("lose") == 1
    facts = vc.inspect(DATA / "raw_state_dict.pt")
    lossy = [name for name, losses in facts.losses.items() if losses]
    said = run_cli("inspect", DATA / "raw_state_dict.pt")[1]
    for name in facts.losses:
        assert (f" as {name}: " in said) == (name in lossy)


# --- experts in layouts of others ---

UNKNOWN = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "deepseek": "model.layers.1.mlp.shared_experts.gate_proj.weight",
    "qwen": "model.layers.0.mlp.shared_expert.up_proj.weight",
    "fused": "model.layers.0.mlp.experts.gate_up_proj",
    "switch": "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight",
    "megatron": "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight",
}


@pytest.mark.parametrize("name", UNKNOWN.values(), ids=UNKNOWN)
def test_experts_in_an_unknown_layout_are_said_to_be_unknown(name, tmp_path, run_cli):
    rest = {"embed.weight": torch.ones(4, 2), "model.layers.0.block_sparse_moe.gate.weight": torch.ones(2, 2)}
    torch.save({**rest, name: torch.ones(2, 2)}, tmp_path / "a.pt")
    facts = vc.inspect(tmp_path / "a.pt")
    assert facts.unknown_experts.model_dump() == {"tensors": 1, "example": name}
    assert (facts.head, facts.num_experts, facts.experts) == (None, 0, ())
    code, said, _ = run_cli("inspect", tmp_path / "a.pt")
    assert code == 0
    assert "not in a known layout: 1 tensor" in said
    assert name in said.replace("\n" + 12 * " ", "")
    assert json.loads(run_cli("inspect", tmp_path / "a.pt", "--json")[1])["unknown_experts"]["tensors"] == 1


@pytest.mark.parametrize("source", [*MONOLITHS, *DIRECTORIES], ids=lambda path: path.name)
def test_our_own_experts_are_known(source):
    assert vc.inspect(source).unknown_experts is None


def test_a_name_that_only_mentions_experts_is_no_expert(tmp_path):
    torch.save({"router.expert_bias": torch.ones(2), "expertise.weight": torch.ones(2)}, tmp_path / "a.pt")
    assert vc.inspect(tmp_path / "a.pt").unknown_experts is None
