"""The shipped photos as networks take them, and how much two explanations of them overlap."""

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.methods import cam

HOT = 0.5  # of the peak

Maps = NDArray[np.float32]


def photographs(size: tuple[int, int]) -> NDArray[np.uint8]:
    """The shipped photos, fitted: (5, height, width, 3)."""
    pictures = [decode(path.read_bytes()).pixels for path in sorted((DATA / "photos").iterdir())]
    return np.stack([fit(pixels, size) for pixels in pictures])


def overlap(one: Maps, other: Maps) -> float:
    """Intersection over union of the regions above half the peak, the mean over maps (n, rows, columns)."""
    hot = [np.stack([cam.heatmaps(raw[np.newaxis])[0] for raw in maps]) > HOT for maps in (one, other)]
    both, either = (hot[0] & hot[1]).sum((1, 2)), (hot[0] | hot[1]).sum((1, 2))
    return float(np.mean(np.where(either > 0, both / np.maximum(either, 1), 1)))
