"""The layer to explain. Found by the graph, not by names.

It is the last one that still knows where things are: going back from the scores, the first feature map with
more than one position, pooling, dropout and padding stepped over. A vision transformer has tokens instead:
there it is the last tensor of tokens that still speaks for every patch, seen as a grid.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gradcam_worker.errors import NetworkIncompatible, UnknownLayer
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.axes import TOKENS_RANK, Side, Tokens, infer_axes, is_map, is_tokens
from gradcam_worker.gradcam.graph.graph import Graph, Step
from gradcam_worker.gradcam.graph.head import Scores, only_reshapes

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
    "Flip",
    "GetItem",
    "Split",
}
CROPS = {"CenterCrop", "RandomCrop", "Resizing"}  # layers that may show but a part of the image
PREPARES = {"Rescaling", "Normalization"}  # layers that do what `Preprocessing` does
ARITHMETIC = {"TrueDivide", "Divide", "Multiply", "Subtract", "Add"}  # ... and so do these, with a constant
MIXES = {"MatMul", "Matmul", "Einsum", "Dot", "BatchDot"}  # and whatever is called attention


@dataclass(frozen=True)
class TargetLayer:
    """A layer that can be explained."""

    path: str
    slot: int
    rows: int
    columns: int
    channels: int
    prefix: int | None = None  # None: a feature map; else tokens, of which so many come before the patches
    mirrored: tuple[int, ...] = ()  # axes that run against the image's: -3 the rows, -2 the columns

    @property
    def size(self) -> int:
        """How many numbers its activations of one image are."""
        return self.rows * self.columns * self.channels

    def as_grid(self, values: Any, ops: Any) -> Any:
        """Activations, or their gradients, as (..., rows, columns, channels), the way the image is."""
        if self.prefix is not None:
            patches = values[..., self.prefix : self.prefix + self.rows * self.columns, :]
            values = ops.reshape(patches, (*ops.shape(values)[:-2], self.rows, self.columns, self.channels))
        return ops.flip(values, axis=self.mirrored) if self.mirrored else values


class LayerIndex:
    """The layers between an image and its scores, and which of them can be explained."""

    def __init__(self, scores: Scores) -> None:
        self.scores, self.graph = scores, scores.graph
        self.steps = self.graph.needed([scores.slot])
        self._axes = infer_axes(self.graph)
        self._depth = self.graph.depths()
        used = {scores.slot}.union(*(step.inputs for step in self.steps))
        found = [self._place(step, slot) for step in self.steps for slot in step.writes if slot in used]
        self.by_slot = {place.slot: place for place in found if place}

    def _place(self, step: Step, slot: int) -> TargetLayer | None:
        shape, axes = self.graph.shapes[slot], self._axes[slot]
        path = step.path if slot == step.writes[0] else f"{step.path}:{step.writes.index(slot)}"
        if is_map(axes) and _positions(shape) > 1:
            rows, columns, channels = shape[1:]
            return TargetLayer(path, slot, rows, columns, channels, mirrored=_mirrored(axes[1:3]))
        grid = axes[1] if is_tokens(axes) else None
        if not isinstance(grid, Tokens) or _positions(shape) <= 1:
            return None
        return TargetLayer(path, slot, grid.rows, grid.columns, shape[2], grid.prefix, _mirrored(grid.sides))

    def looked_at(self, place: TargetLayer) -> tuple[TargetLayer, ...]:
        """A place, and before it the first on the way there that has learned something: it is finer."""
        learned = (
            step for step in self.graph.needed([place.slot]) if step.weights and step.kind not in PREPARES
        )
        step = next(learned, None)
        first = self.by_slot.get(step.writes[0]) if step else None
        return (place,) if first in {None, place} else (first, place)

    def find(self, layer: str, network: str, default: str | None = None) -> TargetLayer:
        """The layer of this path, or of this name where only one path ends in it.

        A model that is nested in the network stands for what it makes. Raises UnknownLayer.
        """
        slots = {step.path: step.writes[0] for step in self.graph.steps}
        slots |= {place.path: place.slot for place in self.by_slot.values()} | self.graph.models
        ends = [layer] if layer in slots else [path for path in slots if path.endswith(f"/{layer}")]
        if len(ends) == 1 and slots[ends[0]] in self.by_slot:
            return self.by_slot[slots[ends[0]]]
        there = [place.path for place in self.by_slot.values()]
        near = [repr(one) for one in difflib.get_close_matches(layer, there, n=2)]
        hint = f" Did you mean {' or '.join(near)}?" if near and not ends else ""
        default = f" The default is {default}." if default else ""
        why = self._why_not({path: slots[path] for path in ends})
        message = f"Layer {layer!r} of {network} {why}.{hint} {self.listed()}{default}"
        raise UnknownLayer(message)

    def _why_not(self, named: dict[str, int]) -> str:
        """Why the layers of this name, by their paths, are not one that can be explained."""
        if not named:
            return "does not exist"
        if len(named) > 1:
            return f"may be any of {', '.join(named)}"
        leads = self.graph.maker(*named.values()) in self.steps
        return "keeps no rows and columns" if leads else "does not lead to the scores"

    def listed(self) -> str:
        """How many layers can be explained, and the last of them."""
        paths = [place.path for place in self.by_slot.values()]
        if not paths:
            return "No layer of this network can be explained."
        return f"{len(paths)} layers can be explained; the last of them: {', '.join(paths[-LISTED:])}."

    def target(self, speak_for_all: Callable[[Sequence[TargetLayer]], list[bool]]) -> TargetLayer:
        """The layer to explain where none is named. See the module.

        `speak_for_all` says of places of tokens whether the scores depend on every patch: behind the last
        attention, a network that reads only its class token forgets the others. Raises NetworkIncompatible.
        """
        frontier = [(slot, self.by_slot.get(slot)) for slot in self._frontier()]
        frontier.sort(key=lambda one: (bool(one[1] and one[1].mirrored), -self._depth[one[0]]))
        for slot, place in frontier:
            if place is None or place.prefix is not None:
                return self._token_target(speak_for_all)
            if self._learned(slot) and not self._only_embeds(slot):
                return place
        message = (
            "No layer between the image and the scores keeps rows and columns and has learned something: "
            f"there is nothing that Grad-CAM could explain. {self.listed()}"
        )
        raise NetworkIncompatible(message)

    def _frontier(self) -> list[int]:
        """Going back from the scores: the first feature maps and tensors of tokens."""
        found, seen = [], set()
        waiting = [self.scores.slot]
        while waiting:
            slot = waiting.pop()
            step = self.graph.maker(slot)
            if step is None or slot in seen:
                continue
            seen.add(slot)
            place = self.by_slot.get(slot)
            is_feature_map = place and place.prefix is None and not _is_passed_over(step)
            if (
                is_feature_map
                or (place and place.prefix is not None and self._mixed(slot))
                or self._hides(step)
            ):
                found.append(slot)
            else:
                waiting += step.inputs
        return sorted(found)

    def _learned(self, slot: int) -> bool:
        """Whether anything up to here has weights: a picture that was only rescaled is still the picture."""
        return any(one.weights and one.kind not in PREPARES for one in self.graph.needed([slot]))

    def _mixed(self, slot: int) -> bool:
        """Whether tokens have been mixed up to here; else a sequence is a feature map written in one line."""
        return any(self._mixes(one) or self._hides(one) for one in self.graph.needed([slot]))

    def _mixes(self, step: Step) -> bool:
        """Whether a step lets places look at each other, as attention does; convolutions do not count."""
        if "Attention" in step.kind or (step.kind in MIXES and len(step.inputs) > 1):
            return True
        along = self._axes[step.inputs[0]][-1:]  # a dense layer along the tokens, as in an MLP-mixer
        return bool(step.weights) and bool(along) and isinstance(along[0], Tokens | Side)

    def _hides(self, step: Step) -> bool:
        """Whether a step is somebody's own layer that makes tokens of tokens, and cannot be looked into."""
        return step.is_foreign and all(
            any(self._is_sequence(slot) for slot in slots) for slots in (step.inputs, step.writes)
        )

    def _is_sequence(self, slot: int) -> bool:
        shape = self.graph.shapes[slot]
        return len(shape) == TOKENS_RANK and shape[1] != 1

    def _only_embeds(self, slot: int) -> bool:
        """Whether this is but a patch embedding, whose patches are mixed later, where it cannot be seen."""
        before = self.graph.needed([slot])
        if any(self._mixes(one) or self._hides(one) or _looks_around(one.operation) for one in before):
            return False
        behind = self.graph.behind(slot)
        return any(
            self._mixes(one)
            or isinstance(one.operation, keras.layers.RNN | keras.layers.Bidirectional)
            or (one.is_foreign and (one.weights or self._hides(one)))
            for one in self.steps
            if behind.intersection(one.inputs)
        )

    def _token_target(self, speak_for_all: Callable[[Sequence[TargetLayer]], list[bool]]) -> TargetLayer:
        """The last tensor of tokens, behind some attention, on all of whose patches the scores depend."""
        attended: set[int] = set()
        for step in self.steps:
            if self._mixes(step):
                attended.update(*(self.graph.behind(slot) for slot in step.writes))
        candidates = [
            self.by_slot[slot]
            for step in self.steps
            for slot in attended.intersection(self.by_slot).intersection(step.writes)
            if self.by_slot[slot].prefix is not None and not _is_passed_over(step)
        ]
        candidates.sort(key=lambda one: -self._depth[one.slot])
        for place, speaks in zip(candidates, speak_for_all(candidates) if candidates else (), strict=True):
            if speaks:
                return place
        message = (
            "The network looks at a sequence of tokens, and no layer behind an attention is seen as a grid "
            "of patches that all speak for the scores; its patch embedding would explain nothing. Name a "
            f"target layer. {self.listed()}"
        )
        raise NetworkIncompatible(message)


