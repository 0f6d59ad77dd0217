"""Whether a process makes progress: takes jobs that wait, and brings to an end those it has taken."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradcam_worker.errors import GradcamError
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.text.visible import counted

UNREADY_AFTER_S = 15.0  # without a job taken, though some wait: no server is so slow for so long
UNHEALTHY_AFTER_S = 45.0  # the same, until the process is started again
CHECK_QUEUE_EVERY_S = 5.0  # a process that makes progress asks nothing
BROKER_EXCUSE_S = (
    1800.0  # for a broker that refuses this process, though it may answer others: then a new one tries
)
ORPHANED_AFTER_S = 10.0  # a message that is not acknowledged, while no thread works on it


class StallDetector:
    """Notices that a process makes no progress though there is work.

    Progress: a job is taken, reaches a stage, or ends.
    """

    def __init__(self, any_waiting: Callable[[], bool], hung_after_s: float) -> None:
        """The process is well.

        Args:
            any_waiting: whether any message waits in a queue; may raise a GradcamError.
            hung_after_s: how long running jobs may make no progress while others wait.
        """
        self._any_waiting, self._hung_after_s = any_waiting, hung_after_s
        self._lock = threading.Lock()
        self._running = 0  # jobs
        self._progress_s = self._checked_s = time.monotonic()
        self._stalled_s: float | None = None  # from when on something waited at each check, without progress
        self._unreachable_s: float | None = None  # from when on the broker could not be used
        self._orphaned_s: float | None = None  # from when on a message was orphaned
        self.loop = BackgroundLoop("stall", self.check, CHECK_QUEUE_EVERY_S / 2)

    @contextmanager
    def running_job(self) -> Iterator[None]:
        """Within it, a job is run."""
        with self._lock:
            self._running += 1
        self.progressed()
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
            self.progressed()

    def progressed(self) -> None:
        """A job was taken, reached a stage, or ended."""
        self._progress_s, self._stalled_s = time.monotonic(), None

    def broker_unreachable(self) -> bool:
        """The consumer cannot use the broker, and tries again.

        Returns:
            Whether that excuses a process without progress: for BROKER_EXCUSE_S at most.
        """
        self._unreachable_s = self._unreachable_s or time.monotonic()
        excused = time.monotonic() - self._unreachable_s < BROKER_EXCUSE_S
        if excused:
            self.progressed()
        return excused

    def broker_reachable(self) -> None:
        """The consumer is connected again."""
        self._unreachable_s = None
        self.progressed()

    def orphaned_messages(self, count: int) -> None:
        """So many messages have been unacknowledged for ORPHANED_AFTER_S, and no thread works on them."""
        if not count:
            self._orphaned_s = None
        elif self._orphaned_s is None:
            self._orphaned_s = time.monotonic()

    def check(self) -> None:
        """Ask whether jobs wait, where there was no progress for a while."""
        now_s = time.monotonic()
        if now_s - max(self._progress_s, self._checked_s) < CHECK_QUEUE_EVERY_S:
            return
        self._checked_s = now_s
        try:
            waiting = self._any_waiting()
        except GradcamError:  # the consumer reports an unreachable broker
            waiting = False
        if not waiting:
            self._stalled_s = None
        elif self._stalled_s is None:
            self._stalled_s = now_s

    def unready_reason(self) -> str | None:
        """Why this process should be given no new jobs, if so."""
        return self._reason(UNREADY_AFTER_S)

    def unhealthy_reason(self) -> str | None:
        """Why this process should be started again, if so."""
        return self._reason(UNHEALTHY_AFTER_S)

    def _reason(self, limit_s: float) -> str | None:
        now_s = time.monotonic()
        if self._orphaned_s is not None and now_s - self._orphaned_s > limit_s and not self._running:
            return "messages are not acknowledged, and no job is running"
        if self._stalled_s is None:
            return None
        stalled_s = now_s - self._stalled_s
        if self._running:
            if stalled_s > self._hung_after_s:
                jobs = counted(self._running, "job is", "jobs are")
                return f"{jobs} running without progress for {stalled_s:.0f} s, while others wait"
        elif stalled_s > limit_s:
            return f"jobs have waited for {stalled_s:.0f} s, and none was taken"
        return None
