"""Loading networks: a row of the catalog or registry with its weights, or any Keras model."""

import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from gradcam_worker.errors import NetworkIncompatible, WeightsUnavailable
from gradcam_worker.gradcam import backend, catalog, device_memory
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import Head, NetworkRow, Preprocessing, find_preprocessing
from gradcam_worker.gradcam.files import label_file, model_file, weights
from gradcam_worker.gradcam.files.file_cache import FileCache
from gradcam_worker.gradcam.files.label_file import Labels
from gradcam_worker.gradcam.files.weights import WeightsFile
from gradcam_worker.gradcam.graph.trace import IMAGE_RANK, find_image_input
from gradcam_worker.gradcam.models import compiled_forward, own_layers
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.models.precision import with_precision
from gradcam_worker.gradcam.network_inputs import NetworkInput
from gradcam_worker.gradcam.sizing import Sizing, resolve_sizing

IMAGENET = "imagenet"  # weights that Keras downloads
SAVED_MODEL_LAYER = (
    "({0}), a whole SavedModel, which Keras cannot take apart. Build it of the layers of Keras, of "
    "keras.applications perhaps, and save the model again."
)
REFUSED_LAYERS = {
    "Lambda": "a Lambda layer ({0}), which calls whatever its file names, and is not loaded. Replace it by "
    "layers or keras.ops, and save the model again; or let `gradcam convert FILE NAME.keras` do that.",
    "KerasLayer": f"a layer of TensorFlow Hub {SAVED_MODEL_LAYER}",
    "TFSMLayer": f"a TFSMLayer {SAVED_MODEL_LAYER}",
}


def load_network(
    network: str | NetworkRow,
    *,
    weights_dir: Path | str | None = None,
    random_seed: int | None = None,
    sizing: Sizing | str | None = None,
    file: WeightsFile | None = None,
    precision: str = "float32",
    exact_backward: bool = False,
    forward: str = "auto",
    forward_cache: FileCache | None = None,
) -> KerasNetwork:
    """Load a network of the catalog, or an operator's own, with its weights.

    Args:
        network: Its name, as in `gradcam networks`, or its row.
        weights_dir: A folder with weights; default: those in the package, else the download of Keras.
        random_seed: Use seeded random weights instead, for tests and benchmarks.
        sizing: How images are brought to the input size: a name of `sizing.SIZINGS`, or a `Sizing`;
            default: as the row says.
        file: The verified file of an operator's network.
        precision: `float32`, `tf32`, `bfloat16` or `mixed_bfloat16`. Whether a GPU may use TF32 is a setting
            of the whole process: the last loaded network decides.
        exact_backward: Run the whole backward pass, even if a shorter one gives the same result.
        forward: What computes the forward pass of Grad-CAM on a CPU: `tensorflow`, `openvino`, or `auto`,
            which is OpenVINO where it is installed. OpenVINO is used in float32 alone, where the backward
            pass is a short one, and where it agrees with TensorFlow to 1e-5; else TensorFlow.
        forward_cache: Keeps what is converted for OpenVINO, if the weights come from a file.

    Returns:
        A network for `explain_image`.

    Raises:
        UnknownNetwork: The catalog has no such network.
        WeightsUnavailable: Its weights are missing and cannot be downloaded.
        WeightsChecksumMismatch: The file has another checksum.
        NetworkIncompatible: It cannot be explained.
        UnknownLayer: Its target layer does not exist.
        InvalidSettings: There is no such precision, forward pass or sizing, or OpenVINO is not installed.
        DeviceOutOfMemory: The device has no room for it at present.

    Examples:
        ```python
        network = load_network("efficientnet_lite0")
        ```
    """
    row = catalog.find(network) if isinstance(network, str) else network
    if sizing is not None:
        row = replace(row, sizing=resolve_sizing(sizing, row.preprocessing.pixel_channels))
    compiled_forward.check(forward)
    with backend.default_configuration(), device_memory.explained(f"the network {row.name}"):
        if row.file is not None and random_seed is None:
            if file is None:
                message = f"The file of {row.name} ({row.file.uri}) has not been fetched."
                raise WeightsUnavailable(message)
            model, sha256 = load_operator_model(row, file), file.sha256
        elif random_seed is not None:
            keras.utils.set_random_seed(random_seed)
            pretrained = row.file is None or bool(row.pretrained)
            model, sha256 = _build(row, pretrained=pretrained, weights=None), None
        else:
            model, sha256 = _load_catalog_model(row, Path(weights_dir) if weights_dir else None)
        model = with_precision(model, precision)
        backend.allow_tf32(precision == "tf32")
        loaded = KerasNetwork(row, model, weights_sha256=sha256, exact_backward=exact_backward)
        compiled_forward.compile_forward(loaded, row, forward, forward_cache)
        return loaded


