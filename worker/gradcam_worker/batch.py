"""Explains images where the cluster is somebody else's: in Ray, Dask or Spark, or in a plain loop.

>>> explainer = ShardExplainer("vgg16", top_n=3, label="label")
>>> table = explainer({"uri": ["s3://photos/pier.jpg"], "label": ["pier"]})

Both entries run what a worker runs for a shard of a backfill, in this process and without a queue. So
nothing is retried when a process dies, and nobody else sees how far it is: that is left to the cluster.
"""

import io
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gradcam_worker import extras

with extras.required("gradcam_worker.batch", extras.WORKER):
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from numpy.typing import NDArray
    from pydantic import ValidationError

    from gradcam_worker.artifacts.columns import arrow_type
    from gradcam_worker.artifacts.dataset import METADATA_KEY
    from gradcam_worker.backfill.inputs.arrow_tables import ArrowReader, ArrowTable
    from gradcam_worker.backfill.inputs.further import FurtherColumns, choose_carried
    from gradcam_worker.backfill.inputs.options import InputOptions, is_coco
    from gradcam_worker.backfill.inputs.rows import RowParser
    from gradcam_worker.backfill.inputs.tables import IMAGE_NAMES
    from gradcam_worker.backfill.plan import Plan
    from gradcam_worker.backfill.sharding import cut_shards
    from gradcam_worker.errors import ImageTooLarge, InvalidInput, InvalidJob
    from gradcam_worker.execution.attempt import JobContext
    from gradcam_worker.execution.services import Services
    from gradcam_worker.execution.shards import run_shard
    from gradcam_worker.images.fetch import FetchedBytes, verified
    from gradcam_worker.images.prepare import ImageFetcher
    from gradcam_worker.resilience.deadline import Deadline
    from gradcam_worker.runtime import service_factory
    from gradcam_worker.schemas.job import ImageRef
    from gradcam_worker.schemas.model import describe
    from gradcam_worker.schemas.options import default_target
    from gradcam_worker.schemas.shard import MAX_ROWS, Shard, data_key
    from gradcam_worker.settings import Settings
    from gradcam_worker.storage.filesystem import FolderStore
    from gradcam_worker.storage.store import Store

__all__ = ["ClassResult", "ImageResult", "ShardExplainer", "explain_images"]

NUMBERS = "row"  # a column with the numbers of the rows
BYTES_NAMES = ("bytes", "image")  # columns that may hold encoded images
GIVEN = "data:,given-"  # the URI by which the bytes of a row are found; nobody else sees it
DEFAULT_GROUP_ROWS = 64
WITHOUT_LIMIT = 2**62  # bytes of a message, where there is none
Columns = Mapping[str, Any]


@dataclass(frozen=True)
class ClassResult:
    """One explained class of an image.

    Attributes:
        class_id: Its place in the network's scores.
        wnid: Its WordNet id; may be empty.
        name: Its name.
        rank: Among all classes, by score; 1 is the prediction.
        probability: From 0 to 1.
        heatmap: (rows, columns), float32, in [0, 1].
        columns: The dataset's other columns for it, such as peak_xy and heat_inside, by name.
    """

    class_id: int
    wnid: str
    name: str
    rank: int
    probability: float
    heatmap: NDArray[np.float32] = field(repr=False)
    columns: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class ImageResult:
    """What became of one image.

    Attributes:
        row: Its number, from 0.
        id: The id that came with it, if any.
        uri: Where it is, without secrets; None: it came as bytes.
        sha256: Of its bytes; None: it could not be read.
        classes: The explained classes; empty if it failed.
        error: A code of `gradcam_worker.errors`; None: it was explained.
        error_detail: The same in a sentence.
    """

    row: int
    id: str | None
    uri: str | None
    sha256: str | None
    classes: tuple[ClassResult, ...]
    error: str | None
    error_detail: str | None


