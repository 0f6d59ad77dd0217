"""How far a backfill is, and how fast it goes."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RATE_OVER_S = 30.0  # the last so many seconds say how fast it goes


@dataclass(frozen=True)
class Progress:
    """How far a backfill is, in rows of its input where nothing else is said.

    The names of the fields are keys of the JSON that `gradcam backfill --json` prints.
    """

    planned: int = 0  # rows read so far
    whole: bool = False  # the input has been read to its end
    before: int = 0  # of `planned`, done before this run
    done: int = 0  # and in this run, failed or not
    partly: int = 0  # and explained in shards that have not ended
    failed: int = 0  # in this run
    codes: Mapping[str, int] = field(default_factory=dict)  # rows that failed, by error code
    lost: int = 0  # shards that failed as a whole: their rows are missing
    in_flight: int = 0  # shards
    workers: int | None = None  # that are alive; None: not known
    rows_per_s: float = 0.0

    @property
    def reached(self) -> int:
        """How many rows have been done, in any run."""
        return self.before + self.done + self.partly

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "codes": dict(self.codes)}


class RateMeter:
    """How fast a number has grown over the last RATE_OVER_S."""

    def __init__(self) -> None:
        """No value yet."""
        self._values: deque[tuple[float, int]] = deque()  # when, and the number then

    def update(self, number: int) -> float:
        """Note what the number is now; by how much it has grown, a second."""
        now_s = time.monotonic()
        self._values.append((now_s, number))
        while now_s - self._values[0][0] > RATE_OVER_S:
            self._values.popleft()
        then_s, then = self._values[0]
        return round(max(number - then, 0) / (now_s - then_s), 1) if now_s > then_s else 0.0
