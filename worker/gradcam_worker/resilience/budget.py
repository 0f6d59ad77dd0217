"""Limits of memory: budgets for the images in flight in a process, and a limit for the whole process.

Budgets count bytes or pixels, not jobs: sixteen small images need little memory, sixteen large ones much.
"""

import resource
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gradcam_worker.resilience.deadline import Deadline

CANCEL_POLL_INTERVAL_S = 0.5  # between two checks whether a waiting job was cancelled


class Reservation:
    """The part of a budget that one job holds."""

    def __init__(self, budget: "ResourceBudget", amount: int) -> None:
        """`amount` is reserved already."""
        self._budget, self._amount = budget, amount

    def shrink_to(self, amount: int) -> None:
        """Release all but `amount`. A reservation never grows: it would have to wait."""
        surplus = max(self._amount - amount, 0)
        self._amount -= surplus
        self._budget._release(surplus)  # noqa: SLF001  # the class below


class ResourceBudget:
    """A capacity that jobs share, first come, first served: small reservations do not starve a large one."""

    def __init__(self, capacity: int, unit: str) -> None:
        """Nothing is reserved.

        Args:
            capacity: the amount that may be reserved at once, in `unit`.
            unit: in the plural, for messages: bytes, pixels.
        """
        self.capacity, self._unit = capacity, unit
        self._held = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """The amount that is reserved now, in `unit`."""
        return self._held

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a reservation."""
        return len(self._queue)

    @contextmanager
    def reserve(self, amount: int, deadline: Deadline) -> Iterator[Reservation]:
        """Wait until `amount` is free, and hold it within the block.

        An amount above the capacity is reserved while nothing else is: another limit has allowed it, and it
        must not wait for ever.

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
        """Wait in the queue. Returns False when time is up: the caller raises, without the lock."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or (self._held and self._held + amount > self.capacity):
                    left_s = deadline.left_s()
                    if not left_s:
                        return False
                    self._changed.wait(min(left_s, CANCEL_POLL_INTERVAL_S))
                self._held += amount
                return True
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _release(self, amount: int) -> None:
        with self._changed:
            self._held -= amount
            self._changed.notify_all()


@dataclass(frozen=True)
class Budgets:
    """The budgets of one process."""

    bytes: ResourceBudget  # of encoded images, from before they are fetched until they are decoded
    pixels: ResourceBudget  # of decoded images, from before they are decoded until all overlays are drawn
    max_image_bytes: int
    threads: int  # that fetch at once

    @property
    def reservation_steps(self) -> tuple[int, ...]:
        """The bytes to reserve for an image of unknown size: first a thread's share, then the limit."""
        share = self.bytes.capacity // self.threads
        return (share, self.max_image_bytes) if 0 < share < self.max_image_bytes else (self.max_image_bytes,)


def limit_memory(max_bytes: int) -> None:
    """Limit the private memory of this process (RLIMIT_DATA).

    This is the second limit, after the budgets and the decoder's limits: the system refuses an allocation
    above it, which fails one job instead of ending this process or another one of this machine. The stacks of
    threads count, shared libraries and mapped files do not.

    With TensorFlow on a CPU, 1.5 GB plus 16 bytes per pixel and one per byte in flight are enough. With less
    than TensorFlow itself needs, the process ends nevertheless: TensorFlow does not check whether it gets
    memory.

    Args:
        max_bytes: the limit; 0: no limit.
    """
    if max_bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = max_bytes if hard == resource.RLIM_INFINITY else min(max_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
