import contextlib
import threading

import pytest

from gradcam_worker.resilience.server_activity import ServerActivity


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("gradcam_worker.resilience.server_activity.time.monotonic", lambda: now[0])
    return now


def fail(activity: ServerActivity, kind: type[Exception], now: list[float]) -> None:
    """Send a request that takes a second and fails."""
    with contextlib.suppress(kind), activity.request():
        now[0] += 1
        raise kind


def test_silence_lasts_from_the_first_request_without_an_answer_until_the_next_answer(
    now: list[float],
) -> None:
    activity = ServerActivity()
    assert activity.silent_s == 0
    fail(activity, OSError, now)
    assert activity.has_failed
    now[0] += 5
    assert activity.silent_s == 6, "also while no request is sent"
    with activity.request():
        now[0] += 1
        assert activity.silent_s == 7
    assert (activity.silent_s, activity.has_failed) == (0, False)


def test_a_request_that_hangs_is_silence_before_it_fails(now: list[float]) -> None:
    activity = ServerActivity()
    with activity.request():
        now[0] += 3
        assert (activity.silent_s, activity.has_failed) == (3, False)
        activity.answered()  # a part of the answer has come
        now[0] += 2
        assert activity.silent_s == 2, "since then"
        with activity.request():
            pass
        assert activity.silent_s == 0, "another request was answered"
        now[0] += 1
        assert activity.silent_s == 1
    assert activity.silent_s == 0


def test_a_refusal_about_what_was_asked_for_is_an_answer(now: list[float]) -> None:
    activity = ServerActivity(lambda error: isinstance(error, FileNotFoundError))
    fail(activity, FileNotFoundError, now)
    assert (activity.silent_s, activity.has_failed) == (0, False)


def test_many_threads_may_use_it_at_once() -> None:
    activity, start = ServerActivity(), threading.Barrier(4)

    def use() -> None:
        start.wait()
        for _ in range(1000):
            with activity.request():
                pass

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert activity.silent_s == 0
