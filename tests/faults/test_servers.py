from collections.abc import Callable

import pytest

from devtools.faults import servers
from devtools.faults.campaign import ATTACKS
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]
SHORT = ATTACKS["servers"].short


def test_a_worker_gets_over_whatever_happens_to_the_servers_around_it(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(servers.attack(SHORT, seed=1))
    assert verdict.faults >= 10
    assert verdict.figures["jobs_hit"], "no job ran at any of them: nothing was tested"
