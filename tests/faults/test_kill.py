from collections.abc import Callable
from typing import Any

import pytest

from devtools.faults import kill
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


def test_no_kill_at_any_moment_loses_doubles_or_changes_anything(
    kept: Callable[[dict[str, Any]], Verdict],
) -> None:
    verdict = kept(kill.attack(kill.SHORT, seed=1))
    assert verdict.figures["kills"] == kill.SHORT
    assert verdict.figures["zombies"], "no worker went on after it had lost its leases"
    assert verdict.jobs >= kill.SHORT * kill.JOBS_A_KILL
    assert verdict.figures["jobs_run_again"], "no kill hit anything: nothing was tested"
    assert verdict.figures["objects_compared"] >= verdict.jobs
