"""The table of an audit's records: numbers and texts without heatmaps, as its page filters and sorts them.

    <output>/rows.parquet         a record for each explained image and class, in the dataset's order
    <output>/rows-more.parquet    in the same order, what is known when all files are read: causes, clusters
    <output>/image-links.parquet  on request: for some of them a URL of their image, which expires

A page reads one column of a million records with a handful of range requests, since a row group holds
`GROUP_RECORDS` records.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import Batch

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_FILE, MORE_FILE, LINKS_FILE = "rows.parquet", "rows-more.parquet", "image-links.parquet"
GROUP_RECORDS = 2**18
LINKS_GROUP_RECORDS = 512  # a group of links is read for one of them
CODEC = "snappy"  # a fifth of the time of zstd in a browser
FILE_COLUMN, TRUTH_COLUMN = "file", "truth"
LEFT_OUT = frozenset(  # of the dataset's own columns: the report, or the file of the record, has them
    {"sha256", "wnid", "class_name", "overlay", "error", "error_detail", "row_digest", "truth_mask"}
)


class RowTable:
    """Writes the table, batch by batch. Memory does not grow with the dataset."""

    def __init__(self, output: Path) -> None:
        """`output`: the audit's folder, which exists."""
        self._output = output
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None
        self._pending: list[pa.Table] = []
        self._pending_records = 0
        self.records = 0

    def add(self, batch: Batch, file: int, more: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Add the records of a batch.

        Args:
            batch: The records.
            file: The index of their file among those of the report.
            more: Further columns, one number for each record.
        """
        import pyarrow as pa

        count = len(batch.class_ids)
        if not count:
            return
        columns: dict[str, Any] = {
            name: batch.other_columns[name]
            for name in batch.other_columns.schema.names
            if name not in LEFT_OUT and _is_scalar(batch.other_columns.schema.field(name).type)
        }
        if "truth_ids" in batch.other_columns.schema.names:
            columns[TRUTH_COLUMN] = _first_of_each(batch.other_columns["truth_ids"])
        columns[FILE_COLUMN] = np.full(count, file, np.int32)
        columns |= more or {}
        table = pa.table(columns)
        if self._schema is None:  # an earlier version may have written a file with fewer columns
            self._schema = table.schema
        self._pending.append(_with_schema(table, self._schema))
        self._pending_records += count
        self.records += count
        if self._pending_records >= GROUP_RECORDS:
            self._flush()

    def finish(self, more: Mapping[str, NDArray[Any]] | None = None) -> int:
        """Complete the files.

        Args:
            more: Columns that are known only now, one number for each record that was added, in order.

        Returns:
            The number of records. Without any there is no file.
        """
        self._flush()
        if self._writer:
            self._writer.close()
            if more:
                import pyarrow as pa
                import pyarrow.parquet as pq

                table = pa.table(dict(more))
                pq.write_table(
                    table,
                    self._output / MORE_FILE,
                    row_group_size=GROUP_RECORDS,
                    **_options(table.schema),
                )
        return self.records

    def _flush(self) -> None:
        if not self._pending:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.concat_tables(self._pending)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._output / ROWS_FILE, table.schema, **_options(table.schema))
        self._writer.write_table(table.combine_chunks(), row_group_size=len(table))
        self._pending, self._pending_records = [], 0


def read_columns(output: Path, names: Iterable[str]) -> "dict[str, NDArray[Any]]":
    """Read columns of a finished table; those that it lacks are left out.

    Args:
        output: The audit's folder.
        names: The columns, of numbers.

    Returns:
        Each column, in the order of the records.
    """
    import pyarrow.parquet as pq

    found: dict[str, NDArray[Any]] = {}
    for file in (output / ROWS_FILE, output / MORE_FILE):
        if file.exists():
            there = set(pq.read_schema(file).names)
            table = pq.read_table(file, columns=[name for name in names if name in there])
            found |= {name: table[name].to_numpy() for name in table.column_names}
    return found


def write_links(output: Path, places: NDArray[np.int64], sign: Callable[[str], str | None]) -> int:
    """Write the table of links to images.

    Args:
        output: The audit's folder, in which the table of rows is finished.
        places: Which records get a link, ascending.
        sign: Returns the URL of an image, by its URI; None: it has none.

    Returns:
        The number of records with a link. Without any there is no file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    (output / LINKS_FILE).unlink(missing_ok=True)
    if not len(places):
        return 0
    uris: list[str | None] = []
    begin = 0
    for group in pq.ParquetFile(output / ROWS_FILE).iter_batches(columns=["uri"]):
        own = places[np.searchsorted(places, begin) : np.searchsorted(places, begin + len(group))] - begin
        uris += group["uri"].take(pa.array(own)).to_pylist()
        begin += len(group)
    urls = [sign(uri) if uri else None for uri in uris]
    table = pa.table({"place": pa.array(places, pa.int32()), "url": pa.array(urls, pa.string())})
    table = table.drop_null()
    if len(table):
        pq.write_table(
            table,
            output / LINKS_FILE,
            row_group_size=LINKS_GROUP_RECORDS,
            compression="zstd",
            use_dictionary=False,
        )
    return len(table)


def describe_columns(output: Path) -> list[dict[str, str]]:
    """Return the name and the kind of each column, for a page: number, boolean, time or text."""
    import pyarrow.parquet as pq

    described: dict[str, dict[str, str]] = {}
    for file in (output / ROWS_FILE, output / MORE_FILE):
        if file.exists():
            schema = pq.read_schema(file)
            described |= {
                field.name: {"name": field.name, "kind": _kind(field.type), "file": file.name}
                for field in schema
            }
    return list(described.values())


def _is_scalar(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return not pa.types.is_nested(kind) and not pa.types.is_null(kind) and _kind(kind) != "other"


def _kind(kind: "pa.DataType") -> str:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_boolean(kind):
        return "boolean"
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return "number"
    if types.is_timestamp(kind) or types.is_date(kind):
        return "time"
    return "text" if types.is_string(kind) or types.is_large_string(kind) else "other"


def _first_of_each(lists: "pa.Array") -> "pa.Array":
    """The first element of each list; null where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    flat, ends = lists.flatten(), np.cumsum(lengths.to_numpy(zero_copy_only=False))
    starts = ends - lengths.to_numpy(zero_copy_only=False)
    has_any = lengths.to_numpy(zero_copy_only=False) > 0
    return flat.take(pa.array(np.where(has_any, starts, 0), mask=~has_any))


def _with_schema(table: "pa.Table", schema: "pa.Schema") -> "pa.Table":
    import pyarrow as pa

    columns = [
        table[field.name].cast(field.type, safe=False)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _options(schema: "pa.Schema") -> dict[str, Any]:
    from pyarrow import types

    texts = [field.name for field in schema if types.is_string(field.type) or types.is_integer(field.type)]
    return {"compression": CODEC, "use_dictionary": texts, "data_page_size": 2**20}
