"""Between which numbers a tensor lies, whatever the image is: interval arithmetic, back from the tensor.

What lies between 0 and 1 for certain is a probability, or an average, a maximum, a complement of such.
Nothing is known of what weights make, or somebody's own layer: there the way back ends.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.graph import Graph, Step

Bounds = tuple[float, float]
UNKNOWN: Bounds = (-math.inf, math.inf)
UNIT: Bounds = (0.0, 1.0)
ACTIVATIONS: dict[str, Bounds] = {
    **dict.fromkeys(("sigmoid", "hard_sigmoid", "sparse_sigmoid", "softmax", "sparsemax"), UNIT),
    **dict.fromkeys(("tanh", "hard_tanh", "soft_sign", "softsign"), (-1.0, 1.0)),
    **dict.fromkeys(("log_softmax", "log_sigmoid"), (-math.inf, 0.0)),
    **dict.fromkeys(("relu", "softplus", "exponential", "exp"), (0.0, math.inf)),
    "relu6": (0.0, 6.0),
}


def bounds_of(graph: Graph, slot: int) -> Bounds:
    """The least and the greatest number that can stand there; infinite where that cannot be told."""
    found: dict[int, Bounds] = {graph.entry: UNKNOWN}
    for step in ending(graph, slot):
        given = UNKNOWN if _begins(step) else _of(step, list(_operands(step, found)))
        found.update(dict.fromkeys(step.writes, _activated(step, given)))
    return found.get(slot, UNKNOWN)


def ending(graph: Graph, slot: int) -> list[Step]:
    """The steps that lead to a slot, in order, back to the last that have weights or cannot be seen."""
    wanted, found = {slot}, []
    for step in reversed(graph.steps):
        if wanted.intersection(step.writes):
            found.append(step)
            wanted.update(() if _begins(step) else step.inputs)
    return found[::-1]


def activation_of(step: Step) -> str | None:
    """The name of the activation that a step is, or ends in, as `hard_sigmoid`."""
    if step.is_foreign:
        return None
    function = getattr(step.operation, "activation", None)
    if isinstance(function, keras.layers.Activation):  # a layer given as another one's activation
        function = function.activation
    snake = "".join(f"_{one.lower()}" if one.isupper() else one for one in step.kind).strip("_")
    name = getattr(function, "__name__", snake)
    return name if name in ACTIVATIONS else None


def _begins(step: Step) -> bool:
    return bool(step.weights) or step.is_foreign


def _operands(step: Step, found: dict[int, Bounds]) -> Iterator[Bounds]:
    """What a step is called with: tensors, arrays, numbers."""
    slots = dict(step.reads)
    for one in keras.tree.flatten(step.arguments.args):
        if id(one) in slots:
            yield found.get(slots[id(one)], UNKNOWN)
        elif isinstance(one, int | float | np.ndarray | np.generic):
            yield float(np.min(one)), float(np.max(one))
        elif one is not None:
            yield UNKNOWN


def _of(step: Step, given: list[Bounds]) -> Bounds:
    rule = _RULES.get(step.kind)
    return rule(step, given) if rule and given else UNKNOWN


def _activated(step: Step, given: Bounds) -> Bounds:
    name = activation_of(step)
    if name is None:
        return given
    low, high = ACTIVATIONS[name]
    if name in {"relu", "relu6"}:  # what lies between these stays as it is
        low, high = (min(max(one, low), high) for one in given)
    return low, high


def _combined(how: Callable[[float, float], float], one: Bounds, two: Bounds) -> Bounds:
    ends = [how(left, right) for left in one for right in two]
    return (min(ends), max(ends)) if not any(map(math.isnan, ends)) else UNKNOWN


def _fold(how: Callable[[float, float], float]) -> Callable[[Step, list[Bounds]], Bounds]:
    def rule(_: Step, given: list[Bounds]) -> Bounds:
        result = given[0]
        for one in given[1:]:
            result = _combined(how, result, one)
        return result

    return rule


def _divided(_: Step, given: list[Bounds]) -> Bounds:
    one, two = given
    return _combined(lambda left, right: left / right, one, two) if two[0] > 0 or two[1] < 0 else UNKNOWN


def _clipped(step: Step, given: list[Bounds]) -> Bounds:
    low, high = np.min(step.operation.x_min), np.max(step.operation.x_max)
    return float(np.clip(given[0][0], low, high)), float(np.clip(given[0][1], low, high))


def _any_of(_: Step, given: list[Bounds]) -> Bounds:
    """Of what only moves numbers, chooses among them, or takes their mean."""
    return min(low for low, _ in given), max(high for _, high in given)


def _first(_: Step, given: list[Bounds]) -> Bounds:
    return given[0]


_ONE_OF_ALL = ("Average", "Concatenate", "Stack")
_OF_THE_FIRST = (
    *(
        "Reshape",
        "Flatten",
        "Squeeze",
        "ExpandDims",
        "Transpose",
        "Permute",
        "GetItem",
        "Identity",
        "Dropout",
    ),
    *("Cast", "Activation", "Mean", "Max", "Min", "Amax", "Amin", "Median"),
    *("GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalMaxPooling1D", "GlobalMaxPooling2D"),
    *("Relu", "Relu6"),
)
_RULES: dict[str, Callable[[Step, list[Bounds]], Bounds]] = {
    **dict.fromkeys(_ONE_OF_ALL, _any_of),
    **dict.fromkeys(_OF_THE_FIRST, _first),
    **dict.fromkeys(("Divide", "TrueDivide"), _divided),
    "Maximum": _fold(max),
    "Minimum": _fold(min),
    "Add": _fold(lambda left, right: left + right),
    "Subtract": _fold(lambda left, right: left - right),
    "Multiply": _fold(lambda left, right: left * right),
    "Negative": lambda _, given: (-given[0][1], -given[0][0]),
    "Clip": _clipped,
}
