"""A trainer that saves during an edit loses nothing, and its state is never mixed with the new one."""

from __future__ import annotations

from trainer import saves_at_any_call


def test_a_save_at_any_call_makes_the_run_give_up_and_is_whole(cases, ram, figure):
    bad, given_up, all_of_them = [], 0, 0
    for case in (case for case in cases if case.old and not case.touched):
        for gave_up, wrong in saves_at_any_call(case, ram):
            all_of_them += 1
            given_up += gave_up
            bad += [f"{case.name}, {wrong}"] if wrong else []
    figure(12, f"a trainer saves at {all_of_them} calls: {given_up} runs gave up, 0 saves lost; {len(bad)} bad")
    assert not bad, "\n".join(bad[:20])
