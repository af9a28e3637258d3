"""Measure the cost of conversions, as ratios to a simple operation that is measured in the same run.

Each ratio is a median over alternating repeats (ours, the other, ours, the other, …), because machines are noisy. Each
conversion runs in its own process. Its time is the time of `convert` with all checks on. Imports and the search for
plugins are excluded, also for the operation that it is compared with. Before each measurement, as much memory as the
result needs is allocated and freed, so that neither waits for the host of a virtual machine to provide it. For
commands, the whole process is timed.

Peak anonymous memory is `RssAnon` of ``/proc/self/status``, sampled every few milliseconds. It excludes pages of mapped
files. Its bound is the memory of the process after importing torch, plus 64 MiB, plus the bytes of the tensors that a
transform creates.

Times depend on the machine, and small sizes make fixed costs look large. So a missed ratio is only printed, but the
exit code is 1 if a memory bound is exceeded.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 2**20
ROWS, WIDTH, EXPERTS, RING = 512, 1024, 3, 4096  # the checkpoint that is converted
CREATED = 3 * 4 * ROWS * (WIDTH + 1) + 8 * RING  # bytes that its split creates: clone, two moments, router map
SPLIT = f"mitosis_split:parent=0,addresses=[{','.join(str(a) for a in range(0, RING, 2 * EXPERTS))}]"
SHARD = round(100e9 / 4096)  # bytes of each inspected expert
TORCH = [sys.executable, "-c", "import torch"]
COMMAND = [sys.executable, "-m", "vraxion_ckpt.cli"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    measured: float
    to_reach: float
    unit: str = "×"

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.measured <= self.to_reach

    def __str__(self) -> str:
        form = f"8.{0 if self.unit == 'MiB' else 2}f"
        verdict = "met" if self.met else "NOT met"
        measured, to_reach = (f"{value:{form}} {self.unit:<3}" for value in (self.measured, self.to_reach))
        return f"{self.what:<39} {measured} ≤ {to_reach} {verdict:>9}"


# --- Measurements in a child process ---


def anonymous_bytes() -> int:
    """Return the current anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def find_memory(size: int) -> None:
    """Allocate `size` bytes of memory, touch every page, and free them."""
    if size:
        with mmap.mmap(-1, size) as memory:
            for at in range(0, size, mmap.PAGESIZE):
                memory[at] = 1


def watched(work: Callable[[], object]) -> dict[str, float]:
    """Run `work`. Return its seconds and the peak of anonymous memory in bytes, sampled by another thread."""
    peak, done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.004):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    finally:  # else the thread would keep a failed process alive
        done.set()
        watcher.join()
    return {"seconds": seconds, "peak": max(peak, anonymous_bytes())}


def convert(source: str, target: str, *transforms: str) -> dict[str, float]:
    """Convert with all checks on."""
    import torch  # noqa: F401 - the baseline is a process with torch imported

    before = anonymous_bytes()
    import vraxion_ckpt.conversion.convert
    import vraxion_ckpt.plugins.discovery

    vraxion_ckpt.plugins.discovery.adapters()
    find_memory(_bytes_below(Path(source)))
    found = watched(lambda: vraxion_ckpt.conversion.convert.convert(source, target, transforms=transforms))
    return {**found, "before": before}


def naive(source: str, target: str) -> dict[str, float]:
    """Split with torch alone: load everything, edit and save, without checks."""
    import torch

    def split() -> None:
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

    find_memory(2 * _bytes_below(Path(source)))
    return watched(split)


