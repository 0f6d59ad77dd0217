"""Who works in a process: many at once, or one alone."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from gradcam_worker.errors import WorkerUnfit
from gradcam_worker.resilience.gate import ExclusiveGate

WAIT_S = 20
MOMENT_S = 0.05  # in which whoever may go in would have gone in


class Crowd:
    """Jobs that go in, each in a thread of its own, and leave when they are told."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.floor, self._pool = ExclusiveGate(), pool
        self.inside: list[str] = []
        self._leave: dict[str, threading.Event] = {}

    def send(self, job_id: str, *, alone: bool = False) -> "Future[bool]":
        leave = self._leave[job_id] = threading.Event()

        def work() -> bool:
            with self.floor.enter(job_id, alone=alone) as free:
                self.inside.append(job_id)
                assert leave.wait(WAIT_S)
                self.inside.remove(job_id)
                return free

        return self._pool.submit(work)

    def leave(self, *job_ids: str) -> None:
        for job_id in job_ids:
            self._leave[job_id].set()

    def shows(self, *job_ids: str) -> bool:
        """Whether these are inside, and stay there, and nobody else comes."""
        wait_for(lambda: sorted(self.inside) == sorted(job_ids))
        time.sleep(MOMENT_S)
        return sorted(self.inside) == sorted(job_ids)

    def empty(self) -> None:
        self.floor.close()
        self.leave(*self._leave)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    with ExitStack() as stack:
        crowd = Crowd(stack.enter_context(ThreadPoolExecutor(8)))
        stack.callback(crowd.empty)
        yield crowd


def test_jobs_work_side_by_side(crowd: Crowd) -> None:
    crowd.send("a")
    crowd.send("b")
    assert crowd.shows("a", "b")


def test_who_wants_to_be_alone_waits_until_the_others_are_gone_and_lets_none_in_before(crowd: Crowd) -> None:
    crowd.send("a")
    assert crowd.shows("a")
    crowd.send("suspect", alone=True)
    assert crowd.shows("a")
    crowd.send("late")
    assert crowd.shows("a"), "or the suspect would wait for ever"
    crowd.leave("a")
    assert crowd.shows("suspect")
    crowd.leave("suspect")
    assert crowd.shows("late")


def test_two_who_want_to_be_alone_come_one_after_the_other(crowd: Crowd) -> None:
    crowd.send("first", alone=True)
    assert crowd.shows("first")
    crowd.send("second", alone=True)
    assert crowd.shows("first")
    crowd.leave("first")
    assert crowd.shows("second")
    crowd.leave("second")
    crowd.send("third")
    assert crowd.shows("third")


def test_a_job_that_is_here_already_has_no_second_place(crowd: Crowd) -> None:
    crowd.send("a")
    assert crowd.shows("a")
    with crowd.floor.enter("a") as free:
        assert not free
    with crowd.floor.enter("a", alone=True) as free:
        assert not free
    assert crowd.shows("a")
    crowd.leave("a")
    assert crowd.shows()
    with crowd.floor.enter("a") as free:
        assert free, "it left, and its second message took nothing from it"


def test_a_job_that_waits_to_be_alone_has_no_second_place_either(crowd: Crowd) -> None:
    crowd.send("a")
    assert crowd.shows("a")
    crowd.send("suspect", alone=True)
    assert crowd.shows("a")
    with ThreadPoolExecutor(1) as pool:
        twin = pool.submit(lambda: crowd.floor.enter("suspect", alone=True).__enter__())
        crowd.leave("a")
        assert twin.result(WAIT_S) is False
    assert crowd.shows("suspect")


def test_a_job_that_fails_makes_room(crowd: Crowd) -> None:
    with pytest.raises(ZeroDivisionError), crowd.floor.enter("suspect", alone=True):
        raise ZeroDivisionError
    crowd.send("a")
    assert crowd.shows("a")


def test_nobody_is_let_in_any_more_when_it_is_closed_not_even_who_waits(crowd: Crowd) -> None:
    crowd.send("a")
    assert crowd.shows("a")
    suspect, late = crowd.send("suspect", alone=True), crowd.send("late")
    assert crowd.shows("a")
    crowd.floor.close()
    for waited in (suspect, late):
        assert isinstance(waited.exception(WAIT_S), WorkerUnfit)
    with pytest.raises(WorkerUnfit, match="begins nothing new"), crowd.floor.enter("new"):
        pass
    assert crowd.shows("a"), "who is here may finish"
