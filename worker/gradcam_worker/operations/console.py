"""What the commands show: tables, progress, JSON."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.classes import DATA, percent
from gradcam_worker.gradcam.models.weights import cached_at, where
from gradcam_worker.gradcam.models.weights import here as weights_here
from gradcam_worker.ledger.dead_letters import DeadLetter, ReplayResult
from gradcam_worker.ledger.outbox import DeadDelivery
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import ResultWarning, StatusDocument
from gradcam_worker.settings import Settings
from gradcam_worker.text import comma_lists
from gradcam_worker.text.urls import without_secrets
from gradcam_worker.text.visible import visible

COLORS = {
    "queued": "yellow",
    "running": "cyan",
    "retrying": "magenta",
    "succeeded": "green",
    "failed": "red",
    "expired": "red",
    "canceled": "red",
}
LETTER = "{:36}  {:9}  {:19}  {}"  # a line of 80 characters
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """For machines: one JSON document on standard output, nothing else."""
    print(json.dumps(value, indent=2))  # noqa: T201  # rich would wrap and color it


def comma_list(_: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...] | None:
    """What an option says that may be given more than once, each time a list with commas; None: nothing."""
    try:
        return tuple(name for text in texts for name in comma_lists.parse(text)) if texts else None
    except ValueError as error:
        raise click.BadParameter(str(error), param=option) from error


def table(*columns: str, title: str | None = None, numbers: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `numbers` are set flush right."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def plain(text: str, style: str = "") -> Text:
    """What a job, a file or a server said: no markup, and nothing that acts on a terminal."""
    return Text(visible(text), style)


def status_text(document: StatusDocument) -> Text:
    """The state in its colour, with its stage while it runs, and whether it is to stop."""
    stage = f" · {document.stage}" if document.stage else ""
    asked = " · cancel requested" if document.cancel_requested_at and not document.final else ""
    return Text(document.status + stage + asked, COLORS[document.status])


def time_text(seconds: float) -> str:
    """Seconds since the epoch -> 2031-05-06T07:08:09Z."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def age_s(seconds: float) -> float:
    """How long ago that was."""
    return time.time() - seconds


def span(seconds: float) -> str:
    """So long, for a person: 5 s, 3 min, 2 h or 4 d."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def ago(seconds: float) -> str:
    """How long ago that was, for a person."""
    return span(age_s(seconds)) + " ago"


def show(document: StatusDocument) -> None:
    """One status document, for a person."""
    out.print(_facts(document))
    if document.predictions:
        seen = table("rank", "id", "class", "probability", numbers=("rank", "id", "probability"))
        for one in document.predictions:
            seen.add_row(str(one.rank), str(one.id), plain(one.name), percent(one.probability))
        out.print()
        out.print(seen)


def _facts(document: StatusDocument) -> Table:
    """What is known about a job, a line each."""
    facts = table("", "")
    facts.show_header = False
    facts.add_row("job", document.id)
    facts.add_row("status", status_text(document))
    facts.add_row("attempt", f"{document.attempt} of {document.max_attempts}")
    for name, at in (("entered", document.created_at), ("ended", document.completed_at)):
        if at:
            facts.add_row(name, f"{time_text(at.timestamp())}, {ago(at.timestamp())}")
    if document.expires_at and not document.final:
        facts.add_row("expires", time_text(document.expires_at.timestamp()))
    if document.network:
        facts.add_row("network", plain(f"{document.network.name}, layer {document.network.layer}"))
    if document.metrics:
        spent = (f"{key.removesuffix('_s')} {value:g} s" for key, value in seconds(document).items())
        facts.add_row("time", ", ".join(spent))
    if document.result:
        facts.add_row("manifest", plain(document.result.manifest_uri))
    for warned in document.warnings:
        facts.add_row("warning", plain(warning_text(warned)))
    if document.error:
        facts.add_row("error", plain(f"{document.error.code}: {document.error.detail}", "red"))
    return facts


def warning_text(warned: ResultWarning) -> str:
    """A warning, for a person."""
    if warned.code == "zero_heatmap":
        return f"{warned.code}: nothing in the image speaks for class {warned.class_id}"
    if warned.missing is not None:
        return f"{warned.code}: {warned.missing:.1%} of the image is missing: {warned.detail}"
    return f"{warned.code}: {warned.detail}" if warned.detail else warned.code


def show_letters(found: Sequence[tuple[DeadLetter, Job | str]], total: int) -> None:
    """Dead letters, each with the job that its replay would be, or why it cannot be replayed."""
    if not found:
        out.print("No dead letters: no job has failed that nobody has replayed.")
        return
    out.print(LETTER.format("id", "failed", "code", "attempt"), style="bold")
    for letter, job in found:
        problem = letter.document.error if letter.document else None
        where = f"{problem.attempt}, {problem.stage}" if problem else ""
        line = LETTER.format(letter.id, ago(letter.failed_s), letter.code, where)
        detail = job if isinstance(job, str) else problem.detail if problem else ""
        out.print(plain(line, "dim" if isinstance(job, str) else ""), soft_wrap=True)
        out.print(plain("    " + short(detail, out.width - 4), "dim"), soft_wrap=True)
    _show_rest(len(found), total)


def show_prospect(job: Job | str) -> None:
    """What a replay would be."""
    said = f"Its replay would be job {job.id}." if isinstance(job, Job) else job
    out.print(visible(said), markup=False)
    out.print()


def show_replayed(one: ReplayResult) -> None:
    """What became of one."""
    out.print(visible(f"{one.id} -> {one.new_id or one.why}"), markup=False, soft_wrap=True)


def show_parked(parked: Sequence[DeadDelivery], total: int, gone: Sequence[str]) -> None:
    """Recipients that could not be told, and the URLs (without their secrets) that answered 410."""
    if parked:
        made = table("job", "parked", "recipient", "events", "first", numbers=("events",))
        made.columns[0].no_wrap = made.columns[1].no_wrap = True
        for one in parked:
            first = one.first.event if one.first else "forgotten"
            made.add_row(one.job_id, ago(one.since_s), plain(recipient_text(one)), str(one.events), first)
        out.print(made)
        _show_rest(len(parked), total)
    else:
        out.print("Nothing is parked: every webhook was told, or is still being tried.")
    for url in gone:
        out.print(visible(f"Gone, by its own word (410): {url}"), markup=False, style="dim")


def recipient_text(one: DeadDelivery) -> str:
    """A webhook's URL, without what may be secret in it; else its host, or the name of a sink."""
    return without_secrets(one.url) if one.url else one.destination.removeprefix("//")


