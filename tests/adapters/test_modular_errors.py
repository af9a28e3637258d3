"""Damaged and hostile modular directories are refused with a precise message, and nothing is left behind.

Shards are opened lazily, so each test runs a whole conversion.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DATA, load

import vraxion_ckpt as vc
from vraxion_ckpt.errors import CorruptError, InconsistentError, LimitError, UnknownFormatError, UnsafeError

Damage = Callable[[Path], object]


pytestmark = pytest.mark.usefixtures("no_reader_waits_for_ever")


# --- How to damage a directory ---


def shard_path(root: Path, expert: int) -> Path:
    return root / f"experts/expert_{expert:03d}.pt"


def shard(expert: int, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Replace a shard's dict with the result of `change`, or store it again if that is None."""
    return lambda root: resave(shard_path(root, expert), change)


def router(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda root: resave(root / "system/router.state", change)


def resave(path: Path, change: Callable[[Any], Any]) -> None:
    value = load(path)
    changed = change(value)
    torch.save(value if changed is None else changed, path)


def meta(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(root: Path) -> None:
        path = root / "experts/meta.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return damage


def meta_text(old: str, new: str) -> Damage:
    def damage(root: Path) -> None:
        path = root / "experts/meta.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return damage


def meta_is(content: bytes) -> Damage:
    return lambda root: (root / "experts/meta.json").write_bytes(content)


def both(*damages: Damage) -> Damage:
    return lambda root: [damage(root) for damage in damages]


def cut(relative: str, keep: float) -> Damage:
    def damage(root: Path) -> None:
        content = (root / relative).read_bytes()
        (root / relative).write_bytes(content[: int(len(content) * keep)])

    return damage


def remove(relative: str) -> Damage:
    return lambda root: (root / relative).unlink()


def rename(old: str, new: str) -> Damage:
    return lambda root: (root / "experts" / old).rename(root / "experts" / new)


def copy(old: str, new: str) -> Damage:
    return lambda root: shutil.copy(root / "experts" / old, root / "experts" / new)


def fifo(relative: str) -> Damage:
    return both(remove(relative), lambda root: os.mkfifo(root / relative))


def folder(relative: str) -> Damage:
    return both(remove(relative), lambda root: (root / relative).mkdir())


def move_out_and_link(relative: str) -> Damage:
    """Move a file or folder out of the directory, and leave a link to it."""

    def damage(root: Path) -> None:
        outside = root.parent / f"outside_{Path(relative).name}"
        (root / relative).rename(outside)
        (root / relative).symlink_to(outside)

    return damage


def row(number: int, **entries: Any) -> Damage:
    return meta(lambda m: m["experts"][number].update(entries))


def owners(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return router(lambda payload: payload["model"].update(router_map=change(payload["model"]["router_map"])))


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


# --- What is refused as inconsistent: damage, and what the message must name ---

ZEROS = torch.zeros(4, 3)

SHARDS: dict[str, tuple[Damage, str]] = {
    "first missing": (remove("experts/expert_000.pt"), r"expert_000.pt is missing"),
    "middle missing": (remove("experts/expert_001.pt"), r"expert_001.pt is missing"),
    "last missing": (remove("experts/expert_002.pt"), r"expert_002.pt is missing"),
    "gap": (rename("expert_001.pt", "expert_003.pt"), r"expert_001.pt is missing"),
    "truncated": (cut("experts/expert_001.pt", 0.5), r"expert_001.pt.*shard of expert 1 is damaged"),
    "one byte short": (cut("experts/expert_001.pt", 0.9999), r"shard of expert 1 is damaged"),
    "empty file": (cut("experts/expert_001.pt", 0), r"shard of expert 1 is empty"),
    "empty dict": (shard(1, dict.clear), r"expert_001.pt.*shard of expert 1 holds no tensors"),
    "a list": (shard(1, list), r"shard of expert 1"),
    "a number": (shard(1, lambda s: s.update(weight=3)), r"shard of expert 1 has an entry that is not a tensor"),
    "a leaf missing": (shard(1, lambda s: s.__delitem__("bias")), r"shard of expert 1 lacks bias"),
    "a leaf too many": (shard(1, lambda s: s.update(more=ZEROS)), "lacks more, which the shard of expert 1 has"),
    "wrong shape": (shard(1, lambda s: s.update(weight=ZEROS)), r"\[weight\]: is float32 \[4, 3\] in .*expert 1"),
    "wrong shape, the first": (
        shard(0, lambda s: s.update(weight=ZEROS)),
        r"float32 \[4, 3\] in the shard of expert 0",
    ),
    "wrong dtype": (shard(1, lambda s: s.update(weight=s["weight"].double())), "is float64 .* expert 1"),
    "dtype of counts": (
        shard(2, lambda s: s.update(bias=s["bias"].long())),
        r"\[bias\]: is int64 .* expert 2",
    ),
    "named expert_1": (rename("expert_001.pt", "expert_1.pt"), r"expert_1.pt: a shard must be named expert_<id>"),
    "named expert_1 too": (copy("expert_001.pt", "expert_1.pt"), r"expert_1.pt: a shard must be named"),
    "named expert_0001": (rename("expert_001.pt", "expert_0001.pt"), r"expert_0001.pt: a shard must be named"),
    "fifo": (fifo("experts/expert_001.pt"), r"expert_001.pt: a shard must be a regular file"),
    "folder": (folder("experts/expert_001.pt"), r"expert_001.pt: a shard must be a regular file"),
    "link out of the root": (move_out_and_link("experts/expert_001.pt"), r"expert_001.pt: a shard must be"),
    "experts linked": (move_out_and_link("experts"), r"experts: is a link that leads out"),
    "system linked": (move_out_and_link("system"), r"system: is a link that leads out"),
    "router linked": (move_out_and_link("system/router.state"), r"router.state: is a link that leads out"),
}

NUMBERS: dict[str, tuple[Damage, str]] = {
    **{
        f"num_experts {value!r}": (router(lambda p, v=value: p.update(num_experts=v)), r"router.state \[num_experts\]")
        for value in (-1, 0, "3", 3.0, True)
    },
    **{
        f"num_experts {value!r} in meta": (
            meta(lambda m, v=value: m.update(num_experts=v)),
            r"meta.json \[num_experts\]",
        )
        for value in (-1, 0, "3", 3.0, None, 4)
    },
    "only meta tells, and wrongly": (
        both(router(lambda p: p.__delitem__("num_experts")), meta(lambda m: m.update(num_experts=4))),
        r"expert_003.pt is missing",
    ),
    "router step": (router(lambda p: p.update(step=5)), r"meta.json \[step\].*is 4, but 5 in router.state"),
    "meta step": (meta(lambda m: m.update(step=5)), r"meta.json \[step\].*is 5, but 4 in router.state"),
    "meta step a float": (meta(lambda m: m.update(step=4.0)), r"meta.json \[step\]"),
    "owner too large": (owners(lambda o: o.index_fill(0, torch.tensor([5]), 7)), r"address 5 to expert 7"),
    "owner negative": (owners(lambda o: o.index_fill(0, torch.tensor([5]), -1)), r"address 5 to expert -1"),
    "owners as floats": (owners(torch.Tensor.float), r"router_map must hold integers"),
    "owners as a square": (owners(lambda o: o.view(8, 8)), r"router_map must have shape"),
    "no owners": (owners(lambda o: o[:0].clone()), r"router_map must have shape"),
    "expert inside": (router(lambda p: p["model"].update({"head.experts.0.weight": ZEROS})), r"router.state.*shards"),
    "single head inside": (
        router(lambda p: p["model"].update({"head.single.weight": ZEROS})),
        r"router.state \[num_experts\].*is 3, but the head is single",
    ),
}

ROWS: dict[str, tuple[Damage, str]] = {
    "too short": (meta(lambda m: m["experts"].pop()), r"has 2 rows for 3 experts"),
    "too long": (meta(lambda m: m["experts"].append({**m["experts"][0], "id": 3})), r"has 4 rows for 3 experts"),
    "none": (meta(lambda m: m.update(experts=[])), r"has 0 rows for 3 experts"),
    "twice": (row(1, id=0), r"experts\[1\].*expert 0 has a second row"),
    "id as text": (row(1, id="1"), r"experts\[1\].*whole number"),
    "no objects": (meta(lambda m: m.update(experts=[0, 1, 2])), r"experts\[0\]"),
    "no list": (meta(lambda m: m.update(experts={})), r"list `experts`"),
    "not an object": (meta_is(b"[]"), r"must be an object"),
    "NaN": (row(1, contrib=float("nan")), r"NaN is not a JSON number"),
    "infinite": (meta_text("12.0", "1e999"), r"1e999 is not a JSON number"),
    "contrib as text": (row(1, contrib="0"), r"experts\[1\].*contrib"),
    "step as null": (row(1, created_step=None), r"experts\[1\].*created_step"),
    "tenured as 1": (row(1, tenured=1), r"experts\[1\].*tenured"),
    "key twice": (meta_text('"step": 4', '"step": 3, "step": 4'), r"\[step\].*occurs twice"),
    "key twice in a row": (meta_text('"id": 1', '"id": 0, "id": 1'), r"\[id\].*occurs twice"),
    "deleted, and another missing": (
        both(meta(lambda m: m.update(deleted=[1])), remove("experts/expert_002.pt")),
        r"expert_002.pt is missing",
    ),
    "deleted unknown": (meta(lambda m: m.update(deleted=[7])), r"\[deleted\].*ids below 3"),
    "deleted as text": (meta(lambda m: m.update(deleted="1")), r"\[deleted\]"),
    "fifo": (fifo("experts/meta.json"), r"meta.json: .*regular file"),
    "folder": (folder("experts/meta.json"), r"meta.json: .*regular file"),
    "link out of the root": (move_out_and_link("experts/meta.json"), r"meta.json: is a link that leads out"),
}

KINDS = {"shard": SHARDS, "number": NUMBERS, "rows": ROWS}
INCONSISTENT = [
    pytest.param(*case, id=f"{kind}: {name}") for kind, cases in KINDS.items() for name, case in cases.items()
]


def damaged(stem: str, folder: Path, damage: Damage) -> Path:
    """Copy a fixture below `folder` and damage the copy."""
    root = folder / "source" / stem
    shutil.copytree(DATA / stem, root)
    damage(root)
    return root


def refusal(root: Path, target: str, error: type[vc.CkptError], **options: Any) -> str:
    """Convert to a new target. Expect exactly the class `error` and an empty folder. Return the message."""
    out = root.parent.parent / "out"
    out.mkdir()
    with pytest.raises(vc.CkptError) as refused:
        vc.convert(root, f"{out}/{target}", **options)
    assert type(refused.value) is error, refused.value
    assert list(out.iterdir()) == []
    return str(refused.value)


@pytest.mark.parametrize("target", ["new.pt", "new/"])
@pytest.mark.parametrize(("damage", "says"), INCONSISTENT)
def test_an_inconsistent_directory_is_refused_and_nothing_is_written(damage, says, target, tmp_path):
    message = refusal(damaged("modular_experts3", tmp_path, damage), target, InconsistentError)
    assert re.search(says, message.replace("\n", " ")), message


def flip_a_bit_of_expert_1(root: Path) -> None:
    path = shard_path(root, 1)
    stored = load(path)["weight"].numpy().tobytes()
    content = path.read_bytes()
    path.write_bytes(content.replace(stored, bytes([stored[0] ^ 1]) + stored[1:]))


OTHER_CLASSES = {
    "a bit of a shard flipped": (flip_a_bit_of_expert_1, CorruptError, r"expert_001.pt \[.*checksum"),
    "router.state truncated": (cut("system/router.state", 0.5), CorruptError, r"router.state"),
    "router.state missing": (remove("system/router.state"), UnknownFormatError, r"system/router.state"),
    "router.state a fifo": (fifo("system/router.state"), UnknownFormatError, r"format not recognised"),
    "meta.json truncated": (cut("experts/meta.json", 0.5), CorruptError, r"meta.json: is not JSON"),
    "meta.json nested": (meta_is(b"[" * 200_000), LimitError, r"nested too deeply"),
}


@pytest.mark.parametrize("target", ["new.pt", "new/"])
@pytest.mark.parametrize(("damage", "error", "says"), OTHER_CLASSES.values(), ids=OTHER_CLASSES)
def test_other_damage_has_its_own_error_and_nothing_is_written(damage, error, says, target, tmp_path):
    assert re.search(says, refusal(damaged("modular_experts3", tmp_path, damage), target, error))


@pytest.mark.parametrize("chain", [[], ["mitosis_split:parent=1,addresses=[1]"]])
@pytest.mark.parametrize("part", ["shard", "router"])
def test_an_evil_pickle_is_refused_and_does_not_run(part, chain, tmp_path):
    trace = tmp_path / "trace"
    plant = {
        "shard": shard(1, lambda s: {**s, "bias": Evil(trace)}),
        "router": router(lambda p: p.update(x=Evil(trace))),
    }
    root = damaged("modular_experts3", tmp_path, plant[part])
    message = refusal(root, "new/", UnsafeError, transforms=chain)
    assert "posix.system" in message
    assert not trace.exists()
    torch.load(shard_path(root, 1) if part == "shard" else root / "system/router.state", weights_only=False)
    assert trace.exists(), "this pickle would have run nothing"


@pytest.mark.parametrize("also_in_meta", [False, True])
def test_an_absurd_number_of_experts_is_refused_without_allocating_for_it(also_in_meta, tmp_path):
    damage = router(lambda p: p.update(num_experts=10**9))
    if also_in_meta:
        damage = both(damage, meta(lambda m: m.update(num_experts=10**9)))
    root = damaged("modular_experts3", tmp_path, damage)
    tracemalloc.start()
    refusal(root, "new/", InconsistentError)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 2**20


@pytest.mark.parametrize("target", ["new.pt", "new/"])
def test_without_meta_the_rows_are_rebuilt_with_a_warning(target, tmp_path):
    root = damaged("modular_experts3", tmp_path, remove("experts/meta.json"))
    with pytest.warns(vc.CkptWarning, match=r"meta.json is missing; lifecycle rows are rebuilt"):
        vc.convert(root, f"{tmp_path}/{target}")
    rows = vc.open(tmp_path / target).lifecycle
    assert rows == dict.fromkeys(range(3), vc.Lifecycle(created_step=4, last_used_step=4))


@pytest.mark.parametrize(
    ("stem", "damage", "says"),
    [
        ("modular_single", meta(lambda m: m.update(deleted=[1])), "must be a list of expert ids below 1"),
        ("modular_single", copy("meta.json", "expert_0.pt"), "a shard must be named expert_<id>.pt"),
        ("modular_single", meta(lambda m: m.update(num_experts=2)), "is 2, but 1 in router.state"),
        ("modular_gc", meta(lambda m: m.update(deleted=[])), "expert_001.pt is missing"),
        ("modular_gc", meta(lambda m: m.update(deleted=[1, 1])), "lists an expert twice"),
        (
            "modular_adapter_experts",
            shard(1, lambda s: s.update({"down.weight": torch.zeros(4)})),
            r"is float32 \[4\] in .*expert 1",
        ),
    ],
)
def test_directories_of_other_kinds_are_held_to_the_same(stem, damage, says, tmp_path):
    assert re.search(says, refusal(damaged(stem, tmp_path, damage), "new/", InconsistentError))


@pytest.mark.parametrize("target", ["new.pt", "new/"])
def test_a_shard_that_does_not_fit_the_optimizers_state_is_refused(target, tmp_path):
    """Experts with inner layers may differ in width, so only the optimizer's state shows the right shape."""
    damage = shard(1, lambda s: s.update({"down.weight": torch.zeros(4, 3)}))
    assert "experts.1" in refusal(damaged("modular_adapter_experts", tmp_path, damage), target, InconsistentError)


def test_a_dry_run_refuses_a_flipped_bit_too(tmp_path):
    root = damaged("modular_experts3", tmp_path, flip_a_bit_of_expert_1)
    assert "checksum" in refusal(root, "new/", CorruptError, dry_run=True)


def test_a_contribution_beyond_any_float_is_carried_exactly(tmp_path):
    root = damaged("modular_experts3", tmp_path, row(1, contrib=10**400))
    vc.convert(root, f"{tmp_path}/new/")
    old, new = (folder / "experts/meta.json" for folder in (root, tmp_path / "new"))
    assert json.loads(new.read_text()) == json.loads(old.read_text())


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (remove("system/router.state"), 3, "format not recognised"),
        (flip_a_bit_of_expert_1, 4, "expert_001.pt"),
        (shard(1, lambda s: {**s, "bias": Evil(Path("never"))}), 5, "posix.system"),
        (meta_is(b"[" * 200_000), 7, "meta.json"),
        (remove("experts/expert_001.pt"), 8, "expert_001.pt is missing"),
    ],
    ids=["unknown", "corrupt", "unsafe", "limit", "inconsistent"],
)
def test_each_kind_of_damage_has_its_exit_code_and_a_message_without_a_traceback(damage, code, says, tmp_path, cli):
    root = damaged("modular_experts3", tmp_path, damage)
    exit_code, said = cli("convert", root, tmp_path / "new.pt")
    assert exit_code == code
    assert said.startswith("error: ")
    assert says in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
