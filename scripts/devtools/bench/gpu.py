"""Engine and service on this machine's accelerator, with the backend that KERAS_BACKEND names: with JAX and
PyTorch, service alone, since the engine's bench compares with TensorFlow's own graph.
"""

from collections.abc import Iterator
from typing import Any

from devtools.bench.report import Figures, NothingToMeasure, Requirement, load, plain, run, table
from gradcam_worker.gradcam import backend

TITLE = "GPU"
PACKAGES = ("keras", "numpy")


def measure(*, quick: bool) -> dict[str, Any]:
    """Both, each as it would run by itself. Raises NothingToMeasure where there is no accelerator."""
    device, version = backend.device_name(), backend.version()
    if device == "cpu":
        message = f"There is no accelerator here that {version} can use: nothing was measured."
        raise NothingToMeasure(message)
    names = ("engine", "service") if backend.name() == "tensorflow" else ("service",)
    return {"device": device, "backend": version, **{name: run(name, quick=quick) for name in names}}


def requirements(found: Figures) -> Iterator[Requirement]:
    """Those of both."""
    for name in ("engine", "service"):
        if name in found:
            yield from load(name).requirements(found[name])


def tables(found: Figures) -> Iterator[str]:
    """The engine's and the service's figures there."""
    yield f"On {found['device']}, {found['backend']}."
    yield ""
    rows = [
        (
            network,
            variant,
            batch,
            plain(int(batch) / took["wall"]),
            plain(one["forward"][batch]["wall"] / took["wall"]),
        )
        for network, one in found.get("engine", {}).get("seconds", {}).items()
        for variant, by_batch in one.items()
        for batch, took in by_batch.items()
        if batch in one["forward"]
    ]
    yield from table(("network", "variant", "batch", "images/s", "share of forward, wall time"), rows)
    yield from load("service").tables(found["service"])
