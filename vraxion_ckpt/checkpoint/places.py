"""Look up and replace values in nested containers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

MISSING = object()


def value_at(root: Any, place: Sequence[str | int]) -> Any:
    """Return the value that is reached by following keys and indexes, or `MISSING`."""
    for key in place:
        try:
            root = root[key]
        except (KeyError, IndexError, TypeError):
            return MISSING
    return root


def with_value_at(root: Any, place: Sequence[str | int], value: Any) -> Any:
    """Return nested containers with one value replaced. Containers on the path to it are copied, others are shared."""
    if not place:
        return value
    first, rest = place[0], place[1:]
    inner = with_value_at(root[first], rest, value) if rest else value
    if isinstance(root, dict):
        new = copy.copy(root)
        new[first] = inner
        return new
    return type(root)([inner if i == first else entry for i, entry in enumerate(root)])
