from collections.abc import Callable
from typing import Any

import pytest

from devtools.faults import stale
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]


def test_no_manifest_of_before_is_posted_as_the_result_of_another_job_of_its_id(
    kept: Callable[[dict[str, Any]], Verdict],
) -> None:
    verdict = kept(stale.attack(stale.SHORT, seed=1))
    assert verdict.jobs == 2 * stale.SHORT
    assert verdict.figures["begun_twice"] == stale.SHORT
