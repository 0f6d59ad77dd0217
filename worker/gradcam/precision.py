"""A model in another precision: the same weights, other arithmetic."""

from typing import Any

from worker.errors import InvalidSettings
from worker.gradcam.backend import keras

PRECISIONS = ("float32", "tf32", "bfloat16", "mixed_bfloat16")


def with_precision(model: Any, precision: str) -> Any:
    """A copy of a model that computes in `precision`; the model itself where that is what it does.

    `bfloat16` also keeps the weights in it. What ends in a softmax or a sigmoid stays float32, as Keras
    advises: three digits are too few for scores that lie close together. A model in `tf32` is one in float32:
    only the GPU takes its products otherwise, which `backend.allow_tf32` says for the whole process.
    Raises InvalidSettings.
    """
    if precision not in PRECISIONS:
        message = f"There is no precision {precision!r}; there are {', '.join(PRECISIONS)}."
        raise InvalidSettings(message)
    if precision in {"float32", "tf32"}:
        return model
    last = {id(one._keras_history.operation) for one in keras.tree.flatten(model.outputs)}  # noqa: SLF001

    def copied(layer: Any) -> Any:
        policy = "float32" if id(layer) in last else precision
        return type(layer).from_config({**layer.get_config(), "dtype": policy})

    copy = keras.models.clone_model(model, clone_function=copied, recursive=True)
    copy.set_weights(model.get_weights())
    copy.dtype_policy = keras.dtype_policies.get(precision)
    return copy
