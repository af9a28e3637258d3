"""Pickle plain data as ``torch.save`` does, with a reference for each tensor."""

from __future__ import annotations

import codecs
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from vraxion_ckpt.checkpoint.foreign_values import original_of
from vraxion_ckpt.checkpoint.plain_data import in_fixed_order
from vraxion_ckpt.checkpoint.references import ITEMSIZES, Storage, TensorRef, as_reference, is_tensor
from vraxion_ckpt.checkpoint.tensor_dict import PackedFloats, TensorDict, replaced
from vraxion_ckpt.errors import UnsupportedError


@dataclass(frozen=True)
class Pickled:
    """A pickle, and the storages that it names ``0``, ``1`` and so on."""

    content: bytes
    storages: tuple[Storage, ...]


def pickled(value: Any) -> Pickled:
    """Pickle plain data, as ``torch.save`` does.

    Raises:
        UnsupportedError: two tensors of different dtypes share memory, which torch cannot save either.
    """
    pieces = _Pieces()
    pickler = _Pickler(pieces, 2)
    pickler.dump(replaced(value, _to_pickle))
    return Pickled(b"".join(pieces), tuple(pickler.keys))


class _Pieces(list[bytes]):
    """What a pickler writes. It writes all at once, and this makes no copy of it."""

    write = list.append


class _NamedStorage:
    """A storage in the pickle, and its persistent id: torch's class for its dtype, name, device, number of elements."""

    __slots__ = ("pid",)

    def __init__(self, kind: type, key: str, numel: int) -> None:
        self.pid = "storage", kind, key, "cpu", numel


class _NoHooks:
    """Stands for an empty `OrderedDict` of hooks, which `pickle` would ask for its slots each time."""


@dataclass(frozen=True)
class _Set:
    """Stands for a set, whose order would depend on the process."""

    entries: list[Any]


class _NoBytes:
    """Stands for empty bytes, which `pickle` would write as a call that ``torch.load(weights_only=True)`` refuses."""


def _to_pickle(value: Any) -> Any:
    """Return what to pickle instead of a set, or of another value that is not a dict, list or tuple."""
    if isinstance(value, TensorDict):
        return replaced(value.references(), _to_pickle)
    if is_tensor(value):
        return as_reference(value)
    if isinstance(value, PackedFloats):
        return value.tolist()
    if isinstance(value, set):
        return _Set(in_fixed_order(value))
    return _NoBytes() if type(value) is bytes and not value else original_of(value)


class _Pickler(pickle.Pickler):
    """Pickles tensors as `torch.Tensor.__reduce_ex__` does."""

    def __init__(self, file: _Pieces, protocol: int) -> None:
        super().__init__(file, protocol)
        self.keys: dict[Storage, str] = {}
        self._kinds: dict[Storage, type] = {}

    def persistent_id(self, value: Any) -> tuple[str, type, str, str, int] | None:
        return value.pid if type(value) is _NamedStorage else None

    def reducer_override(self, value: Any) -> Any:
        if type(value) is _NoHooks:
            return OrderedDict, ()
        if isinstance(value, _Set):
            return set, (value.entries,)
        if isinstance(value, _NoBytes):
            return codecs.encode, ("", "latin1")
        if type(value) is not TensorRef:
            return NotImplemented
        if value.parameter:
            import torch

            plain = replace(value, parameter=False, requires_grad=False, _tensor=None)
            return torch._utils._rebuild_parameter, (plain, value.requires_grad, _NoHooks())
        return self._tensor(value)

    def _tensor(self, ref: TensorRef) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        kind, rebuild, dtype = _way_to_rebuild(ref.dtype)
        storage = ref.storage
        if storage.nbytes and self._kinds.setdefault(storage, kind) is not kind:
            raise UnsupportedError("has tensors of different dtypes that share memory; torch cannot save them")
        key = self.keys.setdefault(storage, str(len(self.keys)))
        named = _NamedStorage(kind, key, storage.nbytes if dtype else storage.nbytes // ITEMSIZES[ref.dtype])
        # New tuples, as a pickle of equal values must not depend on which ones are the same object.
        arguments: tuple[Any, ...] = (
            named,
            ref.first,
            (*ref.shape,),
            (*ref.strides,),
            ref.requires_grad,
            _NoHooks(),
        )
        arguments += dtype
        if ref.conj or ref.neg:
            # New strings, for the same reason.
            flags = ((b"conj", ref.conj), (b"neg", ref.neg))
            arguments += ({name.decode(): True for name, is_set in flags if is_set},)
        return rebuild, arguments


@cache
def _way_to_rebuild(dtype: str) -> tuple[type, Callable[..., Any], tuple[Any, ...]]:
    """Return torch's storage class of a dtype, the function that makes its tensors, and what is passed to that last.

    A dtype without a storage class of its own has `torch.UntypedStorage`, and is passed to the function.
    """
    import torch

    name = torch.storage._dtype_to_storage_type_map().get(getattr(torch, dtype))
    if name:
        return getattr(torch, name), torch._utils._rebuild_tensor_v2, ()
    return torch.UntypedStorage, torch._utils._rebuild_tensor_v3, (getattr(torch, dtype),)
