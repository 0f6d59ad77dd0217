"""Models of Keras 2: loaded by its own code, tf_keras, and made anew in Keras 3, layer by layer."""

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gradcam_worker import extras
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.models import own_layers

UNKNOWN_KEYS = re.compile(r"Unrecognized keyword arguments passed to (\w+): (\{[^{}]*\})")
MAX_CORRECTIONS = 32  # classes with settings that Keras 3 does not know
MODELS = {"Functional", "Model", "Sequential"}
ARITHMETIC: dict[
    str, Callable[[float], tuple[float, float]]
] = {  # what Keras 2 makes of it between layers: its scale and offset, by the other number
    "__operators__.add": lambda number: (1.0, number),
    "__operators__.sub": lambda number: (1.0, -number),
    "__operators__.mul": lambda number: (number, 0.0),
    "__operators__.truediv": lambda number: (1 / number, 0.0),
    "math.add": lambda number: (1.0, number),
    "math.divide": lambda number: (1 / number, 0.0),
    "math.multiply": lambda number: (number, 0.0),
    "math.subtract": lambda number: (1.0, -number),
    "math.truediv": lambda number: (1 / number, 0.0),
}


def load(path: Path, *, allow_code: bool, imports: Sequence[str] = ()) -> Any:
    """Load a file or folder of Keras 2.

    Args:
        path: HDF5, a `.keras` file, or the folder of a SavedModel.
        allow_code: Whether lambda layers in a `.keras` file are loaded. In the other two they always are.
        imports: Modules that define layers of it; for `tf.keras` to be Keras 2 in them, TF_USE_LEGACY_KERAS
            has to be 1 before TensorFlow is imported.

    Returns:
        A model of tf_keras.

    Raises:
        MissingExtra: tf_keras is not installed.
        NotImported: A module cannot be imported.
        Exception: Whatever tf_keras raises for it.
    """
    with extras.required("Converting a model of Keras 2", "convert", extras.WORKER):
        import tf_keras
    own = own_layers.defined_in(imports, callable)
    return tf_keras.models.load_model(path, own, compile=False, safe_mode=not allow_code)


def to_keras_3(model: Any, folder: Path) -> Any:
    """Make a model of Keras 3, by HDF5, which both read.

    Settings that Keras 3 does not know are left out: whether they matter, a numeric check has to show.

    Args:
        model: A model of tf_keras.
        folder: For the file.

    Returns:
        A model of Keras 3.

    Raises:
        Exception: Whatever Keras raises for a layer that it cannot make.
    """
    import h5py

    path = folder / "layers.h5"
    model.save(path, save_format="h5", include_optimizer=False)
    with h5py.File(path, "r") as file:
        config = json.loads(file.attrs["model_config"])
    modernise(config)
    for _ in range(MAX_CORRECTIONS):
        with h5py.File(path, "a") as file:
            file.attrs["model_config"] = json.dumps(config).encode()
        try:
            return keras.saving.load_model(path, compile=False, safe_mode=True)
        except (TypeError, ValueError) as error:
            unknown = UNKNOWN_KEYS.search(str(error))
            if unknown is None or not _leave_out(config, unknown[1], ast.literal_eval(unknown[2])):
                raise
    message = f"It has more than {MAX_CORRECTIONS} kinds of layers with settings of other versions."
    raise ValueError(message)


def modernise(config: Any) -> None:
    """Correct, in place, names, numbers and arithmetic that Keras 3 does not take from Keras 2."""
    for node in _tables(config):
        settings = node.get("config")
        if not isinstance(settings, dict):
            continue
        axis = settings.get("axis")
        if node.get("class_name") == "BatchNormalization" and isinstance(axis, list) and len(axis) == 1:
            settings["axis"] = axis[0]
        if isinstance(settings.get("layers"), list):
            layers = [layer for layer in settings["layers"] if isinstance(layer, dict)]
            for layer in layers:
                _make_rescaling(layer)
            _renumber_calls(settings, layers)
            _rename(settings, layers)


def _tables(config: Any) -> Iterator[dict[str, Any]]:
    """All tables of a configuration."""
    pending: list[Any] = [config]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            pending += node.values()
        elif isinstance(node, list):
            pending += node


def _calls(settings: dict[str, Any], layers: list[dict[str, Any]]) -> Iterator[list[Any]]:
    """All references `[layer, number of its call, number of its output, ...]` in a model."""
    ends = [settings.get("input_layers"), settings.get("output_layers")]
    pending: list[Any] = [*ends, *(layer.get("inbound_nodes") for layer in layers)]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            pending += node.values()
        elif isinstance(node, list):
            if len(node) > 2 and isinstance(node[0], str) and isinstance(node[1], int):  # noqa: PLR2004  # as above
                yield node
            pending += node


def _make_rescaling(layer: dict[str, Any]) -> None:
    """Make a layer of arithmetic with one number: Keras 3 has none that calls a function of TensorFlow."""
    settings, nodes = layer.get("config"), layer.get("inbound_nodes")
    if layer.get("class_name") != "TFOpLambda" or not isinstance(settings, dict) or not nodes:
        return
    rule, call = ARITHMETIC.get(str(settings.get("function"))), nodes[0]
    other = call[3].get("y") if len(nodes) == 1 and len(call) > 3 and isinstance(call[0], str) else None  # noqa: PLR2004
    if rule is None or not isinstance(other, int | float) or not other:
        return
    scale, offset = rule(float(other))
    name = settings.get("name")
    layer["class_name"] = "Rescaling"
    layer["config"] = {"name": name, "dtype": "float32", "scale": scale, "offset": offset}
    layer["inbound_nodes"] = [[[*call[:3], {}]]]


def _renumber_calls(settings: dict[str, Any], layers: list[dict[str, Any]]) -> None:
    """Count the calls of nested models from 0: in Keras 2 the model as it was made has the number 0."""
    nested = {layer.get("name") for layer in layers if layer.get("class_name") in MODELS}
    calls = [call for call in _calls(settings, layers) if call[0] in nested]
    for name in {call[0] for call in calls}:
        own = [call for call in calls if call[0] == name]
        if min(call[1] for call in own) > 0:
            for call in own:
                call[1] -= 1


def _rename(settings: dict[str, Any], layers: list[dict[str, Any]]) -> None:
    """Rename layers with a slash, as in `conv1/bn`, which separates names of nested layers in Keras 3."""
    taken = {layer.get("name") for layer in layers}
    names = {}
    for old in [name for name in taken if isinstance(name, str) and "/" in name]:
        new = old.replace("/", "_")
        while new in taken:
            new += "_"
        taken.add(new)
        names[old] = new
    for call in _calls(settings, layers):
        call[0] = names.get(call[0], call[0])
    for layer in layers:
        own = layer.get("config")
        for table in (layer, own if isinstance(own, dict) else {}):
            if table.get("name") in names:
                table["name"] = names[table["name"]]


def _leave_out(config: Any, kind: str, unknown: dict[str, Any]) -> bool:
    """Remove settings of a kind of layer. Returns whether there were any."""
    found = False
    for node in _tables(config):
        settings = node.get("config")
        if node.get("class_name") == kind and isinstance(settings, dict):
            for key in unknown.keys() & settings.keys():
                del settings[key]
                found = True
    return found
