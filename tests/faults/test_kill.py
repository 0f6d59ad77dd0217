from collections.abc import Callable
from typing import Any

import pytest

import faults_kill
from faults_verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


def test_no_kill_at_any_moment_loses_doubles_or_changes_anything(
    kept: Callable[[dict[str, Any]], Verdict],
) -> None:
    verdict = kept(faults_kill.attack(faults_kill.SHORT, seed=1))
    assert verdict.figures["kills"] == faults_kill.SHORT
    assert verdict.figures["zombies"], "no worker went on after it had lost its leases"
    assert verdict.jobs >= faults_kill.SHORT * faults_kill.JOBS_A_KILL
    assert verdict.figures["jobs_run_again"], "no kill hit anything: nothing was tested"
    assert verdict.figures["objects_compared"] >= verdict.jobs
