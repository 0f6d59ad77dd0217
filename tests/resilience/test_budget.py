import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from gradcam_worker.errors import JobCanceled, JobTimeout
from gradcam_worker.resilience.budget import ResourceBudget
from gradcam_worker.resilience.deadline import Deadline

PATIENCE_S = 30  # for what has to happen, on the slowest of machines


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


class Guests:
    """Threads that come into a room, each with its name and amount, and stay until they are sent away."""

    def __init__(self, room: ResourceBudget) -> None:
        self.room = room
        self.inside: list[str] = []
        self.failed: dict[str, Exception] = {}
        self._leave: dict[str, threading.Event] = {}
        self._threads: list[threading.Thread] = []

    def comes(self, name: str, amount: int, deadline: Deadline | None = None) -> None:
        """Come, and be in or in the queue when this returns."""
        before = self.room.waiting + len(self.inside) + len(self.failed)
        self._leave[name] = threading.Event()
        thread = threading.Thread(target=self._stay, args=[name, amount, deadline or Deadline(PATIENCE_S)])
        self._threads.append(thread)
        thread.start()
        until(lambda: self.room.waiting + len(self.inside) + len(self.failed) > before)

    def _stay(self, name: str, amount: int, deadline: Deadline) -> None:
        try:
            with self.room.reserve(amount, deadline):
                self.inside.append(name)
                self._leave[name].wait(PATIENCE_S)
                self.inside.remove(name)
        except Exception as error:  # noqa: BLE001  # shown by the test
            self.failed[name] = error

    def goes(self, name: str) -> None:
        self._leave[name].set()

    def all_go(self) -> None:
        for one in self._leave.values():
            one.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@contextmanager
def guests(room: ResourceBudget) -> Iterator[Guests]:
    some = Guests(room)
    try:
        yield some
    finally:
        some.all_go()


def test_amounts_count_and_not_heads() -> None:
    room, deadline = ResourceBudget(10, "pixels"), Deadline(0.05)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(room.reserve(1, deadline))
        assert room.held == 10
        with (
            pytest.raises(JobTimeout, match="waiting for 1 of 10 pixels in flight"),
            room.reserve(1, deadline),
        ):
            pass
    assert room.held == room.waiting == 0
    with room.reserve(10, Deadline(1)):
        assert room.held == 10


def test_room_that_is_given_back_is_taken_by_who_waits() -> None:
    with guests(ResourceBudget(10, "bytes")) as some:
        some.comes("first", 6)
        some.comes("second", 5)
        assert some.inside == ["first"]
        some.goes("first")
        until(lambda: some.inside == ["second"])


def test_a_large_one_is_not_starved_by_small_ones_that_come_later() -> None:
    with guests(ResourceBudget(10, "pixels")) as some:
        some.comes("small", 3)
        some.comes("large", 9)
        some.comes("later", 1)  # would fit, but is not served first
        assert some.inside == ["small"]
        some.goes("small")
        until(lambda: sorted(some.inside) == ["large", "later"])
        assert some.inside[0] == "large"


def test_what_is_larger_than_the_room_is_let_in_alone() -> None:
    with guests(ResourceBudget(10, "pixels")) as some:
        some.comes("small", 1)
        some.comes("giant", 25)
        some.comes("later", 1)
        assert some.inside == ["small"]
        some.goes("small")
        until(lambda: some.inside == ["giant"])
        assert (some.room.held, some.room.waiting) == (25, 1)
        some.goes("giant")
        until(lambda: some.inside == ["later"])


def test_a_job_that_is_cancelled_while_it_waits_stops_waiting_and_bars_nobody() -> None:
    deadline = Deadline(10 * PATIENCE_S)
    with guests(ResourceBudget(10, "pixels")) as some:
        some.comes("first", 6)
        some.comes("waits", 9, deadline)
        some.comes("behind", 4)
        assert some.inside == ["first"]
        deadline.cancel(JobCanceled("no longer needed"))
        until(lambda: some.inside == ["first", "behind"])
        assert isinstance(some.failed["waits"], JobCanceled)


def test_a_job_waits_no_longer_than_its_deadline() -> None:
    with guests(ResourceBudget(10, "pixels")) as some:
        some.comes("first", 6)
        some.comes("late", 9, Deadline(0.1))
        until(lambda: "late" in some.failed)
        assert isinstance(some.failed["late"], JobTimeout)
        assert some.room.waiting == 0


def test_part_of_what_is_held_can_be_given_back_early_but_never_more_be_taken() -> None:
    room = ResourceBudget(10, "bytes")
    with room.reserve(8, Deadline(1)) as hold:
        hold.shrink_to(3)
        assert room.held == 3
        hold.shrink_to(9)
        assert room.held == 3
        with room.reserve(7, Deadline(1)):
            assert room.held == 10
        hold.shrink_to(0)
        assert room.held == 0
    assert room.held == 0


def test_room_is_given_back_whatever_happens() -> None:
    room = ResourceBudget(10, "bytes")
    with pytest.raises(ZeroDivisionError), room.reserve(8, Deadline(1)):
        _ = 1 / 0
    assert room.held == 0


def test_under_a_crowd_the_room_is_never_overfull_and_empty_in_the_end() -> None:
    room, most, wrong = ResourceBudget(100, "pixels"), [0], []

    def come(seed: int) -> None:
        for turn in range(25):
            amount = (seed * 31 + turn * 17) % 60 + 1
            with room.reserve(amount, Deadline(PATIENCE_S)):
                time.sleep(0.001)
                most[0] = max(most[0], room.held)
                if room.held > 100:
                    wrong.append(room.held)

    threads = [threading.Thread(target=come, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not wrong
    assert most[0] > 60, "two were in it at once"
    assert room.held == room.waiting == 0


TIGHT_BYTES = 47 * 1024**2  # more than is used already: less than any of the large pictures has
LIMITED = """
import re, sys
from pathlib import Path
from gradcam_worker.errors import GradcamError
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.resilience.budget import limit_memory

decode(Path(sys.argv[2]).read_bytes())  # whatever is taken only once
used = 1024 * int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
if int(sys.argv[1]):
    limit_memory(used + int(sys.argv[1]))
for path in sys.argv[2:]:
    try:
        print(decode(Path(path).read_bytes()).pixels.shape[0])
    except GradcamError as error:
        print(error.code, error.retryable)
"""


def test_a_picture_that_there_is_no_memory_for_fails_alone_and_may_be_tried_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    paths: list[str] = []
    for kind, mode in (
        ("JPEG", "RGB"),
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("WEBP", "RGB"),
        ("WEBP", "RGBA"),
        ("GIF", "P"),
    ):
        color = 5 if mode == "P" else (1, 2, 3, 4)[: len(mode)]
        for side in (64, 4400):  # small ones are to come out, before and after
            path = folder / f"{len(paths)}"
            options = {"compress_level": 1, "method": 0}
            Image.new(mode, (side, side), color).save(path, kind, **options)
            paths.append(str(path))
    paths.append(paths[0])

    def run(max_bytes: int) -> list[str]:
        command = [sys.executable, "-c", LIMITED, str(max_bytes), *paths]
        out = subprocess.run(command, capture_output=True, check=True, text=True, timeout=120).stdout
        return out.splitlines()

    assert run(0) == ["64", "4400"] * 6 + ["64"]
    found = run(TIGHT_BYTES)
    assert found[::2] == ["64"] * 7
    assert found[1::2] == ["internal True"] * 6
