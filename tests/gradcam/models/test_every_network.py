"""Every network of the catalog is what its row says, and can be explained: see `networks`."""

import gc
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.network import Computed

ROWS = list(CATALOG.values())
THEIRS = [row for row in ROWS if not row.shipped]  # Keras's own
every_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "networks.md"


def test_the_table_in_the_docs_has_these_rows() -> None:
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines[2:]]
    sides = [" x ".join(map(str, row.input_size)) for row in ROWS]
    maps = [" x ".join(map(str, row.map_size or ())) for row in ROWS]
    assert cells == [
        [
            row.name,
            side,
            row.preprocessing.name,
            f"`{row.target_layer}`",
            cells,
            f"{row.parameters:,}",
            "yes",
            "yes",
        ]
        for row, side, cells in zip(ROWS, sides, maps, strict=True)
    ]


@pytest.mark.tensorflow
@pytest.mark.parametrize("row", THEIRS, ids=[row.name for row in THEIRS])
def test_preprocessing_is_what_keras_does_for_its_weights(
    row: NetworkRow, noise: Callable[..., NDArray[np.uint8]]
) -> None:
    import keras

    from gradcam_worker.gradcam.models.keras_network import preprocess

    builder = getattr(keras.applications, str(row.builder).split(":")[1])
    keras_preprocess = sys.modules[builder.__module__].preprocess_input
    assert inspect.isfunction(keras_preprocess)
    pixels = noise(2, 5, 4).astype(np.float32)
    assert_allclose(preprocess(pixels, row.preprocessing), keras_preprocess(pixels.copy()), atol=1e-5)


@pytest.fixture
def clear_keras_session() -> Iterator[None]:
    """Number layers from the beginning; free a network of a gigabyte before the next one is built."""
    import keras

    keras.utils.clear_session()
    yield
    keras.utils.clear_session()
    gc.collect()


def graph(model: Any) -> str:
    """The configuration of a model, without the name of its input, which differs in a copy."""
    (name,) = (layer["name"] for layer in model.get_config()["layers"] if layer["class_name"] == "InputLayer")
    return json.dumps(model.get_config()).replace(f'"{name}"', '"input"')


@pytest.fixture
def built_graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs of the models that are built from now on."""
    from gradcam_worker.gradcam.models import loading

    build = loading._build
    graphs: list[str] = []

    def remember(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        graphs.append(graph(model))
        return model

    monkeypatch.setattr(loading, "_build", remember)
    return graphs


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:`input_shape` is undefined or non-square")  # MobileNetV3, of itself
@pytest.mark.usefixtures("clear_keras_session")
@every_row
def test_it_has_the_target_layer_of_its_row_keras_graph_and_a_short_backward_pass_with_the_same_heatmap(
    row: NetworkRow,
    built_graphs: list[str],
    build_with_keras: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One test for three promises: what takes time is to build a network."""
    import keras
    import tensorflow as tf

    from devtools.agreement import networks
    from gradcam_worker.gradcam.models.loading import load_network

    built: list[Any] = []  # once for all that is asked of it
    passes: list[tuple[Any, Computed]] = []  # what was asked, and what it gave

    def remember(*args: Any, **kwargs: Any) -> Any:
        network = load_network(*args, **kwargs)
        compute = network.compute

        def computed(*asked: Any) -> Computed:
            passes.append((asked, compute(*asked)))
            return passes[-1][1]

        monkeypatch.setattr(network, "compute", computed)
        built.append(network)
        return network

    monkeypatch.setattr(networks, "load_network", remember)
    compiles = is_smallest_of_its_architecture(row)
    tf.config.run_functions_eagerly(not compiles)
    try:
        seen = networks.look(row)
        [network], [(asked, short)] = built, passes
        # Both alike: random weights magnify what is rounded in another way.
        tf.config.run_functions_eagerly(True)
        if compiles:
            network._passes.clear()
            short = network.compute(*asked)
        network._exact_backward = True
        network._passes.clear()
        exact = network.compute(*asked)
    finally:
        tf.config.run_functions_eagerly(False)
    assert seen.target_layer == row.target_layer
    assert (seen.input_size, seen.map_size) == (row.input_size, row.map_size)
    assert (seen.preprocessing, seen.parameters) == (row.preprocessing.name, row.parameters)
    assert seen.finite
    assert seen.nonzero
    assert seen.fits_its_row
    assert [*map(bool, network._shortcuts.values())] == [True]
    peak = np.abs(exact.raw).max()
    assert peak > 0
    assert_allclose(short.raw, exact.raw, atol=1e-5 * peak, rtol=0)
    built.clear()
    passes.clear()
    del network
    if row in THEIRS:
        keras.utils.clear_session()
        with keras.StatelessScope():  # weights get no values: half of the time that it takes to build
            model = build_with_keras(row)
        assert built_graphs == [graph(model)], "without ImageNet weights it is what Keras builds with them"
        assert model.requested_files == list(row.keras_files)


def is_smallest_of_its_architecture(row: NetworkRow) -> bool:
    """Whether its pass is compiled: tracing takes seconds, and what fails in it is a kind of layer.

    One module of Keras makes all its networks of the same kinds of layers.
    """

    def architecture(one: NetworkRow) -> str:
        module, function = str(one.builder).split(":")
        return str(getattr(import_module(module), function).__module__)

    alike = [one for one in ROWS if architecture(one) == architecture(row)]
    return row == min(alike, key=lambda one: one.parameters or 0)
