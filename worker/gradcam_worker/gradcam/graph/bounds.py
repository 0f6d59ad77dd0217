"""Interval arithmetic: the bounds of a tensor's values, whatever the image is.

An output that certainly lies between 0 and 1 is a probability, or an average, maximum or complement of
probabilities. Nothing is known about the outputs of custom layers and of layers with weights, apart from
what their activation says.
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
    """The lowest and the highest value possible at a slot; infinite where that is unknown."""
    bounds: dict[int, Bounds] = {one.slot: UNKNOWN for one in graph.inputs.values()}
    bounds[graph.input_slot] = UNKNOWN
    for step in ending(graph, slot):
        operands = UNKNOWN if _is_unbounded(step) else _apply_rule(step, list(_operands(step, bounds)))
        bounds.update(dict.fromkeys(step.writes, _apply_activation(step, operands)))
    return bounds.get(slot, UNKNOWN)


def ending(graph: Graph, slot: int) -> list[Step]:
    """The steps that lead to a slot, in order, from the last ones with weights or custom layers on."""
    wanted, steps = {slot}, []
    for step in reversed(graph.steps):
        if wanted.intersection(step.writes):
            steps.append(step)
            wanted.update(() if _is_unbounded(step) else step.inputs)
    return steps[::-1]


def activation_of(step: Step) -> str | None:
    """The name of a step's activation, such as `hard_sigmoid`: its own, or the one that its layer ends in."""
    if step.is_custom:
        return None
    function = getattr(step.operation, "activation", None)
    if isinstance(function, keras.layers.Activation):  # a layer may be the activation of another layer
        function = function.activation
    snake = "".join(f"_{char.lower()}" if char.isupper() else char for char in step.kind).strip("_")
    name = getattr(function, "__name__", snake)
    return name if name in ACTIVATIONS else None


def _is_unbounded(step: Step) -> bool:
    return bool(step.weights) or step.is_custom


def _operands(step: Step, bounds: dict[int, Bounds]) -> Iterator[Bounds]:
    """The bounds of a step's arguments: tensors, arrays, numbers."""
    slots = dict(step.reads)
    for argument in keras.tree.flatten(step.arguments.args):
        if id(argument) in slots:
            yield bounds.get(slots[id(argument)], UNKNOWN)
        elif isinstance(argument, int | float | np.ndarray | np.generic):
            yield float(np.min(argument)), float(np.max(argument))
        elif argument is not None:
            yield UNKNOWN


def _apply_rule(step: Step, operands: list[Bounds]) -> Bounds:
    rule = _RULES.get(step.kind)
    return rule(step, operands) if rule and operands else UNKNOWN


def _apply_activation(step: Step, bounds: Bounds) -> Bounds:
    name = activation_of(step)
    if name is None:
        return bounds
    low, high = ACTIVATIONS[name]
    if name in {"relu", "relu6"}:  # the identity between its own bounds
        low, high = (min(max(bound, low), high) for bound in bounds)
    return low, high


def _combine(operation: Callable[[float, float], float], left: Bounds, right: Bounds) -> Bounds:
    corners = [operation(one, other) for one in left for other in right]
    return (min(corners), max(corners)) if not any(map(math.isnan, corners)) else UNKNOWN


def _fold(operation: Callable[[float, float], float]) -> Callable[[Step, list[Bounds]], Bounds]:
    def rule(_: Step, operands: list[Bounds]) -> Bounds:
        result = operands[0]
        for operand in operands[1:]:
            result = _combine(operation, result, operand)
        return result

    return rule


def _divide(_: Step, operands: list[Bounds]) -> Bounds:
    dividend, divisor = operands
    if divisor[0] <= 0 <= divisor[1]:
        return UNKNOWN
    return _combine(lambda left, right: left / right, dividend, divisor)


def _clip(step: Step, operands: list[Bounds]) -> Bounds:
    low, high = np.min(step.operation.x_min), np.max(step.operation.x_max)
    return float(np.clip(operands[0][0], low, high)), float(np.clip(operands[0][1], low, high))


def _hull(_: Step, operands: list[Bounds]) -> Bounds:
    """Of operations that join their operands, or take their mean."""
    return min(low for low, _ in operands), max(high for _, high in operands)


def _first(_: Step, operands: list[Bounds]) -> Bounds:
    """Of operations that move values of their first operand, choose among them, or take their mean."""
    return operands[0]


_HULL = ("Average", "Concatenate", "Stack")
_FIRST = (
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
    **dict.fromkeys(_HULL, _hull),
    **dict.fromkeys(_FIRST, _first),
    **dict.fromkeys(("Divide", "TrueDivide"), _divide),
    "Maximum": _fold(max),
    "Minimum": _fold(min),
    "Add": _fold(lambda left, right: left + right),
    "Subtract": _fold(lambda left, right: left - right),
    "Multiply": _fold(lambda left, right: left * right),
    "Negative": lambda _, operands: (-operands[0][1], -operands[0][0]),
    "Clip": _clip,
}
