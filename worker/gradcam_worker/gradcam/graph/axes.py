"""What the axes of every tensor of a network mean, inferred step by step from the image.

A feature map has four axes, but so have the attention scores of a transformer; a sequence of patches has
three, but so has the output of bilinear pooling. Only the steps that made them tell them apart.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.graph import Graph, Step

MAX_EXTRA_TOKENS = 8  # beside those of the patches: a class token, a few registers
MAP_RANK, TOKENS_RANK = 4, 3
IMAGES, CHANNELS, OTHER = "images", "channels", "other"


@dataclass(frozen=True)
class Side:
    """An axis of positions: rows or columns, in the image's order or, mirrored, against it."""

    name: str
    mirrored: bool = False


@dataclass(frozen=True)
class Tokens:
    """An axis of patches in reading order, after `prefix` other tokens."""

    rows: int
    columns: int
    sides: tuple[Side, Side]
    prefix: int = 0

    def fits(self, size: int) -> bool:
        """Whether an axis of this size has room for all patches, and for few other tokens."""
        return self.prefix >= 0 and 0 <= size - self.prefix - self.rows * self.columns <= MAX_EXTRA_TOKENS


ROWS, COLUMNS = Side("rows"), Side("columns")
Axis = str | Side | Tokens
Axes = tuple[Axis, ...]
Shape = tuple[int, ...]  # 0: any size
Operand = tuple[Shape, Axes]


def is_map(axes: Axes) -> bool:
    """Whether the axes are (images, rows, columns, channels)."""
    return [*map(_name, axes)] == [IMAGES, ROWS.name, COLUMNS.name, CHANNELS]


def is_tokens(axes: Axes) -> bool:
    """Whether the axes are (images, patches, channels)."""
    return len(axes) == TOKENS_RANK and isinstance(axes[1], Tokens) and axes[2] == CHANNELS


def _name(axis: Axis) -> str | None:
    return axis if isinstance(axis, str) else axis.name if isinstance(axis, Side) else None


def infer_axes(graph: Graph) -> dict[int, Axes]:
    """The meaning of each axis of every slot; `OTHER` where it is unknown."""
    axes_of: dict[int, Axes] = {one.slot: _unknown(graph.shapes[one.slot]) for one in graph.inputs.values()}
    axes_of[graph.input_slot] = (IMAGES, ROWS, COLUMNS, CHANNELS)
    for step in graph.steps:
        operands = _operands(step, graph, axes_of)
        for slot in step.writes:
            shape = graph.shapes[slot]
            axes = _RULES.get(step.kind, _same)(step, operands, shape)
            known = len(axes) == len(shape)
            axes_of[slot] = tuple(map(_if_it_fits, axes, shape)) if known else _unknown(shape)
    return axes_of


def _operands(step: Step, graph: Graph, axes_of: dict[int, Axes]) -> list[Operand]:
    """The tensors and arrays among a step's arguments, in order."""
    slots = dict(step.reads)
    operands = []
    for argument in keras.tree.flatten((step.arguments.args, step.arguments.kwargs)):
        if id(argument) in slots:
            slot = slots[id(argument)]
            operands.append((graph.shapes[slot], axes_of[slot]))
        elif hasattr(argument, "shape"):
            shape = tuple(argument.shape)
            operands.append((shape, _unknown(shape)))
    return operands


def _if_it_fits(axis: Axis, size: int) -> Axis:
    return OTHER if isinstance(axis, Tokens) and not axis.fits(size) else axis


def _unknown(shape: Shape) -> Axes:
    return (OTHER,) * len(shape)


def _same(step: Step, operands: list[Operand], shape: Shape) -> Axes:
    """The rule of most steps: the output has the input's axes, whatever their sizes."""
    same_rank = [
        (sizes, axes) for sizes, axes in operands if len(sizes) == len(shape) and axes != _unknown(sizes)
    ]
    if not same_rank:
        return _custom(operands[0], shape) if step.is_custom and operands else _unknown(shape)
    full_size = [
        axes for sizes, axes in same_rank if sizes[:-1] == shape[:-1]
    ]  # no broadcast operand (a gate)
    axes = full_size[0] if full_size else same_rank[0][1]
    if not step.is_custom:
        return axes
    return tuple(  # a custom layer may add a class token
        replace(axis, prefix=size - axis.rows * axis.columns) if isinstance(axis, Tokens) else axis
        for axis, size in zip(axes, shape, strict=True)
    )


def _custom(operand: Operand, shape: Shape) -> Axes:
    """A custom layer that makes patches from an image, or a feature map from patches, as its sizes show."""
    sizes, axes = operand
    if is_map(axes) and len(shape) == TOKENS_RANK:
        return IMAGES, _patches(sizes[1], sizes[2], shape[1], axes), CHANNELS
    grid = axes[1] if is_tokens(axes) else None
    if isinstance(grid, Tokens) and len(shape) == MAP_RANK and shape[1:3] == (grid.rows, grid.columns):
        return IMAGES, *grid.sides, CHANNELS
    return _unknown(shape)


