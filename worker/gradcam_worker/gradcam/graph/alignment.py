"""Whether a layer's grid is aligned with the image, so that a heatmap drawn over the image is in place.

Each value of a tensor depends on a region of the image; its position is the centre of that region. Positions
are computed step by step, from the image on. What Keras's layers do is known: the windows of a convolution or
a pooling cover all of their input apart from padding; most others leave values where they are. Steps that
only move values, such as a crop or a reshape, are run on the positions themselves. Any other step, such as a
custom layer, is measured: its input is changed once everywhere alike and once in proportion to the positions,
and the two effects are compared.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.axes import Shape
from gradcam_worker.gradcam.graph.graph import Graph, Step, Values
from gradcam_worker.gradcam.graph.target_layer import TargetLayer

TOLERANCE = 0.06  # of a cell's distance from where it is drawn, as a share of the side; plus half a cell
WITHIN_TOLERANCE = 0.85  # share of the cells that must be within the tolerance
WHOLE_SIDE = 0.26  # standard deviation of a region that is the whole side, as a share of it (uniform: 0.29)
MIN_EFFECT = 1e-3  # as a share of the strongest effect: less is none
SAMPLES, MIN_TRIES = 24, 2  # a measurement has as many samples of a position as channels times tries
CHANGE = 0.05  # of a tensor's values when a step is measured, as a share of their standard deviation
INTEGER_CHANGE = 16  # of integer values
MIN_IMAGE_SHARE = 0.05  # of a value that comes from the image; the rest is padding
ATTENTION = {
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "AdditiveAttention",
    "DotProductAttention",
}
MIXING = {"Matmul", "Einsum", "Dot", "Tensordot"}  # of two tensors, as attention does
WINDOWED = {"Conv", "DepthwiseConv", "SeparableConv", "ConvTranspose", "MaxPool", "AveragePool"}
WINDOWED |= {"AdaptiveAveragePool", "AdaptiveMaxPool"}
SAME_FOR_ALL_CHANNELS = {"ZeroPadding2D", "Cropping2D", "UpSampling2D"}
MOVING = SAME_FOR_ALL_CHANNELS | {
    *("Reshape", "Flatten", "Ravel", "Squeeze", "ExpandDims", "Transpose", "Permute", "Swapaxes", "Moveaxis"),
    *("GetItem", "Slice", "Split", "ArraySplit", "Hsplit", "Vsplit", "Unstack", "Take", "Repeat", "Tile"),
    *("Concatenate", "Stack", "Hstack", "Vstack", "Dstack", "BroadcastTo", "RepeatVector", "Pad", "Roll"),
    *("Flip", "Fliplr", "Flipud", "Rot90", "SpaceToDepth", "DepthToSpace", "ExtractPatches", "CropImages"),
    *("PadImages", "Resize", "Resizing", "CenterCrop", "AffineTransform", "PerspectiveTransform"),
    *("ZeroPadding1D", "Cropping1D", "UpSampling1D"),
}
IN_PLACE = {  # outputs stay at the positions of the inputs, if there are as many
    *("Dense", "Identity", "Activation", "Masking", "Rescaling", "Normalization", "Cast", "SaturateCast"),
    *(
        "StopGradient",
        "Copy",
        "NanToNum",
        "Where",
        "Clip",
        "Maximum",
        "Minimum",
        "Average",
        "Abs",
        "Absolute",
    ),
    *("Add", "Subtract", "Multiply", "Divide", "TrueDivide", "DivideNoNan", "FloorDivide", "Mod", "Power"),
    *("Negative", "Square", "Sqrt", "Rsqrt", "Reciprocal", "Exp", "Expm1", "Log", "Log1p", "Log2", "Log10"),
    *("Sign", "Round", "Floor", "Ceil", "Sin", "Cos", "Tanh", "Erf", "BatchNorm", "LayerNorm", "RMSNorm"),
    *("Normalize", "Celu", "Elu", "Gelu", "HardShrink", "HardSigmoid", "HardSilu", "HardTanh", "LeakyRelu"),
    *("LogSigmoid", "LogSoftmax", "Relu", "Relu6", "Selu", "Sigmoid", "Silu", "SoftShrink", "Softmax"),
    *("Softplus", "Softsign", "SparsePlus", "SparseSigmoid", "Sparsemax", "Squareplus", "TanhShrink"),
    *("Threshold", "LayerScale", "StochasticDepth", "CustomScaleLayer"),
}
IN_PLACE_PACKAGES = {"activations", "regularization", "normalization", "merging"}  # of keras.layers
WINDOWED_PACKAGES = {"convolutional", "pooling"}
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Positions:
    """The position on the image of each value of a tensor, for one image."""

    at: Array  # (2, *shape): distance from the top and from the left as shares; NaN: none, or the whole image
    spread: float = 0.0  # standard deviation around that position, where it was measured

    @property
    def same_for_all_channels(self) -> bool:
        """Whether `at` is the broadcast of one channel."""
        return self.at.strides[-1] == 0

    @property
    def known(self) -> NDArray[np.bool_]:
        """For which values the position is known, (*shape)."""
        at = self.at[..., :1] if self.same_for_all_channels else self.at
        return np.broadcast_to(~np.isnan(at).any(axis=0), self.at.shape[1:])

    @cached_property
    def any_known(self) -> bool:
        """Whether the position of any value is known."""
        return bool(self.known[..., 0].any() or (not self.same_for_all_channels and self.known.any()))


class Alignment:
    """The positions of the tensors of a graph, computed when they are asked for."""

    def __init__(self, graph: Graph, values: Callable[[Collection[int]], Values]) -> None:
        """`values` runs the network on one image and returns the values of some slots."""
        self._graph, self._values_of = graph, values
        rows, columns, channels = graph.shapes[graph.input_slot][1:]
        at = np.stack(np.meshgrid(_centers(rows), _centers(columns), indexing="ij"))
        pixels = np.broadcast_to(at[:, None, :, :, None], (2, 1, rows, columns, channels))
        self._positions = {one.slot: _unknown(graph.shapes[one.slot]) for one in graph.inputs.values()}
        self._positions[graph.input_slot] = Positions(pixels.astype(np.float32))
        self._values: Values | None = None  # inputs of the steps that are measured

    def positions(self, slot: int) -> Positions:
        """The positions of the values at a slot."""
        if slot not in self._positions:
            steps = self._graph.steps_to([slot])
            for step in steps:
                if step.writes[0] not in self._positions:
                    self._follow(step, steps)
            self._values = None  # they are large
        return self._positions[slot]

    def misplaced(self, layer: TargetLayer) -> str | None:
        """How a layer's grid is misplaced, as a sentence; None where it is aligned or unknown."""
        positions = self.positions(layer.slot)
        return misplaced(_mean(layer.as_grid(positions.at, np), (1, -1)), positions.spread)

    def _follow(self, step: Step, steps: list[Step]) -> None:
        inputs = [self._positions[slot] for slot in step.inputs]
        shapes = [self._graph.shapes[slot] for slot in step.writes]
        try:
            outputs = self._output_positions(step, inputs, shapes, steps)
        except Exception:  # noqa: BLE001  # an operation may refuse such values
            outputs = [*map(_unknown, shapes)]
        self._positions.update(zip(step.writes, outputs, strict=True))

    def _output_positions(
        self, step: Step, inputs: list[Positions], shapes: list[Shape], steps: list[Step]
    ) -> list[Positions]:
        rule = _rule(step, self._graph)
        if rule is None or not any(positions.any_known for positions in inputs):
            return [*map(_unknown, shapes)]
        outputs: list[Positions]
        if rule is _measure:
            if self._values is None:
                measured = (other for other in steps if _rule(other, self._graph) is _measure)
                self._values = self._values_of({slot for other in measured for slot in other.inputs})
            outputs = _measure(step, inputs, {slot: self._values[slot] for slot in step.inputs})
        else:
            outputs = rule(step, inputs, shapes)
        return outputs


