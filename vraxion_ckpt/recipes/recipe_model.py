"""The data model of a recipe, and its JSON Schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from vraxion_ckpt.conversion.chain import NeighbourPolicy
from vraxion_ckpt.conversion.verify_before_write import LossPolicy
from vraxion_ckpt.experts.companion_updates import CompanionPolicy
from vraxion_ckpt.optimizer.inference import OptimizerOrder
from vraxion_ckpt.plugins.discovery import registry
from vraxion_ckpt.reading.opening import OptimizerPolicy

RECIPE_SCHEMA = "vraxion-ckpt/recipe/1"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_VARIABLE_SCHEMA = {"type": "string", "pattern": r"\$\{", "description": "a variable"}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True)


class Source(_Entry):
    """The checkpoint to read. A string is its path."""

    path: str
    from_: str | None = Field(None, alias="from", description="The format; detected from the content if not given.")
    param_names: tuple[str, ...] | None = None
    """The name of every optimizer parameter, in optimizer order."""
    optimizer_order: OptimizerOrder | None = None
    """How the trainer orders the parameters of each param group, if the file does not record it."""
    optimizer: OptimizerPolicy = "keep"
    allow_globals: tuple[str, ...] = ()
    """Full names of classes that the pickle may use in addition to plain data."""
    drop_keys: tuple[str, ...] = ()
    """Entries of the payload to leave out."""


class Output(_Entry):
    """A checkpoint to write. A string is its path."""

    path: str
    to: str | None = None
    """The format, ``NAME`` or ``NAME:key=value``; chosen by the name of the path if not given."""
    losses: LossPolicy | None = None
    """How to handle parts that the format cannot hold; the recipe's `losses` if not given."""
    overwrite: bool = False
    manifest: str | None = None
    """A file to write the digests of the written files to."""


def _kind(value: Any) -> str:
    return "entry" if isinstance(value, dict | _Entry) else "text"


_Source = Annotated[Annotated[str, Tag("text")] | Annotated[Source, Tag("entry")], Discriminator(_kind)]
_Output = Annotated[Annotated[str, Tag("text")] | Annotated[Output, Tag("entry")], Discriminator(_kind)]


class Recipe(_Entry):
    """A conversion in a file."""

    schema_: Literal["vraxion-ckpt/recipe/1"] | None = Field(
        None, alias="schema", description="Kind and version of the document."
    )
    vars: dict[str, Any] = {}
    """Variables and their defaults, which ``--set`` overrides. ``${name}`` in any text is replaced by the value."""
    source: _Source
    chain: tuple[Any, ...] = ()
    """Transforms, from left to right: ``NAME``, ``NAME:key=value``, or NAME with a mapping of its options."""
    targets: Annotated[tuple[_Output, ...], Field(min_length=1)]
    result_order: tuple[str, ...] | None = None
    """The names of all optimizer parameters of the results, in optimizer order, if no rule determines the order."""
    companions: CompanionPolicy = "grow"
    """How to handle companions, such as averages of the model, if the chain changes the head."""
    neighbours: NeighbourPolicy = "refuse"
    """How to handle files beside the weights that do not fit the model any more if the chain changes it."""
    losses: LossPolicy = "raise"
    """How to handle parts that a target's format cannot hold."""
    manifest: str | None = None
    """The manifest of the target, if there is only one."""


def mappings_with_key(key: str) -> list[str]:
    """Return the names of the parts of a recipe in which `key` is allowed."""
    entries: dict[str, type[_Entry]] = {"source": Source, "targets": Output, "the top level": Recipe}
    fields = {name: entry.model_fields.items() for name, entry in entries.items()}
    return [name for name, found in fields.items() if key in {field.alias or each for each, field in found}]


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a recipe, including the options of all installed transforms."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema.setdefault("$defs", {})
    for entry in (schema, definitions["Source"], definitions["Output"]):
        for name, value in entry["properties"].items():
            if "enum" in value or value.get("type") == "boolean" or "const" in str(value):
                entry["properties"][name] = {"anyOf": [value, _VARIABLE_SCHEMA]}
    scalars = {"type": ["string", "number", "boolean", "null"]}
    schema["properties"]["vars"]["additionalProperties"] = scalars
    steps: list[dict[str, Any]] = [{"type": "string", "description": "NAME or NAME:key=value,…"}]
    for name, offers in sorted(registry().transforms.items()):
        if len(offers) == 1:
            definitions[f"transform {name}"] = _options_schema(offers[0].plugin.model_json_schema())
            options = {"anyOf": [{"$ref": f"#/$defs/transform {name}"}, {"type": "null"}]}
            steps.append(
                {"type": "object", "properties": {name: options}, "required": [name], "additionalProperties": False}
            )
    schema["properties"]["chain"]["items"] = {"anyOf": steps}
    return {"$schema": _DIALECT, "$id": RECIPE_SCHEMA, **schema}


def _options_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Allow a string for every option: a variable, or the value as on the command line."""
    inner = {name: {"anyOf": [option, {"type": "string"}]} for name, option in schema.get("properties", {}).items()}
    return {**schema, "properties": inner}
