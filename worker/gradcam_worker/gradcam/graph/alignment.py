"""Whether a layer's grid lies on the image as it is drawn: where its numbers look, followed step by step.

What Keras's own layers do is known: a convolution or a pooling sees all of what it is given, apart from its
padding; most others leave what they see where it is. Steps that only move numbers, as a crop or a reshape,
are run on the places themselves. Any other step, such as somebody's own layer, is measured by itself: its
input is changed, everywhere alike and in proportion to the places, and the two effects are compared.
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

MARGIN = 0.06  # of a side, and half a cell: so far a cell may be from where it is drawn
MOST = 0.85  # of the cells are no farther off than that
EVERYWHERE = 0.26  # standard deviation of places, as shares of a side: 0.29 is the whole side
DIM = 1e-3  # of the strongest effect: less is none
SAMPLES, LEAST = 24, 2  # of each place: as many channels, or another try; tries at least
GREYS = 16  # the same of whole numbers
SMALL = 0.05  # of a tensor's standard deviation: so much its numbers are changed
FAINT = 0.05  # share of a number that comes from the image; the rest is padding
ATTENDS = {
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "AdditiveAttention",
    "DotProductAttention",
}
MIXES = {"Matmul", "Einsum", "Dot", "Tensordot"}  # where they are given two tensors: as an attention does
WINDOWED = {"Conv", "DepthwiseConv", "SeparableConv", "ConvTranspose", "MaxPool", "AveragePool"}
WINDOWED |= {"AdaptiveAveragePool", "AdaptiveMaxPool"}
EACH_CHANNEL = {"ZeroPadding2D", "Cropping2D", "UpSampling2D"}  # they do to all of them the same
MOVES = EACH_CHANNEL | {
    *("Reshape", "Flatten", "Ravel", "Squeeze", "ExpandDims", "Transpose", "Permute", "Swapaxes", "Moveaxis"),
    *("GetItem", "Slice", "Split", "ArraySplit", "Hsplit", "Vsplit", "Unstack", "Take", "Repeat", "Tile"),
    *("Concatenate", "Stack", "Hstack", "Vstack", "Dstack", "BroadcastTo", "RepeatVector", "Pad", "Roll"),
    *("Flip", "Fliplr", "Flipud", "Rot90", "SpaceToDepth", "DepthToSpace", "ExtractPatches", "CropImages"),
    *("PadImages", "Resize", "Resizing", "CenterCrop", "AffineTransform", "PerspectiveTransform"),
    *("ZeroPadding1D", "Cropping1D", "UpSampling1D"),
}
STAYS = {  # what comes out lies where what went in does, if it has as many places
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
STAYING = {"activations", "regularization", "normalization", "merging"}  # packages of layers of that kind
WINDOWS = {"convolutional", "pooling"}
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Places:
    """Where on the image the numbers of a tensor look, of one image."""

    at: Array  # (2, *shape): from the top and from the left, as shares; NaN: nowhere, or everywhere
    blur: float = 0.0  # how far around there, where that was measured

    @property
    def known(self) -> NDArray[np.bool_]:
        """Of which numbers it is known, (*shape)."""
        first = self.at if self.at.strides[-1] else self.at[..., :1]  # of one channel where all are alike
        return np.broadcast_to(~np.isnan(first).any(axis=0), self.at.shape[1:])

    @cached_property
    def is_known(self) -> bool:
        """Whether it is known of any."""
        return bool(self.known[..., 0].any() or (self.at.strides[-1] and self.known.any()))


class Alignment:
    """The places of all tensors of a graph, as far as they have been asked for."""

    def __init__(self, graph: Graph, values: Callable[[Collection[int]], Values]) -> None:
        """`values` runs the network on one image, and gives what is at some slots."""
        self._graph, self._values_of = graph, values
        rows, columns, channels = graph.shapes[graph.entry][1:]
        at = np.stack(np.meshgrid(_middles(rows), _middles(columns), indexing="ij"))
        entry = np.broadcast_to(at[:, None, :, :, None], (2, 1, rows, columns, channels))
        self._found = {graph.entry: Places(entry.astype(np.float32))}
        self._values: Values | None = None  # what the steps are given that are measured, meanwhile

    def places(self, slot: int) -> Places:
        """Where the numbers at a slot look."""
        if slot not in self._found:
            steps = self._graph.needed([slot])
            for step in steps:
                if step.writes[0] not in self._found:
                    self._follow(step, steps)
            self._values = None  # they are large
        return self._found[slot]

    def misplaced(self, layer: TargetLayer) -> str | None:
        """What speaks against the layer's grid lying on the image, in words; None where nothing does."""
        places = self.places(layer.slot)
        return misplaced(_mean(layer.as_grid(places.at, np), (1, -1)), places.blur)

    def _follow(self, step: Step, steps: list[Step]) -> None:
        given = [self._found[slot] for slot in step.inputs]
        shapes = [self._graph.shapes[slot] for slot in step.writes]
        try:
            found = self._behind(step, given, shapes, steps)
        except Exception:  # noqa: BLE001  # whatever an operation raises that does not take such numbers
            found = [*map(_nowhere, shapes)]
        self._found.update(zip(step.writes, found, strict=True))

    def _behind(
        self, step: Step, given: list[Places], shapes: list[Shape], steps: list[Step]
    ) -> list[Places]:
        rule = _rule(step, self._graph)
        if rule is None or not any(one.is_known for one in given):
            return [*map(_nowhere, shapes)]
        if rule is _measured:
            if self._values is None:
                measured = (one for one in steps if _rule(one, self._graph) is _measured)
                self._values = self._values_of({slot for one in measured for slot in one.inputs})
            values = {slot: self._values[slot] for slot in step.inputs}
            found: list[Places] = _measured(step, given, values)
        else:
            found = rule(step, given, shapes)
        return found