def explain_images(
    images: Iterable[str | Path | bytes | Columns],
    *,
    network: str,
    group_rows: int = DEFAULT_GROUP_ROWS,
    **options: Any,
) -> Iterator[ImageResult]:
    """Explain the images of any iterable, lazily and in their order. One that fails does not stop the others.

    Args:
        images: URIs, paths, encoded images, or for each image a dict of columns, as of a table: `uri`, `path`
            or `bytes`, and what is known about it.
        network: The network's name in the registry.
        group_rows: How many are read before the first results come; the device computes them in batches.
        **options: As for `ShardExplainer`.

    Yields:
        The result of each image.

    Raises:
        InvalidInput, InvalidJob, UnknownNetwork, UnknownClass and others: No image can be explained.

    Examples:
        >>> for result in explain_images(Path("photos").glob("*.jpg"), network="vgg16", top_n=1):
        ...     print(result.uri, result.error or result.classes[0].name)
    """
    explainer = ShardExplainer(network, **options)
    rest = iter(images)
    while group := [_columns_of(image) for image in itertools.islice(rest, max(group_rows, 1))]:
        yield from _results(explainer(pa.Table.from_pylist(_alike(group))))


class ShardExplainer:
    """Explains batches of rows: columns in, the dataset's table out. It can be pickled.

    The network is loaded in the process that calls it, once, at the first call. Calls from several threads
    share it.
    """

    def __init__(  # noqa: PLR0913  # by keyword, as the options of a command
        self,
        network: str,
        *,
        top_n: int | None = None,
        classes: Sequence[int | str] | None = None,
        against: Sequence[int | str] | None = None,
        method: str | Mapping[str, Any] | None = None,
        metrics: Sequence[str] = (),
        features: bool = False,
        inputs: Mapping[str, Any] | None = None,
        column: str | None = None,
        bytes_column: str | None = None,
        label: str | None = None,
        boxes: str | None = None,
        boxes_format: str = "xywh",
        mask: str | None = None,
        classes_from: str | None = None,
        input_columns: Mapping[str, str] | None = None,
        keep_columns: Sequence[str] | None = None,
        drop_columns: Sequence[str] = (),
        column_types: Mapping[str, str] | None = None,
        settings: Settings | None = None,
        portable: bool = False,
        timeout_s: float = 7200,
        build_services: Callable[[Settings], Services] = service_factory.build_services,
    ) -> None:
        """Check what is asked for; nothing is loaded yet.

        Args:
            network: The network's name in the registry.
            top_n: Explain the n most probable classes; neither this nor `classes`: three.
            classes: Explain these classes: ids, wnids or names.
            against: Explain each against these classes.
            method: The name of a method, or its fields, as in a job.
            metrics: Faithfulness to measure, as in a job.
            features: Also give what the network looks at as a vector.
            inputs: What the network takes beside each image.
            column: The column with the URIs; None: `image`, `uri`, `url` or `path`.
            bytes_column: The column with encoded images; None: `bytes` or `image`, where it holds bytes.
            label: The column with the true classes.
            boxes: The column with boxes, or four columns with commas.
            boxes_format: Of that column: xywh, xyxy, xywh-relative or xyxy-relative.
            mask: The column with masks: URIs, or run lengths.
            classes_from: The column with classes to explain beside the others.
            input_columns: The columns with what the network takes beside the image, by its names.
            keep_columns: Further columns that the result gets; None: all, but those with bytes.
            drop_columns: Those that it does not get.
            column_types: Types of further columns, as Arrow prints them, such as double: a column in which a
                batch has nothing but None has no type of its own, and would be text there.
            settings: Which images may be read, and how; None: those of the environment of the process that
                calls it, and every file that it can read.
            portable: Give heatmaps and boxes as lists of float32 and numbers: Spark has no float16 and no
                lists of a fixed length.
            timeout_s: For one call.
            build_services: Stands in for the services of a worker.

        Raises:
            InvalidJob: What is asked for is invalid.
            InvalidInput: A type is none that can be carried.
        """
        self._types = dict(column_types or {})
        for kind in self._types.values():
            arrow_type(kind)
        if boxes and is_coco(boxes):
            message = (
                f"boxes names a column of the batch, and {boxes!r} is a file: join its boxes to the rows."
            )
            raise InvalidJob(message)
        target = {"top_n": top_n, "classes": classes, "against": against}
        spec = {
            "network": network,
            "target": default_target({name: value for name, value in target.items() if value is not None}),
            "inputs": dict(inputs or {}),
            "metrics": tuple(metrics),
            "features": features,
            **({} if method is None else {"method": {"name": method} if isinstance(method, str) else method}),
        }
        try:
            self._plan = Plan.model_validate(
                {**spec, "input": "-", "output": "file:///", "shard_rows": MAX_ROWS}
            )
        except ValidationError as error:
            message = f"This is invalid: {describe(error)}."
            raise InvalidJob(message) from error
        self._options = InputOptions(
            column=column,
            inputs=dict(input_columns or {}),
            keep=None if keep_columns is None else tuple(keep_columns),
            drop=tuple(drop_columns),
            classes_from=classes_from,
            label=label,
            boxes=boxes,
            boxes_format=boxes_format,
            mask=mask,
        )
        self._bytes_column, self._settings, self._portable = bytes_column, settings, portable
        self._timeout_s, self._build = timeout_s, build_services
        self._state = _State()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what this process has loaded."""
        return {**vars(self), "_state": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without a network."""
        vars(self).update(state)
        self._state = _State()

    def __call__(self, batch: "pa.Table | pa.RecordBatch | Columns | Any") -> pa.Table:
        """Explain the images of a batch.

        Args:
            batch: An Arrow table or batch, a dict of columns (lists or arrays), or a pandas DataFrame. A
                column `row` of integers numbers its rows; without it they are counted by this object.

        Returns:
            A table with the dataset's columns: a row for each image and class, and one for an image that
            failed. Its metadata are those of a dataset's file, so that `gradcam audit` reads what
            `pyarrow.parquet.write_table` makes of it.

        Raises:
            InvalidInput: The batch has no column of images, or one that clashes with the dataset's.
            UnknownNetwork, UnknownClass, NetworkIncompatible and others: No image can be explained.
        """
        services = self._state.services(self._build, self._settings)
        rows = _as_table(batch)
        if not len(rows):
            return self.output_schema(rows).empty_table()
        numbers, rows = self._numbers(rows)
        given, rows = self._given_bytes(rows)
        further = self._further(rows)
        reader = ArrowReader(self._options, "parquet")
        parsed = reader.rows_of(ArrowTable(rows), RowParser("Row", further))
        plan = self._plan.model_copy(update={"annotated": further.annotated, "carried": further.carried})
        data = {f"{GIVEN}{index}": bytes_ for index, (bytes_, _) in given.items()}
        images = _GivenImages(services.images, data, services.budgets.max_image_bytes)
        services = replace(services, images=images)
        tables = [
            self._explain(shard, services) for shard in cut_shards(parsed, plan, max_bytes=WITHOUT_LIMIT)
        ]
        table = _joined(tables)
        indexes = table[NUMBERS].to_pylist()
        if given:
            uris = zip(indexes, table["uri"].to_pylist(), strict=True)
            shown = [given[index][1] if index in given else uri for index, uri in uris]
            table = _replaced(table, "uri", pa.array(shown, pa.string()))
        table = _replaced(table, NUMBERS, pa.array([numbers[index] for index in indexes], pa.int64()))
        return _portable(table) if self._portable else table

    def output_schema(self, batch: "pa.Table | pa.RecordBatch | Columns | Any") -> pa.Schema:
        """Return the columns of the results for batches with the columns of this one.

        It loads the network, and reads no image.
        """
        columns = _as_table(batch).schema
        return self(
            pa.table([pa.nulls(1, column.type) for column in columns], columns.remove_metadata())
        ).schema

    def _numbers(self, rows: pa.Table) -> tuple[Sequence[int], pa.Table]:
        """The numbers of the rows, and the rows without them."""
        if NUMBERS not in rows.column_names:
            return self._state.count(len(rows)), rows
        column = rows[NUMBERS]
        if not pa.types.is_integer(column.type):
            message = f"The column {NUMBERS!r} is {column.type}: it must hold the number of each row."
            raise InvalidInput(message)
        return [number or 0 for number in column.to_pylist()], rows.drop_columns([NUMBERS])

    def _given_bytes(self, rows: pa.Table) -> tuple[dict[int, tuple[bytes, str | None]], pa.Table]:
        """Images that come as bytes, by row, with what they are called; the rows, with URIs made for them."""
        name = self._bytes_column or next((one for one in BYTES_NAMES if _holds_bytes(rows, one)), None)
        column = self._options.column or next((one for one in IMAGE_NAMES if one in rows.column_names), None)
        if name is None:
            if column and column in rows.column_names and pa.types.is_null(rows.schema.field(column).type):
                rows = _replaced(rows, column, pa.nulls(len(rows), pa.string()))
            return {}, rows
        if not _holds_bytes(rows, name):
            there = f"is {rows.schema.field(name).type}" if name in rows.column_names else "is not there"
            message = f"The column {name!r} {there}: it must hold encoded images, as bytes."
            raise InvalidInput(message)
        values: list[Any] = rows[name].to_pylist()
        rows = rows.drop_columns([name])
        column = None if column == name else column
        names = rows[column].to_pylist() if column else [None] * len(values)
        given: dict[int, tuple[bytes, str | None]] = {}
        uris: list[str | None] = []
        for index, (value, known) in enumerate(zip(values, names, strict=True)):
            data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            uris.append(known if data is None else f"{GIVEN}{index}")
            if data is not None:
                given[index] = data, known if known is not None else path
        return given, _replaced(rows, column or IMAGE_NAMES[0], pa.array(uris, pa.string()))

    def _further(self, rows: pa.Table) -> FurtherColumns:
        """The columns beside the image. Raises InvalidInput if one is missing or clashes."""
        reader = ArrowReader(self._options, "parquet")
        kinds = reader.kinds_of(rows.schema)
        used = reader.used([name for name, _ in kinds])
        carried, _ = choose_carried(kinds, used, self._options, self._types)
        return FurtherColumns(self._options, carried)

    def _explain(self, shard: Shard, services: Services) -> pa.Table:
        """The file of a shard, as a table with its metadata."""
        with TemporaryDirectory(prefix="gradcam-") as folder:
            store = FolderStore(Path(folder))
            context = JobContext(Deadline(self._timeout_s), lambda _: None, is_last_attempt=True)
            run_shard(shard, replace(services, stores=_OneStore(store)), context)
            return pq.read_table(io.BytesIO(store.get(data_key(shard.key))))


