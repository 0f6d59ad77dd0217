"""A million rows with ten columns, in CSV, JSON Lines and Parquet: from the list to shards as JSON.

Each list is read once without its further columns, as versions before these did, and once with all of them.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from devtools.bench.report import Figures, Requirement, at_most, table
from gradcam_worker.backfill.inputs.open import open_input
from gradcam_worker.backfill.inputs.options import DEFAULT_OPTIONS, InputOptions
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.backfill.sharding import cut_shards
from gradcam_worker.settings import Settings

TITLE = "Lists"
PACKAGES = ("pydantic", "pyarrow")
ROWS, ROWS_QUICK = 1_000_000, 50_000
FURTHER = 8  # columns beside image and id
REQUIRED_RATIO = 2.0  # of the CPU time with further columns and without
WITHOUT = InputOptions(drop=("*",))


def columns(rows: int) -> dict[str, list[Any]]:
    """Ids and URIs, and as many texts as numbers."""
    found: dict[str, list[Any]] = {
        "id": [str(row) for row in range(rows)],
        "image": [f"s3://photos/2031/05/{row:08d}.jpg" for row in range(rows)],
    }
    for place in range(FURTHER):
        values = range(place, rows + place)
        found[f"c{place}"] = [f"value {value}" for value in values] if place % 2 else [*values]
    return found


def write_lists(folder: Path, rows: int) -> dict[str, Path]:
    """Write the lists; return their files by format."""
    given, files = columns(rows), {name: folder / f"list.{name}" for name in ("csv", "jsonl", "parquet")}
    pq.write_table(pa.table(given), files["parquet"])
    with files["csv"].open("w") as csv, files["jsonl"].open("w") as lines:
        csv.write(",".join(given) + "\n")
        for values in zip(*given.values(), strict=True):
            csv.write(",".join(map(str, values)) + "\n")
            lines.write(json.dumps(dict(zip(given, values, strict=True))) + "\n")
    return files


def cut(file: Path, options: InputOptions) -> tuple[float, float]:
    """Cut a list into shards; return the CPU time, in seconds, and the bytes of JSON for a row."""
    begun, rows, size = time.process_time(), 0, 0
    with open_input(str(file), Settings(), options) as opened:
        fields = {"input": opened.name, "output": "s3://results/run", "network": "vgg16"}
        plan = Plan.model_validate({**fields, "target": {"top_n": 3}, "carried": opened.carried})
        for shard in cut_shards(opened.rows(), plan):
            rows += len(shard.rows)
            size += len(shard.to_json())
    return time.process_time() - begun, size / rows


def measure(*, quick: bool) -> dict[str, Any]:
    """Read each list without its further columns and with them."""
    rows, cases = ROWS_QUICK if quick else ROWS, {}
    with tempfile.TemporaryDirectory(prefix="gradcam-bench-") as folder:
        for name, file in write_lists(Path(folder), rows).items():
            without, with_all = cut(file, WITHOUT), cut(file, DEFAULT_OPTIONS)
            cases[name] = {
                "rows_per_s": {"without": rows / without[0], "with": rows / with_all[0]},
                "bytes": {"without": without[1], "with": with_all[1]},
                "ratio": with_all[0] / without[0],
            }
    return {"rows": rows, "cases": cases}


def requirements(figures: Figures) -> Iterator[Requirement]:
    """What further columns may cost."""
    for name, case in figures["cases"].items():
        yield at_most(f"{name}: CPU time with further columns", REQUIRED_RATIO, case["ratio"], " times")


def blocks(figures: Figures) -> Iterator[str]:
    """A table of the formats."""
    headings = (
        "list",
        "rows/s without",
        "rows/s with",
        "bytes a row without",
        "bytes a row with",
        "times the CPU",
    )
    rows = [
        (
            name,
            *(f"{case['rows_per_s'][kind]:.0f}" for kind in ("without", "with")),
            *(f"{case['bytes'][kind]:.0f}" for kind in ("without", "with")),
            f"{case['ratio']:.2f}",
        )
        for name, case in figures["cases"].items()
    ]
    yield table(headings, rows)
