"""Models from files: of older versions of Keras 3, and those with layers that could call anything."""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.catalog import PREPROCESSING, ModelFile, NetworkRow
from gradcam_worker.gradcam.files.weights import WeightsFile

pytestmark = pytest.mark.tensorflow

FOLDER = Path(__file__).parent / "old_keras"
PIXELS = np.random.default_rng(3).integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
versions = pytest.mark.parametrize("version", ["3.0.5", "3.3.3", "3.6.0"])


def loaded(path: Path) -> Any:
    from gradcam_worker.gradcam.models.loading import load_network

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    row = NetworkRow("old", (12, 16), PREPROCESSING["tf"], labels=(), file=ModelFile(str(path), sha256))
    return load_network(row, file=WeightsFile(path, sha256))


@versions
def test_a_functional_model_with_a_nested_backbone_computes_what_it_did(
    version: str, tape_gradients: Callable[..., Any]
) -> None:
    network = loaded(FOLDER / f"functional-{version}.keras")
    computed = network.compute(PIXELS, np.array([range(5)] * 2, np.int32))
    powers = np.exp(computed.scores)
    outputs = np.loadtxt(FOLDER / f"functional-{version}.txt")
    assert_allclose(powers / powers.sum(1, keepdims=True), outputs, atol=1e-5)
    model, inputs = network._model, PIXELS / np.float32(127.5) - 1
    act = model.get_layer("backbone").get_layer("act")
    expected = tape_gradients(model, inputs, act, head=model.get_layer("scores"))
    assert computed.layer == "backbone/act"
    assert_allclose(computed.raw, expected.raw, atol=1e-5 * np.abs(expected.raw).max())


@versions
def test_a_sequential_model_with_one_unit_computes_what_it_did(
    version: str, tape_gradients: Callable[..., Any]
) -> None:
    network = loaded(FOLDER / f"sequential-{version}.keras")
    computed = network.compute(PIXELS, np.array([[0, 1]] * 2, np.int32))
    outputs = np.loadtxt(FOLDER / f"sequential-{version}.txt")
    assert_allclose(1 / (1 + np.exp(-computed.scores[:, 1])), outputs, atol=1e-5)
    model, inputs = network._model, PIXELS / np.float32(127.5) - 1
    normal = model.get_layer("inner").get_layer("normal")
    expected = tape_gradients(model, inputs, normal, head=model.get_layer("scores"))
    assert computed.layer == "inner/normal"
    assert_allclose(computed.raw[:, 1], expected.raw[:, 0], atol=1e-5 * np.abs(expected.raw).max())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, as it saves
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("function", ["code", "a name of Keras's", "a name that was registered"])
def test_a_lambda_in_a_file_is_refused_whatever_it_calls(function: str, depth: int, tmp_path: Path) -> None:
    import keras

    def doubled(x: Any) -> Any:
        return x * 2

    keras.saving.register_keras_serializable("gradcam_test")(doubled)

    functions = {
        "code": lambda x: x * 2,
        "a name of Keras's": keras.ops.relu,
        "a name that was registered": doubled,
    }
    layer: Any = keras.layers.Lambda(functions[function], name="mine")
    if depth:
        layer = keras.Sequential([keras.Input((12, 16, 3)), layer])
    inputs = keras.Input((12, 16, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(3, 3)(layer(inputs)))
    keras.Model(inputs, x).save(tmp_path / "model.keras")
    with pytest.raises(NetworkIncompatible, match=r"old has a Lambda layer \(mine\).* layers or keras.ops"):
        loaded(tmp_path / "model.keras")


def test_a_file_that_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(b"not a model")
    with pytest.raises(
        NetworkIncompatible, match="cannot be loaded as old: it is no Keras model, it begins with"
    ):
        loaded(path)


def test_a_file_of_keras_2_is_refused_with_its_version_the_line_that_converts_it_and_the_cause(
    tmp_path: Path,
) -> None:
    path = tmp_path / "old.keras"
    path.write_bytes((FOLDER / "functional-2.15.0.keras").read_bytes())
    with pytest.raises(NetworkIncompatible) as refused:
        loaded(path)
    told = str(refused.value)
    line = "`gradcam convert old.keras NAME.keras`"
    assert told.endswith(f"cannot be loaded as old: Keras 2.15.0 saved it. Convert it with {line}")
    assert "Could not deserialize class 'Functional'" in str(refused.value.__cause__)


def test_the_cause_at_the_end_of_a_long_message_of_keras_is_shown(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(FOLDER / "functional-3.6.0.keras") as old,
        zipfile.ZipFile(tmp_path / "model.keras", "w") as new,
    ):
        for name in old.namelist():
            text = old.read(name)
            new.writestr(name, text.replace(b'"units": ', b'"of_a_later_version": 1, "units": '))
    with pytest.raises(NetworkIncompatible) as refused:
        loaded(tmp_path / "model.keras")
    told = str(refused.value)
    assert "cannot be loaded as old: [...] " in told
    assert "using config={...}" in told
    assert told.endswith("Unrecognized keyword arguments passed to Dense: {'of_a_later_version': 1}")
    assert told.isprintable()
    assert len(told) < 1000