def misplaced(at: Array, blur: float = 0.0) -> str | None:
    """The same of the places (2, rows, columns) of a grid's cells."""
    shape = at.shape[1:]
    drawn = np.stack(np.meshgrid(*map(_middles, shape), indexing="ij"))
    for axis in (axis for axis in (0, 1) if shape[axis] > 1):
        off = np.abs(at[axis] - drawn[axis])
        margin = MARGIN + 0.5 / shape[axis] + blur
        if np.isnan(off).all() or np.nanquantile(off, MOST) <= margin:
            continue
        cell = np.nanargmax(off)
        there, here = at.reshape(2, -1)[:, cell], drawn.reshape(2, -1)[:, cell]
        there = np.where(np.isnan(there), here, there)
        return (
            f"what is {there[0]:.0%} from the top and {there[1]:.0%} from the left of the input acts "
            f"{here[0]:.0%} from its top and {here[1]:.0%} from its left"
        )
    return None


def _middles(count: int) -> NDArray[np.float64]:
    return np.asarray((np.arange(count) + 0.5) / count)


def _nowhere(shape: Shape) -> Places:
    return Places(np.broadcast_to(np.float32(np.nan), (2, *(size or 1 for size in shape))))


def _mean(at: Array, axis: int | tuple[int, ...], *, keepdims: bool = False) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nowhere in, nowhere out
        return np.asarray(np.nanmean(at, axis=axis, keepdims=keepdims), np.float32)


Rule = Callable[[Step, list[Places], list[Shape]], list[Places]]


def _rule(step: Step, graph: Graph) -> Any:
    """How the places behind a step are found; None: there are none."""
    kind, package = step.kind, type(step.operation).__module__.rpartition(".")[0].rpartition(".")[2]
    given, made = ([graph.shapes[slot] for slot in slots] for slots in (step.inputs, step.writes))
    if step.is_foreign:
        return _measured
    if kind in MOVES:
        return _moved
    if kind in ATTENDS:
        return _stays if made[0][:-1] == given[0][:-1] else None
    if kind in MIXES:
        return None if len(given) > 1 else _measured
    if kind in WINDOWED or package in WINDOWS:
        return None if "Global" in kind or len(made[0]) != len(given[0]) else _seen_through_windows
    stays = kind in STAYS or package in STAYING
    return _stays if stays and any(made[0][:-1] == one[:-1] for one in given) else _measured


def _stays(step: Step, given: list[Places], shapes: list[Shape]) -> list[Places]:
    """Those count that are as large as what comes out: not a gate that is spread over it."""
    del step
    found = []
    for shape in shapes:
        full = [one for one in given if one.at.shape[2:-1] == shape[1:-1] and one.at.ndim == len(shape) + 1]
        known = [one for one in full if one.is_known]
        if not known or len({one.at.shape[1] for one in known}) > 1:
            found.append(_nowhere(shape))
            continue
        channels = shape[-1]
        ats = [
            one.at if one.at.shape[-1] == channels else _of_all_channels(one.at, channels) for one in known
        ]
        if len(ats) > 1:  # of one channel where all are alike
            narrow = ats if any(one.strides[-1] for one in ats) else [one[..., :1] for one in ats]
            at = np.broadcast_to(_mean(np.stack(narrow), 0), ats[0].shape)
        else:
            at = ats[0]
        found.append(Places(at, max(one.blur for one in known)))
    return found


