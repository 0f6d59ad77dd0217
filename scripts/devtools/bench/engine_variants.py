"""The computations that the engine's bench compares, on the weights of one network."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from devtools.bench.timing import Variant
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.network import Method

# isort: split
# Only now: the lines above keep TensorFlow quiet while it is loaded for the first time.
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

SEED = 0
FORWARD, OURS, EXACT, NOTEBOOK = "forward", "ours", "exact backward", "notebook"

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


def noise(count: int, size: tuple[int, int]) -> Pixels:
    """Seeded noise (count, height, width, 3): as good as any picture for random weights."""
    return np.random.default_rng(SEED).integers(0, 256, (count, *size, 3), np.uint8)


def prepared(network: KerasNetwork, pixels: Pixels) -> Floats:
    """The input of the model by Keras's own preprocessing: a check on ours."""
    return np.asarray(
        keras.applications.imagenet_utils.preprocess_input(
            pixels.astype(np.float32), data_format="channels_last", mode=network.facts.preprocessing
        )
    )


def best(images: int, classes: int) -> NDArray[np.int32]:
    """The wish for the best classes of images, (images, classes): see `ClassIndex.select`."""
    return np.tile(-np.arange(1, classes + 1, dtype=np.int32), (images, 1))


def titled(variant: str, top: int) -> str:
    """A variant's name, for so many classes."""
    return f"{variant}, top {top}"


class Variants:
    """What can be measured of one network; every variant runs on the very same weights, in memory once."""

    def __init__(self, network: KerasNetwork) -> None:
        self.network, self.model = network, network._model  # noqa: SLF001
        self.exact = KerasNetwork(
            network._row,  # noqa: SLF001
            self.model,
            weights_sha256=None,
            exact_backward=True,
        )
        any_batch = tf.TensorSpec((None, *network.facts.input_size, 3), tf.float32)
        alone = partial(self.model, training=False)
        self._forward = tf.function(alone, input_signature=[any_batch], autograph=False)

    def forward(self, batch: int, repeats: int) -> Variant:
        """The Keras model and nothing else; its input is on the device already."""
        images = tf.constant(prepared(self.network, self._pixels(batch)))
        return Variant(FORWARD, batch, repeats, lambda: self._forward(images).numpy())

    def ours(self, batch: int, tops: tuple[int, ...], repeats: int) -> Iterator[Variant]:
        """`Network.compute`: pixels in, scores and heatmaps out."""
        return self._each(OURS, self.network.compute, batch, tops, repeats)

    def exact_backward(self, batch: int, tops: tuple[int, ...], repeats: int) -> Iterator[Variant]:
        """The same without the pooled-gradient shortcut."""
        return self._each(EXACT, self.exact.compute, batch, tops, repeats)

    def methods(self, batch: int, top: int, repeats: int) -> Iterator[Variant]:
        """Every method, as `ours`."""
        pixels, wanted = self._pixels(batch), best(batch, top)
        for method in cam.METHODS:
            yield Variant(
                method, batch, repeats, partial(self.network.compute, pixels, wanted, Method(method))
            )

    def _each(
        self, variant: str, compute: Callable[..., Any], batch: int, tops: tuple[int, ...], repeats: int
    ) -> Iterator[Variant]:
        pixels = self._pixels(batch)
        for top in tops:
            yield Variant(titled(variant, top), batch, repeats, partial(compute, pixels, best(batch, top)))

    def _pixels(self, batch: int) -> Pixels:
        return noise(batch, self.network.facts.input_size)
