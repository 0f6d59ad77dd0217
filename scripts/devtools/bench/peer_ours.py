"""Our own process of `bench peers`. It also leaves behind what the others need: weights, images, classes."""

import re
from itertools import count
from typing import Any

from devtools.bench.peer_serve import Floats, Ids, Work, serve
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.models.loading import load_network

# isort: split
# Only now: the lines above keep TensorFlow quiet while it is loaded for the first time.
import keras
import numpy as np

SEED = 0
IMAGES, CLASSES = 8, 8
OF_NO_BLOCK = re.compile(
    r"(conv2d|batch_normalization)(_\d+)?"
)  # counted over all that the process has built


class Ours:
    """The engine, given pixels: its classes it finds itself, and preprocessing is part of its work."""

    def __init__(self, work: Work) -> None:
        """Load the network with seeded weights, and fill the folder."""
        self._network = load_network(work.network, random_seed=SEED)
        size = self._network.facts.input_size
        self._pixels = np.random.default_rng(SEED).integers(0, 256, (IMAGES, *size, 3), np.uint8)
        leave_behind(self._network, self._pixels, work)

    def explain(self, images: Floats, class_ids: Ids) -> Floats:
        """See `peer_serve.Way`; of the arguments only their sizes are used."""
        images_, classes = class_ids.shape
        wanted = np.tile(-np.arange(1, classes + 1, dtype=np.int32), (images_, 1))
        raw = self._network.compute(self._pixels[: len(images)], wanted).raw
        return np.stack([cam.heatmaps(one) for one in raw])

    def enlarged(self, maps: Floats) -> Floats:
        """See `peer_serve.Way`."""
        return maps


def leave_behind(network: KerasNetwork, pixels: Any, work: Work) -> None:
    """Write weights, preprocessed images and the top classes of each into the folder."""
    prepared = keras.applications.imagenet_utils.preprocess_input(
        pixels.astype(np.float32), data_format="channels_last", mode=network.facts.preprocessing
    )
    best = np.argsort(-network.scores(pixels), axis=1)[:, :CLASSES]
    np.save(work.folder / "images.npy", prepared)
    np.save(work.folder / "class_ids.npy", best.astype(np.int64))
    weights: dict[str, Any] = named_weights(network._model)  # noqa: SLF001
    np.savez(work.folder / "weights.npz", **weights)


def named_weights(model: Any) -> dict[str, Floats]:
    """Layer and kind -> array, in the model's order; layers whose number is an accident are numbered anew."""
    found, numbers = {}, {"conv2d": count(1), "batch_normalization": count(1)}
    for layer in model.layers:
        unnamed = OF_NO_BLOCK.fullmatch(layer.name)
        name = f"{unnamed[1]}-{next(numbers[unnamed[1]])}" if unnamed else layer.name
        for weight in layer.weights:
            found[f"{name}/{weight.name}"] = np.asarray(weight)
    return found


if __name__ == "__main__":
    serve({"ours": Ours})
