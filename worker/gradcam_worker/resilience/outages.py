"""Tells the start and the end of an outage of a server, and every half minute that it lasts."""

import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from gradcam_worker.errors import BrokerUnavailable
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

TOLD_EVERY_S = 30.0
RECOVERED_AFTER_S = 3.0  # without a failure: several threads use a server, and not all of them fail at once


class OutageReport(Protocol):
    """Where an outage is told. `server` is its name, `reason` what is not done, and the error."""

    def began(self, server: str, reason: str) -> None:
        """Calls fail."""
        ...

    def lasts(self, server: str, reason: str, outage_s: float, failures: int) -> None:
        """They still do, after so many seconds and failures."""
        ...

    def ended(self, server: str, outage_s: float, failures: int) -> None:
        """The server answered, after so many seconds and failures."""
        ...


class OutageEvents:
    """Tells outages in the log."""

    def began(self, server: str, reason: str) -> None:
        """See `OutageReport.began`."""
        log.warning("server_unreachable", server=server, reason=reason)

    def lasts(self, server: str, reason: str, outage_s: float, failures: int) -> None:
        """See `OutageReport.lasts`."""
        log.warning(
            "server_still_unreachable",
            server=server,
            outage_s=round(outage_s),
            failures=failures,
            reason=reason,
        )

    def ended(self, server: str, outage_s: float, failures: int) -> None:
        """See `OutageReport.ended`."""
        log.warning("server_reachable_again", server=server, outage_s=round(outage_s), failures=failures)


class Outage:
    """The failed calls to one server, from all threads of a process."""

    def __init__(
        self,
        server: str,
        *,
        quiet_s: float = 0.0,
        recovered_after_s: float | None = None,
        report: OutageReport | None = None,
    ) -> None:
        """No call has failed yet.

        Args:
            server: Its name.
            quiet_s: An outage is told when it has lasted for so long; a shorter one is not.
            recovered_after_s: An outage has ended after so long without a failure; None: RECOVERED_AFTER_S.
            report: Where it is told; None: in the log.
        """
        self._server, self._quiet_s, self._report = server, quiet_s, report or OutageEvents()
        self._recovered_after_s = recovered_after_s
        self._lock = threading.Lock()
        self._started_s: float | None = None
        self._told_s: float | None = None  # in this outage
        self._failed_s = self._answered_s = 0.0  # the last failure, and the first answer since
        self._failures = 0

    @property
    def ongoing(self) -> bool:
        """Whether there is one."""
        return self._started_s is not None

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
            if self._told_s is None and now_s - self._started_s >= self._quiet_s:
                self._told_s = now_s
                self._report.began(self._server, reason)
            elif self._told_s is not None and now_s - self._told_s >= TOLD_EVERY_S:
                self._told_s = now_s
                self._report.lasts(self._server, reason, now_s - self._started_s, self._failures)
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
        after_s = RECOVERED_AFTER_S if self._recovered_after_s is None else self._recovered_after_s
        return self._started_s is not None and now_s - self._failed_s >= after_s

    def _end(self) -> None:
        if self._started_s is not None and self._told_s is not None:
            self._report.ended(self._server, self._answered_s - self._started_s, self._failures)
        self._started_s, self._told_s, self._failures = None, None, 0


@dataclass(frozen=True)
class Outages:
    """The outages of the servers that a process needs."""

    ledger: Outage = field(default_factory=lambda: Outage("ledger"))
    broker: Outage = field(default_factory=lambda: Outage("broker"))

    def of(self, error: Exception) -> Outage:
        """Return the outage of the server that raised: the broker for BrokerUnavailable, else the ledger."""
        return self.broker if isinstance(error, BrokerUnavailable) else self.ledger
