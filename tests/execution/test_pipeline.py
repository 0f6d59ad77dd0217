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
from gradcam_worker.execution.pipeline import JobContext, JobResult, run_job
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.faithfulness import METRICS
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef, Job
from gradcam_worker.schemas.manifest import DamageRecord, Manifest
from gradcam_worker.schemas.options import MethodSpec, Metric
from gradcam_worker.schemas.status import ResultWarning
from gradcam_worker.testing import MemoryStore, TinyNetwork, fake_services

URI = "s3://in/flag.png"


def flag() -> bytes:
    """A picture of 48 x 32 pixels: red on the left, blue on the right."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :24, 2] = 255  # OpenCV writes blue first
    pixels[:, 24:, 0] = 255
    return cv2.imencode(".png", pixels)[1].tobytes()


def job(**changes: Any) -> Job:
    fields = {"image": URI, "network": "efficientnet_lite0", "target": {"top_n": 2}}
    return Job.parse({**fields, **changes})


def run(
    asked: Job, store: MemoryStore | None = None, *, data: bytes | None = None, **others: Any
) -> tuple[JobResult, MemoryStore, JobContext]:
    store = store or MemoryStore()
    context = JobContext(Deadline(asked.timeout_s), lambda _: None)
    there = fake_services({URI: flag() if data is None else data}, store=store, **others)
    return run_job(asked, there, context), store, context


def test_a_job_leaves_overlays_arrays_and_last_of_all_its_manifest() -> None:
    asked = job()
    _, store, _ = run(asked)
    assert list(store.objects) == [
        f"{asked.id}/overlay-1-0-red.jpg",
        f"{asked.id}/overlay-2-2-blue.jpg",
        f"{asked.id}/heatmaps.npz",
        f"{asked.id}/manifest.json",
    ]


def test_the_manifest_describes_every_object_that_is_there() -> None:
    asked = job()
    done, store, _ = run(asked)
    text = store.objects[f"{asked.id}/manifest.json"]
    assert done.result.manifest_sha256 == hashlib.sha256(text).hexdigest()
    manifest = Manifest.model_validate_json(text)
    for index, seen in enumerate(manifest.explanations):
        for record in seen.artifacts:
            data = store.objects[record.uri.removeprefix("memory://")]
            assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            if record.kind == "overlay":
                assert decode(data).pixels.shape == (record.height, record.width, 3) == (32, 48, 3)
            else:
                arrays = np.load(io.BytesIO(data))
                assert arrays["class_ids"][record.index] == seen.class_.id
                assert arrays["heatmaps"].shape == record.shape == (2, 4, 4)
                assert float(arrays["raw_max"][index]) == pytest.approx(seen.raw_max)
    assert (manifest.input.width, manifest.input.height, manifest.input.media_type) == (48, 32, "image/png")
    assert manifest.method.layer == "blocks"


def test_the_heatmaps_light_where_the_class_is() -> None:
    asked = job()
    _, store, _ = run(asked)
    red, blue = np.load(io.BytesIO(store.objects[f"{asked.id}/heatmaps.npz"]))["heatmaps"]
    np.testing.assert_array_equal(red, np.repeat([[1, 1, 0, 0]], 4, axis=0))
    np.testing.assert_array_equal(blue, np.repeat([[0, 0, 1, 1]], 4, axis=0))
    overlay = decode(store.objects[f"{asked.id}/overlay-1-0-red.jpg"]).pixels.astype(int)
    left, right = overlay[:, :16].mean((0, 1)), overlay[:, 32:].mean((0, 1))
    assert left[0] > 150, "hot is red on red"
    assert right[2] > 150, "cold is blue on blue"


def test_the_peak_is_given_in_pixels_of_the_image() -> None:
    asked = job(target={"classes": ["blue"]})
    _, store, _ = run(asked)
    seen = Manifest.model_validate_json(store.objects[f"{asked.id}/manifest.json"]).explanations[0]
    assert seen.peak_xy == (30, 4), "the middle of the third cell of four, in 48 x 32"


def test_a_rerun_writes_the_same_bytes_under_the_same_keys() -> None:
    asked = job()
    first, second = run(asked)[1], run(asked)[1]
    assert first.objects == second.objects


def test_a_class_that_nothing_speaks_for_has_an_empty_heatmap_and_a_warning() -> None:
    asked = job(target={"classes": ["green", "red"]})
    done, store, _ = run(asked)
    assert [(one.code, one.class_id) for one in done.warnings] == [("zero_heatmap", 1)]
    manifest = json.loads(store.objects[f"{asked.id}/manifest.json"])
    assert manifest["explanations"][0]["peak_xy"] is None
    assert b"NaN" not in store.objects[f"{asked.id}/manifest.json"]


def noisy(width: int = 900, height: int = 700) -> bytes:
    """A JPEG that looks another when it is decoded at a part of its size."""
    rng = np.random.default_rng(4)
    grain = rng.choice([0, 255], (height, width, 3)).astype(np.uint8)
    grain[:, : width // 2, 0] //= 2
    return cv2.imencode(".jpg", grain, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()


def test_what_the_network_sees_depends_on_the_image_alone_and_not_on_what_is_drawn() -> None:
    data = noisy()
    seen = explain_image(TinyNetwork(), data, top_n=3)
    expected = [(one.id, one.probability) for one in seen.predictions]
    for artifacts in (
        [{"kind": "heatmap"}],
        [{"kind": "overlay"}],
        [{"kind": "overlay", "max_edge": 64}],
        [{"kind": "grid"}, {"kind": "report"}, {"kind": "animation", "max_edge": 64}],
    ):
        asked = job(artifacts=artifacts, target={"top_n": 3}, metrics=["deletion"])
        done, store, _ = run(asked, data=data)
        assert [(one.id, one.probability) for one in done.predictions] == expected
        manifest = Manifest.model_validate_json(store.objects[f"{asked.id}/manifest.json"])
        assert [one.raw_max for one in manifest.explanations] == seen.raw_max.tolist()
        assert (manifest.input.width, manifest.input.height) == (900, 700)


def test_a_damaged_image_is_explained_with_a_warning_that_says_what_it_lacks() -> None:
    data, asked = noisy(160, 120)[:-2], job()
    done, store, _ = run(asked, data=data)
    said = "its end marker is missing"
    assert done.warnings == (ResultWarning(code="image_damaged", missing=0, detail=said),)
    manifest = Manifest.model_validate_json(store.objects[f"{asked.id}/manifest.json"])
    assert (manifest.warnings, manifest.input.damage) == (done.warnings, DamageRecord(missing=0, detail=said))
    assert run(job(), data=noisy(160, 120))[0].warnings == ()


def test_how_much_may_be_missing_is_the_operators_decision() -> None:
    whole = noisy(160, 120)
    cut = whole[: len(whole) * 4 // 5]
    with pytest.raises(ImageDecodeFailed, match=r"premature end of data segment.*less than 5.0% may be"):
        run(job(), data=cut)
    done, _, _ = run(job(), data=cut, limits=Limits(max_damage=0.5))
    (warned,) = done.warnings
    assert 0.15 < (warned.missing or 0) < 0.3


def test_a_report_is_one_page_with_the_facts_of_the_manifest() -> None:
    asked = job(artifacts=[{"kind": "report"}])
    _, store, _ = run(asked)
    made = store.objects[f"{asked.id}/report.html"]
    manifest = Manifest.model_validate_json(store.objects[f"{asked.id}/manifest.json"])
    (record,) = manifest.artifacts
    assert (record.kind, record.media_type) == ("report", "text/html; charset=utf-8")
    assert (record.bytes, record.sha256) == (len(made), hashlib.sha256(made).hexdigest())
    assert b"efficientnet_lite0 \\u00b7 flag.png" in made
    for fact in (asked.id, URI, manifest.input.sha256, "48 x 32 pixels, image/png", manifest.method.layer):
        assert str(fact).encode() in made
    assert run(asked)[1].objects == store.objects


ALL_FORMATS = [
    {"kind": "overlay", "format": "png", "max_edge": 24, "colormap": "viridis"},
    {"kind": "overlay", "format": "webp"},
    {"kind": "heatmap", "format": "npy"},
    {"kind": "heatmap", "format": "png"},
    {"kind": "grid", "format": "png"},
    {"kind": "animation"},
    {"kind": "animation", "format": "webp"},
]


def test_every_format_can_be_asked_for_at_once_and_is_described() -> None:
    asked = job(artifacts=ALL_FORMATS)
    _, store, _ = run(asked)
    names = [name.partition("/")[2] for name in store.objects]
    assert names == [
        "overlay-1-0-red.png",
        "overlay-2-2-blue.png",
        "overlay-1-0-red.webp",
        "overlay-2-2-blue.webp",
        "heatmaps.npy",
        "heatmap-1-0-red.png",
        "heatmap-2-2-blue.png",
        "grid.png",
        "animation.gif",
        "animation.webp",
        "manifest.json",
    ]
    manifest = Manifest.model_validate_json(store.objects[f"{asked.id}/manifest.json"])
    described = [record for seen in manifest.explanations for record in seen.artifacts]
    assert {record.uri.rpartition("/")[2] for record in (*described, *manifest.artifacts)} == {*names[:-1]}
    for record in (*described, *manifest.artifacts):
        data = store.objects[record.uri.removeprefix("memory://")]
        assert record.sha256 == hashlib.sha256(data).hexdigest()
        if record.width:
            shown = Image.open(io.BytesIO(data))
            assert shown.size == (record.width, record.height)
            assert Image.MIME[shown.format or ""] == record.media_type
        else:
            assert np.load(io.BytesIO(data)).shape == record.shape
    small, large = (decode(store.objects[f"{asked.id}/overlay-1-0-red.{ext}"]) for ext in ("png", "webp"))
    assert (small.pixels.shape, large.pixels.shape) == ((16, 24, 3), (32, 48, 3))


def test_a_grey_heatmap_has_the_photos_size_and_is_white_where_the_class_is() -> None:
    asked = job(artifacts=[{"kind": "heatmap", "format": "png"}], target={"classes": ["red"]})
    _, store, _ = run(asked)
    pixels = decode(store.objects[f"{asked.id}/heatmap-1-0-red.png"]).pixels
    assert pixels.shape == (32, 48, 3)
    assert (pixels[:, :16] == 255).all()
    assert (pixels[:, 32:] == 0).all()


@pytest.mark.parametrize("name", sorted(set(cam.METHODS) - {"eigencam"}))
@pytest.mark.parametrize("normalize", cam.NORMALIZE)
def test_a_job_chooses_its_method_and_the_manifest_says_which(name: str, normalize: str) -> None:
    asked = job(method={"name": name, "normalize": normalize}, target={"classes": ["red", "blue"]})
    _, store, _ = run(asked)
    manifest = Manifest.model_validate_json(store.objects[f"{asked.id}/manifest.json"])
    assert (manifest.method.name, manifest.method.normalize) == (name, normalize)
    heatmaps = np.load(io.BytesIO(store.objects[f"{asked.id}/heatmaps.npz"]))["heatmaps"]
    right_is_hot = heatmaps[0, 0, 3] > heatmaps[0, 0, 0]
    assert right_is_hot == (name == "counterfactual"), "red is on the left; what speaks against it is not"


def test_eigencam_asks_no_class_so_all_its_maps_are_the_same() -> None:
    asked = job(method={"name": "eigencam", "normalize": "none"}, target={"classes": ["red", "blue"]})
    _, store, _ = run(asked)
    red, blue = np.load(io.BytesIO(store.objects[f"{asked.id}/heatmaps.npz"]))["heatmaps"]
    np.testing.assert_array_equal(red, blue)
    assert red.any()


def test_metrics_are_in_the_manifest_where_they_were_asked_for_and_nowhere_else() -> None:
    asked, plain = job(metrics=["insertion", "deletion"]), job()
    _, store, context = run(asked)
    manifest = Manifest.model_validate_json(store.objects[f"{asked.id}/manifest.json"])
    for seen in manifest.explanations:
        assert seen.metrics.keys() == {"insertion", "deletion"}
    first = manifest.explanations[0].metrics
    assert first["deletion"] < first["insertion"]
    assert context.metrics["measure_s"] >= 0
    _, store, _ = run(plain)
    bare = Manifest.model_validate_json(store.objects[f"{plain.id}/manifest.json"])
    assert [seen.metrics for seen in bare.explanations] == [{}, {}]


def test_measuring_stops_when_the_time_is_up() -> None:
    class Slow(TinyNetwork):
        def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
            time.sleep(0.1)
            return super().scores(pixels)

    asked = job(metrics=["deletion"], timeout_s=0.35, target={"top_n": 3})
    with pytest.raises(JobTimeout, match="waiting for the device"):
        run(asked, model_cache=ModelCache(lambda _: Slow()))


def test_the_contract_offers_what_the_room_of_mathematics_has() -> None:
    fields = MethodSpec.model_fields
    assert set(get_args(fields["name"].annotation)) == set(cam.METHODS)
    assert set(get_args(fields["score"].annotation)) == set(cam.SCORES)
    assert set(get_args(fields["normalize"].annotation)) == set(cam.NORMALIZE)
    assert set(get_args(Metric)) == set(METRICS)


def test_only_the_artifacts_that_were_asked_for_are_made() -> None:
    asked = job(artifacts=[{"kind": "heatmap"}])
    _, store, _ = run(asked)
    assert list(store.objects) == [f"{asked.id}/heatmaps.npz", f"{asked.id}/manifest.json"]


def test_every_stage_is_timed() -> None:
    _, _, context = run(job())
    stages = {"fetch_s", "decode_s", "load_s", "explain_s", "render_s", "upload_s", "batch_wait_s"}
    assert context.metrics.keys() == {*stages, "batch_size"}
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
def test_what_cannot_be_done_says_at_which_stage_and_leaves_nothing(
    changes: dict[str, Any], error: type[GradcamError], stage: str
) -> None:
    store, asked = MemoryStore(), job(**changes)
    context = JobContext(Deadline(asked.timeout_s), lambda _: None)
    with pytest.raises(error):
        run_job(asked, fake_services({URI: flag()}, store=store), context)
    assert context.current_stage == stage
    assert not store.objects


def test_too_many_classes_are_refused_with_the_setting_that_says_so() -> None:
    with pytest.raises(InvalidJob, match=r"for 3 classes; at most 2 are allowed \(GRADCAM_MAX_CLASSES\)"):
        run(job(target={"classes": [0, 1, 2]}), max_classes=2)


def test_a_job_out_of_time_stops_at_the_next_stage() -> None:
    with pytest.raises(JobTimeout, match="timeout_s of 1e-06 s"):
        run(job(timeout_s=1e-6))


def test_rendering_and_uploading_stop_when_the_time_is_up() -> None:
    asked, store = job(target={"top_n": 3}), MemoryStore()

    class Slow(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            time.sleep(0.2)
            return store.put(key, data, media_type)

    with pytest.raises(JobTimeout, match="upload"):
        run(asked.model_copy(update={"timeout_s": 0.3}), Slow())
    assert 1 <= len(store.objects) < 4
    assert f"{asked.id}/manifest.json" not in store.objects


class Changing:
    """A registry whose one network is described anew each time that somebody asks."""

    def __init__(self) -> None:
        self.told: list[NetworkRow] = []

    def find(self, name: str) -> NetworkRow:
        self.told.append(replace(CATALOG["efficientnet_lite0"], name=name, classes=len(self.told)))
        return self.told[-1]


def test_a_job_may_name_an_own_network_and_gets_it_as_it_is_described_when_it_is_loaded() -> None:
    networks, loaded = Changing(), []

    def load(row: NetworkRow) -> TinyNetwork:
        loaded.append(row)
        return TinyNetwork()

    done, _, _ = run(job(network="tumours"), networks=networks, model_cache=ModelCache(load))
    assert done.network.name == "tumours"
    assert loaded == [networks.told[-1]]


def test_loading_a_network_is_not_held_against_the_job() -> None:
    def load(row: NetworkRow) -> TinyNetwork:
        time.sleep(0.5)
        return TinyNetwork()

    done, _, context = run(job(timeout_s=0.4), model_cache=ModelCache(load))
    assert done.predictions
    assert context.metrics["load_s"] >= 0.5


def test_tiny_network_computes_what_it_promises() -> None:
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[0, :4, :4] = (255, 0, 0)
    computed = TinyNetwork().compute(pixels, np.array([[0, -1, 2]], np.int32))
    assert computed.class_ids.tolist() == [[0, 0, 2]]
    assert computed.raw[0, 0, 0, 0] == pytest.approx(2 / 16)
    assert computed.raw[0, 2, 0, 0] == pytest.approx(-1 / 16)
    assert np.count_nonzero(computed.raw[0, 0]) == 1


def again(asked: Job, store: MemoryStore, images: dict[str, bytes], attempt: int = 2) -> JobResult:
    """Another attempt, when there are these images."""
    context = JobContext(Deadline(asked.timeout_s), lambda _: None, attempt=attempt)
    return run_job(asked, fake_services(images, store=store), context)


@pytest.mark.parametrize("named", [True, False])
def test_a_result_that_is_complete_is_found_again_when_its_image_is_gone(*, named: bool) -> None:
    image = {"uri": URI} | ({"sha256": hashlib.sha256(flag()).hexdigest()} if named else {})
    asked = job(image=image)
    first, store, _ = run(asked)
    before = dict(store.objects)
    assert again(asked, store, {}).result == first.result
    assert store.objects == before
    with pytest.raises(ImageNotFound):
        again(asked, store, {}, attempt=1)
    with pytest.raises(ImageNotFound):
        again(asked, MemoryStore(), {})


def test_a_result_of_other_bytes_is_not_found_again_as_long_as_it_can_be_told() -> None:
    asked = job()
    first, store, _ = run(asked, data=noisy())
    assert again(asked, store, {URI: flag()}).result != first.result, "the image is there, and another one"
    named = asked.model_copy(update={"image": ImageRef(uri=URI, sha256="0" * 64)})
    with pytest.raises(ImageNotFound):
        again(named, store, {})
