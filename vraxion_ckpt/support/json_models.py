"""Base classes of the models that commands print with ``--json``, and of their versioned JSON Schemas.

Adding a field keeps the version. Removing a field, or changing its meaning, needs a new version.
"""

from __future__ import annotations

import ast
import inspect
import math
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, PlainSerializer, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _as_json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


# A number that may be infinite or NaN. JSON has no such numbers, so they are written as "inf", "-inf" and "nan".
Number = Annotated[
    float,
    PlainSerializer(_as_json_number, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}),
]


def _as_plain(value: Any) -> Any:
    """Return a value of a checkpoint as JSON data: a scalar tensor as a number, other tensors as dtype and shape."""
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


# Any value of a checkpoint.
Plain = Annotated[Any, PlainSerializer(_as_plain, when_used="json")]


class Fact(BaseModel):
    """A part of the output of a command. The docstring of each field is its description in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Add the descriptions. With ``use_attribute_docstrings``, every command would read the source for them."""
        found = handler(schema)
        fields = handler.resolve_ref_schema(found)["properties"]
        for kind in cls.__mro__:
            if kind is not BaseModel and issubclass(kind, BaseModel):
                for name, text in _attribute_docstrings(kind).items():
                    fields[name].setdefault("description", text)
        return found


def _attribute_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings of the fields that a class defines, by name."""
    (definition,) = ast.parse(dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(doc.value.value)
        for field, doc in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }


class Facts(Fact):
    """The whole output of a command. Its entry ``schema`` names the kind and the version of the output."""

    kind_of_facts: ClassVar[str]
    schema_version: ClassVar[int] = 1

    @classmethod
    def schema_name(cls) -> str:
        """Return the value of the entry ``schema``, such as ``vraxion-ckpt/inspect/1``."""
        return f"vraxion-ckpt/{cls.kind_of_facts}/{cls.schema_version}"

    def as_json(self) -> dict[str, Any]:
        """Return the output of ``--json`` as plain data."""
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
