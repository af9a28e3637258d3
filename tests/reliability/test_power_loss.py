"""Figure 3: after a power loss, the checkpoint is the old one or the new one, and each fsync is needed for that."""

from __future__ import annotations

import shutil

from powerloss import bad_states, record


def test_every_state_that_a_power_loss_can_leave_is_old_or_new(cases, tmp_path, figure):
    counts, bad = {}, []
    for case in cases:
        log = record(case, tmp_path / "run")
        found = list(bad_states(case, log, tmp_path / "states"))
        counts[case.name] = len(found)
        bad += [f"{case.name}: {what}" for what in found if what]
        shutil.rmtree(tmp_path / "run")
        shutil.rmtree(tmp_path / "states")
    figure(3, f"{sum(counts.values())} states that a power loss can leave, of {len(cases)} runs: {len(bad)} bad")
    assert not bad, "\n".join(bad[:20])
    assert all(counts.values())
