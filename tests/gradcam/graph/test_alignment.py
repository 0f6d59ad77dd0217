"""A network that moves its own input is refused, however it does so; one that only scales it is not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible
from tests.gradcam.small_networks import Wrap, add_classifier

SIDE = 32
REFUSED = "crops, pads, shifts or turns its input"


def cells(rows: int, columns: int) -> NDArray[np.float32]:
    """The places of a grid that lies on the image."""
    middles = ((np.arange(count) + 0.5) / count for count in (rows, columns))
    return np.stack(np.meshgrid(*middles, indexing="ij")).astype(np.float32)


@pytest.fixture
def misplaced() -> Callable[..., str | None]:
    """What is told of the places of a grid's cells."""
    from gradcam_worker.gradcam.graph.alignment import misplaced  # it imports keras: not at collection

    return misplaced


@pytest.mark.tensorflow
class TestPositions:
    """What is made of the places of a grid's cells."""

    def test_what_lies_on_the_image_is_well(self, misplaced: Callable[..., str | None]) -> None:
        assert misplaced(cells(8, 4)) is None

    def test_what_is_elsewhere_is_told_with_both_places(self, misplaced: Callable[..., str | None]) -> None:
        told = misplaced(np.roll(cells(8, 8), 4, axis=2))
        before = "what is 6% from the top and 56% from the left of the input"
        assert told == f"{before} acts 6% from its top and 6% from its left"

    @pytest.mark.parametrize("turned", [lambda x: x[::-1], lambda x: x[:, ::-1], lambda x: x[:, :, ::-1]])
    def test_swapped_and_mirrored_axes_are_told(
        self, turned: Callable[[Any], Any], misplaced: Callable[..., str | None]
    ) -> None:
        assert misplaced(turned(cells(8, 8)))

    def test_a_part_of_the_image_is_told_where_it_is_off_by_more_than_a_cell(
        self, misplaced: Callable[..., str | None]
    ) -> None:
        from_the_middle = cells(16, 16) - 0.5
        assert misplaced(0.5 + from_the_middle * 0.6)
        assert misplaced(0.5 + from_the_middle * 1.6)
        assert misplaced(0.5 + from_the_middle * 0.9) is None

    def test_what_sees_as_far_around_as_it_is_off_is_not_told(
        self, misplaced: Callable[..., str | None]
    ) -> None:
        part = 0.5 + (cells(16, 16) - 0.5) * 0.6
        assert misplaced(part, spread=0.2) is None

    def test_one_cell_and_no_place_at_all_are_well(self, misplaced: Callable[..., str | None]) -> None:
        assert misplaced(np.full((2, 1, 1), 0.1, np.float32)) is None
        assert misplaced(np.full((2, 4, 4), np.nan, np.float32)) is None


