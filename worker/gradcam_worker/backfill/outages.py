"""Outages of the ledger and of the broker during a backfill: it keeps trying, and warns once of each."""

import time
from collections.abc import Callable
from typing import TypeVar

from gradcam_worker.errors import BrokerUnavailable, GradcamError, LedgerUnavailable

RETRY_AFTER_S = 1.0
T = TypeVar("T")


class OutageLog:
    """Warns when the ledger or the broker becomes unavailable, and when it answers again."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """`warn` is called when an outage begins and when it is over."""
        self._warn = warn
        self.unavailable: set[str] = set()  # error codes

    def call_ledger(self, step: Callable[[], T]) -> T | None:
        """Return the result of a step; None, after RETRY_AFTER_S, if the ledger is unavailable."""
        try:
            result = step()
        except LedgerUnavailable as error:
            self._began(error)
            time.sleep(RETRY_AFTER_S)
            return None
        self._ended(LedgerUnavailable, "The ledger")
        return result

    def call_broker(self, step: Callable[[], object]) -> None:
        """Call a step that publishes; if the broker is unavailable, the workers' reaper publishes later."""
        try:
            step()
        except BrokerUnavailable as error:
            self._began(error)
        else:
            self._ended(BrokerUnavailable, "The broker")

    def _began(self, error: GradcamError) -> None:
        if error.code not in self.unavailable:
            self._warn(f"{error} The backfill keeps trying.")
        self.unavailable.add(error.code)

    def _ended(self, kind: type[GradcamError], server: str) -> None:
        if kind.code in self.unavailable:
            self.unavailable.discard(kind.code)
            self._warn(f"{server} answers again.")
