"""The scores of a network: what it computes before its last softmax or sigmoid, found by its graph."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from worker.errors import NetworkIncompatible
from worker.gradcam.backend import keras
from worker.gradcam.catalog import Head
from worker.gradcam.graph import Graph, Step

RESHAPED = {"Flatten", "Reshape", "Squeeze", "Identity", "Dropout", "Cast"}  # scores stay scores
FINAL: dict[str, "Kind"] = {
    "softmax": "softmax",
    "log_softmax": "softmax",
    "sigmoid": "sigmoid",
    "log_sigmoid": "sigmoid",
}
Kind = Literal["softmax", "sigmoid"]
OPERATIONS = {
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Sigmoid": "sigmoid",
    "LogSigmoid": "log_sigmoid",
}


@dataclass(frozen=True)
class Scores:
    """A graph whose last activation is left out, and where its scores are."""

    graph: Graph
    slot: int
    kind: Kind  # how scores become probabilities
    activation: str | None  # what the network itself does to them in the end: one of `FINAL`
    units: int  # (images, units); one unit is a score for class 1 against class 0

    @property
    def classes(self) -> int:
        """How many classes can be explained: two where there is one unit."""
        return max(self.units, 2)


def find_scores(graph: Graph, head: Head) -> Scores:
    """The scores before the last softmax or sigmoid, fused into a layer or a layer of its own.

    Raises NetworkIncompatible where the output is no list of scores, or one of several and none is chosen.
    """
    slot = _output(graph, head)
    step, activation = graph.maker(slot), None
    while step is not None:
        activation, instead = _final_activation(step)
        if activation:
            graph = graph.without(step, instead)
        if activation or not only_reshapes(step):
            break
        step = graph.maker(step.inputs[0])
    units = _units(graph, slot)
    own = FINAL.get(activation or "")
    if own and head.kind not in {None, own}:
        message = f"The network ends in a {own}; its head cannot be {head.kind}."
        raise NetworkIncompatible(message)
    kind: Kind = own or head.kind or ("sigmoid" if units == 1 else "softmax")
    if kind == "softmax" and units == 1:
        message = "The network ends in a softmax of one unit, which is always 1: there is nothing to explain."
        raise NetworkIncompatible(message)
    return Scores(graph, slot, kind, activation, units)


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
    function = getattr(step.operation, "activation", None)
    if isinstance(function, keras.layers.Activation):  # a layer given as another one's activation
        function = function.activation
    name = OPERATIONS.get(step.kind) or getattr(function, "__name__", None)
    if name not in FINAL or step.is_foreign:
        return None, _itself
    fused = step.kind not in {"Activation", *OPERATIONS}
    return name, _unactivated(step.operation) if fused else _itself


def _itself(values: Any, **_: Any) -> Any:
    return values


def _unactivated(layer: Any) -> Any:
    """A copy of a layer with its weights and without its activation: the model itself is not edited."""
    copy = type(layer).from_config({**layer.get_config(), "activation": "linear"})
    copy.build_from_config(layer.get_build_config())
    copy.set_weights(layer.get_weights())
    return copy
