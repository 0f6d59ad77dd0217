from collections.abc import Callable

import pytest

from devtools.faults import kill
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
KILLS = 5  # one more than it takes until a process is suspended


def test_no_kill_at_any_moment_loses_doubles_or_changes_anything(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(kill.attack(KILLS, seed=1))
    assert verdict.figures["kills"] == KILLS
    assert verdict.figures["zombies"], "no worker went on after it had lost its leases"
    assert verdict.jobs >= KILLS * kill.JOBS_A_KILL
    assert verdict.figures["jobs_run_again"], "no kill hit anything: nothing was tested"
    assert verdict.figures["objects_compared"] >= verdict.jobs
