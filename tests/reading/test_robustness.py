"""Inputs that are odd, hostile or too large, and surroundings that refuse: each ends at once with its own exit code."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from support import DATA, bits, load

import vraxion_ckpt as vc
from vraxion_ckpt.errors import SourceError, StorageError, UsageError
from vraxion_ckpt.reading.opening import read

# --- tensors whose strides say nothing ---

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.complex64,
    torch.complex128,
)
# Shape and strides; torch calls all of them contiguous, but for the last two.
STRIDED = {
    "one": ((1,), (2,)),
    "one, stride 0": ((1,), (0,)),
    "one, in three dimensions": ((1, 1, 1), (7, 2**40, 0)),
    "no dimension": ((), ()),
    "a row": ((1, 4), (2**40, 1)),
    "a column": ((4, 1), (1, 0)),
    "none": ((0,), (5,)),
    "none, of five": ((0, 5), (3, 7)),
    "none, of so many": ((3, 0), (2**40, 2**41)),
    "every other one": ((3,), (2,)),
    "transposed, with an odd one": ((2, 1, 3), (1, 5, 2)),
}


def strided(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], first: int = 0) -> torch.Tensor:
    """Return a view of six elements of a dtype, the first at an offset."""
    values = torch.arange(1 + first, 9 + first, dtype=torch.float32)
    storage = (values % 2 == 0) if dtype == torch.bool else values.to(dtype)
    return storage.as_strided(shape, strides, 1)


def odd_checkpoint(path: Path, dtype: torch.dtype) -> Path:
    """Write a checkpoint with such tensors everywhere: in the core, in experts, in slots, in the payload."""
    model: dict[str, Any] = {"router_map": torch.tensor([0, 1, 0, 1])}
    for number, (shape, strides) in enumerate(STRIDED.values()):
        model[f"odd.{number}"] = strided(dtype, shape, strides, number)
    for i in range(2):
        model[f"head.experts.{i}.weight"] = torch.randn(3, 2).t()[:1]
        model[f"head.experts.{i}.scale"] = torch.randn(3, 2)[:1, 0]
    names = [name for name in model if name.startswith("head.")]
    state = {
        i: {
            "step": torch.arange(6.0).reshape(3, 2)[:1, 1].squeeze() + 3,
            "exp_avg": torch.randn(3, 2).t()[:1] if name.endswith("weight") else torch.randn(3, 2)[:1, 0],
            "exp_avg_sq": torch.rand(3, 2).t()[:1] if name.endswith("weight") else torch.rand(3, 2)[:1, 0],
        }
        for i, name in enumerate(names)
    }
    group = {"lr": 0.1, "params": list(range(len(names))), "param_names": names}
    ema = {f"{name} {dtype}": strided(dtype, *how) for name, how in STRIDED.items()}
    optimizer = {"state": state, "param_groups": [group]}
    torch.save({"model": model, "optim": optimizer, "step": 3, "num_experts": 2, "ema": ema}, path)
    return path


def tensors_in(value: Any, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield key, value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from tensors_in(entry, f"{key}/{name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_with_odd_strides_go_through_every_format_and_back(dtype, tmp_path):
    source = odd_checkpoint(tmp_path / "a.pt", dtype)
    before = dict(tensors_in(load(source)))
    assert {name for name, tensor in before.items() if tensor.is_contiguous() and 1 not in tensor.stride()[-1:]}
    losses = {"modular": "ignore"}
    for to, name in (("safetensors", "b.safetensors"), ("modular", "b/"), ("pt", "b.pt")):
        vc.convert(source, tmp_path / name, to=to, losses=losses.get(to, "raise"), manifest=tmp_path / f"{to}.json")
        vc.convert(tmp_path / name, tmp_path / f"{to}.back.pt")
        after = dict(tensors_in(load(tmp_path / f"{to}.back.pt")))
        for key, tensor in before.items():
            assert (after[key].dtype, after[key].shape) == (tensor.dtype, tensor.shape), (to, key)
            assert bits(after[key]) == bits(tensor), (to, key)
        assert vc.diff(source, tmp_path / name).identical or to == "modular"
        assert vc.check(tmp_path / name, manifest=tmp_path / f"{to}.json").sound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_with_odd_strides_are_looked_at_and_changed(dtype, run_cli, tmp_path):
    source = odd_checkpoint(tmp_path / "a.pt", dtype)
    code, told, _ = run_cli("inspect", source, "--values")
    assert (code, "odd" in told) == (0, True)
    assert run_cli("check", source)[0] == 0
    split = "mitosis_split:parent=0,addresses=[0],noise=0.01"
    assert run_cli("convert", source, tmp_path / "b.pt", "-t", split)[0] == 0
    assert run_cli("diff", source, tmp_path / "b.pt")[0] == 1
    assert run_cli("report", tmp_path / "b.pt", "-o", tmp_path / "b.html", "--against", source)[0] == 0
    assert run_cli("edit", tmp_path / "b.pt", "-t", "prune_merge:merge_into=0")[0] == 0
    assert vc.diff(source, tmp_path / "b.pt").model == ()


def test_one_tensor_under_two_names_stays_one_whatever_its_strides_say(tmp_path):
    memory = torch.arange(6.0)
    model = {"a": memory.as_strided((1, 2), (5, 1)), "b": memory.as_strided((1, 2), (1, 1))}
    torch.save({"model": model}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    found = read(tmp_path / "b.safetensors").state_dict()
    assert found["a"].data_ptr() == found["b"].data_ptr()


# --- files that a user names ---


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Give a small checkpoint of three experts on a ring of twelve addresses."""
    return shutil.copy(DATA / "wallclock_experts3.pt", tmp_path / "a.pt")


