r"""Escape text from checkpoints, file names and plugins before it is shown.

Such text may hold characters that move the cursor of a terminal, reverse the direction of writing, or are invisible, so
that two names look equal. Each is shown as an escape sequence such as ``\u200b``. Imports without torch.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
# Invisible characters that `str.isprintable` accepts: fillers, joiners and variation selectors (the printable part of
# Unicode's Default_Ignorable_Code_Point), and the Braille blank.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)

_WITHOUT_TEXT = frozenset({int, float, bool, type(None)})
_HINT = "\n  → "  # precedes the hint in the text of an error


def printable(text: str) -> str:
    """Return a text with control, format, invisible and unassigned characters escaped, except line breaks."""
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    return "".join(character if character == "\n" else _escaped(character) for character in text)


def in_one_line(text: str) -> str:
    """Return a text as `printable` does, with line breaks escaped too."""
    return printable(text).replace("\n", _escaped("\n"))


def printable_facts(facts: _T) -> _T:
    """Return a value with each text in it escaped by `in_one_line`. Keep the line break before a hint.

    Parts without text to escape are not copied, as there may be thousands.
    """
    found: Any = facts
    if type(found) in _WITHOUT_TEXT:
        return facts
    if type(found) is str:
        found = _HINT.join(map(in_one_line, found.split(_HINT)))
    elif isinstance(found, Path):
        found = type(found)(in_one_line(str(found)))
    elif isinstance(found, dict):
        found = {printable_facts(key): printable_facts(value) for key, value in found.items()} or found
    elif type(found) in (list, tuple):
        found = type(found)(map(printable_facts, found))
    elif hasattr(type(found), "model_fields"):
        texts = {name: value for name, value in vars(found).items() if type(value) not in _WITHOUT_TEXT}
        escaped = {name: printable_facts(value) for name, value in texts.items()}
        if any(escaped[name] is not value for name, value in texts.items()):
            found = found.model_copy(update=escaped)
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        values = {field.name: printable_facts(getattr(found, field.name)) for field in dataclasses.fields(found)}
        found = dataclasses.replace(found, **values)
    return found  # type: ignore[no-any-return]


def _escaped(character: str) -> str:
    if character.isprintable() and not _INVISIBLE.match(character):
        return character
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
