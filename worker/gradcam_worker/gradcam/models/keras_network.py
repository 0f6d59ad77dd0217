"""A Keras classifier and its row -> a network that can be explained."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import GradcamError, NetworkIncompatible
from gradcam_worker.gradcam import backend, catalog
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import HeadKind, NetworkRow, Preprocessing
from gradcam_worker.gradcam.classes import ClassIndex, imagenet
from gradcam_worker.gradcam.graph import shortcut
from gradcam_worker.gradcam.graph.graph import run
from gradcam_worker.gradcam.graph.head import ROUNDED, find_logits, read_as
from gradcam_worker.gradcam.graph.shortcut import BackwardShortcut, itself
from gradcam_worker.gradcam.graph.target_layer import LayerIndex, TargetLayer, rescales
from gradcam_worker.gradcam.graph.trace import trace_model
from gradcam_worker.gradcam.methods import cam, gradients
from gradcam_worker.gradcam.methods.score_gradients import logit, score_gradient
from gradcam_worker.gradcam.models import load_checks
from gradcam_worker.gradcam.models.precision import policy_of
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method, NetworkFacts

MAX_GRADIENTS = 2**27  # numbers held at once: 512 MB
MAX_TRACED = 8  # each is a graph of its own: a stream of layer names must not fill the memory
AUTO = "auto"  # the layer that is found in the graph, whatever the row says
ops = keras.ops


class KerasNetwork:
    """A live Keras model and what is needed to explain it. Not thread-safe."""

    def __init__(
        self, row: NetworkRow, model: Any, *, weights_sha256: str | None, exact_backward: bool = False
    ) -> None:
        """Take the model as it is: nothing in it is changed. Raises NetworkIncompatible, UnknownLayer.

        With `exact_backward` the way back is gone to its end where a shorter one would do.
        """
        shape = (*row.input_size, row.preprocessing.input_channels)
        graph = trace_model(model, shape, renumber=row.builder is not None)
        load_checks.check_input(row, graph)
        self._row, self._model, self._exact_backward = row, model, exact_backward
        self._entry_dtype = graph.entry_dtype
        self._pixels = (*row.input_size, row.preprocessing.pixel_channels)
        self._scores = find_logits(graph, row.head)
        self._places = LayerIndex(self._scores)
        self._aligned: set[TargetLayer] = set()
        self._passes: OrderedDict[tuple[TargetLayer, str, str, bool], tuple[gradients.Pass, int]] = (
            OrderedDict()
        )
        self._shortcuts: dict[TargetLayer, BackwardShortcut | None] = {}
        self._forward: gradients.Compiled | None = None
        self._found: TargetLayer | None = None
        self._default: str | None = None
        place = self._first_place(row.target_layer or AUTO)
        pictures = load_checks.Pictures(self._input, self._pixels)
        self._observed = load_checks.observe(row, model, self._scores, pictures)
        self._scores = read_as(self._scores, row.head, self._observed.outputs, self._observed.dtype)
        load_checks.check_place(row.name, self._places, place, self._observed)
        self._aligned.add(place)
        self.labels = _labels(row, self._scores.classes)
        self._default = place.path
        self.facts = NetworkFacts(
            name=row.name,
            input_size=row.input_size,
            preprocessing=row.preprocessing.name,
            weights_sha256=weights_sha256,
            backend=backend.version(),
            dtype=backend.arithmetic(policy_of(graph.needed([place.slot]), model)),
            default_layer=place.path,
            map_size=(place.rows, place.columns),
            channels=row.preprocessing.pixel_channels,
            head=self._kind,
            rounding=ROUNDED[self._observed.dtype],
            parameters=model.count_params(),
            rescales=rescales(graph),
        )

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        """See `gradcam_worker.gradcam.network.Network.compute`."""
        return self.begin(pixels, wanted, method)()

    def begin(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Callable[[], Computed]:
        """See `gradcam_worker.gradcam.network.Network.begin`."""
        place = self._aligned_place(method.layer or self.facts.default_layer)
        if self._observed.pictures.batch_of_one and (len(pixels) > 1 or method.flip):
            return partial(self._one_by_one, pixels, wanted, method)
        run_pass, size = self._pass(place, method)
        # An early layer has large maps: so many classes at a time that their gradients fit.
        at_once = max(MAX_GRADIENTS // (len(pixels) * size * (1 + method.flip)), 1)
        handed = [
            run_pass(pixels, wanted[:, first : first + at_once])
            for first in range(0, wanted.shape[1], at_once)
        ]

        def wait() -> Computed:
            scores, class_ids, raw, *told = zip(*(one() for one in handed), strict=True)
            outputs = np.asarray(told[0][0], np.float32) if told else None
            return Computed(
                place.path, scores[0], np.concatenate(class_ids, 1), np.concatenate(raw, 1), outputs
            )

        return wait

    def _one_by_one(self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method) -> Computed:
        """What `compute` does, of a network that takes one image at a time."""
        plain, found = replace(method, flip=False), []
        for index in range(len(pixels)):
            image = pixels[index : index + 1]
            one = self.compute(image, wanted[index : index + 1], plain)
            if method.flip:
                mirrored = self.compute(image[:, :, ::-1], one.class_ids, plain)
                mean = (one.raw + mirrored.raw[..., ::-1]) / np.float32(2)
                one = replace(one, raw=np.asarray(mean, np.float32))
            found.append(one)
        told = [one.outputs for one in found if one.outputs is not None]
        return Computed(
            layer=found[0].layer,
            scores=np.concatenate([one.scores for one in found]),
            class_ids=np.concatenate([one.class_ids for one in found]),
            raw=np.concatenate([one.raw for one in found]),
            outputs=np.concatenate(told) if told else None,
        )

    def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `gradcam_worker.gradcam.network.Network.scores`."""
        if self._forward is None:
            signature = [((None, *self._pixels), "uint8")]
            self._forward = gradients.compiled(self._scores_of, signature, self._variables())
        step = 1 if self._observed.pictures.batch_of_one else max(len(pixels), 1)
        groups = [pixels[first : first + step] for first in range(0, len(pixels), step)]
        return np.concatenate([np.asarray(self._forward(one)(), np.float32) for one in groups])

    def _scores_of(self, pixels: Any) -> Any:
        graph = self._scores.graph
        return self._scores_in(run(graph.needed([self._scores.slot]), {graph.entry: self._input(pixels)}))

    def _pass(self, place: TargetLayer, method: Method) -> tuple[gradients.Pass, int]:
        """The compiled function of one place and method; the numbers it holds for each image and class.

        The least recently used makes room.
        """
        key = (place, method.name, method.score, method.flip)
        if key not in self._passes:
            way = self._shortcut(place, method)
            run_pass = gradients.one_pass(
                self._cut(place, way, method), cam.METHODS[method.name], flip=method.flip
            )
            self._passes[key] = run_pass, way.size if way else place.size
            if len(self._passes) > MAX_TRACED:
                self._passes.popitem(last=False)
        self._passes.move_to_end(key)
        return self._passes[key]

    def _shortcut(self, place: TargetLayer, method: Method) -> BackwardShortcut | None:
        """How far back a method has to go from the scores; None: all the way to the place."""
        graph, scores = self._scores.graph, self._scores.slot
        if not self._exact_backward and method.name in cam.NOTHING_DOES:
            return shortcut.without_gradient(graph, scores, place)
        if self._exact_backward or method.name not in cam.MEANS_DO:
            return None
        if place not in self._shortcuts:
            self._shortcuts[place] = shortcut.find_shortcut(graph, scores, place)
        return self._shortcuts[place]

    def _cut(self, place: TargetLayer, way: BackwardShortcut | None, method: Method) -> gradients.Parts:
        """The network in two, where the way back ends. What else the tail needs is carried beside the cut."""
        graph, end = (way.graph, way.slot) if way else (self._scores.graph, place.slot)
        tail, beside = graph.tail(end, self._scores.slot)
        trunk = graph.needed([place.slot, end, *beside])
        prepare = method.name != "notebook"

        def up_to(pixels: Any) -> tuple[Any, Any, Any]:
            values = run(trunk, {graph.entry: self._input(pixels, prepare=prepare)})
            return values[place.slot], values[end], {slot: values[slot] for slot in beside}

        def from_there(values: Any, rest: Any) -> Any:
            return self._scores_in(run(tail, {**rest, end: values}))

        grid = partial(place.as_grid, ops=ops)
        return gradients.Parts(
            trunk=up_to,
            tail=from_there,
            slopes=score_gradient(self._kind, method),
            grid=grid,
            back=way.to_means if way else grid,
            pixels=self._pixels,
            variables=self._variables(),
            told=self._told if self._scores.activation else None,
            scaled=any(
                getattr(step.operation, "compute_dtype", None) == "float16" for step in (*trunk, *tail)
            ),
        )

    @property
    def _kind(self) -> HeadKind:
        return self._scores.kind or "softmax"

    def _told(self, scores: Any) -> Any:
        """What the network itself makes of scores (n, classes), as probabilities (n, units)."""
        units, shape = self._scores.units, self._scores.graph.shapes[self._scores.slot][1:]
        told = self._scores.told(ops.reshape(scores[:, -units:], (-1, *shape)))
        told = ops.reshape(ops.cast(told, "float32"), (-1, units))
        return ops.exp(told) if (self._scores.activation or "").startswith("log_") else told

    def _input(self, pixels: Any, *, prepare: bool = True) -> Any:
        how = self._row.preprocessing
        floats = ops.cast(pixels, "float32")
        prepared = preprocess(floats, how if prepare else Preprocessing("none", channels=_unordered(how)))
        dtype = self._entry_dtype
        return ops.cast(prepared if "float" in dtype else ops.round(prepared), dtype)

    def _scores_in(self, values: Any) -> Any:
        """Scores (n, classes) float32; one unit z speaks for class 1 and against class 0: (-z, z).

        One probability p is that of class 1: (1 - p, p).
        """
        raw = ops.cast(values[self._scores.slot], "float32")
        flat = ops.reshape(raw, (-1, self._scores.units))
        if self._scores.units > 1:
            return flat
        return ops.concatenate([1 - flat if self._kind == "probabilities" else -flat, flat], axis=1)

    def _variables(self) -> list[Any]:
        """All weights and other variables that the steps read, each once."""
        held = [step.variables for step in self._scores.graph.steps]
        return list({id(one): one for variables in held for one in variables}.values())

    def _first_place(self, layer: str) -> TargetLayer:
        """As `_place`, of a network that has not been run yet."""
        try:
            return self._place(layer)
        except GradcamError:
            raise
        except Exception as error:  # whatever a layer that was not written for it may raise
            raise load_checks.cannot_run(self._row.name, error) from error

    def _aligned_place(self, layer: str) -> TargetLayer:
        """As `_place`; its grid lies on the image. Raises UnknownLayer, NetworkIncompatible."""
        place = self._place(layer)
        if place not in self._aligned:
            load_checks.check_place(self._row.name, self._places, place, self._observed)
            self._aligned.add(place)
        return place

    def _place(self, layer: str) -> TargetLayer:
        """The place of a layer; `auto` is found. Raises UnknownLayer, NetworkIncompatible."""
        if layer != AUTO:
            return self._places.find(layer, self._row.name, self._default)
        if self._found is None:
            self._found = self._places.target(self._speak_for_all)
        return self._found

    def _speak_for_all(self, places: Sequence[TargetLayer]) -> list[bool]:
        """Whether a change of any patch of each place would change the best score of a picture of noise.

        All in one pass: the slopes at nudges of nothing that are added to what is there.
        """
        graph, slot = self._scores.graph, self._scores.slot
        ends = np.cumsum([0, *(math.prod(graph.shapes[place.slot][1:]) for place in places)])
        nudged = {place.slot: slice(*ends[at : at + 2]) for at, place in enumerate(places)}

        def nothing(pixels: Any) -> tuple[Any, Any, Any]:
            return pixels, ops.zeros((1, int(ends[-1]))), pixels

        def tail(nudges: Any, pixels: Any) -> Any:
            values = {graph.entry: self._input(pixels)}
            for step in graph.needed([slot]):
                step(values)
                for one in nudged.keys() & {*step.writes}:
                    nudge = ops.reshape(nudges[:, nudged[one]], (1, *graph.shapes[one][1:]))
                    values[one] = values[one] + ops.cast(nudge, values[one].dtype)
            return self._scores_in(values)

        parts = gradients.Parts(nothing, tail, logit, itself, itself, self._pixels, self._variables())
        run_pass = gradients.one_pass(parts, lambda ops, _, slopes: ops.abs(slopes))
        *_, slopes = run_pass(self._noise(), np.array([[-1]], np.int32))()
        grids = [
            place.as_grid(slopes[0, 0, nudged[place.slot]].reshape(graph.shapes[place.slot][1:]), np)
            for place in places
        ]
        return [bool((grid.sum(-1) > 0).mean() > 0.5) for grid in grids]  # noqa: PLR2004  # all, but for what underflows

    def _noise(self) -> NDArray[np.uint8]:
        return np.random.default_rng(0).integers(0, 256, (1, *self._pixels), np.uint8)


def _labels(row: NetworkRow, classes: int) -> ClassIndex:
    """The row's labels, as many as the network has classes. Raises NetworkIncompatible."""
    if row.labels == ():
        return ClassIndex.numbered(classes)
    labels = imagenet() if row.labels is None else ClassIndex.of(row.labels)
    if len(labels) != classes:
        message = f"{row.name} has {classes} classes, but {len(labels)} labels are given for them."
        raise NetworkIncompatible(message)
    return labels


def _unordered(how: Preprocessing) -> catalog.Channels:
    return "rgb" if how.channels == "bgr" else how.channels


def preprocess(pixels: Any, how: Preprocessing) -> Any:
    """Pixels (n, height, width, channels) float32 in 0..255 -> network input, on the device."""
    if how.channels == "bgr":
        pixels = ops.flip(pixels, axis=-1)
    elif how.channels == "grey":
        pixels = ops.sum(pixels * np.array([0.299, 0.587, 0.114], np.float32), axis=-1, keepdims=True)
    return (pixels - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