def special_file(kind: str, folder: Path) -> Path:
    place = folder / "special"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "link to a fifo":
        os.mkfifo(folder / "pipe")
        place.symlink_to("pipe")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place))
    elif kind == "directory":
        place.mkdir()
    elif kind == "missing":
        return place
    elif kind == "too large":
        os.truncate(os.open(place, os.O_CREAT | os.O_RDWR), 2**40)
    else:
        return Path(kind)
    return place


KINDS = ["fifo", "link to a fifo", "socket", "directory", "missing", "too large", "/dev/zero", "/dev/null", "/dev/tty"]
USES = {
    "names": ["convert", "{a}", "{o}", "--param-names", "{file}"],
    "names, to inspect": ["inspect", "{a}", "--param-names", "{file}"],
    "visits": ["convert", "{a}", "{o}", "-t", "arc_meta:visits={file}"],
    "visits, to inspect": ["inspect", "{a}", "--visits", "{file}"],
    "visits, to report": ["report", "{a}", "-o", "{o}.html", "--visits-after", "{file}"],
    "a plan": ["convert", "{a}", "{o}", "-t", "mitosis_split:meta={file}"],
    "a manifest": ["check", "{a}", "--manifest", "{file}"],
    "a recipe": ["run", "{file}"],
}


@pytest.mark.usefixtures("no_reader_waits_for_ever")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", USES)
def test_what_is_no_regular_file_of_bounded_size_is_refused_at_once(use, kind, source, cli, tmp_path):
    file = special_file(kind, tmp_path)
    code, said = cli(*(part.format(a=source, o=tmp_path / "o.pt", file=file) for part in USES[use]))
    large = 2 if "names" in use or use == "a recipe" else 7
    assert code == (large if kind == "too large" else 2), said
    assert str(file) in said
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.parametrize("name", ["v.npy", "v.csv"])
def test_visits_of_other_kinds_are_bounded_too(name, source, cli, tmp_path):
    os.truncate(os.open(tmp_path / name, os.O_CREAT | os.O_RDWR), 2**40)
    assert cli("inspect", source, "--visits", tmp_path / name)[0] == 7
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert cli("inspect", source, "--visits", tmp_path / name)[0] == 2


def test_a_file_without_a_size_is_read_to_its_end(source, cli):
    # /proc says that its files are empty; this one is text, and no list of names.
    code, said = cli("convert", source, source.with_name("o.pt"), "--param-names", "/proc/self/status")
    assert (code, "names" in said) == (9, True) or code == 2


