"""Opens the old model: what it computes, and the ways in which a Keras 3 model can be made of it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.conversion import formats, keras_2, tflite_file, tflite_layers
from gradcam_worker.gradcam.conversion.formats import Format
from gradcam_worker.gradcam.files.model_file import Refused
from gradcam_worker.gradcam.models import hub_preset, own_layers
from gradcam_worker.gradcam.models.hub_preset import PresetInput

Arrays = Sequence[NDArray[Any]]
FREE_SIDE = 224  # pixels, where a model takes images of any size and none is asked for
SIGNATURE = "serving_default"
LAYERS, GRAPH = "layer by layer", "from its graph, operator by operator"  # how a new model is made


@dataclass(frozen=True)
class InputSpec:
    """An input of a model."""

    shape: tuple[int, ...]  # of one image
    dtype: str


@dataclass(frozen=True)
class Rebuild:
    """A way to make a model of Keras 3."""

    description: str  # as the rest of a sentence that begins with the file
    build: Callable[[], Any]
    own: Mapping[str, type] = field(default_factory=dict)  # layers of other packages that stay in the model


@dataclass(frozen=True)
class Source:
    """An old model."""

    description: str  # of its format
    inputs: tuple[InputSpec, ...]
    predict: Callable[[Arrays], Arrays]  # the outputs for one image
    rebuilds: tuple[Rebuild, ...]  # the best one first
    rounds: bool = False  # whether its arithmetic rounds to 8 or 16 bits
    limits: tuple[float, float] | None = None  # of the numbers that its input can hold, where it is quantised
    photos: PresetInput | None = None  # what is done to photos before, where that is known


def open_source(
    path: Path,
    form: Format,
    folder: Path,
    input_size: tuple[int, int] | None,
    *,
    allow_code: bool,
    imports: Sequence[str] = (),
) -> Source:
    """Load a model as its own format is loaded.

    Args:
        path: The file or folder.
        form: Its format.
        folder: For files in between.
        input_size: (height, width) of a model that takes images of any size.
        allow_code: Whether code in it may run.
        imports: Modules that define layers of it.

    Returns:
        The model.

    Raises:
        Refused: It cannot be loaded, or `imports` are given for a file without layers.
        NotImported: A module cannot be imported.
        NetworkIncompatible: It is a preset of keras-hub that cannot be loaded.
        MissingExtra: It was saved by Keras 2, and tf_keras is not installed; or keras-hub is not.
    """
    if form == "tflite":
        if imports:
            message = (
                f"has operators of TensorFlow Lite, no layers of {', '.join(imports)}: convert it without "
                "--import"
            )
            raise Refused(message)
        return _open_tflite(path)
    if form in {"hdf5", "keras"}:
        return _open_keras(path, form, folder, input_size, allow_code=allow_code, imports=imports)
    own = own_layers.parts_of_models(imports)  # importing them also registers what a graph needs
    if form == "keras_hub":
        return _open_preset(path, input_size, own)
    if form == "saved_model":
        return _open_saved_model(path, folder, input_size, imports)
    return _open_frozen_graph(path, input_size)


def _open_keras(
    path: Path,
    form: Format,
    folder: Path,
    input_size: tuple[int, int] | None,
    *,
    allow_code: bool,
    imports: Sequence[str],
) -> Source:
    version = formats.keras_version(path, form)
    kind, name = ("HDF5", "a.h5") if form == "hdf5" else (".keras", "a.keras")
    link = folder / name  # the format is chosen by the ending
    link.symlink_to(path.absolute())
    if formats.is_of_keras_3(path, form):
        own = own_layers.parts_of_models(imports)
        model = keras.saving.load_model(link, own, compile=False, safe_mode=not allow_code)
        layers = Rebuild(LAYERS, lambda: model, own)
    else:
        model = keras_2.load(link, allow_code=allow_code, imports=imports)
        layers = Rebuild(LAYERS, lambda: keras_2.to_keras_3(model, folder))
    return _of_keras(f"Keras {version or 'before 2'}, {kind}", model, layers, input_size)


def _of_keras(description: str, model: Any, layers: Rebuild, input_size: tuple[int, int] | None) -> Source:
    """A model of Keras 2 or 3."""
    tensors = keras.tree.flatten(model.inputs)
    inputs = tuple(
        InputSpec(_complete(tuple(tensor.shape)[1:], input_size), _dtype_name(tensor.dtype))
        for tensor in tensors
    )

    def predict(arrays: Arrays) -> Arrays:
        values = list(arrays) if len(arrays) > 1 else arrays[0]
        return [np.asarray(output) for output in keras.tree.flatten(model(values, training=False))]

    graph = Rebuild(
        GRAPH,
        lambda: _from_function(lambda image: model(image, training=False), inputs, model),
    )
    return Source(description, inputs, predict, (layers, graph))


def _complete(shape: tuple[int | None, ...], input_size: tuple[int, int] | None) -> tuple[int, ...]:
    """The shape of an image, with the size that was asked for where a model takes any."""
    sizes = input_size or (FREE_SIDE, FREE_SIDE)
    sides = [side or (sizes[axis] if axis < len(sizes) else 3) for axis, side in enumerate(shape)]
    return tuple(int(side) for side in sides)


def _dtype_name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype))


def _open_preset(path: Path, input_size: tuple[int, int] | None, own: Mapping[str, type]) -> Source:
    model = hub_preset.open_preset(path)
    photos = hub_preset.read_input(model)
    layers = Rebuild(LAYERS, lambda: model, own)
    source = _of_keras("keras-hub", model, layers, photos.input_size if photos else input_size)
    return replace(source, rebuilds=(layers,), photos=photos)


def _open_saved_model(
    path: Path, folder: Path, input_size: tuple[int, int] | None, imports: Sequence[str]
) -> Source:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    signatures = loaded.signatures
    name = SIGNATURE if SIGNATURE in signatures or not signatures else next(iter(signatures))
    if not signatures:
        message = (
            f"is a SavedModel without a signature such as {SIGNATURE!r}, which says what goes in and out"
        )
        raise Refused(message)
    signature = signatures[name]
    tensors = signature.structured_input_signature[1]
    keys = list(tensors)
    inputs = tuple(
        InputSpec(_complete(tuple(spec.shape)[1:], input_size), spec.dtype.name) for spec in tensors.values()
    )

    def call(*values: Any) -> list[Any]:
        outputs = signature(**dict(zip(keys, values, strict=True)))
        return [outputs[key] for key in sorted(outputs)]

    rebuilds = [
        Rebuild(GRAPH, lambda: _from_function(call, inputs, loaded)),
    ]
    if (path / "keras_metadata.pb").is_file():

        def build() -> Any:
            return keras_2.to_keras_3(keras_2.load(path, allow_code=True, imports=imports), folder)

        rebuilds.insert(0, Rebuild(LAYERS, build))
    return Source(
        "SavedModel" + (" of Keras 2" if len(rebuilds) > 1 else ""),
        inputs,
        lambda arrays: [output.numpy() for output in call(*map(tf.constant, arrays))],
        tuple(rebuilds),
    )


def _open_frozen_graph(path: Path, input_size: tuple[int, int] | None) -> Source:
    import tensorflow as tf

    definition = tf.compat.v1.GraphDef()
    try:
        definition.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own
        message = f"is no frozen graph of TensorFlow: {error}"
        raise Refused(message) from error
    read = {re.sub(r"^\^|:\d+$", "", name) for node in definition.node for name in node.input}
    placeholders = [node for node in definition.node if node.op == "Placeholder"]
    ends = [
        node.name for node in definition.node if node.name not in read and node.op not in {"NoOp", "Const"}
    ]
    if len(placeholders) != 1 or len(ends) != 1:
        names = [node.name for node in placeholders]
        message = f"has the inputs {names} and the outputs {ends}: one of each is needed"
        raise Refused(message)
    wrapped = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(definition, name=""), [])
    function = wrapped.prune(f"{placeholders[0].name}:0", f"{ends[0]}:0")
    tensor = function.inputs[0]
    if tensor.shape.rank is None:
        message = f"does not say the shape of its input {placeholders[0].name!r}"
        raise Refused(message)
    inputs = (InputSpec(_complete(tuple(tensor.shape)[1:], input_size), tensor.dtype.name),)
    return Source(
        "frozen graph",
        inputs,
        lambda arrays: [function(tf.constant(arrays[0])).numpy()],
        (Rebuild(GRAPH, lambda: _from_function(function, inputs, wrapped)),),
    )


def _from_function(call: Callable[..., Any], inputs: tuple[InputSpec, ...], owner: Any) -> Any:
    """Make a model of the graph of a function, which TensorFlow Lite's converter simplifies first."""
    import tensorflow as tf
    from tensorflow.python.framework import convert_to_constants

    if len(inputs) != 1:
        message = f"has {len(inputs)} inputs: only a graph of one image can be rebuilt"
        raise Refused(message)
    (image,) = inputs
    function = tf.function(call).get_concrete_function(tf.TensorSpec((1, *image.shape), image.dtype))
    frozen = convert_to_constants.convert_variables_to_constants_v2(function)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen], owner)
    return tflite_layers.build(tflite_file.read(converter.convert()))


