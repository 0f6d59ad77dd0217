"""The dataset of a backfill: one Parquet file per shard, with a row for each image and explained class.

    <output>/backfill.json             the plan: see `gradcam_worker.backfill.plan`
    <output>/data/<key>.parquet        one shard; if the file exists, the shard is done
    <output>/failed/<key>.jsonl        the rows of a shard that failed, if any, each with its Problem
    <output>/overlays/<row id>/...     on request, under the same names as the overlays of a job
    <output>/failed.jsonl              all rows that failed, written when the backfill has finished
    <output>/dataset.json              written last: if it exists, every row of the input is in the dataset

An image that failed has one row, with `error` and `error_detail` and without a class. All files have the same
schema, so that any reader can open the folder as one table: see docs/reference/dataset.md. No other module
but the input reader imports Arrow. It is imported where a file is read or written, since it takes 40 MB of
each process, and most processes never see a shard.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker import __version__
from gradcam_worker.artifacts.artifacts import peak_xy, shown_xyxy
from gradcam_worker.artifacts.columns import arrow_type, carried_array
from gradcam_worker.artifacts.truth import NO_TRUTH, Truth
from gradcam_worker.errors import StorageUnavailable
from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.imaging.region import Box
from gradcam_worker.gradcam.localization import NOWHERE, Localization
from gradcam_worker.images.fetch import redact_uri
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.schemas.shard import DATASET, Row, Shard
from gradcam_worker.schemas.status import NetworkRef, Problem, ResultWarning

if TYPE_CHECKING:
    import pyarrow as pa

MEDIA_TYPE = "application/vnd.apache.parquet"
METADATA_KEY = b"gradcam"  # of the JSON document in a file's metadata that describes the whole file
MISSING_COLUMN = "missing"  # this column and those after it are lacking in files of earlier versions
SHOWN_COLUMN = "shown_xyxy"  # after it, where the network's sizing crops or pads images
LATER_METRICS = ("confidence_drop", "confidence_increase")  # columns that files of earlier versions lack
BOX_THRESHOLD = 0.5  # as a share of the heatmap's peak; the default of a manifest

MAX_BATCH_CELLS = 2**22  # of all heatmaps that are read at once: 32 MB as float64

FEATURES_COLUMN = "heat_features"
DIGEST_COLUMN = "row_digest"
READ_OF_FAILED = {"inputs", "classes", "annotations"}  # what a failed row asks for: no carried column's
UNKNOWN = -1  # of a class, or of yes and no, in the arrays of a `Batch`

Grid = tuple[int, int]  # rows and columns of every heatmap


@dataclass(frozen=True)
class ExplainedRow:
    """A row of the input that was explained."""

    image: InputRecord
    explanation: Explanation
    boxes: Sequence[Box | None]  # per explained class, in pixels of the image
    overlays: Sequence[str | None]  # URI per explained class
    localizations: Sequence[Localization] = ()  # per explained class; empty: unknown
    truth: Truth = NO_TRUTH
    features: NDArray[np.float16] | None = None  # (classes, channels), nan where a heatmap is zero
    warnings: Sequence[ResultWarning] = ()  # about what is known of it


Outcome = ExplainedRow | Problem


@dataclass(frozen=True)
class Summary:
    """The counts and the network in the metadata of a shard's file."""

    rows: int  # rows of the input
    failed: int  # rows of the input that failed
    codes: Mapping[str, int]  # error code -> number of failed rows
    network: NetworkRef
    warnings: Mapping[str, tuple[int, str]] = field(
        default_factory=dict
    )  # code -> rows, the first one's detail


@dataclass(frozen=True)
class DatasetLayout:
    """What decides which columns the files of a dataset have.

    Attributes:
        grid: Rows and columns of every heatmap.
        has_shown: Whether the network's sizing crops or pads images.
        metrics: Of these, those in `LATER_METRICS` have columns where they are measured.
        annotated: Whether labels, boxes or masks of the images are known.
        features: Channels of the vectors that say what the network looks at; None: there are none.
        carried: Further columns of the input: name -> Arrow type, see `gradcam_worker.artifacts.columns`.
    """

    grid: Grid
    has_shown: bool = False
    metrics: Sequence[str] = ()
    annotated: bool = False
    features: int | None = None
    carried: Mapping[str, str] = field(default_factory=dict)


def layout_of(
    shard: Shard, grid: Grid, *, has_shown: bool = False, features: int | None = None
) -> DatasetLayout:
    """The layout of the file that a shard writes.

    Args:
        shard: The shard.
        grid: Rows and columns of the heatmaps.
        has_shown: Whether the network's sizing crops or pads images.
        features: Channels of the target layer, where the shard asks for features.
    """
    return DatasetLayout(grid, has_shown, shard.metrics, shard.annotated, features, shard.carried)


