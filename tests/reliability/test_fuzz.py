"""Figures 5 to 7: flipped bits, truncated files and random damage are rejected, or change nothing that is read."""

from __future__ import annotations

import copy
import io
import json
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hostile import Entry, zip_bytes
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scenarios import Tree, read_tree, write_tree
from support import DATA, MONOLITHS
from test_container import SMALL, flip
from test_document import PIECES, walk
from test_safetensors import PIECES as TEXTS
from watch import MEMORY, SECONDS, size, watched

import vraxion_ckpt as vc
from vraxion_ckpt.errors import CkptError, PluginError

SPLIT = "mitosis_split:parent=0,addresses=[0],noise=0"
TO = {"pt": "pt", "safetensors": "safetensors", "shards": "safetensors:max_shard_size=20KB", "modular": "modular"}


def look(path: Path, target: Path) -> None:
    """Read a checkpoint completely, as ``inspect`` does and as a conversion to another format does."""
    vc.inspect(path, values=True).as_json()
    vc.convert(path, target, dry_run=True, losses="ignore")


# --- Figure 5: flipped bits ---


def test_no_single_flipped_bit_is_accepted_with_other_contents(ram, figure):
    path = ram("small") / "small.pt"
    torch.save(SMALL, path)
    bits = range(8 * path.stat().st_size)
    outcomes = flip(path, bits)
    figure(5, f"{len(bits)} flipped bits of a .pt: {outcomes['other']} accepted with other contents")
    assert len(bits) >= 20_000
    assert outcomes["other"] == 0


# --- Figure 6: prefixes ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small checkpoint in every format."""
    folder = tmp_path_factory.mktemp("small")
    model = {"router_map": torch.tensor([0, 1, 0, 1])}
    model |= {f"head.experts.{i}.weight": torch.full((2, 3), float(i)) for i in range(2)}
    names = [name for name in model if name != "router_map"]
    slots = {i: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)} for i in range(len(names))}
    optimizer = {"state": slots, "param_groups": [{"lr": 0.1, "params": list(slots), "param_names": names}]}
    torch.save({"model": model, "optim": optimizer, "num_experts": 2, "step": 7, "losses": [0.5]}, folder / "x.pt")
    made = {"pt": folder / "x.pt"}
    for kind in ("safetensors", "shards", "modular"):
        made[kind] = folder / ("x.safetensors" if kind == "safetensors" else kind)
        to = "safetensors:max_shard_size=100B" if kind == "shards" else TO[kind]
        vc.convert(folder / "x.pt", made[kind], to=to)
    return made


@pytest.mark.parametrize("kind", TO)
def test_every_proper_prefix_of_every_file_is_refused(kind, small, ram, figure):
    tree = read_tree(small[kind])
    path = ram(kind) / small[kind].name
    write_tree(path, tree)
    refused: Counter[str] = Counter()
    accepted = []
    for name, whole in tree.items():
        for length in range(len(whole)):
            write(path / name, whole[:length])
            try:
                found = vc.open(path)
                found.open_experts()
                found.sources.verify()
                accepted.append(f"{length} of {len(whole)} bytes of {name}")
            except PluginError:
                raise
            except CkptError:
                refused[name] += 1
        write(path / name, whole)
    vc.open(path).open_experts()  # the untruncated file is accepted
    each = ", ".join(f"{count} of {name}" for name, count in refused.items()) if len(tree) > 1 else ""
    total = sum(map(len, tree.values()))
    figure(6, f"{kind}: {refused.total()} of {total} proper prefixes refused{each and f' ({each})'}")
    assert not accepted
    assert refused.total() == total


def write(path: Path, content: bytes) -> None:
    """Replace a file by a new one, so that memory maps of the old one do not change."""
    path.unlink()
    path.write_bytes(content)


# --- Figure 7: real checkpoints, changed at random ---


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, Tree]]]:
    """Real checkpoints of each format, with their names."""
    folder = tmp_path_factory.mktemp("originals")
    found = {"pt": [(path.name, read_tree(path)) for path in MONOLITHS]}
    found["modular"] = [(path.name, read_tree(path)) for path in sorted(DATA.glob("modular_*"))]
    for kind in ("safetensors", "shards"):
        found[kind] = []
        (folder / kind).mkdir()
        for stem in ("steps_experts2_sgd.pt", "modular_gc", "raw_state_dict.pt"):
            name = stem + ".safetensors" * (kind == "safetensors")
            vc.convert(DATA / stem, folder / kind / name, to=TO[kind])
            found[kind].append((name, read_tree(folder / kind / name)))
    return found


@pytest.mark.parametrize("kind", TO)
def test_no_change_of_a_real_checkpoint_is_met_with_anything_but_an_error_of_ours(
    kind, originals, ram, figure, exhaustive
):
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=10_000 if exhaustive else 300,
        deadline=None,
        phases=[Phase.generate],  # a smaller seed is no simpler
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**64))
    def change(seed: int) -> None:
        dice = Random(seed)
        name, tree = dice.choice(originals[kind])
        part = dice.choice(sorted(tree))
        folder = ram(name)
        path = folder / name
        write_tree(path, {**tree, part: changed(f"{name}/{part}", tree[part], dice)})
        with watched(folder) as seen, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                look(path, folder / ("new.safetensors" if kind == "pt" else "new.pt"))
                outcomes["read"] += 1
            except PluginError:  # the message of unexpected exceptions
                raise
            except CkptError as error:
                outcomes[type(error).__name__] += 1
        assert seen.ran == []
        assert seen.seconds < SECONDS
        assert seen.memory < 2 * size(path) + MEMORY
        shutil.rmtree(folder)

    change()
    tried = outcomes.total()
    refused = ", ".join(f"{count} {name}" for name, count in outcomes.most_common() if name != "read")
    figure(7, f"{kind}: {tried} times a real checkpoint was changed at random: {refused}; {outcomes['read']} read")
    assert outcomes["read"] > 0
    assert len(outcomes) > 2


