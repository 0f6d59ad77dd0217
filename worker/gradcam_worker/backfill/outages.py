"""Outages of the ledger and of the broker during a backfill: it keeps trying, and warns again and again."""

import time
from collections.abc import Callable
from typing import TypeVar

from gradcam_worker.errors import BrokerUnavailable, GradcamError, LedgerUnavailable
from gradcam_worker.resilience.outages import LOG_INTERVAL_S

RETRY_AFTER_S = 1.0
T = TypeVar("T")


class OutageLog:
    """Warns when ledger or broker become unavailable, every half minute, and when they answer again."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """`warn` is called with sentences for the operator."""
        self._warn = warn
        self._since_s: dict[str, float] = {}  # by error code
        self._warned_s: dict[str, float] = {}

    @property
    def unavailable(self) -> bool:
        """Whether the ledger or the broker is unavailable."""
        return bool(self._since_s)

    def call_ledger(self, step: Callable[[], T]) -> T | None:
        """Return the result of a step; None, after RETRY_AFTER_S, if the ledger is unavailable."""
        try:
            result = step()
        except LedgerUnavailable as error:
            self._failed(error)
            time.sleep(RETRY_AFTER_S)
            return None
        self._ended(LedgerUnavailable, "The ledger")
        return result

    def call_broker(self, step: Callable[[], object]) -> None:
        """Call a step that publishes; if the broker is unavailable, the workers' reaper publishes later."""
        try:
            step()
        except BrokerUnavailable as error:
            self._failed(error)
        else:
            self._ended(BrokerUnavailable, "The broker")

    def _failed(self, error: GradcamError) -> None:
        now_s = time.monotonic()
        since_s = self._since_s.get(error.code)
        if since_s is None:
            self._since_s[error.code] = now_s
            self._warn(f"{error} The backfill keeps trying.")
        elif now_s - self._warned_s[error.code] >= LOG_INTERVAL_S:
            self._warn(f"{error} The backfill has kept trying for {now_s - since_s:.0f} s.")
        else:
            return
        self._warned_s[error.code] = now_s

    def _ended(self, kind: type[GradcamError], server: str) -> None:
        since_s = self._since_s.pop(kind.code, None)
        if since_s is not None:
            self._warn(f"{server} answers again, after {time.monotonic() - since_s:.0f} s.")
