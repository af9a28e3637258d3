"""The conformance suite for transforms."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences, differences, same_bits
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.conversion.chain import apply_chain, effect_of
from vraxion_ckpt.errors import BindingError, CkptError, CkptWarning, OptionError, PluginError
from vraxion_ckpt.optimizer import binding
from vraxion_ckpt.optimizer.placement import missing_parameters
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.discovery import adapters
from vraxion_ckpt.plugins.options import configure, recorded_options
from vraxion_ckpt.plugins.transform import Step, Transform
from vraxion_ckpt.testing.cases import assert_none, case
from vraxion_ckpt.testing.samples import samples
from vraxion_ckpt.testing.strategies import run_on_generated
from vraxion_ckpt.testing.watch import changed_files, contents, untouched, written

Case = tuple[Mapping[str, Any], str]


def _head_first(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: not name.startswith("head."))


_ORDERS: Mapping[str, Callable[[list[str]], list[str]]] = {
    "sorted": sorted,
    "reversed": lambda names: names[::-1],
    "head first": _head_first,
}


class TransformTests:
    """Test a transform. Subclass this, name the transform and calls that work; pytest runs the inherited tests.

    ::

        class TestScale(TransformTests):
            transform = Scale
            accepted = [({"expert": 1, "factor": 0.5}, "experts")]
            refused = [({"expert": 7}, "experts", "no expert 7")]

    Attributes:
        transform: the transform's class.
        accepted: calls that must succeed, at least one: options, as a user gives them, and the name of a sample.
        refused: calls that must fail: options, the name of a sample, and a part of the error message.
        examples: the number of generated checkpoints to try. They are the same in every run.
    """

    transform: ClassVar[type[Transform]]
    accepted: ClassVar[Sequence[Case]]
    refused: ClassVar[Sequence[tuple[Mapping[str, Any], str, str]]] = ()
    examples: ClassVar[int] = 50

    def run(self, options: Mapping[str, Any], checkpoint: Checkpoint) -> Checkpoint:
        """Run the transform as a chain of one step. Fail if it changes its input."""
        transform = configure(self.transform, options)
        with untouched(checkpoint):
            after, _ = apply_chain(checkpoint, [Step(transform, "tests", "0")])
        return after

    def case(self, options: Mapping[str, Any], sample: str | None = None) -> AbstractContextManager[None]:
        """Return a context manager that adds these options and the sample to failures."""
        return case(self.transform.name, options, sample)

    def assert_sound(self, options: Mapping[str, Any], before: Checkpoint, after: Checkpoint) -> None:
        """Check the invariants of every chain: consistency, preservation of the function, history."""
        listed = [*invariants.invariant_findings(after), *invariants.sharing_findings(before, after)]
        if not any(missing_parameters(before)):
            listed += missing_parameters(after)
        assert_none(listed, "the result is inconsistent")
        noise = effect_of(Step(configure(self.transform, options), "tests", "0")).noise
        preservation = invariants.preservation(before, after, noise)
        assert preservation is None or preservation.as_asked, f"the function must be preserved: {preservation}"
        for name, tensor in before.core.items() if noise is not None else ():
            kept = tensor is before.router_map or (name in after.core and same_bits(tensor, after.core[name]))
            assert kept, f"the function must be preserved, but {name} has changed"
        names = [record.name for record in after.history]
        recorded = after.history[:-1] == before.history and names[-1:] == [self.transform.name]
        assert recorded, f"the history must end with one new record of {self.transform.name}; it is {names}"

    # --- calls that work ---

    def test_accepted_calls_give_a_consistent_result(self) -> None:
        assert self.accepted, "`accepted` needs at least one call"
        for options, sample in self.accepted:
            with self.case(options, sample):
                before = samples()[sample]
                self.assert_sound(options, before, self.run(options, before))

    def test_a_second_run_gives_the_same(self) -> None:
        for options, sample in self.accepted:
            with self.case(options, sample):
                one, other = (self.run(options, samples()[sample]) for _ in range(2))
                assert_none(checkpoint_differences(one, other), "a second run gave another result")

    def test_mapped_files_are_not_written(self, tmp_path: Path) -> None:
        for number, (options, sample) in enumerate(self.accepted):
            for name, adapter in _formats().items():
                with self.case(options, sample):
                    path = written(adapter, samples()[sample], tmp_path / f"{number}_{name}")
                    before = contents(path)
                    mapped = binding.bind(adapter_calls.call_read(adapter, path))
                    mapped.open_experts()
                    self.run(options, mapped)
                    mapped.sources.check_unchanged()
                    assert_none(
                        changed_files(before, contents(path)), f"the transform wrote to files of the format {name}"
                    )

    def test_the_order_of_the_state_dict_does_not_matter(self) -> None:
        for options, sample in self.accepted:
            usual, turned = samples()[sample], samples()[sample]
            turned.core = dict(reversed(turned.core.items()))
            if turned.head is not None:
                turned.head.position = len(turned.core) - turned.head.position
            places = {name: place for place, name in enumerate(turned.state_dict())}
            for group in turned.optimizer.groups if turned.optimizer else ():
                group.params.sort(key=places.__getitem__)  # a trainer's optimizer has the order of the model
            with self.case(options, sample):
                one, other = self.run(options, usual), self.run(options, turned)
                assert_none(
                    differences(_by_name(one), _by_name(other)), "a state dict in another order gave another result"
                )

    @pytest.mark.parametrize("order", list(_ORDERS))
    def test_the_optimizer_keeps_the_order_of_its_trainer(self, order: str) -> None:
        """Trainers order their parameters by different rules. The result must follow the rule of the input."""
        arrange = _ORDERS[order]
        for options, sample in self.accepted:
            usual, turned = samples()[sample], samples()[sample]
            if usual.optimizer is None or turned.optimizer is None:
                continue
            for group in turned.optimizer.groups:
                group.params = arrange(group.params)
            with self.case(options, sample):
                after = self.run(options, usual).optimizer
                try:
                    other = self.run(options, turned).optimizer
                except BindingError:
                    continue  # refused, because two rules explain the order
                assert after is not None, "the optimizer is missing from the result"
                assert other is not None, f"the optimizer with the order {order} is missing from the result"
                found, expected = [g.params for g in other.groups], [arrange(g.params) for g in after.groups]
                assert found == expected, f"the order was {order}; the result has {found}, not {expected}"
                state, turned_state = (dict(sorted(each.state.items())) for each in (after, other))
                assert_none(differences(state, turned_state), f"the order was {order}; the optimizer's state differs")

    def test_the_result_survives_every_format(self, tmp_path: Path) -> None:
        for number, (options, sample) in enumerate(self.accepted):
            for name, adapter in _formats().items():
                with self.case(options, sample):
                    after = self.run(options, samples()[sample])
                    path = written(adapter, after, tmp_path / f"{number}_{name}")
                    found = binding.bind(adapter_calls.call_read(adapter, path))
                    expected = adapter_calls.held(adapter, after)
                    assert_none(checkpoint_differences(expected, found), f"the format {name} changed the result")

    # --- calls that are refused ---

    def test_refused_calls_raise_the_given_message(self) -> None:
        for options, sample, message in self.refused:
            checkpoint = samples()[sample]
            with self.case(options, sample):
                with untouched(checkpoint), pytest.raises(CkptError) as refusal:
                    self.run(options, checkpoint)
                raised = str(refusal.value)
                assert message in raised, f"the error must contain {message!r}, but is {raised!r}"

    @pytest.mark.parametrize("sample", list(samples()))
    def test_any_checkpoint_is_transformed_soundly_or_refused(self, sample: str) -> None:
        for options, _ in self.accepted:
            with self.case(options, sample):
                self._sound_or_refused(options, samples()[sample])

    def test_generated_checkpoints_are_transformed_soundly_or_refused(self) -> None:
        def sound_or_refused(checkpoint: Checkpoint) -> None:
            for options, _ in self.accepted:
                with self.case(options):
                    self._sound_or_refused(options, checkpoint)

        run_on_generated(sound_or_refused, self.examples)

    def _sound_or_refused(self, options: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        before = replace(checkpoint)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CkptWarning)
            try:
                after = self.run(options, checkpoint)
            except PluginError:
                raise  # a bug in the transform
            except CkptError:
                return
        self.assert_sound(options, before, after)

    # --- options ---

    def test_options_are_described_and_wrong_ones_refused(self) -> None:
        assert self.transform.name, "the class needs a `name`"
        assert self.transform.summary(), "the class needs a docstring"
        for option, field in self.transform.model_fields.items():
            assert field.description, f"option {option} needs a description"
        options = dict(self.accepted[0][0])
        with pytest.raises(OptionError, match="no_such_option"):
            configure(self.transform, {**options, "no_such_option": 1})
        for option in self.transform.model_fields:
            with pytest.raises(OptionError, match=option):
                configure(self.transform, {**options, option: object()})

    def test_the_options_in_the_history_give_the_same_transform(self) -> None:
        for options, _ in self.accepted:
            with self.case(options):
                transform = configure(self.transform, options)
                recorded = json.loads(json.dumps(recorded_options(transform), allow_nan=False))
                again = configure(self.transform, recorded)
                assert again == transform, f"the recorded options {recorded} give {again!r}, not {transform!r}"


def _formats() -> dict[str, Adapter]:
    """Return an adapter of every installed format, with default options."""
    return {name: configure(kind, {}) for name, kind in adapters().items()}


def _by_name(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the model tensors and the optimizer state, each sorted by name."""
    state = checkpoint.optimizer.state if checkpoint.optimizer else {}
    return [dict(sorted(checkpoint.state_dict().items())), dict(sorted(state.items()))]
