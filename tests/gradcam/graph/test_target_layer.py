"""Which layer is explained where none is named: of transformers, of hybrids, and where there is none."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from gradcam_worker.errors import NetworkIncompatible

pytestmark = [pytest.mark.tensorflow, pytest.mark.usefixtures("eagerly")]

ROWS, COLUMNS, SIDE, WIDTH = 16, 24, 4, 8  # of the image; of a patch; of a token
GRID = (ROWS // SIDE, COLUMNS // SIDE)
PATCHES = GRID[0] * GRID[1]
ALL_CLASSES = np.array([[0, 1, 2]] * 2, np.int32)
Wrap = Callable[..., Any]


def define_custom_layers() -> dict[str, Any]:
    """What a transformer is made of that Keras does not have, as it is usually written."""
    import tensorflow as tf
    from keras import layers, ops

    class ClassToken(layers.Layer):  # type: ignore[misc]
        """Puts a token before the others."""

        def build(self, shape: Any) -> None:
            self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="random_normal", name="token")

        def call(self, x: Any) -> Any:
            tokens = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, x.shape[-1]))
            return ops.concatenate([tokens, x], axis=1)

    class Positions(layers.Layer):  # type: ignore[misc]
        """A learned embedding of where each token is."""

        def build(self, shape: Any) -> None:
            self.where = self.add_weight(shape=(1, *shape[1:]), initializer="random_normal", name="where")

        def call(self, x: Any) -> Any:
            return x + self.where

    class SelfAttention(layers.Layer):  # type: ignore[misc]
        """Of several heads, written out."""

        def __init__(self, heads: int, **more: Any) -> None:
            super().__init__(**more)
            self.heads, self.qkv, self.out = heads, layers.Dense(3 * WIDTH), layers.Dense(WIDTH)

        def call(self, x: Any) -> Any:
            tokens, size = x.shape[1], WIDTH // self.heads
            split = ops.reshape(self.qkv(x), (-1, tokens, 3, self.heads, size))
            q, k, v = ops.unstack(ops.transpose(split, (2, 0, 3, 1, 4)), 3)
            seen = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / size**0.5, axis=-1)
            joined = ops.transpose(ops.matmul(seen, v), (0, 2, 1, 3))
            return self.out(ops.reshape(joined, (-1, tokens, WIDTH)))

    class Encoder(layers.Layer):  # type: ignore[misc]
        """A block that cannot be looked into."""

        def build(self, shape: Any) -> None:
            self.mix = self.add_weight(shape=(shape[-1], shape[-1]), name="mix")

        def call(self, x: Any) -> Any:
            seen = tf.nn.softmax(tf.matmul(x, x, transpose_b=True))
            return x + tf.tanh(tf.tensordot(tf.matmul(seen, x), tf.convert_to_tensor(self.mix), 1))

    class Patches(layers.Layer):  # type: ignore[misc]
        """Cuts an image into patches."""

        def call(self, x: Any) -> Any:
            cut = ops.image.extract_patches(x, SIDE)
            return ops.reshape(cut, (ops.shape(x)[0], PATCHES, SIDE * SIDE * x.shape[-1]))

    return {one.__name__: one for one in (ClassToken, Positions, SelfAttention, Encoder, Patches)}


@pytest.fixture(scope="module")
def custom() -> dict[str, Any]:
    return define_custom_layers()


def embedded(how: str, custom: dict[str, Any], inputs: Any) -> Any:
    """An image (images, rows, columns, 3) -> tokens (images, patches, width), in one of several ways."""
    import keras

    layers, ops = keras.layers, keras.ops
    if how == "convolution":
        return layers.Reshape((PATCHES, WIDTH))(layers.Conv2D(WIDTH, SIDE, SIDE, name="patches")(inputs))
    if how == "layer":
        return layers.Dense(WIDTH)(custom["Patches"]()(inputs))
    cut = ops.reshape(inputs, (-1, GRID[0], SIDE, GRID[1], SIDE, 3))
    cut = ops.transpose(cut, (0, 1, 3, 2, 4, 5))
    return layers.Dense(WIDTH)(ops.reshape(cut, (-1, PATCHES, SIDE * SIDE * 3)))


def block(number: int, custom: dict[str, Any], x: Any, heads: int = 0) -> Any:
    """One encoder block; attention written out where it has `heads`, else Keras's."""
    import keras

    layers = keras.layers
    y = layers.LayerNormalization(name=f"before{number}")(x)
    y = custom["SelfAttention"](heads)(y) if heads else layers.MultiHeadAttention(2, 4)(y, y)
    x = layers.Add(name=f"attended{number}")([x, y])
    y = layers.LayerNormalization(name=f"after{number}")(x)
    y = layers.Dense(WIDTH)(layers.Dense(2 * WIDTH, "gelu")(y))
    return layers.Add(name=f"block{number}")([x, layers.Dropout(0.1)(y)])


