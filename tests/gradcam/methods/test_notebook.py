"""The `notebook` preset against the arithmetic of the notebook that this project started from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method, Network

pytestmark = pytest.mark.tensorflow

Noise = Callable[..., NDArray[np.uint8]]
Wrap = Callable[..., Network]
NOTEBOOK = Method("notebook")


def transcribed(
    pixels: NDArray[np.uint8], model: Any, layer: str, class_ids: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Its `make_gradcam_heatmap` for one image, step by step: maps before step 13, and after it.

    As there: the pixels skip the preprocessing, the model ends in its softmax, the layers behind the target
    layer are called one after the other, the channels are multiplied in turn and then averaged.
    """
    import keras
    import tensorflow as tf

    array = pixels[np.newaxis].astype(np.float32)
    target = model.get_layer(layer)
    up_to = keras.Model(model.input, target.output)
    classifier_input = x = keras.Input(target.output.shape[1:])
    for behind in model.layers[model.layers.index(target) + 1 :]:
        x = behind(x)
    classifier = keras.Model(classifier_input, x)
    raw, heatmaps = [], []
    for class_id in class_ids:
        with tf.GradientTape() as tape:
            activations = up_to(array)
            tape.watch(activations)
            probability = classifier(activations)[:, class_id]
        pooled = tf.reduce_mean(tape.gradient(probability, activations), axis=(0, 1, 2)).numpy()
        weighted = activations.numpy()[0]
        for channel in range(len(pooled)):
            weighted[:, :, channel] *= pooled[channel]
        heatmap = np.mean(weighted, axis=-1)
        raw.append(heatmap)
        with np.errstate(divide="ignore", invalid="ignore"):
            heatmaps.append(np.maximum(heatmap, 0) / np.max(heatmap))
    return np.stack(raw), np.stack(heatmaps)


def assert_same(network: Any, model: Any, layer: str, pixels: NDArray[np.uint8], wanted: list[int]) -> Any:
    computed = network.compute(pixels[np.newaxis], np.array([wanted], np.int32), NOTEBOOK)
    raw, heatmaps = transcribed(pixels, model, layer, computed.class_ids[0])
    for found, theirs in zip(computed.raw[0], raw, strict=True):
        assert_allclose(found, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)
    assert_allclose(cam.heatmaps(computed.raw[0]), np.nan_to_num(heatmaps), atol=1e-4)
    return heatmaps


@pytest.mark.large
@pytest.mark.parametrize("name", ["vgg16", "xception"])
def test_on_the_notebooks_own_networks_its_numbers_are_ours(
    name: str, random_network: Callable[[str], Any], noise: Noise
) -> None:
    network = random_network(name)
    pixels = noise(1, *network.facts.input_size)[0]
    wanted = [-1, -2, -3, 536, 718]
    heatmaps = assert_same(network, network._model, network.facts.default_layer, pixels, wanted)
    assert np.count_nonzero(np.nan_to_num(heatmaps).max((1, 2))) >= 2


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize(
    ("photo", "wanted"),
    [("astronaut", [-1, -2, 812, 560]), ("camera", [-1, 872, 759]), ("coffee", [-1, 967])],
)
def test_on_a_trained_network_and_photos_its_numbers_are_ours(
    photo: str, wanted: list[int], lite0: Any, photos: Path
) -> None:
    import keras

    model = keras.Model(lite0._model.input, keras.layers.Softmax()(lite0._model.output))
    pixels = fit(decode((photos / f"{photo}.jpg").read_bytes()).pixels, (224, 224))
    heatmaps = assert_same(lite0, model, "top_act", pixels, wanted)
    assert np.isfinite(heatmaps).all()
    assert np.nan_to_num(heatmaps).max() == 1


def test_where_the_notebook_has_no_numbers_ours_are_zeros_with_the_flag(wrap: Wrap, noise: Noise) -> None:
    """Unpreprocessed pixels make large scores; of classes far from the best the probability underflows."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(6)
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, activation="relu", name="target")(inputs)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(10, "softmax", kernel_initializer="random_normal")(x))
    model.layers[-1].set_weights([100 * weight for weight in model.layers[-1].get_weights()])
    network, pixels = wrap(model, "target"), noise(1, 16, 16)[0]
    wanted = list(range(10))
    raw, heatmaps = transcribed(pixels, model, "target", wanted)
    dark = np.isnan(heatmaps).all((1, 2))
    assert dark.sum() >= 5
    seen = explain_image(network, pixels, classes=wanted, method="notebook")
    assert_array_equal(seen.heatmaps[dark], 0)
    assert set(np.flatnonzero(dark)) <= set(seen.zero_heatmaps)
    assert np.isfinite(seen.heatmaps).all()
    assert_array_equal(raw[dark], 0)


def test_its_map_is_another_than_the_papers(lite0: Network, photos: Path) -> None:
    """It looks at another image, and at the probability: what its preset is for is to compare, no more."""
    photo = photos / "astronaut.jpg"
    theirs, ours = (
        explain_image(lite0, photo, classes=[812], method=name).heatmaps for name in ("notebook", "gradcam")
    )
    assert np.abs(theirs - ours).max() > 0.2
