"""The scores of a network: what it computes before its last softmax or sigmoid, found by its graph.

Where there is none of these at its end, what it says may be scores or probabilities already, as of an average
of several networks. That is told by its graph, as far as this is certain, and by what it makes of pictures.
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

RESHAPED = {"Flatten", "Reshape", "Squeeze", "Identity", "Dropout", "Cast"}  # scores stay scores
FINAL: dict[str, HeadKind] = {
    "softmax": "softmax",
    "log_softmax": "softmax",
    "sigmoid": "sigmoid",
    "log_sigmoid": "sigmoid",
}
STABLE = {"sigmoid": saturation.sigmoid, "softmax": saturation.softmax}
ALONE = {"Activation", "Softmax", "LogSoftmax", "Sigmoid", "LogSigmoid"}  # they are nothing but an activation
ROUNDED = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}  # how far probabilities may be off
DECLARE = (
    'declare what it is: head = {kind = "sigmoid"} or {kind = "softmax"} for scores, '
    '{kind = "probabilities"} for probabilities (in Python: Head(kind="sigmoid"))'
)


@dataclass(frozen=True)
class Scores:
    """A graph whose last activation is left out, and where its scores are."""

    graph: Graph
    slot: int
    kind: HeadKind | None  # how scores become probabilities; None: to be told by `read_as`
    activation: str | None  # what the network itself does to them in the end: one of `FINAL`
    units: int  # (images, units); one unit is a score for class 1 against class 0
    told: Callable[[Any], Any]  # the scores, in their own shape -> what the network itself says
    is_unit: bool = False  # whether they lie between 0 and 1 for certain
    is_linear: bool = False  # whether they may be any number for certain

    @property
    def classes(self) -> int:
        """How many classes can be explained: two where there is one unit."""
        return max(self.units, 2)


def find_logits(graph: Graph, head: Head) -> Scores:
    """The scores before the last softmax or sigmoid, fused into a layer or a layer of its own.

    Raises NetworkIncompatible where the output is no list of scores, or one of several and none is chosen.
    """
    slot = _output(graph, head)
    step, activation = graph.maker(slot), None
    told: Callable[[Any], Any] = _itself
    while step is not None:
        activation, instead = _final_activation(step)
        if activation:
            told = _alone(step)
            graph = graph.without(step, instead)
        if activation or not only_reshapes(step):
            break
        step = graph.maker(step.inputs[0])
    units = _units(graph, slot)
    kind = FINAL.get(activation or "")
    if kind and head.kind not in {None, kind, "probabilities"}:
        message = f"The network ends in a {kind}; its head cannot be {head.kind}."
        raise NetworkIncompatible(message)
    if (kind or head.kind) == "softmax" and units == 1:
        message = "The network ends in a softmax of one unit, which is always 1: there is nothing to explain."
        raise NetworkIncompatible(message)
    found = Scores(graph, slot, kind, activation, units, told)
    if kind:
        return found
    low, high = bounds_of(graph, slot)
    is_linear = step is not None and bool(step.weights) and not step.is_foreign and _is_linear(step)
    return replace(found, is_unit=UNIT[0] <= low and high <= UNIT[1], is_linear=is_linear)


def read_as(scores: Scores, head: Head, seen: NDArray[np.float64], dtype: str) -> Scores:
    """The same, with what kind they are, by what the network made of several pictures, (images, units).

    Raises NetworkIncompatible where that cannot be told, or is none.
    """
    if scores.kind:
        return scores
    about, kind = ROUNDED[dtype], head.kind
    is_unit = bool(seen.min() >= -about and seen.max() <= 1 + about)
    sums = bool(np.abs(seen.sum(axis=1) - 1).max() <= about)
    if kind == "probabilities" and not is_unit:
        message = (
            f"The head is declared as probabilities, but the network says {_farthest(seen):.4g}: these lie "
            f"between 0 and 1. Let it end in a sigmoid or a softmax, or {DECLARE}."
        )
        raise NetworkIncompatible(message)
    if is_unit and (scores.is_unit or (scores.units > 1 and sums)):
        if kind not in {None, "probabilities"}:
            message = (
                f"The outputs of the network are probabilities already; its head cannot be {kind}, which "
                "would take them for scores: leave it out."
            )
            raise NetworkIncompatible(message)
        kind = "probabilities"
    if kind is None and scores.units == 1 and not is_unit:
        message = (
            f"The network ends in one unit without a sigmoid, which says {_farthest(seen):.4g}: that may be "
            "the score of class 1, or a quantity, which is no class and cannot be explained. If it is a "
            'score, add this line to its row: head = {kind = "sigmoid"} (in Python: Head(kind="sigmoid")).'
        )
        raise NetworkIncompatible(message)
    if kind is None and (scores.units == 1 or (is_unit and not scores.is_linear)):
        message = (
            f"The network's outputs lie between 0 and 1 ({seen.min():.3g} to {seen.max():.3g}) for all "
            "pictures that it was tried with, but it ends in no sigmoid or softmax: they may be "
            f"probabilities, or scores that are small. Please {DECLARE}."
        )
        raise NetworkIncompatible(message)
    if kind == "probabilities":
        return replace(scores, kind=kind, graph=_with_slopes(scores.graph, scores.slot))
    return replace(scores, kind=kind or "softmax")


def _farthest(seen: NDArray[np.float64]) -> float:
    """The number that is least like a probability."""
    return float(seen.flat[np.abs(seen - 0.5).argmax()])


def _with_slopes(graph: Graph, slot: int) -> Graph:
    """The same graph, where the last sigmoids and softmaxes keep their slopes: see `saturation`."""
    for step in ending(graph, slot):
        stable = STABLE.get(activation_of(step) or "")
        if stable is None or not _is_over_classes(step):
            continue
        if step.kind in ALONE:
            graph = graph.without(step, _of_one(stable))
        else:
            graph, _ = graph.split(step, _unactivated(step.operation), stable)
    return graph


def _is_over_classes(step: Step) -> bool:
    return getattr(step.operation, "axis", -1) == -1 or activation_of(step) != "softmax"


def _of_one(function: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda values, **_: function(values)


def _alone(step: Step) -> Callable[[Any], Any]:
    """The activation that a step ends in, on its own."""
    function: Callable[[Any], Any] = step.operation if step.kind in ALONE else step.operation.activation
    return function


def _is_linear(step: Step) -> bool:
    function = getattr(step.operation, "activation", None)
    return function in {None, keras.activations.linear}


def _output(graph: Graph, head: Head) -> int:
    names = ", ".join(graph.outputs)
    if head.output is not None:
        if head.output not in graph.outputs:
            message = f"The network has no output {head.output!r}; it has {names}."
            raise NetworkIncompatible(message)
        return graph.outputs[head.output]
    if len(graph.outputs) > 1:
        message = f"The network has {len(graph.outputs)} outputs: choose one of {names}."
        raise NetworkIncompatible(message)
    return next(iter(graph.outputs.values()))


def _units(graph: Graph, slot: int) -> int:
    """How many scores an image gets."""
    sizes = graph.shapes[slot][1:]
    if not sizes or not sizes[-1] or math.prod(sizes[:-1]) != 1:
        shape = ", ".join(("None", *(str(size or None) for size in sizes)))
        message = f"The network's output has the shape ({shape}); a classifier's is (None, classes)."
        raise NetworkIncompatible(message)
    return sizes[-1]


def only_reshapes(step: Step) -> bool:
    """Whether a step changes nothing but the shape, in inference."""
    linear = getattr(step.operation, "activation", None) is keras.activations.linear
    return len(step.inputs) == 1 and (step.kind in RESHAPED or (step.kind == "Activation" and linear))


def _final_activation(step: Step) -> tuple[str | None, Callable[..., Any]]:
    """Which of `FINAL` a step ends in, if any, and what to call instead so as to leave it out."""
    name = activation_of(step)
    if name not in FINAL:
        return None, _itself
    return name, _itself if step.kind in ALONE else _unactivated(step.operation)


def _itself(values: Any, **_: Any) -> Any:
    return values


def _unactivated(layer: Any) -> Any:
    """A copy of a layer with its weights and without its activation: the model itself is not edited."""
    copy = type(layer).from_config({**layer.get_config(), "activation": "linear"})
    copy.build_from_config(layer.get_build_config())
    copy.set_weights(layer.get_weights())
    return copy
