"""How many threads a worker on a CPU needs: of its jobs, of TensorFlow, of OpenCV.

A device thread computes batches of what waits, 1 or at most 8 images, while job threads do a job's work on
the host, one job after the other: decode a 500x375 JPEG, fit it, wait for its answer, lay 3 heatmaps over
it, encode 3 JPEGs. No job threads at all: the device thread alone, with always full batches.

TensorFlow's threads can be set only before it computes: each setting is a process of its own. They take
turns, one cell of the table at a time, so that whatever else the machine does falls on all of them. A
figure is a median of the rounds. `share` is images/s over those of the first setting alone, full batches;
CPU ms are an image's, of all threads: cores / CPU is what could be reached were no core ever idle.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from queue import Empty, SimpleQueue
from statistics import geometric_mean, median
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from devtools.bench.timing import machine, versions
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.overlay import encode, fit, overlay
from gradcam_worker.gradcam.methods.cam import heatmaps

NETWORKS = ("efficientnet_lite0", "xception")
LARGE_BATCH = 8  # images
JOB_THREADS = (0, 2, 4, 8, 16)
OPENCV = 1  # threads of one operation, where they are not what is compared
OPENCV_COMPARED = (0, 1, 2)  # 0: without its thread pool
OPENCV_ON = NETWORKS[0]  # where the host's work weighs most
SIZE, OVERLAYS = (375, 500), 3
SECONDS = 0.6  # of one cell
LEAST_BATCHES = 3
ROUNDS = 2
BUSY = 0.5  # processes that want to run, beforehand
PACKAGES = ("tensorflow", "keras", "opencv-python-headless")

Asked = tuple[NDArray[np.uint8], "SimpleQueue[Any]"]  # pixels (height, width, 3), and where the answer goes
Waiting = SimpleQueue[Asked]


@dataclass(frozen=True)
class Cell:
    """What is measured at a time."""

    network: str
    batch: int  # images at most
    jobs: int  # threads
    opencv: int  # threads of one operation
    seconds: float


@dataclass(frozen=True)
class Figures:
    """What came of one cell in one process."""

    images_per_s: float
    cpu_s: float  # an image, of all the process's threads
    mean_batch: float


@dataclass(frozen=True)
class Setting:
    """TensorFlow's threads: of one operation, and operations side by side."""

    intra_op: int
    inter_op: int

    def __str__(self) -> str:
        return f"intra {self.intra_op} inter {self.inter_op}"


def _serve(setting: Setting) -> None:
    """A process with one setting: measures the cells that come in, a line of JSON each."""
    from gradcam_worker.gradcam.models.loading import load_network

    # isort: split
    # Only now: the line above keeps TensorFlow quiet while it is loaded for the first time.
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(setting.intra_op)
    tf.config.threading.set_inter_op_parallelism_threads(setting.inter_op)
    networks = {name: load_network(name, random_seed=0) for name in NETWORKS}
    print("ready", flush=True)
    for line in sys.stdin:
        cell = Cell(**json.loads(line))
        print(json.dumps(asdict(_measure(networks[cell.network], cell))), flush=True)


def _measure(network: Any, cell: Cell) -> Figures:
    """Run one cell: batch after batch, while the job threads keep the device's queue filled."""
    cv2.setNumThreads(cell.opencv)
    size = network.facts.input_size
    waiting: Waiting = SimpleQueue()
    threads = [threading.Thread(target=_jobs, args=[waiting, size]) for _ in range(cell.jobs)]
    for thread in threads:
        thread.start()
    full: list[Asked] = [(np.zeros((*size, 3), np.uint8), SimpleQueue())] * cell.batch
    sizes: list[int] = []
    wall = cpu = 0.0
    while wall < cell.seconds or len(sizes) < LEAST_BATCHES:
        taken = list(_batch(waiting, cell.batch)) if cell.jobs else full
        wanted = np.tile(-np.arange(1, OVERLAYS + 1, dtype=np.int32), (len(taken), 1))
        computed = network.compute(np.stack([pixels for pixels, _ in taken]), wanted)
        for (_, answer), raw in zip(taken, computed.raw, strict=True):
            answer.put(raw)
        now = (time.perf_counter(), time.process_time())
        if not sizes:  # the first batch only gets things going
            begun = now
        sizes.append(len(taken))
        wall, cpu = now[0] - begun[0], now[1] - begun[1]
    while any(thread.is_alive() for thread in threads):
        with suppress(Empty):
            waiting.get(timeout=0.01)[1].put(None)
    images = sum(sizes[1:])
    return Figures(images / wall, cpu / images, images / len(sizes[1:]))


def _jobs(waiting: Waiting, size: tuple[int, int]) -> None:
    """A job thread: one job after the other, until an answer is None."""
    answer: SimpleQueue[Any] = SimpleQueue()
    photo = _photo()
    while True:
        picture = decode(photo).pixels
        waiting.put((fit(picture, size), answer))
        if (raw := answer.get()) is None:
            return
        for heatmap in heatmaps(raw):
            encode(overlay(picture, heatmap))


@lru_cache
def _photo() -> bytes:
    return encode(fit(decode((DATA / "photos" / "chelsea.jpg").read_bytes()).pixels, SIZE))


def _batch(waiting: Waiting, largest: int) -> Iterator[Asked]:
    """What waits for the device, at least one image."""
    yield waiting.get()
    with suppress(Empty):
        for _ in range(largest - 1):
            yield waiting.get_nowait()


