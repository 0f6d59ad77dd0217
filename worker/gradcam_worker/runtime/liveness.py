"""Signs of life: what a worker process writes to its supervisor for as long as it works.

A process can be there and do nothing: Celery's loop may hang after a restart of the broker, the device may
never answer. It then writes nothing more, and is started again.
"""

import logging
import os
import time
from collections.abc import Callable

from gradcam_worker.resilience.background_loop import BackgroundLoop

log = logging.getLogger("gradcam")

REPORT_EVERY_S = 1.0
HUNG_AFTER_S = 30.0  # the consumer's loop turns every second, or tries to connect again


class LivenessReporter:
    """Writes a byte again and again, as long as nothing is wrong with the process."""

    def __init__(
        self,
        fd: int | None,
        *,
        broker_answers: Callable[[], bool],
        other_reason: Callable[[], str | None],
    ) -> None:
        """Nothing is written yet.

        Args:
            fd: where to write; None where nobody reads.
            broker_answers: whether the broker can be reached.
            other_reason: why the process should be started again, of what is not looked at here.
        """
        self._fd, self._broker_answers, self._other_reason = fd, broker_answers, other_reason
        self._turned_s = time.monotonic()
        self._ending = False
        self.last_reason: str | None = None  # why it was unhealthy at the last report
        self.loop = BackgroundLoop("liveness", self.report, REPORT_EVERY_S)

    def loop_turned(self) -> None:
        """The consumer's loop has come round."""
        self._turned_s = time.monotonic()

    def ending(self) -> None:
        """From now on the consumer's loop need not turn: the process finishes the jobs it has."""
        self._ending = True

    def unhealthy_reason(self) -> str | None:
        """Why this process should be started again, if so."""
        if self._ending:
            return None
        if reason := self._other_reason():
            return reason
        turned_s = self._turned_s
        still_s = time.monotonic() - turned_s
        if still_s <= HUNG_AFTER_S:
            return None
        if self._broker_answers():
            return f"the broker answers, but nothing has been received for {still_s:.0f} s"
        if self._turned_s == turned_s:
            # The broker's fault. Once it answers, the loop has time to notice, as it tries ever less often.
            self.loop_turned()
        return None

    def report(self) -> None:
        """Give a sign of life, unless something is wrong."""
        try:
            reason = self.unhealthy_reason()
        except BaseException:  # a defect of the check is no reason to have the process restarted
            self.last_reason = None
            self.show()
            raise
        if reason and not self.last_reason:
            log.error("no sign of life any more: %s", reason)
        self.last_reason = reason
        if not reason:
            self.show()

    def show(self) -> bool:
        """Write one byte; whether anybody can still read it."""
        if self._fd is None:
            return True
        try:
            os.write(self._fd, b"1")
        except OSError:  # the supervisor is gone: parent_watch ends this process
            return False
        return True
