"""What is said of a server that is away: a line when it begins, one every half minute, and one at its end."""

import logging
import threading
import time
from dataclasses import dataclass, field

from gradcam_worker.errors import BrokerUnavailable

log = logging.getLogger("gradcam")

SAY_EVERY_S = 30.0
CALM_S = 3.0  # without a failure, before it is over: several ask, and not all of them fail at once


class Outage:
    """The failures of one server, whichever thread meets them."""

    def __init__(self, server: str) -> None:
        """`server` is how it is called in the log."""
        self._server = server
        self._door = threading.Lock()
        self._begun_s: float | None = None
        self._said_s = self._failed_s = 0.0
        self._failures = 0

    def failed(self, what: str) -> None:
        """Something could not be done: `what`, and why."""
        now_s = time.monotonic()
        with self._door:
            self._failed_s = now_s
            self._failures += 1
            if self._begun_s is None:
                self._begun_s = self._said_s = now_s
                log.warning("%s is away: %s", self._server, what)
            elif now_s - self._said_s >= SAY_EVERY_S:
                self._said_s = now_s
                away_s = now_s - self._begun_s
                said = "%s is still away: seconds=%.0f failures=%d: %s"
                log.warning(said, self._server, away_s, self._failures, what)
            else:
                log.debug("%s", what)

    def answered(self) -> None:
        """It does what it is asked for."""
        if self._begun_s is None:
            return
        now_s = time.monotonic()
        with self._door:
            if self._begun_s is None or now_s - self._failed_s < CALM_S:
                return
            away_s = self._failed_s - self._begun_s
            log.warning("%s is back: seconds=%.0f failures=%d", self._server, away_s, self._failures)
            self._begun_s, self._failures = None, 0


@dataclass(frozen=True)
class Outages:
    """Those that a process meets."""

    ledger: Outage = field(default_factory=lambda: Outage("the ledger"))
    broker: Outage = field(default_factory=lambda: Outage("the broker"))

    def of(self, error: Exception) -> Outage:
        """Whose an error is."""
        return self.broker if isinstance(error, BrokerUnavailable) else self.ledger