def misplaced(at: Array, spread: float = 0.0) -> str | None:
    """How a grid is misplaced, as a sentence, where its cells have the positions `at` (2, rows, columns)."""
    shape = at.shape[1:]
    drawn = np.stack(np.meshgrid(*map(_centers, shape), indexing="ij"))
    for axis in (axis for axis in (0, 1) if shape[axis] > 1):
        distance = np.abs(at[axis] - drawn[axis])
        tolerance = TOLERANCE + 0.5 / shape[axis] + spread
        if np.isnan(distance).all() or np.nanquantile(distance, WITHIN_TOLERANCE) <= tolerance:
            continue
        cell = np.nanargmax(distance)
        seen, shown = at.reshape(2, -1)[:, cell], drawn.reshape(2, -1)[:, cell]
        seen = np.where(np.isnan(seen), shown, seen)
        return (
            f"what is {seen[0]:.0%} from the top and {seen[1]:.0%} from the left of the input acts "
            f"{shown[0]:.0%} from its top and {shown[1]:.0%} from its left"
        )
    return None


def _centers(count: int) -> NDArray[np.float64]:
    return np.asarray((np.arange(count) + 0.5) / count)


def _unknown(shape: Shape) -> Positions:
    return Positions(np.broadcast_to(np.float32(np.nan), (2, *(size or 1 for size in shape))))


