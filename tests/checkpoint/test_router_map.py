"""The router map is replaced by assigning to it."""

from __future__ import annotations

import pytest
import torch
from support import DATA, load

import vraxion_ckpt as vc
from vraxion_ckpt.plugin_api import Effect


class GiveAway(vc.Transform):
    """Give address 5 to expert 1."""

    name = "give_away"

    def effect(self) -> Effect:
        return Effect.changed()

    def apply(self, checkpoint: vc.Checkpoint) -> vc.Checkpoint:
        owners = checkpoint.router_map.clone()
        owners[5] = 1
        checkpoint.router_map = owners
        return checkpoint


def test_a_transform_assigns_a_new_router_map(tmp_path):
    source = DATA / "named_experts3.pt"
    vc.convert(source, tmp_path / "a.pt", transforms=[GiveAway()])
    before, after = load(source)["model"], load(tmp_path / "a.pt")["model"]
    expected = before["router_map"].clone()
    expected[5] = 1
    assert before["router_map"][5] != 1
    assert after["router_map"].tolist() == expected.tolist()
    assert list(after) == list(before)


def test_the_old_router_map_is_not_written_into():
    checkpoint = vc.open(DATA / "named_experts3.pt")
    old = checkpoint.router_map
    values = old.tolist()
    checkpoint.router_map = torch.zeros(64, dtype=torch.int32)
    assert checkpoint.router_map.tolist() == [0] * 64
    assert old.tolist() == values
    assert checkpoint.core["router_map"] is checkpoint.router_map


@pytest.mark.parametrize(
    ("owners", "says"),
    [
        ([0, 1], "list"),
        (None, "NoneType"),
        (torch.zeros(2, 2, dtype=torch.int64), r"\[2, 2\]"),
        (torch.tensor(1), r"\[\]"),
        (torch.empty(0, dtype=torch.int64), r"\[0\]"),
        (torch.zeros(4), "float32"),
        (torch.zeros(4, dtype=torch.bool), "bool"),
    ],
)
def test_what_is_no_router_map_is_refused(owners, says):
    checkpoint = vc.open(DATA / "named_experts3.pt")
    before = checkpoint.router_map
    with pytest.raises(ValueError, match=says):
        checkpoint.router_map = owners
    assert checkpoint.router_map is before
