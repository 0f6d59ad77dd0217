"""The formulas: Grad-CAM and its family, each with its source and its departures from it.

Each takes `ops`, the array operations to compute with: `keras.ops` on the device, or plain `numpy`
(both spell `mean`, `sum` and `einsum` alike), so that a test can compute the same formula in float64.

`activations` A, (n, rows, columns, channels), are the target layer's output for n images; `gradients` G,
(k, n, rows, columns, channels), are d score / d A for k classes of each image. Each returns the map before
its final ReLU, (n, k, rows, columns): the ReLU is left to `heatmaps`, so that the raw minimum and maximum
are known too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

TINY = 1e-12  # keeps a division by zero from becoming NaN; far below any real activation or gradient


def gradcam(ops: Any, activations: Any, gradients: Any) -> Any:
    """Grad-CAM, equations 1 and 2 of Selvaraju et al., arXiv 1610.02391."""
    weights = ops.mean(gradients, axis=(2, 3))  # eq. 1: (k, n, channels)
    return ops.einsum("nhwc,knc->nkhw", activations, weights)  # eq. 2


def counterfactual(ops: Any, activations: Any, gradients: Any) -> Any:
    """What speaks against the class: Grad-CAM of the negated gradients, section 3.3 of arXiv 1610.02391."""
    return gradcam(ops, activations, -gradients)


def gradcam_plus_plus(ops: Any, activations: Any, gradients: Any) -> Any:
    """Grad-CAM++, equations 10 and 19 of Chattopadhyay et al., arXiv 1710.11063.

    Departure: the factor exp(score), the same for the whole map, is left out of the weights; it could
    overflow, and goes with the division by the peak.
    """
    square, cube = gradients**2, gradients**3
    sums = ops.sum(activations, axis=(1, 2), keepdims=True)  # (n, 1, 1, channels)
    below = 2 * square + sums * cube
    there = ops.abs(below) > TINY
    alphas = ops.where(there, square / ops.where(there, below, 1), 0)  # eq. 19
    weights = ops.sum(alphas * ops.maximum(gradients, 0), axis=(2, 3))  # eq. 10
    return ops.einsum("nhwc,knc->nkhw", activations, weights)


def hirescam(ops: Any, activations: Any, gradients: Any) -> Any:
    """HiResCAM, Draelos and Carin, arXiv 2011.08891: the gradients are not averaged over positions."""
    return ops.einsum("nhwc,knhwc->nkhw", activations, gradients)


def xgradcam(ops: Any, activations: Any, gradients: Any) -> Any:
    """XGrad-CAM, equation 8 of Fu et al., arXiv 2008.02312: gradients weighted by their activations.

    Departure: a channel that is dark everywhere has weight 0, not 0 / 0.
    """
    sums = ops.sum(activations, axis=(1, 2))  # (n, channels)
    there = ops.abs(sums) > TINY
    products = ops.einsum("nhwc,knhwc->knc", activations, gradients)
    weights = ops.where(there, products / ops.where(there, sums, 1), 0)
    return ops.einsum("nhwc,knc->nkhw", activations, weights)


def layercam(ops: Any, activations: Any, gradients: Any) -> Any:
    """LayerCAM, equations 4 and 5 of Jiang et al., doi 10.1109/TIP.2021.3089943: positive gradients only."""
    return ops.einsum("nhwc,knhwc->nkhw", activations, ops.maximum(gradients, 0))


METHODS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "gradcam": gradcam,
    "counterfactual": counterfactual,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "xgradcam": xgradcam,
    "layercam": layercam,
}
SCORES = ("logit", "probability")
NORMALIZE = ("per_class", "joint", "none")


def heatmaps(raw: NDArray[np.float32], normalize: str = "per_class") -> NDArray[np.float32]:
    """Raw maps (k, rows, columns) -> heatmaps (k, rows, columns): ReLU, then division by the peak.

    `per_class` divides each map by its own peak, `joint` all by the highest peak among them, so that
    classes can be compared; both lie in [0, 1]. `none` does not divide. A map with no positive value,
    where nothing speaks for the class, becomes all zeros.
    """
    positive = np.maximum(raw, 0)
    if normalize == "none":
        return np.asarray(positive, np.float32)
    peak = positive.max(axis=(-2, -1) if normalize == "per_class" else None, keepdims=True)
    return np.asarray(np.divide(positive, peak, out=np.zeros_like(positive), where=peak > 0), np.float32)
