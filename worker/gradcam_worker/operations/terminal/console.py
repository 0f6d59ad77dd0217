"""What the commands print: tables and sentences for people, JSON for programs."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradcam_worker.gateway.access.api_keys import MARK, ApiKey
from gradcam_worker.gateway.access.tenants import TenantPolicy
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.classes import DATA, percent
from gradcam_worker.gradcam.files import weights
from gradcam_worker.gradcam.sizing import DEFAULT_SIZING
from gradcam_worker.ledger.dead_letters import DeadLetter, ReplayResult
from gradcam_worker.ledger.ledger import UsageDay
from gradcam_worker.ledger.outbox import DeadDelivery
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import ResultWarning, StatusDocument
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets
from gradcam_worker.text.visible import visible

STATUS_COLORS = {
    "queued": "yellow",
    "running": "cyan",
    "retrying": "magenta",
    "succeeded": "green",
    "failed": "red",
    "expired": "red",
    "canceled": "red",
}
DEAD_LETTER_LINE = "{:36}  {:9}  {:19}  {}"  # 80 characters wide
LOG_LINES = 6  # of a process that has ended
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print a value as one JSON document on standard output."""
    print(json.dumps(value, indent=2))  # noqa: T201  # rich would wrap and color it


def print_json_line(value: Any) -> None:
    """Print a value as one line of JSON on standard output, at once."""
    print(json.dumps(value), flush=True)  # noqa: T201  # rich would wrap and color it


def table(*columns: str, title: str | None = None, numbers: Sequence[str] = ()) -> Table:
    """Make an empty table; the columns named in `numbers` are right-aligned, and keep their width."""
    empty = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        is_number = column in numbers
        justify: Literal["right", "left"] = "right" if is_number else "left"
        empty.add_column(column, justify=justify, overflow="fold", no_wrap=is_number)
    return empty


def plain(text: str, style: str = "") -> Text:
    """Make text from a job, a file or a server safe to print: no markup, no control characters."""
    return Text(visible(text), style)


def status_text(document: StatusDocument) -> Text:
    """The status in its colour, with stage and passes of a running job, and whether it is to be cancelled."""
    stage = f" · {document.stage}" if document.stage else ""
    if document.stage and document.passes:
        stage += f", {document.passes.done} of {document.passes.total} passes"
    cancel = " · cancel requested" if document.cancel_requested_at and not document.final else ""
    return Text(document.status + stage + cancel, STATUS_COLORS[document.status])


def time_text(epoch_s: float) -> str:
    """Format seconds since the epoch as 2031-05-06T07:08:09Z."""
    return f"{datetime.fromtimestamp(epoch_s, UTC):%Y-%m-%dT%H:%M:%SZ}"


def age_s(epoch_s: float) -> float:
    """Seconds from `epoch_s`, seconds since the epoch, until now."""
    return time.time() - epoch_s


