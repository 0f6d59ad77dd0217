"""What explaining costs beside predicting. *Share of forward* is the CPU time of the forward pass alone,
divided by that of the forward pass with the explanations of the best 1, 8 or 50 classes: 1.00 would be
explanations for free. *The notebook's way* is the arithmetic that this project started from: eager, one class
after the other, the whole trunk again for each. Weights are random, but seeded: speed does not depend on what
they are. Before the clock starts, both have to give the same heatmaps: what is compared computes the same.
"""

import gc
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from devtools.agreement.notebook import CLASSES, TOLERANCE, NotebookGradCAM, check
from devtools.agreement.randomisation import photographs
from devtools.bench.report import Figures, Requirement, at_least, by_figure, plain, table, tiny
from devtools.bench.timing import Cost, Variant, interleave
from gradcam_worker.gradcam.backend import device_name
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.models.loading import load_network
from gradcam_worker.gradcam.network import Method

# isort: split
# Only now: the lines above keep TensorFlow quiet while it is loaded for the first time.
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

FORWARD, OURS, EXACT, NOTEBOOK = "forward", "ours", "exact backward", "notebook"

TITLE = "Engine"
PACKAGES = ("tensorflow", "keras", "numpy")
NETWORKS = ("vgg16", "xception")
SHIPPED = "efficientnet_lite0"  # with weights that have learned something
TOPS = (1, 8, 50)  # classes
REPEATS = {1: 15, 8: 7, 32: 3}  # by batch size: what is short is measured more often
SEED = 0
PRECISIONS = ("float32", "bfloat16", "mixed_bfloat16")
REQUIRED = {  # shares of the forward pass in CPU time; and times the notebook's speed
    "vgg16": {
        "times notebook": 28.0,
        "share of forward, batch 1, top 8": 0.92,
        "share of forward, batch 8, top 8": 0.95,
        "share of forward, batch 8, top 50": 0.90,
    },
    "xception": {
        "times notebook": 40.0,
        "share of forward, batch 1, top 8": 0.97,
        "share of forward, batch 8, top 8": 0.98,
        "share of forward, batch 8, top 50": 0.97,
    },
}
LOOSE = 10.0  # times the notebook's speed, of a quick run: one noisy call must not decide
SHARES = {
    "share_of_forward": (OURS, "ours"),
    "share_of_forward_exact_backward": (EXACT, "the whole way back"),
}


Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


def noise(count: int, size: tuple[int, int]) -> Pixels:
    """Seeded noise (count, height, width, 3): as good as any picture for random weights."""
    return np.random.default_rng(SEED).integers(0, 256, (count, *size, 3), np.uint8)


def prepared(network: KerasNetwork, pixels: Pixels) -> Floats:
    """The input of the model by Keras's own preprocessing: a check on ours."""
    return np.asarray(
        keras.applications.imagenet_utils.preprocess_input(
            pixels.astype(np.float32), data_format="channels_last", mode=network.facts.preprocessing
        )
    )


def best(images: int, classes: int) -> NDArray[np.int32]:
    """The wish for the best classes of images, (images, classes): see `ClassIndex.select`."""
    return np.tile(-np.arange(1, classes + 1, dtype=np.int32), (images, 1))


def titled(variant: str, top: int) -> str:
    """A variant's name, for so many classes."""
    return f"{variant}, top {top}"


class Variants:
    """What can be measured of one network; every variant runs on the very same weights, in memory once."""

    def __init__(self, network: KerasNetwork) -> None:
        self.network, self.model = network, network._model  # noqa: SLF001
        self.exact = KerasNetwork(
            network._row,  # noqa: SLF001
            self.model,
            weights_sha256=None,
            exact_backward=True,
        )
        any_batch = tf.TensorSpec((None, *network.facts.input_size, 3), tf.float32)
        alone = partial(self.model, training=False)
        self._forward = tf.function(alone, input_signature=[any_batch], autograph=False)

    def forward(self, batch: int, repeats: int) -> Variant:
        """The Keras model and nothing else; its input is on the device already."""
        images = tf.constant(prepared(self.network, self._pixels(batch)))
        return Variant(FORWARD, batch, repeats, lambda: self._forward(images).numpy())

    def ours(self, batch: int, tops: tuple[int, ...], repeats: int) -> Iterator[Variant]:
        """`Network.compute`: pixels in, scores and heatmaps out."""
        return self._each(OURS, self.network.compute, batch, tops, repeats)

    def exact_backward(self, batch: int, tops: tuple[int, ...], repeats: int) -> Iterator[Variant]:
        """The same without the pooled-gradient shortcut."""
        return self._each(EXACT, self.exact.compute, batch, tops, repeats)

    def methods(self, batch: int, top: int, repeats: int) -> Iterator[Variant]:
        """Every method, as `ours`."""
        pixels, wanted = self._pixels(batch), best(batch, top)
        for method in cam.METHODS:
            yield Variant(
                method, batch, repeats, partial(self.network.compute, pixels, wanted, Method(method))
            )

    def _each(
        self, variant: str, compute: Callable[..., Any], batch: int, tops: tuple[int, ...], repeats: int
    ) -> Iterator[Variant]:
        pixels = self._pixels(batch)
        for top in tops:
            yield Variant(titled(variant, top), batch, repeats, partial(compute, pixels, best(batch, top)))

    def _pixels(self, batch: int) -> Pixels:
        return noise(batch, self.network.facts.input_size)


