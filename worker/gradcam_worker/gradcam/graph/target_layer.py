"""The target layer, found in the graph and not by names.

It is the last layer that has positions: going back from the scores, the first feature map with more than one
position, where pooling, dropout and padding are skipped. A vision transformer has tokens instead: there it is
the last tensor of tokens of which every patch has an effect on the scores, reshaped to a grid.
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
from gradcam_worker.gradcam.network import WAY_OUT

MAX_LISTED = 6  # layers named in a message
SKIPPED = {  # between the target layer and the scores: they move or drop positions, and have no weights
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
CROPPING = {"CenterCrop", "RandomCrop", "Resizing"}  # they may remove a part of the image
PREPROCESSING = {"Rescaling", "Normalization"}  # layers that do what `Preprocessing` does
ARITHMETIC = {"TrueDivide", "Divide", "Multiply", "Subtract", "Add"}  # preprocessing, with a constant
MIXING = {"MatMul", "Matmul", "Einsum", "Dot", "BatchDot"}  # beside everything called attention


@dataclass(frozen=True)
class TargetLayer:
    """A layer that can be explained: a feature map, or tokens that are a grid."""

    path: str
    slot: int
    rows: int
    columns: int
    channels: int
    prefix: int | None = None  # None: a feature map; else the number of tokens before the patches
    mirrored: tuple[int, ...] = ()  # axes that are reversed: -3 the rows, -2 the columns

    @property
    def size(self) -> int:
        """The number of activations of one image."""
        return self.rows * self.columns * self.channels

    def as_grid(self, values: Any, ops: Any) -> Any:
        """Activations or gradients as (..., rows, columns, channels), in the orientation of the image."""
        if self.prefix is not None:
            patches = values[..., self.prefix : self.prefix + self.rows * self.columns, :]
            values = ops.reshape(patches, (*ops.shape(values)[:-2], self.rows, self.columns, self.channels))
        return ops.flip(values, axis=self.mirrored) if self.mirrored else values


class LayerIndex:
    """The layers between an image and its scores, and which of them can be explained."""

    def __init__(self, scores: Scores) -> None:
        self.scores, self.graph = scores, scores.graph
        self.steps = self.graph.steps_to([scores.slot])
        self._axes = infer_axes(self.graph)
        self._depth = self.graph.depths()
        used = {scores.slot}.union(*(step.inputs for step in self.steps))
        layers = [self._as_layer(step, slot) for step in self.steps for slot in step.writes if slot in used]
        self.by_slot = {layer.slot: layer for layer in layers if layer}

    def _as_layer(self, step: Step, slot: int) -> TargetLayer | None:
        shape, axes = self.graph.shapes[slot], self._axes[slot]
        path = step.path if slot == step.writes[0] else f"{step.path}:{step.writes.index(slot)}"
        if is_map(axes) and _positions(shape) > 1:
            rows, columns, channels = shape[1:]
            return TargetLayer(path, slot, rows, columns, channels, mirrored=_mirrored(axes[1:3]))
        grid = axes[1] if is_tokens(axes) else None
        if not isinstance(grid, Tokens) or _positions(shape) <= 1:
            return None
        return TargetLayer(path, slot, grid.rows, grid.columns, shape[2], grid.prefix, _mirrored(grid.sides))

    def with_first_weighted(self, layer: TargetLayer) -> tuple[TargetLayer, ...]:
        """A layer, and before it the first layer with weights on the path to it, whose grid is finer."""
        weighted = (
            step
            for step in self.graph.steps_to([layer.slot])
            if step.weights and step.kind not in PREPROCESSING
        )
        step = next(weighted, None)
        first = self.by_slot.get(step.writes[0]) if step else None
        return (layer,) if first in {None, layer} else (first, layer)

    def resolve(self, name: str, network: str, default: str | None = None) -> TargetLayer:
        """The layer with this path, or with this name where only one path ends in it.

        Args:
            name: A path, the end of one, or the path of a nested model, which stands for its output.
            network: The network's name, for the error.
            default: The path of the default target layer, for the error.

        Returns:
            The layer.

        Raises:
            UnknownLayer: There is no such layer, more than one, or it has no rows and columns.
        """
        slots = {step.path: step.writes[0] for step in self.graph.steps}
        slots |= {layer.path: layer.slot for layer in self.by_slot.values()} | self.graph.models
        paths = [name] if name in slots else [path for path in slots if path.endswith(f"/{name}")]
        if len(paths) == 1 and slots[paths[0]] in self.by_slot:
            return self.by_slot[slots[paths[0]]]
        candidates = [layer.path for layer in self.by_slot.values()]
        similar = [repr(path) for path in difflib.get_close_matches(name, candidates, n=2)]
        hint = f" Did you mean {' or '.join(similar)}?" if similar and not paths else ""
        default = f" The default is {default}." if default else ""
        reason = self._why_not({path: slots[path] for path in paths})
        message = f"Layer {name!r} of {network} {reason}.{hint} {self.summary()}{default}"
        raise UnknownLayer(message)

    def _why_not(self, slots: dict[str, int]) -> str:
        """Why the layers of a name, by their paths, are not one layer that can be explained."""
        if not slots:
            return "does not exist"
        if len(slots) > 1:
            return f"may be any of {', '.join(slots)}"
        is_used = self.graph.producer(*slots.values()) in self.steps
        return "keeps no rows and columns" if is_used else "does not lead to the scores"

    def summary(self) -> str:
        """The number of layers that can be explained, and the last of them, as a sentence."""
        paths = [layer.path for layer in self.by_slot.values()]
        if not paths:
            return "No layer of this network can be explained."
        return f"{len(paths)} layers can be explained; the last of them: {', '.join(paths[-MAX_LISTED:])}."

    def default_target(self, depends_on_all: Callable[[Sequence[TargetLayer]], list[bool]]) -> TargetLayer:
        """The target layer where none is named: see the module.

        Args:
            depends_on_all: For layers of tokens, whether the scores depend on every patch of each. After its
                last attention, a network that reads only its class token ignores all other tokens.

        Returns:
            The layer.

        Raises:
            NetworkIncompatible: No layer can be explained, or it has to be named.
        """
        frontier = [(slot, self.by_slot.get(slot)) for slot in self._frontier()]
        frontier.sort(key=lambda pair: (bool(pair[1] and pair[1].mirrored), -self._depth[pair[0]]))
        for slot, layer in frontier:
            if layer is None or layer.prefix is not None:
                return self._token_target(depends_on_all)
            if self._has_weights(slot) and not self._only_embeds(slot):
                return layer
        message = (
            "No layer between the image and the scores keeps rows and columns and has weights: there is "
            f"nothing that Grad-CAM could explain. {self.summary()} {WAY_OUT}."
        )
        raise NetworkIncompatible(message)

    def _frontier(self) -> list[int]:
        """Going back from the scores: the first feature maps and tensors of tokens."""
        frontier, visited = [], set()
        waiting = [self.scores.slot]
        while waiting:
            slot = waiting.pop()
            step = self.graph.producer(slot)
            if step is None or slot in visited:
                continue
            visited.add(slot)
            layer = self.by_slot.get(slot)
            is_feature_map = layer and layer.prefix is None and not _is_skipped(step)
            if (
                is_feature_map
                or (layer and layer.prefix is not None and self._is_mixed(slot))
                or self._is_opaque(step)
            ):
                frontier.append(slot)
            else:
                waiting += step.inputs
        return sorted(frontier)

    def _has_weights(self, slot: int) -> bool:
        """Whether any step before a slot has weights, beside those of preprocessing."""
        return any(step.weights and step.kind not in PREPROCESSING for step in self.graph.steps_to([slot]))

    def _is_mixed(self, slot: int) -> bool:
        """Whether tokens have been mixed before a slot; else a sequence is a flattened feature map."""
        return any(self._mixes(step) or self._is_opaque(step) for step in self.graph.steps_to([slot]))

    def _mixes(self, step: Step) -> bool:
        """Whether a step mixes positions far apart, as attention does and convolutions do not."""
        if "Attention" in step.kind or (step.kind in MIXING and len(step.inputs) > 1):
            return True
        last_axis = self._axes[step.inputs[0]][-1:]  # a dense layer along the tokens, as in an MLP-mixer
        return bool(step.weights) and bool(last_axis) and isinstance(last_axis[0], Tokens | Side)

    def _is_opaque(self, step: Step) -> bool:
        """Whether a step is a custom layer from tokens to tokens: it may mix them."""
        return step.is_custom and all(
            any(self._is_sequence(slot) for slot in slots) for slots in (step.inputs, step.writes)
        )

    def _is_sequence(self, slot: int) -> bool:
        shape = self.graph.shapes[slot]
        return len(shape) == TOKENS_RANK and shape[1] != 1

    def _only_embeds(self, slot: int) -> bool:
        """Whether a slot is only a patch embedding, whose patches are mixed by a later step."""
        before = self.graph.steps_to([slot])
        if any(self._mixes(step) or self._is_opaque(step) or _overlaps(step.operation) for step in before):
            return False
        downstream = self.graph.downstream(slot)
        return any(
            self._mixes(step)
            or isinstance(step.operation, keras.layers.RNN | keras.layers.Bidirectional)
            or (step.is_custom and (step.weights or self._is_opaque(step)))
            for step in self.steps
            if downstream.intersection(step.inputs)
        )

    def _token_target(self, depends_on_all: Callable[[Sequence[TargetLayer]], list[bool]]) -> TargetLayer:
        """The last tensor of tokens, after an attention, such that the scores depend on all its patches."""
        attended: set[int] = set()
        for step in self.steps:
            if self._mixes(step):
                attended.update(*(self.graph.downstream(slot) for slot in step.writes))
        candidates = [
            self.by_slot[slot]
            for step in self.steps
            for slot in attended.intersection(self.by_slot).intersection(step.writes)
            if self.by_slot[slot].prefix is not None and not _is_skipped(step)
        ]
        candidates.sort(key=lambda layer: -self._depth[layer.slot])
        for layer, depends in zip(candidates, depends_on_all(candidates) if candidates else (), strict=True):
            if depends:
                return layer
        message = (
            "The network reads a sequence of tokens, and no layer after an attention is a grid of patches "
            "that all have an effect on the scores; its patch embedding would explain nothing. Name a "
            f"target layer. {self.summary()} {WAY_OUT}."
        )
        raise NetworkIncompatible(message)


def _positions(shape: tuple[int, ...]) -> int:
    """The number of positions of a tensor; 0 where it depends on the image."""
    return math.prod(shape[1:-1])


def _mirrored(sides: Sequence[Any]) -> tuple[int, ...]:
    return tuple(at for at, side in zip((-3, -2), sides, strict=True) if side.mirrored)


def _is_skipped(step: Step) -> bool:
    return step.kind in SKIPPED or (step.kind == "Activation" and only_reshapes(step))


def _overlaps(operation: Any) -> bool:
    """Whether the windows of a convolution or a pooling overlap."""
    window = getattr(operation, "kernel_size", None) or getattr(operation, "pool_size", None)
    strides = getattr(operation, "strides", None)
    if not isinstance(window, tuple) or not isinstance(strides, tuple):
        return False
    return any(size > step for size, step in zip(window, strides, strict=True))


def _steps_before_weights(graph: Graph) -> Iterator[Step]:
    """The steps that read the image, or a result of steps without weights."""
    unweighted = {graph.input_slot}
    for step in graph.steps:
        if unweighted.intersection(step.inputs):
            yield step
            if not step.weights:
                unweighted.update(step.writes)


def has_preprocessing(graph: Graph) -> bool:
    """Whether the network begins with layers, or with arithmetic, that do what `Preprocessing` does."""
    return any(
        step.kind in PREPROCESSING or (step.kind in ARITHMETIC and len(step.inputs) == 1)
        for step in _steps_before_weights(graph)
    )


def cropping_layer(graph: Graph) -> str | None:
    """The path of a layer that crops or pads the image, if any: heatmaps would be misplaced.

    This is a quick check by layer class; `alignment` finds every crop, whatever it is made of.
    """
    for step in (step for step in graph.steps if step.kind in CROPPING):
        before, after = (graph.shapes[slot][1:3] for slot in (step.inputs[0], step.writes[0]))
        is_whole = before == after
        if step.kind == "Resizing":
            modes = ("crop", "pad")
            keeps_ratio = any(getattr(step.operation, f"{mode}_to_aspect_ratio", False) for mode in modes)
            is_whole = not keeps_ratio or before[0] * after[1] == before[1] * after[0]
        if not is_whole:
            return step.path
    return None
