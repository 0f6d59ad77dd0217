"""Sigmoid and softmax whose gradients do not vanish where they saturate.

Backends compute the derivative as y (1 - y), which is 0 as soon as y is rounded to 1: the heatmap of a class
that the network is certain of would be empty. Here 1 - y is never a difference of nearly equal numbers.
"""

from typing import Any

from gradcam_worker.gradcam.backend import keras

EXCLUDED = -1e30  # the score of a class that is left out of a sum of exponentials
ops = keras.ops


def sigmoid(scores: Any) -> Any:
    """1 / (1 + exp(-scores))."""
    return ops.exp(-ops.softplus(-scores))


def softmax(scores: Any) -> Any:
    """Over the last axis: the sigmoid of each class's score against the log-sum-exp of all others."""
    is_top = ops.cast(ops.one_hot(ops.argmax(scores, axis=-1), scores.shape[-1]), "bool")
    top = ops.max(scores, axis=-1, keepdims=True)
    others_of_top = ops.logsumexp(ops.where(is_top, EXCLUDED, scores), axis=-1, keepdims=True)
    exponentials = ops.exp(scores - top)
    others = ops.sum(exponentials, axis=-1, keepdims=True) - ops.where(is_top, 0.0, exponentials)
    return sigmoid(scores - ops.where(is_top, others_of_top, top + ops.log(others)))
