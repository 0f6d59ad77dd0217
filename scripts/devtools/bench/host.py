"""What the host does for each image beside the network, against what the codecs alone would take.

    floor   one `cv2.imdecode` of the photo and one `cv2.imencode` of each overlay, JPEG at quality 90
    ours    a whole job with default artifacts: everything `pipeline.explain` does, with a network, an image
            source and a store that cost nothing

Both on one thread, so OpenCV's own threads are off. The photos are a shipped one, made smaller or larger
(cubic), with seeded noise, for an enlarged photo is smoother than a real one, and its JPEG much smaller.
The stages of `ours` are timed by themselves; the encoders with what they might be set to.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools.bench.encoders import Encoded, compare
from devtools.bench.free import NETWORK, Direct, Fetch, Free
from devtools.bench.timing import Cost, Way, machine, take_turns, versions
from gradcam_worker.artifacts import artifacts
from gradcam_worker.artifacts.render import Rendered, render
from gradcam_worker.execution.pipeline import JobContext, run_job
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.explain import Explanation, explain_pixels
from gradcam_worker.gradcam.imaging.overlay import ENCODING, Base, fit
from gradcam_worker.images.fetch import Fetched
from gradcam_worker.images.prepare import DecodedImage
from gradcam_worker.resilience.budget import Reservation, ResourceBudget
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.options import ArtifactSpec
from gradcam_worker.testing import MemoryStore, fake_services

# isort: split
# Only now: the package of the worker tells OpenCV how large a picture may be before it is loaded.
import cv2

SIZES = ((500, 375), (4000, 3000))  # pixels, width and height
TOPS = (1, 3, 8)
DEFAULT_TOP = 3  # what the target holds for
TARGET = 2.0  # times the floor, in CPU time
NOISE = 4.0  # levels, standard deviation
SEED = 0
PACKAGES = ("opencv-python-headless", "numpy", "pillow", "pydantic")

Pixels = NDArray[np.uint8]


def photo(width: int, height: int) -> bytes:
    """A JPEG of a rocket, as large as asked for and about as many bytes as a camera would make of it."""
    shipped = cv2.imread(str(DATA / "photos" / "rocket.jpg"))
    large = cv2.resize(shipped, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(SEED).normal(0, NOISE, large.shape)
    noisy = np.clip(np.rint(large + noise), 0, 255).astype(np.uint8)
    return bytes(cv2.imencode(".jpg", noisy, ENCODING["jpeg"])[1].tobytes())


@dataclass(frozen=True)
class Case:
    """One photo, and how many classes of it are explained."""

    size: tuple[int, int]  # width and height, in pixels
    top: int
    data: bytes
    network: Free

    def __str__(self) -> str:
        """Read like `4000x3000`."""
        return "{}x{}".format(*self.size)

    @property
    def job(self) -> Job:
        """With default artifacts."""
        return Job.parse({"image": "s3://in/rocket.jpg", "network": NETWORK, "target": {"top_n": self.top}})

    def fetched(self) -> Fetched:
        """The photo, as an image source hands it over."""
        return Fetched(self.data, "0" * 64, "s3://in/rocket.jpg")

    def services(self) -> Services:
        """Everything that costs nothing."""
        model_cache = Direct(lambda _: self.network)
        model_cache.load(CATALOG[NETWORK])
        return replace(fake_services({}, model_cache=model_cache), images=Fetch(self.fetched()))

    def ways(self, repeats: int) -> list[Way]:
        """The floor, and ours."""
        laid = self.laid()
        raw, job, place = np.frombuffer(self.data, np.uint8), self.job, self.services()

        def floor() -> None:
            cv2.imdecode(raw, cv2.IMREAD_COLOR_RGB)
            for overlay in laid:
                cv2.imencode(".jpg", overlay, ENCODING["jpeg"])

        def ours() -> None:
            run_job(job, place, JobContext(Deadline(job.timeout_s), lambda _: None))

        return [Way("floor", 1, repeats, floor), Way("ours", 1, repeats, ours)]

    def laid(self) -> list[Pixels]:
        """The overlays, in BGR."""
        base = Base(decode(self.data).pixels, bgr=True)
        return [base.lay(heatmap) for heatmap in self.seen().shown]

    def seen(self) -> Explanation:
        """What the network sees in it."""
        nothing = np.zeros((1, *self.network.facts.input_size, 3), np.uint8)
        return explain_pixels(self.network, nothing, [self.network.labels.wanted(top_n=self.top)])[0]

    def stages(self, repeats: int) -> list[Way]:
        """What `ours` consists of, each by itself; what is left are steps between, and hand-overs."""
        job, decoded, seen, deadline = self.job, decode(self.data), self.seen(), Deadline(3600)
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

        def draw(specs: Sequence[ArtifactSpec]) -> Rendered:
            return render(specs, photo, seen, deadline, job_id=job.id, method=job.method)

        rendered = draw(job.artifacts)

        def store() -> None:
            place = MemoryStore()
            records = artifacts.upload(place, "job", rendered, deadline)
            artifacts.write_manifest(
                place, "job", artifacts.describe(job, image, seen, rendered, records), deadline
            )

        return [
            Way(name, 1, repeats, run)
            for name, run in {
                "decode": lambda: decode(self.data),
                "fit": lambda: fit(decoded.pixels, self.network.facts.input_size),
                "classes": self.seen,
                "hot regions": lambda: draw(()),
                "hot regions, overlays": lambda: draw(job.artifacts[:1]),
                "hot regions, heatmaps": lambda: draw(job.artifacts[1:]),
                "hashes, manifest": store,
            }.items()
        ]


@dataclass(frozen=True)
class Result:
    """What was found out about one size of photo."""

    size: str
    kilobytes: float  # of the photo
    costs: dict[int, dict[str, Cost]]  # by top: floor and ours
    stages: tuple[Cost, ...]  # of the default top
    encoders: dict[str, Encoded]

    def times_floor(self, top: int) -> float:
        """CPU time of ours / CPU time of the codecs alone: 1 is the best there can be."""
        return self.costs[top]["ours"].cpu / self.costs[top]["floor"].cpu

    @property
    def passed(self) -> bool:
        """The target is held where it was set."""
        return self.times_floor(DEFAULT_TOP) <= TARGET


def measure(size: tuple[int, int], network: Free, *, quick: bool) -> Result:
    """One size of photo; all its ways take turns."""
    large = size == SIZES[-1]
    repeats = (3 if quick else 15) if large else (20 if quick else 150)
    data = photo(*size)
    cases = {top: Case(size, top, data, network) for top in TOPS}
    costs = {}
    for top, case in cases.items():
        costs[top] = {cost.way: cost for cost in take_turns(case.ways(repeats))}
    default = cases[DEFAULT_TOP]
    few = max(repeats // 5, 1)
    return Result(
        size=str(default),
        kilobytes=len(data) / 1000,
        costs=costs,
        stages=take_turns(default.stages(repeats)),
        encoders={} if quick and large else compare(default.laid()[0], few),
    )


def table(result: Result) -> Iterator[str]:
    """One size's figures, line by line."""
    yield f"{result.size}, a JPEG of {result.kilobytes:.0f} KB, default artifacts, medians in ms"
    yield f"  {'top':<5}{'floor CPU':>11}{'ours CPU':>11}{'ours wall':>11}{'times floor':>13}"
    for top, costs in result.costs.items():
        floor, ours = costs["floor"], costs["ours"]
        figures = f"{floor.cpu * 1e3:>11.2f}{ours.cpu * 1e3:>11.2f}{ours.wall * 1e3:>11.2f}"
        yield f"  {top:<5}{figures}{result.times_floor(top):>13.2f}"
    yield f"  stages by themselves, top {DEFAULT_TOP}, CPU ms"
    for cost in result.stages:
        yield f"    {cost.way:<24}{cost.cpu * 1e3:>9.3f}"
    for name, encoded in result.encoders.items():
        yield f"    {name:<24}{encoded.cost.cpu * 1e3:>9.2f} ms{encoded.kilobytes:>9.0f} KB"


