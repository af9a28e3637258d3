"""Figure 7: the reader of ``.pt`` files refuses each bad file that torch's reader and a run with stubs refuse."""

from __future__ import annotations

import warnings

import pytest
from corpus import CORPUS
from pickle_dry_run import load_with_torch
from test_torch_reader import load, outcome

from vraxion_ckpt.errors import CkptError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CORPUS["pt"])
def test_a_bad_file_is_refused_by_both_readers_for_the_same_reason(name, ram):
    bad = CORPUS["pt"][name]
    path = bad.build(ram("bad"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = outcome(load, path), outcome(load_with_torch, path)
    assert isinstance(ours, CkptError) == isinstance(theirs, CkptError)
    if isinstance(ours, CkptError):
        assert type(ours) is type(theirs) is bad.error
        assert ours.key == theirs.key or theirs.key is None
        assert not (path.parent / "proof").exists()
