"""Formats are told by content, and what could run code is found before anything is loaded."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.gradcam.conversion.formats import code_in, recognise
from gradcam_worker.gradcam.files.model_file import Refused

OLD_KERAS = Path(__file__).parents[1] / "models" / "old_keras"


def hdf5(path: Path, config: Any = None, **attributes: str) -> Path:
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs.update({"model_config": json.dumps(config or {}), **attributes})
    return path


def keras_file(path: Path, version: str, config: Any) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": version}))
        archive.writestr("config.json", json.dumps(config))
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def saved_model(path: Path) -> Path:
    path.mkdir()
    (path / "saved_model.pb").touch()
    return path


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (lambda folder: hdf5(folder / "a.hdf5"), "hdf5"),
        (lambda folder: hdf5(folder / "a.keras"), "hdf5"),
        (lambda folder: OLD_KERAS / "functional-2.15.0.keras", "keras"),
        (lambda folder: saved_model(folder / "saved"), "saved_model"),
        (lambda folder: written(folder / "a.bin", b"\x1c\0\0\0TFL3\0"), "tflite"),
        (lambda folder: written(folder / "frozen.pb", b"\n\x10"), "frozen_graph"),
    ],
)
def test_a_format_is_told_by_its_content(make: Callable[[Path], Path], form: str, tmp_path: Path) -> None:
    assert recognise(make(tmp_path)) == form


def weights(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "a.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = [1.0]
    return folder / "a.weights.h5"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda folder: folder, "is a folder, and no SavedModel"),
        (
            lambda folder: saved_model(folder / "s") / "saved_model.pb",
            "belongs to a SavedModel: name its folder",
        ),
        (weights, "holds weights without their network"),
        (
            lambda folder: OLD_KERAS / "functional-3.6.0.keras",
            "is a .keras file of Keras 3.6.0 already: name it",
        ),
        (
            lambda folder: written(folder / "a.onnx", b"\x08\x07\x12\x07pytorch"),
            "`onnx2tf -i a.onnx -o made`",
        ),
        (lambda folder: written(folder / "a.h5", b""), "is empty (0 bytes)"),
        (lambda folder: written(folder / "a.txt", b"hello"), "is no Keras model"),
        (lambda folder: written(folder / "a.h5", b"hello"), "is no HDF5 file, though its name says so"),
        (lambda folder: written(folder / "a.HDF5", b"hello"), "it begins with b'hello'; copy it again"),
        (lambda folder: written(folder / "a.tflite", b"hello"), "is no .tflite file, though its name"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_what_helps(
    make: Callable[[Path], Path], why: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=re.escape(why)):
        recognise(make(tmp_path))


def layer(kind: str, module: str | None = "keras.layers", **config: Any) -> dict[str, Any]:
    named = {"class_name": kind, "config": {"name": "mine", **config}}
    return named if module is None else {**named, "module": module}


@pytest.mark.parametrize(
    ("suspect", "told"),
    [
        (layer("Lambda"), "a layer Lambda (mine)"),
        (layer("Lambda", None), "a layer Lambda (mine)"),
        (layer("TFSMLayer"), "a layer TFSMLayer (mine)"),
        (layer("TFOpLambda", None, function="io.write_file"), "a layer that calls tf.io.write_file (mine)"),
        (layer("system", "os"), "os.system (mine)"),
        (layer("get_file", "keras.utils"), "keras.utils.get_file (mine)"),
        (layer("get_file", "keras.src.utils.file_utils"), "keras.src.utils.file_utils.get_file (mine)"),
        (layer("Dense", activation=layer("loads", "pickle")), "pickle.loads (mine)"),
        (layer("Own", "kerasish.layers"), "kerasish.layers.Own (mine)"),
    ],
)
@pytest.mark.parametrize("depth", [0, 1])
def test_what_could_run_code_is_named(suspect: dict[str, Any], told: str, depth: int, tmp_path: Path) -> None:
    config = {"class_name": "Sequential", "config": {"layers": [layer("Dense"), suspect]}}
    if depth:
        config = {"class_name": "Functional", "config": {"layers": [config]}}
    for path, form in (
        (hdf5(tmp_path / "a.h5", config), "hdf5"),
        (keras_file(tmp_path / "a.keras", "2.15.0", config), "keras"),
    ):
        assert code_in(path, form) == f"holds {told}, which can run code"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "harmless",
    [
        layer("Dense"),
        layer(
            "Dense", None, activation="relu", kernel_initializer=layer("GlorotUniform", "keras.initializers")
        ),
        layer("Functional", "keras.src.engine.functional"),
        layer("Policy", "keras.mixed_precision"),
        layer("TFOpLambda", None, function="math.truediv"),
        layer("TFOpLambda", None, function="nn.convolution"),
        layer("SlicingOpLambda", None, function="__operators__.getitem"),
        layer("__tuple__", "builtins"),
    ],
)
def test_layers_of_keras_need_no_consent(harmless: dict[str, Any], tmp_path: Path) -> None:
    assert (
        code_in(hdf5(tmp_path / "a.h5", {"class_name": "Sequential", "config": [harmless]}), "hdf5") is None
    )


def test_graphs_of_tensorflow_are_programs_and_those_of_the_interpreter_are_not(tmp_path: Path) -> None:
    assert "can read and write files" in str(code_in(tmp_path, "saved_model"))
    assert "can read and write files" in str(code_in(tmp_path, "frozen_graph"))
    assert code_in(tmp_path, "tflite") is None


@pytest.mark.parametrize("config", ["", "[", "[" * 90_000, "[]"])
def test_a_configuration_that_cannot_be_read_is_refused(config: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"holds a model_config that"):
        code_in(hdf5(tmp_path / "a.h5", model_config=config), "hdf5")
