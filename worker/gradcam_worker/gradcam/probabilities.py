"""How the scores of a network become probabilities, and what of a score is explained."""

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.network import Method


def to_probabilities(scores: NDArray[np.float64], head: str) -> NDArray[np.float64]:
    """Turn scores into probabilities.

    Args:
        scores: (..., classes).
        head: `softmax`: they sum to 1; `sigmoid`: each class has its own; `probabilities`: scores are such.

    Returns:
        (..., classes), in [0, 1].
    """
    if head == "probabilities":
        return np.clip(scores, 0, 1)  # rounding may exceed the limits
    if head == "sigmoid":
        return np.asarray(np.exp(-np.logaddexp(0, -scores)))
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def explained_score(
    scores: NDArray[np.float64], class_ids: NDArray[np.int32], method: Method, head: str
) -> NDArray[np.float64]:
    """What a method explains of each class: its score, or the logarithm of its probability; less the mean of
    the same of the classes `against`.

    Args:
        scores: (n, classes).
        class_ids: (n, k).
        method: Its score and `against` are used.
        head: As for `to_probabilities`.

    Returns:
        (n, k).
    """
    if method.score == "probability":
        if head == "softmax":
            top = scores.max(axis=-1, keepdims=True)
            scores = scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))
        elif head == "sigmoid":
            scores = -np.logaddexp(0, -scores)
        else:
            scores = np.log(np.maximum(scores, SMALLEST))
    explained = np.take_along_axis(scores, class_ids, axis=1)
    if method.against:
        explained = explained - scores[:, [*method.against]].mean(axis=1, keepdims=True)
    return explained


SMALLEST = 1e-30  # of a probability: its logarithm stays finite
