"""A circuit breaker: a worker whose storage is down takes no jobs that it cannot finish."""

import logging
import threading
import time
from collections.abc import Callable

from gradcam_worker.errors import GradcamError
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.retry import HALF_OR_MORE, RetryPolicy
from gradcam_worker.schemas.ids import utc_now

log = logging.getLogger("gradcam")

FAILURES = 3  # jobs in a row whose storage failed: fewer may be chance
PROBES = RetryPolicy(
    first_s=2.0, max_s=30.0, jitter=HALF_OR_MORE
)  # short beside what restarting a storage takes
CLOSED_PAUSE_S = 60.0  # while there is nothing to probe: the loop is woken when it opens


class CircuitBreaker:
    """Opens after some failures in a row, and closes as soon as a probe, or a job, goes well."""

    def __init__(self, probe: Callable[[], object], probes: RetryPolicy = PROBES) -> None:
        """`probe` uses the storage as a job does, and raises where that fails; `probes`: how often."""
        self._probe, self._policy = probe, probes
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
        self._due_s = time.monotonic() + self._policy.pause_s(self._probes + 1)

    def _pause_s(self) -> float:
        return max(self._due_s - time.monotonic(), 0) if self._why else CLOSED_PAUSE_S
