"""Whether an expert fits its siblings, in words."""

import pytest
import torch

from vraxion_ckpt.checkpoint.expert_fit import unfit

PLAIN = {"weight": torch.zeros(4, 8), "bias": torch.zeros(4)}
LAYERS = {"up.weight": torch.zeros(16, 8), "down.weight": torch.zeros(4, 16)}
WIDER = {"up.weight": torch.zeros(32, 8), "down.weight": torch.zeros(4, 32)}


@pytest.mark.parametrize(
    ("expert", "sibling", "found"),
    [
        (PLAIN, PLAIN, []),
        (PLAIN, LAYERS, [(None, "A lacks down.weight, up.weight, which B has; B lacks bias, weight, which A has")]),
        ({"weight": PLAIN["weight"]}, PLAIN, [(None, "A lacks bias, which B has")]),
        (PLAIN | {"weight": torch.zeros(2, 8)}, PLAIN, [("weight", "is float32 [2, 8] in A, float32 [4, 8] in B")]),
        (PLAIN | {"bias": torch.zeros(4).half()}, PLAIN, [("bias", "is float16 [4] in A, float32 [4] in B")]),
        (LAYERS, WIDER, []),
        (
            LAYERS | {"up.weight": torch.zeros(9)},
            LAYERS,
            [("up.weight", "is float32 [9] in A, float32 [16, 8] in B")],
        ),
    ],
)
def test_what_does_not_fit_is_said_by_leaf(expert, sibling, found):
    assert list(unfit(expert, sibling, ("A", "B"))) == found


def test_what_replaces_an_expert_must_be_as_wide():
    assert [leaf for leaf, _ in unfit(LAYERS, WIDER, ("A", "B"), same_widths=True)] == ["up.weight", "down.weight"]
