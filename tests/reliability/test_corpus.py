"""Figure 7: each command rejects each bad input quickly and with the right error, and has no other effect."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from corpus import CORPUS, PROOF, Bad, directory, real
from loader import resume
from scenarios import SPLIT, beside
from support import DATA
from test_modular_errors import copy, meta, remove
from watch import MEMORY, SECONDS, Seen, Snapshot, size, snapshot, watched

from vraxion_ckpt.errors import BusyError, PluginError, SourceError, UnknownFormatError, UsageError

Cli = Callable[..., tuple[int, str]]
Finding = tuple[str, str]

# The exit codes of success and of expected errors. A defect, also in the adapter, has another one.
OURS = {0, *range(UsageError.exit_code, BusyError.exit_code + 1)} - {PluginError.exit_code}
# The kinds of faults that a run may have; the figure prints how often each was found.
KINDS = {
    "code": "ran code",
    "outside": "opened a file outside",
    "class": "ended otherwise than said",
    "time": f"took over {SECONDS} s",
    "memory": f"took over 2 × input + {MEMORY >> 20} MiB",
    "wrote": "changed a file or left one",
}
# The files that an edit may write if the damage is in a shard that it does not open.
WRITTEN = re.compile(r"(system|experts|system/router\.state|experts/meta\.json|experts/expert_[0-9]{3}\.pt)")


def split(parent: int) -> str:
    return f"mitosis_split:parent={parent},addresses=[{parent}],noise=0"


def runs_of(bad: Bad, path: Path, out: Path) -> Iterator[tuple[str, bool, tuple[object, ...]]]:
    """Yield each command, whether it must report the fault, and its arguments; commands that may write come last."""
    yield "convert", "convert" not in bad.unseen, ("convert", path, out / "new.pt")
    yield "inspect", "inspect" not in bad.unseen, ("inspect", path)
    yield "check", "convert" not in bad.unseen and issubclass(bad.error, SourceError), ("check", path)
    to = ("--to", bad.to) if bad.to else ()
    yield "edit", "edit" not in bad.unseen, ("edit", path, "-t", split(bad.parent), *to)
    if bad.parent:
        yield "edit of another", False, ("edit", path, "-t", split(0), *to)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
@pytest.mark.parametrize("kind", CORPUS)
def test_a_bad_input_is_refused_for_what_it_is_and_nothing_else_happens(kind, cli, ram, figure):
    get_warm(cli, ram("good"))
    runs, wrong = 0, list[tuple[str, Finding]]()
    for name, bad in CORPUS[kind].items():
        folder = ram(name)
        inside, out = folder / "in", folder / "out"
        inside.mkdir()
        out.mkdir()
        path = bad.build(inside)
        for command, must_see, arguments in runs_of(bad, path, out):
            before = snapshot(folder, {path.parent, out})
            with watched(path.parent) as seen:
                code, said = cli(*arguments)
            runs += 1
            after = snapshot(folder, {path.parent, out})
            ended = (
                verdict(bad, must_see, code, said) if command == "check" else ending(bad, path, must_see, code, said)
            )
            found = [*ended, *misdeeds(path, out, seen)]
            found += changes(path, folder, before, after, seen_through=code == 0 and command.startswith("edit"))
            found += [("code", "the pickle ran")] * (inside / PROOF).exists()
            wrong += [(f"{name}, {command}", finding) for finding in found]
        if bad.live is not None:
            torch.load(path / bad.live, weights_only=False)
            assert (inside / PROOF).exists(), f"{name}: this pickle would have run nothing"
        shutil.rmtree(folder)
    counts = Counter(what for _, (what, _) in wrong)
    told = ", ".join(f"{counts[what]} {words}" for what, words in KINDS.items())
    figure(7, f"{kind}: {runs} runs on {len(CORPUS[kind])} bad inputs: {told}")
    assert not wrong, "\n".join(f"{run}: {words}" for run, (_, words) in wrong)


def get_warm(cli: Cli, folder: Path) -> None:
    """Import everything that a run may need, so that files opened later are opened because of the input."""
    path = directory(lambda _: None)(folder)
    for arguments in (
        ("inspect", path),
        ("check", path),
        ("convert", path, folder / "new.pt"),
        ("edit", path, "-t", SPLIT),
    ):
        assert cli(*arguments)[0] == 0


def ending(bad: Bad, path: Path, must_see: bool, code: int, said: str) -> Iterator[Finding]:
    """Yield what is wrong with the exit code and the message."""
    words = " ".join(said.split())
    if "Traceback" in said or code not in OURS or (must_see and code != bad.error.exit_code):
        yield "class", f"exit code {code}: {words[:500]}"
    elif must_see and not (words.startswith("error: ") and str(path) in words):
        yield "class", f"does not name the file: {words[:500]}"
    elif must_see:
        yield from (("class", f"no {part!r}: {words[:500]}") for part in bad.says if not re.search(part, words))


def verdict(bad: Bad, must_see: bool, code: int, said: str) -> Iterator[Finding]:
    """Yield what is wrong with the exit code of `check`, which reports faults as findings instead of errors."""
    expected = {bad.error.exit_code} if bad.error is UnknownFormatError else {1}
    if "Traceback" in said or code not in OURS | {1} or (must_see and code not in expected):
        yield "class", f"exit code {code}: {' '.join(said.split())[:500]}"


def misdeeds(path: Path, out: Path, seen: Seen) -> Iterator[Finding]:
    """Yield other effects of a run that are not allowed."""
    yield from (("code", what) for what in seen.ran)
    yield from (("outside", f"opened {place}") for place in seen.opened if not is_allowed(place, path, out))
    if seen.seconds > SECONDS:
        yield "time", f"took {seen.seconds:.1f} s"
    if seen.memory > 2 * size(path) + MEMORY:
        yield "memory", f"took {seen.memory >> 20} MiB"


def is_allowed(place: Path, path: Path, out: Path) -> bool:
    """Tell whether a path is in the checkpoint or the target's folder, or is a lock or stage beside the checkpoint.

    Files of modules that are imported now, and the kernel's table of mounts, are allowed too.
    """
    if str(place) == "/proc/self/mountinfo":
        return True
    real, folder = Path(os.path.realpath(place)), path.parent
    if real == folder or {out, path} & {real, *real.parents} or real.suffix in (".py", ".pyc", ".so"):
        return True
    return real.is_relative_to(folder) and real.relative_to(folder).parts[0].startswith(f".{path.name}.")


def changes(path: Path, folder: Path, before: Snapshot, after: Snapshot, *, seen_through: bool) -> Iterator[Finding]:
    """Yield changed files that must not change; an edit that found no fault may write its files, but no shard."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name):
            continue
        place = os.path.relpath(folder / name, path)
        ours = seen_through and WRITTEN.fullmatch(place) and not (place.endswith(".pt") and name in before)
        if not ours:
            yield "wrote", f"{place} is not what it was"