def transformer(how: str, pooling: str, custom: dict[str, Any], heads: int = 0) -> Any:
    import keras

    keras.utils.set_random_seed(6)
    inputs = keras.Input((ROWS, COLUMNS, 3))
    x = embedded(how, custom, inputs)
    if pooling == "class token":
        x = custom["ClassToken"]()(x)
    x = custom["Positions"]()(x)
    for number in (1, 2):
        x = block(number, custom, x, heads)
    x = keras.layers.LayerNormalization(name="last")(x)
    x = x[:, 0] if pooling == "class token" else keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, "softmax", name="scores")(x))


def agrees(
    network: Any, model: Any, tape_gradients: Callable[..., Any], layer: str, grid: Any = GRID
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, ROWS, COLUMNS, 3), np.uint8)
    computed = network.compute(pixels, ALL_CLASSES)
    inputs = pixels / np.float32(127.5) - 1
    expected = tape_gradients(
        model, inputs, model.get_layer(layer), head=model.get_layer("scores"), grid=grid
    )
    assert_allclose(computed.scores, expected.scores, atol=1e-5 * np.abs(expected.scores).max())
    assert np.ptp(expected.raw, axis=(2, 3)).min() > 0
    assert_allclose(computed.raw, expected.raw, atol=1e-5 * np.abs(expected.raw).max())


class TestTransformers:
    @pytest.mark.parametrize("how", ["convolution", "layer", "operations"])
    @pytest.mark.parametrize(("pooling", "layer"), [("class token", "before2"), ("average", "last")])
    def test_the_last_tokens_that_all_speak_for_the_scores_are_explained_as_a_grid(
        self, pooling: str, layer: str, how: str, custom: dict[str, Any], wrap: Wrap, tape_gradients: Any
    ) -> None:
        model = transformer(how, pooling, custom)
        network = wrap(model)
        assert network.facts.default_layer == layer
        assert network.facts.map_size == GRID
        assert network._target("auto").prefix == (pooling == "class token")
        agrees(network, model, tape_gradients, layer)

    @pytest.mark.parametrize("heads", [1, 2])
    def test_attention_that_is_written_out_is_seen_as_such(
        self, heads: int, custom: dict[str, Any], wrap: Wrap, tape_gradients: Any
    ) -> None:
        model = transformer("convolution", "average", custom, heads)
        network = wrap(model)
        assert network.facts.default_layer == "last"
        agrees(network, model, tape_gradients, "last")
        places = network._layers.by_slot.values()
        assert {(one.rows, one.columns) for one in places} == {GRID}

    def test_the_map_changes_where_a_patch_changes(self, custom: dict[str, Any], wrap: Wrap) -> None:
        network = wrap(transformer("convolution", "average", custom))
        pixels = np.full((2, ROWS, COLUMNS, 3), 128, np.uint8)
        pixels[1, 2 * SIDE : 3 * SIDE, 4 * SIDE : 5 * SIDE] = np.arange(SIDE)[:, None, None] * 60
        raw = network.compute(pixels, ALL_CLASSES).raw
        changed = np.abs(raw[1] - raw[0]).max(0)
        assert np.unravel_index(changed.argmax(), GRID) == (2, 4)

    def test_a_token_behind_the_patches_does_not_shift_the_grid(
        self, custom: dict[str, Any], wrap: Wrap, tape_gradients: Any
    ) -> None:
        import keras

        layers = keras.layers
        inputs = keras.Input((ROWS, COLUMNS, 3))
        patches = embedded("convolution", custom, inputs)
        x = layers.Concatenate(axis=1)([patches, layers.Dense(WIDTH)(patches[:, :1])])
        x = layers.LayerNormalization(name="last")(layers.Add()([x, layers.MultiHeadAttention(2, 4)(x, x)]))
        model = keras.Model(inputs, layers.Dense(3, name="scores")(layers.Flatten()(x)))
        network = wrap(model)
        assert network.facts.map_size == GRID
        assert network._target("auto").prefix == 0
        pixels = np.random.default_rng(1).integers(0, 256, (2, ROWS, COLUMNS, 3), np.uint8)
        expected = tape_gradients(
            model, pixels / np.float32(127.5) - 1, model.get_layer("last"), grid=(25, 1)
        )
        raw = network.compute(pixels, ALL_CLASSES).raw
        kernel = model.get_layer("scores").get_weights()[0].reshape(25, WIDTH, 3)[:PATCHES].mean(0)
        maps = np.einsum("ntc,ck->nkt", expected.activations[:, :PATCHES, 0], kernel).reshape(2, 3, *GRID)
        assert_allclose(raw, maps, atol=1e-5 * np.abs(maps).max())

    def test_attention_over_the_map_of_convolutions(
        self, custom: dict[str, Any], wrap: Wrap, tape_gradients: Any
    ) -> None:
        import keras

        layers = keras.layers
        inputs = keras.Input((ROWS, COLUMNS, 3))
        x = layers.Conv2D(WIDTH, 3, 2, "same", activation="relu")(inputs)
        x = layers.Conv2D(WIDTH, 3, 2, "same", activation="relu")(x)
        x = block(1, custom, layers.Reshape((PATCHES, WIDTH))(x))
        model = keras.Model(inputs, layers.Dense(3, name="scores")(layers.GlobalAveragePooling1D()(x)))
        assert wrap(model).facts.default_layer == "block1"
        agrees(wrap(model), model, tape_gradients, "block1")

    def test_a_map_that_tokens_were_made_into_again(
        self, custom: dict[str, Any], wrap: Wrap, tape_gradients: Any
    ) -> None:
        import keras

        layers = keras.layers
        inputs = keras.Input((ROWS, COLUMNS, 3))
        x = layers.Reshape((*GRID, WIDTH), name="map")(
            block(1, custom, embedded("convolution", custom, inputs), heads=2)
        )
        model = keras.Model(inputs, layers.Dense(3, name="scores")(layers.GlobalMaxPooling2D()(x)))
        assert wrap(model).facts.default_layer == "map"
        agrees(wrap(model), model, tape_gradients, "map", grid=None)

    def test_tokens_that_dense_layers_mix(
        self, custom: dict[str, Any], wrap: Wrap, tape_gradients: Any
    ) -> None:
        """As in an MLP-mixer, arXiv 2105.01601."""
        import keras

        layers = keras.layers
        inputs = keras.Input((ROWS, COLUMNS, 3))
        x = embedded("convolution", custom, inputs)
        y = layers.Permute((2, 1))(layers.LayerNormalization()(x))
        y = layers.Permute((2, 1))(layers.Dense(PATCHES)(layers.Dense(12, "gelu")(y)))
        x = layers.LayerNormalization(name="last")(layers.Add()([x, y]))
        model = keras.Model(inputs, layers.Dense(3, name="scores")(layers.GlobalAveragePooling1D()(x)))
        assert wrap(model).facts.default_layer == "last"
        agrees(wrap(model), model, tape_gradients, "last")