def _mean(at: Array, axis: int | tuple[int, ...], *, keepdims: bool = False) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing but NaN is NaN
        return np.asarray(np.nanmean(at, axis=axis, keepdims=keepdims), np.float32)


Rule = Callable[[Step, list[Positions], list[Shape]], list[Positions]]


def _rule(step: Step, graph: Graph) -> Any:
    """How the positions of a step's outputs follow from those of its inputs; None: they are unknown."""
    kind, package = step.kind, type(step.operation).__module__.rpartition(".")[0].rpartition(".")[2]
    inputs, outputs = ([graph.shapes[slot] for slot in slots] for slots in (step.inputs, step.writes))
    if step.is_custom:
        return _measure
    if kind in MOVING:
        return _move
    if kind in ATTENTION:
        return _stay if outputs[0][:-1] == inputs[0][:-1] else None
    if kind in MIXING:
        return None if len(inputs) > 1 else _measure
    if kind in WINDOWED or package in WINDOWED_PACKAGES:
        return None if "Global" in kind or len(outputs[0]) != len(inputs[0]) else _slide_windows
    in_place = kind in IN_PLACE or package in IN_PLACE_PACKAGES
    return _stay if in_place and any(outputs[0][:-1] == shape[:-1] for shape in inputs) else _measure


def _stay(step: Step, inputs: list[Positions], shapes: list[Shape]) -> list[Positions]:
    """Outputs keep the positions of inputs of their size; a broadcast operand, such as a gate, has none."""
    del step
    outputs = []
    for shape in shapes:
        full_size = [
            each for each in inputs if each.at.shape[2:-1] == shape[1:-1] and each.at.ndim == len(shape) + 1
        ]
        known = [positions for positions in full_size if positions.any_known]
        if not known or len({positions.at.shape[1] for positions in known}) > 1:
            outputs.append(_unknown(shape))
            continue
        channels = shape[-1]
        ats = [
            positions.at if positions.at.shape[-1] == channels else _for_channels(positions.at, channels)
            for positions in known
        ]
        if len(ats) > 1:
            narrow = ats if any(at.strides[-1] for at in ats) else [at[..., :1] for at in ats]
            mean = np.broadcast_to(_mean(np.stack(narrow), 0), ats[0].shape)
        else:
            mean = ats[0]
        outputs.append(Positions(mean, max(positions.spread for positions in known)))
    return outputs


