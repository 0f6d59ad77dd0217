"""Jobs and shards by RISE and occlusion, which need nothing but scores."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidJob, JobCanceled, JobTimeout, MethodNotSupported
from gradcam_worker.execution.attempt import JobContext, JobResult, Progress
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.execution.shards import run_shard
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method, Network
from gradcam_worker.gradcam.score_networks.score_network import ScoreNetwork, wrap_callable
from gradcam_worker.inference.engine_client import EngineClient
from gradcam_worker.inference.engine_server import EngineFacts, EngineServer
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.shard import Shard, data_key
from gradcam_worker.schemas.status import PassState
from gradcam_worker.testing import MemoryStore, TinyNetwork, fake_services

URI = "s3://in/a.png"
WAIT_S = 30.0
NO_IMAGE = b"no image"
RISE = {"name": "rise", "masks": 200, "seed": 3}


def patch() -> bytes:
    """A PNG of 48 x 48 pixels: dark, with a red patch at the top right."""
    pixels = np.full((48, 48, 3), 40, np.uint8)
    pixels[6:18, 30:42] = (0, 0, 255)  # OpenCV writes blue first
    return cv2.imencode(".png", pixels)[1].tobytes()


def make_job(**changes: Any) -> Job:
    fields = {"image": URI, "network": "efficientnet_lite0", "target": {"classes": ["red", "blue"]}}
    return Job.parse({**fields, "method": RISE, **changes})


def run(
    job: Job,
    network: Network | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    **others: Any,
) -> tuple[JobResult, Manifest, MemoryStore]:
    store = MemoryStore()
    if network:
        others["inference"] = ModelCache(lambda _: network)
    services = fake_services({URI: patch()}, store=store, **others)
    result = run_job(job, services, JobContext(Deadline(job.timeout_s), report))
    return result, Manifest.model_validate_json(store.objects[f"{job.id}/manifest.json"]), store


def heatmaps(store: MemoryStore, job: Job) -> NDArray[np.float32]:
    return np.asarray(np.load(io.BytesIO(store.objects[f"{job.id}/heatmaps.npz"]))["heatmaps"])


def test_a_job_by_rise_says_how_it_was_computed_and_what_it_cost() -> None:
    job = make_job()
    result, manifest, store = run(job)
    method = manifest.method
    assert (method.name, method.masks, method.cells, method.seed, method.layer) == ("rise", 200, 7, 3, None)
    assert (method.baseline, method.scored_images, manifest.network.layer) == ("grey", 201, "input")
    assert result.passes == PassState(done=4, total=4)
    assert heatmaps(store, job).shape == (2, 16, 16)
    red, blue = manifest.explanations
    assert red.raw_max > 3 * abs(red.raw_min)
    assert blue.raw_min < 0
    assert red.peak_xy is not None
    x, y = red.peak_xy
    assert 30 <= x < 42
    assert 6 <= y < 18


def test_a_job_by_occlusion_has_the_defaults_of_its_network_in_the_manifest() -> None:
    _, manifest, _ = run(make_job(method={"name": "occlusion"}))
    assert (manifest.method.window, manifest.method.stride, manifest.method.masks) == (2, 1, None)
    assert manifest.method.scored_images == 1 + 15 * 15


def test_a_manifest_by_gradcam_has_no_field_of_other_methods() -> None:
    _, _, store = run(job := make_job(method={}))
    text = store.objects[f"{job.id}/manifest.json"].decode()
    assert not [name for name in ("masks", "window", "baseline", "scored_images") if name in text]


def test_the_progress_of_a_job_counts_its_passes() -> None:
    reported: list[Progress] = []
    run(make_job(), report=reported.append)
    passes = [progress.passes for progress in reported if progress.passes]
    assert passes == [PassState(done=done, total=4) for done in range(5)]
    assert {progress.stage for progress in reported if progress.passes} == {"explain"}


class CountingNetwork(TinyNetwork):
    """Counts its passes."""

    passes = 0

    def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.passes += 1
        return super().scores(pixels)


def test_a_job_that_is_cancelled_ends_after_the_pass_that_runs() -> None:
    network = CountingNetwork()

    def report(progress: Progress) -> None:
        if progress.passes and progress.passes.done == 2:
            raise JobCanceled

    with pytest.raises(JobCanceled):
        run(make_job(), network, report)
    assert network.passes == 2


def test_a_job_whose_deadline_passes_ends_after_the_pass_that_runs_and_says_how_far_it_got() -> None:
    network = CountingNetwork()
    context = JobContext(Deadline(WAIT_S), lambda _: None)

    def report(progress: Progress) -> None:
        if progress.passes and progress.passes.done == 2:
            context.deadline._end_s -= 2 * WAIT_S

    context.report_progress = report
    services = fake_services({URI: patch()}, inference=ModelCache(lambda _: network))
    with pytest.raises(
        JobTimeout,
        match=r"pass 3 of 4\). 2 of 4 passes were done: give more time \(timeout_s\), or take fewer masks",
    ):
        run_job(make_job(), services, context)
    assert network.passes == 2


@contextmanager
def engine(path: Path, network: Callable[[], Network]) -> Iterator[EngineClient]:
    """A job process's connection to an engine, which serves in a thread."""
    server = EngineServer(
        ModelCache(lambda _: network()), path, EngineFacts("cpu", on_gpu=False, max_batch=3)
    )
    thread = threading.Thread(target=server.serve)
    thread.start()
    client = EngineClient(path, pool_bytes=2**20)
    try:
        client.connect(WAIT_S)
        yield client
    finally:
        client.close()
        server.stop()
        thread.join(WAIT_S)