def measure(*, quick: bool) -> dict[str, Any]:
    """Load one network after the other, check that the comparison is fair, let the variants take turns."""
    device = device_name()
    if device != "cpu":
        print("The device is not the CPU: CPU seconds, and so the share of forward, say little here.")
    by_network = {}
    for name in NETWORKS:
        print(f"{name} ...", flush=True)
        by_network[name] = _measure_network(name, quick=quick)
        keras.utils.clear_session()
        gc.collect()
    found = by_figure(by_network)
    if not quick:  # real weights, whose maps say something
        network = load_network(SHIPPED)
        pixels = photographs(network.facts.input_size)
        found["precision"][SHIPPED] = _precisions(network, pixels, random_seed=None)
    return {"device": device, **found}


def _measure_network(name: str, *, quick: bool) -> dict[str, Any]:
    network = load_network(name, random_seed=SEED)
    variants, layer = Variants(network), network.facts.default_layer
    pixels = noise(1, network.facts.input_size)
    image = prepared(network, pixels)
    on_logits = NotebookGradCAM(variants.model, layer, logits=True)
    agreement = check(network, on_logits, pixels, image, best(1, 2 if quick else CLASSES))
    notebook = NotebookGradCAM(variants.model, layer)
    eager = Variant(NOTEBOOK, 1, 1 if quick else 3, lambda: notebook.top(image), warm=True)
    methods, precisions = {}, {}
    if quick:
        one, top = variants.forward(1, 8), (CLASSES,)
        costs = interleave([one, *variants.ours(1, top, 8), *variants.exact_backward(1, top, 8), eager])
    else:
        costs = (
            *interleave([*_all(variants, 1), eager]),
            *interleave([*_all(variants, 8)]),
            *interleave([variants.forward(32, REPEATS[32]), *variants.ours(32, TOPS, REPEATS[32])]),
        )
        forward, *others = interleave([variants.forward(8, 5), *variants.methods(8, CLASSES, 5)])
        methods = {other.variant: forward.cpu / other.cpu for other in others}
        precisions = _precisions(network, noise(8, network.facts.input_size), random_seed=SEED)
    by_variant = {(cost.variant, cost.batch): cost for cost in costs}
    theirs, ours = by_variant[NOTEBOOK, 1], by_variant[titled(OURS, CLASSES), 1]
    return {
        **{key: _shares(costs, variant) for key, (variant, _) in SHARES.items()},
        "share_of_forward_by_method": methods,
        "times_notebook": theirs.wall / ours.wall,
        "times_notebook_cpu": theirs.cpu / ours.cpu,
        "precision": precisions,
        "seconds": _seconds(costs),
        "agreement": agreement,
        "required": {"times notebook": LOOSE} if quick else REQUIRED[name],
    }


