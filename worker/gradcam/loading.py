"""A row of the catalog, or any Keras model -> a live network, with its weights."""

import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from worker.errors import NetworkIncompatible, WeightsUnavailable
from worker.gradcam import backend, catalog, weights
from worker.gradcam.backend import keras
from worker.gradcam.catalog import PREPROCESSING, Head, NetworkRow, Preprocessing
from worker.gradcam.keras_network import KerasNetwork
from worker.gradcam.precision import with_precision
from worker.gradcam.weights import WeightsFile


def load_network(
    network: str | NetworkRow,
    *,
    weights_dir: Path | str | None = None,
    random_seed: int | None = None,
    file: WeightsFile | None = None,
    precision: str = "float32",
    exact_backward: bool = False,
) -> KerasNetwork:
    """Build a network of the catalog, or an operator's own, with its weights, ready to explain.

    Weights come from `file` where the row is an operator's; else from `weights_dir`, from the package where
    it ships them, or from Keras's own download. `random_seed` builds the network with seeded random weights
    instead, for tests and benchmarks. `precision` is float32, tf32, bfloat16 or mixed_bfloat16; whether a GPU
    may take TF32 for float32 holds for the whole process from then on, and is as the last network that was
    loaded wants it. `exact_backward` goes the whole way back also where a shorter one gives the same.

    Raises InvalidSettings, UnknownNetwork, WeightsUnavailable, WeightsChecksumMismatch, NetworkIncompatible,
    UnknownLayer.
    """
    row = catalog.find(network) if isinstance(network, str) else network
    if row.file is not None and random_seed is None:
        if file is None:
            message = f"The file of {row.name} ({row.file.uri}) has not been fetched."
            raise WeightsUnavailable(message)
        model, sha256 = _own_model(row, file), file.sha256
    elif random_seed is not None:
        keras.utils.set_random_seed(random_seed)
        model, sha256 = _build(row, weights=None), None
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
    """Any Keras image classifier -> a network that `explain_image` takes. The model is left as it is.

    `preprocessing` says what the model was trained on: a name of `catalog.PREPROCESSING` or one's own.
    `input_size` (height, width) is needed where the model takes any. Without `labels` classes have numbers.
    `exact_backward` goes the whole way back also where a shorter one gives the same.

    Some weights are copied, or summed: a model that is trained further has to be wrapped again.

    Raises NetworkIncompatible, UnknownLayer.
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


def _build(row: NetworkRow, **options: Any) -> Any:
    """The row's architecture, of its own size and number of classes where they are an operator's."""
    if row.builder is None:
        message = f"{row.name} is a whole model in a file; it has no architecture to build without it."
        raise NetworkIncompatible(message)
    module, function = row.builder.split(":")
    if row.file is not None:
        shape = (*row.input_size, row.preprocessing.input_channels)
        options |= {"classes": row.classes, "input_shape": shape}
        if row.head.kind:  # softmax or sigmoid: see `registry_file`
            options["classifier_activation"] = row.head.kind
    return getattr(import_module(module), function)(**options)


def _own_model(row: NetworkRow, file: WeightsFile) -> Any:
    """An operator's model from its verified file. Nothing in a file is run: no lambdas, no pickles."""
    try:
        if row.builder is None:
            _refuse_lambdas(row, file.path)
            return keras.saving.load_model(file.path, compile=False, safe_mode=True)
        model = _build(row, weights=None)
        model.load_weights(file.path)
    except NetworkIncompatible:
        raise
    except FileNotFoundError as error:  # another process has made room in the cache just now
        message = f"{file.path} was there a moment ago and is gone: another process needed its room."
        raise WeightsUnavailable(message) from error
    except Exception as error:  # whatever Keras, h5py and zipfile make of a file that is something else
        reason = " ".join(str(error).split())[:500]
        message = f"{file.path} cannot be loaded as {row.name}: {reason}"
        raise NetworkIncompatible(message) from error
    return model


def _refuse_lambdas(row: NetworkRow, path: Path) -> None:
    """`safe_mode` refuses a Lambda of stored code; one of a name would still call what the file names."""
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    waiting = [config]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.values()
            names = [str(one.get(key)) for key in ("class_name", "registered_name")]
            if any(re.split(r"[.>]", name)[-1] == "Lambda" for name in names):
                settings = one.get("config")
                name = settings.get("name") if isinstance(settings, dict) else None
                message = (
                    f"{row.name} has a Lambda layer ({name}), which calls whatever its file names, and is "
                    "not loaded. Replace it by layers or keras.ops, and save the model again."
                )
                raise NetworkIncompatible(message)


def _with_weights(row: NetworkRow, directory: Path | None) -> tuple[Any, str]:
    file = weights.locate(row, directory)
    if file is None:
        with _silent_progress():
            build = partial(_build, row, weights="imagenet")
            model, file = weights.download(row, build, partial(_cached, row))
        return model, file.sha256
    try:
        return _build(row, weights=str(file.path)), file.sha256
    except (OSError, ValueError) as error:
        message = f"{file.path} does not hold the weights of {row.name}: {error}"
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
