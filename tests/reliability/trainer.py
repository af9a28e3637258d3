"""A trainer that saves into the checkpoint during an edit, at any moment."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from scenarios import Scenario, beside, read_tree, watched_disk

from vraxion_ckpt.errors import ChangedError


def theirs(case: Scenario) -> dict[str, bytes]:
    """Return the files that the trainer saves: all files of the old state, with other contents."""
    return {name: content + b" " for name, content in case.old.items()}


def save(target: Path, tree: dict[str, bytes], *, by_rename: bool) -> None:
    """Save as VRAXION's trainers do, to renamed temporary files, or as others do, directly into the files."""
    for name, content in tree.items():
        place = target / name
        if by_rename:
            place.with_name(f".tmp.{place.name}").write_bytes(content)
            place.with_name(f".tmp.{place.name}").replace(place)
        else:
            place.write_bytes(content)


def saves_at_any_call(case: Scenario, ram: Callable[[str], Path]) -> Iterator[tuple[bool, str | None]]:
    """Let the trainer save before each call of a run in turn.

    Yield whether the run failed, and what is wrong with the files afterwards. A save before the commit must make the
    run fail, and no file of the save may be lost. Files that are saved after the commit must be kept. Where names
    cannot be exchanged, the rename replaces a file that is saved at that very moment, as the manual states; there, only
    saves before that moment must make the run fail.
    """
    for by_rename in (True, False):
        number, reached = 0, True
        while reached:
            number += 1
            target = case.lay(ram(case.name))
            reached, before_commit, at_commit, gave_up = False, True, False, False

            def hook(now: int, name: str, arguments: tuple[Path, ...], number: int = number) -> None:
                nonlocal reached, before_commit, at_commit
                commits = name in ("exchange", "rename") and arguments[-1] == target / case.change.exchanged  # noqa: B023
                if now == number:
                    reached, at_commit = True, commits
                    save(target, theirs(case), by_rename=by_rename)  # noqa: B023 - called in this round only
                elif commits:
                    before_commit = before_commit and reached

            with watched_disk(hook, case):
                try:
                    case.perform(target)
                except ChangedError:
                    gave_up = True
            tree, left = read_tree(target), beside(target)
            shutil.rmtree(target.parent)
            if not reached:
                break
            wrong = None
            if not case.exchange and (gave_up or at_commit or not before_commit):
                pass
            elif gave_up and tree != theirs(case):
                wrong = "it gave up, and something of the save is lost"
            elif gave_up and left:
                wrong = f"it gave up and left {left}"
            elif not gave_up and before_commit:
                wrong = "it went on although the checkpoint had changed"
            elif not gave_up and any(tree.get(name) != content for name, content in theirs(case).items()):
                wrong = "something of a save after the commit is lost"
            yield gave_up, f"call {number}: {wrong}" if wrong else None