@pytest.mark.parametrize("method", [RISE, {"name": "occlusion", "score": "probability"}])
def test_job_shard_engine_and_library_give_the_same_map_to_the_last_digit(
    method: dict[str, Any], tmp_path: Path
) -> None:
    job = make_job(method={**method, "normalize": "none"})
    _, _, store = run(job)
    expected = heatmaps(store, job)
    chosen = Method(**{**dict(job.method), "normalize": "none"})
    in_library = explain_image(TinyNetwork(), patch(), classes=["red", "blue"], method=chosen)
    np.testing.assert_array_equal(in_library.heatmaps, expected)
    with engine(tmp_path / "engine", TinyNetwork) as client:
        _, _, store = run(job, inference=client)
    np.testing.assert_array_equal(heatmaps(store, job), expected)


def shard(count: int, **changes: Any) -> Shard:
    fields = {
        "backfill": "01234567-89ab-7def-8123-456789abcdef",
        "index": 0,
        "key": "00000000-0123456789abcdef",
        "first": 0,
        "rows": [{"uri": f"s3://in/{number}.png"} for number in range(count)],
        "network": "efficientnet_lite0",
        "target": {"classes": ["red", "blue"]},
        "method": RISE,
        "output": "s3://out/set",
    }
    return Shard.model_validate({**fields, **changes})


def run_rows(work: Shard, images: dict[str, Any], network: Network | None = None) -> tuple[Any, JobContext]:
    alive: list[None] = []
    context = JobContext(Deadline(WAIT_S), lambda _: None, progressed=lambda: alive.append(None))
    store = MemoryStore()
    cache = ModelCache(lambda _: network or TinyNetwork())
    run_shard(work, fake_services(images, store=store, inference=cache), context)
    assert bool(alive) == any(isinstance(data, bytes) and data != NO_IMAGE for data in images.values())
    return pq.read_table(io.BytesIO(store.objects[data_key(work.key)])), context


def test_a_row_of_a_shard_has_the_map_of_a_job_whichever_rows_are_beside_it() -> None:
    job = make_job()
    _, manifest, store = run(job)
    images = {f"s3://in/{number}.png": patch() for number in range(3)}
    images["s3://in/1.png"] = NO_IMAGE
    table, _ = run_rows(shard(3), images)
    rows = table.to_pylist()
    expected = heatmaps(store, job).astype(np.float16).reshape(2, -1)
    for number in (0, 2):
        found = [row for row in rows if row["row"] == number]
        np.testing.assert_array_equal([row["heatmap"] for row in found], expected)
        assert [row["raw_max"] for row in found] == [one.raw_max for one in manifest.explanations]
    assert [row["error"] for row in rows if row["row"] == 1] == ["unsupported_media_type"]


def test_a_shard_of_which_no_image_can_be_read_is_finished_without_a_pass() -> None:
    network = CountingNetwork()
    table, _ = run_rows(shard(1), {"s3://in/0.png": NO_IMAGE}, network)
    assert network.passes == 0
    assert b'"grid": [16, 16]' in (table.schema.metadata or {})[b"gradcam"]


