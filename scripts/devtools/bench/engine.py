"""How fast the engine is: against the forward pass alone, and against the notebook's arithmetic.

For each network, with seeded random weights (speed does not depend on what they are):

    forward         the Keras model in one tf.function, nothing else
    ours            `Network.compute`: scores and the Grad-CAM of the best classes
    exact backward  the same, the whole way back to the target layer
    repeated tail   the trunk once, then the tail and its gradient for one class after the other
    notebook        the arithmetic this project started from, eager, one class after the other, batch 1

All ways take turns within one run, so that whatever else the machine does falls on all of them; only
medians and their ratios are reported. Before the clock starts, the notebook's arithmetic with logits in place
of probabilities has to give our heatmaps: what is compared computes the same thing.
"""

import gc
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from devtools.agreement.notebook import CLASSES, TOLERANCE, Agreement, NotebooksWay, check
from devtools.agreement.randomisation import photographs
from devtools.bench.engine_variants import (
    EXACT,
    FORWARD,
    NOTEBOOK,
    OURS,
    REPEATED,
    Ways,
    best,
    noise,
    prepared,
    titled,
)
from devtools.bench.timing import Cost, Way, machine, take_turns, versions
from gradcam_worker.gradcam.backend import device_name
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.models.loading import load_network

# isort: split
# Only now: the lines above keep TensorFlow quiet while it is loaded for the first time.
import keras
import numpy as np
from numpy.typing import NDArray

NETWORKS = ("vgg16", "xception")
SHIPPED = "efficientnet_lite0"  # with weights that have learned something
TOPS = (1, 8, 50)  # classes
REPEATS = {1: 15, 8: 7, 32: 3}  # by batch size: what is short is measured more often
SEED = 0
PRECISIONS = ("float32", "bfloat16", "mixed_bfloat16")
PACKAGES = ("tensorflow", "keras", "numpy")
# What is required. (batch, top) -> share of the forward pass, in CPU time; and times the notebook's speed.
SHARES = {
    "vgg16": {(1, 8): 0.92, (8, 8): 0.95, (8, 50): 0.90},
    "xception": {(1, 8): 0.97, (8, 8): 0.98, (8, 50): 0.97},
}
TIMES = {"vgg16": 28.0, "xception": 40.0}
LOOSE = 10.0  # times the notebook's speed, of a quick run: one noisy call must not decide


@dataclass(frozen=True)
class Precision:
    """What fewer digits cost and change, for the same images and classes."""

    speed: float  # images a second, by those of float32
    speed_cpu: float  # the same by CPU time
    difference: float  # the largest between two heatmaps in [0, 1]


@dataclass(frozen=True)
class Result:
    """What was found out about one network."""

    network: str
    agreement: Agreement
    costs: tuple[Cost, ...]
    methods: dict[str, float]  # share of the forward pass, batch 8, top 8
    precisions: dict[str, Precision]

    def cost(self, way: str, batch: int = 1) -> Cost:
        """The cost of one way at one batch size."""
        return next(cost for cost in self.costs if (cost.way, cost.batch) == (way, batch))

    def shares(self, way: str) -> dict[str, dict[str, float]]:
        """Batch size -> classes -> CPU time of the forward pass alone / that of this way: at best 1."""
        found: dict[str, dict[str, float]] = {}
        for cost in self.costs:
            measured, _, top = cost.way.partition(", top ")
            if measured == way:
                share = self.cost(FORWARD, cost.batch).cpu / cost.cpu
                found.setdefault(str(cost.batch), {})[top] = share
        return found

    @property
    def times_notebook(self) -> float:
        """How many times faster than the notebook's way, in wall time, top 8, batch 1."""
        return self.cost(NOTEBOOK).wall / self.cost(titled(OURS, CLASSES)).wall

    @property
    def times_notebook_cpu(self) -> float:
        """How many times less CPU time than the notebook's way, top 8, batch 1."""
        return self.cost(NOTEBOOK).cpu / self.cost(titled(OURS, CLASSES)).cpu

    def required(self, *, quick: bool) -> Iterator[tuple[str, float, float]]:
        """What is required: what it is, how much, and what was found."""
        yield "times notebook", LOOSE if quick else TIMES[self.network], self.times_notebook
        shares = self.shares(OURS)
        for (batch, top), share in {} if quick else SHARES[self.network].items():
            yield f"share of forward, batch {batch}, top {top}", share, shares[str(batch)][str(top)]

    def passed(self, *, quick: bool) -> bool:
        """What is required is reached, and by a fair comparison."""
        return self.agreement.holds and all(found >= least for _, least, found in self.required(quick=quick))


