from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_allclose, assert_array_equal

from gradcam_worker.errors import DeviceOutOfMemory
from tests.gradcam.small_networks import Wrap

if TYPE_CHECKING:
    from gradcam_worker.gradcam.methods.gradients import Parts

pytestmark = pytest.mark.tensorflow

RNG = np.random.default_rng(2)
KERNEL, DENSE = RNG.normal(size=(3, 3, 3, 4)), RNG.normal(size=(4, 6))  # of the tail
PIXELS = RNG.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
WANTED = np.array([[3, 0, -1], [1, -2, -6]], np.int32)


def tail(activations: Any) -> Any:
    """A 3 x 3 convolution, a bent curve, the sum over positions, a dense layer: numpy, float64."""
    windows = sliding_window_view(activations, (3, 3), axis=(1, 2))
    return np.tanh(np.einsum("nhwcij,ijck->nhwk", windows, KERNEL)).sum((1, 2)) @ DENSE


def tail_on_device(activations: Any, _: Any = None) -> Any:
    """The same in TensorFlow, in whatever precision its activations have."""
    import tensorflow as tf

    bent = tf.tanh(tf.nn.conv2d(activations, tf.cast(KERNEL, activations.dtype), 1, "VALID"))
    return tf.reduce_sum(bent, (1, 2)) @ tf.cast(DENSE, activations.dtype)


def slopes(activations: Any, class_ids: Any) -> Any:
    """Finite differences of the scores of k classes, (k, n, rows, columns, channels), float64."""
    found, step = np.zeros((class_ids.shape[1], *activations.shape)), 1e-5
    for place in np.ndindex(activations.shape[1:]):
        bump = np.zeros_like(activations)
        bump[(slice(None), *place)] = step
        slope = (tail(activations + bump) - tail(activations - bump)) / (2 * step)
        found[(..., *place)] = np.take_along_axis(slope, class_ids, axis=1).T
    return found


@pytest.fixture
def parts() -> "Parts":
    """A trunk that divides by 255, and that tail."""
    from gradcam_worker.gradcam.methods.gradients import Parts

    return Parts(
        trunk=lambda pixels: (pixels / 255, pixels / 255, []),
        tail=tail_on_device,
        score_gradient=lambda _, classes: classes,
        grid=lambda values: values,
        as_formula_wants=lambda values: values,
        pixels=(5, 6, 3),
        variables=[],
    )


def gradients_alone(_: Any, __: Any, gradients: Any) -> Any:
    return gradients


def test_gradients_agree_with_finite_differences_in_float64() -> None:
    import tensorflow as tf

    from gradcam_worker.gradcam.methods.gradients import linearize

    activations = PIXELS / 255
    scores, pull = linearize(tail_on_device, tf.constant(activations))
    assert_allclose(scores, tail(activations), rtol=1e-12)
    class_ids = np.array([[3, 0], [1, 5]])
    found = pull(tf.one_hot(class_ids.T, 6, dtype=tf.float64))
    assert_allclose(found, slopes(activations, class_ids), atol=1e-8)


def test_the_whole_pass_gives_the_scores_and_those_gradients(parts: "Parts") -> None:
    from gradcam_worker.gradcam.methods.gradients import one_pass

    scores, class_ids, gradients = one_pass(parts, gradients_alone)(PIXELS, WANTED)()
    assert_allclose(scores, tail(PIXELS / 255), rtol=1e-5)
    assert gradients.shape == (3, 2, 5, 6, 3)
    expected = slopes(PIXELS / 255, class_ids)
    assert_allclose(gradients, expected, atol=1e-5 * np.abs(expected).max())


def test_ids_name_classes_and_negative_numbers_name_ranks(parts: "Parts") -> None:
    from gradcam_worker.gradcam.methods.gradients import one_pass

    scores, class_ids, _ = one_pass(parts, gradients_alone)(PIXELS, WANTED)()
    ranked = np.argsort(-scores, axis=1)
    assert_array_equal(class_ids, [[3, 0, ranked[0, 0]], [1, ranked[1, 1], ranked[1, 5]]])


def test_every_batch_size_and_every_wish_share_one_trace(parts: "Parts") -> None:
    from gradcam_worker.gradcam.methods.gradients import one_pass

    traces = []

    def counted(pixels: Any) -> tuple[Any, Any, Any]:
        traces.append(pixels.shape)
        return parts.trunk(pixels)

    run = one_pass(replace(parts, trunk=counted), gradients_alone)
    for images, classes in [(1, 1), (2, 1), (1, 5), (7, 3)]:
        pixels = np.repeat(PIXELS[:1], images, axis=0)
        *_, gradients = run(pixels, np.full((images, classes), -1, np.int32))()
        assert gradients.shape == (classes, images, 5, 6, 3)
    assert len(traces) == 1


