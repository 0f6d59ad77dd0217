"""Sigmoid and softmax with slopes that do not vanish where they are sure.

Backends take y (1 - y) for the slope, which is 0 as soon as y is rounded to 1: a class that the network is
sure of would be left dark. Here 1 - y is never a difference of like numbers.
"""

from typing import Any

from gradcam_worker.gradcam.backend import keras

NEVER = -1e30  # the score of a class that is left out
ops = keras.ops


def sigmoid(scores: Any) -> Any:
    """1 / (1 + exp(-scores))."""
    return ops.exp(-ops.softplus(-scores))


def softmax(scores: Any) -> Any:
    """Over the last axis: each class as a sigmoid of its score against that of all others."""
    is_top = ops.cast(ops.one_hot(ops.argmax(scores, axis=-1), scores.shape[-1]), "bool")
    top = ops.max(scores, axis=-1, keepdims=True)
    behind_top = ops.logsumexp(ops.where(is_top, NEVER, scores), axis=-1, keepdims=True)
    powers = ops.exp(scores - top)
    rest = ops.sum(powers, axis=-1, keepdims=True) - ops.where(is_top, 0.0, powers)
    return sigmoid(scores - ops.where(is_top, behind_top, top + ops.log(rest)))
