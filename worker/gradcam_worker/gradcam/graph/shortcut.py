"""Where the way back is shorter: Grad-CAM needs of the gradient only its mean over the positions.

Pooling hands back exactly what it was handed: the largest of a window gets all of its gradient, or each of a
window its share. So the sum over the positions is the same on both sides, and the way back may end where
one position is left, behind the pooling; or, where a dense layer takes the positions in one line, before its
activation, with its weights summed over the positions: for VGG16 8 MB in place of 411. What comes out is
exact. Padding with zeros takes its share away, and whatever learns or bends between the two changes the sum:
there the whole way back has to be gone.
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

LARGEST = {"MaxPooling2D", "MaxPool", "GlobalMaxPooling2D"}  # a border is never chosen
AVERAGES = {"AveragePooling2D", "AveragePool"}  # without a border: backends differ in what they count
REDUCES = {"Mean", "Max", "Amax"}  # over both axes of positions
IDLE = {"Dropout", "SpatialDropout2D", "GaussianDropout", "GaussianNoise", "AlphaDropout", "Identity"}
IN_ONE_LINE = {"Flatten", "Reshape"}
POSITIONS = {(1, 2), (2, 1)}
ops = keras.ops


@dataclass(frozen=True)
class BackwardShortcut:
    """How far back to go from the scores, and what to make of the gradients there."""

    graph: Graph  # the network's own, or the same with one step in two
    slot: int  # where the way back ends
    back: Callable[[Any], Any]  # gradients (k, n, ...) there -> their means, (k, n, 1, 1, channels)
    map_size: int  # rows x columns of the place

    @property
    def size(self) -> int:
        """How many numbers are held at once for one image and class: its slopes, its gradient or its map."""
        return max(math.prod(self.graph.shapes[self.slot][1:]), self.map_size)


def find_shortcut(graph: Graph, scores: int, place: TargetLayer) -> BackwardShortcut | None:
    """The shortcut from the slot of the scores to the mean of the gradient at a place, if there is one.

    The weights of a dense layer are summed now: if they change, a new one has to be found.
    """
    if place.prefix is not None or not _is_map(graph, place.slot):
        return None
    positions = place.rows * place.columns
    slot, channels = place.slot, place.channels
    way = _way(graph, scores, slot)
    for step in way:
        if not _keeps_the_sum(graph, step):
            return _before_dense(graph, step, way, slot, positions)
        slot = step.writes[0]
        if math.prod(graph.shapes[slot][1:]) == channels:
            return BackwardShortcut(graph, slot, partial(_mean, positions=positions), positions)
    return None


def nowhere(graph: Graph, scores: int, place: TargetLayer) -> BackwardShortcut:
    """For methods that ask for no gradient: the way back ends where it begins, with nothing of any value."""
    positions = place.rows * place.columns
    return BackwardShortcut(
        graph, scores, lambda slopes: ops.zeros((*ops.shape(slopes)[:2], 1, 1, 1)), positions
    )


def _way(graph: Graph, scores: int, slot: int) -> Iterator[Step]:
    """The steps from a slot on, as long as all that comes after goes through each of them."""
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


def _keeps_the_sum(graph: Graph, step: Step) -> bool:
    """Whether a step hands back, channel by channel, exactly the sum of what it is handed."""
    does = step.operation
    if not _is_kerass(does) or not _is_map(graph, step.inputs[0]):
        return False
    if step.kind in REDUCES:
        axes = does.axis if isinstance(does.axis, tuple | list) else ()
        return tuple(axis % 4 for axis in axes) in POSITIONS and getattr(does, "initial", None) is None
    if step.kind in AVERAGES:
        return bool(does.padding == "valid")
    return step.kind in LARGEST | {"GlobalAveragePooling2D"} or _does_nothing(step)


def _does_nothing(step: Step) -> bool:
    return _is_kerass(step.operation) and (
        step.kind in IDLE or (step.kind == "Activation" and only_reshapes(step))
    )


def _is_kerass(operation: Any) -> bool:
    return type(operation).__module__.startswith("keras.")


def _mean(gradients: Any, *, positions: int) -> Any:
    """Gradients of what is left of a map, (k, n, channels) or (k, n, 1, 1, channels), as their means."""
    images, channels = ops.shape(gradients)[:2], gradients.shape[-1]
    return ops.reshape(ops.cast(gradients, "float32"), (*images, 1, 1, channels)) / positions


def _before_dense(
    graph: Graph, step: Step, way: Iterator[Step], slot: int, positions: int
) -> BackwardShortcut | None:
    """The shortcut that ends before the activation of a dense layer which reads a map in one line."""
    rows, columns, channels = graph.shapes[slot][1:]
    line = (0, rows * columns * channels)
    in_line = step.kind in IN_ONE_LINE and _is_kerass(step.operation) and graph.shapes[step.writes[0]] == line
    dense = next((one for one in way if not _does_nothing(one)), None) if in_line else None
    if dense is None or type(dense.operation) is not keras.layers.Dense:
        return None
    layer = dense.operation
    if layer.quantization_mode is not None:
        return None
    graph, between = graph.split(dense, partial(_product, layer), layer.activation or itself)
    kernel = ops.reshape(ops.cast(layer.kernel, "float32"), (rows * columns, channels, -1))
    table = ops.stop_gradient(ops.transpose(ops.sum(kernel, axis=0)) / positions)
    return BackwardShortcut(graph, between, partial(_through, table), positions)


def _product(layer: Any, inputs: Any, **_: Any) -> Any:
    """What a dense layer does before its activation."""
    kernel = ops.cast(layer.kernel, layer.compute_dtype)
    product = ops.matmul(ops.cast(inputs, layer.compute_dtype), kernel)
    return product if layer.bias is None else product + ops.cast(layer.bias, layer.compute_dtype)


def itself(values: Any) -> Any:
    """As it is."""
    return values


def _through(table: Any, gradients: Any) -> Any:
    """Gradients (k, n, units) before a dense layer's activation, by its summed weights (units, channels)."""
    units, channels = table.shape
    means = ops.matmul(ops.reshape(ops.cast(gradients, "float32"), (-1, units)), table)
    return ops.reshape(means, (*ops.shape(gradients)[:2], 1, 1, channels))
