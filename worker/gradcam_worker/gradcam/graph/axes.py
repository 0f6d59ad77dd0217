"""What the axes of every tensor of a network mean, followed from the image on, step by step.

A feature map has four axes, and so have the attention scores of a transformer's heads; a sequence of patches
has three, and so has the table of a bilinear pooling. Only their history tells them apart.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.graph import Graph, Step

MAX_EXTRA = 8  # tokens beside those of the patches: a class token, a few registers
MAP_RANK, TOKENS_RANK = 4, 3
IMAGES, CHANNELS, OTHER = "images", "channels", "other"


@dataclass(frozen=True)
class Side:
    """An axis of places, along the image's or, mirrored, against it."""

    name: str
    mirrored: bool = False


@dataclass(frozen=True)
class Tokens:
    """An axis of patches in reading order, behind so many other tokens."""

    rows: int
    columns: int
    sides: tuple[Side, Side]
    prefix: int = 0

    def fits(self, size: int) -> bool:
        """Whether an axis of this size can be such."""
        return self.prefix >= 0 and 0 <= size - self.prefix - self.rows * self.columns <= MAX_EXTRA


ROWS, COLUMNS = Side("rows"), Side("columns")
Axis = str | Side | Tokens
Axes = tuple[Axis, ...]
Shape = tuple[int, ...]  # 0: any
Known = tuple[Shape, Axes]  # of one tensor


def is_map(axes: Axes) -> bool:
    """Whether these are (images, rows, columns, channels)."""
    return [*map(_name, axes)] == [IMAGES, ROWS.name, COLUMNS.name, CHANNELS]


def is_tokens(axes: Axes) -> bool:
    """Whether these are (images, patches, channels)."""
    return len(axes) == TOKENS_RANK and isinstance(axes[1], Tokens) and axes[2] == CHANNELS


def _name(axis: Axis) -> str | None:
    return axis if isinstance(axis, str) else axis.name if isinstance(axis, Side) else None


def infer_axes(graph: Graph) -> dict[int, Axes]:
    """Slot -> what its axes are; `OTHER` where that cannot be told."""
    found: dict[int, Axes] = {graph.entry: (IMAGES, ROWS, COLUMNS, CHANNELS)}
    for step in graph.steps:
        given = _operands(step, graph, found)
        for slot in step.writes:
            shape = graph.shapes[slot]
            axes = _RULES.get(step.kind, _alike)(step, given, shape)
            found[slot] = tuple(map(_checked, axes, shape)) if len(axes) == len(shape) else _unknown(shape)
    return found


def _operands(step: Step, graph: Graph, found: dict[int, Axes]) -> list[Known]:
    """The tensors and arrays that a step is called with, in their order."""
    slots = dict(step.reads)
    given = []
    for one in keras.tree.flatten((step.arguments.args, step.arguments.kwargs)):
        if id(one) in slots:
            slot = slots[id(one)]
            given.append((graph.shapes[slot], found[slot]))
        elif hasattr(one, "shape"):
            shape = tuple(one.shape)
            given.append((shape, _unknown(shape)))
    return given


def _checked(axis: Axis, size: int) -> Axis:
    return OTHER if isinstance(axis, Tokens) and not axis.fits(size) else axis


def _unknown(shape: Shape) -> Axes:
    return (OTHER,) * len(shape)


def _alike(step: Step, given: list[Known], shape: Shape) -> Axes:
    """Of most steps: what comes out is like what went in, be it smaller or have it more channels."""
    same = [(sizes, axes) for sizes, axes in given if len(sizes) == len(shape) and axes != _unknown(sizes)]
    if not same:
        return _of_foreign(given[0], shape) if step.is_foreign and given else _unknown(shape)
    full = [axes for sizes, axes in same if sizes[:-1] == shape[:-1]]  # not what is spread over it, as a gate
    axes = full[0] if full else same[0][1]
    if not step.is_foreign:
        return axes
    return tuple(  # somebody's own layer that adds a class token
        replace(axis, prefix=size - axis.rows * axis.columns) if isinstance(axis, Tokens) else axis
        for axis, size in zip(axes, shape, strict=True)
    )


