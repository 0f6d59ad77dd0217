"""Simulated networks, and a worker that has them: for measuring everything but the network.

    no_time    answers at once: what is left is the machinery
    gpu_time   answers when a GPU would have, 5 ms a pass and 20 ms for 32 images, and uses no core for it

    simulated_network.py PASSES

runs the worker of `gradcam worker --unsupervised` in this process, with the settings that the environment
holds; with job processes, the supervisor of `gradcam worker`. They answer for the names above; the catalog's
networks get their shipped weights, else seeded random ones: speed does not depend on what they are. What the
device did is written to the file PASSES, a line a pass.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools import import_path
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.classes import imagenet
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method, Network, NetworkFacts
from gradcam_worker.runtime.devices import FEW_THREADS
from gradcam_worker.settings import Settings

# isort: split
# Only now: the package of the worker tells OpenCV how large an image may be before it is loaded.
import cv2

SEED = 0
GRACE_S = 10.0  # between asking a worker to end and killing it
# The engine alone and the worker share one device: JAX must not take all of its memory beforehand.
SHARED_DEVICE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
SHA256 = "0" * 64  # of the files that there are not
LARGEST = 32  # images in one pass of gpu_time
SECONDS: dict[str, Callable[[int], float]] = {  # that a pass over n images takes
    "no_time": lambda _: 0.0,
    "gpu_time": lambda images: 0.005 * -(-images // LARGEST) + 0.020 * images / LARGEST,
}
# How an operator would register them; what their files hold is never asked for.
REGISTRY = "".join(
    f"""