def arc_meta(folder: str, ring: str, repeat: str) -> dict[str, float]:
    """Plan a split of a ring from visits in a ``.npy`` file; compare with one `numpy.cumsum` of them."""
    import numpy as np
    import torch

    from vraxion_ckpt.checkpoint.head import Expert, Head, HeadKind
    from vraxion_ckpt.checkpoint.model import Checkpoint
    from vraxion_ckpt.plugins.discovery import resolve_chain

    size, path = int(ring), Path(folder) / "visits.npy"
    visits = np.random.default_rng(5).integers(0, 1000, size)
    np.save(path, visits)
    experts = {i: Expert({"weight": torch.zeros(1)}) for i in range(8)}
    checkpoint = Checkpoint({"router_map": torch.arange(size) % 8}, Head(HeadKind.EXPERTS, experts, 1))
    (step,) = resolve_chain([f"arc_meta:visits={path}"])
    pairs = [
        (timed(lambda: step.transform.apply(checkpoint.copy())), timed(lambda: np.cumsum(visits)))
        for _ in range(int(repeat))
    ]
    path.unlink()
    return {"seconds": min(ours for ours, _ in pairs), "ratio": statistics.median(ours / sums for ours, sums in pairs)}


def edit(root: str, address: str) -> dict[str, float]:
    """Split expert 0 of a modular directory in place. Count the files that are opened, the bytes read and written."""
    import vraxion_ckpt.conversion.edit
    import vraxion_ckpt.plugins.discovery

    vraxion_ckpt.plugins.discovery.adapters()
    place = Path(root)
    before = {str(file): file.stat().st_size for file in place.rglob("*") if file.is_file()}
    opened: set[str] = set()

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]) in before:
            opened.add(str(arguments[0]))

    sys.addaudithook(note)
    wrote = _bytes_written()
    split = f"mitosis_split:parent=0,addresses=[{address}],noise=0"
    found = watched(lambda: vraxion_ckpt.conversion.edit.edit(place, transforms=[split]))
    wrote = _bytes_written() - wrote
    experts = sum(1 for name in before if name.endswith(".pt"))
    new = ["system/router.state", "experts/meta.json", f"experts/expert_{experts:03d}.pt"]
    needed = ["system/router.state", "experts/meta.json", "experts/expert_000.pt"]
    return {
        "seconds": found["seconds"],
        "shards": sum(1 for name in opened if name.endswith(".pt")),
        "read": sum(before[name] for name in opened) / sum(before[str(place / name)] for name in needed),
        "written": wrote / sum((place / name).stat().st_size for name in new),
    }


