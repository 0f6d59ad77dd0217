"""An operator's own networks: from a file in S3 to a job's result, the next version without a restart, and a
model with layers and further inputs of its own, whose package only the process that computes imports.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.gradcam.files.weights import file_sha256
from gradcam_worker.schemas.status import StatusDocument

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

WAIT_S = 90  # the first job also waits for TensorFlow to load
OWN = """
[networks.shapes]
model = "s3://private/{version}.keras"
sha256 = "{sha256}"
labels = {labels}
preprocessing = {{ scale = 0.00392156862745098 }}
input_size = [32, 32]
"""
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


@dataclass
class Operator:
    """Whoever writes the registry of a worker that runs."""

    stage: Any
    folder: Path  # also of the package `mole_package`
    process: Any

    @property
    def registry(self) -> Path:
        """The file that the worker reads."""
        return self.folder / "networks.toml"

    @property
    def imports(self) -> Path:
        """To which the package adds the id of each process that imports it."""
        return self.folder / "imported.txt"

    def describe(self, text: str) -> None:
        (self.folder / "next.toml").write_text(text)
        (self.folder / "next.toml").replace(self.registry)


@pytest.fixture(scope="module")
def operator(make_stage: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("own")
    stage = make_stage("registry", networks=folder / "networks.toml", cache_dir=folder / "cache", preload=())
    operator = Operator(stage, folder, None)
    package = folder / "mole_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "layers.py").write_text(LAYERS.format(log=str(operator.imports)))
    operator.describe("[networks]")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        with stage.worker("worker") as operator.process:
            yield operator


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


def test_an_own_network_explains_and_its_next_version_takes_over_while_the_worker_runs(
    operator: Operator, tmp_path: Path, save_model: Callable[..., str]
) -> None:
    stage, describe = operator.stage, operator.describe

    def put(version: str, seed: int) -> str:
        """Store a version of the model; return its checksum."""
        sha256 = save_model(tmp_path / "own.keras", seed=seed)
        body = (tmp_path / "own.keras").read_bytes()
        stage.s3.client.put_object(Bucket="private", Key=f"{version}.keras", Body=body)
        return sha256

    def run() -> StatusDocument:
        fields = {"image": "s3://photos/coffee.jpg", "network": "shapes", "target": {"top_n": 3}}
        document: StatusDocument = stage.client.wait(stage.client.submit(**fields), WAIT_S)
        return document

    first = put("v1", seed=1)
    describe(OWN.format(version="v1", sha256=first, labels=["circle", "square", "star"]))
    document = run()
    assert document.status == "succeeded", document.error
    assert document.network is not None
    assert document.network.weights_sha256 == first
    assert document.network.layer == "backbone/last"
    assert {seen.name for seen in document.predictions} == {"circle", "square", "star"}
    assert {seen.wnid for seen in document.predictions} == {""}

    second = put("v2", seed=2)
    describe(OWN.format(version="v2", sha256=second, labels=["ring", "box", "asterisk"]))
    document = run()
    assert document.status == "succeeded", document.error
    assert document.network is not None
    assert document.network.weights_sha256 == second != first
    assert {seen.name for seen in document.predictions} == {"ring", "box", "asterisk"}

    describe(OWN.format(version="v1", sha256="0" * 64, labels=[]))
    refused = run()
    assert refused.error is not None
    assert refused.error.code == "weights_checksum_mismatch", "the file in S3 is another one"
    assert first in refused.error.detail

    describe("[networks]")
    removed = run()
    assert removed.error is not None
    assert removed.error.code == "unknown_network"
    assert operator.process.poll() is None
    log = stage.log("worker")
    assert log.count("worker_started ") == 1, "nothing was started again"
    assert f"registry_reloaded path={operator.registry} networks=shapes" in log
    assert {path.name for path in (operator.folder / "cache").glob("*.keras")} == {
        f"{first}.keras",
        f"{second}.keras",
    }


def test_a_job_with_an_age_is_explained_by_a_model_with_its_own_layers(operator: Operator) -> None:
    sha256 = save(operator.folder)
    assert operator.imports.read_text().split() == [str(os.getpid())]
    operator.imports.unlink()
    operator.describe(REGISTRY.format(sha256=sha256))
    stage = operator.stage
    asked = {"image": "s3://photos/coffee.jpg", "network": "moles", "target": {"top_n": 3}}
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
    assert len(operator.imports.read_text().split()) == 1, "one process has imported the package: the engine"
