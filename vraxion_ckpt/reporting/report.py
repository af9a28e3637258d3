"""Write a report: check the arguments, read, draw, and publish."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from mimetypes import guess_type
from pathlib import Path
from typing import ClassVar, Unpack

from vraxion_ckpt.analysis.changes import Difference
from vraxion_ckpt.analysis.difference import diff_checkpoints
from vraxion_ckpt.analysis.expert_load import expert_loads
from vraxion_ckpt.checkpoint.model import Checkpoint
from vraxion_ckpt.checkpoint.ring import Weights
from vraxion_ckpt.checkpoint.visits import load_visits
from vraxion_ckpt.commit.staging import check_target
from vraxion_ckpt.conversion.stage_results import Staging, stage_side_files
from vraxion_ckpt.conversion.targets import SideTarget, check_apart, check_inputs, check_several, formats_named
from vraxion_ckpt.errors import CkptWarning, UsageError, memory_errors
from vraxion_ckpt.reading.opening import PathLike, os_errors_named, read_unbound
from vraxion_ckpt.reading.read_options import ReadKeywords, ReadOptions
from vraxion_ckpt.reporting.gather import Subject, gather
from vraxion_ckpt.support import signals
from vraxion_ckpt.support.json_models import Facts


class Reported(Facts):
    """Where a report was written, and its headline."""

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
    **reading: Unpack[ReadKeywords],
) -> Reported:
    """Draw a checkpoint as a page, a picture, or both: its ring, its experts and what changed.

    Args:
        path: a checkpoint, usually after a split.
        page: path of the HTML page to write. It needs the extra ``report``.
        picture: path of the PNG to write. It needs the extra ``png``.
        against: the checkpoint before the split.
        visits: file with visits counted before the split, see `vraxion_ckpt.checkpoint.visits`.
        visits_after: file with visits counted after training was resumed.
        overwrite: whether to replace existing files.
        reading: how to read the checkpoints, see `ReadOptions`.

    Returns:
        The paths and sizes of the files, and the headline.

    Raises:
        UsageError: no output is given, an extra is missing, or an output exists or is one of the inputs.
        SourceError: a checkpoint cannot be read.
    """
    options = ReadOptions.of("report", reading)
    given = [Path(place) for place in (page, picture) if place is not None]
    _check_arguments(page, picture)
    with signals.deferred(), os_errors_named(path, *given), ExitStack() as stack:
        with signals.interruptible():
            places = [Path(os.path.realpath(place)) for place in given]
            _check_places(places, [file for file in (visits, visits_after) if file is not None], overwrite=overwrite)
            there = [place.exists() for place in places]
            checkpoint = read_unbound(path, options)
            before = read_unbound(against, replace(options, from_=None)) if against is not None else None
            read = [one for one in (checkpoint, before) if one is not None]
            _check_against_sources(places, read)
            difference = diff_checkpoints(before, checkpoint, options) if before else None
            subject = _gathered(checkpoint, before, visits, visits_after, difference)
            contents = {Path(place): make(subject) for place, make in ((page, _page), (picture, _picture)) if place}
            for one in read:
                one.sources.verify()
                one.sources.check_unchanged()
            side_targets = [SideTarget(place, replace) for place, replace in zip(places, there, strict=True)]
            staging = Staging(sides=stage_side_files(stack, contents, side_targets))
        with staging.as_one():
            for stage in staging.sides:
                stage.publish()
    return Reported(
        headline=subject.headline,
        page=Path(page) if page else None,
        page_bytes=len(contents[Path(page)]) if page else 0,
        picture=Path(picture) if picture else None,
        picture_bytes=len(contents[Path(picture)]) if picture else 0,
    )


def _check_arguments(page: PathLike | None, picture: PathLike | None) -> None:
    """Check that there is an output and that the extras are installed. Warn of misleading file names."""
    if page is None and picture is None:
        raise UsageError("no output is given", hint="give a page, a picture, or both")
    if page is not None and Path(page).suffix.lower() == ".png":
        raise UsageError("the page is HTML, but its name ends in .png", path=page, hint="use --png for a picture")
    for place, kind, own in ((page, "HTML", "text/html"), (picture, "PNG", "image/png")):
        if place is not None:
            _warn_of_other_suffix(Path(place), kind, own)
    _require("jinja2", "report", page)
    _require("plotly", "report", page)
    _require("matplotlib", "png", picture)


def _check_places(places: Sequence[Path], counted: Sequence[PathLike], *, overwrite: bool) -> None:
    """Raise UsageError if outputs are the same file, already exist, or are inputs."""
    check_several(places)
    check_inputs(places, (), {}, {Path(os.path.realpath(file)) for file in counted})
    for place in places:
        check_target(place, overwrite=overwrite)


def _check_against_sources(places: Sequence[Path], read: Sequence[Checkpoint]) -> None:
    """Raise UsageError if an output is a directory or belongs to one of the checkpoints."""
    for place in places:
        if place.is_dir():
            raise UsageError("the output is a directory; give the path of a file", path=place)
        for one in read:
            check_apart(place, one)


def _warn_of_other_suffix(place: Path, kind: str, own: str) -> None:
    """Warn if a file's suffix belongs to another kind of file. Unknown suffixes are accepted."""
    named, packed = guess_type(place.name)
    formats = formats_named(place.name)
    if formats or packed or named not in (None, own, "application/xhtml+xml"):
        other = " or ".join(formats) or packed or named
        message = f"{place} is written as {kind}, but its name has the suffix of {other}"
        warnings.warn(message, CkptWarning, stacklevel=4)


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
    signs = expert_loads(checkpoint, against=before, visits_file=visits, visits_after=visits_after)
    counted: list[Weights | None] = [None, None]
    router = checkpoint.router_reference
    if signs is not None and router is not None:
        length = router.numel()
        counted = [
            load_visits(Path(file), length).visits if file is not None else None for file in (visits, visits_after)
        ]
    return gather(checkpoint, before, signs, counted[0], counted[1], difference)


def _page(subject: Subject) -> bytes:
    from vraxion_ckpt.reporting.page import render

    return render(subject).encode(errors="backslashreplace")  # lone surrogates cannot be encoded


def _picture(subject: Subject) -> bytes:
    from vraxion_ckpt.reporting.picture import draw

    return draw(subject)
