"""How fast the engine is: against the forward pass alone, and against the notebook's arithmetic.

For each network, with seeded random weights (speed does not depend on what they are):

    forward    the Keras model in one tf.function, nothing else
    ours       `Network.compute`: scores and the Grad-CAM of the top 8 classes
    notebook   the arithmetic this project started from, eager, one class after the other, batch 1

All ways take turns within one run, so that whatever else the machine does falls on all of them;
only medians and their ratios are reported. Before the clock starts, the notebook's arithmetic with
logits in place of probabilities has to give our heatmaps: what is compared computes the same thing.
"""

import gc
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from timing import Cost, Way, machine, take_turns, versions

from worker.gradcam.backend import device_name
from worker.gradcam.keras_network import KerasNetwork
from worker.gradcam.loading import load_network

# isort: split
# Only now: `backend` keeps TensorFlow quiet while it is loaded for the first time.
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from worker.gradcam import cam

NETWORKS = ("vgg16", "xception")
CLASSES = 8  # the top 8, as in the notebook
LARGE_BATCH = 8  # images
SEED = 0
PACKAGES = ("tensorflow", "keras", "numpy")
FLOOR = 10.0  # times faster than the notebook's way, batch 1, wall time: required of every network
TOLERANCE = 1e-4  # between heatmaps in [0, 1]; float32, summed in another order, differs by 1e-6

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """Whether the notebook's arithmetic, on logits, gives our heatmaps."""

    difference: float  # the largest between two heatmaps in [0, 1]
    compared: int  # heatmaps
    lit: int  # of these, not all zeros: the ones that prove something

    @property
    def holds(self) -> bool:
        """Enough to call the comparison honest."""
        return self.lit > 0 and self.difference <= TOLERANCE


@dataclass(frozen=True)
class Result:
    """What was found out about one network."""

    network: str
    agreement: Agreement
    costs: tuple[Cost, ...]

    def cost(self, way: str, batch: int = 1) -> Cost:
        """The cost of one way at one batch size."""
        return next(cost for cost in self.costs if (cost.way, cost.batch) == (way, batch))

    def share_of_forward(self, way: str, batch: int) -> float:
        """CPU time of the forward pass alone / CPU time of this way: 1 is the best there can be."""
        return self.cost("forward", batch).cpu / self.cost(way, batch).cpu

    @property
    def batches(self) -> list[int]:
        """The batch sizes at which `ours` was measured."""
        return [cost.batch for cost in self.costs if cost.way == "ours"]

    @property
    def times_notebook(self) -> float:
        """How many times faster than the notebook's way, in wall time, batch 1."""
        return self.cost("notebook").wall / self.cost("ours").wall

    @property
    def times_notebook_cpu(self) -> float:
        """How many times less CPU time than the notebook's way, batch 1."""
        return self.cost("notebook").cpu / self.cost("ours").cpu

    @property
    def passed(self) -> bool:
        """The floor is kept, and by a fair comparison."""
        return self.agreement.holds and self.times_notebook >= FLOOR


class NotebooksWay:
    """The notebook's arithmetic, transcribed to be measured: it is nothing to learn from.

    Kinder than the original in two points: the models are built once, outside the measured time,
    and the image is already preprocessed.
    """

    def __init__(self, model: Any, layer: str, *, logits: bool = False) -> None:
        """Split `model` behind `layer`; `logits` leaves out the softmax that the notebook keeps."""
        target = model.get_layer(layer)
        behind = model.layers[model.layers.index(target) + 1 :]
        if logits:
            behind[-1] = _without_activation(behind[-1])
        start = result = keras.Input(target.output.shape[1:])
        for one in behind:
            result = one(result)
        self._trunk = keras.Model(model.inputs[0], target.output)
        self._classifier = keras.Model(start, result)

    def top(self, image: Floats) -> Floats:
        """Heatmaps (8, rows, columns) of the top 8 classes of one image (1, height, width, 3)."""
        scores = self._classifier(self._trunk(image)).numpy()[0]
        return self.named(image, np.argsort(-scores)[:CLASSES])

    def named(self, image: Floats, class_ids: Iterable[int]) -> Floats:
        """Heatmaps (k, rows, columns) of k classes of one image (1, height, width, 3)."""
        return np.stack([self._heatmap(image, int(class_id)) for class_id in class_ids])

    def _heatmap(self, image: Floats, class_id: int) -> Floats:
        """One class: everything from the start, the trunk too."""
        with tf.GradientTape() as tape:
            activations = self._trunk(image)
            tape.watch(activations)
            score = self._classifier(activations)[:, class_id]
        slope = tape.gradient(score, activations)
        weights = tf.reduce_mean(slope, axis=(0, 1, 2)).numpy()
        weighted = activations.numpy()[0]
        for channel in range(len(weights)):
            weighted[:, :, channel] *= weights[channel]
        together = weighted.mean(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):  # NaN where all is zero, as there
            return np.asarray(np.maximum(together, 0) / together.max(), np.float32)


