"""The progress of a backfill: a bar on a terminal, plain lines in a log, JSON for programs."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar

from gradcam_worker.backfill.progress import Progress
from gradcam_worker.operations.dataset_recipe import recipe
from gradcam_worker.operations.terminal import console
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted, visible

UPDATE_INTERVALS_S = {"terminal": 0.25, "lines": 10.0, "json": 2.0, "none": math.inf}


class BackfillProgressBar:
    """Shows the progress of a backfill, at the interval that suits its form."""

    def __init__(self, form: str, total: Callable[[], int | None] = lambda: None) -> None:
        """Show nothing yet.

        Args:
            form: `terminal`, `lines`, `json` or `none`.
            total: Estimates the number of rows; None: not known.
        """
        self._form, self._total = form, total
        self._shown_s = -UPDATE_INTERVALS_S[form] if form != "none" else 0.0
        self._live = Live(console=console.err, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._form == "terminal":
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, progress: Progress) -> None:
        """Show the progress, if UPDATE_INTERVALS_S has passed since the last time."""
        now_s = time.monotonic()
        if now_s - self._shown_s < UPDATE_INTERVALS_S[self._form]:
            return
        self._shown_s = now_s
        if self._form == "terminal":
            self._live.update(self._bar(progress), refresh=True)
        elif self._form == "lines":
            console.err.print(self.text(progress), markup=False, soft_wrap=True)
        else:
            print_line("progress", self.facts(progress))

    def note(self, text: str) -> None:
        """Print a sentence for the operator."""
        console.err.print(visible(text), markup=False, soft_wrap=True)

    def total(self, progress: Progress) -> int | None:
        """Return the number of rows, exact once all of the input is read; None: not known."""
        if progress.whole:
            return progress.planned
        estimate = self._total()
        return estimate and max(estimate, progress.planned)

    def left_s(self, progress: Progress) -> float | None:
        """Estimate the remaining seconds at the present rate; None: not known."""
        total, rate = self.total(progress), progress.rows_per_s
        return max(total - progress.reached, 0) / rate if total is not None and rate else None

    def facts(self, progress: Progress) -> dict[str, Any]:
        """Return the progress as JSON, with `total` and `left_s`."""
        left_s = self.left_s(progress)
        return {
            **progress.facts(),
            "total": self.total(progress),
            "left_s": None if left_s is None else round(left_s),
        }

    def text(self, progress: Progress) -> str:
        """Return the progress as one line of text."""
        notes = ["no worker is alive: start one with `gradcam worker`"] if progress.workers == 0 else []
        notes += [visible(progress.trouble)] if progress.trouble else []
        if not progress.planned:
            return " · ".join(["No rows yet", *notes])
        total, left_s = self.total(progress), self.left_s(progress)
        accuracy = "" if progress.whole else "at least " if total is None else "about "
        parts = [f"{progress.reached:,} of {accuracy}{counted(total or progress.planned, 'row')}"]
        if progress.failed:
            parts.append(f"{progress.failed:,} failed")
        parts.append(f"{progress.rows_per_s:,.0f} rows/s")
        if left_s is not None:
            parts.append(f"{timedelta(seconds=round(left_s))} left")
        parts.append(f"{counted(progress.in_flight, 'shard')} in flight")
        return " · ".join([*parts, *notes])

    def _bar(self, progress: Progress) -> RenderableType:
        total = self.total(progress)
        bar = ProgressBar(total=total, completed=progress.reached, width=min(console.err.width, 60))
        return Group(console.plain(self.text(progress)), bar)


def print_line(event: str, facts: Mapping[str, Any]) -> None:
    """Print an event as one line of JSON."""
    console.print_json_line({"event": event, **facts})


def print_summary(summary: Mapping[str, Any], output: str, settings: Settings) -> None:
    """Print what dataset.json says, and how to open the dataset.

    Args:
        summary: The content of dataset.json.
        output: URI of the dataset.
        settings: Name the S3 server.
    """
    failed, rows = int(summary["failed"]), int(summary["rows"])
    title = "[green]Complete[/]" if rows > failed else "[red]Nothing is explained[/]"
    total = counted(rows, "row is", "rows are")
    console.out.print(f"{title}: {rows - failed:,} of {total} explained.")
    for code, count in Counter(summary["codes"]).most_common():
        console.out.print(f"  {count:>9,}  {code}", style="red")
    if failed:
        failures = f"{output}/{summary['failed_files'][0]}"
        console.out.print(visible(f"Reason of each failure: {failures}"), markup=False, soft_wrap=True)
    console.out.print(visible(f"Dataset: {output}"), markup=False, soft_wrap=True)
    console.out.print("Open it in Python, with one of the last three lines:")
    for line in recipe(output, settings):
        console.out.print(visible(line), markup=False, highlight=False, soft_wrap=True)
