"""EfficientNet-Lite0 in fewer digits sees nearly the same.

`pytest --log-cli-level=info` prints the figures of docs/explanation/agreement.md.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method
from tests.gradcam.small_networks import CLASSIFIER

pytestmark = pytest.mark.tensorflow
log = logging.getLogger(__name__)

TOP_5 = np.tile(-np.arange(1, 6, dtype=np.int32), (5, 1))
FEWER = ["mixed_bfloat16", "bfloat16"]
fewer_digits = pytest.mark.parametrize("precision", FEWER)
Load = Callable[[str], Any]
Maps = NDArray[np.float32]
MapsOfPhotos = Callable[[str], dict[str, Maps]]
NAMES = ["gradcam", "gradcam++", "hirescam", "xgradcam", "layercam", "eigencam"]


@pytest.fixture(scope="module")
def load() -> Load:
    from gradcam_worker.gradcam.models.loading import load_network

    return cache(
        lambda precision: load_network("efficientnet_lite0", precision=precision, forward="tensorflow")
    )


@pytest.fixture(scope="module")
def photographed() -> NDArray[np.uint8]:
    """The shipped photos."""
    from devtools.agreement.photos import photographs

    return photographs((224, 224))


@pytest.fixture(scope="module")
def maps_of_photos(
    load: Load, photographed: NDArray[np.uint8], compute_together: Callable[..., dict[str, Maps]]
) -> MapsOfPhotos:
    """Raw maps of the shipped photos and the classes that float32 ranks first to fifth, by method."""
    class_ids = load("float32").compute(photographed, TOP_5).class_ids
    return cache(lambda precision: compute_together(load(precision), photographed, class_ids, NAMES))


@fewer_digits
def test_the_facts_name_the_precision_and_the_last_layer_stays_in_float32(precision: str, load: Load) -> None:
    network = load(precision)
    assert network.facts.dtype == precision
    expected = "bfloat16" if precision == "bfloat16" else "float32"
    assert network._model.get_layer("stem_conv").kernel.dtype == expected
    assert network._model.get_layer("stem_conv").compute_dtype == "bfloat16"
    assert network._model.get_layer("scores").dtype_policy.name == "float32"


@pytest.mark.usefixtures("eagerly")
@fewer_digits
def test_every_photo_keeps_its_best_class_and_scores_stay_close(
    precision: str, load: Load, photographed: NDArray[np.uint8]
) -> None:
    exact, reduced = (load(one).scores(photographed) for one in ("float32", precision))
    assert_array_equal(reduced.argmax(axis=1), exact.argmax(axis=1))
    assert np.abs(reduced - exact).max() < 0.06 * np.abs(exact).max()
    assert not np.array_equal(reduced, exact)


@pytest.mark.usefixtures("eagerly")
@fewer_digits
@pytest.mark.parametrize("name", NAMES)
def test_hot_regions_stay_where_they_are(precision: str, name: str, maps_of_photos: MapsOfPhotos) -> None:
    from devtools.agreement.photos import overlap

    exact, reduced = (maps_of_photos(one)[name].reshape(-1, 7, 7) for one in ("float32", precision))
    assert reduced.dtype == np.float32
    hot = overlap(exact, reduced)
    maps = [np.stack([cam.heatmaps(raw[np.newaxis]) for raw in one]) for one in (exact, reduced)]
    difference = np.abs(maps[0] - maps[1])
    log.info(
        "%s, %s: largest difference %.3f, mean %.1e, IoU %.3f",
        precision,
        name,
        difference.max(),
        difference.mean(),
        hot,
    )
    assert hot > 0.9
    assert difference.max() < 0.1


@fewer_digits
def test_a_copy_has_the_precision_and_the_model_is_not_changed(precision: str) -> None:
    import keras

    from gradcam_worker.gradcam.models.precision import with_precision

    inputs = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, name="conv")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, "softmax", name="head")(x))
    before = model.get_weights()
    copy = with_precision(model, precision)
    assert copy is not model
    assert (model.get_layer("conv").compute_dtype, copy.get_layer("conv").compute_dtype) == (
        "float32",
        "bfloat16",
    )
    assert copy.get_layer("head").compute_dtype == "float32"
    for mine, theirs in zip(before, model.get_weights(), strict=True):
        assert_array_equal(mine, theirs)
    assert with_precision(model, "float32") is model
    assert with_precision(model, "tf32") is model


@fewer_digits
@pytest.mark.parametrize("end", ["a layer", "an operation", "nested", "pooled", "an average"])
def test_all_layers_of_the_scores_stay_in_float32_however_a_network_ends(end: str, precision: str) -> None:
    import keras
    from keras import layers, ops

    from gradcam_worker.gradcam.models.loading import wrap_model
    from gradcam_worker.gradcam.models.precision import with_precision

    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    pooled = layers.GlobalAveragePooling2D()(x)
    if end == "a layer":
        x = layers.Activation("softmax")(layers.Dense(2, name="head")(pooled))
    elif end == "an operation":
        x = ops.softmax(layers.Dense(2, name="head")(pooled) / 2)
    elif end == "nested":
        x = keras.Sequential([layers.Dense(2, name="head"), layers.Softmax()])(pooled)
    elif end == "pooled":
        x = layers.Softmax()(layers.GlobalAveragePooling2D()(layers.Conv2D(2, 1, name="head")(x)))
    else:
        x = layers.Average()([layers.Dense(2, "softmax", name=name)(pooled) for name in ("head", "other")])
    copy = with_precision(keras.Model(inputs, x), precision)
    found = {layer.name: layer.compute_dtype for layer in copy._flatten_layers(include_self=False)}
    assert (found["conv"], found["head"]) == ("bfloat16", "float32")
    assert {found.get(name, "float32") for name in ("softmax", "activation", "average", "other")} == {
        "float32"
    }
    network = wrap_model(copy, preprocessing="tf")
    assert network.facts.dtype == precision
    assert np.isfinite(
        network.compute(np.zeros((1, 8, 8, 3), np.uint8), np.array([[0, 1]], np.int32)).raw
    ).all()


def test_a_network_that_cannot_be_copied_is_refused_with_alternatives() -> None:
    import keras

    from gradcam_worker.errors import NetworkIncompatible
    from gradcam_worker.gradcam.models.precision import with_precision

    class Own(keras.Model):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return x

    with pytest.raises(NetworkIncompatible, match=r"cannot be copied to compute in bfloat16: .*GRADCAM_PR"):
        with_precision(Own(), "bfloat16")


def test_a_model_of_mixed_float16_is_reported_as_such_and_a_certain_class_keeps_its_heatmap() -> None:
    import keras
    from keras import layers

    from gradcam_worker.gradcam.models.loading import wrap_model

    def built(policy: str) -> Any:
        keras.utils.set_random_seed(4)
        inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, activation="relu", name="conv", dtype=policy)(inputs)
        x = layers.GlobalAveragePooling2D(dtype=policy)(x)
        head = layers.Dense(3, "softmax", dtype="float32")
        model = keras.Model(inputs, head(x))
        head.set_weights([head.get_weights()[0], np.array([40.0, 0, 0])])
        return wrap_model(model, preprocessing="tf")

    pixels = np.random.default_rng(3).integers(0, 256, (2, 8, 8, 3), np.uint8)
    half, full = built("mixed_float16"), built("float32")
    assert (half.facts.dtype, full.facts.dtype) == ("mixed_float16", "float32")
    for score in ("probability", "logit"):
        maps = [
            one.compute(pixels, np.array([[0, 1]] * 2, np.int32), Method(score=score)).raw
            for one in (half, full)
        ]
        peaks = np.abs(maps[1]).max((2, 3), keepdims=True)
        assert (peaks > 0).all()
        assert np.abs((maps[0] - maps[1]) / peaks).max() < 0.01


def test_an_unknown_precision_is_refused_with_all_precisions() -> None:
    from gradcam_worker.gradcam.models.precision import with_precision

    with pytest.raises(InvalidSettings, match="'float8'; there are float32, tf32, bfloat16, mixed_bfloat16"):
        with_precision(object(), "float8")


def test_only_the_precision_tf32_allows_tf32_and_a_cpu_computes_in_float32() -> None:
    import tensorflow as tf

    allowed = tf.config.experimental.tensor_float_32_execution_enabled
    from gradcam_worker.gradcam.models.loading import load_network

    try:
        for precision in ("float32", "tf32", "float32"):
            network = load_network(CLASSIFIER, random_seed=1, precision=precision, forward="tensorflow")
            assert allowed() == (precision == "tf32")
            assert network.facts.dtype == "float32"
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(False)