def _bytes_written() -> int:
    """Return the number of bytes that this process has written."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    "convert": convert,
    "naive": naive,
    "arc_meta": arc_meta,
    "edit": edit,
}


# --- Checkpoints to convert ---


def make_monolith(path: Path, gib: float) -> None:
    """Write a checkpoint of about `gib` GiB: 16 MiB layers with Adam moments, three experts, a ring."""
    import torch

    layers = max(1, round(gib * 1024 / (3 * 16)))
    params = {f"layers.{i}.weight": torch.rand(4096, 1024) for i in range(layers)}
    for expert in range(EXPERTS):
        params[f"head.experts.{expert}.weight"] = torch.rand(ROWS, WIDTH)
        params[f"head.experts.{expert}.bias"] = torch.rand(ROWS)
    state = {
        i: {"step": torch.tensor(4.0), "exp_avg": p + 1, "exp_avg_sq": p + 2} for i, p in enumerate(params.values())
    }
    optim = {"state": state, "param_groups": [{"lr": 0.001, "params": list(range(len(params)))}]}
    model = {"router_map": torch.arange(RING) % EXPERTS, **params}
    payload = {"model": model, "optim": optim, "step": 4, "num_experts": EXPERTS, "param_names": list(params)}
    torch.save(payload, path)


def make_sparse_directory(root: Path, experts: int, size: int, core: int = 64, ring: int = 0) -> None:
    """Write a modular directory with sparse shards: `size` bytes together, but almost nothing on disk.

    The model has `core` rows outside its experts, and a ring of `ring` addresses, or 16 for each expert. The optimizer
    has no state, as plain SGD. Otherwise ``router.state`` would hold tensors of every expert.
    """
    import torch

    from vraxion_ckpt.formats import torch_archive, zip_directory

    (root / "system").mkdir(parents=True)
    (root / "experts").mkdir()
    names = ["embed.weight", *(f"head.experts.{i}.weight" for i in range(experts))]
    optim = {"state": {}, "param_groups": [{"lr": 0.001, "params": list(range(len(names)))}]}
    model = {"router_map": torch.arange(ring or 16 * experts) % experts, "embed.weight": torch.zeros(core, WIDTH)}
    payload = {"model": model, "optim": optim, "step": 4, "num_experts": experts, "param_names": names}
    torch.save(payload, root / "system" / "router.state")
    row = {"tenured": False, "created_step": 0, "last_used_step": 4, "contrib": 0.5}
    meta = {"num_experts": experts, "step": 4, "experts": [{"id": i, **row} for i in range(experts)], "deleted": []}
    (root / "experts" / "meta.json").write_text(json.dumps(meta))

    # Write one shard in full. The others get its bytes before and after the tensor, with a hole between them.
    model_shard = root / "shard"
    weight = torch.zeros(max(1, size // experts // 4 // WIDTH), WIDTH)
    weight[0, 0] = 1  # else all experts would count as hibernated
    torch.save({"weight": weight}, model_shard)
    (hole,) = torch_archive.check_archive(model_shard).storages()
    with zip_directory.mapped(model_shard) as data:
        head, tail = bytes(data[: hole.start + weight.itemsize]), bytes(data[hole.start + hole.size :])
    model_shard.unlink()
    for i in range(experts):
        with (root / "experts" / f"expert_{i:03d}.pt").open("xb") as file:
            file.write(head)
            file.seek(hole.size - weight.itemsize, os.SEEK_CUR)
            file.write(tail)


# --- The table ---


class Bench:
    """The measurements. Each row is printed as soon as it is known."""

    def __init__(self, folder: Path, repeat: int) -> None:
        self.folder = folder
        self.repeat = repeat
        self.rows: list[Row] = []

    def conversions(self, gib: float) -> None:
        """Compare conversions between formats with a plain copy."""
        source, modular, tensors = self.folder / "a.pt", self.folder / "a", self.folder / "a.safetensors"
        make_monolith(source, gib)
        self.conversion(".pt → .pt, a split", source, "b.pt", [SPLIT], CREATED, by_hand=True)
        self.conversion(".pt → modular", source, "b/")
        child("convert", source, f"{modular}/")
        self.conversion(".pt → safetensors", source, "b.safetensors")
        child("convert", source, tensors)
        source.unlink()
        self.conversion("modular → .pt", modular, "b.pt")
        shutil.rmtree(modular)
        self.conversion("safetensors → .pt", tensors, "b.pt")
        tensors.unlink()

    def conversion(
        self,
        what: str,
        source: Path,
        target: str,
        transforms: Sequence[str] = (),
        created: int = 0,
        *,
        by_hand: bool = False,
    ) -> None:
        """Compare one conversion's time with `cp`, and its memory with its bound."""
        path = self.folder / target
        where = str(path) + ("/" if target.endswith("/") else "")
        copies, ours, hands = [], [], []
        for _ in range(self.repeat):
            find_memory(_bytes_below(source))
            copies.append(timed(lambda: subprocess.run(["cp", "-r", source, path], check=True)))
            _remove(path)
            ours.append(child("convert", source, where, *transforms))
            _remove(path)
            if by_hand:
                hands.append(child("naive", source, where)["seconds"])
                _remove(path)
        seconds = [each["seconds"] for each in ours]
        if by_hand:
            self.add(Row(f"{what} / by hand", _ratio(seconds, hands), 0.5))
        self.add(Row(f"{what} / cp", _ratio(seconds, copies), 1.6))
        bound = min(each["before"] for each in ours) + 64 * MIB + created
        self.add(Row(f"{what}, peak memory", max(each["peak"] for each in ours) / MIB, bound / MIB, "MiB"))

    def editing(self, gib: float, experts: int) -> None:
        """Grow modular directories with few and many experts in place. Their router.state has the same size."""
        few = min(64, experts)
        core = max(64, round(gib * 2**30 / 4 / WIDTH))
        seconds: dict[int, list[float]] = {few: [], experts: []}
        found: list[dict[str, float]] = []
        for number in seconds:
            root = self.folder / f"edit{number}"
            make_sparse_directory(root, number, number * 2**16, core, 32 * experts)
            for turn in range(self.repeat):
                found.append(child("edit", root, 2 * number * (turn + 1)))
                seconds[number].append(found[-1]["seconds"])
            shutil.rmtree(root)
        self.add(Row("edit, grow: read / three files", max(each["read"] for each in found), 1.1))
        self.add(Row("edit, grow: written / three files", max(each["written"] for each in found), 1.1))
        self.add(Row("edit, grow: shards opened", max(each["shards"] for each in found), 1, ""))
        self.add(Row("edit, grow: many / few experts, time", _ratio(seconds[experts], seconds[few]), 1))

    def commands(self, experts: int) -> None:
        """Compare commands that open few files or none with the import of torch."""
        many = self.folder / "many"
        make_sparse_directory(many, experts, experts * SHARD)
        self.command("inspect, many experts / import torch", ["inspect", many], 1.5)
        shutil.rmtree(many)
        self.command("--help / import torch", ["--help"], 0.25)
        self.command("--version / import torch", ["--version"], 0.25)
        self.command("a usage error / import torch", ["convert"], 0.25, code=2)

    def command(self, what: str, arguments: Sequence[str | Path], to_reach: float, code: int = 0) -> None:
        """Measure one command."""

        def run() -> None:
            done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
            if done.returncode != code:
                raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stderr}")

        pairs = [(timed(run), timed(lambda: subprocess.run(TORCH, check=True))) for _ in range(self.repeat)]
        self.add(Row(what, statistics.median(ours / torch for ours, torch in pairs), to_reach))

    def planning(self, ring: int) -> None:
        """Measure the planning of a split."""
        found = child("arc_meta", self.folder, ring, self.repeat)
        self.add(Row("arc_meta / numpy.cumsum", found["ratio"], 20))

    def add(self, row: Row) -> None:
        """Print and store a row."""
        self.rows.append(row)
        print(row, flush=True)


