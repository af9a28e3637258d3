"""The conformance suite for adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.shared_memory import sharing
from vraxion_ckpt.conversion.convert import convert
from vraxion_ckpt.errors import LossError, OptionError
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.discovery import adapters, check_offer
from vraxion_ckpt.plugins.options import configure
from vraxion_ckpt.testing.adapter_damage import DamageTests
from vraxion_ckpt.testing.adapter_round_trips import RoundTripTests
from vraxion_ckpt.testing.cases import assert_none, case, named
from vraxion_ckpt.testing.samples import samples


class AdapterTests(RoundTripTests, DamageTests):
    """Test an adapter. Subclass this in a test module and name the adapter; pytest runs the inherited tests.

    ::

        class TestNpy(AdapterTests):
            adapter = NpyAdapter()

    Attributes:
        adapter: the adapter, with the options to test. Subclass once for each set of options that matters.
        examples: the number of generated checkpoints to try. They are the same in every run.
    """

    # --- losses ---

    @pytest.mark.parametrize("sample", list(samples()))
    @named
    def test_every_loss_is_declared(self, sample: str, tmp_path: Path) -> None:
        checkpoint = samples()[sample]
        declared = adapter_calls.losses(self.adapter, checkpoint)
        found = self.read_all(self.written(checkpoint, tmp_path))
        lost = list(checkpoint_differences(checkpoint, found))
        lost += [f"{names} no longer share memory" for names in _ties(checkpoint) if names not in _ties(found)]
        assert_none(lost if not declared else (), "lost, but `losses` declares nothing")
        assert_none([loss for loss in declared if not (loss.what and loss.why)], "a `Loss` needs both `what` and `why`")

    def test_a_declared_loss_stops_a_conversion(self, tmp_path: Path) -> None:
        for name, checkpoint in samples().items():
            with case(self.adapter.name, dict(self.adapter), name):
                self._assert_loss_stops_conversion(checkpoint, tmp_path / name, tmp_path / f"{name}_refused")

    def _assert_loss_stops_conversion(self, checkpoint: Checkpoint, source: Path, target: Path) -> None:
        if not adapter_calls.losses(self.adapter, checkpoint):
            return
        others = [configure(kind, {}) for kind in adapters().values()]
        other = next(each for each in others if not each.is_directory and not each.losses(checkpoint))
        other.write(checkpoint, source)
        with pytest.raises(LossError):
            convert(source, target, from_=other, to=self.adapter)
        assert not target.exists(), "a conversion was stopped by a loss, but left a target"

    # --- names and options ---

    def test_it_can_be_registered(self) -> None:
        """The class must be complete: for example, it must define all abstract methods of its base class."""
        check_offer(type(self.adapter), Adapter, "register_adapters")

    @named
    def test_options_are_described_and_unknown_ones_refused(self) -> None:
        kind = type(self.adapter)
        assert kind.name, "the class needs a `name`"
        assert kind.summary(), "the class needs a docstring"
        for option, field in kind.model_fields.items():
            assert field.description, f"option {option} needs a description"
        with pytest.raises(OptionError, match="no_such_option"):
            configure(kind, {"no_such_option": 1})


def _ties(checkpoint: Checkpoint) -> list[set[str]]:
    """Return the names of each group of model tensors that share memory."""
    return [{name for name, _ in group} for group in sharing(checkpoint.state_dict().items())]
