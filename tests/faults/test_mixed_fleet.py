"""The parts of the attack on a mixed fleet that judge. The attack itself takes too long for this suite.

It costs 40 s of processor time for its 14 programs alone; `scripts/faults mixed_fleet` makes it. Here,
`tests/live/test_mixed_fleet.py` holds a fleet of two workers.
"""

from typing import Any

import pytest

from devtools.faults import mixed_fleet
from devtools.faults.releases import PRESENT, EarlierRelease
from devtools.faults.verdict import Verdict
from gradcam_worker.settings import Settings

WRITTEN: dict[str, Any] = {"id": "a", "status": "succeeded", "revision": 4, "attempt": 2, "predictions": [1]}


def test_what_the_other_release_does_not_know_is_not_misread() -> None:
    assert mixed_fleet.misread({**WRITTEN, "error": None, "later": 1}, {**WRITTEN, "earlier": 1}) == []


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_read_otherwise_or_not_at_all_is_misread(name: str) -> None:
    assert mixed_fleet.misread({**WRITTEN, name: 0}, WRITTEN) == [name]
    assert mixed_fleet.misread({key: WRITTEN[key] for key in WRITTEN if key != name}, WRITTEN) == [name]


def test_a_broken_promise_of_one_fleet_is_one_of_all() -> None:
    verdict = Verdict(jobs=1)
    verdict.add("old", Verdict(jobs=2, lost=1, recovery_s_max=3.0, broken=["It broke."], figures={"kill": 1}))
    verdict.add("older", Verdict(jobs=4, recovery_s_max=2.0))
    assert (verdict.jobs, verdict.lost, verdict.recovery_s_max) == (7, 1, 3.0)
    assert verdict.broken == ["old: It broke."]
    assert verdict.figures == {"old": {"kill": 1}, "older": {}}
    assert not verdict.kept


def test_an_earlier_release_gets_no_setting_that_nobody_has_set() -> None:
    environment = PRESENT.environment(Settings(threads=3))
    assert environment == {"GRADCAM_THREADS": "3", "PYTHONPATH": ""}


def test_a_release_that_is_not_in_the_history_is_told_with_what_is_missing(tmp_path: Any) -> None:
    missing = EarlierRelease("0" * 40, "worker", "scripts/x.py", has_gateway=True, runs_present_shards=True)
    with pytest.raises(RuntimeError, match="whole history"):
        missing.unpack(tmp_path)
