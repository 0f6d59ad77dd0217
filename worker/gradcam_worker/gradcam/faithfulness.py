"""The faithfulness of a heatmap: deletion and insertion, and the drop and increase in confidence.

Deletion and insertion are of RISE (arXiv 1806.07421, section 3.3).

Deletion removes the pixels, the hottest first. If the heatmap is right, the probability of the class falls
soon, and the area under its curve is small. Insertion adds the pixels to a blurred image; there the area is
large. Both areas lie in [0, 1].

Differences from the paper: pixels are replaced in `STEPS` equal parts, not as many at a time as a row has;
equally hot pixels are replaced in a fixed random order, not from the top down.

The drop and the increase in confidence are of Grad-CAM++ (arXiv 1710.11063, section 4.1). The image is
multiplied with its heatmap, so that what is not hot becomes black. With the probability Y of the class for
the image and O for the product, `confidence_drop` is max(0, Y - O) / Y, from 0 to 1, and
`confidence_increase` is 1 if O > Y, else 0. Their means over many images are the paper's Average Drop and
Increase in Confidence, as shares. Masked pixels are rounded to whole levels.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.imaging.baseline import GREY, blurred, to_levels
from gradcam_worker.gradcam.imaging.resize import enlarge
from gradcam_worker.gradcam.network import InputPixels
from gradcam_worker.gradcam.probabilities import to_probabilities

CURVES = ("deletion", "insertion")
METRICS = (*CURVES, "confidence_drop", "confidence_increase")
STEPS = 32  # so 33 images are scored for each class and metric
BATCH = 16  # images scored at once

# pixels (n, height, width, channels) -> scores (n, classes)
Score = Callable[[InputPixels], NDArray[np.float32]]


def measure(
    score: Score, pixels: InputPixels, explanation: Explanation, metrics: Sequence[str]
) -> list[dict[str, float]]:
    """Measure the faithfulness of an explanation.

    Args:
        score: `Network.scores`.
        pixels: The input of the network for the image, (height, width, channels), uint8.
        explanation: With k explained classes.
        metrics: Names from `METRICS`.

    Returns:
        The value of each metric, from 0 to 1, for each of the k classes: of deletion and insertion, the area
        under the curve.
    """
    shape = pixels.shape[0], pixels.shape[1]
    enlarged = [enlarge(heatmap, shape) for heatmap in explanation.scaled]
    curves = [metric for metric in metrics if metric in CURVES]
    areas = _areas(score, pixels, explanation, enlarged, curves) if curves else [{} for _ in enlarged]
    if len(curves) == len(metrics):
        return areas
    changes = _changes_of_confidence(score, pixels, explanation, enlarged)
    values = [{**area, **change} for area, change in zip(areas, changes, strict=True)]
    return [{metric: value[metric] for metric in metrics} for value in values]


def _areas(
    score: Score,
    pixels: InputPixels,
    explanation: Explanation,
    heatmaps: Sequence[NDArray[np.float32]],
    metrics: Sequence[str],
) -> list[dict[str, float]]:
    """The area under each curve, for each class."""
    start_and_end = {"deletion": (pixels, np.full_like(pixels, GREY)), "insertion": (blurred(pixels), pixels)}
    results = []
    for prediction, heatmap in zip(explanation.explained, heatmaps, strict=True):
        replaced_at = _replacement_steps(heatmap)
        areas = {}
        for metric in metrics:
            before, after = start_and_end[metric]
            curve = _curve(score, before, after, replaced_at, explanation.network.head, prediction.id)
            areas[metric] = float(f"{np.trapezoid(curve, dx=1 / STEPS):.6g}")
        results.append(areas)
    return results


def _changes_of_confidence(
    score: Score, pixels: InputPixels, explanation: Explanation, heatmaps: Sequence[NDArray[np.float32]]
) -> list[dict[str, float]]:
    """The drop and the increase in confidence, for each class."""
    products = [to_levels(pixels * np.clip(heatmap, 0, 1)[..., np.newaxis], pixels) for heatmap in heatmaps]
    images = [pixels, *products]
    scores = np.concatenate(
        [score(np.stack(images[first : first + BATCH])) for first in range(0, len(images), BATCH)]
    )
    before, *after = to_probabilities(scores.astype(np.float64), explanation.network.head)
    changes = []
    for prediction, probabilities in zip(explanation.explained, after, strict=True):
        whole, masked = before[prediction.id], probabilities[prediction.id]
        drop = max(whole - masked, 0) / whole if whole else 0.0
        increase = float(masked > whole)
        changes.append({"confidence_drop": float(f"{drop:.6g}"), "confidence_increase": increase})
    return changes


def _replacement_steps(heatmap: NDArray[np.float32]) -> NDArray[np.int32]:
    """The step at which each pixel is replaced, (height, width): from 1, the hottest, to `STEPS`."""
    tie_breakers = np.random.default_rng(0).permutation(heatmap.size)
    order = np.lexsort((tie_breakers, -heatmap.ravel()))
    steps = np.empty(heatmap.size, np.int32)
    steps[order] = np.arange(heatmap.size) * STEPS // heatmap.size + 1
    return steps.reshape(heatmap.shape)


def _curve(
    score: Score,
    before: InputPixels,
    after: InputPixels,
    replaced_at: NDArray[np.int32],
    head: str,
    class_id: int,
) -> NDArray[np.float64]:
    """The probability of a class with 0, 1, ... `STEPS` parts of `before` replaced by `after`."""
    curve = []
    for first in range(0, STEPS + 1, BATCH):
        steps = np.arange(first, min(first + BATCH, STEPS + 1)).reshape(-1, 1, 1, 1)
        images = np.where(replaced_at[..., np.newaxis] <= steps, after, before)
        curve.append(to_probabilities(score(images).astype(np.float64), head)[:, class_id])
    return np.concatenate(curve)
