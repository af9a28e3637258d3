"""Split a large ``.pt``: peak anonymous memory against its bound, and time against `cp` and the naive way.

Anonymous memory is ``RssAnon`` of ``/proc/self/status``: pages of mapped files are not in it, the kernel takes those
back whenever it wants. The bound is the process with torch imported, plus 64 MiB, plus the bytes of the tensors that
the transform creates. Every figure is taken in a process of its own, all in one run.

    python benchmarks/convert_memory.py [--gib 1] [--folder /dev/shm] [--repeat 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

MIB = 2**20
EXPERT_ROWS, WIDTH, EXPERTS, RING = 512, 1024, 3, 4096


def anonymous_bytes() -> int:
    """Return this process's anonymous memory now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Run `work` while another thread samples memory every two milliseconds."""
    peak, done = anonymous_bytes(), threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    before = anonymous_bytes()
    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    done.set()
    sampler.join()
    return {"seconds": seconds, "before": before, "peak": max(peak, anonymous_bytes())}


def make(path: Path, gib: float) -> None:
    """Write a checkpoint of about `gib`: a body of 16 MiB layers with Adam moments, three experts, a ring."""
    import torch

    layers = max(1, int(gib * 1024 / (3 * 16)))
    params = {f"layers.{i}.weight": torch.randn(4096, 1024) for i in range(layers)}
    for expert in range(EXPERTS):
        params[f"head.experts.{expert}.weight"] = torch.randn(EXPERT_ROWS, WIDTH)
        params[f"head.experts.{expert}.bias"] = torch.randn(EXPERT_ROWS)
    state = {
        i: {"step": torch.tensor(4.0), "exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p)}
        for i, p in enumerate(params.values())
    }
    optim = {"state": state, "param_groups": [{"lr": 0.001, "params": list(range(len(params)))}]}
    model = {"router_map": torch.arange(RING) % EXPERTS, **params}
    payload = {"model": model, "optim": optim, "step": 4, "num_experts": EXPERTS, "param_names": list(params)}
    torch.save(payload, path)


def ours(source: Path, target: Path) -> None:
    """Convert with a split, all checks on."""
    import vraxion_ckpt

    addresses = f"[{','.join(str(a) for a in range(0, RING, 2 * EXPERTS))}]"
    vraxion_ckpt.convert(source, target, transforms=[f"mitosis_split:parent=0,addresses={addresses}"])


def naive(source: Path, target: Path) -> None:
    """Do the same by hand: read all, edit, save; no checks."""
    import torch

    payload = torch.load(source, weights_only=True)
    model, names, optim = payload["model"], payload["param_names"], payload["optim"]
    for leaf in ("weight", "bias"):
        parent, child = f"head.experts.0.{leaf}", f"head.experts.{EXPERTS}.{leaf}"
        model[child] = model[parent].clone()
        optim["state"][len(names)] = {k: v.clone() for k, v in optim["state"][names.index(parent)].items()}
        optim["param_groups"][0]["params"].append(len(names))
        names.append(child)
    model["router_map"][0 : RING : 2 * EXPERTS] = EXPERTS
    payload["num_experts"] = EXPERTS + 1
    torch.save(payload, target)


def child(way: str, source: str, target: str) -> None:
    """Measure one way in this process, and print the figures."""
    import torch  # noqa: F401 - the base line is a process that has torch

    work = {"ours": ours, "naive": naive, "cp": lambda s, t: subprocess.run(["cp", s, t], check=True)}[way]
    print(json.dumps(measured(lambda: work(Path(source), Path(target)))))


def run(way: str, source: Path, target: Path) -> dict[str, float]:
    """Measure one way in a new process."""
    command = [sys.executable, __file__, "--child", way, str(source), str(target)]
    figures: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    figures["bytes"] = target.stat().st_size
    target.unlink()
    return figures


def main() -> int:
    """Print the table; return 1 if the memory bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return 0

    folder = Path(tempfile.mkdtemp(prefix="vraxion-bench-", dir=options.folder if options.folder.is_dir() else None))
    try:
        source = folder / "source.pt"
        make(source, options.gib)
        rounds = [
            {way: run(way, source, folder / "target.pt") for way in ("cp", "ours", "naive")}
            for _ in range(options.repeat)
        ]
        size = source.stat().st_size
    finally:
        shutil.rmtree(folder)

    created = 3 * 4 * EXPERT_ROWS * (WIDTH + 1) + 8 * RING  # the clone, its two moments, the router map
    peak = max(r["ours"]["peak"] for r in rounds)
    before = min(r["ours"]["before"] for r in rounds)
    bound = before + 64 * MIB + created
    table = {
        "source_bytes": size,
        "seconds": {way: statistics.median(r[way]["seconds"] for r in rounds) for way in rounds[0]},
        "time_vs_naive": statistics.median(r["ours"]["seconds"] / r["naive"]["seconds"] for r in rounds),
        "time_vs_cp": statistics.median(r["ours"]["seconds"] / r["cp"]["seconds"] for r in rounds),
        "anonymous_bytes": {"torch_imported": before, "peak": peak, "bound": bound, "created_tensors": created},
        "naive_peak_bytes": max(r["naive"]["peak"] for r in rounds),
    }
    print(f"split of a .pt of {size / MIB:,.0f} MiB, median of {options.repeat}")
    print(f"  time against the naive way   {table['time_vs_naive']:.2f} ×   (to reach: ≤ 0.5)")
    print(f"  time against cp              {table['time_vs_cp']:.2f} ×   (to reach: ≤ 1.6)")
    print(
        f"  peak anonymous memory        {peak / MIB:,.0f} MiB (bound: {bound / MIB:,.0f}; {before / MIB:,.0f} "
        f"with torch imported, {created / MIB:,.1f} created)"
    )
    print(f"  the naive way's peak         {table['naive_peak_bytes'] / MIB:,.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))
    return int(peak > bound)


if __name__ == "__main__":
    sys.exit(main())
