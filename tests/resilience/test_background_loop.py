"""What every background loop does: pauses, survives, reports, is woken, and stops."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.resilience import background_loop, outages
from gradcam_worker.resilience.background_loop import BackgroundLoop, stop_all
from gradcam_worker.resilience.outages import Outages

WAIT_S = 20
LONG_S = 3600.0  # no test waits for the end of such a pause


class Step:
    """Does what it is told to, in turn, then nothing; says how often it was called."""

    def __init__(self, *results: BaseException | Callable[[], object]) -> None:
        self.results = [*results]
        self.calls = 0
        self.changed = threading.Condition()

    def __call__(self) -> None:
        result = self.results[self.calls] if self.calls < len(self.results) else None
        with self.changed:
            self.calls += 1
            self.changed.notify_all()
        if isinstance(result, BaseException):
            raise result
        if result:
            result()

    def was_called(self, times: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.calls >= times, WAIT_S)


@contextmanager
def running(loop: BackgroundLoop) -> Iterator[BackgroundLoop]:
    loop.start()
    try:
        yield loop
    finally:
        assert loop.stop(WAIT_S)


def test_a_step_is_repeated_in_a_daemon_thread_of_its_name_until_the_loop_is_stopped() -> None:
    threads: list[threading.Thread] = []
    step = Step(lambda: threads.append(threading.current_thread()))
    with running(BackgroundLoop("sweep", step, 0)) as loop:
        assert step.was_called(3)
        assert loop.alive
    assert (threads[0].name, threads[0].daemon, loop.alive) == ("sweep", True, False)
    calls = step.calls
    loop.wake()
    assert step.calls == calls


def test_the_first_step_comes_after_a_pause_unless_it_is_wanted_immediately() -> None:
    later, now = Step(), Step()
    with (
        running(BackgroundLoop("later", later, LONG_S)),
        running(BackgroundLoop("now", now, LONG_S, immediately=True)),
    ):
        assert now.was_called(1)
    assert (later.calls, now.calls) == (0, 1), "a pause of an hour does not keep a loop from stopping"


def test_a_function_says_after_each_step_how_long_the_pause_is_also_after_one_that_failed() -> None:
    step = Step(KeyError("surprise"))
    pauses = iter([0.0, 0.0, LONG_S])
    asked_after: list[int] = []

    def pause_s() -> float:
        asked_after.append(step.calls)
        return next(pauses)

    with running(BackgroundLoop("scheduled", step, pause_s)):
        assert step.was_called(2)
    assert asked_after == [0, 1, 2]


def test_a_wake_up_ends_the_pause_and_one_that_comes_during_a_step_is_not_lost() -> None:
    step = Step(lambda: loop.wake())  # noqa: PLW0108  # it is made below
    loop = BackgroundLoop("woken", step, LONG_S)
    with running(loop):
        loop.wake()
        assert step.was_called(2), "the first step woke the loop"
        loop.wake()
        assert step.was_called(3)


def test_a_wake_up_does_not_shorten_the_pause_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(LedgerUnavailable("gone"))
    loop = BackgroundLoop("calm", step, LONG_S, immediately=True)
    waits, waiting = list[bool](), threading.Semaphore(0)
    wait = loop._wait

    def noted(seconds: float, *, until_woken: bool) -> bool:
        waits.append(until_woken)
        waiting.release()
        return wait(seconds, until_woken=until_woken)

    monkeypatch.setattr(loop, "_wait", noted)
    with running(loop):
        for _ in range(2):
            assert waiting.acquire(timeout=WAIT_S)
        loop.wake()
    assert (step.calls, waits) == (1, [True, False])


@pytest.mark.parametrize(
    "defect", [ValueError("nonsense"), SystemExit("nonsense"), KeyboardInterrupt("nonsense")]
)
def test_no_error_ends_a_loop_and_one_that_repeats_is_logged_once_with_its_traceback(
    defect: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    step = Step(*[defect] * 5)
    with running(BackgroundLoop("sturdy", step, 0)):
        assert step.was_called(7)
    assert caplog.messages == [
        "background_loop_failed loop=sturdy",
        "background_loop_recovered loop=sturdy failures=5",
    ]
    assert "Traceback" in caplog.text
    assert "nonsense" in caplog.text


def test_another_error_has_its_own_traceback_and_a_lasting_one_a_line_once_in_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(ValueError("one"), KeyError("two"), KeyError("two"))
    with running(BackgroundLoop("sturdy", step, 0)):
        assert step.was_called(4)
    assert caplog.text.count("background_loop_failed") == caplog.text.count("Traceback") == 2
    caplog.clear()
    monkeypatch.setattr(background_loop, "LOG_INTERVAL_S", 0)
    step = Step(*[KeyError("two")] * 3)
    with running(BackgroundLoop("sturdy", step, 0)):
        assert step.was_called(4)
    assert (
        "background_loop_still_failing loop=sturdy failures=3 error_type=KeyError error=\"'two'\""
        in caplog.messages
    )


def test_an_unreachable_server_is_an_outage_that_ends_with_a_step_that_succeeds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "RECOVERED_AFTER_S", 0)
    step = Step(*[LedgerUnavailable("gone")] * 4)
    with running(BackgroundLoop("leases", step, 0, outages=Outages(), consequence="no lease can be renewed")):
        assert step.was_called(6)
    assert caplog.messages[0] == 'server_unreachable server=ledger reason="no lease can be renewed: gone"'
    assert caplog.messages[1].startswith("server_reachable_again server=ledger")
    assert len(caplog.messages) == 2


def test_the_error_says_which_server_is_unreachable(caplog: pytest.LogCaptureFixture) -> None:
    step = Step(BrokerUnavailable("gone"))
    with running(BackgroundLoop("reaper", step, 0, outages=Outages())):
        assert step.was_called(2)
    assert caplog.messages == ["server_unreachable server=broker reason=gone"]


def test_a_loop_without_outages_leaves_it_to_others_to_report_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="gradcam")
    step = Step(LedgerUnavailable("gone"))
    with running(BackgroundLoop("backfill-lease", step, 0)):
        assert step.was_called(2)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("DEBUG", "background_loop_step_failed loop=backfill-lease reason=gone")
    ]


def test_the_context_is_entered_before_the_first_step_and_left_after_the_last() -> None:
    events: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        events.append("entered")
        yield
        events.append("left")

    step = Step(lambda: events.append("step"))
    with running(BackgroundLoop("within", step, LONG_S, immediately=True, context=context())):
        assert step.was_called(1)
    assert events == ["entered", "step", "left"]


def test_a_context_that_cannot_be_entered_ends_the_loop_which_is_logged(caplog: Any) -> None:
    @contextmanager
    def context() -> Iterator[None]:
        yield from no_threads()

    def no_threads() -> Iterator[None]:
        message = "no more threads"
        raise RuntimeError(message)

    loop = BackgroundLoop("within", Step(), 0, context=context())
    loop.start()
    assert loop.join(WAIT_S)
    assert "background_loop_ended loop=within" in caplog.text
    assert "no more threads" in caplog.text


def test_a_step_that_hangs_is_waited_for_so_long_and_named(caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()
    hangs, ends = Step(over.wait), Step()
    loops = [BackgroundLoop("hangs", hangs, 0), BackgroundLoop("ends", ends, 0)]
    for loop in loops:
        loop.start()
    assert hangs.was_called(1)
    assert stop_all(loops, 0) in ([loops[0]], loops), "the other may need a moment"
    assert loops[1].join(WAIT_S)
    assert stop_all(loops, 0) == [loops[0]]
    assert "background_loop_not_stopped loop=hangs" in caplog.text
    over.set()
    assert loops[0].stop(WAIT_S)


def test_the_time_since_the_last_step_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("gradcam_worker.resilience.background_loop.time.monotonic", lambda: now[0])
    over = threading.Event()
    step = Step(lambda: None, over.wait)
    with running(BackgroundLoop("slow", step, 0)) as loop:
        assert step.was_called(2)
        now[0] += 7
        assert loop.since_last_step_s == 7
        over.set()


def test_a_loop_that_never_started_is_stopped_all_the_same() -> None:
    loop = BackgroundLoop("idle", Step(), 0)
    assert loop.stop(0)
    assert not loop.alive


def test_a_loop_starts_once() -> None:
    with running(BackgroundLoop("once", Step(), 0)) as loop, pytest.raises(RuntimeError):
        loop.start()
