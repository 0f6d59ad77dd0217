from collections.abc import Callable
from typing import Any

import pytest

from devtools.faults import poison
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


def test_a_job_that_kills_its_process_each_time_takes_no_others_with_it(
    kept: Callable[[dict[str, Any]], Verdict],
) -> None:
    verdict = kept(poison.attack(poison.SHORT, seed=1))
    assert verdict.jobs == poison.SHORT + 1 + poison.WEDGES
    assert verdict.figures["processes_killed"] == poison.ATTEMPTS
    assert verdict.figures["healthy_attempts_max"] <= 2, "it was alone from its second attempt on"
