"""Read JSON strictly, and write it.

Unlike Python's parser, these functions reject duplicate keys, NaN and infinite numbers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from vraxion_ckpt.errors import CorruptError, InconsistentError, LimitError
from vraxion_ckpt.support import text_files

_LARGEST = 2**26  # bytes: enough for a hundred thousand experts or files
_MOST_VALUES = 5_000_000  # each takes much more memory than text; ``[]`` takes sixty bytes


def load_json(path: Path, *, most: int = _LARGEST) -> Any:
    """Read a JSON file of at most `most` bytes.

    Raises:
        UsageError: the file does not exist or is not a regular file.
        CorruptError: the file is not JSON, or not UTF-8.
        InconsistentError: the file has a duplicate key, or a number that is not finite or has thousands of digits.
        LimitError: the file is larger than `most`, is nested too deeply, or has more than five million values.
        StorageError: the file cannot be read.
    """
    try:
        return parse_json(text_files.read_text(path, most=most), path)
    except UnicodeDecodeError as error:
        raise CorruptError("is not UTF-8 text", path=path) from error


def parse_json(text: str | bytes, path: Path | None = None) -> Any:
    """Parse JSON that is given as text or as UTF-8 bytes. Errors name `path`.

    Raises:
        CorruptError: see `load_json`.
        InconsistentError: see `load_json`.
        LimitError: see `load_json`.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise CorruptError("is not UTF-8 text", path=path) from error
    if sum(map(text.count, "[{,")) > _MOST_VALUES:
        raise LimitError(f"holds more than {_MOST_VALUES} values", path=path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise InconsistentError("the key occurs twice", path=path, key=twice)
        return found

    def refuse(constant: str) -> NoReturn:
        raise InconsistentError(f"{constant} is not a JSON number", path=path)

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            refuse(number)
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise CorruptError(f"is not JSON: {where}: {error.msg}", path=path) from error
    except ValueError as error:  # an integer with thousands of digits
        raise InconsistentError("has a number with thousands of digits", path=path) from error
    except RecursionError as error:
        raise LimitError("is nested too deeply", path=path) from error


def dump_json(value: Any) -> bytes:
    """Return JSON as it is written everywhere: indented by two, keys in the given order.

    Raises:
        ValueError: a number is not finite.
    """
    return _indented(value, 0).encode()


_SCALARS = frozenset({str, int, float, bool, type(None)})


def _indented(value: Any, depth: int) -> str:
    """Return the text of ``json.dumps(value, indent=2)``, which itself takes six times as long.

    Encoded strings contain no line break, so every line break in a text is one that an encoder put between entries.
    """
    if not isinstance(value, dict | list | tuple) or not value:
        return _encoder(depth).encode(value)
    outer, inner, innermost = ("\n" + "  " * level for level in range(depth, depth + 3))
    entries = value.values() if isinstance(value, dict) else value
    if _is_flat(value):
        text = _encoder(depth).encode(value)[1:-1]
    elif not isinstance(value, dict) and all(isinstance(entry, dict) and _is_flat(entry) for entry in entries):
        rows = _encoder(depth + 1).encode(value)[2:-2]
        rows = rows.replace(f"}},{innermost}{{", f"{inner}}},{inner}{{{innermost}")
        text = f"{{{innermost}{rows}{inner}}}"
    else:
        texts = [_indented(entry, depth + 1) for entry in entries]
        if isinstance(value, dict):
            keys = [_encoder(depth).encode({key: None}).removesuffix(": null}")[1:] for key in value]
            texts = [f"{key}: {text}" for key, text in zip(keys, texts, strict=True)]
        text = f",{inner}".join(texts)
    first, last = "{}" if isinstance(value, dict) else "[]"
    return f"{first}{inner}{text}{outer}{last}"


def _is_flat(value: Collection[Any]) -> bool:
    """Return whether a list or dict has entries, and only such that contain no others."""
    entries = value.values() if isinstance(value, dict) else value
    return bool(value) and _SCALARS.issuperset(map(type, entries))


@lru_cache
def _encoder(depth: int) -> json.JSONEncoder:
    """Return an encoder that puts each entry of a flat list or dict on its own line."""
    return json.JSONEncoder(allow_nan=False, separators=(",\n" + "  " * (depth + 1), ": "))
