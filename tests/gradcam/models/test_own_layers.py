"""Layers that a model brings: modules that the registry names, in a real package."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from gradcam_worker.errors import GradcamError
from gradcam_worker.gradcam.catalog import PREPROCESSING, NetworkRow
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.text.visible import ending

pytestmark = pytest.mark.tensorflow

LAYERS = """
import keras
from keras.layers import Dense  # not its own

@keras.saving.register_keras_serializable(package="moles")
class Scale(keras.layers.Layer):
    def __init__(self, factor=2.0, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, values):
        return values * self.factor

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}

class Shift(keras.layers.Layer):  # not registered
    def call(self, values):
        return values + 1.0
"""
TABLE = """
[networks.{name}]
model = "own.keras"
sha256 = "{sha256}"
preprocessing = "unit"
input_size = [32, 32]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the package, which is importable from it and forgotten afterwards."""
    package = tmp_path / "mole_layers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "layers.py").write_text(LAYERS)
    (package / "broken.py").write_text(
        "import keras\nraise OSError('no licence' + ' for this' * 90 + ', END')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget()


def imported() -> list[str]:
    """The modules of the package that are imported."""
    return [name for name in sys.modules if name.startswith("mole_layers")]


def forget() -> None:
    """Forget the package, as a process that has not imported it."""
    import keras

    for name in [name for name in keras.saving.get_custom_objects() if name.startswith("moles>")]:
        del keras.saving.get_custom_objects()[name]
    for name in imported():
        del sys.modules[name]


def save(folder: Path) -> str:
    """Save a model with layers of the package, and forget the package. Return the checksum of the file."""
    import keras

    from gradcam_worker.gradcam.files.weights import file_sha256

    own = import_module("mole_layers.layers")
    inputs = keras.Input((32, 32, 3))
    x = own.Scale(3.0, name="scale")(keras.layers.Conv2D(4, 3, name="last")(inputs))
    x = keras.layers.GlobalAveragePooling2D()(own.Shift(name="shift")(x))
    keras.Model(inputs, keras.layers.Dense(3, "softmax")(x)).save(folder / "own.keras")
    forget()
    return file_sha256(folder / "own.keras")


def load(row: NetworkRow) -> str:
    """Load a network in a process that has not imported the package: its default layer, or why not."""
    from gradcam_worker.gradcam.files.weights import WeightsFile
    from gradcam_worker.gradcam.models.loading import load_network

    forget()
    assert row.file
    try:
        network = load_network(
            row, file=WeightsFile(Path("own.keras"), row.file.sha256), forward="tensorflow"
        )
    except GradcamError as error:
        return f"{error.code} {error}"
    return f"layer {network.facts.default_layer}"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, as it saves
def test_layers_of_a_package_that_the_registry_names_are_found_and_else_the_reason_is_told(
    folder: Path,
) -> None:
    sha256 = save(folder)
    imports = {
        "without": "",
        "absent": 'imports = ["mole_layers.lairs"]',
        "broken": 'imports = ["mole_layers.broken"]',
        "other": 'imports = ["json"]',
        "named": 'imports = ["mole_layers.layers"]',
    }
    tables = (f"{TABLE.format(name=name, sha256=sha256)}{line}\n" for name, line in imports.items())
    (folder / "networks.toml").write_text("".join(tables))
    rows = Registry(folder / "networks.toml").operator_networks()
    assert not imported(), "imported too early"
    told = {row.name: load(row) for row in rows}
    assert told["named"] == "layer shift/add"
    assert told["without"].startswith("network_incompatible ")
    assert "it has 'Scale', which is no part of Keras" in told["without"]
    assert told["without"].endswith('as in imports = ["my_package.layers"]')
    assert "neither part of Keras nor defined in json" in told["other"]
    assert told["absent"].endswith(
        "needs mole_layers.lairs (imports in its table), which cannot be imported: ModuleNotFoundError: No "
        "module named 'mole_layers.lairs'"
    )
    assert told["broken"].endswith(", END")
    assert len(told["broken"]) < 600


def test_a_reason_of_keras_is_told_by_its_end_without_configurations() -> None:
    from gradcam_worker.gradcam.models.own_layers import why_not_loaded

    row = NetworkRow("own", (8, 8), PREPROCESSING["unit"])
    configuration = {"name": 'a {brace} and "it\'s" quoted', "layers": [{"units": n} for n in range(99)]}
    text = (
        f"could not be deserialized properly. config={configuration}.\n\nException encountered: units is -1"
    )
    assert why_not_loaded(TypeError(text), row) == (
        "could not be deserialized properly. config={...}. Exception encountered: units is -1"
    )
    assert why_not_loaded(TypeError(), row) == "TypeError"
    assert why_not_loaded(TypeError("an open { bracket " + "x" * 99), row).startswith("an open { bracket")


def test_of_a_long_text_the_end_is_kept_from_a_word_on() -> None:
    assert ending("one\n two", 20) == "one two"
    assert ending("aaaa bbbb cccc dddd", 12) == "[...] cccc dddd"
