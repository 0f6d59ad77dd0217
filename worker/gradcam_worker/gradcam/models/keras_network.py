"""A network that can be explained, made from a Keras classifier and its row of the catalog or registry."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import GradcamError, InvalidNetworkInput, NetworkIncompatible
from gradcam_worker.gradcam import backend, catalog
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import HeadKind, NetworkRow, Preprocessing
from gradcam_worker.gradcam.files import label_file
from gradcam_worker.gradcam.graph import shortcut
from gradcam_worker.gradcam.graph.graph import Step, Values, run
from gradcam_worker.gradcam.graph.head import ROUNDING, decide_kind, find_logits
from gradcam_worker.gradcam.graph.shortcut import BackwardShortcut, itself
from gradcam_worker.gradcam.graph.target_layer import LayerIndex, TargetLayer, has_preprocessing
from gradcam_worker.gradcam.graph.trace import trace_model
from gradcam_worker.gradcam.imaging.network_input import preprocess
from gradcam_worker.gradcam.methods import cam, gradients, integrated
from gradcam_worker.gradcam.methods.score_gradients import logit, score_gradient
from gradcam_worker.gradcam.models import further_inputs, load_checks
from gradcam_worker.gradcam.models.precision import policy_of
from gradcam_worker.gradcam.network import GRADCAM, Computed, InputPixels, Method, NetworkFacts
from gradcam_worker.gradcam.network_inputs import samples as sample_values

MAX_GRADIENTS = 2**27  # float32 numbers held at once: 512 MB
MAX_ACTIVATIONS = 2**29  # float32 numbers that a backward pass to the pixels keeps of the forward pass: 2 GB
MAX_TRACED = 8  # compiled functions kept: jobs that name many layers must not fill the memory
AUTO = "auto"  # the target layer that is found in the graph, whatever the row says
ops = keras.ops


class KerasNetwork:
    """A live Keras model and what is needed to explain it. Not thread-safe."""

    def __init__(
        self, row: NetworkRow, model: Any, *, weights_sha256: str | None, exact_backward: bool = False
    ) -> None:
        """Wrap a model, which is not changed.

        Args:
            row: What the catalog or the registry says about the network.
            model: The Keras model.
            weights_sha256: Of its weights file, if it has one.
            exact_backward: Run the whole backward pass even where a `BackwardShortcut` exists.

        Raises:
            NetworkIncompatible: The network cannot be explained.
            UnknownLayer: The row names a target layer that does not exist.
        """
        shape = (*row.input_size, row.preprocessing.input_channels)
        graph = trace_model(model, shape, renumber=row.builder is not None, image_input=row.image_input)
        load_checks.check_input(row, graph)
        load_checks.check_names(row.name, graph)
        self._further = further_inputs.assign(row, graph)
        self._sample_values = np.array([sample_values(row.inputs)], np.float32)  # (1, width)
        self._row, self._model, self._exact_backward = row, model, exact_backward
        self._input_dtype = graph.input_dtype
        self._pixels = (*row.input_size, row.preprocessing.pixel_channels)
        self._scores = find_logits(graph, row.head)
        self._layers = LayerIndex(self._scores)
        self._aligned: set[TargetLayer] = set()
        self._passes: OrderedDict[tuple[Any, ...], tuple[gradients.Pass, int]] = OrderedDict()
        self._shortcuts: dict[TargetLayer, BackwardShortcut | None] = {}
        self._forward: gradients.Forward | None = None  # of Grad-CAM at the default layer
        self._compiled_scores: dict[str, gradients.Compiled] = {}  # by the type of the pixels
        self._auto: TargetLayer | None = None  # the default target, once it has been looked for
        self._default: str | None = None
        layer = self._first_target(row.target_layer or AUTO)
        samples = load_checks.SampleImages(self._sample_inputs, self._pixels)
        self._observed = load_checks.observe(row, model, self._scores, samples)
        self._scores = decide_kind(self._scores, row.head, self._observed.outputs, self._observed.dtype)
        load_checks.check_alignment(row.name, self._layers, layer, self._observed)
        self._aligned.add(layer)
        self.labels = label_file.class_index(row, self._scores.units)
        self._default = layer.path
        self.facts = NetworkFacts(
            name=row.name,
            input_size=row.input_size,
            preprocessing=row.preprocessing.name,
            weights_sha256=weights_sha256,
            backend=backend.version(),
            dtype=backend.arithmetic(policy_of(graph.steps_to([layer.slot]), model)),
            default_layer=layer.path,
            map_size=(layer.rows, layer.columns),
            channels=row.preprocessing.pixel_channels,
            head=self._kind,
            rounding=ROUNDING[self._observed.dtype],
            parameters=model.count_params(),
            rescales=has_preprocessing(graph),
            sizing=row.sizing,
            inputs=row.inputs,
        )

    def compute(
        self,
        pixels: InputPixels,
        wanted: NDArray[np.int32],
        method: Method = GRADCAM,
        values: NDArray[np.float32] | None = None,
    ) -> Computed:
        """See `gradcam_worker.gradcam.network.NetworkWithInputs.compute`."""
        return self.begin(pixels, wanted, method, values)()

    def begin(
        self,
        pixels: InputPixels,
        wanted: NDArray[np.int32],
        method: Method = GRADCAM,
        values: NDArray[np.float32] | None = None,
    ) -> Callable[[], Computed]:
        """See `gradcam_worker.gradcam.network.NetworkWithInputs.begin`."""
        pixels = self._typed(pixels)
        if method.name == integrated.NAME:
            return self._begin_integration(pixels, wanted, method, values)
        layer = self._aligned_target(method.layer or self.facts.default_layer)
        further = self._checked(pixels, values)
        if self._observed.samples.batch_of_one and (len(pixels) > 1 or method.flip):
            return partial(self._compute_singly, pixels, wanted, method, values)
        run_pass, size = self._pass(layer, method)
        # The maps of an early layer are large: the number of classes at once is limited by their gradients.
        at_once = max(MAX_GRADIENTS // (len(pixels) * size * (1 + method.flip)), 1)
        against = self._against(method)
        launched = [
            run_pass(pixels, wanted[:, first : first + at_once], *against, *further)
            for first in range(0, wanted.shape[1], at_once)
        ]

        def wait() -> Computed:
            scores, class_ids, raw, *others = zip(*(result() for result in launched), strict=True)
            features = np.concatenate(others.pop(0), 1, dtype=np.float32) if method.features else None
            return Computed(
                layer.path,
                scores[0],
                np.concatenate(class_ids, 1),
                np.concatenate(raw, 1),
                np.asarray(others[0][0], np.float32) if others else None,
                features=features,
            )

        return wait

    def _typed(self, pixels: InputPixels) -> InputPixels:
        """Whole levels as fractions, where that is what the compiled functions take."""
        return np.asarray(pixels, np.float32) if self.facts.sizing.is_fractional else pixels

    def _checked(
        self, pixels: InputPixels, values: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], ...]:
        """The values of further inputs as arguments: none, or one array. Raises InvalidNetworkInput."""
        width = self._sample_values.shape[1]
        shape = None if values is None else values.shape
        if shape != ((len(pixels), width) if width else None):
            message = (
                f"{self._row.name} takes {width or 'no'} values beside each of {len(pixels)} images, not an "
                f"array of {shape}: see gradcam_worker.gradcam.network_inputs."
            )
            raise InvalidNetworkInput(message)
        return () if values is None else (np.asarray(values, np.float32),)

    def _begin_integration(
        self,
        pixels: InputPixels,
        wanted: NDArray[np.int32],
        method: Method,
        values: NDArray[np.float32] | None,
    ) -> Callable[[], Computed]:
        """Start a part of Integrated Gradients, in as many passes as its gradients need."""
        if "float" not in self._input_dtype:
            message = (
                f"{self.facts.name} takes its image as {self._input_dtype}, which has no gradient: "
                "integrated_gradients needs a network that takes float32."
            )
            raise NetworkIncompatible(message)
        further = self._checked(pixels, values)
        run_pass, size = self._path_pass(method)
        against, baselines = self._against(method), integrated.baseline(pixels, method.baseline)
        positions, shares = integrated.positions_and_shares(method)
        inputs_at_once = max(MAX_ACTIVATIONS // self._activations, 1)  # of all images and steps
        if self._observed.samples.batch_of_one:
            inputs_at_once = 1
        images_at_once = min(len(pixels), inputs_at_once)
        classes_at_once = max(MAX_GRADIENTS // (images_at_once * size), 1)
        gradients = images_at_once * min(classes_at_once, wanted.shape[1]) * size  # of one step
        steps_at_once = max(min(MAX_GRADIENTS // gradients, inputs_at_once // images_at_once), 1)
        launched = [
            [
                [
                    run_pass(
                        pixels[images],
                        wanted[images, classes],
                        baselines[images],
                        positions[steps],
                        shares[steps],
                        *against,
                        *(each[images] for each in further),
                    )
                    for steps in _slices(len(positions), steps_at_once)
                ]
                for classes in _slices(wanted.shape[1], classes_at_once)
            ]
            for images in _slices(len(pixels), images_at_once)
        ]

        def wait() -> Computed:
            of_images = []
            for of_classes in launched:
                found = [[wait_for() for wait_for in of_steps] for of_steps in of_classes]
                scores, _, _, *reported = found[0][0]
                class_ids = np.concatenate([of_steps[0][1] for of_steps in found], 1)
                raw = np.concatenate([sum(step[2] for step in of_steps) for of_steps in found], 1)
                of_images.append((scores, class_ids, raw, *reported))
            scores, class_ids, raw, *reported = map(np.concatenate, zip(*of_images, strict=True))
            outputs = np.asarray(reported[0], np.float32) if reported else None
            return Computed(integrated.LAYER, scores, class_ids, raw, outputs)

        return wait

    def _path_pass(self, method: Method) -> tuple[gradients.Pass, int]:
        """The compiled function of Integrated Gradients, and the numbers it holds for an image and class."""
        key = integrated.NAME, method.score, bool(method.against)
        if key not in self._passes:
            graph = self._scores.graph
            steps = graph.steps_to([self._scores.slot])
            parts = gradients.Parts(
                trunk=lambda pixels: (pixels, pixels, []),
                tail=lambda pixels, further: self._scores_of(pixels, *further),
                score_gradient=score_gradient(self._kind, method),
                grid=itself,
                as_formula_wants=itself,
                pixels=self._pixels,
                variables=self._variables(),
                outputs=self._to_probabilities if self._scores.activation else None,
                scaled=_computes_in_float16(steps),
                values=self._sample_values.shape[1],
                pixel_type=self.facts.pixel_type,
            )
            run_pass = gradients.path_pass(parts, contrastive=bool(method.against))
            # The backward pass holds the gradients of a tensor or two at a time: the largest counts.
            size = max(math.prod(graph.shapes[slot][1:]) for step in steps for slot in step.writes)
            self._keep_pass(key, (run_pass, max(size, math.prod(self._pixels))))
        self._passes.move_to_end(key)
        return self._passes[key]

    @cached_property
    def _activations(self) -> int:
        """The numbers that the network computes for one image, in all its steps."""
        graph = self._scores.graph
        steps = graph.steps_to([self._scores.slot])
        return sum(math.prod(graph.shapes[slot][1:]) for step in steps for slot in step.writes)

    def _keep_pass(self, key: tuple[Any, ...], traced: tuple[gradients.Pass, int]) -> None:
        """Keep a compiled function; the least recently used one is dropped."""
        self._passes[key] = traced
        if len(self._passes) > MAX_TRACED:
            self._passes.popitem(last=False)

    @contextmanager
    def shuffled(self, layer: str | None, *, head_only: bool, seed: int) -> Iterator[int]:
        """Shuffle the numbers in each kernel, and restore them afterwards: see `randomization`.

        Args:
            layer: The target layer; None: the default one.
            head_only: Shuffle only the kernels behind it.
            seed: Of the shuffling.

        Yields:
            The number of kernels.
        """
        graph, end = self._scores.graph, self._scores.slot
        target = self._target(layer or self.facts.default_layer)
        steps = graph.tail(target.slot, end)[0] if head_only else graph.steps_to([end])
        weights = {id(weight): weight for step in steps for weight in step.weights}.values()
        kernels = [weight for weight in weights if len(weight.shape) > 1]
        stored = [np.array(kernel.numpy()) for kernel in kernels]
        random = np.random.default_rng(seed)
        # Another engine has a copy of the weights, which would stay as they are.
        forward, passes, compiled_scores = self._forward, self._passes, self._compiled_scores
        if forward:
            self._forward, self._passes, self._compiled_scores = None, OrderedDict(), {}
        try:
            for kernel, values in zip(kernels, stored, strict=True):
                kernel.assign(random.permutation(values.ravel()).reshape(values.shape))
            yield len(kernels)
        finally:
            for kernel, values in zip(kernels, stored, strict=True):
                kernel.assign(values)
            if forward:
                self._forward, self._passes, self._compiled_scores = forward, passes, compiled_scores

    def _compute_singly(
        self,
        pixels: InputPixels,
        wanted: NDArray[np.int32],
        method: Method,
        values: NDArray[np.float32] | None,
    ) -> Computed:
        """`compute` for a network that takes one image at a time."""
        unflipped, results = replace(method, flip=False), []
        for index in range(len(pixels)):
            image = pixels[index : index + 1]
            its_values = None if values is None else values[index : index + 1]
            result = self.compute(image, wanted[index : index + 1], unflipped, its_values)
            if method.flip:
                mirrored = self.compute(image[:, :, ::-1], result.class_ids, unflipped, its_values)
                mean = (result.raw + mirrored.raw[..., ::-1]) / np.float32(2)
                result = replace(result, raw=np.asarray(mean, np.float32))
            results.append(result)
        outputs = [result.outputs for result in results if result.outputs is not None]
        features = [result.features for result in results if result.features is not None]
        return Computed(
            layer=results[0].layer,
            scores=np.concatenate([result.scores for result in results]),
            class_ids=np.concatenate([result.class_ids for result in results]),
            raw=np.concatenate([result.raw for result in results]),
            outputs=np.concatenate(outputs) if outputs else None,
            features=np.concatenate(features) if features else None,
        )

    def scores(self, pixels: InputPixels, values: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """See `gradcam_worker.gradcam.network.NetworkWithInputs.scores`."""
        pixel_type = pixels.dtype.name
        if pixel_type not in self._compiled_scores:
            self._compiled_scores[pixel_type] = self._compile_scores(pixel_type)
        compiled = self._compiled_scores[pixel_type]
        arrays: list[NDArray[Any]] = [pixels, *self._checked(pixels, values)]
        step = 1 if self._observed.samples.batch_of_one else max(len(pixels), 1)
        groups = [[array[first : first + step] for array in arrays] for first in range(0, len(pixels), step)]
        return np.concatenate([np.asarray(compiled(*group)(), np.float32) for group in groups])

    def _compile_scores(self, pixel_type: str) -> gradients.Compiled:
        forward, parts = self._forward, self.trunk_and_tail()
        if forward is None or parts is None or pixel_type != self.facts.pixel_type:
            width = self._sample_values.shape[1]
            images = (None, *self._pixels), pixel_type
            signature: list[tuple[tuple[int | None, ...], str]] = [images]
            signature += [((None, width), "float32")] if width else []
            return gradients.compiled(self._scores_of, signature, self._variables())

        def tail(values: Any, *skipped: Any) -> Any:
            return parts.tail(values, skipped)

        launch = gradients.compiled(tail, forward.outputs[1:], self._variables())
        return lambda pixels: launch(*forward(pixels)[1:])

    def _scores_of(self, pixels: Any, *values: Any) -> Any:
        steps = self._scores.graph.steps_to([self._scores.slot])
        return self._as_scores(run(steps, self._inputs(pixels, *values)))

    def trunk_and_tail(self) -> gradients.Parts | None:
        """The parts that Grad-CAM at the default layer needs, if its backward pass is a short one."""
        layer = self._target(self.facts.default_layer)
        way_back = None if self._observed.samples.batch_of_one else self._shortcut(layer, GRADCAM)
        return self._cut(layer, way_back, GRADCAM) if way_back else None

    def use_forward(self, forward: gradients.Forward, engine: str) -> None:
        """Let another engine compute the trunk of `trunk_and_tail`, for as long as this network lives.

        Args:
            forward: Computes it.
            engine: Its name and version, for the manifests.
        """
        self._forward, self._compiled_scores = forward, {}
        self._passes.clear()
        # The other engine has a copy of the weights.
        self.facts = replace(self.facts, backend=f"{self.facts.backend}, {engine}", weight_copies=2)

    def _pass(self, layer: TargetLayer, method: Method) -> tuple[gradients.Pass, int]:
        """The compiled function of a layer and method, and the numbers it holds for each image and class."""
        # One function for all classes `against`, which are an argument of it.
        key = layer, method.name, method.score, method.flip, bool(method.against), method.features
        if key not in self._passes:
            way_back = self._shortcut(layer, method)
            run_pass = gradients.one_pass(
                self._cut(layer, way_back, method),
                cam.METHODS[method.name],
                flip=method.flip,
                contrastive=bool(method.against),
                features=method.features,
                forward=self._forward if self._is_default_cut(layer, way_back, method) else None,
            )
            self._keep_pass(key, (run_pass, way_back.size if way_back else layer.size))
        self._passes.move_to_end(key)
        return self._passes[key]

    def _against(self, method: Method) -> list[NDArray[np.float32]]:
        """The further argument of a pass that explains classes against others."""
        if not method.against:
            return []
        return [gradients.contrast_weights(method.against, self._scores.classes)]

    def _is_default_cut(self, layer: TargetLayer, way_back: BackwardShortcut | None, method: Method) -> bool:
        """Whether the trunk is that of `trunk_and_tail`."""
        return (
            layer.path == self.facts.default_layer
            and way_back is not None
            and way_back is self._shortcuts.get(layer)
            and _prepares(method)
        )

    def _shortcut(self, layer: TargetLayer, method: Method) -> BackwardShortcut | None:
        """Where the backward pass of a method may stop; None: at the target layer."""
        graph, scores = self._scores.graph, self._scores.slot
        if not self._exact_backward and method.name in cam.USE_NO_GRADIENT:
            return shortcut.without_gradient(graph, scores, layer)
        if self._exact_backward or method.name not in cam.USE_MEAN_GRADIENT:
            return None
        if layer not in self._shortcuts:
            self._shortcuts[layer] = shortcut.find_shortcut(graph, scores, layer)
        return self._shortcuts[layer]

    def _cut(self, layer: TargetLayer, way_back: BackwardShortcut | None, method: Method) -> gradients.Parts:
        """The network as trunk and tail, cut where the backward pass stops."""
        graph, end = (way_back.graph, way_back.slot) if way_back else (self._scores.graph, layer.slot)
        tail, read = graph.tail(end, self._scores.slot)
        skips = sorted(read)
        trunk = graph.steps_to([layer.slot, end, *skips])

        def run_trunk(pixels: Any, *further: Any) -> tuple[Any, Any, list[Any]]:
            inputs = self._inputs(pixels, *further, prepare=_prepares(method))
            values = run(trunk, inputs, keep=(layer.slot, end, *skips))
            return values[layer.slot], values[end], [values[slot] for slot in skips]

        def run_tail(values: Any, skipped: Sequence[Any]) -> Any:
            return self._as_scores(run(tail, {**dict(zip(skips, skipped, strict=True)), end: values}))

        grid = partial(layer.as_grid, ops=ops)
        return gradients.Parts(
            trunk=run_trunk,
            tail=run_tail,
            score_gradient=score_gradient(self._kind, method),
            grid=grid,
            as_formula_wants=way_back.to_means if way_back else grid,
            pixels=self._pixels,
            variables=self._variables(),
            outputs=self._to_probabilities if self._scores.activation else None,
            scaled=_computes_in_float16([*trunk, *tail]),
            values=self._sample_values.shape[1],
            pixel_type=self.facts.pixel_type,
        )

    @property
    def _kind(self) -> HeadKind:
        return self._scores.kind or "softmax"

    def _to_probabilities(self, scores: Any) -> Any:
        """The network's own outputs for scores (n, classes), as probabilities (n, units)."""
        units, shape = self._scores.units, self._scores.graph.shapes[self._scores.slot][1:]
        outputs = self._scores.to_outputs(ops.reshape(scores[:, -units:], (-1, *shape)))
        outputs = ops.reshape(ops.cast(outputs, "float32"), (-1, units))
        return ops.exp(outputs) if (self._scores.activation or "").startswith("log_") else outputs

    def _inputs(self, pixels: Any, *values: Any, prepare: bool = True) -> Values:
        """All inputs of the model, by slot."""
        image = {self._scores.graph.input_slot: self._input(pixels, prepare=prepare)}
        return image | self._further.by_slot(*values) if values else image

    def _sample_inputs(self, pixels: Any) -> Values:
        """All inputs of the model for images that nobody gives further values for."""
        if not self._sample_values.size:
            return self._inputs(pixels)
        values = np.repeat(self._sample_values, len(pixels), axis=0)
        return self._inputs(pixels, ops.convert_to_tensor(values))

    def _input(self, pixels: Any, *, prepare: bool = True) -> Any:
        preprocessing = self._row.preprocessing
        if not prepare:
            preprocessing = Preprocessing("none", channels=_without_reordering(preprocessing))
        prepared = preprocess(ops.cast(pixels, "float32"), preprocessing, ops)
        dtype = self._input_dtype
        return ops.cast(prepared if "float" in dtype else ops.round(prepared), dtype)

    def _as_scores(self, values: Any) -> Any:
        """Scores (n, classes) float32; a single unit z becomes (-z, z), a single probability p (1 - p, p)."""
        raw = ops.cast(values[self._scores.slot], "float32")
        flat = ops.reshape(raw, (-1, self._scores.units))
        if self._scores.units > 1:
            return flat
        return ops.concatenate([1 - flat if self._kind == "probabilities" else -flat, flat], axis=1)

    def _variables(self) -> list[Any]:
        """All weights and other variables that the steps read, each once."""
        steps = self._scores.graph.steps
        return list({id(variable): variable for step in steps for variable in step.variables}.values())

    def _first_target(self, name: str) -> TargetLayer:
        """`_target` for a network that has not been run yet: its layers may raise anything."""
        try:
            return self._target(name)
        except GradcamError:
            raise
        except Exception as error:  # a custom layer's own code
            raise load_checks.cannot_run(self._row.name, error) from error

    def _aligned_target(self, name: str) -> TargetLayer:
        """`_target`, checked to be aligned with the image. Raises UnknownLayer, NetworkIncompatible."""
        layer = self._target(name)
        if layer not in self._aligned:
            load_checks.check_alignment(self._row.name, self._layers, layer, self._observed)
            self._aligned.add(layer)
        return layer

    def _target(self, name: str) -> TargetLayer:
        """The target layer with this name, or the default one. Raises UnknownLayer, NetworkIncompatible."""
        if name != AUTO:
            return self._layers.resolve(name, self._row.name, self._default)
        if self._auto is None:
            self._auto = self._layers.default_target(self._depend_on_all)
        return self._auto

    def _depend_on_all(self, layers: Sequence[TargetLayer]) -> list[bool]:
        """For each layer of tokens, whether the best score of a noise image depends on all its patches.

        One pass for all layers: the gradient at zeros that are added to their outputs.
        """
        graph, slot = self._scores.graph, self._scores.slot
        ends = np.cumsum([0, *(math.prod(graph.shapes[layer.slot][1:]) for layer in layers)])
        parts_of = {layer.slot: slice(*ends[at : at + 2]) for at, layer in enumerate(layers)}

        def zeros(pixels: Any) -> tuple[Any, Any, list[Any]]:
            return pixels, ops.zeros((1, int(ends[-1]))), [pixels]

        def tail(added: Any, skipped: Sequence[Any]) -> Any:
            (pixels,) = skipped
            further = (ops.convert_to_tensor(self._sample_values),) if self._sample_values.size else ()
            values = self._inputs(pixels, *further)
            for step in graph.steps_to([slot]):
                step(values)
                for written in parts_of.keys() & {*step.writes}:
                    part = ops.reshape(added[:, parts_of[written]], (1, *graph.shapes[written][1:]))
                    values[written] = values[written] + ops.cast(part, values[written].dtype)
            return self._as_scores(values)

        parts = gradients.Parts(zeros, tail, logit, itself, itself, self._pixels, self._variables())
        run_pass = gradients.one_pass(parts, lambda ops, _, gradient: ops.abs(gradient))
        *_, gradient = run_pass(self._noise(), np.array([[-1]], np.int32))()
        grids = [
            layer.as_grid(gradient[0, 0, parts_of[layer.slot]].reshape(graph.shapes[layer.slot][1:]), np)
            for layer in layers
        ]
        return [bool((grid.sum(-1) > 0).mean() > 0.5) for grid in grids]  # noqa: PLR2004  # gradients may underflow

    def _noise(self) -> InputPixels:
        return np.random.default_rng(0).integers(0, 256, (1, *self._pixels), np.uint8)


def _computes_in_float16(steps: Sequence[Step]) -> bool:
    return any(getattr(step.operation, "compute_dtype", None) == "float16" for step in steps)


def _slices(length: int, size: int) -> list[slice]:
    """0 to `length` in slices of `size`."""
    return [slice(first, first + size) for first in range(0, length, size)]


def _prepares(method: Method) -> bool:
    """Whether the pixels are preprocessed. The notebook forgets it."""
    return method.name != "notebook"


def _without_reordering(preprocessing: Preprocessing) -> catalog.Channels:
    return "rgb" if preprocessing.channels == "bgr" else preprocessing.channels