def _for_channels(at: Array, channels: int) -> Array:
    """The mean position over the channels, for another number of channels."""
    mean = at[..., :1] if at.strides[-1] == 0 else _mean(at, -1, keepdims=True)
    if at.strides[-1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            mean = np.where(np.nanstd(at, axis=-1, keepdims=True) > WHOLE_SIDE, np.float32(np.nan), mean)
    return np.broadcast_to(mean, (*at.shape[:-1], channels))


def _slide_windows(step: Step, inputs: list[Positions], shapes: list[Shape]) -> list[Positions]:
    """The windows of a convolution or a pooling cover the whole input, apart from padding."""
    at = _for_channels(inputs[0].at, 1)
    windows, strides = _windows(step, at.ndim - 3)
    is_valid = getattr(step.operation, "padding", None) == "valid"
    for axis in range(at.ndim - 3):
        count = shapes[0][axis + 1]
        if not count:
            return [_unknown(shape) for shape in shapes]
        before, after = 0.0, 0.0
        if is_valid and windows and count < at.shape[axis + 2]:
            trimmed = max((windows[axis] - strides[axis]) / 2, 0.0)
            rest = at.shape[axis + 2] - ((count - 1) * strides[axis] + windows[axis])
            along = np.moveaxis(at, axis + 2, 0).reshape(at.shape[axis + 2], -1)
            empty = np.asarray(np.isnan(along).all(axis=1))
            before = min(trimmed, float((~empty).argmax()))
            after = min(trimmed + rest, float((~empty[::-1]).argmax()))
        at = _resample(at, axis + 2, count, before, after)
    at = np.broadcast_to(at, (*at.shape[:-1], shapes[0][-1]))
    return [Positions(at, inputs[0].spread), *map(_unknown, shapes[1:])]


def _windows(step: Step, rank: int) -> tuple[list[int] | None, list[int]]:
    """The sizes of a step's windows along each axis, dilation included, and the strides."""

    def per_axis(*names: str) -> list[int] | None:
        values = (getattr(step.operation, name, None) for name in names)
        value = next((value for value in values if value is not None), None)
        return [value] * rank if isinstance(value, int) else list(value) if value is not None else None

    size = per_axis("kernel_size", "pool_size")
    if size is None:  # a function, whose kernel is an argument
        arrays = [
            argument
            for argument in keras.tree.flatten(step.arguments.args)
            if len(getattr(argument, "shape", ())) == rank + 2
        ]
        size = list(arrays[-1].shape[:rank]) if arrays else None
    dilation = per_axis("dilation_rate") or [1] * rank
    window = [(length - 1) * by + 1 for length, by in zip(size, dilation, strict=True)] if size else None
    return window, per_axis("strides") or (size if "Pool" in step.kind and size else [1] * rank)


def _resample(at: Array, axis: int, count: int, before: float, after: float) -> Array:
    """Interpolate positions at `count` cells along an axis, without its first and last cells."""
    size = at.shape[axis]
    if (count, before, after) == (size, 0, 0):
        return at
    centers = before + _centers(count) * (size - before - after) - 0.5
    low = np.clip(np.floor(centers).astype(int), 0, size - 1)
    high = np.clip(low + 1, 0, size - 1)
    share = np.clip(centers - low, 0, 1).astype(np.float32).reshape(-1, *(1,) * (at.ndim - axis - 1))
    lower, upper = np.take(at, low, axis), np.take(at, high, axis)
    between = lower * (1 - share) + upper * share
    known = np.where(np.isnan(lower), upper, lower)
    return np.asarray(np.where(np.isnan(between), np.where(share > 0, known, lower), between), np.float32)


def _move(step: Step, inputs: list[Positions], shapes: list[Shape]) -> list[Positions]:
    """A step that only moves values, or averages neighbours, is run on the positions themselves.

    It is run on zeros and ones, too: what becomes of ones says which share of an output is no padding.
    """
    spread = max(positions.spread for positions in inputs)
    if _joins_equal_channels(step, inputs, shapes[0]):
        at = inputs[0].at
        return [Positions(np.broadcast_to(at[..., :1], (*at.shape[:-1], shapes[0][-1])), spread)]
    one_channel = step.kind in SAME_FOR_ALL_CHANNELS and inputs[0].same_for_all_channels
    used = [Positions(positions.at[..., :1]) if one_channel else positions for positions in inputs]
    ones = [positions.known.astype(np.float32) for positions in used]
    ats = [np.nan_to_num(positions.at) for positions in used]
    fillings = ([one * 0 for one in ones], ones, *([at[axis] for at in ats] for axis in (0, 1)))
    results = (_run(step, dict(zip(step.inputs, filling, strict=True))) for filling in fillings)
    outputs = []
    for zero, one, rows, columns, shape in zip(*results, shapes, strict=True):
        image_share = np.where(np.abs(one - zero) > MIN_IMAGE_SHARE, one - zero, np.float32(np.nan))
        at = _compact(np.asarray(np.stack([rows - zero, columns - zero]) / image_share, np.float32))
        outputs.append(
            Positions(np.broadcast_to(at, (*at.shape[:-1], shape[-1])) if one_channel else at, spread)
        )
    return outputs


def _joins_equal_channels(step: Step, inputs: list[Positions], shape: Shape) -> bool:
    """Whether a step concatenates channels that all have the same positions: common, and large."""
    first = inputs[0].at
    return (
        step.kind == "Concatenate"
        and step.operation.axis in {-1, len(shape) - 1}
        and all(positions.same_for_all_channels for positions in inputs)
        and all(np.array_equal(other.at[..., :1], first[..., :1], equal_nan=True) for other in inputs[1:])
    )


def _compact(at: Array) -> Array:
    """One channel that stands for all, where all have the same positions."""
    first = at[..., :1]
    return (
        np.broadcast_to(first.copy(), at.shape) if np.array_equal(at, first + 0 * at, equal_nan=True) else at
    )


def _run(step: Step, inputs: Values) -> list[Array]:
    values = {slot: keras.ops.convert_to_tensor(array) for slot, array in inputs.items()}
    step(values)
    return [
        np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(values[slot], "float32")))
        for slot in step.writes
    ]


