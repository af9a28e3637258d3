"""References to tensors: dtype, shape, and where the bytes are.

A checkpoint holds a `TensorRef` for each tensor until a plugin or a user looks at it. Opening, inspecting and copying
need no torch tensor. Untouched bytes are copied from file to file. Two references with the same storage object are
views of the same memory.

There are three kinds of storage: `StoredBytes` in a source file, `MadeBytes` in memory, and `ComputedBytes`, which are
computed when they are written or looked at. Imports without torch.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from vraxion_ckpt.checkpoint.source_files import StoredBytes, buffer_of
from vraxion_ckpt.errors import ChangedError, PluginError, StorageError, raise_if_out_of_memory
from vraxion_ckpt.support.checksums import crc32

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Bytes per element of torch's dtypes.
ITEMSIZES = {
    **dict.fromkeys(("bool", "uint8", "int8", "quint8", "qint8", "quint4x2", "quint2x4"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    "float4_e2m1fn_x2": 1,
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32", "qint32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}


@dataclass(eq=False)
class MadeBytes:
    """Bytes in memory, created by a plugin or a user.

    Attributes:
        given: the memory.
        crc: the CRC-32 of the bytes when the plugin handed them over, or None if it was not computed.
    """

    given: torch.UntypedStorage
    crc: int | None = None

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.given.nbytes()

    def memory(self) -> torch.UntypedStorage:
        """Return the memory."""
        return self.given

    view = memory

    def note(self) -> None:
        """Compute the CRC-32 of the bytes, unless it was computed before."""
        if self.crc is None:
            self.crc = crc32(buffer_of(self.given))

    def was_written_into(self) -> bool:
        """Return whether the bytes have changed since `note` was called."""
        return self.crc is not None and crc32(buffer_of(self.given)) != self.crc

    def read(self, first: int, size: int) -> bytes:
        """Return `size` bytes, beginning with byte number `first`."""
        return buffer_of(self.given)[first : first + size].tobytes()

    def __deepcopy__(self, memo: object) -> MadeBytes:
        copy = self.given.clone()  # type: ignore[no-untyped-call]
        return MadeBytes(copy)


@dataclass(eq=False)
class ComputedBytes:
    """Bytes of a contiguous tensor that a function returns. The function is called each time that they are needed.

    Attributes:
        nbytes: number of bytes.
        function: returns the tensor.
        given: the memory that plugins got, or None if no plugin has looked at the bytes.
        crc: the CRC-32 of the bytes, or None if they were not computed yet.
        noted: the CRC-32 of `given` when a plugin handed it over, or None.
    """

    nbytes: int
    function: Callable[[], Tensor]
    given: torch.UntypedStorage | None = None
    crc: int | None = None
    noted: int | None = None

    def note(self) -> None:
        """Note the CRC-32 of the memory that a plugin got and hands over."""
        if self.given is not None and self.noted is None:
            self.noted = self.crc = crc32(buffer_of(self.given))

    def memory(self) -> torch.UntypedStorage:
        """Return the bytes as memory that plugins may get. They are computed once."""
        if self.given is None:
            self.given = self._computed()
        return self.given

    def view(self) -> torch.UntypedStorage:
        """Return the memory that plugins got, or compute the bytes. Raises `PluginError` if the function fails."""
        return self._computed() if self.given is None else self.given

    def _computed(self) -> torch.UntypedStorage:
        """Compute the bytes.

        Raises:
            ChangedError, StorageError: the function reads a file that has changed or cannot be read.
            PluginError: the function fails, or does not return a tensor of the stated dtype and shape.
        """
        try:
            made = self.function().detach().contiguous()
            found = made.untyped_storage() if reference(made).fills_storage() else made.clone().untyped_storage()
        except (ChangedError, StorageError):
            raise
        except (Exception, SystemExit) as error:
            raise_if_out_of_memory(error)
            raise PluginError(f"a tensor could not be computed: {type(error).__name__}: {error}") from error
        if found.nbytes() != self.nbytes:
            raise PluginError(f"a computed tensor has {found.nbytes()} bytes, not {self.nbytes} as stated")
        return found

    def read(self, first: int, size: int) -> bytes:
        """Compute the bytes, and return `size` of them, beginning with byte number `first`."""
        return buffer_of(self.view())[first : first + size].tobytes()

    def was_written_into(self) -> bool:
        """Return whether the memory has changed since `note`, or if not noted, differs from the function's result."""
        if self.given is None:
            return False
        if self.noted is not None:
            return crc32(buffer_of(self.given)) != self.noted
        return buffer_of(self.given) != buffer_of(self._computed())

    def __deepcopy__(self, memo: object) -> ComputedBytes:
        return ComputedBytes(self.nbytes, self.function)


Storage = StoredBytes | MadeBytes | ComputedBytes


def as_written(storage: Storage) -> Storage:
    """Return the storage to write: the file, unless a plugin got its bytes as memory and has changed them."""
    if isinstance(storage, StoredBytes) and storage.given is not None and storage.differs_from_file():
        return MadeBytes(storage.given)
    return storage


