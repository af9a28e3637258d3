"""The suite for adapters fails one that breaks the contract of `plugin_api`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from vraxion_ckpt_adapters.modular import ModularAdapter
from vraxion_ckpt_adapters.pt import PtAdapter

import vraxion_ckpt as vc
from vraxion_ckpt.errors import PluginError
from vraxion_ckpt.plugin_api import ReadContext
from vraxion_ckpt.plugins.discovery import resolve_adapter
from vraxion_ckpt.testing import AdapterTests


class Unregistered(PtAdapter):
    """Read a file through a context of its own, so that nobody watches it."""

    name: ClassVar[str] = "unregistered"

    def read(self, path: Path, context: ReadContext) -> vc.Checkpoint:
        return super().read(path, ReadContext(context.allow_globals))


class OneOfTwo(ModularAdapter):
    """Register the router, and open the shards by other means."""

    name: ClassVar[str] = "one_of_two"

    def read(self, path: Path, context: ReadContext) -> vc.Checkpoint:
        found = super().read(path, ReadContext(context.allow_globals))
        context.register(path / "system" / "router.state")
        return found


class Partial(PtAdapter):
    """Set one attribute of the incremental contract, and nothing else of it."""

    name: ClassVar[str] = "partial"
    index_file: ClassVar[str] = "index"


@pytest.mark.parametrize("adapter", [Unregistered(), OneOfTwo()], ids=lambda each: each.name)
def test_a_file_that_is_opened_without_being_registered_fails_the_suite(adapter, tmp_path):
    suite = type("TestIt", (AdapterTests,), {"adapter": adapter})()
    with pytest.raises(AssertionError, match="not registered"):
        suite.test_every_file_that_matters_is_registered(sample="experts", tmp_path=tmp_path)


@pytest.mark.parametrize("adapter", [PtAdapter(), ModularAdapter()], ids=lambda each: each.name)
def test_an_adapter_that_registers_its_files_passes(adapter, tmp_path):
    suite = type("TestIt", (AdapterTests,), {"adapter": adapter})()
    suite.test_every_file_that_matters_is_registered(sample="experts", tmp_path=tmp_path)


def test_a_part_of_the_incremental_contract_is_not_enough():
    suite = type("TestIt", (AdapterTests,), {"adapter": Partial()})()
    with pytest.raises(PluginError, match="index_file"):
        suite.test_it_can_be_registered()
    with pytest.raises(PluginError, match="index_file"):
        resolve_adapter(Partial())


def test_a_conversion_that_reads_through_the_context_notices_a_change(tmp_path):
    source = tmp_path / "a.pt"
    torch.save({"model": {"w": torch.ones(3)}}, source)
    checkpoint = vc.open(source)
    with source.open("ab") as file:
        file.write(b"x")
    with pytest.raises(vc.CkptError) as refused:
        checkpoint.sources.check_unchanged()
    assert refused.value.exit_code == 13
