"""Merged files: the files of many shards as one, without loss. `gradcam backfill compact` makes them.

The metadata of a merged file has `shards` in place of `shard`, `key` and `first`: of each shard its key, its
first row, its number of rows, and the row groups that hold them. So a merged file tells which shards are
done, and one shard is read without the rest.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from gradcam_worker import __version__
from gradcam_worker.artifacts.dataset import (
    METADATA_KEY,
    read_errors_as_storage_unavailable,
    read_metadata,
)
from gradcam_worker.schemas.shard import DATASET, MERGED_PREFIX

if TYPE_CHECKING:
    import pyarrow as pa

MIN_GROUP_RECORDS = 1024  # a shard of 256 rows needs no row group of its own
MAX_GROUP_RECORDS = 4096  # whoever reads one row reads its group
# Of the metadata of shards: they must be equal in one file.
COMMON = ("backfill", "grid", "network", "method", "against", "carried", "features")


@dataclass(frozen=True)
class MergedShard:
    """A shard within a merged file."""

    key: str
    first: int  # the number of its first row in the input
    rows: int
    groups: tuple[int, int]  # the row groups with its records: the first one, and the one after the last


@dataclass(frozen=True)
class Part:
    """The records of one shard, from its own file or from a merged one."""

    key: str
    first: int
    rows: int
    common: dict[str, Any]  # metadata that all parts of a file share
    table: "pa.Table"
    warnings: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # as in `dataset.Summary`

    def fits(self, other: "Part") -> bool:
        """Whether both may be in one file."""
        return self.common == other.common


def read_merged_shards(file: BinaryIO) -> tuple[MergedShard, ...]:
    """Read which shards a merged file holds; only its end is read.

    Raises:
        StorageUnavailable: It is no merged file, or it is damaged.
    """
    import pyarrow.parquet as pq

    with read_errors_as_storage_unavailable():
        return _shards(read_metadata(pq.read_schema(file)))


def _shards(metadata: dict[str, Any]) -> tuple[MergedShard, ...]:
    return tuple(
        MergedShard(entry["key"], entry["first"], entry["rows"], tuple(entry["groups"]))
        for entry in metadata["shards"]
    )


def read_parts(data: bytes, name: str) -> list[Part]:
    """Read a shard's file, or a merged one, shard by shard.

    Args:
        data: The file.
        name: Its name, without folder and ending. Files of earlier versions have their key only there.

    Returns:
        The shards in it.

    Raises:
        StorageUnavailable: It is no file of a dataset, or it is damaged.
    """
    import pyarrow.parquet as pq

    with read_errors_as_storage_unavailable():
        file = pq.ParquetFile(io.BytesIO(data))
        metadata = read_metadata(file.schema_arrow)
        common = {field: metadata[field] for field in COMMON if field in metadata}
        if "shards" not in metadata:
            table = file.read().replace_schema_metadata(None)
            first = int(metadata["first"])
            rows, warnings = int(metadata["rows"]), metadata.get("warnings", {})
            return [Part(metadata.get("key", name), first, rows, common, table, warnings)]
        parts, warnings = [], metadata.get("warnings", {})
        for shard in _shards(metadata):
            table = file.read_row_groups([*range(*shard.groups)]).replace_schema_metadata(None)
            table = table.filter(_within(table, shard))
            parts.append(Part(shard.key, shard.first, shard.rows, common, table, warnings))
            warnings = {}  # they are those of the whole file
        return parts


def _within(table: "pa.Table", shard: MergedShard) -> "pa.ChunkedArray":
    import pyarrow.compute as pc

    rows = table["row"]
    after = pc.greater_equal(rows, shard.first)
    return pc.and_(after, pc.less(rows, shard.first + shard.rows))


def size_of_records(data: bytes) -> int:
    """The bytes of a Parquet file without its index, which for a small file is a large part of it."""
    return len(data) - int.from_bytes(data[-8:-4], "little")


def merge(parts: Sequence[Part]) -> tuple[str, bytes]:
    """Encode shards as one file.

    Args:
        parts: At least one, in the order of their rows; each fits the first one.

    Returns:
        The name of the file, without folder and ending, and the file. The same parts give the same file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Files of earlier versions lack columns.
    columns = pa.unify_schemas([part.table.schema for part in parts])
    codes: Counter[str] = Counter()
    shards: list[dict[str, Any]] = []
    tables: list[pa.Table] = []  # of one group, or of several if a shard is large
    batches: list[pa.Table] = []
    groups = begun = 0
    for number, part in enumerate(parts):
        tables.append(part.table)
        codes.update(part.table["error"].drop_null().to_pylist())
        shards.append({"key": part.key, "first": part.first, "rows": part.rows})
        records = sum(map(len, tables))
        if records >= MIN_GROUP_RECORDS or number == len(parts) - 1:
            after = groups + max(-(-records // MAX_GROUP_RECORDS), 1)
            for shard in shards[begun:]:
                shard["groups"] = [groups, after]
            batches.append(pa.concat_tables(tables, promote_options="default"))
            groups, begun = after, len(shards)
            tables.clear()
    warnings: dict[str, tuple[int, str]] = {}
    for code, (rows, first) in (item for part in parts for item in part.warnings.items()):
        before = warnings.get(code, (0, first))
        warnings[code] = (before[0] + rows, before[1])
    metadata = {
        "schema": DATASET,
        **parts[0].common,
        "rows": sum(part.rows for part in parts),
        "failed": codes.total(),
        "codes": dict(sorted(codes.items())),
        **({"warnings": warnings} if warnings else {}),
        "shards": shards,
        "generator": f"gradcam-worker {__version__}",
    }
    columns = columns.with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    file = io.BytesIO()
    with pq.ParquetWriter(file, columns, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(_with_columns(batch, columns), row_group_size=MAX_GROUP_RECORDS)
    data = file.getvalue()
    index = parts[0].key.partition("-")[0]
    return f"{MERGED_PREFIX}{index}-{hashlib.sha256(data).hexdigest()[:16]}", data


def _with_columns(table: "pa.Table", columns: "pa.Schema") -> "pa.Table":
    """A table with these columns, null where it does not have one."""
    import pyarrow as pa

    there = {*table.column_names}
    arrays = [
        table[column.name] if column.name in there else pa.nulls(len(table), column.type)
        for column in columns
    ]
    return pa.table(arrays, schema=columns)
