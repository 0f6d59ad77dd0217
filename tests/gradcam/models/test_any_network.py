"""Small networks of many architectures: their scores and maps are those of a gradient tape."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from gradcam_worker.errors import NetworkIncompatible, UnknownLayer
from gradcam_worker.gradcam.catalog import Head
from tests.gradcam.small_networks import ALL_CLASSES, COLUMNS, ROWS, Wrap, add_classifier, backbone

pytestmark = pytest.mark.tensorflow


def nested_in_sequential(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    model = keras.Sequential(
        [keras.Input((ROWS, COLUMNS, 3)), inner, layers.GlobalMaxPooling2D(), layers.Dense(3, "softmax")]
    )
    return model, "backbone/act", inner.get_layer("act"), model.layers[-1]


def nested_in_functional(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    inputs = keras.Input((ROWS, COLUMNS, 3))
    model = keras.Model(inputs, add_classifier(keras, inner(inputs, training=False)))
    return model, "backbone/act", inner.get_layer("act"), model.get_layer("scores")


def nested_twice(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    middle = keras.Sequential([keras.Input((ROWS, COLUMNS, 3)), inner, layers.MaxPooling2D()], name="middle")
    inputs = keras.Input((ROWS, COLUMNS, 3))
    model = keras.Model(inputs, add_classifier(keras, middle(inputs)))
    return model, "middle/backbone/act", inner.get_layer("act"), model.get_layer("scores")


def nested_three_times(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    middle = keras.Sequential([layers.Rescaling(2.0), inner], name="middle")
    inputs = keras.Input((ROWS, COLUMNS, 3))
    outer = keras.Model(inputs, layers.Dropout(0.5)(middle(inputs)), name="outer")
    model = keras.Sequential([outer, layers.Flatten(), layers.Dense(5), layers.ReLU(), layers.Dense(3)])
    model.build((None, ROWS, COLUMNS, 3))
    return model, "outer/middle/backbone/act", inner.get_layer("act"), model.layers[-1]


def made_of_any_size(keras: Any, layers: Any) -> Any:
    inner = backbone(keras, shape=(None, None, 3))
    model = keras.Model(inner.input, add_classifier(keras, inner.output))
    return model, "act", inner.get_layer("act"), model.get_layer("scores")


def skip_around_the_target(keras: Any, layers: Any) -> Any:
    inputs = keras.Input((ROWS, COLUMNS, 3))
    early = layers.Conv2D(4, 3, 2, activation="relu")(inputs)
    late = layers.Conv2D(4, 3, activation="relu", name="late")(early)
    side = layers.Dense(4)(layers.GlobalMaxPooling2D()(early))
    x = layers.GlobalAveragePooling2D()(late)
    x = layers.Multiply()([x, layers.Activation("sigmoid")(side)])
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="scores")(x))
    return model, "late", model.get_layer("late"), model.get_layer("scores")


def average_and_maximum(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    x = inner.output
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), layers.GlobalMaxPooling2D()(x)])
    model = keras.Model(inner.input, layers.Dense(3, "softmax", name="scores")(layers.Dense(4, "gelu")(x)))
    return model, "act", inner.get_layer("act"), model.get_layer("scores")


def of_several_scales(keras: Any, layers: Any) -> Any:
    inputs = keras.Input((ROWS, COLUMNS, 3))
    early = layers.Conv2D(4, 3, activation="relu", name="early")(inputs)
    late = layers.Conv2D(4, 3, 2, activation="relu", name="late")(early)
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(one) for one in (late, early)])
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="scores")(x))
    return model, "late", model.get_layer("late"), model.get_layer("scores")


def attention_pooling(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    tokens = layers.Reshape((5 * 7, 6))(inner.output)
    weights = keras.ops.softmax(layers.Dense(1)(tokens), axis=1)
    x = keras.ops.sum(weights * tokens, axis=1)
    model = keras.Model(inner.input, layers.Dense(3, "softmax", name="scores")(x))
    return model, "act", inner.get_layer("act"), model.get_layer("scores")


def attention_pooling_by_a_product(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    tokens = keras.ops.reshape(inner.output, (-1, 5 * 7, 6))
    weights = keras.ops.softmax(layers.Dense(2)(tokens), axis=1)
    x = layers.Flatten()(keras.ops.matmul(keras.ops.transpose(weights, (0, 2, 1)), tokens))
    model = keras.Model(inner.input, layers.Dense(3, "softmax", name="scores")(x))
    return model, "act", inner.get_layer("act"), model.get_layer("scores")


def bilinear_pooling(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    tokens = layers.Reshape((-1, 6))(inner.output)
    x = layers.Flatten()(layers.Dot(axes=1)([tokens, tokens]))
    model = keras.Model(inner.input, layers.Dense(3, "softmax", name="scores")(x))
    return model, "act", inner.get_layer("act"), model.get_layer("scores")


def squeeze_and_excite(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(inner.output)
    gate = layers.Conv2D(6, 1, activation="sigmoid")(layers.Conv2D(2, 1, activation="relu")(gate))
    x = layers.Multiply(name="gated")([gate, inner.output])
    model = keras.Model(inner.input, add_classifier(keras, x))
    return model, "gated", model.get_layer("gated"), model.get_layer("scores")


def a_recurrent_layer_over_rows(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    x = layers.LSTM(4)(layers.Reshape((5, 7 * 6))(inner.output))
    model = keras.Model(inner.input, layers.Dense(3, "softmax", name="scores")(x))
    return model, "act", inner.get_layer("act"), model.get_layer("scores")


def plain_arithmetic(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    x = inner.output
    x = keras.ops.concatenate([x[..., :2] * 2 + 1, keras.ops.square(x)[:, :, :, 2:]], axis=-1)
    joined = x._keras_history.operation
    model = keras.Model(inner.input, add_classifier(keras, x))
    return model, joined.name, joined, model.get_layer("scores")


def one_of_several_results(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    one, two = keras.ops.split(inner.output, 2, axis=-1)
    x = layers.GlobalAveragePooling2D()(two)
    x = layers.Concatenate()([x, layers.GlobalMaxPooling2D()(one)])
    model = keras.Model(inner.input, layers.Dense(3, "softmax", name="scores")(x))
    return model, "act", inner.get_layer("act"), model.get_layer("scores")


def a_nested_model_with_two_results(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    pyramid = keras.Model(inner.input, [inner.get_layer("stem").output, inner.output], name="pyramid")
    inputs = keras.Input((ROWS, COLUMNS, 3))
    model = keras.Model(inputs, add_classifier(keras, pyramid(inputs)[1]))
    return model, "pyramid/act", inner.get_layer("act"), model.get_layer("scores")


def one_layer_again_and_again(keras: Any, layers: Any) -> Any:
    inputs = keras.Input((ROWS, COLUMNS, 3))
    again = layers.Conv2D(4, 3, padding="same", activation="tanh", name="again")
    x = layers.Conv2D(4, 3, 2)(inputs)
    model = keras.Model(inputs, add_classifier(keras, again(again(again(x)))))
    return model, "again#3", again, model.get_layer("scores")


def called_by_keywords(keras: Any, layers: Any) -> Any:
    inner = backbone(keras)
    attention = layers.Attention()
    x = layers.Reshape((5 * 7, 6))(inner.output)
    pooled = keras.ops.mean(x, axis=1, keepdims=True)
    x = attention(inputs=[pooled, x], training=False)
    model = keras.Model(inner.input, layers.Dense(3, "softmax", name="scores")(layers.Flatten()(x)))
    return model, "act", inner.get_layer("act"), model.get_layer("scores")


def augmented(keras: Any, layers: Any) -> Any:
    inputs = keras.Input((ROWS + 4, COLUMNS + 4, 3))
    x = layers.RandomFlip()(layers.RandomRotation(0.1)(layers.RandomContrast(0.2)(inputs)))
    x = layers.Resizing(ROWS, COLUMNS)(layers.RandomZoom(0.1)(x))
    x = layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1, 2, 3])(layers.GaussianNoise(0.1)(x))
    inner = backbone(keras)
    model = keras.Model(inputs, add_classifier(keras, inner(x)))
    return model, "backbone/act", inner.get_layer("act"), model.get_layer("scores")


ZOO = [
    nested_in_sequential,
    nested_in_functional,
    nested_twice,
    nested_three_times,
    made_of_any_size,
    skip_around_the_target,
    average_and_maximum,
    of_several_scales,
    attention_pooling,
    attention_pooling_by_a_product,
    bilinear_pooling,
    squeeze_and_excite,
    a_recurrent_layer_over_rows,
    plain_arithmetic,
    one_of_several_results,
    a_nested_model_with_two_results,
    one_layer_again_and_again,
    called_by_keywords,
    augmented,
]


@pytest.mark.parametrize("build", ZOO, ids=lambda build: build.__name__)
def test_scores_and_maps_are_those_of_a_gradient_tape(
    build: Any, wrap: Wrap, tape_gradients: Callable[..., Any]
) -> None:
    import keras

    keras.utils.set_random_seed(3)
    model, path, layer, head = build(keras, keras.layers)
    size = tuple(model.inputs[0].shape[1:3])
    size = size if all(size) else (17, 22)
    network = wrap(model, input_size=size)
    pixels = np.random.default_rng(1).integers(0, 256, (2, *size, 3), np.uint8)
    computed = network.compute(pixels, ALL_CLASSES)
    turn = int(path.partition("#")[2] or 1) - 1
    expected = tape_gradients(model, pixels / np.float32(127.5) - 1, layer, head=head, turn=turn)
    assert computed.layer == path
    assert_allclose(computed.scores, expected.scores, atol=1e-5 * np.abs(expected.scores).max())
    assert np.ptp(expected.raw, axis=(2, 3)).min() > 0
    assert_allclose(computed.raw, expected.raw, atol=1e-5 * np.abs(expected.raw).max())


class TestNothingToExplain:
    @pytest.mark.parametrize(
        ("model", "told"), [("own.keras", "not 'own.keras'"), (None, "not None"), (object(), "not a object")]
    )
    def test_what_is_no_model_is_refused_with_what_wraps_it(self, model: Any, told: str, wrap: Wrap) -> None:
        with pytest.raises(NetworkIncompatible, match=f"takes a model of Keras 3.*{told}: load a file by"):
            wrap(model)

    def test_a_model_that_takes_no_image_is_refused(self, wrap: Wrap) -> None:
        import keras

        with pytest.raises(NetworkIncompatible, match=r"takes \(None, 7\); an image is \(None, height"):
            wrap(keras.Sequential([keras.Input((7,)), keras.layers.Dense(3)]))

    @pytest.mark.parametrize("rescaled", [True, False])
    def test_a_network_without_a_map_is_refused(self, rescaled: bool, wrap: Wrap) -> None:
        import keras

        layers = [keras.Input((ROWS, COLUMNS, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
        if rescaled:
            layers.insert(1, keras.layers.Rescaling(1 / 255, name="rescaled"))
        listed = "1 layers can .* rescaled" if rescaled else "No layer of this network can be explained"
        with pytest.raises(NetworkIncompatible, match=f"keeps rows and columns and has weights.*{listed}"):
            wrap(keras.Sequential(layers))

    @pytest.mark.parametrize("name", ["conv 1", "_conv", "conv\\1", "conv:0"])
    def test_a_layer_with_a_name_that_tensorflow_cannot_compile_is_refused(
        self, name: str, wrap: Wrap
    ) -> None:
        import keras

        inputs = keras.Input((ROWS, COLUMNS, 3))
        x = keras.layers.Conv2D(4, 3, name=name)(inputs)
        model = keras.Model(inputs, add_classifier(keras, x))
        with pytest.raises(
            NetworkIncompatible, match=re.escape(f"a layer with the name {name!r}, with which")
        ):
            wrap(model)

    @pytest.mark.parametrize(
        "name", ["conv 1", "_conv", "conv\\1", ">conv", "conv>", "a>>b", "a>-b", "a>.b", ".a_b-c."]
    )
    def test_a_name_is_taken_where_tensorflow_compiles_a_layer_of_that_name(self, name: str) -> None:
        import keras
        import tensorflow as tf

        from gradcam_worker.gradcam.models.load_checks import TENSORFLOW_NAME

        layer = keras.layers.Dense(2, name=name)
        layer.build((None, 2))
        compiled = True
        try:
            tf.function(layer)(tf.zeros((1, 2)))
        except (ValueError, tf.errors.InvalidArgumentError):
            compiled = False
        assert bool(TENSORFLOW_NAME.fullmatch(name)) is compiled

    def test_a_layer_that_does_not_lead_to_the_chosen_output_is_refused(self, wrap: Wrap) -> None:
        import keras

        layers = keras.layers
        inputs = keras.Input((ROWS, COLUMNS, 3))
        maps = [layers.Conv2D(4, 3, name=name)(inputs) for name in ("left", "right")]
        outputs = [
            layers.Dense(3, name=name)(layers.GlobalAveragePooling2D()(one))
            for name, one in zip(("first", "second"), maps, strict=True)
        ]
        model = keras.Model(inputs, outputs)
        assert wrap(model, head=Head(output="second")).facts.default_layer == "right"
        with pytest.raises(UnknownLayer, match=r"'left' of by_hand does not lead to the scores.*: right"):
            wrap(model, "left", head=Head(output="second"))
