"""The parameter-randomisation sanity check of Adebayo et al., arXiv 1810.03292.

The weights of a trained network are shuffled from the head down, one group of layers after the other. An
explanation that stays as it was does not explain what the network has learned.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method

TOP = 3  # classes a photo
HOT = 0.5  # of the peak
# Of EfficientNet-Lite0: down to where each stage shuffles, by the beginnings of the layers' names.
STAGES = {
    "head": ("scores",),
    "last convolution": ("top",),
    "last block": ("block7",),
    "blocks 4 to 6": ("block6", "block5", "block4"),
    "everything": ("block3", "block2", "block1", "stem"),
}

Maps = NDArray[np.float32]


def photographs(size: tuple[int, int], folder: Path = DATA / "photos") -> NDArray[np.uint8]:
    """The shipped photos, fitted: (5, height, width, 3)."""
    pictures = [decode(path.read_bytes()).pixels for path in sorted(folder.iterdir())]
    return np.stack([fit(pixels, size) for pixels in pictures])


def cascade(network: Any) -> Iterator[tuple[str, dict[str, Maps]]]:
    """Raw maps (photos x classes, rows, columns) of every method: as trained, then after each stage.

    The classes are those that the trained network ranked first. The network's weights are shuffled in place.
    """
    pixels = photographs(network.facts.input_size)
    ranked = np.tile(-np.arange(1, TOP + 1, dtype=np.int32), (len(pixels), 1))
    class_ids = network.compute(pixels, ranked).class_ids

    def maps() -> dict[str, Maps]:
        raw = {name: network.compute(pixels, class_ids, Method(name)).raw for name in cam.METHODS}
        return {name: one.reshape(-1, *one.shape[2:]) for name, one in raw.items()}

    yield "as trained", maps()
    rng = np.random.default_rng(0)
    for stage, beginnings in STAGES.items():
        for layer in network._model.layers:  # noqa: SLF001  # what is shuffled is no part of a network's promise
            if layer.weights and layer.name.startswith(beginnings):
                layer.set_weights([shuffled(weight, rng) for weight in layer.get_weights()])
        yield stage, maps()


def shuffled(weight: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """The same numbers in other places."""
    return rng.permutation(weight.ravel()).reshape(weight.shape)


def overlap(one: Maps, other: Maps) -> float:
    """Intersection over union of the regions above half the peak, the mean over maps (n, rows, columns)."""
    hot = [np.stack([cam.heatmaps(raw[np.newaxis])[0] for raw in maps]) > HOT for maps in (one, other)]
    both, either = (hot[0] & hot[1]).sum((1, 2)), (hot[0] | hot[1]).sum((1, 2))
    return float(np.mean(np.where(either > 0, both / np.maximum(either, 1), 1)))


def rank_correlation(one: Maps, other: Maps) -> float:
    """Spearman's, between raw maps (n, rows, columns), the mean."""
    ranks = [maps.reshape(len(maps), -1).argsort(axis=1).argsort(axis=1) for maps in (one, other)]
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]))
