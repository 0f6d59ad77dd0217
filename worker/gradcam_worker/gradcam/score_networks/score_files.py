"""Loads files of networks that only give scores: ONNX, TFLite, and Keras models that are not taken apart."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible, WeightsChecksumMismatch, WeightsUnavailable
from gradcam_worker.gradcam.catalog import (
    Head,
    Layout,
    ModelFile,
    NetworkRow,
    Preprocessing,
    find_preprocessing,
)
from gradcam_worker.gradcam.files import label_file
from gradcam_worker.gradcam.files.label_file import Labels
from gradcam_worker.gradcam.files.weights import WeightsFile, file_sha256
from gradcam_worker.gradcam.score_networks.onnx_scores import OnnxModel
from gradcam_worker.gradcam.score_networks.score_network import ScoreNetwork
from gradcam_worker.gradcam.score_networks.tensor_layout import choose_output, to_type
from gradcam_worker.gradcam.score_networks.tflite_scores import TfliteModel
from gradcam_worker.gradcam.sizing import Sizing, resolve_sizing

ONNX, TFLITE = ".onnx", ".tflite"
BYTES_PER_FLOAT = 4


def load_score_network(
    file: Path | str,
    *,
    input_size: tuple[int, int],
    preprocessing: Preprocessing | str,
    sizing: Sizing | str = "area",
    labels: Labels = (),
    head: Head | None = None,
    layout: Layout | None = None,
    name: str | None = None,
    threads: int = 0,
) -> ScoreNetwork:
    """Load an ONNX or TFLite file for `explain_image`: RISE and occlusion explain it.

    Args:
        file: Its path, which ends in `.onnx` (extra `onnx`) or `.tflite` (extra `tflite`).
        input_size: (height, width) of its images, in pixels.
        preprocessing: As for `wrap_model`.
        sizing: As for `wrap_model`.
        labels: As for `wrap_model`; default: the numbers of the classes.
        head: What its outputs are, or which of them to take; default: found out with sample images.
        layout: Order of the input's dimensions, `nchw` or `nhwc`; default: read from the file.
        name: Of the network; default: that of the file.
        threads: Number of threads; 0: one for each core.

    Returns:
        A network for `explain_image`.

    Raises:
        MissingExtra: The extra is not installed.
        NetworkIncompatible: It cannot be loaded, or does not classify images of this size.
        InvalidSettings: There is no such sizing.
        OSError: It cannot be read.

    Examples:
        ```python
        network = load_score_network("model.onnx", input_size=(224, 224), preprocessing="torch")
        explain_image(network, "coffee.jpg", top_n=1).save("out/")
        ```
    """
    path = Path(file)
    sha256 = file_sha256(path)
    found = find_preprocessing(preprocessing)
    row = NetworkRow(
        name=name or path.stem,
        input_size=input_size,
        preprocessing=found,
        sizing=resolve_sizing(sizing, found.pixel_channels),
        file=ModelFile(str(path), sha256),
        labels=label_file.given(labels),
        head=head or Head(),
        scores_only=True,
        layout=layout,
    )
    return load_file(row, WeightsFile(path, sha256), threads=threads)


def load_file(row: NetworkRow, file: WeightsFile, *, threads: int = 0) -> ScoreNetwork:
    """Load an operator's network that only gives scores.

    Args:
        row: What the registry says about it.
        file: The file.
        threads: Number of threads of onnxruntime and LiteRT; 0: one for each core.

    Returns:
        The network.

    Raises:
        MissingExtra: An extra is not installed.
        NetworkIncompatible: It cannot be loaded, or does not classify images of this size.
        WeightsChecksumMismatch: The file has changed since it was verified.
        WeightsUnavailable: It is gone.
    """
    address = row.file.uri if row.file else str(file.path)
    if not address.endswith((ONNX, TFLITE)):
        return _keras(row, file)
    try:
        data = file.path.read_bytes()
    except FileNotFoundError as error:  # another process has removed it from the cache
        message = f"{file.path} was there a moment ago and is gone: another process needed its room."
        raise WeightsUnavailable(message) from error
    if (sha256 := hashlib.sha256(data).hexdigest()) != file.sha256:
        message = f"{address} should have sha256 {file.sha256} but has {sha256}: it was not loaded."
        raise WeightsChecksumMismatch(message)
    model = (OnnxModel if address.endswith(ONNX) else TfliteModel)(row, data, threads=threads)
    return ScoreNetwork(
        row,
        model,
        backend=model.version,
        dtype=model.dtype,
        weights_sha256=file.sha256,
        stored_bytes=len(data),
        coarse=model.is_coarse,
    )


def _keras(row: NetworkRow, file: WeightsFile) -> ScoreNetwork:
    """A Keras model that is not taken apart. Keras is imported here."""
    from gradcam_worker.gradcam import backend
    from gradcam_worker.gradcam.graph.trace import output_names
    from gradcam_worker.gradcam.models import loading

    with backend.default_configuration():
        model = loading.load_operator_model(row, file)
        dtype, output = "float32", 0
        if inputs := getattr(model, "inputs", None):  # a subclassed model has none
            if len(inputs) != 1:
                message = f"{row.name} has {len(inputs)} inputs; one, the image, is needed."
                raise NetworkIncompatible(message)
            dtype = backend.keras.backend.standardize_dtype(inputs[0].dtype)
            row.check_input_type(dtype)
            names = output_names(model)
            output = names.index(choose_output(row, names))

        def run(images: NDArray[np.float32]) -> Any:
            outputs = model.predict_on_batch(to_type(images, dtype))
            return backend.keras.tree.flatten(outputs)[output]

        return ScoreNetwork(
            row,
            run,
            backend=backend.version(),
            dtype=backend.arithmetic(str(model.dtype_policy.compute_dtype)),
            weights_sha256=file.sha256,
            stored_bytes=BYTES_PER_FLOAT * model.count_params(),
            parameters=model.count_params(),
        )
