"""A backfill whose submitter and whose workers are killed at random moments."""

import pytest

from devtools.faults import backfill_kills

pytestmark = [pytest.mark.live]


@pytest.mark.timeout(400)
def test_a_backfill_survives_that_everybody_is_killed_with_each_row_exactly_once() -> None:
    survived = backfill_kills.survive(rows=3_000, kills=2)
    assert (survived.lost, survived.doubled) == (0, 0)
    assert survived.kills == 2
