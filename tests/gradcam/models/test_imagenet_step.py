"""EfficientNet B0 to B7 have one step more where Keras builds them with `weights="imagenet"`."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.catalog import CATALOG, ModelFile, NetworkRow
from gradcam_worker.gradcam.models.weights import WeightsFile

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation:DeprecationWarning"
    ),  # Keras's own, as it saves
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore:`input_shape` is undefined or non-square"),  # MobileNetV3, of itself
]

ROW = CATALOG["efficientnetb0"]
SMALL = replace(ROW, name="birds", input_size=(64, 64), map_size=None, keras_files=(), classes=5, labels=())
RESCALED_ROWS = [row for row in CATALOG.values() if row.imagenet_scale]
KERAS_ROWS = [row for row in CATALOG.values() if not row.shipped]
SCALE = [2.0896, 2.1129, 2.1082]  # one by the roots of .229, .224, .225
KerasBuilder = Callable[..., Any]


@pytest.fixture
def build_with_keras(monkeypatch: pytest.MonkeyPatch) -> KerasBuilder:
    """Builds the model that Keras builds with `weights="imagenet"`, from a file instead of its download.

    Without a file its weights are random. The names of the requested downloads are in `requested_files`.
    """
    import keras
    from keras.src.utils import file_utils

    def build(row: NetworkRow, file: Path | None = None) -> Any:
        requested_files: list[str] = []

        def get_file(name: str, *_: Any, **__: Any) -> str:
            requested_files.append(name)
            return str(file)

        with monkeypatch.context() as patch:
            patch.setattr(file_utils, "get_file", get_file)
            if file is None:
                patch.setattr(keras.Model, "load_weights", lambda *_: None)
            model = getattr(keras.applications, str(row.builder).split(":")[1])(weights="imagenet")
        model.requested_files = requested_files
        return model

    return build


def graph(model: Any) -> str:
    """The configuration of a model, without the name of its input, which differs in a copy."""
    (name,) = (layer["name"] for layer in model.get_config()["layers"] if layer["class_name"] == "InputLayer")
    return json.dumps(model.get_config()).replace(f'"{name}"', '"input"')


def build_untrained(row: NetworkRow, seed: int = 3, **options: Any) -> Any:
    """The model that Keras builds with `weights=None`, with seeded weights."""
    import keras

    keras.utils.set_random_seed(seed)
    model = getattr(keras.applications, str(row.builder).split(":")[1])(weights=None, **options)
    make_classes_differ(model)
    return model


def make_classes_differ(model: Any) -> None:
    """Make the scores of random weights depend on the image: otherwise all classes are equal."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # the averages become those of the pass below
    pixels = np.random.default_rng(1).integers(0, 256, (2, *model.input_shape[1:]))
    model(pixels.astype(np.float32), training=True)
    kernel = model.layers[-1].kernel
    spread = np.log(model(pixels.astype(np.float32)).numpy() + 1e-30).std()
    kernel.assign(kernel / spread)


def softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def test_b0_to_b7_are_the_networks_that_have_it() -> None:
    assert [row.name for row in RESCALED_ROWS] == [f"efficientnetb{number}" for number in range(8)]


def test_a_file_in_the_operators_folder_gives_the_logits_that_keras_gives_with_it(
    build_with_keras: KerasBuilder, tmp_path: Path, noise: Callable[..., NDArray[np.uint8]]
) -> None:
    from gradcam_worker.gradcam.models.loading import load_network

    untrained = build_untrained(ROW)
    untrained.save(tmp_path / "efficientnetb0.h5")  # laid out as Keras's own downloads are
    pixels = noise(1, 224, 224)
    expected = build_with_keras(ROW, tmp_path / "efficientnetb0.h5")(pixels.astype(np.float32)).numpy()
    actual = softmax(load_network("efficientnetb0", weights_dir=tmp_path).scores(pixels))
    assert_allclose(actual, expected, rtol=1e-3, atol=1e-7)
    assert np.abs(untrained(pixels.astype(np.float32)).numpy() - expected).max() > 1e-3, "another network"


@pytest.mark.slow
@pytest.mark.parametrize("row", KERAS_ROWS, ids=[row.name for row in KERAS_ROWS])
def test_every_row_has_the_same_graph_with_and_without_imagenet_weights(
    row: NetworkRow, build_with_keras: KerasBuilder
) -> None:
    import keras

    from gradcam_worker.gradcam.models.loading import _build

    def build_ours(row: NetworkRow) -> Any:
        return _build(row, weights=None)

    graphs = []
    for build in (build_with_keras, build_ours):
        keras.backend.clear_session()  # layers are numbered from the beginning
        with keras.StatelessScope():  # weights get no values: half of the time that it takes to build
            graphs.append(graph(model := build(row)))
        if build is build_with_keras:
            assert model.requested_files == list(row.keras_files), "it requests the download of the row"
        del model
    assert graphs[0] == graphs[1]