# --- recipes that grow ---


def doubling(levels: int, use: str) -> str:
    lines = ["vars:", "  a0: " + "x" * 100, *(f'  a{i}: "${{a{i - 1}}}${{a{i - 1}}}"' for i in range(1, levels))]
    last = f"${{a{levels - 1}}}"
    return "\n".join([*lines, use.replace("LAST", last)])


GROWING = {
    "doubling": (doubling(40, "source: LAST\ntargets: [y.pt]"), {}, "vars.a13"),
    "a list": (
        doubling(13, "source: a.pt\ntargets:\n" + '- "${a12}"\n' * 4),
        {},
        "targets[0]",
    ),
    "a list of texts": (doubling(12, "source: a.pt\ntargets:\n" + '- "-${a11}-"\n' * 6), {}, "targets[3]"),
    "a step": (
        doubling(13, 'source: a.pt\ntargets: [y.pt]\nchain: ["arc_meta:visits=${a12},output=${a12}${a12}"]'),
        {},
        "chain[0].arc_meta",
    ),
    "settings": ("vars: {a: 1, b: '${a}${a}'}\nsource: '${b}'\ntargets: [y.pt]", {"a": "x" * 2**19}, "vars.b"),
    "one setting": ("vars: {a: 1}\nsource: '${a}'\ntargets: [y.pt]", {"a": "x" * 2**20 + "x"}, "--set.a"),
    "uses of one": (
        "vars:\n  a: " + "x" * 1000 + "\nsource: a.pt\ntargets:\n" + "".join('- "${a}"\n' for _ in range(2000)),
        {},
        "targets[1048]",
    ),
}


@pytest.mark.parametrize(("text", "settings", "place"), GROWING.values(), ids=GROWING)
def test_what_variables_bring_in_is_bounded(text, settings, place, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError) as refused:
            vc.run(recipe, settings=settings)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = str(refused.value)
    assert f"{place}: with the variable 'a" in said
    assert ("line " in said) == (place != "--set.a")
    assert said.count("with the variable") == 1
    assert peak < 64 * 2**20


