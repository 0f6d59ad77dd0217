"""How a backfill is run, how far it is, and how fast it goes."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OVER_S = 30.0  # the last so many seconds say how fast it goes


@dataclass(frozen=True)
class Pace:
    """How a backfill is run."""

    window: int | None = None  # shards in flight; None: as many as keep the workers busy
    rate: float | None = None  # images a second that are handed out, at most
    max_failed: float = 0.5  # of the rows: where more fail, it is stopped
    only_failed: bool = False  # run again the shards of which rows failed
    changed: bool = False  # run again the shards whose rows or weights have changed


@dataclass(frozen=True)
class Standing:
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


class Speed:
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
