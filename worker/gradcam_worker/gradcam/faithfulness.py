"""How faithful a heatmap is: deletion and insertion, Petsiuk et al. (RISE), section 3.3 of arXiv 1806.07421.

Deletion takes the pixels away, the hottest first, and watches the probability of the class: it falls soon
where the heatmap is right, so the area under the curve is small. Insertion brings them back into a blurred
picture: there the area is large. Both areas lie in [0, 1].

Departures: pixels go in `STEPS` equal parts instead of one row's worth at a time; those that are equally hot
go in a fixed random order, not from the top down.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.explain import Explanation, to_probabilities
from gradcam_worker.gradcam.imaging.overlay import enlarge

METRICS = ("deletion", "insertion")
STEPS = 32  # parts in which the pixels go; so 33 pictures for a class and metric
BATCH = 16  # pictures scored at once
GREY = 127  # what is left where a pixel was deleted
BLUR = 0.05  # standard deviation of the blur, as a part of the picture's longer side: about 11 of 224 pixels

Pixels = NDArray[np.uint8]
Score = Callable[[Pixels], NDArray[np.float32]]  # pixels (n, height, width, channels) -> scores (n, classes)


def measure(
    score: Score, pixels: Pixels, seen: Explanation, metrics: Sequence[str]
) -> list[dict[str, float]]:
    """The metrics of each of k explained classes, in their order.

    `pixels` (height, width, channels) are the picture as the network got it, `score` is `Network.scores`.
    """
    blurred = cv2.GaussianBlur(pixels, (0, 0), BLUR * max(pixels.shape[:2])).reshape(pixels.shape)
    empty = {"deletion": np.full_like(pixels, GREY), "insertion": blurred}
    height, width, _ = pixels.shape
    found = []
    for one, heatmap in zip(seen.explained, seen.shown, strict=True):
        turns = _turns(enlarge(heatmap, (height, width)))
        areas = {}
        for metric in metrics:
            before, after = (pixels, empty[metric]) if metric == "deletion" else (empty[metric], pixels)
            curve = _curve(score, before, after, turns, seen.network.head, one.id)
            areas[metric] = float(f"{np.trapezoid(curve, dx=1 / STEPS):.6g}")
        found.append(areas)
    return found


def _turns(heat: NDArray[np.float32]) -> NDArray[np.int32]:
    """At which step each pixel goes, (height, width): from 1, the hottest, to `STEPS`."""
    lots = np.random.default_rng(0).permutation(heat.size)
    order = np.lexsort((lots, -heat.ravel()))
    turns = np.empty(heat.size, np.int32)
    turns[order] = np.arange(heat.size) * STEPS // heat.size + 1
    return turns.reshape(heat.shape)


def _curve(
    score: Score, before: Pixels, after: Pixels, turns: NDArray[np.int32], head: str, class_id: int
) -> NDArray[np.float64]:
    """The probability of the class with 0, 1, ... `STEPS` parts of `before` replaced by `after`."""
    curve = []
    for first in range(0, STEPS + 1, BATCH):
        steps = np.arange(first, min(first + BATCH, STEPS + 1)).reshape(-1, 1, 1, 1)
        pictures = np.where(turns[..., np.newaxis] <= steps, after, before)
        curve.append(to_probabilities(score(pictures).astype(np.float64), head)[:, class_id])
    return np.concatenate(curve)
