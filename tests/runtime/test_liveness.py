"""When a process shows signs of life, and when it does not."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from gradcam_worker.runtime import liveness
from gradcam_worker.runtime.liveness import LivenessReporter

WAIT_S = 20


@dataclass
class World:
    """What surrounds a process."""

    answers: bool = True
    other_reason: str | None = None
    asked: int = 0

    def broker_answers(self) -> bool:
        self.asked += 1
        return self.answers

    def liveness(self, fd: int | None = None) -> LivenessReporter:
        return LivenessReporter(
            fd, broker_answers=self.broker_answers, other_reason=lambda: self.other_reason
        )


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any time without a turn is too long."""
    monkeypatch.setattr(liveness, "HUNG_AFTER_S", -1.0)


def test_a_loop_that_turns_is_well_and_the_broker_is_not_asked(world: World) -> None:
    assert world.liveness().unhealthy_reason() is None
    assert not world.asked


@pytest.mark.usefixtures("still")
def test_a_loop_that_stands_still_while_the_broker_answers_is_trouble(world: World) -> None:
    said = world.liveness().unhealthy_reason()
    assert said
    assert said.startswith("the broker answers, but nothing has been received for")


@pytest.mark.usefixtures("still")
def test_a_broker_that_is_away_is_no_fault_of_the_process(world: World) -> None:
    world.answers = False
    assert world.liveness().unhealthy_reason() is None
    assert world.asked == 1


def test_when_the_broker_is_back_the_loop_has_time_to_find_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.answers, now = False, [0.0]
    monkeypatch.setattr("gradcam_worker.runtime.liveness.time.monotonic", lambda: now[0])
    one = world.liveness()
    now[0] += liveness.HUNG_AFTER_S + 1
    assert one.unhealthy_reason() is None
    world.answers = True
    now[0] += liveness.HUNG_AFTER_S - 1
    assert one.unhealthy_reason() is None
    now[0] += 2
    assert one.unhealthy_reason()
    one.loop_turned()
    assert one.unhealthy_reason() is None


def test_a_device_that_hangs_is_trouble_whatever_else_is_well(world: World) -> None:
    world.other_reason = "the device has not answered for 300 s"
    assert world.liveness().unhealthy_reason() == world.other_reason


@pytest.mark.usefixtures("still")
def test_a_process_that_is_asked_to_end_need_not_turn_any_more(world: World) -> None:
    one = world.liveness()
    one.stopping()
    assert one.unhealthy_reason() is None


def test_signs_are_shown_as_long_as_all_is_well_and_trouble_is_said_once(
    world: World, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, caplog_level = world.liveness(pipe[1]), caplog.at_level(logging.ERROR)
    with os.fdopen(os.dup(pipe[0]), "rb") as seen, caplog_level:
        for _ in range(3):
            one.report()
        assert seen.read(100) == b"111"
        world.other_reason = "it hangs"
        for _ in range(3):
            one.report()
        assert not seen.read(100)
        world.other_reason = None
        one.report()
        assert seen.read(100) == b"1"
    assert caplog.text.count('process_unhealthy reason="it hangs"') == 1


def test_a_check_that_is_broken_is_no_reason_to_start_the_process_again(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> str | None:
        raise SystemExit(1)

    one = LivenessReporter(pipe[1], broker_answers=lambda: True, other_reason=broken)
    with os.fdopen(os.dup(pipe[0]), "rb") as seen:
        with pytest.raises(SystemExit):
            one.report()
        assert (seen.read(100), one.last_reason) == (b"1", None)


def test_whoever_is_gone_is_shown_nothing(world: World) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert not world.liveness(writing).write_sign()
    os.close(writing)
    assert world.liveness().write_sign(), "where nobody asked for signs, none are missed"
