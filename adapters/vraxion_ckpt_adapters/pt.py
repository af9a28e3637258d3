"""Monolithic ``.pt``: one file, written by ``torch.save``, that holds one payload dict or a bare state dict.

Its keys depend on the trainer, and it is written back under the keys under which it came. Which keys are known is
declared in the module `dialects` beside this one.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vraxion_ckpt.plugin_api import (
    MONOLITH,
    Adapter,
    Checkpoint,
    CkptWarning,
    Extras,
    Faults,
    InconsistentError,
    Lifecycle,
    ReadContext,
    build_payload_references,
    count,
    hookimpl,
    is_archive,
    make_extras,
    monolith_dialect,
    origin_of,
    parse_payload,
    prefix_to_record,
    recorded_dialect,
    save_torch_file,
    split_head,
    torch_file_size,
)


class PtAdapter(Adapter):
    """One file, written by torch.save, with the whole checkpoint."""

    name: ClassVar[str] = "pt"
    suffixes: ClassVar[tuple[str, ...]] = (".pt", ".pth", ".ckpt")
    loads_pickles: ClassVar[bool] = True

    model_key: str | None = Field(None, description="on reading, the key of the model, where no dialect knows it")
    optimizer_key: str | None = Field(None, description="on reading, the key of the optimizer")
    prefix: str | None = Field(None, description="on reading, what precedes the names of the head, such as module.")

    @classmethod
    def detect(cls, path: Path) -> bool:
        # router.state of a modular directory is also such a file, but does not contain the experts.
        return is_archive(path) and path.name != "router.state"

    def read(self, path: Path, context: ReadContext) -> Checkpoint:
        found, number = self._open(path, context)
        _check_number(found, number, path)
        return found

    def examine(self, path: Path, faults: Faults, context: ReadContext) -> Checkpoint | None:
        opened = faults.attempt(lambda: self._open(path, context))
        if opened is None:
            return None
        faults.attempt(lambda: _check_number(*opened, path))
        return opened[0]

    def _open(self, path: Path, context: ReadContext) -> tuple[Checkpoint, int | None]:
        """Return the checkpoint, and the file's `num_experts` without comparing it with the model."""
        payload = context.load_payload(path)
        parsed = parse_payload(
            payload, path, context.trainers, model_key=self.model_key, optimizer_key=self.optimizer_key
        )
        extras = parsed.extras
        prefix = self.prefix if self.prefix is not None else extras.head_prefix
        found = split_head(parsed.checkpoint, path, frozenset(extras.deleted), prefix)
        rows = dict.fromkeys(range(found.num_experts), Lifecycle.unknown(found.step))
        checkpoint = replace(
            found,
            lifecycle={**rows, **_recorded_rows(extras, rows, path)},
            origin=origin_of(self.name, path, MONOLITH, parsed.dialect, extras),
        )
        return checkpoint, parsed.num_experts

    def dialect(self, checkpoint: Checkpoint) -> str:
        return str(recorded_dialect(checkpoint, MONOLITH) or "")

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        save_torch_file(_payload(checkpoint), path)

    def size(self, checkpoint: Checkpoint) -> int:
        return torch_file_size(_payload(checkpoint))


def _payload(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the payload in the dialect of the checkpoint's source."""
    dialect, origin = monolith_dialect(checkpoint)
    state = checkpoint.state_references()
    extras = make_extras(
        checkpoint,
        dialect,
        origin,
        lifecycle=checkpoint.lifecycle if _worth_keeping(checkpoint) else {},
        deleted=tuple(sorted(checkpoint.head.deleted)) if checkpoint.head else (),
        head_prefix=prefix_to_record(checkpoint, state.keys()),
    )
    return build_payload_references(checkpoint, state, dialect, extras)


def _check_number(found: Checkpoint, number: int | None, path: Path) -> None:
    if number is not None and found.head and found.num_experts != number:
        raise InconsistentError(
            f"num_experts is {number}, but the model has {found.num_experts}", path=path, key="num_experts"
        )


def _recorded_rows(extras: Extras, rows: dict[int, Lifecycle], path: Path) -> dict[int, Lifecycle]:
    """Return the recorded lifecycle rows of existing experts.

    A resumed trainer may have copied the rows of an earlier checkpoint, so some may be missing or superfluous.
    """
    if extras.lifecycle and extras.lifecycle.keys() != rows.keys():
        stated = count(len(extras.lifecycle), "expert")
        message = (
            f"{path}: there are lifecycle rows for {stated}, but the model has {len(rows)}; missing rows are assumed"
        )
        warnings.warn(message, CkptWarning, stacklevel=2)
    return {i: row for i, row in extras.lifecycle.items() if i in rows}


def _worth_keeping(checkpoint: Checkpoint) -> bool:
    """Return whether to write lifecycle rows: there is a history, or a reader would assume other rows."""
    fresh = Lifecycle.fresh(checkpoint.step)
    return bool(checkpoint.history) or any(row != fresh for row in checkpoint.lifecycle.values())


@hookimpl
def register_adapters() -> list[type[Adapter]]:
    """Register the format."""
    return [PtAdapter]
