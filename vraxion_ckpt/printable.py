r"""Text from checkpoints, file names and plugins, made safe to show: what cannot be seen is spelt out.

A name may hold characters that move a terminal's cursor, turn the direction of writing round, or are invisible, so that
two names look the same. Each is shown as its number, like ``\u200b``. Imports nothing of torch.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
# Invisible although Python calls them printable: fillers, joiners and selectors of variants. (Unicode's
# Default_Ignorable_Code_Point, without what is unprintable anyway; and the blank of Braille.)
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)

_HINT = "\n  → "  # what stands before the hint in the text of an error


def printable(text: str) -> str:
    """Return a text with every control, format, invisible or unassigned character spelt out, but for line ends."""
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    return "".join(letter if letter == "\n" else _spelt(letter) for letter in text)


def in_one_line(text: str) -> str:
    """Return a text as `printable` does, line ends spelt out too: a name cannot look like a line of ours."""
    return printable(text).replace("\n", _spelt("\n"))


def printable_facts(facts: _T) -> _T:
    """Return facts, or anything inside them, with every text as `in_one_line` has it, but for the hint of an error."""
    found: Any = facts
    if type(found) is str:
        found = _HINT.join(map(in_one_line, found.split(_HINT)))
    elif isinstance(found, Path):
        found = type(found)(in_one_line(str(found)))
    elif isinstance(found, dict):
        found = {printable_facts(key): printable_facts(value) for key, value in found.items()}
    elif type(found) in (list, tuple):
        found = type(found)(map(printable_facts, found))
    elif fields := getattr(type(found), "model_fields", None):
        found = found.model_copy(update={name: printable_facts(getattr(found, name)) for name in fields})
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        values = {field.name: printable_facts(getattr(found, field.name)) for field in dataclasses.fields(found)}
        found = dataclasses.replace(found, **values)
    return found  # type: ignore[no-any-return]


def _spelt(letter: str) -> str:
    if letter.isprintable() and not _INVISIBLE.match(letter):
        return letter
    number = ord(letter)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
