"""What is known about images, in jobs and shards: against plain loops over the pixels of upright images."""

import io
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from gradcam_worker.errors import ImageFetchFailed, InvalidJob, MethodNotSupported
from gradcam_worker.execution import shards
from gradcam_worker.execution.attempt import JobContext, JobResult
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.gradcam.classes import ClassIndex, Label
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.sizing import Sizing
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.work import parse
from gradcam_worker.testing import MemoryStore, TinyNetwork, fake_services
from tests.gradcam.sized_network import SizedNetwork

URI, MASK = "s3://in/flag.png", "s3://in/mask.png"
SIZINGS = {
    "squash": Sizing("area"),
    "crop": Sizing("area", "crop"),
    "letterbox": Sizing("area", "letterbox"),
}
SIDEWAYS, UPSIDE_DOWN, MIRRORED = 6, 3, 5  # values of EXIF's orientation
KEY = "00000000-0123456789abcdef"


def picture() -> NDArray[np.uint8]:
    """(80, 48, 3): green above, red in the middle, blue at the lower right, all dark elsewhere."""
    pixels = np.full((80, 48, 3), 20, np.uint8)
    pixels[:16, :, 1] = 200
    pixels[32:48, 8:24, 0] = 255
    pixels[64:, 32:, 2] = 255
    return pixels


def stored(orientation: int = 1) -> bytes:
    """A PNG of `picture` that is upright only when it is turned by its EXIF data."""
    upright = picture()
    turned = {
        1: upright,
        SIDEWAYS: np.rot90(upright),
        UPSIDE_DOWN: upright[::-1, ::-1],
        MIRRORED: upright.transpose(1, 0, 2),
    }[orientation]
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(np.ascontiguousarray(turned)).save(file, "PNG", exif=exif)
    return file.getvalue()


def services(
    store: MemoryStore, network: Any = None, images: dict[str, bytes | BaseException] | None = None
) -> Any:
    cache = ModelCache(lambda _: network or TinyNetwork(), max_batch=4)
    return fake_services({URI: stored(), **(images or {})}, store=store, inference=cache)


def run(annotations: dict[str, Any] | None = None, **changes: Any) -> tuple[Manifest, JobResult]:
    given = {name: changes.pop(name, None) for name in ("network", "images")}
    fields = {"image": URI, "network": "efficientnet_lite0", "target": {"top_n": 2}, **changes}
    job, store = Job.parse({**fields, "annotations": annotations}), MemoryStore()
    result = run_job(job, services(store, **given), JobContext(Deadline(60), lambda _: None))
    return Manifest.model_validate_json(store.objects[f"{job.id}/manifest.json"]), result


def run_rows(rows: list[dict[str, Any]], **changes: Any) -> tuple[pa.Table, JobResult]:
    given = {name: changes.pop(name, None) for name in ("network", "images")}
    fields = {
        "schema": "gradcam.shard/v1",
        "backfill": new_id(),
        "index": 0,
        "key": KEY,
        "first": 100,
        "rows": [{"uri": URI, **row} for row in rows],
        "network": "efficientnet_lite0",
        "target": {"top_n": 1},
        "output": "s3://out/set",
        "annotated": True,
    }
    shard, store = parse({**fields, **changes}), MemoryStore()
    assert isinstance(shard, Shard)
    result = shards.run_shard(shard, services(store, **given), JobContext(Deadline(60), lambda _: None))
    return pq.read_table(io.BytesIO(store.objects[f"data/{KEY}.parquet"])), result


def plain_shares(table: pa.Table, row: int, object_: NDArray[np.bool_]) -> tuple[float, float]:
    """Shares of heat and of area inside: each pixel has the heat of the cell at its centre."""
    record = table.slice(row, 1).to_pylist()[0]
    height, width = object_.shape
    left, top, right, bottom = record.get("shown_xyxy") or (0, 0, record["width"], record["height"])
    scale_y, scale_x = record["height"] / height, record["width"] / width
    heat = inside = area = inside_area = 0.0
    for y in range(height):
        for x in range(width):
            at_y = ((y + 0.5) * scale_y - top) / (bottom - top) * 4
            at_x = ((x + 0.5) * scale_x - left) / (right - left) * 4
            if 0 <= at_y < 4 and 0 <= at_x < 4:
                value = record["heatmap"][int(at_y) * 4 + int(at_x)]
                heat, area = heat + value, area + 1
                inside, inside_area = inside + value * object_[y, x], inside_area + object_[y, x]
    return inside / heat, inside_area / area