# --- accepted, with a warning ---


ACCEPTED = {
    "no meta.json": (remove("experts/meta.json"), "meta.json is missing; lifecycle rows are rebuilt"),
    "a shard left over": (copy("expert_001.pt", "expert_003.pt"), "expert_003.pt is left from an earlier save"),
    "a shard left over, far": (copy("expert_001.pt", "expert_017.pt"), "expert_017.pt is left from an earlier save"),
    "a live expert in `deleted`": (meta(lambda m: m.update(deleted=[1])), "lists expert 1 as deleted"),
}


@pytest.mark.parametrize("command", ["convert", "inspect", "edit"])
@pytest.mark.parametrize(("odd", "says"), ACCEPTED.values(), ids=ACCEPTED)
def test_what_trainers_leave_is_read_as_they_read_it_with_a_warning(odd, says, command, cli, tmp_path):
    path = directory(odd)(tmp_path / "in")
    arguments = {"convert": [f"{tmp_path}/new/"], "inspect": [], "edit": ["-t", SPLIT]}[command]
    before = resume(path)
    code, said = cli(command, path, *arguments)
    assert (code, says in " ".join(said.split())) == (0, True)
    assert beside(path) == []
    if command == "convert":  # without meta.json, the loader invents rows
        assert resume(tmp_path / "new")[1] == before[1]


# --- usage errors ---


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        ("mitosis_spilt", ["mitosis_spilt", "did you mean 'mitosis_split'?"]),
        ("mitosis_split:nose=0", ["unknown option 'nose', did you mean 'noise'?"]),
        ("mitosis_split:parent=many,noise=-1,optimizer=maybe", ["'parent'", "'noise'", "'optimizer'"]),
    ],
)
@pytest.mark.parametrize("command", ["convert", "edit"])
def test_a_wrong_transform_is_a_usage_error_and_nothing_is_read(command, transform, says, cli, tmp_path):
    """The checkpoint is bad too, so a command that read it first would report another error."""
    path = real(lambda content: content[:99])(tmp_path)
    before = snapshot(tmp_path, set())
    code, said = cli(command, path, *([tmp_path / "new.pt"] if command == "convert" else []), "-t", transform)
    assert code == 2
    assert all(part in said for part in says), said
    assert snapshot(tmp_path, set()) == before


# --- the watch ---


def test_the_watch_sees_what_it_is_there_to_see(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("python", "torch.pt"):
        torch.save({"w": torch.ones(2)}, tmp_path / name)
    (tmp_path / "link").symlink_to("torch.pt")
    with watched(tmp_path) as seen:
        (tmp_path / "python").read_bytes()
        torch.UntypedStorage.from_file(str(tmp_path / "link"), shared=False, nbytes=8)
        os.system("true")
        filled = bytearray(100 * 2**20)
    found = [("outside", f"opened {tmp_path / name}") for name in ("python", "torch.pt")]
    assert set(misdeeds(tmp_path / "run", tmp_path / "out", seen)) > set(found)
    assert seen.ran
    assert 0.9 * len(filled) < seen.memory < 2 * len(filled)
    with watched(tmp_path) as seen:
        (DATA / "raw_state_dict.pt").read_bytes()
    assert list(misdeeds(tmp_path / "run", tmp_path / "out", seen)) == [
        ("outside", f"opened {DATA / 'raw_state_dict.pt'}")
    ]
    assert seen.memory < 50 * 2**20