@pytest.mark.parametrize(
    "text",
    [
        "source: [" + "[]," * 345_000 + "]",
        "".join(f"k{i}: 1\n" for i in range(90_000)),
        "[" * 2000,
        "{a: " * 2000,
        "- " * 2000,
        "#" * (2**20 + 1),
        "vars:\n" + "".join(f"  v{i}: 1\n" for i in range(4000)) + "source: '" + "${w}" * 4000 + "'\ntargets: [y.pt]",
        "source: a.pt\ntargets: [y.pt]\nchain:\n" + '- "mitosis_split:addresses=[0-4999999]"\n' * 1000,
    ],
    ids=["lists", "keys", "brackets", "braces", "dashes", "length", "unknown variables", "ranges"],
)
def test_a_recipe_takes_bounded_time_and_says_a_bounded_amount(text, cli, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    code, said = cli("run", tmp_path / "r.yaml")
    assert code == 2
    assert len(said) < 50_000


# --- places that take no lock ---


@pytest.mark.parametrize("folder", ["/proc", "/sys"])
def test_a_target_where_no_lock_can_be_made_is_an_error_of_storage(folder, source, cli, tmp_path):
    if not os.access(folder, os.X_OK):
        pytest.skip(f"there is no {folder}")
    target = f"{folder}/x.pt"
    (tmp_path / "r.yaml").write_text(f"source: {source}\ntargets: [{target}]")
    visits = tmp_path / "visits.json"
    visits.write_text(json.dumps([1] * 64))
    for command in (
        ("convert", source, target),
        ("run", tmp_path / "r.yaml"),
        ("report", source, "-o", f"{folder}/x.html"),
        ("convert", source, tmp_path / "o.pt", "--manifest", f"{folder}/x.json"),
        ("convert", source, tmp_path / "o.pt", "-t", f"arc_meta:visits={visits},output={folder}/plan.json"),
    ):
        code, said = cli(*command)
        assert code == 14 or (code == 2 and os.geteuid() != 0), said
        assert f"error: {folder}/" in said
        assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "r.yaml", "visits.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOLCK, "No locks available"),
        OSError(errno.EOPNOTSUPP, "Operation not supported"),
        OSError(errno.ENOSYS, "Function not implemented"),
        OSError(errno.EINVAL, "Invalid argument"),
        OSError(errno.EROFS, "Read-only file system"),
        NotImplementedError("no flock here"),
    ],
    ids=lambda error: str(error),
)
def test_a_file_system_without_locks_is_an_error_of_storage_and_nothing_is_left(error, source, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = source.read_bytes()
    for work in (
        lambda: vc.convert(source, tmp_path / "o.pt"),
        lambda: vc.edit(source),
        lambda: vc.report(source, tmp_path / "o.html"),
    ):
        with pytest.raises(StorageError) as refused:
            work()
        assert refused.value.path is not None
        assert str(getattr(error, "strerror", None) or error) in refused.value.message
    assert list(tmp_path.iterdir()) == [source]
    assert source.read_bytes() == before


# --- not enough memory ---


def failing(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(where, fail)


RAN_OUT = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    RuntimeError("unable to mmap 8 bytes from file <a.pt>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("error", RAN_OUT, ids=lambda error: repr(error)[:40])
@pytest.mark.parametrize(
    ("where", "command"),
    [
        ("vraxion_ckpt.formats.torch_reader.read_pickle", "convert {a} {o}.pt"),
        ("vraxion_ckpt.formats.torch_reader.read_pickle", "inspect {a}"),
        ("vraxion_ckpt.formats.torch_reader.read_pickle", "check {a}"),
        ("vraxion_ckpt.formats.torch_reader.read_pickle", "diff {a} {a}"),
        ("vraxion_ckpt.formats.torch_reader.read_pickle", "edit {a} -t {split}"),
        ("vraxion_ckpt.formats.torch_writer.pickled", "convert {a} {o}.pt"),
        ("vraxion_ckpt.formats.torch_writer.pickled", "convert {a} {o}/"),
        ("vraxion_ckpt.formats.torch_writer.pickled", "edit {a} -t {split}"),
        ("vraxion_ckpt.formats.safetensors_writer.write_storages", "convert {a} {o}.safetensors"),
        ("vraxion_ckpt_adapters.pt.PtAdapter.detect", "convert {a} {o}.pt"),
        ("vraxion_ckpt_transforms.mitosis_split.MitosisSplit.apply", "convert {a} {o}.pt -t {split}"),
        ("vraxion_ckpt_adapters.pt.PtAdapter.losses", "inspect {a}"),
        ("vraxion_ckpt.analysis.measurement.bytes_of", "diff {a} {b}"),
        ("vraxion_ckpt.analysis.content_findings.is_finite", "check {a}"),
        ("vraxion_ckpt.analysis.tensor_facts.value_facts", "inspect {a} --values"),
        ("vraxion_ckpt.reporting.report.gather", "report {a} -o {o}.html"),
    ],
)
def test_running_out_of_memory_is_told_whoever_notices(where, command, error, cli, tmp_path, monkeypatch):
    source, other = tmp_path / "a.pt", tmp_path / "b.pt"
    payload = load(DATA / "wallclock_experts3.pt")
    torch.save(payload, source)
    payload["model"]["head.experts.0.weight"] = payload["model"]["head.experts.0.weight"] + 1
    torch.save(payload, other)
    before = source.read_bytes()
    failing(monkeypatch, where, error)
    split = "mitosis_split:parent=0,addresses=[0]"
    code, said = cli(*command.format(a=source, b=other, o=tmp_path / "o", split=split).split())
    assert code == 14, said
    assert "not enough memory" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]
    assert source.read_bytes() == before


def test_words_of_a_checkpoint_are_not_taken_for_a_lack_of_memory(tmp_path):
    torch.save({"model": {"out of memory": [1]}, "step": 0}, tmp_path / "a.pt")
    with pytest.raises(SourceError):
        vc.inspect(tmp_path / "a.pt")


LIMITED = """
import resource, sys
import torch
from vraxion_ckpt.cli import main
import vraxion_ckpt.analysis.checking, vraxion_ckpt.analysis.inspection
import vraxion_ckpt.conversion.convert, vraxion_ckpt.conversion.edit, vraxion_ckpt.plugins.discovery
import vraxion_ckpt.cli.show_changes, vraxion_ckpt.cli.show_findings, vraxion_ckpt.cli.show_inspection
vraxion_ckpt.plugins.discovery.registry()
import rich.console, rich.text  # Python itself, short of memory, fails in odd ways while it imports
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main(sys.argv[2:])
"""


@pytest.mark.one_in(4)
@pytest.mark.parametrize("free", [1, 4, 16, 40, 70, 100, 140, 200, 4000])
def test_a_run_with_too_little_memory_leaves_everything_as_it_was(free, tmp_path):
    torch.manual_seed(0)
    model = {
        "router_map": torch.arange(64) % 3,
        **{f"head.experts.{i}.weight": torch.randn(2**11, 2**11) for i in range(3)},
    }
    names = [name for name in model if name.startswith("head.")]
    slots = {i: {"step": torch.tensor(1.0), "exp_avg": torch.rand(2**11, 2**11)} for i in range(3)}
    optimizer = {"state": slots, "param_groups": [{"lr": 0.1, "params": [0, 1, 2], "param_names": names}]}
    source = tmp_path / "a.pt"
    torch.save({"model": model, "optim": optimizer, "step": 3, "num_experts": 3}, source)
    split = "mitosis_split:parent=0,addresses=[0],noise=0.01"
    for command in (
        ["convert", "a.pt", "o.safetensors", "-t", split],
        ["convert", "a.pt", "o.pt", "-t", split],
        ["check", "a.pt"],
        ["inspect", "a.pt", "--values"],
        ["edit", "a.pt", "-t", split],
    ):
        before = hashlib.sha256(source.read_bytes()).digest()
        done = subprocess.run(
            [forked.python(), "-c", LIMITED, str(free), *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 14), (command, done.stdout, done.stderr)
        assert free < 4000 or done.returncode == 0, done.stderr
        assert free > 4 or done.returncode == 14 or command[0] in ("check", "inspect"), command
        assert (done.returncode == 14) == ("not enough memory" in done.stderr)
        if done.returncode:
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "o"))] == []
            assert hashlib.sha256(source.read_bytes()).digest() == before
        for name in ("o.pt", "o.safetensors"):
            (tmp_path / name).unlink(missing_ok=True)


