"""What pydantic refuses, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vraxion_ckpt.wording import did_you_mean, listed, plural

# By pydantic's types of errors; what stands in braces is in their context.
_WORDS = {
    "missing": "is required",
    "string_type": "must be a text",
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
    """One entry of some data that a model refuses.

    Attributes:
        place: the keys and numbers that lead to it.
        kind: pydantic's type of the error.
        what: what is wrong with it.
        given: what stands there.
    """

    place: tuple[str | int, ...]
    kind: str
    what: str
    given: Any

    @property
    def key(self) -> str:
        """The place as text."""
        return ".".join(map(str, self.place))


def refusals(error: ValidationError, model: type[BaseModel], noun: str = "entry") -> list[Refusal]:
    """Return everything that a model refuses in some data.

    Args:
        error: as pydantic raised it.
        model: the model.
        noun: what an entry is called.
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
        else:  # pydantic has a hundred types; of others than these, its own words must do
            what = each["msg"]
        found.append(Refusal(place, kind, what, each["input"]))
    return found


def _names_at(model: type[BaseModel], place: tuple[str | int, ...]) -> list[str]:
    """Return the entries that the models at a place know; a part of it that is no entry, like a number, is skipped."""
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