def _without_activation(dense: Any) -> Any:
    """A copy of a dense layer that stops before its activation."""
    copy = keras.layers.Dense(dense.units, name=f"{dense.name}_logits")
    copy.build(dense.kernel.shape[:1])
    copy.set_weights(dense.get_weights())
    return copy


def measure_network(name: str, *, quick: bool) -> Result:
    """Load one network, check that the comparison is fair, then let the ways take turns."""
    network = load_network(name, random_seed=SEED)
    model = network._model  # noqa: SLF001  # the very same weights for all ways, in memory once
    layer = network.facts.default_layer
    pixels = _pixels(LARGE_BATCH, network.facts.input_size)
    prepared = keras.applications.imagenet_utils.preprocess_input(  # not ours: a check on ours
        pixels.astype(np.float32), data_format="channels_last", mode=network.facts.preprocessing
    )
    with_logits = NotebooksWay(model, layer, logits=True)
    named = _top(1)[:, : 2 if quick else CLASSES]
    agreement = check(network, with_logits, pixels[:1], prepared[:1], named)
    notebook = NotebooksWay(model, layer)
    ways = [
        *_pair(network, model, pixels[:1], prepared[:1], repeats=8 if quick else 20),
        Way("notebook", 1, 1 if quick else 3, lambda: notebook.top(prepared[:1]), warm=True),
    ]
    if not quick:
        ways += _pair(network, model, pixels, prepared, repeats=6)
    return Result(name, agreement, take_turns(ways))


