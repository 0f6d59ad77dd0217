"""A model in another precision: the same weights, other arithmetic."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gradcam_worker.errors import InvalidSettings, NetworkIncompatible
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.graph import Step

PRECISIONS = ("float32", "tf32", "bfloat16", "mixed_bfloat16")


def with_precision(model: Any, precision: str) -> Any:
    """A copy of a model that computes in `precision`; the model itself where that is what it does.

    `bfloat16` also keeps the weights in it. What makes the scores, and all that comes behind, stays float32,
    as Keras advises: three digits are too few for scores that lie close together. A model in `tf32` is one in
    float32: only the GPU takes its products otherwise, which `backend.allow_tf32` says for the whole process.
    Raises InvalidSettings, NetworkIncompatible.
    """
    if precision not in PRECISIONS:
        message = f"There is no precision {precision!r}; there are {', '.join(PRECISIONS)}."
        raise InvalidSettings(message)
    if precision in {"float32", "tf32"}:
        return model
    kept: set[int] = set()

    def copied(layer: Any) -> Any:
        config = layer.get_config()
        if isinstance(layer, keras.Layer):  # other operations compute in what they are given
            config["dtype"] = "float32" if id(layer) in kept else precision
        return type(layer).from_config(config)

    try:
        _reaches_input(keras.tree.flatten(model.outputs), kept)
        copy = keras.models.clone_model(model, clone_function=copied, recursive=True)
        copy.set_weights(model.get_weights())
    except Exception as error:  # whatever layers make of a configuration that is theirs but for the type
        reason = " ".join(str(error).split())[-500:]
        message = (
            f"{model.name} cannot be copied to compute in {precision}: {reason}. Run it in float32 "
            "(GRADCAM_PRECISION), or save it in the precision that it is to have."
        )
        raise NetworkIncompatible(message) from error
    copy.dtype_policy = keras.dtype_policies.get(precision)
    return copy


def _reaches_input(outputs: list[Any], kept: set[int]) -> bool:
    """Keep the layers that make the outputs, back to the last with weights, nested models opened.

    Returns whether one of them is made of the input without any weights.
    """
    reached, waiting, seen = False, list(outputs), set[int]()
    while waiting:
        tensor = waiting.pop()
        operation, index, which = tensor._keras_history  # noqa: SLF001  # how a Keras graph is walked
        if id(tensor) in seen or operation is None:
            continue
        seen.add(id(tensor))
        if isinstance(operation, keras.layers.InputLayer):
            reached = True
            continue
        if isinstance(operation, keras.Model):
            goes_on = _reaches_input([keras.tree.flatten(operation.outputs)[which]], kept)
        else:
            kept.add(id(operation))
            goes_on = not getattr(operation, "weights", None)
        if goes_on:
            waiting += operation._inbound_nodes[index].input_tensors  # noqa: SLF001
    return reached


def policy_of(steps: Sequence[Step], model: Any) -> str:
    """What most weights that see the image compute in, as `mixed_float16`."""
    counts: Counter[str] = Counter()
    for step in steps:
        policy = getattr(step.operation, "dtype_policy", None)
        if step.weights and policy is not None:
            counts[str(policy.name)] += sum(math.prod(one.shape) for one in step.weights)
    return counts.most_common(1)[0][0] if counts else str(model.dtype_policy.name)
