"""Whether the worker's memory stays as it is: 10,000 mixed jobs, its resident set and its device's memory.

Most jobs are a stand-in network's, with every kind of artifact; some are EfficientNet-Lite0's with several
methods, some have photos of 4000 x 3000, some images are broken and have to fail. They come in a seeded
random order. Required: the median resident set of the last quarter is at most 5 % above that of the second
quarter, quarters by jobs completed. Exit code 1 where it is more.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

import numpy as np

from devtools.bench import simulated_network, testbed
from devtools.bench.testbed import Meter, River
from devtools.bench.timing import machine, versions
from gradcam_worker.errors import WorkerLost
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import FINAL, StatusDocument

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


@dataclass(frozen=True)
class Result:
    """How memory went."""

    on: str  # the worker's device
    jobs: Mapping[str, int]  # kind -> how many
    seconds: float
    times: list[float]  # of the readings
    resident: list[int]  # bytes, at these times
    device: list[tuple[float, int]]  # when a pass ended, bytes of the device at its worst moment
    quarters: list[float]  # when a quarter, a half, three quarters and all of the jobs were completed

    @property
    def growth(self) -> float:
        """How much larger the resident set is in the last quarter than in the second one: 0.05 is 5 %."""
        return self._growth(list(zip(self.times, self.resident, strict=True)))

    @property
    def device_growth(self) -> float | None:
        """The same of the device's memory, where there is one."""
        return self._growth(self.device) if any(size for _, size in self.device) else None

    def _growth(self, readings: list[tuple[float, int]]) -> float:
        first, half, three, end = self.quarters
        before = [size for at, size in readings if first <= at <= half]
        after = [size for at, size in readings if three <= at <= end]
        return median(after) / median(before) - 1 if before and after else 0.0


def mixed(flow: River, count: int, large: list[str], broken: list[str]) -> Iterator[tuple[str, Job]]:
    """Jobs of every kind in a seeded random order, each with its kind."""
    draw = Random(simulated_network.SEED)  # noqa: S311  # the same every time is what is wanted
    weights = [weight for weight, _ in KINDS.values()]
    for kind in draw.choices(list(KINDS), weights, k=count):
        fields = {"target": {"top_n": 1}, "priority": "bulk", "max_attempts": 2, **KINDS[kind][1]}
        images = {"large": large, "broken": broken}.get(kind, flow.images)
        yield kind, Job.parse({"image": draw.choice(images), **fields})


def images_that_fail(photo: bytes) -> dict[str, bytes]:
    """What people send instead of photos."""
    return {
        "empty": b"",
        "page.html": b"<!doctype html><title>Not found</title>",
        "cut.jpg": photo[: len(photo) // 2],
        "noise.jpg": photo[:200] + np.random.default_rng(simulated_network.SEED).bytes(20_000),
    }


def measure(count: int) -> Result:
    """Keep a worker busy with mixed jobs, and read its memory meanwhile. Raises WorkerLost."""
    photos = testbed.photographs(PHOTOS)
    with testbed.flowing(NETWORKS, photos) as flow:
        large = [
            flow.store(f"large-{at}.jpg", data)
            for at, data in enumerate(testbed.photographs(LARGE_PHOTOS, LARGE))
        ]
        broken = [flow.store(name, data) for name, data in images_that_fail(photos[0]).items()]
        begun, kinds = time.time(), {}
        with Meter({"worker": flow.processes["worker"]}).running() as meter:
            for kind, job in mixed(flow, count, large, broken):
                kinds[flow.client.submit(job)] = kind
                while len(kinds) % WAITING == 0 and flow.ledger.count_jobs()[0] > WAITING:
                    flow.check()
                    time.sleep(testbed.LOOK_S / 4)
            flow.drain()
        ids = list(kinds)
        documents = [one for at in range(0, count, 500) for one in _read(flow, ids[at : at + 500])]
        passes = simulated_network.Passes.read(flow.passes)
    _check(documents, kinds)
    ended = [testbed.completed(document) for document in documents]
    return Result(
        on=flow.device,
        jobs=Counter(kinds.values()),
        seconds=max(ended) - begun,
        times=meter.times,
        resident=meter.resident["worker"],
        device=[(one.ended, one.device_bytes) for one in passes if one.device_bytes],
        quarters=[float(at) for at in np.quantile(ended, [0.25, 0.5, 0.75, 1])],
    )


def _read(flow: River, ids: list[str]) -> list[StatusDocument]:
    return list(flow.client.statuses(ids).values())


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


def _curve(result: Result) -> list[tuple[float, float]]:
    """A few points of the resident set over time: (seconds, MB)."""
    step = max(len(result.times) // SHOWN, 1)
    readings = list(zip(result.times, result.resident, strict=True))[::step]
    return [(round(at - result.times[0], 1), round(size / 1e6, 1)) for at, size in readings]


def table(result: Result) -> Iterator[str]:
    """The figures, line by line."""
    total = sum(result.jobs.values())
    yield f"{total} jobs, {total / result.seconds:.1f} a second"
    yield f"  {', '.join(f'{kind} {count}' for kind, count in sorted(result.jobs.items()))}"
    yield f"  {'second':>8}{'resident MB':>14}"
    for at, size in _curve(result):
        yield f"  {at:>8.0f}{size:>14.0f}"
    yield f"  growth from the second quarter to the last: {result.growth:+.1%}"
    device = result.device_growth
    yield f"  of the device's memory: {'it has none of its own' if device is None else f'{device:+.1%}'}"


def passed(result: Result) -> bool:
    """Neither memory grows."""
    return max(result.growth, result.device_growth or 0) <= REQUIRED_GROWTH


def document(result: Result, about: Mapping[str, Any], took_s: float) -> dict[str, Any]:
    """All figures, as plain data."""
    return {
        "growth": result.growth,
        "device_growth": result.device_growth,
        "jobs": dict(result.jobs),
        "jobs_per_s": sum(result.jobs.values()) / result.seconds,
        "resident_mb": [{"second": at, "mb": size} for at, size in _curve(result)],
        "resident_peak_mb": max(result.resident) / 1e6,
        "device_peak_mb": max((size for _, size in result.device), default=0) / 1e6,
        "required_growth": REQUIRED_GROWTH,
        "passed": passed(result),
        "took_s": took_s,
        "machine": dict(about),
        "versions": versions(*PACKAGES),
    }


def main(*, quick: bool, as_json: bool) -> int:
    """Run the jobs; 0, or, unless it is quick, 1 where memory grows: a few jobs are all warm-up."""
    begun, about = time.perf_counter(), machine()
    say = (lambda _: None) if as_json else print
    say(", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()))
    result = measure(QUICK_JOBS if quick else JOBS)
    about["device"] = result.on
    say(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()))
    took_s = time.perf_counter() - begun
    say("\n" + "\n".join(table(result)))
    verdict = "ok" if passed(result) else "too few jobs to say" if quick else "MISSED"
    say(f"Required: growth of at most {REQUIRED_GROWTH:.0%}. {verdict}\nTook {took_s:.0f} s.")
    if as_json:
        json.dump(document(result, about, took_s), sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 0 if quick or passed(result) else 1
