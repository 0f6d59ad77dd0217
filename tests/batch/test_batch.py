import io
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradcam_worker.artifacts.dataset import METADATA_KEY, read_batches, read_summary
from gradcam_worker.batch import ShardExplainer, explain_images
from gradcam_worker.errors import InvalidInput, InvalidJob, UnknownClass, UnknownNetwork
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.imaging.overlay import encode
from gradcam_worker.runtime import service_factory
from gradcam_worker.settings import Settings
from gradcam_worker.testing import fake_services


def picture(*rgb: int) -> bytes:
    """A red, green or blue image is of that class: see `testing.TinyNetwork`."""
    return encode(np.full((32, 48, 3), rgb, np.uint8), "png")


RED, GREEN, BLUE = picture(255, 0, 0), picture(0, 255, 0), picture(0, 0, 255)
IMAGES: dict[str, bytes | BaseException] = {
    "s3://in/red.png": RED,
    "s3://in/green.png": GREEN,
    "s3://in/blue.png": BLUE,
}
NETWORK = "efficientnet_lite0"


def services(_: Settings, images: dict[str, Any] = IMAGES) -> Services:
    return fake_services(images)


@pytest.fixture(autouse=True)
def _no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit no threads of a backend that computes nothing here: for that it is imported."""
    monkeypatch.setattr(service_factory, "prepare", lambda _: None)


@pytest.fixture
def explainer() -> Callable[..., ShardExplainer]:
    return partial(ShardExplainer, NETWORK, build_services=services)


def test_a_dict_of_columns_becomes_the_table_of_the_dataset(explainer: Callable[..., ShardExplainer]) -> None:
    table = explainer(top_n=2)({"uri": [*IMAGES], "id": ["a", "b", "c"], "camera": [1, 2, None]})
    assert table["row"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert table["id"].to_pylist() == ["a", "a", "b", "b", "c", "c"]
    assert table["class_name"].to_pylist()[::2] == ["red", "green", "blue"]
    assert table["camera"].to_pylist() == [1, 1, 2, 2, None, None]
    assert table["error"].null_count == len(table)


def test_what_is_written_of_it_is_a_file_of_a_dataset(explainer: Callable[..., ShardExplainer]) -> None:
    file = io.BytesIO()
    table = explainer(top_n=1, label="truth")({"uri": [*IMAGES], "truth": ["red", "red", "blue"]})
    pq.write_table(table, file)
    summary, (batch,) = read_summary(file.getvalue()), read_batches(file.getvalue())
    assert (summary.rows, summary.failed) == (3, 0)
    assert batch.correct is not None
    assert batch.correct.tolist() == [1, 0, 1]


@pytest.mark.parametrize("kind", ["table", "batch", "pandas", "arrays"])
def test_every_kind_of_batch_gives_the_same(kind: str, explainer: Callable[..., ShardExplainer]) -> None:
    columns = {"uri": [*IMAGES], "score": [0.5, 1.5, 2.5]}
    batch: Any = {
        "table": pa.table(columns),
        "batch": pa.RecordBatch.from_pydict(columns),
        "pandas": pa.table(columns).to_pandas().set_index(np.array([7, 8, 9])),
        "arrays": {name: np.array(values, object) for name, values in columns.items()},
    }[kind]
    assert explainer(top_n=1)(batch).equals(explainer(top_n=1)(columns))


@pytest.mark.parametrize("column", ["bytes", "struct", "named"])
def test_images_may_come_as_bytes(column: str, explainer: Callable[..., ShardExplainer]) -> None:
    paths = ["red.png", "green.png", None]
    batch, options = {"bytes": [RED, GREEN, None], "path": paths}, {}
    if column == "struct":
        batch = {"image": [{"bytes": RED, "path": "red.png"}, {"bytes": GREEN, "path": "green.png"}, None]}
    if column == "named":
        batch, options = {"raw": [RED, GREEN, None], "path": paths}, {"bytes_column": "raw"}
    table = explainer(top_n=1, **options)(batch)
    assert table["class_name"].to_pylist() == ["red", "green", None]
    assert table["uri"].to_pylist()[:2] == ["red.png", "green.png"]
    assert table["error"].to_pylist() == [None, None, "invalid_row"]


def test_rows_keep_the_numbers_that_they_come_with_and_are_counted_otherwise(
    explainer: Callable[..., ShardExplainer],
) -> None:
    one = explainer(top_n=1)
    assert one({"row": [40, 10], "uri": [*IMAGES][:2]})["row"].to_pylist() == [40, 10]
    assert one({"uri": [*IMAGES][:2]})["row"].to_pylist() == [0, 1]
    assert one({"uri": [*IMAGES][:2]})["row"].to_pylist() == [2, 3]


def test_a_row_that_fails_stands_in_the_table(explainer: Callable[..., ShardExplainer]) -> None:
    table = explainer(top_n=1)({"uri": ["s3://in/lost.png", "no uri", "s3://in/red.png"]})
    assert table["error"].to_pylist() == ["image_not_found", "invalid_row", None]
    assert json.loads(table.schema.metadata[METADATA_KEY])["codes"] == {
        "image_not_found": 1,
        "invalid_row": 1,
    }


def test_more_rows_than_a_shard_holds_are_one_table(explainer: Callable[..., ShardExplainer]) -> None:
    rows = 4100
    table = explainer(top_n=1)({"uri": ["no uri"] * rows})
    assert table["row"].to_pylist() == [*range(rows)]
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    assert (metadata["rows"], metadata["failed"], metadata["codes"]) == (rows, rows, {"invalid_row": rows})


def test_it_is_pickled_without_its_network_and_loads_it_once(
    explainer: Callable[..., ShardExplainer], tmp_path: Path
) -> None:
    used = explainer(top_n=1)
    expected = used({"uri": [*IMAGES]})
    copy = pickle.loads(pickle.dumps(used))  # noqa: S301  # our own
    assert copy({"uri": [*IMAGES]}).equals(expected)


def test_the_schema_is_known_before_any_image_is_read(explainer: Callable[..., ShardExplainer]) -> None:
    batch = {"uri": ["s3://in/red.png"], "truth": ["red"], "camera": [1]}
    for portable in (False, True):
        one = explainer(top_n=1, label="truth", portable=portable)
        assert one.output_schema(batch).remove_metadata() == one(batch).schema.remove_metadata()


def test_a_column_of_nothing_but_none_may_be_given_its_type(explainer: Callable[..., ShardExplainer]) -> None:
    one = explainer(top_n=1, column_types={"score": "double", "absent": "int64"})
    batches: list[dict[str, Any]] = [
        {"uri": [uri], "score": [score]} for uri, score in zip(IMAGES, (None, 1.5, 2), strict=True)
    ]
    table = pa.concat_tables([one(batch) for batch in batches])
    assert table.schema.field("score").type == pa.float64()
    assert table["score"].to_pylist() == [None, 1.5, 2.0]
    with pytest.raises(InvalidInput, match="'flot' is no type"):
        explainer(column_types={"score": "flot"})


def test_an_empty_batch_gives_an_empty_table(explainer: Callable[..., ShardExplainer]) -> None:
    one = explainer(top_n=1)
    empty = one({"uri": [], "camera": []})
    assert len(empty) == 0
    assert empty.column_names == one({"uri": ["s3://in/red.png"], "camera": ["x"]}).column_names


def test_portable_types_are_those_that_spark_has(explainer: Callable[..., ShardExplainer]) -> None:
    schema = explainer(top_n=1, portable=True)({"uri": [*IMAGES]}).schema
    assert schema.field("heatmap").type == pa.list_(pa.float32())
    assert schema.field("box_xyxy").type == pa.list_(pa.int32())


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"name": ["a"]}, "name the one with the URIs"),
        ({"uri": ["s3://in/red.png"], "class_id": [1]}, "'class_id'"),
        ({"uri": ["s3://in/red.png"], "row": ["first"]}, "number of each row"),
        (["s3://in/red.png"], "this is list"),
        ({"uri": ["s3://in/red.png", "s3://in/red.png"], "id": ["a"]}, "read as columns"),
    ],
)
def test_a_batch_that_cannot_be_read_is_told(
    batch: Any, told: str, explainer: Callable[..., ShardExplainer]
) -> None:
    with pytest.raises(InvalidInput, match=told):
        explainer(top_n=1)(batch)


def test_what_is_asked_for_is_checked_at_once_and_what_only_the_network_knows_at_the_first_call(
    explainer: Callable[..., ShardExplainer],
) -> None:
    with pytest.raises(InvalidJob, match="both given"):
        explainer(top_n=1, classes=[1])
    with pytest.raises(InvalidJob, match="names a column"):
        explainer(boxes="instances.json")
    with pytest.raises(UnknownClass):
        explainer(classes=["violet"])({"uri": [*IMAGES]})
    with pytest.raises(UnknownNetwork):
        ShardExplainer("resnet51", build_services=services)({"uri": [*IMAGES]})


def test_images_of_any_iterable_are_explained_in_groups_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(GREEN)
    asked: list[int] = []

    def images() -> Any:
        for index, one in enumerate(["s3://in/red.png", RED, {"uri": "s3://in/blue.png", "id": "b"}, "lost"]):
            asked.append(index)
            yield one

    results = explain_images(images(), network=NETWORK, group_rows=2, top_n=1, build_services=services)
    first = next(results)
    assert asked == [0, 1], "not more than a group is read ahead"
    found = [first, *results]
    assert [one.row for one in found] == [0, 1, 2, 3]
    assert [one.classes[0].name if one.classes else one.error for one in found] == [
        "red",
        "red",
        "blue",
        "invalid_row",
    ]
    assert found[2].id == "b"
    assert found[1].uri is None
    assert first.classes[0].heatmap.max() == 1
    assert first.classes[0].columns["peak_xy"]


def test_the_settings_of_the_process_allow_the_files_that_it_can_read(tmp_path: Path) -> None:
    file = tmp_path / "a b.png"
    file.write_bytes(GREEN)
    seen: list[Settings] = []

    def build(settings: Settings) -> Services:
        seen.append(settings)
        return services(settings, {file.as_uri(): GREEN})

    (result,) = explain_images([file], network=NETWORK, top_n=1, build_services=build)
    assert result.classes[0].name == "green"
    assert (seen[0].image_schemes, seen[0].image_roots) == (("s3", "file"), ("/",))
