"""The forward pass of a network alone, and the same with explanations, to be measured beside each other."""

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from devtools.bench.timing import Variant
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.methods.gradients import compiled
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.network import Method

SEED = 0
FORWARD, OURS = "forward", "ours, top "  # names of variants

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


class Variants:
    """What can be measured of one network; every variant runs on the very same weights, in memory once."""

    def __init__(self, network: KerasNetwork) -> None:
        self._network, self.model = network, network._model  # noqa: SLF001  # the model and nothing else
        signature = [((None, *network.facts.input_size, 3), "float32")]
        self._forward = compiled(partial(self.model, training=False), signature, self.model.variables)

    def forward(self, batch: int, repeats: int) -> Variant:
        """The Keras model and nothing else; its input is on the device already."""
        images = keras.ops.convert_to_tensor(prepared(self._network, self._pixels(batch)))

        def run() -> object:
            return self._forward(images)()

        return Variant(FORWARD, batch, repeats, run)

    def beside_ours(self, batch: int, tops: tuple[int, ...], repeats: int) -> Iterator[Variant]:
        """The forward pass, and `Network.compute`: pixels in, scores and heatmaps out."""
        yield self.forward(batch, repeats)
        for top in tops:
            compute = partial(self._network.compute, self._pixels(batch), best(batch, top))
            yield Variant(f"{OURS}{top}", batch, repeats, compute)

    def beside_methods(self, batch: int, top: int, repeats: int) -> Iterator[Variant]:
        """The forward pass, and every method."""
        yield self.forward(batch, repeats)
        for method in cam.METHODS:
            compute = partial(self._network.compute, self._pixels(batch), best(batch, top), Method(method))
            yield Variant(method, batch, repeats, compute)

    def _pixels(self, batch: int) -> Pixels:
        return noise(batch, self._network.facts.input_size)
