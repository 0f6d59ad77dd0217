"""Memory: a budget for what is in flight in a process, and a limit for the process as a whole.

Counted in bytes or pixels, not in jobs: sixteen small photos are no burden, sixteen large ones are.
"""

import resource
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gradcam_worker.resilience.deadline import Deadline

POLL_CANCELLED_S = 0.5  # between two checks whether a job that waits was cancelled


class Reservation:
    """What one job holds of a budget."""

    def __init__(self, budget: "ResourceBudget", amount: int) -> None:
        """`amount` is reserved already."""
        self._budget, self._amount = budget, amount

    def shrink_to(self, amount: int) -> None:
        """Release all but `amount`; it never grows, since that would have to wait."""
        more = max(self._amount - amount, 0)
        self._amount -= more
        self._budget._release(more)  # noqa: SLF001  # two halves of one thing


class ResourceBudget:
    """So much and no more at once, first come, first served: small ones do not starve a large one."""

    def __init__(self, capacity: int, unit: str) -> None:
        """`unit` is what is counted, in the plural: bytes, pixels."""
        self.capacity, self._unit = capacity, unit
        self._held = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """What is reserved just now, in `unit`."""
        return self._held

    @property
    def waiting(self) -> int:
        """How many wait for a reservation."""
        return len(self._queue)

    @contextmanager
    def reserve(self, amount: int, deadline: Deadline) -> Iterator[Reservation]:
        """Wait until `amount` is free, and hold it within the block.

        An amount above the capacity is let in when nothing else is held, and alone: a limit of its own has
        allowed it, and it must not wait for ever.

        Args:
            amount: in `unit`.
            deadline: how long to wait.

        Yields:
            The reservation, which can be shrunk.

        Raises:
            JobTimeout: it was not free in time.
            GradcamError: what the deadline was cancelled with.
        """
        while not self._try_reserve(amount, deadline):
            deadline.check(f"waiting for {amount:,} of {self.capacity:,} {self._unit} in flight")
        reservation = Reservation(self, amount)
        try:
            yield reservation
        finally:
            reservation.shrink_to(0)

    def _try_reserve(self, amount: int, deadline: Deadline) -> bool:
        """Wait in the queue; False when time is up: the caller raises, without the lock."""
        me = object()
        with self._changed:
            self._queue.append(me)
            try:
                while self._queue[0] is not me or (self._held and self._held + amount > self.capacity):
                    left_s = deadline.left_s()
                    if not left_s:
                        return False
                    self._changed.wait(min(left_s, POLL_CANCELLED_S))
                self._held += amount
                return True
            finally:
                self._queue.remove(me)
                self._changed.notify_all()

    def _release(self, amount: int) -> None:
        with self._changed:
            self._held -= amount
            self._changed.notify_all()


@dataclass(frozen=True)
class Budgets:
    """The budgets of one process."""

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
    """Let this process have no more than so much private memory.

    The second line of defence, behind the budgets and the decoder's limits: the system refuses what would
    take more, which fails one job instead of ending this process, or another one on this machine. The stacks
    of threads count, shared libraries and mapped files do not.

    With TensorFlow on a CPU, 1.5 GB and 16 bytes for each pixel and one for each byte that may be in flight
    are enough. With less than TensorFlow itself needs the process ends all the same: TensorFlow does not
    check whether it gets memory.

    Args:
        max_bytes: the limit; 0: none.
    """
    if max_bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = max_bytes if hard == resource.RLIM_INFINITY else min(max_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
