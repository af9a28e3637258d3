"""An adapter must recognise its own files, and reject damaged ones."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.errors import ChangedError, CkptError, CkptWarning
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.discovery import adapters
from vraxion_ckpt.plugins.options import configure
from vraxion_ckpt.testing.adapter_case import AdapterCase
from vraxion_ckpt.testing.cases import assert_none, named
from vraxion_ckpt.testing.samples import make, samples
from vraxion_ckpt.testing.watch import contents, written


class DamageTests(AdapterCase):
    """Read files that are damaged, missing, changed, or of another format."""

    # --- registered files ---

    @pytest.mark.parametrize("sample", ["experts", "single", "odd_payload"])
    @named
    def test_every_file_that_matters_is_registered(self, sample: str, tmp_path: Path) -> None:
        """A file must be registered if, without it, reading fails or gives another checkpoint."""
        path = self.written(samples()[sample], tmp_path)
        registered = {os.path.realpath(source.path) for source in self.read_all(path).sources}
        for name in contents(path):
            file = path / name
            aside = file.rename(tmp_path / "aside")
            matters = not self._reads_the_same(samples()[sample], path)
            aside.rename(file)
            assert not matters or os.path.realpath(file) in registered, (
                f"{file.name} is not registered: open it with the context of `read`"
            )

    @named
    def test_a_change_of_a_file_after_reading_is_detected(self, tmp_path: Path) -> None:
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

    # --- detection and damage ---

    @named
    def test_it_detects_only_its_own_files(self, tmp_path: Path) -> None:
        own = self.written(make(), tmp_path / "own")
        assert adapter_calls.detect(type(self.adapter), own), "`detect` does not recognise the output of `write`"
        (tmp_path / "empty").touch()
        (tmp_path / "text").write_text("hello\n" * 100)
        (tmp_path / "json").write_text('{"a": [1, 2, 3]}')
        (tmp_path / "folder").mkdir()
        for other, kind in adapters().items():
            if kind.name != self.adapter.name:
                assert not kind.detect(own), f"the format {other} detects a checkpoint of this format as its own"
                written(configure(kind, {}), make(), tmp_path / other)
        for path in set(tmp_path.iterdir()) - {tmp_path / "own"}:
            assert not adapter_calls.detect(type(self.adapter), path), (
                f"`detect` recognises {path.name}, which is not of this format"
            )
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
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CkptWarning)
            try:
                found = self.read_all(path)
            except CkptError:
                return
        expected = adapter_calls.held(self.adapter, checkpoint)
        if caught:
            found.lifecycle = expected.lifecycle  # lifecycle rows may be rebuilt with a warning
        assert_none(checkpoint_differences(expected, found), f"{damage}: reading it succeeds with a different result")
