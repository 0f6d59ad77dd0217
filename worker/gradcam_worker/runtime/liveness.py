"""Signs of life: what a worker process shows its supervisor as long as it does its work.

A process can be there and do nothing: Celery's loop may hang after a restart of the broker, the device may
never answer. It shows no sign then, and is started again.
"""

import logging
import os
import time
from collections.abc import Callable

from gradcam_worker.resilience.background_loop import BackgroundLoop

log = logging.getLogger("gradcam")

EVERY_S = 1.0  # between two signs
STILL_S = 30.0  # without a turn of the consumer's loop: it turns every second, or tries to connect again


class LivenessReporter:
    """Writes a byte again and again, as long as all is well."""

    def __init__(
        self,
        fd: int | None,
        *,
        reachable: Callable[[], bool],
        ill: Callable[[], str | None],
    ) -> None:
        """`reachable`: whether the broker answers. `ill`: what else is wrong with the process, if
        anything.
        """
        self._fd, self._reachable, self._ill = fd, reachable, ill
        self._turned_s = time.monotonic()
        self._ending = False
        self.said: str | None = None  # what was wrong at the last look
        self.loop = BackgroundLoop("liveness", self.report, EVERY_S)

    def tick(self) -> None:
        """The consumer's loop has come round."""
        self._turned_s = time.monotonic()

    def ending(self) -> None:
        """From now on the loop need not turn: the process ends what it has."""
        self._ending = True

    def unhealthy_reason(self) -> str | None:
        """What is wrong with this process, so that it should be started again."""
        if self._ending:
            return None
        if ill := self._ill():
            return ill
        turned_s = self._turned_s
        still_s = time.monotonic() - turned_s
        if still_s <= STILL_S:
            return None
        if self._reachable():
            return f"the broker answers, but nothing has been received for {still_s:.0f} s"
        if self._turned_s == turned_s:
            # The broker's fault. When it is back, the loop has time to find that out, as it tries ever less
            # often.
            self.tick()
        return None

    def report(self) -> None:
        """Give a sign of life, unless something is wrong."""
        try:
            reason = self.unhealthy_reason()
        except BaseException:  # a defect of the check is no reason to have the process restarted
            self.said = None
            self.show()
            raise
        if reason and not self.said:
            log.error("no sign of life any more: %s", reason)
        self.said = reason
        if not reason:
            self.show()

    def show(self) -> bool:
        """Give one sign; whether anybody can still see it."""
        if self._fd is None:
            return True
        try:
            os.write(self._fd, b"1")
        except OSError:  # whoever listened is gone: the lifeline ends this process
            return False
        return True