class TestNeverThePatchEmbedding:
    REFUSED = r"sequence of tokens, and no layer after an attention.* Name a target layer. \d+ layers can be"

    @pytest.mark.parametrize("pooling", ["class token", "average"])
    def test_opaque_encoders_are_refused_with_the_layers_that_can_be_explained(
        self, pooling: str, custom: dict[str, Any], wrap: Wrap, tape_gradients: Any
    ) -> None:
        import keras

        layers = keras.layers
        inputs = keras.Input((ROWS, COLUMNS, 3))
        x = embedded("convolution", custom, inputs)
        x = custom["ClassToken"]()(x) if pooling == "class token" else x
        x = custom["Encoder"](name="two")(custom["Encoder"](name="one")(x))
        x = x[:, 0] if pooling == "class token" else layers.GlobalAveragePooling1D()(x)
        model = keras.Model(inputs, layers.Dense(3, name="scores")(x))
        with pytest.raises(NetworkIncompatible, match=self.REFUSED) as refused:
            wrap(model)
        assert "one, two" in str(refused.value)
        agrees(wrap(model, "one"), model, tape_gradients, "one")

    @pytest.mark.parametrize("how", ["convolution", "dense"])
    def test_an_encoder_that_gives_but_one_vector_is_refused(
        self, how: str, custom: dict[str, Any], wrap: Wrap
    ) -> None:
        import keras
        import tensorflow as tf

        vector = custom["Encoder"]()
        tokens_of = vector.call
        vector.call = lambda x: tf.reduce_mean(tokens_of(x), 1)
        layers = keras.layers
        inputs = keras.Input((ROWS, COLUMNS, 3))
        if how == "convolution":
            x = embedded("convolution", custom, inputs)
        else:
            x = layers.Dense(WIDTH)(keras.ops.image.extract_patches(inputs, SIDE))
            x = layers.Reshape((PATCHES, WIDTH))(x)
        model = keras.Model(inputs, layers.Dense(3)(vector(x)))
        with pytest.raises(NetworkIncompatible, match="keeps rows and columns and has weights"):
            wrap(model)

    def test_one_attention_whose_class_token_alone_is_read_leaves_only_what_was_before_it(
        self, custom: dict[str, Any], wrap: Wrap
    ) -> None:
        import keras

        inputs = keras.Input((ROWS, COLUMNS, 3))
        x = block(1, custom, custom["ClassToken"]()(embedded("convolution", custom, inputs)))
        model = keras.Model(inputs, keras.layers.Dense(3)(x[:, 0]))
        with pytest.raises(NetworkIncompatible, match=self.REFUSED):
            wrap(model)