def changed(name: str, content: bytes, dice: Random) -> bytes:
    """Change a file: its bytes, or its content with all lengths and checksums updated."""
    ways: list[Callable[[bytes, Random], bytes]] = [bytes_changed]
    if name.endswith(".json"):
        ways += [json_changed] * 3
    elif ".safetensors" in name:
        ways += [header_bytes_changed, header_changed, document_changed, document_changed]
    else:
        ways += [pickle_changed, value_changed, value_changed]
    return dice.choice(ways)(content, dice)


def bytes_changed(content: bytes, dice: Random) -> bytes:
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(content) + 1)
        size = min(dice.choice([1, 8, 100, 4096, len(content)]), len(content) - at)
        rest = content[at + size :]
        kind = dice.choice(["flip", "cut", "insert", "put", "copy", "zeros", "drop"])
        if kind == "flip" and rest:
            content = content[: at + size] + bytes([rest[0] ^ 1 << dice.randrange(8)]) + rest[1:]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + dice.choice(TEXTS) + content[at:]
        elif kind == "put":
            piece = dice.choice([*TEXTS, dice.randbytes(4)])
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "copy":
            to = dice.randrange(len(content) + 1)
            content = content[:to] + content[at : at + size] + content[to + size * dice.randint(0, 1) :]
        elif kind == "zeros":
            content = content[:at] + bytes(size) + rest
        elif kind == "drop":
            content = content[:at] + rest
    return content


def tree_changed(value: Any, dice: Random, pieces: list[Any], keys: list[Any]) -> Any:
    """Change nested dicts and lists in place: drop, move, double, rename or replace entries."""
    for _ in range(dice.randint(1, 4)):
        containers = walk(value)
        at = dice.choice([container for container in containers if container] or [{"": None}])
        key = dice.choice(list(at)) if isinstance(at, dict) else dice.randrange(len(at))
        kind = dice.choice(["drop", "copy", "rename", "double", "replace", "nudge"])
        if kind == "drop":
            del at[key]
        elif kind == "copy":
            at[key] = copy.deepcopy(dice.choice(containers))
        elif kind == "rename" and isinstance(at, dict):
            at[dice.choice(keys)] = at.pop(key)
        elif kind == "double" and isinstance(at, list):
            at.insert(key, copy.deepcopy(at[key]))
        elif kind == "nudge" and isinstance(at[key], int | float):
            at[key] = at[key] + dice.choice([-1, 1, 0.5, 2**63])
        else:
            at[key] = copy.deepcopy(dice.choice(pieces))
    return value


# --- JSON ---

KEYS = ["$tensor", "$tuple", "$dict", "dtype", "shape", "data_offsets", "step", "id", "experts", "deleted", "x", ""]
VALUES = [*PIECES, 3, 7, "F32", "I64", "model-00001-of-00002.safetensors", "../x.safetensors", 10**9, 1e308]


def json_changed(content: bytes, dice: Random) -> bytes:
    return json.dumps(tree_changed(json.loads(content), dice, VALUES, KEYS)).encode()


def with_header(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    header = change(content[8:end])
    return len(header).to_bytes(8, "little") + header + content[end:]


def header_bytes_changed(content: bytes, dice: Random) -> bytes:
    return with_header(content, lambda header: bytes_changed(header, dice))


def header_changed(content: bytes, dice: Random) -> bytes:
    return with_header(content, lambda header: json_changed(header, dice))


def document_changed(content: bytes, dice: Random) -> bytes:
    """Change the document in the header; for a shard, which has no document, the header."""

    def change(raw: bytes) -> bytes:
        header = json.loads(raw)
        metadata = header.get("__metadata__", {})
        if "vraxion_ckpt" not in metadata:
            return json_changed(raw, dice)
        metadata["vraxion_ckpt"] = json_changed(metadata["vraxion_ckpt"].encode(), dice).decode()
        return json.dumps(header).encode()

    return with_header(content, change)


# --- torch files ---

NAMES = ["model", "optim", "state", "param_groups", "params", "step", "num_experts", "router_map", "vraxion_ckpt", 0, 7]
NAMES += ["head.experts.0.weight", "head.experts.7.weight", "head.single.weight", "exp_avg", "x", ""]
THINGS: list[Any] = [None, True, 0, -1, 3, 1.5, 2**70, float("nan"), "", "theta", [], {}, (), [[]], ["a", 3], {"a": 1}]
THINGS += [torch.ones(2), torch.zeros(0), torch.tensor(7), torch.tensor([5, -1]), torch.ones(4, 3).t()]
THINGS += [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse(), {1, 2}, b"bytes", 1j]


def value_changed(content: bytes, dice: Random) -> bytes:
    value = torch.load(io.BytesIO(content), weights_only=True)
    file = io.BytesIO()
    torch.save(tree_changed(value, dice, THINGS, NAMES), file)
    return file.getvalue()


def pickle_changed(content: bytes, dice: Random) -> bytes:
    """Change the pickle, and rebuild the archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as zipped:
        entries = [Entry(name, zipped.read(name)) for name in zipped.namelist()]
    for entry in entries:
        if entry.name.endswith("/data.pkl"):
            entry.data = bytes_changed(entry.data, dice)
    return zip_bytes(entries)
