"""What a method takes the gradient of: how fast it rises with each score, in closed form.

To differentiate a softmax by machine would cancel: where the network is sure, 1 - p is 0 in float32, and the
class itself would drop out of its own explanation.
"""

from collections.abc import Callable
from typing import Any

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.saturation import NEVER
from gradcam_worker.gradcam.network import Method

LEAST = 1e-30  # of what all slopes of a class are multiplied or divided by: a heatmap is the same without it

Slopes = Callable[[Any, Any], Any]  # scores (n, classes), one-hot classes (k, n, classes) -> the like
ops = keras.ops


def score_gradient(kind: str, method: Method) -> Slopes:
    """The slopes of what `method` explains, behind a softmax or a sigmoid, or where scores are probabilities.

    `logit`: the score itself. `probability`: the logarithm of the probability, whose normalised map is
    that of the probability, and which cannot underflow. The notebook takes the probability itself, and can.
    """
    if kind == "probabilities":
        return logit if method.name == "notebook" or method.score == "logit" else _log
    if method.name == "notebook":
        return _softmax if kind == "softmax" else _sigmoid
    if method.score == "logit":
        return logit
    return _log_softmax if kind == "softmax" else _log_sigmoid


def logit(_: Any, classes: Any) -> Any:
    """Of the score itself: 1 for the class, 0 for the others."""
    return classes


def _log(scores: Any, classes: Any) -> Any:
    return classes / ops.maximum(scores, LEAST)


def _log_softmax(scores: Any, classes: Any) -> Any:
    """(1 - p) x (the class, less the others by their shares): d log p, with no difference of like numbers."""
    others = ops.where(classes > 0, NEVER, scores)
    log_rest = ops.logsumexp(others, axis=-1, keepdims=True) - ops.logsumexp(scores, axis=-1, keepdims=True)
    return ops.maximum(ops.exp(log_rest), LEAST) * (classes - ops.softmax(others, axis=-1))


def _log_sigmoid(scores: Any, classes: Any) -> Any:
    return classes * ops.maximum(ops.sigmoid(-scores), LEAST)


def _softmax(scores: Any, classes: Any) -> Any:
    shares = ops.softmax(scores, axis=-1)
    return ops.sum(classes * shares, axis=-1, keepdims=True) * (classes - shares)


def _sigmoid(scores: Any, classes: Any) -> Any:
    return classes * ops.sigmoid(scores) * ops.sigmoid(-scores)