def document(results: list[Result], about: Mapping[str, Any], took_s: float) -> dict[str, Any]:
    """Everything as plain data; ratios are within this run, seconds are medians a call."""
    return {
        "times_floor": {
            result.size: {str(top): result.times_floor(top) for top in result.costs} for result in results
        },
        "seconds": {
            result.size: {
                str(top): {way: {"wall": cost.wall, "cpu": cost.cpu} for way, cost in costs.items()}
                for top, costs in result.costs.items()
            }
            for result in results
        },
        "stages": {result.size: {cost.way: cost.cpu for cost in result.stages} for result in results},
        "encoders": {
            result.size: {
                name: {"cpu": encoded.cost.cpu, "kilobytes": encoded.kilobytes}
                for name, encoded in result.encoders.items()
            }
            for result in results
        },
        "default_top": DEFAULT_TOP,
        "required_times_floor": TARGET,
        "passed": all(result.passed for result in results),
        "took_s": took_s,
        "machine": about,
        "versions": versions(*PACKAGES),
    }


def main(*, quick: bool, as_json: bool) -> int:
    """Measure one size after the other; 0, or 1 where the target is missed."""
    begun, about, results, network = time.perf_counter(), machine(), [], Free()
    say = (lambda _: None) if as_json else print
    say(", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()))
    say(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # as in the worker
    try:
        for size in SIZES:
            results.append(measure(size, network, quick=quick))
            say("\n" + "\n".join(table(results[-1])))
    finally:
        cv2.setNumThreads(threads)
    took_s = time.perf_counter() - begun
    say(f"\nRequired: at most {TARGET:g} times the floor in CPU time, top {DEFAULT_TOP}.")
    for result in results:
        word = "ok" if result.passed else "MISSED"
        say(f"  {result.size:<10}{result.times_floor(DEFAULT_TOP):>6.2f} times  {word}")
    say(f"Took {took_s:.0f} s.")
    if as_json:
        json.dump(document(results, about, took_s), sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 0 if all(result.passed for result in results) else 1
