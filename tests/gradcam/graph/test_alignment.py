"""A network that moves its own input is refused, however it does so; one that only scales it is not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.graph import alignment
from small_networks import Wrap, classified

SIDE = 32
REFUSED = "crops, pads, shifts or turns its input"


class TestSpots:
    """What the measurement makes of a layer whose cells are means of pixels."""

    @staticmethod
    def seen(move: Callable[[Any], Any], cells: int = 8, *, fine: bool = False) -> str | None:
        about = alignment.trial((SIDE, SIDE, 3))
        moved = move(about.pixels.astype(np.float32))
        rows, columns = (side // cells for side in moved.shape[1:3])
        means = moved.reshape(3, cells, rows, cells, columns, 3).mean((2, 4))
        return alignment.misplaced(alignment.changes(means), about, fine=fine)

    def test_what_lies_on_the_image_is_well(self) -> None:
        assert self.seen(lambda x: x) is None
        assert self.seen(lambda x: x, 16, fine=True) is None

    def test_what_is_elsewhere_is_told_with_both_places(self) -> None:
        told = self.seen(lambda x: np.roll(x, SIDE // 2, axis=2))
        before = "what is 6% from the top and 6% from the left of the input"
        assert told == f"{before} acts 6% from its top and 56% from its left"

    def test_what_is_cut_off_is_told(self) -> None:
        told = self.seen(lambda x: x[:, 8:-8, 8:-8])
        assert told == "what is 6% from the top and 6% from the left of the input does not reach it"

    def test_a_fine_layer_shows_that_its_edges_are_cut(self) -> None:
        edge = lambda x: np.repeat(np.repeat(x[:, 3:-3, 3:-3], 16, 1), 16, 2)  # noqa: E731
        assert "on too small a part" in str(self.seen(edge, 104, fine=True))

    @pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
    def test_a_layer_that_tells_nothing_is_not_refused(self, value: float) -> None:
        about = alignment.trial((SIDE, SIDE, 3))
        assert alignment.misplaced(np.full((3, 4, 4), value), about) is None

    def test_a_layer_that_sees_everything_everywhere_is_not_refused(self) -> None:
        about = alignment.trial((SIDE, SIDE, 3))
        change = np.random.default_rng(0).uniform(0.5, 1, (3, 4, 4))
        assert alignment.misplaced(change, about) is None


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
    return keras.Model(inputs, classified(keras, x))


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
    def test_one_that_moves_its_input_is_refused(self, how: str, by_hand: Wrap) -> None:
        with pytest.raises(NetworkIncompatible, match=REFUSED):
            by_hand(network_behind(moves()[how], 1))

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
    def test_one_that_only_scales_or_mirrors_it_is_not(self, how: str, by_hand: Wrap) -> None:
        assert by_hand(network_behind(scalings()[how], 1)).facts.map_size[0] > 4

    def test_a_layer_of_a_job_is_measured_when_it_is_first_asked_for(self, by_hand: Wrap) -> None:
        """The last layer is turned back: it alone lies where the image does."""
        import keras

        from gradcam_worker.gradcam.network import Method

        ops = keras.ops
        keras.utils.set_random_seed(1)
        inputs = keras.Input((SIDE, SIDE, 3))
        x = keras.layers.Conv2D(8, 3, padding="same", name="well")(inputs)
        x = keras.layers.Conv2D(8, 3, padding="same", name="turned")(ops.rot90(x, k=2, axes=(1, 2)))
        x = keras.layers.Conv2D(8, 3, padding="same", name="back")(ops.rot90(x, k=2, axes=(1, 2)))
        network = by_hand(keras.Model(inputs, classified(keras, x)))
        pixels, wanted = np.zeros((1, SIDE, SIDE, 3), np.uint8), np.array([[0]], np.int32)
        for layer in ("back", "well"):
            assert network.compute(pixels, wanted, Method(layer=layer)).layer == layer
        for _ in range(2):
            with pytest.raises(NetworkIncompatible, match=rf"{REFUSED}: as seen by the layer turned"):
                network.compute(pixels, wanted, Method(layer="turned"))