def _measure(step: Step, inputs: list[Positions], values: Values) -> list[Positions]:
    """Compare the effect of a change in proportion to the positions with that of a uniform change."""
    positions = dict(zip(step.inputs, inputs, strict=True))
    unchanged = _run(step, values)
    sums = [np.zeros((5, *array.shape), np.float64) for array in unchanged]
    tries = max(MIN_TRIES, math.ceil(SAMPLES / min(array.shape[-1] for array in unchanged)))
    for changed_inputs in _changes(positions, values, tries):
        effects = (
            [new - old for new, old in zip(_run(step, changed), unchanged, strict=True)]
            for changed in changed_inputs
        )
        for total, uniform, rows, columns in zip(sums, *effects, strict=True):
            total += [uniform**2, uniform * rows, uniform * columns, rows**2, columns**2]
    spread = max(each.spread for each in inputs)
    return [_to_positions(total, spread) for total in sums]


def _changes(positions: dict[int, Positions], values: Values, tries: int) -> Iterator[list[Values]]:
    """Inputs with random changes of one size: uniform, in proportion to the rows, and to the columns."""
    random = np.random.default_rng(0)
    for _ in range(tries):
        changed: list[Values] = [{}, {}, {}]
        for slot, value in values.items():
            dtype = keras.backend.standardize_dtype(value.dtype)
            old = np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(value, "float32")))
            size = np.float32(CHANGE * (old.std() or 1)) if "float" in dtype else np.float32(INTEGER_CHANGE)
            change = size * (2 * random.integers(0, 2, old.shape, np.int8) - 1)
            factors = (positions[slot].known, *np.nan_to_num(positions[slot].at))
            for inputs, factor in zip(changed, factors, strict=True):
                new = old + change * factor
                new = new if "float" in dtype else np.clip(new.round(), 0, 255)
                inputs[slot] = keras.ops.cast(new, dtype)
        yield changed


def _to_positions(total: NDArray[np.float64], spread: float) -> Positions:
    """Sums of products of effects -> positions, by regression on the effect of the uniform change."""
    shape = total.shape[1:]
    if len(shape) > 2:  # noqa: PLR2004  # the channels of a position are samples of it
        total = total.sum(axis=-1, keepdims=True)
    strongest = total[0].max(initial=0)
    if not np.isfinite(total).all() or not strongest > 0:
        return _unknown(shape)
    uniform = np.where(total[0] > MIN_EFFECT * strongest, total[0], np.nan)
    at, squares = total[1:3] / uniform, total[3:5] / uniform
    variance = np.maximum(squares - at**2, 0)
    measured = float(np.sqrt(np.nanmean(variance, axis=(*range(1, at.ndim),)).max()))
    if spread + measured > WHOLE_SIDE:
        return _unknown(shape)
    at = np.clip(at, 0, 1).astype(np.float32)  # with few samples it may lie outside by chance
    return Positions(np.broadcast_to(at, (2, *shape)), spread + measured)
