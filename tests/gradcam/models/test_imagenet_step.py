"""EfficientNet B0 to B7 have one step more where Keras builds them with `weights="imagenet"`."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.catalog import CATALOG, ModelFile, NetworkRow
from gradcam_worker.gradcam.files.weights import WeightsFile

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.usefixtures("eagerly"),
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation:DeprecationWarning"
    ),  # Keras's own, as it saves
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
]

ROW = CATALOG["efficientnetb0"]
SMALL = replace(ROW, name="birds", input_size=(64, 64), map_size=None, keras_files=(), classes=5, labels=())
RESCALED_ROWS = [row for row in CATALOG.values() if row.imagenet_scale]
LARGE = CATALOG["efficientnetb4"]  # deeper and wider than B0
SCALE = [2.0896, 2.1129, 2.1082]  # one by the roots of .229, .224, .225
KerasBuilder = Callable[..., Any]


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
    actual = softmax(
        load_network("efficientnetb0", weights_dir=tmp_path, forward="tensorflow").scores(pixels)
    )
    assert_allclose(actual, expected, rtol=1e-3, atol=1e-7)
    assert np.abs(untrained(pixels.astype(np.float32)).numpy() - expected).max() > 1e-3, "another network"


@pytest.mark.large
def test_a_deeper_and_wider_network_that_has_it_gives_the_logits_that_keras_gives(
    build_with_keras: KerasBuilder, tmp_path: Path, noise: Callable[..., NDArray[np.uint8]]
) -> None:
    """All eight have Keras's graph: see `test_every_network.py`."""
    from gradcam_worker.gradcam.models.loading import _build_with_weights

    file = tmp_path / "own.h5"
    build_untrained(LARGE).save(file)
    pixels = noise(1, *LARGE.input_size).astype(np.float32)
    expected = build_with_keras(LARGE, file)(pixels).numpy()
    actual = _build_with_weights(LARGE, file, "own.h5")(pixels).numpy()
    assert_allclose(actual, expected, rtol=1e-3, atol=1e-7)


def row_and_file(
    path: Path, pretrained: bool | None = None, row: NetworkRow = SMALL
) -> tuple[NetworkRow, WeightsFile]:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(row, file=ModelFile(str(path), sha256), pretrained=pretrained), WeightsFile(path, sha256)


def load_own(path: Path, pretrained: bool | None = None, row: NetworkRow = SMALL) -> Any:
    from gradcam_worker.gradcam.models.loading import load_operator_model

    return load_operator_model(*row_and_file(path, pretrained, row))


@contextmanager
def only_two_stages() -> Iterator[None]:
    """Let Keras build EfficientNet with two of its seven stages: the step is before them."""
    from keras.src.applications import efficientnet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet, "DEFAULT_BLOCKS_ARGS", efficientnet.DEFAULT_BLOCKS_ARGS[:2])
        yield


@pytest.fixture
def two_stages() -> Iterator[None]:
    with only_two_stages():
        yield


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Any]]:
    """Two owners' files, of networks built with `weights="imagenet"` and without it, and the models."""
    import keras

    folder = tmp_path_factory.mktemp("own")
    with only_two_stages():
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


@pytest.mark.usefixtures("two_stages")
@pytest.mark.parametrize("pretrained", [True, False])
def test_an_operators_file_shows_how_its_network_was_built(
    pretrained: bool, fine_tuned: Any, noise: Callable[..., NDArray[np.uint8]]
) -> None:
    from gradcam_worker.gradcam.models.loading import load_network

    path, model = fine_tuned[pretrained]
    row, file = row_and_file(path)
    pixels = noise(2, 64, 64)
    expected = model(pixels.astype(np.float32)).numpy()
    actual = softmax(load_network(row, file=file, forward="tensorflow").scores(pixels))
    assert_allclose(actual, expected, rtol=1e-2, atol=1e-6)
    assert np.abs(fine_tuned[not pretrained][1](pixels.astype(np.float32)).numpy() - expected).max() > 1e-3


@pytest.mark.usefixtures("two_stages")
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


@pytest.mark.usefixtures("two_stages")
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_registry_that_contradicts_the_file_is_refused(pretrained: bool, fine_tuned: Any) -> None:
    right = f"pretrained must be {str(pretrained).lower()}"
    with pytest.raises(NetworkIncompatible, match=right):
        load_own(fine_tuned[pretrained][0], not pretrained)


@pytest.mark.usefixtures("two_stages")
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


@pytest.mark.usefixtures("two_stages")
def test_a_network_of_grey_images_cannot_be_pretrained(fine_tuned: Any) -> None:
    from gradcam_worker.gradcam.catalog import Preprocessing

    grey = replace(SMALL, preprocessing=Preprocessing("grey", channels="grey"))
    with pytest.raises(NetworkIncompatible, match="three channels of colour"):
        load_own(fine_tuned[True][0], row=grey)
