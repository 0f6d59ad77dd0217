"""What a backfill leaves: one Parquet file a shard, with a row for each image and class.

    <output>/backfill.json             what was asked for: see `gradcam_worker.backfill.plan`
    <output>/data/<key>.parquet        one shard: its presence means that it is done
    <output>/failed/<key>.jsonl        its rows that failed, if any, each with its Problem
    <output>/overlays/<row id>/...     where asked for, under the keys that a job's have
    <output>/failed.jsonl              all of these, when the backfill has ended
    <output>/dataset.json              last: its presence means that every row of the input is there

An image that failed has one row, with `error` and `error_detail`, and no class. Every file has the same
schema, so that any reader takes the folder for one table: see docs/reference/dataset.md. This module is the
one door to Arrow.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gradcam_worker import __version__
from gradcam_worker.artifacts.artifacts import peak_xy
from gradcam_worker.errors import StorageUnavailable
from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.imaging.region import Box
from gradcam_worker.images.fetch import presentable
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.schemas.shard import DATASET, Row, Shard
from gradcam_worker.schemas.status import NetworkRef, Problem

MEDIA_TYPE = "application/vnd.apache.parquet"
FACTS = b"gradcam"  # the key of the facts about a whole file, as JSON, in its metadata
MISSING = "missing"  # the last column, which older files lack
BOX_THRESHOLD = 0.5  # of the heatmap's peak, as in a manifest

Grid = tuple[int, int]  # rows, columns of every heatmap


@dataclass(frozen=True)
class Seen:
    """A row of the input that was explained."""

    image: InputRecord
    explanation: Explanation
    boxes: Sequence[Box | None]  # of each explained class, in pixels of the image
    overlays: Sequence[str | None]  # URIs, of each explained class


Outcome = Seen | Problem


@dataclass(frozen=True)
class Summary:
    """What a file says of itself."""

    rows: int  # of the input
    failed: int  # of them
    codes: Mapping[str, int]  # why: code -> rows
    network: NetworkRef


def schema(grid: Grid) -> pa.Schema:
    """The columns of every file whose heatmaps have so many rows and columns."""
    rows, columns = grid
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),  # number in the input, from 0
            ("id", pa.string()),  # the reader's own
            ("uri", pa.string()),
            ("sha256", pa.string()),  # of the bytes that were explained
            ("width", pa.int32()),  # of the image, in pixels, upright
            ("height", pa.int32()),
            ("index", pa.int32()),  # of the class among those explained, from 0
            ("class_id", pa.int32()),
            ("wnid", pa.string()),
            ("class_name", pa.string()),
            ("rank", pa.int32()),  # among all classes, by score, from 1
            ("probability", pa.float32()),
            ("heatmap", pa.list_(pa.float16(), rows * columns)),  # row by row, in [0, 1]
            ("raw_min", pa.float32()),  # before the ReLU and the division by the peak
            ("raw_max", pa.float32()),
            ("peak_xy", pa.list_(pa.int32(), 2)),  # in pixels of the image
            ("box_xyxy", pa.list_(pa.int32(), 4)),  # left, top, right, bottom around the peak
            ("deletion", pa.float32()),
            ("insertion", pa.float32()),
            ("overlay", pa.string()),  # its URI
            ("error", pa.string()),  # a code of gradcam_worker.errors
            ("error_detail", pa.string()),
            (MISSING, pa.float32()),  # share of a damaged image that is not there; null: it is whole
        ]
    )


def to_bytes(
    shard: Shard,
    network: NetworkRef,
    grid: Grid,
    outcomes: Sequence[Outcome | None],
    kept: pa.Table | None = None,
) -> tuple[bytes, Summary]:
    """A shard's file, and what it says of itself: the same bytes for the same outcomes.

    An outcome of None is a row that `kept`, a table of the file before, has already. Raises
    StorageUnavailable where that has other columns.
    """
    records = [
        record
        for place, (row, outcome) in enumerate(zip(shard.rows, outcomes, strict=True))
        if outcome is not None
        for record in _records(shard.first + place, row, outcome)
    ]
    table = pa.Table.from_pylist(records, schema=schema(grid))
    if kept is not None:
        with _reading():  # its columns may be another version's
            order: Any = [("row", "ascending"), ("index", "ascending")]
            table = pa.concat_tables([table, kept]).sort_by(order)
    codes = Counter(table["error"].drop_null().to_pylist())
    summary = Summary(len(shard.rows), codes.total(), dict(sorted(codes.items())), network)
    facts = {
        "schema": DATASET,
        "backfill": shard.backfill,
        "shard": shard.index,
        "key": shard.key,
        "first": shard.first,
        "rows": summary.rows,
        "failed": summary.failed,
        "codes": summary.codes,
        "grid": grid,
        "network": network.model_dump(mode="json"),
        "method": shard.method.model_dump(mode="json"),
        "generator": f"gradcam-worker {__version__}",
    }
    file = io.BytesIO()
    named = table.replace_schema_metadata({FACTS: json.dumps(facts, sort_keys=True).encode()})
    pq.write_table(named, file, compression="zstd", row_group_size=len(table) or 1)
    return file.getvalue(), summary


def _records(number: int, row: Row, outcome: Outcome) -> list[dict[str, Any]]:
    own = {"row": number, "id": row.id, "uri": presentable(row.uri)}
    if isinstance(outcome, Problem):
        return [{**own, "error": outcome.code, "error_detail": outcome.detail}]
    seen, image = outcome.explanation, outcome.image
    shown = seen.shown  # in [0, 1], where they are not normalized, too
    own |= {"uri": image.uri, "sha256": image.sha256, "width": image.width, "height": image.height}
    return [
        {
            **own,
            "index": index,
            "class_id": one.id,
            "wnid": one.wnid,
            "class_name": one.name,
            "rank": one.rank,
            "probability": one.probability,
            "heatmap": shown[index].astype(np.float16).ravel(),
            "raw_min": float(seen.raw_min[index]),
            "raw_max": float(seen.raw_max[index]),
            "peak_xy": peak_xy(seen.heatmaps[index], (image.width, image.height)),
            "box_xyxy": outcome.boxes[index],
            "overlay": outcome.overlays[index],
            MISSING: image.damage.missing if image.damage else None,
            **(seen.metrics[index] if seen.metrics else {}),
        }
        for index, one in enumerate(seen.explained)
    ]


def failed_lines(shard: Shard, outcomes: Sequence[Outcome | None]) -> bytes:
    """The rows that failed, a JSON object a line: itself an input for another backfill."""
    lines = []
    for place, (row, outcome) in enumerate(zip(shard.rows, outcomes, strict=True)):
        if isinstance(outcome, Problem):
            own = row.model_dump(mode="json", exclude_none=True, exclude={"uri", "problem", "version"})
            said = {"image": row.uri, **own, "row": shard.first + place}
            lines.append(json.dumps({**said, "error": outcome.model_dump(mode="json")}) + "\n")
    return "".join(lines).encode()


def summary_of(data: bytes) -> Summary:
    """What a file says of itself. Raises StorageUnavailable where it is no such file."""
    with _reading():
        facts = _facts(data)
        network = NetworkRef.model_validate(facts["network"])
        return Summary(int(facts["rows"]), int(facts["failed"]), dict(facts["codes"]), network)


def made_for_another(data: bytes, shard: Shard) -> str | None:
    """What tells a file from the one that a shard would leave. Raises StorageUnavailable: it is none."""
    with _reading():
        facts = _facts(data)
        weights = NetworkRef.model_validate(facts["network"]).weights_sha256
        key = facts.get("key", shard.key)  # which files of earlier versions do not say but by their names
    if facts["backfill"] != shard.backfill:
        return f"backfill {facts['backfill']}"
    if key != shard.key:
        return f"the shard {key}"
    if shard.weights_sha256 not in {None, weights}:
        return f"weights {weights}"
    return None


def good_rows(data: bytes) -> tuple[pa.Table, frozenset[int]]:
    """What a file holds of rows that succeeded, and their numbers. Raises StorageUnavailable."""
    with _reading():
        _facts(data)
        table = pq.read_table(io.BytesIO(data))
        good = table.filter(pc.is_null(table["error"])).replace_schema_metadata(None)
        if MISSING not in good.column_names:  # the file of a version that did not know
            good = good.append_column(MISSING, pa.nulls(len(good), pa.float32()))
        return good, frozenset(good["row"].to_pylist())


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        message = f"A shard's file is there, and cannot be read as one: {error}"
        raise StorageUnavailable(message) from error


def _facts(data: bytes) -> dict[str, Any]:
    facts = json.loads((pq.read_schema(io.BytesIO(data)).metadata or {})[FACTS])
    if facts["schema"] != DATASET:
        message = f"its schema is {facts['schema']!r}, and {DATASET!r} would be right"
        raise ValueError(message)
    return dict(facts)


@dataclass(frozen=True)
class Batch:
    """Some rows of a file, n of them, all of images that were explained."""

    method: MethodSpec  # how its heatmaps came to be
    class_ids: NDArray[np.int32]  # (n,)
    ranks: NDArray[np.int32]  # (n,)
    probabilities: NDArray[np.float32]  # (n,)
    heatmaps: NDArray[np.float16]  # (n, rows, columns)
    others: pa.RecordBatch  # every column but the heatmaps

    def record(self, place: int) -> dict[str, Any]:
        """One row, without its heatmap."""
        return dict(self.others.slice(place, 1).to_pylist()[0])


def batches(data: bytes, rows: int = 4096) -> Iterator[Batch]:
    """The rows of a file that were explained, so many at a time. Raises StorageUnavailable."""
    with _reading():
        facts = _facts(data)
        for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(batch_size=rows):
            good = batch.filter(pc.is_null(batch["error"]))
            flat = good["heatmap"].flatten().to_numpy(zero_copy_only=False)
            yield Batch(
                MethodSpec.model_validate(facts["method"]),
                good["class_id"].to_numpy(zero_copy_only=False),
                good["rank"].to_numpy(zero_copy_only=False),
                good["probability"].to_numpy(zero_copy_only=False),
                flat.reshape(len(good), *facts["grid"]),
                good.drop_columns(["heatmap"]),
            )