def _patches(height: int, width: int, count: int, axes: Axes) -> Axis:
    """The grid of `count` square patches of a map, perhaps with a class token."""
    for prefix in (0, 1):
        side = math.isqrt(height * width // max(count - prefix, 1))
        if side and height % side == width % side == 0 and height * width == (count - prefix) * side**2:
            sides = tuple(axis for axis in axes if isinstance(axis, Side))
            return Tokens(height // side, width // side, (sides[0], sides[1]), prefix)
    return OTHER


def _permute(step: Step, operands: list[Operand], _: Shape) -> Axes:
    """Transpose, Permute, Swapaxes, Moveaxis."""
    operation, axes = step.operation, operands[0][1]
    order = list(range(len(axes)))
    if step.kind == "Permute":
        order = [0, *operation.dims]
    elif step.kind == "Transpose":
        order = list(operation.axes or reversed(order))
    elif step.kind == "Swapaxes":
        one, two = operation.axis1, operation.axis2
        order[one], order[two] = order[two], order[one]
    else:
        source = [axis % len(axes) for axis in _as_list(operation.source)]
        destination = [axis % len(axes) for axis in _as_list(operation.destination)]
        order = [axis for axis in order if axis not in source]
        for at, axis in sorted(zip(destination, source, strict=True)):
            order.insert(at, axis)
    return tuple(axes[axis] for axis in order)


def _as_list(axis: int | tuple[int, ...] | None) -> list[int]:
    return [axis] if isinstance(axis, int) else list(axis or ())


def _reshape(_: Step, operands: list[Operand], shape: Shape) -> Axes:
    """Reshape merges axes or splits one: in each group the product of the sizes stays the same."""
    sizes, axes = operands[0]
    out: list[Axis] = []
    first = 0  # of the axes of the input that belong to no group yet
    while first < len(sizes) and len(out) < len(shape):
        here, there = [first], [len(out)]
        while (one := math.prod(sizes[at] for at in here)) != (two := math.prod(shape[at] for at in there)):
            grows = here if one < two else there
            grows.append(grows[-1] + 1)
            if here[-1] >= len(sizes) or there[-1] >= len(shape):
                return _unknown(shape)
        out += _regroup([(axes[at], sizes[at]) for at in here], [shape[at] for at in there])
        first = here[-1] + 1
    left = len(shape) - len(out)  # all of size 1, or the products would differ
    return (*out, *(OTHER,) * left) if {*sizes[first:], *shape[len(out) :]} <= {1} else _unknown(shape)


def _regroup(before: list[tuple[Axis, int]], sizes: list[int]) -> list[Axis]:
    """The meaning of axes of these sizes, which replace the axes `before`."""
    named = [pair for pair in before if pair[1] != 1] or before[:1]
    large = [at for at, size in enumerate(sizes) if size != 1] or [0]
    out: list[Axis] = [OTHER] * len(sizes)
    match [axis for axis, _ in named]:
        case [axis] if len(large) == 1:
            out[large[0]] = axis
        case [Side("rows") as rows, Side("columns") as columns] if len(large) == 1:
            out[large[0]] = Tokens(named[0][1], named[1][1], (rows, columns))
        case [*others, last] if len(large) == 1 and {*others, last} <= {OTHER, CHANNELS}:
            out[large[0]] = last
        case [Tokens() as grid] if [sizes[at] for at in large] == [grid.rows, grid.columns]:
            out[large[0]], out[large[1]] = grid.sides
        case [Side() as side]:
            out[large[0]] = side  # positions of patches, then of the pixels in a patch
        case [axis] if axis == CHANNELS:
            out[large[-1]] = axis  # heads, or groups, and then the channels of each
    return out


def _reduce(step: Step, operands: list[Operand], shape: Shape) -> Axes:
    """Mean, Unstack and the like: axes are removed, unless `keepdims` is set."""
    axes = operands[0][1]
    if len(axes) == len(shape):
        return axes
    removed = {at % len(axes) for at in _as_list(step.operation.axis)}
    return tuple(axis for at, axis in enumerate(axes) if at not in removed)


def _get_item(step: Step, operands: list[Operand], _: Shape) -> Axes:
    """As in `x[:, 1:]`, `x[:, 0]`, `x[..., ::-1]`."""
    key = [*step.arguments.args, *step.arguments.kwargs.values()][-1]
    keys = list(key) if isinstance(key, tuple) else [key]
    axes, out = list(operands[0][1]), list[Axis]()
    if ellipses := [at for at, item in enumerate(keys) if item is Ellipsis]:
        indexed = sum(item is not None for item in keys) - 1
        keys[ellipses[0] : ellipses[0] + 1] = [slice(None)] * (len(axes) - indexed)
    for item in keys:
        axis = OTHER if item is None else axes.pop(0)
        if item is None or isinstance(item, slice):
            out.append(_slice(axis, item or slice(None)))
    return (*out, *axes)


def _slice(axis: Axis, part: slice) -> Axis:
    if isinstance(axis, Side) and (part.step or 1) < 0:
        return replace(axis, mirrored=not axis.mirrored)
    if not isinstance(axis, Tokens) or part == slice(None):
        return axis
    start = part.start or 0
    has_all_patches = part.step in {None, 1} and part.stop is None and 0 <= start <= axis.prefix
    return replace(axis, prefix=axis.prefix - start) if has_all_patches else OTHER


def _flip(step: Step, operands: list[Operand], _: Shape) -> Axes:
    axes = operands[0][1]
    flipped = {at % len(axes) for at in _as_list(step.operation.axis)} or {*range(len(axes))}
    reverse = slice(None, None, -1)
    return tuple(_slice(axis, reverse) if at in flipped else axis for at, axis in enumerate(axes))


def _concatenate(step: Step, operands: list[Operand], shape: Shape) -> Axes:
    """Other tokens may come before those of the patches."""
    at, before = step.operation.axis % len(shape), 0
    for sizes, axes in operands:
        if isinstance(tokens := axes[at], Tokens):
            return (*axes[:at], replace(tokens, prefix=tokens.prefix + before), *axes[at + 1 :])
        before += sizes[at]
    return _same(step, operands, shape)


def _pad(step: Step, operands: list[Operand], shape: Shape) -> Axes:
    """Rows and columns keep their meaning; of a padded sequence the patches' positions are unknown."""
    return tuple(OTHER if isinstance(axis, Tokens) else axis for axis in _same(step, operands, shape))


def _matmul(_: Step, operands: list[Operand], shape: Shape) -> Axes:
    """The last axis of the left operand and the last but one of the right are summed over."""
    left, right = (axes for _, axes in operands)
    if len(left) < 2 or len(right) < 2:  # noqa: PLR2004
        return _unknown(shape)
    batch = left[:-2] if len(left) >= len(right) else right[:-2]
    return *batch, left[-2], left[-1] if set(right) == {OTHER} else right[-1]


def _dot(step: Step, operands: list[Operand], shape: Shape) -> Axes:
    """The layer Dot sums over one axis of each operand; `ops.dot` multiplies by weights."""
    if not isinstance(step.operation, keras.layers.Dot):
        return _same(step, operands, shape)
    axes = step.operation.axes
    summed = [axes, axes] if isinstance(axes, int) else list(axes)
    (left, right) = (
        [axis for at, axis in enumerate(operand) if at != out % len(operand)]
        for out, (_, operand) in zip(summed, operands, strict=True)
    )
    return (*left, *right[1:])


def _einsum(step: Step, operands: list[Operand], shape: Shape) -> Axes:
    """Einsum and EinsumDense: the letters of the equation name the axes."""
    equation = step.operation.equation if step.kind == "EinsumDense" else step.operation.subscripts
    if "->" not in equation or "." in equation:
        return _same(step, operands, shape)
    inputs, output = equation.replace(" ", "").split("->")
    meaning: dict[str, Axis] = {}
    for letters, (_, axes) in zip(inputs.split(","), operands, strict=False):  # a kernel is no operand
        for letter, axis in zip(letters, axes, strict=False):
            meaning[letter] = axis if meaning.get(letter, OTHER) == OTHER else meaning[letter]
    summed = {axis for letter, axis in meaning.items() if letter not in output}
    new = CHANNELS if summed <= {CHANNELS, OTHER} else OTHER  # an axis of the kernel
    named = [meaning.get(letter, OTHER) for letter in output]
    return (*named[:-1], new if named[-1] == OTHER else named[-1])


_RULES: dict[str, Callable[[Step, list[Operand], Shape], Axes]] = {
    **dict.fromkeys(("Transpose", "Permute", "Swapaxes", "Moveaxis"), _permute),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "ExpandDims"), _reshape),
    **dict.fromkeys(("Mean", "Sum", "Max", "Min", "Unstack"), _reduce),
    **dict.fromkeys(("ZeroPadding1D", "Pad"), _pad),
    **dict.fromkeys(("Einsum", "EinsumDense"), _einsum),
    "GetItem": _get_item,
    "Flip": _flip,
    "Concatenate": _concatenate,
    "Matmul": _matmul,
    "Dot": _dot,
}