# --- what cannot be seen ---

# Of each category that is spelt out, and of what is invisible although it counts as a letter or a mark.
UNSEEN = (
    "\x07\x1b\x85\xad\u034f\u061c\u115f\u200b\u200d\u200e\u2028\u2029\u202e\u2060\u2066\u3164\ufe0f\ufeff"
    "\u0378\ue000\U000e0041\U000e0101"
)
SEEN = "é ü 漢 e\u0301 ж ☃"


def test_a_character_that_cannot_be_seen_is_spelt_out_but_in_json(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"w{SEEN}{UNSEEN}\n\r\tx"
    file = f"a{SEEN}{UNSEEN}\n.pt"
    other = {"model": {name: torch.zeros(2)}, name: name, "step": 1}
    torch.save({"model": {name: torch.ones(2)}, name: "w", "step": 1}, "b.pt")
    torch.save(other, "a.pt")
    shutil.move("a.pt", file)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"source": file, "targets": ["b.pt"], name: name}))
    spelt = "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}" for c in UNSEEN)
    for command in (
        ["inspect", file, "--tensors"],
        ["diff", file, "b.pt"],
        ["check", file],
        ["convert", file, f"c{UNSEEN}.pt"],
        ["convert", file, f"c{UNSEEN}.pt"],
        ["convert", file, "d.pt", "-t", f"no{UNSEEN}"],
        ["report", file, "-o", f"c{UNSEEN}.html", "--against", "b.pt"],
        ["run", "r.yaml"],
        ["run", "r.yaml", "--set", f"{UNSEEN}=1"],
    ):
        _, told, said = run_cli(*command)
        shown = (told + said).replace("\n", "")
        assert not set(shown) & set(UNSEEN + "\r\t"), command
        assert "\\u200b" in shown.replace(" ", ""), (command, shown)
        if command[0] in ("inspect", "diff"):
            assert set(SEEN) <= set(shown), command
    assert spelt in "".join(run_cli("inspect", file, "--tensors")[1].split())
    page = (tmp_path / f"c{UNSEEN}.html").read_text()
    assert not set(page.split("<script")[0]) & set(UNSEEN)
    facts = json.loads(run_cli("inspect", file, "--tensors", "--json")[1])
    assert list(facts["tensors"]["model"]) == [name]


