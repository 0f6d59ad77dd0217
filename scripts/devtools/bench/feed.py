"""How fast job processes feed an engine process, through the border between them: a Unix socket and shared
memory. Networks are simulated, on request also the device and what a job costs besides; nothing is stored.

* border: pixels of 224 x 224 x 3 for a network that costs nothing;
* cores: each image is also decoded and fitted, and its overlays are drawn, encoded, hashed and kept in
  memory, by one thread of each job process, so that the cores are what limits;
* sleeping: that work is simulated by sleeping, one thread of a job process at a time as on one core, so that
  many job processes fit on few cores, and the device takes 25 ms for 32 images.
"""

import hashlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np

from devtools.bench.report import Figures, Requirement, at_least, plain, table
from devtools.bench.simulated_network import Passes, SimulatedNetwork
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.overlay import OverlayBase, encode
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.network import GRADCAM, Network
from gradcam_worker.inference.engine_client import EngineClient
from gradcam_worker.inference.engine_server import EngineFacts, EngineServer
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline

# isort: split
# Only now: the package of the worker tells OpenCV how large an image may be before it is loaded.
import cv2

TITLE = "Feeding"
PACKAGES = ("numpy", "opencv-python-headless")
ROW = CATALOG["efficientnet_lite0"]  # it stands for whatever is simulated
CLASSES = (-1, -2, -3)
BATCH = 32
POOL_BYTES = 64 * 1024 * 1024
THREADS = {"border": 64, "cores": 1, "sleeping": 16}  # of a job process; one keeps a core busy
SLEEP_S = 0.008  # so a job process brings 125 images a second at most, and ten keep the device busy
SLEEPERS = (1, 2, 4, 8, 16)
START_S = 180.0  # a GPU process loads its backend, and its network
SECONDS, QUICK_SECONDS = 6.0, 2.0  # of one measurement
HEIGHT = WIDTH = 224
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
DEVICE_LIMIT = BATCH / 0.025  # images a second

REQUIRED_IMAGES_PER_S = 8000
REQUIRED_BATCH = 32
REQUIRED_SCALING_TWO = 1.85
REQUIRED_LINEAR = 0.95
REQUIRED_BUSY = 0.90
UNTIL_BUSY = 0.92  # of the device: more job processes cannot bring more


@dataclass(frozen=True)
class Engine:
    """What an engine process computes with: a simulated network."""

    network: str
    batch: int = BATCH  # images of a pass at most

    def load(self, passes: Passes) -> Network:
        """Load it in the engine process. What the device does is written to `passes`."""
        return SimulatedNetwork(self.network, passes if self.network == "gpu_time" else None)


def serve(path: Path, engine: Engine, passes: Path) -> None:
    """Run an engine process."""
    cache = ModelCache(lambda _: engine.load(Passes(passes)), max_batch=engine.batch)
    EngineServer(cache, path, EngineFacts(engine.network, on_gpu=True, max_batch=engine.batch)).serve()


def feed(
    path: Path, work: str, threads: int, ready: Any, begin: Any, end: Any, counts: Any, number: int
) -> None:
    """Run a job process: its threads work and ask until `end` is set, and count their answers."""
    client = EngineClient(path, pool_bytes=POOL_BYTES)
    client.connect(START_S)
    network, deadline = client.load(ROW), Deadline(3600)
    photos = [photo.read_bytes() for photo in sorted((DATA / "photos").glob("*.jpg"))]
    objects: dict[int, list[tuple[str, bytes]]] = {}
    same = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    simulated_core = threading.Lock()
    cv2.setNumThreads(1)  # as in a worker
    done = [0] * threads

    def run(index: int) -> None:
        for photo in islice(cycle(photos), index, None):
            if end.is_set():
                break
            pixels = same
            if work == "sleeping":
                with simulated_core:
                    time.sleep(SLEEP_S)
            elif work == "cores":
                decoded = decode(photo).pixels
                pixels = fit(decoded, network.facts.input_size)
            with client.reserve() as slot:
                if work == "border":
                    slot.compute(network, pixels, CLASSES, GRADCAM, deadline)
                else:
                    explanation = slot.infer(network, pixels, CLASSES, GRADCAM, deadline).explanation
            if work == "cores":
                overlays = map(encode, map(OverlayBase(decoded, bgr=True).draw, explanation.shown))
                objects[index] = [(hashlib.sha256(overlay).hexdigest(), overlay) for overlay in overlays]
            done[index] += 1
            counts[number] = sum(done)

    running = [threading.Thread(target=run, args=[index], daemon=True) for index in range(threads)]
    ready.release()
    begin.wait()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


