from collections.abc import Callable

import pytest

from devtools.faults import soak
from devtools.faults.soak import Usage
from devtools.faults.verdict import Verdict

# Enough for crashes, for files, threads and keys that are left over, and for memory that grows fast. A slow
# leak, of less than `soak.ROUGHLY_FLAT` in this time, is for `scripts/faults --full soak` to find.
SECONDS = 6  # what is warming up then makes another round


@pytest.mark.live
@pytest.mark.timeout(600)
def test_a_worker_that_is_fed_everything_grows_by_nothing_and_leaves_nothing(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(soak.attack(SECONDS, seed=1))
    assert len(verdict.figures["kinds"]) == 10, "every kind of job had its turn"
    assert verdict.figures["temporary_files"] == 0


def usage(resident: list[float]) -> Usage:
    return Usage(1, [(float(at), size, 30.0, 40.0) for at, size in enumerate(resident)])


def test_growth_is_seen_through_noise() -> None:
    noise = [1.0, -1.0, 2.0, -2.0, 0.0] * 20
    flat = usage([100 + grain for grain in noise])
    leaking = usage([100 + at * 0.2 + grain for at, grain in enumerate(noise)])
    assert abs(flat.growth()) < 0.01
    assert leaking.growth() == pytest.approx(14 / 113, rel=0.1)


def test_one_peak_is_no_growth() -> None:
    assert usage([100.0] * 60 + [900.0] + [100.0] * 39).growth() == 0


def test_the_warm_up_is_left_out() -> None:
    assert usage([*map(float, range(30)), *[30.0] * 70]).growth() == 0


def test_threads_that_stay_are_seen() -> None:
    leaking = Usage(1, [(float(at), 100.0, float(at), 40.0) for at in range(100)])
    assert leaking.rises()["threads"] > 40
    assert leaking.rises()["files"] == 0
