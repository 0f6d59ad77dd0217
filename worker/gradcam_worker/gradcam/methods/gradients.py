"""One forward pass and one vectorised backward pass, and the few lines that differ between backends."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam import backend, device_memory
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.saturation import EXCLUDED
from gradcam_worker.gradcam.methods.cam import heat_features
from gradcam_worker.gradcam.network import InputPixels

ops = keras.ops
Pull = Callable[[Any], Any]  # cotangents (k, n, classes) -> gradients (k, n, ...)
Signature = Sequence[tuple[tuple[int | None, ...], str]]  # shapes and types of arrays
Formula = Callable[[Any, Any, Any], Any]  # ops, activations, gradients: see `cam`
Wait = Callable[[], Any]  # waits for the device, returns numpy arrays
Compiled = Callable[..., Wait]
Pass = Callable[..., Callable[[], tuple[Any, ...]]]  # see `one_pass`


class Forward(Protocol):
    """The trunk of a network, computed by another engine than the backend: see `Parts.trunk`."""

    @property
    def outputs(self) -> Signature:
        """Of the activations, of the values where the backward pass stops, and of each that it skips."""
        ...

    def __call__(self, pixels: InputPixels) -> Sequence[NDArray[Any]]:
        """Compute these for pixels (n, height, width, channels). Raises DeviceOutOfMemory."""
        ...


@dataclass(frozen=True)
class Parts:
    """A network cut in two, as functions of n images on the device.

    Attributes:
        trunk: Pixels (n, height, width, channels) float32, and (n, `values`) if there are further inputs ->
            activations of the target layer, values where the backward pass stops, and everything else that
            the tail reads, as a list.
        tail: The latter two -> scores (n, classes).
        score_gradient: Scores, and k classes of each image one-hot (k, n, classes) -> derivative of what is
            explained by each score, (k, n, classes).
        grid: Activations -> (n, rows, columns, channels).
        as_formula_wants: Gradients (k, n, ...) where the backward pass stops -> the formula's input: (k, n,
            rows, columns, channels), or their means where these are enough.
        pixels: (height, width, channels).
        variables: Read by trunk and tail.
        outputs: Scores (n, classes) -> the network's own outputs, where they are wanted.
        scaled: Whether the backward pass is scaled so that small gradients do not underflow, as in float16.
        values: The number of values of further inputs for each image; 0: there are none.
        pixel_type: Of the pixels: see `NetworkFacts.pixel_type`.
    """

    trunk: Callable[..., tuple[Any, Any, list[Any]]]
    tail: Callable[[Any, Any], Any]
    score_gradient: Callable[[Any, Any], Any]
    grid: Callable[[Any], Any]
    as_formula_wants: Callable[[Any], Any]
    pixels: tuple[int, int, int]
    variables: list[Any]
    outputs: Callable[[Any], Any] | None = None
    scaled: bool = False
    values: int = 0
    pixel_type: str = "uint8"


def one_pass(
    parts: Parts,
    formula: Formula,
    *,
    flip: bool = False,
    contrastive: bool = False,
    features: bool = False,
    forward: Forward | None = None,
) -> Pass:
    """The whole computation as one compiled function, for every batch size and number of classes.

    One forward pass, then one backward pass from the scores for all pairs of image and class, vectorised over
    the k cotangents. JAX compiles it again for each new batch size and number of classes.

    Args:
        parts: The network.
        formula: From activations and gradients to raw maps: see `cam.METHODS`.
        flip: Whether the mirror image of each image is computed too; the maps are the means of both.
        contrastive: Whether classes are explained against others.
        features: Whether `cam.heat_features` are computed, of the image itself where its mirror image is too.
        forward: Computes the trunk, in place of `parts.trunk`.

    Returns:
        A function of pixels (n, height, width, channels), wanted classes (n, k); if `contrastive`, also
        of `contrast_weights`; if there are further inputs, of their values (n, `parts.values`). It launches
        the computation, and returns a function that waits for (scores (n, classes), class ids (n, k), raw
        maps (n, k, rows, columns)), features (n, k, channels) where they are wanted, and the network's own
        outputs where `parts.outputs` is set. Both raise DeviceOutOfMemory.
    """

    def compute(pixels: Any, wanted: Any, *more: Any) -> tuple[Any, ...]:
        against, values = more[:contrastive], more[contrastive:]
        images = ops.cast(pixels, "float32")
        if flip:
            images = ops.concatenate([images, ops.flip(images, axis=2)])
            values = tuple(ops.concatenate([each, each]) for each in values)
        activations, end, skipped = parts.trunk(images, *values)
        return behind_trunk(wanted, *against, activations, end, *skipped)

    def behind_trunk(wanted: Any, *values: Any) -> tuple[Any, ...]:
        against, (activations, end, *skipped) = values[:contrastive], values[contrastive:]
        count = ops.shape(wanted)[0]
        scores, pull = linearize(lambda values: parts.tail(values, skipped), end)
        class_ids, classes = one_hot_classes(scores[:count], wanted, *against)
        if flip:
            classes = ops.concatenate([classes, classes], axis=1)
        gradients = _unscaled(parts, pull, parts.score_gradient(scores, classes))
        cells = ops.cast(parts.grid(activations), "float32")
        raw = formula(ops, cells, gradients)
        if flip:
            raw = (raw[:count] + ops.flip(raw[count:], axis=-1)) / 2
        looked_at = (heat_features(ops, cells[:count], raw),) if features else ()
        outputs = (parts.outputs(scores[:count]),) if parts.outputs else ()
        return scores[:count], class_ids, raw, *looked_at, *outputs

    classes_signature: Signature = [((None, None), "int32"), *[((None,), "float32")] * contrastive]
    if forward is None:
        further: Signature = [((None, parts.values), "float32")] if parts.values else []
        signature = [((None, *parts.pixels), parts.pixel_type), *classes_signature, *further]
        return compiled(compute, signature, parts.variables)
    launch = compiled(behind_trunk, [*classes_signature, *forward.outputs], parts.variables)

    def run(pixels: InputPixels, wanted: NDArray[np.int32], *against: NDArray[np.float32]) -> Wait:
        images = np.concatenate([pixels, pixels[:, :, ::-1]]) if flip else pixels
        return launch(wanted, *against, *forward(images))

    return run


def path_pass(parts: Parts, *, contrastive: bool = False) -> Pass:
    """A part of Integrated Gradients as one compiled function: see `integrated`.

    One forward and one backward pass from the scores to the pixels, for all triples of image, step and class.

    Args:
        parts: `tail` is the whole network, from pixels and the values of further inputs; `trunk`, `grid` and
            `as_formula_wants` are not used.
        contrastive: Whether classes are explained against others.

    Returns:
        A function of pixels (n, height, width, channels), wanted classes (n, k), baselines as pixels,
        positions and shares of the steps, both (m,) float32; if `contrastive`, also of `contrast_weights`; if
        there are further inputs, of their values (n, `parts.values`). It returns what that of `one_pass`
        returns; its maps (n, k, height, width) are the shares' part of the attributions.
    """

    def compute(
        pixels: Any, wanted: Any, baselines: Any, positions: Any, shares: Any, *more: Any
    ) -> tuple[Any, ...]:
        against, values = more[:contrastive], more[contrastive:]
        images, start = ops.cast(pixels, "float32"), ops.cast(baselines, "float32")
        scores = parts.tail(images, values)
        class_ids, classes = one_hot_classes(scores, wanted, *against)
        count, k = ops.shape(wanted)[0], ops.shape(wanted)[1]
        steps = ops.reshape(positions, (-1, 1, 1, 1, 1))
        line = ops.reshape(start + steps * (images - start), (-1, *parts.pixels))  # (m * n, ...)
        classes = classes[:, None] * ops.ones_like(positions)[None, :, None, None]  # (k, m, n, classes)
        classes = ops.reshape(classes, (k, -1, scores.shape[1]))
        ones = ops.ones_like(positions)[:, None, None]
        of_line = [ops.reshape(ones * each[None], (-1, parts.values)) for each in values]
        line_scores, pull = linearize(lambda at: parts.tail(at, of_line), line)
        gradients = _unscaled(parts, pull, parts.score_gradient(line_scores, classes))
        gradients = ops.reshape(gradients, (k, -1, count, *parts.pixels))
        slopes = ops.einsum("kmnhwc,m->knhwc", gradients, shares)
        raw = ops.einsum("knhwc,nhwc->nkhw", slopes, images - start)
        outputs = (parts.outputs(scores),) if parts.outputs else ()
        return scores, class_ids, raw, *outputs

    images = ((None, *parts.pixels), parts.pixel_type)
    signature: Signature = [
        images,
        ((None, None), "int32"),
        images,
        *[((None,), "float32")] * (3 if contrastive else 2),
        *[((None, parts.values), "float32")] * bool(parts.values),
    ]
    return compiled(compute, signature, parts.variables)


def _unscaled(parts: Parts, pull: Pull, cotangents: Any) -> Any:
    """Gradients as the formula wants them, of a backward pass that is scaled where it has to be."""
    scale = _largest(cotangents) if parts.scaled else 1.0
    gradients = ops.cast(parts.as_formula_wants(pull(cotangents / scale)), "float32")
    if parts.scaled:
        gradients = gradients * ops.reshape(scale, (*ops.shape(scale)[:2], 1, 1, 1))
    return gradients


def contrast_weights(against: Sequence[int], classes: int) -> NDArray[np.float32]:
    """What is subtracted from a one-hot class that is explained against others: their share each.

    Args:
        against: The ids of the others, without repetition; at least one.
        classes: The number of classes of the network.

    Returns:
        (classes,), with the sum 1.
    """
    weights = np.zeros(classes, np.float32)
    weights[[*against]] = 1 / len(against)
    return weights


def _largest(cotangents: Any) -> Any:
    """The largest absolute value for each class and image, (k, n, 1)."""
    largest = ops.max(ops.abs(cotangents), axis=-1, keepdims=True)
    return ops.where(largest > 0, largest, 1.0)


def linearize(function: Callable[[Any], Any], at: Any) -> tuple[Any, Pull]:
    """Evaluate a function and prepare its vector-Jacobian product.

    Args:
        function: From values of the shape of `at` to scores (n, classes).
        at: Where to evaluate it.

    Returns:
        The scores, and a function from cotangents (k, n, classes) to gradients (k, *shape of `at`).
    """
    return _LINEARIZE[backend.name()](function, at)


def one_hot_classes(scores: Any, wanted: Any, against: Any = None) -> tuple[Any, Any]:
    """Which classes are wanted, as ids and as weights of the scores.

    Args:
        scores: (n, classes).
        wanted: (n, k): see `Network.compute`.
        against: `contrast_weights`; None: there are none.

    Returns:
        Class ids (n, k); and one-hot (k, n, classes), less `against`.
    """
    ranked = scores if against is None else ops.where(against > 0, EXCLUDED, scores)
    class_ids = resolve_ranks(ranked, wanted)
    classes = ops.one_hot(ops.transpose(class_ids), scores.shape[1], dtype="float32")
    return class_ids, classes if against is None else classes - against


def resolve_ranks(scores: Any, wanted: Any) -> Any:
    """Replace -r by the id of the class ranked r-th: wanted (n, k) -> class ids (n, k)."""
    ranked = ops.cast(ops.argsort(-scores, axis=1), "int32")
    by_rank = ops.take_along_axis(ranked, ops.maximum(-wanted - 1, 0), axis=1)
    return ops.where(wanted < 0, by_rank, wanted)


def compiled(
    function: Callable[..., Any],
    signature: Signature,
    variables: Iterable[Any],
) -> Compiled:
    """Compile a function of arrays with these shapes and types.

    Calling it launches the computation on the device and returns a function that waits for the result, as
    numpy arrays. Both raise DeviceOutOfMemory.
    """
    run = _COMPILE[backend.name()](function, signature, list(variables))

    def launch(*arrays: Any) -> Wait:
        use = f"a pass over arrays of {' and '.join(str(array.shape) for array in arrays)}"
        with device_memory.explained(use):
            result = run(*arrays)

        def wait() -> Any:
            with device_memory.explained(use):
                return keras.tree.map_structure(ops.convert_to_numpy, result)

        return wait

    return launch


def traced_trunk(parts: Parts) -> Any:
    """The trunk as a concrete function of TensorFlow, from pixels (n, height, width, channels)."""
    import tensorflow as tf

    def trunk(pixels: Any) -> list[Any]:
        activations, end, skipped = parts.trunk(ops.cast(pixels, "float32"))
        return [activations, end, *skipped]

    signature = [tf.TensorSpec((None, *parts.pixels), parts.pixel_type)]
    return tf.function(trunk, input_signature=signature, autograph=False).get_concrete_function()


# Operations that may multiply activations with each other, as attention does, or hide others that do.
PRODUCTS = {
    "BatchMatMul",
    "BatchMatMulV2",
    "BatchMatMulV3",
    "Einsum",
    "PartitionedCall",
    "StatefulPartitionedCall",
}


def _tensorflow_linearize(function: Callable[[Any], Any], at: Any) -> tuple[Any, Pull]:
    import tensorflow as tf

    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(at)
        with _recorded_operations() as operations:
            scores = function(at)

    def pull_one(cotangent: Any) -> Any:
        return tape.gradient(scores, at, cotangent, unconnected_gradients="zero")

    if operations & PRODUCTS and backend.device_name() == "cpu":
        # oneDNN of TensorFlow 2.21 crashes at some vectorised products: (2, 1, 196, 196) by (1, 1, 196, 64).
        return scores, lambda cotangents: tf.map_fn(pull_one, cotangents, fn_output_signature=at.dtype)
    return scores, lambda cotangents: tf.vectorized_map(pull_one, cotangents)


@contextmanager
def _recorded_operations() -> Iterator[set[str]]:
    """Collect the kinds of the operations that a block adds to the graph that is traced, if one is."""
    import tensorflow as tf

    kinds: set[str] = set()
    if tf.executing_eagerly():
        yield kinds
        return
    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    yield kinds
    kinds |= {operation.type for operation in graph.get_operations()[before:]}


def _tensorflow_compile(function: Callable[..., Any], signature: Any, _: Any) -> Callable[..., Any]:
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # it warns of retracing, which a new target layer needs
    specs = [tf.TensorSpec(shape, dtype) for shape, dtype in signature]
    traced = tf.function(function, input_signature=specs, autograph=False, jit_compile=False)
    return lambda *arrays: traced(*map(tf.constant, arrays))


def _jax_linearize(function: Callable[[Any], Any], at: Any) -> tuple[Any, Pull]:
    import jax

    scores, vector_jacobian = jax.vjp(function, at)
    return scores, jax.vmap(lambda cotangent: vector_jacobian(cotangent)[0])


def _jax_compile(function: Callable[..., Any], _: Any, variables: list[Any]) -> Callable[..., Any]:
    return jax_compiled(function, variables)


def jax_compiled(function: Callable[..., Any], variables: list[Any]) -> Callable[..., Any]:
    """Compile a function with JAX, for the shapes that it is called with.

    Args:
        function: A function of trees of arrays.
        variables: Those of Keras that it reads, each once.

    Returns:
        The same function; its results are arrays of JAX.
    """
    import jax

    def pure(
        values: list[Any], *arrays: Any
    ) -> Any:  # weights are arguments, or the program would hold a copy
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*arrays)

    jitted = jax.jit(pure)

    def run(*arrays: Any) -> Any:
        return jitted([variable.value for variable in variables], *arrays)

    return run


def _torch_linearize(function: Callable[[Any], Any], at: Any) -> tuple[Any, Pull]:
    import torch

    with torch.enable_grad():
        at = at.detach().requires_grad_()
        scores = function(at)

    def pull(cotangents: Any) -> Any:
        return torch.autograd.grad(scores, at, cotangents, retain_graph=True, is_grads_batched=True)[0]

    return scores.detach(), pull


def _torch_compile(function: Callable[..., Any], _: Any, __: Any) -> Callable[..., Any]:
    import torch

    def run(*arrays: Any) -> Any:
        with torch.no_grad():
            return function(*map(ops.convert_to_tensor, arrays))

    return run


_LINEARIZE: dict[str, Callable[..., tuple[Any, Pull]]] = {
    "tensorflow": _tensorflow_linearize,
    "jax": _jax_linearize,
    "torch": _torch_linearize,
}
_COMPILE: dict[str, Callable[..., Callable[..., Any]]] = {
    "tensorflow": _tensorflow_compile,
    "jax": _jax_compile,
    "torch": _torch_compile,
}
