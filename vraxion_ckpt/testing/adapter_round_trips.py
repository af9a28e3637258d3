"""An adapter must return what was written, and change nothing else."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest

from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.conversion.convert import convert
from vraxion_ckpt.conversion.edit import edit
from vraxion_ckpt.errors import CkptError, CkptWarning
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import IncrementalDirectoryAdapter
from vraxion_ckpt.reading.opening import read
from vraxion_ckpt.testing.adapter_case import AdapterCase
from vraxion_ckpt.testing.cases import assert_none, named
from vraxion_ckpt.testing.samples import make, samples
from vraxion_ckpt.testing.strategies import run_on_generated
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
    "renumber": [("prune_merge", {"merge_from": 1, "merge_into": 0, "renumber": True, "allow_tenured": True})],
}


class RoundTripTests(AdapterCase):
    """Write, convert and edit checkpoints, and read them back."""

    # --- round trips ---

    @pytest.mark.parametrize("sample", list(samples()))
    @named
    def test_a_sample_comes_back_bit_for_bit(self, sample: str, tmp_path: Path) -> None:
        checkpoint = samples()[sample]
        self.assert_holds(checkpoint, self.written(checkpoint, tmp_path))

    @named
    def test_generated_checkpoints_come_back_bit_for_bit(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        def comes_back(checkpoint: Checkpoint) -> None:
            folder = tmp_path_factory.mktemp("generated")
            self.assert_holds(checkpoint, self.written(checkpoint, folder))
            shutil.rmtree(folder)

        run_on_generated(comes_back, self.examples)

    @pytest.mark.parametrize("sample", ["experts", "single", "odd_payload"])
    @named
    def test_the_size_is_that_of_the_files(self, sample: str, tmp_path: Path) -> None:
        held = adapter_calls.held(self.adapter, samples()[sample])
        told = adapter_calls.size(self.adapter, held)
        size = sum(map(len, contents(self.written(samples()[sample], tmp_path)).values()))
        assert told in (None, size), f"`size` returned {told}, but {size} bytes were written"

    @pytest.mark.parametrize("kind", list(_EDITS))
    @named
    def test_a_file_that_a_reader_ignores_does_not_change_what_is_read(self, kind: str, tmp_path: Path) -> None:
        """An edit writes such a file before or after the index file; until then, a reader finds either version."""
        adapter = self.adapter
        if not isinstance(adapter, IncrementalDirectoryAdapter):
            pytest.skip("the format is not written file by file")
        old, new = self.written(make(), tmp_path / "old"), self.place(tmp_path / "new")
        convert(old, new, from_=adapter, to=adapter, transforms=_EDITS[kind], losses="ignore")
        before, after = self.read_all(old), self.read_all(new)
        files = {*contents(old), *contents(new)} - {Path(adapter.index_file)}
        for reader, place, other in ((before, old, new), (after, new, old)):
            for name in sorted(map(str, files)):
                if not adapter_calls.is_ignored(adapter, name, before, after, reader):
                    continue
                mixed = Path(shutil.copytree(place, self.place(tmp_path / "mixed")))
                (mixed / name).unlink(missing_ok=True)
                if (other / name).exists():
                    shutil.copy(other / name, mixed / name)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CkptWarning)
                    try:
                        found = list(checkpoint_differences(reader, self.read_all(mixed)))
                    except CkptError:  # the adapter may be stricter than a trainer's loader
                        found = []
                assert_none(found, f"`is_ignored` says that {name} is ignored, but it changes what is read")
                shutil.rmtree(mixed)

    @named
    def test_a_conversion_with_a_split_reads_back(self, tmp_path: Path) -> None:
        start = self.written(make(), tmp_path / "start")
        target = self.place(tmp_path, "split")
        convert(start, target, from_=self.adapter, to=self.adapter, transforms=_EDITS["grow"], losses="ignore")
        found = read(target, from_=self.adapter)
        assert found.num_experts == 4, f"there are {found.num_experts} experts after one of three was split, not 4"
        names = [record.name for record in found.history]
        assert names == ["mitosis_split"], f"the history lists {names}, not mitosis_split"
        assert found.router_map is not None, "the router_map is missing after the split"
        owners, expected = found.router_map.tolist(), [3 if a in (0, 3) else a % 3 for a in range(12)]
        assert owners == expected, f"the router_map is {owners} after the split, not {expected}"

    @pytest.mark.parametrize("kind", list(_EDITS))
    @named
    def test_an_edit_in_place_equals_a_conversion(self, kind: str, tmp_path: Path) -> None:
        source = self.written(make(), tmp_path / "source")
        if source.is_dir() and adapter_calls.foreign_files(self.adapter, source) is None:
            pytest.skip("this format cannot list foreign files, so its directories are not edited in place")
        target = self.place(tmp_path)
        convert(source, target, from_=self.adapter, to=self.adapter, transforms=_EDITS[kind], losses="ignore")
        edit(source, from_=self.adapter, to=self.adapter, transforms=_EDITS[kind], losses="ignore")
        found, expected = self.read_all(source), self.read_all(target)
        assert_none(checkpoint_differences(expected, found), "an edit in place and a conversion gave different results")
        names, others = ({str(name) for name in contents(path)} for path in (source, target))
        assert names == others, f"the files after an edit are {sorted(names)}, but after a conversion {sorted(others)}"
        assert_none(set(source.parent.iterdir()) ^ {source}, "an edit in place left files next to the checkpoint")

    @pytest.mark.parametrize("name", _NAMES, ids=lambda name: repr(name)[:20])
    @named
    def test_a_hostile_name_is_kept_or_refused_and_stays_inside(self, name: str, tmp_path: Path) -> None:
        checkpoint = make()
        checkpoint.core["a" if name == "A" else "A"] = checkpoint.core["theta"].clone()
        checkpoint.core[name] = checkpoint.core["theta"] + 1
        checkpoint.payload[name] = checkpoint.core["theta"] + 2
        place = self.place(tmp_path / "deep" / "down")
        try:
            written(self.adapter, checkpoint, place)
        except CkptError:
            pass  # an adapter may refuse it
        else:
            self.assert_holds(checkpoint, place)
        outside = [path for path in contents(tmp_path) if not (tmp_path / path).is_relative_to(place)]
        assert_none(outside, f"the name {name!r} caused files outside the checkpoint")

    # --- no side effects ---

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
        with untouched(make()):  # the global random state must not change either
            self.read_all(path)
        assert_none(changed_files(before, contents(path)), "reading changed files")

    @pytest.mark.parametrize("sample", list(samples()))
    @named
    def test_the_same_checkpoint_gives_the_same_bytes(self, sample: str, tmp_path: Path) -> None:
        first = self.written(samples()[sample], tmp_path / "first")
        self.written(samples()["two_groups"], tmp_path / "between")  # an earlier write must have no influence
        second = self.written(samples()[sample], tmp_path / "second")
        assert_none(
            changed_files(contents(first), contents(second)), "a second write of the same checkpoint gave other bytes"
        )

    @named
    def test_a_checkpoint_may_be_moved(self, tmp_path: Path) -> None:
        path = self.written(make(), tmp_path / "here")
        there = path.rename(self.place(tmp_path / "there", "renamed"))
        self.assert_holds(make(), there)
