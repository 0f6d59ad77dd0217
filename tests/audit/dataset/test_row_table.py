"""The table that an audit's page filters and sorts."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradcam_worker.artifacts.dataset import Batch
from gradcam_worker.audit.dataset.row_table import (
    MORE_FILE,
    ROWS_FILE,
    RowTable,
    describe_columns,
    read_columns,
)
from gradcam_worker.schemas.options import MethodSpec


def batch(first: int, count: int, **more: pa.Array) -> Batch:
    numbers = np.arange(first, first + count)
    others = pa.RecordBatch.from_pydict(
        {
            "row": pa.array(numbers, pa.int64()),
            "index": pa.array([0] * count, pa.int32()),
            "sha256": pa.array(["0" * 64] * count),
            "peak_xy": pa.array([[1, 2]] * count, pa.list_(pa.int32(), 2)),
            "probability": pa.array(numbers / 100, pa.float32()),
            **more,
        }
    )
    return Batch(
        MethodSpec(),
        np.zeros(count, np.int32),
        np.ones(count, np.int32),
        np.zeros(count, np.float32),
        np.zeros((count, 2, 2), np.float16),
        others,
    )


def test_numbers_and_texts_are_kept_and_lists_are_not(tmp_path: Path) -> None:
    table = RowTable(tmp_path)
    truths = pa.array([[7, 8], [], None, [9]], pa.list_(pa.int32()))
    table.add(batch(0, 4, truth_ids=truths, hospital=pa.array(["a", None, "b", "a"])), 0)
    table.add(batch(4, 1, truth_ids=truths.slice(3), hospital=pa.array(["c"])), 1)
    assert table.finish({"cause": np.array([0, 1, 2, -1, 4], np.int8)}) == 5
    rows = pq.read_table(tmp_path / ROWS_FILE)
    assert rows.column_names == ["row", "index", "probability", "hospital", "truth", "file"]
    assert rows["truth"].to_pylist() == [7, None, None, 9, 9]
    assert rows["file"].to_pylist() == [0, 0, 0, 0, 1]
    assert rows["hospital"].to_pylist() == ["a", None, "b", "a", "c"]
    assert pq.read_table(tmp_path / MORE_FILE)["cause"].to_pylist() == [0, 1, 2, -1, 4]
    read = read_columns(tmp_path, ("row", "cause", "absent"))
    assert {name: values.tolist() for name, values in read.items()} == {
        "row": [0, 1, 2, 3, 4],
        "cause": [0, 1, 2, -1, 4],
    }
    kinds = {column["name"]: column["kind"] for column in describe_columns(tmp_path)}
    assert kinds == {
        **dict.fromkeys(("row", "index", "probability", "truth", "file", "cause"), "number"),
        "hospital": "text",
    }


def test_a_file_of_an_earlier_version_lacks_columns_and_one_of_a_later_has_more(tmp_path: Path) -> None:
    table = RowTable(tmp_path)
    table.add(batch(0, 1, heat_inside=pa.array([0.5], pa.float32())), 0)
    table.add(batch(1, 1), 1)
    table.add(batch(2, 1, later=pa.array([1])), 2)
    table.finish()
    rows = pq.read_table(tmp_path / ROWS_FILE)
    assert rows["heat_inside"].to_pylist() == [0.5, None, None]
    assert "later" not in rows.column_names


def test_row_groups_are_as_large_as_said(tmp_path: Path) -> None:
    table = RowTable(tmp_path)
    for first in range(0, 2**18 + 60_000, 30_000):
        table.add(batch(first, 30_000), 0)
    table.finish()
    file = pq.ParquetFile(tmp_path / ROWS_FILE)
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [
        270_000,
        60_000,
    ]


def test_without_records_there_is_no_table(tmp_path: Path) -> None:
    assert RowTable(tmp_path).finish({"cause": np.zeros(0, np.int8)}) == 0
    assert not list(tmp_path.iterdir())
    assert read_columns(tmp_path, ("row",)) == {}
    assert describe_columns(tmp_path) == []
