from collections.abc import Callable

import pytest

from devtools.faults import kill
from devtools.faults.campaign import ATTACKS
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
SHORT = ATTACKS["kill"].short


def test_no_kill_at_any_moment_loses_doubles_or_changes_anything(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(kill.attack(SHORT, seed=1))
    assert verdict.figures["kills"] == SHORT
    assert verdict.figures["zombies"], "no worker went on after it had lost its leases"
    assert verdict.jobs >= SHORT * kill.JOBS_A_KILL
    assert verdict.figures["jobs_run_again"], "no kill hit anything: nothing was tested"
    assert verdict.figures["objects_compared"] >= verdict.jobs
