"""All states that a power loss can leave, computed from a log of operations and flushes.

The model is harsher than most file systems: any combination of the changes that were not flushed may be lost. A file
whose bytes were not flushed may be empty, and a change of a directory that was not flushed may be missing. A rename or
an exchange is one change.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, count, product
from pathlib import Path

from scenarios import Scenario, beside, read_tree, trainer_writes, watched_disk

from vraxion_ckpt.commit.staging import exclusive
from vraxion_ckpt.errors import ChangedError

_MOST_SUBSETS = 256


@dataclass(frozen=True)
class Entries:
    """A change of directories: names that now refer to another node, or to none."""

    changes: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Content:
    """The bytes of a new file."""

    node: int


@dataclass(frozen=True)
class Flush:
    """An fsync of a file or a directory."""

    node: int


@dataclass
class Log:
    """A folder on a disk, and the operations on it.

    Attributes:
        start: the entries of each directory at the start, all flushed.
        now: the current entries, flushed or not.
        contents: the bytes of each file; None for a directory.
        stamps: inode and modification time of each file, as the run has seen them.
    """

    root: Path
    start: dict[int, dict[str, int]] = field(default_factory=dict)
    now: dict[int, dict[str, int]] = field(default_factory=dict)
    contents: dict[int, bytes | None] = field(default_factory=dict)
    stamps: dict[int, tuple[int, int]] = field(default_factory=dict)
    done: list[Entries | Content | Flush] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self._scan(self.root)
        self.start = {node: dict(entries) for node, entries in self.now.items()}

    def _scan(self, path: Path) -> int:
        node = self._node(path, None if path.is_dir() else path.read_bytes())
        for entry in sorted(path.iterdir()) if path.is_dir() else ():
            self.now[node][entry.name] = self._scan(entry)
        return node

    def _node(self, path: Path, content: bytes | None) -> int:
        node = next(self._numbers)
        self.contents[node] = content
        self.stamps[node] = (path.lstat().st_ino, path.lstat().st_mtime_ns)
        if content is None:
            self.now[node] = {}
        return node

    def _at(self, path: Path) -> int:
        node = 0
        for part in path.relative_to(self.root).parts:
            node = self.now[node][part]
        return node

    def _change(self, *changes: tuple[Path, int | None]) -> None:
        entries = tuple((self._at(path.parent), path.name, node) for path, node in changes)
        for folder, name, node in entries:
            if node is None:
                del self.now[folder][name]
            else:
                self.now[folder][name] = node
        self.done.append(Entries(entries))

    def note(self, _: int, name: str, arguments: tuple[Path, ...]) -> None:
        """Record a call of the commit layer that was just made."""
        path, *rest = arguments
        if name == "fsync":
            self.done.append(Flush(self._at(path)))
        elif name == "mkdir":
            self._change((path, self._node(path, None)))
        elif name == "write_new":
            self._new_file(path)
        elif name in ("copy", "link_or_copy") and not rest[0].samefile(path):
            self._new_file(rest[0])
        elif name == "link_or_copy":
            self._change((rest[0], self._at(path)))
        elif name in ("rename", "rename_new"):
            self._change((rest[0], self._at(path)), (path, None))
        elif name == "exchange":
            self._change((path, self._at(rest[0])), (rest[0], self._at(path)))
        elif name in ("unlink", "rmdir") and not path.name.endswith(".lock"):
            self._change((path, None))

    def _new_file(self, path: Path) -> None:
        node = self._node(path, path.read_bytes())
        self._change((path, node))
        self.done.append(Content(node))

    # --- possible states ---

    def states(self) -> Iterator[tuple[bool, frozenset[int], tuple[int, ...]]]:
        """Yield each state once: whether it follows the last operation, its empty files, and the changes in it.

        If there are too many combinations, the simplest and some random ones are tried. States in which everything that
        can be lost is lost come first.
        """
        seen = set()
        ends = [(end, self._pending(end)) for end in range(len(self.done) + 1)]
        worst = [(end, pending, iter([tuple(pending)])) for end, pending in ends]
        for end, pending, subsets in (*worst, *((end, pending, _subsets(pending)) for end, pending in ends)):
            settled = [i for i in range(end) if i not in pending and not isinstance(self.done[i], Flush)]
            for lost in subsets:
                empty = frozenset(op.node for i in lost if isinstance(op := self.done[i], Content))
                happened = tuple(i for i in sorted({*settled, *pending} - {*lost}) if isinstance(self.done[i], Entries))
                key = (end == len(self.done), empty, happened)
                if key not in seen:
                    seen.add(key)
                    yield key

    def _pending(self, end: int) -> list[int]:
        """Return the changes among the first operations that may be lost."""
        pending = []
        for i, op in enumerate(self.done[:end]):
            nodes = {op.node} if isinstance(op, Content) else set()
            if isinstance(op, Entries):
                nodes = {folder for folder, _, _ in op.changes}
            flushed = any(isinstance(later, Flush) and later.node in nodes for later in self.done[i + 1 : end])
            if nodes and not flushed:
                pending.append(i)
        return pending

    def lay(self, empty: frozenset[int], happened: tuple[int, ...], folder: Path) -> None:
        """Write a state to a real disk, with the inodes in its journal replaced by those of the files written."""
        entries = {node: dict(names) for node, names in self.start.items()}
        for i in happened:
            op = self.done[i]
            assert isinstance(op, Entries)
            for where, name, node in op.changes:
                names = entries.setdefault(where, {})
                if node is None:
                    names.pop(name, None)
                else:
                    names[name] = node
        places: dict[int, Path] = {}
        self._make(0, folder, entries, empty, places)
        for node, place in places.items():
            if place.name == "journal.json" and node not in empty:
                place.write_bytes(self._translated(self.contents[node] or b"", places))

    def _make(
        self, node: int, path: Path, entries: dict[int, dict[str, int]], empty: frozenset[int], places: dict[int, Path]
    ) -> None:
        content = self.contents[node]
        if content is None:
            path.mkdir(exist_ok=True)
            for name, below in entries.get(node, {}).items():
                self._make(below, path / name, entries, empty, places)
        elif node in places:
            os.link(places[node], path)
        else:
            path.write_bytes(b"" if node in empty else content)
            os.utime(path, ns=(self.stamps[node][1],) * 2)
        places.setdefault(node, path)

    def _translated(self, journal: bytes, places: dict[int, Path]) -> bytes:
        facts = json.loads(journal)
        inodes = {self.stamps[node][0]: path.lstat().st_ino for node, path in places.items()}
        facts["stage"] = inodes.get(facts["stage"], 0)
        for marks in (facts["old"], facts["new"]):
            for mark in marks.values():
                mark[0] = inodes.get(mark[0], -mark[0])
        return json.dumps(facts).encode()


def _subsets(pending: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield sets of changes that may be lost together."""
    if 2 ** len(pending) <= _MOST_SUBSETS:
        for keep in product((False, True), repeat=len(pending)):
            yield tuple(i for i, kept in zip(pending, keep, strict=True) if not kept)
        return
    yield from ((), tuple(pending))
    for some in (1, 2):
        yield from combinations(pending, some)
    yield from (tuple(j for j in pending if j != i) for i in pending)
    chance = random.Random(len(pending))
    yield from (tuple(i for i in pending if chance.random() < 0.5) for _ in range(64))