def duration_text(seconds: float) -> str:
    """Format a duration in its largest unit: 5 s, 3 min, 2 h or 4 d."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def age_text(epoch_s: float) -> str:
    """Format an age: 3 min ago."""
    return duration_text(age_s(epoch_s)) + " ago"


def show_status(document: StatusDocument) -> None:
    """Print one status document."""
    out.print(_status_table(document))
    if document.predictions:
        predictions = table("rank", "id", "class", "probability", numbers=("rank", "id", "probability"))
        for prediction in document.predictions:
            name, probability = plain(prediction.name), percent(prediction.probability)
            predictions.add_row(str(prediction.rank), str(prediction.id), name, probability)
        out.print()
        out.print(predictions)


def _status_table(document: StatusDocument) -> Table:
    facts = table("", "")
    facts.show_header = False
    facts.add_row("job", document.id)
    facts.add_row("status", status_text(document))
    facts.add_row("attempt", f"{document.attempt} of {document.max_attempts}")
    for name, at in (("submitted", document.created_at), ("finished", document.completed_at)):
        if at:
            facts.add_row(name, f"{time_text(at.timestamp())}, {age_text(at.timestamp())}")
    if document.expires_at and not document.final:
        facts.add_row("expires", time_text(document.expires_at.timestamp()))
    if document.network:
        facts.add_row("network", plain(f"{document.network.name}, layer {document.network.layer}"))
    if document.metrics:
        times = (f"{key.removesuffix('_s')} {value:g} s" for key, value in durations(document).items())
        facts.add_row("time", ", ".join(times))
    if document.result:
        facts.add_row("manifest", plain(document.result.manifest_uri))
    for warning in document.warnings:
        facts.add_row("warning", plain(warning_text(warning)))
    if document.error:
        facts.add_row("error", plain(f"{document.error.code}: {document.error.detail}", "red"))
    return facts


def warning_text(warning: ResultWarning) -> str:
    """One line about a warning."""
    if warning.code == "zero_heatmap":
        return f"{warning.code}: nothing in the image is evidence for class {warning.class_id}"
    if warning.missing is not None:
        return f"{warning.code}: {warning.missing:.1%} of the image is missing: {warning.detail}"
    if warning.code == "incomplete_attributions":
        return f"{warning.code}: class {warning.class_id}: {warning.detail}"
    return f"{warning.code}: {warning.detail}" if warning.detail else warning.code


def show_letters(previews: Sequence[tuple[DeadLetter, Job | str]], total: int) -> None:
    """Print dead letters.

    Args:
        previews: Each dead letter, with the job that its replay would be, or why it cannot be replayed.
        total: Number of dead letters, of which `previews` may be a part.
    """
    if not previews:
        out.print("No dead letters: no failed job is waiting to be replayed.")
        return
    out.print(DEAD_LETTER_LINE.format("id", "failed", "code", "attempt"), style="bold")
    for letter, job in previews:
        problem = letter.document.error if letter.document else None
        attempt = f"{problem.attempt}, {problem.stage}" if problem else ""
        line = DEAD_LETTER_LINE.format(letter.id, age_text(letter.failed_s), letter.code, attempt)
        detail = job if isinstance(job, str) else problem.detail if problem else ""
        out.print(plain(line, "dim" if isinstance(job, str) else ""), soft_wrap=True)
        out.print(plain("    " + truncate(detail, out.width - 4), "dim"), soft_wrap=True)
    _show_rest(len(previews), total)


def show_tenants(usage: Mapping[TenantPolicy, Sequence[UsageDay]], days: int) -> None:
    """Print tenants.

    Args:
        usage: Each tenant, and what it has used on each of some days.
        days: The number of days.
    """
    if not usage:
        out.print("There are no tenants: `gradcam tenants set NAME` makes one.")
        return
    numbers = ("share", f"jobs, {days} d", "device", "jobs a day", "rate")
    rows = table("tenant", *numbers, "scopes", numbers=numbers)
    for policy, used in usage.items():
        rows.add_row(
            plain(policy.name),
            f"{policy.share:g}",
            f"{sum(day.jobs for day in used):,}",
            f"{sum(day.device_s for day in used):,.1f} s",
            f"{policy.jobs_per_day:,}" if policy.jobs_per_day else "any",
            f"{policy.rate:g}/s",
            " ".join(policy.scopes),
        )
    out.print(rows)


def show_api_keys(records: Sequence[ApiKey]) -> None:
    """Print the records of API keys."""
    if not records:
        out.print("There are no keys: `gradcam keys create TENANT` makes one.")
        return
    now = datetime.now(UTC)
    rows = table("key", "tenant", "scopes", "made", "state", "note")
    for record in records:
        until = f"until {record.expires_at:%Y-%m-%d}" if record.expires_at else "valid"
        problem = record.problem(now)
        rows.add_row(
            plain(f"{MARK}_{record.prefix}"),
            plain(record.tenant),
            " ".join(record.scopes),
            f"{record.created_at:%Y-%m-%d}",
            Text(problem or until, "red" if problem else "green"),
            plain(record.note),
        )
    out.print(rows)


def show_replay_preview(job: Job | str) -> None:
    """Print which job a replay would be, or why a dead letter cannot be replayed."""
    preview = f"Its replay would be job {job.id}." if isinstance(job, Job) else job
    out.print(visible(preview), markup=False)
    out.print()


def show_replay_result(result: ReplayResult) -> None:
    """Print the id of a failed job, and its replay's id or why it was not replayed."""
    out.print(visible(f"{result.id} -> {result.new_id or result.why}"), markup=False, soft_wrap=True)


def show_parked(parked: Sequence[DeadDelivery], total: int, disabled_urls: Sequence[str]) -> None:
    """Print recipients with undelivered events.

    Args:
        parked: The recipients.
        total: Number of recipients, of which `parked` may be a part.
        disabled_urls: URLs that answered 410 (Gone), without their secrets.
    """
    if parked:
        recipients = table("job", "parked", "recipient", "events", "first", numbers=("events",))
        recipients.columns[0].no_wrap = recipients.columns[1].no_wrap = True
        for delivery in parked:
            first = delivery.first.event if delivery.first else "expired"
            recipient = plain(recipient_text(delivery))
            age = age_text(delivery.since_s)
            recipients.add_row(delivery.job_id, age, recipient, str(delivery.events), first)
        out.print(recipients)
        _show_rest(len(parked), total)
    else:
        out.print("Nothing is parked: no delivery has been given up.")
    for url in disabled_urls:
        out.print(visible(f"Disabled, because it answered 410 (Gone): {url}"), markup=False, style="dim")


