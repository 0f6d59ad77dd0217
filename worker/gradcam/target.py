"""The layer to explain. Found by the graph, not by names.

It is the last one that still knows where things are: going back from the scores, the first tensor with more
than one position, pooling, dropout and padding stepped over. A vision transformer has tokens instead: there
it is the last tensor of tokens that still speaks for every patch, seen as a grid.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from worker.errors import NetworkIncompatible, UnknownLayer
from worker.gradcam.backend import keras
from worker.gradcam.graph import Graph, Step
from worker.gradcam.head import Scores, only_reshapes

IMAGE_RANK, TOKEN_RANK = 4, 3  # (images, rows, columns, channels), (images, tokens, channels)
MAX_PREFIX = 8  # tokens before those of the patches: a class token, a few registers
LISTED = 6  # layers named in a message
PASSED_OVER = {  # between the target layer and the scores: they move or drop positions, and learn nothing
    "MaxPooling2D",
    "AveragePooling2D",
    "AdaptiveAveragePooling2D",
    "AdaptiveMaxPooling2D",
    "MaxPool",
    "AveragePool",
    "Dropout",
    "SpatialDropout2D",
    "AlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "ZeroPadding2D",
    "Cropping2D",
    "Pad",
    "Identity",
    "Cast",
}
PREPARES = {"Rescaling", "Normalization"}  # layers that do what `Preprocessing` does
MIXES = {"MatMul", "Matmul", "Einsum", "Dot", "DotProductAttention"}  # and whatever is called attention


@dataclass(frozen=True)
class Place:
    """A layer that can be explained."""

    path: str
    slot: int
    rows: int
    columns: int
    channels: int
    prefix: int | None = None  # None: a feature map; else tokens, of which so many come before the patches

    @property
    def size(self) -> int:
        """How many numbers its activations of one image are."""
        return self.rows * self.columns * self.channels

    def as_grid(self, values: Any, ops: Any) -> Any:
        """Activations, or their gradients, as (..., rows, columns, channels)."""
        if self.prefix is None:
            return values
        patches = values[..., self.prefix :, :]
        return ops.reshape(patches, (*ops.shape(values)[:-2], self.rows, self.columns, self.channels))


def places(scores: Scores) -> list[Place]:
    """Every layer that can be explained, in the order of the graph."""
    found = [_place(scores.graph, step) for step in scores.graph.needed([scores.slot])]
    return [place for place in found if place is not None]


def _place(graph: Graph, step: Step) -> Place | None:
    if _is_map(step):
        return Place(step.path, step.writes[0], *step.shape[1:])
    grid = _token_grid(graph, step) if _is_tokens(step) else None
    if grid is None:
        return None
    _, tokens, channels = step.shape
    return Place(step.path, step.writes[0], *grid, channels, prefix=tokens - grid[0] * grid[1])


def _token_grid(graph: Graph, step: Step) -> tuple[int, int] | None:
    """(rows, columns) of a tensor of tokens: those of the last feature map before it with as many positions.

    Where the patches were cut without one, a square grid, with or without a class token.
    """
    tokens = step.shape[1]
    for before in reversed(graph.needed([step.writes[0]])):
        if _is_map(before) and 0 <= tokens - _positions(before) <= MAX_PREFIX:
            return before.shape[1], before.shape[2]
    for prefix in (0, 1):
        side = math.isqrt(tokens - prefix)
        if side > 1 and side * side == tokens - prefix:
            return side, side
    return None


def find_place(scores: Scores, layer: str, network: str, default: str | None = None) -> Place:
    """The layer of this path, or of this name where only one path ends in it. Raises UnknownLayer."""
    there = {place.path: place for place in places(scores)}
    step = scores.graph.named(layer)
    if step is None:
        ends = [path for path in there if path.endswith(f"/{layer}")]
        if len(ends) == 1:
            return there[ends[0]]
    if step is not None and step.path in there:
        return there[step.path]
    why = "does not exist"
    if step is not None:
        leads = step in scores.graph.needed([scores.slot])
        why = "keeps no rows and columns" if leads else "does not lead to the scores"
    near = [repr(one) for one in difflib.get_close_matches(layer, there, n=2)]
    hint = f" Did you mean {' or '.join(near)}?" if near and step is None else ""
    default = f" The default is {default}." if default else ""
    message = f"Layer {layer!r} of {network} {why}.{hint} {listed(there)}{default}"
    raise UnknownLayer(message)


def listed(paths: Iterable[str]) -> str:
    """How many layers can be explained, and the last of them."""
    paths = list(paths)
    if not paths:
        return "No layer of this network can be explained."
    last = ", ".join(paths[-LISTED:])
    return f"{len(paths)} layers can be explained; the last of them: {last}."


def find_target(scores: Scores, speaks_for_all: Callable[[Place], bool]) -> Place:
    """The layer to explain where none is named. See the module.

    `speaks_for_all` says whether the scores depend on every patch of a place of tokens: behind the last
    attention, a network that reads only its class token forgets the others. Raises NetworkIncompatible.
    """
    there = {place.slot: place for place in places(scores)}
    depth = scores.graph.depths()
    for step in sorted(_frontier(scores), key=lambda one: -depth[one.writes[0]]):
        if not _is_map(step):
            return _token_target(scores, there, speaks_for_all)
        if _learned(scores.graph, step) and not _only_embeds(scores, step):
            return there[step.writes[0]]
    message = (
        "No layer between the image and the scores keeps rows and columns and has learned something: "
        f"there is nothing that Grad-CAM could explain. {listed(one.path for one in there.values())}"
    )
    raise NetworkIncompatible(message)


def _frontier(scores: Scores) -> list[Step]:
    """Going back from the scores: the first feature maps and tensors of tokens, in the order of the graph."""
    graph = scores.graph
    found, seen = [], set()
    waiting = [graph.maker(scores.slot)]
    while waiting:
        step = waiting.pop()
        if step is None or step.path in seen:
            continue
        seen.add(step.path)
        is_map = _is_map(step) and not _is_passed_over(step)
        if is_map or (_is_tokens(step) and _mixed(graph, step)) or _hides(graph, step):
            found.append(step)
        else:
            waiting += [graph.maker(slot) for slot in step.inputs]
    return [step for step in graph.steps if step in found]


def _is_map(step: Step) -> bool:
    return len(step.shape) == IMAGE_RANK and _positions(step) > 1


def _is_tokens(step: Step) -> bool:
    return len(step.shape) == TOKEN_RANK and _positions(step) > 1


def _positions(step: Step) -> int:
    """How many places a tensor has; 0 where that depends on the image."""
    return math.prod(step.shape[1:-1])


def _is_passed_over(step: Step) -> bool:
    return type(step.operation).__name__ in PASSED_OVER or (
        type(step.operation).__name__ == "Activation" and only_reshapes(step)
    )


def _learned(graph: Graph, step: Step) -> bool:
    """Whether anything up to here has weights: a picture that was only rescaled is still the picture."""
    return any(
        getattr(one.operation, "weights", None) and type(one.operation).__name__ not in PREPARES
        for one in graph.needed([step.writes[0]])
    )


def _mixed(graph: Graph, step: Step) -> bool:
    """Whether tokens have been mixed up to here. Else a sequence is but a feature map written in one line."""
    return any(_mixes(one) or _hides(graph, one) for one in graph.needed([step.writes[0]]))


def _mixes(step: Step) -> bool:
    kind = type(step.operation).__name__
    return "Attention" in kind or (kind in MIXES and len(step.inputs) > 1)


def _hides(graph: Graph, step: Step) -> bool:
    """Whether a step does with tokens what cannot be seen: somebody's own layer, or a recurrent one."""
    operation = step.operation
    foreign = not type(operation).__module__.startswith("keras.") and getattr(operation, "weights", None)
    opaque = foreign or isinstance(operation, keras.layers.RNN | keras.layers.Bidirectional)
    return bool(opaque) and any(_is_tokens(one) for slot in step.inputs if (one := graph.maker(slot)))


