from collections.abc import Callable
from typing import Any

import pytest

from devtools.faults import addresses
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


def test_no_trick_in_a_job_leads_a_worker_inside(kept: Callable[[dict[str, Any]], Verdict]) -> None:
    verdict = kept(addresses.attack(addresses.SHORT, seed=1))
    assert verdict.jobs >= 200
    assert verdict.figures["connections"] == 0
    assert verdict.figures["ends"]["uri_not_allowed"] >= 100