def _positions(shape: tuple[int, ...]) -> int:
    """How many places a tensor has; 0 where that depends on the image."""
    return math.prod(shape[1:-1])


def _mirrored(sides: Sequence[Any]) -> tuple[int, ...]:
    return tuple(at for at, side in zip((-3, -2), sides, strict=True) if side.mirrored)


def _is_passed_over(step: Step) -> bool:
    return step.kind in PASSED_OVER or (step.kind == "Activation" and only_reshapes(step))


def _looks_around(operation: Any) -> bool:
    """Whether a convolution or a pooling sees more than its own patch."""
    window = getattr(operation, "kernel_size", None) or getattr(operation, "pool_size", None)
    strides = getattr(operation, "strides", None)
    if not isinstance(window, tuple) or not isinstance(strides, tuple):
        return False
    return any(size > step for size, step in zip(window, strides, strict=True))


def _before_learning(graph: Graph) -> Iterator[Step]:
    """The steps that see the image itself, or what was made of it without any weights."""
    picture = {graph.entry}
    for step in graph.steps:
        if picture.intersection(step.inputs):
            yield step
            if not step.weights:
                picture.update(step.writes)


def rescales(graph: Graph) -> bool:
    """Whether the network begins with layers, or with arithmetic, that do what `Preprocessing` does."""
    return any(
        step.kind in PREPARES or (step.kind in ARITHMETIC and len(step.inputs) == 1)
        for step in _before_learning(graph)
    )


def crops(graph: Graph) -> str | None:
    """The path of a layer that shows a part of the image, or pads it: no map would lie where it belongs.

    What is known without a look; `alignment` finds it, be it done by whatever means.
    """
    for step in (one for one in graph.steps if one.kind in CROPS):
        before, after = (graph.shapes[slot][1:3] for slot in (step.inputs[0], step.writes[0]))
        whole = before == after
        if step.kind == "Resizing":
            keeps = any(getattr(step.operation, f"{one}_to_aspect_ratio", False) for one in ("crop", "pad"))
            whole = not keeps or before[0] * after[1] == before[1] * after[0]
        if not whole:
            return step.path
    return None
