"""Conversions as they are measured: with all checks on, by `cp`, and by hand with torch alone.

The functions of this module run in processes of their own.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import inputs
from benchmarks.measuring import (
    MIB,
    Found,
    address_space,
    anonymous_bytes,
    bytes_below,
    find_memory,
    in_child,
    remove,
    run,
    timed,
    watched,
)

if TYPE_CHECKING:
    from vraxion_ckpt.plugin_api import Transform

# The formats by the suffixes of their names.
FORMATS = {
    ".pt": "pt",
    ".safetensors": "safetensors",
    ".modular": "modular",
    ".shards": "safetensors:max_shard_size=128MiB",
}


def memory_with_torch() -> int:
    """Import torch, then return the anonymous memory of this process in bytes."""
    import torch  # noqa: F401

    return anonymous_bytes()


def warm_up(folder: Path, *suffixes: str) -> None:
    """Split a tiny checkpoint, then convert it to the formats of `suffixes`, each from the one before."""
    import vraxion_ckpt as vc

    with tempfile.TemporaryDirectory(dir=folder) as place:
        source = f"{place}/tiny.pt"
        inputs.with_losses(source, 10)
        for number, suffix in enumerate(suffixes):
            target = f"{place}/{number}{suffix}"
            vc.convert(source, target, transforms=[] if number else [inputs.SPLIT], to=FORMATS[suffix])
            source = target


def convert_once(source: str, target: str) -> None:
    """Convert a checkpoint to the format of the suffix of `target`."""
    import vraxion_ckpt as vc

    vc.convert(source, target, to=FORMATS[Path(target).suffix])


def convert(
    source: str,
    target: str,
    transforms: Sequence[str] = (),
    repeat: int = 1,
    copy: Sequence[str] = ("cp", "-r"),
    by_hand: bool = False,
) -> Found:
    """Copy and convert a checkpoint, and also split it by hand if `by_hand`, in turn.

    Args:
        source: a checkpoint. Its suffix and that of `target` tell the formats.
        target: a new path. It is removed after each repeat.
        transforms: the chain; ``cast`` stands for the transform of `benchmarks.cast`.
        repeat: how often each is done.
        copy: the command that copies, or empty to leave it out.
        by_hand: whether to split by hand.

    Returns:
        The seconds of each repeat as ``copy``, ``ours`` and ``hand``. As ``added``, the peak of anonymous memory in
        MiB over a process with torch imported.
    """
    before = memory_with_torch()
    import vraxion_ckpt as vc

    chain = [_cast() if name == "cast" else name for name in transforms]
    start, place = Path(source), Path(target)
    warm_up(place.parent, start.suffix, place.suffix)
    found: Found = {"copy": [], "ours": [], "hand": [], "added": []}
    for _ in range(repeat):
        if copy:
            find_memory(bytes_below(start))
            found["copy"].append(timed(lambda: run(*copy, start, place)))
            remove(place)
        find_memory(bytes_below(start))
        cost = watched(lambda: vc.convert(start, place, transforms=chain, to=FORMATS[place.suffix]))
        remove(place)
        found["ours"].append(cost.seconds)
        found["added"].append((cost.peak - before) / MIB)
        if by_hand:
            found["hand"].append(in_child("converting.split_by_hand", source=source, target=target))
            remove(place)
    return found


def _cast() -> Transform:
    """Return the transform that changes every tensor. Importing it imports the program, so not before it is needed."""
    from benchmarks.cast import Cast

    return Cast()


def convert_between_all(source: str) -> list[float]:
    """Convert a checkpoint to each format, and from each to each.

    Returns:
        The peak of anonymous memory of each conversion in MiB, over a process with torch imported.
    """
    before = memory_with_torch()
    import vraxion_ckpt as vc

    def added(start: Path, target: Path) -> float:
        cost = watched(lambda: vc.convert(start, target, to=FORMATS[target.suffix]))
        return (cost.peak - before) / MIB

    first, found = Path(source), []
    warm_up(first.parent, *FORMATS)
    for suffix in FORMATS:
        start = first.with_suffix(suffix)
        if start != first:
            convert_once(source, str(start))
        for other in FORMATS:
            target = start.with_name(f"b{other}")
            found.append(added(start, target))
            remove(target)
        if start != first:
            remove(start)
    return found


def split_by_hand(source: str, target: str) -> float:
    """Split expert 0 with torch alone: load everything, edit and save, without checks. Return seconds."""
    import torch

    def clone(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) else value

    def work() -> None:
        payload = torch.load(source, weights_only=True)
        model, names, optim, new = payload["model"], payload["param_names"], payload["optim"], payload["num_experts"]
        for parent in [name for name in names if name.startswith("head.experts.0.")]:
            child = parent.replace(".0.", f".{new}.", 1)
            model[child] = clone(model[parent])
            state = optim["state"][names.index(parent)]
            optim["state"][len(names)] = {slot: clone(value) for slot, value in state.items()}
            optim["param_groups"][0]["params"].append(len(names))
            names.append(child)
        model["router_map"][:: 2 * new] = new
        payload["num_experts"] = new + 1
        torch.save(payload, target)

    find_memory(2 * bytes_below(Path(source)))
    return timed(work)


def fails_in_limited_space(source: str, target: str, transforms: Sequence[str], spare: int) -> int:
    """Convert with an address space limited to what the process has, plus `spare` bytes.

    Returns:
        1 if the conversion failed, else 0.
    """
    memory_with_torch()
    import vraxion_ckpt as vc

    place = Path(target)
    warm_up(place.parent, Path(source).suffix, place.suffix)
    limit = address_space() + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        vc.convert(source, place, transforms=transforms, to=FORMATS[place.suffix])
    except (vc.CkptError, MemoryError, OSError, RuntimeError):  # RuntimeError: no thread can be started
        return 1
    return 0
