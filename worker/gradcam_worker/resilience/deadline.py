"""The time of a job: its deadline, which can be extended and cancelled, and what it used of the device."""

import math
import threading
import time

from gradcam_worker.errors import GradcamError, JobTimeout

LEASE_POLL_INTERVAL_S = 0.05  # between two checks whether a lease was renewed


class Deadline:
    """The time by which a job has to be finished. Whatever waits for the job waits no longer."""

    def __init__(self, seconds: float) -> None:
        """The deadline is `seconds` from now."""
        now_s = time.monotonic()
        self._allowed_s = seconds
        self._end_s = now_s + seconds
        self._given_back_until_s = now_s
        self._lock = threading.Lock()
        self._lease_end_s = math.inf
        self._cancelled: GradcamError | None = None
        self._device_s = 0.0

    @property
    def device_s(self) -> float:
        """Seconds for which the job has used the device."""
        return self._device_s

    def used_device(self, seconds: float) -> None:
        """Note that a pass of the job is complete.

        Args:
            seconds: How long the device computed it: the job's share, if it was shared.
        """
        with self._lock:
            self._device_s += seconds

    def give_back(self, since_s: float, until_s: float) -> None:
        """Move the deadline, by time that was lost without the job's fault. No time is given back twice.

        Args:
            since_s: When that began, by `time.monotonic`.
            until_s: Until when it is given back.
        """
        with self._lock:
            since_s = max(since_s, self._given_back_until_s)
            if until_s > since_s:
                self._end_s += until_s - since_s
                self._given_back_until_s = until_s

    def cancel(self, error: GradcamError) -> None:
        """Make the job stop now.

        Args:
            error: raised by `check` from now on. Later calls change nothing.
        """
        self._cancelled = self._cancelled or error

    def hold(self, seconds: float) -> None:
        """Note that the lease was renewed: for `seconds` no other worker can have the job."""
        self._lease_end_s = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds left, never below zero."""
        return 0.0 if self._cancelled else max(self._end_s - time.monotonic(), 0.0)

    def check(self, doing: str) -> None:
        """Raise where the job may not continue.

        If the lease may have expired, because the ledger is unreachable or the process was stopped for a
        while, this waits until the lease is renewed or lost: another worker may have the job by now.

        Args:
            doing: what the job does, for the error.

        Raises:
            JobTimeout: no time is left.
            GradcamError: the error given to `cancel`.
        """
        while time.monotonic() > self._lease_end_s and self.left_s():
            time.sleep(LEASE_POLL_INTERVAL_S)
        if self.left_s():
            return
        if self._cancelled:  # checked last: it may have just been set
            raise self._cancelled
        message = f"The job ran longer than its timeout_s of {self._allowed_s:g} s (at: {doing})."
        raise JobTimeout(message)
