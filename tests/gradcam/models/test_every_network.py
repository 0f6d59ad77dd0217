"""Every network of the catalog is what its row says, and can be explained: see `networks`.

Keras makes all networks of one of its modules of the same kinds of layers. The suite builds the smallest of
each module; `scripts/test --networks` builds them all, and asks more of the smallest, which takes minutes.
"""

import gc
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.files.weights import WeightsFile
from gradcam_worker.gradcam.network import Computed
from gradcam_worker.gradcam.registry.registry import Registry

ROWS = list(CATALOG.values())
THEIRS = [row for row in ROWS if not row.shipped]  # Keras's own
IN_THE_SUITE = (
    *("efficientnet_lite0", "convnexttiny", "densenet121", "efficientnetb0", "efficientnetv2b0"),
    *("inceptionresnetv2", "inceptionv3", "mobilenet", "mobilenetv2", "mobilenetv3small", "nasnetmobile"),
    *("resnet50", "resnet50v2", "vgg16", "xception"),
)
FILES_IN_THE_SUITE = ("mobilenetv3small",)  # EfficientNetB0's: see test_imagenet_step.py
LEFT_TO_THE_COMMAND = (
    *("convnextsmall", "convnextbase", "convnextlarge", "convnextxlarge", "densenet169", "densenet201"),
    *(f"efficientnetb{number}" for number in range(1, 8)),
    *(f"efficientnetv2{size}" for size in ("b1", "b2", "b3", "s", "m", "l")),
    *("mobilenetv3large", "nasnetlarge", "resnet101", "resnet152", "resnet101v2", "resnet152v2"),
    "vgg19",  # VGG16 with three layers more, in a module of its own
)
WEIGHTS = "s3://models/imagenet.weights.h5"
DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "networks.md"


built_rows = pytest.mark.parametrize(
    ("row", "by_command"),
    [
        *(pytest.param(CATALOG[name], False, id=name) for name in IN_THE_SUITE),
        *(pytest.param(row, True, id=f"{row.name}-by-command", marks=pytest.mark.large) for row in ROWS),
    ],
)


def test_each_network_is_either_built_in_the_suite_or_left_to_the_command() -> None:
    assert sorted((*IN_THE_SUITE, *LEFT_TO_THE_COMMAND)) == sorted(CATALOG)


@pytest.mark.tensorflow
def test_the_suite_builds_the_smallest_of_each_architecture() -> None:
    assert {row.name for row in ROWS if is_smallest_of_its_architecture(row)} == {*IN_THE_SUITE, "vgg19"}


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

    from gradcam_worker.gradcam.imaging.network_input import preprocess

    builder = getattr(keras.applications, str(row.builder).split(":")[1])
    keras_preprocess = sys.modules[builder.__module__].preprocess_input
    assert inspect.isfunction(keras_preprocess)
    pixels = noise(2, 5, 4).astype(np.float32)
    assert_allclose(
        preprocess(pixels, row.preprocessing, keras.ops), keras_preprocess(pixels.copy()), atol=1e-5
    )


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """What is loaded already is not searched for garbage again: that takes half a second each time."""
    import_module("gradcam_worker.gradcam.models.loading")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def clear_keras_session(little_garbage: None) -> Iterator[None]:
    """Number layers from the beginning; free a network of a gigabyte before the next one is built."""
    import keras

    keras.utils.clear_session()
    yield
    keras.utils.clear_session()
    gc.collect()


@pytest.fixture(scope="module")
def pools() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Random numbers of the distributions that networks begin with."""
    from devtools.agreement.weights import POOL

    rng = np.random.default_rng(0)
    return rng.standard_normal(POOL, np.float32), rng.random(POOL, np.float32)


@pytest.fixture
def cheap_weights(pools: tuple[NDArray[np.float32], NDArray[np.float32]]) -> Iterator[None]:
    """Random weights are cut out of a pool."""
    from devtools.agreement.weights import initialised

    with initialised(*pools):
        yield


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with each network of Keras, as an operator who has its ImageNet weights writes it."""
    lines = []
    for row in THEIRS:
        table = {"architecture": row.name, "weights": WEIGHTS, "sha256": "0" * 64, "labels": "imagenet"}
        lines += [
            f"[networks.own-{row.name}]",
            *(f"{key} = {json.dumps(value)}" for key, value in table.items()),
        ]
        lines += ["pretrained = true"]
    path = tmp_path_factory.mktemp("registry") / "networks.toml"
    path.write_text("\n".join(lines))
    return Registry(path)


