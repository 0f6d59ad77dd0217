from collections.abc import Callable

import pytest

from devtools.faults import kill
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
KILLS = kill.ZOMBIE_BY + 1  # the last one comes after a process was suspended, whatever is drawn


def test_no_kill_at_any_moment_loses_doubles_or_changes_anything(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(kill.attack(KILLS, seed=1))
    assert verdict.figures["kills"] == KILLS
    assert verdict.figures["zombies"], "no worker went on after it had lost its leases"
    assert verdict.jobs >= KILLS * kill.JOBS_A_KILL
    assert verdict.figures["jobs_run_again"], "no kill hit anything: nothing was tested"
    assert verdict.figures["objects_compared"] >= verdict.jobs
