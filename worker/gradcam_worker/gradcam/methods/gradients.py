"""One forward pass, one vectorised gradient pass; and the lines per backend that Keras does not abstract."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import DeviceOutOfMemory
from gradcam_worker.gradcam import backend
from gradcam_worker.gradcam.backend import keras

ops = keras.ops
Pull = Callable[[Any], Any]  # cotangents (k, n, classes) -> gradients (k, n, ...)
Signature = Sequence[tuple[tuple[int | None, ...], str]]  # shapes and types of arrays
Formula = Callable[[Any, Any, Any], Any]  # ops, activations, gradients: see `cam`
Wait = Callable[[], Any]  # for what was handed to the device: numpy arrays
Compiled = Callable[..., Wait]
Pass = Callable[[NDArray[np.uint8], NDArray[np.int32]], Callable[[], tuple[Any, ...]]]


@dataclass(frozen=True)
class Parts:
    """A network in two, as functions of batches of n images on the device.

    `trunk` maps pixels (n, height, width, channels) float32 to the activations of the target layer, to the
    values at which the way back ends, and to whatever else the tail needs; `tail` maps the latter two to the
    scores (n, classes); `slopes` maps the scores, and k classes of each image one-hot (k, n, classes), to how
    fast what is explained rises with each score. `grid` shows activations as (n, rows, columns, channels);
    `back` makes of the gradients (k, n, ...) where the way back ends what the formula wants: (k, n, rows,
    columns, channels), or less where less will do.
    """

    trunk: Callable[[Any], tuple[Any, Any, Any]]
    tail: Callable[[Any, Any], Any]
    slopes: Callable[[Any, Any], Any]
    grid: Callable[[Any], Any]
    back: Callable[[Any], Any]
    pixels: tuple[int, int, int]  # (height, width, channels)
    variables: list[Any]  # that trunk and tail read
    told: Callable[[Any], Any] | None = None  # scores (n, classes) -> what the network makes of them
    scaled: bool = False  # whether small slopes would vanish on the way back, as in float16


def one_pass(parts: Parts, formula: Formula, *, flip: bool = False) -> Pass:
    """The whole computation as one compiled function, the same for every batch size and wish.

    JAX alone compiles it anew for each size and number of classes that it has not seen.

    It maps pixels uint8 and wanted (n, k) to (scores (n, classes), class ids (n, k), raw maps (n, k, rows,
    columns)), and to what the network itself says where that is `told`, once these are waited for: one
    forward pass; then one backward pass from the scores as far as
    is needed, for all (image, class) pairs, vectorised over the k cotangents. With `flip` each image's mirror
    image goes through in the same batch, and the maps are the means of both. It raises DeviceOutOfMemory.
    """

    def whole(pixels: Any, wanted: Any) -> tuple[Any, ...]:
        images, count = ops.cast(pixels, "float32"), ops.shape(pixels)[0]
        if flip:
            images = ops.concatenate([images, ops.flip(images, axis=2)])
        activations, end, rest = parts.trunk(images)

        scores, pull = linearized(lambda values: parts.tail(values, rest), end)
        class_ids = named(scores[:count], wanted)
        twice = ops.concatenate([class_ids, class_ids]) if flip else class_ids
        classes = ops.one_hot(ops.transpose(twice), scores.shape[1], dtype="float32")
        slopes = parts.slopes(scores, classes)
        scale = _scale(slopes) if parts.scaled else 1.0
        gradients = ops.cast(parts.back(pull(slopes / scale)), "float32")
        if parts.scaled:
            gradients = gradients * ops.reshape(scale, (*ops.shape(scale)[:2], 1, 1, 1))
        raw = formula(ops, ops.cast(parts.grid(activations), "float32"), gradients)
        if flip:
            raw = (raw[:count] + ops.flip(raw[count:], axis=-1)) / 2
        told = (parts.told(scores[:count]),) if parts.told else ()
        return scores[:count], class_ids, raw, *told

    signature = [((None, *parts.pixels), "uint8"), ((None, None), "int32")]
    return compiled(whole, signature, parts.variables)


def _scale(slopes: Any) -> Any:
    """The largest slope of each class and image, (k, n, 1)."""
    largest = ops.max(ops.abs(slopes), axis=-1, keepdims=True)
    return ops.where(largest > 0, largest, 1.0)


def linearized(function: Callable[[Any], Any], at: Any) -> tuple[Any, Pull]:
    """A function `at` -> scores (n, classes) -> (scores there, how to pull cotangents back).

    Pulled back, cotangents (k, n, classes) of the scores are gradients (k, *the shape of `at`).
    """
    return _LINEARIZED[backend.name()](function, at)


def named(scores: Any, wanted: Any) -> Any:
    """Wanted (n, k), where -r stands for the class ranked r-th -> class ids (n, k)."""
    ranked = ops.cast(ops.argsort(-scores, axis=1), "int32")
    by_rank = ops.take_along_axis(ranked, ops.maximum(-wanted - 1, 0), axis=1)
    return ops.where(wanted < 0, by_rank, wanted)


def compiled(
    function: Callable[..., Any],
    signature: Signature,
    variables: Iterable[Any],
) -> Compiled:
    """A function of arrays of these shapes and types, compiled.

    To call it is to hand its work to the device; what it returns then waits for the answer, as numpy arrays.
    Both raise DeviceOutOfMemory.
    """
    run, out_of_memory = _COMPILED[backend.name()](function, signature, list(variables))

    def hand_over(*arrays: Any) -> Wait:
        shapes = " and ".join(str(array.shape) for array in arrays)
        with _room_for(shapes, out_of_memory):
            answer = run(*arrays)

        def wait() -> Any:
            with _room_for(shapes, out_of_memory):
                return keras.tree.map_structure(ops.convert_to_numpy, answer)

        return wait

    return hand_over


@contextmanager
def _room_for(shapes: str, out_of_memory: type[Exception]) -> Iterator[None]:
    """Raise DeviceOutOfMemory where the device, whose own error is given, has no room."""
    try:
        yield
    except out_of_memory as error:
        if isinstance(error, RuntimeError) and not _says_out_of_memory(error):
            raise
        message = f"No device memory for a pass over arrays of {shapes}."
        raise DeviceOutOfMemory(message) from error


def _says_out_of_memory(error: BaseException) -> bool:
    text = str(error).casefold()
    return "resource_exhausted" in text or "out of memory" in text


def _tensorflow_linearized(function: Callable[[Any], Any], at: Any) -> tuple[Any, Pull]:
    import tensorflow as tf

    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(at)
        scores = function(at)

    def one(cotangent: Any) -> Any:
        return tape.gradient(scores, at, cotangent, unconnected_gradients="zero")

    return scores, lambda cotangents: tf.vectorized_map(one, cotangents)


def _tensorflow_compiled(
    function: Callable[..., Any], signature: Any, _: Any
) -> tuple[Callable[..., Any], Any]:
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # its advice on retracing is about one layer after the other
    specs = [tf.TensorSpec(shape, dtype) for shape, dtype in signature]
    traced = tf.function(function, input_signature=specs, autograph=False, jit_compile=False)
    return lambda *arrays: traced(*map(tf.constant, arrays)), tf.errors.ResourceExhaustedError


def _jax_linearized(function: Callable[[Any], Any], at: Any) -> tuple[Any, Pull]:
    import jax

    scores, vector_jacobian = jax.vjp(function, at)
    return scores, jax.vmap(lambda one: vector_jacobian(one)[0])


def _jax_compiled(
    function: Callable[..., Any], _: Any, variables: list[Any]
) -> tuple[Callable[..., Any], Any]:
    import jax

    def pure(values: list[Any], *arrays: Any) -> Any:  # weights as arguments: not copied into the program
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*arrays)

    jitted = jax.jit(pure)
    return lambda *arrays: jitted([one.value for one in variables], *arrays), jax.errors.JaxRuntimeError


def _torch_linearized(function: Callable[[Any], Any], at: Any) -> tuple[Any, Pull]:
    import torch

    with torch.enable_grad():
        at = at.detach().requires_grad_()
        scores = function(at)

    def pull(cotangents: Any) -> Any:
        return torch.autograd.grad(scores, at, cotangents, retain_graph=True, is_grads_batched=True)[0]

    return scores.detach(), pull


def _torch_compiled(function: Callable[..., Any], _: Any, __: Any) -> tuple[Callable[..., Any], Any]:
    import torch

    def run(*arrays: Any) -> Any:
        with torch.no_grad():
            return function(*map(ops.convert_to_tensor, arrays))

    return run, torch.OutOfMemoryError


_LINEARIZED: dict[str, Callable[..., tuple[Any, Pull]]] = {
    "tensorflow": _tensorflow_linearized,
    "jax": _jax_linearized,
    "torch": _torch_linearized,
}
_COMPILED: dict[str, Callable[..., tuple[Callable[..., Any], Any]]] = {
    "tensorflow": _tensorflow_compiled,
    "jax": _jax_compiled,
    "torch": _torch_compiled,
}
