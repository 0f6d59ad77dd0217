"""From a row of the catalog to a live network: weights and preprocessing."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible, UnknownNetwork, WeightsUnavailable
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.network import Network
from tests.gradcam.small_networks import CLASSIFIER

pytestmark = pytest.mark.tensorflow

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def small() -> Any:
    """A small network with random weights."""
    from gradcam_worker.gradcam.models.loading import load_network

    return load_network(CLASSIFIER, random_seed=3, forward="tensorflow")


def weights(network: Any) -> NDArray[np.float32]:
    return np.concatenate([weight.ravel() for weight in network._model.get_weights()])


@pytest.mark.parametrize("row", CATALOG.values(), ids=CATALOG)
def test_every_row_names_a_builder_that_exists(row: NetworkRow) -> None:
    module, function = str(row.builder).split(":")
    assert callable(getattr(import_module(module), function))


def test_the_catalog_has_all_networks_of_keras_applications_and_the_shipped_one() -> None:
    import keras

    keras_names = {name for name, one in vars(keras.applications).items() if inspect.isfunction(one)}
    builders = {str(row.builder).split(":")[1] for row in CATALOG.values() if not row.shipped}
    assert len(keras_names) >= 40
    assert builders == keras_names


def test_an_unknown_network_is_refused_with_similar_ones() -> None:
    from gradcam_worker.gradcam.models.loading import load_network

    with pytest.raises(UnknownNetwork, match="Did you mean 'vgg16' or 'vgg19'"):
        load_network("vgg61")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(small: Any) -> None:
    from gradcam_worker.gradcam.models.loading import load_network

    same, other = (load_network(CLASSIFIER, random_seed=seed, forward="tensorflow") for seed in (3, 4))
    assert_array_equal(weights(small), weights(same))
    assert not np.array_equal(weights(small), weights(other))
    assert small.facts.weights_sha256 is None


def test_facts_have_the_checksum_of_shipped_weights(lite0: Network) -> None:
    row = CATALOG["efficientnet_lite0"]
    facts = lite0.facts
    assert (facts.name, facts.input_size, facts.preprocessing) == (row.name, row.input_size, "lite")
    assert (facts.weights_sha256, facts.default_layer, facts.dtype) == (row.sha256, "top_act", "float32")
    assert (facts.map_size, facts.parameters, facts.head) == (row.map_size, row.parameters, "softmax")
    assert facts.backend.startswith("tensorflow ")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # keras, saving
def test_the_operators_file_is_loaded_in_place_of_the_shipped_one(tmp_path: Path) -> None:
    from gradcam_worker.gradcam.models.loading import load_network

    saved = load_network("efficientnet_lite0", random_seed=3, forward="tensorflow")
    saved._model.save_weights(tmp_path / "efficientnet_lite0.weights.h5")
    loaded = load_network("efficientnet_lite0", weights_dir=tmp_path, forward="tensorflow")
    assert_array_equal(weights(loaded), weights(saved))
    assert loaded.facts.weights_sha256 not in {None, CATALOG["efficientnet_lite0"].sha256}


def test_missing_weights_are_an_error_and_never_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    from gradcam_worker.gradcam.models.loading import load_network

    cached = Path(keras.src.backend.config.keras_home()) / "models" / CATALOG["mobilenet"].keras_files[0]
    if cached.exists():
        pytest.skip(f"Keras has already downloaded {cached}")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there: no download
    with pytest.raises(WeightsUnavailable, match=r"mobilenet.*GRADCAM_WEIGHTS_DIR"):
        load_network("mobilenet", weights_dir=tmp_path)


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_a_file_that_holds_no_weights_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    from gradcam_worker.gradcam.models.loading import load_network

    (tmp_path / "efficientnet_lite0.weights.h5").write_bytes(content)
    with pytest.raises(NetworkIncompatible, match=r"lite0\.weights\.h5 does not hold the weights of"):
        load_network("efficientnet_lite0", weights_dir=tmp_path)


def test_a_model_that_ends_in_pooled_class_maps_is_explained_by_them(
    wrap: Callable[..., Any], noise: Callable[..., NDArray[np.uint8]]
) -> None:
    """Each class has a channel of its own, whose mean is its score: that channel is the map."""
    import keras

    inputs = keras.Input((4, 4, 3))
    x = class_maps = keras.layers.Conv2D(6, 1, name="conv")(inputs)
    network, pixels = wrap(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))), noise(1, 4, 4)
    computed = network.compute(pixels, np.array([[2, 5]], np.int32))
    expected = keras.Model(inputs, class_maps)(pixels / np.float32(127.5) - 1).numpy()
    assert computed.layer == "conv"
    assert_allclose(computed.raw[0] * 16, expected[0, :, :, [2, 5]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vgg16", "xception", "densenet121", "efficientnetb0"])
def test_preprocessing_is_what_keras_does_for_these_weights(
    name: str, noise: Callable[..., NDArray[np.uint8]]
) -> None:
    import keras

    from gradcam_worker.gradcam.imaging.network_input import preprocess

    pixels = noise(2, 5, 4).astype(np.float32)
    module = {"densenet121": "densenet", "efficientnetb0": "efficientnet"}.get(name, name)
    expected = getattr(keras.applications, module).preprocess_input(pixels.copy())
    assert_allclose(preprocess(pixels, CATALOG[name].preprocessing, keras.ops), expected, atol=1e-5)


def test_preprocessing_of_efficientnet_lite_takes_127_and_divides_by_128() -> None:
    import keras

    from gradcam_worker.gradcam.imaging.network_input import preprocess

    pixels = np.array([[[[0, 127, 255]]]], np.float32)
    preprocessing = CATALOG["efficientnet_lite0"].preprocessing
    assert_array_equal(preprocess(pixels, preprocessing, keras.ops), [[[[-127 / 128, 0, 1]]]])


def test_the_whole_backward_pass_can_be_requested(wrap: Callable[..., Any], small: Any) -> None:
    import keras

    from gradcam_worker.gradcam.models.loading import load_network

    inputs = keras.Input((4, 4, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(6, 1)(inputs))
    saved = keras.Model(inputs, keras.layers.Dense(2)(x))
    assert [wrap(saved, exact_backward=exact)._exact_backward for exact in (False, True)] == [False, True]
    exact = load_network(CLASSIFIER, random_seed=3, exact_backward=True, forward="tensorflow")
    assert exact._exact_backward
    assert not small._exact_backward


OTHER_CONFIGURATION = {
    "floatx": "float16",
    "epsilon": 0.01,
    "image_data_format": "channels_first",
    "backend": "jax",
}


def run_with_keras_json(program: str, folder: Path, config: str) -> subprocess.CompletedProcess[str]:
    (folder / "keras.json").write_text(config)
    variables = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**variables, "KERAS_HOME": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_keras_json_in_a_home_folder_is_ignored_and_a_download_is_found_there(
    tmp_path: Path, small: Any
) -> None:
    download = tmp_path / "models" / CATALOG["xception"].keras_files[0]
    download.parent.mkdir()
    download.touch()
    program = (
        "from gradcam_worker import extras; extras.run_as_command()\n"
        "import numpy as np\nfrom gradcam_worker.gradcam import backend\n"
        "from gradcam_worker.gradcam import catalog\n"
        "from gradcam_worker.gradcam.models import loading; config = backend.keras.config\n"
        "print(loading._keras_download_path(catalog.find('xception')))\n"
        "from tests.gradcam.small_networks import CLASSIFIER\n"
        "network = loading.load_network(CLASSIFIER, random_seed=3, forward='tensorflow')\n"
        "scores = network.scores(np.full((1, *CLASSIFIER.input_size, 3), 90, np.uint8))\n"
        "print(backend.name(), config.floatx(), config.epsilon(), config.dtype_policy().name, "
        "config.image_data_format(), network.facts.dtype, *scores[0, :3])"
    )
    done = run_with_keras_json(program, tmp_path, json.dumps(OTHER_CONFIGURATION))
    path, *facts, one, two, three = done.stdout.split()
    assert path == str(download)
    assert facts == ["tensorflow", "float32", "1e-07", "float32", "channels_last", "float32"]
    expected = small.scores(np.full((1, *CLASSIFIER.input_size, 3), 90, np.uint8))[0, :3]
    assert_allclose([float(one), float(two), float(three)], expected, rtol=1e-4)


@pytest.mark.parametrize("config", ['{"floatx": "bfloat16"}', '{"epsilon": 1}', "[]"])
def test_a_keras_json_that_keras_refuses_is_named(config: str, tmp_path: Path) -> None:
    program = (
        "from gradcam_worker.errors import InvalidSettings\n"
        "try: import gradcam_worker.gradcam.backend\n"
        "except InvalidSettings as error: print(error)"
    )
    done = run_with_keras_json(program, tmp_path, config)
    assert "Correct or remove keras.json in the folder KERAS_HOME" in done.stdout, done.stderr


def test_the_keras_configuration_of_a_program_is_neither_used_nor_changed(small: Any) -> None:
    import keras

    from gradcam_worker.gradcam.models.loading import load_network

    config = keras.config
    before = config.floatx(), config.epsilon(), config.image_data_format(), config.dtype_policy()
    try:
        config.set_floatx("float16")
        config.set_epsilon(0.01)
        config.set_image_data_format("channels_first")
        config.set_dtype_policy("mixed_float16")
        network = load_network(CLASSIFIER, random_seed=3, forward="tensorflow")
        assert (config.floatx(), config.epsilon(), config.image_data_format()) == (
            "float16",
            0.01,
            "channels_first",
        )
        assert config.dtype_policy().name == "mixed_float16"
    finally:
        config.set_floatx(before[0])
        config.set_epsilon(before[1])
        config.set_image_data_format(before[2])
        config.set_dtype_policy(before[3])
    assert network.facts == small.facts
    pixels = np.full((1, *CLASSIFIER.input_size, 3), 90, np.uint8)
    assert_array_equal(network.scores(pixels), small.scores(pixels))
