"""Reports: a checkpoint as one HTML page that works offline, or as a picture.

`gather` finds out what is to be shown, `drawing` turns rings into shapes and colours, `figures` and `page` are the page
(by plotly), `picture` is the picture (by matplotlib), `words` are the numbers in all of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from mimetypes import guess_type
from pathlib import Path
from typing import ClassVar

from vraxion_ckpt import signals
from vraxion_ckpt.binding import OptimizerOrder
from vraxion_ckpt.changes import Difference
from vraxion_ckpt.commit import check_target
from vraxion_ckpt.difference import diff_checkpoints
from vraxion_ckpt.errors import CkptWarning, UsageError, memory_errors
from vraxion_ckpt.facts import Facts
from vraxion_ckpt.model import Checkpoint
from vraxion_ckpt.pipeline import Staging, stage_side_files
from vraxion_ckpt.plugins import AdapterLike
from vraxion_ckpt.reading import PathLike, os_errors_named, read_unbound
from vraxion_ckpt.reporting.gather import Subject, gather
from vraxion_ckpt.ring import Weights
from vraxion_ckpt.signs import signs_of_life
from vraxion_ckpt.targets import Beside, check_apart, check_inputs, check_several, formats_named
from vraxion_ckpt.visits import load as load_visits


class Reported(Facts):
    """Where a report is, and what it says in a sentence."""

    kind_of_facts: ClassVar[str] = "report"

    headline: str
    page: Path | None
    page_bytes: int
    picture: Path | None
    picture_bytes: int


@memory_errors()
def report(
    path: PathLike,
    page: PathLike | None = None,
    *,
    picture: PathLike | None = None,
    against: PathLike | None = None,
    visits: PathLike | None = None,
    visits_after: PathLike | None = None,
    overwrite: bool = False,
    from_: AdapterLike | None = None,
    param_names: Sequence[str] | None = None,
    optimizer_order: OptimizerOrder | None = None,
    allow_globals: Sequence[str] = (),
) -> Reported:
    """Draw a checkpoint: its ring, its experts and what has changed, as a page, a picture, or both.

    Args:
        path: a checkpoint, usually after a split.
        page: where the HTML page goes; it needs the extra ``report``.
        picture: where the PNG goes; it needs the extra ``png``.
        against: the checkpoint before the split.
        visits: visits counted before it, see `vraxion_ckpt.visits`.
        visits_after: visits counted after training was resumed.
        overwrite: replace files that exist.
        from_: as for `read`.
        param_names: as for `read`.
        optimizer_order: as for `read`.
        allow_globals: as for `read`.

    Raises:
        UsageError: nothing is to be written, an extra is missing, a file exists, or is one of those that are read.
        SourceError: what is wrong with a checkpoint, and where.
    """
    given = [Path(place) for place in (page, picture) if place is not None]
    if not given:
        raise UsageError("nothing is to be written", hint="name a page, a picture, or both")
    if page is not None and Path(page).suffix.lower() == ".png":
        raise UsageError("the page is HTML, and this is the name of a picture", path=page, hint="--png makes one")
    for place, kind, own in ((page, "HTML", "text/html"), (picture, "PNG", "image/png")):
        if place is not None:
            _say_if_denied(Path(place), kind, own)
    _require("jinja2", "report", page)
    _require("plotly", "report", page)
    _require("matplotlib", "png", picture)
    with signals.put_off(), os_errors_named(path, *given), ExitStack() as stack:
        with signals.stoppable():
            places = [Path(os.path.realpath(place)) for place in given]
            check_several(places)
            counted = [Path(os.path.realpath(file)) for file in (visits, visits_after) if file is not None]
            check_inputs(places, (), {}, set(counted))
            for place in places:
                check_target(place, overwrite=overwrite)
            there = [place.exists() for place in places]
            checkpoint = read_unbound(path, from_=from_, allow_globals=allow_globals)
            before = read_unbound(against, allow_globals=allow_globals) if against is not None else None
            read = [one for one in (checkpoint, before) if one is not None]
            for place in places:
                if place.is_dir():
                    raise UsageError("is a directory, not a file to write", path=place)
                for one in read:
                    check_apart(place, one)
            difference = diff_checkpoints(before, checkpoint, param_names, optimizer_order) if before else None
            subject = _gathered(checkpoint, before, visits, visits_after, difference)
            drawn = {place: make(subject) for place, make in ((page, _page), (picture, _picture)) if place is not None}
            for one in read:
                one.sources.verify()
                one.sources.check_unchanged()
            contents = {Path(place): content for place, content in drawn.items()}
            besides = [Beside(place, replace) for place, replace in zip(places, there, strict=True)]
            staging = Staging(sides=stage_side_files(stack, contents, besides))
        with staging.as_one():
            for stage in staging.sides:
                stage.publish()
        sizes = {Path(place): len(content) for place, content in contents.items()}
        return Reported(
            headline=subject.headline,
            page=Path(page) if page is not None else None,
            page_bytes=sizes[Path(page)] if page is not None else 0,
            picture=Path(picture) if picture is not None else None,
            picture_bytes=sizes[Path(picture)] if picture is not None else 0,
        )


def _say_if_denied(place: Path, kind: str, own: str) -> None:
    """Warn of a file whose name has the ending of another kind of file; an unknown ending denies nothing."""
    named, packed = guess_type(place.name)
    formats = formats_named(place.name)
    if formats or packed or named not in (None, own, "application/xhtml+xml"):
        other = " or ".join(formats) or packed or named
        message = f"{place} is written as {kind}, and its name is that of {other}"
        warnings.warn(message, CkptWarning, stacklevel=3)


def _require(module: str, extra: str, wanted: PathLike | None) -> None:
    if wanted is not None and find_spec(module) is None:
        raise UsageError(f"{module} is not installed", hint=f"pip install 'vraxion-ckpt[{extra}]'")


def _gathered(
    checkpoint: Checkpoint,
    before: Checkpoint | None,
    visits: PathLike | None,
    visits_after: PathLike | None,
    difference: Difference | None,
) -> Subject:
    signs = signs_of_life(checkpoint, against=before, visits_file=visits, visits_after=visits_after)
    counted: list[Weights | None] = [None, None]
    if signs is not None and checkpoint.router_map is not None:
        length = len(checkpoint.router_map)
        counted = [
            load_visits(Path(file), length).visits if file is not None else None for file in (visits, visits_after)
        ]
    return gather(checkpoint, before, signs, counted[0], counted[1], difference)


def _page(subject: Subject) -> bytes:
    from vraxion_ckpt.reporting.page import render

    return render(subject).encode(errors="backslashreplace")  # half a surrogate pair is no character


def _picture(subject: Subject) -> bytes:
    from vraxion_ckpt.reporting.picture import draw

    return draw(subject)
