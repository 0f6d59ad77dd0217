from collections.abc import Callable

import pytest

from devtools.faults import recovery
from devtools.faults.campaign import ATTACKS
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
SHORT = ATTACKS["recovery"].short


def test_with_the_settings_as_they_come_a_killed_workers_jobs_run_again_within_30_s(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(recovery.attack(SHORT, seed=1))
    assert verdict.figures["jobs_hit"], "nothing ran at the kill: nothing was tested"
    assert 0 < verdict.recovery_s_max <= recovery.RUNS_AGAIN_S
    assert 0 < verdict.figures["lost_messages_done_s"] <= recovery.PUBLISHED_AGAIN_S
