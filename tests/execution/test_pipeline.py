import hashlib
import io
import json
import time
from dataclasses import replace
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gradcam_worker.artifacts.artifacts import find_manifest
from gradcam_worker.errors import (
    GradcamError,
    ImageDecodeFailed,
    ImageNotFound,
    InvalidJob,
    JobTimeout,
    UnknownClass,
    UnknownLayer,
    UnknownNetwork,
)
from gradcam_worker.execution.attempt import JobContext, JobResult
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.gradcam.catalog import CATALOG, ModelFile, NetworkRow
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.faithfulness import METRICS
from gradcam_worker.gradcam.methods import cam, integrated, masking
from gradcam_worker.gradcam.sizing import Sizing
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef, Job
from gradcam_worker.schemas.manifest import DamageRecord, Manifest
from gradcam_worker.schemas.options import MethodSpec, Metric
from gradcam_worker.schemas.status import ResultWarning
from gradcam_worker.testing import MemoryStore, TinyNetwork, fake_services
from tests.gradcam.sized_network import SizedNetwork

URI = "s3://in/flag.png"


def flag() -> bytes:
    """A PNG of 48 x 32 pixels: red on the left, blue on the right."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :24, 2] = 255  # OpenCV writes blue first
    pixels[:, 24:, 0] = 255
    return cv2.imencode(".png", pixels)[1].tobytes()


def make_job(**changes: Any) -> Job:
    fields = {"image": URI, "network": "efficientnet_lite0", "target": {"top_n": 2}}
    return Job.parse({**fields, **changes})


def run(
    job: Job, store: MemoryStore | None = None, *, data: bytes | None = None, **others: Any
) -> tuple[JobResult, MemoryStore, JobContext]:
    store = store or MemoryStore()
    context = JobContext(Deadline(job.timeout_s), lambda _: None)
    services = fake_services({URI: flag() if data is None else data}, store=store, **others)
    return run_job(job, services, context), store, context


def test_a_job_writes_overlays_arrays_and_last_its_manifest() -> None:
    job = make_job()
    _, store, _ = run(job)
    *artifacts, last = store.objects
    assert sorted(artifacts) == [
        f"{job.id}/heatmaps.npz",
        f"{job.id}/overlay-1-0-red.jpg",
        f"{job.id}/overlay-2-2-blue.jpg",
    ]
    assert last == f"{job.id}/manifest.json"


def test_the_manifest_describes_every_artifact() -> None:
    job = make_job()
    result, store, _ = run(job)
    text = store.objects[f"{job.id}/manifest.json"]
    assert result.result.manifest_sha256 == hashlib.sha256(text).hexdigest()
    manifest = Manifest.model_validate_json(text)
    for index, explained in enumerate(manifest.explanations):
        for record in explained.artifacts:
            data = store.objects[record.uri.removeprefix("memory://")]
            assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            if record.kind == "overlay":
                assert decode(data).pixels.shape == (record.height, record.width, 3) == (32, 48, 3)
            else:
                arrays = np.load(io.BytesIO(data))
                assert arrays["class_ids"][record.index] == explained.class_.id
                assert arrays["heatmaps"].shape == record.shape == (2, 4, 4)
                assert float(arrays["raw_max"][index]) == pytest.approx(explained.raw_max)
    assert (manifest.input.width, manifest.input.height, manifest.input.media_type) == (48, 32, "image/png")
    assert manifest.method.layer == "blocks"


def test_the_heatmaps_are_hot_where_the_class_is() -> None:
    job = make_job()
    _, store, _ = run(job)
    red, blue = np.load(io.BytesIO(store.objects[f"{job.id}/heatmaps.npz"]))["heatmaps"]
    np.testing.assert_array_equal(red, np.repeat([[1, 1, 0, 0]], 4, axis=0))
    np.testing.assert_array_equal(blue, np.repeat([[0, 0, 1, 1]], 4, axis=0))
    overlay = decode(store.objects[f"{job.id}/overlay-1-0-red.jpg"]).pixels.astype(int)
    left, right = overlay[:, :16].mean((0, 1)), overlay[:, 32:].mean((0, 1))
    assert left[0] > 150, "hot is red on red"
    assert right[2] > 150, "cold is blue on blue"


def test_the_peak_is_in_pixels_of_the_image() -> None:
    job = make_job(target={"classes": ["blue"]})
    _, store, _ = run(job)
    explained = Manifest.model_validate_json(store.objects[f"{job.id}/manifest.json"]).explanations[0]
    assert explained.peak_xy == (30, 4), "the middle of the third cell of four, in 48 x 32"


def test_a_job_that_runs_again_writes_the_same_bytes_under_the_same_keys() -> None:
    job = make_job()
    first, second = run(job)[1], run(job)[1]
    assert first.objects == second.objects


def test_a_class_without_evidence_has_a_heatmap_that_is_zero_and_a_warning() -> None:
    job = make_job(target={"classes": ["green", "red"]})
    result, store, _ = run(job)
    assert [(warning.code, warning.class_id) for warning in result.warnings] == [("zero_heatmap", 1)]
    manifest = json.loads(store.objects[f"{job.id}/manifest.json"])
    assert manifest["explanations"][0]["peak_xy"] is None
    assert b"NaN" not in store.objects[f"{job.id}/manifest.json"]


def noisy(width: int = 900, height: int = 700) -> bytes:
    """A JPEG whose pixels depend on the scale at which it is decoded."""
    rng = np.random.default_rng(4)
    grain = rng.choice([0, 255], (height, width, 3)).astype(np.uint8)
    grain[:, : width // 2, 0] //= 2
    return cv2.imencode(".jpg", grain, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()


def test_the_input_of_the_network_does_not_depend_on_the_artifacts() -> None:
    data = noisy()
    explanation = explain_image(TinyNetwork(), data, top_n=3)
    expected = [(prediction.id, prediction.probability) for prediction in explanation.predictions]
    for artifacts in (
        [{"kind": "heatmap"}],
        [{"kind": "overlay"}],
        [{"kind": "overlay", "max_edge": 64}],
        [{"kind": "grid"}, {"kind": "report"}, {"kind": "animation", "max_edge": 64}],
    ):
        job = make_job(artifacts=artifacts, target={"top_n": 3}, metrics=["deletion"])
        result, store, _ = run(job, data=data)
        assert [(score.id, score.probability) for score in result.predictions] == expected
        manifest = Manifest.model_validate_json(store.objects[f"{job.id}/manifest.json"])
        assert [explained.raw_max for explained in manifest.explanations] == explanation.raw_max.tolist()
        assert (manifest.input.width, manifest.input.height) == (900, 700)


def test_a_damaged_image_is_explained_with_a_warning_about_the_damage() -> None:
    data, job = noisy(160, 120)[:-2], make_job()
    result, store, _ = run(job, data=data)
    detail = "its end marker is missing"
    assert result.warnings == (ResultWarning(code="image_damaged", missing=0, detail=detail),)
    manifest = Manifest.model_validate_json(store.objects[f"{job.id}/manifest.json"])
    assert (manifest.warnings, manifest.input.damage) == (
        result.warnings,
        DamageRecord(missing=0, detail=detail),
    )
    assert run(make_job(), data=noisy(160, 120))[0].warnings == ()


def test_the_settings_limit_the_missing_share_of_an_image() -> None:
    whole = noisy(160, 120)
    cut = whole[: len(whole) * 4 // 5]
    with pytest.raises(ImageDecodeFailed, match=r"premature end of data segment.*less than 5.0% may be"):
        run(make_job(), data=cut)
    result, _, _ = run(make_job(), data=cut, limits=Limits(max_damage=0.5))
    (warning,) = result.warnings
    assert 0.15 < (warning.missing or 0) < 0.3


def test_a_report_is_one_page_with_the_values_of_the_manifest() -> None:
    job = make_job(artifacts=[{"kind": "report"}])
    _, store, _ = run(job)
    page = store.objects[f"{job.id}/report.html"]
    manifest = Manifest.model_validate_json(store.objects[f"{job.id}/manifest.json"])
    (record,) = manifest.artifacts
    assert (record.kind, record.media_type) == ("report", "text/html; charset=utf-8")
    assert (record.bytes, record.sha256) == (len(page), hashlib.sha256(page).hexdigest())
    assert b"efficientnet_lite0 \\u00b7 flag.png" in page
    for value in (job.id, URI, manifest.input.sha256, "48 x 32 pixels, image/png", manifest.method.layer):
        assert str(value).encode() in page
    assert run(job)[1].objects == store.objects


ALL_FORMATS = [
    {"kind": "overlay", "format": "png", "max_edge": 24, "colormap": "viridis"},
    {"kind": "overlay", "format": "webp"},
    {"kind": "heatmap", "format": "npy"},
    {"kind": "heatmap", "format": "png"},
    {"kind": "grid", "format": "png"},
    {"kind": "animation"},
    {"kind": "animation", "format": "webp"},
]


def test_all_formats_can_be_requested_at_once_and_are_in_the_manifest() -> None:
    job = make_job(artifacts=ALL_FORMATS)
    _, store, _ = run(job)
    arrays, *names = (name.partition("/")[2] for name in store.objects)
    assert arrays == "heatmaps.npy", "it is uploaded while the others are drawn"
    assert names == [
        "overlay-1-0-red.png",
        "overlay-2-2-blue.png",
        "overlay-1-0-red.webp",
        "overlay-2-2-blue.webp",
        "heatmap-1-0-red.png",
        "heatmap-2-2-blue.png",
        "grid.png",
        "animation.gif",
        "animation.webp",
        "manifest.json",
    ]
    manifest = Manifest.model_validate_json(store.objects[f"{job.id}/manifest.json"])
    described = [record for explained in manifest.explanations for record in explained.artifacts]
    recorded = {record.uri.rpartition("/")[2] for record in (*described, *manifest.artifacts)}
    assert recorded == {arrays, *names[:-1]}
    for record in (*described, *manifest.artifacts):
        data = store.objects[record.uri.removeprefix("memory://")]
        assert record.sha256 == hashlib.sha256(data).hexdigest()
        if record.width:
            shown = Image.open(io.BytesIO(data))
            assert shown.size == (record.width, record.height)
            assert Image.MIME[shown.format or ""] == record.media_type
        else:
            assert np.load(io.BytesIO(data)).shape == record.shape
    small, large = (decode(store.objects[f"{job.id}/overlay-1-0-red.{ext}"]) for ext in ("png", "webp"))
    assert (small.pixels.shape, large.pixels.shape) == ((16, 24, 3), (32, 48, 3))


def test_a_greyscale_heatmap_has_the_size_of_the_image_and_is_white_where_the_class_is() -> None:
    job = make_job(artifacts=[{"kind": "heatmap", "format": "png"}], target={"classes": ["red"]})
    _, store, _ = run(job)
    pixels = decode(store.objects[f"{job.id}/heatmap-1-0-red.png"]).pixels
    assert pixels.shape == (32, 48, 3)
    assert (pixels[:, :16] == 255).all()
    assert (pixels[:, 32:] == 0).all()


@pytest.mark.parametrize("name", sorted(set(cam.METHODS) - {"eigencam"}))
@pytest.mark.parametrize("normalize", cam.NORMALIZE)
def test_a_job_chooses_its_method_and_the_manifest_records_it(name: str, normalize: str) -> None:
    job = make_job(method={"name": name, "normalize": normalize}, target={"classes": ["red", "blue"]})
    _, store, _ = run(job)
    manifest = Manifest.model_validate_json(store.objects[f"{job.id}/manifest.json"])
    assert (manifest.method.name, manifest.method.normalize) == (name, normalize)
    heatmaps = np.load(io.BytesIO(store.objects[f"{job.id}/heatmaps.npz"]))["heatmaps"]
    right_is_hot = heatmaps[0, 0, 3] > heatmaps[0, 0, 0]
    assert right_is_hot == (name == "counterfactual"), "red is on the left; the evidence against it is not"


def test_the_heatmaps_of_eigencam_do_not_depend_on_the_class() -> None:
    job = make_job(method={"name": "eigencam", "normalize": "none"}, target={"classes": ["red", "blue"]})
    _, store, _ = run(job)
    red, blue = np.load(io.BytesIO(store.objects[f"{job.id}/heatmaps.npz"]))["heatmaps"]
    np.testing.assert_array_equal(red, blue)
    assert red.any()


def test_metrics_are_in_the_manifest_only_on_request() -> None:
    job, plain = make_job(metrics=["insertion", "deletion"]), make_job()
    _, store, context = run(job)
    manifest = Manifest.model_validate_json(store.objects[f"{job.id}/manifest.json"])
    for explained in manifest.explanations:
        assert explained.metrics.keys() == {"insertion", "deletion"}
    first = manifest.explanations[0].metrics
    assert first["deletion"] < first["insertion"]
    assert context.metrics["measure_s"] >= 0
    _, store, _ = run(plain)
    manifest = Manifest.model_validate_json(store.objects[f"{plain.id}/manifest.json"])
    assert [explained.metrics for explained in manifest.explanations] == [{}, {}]


def test_measuring_stops_at_the_deadline() -> None:
    class Slow(TinyNetwork):
        def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
            time.sleep(0.1)
            return super().scores(pixels)

    job = make_job(metrics=["deletion"], timeout_s=0.35, target={"top_n": 3})
    with pytest.raises(JobTimeout, match="waiting for the device"):
        run(job, inference=ModelCache(lambda _: Slow()))


def test_the_job_schema_offers_all_methods_scores_normalizations_and_metrics() -> None:
    fields = MethodSpec.model_fields
    assert set(get_args(fields["name"].annotation)) == {*cam.METHODS, *masking.METHODS, integrated.NAME}
    assert set(get_args(fields["score"].annotation)) == set(cam.SCORES)
    assert set(get_args(fields["normalize"].annotation)) == set(cam.NORMALIZE)
    assert set(get_args(Metric)) == set(METRICS)


def test_only_the_requested_artifacts_are_written() -> None:
    job = make_job(artifacts=[{"kind": "heatmap"}])
    _, store, _ = run(job)
    assert list(store.objects) == [f"{job.id}/heatmaps.npz", f"{job.id}/manifest.json"]


def test_every_stage_is_timed() -> None:
    _, _, context = run(make_job())
    stages = {"fetch_s", "decode_s", "load_s", "explain_s", "render_s", "upload_s", "batch_wait_s"}
    assert context.measured().keys() == {*stages, "batch_size", "device_s"}
    assert all(value >= 0 for value in context.metrics.values())


@pytest.mark.parametrize(
    ("changes", "error", "stage"),
    [
        ({"network": "vgg61"}, UnknownNetwork, "check"),
        ({"target": {"top_n": 51}}, InvalidJob, "check"),
        ({"target": {"top_n": 4}}, InvalidJob, "load"),
        ({"target": {"classes": ["reed"]}}, UnknownClass, "load"),
        ({"method": {"layer": "conv9"}}, UnknownLayer, "explain"),
        ({"image": "s3://in/none.png"}, GradcamError, "fetch"),
    ],
)
def test_a_job_that_fails_records_its_stage_and_writes_nothing(
    changes: dict[str, Any], error: type[GradcamError], stage: str
) -> None:
    store, job = MemoryStore(), make_job(**changes)
    context = JobContext(Deadline(job.timeout_s), lambda _: None)
    with pytest.raises(error):
        run_job(job, fake_services({URI: flag()}, store=store), context)
    assert context.current_stage == stage
    assert not store.objects


def test_too_many_classes_are_refused_with_the_name_of_the_setting() -> None:
    with pytest.raises(InvalidJob, match=r"for 3 classes; at most 2 are allowed \(GRADCAM_MAX_CLASSES\)"):
        run(make_job(target={"classes": [0, 1, 2]}), max_classes=2)


def test_a_job_out_of_time_stops_at_the_next_stage() -> None:
    with pytest.raises(JobTimeout, match="timeout_s of 1e-06 s"):
        run(make_job(timeout_s=1e-6))


def test_rendering_and_uploading_stop_at_the_deadline() -> None:
    job, store = make_job(target={"top_n": 3}), MemoryStore()

    class Slow(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            time.sleep(0.2)
            return store.put(key, data, media_type)

    with pytest.raises(JobTimeout, match="upload"):
        run(job.model_copy(update={"timeout_s": 0.3}), Slow())
    assert 1 <= len(store.objects) < 4
    assert f"{job.id}/manifest.json" not in store.objects


class ChangingRegistry:
    """A registry that returns a different row at each lookup."""

    def __init__(self) -> None:
        self.rows: list[NetworkRow] = []

    def find(self, name: str) -> NetworkRow:
        self.rows.append(replace(CATALOG["efficientnet_lite0"], name=name, classes=len(self.rows)))
        return self.rows[-1]


def test_a_job_uses_the_row_of_its_network_at_the_time_of_loading() -> None:
    networks, loaded = ChangingRegistry(), []

    def load(row: NetworkRow) -> TinyNetwork:
        loaded.append(row)
        return TinyNetwork()

    result, _, _ = run(make_job(network="tumours"), networks=networks, inference=ModelCache(load))
    assert result.network.name == "tumours"
    assert loaded == [networks.rows[-1]]


def test_loading_a_network_does_not_count_towards_the_deadline() -> None:
    def load(row: NetworkRow) -> TinyNetwork:
        time.sleep(0.5)
        return TinyNetwork()

    result, _, context = run(make_job(timeout_s=0.4), inference=ModelCache(load))
    assert result.predictions
    assert context.metrics["load_s"] >= 0.5


def test_tiny_network_computes_scores_and_maps_of_colors() -> None:
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[0, :4, :4] = (255, 0, 0)
    computed = TinyNetwork().compute(pixels, np.array([[0, -1, 2]], np.int32))
    assert computed.class_ids.tolist() == [[0, 0, 2]]
    assert computed.raw[0, 0, 0, 0] == pytest.approx(2 / 16)
    assert computed.raw[0, 2, 0, 0] == pytest.approx(-1 / 16)
    assert np.count_nonzero(computed.raw[0, 0]) == 1


def run_attempt(job: Job, store: MemoryStore, images: dict[str, bytes], attempt: int = 2) -> JobResult:
    """Run a later attempt with these images."""
    context = JobContext(Deadline(job.timeout_s), lambda _: None, attempt=attempt)
    return run_job(job, fake_services(images, store=store), context)


@pytest.mark.parametrize("with_checksum", [True, False])
def test_a_complete_result_is_found_by_the_next_attempt_even_if_its_image_is_gone(
    *, with_checksum: bool
) -> None:
    image = {"uri": URI} | ({"sha256": hashlib.sha256(flag()).hexdigest()} if with_checksum else {})
    job = make_job(image=image)
    first, store, _ = run(job)
    before = dict(store.objects)
    assert run_attempt(job, store, {}).result == first.result
    assert store.objects == before
    with pytest.raises(ImageNotFound):
        run_attempt(job, store, {}, attempt=1)
    with pytest.raises(ImageNotFound):
        run_attempt(job, MemoryStore(), {})


def test_a_result_of_other_bytes_is_not_used_if_the_checksum_of_the_image_is_known() -> None:
    job = make_job()
    first, store, _ = run(job, data=noisy())
    assert run_attempt(job, store, {URI: flag()}).result != first.result, "the image has changed"
    job_with_checksum = job.model_copy(update={"image": ImageRef(uri=URI, sha256="0" * 64)})
    with pytest.raises(ImageNotFound):
        run_attempt(job_with_checksum, store, {})


class TestSizing:
    """A network whose owner crops or pads photos."""

    @pytest.mark.parametrize(
        ("sizing", "shown", "peak"),
        [
            (Sizing(fit="crop"), (8, 0, 40, 32), (28, 4)),
            (Sizing("nearest", "letterbox"), (0, -5.818, 48, 40.727), (30, 11)),
            (Sizing("nearest"), None, (30, 4)),
        ],
    )
    def test_the_manifest_says_what_the_network_saw_and_maps_everything_back(
        self, sizing: Sizing, shown: tuple[float, ...] | None, peak: tuple[int, int]
    ) -> None:
        kinds = ("grid", "animation", "report")
        job = make_job(
            target={"classes": ["blue"]},
            metrics=["deletion", "insertion"],
            artifacts=[
                {"kind": "overlay", "format": "png", "box": True, "contour": True},
                {"kind": "heatmap", "format": "png"},
                *({"kind": kind} for kind in kinds),
            ],
        )
        network = SizedNetwork(sizing)
        _, store, _ = run(job, inference=ModelCache(lambda _: network))
        manifest = Manifest.model_validate_json(store.objects[f"{job.id}/manifest.json"])
        assert manifest.network.sizing == sizing.describe()
        assert manifest.network.shown_xyxy == shown
        (explained,) = manifest.explanations
        assert explained.peak_xy == peak
        assert explained.hot
        left, top, right, bottom = explained.hot.box_xyxy
        assert 18 <= left <= 24, "blue begins in the middle of the photo, at 24"
        assert (top, right) == (0, min(48, int(shown[2]) if shown else 48))
        assert 30 <= bottom <= 32
        grey = decode(store.objects[f"{job.id}/heatmap-{explained.rank}-2-blue.png"]).pixels[..., 0]
        assert grey.shape == (32, 48)
        assert grey[14, 30:right].min() > 250
        assert grey[:, right:].max(initial=0) == 0
        drawn = decode(store.objects[f"{job.id}/overlay-{explained.rank}-2-blue.png"]).pixels
        whole = decode(flag()).pixels
        np.testing.assert_array_equal(drawn[:, right:], whole[:, right:])
        assert len(manifest.artifacts) == len(kinds)

    def test_a_manifest_of_another_sizing_is_not_reused(self) -> None:
        row = replace(
            CATALOG["efficientnet_lite0"], file=ModelFile("m.keras", "ab" * 32), sizing=Sizing("nearest")
        )
        job, store = make_job(), MemoryStore()
        network = SizedNetwork(Sizing())
        network.facts = replace(network.facts, weights_sha256="ab" * 32, preprocessing="lite")
        run(job, store, inference=ModelCache(lambda _: network))

        def found(row: NetworkRow) -> bool:
            return find_manifest(store, job.id, job, None, row, Deadline(9)) is not None

        assert not found(row)
        assert found(replace(row, sizing=Sizing()))