def _of_foreign(given: Known, shape: Shape) -> Axes:
    """Somebody's own layer that makes patches of an image, or a map of patches: told by its sizes."""
    sizes, axes = given
    if is_map(axes) and len(shape) == TOKENS_RANK:
        return IMAGES, _patches(sizes[1], sizes[2], shape[1], axes), CHANNELS
    grid = axes[1] if is_tokens(axes) else None
    if isinstance(grid, Tokens) and len(shape) == MAP_RANK and shape[1:3] == (grid.rows, grid.columns):
        return IMAGES, *grid.sides, CHANNELS
    return _unknown(shape)


def _patches(height: int, width: int, count: int, axes: Axes) -> Axis:
    """The grid of so many square patches of an image of this size, perhaps with a class token."""
    for prefix in (0, 1):
        side = math.isqrt(height * width // max(count - prefix, 1))
        if side and height % side == width % side == 0 and height * width == (count - prefix) * side**2:
            sides = tuple(axis for axis in axes if isinstance(axis, Side))
            return Tokens(height // side, width // side, (sides[0], sides[1]), prefix)
    return OTHER


def _permuted(step: Step, given: list[Known], _: Shape) -> Axes:
    """Transpose, Permute, Swapaxes, Moveaxis."""
    operation, axes = step.operation, given[0][1]
    order = list(range(len(axes)))
    if step.kind == "Permute":
        order = [0, *operation.dims]
    elif step.kind == "Transpose":
        order = list(operation.axes or reversed(order))
    elif step.kind == "Swapaxes":
        one, two = operation.axis1, operation.axis2
        order[one], order[two] = order[two], order[one]
    else:
        source = [axis % len(axes) for axis in _listed(operation.source)]
        destination = [axis % len(axes) for axis in _listed(operation.destination)]
        order = [axis for axis in order if axis not in source]
        for at, axis in sorted(zip(destination, source, strict=True)):
            order.insert(at, axis)
    return tuple(axes[axis] for axis in order)


def _listed(axis: int | tuple[int, ...] | None) -> list[int]:
    return [axis] if isinstance(axis, int) else list(axis or ())


def _reshaped(_: Step, given: list[Known], shape: Shape) -> Axes:
    """Axes become one, or one becomes several, where the sizes before them multiply to the same."""
    sizes, axes = given[0]
    out: list[Axis] = []
    first = 0  # of `sizes` that is not accounted for
    while first < len(sizes) and len(out) < len(shape):
        here, there = [first], [len(out)]
        while (one := math.prod(sizes[at] for at in here)) != (two := math.prod(shape[at] for at in there)):
            grows = here if one < two else there
            grows.append(grows[-1] + 1)
            if here[-1] >= len(sizes) or there[-1] >= len(shape):
                return _unknown(shape)
        out += _regrouped([(axes[at], sizes[at]) for at in here], [shape[at] for at in there])
        first = here[-1] + 1
    left = len(shape) - len(out)  # of size 1, as the sizes left of the other
    return (*out, *(OTHER,) * left) if {*sizes[first:], *shape[len(out) :]} <= {1} else _unknown(shape)


def _regrouped(before: list[tuple[Axis, int]], sizes: list[int]) -> list[Axis]:
    """What axes of these sizes are that hold what the axes `before` held."""
    named = [one for one in before if one[1] != 1] or before[:1]
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
            out[large[0]] = side  # of patches, and then the pixels in them
        case [axis] if axis == CHANNELS:
            out[large[-1]] = axis  # of one head, or of one of several kinds
    return out


def _reduced(step: Step, given: list[Known], shape: Shape) -> Axes:
    """Mean, Unstack and their like: axes go, unless they are kept."""
    axes = given[0][1]
    if len(axes) == len(shape):
        return axes
    gone = {at % len(axes) for at in _listed(step.operation.axis)}
    return tuple(axis for at, axis in enumerate(axes) if at not in gone)


def _sliced(step: Step, given: list[Known], _: Shape) -> Axes:
    """As in `x[:, 1:]`, `x[:, 0]`, `x[..., ::-1]`."""
    key = [*step.arguments.args, *step.arguments.kwargs.values()][-1]
    keys = list(key) if isinstance(key, tuple) else [key]
    axes, out = list(given[0][1]), list[Axis]()
    if dots := [at for at, one in enumerate(keys) if one is Ellipsis]:
        named = sum(one is not None for one in keys) - 1
        keys[dots[0] : dots[0] + 1] = [slice(None)] * (len(axes) - named)
    for one in keys:
        axis = OTHER if one is None else axes.pop(0)
        if one is None or isinstance(one, slice):
            out.append(_part(axis, one or slice(None)))
    return (*out, *axes)


def _part(axis: Axis, which: slice) -> Axis:
    if isinstance(axis, Side) and (which.step or 1) < 0:
        return replace(axis, mirrored=not axis.mirrored)
    if not isinstance(axis, Tokens) or which == slice(None):
        return axis
    start = which.start or 0
    whole = which.step in {None, 1} and which.stop is None and 0 <= start <= axis.prefix
    return replace(axis, prefix=axis.prefix - start) if whole else OTHER


def _flipped(step: Step, given: list[Known], _: Shape) -> Axes:
    axes = given[0][1]
    turned = {at % len(axes) for at in _listed(step.operation.axis)} or {*range(len(axes))}
    return tuple(_part(axis, slice(None, None, -1)) if at in turned else axis for at, axis in enumerate(axes))


def _joined(step: Step, given: list[Known], shape: Shape) -> Axes:
    """Concatenate: other tokens may come before those of the patches."""
    at, before = step.operation.axis % len(shape), 0
    for sizes, axes in given:
        if isinstance(tokens := axes[at], Tokens):
            return (*axes[:at], replace(tokens, prefix=tokens.prefix + before), *axes[at + 1 :])
        before += sizes[at]
    return _alike(step, given, shape)


def _padded(step: Step, given: list[Known], shape: Shape) -> Axes:
    """Padding: rows and columns stay such, but a sequence does not say where its padding is."""
    return tuple(OTHER if isinstance(axis, Tokens) else axis for axis in _alike(step, given, shape))


def _multiplied(_: Step, given: list[Known], shape: Shape) -> Axes:
    """Matmul: the last axis of one and the last but one of the other go."""
    left, right = (axes for _, axes in given)
    if len(left) < 2 or len(right) < 2:  # noqa: PLR2004
        return _unknown(shape)
    batch = left[:-2] if len(left) >= len(right) else right[:-2]
    return *batch, left[-2], left[-1] if set(right) == {OTHER} else right[-1]


def _dotted(step: Step, given: list[Known], shape: Shape) -> Axes:
    """The layer Dot: one axis of each goes; `ops.dot` is by weights."""
    if not isinstance(step.operation, keras.layers.Dot):
        return _alike(step, given, shape)
    axes = step.operation.axes
    gone = [axes, axes] if isinstance(axes, int) else list(axes)
    (left, right) = (
        [axis for at, axis in enumerate(one) if at != out % len(one)]
        for out, (_, one) in zip(gone, given, strict=True)
    )
    return (*left, *right[1:])


def _summed(step: Step, given: list[Known], shape: Shape) -> Axes:
    """Einsum and EinsumDense: by their letters."""
    how = step.operation.equation if step.kind == "EinsumDense" else step.operation.subscripts
    if "->" not in how or "." in how:
        return _alike(step, given, shape)
    inputs, output = how.replace(" ", "").split("->")
    meaning: dict[str, Axis] = {}
    for letters, (_, axes) in zip(inputs.split(","), given, strict=False):  # a layer's kernel is not given
        for letter, axis in zip(letters, axes, strict=False):
            meaning[letter] = axis if meaning.get(letter, OTHER) == OTHER else meaning[letter]
    gone = {axis for letter, axis in meaning.items() if letter not in output}
    new = CHANNELS if gone <= {CHANNELS, OTHER} else OTHER  # by weights
    named = [meaning.get(letter, OTHER) for letter in output]
    return (*named[:-1], new if named[-1] == OTHER else named[-1])


_RULES: dict[str, Callable[[Step, list[Known], Shape], Axes]] = {
    **dict.fromkeys(("Transpose", "Permute", "Swapaxes", "Moveaxis"), _permuted),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "ExpandDims"), _reshaped),
    **dict.fromkeys(("Mean", "Sum", "Max", "Min", "Unstack"), _reduced),
    **dict.fromkeys(("ZeroPadding1D", "Pad"), _padded),
    **dict.fromkeys(("Einsum", "EinsumDense"), _summed),
    "GetItem": _sliced,
    "Flip": _flipped,
    "Concatenate": _joined,
    "Matmul": _multiplied,
    "Dot": _dotted,
}
