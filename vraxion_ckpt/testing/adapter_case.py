"""The base class of the adapter tests."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vraxion_ckpt.checkpoint import invariants
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.optimizer import binding
from vraxion_ckpt.plugins import adapter_calls
from vraxion_ckpt.plugins.adapter import Adapter
from vraxion_ckpt.testing.cases import assert_none
from vraxion_ckpt.testing.watch import written


class AdapterCase:
    """Write and read checkpoints with the tested adapter."""

    adapter: ClassVar[Adapter]
    examples: ClassVar[int] = 50

    def place(self, folder: Path, name: str = "target") -> Path:
        """Return an unused path whose suffix selects the format."""
        folder.mkdir(parents=True, exist_ok=True)
        fits = (
            suffix
            for suffix in self.adapter.suffixes
            if suffix.endswith("/") == adapter_calls.is_directory(self.adapter)
        )
        return folder / (name + next(fits, "").rstrip("/"))

    def written(self, checkpoint: Checkpoint, folder: Path) -> Path:
        """Write the part of a checkpoint that the format can hold to a new path. Return the path."""
        return written(self.adapter, checkpoint, self.place(folder))

    def read_all(self, path: Path) -> Checkpoint:
        """Read a checkpoint as a conversion does: bind its optimizer, open all experts, verify all checksums."""
        found = binding.bind(adapter_calls.call_read(self.adapter, path))
        found.open_experts()
        found.sources.verify()
        assert_none(invariants.invariant_findings(found), f"{path.name} was read although it is inconsistent")
        return found

    def assert_holds(self, checkpoint: Checkpoint, path: Path) -> None:
        """Assert that `path` holds, bit for bit, the part of a checkpoint that the format can hold."""
        expected = adapter_calls.held(self.adapter, checkpoint)
        assert_none(checkpoint_differences(expected, self.read_all(path)), f"{path.name} came back changed")
