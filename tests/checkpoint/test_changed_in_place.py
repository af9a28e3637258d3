"""Tensors that a user or a plugin changed in place: their owner may do so, and what is written is what is in memory."""

from __future__ import annotations

import pickle
import zlib
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from support import DATA

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.references import reference
from vraxion_ckpt.plugin_api import (
    Checkpoint,
    Effect,
    ReadContext,
    Transform,
    checksum,
    is_zero,
    same_bits,
    save_safetensors,
    save_torch_file,
)


@pytest.fixture
def changed() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return loaded tensors, and one of them that was changed in place."""
    loaded = ReadContext().load_torch(DATA / "named_experts3.pt")["model"]
    tensor = loaded["head.experts.0.weight"]
    tensor.mul_(2)
    return loaded, tensor


def test_a_tensor_changed_in_place_is_written_as_it_is(changed: Any, tmp_path: Path) -> None:
    _, tensor = changed
    save_torch_file({"t": tensor}, tmp_path / "t.pt")
    save_safetensors({"t": tensor}, {}, tmp_path / "t.safetensors")
    assert torch.equal(torch.load(tmp_path / "t.pt", weights_only=True)["t"], tensor)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "t.safetensors")["t"], tensor)


def test_functions_see_a_tensor_that_was_changed_in_place(changed: Any) -> None:
    _, tensor = changed
    fresh = ReadContext().load_torch(DATA / "named_experts3.pt")["model"]["head.experts.0.weight"]
    assert not same_bits(tensor, fresh)
    assert same_bits(tensor, fresh * 2)
    assert checksum(tensor) == zlib.crc32(tensor.numpy().tobytes())
    assert torch.equal(deepcopy(reference(tensor)).tensor(), tensor)
    tensor.zero_()
    assert is_zero({"weight": tensor})


def test_an_owner_may_change_a_copy_in_place(tmp_path: Path) -> None:
    """A transform owns what it has copied, whichever way."""

    class Doubled(Transform):
        """Double an expert."""

        name: ClassVar[str] = "doubled"

        def effect(self) -> Effect:
            return Effect.changed()

        def apply(self, checkpoint: Checkpoint) -> Checkpoint:
            assert checkpoint.head is not None
            copy = deepcopy(checkpoint)
            expert = deepcopy(checkpoint.head.experts[0])
            expert["weight"].mul_(2)
            checkpoint.head.experts[0] = expert
            assert copy.head is not None
            copy.head.experts[1]["weight"].numpy()[:] = 1
            checkpoint.head.experts[1] = pickle.loads(pickle.dumps(copy.head.experts[1]))
            return checkpoint

    vc.convert(DATA / "named_experts3.pt", tmp_path / "o.pt", transforms=[Doubled()])
    old, new = vc.open(DATA / "named_experts3.pt").state_dict(), vc.open(tmp_path / "o.pt").state_dict()
    assert torch.equal(new["head.experts.0.weight"], old["head.experts.0.weight"] * 2)
    assert bool((new["head.experts.1.weight"] == 1).all())
    assert torch.equal(new["head.experts.2.weight"], old["head.experts.2.weight"])
