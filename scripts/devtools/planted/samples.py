"""Samples of predictions with known gazes, for tests."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from devtools.synthetic_dataset import gaussian_heatmaps
from gradcam_worker.audit.dataset.samples import ClassSample

GRID = (12, 12)


def sample_of(
    class_id: int,
    centers: NDArray[np.float32],
    *,
    spread: float = 0.1,
    boxes: Sequence[NDArray[np.float32] | None] | None = None,
    features: NDArray[np.float16] | None = None,
    correct: NDArray[np.int8] | None = None,
) -> ClassSample:
    """Images whose heat is around these x, y, as shares of the image; image i is called <class>/<i>."""
    count = len(centers)
    heat = gaussian_heatmaps(centers, np.full(count, spread, np.float32), GRID)
    unknown = np.full(count, np.nan, np.float32)
    return ClassSample(
        class_id=class_id,
        name=f"class_{class_id}",
        predicted=count,
        records=np.arange(count) + 1000 * class_id,
        rows=np.arange(count) + 1000 * class_id,
        indices=np.zeros(count, np.int32),
        heat=(heat / heat.sum((1, 2), keepdims=True)).astype(np.float32),
        features=features,
        correct=np.full(count, -1, np.int8) if correct is None else correct,
        truths=np.full(count, -1, np.int32),
        probabilities=np.full(count, 0.9, np.float32),
        heat_inside=unknown,
        inside_area=unknown,
        at_border=unknown,
        uris=[f"{class_id}/{number}" for number in range(count)],
        hashes=[""] * count,
        boxes=[None] * count if boxes is None else boxes,
    )


def anywhere(count: int, seed: int) -> NDArray[np.float32]:
    """Centres anywhere on the image."""
    return np.random.default_rng(seed).uniform(0.2, 0.8, (count, 2)).astype(np.float32)


def boxes_around(centers: NDArray[np.float32], half: float = 0.15) -> list[NDArray[np.float32] | None]:
    """One box around each centre."""
    return [np.concatenate([center - half, center + half])[None] for center in centers]
