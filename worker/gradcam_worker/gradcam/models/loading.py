"""A row of the catalog, or any Keras model -> a live network, with its weights."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

from gradcam_worker.errors import NetworkIncompatible, WeightsUnavailable
from gradcam_worker.gradcam import backend, catalog
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import PREPROCESSING, Head, NetworkRow, Preprocessing
from gradcam_worker.gradcam.models import model_file, weights
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.models.precision import with_precision
from gradcam_worker.gradcam.models.weights import WeightsFile
from gradcam_worker.text.visible import abridged

IMAGENET = "imagenet"  # the weights that Keras downloads
SAVED_MODEL_LAYER = (
    "({0}), a whole SavedModel, which Keras cannot take apart. Build it of the layers of Keras, of "
    "keras.applications perhaps, and save the model again."
)
REFUSED_LAYERS = {
    "Lambda": "a Lambda layer ({0}), which calls whatever its file names, and is not loaded. Replace it by "
    "layers or keras.ops, and save the model again.",
    "KerasLayer": f"a layer of TensorFlow Hub {SAVED_MODEL_LAYER}",
    "TFSMLayer": f"a TFSMLayer {SAVED_MODEL_LAYER}",
}


def load_network(
    network: str | NetworkRow,
    *,
    weights_dir: Path | str | None = None,
    random_seed: int | None = None,
    file: WeightsFile | None = None,
    precision: str = "float32",
    exact_backward: bool = False,
) -> KerasNetwork:
    """Load a network of the catalog, or an operator's own, with its weights.

    Args:
        network: its name, as in `gradcam networks`, or its row.
        weights_dir: a folder with weights; default: those in the package, else Keras's download.
        random_seed: build it with seeded random weights instead, for tests and benchmarks.
        file: the verified file of an operator's row.
        precision: `float32`, `tf32`, `bfloat16` or `mixed_bfloat16`. Whether a GPU may use TF32 holds for the
            whole process, and is as the last loaded network asked for.
        exact_backward: take the whole backward pass, also where a shorter one gives the same.

    Returns:
        A network for `explain_image`.

    Raises:
        UnknownNetwork: the catalog has no such network.
        WeightsUnavailable: its weights are neither here nor can they be downloaded.
        WeightsChecksumMismatch: the file is not the expected one.
        NetworkIncompatible: it cannot be explained.
        UnknownLayer: its target layer does not exist.
        InvalidSettings: there is no such precision.

    Example:
        ```python
        network = load_network("efficientnet_lite0")
        ```
    """
    row = catalog.find(network) if isinstance(network, str) else network
    with backend.default_configuration():
        if row.file is not None and random_seed is None:
            if file is None:
                message = f"The file of {row.name} ({row.file.uri}) has not been fetched."
                raise WeightsUnavailable(message)
            model, sha256 = _own_model(row, file), file.sha256
        elif random_seed is not None:
            keras.utils.set_random_seed(random_seed)
            pretrained = row.file is None or bool(row.pretrained)
            model, sha256 = _build(row, pretrained=pretrained, weights=None), None
        else:
            model, sha256 = _with_weights(row, Path(weights_dir) if weights_dir else None)
        model = with_precision(model, precision)
        backend.allow_tf32(precision == "tf32")
        return KerasNetwork(row, model, weights_sha256=sha256, exact_backward=exact_backward)


def wrap_model(
    model: Any,
    *,
    preprocessing: Preprocessing | str,
    labels: tuple[str, ...] | list[str] = (),
    input_size: tuple[int, int] | None = None,
    target_layer: str | None = None,
    head: Head | None = None,
    name: str | None = None,
    exact_backward: bool = False,
) -> KerasNetwork:
    """Make any Keras image classifier a network that `explain_image` takes. The model is not changed.

    Some weights are copied, or summed: a model that is trained further has to be wrapped again.

    Args:
        model: a Keras model with one image input.
        preprocessing: what was done to pixels before training: `caffe`, `tf`, `torch`, `lite`, `unit`,
            `none`, or a `Preprocessing` of your own.
        labels: names of the classes; default: their numbers.
        input_size: (height, width), where the model takes any size.
        target_layer: the layer to explain; default: found in the graph.
        head: how to read the output, where the graph does not say.
        name: of the network; default: the model's.
        exact_backward: take the whole backward pass, also where a shorter one gives the same.

    Returns:
        A network for `explain_image`.

    Raises:
        NetworkIncompatible: it cannot be explained; the message says why.
        UnknownLayer: there is no such target layer.

    Example:
        ```python
        network = wrap_model(model, preprocessing="tf", labels=["benign", "malignant"])
        ```
    """
    if isinstance(preprocessing, str) and preprocessing not in PREPROCESSING:
        message = f"There is no preprocessing {preprocessing!r}; there are {', '.join(PREPROCESSING)}."
        raise NetworkIncompatible(message)
    how = PREPROCESSING[preprocessing] if isinstance(preprocessing, str) else preprocessing
    if input_size is None:
        shapes = [one.shape[1:3] for one in keras.tree.flatten(getattr(model, "inputs", None) or [])]
        if len(shapes) != 1 or None in shapes[0]:
            message = f"{model.name} does not say how large its input is: give input_size (height, width)."
            raise NetworkIncompatible(message)
        input_size = shapes[0]
    row = NetworkRow(
        name=name or model.name,
        input_size=input_size,
        preprocessing=how,
        target_layer=target_layer,
        labels=tuple(labels),
        head=head or Head(),
    )
    return KerasNetwork(row, model, weights_sha256=None, exact_backward=exact_backward)


def _build(row: NetworkRow, *, pretrained: bool = True, **options: Any) -> Any:
    """The row's architecture, of its own size and number of classes where they are an operator's.

    `pretrained`: as Keras builds it with `weights="imagenet"`, whatever `weights` are. Raises
    NetworkIncompatible.
    """
    if row.builder is None:
        message = f"{row.name} is a whole model in a file; it has no architecture to build without it."
        raise NetworkIncompatible(message)
    module, function = row.builder.split(":")
    if row.file is not None:
        shape = (*row.input_size, row.preprocessing.input_channels)
        options |= {"classes": row.classes, "input_shape": shape}
        if row.head.kind:  # softmax or sigmoid: see `registry_file`
            options["classifier_activation"] = row.head.kind
    model = getattr(import_module(module), function)(**options)
    if pretrained and row.imagenet_scale and options.get("weights") != IMAGENET:
        return _with_imagenet_step(model, row)
    return model


def _with_imagenet_step(model: Any, row: NetworkRow) -> Any:
    """The model with the step that Keras adds behind its normalisation for ImageNet's weights alone."""
    if row.preprocessing.input_channels != len(row.imagenet_scale):
        message = f"{row.name} has pretrained = true, which three channels of colour belong to."
        raise NetworkIncompatible(message)

    def called(layer: Any, *args: Any, **kwargs: Any) -> Any:
        made = layer(*args, **kwargs)
        is_last = isinstance(layer, keras.layers.Normalization)
        return keras.layers.Rescaling(list(row.imagenet_scale))(made) if is_last else made

    def copied(layer: Any) -> Any:
        return type(layer).from_config(layer.get_config())

    return keras.models.clone_model(model, clone_function=copied, call_function=called)