def wrap_model(  # noqa: PLR0913  # all but the model are named by the caller
    model: Any,
    *,
    preprocessing: Preprocessing | str,
    labels: Labels = (),
    input_size: tuple[int, int] | None = None,
    sizing: Sizing | str = "area",
    target_layer: str | None = None,
    head: Head | None = None,
    name: str | None = None,
    exact_backward: bool = False,
    inputs: Sequence[NetworkInput] = (),
    image_input: str | None = None,
) -> KerasNetwork:
    """Make a network for `explain_image` of any Keras image classifier. The model is not changed.

    Some weights are copied or summed: a model that is trained further must be wrapped again.

    Args:
        model: A Keras model that takes an image, and perhaps further inputs.
        preprocessing: Of the pixels before training: `caffe`, `tf`, `torch`, `lite`, `unit`, `none`, or a
            `Preprocessing`.
        labels: Names of the classes in the order of the outputs; or names with their ids, as Keras's
            `class_indices`, or ids with their names, as `id2label`; or the path of a file of them, as in a
            registry; or `imagenet`. Default: their numbers.
        input_size: (height, width) in pixels, if the model takes any size.
        sizing: How images are brought to the input size: `area`, `keras.load_img`, `tf.image.resize`,
            `image_dataset_from_directory`, `torchvision`, `timm`, `opencv`, or a `Sizing`.
        target_layer: The layer to explain; default: found in the graph.
        head: How to read the outputs, if the graph does not show it.
        name: Of the network; default: that of the model.
        exact_backward: Run the whole backward pass, even if a shorter one gives the same result.
        inputs: What the model takes beside the image: `explain_image` gets their values.
        image_input: The name of the model's input for the image; default: found by its shape.

    Returns:
        A network for `explain_image`.

    Raises:
        NetworkIncompatible: It cannot be explained, or labels cannot be used; the message gives the reason.
        InvalidSettings: There is no such sizing.
        UnknownLayer: The target layer does not exist.

    Examples:
        ```python
        network = wrap_model(model, preprocessing="tf", labels=["benign", "malignant"])
        ```
    """
    if not isinstance(model, keras.Model):
        message = (
            f"wrap_model takes a model of Keras {keras.__version__}, not {_named(model)}: load a file by "
            "keras.saving.load_model, make a .keras file of an older one by gradcam convert, and wrap "
            "anything else by wrap_callable."
        )
        raise NetworkIncompatible(message)
    preprocessing = find_preprocessing(preprocessing)
    if input_size is None:
        image = find_image_input(model, image_input) if getattr(model, "inputs", None) else None
        if image is None or None in image.shape[1:3]:
            message = f"{model.name} does not say how large its input is: give input_size (height, width)."
            raise NetworkIncompatible(message)
        if len(image.shape) != IMAGE_RANK:
            message = f"{model.name} takes {image.shape}; an image is (None, height, width, channels)."
            raise NetworkIncompatible(message)
        input_size = image.shape[1:3]
    row = NetworkRow(
        name=name or model.name,
        input_size=input_size,
        preprocessing=preprocessing,
        target_layer=target_layer,
        labels=label_file.given(labels),
        head=head or Head(),
        sizing=resolve_sizing(sizing, preprocessing.pixel_channels),
        inputs=tuple(inputs),
        image_input=image_input,
    )
    return KerasNetwork(row, model, weights_sha256=None, exact_backward=exact_backward)


