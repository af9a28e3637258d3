"""Numbers, plurals and lists in messages. Imports nothing of torch."""

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
    """Return a number of things, like ``1 address`` or ``4,096 addresses``."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def listed(items: Collection[object], most: int = 8, separator: str = ", ") -> str:
    """Return the first few of some things, and how many there are if that is not all of them."""
    shown = separator.join(map(str, islice(items, most)))
    return shown if len(items) <= most else f"{shown}{separator}… ({len(items):,} in all)"


def numbered(noun: str, ids: Collection[object], most: int = 8) -> str:
    """Return things that are named by numbers, like ``expert 3`` or ``experts 1, 2, 5``."""
    return f"{noun if len(ids) == 1 else plural(noun)} {listed(ids, most)}"


def shortened(text: str, most: int) -> str:
    """Return the beginning of a text, with an ellipsis if that is not all of it."""
    return text if len(text) <= most else f"{text[:most]}…"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question for the name that was probably meant, like ``did you mean 'noise'?``; empty if none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else ""
