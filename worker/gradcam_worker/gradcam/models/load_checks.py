"""Checks of a network when it is loaded: it is run on a few sample images.

Its steps must compute what the model computes; its head and its alignment with the image must be known.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam import backend
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.graph.alignment import Alignment
from gradcam_worker.gradcam.graph.graph import Graph, Values, run
from gradcam_worker.gradcam.graph.head import Scores
from gradcam_worker.gradcam.graph.target_layer import LayerIndex, TargetLayer, cropping_layer
from gradcam_worker.gradcam.methods import gradients
from gradcam_worker.gradcam.models.sample_images import varied_images
from gradcam_worker.gradcam.network import WAY_OUT, InputPixels
from gradcam_worker.text.visible import abridged

SAME = {
    "float32": 1e-3,
    "float16": 0.05,
    "bfloat16": 0.2,
}  # tolerance between the steps' outputs and the model's, as a share of the largest output
BATCH_DEPENDENT = 10  # times the tolerance: rounding alone differs by less between batch sizes
# What TensorFlow's runtime takes as the name of a node: after each > a name begins anew. Its Python side,
# which looks first, takes a backslash, too, and a > at any place but the first.
TENSORFLOW_NAME = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_./-]*(>[A-Za-z0-9.][A-Za-z0-9_./-]*)*")
GREY, CONTRAST = 128, 20  # mean and standard deviation of the first sample images
ops = keras.ops


@dataclass(frozen=True)
class SampleImages:
    """Runs the steps of a network on pixels (n, height, width, channels)."""

    prepare: Callable[[InputPixels], Values]  # to the inputs, by slot
    size: tuple[int, int, int]
    batch_of_one: bool = False  # the network takes one image at a time: a reshape has its number built in

    def run(self, graph: Graph, slot: int, pixels: InputPixels) -> Any:
        """The values of a slot. Compiled where the call of the model is: so the rounding is the same."""
        groups = (
            [pixels[index : index + 1] for index in range(len(pixels))] if self.batch_of_one else [pixels]
        )
        return ops.concatenate([_run(graph, [slot], self.prepare(group))[slot] for group in groups])

    def values(self, graph: Graph, slots: Collection[int]) -> Values:
        """The values of some slots for one image."""
        return _run(graph, slots, self.prepare(_grey(self.size)[:1]))


def _run(graph: Graph, slots: Collection[int], inputs: Values) -> Values:
    steps = graph.steps_to(slots)
    variables = [variable for step in steps for variable in step.variables]
    values: Values = _computed(lambda given: run(steps, {**given}, keep=slots), inputs, variables)
    return values


def _computed(function: Callable[[Values], Any], inputs: Values, variables: Sequence[Any]) -> Any:
    """A function of the inputs: on JAX as one program, as each operation alone takes as long to compile."""
    if backend.name() != "jax":
        return function(inputs)
    unique = [*{id(one): one for one in variables}.values()]
    changed: list[Any] = []  # such as the state of a random layer, which must give something else next time

    def compute(inputs: Values) -> tuple[Any, list[Any]]:
        before = [one.value for one in unique]
        results = function(inputs)
        changed[:] = [one for one, value in zip(unique, before, strict=True) if one.value is not value]
        return results, [one.value for one in changed]

    results, values = gradients.jax_compiled(compute, unique)(inputs)
    for variable, value in zip(changed, values, strict=True):
        variable.assign(value)
    return results


def _call(model: Any, graph: Graph, inputs: Values) -> Any:
    """What the model itself returns."""

    def call(inputs: Values) -> Any:
        if not graph.further_inputs:
            return model(inputs[graph.input_slot], training=False)
        ordered = [inputs[one.slot] for one in graph.inputs.values()]
        struct = model._inputs_struct  # noqa: SLF001  # how the model takes its inputs: a list, or by name
        return model(keras.tree.pack_sequence_as(struct, ordered), training=False)

    return _computed(call, inputs, model.variables)


@dataclass
class Observed:
    """What the sample images have shown about a network."""

    samples: SampleImages
    outputs: NDArray[np.float64]  # (images, units), before the last activation
    dtype: str  # of the network's outputs
    alignment: Alignment


def observe(row: NetworkRow, model: Any, scores: Scores, samples: SampleImages) -> Observed:
    """Run a network on a few sample images, and on more where the kind of its head is not known.

    Args:
        row: What the catalog or registry says about the network.
        model: The Keras model.
        scores: Its graph without the last activation.
        samples: How to run it.

    Returns:
        What was observed.

    Raises:
        NetworkIncompatible: The network cannot be run, or its steps compute something else than the model.
    """
    graph, pixels, name = scores.graph, _grey(samples.size), row.name
    output = list(graph.outputs).index(row.head.output) if row.head.output else 0
    try:
        returned = _call(model, graph, samples.prepare(pixels[:1]))
        expected = _flat(keras.tree.flatten(returned)[output])
    except Exception as error:  # a custom layer's own code
        raise cannot_run(name, error) from error
    chosen, values = _run_like_the_model(name, scores, samples, pixels, expected)
    more = [] if scores.kind else [_flat(chosen.run(graph, scores.slot, varied_images(samples.size)))]
    return Observed(
        samples=chosen,
        outputs=np.concatenate([_flat(values), *more]).astype(np.float64),
        dtype=_dtype(scores.to_outputs(values)),
        alignment=Alignment(graph, lambda slots: chosen.values(graph, slots)),
    )


def _run_like_the_model(
    name: str, scores: Scores, samples: SampleImages, pixels: InputPixels, expected: Any
) -> tuple[SampleImages, Any]:
    """Find out whether images have to be run as one batch or singly, and return the scores.

    Raises NetworkIncompatible where neither gives what the model returned for the first image.
    """
    tolerance = SAME[_least_precise(scores.graph)]
    failed: Exception | None = None
    as_one_batch: tuple[float, Any] = (math.inf, None)
    for way in (samples, replace(samples, batch_of_one=True)):
        try:
            values = way.run(scores.graph, scores.slot, pixels)
            outputs = scores.to_outputs(values)
        except Exception as error:  # noqa: BLE001  # a custom layer's own code; or one image is built in
            failed = error
            continue
        difference = _difference(_flat(outputs[:1]), expected) if len(values) == len(pixels) else math.inf
        if difference <= tolerance:
            # The last digits depend on the batch size, and a deep network magnifies the difference.
            is_rounding = way.batch_of_one and as_one_batch[0] <= BATCH_DEPENDENT * tolerance
            return (samples, as_one_batch[1]) if is_rounding else (way, values)
        failed, as_one_batch = None, as_one_batch if way.batch_of_one else (difference, values)
    if failed:
        raise cannot_run(name, failed) from failed
    message = (
        f"{name}, run one layer after the other, computes something else than as a whole (by "
        f"{difference:.2g} of its largest output): it has a random layer, or one that reads more than its "
        f"inputs. {WAY_OUT}."
    )
    raise NetworkIncompatible(message)


def cannot_run(name: str, error: Exception) -> NetworkIncompatible:
    """The error for a network of which a step fails."""
    reason = abridged(str(error))
    return NetworkIncompatible(f"{name} cannot be run, one layer after the other: {reason}. {WAY_OUT}.")


def _dtype(values: Any) -> str:
    dtype = str(keras.backend.standardize_dtype(values.dtype))
    return dtype if dtype in SAME else "float32"


def _least_precise(graph: Graph) -> str:
    """The least precise type that a step computes in."""
    used = {getattr(step.operation, "compute_dtype", None) for step in graph.steps}
    return next((dtype for dtype in ("bfloat16", "float16") if dtype in used), "float32")


def _difference(actual: Any, expected: Any) -> float:
    if actual.shape != expected.shape:
        return math.inf
    return float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-6))


def _flat(values: Any) -> NDArray[np.float32]:
    values = ops.cast(values, "float32")
    return np.asarray(ops.convert_to_numpy(ops.reshape(values, (values.shape[0], -1))))


def _grey(size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Two grey images with a little noise."""
    noise = np.random.default_rng(0).normal(GREY, CONTRAST, (2, *size))
    return np.clip(noise, 0, 255).astype(np.uint8)


