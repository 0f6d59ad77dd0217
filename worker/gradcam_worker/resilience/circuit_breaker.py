"""A circuit breaker: a worker whose storage is down takes no jobs."""

import threading
import time
from collections.abc import Callable

from gradcam_worker.errors import GradcamError
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.retry import HALF_OR_MORE, RetryPolicy
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

MAX_FAILURES = 3  # jobs in a row whose storage failed; fewer may be chance
# Pauses between probes, short compared with the restart of a storage.
PROBES = RetryPolicy(first_s=2.0, max_s=30.0, jitter=HALF_OR_MORE)
CLOSED_PAUSE_S = 60.0  # of the loop while the breaker is closed; opening it wakes the loop


class CircuitBreaker:
    """Opens after MAX_FAILURES failures in a row, and closes as soon as a probe or a job succeeds."""

    def __init__(self, probe: Callable[[], object], probes: RetryPolicy = PROBES) -> None:
        """The breaker is closed.

        Args:
            probe: uses the storage as a job does, and raises where that fails.
            probes: the pauses between probes.
        """
        self._probe, self._policy = probe, probes
        self._failures = 0
        self._open_reason: str | None = None
        self._probes = 0  # since the breaker opened
        self._due_s = 0.0  # when the next probe is due
        self._lock = threading.Lock()
        self.loop = BackgroundLoop("breaker", self.step, self._pause_s)

    @property
    def open_reason(self) -> str | None:
        """Why no jobs are taken, and since when; None while the breaker is closed. Reads a field only."""
        return self._open_reason

    def failed(self, error: GradcamError) -> None:
        """Report that a job could not use the storage."""
        with self._lock:
            self._failures += 1
            if self._failures < MAX_FAILURES or self._open_reason:
                return
            since = f"{utc_now():%Y-%m-%dT%H:%M:%SZ}"
            self._probes = 0
            self._plan_probe()
            self._open_reason = f"The storage failed {self._failures} jobs in a row, since {since}: {error}"
            log.error("circuit_opened", failures=self._failures, reason=self._open_reason)
        self.loop.wake()

    def succeeded(self) -> None:
        """Report that a job, or a probe, could use the storage."""
        with self._lock:
            self._failures, self._open_reason = 0, None

    def step(self) -> None:
        """Probe the storage if the breaker is open and the next probe is due."""
        if self._open_reason and time.monotonic() >= self._due_s:
            self.probe()

    def probe(self) -> None:
        """Probe the storage now. Closes the breaker where that succeeds."""
        self._probes += 1
        started_s = time.monotonic()
        try:
            self._probe()
        except BaseException as error:  # noqa: BLE001  # a job would fail in the same way
            log.warning("circuit_probe_failed", error_type=type(error).__name__, error=error)
            self._plan_probe()
        else:
            log.info("circuit_closed", probe_s=time.monotonic() - started_s)
            self.succeeded()

    def _plan_probe(self) -> None:
        self._due_s = time.monotonic() + self._policy.pause_s(self._probes + 1)

    def _pause_s(self) -> float:
        return max(self._due_s - time.monotonic(), 0) if self._open_reason else CLOSED_PAUSE_S
