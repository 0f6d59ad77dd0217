"""The scores of a network, which are its outputs before the last softmax or sigmoid, found in its graph.

A network without such an activation may return scores, or probabilities, for example the average of several
networks. Its graph decides where that is certain (`bounds`); else its outputs for several images do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import Head, HeadKind
from gradcam_worker.gradcam.graph import saturation
from gradcam_worker.gradcam.graph.bounds import UNIT, activation_of, bounds_of, ending
from gradcam_worker.gradcam.graph.graph import Graph, Step

RESHAPING = {"Flatten", "Reshape", "Squeeze", "Identity", "Dropout", "Cast"}  # values stay the same
FINAL: dict[str, HeadKind] = {
    "softmax": "softmax",
    "log_softmax": "softmax",
    "sigmoid": "sigmoid",
    "log_sigmoid": "sigmoid",
}
STABLE = {"sigmoid": saturation.sigmoid, "softmax": saturation.softmax}
PURE_ACTIVATIONS = {"Activation", "Softmax", "LogSoftmax", "Sigmoid", "LogSigmoid"}
ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}  # error of probabilities, and of their sum
DECLARE = (
    'declare what it is: head = {kind = "sigmoid"} or {kind = "softmax"} for scores, '
    '{kind = "probabilities"} for probabilities (in Python: Head(kind="sigmoid"))'
)
QUANTITY = "a quantity (a regression), which is no class and cannot be explained"


@dataclass(frozen=True)
class Scores:
    """A graph without its last activation, and the slot of its scores."""

    graph: Graph
    slot: int
    kind: HeadKind | None  # how scores become probabilities; None: not known yet, see `decide_kind`
    activation: str | None  # the last activation, which was removed: one of `FINAL`
    units: int  # scores have the shape (images, units); one unit is the score of class 1 against class 0
    to_outputs: Callable[[Any], Any]  # scores -> the network's own outputs
    is_unit: bool = False  # whether all values certainly lie between 0 and 1
    is_linear: bool = False  # whether they come from a layer with weights and without an activation

    @property
    def classes(self) -> int:
        """The number of classes that can be explained: two for a single unit."""
        return max(self.units, 2)


def find_logits(graph: Graph, head: Head) -> Scores:
    """The scores before the last softmax or sigmoid, be it fused into a layer or a layer itself.

    Args:
        graph: The network.
        head: What the operator declared about the output.

    Returns:
        The scores. Their `kind` is None where the network ends in no softmax or sigmoid.

    Raises:
        NetworkIncompatible: The output is no list of scores, or one of several outputs has to be chosen.
    """
    slot = _chosen_output(graph, head)
    step, activation = graph.producer(slot), None
    to_outputs: Callable[[Any], Any] = _identity
    while step is not None:
        activation, unactivated = _split_activation(step)
        if activation:
            to_outputs = _activation_function(step)
            graph = graph.with_operation(step, unactivated)
        if activation or not only_reshapes(step):
            break
        step = graph.producer(step.inputs[0])
    units = _count_units(graph, slot)
    kind = FINAL.get(activation or "")
    if kind and head.kind not in {None, kind, "probabilities"}:
        message = f"The network ends in a {kind}; its head cannot be {head.kind}."
        raise NetworkIncompatible(message)
    if (kind or head.kind) == "softmax" and units == 1:
        message = "The network ends in a softmax of one unit, which is always 1: there is nothing to explain."
        raise NetworkIncompatible(message)
    scores = Scores(graph, slot, kind, activation, units, to_outputs)
    if kind:
        return scores
    low, high = bounds_of(graph, slot)
    is_linear = step is not None and bool(step.weights) and not step.is_custom and _is_linear(step)
    return replace(scores, is_unit=UNIT[0] <= low and high <= UNIT[1], is_linear=is_linear)


def decide_kind(scores: Scores, head: Head, outputs: NDArray[np.float64], dtype: str) -> Scores:
    """Decide whether a network without a final activation returns scores or probabilities.

    Args:
        scores: As found by `find_logits`.
        head: What the operator declared about the output.
        outputs: What the network returned for several images, (images, units).
        dtype: In which it computes: float32, float16 or bfloat16.

    Returns:
        The same scores with their `kind`.

    Raises:
        NetworkIncompatible: The outputs contradict the declaration, or may be either.
    """
    if scores.kind:
        return scores
    tolerance, kind = ROUNDING[dtype], head.kind
    is_unit = bool(outputs.min() >= -tolerance and outputs.max() <= 1 + tolerance)
    sums_to_one = bool(np.abs(outputs.sum(axis=1) - 1).max() <= tolerance)
    if kind == "probabilities" and not is_unit:
        message = (
            f"The head is declared as probabilities, but the network returns {_least_probable(outputs):.4g}, "
            f"which is not between 0 and 1. Let it end in a sigmoid or a softmax, or {DECLARE}."
        )
        raise NetworkIncompatible(message)
    if is_unit and (scores.is_unit or (scores.units > 1 and sums_to_one)):
        if kind not in {None, "probabilities"}:
            message = (
                f"The outputs of the network are probabilities already; its head cannot be {kind}, which "
                "would take them for scores: leave it out."
            )
            raise NetworkIncompatible(message)
        kind = "probabilities"
    if kind is None and scores.units == 1 and not is_unit:
        message = (
            f"The network ends in one unit without a sigmoid, which returns {_least_probable(outputs):.4g}: "
            f"that may be the score of class 1, or {QUANTITY}. If it is a score, add this line to its row: "
            'head = {kind = "sigmoid"} (in Python: Head(kind="sigmoid")).'
        )
        raise NetworkIncompatible(message)
    if kind is None and (scores.units == 1 or (is_unit and not scores.is_linear)):
        message = (
            f"The network's outputs lie between 0 and 1 ({outputs.min():.3g} to {outputs.max():.3g}) for all "
            "images that it was tried with, but it ends in no sigmoid or softmax: they may be "
            f"probabilities, or scores that are small{f', or {QUANTITY}' if scores.units == 1 else ''}. "
            f"Please {DECLARE}."
        )
        raise NetworkIncompatible(message)
    if kind == "probabilities":
        return replace(scores, kind=kind, graph=_with_stable_activations(scores.graph, scores.slot))
    return replace(scores, kind=kind or "softmax")


def _least_probable(outputs: NDArray[np.float64]) -> float:
    """The output that is least like a probability."""
    return float(outputs.flat[np.abs(outputs - 0.5).argmax()])


def _with_stable_activations(graph: Graph, slot: int) -> Graph:
    """A copy of the graph in which the gradients of the last activations do not vanish: see `saturation`."""
    for step in ending(graph, slot):
        stable = STABLE.get(activation_of(step) or "")
        if stable is None or not _is_over_classes(step):
            continue
        if step.kind in PURE_ACTIVATIONS:
            graph = graph.with_operation(step, _ignoring_options(stable))
        else:
            graph, _ = graph.split(step, _unactivated(step.operation), stable)
    return graph


def _is_over_classes(step: Step) -> bool:
    return getattr(step.operation, "axis", -1) == -1 or activation_of(step) != "softmax"


def _ignoring_options(function: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda values, **_: function(values)


def _activation_function(step: Step) -> Callable[[Any], Any]:
    operation = step.operation
    function: Callable[[Any], Any] = operation if step.kind in PURE_ACTIVATIONS else operation.activation
    return function


def _is_linear(step: Step) -> bool:
    function = getattr(step.operation, "activation", None)
    return function in {None, keras.activations.linear}


def _chosen_output(graph: Graph, head: Head) -> int:
    names = ", ".join(graph.outputs)
    if head.output is not None:
        if head.output not in graph.outputs:
            message = f"The network has no output {head.output!r}; it has {names}."
            raise NetworkIncompatible(message)
        return graph.outputs[head.output]
    if len(graph.outputs) > 1:
        first = next(iter(graph.outputs))
        message = (
            f"The network has {len(graph.outputs)} outputs: choose one of {names}, as in "
            f'head = {{output = "{first}"}} (in Python: Head(output="{first}")).'
        )
        raise NetworkIncompatible(message)
    return next(iter(graph.outputs.values()))


def _count_units(graph: Graph, slot: int) -> int:
    """The number of scores of an image."""
    sizes = graph.shapes[slot][1:]
    if not sizes or not sizes[-1] or math.prod(sizes[:-1]) != 1:
        shape = ", ".join(("None", *(str(size or None) for size in sizes)))
        message = f"The network's output has the shape ({shape}); a classifier's is (None, classes)."
        raise NetworkIncompatible(message)
    return sizes[-1]


def only_reshapes(step: Step) -> bool:
    """Whether a step changes only the shape of its input, in inference mode."""
    linear = getattr(step.operation, "activation", None) is keras.activations.linear
    return len(step.inputs) == 1 and (step.kind in RESHAPING or (step.kind == "Activation" and linear))


def _split_activation(step: Step) -> tuple[str | None, Callable[..., Any]]:
    """Which of `FINAL` a step ends in, if any, and the operation without it."""
    name = activation_of(step)
    if name not in FINAL:
        return None, _identity
    return name, _identity if step.kind in PURE_ACTIVATIONS else _unactivated(step.operation)


def _identity(values: Any, **_: Any) -> Any:
    return values


def _unactivated(layer: Any) -> Any:
    """A copy of a layer, with its weights, without its activation: the model itself is not changed."""
    copy = type(layer).from_config({**layer.get_config(), "activation": "linear"})
    copy.build_from_config(layer.get_build_config())
    copy.set_weights(layer.get_weights())
    return copy