def short(text: str, most: int) -> str:
    """Text, cut off where it is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def _show_rest(shown: int, total: int) -> None:
    if total > shown:
        out.print(f"... and {total - shown:,} more: --limit shows them.", style="dim")


def facts(row: NetworkRow, settings: Settings) -> dict[str, Any]:
    """One network, for machines. `here`: where its weights are on this machine, if they are."""
    path = where(row, settings.weights_dir)
    kept = "download" if path is None else "shipped" if path.parent == DATA else str(path)
    return {
        "name": row.name,
        "input_size": row.input_size,
        "layer": row.target_layer,
        "map_size": row.map_size,
        "preprocessing": row.preprocessing.name,
        "parameters": row.parameters,
        "weights": row.file.uri if row.file else kept,
        "sha256": row.file.sha256 if row.file else row.sha256,
        "here": str(place) if (place := here(row, settings)) else None,
    }


def here(row: NetworkRow, settings: Settings) -> Path | None:
    """Where a network's weights are on this machine; not yet checked."""
    if row.file:
        path = cached_at(row.file, settings.cache)
    else:
        return weights_here(row, settings.weights_dir, settings.keras_home)
    return path if path.is_file() else None


ORIGINS = {  # what the list says of weights, for short
    "download": "download: Keras fetches them when they are first asked for.",
    "keras": "keras: Keras has fetched them, to KERAS_HOME.",
    "s3": "s3, file: the operator's own; GRADCAM_NETWORKS says where they are.",
    "file": "s3, file: the operator's own; GRADCAM_NETWORKS says where they are.",
    "cached": "cached: the operator's own, in GRADCAM_CACHE_DIR.",
    "folder": "folder: they are in GRADCAM_WEIGHTS_DIR.",
}


def show_networks(rows: Iterable[NetworkRow], settings: Settings) -> None:
    """The networks that a job can name, for a person."""
    made = table("network", "input", "target layer", "map", "parameters", "weights", numbers=("parameters",))
    met = set()
    for row in rows:
        found = facts(row, settings)
        kept = str(found["weights"])
        if row.file:
            kept = "cached" if found["here"] else "s3" if kept.startswith("s3://") else "file"
        elif kept == "download":
            kept = "keras" if found["here"] else kept
        elif kept != "shipped":
            kept = "folder"
        met.add(kept)
        sizes = ["x".join(map(str, size)) if size else "" for size in (row.input_size, row.map_size)]
        layer = plain(row.target_layer) if row.target_layer else Text("found in its graph", "dim")
        millions = f"{row.parameters / 1e6:.1f} M" if row.parameters else ""
        made.add_row(row.name, sizes[0], layer, sizes[1], millions, kept)
    out.print(made)
    out.print()
    for note in dict.fromkeys(note for kept, note in ORIGINS.items() if kept in met):
        out.print(note, style="dim")


def seconds(document: StatusDocument) -> Mapping[str, float]:
    """The metrics that are times."""
    return {key: value for key, value in document.metrics.items() if key.endswith("_s")}
