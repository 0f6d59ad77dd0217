"""The dataset that a backfill would leave of drawn shapes, with the real heatmaps of a network."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from devtools import synthetic_dataset
from devtools.planted.shapes import SIDE, Shapes
from gradcam_worker.gradcam import Network
from gradcam_worker.gradcam.files.weights import file_sha256
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.probabilities import to_probabilities

PASS = 100  # images computed at once


@dataclass(frozen=True)
class Explained:
    """The explanations of the first class of n images."""

    predicted: NDArray[np.int32]  # (n,)
    probabilities: NDArray[np.float32]  # (n,)
    heatmaps: NDArray[np.float32]  # (n, rows, columns), divided by their peaks


def explain(network: Network, pixels: NDArray[np.uint8]) -> Explained:
    """Explain the most probable class of each image."""
    predicted, probabilities, heatmaps = [], [], []
    for first in range(0, len(pixels), PASS):
        part = pixels[first : first + PASS]
        computed = network.compute(part, np.full((len(part), 1), -1, np.int32))
        ids = computed.class_ids[:, 0]
        values = to_probabilities(computed.scores.astype(np.float64), network.facts.head)
        predicted.append(ids)
        probabilities.append(values[np.arange(len(part)), ids])
        heatmaps.append(np.stack([cam.heatmaps(raw, "per_class")[0] for raw in computed.raw]))
    return Explained(
        np.concatenate(predicted).astype(np.int32),
        np.concatenate(probabilities).astype(np.float32),
        np.concatenate(heatmaps).astype(np.float32),
    )


def write_dataset(
    folder: Path,
    network: Network,
    shapes: Shapes,
    *,
    labels: bool = True,
    boxes: bool = True,
    weights_sha256: str | None = None,
) -> Path:
    """Explain images, and write the images and their dataset.

    Args:
        folder: The images go to its folder `images`, the dataset to `dataset`.
        network: Explains them.
        shapes: The images.
        labels: Whether the dataset has their true classes.
        boxes: Whether it has their boxes.
        weights_sha256: Of the file of the network, if it has one.

    Returns:
        The folder of the dataset.
    """
    explained = explain(network, shapes.pixels)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    uris, hashes = [], []
    for number, pixels in enumerate(shapes.pixels):
        file = folder / "images" / f"{number:05}.png"
        cv2.imwrite(str(file), pixels[..., ::-1])
        uris.append(file.absolute().as_uri())
        hashes.append(file_sha256(file))
    images = synthetic_dataset.SyntheticImages(
        predicted=explained.predicted,
        truth=shapes.labels if labels else None,
        probability=explained.probabilities,
        boxes=shapes.boxes / np.float32(SIDE) if boxes else None,
        uris=uris,
        hashes=hashes,
    )
    return synthetic_dataset.write_folder(
        images,
        folder / "dataset",
        heatmaps=explained.heatmaps,
        size=(SIDE, SIDE),
        network={"name": network.facts.name, "layer": "maps", "weights_sha256": weights_sha256},
    )
