"""What a job costs beside the network, on one thread: decoding the photo, laying the heatmaps over it,
encoding, checksums, the manifest; default artifacts, a network and a store that cost nothing. The floor is
what the codecs alone take: one `cv2.imdecode` of the photo, and one `cv2.imencode` of each overlay, JPEG at
quality 90.

The photos are a shipped one, made smaller or larger (cubic), with seeded noise, for an enlarged photo is
smoother than a real one, and its JPEG much smaller.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools.bench.report import Figures, Requirement, at_most, by_figure, plain, table
from devtools.bench.simulated_network import SimulatedNetwork
from devtools.bench.timing import Variant, interleave
from gradcam_worker.artifacts import artifacts
from gradcam_worker.artifacts.render import RenderResult, render
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.explain import Explanation, explain_pixels
from gradcam_worker.gradcam.imaging.overlay import ENCODER_OPTIONS, OverlayBase
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.network import Method
from gradcam_worker.images.fetch import FetchedBytes
from gradcam_worker.images.prepare import DecodedImage
from gradcam_worker.inference.model_cache import InferenceResult, ModelCache
from gradcam_worker.resilience.budget import Reservation, ResourceBudget
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef, Job
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.options import ArtifactSpec
from gradcam_worker.testing import MemoryStore, fake_services

# isort: split
# Only now: the package of the worker tells OpenCV how large an image may be before it is loaded.
import cv2

TITLE = "Host"
PACKAGES = ("opencv-python-headless", "numpy", "pillow", "pydantic")
SIZES = ((500, 375), (4000, 3000))  # pixels, width and height
TOPS = (1, 3, 8)
DEFAULT_TOP = 3  # what the target holds for
TARGET = 2.0  # times the floor, in CPU time
NOISE = 4.0  # levels, standard deviation
SEED = 0
NETWORK = "vgg16"
CELLS = 14  # rows, columns of the map, as VGG16's

Pixels = NDArray[np.uint8]


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


def photo(width: int, height: int) -> bytes:
    """A JPEG of a rocket, as large as asked for and about as many bytes as a camera would make of it."""
    shipped = cv2.imread(str(DATA / "photos" / "rocket.jpg"))
    large = cv2.resize(shipped, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(SEED).normal(0, NOISE, large.shape)
    noisy = np.clip(np.rint(large + noise), 0, 255).astype(np.uint8)
    return bytes(cv2.imencode(".jpg", noisy, ENCODER_OPTIONS["jpeg"])[1].tobytes())


@dataclass(frozen=True)
class Case:
    """One photo, and how many classes of it are explained."""

    top: int
    data: bytes
    network: SimulatedNetwork

    @property
    def job(self) -> Job:
        """With default artifacts."""
        return Job.parse({"image": "s3://in/rocket.jpg", "network": NETWORK, "target": {"top_n": self.top}})

    def services(self) -> Services:
        """Everything that costs nothing."""
        cache = DirectModelCache(lambda _: self.network)
        cache.load(CATALOG[NETWORK])
        fetched = FetchedBytes(self.data, "0" * 64, "s3://in/rocket.jpg")
        return replace(fake_services({}, model_cache=cache), images=FetchedAlready(fetched))

    def variants(self, repeats: int) -> list[Variant]:
        """The floor, and ours."""
        overlays = self.overlays()
        raw, job, services = np.frombuffer(self.data, np.uint8), self.job, self.services()

        def floor() -> None:
            cv2.imdecode(raw, cv2.IMREAD_COLOR_RGB)
            for overlay in overlays:
                cv2.imencode(".jpg", overlay, ENCODER_OPTIONS["jpeg"])

        def ours() -> None:
            run_job(job, services, JobContext(Deadline(job.timeout_s), lambda _: None))

        return [Variant("floor", 1, repeats, floor), Variant("ours", 1, repeats, ours)]

    def overlays(self) -> list[Pixels]:
        """In BGR."""
        base = OverlayBase(decode(self.data).pixels, bgr=True)
        return [base.draw(heatmap) for heatmap in self.explanation().shown]

    def explanation(self) -> Explanation:
        """What the network sees in it."""
        nothing = np.zeros((1, *self.network.facts.input_size, 3), np.uint8)
        return explain_pixels(self.network, nothing, [self.network.labels.select(top_n=self.top)])[0]

    def stages(self, repeats: int) -> list[Variant]:
        """What `ours` consists of, each by itself; what is left are steps between, and hand-overs."""
        job, decoded, seen, deadline = self.job, decode(self.data), self.explanation(), Deadline(3600)
        height, width = decoded.size
        image = InputRecord(
            uri="s3://in/rocket.jpg",
            sha256="0" * 64,
            bytes=len(self.data),
            media_type=decoded.media_type,
            width=width,
            height=height,
        )
        photo = DecodedImage(image, decoded, Reservation(ResourceBudget(0, "pixels"), 0))

        def draw(specs: Sequence[ArtifactSpec]) -> RenderResult:
            return render(specs, photo, seen, deadline, job_id=job.id, method=job.method)

        rendered = draw(job.artifacts)

        def store() -> None:
            memory = MemoryStore()
            records = artifacts.upload(memory, "job", rendered, deadline)
            artifacts.write_manifest(
                memory, "job", artifacts.build_manifest(job, image, seen, rendered, records), deadline
            )

        return [
            Variant(name, 1, repeats, run)
            for name, run in {
                "decode": lambda: decode(self.data),
                "fit": lambda: fit(decoded.pixels, self.network.facts.input_size),
                "classes": self.explanation,
                "hot regions": lambda: draw(()),
                "hot regions, overlays": lambda: draw(job.artifacts[:1]),
                "hot regions, heatmaps": lambda: draw(job.artifacts[1:]),
                "hashes, manifest": store,
            }.items()
        ]


def measure(*, quick: bool) -> dict[str, Any]:
    """One size of photo after the other; floor and ours take turns."""
    network, threads = SimulatedNetwork("no_time", cells=CELLS), cv2.getNumThreads()
    cv2.setNumThreads(1)  # as in the worker
    try:
        by_size = {f"{size[0]}x{size[1]}": _measure_size(size, network, quick=quick) for size in SIZES}
    finally:
        cv2.setNumThreads(threads)
    return {
        **by_figure(by_size),
        "default_top": DEFAULT_TOP,
        "required_times_floor": TARGET,
    }


def _measure_size(size: tuple[int, int], network: SimulatedNetwork, *, quick: bool) -> dict[str, Any]:
    repeats = (3 if quick else 15) if size == SIZES[-1] else (20 if quick else 150)
    data = photo(*size)
    costs = {
        str(top): {cost.variant: cost for cost in interleave(Case(top, data, network).variants(repeats))}
        for top in TOPS
    }
    return {
        "times_floor": {top: both["ours"].cpu / both["floor"].cpu for top, both in costs.items()},
        "seconds": {
            top: {name: {"wall": cost.wall, "cpu": cost.cpu} for name, cost in both.items()}
            for top, both in costs.items()
        },
        "stages": {
            cost.variant: cost.cpu for cost in interleave(Case(DEFAULT_TOP, data, network).stages(repeats))
        },
    }


def requirements(found: Figures) -> Iterator[Requirement]:
    """Times the floor at both sizes."""
    top, most = str(found["default_top"]), found["required_times_floor"]
    for size, times in found["times_floor"].items():
        yield at_most(f"{size}, top {top}: CPU time, by the codecs' alone", most, times[top], " times")


def tables(found: Figures) -> Iterator[str]:
    """Times the floor, and where the time goes."""
    rows = [
        (
            size,
            top,
            *(f"{1e3 * found['seconds'][size][top][one]['cpu']:.2f}" for one in ("floor", "ours")),
            plain(times),
        )
        for size, by_top in found["times_floor"].items()
        for top, times in by_top.items()
    ]
    headings = ("photo", "classes", "codecs alone, CPU ms", "ours, CPU ms", "times the codecs")
    yield from table(headings, rows)
    yield "Where ours goes, CPU ms:"
    yield ""
    stages = found["stages"]
    names = list(next(iter(stages.values())))
    rows = [(name, *(f"{1e3 * by_size[name]:.2f}" for by_size in stages.values())) for name in names]
    yield from table(("", *stages), rows)