[networks.{name}]
model = "{name}.keras"
sha256 = "{SHA256}"
labels = "imagenet"
preprocessing = "none"
input_size = [224, 224]
"""
    for name in SECONDS
)


@dataclass(frozen=True)
class Pass:
    """One pass of the device: from when to when, in seconds since the epoch, and over how many images."""

    begun: float
    ended: float
    images: int
    device_bytes: int  # of its memory at the worst moment; 0 where there is none to be measured


class Passes:
    """A file of passes. Threads may share it."""

    def __init__(self, file: Path) -> None:
        """`file` is made by the first pass."""
        self._file = file

    def write(self, begun: float, ended: float, images: int, device_bytes: int = 0) -> None:
        """One line more."""
        with self._file.open("a", encoding="ascii") as file:
            file.write(f"{begun:.6f} {ended:.6f} {images} {device_bytes}\n")

    @staticmethod
    def read(file: Path) -> list[Pass]:
        """All passes until now, in the order in which they began."""
        lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
        rows = sorted(tuple(map(float, line.split())) for line in lines)
        return [Pass(begun, ended, int(images), int(size)) for begun, ended, images, size in rows]

    @classmethod
    def between(cls, file: Path, begin: float, end: float) -> tuple[Counter[int], float]:
        """Images in a pass -> passes, and the seconds in which the device had something to do."""
        sizes: Counter[int] = Counter()
        busy, until = 0.0, begin
        for entry in cls.read(file):
            if begin < entry.ended and entry.begun < end:
                sizes[entry.images] += 1
                busy += max(
                    min(entry.ended, end) - max(entry.begun, until), 0.0
                )  # some are handed over before
                until = max(until, entry.ended)
        return sizes, busy


class SimulatedNetwork:
    """A network of ImageNet's classes that knows its answers beforehand. Input (224, 224), smooth maps."""

    ANSWERS = 64  # different ones; the images of a pass get them in turn

    def __init__(self, name: str, passes: Passes | None = None, cells: int = 7) -> None:
        """`name` is one of SECONDS, `cells` the number of rows and of columns of a map."""
        draw = np.random.default_rng(SEED)
        self.labels = imagenet()
        self.facts = NetworkFacts(
            name=name,
            input_size=(224, 224),
            preprocessing="none",
            weights_sha256=SHA256,
            backend=f"numpy {np.__version__}",
            dtype="float32",
            default_layer="cells",
            map_size=(cells, cells),
        )
        self._scores = draw.normal(0, 3, (self.ANSWERS, len(self.labels))).astype(np.float32)
        self._ranked = np.argsort(-self._scores, axis=1).astype(np.int32)
        noise = draw.normal(0, 1, (self.ANSWERS, cells, cells)).astype(np.float32)
        self._maps = np.stack([cv2.GaussianBlur(rough, (0, 0), 1.5) for rough in noise])
        self._seconds, self._passes = SECONDS[name], passes
        self._free = 0.0  # when the device will have done all that it was given

    def begin(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Callable[[], Computed]:
        """See `gradcam.network.Network.begin`. Passes queue: one begins where the last one ends."""
        rows = np.arange(len(pixels)) % self.ANSWERS
        ended = self._occupy(len(pixels))

        def wait() -> Computed:
            if (left_s := ended - time.time()) > 0:
                time.sleep(left_s)
            ranks = np.maximum(-wanted - 1, 0)
            class_ids = np.where(wanted < 0, self._ranked[rows[:, np.newaxis], ranks], wanted)
            raw = self._maps[(rows[:, np.newaxis] + class_ids) % self.ANSWERS]
            return Computed(method.layer or "cells", self._scores[rows], class_ids.astype(np.int32), raw)

        return wait

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        """See `gradcam_worker.gradcam.network.Network.compute`."""
        return self.begin(pixels, wanted, method)()

    def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `gradcam_worker.gradcam.network.Network.scores`."""
        time.sleep(max(self._occupy(len(pixels)) - time.time(), 0))
        return self._scores[np.arange(len(pixels)) % self.ANSWERS]

    def _occupy(self, images: int) -> float:
        """Give the device a pass; return when it will have done it."""
        begun = max(time.time(), self._free)
        self._free = begun + self._seconds(images)
        if self._passes:
            self._passes.write(begun, self._free, images)
        return self._free


class RecordedNetwork:
    """A network that computes as it would, while its passes are written down."""

    def __init__(self, network: Any, passes: Passes) -> None:
        """`network` is any `gradcam_worker.gradcam.network.Network`; what is not here is asked of it."""
        self._network, self._passes = network, passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def begin(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Callable[[], Computed]:
        """See `gradcam_worker.gradcam.network.Network.begin`."""
        begun = time.time()
        wait = self._network.begin(pixels, wanted, method)
        from gradcam_worker.gradcam import backend

        def watched() -> Computed:
            computed: Computed = wait()
            self._passes.write(begun, time.time(), len(pixels), backend.peak_memory() or 0)
            backend.reset_peak_memory()
            return computed

        return watched

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        """See `gradcam_worker.gradcam.network.Network.compute`."""
        return self.begin(pixels, wanted, method)()


def load(settings: Settings, passes: Passes | None, row: NetworkRow) -> Network:
    """A simulated network, or one of the catalog; its passes are recorded where there is a file."""
    if row.name in SECONDS:
        return SimulatedNetwork(row.name, passes)
    from gradcam_worker.gradcam.models.loading import load_network

    network = load_network(
        row,
        random_seed=None if row.shipped else SEED,
        precision=settings.precision,
        forward=settings.forward,
    )
    watched: Any = RecordedNetwork(network, passes) if passes else network
    return watched  # type: ignore[no-any-return]


def start_worker(
    settings: Settings, log: Path, passes: str, *, grace_s: float = GRACE_S, program: str = __file__
) -> Popen[bytes]:
    """Start a worker that runs this program, or another one like it; see `parent_watch.spawn`."""
    from gradcam_worker.runtime import parent_watch

    variables = {
        **SHARED_DEVICE,
        **FEW_THREADS,  # as a supervisor does
        **import_path(),
        **settings.to_environment(),
    }
    command = [sys.executable, "-P", str(Path(program).resolve()), passes]
    return parent_watch.spawn(command, log=log, environment=variables, grace_s=grace_s)


def work(passes: str, ready_fd: str | None = None) -> int:
    """Run a worker, or, with `ready_fd`, one of the processes that its supervisor starts."""
    from gradcam_worker import extras
    from gradcam_worker.runtime import devices
    from gradcam_worker.runtime.processes import engine_process, worker_process
    from gradcam_worker.runtime.processes.supervisor import Supervisor

    extras.run_as_command()  # as `gradcam worker` does: TensorFlow without what it imports for others

    settings = Settings.from_environment()
    if settings.preload and SECONDS.keys() >= {*settings.preload} and not devices.visible_gpus(os.environ):
        from devtools.faults import tiny_network

        tiny_network.do_without_keras()  # it would only say that there is a CPU
    load_row = partial(load, settings, Passes(Path(passes)))
    if ready_fd and settings.role == "engine":
        return engine_process.run(settings, int(ready_fd), load=load_row)
    if ready_fd:
        return worker_process.run(settings, ready_fd=int(ready_fd))
    if settings.job_processes:
        return Supervisor(settings, (sys.executable, "-P", __file__, passes)).run()
    return worker_process.run(settings, load=load_row)


if __name__ == "__main__":
    sys.exit(work(*sys.argv[1:]))
