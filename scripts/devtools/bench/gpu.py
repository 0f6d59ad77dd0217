"""Engine and service on this machine's GPU, with each of TensorFlow, PyTorch and JAX that is installed, or
with the one that KERAS_BACKEND names. It needs no server and no Celery: job processes take photos from memory
and keep their objects there. gpu.txt has what a Python with PyTorch or JAX lacks.

Each part is a process of its own, and prints a line of JSON for each case as soon as it is measured: whatever
ends this program, what was printed stands.

    python -m devtools.bench.gpu PART       runs one part, as JSON
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools import command, import_path
from devtools.bench.feed import CLASSES, Engine, measure_feed
from devtools.bench.report import Figures, NothingToMeasure, Requirement, plain, table
from devtools.bench.simulated_network import SEED, SHARED_DEVICE, Passes, RecordedNetwork
from gradcam_worker import extras
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method, Network
from gradcam_worker.runtime.devices import FEW_THREADS

TITLE = "GPU"
PACKAGES = ("keras", "numpy", "opencv-python-headless")
BACKENDS = ("tensorflow", "torch", "jax")
PRECISIONS = ("float32", "tf32", "bfloat16")
TOP = 8  # classes that the engine explains
REPEATS = 15
BUDGET_S, QUICK_BUDGET_S = 330.0, 110.0  # of all parts together
SECONDS, QUICK_SECONDS = 5.0, 2.0  # of one measurement of the service
ENVIRONMENT = {**SHARED_DEVICE, **FEW_THREADS}  # as in a worker


@dataclass(frozen=True)
class Part:
    """Cases that a process measures one after the other."""

    kind: str  # device, engine or service
    backend: str
    network: str = ""
    precisions: tuple[str, ...] = PRECISIONS
    batches: tuple[int, ...] = (32, 8, 64)  # of the service: the most images of a pass
    repeats: int = REPEATS
    seconds: float = SECONDS


def parts(backend: str, *, quick: bool) -> list[Part]:
    """Those of a backend, the most important ones first: time may not suffice for all."""
    if quick:
        short = Part("engine", backend, "xception", ("tf32",), (32,), repeats=5)
        return [short, replace(short, kind="service", seconds=QUICK_SECONDS)]
    return [
        Part("engine", backend, "xception"),
        Part("engine", backend, "vgg16"),
        Part("service", backend, "xception", ("tf32", "bfloat16"), (64,)),
        Part("service", backend, "vgg16", ("bfloat16",), (64,)),
        Part("service", backend, "no_time", ("float32",), (64,)),  # what the cores could do
    ]


class PaddedNetwork:
    """A network whose batches are filled up to the next power of two: JAX compiles each size anew."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def begin(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Callable[[], Computed]:
        """See `gradcam.network.Network.begin`."""
        count = len(pixels)
        rows = np.arange(1 << (count - 1).bit_length()) % count
        wait = self._network.begin(pixels[rows], wanted[rows], method)

        def cut() -> Computed:
            computed = wait()
            return replace(
                computed,
                scores=computed.scores[:count],
                class_ids=computed.class_ids[:count],
                raw=computed.raw[:count],
            )

        return cut


@dataclass(frozen=True)
class KerasEngine(Engine):
    """What an engine process computes with: a network of the catalog with random weights."""

    precision: str = "float32"

    def load(self, passes: Passes) -> Network:
        """Load it, and run it once with each size that is compiled."""
        from devtools.bench.variants import best, noise
        from gradcam_worker.gradcam import backend
        from gradcam_worker.gradcam.models.loading import load_network

        loaded: Any = load_network(self.network, random_seed=SEED, precision=self.precision)
        if backend.name() == "jax":
            loaded = PaddedNetwork(loaded)
        size = self.batch
        while size:
            loaded.begin(noise(size, loaded.facts.input_size), best(size, len(CLASSES)))()
            size //= 2
        recorded: Any = RecordedNetwork(loaded, passes)
        return recorded  # type: ignore[no-any-return]


def measure_device() -> Iterator[dict[str, Any]]:
    """What the backend computes on."""
    from gradcam_worker.gradcam import backend

    yield {"device": backend.device_name(), "version": backend.version()}


def measure_engine(part: Part) -> Iterator[dict[str, Any]]:
    """The share of the forward pass, in wall time: each call ends with its results on the host."""
    from devtools.bench.timing import interleave
    from devtools.bench.variants import Variants
    from gradcam_worker.gradcam.models.loading import load_network

    for precision in part.precisions:
        network = load_network(part.network, random_seed=SEED, precision=precision)
        variants = Variants(network)
        for batch in part.batches:
            forward, ours = interleave([*variants.beside_ours(batch, (TOP,), part.repeats)])
            yield {
                "precision": precision,
                "computed_in": network.facts.dtype,
                "batch": batch,
                "forward_ms": 1e3 * forward.wall,
                "ours_ms": 1e3 * ours.wall,
                "share_of_forward": forward.wall / ours.wall,
                "images_per_s": batch / ours.wall,
            }