def recipient_text(delivery: DeadDelivery) -> str:
    """A webhook's URL without secrets; if it is not known, its host; for a sink its name."""
    return without_secrets(delivery.url) if delivery.url else delivery.destination.removeprefix("//")


def truncate(text: str, max_characters: int) -> str:
    """Cut text that is longer than `max_characters`."""
    return text if len(text) <= max_characters else text[: max_characters - 3] + "..."


def _show_rest(shown: int, total: int) -> None:
    if total > shown:
        out.print(f"... and {total - shown:,} more: --limit shows them.", style="dim")


def network_facts(row: NetworkRow, settings: Settings) -> dict[str, Any]:
    """Describe one network as JSON. `here`: the path of its weights on this machine, if they are there."""
    file = weights.weights_path(row, settings.weights_dir)
    source = "download" if file is None else "shipped" if file.parent == DATA else str(file)
    present = weights_path(row, settings)
    return {
        "name": row.name,
        "input_size": row.input_size,
        "layer": row.target_layer,
        "map_size": row.map_size,
        "preprocessing": row.preprocessing.name,
        "sizing": row.sizing.describe(),
        "parameters": row.parameters,
        "weights": row.file.uri if row.file else source,
        "sha256": row.file.sha256 if row.file else row.sha256,
        "here": str(present) if present else None,
    }


def weights_path(row: NetworkRow, settings: Settings) -> Path | None:
    """Return the path of a network's weights on this machine, if they are there. They are not checked."""
    if not row.file:
        return weights.local_weights_path(row, settings.weights_dir, settings.keras_home)
    path = weights.cache_path(row.file, settings.cache)
    return path if path.is_file() else None


WEIGHTS_NOTES = {  # value of the column `weights` -> its meaning, below the table
    "download": "download: Keras downloads them when they are first needed.",
    "keras": "keras: Keras has downloaded them, to KERAS_HOME.",
    "s3": "s3, file: a network of your own; GRADCAM_NETWORKS names the file.",
    "file": "s3, file: a network of your own; GRADCAM_NETWORKS names the file.",
    "cached": "cached: a network of your own, stored in GRADCAM_CACHE_DIR.",
    "folder": "folder: they are in GRADCAM_WEIGHTS_DIR.",
}


def show_networks(rows: Iterable[NetworkRow], settings: Settings) -> None:
    """Print the networks that a job can name."""
    networks = table(
        "network", "input", "target layer", "map", "parameters", "weights", numbers=("parameters",)
    )
    sizings = []
    sources = set()
    for row in rows:
        facts = network_facts(row, settings)
        source = str(facts["weights"])
        if row.file:
            source = "cached" if facts["here"] else "s3" if source.startswith("s3://") else "file"
        elif source == "download":
            source = "keras" if facts["here"] else source
        elif source != "shipped":
            source = "folder"
        sources.add(source)
        sizes = ["x".join(map(str, size)) if size else "" for size in (row.input_size, row.map_size)]
        found = "only gives scores" if row.scores_only else "found in its graph"
        layer = plain(row.target_layer) if row.target_layer else Text(found, "dim")
        millions = f"{row.parameters / 1e6:.1f} M" if row.parameters else ""
        networks.add_row(row.name, sizes[0], layer, sizes[1], millions, source)
        if row.sizing != DEFAULT_SIZING:
            sizings.append(f"{row.name}: images are brought to its input size by {row.sizing.describe()}.")
    out.print(networks)
    out.print()
    for note in dict.fromkeys(note for source, note in WEIGHTS_NOTES.items() if source in sources):
        out.print(note, style="dim")
    for note in sizings:
        out.print(note, style="dim", markup=False)


def durations(document: StatusDocument) -> Mapping[str, float]:
    """Return the metrics of a job that are durations in seconds."""
    return {key: value for key, value in document.metrics.items() if key.endswith("_s")}


def show_log_end(log: Path) -> str:
    """Print the last lines of a log on stderr; return a sentence for an error that comes after them."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]:
        err.print(visible(line), markup=False, soft_wrap=True, style="dim")
    return f"The end of its log, {log}, is above."
