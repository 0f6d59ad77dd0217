from collections.abc import Callable

import pytest

from devtools.faults import poison
from devtools.faults.campaign import ATTACKS
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
SHORT = ATTACKS["poison"].short


def test_a_job_that_kills_its_process_each_time_takes_no_others_with_it(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(poison.attack(SHORT, seed=1))
    assert verdict.jobs == SHORT + 1 + poison.WEDGES
    assert verdict.figures["processes_killed"] == poison.ATTEMPTS
    assert verdict.figures["healthy_attempts_max"] <= 2, "it was alone from its second attempt on"