def _all(variants: Variants, batch: int) -> Iterator[Variant]:
    """Forward, ours and the whole way back, for each number of classes."""
    repeats = REPEATS[batch]
    yield variants.forward(batch, repeats)
    yield from variants.ours(batch, TOPS, repeats)
    yield from variants.exact_backward(batch, TOPS, max(repeats // 2, 3))


def _shares(costs: tuple[Cost, ...], variant: str) -> dict[str, dict[str, float]]:
    """Batch size -> classes -> CPU time of the forward pass alone / that of a variant."""
    forward = {cost.batch: cost.cpu for cost in costs if cost.variant == FORWARD}
    found: dict[str, dict[str, float]] = {}
    for cost in costs:
        measured, _, top = cost.variant.partition(", top ")
        if measured == variant:
            found.setdefault(str(cost.batch), {})[top] = forward[cost.batch] / cost.cpu
    return found


def _seconds(costs: tuple[Cost, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """Variant -> batch size -> medians in seconds a call, and of how many calls."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for cost in costs:
        medians = {"wall": cost.wall, "cpu": cost.cpu, "repeats": cost.repeats}
        found.setdefault(cost.variant, {})[str(cost.batch)] = medians
    return found


def _precisions(
    exact: KerasNetwork, pixels: NDArray[np.uint8], random_seed: int | None
) -> dict[str, dict[str, float]]:
    """Each precision against float32: speed, and how far the heatmaps of its best classes move."""
    class_ids = exact.compute(pixels, best(len(pixels), CLASSES)).class_ids
    networks = {"float32": exact} | {
        precision: load_network(exact.facts.name, random_seed=random_seed, precision=precision)
        for precision in PRECISIONS[1:]
    }
    maps = {
        precision: np.stack([cam.heatmaps(raw) for raw in network.compute(pixels, class_ids).raw])
        for precision, network in networks.items()
    }

    def variant(precision: str, network: KerasNetwork) -> Variant:
        return Variant(precision, len(pixels), 3, lambda: network.compute(pixels, class_ids), warm=True)

    costs = interleave([variant(*one) for one in networks.items()])
    return {
        cost.variant: {
            "speed": costs[0].wall / cost.wall,
            "speed_cpu": costs[0].cpu / cost.cpu,
            "difference": float(np.abs(maps[cost.variant] - maps["float32"]).max()),
        }
        for cost in costs
    }


def requirements(found: Figures) -> Iterator[Requirement]:
    """The same heatmaps; then share of the forward pass, and times the notebook's speed."""
    for network, required in found["required"].items():
        same = found["agreement"][network]
        what = f"{network}: difference from the notebook's heatmaps"
        holds = same["lit"] > 0 and same["difference"] <= TOLERANCE
        yield Requirement(what, f"at most {tiny(TOLERANCE)}", tiny(same["difference"]), holds)
        for what, least in required.items():
            cell = re.fullmatch(r"share of forward, batch (\d+), top (\d+)", what)
            batch, top = cell.groups() if cell else ("", "")
            value = (
                found["share_of_forward"][network][batch][top] if cell else found["times_notebook"][network]
            )
            yield at_least(f"{network}: {what}", least, value)


def tables(found: Figures) -> Iterator[str]:
    """Shares by batch and classes, by method, and by precision."""
    yield "Share of the forward pass, in CPU time:"
    yield ""
    rows = [
        (network, title, batch, *(plain(by_top[top]) if top in by_top else "" for top in ("1", "8", "50")))
        for network in found["share_of_forward"]
        for key, (_, title) in SHARES.items()
        for batch, by_top in found[key][network].items()
    ]
    yield from table(("network", "variant", "batch", "top 1", "top 8", "top 50"), rows)
    yield "*The whole way back* takes the gradient of every activation, as `GRADCAM_EXACT_BACKWARD` does."
    yield "Times the notebook's speed, one image, top 8:"
    yield ""
    both = ("times_notebook", "times_notebook_cpu")
    speeds = [(name, *(plain(found[key][name]) for key in both)) for name in found["times_notebook"]]
    yield from table(("network", "wall time", "CPU time"), speeds)
    methods = found["share_of_forward_by_method"]
    yield "Every method, as a share of the forward pass in CPU time, batch 8, top 8:"
    yield ""
    names = list(next(iter(methods.values()), {}))
    rows = [(f"`{name}`", *(plain(methods[one][name]) for one in methods)) for name in names]
    yield from table(("method", *methods), rows)
    yield "Fewer digits, against float32 (heatmaps in [0, 1]; random weights make nearly flat maps, whose"
    yield "differences say more about the noise than about the precision):"
    yield ""
    rows = [
        (network, f"`{name}`", plain(each["speed"]), plain(each["speed_cpu"]), tiny(each["difference"]))
        for network, precisions in found["precision"].items()
        for name, each in precisions.items()
    ]
    yield from table(
        ("network", "precision", "speed, wall", "speed, CPU", "largest difference of a heatmap"), rows
    )