def _pixels(count: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Seeded noise (count, height, width, 3): as good as any picture for random weights."""
    return np.random.default_rng(SEED).integers(0, 256, (count, *size, 3), np.uint8)


def check(
    network: KerasNetwork,
    notebook: NotebooksWay,
    pixels: NDArray[np.uint8],
    prepared: Floats,
    wanted: NDArray[np.int32],
) -> Agreement:
    """Compare our heatmaps of one image (1, height, width, 3), k classes, with the notebook's."""
    computed = network.compute(pixels, wanted)
    ours = cam.heatmaps(computed.raw[0])
    theirs = np.nan_to_num(notebook.named(prepared, computed.class_ids[0]))
    lit = int(np.count_nonzero(ours.max(axis=(1, 2))))
    return Agreement(float(np.abs(ours - theirs).max()), len(ours), lit)


def _top(count: int) -> NDArray[np.int32]:
    """The wish for the top 8 classes of `count` images, (count, 8): see `ClassIndex.wanted`."""
    return np.tile(-np.arange(1, CLASSES + 1, dtype=np.int32), (count, 1))


def _pair(
    network: KerasNetwork, model: Any, pixels: NDArray[np.uint8], prepared: Floats, *, repeats: int
) -> list[Way]:
    """The forward pass alone, and ours, for the same n images (n, height, width, 3)."""
    any_batch = tf.TensorSpec((None, *pixels.shape[1:]), tf.float32)
    alone = partial(model, training=False)
    forward = tf.function(alone, input_signature=[any_batch], autograph=False)
    images, wanted, count = tf.constant(prepared), _top(len(pixels)), len(pixels)
    return [
        Way("forward", count, repeats, lambda: forward(images).numpy()),
        Way("ours", count, repeats, lambda: network.compute(pixels, wanted)),
    ]


def table(result: Result) -> Iterator[str]:
    """One network's figures, line by line."""
    yield f"{result.network}, top {CLASSES} classes, medians"
    yield (
        f"  {'way':<10}{'batch':>6}{'repeats':>9}{'wall s':>9}{'CPU s':>9}{'images/s':>10}"
        f"{'share of forward':>18}{'times notebook':>16}"
    )
    for cost in result.costs:
        share = f"{result.share_of_forward(cost.way, cost.batch):.2f}"
        ours = (cost.way, cost.batch) == ("ours", 1)
        yield (
            f"  {cost.way:<10}{cost.batch:>6}{cost.repeats:>9}{cost.wall:>9.3f}{cost.cpu:>9.3f}"
            f"{cost.images_per_second:>10.2f}{share:>18}"
            f"{f'{result.times_notebook:.1f}' if ours else '':>16}"
        ).rstrip()
    yield f"  times notebook in CPU time: {result.times_notebook_cpu:.1f}"
    same = result.agreement
    yield f"  difference from the notebook's arithmetic on logits: {same.difference:.1e}, over"
    yield f"  {same.compared} heatmaps in [0, 1], {same.lit} not dark (allowed: {TOLERANCE:.0e})"


def verdict(results: list[Result]) -> Iterator[str]:
    """Whether what is required was reached, line by line."""
    yield f"Required, each: at least {FLOOR:g} times the notebook's speed, top {CLASSES}, batch 1."
    for result in results:
        word = "ok" if result.times_notebook >= FLOOR else "MISSED"
        yield f"  {result.network:<10}{result.times_notebook:>7.1f} times  {word}"
        if not result.agreement.holds:
            yield f"  {result.network:<10} NOT COMPARABLE: heatmaps differ or are all dark"


def _seconds(costs: Iterable[Cost]) -> dict[str, dict[str, dict[str, float]]]:
    """Way -> batch size -> medians in seconds a call, and of how many calls."""
    ways: dict[str, dict[str, dict[str, float]]] = {}
    for cost in costs:
        found = {"wall": cost.wall, "cpu": cost.cpu, "repeats": cost.repeats}
        ways.setdefault(cost.way, {})[str(cost.batch)] = found
    return ways


def document(results: list[Result], about: Mapping[str, Any], took_s: float) -> dict[str, Any]:
    """Everything as plain data; ratios are within this run, `seconds` are medians a call."""
    return {
        "share_of_forward": {
            result.network: {str(n): result.share_of_forward("ours", n) for n in result.batches}
            for result in results
        },
        "times_notebook": {result.network: result.times_notebook for result in results},
        "times_notebook_cpu": {result.network: result.times_notebook_cpu for result in results},
        "seconds": {result.network: _seconds(result.costs) for result in results},
        "agreement": {result.network: asdict(result.agreement) for result in results},
        "required_times_notebook": FLOOR,
        "passed": all(result.passed for result in results),
        "took_s": took_s,
        "machine": about,
        "versions": versions(*PACKAGES),
    }


def main(*, quick: bool, as_json: bool) -> int:
    """Measure one network after the other; 0, or 1 where the floor or the agreement is missed."""
    begun, about, results = time.perf_counter(), machine(device_name()), []
    say = (lambda _: None) if as_json else print
    say(", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()))
    say(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()))
    if about["device"] != "cpu":
        say("The device is not the CPU: CPU seconds, and so the share of forward, say little here.")
    for name in NETWORKS:
        results.append(measure_network(name, quick=quick))
        keras.utils.clear_session()
        gc.collect()
        say("\n" + "\n".join(table(results[-1])))
    took_s = time.perf_counter() - begun
    say("\n" + "\n".join(verdict(results)) + f"\nTook {took_s:.0f} s.")
    if as_json:
        json.dump(document(results, about, took_s), sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 0 if all(result.passed for result in results) else 1
