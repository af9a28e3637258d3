"""The base class of plugins, whose fields are options, and the text form ``NAME:key=value,key=value``.

The declaration of a field defines its validation, command-line syntax, `describe` entry and JSON Schema. In text, a
list is written ``[1,3,8-15]``. A value that contains a comma or a bracket must be in double quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from vraxion_ckpt.errors import OptionError, PluginError, StorageError, UsageError
from vraxion_ckpt.plugins.plugin_calls import defect, distribution_of, plugin_call
from vraxion_ckpt.support.model_errors import Refusal, refusals

_MOST_LISTED = 10_000_000  # numbers; ranges are expanded, and [0-99999999999] would exhaust memory


class Plugin(BaseModel):
    """Base of adapters and transforms: a named class with options.

    Subclasses set `name` and declare options as fields. The first line of their docstring is shown to users.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the class's docstring."""
        return (cls.__doc__ or "").strip().split("\n", 1)[0]


_P = TypeVar("_P", bound=Plugin)


def calling(plugin: Plugin | type[Plugin]) -> AbstractContextManager[None]:
    """Return the context manager `plugin_call` for a plugin or its class."""
    return plugin_call(plugin.name, partial(distribution_of, _class_of(plugin)))


def defect_of(plugin: Plugin | type[Plugin], message: str) -> PluginError:
    """Return a `PluginError` that names a plugin and its distribution."""
    return defect(message, plugin.name, partial(distribution_of, _class_of(plugin)))


def _class_of(plugin: Plugin | type[Plugin]) -> type[Plugin]:
    return plugin if isinstance(plugin, type) else type(plugin)


def expand_ranges(value: Any) -> Any:
    """Turn a list in text form, such as ``[1,3,8-15]``, into a list of numbers. Return other types unchanged.

    Raises:
        ValueError: an entry is neither a number nor a range, a range runs backwards, or the list has more than ten
            million numbers.
    """
    if isinstance(value, list | tuple) and any(isinstance(entry, str) for entry in value):
        value = f"[{','.join(map(str, value))}]"  # a list in a recipe, with ranges
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError("a list is written [1,3,8-15]")
    numbers: list[int] = []
    for entry in filter(None, (part.strip() for part in text[1:-1].split(","))):
        found = re.fullmatch(r"(-?\d{1,18})(?:-(\d{1,18}))?", entry)
        if not found:
            raise ValueError(f"{entry!r} is neither a number nor a range like 8-15")
        first = int(found[1])
        last = int(found[2]) if found[2] else first
        if last < first:
            raise ValueError(f"the range {entry} runs backwards")
        if last - first + len(numbers) > _MOST_LISTED:
            raise ValueError(f"the list has more than {_MOST_LISTED:,} numbers")
        numbers.extend(range(first, last + 1))
    return numbers


IntList = Annotated[tuple[int, ...], BeforeValidator(expand_ranges)]


def parse_call(text: str) -> tuple[str, dict[str, str]]:
    """Split ``NAME:key=value,key=value`` into the name and the options, whose values stay text.

    Raises:
        UsageError: the name is missing, an option has no ``=`` or is given twice, or a bracket or quote is not closed.
    """
    name, _, rest = text.partition(":")
    options: dict[str, str] = {}
    if not name.strip():
        raise UsageError(f"no name in {text!r}", hint="write NAME or NAME:key=value,key=value")
    for item in _split_at_commas(rest, text):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"{item!r} in {text!r} is not key=value", hint="write NAME:key=value,key=value")
        if key in options:
            raise UsageError(f"option {key} is given twice in {text!r}")
        options[key] = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
    return name.strip(), options


def _split_at_commas(text: str, whole: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    items, current, in_list, quoted = [], "", False, False
    for char in text:
        if char == '"':
            quoted = not quoted
        elif not quoted and char in "[]":
            if in_list == (char == "["):
                raise UsageError(f"brackets do not match in {whole!r}")
            in_list = char == "["
        if char == "," and not in_list and not quoted:
            items.append(current)
            current = ""
        else:
            current += char
    if in_list or quoted:
        raise UsageError(f"a {'bracket' if in_list else 'quote'} is left open in {whole!r}")
    return [item for item in [*items, current] if item.strip()]


def configure(plugin: type[_P], options: Mapping[str, Any]) -> _P:
    """Validate options and return the configured plugin.

    Raises:
        OptionError: options are unknown, missing or of the wrong type. The message lists all of them.
        PluginError: a validator of the plugin raises an error other than `ValueError`.
        StorageError: a validator of the plugin raises an `OSError`.
    """
    wrong = problems_with(plugin, options)
    if wrong:
        listed = "; ".join(what for _, what in wrong)
        raise OptionError(listed, key=plugin.name, hint=f"see `vraxion-ckpt describe {plugin.name}`")
    return _validated(plugin, options)


def problems_with(plugin: type[Plugin], options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the name and a description of the problem for each unknown, missing or wrong option."""
    try:
        _validated(plugin, options)
    except ValidationError as error:
        return [_explain(refusal) for refusal in refusals(error, plugin, "option")]
    return []


def _validated(plugin: type[_P], options: Mapping[str, Any]) -> _P:
    """Run a plugin's validators. A `ValidationError` is raised unchanged."""
    refused = None
    try:
        with calling(plugin):
            try:
                return plugin.model_validate(dict(options))
            except ValidationError as error:
                refused = error
    except OSError as error:
        raise StorageError.from_os_error(error, error.filename or plugin.name) from error
    raise refused


def _explain(refusal: Refusal) -> tuple[str, str]:
    option = str(refusal.place[0]) if refusal.place else ""
    if refusal.kind == "extra_forbidden" or not refusal.place:
        return option, refusal.what
    if refusal.kind == "missing":
        return option, f"option {refusal.key!r} is required"
    given = (
        "" if refusal.kind == "value_error" else f", not {refusal.given!r}"
    )  # the text of a validator may quote the value itself
    return option, f"option {refusal.key!r}: {refusal.what}{given}"


def recorded_options(plugin: Plugin) -> dict[str, Any]:
    """Return every option with its value as JSON, for a checkpoint's history."""
    with calling(plugin):
        options = plugin.model_dump(mode="json")
        if not isinstance(options, dict):
            raise defect_of(plugin, f"model_dump returned a {type(options).__name__}, not a dict")
        json.dumps(options)
    return options