class _State:
    """What one process has loaded and counted."""

    def __init__(self) -> None:
        self._lock, self._made = threading.Lock(), 0
        self._services: Services | None = None

    def services(self, build: Callable[[Settings], Services], settings: Settings | None) -> Services:
        with self._lock:
            if self._services is None:
                settings = settings or _settings_of_process()
                service_factory.prepare(settings)
                self._services = build(settings)
            return self._services

    def count(self, rows: int) -> range:
        with self._lock:
            self._made += rows
            return range(self._made - rows, self._made)


@dataclass(frozen=True)
class _OneStore:
    """See `gradcam_worker.execution.services.StorageProvider`."""

    store: Store

    def open(self, uri: str | None = None) -> Store:  # noqa: ARG002
        return self.store


@dataclass(frozen=True)
class _GivenImages:
    """See `gradcam_worker.images.prepare.ImageFetcher`."""

    others: ImageFetcher
    given: Mapping[str, bytes]
    max_bytes: int

    def fetch(self, image: ImageRef, deadline: Deadline, max_bytes: int | None = None) -> FetchedBytes:
        if image.uri not in self.given:
            return self.others.fetch(image, deadline, max_bytes)
        data = self.given[image.uri]
        if len(data) > min(self.max_bytes, max_bytes or self.max_bytes):
            message = f"The image has {len(data):,} bytes; at most {self.max_bytes:,} are allowed."
            raise ImageTooLarge(message)
        return verified(image, data)


