"""When a process makes no progress with its work, and when it only has none."""

from dataclasses import dataclass, field

import pytest

from gradcam_worker.errors import BrokerUnavailable
from gradcam_worker.resilience import stall
from gradcam_worker.resilience.stall import StallDetector

HUNG_S = 3600.0


@dataclass
class Day:
    """A clock that is set by hand, and a queue."""

    now_s: float = 1000.0
    waits: bool = False
    paused: bool = False
    unreachable: bool = False
    asked: int = 0
    one: StallDetector = field(init=False)

    def waiting(self) -> bool:
        self.asked += 1
        if self.unreachable:
            message = "The broker cannot be reached."
            raise BrokerUnavailable(message)
        return self.waits

    def passes(self, seconds: float) -> "Day":
        for _ in range(int(seconds)):
            self.now_s += 1
            self.one.check()
        return self

    @property
    def reasons(self) -> tuple[bool, str | None]:
        return self.one.unready_reason() is not None, self.one.unhealthy_reason()


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Day:
    made = Day()
    monkeypatch.setattr("gradcam_worker.resilience.stall.time.monotonic", lambda: made.now_s)
    made.one = StallDetector(made.waiting, HUNG_S, lambda: made.paused)
    return made


def test_without_work_there_need_be_no_progress(day: Day) -> None:
    assert day.passes(10_000).reasons == (False, None)
    assert day.asked <= 10_000 / stall.QUEUE_CHECK_INTERVAL_S


def test_jobs_that_wait_and_are_not_taken_are_first_a_reason_for_no_more_and_then_for_a_new_process(
    day: Day,
) -> None:
    day.waits = True
    assert day.passes(stall.UNREADY_AFTER_S).reasons == (False, None)
    assert day.passes(15).reasons == (True, None)
    unready, unhealthy = day.passes(stall.UNHEALTHY_AFTER_S).reasons
    assert unready
    assert unhealthy
    assert unhealthy.startswith("jobs have waited for")


def test_a_process_that_takes_no_jobs_on_purpose_is_not_stalled(day: Day) -> None:
    day.waits = day.paused = True
    assert day.passes(1000).reasons == (False, None)
    day.paused = False
    assert day.passes(stall.UNREADY_AFTER_S).reasons == (False, None), "its time begins now"
    assert day.passes(15).reasons == (True, None)


def test_a_queue_that_was_empty_meanwhile_is_no_queue_that_waits(day: Day) -> None:
    for _ in range(10):
        day.waits = True
        day.passes(30)
        day.waits = False
        assert day.passes(10).reasons == (False, None)


def test_running_jobs_have_an_hour_and_any_progress_is_enough(day: Day) -> None:
    day.waits = True
    with day.one.running_job():
        assert day.passes(HUNG_S).reasons == (False, None)
        day.one.progressed()
        assert day.passes(HUNG_S).reasons == (False, None)
        with day.one.running_job():
            assert "2 jobs are running without progress" in str(day.passes(HUNG_S + 60).reasons[1])
        assert day.passes(HUNG_S).reasons == (False, None)
        assert "1 job is running without progress for" in str(day.passes(60).reasons[1])
    assert day.reasons == (False, None)


def test_whether_jobs_wait_is_not_asked_as_long_as_jobs_end(day: Day) -> None:
    for _ in range(100):
        with day.one.running_job():
            day.passes(stall.QUEUE_CHECK_INTERVAL_S - 1)
    assert not day.asked


def test_an_unreachable_broker_is_no_fault_of_the_process(day: Day) -> None:
    day.waits = day.unreachable = True
    assert day.passes(500).reasons == (False, None)
    day.unreachable = False
    assert day.passes(stall.UNREADY_AFTER_S).reasons == (False, None)


def test_a_broker_that_refuses_what_a_consumer_needs_is_not_the_fault_of_the_process_for_half_an_hour(
    day: Day,
) -> None:
    day.waits = True
    for _ in range(int(stall.BROKER_EXCUSE_S / 10) - 1):
        assert day.one.broker_unreachable()
        assert day.passes(10).reasons == (False, None)
    day.passes(stall.UNHEALTHY_AFTER_S)
    assert not day.one.broker_unreachable()
    assert day.passes(stall.UNHEALTHY_AFTER_S + 10).reasons[1]
    day.one.broker_reachable()
    assert day.reasons == (False, None)


def test_orphaned_messages_are_a_fault_where_no_job_is_running(day: Day) -> None:
    day.one.orphaned_messages(18)
    assert day.passes(stall.UNREADY_AFTER_S).reasons == (False, None)
    assert day.passes(1).reasons == (True, None)
    assert day.passes(stall.UNHEALTHY_AFTER_S).reasons == (
        True,
        "messages are not acknowledged, and no job is running",
    )
    with day.one.running_job():
        assert day.reasons == (False, None)
    day.one.orphaned_messages(0)
    assert day.reasons == (False, None)