def child(kind: str, *arguments: object) -> dict[str, float]:
    """Measure in a new process. Raise RuntimeError if it fails."""
    command = [sys.executable, __file__, "--child", kind, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind} failed: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def timed(work: Callable[[], object]) -> float:
    """Return the duration of `work` in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def _bytes_below(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def main() -> int:
    """Print the table. Return 1 if a memory bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.5, help="size of the checkpoint to convert (default: 0.5)")
    parser.add_argument("--experts", type=int, default=4096, help="experts to inspect, of 24 MB each (default: 4096)")
    parser.add_argument("--ring", type=int, default=10**7, help="addresses to plan a split on (default: 10000000)")
    parser.add_argument("--repeat", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to work (default: /dev/shm, a RAM disk, if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *arguments = options.child
        print(json.dumps(CHILDREN[kind](*arguments)))
        return 0

    ram_disk = Path("/dev/shm")
    parent = options.folder or (ram_disk if ram_disk.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="vraxion-bench-", dir=parent) as folder:
        bench = Bench(Path(folder), options.repeat)
        print(f"{options.gib:g} GiB to convert, {options.experts} experts of {SHARD / 1e6:.0f} MB to inspect, ", end="")
        print(f"a ring of {options.ring}; median of {options.repeat}")
        print(f"{'work':<39} {'measured':>10} {'to reach':>13}")
        bench.conversions(options.gib)
        bench.editing(options.gib, options.experts)
        bench.commands(options.experts)
        bench.planning(options.ring)
    if options.json:
        machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "system": platform.release()}
        sizes = {name: getattr(options, name) for name in ("gib", "experts", "ring", "repeat")}
        rows = [{**asdict(row), "met": row.met} for row in bench.rows]
        options.json.write_text(json.dumps({"machine": machine, "sizes": sizes, "rows": rows}, indent=2) + "\n")
    return int(any(not row.met for row in bench.rows if row.unit == "MiB"))


if __name__ == "__main__":
    sys.exit(main())