def in_a_layer(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of one's own, which cannot be looked into."""
    import keras

    class Own(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return function(x)

    own: Callable[[Any], Any] = Own()
    return own


def moves() -> dict[str, Callable[[Any], Any]]:
    import keras
    import tensorflow as tf

    layers, ops = keras.layers, keras.ops
    shift = np.array([[1, 0, 10, 0, 1, 0, 0, 0]], np.float32)
    return {
        "Cropping2D": layers.Cropping2D(6),
        "Pipeline": layers.Pipeline([layers.CenterCrop(20, 20)]),
        "ZeroPadding2D": layers.ZeroPadding2D(8),
        "ops.pad": lambda x: ops.pad(x, ((0, 0), (0, 0), (12, 0), (0, 0))),
        "pad_images": lambda x: ops.image.pad_images(x, 5, 5, target_height=48, target_width=48),
        "crop_images": lambda x: ops.image.crop_images(x, 5, 5, target_height=22, target_width=22),
        "resize, cropped": lambda x: ops.image.resize(x, (32, 16), crop_to_aspect_ratio=True),
        "resize, padded": lambda x: ops.image.resize(x, (32, 56), pad_to_aspect_ratio=True),
        "slice": lambda x: x[:, :, 8:],
        "ops.slice": lambda x: ops.slice(x, (0, 8, 0, 0), (1, 24, 32, 3)),
        "split": lambda x: ops.split(x, 2, axis=2)[1],
        "halves as channels": lambda x: layers.Concatenate()([x[:, :, :16], x[:, :, 16:]]),
        "take": lambda x: ops.take(x, np.arange(8, 32), axis=1),
        "rot90": lambda x: ops.rot90(x, axes=(1, 2)),
        "roll": lambda x: ops.roll(x, 10, axis=2),
        "tile": lambda x: ops.tile(x, (1, 1, 2, 1)),
        "affine_transform": lambda x: ops.image.affine_transform(x, shift),
        "tf.image": in_a_layer(lambda x: tf.image.crop_to_bounding_box(x, 8, 8, 24, 24)),
        "tf.reverse": in_a_layer(lambda x: tf.reverse(x, [2])),
        "tf.transpose": in_a_layer(lambda x: tf.transpose(x, (0, 2, 1, 3))),
    }


def scalings() -> dict[str, Callable[[Any], Any]]:
    import keras
    import tensorflow as tf

    layers = keras.layers
    parts = [(slice(row, None, 2), slice(column, None, 2)) for row in (0, 1) for column in (0, 1)]
    return {
        "nothing": layers.Identity(),
        "every other": lambda x: x[:, ::2, ::2],
        "focus": lambda x: layers.Concatenate()([x[:, rows, columns] for rows, columns in parts]),
        "space to depth": in_a_layer(lambda x: tf.nn.space_to_depth(x, 2)),
        "stretched": layers.Resizing(24, 48),
        "padded for a convolution": layers.ZeroPadding2D(2),
        "trimmed": layers.Cropping2D(1),
        "flipped": lambda x: x[:, :, ::-1],
        "augmented": lambda x: layers.RandomFlip()(layers.RandomRotation(0.2)(x)),
        "pooled": layers.AveragePooling2D(2),
    }


def network_behind(front: Callable[[Any], Any], seed: int) -> Any:
    import keras

    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.Conv2D(8, 3, 2, "same", activation="relu")(front(x))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    return keras.Model(inputs, add_classifier(keras, x))


@pytest.mark.tensorflow
class TestNetworks:
    @pytest.mark.parametrize(
        "how",
        [
            "Cropping2D",
            "Pipeline",
            "ZeroPadding2D",
            "ops.pad",
            "pad_images",
            "crop_images",
            "resize, cropped",
            "resize, padded",
            "slice",
            "split",
            "halves as channels",
            "take",
            "rot90",
            "roll",
            "tile",
            "affine_transform",
            "tf.image",
            "tf.reverse",
            "tf.transpose",
        ],
    )
    def test_one_that_moves_its_input_is_refused(self, how: str, wrap: Wrap) -> None:
        with pytest.raises(NetworkIncompatible, match=REFUSED):
            wrap(network_behind(moves()[how], 1))

    @pytest.mark.parametrize(
        "how",
        [
            "nothing",
            "every other",
            "focus",
            "space to depth",
            "stretched",
            "padded for a convolution",
            "trimmed",
            "flipped",
            "augmented",
            "pooled",
        ],
    )
    def test_one_that_only_scales_or_mirrors_it_is_not(self, how: str, wrap: Wrap) -> None:
        assert wrap(network_behind(scalings()[how], 1)).facts.map_size[0] > 4

    @pytest.mark.parametrize("how", ["Cropping2D", "ZeroPadding2D", "slice", "rot90", "roll", "tf.reverse"])
    def test_one_that_moves_a_feature_map_is_refused(self, how: str, wrap: Wrap) -> None:
        import keras

        inputs = keras.Input((SIDE, SIDE, 3))
        x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
        x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(moves()[how](x))
        x = keras.layers.Conv2D(4, 3, 2, padding="same", activation="relu", name="last")(x)
        with pytest.raises(NetworkIncompatible, match=f"{REFUSED}: as seen by the layer last"):
            wrap(keras.Model(inputs, add_classifier(keras, x)))

    def test_a_layer_of_a_job_is_measured_when_it_is_first_asked_for(self, wrap: Wrap) -> None:
        """The last layer is turned back: it alone lies where the image does."""
        import keras

        from gradcam_worker.gradcam.network import Method

        ops = keras.ops
        keras.utils.set_random_seed(1)
        inputs = keras.Input((SIDE, SIDE, 3))
        x = keras.layers.Conv2D(8, 3, padding="same", name="well")(inputs)
        x = keras.layers.Conv2D(8, 3, padding="same", name="turned")(ops.rot90(x, k=2, axes=(1, 2)))
        x = keras.layers.Conv2D(8, 3, padding="same", name="back")(ops.rot90(x, k=2, axes=(1, 2)))
        network = wrap(keras.Model(inputs, add_classifier(keras, x)))
        pixels, wanted = np.zeros((1, SIDE, SIDE, 3), np.uint8), np.array([[0]], np.int32)
        for layer in ("back", "well"):
            assert network.compute(pixels, wanted, Method(layer=layer)).layer == layer
        for _ in range(2):
            with pytest.raises(NetworkIncompatible, match=rf"{REFUSED}: as seen by the layer turned"):
                network.compute(pixels, wanted, Method(layer="turned"))


def known_networks() -> dict[str, Callable[[], Any]]:
    """Of Keras's own layers, with large windows, few filters or great depth: weights may hide any place."""
    import keras

    layers = keras.layers

    def convolutions(side: int, *of_each: dict[str, Any], front: Any = None) -> Callable[[], Any]:
        def build() -> Any:
            inputs = keras.Input((side, side, 3))
            x = front(inputs) if front else inputs
            for each in of_each:
                options = {"filters": 8, "kernel_size": 3, "padding": "same", "activation": "relu", **each}
                x = layers.Conv2D(**options)(x)
            return keras.Model(inputs, add_classifier(keras, x))

        return build

    def large_depthwise() -> Any:
        inputs = keras.Input((24, 24, 3))
        x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
        x = layers.DepthwiseConv2D(31, padding="same", activation="relu")(x)
        return keras.Model(inputs, add_classifier(keras, x))

    def squeezed() -> Any:
        inputs = keras.Input((16, 16, 3))
        x = layers.Conv2D(8, 3, padding="same")(inputs)
        gate = layers.Dense(8, "sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
        return keras.Model(inputs, add_classifier(keras, layers.Multiply()([x, gate])))

    return {
        "deep": convolutions(32, *[{"strides": 2}] * 2, *[{}] * 8),
        "five of 7x7": convolutions(16, *[{"kernel_size": 7}] * 5),
        "three of 9x9": convolutions(16, *[{"kernel_size": 9}] * 3),
        "dilated": convolutions(24, *({"dilation_rate": by} for by in (2, 4, 8))),
        "one filter": convolutions(16, *[{"filters": 1}] * 3),
        "two filters": convolutions(16, *[{"filters": 2}] * 3),
        "without padding": convolutions(32, *[{"padding": "valid"}] * 10),
        "padded before": convolutions(
            32, {"kernel_size": 17, "padding": "valid"}, front=layers.ZeroPadding2D(8)
        ),
        "depthwise": large_depthwise,
        "squeeze and excite": squeezed,
    }


def own_convolution(filters: int, size: int) -> Any:
    """A layer that cannot be looked into."""
    import keras
    import tensorflow as tf

    class Own(keras.layers.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.kernel = self.add_weight(
                shape=(size, size, shape[-1], filters), initializer="he_normal", name="kernel"
            )

        def call(self, x: Any) -> Any:
            return tf.nn.relu(tf.nn.conv2d(x, tf.identity(self.kernel), 1, "SAME"))

        def compute_output_shape(self, shape: Any) -> Any:
            return (*shape[:-1], filters)

    return Own()


def found_in(model: Any, side: int) -> tuple[str | None, bool]:
    """What is told of its last feature map; whether that was measured."""
    from gradcam_worker.gradcam.catalog import Head
    from gradcam_worker.gradcam.graph.alignment import Alignment
    from gradcam_worker.gradcam.graph.graph import run
    from gradcam_worker.gradcam.graph.head import find_logits
    from gradcam_worker.gradcam.graph.target_layer import LayerIndex
    from gradcam_worker.gradcam.graph.trace import trace_model

    index = LayerIndex(find_logits(trace_model(model, (side, side, 3)), Head()))
    graph, asked = index.graph, []

    def values_of(slots: Any) -> Any:
        asked.append(slots)
        noise = np.random.default_rng(0).normal(0, 1, (1, side, side, 3)).astype(np.float32)
        return run(graph.steps_to(slots), {graph.input_slot: noise})

    about = Alignment(graph, values_of)
    *_, last = index.by_slot.values()
    return about.misplaced(last), bool(asked)


@pytest.mark.tensorflow
class TestWeights:
    @pytest.mark.parametrize(
        "name",
        [
            "deep",
            "five of 7x7",
            "three of 9x9",
            "dilated",
            "one filter",
            "two filters",
            "without padding",
            "padded before",
            "depthwise",
            "squeeze and excite",
        ],
    )
    def test_a_network_of_known_layers_is_well_whatever_its_weights_are(self, name: str, wrap: Wrap) -> None:
        model = known_networks()[name]()
        assert found_in(model, model.input_shape[1]) == (None, False)
        wrap(model)

    @pytest.mark.parametrize(("filters", "size", "depth"), [(1, 5, 2), (8, 9, 3), (32, 31, 1)])
    def test_own_convolutions_are_well_with_any_weights(self, filters: int, size: int, depth: int) -> None:
        import keras

        for seed in range(8):
            keras.utils.set_random_seed(seed)
            x = inputs = keras.Input((16, 16, 3))
            for _ in range(depth):
                x = own_convolution(filters, size)(x)
            assert found_in(keras.Model(inputs, add_classifier(keras, x)), 16) == (None, True)

    @pytest.mark.parametrize("how", ["crop", "reverse", "transpose", "roll"])
    def test_an_own_layer_that_moves_its_input_is_refused_with_any_weights_and_at_any_depth(
        self, how: str
    ) -> None:
        import keras
        import tensorflow as tf

        moves_own: dict[str, Callable[[Any], Any]] = {
            "crop": lambda x: x[:, 4:-4, 4:-4],
            "reverse": lambda x: tf.reverse(x, [1]),
            "transpose": lambda x: tf.transpose(x, (0, 2, 1, 3)),
            "roll": lambda x: tf.roll(x, 6, 2),
        }
        move = moves_own[how]
        for seed in range(4):
            keras.utils.set_random_seed(seed)
            inputs = keras.Input((16, 16, 3))
            x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
            x = in_a_layer(lambda x: move(tf.identity(x)))(x)
            for _ in range(6):
                x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(x)
            told, measured = found_in(keras.Model(inputs, add_classifier(keras, x)), 16)
            assert told
            assert measured
