"""Signs of life: what a worker process shows its supervisor as long as it does its work.

A process can be there and do nothing: Celery's loop may hang after a restart of the broker, the device may
never answer. It shows no sign then, and is started again.
"""

import logging
import os
import threading
import time
from collections.abc import Callable

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

    def run(self, stopped: threading.Event) -> None:
        """Show signs of life until `stopped`, or until there is trouble."""
        while not stopped.wait(EVERY_S):
            try:
                trouble = self.unhealthy_reason()
            except BaseException:  # not to be taken for a sign of death
                log.exception("nobody foresaw this")
                trouble = None
            if trouble and not self.said:
                log.error("no sign of life any more: %s", trouble)
            self.said = trouble
            if not trouble and not self.show():
                return

    def show(self) -> bool:
        """Give one sign; whether anybody can still see it."""
        if self._fd is None:
            return True
        try:
            os.write(self._fd, b"1")
        except OSError:  # whoever listened is gone: the lifeline ends this process
            return False
        return True
