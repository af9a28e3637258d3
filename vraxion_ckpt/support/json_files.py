"""JSON as we read it, strictly, and as we write it.

Python's parser lets the last of two equal keys win and accepts NaN; a file that holds either is refused here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from vraxion_ckpt.errors import CorruptError, InconsistentError, LimitError
from vraxion_ckpt.support import text_files

_LARGEST = 2**26  # bytes: rows of a hundred thousand experts, or the digests of as many files
_MOST_VALUES = 5_000_000  # an empty list of two letters takes sixty bytes of memory


def load_json(path: Path, *, most: int = _LARGEST) -> Any:
    """Read a JSON file of at most `most` bytes.

    Raises:
        UsageError: there is no such file, or it is not a regular one.
        CorruptError: not JSON, or not UTF-8.
        InconsistentError: a duplicate key, or a number that is not finite.
        LimitError: larger, or nested too deeply.
        StorageError: the file cannot be read.
    """
    try:
        return parse_json(text_files.read_text(path, most=most), path)
    except UnicodeDecodeError as error:
        raise CorruptError("is not UTF-8 text", path=path) from error


def parse_json(text: str | bytes, path: Path | None = None) -> Any:
    """Parse JSON text, or its bytes; `path` is named in errors.

    Raises:
        CkptError: as for `load_json`; LimitError also for more than five million values.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise CorruptError("is not UTF-8 text", path=path) from error
    if sum(map(text.count, "[{,")) > _MOST_VALUES:
        raise LimitError(f"holds more than {_MOST_VALUES} values", path=path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InconsistentError("the key occurs twice", path=path, key=key)
            found[key] = value
        return found

    def refuse(constant: str) -> NoReturn:
        raise InconsistentError(f"{constant} is no JSON number", path=path)

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
    except ValueError as error:  # an integer of thousands of digits
        raise InconsistentError("holds a whole number of thousands of digits", path=path) from error
    except RecursionError as error:
        raise LimitError("is nested too deeply", path=path) from error


def dump_json(value: Any) -> bytes:
    """Write JSON as VRAXION's tools do: indented by two, keys in the order given."""
    return json.dumps(value, indent=2, allow_nan=False).encode()
