"""Print the summaries of `convert`, `run` and `edit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vraxion_ckpt.cli.terminal import Line, byte_size, print_lines, put
from vraxion_ckpt.conversion.edit_plan import EditKind
from vraxion_ckpt.wording import count, listed

if TYPE_CHECKING:
    from vraxion_ckpt.conversion.edit import Edited
    from vraxion_ckpt.conversion.summary import Summary
    from vraxion_ckpt.recipes.recipe import Ran

_HOW = {
    EditKind.NOTHING: "nothing to change",
    EditKind.REPLACE: "replace: the file, by a rename",
    EditKind.ROUTER_ONLY: "router only: one file, by a rename",
    EditKind.GROW: "grow: new files first, then the router",
    EditKind.SHRINK: "shrink: the router first, then remove files that it no longer needs",
    EditKind.REWRITE: "rewrite: a whole new directory, exchanged with the old one",
}


def print_conversion(done: Summary, *, verbose: bool = False) -> None:
    """Print the summary of a conversion."""
    lines: list[Line] = [
        ("would write" if done.dry_run else "wrote", f"{done.target} ({done.target_format})"),
        ("from", f"{done.source} ({done.source_format})"),
        *_what_became(done),
    ]
    if not done.dry_run:
        lines.append(("size", f"{byte_size(done.bytes_written)} in {done.seconds:.1f} s"))
    print_lines([*lines, *(_steps(done) if verbose else [])])


def print_run(done: Ran, *, verbose: bool = False) -> None:
    """Print the summary of each target of a recipe."""
    for number, summary in enumerate(done.results):
        if number:
            put("")
        print_conversion(summary, verbose=verbose)


def print_edit(done: Edited, *, verbose: bool = False) -> None:
    """Print the summary of an edit."""
    where = f"{done.target} ({done.target_format})"
    if done.kind is EditKind.NOTHING:
        lines: list[Line] = [("unchanged", where), ("how", _HOW[done.kind])]
        print_lines([*lines, ("manifest", str(done.manifest))] if done.manifest else lines)
        return
    edited, wrote, removed = (
        ("would edit", "would write", "would remove") if done.dry_run else ("edited", "wrote", "removed")
    )
    lines = [(edited, where), ("how", _HOW[done.kind])]
    files = [(wrote, done.written), (removed, done.removed)]
    lines += [(what, listed(names)) for what, names in files if names and names != (".",)]
    if done.untouched:
        lines.append(("untouched", count(done.untouched, "file")))
    if done.kept is not None:
        lines.append(("kept", f"the previous state, as {done.kept}"))
    lines += _what_became(done)
    how_long = "to write" if done.dry_run else f"in {done.seconds:.1f} s"
    lines.append(("size", f"{byte_size(done.bytes_written)} {how_long}"))
    print_lines([*lines, *(_steps(done) if verbose else [])])


def _what_became(done: Summary) -> list[Line]:
    tensors = ", ".join(f"{n} {what}" for what, n in done.tensors if n) or "none"
    moved = count(done.addresses_moved, "address")
    lines: list[Line] = [
        ("experts", f"{done.experts_before} → {done.experts_after}, {moved} moved"),
        ("tensors", tensors),
        ("optimizer", done.optimizer),
    ]
    if done.function_preserved is not None:
        lines.append(("function", f"preserved per address: {done.function_preserved}"))
    lines += [("lost", str(loss)) for loss in done.losses]
    lines += [("beside", listed(done.carried))] if done.carried else []
    lines += [("left out", listed(done.left_out))] if done.left_out else []
    lines += [("also", str(path)) for path in done.side_files]
    if done.manifest:
        lines.append(("manifest", str(done.manifest)))
    return lines


def _steps(done: Summary) -> list[Line]:
    return [("step", f"{r.name} ({r.distribution} {r.version}): {r.summary}") for r in done.history]