def _settings_of_process() -> Settings:
    """Those of the environment, and every file of this machine: whoever calls may read it anyway."""
    settings = Settings.from_environment()
    if "file" in settings.image_schemes:
        return settings
    return settings.model_copy(
        update={"image_schemes": (*settings.image_schemes, "file"), "image_roots": ("/",)}
    )


def _as_table(batch: Any) -> pa.Table:
    """A batch of any kind as a table. Raises InvalidInput."""
    try:
        if isinstance(batch, pa.Table):
            return batch
        if isinstance(batch, pa.RecordBatch):
            return pa.Table.from_batches([batch])
        if isinstance(batch, Mapping):
            return pa.table({str(name): pa.array(list(values)) for name, values in batch.items()})
        if hasattr(batch, "columns"):
            return pa.Table.from_pandas(batch, preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowException, TypeError, ValueError) as error:
        message = f"The batch cannot be read as columns: {error}"
        raise InvalidInput(message) from error
    message = f"A batch is an Arrow table, a dict of columns or a DataFrame; this is {type(batch).__name__}."
    raise InvalidInput(message)


def _holds_bytes(rows: pa.Table, name: str) -> bool:
    """Whether a column holds encoded images, by themselves or with a path."""
    if name not in rows.column_names:
        return False
    kind = rows.schema.field(name).type
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and "binary" in str(kind.field(index).type)
    return "binary" in str(kind)


