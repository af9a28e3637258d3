"""Pickle plain data as ``torch.save`` does, with a reference for each tensor."""

from __future__ import annotations

import codecs
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from vraxion_ckpt.checkpoint.foreign_values import original_of
from vraxion_ckpt.checkpoint.plain_data import in_fixed_order
from vraxion_ckpt.checkpoint.references import Storage, TensorRef
from vraxion_ckpt.checkpoint.tensor_dict import referenced, with_originals
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
    content = io.BytesIO()
    pickler = _Pickler(content, 2)
    pickler.dump(with_originals(referenced(value), _to_pickle))
    return Pickled(content.getvalue(), tuple(pickler.keys))


@dataclass(frozen=True)
class _NamedStorage:
    """A storage in the pickle: torch's class for its dtype, its name, and its number of elements."""

    kind: type
    key: str
    numel: int


class _NoHooks:
    """Stands for an empty `OrderedDict` of hooks, which `pickle` would ask for its slots each time."""


@dataclass(frozen=True)
class _Set:
    """Stands for a set, whose order would depend on the process."""

    entries: list[Any]


class _NoBytes:
    """Stands for empty bytes, which `pickle` would write as a call that ``torch.load(weights_only=True)`` refuses."""


def _to_pickle(value: Any) -> Any:
    """Return what to pickle instead of a value that is not a dict, list, tuple or tensor."""
    if isinstance(value, set):
        return _Set(in_fixed_order(value))
    return _NoBytes() if type(value) is bytes and not value else original_of(value)


class _Pickler(pickle.Pickler):
    """Pickles tensors as `torch.Tensor.__reduce_ex__` does."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.keys: dict[Storage, str] = {}
        self._kinds: dict[Storage, type] = {}

    def persistent_id(self, value: Any) -> tuple[str, type, str, str, int] | None:
        if type(value) is _NamedStorage:
            return "storage", value.kind, value.key, "cpu", value.numel
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _NoHooks):
            return OrderedDict, ()
        if isinstance(value, _Set):
            return set, (value.entries,)
        if isinstance(value, _NoBytes):
            return codecs.encode, ("", "latin1")
        if not isinstance(value, TensorRef):
            return NotImplemented
        if value.parameter:
            import torch

            plain = replace(value, parameter=False, requires_grad=False, _tensor=None)
            return torch._utils._rebuild_parameter, (plain, value.requires_grad, _NoHooks())
        return self._tensor(value)

    def _tensor(self, ref: TensorRef) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import torch

        kind = _storage_class(ref.dtype)
        storage = ref.storage
        if storage.nbytes and self._kinds.setdefault(storage, kind) is not kind:
            raise UnsupportedError("has tensors of different dtypes that share memory; torch cannot save them")
        key = self.keys.setdefault(storage, str(len(self.keys)))
        typed = kind is not torch.UntypedStorage
        named = _NamedStorage(kind, key, storage.nbytes // ref.itemsize if typed else storage.nbytes)
        # New tuples, as a pickle of equal values must not depend on which ones are the same object.
        arguments: tuple[Any, ...] = (
            named,
            ref.first,
            (*ref.shape,),
            (*ref.strides,),
            ref.requires_grad,
            _NoHooks(),
        )
        if not typed:
            arguments += (getattr(torch, ref.dtype),)
        # New strings, for the same reason.
        metadata = {name.decode(): True for name, is_set in ((b"conj", ref.conj), (b"neg", ref.neg)) if is_set}
        if metadata:
            arguments += (metadata,)
        rebuild = torch._utils._rebuild_tensor_v2 if typed else torch._utils._rebuild_tensor_v3
        return rebuild, arguments


@cache
def _storage_class(dtype: str) -> type:
    """Return torch's typed storage class of a dtype, or `torch.UntypedStorage` if there is none."""
    import torch

    name = torch.storage._dtype_to_storage_type_map().get(getattr(torch, dtype))
    return getattr(torch, name) if name else torch.UntypedStorage
