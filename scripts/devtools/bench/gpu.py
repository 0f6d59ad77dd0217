"""Engine and service on this machine's accelerator, with the backend that KERAS_BACKEND names: with JAX and
PyTorch, service alone, since the engine's bench compares with TensorFlow's own graph.
"""

from collections.abc import Iterator
from typing import Any

from devtools.bench.report import Figures, NothingToMeasure, Requirement, load, plain, run, table
from gradcam_worker.gradcam import backend

TITLE = "GPU"
PACKAGES = ("keras", "numpy")
PARTS = ("engine", "service")


def measure(*, quick: bool) -> dict[str, Any]:
    """Both, each as it would run by itself. Raises NothingToMeasure where there is no accelerator."""
    device, version = backend.device_name(), backend.version()
    if device == "cpu":
        message = f"There is no accelerator here that {version} can use: nothing was measured."
        raise NothingToMeasure(message)
    names = PARTS if backend.name() == "tensorflow" else PARTS[1:]
    return {"device": device, "backend": version, **{name: run(name, quick=quick) for name in names}}


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Those of both."""
    for name in PARTS:
        if name in figures:
            yield from load(name).requirements(figures[name])


def blocks(figures: Figures) -> Iterator[str]:
    """The engine's and the service's figures there."""
    yield f"On {figures['device']}, {figures['backend']}."
    rows = [
        (network, variant, batch, plain(int(batch) / cost["wall"]), plain(forward["wall"] / cost["wall"]))
        for network, variants in figures.get("engine", {}).get("seconds", {}).items()
        for variant, costs in variants.items()
        for batch, cost in costs.items()
        if (forward := variants["forward"].get(batch))
    ]
    if rows:
        yield table(("network", "variant", "batch", "images/s", "share of forward, wall time"), rows)
    yield from load("service").blocks(figures["service"])
