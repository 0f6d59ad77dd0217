"""A model with layers and further inputs of its own: only the process that computes imports their package."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.gradcam.files.weights import file_sha256

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

WAIT_S = 120  # the first job also waits for TensorFlow to load
LAYERS = """
import os
from pathlib import Path
import keras
with Path({log!r}).open("a") as file:
    print(os.getpid(), file=file)

class Doubled(keras.layers.Layer):
    def call(self, values):
        return values * 2.0
"""
REGISTRY = """
[networks.moles]
model = "moles.keras"
sha256 = "{sha256}"
preprocessing = "unit"
input_size = [32, 32]
imports = ["mole_package.layers"]

[networks.moles.inputs.age]
minimum = 0
maximum = 120
scale = 0.01
"""


def save(folder: Path) -> str:
    """Save a model of an image and an age; return its checksum."""
    import importlib

    from gradcam_worker.gradcam.backend import keras

    layers = keras.layers
    own = importlib.import_module("mole_package.layers")
    keras.utils.set_random_seed(1)
    image, age = keras.Input((32, 32, 3), name="image"), keras.Input((1,), name="age")
    x = own.Doubled(name="doubled")(layers.Conv2D(4, 3, name="last")(image))
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), age])
    model = keras.Model([image, age], layers.Dense(3, "softmax")(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # between Keras and NumPy
        model.save(folder / "moles.keras")
    return file_sha256(folder / "moles.keras")


def test_a_job_with_an_age_is_explained_by_a_model_with_its_own_layers(
    make_stage: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, log = tmp_path / "mole_package", tmp_path / "imported.txt"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "layers.py").write_text(LAYERS.format(log=str(log)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sha256 = save(tmp_path)
    assert log.read_text().split() == [str(os.getpid())]
    log.unlink()
    (tmp_path / "networks.toml").write_text(REGISTRY.format(sha256=sha256))
    stage = make_stage("layers", networks=tmp_path / "networks.toml", cache_dir=tmp_path / "cache")
    asked = {"image": "s3://photos/coffee.jpg", "network": "moles", "target": {"top_n": 3}}
    with stage.worker("worker"):
        ids = [stage.client.submit(**asked, inputs=inputs) for inputs in ({"age": 1}, {"age": 120}, {})]
        young, old, missing = (stage.client.wait(job_id, WAIT_S) for job_id in ids)
        assert young.status == "succeeded", young.error
        assert old.status == "succeeded", old.error
        assert {one.name: one.probability for one in young.predictions} != {
            one.name: one.probability for one in old.predictions
        }
        assert stage.client.result(ids[1]).manifest.inputs == {"age": 120}
        assert missing.error is not None
        assert missing.error.code == "invalid_network_input"
    assert len(log.read_text().split()) == 1, "one process has imported the package: the engine"