def measure_network(network_name: str, *, quick: bool) -> Result:
    """Load one network, check that the comparison is fair, then let the ways take turns."""
    network = load_network(network_name, random_seed=SEED)
    ways, layer = Ways(network), network.facts.default_layer
    pixels = noise(1, network.facts.input_size)
    image = prepared(network, pixels)
    with_logits = NotebooksWay(ways.model, layer, logits=True)
    agreement = check(network, with_logits, pixels, image, best(1, 2 if quick else CLASSES))
    notebook = NotebooksWay(ways.model, layer)
    eager = Way(NOTEBOOK, 1, 1 if quick else 3, lambda: notebook.top(image), warm=True)
    if quick:
        few = [
            ways.forward(1, 8),
            *ways.ours(1, (CLASSES,), 8),
            *ways.exact_backward(1, (CLASSES,), 8),
            eager,
        ]
        return Result(network_name, agreement, take_turns(few), {}, {})
    costs = (
        *take_turns([*every(ways, 1), *ways.repeated_tail(1, TOPS, REPEATS[1]), eager]),
        *take_turns([*every(ways, 8), *ways.repeated_tail(8, TOPS[:2], 3)]),
        *take_turns([ways.forward(32, REPEATS[32]), *ways.ours(32, TOPS, REPEATS[32])]),
    )
    forward, *others = take_turns([ways.forward(8, 5), *ways.methods(8, CLASSES, 5)])
    methods = {other.way: forward.cpu / other.cpu for other in others}
    precisions = measure_precisions(network, noise(8, network.facts.input_size), random_seed=SEED)
    return Result(network_name, agreement, costs, methods, precisions)


