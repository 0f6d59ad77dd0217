"""Until when a job has to be done, and whether it may go on at all."""

import math
import time

from gradcam_worker.errors import GradcamError, JobTimeout

POLL_LEASE_S = 0.05  # between two checks whether a lease was renewed


class Deadline:
    """The moment by which a job has to be done, whatever it waits for. It can be extended, and cancelled."""

    def __init__(self, seconds: float) -> None:
        """The moment is `seconds` from now."""
        self._allowed_s = seconds
        self._end = time.monotonic() + seconds
        self._held_until = math.inf
        self._cancelled: GradcamError | None = None

    def extend(self, seconds: float) -> None:
        """Put the moment off, by time that was not the job's fault."""
        self._end += seconds

    def cancel(self, why: GradcamError) -> None:
        """The job has to stop now.

        Args:
            why: what `check` raises from now on. The first call counts.
        """
        self._cancelled = self._cancelled or why

    def hold(self, seconds: float) -> None:
        """For so many seconds no other worker can have the job: its lease was renewed."""
        self._held_until = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds left, never below zero."""
        return 0.0 if self._cancelled else max(self._end - time.monotonic(), 0.0)

    def check(self, doing: str) -> None:
        """Go on only where the job may.

        Where the lease may have run out, because the ledger is unreachable or the process was stopped for a
        while, this waits until it is renewed or lost: another worker may have the job by now.

        Args:
            doing: what the job does, for the error.

        Raises:
            JobTimeout: no time is left.
            GradcamError: what it was cancelled with.
        """
        while time.monotonic() > self._held_until and self.left_s():
            time.sleep(POLL_LEASE_S)
        if self.left_s():
            return
        if self._cancelled:  # asked last: it may have been just now
            raise self._cancelled
        message = f"The job ran longer than its timeout_s of {self._allowed_s:g} s (at: {doing})."
        raise JobTimeout(message)