def measure_service(part: Part) -> Iterator[dict[str, Any]]:
    """Job processes on all cores but two, which feed an engine process with photos."""
    count, (batch,) = max((os.cpu_count() or 1) - 2, 1), part.batches
    threads = max(2 * batch // count, 4)  # while one half is computed, the other half is prepared
    for precision in part.precisions:
        is_real = part.network in CATALOG
        engine = KerasEngine(part.network, batch, precision) if is_real else Engine(part.network, batch)
        figures = measure_feed("cores", count, engine, part.seconds, threads)
        idle = {"device_idle": 1 - figures["busy"]} if "busy" in figures else {}
        yield {"precision": precision, "job_processes": count, "max_batch": batch, **figures, **idle}


def run_part(part: Part, limit_s: float) -> tuple[list[dict[str, Any]], str]:
    """Run a part in a process group of its own; end it at its limit.

    Returns:
        What it measured, and why that is not all; the latter is empty if it is.
    """
    environment = {**os.environ, **ENVIRONMENT, **import_path(), "KERAS_BACKEND": part.backend}
    figures: list[dict[str, Any]] = []
    ended_at_limit = threading.Event()

    def end() -> None:
        ended_at_limit.set()
        os.killpg(process.pid, signal.SIGKILL)

    with Popen(
        command("bench.gpu", json.dumps(asdict(part))),
        stdout=PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        timer = threading.Timer(max(limit_s, 0), end)
        timer.start()
        assert process.stdout  # noqa: S101  # it is a pipe
        for line in process.stdout:
            print(line, end="", flush=True)
            figures.append(json.loads(line))
        process.wait()
        timer.cancel()
    if ended_at_limit.is_set():
        return figures, f"it took longer than the {limit_s:.0f} s that were left"
    return figures, f"exit code {process.returncode}" if process.returncode else ""


def measure(*, quick: bool) -> dict[str, Any]:
    """All parts for which there is time. Raises NothingToMeasure where there is no GPU."""
    begun_s, budget_s = time.monotonic(), QUICK_BUDGET_S if quick else BUDGET_S

    def left_s() -> float:
        return budget_s - (time.monotonic() - begun_s)

    named = os.environ.get("KERAS_BACKEND")
    installed = (named,) if named else tuple(name for name in BACKENDS if find_spec(name))
    seen = {name: run_part(Part("device", name), left_s()) for name in installed}
    found = {name: rows[0] for name, (rows, _) in seen.items() if rows and rows[0]["device"] != "cpu"}
    if not found:
        names = " or ".join(installed or BACKENDS)
        message = f"There is no accelerator here that {names} can use: nothing was measured."
        raise NothingToMeasure(message)
    return {
        "device": next(iter(found.values()))["device"],
        "backends": {name: row["version"] for name, row in found.items()},
        **measure_parts([part for name in found for part in parts(name, quick=quick)], left_s),
    }


def measure_parts(planned: list[Part], left_s: Callable[[], float]) -> dict[str, Any]:
    """The rows of parts, by kind, and which parts are not complete, and why."""
    results: dict[str, Any] = {"engine": [], "service": [], "incomplete": {}}
    for part in planned:
        rows, why = run_part(part, left_s())
        results[part.kind] += rows
        if why:
            results["incomplete"][f"{part.kind}, {part.network}, {part.backend}"] = why
    return results


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Only that all of it was measured."""
    for name, why in figures["incomplete"].items():
        yield Requirement(name, "measured", why, met=False)


def blocks(figures: Figures) -> Iterator[str]:
    """The engine's and the service's figures there."""
    versions = ", ".join(figures["backends"].values())
    yield f"On {figures['device']}, {versions}. The engine, top {TOP}, in wall time:"
    yield _table(
        figures["engine"],
        ("backend", "network", "precision", "batch"),
        {
            "forward_ms": "forward, ms",
            "ours_ms": "ours, ms",
            "share_of_forward": "share of forward",
            "images_per_s": "images/s",
        },
    )
    yield (
        f"The service, photos of about 500x430, top {len(CLASSES)}. The device is busy from the launch "
        "of a pass until its results are on the host."
    )
    yield _table(
        figures["service"],
        ("backend", "network", "precision", "job_processes", "max_batch"),
        {
            "images_per_s": "images/s",
            "device_idle": "device idle, share",
            "batch": "mean batch",
            "engine_us": "engine CPU, µs/image",
        },
    )


def _table(rows: list[dict[str, Any]], keys: tuple[str, ...], measured: dict[str, str]) -> str:
    headings = (*(key.replace("_", " ") for key in keys), *measured.values())
    return table(
        headings,
        [
            (
                *(str(row[key]) for key in keys),
                *(plain(row[name]) if name in row else "" for name in measured),
            )
            for row in rows
        ],
    )


MEASURES: dict[str, Callable[[Part], Iterator[dict[str, Any]]]] = {
    "device": lambda _: measure_device(),
    "engine": measure_engine,
    "service": measure_service,
}


def main(text: str) -> None:
    """Run a part."""
    fields: dict[str, Any] = json.loads(text)
    part = Part(**fields)
    for row in MEASURES[part.kind](part):
        print(
            json.dumps({"part": part.kind, "backend": part.backend, "network": part.network, **row}),
            flush=True,
        )


if __name__ == "__main__":
    extras.run_as_command()
    main(sys.argv[1])
