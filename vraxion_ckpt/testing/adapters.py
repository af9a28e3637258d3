"""What every adapter must do."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.shared_memory import sharing
from vraxion_ckpt.conversion.convert import convert
from vraxion_ckpt.conversion.edit import edit
from vraxion_ckpt.errors import ChangedError, CkptError, CkptWarning, LossError, OptionError
from vraxion_ckpt.optimizer import binding
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.plugins.discovery import adapters, check_offer
from vraxion_ckpt.plugins.options import configure
from vraxion_ckpt.reading.opening import read
from vraxion_ckpt.testing.cases import assert_none, case, named
from vraxion_ckpt.testing.samples import checkpoints, make, samples
from vraxion_ckpt.testing.watch import changed_files, contents, untouched, written

_NAMES = (
    "",
    ".",
    "..",
    "../up",
    "/abs",
    "a/b",
    "a\\b",
    "a\0b",
    "__metadata__",
    "A",
    "a",
    "é",
    "é",
    "x" * 300,
    "\ud800",
)


_EDITS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "grow": [("mitosis_split", {"parent": 0, "addresses": [0, 3], "noise": 0})],
    "shrink": [("prune_merge", {"merge_into": 0, "allow_tenured": True})],
    "renumber": [
        ("prune_merge", {"merge_from": 1, "merge_into": 0, "renumber": True, "allow_tenured": True}),
    ],
}


class AdapterTests:
    """Test an adapter: subclass this in a test module, name the adapter, and pytest runs the rest.

    ::

        class TestNpy(AdapterTests):
            adapter = NpyAdapter()

    Attributes:
        adapter: with the options to test; subclass once for each set of options that matters.
        examples: how many generated checkpoints to try; the same ones every time.
    """

    adapter: ClassVar[Adapter]
    examples: ClassVar[int] = 50

    # --- what a test needs ---

    def place(self, folder: Path, name: str = "target") -> Path:
        """Return a free path with a name that the format goes by."""
        folder.mkdir(parents=True, exist_ok=True)
        fits = (
            suffix
            for suffix in self.adapter.suffixes
            if suffix.endswith("/") == adapter_calls.is_directory(self.adapter)
        )
        return folder / (name + next(fits, "").rstrip("/"))

    def written(self, checkpoint: Checkpoint, folder: Path) -> Path:
        """Write what the format holds of a checkpoint to a new place."""
        return written(self.adapter, checkpoint, self.place(folder))

    def read_all(self, path: Path) -> Checkpoint:
        """Read a checkpoint as a conversion does: bound, all experts open, every checksum verified."""
        found = binding.bind(adapter_calls.call_read(self.adapter, path))
        found.open_experts()
        found.sources.verify()
        assert_none(invariants.invariant_findings(found), f"{path.name} was read although it contradicts itself")
        return found

    def assert_holds(self, checkpoint: Checkpoint, path: Path) -> None:
        """Compare what lies at `path` with what the format is to hold of a checkpoint, bit by bit."""
        expected = adapter_calls.held(self.adapter, checkpoint)
        assert_none(checkpoint_differences(expected, self.read_all(path)), f"{path.name} came back changed")

    # --- round trips ---

    @pytest.mark.parametrize("sample", list(samples()))
    @named
    def test_a_sample_comes_back_bit_for_bit(self, sample: str, tmp_path: Path) -> None:
        checkpoint = samples()[sample]
        self.assert_holds(checkpoint, self.written(checkpoint, tmp_path))

    @named
    def test_generated_checkpoints_come_back_bit_for_bit(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        @settings(
            max_examples=self.examples,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,  # pytest shows the notes of one failure, not those of a group
        )
        @given(checkpoints())
        def comes_back(checkpoint: Checkpoint) -> None:
            folder = tmp_path_factory.mktemp("generated")
            self.assert_holds(checkpoint, self.written(checkpoint, folder))
            shutil.rmtree(folder)

        comes_back()

    @named
    def test_it_serves_a_conversion_with_surgery_and_back(self, tmp_path: Path) -> None:
        start = self.written(make(), tmp_path / "start")
        split = [("mitosis_split", {"parent": 0, "addresses": [0, 3], "noise": 0})]
        target = self.place(tmp_path, "split")
        convert(start, target, from_=self.adapter, to=self.adapter, transforms=split, losses="ignore")
        found = read(target, from_=self.adapter)
        assert found.num_experts == 4, f"there are {found.num_experts} experts after a split of three"
        names = [record.name for record in found.history]
        assert names == ["mitosis_split"], f"the history holds {names}, not the step that was run"
        assert found.router_map is not None, "the router_map is gone after a split"
        owners, expected = found.router_map.tolist(), [3 if a in (0, 3) else a % 3 for a in range(12)]
        assert owners == expected, f"the router_map is {owners} after the split, not {expected}"

    @pytest.mark.parametrize("kind", list(_EDITS))
    @named
    def test_an_edit_in_place_is_what_a_conversion_gives(self, kind: str, tmp_path: Path) -> None:
        source = self.written(make(), tmp_path / "source")
        if source.is_dir() and adapter_calls.foreign_files(self.adapter, source) is None:
            pytest.skip("a directory whose format cannot list foreign files is not edited in place")
        target = self.place(tmp_path)
        convert(source, target, from_=self.adapter, to=self.adapter, transforms=_EDITS[kind], losses="ignore")
        edit(source, from_=self.adapter, to=self.adapter, transforms=_EDITS[kind], losses="ignore")
        found, expected = self.read_all(source), self.read_all(target)
        assert_none(checkpoint_differences(expected, found), "an edit in place gave something else than a conversion")
        names, others = ({str(name) for name in contents(path)} for path in (source, target))
        assert names == others, f"an edit in place left the files {sorted(names)}, a conversion wrote {sorted(others)}"
        assert_none(set(source.parent.iterdir()) ^ {source}, "an edit in place left files beside the checkpoint")

    # --- what it must leave alone ---

    @pytest.mark.parametrize("sample", list(samples()))
    @named
    def test_writing_changes_nothing_of_the_checkpoint(self, sample: str, tmp_path: Path) -> None:
        checkpoint = samples()[sample]
        with untouched(checkpoint):
            adapter_calls.losses(self.adapter, checkpoint)
            adapter_calls.held(self.adapter, checkpoint)
            adapter_calls.size(self.adapter, checkpoint)
            adapter_calls.dialect(self.adapter, checkpoint)
            adapter_calls.foreign_files(self.adapter, self.written(checkpoint, tmp_path))

    @pytest.mark.parametrize("sample", ["experts", "single", "odd_payload"])
    @named
    def test_reading_changes_nothing_on_disk(self, sample: str, tmp_path: Path) -> None:
        path = self.written(samples()[sample], tmp_path)
        before = contents(path)
        with untouched(make()):  # nor of global random state
            self.read_all(path)
        assert_none(changed_files(before, contents(path)), "reading changed files")

    @pytest.mark.parametrize("sample", list(samples()))
    @named
    def test_the_same_checkpoint_gives_the_same_bytes(self, sample: str, tmp_path: Path) -> None:
        first = self.written(samples()[sample], tmp_path / "first")
        self.written(samples()["two_groups"], tmp_path / "between")  # what was written before must not matter
        second = self.written(samples()[sample], tmp_path / "second")
        assert_none(
            changed_files(contents(first), contents(second)), "a second write of the same checkpoint gave other bytes"
        )

    @named
    def test_a_checkpoint_may_be_moved(self, tmp_path: Path) -> None:
        path = self.written(make(), tmp_path / "here")
        there = path.rename(self.place(tmp_path / "there", "renamed"))
        self.assert_holds(make(), there)

    # --- the files it opens ---

    @pytest.mark.parametrize("sample", ["experts", "single", "odd_payload"])
    def test_every_file_that_matters_is_registered(self, sample: str, tmp_path: Path) -> None:
        """A file without which the checkpoint reads differently, or not at all, must be watched for changes."""
        path = self.written(samples()[sample], tmp_path)
        registered = {os.path.realpath(source.path) for source in self.read_all(path).sources}
        for name in contents(path):
            file = path / name
            aside = file.rename(tmp_path / "aside")
            matters = not self._reads_the_same(samples()[sample], path)
            aside.rename(file)
            assert not matters or os.path.realpath(file) in registered, (
                f"{file.name} was opened but not registered: open it with the context of `read`, or register it there"
            )

    def test_a_file_that_changes_after_it_was_read_is_noticed(self, tmp_path: Path) -> None:
        path = self.written(make(), tmp_path)
        found = self.read_all(path)
        assert found.sources.files, "no file is registered: open files with the context of `read`"
        for source in found.sources.files:
            with source.path.open("ab") as file:
                file.write(b" ")
            with pytest.raises(ChangedError):
                found.sources.check_unchanged()

    def _reads_the_same(self, checkpoint: Checkpoint, path: Path) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CkptWarning)
            try:
                found = self.read_all(path)
            except CkptError:
                return False
        return not list(checkpoint_differences(adapter_calls.held(self.adapter, checkpoint), found))

    # --- losses ---

    @pytest.mark.parametrize("sample", list(samples()))
    @named
    def test_what_is_lost_was_declared(self, sample: str, tmp_path: Path) -> None:
        checkpoint = samples()[sample]
        declared = adapter_calls.losses(self.adapter, checkpoint)
        found = self.read_all(self.written(checkpoint, tmp_path))
        lost = list(checkpoint_differences(checkpoint, found))
        lost += [f"{names} are no longer one tensor" for names in _ties(checkpoint) if names not in _ties(found)]
        assert_none(lost if not declared else (), "lost, although `losses` declares nothing")
        assert_none([loss for loss in declared if not (loss.what and loss.why)], "a loss needs both `what` and `why`")

    def test_a_declared_loss_stops_a_conversion(self, tmp_path: Path) -> None:
        for name, checkpoint in samples().items():
            with case(self.adapter.name, dict(self.adapter), name):
                self._check_that_a_loss_stops(checkpoint, tmp_path / name, tmp_path / f"{name}_refused")

    def _check_that_a_loss_stops(self, checkpoint: Checkpoint, source: Path, target: Path) -> None:
        if not adapter_calls.losses(self.adapter, checkpoint):
            return
        others = [configure(kind, {}) for kind in adapters().values()]
        other = next(each for each in others if not each.is_directory and not each.losses(checkpoint))
        other.write(checkpoint, source)
        with pytest.raises(LossError):
            convert(source, target, from_=other, to=self.adapter)
        assert not target.exists(), "a conversion that a loss stopped left a target"

    # --- what is no checkpoint of this format ---

    @named
    def test_it_detects_its_own_and_nothing_else(self, tmp_path: Path) -> None:
        own = self.written(make(), tmp_path / "own")
        assert adapter_calls.detect(type(self.adapter), own), "`detect` does not recognise what `write` wrote"
        (tmp_path / "empty").touch()
        (tmp_path / "text").write_text("hello\n" * 100)
        (tmp_path / "json").write_text('{"a": [1, 2, 3]}')
        (tmp_path / "folder").mkdir()
        for other, kind in adapters().items():
            if kind.name != self.adapter.name:
                assert not kind.detect(own), f"the format {other} detects this one's checkpoint as its own"
                written(configure(kind, {}), make(), tmp_path / other)
        for path in set(tmp_path.iterdir()) - {tmp_path / "own"}:
            assert not adapter_calls.detect(type(self.adapter), path), f"`detect` takes {path.name} for its own"
        assert not adapter_calls.detect(type(self.adapter), tmp_path / "nowhere"), "`detect` accepts a missing path"

    @pytest.mark.parametrize("sample", ["experts", "single"])
    @named
    def test_a_truncated_file_is_refused(self, sample: str, tmp_path: Path) -> None:
        path = self.written(samples()[sample], tmp_path)
        for name, whole in contents(path).items():
            file = path / name
            for length in sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1}):
                file.write_bytes(whole[: max(0, length)])
                self._assert_refused_or_whole(samples()[sample], path, f"{file.name} cut to {length} bytes")
            file.write_bytes(whole)

    @named
    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        path = self.written(make(), tmp_path)
        for name, whole in contents(path).items() if path.is_dir() else ():
            file = path / name
            file.unlink()
            self._assert_refused_or_whole(make(), path, f"without {file.name}")
            file.write_bytes(whole)

    def _assert_refused_or_whole(self, checkpoint: Checkpoint, path: Path, damage: str) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", CkptWarning)
            try:
                found = self.read_all(path)
            except CkptError:
                return
        expected = adapter_calls.held(self.adapter, checkpoint)
        if said:
            found.lifecycle = expected.lifecycle  # the one thing that may be rebuilt, with a warning
        assert_none(checkpoint_differences(expected, found), f"{damage}: it was not refused, and reads differently")

    # --- names and options ---

    @pytest.mark.parametrize("name", _NAMES, ids=lambda name: repr(name)[:20])
    @named
    def test_a_hostile_name_comes_back_or_is_refused_and_leads_nowhere(self, name: str, tmp_path: Path) -> None:
        checkpoint = make()
        checkpoint.core["a" if name == "A" else "A"] = checkpoint.core["theta"].clone()
        checkpoint.core[name] = checkpoint.core["theta"] + 1
        checkpoint.payload[name] = checkpoint.core["theta"] + 2
        place = self.place(tmp_path / "deep" / "down")
        try:
            written(self.adapter, checkpoint, place)
        except CkptError:
            pass  # to refuse it is as good
        else:
            self.assert_holds(checkpoint, place)
        outside = [path for path in contents(tmp_path) if not (tmp_path / path).is_relative_to(place)]
        assert_none(outside, f"the name {name!r} led outside the checkpoint")

    def test_it_can_be_registered(self) -> None:
        """For instance, it defines all of what `IncrementalDirectoryAdapter` declares, or nothing of it."""
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
    """List the names of model tensors that share memory."""
    return [{name for name, _ in group} for group in sharing(checkpoint.state_dict().items())]
