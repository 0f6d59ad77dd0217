import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from gradcam_worker.errors import StorageUnavailable
from gradcam_worker.resilience.background_loop import BackgroundLoop, stop_all
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.resilience.server_activity import ServerActivity
from gradcam_worker.schemas.ids import utc_now

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


def silent(seconds: float) -> ServerActivity:
    """Requests that have had no answer for so long."""
    activity = ServerActivity()
    if seconds:
        activity._since_s = time.monotonic() - seconds
    return activity


def why(breaker: CircuitBreaker) -> str | None:
    return breaker.open_reason


def closed(breaker: CircuitBreaker) -> bool:
    waiting = threading.Event()
    for _ in range(2000):
        if not breaker.open_reason:
            return True
        waiting.wait(0.01)
    return False


def test_where_requests_have_no_answer_a_probe_decides() -> None:
    storage, reads, writes = Storage(None, FAILURE), silent(1.5), ServerActivity()
    breaker = CircuitBreaker(storage, activities=[reads, writes])
    breaker.succeeded()
    breaker.step()
    assert storage.asked == 0, "not so soon"
    reads._since_s = time.monotonic() - 300
    breaker.step()
    assert (storage.asked, why(breaker)) == (1, None), "a large object, perhaps"
    breaker.step()
    assert storage.asked == 1, "not again at once"
    breaker._due_s = 0
    breaker.step()
    said = breaker.open_reason
    assert said
    since = f"{utc_now() - timedelta(seconds=300):%Y-%m-%dT%H:%M}"
    assert said.startswith(f"The storage has failed since {since}")
    assert said.endswith("Z: s3://out/x could not be written: HTTP 503")
    breaker.probe()
    assert breaker.open_reason == said, "since the first time"


def test_reads_that_are_answered_do_not_hide_writes_that_are_not() -> None:
    storage, reads, writes = Storage(FAILURE), ServerActivity(), silent(10)
    breaker = CircuitBreaker(storage, activities=[reads, writes])
    with reads.request():
        pass
    breaker.step()
    assert why(breaker)


def test_it_may_be_to_blame_as_soon_as_a_request_has_failed_or_hangs() -> None:
    activity = ServerActivity()
    breaker = CircuitBreaker(Storage(None), activities=[activity])
    assert not breaker.may_be_to_blame()
    with contextlib.suppress(OSError), activity.request():
        raise OSError
    assert breaker.may_be_to_blame()
    activity.answered()
    assert not breaker.may_be_to_blame()
    activity._since_s = time.monotonic() - 3
    assert breaker.may_be_to_blame()


def test_an_error_is_confirmed_by_a_probe_that_those_who_ask_meanwhile_share() -> None:
    release = threading.Event()
    asked: list[int] = []

    def probe() -> None:
        asked.append(1)
        assert release.wait(20)
        raise FAILURE

    breaker = CircuitBreaker(probe)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(breaker.confirm) for _ in range(8)]
        release.set()
        assert [one.result(20) for one in answers] == [True] * 8
    assert breaker.confirm()
    assert len(asked) == 1
    breaker = CircuitBreaker(Storage(None))
    assert not breaker.confirm()


def test_a_job_that_was_under_way_and_succeeds_closes_it_which_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="gradcam")
    breaker = CircuitBreaker(Storage(FAILURE))
    breaker.probe()
    assert why(breaker)
    for _ in range(2):
        breaker.succeeded()
        assert why(breaker) is None
    assert [line.partition(" ")[0] for line in caplog.messages] == ["circuit_opened", "circuit_closed"]


def test_it_probes_by_itself_and_closes_when_the_storage_is_back(probing: Any) -> None:
    storage = Storage(FAILURE, FAILURE, FAILURE, None, FAILURE, None)
    breaker = CircuitBreaker(storage, RetryPolicy(0.02, 30))
    probing(breaker)
    breaker.probe()
    assert storage.was_asked(4)
    assert closed(breaker)
    breaker.probe()
    assert storage.was_asked(6), "and again the next time"
    assert closed(breaker)


def test_nothing_is_probed_while_it_is_closed_and_all_is_well() -> None:
    storage = Storage(None)
    breaker = CircuitBreaker(storage, activities=[silent(0)])
    breaker.succeeded()
    breaker.step()
    assert storage.asked == 0


def test_it_is_ready_once_a_first_probe_or_job_has_succeeded(probing: Any) -> None:
    storage = Storage(FAILURE, None)
    breaker = CircuitBreaker(storage, RetryPolicy(0.02, 30))
    unready = [breaker.unready_reason]
    assert why(breaker) is None, "jobs find out for themselves"
    breaker.step()
    unready.append(breaker.unready_reason)
    assert unready == ["The storage has not been used yet.", why(breaker)]
    probing(breaker)
    assert storage.was_asked(2)
    assert closed(breaker)
    assert breaker.unready_reason is None


def test_it_is_probed_ever_more_rarely_and_not_before_a_probe_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now, probed = [1000.0], list[float]()
    monkeypatch.setattr("gradcam_worker.resilience.circuit_breaker.time.monotonic", lambda: now[0])
    monkeypatch.setattr("gradcam_worker.resilience.retry.random.uniform", lambda _, most: most)
    storage = Storage(FAILURE)
    breaker = CircuitBreaker(storage)
    breaker.probe()
    for _ in range(1000):
        asked = storage.asked
        breaker.step()
        if storage.asked > asked:
            probed.append(now[0] - 1000)
        now[0] += 0.5
    assert probed[:7] == [2, 6, 14, 24, 34, 44, 54]
    breaker.succeeded()
    breaker.probe()
    opened_s, asked = now[0], storage.asked
    while storage.asked == asked:
        breaker.step()
        now[0] += 0.5
    assert now[0] - opened_s == 2.5, "the next time it begins with the first pause again"


def test_a_probe_that_breaks_with_an_unexpected_error_is_a_storage_that_is_down(
    probing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gradcam")
    storage = Storage(KeyError("surprise"), KeyError("surprise"), None)
    breaker = CircuitBreaker(storage, RetryPolicy(0.02, 30))
    probing(breaker)
    breaker.probe()
    assert closed(breaker)
    opened, closing = [record.getMessage() for record in caplog.records]
    assert opened.startswith("circuit_opened reason=")
    assert opened.endswith("'surprise'\"")
    assert closing.startswith("circuit_closed open_s=")


def test_a_long_outage_is_told_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gradcam")
    now = [1000.0]
    monkeypatch.setattr("gradcam_worker.resilience.circuit_breaker.time.monotonic", lambda: now[0])
    breaker = CircuitBreaker(Storage(FAILURE))
    for _ in range(91):
        breaker.probe()
        now[0] += 1
    first, *others = [record.getMessage() for record in caplog.records]
    assert first.startswith("circuit_opened reason=")
    assert [one.partition(" error_type")[0] for one in others] == [
        f"circuit_still_open open_s={seconds}" for seconds in (30, 60, 90)
    ]