def _replaced(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    """A table with another column under this name; its metadata stay."""
    index = table.schema.get_field_index(name)
    if index < 0:
        return table.append_column(name, column)
    kind = table.schema.field(index).with_type(column.type)
    return table.set_column(index, kind, column)


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """The tables of shards as one, with metadata that count all of them."""
    if len(tables) == 1:
        return tables[0]
    metadata = [json.loads(table.schema.metadata[METADATA_KEY]) for table in tables]
    codes = sum((Counter(one["codes"]) for one in metadata), Counter[str]())
    counts = {name: sum(one[name] for one in metadata) for name in ("rows", "failed")}
    merged = {**metadata[0], **counts, "codes": dict(sorted(codes.items()))}
    table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(merged, sort_keys=True).encode()})


def _portable(table: pa.Table) -> pa.Table:
    """The table with types that every engine has."""
    fields = [one.with_type(_portable_type(one.type)).with_nullable(nullable=True) for one in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata))


def _portable_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return pa.list_(_portable_type(kind.value_type))
    return kind


def _columns_of(image: Any) -> dict[str, Any]:
    """An item of `explain_images` as columns. Raises InvalidInput."""
    if isinstance(image, Mapping):
        return {str(name): value for name, value in image.items()}
    if isinstance(image, Path):
        return {"uri": image.absolute().as_uri()}
    if isinstance(image, bytes | bytearray | memoryview):
        return {"bytes": bytes(image)}
    if isinstance(image, str):
        return {"uri": image}
    message = (
        f"An image is a URI, a path, encoded bytes or a dict of columns; this is {type(image).__name__}."
    )
    raise InvalidInput(message)


def _alike(group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same columns for all: those of any."""
    names = dict.fromkeys(name for one in group for name in one)
    return [{name: one.get(name) for name in names} for one in group]


RESULT_COLUMNS = ("row", "id", "uri", "sha256", "error", "error_detail", "class_id", "wnid", "class_name")


def _results(table: pa.Table) -> Iterator[ImageResult]:
    """The records of a table, image by image."""
    grid = json.loads(table.schema.metadata[METADATA_KEY])["grid"]
    for _, group in itertools.groupby(table.to_pylist(), key=lambda record: record["row"]):
        records = list(group)
        first = records[0]
        classes = [_class_result(one, grid) for one in records if one["error"] is None]
        common = {name: first[name] for name in RESULT_COLUMNS[:6]}
        yield ImageResult(**common, classes=tuple(classes))


def _class_result(record: dict[str, Any], grid: Sequence[int]) -> ClassResult:
    heatmap = np.asarray(record["heatmap"], np.float32).reshape(grid)
    known = {*RESULT_COLUMNS, "heatmap", "rank", "probability"}
    values = {name: value for name, value in record.items() if name not in known}
    return ClassResult(
        record["class_id"],
        record["wnid"],
        record["class_name"],
        record["rank"],
        record["probability"],
        heatmap,
        values,
    )