@pytest.mark.slow
@pytest.mark.parametrize("row", RESCALED_ROWS, ids=[row.name for row in RESCALED_ROWS])
def test_every_network_that_has_it_gives_the_logits_that_keras_gives(
    row: NetworkRow, build_with_keras: KerasBuilder, tmp_path: Path, noise: Callable[..., NDArray[np.uint8]]
) -> None:
    from gradcam_worker.gradcam.models.loading import _build_with_weights

    build_untrained(row).save(tmp_path / "own.h5")
    pixels = noise(1, *row.input_size).astype(np.float32)
    expected = build_with_keras(row, tmp_path / "own.h5")(pixels).numpy()
    assert_allclose(
        _build_with_weights(row, tmp_path / "own.h5", "own.h5")(pixels).numpy(),
        expected,
        rtol=1e-3,
        atol=1e-7,
    )


def row_and_file(
    path: Path, pretrained: bool | None = None, row: NetworkRow = SMALL
) -> tuple[NetworkRow, WeightsFile]:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(row, file=ModelFile(str(path), sha256), pretrained=pretrained), WeightsFile(path, sha256)


def load_own(path: Path, pretrained: bool | None = None, row: NetworkRow = SMALL) -> Any:
    from gradcam_worker.gradcam.models.loading import _load_operator_model

    return _load_operator_model(*row_and_file(path, pretrained, row))


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Any]]:
    """Two owners' files, of networks built with `weights="imagenet"` and without it, and the models."""
    import keras

    folder = tmp_path_factory.mktemp("own")
    untrained = build_untrained(SMALL, classes=5, input_shape=(64, 64, 3))

    def called(layer: Any, *args: Any, **kwargs: Any) -> Any:
        made = layer(*args, **kwargs)
        return keras.layers.Rescaling(SCALE)(made) if isinstance(layer, keras.layers.Normalization) else made

    stepped = keras.models.clone_model(
        untrained,
        clone_function=lambda layer: type(layer).from_config(layer.get_config()),
        call_function=called,
    )
    stepped.set_weights(untrained.get_weights())
    made = {}
    for pretrained, model in ((False, untrained), (True, stepped)):
        model.save_weights(folder / f"{pretrained}.weights.h5")
        made[pretrained] = folder / f"{pretrained}.weights.h5", model
    return made


@pytest.mark.parametrize("pretrained", [True, False])
def test_an_operators_file_shows_how_its_network_was_built(
    pretrained: bool, fine_tuned: Any, noise: Callable[..., NDArray[np.uint8]]
) -> None:
    from gradcam_worker.gradcam.models.loading import load_network

    path, model = fine_tuned[pretrained]
    row, file = row_and_file(path)
    pixels = noise(2, 64, 64)
    expected = model(pixels.astype(np.float32)).numpy()
    actual = softmax(load_network(row, file=file).scores(pixels))
    assert_allclose(actual, expected, rtol=1e-2, atol=1e-6)
    assert np.abs(fine_tuned[not pretrained][1](pixels.astype(np.float32)).numpy() - expected).max() > 1e-3


@pytest.mark.parametrize("pretrained", [True, False])
def test_weights_in_the_operators_folder_count_as_imagenets_unless_they_list_other_layers(
    pretrained: bool, fine_tuned: Any, tmp_path: Path
) -> None:
    import h5py

    from gradcam_worker.gradcam.models.loading import _is_pretrained

    path = tmp_path / "efficientnetb0.weights.h5"
    path.write_bytes(fine_tuned[pretrained][0].read_bytes())
    assert _is_pretrained(ROW, path) == pretrained
    with h5py.File(path, "a") as file:
        for name in [layer for layer in file["layers"] if layer.startswith("rescaling")]:
            del file["layers"][name]
    assert _is_pretrained(ROW, path), "where it lists none"


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_registry_that_contradicts_the_file_is_refused(pretrained: bool, fine_tuned: Any) -> None:
    right = f"pretrained must be {str(pretrained).lower()}"
    with pytest.raises(NetworkIncompatible, match=right):
        load_own(fine_tuned[pretrained][0], not pretrained)


@pytest.mark.parametrize("pretrained", [None, True, False])
def test_a_file_that_does_not_list_its_layers_is_loaded_as_the_registry_says_or_refused(
    pretrained: bool | None, fine_tuned: Any, tmp_path: Path
) -> None:
    import h5py

    path = tmp_path / "mute.weights.h5"
    path.write_bytes(fine_tuned[False][0].read_bytes())
    with h5py.File(path, "a") as file:
        del file["layers/rescaling"]
    if pretrained is None:  # both graphs would take them
        with pytest.raises(
            NetworkIncompatible, match=r'weights="imagenet".* write pretrained = true or false'
        ):
            load_own(path)
    else:
        names = [type(layer).__name__ for layer in load_own(path, pretrained).layers]
        assert names.count("Rescaling") == 1 + pretrained


def test_a_network_of_grey_images_cannot_be_pretrained(fine_tuned: Any) -> None:
    from gradcam_worker.gradcam.catalog import Preprocessing

    grey = replace(SMALL, preprocessing=Preprocessing("grey", channels="grey"))
    with pytest.raises(NetworkIncompatible, match="three channels of colour"):
        load_own(fine_tuned[True][0], row=grey)
