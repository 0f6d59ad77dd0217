"""From a row of the catalog to a live network: weights and preprocessing."""

import inspect
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

from worker.errors import NetworkIncompatible, UnknownNetwork, WeightsUnavailable
from worker.gradcam.catalog import CATALOG, NetworkRow
from worker.gradcam.network import Network

pytestmark = pytest.mark.tensorflow


def weights(network: Any) -> NDArray[np.float32]:
    return np.concatenate([weight.ravel() for weight in network._model.get_weights()])


@pytest.mark.parametrize("row", CATALOG.values(), ids=CATALOG)
def test_every_row_names_a_builder_that_exists(row: NetworkRow) -> None:
    module, function = str(row.builder).split(":")
    assert callable(getattr(import_module(module), function))


def test_every_network_of_keras_applications_has_a_row_and_every_row_but_the_shipped_one_is_of_them() -> None:
    import keras

    theirs = {name for name, one in vars(keras.applications).items() if inspect.isfunction(one)}
    builders = {str(row.builder).split(":")[1] for row in CATALOG.values() if not row.shipped}
    assert len(theirs) >= 40
    assert builders == theirs


def test_an_unknown_network_is_refused_with_those_there_are() -> None:
    from worker.gradcam.loading import load_network

    with pytest.raises(UnknownNetwork, match="Did you mean 'vgg19' or 'vgg16'"):
        load_network("vgg61")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    from worker.gradcam.loading import load_network

    networks = [load_network("efficientnet_lite0", random_seed=seed) for seed in (3, 3, 4)]
    one, same, other = (weights(network) for network in networks)
    assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert networks[0].facts.weights_sha256 is None


def test_shipped_weights_are_named_by_their_checksum(lite0: Network) -> None:
    row = CATALOG["efficientnet_lite0"]
    facts = lite0.facts
    assert (facts.name, facts.input_size, facts.preprocessing) == (row.name, row.input_size, "lite")
    assert (facts.weights_sha256, facts.default_layer, facts.dtype) == (row.sha256, "top_act", "float32")
    assert (facts.map_size, facts.parameters, facts.head) == (row.map_size, row.parameters, "softmax")
    assert facts.backend.startswith("tensorflow ")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # keras, saving
def test_the_operators_file_is_loaded_in_place_of_the_shipped_one(tmp_path: Path) -> None:
    from worker.gradcam.loading import load_network

    own = load_network("efficientnet_lite0", random_seed=3)
    own._model.save_weights(tmp_path / "efficientnet_lite0.weights.h5")
    loaded = load_network("efficientnet_lite0", weights_dir=tmp_path)
    assert_array_equal(weights(loaded), weights(own))
    assert loaded.facts.weights_sha256 not in {None, CATALOG["efficientnet_lite0"].sha256}


def test_missing_weights_are_an_error_and_never_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    from worker.gradcam.loading import load_network

    cached = Path(keras.src.backend.config.keras_home()) / "models" / CATALOG["xception"].keras_files[0]
    if cached.exists():
        pytest.skip(f"Keras has already downloaded {cached}")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there: no download
    with pytest.raises(WeightsUnavailable, match=r"xception.*GRADCAM_WEIGHTS_DIR"):
        load_network("xception", weights_dir=tmp_path)


def test_a_download_is_found_where_keras_keeps_it(tmp_path: Path) -> None:
    kept = tmp_path / "models" / CATALOG["xception"].keras_files[0]
    kept.parent.mkdir()
    kept.touch()
    program = (
        "from worker.gradcam import catalog, loading;print(loading._cached(catalog.find('xception')), end='')"
    )
    variables = {**os.environ, "KERAS_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout == str(kept)


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_a_file_that_holds_no_weights_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    from worker.gradcam.loading import load_network

    (tmp_path / "efficientnet_lite0.weights.h5").write_bytes(content)
    with pytest.raises(NetworkIncompatible, match=r"lite0\.weights\.h5 does not hold the weights of"):
        load_network("efficientnet_lite0", weights_dir=tmp_path)


def test_a_model_that_ends_in_pooled_class_maps_is_explained_by_them(
    by_hand: Callable[..., Any], noise: Callable[..., NDArray[np.uint8]]
) -> None:
    """Each class has a channel of its own, whose mean is its score: that channel is the map."""
    import keras

    inputs = keras.Input((4, 4, 3))
    x = class_maps = keras.layers.Conv2D(6, 1, name="conv")(inputs)
    network, pixels = by_hand(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))), noise(1, 4, 4)
    computed = network.compute(pixels, np.array([[2, 5]], np.int32))
    expected = keras.Model(inputs, class_maps)(pixels / np.float32(127.5) - 1).numpy()
    assert computed.layer == "conv"
    assert_allclose(computed.raw[0] * 16, expected[0, :, :, [2, 5]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vgg16", "xception", "densenet121", "efficientnetb0"])
def test_preprocessing_is_what_keras_does_for_these_weights(
    name: str, noise: Callable[..., NDArray[np.uint8]]
) -> None:
    import keras

    from worker.gradcam.keras_network import preprocess

    pixels = noise(2, 5, 4).astype(np.float32)
    module = {"densenet121": "densenet", "efficientnetb0": "efficientnet"}.get(name, name)
    theirs = getattr(keras.applications, module).preprocess_input(pixels.copy())
    assert_allclose(preprocess(pixels, CATALOG[name].preprocessing), theirs, atol=1e-5)


def test_preprocessing_of_efficientnet_lite_takes_127_and_divides_by_128() -> None:
    from worker.gradcam.keras_network import preprocess

    pixels = np.array([[[[0, 127, 255]]]], np.float32)
    how = CATALOG["efficientnet_lite0"].preprocessing
    assert_array_equal(preprocess(pixels, how), [[[[-127 / 128, 0, 1]]]])


def test_the_whole_way_back_can_be_asked_for(by_hand: Callable[..., Any]) -> None:
    import keras

    from worker.gradcam.loading import load_network

    inputs = keras.Input((4, 4, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(6, 1)(inputs))
    own = keras.Model(inputs, keras.layers.Dense(2)(x))
    assert [by_hand(own, exact_backward=exact)._exact_backward for exact in (False, True)] == [False, True]
    assert load_network("efficientnet_lite0", random_seed=3, exact_backward=True)._exact_backward
    assert not load_network("efficientnet_lite0", random_seed=3)._exact_backward
