"""Checkpoints changed where they lie: the same result as a conversion, only the files that change, nobody else's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import DATA, EXPECTED, MONOLITHS, assert_same, files_below, load
from vraxion_ckpt_adapters.modular import ModularAdapter

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.file_marks import mark_of
from vraxion_ckpt.commit.staging import exclusive
from vraxion_ckpt.errors import BusyError, ChangedError, CkptWarning, InconsistentError, StorageError, UsageError
from vraxion_ckpt.plugin_api import Effect, ReadContext

EXPERTS3 = DATA / "modular_experts3"
SPLIT = "mitosis_split:parent=0,addresses=[0],noise=0"
AGAIN = "mitosis_split:parent=0,addresses=[3]"
PRUNE = "prune_merge:merge_into=0,allow_tenured=true"
RENUMBER = "prune_merge:merge_from=1,merge_into=0,renumber=true,allow_tenured=true"
PLAN = f"arc_meta:visits={EXPECTED}/modular_experts3.visits.json"
FROM_SINGLE = ["single_to_experts", f"arc_meta:visits={EXPECTED}/wallclock_single.visits.json", "mitosis_split"]
SHARDS = "safetensors:max_shard_size=20KB"
ROUTER, META = "system/router.state", "experts/meta.json"

# A chain of each kind, for modular_experts3.
KINDS: dict[str, dict[str, Any]] = {
    "grow": {"transforms": [SPLIT]},
    "shrink": {"transforms": [PRUNE]},
    "router only": {"optimizer": "drop"},
    "rewrite": {"transforms": [RENUMBER]},
}


def lay(folder: Path, source: Path = EXPERTS3, name: str = "run") -> Path:
    """Put a copy of a checkpoint into a folder."""
    folder.mkdir(exist_ok=True)
    target = folder / (name if source.is_dir() else f"{name}.pt")
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return target


def snapshot(folder: Path) -> dict[str, Any]:
    """Note everything below a folder: which file it is, its mode, its time, what it holds; of a folder, no time."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        held = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        when = None if held is None else status.st_mtime_ns
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_mode, when, held)
    return found


def files(target: Path) -> dict[str, Any]:
    """Note the files of a checkpoint without its folders; of one that is a file, ``.``."""
    if target.is_file():
        return {".": snapshot(target.parent)[target.name]}
    return {name: entry for name, entry in snapshot(target).items() if entry[3] is not None}


def contents(target: Path) -> dict[str, bytes]:
    return {name: entry[-1] for name, entry in files(target).items()}


def beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def in_child(work: Callable[[], Any]) -> tuple[int, Any]:
    """Run `work` in a process of its own; return its exit status, and what it returns or what goes wrong, as JSON."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(120)  # what hangs is killed
        try:
            os.write(send, json.dumps(work()).encode())
        except BaseException as error:
            os.write(send, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as told:
        said = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(said) if said else None


def without_rights(work: Callable[[], Any]) -> Any:
    """Run `work` in a process that gives up root's rights, which no folder stops, if it has them."""

    def give_up() -> Any:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return work()

    vc.edit(EXPERTS3, transforms=[SPLIT], dry_run=True)  # imports what could not be read afterwards
    return in_child(give_up)[1]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Give a folder that is not below pytest's own, which cannot be entered without rights."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
        for path in [Path(name), *Path(name).rglob("*")]:
            path.chmod(0o755)