@pytest.mark.parametrize("orientation", [1, SIDEWAYS, UPSIDE_DOWN, MIRRORED])
@pytest.mark.parametrize("fit", SIZINGS)
def test_shares_of_heat_are_those_of_the_upright_image_however_it_is_stored(
    fit: str, orientation: int
) -> None:
    """Sides are multiples of the cells, so that a loop over pixels is exact."""
    box, mask = (4.0, 24.0, 30.0, 60.0), np.zeros((80, 48), np.bool_)
    mask[24:60, 4:30] = True
    rows: list[dict[str, Any]] = [
        {"annotations": {"boxes": [{"xyxy": box}]}},
        {"annotations": {"mask": {"uri": MASK}}},
    ]
    images = {URI: stored(orientation), MASK: cv2.imencode(".png", mask.astype(np.uint8))[1].tobytes()}
    table, _ = run_rows(rows, images=images, network=SizedNetwork(SIZINGS[fit]), target={"classes": ["red"]})
    for row, name in enumerate(("truth_boxes", "truth_mask")):
        found = table.slice(row, 1).to_pylist()[0]
        assert found[name] == ([[*box]] if row == 0 else MASK)
        expected = plain_shares(table, row, np.kron(mask, np.ones((3, 3))).astype(np.bool_))
        assert (found["heat_inside"], found["inside_area"]) == pytest.approx(expected, rel=5e-3)
        x, y = found["peak_xy"]
        assert found["pointing_hit"] is bool(mask[y, x])
        assert 0 < found["iou"] < 1


def test_a_job_says_where_its_heat_lies() -> None:
    """The cells of the left half of the second and third row have the red patch."""
    manifest, result = run(
        {"labels": ["red"], "boxes": [{"xyxy": [0, 0.25, 0.5, 0.75], "relative": True}]},
        target={"classes": ["red", "blue"]},
    )
    red, blue = (vars(explained.localization) for explained in manifest.explanations)
    assert red["heat_inside"] > 0.9
    assert (red["inside_area"], red["pointing_hit"]) == (0.25, True)
    assert (blue["inside_area"], blue["pointing_hit"]) == (0.25, False)
    assert manifest.truth is not None
    assert [one.name for one in manifest.truth.classes or ()] == ["red"]
    assert list(manifest.truth.boxes or ()) == [(0, 20, 24, 60)]
    assert result.warnings == ()


def test_a_job_without_annotations_knows_the_heat_at_the_border_alone() -> None:
    manifest, _ = run()
    assert manifest.truth is None
    localization = manifest.explanations[0].localization
    assert localization.heat_at_border is not None
    assert localization.model_dump(exclude={"heat_at_border"}) == dict.fromkeys(
        ("heat_inside", "inside_area", "pointing_hit", "iou")
    )


def test_labels_are_compared_with_all_classes_by_score() -> None:
    table, _ = run_rows(
        [{"annotations": {"labels": labels}} for labels in (["red"], [1, "n3"], ["2"], [])] + [{}]
    )
    (ranked,) = {tuple(row) for row in _ranking()}
    names = ["red", "green", "blue"]
    ranks = {name: ranked.index(name) + 1 for name in names}
    assert table["truth_ids"].to_pylist() == [[0], [1, 2], [2], None, None]
    assert table["truth_rank"].to_pylist() == [
        ranks["red"],
        min(ranks["green"], ranks["blue"]),
        ranks["blue"],
        None,
        None,
    ]
    assert table["correct"].to_pylist() == [
        ranks["red"] == 1,
        ranks["red"] != 1,
        ranks["blue"] == 1,
        None,
        None,
    ]


def _ranking() -> list[list[str]]:
    table, _ = run_rows([{}], target={"top_n": 3})
    return [table["class_name"].to_pylist()]


