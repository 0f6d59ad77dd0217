"""How long something may still take."""

import time

from worker.errors import GradcamError, JobTimeout


class Deadline:
    """A moment by which a job has to be done, whatever it is waiting for."""

    def __init__(self, seconds: float) -> None:
        """The moment is `seconds` from now."""
        self._allowed_s = seconds
        self._end = time.monotonic() + seconds
        self._cancelled: GradcamError | None = None

    def forgive(self, seconds: float) -> None:
        """Put the moment off, by time that was not the job's to answer for."""
        self._end += seconds

    def cancel(self, why: GradcamError) -> None:
        """It is over now: nobody waits for the job any more."""
        self._cancelled = why

    def left_s(self) -> float:
        """Seconds left, never below zero."""
        return 0.0 if self._cancelled else max(self._end - time.monotonic(), 0.0)

    def check(self, doing: str) -> None:
        """Raise JobTimeout where no time is left, or whatever it was cancelled with."""
        if self._cancelled:
            raise self._cancelled
        if not self.left_s():
            message = f"The job ran longer than its timeout_s of {self._allowed_s:g} s (at: {doing})."
            raise JobTimeout(message)
