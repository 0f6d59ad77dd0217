"""What the commands show: tables, progress, JSON."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.contract import StatusDocument
from worker.gradcam.catalog import NetworkRow
from worker.gradcam.classes import DATA, percent
from worker.gradcam.weights import where

COLORS = {
    "queued": "yellow",
    "running": "cyan",
    "retrying": "magenta",
    "succeeded": "green",
    "failed": "red",
    "expired": "red",
    "canceled": "red",
}
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """For machines: one JSON document on standard output, nothing else."""
    print(json.dumps(value, indent=2))  # noqa: T201  # rich would wrap and color it


def table(*columns: str, title: str | None = None, numbers: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `numbers` are set flush right."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def status_text(document: StatusDocument) -> Text:
    """The state in its colour, with its stage while it runs."""
    stage = f" · {document.stage}" if document.stage else ""
    return Text(document.status + stage, COLORS[document.status])


def show(document: StatusDocument) -> None:
    """One status document, for a person."""
    facts = table("", "")
    facts.show_header = False
    facts.add_row("job", document.id)
    facts.add_row("status", status_text(document))
    facts.add_row("attempt", f"{document.attempt} of {document.max_attempts}")
    if document.network:
        facts.add_row("network", Text(f"{document.network.name}, layer {document.network.layer}"))
    if document.metrics:
        spent = (f"{key.removesuffix('_s')} {value:g} s" for key, value in seconds(document).items())
        facts.add_row("time", ", ".join(spent))
    if document.result:
        facts.add_row("manifest", Text(document.result.manifest_uri))
    for warned in document.warnings:
        facts.add_row("warning", f"{warned.code}: nothing in the image speaks for class {warned.class_id}")
    if document.error:
        facts.add_row("error", Text(f"{document.error.code}: {document.error.detail}", "red"))
    out.print(facts)
    if document.predictions:
        seen = table("rank", "id", "class", "probability", numbers=("rank", "id", "probability"))
        for one in document.predictions:
            seen.add_row(str(one.rank), str(one.id), Text(one.name), percent(one.probability))
        out.print()
        out.print(seen)


def facts(row: NetworkRow, weights_dir: Path | None) -> dict[str, Any]:
    """One network, for machines."""
    path = where(row, weights_dir)
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
    }


ORIGINS = {  # what the list says of weights, for short
    "download": "download: Keras fetches them when they are first asked for.",
    "s3": "s3, file: the operator's own; GRADCAM_NETWORKS says where they are.",
    "file": "s3, file: the operator's own; GRADCAM_NETWORKS says where they are.",
    "folder": "folder: they are in GRADCAM_WEIGHTS_DIR.",
}


def show_networks(rows: Iterable[NetworkRow], weights_dir: Path | None) -> None:
    """The networks that a job can name, for a person."""
    made = table("network", "input", "target layer", "map", "parameters", "weights", numbers=("parameters",))
    met = set()
    for row in rows:
        kept = str(facts(row, weights_dir)["weights"])
        if row.file:
            kept = "s3" if kept.startswith("s3://") else "file"
        elif kept not in {"download", "shipped"}:
            kept = "folder"
        met.add(kept)
        sizes = ["x".join(map(str, size)) if size else "" for size in (row.input_size, row.map_size)]
        layer = Text(row.target_layer) if row.target_layer else Text("found in its graph", "dim")
        millions = f"{row.parameters / 1e6:.1f} M" if row.parameters else ""
        made.add_row(row.name, sizes[0], layer, sizes[1], millions, kept)
    out.print(made)
    out.print()
    for note in dict.fromkeys(note for kept, note in ORIGINS.items() if kept in met):
        out.print(note, style="dim")


def seconds(document: StatusDocument) -> Mapping[str, float]:
    """The metrics that are times."""
    return {key: value for key, value in document.metrics.items() if key.endswith("_s")}
