"""A circuit breaker: a worker whose storage is down takes no jobs that it cannot finish."""

import logging
import random
import threading
import time
from collections.abc import Callable

from gradcam_worker.errors import GradcamError
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.schemas.ids import utc_now

log = logging.getLogger("gradcam")

FAILURES = 3  # jobs in a row whose storage failed: fewer may be chance
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 30.0  # before the storage is probed again; doubles
CLOSED_PAUSE_S = 60.0  # while there is nothing to probe: the loop is woken when it opens


class CircuitBreaker:
    """Opens after some failures in a row, and closes as soon as a probe, or a job, goes well."""

    def __init__(self, probe: Callable[[], object], first_pause_s: float = FIRST_PAUSE_S) -> None:
        """`probe` uses the storage as a job does, and raises where that fails."""
        self._probe, self._first_pause_s = probe, first_pause_s
        self._failures = 0
        self._why: str | None = None
        self._probes = 0  # since it opened
        self._due_s = 0.0  # the next probe
        self._lock = threading.Lock()
        self.loop = BackgroundLoop("breaker", self.step, self._pause_s)

    @property
    def open_reason(self) -> str | None:
        """Why no jobs are taken just now, and since when; none where they are. Costs nothing to ask."""
        return self._why

    def failed(self, error: GradcamError) -> None:
        """A job could not use the storage."""
        with self._lock:
            self._failures += 1
            if self._failures < FAILURES or self._why:
                return
            since = f"{utc_now():%Y-%m-%dT%H:%M:%SZ}"
            self._probes = 0
            self._plan_probe()
            self._why = f"The storage failed {self._failures} jobs in a row, since {since}: {error}"
            log.error("no jobs are taken until it is back. %s", self._why)
        self.loop.wake()

    def succeeded(self) -> None:
        """A job could."""
        with self._lock:
            self._failures, self._why = 0, None

    def step(self) -> None:
        """Probe the storage where the breaker is open and the next probe is due."""
        if self._why and time.monotonic() >= self._due_s:
            self.probe()

    def probe(self) -> None:
        """Probe the storage now; close the breaker where that succeeds."""
        self._probes += 1
        begun_s = time.monotonic()
        try:
            self._probe()
        except BaseException as error:  # noqa: BLE001  # whatever it is, jobs would meet it too
            log.warning("the storage is still down: %s: %s", type(error).__name__, error)
            self._plan_probe()
        else:
            log.info("the storage is back (%.1f s): jobs are taken again", time.monotonic() - begun_s)
            self.succeeded()

    def _plan_probe(self) -> None:
        pause_s = min(self._first_pause_s * 2.0 ** min(self._probes, 10), LONGEST_PAUSE_S)
        # Jitter: workers that lost one storage together do not come back to it together.
        self._due_s = time.monotonic() + pause_s * random.uniform(0.5, 1)  # noqa: S311  # no secret

    def _pause_s(self) -> float:
        return max(self._due_s - time.monotonic(), 0) if self._why else CLOSED_PAUSE_S
