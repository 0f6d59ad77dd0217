from collections.abc import Callable

import pytest

from devtools.faults import engine
from devtools.faults.campaign import ATTACKS
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
SHORT = ATTACKS["engine"].short


def test_no_fault_of_an_engine_or_a_job_process_loses_doubles_or_changes_anything(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(engine.attack(SHORT, seed=1))
    for fault in ("kill", "hang", "kill_jobs", "suspend_jobs"):
        assert verdict.figures[fault] == SHORT
    assert verdict.figures["objects_compared"] >= verdict.jobs
