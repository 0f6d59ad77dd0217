"""Whether a process makes progress: takes the jobs that wait, and finishes those that it has taken."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradcam_worker.errors import GradcamError
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.text.visible import counted

UNREADY_AFTER_S = 15.0  # without taking a job although some wait: longer than a slow server needs
UNHEALTHY_AFTER_S = 45.0  # the same, until the process is restarted
QUEUE_CHECK_INTERVAL_S = 5.0  # while there is no progress; a process that makes progress does not ask
# How long an unreachable broker excuses a process. It may refuse this process alone: then a new one tries.
BROKER_EXCUSE_S = 1800.0
ORPHANED_AFTER_S = 10.0  # a message that is not acknowledged and that no thread has


class StallDetector:
    """Notices that a process makes no progress though there is work.

    Progress means that a job is taken, reaches a stage, or ends.
    """

    def __init__(
        self,
        any_waiting: Callable[[], bool],
        hung_after_s: float,
        is_paused: Callable[[], bool] = lambda: False,
    ) -> None:
        """The process makes progress now.

        Args:
            any_waiting: whether any message waits in a queue; may raise a GradcamError.
            hung_after_s: how long running jobs may make no progress while others wait, in seconds.
            is_paused: whether the process takes no jobs on purpose, whatever waits.
        """
        self._any_waiting, self._hung_after_s, self._is_paused = any_waiting, hung_after_s, is_paused
        self._lock = threading.Lock()
        self._running_jobs = 0
        self._progress_s = self._checked_s = time.monotonic()
        self._stalled_s: float | None = None  # since when jobs wait and there is no progress
        self._unreachable_s: float | None = None  # since when the broker cannot be used
        self._orphaned_s: float | None = None  # since when a message is orphaned
        self.loop = BackgroundLoop("stall", self.check, QUEUE_CHECK_INTERVAL_S / 2)

    @contextmanager
    def running_job(self) -> Iterator[None]:
        """Count a running job within the block."""
        with self._lock:
            self._running_jobs += 1
        self.progressed()
        try:
            yield
        finally:
            with self._lock:
                self._running_jobs -= 1
            self.progressed()

    def progressed(self) -> None:
        """Report that a job was taken, reached a stage, or ended."""
        self._progress_s, self._stalled_s = time.monotonic(), None

    def broker_unreachable(self) -> bool:
        """Report that the consumer cannot use the broker, and will try again.

        Returns:
            Whether that excuses a process without progress: for at most BROKER_EXCUSE_S.
        """
        self._unreachable_s = self._unreachable_s or time.monotonic()
        excused = time.monotonic() - self._unreachable_s < BROKER_EXCUSE_S
        if excused:
            self.progressed()
        return excused

    def broker_reachable(self) -> None:
        """Report that the consumer is connected."""
        self._unreachable_s = None
        self.progressed()

    def orphaned_messages(self, count: int) -> None:
        """Report how many unacknowledged messages no thread has had for ORPHANED_AFTER_S."""
        if not count:
            self._orphaned_s = None
        elif self._orphaned_s is None:
            self._orphaned_s = time.monotonic()

    def check(self) -> None:
        """Ask whether jobs wait, if there was no progress for QUEUE_CHECK_INTERVAL_S."""
        now_s = time.monotonic()
        if now_s - max(self._progress_s, self._checked_s) < QUEUE_CHECK_INTERVAL_S:
            return
        self._checked_s = now_s
        try:
            waiting = not self._is_paused() and self._any_waiting()
        except GradcamError:  # the consumer reports an unreachable broker
            waiting = False
        if not waiting:
            self._stalled_s = None
        elif self._stalled_s is None:
            self._stalled_s = now_s

    def unready_reason(self) -> str | None:
        """Why this process should get no new jobs; None if it should."""
        return self._reason(UNREADY_AFTER_S)

    def unhealthy_reason(self) -> str | None:
        """Why this process should be restarted; None if it should not."""
        return self._reason(UNHEALTHY_AFTER_S)

    def _reason(self, limit_s: float) -> str | None:
        now_s = time.monotonic()
        if self._orphaned_s is not None and now_s - self._orphaned_s > limit_s and not self._running_jobs:
            return "messages are not acknowledged, and no job is running"
        if self._stalled_s is None:
            return None
        stalled_s = now_s - self._stalled_s
        if self._running_jobs:
            if stalled_s > self._hung_after_s:
                jobs = counted(self._running_jobs, "job is", "jobs are")
                return f"{jobs} running without progress for {stalled_s:.0f} s, while others wait"
        elif stalled_s > limit_s:
            return f"jobs have waited for {stalled_s:.0f} s, and none was taken"
        return None
