"""Models taken apart: what is nested in them is found by its path, and nothing in them is changed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from gradcam_worker.errors import UnknownLayer
from gradcam_worker.gradcam.network import Method
from tests.gradcam.small_networks import ALL_CLASSES, COLUMNS, ROWS, Wrap, add_classifier, backbone

pytestmark = [pytest.mark.tensorflow, pytest.mark.usefixtures("eagerly")]

FIRST = np.array([[0]], np.int32)


@pytest.fixture(scope="module")
def network(wrap: Wrap) -> Any:
    import keras

    inner, inputs = backbone(keras), keras.Input((ROWS, COLUMNS, 3))
    layers = [keras.Input((ROWS, COLUMNS, 3)), inner, keras.layers.MaxPooling2D(name="smaller")]
    middle = keras.Sequential(layers, name="middle")
    return wrap(keras.Model(inputs, add_classifier(keras, middle(inputs))))


class TestPaths:
    @pytest.mark.parametrize("layer", ["middle/backbone/conv", "conv"])
    def test_a_nested_layer_is_named_by_its_path_or_by_its_own_name(self, layer: str, network: Any) -> None:
        computed = network.compute(np.ones((1, ROWS, COLUMNS, 3), np.uint8), FIRST, Method(layer=layer))
        assert computed.layer == "middle/backbone/conv"

    @pytest.mark.parametrize(
        ("layer", "path"),
        [
            ("backbone", "middle/backbone/act"),
            ("middle/backbone", "middle/backbone/act"),
            ("middle", "middle/smaller"),
        ],
    )
    def test_the_name_of_a_nested_model_stands_for_what_it_makes(
        self, layer: str, path: str, network: Any
    ) -> None:
        computed = network.compute(np.ones((1, ROWS, COLUMNS, 3), np.uint8), FIRST, Method(layer=layer))
        assert computed.layer == path

    def test_an_unknown_path_is_refused_with_one_that_is_near(self, network: Any) -> None:
        with pytest.raises(
            UnknownLayer, match=r"'backbone/cnv'.*does not exist. Did you mean.*backbone/conv'"
        ):
            network.compute(np.ones((1, ROWS, COLUMNS, 3), np.uint8), FIRST, Method(layer="backbone/cnv"))

    def test_a_name_that_several_paths_end_in_is_refused_with_these(self, wrap: Wrap) -> None:
        import keras

        inputs = keras.Input((ROWS, COLUMNS, 3))
        two = [backbone(keras, name)(inputs) for name in ("left", "right")]
        network = wrap(keras.Model(inputs, add_classifier(keras, keras.layers.Add()(two))))
        with pytest.raises(UnknownLayer, match="'conv' of by_hand may be any of left/conv, right/conv"):
            network.compute(np.ones((1, ROWS, COLUMNS, 3), np.uint8), FIRST, Method(layer="conv"))


class TestSiamese:
    """A backbone that sees the image and its mirror image."""

    @pytest.fixture
    def model(self) -> Any:
        import keras

        inputs = keras.Input((ROWS, COLUMNS, 3))
        shared = backbone(keras)
        both = [
            keras.layers.GlobalAveragePooling2D()(shared(one))
            for one in (inputs, keras.ops.flip(inputs, axis=2))
        ]
        x = keras.layers.Concatenate()(both)
        return keras.Model(inputs, keras.layers.Dense(3, "softmax", name="scores")(x))

    @pytest.mark.parametrize(
        ("layer", "path"),
        [
            (None, "backbone/act"),
            ("backbone/act", "backbone/act"),
            ("backbone#2/act", "backbone#2/act"),
            ("backbone#2", "backbone#2/act"),
        ],
    )
    def test_each_branch_can_be_explained_and_lies_on_the_image_as_it_is(
        self, layer: str | None, path: str, model: Any, wrap: Wrap, tape_gradients: Callable[..., Any]
    ) -> None:
        pixels = np.random.default_rng(1).integers(0, 256, (2, ROWS, COLUMNS, 3), np.uint8)
        computed = wrap(model, layer).compute(pixels, ALL_CLASSES)
        assert computed.layer == path
        inputs = pixels / np.float32(127.5) - 1
        inner, head = model.get_layer("backbone"), model.get_layer("scores")
        both = [
            tape_gradients(model, inputs, inner.get_layer("act"), head=head, turn=turn) for turn in (0, 1)
        ]
        seen = inner(inputs[:, :, ::-1] if "#2" in path else inputs).numpy()
        expected = next(one for one in both if np.allclose(one.activations, seen, atol=1e-6))
        raw = expected.raw[..., ::-1] if "#2" in path else expected.raw
        assert_allclose(computed.scores, expected.scores, atol=1e-5 * np.abs(expected.scores).max())
        assert_allclose(computed.raw, raw, atol=1e-5 * np.abs(raw).max())


class TestLeftAsItWas:
    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
    def test_it_can_still_be_saved_and_trained(self, wrap: Wrap, tmp_path: Any) -> None:
        import keras

        inner, inputs = backbone(keras), keras.Input((ROWS, COLUMNS, 3))
        model = keras.Model(inputs, add_classifier(keras, inner(inputs)))
        network = wrap(model)
        model.compile("sgd", "categorical_crossentropy")
        model.train_on_batch(np.ones((2, ROWS, COLUMNS, 3)), np.eye(3)[:2])
        model.save(tmp_path / "model.keras")
        again = wrap(keras.saving.load_model(tmp_path / "model.keras"))
        pixels = np.random.default_rng(1).integers(0, 256, (2, ROWS, COLUMNS, 3), np.uint8)
        assert again.facts.default_layer == network.facts.default_layer
        assert_allclose(
            again.compute(pixels, ALL_CLASSES).raw, wrap(model).compute(pixels, ALL_CLASSES).raw, atol=1e-6
        )
