"""What is away for a while is tried again for ever, and said once."""

import time
from collections.abc import Callable
from typing import TypeVar

from worker.errors import BrokerUnavailable, GradcamError, LedgerUnavailable

AGAIN_S = 1.0  # between two tries
T = TypeVar("T")


class Outages:
    """Of the ledger and of the broker, each told apart."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` is told when one begins and when it is over."""
        self._say = say
        self.away: set[str] = set()  # codes of what is

    def asking(self, step: Callable[[], T]) -> T | None:
        """What a step gives that asks the ledger; None where it is away, after a little while."""
        try:
            found = step()
        except LedgerUnavailable as error:
            self._began(error)
            time.sleep(AGAIN_S)
            return None
        self._ended(LedgerUnavailable, "The ledger")
        return found

    def ringing(self, step: Callable[[], object]) -> None:
        """Take a step that the workers' reaper takes too, where the broker is away."""
        try:
            step()
        except BrokerUnavailable as error:
            self._began(error)
        else:
            self._ended(BrokerUnavailable, "The broker")

    def _began(self, error: GradcamError) -> None:
        if error.code not in self.away:
            self._say(f"{error} The backfill keeps trying.")
        self.away.add(error.code)

    def _ended(self, kind: type[GradcamError], what: str) -> None:
        if kind.code in self.away:
            self.away.discard(kind.code)
            self._say(f"{what} answers again.")
