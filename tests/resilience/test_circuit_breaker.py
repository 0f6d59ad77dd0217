import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gradcam_worker.errors import StorageUnavailable
from gradcam_worker.resilience.background_loop import BackgroundLoop, stop_all
from gradcam_worker.resilience.circuit_breaker import MAX_FAILURES, CircuitBreaker
from gradcam_worker.resilience.retry import RetryPolicy

FAILURE = StorageUnavailable("s3://out/x could not be written: HTTP 503")


class Storage:
    """Answers a probe as it is told to, and remembers when it was asked."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.changed = threading.Condition()

    def __call__(self) -> None:
        with self.changed:
            self.asked += 1
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            self.changed.notify_all()
        if answer:
            raise answer

    def was_asked(self, times: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.asked >= times, 20)


@pytest.fixture
def probing() -> Iterator[Callable[[CircuitBreaker], None]]:
    """Run the loop of a breaker until the test is over."""
    loops: list[BackgroundLoop] = []

    def start(breaker: CircuitBreaker) -> None:
        loops.append(breaker.loop)
        breaker.loop.start()

    yield start
    assert stop_all(loops, 20) == []


def fail(breaker: CircuitBreaker, times: int = MAX_FAILURES) -> None:
    for _ in range(times):
        breaker.failed(FAILURE)


def why(breaker: CircuitBreaker) -> str | None:
    return breaker.open_reason


def closed(breaker: CircuitBreaker) -> bool:
    waiting = threading.Event()
    for _ in range(2000):
        if not breaker.open_reason:
            return True
        waiting.wait(0.01)
    return False


def test_it_opens_after_failures_in_a_row_and_says_why_and_since_when() -> None:
    breaker = CircuitBreaker(Storage(None))
    fail(breaker, MAX_FAILURES - 1)
    assert why(breaker) is None
    fail(breaker, 1)
    said = breaker.open_reason
    assert said
    assert said.startswith("The storage failed 3 jobs in a row, since 20")
    assert said.endswith("Z: s3://out/x could not be written: HTTP 503")
    fail(breaker, 5)
    assert breaker.open_reason == said, "since the first time"


def test_a_job_that_succeeds_in_between_starts_the_count_again() -> None:
    breaker = CircuitBreaker(Storage(None))
    for _ in range(3):
        fail(breaker, MAX_FAILURES - 1)
        breaker.succeeded()
    assert why(breaker) is None


def test_a_job_that_was_under_way_and_succeeds_closes_it() -> None:
    breaker = CircuitBreaker(Storage(None))
    fail(breaker)
    breaker.succeeded()
    assert why(breaker) is None
    fail(breaker, MAX_FAILURES - 1)
    assert why(breaker) is None


def test_it_probes_by_itself_and_closes_when_the_storage_is_back(probing: Any) -> None:
    storage = Storage(FAILURE, FAILURE, None)
    breaker = CircuitBreaker(storage, RetryPolicy(0.02, 30))
    probing(breaker)
    fail(breaker)
    assert storage.was_asked(3)
    assert closed(breaker)
    fail(breaker)
    assert storage.was_asked(4), "and again the next time"
    assert closed(breaker)


def test_nothing_is_probed_while_it_is_closed() -> None:
    storage = Storage(None)
    breaker = CircuitBreaker(storage, RetryPolicy(0, 30))
    fail(breaker, MAX_FAILURES - 1)
    breaker.step()
    assert storage.asked == 0
    fail(breaker, 1)
    breaker.step()
    assert storage.asked == 1


def test_it_is_probed_ever_more_rarely_and_not_before_a_probe_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now, probed = [1000.0], list[float]()
    monkeypatch.setattr("gradcam_worker.resilience.circuit_breaker.time.monotonic", lambda: now[0])
    monkeypatch.setattr("gradcam_worker.resilience.retry.random.uniform", lambda _, most: most)
    storage = Storage(FAILURE)
    breaker = CircuitBreaker(storage)
    fail(breaker)
    for _ in range(1000):
        asked = storage.asked
        breaker.step()
        if storage.asked > asked:
            probed.append(now[0] - 1000)
        now[0] += 0.5
    assert probed[:7] == [2, 6, 14, 30, 60, 90, 120]
    breaker.succeeded()
    fail(breaker)
    opened_s = now[0]
    while storage.asked == len(probed):
        breaker.step()
        now[0] += 0.5
    assert now[0] - opened_s == 2.5, "the next time it begins with the first pause again"


def test_a_probe_that_breaks_with_an_unexpected_error_is_a_storage_that_is_down(
    probing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gradcam")
    storage = Storage(KeyError("surprise"), None)
    breaker = CircuitBreaker(storage, RetryPolicy(0.02, 30))
    probing(breaker)
    fail(breaker)
    assert closed(breaker)
    opened, failed, closing = [record.getMessage() for record in caplog.records]
    assert opened.startswith("circuit_opened failures=3 reason=")
    assert failed == "circuit_probe_failed error_type=KeyError error=\"'surprise'\""
    assert closing.startswith("circuit_closed probe_s=")


def test_many_threads_may_tell_it_at_once() -> None:
    breaker = CircuitBreaker(Storage(None))
    start = threading.Barrier(8)

    def tell() -> None:
        start.wait()
        for _ in range(1000):
            breaker.failed(FAILURE)
            breaker.succeeded()

    threads = [threading.Thread(target=tell) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert why(breaker) is None
    fail(breaker)
    assert breaker.open_reason
