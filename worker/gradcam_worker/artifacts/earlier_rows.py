"""Takes the rows of a shard over from files that earlier runs or shards wrote, found by their digests.

A row that is taken over keeps its results. Its number, its id and the carried columns are those of the new
row.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.columns import arrow_type, carried_array
from gradcam_worker.artifacts.dataset import (
    DIGEST_COLUMN,
    Grid,
    read_errors_as_storage_unavailable,
    read_explained_rows,
    read_metadata,
)
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.schemas.shard import Shard, data_key, place_in, split_place
from gradcam_worker.schemas.status import NetworkRef
from gradcam_worker.storage.ranged_file import RangedFile
from gradcam_worker.storage.store import Store

if TYPE_CHECKING:
    import pyarrow as pa

DIGEST_COLUMNS = [DIGEST_COLUMN, "error"]


@dataclass(frozen=True)
class EarlierRows:
    """Rows of a shard that earlier files hold, and what all of these files have in common."""

    table: "pa.Table"  # the records, with the numbers, ids and carried columns of the shard's rows
    indexes: frozenset[int]  # in the shard
    network: NetworkRef
    grid: Grid
    method: MethodSpec
    features: int | None  # channels of the column of features, if there is one

    def differs_from(self, network: NetworkRef, grid: Grid, method: MethodSpec) -> bool:
        """Whether rows that these compute cannot be in one file with them."""
        ours, theirs = ({"name": spec.name, **spec.model_dump(mode="json")} for spec in (self.method, method))
        return (self.network, self.grid, ours) != (network, grid, theirs)


def find_earlier_rows(
    shard: Shard,
    digests: Sequence[str | None],
    store: Store,
    deadline: Deadline,
    existing: bytes | None,
) -> EarlierRows | None:
    """Read the rows of a shard from its own earlier file, if there is one, and from the places that it names.

    Rows are left where they are if they were computed with other weights than the shard asks for, or than the
    first rows that were found.

    Args:
        shard: The shard.
        digests: Of its rows.
        store: Opened at the shard's output.
        deadline: The shard's.
        existing: A file that an earlier run of this very shard wrote: its rows are known by their numbers.

    Returns:
        The rows that were found; None if there are none.

    Raises:
        StorageUnavailable: The storage failed, or a file is damaged.
    """
    import pyarrow as pa

    found = [] if existing is None else _explained_rows(existing, shard)
    known = found[0].indexes if found else frozenset()
    missing = {
        index: digest for index, digest in enumerate(digests) if digest is not None and index not in known
    }
    for name, groups in _by_file(shard.reuse).items():
        file = _open(store, name, deadline)
        if file is None or not missing:
            continue
        with read_errors_as_storage_unavailable():
            rows = _take(file, groups, shard, missing)
        if rows is None or (found and rows.differs_from(found[0].network, found[0].grid, found[0].method)):
            continue
        found.append(rows)
        for index in rows.indexes:
            del missing[index]
    if not found:
        return None
    with read_errors_as_storage_unavailable():
        table = pa.concat_tables([rows.table for rows in found], promote_options="default")
    first = found[0]
    indexes = frozenset().union(*(rows.indexes for rows in found))
    return EarlierRows(table, indexes, first.network, first.grid, first.method, first.features)


def _explained_rows(existing: bytes, shard: Shard) -> list[EarlierRows]:
    """The rows of a shard's own file that were explained, whichever version wrote it."""
    table, numbers = read_explained_rows(existing)
    if not numbers:
        return []
    with read_errors_as_storage_unavailable():
        facts = _facts(_metadata(existing))
    return [EarlierRows(table, frozenset(number - shard.first for number in numbers), **facts)]