def schema(layout: DatasetLayout) -> "pa.Schema":
    """The columns of a file with this layout."""
    import pyarrow as pa

    rows, columns = layout.grid
    shown = [(SHOWN_COLUMN, pa.list_(pa.float32(), 4))] if layout.has_shown else []
    truth = [
        ("truth_ids", pa.list_(pa.int32())),  # of the image: the true classes that the network has
        ("correct", pa.bool_()),  # whether the class of rank 1 is one of them
        ("truth_rank", pa.int32()),  # the best rank of one of them
        ("heat_inside", pa.float32()),  # share of the heat inside boxes or mask
        ("inside_area", pa.float32()),  # what that would be if the heat were everywhere the same
        ("pointing_hit", pa.bool_()),  # whether the peak is inside
        ("iou", pa.float32()),  # of the region at half the peak with boxes or mask
        ("truth_boxes", pa.list_(pa.list_(pa.float32(), 4))),  # in pixels of the upright image
        ("truth_mask", pa.string()),  # URI, or run lengths as JSON
    ]
    features = [] if layout.features is None else [(FEATURES_COLUMN, pa.list_(pa.float16(), layout.features))]
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),  # number of the row in the input, from 0
            ("id", pa.string()),  # the id that the input gives the row
            ("uri", pa.string()),
            ("sha256", pa.string()),  # of the bytes that were explained
            ("width", pa.int32()),  # of the upright image, in pixels
            ("height", pa.int32()),
            ("index", pa.int32()),  # of the class among the explained ones, from 0
            ("class_id", pa.int32()),
            ("wnid", pa.string()),
            ("class_name", pa.string()),
            ("rank", pa.int32()),  # of the class among all classes, by score, from 1
            ("probability", pa.float32()),
            ("heatmap", pa.list_(pa.float16(), rows * columns)),  # row-major, in [0, 1]
            ("raw_min", pa.float32()),  # before the ReLU and the division by the peak
            ("raw_max", pa.float32()),
            ("peak_xy", pa.list_(pa.int32(), 2)),  # in pixels of the image
            ("box_xyxy", pa.list_(pa.int32(), 4)),  # left, top, right, bottom of the region around the peak
            ("deletion", pa.float32()),
            ("insertion", pa.float32()),
            ("overlay", pa.string()),  # URI
            ("error", pa.string()),  # a code of gradcam_worker.errors
            ("error_detail", pa.string()),
            (MISSING_COLUMN, pa.float32()),  # missing share of a damaged image; null if the image is whole
            *shown,  # left, top, right, bottom on the image, where the heatmap lies; null: on all of it
            *((name, pa.float32()) for name in LATER_METRICS if name in layout.metrics),
            (DIGEST_COLUMN, pa.string()),  # what the row is, and what was asked of it
            ("heat_at_border", pa.float32()),  # share of the heat in the outer band of the image
            *(truth if layout.annotated else []),
            *features,  # activations of the target layer, averaged with the heat as weights
            *((name, arrow_type(kind)) for name, kind in layout.carried.items()),
        ]
    )


def own_columns() -> frozenset[str]:
    """The names of all columns that a file may have beside those of the input."""
    layout = DatasetLayout((1, 1), has_shown=True, metrics=LATER_METRICS, annotated=True, features=1)
    return frozenset(schema(layout).names)


