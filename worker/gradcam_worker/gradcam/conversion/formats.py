"""What a file is that is to be converted, and what in it could run code. The file is read, but not loaded."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from gradcam_worker.gradcam.files import model_file
from gradcam_worker.gradcam.files.model_file import Refused

Format = Literal["hdf5", "keras", "keras_hub", "saved_model", "frozen_graph", "tflite"]
SAVED_MODEL_FILE = "saved_model.pb"
ENDINGS = {".h5": "HDF5 file", ".hdf5": "HDF5 file", ".tflite": ".tflite file"}  # what a name promises
# What a configuration may name without being able to run anything but layers of Keras.
KERAS_MODULE = re.compile(
    r"(tf_)?keras(\.src)?(\.(activations|constraints|dtype_policies|engine|initializers|layers|losses|metrics"
    r"|mixed_precision|models|ops|optimizers|regularizers)(\.\w+)*)?|keras_hub(\.\w+)*"
)
CALLS_ANYTHING = {"FlaxLayer", "JaxLayer", "KerasLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper"}
CALLS_A_FUNCTION = {"SlicingOpLambda", "TFOpLambda"}  # of TensorFlow, by its name
ARITHMETIC = re.compile(
    r"__operators__\.\w+|(compat\.v1\.)?(math|nn|linalg|image)\.\w+|(compat\.v1\.)?(cast|clip_by_value|concat|"
    r"convert_to_tensor|expand_dims|identity|pad|reshape|shape|split|squeeze|stack|tile|transpose)"
)


def recognise(path: Path) -> Format:
    """Recognise a format by the content of a file or folder.

    Args:
        path: The file or folder.

    Returns:
        The format.

    Raises:
        Refused: It is none that can be converted.
        OSError: It cannot be read.
    """
    if path.is_dir():
        return _recognise_folder(path)
    if path.name == SAVED_MODEL_FILE:
        message = f"belongs to a SavedModel: name its folder, {str(path.parent)!r}"
        raise Refused(message)
    with path.open("rb") as file:
        head = file.read(16)
    if head[4:8] == b"TFL3":
        return "tflite"
    if head.startswith(model_file.HDF5_SIGNATURE):
        if model_file.layout(path) == "model":
            return "hdf5"
        raise Refused(model_file.refusal(".weights.h5", path.name))
    if head.startswith(b"PK"):
        return _recognise_archive(path)
    if reason := model_file.refusal_by_content(path, path.name):
        raise Refused(reason)
    if path.suffix == ".pb":
        return "frozen_graph"
    if kind := ENDINGS.get(path.suffix.lower()):
        message = f"is no {kind}, though its name says so: it begins with {head!r}; copy it again"
        raise Refused(message)
    raise Refused(model_file.refusal_by_ending(path.name))


def _recognise_folder(path: Path) -> Format:
    if (path / SAVED_MODEL_FILE).is_file():
        return "saved_model"
    if model_file.is_preset(path):
        return "keras_hub"
    why = "is a folder, and no SavedModel or preset of keras-hub: name the file in it"
    raise Refused(model_file.refusal_of_folder(path) or why)


def _recognise_archive(path: Path) -> Format:
    version = model_file.keras_version(path)
    config = model_file.read_config(path, path.name)
    if re.match("[012][.]", version) or any(node.get("class_name") == "Lambda" for node in nodes(config)):
        return "keras"
    message = f"is a .keras file of Keras {version or 3} already: name it in the registry as it is"
    raise Refused(message)


def keras_version(path: Path, form: Format) -> str:
    """The version of Keras that saved a file; empty: one before 2, or no file of layers.

    Raises:
        Refused: The file is damaged.
    """
    if form == "hdf5":
        return hdf5_attribute(path, "keras_version")
    return model_file.keras_version(path) if form == "keras" else ""


def is_of_keras_3(path: Path, form: Format) -> bool:
    """Whether Keras 3 saved a file or folder as layers. Raises Refused if it is damaged."""
    return form == "keras_hub" or keras_version(path, form).startswith("3")


def code_in(path: Path, form: Format) -> str | None:
    """What in a file could run code when it is loaded.

    Args:
        path: The file or folder.
        form: Its format.

    Returns:
        The rest of a sentence that begins with the file; None: nothing but layers of Keras is named in it.

    Raises:
        Refused: Its configuration cannot be read.
        OSError: It cannot be read.
    """
    if form == "tflite":
        return None  # operators of the interpreter, and nothing else
    if form == "frozen_graph":
        return "is a graph of TensorFlow, whose operations can read and write files"
    if form == "saved_model":
        return "is a SavedModel, whose operations and layers can read and write files and run code"
    config: Any
    if form == "keras_hub":
        config = [_json(file) for file in sorted(path.glob("*.json"))]
    else:
        config = hdf5_config(path) if form == "hdf5" else model_file.read_config(path, path.name)
    suspects = list(dict.fromkeys(suspect for node in nodes(config) if (suspect := _suspect(node))))
    if not suspects:
        return None
    more = f" and {len(suspects) - 3} more" if len(suspects) > 3 else ""  # noqa: PLR2004  # a short message
    return f"holds {', '.join(suspects[:3])}{more}, which can run code"


def _json(path: Path) -> Any:
    """A file of a preset. Raises Refused."""
    if path.stat().st_size > model_file.MAX_CONFIG_BYTES:
        message = f"holds a {path.name} of more than {model_file.MAX_CONFIG_BYTES:,} bytes"
        raise Refused(message)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        message = f"holds a {path.name} that is no JSON: {error}"
        raise Refused(message) from error


def hdf5_config(path: Path) -> dict[str, Any]:
    """The configuration of a whole model in HDF5.

    Raises:
        Refused: It cannot be read.
    """
    text = hdf5_attribute(path, "model_config")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"holds a model_config that is no JSON: {error}"
        raise Refused(message) from error
    if not isinstance(config, dict):
        message = "holds a model_config that describes no model"
        raise Refused(message)
    return config


def hdf5_attribute(path: Path, name: str) -> str:
    """An attribute of an HDF5 file as text; empty if it is missing.

    Raises:
        Refused: The file is damaged.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            value = file.attrs.get(name, "")
            return value.decode() if isinstance(value, bytes) else str(value)
    except (OSError, RuntimeError, KeyError, UnicodeDecodeError) as error:
        message = f"is damaged ({error}): copy it again"
        raise Refused(message) from error


def nodes(config: Any) -> Iterator[dict[str, Any]]:
    """All tables of a configuration."""
    pending: list[Any] = [config]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            pending += reversed(node.values())
        elif isinstance(node, list):
            pending += reversed(node)


def _suspect(node: dict[str, Any]) -> str | None:
    """What a table of a configuration names, if it is more than a class of Keras."""
    kind, module, settings = node.get("class_name"), node.get("module"), node.get("config")
    settings = settings if isinstance(settings, dict) else {}
    name = f" ({settings['name']})" if isinstance(settings.get("name"), str) else ""
    if kind in CALLS_ANYTHING:
        return f"a layer {kind}{name}"
    if kind in CALLS_A_FUNCTION and not ARITHMETIC.fullmatch(
        str(settings.get("function", "__operators__.x"))
    ):
        return f"a layer that calls tf.{settings['function']}{name}"
    if isinstance(module, str) and module != "builtins" and not KERAS_MODULE.fullmatch(module):
        return f"{module}.{kind}{name}"
    return None
