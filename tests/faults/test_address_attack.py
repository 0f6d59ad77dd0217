from collections.abc import Callable

import pytest

from devtools.faults import addresses
from devtools.faults.campaign import ATTACKS
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
SHORT = ATTACKS["addresses"].short


def test_no_trick_in_a_job_leads_a_worker_inside(kept: Callable[[Verdict], Verdict]) -> None:
    verdict = kept(addresses.attack(SHORT, seed=1))
    assert verdict.jobs >= 200
    assert verdict.figures["connections"] == 0
    assert verdict.figures["ends"]["uri_not_allowed"] >= 100