def to_bytes(
    shard: Shard,
    network: NetworkRef,
    grid: Grid,
    outcomes: Sequence[Outcome | None],
    kept_rows: "pa.Table | None" = None,
    *,
    has_shown: bool = False,
    features: int | None = None,
    digests: Sequence[str | None] | None = None,
) -> tuple[bytes, Summary]:
    """Encode a shard's file. The same outcomes give the same bytes.

    Args:
        shard: The shard.
        network: The network and the layer that explained it.
        grid: Rows and columns of the heatmaps.
        outcomes: One per row of the shard. None: the row is in `kept_rows`.
        kept_rows: Rows of an earlier file of the shard, from `read_explained_rows`.
        has_shown: Whether the network's sizing crops or pads images: then the file says what it saw of them.
        features: Channels of the target layer, where the shard asks for features.
        digests: Of the rows, as `Shard.row_digests` returned them before what was left open was filled in;
            None: of the shard as it is.

    Returns:
        The file, and the summary in its metadata.

    Raises:
        StorageUnavailable: `kept_rows` has other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    has_shown = has_shown or (kept_rows is not None and SHOWN_COLUMN in kept_rows.column_names)
    layout = layout_of(shard, grid, has_shown=has_shown, features=features)
    records: list[dict[str, Any]] = []
    carried: list[Sequence[Any]] = []
    digests = shard.row_digests() if digests is None else digests
    for index, (row, outcome) in enumerate(zip(shard.rows, outcomes, strict=True)):
        if outcome is not None:
            of_row = _records(shard.first + index, row, outcome, digests[index])
            records += of_row
            carried += [row.carried or ()] * len(of_row)
    columns = schema(layout)
    table = _table(records, carried, columns, len(layout.carried))
    if kept_rows is not None:
        with read_errors_as_storage_unavailable():  # another version may have written other columns
            order: Any = [("row", "ascending"), ("index", "ascending")]
            table = pa.concat_tables([table, _with_columns(kept_rows, columns)]).sort_by(order)
    codes = Counter(table["error"].drop_null().to_pylist())
    warnings = _count_warnings(shard, outcomes)
    summary = Summary(len(shard.rows), codes.total(), dict(sorted(codes.items())), network, warnings)
    metadata = {
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
        "method": {"name": shard.method.name, **shard.method.model_dump(mode="json")},
        "generator": f"gradcam-worker {__version__}",
        **({"against": shard.target.against} if shard.target.against else {}),
        **({"warnings": warnings} if warnings else {}),
        **({"carried": dict(layout.carried)} if layout.carried else {}),
        **({} if layout.features is None else {"features": layout.features}),
    }
    file = io.BytesIO()
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    pq.write_table(table, file, compression="zstd", row_group_size=len(table) or 1)
    return file.getvalue(), summary


def _count_warnings(shard: Shard, outcomes: Sequence[Outcome | None]) -> dict[str, tuple[int, str]]:
    """Warnings about rows by their code: the number of rows, and what is said of the first one."""
    found: dict[str, tuple[int, str]] = {}
    for number, outcome in enumerate(outcomes, shard.first):
        of_row = outcome.warnings if isinstance(outcome, ExplainedRow) else ()
        for code, warning in {warning.code: warning for warning in reversed(of_row)}.items():
            rows, first = found.get(code, (0, f"Row {number}: {warning.detail}"))
            found[code] = rows + 1, first
    return dict(sorted(found.items()))


def _table(
    records: Sequence[Mapping[str, Any]],
    carried: Sequence[Sequence[Any]],
    columns: "pa.Schema",
    carried_columns: int,
) -> "pa.Table":
    """The table of records, and of the values of the input's columns for each, which are the last ones."""
    import pyarrow as pa

    own = len(columns) - carried_columns
    table = pa.Table.from_pylist(records, schema=pa.schema([*columns][:own]))
    for index, column in enumerate([*columns][own:]):
        values = [row[index] if index < len(row) else None for row in carried]
        table = table.append_column(column, carried_array(values, column.type))
    return table


def _with_columns(kept_rows: "pa.Table", columns: "pa.Schema") -> "pa.Table":
    """Rows of an earlier file with these columns, null where its version did not have them."""
    import pyarrow as pa

    later = {*columns.names[columns.names.index(MISSING_COLUMN) :]} - {*kept_rows.column_names}
    arrays = [
        pa.nulls(len(kept_rows), column.type) if column.name in later else kept_rows[column.name]
        for column in columns
    ]
    return pa.table(arrays, schema=columns)


def _records(number: int, row: Row, outcome: Outcome, digest: str | None) -> list[dict[str, Any]]:
    """The records of one row of the input: one per explained class, or one for its error."""
    common: dict[str, Any] = {
        "row": number,
        "id": row.id,
        "uri": redact_uri(row.uri),
        DIGEST_COLUMN: digest,
    }
    if isinstance(outcome, Problem):
        return [{**common, "error": outcome.code, "error_detail": outcome.detail}]
    explanation, image = outcome.explanation, outcome.image
    heatmaps = explanation.scaled
    common |= {"uri": image.uri, "sha256": image.sha256, "width": image.width, "height": image.height}
    placement, size, truth = explanation.placement, (image.width, image.height), outcome.truth
    common |= {
        "truth_ids": truth.ids,
        "correct": truth.is_correct,
        "truth_rank": truth.rank,
        "truth_boxes": truth.boxes,
        "truth_mask": truth.mask,
    }
    features = _known_features(outcome)
    localizations = outcome.localizations or [NOWHERE] * len(explanation.explained)
    return [
        {
            **common,
            "index": index,
            "class_id": prediction.id,
            "wnid": prediction.wnid,
            "class_name": prediction.name,
            "rank": prediction.rank,
            "probability": prediction.probability,
            "heatmap": heatmaps[index].astype(np.float16).ravel(),
            "raw_min": float(explanation.raw_min[index]),
            "raw_max": float(explanation.raw_max[index]),
            "peak_xy": peak_xy(explanation.heatmaps[index], size, placement),
            "box_xyxy": outcome.boxes[index],
            "overlay": outcome.overlays[index],
            MISSING_COLUMN: image.damage.missing if image.damage else None,
            SHOWN_COLUMN: shown_xyxy(placement, image),
            **(explanation.metrics[index] if explanation.metrics else {}),
            **vars(localizations[index]),
            FEATURES_COLUMN: None if features is None else features[index],
        }
        for index, prediction in enumerate(explanation.explained)
    ]


