import io
import json
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_array_equal

from gradcam_worker.artifacts import dataset
from gradcam_worker.artifacts.dataset import DatasetLayout, ExplainedRow, Outcome
from gradcam_worker.artifacts.truth import Truth
from gradcam_worker.errors import ImageNotFound, StorageUnavailable
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.localization import Localization
from gradcam_worker.gradcam.network import Method
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.schemas.status import NetworkRef, Problem
from gradcam_worker.testing import TinyNetwork

GRID = (4, 4)
NETWORK = NetworkRef(name="efficientnet_lite0", layer="blocks", weights_sha256=None)
NOT_FOUND = Problem.of(ImageNotFound("There is nothing."), stage="fetch", attempt=1)


def shard_of(*rows: Row, **changes: Any) -> Shard:
    fields: dict[str, Any] = {
        "backfill": "01234567-89ab-7def-8123-456789abcdef",
        "index": 0,
        "key": "00000000-0123456789abcdef",
        "first": 10,
        "rows": rows,
        "network": NETWORK.name,
        "target": {"top_n": 1},
        "output": "s3://out",
    }
    return Shard.model_validate({**fields, **changes})


def explained_row(*, normalize: str = "per_class", dark: bool = False, scale: int = 1) -> ExplainedRow:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, 8:, 0 if not dark else 1] = 200
    explanation = explain_image(
        TinyNetwork(), pixels, classes=["red"], method=Method("gradcam", normalize=normalize)
    )
    if scale != 1:
        explanation = type(explanation)(**{**vars(explanation), "heatmaps": explanation.heatmaps * scale})
    image = InputRecord(
        uri="s3://in/a.png", sha256="0" * 64, bytes=9, media_type="image/png", width=160, height=80
    )
    return ExplainedRow(image, explanation, [None if dark else (80, 0, 160, 40)], [None])


