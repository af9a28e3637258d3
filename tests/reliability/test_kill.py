"""Figures 1, 2 and 4: after a kill or an error at any call, the state is old or new, and the next run succeeds."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
from scenarios import Scenario, beside, read_tree, trainer_writes, watched_disk, write_tree

import vraxion_ckpt as vc
from vraxion_ckpt.checkpoint.comparison import checkpoint_differences
from vraxion_ckpt.commit.staging import exclusive, was_interrupted
from vraxion_ckpt.commit.transaction import committed
from vraxion_ckpt.errors import ChangedError, InconsistentError, StorageError

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


def killed_at(case: Scenario, target: Path, number: int, *, half: bool = False, again: bool = False) -> bool:
    """Run an edit in another process that is killed before its call `number`, or in the middle of a write.

    With `again`, it only recovers what another run has left. Return false if it ended before that call.
    """
    trainer = trainer_writes(case, target)

    def hook(now: int, name: str, arguments: tuple[Path, ...]) -> None:
        trainer(now, name, arguments)
        if now == number:
            if half and name in ("write_new", "copy"):
                arguments[-1 if name == "copy" else 0].write_bytes(b"PK\3\4{")
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        code = 1
        try:
            with watched_disk(hook, case), exclusive(target) if again else nullcontext():
                if not again:
                    case.perform(target)
            code = 0
        except ChangedError:
            code = 0 if case.touched else 1
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return os.WIFSIGNALED(status)


def wrong_after(case: Scenario, target: Path) -> str | None:
    """Return what is wrong with the files after a run, and after the next run."""
    which = case.judge(target)
    if which not in ("old", "new"):
        return f"a trainer resumes {which}"
    try:
        case.again(target)
    except Exception as error:
        return f"the next run fails: {error!r}"
    if read_tree(target) != case.new:
        return "the next run does not end in the new state"
    left = beside(target)
    if case.keep_old and f"{target.name}.old" in left:
        left.remove(f"{target.name}.old")
    return f"the next run leaves {left}" if left else None


def test_a_kill_at_any_call_leaves_the_old_state_or_the_new_one(cases, ram, figure):
    points, states, bad = 0, Counter(), []
    for case in cases:
        number, half, alive = 0, False, False
        while not alive:
            half = not half
            number += half
            target = case.lay(ram(case.name))
            alive = not killed_at(case, target, number, half=not half)
            points += not alive
            states[case.judge(target)] += 1
            if wrong := wrong_after(case, target):
                bad.append(f"{case.name}, call {number}: {wrong}")
            shutil.rmtree(target.parent)
    figure(
        1, f"SIGKILL at {points} points of {len(cases)} runs: {states['old']} old, {states['new']} new, {len(bad)} bad"
    )
    figure(4, f"runs after a SIGKILL: {points}, {len(bad)} failed")
    assert not bad, "\n".join(bad[:20])
    assert points >= 1000
    assert min(states["old"], states["new"]) > 50


def test_what_is_read_after_a_kill_is_what_a_trainer_resumes(cases, ram):
    """Shards beyond num_experts are ignored; those of a killed run must not be read as part of another state."""
    seen = Counter()
    kinds = ("leftover", "grow: modular_experts3", "shrink")
    for case in (c for c in cases if c.old and not c.touched and any(kind in c.name for kind in kinds)):
        states = {}
        for which, tree in (("old", case.old), ("new", case.new)):
            place = ram(case.name) / "run"
            write_tree(place, tree)
            states[which] = vc.open(place)
        number, alive = 0, False
        while not alive:
            number += 1
            target = case.lay(ram(case.name))
            alive = not killed_at(case, target, number)
            try:
                found = vc.open(target)
            except InconsistentError:
                seen["refused"] += 1
            else:
                which = case.judge(target)
                seen[which] += 1
                listed = list(checkpoint_differences(states[which], found))
                assert not listed, f"{case.name}, call {number}: {listed}"
            shutil.rmtree(target.parent)
    assert seen.keys() == {"old", "new", "refused"}


def test_a_run_that_is_killed_while_it_cleans_up_is_cleaned_up_by_the_next(cases, ram, figure):
    kinds = ("grow", "grow, no exchange", "shrink", "rewrite", "grow, kept", "shrink, a trainer writes last")
    points, bad = 0, []
    for case in (case for case in cases if case.name.replace(": modular_experts3", "") in kinds):
        first = 0
        while True:
            first += 1
            target = case.lay(ram(case.name))
            if not killed_at(case, target, first):
                break
            second, alive = 0, False
            while not alive and was_interrupted(target):  # each run recovers a part until it is killed
                second += 1
                alive = not killed_at(case, target, min(second, 4), again=True)
                points += not alive
                if second > 40:
                    bad.append(f"{case.name}, call {first}: cleaning up comes to no end")
                    break
                if case.judge(target) not in ("old", "new"):
                    bad.append(f"{case.name}, call {first}: a trainer resumes {case.judge(target)}")
            if wrong := wrong_after(case, target):
                bad.append(f"{case.name}, call {first}: {wrong}")
            shutil.rmtree(target.parent)
    figure(4, f"runs killed while they cleaned up: {points}, {len(bad)} bad")
    assert not bad, "\n".join(bad[:20])
    assert points > 50


def test_an_error_at_any_call_leaves_the_old_state_and_says_why(cases, ram, figure):
    injections, codes, bad = 0, Counter(), []
    for case in cases:
        for code in ERRORS:
            number, reached = 0, True
            while reached:
                number += 1
                target = case.lay(ram(case.name))
                reached, outcome, wrong = _with_error_at(case, target, number, code)
                injections += reached
                codes[outcome] += reached
                bad += [f"{case.name}, {errno.errorcode[code]} at call {number}: {wrong}"] if wrong else []
                shutil.rmtree(target.parent)
    figure(
        2,
        f"ENOSPC, EIO, EACCES at {injections} calls: {codes['refused']} refused with the old state, "
        f"{codes['refused, new']} after the commit, {codes['done']} got round; {len(bad)} bad",
    )
    assert not bad, "\n".join(bad[:20])
    assert injections >= 1000


def _with_error_at(case: Scenario, target: Path, number: int, code: int) -> tuple[bool, str, str | None]:
    """Run an edit whose call `number` fails; return whether it has that many calls, how it ended, and what is wrong."""
    trainer = trainer_writes(case, target)
    reached: list[str] = []

    def hook(now: int, name: str, arguments: tuple[Path, ...]) -> None:
        trainer(now, name, arguments)
        if now == number:
            reached.append(name)
            raise OSError(code, os.strerror(code), str(arguments[0]))

    error: Exception | None = None
    with watched_disk(hook, case), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case.perform(target)
        except (StorageError, ChangedError) as caught:
            error = caught
    which = case.judge(target)
    if case.touched and beside(target):  # a second error, while the first one is rolled back
        with exclusive(target):
            pass
    tree = read_tree(target) if target.exists() else {}
    left = [name for name in beside(target) if not (case.keep_old and name == f"{target.name}.old")]
    outcome = "done" if error is None else "refused" if which == "old" else "refused, new"
    wrong = None
    if which not in ("old", "new") or (tree != (case.old if which == "old" else case.new) and not case.touched):
        wrong = f"a trainer resumes {which}"
    elif left:
        wrong = f"there is left {left}"
    elif error is None and which == "old" and reached:
        wrong = "the run says that it is done, and is not"
    elif isinstance(error, StorageError) and (os.strerror(code) not in str(error) or not _names(error, target)):
        wrong = f"it does not say what went wrong, and where: {error}"
    elif isinstance(error, StorageError) and which == "new" and "was written" not in str(error):
        wrong = f"it does not say that the new state is in place: {error}"
    return bool(reached), outcome, wrong


def _names(error: StorageError, target: Path) -> bool:
    return str(target.parent) in str(error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_call_leaves_the_old_state_or_comes_too_late(cases, ram, figure, number):
    class Stopped(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    usual = signal.signal(number, stop)
    sent, late, bad = 0, 0, []
    try:
        for case in (case for case in cases if not case.touched):
            at, reached = 0, True
            while reached:
                at += 1
                target = case.lay(ram(case.name))
                committed.discard(target)
                reached, stopped = False, False

                def hook(now: int, _: str, __: tuple[Path, ...], at: int = at) -> None:
                    nonlocal reached
                    if now == at:
                        reached = True
                        signal.raise_signal(number)

                with watched_disk(hook, case):
                    try:
                        case.perform(target)
                    except Stopped:
                        stopped = True
                which, told = case.judge(target), "new" if target in committed else "old"
                sent += reached
                late += reached and told == "new"
                if reached and (not stopped or which != told):
                    bad.append(f"{case.name}, call {at}: {which}, and it says {told}")
                left = [name for name in beside(target) if not case.keep_old]
                if left or (target.exists() and read_tree(target) not in (case.old, case.new)):
                    bad.append(f"{case.name}, call {at}: there is left {left}")
                shutil.rmtree(target.parent)
    finally:
        signal.signal(number, usual)
    name = signal.Signals(number).name
    figure(
        11, f"{name} at {sent} calls: {sent - late} left the old state, {late} came after the commit; {len(bad)} bad"
    )
    assert not bad, "\n".join(bad[:20])
