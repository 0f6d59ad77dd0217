"""Ten thousand mixed jobs in a seeded random order: most of a simulated network, with every kind of artifact;
some of EfficientNet-Lite0 with several methods, some photos of 4000 x 3000, some broken images that have to
fail. Growth of the resident set is from the second quarter of the jobs to the last.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from statistics import median
from typing import Any

import numpy as np

from devtools.bench import simulated_network, testbed
from devtools.bench.report import Figures, Requirement, table
from devtools.bench.testbed import Testbed
from devtools.processes import Meter
from gradcam_worker.errors import WorkerLost
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import FINAL, StatusDocument

TITLE = "Memory"
JOBS, QUICK_JOBS = 10_000, 300
PHOTOS, LARGE_PHOTOS = 100, 3
LARGE = (3000, 4000)  # (height, width)
WAITING = 200  # jobs in the queue at any time, as a backfill keeps them
SHOWN = 20  # points of the curve in the document
REQUIRED_GROWTH = 0.05
NETWORKS = ("no_time", "efficientnet_lite0")
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
    before = [size for at, size in zip(times, sizes, strict=True) if first <= at <= half]
    after = [size for at, size in zip(times, sizes, strict=True) if three <= at <= end]
    return median(after) / median(before) - 1 if before and after else 0.0


def mixed(bed: Testbed, count: int, large: list[str], broken: list[str]) -> Iterator[tuple[str, Job]]:
    """Jobs of every kind in a seeded random order, each with its kind."""
    draw = Random(simulated_network.SEED)  # noqa: S311  # the same every time is what is wanted
    weights = [weight for weight, _ in KINDS.values()]
    for kind in draw.choices(list(KINDS), weights, k=count):
        fields = {"target": {"top_n": 1}, "priority": "bulk", "max_attempts": 2, **KINDS[kind][1]}
        images = {"large": large, "broken": broken}.get(kind, bed.images)
        yield kind, Job.parse({"image": draw.choice(images), **fields})


def images_that_fail(photo: bytes) -> dict[str, bytes]:
    """What people send instead of photos."""
    return {
        "empty": b"",
        "page.html": b"<!doctype html><title>Not found</title>",
        "cut.jpg": photo[: len(photo) // 2],
        "noise.jpg": photo[:200] + np.random.default_rng(simulated_network.SEED).bytes(20_000),
    }


def measure(*, quick: bool) -> dict[str, Any]:
    """Keep a worker busy with mixed jobs, and read its memory meanwhile. Raises WorkerLost."""
    count = QUICK_JOBS if quick else JOBS
    photos = testbed.photographs(PHOTOS)
    with testbed.running(NETWORKS, photos) as bed:
        large = [
            bed.store(f"large-{at}.jpg", data)
            for at, data in enumerate(testbed.photographs(LARGE_PHOTOS, LARGE))
        ]
        broken = [bed.store(name, data) for name, data in images_that_fail(photos[0]).items()]
        begun, kinds = time.time(), {}
        with Meter({"worker": bed.processes["worker"]}).running(testbed.READ_INTERVAL_S) as meter:
            for kind, job in mixed(bed, count, large, broken):
                kinds[bed.client.submit(job)] = kind
                while len(kinds) % WAITING == 0 and bed.ledger.count_jobs()[0] > WAITING:
                    bed.check()
                    time.sleep(testbed.POLL_INTERVAL_S)
            bed.drain()
        ids = list(kinds)
        documents = [one for at in range(0, count, 500) for one in _read(bed, ids[at : at + 500])]
        passes = simulated_network.Passes.read(bed.passes)
    _check(documents, kinds)
    ended = [testbed.completed(document) for document in documents]
    quarters = [float(at) for at in np.quantile(ended, [0.25, 0.5, 0.75, 1])]
    resident = meter.resident["worker"]
    on_device = [one for one in passes if one.device_bytes]
    sizes = [one.device_bytes for one in on_device]
    return {
        "device": bed.device,
        "growth": growth(meter.times, resident, quarters),
        "device_growth": growth([one.ended for one in on_device], sizes, quarters) if sizes else None,
        "jobs": dict(Counter(kinds.values())),
        "jobs_per_s": count / (max(ended) - begun),
        "resident_mb": _curve(meter.times, resident),
        "resident_peak_mb": max(resident) / 1e6,
        "device_peak_mb": max(sizes, default=0) / 1e6,
        "required_growth": REQUIRED_GROWTH,
    }


def _read(bed: Testbed, ids: list[str]) -> list[StatusDocument]:
    return list(bed.client.statuses(ids).values())


def _check(documents: list[StatusDocument], kinds: Mapping[str, str]) -> None:
    """Every job has come to the end that it has to come to. Raises WorkerLost."""
    wrong = [
        document
        for document in documents
        if document.status not in FINAL
        or (document.status == "succeeded") == (kinds[document.id] == "broken")
    ]
    if wrong or len(documents) != len(kinds):
        found = f"{wrong[0].status}, {wrong[0].error}, {kinds[wrong[0].id]}" if wrong else "unknown"
        message = f"{len(wrong)} of {len(kinds)} jobs ended as they should not; one: {found}"
        raise WorkerLost(message)


def _curve(times: Sequence[float], resident: Sequence[int]) -> list[dict[str, float]]:
    """Return a few points of the resident set over time."""
    step = max(len(times) // SHOWN, 1)
    points = zip(times[::step], resident[::step], strict=True)
    return [{"second": round(at - times[0], 1), "mb": round(size / 1e6, 1)} for at, size in points]


def requirements(found: Figures) -> Iterator[Requirement]:
    """Neither memory grows; nothing is required of a few jobs, which are all warm-up."""
    most = found["required_growth"]
    for what, key in (
        ("resident memory: growth", "growth"),
        ("the device's memory: growth", "device_growth"),
    ):
        if found[key] is not None and not found.get("quick"):
            yield Requirement(what, f"at most {most:.0%}", f"{found[key]:+.1%}", found[key] <= most)


def tables(found: Figures) -> Iterator[str]:
    """The jobs that were run, and memory over time."""
    jobs = found["jobs"]
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in jobs.items())
    yield f"{sum(jobs.values()):,} jobs, {found['jobs_per_s']:.1f} a second: {kinds}."
    yield f"The largest resident set was {found['resident_peak_mb']:,.0f} MB. Over time:"
    yield ""
    curve = found["resident_mb"][:: max(len(found["resident_mb"]) // 10, 1)]
    yield from table(
        ("second", *(f"{one['second']:.0f}" for one in curve)),
        [("MB", *(f"{one['mb']:.0f}" for one in curve))],
    )
