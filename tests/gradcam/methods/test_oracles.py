"""Networks whose Grad-CAM is known by another way than ours."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.explain import explain_pixels
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Computed, Method, Network

pytestmark = pytest.mark.tensorflow

Noise = Callable[..., NDArray[np.uint8]]
Wrap = Callable[..., Network]

SIZE, LAYER = (20, 24), "last"
WANTED = np.array([[-1, -2, 7, 500]] * 2, np.int32)


@pytest.fixture
def model() -> Any:
    """Three convolutions, global average pooling, one dense layer with 1000 classes."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(1)
    inputs = keras.Input((*SIZE, 3))
    x = layers.Conv2D(6, 3, 2, activation="relu")(inputs)
    x = layers.Conv2D(8, 3, activation="relu", name="middle")(x)
    x = layers.Conv2D(12, 3, activation="relu", name=LAYER)(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(1000, "softmax", bias_initializer="random_normal", name="scores")(x)
    return keras.Model(inputs, x)


def activations_of(model: Any, pixels: NDArray[np.uint8], layer: str = LAYER) -> NDArray[np.float64]:
    import keras

    feature_maps = keras.Model(model.input, model.get_layer(layer).output)
    return np.asarray(feature_maps(pixels / np.float32(127.5) - 1), np.float64)


def kernel_and_bias(model: Any) -> tuple[Any, Any]:
    """Of the last layer: (channels, classes) and (classes,)."""
    kernel, bias = model.get_layer("scores").get_weights()
    return kernel, bias


@pytest.fixture
def pixels(noise: Noise) -> NDArray[np.uint8]:
    return noise(2, *SIZE)


@pytest.fixture
def compute(wrap: Wrap, pixels: NDArray[np.uint8]) -> Callable[..., Computed]:
    return lambda model, name="gradcam": wrap(model, LAYER).compute(pixels, WANTED, Method(name))


class TestPoolingAndOneDenseLayer:
    """Here Grad-CAM is CAM (Zhou et al., arXiv 1512.04150), as section 3.1 of Grad-CAM's paper proves."""

    def test_raw_maps_times_their_cells_are_cam(
        self, model: Any, compute: Callable[..., Computed], pixels: NDArray[np.uint8]
    ) -> None:
        computed, (kernel, _) = compute(model), kernel_and_bias(model)
        feature_maps = activations_of(model, pixels)
        expected = np.einsum("nhwc,cnk->nkhw", feature_maps, kernel[:, computed.class_ids])
        cells = feature_maps.shape[1] * feature_maps.shape[2]
        assert_allclose(computed.raw * cells, expected, atol=1e-6 * abs(expected).max())

    @pytest.mark.parametrize("name", ["hirescam", "xgradcam"])
    def test_methods_that_average_the_same_slopes_otherwise_give_the_same(
        self, name: str, model: Any, compute: Callable[..., Computed]
    ) -> None:
        """A score's slope is the same at every position: weighted or not, its mean is what it is."""
        cam_itself = compute(model).raw
        assert_allclose(compute(model, name).raw, cam_itself, atol=1e-6 * abs(cam_itself).max())

    @pytest.mark.parametrize("name", ["layercam", "gradcam++"])
    def test_methods_that_take_positive_slopes_alone_are_known_too(
        self, name: str, model: Any, compute: Callable[..., Computed], pixels: NDArray[np.uint8]
    ) -> None:
        """A channel's slope w / Z is the same everywhere, so that eq. 19 of Grad-CAM++ can be had by hand."""
        computed, (kernel, _) = compute(model, name), kernel_and_bias(model)
        feature_maps = activations_of(model, pixels)
        cells = feature_maps.shape[1] * feature_maps.shape[2]
        slopes = (
            np.moveaxis(kernel[:, computed.class_ids], 0, -1).astype(np.float64) / cells
        )  # (n, k, channels)
        weights = np.maximum(slopes, 0)
        if name == "gradcam++":
            weights *= cells / (2 + slopes * feature_maps.sum((1, 2))[:, np.newaxis])
        expected = np.einsum("nhwc,nkc->nkhw", feature_maps, weights)
        assert_allclose(computed.raw, expected, atol=2e-5 * abs(expected).max())

    def test_the_counterfactual_is_cam_the_other_way_round(
        self, model: Any, compute: Callable[..., Computed]
    ) -> None:
        assert_allclose(compute(model, "counterfactual").raw, -compute(model).raw, atol=1e-9)

    def test_a_raw_map_sums_to_the_score_without_its_bias(
        self, model: Any, compute: Callable[..., Computed]
    ) -> None:
        computed, (_, bias) = compute(model), kernel_and_bias(model)
        scores = np.take_along_axis(computed.scores, computed.class_ids, axis=1)
        assert_allclose(computed.raw.sum((2, 3)), scores - bias[computed.class_ids], rtol=1e-5, atol=1e-6)

    def test_scores_are_those_before_the_softmax(
        self, model: Any, compute: Callable[..., Computed], pixels: NDArray[np.uint8]
    ) -> None:
        computed, (kernel, bias) = compute(model), kernel_and_bias(model)
        features = activations_of(model, pixels).mean((1, 2))
        assert_allclose(computed.scores, features @ kernel + bias, rtol=1e-5, atol=1e-6)

    def test_swapping_the_two_best_classes_swaps_their_maps(
        self, model: Any, compute: Callable[..., Computed]
    ) -> None:
        before, (kernel, bias) = compute(model), kernel_and_bias(model)
        first, second = before.class_ids[0, :2]
        for weights in (kernel.T, bias):
            weights[[first, second]] = weights[[second, first]]
        model.get_layer("scores").set_weights([kernel, bias])
        after = compute(model)
        assert_array_equal(after.class_ids[0, :2], [second, first])
        # Both are in the order of the ranks, so each class now has the map that the other one had.
        assert_allclose(after.raw[0, :2], before.raw[0, :2], rtol=1e-6, atol=1e-9)
        assert abs(before.raw[0, 0] - before.raw[0, 1]).max() > 0.1 * abs(before.raw).max()

    def test_scaling_the_scores_changes_no_heatmap(
        self, model: Any, compute: Callable[..., Computed]
    ) -> None:
        before = compute(model)
        model.get_layer("scores").set_weights([7 * weights for weights in kernel_and_bias(model)])
        after = compute(model)
        assert_array_equal(after.class_ids, before.class_ids)
        assert_allclose(after.raw, 7 * before.raw, rtol=1e-5, atol=1e-8)
        for new, old in zip(after.raw, before.raw, strict=True):
            assert_allclose(cam.heatmaps(new), cam.heatmaps(old), atol=1e-6)


class TestNothingToSee:
    @pytest.mark.parametrize("dead", ["scores", LAYER, "middle"])
    def test_a_dead_network_has_heatmaps_of_exact_zeros_and_says_so(
        self, dead: str, model: Any, wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        layer = model.get_layer(dead)
        layer.set_weights([np.zeros_like(weights) for weights in layer.get_weights()])
        for seen in explain_pixels(wrap(model, LAYER), pixels, [(-1, -2, 7)] * 2):
            assert_array_equal(seen.heatmaps, np.zeros_like(seen.heatmaps))
            assert_array_equal([*seen.raw_min, *seen.raw_max], np.zeros(6))
            assert seen.zero_heatmaps == tuple(one.id for one in seen.explained)
            assert np.isfinite([one.probability for one in seen.explained]).all()

    def test_a_class_that_everything_speaks_against_is_zero_beside_others_that_are_not(
        self, model: Any, wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        kernel, bias = kernel_and_bias(model)
        kernel[:, 7], kernel[:, 8] = -1, 1
        model.get_layer("scores").set_weights([kernel, bias])
        seen = explain_pixels(wrap(model, LAYER), pixels[:1], [(7, 8)])[0]
        assert seen.zero_heatmaps == (7,)
        assert seen.raw_min[0] < 0
        assert seen.heatmaps.max((1, 2)).tolist() == [0, 1]


def test_maps_of_a_layer_with_more_layers_behind_it_agree_with_finite_differences(
    model: Any, wrap: Wrap, pixels: NDArray[np.uint8]
) -> None:
    """The weight of a channel is the score's slope as that channel rises everywhere, over the cells."""
    computed = wrap(model, LAYER).compute(pixels, WANTED, Method(layer="middle"))
    feature_maps, step = activations_of(model, pixels, "middle"), 1e-6
    (kernel, bias), (dense, _) = (model.get_layer(name).get_weights() for name in (LAYER, "scores"))

    def scores(maps: NDArray[np.float64]) -> NDArray[np.float64]:
        windows = np.lib.stride_tricks.sliding_window_view(maps, (3, 3), axis=(1, 2))
        last = np.maximum(np.einsum("nhwcij,ijck->nhwk", windows, kernel.astype(np.float64)) + bias, 0)
        return np.asarray(last.mean((1, 2)) @ dense.astype(np.float64))

    bumps = step * np.eye(feature_maps.shape[3])
    rises = np.stack([scores(feature_maps + bump) - scores(feature_maps - bump) for bump in bumps])
    slopes = rises / (2 * step)  # (channels, n, classes)
    weights = np.stack([slopes[:, n, ids] for n, ids in enumerate(computed.class_ids)])  # (n, channels, k)
    cells = feature_maps.shape[1] * feature_maps.shape[2]
    expected = np.einsum("nhwc,nck->nkhw", feature_maps, weights) / cells
    assert_allclose(computed.raw, expected, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize(
    ("name", "side", "layers"),
    [
        ("vgg16", 64, (None, "block4_pool")),
        pytest.param("xception", 299, (None, "block5_sepconv2_bn"), marks=pytest.mark.large),
    ],
)
def test_all_classes_at_once_equal_one_class_at_a_time(
    name: str, side: int, layers: tuple[str | None, ...], noise: Noise
) -> None:
    from gradcam_worker.gradcam.models.loading import load_network

    row = replace(CATALOG[name], input_size=(side, side), map_size=None)
    network = load_network(row, random_seed=1, forward="tensorflow")
    for layer in layers:
        check_one_class_at_a_time(row, network, layer, noise(1, side, side))


def check_one_class_at_a_time(
    row: NetworkRow, network: Any, layer: str | None, pixels: NDArray[np.uint8]
) -> None:
    import keras
    import tensorflow as tf

    model, computed = network._model, network.compute(pixels, WANTED[:1], Method(layer=layer))
    dense = model.layers[-1]
    both = keras.Model(model.input, [model.get_layer(layer or row.target_layer).output, dense.input])
    inputs = getattr(keras.applications, row.name).preprocess_input(pixels.astype(np.float32))
    for class_id, raw in zip(computed.class_ids[0], computed.raw[0], strict=True):
        with tf.GradientTape() as tape:
            activations, features = both(inputs)
            score = (tf.matmul(features, dense.kernel) + dense.bias)[0, class_id]
        weights = tf.reduce_mean(tape.gradient(score, activations), axis=(0, 1, 2))
        expected = tf.reduce_sum(weights * activations[0], axis=-1).numpy()
        assert_allclose(raw, expected, atol=1e-5 * abs(expected).max(), rtol=0)


def test_the_formula_is_the_same_on_the_device_and_in_numpy() -> None:
    import keras

    rng = np.random.default_rng(0)
    activations, gradients = rng.normal(size=(2, 4, 5, 6)), rng.normal(size=(3, 2, 4, 5, 6))
    on_device = cam.gradcam(keras.ops, *map(keras.ops.convert_to_tensor, (activations, gradients)))
    assert on_device.dtype == "float64"
    assert_allclose(on_device.numpy(), cam.gradcam(np, activations, gradients), rtol=1e-12)
