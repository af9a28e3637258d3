"""Mutation tests of this suite: without any one fsync, or with any two steps swapped, it fails.

Mutants of the commit layer exist in memory only: one call of fsync is left out, or the list of steps is changed. A
mutant is detected by the first state or run that comes out wrong.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from itertools import combinations, islice
from pathlib import Path

from powerloss import bad_states, record
from scenarios import Scenario
from trainer import saves_at_any_call

from vraxion_ckpt.commit import durability, staging, transaction
from vraxion_ckpt.commit.transaction import Transaction

LAYER = (durability, transaction, staging)
Site = tuple[str, tuple[str, int]]  # the function that needs the fsync, and the module and line of the call


def test_without_any_single_fsync_a_power_loss_can_leave_a_mix(cases, ram, figure):
    sites = _sites(cases, ram)
    calls = {
        (module.__name__, node.lineno)
        for module in LAYER
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "system_calls.fsync"
    }
    assert {place for _, place in sites} == calls, "a call of fsync is never made"
    survivors = [site for site in sites if not _is_needed(site, cases, ram)]
    figure(3, f"{len(sites)} mutants without one fsync: {len(sites) - len(survivors)} found out")
    assert survivors == []


def _sites(cases: list[Scenario], ram: Callable[[str], Path]) -> list[Site]:
    """List the places where the commit layer flushes, in the runs of all cases."""
    found: dict[Site, None] = {}
    for case in cases:
        record(case, ram(case.name) / "run", left_out=lambda path: bool(found.setdefault(_site(path))))
    return list(found)


def _site(path: Path) -> Site:
    """Return the function and line that call fsync; for shared functions, with the kind of path, or the caller."""
    frame = sys._getframe()
    while frame.f_globals["__name__"] not in {module.__name__ for module in LAYER}:
        assert frame.f_back is not None
        frame = frame.f_back
    name, place = frame.f_code.co_name, (frame.f_globals["__name__"], frame.f_lineno)
    if name == "_fsync_folders":
        assert frame.f_back is not None
        name = frame.f_back.f_code.co_name
    if name == "flush":
        name = "flush, folders" if path.is_dir() else "flush, files"
    return name, place


def _is_needed(site: Site, cases: list[Scenario], ram: Callable[[str], Path]) -> bool:
    logs = [(case, record(case, ram(case.name) / "run", left_out=lambda path: _site(path) == site)) for case in cases]
    for most in (50, None):  # first the worst states of all cases, then all states
        if any(any(islice(bad_states(case, log, ram(case.name)), most)) for case, log in logs):
            return True
    return False


def test_with_any_two_steps_swapped_something_is_lost(cases, ram, figure, monkeypatch):
    kinds = ("grow", "shrink", "rewrite", "grow, no exchange", "shrink, a trainer writes")
    some = [case for case in cases if case.name.replace(": modular_experts3", "") in kinds]
    assert len(some) == len(kinds)
    mutants = []
    for i, j in combinations(range(len(Transaction.STEPS)), 2):
        steps = list(Transaction.STEPS)
        steps[i], steps[j] = steps[j], steps[i]
        mutants.append(tuple(steps))
    survivors = []
    for steps in mutants:
        with monkeypatch.context() as patch:
            patch.setattr(Transaction, "STEPS", steps)
            if not any(_wrong(some, ram)):
                survivors.append(steps)
    figure(3, f"{len(mutants)} mutants with two steps swapped: {len(mutants) - len(survivors)} found out")
    assert survivors == []


def _wrong(cases: list[Scenario], ram: Callable[[str], Path]) -> Iterator[object]:
    """Yield what is wrong with a mutant; the quickest checks come first."""
    for case in cases:
        try:
            log = record(case, ram(case.name) / "run")
        except Exception as error:  # a run that fails
            yield error
            continue
        yield from bad_states(case, log, ram(case.name))
    for case in cases:
        if not case.touched:
            yield from (wrong for _, wrong in saves_at_any_call(case, ram))


def test_the_steps_as_they_are_pass_what_the_mutants_fail(cases, ram):
    case = next(case for case in cases if case.name == "router only: modular_experts3")
    assert not any(_wrong([case], ram))
