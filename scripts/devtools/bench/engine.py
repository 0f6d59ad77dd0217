"""What explaining costs beside predicting. *Share of forward* is the CPU time of the forward pass alone,
divided by that of the forward pass with the explanations of the best 1, 8 or 50 classes: 1.00 would be
explanations for free. *The notebook's way* is the arithmetic that this project started from: eager, one class
after the other, the whole trunk again for each. Weights are random, but seeded: speed does not depend on what
they are. Before the clock starts, both have to give the same heatmaps: what is compared computes the same.
"""

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

from devtools.agreement.notebook import CLASSES, TOLERANCE, NotebookGradCAM, check
from devtools.bench.report import Figures, Requirement, at_least, by_figure, plain, table, tiny
from devtools.bench.timing import Cost, Variant, interleave
from devtools.bench.variants import FORWARD, OURS, SEED, Variants, best, noise, prepared
from gradcam_worker.gradcam.backend import device_name, keras
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.models.loading import load_network

TITLE = "Engine"
PACKAGES = ("tensorflow", "keras", "numpy")
TOPS = (1, 8, 50)  # classes
REPEATS = {1: 15, 8: 7, 32: 3}  # by batch size: what is short is measured more often
NOTEBOOK = "notebook"  # the name of its variant
REQUIRED_TIMES_NOTEBOOK = {"vgg16": 28.0, "xception": 40.0}
REQUIRED_SHARES = {  # of forward, in CPU time, by batch size and classes
    "vgg16": {("1", "8"): 0.92, ("8", "8"): 0.95, ("8", "50"): 0.90},
    "xception": {("1", "8"): 0.97, ("8", "8"): 0.98, ("8", "50"): 0.97},
}
QUICK_CLASSES = 2
QUICK = "mobilenetv2"  # small, and its end is a dense layer, as the notebook needs it
REQUIRED_QUICK = 10.0  # times the notebook's speed: one noisy call must not decide


def measure(*, quick: bool) -> dict[str, Any]:
    """Load one network after the other, check that the comparison is fair, let the variants take turns."""
    device = device_name()
    if device != "cpu":
        print("The device is not the CPU: CPU seconds, and so the share of forward, say little here.")
    by_network = {}
    for name in (QUICK,) if quick else REQUIRED_SHARES:
        print(f"{name} ...", flush=True)
        by_network[name] = _measure_network(name, quick=quick)
        keras.utils.clear_session()
        gc.collect()
    return {"device": device, **by_figure(by_network)}


def _measure_network(name: str, *, quick: bool) -> dict[str, Any]:
    network = load_network(name, random_seed=SEED, forward="tensorflow")
    variants, layer = Variants(network), network.facts.default_layer
    pixels = noise(1, network.facts.input_size)
    image = prepared(network, pixels)
    on_logits = NotebookGradCAM(variants.model, layer, logits=True)
    classes = QUICK_CLASSES if quick else CLASSES
    agreement = check(network, on_logits, pixels, image, best(1, classes))
    top = partial(NotebookGradCAM(variants.model, layer).top, image, classes)
    notebook = Variant(NOTEBOOK, 1, 1 if quick else 3, top, warm=True)
    methods = {}
    if quick:
        costs = interleave([*variants.beside_ours(1, (classes,), 3), notebook])
    else:
        costs = interleave([*variants.beside_ours(1, TOPS, REPEATS[1]), notebook])
        for batch in (8, 32):
            costs += interleave([*variants.beside_ours(batch, TOPS, REPEATS[batch])])
        forward, *others = interleave([*variants.beside_methods(8, CLASSES, 5)])
        methods = {other.variant: forward.cpu / other.cpu for other in others}
    seconds: dict[str, dict[str, Cost]] = {}
    for cost in costs:
        seconds.setdefault(cost.variant, {})[str(cost.batch)] = cost
    ours, theirs = seconds[f"{OURS}{classes}"]["1"], seconds[NOTEBOOK]["1"]
    return {
        "share_of_forward": {
            batch: {
                variant.removeprefix(OURS): forward.cpu / by_batch[batch].cpu
                for variant, by_batch in seconds.items()
                if variant.startswith(OURS)
            }
            for batch, forward in seconds[FORWARD].items()
        },
        "share_of_forward_by_method": methods,
        "times_notebook": theirs.wall / ours.wall,
        "times_notebook_cpu": theirs.cpu / ours.cpu,
        "seconds": {
            variant: {
                batch: {"wall": cost.wall, "cpu": cost.cpu, "repeats": cost.repeats}
                for batch, cost in by_batch.items()
            }
            for variant, by_batch in seconds.items()
        },
        "agreement": agreement,
    }


def requirements(figures: Figures) -> Iterator[Requirement]:
    """The same heatmaps; then times the notebook's speed, and share of the forward pass."""
    quick = figures.get("quick")
    for network, same in figures["agreement"].items():
        what = f"{network}: difference from the notebook's heatmaps"
        agrees = same["lit"] > 0 and same["difference"] <= TOLERANCE
        yield Requirement(what, f"at most {tiny(TOLERANCE)}", tiny(same["difference"]), agrees)
        least = REQUIRED_QUICK if quick else REQUIRED_TIMES_NOTEBOOK[network]
        yield at_least(f"{network}: times notebook", least, figures["times_notebook"][network])
        for (batch, top), least in {} if quick else REQUIRED_SHARES[network].items():
            share = figures["share_of_forward"][network][batch][top]
            yield at_least(f"{network}: share of forward, batch {batch}, top {top}", least, share)


def blocks(figures: Figures) -> Iterator[str]:
    """Shares by batch and classes, by method, and speed by precision."""
    yield "Share of the forward pass, in CPU time:"
    quick = figures.get("quick")
    tops = (QUICK_CLASSES,) if quick else TOPS
    rows = [
        (network, batch, *(plain(by_top[top]) if top in by_top else "" for top in map(str, tops)))
        for network, by_batch in figures["share_of_forward"].items()
        for batch, by_top in by_batch.items()
    ]
    yield table(("network", "batch", *(f"top {top}" for top in tops)), rows)
    yield f"Times the notebook's speed, one image, top {QUICK_CLASSES if quick else CLASSES}:"
    wall, cpu = figures["times_notebook"], figures["times_notebook_cpu"]
    rows = [(network, plain(wall[network]), plain(cpu[network])) for network in wall]
    yield table(("network", "wall time", "CPU time"), rows)
    if quick:
        return
    yield "Every method, as a share of the forward pass in CPU time, batch 8, top 8:"
    methods = figures["share_of_forward_by_method"]
    rows = [(f"`{name}`", *(plain(methods[network][name]) for network in methods)) for name in cam.METHODS]
    yield table(("method", *methods), rows)
