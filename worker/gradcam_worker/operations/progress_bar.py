"""Shows how far a backfill is: a bar on a terminal, plain lines in a log, JSON for programs."""

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
from gradcam_worker.settings import PREFIX as SETTING
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets
from gradcam_worker.text.visible import counted, visible

SHOW_EVERY_S = {"terminal": 0.25, "lines": 10.0, "json": 2.0}


class Input(Protocol):
    """See `gradcam_worker.backfill.inputs.open.Input`."""

    def rows(self) -> Iterator[Row]:
        """Its rows."""
        ...

    def share(self) -> float | None:
        """How much of it has been read."""
        ...


class CountedInput:
    """An input whose rows are counted while they are read."""

    def __init__(self, source: Input) -> None:
        """Nothing is read yet."""
        self._input, self._count = source, 0

    def rows(self) -> Iterator[Row]:
        """Its rows."""
        for self._count, row in enumerate(self._input.rows(), 1):  # noqa: B020  # that is how they are counted
            yield row

    def total(self) -> int | None:
        """About how many there are; None where that is not known."""
        share = self._input.share()
        return round(self._count / share) if share and self._count else None


class BackfillProgressBar:
    """Shows how far a backfill is, as often as is right for its form."""

    def __init__(self, form: str, total: Callable[[], int | None] = lambda: None) -> None:
        """`form` is terminal, lines or json; `total` returns about how many rows there are."""
        self._form, self._total = form, total
        self._shown_s = -SHOW_EVERY_S[form]
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
        """Show it, if SHOW_EVERY_S has passed."""
        now_s = time.monotonic()
        if now_s - self._shown_s < SHOW_EVERY_S[self._form]:
            return
        self._shown_s = now_s
        if self._form == "terminal":
            self._live.update(self._bar(progress), refresh=True)
        elif self._form == "lines":
            console.err.print(self.text(progress), markup=False, soft_wrap=True)
        else:
            print_line("progress", self.facts(progress))

    def note(self, text: str) -> None:
        """Print what an operator should know."""
        console.err.print(visible(text), markup=False, soft_wrap=True)

    def total(self, progress: Progress) -> int | None:
        """About how many rows there are; None where that is not known."""
        about = None if progress.whole else self._total()
        return progress.planned if progress.whole else about and max(about, progress.planned)

    def left_s(self, progress: Progress) -> float | None:
        """How many seconds are left, at the present rate."""
        total, rate = self.total(progress), progress.rows_per_s
        return max(total - progress.reached, 0) / rate if total is not None and rate else None

    def facts(self, progress: Progress) -> dict[str, Any]:
        """As JSON."""
        left_s = self.left_s(progress)
        return {
            **progress.facts(),
            "total": self.total(progress),
            "left_s": None if left_s is None else round(left_s),
        }

    def text(self, progress: Progress) -> str:
        """One line, for a person."""
        nobody = ["no worker lives: start one with `gradcam worker`"] if progress.workers == 0 else []
        if not progress.planned:
            return " · ".join(["No rows yet", *nobody])
        total, left_s = self.total(progress), self.left_s(progress)
        how = "" if progress.whole else "at least " if total is None else "about "
        said = [f"{progress.reached:,} of {how}{counted(total or progress.planned, 'row')}"]
        if progress.failed:
            said.append(f"{progress.failed:,} failed")
        said.append(f"{progress.rows_per_s:,.0f} rows/s")
        if left_s is not None:
            said.append(f"{timedelta(seconds=round(left_s))} left")
        said.append(f"{counted(progress.in_flight, 'shard')} in flight")
        return " · ".join([*said, *nobody])

    def _bar(self, progress: Progress) -> RenderableType:
        total = self.total(progress)
        bar = ProgressBar(total=total, completed=progress.reached, width=min(console.err.width, 60))
        return Group(console.plain(self.text(progress)), bar)


def print_line(event: str, facts: Mapping[str, Any]) -> None:
    """For machines: one JSON document, one line."""
    print(json.dumps({"event": event, **facts}), flush=True)  # noqa: T201  # rich would wrap and color it


def print_summary(summary: Mapping[str, Any], output: str, settings: Settings) -> None:
    """Print the content of dataset.json, for a person, and how to open the dataset."""
    failed, rows = int(summary["failed"]), int(summary["rows"])
    title = "[green]Complete[/]" if rows > failed else "[red]Nothing is explained[/]"
    of = counted(rows, "row is", "rows are")
    console.out.print(f"{title}: {rows - failed:,} of {of} explained.")
    for code, count in sorted(summary["codes"].items(), key=lambda one: -one[1]):
        console.out.print(f"  {count:>9,}  {code}", style="red")
    if failed:
        where = f"{output}/{summary['failed_files'][0]}"
        console.out.print(visible(f"Why each of them failed: {where}"), markup=False, soft_wrap=True)
    console.out.print(visible(f"Dataset: {output}"), markup=False, soft_wrap=True)
    opened = opening(output, settings)
    console.out.print(visible(f"Open it, in Python: {opened}"), markup=False, soft_wrap=True)


def opening(output: str, settings: Settings) -> str:
    """The expression that opens a dataset with Polars, at the server and with the keys of the settings.

    It names the environment variables that hold keys, and never a key.
    """
    options = {}
    if output.startswith("s3://"):
        if settings.s3_endpoint_url:
            options["aws_endpoint_url"] = f'"{without_secrets(settings.s3_endpoint_url)}"'
        if settings.s3_endpoint_url.startswith("http://"):
            options["aws_allow_http"] = '"true"'
        if settings.s3_region:
            options["aws_region"] = f'"{settings.s3_region}"'
        if settings.s3_access_key_id:
            for name in ("access_key_id", "secret_access_key"):
                options[f"aws_{name}"] = f'os.environ["{SETTING}S3_{name.upper()}"]'
    told = ", ".join(f'"{name}": {value}' for name, value in options.items())
    place = output.removeprefix("file://")
    more = f", storage_options={{{told}}}" if told else ""
    return f'polars.read_parquet("{place}/data/*.parquet"{more})'
