"""ONNX and TFLite files, and Keras models that are not taken apart: all are explained by their scores."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible, WeightsChecksumMismatch
from gradcam_worker.gradcam import explain_image, load_score_network
from gradcam_worker.gradcam.catalog import PREPROCESSING, Head, ModelFile, NetworkRow
from gradcam_worker.gradcam.files.weights import WeightsFile, file_sha256
from gradcam_worker.gradcam.network import Method
from gradcam_worker.gradcam.score_networks import score_files

SIZE = (12, 16)
KERNEL = np.array([[6, -3], [-3, 6], [-3, -3]], np.float32)  # of the three colours, for two classes
PIXELS = np.random.default_rng(1).integers(0, 256, (5, *SIZE, 3), np.uint8)
OPTIONS: dict[str, Any] = {"input_size": SIZE, "preprocessing": "unit"}


def expected_scores(pixels: NDArray[np.uint8] = PIXELS) -> NDArray[np.float64]:
    """The means of the colours, from 0 to 1, times the kernel."""
    scores: NDArray[np.float64] = pixels.mean((1, 2)) / 255 @ KERNEL
    return scores


def onnx_file(
    folder: Path,
    *,
    layout: str = "nchw",
    shape: tuple[Any, ...] | None = None,
    softmax: bool = False,
    dtype: str = "FLOAT",
    outputs: int = 1,
) -> Path:
    """Write an ONNX model: mean of each channel, dense, softmax."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape = shape or (("n", 3, *SIZE) if layout == "nchw" else ("n", *SIZE, 3))
    axes = [2, 3] if layout == "nchw" else [1, 2]
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "kernel"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    named = ["probabilities" if softmax else "logits", "means"][:outputs]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", getattr(TensorProto, dtype), shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in named],
        [
            numpy_helper.from_array(KERNEL, "kernel"),
            numpy_helper.from_array(np.array(axes, np.int64), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("nchw", None),
        ("nhwc", None),
        ("nchw", (1, 3, *SIZE)),
        ("nchw", (2, 3, *SIZE)),
        ("nhwc", ("n", None, None, 3)),
    ],
)
def test_an_onnx_file_gives_the_scores_of_any_number_of_images_in_either_layout(
    layout: str, shape: tuple[Any, ...] | None, tmp_path: Path
) -> None:
    network = load_score_network(onnx_file(tmp_path, layout=layout, shape=shape), **OPTIONS)
    assert_allclose(network.scores(PIXELS), expected_scores(), rtol=1e-4, atol=1e-5)
    assert network.facts.head == "softmax"
    assert network.facts.backend.startswith("onnxruntime ")
    assert network.facts.weights_sha256 == file_sha256(tmp_path / "model.onnx")
    assert network.facts.weight_bytes == (tmp_path / "model.onnx").stat().st_size


def test_an_onnx_file_is_explained(tmp_path: Path) -> None:
    network = load_score_network(onnx_file(tmp_path, softmax=True), labels=["red", "green"], **OPTIONS)
    assert network.facts.head == "probabilities"
    pixels = np.full((*SIZE, 3), 127, np.uint8)
    pixels[:6, 8:] = (255, 127, 127)
    explained = explain_image(network, pixels, top_n=1, method="occlusion")
    assert explained.predictions[0].name == "red"
    hot = explained.heatmaps[0]
    middle_row, middle = len(hot) // 2, hot.shape[1] // 2
    assert hot[:middle_row, middle:].min() > 0.5
    assert hot[middle_row + 1 :, : middle - 1].max() < 0.01


def test_a_layout_that_the_file_does_not_show_is_asked_for_and_taken(tmp_path: Path) -> None:
    path = onnx_file(tmp_path, shape=("n", "a", "b", "c"))
    with pytest.raises(NetworkIncompatible, match=r'does not show .* channels are: write layout = "nchw"'):
        load_score_network(path, **OPTIONS)
    network = load_score_network(path, layout="nchw", **OPTIONS)
    assert_allclose(network.scores(PIXELS), expected_scores(), rtol=1e-4, atol=1e-5)


def test_whole_numbers_are_given_the_pixels_as_they_are(tmp_path: Path) -> None:
    path = onnx_file(tmp_path, dtype="UINT8")
    with pytest.raises(NetworkIncompatible, match="its preprocessing must be none, not unit"):
        load_score_network(path, **OPTIONS)
    network = load_score_network(path, input_size=SIZE, preprocessing="none")
    assert_allclose(network.scores(PIXELS), expected_scores() * 255, rtol=1e-4)


