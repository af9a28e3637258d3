"""Values of torch and numpy that are not tensors, held without either library.

A checkpoint holds a stand-in for each `torch.dtype`, `torch.device`, `torch.layout`, quantisation scheme, numpy array
and numpy number until somebody looks at it, as it holds a reference for each tensor. Imports without torch and numpy.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NoReturn

from vraxion_ckpt.checkpoint.references import ITEMSIZES
from vraxion_ckpt.errors import UnsupportedError

_NUMBERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)]
_SCHEMES = [f"per_{what}" for what in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric")]
# The names, without ``torch.``, of the values of torch that are carried. Those of devices may have an index.
TORCH_NAMES: dict[str, frozenset[str]] = {
    "dtype": frozenset({*ITEMSIZES, *_NUMBERS, "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"}),
    "device": frozenset(
        [
            *("cpu", "cuda", "ipu", "xpu", "mkldnn", "opengl", "opencl", "ideep", "hip", "ve", "fpga", "maia", "xla"),
            *("lazy", "vulkan", "mps", "meta", "hpu", "mtia", "privateuseone"),
        ]
    ),
    "layout": frozenset(
        ["strided", "jagged", "_mkldnn", *(f"sparse_{kind}" for kind in ("coo", "csr", "csc", "bsr", "bsc"))]
    ),
    "qscheme": frozenset([*_SCHEMES, "per_channel_affine_float_qparams"]),
}
_INDEX = re.compile(r":(\d|[1-9]\d|1[01]\d|12[0-7])$")
# Booleans, integers, floats, complex numbers, bytes, text, dates and durations. Not objects and records, and not long
# doubles, whose bytes differ between machines and are not all defined.
_NUMPY_DTYPE = re.compile(
    r"\|[biu]1|[<>]([iu][248]|f[248]|c(8|16)|U\d{1,9}|[mM]8(\[\d{0,9}([YMWDhms]|[munpfa]s)\])?)|\|S\d{1,9}", re.ASCII
)
_MOST_DIMENSIONS = 32  # the limit of the oldest numpy that is supported
_MOST_ELEMENTS = 2**48  # an empty dimension counts as 1


class TorchSize(tuple[int, ...]):
    """A stand-in for a `torch.Size`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"torch.Size({list(self)})"