def _facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `EarlierRows` that the metadata of a file tells."""
    return {
        "network": NetworkRef.model_validate(metadata["network"]),
        "grid": tuple(metadata["grid"]),
        "method": MethodSpec.model_validate(metadata["method"]),
        "features": metadata.get("features"),
    }


def _metadata(data: bytes) -> dict[str, Any]:
    import pyarrow.parquet as pq

    return read_metadata(pq.read_schema(io.BytesIO(data)))


def read_digests(
    store: Store, name: str, deadline: Deadline, accepts: Callable[[NetworkRef], bool]
) -> list[tuple[str, NDArray[np.uint64]]]:
    """Read the digests of the explained rows of a file; of a merged one no other columns are read.

    Args:
        store: Opened at the dataset.
        name: The name of the file, without folder and ending.
        deadline: By when it has to be read.
        accepts: Whether rows that a network has explained may be taken over.

    Returns:
        Each place in it, see `Shard.reuse`, with the digests of its rows. None of a file without digests, or
        of one that is gone.

    Raises:
        StorageUnavailable: It is no file of a dataset, or it is damaged.
    """
    import pyarrow.parquet as pq

    opened = _open(store, name, deadline)
    if opened is None:
        return []
    with read_errors_as_storage_unavailable():
        file = pq.ParquetFile(opened, pre_buffer=True)
        metadata = read_metadata(file.schema_arrow)
        network = NetworkRef.model_validate(metadata["network"])
        if DIGEST_COLUMN not in file.schema_arrow.names or not accepts(network):
            return []
        if "shards" not in metadata:
            return [(name, _digests(file.read(DIGEST_COLUMNS)))]
        return [
            (place_in(name, group), _digests(file.read_row_group(group, DIGEST_COLUMNS)))
            for group in range(file.num_row_groups)
        ]


def _digests(table: "pa.Table") -> NDArray[np.uint64]:
    """The digests of explained rows, once each."""
    import pyarrow.compute as pc

    explained = pc.and_(pc.is_null(table["error"]), pc.is_valid(table[DIGEST_COLUMN]))
    texts = table.filter(explained)[DIGEST_COLUMN].unique().to_pylist()
    return np.frombuffer(bytes.fromhex("".join(texts)), ">u8").astype(np.uint64)


def _by_file(places: Iterable[str]) -> dict[str, list[int]]:
    """Row groups by file; of a shard's file, which has one, no number is given."""
    files: dict[str, list[int]] = {}
    for place in places:
        name, group = split_place(place)
        files.setdefault(name, []).extend([] if group is None else [group])
    return files


def _open(store: Store, name: str, deadline: Deadline) -> BinaryIO | None:
    """Open a file: a shard's as a whole, a merged one to be read in parts; None if it is gone."""
    deadline.check("reuse")
    if name.startswith("merged-"):
        return cast("BinaryIO", RangedFile(store, data_key(name)))
    data = store.find(data_key(name), deadline)
    return None if data is None else io.BytesIO(data)


def _take(
    file: BinaryIO, groups: Sequence[int], shard: Shard, missing: Mapping[int, str]
) -> EarlierRows | None:
    """The rows of a shard that some groups of a file hold; all groups if none are named."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file, pre_buffer=True)
    metadata = read_metadata(parquet.schema_arrow)
    network = NetworkRef.model_validate(metadata["network"])
    if DIGEST_COLUMN not in parquet.schema_arrow.names or shard.weights_sha256 not in {
        None,
        network.weights_sha256,
    }:
        return None
    table = parquet.read_row_groups([*groups] or [*range(parquet.num_row_groups)])
    table = table.filter(pc.is_null(table["error"])).replace_schema_metadata(None)
    records = _records_by_digest(table)
    positions = {index: records[digest] for index, digest in missing.items() if digest in records}
    if not positions:
        return None
    return EarlierRows(_as_rows_of(shard, table, positions), frozenset(positions), **_facts(metadata))


def _records_by_digest(table: "pa.Table") -> dict[str, NDArray[np.int64]]:
    """The positions of the records of each digest; where several rows have it, of the first of them."""
    rows = table["row"].to_numpy()
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    ends = [*starts[1:].tolist(), len(rows)][: len(starts)]  # none where no row was explained
    digests = table[DIGEST_COLUMN].take(starts).to_pylist()
    records: dict[str, NDArray[np.int64]] = {}
    for digest, start, end in zip(digests, starts.tolist(), ends, strict=True):
        if digest is not None:
            records.setdefault(digest, np.arange(start, end))
    return records


def _as_rows_of(shard: Shard, table: "pa.Table", positions: Mapping[int, NDArray[np.int64]]) -> "pa.Table":
    """Records of an earlier file as those of a shard's rows, by index in it."""
    import pyarrow as pa

    indexes = np.repeat([*positions], [len(records) for records in positions.values()])
    taken = table.take(np.concatenate([*positions.values()]))
    rows = [shard.rows[index] for index in indexes.tolist()]

    def values(column: int) -> list[Any]:
        return [row.carried[column] if row.carried and column < len(row.carried) else None for row in rows]

    replaced = {
        "row": pa.array(indexes + shard.first, pa.int64()),
        "id": pa.array([row.id for row in rows], pa.string()),
        **{
            name: carried_array(values(column), arrow_type(kind))
            for column, (name, kind) in enumerate(shard.carried.items())
        },
    }
    for name, array in replaced.items():
        place = taken.column_names.index(name) if name in taken.column_names else None
        taken = taken.append_column(name, array) if place is None else taken.set_column(place, name, array)
    return taken
