"""The slopes of what is explained, against float64, also where float32 alone would cancel."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method

pytestmark = pytest.mark.tensorflow

CLASSES = np.eye(3, dtype=np.float32)[:, np.newaxis]  # (k, 1, classes)
LOG_PROBABILITY = Method(score="probability")


def slopes(kind: str, method: Method, scores: NDArray[np.float32]) -> NDArray[np.float64]:
    from gradcam_worker.gradcam.backend import keras
    from gradcam_worker.gradcam.methods.score_gradients import score_gradient

    found = score_gradient(kind, method)(
        keras.ops.convert_to_tensor(scores), keras.ops.convert_to_tensor(CLASSES)
    )
    return np.asarray(found, np.float64)[:, 0]


@pytest.mark.parametrize("margin", [0.5, 11, 17, 38, 60])
def test_the_slopes_of_a_log_probability_keep_their_digits_however_sure_the_network_is(margin: float) -> None:
    scores = np.array([[margin, 0, -1]], np.float32)
    powers = np.exp(scores[0].astype(np.float64))
    shares = powers / powers.sum()
    exact = np.eye(3) - shares
    exact[0, 0] = shares[1] + shares[2]  # 1 - p, without the difference
    assert_allclose(slopes("softmax", LOG_PROBABILITY, scores), exact, rtol=1e-5)


def test_the_heatmap_of_a_probability_that_float32_calls_1_is_not_dark(wrap: Callable[..., Any]) -> None:
    """Pooling and one dense layer: the slope of each class at each channel is known, so the map is."""
    import keras

    inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(3, 1, use_bias=False, name="conv")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, "softmax", name="scores")(x))
    model.get_layer("conv").set_weights([np.eye(3)[None, None]])
    kernel = np.array([[90.0, 0, -9], [30, 1, 0], [0, 5, 9]], np.float32)
    model.get_layer("scores").set_weights([kernel, np.zeros(3)])
    pixels = np.random.default_rng(3).integers(0, 256, (1, 4, 4, 3), dtype=np.uint8)
    network = wrap(model, "conv", preprocessing="unit")
    activations = pixels[0].astype(np.float64) / 255
    scores = activations.mean((0, 1)) @ kernel
    assert scores[0] - max(scores[1:]) > 30
    rest = np.exp(scores[1:] - scores[1:].max())
    weights = kernel[:, 0] - kernel[:, 1:] @ (rest / rest.sum())
    expected = cam.heatmaps(np.asarray((activations @ weights)[None], np.float32))
    for name in ("gradcam", "hirescam", "xgradcam"):
        found = network.compute(pixels, np.array([[0]], np.int32), Method(name, score="probability"))
        assert_allclose(cam.heatmaps(found.raw[0]), expected, atol=1e-5)


@pytest.mark.parametrize("score", [-200.0, -3.0, 0.0, 3.0, 200.0])
def test_the_slope_of_a_sigmoids_log_probability_never_vanishes(score: float) -> None:
    found = slopes("sigmoid", LOG_PROBABILITY, np.array([[score, 0, 0]], np.float32))
    exact = 1 / (1 + np.exp(np.float64(score)))
    assert found[0, 0] == pytest.approx(max(exact, 1e-30), rel=1e-5)
    assert_allclose(found - np.diag(np.diag(found)), 0)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_notebook_takes_the_probability_itself_and_a_logit_is_its_own_slope(kind: str) -> None:
    scores = np.array([[1.0, -2.0, 0.5]], np.float32)
    powers = np.exp(scores[0].astype(np.float64))
    shares = powers / (powers.sum() if kind == "softmax" else 1 + powers)
    exact = np.diag(shares) - (np.outer(shares, shares) if kind == "softmax" else np.diag(shares**2))
    assert_allclose(slopes(kind, Method("notebook"), scores), exact, rtol=1e-5)
    assert_allclose(slopes(kind, Method(), scores), np.eye(3))
