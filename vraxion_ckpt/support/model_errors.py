"""Pydantic's validation errors in the wording of this project."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vraxion_ckpt.wording import did_you_mean, listed, plural

# Messages by pydantic's error type. The context of the error fills in the fields in braces.
_WORDS = {
    "missing": "is required",
    "string_type": "must be text",
    "path_type": "must be a path",
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "model_type", "dataclass_type"), "must be a mapping"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    "finite_number": "must be a finite number",
    **dict.fromkeys(("literal_error", "enum"), "must be {expected}"),
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    **dict.fromkeys(("value_error", "assertion_error"), "{error}"),
}


@dataclass(frozen=True)
class Refusal:
    """One invalid entry of some data.

    Attributes:
        place: the keys and indices that lead to the entry.
        kind: pydantic's error type.
        what: what is wrong with the entry.
        given: the value of the entry.
    """

    place: tuple[str | int, ...]
    kind: str
    what: str
    given: Any

    @property
    def key(self) -> str:
        """The place as text, like ``chain.1.seed``."""
        return ".".join(map(str, self.place))


def refusals(error: ValidationError, model: type[BaseModel], noun: str = "entry") -> list[Refusal]:
    """Return the invalid entries that a validation error lists.

    Args:
        error: the error that pydantic raised.
        model: the model against which the data was validated.
        noun: the name of an entry in messages, such as "option".
    """
    found = []
    for each in error.errors(include_url=False):
        place, kind = each["loc"], each["type"]
        if kind == "extra_forbidden":
            name, names = str(place[-1]), _names_at(model, place[:-1])
            near = did_you_mean(name, names)
            what = f"unknown {noun} {name!r}" + (f", {near}" if near else f" ({plural(noun)}: {listed(names, 20)})")
        elif kind in _WORDS:
            what = _WORDS[kind].format(**each.get("ctx", {}))
        else:  # one of the other hundred error types of pydantic
            what = each["msg"]
        found.append(Refusal(place, kind, what, each["input"]))
    return found


def _names_at(model: type[BaseModel], place: tuple[str | int, ...]) -> list[str]:
    """Return the field names at a place. Parts of the place that are not fields, such as indices, are skipped."""
    models = [model]
    for part in place:
        fields = [field for each in models for name, field in each.model_fields.items() if part in (name, field.alias)]
        models = [inner for field in fields for inner in _models_in(field.annotation)] if fields else models
    return [field.alias or name for each in models for name, field in each.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