def _of_all_channels(at: Array, channels: int) -> Array:
    mean = at[..., :1] if at.strides[-1] == 0 else _mean(at, -1, keepdims=True)
    if at.strides[-1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            mean = np.where(np.nanstd(at, axis=-1, keepdims=True) > EVERYWHERE, np.float32(np.nan), mean)
    return np.broadcast_to(mean, (*at.shape[:-1], channels))


def _seen_through_windows(step: Step, given: list[Places], shapes: list[Shape]) -> list[Places]:
    """Of a convolution or a pooling: its cells, next to each other, see all there is but its padding."""
    at = _of_all_channels(given[0].at, 1)
    windows, strides = _windows(step, at.ndim - 3)
    is_valid = getattr(step.operation, "padding", None) == "valid"
    for axis in range(at.ndim - 3):
        count = shapes[0][axis + 1]
        if not count:
            return [_nowhere(shape) for shape in shapes]
        before, after = 0.0, 0.0
        if is_valid and windows and count < at.shape[axis + 2]:
            trimmed = max((windows[axis] - strides[axis]) / 2, 0.0)
            rest = at.shape[axis + 2] - ((count - 1) * strides[axis] + windows[axis])
            along = np.moveaxis(at, axis + 2, 0).reshape(at.shape[axis + 2], -1)
            empty = np.asarray(np.isnan(along).all(axis=1))
            before = min(trimmed, float((~empty).argmax()))
            after = min(trimmed + rest, float((~empty[::-1]).argmax()))
        at = _resampled(at, axis + 2, count, before, after)
    at = np.broadcast_to(at, (*at.shape[:-1], shapes[0][-1]))
    return [Places(at, given[0].blur), *map(_nowhere, shapes[1:])]


def _windows(step: Step, rank: int) -> tuple[list[int] | None, list[int]]:
    """How large the windows are along each axis, dilation and all, and how far apart."""

    def listed(*names: str) -> list[int] | None:
        found = next(
            (one for name in names if (one := getattr(step.operation, name, None)) is not None), None
        )
        return [found] * rank if isinstance(found, int) else list(found) if found is not None else None

    size = listed("kernel_size", "pool_size")
    if size is None:  # a function, which is given its kernel
        arrays = [
            one
            for one in keras.tree.flatten(step.arguments.args)
            if len(getattr(one, "shape", ())) == rank + 2
        ]
        size = list(arrays[-1].shape[:rank]) if arrays else None
    dilation = listed("dilation_rate") or [1] * rank
    window = [(one - 1) * by + 1 for one, by in zip(size, dilation, strict=True)] if size else None
    return window, listed("strides") or (size if "Pool" in step.kind and size else [1] * rank)


def _resampled(at: Array, axis: int, count: int, before: float, after: float) -> Array:
    """So many cells along an axis, over all of it but what is cut off before and after."""
    size = at.shape[axis]
    if (count, before, after) == (size, 0, 0):
        return at
    middles = before + _middles(count) * (size - before - after) - 0.5
    low = np.clip(np.floor(middles).astype(int), 0, size - 1)
    high = np.clip(low + 1, 0, size - 1)
    share = np.clip(middles - low, 0, 1).astype(np.float32).reshape(-1, *(1,) * (at.ndim - axis - 1))
    one, other = np.take(at, low, axis), np.take(at, high, axis)
    both = one * (1 - share) + other * share
    nearest = np.where(np.isnan(one), other, one)
    return np.asarray(np.where(np.isnan(both), np.where(share > 0, nearest, one), both), np.float32)


def _moved(step: Step, given: list[Places], shapes: list[Shape]) -> list[Places]:
    """What a step does that only moves numbers, or mixes neighbours: it is run on the places themselves."""
    blur = max(one.blur for one in given)
    if _joins_channels(step, given, shapes[0]):
        return [Places(np.broadcast_to(given[0].at[..., :1], (*given[0].at.shape[:-1], shapes[0][-1])), blur)]
    one_channel = step.kind in EACH_CHANNEL and not given[0].at.strides[-1]
    used = [Places(one.at[..., :1]) if one_channel else one for one in given]
    known = [one.known.astype(np.float32) for one in used]
    whole = [np.nan_to_num(one.at) for one in used]
    fillings = ([one * 0 for one in known], known, *([one[axis] for one in whole] for axis in (0, 1)))
    nothing, all_alike, *both = (_run(step, dict(zip(step.inputs, one, strict=True))) for one in fillings)
    found = []
    for none, share, rows, columns, shape in zip(nothing, all_alike, *both, shapes, strict=True):
        seen = np.where(np.abs(share - none) > FAINT, share - none, np.float32(np.nan))
        at = _packed(np.asarray(np.stack([rows - none, columns - none]) / seen, np.float32))
        found.append(Places(np.broadcast_to(at, (*at.shape[:-1], shape[-1])) if one_channel else at, blur))
    return found


def _joins_channels(step: Step, given: list[Places], shape: Shape) -> bool:
    """Whether a step puts channels together that all look alike: the common case, and large."""
    first = given[0].at
    return (
        step.kind == "Concatenate"
        and step.operation.axis in {-1, len(shape) - 1}
        and not any(one.at.strides[-1] for one in given)
        and all(np.array_equal(one.at[..., :1], first[..., :1], equal_nan=True) for one in given[1:])
    )


def _packed(at: Array) -> Array:
    """The same, kept once for all channels where they are alike."""
    first = at[..., :1]
    return (
        np.broadcast_to(first.copy(), at.shape) if np.array_equal(at, first + 0 * at, equal_nan=True) else at
    )


def _run(step: Step, inputs: Values) -> list[Array]:
    values = {slot: keras.ops.convert_to_tensor(one) for slot, one in inputs.items()}
    step(values)
    return [
        np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(values[slot], "float32")))
        for slot in step.writes
    ]


