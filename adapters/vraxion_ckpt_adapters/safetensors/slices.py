"""Put tensors together from the slices that the ranks of a distributed save have written.

torch's ``HuggingFaceStorageWriter(save_distributed=True)`` writes ``shard-0000R-model-0000i-of-0000n.safetensors`` for
each rank R. A tensor has a slice in the files of several ranks, under the tensor's name. The key ``DCP_SHARDING_INFO``
of the metadata states where each slice begins. Nothing states how many ranks there were, or the shape of a tensor: the
other files fit together without those of the last rank, too. So the user must state the number of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vraxion_ckpt.plugin_api import (
    CorruptError,
    InconsistentError,
    ReadContext,
    TensorRef,
    check_safetensors,
    parse_json,
)
from vraxion_ckpt_adapters.safetensors.files import SLICES_KEY, check_regular

if TYPE_CHECKING:
    from torch import Tensor

_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}  # by bytes of an element; copies keep every bit of them
_FILE = re.compile(r"shard-(\d{5,})-model-(\d{5,})-of-(\d{5,})\.safetensors")


@dataclass(frozen=True)
class _Slice:
    """A part of a tensor: the index of its first element in each dimension, and its values."""

    offsets: tuple[int, ...]
    values: TensorRef
    file: Path


def list_slices(folder: Path) -> list[Path]:
    """Return the files of a distributed save in a folder, by their names."""
    return sorted(path for path in folder.glob("shard-*-model-*.safetensors") if _FILE.fullmatch(path.name))


def read_slices(folder: Path, ranks: int | None, context: ReadContext) -> dict[str, TensorRef]:
    """Return the whole tensors of a distributed save. They are put together one at a time, when they are written.

    Args:
        folder: the folder with the files.
        ranks: the number of ranks that saved, as the user states it.
        context: opens the files.

    Raises:
        InconsistentError: `ranks` is None or a rank's file is missing; slices overlap, leave a hole, or have different
            dtypes; or a file does not state where its slices begin.
    """
    files = list_slices(folder)
    _check_ranks(folder, files, ranks)
    slices: dict[str, list[_Slice]] = {}
    for file in files:
        header = check_safetensors(check_regular(file))
        found = context.load_safetensors_references(file, header)[0]
        offsets = _offsets(file, header.metadata, found)
        for name, tensor in found.items():
            slices.setdefault(name, []).append(_Slice(offsets[name], tensor, file))
    return {name: _whole(name, found) for name, found in slices.items()}


def check_whole(file: Path, metadata: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> None:
    """Check that a file that an index lists has whole tensors, which begin at the first element.

    A single rank that saves everything writes such files, too.

    Raises:
        InconsistentError: it has slices that begin elsewhere.
    """
    for name, offsets in _offsets(file, metadata, tensors).items() if SLICES_KEY in metadata else ():
        if any(offsets):
            raise InconsistentError("is a slice of a tensor, but the index lists it as a whole", path=file, key=name)


def _check_ranks(folder: Path, files: Sequence[Path], ranks: int | None) -> None:
    matches = [found for file in files if (found := _FILE.fullmatch(file.name))]
    present = {int(found[1]) for found in matches}
    if ranks is None:
        raise InconsistentError(
            f"has slices of tensors, saved by {len(present)} ranks or more: no file states how many there were, and "
            "without the files of the last ones, the tensors would be too short",
            path=folder,
            hint=f"if there were {len(present)}, say so: --from safetensors:ranks={len(present)}",
        )
    if more := sorted(present - set(range(1, ranks + 1))):
        raise InconsistentError(f"has slices of rank {more[0]}, but there are {ranks} ranks as stated", path=folder)
    counts = {int(found[3]) for found in matches}
    if len(counts) > 1:
        raise InconsistentError("has files of several saves, which state different numbers of files", path=folder)
    stored = {(int(found[1]), int(found[2])) for found in matches}
    for rank, number in product(range(1, ranks + 1), range(1, counts.pop() + 1)):
        if (rank, number) not in stored:
            message = f"lacks shard-{rank:05d}-model-{number:05d}-of-…, so some slices may be missing"
            hint = (
                f"copy the files of all {ranks} ranks into one folder; if this rank wrote no such file, use torch's "
                "consolidate_safetensors_files"
            )
            raise InconsistentError(message, path=folder, hint=hint)


def _offsets(file: Path, metadata: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> dict[str, tuple[int, ...]]:
    """Return the index of the first element of each slice in a file."""
    try:
        stated: Any = parse_json(metadata[SLICES_KEY], file)
    except KeyError:
        raise InconsistentError("does not state where its slices begin", path=file, key=SLICES_KEY) from None
    except (CorruptError, InconsistentError) as error:
        raise InconsistentError(f"does not parse: {error.message}", path=file, key=SLICES_KEY) from error
    found = {}
    for name, tensor in tensors.items():
        place = stated.get(name) if isinstance(stated, dict) else None
        offsets = place.get("saved_offsets") if isinstance(place, dict) else None
        if not isinstance(offsets, list) or len(offsets) != len(tensor.shape) or not all(map(_is_offset, offsets)):
            raise InconsistentError(f"{SLICES_KEY} does not state where the slice begins", path=file, key=name)
        found[name] = tuple(offsets)
    return found


def _is_offset(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _whole(name: str, slices: Sequence[_Slice]) -> TensorRef:
    """Return the tensor that slices make up."""
    first = slices[0]
    for other in slices[1:]:
        if (other.values.dtype, len(other.offsets)) != (first.values.dtype, len(first.offsets)):
            message = f"has another dtype or number of dimensions than in {first.file.name}"
            raise InconsistentError(message, path=other.file, key=name)
    ends = [[offset + size for offset, size in zip(each.offsets, each.values.shape, strict=True)] for each in slices]
    shape = tuple(map(max, zip(*ends, strict=True)))
    filled = [each for each in slices if each.values.numel()]
    if filled or prod(shape):
        _check_grid(name, filled, shape, first.file.parent)
    if len(filled) == 1:
        return filled[0].values
    return TensorRef.computed(first.values.dtype, shape, partial(_put_together, first.values, shape, filled))


def _check_grid(name: str, slices: Sequence[_Slice], shape: tuple[int, ...], folder: Path) -> None:
    """Check that slices are the cells of a grid that divides the tensor, each once."""
    cuts = [sorted({each.offsets[dimension] for each in slices} | {size}) for dimension, size in enumerate(shape)]
    following = [dict(pairwise(found)) for found in cuts]
    seen: dict[tuple[int, ...], Path] = {}
    for each in slices:
        if each.offsets in seen:
            raise InconsistentError(f"has the same slice as {seen[each.offsets].name}", path=each.file, key=name)
        seen[each.offsets] = each.file
        for dimension, (start, size) in enumerate(zip(each.offsets, each.values.shape, strict=True)):
            if following[dimension][start] != start + size:
                message = f"its slices overlap or leave a hole, after element {start} of dimension {dimension}"
                raise InconsistentError(message, path=each.file, key=name)
    if any(found[0] for found in cuts) or len(slices) != prod(len(found) - 1 for found in cuts):
        raise InconsistentError("a slice is missing", path=folder, key=name)


def _put_together(like: TensorRef, shape: tuple[int, ...], slices: Sequence[_Slice]) -> Tensor:
    """Return the tensor that slices make up, of the dtype of `like`."""
    import torch

    integers = getattr(torch, _INTEGERS[like.itemsize])
    whole = torch.empty(shape, dtype=integers)
    for each in slices:
        place = tuple(slice(start, start + n) for start, n in zip(each.offsets, each.values.shape, strict=True))
        whole[place] = each.values.read_only_tensor().view(integers)
    return whole.view(getattr(torch, like.dtype))
