"""When a process does not get on with its work, and when it only has none."""

from dataclasses import dataclass, field

import pytest

from gradcam_worker.errors import BrokerUnavailable
from gradcam_worker.resilience import stall
from gradcam_worker.resilience.stall import Stall

HUNG_S = 3600.0


@dataclass
class Day:
    """A clock that is set by hand, and a queue."""

    now_s: float = 1000.0
    waits: bool = False
    away: bool = False
    asked: int = 0
    one: Stall = field(init=False)

    def waiting(self) -> bool:
        self.asked += 1
        if self.away:
            message = "The broker cannot be reached."
            raise BrokerUnavailable(message)
        return self.waits

    def passes(self, seconds: float) -> "Day":
        for _ in range(int(seconds)):
            self.now_s += 1
            self.one.look()
        return self

    @property
    def said(self) -> tuple[bool, str | None]:
        return self.one.unready() is not None, self.one.trouble()


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Day:
    made = Day()
    monkeypatch.setattr("gradcam_worker.resilience.stall.time.monotonic", lambda: made.now_s)
    made.one = Stall(made.waiting, HUNG_S)
    return made


def test_without_work_nothing_has_to_move(day: Day) -> None:
    assert day.passes(10_000).said == (False, None)
    assert day.asked <= 10_000 / stall.ASK_EVERY_S


def test_jobs_that_wait_and_are_not_taken_are_first_a_reason_for_no_more_and_then_for_a_new_process(
    day: Day,
) -> None:
    day.waits = True
    assert day.passes(stall.UNREADY_S).said == (False, None)
    assert day.passes(15).said == (True, None)
    unready, trouble = day.passes(stall.IDLE_S).said
    assert unready
    assert trouble
    assert trouble.startswith("jobs have waited for")


def test_a_queue_that_was_empty_meanwhile_is_no_queue_that_waits(day: Day) -> None:
    for _ in range(10):
        day.waits = True
        day.passes(30)
        day.waits = False
        assert day.passes(10).said == (False, None)


def test_jobs_in_hand_have_an_hour_to_get_on_and_any_move_is_enough(day: Day) -> None:
    day.waits = True
    with day.one.in_hand():
        assert day.passes(HUNG_S).said == (False, None)
        day.one.moved()
        assert day.passes(HUNG_S).said == (False, None)
        with day.one.in_hand():
            assert "2 jobs are in hand" in str(day.passes(HUNG_S + 60).said[1])
        assert day.passes(HUNG_S).said == (False, None)
        assert "1 job is in hand, others wait, and none has got on" in str(day.passes(60).said[1])
    assert day.said == (False, None)


def test_whether_jobs_wait_is_not_asked_as_long_as_jobs_end(day: Day) -> None:
    for _ in range(100):
        with day.one.in_hand():
            day.passes(stall.ASK_EVERY_S - 1)
    assert not day.asked


def test_a_broker_that_is_away_is_no_fault_of_the_process(day: Day) -> None:
    day.waits = day.away = True
    assert day.passes(500).said == (False, None)
    day.away = False
    assert day.passes(stall.UNREADY_S).said == (False, None)


def test_a_broker_that_refuses_what_a_consumer_needs_is_not_the_fault_of_the_process_for_half_an_hour(
    day: Day,
) -> None:
    day.waits = True
    for _ in range(int(stall.AWAY_S / 10) - 1):
        assert day.one.away()
        assert day.passes(10).said == (False, None)
    day.passes(stall.IDLE_S)
    assert not day.one.away()
    assert day.passes(stall.IDLE_S + 10).said[1]
    day.one.back()
    assert day.said == (False, None)


def test_messages_that_are_held_for_nobody_are_trouble_where_no_job_is_in_hand(day: Day) -> None:
    day.one.orphaned_messages(18)
    assert day.passes(stall.UNREADY_S).said == (False, None)
    assert day.passes(1).said == (True, None)
    assert day.passes(stall.IDLE_S).said == (True, "messages are not acknowledged, and no job is in hand")
    with day.one.in_hand():
        assert day.said == (False, None)
    day.one.orphaned_messages(0)
    assert day.said == (False, None)