# --- a demo, and names that deny a format ---


def test_the_demo_replaces_nothing_but_what_a_demo_has_written(cli, tmp_path):
    for name in ("ckpt_post_split.pt", "ckpt_post_split_modular"):
        folder = tmp_path / name
        folder.mkdir()
        if name.endswith(".pt"):
            shutil.copy(DATA / "wallclock_experts3.pt", folder / name)
        else:
            shutil.copytree(DATA / "modular_experts3", folder / name)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        code, said = cli("demo", folder)
        assert code == 2, said
        assert name in said
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_demo_does_not_replace_what_was_trained_from_its_result(cli, tmp_path):
    assert cli("demo", tmp_path)[0] == 0
    result = tmp_path / "ckpt_post_split.pt"
    payload = load(result)
    payload["model"]["head.experts.1.bias"] += 1  # the history is still that of the demo
    torch.save(payload, result)
    trained = result.read_bytes()
    assert cli("demo", tmp_path)[0] == 2
    assert result.read_bytes() == trained
    result.write_bytes(b"mine")
    assert cli("demo", tmp_path)[0] == 2
    assert result.read_bytes() == b"mine"
    result.unlink()
    assert cli("demo", tmp_path)[0] == 0
    assert cli("demo", tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("command", "denied"),
    [
        ("convert {a} o.pt --to safetensors", "safetensors pt"),
        ("convert {a} o.CKPT --to safetensors", "safetensors pt"),
        ("convert {a} o.pt --to modular", "modular pt"),
        ("convert {a} o.pt/ --to modular", "modular pt"),
        ("run r.yaml", "safetensors pt"),
        ("convert {a} o.pt --manifest m.safetensors", "m.safetensors safetensors"),
        ("report {a} -o out.txt", "HTML text/plain"),
        ("report {a} -o out.pt", "HTML pt"),
        ("report {a} -o out.html.gz", "HTML gzip"),
        ("report {a} --png out.jpg", "PNG image/jpeg"),
        ("report {a} --png out.html", "PNG text/html"),
        ("convert {a} o --to safetensors", ""),
        ("convert {a} o.v2 --to pt", ""),
        ("convert {a} o.pth --to pt", ""),
        ("convert {a} o.pt --manifest m.json", ""),
        ("convert {a} o_modular/ --to modular", ""),
        ("convert {a} shards/ --to safetensors:max_shard_size=1MB", ""),
        ("report {a} -o out", ""),
        ("report {a} -o out.htm --png out.png", ""),
        ("report {a} -o report-1.2", ""),
    ],
)
def test_a_format_that_the_name_denies_is_said(command, denied, source, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("source: a.pt\ntargets: [{path: o.pt, to: safetensors}]")
    code, said = cli(*command.format(a=source).split())
    assert code == 0, said
    warned = [line for line in said.splitlines() if line.startswith("warning: ") and " its name " in line]
    assert len(warned) == bool(denied)
    assert all(word in warned[0] for word in denied.split())


def test_a_torch_file_is_not_given_a_name_that_torch_takes_for_safetensors(source, cli, tmp_path):
    code, said = cli("convert", source, tmp_path / "o.safetensors", "--to", "pt")
    assert code == 2, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]
