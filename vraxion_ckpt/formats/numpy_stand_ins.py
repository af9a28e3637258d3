"""Stand-ins for the functions of numpy that a pickle may name if the user allows it. numpy itself is never called.

They make `NumpyArray`s and `NumpyNumber`s, whose bytes the pickle holds.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from vraxion_ckpt.checkpoint.foreign_values import NumpyArray, NumpyNumber, numpy_itemsize
from vraxion_ckpt.checkpoint.plain_data import NotPlain

_DATES = ("m", "M")


@dataclass(frozen=True, eq=False)
class _Dtype(NotPlain):
    """A stand-in for a numpy dtype.

    Attributes:
        code: the kind and size of the elements, such as ``f8``.
        text: numpy's text for the whole dtype, or what is not carried if `problem`.
    """

    description: str = "is a numpy dtype"
    code: str = ""
    text: str = ""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) not in (8, 9) or type(state[1]) is not str:
            raise pickle.UnpicklingError("a numpy dtype with an unknown state")
        _, endian, *inner = state[:5]
        units = "" if len(state) == 8 else _date_units(state[8]) if self.code[:1] in _DATES else "?"
        # Records and arrays of arrays have inner dtypes; their text would not be complete.
        text = "" if any(part is not None for part in inner) else f"{endian}{self.code}{units}"
        vars(self)["text"] = text

    @property
    def problem(self) -> str | None:
        """What elements of this dtype are, if they are not carried."""
        try:
            numpy_itemsize(self.text)
        except ValueError:
            return {"O": "objects", "V": "records"}.get(self.code[:1], f"dtype {self.code!r:.40}")
        return None


def _date_units(metadata: Any) -> str:
    """Return the unit of dates or durations as text, such as ``[25s]``, or an impossible one if it is not carried."""
    attributes, units = metadata if type(metadata) is tuple and len(metadata) == 2 else (True, None)
    if attributes or type(units) is not tuple or len(units) != 4 or type(units[0]) is not bytes:
        return "?"
    unit, number, *others = units
    if type(number) is not int or others != [1, 1]:
        return "?"
    return "" if unit == b"generic" else f"[{number if number != 1 else ''}{unit.decode('ascii', 'replace')}]"


def _dtype(*args: Any) -> _Dtype:
    if len(args) != 3 or type(args[0]) is not str:
        raise pickle.UnpicklingError("a numpy dtype with unknown arguments")
    return _Dtype(code=args[0])


@dataclass(frozen=True, eq=False)
class _NewArray(NotPlain):
    """An array of numpy that gets its shape and bytes later in the pickle. Then it becomes a `NumpyArray`.

    Attributes:
        count: counts the bytes that are copied when the array is written.
    """

    count: Callable[[bytes], None]

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5 or type(state[2]) is not _Dtype or type(state[1]) is not tuple:
            raise pickle.UnpicklingError("a numpy array with an unknown state")
        _, shape, dtype, fortran, data = state
        if dtype.problem is not None:
            vars(self)["description"] = f"is a numpy array of {dtype.problem}"
            return
        if type(data) is not bytes:
            raise pickle.UnpicklingError("a numpy array without bytes")
        self.count(data)
        made = NumpyArray(dtype.text, shape, fortran, data)
        vars(self).clear()
        # The memo of the unpickler has this object, so it cannot be replaced by another.
        object.__setattr__(self, "__class__", NumpyArray)
        vars(self).update(vars(made))


def _array(count: Callable[[bytes], None], kind: Any, *_: Any) -> NotPlain:
    if kind is not _ARRAY_CLASS:
        return NotPlain("is a subclass of a numpy array")
    return _NewArray("is an incomplete numpy array", count)


def _number(count: Callable[[bytes], None], dtype: Any, data: Any) -> NumpyNumber | NotPlain:
    if type(dtype) is not _Dtype:
        raise pickle.UnpicklingError("a numpy number without a dtype")
    if dtype.problem is not None or dtype.text.startswith(">"):
        return NotPlain(f"is a numpy number of {dtype.problem or f'dtype {dtype.text}'}")
    if type(data) is not bytes:
        raise pickle.UnpicklingError("a numpy number without bytes")
    count(data)
    return NumpyNumber(dtype.text, data)


_ARRAY_CLASS = NotPlain("is a class of numpy")
_MODULES = ("numpy._core.multiarray", "numpy.core.multiarray")  # of numpy 2 and 1
# Names of functions whose results get a state after they are made.
WITH_STATE = frozenset({"numpy.dtype", *(f"{module}._reconstruct" for module in _MODULES)})
NUMPY_NAMES = WITH_STATE | {"numpy.ndarray", *(f"{module}.scalar" for module in _MODULES)}


def numpy_stand_ins(count: Callable[[bytes], None]) -> dict[str, Any]:
    """Return the stand-ins for `NUMPY_NAMES`; `count` counts the bytes that they take from the pickle."""
    return {
        "numpy.dtype": _dtype,
        "numpy.ndarray": _ARRAY_CLASS,
        **{f"{module}._reconstruct": partial(_array, count) for module in _MODULES},
        **{f"{module}.scalar": partial(_number, count) for module in _MODULES},
    }
