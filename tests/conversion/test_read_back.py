"""The comparison by checksums finds what a comparison of all bytes finds."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint import comparison
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.checkpoint.head import Expert
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.source_files import StoredBytes
from vraxion_ckpt.checkpoint.tensor_dict import referenced
from vraxion_ckpt.checkpoint.written_files import WrittenFiles, recording
from vraxion_ckpt.conversion import read_back
from vraxion_ckpt.conversion.read_back import read_back_differences
from vraxion_ckpt.plugins.discovery import resolve_adapter
from vraxion_ckpt.testing import make

FORMATS = ["pt", "modular", "safetensors"]


def write(checkpoint: Checkpoint, name: str, path: Path) -> WrittenFiles:
    adapter = resolve_adapter(name)
    if name == "modular":
        path.mkdir()
    with recording() as written:
        adapter.write(checkpoint, path)
    return written


def stored(checkpoint: Checkpoint) -> list[StoredBytes]:
    refs = [*checkpoint.state_references().values()]
    refs += [slot for slots in checkpoint.optimizer.state.references().values() for slot in slots.values()]
    return [ref.storage for ref in refs if isinstance(ref.storage, StoredBytes)]


def unproven(checkpoint: Checkpoint) -> None:
    """Forget what the writers have proven."""
    for part in stored(checkpoint):
        part.proven = False


@pytest.fixture(params=FORMATS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, Callable[[], Checkpoint], WrittenFiles]:
    """A checkpoint of a file, a function that reads what was written of it, and the checksums of the writers."""
    write(make(), "pt", tmp_path / "source.pt")
    source = vc.open(tmp_path / "source.pt")
    suffix = {"pt": "out.pt", "modular": "out", "safetensors": "out.safetensors"}[request.param]
    written = write(source, request.param, tmp_path / suffix)
    return source, lambda: vc.open(tmp_path / suffix), written


def test_equal_checksums_are_enough(case, monkeypatch):
    source, reopen, written = case
    found = reopen()
    unproven(source)
    monkeypatch.setattr(read_back, "same_bits", None)  # it would read bytes
    assert list(read_back_differences(source, found, written)) == []
    assert all(part.proven for part in stored(source) if part.crc is not None and part.nbytes)
    monkeypatch.undo()
    assert list(checkpoint_differences(source, found)) == []


def test_without_a_record_bytes_are_compared(case, monkeypatch):
    source, reopen, _ = case
    unproven(source)
    compared = []
    same_bits = comparison.same_bits
    monkeypatch.setattr(read_back, "same_bits", lambda x, y: compared.append(x) or same_bits(x, y))
    assert list(read_back_differences(source, reopen(), WrittenFiles())) == []
    assert len(compared) >= len(source.state_references())
    assert not any(part.proven for part in stored(source))


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(torch.uint8).reshape(-1)[-1] ^= 1
    return changed


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Checkpoint], object]:
    return lambda found: found.core.update({name: change(found.core[name])})


def change_expert(found: Checkpoint) -> None:
    leaves = dict(found.head.experts[1])
    found.head.experts[1] = Expert({**leaves, "weight": flipped(leaves["weight"])})


def swap_experts(found: Checkpoint) -> None:
    experts = found.head.experts
    experts[0], experts[1] = experts[1], experts[0]


def change_slot(found: Checkpoint) -> None:
    slots = found.optimizer.state["body.weight"]
    slots["exp_avg"] = flipped(slots["exp_avg"])


CHANGES: dict[str, Callable[[Checkpoint], Any]] = {
    "one bit": put("body.weight", flipped),
    "dtype": put("body.weight", lambda t: t.double()),
    "type of the same size": put("body.weight", lambda t: t.view(torch.int32)),
    "shape": put("body.weight", lambda t: t.reshape(-1)),
    "parameter": put("body.weight", lambda t: torch.nn.Parameter(t)),
    "gradient": put("body.weight", lambda t: t.clone().requires_grad_()),
    "transposed": put("body.weight", lambda t: t.reshape(t.shape[::-1]).T),
    "missing": lambda found: found.core.pop("theta"),
    "more": lambda found: found.core.update(more=torch.ones(1)),
    "order": lambda found: found.core.update(theta=found.core.pop("theta")),
    "one bit of an expert": change_expert,
    "exchanged experts": swap_experts,
    "one bit of a slot": change_slot,
    "slot missing": lambda found: found.optimizer.state["body.weight"].pop("exp_avg"),
    "number": lambda found: found.payload.update(step=5),
    "entry of a list": lambda found: found.payload["losses"].append(1.0),
    "no optimizer": lambda found: setattr(found, "optimizer", None),
    "metadata": lambda found: found.metadata.clear(),
    "several": lambda found: (change_expert(found), change_slot(found), found.payload.update(step=5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_difference_is_found_and_named_as_by_a_comparison_of_all_bytes(change, case):
    source, reopen, written = case
    found = reopen()
    change(found)
    expected = list(checkpoint_differences(source, found))
    assert expected
    assert list(read_back_differences(source, found, written)) == expected


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_difference_from_a_changed_source_is_found(change, case):
    source, reopen, written = case
    expected = source.copy()
    expected.optimizer.state = {name: dict(slots) for name, slots in source.optimizer.state.items()}
    expected.payload = copy.deepcopy(dict(source.payload))
    change(expected)
    found = reopen()
    assert list(read_back_differences(expected, found, written)) == list(checkpoint_differences(expected, found)) != []


def test_a_target_that_was_written_to_afterwards_is_read(case):
    source, reopen, written = case
    part = stored(reopen())[0]
    with part.file.path.open("r+b") as file:
        file.seek(part.start)
        byte = file.read(1)
        file.seek(part.start)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(part.file.path, ns=(1, 1))
    found = reopen()
    assert list(read_back_differences(source, found, written)) == list(checkpoint_differences(source, found)) != []


def test_tensors_that_a_plugin_made_are_compared_and_later_writes_are_noticed(tmp_path):
    made = make()
    written = write(made, "pt", tmp_path / "a.pt")
    found = vc.open(tmp_path / "a.pt")
    assert list(read_back_differences(made, found, written)) == []
    storage = made.core.reference("theta").storage
    assert not storage.was_written_into()
    made.core["theta"].data[0] += 1  # not counted by torch
    assert storage.was_written_into()


def test_views_and_ties_are_compared(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    checkpoint = replace(make(), core={"a": base, "b": base.T, "c": base[1:], "d": base.conj(), **make().core})
    checkpoint.payload["ema"] = {"a": base}
    written = write(checkpoint, "pt", tmp_path / "a.pt")
    found = vc.open(tmp_path / "a.pt")
    assert list(read_back_differences(checkpoint, found, written)) == []
    assert referenced(found.core)["a"].storage is referenced(found.payload)["ema"]["a"].storage
    other = found.copy()
    other.core["c"] = base[:3]
    assert (
        list(read_back_differences(checkpoint, other, written)) == list(checkpoint_differences(checkpoint, other)) != []
    )