@pytest.fixture
def command(
    run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process, as wide as a terminal; return its exit code and what it printed."""
    monkeypatch.setenv("COLUMNS", "80")
    return run_cli


def by_hand(change: Callable[[vc.Checkpoint], object]) -> vc.Transform:
    """Make a transform of a function that changes a checkpoint."""

    class ByHand(vc.Transform):
        """Change what a test says."""

        name: ClassVar[str] = "by_hand"

        def effect(self) -> Effect:
            return Effect.changed()

        def apply(self, checkpoint: vc.Checkpoint) -> vc.Checkpoint:
            change(checkpoint)
            return checkpoint

    return ByHand()


# --- The result ---

EQUAL: list[tuple[str, str, list[str], dict[str, Any]]] = [
    *(
        (name, "", chain, {})
        for name in ("modular_experts3", "modular_gc", "modular_adapter_experts")
        for chain in ([SPLIT], [SPLIT, AGAIN], [PRUNE], [RENUMBER])
    ),
    ("modular_experts3", "", [PLAN, "mitosis_split"], {}),
    ("modular_experts3", "", [PLAN], {}),
    ("modular_experts3", "", [SPLIT, PRUNE], {}),
    ("modular_experts3", "", [PRUNE, PRUNE, "experts_to_single"], {}),
    ("modular_experts3", "", [SPLIT], {"optimizer": "drop"}),
    ("modular_experts3", "", [SPLIT], {"to": "modular:tenure_all=true"}),
    ("modular_single", "", FROM_SINGLE, {}),
    ("modular_single", "", [*FROM_SINGLE, "prune_merge:merge_into=0", "experts_to_single"], {}),
    ("expected/named_experts3.modular", "", [SPLIT], {}),  # the exploder's meta.json
    *((path.name, "", [SPLIT], {}) for path in MONOLITHS if "single" not in path.name),
    *((path.name, "", FROM_SINGLE, {}) for path in MONOLITHS if "single" in path.name),
    ("wallclock_experts3.pt", "", [RENUMBER, PRUNE, "experts_to_single"], {}),
    ("wallclock_experts3.pt", "", [PLAN, "mitosis_split"], {"optimizer": "drop"}),
    *(("named_experts3.pt", form, [SPLIT, PRUNE, RENUMBER], {}) for form in ("safetensors", SHARDS)),
    *(("wallclock_single.pt", form, FROM_SINGLE, {}) for form in ("safetensors", SHARDS)),
]


@pytest.mark.filterwarnings("ignore:.*is loaded by no runtime")
@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "form", "chain", "options"), EQUAL)
def test_an_edit_in_place_ends_in_what_a_conversion_to_a_new_target_does(name, form, chain, options, tmp_path):
    for folder in ("here", "there", "converted"):
        (tmp_path / folder).mkdir()
    # All have the same name, for it stands in the history.
    here, there, converted = (tmp_path / folder / "run" for folder in ("here", "there", "converted"))
    if form:
        vc.convert(DATA / name, here, to=form)
    else:
        (shutil.copytree if (DATA / name).is_dir() else shutil.copy)(DATA / name, here)
    (shutil.copytree if here.is_dir() else shutil.copy)(here, there)
    options = options | ({"to": form} if form else {})
    vc.convert(there, converted, transforms=chain, **({"to": vc.open(there).origin.format} | options))
    done = vc.edit(here, transforms=chain, **options)
    assert list(checkpoint_differences(vc.open(converted), vc.open(here))) == []
    assert len(done.history) == len(chain)
    assert beside(here) == []
    if here.is_dir():
        assert files_below(here) == files_below(converted)
    for file in files_below(here) if here.is_dir() else ["."]:
        a, b = converted / file, here / file
        if form or b.suffix == ".json":
            assert b.read_bytes() == a.read_bytes()
        else:
            assert_same(load(a), load(b))


def test_what_an_edit_has_done_is_told(tmp_path):
    target = lay(tmp_path)
    done = vc.edit(target, transforms=[PLAN, ("mitosis_split", {"noise": 0})])
    assert isinstance(done, vc.Edited)
    assert isinstance(done, vc.Summary)
    assert (done.source, done.target, done.kept, done.dry_run) == (target, target, None, False)
    assert (done.source_format, done.target_format, done.kind) == ("modular", "modular", "grow")
    assert (done.experts_before, done.experts_after, done.addresses_moved) == (3, 4, 6)
    assert (done.tensors.created, done.tensors.changed, done.tensors.dropped) == (2, 1, 0)
    assert done.function_preserved.changed == 0
    assert "33 parameters" in done.optimizer
    assert [record.name for record in done.history] == ["arc_meta", "mitosis_split"]


# --- The kind ---


def adds_an_expert(checkpoint: vc.Checkpoint) -> None:
    experts = checkpoint.head.experts
    child = len(experts)
    experts[child] = vc.Expert({leaf: tensor + 1 for leaf, tensor in experts[0].items()})
    checkpoint.lifecycle[child] = vc.Lifecycle.fresh(checkpoint.step, like=checkpoint.lifecycle[0])
    names = [checkpoint.head.prefix(child) + leaf for leaf in experts[child]]
    checkpoint.param_names += tuple(names)
    checkpoint.optimizer.groups[0].params += names
    hands_over(checkpoint, child)


def hands_over(checkpoint: vc.Checkpoint, to: int = 1) -> None:
    owners = checkpoint.core["router_map"].clone()
    owners[0] = to
    checkpoint.core["router_map"] = owners


AGED = vc.Lifecycle(last_used_step=4, contrib=99.0, age_steps=9, probation=False)
ages_the_first = by_hand(lambda checkpoint: checkpoint.lifecycle.update({0: AGED}))
ages_the_last = by_hand(lambda checkpoint: checkpoint.lifecycle.update({2: AGED}))
adds_a_note = by_hand(lambda checkpoint: checkpoint.payload.update(note="by hand"))
steps = by_hand(lambda checkpoint: checkpoint.payload.update(step=5))
doubles_an_expert = by_hand(
    lambda checkpoint: checkpoint.head.experts.update(
        {1: vc.Expert({leaf: tensor * 2 for leaf, tensor in checkpoint.head.experts[1].items()})}
    )
)

FOUND: dict[str, tuple[str, str, list[Any], dict[str, Any]]] = {
    "a split": ("grow", "modular_experts3", [SPLIT], {}),
    "two splits": ("grow", "modular_experts3", [SPLIT, AGAIN], {}),
    "a split beside a gap": ("grow", "modular_gc", [SPLIT], {}),
    "an expert by hand": ("grow", "modular_experts3", [by_hand(adds_an_expert)], {}),
    "a first split": ("grow", "modular_single", ["single_to_experts", SPLIT], {}),
    "the last removed": ("shrink", "modular_experts3", [PRUNE], {}),
    "the last two removed": ("shrink", "modular_experts3", [PRUNE, PRUNE, "experts_to_single"], {}),
    "a row of the one removed": ("shrink", "modular_experts3", [ages_the_last, PRUNE], {}),
    "a payload": ("router only", "modular_experts3", [adds_a_note], {}),
    "a router_map": ("router only", "modular_experts3", [by_hand(hands_over)], {}),
    "a plan": ("router only", "modular_experts3", [PLAN], {}),
    "a split taken back": ("router only", "modular_experts3", [SPLIT, PRUNE], {}),
    "the optimizer": ("router only", "modular_gc", [], {"optimizer": "drop"}),
    "a step that meta.json has not": ("router only", "expected/named_experts3.modular", [steps], {}),
    "a step that meta.json has": ("rewrite", "modular_experts3", [steps], {}),
    "an old row": ("rewrite", "modular_experts3", [ages_the_first], {}),
    "an old row and a split": ("rewrite", "modular_experts3", [ages_the_first, SPLIT], {}),
    "an expert's weights": ("rewrite", "modular_experts3", [doubles_an_expert], {}),
    "one grows, one shrinks": ("rewrite", "modular_experts3", [PRUNE, "mitosis_split:parent=1,addresses=[1]"], {}),
    "renumbered": ("rewrite", "modular_experts3", [RENUMBER], {}),
    "tenured": ("rewrite", "modular_experts3", [], {"to": "modular:tenure_all=true"}),
    "one file": ("replace", "wallclock_experts3.pt", [SPLIT], {}),
}


@pytest.mark.parametrize(("kind", "name", "chain", "options"), FOUND.values(), ids=FOUND)
def test_the_kind_follows_from_what_changed_and_only_that_is_written(kind, name, chain, options, tmp_path):
    target = lay(tmp_path, DATA / name)
    before = files(target)
    done = vc.edit(target, transforms=chain, **options)
    after = files(target)
    # A file that stays is the same inode, with the same time and bytes, whatever the kind.
    changed = {file for file, entry in after.items() if before.get(file) != entry}
    assert done.kind == kind
    assert set(done.written) == changed
    assert set(done.removed) == before.keys() - after.keys()
    assert done.untouched == len(after.keys() - changed)
    assert done.bytes_written == sum(len(after[file][-1]) for file in changed)
    assert len(done.written) == len(changed)
    assert all((target / file).stat().st_nlink == 1 for file in after)
    assert beside(target) == []
    assert not list(tmp_path.rglob(".*"))


def test_where_a_loader_would_make_rows_up_the_directory_is_rewritten(tmp_path):
    target = lay(tmp_path)
    (target / META).unlink()
    with pytest.warns(CkptWarning, match=r"meta\.json is missing"):
        done = vc.edit(target, transforms=[SPLIT])
    assert (done.kind, done.written) == ("rewrite", (ROUTER, "experts/expert_003.pt", META))


def test_without_a_chain_there_is_nothing_to_change(tmp_path, command):
    for target in (lay(tmp_path), lay(tmp_path, DATA / "wallclock_single.pt")):
        before = snapshot(tmp_path)
        for options in ([], ["--keep-old"], ["--dry-run"]):
            code, said, complained = command("edit", target, *options)
            assert (code, complained) == (0, "")
            assert "nothing to change" in said
            assert snapshot(tmp_path) == before
        done = vc.edit(target)
        assert (done.kind, done.written, done.bytes_written, done.kept) == ("nothing", (), 0, None)
        assert done.untouched == len(files(target))


# --- Other people's files ---


def lay_strangers(target: Path) -> set[str]:
    """Put files of others into a checkpoint's directory; return what has come."""
    before = snapshot(target).keys()
    (target / "notes.txt").write_text("mine")
    (target / "experts/train.log").write_text("step 4")
    (target / "logs/old").mkdir(parents=True)
    (target / "logs/events").write_bytes(b"\0" * 100)
    (target / "logs/old/events").write_bytes(b"\1" * 100)
    (target / "system/empty").mkdir()
    for link, place in {"latest": "notes.txt", "newest": "logs", "lost": "nowhere"}.items():
        (target / link).symlink_to(place)
    return snapshot(target).keys() - before


@pytest.mark.parametrize("keep_old", [False, True], ids=["", "keep_old"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_peoples_files_stay_where_they_are(kind, keep_old, tmp_path):
    target = lay(tmp_path)
    strangers = lay_strangers(target)
    before = snapshot(target)
    done = vc.edit(target, keep_old=keep_old, **KINDS[kind])
    after = snapshot(target)
    assert done.kind == ("rewrite" if keep_old else kind)
    assert len(strangers) == 10
    for name in strangers:
        (inode, *was), (now, *still) = before[name], after[name]
        assert still == was
        if was[-1] is not None:  # of folders, a rewrite makes new ones
            assert (now == inode) is not keep_old
    assert not set(done.written) & strangers
    assert after.keys() - before.keys() <= {"experts/expert_003.pt"}


class Whole(vc.Adapter):
    """The modular directory, written as a whole."""

    name: ClassVar[str] = "modular"

    @property
    def is_directory(self) -> bool:
        return True

    @classmethod
    def detect(cls, path: Path) -> bool:
        return ModularAdapter.detect(path)

    def read(self, path: Path, context: ReadContext) -> vc.Checkpoint:
        return ModularAdapter().read(path, context)

    def write(self, checkpoint: vc.Checkpoint, path: Path) -> None:
        ModularAdapter().write(checkpoint, path)

    def foreign_files(self, path: Path) -> list[Path] | None:
        return ModularAdapter().foreign_files(path)


class Silent(Whole):
    """The modular directory, without telling its own files from others'."""

    foreign_files = vc.Adapter.foreign_files


def test_a_format_that_does_not_tell_its_files_apart_is_rewritten_with_those_of_others(tmp_path):
    target = lay(tmp_path)
    strangers = lay_strangers(target)
    done = vc.edit(target, transforms=[SPLIT], from_=Whole())
    assert (done.kind, done.written, done.removed, done.untouched) == ("rewrite", (".",), (), 0)
    before = snapshot(target)
    assert strangers < before.keys()
    with pytest.raises(UsageError, match="cannot distinguish its own files from foreign ones"):
        vc.edit(target, transforms=[SPLIT], from_=Silent())
    assert snapshot(target) == before


def test_other_peoples_files_stay_in_a_folder_of_shards(tmp_path):
    target = tmp_path / "run"
    vc.convert(DATA / "named_experts3.pt", target, to=SHARDS)
    (target / "tokenizer").mkdir()
    (target / "tokenizer/vocab.json").write_text("{}")
    before = contents(target)
    assert vc.edit(target, transforms=[SPLIT], to=SHARDS, keep_old=True).kind == "rewrite"
    assert contents(tmp_path / "run.old") == before
    assert (target / "tokenizer/vocab.json").read_text() == "{}"
    assert vc.open(target).num_experts == 4


# --- What is opened, read and written ---


def make_directory(root: Path, experts: int) -> Path:
    """Write a modular directory of many small experts, and plain SGD."""
    (root / "system").mkdir(parents=True)
    (root / "experts").mkdir()
    names = ["embed.weight", *(f"head.experts.{i}.weight" for i in range(experts))]
    optim = {"state": {}, "param_groups": [{"lr": 0.001, "params": list(range(len(names)))}]}
    model = {"router_map": torch.arange(4 * experts) % experts, "embed.weight": torch.zeros(256, 1024)}
    payload = {"model": model, "optim": optim, "step": 4, "num_experts": experts, "param_names": names}
    torch.save(payload, root / ROUTER)
    row = {"tenured": False, "created_step": 0, "last_used_step": 4, "contrib": 0.5}
    rows = [{"id": i, **row} for i in range(experts)]
    (root / META).write_text(json.dumps({"num_experts": experts, "step": 4, "experts": rows, "deleted": []}))
    torch.save({"weight": torch.rand(2, 1024)}, root / "experts/expert_000.pt")
    for i in range(1, experts):
        shutil.copy(root / "experts/expert_000.pt", root / f"experts/expert_{i:03d}.pt")
    return root


def bytes_moved() -> tuple[int, int]:
    """Return how many bytes this process has asked the system to read and to write."""
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["rchar"]), int(facts["wchar"])


def test_growth_touches_the_router_the_rows_and_two_shards_however_many_there_are(tmp_path):
    vc.edit(EXPERTS3, transforms=[SPLIT], dry_run=True)  # whatever is imported is not counted
    for experts in (64, 512):
        target = make_directory(tmp_path / f"{experts}", experts)
        three = [ROUTER, META, "experts/expert_000.pt"]
        new = [ROUTER, META, f"experts/expert_{experts:03d}.pt"]
        had = sum((target / name).stat().st_size for name in three)
        before = files(target)

        def grow(target: Path = target) -> list[Any]:
            opened: set[str] = set()
            sys.addaudithook(lambda event, facts: opened.add(str(facts[0])) if event == "open" else None)
            start = bytes_moved()
            kind = vc.edit(target, transforms=[SPLIT]).kind
            moved = [end - begin for begin, end in zip(start, bytes_moved(), strict=True)]
            below = [Path(path) for path in opened if path.startswith(f"{target}/")]
            return [kind, *moved, [str(path.relative_to(target)) for path in below if path.is_file()]]

        status, (kind, read, wrote, opened) = in_child(grow)
        assert (status, kind, sorted(opened)) == (0, "grow", sorted(three))
        made = sum((target / name).stat().st_size for name in new)
        # The kernel's copies count as read and written. Each new file is read back once, to verify what was written.
        assert read <= 1.1 * (had + made)
        assert wrote <= 1.1 * made
        after = files(target)
        assert {name for name in after if after[name] != before.get(name)} == set(new)


# --- The previous state ---


@pytest.mark.parametrize("source", [EXPERTS3, DATA / "wallclock_experts3.pt"], ids=["directory", "file"])
def test_the_previous_states_are_kept_bit_by_bit_and_apart(source, tmp_path):
    target = lay(tmp_path, source)
    if target.is_dir():
        lay_strangers(target)
    states = [contents(target)]
    places = [target.with_name(f"{target.name}.old"), target.with_name(f"{target.name}.old2")]
    for chain, place in zip([SPLIT, AGAIN], places, strict=True):
        done = vc.edit(target, transforms=[chain], keep_old=True)
        assert (done.kind, done.kept) == ("rewrite" if target.is_dir() else "replace", place)
        states.append(contents(target))
    assert [contents(place) for place in (*places, target)] == states
    assert [vc.open(place).num_experts for place in (*places, target)] == [3, 4, 5]
    assert beside(target) == [place.name for place in places]
    inodes = [entry[0] for place in (target, *places) for entry in files(place).values()]
    assert len(inodes) == len(set(inodes))
    (target if target.is_file() else target / ROUTER).write_bytes(b"a trainer writes into it")
    assert [contents(place) for place in places] == states[:-1]


# --- Dry runs ---


@pytest.mark.parametrize("keep_old", [False, True], ids=["", "keep_old"])
@pytest.mark.parametrize("kind", [*KINDS, "replace"])
def test_a_dry_run_tells_what_a_real_one_then_does_and_touches_nothing(kind, keep_old, tmp_path):
    target = lay(tmp_path, DATA / "wallclock_experts3.pt" if kind == "replace" else EXPERTS3)
    if target.is_dir():
        (target / "logs").mkdir()
        (target / "logs/events").write_bytes(b"\0" * 100)
    options = KINDS.get(kind, {"transforms": [SPLIT]}) | {"keep_old": keep_old}
    before, folders = snapshot(tmp_path), [tmp_path, *tmp_path.rglob("*")]
    times = [folder.stat().st_mtime_ns for folder in folders]
    dry = vc.edit(target, dry_run=True, **options)
    assert snapshot(tmp_path) == before
    assert [folder.stat().st_mtime_ns for folder in folders] == times  # a lock would have left its trace there
    wet = vc.edit(target, **options)
    assert (dry.dry_run, dry.kept) == (True, None)
    for fact in vars(wet).keys() - {"seconds", "dry_run", "kept"}:
        assert getattr(dry, fact) == getattr(wet, fact), fact
    assert dry.bytes_written > 0


def test_a_dry_run_works_in_a_read_only_folder_and_a_real_one_is_refused(open_folder):
    target = lay(open_folder / "place")
    real = vc.edit(lay(open_folder / "other"), transforms=[SPLIT])
    for path in [target, *target.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    target.parent.chmod(0o555)
    before = snapshot(target.parent)

    def try_it() -> list[Any]:
        dry = vc.edit(target, transforms=[SPLIT], dry_run=True)
        with pytest.raises(UsageError) as refused:
            vc.edit(target, transforms=[SPLIT])
        return [dry.kind, dry.bytes_written, refused.value.exit_code, str(refused.value)]

    told = without_rights(try_it)
    assert told == ["grow", real.bytes_written, 2, f"{target.parent}: the folder is not writable"]
    assert snapshot(target.parent) == before


# --- The command ---


def test_the_command_tells_people_and_scripts_the_same(tmp_path, command):
    a, b = lay(tmp_path / "a"), lay(tmp_path / "b")
    code, text, complained = command("edit", a, "-t", SPLIT, "--keep-old")
    assert (code, complained) == (0, "")
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    text = text.replace("\n           ", "")  # a long path goes on in the next line
    for part in ("rewrite", "experts/expert_003.pt", "3 files", "3 → 4, 1 address moved", "run.old", "KiB"):
        assert part in text
    code, said, _ = command("edit", b, "-t", SPLIT, "--keep-old", "--json")
    facts = json.loads(said)
    assert (code, facts["schema"], facts["target"]) == (0, "vraxion-ckpt/edit/1", str(b))
    assert (facts["kind"], facts["kept"], facts["untouched"]) == ("rewrite", f"{b}.old", 3)
    assert facts["written"] == [ROUTER, "experts/expert_003.pt", META]
    assert (facts["removed"], facts["dry_run"], facts["side_files"]) == ([], False, [])
    assert facts["tensors"] == {"copied": 27, "renamed": 0, "created": 2, "changed": 1, "dropped": 0}
    assert contents(a) == contents(b)
    code, text, _ = command("edit", a, "-t", PRUNE, "--dry-run")
    for part in ("would edit", "shrink", "would write", "would remove  experts/expert_003.pt", "to write"):
        assert part in text
    assert "step" not in text


def test_quiet_and_verbose_and_defaults_from_the_environment(tmp_path, command, monkeypatch):
    target = lay(tmp_path)
    monkeypatch.chdir(target)
    assert command("-q", "edit", ".", "-t", SPLIT) == (0, "", "")
    assert "mitosis_split (vraxion-ckpt" in command("-v", "edit", target, "-t", AGAIN)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VRAXION_CKPT_EDIT_KEEP_OLD", "1")
    assert command("edit", target, "-t", PRUNE)[0] == 0
    assert beside(target) == ["run.old"]


REFUSED: dict[str, tuple[int, list[str], str]] = {
    "missing": (2, ["none", "-t", SPLIT], "none: no such file or directory"),
    "another format": (2, ["run", "-t", SPLIT, "--to", "pt"], "has the format modular, which an edit"),
    "another form": (2, ["shards", "-t", SPLIT, "--to", "safetensors"], "is not a file"),
    "an index": (2, ["shards/model.safetensors.index.json"], "edit the whole checkpoint"),
    "unknown transform": (2, ["run", "-t", "mitosis_splt"], "did you mean 'mitosis_split'?"),
    "a plan in the target": (2, ["run", "-t", f"{PLAN},output=run/plan.json"], "must not be the target or inside it"),
    "a folder inside": (3, ["run/experts", "-t", SPLIT], "format not recognised"),
    "a mix of two saves": (8, ["mixed", "-t", SPLIT], "parts of two saves"),
    "a mix, no chain": (8, ["mixed"], "parts of two saves"),
    "no plan": (10, ["run", "-t", "mitosis_split"], "there is no plan"),
    "refused at the end": (10, ["run", "-t", SPLIT, "-t", SPLIT], "address 0 belongs to expert 3"),
    "a single head": (10, ["single", "-t", SPLIT], "put single_to_experts before this step"),
}


@pytest.mark.parametrize(("code", "arguments", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_everything_as_it_was(code, arguments, says, tmp_path, command, monkeypatch):
    for name, source in {"run": EXPERTS3, "mixed": EXPERTS3, "single": DATA / "modular_single"}.items():
        lay(tmp_path, source, name)
    vc.convert(DATA / "named_experts3.pt", tmp_path / "shards", to=SHARDS)
    meta = json.loads((tmp_path / "mixed" / META).read_text())
    (tmp_path / "mixed" / META).write_text(json.dumps(meta | {"step": 3}))  # router.state is of step 4
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    exit_code, told, complained = command("edit", *arguments)
    assert (exit_code, told) == (code, "")
    assert says in complained
    assert "Traceback" not in complained
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("source", [EXPERTS3, DATA / "wallclock_experts3.pt"], ids=["directory", "file"])
def test_a_link_stays_one_and_what_it_leads_to_is_edited(source, tmp_path):
    real = lay(tmp_path / "real", source)
    (tmp_path / "latest").symlink_to(f"real/{real.name}")
    done = vc.edit(tmp_path / "latest", transforms=[RENUMBER], keep_old=True)
    assert (done.target, done.kept) == (real, real.with_name(f"{real.name}.old"))
    assert (tmp_path / "latest").readlink() == Path(f"real/{real.name}")
    assert vc.open(tmp_path / "latest").num_experts == 2
    assert beside(tmp_path / "latest") == ["real"]


# --- Modes and owners ---


@pytest.mark.parametrize("kind", [*KINDS, "kept", "replace"])
def test_modes_and_where_root_edits_owners_stay(kind, tmp_path):
    target = lay(tmp_path, DATA / "wallclock_experts3.pt" if kind == "replace" else EXPERTS3)
    options = {"transforms": [SPLIT], "keep_old": kind == "kept"} if kind in ("kept", "replace") else KINDS[kind]
    for path in [target, *target.rglob("*")]:
        path.chmod(0o750 if path.is_dir() else 0o640)
        if os.getuid() == 0:
            os.chown(path, 1234, 1234)
    if target.is_dir():
        (target / "experts").chmod(0o2770)
    places = [target, *target.rglob("*")]

    def rights() -> dict[Path, tuple[int, int, int]]:
        return {p: (p.stat().st_mode, p.stat().st_uid, p.stat().st_gid) for p in places if p.exists()}

    before = rights()
    vc.edit(target, **options)
    after = rights()
    assert len(after) >= len(before) - 1
    assert after.items() <= before.items()


# --- Side files ---


def test_a_plan_is_written_once_more_only_where_it_says_the_same(tmp_path):
    output = tmp_path / "plan.json"
    chain = [f"{PLAN},output={output}", "mitosis_split"]
    assert vc.edit(lay(tmp_path / "a"), transforms=chain).side_files == (output,)
    expected = json.loads((EXPECTED / "modular_experts3.mitosis_meta.json").read_text())
    assert json.loads(output.read_text())["hot_addresses"] == expected["hot_addresses"]
    # As a run that was killed after the plan, and is made again.
    assert vc.edit(lay(tmp_path / "b"), transforms=chain).experts_after == 4
    assert contents(tmp_path / "a/run") == contents(tmp_path / "b/run")
    output.write_text("something else")
    target = lay(tmp_path / "c")
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=r"plan\.json: exists already"):
        vc.edit(target, transforms=chain)
    assert snapshot(tmp_path) == before


# --- Another run, and what a dead one has left ---


def test_a_second_run_is_busy_until_the_first_is_dead(tmp_path, command):
    target = lay(tmp_path)
    before = snapshot(target)
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        try:
            with exclusive(target):
                os.write(send, b"!")
                signal.pause()  # until it is killed; a process that waits for it waits forever
        finally:
            os._exit(0)
    try:
        assert os.read(receive, 1) == b"!"
        code, _, complained = command("edit", target, "-t", SPLIT)
        assert (code, "another run is at work on it" in complained) == (16, True)
        with pytest.raises(BusyError):
            vc.convert(DATA / "modular_gc", f"{target}/", overwrite=True)
        assert vc.edit(target, transforms=[SPLIT], dry_run=True).kind == "grow"  # only looks
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(receive)
        os.close(send)
    assert beside(target) == [".run.vraxion-ckpt.lock"]
    assert snapshot(target) == before
    assert vc.edit(target, transforms=[SPLIT]).experts_after == 4
    assert beside(target) == []


def die_before_the_commit(target: Path, name: str = ROUTER) -> None:
    """Grow in a process that is killed when all is in place but the router, or before another file is exchanged."""
    exchange = system_calls.exchange

    def dying(one: Path, other: Path) -> None:
        if other == target / name:
            os.kill(os.getpid(), signal.SIGKILL)
        exchange(one, other)

    def grow() -> None:
        system_calls.exchange = dying
        vc.edit(target, transforms=[SPLIT])

    assert in_child(grow) == (-signal.SIGKILL, None)


def test_an_interrupted_edit_is_told_of_and_mended(tmp_path, command):
    target = lay(tmp_path)
    before = contents(target)
    die_before_the_commit(target)
    assert contents(target).keys() - before.keys() == {"experts/expert_003.pt"}
    for arguments in (["inspect", target], ["convert", target, tmp_path / "new.pt"], ["edit", target, "--dry-run"]):
        code, _, complained = command(*arguments)
        assert code == InconsistentError.exit_code
        assert f"`vraxion-ckpt edit {target}`" in complained
    assert command("edit", target)[0] == 0
    assert contents(target) == before
    assert beside(target) == []
    assert command("inspect", target)[0] == 0


def test_an_interrupted_edit_that_can_be_read_is_the_old_state_and_told_of(tmp_path, command):
    target = lay(tmp_path)
    before = contents(target)
    die_before_the_commit(target, META)  # the new shard is there, and router and rows are old
    assert contents(target).keys() - before.keys() == {"experts/expert_003.pt"}
    for arguments in (["inspect", target], ["convert", target, tmp_path / "new.pt"], ["edit", target, "--dry-run"]):
        code, _, complained = command(*arguments)
        assert code == 0
        assert f"an edit of this checkpoint was interrupted; run `vraxion-ckpt edit {target}`" in complained
    assert command("check", target)[0] == 1
    assert load(tmp_path / "new.pt")["num_experts"] == 3
    assert command("edit", target)[0] == 0
    assert contents(target) == before


def test_the_next_run_cleans_up_and_touches_nothing_that_only_looks_like_a_leftover(tmp_path):
    target = lay(tmp_path)
    die_before_the_commit(target)  # with a journal
    for name in (".run.0123456789abcdef.stage", ".run.fedcba9876543210.stage"):
        (tmp_path / name / "run/system").mkdir(parents=True)
    (tmp_path / ".run.0123456789abcdef.stage/run" / ROUTER).write_text("half")
    (tmp_path / ".run.fedcba9876543210.stage/journal.json").write_text('{"version": 1, "change"')
    others = [
        ".run.0123456789abcde.stage",
        ".run.0123456789ABCDEF.stage",
        ".run.0123456789abcdef.stage.bak",
        ".run2.0123456789abcdef.stage",
        "run.0123456789abcdef.stage",
    ]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "journal.json").write_text("mine")
    (tmp_path / ".run.aaaaaaaaaaaaaaaa.stage").write_text("a file")
    with pytest.warns(CkptWarning, match="an interrupted edit was rolled back"):
        assert vc.edit(target, transforms=[SPLIT]).experts_after == 4
    assert beside(target) == sorted([*others, ".run.aaaaaaaaaaaaaaaa.stage"])
    assert all((tmp_path / name / "journal.json").read_text() == "mine" for name in others)


# --- other people's files, and rights ---


def test_a_relative_link_that_leads_out_of_the_directory_is_no_reason_to_refuse(tmp_path):
    target = lay(tmp_path)
    (tmp_path / "data").mkdir()
    (target / "data").symlink_to("../data")
    assert vc.edit(target, transforms=[RENUMBER]).kind == "rewrite"
    assert (target / "data").readlink() == Path("../data")


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_pipe_or_a_socket_of_others_does_not_stop_a_rewrite(kind, open_folder):
    target = lay(open_folder / "a")
    with socket.socket(socket.AF_UNIX) as listening:
        os.mkfifo(target / "it") if kind == "pipe" else listening.bind(str(target / "it"))
        assert in_child(lambda: vc.edit(target, transforms=[RENUMBER]).kind) == (0, "rewrite")


@pytest.mark.parametrize("what", ["a plan", "links, kept", "safetensors", "shards"])
def test_the_bytes_that_a_dry_run_tells_are_those_of_the_real_run(what, tmp_path):
    target, options = lay(tmp_path / "here"), {"transforms": [SPLIT]}
    if what == "a plan":
        options = {"transforms": [f"{PLAN},output={tmp_path}/plan.json", "mitosis_split"]}
    elif what == "links, kept":
        options["keep_old"] = True
        lay_strangers(target)
    else:
        options["to"] = "safetensors" if what == "safetensors" else SHARDS
        target = tmp_path / f"run.{what}"
        vc.convert(DATA / "named_experts3.pt", target, to=options["to"])
    assert vc.edit(target, dry_run=True, **options).bytes_written == vc.edit(target, **options).bytes_written


def test_a_router_inside_a_checkpoint_is_refused_with_what_to_name_instead(tmp_path, command):
    target = lay(tmp_path)
    before = snapshot(tmp_path)
    code, _, complained = command("edit", target / ROUTER, "-t", SPLIT)
    assert code == 2
    assert f"is a part of the checkpoint {target}" in complained
    assert "edit the whole checkpoint" in complained
    assert snapshot(tmp_path) == before


def test_no_file_of_others_is_lost_to_a_new_shard_of_its_name(tmp_path):
    target = tmp_path / "run"
    vc.convert(DATA / "named_experts3.pt", target, to=SHARDS)
    vc.edit(shutil.copytree(target, tmp_path / "try"), transforms=[SPLIT], to="safetensors:max_shard_size=5KB")
    mine = contents(tmp_path / "try").keys() - contents(target).keys()
    for name in mine:
        (target / name).write_text("mine")
    with suppress(vc.CkptError):
        vc.edit(target, transforms=[SPLIT], to="safetensors:max_shard_size=5KB")
    assert {(target / name).read_text() for name in mine} == {"mine"}


@pytest.mark.parametrize("what", ["a new file", "a replaced file"])
def test_nothing_is_lost_that_others_write_into_the_directory_during_a_rewrite(what, tmp_path, monkeypatch):
    target, exchange = lay(tmp_path), system_calls.exchange
    late = target / "train.log"
    if what == "a replaced file":
        late.write_text("one")

    def others_first(one: Path, other: Path) -> None:
        if not (tmp_path / "done").exists():
            (tmp_path / "done").touch()
            (target / "new").write_text("one, two")
            (target / "new").replace(late)
        exchange(one, other)

    monkeypatch.setattr(system_calls, "exchange", others_first)
    with suppress(ChangedError):  # as where a trainer writes
        vc.edit(target, transforms=[RENUMBER])
    assert late.exists()
    assert late.read_text() == "one, two"


@pytest.mark.parametrize("options", [{}, {"keep_old": True}], ids=["grow", "rewrite"])
def test_a_new_shard_is_as_private_as_its_siblings(options, tmp_path):
    target = lay(tmp_path)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
        if os.getuid() == 0:
            os.chown(path, 1234, 1234)
    vc.edit(target, transforms=[SPLIT], **options)
    shards = [(target / f"experts/expert_00{i}.pt").stat() for i in (0, 3)]
    assert (shards[1].st_mode, shards[1].st_uid) == (shards[0].st_mode, shards[0].st_uid)


def test_a_refusal_for_a_read_only_subfolder_leaves_no_stage(open_folder):
    target = lay(open_folder / "place")
    for path in [target.parent, target, *target.rglob("*")]:
        if os.getuid() == 0:
            os.chown(path, 65534, 65534)
    (target / "experts").chmod(0o555)

    def refused() -> str:
        with pytest.raises(UsageError) as error:
            vc.edit(target, transforms=[SPLIT])
        return str(error.value)

    assert "experts: the folder is not writable" in without_rights(refused)
    assert beside(target) == []


def test_no_place_to_edit_is_no_bug_of_ours(command):
    assert command("edit", "/")[0] == UsageError.exit_code


def test_other_peoples_files_are_not_counted_as_the_checkpoints(tmp_path):
    target = lay(tmp_path)
    (target / "notes.txt").write_text("mine")
    assert vc.edit(target).untouched == 5


# --- transforms that cheat: what an edit leaves where it is must be what it was ---


def write_into_a_shard(checkpoint: vc.Checkpoint) -> None:
    checkpoint.head.experts[1]["weight"].mul_(2)


def change_an_expert(checkpoint: vc.Checkpoint) -> None:
    checkpoint.head.experts[1].tensors["weight"] = torch.zeros(4, 16)


@pytest.mark.parametrize("change", [write_into_a_shard, change_an_expert])
def test_an_expert_that_was_changed_instead_of_replaced_is_refused(change, tmp_path):
    target = lay(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(vc.CkptError) as refused:
        vc.edit(target, transforms=[by_hand(change)])
    assert refused.value.exit_code == 15
    assert snapshot(tmp_path) == before


# --- what must not be edited from here ---


def test_a_directory_that_one_stands_in_is_not_exchanged_under_ones_feet(tmp_path, monkeypatch):
    target = lay(tmp_path)
    for here in (target, target / "experts"):
        monkeypatch.chdir(here)
        with pytest.raises(UsageError, match="the current directory"):
            vc.edit(target, transforms=[RENUMBER])
    assert vc.edit(target, transforms=[SPLIT]).kind == "grow"


@pytest.mark.skipif(os.getuid() != 0, reason="needs leave to mount")
@pytest.mark.parametrize("chain", [SPLIT, RENUMBER])
def test_what_is_mounted_inside_is_not_touched(chain, tmp_path):
    target, disk_of_others = lay(tmp_path), tmp_path / "disk of others"
    disk_of_others.mkdir()
    (disk_of_others / "log").write_text("mine")
    (target / "my logs").mkdir()
    if subprocess.run(["mount", "--bind", disk_of_others, target / "my logs"], check=False).returncode:
        pytest.skip("no leave to mount")
    try:
        before = snapshot(target)
        with pytest.raises(StorageError, match="mounted"):
            vc.edit(target, transforms=[chain])
        assert snapshot(target) == before
    finally:
        subprocess.run(["umount", target / "my logs"], check=True)
    assert beside(target) == ["disk of others"]
    assert (disk_of_others / "log").read_text() == "mine"


def test_a_journal_that_leads_out_by_a_link_is_not_followed(tmp_path):
    target, victim = lay(tmp_path), tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("mine")
    (target / "x").symlink_to(victim)
    stage = tmp_path / ".run.0123456789abcdef.stage"
    (stage / "run").mkdir(parents=True)
    router, precious = ([*mark_of(path)] for path in (target / ROUTER, victim / "precious"))
    change = {"pivot": ROUTER, "first": [], "later": [], "removed": ["x/precious"]}
    facts = {"version": 1, "stage": stage.stat().st_ino, "change": change, "keep_old": False}
    facts |= {"old": {ROUTER: router, "x/precious": precious}, "new": {ROUTER: router}}
    (stage / "journal.json").write_text(json.dumps(facts))
    with pytest.raises(StorageError, match="not a journal of this version"):
        vc.edit(target)
    assert (victim / "precious").read_text() == "mine"


def test_a_checkpoint_that_was_copied_after_a_kill_is_not_guessed_about(tmp_path):
    target = lay(tmp_path / "here")
    die_before_the_commit(target)
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    (tmp_path / "copy" / ".run.vraxion-ckpt.lock").unlink()
    left = contents(tmp_path / "copy")
    with pytest.raises(StorageError, match="copied or restored"):
        vc.edit(tmp_path / "copy" / "run")
    assert contents(tmp_path / "copy") == left
    with pytest.warns(CkptWarning, match="rolled back"):
        vc.edit(target)
    assert contents(target) == contents(DATA / "modular_experts3")


def test_a_checkpoint_that_was_removed_after_a_kill_can_be_made_anew(tmp_path):
    target = lay(tmp_path)
    die_before_the_commit(target)
    shutil.rmtree(target)
    with pytest.warns(CkptWarning, match="rolled back"):
        vc.convert(DATA / "named_experts3.pt", f"{target}/")
    assert beside(target) == []


def test_an_expert_that_was_not_opened_before_an_edit_is_not_taken_for_the_one_before(tmp_path):
    target = lay(tmp_path)
    checkpoint = vc.open(target)
    vc.edit(target, transforms=[RENUMBER])
    with pytest.raises(ChangedError):
        _ = checkpoint.head.experts[1]["weight"]


def test_a_signal_that_is_ignored_when_the_command_starts_stays_ignored():
    """As with nohup."""
    script = (
        "import signal; from vraxion_ckpt.support import signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); signals.raise_on_signals()\n"
        "signal.raise_signal(signal.SIGHUP); print('still here')\n"
        "try: signal.raise_signal(signal.SIGTERM)\n"
        "except signals.Interrupted as stop: print(stop.number)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["still here", str(int(signal.SIGTERM))]


def test_a_signal_that_a_finalizer_loses_is_raised_later_and_not_printed_as_an_error():
    script = (
        "import signal; from vraxion_ckpt.support import signals\n"
        "class Loses:\n"
        "    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "class Fails:\n"
        "    def __del__(self): 1 / 0\n"
        "signals.raise_on_signals(); Loses(); Fails()\n"
        "try: signals.raise_pending()\n"
        "except signals.Interrupted as stop: print(stop.number)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(int(signal.SIGINT))]
    assert "Interrupted" not in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_nobody_else_reads_what_is_staged(tmp_path, monkeypatch):
    modes, exchange = [], system_calls.exchange

    def look(one: Path, other: Path) -> None:
        stage = next(path for path in one.parents if path.name.endswith(".stage"))
        modes.append(stage.stat().st_mode & 0o777)
        exchange(one, other)

    monkeypatch.setattr(system_calls, "exchange", look)
    vc.edit(lay(tmp_path), transforms=[SPLIT])
    assert set(modes) == {0o700}


def test_a_trainer_that_makes_the_same_shard_meanwhile_keeps_it(tmp_path, monkeypatch):
    target, rename_new = lay(tmp_path), system_calls.rename_new
    theirs = target / "experts/expert_003.pt"

    def after_them(one: Path, other: Path) -> None:
        theirs.write_text("theirs")
        rename_new(one, other)

    monkeypatch.setattr(system_calls, "rename_new", after_them)
    with pytest.raises(ChangedError) as caught:
        vc.edit(target, transforms=[SPLIT])
    assert caught.value.path == theirs
    assert theirs.read_text() == "theirs"
    theirs.unlink()
    assert contents(target) == contents(DATA / "modular_experts3")
