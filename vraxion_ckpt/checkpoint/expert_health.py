"""Experts that should not be cloned or given addresses: all weights zero, or not all of them finite.

A trainer with hibernation moves the weights of an idle expert to a file and leaves zeros in the model. A checkpoint
that is written meanwhile holds the zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.plain_data import as_comparable, bytes_of, in_pieces
from vraxion_ckpt.errors import TransformError

# Statistics that torch's normalisation layers keep in buffers; hibernation zeroes parameters only.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
HOW_TO_RESTORE = "if a trainer hibernated experts, restore_hibernated:snapshots=DIR puts their weights back"
_FIRST_PIECE = 2**10  # the first nonzero weight is nearly always here


def is_zero(expert: Mapping[str, Tensor]) -> bool:
    """Tell whether all weights of an expert are zero; reads no further than the first that is not.

    Args:
        expert: tensors by leaf name. Integers, bools and the running statistics of normalisation layers do not count.

    Returns:
        False if it has no floating-point or complex element at all.
    """
    weights = [
        tensor
        for leaf, tensor in expert.items()
        if _is_inexact(tensor) and tensor.numel() and leaf.rpartition(".")[2] not in _STATISTICS
    ]
    return bool(weights) and all(_all_zero(tensor) for tensor in weights)


def has_nonfinite(expert: Mapping[str, Tensor]) -> bool:
    """Tell whether any floating-point or complex element of an expert is NaN or infinite."""
    return not all(is_finite(tensor) for tensor in expert.values())


def is_finite(tensor: Tensor) -> bool:
    """Tell whether every element is finite; reads a piece at a time. Integers and bools always are."""
    if not _is_inexact(tensor):
        return True
    for piece in _pieces(tensor):
        numbers = as_comparable(piece)
        if numbers is not None and not bool(numbers.isfinite().all()):
            return False
    return True


def refuse_unhealthy(checkpoint: Checkpoint, expert: int, *, allow_zero: bool, allow_nan: bool) -> None:
    """Refuse to clone an expert, or to give it addresses, if its weights are all zero or not finite.

    A transform calls this before it does either. An expert without tensors (a garbage-collected one) passes.

    Args:
        checkpoint: opened as far as that expert.
        expert: its id.
        allow_zero: the transform's option of that name.
        allow_nan: the transform's option of that name; infinite weights are allowed with NaN.

    Raises:
        TransformError: the expert's weights are all zero, or some are NaN or infinite, and the option is off.
    """
    tensors = checkpoint.head.experts.get(expert) if checkpoint.head else None
    if tensors is None:
        return
    if not allow_zero and is_zero(tensors):
        raise TransformError(
            f"all weights of expert {expert} are zero, as those of a hibernated expert; "
            "it is not cloned and gets no addresses",
            hint="put restore_hibernated:snapshots=DIR before this step, or pass allow_zero=true",
        )
    if not allow_nan and has_nonfinite(tensors):
        raise TransformError(
            f"expert {expert} has weights that are NaN or infinite; it is not cloned and gets no addresses",
            hint="use an older checkpoint, or pass allow_nan=true",
        )


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _all_zero(tensor: Tensor) -> bool:
    for piece in _pieces(tensor):
        numbers = as_comparable(piece)
        values = bytes_of(piece) if numbers is None else numbers  # of packed dtypes, only the bytes can be read
        if bool(values.any()):
            return False
    return True


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    yield flat[:_FIRST_PIECE]
    yield from (piece for (piece,) in in_pieces(flat[_FIRST_PIECE:]))