def _known_features(row: ExplainedRow) -> list[NDArray[np.float16] | None] | None:
    """The features of each explained class, None where its heatmap is zero."""
    if row.features is None:
        return None
    return [None if np.isnan(vector).any() else vector for vector in row.features]


def failed_lines(shard: Shard, outcomes: Sequence[Outcome | None]) -> bytes:
    """Encode the rows that failed, one JSON object per line. The result is a valid input of a backfill."""
    lines = []
    for index, (row, outcome) in enumerate(zip(shard.rows, outcomes, strict=True)):
        if isinstance(outcome, Problem):
            left_out = {"uri", "problem", "version", "carried"}
            fields = row.model_dump(mode="json", exclude_none=True, exclude=left_out)
            carried = zip_longest(shard.carried, row.carried or ())
            line = {
                **{name: value for name, value in carried if name not in READ_OF_FAILED},
                "image": row.uri,
                **fields,
                "row": shard.first + index,
                "error": outcome.model_dump(mode="json"),
            }
            lines.append(json.dumps(line) + "\n")
    return "".join(lines).encode()


def read_summary(data: bytes) -> Summary:
    """Read the summary of a shard's file.

    Raises:
        StorageUnavailable: The file is not a shard's file.
    """
    with read_errors_as_storage_unavailable():
        metadata = _read_metadata(data)
        network = NetworkRef.model_validate(metadata["network"])
        warnings = {
            code: (int(rows), str(first)) for code, (rows, first) in metadata.get("warnings", {}).items()
        }
        rows, failed = int(metadata["rows"]), int(metadata["failed"])
        return Summary(rows, failed, dict(metadata["codes"]), network, warnings)


def find_mismatch(data: bytes, shard: Shard) -> str | None:
    """Describe what differs between an existing file and the one that a shard would write. None: nothing.

    Raises:
        StorageUnavailable: The file is not a shard's file.
    """
    with read_errors_as_storage_unavailable():
        metadata = _read_metadata(data)
        weights = NetworkRef.model_validate(metadata["network"]).weights_sha256
        key = metadata.get("key", shard.key)  # files of earlier versions have the key in their name only
    if metadata["backfill"] != shard.backfill:
        return f"it is of backfill {metadata['backfill']}"
    if key != shard.key:
        return f"it is of shard {key}"
    if shard.weights_sha256 not in {None, weights}:
        return f"it was computed with weights {weights}"
    return None


def read_explained_rows(data: bytes) -> "tuple[pa.Table, frozenset[int]]":
    """Read the rows of a shard's file that were explained.

    Returns:
        Their records, and their numbers in the input.

    Raises:
        StorageUnavailable: The file is not a shard's file.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with read_errors_as_storage_unavailable():
        _read_metadata(data)
        table = pq.read_table(io.BytesIO(data))
        explained = table.filter(pc.is_null(table["error"])).replace_schema_metadata(None)
        return explained, frozenset(explained["row"].to_pylist())


@contextmanager
def read_errors_as_storage_unavailable() -> Iterator[None]:
    """Raise StorageUnavailable for whatever shows that a file is not one of a dataset."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        message = f"The existing file is not a shard's file, or is damaged: {error}"
        raise StorageUnavailable(message) from error


def _read_metadata(data: bytes) -> dict[str, Any]:
    import pyarrow.parquet as pq

    return read_metadata(pq.read_schema(io.BytesIO(data)))


def read_metadata(file_schema: "pa.Schema") -> dict[str, Any]:
    """Read the document that describes a file from its schema. Raises ValueError, KeyError, TypeError."""
    metadata = json.loads((file_schema.metadata or {})[METADATA_KEY])
    if metadata["schema"] != DATASET:
        message = f"its schema is {metadata['schema']!r}; expected {DATASET!r}"
        raise ValueError(message)
    return dict(metadata)