def test_a_mirror_image_goes_through_in_the_same_pass_and_the_maps_are_the_means_of_both(
    parts: "Parts",
) -> None:
    from gradcam_worker.gradcam.methods.gradients import one_pass

    def formula(ops: Any, activations: Any, gradients: Any) -> Any:
        return ops.transpose(ops.sum(activations * gradients, -1), (1, 0, 2, 3))

    plain, flipped = (one_pass(parts, formula, flip=flip) for flip in (False, True))
    scores, class_ids, raw = flipped(PIXELS, WANTED)()
    there_scores, there_ids, there = plain(PIXELS, WANTED)()
    *_, mirrored = plain(PIXELS[:, :, ::-1].copy(), there_ids)()
    assert_array_equal(class_ids, there_ids)
    assert_allclose(scores, there_scores, rtol=1e-6)
    assert_allclose(raw, (there + mirrored[..., ::-1]) / 2, atol=1e-5 * np.abs(raw).max())


def test_a_device_without_room_is_a_typed_error_with_the_size_of_the_call(parts: "Parts") -> None:
    import tensorflow as tf

    from gradcam_worker.gradcam.methods.gradients import one_pass

    def no_room() -> Any:
        raise MemoryError  # TensorFlow makes of it what it makes of a full device

    def too_large(activations: Any, rest: Any) -> Any:
        nothing = tf.ensure_shape(tf.numpy_function(no_room, [], tf.float32), ())
        return tail_on_device(activations, rest) + nothing

    with pytest.raises(DeviceOutOfMemory, match=r"arrays of \(2, 5, 6, 3\) and \(2, 3\)"):
        one_pass(replace(parts, tail=too_large), gradients_alone)(PIXELS, np.full((2, 3), -1, np.int32))()


class Counted:
    """Stands for `convert_to_numpy`, and counts; or has no room."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls, self.error = 0, error

    def __call__(self, tensor: Any) -> Any:
        self.calls += 1
        if self.error:
            raise self.error
        return tensor.numpy()


def test_what_was_handed_to_the_device_is_fetched_when_it_is_waited_for(
    parts: "Parts", monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradcam_worker.gradcam.methods import gradients

    counted = Counted()
    monkeypatch.setattr(gradients.ops, "convert_to_numpy", counted)
    run = gradients.one_pass(parts, gradients_alone)
    waits = [run(PIXELS, WANTED), run(PIXELS[:1], WANTED[:1])]
    assert counted.calls == 0
    two, one = (wait() for wait in waits)
    assert counted.calls == 6
    assert_allclose(two[2][:, :1], one[2], rtol=1e-6)


def test_a_device_that_runs_out_of_room_while_it_is_waited_for_says_so_too(
    parts: "Parts", monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow as tf

    from gradcam_worker.gradcam.methods import gradients

    full = Counted(tf.errors.ResourceExhaustedError(None, None, "no room"))
    monkeypatch.setattr(gradients.ops, "convert_to_numpy", full)
    wait = gradients.one_pass(parts, gradients_alone)(PIXELS, WANTED)
    with pytest.raises(DeviceOutOfMemory, match=r"arrays of \(2, 5, 6, 3\) and \(2, 3\)"):
        wait()


def test_nothing_is_compiled_by_xla_on_the_cpu(parts: "Parts", monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs Xception there at a fifth of the speed."""
    import tensorflow as tf

    from gradcam_worker.gradcam.methods.gradients import one_pass

    traced = []
    function = tf.function

    def spy(*args: Any, **kwargs: Any) -> Any:
        traced.append(function(*args, **kwargs))
        return traced[-1]

    monkeypatch.setattr(tf, "function", spy)
    one_pass(parts, gradients_alone)(PIXELS, WANTED)
    (found,) = traced
    assert not found.get_concrete_function().function_def.attr["_XlaMustCompile"].b
    assert not tf.config.optimizer.get_jit()


def test_several_classes_of_one_image_go_back_through_attention_which_ended_the_process(wrap: Wrap) -> None:
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    inputs = keras.Input((224, 224, 3))
    x = layers.Reshape((196, 64))(layers.Conv2D(64, 16, 16)(inputs))
    x = layers.Add(name="first")([x, layers.MultiHeadAttention(2, 32)(x, x)])
    y = layers.LayerNormalization(name="last")(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 32)(y, y)])
    network = wrap(keras.Model(inputs, layers.Dense(3)(x[:, 0])), "last")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    together = network.compute(pixels, np.array([[0, 1, 2]], np.int32)).raw
    single = [network.compute(pixels, np.array([[one]], np.int32)).raw for one in range(3)]
    assert np.abs(together - np.concatenate(single, 1)).max() <= 1e-5 * np.abs(together).max()


@pytest.mark.parametrize("attends", [True, False])
def test_all_classes_are_vectorised_but_where_activations_are_multiplied_with_each_other(
    attends: bool, wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras
    import tensorflow as tf

    vectorised: list[Any] = []
    vectorized_map = tf.vectorized_map

    def remember(*args: Any) -> Any:
        vectorised.append(args)
        return vectorized_map(*args)

    monkeypatch.setattr(tf, "vectorized_map", remember)
    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 2, 2, name="last")(inputs)
    y = layers.Reshape((16, 6))(x)
    y = layers.MultiHeadAttention(1, 6)(y, y) if attends else layers.Dense(6, "tanh")(y)
    network = wrap(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(y))), "last")
    network.compute(np.zeros((1, 8, 8, 3), np.uint8), np.array([[0, 1]], np.int32))
    assert bool(vectorised) != attends