def record(case: Scenario, folder: Path, *, left_out: Callable[[Path], bool] | None = None) -> Log:
    """Run an edit without some of its calls of fsync, and record its operations."""
    folder.mkdir(parents=True)
    target = case.lay(folder)
    log = Log(folder)
    with watched_disk(trainer_writes(case, target), case, after=log.note, left_out=left_out):
        try:
            case.perform(target)
        except ChangedError:
            assert case.touched
    return log


def bad_states(case: Scenario, log: Log, folder: Path) -> Iterator[str | None]:
    """Yield, for each state that a power loss can leave, what is wrong with it; None if nothing is.

    A trainer must resume the old state or the new one, and after the end of the run only the new one. The next run must
    find exactly that state, with nothing beside it except the old state if it is kept.
    """
    for number, (ended, empty, happened) in enumerate(log.states()):
        place = folder / str(number)
        place.mkdir(parents=True)
        log.lay(empty, happened, place)
        target = place / ("run.pt" if case.is_file else "run")
        which = case.judge(target)
        allowed = ("old" if case.touched else "new",) if ended else ("old", "new")
        yield _what_is_wrong(case, target, which, allowed)
        shutil.rmtree(place)


def _what_is_wrong(case: Scenario, target: Path, which: str, allowed: tuple[str, ...]) -> str | None:
    if which not in allowed:
        return f"a trainer resumes {which}"
    try:
        with exclusive(target):
            pass
    except Exception as error:
        return f"the next run fails: {error}"
    expected = case.old if which == "old" else case.new
    if (read_tree(target) if target.exists() else {}) != expected:
        return f"the next run does not leave the {which} state"
    kept = target.with_name(f"{target.name}.old")
    left = beside(target)
    if case.keep_old and which == "new":
        if not kept.exists() or read_tree(kept) != case.old:
            return "the state that was to be kept is lost"
        left.remove(kept.name)
    return f"there is left {left}" if left else None