def _named(value: Any) -> str:
    """A value in a message: itself where it is short, else its type."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return repr(value) if isinstance(value, str | PurePath | None) else f"a {kind}"


def _build(row: NetworkRow, *, pretrained: bool = True, random: bool = True, **options: Any) -> Any:
    """Build the architecture of a row; for an operator's network with its input size and number of classes.

    With `pretrained` the graph is that of `weights="imagenet"`, whatever `weights` are. Without `random` the
    weights are zeros, for those that are loaded next: to draw them takes most of the time, above all on JAX.
    Raises NetworkIncompatible.
    """
    if row.builder is None:
        message = f"{row.name} is a whole model in a file; it has no architecture to build without it."
        raise NetworkIncompatible(message)
    module, function = row.builder.split(":")
    if module == "keras.applications" or row.file is not None:  # MobileNetV3 takes any size if none is given
        options["input_shape"] = (*row.input_size, row.preprocessing.input_channels)
    if row.file is not None:
        options["classes"] = row.classes
        if row.head.kind:  # softmax or sigmoid: see `registry_file`
            options["classifier_activation"] = row.head.kind
    with nullcontext() if random else keras.StatelessScope():  # at its end, weights made in it get values
        models = [getattr(import_module(module), function)(**options)]
        if pretrained and row.imagenet_scale and options.get("weights") != IMAGENET:
            models.append(_add_imagenet_rescaling(models[0], row))
        for weight in [] if random else [weight for model in models for weight in model.weights]:
            weight._initializer = np.zeros  # noqa: SLF001  # Keras's builders take no initializers
    return models[-1]


def _add_imagenet_rescaling(model: Any, row: NetworkRow) -> Any:
    """Add the rescaling after normalisation that Keras adds only for the weights of ImageNet."""
    if row.preprocessing.input_channels != len(row.imagenet_scale):
        message = f"{row.name} has pretrained = true, which three channels of colour belong to."
        raise NetworkIncompatible(message)

    def call_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = layer(*args, **kwargs)
        is_last = isinstance(layer, keras.layers.Normalization)
        return keras.layers.Rescaling(list(row.imagenet_scale))(outputs) if is_last else outputs

    def copy_layer(layer: Any) -> Any:
        return type(layer).from_config(layer.get_config())

    return keras.models.clone_model(model, clone_function=copy_layer, call_function=call_layer)


def load_operator_model(row: NetworkRow, file: WeightsFile) -> Any:
    """Load an operator's model from its verified file, without running code in it: no lambdas, no pickles.

    Args:
        row: What the registry says about the network.
        file: The file.

    Returns:
        The Keras model.

    Raises:
        NetworkIncompatible: It cannot be loaded.
        WeightsUnavailable: It is gone.
    """
    uri = row.file.uri if row.file else str(file.path)
    name = PurePath(uri).name
    try:
        if row.builder is not None:
            return _build_with_weights(row, file.path, name)
        _refuse_layers(row, model_file.read_config(file.path, name))
        own = own_layers.import_modules(row) if row.imports else {}
        return keras.saving.load_model(file.path, custom_objects=own, compile=False, safe_mode=True)
    except NetworkIncompatible:
        raise
    except FileNotFoundError as error:  # another process has removed it from the cache
        message = f"{file.path} was there a moment ago and is gone: another process needed its room."
        raise WeightsUnavailable(message) from error
    except Exception as error:  # Keras, h5py and zipfile raise anything for an invalid file
        message = f"{uri} cannot be loaded as {row.name}: {_reason(error, row, file.path, name)}"
        raise NetworkIncompatible(message) from error


def _reason(error: Exception, row: NetworkRow, path: Path, name: str) -> str:
    """Why a file was not loaded; for one of an older Keras only how to convert it, as that is long."""
    if isinstance(error, model_file.Refused):
        return f"it {error}"
    version = model_file.keras_version(path)
    if re.match("[012][.]", version):
        line = model_file.CONVERT.format(shlex.quote(name))
        return f"Keras {version} saved it. Convert it with `{line}`"
    return own_layers.why_not_loaded(error, row)


def _build_with_weights(row: NetworkRow, path: Path, name: str) -> Any:
    """Build the architecture as it was when the weights were trained, and load them. Raises ValueError."""
    layout = model_file.check_weights(path, name)
    model = _build(row, pretrained=_is_pretrained(row, path), random=False, weights=None)
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # Keras chooses the format by the ending, not by the content
        link = Path(folder) / ("a.weights.h5" if layout == "keras3" else "a.h5")
        link.symlink_to(path.absolute())
        model.load_weights(link)
    return model


def _is_pretrained(row: NetworkRow, path: Path) -> bool:
    """Whether weights were trained in the graph that Keras builds with `weights="imagenet"`.

    Both graphs load the weights of the other without an error. Raises ValueError if neither the registry nor
    the file shows it, or if they disagree.
    """
    if not row.imagenet_scale:
        return True  # both graphs are the same
    count = model_file.count_rescalings(path)
    if row.file is None:  # the catalog's weights are ImageNet's; only files of Keras 3 list all layers
        return count != 1 or model_file.layout(path) != "keras3"
    in_file = None if count is None else count > 1
    if in_file is None and row.pretrained is None:
        message = (
            'it does not tell whether the network was built with weights="imagenet", which adds a layer: '
            "write pretrained = true or false into its table"
        )
        raise ValueError(message)
    if in_file is not None and row.pretrained not in {None, in_file}:
        built = 'weights="imagenet"' if in_file else "weights=None, or with a path"
        message = (
            f"its layers are those of a network built with {built}: pretrained must be {str(in_file).lower()}"
        )
        raise ValueError(message)
    return bool(in_file if row.pretrained is None else row.pretrained)


def _refuse_layers(row: NetworkRow, config: dict[str, Any]) -> None:
    """Raise NetworkIncompatible for layers that are unsafe or opaque.

    Keras's `safe_mode` refuses a Lambda with stored code, but not one that calls a function by its name.
    """
    pending: list[Any] = [config]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, dict):
            pending += node.values()
            kinds = {re.split(r"[.>]", str(node.get(key)))[-1] for key in ("class_name", "registered_name")}
            for kind in sorted(kinds & REFUSED_LAYERS.keys()):
                settings = node.get("config")
                name = settings.get("name") if isinstance(settings, dict) else None
                message = f"{row.name} has {REFUSED_LAYERS[kind].format(name)}"
                raise NetworkIncompatible(message)


def _load_catalog_model(row: NetworkRow, directory: Path | None) -> tuple[Any, str]:
    file = weights.find_weights(row, directory)
    if file is None:
        with _silent_progress():
            build = partial(_build, row, weights=IMAGENET)
            model, file = weights.download(row, build, partial(_keras_download_path, row))
        return model, file.sha256
    try:
        return _build_with_weights(row, file.path, file.path.name), file.sha256
    except Exception as error:  # Keras and h5py raise anything for an invalid file
        reason = _reason(error, row, file.path, file.path.name)
        message = f"{file.path} does not hold the weights of {row.name}: {reason}"
        raise NetworkIncompatible(message) from error


def _keras_download_path(row: NetworkRow) -> Path:
    """The path at which Keras stores the downloaded ImageNet weights."""
    return Path(keras.utils.get_file(row.keras_files[0], origin="", cache_subdir="models"))


@contextmanager
def _silent_progress() -> Iterator[None]:
    """Suppress the progress of a download, which Keras writes to standard output."""
    was_shown = keras.config.is_interactive_logging_enabled()
    keras.config.disable_interactive_logging()
    try:
        yield
    finally:
        if was_shown:
            keras.config.enable_interactive_logging()