def _measured(step: Step, given: list[Places], values: Values) -> list[Places]:
    """Of any step: a change of its input in proportion to the places, as against one everywhere alike."""
    places = dict(zip(step.inputs, given, strict=True))
    before = _run(step, values)
    sums = [np.zeros((5, *one.shape), np.float64) for one in before]
    times = max(LEAST, math.ceil(SAMPLES / min(one.shape[-1] for one in before)))
    for changes in _changes(places, values, times):
        alike, *both = (
            [new - old for new, old in zip(_run(step, one), before, strict=True)] for one in changes
        )
        for total, whole, rows, columns in zip(sums, alike, *both, strict=True):
            total += [whole**2, whole * rows, whole * columns, rows**2, columns**2]
    blur = max(one.blur for one in given)
    return [_centred(total, blur) for total in sums]


def _changes(places: dict[int, Places], values: Values, times: int) -> Iterator[list[Values]]:
    """Inputs that are changed at random: everywhere alike, by the rows, by the columns."""
    random = np.random.default_rng(0)
    for _ in range(times):
        changed: list[Values] = [{}, {}, {}]
        for slot, value in values.items():
            dtype = keras.backend.standardize_dtype(value.dtype)
            old = np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(value, "float32")))
            size = np.float32(SMALL * (old.std() or 1)) if "float" in dtype else np.float32(GREYS)
            by = size * (2 * random.integers(0, 2, old.shape, np.int8) - 1)
            known = places[slot].known
            for one, share in zip(changed, (known, *np.nan_to_num(places[slot].at)), strict=True):
                new = old + by * share
                one[slot] = keras.ops.cast(new if "float" in dtype else np.clip(new.round(), 0, 255), dtype)
        yield changed


def _centred(total: NDArray[np.float64], blur: float) -> Places:
    shape = total.shape[1:]
    if len(shape) > 2:  # noqa: PLR2004  # all channels of a place tell about it
        total = total.sum(axis=-1, keepdims=True)
    strongest = total[0].max(initial=0)
    if not np.isfinite(total).all() or not strongest > 0:
        return _nowhere(shape)
    whole = np.where(total[0] > DIM * strongest, total[0], np.nan)
    at, squares = total[1:3] / whole, total[3:5] / whole
    around = float(np.sqrt(np.nanmean(np.maximum(squares - at**2, 0), axis=(*range(1, at.ndim),)).max()))
    if blur + around > EVERYWHERE:
        return _nowhere(shape)
    at = np.clip(at, 0, 1).astype(np.float32)  # samples are few: chance may lead beyond
    return Places(np.broadcast_to(at, (2, *shape)), blur + around)
