"""What a job costs beside the network, on one thread: decoding the photo, laying the heatmaps over it,
encoding, checksums, the manifest; default artifacts, a network and a store that cost nothing. The floor is
what the codecs alone take: one `cv2.imdecode` of the photo, and one `cv2.imencode` of each overlay, JPEG at
quality 90.

The photos are a shipped one, made smaller or larger (cubic), with seeded noise, for an enlarged photo is
smoother than a real one, and its JPEG much smaller.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools.bench.report import Figures, Requirement, at_most, by_figure, plain, table
from devtools.bench.simulated_network import SimulatedNetwork
from devtools.bench.timing import Variant, interleave
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.explain import explain_pixels
from gradcam_worker.gradcam.imaging.overlay import ENCODER_OPTIONS, OverlayBase
from gradcam_worker.gradcam.network import Method
from gradcam_worker.images.fetch import FetchedBytes
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.inference.request import InferenceResult
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef, Job
from gradcam_worker.testing import fake_services

# isort: split
# Only now: the package of the worker tells OpenCV how large an image may be before it is loaded.
import cv2

TITLE = "Host"
PACKAGES = ("opencv-python-headless", "numpy", "pillow", "pydantic")
SIZES = ((500, 375), (4000, 3000))  # pixels, width and height
TOPS = (1, 3, 8)
DEFAULT_TOP = 3  # what is required holds for
REQUIRED_TIMES_FLOOR = 2.0  # in CPU time
NOISE = 4.0  # levels, standard deviation
SEED = 0
NETWORK = "vgg16"
CELLS = 14  # rows, columns of the map, as VGG16's
URI = "s3://in/rocket.jpg"
STAGES = ("decode", "explain", "render", "upload")


class DirectModelCache(ModelCache):
    """Computes in the job's own thread: handing over to the device's is no part of this bench."""

    def infer(
        self, network: Any, pixels: Any, wish: Any, method: Method, *_: Any, **__: Any
    ) -> InferenceResult:
        """See `gradcam_worker.inference.model_cache.BatchSlot.infer`."""
        return InferenceResult(explain_pixels(network, pixels[np.newaxis], [tuple(wish)], method)[0], 0, 0, 1)

    @contextmanager
    def reserve(self) -> Iterator[Any]:
        """See `gradcam_worker.inference.model_cache.ModelCache.reserve`."""
        yield self


@dataclass(frozen=True)
class FetchedAlready:
    """One image that is there already, and whose checksum is known."""

    fetched: FetchedBytes

    def fetch(self, image: ImageRef, deadline: Deadline, max_bytes: int | None = None) -> FetchedBytes:  # noqa: ARG002
        """See `gradcam_worker.images.fetch.UriFetcher.fetch`."""
        return self.fetched


class CpuContext(JobContext):
    """Measures the processor time of each stage."""

    def __init__(self, job: Job) -> None:
        super().__init__(Deadline(job.timeout_s), lambda _: None)
        self.cpu: dict[str, float] = {}

    @contextmanager
    def enter_stage(self, stage: str) -> Iterator[None]:
        """See `gradcam_worker.execution.attempt.JobContext.enter_stage`."""
        begun = time.process_time()
        with super().enter_stage(stage):
            yield
        self.cpu[stage] = time.process_time() - begun


def photo(width: int, height: int) -> bytes:
    """A JPEG of a rocket, as large as asked for and about as many bytes as a camera would make of it."""
    shipped = cv2.imread(str(DATA / "photos" / "rocket.jpg"))
    large = cv2.resize(shipped, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(SEED).normal(0, NOISE, large.shape)
    noisy = np.clip(np.rint(large + noise), 0, 255).astype(np.uint8)
    return bytes(cv2.imencode(".jpg", noisy, ENCODER_OPTIONS["jpeg"])[1].tobytes())


def overlays(data: bytes, network: SimulatedNetwork, top: int) -> list[NDArray[np.uint8]]:
    """What is encoded for a photo, in BGR."""
    nothing = np.zeros((1, *network.facts.input_size, 3), np.uint8)
    (explanation,) = explain_pixels(network, nothing, [network.labels.select(top_n=top)])
    base = OverlayBase(decode(data).pixels, bgr=True)
    return [base.draw(heatmap) for heatmap in explanation.shown]


def services(data: bytes, network: SimulatedNetwork) -> Services:
    """Everything around a job costs nothing."""
    cache = DirectModelCache(lambda _: network)
    cache.load(CATALOG[NETWORK])
    fetched = FetchedAlready(FetchedBytes(data, "0" * 64, URI))
    return replace(fake_services({}, model_cache=cache), images=fetched)


def measure(*, quick: bool) -> dict[str, Any]:
    """One size of photo after the other; floor and ours take turns."""
    network, threads = SimulatedNetwork("no_time", cells=CELLS), cv2.getNumThreads()
    cv2.setNumThreads(1)  # as in the worker
    try:
        return by_figure(
            {f"{size[0]}x{size[1]}": _measure_size(size, network, quick=quick) for size in SIZES}
        )
    finally:
        cv2.setNumThreads(threads)


def _measure_size(size: tuple[int, int], network: SimulatedNetwork, *, quick: bool) -> dict[str, Any]:
    repeats = (3 if quick else 15) if size == SIZES[-1] else (20 if quick else 150)
    data = photo(*size)
    raw, everything = np.frombuffer(data, np.uint8), services(data, network)
    times, seconds, stages = {}, {}, dict[str, float]()
    for top in TOPS:
        drawn, contexts = overlays(data, network, top), list[CpuContext]()
        job = Job.parse({"image": URI, "network": NETWORK, "target": {"top_n": top}})

        def floor(drawn: list[NDArray[np.uint8]] = drawn) -> None:
            cv2.imdecode(raw, cv2.IMREAD_COLOR_RGB)
            for overlay in drawn:
                cv2.imencode(".jpg", overlay, ENCODER_OPTIONS["jpeg"])

        def ours(job: Job = job, contexts: list[CpuContext] = contexts) -> None:
            contexts.append(CpuContext(job))
            run_job(job, everything, contexts[-1])

        costs = interleave([Variant("floor", 1, repeats, floor), Variant("ours", 1, repeats, ours)])
        seconds[str(top)] = {cost.variant: {"wall": cost.wall, "cpu": cost.cpu} for cost in costs}
        times[str(top)] = costs[1].cpu / costs[0].cpu
        if top == DEFAULT_TOP:
            stages = {name: median(context.cpu[name] for context in contexts) for name in STAGES}
    return {"times_floor": times, "seconds": seconds, "stages": stages}


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Times the floor at both sizes."""
    for size, times in figures["times_floor"].items():
        what = f"{size}, top {DEFAULT_TOP}: CPU time, by the codecs' alone"
        yield at_most(what, REQUIRED_TIMES_FLOOR, times[str(DEFAULT_TOP)], " times")


def blocks(figures: Figures) -> Iterator[str]:
    """Times the floor, and where the time goes."""
    rows = [
        (size, top, *(f"{1e3 * costs[name]['cpu']:.2f}" for name in ("floor", "ours")), plain(times[top]))
        for size, times in figures["times_floor"].items()
        for top, costs in figures["seconds"][size].items()
    ]
    headings = ("photo", "classes", "codecs alone, CPU ms", "ours, CPU ms", "times the codecs")
    yield table(headings, rows)
    yield f"Where ours goes, CPU ms, {DEFAULT_TOP} classes:"
    stages = figures["stages"]
    names = next(iter(stages.values()))
    rows = [(name, *(f"{1e3 * seconds[name]:.2f}" for seconds in stages.values())) for name in names]
    yield table(("", *stages), rows)