def read(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def test_a_file_holds_a_row_for_each_image_and_class_and_one_for_each_that_failed() -> None:
    shard = shard_of(Row(uri="s3://in/a.png", id="a"), Row(uri="https://u:secret@h/b.png?token=1", id="b"))
    data, summary = dataset.to_bytes(shard, NETWORK, GRID, [explained_row(), NOT_FOUND])
    explained, failed = read(data).to_pylist()
    assert (explained["row"], explained["id"], explained["uri"], explained["index"]) == (
        10,
        "a",
        "s3://in/a.png",
        0,
    )
    assert (explained["class_name"], explained["wnid"], explained["class_id"], explained["rank"]) == (
        "red",
        "n1",
        0,
        1,
    )
    assert (explained["width"], explained["height"], explained["box_xyxy"]) == (160, 80, [80, 0, 160, 40])
    assert explained["peak_xy"] == [100, 10]
    assert explained["heatmap"] == [float(row < 2 and column > 1) for row in range(4) for column in range(4)]
    assert explained["error"] is None
    assert failed == dict.fromkeys(explained) | {
        "row": 11,
        "id": "b",
        "uri": "https://h/b.png",
        "row_digest": shard.row_digests()[1],
        "error": "image_not_found",
        "error_detail": "There is nothing.",
    }
    assert (summary.rows, summary.failed, summary.codes) == (2, 1, {"image_not_found": 1})
    assert dataset.read_summary(data) == summary
    assert dataset.to_bytes(shard, NETWORK, GRID, [explained_row(), NOT_FOUND])[0] == data


def test_a_heatmap_that_is_zero_has_no_peak_and_no_box() -> None:
    shard = shard_of(Row(uri="s3://in/a.png"))
    (row,) = read(dataset.to_bytes(shard, NETWORK, GRID, [explained_row(dark=True)])[0]).to_pylist()
    assert (row["peak_xy"], row["box_xyxy"], set(row["heatmap"])) == (None, None, {0.0})


def test_heatmaps_of_a_method_without_normalization_are_in_the_range_from_0_to_1() -> None:
    shard = shard_of(Row(uri="s3://in/a.png"))
    data, _ = dataset.to_bytes(shard, NETWORK, GRID, [explained_row(normalize="none", scale=1_000_000)])
    (row,) = read(data).to_pylist()
    assert max(row["heatmap"]) == 1, "the largest float16 is 65504"
    assert row["raw_max"] == pytest.approx(200 / 255 * 2 / 16)


@pytest.mark.parametrize(
    "outcomes",
    [[], [NOT_FOUND], [explained_row()], [NOT_FOUND, explained_row(), NOT_FOUND]],
    ids=["none", "failed", "explained", "mixed"],
)
def test_all_files_have_the_same_columns(outcomes: list[Outcome]) -> None:
    rows = [Row(uri="s3://in/a.png")] * len(outcomes) or [Row(uri="s3://in/a.png")]
    row_outcomes: list[Outcome | None] = [*outcomes] or [None]
    data, _ = dataset.to_bytes(shard_of(*rows), NETWORK, GRID, row_outcomes)
    file = pq.ParquetFile(io.BytesIO(data))
    assert file.schema_arrow.remove_metadata().equals(dataset.schema(DatasetLayout(GRID)))
    assert file.metadata.num_rows == len(outcomes)
    assert len(read(data)) == len(outcomes)


def test_the_explained_rows_of_an_earlier_file_are_kept_byte_for_byte() -> None:
    rows = [Row(uri=f"s3://in/{number}.png") for number in range(5)]
    all_explained: list[Outcome | None] = [explained_row()] * 5
    complete_file, _ = dataset.to_bytes(shard_of(*rows), NETWORK, GRID, all_explained)
    partial: list[Outcome | None] = [NOT_FOUND, explained_row(), NOT_FOUND, explained_row(), NOT_FOUND]
    partial_file, _ = dataset.to_bytes(shard_of(*rows), NETWORK, GRID, partial)
    kept_rows, kept_numbers = dataset.read_explained_rows(partial_file)
    assert kept_numbers == {11, 13}
    remaining = [None if 10 + index in kept_numbers else row for index, row in enumerate(all_explained)]
    data, summary = dataset.to_bytes(shard_of(*rows), NETWORK, GRID, remaining, kept_rows)
    assert data == complete_file
    assert summary.failed == 0


def test_rows_of_before_a_change_of_sizing_are_kept_beside_measured_ones() -> None:
    shard = shard_of(*(Row(uri=f"s3://in/{number}.png") for number in range(2)), metrics=["confidence_drop"])
    kept_rows, _ = dataset.read_explained_rows(
        dataset.to_bytes(shard, NETWORK, GRID, [explained_row(), NOT_FOUND])[0]
    )
    data, _ = dataset.to_bytes(shard, NETWORK, GRID, [None, explained_row()], kept_rows, has_shown=True)
    assert read(data)["row"].to_pylist() == [10, 11]


@pytest.mark.parametrize("method", [{}, {"name": "gradcam"}], ids=["by-default", "by-name"])
def test_a_file_names_its_method(method: dict[str, Any]) -> None:
    shard = shard_of(Row(uri="s3://in/a.png"), method=method)
    table = read(dataset.to_bytes(shard, NETWORK, GRID, [NOT_FOUND])[0])
    assert json.loads(table.schema.metadata[b"gradcam"])["method"]["name"] == "gradcam"


def test_rows_of_another_grid_cannot_be_kept() -> None:
    shard = shard_of(Row(uri="s3://in/a.png"))
    kept_rows, _ = dataset.read_explained_rows(dataset.to_bytes(shard, NETWORK, GRID, [explained_row()])[0])
    with pytest.raises(StorageUnavailable, match="not a shard's file, or is damaged"):
        dataset.to_bytes(shard, NETWORK, (7, 7), [None], kept_rows)


def test_failed_rows_are_an_input_for_another_backfill() -> None:
    rows = (
        Row(uri="s3://in/\N{SNOWMAN}.png", id="a", sha256="0" * 64, version="etag"),
        Row(uri="s3://in/b.png"),
        Row(uri="s3://in/c.png"),
    )
    lines = (
        dataset.failed_lines(shard_of(*rows), [NOT_FOUND, explained_row(), NOT_FOUND]).decode().splitlines()
    )
    first, last = map(json.loads, lines)
    assert first == {
        "image": "s3://in/\N{SNOWMAN}.png",
        "id": "a",
        "sha256": "0" * 64,
        "row": 10,
        "error": NOT_FOUND.model_dump(mode="json"),
    }
    assert (last["image"], last["row"], "id" in last) == ("s3://in/c.png", 12, False)
    assert dataset.failed_lines(shard_of(*rows), [explained_row()] * 3) == b""


@pytest.mark.parametrize("data", [b"", b"PAR1", b"{}"], ids=["empty", "short", "json"])
def test_a_file_that_is_not_a_shards_file_is_refused(data: bytes) -> None:
    for read_file in (
        dataset.read_summary,
        dataset.read_explained_rows,
        lambda data: [*dataset.read_batches(data)],
    ):
        with pytest.raises(
            StorageUnavailable, match="The existing file is not a shard's file, or is damaged"
        ):
            read_file(data)


def test_the_explained_rows_are_read_in_batches() -> None:
    shard = shard_of(*[Row(uri="s3://in/a.png")] * 3)
    data, _ = dataset.to_bytes(shard, NETWORK, GRID, [explained_row(), NOT_FOUND, explained_row()])
    batches = [*dataset.read_batches(data, max_rows=2)]
    assert [len(batch.class_ids) for batch in batches] == [1, 1]
    assert all(batch.heatmaps.shape == (1, *GRID) for batch in batches)
    assert batches[1].record(0)["row"] == 12


def test_fewer_rows_are_read_at_once_where_heatmaps_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = shard_of(*[Row(uri="s3://in/a.png")] * 3)
    data, _ = dataset.to_bytes(shard, NETWORK, GRID, [explained_row()] * 3)
    monkeypatch.setattr(dataset, "MAX_BATCH_CELLS", 2 * 16 + 1)
    assert [len(batch.class_ids) for batch in dataset.read_batches(data)] == [2, 1]


def test_what_is_known_of_an_image_and_the_columns_of_the_input_are_in_the_file() -> None:
    one = explained_row()
    found = Localization(0.25, 0.75, 0.5, pointing_hit=True, iou=0.125)
    truth = Truth((0, 2), 1, ((0, 0, 80.5, 40),), "s3://in/mask.png")
    features = np.arange(3, dtype=np.float16)[None]
    outcomes: list[Outcome | None] = [
        replace(one, localizations=[found], truth=truth, features=features),
        one,
        replace(one, truth=Truth(())),
        NOT_FOUND,
    ]
    rows = [Row(uri="s3://in/a.png", carried=carried) for carried in (("x", 7), ("y",), None, (None, 8))]
    shard = shard_of(*rows, annotated=True, features=True, carried={"site": "string", "dose": "int64"})
    data, _ = dataset.to_bytes(shard, NETWORK, GRID, outcomes, features=3)
    table = read(data)
    assert table.column_names[-13:] == [
        "heat_at_border",
        "truth_ids",
        "correct",
        "truth_rank",
        "heat_inside",
        "inside_area",
        "pointing_hit",
        "iou",
        "truth_boxes",
        "truth_mask",
        "heat_features",
        "site",
        "dose",
    ]
    first, *_ = table.to_pylist()
    assert (first["truth_boxes"], first["truth_mask"]) == ([[0, 0, 80.5, 40]], "s3://in/mask.png")
    assert table["site"].to_pylist() == ["x", "y", None, None]
    assert table["dose"].to_pylist() == [7, None, None, 8]
    (batch,) = dataset.read_batches(data)
    assert batch.carried == {"site": "string", "dose": "int64"}
    for name, expected in {
        "heat_at_border": [0.25, nan, nan],
        "heat_inside": [0.75, nan, nan],
        "inside_area": [0.5, nan, nan],
        "iou": [0.125, nan, nan],
        "pointing_hit": [1, -1, -1],
        "correct": [1, -1, -1],
        "truth_ranks": [1, 0, 0],
        "first_truth": [0, -1, -1],
        "heat_features": [[0, 1, 2], [nan] * 3, [nan] * 3],
    }.items():
        assert_array_equal(getattr(batch, name), expected, name)
    assert batch.truth_ids is not None
    assert [part.tolist() for part in batch.truth_ids] == [[0, 2, 2, 2], [0, 2]]


def test_a_file_of_an_earlier_version_has_none_of_it_and_its_rows_are_kept() -> None:
    shard = shard_of(*[Row(uri="s3://in/a.png")] * 2)
    data, _ = dataset.to_bytes(shard, NETWORK, GRID, [explained_row(), NOT_FOUND])
    table = read(data).drop_columns(["row_digest", "heat_at_border", dataset.MISSING_COLUMN])
    old = io.BytesIO()
    pq.write_table(table, old)
    (batch,) = dataset.read_batches(old.getvalue())
    assert (batch.heat_at_border, batch.correct, batch.truth_ids, batch.heat_features) == (None,) * 4
    kept_rows, _ = dataset.read_explained_rows(old.getvalue())
    again = shard.model_copy(update={"annotated": True, "carried": {"site": "string"}})
    outcomes: list[Outcome | None] = [None, replace(explained_row(), localizations=[Localization(1.0)])]
    rows = read(dataset.to_bytes(again, NETWORK, GRID, outcomes, kept_rows)[0])
    assert rows["heat_at_border"].to_pylist() == [None, 1]


def test_a_file_without_annotations_has_no_columns_for_them() -> None:
    shard = shard_of(Row(uri="s3://in/a.png"))
    names = read(dataset.to_bytes(shard, NETWORK, GRID, [explained_row()])[0]).column_names
    assert names[-2:] == ["row_digest", "heat_at_border"]
    assert {*names} < dataset.own_columns()
