"""Copy the tensors of an expert, and add noise to the copies."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vraxion_ckpt.checkpoint.plain_data import bytes_of, in_pieces
from vraxion_ckpt.checkpoint.references import TensorRef, reference
from vraxion_ckpt.errors import CkptWarning
from vraxion_ckpt.wording import listed

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 2**20  # elements per draw of noise. Results depend on it, so it must not change.


def copy_of(tensor: TensorRef, noise: tuple[tuple[float, str], ...], leaf: str) -> TensorRef:
    """Return a copy of a tensor, with Gaussian noise if its dtype is floating-point.

    Args:
        tensor: any tensor.
        noise: pairs of standard deviation and seed prefix, one for each time that noise is added, see `Ancestor`.
        leaf: leaf name of the tensor, appended to the seed prefix.
    """
    if not (noise and tensor.is_floating_point()):
        return tensor.copied()
    import torch

    copy = tensor.read_only_tensor().detach().clone(memory_format=torch.preserve_format)
    for deviation, seed in noise:
        noisy = copy.contiguous()
        _add_noise(noisy.view(-1), deviation, seed + leaf)
        if noisy is not copy:
            copy.copy_(noisy)
    return reference(torch.nn.Parameter(copy, tensor.requires_grad) if tensor.parameter else copy)


def warn_of_lost_noise(pairs: Mapping[str, tuple[TensorRef, TensorRef]], noise: float, new: str) -> None:
    """Warn if noise has left most elements of a parameter unchanged because of its dtype.

    Args:
        pairs: leaf name → (tensor of the parent, tensor of the clone with noise).
        noise: standard deviation of the noise.
        new: prefix of the clone's names, from which the warning names the clone.
    """
    lost = []
    for leaf, (old, copy) in pairs.items() if noise else ():
        numbers = copy.numel()
        if copy.dtype == "bool":  # a mask
            continue
        if numbers and not copy.is_floating_point():
            lost.append(f"{leaf} ({copy.dtype}) is not changed")
        elif numbers:
            changed = _count_changed(old.read_only_tensor(), copy.read_only_tensor())
            if 2 * changed < numbers:
                lost.append(f"{leaf} ({copy.dtype}) has {changed} of {numbers} elements changed")
    if lost:
        message = (
            f"noise of {noise:g} has little or no effect on {new.removesuffix('.')}: {listed(lost, 3, '; ')}; "
            "these tensors are nearly equal to the parent's"
        )
        warnings.warn(message, CkptWarning, stacklevel=4)


def _count_changed(old: Tensor, new: Tensor) -> int:
    """Return the number of elements whose bits differ. Works piece by piece, so temporaries stay small."""
    size = old.itemsize
    pieces = in_pieces(bytes_of(old), bytes_of(new), size=_PIECE * size)
    return sum(int((a.view(-1, size) != b.view(-1, size)).any(1).sum()) for a, b in pieces)


def _add_noise(flat: Tensor, noise: float, seed: str) -> None:
    """Add Gaussian noise to a flat tensor in place. Works piece by piece, so temporaries stay small."""
    import torch

    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1)
    # Low-precision dtypes cannot be drawn. Noise is drawn and added in at least single precision, and rounded once.
    wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
    for (piece,) in in_pieces(flat, size=_PIECE):
        drawn = torch.randn(piece.shape, generator=generator, dtype=wide)
        piece.copy_((piece.to(wide) + noise * drawn).to(flat.dtype))
