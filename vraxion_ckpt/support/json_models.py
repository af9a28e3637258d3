"""What commands print with ``--json``: models that are their own documented, versioned JSON Schema.

A new entry does not change the version; one that goes, or means something else, does.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer, WithJsonSchema

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _as_json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


# A number that may be infinite, or not one: JSON has no sign for those, so they are the texts inf, -inf and nan.
Number = Annotated[
    float,
    PlainSerializer(_as_json_number, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}),
]


def _as_plain(value: Any) -> Any:
    """Return a value of a checkpoint as JSON-like data: tensors in words, numbers that JSON does not know as text."""
    if isinstance(value, float):
        return _as_json_number(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): _as_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_plain(entry) for entry in value]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return value.item() if value.ndim == 0 else f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
    return str(value)


# Any value that stands in a checkpoint.
Plain = Annotated[Any, PlainSerializer(_as_plain, when_used="json")]


class Fact(BaseModel):
    """A part of what is printed; the text below each field describes it in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)


class Facts(Fact):
    """All that a command prints; ``schema`` names its kind and version."""

    kind_of_facts: ClassVar[str]
    schema_version: ClassVar[int] = 1

    @classmethod
    def schema_name(cls) -> str:
        """Return what stands under ``schema`` in the JSON."""
        return f"vraxion-ckpt/{cls.kind_of_facts}/{cls.schema_version}"

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints, as plain data."""
        return {"schema": self.schema_name(), **self.model_dump(mode="json")}

    @classmethod
    def published_schema(cls, mode: Literal["serialization", "validation"] = "serialization") -> dict[str, Any]:
        """Return the JSON Schema (2020-12) of `as_json`."""
        schema = cls.model_json_schema(mode=mode)
        name = {"const": cls.schema_name(), "description": "Kind and version of this document."}
        return {
            "$schema": _DIALECT,
            "$id": cls.schema_name(),
            **schema,
            "properties": {"schema": name, **schema.get("properties", {})},
            "required": ["schema", *schema.get("required", [])],
        }
