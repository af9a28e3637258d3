"""Checkpoints to measure with. Each function runs in a process of its own, since it imports torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EXPERTS, ROWS, WIDTH, RING = 3, 512, 1024, 4096  # the head of `monolith`
CREATED = 3 * 4 * ROWS * (WIDTH + 1) + 8 * RING  # bytes that its split makes: weights, two moments, the router map
LARGEST = 4 * 4096 * WIDTH  # bytes of its largest tensor


def split(experts: int, ring: int) -> str:
    """Return the transform that gives every second address of expert 0 to its clone."""
    return f"mitosis_split:parent=0,addresses=[{','.join(str(at) for at in range(0, ring, 2 * experts))}]"


SPLIT = split(EXPERTS, RING)


def _save(
    path: str,
    params: dict[str, Any],
    experts: int,
    ring: int,
    step: object,
    owners: Tensor | None = None,
    **payload: object,
) -> None:
    """Write a checkpoint with Adam's moments for each parameter. Addresses of the ring alternate between experts."""
    import torch

    state = {i: {"step": step, "exp_avg": p + 1, "exp_avg_sq": p + 2} for i, p in enumerate(params.values())}
    optim = {"state": state, "param_groups": [{"lr": 0.001, "params": list(range(len(params)))}]}
    model = {"router_map": torch.arange(ring) % experts if owners is None else owners, **params}
    whole = {"model": model, "optim": optim, "step": 4, "num_experts": experts, "param_names": list(params)}
    torch.save({**whole, **payload}, path)


def monolith(path: str, gib: float) -> None:
    """Write a checkpoint of about `gib` GiB: layers of 16 MiB, three experts, a small ring."""
    import torch

    layers = max(1, round(gib * 1024 / (3 * 16)))
    params = {f"layers.{i}.weight": torch.rand(4096, WIDTH) for i in range(layers)}
    for expert in range(EXPERTS):
        params[f"head.experts.{expert}.weight"] = torch.rand(ROWS, WIDTH)
        params[f"head.experts.{expert}.bias"] = torch.rand(ROWS)
    _save(path, params, EXPERTS, RING, torch.tensor(4.0))


def many_experts(path: str, experts: int) -> None:
    """Write a checkpoint of small experts with Adam: six tensors for each, and the router map."""
    import torch

    params = {}
    for expert in range(experts):
        params[f"head.experts.{expert}.weight"] = torch.rand(8, 16)
        params[f"head.experts.{expert}.bias"] = torch.rand(8)
    _save(path, params, experts, 16 * experts, 4.0)


def with_losses(path: str, losses: int) -> None:
    """Write a small checkpoint with a list of `losses` numbers in its payload."""
    import torch

    params = {f"head.experts.{expert}.weight": torch.rand(8, 16) for expert in range(EXPERTS)}
    _save(path, params, EXPERTS, RING, 4.0, losses=torch.rand(losses, dtype=torch.float64).tolist())


def with_ring(path: str, ring: int, moved: bool = False) -> None:
    """Write a small checkpoint with a ring of `ring` addresses, each of another owner than the one before.

    With `moved`, expert 1 owns every second address of expert 0.
    """
    import torch

    params = {f"head.experts.{expert}.weight": torch.rand(8, 16) for expert in range(8)}
    owners = torch.arange(ring) % 8
    if moved:
        owners[::16] = 1
    _save(path, params, 8, ring, 4.0, owners)


def directory(root: str, experts: int, size: int, core: int = 64, ring: int = 0) -> None:
    """Write a modular directory with sparse shards of `size` bytes together, but almost nothing on disk.

    The model has `core` rows outside its experts, and a ring of `ring` addresses, or 16 for each expert. The optimizer
    has no state, as plain SGD. Otherwise ``router.state`` would hold tensors of every expert.
    """
    import torch

    place = Path(root)
    (place / "system").mkdir(parents=True)
    (place / "experts").mkdir()
    names = ["embed.weight", *(f"head.experts.{i}.weight" for i in range(experts))]
    optim = {"state": {}, "param_groups": [{"lr": 0.001, "params": list(range(len(names)))}]}
    model = {"router_map": torch.arange(ring or 16 * experts) % experts, "embed.weight": torch.zeros(core, WIDTH)}
    payload = {"model": model, "optim": optim, "step": 4, "num_experts": experts, "param_names": names}
    torch.save(payload, place / "system" / "router.state")
    row = {"tenured": False, "created_step": 0, "last_used_step": 4, "contrib": 0.5}
    meta = {"num_experts": experts, "step": 4, "experts": [{"id": i, **row} for i in range(experts)], "deleted": []}
    (place / "experts" / "meta.json").write_text(json.dumps(meta))
    with _shard(place / "shard", max(1, size // experts // 4 // WIDTH)) as (head, hole, tail):
        for i in range(experts):
            with (place / "experts" / f"expert_{i:03d}.pt").open("xb") as file:
                file.write(head)
                file.seek(hole, 1)
                file.write(tail)


@contextmanager
def _shard(path: Path, rows: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Write one shard in full. Yield the bytes before its zeros, how many zeros follow, and the bytes after them."""
    import torch

    weight = torch.zeros(rows, WIDTH)
    weight[0, 0] = 1  # else all experts would count as hibernated
    torch.save({"weight": weight}, path)
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        (member,) = (each for each in archive.infolist() if each.filename.endswith("data/0"))
        file.seek(member.header_offset)
        lengths = file.read(30)[26:30]  # of the name and of the extra field, which follow the header
        start = file.tell() + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        file.seek(0)
        head = file.read(start + weight.itemsize)
        file.seek(start + member.file_size)
        tail = file.read()
    path.unlink()
    yield head, member.file_size - weight.itemsize, tail
