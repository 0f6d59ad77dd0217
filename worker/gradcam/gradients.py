"""The few lines per backend that Keras does not abstract. TensorFlow is the one there is so far."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from worker.errors import DeviceOutOfMemory

tf.get_logger().setLevel("ERROR")  # its advice on retracing is about one layer after the other

Pass = Callable[[NDArray[np.uint8], NDArray[np.int32]], tuple[Any, Any, Any]]


def one_pass(
    forward: Callable[[Any], tuple[Any, Any]],
    formula: Callable[[Any, Any], Any],
    target: Callable[[Any], Any] = tf.identity,
) -> Pass:
    """Build the whole computation as one traced function, the same for every batch size and wish.

    `forward` maps pixels (n, height, width, 3) float32 to (activations (n, rows, columns, channels),
    scores (n, classes)); `target` maps the scores to what is explained, of the same shape; `formula` maps
    activations and gradients (k, n, rows, columns, channels) to raw maps (n, k, rows, columns). The result
    maps pixels uint8 and wanted (n, k) to (scores, class ids (n, k), raw maps), on the host.

    One forward pass, recorded once; then one backward pass from the scores to the activations for
    all (image, class) pairs, vectorised over the k one-hot cotangents.
    """

    @tf.function(  # type: ignore[untyped-decorator]  # TensorFlow ships no types
        input_signature=[
            tf.TensorSpec((None, None, None, 3), tf.uint8),
            tf.TensorSpec((None, None), tf.int32),
        ],
        autograph=False,
    )
    def traced(pixels: Any, wanted: Any) -> tuple[Any, Any, Any]:
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            floats = tf.cast(pixels, tf.float32)
            tape.watch(floats)
            activations, scores = forward(floats)
            explained = target(scores)
        ranked = tf.math.top_k(scores, k=tf.maximum(-tf.reduce_min(wanted), 1)).indices
        named = tf.gather(ranked, tf.maximum(-wanted - 1, 0), batch_dims=1)
        class_ids = tf.where(wanted < 0, named, wanted)
        cotangents = tf.one_hot(tf.transpose(class_ids), tf.shape(scores)[1], dtype=scores.dtype)
        gradients = tf.vectorized_map(
            lambda cotangent: tape.gradient(explained, activations, output_gradients=cotangent),
            cotangents,
        )
        return scores, class_ids, formula(activations, gradients)

    def run(pixels: NDArray[np.uint8], wanted: NDArray[np.int32]) -> tuple[Any, Any, Any]:
        try:
            scores, class_ids, raw = traced(tf.constant(pixels), tf.constant(wanted))
        except tf.errors.ResourceExhaustedError as error:
            pairs = wanted.size
            message = f"No device memory for {len(pixels)} image(s) and {pairs} (image, class) pairs."
            raise DeviceOutOfMemory(message) from error
        return scores.numpy(), class_ids.numpy(), raw.numpy()

    return run