def _own_model(row: NetworkRow, file: WeightsFile) -> Any:
    """An operator's model from its verified file. Nothing in a file is run: no lambdas, no pickles."""
    uri = row.file.uri if row.file else str(file.path)
    name = PurePath(uri).name
    try:
        if row.builder is not None:
            return _weighted(row, file.path, name)
        _refuse_layers(row, model_file.read_config(file.path, name))
        return keras.saving.load_model(file.path, compile=False, safe_mode=True)
    except NetworkIncompatible:
        raise
    except FileNotFoundError as error:  # another process has made room in the cache just now
        message = f"{file.path} was there a moment ago and is gone: another process needed its room."
        raise WeightsUnavailable(message) from error
    except Exception as error:  # whatever Keras, h5py and zipfile make of a file that is something else
        message = f"{uri} cannot be loaded as {row.name}: {_reason(error, file.path, name)}"
        raise NetworkIncompatible(message) from error


def _reason(error: Exception, path: Path, name: str) -> str:
    """Why a file was not loaded; of one that an older Keras saved, what to do, and no more: that is long."""
    if isinstance(error, model_file.Refused):
        return f"it {error}"
    version = model_file.keras_version(path)
    if re.match("[012][.]", version):
        return f"Keras {version} saved it. Convert it with {model_file.FROM_KERAS_2.format(name)}"
    return abridged(str(error)) or type(error).__name__


