import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradcam_worker.artifacts import dataset
from gradcam_worker.artifacts.dataset import Outcome, Seen
from gradcam_worker.errors import ImageNotFound, StorageUnavailable
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.network import Method
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.schemas.status import NetworkRef, Problem
from gradcam_worker.testing import TinyNetwork

GRID = (4, 4)
NETWORK = NetworkRef(name="efficientnet_lite0", layer="blocks", weights_sha256=None)
GONE = Problem.of(ImageNotFound("There is nothing."), stage="fetch", attempt=1)


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


def seen(*, normalize: str = "per_class", dark: bool = False, scale: int = 1) -> Seen:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, 8:, 0 if not dark else 1] = 200
    found = explain_image(
        TinyNetwork(), pixels, classes=["red"], method=Method("gradcam", normalize=normalize)
    )
    if scale != 1:
        found = type(found)(**{**vars(found), "heatmaps": found.heatmaps * scale})
    image = InputRecord(
        uri="s3://in/a.png", sha256="0" * 64, bytes=9, media_type="image/png", width=160, height=80
    )
    return Seen(image, found, [None if dark else (80, 0, 160, 40)], [None])


def read(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def test_a_file_holds_a_row_for_each_image_and_class_and_one_for_each_that_failed() -> None:
    shard = shard_of(Row(uri="s3://in/a.png", id="a"), Row(uri="https://u:secret@h/b.png?token=1", id="b"))
    data, summary = dataset.to_bytes(shard, NETWORK, GRID, [seen(), GONE])
    good, bad = read(data).to_pylist()
    assert (good["row"], good["id"], good["uri"], good["index"]) == (10, "a", "s3://in/a.png", 0)
    assert (good["class_name"], good["wnid"], good["class_id"], good["rank"]) == ("red", "n1", 0, 1)
    assert (good["width"], good["height"], good["box_xyxy"]) == (160, 80, [80, 0, 160, 40])
    assert good["peak_xy"] == [100, 10]
    assert good["heatmap"] == [float(row < 2 and column > 1) for row in range(4) for column in range(4)]
    assert good["error"] is None
    assert bad == dict.fromkeys(good) | {
        "row": 11,
        "id": "b",
        "uri": "https://h/b.png",
        "error": "image_not_found",
        "error_detail": "There is nothing.",
    }
    assert (summary.rows, summary.failed, summary.codes) == (2, 1, {"image_not_found": 1})
    assert dataset.summary_of(data) == summary
    assert dataset.to_bytes(shard, NETWORK, GRID, [seen(), GONE])[0] == data


def test_a_dark_heatmap_has_no_peak_and_no_box() -> None:
    shard = shard_of(Row(uri="s3://in/a.png"))
    (row,) = read(dataset.to_bytes(shard, NETWORK, GRID, [seen(dark=True)])[0]).to_pylist()
    assert (row["peak_xy"], row["box_xyxy"], set(row["heatmap"])) == (None, None, {0.0})


def test_heatmaps_that_are_not_normalized_lie_between_0_and_1_all_the_same() -> None:
    shard = shard_of(Row(uri="s3://in/a.png"))
    data, _ = dataset.to_bytes(shard, NETWORK, GRID, [seen(normalize="none", scale=1_000_000)])
    (row,) = read(data).to_pylist()
    assert max(row["heatmap"]) == 1, "a float16 ends at 65504"
    assert row["raw_max"] == pytest.approx(200 / 255 * 2 / 16)


@pytest.mark.parametrize(
    "outcomes", [[], [GONE], [seen()], [GONE, seen(), GONE]], ids=["none", "failed", "good", "mixed"]
)
def test_all_files_have_the_same_columns(outcomes: list[Outcome]) -> None:
    rows = [Row(uri="s3://in/a.png")] * len(outcomes) or [Row(uri="s3://in/a.png")]
    given: list[Outcome | None] = [*outcomes] or [None]
    data, _ = dataset.to_bytes(shard_of(*rows), NETWORK, GRID, given)
    file = pq.ParquetFile(io.BytesIO(data))
    assert file.schema_arrow.remove_metadata().equals(dataset.schema(GRID))
    assert file.metadata.num_rows == len(outcomes)
    assert len(read(data)) == len(outcomes)


def test_what_a_file_before_holds_is_taken_over_byte_for_byte() -> None:
    rows = [Row(uri=f"s3://in/{number}.png") for number in range(5)]
    all_good: list[Outcome | None] = [seen()] * 5
    whole, _ = dataset.to_bytes(shard_of(*rows), NETWORK, GRID, all_good)
    half: list[Outcome | None] = [GONE, seen(), GONE, seen(), GONE]
    before, _ = dataset.to_bytes(shard_of(*rows), NETWORK, GRID, half)
    kept, good = dataset.good_rows(before)
    assert good == {11, 13}
    others = [None if 10 + place in good else one for place, one in enumerate(all_good)]
    data, summary = dataset.to_bytes(shard_of(*rows), NETWORK, GRID, others, kept)
    assert data == whole
    assert summary.failed == 0


def test_what_has_another_grid_cannot_be_taken_over() -> None:
    shard = shard_of(Row(uri="s3://in/a.png"))
    kept, _ = dataset.good_rows(dataset.to_bytes(shard, NETWORK, GRID, [seen()])[0])
    with pytest.raises(StorageUnavailable, match="cannot be read as one"):
        dataset.to_bytes(shard, NETWORK, (7, 7), [None], kept)


def test_failed_rows_are_an_input_for_another_backfill() -> None:
    rows = (
        Row(uri="s3://in/\N{SNOWMAN}.png", id="a", sha256="0" * 64, version="etag"),
        Row(uri="s3://in/b.png"),
        Row(uri="s3://in/c.png"),
    )
    lines = dataset.failed_lines(shard_of(*rows), [GONE, seen(), GONE]).decode().splitlines()
    first, last = map(json.loads, lines)
    assert first == {
        "image": "s3://in/\N{SNOWMAN}.png",
        "id": "a",
        "sha256": "0" * 64,
        "row": 10,
        "error": GONE.model_dump(mode="json"),
    }
    assert (last["image"], last["row"], "id" in last) == ("s3://in/c.png", 12, False)
    assert dataset.failed_lines(shard_of(*rows), [seen()] * 3) == b""


@pytest.mark.parametrize("data", [b"", b"PAR1", b"{}"], ids=["empty", "short", "json"])
def test_what_is_no_file_of_a_shard_is_said_to_be_none(data: bytes) -> None:
    for read_it in (dataset.summary_of, dataset.good_rows, lambda data: [*dataset.batches(data)]):
        with pytest.raises(StorageUnavailable, match="A shard's file is there, and cannot be read as one"):
            read_it(data)


def test_the_rows_that_were_explained_come_back_in_batches() -> None:
    shard = shard_of(*[Row(uri="s3://in/a.png")] * 3)
    data, _ = dataset.to_bytes(shard, NETWORK, GRID, [seen(), GONE, seen()])
    found = [*dataset.batches(data, rows=2)]
    assert [len(one.class_ids) for one in found] == [1, 1]
    assert all(one.heatmaps.shape == (1, *GRID) for one in found)
    assert found[1].record(0)["row"] == 12
