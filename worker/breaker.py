"""A circuit breaker: a worker whose storage is down takes no jobs that it cannot finish."""

import logging
import threading
import time
from collections.abc import Callable

from worker.errors import GradcamError

log = logging.getLogger("gradcam")

FAILURES = 3  # jobs in a row whose storage failed: fewer may be chance
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 30.0  # before the storage is probed again; doubles
LOOK_S = 0.5  # between two looks whether there is anything to probe


class Breaker:
    """Opens after some failures in a row, and closes as soon as a probe goes well."""

    def __init__(self, probe: Callable[[], object]) -> None:
        """`probe` uses the storage as a job does, and raises GradcamError where that fails."""
        self._probe = probe
        self._failures = 0
        self._why: str | None = None
        self._door = threading.Lock()

    @property
    def open(self) -> str | None:
        """Why no jobs are taken just now; none where they are."""
        return self._why

    def failed(self, error: GradcamError) -> None:
        """A job could not use the storage."""
        with self._door:
            self._failures += 1
            if self._failures >= FAILURES and not self._why:
                self._why = f"The storage failed {self._failures} times in a row: {error}"
                log.error("no jobs are taken until it is back. %s", self._why)

    def succeeded(self) -> None:
        """A job could."""
        with self._door:
            self._failures, self._why = 0, None

    def watch(self, stopped: threading.Event) -> None:
        """Probe while it is open, until `stopped`."""
        pause_s = FIRST_PAUSE_S
        while not stopped.wait(LOOK_S):
            if not self._why:
                pause_s = FIRST_PAUSE_S
                continue
            if stopped.wait(pause_s):
                return
            begun_s = time.monotonic()
            try:
                self._probe()
            except GradcamError as error:
                log.warning("the storage is still down: %s", error)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                log.info("the storage is back (%.1f s): jobs are taken again", time.monotonic() - begun_s)
                self.succeeded()