def _weighted(row: NetworkRow, path: Path, name: str) -> Any:
    """The row's architecture as it was when these weights were trained, with them. Raises ValueError."""
    layout = model_file.check_weights(path, name)
    model = _build(row, pretrained=_is_pretrained(row, path), weights=None)
    with tempfile.TemporaryDirectory() as folder:  # Keras goes by the ending, whatever is in the file
        link = Path(folder) / ("a.weights.h5" if layout == "keras3" else "a.h5")
        link.symlink_to(path.absolute())
        model.load_weights(link)
    return model


def _is_pretrained(row: NetworkRow, path: Path) -> bool:
    """Whether weights belong to the graph that Keras builds with `weights="imagenet"`.

    Both graphs take the weights of either without a word. Raises ValueError where neither the registry nor
    the file tells, or where they disagree.
    """
    if not row.imagenet_scale:
        return True  # there is one graph only
    count = model_file.rescalings(path)
    if row.file is None:  # those of the catalog are ImageNet's; only Keras 3 lists all layers of a file
        return count != 1 or model_file.layout(path) != "keras3"
    seen = None if count is None else count > 1
    if seen is None and row.pretrained is None:
        message = (
            'it does not tell whether the network was built with weights="imagenet", which adds a layer: '
            "write pretrained = true or false into its table"
        )
        raise ValueError(message)
    if seen is not None and row.pretrained not in {None, seen}:
        built = 'weights="imagenet"' if seen else "weights=None, or with a path"
        message = (
            f"its layers are those of a network built with {built}: pretrained must be {str(seen).lower()}"
        )
        raise ValueError(message)
    return bool(seen if row.pretrained is None else row.pretrained)


def _refuse_layers(row: NetworkRow, config: dict[str, Any]) -> None:
    """`safe_mode` refuses a Lambda of stored code; one of a name would still call what the file names.

    Raises NetworkIncompatible.
    """
    waiting: list[Any] = [config]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.values()
            kinds = {re.split(r"[.>]", str(one.get(key)))[-1] for key in ("class_name", "registered_name")}
            for kind in sorted(kinds & REFUSED_LAYERS.keys()):
                settings = one.get("config")
                name = settings.get("name") if isinstance(settings, dict) else None
                message = f"{row.name} has {REFUSED_LAYERS[kind].format(name)}"
                raise NetworkIncompatible(message)


def _with_weights(row: NetworkRow, directory: Path | None) -> tuple[Any, str]:
    file = weights.locate(row, directory)
    if file is None:
        with _silent_progress():
            build = partial(_build, row, weights=IMAGENET)
            model, file = weights.download(row, build, partial(_cached, row))
        return model, file.sha256
    try:
        return _weighted(row, file.path, file.path.name), file.sha256
    except Exception as error:  # whatever Keras and h5py make of a file that is something else
        reason = _reason(error, file.path, file.path.name)
        message = f"{file.path} does not hold the weights of {row.name}: {reason}"
        raise NetworkIncompatible(message) from error


def _cached(row: NetworkRow) -> Path:
    """Where Keras keeps the row's ImageNet weights, once it has downloaded them."""
    return Path(keras.utils.get_file(row.keras_files[0], origin="", cache_subdir="models"))


@contextmanager
def _silent_progress() -> Iterator[None]:
    """Keras shows a download's progress on standard output, which belongs to our own answer."""
    shown = keras.config.is_interactive_logging_enabled()
    keras.config.disable_interactive_logging()
    try:
        yield
    finally:
        if shown:
            keras.config.enable_interactive_logging()
