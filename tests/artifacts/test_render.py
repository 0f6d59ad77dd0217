import io
import json
import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging import sheet
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest, SalientRegion
from gradcam_worker.testing import MemoryStore, fake_services

URI = "s3://in/flag.png"
FLAG = np.zeros((32, 48, 3), np.uint8)  # red on the left, blue on the right
FLAG[:, :24, 0] = FLAG[:, 24:, 2] = 255


def run_and_read(
    *specs: dict[str, Any],
    classes: tuple[str, ...] = ("blue",),
    photo: NDArray[np.uint8] = FLAG,
    kind: str = ".png",
    created_at: datetime | None = None,
    **fields: Any,
) -> tuple[Manifest, dict[str, bytes]]:
    """Run a job with TinyNetwork; return its manifest, and all objects that it wrote, by file name."""
    store = MemoryStore()
    target = {"classes": list(classes)}
    job = Job.parse(
        {"image": URI, "network": "efficientnet_lite0", "target": target, "artifacts": list(specs)} | fields
    )
    data = cv2.imencode(kind, photo[..., ::-1])[1].tobytes()
    context = JobContext(Deadline(job.timeout_s), lambda _: None, created_at=created_at)
    run_job(job, fake_services({URI: data}, store=store), context)
    objects = {key.partition("/")[2]: data for key, data in store.objects.items()}
    return Manifest.model_validate_json(objects["manifest.json"]), objects