def _open_tflite(path: Path) -> Source:
    import tensorflow as tf

    data = path.read_bytes()
    graph = tflite_file.read(data)
    try:
        interpreter = tf.lite.Interpreter(model_content=data)
        for detail in interpreter.get_input_details():
            interpreter.resize_tensor_input(detail["index"], (1, *detail["shape"][1:]))
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        message = f"is not taken by the interpreter of TensorFlow Lite: {error}"
        raise Refused(message) from error
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def predict(arrays: Arrays) -> Arrays:
        for detail, array in zip(inputs, arrays, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        return [_real(interpreter.get_tensor(detail["index"]), detail) for detail in outputs]

    specs = tuple(
        InputSpec(tuple(int(side) for side in detail["shape"][1:]), np.dtype(detail["dtype"]).name)
        for detail in inputs
    )
    return Source(
        "TensorFlow Lite" + (", quantised" if graph.rounds else ""),
        specs,
        predict,
        (Rebuild(GRAPH, lambda: tflite_layers.build(graph)),),
        graph.rounds,
        graph.input_limits,
    )


def _real(values: NDArray[Any], detail: Any) -> NDArray[Any]:
    """The real numbers that an output of the interpreter stands for."""
    scale, zero_point = detail["quantization"]
    if not scale or values.dtype.kind not in "iu":
        return values
    return np.asarray((values.astype(np.float32) - zero_point) * scale)