def _only_embeds(scores: Scores, step: Step) -> bool:
    """Whether this is but a patch embedding, whose patches are mixed later, where it cannot be seen."""
    graph = scores.graph
    learned = [
        one.operation for one in graph.needed([step.writes[0]]) if hasattr(one.operation, "kernel_size")
    ]
    if len(learned) != 1 or learned[0].kernel_size != learned[0].strides or learned[0].kernel_size == (1, 1):
        return False
    behind = graph.behind(step.writes[0])
    later = [one for one in graph.needed([scores.slot]) if behind.intersection(one.inputs)]
    return any(
        _mixes(one) or (not type(one.operation).__module__.startswith("keras.") and one.operation.weights)
        for one in later
    )


def _token_target(scores: Scores, there: dict[int, Place], speaks_for_all: Callable[[Place], bool]) -> Place:
    """The last tensor of tokens, behind some attention, on all of whose patches the scores depend."""
    graph = scores.graph
    attended: set[int] = set()
    for step in graph.steps:
        if _mixes(step):
            attended |= graph.behind(step.writes[0])
    candidates = [
        there[step.writes[0]]
        for step in graph.needed([scores.slot])
        if step.writes[0] in there and step.writes[0] in attended and _is_tokens(step)
    ]
    depth = graph.depths()
    for place in sorted(candidates, key=lambda one: -depth[one.slot]):
        if speaks_for_all(place):
            return place
    message = (
        "The network looks at a sequence of tokens, and no layer behind an attention is seen as a grid of "
        "patches that all speak for the scores; its patch embedding would explain nothing. Name a target "
        f"layer. {listed(one.path for one in there.values())}"
    )
    raise NetworkIncompatible(message)


def rescales(graph: Graph) -> bool:
    """Whether the network begins with layers that do what `Preprocessing` does."""
    step = next((one for one in graph.steps if graph.entry in one.inputs), None)
    while step is not None and not hasattr(step.operation, "kernel"):
        if type(step.operation).__name__ in PREPARES:
            return True
        step = next((one for one in graph.steps if set(step.writes) & set(one.inputs)), None)
    return False