def check_input(row: NetworkRow, graph: Graph) -> None:
    """Check that the network's input suits its preprocessing, and that no layer crops it.

    Raises:
        NetworkIncompatible: Whole numbers would lose what preprocessing makes, or a layer crops the input.
    """
    row.check_input_type(graph.input_dtype)
    if path := cropping_layer(graph):
        message = (
            f"{row.name} crops its input, or pads it ({path}): its heatmaps would be misplaced. Set "
            "input_size to what is left, or to its proportions, and crop the images before: fit of sizing "
            f"does. {WAY_OUT}."
        )
        raise NetworkIncompatible(message)


def check_names(name: str, graph: Graph) -> None:
    """Check that TensorFlow can compile the network: it refuses some names of layers that Keras takes.

    Raises:
        NetworkIncompatible: It cannot.
    """
    if backend.name() != "tensorflow":
        return
    for layer in (step.operation.name for step in graph.steps):
        if not TENSORFLOW_NAME.fullmatch(layer):
            message = (
                f"{name} has a layer with the name {layer!r}, with which TensorFlow cannot compile it. "
                "Name it otherwise: beginning with a letter or a digit, and with these and _ - . / alone."
            )
            raise NetworkIncompatible(message)


def check_alignment(name: str, layers: LayerIndex, target: TargetLayer, observed: Observed) -> None:
    """Check that a heatmap of the target layer, drawn over the image, lies where it belongs.

    Raises:
        NetworkIncompatible: The network crops, pads, shifts or turns its input.
    """
    for layer in layers.with_first_weighted(target):
        if reason := observed.alignment.misplaced(layer):
            message = (
                f"{name} crops, pads, shifts or turns its input: as seen by the layer {layer.path}, {reason}."
                " Its heatmaps would be misplaced. Do that to the images before (fit of sizing crops and "
                f"pads), and let the network begin after it; set input_size to what is left. {WAY_OUT}."
            )
            raise NetworkIncompatible(message)
