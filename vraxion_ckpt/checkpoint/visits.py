"""Read visit counts of ring addresses from JSON, ``.npy`` or CSV files."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from vraxion_ckpt.checkpoint.ring import Visits, Weights, as_weights
from vraxion_ckpt.errors import CkptError, CorruptError, InconsistentError, StorageError, raise_if_out_of_memory
from vraxion_ckpt.support import json_files, text_files
from vraxion_ckpt.wording import count


def load_visits(path: Path, ring_len: int) -> Visits:
    """Read the visit counts of a ring, and the summed losses if the file has them.

    A JSON file is a list, or an object with ``visits`` and optionally ``loss_sum``. An ``.npy`` file is a flat array.
    A CSV file has the header ``address,visits[,loss_sum]`` and one row for each address, in any order.

    Args:
        path: the file. Its suffix selects the format: ``.npy``, ``.csv``, or any other for JSON.
        ring_len: number of ring addresses. The file must have one value for each.

    Raises:
        UsageError: the file does not exist or is not a regular file.
        LimitError: the file is far too large for `ring_len` values.
        CorruptError: the file cannot be parsed.
        InconsistentError: the number of values is wrong, or values are negative, not finite or all zero.
        StorageError: the file cannot be read.
    """
    readers = {".npy": _read_npy, ".csv": _read_csv}
    try:
        columns = readers.get(path.suffix.lower(), _read_json)(path, ring_len)
    except OSError as error:
        raise StorageError.from_os_error(error, path) from error
    visits = _weights(columns["visits"], "visits", ring_len, path)
    losses = columns.get("loss_sum")
    return Visits(visits, _weights(losses, "loss_sum", ring_len, path) if losses is not None else None)


def _most_bytes(ring_len: int) -> int:
    """Return the size limit of a file in bytes: two long numbers for each address, and 64 MiB for other entries."""
    return 2**26 + 256 * ring_len


def _weights(values: Any, key: str, ring_len: int, path: Path) -> Weights:
    number = values.size if isinstance(values, np.ndarray) else len(values)  # checked before the array is allocated
    if number != ring_len:
        message = f"has {count(number, 'value')}, but the ring has {count(ring_len, 'address')}"
        raise InconsistentError(message, path=path, key=key)
    try:
        return as_weights(values)
    except ValueError as error:
        raise InconsistentError(str(error), path=path, key=key) from None


def _read_json(path: Path, ring_len: int) -> dict[str, Any]:
    data = json_files.load_json(path, most=_most_bytes(ring_len))
    if isinstance(data, list):
        data = {"visits": data}
    if not isinstance(data, dict) or "visits" not in data:
        raise InconsistentError("must be a list, or an object with `visits`", path=path)
    for key in ("visits", "loss_sum"):
        values = data.get(key, [])
        if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
            raise InconsistentError("must be a list of numbers", path=path, key=key)
    return data


def _read_npy(path: Path, ring_len: int) -> dict[str, Any]:
    try:
        with text_files.opened(path, most=_most_bytes(ring_len)):
            return {"visits": np.lib.format.open_memmap(path, mode="r")}
    except (CkptError, OSError):
        raise
    except Exception as error:  # a damaged header can raise anything
        raise_if_out_of_memory(error, path)
        raise CorruptError(f"is not a plain .npy array: {error}", path=path) from error


def _read_csv(path: Path, ring_len: int) -> dict[str, Any]:
    try:
        text = text_files.read_text(path, most=_most_bytes(ring_len), encoding="utf-8-sig")
        with io.StringIO(text, newline="") as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            if header not in (["address", "visits"], ["address", "visits", "loss_sum"]):
                raise InconsistentError("must have the first line address,visits[,loss_sum]", path=path)
            columns = {name: np.zeros(ring_len, dtype=np.float64) for name in header[1:]}
            seen = np.zeros(ring_len, dtype=bool)
            for row in rows:
                if row:
                    _take_row(row, header, columns, seen, f"line {rows.line_num}", path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise CorruptError(f"is not CSV text: {error}", path=path) from error
    if not seen.all():
        raise InconsistentError(f"has no row for address {int(np.argmin(seen))}", path=path)
    return dict(columns)


def _take_row(row: list[str], header: list[str], columns: dict[str, Any], seen: Any, line: str, path: Path) -> None:
    if len(row) != len(header):
        raise InconsistentError(f"has {count(len(row), 'field')}, the header has {len(header)}", path=path, key=line)
    try:
        address, values = int(row[0]), [float(value) for value in row[1:]]
    except ValueError:
        raise InconsistentError(f"must hold only numbers, not {','.join(row)}", path=path, key=line) from None
    if not 0 <= address < len(seen) or seen[address]:
        raise InconsistentError(f"has address {address}, which is off the ring or occurs twice", path=path, key=line)
    seen[address] = True
    for name, value in zip(header[1:], values, strict=True):
        columns[name][address] = value
