"""Copies of a model that compute in another precision with the same weights."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gradcam_worker.errors import InvalidSettings, NetworkIncompatible
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.graph import Step

PRECISIONS = ("float32", "tf32", "bfloat16", "mixed_bfloat16")


def with_precision(model: Any, precision: str) -> Any:
    """Copy a model so that it computes in another precision.

    With `bfloat16` the weights are stored in it, too. The layers from the last weights to the scores stay in
    float32, as Keras advises: three digits are too few for scores that are close together. `tf32` is float32
    here: the GPU rounds factors, see `backend.allow_tf32`.

    Args:
        model: A Keras model.
        precision: A name from `PRECISIONS`.

    Returns:
        A copy; the model itself for `float32` and `tf32`.

    Raises:
        InvalidSettings: The precision does not exist.
        NetworkIncompatible: The model cannot be copied.
    """
    if precision not in PRECISIONS:
        message = f"There is no precision {precision!r}; there are {', '.join(PRECISIONS)}."
        raise InvalidSettings(message)
    if precision in {"float32", "tf32"}:
        return model
    float32_layers: set[int] = set()

    def copy_layer(layer: Any) -> Any:
        config = layer.get_config()
        if isinstance(layer, keras.Layer):  # other operations compute in the type of their inputs
            config["dtype"] = "float32" if id(layer) in float32_layers else precision
        return type(layer).from_config(config)

    try:
        _keep_output_layers(keras.tree.flatten(model.outputs), float32_layers)
        copy = keras.models.clone_model(model, clone_function=copy_layer, recursive=True)
        copy.set_weights(model.get_weights())
    except Exception as error:  # custom layers may raise anything
        reason = " ".join(str(error).split())[-500:]
        message = (
            f"{model.name} cannot be copied to compute in {precision}: {reason}. Run it in float32 "
            "(GRADCAM_PRECISION), or save it in the precision that it is to have."
        )
        raise NetworkIncompatible(message) from error
    copy.dtype_policy = keras.dtype_policies.get(precision)
    return copy


def _keep_output_layers(outputs: list[Any], float32_layers: set[int]) -> bool:
    """Collect the ids of layers from the last weights to the outputs, also in nested models.

    Returns whether a path from the input to the outputs has no weights.
    """
    reaches_input, pending, visited = False, list(outputs), set[int]()
    while pending:
        tensor = pending.pop()
        operation, index, output_index = tensor._keras_history  # noqa: SLF001  # Keras has no public way to walk a graph
        if id(tensor) in visited or operation is None:
            continue
        visited.add(id(tensor))
        if isinstance(operation, keras.layers.InputLayer):
            reaches_input = True
            continue
        if isinstance(operation, keras.Model):
            continues = _keep_output_layers(
                [keras.tree.flatten(operation.outputs)[output_index]], float32_layers
            )
        else:
            float32_layers.add(id(operation))
            continues = not getattr(operation, "weights", None)
        if continues:
            pending += operation._inbound_nodes[index].input_tensors  # noqa: SLF001
    return reaches_input


def policy_of(steps: Sequence[Step], model: Any) -> str:
    """The dtype policy of most weights between the image and a layer.

    Args:
        steps: The steps from the image to the layer.
        model: The Keras model, whose policy counts if no step has weights.

    Returns:
        For example `mixed_float16`.
    """
    counts: Counter[str] = Counter()
    for step in steps:
        policy = getattr(step.operation, "dtype_policy", None)
        if step.weights and policy is not None:
            counts[str(policy.name)] += sum(math.prod(weight.shape) for weight in step.weights)
    return counts.most_common(1)[0][0] if counts else str(model.dtype_policy.name)