def changed_box(pixels: NDArray[np.uint8], original: NDArray[np.uint8]) -> tuple[int, ...]:
    """The box in which two images differ: left, top, right, bottom."""
    ys, xs = np.nonzero((pixels != original).any(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


@pytest.mark.parametrize(
    ("specs", "threshold"),
    [
        ([{"kind": "heatmap"}], 0.5),
        ([{"kind": "overlay", "threshold": 0.9}], 0.5),
        ([{"kind": "overlay", "box": True}], 0.5),
        ([{"kind": "overlay", "contour": True, "threshold": 0.3}], 0.3),
        (
            [
                {"kind": "overlay", "format": "png"},
                {"kind": "overlay", "box": True, "threshold": 0.3},
                {"kind": "overlay", "format": "webp", "box": True, "threshold": 0.8},
            ],
            0.3,
        ),
    ],
)
def test_the_salient_region_of_every_class_is_in_the_manifest(
    specs: list[dict[str, Any]], threshold: float
) -> None:
    manifest, _ = run_and_read(*specs, classes=("red", "blue", "green"))
    red, blue, green = (explained.hot for explained in manifest.explanations)
    # Two cells of four are lit, of 12 pixels each: between their middles, at 17.5 and 29.5, it falls to 0.
    width = math.floor(17.5 + 12 * (1 - threshold)) + 1
    assert red == SalientRegion(threshold=threshold, box_xyxy=(0, 0, width, 32))
    assert blue == SalientRegion(threshold=threshold, box_xyxy=(48 - width, 0, 48, 32))
    assert green is None, "its heatmap is zero"


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_the_box_that_is_drawn_is_the_one_in_the_manifest(threshold: float) -> None:
    spec = {"kind": "overlay", "format": "png", "alpha": 0, "box": True, "threshold": threshold}
    manifest, objects = run_and_read(spec)
    hot = manifest.explanations[0].hot
    assert hot
    assert hot.box_xyxy == changed_box(decode(objects["overlay-2-2-blue.png"]).pixels, FLAG)


def test_each_overlay_has_the_box_of_its_own_threshold() -> None:
    spec = {"kind": "overlay", "alpha": 0, "box": True}
    first, second = {**spec, "format": "png"}, {**spec, "format": "webp", "threshold": 0.9}
    _, objects = run_and_read(first, second)
    left, top, right, bottom = changed_box(decode(objects["overlay-2-2-blue.png"]).pixels, FLAG)
    assert (left, top, right, bottom) == (24, 0, 48, 32)
    dark = decode(objects["overlay-2-2-blue.webp"]).pixels.max(-1)[12:20]
    assert dark[:, 29].mean() < 100, "the edge of the box at 0.9 of the peak"
    assert dark[:, 24].mean() > 150, "where the box at 0.5 begins"


def test_the_box_is_scaled_in_a_smaller_overlay_but_not_in_the_manifest() -> None:
    spec = {"kind": "overlay", "format": "png", "alpha": 0, "max_edge": 24}
    (framed, with_box), (plain, without) = (run_and_read({**spec, "box": box}) for box in (True, False))
    hot = framed.explanations[0].hot
    assert hot
    assert hot == plain.explanations[0].hot
    left, top, right, bottom = hot.box_xyxy
    name = "overlay-2-2-blue.png"
    small = changed_box(decode(with_box[name]).pixels, decode(without[name]).pixels)
    assert small == (left // 2, top // 2, math.ceil(right / 2), math.ceil(bottom / 2))


def test_a_contour_is_drawn_on_request() -> None:
    spec = {"kind": "overlay", "format": "png"}
    (_, outlined), (_, plain) = (run_and_read({**spec, "contour": contour}) for contour in (True, False))
    name = "overlay-2-2-blue.png"
    left, top, right, bottom = changed_box(decode(outlined[name]).pixels, decode(plain[name]).pixels)
    assert (top, bottom) == (0, 32)
    assert 20 <= left < right <= 28, "only between red and blue"


def test_a_class_without_a_heatmap_has_neither_contour_nor_box() -> None:
    spec = {"kind": "overlay", "format": "png", "alpha": 0, "contour": True, "box": True}
    _, objects = run_and_read(spec, classes=("green",))
    np.testing.assert_array_equal(decode(objects["overlay-3-1-green.png"]).pixels, FLAG)


def test_an_animation_shows_the_explained_classes_in_turn() -> None:
    spec = {"kind": "animation", "frame_s": 0.5, "max_edge": 300}
    manifest, objects = run_and_read(spec, classes=("blue", "red", "green"))
    (record,) = manifest.artifacts
    assert (record.kind, record.media_type, record.width) == ("animation", "image/gif", 240)
    shown = Image.open(io.BytesIO(objects["animation.gif"]))
    assert (getattr(shown, "n_frames", 1), shown.info["duration"], shown.info["loop"]) == (3, 500, 0)
    sides = []
    for number in range(3):
        shown.seek(number)
        pixels = np.asarray(shown.convert("RGB")).astype(int)[-100:]
        sides.append((pixels[:, :60].mean((0, 1)), pixels[:, -60:].mean((0, 1))))
    (cold_red, hot_blue), (hot_red, cold_blue), dark = sides
    assert cold_red[2] > hot_red[2] + 30, "blue over cold pixels"
    assert hot_blue[0] > cold_blue[0] + 30, "red over hot pixels"
    assert np.abs(np.array(dark) - [cold_red, cold_blue]).max() < 15


def test_a_tiny_image_is_enlarged_on_the_grid() -> None:
    manifest, objects = run_and_read({"kind": "grid", "format": "png"}, photo=FLAG[8:16, 16:32])
    (record,) = manifest.artifacts
    assert decode(objects["grid.png"]).pixels.shape == (record.height, record.width, 3)
    assert (record.width or 0) > 1000


def test_a_report_says_when_it_was_asked_for_and_what_the_job_says_of_itself() -> None:
    cases: list[tuple[datetime | None, list[str]]] = [
        (
            datetime(2026, 11, 30, 10, 5, tzinfo=timezone(timedelta(hours=2))),
            ["Date", "2026-11-30 08:05 UTC"],
        ),
        (None, ["Network", "efficientnet_lite0"]),
    ]
    for created_at, first in cases:
        _, objects = run_and_read({"kind": "report"}, created_at=created_at, metadata={"case": "4711"})
        block = objects["report.html"].decode().partition('id="data">')[2].partition("</script>")[0]
        data = json.loads(block)
        assert data["lead"][0] == first
        assert data["metadata"] == [["case", "4711"]]


def test_the_legend_of_a_grid_depends_on_scale_date_and_metadata_the_pictures_above_it_do_not() -> None:
    spec = {"kind": "grid", "format": "png", "colormap": "viridis"}
    plain, *others = (
        decode(run_and_read(spec, classes=("blue", "red"), **changes)[1]["grid.png"]).pixels
        for changes in (
            {},
            {"created_at": datetime(2026, 11, 30, tzinfo=UTC)},
            {"metadata": {"case": "4711"}},
            {"method": {"normalize": "joint"}},
        )
    )
    above = sheet.title_height(sheet.letter_height(480)) + 300
    for other in others:
        assert not np.array_equal(other[above:], plain[above:])
    for other in others[:2]:
        np.testing.assert_array_equal(other[:above], plain[:above])


def test_an_image_longer_than_webp_allows_is_made_smaller() -> None:
    specs = [{"kind": kind, "format": "webp", "max_edge": 32_767} for kind in ("overlay", "animation")]
    manifest, objects = run_and_read(*specs, photo=np.zeros((4, 20_000, 3), np.uint8))
    for record in (*manifest.explanations[0].artifacts, *manifest.artifacts):
        shown = Image.open(io.BytesIO(objects[record.uri.rpartition("/")[2]]))
        assert shown.size == (record.width, record.height)
        assert shown.width >= 16_000


def test_an_image_that_was_decoded_at_a_smaller_scale_has_artifacts_of_the_same_size() -> None:
    large = cv2.resize(FLAG, (2400, 1600), interpolation=cv2.INTER_NEAREST)
    small: dict[str, Any] = {"kind": "overlay", "max_edge": 200, "box": True}
    grey, whole = {"kind": "heatmap", "format": "png"}, {"kind": "overlay", "format": "png"}
    manifest, objects = run_and_read(small, grey, photo=large, kind=".jpg")
    larger, _ = run_and_read(small, grey, whole, photo=large, kind=".jpg")
    assert (manifest.input.width, manifest.input.height) == (2400, 1600)
    assert manifest.explanations[0].hot == larger.explanations[0].hot
    assert manifest.explanations[0].peak_xy == larger.explanations[0].peak_xy
    shown = {name.partition("-")[0]: decode(objects[name]).pixels for name in objects if "blue" in name}
    assert shown["overlay"].shape == (133, 200, 3)
    assert shown["heatmap"].shape == (1600, 2400, 3)
