"""How far a backfill is: a line that changes on a terminal, plain lines in a log, JSON for programs."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar

from gradcam_worker.backfill.progress import Progress
from gradcam_worker.operations import console
from gradcam_worker.schemas.shard import Row
from gradcam_worker.text.visible import counted, visible

EVERY_S = {"terminal": 0.25, "lines": 10.0, "json": 2.0}


class Source(Protocol):
    """See `gradcam_worker.backfill.inputs.open.Input`."""

    def rows(self) -> Iterator[Row]:
        """Its rows."""
        ...

    def share(self) -> float | None:
        """How much of it has been read."""
        ...


class Counted:
    """An input whose rows are counted while they are read."""

    def __init__(self, source: Source) -> None:
        """None so far."""
        self._source, self._given = source, 0

    def rows(self) -> Iterator[Row]:
        """Its rows."""
        for self._given, row in enumerate(self._source.rows(), 1):  # noqa: B020  # that is how they are counted
            yield row

    def total(self) -> int | None:
        """About how many there are, as far as that can be told."""
        share = self._source.share()
        return round(self._given / share) if share and self._given else None


class BackfillProgressBar:
    """Shows a `BackfillProgressBar`, as often as is right for who looks."""

    def __init__(self, form: str, total: Callable[[], int | None] = lambda: None) -> None:
        """`form` is terminal, lines or json; `total` says about how many rows there are, if it can."""
        self._form, self._total = form, total
        self._shown_s = -EVERY_S[form]
        self._live = Live(console=console.err, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._form == "terminal":
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, standing: Progress) -> None:
        """Show it, where it is time to."""
        now_s = time.monotonic()
        if now_s - self._shown_s < EVERY_S[self._form]:
            return
        self._shown_s = now_s
        if self._form == "terminal":
            self._live.update(self._picture(standing), refresh=True)
        elif self._form == "lines":
            console.err.print(self.text(standing), markup=False, soft_wrap=True)
        else:
            print_line("progress", self.facts(standing))

    def say(self, text: str) -> None:
        """What somebody should know."""
        console.err.print(visible(text), markup=False, soft_wrap=True)

    def total(self, standing: Progress) -> int | None:
        """About how many rows there are, if that can be told."""
        about = None if standing.whole else self._total()
        return standing.planned if standing.whole else about and max(about, standing.planned)

    def left_s(self, standing: Progress) -> float | None:
        """For how long it goes on, as it looks."""
        total, rate = self.total(standing), standing.rows_per_s
        return max(total - standing.reached, 0) / rate if total is not None and rate else None

    def facts(self, standing: Progress) -> dict[str, Any]:
        """For machines."""
        left_s = self.left_s(standing)
        return {
            **standing.facts(),
            "total": self.total(standing),
            "left_s": None if left_s is None else round(left_s),
        }

    def text(self, standing: Progress) -> str:
        """One line, for a person."""
        nobody = ["no worker lives: start one with `gradcam worker`"] if standing.workers == 0 else []
        if not standing.planned:
            return " · ".join(["No rows yet", *nobody])
        total, left_s = self.total(standing), self.left_s(standing)
        how = "" if standing.whole else "at least " if total is None else "about "
        said = [f"{standing.reached:,} of {how}{counted(total or standing.planned, 'row')}"]
        if standing.failed:
            said.append(f"{standing.failed:,} failed")
        said.append(f"{standing.rows_per_s:,.0f} rows/s")
        if left_s is not None:
            said.append(f"{timedelta(seconds=round(left_s))} left")
        said.append(f"{counted(standing.in_flight, 'shard')} in flight")
        return " · ".join([*said, *nobody])

    def _picture(self, standing: Progress) -> RenderableType:
        total = self.total(standing)
        bar = ProgressBar(total=total, completed=standing.reached, width=min(console.err.width, 60))
        return Group(console.plain(self.text(standing)), bar)


def print_line(event: str, facts: Mapping[str, Any]) -> None:
    """For machines: one JSON document, one line."""
    print(json.dumps({"event": event, **facts}), flush=True)  # noqa: T201  # rich would wrap and color it


def summary(seal: Mapping[str, Any], output: str) -> None:
    """What has become of it all, for a person."""
    failed, rows = int(seal["failed"]), int(seal["rows"])
    title = "[green]Complete[/]" if rows > failed else "[red]Nothing is explained[/]"
    of = counted(rows, "row is", "rows are")
    console.out.print(f"{title}: {rows - failed:,} of {of} explained.")
    for code, count in sorted(seal["codes"].items(), key=lambda one: -one[1]):
        console.out.print(f"  {count:>9,}  {code}", style="red")
    if failed:
        where = f"{output}/{seal['failed_files'][0]}"
        console.out.print(visible(f"Why each of them failed: {where}"), markup=False, soft_wrap=True)
    console.out.print(visible(f"Dataset: {output}"), markup=False, soft_wrap=True)
    place = output.removeprefix("file://")
    opened = f'polars.read_parquet("{place}/data/*.parquet")'
    console.out.print(visible(f"Open it, in Python: {opened}"), markup=False, soft_wrap=True)