def only_scores() -> ScoreNetwork:
    network = TinyNetwork()
    return wrap_callable(
        network.scores, input_size=(16, 16), labels=["red", "green", "blue"], name="efficientnet_lite0"
    )


def test_a_job_without_a_method_gets_rise_of_a_network_that_only_gives_scores() -> None:
    job = Job.parse({"image": URI, "network": "efficientnet_lite0", "target": {"top_n": 1}})
    sent = Job.parse(job.model_dump(mode="json", by_alias=True))  # as a worker receives it
    _, manifest, _ = run(sent, only_scores())
    assert (manifest.method.name, manifest.method.masks, manifest.network.backend) == (
        "rise",
        1024,
        "a Python function",
    )
    _, manifest, _ = run(sent)
    assert manifest.method.name == "gradcam"


@pytest.mark.parametrize("name", ["gradcam", "layercam"])
def test_a_method_with_gradients_of_a_network_that_only_gives_scores_is_refused(name: str) -> None:
    job = make_job(method={"name": name})
    sent = Job.parse(job.model_dump(mode="json", by_alias=True))
    with pytest.raises(
        MethodNotSupported, match=f"{name} needs the gradients .* there are rise and occlusion"
    ):
        run(sent, only_scores())


def test_a_parameter_that_does_not_fit_to_the_network_is_refused() -> None:
    with pytest.raises(InvalidJob, match="window of occlusion is 17; for this network it must be 1 to 16"):
        run(make_job(method={"name": "occlusion", "window": 17}))


def test_a_backfill_without_a_method_records_the_one_that_its_network_got() -> None:
    work = Shard.model_validate_json(shard(1, method={}).to_json())
    table, _ = run_rows(work, {"s3://in/0.png": patch()}, only_scores())
    assert b'"name": "rise"' in (table.schema.metadata or {})[b"gradcam"]
    assert b'"masks": 1024' in (table.schema.metadata or {})[b"gradcam"]


def test_a_network_that_only_gives_scores_is_warmed_up_with_one_pass() -> None:
    network = only_scores()
    cache = ModelCache(lambda _: network, max_batch=0)
    explanation = cache.warm_up(fake_services({}).networks.find("efficientnet_lite0")).explanation
    assert explanation.layer == "input"


class SlowNetwork(TinyNetwork):
    """Notes what it computes; Grad-CAM waits until it may go on."""

    def __init__(self) -> None:
        self.computed: list[str] = []
        self.at_device, self.go_on = threading.Event(), threading.Event()

    def begin(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Callable[[], Computed]:
        self.computed.append(method.name)
        self.at_device.set()
        assert self.go_on.wait(WAIT_S)
        return super().begin(pixels, wanted, method)

    def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        if len(pixels) > 1:  # else `compute` asks for the scores
            self.computed.append("pass")
        return super().scores(pixels)


def test_jobs_by_gradcam_that_come_later_are_computed_before_the_next_pass_of_rise() -> None:
    network = SlowNetwork()
    cache = ModelCache(lambda _: network)
    row = fake_services({}).networks.find("efficientnet_lite0")

    def explain(method: str) -> None:
        with cache.reserve() as slot:
            slot.infer(
                cache.load(row), np.zeros((16, 16, 3), np.uint8), (0,), Method(method), Deadline(WAIT_S)
            )

    threads: list[threading.Thread] = []

    def start(method: str) -> None:
        threads.append(threading.Thread(target=explain, args=[method]))
        threads[-1].start()

    def report(progress: Progress) -> None:
        if progress.passes and progress.passes.done == 1:  # the device is busy when the second pass comes
            start("gradcam")
            assert network.at_device.wait(WAIT_S)

    def wait_for(count: int) -> None:
        end_s = time.monotonic() + WAIT_S
        while sum(len(queue.waiting) for queue in cache._batcher._queues.values()) < count:
            assert time.monotonic() < end_s
            time.sleep(0.001)

    rise = threading.Thread(target=run, args=[make_job()], kwargs={"inference": cache, "report": report})
    rise.start()
    assert network.at_device.wait(WAIT_S)
    wait_for(1)  # the second pass
    for waiting, method in enumerate(("layercam", "hirescam"), start=2):
        start(method)
        wait_for(waiting)
    network.go_on.set()
    for thread in (rise, *threads):
        thread.join(WAIT_S)
    assert network.computed[:5] == ["pass", "gradcam", "layercam", "hirescam", "pass"]
    assert network.computed.count("pass") == 4
