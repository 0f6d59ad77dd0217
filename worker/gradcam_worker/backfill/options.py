"""How a backfill is run: the window, the rate, when to stop early, and what to run again."""

from collections import Counter
from dataclasses import dataclass

from gradcam_worker.backfill.progress import Progress

MIN_WINDOW = 4  # shards in flight, where no worker is known
WINDOW_PER_SHARD = 2  # shards in flight for each that the workers can work on at once
ENOUGH_ROWS, ENOUGH_SHARDS = 1000, 4  # that have ended, before a share of failures means anything


@dataclass(frozen=True)
class RunOptions:
    """How a backfill is run."""

    window: int | None = None  # shards in flight; None: as many as keep the workers busy
    rate: float | None = None  # images a second that are submitted, at most
    max_failed: float = 0.5  # of the rows: where more fail, it is stopped
    only_failed: bool = False  # run again the shards of which rows failed
    changed: bool = False  # run again the shards whose rows or weights have changed

    def max_in_flight(self, workers: int | None, shards_per_worker: int) -> int:
        """How many shards may be in flight."""
        return self.window or max((workers or 0) * shards_per_worker * WINDOW_PER_SHARD, MIN_WINDOW)

    def too_many_failed(self, progress: Progress, shards_ended: int) -> str | None:
        """Why the backfill is to be stopped; None where it is not."""
        enough = progress.done >= ENOUGH_ROWS or shards_ended >= ENOUGH_SHARDS
        if not enough or progress.failed <= self.max_failed * progress.done:
            return None
        codes = ", ".join(f"{code} {count:,}" for code, count in Counter(progress.codes).most_common())
        share = f"{progress.failed:,} of {progress.done:,} rows have failed, more than {self.max_failed:.0%}"
        return f"{share}: {codes}."
