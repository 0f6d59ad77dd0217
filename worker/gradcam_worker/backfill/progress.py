"""The progress of a backfill, and its speed."""

import json
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

RATE_WINDOW_S = 30.0


@dataclass(frozen=True)
class Progress:
    """The progress of a backfill, in rows of its input unless a field says otherwise.

    The names of the fields are keys of the JSON that `gradcam backfill --json` prints.
    """

    planned: int = 0  # rows read so far
    whole: bool = False  # the input has been read completely
    before: int = 0  # of `planned`, done before this run
    done: int = 0  # in this run, failed or not
    reused: int = 0  # of `done`: taken over from rows that were done, not computed
    partly: int = 0  # explained in shards that have not ended; not in `done`
    failed: int = 0  # in this run
    codes: Mapping[str, int] = field(default_factory=dict)  # rows that failed, by error code
    warnings: Mapping[str, int] = field(default_factory=dict)  # explained rows, by code
    lost: int = 0  # shards that failed as a whole: the dataset lacks their rows
    in_flight: int = 0  # shards
    workers: int | None = None  # alive; None: unknown
    trouble: str | None = None  # why workers take no work, if any do not
    rows_per_s: float = 0.0

    @property
    def reached(self) -> int:
        """The number of rows done, in all runs."""
        return self.before + self.done + self.partly

    def facts(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return {**vars(self), "codes": dict(self.codes), "warnings": dict(self.warnings)}


def describe_trouble(health: Iterable[str]) -> str | None:
    """Return which workers take no work, and why the first of them does not; None: all do.

    Args:
        health: The health of each worker, as JSON: see `Ledger.find_workers`.
    """
    told = [*map(_trouble, health)]
    troubles = [one for one in told if one]
    if not troubles:
        return None
    few = f"{len(troubles)} of {len(told)} workers {'takes' if len(troubles) == 1 else 'take'} no work"
    return f"{'no worker takes work' if len(troubles) == len(told) else few}: {troubles[0].rstrip('.')}"


def _trouble(health: str) -> str | None:
    try:
        told = json.loads(health)
    except ValueError:  # of a later version
        return None
    return str(told.get("trouble") or "") or None if isinstance(told, dict) else None


class RateMeter:
    """Measures how fast a number grows, over the last RATE_WINDOW_S."""

    def __init__(self) -> None:
        """Start without values."""
        self._values: deque[tuple[float, int]] = deque()  # when, and the number then

    def update(self, number: int) -> float:
        """Record the current number; return its growth per second."""
        now_s = time.monotonic()
        self._values.append((now_s, number))
        while now_s - self._values[0][0] > RATE_WINDOW_S:
            self._values.popleft()
        then_s, then = self._values[0]
        return round(max(number - then, 0) / (now_s - then_s), 1) if now_s > then_s else 0.0