@dataclass(eq=False, slots=True)
class TensorRef:
    """A reference to a tensor. It has the attributes of a tensor that need no data.

    Attributes:
        storage: the bytes. References with the same object share memory.
        dtype: name of the dtype, such as ``float32``.
        shape: number of elements in each dimension.
        strides: distance between neighbouring elements of each dimension, in elements.
        first: index in the storage of the first element, in elements.
        requires_grad: as `torch.Tensor.requires_grad`.
        parameter: whether it is a `torch.nn.Parameter`.
        conj: whether the values are the complex conjugates of the stored ones, see ``torch.Tensor.is_conj``.
        neg: whether the values are the negatives of the stored ones, see ``torch.Tensor.is_neg``.
    """

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int = 0
    requires_grad: bool = False
    parameter: bool = False
    conj: bool = False
    neg: bool = False
    _tensor: weakref.ref[Tensor] | None = field(default=None, repr=False)
    _state: tuple[Any, ...] | None = field(default=None, repr=False)  # of the tensor when it was handed over

    @classmethod
    def contiguous(cls, storage: Storage, dtype: str, shape: tuple[int, ...]) -> TensorRef:
        """Return a reference to a contiguous tensor that fills its storage."""
        return cls(storage, dtype, shape, contiguous_strides(shape))

    @classmethod
    def computed(cls, dtype: str, shape: tuple[int, ...], function: Callable[[], Tensor]) -> TensorRef:
        """Return a reference to a contiguous tensor that a function returns each time that its bytes are needed."""
        return cls.contiguous(ComputedBytes(prod(shape) * ITEMSIZES[dtype], function), dtype, shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZES[self.dtype]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel() * self.itemsize

    def is_floating_point(self) -> bool:
        """Return whether the dtype is floating-point and real."""
        return self.dtype.startswith(("float", "bfloat"))

    def is_complex(self) -> bool:
        """Return whether the dtype is complex."""
        return self.dtype.startswith("complex")

    def is_contiguous(self) -> bool:
        """Return whether the elements are adjacent, in the order of their indices."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return not self.numel()
            expected *= size
        return True

    def fills_storage(self) -> bool:
        """Return whether the storage holds exactly the elements, in the order of their indices."""
        dense = self.strides == contiguous_strides(self.shape) or self.is_contiguous()
        return dense and self.nbytes == self.storage.nbytes and not (self.conj or self.neg)

    def extent(self) -> tuple[int, int, int]:
        """Return where the elements are: a number for the address space, the first byte, and the number of bytes.

        Bytes that are in memory share one address space. Others have one for each storage.
        """
        given = self.storage.given
        space, start = (0, given.data_ptr()) if given is not None else (id(self.storage), 0)
        if not self.numel():
            return space, start + self.first * self.itemsize, 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return space, start + self.first * self.itemsize, (last + 1) * self.itemsize

    def tensor(self) -> Tensor:
        """Return the tensor for a plugin or a user. Its bytes are compared with the file before a result is committed.

        Returns:
            the same object as long as it exists.
        """
        tensor = self._tensor() if self._tensor is not None else None
        if tensor is None or not _describes(self, tensor):
            tensor = self._on(self.storage.memory())
            _remember(tensor, self)
        return tensor

    def read_only_tensor(self) -> Tensor:
        """Return a tensor with the values, for reading by the core. Plugins never get it."""
        return self._on(self.storage.view())

    def _on(self, memory: torch.UntypedStorage) -> Tensor:
        import torch

        dtype = getattr(torch, self.dtype)
        tensor = torch.empty(0, dtype=dtype).set_(memory, self.first, self.shape, self.strides)
        tensor = tensor.conj() if self.conj else tensor
        tensor = tensor._neg_view() if self.neg else tensor
        if self.parameter:
            return torch.nn.Parameter(tensor, self.requires_grad)
        return tensor.requires_grad_(self.requires_grad) if self.requires_grad else tensor

    def copied(self) -> TensorRef:
        """Return an equal tensor that shares no memory with this one. Bytes of a file are copied when it is written.

        As a copy that ``detach`` and ``clone`` make, it requires gradients only if it is a parameter.
        """
        if isinstance(self.storage, StoredBytes) and self.storage.given is None and self.fills_storage():
            needs_grad = self.requires_grad and self.parameter
            return replace(self, storage=self.storage.copied(), requires_grad=needs_grad, _tensor=None)
        import torch

        copy = self.read_only_tensor().detach().clone(memory_format=torch.preserve_format)
        return reference(torch.nn.Parameter(copy, self.requires_grad) if self.parameter else copy)

    def mapped(self, function: Callable[[Tensor], Tensor], *, dtype: str | None = None) -> TensorRef:
        """Return a tensor of the same shape that is computed when it is written or looked at.

        So a transform can change every tensor of a checkpoint that is larger than memory.

        Args:
            function: gets the tensor and returns the new one. It may be called several times, and must always return
                the same values.
            dtype: name of the new dtype, such as ``bfloat16``; that of this tensor if None.
        """
        import torch

        name = self.dtype if dtype is None else dtype

        def compute() -> Tensor:
            with torch.no_grad():
                made = function(self._on(self._unshared_memory()))
            if made.device.type != "cpu":
                raise ValueError(f"it is on device {made.device}")
            if (str(made.dtype)[6:], tuple(made.shape)) != (name, self.shape):
                raise ValueError(f"it is {made.dtype} {list(made.shape)}, not torch.{name} {list(self.shape)}")
            return made

        storage = ComputedBytes(self.numel() * ITEMSIZES[name], compute)
        strides = contiguous_strides(self.shape)
        return TensorRef(storage, name, self.shape, strides, 0, self.requires_grad, self.parameter)

    def _unshared_memory(self) -> torch.UntypedStorage:
        """Return the bytes as memory into which a function may write without an effect on others."""
        if isinstance(self.storage, StoredBytes):
            return self.storage.unshared()
        copy: torch.UntypedStorage = self.storage.view().clone()  # type: ignore[no-untyped-call]
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorRef:
        storage = self.storage
        if isinstance(storage, StoredBytes) and storage.given is not None:
            copy = memo.setdefault(id(storage), MadeBytes(storage.given.clone()))  # type: ignore[no-untyped-call]
            memo.setdefault(id(memo), []).append(storage)  # keeps the id in use, as `copy.deepcopy` does
            return replace(self, storage=copy, _tensor=None)
        return replace(self, storage=deepcopy(storage, memo), _tensor=None)


@lru_cache(maxsize=2**12)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


# --- tensors that exist ---


class _Known:
    """The references of all tensors that exist, and the storage objects of their memory."""

    def __init__(self) -> None:
        from torch.utils.weak import WeakIdKeyDictionary

        self.references: Any = WeakIdKeyDictionary()
        self.storages: weakref.WeakValueDictionary[int, Storage] = weakref.WeakValueDictionary()


@cache
def _known() -> _Known:
    return _Known()


def _remember(tensor: Tensor, ref: TensorRef) -> None:
    ref._tensor, ref._state = weakref.ref(tensor), _state(tensor)
    _known().references[tensor] = ref
    _known().storages[tensor.untyped_storage()._cdata] = ref.storage


def _describes(ref: TensorRef, tensor: Tensor) -> bool:
    return (
        ref.storage.given is not None
        and ref.storage.given.data_ptr() == tensor.untyped_storage().data_ptr()
        and (ref.dtype, ref.shape, ref.strides, ref.first)
        == (str(tensor.dtype)[6:], tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        and (ref.requires_grad, ref.conj, ref.neg) == (tensor.requires_grad, tensor.is_conj(), tensor.is_neg())
    )


def reference(tensor: Tensor) -> TensorRef:
    """Return the reference of a dense tensor on the CPU: the one from which it was made, or a new one."""
    import torch

    known = _known()
    found = known.references.get(tensor)
    if found is not None and _describes(found, tensor):
        return found  # type: ignore[no-any-return]
    memory = tensor.untyped_storage()
    storage = known.storages.get(memory._cdata)
    ref = TensorRef(
        storage if storage is not None else MadeBytes(memory),
        str(tensor.dtype)[6:],  # without "torch."
        tuple(tensor.shape),
        tensor.stride(),
        int(tensor.storage_offset()),
        tensor.requires_grad,
        isinstance(tensor, torch.nn.Parameter),
        tensor.is_conj(),
        tensor.is_neg(),
    )
    _remember(tensor, ref)
    if found is not None:  # the tensor got another shape or other memory, which counts as a write
        ref._state = found._state
    return ref


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Return a value that changes if torch counts an in-place write, or if address, dtype, shape or strides change."""
    address = tensor.data_ptr() if tensor.numel() else 0
    return tensor._version, address, tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad


def hand_over(ref: TensorRef) -> None:
    """Accept the present state of a tensor that a plugin owns and returns. `was_written` finds later writes."""
    tensor = ref._tensor() if ref._tensor is not None else None
    if tensor is not None:
        ref._state = _state(tensor)


def was_written(ref: TensorRef) -> bool:
    """Return whether torch counted a write into the tensor of a reference since somebody got it. Reads no bytes."""
    tensor = ref._tensor() if ref._tensor is not None else None
    return tensor is not None and ref._state != _state(tensor)


def as_reference(tensor: TensorRef | Tensor) -> TensorRef:
    """Return a reference unchanged, and the reference of a tensor."""
    return tensor if isinstance(tensor, TensorRef) else reference(tensor)


def is_tensor(value: object) -> bool:
    """Return whether a value is a reference or a `torch.Tensor`. Does not import torch."""
    if isinstance(value, TensorRef):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
