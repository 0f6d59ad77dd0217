"""After which pause something is tried again, how often, and for how long."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from gradcam_worker.errors import JobCanceled, JobTimeout
from gradcam_worker.resilience import retry
from gradcam_worker.resilience.blocking import run_blocking
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.retry import RetryPolicy

WAIT_S = 20
AT_ONCE = RetryPolicy(first_s=0, max_s=0, errors=(ConnectionError,))


class Call:
    """Raises what it is given, in turn, then returns how often it was called."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = [*errors], 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


def gone(times: int) -> Call:
    return Call(*(ConnectionError(f"gone {number}") for number in range(1, times + 1)))


def test_a_pause_grows_by_the_factor_up_to_the_maximum() -> None:
    policy = RetryPolicy(first_s=0.5, max_s=10, factor=3)
    assert [policy.pause_s(failures) for failures in range(1, 6)] == [0.5, 1.5, 4.5, 10, 10]


@pytest.mark.parametrize("factor", [1.5, 2, 10])
def test_after_any_number_of_failures_it_is_the_maximum(factor: float) -> None:
    assert RetryPolicy(first_s=1e-6, max_s=60, factor=factor).pause_s(1_000_000) == 60


def test_jitter_shortens_or_lengthens_a_pause_within_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RetryPolicy(first_s=8, max_s=8, jitter=(0.5, 1.25))
    pauses = [policy.pause_s(1) for _ in range(200)]
    assert all(4 <= pause_s <= 10 for pause_s in pauses)
    assert len({*pauses}) > 100
    monkeypatch.setattr("gradcam_worker.resilience.retry.random.uniform", lambda _, most: most)
    assert policy.pause_s(1) == 10


def test_a_call_is_tried_again_until_it_succeeds() -> None:
    assert AT_ONCE.call(gone(3)) == 4


def test_an_error_that_is_not_of_the_policy_is_raised_at_once() -> None:
    call = Call(ValueError("a defect"))
    with pytest.raises(ValueError, match="a defect"):
        AT_ONCE.call(call)
    assert call.calls == 1


def test_a_hopeless_error_is_raised_at_once() -> None:
    policy = replace(AT_ONCE, hopeless=lambda error: "denied" in str(error))
    call = Call(ConnectionError("gone"), ConnectionError("denied"), ConnectionError("gone"))
    with pytest.raises(ConnectionError, match="denied"):
        policy.call(call)
    assert call.calls == 2


def test_the_last_error_is_raised_after_the_most_tries() -> None:
    call = gone(5)
    with pytest.raises(ConnectionError, match="gone 3"):
        replace(AT_ONCE, max_tries=3).call(call)


def test_it_is_not_tried_again_where_the_pause_would_last_longer_than_the_time_left() -> None:
    for policy, deadline in (
        (RetryPolicy(first_s=60, max_s=60, total_s=30), None),
        (RetryPolicy(first_s=60, max_s=60), Deadline(30)),
    ):
        call = gone(2)
        with pytest.raises(ConnectionError, match="gone 1"):
            policy.call(call, deadline)


def test_work_that_is_ended_in_a_pause_is_not_tried_again() -> None:
    retries, call = AT_ONCE.start(), gone(1)

    async def once() -> int:
        return call()

    async def pause(_: float) -> None:
        retries.end()

    with pytest.raises(ConnectionError, match="gone 1"):
        run_blocking(retries.call_awaited(once, pause))
    assert call.calls == 1


def test_each_pause_is_as_long_as_the_policy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("gradcam_worker.resilience.retry.time.sleep", pauses.append)
    policy = RetryPolicy(first_s=0.25, max_s=1)
    assert policy.call(gone(4)) == 5
    assert pauses == [0.25, 0.5, 1, 1]


def test_a_job_that_is_cancelled_while_it_retries_ends_with_what_it_was_cancelled_with() -> None:
    deadline = Deadline(60)

    def once() -> None:
        deadline.cancel(JobCanceled("on request"))
        message = "gone"
        raise ConnectionError(message)

    with pytest.raises(JobCanceled, match="on request"):
        AT_ONCE.call(once, deadline)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def test_parallel_calls_return_in_the_order_in_which_they_were_begun(pool: ThreadPoolExecutor) -> None:
    retries, first_may_end = AT_ONCE.start(), threading.Event()

    def first() -> str:
        assert first_may_end.wait(WAIT_S)
        return "first"

    def second() -> str:
        first_may_end.set()
        return "second"

    assert retries.wait_for([pool.submit(first), pool.submit(second)], "upload") == ["first", "second"]


def test_after_the_failure_of_one_parallel_call_the_others_try_no_more(pool: ThreadPoolExecutor) -> None:
    retries = AT_ONCE.start()
    tried, tries = threading.Event(), list[int]()

    def keeps_failing() -> None:
        tries.append(1)
        tried.set()
        while not retries._ended:  # until the failure of the other is known
            time.sleep(0.001)
        message = "gone"
        raise ConnectionError(message)

    def fails() -> None:
        assert tried.wait(WAIT_S)
        message = "a defect"
        raise ValueError(message)

    calls = [pool.submit(fails), pool.submit(retries.call, keeps_failing)]
    with pytest.raises(ValueError, match="a defect"):
        retries.wait_for(calls, "upload")
    assert len(tries) == 1


def out_of_time(allowed_s: float, *, job: bool) -> Callable[[], object]:
    """What waits for a call that does not end, with no time left: the job's, or this work's."""
    deadline = Deadline(allowed_s if job else 60)
    retries = RetryPolicy(0, 0, total_s=math.inf if job else allowed_s).start(deadline)
    return lambda: retries.check("upload")


def test_where_the_jobs_time_is_up_the_job_has_timed_out() -> None:
    with pytest.raises(JobTimeout, match="at: upload"):
        out_of_time(0, job=True)()


def test_where_only_this_works_time_is_up_the_server_did_not_answer() -> None:
    with pytest.raises(TimeoutError, match=r"no answer within 0\.0 s"):
        out_of_time(0, job=False)()


def test_a_server_that_failed_is_to_blame_also_where_the_jobs_time_runs_out_meanwhile() -> None:
    retries = AT_ONCE.start(Deadline(0))
    retries.record_failure(ConnectionError("refused\nand more"))
    with pytest.raises(TimeoutError, match=r"after: refused$"):
        retries.give_up("upload")


def test_a_server_that_held_the_job_up_for_long_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "UNRESPONSIVE_S", 0)
    with pytest.raises(TimeoutError, match="no answer within"):
        AT_ONCE.start(Deadline(0)).give_up("upload")
