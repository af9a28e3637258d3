"""One edit of each kind as input of the commit layer: the files before and after, and which of them change.

The files come from real edits of the fixtures. Thousands of tries run the commit layer alone with these bytes;
`perform` does what an edit does after its tensors are written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from loader import resume
from support import DATA

import vraxion_ckpt as vc
from vraxion_ckpt.commit import system_calls
from vraxion_ckpt.commit.file_marks import survey
from vraxion_ckpt.commit.journal import FileChanges
from vraxion_ckpt.commit.staging import exclusive, staged

Tree = Mapping[str, bytes]  # by relative path; "." for a target that is a file

SPLIT = "mitosis_split:parent=0,addresses=[0],noise=0"
EARLIER = "mitosis_split:parent=0,addresses=[3],noise=0"


@dataclass(frozen=True)
class Scenario:
    """An edit, or a conversion to a target that may exist.

    Attributes:
        old: the files before; empty if the target is new.
        exchange: whether the file system can exchange two names.
        links: whether it has hard links.
        touched: the call at which a trainer rewrites the same bytes, if it does; the run must then fail.
    """

    name: str
    old: Tree
    new: Tree
    change: FileChanges = field(default_factory=FileChanges)
    keep_old: bool = False
    exchange: bool = True
    links: bool = True
    touched: str = ""

    @property
    def is_file(self) -> bool:
        """Whether the target is one file."""
        return "." in self.new

    def lay(self, folder: Path) -> Path:
        """Write the old state into an empty folder; return the target."""
        target = folder / ("run.pt" if self.is_file else "run")
        if self.old:
            write_tree(target, self.old)
        return target

    def perform(self, target: Path) -> None:
        """Do what an edit does between writing tensors and printing its summary."""
        with exclusive(target):
            marks = survey(target) if self.old else {}
            with staged(target, directory=not self.is_file, overwrite=True, change=self.change) as stage:
                whole = self.change.exchanged == "."
                for name, content in self.new.items():
                    place = stage.path / name
                    for folder in reversed(place.relative_to(stage.path).parents[:-1]):
                        if not (stage.path / folder).exists():
                            system_calls.mkdir(stage.path / folder)
                    if self.old.get(name) != content:
                        system_calls.write_new(place, content)
                    elif whole:
                        (system_calls.copy if self.keep_old else system_calls.link_or_copy)(target / name, place)
                stage.publish(watched=marks, keep_old=self.keep_old)

    def again(self, target: Path) -> None:
        """Run again after an unexpected end, as a user would to get the new state."""
        with exclusive(target):
            pass
        if read_tree(target) != self.new:
            self.perform(target)

    def judge(self, target: Path) -> str:
        """Return which state a trainer would resume: ``old``, ``new``, or a description of another one."""
        found = resume(target)
        if not self.old and found is None:
            return "old"
        for which in ("old", "new"):
            if found is not None and found == self.values(which):
                return which
        return f"neither: {found}"

    def values(self, which: str) -> object:
        """Return what a trainer resumes from the old or the new state."""
        return _VALUES[self.name, which]


_VALUES: dict[tuple[str, str], object] = {}


def write_tree(target: Path, tree: Tree) -> None:
    """Write files without flushing."""
    for name, content in tree.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def read_tree(target: Path) -> dict[str, bytes]:
    """Read all files of a target."""
    if target.is_file():
        return {".": target.read_bytes()}
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def beside(target: Path) -> list[str]:
    """List the other files in the folder of a target."""
    return sorted(path.name for path in target.parent.iterdir() if path != target)


# --- the edits ---


def _edit(folder: Path, stem: str, chain: list[str], *, first: list[str] | None = None, **options: object) -> Scenario:
    """Run a real edit, after an optional first one, and return the files that it changed."""
    source = DATA / stem
    target = folder / stem
    shutil.rmtree(target, ignore_errors=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    if first:
        vc.edit(target, transforms=first)
    old = read_tree(target)
    done = vc.edit(target, transforms=chain, **options)  # type: ignore[arg-type]
    index = "system/router.state"
    rest = tuple(name for name in done.written if name != index)
    change = {
        "router only": FileChanges(index),
        "grow": FileChanges(index, first=rest),
        "shrink": FileChanges(index, later=rest, removed=done.removed),
    }.get(done.kind, FileChanges())
    return Scenario(f"{done.kind}: {stem}", old, read_tree(target), change)


def build(folder: Path) -> list[Scenario]:
    """Make all scenarios."""
    prune = "prune_merge:merge_into=0,allow_tenured=true"
    renumber = "prune_merge:merge_from=1,merge_into=0,renumber=true,allow_tenured=true"
    grow = _edit(folder, "modular_experts3", [SPLIT])
    shrink = _edit(folder, "modular_experts3", [prune])
    rewrite = _edit(folder, "modular_experts3", [renumber], first=[EARLIER])
    router = _edit(folder, "modular_experts3", [], optimizer="drop")
    file = _edit(folder, "wallclock_experts3.pt", [SPLIT])
    over = _edit(
        folder, "trainers/modular_leftover_shard", [SPLIT]
    )  # the name of a new shard is in use by one of an earlier save
    assert over.change.first[0] in over.old
    cases = [
        grow,
        _edit(folder, "modular_gc", [SPLIT]),
        _edit(folder, "modular_adapter_experts", [SPLIT]),
        _edit(folder, "modular_single", ["single_to_experts", SPLIT]),
        shrink,
        _edit(folder, "modular_single", [prune, "experts_to_single"], first=["single_to_experts", SPLIT]),
        router,
        rewrite,
        file,
        over,
        _edit(folder, "trainers/modular_gc_shards_left", [SPLIT]),
        _edit(folder, "trainers/exploded_single", ["single_to_experts", SPLIT]),
    ]
    variants = [
        *(_variant(case, "no exchange", exchange=False) for case in (grow, shrink, router, file, over)),
        *(_variant(case, "no links", links=False) for case in (rewrite,)),
        _variant(grow, "neither", exchange=False, links=False),
        *(_variant(case, "kept", change=FileChanges(), keep_old=True) for case in (grow, file)),
        _variant(file, "new", old={}),
        _variant(grow, "new", old={}, change=FileChanges()),
        *(_variant(case, "a trainer writes", touched="write_new") for case in (grow, shrink, rewrite, file)),
        *(_variant(case, "a trainer writes last", touched="exchange") for case in (shrink, file)),
    ]
    for case in (*cases, *variants):
        for which, tree in (("old", case.old), ("new", case.new)):
            shutil.rmtree(folder / "values", ignore_errors=True)
            target = folder / "values" / ("run.pt" if case.is_file else "run")
            write_tree(target, tree)
            _VALUES[case.name, which] = resume(target) if tree else None
        assert _VALUES[case.name, "old"] != _VALUES[case.name, "new"]
    return [*cases, *variants]


def _variant(case: Scenario, how: str, **changes: object) -> Scenario:
    return Scenario(**{**vars(case), "name": f"{case.name}, {how}", **changes})  # type: ignore[arg-type]


# --- recorded and failing system calls ---

Hook = Callable[[int, str, tuple[Path, ...]], None]
CALLS = (
    "mkdir",
    "write_new",
    "fsync",
    "rename",
    "rename_new",
    "exchange",
    "link_or_copy",
    "copy",
    "copy_mode_and_owner",
    "unlink",
    "rmdir",
)


@contextmanager
def watched_disk(
    hook: Hook, case: Scenario, *, after: Hook | None = None, left_out: Callable[[Path], bool] | None = None
) -> Iterator[None]:
    """Call `hook` with number, name and arguments before each call of the commit layer that changes the disk.

    `left_out` selects the calls of fsync that are not made.
    """
    number = 0

    def wrap(name: str) -> Callable[..., None]:
        original = getattr(system_calls, name)

        def call(*arguments: Path) -> None:
            nonlocal number
            number += 1
            mine = number
            hook(mine, name, arguments)
            if name == "fsync" and left_out is not None and left_out(*arguments):
                return
            if name == "exchange" and not case.exchange:
                raise system_calls.ExchangeUnavailableError(22, "Invalid argument", str(arguments[1]))
            if name == "link_or_copy" and not case.links:
                system_calls.copy(*arguments)
                return
            original(*arguments)
            if after is not None:
                after(mine, name, arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(system_calls, name, wrap(name))
        yield


def trainer_writes(case: Scenario, target: Path) -> Hook:
    """Return a hook with which a trainer saves the same bytes again, before the journal or before the commit."""

    def write(_: int, name: str, arguments: tuple[Path, ...]) -> None:
        moment = arguments[0].name == "journal.json" or arguments[-1] == target / case.change.exchanged
        if name == case.touched and moment:
            for file in [target] if case.is_file else target.rglob("*"):
                if file.is_file():
                    rewrite(file)

    return write


def rewrite(file: Path) -> None:
    """Save a file as trainers do: write a temporary file and rename it."""
    other = file.with_name(f".tmp.{file.name}")
    other.write_bytes(file.read_bytes())
    other.replace(file)
