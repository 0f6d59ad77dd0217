"""Grad-CAM whose forward pass OpenVINO computes, against TensorFlow's forward pass alone.

The share of the forward pass is CPU time of the Keras model, and nothing else, by that of scores and heatmaps
for the best classes; above 1 an explanation costs less than TensorFlow's own prediction. Both take turns in
one process, with random weights. Then each network of the catalog, the shipped one with its own weights: the
largest difference of an output from TensorFlow's, as a share of the image's largest value.
"""

import gc
from collections.abc import Iterator
from typing import Any

from devtools.bench.engine import REPEATS
from devtools.bench.report import Figures, NothingToMeasure, Requirement, at_least, plain, table, tiny
from devtools.bench.timing import interleave
from devtools.bench.variants import FORWARD, SEED, Variants
from gradcam_worker.gradcam import backend
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.models import openvino_forward
from gradcam_worker.gradcam.models.compiled_forward import LARGEST_DIFFERENCE, compile_parts
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.models.loading import load_network

TITLE = "Compiled forward pass"
PACKAGES = ("tensorflow", "keras", "openvino", "numpy")
NETWORKS = ("vgg16", "xception")
SHIPPED = "efficientnet_lite0"
OURS = "ours"
QUICK = "mobilenet"
BATCHES = (1, 8)
TOP = 8  # classes
REQUIRED = {"vgg16": 1.10, "xception": 1.20}  # shares of the forward pass, batch 8


def measure(*, quick: bool) -> dict[str, Any]:
    """Measure the shares, then hold every network of the catalog to TensorFlow."""
    if backend.device_name() != "cpu" or not openvino_forward.is_installed():
        message = "OpenVINO computes the forward pass on a CPU, where it is installed."
        raise NothingToMeasure(message)
    seconds = {name: _seconds(name, quick=quick) for name in ((QUICK,) if quick else NETWORKS)}
    rows = [CATALOG[SHIPPED], CATALOG[QUICK]] if quick else [*CATALOG.values()]
    return {
        "device": backend.device_name(),
        "share_of_forward": {
            name: {batch: one[FORWARD]["cpu"] / one[OURS]["cpu"] for batch, one in by_batch.items()}
            for name, by_batch in seconds.items()
        },
        "seconds": seconds,
        "difference": {row.name: _difference(row) for row in rows},
        "required": {} if quick else REQUIRED,
    }


def _load(row: NetworkRow, forward: str) -> KerasNetwork:
    keras.utils.clear_session()
    gc.collect()
    print(f"{row.name} ...", flush=True)
    return load_network(row, random_seed=None if row.shipped else SEED, forward=forward)


def _seconds(name: str, *, quick: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Batch size -> variant -> medians in seconds a call."""
    variants = Variants(_load(CATALOG[name], "openvino"))
    found = {}
    for batch in BATCHES:
        costs = interleave([*variants.beside_ours(batch, (TOP,), 3 if quick else REPEATS[batch])])
        both = zip((FORWARD, OURS), costs, strict=True)
        found[str(batch)] = {variant: {"wall": cost.wall, "cpu": cost.cpu} for variant, cost in both}
    return found


def _difference(row: NetworkRow) -> float | str:
    """The largest difference from TensorFlow, or why there is none."""
    parts = _load(row, "tensorflow").trunk_and_tail()
    if parts is None:
        return "the backward pass is not a short one"
    try:
        return compile_parts(parts)[1]
    except Exception as error:  # noqa: BLE001  # whatever OpenVINO raises for a layer: that is the finding
        return f"{type(error).__name__}: it cannot be converted"


def requirements(figures: Figures) -> Iterator[Requirement]:
    """An explanation costs less than TensorFlow's prediction."""
    for name, least in figures["required"].items():
        what = f"{name}: share of TensorFlow's forward pass, batch 8, top {TOP}"
        yield at_least(what, least, figures["share_of_forward"][name]["8"])


def blocks(figures: Figures) -> Iterator[str]:
    """Shares, then the catalog."""
    yield f"Share of TensorFlow's forward pass, in CPU time, top {TOP}:"
    shares = figures["share_of_forward"]
    yield table(
        ("network", *(f"batch {batch}" for batch in BATCHES)),
        [(name, *(plain(shares[name][str(batch)]) for batch in BATCHES)) for name in shares],
    )
    yield f"Largest difference from TensorFlow; above {tiny(LARGEST_DIFFERENCE)} TensorFlow computes it:"
    rows = [
        (name, difference, "TensorFlow")
        if isinstance(difference, str)
        else (name, f"{difference:.1e}", "OpenVINO" if difference <= LARGEST_DIFFERENCE else "TensorFlow")
        for name, difference in figures["difference"].items()
    ]
    yield table(("network", "largest difference", "computed by"), rows)
