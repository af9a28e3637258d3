"""Read the bytes of a tensor's elements. Only tensors that are computed or not contiguous need torch."""

from __future__ import annotations

from collections.abc import Iterator

from vraxion_ckpt.checkpoint.plain_data import bytes_of
from vraxion_ckpt.checkpoint.references import ComputedBytes, TensorRef

_FIRST_PIECE = 2**12  # enough to tell most tensors apart, or to find a nonzero weight
_PIECE = 2**20


def byte_pieces(tensor: TensorRef) -> Iterator[memoryview | bytes]:
    """Yield the bytes of a tensor's elements in pieces, in the order of their indices. The first piece is small.

    Raises:
        ChangedError: the tensor is in a file that has changed.
        StorageError: the operating system cannot read the file.
    """
    whole: memoryview | None = None
    if isinstance(tensor.storage, ComputedBytes) or not tensor.is_contiguous() or tensor.conj or tensor.neg:
        whole = bytes_of(tensor.read_only_tensor()).numpy().data
    first, size = 0, _FIRST_PIECE
    while first < tensor.nbytes:
        size = min(size, tensor.nbytes - first)
        if whole is not None:
            yield whole[first : first + size]
        else:
            yield tensor.storage.read(tensor.first * tensor.itemsize + first, size)
        first, size = first + size, _PIECE
