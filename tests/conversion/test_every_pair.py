"""Any format to any format: generated checkpoints go through the real command, there and back, and nothing changes."""

from __future__ import annotations

import shutil
import zlib
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, seed, settings
from support import assert_same, files_below, load
from vraxion_ckpt_adapters.modular import ModularAdapter
from vraxion_ckpt_adapters.pt import PtAdapter
from vraxion_ckpt_adapters.safetensors import SafetensorsAdapter

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.testing import checkpoints

FORMATS: dict[str, Adapter] = {
    "pt": PtAdapter(),
    "modular": ModularAdapter(),
    "safetensors": SafetensorsAdapter(),
    "shards": SafetensorsAdapter(max_shard_size=200),
}
EXAMPLES = 40  # a pair: 640 in all; --exhaustive tries fifty times as many


@pytest.mark.one_in(7)
@pytest.mark.parametrize("there", FORMATS)
@pytest.mark.parametrize("here", FORMATS)
def test_there_and_back_again(here, there, tmp_path_factory, exhaustive, figure):
    """From one format into another and back, twice: bit-exact up to declared losses, and the second time idle."""
    one, other = FORMATS[here], FORMATS[there]
    tried = 0

    @settings(
        max_examples=EXAMPLES * (50 if exhaustive else 1),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(checkpoints())
    def stays_the_same(checkpoint):
        nonlocal tried
        tried += 1
        folder = tmp_path_factory.mktemp("pair")
        start = folder / "start"
        if one.is_directory:
            start.mkdir()
        one.write(one.held(checkpoint), start)
        expected = one.held(other.held(one.held(checkpoint)))
        if not one.losses(checkpoint) and not other.losses(checkpoint):
            assert not list(checkpoint_differences(checkpoint, expected))

        places = [start, *(folder / name for name in ("there", "back", "there_again", "back_again"))]
        for number, (source, target) in enumerate(pairwise(places)):
            adapters = (one, other) if number % 2 == 0 else (other, one)
            vc.convert(source, target, from_=adapters[0], to=adapters[1], losses="ignore", optimizer="partial")
        for back in ("back", "back_again"):
            found = vc.open(folder / back, from_=one)
            assert not list(checkpoint_differences(expected, found))
        for name in ("there", "back"):
            assert_same_files(folder / name, folder / f"{name}_again")
        shutil.rmtree(folder)

    if not exhaustive:  # other checkpoints for every pair, but the same ones every time
        stays_the_same = seed(zlib.crc32(f"{here} {there}".encode()))(stays_the_same)
    stays_the_same()
    assert tried >= EXAMPLES
    figure(8, f"{tried} generated checkpoints from {here} to {there} and back, twice: 0 differences")


def assert_same_files(a, b):
    """Compare what two conversions wrote: the bytes, or what torch itself reads, where a path stands in the bytes."""
    if a.is_dir():
        assert files_below(a) == files_below(b)
    for x, y in [(a, b)] if a.is_file() else [(a / name, b / name) for name in files_below(a)]:
        if x.name != "meta.json" and x.read_bytes() != y.read_bytes():
            assert_same(load(x), load(y))
