"""The signs of life that a worker process writes to its supervisor.

A process can exist and do nothing: Celery's loop may hang after a restart of the broker, or the device may
never answer. It then stops writing, and its supervisor restarts it.
"""

import os
import time
from collections.abc import Callable

from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

REPORT_INTERVAL_S = 1.0
WORKS = b"1"  # a sign of life of a process that takes jobs
STARTS = b"0"  # of one that does not yet
HUNG_AFTER_S = 30.0  # without a turn of the consumer's loop, which turns every second


class LivenessReporter:
    """Writes a byte every REPORT_INTERVAL_S while the process is healthy."""

    def __init__(
        self,
        fd: int | None,
        *,
        broker_answers: Callable[[], bool] | None,
        other_reason: Callable[[], str | None],
        starts: Callable[[], bool] = lambda: False,
    ) -> None:
        """Nothing is written yet.

        Args:
            fd: The file descriptor to write to; None where nobody reads.
            broker_answers: Whether the broker is reachable; None where the process has no consumer.
            other_reason: Another reason to restart the process, if any.
            starts: Whether the process does not take jobs yet.
        """
        self._fd, self._broker_answers, self._other_reason = fd, broker_answers, other_reason
        self._starts = starts
        self._turned_s = time.monotonic()
        self._stopping = False
        self.last_reason: str | None = None  # why it was unhealthy at the last report
        self.loop = BackgroundLoop("liveness", self.report, REPORT_INTERVAL_S)

    def loop_turned(self) -> None:
        """Report a turn of the consumer's loop."""
        self._turned_s = time.monotonic()

    def stopping(self) -> None:
        """Report that the process takes no new jobs: from now on the consumer's loop need not turn."""
        self._stopping = True

    def unhealthy_reason(self) -> str | None:
        """Why this process should be restarted; None if it should not."""
        if self._stopping:
            return None
        if reason := self._other_reason():
            return reason
        if not self._broker_answers:
            return None
        turned_s = self._turned_s
        idle_s = time.monotonic() - turned_s
        if idle_s <= HUNG_AFTER_S:
            return None
        if self._broker_answers():
            return f"the broker answers, but nothing has been received for {idle_s:.0f} s"
        if self._turned_s == turned_s:
            # The broker's fault. When it answers again, the loop has HUNG_AFTER_S to connect.
            self.loop_turned()
        return None

    def report(self) -> None:
        """Write a sign of life if the process is healthy; log the reason when it becomes unhealthy."""
        try:
            reason = self.unhealthy_reason()
        except BaseException:  # a defect of the check is no reason to restart the process
            self.last_reason = None
            self.write_sign()
            raise
        if reason and not self.last_reason:
            log.error("process_unhealthy", reason=reason)
        self.last_reason = reason
        if not reason:
            self.write_sign()

    def write_sign(self) -> bool:
        """Write one byte. Returns False where nobody can read it any more."""
        if self._fd is None:
            return True
        try:
            os.write(self._fd, STARTS if self._starts() else WORKS)
        except OSError:  # the supervisor is gone: parent_watch ends this process
            return False
        return True
