"""Options of a run: the window, the rate, when to stop early, and what to run again."""

from collections import Counter
from dataclasses import dataclass

from gradcam_worker.backfill.progress import Progress

MIN_WINDOW = 4  # shards in flight, also while no worker is known
WINDOW_FACTOR = 2  # shards in flight for each that workers can run at a time
MIN_ROWS, MIN_SHARDS = 1000, 4  # done before the share of failures is judged; one of them suffices


@dataclass(frozen=True)
class RunOptions:
    """How a backfill is run."""

    window: int | None = None  # shards in flight; None: as many as keep the workers busy
    rate: float | None = None  # images submitted per second, at most
    max_failed: float = 0.5  # share of the rows: if more fail, the backfill is stopped
    only_failed: bool = False  # run shards with failed rows again
    changed: bool = False  # run shards again whose rows or weights have changed

    def max_in_flight(self, workers: int | None, shards_per_worker: int) -> int:
        """Return the maximal number of shards in flight."""
        return self.window or max((workers or 0) * shards_per_worker * WINDOW_FACTOR, MIN_WINDOW)

    def too_many_failed(self, progress: Progress, shards_ended: int) -> str | None:
        """Return why the backfill must be stopped, or None."""
        significant = progress.done >= MIN_ROWS or shards_ended >= MIN_SHARDS
        if not significant or progress.failed <= self.max_failed * progress.done:
            return None
        codes = ", ".join(f"{code} {count:,}" for code, count in Counter(progress.codes).most_common())
        share = f"{progress.failed:,} of {progress.done:,} rows have failed, more than {self.max_failed:.0%}"
        return f"{share}: {codes}."
