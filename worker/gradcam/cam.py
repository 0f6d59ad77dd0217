"""The formulas.

Each takes `ops`, the array operations to compute with: `keras.ops` on the device, or plain `numpy`
(both spell `mean` and `einsum` alike), so that a test can compute the same formula in float64.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def gradcam(ops: Any, activations: Any, gradients: Any) -> Any:
    """Grad-CAM before its ReLU: equations 1 and 2 of Selvaraju et al., arXiv 1610.02391.

    `activations` A, (n, height, width, channels), are the target layer's output for n images;
    `gradients`, (k, n, height, width, channels), are d score / d A for k classes of each image.
    Returns (n, k, height, width).

    Departure from the paper: the ReLU of equation 2 is left to `heatmaps`, so that the raw minimum
    and maximum are known too.
    """
    weights = ops.mean(gradients, axis=(2, 3))  # eq. 1: (k, n, channels)
    return ops.einsum("nhwc,knc->nkhw", activations, weights)  # eq. 2


def heatmaps(raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Raw maps (k, height, width) -> heatmaps (k, height, width) in [0, 1]: ReLU, then divide by the peak.

    A map with no positive value, where nothing speaks for the class, becomes all zeros.
    """
    positive = np.maximum(raw, 0)
    peak = positive.max(axis=(-2, -1), keepdims=True)
    return np.asarray(np.divide(positive, peak, out=np.zeros_like(positive), where=peak > 0), np.float32)
