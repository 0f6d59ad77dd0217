from collections.abc import Callable

import pytest

from devtools.faults import failover
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]


def test_a_busy_worker_gets_over_a_failover_behind_its_address(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(failover.attack(1, seed=1))
    assert verdict.faults == 1
