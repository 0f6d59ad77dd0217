"""What is logged while a server is unreachable: at the start, every half minute, and at the end."""

import logging
import threading
import time
from dataclasses import dataclass, field

from gradcam_worker.errors import BrokerUnavailable

log = logging.getLogger("gradcam")

LOG_EVERY_S = 30.0
ENDED_AFTER_S = 3.0  # without a failure: several threads use a server, and not all of them fail at once


class Outage:
    """The failures of one server, whichever thread meets them."""

    def __init__(self, server: str) -> None:
        """`server` is its name in the log."""
        self._server = server
        self._lock = threading.Lock()
        self._begun_s: float | None = None
        self._logged_s = self._failed_s = 0.0
        self._failures = 0

    def failed(self, what: str) -> None:
        """The server could not be used.

        Args:
            what: could not be done, and why.
        """
        now_s = time.monotonic()
        with self._lock:
            self._failed_s = now_s
            self._failures += 1
            if self._begun_s is None:
                self._begun_s = self._logged_s = now_s
                log.warning("%s is unreachable: %s", self._server, what)
            elif now_s - self._logged_s >= LOG_EVERY_S:
                self._logged_s = now_s
                seconds = now_s - self._begun_s
                text = "%s is still unreachable: seconds=%.0f failures=%d: %s"
                log.warning(text, self._server, seconds, self._failures, what)
            else:
                log.debug("%s", what)

    def answered(self) -> None:
        """The server was used with success."""
        if self._begun_s is None:
            return
        now_s = time.monotonic()
        with self._lock:
            if self._begun_s is None or now_s - self._failed_s < ENDED_AFTER_S:
                return
            seconds = self._failed_s - self._begun_s
            text = "%s is reachable again: seconds=%.0f failures=%d"
            log.warning(text, self._server, seconds, self._failures)
            self._begun_s, self._failures = None, 0


@dataclass(frozen=True)
class Outages:
    """The servers that a process needs."""

    ledger: Outage = field(default_factory=lambda: Outage("the ledger"))
    broker: Outage = field(default_factory=lambda: Outage("the broker"))

    def of(self, error: Exception) -> Outage:
        """The server that an error is about: the broker for BrokerUnavailable, else the ledger."""
        return self.broker if isinstance(error, BrokerUnavailable) else self.ledger
