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
    """Grad-CAM of the negated gradients, section 3.3 of Selvaraju et al., arXiv 1610.02391."""
    return gradcam(ops, activations, -gradients)


def gradcam_plus_plus(ops: Any, activations: Any, gradients: Any) -> Any:
    """Grad-CAM++, equations 10 and 19 of Chattopadhyay et al., arXiv 1710.11063.

    Departure: the factor exp(score), the same for the whole map, is left out of the weights; it could
    overflow, and the division by the peak cancels it.
    """
    sums = ops.sum(activations, axis=(1, 2), keepdims=True)  # (n, 1, 1, channels)
    divisor = 2 + sums * gradients  # eq. 19, divided by the square of the gradient, which may underflow
    defined = (gradients != 0) & (ops.abs(divisor) > TINY)
    alphas = ops.where(defined, 1 / ops.where(defined, divisor, 1), 0)
    weights = ops.sum(alphas * ops.maximum(gradients, 0), axis=(2, 3))  # eq. 10
    return ops.einsum("nhwc,knc->nkhw", activations, weights)


def hirescam(ops: Any, activations: Any, gradients: Any) -> Any:
    """HiResCAM, Draelos and Carin, arXiv 2011.08891: the gradients are not averaged over positions."""
    return ops.einsum("nhwc,knhwc->nkhw", activations, gradients)


def xgradcam(ops: Any, activations: Any, gradients: Any) -> Any:
    """XGrad-CAM, equation 8 of Fu et al., arXiv 2008.02312: gradients weighted by their activations.

    Departure: a channel that is zero everywhere has weight 0, not 0 / 0.
    """
    sums = ops.sum(activations, axis=(1, 2))  # (n, channels)
    active = ops.abs(sums) > TINY
    products = ops.einsum("nhwc,knhwc->knc", activations, gradients)
    weights = ops.where(active, products / ops.where(active, sums, 1), 0)
    return ops.einsum("nhwc,knc->nkhw", activations, weights)


def layercam(ops: Any, activations: Any, gradients: Any) -> Any:
    """LayerCAM, equations 4 and 5 of Jiang et al., doi 10.1109/TIP.2021.3089943: positive gradients only."""
    return ops.einsum("nhwc,knhwc->nkhw", activations, ops.maximum(gradients, 0))


def eigencam(ops: Any, activations: Any, gradients: Any) -> Any:
    """EigenCAM, equations 1 and 2 of Muhammad and Yeasin, arXiv 2008.00299.

    The activations, one row for each position and not centred, are projected on their first right singular
    vector. No class and no gradient is used: all k maps of an image are the same.

    Departures: the vector is computed from the smaller of the two Gram matrices, and its sign, which a
    decomposition leaves open, is chosen so that the map's sum is not negative.
    """
    _, rows, columns, channels = activations.shape
    table = ops.reshape(activations, (-1, rows * columns, channels))  # (n, positions, channels)
    if rows * columns <= channels:
        _, vectors = ops.linalg.eigh(ops.einsum("npc,nqc->npq", table, table))
        first = ops.einsum("np,npc->nc", vectors[..., -1], table)  # right singular vector, scaled
        length = ops.sqrt(ops.sum(first**2, axis=-1, keepdims=True))
        first = ops.where(length > TINY, first / ops.maximum(length, TINY), 0)
    else:
        _, vectors = ops.linalg.eigh(ops.einsum("npc,npd->ncd", table, table))
        first = vectors[..., -1]
    maps = ops.reshape(ops.einsum("npc,nc->np", table, first), (-1, 1, rows, columns))
    maps = ops.where(ops.sum(maps, axis=(1, 2, 3), keepdims=True) < 0, -maps, maps)
    return maps + ops.zeros_like(ops.einsum("knhwc->nkhw", gradients))


def notebook(ops: Any, activations: Any, gradients: Any) -> Any:
    """The notebook that this project started from: Grad-CAM with the mean over channels, not the sum.

    The other deviations of the notebook, the gradient of the probability and an image that was not
    preprocessed, are implemented in `keras_network`.
    """
    return gradcam(ops, activations, gradients) / activations.shape[-1]


def heat_features(ops: Any, activations: Any, raw: Any) -> Any:
    """Activations averaged over the image with the heat of a class as weights: what it looks at, as a vector.

    The class-weighted sum pooling of Jimenez et al., arXiv 1707.02581, section 3.1. Departures: the weights
    are those of any formula here, after the ReLU; the sum is divided by theirs, not by its own length.

    Args:
        ops: As for the formulas.
        activations: (n, rows, columns, channels).
        raw: (n, k, rows, columns), what a formula returned.

    Returns:
        (n, k, channels); nan where the map has no positive value.
    """
    heat = ops.maximum(raw, 0)
    return ops.einsum("nhwc,nkhw->nkc", activations, heat) / ops.sum(heat, axis=(2, 3))[..., None]


METHODS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "gradcam": gradcam,
    "counterfactual": counterfactual,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "xgradcam": xgradcam,
    "layercam": layercam,
    "eigencam": eigencam,
    "notebook": notebook,
}
USE_MEAN_GRADIENT = {"gradcam", "counterfactual", "notebook"}  # means (k, n, 1, 1, channels) are enough
USE_NO_GRADIENT = {"eigencam"}  # only its shape is read: zeros (k, n, 1, 1, 1) are enough
CLASSLESS = {"eigencam"}  # the same heatmap for every class: none is explained against others
SCORES = ("logit", "probability")
NORMALIZE = ("per_class", "joint", "none")


def heatmaps(raw: NDArray[np.float32], normalize: str = "per_class") -> NDArray[np.float32]:
    """Raw maps to heatmaps: ReLU, then division by the peak.

    Args:
        raw: (k, rows, columns).
        normalize: `per_class` divides each map by its own peak, `joint` all maps by the highest peak, so
            that classes can be compared; both give values in [0, 1]. `none` does not divide.

    Returns:
        (k, rows, columns) float32. A map without a positive value, where nothing speaks for the class, is
        all zeros.
    """
    positive = np.maximum(raw, 0)
    if normalize == "none":
        return np.asarray(positive, np.float32)
    peak = positive.max(axis=(-2, -1) if normalize == "per_class" else None, keepdims=True)
    return np.asarray(np.divide(positive, peak, out=np.zeros_like(positive), where=peak > 0), np.float32)
