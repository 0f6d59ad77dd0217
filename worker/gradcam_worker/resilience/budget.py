"""Room in memory: for what is in flight in a process, and for the process as a whole.

Counted in what is held, not in jobs: sixteen small photos are no burden, sixteen large ones are.
"""

import resource
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gradcam_worker.resilience.deadline import Deadline

LOOK_S = 0.5  # between two looks, while waiting, whether the job has been cancelled


class Reservation:
    """What one job holds of a room."""

    def __init__(self, room: "ResourceBudget", amount: int) -> None:
        """`amount` has been taken already."""
        self._room, self._amount = room, amount

    def shrink_to(self, amount: int) -> None:
        """Give back all but `amount`. More than is held cannot be kept: that has to be waited for."""
        more = max(self._amount - amount, 0)
        self._amount -= more
        self._room._give_back(more)  # noqa: SLF001  # two halves of one thing


class ResourceBudget:
    """So much and no more at once. Who comes first is let in first: small ones do not starve a large one."""

    def __init__(self, capacity: int, unit: str) -> None:
        """`unit` is what is counted, in the plural: bytes, pixels."""
        self.capacity, self._unit = capacity, unit
        self._held = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """What is in flight just now, in this room's unit."""
        return self._held

    @property
    def waiting(self) -> int:
        """How many wait to be let in."""
        return len(self._queue)

    @contextmanager
    def reserve(self, amount: int, deadline: Deadline) -> Iterator[Reservation]:
        """Hold `amount` within the block, once there is room for it.

        What is larger than the room is let in when the room is empty, and alone: it has been allowed by a
        limit of its own, and must not wait for ever. Raises JobTimeout, or what the deadline was cancelled
        with.
        """
        while not self._let_in(amount, deadline):
            deadline.check(f"waiting for {amount:,} of {self.capacity:,} {self._unit} in flight")
        hold = Reservation(self, amount)
        try:
            yield hold
        finally:
            hold.shrink_to(0)

    def _let_in(self, amount: int, deadline: Deadline) -> bool:
        """Wait in the queue; False when time is up, which is for the caller to say, without the lock."""
        me = object()
        with self._changed:
            self._queue.append(me)
            try:
                while self._queue[0] is not me or (self._held and self._held + amount > self.capacity):
                    left_s = deadline.left_s()
                    if not left_s:
                        return False
                    self._changed.wait(min(left_s, LOOK_S))
                self._held += amount
                return True
            finally:
                self._queue.remove(me)
                self._changed.notify_all()

    def _give_back(self, amount: int) -> None:
        with self._changed:
            self._held -= amount
            self._changed.notify_all()


@dataclass(frozen=True)
class Budgets:
    """What may be in flight in one process."""

    bytes: ResourceBudget  # of images, from before they are fetched until they are decoded
    pixels: ResourceBudget  # of images, from before they are decoded until all is drawn
    most_bytes: int  # that one image may have
    threads: int  # that fetch at once

    @property
    def steps(self) -> tuple[int, ...]:
        """How many bytes to ask for: first a thread's even share, then what the largest image may have."""
        share = self.bytes.capacity // self.threads
        return (share, self.most_bytes) if 0 < share < self.most_bytes else (self.most_bytes,)


def limit_memory(max_bytes: int) -> None:
    """Let this process have no more than `max_bytes` of private memory; 0: as much as there is.

    The second line, behind the rooms and the decoder's guard: what would take more is refused by the system,
    and becomes an error of one job instead of the end of the process, or of another one on this machine. The
    stacks of threads count, shared libraries and files that are mapped do not.

    With TensorFlow on a CPU, 1.5 GB and 16 bytes for each pixel and one for each byte that may be in flight
    are enough. With less than TensorFlow itself needs the process ends all the same: it does not look whether
    it gets memory.
    """
    if max_bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = max_bytes if hard == resource.RLIM_INFINITY else min(max_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