@pytest.fixture
def built_graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs of the models that are built from now on."""
    from devtools.agreement.weights import graph_of
    from gradcam_worker.gradcam.models import loading

    build = loading._build
    graphs: list[str] = []

    @wraps(build)
    def remember(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        graphs.append(graph_of(model))
        return model

    monkeypatch.setattr(loading, "_build", remember)
    return graphs


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, as it saves
@pytest.mark.usefixtures("clear_keras_session", "cheap_weights")
@built_rows
def test_it_has_the_layer_of_its_row_one_graph_in_all_ways_and_a_short_backward_pass_with_the_same_heatmap(
    row: NetworkRow,
    by_command: bool,
    built_graphs: list[str],
    build_with_keras: Callable[..., Any],
    registered: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One test for three promises: what takes time is to build a network.

    Weights from a file, from the download of Keras and from a registry entry have one graph, in all networks.
    That the files are read alike, and that the pass can be compiled, the command sees in the smallest network
    of each architecture: what fails there is a kind of layer. The suite reads files for two of them.
    """
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
    compiles = by_command and row.name in IN_THE_SUITE
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
    assert (seen.finite, seen.nonzero) == (True, True)
    assert seen.fits_its_row
    assert [*map(bool, network._shortcuts.values())] == [True]
    peak = np.abs(exact.raw).max()
    assert peak > 0
    assert_allclose(short.raw, exact.raw, atol=1e-5 * peak, rtol=0)
    if row in THEIRS:
        own, models = registered.find(f"own-{row.name}"), [network._model]
        built.clear()
        passes.clear()
        del network
        if compiles or row.name in FILES_IN_THE_SUITE:
            compare_weights_from_files(row, own, models.pop(), tmp_path)
        else:
            models.clear()
            build_without_values(row, own, build_with_keras, built_graphs)
            assert arguments_of_the_builder(row, monkeypatch) == arguments_of_the_builder(own, monkeypatch)
        assert len({*built_graphs}) == 1, "without ImageNet weights it is what Keras builds with them"


def build_without_values(
    row: NetworkRow, own: NetworkRow, build_with_keras: Callable[..., Any], built_graphs: list[str]
) -> None:
    """Build what Keras builds with its download: half of the time without values.

    A registry entry is built too where it needs more than the arguments of the builder.
    """
    import keras

    from devtools.agreement.weights import graph_of
    from gradcam_worker.gradcam.models import loading

    keras.utils.clear_session()
    with keras.StatelessScope(initialize_variables=False):
        model = build_with_keras(row)
        built_graphs.append(graph_of(model))
        assert model.requested_files == list(row.keras_files)
        del model
        if row.imagenet_scale:
            keras.utils.clear_session()
            loading._build(own, pretrained=True, weights=None)


def arguments_of_the_builder(row: NetworkRow, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the function of Keras that builds a network is called with, and what it takes by default."""
    import keras

    from gradcam_worker.gradcam.models import loading

    name = str(row.builder).split(":")[1]
    signature = inspect.signature(getattr(keras.applications, name))

    def bind(**options: Any) -> dict[str, Any]:
        bound = signature.bind(**options)
        bound.apply_defaults()
        return dict(bound.arguments)

    with monkeypatch.context() as patch:
        patch.setattr(keras.applications, name, bind)
        arguments: dict[str, Any] = inspect.unwrap(loading._build)(row, pretrained=False, weights=None)
        return arguments


def compare_weights_from_files(row: NetworkRow, own: NetworkRow, model: Any, folder: Path) -> None:
    """Load a file as Keras's downloads are in the three ways, and compare the outputs."""
    import h5py
    import keras
    from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

    from devtools.agreement.weights import downloaded
    from gradcam_worker.gradcam.models import loading

    path = folder / row.keras_files[0]
    with h5py.File(path, "w") as file:
        save_weights_to_hdf5_group(file, model)
    pixels = np.random.default_rng(0).uniform(0, 255, (1, *row.input_size, 3)).astype(np.float32)
    expected = np.asarray(model(pixels, training=False))
    file_of_registry = WeightsFile(path, "0" * 64)
    ways: tuple[Callable[[], Any], ...] = (
        lambda: loading._load_catalog_model(row, folder)[0],
        lambda: loading._load_catalog_model(row, None)[0],
        lambda: loading.load_operator_model(own, file_of_registry),
    )
    with downloaded(row, path) as requested:
        for load in ways:
            keras.utils.clear_session()
            loaded = load()
            assert_allclose(np.asarray(loaded(pixels, training=False)), expected, rtol=1e-5, atol=1e-9)
            del loaded
    path.unlink()  # half a gigabyte of VGG
    assert {*requested} == {*row.keras_files}


def is_smallest_of_its_architecture(row: NetworkRow) -> bool:
    """Whether one module of Keras makes no network with fewer parameters."""

    def architecture(one: NetworkRow) -> str:
        module, function = str(one.builder).split(":")
        return str(getattr(import_module(module), function).__module__)

    alike = [one for one in ROWS if architecture(one) == architecture(row)]
    return row == min(alike, key=lambda one: one.parameters or 0)
