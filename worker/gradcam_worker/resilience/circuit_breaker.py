"""A circuit breaker: a worker whose storage is down takes no jobs."""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.retry import HALF_OR_MORE, RetryPolicy
from gradcam_worker.resilience.server_activity import ServerActivity
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

SUSPECTED_AFTER_S = 2.0  # without an answer to any request of a kind: then a probe decides
TRUSTED_FOR_S = 4.0  # after a probe that succeeded, while a slow request is still without an answer
CONFIRM_AFTER_S = 0.5  # without an answer: that long, the storage may be why an attempt has failed
POLL_INTERVAL_S = 0.5  # of the loop while the breaker is closed
LOG_INTERVAL_S = 30.0  # between two lines that it is still open
# Pauses between probes, short compared with the restart of a storage.
PROBES = RetryPolicy(first_s=2.0, max_s=10.0, jitter=HALF_OR_MORE)


class CircuitBreaker:
    """Opens when a probe fails, and closes as soon as a probe or a job succeeds.

    The storage is probed when its requests have had no answer for SUSPECTED_AFTER_S, and when an attempt at a
    job has failed because of it: so neither chance nor a large object opens the breaker, and a worker notices
    within seconds, whatever its jobs are doing.
    """

    def __init__(
        self,
        probe: Callable[[], object],
        probes: RetryPolicy = PROBES,
        activities: Sequence[ServerActivity] = (),
    ) -> None:
        """The breaker is closed.

        Args:
            probe: Uses the storage as a job does, and raises where that fails.
            probes: The pauses between probes while the breaker is open.
            activities: The requests to the storage, by kind: it may still be read when it is full.
        """
        self._probe, self._policy, self._activities = probe, probes, activities
        self._open_reason: str | None = None
        self._has_worked = False
        self._opened_s = self._logged_s = 0.0
        self._probes = 0  # since the breaker opened
        self._due_s = 0.0  # when the next probe is due, or the next suspicion counts
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        self._probed_s = -1.0  # when the last probe began
        self.loop = BackgroundLoop("breaker", self.step, self._pause_s, immediately=True)

    @property
    def open_reason(self) -> str | None:
        """Why no jobs are taken, and since when; None while the breaker is closed. Reads a field only."""
        return self._open_reason

    @property
    def is_open(self) -> bool:
        """Whether no jobs are taken."""
        return self._open_reason is not None

    @property
    def unready_reason(self) -> str | None:
        """Why this process is not ready: `open_reason`, or because the storage has not been used yet."""
        return self._open_reason or (None if self._has_worked else "The storage has not been used yet.")

    def may_be_to_blame(self) -> bool:
        """Return whether the storage may be why an attempt has failed: its requests have had no answer."""
        return self.is_open or any(
            activity.has_failed or activity.silent_s > CONFIRM_AFTER_S for activity in self._activities
        )

    def is_to_blame(self) -> bool:
        """Return whether the storage is why an attempt has failed: by a probe, if it may be."""
        return self.may_be_to_blame() and self.confirm()

    def confirm(self) -> bool:
        """Return whether the storage is down: now, by a probe, unless that is known."""
        asked_s = time.monotonic()
        with self._probing:
            if not self.is_open and self._probed_s < asked_s:  # else the result of another thread
                self._probe_now()
        return self.is_open

    def succeeded(self) -> None:
        """Report that a job, or a probe, could use the storage."""
        with self._lock:
            was_open, self._open_reason, self._has_worked = self.is_open, None, True
        if was_open:
            log.info("circuit_closed", open_s=round(time.monotonic() - self._opened_s))

    def step(self) -> None:
        """Probe the storage if the next probe is due, or if it is suspected, or has not been used yet."""
        if time.monotonic() < self._due_s:
            return
        if self.is_open or not self._has_worked or self._silent_s() >= SUSPECTED_AFTER_S:
            self.probe()

    def probe(self) -> None:
        """Probe the storage now. Opens the breaker where that fails, and closes it where it succeeds."""
        with self._probing:
            self._probe_now()

    def _probe_now(self) -> None:
        self._probed_s = started_s = time.monotonic()
        silent_s = self._silent_s()
        try:
            self._probe()
        except BaseException as error:  # noqa: BLE001  # a job would fail in the same way
            self._open(error, silent_s + time.monotonic() - started_s)
            return
        self._due_s = time.monotonic() + TRUSTED_FOR_S
        self.succeeded()

    def _open(self, error: BaseException, silent_s: float) -> None:
        """Note that a probe has failed, after so many seconds without an answer."""
        now_s = time.monotonic()
        with self._lock:
            opens = not self.is_open
            if opens:
                since = utc_now() - timedelta(seconds=silent_s)
                self._open_reason = f"The storage has failed since {since:%Y-%m-%dT%H:%M:%SZ}: {error}"
                self._opened_s, self._probes = now_s, 0
            self._probes += 1
            self._due_s = now_s + self._policy.pause_s(self._probes)
        kind, open_s = type(error).__name__, round(now_s - self._opened_s)
        if opens:
            self._logged_s = now_s
            log.error("circuit_opened", reason=self._open_reason)
            self.loop.wake()
        elif now_s - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = now_s
            log.warning("circuit_still_open", open_s=open_s, error_type=kind, error=error)
        else:
            log.debug("circuit_probe_failed", error_type=kind, error=error)

    def _silent_s(self) -> float:
        return max((activity.silent_s for activity in self._activities), default=0.0)

    def _pause_s(self) -> float:
        return max(self._due_s - time.monotonic(), 0) if self.is_open else POLL_INTERVAL_S