class _Process:
    """One setting's process."""

    def __init__(self, setting: Setting, stack: ExitStack) -> None:
        command = [sys.executable, __file__, str(setting.intra_op), str(setting.inter_op)]
        pipe = subprocess.PIPE
        self._process = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        stack.callback(self._process.kill)

    def ask(self, cell: Cell | None = None) -> str:
        """One line out, where there is a cell to measure, and one line in."""
        source, sink = self._process.stdout, self._process.stdin
        if source is None or sink is None:
            message = "The process was started without pipes."
            raise RuntimeError(message)
        if cell:
            sink.write(json.dumps(asdict(cell)) + "\n")
            sink.flush()
        return source.readline()


Table = dict[Cell, dict[Setting, Figures]]


def measure(cells: list[Cell], settings: list[Setting], rounds: int) -> Table:
    """Every cell under every setting, in rounds, every other one backwards; medians."""
    found: dict[tuple[Cell, Setting], list[Figures]] = {}
    with ExitStack() as stack:
        processes = {setting: _Process(setting, stack) for setting in settings}
        for process in processes.values():
            if process.ask() != "ready\n":
                message = "A process could not load its networks: see above."
                raise RuntimeError(message)
        for cell in {cell.network: cell for cell in cells}.values():
            for process in processes.values():
                process.ask(Cell(cell.network, LARGE_BATCH, 2, OPENCV, 0))  # traces
        for turn in range(rounds):
            for cell in cells:
                for setting in settings[:: 1 if turn % 2 == 0 else -1]:
                    figures = Figures(**json.loads(processes[setting].ask(cell)))
                    found.setdefault((cell, setting), []).append(figures)
    return {cell: {setting: _median(found[cell, setting]) for setting in settings} for cell in cells}


def _median(rounds: list[Figures]) -> Figures:
    columns = zip(*(asdict(figures).values() for figures in rounds), strict=True)
    return Figures(*(median(column) for column in columns))


def cells_of(*, quick: bool) -> list[Cell]:
    """The table's rows: job threads and batches for each network; then OpenCV's threads for one."""
    seconds = SECONDS / 3 if quick else SECONDS
    counts = (0, 4, 16) if quick else JOB_THREADS
    main_ones = [
        Cell(network, batch, jobs, OPENCV, seconds)
        for network in NETWORKS
        for batch in (1, LARGE_BATCH)
        for jobs in counts
    ]
    opencv = [
        Cell(OPENCV_ON, LARGE_BATCH, jobs, threads, seconds)
        for jobs in counts[2::2]
        for threads in OPENCV_COMPARED
        if threads != OPENCV
    ]
    return main_ones + opencv


def share(table: Table, cell: Cell, setting: Setting) -> float:
    """Images per second, over those of the first setting's device thread alone with full batches."""
    alone = next(one for one in table if (one.network, one.batch, one.jobs) == (cell.network, LARGE_BATCH, 0))
    return table[cell][setting].images_per_s / next(iter(table[alone].values())).images_per_s


def best(table: Table) -> tuple[int, Setting]:
    """The job threads and the setting with the highest share at large batches, over all networks."""
    shares: dict[tuple[int, Setting], list[float]] = {}
    for cell, row in table.items():
        if cell.jobs and cell.batch == LARGE_BATCH and cell.opencv == OPENCV:
            for setting in row:
                shares.setdefault((cell.jobs, setting), []).append(share(table, cell, setting))
    return max(shares, key=lambda key: geometric_mean(shares[key]))


def lines(table: Table) -> Iterator[str]:
    """The table, for a person."""
    settings = list(next(iter(table.values())))
    yield f"{'':<48}" + "".join(f"{setting!s:^29}" for setting in settings)
    heads = f"{'images/s':>10}{'share':>6}{'CPU ms':>7}{'batch':>6}"
    yield f"{'network':<20}{'batch':>7}{'jobs':>8}{'OpenCV':>8}     " + heads * len(settings)
    for cell, row in table.items():
        yield f"{cell.network:<20}{cell.batch:>7}{cell.jobs or 'alone':>8}{cell.opencv:>8}     " + "".join(
            f"{figures.images_per_s:>10.1f}{share(table, cell, setting):>6.2f}"
            f"{figures.cpu_s * 1000:>7.1f}{figures.mean_batch:>6.1f}"
            for setting, figures in row.items()
        )


def main(*, quick: bool, as_json: bool) -> int:
    """Measure, print the table and the best combination. There is nothing to miss: always 0."""
    begun, about, cores = time.perf_counter(), machine(), os.cpu_count() or 1
    settings = [Setting(cores, cores), Setting(1, 1)]
    if not quick and cores > 1:
        settings += [Setting(cores, 1), Setting(1, cores)]
    table = measure(cells_of(quick=quick), settings, 1 if quick else ROUNDS)
    jobs, setting = best(table)
    rows = [
        {**asdict(cell), **asdict(setting), **asdict(figures), "share": share(table, cell, setting)}
        for cell, row in table.items()
        for setting, figures in row.items()
    ]
    took_s = time.perf_counter() - begun
    if as_json:
        whole = {"rows": rows, "best": {"jobs": jobs, **asdict(setting)}, "took_s": took_s}
        print(json.dumps({**whole, "machine": about, "versions": versions(*PACKAGES)}, indent=2))
        return 0
    print(", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()))
    print(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()))
    print("\n" + "\n".join(lines(table)))
    if about["load_before"] > BUSY:
        print("\nThe machine was busy beforehand: CPU ms can be trusted, images/s and what is best cannot.")
    print(f"\nBest at batches of {LARGE_BATCH} over all networks: {jobs} job threads, {setting}.")
    print(f"Took {took_s:.0f} s.")
    return 0


if __name__ == "__main__":  # one of the processes that `measure` starts
    _serve(Setting(*map(int, sys.argv[1:])))
