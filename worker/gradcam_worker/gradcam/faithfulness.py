"""The faithfulness of a heatmap: deletion and insertion, of RISE (arXiv 1806.07421, section 3.3).

Deletion removes the pixels, the hottest first. If the heatmap is right, the probability of the class falls
soon, and the area under its curve is small. Insertion adds the pixels to a blurred image; there the area is
large. Both areas lie in [0, 1].

Differences from the paper: pixels are replaced in `STEPS` equal parts, not as many at a time as a row has;
equally hot pixels are replaced in a fixed random order, not from the top down.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.imaging.resize import enlarge
from gradcam_worker.gradcam.probabilities import to_probabilities

METRICS = ("deletion", "insertion")
STEPS = 32  # so 33 images are scored for each class and metric
BATCH = 16  # images scored at once
GREY = 127  # level of deleted pixels
BLUR = 0.05  # standard deviation, as a share of the longer side: about 11 of 224 pixels

Pixels = NDArray[np.uint8]
Score = Callable[[Pixels], NDArray[np.float32]]  # pixels (n, height, width, channels) -> scores (n, classes)


def measure(
    score: Score, pixels: Pixels, explanation: Explanation, metrics: Sequence[str]
) -> list[dict[str, float]]:
    """Measure the faithfulness of an explanation.

    Args:
        score: `Network.scores`.
        pixels: The input of the network for the image, (height, width, channels), uint8.
        explanation: With k explained classes.
        metrics: Names from `METRICS`.

    Returns:
        The area under the curve of each metric, from 0 to 1, for each of the k classes.
    """
    blurred = cv2.GaussianBlur(pixels, (0, 0), BLUR * max(pixels.shape[:2])).reshape(pixels.shape)
    height, width, _ = pixels.shape
    start_and_end = {"deletion": (pixels, np.full_like(pixels, GREY)), "insertion": (blurred, pixels)}
    results = []
    for prediction, heatmap in zip(explanation.explained, explanation.shown, strict=True):
        replaced_at = _replacement_steps(enlarge(heatmap, (height, width)))
        areas = {}
        for metric in metrics:
            before, after = start_and_end[metric]
            curve = _curve(score, before, after, replaced_at, explanation.network.head, prediction.id)
            areas[metric] = float(f"{np.trapezoid(curve, dx=1 / STEPS):.6g}")
        results.append(areas)
    return results


def _replacement_steps(heatmap: NDArray[np.float32]) -> NDArray[np.int32]:
    """The step at which each pixel is replaced, (height, width): from 1, the hottest, to `STEPS`."""
    tie_breakers = np.random.default_rng(0).permutation(heatmap.size)
    order = np.lexsort((tie_breakers, -heatmap.ravel()))
    steps = np.empty(heatmap.size, np.int32)
    steps[order] = np.arange(heatmap.size) * STEPS // heatmap.size + 1
    return steps.reshape(heatmap.shape)


def _curve(
    score: Score, before: Pixels, after: Pixels, replaced_at: NDArray[np.int32], head: str, class_id: int
) -> NDArray[np.float64]:
    """The probability of a class with 0, 1, ... `STEPS` parts of `before` replaced by `after`."""
    curve = []
    for first in range(0, STEPS + 1, BATCH):
        steps = np.arange(first, min(first + BATCH, STEPS + 1)).reshape(-1, 1, 1, 1)
        images = np.where(replaced_at[..., np.newaxis] <= steps, after, before)
        curve.append(to_probabilities(score(images).astype(np.float64), head)[:, class_id])
    return np.concatenate(curve)
