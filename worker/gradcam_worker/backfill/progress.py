"""How a backfill is run, how far it is, how fast it goes, and what keeps it waiting."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gradcam_worker.errors import BrokerUnavailable, GradcamError, LedgerUnavailable

AGAIN_S = 1.0  # between two tries of what is away
LEAST_WINDOW = 4
PER_WORKER = 2  # shards in flight for each that a worker may have in hand
ENOUGH_ROWS, ENOUGH_SHARDS = 1000, 4  # finished, before a share of failures means anything
OVER_S = 30.0  # the last so many seconds say how fast it goes
T = TypeVar("T")


@dataclass(frozen=True)
class RunOptions:
    """How a backfill is run."""

    window: int | None = None  # shards in flight; None: as many as keep the workers busy
    rate: float | None = None  # images a second that are handed out, at most
    max_failed: float = 0.5  # of the rows: where more fail, it is stopped
    only_failed: bool = False  # run again the shards of which rows failed
    changed: bool = False  # run again the shards whose rows or weights have changed

    def most(self, workers: int | None, each: int) -> int:
        """How many shards may be in flight, where workers have `each` in hand."""
        return self.window or max((workers or 0) * each * PER_WORKER, LEAST_WINDOW)

    def hopeless(self, now: "Progress", shards: int) -> str | None:
        """Why there is no use in going on after so many shards, where there is none."""
        enough = now.done >= ENOUGH_ROWS or shards >= ENOUGH_SHARDS
        if not enough or now.failed <= self.max_failed * now.done:
            return None
        why = ", ".join(f"{code} {count:,}" for code, count in Counter(now.codes).most_common())
        return f"{now.failed:,} of {now.done:,} rows have failed, more than {self.max_failed:.0%}: {why}."


@dataclass(frozen=True)
class Progress:
    """How far a backfill is, in rows of its input where nothing else is said."""

    planned: int = 0  # rows read so far
    whole: bool = False  # there are no more
    before: int = 0  # of them were done before this run
    done: int = 0  # and so many in this one, well or not
    partly: int = 0  # and so many in shards that are being computed
    failed: int = 0  # in this run
    codes: Mapping[str, int] = field(default_factory=dict)  # why
    lost: int = 0  # shards that failed as a whole: their rows are missing
    in_flight: int = 0  # shards
    workers: int | None = None  # that live; None: not known
    rows_per_s: float = 0.0

    @property
    def reached(self) -> int:
        """How many rows have been done, whenever."""
        return self.before + self.done + self.partly

    def facts(self) -> dict[str, Any]:
        """For machines."""
        return {**vars(self), "codes": dict(self.codes)}


class RateMeter:
    """How fast a number has grown lately."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._past: deque[tuple[float, int]] = deque()  # when, how many

    def of(self, number: int) -> float:
        """It is this now: how many a second."""
        now_s = time.monotonic()
        self._past.append((now_s, number))
        while now_s - self._past[0][0] > OVER_S:
            self._past.popleft()
        then_s, then = self._past[0]
        return round(max(number - then, 0) / (now_s - then_s), 1) if now_s > then_s else 0.0


class OutageLog:
    """Of the ledger and of the broker, each told apart: they are tried again for ever, and said once."""

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

    def publishing(self, step: Callable[[], object]) -> None:
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