@dataclass(frozen=True)
class TorchValue:
    """A stand-in for a value of torch.

    Attributes:
        kind: ``dtype``, ``device``, ``layout`` or ``qscheme``.
        text: its text without ``torch.``, such as ``float32`` or ``cuda:0``.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        name = _INDEX.sub("", self.text) if self.kind == "device" else self.text
        if name not in TORCH_NAMES[self.kind]:
            raise ValueError(f"torch has no {self.kind} {self.text!r:.60}")

    def original(self) -> Any:
        """Return the value of torch.

        Raises:
            UnsupportedError: this version of torch does not have it.
        """
        import torch

        if self.kind == "device":
            return torch.device(self.text)
        value = getattr(torch, self.text, None)
        if value is None:
            raise UnsupportedError(f"this version of torch has no torch.{self.text}")
        return value

    def __str__(self) -> str:
        return self.text if self.kind == "device" else f"torch.{self.text}"


@dataclass(frozen=True)
class NumpyNumber:
    """A stand-in for a scalar of numpy: a number, text, bytes, a date or a duration.

    Attributes:
        dtype: numpy's text for the dtype, such as ``<f8``. Not big-endian, because numpy's scalars are not.
        data: the bytes.
    """

    dtype: str
    data: bytes

    def __post_init__(self) -> None:
        size = numpy_itemsize(self.dtype)
        if self.dtype.startswith(">") or len(self.data) != size or (self.dtype == "|b1" and self.data > b"\1"):
            raise ValueError(f"a numpy {self.dtype} has {size} bytes in the order of the machine")
        if self.dtype[1] == "U":
            self.data.decode("utf-32-le", "surrogatepass")

    def original(self) -> Any:
        """Return the scalar of numpy."""
        import numpy

        if self.dtype[1] == "S":
            return numpy.bytes_(self.data)
        if self.dtype[1] == "U":
            return numpy.str_(self.data.decode("utf-32-le", "surrogatepass"))
        return numpy.frombuffer(self.data, self.dtype)[0]

    def __str__(self) -> str:
        return str(self.original())


@dataclass(frozen=True)
class NumpyArray:
    """A stand-in for an array of numpy.

    Attributes:
        dtype: numpy's text for the dtype, such as ``<f8``.
        shape: number of elements in each dimension.
        fortran: whether the elements are in column-major order.
        data: the bytes of all elements.
    """

    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    data: bytes

    def __post_init__(self) -> None:
        size, shape = numpy_itemsize(self.dtype), self.shape
        if len(shape) > _MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("a numpy array whose shape is not valid")
        if prod(n or 1 for n in shape) * max(size, 1) > _MOST_ELEMENTS:
            raise ValueError("a numpy array that is too large")
        if not size or type(self.fortran) is not bool or prod(shape) * size != len(self.data):
            raise ValueError("a numpy array whose bytes do not fit its shape")

    def original(self) -> Any:
        """Return a new array, which may be written into."""
        import numpy

        order: Literal["F", "C"] = "F" if self.fortran else "C"
        if not self.data:
            return numpy.empty(self.shape, self.dtype, order=order)
        return numpy.frombuffer(bytearray(self.data), self.dtype).reshape(self.shape, order=order)

    def __reduce__(self) -> tuple[Any, ...]:
        return NumpyArray, (self.dtype, self.shape, self.fortran, self.data)

    def __setstate__(self, _: object) -> NoReturn:  # a pickle could replace what was checked
        raise ValueError("the state of a numpy array is set twice")

    def __repr__(self) -> str:
        return f"numpy {self.dtype} {list(self.shape)}"


ForeignValue = TorchValue | NumpyNumber | NumpyArray
FOREIGN: frozenset[type] = frozenset({TorchValue, NumpyNumber, NumpyArray, TorchSize})


def numpy_itemsize(dtype: str) -> int:
    """Return the bytes of an element of a numpy dtype.

    Raises:
        ValueError: elements of this dtype are not carried.
    """
    if not isinstance(dtype, str) or not _NUMPY_DTYPE.fullmatch(dtype):
        raise ValueError(f"numpy's dtype {dtype!r:.60} is not carried")
    return int(dtype[2:].partition("[")[0]) * (4 if dtype[1] == "U" else 1)


def stand_in_of(value: Any) -> Any:
    """Return the stand-in of a value of torch or numpy, and any other value unchanged.

    Values of numpy that are not carried are returned unchanged too, such as arrays of objects.
    """
    kind = type(value)
    if not kind.__module__.startswith(("torch", "numpy")):
        return value
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None:
        if kind is torch.Size:
            return TorchSize(value)
        for name, known in TORCH_NAMES.items():
            if kind is getattr(torch, name):
                text = str(value).removeprefix("torch.")
                return TorchValue(name, text) if name == "device" or text in known else value
    if numpy is not None and (kind is numpy.ndarray or isinstance(value, numpy.generic)):
        dtype = value.dtype
        if dtype.metadata is not None or not _NUMPY_DTYPE.fullmatch(dtype.str):
            return value
        if kind is numpy.str_:  # the dtype of an empty text has another size than its bytes
            return NumpyNumber(f"<U{len(value)}", value.encode("utf-32-le", "surrogatepass"))
        if kind is numpy.bytes_:
            return NumpyNumber(f"|S{len(value)}", bytes(value))
        if kind is not numpy.ndarray:
            return NumpyNumber(dtype.str, value.tobytes()) if kind is dtype.type else value
        if not dtype.itemsize:
            return value
        fortran = value.flags.f_contiguous and not value.flags.c_contiguous
        return NumpyArray(dtype.str, value.shape, fortran, value.tobytes("F" if fortran else "C"))
    return value


def original_of(value: Any) -> Any:
    """Return the value of torch or numpy for which a stand-in stands, and any other value unchanged."""
    if isinstance(value, TorchSize):
        import torch

        return torch.Size(value)
    return value.original() if isinstance(value, ForeignValue) else value
