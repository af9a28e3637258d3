"""Detect experts whose weights are all zero or not all finite.

Such experts should not be cloned or given addresses. A trainer with hibernation moves the weights of an idle expert to
a file and leaves zeros in the model. A checkpoint saved during hibernation contains the zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from vraxion_ckpt.checkpoint.head import Expert
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.plain_data import as_comparable, in_pieces
from vraxion_ckpt.checkpoint.references import TensorRef, as_reference
from vraxion_ckpt.checkpoint.tensor_bytes import byte_pieces
from vraxion_ckpt.errors import TransformError

if TYPE_CHECKING:
    from torch import Tensor

# Buffers of torch's normalisation layers. Hibernation zeroes only parameters.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
HOW_TO_RESTORE = "if a trainer hibernated experts, restore_hibernated:snapshots=DIR puts their weights back"
# For each dtype, unsigned integers of its size, and the bits that are set only in numbers other than 0 and −0. In all
# other dtypes only the byte 0 is zero: `fnuz` has no −0, and packed dtypes are compared by their bytes.
_SIGNED_ZEROS = {
    **dict.fromkeys(("float64", "complex128"), (np.uint64, 2**63 - 1)),
    **dict.fromkeys(("float32", "complex64"), (np.uint32, 2**31 - 1)),
    **dict.fromkeys(("float16", "bfloat16", "complex32"), (np.uint16, 2**15 - 1)),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2"), (np.uint8, 2**7 - 1)),
}
_WITHOUT_ZERO = "float8_e8m0fnu"  # only powers of two


def is_zero(expert: Mapping[str, TensorRef | Tensor]) -> bool:
    """Return whether all weights of an expert are zero. Stops reading at the first nonzero piece.

    Args:
        expert: tensors or references by leaf name. Integers, bools and running statistics of normalisation layers are
            ignored.

    Returns:
        False if the expert has no floating-point or complex element.
    """
    weights = [
        tensor
        for leaf, tensor in _references(expert).items()
        if _is_inexact(tensor) and tensor.numel() and leaf.rpartition(".")[2] not in _STATISTICS
    ]
    return bool(weights) and all(_all_zero(tensor) for tensor in weights)


def has_nonfinite(expert: Mapping[str, TensorRef | Tensor]) -> bool:
    """Return whether any floating-point or complex element of an expert is NaN or infinite."""
    return not all(is_finite(tensor) for tensor in _references(expert).values())


def is_finite(tensor: TensorRef) -> bool:
    """Return whether every element of a tensor is finite. Integers and bools always are."""
    if not _is_inexact(tensor):
        return True
    for (piece,) in in_pieces(tensor.read_only_tensor()):
        numbers = as_comparable(piece)
        if numbers is not None and not bool(numbers.isfinite().all()):
            return False
    return True


def refuse_unhealthy(checkpoint: Checkpoint, expert: int, *, allow_zero: bool, allow_nan: bool) -> None:
    """Raise an error if an expert's weights are all zero or not all finite.

    Transforms call this before they clone an expert or give it addresses. A garbage-collected expert is accepted.

    Args:
        checkpoint: the checkpoint. The expert is opened.
        expert: id of the expert.
        allow_zero: whether all weights may be zero.
        allow_nan: whether weights may be NaN or infinite.

    Raises:
        TransformError: all weights are zero without `allow_zero`, or some are NaN or infinite without `allow_nan`.
    """
    tensors = checkpoint.head.experts.get(expert) if checkpoint.head else None
    if tensors is None:
        return
    if not allow_zero and is_zero(tensors):
        raise TransformError(
            f"all weights of expert {expert} are zero, as if it were hibernated; "
            "it cannot be cloned or given addresses",
            hint="put restore_hibernated:snapshots=DIR before this step, or pass allow_zero=true",
        )
    if not allow_nan and has_nonfinite(tensors):
        raise TransformError(
            f"expert {expert} has weights that are NaN or infinite; it cannot be cloned or given addresses",
            hint="use an older checkpoint, or pass allow_nan=true",
        )


def _references(expert: Mapping[str, TensorRef | Tensor]) -> dict[str, TensorRef]:
    if isinstance(expert, Expert):
        return expert.references()
    return {leaf: as_reference(tensor) for leaf, tensor in expert.items()}


def _is_inexact(tensor: TensorRef) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _all_zero(tensor: TensorRef) -> bool:
    if tensor.dtype == _WITHOUT_ZERO:
        return False
    kind, bits = _SIGNED_ZEROS.get(tensor.dtype, (np.uint8, 2**8 - 1))
    return not any((np.frombuffer(piece, kind) & kind(bits)).any() for piece in byte_pieces(tensor))