@contextmanager
def started(context: Any, target: Any, *arguments: Any) -> Iterator[Any]:
    """Run a process until the end of the block."""
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def cpu_s(pid: int) -> float:
    """The processor time of a process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def measure_feed(work: str, count: int, engine: Engine, seconds: float, threads: int = 0) -> dict[str, Any]:
    """Let `count` job processes feed an engine process; return what it computed.

    `threads` are those of a job process, if not as many as usual.
    """
    context = multiprocessing.get_context("spawn")
    ready, begin, end = context.Semaphore(0), context.Event(), context.Event()
    counts = context.Array("q", count, lock=False)
    with tempfile.TemporaryDirectory() as folder:
        path, passes = Path(folder) / "engine", Path(folder) / "passes"
        with started(context, serve, path, engine, passes) as server:
            feeders = [
                context.Process(
                    target=feed,
                    args=(path, work, threads or THREADS[work], ready, begin, end, counts, number),
                    daemon=True,
                )
                for number in range(count)
            ]
            try:
                for feeder in feeders:
                    feeder.start()
                for _ in feeders:
                    if not ready.acquire(timeout=START_S):
                        message = f"A job process was not ready within {START_S:g} s."
                        raise TimeoutError(message)
                begin.set()
                time.sleep(seconds / 4)  # until all threads have begun
                before, engine_before, begun_s = sum(counts), cpu_s(server.pid), time.time()
                time.sleep(seconds)
                after, engine_after, ended_s = sum(counts), cpu_s(server.pid), time.time()
                end.set()
                for feeder in feeders:
                    feeder.join(START_S)
            finally:
                for feeder in feeders:
                    feeder.kill()
        images, took_s = after - before, ended_s - begun_s
        figures: dict[str, Any] = {
            "images_per_s": images / took_s,
            "engine_us": 1e6 * (engine_after - engine_before) / max(images, 1),
        }
        if passes.exists():
            sizes, busy_s = Passes.between(passes, begun_s, ended_s)
            figures["busy"] = busy_s / took_s
            figures["passes"] = dict(sorted(sizes.items()))  # images -> passes
            figures["batch"] = sum(map(mul, sizes, sizes.values())) / max(sizes.total(), 1)
        return figures


def measure(*, quick: bool) -> dict[str, Any]:
    """All of it. Cases that are compared take turns."""
    seconds = QUICK_SECONDS if quick else SECONDS
    border = {count: measure_feed("border", count, Engine("no_time"), seconds) for count in (1, 2)}
    turns = [
        {count: measure_feed("cores", count, Engine("no_time"), seconds) for count in order}
        for order in ((1, 2), (2, 1))
    ]
    scaling = [turn[2]["images_per_s"] / turn[1]["images_per_s"] for turn in turns]
    sleeping = {count: measure_feed("sleeping", count, Engine("gpu_time"), seconds) for count in SLEEPERS}
    best = max(border.values(), key=lambda figures: figures["images_per_s"])
    return {
        "border": border,
        "cores": turns[0],
        "sleeping": sleeping,
        "images_per_s": best["images_per_s"],
        "images_per_engine_core": 1e6 / best["engine_us"],
        "scaling_two": sum(scaling) / len(scaling),
        "linear": min(linear(sleeping).values()),
        "device_busy": max(figures["busy"] for figures in sleeping.values()),
    }


def linear(sleeping: dict[int, dict[str, float]]) -> dict[int, float]:
    """For each number of job processes: images a second, as a share of so many times those of one.

    Where the device would be busy for more than UNTIL_BUSY of the time, that is the most to be had.
    """
    alone = sleeping[1]["images_per_s"]
    return {
        count: figures["images_per_s"] / min(count * alone, UNTIL_BUSY * DEVICE_LIMIT)
        for count, figures in sleeping.items()
    }


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Those of the issue."""
    yield at_least(
        "images a second on one engine core", REQUIRED_IMAGES_PER_S, figures["images_per_engine_core"]
    )
    yield at_least("two job processes, times one", REQUIRED_SCALING_TWO, figures["scaling_two"])
    yield at_least("many job processes (simulated), share of linear", REQUIRED_LINEAR, figures["linear"])
    yield at_least("simulated device, busy share", REQUIRED_BUSY, figures["device_busy"])


def blocks(figures: Figures) -> Iterator[str]:
    """A table for each case."""
    yield table(
        ("case", "job processes", "images/s", "engine CPU, µs/image", "device busy", "batch"),
        [
            (
                case,
                str(count),
                plain(row["images_per_s"]),
                plain(row["engine_us"]),
                plain(row["busy"]) if "busy" in row else "",
                plain(row["batch"]) if "batch" in row else "",
            )
            for case in ("border", "cores", "sleeping")
            for count, row in figures[case].items()
        ],
    )