def test_one_of_several_outputs_is_named(tmp_path: Path) -> None:
    path = onnx_file(tmp_path, outputs=2)
    with pytest.raises(NetworkIncompatible, match="has the outputs logits, means: name the one"):
        load_score_network(path, **OPTIONS)
    network = load_score_network(path, head=Head(output="logits"), **OPTIONS)
    assert_allclose(network.scores(PIXELS), expected_scores(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": (16, 12), "preprocessing": "unit"}, r"\(any, 3, 12, 16\), which no image of 16 x 12"),
        ({"input_size": SIZE, "preprocessing": "unit", "layout": "nhwc"}, "fits with layout nhwc"),
    ],
)
def test_an_input_that_is_not_of_the_images_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(NetworkIncompatible, match=message):
        load_score_network(onnx_file(tmp_path), **options)


def test_a_file_that_is_no_onnx_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07nothing of the kind")
    with pytest.raises(NetworkIncompatible, match="model cannot be loaded as ONNX"):
        load_score_network(path, **OPTIONS)


def test_weights_in_other_files_are_not_read_since_no_checksum_covers_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    path = onnx_file(tmp_path)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=50)
    assert (tmp_path / "weights.bin").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NetworkIncompatible, match="keeps weights in other files, which its checksum"):
        load_score_network(path, **OPTIONS)


def test_a_file_that_has_changed_since_it_was_verified_is_refused(tmp_path: Path) -> None:
    path = onnx_file(tmp_path)
    row = NetworkRow(
        "net", SIZE, PREPROCESSING["unit"], file=ModelFile(str(path), "0" * 64), scores_only=True
    )
    with pytest.raises(WeightsChecksumMismatch, match=r"should have sha256 0{64} but has"):
        score_files.load_file(row, WeightsFile(path, "0" * 64))


@pytest.fixture(scope="module")
def keras_model() -> Any:
    from gradcam_worker.gradcam.backend import keras

    inputs = keras.Input((*SIZE, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(inputs)
    dense = keras.layers.Dense(2, name="scores")
    model = keras.Model(inputs, dense(pooled))
    dense.set_weights([KERNEL, np.zeros(2, np.float32)])
    return model


def tflite_file(model: Any, folder: Path, quantized: str | None) -> Path:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if quantized:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: (
            [image[None].astype(np.float32) / 255] for image in PIXELS
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = getattr(tf, quantized)
    path = folder / "model.tflite"
    path.write_bytes(converter.convert())
    return path


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs")  # the converter's own
@pytest.mark.parametrize("quantized", [None, "uint8", "int8"])
def test_a_tflite_file_gives_the_scores_of_any_number_of_images(
    keras_model: Any, quantized: str | None, tmp_path: Path
) -> None:
    network = load_score_network(tflite_file(keras_model, tmp_path, quantized), **OPTIONS)
    assert network.facts.backend.startswith("litert ")
    assert network.facts.dtype == (quantized or "float32")
    assert_allclose(network.scores(PIXELS), expected_scores(), atol=0.05 if quantized else 1e-5)
    assert_array_equal(network.scores(PIXELS[2:3])[0], network.scores(PIXELS)[2])


@pytest.mark.tensorflow
def test_a_file_that_is_no_tflite_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(b"\x1c\x00\x00\x00TFL3 and nothing more")
    with pytest.raises(NetworkIncompatible, match="model cannot be loaded as TFLite"):
        load_score_network(path, **OPTIONS)


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, as it saves
def test_a_network_that_is_refused_since_it_crops_is_explained_by_its_scores(tmp_path: Path) -> None:
    from gradcam_worker.gradcam.backend import keras
    from gradcam_worker.gradcam.models.loading import load_network

    layers, path = keras.layers, tmp_path / "model.keras"
    inputs = keras.Input((16, 16, 3))
    pooled = layers.GlobalAveragePooling2D()(layers.Cropping2D(((0, 0), (8, 0)))(inputs))
    keras.Model(inputs, layers.Dense(2)(pooled)).save(path)
    file = WeightsFile(path, file_sha256(path))
    row = NetworkRow(
        "net", (16, 16), PREPROCESSING["unit"], file=ModelFile(str(path), file.sha256), labels=()
    )
    with pytest.raises(NetworkIncompatible, match=r"RISE and occlusion, .* write scores_only = true into"):
        load_network(row, file=file)
    network = score_files.load_file(replace(row, scores_only=True), file)
    method = Method("occlusion", window=4, stride=4, normalize="none")
    heatmaps = explain_image(network, PIXELS[0], classes=[0, 1], method=method).heatmaps
    assert_array_equal(heatmaps[:, :, :2], 0)
    assert heatmaps[:, :, 2:].max() > 0


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, as it saves
def test_a_keras_model_that_is_not_taken_apart_gives_its_own_outputs(
    keras_model: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.keras"
    keras_model.save(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    row = NetworkRow("net", SIZE, PREPROCESSING["unit"], file=ModelFile(str(path), sha256), labels=())
    network = score_files.load_file(replace(row, scores_only=True), WeightsFile(path, sha256))
    assert_allclose(network.scores(PIXELS), expected_scores(), atol=1e-5)
    assert (network.facts.scores_only, network.facts.parameters) == (True, 8)
    assert network.facts.backend.startswith("tensorflow ")
