"""Logs the start and the end of an outage of a server, and every half minute that it lasts."""

import threading
import time
from dataclasses import dataclass, field

from gradcam_worker.errors import BrokerUnavailable
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

LOG_INTERVAL_S = 30.0
RECOVERED_AFTER_S = 3.0  # without a failure: several threads use a server, and not all of them fail at once


class Outage:
    """The failed calls to one server, from all threads of a process."""

    def __init__(self, server: str, *, quiet_s: float = 0.0) -> None:
        """No call has failed yet.

        Args:
            server: Its name in log lines.
            quiet_s: An outage is logged when it has lasted for so long; a shorter one is not.
        """
        self._server, self._quiet_s = server, quiet_s
        self._lock = threading.Lock()
        self._started_s: float | None = None
        self._logged_s: float | None = None  # in this outage
        self._failed_s = self._answered_s = 0.0  # the last failure, and the first answer since
        self._failures = 0

    def failed(self, reason: str) -> None:
        """Report that the server could not be used.

        Args:
            reason: what is not done, and the error.
        """
        now_s = time.monotonic()
        with self._lock:
            if self._answered_s > self._failed_s and self._is_over(now_s):  # nobody has called since
                self._end()
            self._failed_s = now_s
            self._failures += 1
            if self._started_s is None:
                self._started_s = now_s
            if self._logged_s is None and now_s - self._started_s >= self._quiet_s:
                self._logged_s = now_s
                log.warning("server_unreachable", server=self._server, reason=reason)
            elif self._logged_s is not None and now_s - self._logged_s >= LOG_INTERVAL_S:
                self._logged_s = now_s
                log.warning(
                    "server_still_unreachable",
                    server=self._server,
                    outage_s=round(now_s - self._started_s),
                    failures=self._failures,
                    reason=reason,
                )
            else:
                log.debug("server_call_failed", server=self._server, reason=reason)

    def answered(self) -> None:
        """Report that the server answered."""
        if self._started_s is None:
            return
        now_s = time.monotonic()
        with self._lock:
            if self._answered_s <= self._failed_s:
                self._answered_s = now_s
            if self._is_over(now_s):
                self._end()

    def _is_over(self, now_s: float) -> bool:
        """Whether there was an outage, which ended with the first answer."""
        return self._started_s is not None and now_s - self._failed_s >= RECOVERED_AFTER_S

    def _end(self) -> None:
        if self._started_s is not None and self._logged_s is not None:
            log.warning(
                "server_reachable_again",
                server=self._server,
                outage_s=round(self._answered_s - self._started_s),
                failures=self._failures,
            )
        self._started_s, self._logged_s, self._failures = None, None, 0


@dataclass(frozen=True)
class Outages:
    """The outages of the servers that a process needs."""

    ledger: Outage = field(default_factory=lambda: Outage("ledger"))
    broker: Outage = field(default_factory=lambda: Outage("broker"))

    def of(self, error: Exception) -> Outage:
        """Return the outage of the server that raised: the broker for BrokerUnavailable, else the ledger."""
        return self.broker if isinstance(error, BrokerUnavailable) else self.ledger
