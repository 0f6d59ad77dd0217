from collections.abc import Callable
from typing import Any

import pytest

import faults_stale
from faults_verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]


def test_no_manifest_of_before_is_posted_as_the_result_of_another_job_of_its_id(
    kept: Callable[[dict[str, Any]], Verdict],
) -> None:
    verdict = kept(faults_stale.attack(faults_stale.SHORT, seed=1))
    assert verdict.jobs == 2 * faults_stale.SHORT
    assert verdict.figures["begun_twice"] == faults_stale.SHORT
