import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gradcam_worker.errors import StorageUnavailable
from gradcam_worker.resilience.circuit_breaker import FAILURES, CircuitBreaker

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
def watched() -> Iterator[Callable[[CircuitBreaker], threading.Thread]]:
    """Have a breaker watched until the test is over."""
    stopped, threads = threading.Event(), []

    def start(breaker: CircuitBreaker) -> threading.Thread:
        threads.append(threading.Thread(target=breaker.watch, args=[stopped]))
        threads[-1].start()
        return threads[-1]

    yield start
    stopped.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def fail(breaker: CircuitBreaker, times: int = FAILURES) -> None:
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
    fail(breaker, FAILURES - 1)
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
        fail(breaker, FAILURES - 1)
        breaker.succeeded()
    assert why(breaker) is None


def test_a_job_that_was_under_way_and_succeeds_closes_it() -> None:
    breaker = CircuitBreaker(Storage(None))
    fail(breaker)
    breaker.succeeded()
    assert why(breaker) is None
    fail(breaker, FAILURES - 1)
    assert why(breaker) is None


def test_it_probes_by_itself_and_closes_when_the_storage_is_back(watched: Any) -> None:
    storage = Storage(FAILURE, FAILURE, None)
    breaker = CircuitBreaker(storage, first_pause_s=0.02)
    watched(breaker)
    fail(breaker)
    assert storage.was_asked(3)
    assert closed(breaker)
    fail(breaker)
    assert storage.was_asked(4), "and again the next time"
    assert closed(breaker)


def test_nothing_is_probed_while_it_is_closed(watched: Any) -> None:
    storage = Storage(None)
    breaker = CircuitBreaker(storage, first_pause_s=0.001)
    watched(breaker)
    fail(breaker, FAILURES - 1)
    threading.Event().wait(1)
    assert storage.asked == 0


def test_a_probe_that_breaks_in_an_unforeseen_way_does_not_end_the_watch(
    watched: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gradcam")
    storage = Storage(KeyError("surprise"), None)
    breaker = CircuitBreaker(storage, first_pause_s=0.02)
    watched(breaker)
    fail(breaker)
    assert closed(breaker)
    said = [record.getMessage().partition("(")[0] for record in caplog.records]
    assert said[0].startswith("no jobs are taken until it is back.")
    assert said[1:] == ["the storage is still down: KeyError: 'surprise'", "the storage is back "]


def test_a_watch_that_is_stopped_while_it_is_open_ends_at_once(watched: Any) -> None:
    breaker = CircuitBreaker(Storage(FAILURE), first_pause_s=600)
    watched(breaker)
    fail(breaker)  # the fixture stops the watch and waits for its end


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
