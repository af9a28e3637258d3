"""The entry that this package adds to a checkpoint file, for values that a trainer's own entries cannot hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vraxion_ckpt.checkpoint.model import Lifecycle, SplitPlan
from vraxion_ckpt.checkpoint.provenance import Record
from vraxion_ckpt.errors import InconsistentError, UnsupportedError
from vraxion_ckpt.support.model_errors import refusals

OUR_KEY = "vraxion_ckpt"
OUR_PREFIX = f"{OUR_KEY}/"  # begins the names of tensors that do not belong to the model
_ROW = Lifecycle()


class Extras(BaseModel):
    """The value under `OUR_KEY`. It is not written if all fields have their defaults.

    Attributes:
        lifecycle: lifecycle rows by expert id.
        deleted: ids of deleted experts.
        head_position: the index of the head's first tensor in the state dict.
        head_prefix: what precedes the names of the head, if the names in the file do not tell.
        model_key: the payload's key of the model, if the user named it.
        optimizer_key: the payload's key of the optimizer, if the user named it.
        optimizer_names: the names of the optimizer's parameters, in the order of their numbers.
        optimizer_digest: the digest of the optimizer state to which `optimizer_names` belongs.
        optimizer_undecided: parameter names that could not be assigned to optimizer state with certainty.
        dialects: for each format, the variant in which the checkpoint was last stored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    history: tuple[Record, ...] = ()
    plan: SplitPlan | None = None
    lifecycle: dict[int, Lifecycle] = {}
    deleted: tuple[int, ...] = ()
    head_position: int | None = None
    head_prefix: str | None = None
    model_key: str | None = None
    optimizer_key: str | None = None
    optimizer_names: tuple[str, ...] | None = None
    optimizer_digest: str | None = None
    optimizer_undecided: tuple[str, ...] = ()
    dialects: dict[str, Any] = {}

    def as_json(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults. In lifecycle rows, 0 and 0.0 count as different."""
        found = self.model_dump(mode="json", exclude_defaults=True)
        for i, row in self.lifecycle.items():
            entries = {
                name: value for name, value in vars(row).items() if repr(value) != repr(getattr(_ROW, name, None))
            }
            found["lifecycle"][str(i) if str(i) in found["lifecycle"] else i] = {
                name: dict(value) if isinstance(value, Mapping) else value for name, value in entries.items()
            }
        return found


def refuse_newer(raw: Any) -> None:
    """Raise an error if a newer version of this package has written the value under `OUR_KEY`.

    Raises:
        UnsupportedError: a newer version has written it.
    """
    if isinstance(raw, dict) and isinstance(raw.get("version"), int) and raw["version"] > 1:
        raise UnsupportedError(f"was written by a newer vraxion_ckpt (version {raw['version']})", key=OUR_KEY)


def parse_extras(raw: Any) -> Extras:
    """Return the value under `OUR_KEY` as `Extras`.

    Raises:
        InconsistentError: the value is not valid.
        UnsupportedError: a newer version of this package has written it.
    """
    refuse_newer(raw)
    try:
        json.dumps(raw, allow_nan=False)
        return Extras.model_validate(raw)  # not `model_validate_json`, which rejects keys with lone surrogates
    except (TypeError, ValueError, OverflowError) as error:
        if not isinstance(error, ValidationError):
            raise InconsistentError("holds values that are not plain JSON", key=OUR_KEY) from error
        first = refusals(error, Extras)[0]
        raise InconsistentError(first.what, key=".".join(map(str, (OUR_KEY, *first.place)))) from None
