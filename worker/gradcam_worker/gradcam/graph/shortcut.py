"""A shorter backward pass: Grad-CAM needs only the mean of the gradient over the positions of a feature map.

The backward pass of pooling preserves the sum of the gradient: the maximum of a window receives all of it, or
each position of a window its share. So the backward pass may stop at the tensor after global pooling, where
one position is left. Where a feature map is flattened into a dense layer, it may stop before that layer's
activation, with the layer's kernel summed over the positions: 8 MB for VGG16 instead of 411. Both are exact,
no approximation. Zero padding loses a share of the gradient, and a layer with weights or a nonlinearity
between the two changes the sum: there the whole backward pass is needed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.graph import Graph, Step
from gradcam_worker.gradcam.graph.head import only_reshapes
from gradcam_worker.gradcam.graph.target_layer import TargetLayer

MAX_POOLING = {"MaxPooling2D", "MaxPool", "GlobalMaxPooling2D"}  # padding is never the maximum
AVERAGE_POOLING = {"AveragePooling2D", "AveragePool"}  # only unpadded: backends count padding differently
REDUCTIONS = {"Mean", "Max", "Amax"}  # over both axes of positions
NO_OPS = {"Dropout", "SpatialDropout2D", "GaussianDropout", "GaussianNoise", "AlphaDropout", "Identity"}
FLATTENING = {"Flatten", "Reshape"}
POSITION_AXES = {(1, 2), (2, 1)}
ops = keras.ops


@dataclass(frozen=True)
class BackwardShortcut:
    """Where the backward pass from the scores stops, and how its gradients become channel means."""

    graph: Graph  # the network's own, or the same with one step split in two
    slot: int  # where the backward pass stops
    to_means: Callable[[Any], Any]  # gradients (k, n, ...) at `slot` -> means (k, n, 1, 1, channels)
    map_size: int  # rows x columns of the target layer

    @property
    def size(self) -> int:
        """Numbers held at once for one image and class: the gradient at `slot`, or the heatmap."""
        return max(math.prod(self.graph.shapes[self.slot][1:]), self.map_size)


def find_shortcut(graph: Graph, scores: int, layer: TargetLayer) -> BackwardShortcut | None:
    """The shortcut from the scores to the mean of the gradient at a layer, if the network has one.

    The kernel of a dense layer is summed here: after the weights have changed, call it again.

    Args:
        graph: The network.
        scores: The slot of the scores.
        layer: The target layer.

    Returns:
        The shortcut, or None where the whole backward pass is needed.
    """
    if layer.prefix is not None or not _is_map(graph, layer.slot):
        return None
    positions = layer.rows * layer.columns
    slot, channels = layer.slot, layer.channels
    chain = _single_path(graph, scores, slot)
    for step in chain:
        if not _preserves_sum(graph, step):
            return _before_dense(graph, step, chain, slot, positions)
        slot = step.writes[0]
        if math.prod(graph.shapes[slot][1:]) == channels:
            return BackwardShortcut(graph, slot, partial(_to_means, positions=positions), positions)
    return None


def without_gradient(graph: Graph, scores: int, layer: TargetLayer) -> BackwardShortcut:
    """For methods that use no gradient: the backward pass stops at the scores, its means are zeros."""
    positions = layer.rows * layer.columns
    return BackwardShortcut(
        graph, scores, lambda gradients: ops.zeros((*ops.shape(gradients)[:2], 1, 1, 1)), positions
    )


def _single_path(graph: Graph, scores: int, slot: int) -> Iterator[Step]:
    """The steps downstream of a slot, as long as there is one path to the scores."""
    tail, _ = graph.tail(slot, scores)
    while slot != scores:
        readers = [step for step in tail for one in step.inputs if one == slot]
        if len(readers) != 1 or len(readers[0].inputs) != 1 or len(readers[0].writes) != 1:
            return
        yield readers[0]
        slot = readers[0].writes[0]


def _is_map(graph: Graph, slot: int) -> bool:
    """Whether these are (any number of images, rows, columns, channels)."""
    images, *sizes = graph.shapes[slot]
    return images == 0 and len(sizes) == 3 and all(sizes)  # noqa: PLR2004  # rows, columns, channels


def _preserves_sum(graph: Graph, step: Step) -> bool:
    """Whether the backward pass of a step preserves the sum of the gradient of each channel."""
    operation = step.operation
    if not _is_of_keras(operation) or not _is_map(graph, step.inputs[0]):
        return False
    if step.kind in REDUCTIONS:
        axes = operation.axis if isinstance(operation.axis, tuple | list) else ()
        over_positions = tuple(axis % 4 for axis in axes) in POSITION_AXES
        return over_positions and getattr(operation, "initial", None) is None
    if step.kind in AVERAGE_POOLING:
        return bool(operation.padding == "valid")
    return step.kind in MAX_POOLING | {"GlobalAveragePooling2D"} or _is_no_op(step)


def _is_no_op(step: Step) -> bool:
    return _is_of_keras(step.operation) and (
        step.kind in NO_OPS or (step.kind == "Activation" and only_reshapes(step))
    )


def _is_of_keras(operation: Any) -> bool:
    return type(operation).__module__.startswith("keras.")


def _to_means(gradients: Any, *, positions: int) -> Any:
    """Gradients of a pooled map, (k, n, channels) or (k, n, 1, 1, channels) -> means over the positions."""
    images, channels = ops.shape(gradients)[:2], gradients.shape[-1]
    return ops.reshape(ops.cast(gradients, "float32"), (*images, 1, 1, channels)) / positions


def _before_dense(
    graph: Graph, step: Step, chain: Iterator[Step], slot: int, positions: int
) -> BackwardShortcut | None:
    """The shortcut that stops before the activation of a dense layer whose input is the flattened map."""
    rows, columns, channels = graph.shapes[slot][1:]
    flat = (0, rows * columns * channels)
    flattens = (
        step.kind in FLATTENING and _is_of_keras(step.operation) and graph.shapes[step.writes[0]] == flat
    )
    dense = next((one for one in chain if not _is_no_op(one)), None) if flattens else None
    if dense is None or type(dense.operation) is not keras.layers.Dense:
        return None
    layer = dense.operation
    if layer.quantization_mode is not None:
        return None
    graph, pre_activation = graph.split(dense, partial(_dense_product, layer), layer.activation or itself)
    kernel = ops.reshape(ops.cast(layer.kernel, "float32"), (rows * columns, channels, -1))
    summed = ops.stop_gradient(ops.transpose(ops.sum(kernel, axis=0)) / positions)
    return BackwardShortcut(graph, pre_activation, partial(_dense_to_means, summed), positions)


def _dense_product(layer: Any, inputs: Any, **_: Any) -> Any:
    """The output of a dense layer before its activation."""
    kernel = ops.cast(layer.kernel, layer.compute_dtype)
    product = ops.matmul(ops.cast(inputs, layer.compute_dtype), kernel)
    return product if layer.bias is None else product + ops.cast(layer.bias, layer.compute_dtype)


def itself(values: Any) -> Any:
    """The identity."""
    return values


def _dense_to_means(summed: Any, gradients: Any) -> Any:
    """Gradients (k, n, units) before the activation, times the summed kernel (units, channels)."""
    units, channels = summed.shape
    means = ops.matmul(ops.reshape(ops.cast(gradients, "float32"), (-1, units)), summed)
    return ops.reshape(means, (*ops.shape(gradients)[:2], 1, 1, channels))
