from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_allclose, assert_array_equal

from worker.errors import DeviceOutOfMemory

pytestmark = pytest.mark.tensorflow

RNG = np.random.default_rng(2)
KERNEL, DENSE = RNG.normal(size=(3, 3, 3, 4)), RNG.normal(size=(4, 6))  # of the tail
PIXELS = RNG.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)


def tail(activations: Any) -> Any:
    """A 3 x 3 convolution, a bent curve, the sum over positions, a dense layer: numpy, float64."""
    windows = sliding_window_view(activations, (3, 3), axis=(1, 2))
    return np.tanh(np.einsum("nhwcij,ijck->nhwk", windows, KERNEL)).sum((1, 2)) @ DENSE


def forward(pixels: Any) -> tuple[Any, Any]:
    """The same tail in TensorFlow behind activations `pixels / 255`, float64."""
    import tensorflow as tf

    activations = tf.cast(pixels, tf.float64) / 255
    bent = tf.tanh(tf.nn.conv2d(activations, KERNEL, 1, "VALID"))
    return activations, tf.reduce_sum(bent, (1, 2)) @ DENSE


def test_gradients_agree_with_finite_differences_in_float64() -> None:
    from worker.gradcam.gradients import one_pass

    wanted = np.array([[3, 0, -1], [1, -2, -6]], np.int32)
    run = one_pass(forward, lambda _, gradients: gradients)
    scores, class_ids, gradients = run(PIXELS, wanted)
    activations = PIXELS / 255
    assert_allclose(scores, tail(activations), rtol=1e-12)
    assert gradients.shape == (3, 2, 5, 6, 3)
    step = 1e-5
    for place in np.ndindex(5, 6, 3):
        bump = np.zeros_like(activations)
        bump[(slice(None), *place)] = step
        slopes = (tail(activations + bump) - tail(activations - bump)) / (2 * step)
        expected = np.take_along_axis(slopes, class_ids, axis=1).T
        assert_allclose(gradients[(..., *place)], expected, atol=1e-8)


def test_ids_name_classes_and_negative_numbers_name_ranks() -> None:
    from worker.gradcam.gradients import one_pass

    wanted = np.array([[3, 0, -1], [1, -2, -6]], np.int32)
    scores, class_ids, _ = one_pass(forward, lambda _, gradients: gradients)(PIXELS, wanted)
    ranked = np.argsort(-scores, axis=1)
    assert_array_equal(class_ids, [[3, 0, ranked[0, 0]], [1, ranked[1, 1], ranked[1, 5]]])


def test_every_batch_size_and_every_wish_share_one_trace() -> None:
    from worker.gradcam.gradients import one_pass

    traces = []

    def counted(pixels: Any) -> tuple[Any, Any]:
        traces.append(pixels.shape)
        return forward(pixels)

    run = one_pass(counted, lambda _, gradients: gradients)
    for images, classes in [(1, 1), (2, 1), (1, 5), (7, 3)]:
        pixels = np.repeat(PIXELS[:1], images, axis=0)
        *_, gradients = run(pixels, np.full((images, classes), -1, np.int32))
        assert gradients.shape == (classes, images, 5, 6, 3)
    assert len(traces) == 1


def test_a_device_without_room_is_a_typed_error_with_the_size_of_the_call() -> None:
    import tensorflow as tf

    from worker.gradcam.gradients import one_pass

    def no_room() -> Any:
        raise MemoryError  # TensorFlow makes of it what it makes of a full device

    def too_large(pixels: Any) -> tuple[Any, Any]:
        activations, scores = forward(pixels)
        return activations, scores + tf.numpy_function(no_room, [], tf.float64)

    with pytest.raises(DeviceOutOfMemory, match=r"2 image\(s\) and 6 \(image, class\) pairs"):
        one_pass(too_large, lambda _, gradients: gradients)(PIXELS, np.full((2, 3), -1, np.int32))
