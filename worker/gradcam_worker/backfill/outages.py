"""Outages of the ledger and of the broker during a backfill: it keeps trying, and warns again and again."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.resilience.outages import Outage

RETRY_AFTER_S = 1.0
T = TypeVar("T")


@dataclass(frozen=True)
class OutageSentences:
    """Tells outages to an operator: see `gradcam_worker.resilience.outages.OutageReport`."""

    warn: Callable[[str], None]

    def began(self, server: str, reason: str) -> None:  # noqa: ARG002  # the reason names it
        """See `OutageReport.began`."""
        self.warn(f"{reason} The backfill keeps trying.")

    def lasts(self, server: str, reason: str, outage_s: float, failures: int) -> None:  # noqa: ARG002  # as above
        """See `OutageReport.lasts`."""
        self.warn(f"{reason} The backfill has kept trying for {outage_s:.0f} s.")

    def ended(self, server: str, outage_s: float, failures: int) -> None:  # noqa: ARG002  # each was a second
        """See `OutageReport.ended`."""
        self.warn(f"The {server} answers again, after {outage_s:.0f} s.")


class PatientCalls:
    """Calls of the one thread that runs a backfill: an outage ends with the first answer."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """`warn` is called with sentences for the operator."""
        report = OutageSentences(warn)
        self._ledger = Outage("ledger", recovered_after_s=0, report=report)
        self._broker = Outage("broker", recovered_after_s=0, report=report)

    @property
    def unavailable(self) -> bool:
        """Whether the ledger or the broker is unavailable."""
        return self._ledger.ongoing or self._broker.ongoing

    def call_ledger(self, step: Callable[[], T]) -> T | None:
        """Return the result of a step; None, after RETRY_AFTER_S, if the ledger is unavailable."""
        try:
            result = step()
        except LedgerUnavailable as error:
            self._ledger.failed(str(error))
            time.sleep(RETRY_AFTER_S)
            return None
        self._ledger.answered()
        return result

    def call_broker(self, step: Callable[[], object]) -> None:
        """Call a step that publishes; if the broker is unavailable, the workers' reaper publishes later."""
        try:
            step()
        except BrokerUnavailable as error:
            self._broker.failed(str(error))
        else:
            self._broker.answered()
