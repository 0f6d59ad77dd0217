import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from gradcam_worker.gradcam.methods import cam


def test_gradcam_weights_each_channel_by_the_mean_of_its_gradient() -> None:
    activations = np.array([[[[1.0, 10.0], [2.0, 20.0]], [[3.0, 30.0], [4.0, 40.0]]]])
    gradients = np.array([[[[[4.0, 0.0], [0.0, 0.0]], [[0.0, -0.4], [0.0, 0.0]]]]])
    # The means over the four positions are 1 and -0.1: 1 - 1, 2 - 2, ... except where they differ.
    assert_allclose(cam.gradcam(np, activations, gradients), np.zeros((1, 1, 2, 2)), atol=1e-15)
    assert_allclose(cam.gradcam(np, activations, 2 * abs(gradients)), 4 * activations[None, ..., 0])


def test_gradcam_keeps_images_and_classes_apart() -> None:
    rng = np.random.default_rng(0)
    activations, gradients = rng.normal(size=(3, 4, 5, 6)), rng.normal(size=(2, 3, 4, 5, 6))
    raw = cam.gradcam(np, activations, gradients)
    assert raw.shape == (3, 2, 4, 5)
    for image in range(3):
        for wish in range(2):
            alpha = gradients[wish, image].mean((0, 1))
            assert_allclose(raw[image, wish], (activations[image] * alpha).sum(-1))


def test_gradcam_leaves_the_relu_to_heatmaps() -> None:
    ones = np.ones((1, 2, 2, 1))
    assert_array_equal(cam.gradcam(np, ones, -ones[None]), -np.ones((1, 1, 2, 2)))


def test_a_heatmap_is_the_positive_part_divided_by_its_peak() -> None:
    raw = np.array([[[-8, 0], [1, 4]]], np.float32)
    assert_array_equal(cam.heatmaps(raw), [[[0, 0], [0.25, 1]]])
    assert_array_equal(raw, [[[-8, 0], [1, 4]]])


def test_every_heatmap_has_its_own_peak() -> None:
    raw = np.array([[[2.0, 1.0]], [[0.002, 0.001]]], np.float32)
    assert_allclose(cam.heatmaps(raw), [[[1, 0.5]], [[1, 0.5]]])


@pytest.mark.parametrize("value", [0.0, -1.0, -1e-30])
def test_where_nothing_speaks_for_a_class_its_heatmap_is_exactly_zero(value: float) -> None:
    assert_array_equal(cam.heatmaps(np.full((1, 2, 2), value, np.float32)), np.zeros((1, 2, 2)))


def test_a_dark_heatmap_does_not_darken_its_neighbours() -> None:
    raw = np.array([[[-1.0, -2.0]], [[1.0, 2.0]]], np.float32)
    assert_array_equal(cam.heatmaps(raw), [[[0, 0]], [[0.5, 1]]])


@pytest.mark.parametrize("peak", [1e-37, 1e-12, 1e12, 1e38])
def test_the_peak_is_one_however_small_or_large_it_was(peak: float) -> None:
    heatmap = cam.heatmaps(np.array([[[peak, peak / 2]]], np.float32))
    assert_allclose(heatmap, [[[1, 0.5]]], rtol=1e-6)


def test_heatmaps_are_float32() -> None:
    assert cam.heatmaps(np.ones((1, 2, 2), np.float32)).dtype == np.float32


def test_gradcam_plus_plus_does_not_lose_small_gradients() -> None:
    """Their squares would underflow in float32; the formula needs none."""
    rng = np.random.default_rng(5)
    activations = np.abs(rng.normal(size=(1, 4, 4, 3)))
    gradients = rng.normal(size=(1, 1, 4, 4, 3)) * 1e-25
    raw = cam.gradcam_plus_plus(np, activations.astype(np.float32), gradients.astype(np.float32))
    weights = (np.maximum(gradients, 0) / 2).sum((2, 3))  # the cubes are nothing beside the squares
    expected = np.einsum("nhwc,knc->nkhw", activations, weights)
    assert_allclose(raw, expected, rtol=1e-5)
