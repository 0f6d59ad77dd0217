"""How long something may still take, and whether it may go on at all."""

import math
import time

from gradcam_worker.errors import GradcamError, JobTimeout

LOOK_S = 0.05  # between two looks whether a lease has been renewed


class Deadline:
    """A moment by which a job has to be done, whatever it is waiting for."""

    def __init__(self, seconds: float) -> None:
        """The moment is `seconds` from now."""
        self._allowed_s = seconds
        self._end = time.monotonic() + seconds
        self._held_until = math.inf
        self._cancelled: GradcamError | None = None

    def forgive(self, seconds: float) -> None:
        """Put the moment off, by time that was not the job's to answer for."""
        self._end += seconds

    def cancel(self, why: GradcamError) -> None:
        """It is over now: nobody waits for the job any more."""
        self._cancelled = self._cancelled or why

    def hold(self, seconds: float) -> None:
        """For so long the job is certainly this worker's own."""
        self._held_until = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds left, never below zero."""
        return 0.0 if self._cancelled else max(self._end - time.monotonic(), 0.0)

    def check(self, doing: str) -> None:
        """Raise JobTimeout where no time is left, or whatever it was cancelled with.

        Where nobody knows whether the job is still this worker's own, because the ledger is out of reach or
        the process was stopped for a while, wait until that is known: another worker may have it by now.
        """
        while time.monotonic() > self._held_until and self.left_s():
            time.sleep(LOOK_S)
        if self.left_s():
            return
        if self._cancelled:  # asked last: it may have been just now
            raise self._cancelled
        message = f"The job ran longer than its timeout_s of {self._allowed_s:g} s (at: {doing})."
        raise JobTimeout(message)
