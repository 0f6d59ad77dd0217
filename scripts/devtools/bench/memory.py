"""Ten thousand mixed jobs in a seeded random order: most of a simulated network, with every kind of artifact;
some of EfficientNet-Lite0 with several methods, some photos of 4000 x 3000, some broken images that have to
fail. Growth of the resident set is from the second quarter of the jobs to the last. Then two thousand of them
with one process, and two thousand with an engine process and two job processes: the most memory that all
processes of the worker had together. What they share counts once.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from statistics import median
from typing import Any

import numpy as np

from devtools.bench import simulated_network, testbed
from devtools.bench.report import Figures, Requirement, at_most, table
from devtools.bench.testbed import Testbed
from devtools.processes import Meter, proportional_bytes, repeating
from gradcam_worker.errors import WorkerLost
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import FINAL

TITLE = "Memory"
JOBS, QUICK_JOBS = 10_000, 100
TOGETHER = 2000  # jobs of each arrangement
JOB_PROCESSES = 2
PHOTOS, QUICK_PHOTOS = 100, 10
LARGE = (3000, 4000)  # (height, width)
WEIGHED_EVERY_S = 1.0
WAITING = 200  # jobs in the queue at any time, as a backfill keeps them
SHOWN = 10  # points of the curve
REQUIRED_GROWTH = 0.05
REQUIRED_TOGETHER = 1.35  # times the memory of one process
NETWORKS = ("no_time", "efficientnet_lite0")  # the quick form has the first alone
PACKAGES = ("celery", "kombu", "redis", "boto3", "tensorflow", "keras", "opencv-python-headless")

Fields = dict[str, Any]
OVERLAYS: Fields = {"kind": "overlay", "format": "png", "colormap": "viridis", "contour": True, "box": True}
KINDS: dict[str, tuple[int, Fields]] = {  # name -> of 1000 jobs, fields
    "default": (650, {"network": "no_time", "target": {"top_n": 3}}),
    "classes": (100, {"network": "no_time", "target": {"classes": [285, "espresso", "n02979186"]}}),
    "png": (70, {"network": "no_time", "artifacts": [OVERLAYS, {"kind": "heatmap", "format": "png"}]}),
    "webp": (20, {"network": "no_time", "artifacts": [{"kind": "overlay", "format": "webp"}]}),
    "grid": (30, {"network": "no_time", "artifacts": [{"kind": "grid"}]}),
    "animation": (10, {"network": "no_time", "artifacts": [{"kind": "animation"}]}),
    "report": (10, {"network": "no_time", "artifacts": [{"kind": "report"}]}),
    "large": (10, {"network": "no_time"}),
    "real": (40, {"network": "efficientnet_lite0", "target": {"top_n": 3}}),
    "layercam": (15, {"network": "efficientnet_lite0", "method": {"name": "layercam"}}),
    "flip": (15, {"network": "efficientnet_lite0", "method": {"name": "gradcam++", "flip": True}}),
    "broken": (30, {"network": "no_time"}),
}


def growth(times: Sequence[float], sizes: Sequence[int], quarters: Sequence[float]) -> float:
    """Return how much larger the sizes are in the last quarter than in the second one: 0.05 is 5 %.

    `quarters`: when a quarter, a half, three quarters and all of the jobs were completed.
    """
    first, half, three, end = quarters
    before = [size for at_s, size in zip(times, sizes, strict=True) if first <= at_s <= half]
    after = [size for at_s, size in zip(times, sizes, strict=True) if three <= at_s <= end]
    return median(after) / median(before) - 1 if before and after else 0.0


def mixed(bed: Testbed, count: int) -> Iterator[tuple[str, Job]]:
    """One job of every kind, then others in a seeded random order, each with its kind."""
    draw = Random(simulated_network.SEED)  # noqa: S311  # the same every time is what is wanted
    photo, *_ = testbed.photographs(1)
    broken = {
        "empty": b"",
        "page.html": b"<!doctype html><title>Not found</title>",
        "cut.jpg": photo[: len(photo) // 2],
        "noise.jpg": photo[:200] + draw.randbytes(20_000),
    }
    large = {f"large-{number}.jpg": data for number, data in enumerate(testbed.photographs(3, LARGE))}
    images = {
        "broken": [bed.store(name, data) for name, data in broken.items()],
        "large": [bed.store(name, data) for name, data in large.items()],
    }
    others = draw.choices(list(KINDS), [weight for weight, _ in KINDS.values()], k=count - len(KINDS))
    for kind in (*KINDS, *others):
        fields = {"target": {"top_n": 1}, "priority": "bulk", "max_attempts": 2, **KINDS[kind][1]}
        if fields["network"] not in bed.settings.preload:
            fields["network"] = NETWORKS[0]
        yield kind, Job.parse({"image": draw.choice(images.get(kind, bed.images)), **fields})


def measure(*, quick: bool) -> dict[str, Any]:
    """Keep a worker busy with mixed jobs, and read its memory meanwhile. Raises WorkerLost."""
    count = QUICK_JOBS if quick else JOBS
    networks, photos = (NETWORKS[:1], QUICK_PHOTOS) if quick else (NETWORKS, PHOTOS)
    with testbed.running(networks, testbed.photographs(photos)) as bed:
        jobs = list(mixed(bed, count))
        begun = time.time()
        with Meter({"worker": bed.processes["worker"]}).running(testbed.READ_INTERVAL_S) as meter:
            _run(bed, jobs)
        ended = _ended(bed, {job.id: kind for kind, job in jobs})
        passes = [entry for entry in simulated_network.Passes.read(bed.passes) if entry.device_bytes]
    quarters = [float(at_s) for at_s in np.quantile(ended, [0.25, 0.5, 0.75, 1])]
    resident, sizes = meter.resident["worker"], [entry.device_bytes for entry in passes]
    step = max(len(resident) // SHOWN, 1)
    together = {} if quick else {number: _together_mb(number) for number in (0, JOB_PROCESSES)}
    return {
        "together_mb": together,
        "device": bed.device,
        "growth": growth(meter.times, resident, quarters),
        "device_growth": growth([entry.ended for entry in passes], sizes, quarters) if sizes else None,
        "jobs": dict(Counter(kind for kind, _ in jobs)),
        "jobs_per_s": count / (max(ended) - begun),
        "resident_mb": [
            {"second": round(at_s - meter.times[0], 1), "mb": round(size / 1e6, 1)}
            for at_s, size in zip(meter.times[::step], resident[::step], strict=True)
        ],
        "resident_peak_mb": max(resident) / 1e6,
        "device_peak_mb": max(sizes, default=0) / 1e6,
    }


def _run(bed: Testbed, jobs: Sequence[tuple[str, Job]]) -> None:
    """Run jobs, with a queue that never runs dry. Raises WorkerLost."""
    for number, (_, job) in enumerate(jobs):
        bed.client.submit(job)
        while number % WAITING == 0 and bed.ledger.count_jobs()[0] > WAITING:
            bed.check()
            time.sleep(testbed.POLL_INTERVAL_S)
    bed.drain()


def _together_mb(job_processes: int) -> float:
    """The most memory that the processes of a worker have together."""
    sizes = [0]
    with testbed.running(NETWORKS, testbed.photographs(PHOTOS), job_processes=job_processes) as bed:

        def read() -> None:
            sizes.append(proportional_bytes(bed.processes["worker"]))

        with repeating(read, WEIGHED_EVERY_S):
            _run(bed, [*mixed(bed, TOGETHER)])
        read()
    return max(sizes) / 1e6


def _ended(bed: Testbed, kinds: dict[str, str]) -> list[float]:
    """When each job ended. Raises WorkerLost where one ended as it should not."""
    ids = list(kinds)
    groups = [bed.client.statuses(ids[first : first + 500]) for first in range(0, len(ids), 500)]
    documents = [document for group in groups for document in group.values()]
    wrong = [
        f"{document.status}, {document.error}, {kinds[document.id]}"
        for document in documents
        if document.status not in FINAL
        or (document.status == "succeeded") == (kinds[document.id] == "broken")
    ]
    if wrong or len(documents) != len(kinds):
        message = f"Of {len(kinds)} jobs {len(documents)} are known, {len(wrong)} ended wrongly: {wrong[:1]}"
        raise WorkerLost(message)
    return [testbed.completed(document) for document in documents]


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Neither memory grows; nothing is required of a few jobs, which are all warm-up."""
    for what, name in (("resident memory", "growth"), ("the device's memory", "device_growth")):
        measured = figures[name]
        if measured is not None and not figures.get("quick"):
            most = f"at most {REQUIRED_GROWTH:.0%}"
            yield Requirement(f"{what}: growth", most, f"{measured:+.1%}", measured <= REQUIRED_GROWTH)
    if together := figures["together_mb"]:
        what = f"engine and {JOB_PROCESSES} job processes: memory, by that of one process"
        yield at_most(what, REQUIRED_TOGETHER, together[JOB_PROCESSES] / together[0], " times")


def blocks(figures: Figures) -> Iterator[str]:
    """The jobs that were run, and memory over time."""
    jobs, curve = figures["jobs"], figures["resident_mb"]
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in jobs.items())
    yield (
        f"{sum(jobs.values()):,} jobs, {figures['jobs_per_s']:.1f} a second: {kinds}.\n"
        f"The largest resident set was {figures['resident_peak_mb']:,.0f} MB. Over time:"
    )
    yield table(
        ("second", *(f"{point['second']:.0f}" for point in curve)),
        [("MB", *(f"{point['mb']:.0f}" for point in curve))],
    )
    if together := figures["together_mb"]:
        yield (
            f"Of {TOGETHER:,} jobs: one process took {together[0]:,.0f} MB at most, an engine process and "
            f"{JOB_PROCESSES} job processes together {together[JOB_PROCESSES]:,.0f} MB."
        )
