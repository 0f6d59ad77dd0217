"""A circuit breaker: a worker whose storage is down takes no jobs that it cannot finish."""

import logging
import random
import threading
import time
from collections.abc import Callable

from gradcam_worker.errors import GradcamError
from gradcam_worker.schemas.ids import utc_now

log = logging.getLogger("gradcam")

FAILURES = 3  # jobs in a row whose storage failed: fewer may be chance
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 30.0  # before the storage is probed again; doubles
LOOK_S = 0.5  # between two looks whether there is anything to probe


class CircuitBreaker:
    """Opens after some failures in a row, and closes as soon as a probe, or a job, goes well."""

    def __init__(self, probe: Callable[[], object], first_pause_s: float = FIRST_PAUSE_S) -> None:
        """`probe` uses the storage as a job does, and raises where that fails."""
        self._probe, self._first_pause_s = probe, first_pause_s
        self._failures = 0
        self._why: str | None = None
        self._opened = threading.Event()
        self._door = threading.Lock()

    @property
    def open_reason(self) -> str | None:
        """Why no jobs are taken just now, and since when; none where they are. Costs nothing to ask."""
        return self._why

    def failed(self, error: GradcamError) -> None:
        """A job could not use the storage."""
        with self._door:
            self._failures += 1
            if self._failures < FAILURES or self._why:
                return
            since = f"{utc_now():%Y-%m-%dT%H:%M:%SZ}"
            self._why = f"The storage failed {self._failures} jobs in a row, since {since}: {error}"
            self._opened.set()
            log.error("no jobs are taken until it is back. %s", self._why)

    def succeeded(self) -> None:
        """A job could."""
        with self._door:
            self._failures, self._why = 0, None
            self._opened.clear()

    def watch(self, stopped: threading.Event) -> None:
        """Probe while it is open, until `stopped`: runs in a thread of its own."""
        pause_s = self._first_pause_s
        while not stopped.is_set():
            if not self._opened.wait(LOOK_S):
                pause_s = self._first_pause_s
                continue
            # Jitter: workers that lost one storage together do not come back to it together.
            if stopped.wait(pause_s * random.uniform(0.5, 1)) or not self._why:  # noqa: S311  # no secret
                continue
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self._look()

    def _look(self) -> None:
        begun_s = time.monotonic()
        try:
            self._probe()
        except BaseException as error:  # noqa: BLE001  # whatever it is, jobs would meet it too
            log.warning("the storage is still down: %s: %s", type(error).__name__, error)
        else:
            log.info("the storage is back (%.1f s): jobs are taken again", time.monotonic() - begun_s)
            self.succeeded()
