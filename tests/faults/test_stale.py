from collections.abc import Callable

import pytest

from devtools.faults import stale
from devtools.faults.campaign import ATTACKS
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]
SHORT = ATTACKS["stale"].short


def test_no_manifest_of_before_is_posted_as_the_result_of_another_job_of_its_id(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(stale.attack(SHORT, seed=1))
    assert verdict.jobs == 2 * SHORT
    assert verdict.figures["begun_twice"] == SHORT