def test_labels_that_the_network_lacks_are_told_and_the_image_is_explained() -> None:
    table, result = run_rows(
        [
            {"annotations": {"labels": ["purple"]}},
            {"annotations": {"labels": ["purple", "red"]}},
            {"annotations": {"labels": ["twin"]}},
            {},
        ],
        network=TwinNetwork(),
    )
    assert table["error"].null_count == 4
    assert table["truth_ids"].to_pylist() == [[], [0], [], None]
    assert table["correct"].to_pylist()[0] is None
    told = {warning.code: warning.detail or "" for warning in result.warnings}
    assert set(told) == {"label_unknown", "label_ambiguous"}
    assert told["label_unknown"].startswith("2 of 4 rows. Row 100: There is no class 'purple'.")
    assert "ids run from 0 to 2" in (run_rows([{"annotations": {"labels": [7]}}])[1].warnings[0].detail or "")
    assert "'twin' is the name of 2 classes" in told["label_ambiguous"]


class TwinNetwork(TinyNetwork):
    """Two of its classes have one name."""

    labels = ClassIndex((Label(0, "n1", "red"), Label(1, "n2", "twin"), Label(2, "n3", "twin")))


def test_of_boxes_with_labels_those_of_the_explained_class_count_for_it() -> None:
    boxes = [
        {"xyxy": [0, 0, 24, 80], "label": "red"},
        {"xyxy": [24, 0, 48, 80], "label": "blue"},
        {"xyxy": [0, 0, 48, 8], "label": "purple"},
    ]
    table, result = run_rows(
        [{"annotations": {"boxes": boxes}}], target={"classes": ["red", "blue", "green"]}
    )
    assert table["inside_area"].to_pylist() == [0.5, 0.5, 1]
    assert table["truth_ids"].to_pylist()[0] == [0, 2], "without labels of the image those of its boxes count"
    assert [warning.code for warning in result.warnings] == ["label_unknown"]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ({"uri": "s3://in/gone.png"}, "image_not_found: "),
        ({"rle": {"size": [48, 80], "counts": [48 * 80]}}, "the proportions must be the same"),
        ({"rle": {"size": [8, 8], "counts": "0"}}, "run lengths"),
    ],
)
def test_a_mask_that_cannot_be_used_is_told_and_the_image_is_explained(
    mask: dict[str, Any], said: str
) -> None:
    annotations = {"mask": mask, "boxes": [{"xyxy": [0, 0, 9, 9]}]}
    table, result = run_rows([{"annotations": annotations}])
    assert (table["heat_inside"].to_pylist(), table["error"].to_pylist()) == ([None], [None])
    (warning,) = result.warnings
    assert warning.code == "mask_unusable"
    assert said in (warning.detail or "")
    assert "s3://" not in (warning.detail or ""), "a tenant reads it, too"
    manifest, _ = run(annotations)
    assert [one.code for one in manifest.warnings] == ["mask_unusable"]


def test_boxes_outside_of_the_image_are_told_and_count_for_nothing() -> None:
    outside, on_it = [48, 0, 60, 9], [30, 60, 60, 90]
    table, result = run_rows([{"annotations": {"boxes": [{"xyxy": outside}]}}])
    assert (table["heat_inside"].to_pylist(), table["pointing_hit"].to_pylist()) == ([None], [None])
    (warning,) = result.warnings
    detail = "The box [48, 0, 60, 9] (left, top, right, bottom) is outside of 48 x 80 pixels."
    assert (warning.code, warning.detail) == ("box_outside", f"1 of 1 rows. Row 100: {detail}")
    both, result = run_rows([{"annotations": {"boxes": [{"xyxy": box} for box in (outside, on_it)]}}])
    one, _ = run_rows([{"annotations": {"boxes": [{"xyxy": on_it}]}}])
    assert both["heat_inside"].to_pylist() == one["heat_inside"].to_pylist() != [None]
    assert [warning.code for warning in result.warnings] == ["box_outside"]


def test_a_mask_that_cannot_be_read_at_present_fails_its_row() -> None:
    images: dict[str, bytes | BaseException] = {MASK: ImageFetchFailed("The server is down.")}
    rows: list[dict[str, Any]] = [{}, {"annotations": {"mask": {"uri": MASK}}}, {}]
    table, _ = run_rows(rows, images=images)
    assert table["error"].to_pylist() == [None, "image_fetch_failed", None]