def every(ways: Ways, batch: int) -> Iterator[Way]:
    """Forward, ours and the whole way back, for each number of classes."""
    repeats = REPEATS[batch]
    yield ways.forward(batch, repeats)
    yield from ways.ours(batch, TOPS, repeats)
    yield from ways.exact_backward(batch, TOPS, max(repeats // 2, 3))


def measure_precisions(
    exact: KerasNetwork, pixels: NDArray[np.uint8], random_seed: int | None
) -> dict[str, Precision]:
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

    def way(precision: str, network: KerasNetwork) -> Way:
        return Way(precision, len(pixels), 3, lambda: network.compute(pixels, class_ids), warm=True)

    costs = take_turns([way(*one) for one in networks.items()])
    return {
        cost.way: Precision(
            speed=costs[0].wall / cost.wall,
            speed_cpu=costs[0].cpu / cost.cpu,
            difference=float(np.abs(maps[cost.way] - maps["float32"]).max()),
        )
        for cost in costs
    }


def measure_shipped() -> dict[str, Precision]:
    """Precisions on the shipped network and photos: real weights, whose maps say something."""
    network = load_network(SHIPPED)
    return measure_precisions(network, photographs(network.facts.input_size), random_seed=None)


def table(result: Result) -> Iterator[str]:
    """One network's figures, line by line."""
    yield f"{result.network}, medians"
    yield f"  {'way':<23}{'batch':>6}{'calls':>7}{'wall s':>9}{'CPU s':>9}{'images/s':>10}{'of forward':>12}"
    for cost in result.costs:
        share = result.cost(FORWARD, cost.batch).cpu / cost.cpu
        yield (
            f"  {cost.way:<23}{cost.batch:>6}{cost.repeats:>7}{cost.wall:>9.3f}{cost.cpu:>9.3f}"
            f"{cost.images_per_second:>10.2f}{share:>12.3f}"
        )
    for method, share in result.methods.items():
        yield f"  {method + f', top {CLASSES}':<23}{8:>6}{share:>47.3f}"
    yield from precision_table(result.precisions)
    yield f"  times notebook in CPU time: {result.times_notebook_cpu:.1f}"
    same = result.agreement
    yield f"  difference from the notebook's arithmetic on logits: {same.difference:.1e}, over"
    yield f"  {same.compared} heatmaps in [0, 1], {same.lit} not dark (allowed: {TOLERANCE:.0e})"


def precision_table(precisions: Mapping[str, Precision]) -> Iterator[str]:
    """How fast each precision is by float32, and how far its heatmaps are from it."""
    for precision, one in precisions.items():
        yield (
            f"  {precision:<23} {one.speed:.2f} times the speed of float32, {one.speed_cpu:.2f} by CPU time; "
            f"heatmaps differ by up to {one.difference:.1e}"
        )


def verdict(results: list[Result], *, quick: bool) -> Iterator[str]:
    """Whether what is required was reached, line by line."""
    for result in results:
        for what, least, found in result.required(quick=quick):
            word = "ok" if found >= least else "MISSED"
            yield f"  {result.network:<10}{what:<36}{found:>8.3f}  at least {least:g}: {word}"
        if not result.agreement.holds:
            yield f"  {result.network:<10}NOT COMPARABLE: heatmaps differ or are all dark"


def seconds(result: Result) -> dict[str, dict[str, dict[str, float]]]:
    """Way -> batch size -> medians in seconds a call, and of how many calls."""
    ways: dict[str, dict[str, dict[str, float]]] = {}
    for cost in result.costs:
        found = {"wall": cost.wall, "cpu": cost.cpu, "repeats": cost.repeats}
        ways.setdefault(cost.way, {})[str(cost.batch)] = found
    return ways


def document(results: list[Result], *, quick: bool) -> dict[str, Any]:
    """Everything as plain data; ratios are within this run, `seconds` are medians a call."""
    return {
        "share_of_forward": {one.network: one.shares(OURS) for one in results},
        "share_of_forward_exact_backward": {one.network: one.shares(EXACT) for one in results},
        "share_of_forward_repeated_tail": {one.network: one.shares(REPEATED) for one in results},
        "share_of_forward_by_method": {one.network: one.methods for one in results},
        "times_notebook": {one.network: one.times_notebook for one in results},
        "times_notebook_cpu": {one.network: one.times_notebook_cpu for one in results},
        "precision": {
            one.network: {name: asdict(precision) for name, precision in one.precisions.items()}
            for one in results
        },
        "seconds": {one.network: seconds(one) for one in results},
        "agreement": {one.network: asdict(one.agreement) for one in results},
        "required": {
            one.network: {what: least for what, least, _ in one.required(quick=quick)} for one in results
        },
        "passed": all(one.passed(quick=quick) for one in results),
    }


def main(*, quick: bool, as_json: bool) -> int:
    """Measure one network after the other; 0, or 1 where what is required or the agreement is missed."""
    begun, about, results = time.perf_counter(), machine(device_name()), []
    say = (lambda _: None) if as_json else print
    say(", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()))
    say(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()))
    if about["device"] != "cpu":
        say("The device is not the CPU: CPU seconds, and so the share of forward, say little here.")
    for network in NETWORKS:
        results.append(measure_network(network, quick=quick))
        keras.utils.clear_session()
        gc.collect()
        say("\n" + "\n".join(table(results[-1])))
    found = document(results, quick=quick)
    if not quick:
        shipped = measure_shipped()
        found["precision"][SHIPPED] = {name: asdict(one) for name, one in shipped.items()}
        say(f"\n{SHIPPED}, the shipped photos\n" + "\n".join(precision_table(shipped)))
    found |= {"took_s": time.perf_counter() - begun, "machine": about, "versions": versions(*PACKAGES)}
    say("\n" + "\n".join(verdict(results, quick=quick)) + f"\nTook {found['took_s']:.0f} s.")
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 0 if found["passed"] else 1