@dataclass(frozen=True)
class Batch:
    """n records of a shard's file, all of images that were explained.

    What a file has no column for is None: files of earlier versions lack some.
    """

    method: MethodSpec  # that computed the heatmaps
    class_ids: NDArray[np.int32]  # (n,)
    ranks: NDArray[np.int32]  # (n,)
    probabilities: NDArray[np.float32]  # (n,)
    heatmaps: NDArray[np.float16]  # (n, rows, columns)
    other_columns: "pa.RecordBatch"  # all columns but the heatmaps and features
    against: tuple[int | str, ...] = ()  # the classes that each is explained against, as they were asked for
    heat_at_border: NDArray[np.float32] | None = None  # (n,), nan: unknown, as below
    truth_ids: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None  # offsets (n + 1,), values
    first_truth: NDArray[np.int32] | None = None  # (n,), the first of them; UNKNOWN: there is none
    correct: NDArray[np.int8] | None = None  # (n,): 1, 0, UNKNOWN
    truth_ranks: NDArray[np.int32] | None = None  # (n,), 0: unknown
    heat_inside: NDArray[np.float32] | None = None  # (n,)
    inside_area: NDArray[np.float32] | None = None  # (n,)
    pointing_hit: NDArray[np.int8] | None = None  # (n,): 1, 0, UNKNOWN
    iou: NDArray[np.float32] | None = None  # (n,)
    heat_features: NDArray[np.float16] | None = None  # (n, channels), nan: unknown
    carried: Mapping[str, str] = field(default_factory=dict)  # columns of the input: name -> Arrow type

    def record(self, index: int) -> dict[str, Any]:
        """One record, without its heatmap."""
        return dict(self.other_columns.slice(index, 1).to_pylist()[0])


def read_batches(data: bytes, max_rows: int = 4096) -> Iterator[Batch]:
    """Read the records of explained images, at most `max_rows` at a time, or fewer if heatmaps are large.

    Raises:
        StorageUnavailable: The file is not a shard's file.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with read_errors_as_storage_unavailable():
        metadata = _read_metadata(data)
        rows = min(max_rows, max(MAX_BATCH_CELLS // max(math.prod(metadata["grid"]), 1), 1))
        for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(batch_size=rows):
            explained = batch.filter(pc.is_null(batch["error"]))
            values = explained["heatmap"].flatten().to_numpy(zero_copy_only=False)
            large = {"heatmap", FEATURES_COLUMN} & {*explained.schema.names}
            yield Batch(
                MethodSpec.model_validate(metadata["method"]),
                explained["class_id"].to_numpy(zero_copy_only=False),
                explained["rank"].to_numpy(zero_copy_only=False),
                explained["probability"].to_numpy(zero_copy_only=False),
                values.reshape(len(explained), *metadata["grid"]),
                explained.drop_columns([*large]),
                tuple(metadata.get("against", ())),
                **_later_columns(explained),
                carried=metadata.get("carried", {}),
            )


def _later_columns(explained: "pa.RecordBatch") -> dict[str, Any]:
    """The fields of a `Batch` whose columns not every file has."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def numbers(name: str, kind: "pa.DataType", unknown: float) -> Any:
        if name not in explained.schema.names:
            return None
        known = pc.fill_null(explained[name].cast(kind), pa.scalar(unknown, kind))
        return known.to_numpy(zero_copy_only=False)

    fields = {
        name: numbers(name, pa.float32(), math.nan)
        for name in ("heat_at_border", "heat_inside", "inside_area", "iou")
    }
    fields |= {name: numbers(name, pa.int8(), UNKNOWN) for name in ("correct", "pointing_hit")}
    fields["truth_ranks"] = numbers("truth_rank", pa.int32(), 0)
    if "truth_ids" in explained.schema.names:
        lists = explained["truth_ids"]
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = lists.flatten().to_numpy(zero_copy_only=False)
        first = np.full(len(lists), UNKNOWN, np.int32)
        first[lengths > 0] = ids[offsets[:-1][lengths > 0]]
        fields |= {"truth_ids": (offsets, ids), "first_truth": first}
    if FEATURES_COLUMN in explained.schema.names:
        vectors = explained[FEATURES_COLUMN]
        features = np.full((len(vectors), vectors.type.list_size), np.nan, np.float16)
        features[pc.is_valid(vectors).to_numpy(zero_copy_only=False)] = (
            vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, vectors.type.list_size)
        )
        fields["heat_features"] = features
    return fields
