"""Numbers, plurals and lists in messages. Imports without torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from itertools import islice


def plural(noun: str) -> str:
    """Return the plural of a regular English noun."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def count(number: int, noun: str) -> str:
    """Return a number with its noun, like ``1 address`` or ``4,096 addresses``."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def listed(items: Collection[object], most: int = 8, separator: str = ", ") -> str:
    """Return the first `most` items as text. If there are more, append an ellipsis and the total number."""
    shown = separator.join(map(str, islice(items, most)))
    return shown if len(items) <= most else f"{shown}{separator}… ({len(items):,} in all)"


def numbered(noun: str, ids: Collection[object], most: int = 8) -> str:
    """Return a noun with ids, like ``expert 3`` or ``experts 1, 2, 5``."""
    return f"{noun if len(ids) == 1 else plural(noun)} {listed(ids, most)}"


def shortened(text: str, most: int) -> str:
    """Return the first `most` characters of a text. If there are more, append an ellipsis."""
    return text if len(text) <= most else f"{text[:most]}…"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question like ``did you mean 'noise'?`` with the most similar name; empty if none is similar."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else ""
