"""Reading and planning as they are measured. The functions of this module run in processes of their own."""

from __future__ import annotations

import gc
from pathlib import Path

from benchmarks.converting import memory_with_torch
from benchmarks.measuring import MIB, Found, timed, watched


def open_many(path: str, repeat: int) -> Found:
    """Open a checkpoint and load it with torch, in turn. Return the seconds of both."""
    import torch

    import vraxion_ckpt as vc

    found: Found = {"ours": [], "others": []}
    for turn in range(repeat + 1):
        ours = timed(lambda: vc.open(path))
        gc.collect()
        others = timed(lambda: torch.load(path, mmap=True, weights_only=True))
        gc.collect()
        if turn:  # the first one warms up
            found["ours"].append(ours)
            found["others"].append(others)
    return found


def look(command: str, path: str, other: str, numbers: str, tiny: str, repeat: int) -> Found:
    """Run `inspect`, `diff` or `check` on a ring, and read and compare its map with numpy, in turn.

    Args:
        command: the name of the function.
        path: the checkpoint.
        other: the one to compare it with, for ``diff``.
        numbers: the router map alone, as a ``.npy`` file.
        tiny: a small checkpoint to warm up with.
        repeat: how often.

    Returns:
        The seconds of both, and as ``added`` the peak of anonymous memory in bytes over a process with torch imported.
    """
    before = memory_with_torch()
    import numpy as np

    import vraxion_ckpt as vc

    def ours(source: str, second: str) -> object:
        return vc.diff(source, second) if command == "diff" else getattr(vc, command)(source)

    def by_numpy() -> None:
        owners = np.load(numbers)
        np.count_nonzero(owners[1:] != owners[:-1])

    ours(tiny, tiny)
    by_numpy()
    found: Found = {"ours": [], "others": [], "added": []}
    for _ in range(repeat):
        gc.collect()
        cost = watched(lambda: ours(path, other))
        found["ours"].append(cost.seconds)
        found["others"].append(timed(by_numpy))
        found["added"].append(cost.peak - before)
    return found


def plan(path: str, folder: str, repeat: int) -> Found:
    """Plan and split a ring from random visits, and sum them up with `numpy.cumsum`, in turn. Return seconds."""
    import numpy as np
    from vraxion_ckpt_transforms.arc_meta import ArcMeta
    from vraxion_ckpt_transforms.mitosis_split import MitosisSplit

    import vraxion_ckpt as vc

    checkpoint = vc.open(path)
    assert checkpoint.router_map is not None
    visits = np.random.default_rng(5).integers(0, 1000, len(checkpoint.router_map))
    file = Path(folder) / "visits.npy"
    np.save(file, visits)
    planner, splitter = ArcMeta(visits=file), MitosisSplit()
    found: Found = {"ours": [], "others": []}
    for turn in range(repeat + 1):
        ours = timed(lambda: splitter.apply(planner.apply(checkpoint.copy())))
        others = timed(lambda: np.cumsum(visits))
        if turn:
            found["ours"].append(ours)
            found["others"].append(others)
    file.unlink()
    return found


def save_router_map(path: str, numbers: str) -> int:
    """Write the router map of a checkpoint as a ``.npy`` file. Return its size in bytes."""
    import numpy as np
    import torch

    owners = torch.load(path, weights_only=True)["model"]["router_map"].numpy()
    np.save(numbers, owners)
    return int(owners.nbytes)


def split_losses(source: str, target: str, repeat: int) -> Found:
    """Split a checkpoint, and load and save it with torch, in turn. Return the seconds of both."""
    import torch

    import vraxion_ckpt as vc
    from benchmarks.converting import warm_up
    from benchmarks.inputs import SPLIT

    place = Path(target)
    warm_up(place.parent, place.suffix)
    found: Found = {"ours": [], "others": []}
    for _ in range(repeat):
        found["ours"].append(timed(lambda: vc.convert(source, target, transforms=[SPLIT])))
        place.unlink()
        found["others"].append(timed(lambda: torch.save(torch.load(source, weights_only=True), target)))
        place.unlink()
    return found


def memory_by_size(source: str, target: str) -> float:
    """Return the peak of anonymous memory of a split, over a process with torch imported, by the size of the file."""
    from benchmarks.converting import convert
    from benchmarks.inputs import SPLIT

    added = convert(source, target, [SPLIT], copy=())["added"][0]
    return added * MIB / Path(source).stat().st_size
