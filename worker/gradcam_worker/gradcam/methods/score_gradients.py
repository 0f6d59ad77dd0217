"""The derivative of what a method explains by each score, in closed form.

Automatic differentiation of a softmax cancels: where the network is certain, 1 - p is 0 in float32, and the
gradient of the class itself would vanish.
"""

from collections.abc import Callable
from typing import Any

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.saturation import EXCLUDED
from gradcam_worker.gradcam.network import Method

SMALLEST = 1e-30  # of a factor common to all derivatives of a class: it keeps their heatmap from vanishing

ScoreGradient = Callable[[Any, Any], Any]  # scores (n, classes), one-hot (k, n, classes) -> (k, n, classes)
ops = keras.ops


def score_gradient(kind: str, method: Method) -> ScoreGradient:
    """The derivative of what a method explains by each score.

    `logit` explains the score itself. `probability` explains the logarithm of the probability: its
    normalised map is that of the probability, and it cannot underflow. The method `notebook` takes the
    probability itself, which can.

    With `against`, what is explained is the difference between that of the class and the mean of those of
    the others. Of `probability` that is the mean of log(p / p of the other): with a softmax the difference of
    the scores themselves.

    Args:
        kind: How scores become probabilities: softmax, sigmoid, or probabilities where they are such.
        method: Its name, its score, and whether it is `against` any class are used.

    Returns:
        A function of scores and one-hot classes; with `against`, of classes less the weights of the others,
        which sum to 1.
    """
    if kind == "probabilities":
        return logit if method.name == "notebook" or method.score == "logit" else _log
    if method.name == "notebook":
        return _softmax if kind == "softmax" else _sigmoid
    if method.score == "logit" or (kind == "softmax" and method.against):
        return logit  # the denominator of the softmax cancels
    return _log_softmax if kind == "softmax" else _log_sigmoid


def logit(_: Any, classes: Any) -> Any:
    """The derivative of the score itself: 1 for the class, 0 for the others."""
    return classes


def _log(scores: Any, classes: Any) -> Any:
    return classes / ops.maximum(scores, SMALLEST)


def _log_softmax(scores: Any, classes: Any) -> Any:
    """The derivative of log p, (1 - p) (class - softmax of the others), without cancellation."""
    others = ops.where(classes > 0, EXCLUDED, scores)
    log_rest = ops.logsumexp(others, axis=-1, keepdims=True) - ops.logsumexp(scores, axis=-1, keepdims=True)
    return ops.maximum(ops.exp(log_rest), SMALLEST) * (classes - ops.softmax(others, axis=-1))


def _log_sigmoid(scores: Any, classes: Any) -> Any:
    return classes * ops.maximum(ops.sigmoid(-scores), SMALLEST)


def _softmax(scores: Any, classes: Any) -> Any:
    shares = ops.softmax(scores, axis=-1)
    return shares * (classes - ops.sum(classes * shares, axis=-1, keepdims=True))


def _sigmoid(scores: Any, classes: Any) -> Any:
    return classes * ops.sigmoid(scores) * ops.sigmoid(-scores)