def test_rows_have_classes_of_their_own_beside_those_of_all() -> None:
    rows: list[dict[str, Any]] = [
        {},
        {"classes": ["blue", "purple"]},
        {"classes": ["red"]},
        {"classes": [0, "green", 2]},
        {},
    ]
    table, result = run_rows(rows)
    names: dict[int, list[str]] = {}
    for record in table.to_pylist():
        names.setdefault(record["row"] - 100, []).append(record["class_name"])
    first = names[0][0]
    assert names == {
        0: [first],
        1: [*dict.fromkeys((first, "blue"))],
        2: [*dict.fromkeys((first, "red"))],
        3: [*dict.fromkeys((first, "red", "green", "blue"))],
        4: [first],
    }
    assert [warning.code for warning in result.warnings] == ["class_unknown"]
    plain, _ = run_rows([{}], target={"classes": ["blue"]})
    of_row = table.filter(pa.compute.equal(table["row"], 101)).to_pylist()[-1]
    assert of_row["heatmap"] == plain["heatmap"].to_pylist()[0]


@pytest.mark.parametrize("method", ["gradcam", "rise", "integrated_gradients"])
def test_every_method_explains_the_classes_of_rows(method: str) -> None:
    spec = {"name": method, **({"masks": 8} if method == "rise" else {})}
    table, _ = run_rows([{"classes": ["green"]}, {}], method=spec, target={"classes": ["red"]})
    assert table["class_name"].to_pylist() == ["red", "green", "red"]


def test_more_classes_than_are_allowed_are_refused_whoever_asks_for_them() -> None:
    with pytest.raises(InvalidJob, match="51 classes"):
        run_rows([{"classes": [*range(50)]}])


def test_a_class_that_others_are_explained_against_is_not_explained_against_itself() -> None:
    table, _ = run_rows([{"classes": ["blue", "red"]}], target={"classes": ["green"], "against": ["blue"]})
    assert table["class_name"].to_pylist() == ["green", "red"]


def test_features_are_the_activations_averaged_with_the_heat_as_weights() -> None:
    table, _ = run_rows([{}, {"classes": ["blue"]}], features=True, target={"classes": ["red"]})
    small = cv2.resize(picture(), (16, 16), interpolation=cv2.INTER_AREA).astype(np.float64) / 255
    blocks = small.reshape(4, 4, 4, 4, 3).mean((1, 3))
    for record in table.to_pylist():
        heat = np.maximum(blocks @ TinyNetwork.KERNEL[:, record["class_id"]], 0)
        expected = [float((heat * blocks[..., channel]).sum() / heat.sum()) for channel in range(3)]
        assert record["heat_features"] == pytest.approx(expected, abs=5e-3)


def test_features_of_a_heatmap_that_is_zero_are_null() -> None:
    dark = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    table, _ = run_rows([{}], features=True, images={URI: dark})
    assert table["heat_features"].to_pylist() == [None]
    assert table.schema.field("heat_features").type.list_size == 3


@pytest.mark.parametrize("method", ["rise", "integrated_gradients"])
def test_methods_without_a_target_layer_have_no_features(method: str) -> None:
    with pytest.raises(MethodNotSupported, match=f"{method} uses none: take one of gradcam"):
        run_rows([{}], features=True, method={"name": method})


def test_a_network_that_gives_scores_alone_has_no_features() -> None:
    network = TinyNetwork()
    network.facts = replace(TinyNetwork.facts, scores_only=True)
    with pytest.raises(MethodNotSupported, match="rise uses none"):
        run_rows([{}], features=True, network=network)


def test_the_features_of_a_formula_are_those_of_its_own_heat() -> None:
    rng = np.random.default_rng(0)
    activations, raw = rng.random((2, 3, 4, 5)), rng.normal(size=(2, 2, 3, 4))
    found = cam.heat_features(np, activations, raw)
    for image in range(2):
        for of in range(2):
            total, weights = np.zeros(5), 0.0
            for row in range(3):
                for column in range(4):
                    heat = max(raw[image, of, row, column], 0)
                    total, weights = total + heat * activations[image, row, column], weights + heat
            assert found[image, of] == pytest.approx(total / weights)
