"""Transforms leave a record in the payload, and replace nothing else with it."""

import pytest
import torch
from support import DATA

import vraxion_ckpt as vc


@pytest.mark.parametrize(
    ("key", "chain"),
    [("mitosis", "mitosis_split:parent=1,addresses=[1]"), ("prune", "prune_merge:merge_from=2,merge_into=0")],
)
@pytest.mark.parametrize("value", [{"ratio": 0.5}, [1], "yes", 0])
def test_a_value_of_somebody_else_is_not_replaced_by_a_record(tmp_path, key, chain, value):
    payload = torch.load(DATA / "named_experts3.pt") | {key: value}
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(vc.CkptError, match=f"somebody else under the key `{key}`"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[chain])
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[chain], drop_keys=[key])
