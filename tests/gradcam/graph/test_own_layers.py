"""Layers and models that somebody wrote: opened as far as they can be, else taken as they are, or refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from gradcam_worker.errors import NetworkIncompatible
from tests.gradcam.small_networks import ALL_CLASSES, COLUMNS, ROWS, Wrap, add_classifier, backbone

pytestmark = pytest.mark.tensorflow


def define_custom_layers() -> dict[str, Any]:  # noqa: C901  # each is simple
    """Layers and models as somebody may write them, by their names."""
    import keras
    import tensorflow as tf
    from keras import layers, ops

    class Block(layers.Layer):  # type: ignore[misc]
        """Made of layers and keras.ops."""

        def __init__(self, **more: Any) -> None:
            super().__init__(**more)
            self.conv = layers.Conv2D(3, 3, padding="same", name="conv")
            self.norm = layers.BatchNormalization(name="norm")

        def call(self, x: Any, training: bool = False) -> Any:
            return ops.tanh(self.norm(self.conv(x), training=training)) + x

    class Scaled(layers.Layer):  # type: ignore[misc]
        """Has weights of its own."""

        def build(self, shape: Any) -> None:
            self.scale = self.add_weight(shape=(shape[-1],), initializer="random_normal", name="scale")

        def call(self, x: Any) -> Any:
            return ops.tanh(ops.multiply(x, self.scale) * 9)

    class Closed(layers.Layer):  # type: ignore[misc]
        """Cannot be looked into."""

        def build(self, shape: Any) -> None:
            self.mix = self.add_weight(shape=(shape[-1], 4), name="mix")

        def call(self, x: Any) -> Any:
            return tf.tanh(tf.tensordot(x, tf.convert_to_tensor(self.mix), 1))

    class OfOneBatch(layers.Layer):  # type: ignore[misc]
        """Asks how many images there are, which nobody knows beforehand."""

        def __init__(self, **more: Any) -> None:
            super().__init__(**more)
            self.conv = layers.Conv2D(4, 3, name="conv")

        def call(self, x: Any) -> Any:
            x = ops.sin(3 * self.conv(x))
            return ops.reshape(x, (ops.shape(x)[0], ROWS - 2, COLUMNS - 2, 4))

    class Classifier(keras.Model):  # type: ignore[misc]
        """A subclassed model, which decides by `training`."""

        def __init__(self, **more: Any) -> None:
            super().__init__(**more)
            self.block, self.pool = Block(name="block"), layers.GlobalAveragePooling2D()
            self.drop, self.dense = layers.Dropout(0.5), layers.Dense(3, "softmax")

        def call(self, x: Any, training: bool = False) -> Any:
            x = ops.relu(self.block(x, training=training))
            if training:
                x = self.drop(x, training=True)
            return self.dense(self.pool(x))

    class Random(Classifier):
        """Drops features in inference too: Monte Carlo dropout."""

        def call(self, x: Any, training: bool = False) -> Any:
            return self.dense(self.drop(self.pool(self.block(x)), training=True))

    class Deciding(Classifier):
        """Decides by what is in the image."""

        def call(self, x: Any, training: bool = False) -> Any:
            return self.dense(self.pool(self.block(x) if ops.max(x) > 0 else x))

    return {one.__name__: one for one in (Block, Scaled, Closed, OfOneBatch, Classifier, Random, Deciding)}


@pytest.fixture(scope="module")
def custom() -> dict[str, Any]:
    return define_custom_layers()


def agrees(network: Any, model: Any, tape_gradients: Callable[..., Any], layer: Any, head: Any) -> None:
    """Scores and maps are those of a tape over the model."""
    pixels = np.random.default_rng(1).integers(0, 256, (2, ROWS, COLUMNS, 3), np.uint8)
    computed = network.compute(pixels, ALL_CLASSES)
    expected = tape_gradients(model, pixels / np.float32(127.5) - 1, layer, head=head)
    assert_allclose(computed.scores, expected.scores, atol=1e-5 * np.abs(expected.scores).max())
    assert np.ptp(expected.raw, axis=(2, 3)).min() > 0
    assert_allclose(computed.raw, expected.raw, atol=1e-5 * np.abs(expected.raw).max())


class TestOwnLayers:
    @pytest.mark.parametrize(
        ("kind", "path"),
        [("Block", "mine/add"), ("Scaled", "mine/tanh"), ("Closed", "mine"), ("OfOneBatch", "mine")],
    )
    def test_a_layer_is_opened_where_it_is_made_of_layers_and_operations(
        self, kind: str, path: str, custom: dict[str, Any], wrap: Wrap, tape_gradients: Callable[..., Any]
    ) -> None:
        import keras

        inputs, layer = keras.Input((ROWS, COLUMNS, 3)), custom[kind](name="mine")
        model = keras.Model(inputs, add_classifier(keras, layer(inputs)))
        network = wrap(model)
        assert network.facts.default_layer == path
        agrees(network, model, tape_gradients, layer, model.get_layer("scores"))
        agrees(wrap(model, "mine"), model, tape_gradients, layer, model.get_layer("scores"))

    def test_a_layer_in_a_layer_has_a_path(
        self, custom: dict[str, Any], wrap: Wrap, tape_gradients: Callable[..., Any]
    ) -> None:
        import keras

        inputs, block = keras.Input((ROWS, COLUMNS, 3)), custom["Block"](name="block")
        model = keras.Model(inputs, add_classifier(keras, custom["Scaled"]()(block(inputs))))
        agrees(wrap(model, "block/norm"), model, tape_gradients, block.norm, model.get_layer("scores"))

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_subclassed_model_is_opened(
        self, nested: bool, custom: dict[str, Any], wrap: Wrap, tape_gradients: Callable[..., Any]
    ) -> None:
        import keras

        model = inner = custom["Classifier"](name="inner")
        if nested:
            inputs = keras.Input((ROWS, COLUMNS, 3))
            model = keras.Model(inputs, inner(inputs))
        network = wrap(model, input_size=(ROWS, COLUMNS))
        assert network.facts.default_layer == ("inner/relu" if nested else "relu")
        conv = wrap(model, "inner/block/conv" if nested else "block/conv", input_size=(ROWS, COLUMNS))
        agrees(conv, model, tape_gradients, inner.block.conv, inner.dense)

    def test_names_of_operations_are_the_same_whenever_a_layer_is_opened(
        self, custom: dict[str, Any], wrap: Wrap
    ) -> None:
        model = custom["Classifier"]()
        found = [wrap(model, input_size=(ROWS, COLUMNS))._layers.by_slot.values() for _ in range(2)]
        first, second = ([place.path for place in places] for places in found)
        assert first == second == ["block/conv", "block/norm", "block/tanh", "block/add", "relu"]

    def test_a_lambda_of_a_model_at_hand_is_opened(
        self, wrap: Wrap, tape_gradients: Callable[..., Any]
    ) -> None:
        import keras

        inner = backbone(keras)
        doubled = keras.layers.Lambda(lambda x: keras.ops.square(x) * 2, name="doubled")
        model = keras.Model(inner.input, add_classifier(keras, doubled(inner.output)))
        assert wrap(model).facts.default_layer == "doubled/multiply"
        agrees(wrap(model), model, tape_gradients, doubled, model.get_layer("scores"))


class TestCannotBeFollowed:
    def test_a_model_that_decides_by_the_image_has_no_static_graph(
        self, custom: dict[str, Any], wrap: Wrap
    ) -> None:
        with pytest.raises(
            NetworkIncompatible, match=r"Deciding 'mine' has no static graph.* or of layers and"
        ):
            wrap(custom["Deciding"](name="mine"), input_size=(ROWS, COLUMNS))

    def test_a_model_that_is_random_in_inference_is_refused(self, custom: dict[str, Any], wrap: Wrap) -> None:
        with pytest.raises(
            NetworkIncompatible, match=r"computes something else than as a whole .* random layer"
        ):
            wrap(custom["Random"](), input_size=(ROWS, COLUMNS))

    def test_a_model_that_breaks_is_refused_with_what_it_said(
        self, custom: dict[str, Any], wrap: Wrap
    ) -> None:
        import keras

        model = keras.Sequential([keras.layers.Conv2D(3, 20, name="wide"), keras.layers.Flatten()])
        with pytest.raises(NetworkIncompatible, match="cannot be called with an image of 12 x 16 x 3"):
            wrap(model, input_size=(ROWS, COLUMNS))

    def test_dropout_that_was_called_for_training_is_off_as_in_the_whole_model(
        self, wrap: Wrap, tape_gradients: Callable[..., Any]
    ) -> None:
        import keras

        inner = backbone(keras)
        model = keras.Model(
            inner.input, add_classifier(keras, keras.layers.Dropout(0.5)(inner.output, training=True))
        )
        agrees(wrap(model), model, tape_gradients, inner.get_layer("act"), model.get_layer("scores"))


class TestOneImageAtATime:
    @pytest.mark.parametrize("how", ["built into a reshape", "normalised over the batch"])
    def test_a_network_that_cannot_take_several_explains_each_alone(self, how: str, wrap: Wrap) -> None:
        import keras
        from keras import layers, ops

        from gradcam_worker.gradcam.network import Method

        keras.utils.set_random_seed(3)
        fixed = how == "built into a reshape"
        inputs = keras.Input((ROWS, COLUMNS, 3), batch_size=1 if fixed else None)
        x = layers.Conv2D(4, 3, activation="tanh", name="conv")(inputs)
        if fixed:
            x = ops.mean(ops.reshape(x, (1, -1, 4)), axis=1)
        else:
            x = layers.GlobalAveragePooling2D()(x)
            x = x + 100 * (x - ops.mean(x, axis=0, keepdims=True))
        model = keras.Model(inputs, layers.Dense(3, "softmax", name="scores")(x))
        network = wrap(model)
        pixels = np.random.default_rng(1).integers(0, 256, (2, ROWS, COLUMNS, 3), np.uint8)
        together, flipped = (
            network.compute(pixels, ALL_CLASSES, Method(flip=flip)) for flip in (False, True)
        )
        for index in range(2):
            image = pixels[index : index + 1]
            alone = network.compute(image, ALL_CLASSES[:1])
            mirrored = network.compute(image[:, :, ::-1], ALL_CLASSES[:1])
            assert_array_equal(together.raw[index], alone.raw[0])
            assert_array_equal(together.scores[index], alone.scores[0])
            assert_allclose(flipped.raw[index], (alone.raw[0] + mirrored.raw[0, ..., ::-1]) / 2, atol=1e-7)
            custom = np.asarray(model(image / np.float32(127.5) - 1))
            assert_allclose(together.outputs[index], custom[0], atol=1e-6)
        assert_allclose(network.scores(pixels), together.scores, atol=1e-6)


class TestLeftAsItWas:
    @pytest.mark.parametrize("kind", ["nested", "with layers of its own", "subclassed"])
    def test_weights_names_outputs_and_calls_are_those_of_before(
        self, kind: str, custom: dict[str, Any], wrap: Wrap
    ) -> None:
        import keras

        inputs, inner = keras.Input((ROWS, COLUMNS, 3)), backbone(keras)
        if kind == "nested":
            model = keras.Model(inputs, add_classifier(keras, inner(inputs)))
        elif kind == "subclassed":
            model = custom["Classifier"]()
        else:
            model = keras.Model(
                inputs, add_classifier(keras, custom["Scaled"]()(inner(custom["Block"]()(inputs))))
            )
        pixels = np.random.default_rng(1).integers(0, 256, (2, ROWS, COLUMNS, 3), np.uint8)
        output = np.asarray(model(pixels / np.float32(255)))

        def state() -> list[Any]:
            layers = model._flatten_layers()
            return [
                (one.name, len(one._inbound_nodes), len(one._outbound_nodes), one.trainable) for one in layers
            ]

        before, weights = state(), [one.copy() for one in model.get_weights()]
        wrap(model, input_size=(ROWS, COLUMNS)).compute(pixels, ALL_CLASSES)
        assert state() == before
        for left, right in zip(model.get_weights(), weights, strict=True):
            assert_array_equal(left, right)
        assert_array_equal(np.asarray(model(pixels / np.float32(255))), output)
        assert wrap(model, input_size=(ROWS, COLUMNS)).facts.default_layer
