"""Inputs of networks: sizes, channels, integers, and preprocessing inside a network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image

from gradcam_worker.errors import InvalidSettings, NetworkIncompatible
from gradcam_worker.gradcam.catalog import Preprocessing
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.faithfulness import METRICS, measure
from gradcam_worker.gradcam.imaging.network_input import to_input
from gradcam_worker.gradcam.network import Method
from gradcam_worker.gradcam.sizing import Sizing
from tests.gradcam.small_networks import ALL_CLASSES, COLUMNS, ROWS, Wrap, add_classifier, backbone

pytestmark = pytest.mark.tensorflow


def of_any_size(keras: Any) -> Any:
    inner = backbone(keras, shape=(None, None, 3))
    return keras.Model(inner.input, add_classifier(keras, inner.output))


class TestInputs:
    @pytest.mark.parametrize("channels", [1, 4, 6])
    def test_any_number_of_channels(
        self, channels: int, wrap: Wrap, tape_gradients: Callable[..., Any]
    ) -> None:
        import keras

        inner = backbone(keras, shape=(ROWS, COLUMNS, channels))
        model = keras.Model(inner.input, add_classifier(keras, inner.output))
        how = Preprocessing("own", (10.0,), (100.0,), channels=channels)
        pixels = np.random.default_rng(1).integers(0, 256, (2, ROWS, COLUMNS, channels), np.uint8)
        computed = wrap(model, preprocessing=how).compute(pixels, ALL_CLASSES)
        inputs = (pixels - np.float32(10)) / 100
        expected = tape_gradients(model, inputs, inner.get_layer("act"), head=model.get_layer("scores"))
        assert_allclose(computed.raw, expected.raw, atol=1e-5 * np.abs(expected.raw).max())

    @pytest.mark.parametrize(
        ("channels", "weights"), [("grey", [0.299, 0.587, 0.114]), ("grey_mean", [1 / 3] * 3)]
    )
    def test_a_network_for_grey_images_gets_the_luminance_or_the_mean(
        self,
        channels: Literal["grey", "grey_mean"],
        weights: list[float],
        wrap: Wrap,
        tape_gradients: Callable[..., Any],
    ) -> None:
        import keras

        inner = backbone(keras, shape=(ROWS, COLUMNS, 1))
        model = keras.Model(inner.input, add_classifier(keras, inner.output))
        pixels = np.random.default_rng(1).integers(0, 256, (2, ROWS, COLUMNS, 3), np.uint8)
        how = Preprocessing("own", (0.0,), (255.0,), channels=channels)
        computed = wrap(model, preprocessing=how).compute(pixels, ALL_CLASSES)
        grey = (pixels @ np.array(weights)[:, np.newaxis] / 255).astype(np.float32)
        expected = tape_gradients(model, grey, inner.get_layer("act"), head=model.get_layer("scores"))
        assert_allclose(computed.raw, expected.raw, atol=1e-5 * np.abs(expected.raw).max())

    @pytest.mark.parametrize(
        ("sizing", "interpolation"),
        [
            ("keras.load_img", "nearest"),
            (Sizing("bilinear_antialias"), "bilinear"),
            (Sizing("bicubic_antialias"), "bicubic"),
            (Sizing("lanczos"), "lanczos"),
            ("tf.image.resize", "TensorFlow"),
            ("image_dataset_from_directory", "TensorFlow"),
        ],
    )
    def test_a_photo_is_predicted_as_by_its_owners_code(
        self, sizing: Sizing | str, interpolation: str, wrap: Wrap, photos: Path, tmp_path: Path
    ) -> None:
        import keras
        import tensorflow as tf

        inner = backbone(keras)
        model = keras.Model(inner.input, add_classifier(keras, inner.output))
        path, size = photos / "coffee.jpg", (ROWS, COLUMNS)
        if sizing != "image_dataset_from_directory":  # TensorFlow decodes JPEG in a way of its own
            path = tmp_path / "photo.png"
            Image.open(photos / "coffee.jpg").save(path)
        if interpolation == "TensorFlow":
            image = tf.image.resize(tf.io.decode_image(path.read_bytes()), size)
        else:
            image = keras.utils.load_img(path, target_size=size, interpolation=interpolation)
        inputs = np.asarray(image, np.float32)[np.newaxis] / np.float32(127.5) - 1
        explained = explain_image(wrap(model, sizing=sizing), path, classes=[0, 1, 2])
        probabilities = [prediction.probability for prediction in explained.explained]
        assert_allclose(probabilities, model.predict(inputs, verbose=0)[0], atol=1e-5)

    @pytest.mark.parametrize(
        "method",
        [
            Method(flip=True),
            Method("integrated_gradients", steps=8),
            Method("rise", masks=4, cells=2),
            Method("occlusion", window=8, stride=8),
        ],
        ids=lambda method: method.name,
    )
    def test_levels_with_fractions_are_explained_by_each_method_and_measured(
        self, method: Method, wrap: Wrap, photos: Path
    ) -> None:
        import keras

        inner = backbone(keras)
        network = wrap(
            keras.Model(inner.input, add_classifier(keras, inner.output)), sizing="tf.image.resize"
        )
        explained = explain_image(network, photos / "coffee.jpg", classes=[0, 1], method=method)
        assert (explained.raw_max > explained.raw_min).all()
        pixels = to_input(explained.picture, (ROWS, COLUMNS), network.facts.sizing)
        assert pixels.dtype == np.float32
        [first, _] = measure(network.scores, pixels, explained, METRICS)
        assert {*first} == {*METRICS}

    def test_a_sizing_that_there_is_not_is_refused(self, wrap: Wrap) -> None:
        import keras

        inner = backbone(keras)
        model = keras.Model(inner.input, add_classifier(keras, inner.output))
        with pytest.raises(InvalidSettings, match="no sizing 'tf'; "):
            wrap(model, sizing="tf")
        with pytest.raises(InvalidSettings, match="color has 2 levels for 3 channels"):
            wrap(model, sizing=Sizing(fit="letterbox", color=(1, 2)))

    def test_whole_numbers(self, wrap: Wrap, tape_gradients: Callable[..., Any]) -> None:
        import keras

        inputs = keras.Input((ROWS, COLUMNS, 3), dtype="uint8")
        inner = backbone(keras)
        model = keras.Model(inputs, add_classifier(keras, inner(keras.layers.Rescaling(1 / 255)(inputs))))
        pixels = np.random.default_rng(1).integers(0, 256, (2, ROWS, COLUMNS, 3), np.uint8)
        network = wrap(model, preprocessing="none")
        computed = network.compute(pixels, ALL_CLASSES)
        whole = keras.Model(model.layers[2].input, add_classifier(keras, inner.output))
        whole.layers[-1].set_weights(model.layers[-1].get_weights())
        expected = tape_gradients(
            whole, pixels / np.float32(255), inner.get_layer("act"), head=whole.get_layer("scores")
        )
        assert_allclose(computed.raw, expected.raw, atol=1e-5 * np.abs(expected.raw).max())
        assert network.facts.rescales
        with pytest.raises(
            NetworkIncompatible, match=r"takes whole numbers \(uint8\).* must be none, not tf"
        ):
            wrap(model)

    def test_an_unknown_input_size_must_be_given(self, wrap: Wrap) -> None:
        import keras

        model = of_any_size(keras)
        with pytest.raises(NetworkIncompatible, match="does not say how large its input is: give input_size"):
            wrap(model)

    def test_another_size_or_number_of_channels_is_refused_with_what_would_be_right(self, wrap: Wrap) -> None:
        import keras

        model = keras.Sequential([backbone(keras), keras.layers.Flatten(), keras.layers.Dense(3)])
        with pytest.raises(NetworkIncompatible, match="takes an input of 12 x 16 x 3, not of 20 x 20 x 3"):
            wrap(model, input_size=(20, 20))
        with pytest.raises(NetworkIncompatible, match="takes an input of 12 x 16 x 3, not of 12 x 16 x 1"):
            wrap(model, preprocessing=Preprocessing("grey", channels="grey"))
        grey = keras.Sequential([keras.Input((12, 16, 1)), keras.layers.Conv2D(3, 3), keras.layers.Flatten()])
        with pytest.raises(
            NetworkIncompatible, match=r'as in preprocessing = \{scale = .*channels = "grey"\}'
        ):
            wrap(grey)

    def test_a_size_that_a_layer_cannot_take_is_refused_with_the_layer(self, wrap: Wrap) -> None:
        import keras

        model = of_any_size(keras)
        with pytest.raises(NetworkIncompatible, match=r"stem cannot take \(None, 2, 2, 3\)"):
            wrap(model, input_size=(2, 2))

    def test_a_network_with_two_image_inputs_is_refused(self, wrap: Wrap) -> None:
        import keras

        two = [keras.Input((ROWS, COLUMNS, 3), name=name) for name in ("left", "right")]
        model = keras.Model(two, add_classifier(keras, keras.layers.Add()(two)))
        with pytest.raises(NetworkIncompatible, match=r"takes 2 inputs \(left .*, right .*\); a job has one"):
            wrap(model, input_size=(ROWS, COLUMNS))

    @pytest.mark.parametrize(
        ("kind", "size", "options", "fits"),
        [
            ("CenterCrop", (ROWS, COLUMNS), {}, True),  # of all there is
            ("CenterCrop", (ROWS - 4, COLUMNS), {}, False),
            ("RandomCrop", (ROWS // 2, COLUMNS // 2), {}, False),
            ("Resizing", (ROWS, ROWS), {}, True),  # stretched, as our own pictures are
            ("Resizing", (ROWS, ROWS), {"crop_to_aspect_ratio": True}, False),
            ("Resizing", (ROWS, ROWS), {"pad_to_aspect_ratio": True}, False),
            ("Resizing", (ROWS * 2, COLUMNS * 2), {"crop_to_aspect_ratio": True}, True),
        ],
    )
    def test_a_network_that_crops_its_input_is_refused(
        self, kind: str, size: tuple[int, int], options: dict[str, Any], fits: bool, wrap: Wrap
    ) -> None:
        import keras

        inputs = keras.Input((ROWS, COLUMNS, 3))
        x = getattr(keras.layers, kind)(*size, name="cut", **options)(inputs)
        x = keras.layers.Conv2D(4, 3, name="conv")(x)
        model = keras.Model(inputs, add_classifier(keras, x))
        if fits:
            assert wrap(model).facts.default_layer == "conv"
            return
        with pytest.raises(NetworkIncompatible, match="by_hand crops"):
            wrap(model)

    @pytest.mark.parametrize("how", ["Cropping2D", "slice"])
    def test_a_network_that_crops_its_input_by_other_means_is_refused_too(self, how: str, wrap: Wrap) -> None:
        import keras

        inputs = keras.Input((ROWS, COLUMNS, 3))
        scaled = keras.layers.Rescaling(0.5)(inputs)
        x = scaled[:, 4:] if how == "slice" else keras.layers.Cropping2D(((4, 0), (0, 0)))(scaled)
        x = keras.layers.Conv2D(4, 3, name="conv")(x)
        with pytest.raises(NetworkIncompatible, match="crops, pads, shifts or turns its input"):
            wrap(keras.Model(inputs, add_classifier(keras, x)))
        with pytest.raises(NetworkIncompatible, match=r"fit of sizing crops and pads"):
            wrap(keras.Model(inputs, add_classifier(keras, x)), sizing="torchvision")

    def test_an_unknown_preprocessing_is_refused_with_all_preprocessings(self, wrap: Wrap) -> None:
        import keras

        model = keras.Sequential([keras.Input((ROWS, COLUMNS, 3)), keras.layers.Flatten()])
        with pytest.raises(NetworkIncompatible, match="no preprocessing 'imagenet'; there are caffe, tf"):
            wrap(model, preprocessing="imagenet")

    def test_channels_that_come_first_are_refused(self, wrap: Wrap) -> None:
        import keras

        inputs = keras.Input((3, ROWS, 3))
        x = keras.layers.Conv2D(4, 2, data_format="channels_first", name="first")(inputs)
        x = keras.layers.GlobalAveragePooling2D(data_format="channels_first")(x)
        model = keras.Model(inputs, keras.layers.Dense(3)(x))
        with pytest.raises(
            NetworkIncompatible, match=r"first puts the channels first; build .* channels_last"
        ):
            wrap(model)

    @pytest.mark.parametrize("how", ["Rescaling", "Normalization", "arithmetic", "nothing"])
    def test_facts_tell_whether_a_network_rescales_its_input(self, how: str, wrap: Wrap) -> None:
        import keras

        inputs = keras.Input((ROWS, COLUMNS, 3))
        x = keras.layers.RandomFlip()(inputs)
        if how == "Rescaling":
            x = keras.layers.Rescaling(1 / 255)(x)
        elif how == "Normalization":
            x = keras.layers.Normalization(mean=[1, 2, 3], variance=[4, 5, 6])(x)
        elif how == "arithmetic":
            x = x / 127.5 - 1
        x = keras.layers.Rescaling(3.0)(backbone(keras)(x))
        network = wrap(keras.Model(inputs, add_classifier(keras, x)))
        assert network.facts.rescales == (how != "nothing")
