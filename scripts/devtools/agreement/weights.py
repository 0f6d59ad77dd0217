"""Weights of each network of the catalog in the three ways in which they come: `scripts/networks --weights`.

Keras builds a network with seeded weights and writes them to a file, laid out as those that it downloads. The
file is then read from an operator's folder, as Keras's download, and by an entry of a registry.
"""

import gc
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

from gradcam_worker.gradcam.models import loading

# isort: split
# Only now: the line above keeps TensorFlow quiet while it is loaded for the first time.
import h5py
import keras
import numpy as np
from keras.src.initializers import random_initializers
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group
from keras.src.utils import file_utils
from numpy.typing import NDArray

from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.files.weights import WeightsFile, file_sha256
from gradcam_worker.gradcam.imaging.network_input import preprocess, to_input
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.gradcam.sizing import DEFAULT_SIZING

HEADINGS = ("network", "graph", "file", "download", "registry")
PHOTOS = ("astronaut", "coffee")
POOL = 2**22  # random numbers
SEED = 0
NOISE = 0.05  # of what is 1 or 0 in a new network, so that two values in each other's place are noticed
MAX_DIFFERENCE = 1e-5  # of the spread of the logits
Array = NDArray[np.float64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Weighed:
    """What one network was with the same weights from three sources."""

    network: str
    same_graph: bool
    differences: tuple[float, ...]  # of the logits of each way from those of Keras's network, by their spread

    @property
    def agrees(self) -> bool:
        """Whether it was one and the same."""
        return self.same_graph and max(self.differences) <= MAX_DIFFERENCE

    @cached_property
    def cells(self) -> tuple[str, ...]:
        """Its cells, in the order of the headings."""
        figures = (f"{difference:.0e}" if difference else "0" for difference in self.differences)
        return self.network, "one" if self.same_graph else "DIFFERENT", *figures


def weigh(row: NetworkRow) -> Weighed:
    """Load a network in the three ways, one after the other, and compare graphs and logits."""
    photos = [decode((DATA / "photos" / f"{name}.jpg").read_bytes()).pixels for name in PHOTOS]
    pixels = np.stack([to_input(photo, row.input_size, DEFAULT_SIZING) for photo in photos])
    inputs = preprocess(pixels.astype(np.float32), row.preprocessing, np)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / row.keras_files[0]
        graph, expected = _write_weights(row, path, inputs)
        ways: tuple[Callable[[], Any], ...] = (
            lambda: loading._load_catalog_model(row, folder)[0],  # noqa: SLF001
            lambda: _from_download(row, path),
            lambda: _from_registry(row, path, folder),
        )
        results = []
        for load in ways:
            _free()
            with initialised(np.zeros(1, np.float32), np.zeros(1, np.float32)):
                loaded = load()
            results.append(_graph_and_logits(loaded, inputs))
            del loaded
    spread = np.ptp(expected)
    if not np.isfinite(expected).all() or not spread or np.ptp(expected, axis=0).max() < spread / 100:
        message = f"The logits of {row.name} do not depend on the image, so they show nothing."
        raise RuntimeError(message)
    _free()
    differences = tuple(float(np.abs(logits - expected).max() / spread) for _, logits in results)
    return Weighed(row.name, all(found == graph for found, _ in results), differences)


def _write_weights(row: NetworkRow, path: Path, inputs: Any) -> tuple[str, Array]:
    """Let Keras make a network, and write its weights. Returns its graph and its logits."""
    _free()
    noise = np.random.default_rng(SEED)
    with initialised(noise.standard_normal(POOL, np.float32), noise.random(POOL, np.float32)):
        model = loading._build(row, pretrained=True, weights=None)  # noqa: SLF001
    graph = graph_of(model)
    for variable in model.weights:
        if len(variable.shape) == 1:
            values = np.asarray(variable)
            variable.assign(values + np.float32(NOISE) * noise.standard_normal(values.shape, np.float32))
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # the averages become those of the pass below, as in a trained network
        elif isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    model(inputs, training=True)
    with h5py.File(path, "w") as file:
        save_weights_to_hdf5_group(file, model)
    _, logits = _graph_and_logits(model, inputs)
    return graph, logits


@contextmanager
def initialised(normal: Floats, uniform: Floats) -> Iterator[None]:
    """Cut the weights that networks begin with out of arrays: to draw two billion takes half a minute.

    Args:
        normal: Numbers of the standard normal distribution.
        uniform: Numbers from 0 to 1.
    """
    starts = np.random.default_rng(SEED)

    def cut(pool: Floats, shape: Any) -> Floats:
        start, count = int(starts.integers(len(pool) // 2 + 1)), math.prod(shape)
        if start + count > len(pool):
            return np.resize(pool[start:], shape)
        return pool[start : start + count].reshape(shape)  # which `resize` would copy to the end of the pool

    def of_deviation(shape: Any, mean: float = 0.0, stddev: float = 1.0, **_: Any) -> Floats:
        return np.clip(cut(normal, shape), -2, 2) * np.float32(stddev) + np.float32(mean)

    def between(shape: Any, minval: float, maxval: float, **_: Any) -> Floats:
        return cut(uniform, shape) * np.float32(maxval - minval) + np.float32(minval)

    drawn = {"normal": of_deviation, "truncated_normal": of_deviation, "uniform": between}
    with ExitStack() as patches:
        for name, draw in drawn.items():
            patches.enter_context(mock.patch.object(random_initializers.random, name, draw))
        yield


def _graph_and_logits(model: Any, inputs: Any) -> tuple[str, Array]:
    """The graph of a model and its scores, before a softmax that is part of its last layer, or a layer."""
    graph, last = graph_of(model), model.layers[-1]
    if isinstance(last, keras.layers.Activation):
        model = keras.Model(model.inputs[0], last.input)
    else:
        last.activation = keras.activations.linear
    return graph, np.asarray(model(inputs, training=False), np.float64)


def graph_of(model: Any) -> str:
    """The configuration of a model, without the name of its input, which differs in a copy."""
    config = model.get_config()
    [name] = (layer["name"] for layer in config["layers"] if layer["class_name"] == "InputLayer")
    return json.dumps(config).replace(f'"{name}"', '"input"')


def _from_download(row: NetworkRow, path: Path) -> Any:
    """Load a network as where no file is given, with the file in place of Keras's download."""
    with downloaded(row, path):
        return loading._load_catalog_model(row, None)[0]  # noqa: SLF001


@contextmanager
def downloaded(row: NetworkRow, path: Path) -> Iterator[list[str]]:
    """Put a file in place of what Keras downloads for a network. Gives the names that it asks for."""
    requested: list[str] = []

    def get_file(name: str, *_: Any, **__: Any) -> str:
        requested.append(name)
        if name not in row.keras_files:
            message = f"Keras downloads {name} for {row.name}, and the catalog says {row.keras_files}."
            raise RuntimeError(message)
        return str(path)

    with (
        mock.patch.object(file_utils, "get_file", get_file),
        mock.patch.object(keras.utils, "get_file", get_file),
    ):
        yield requested


def _from_registry(row: NetworkRow, path: Path, folder: Path) -> Any:
    """Load a network as a worker loads one that its operator registered."""
    own, registry = folder / "own.weights.h5", folder / "networks.toml"
    path.rename(own)
    sha256 = file_sha256(own)
    table = {"architecture": row.name, "weights": str(own), "sha256": sha256, "labels": "imagenet"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**table, "pretrained": True}.items()]
    registry.write_text("\n".join(["[networks.own]", *lines]))
    found = Registry(registry).find("own")
    return loading.load_operator_model(found, WeightsFile(own, sha256))


def _free() -> None:
    """Drop what is left of networks, and number layers from the beginning."""
    keras.utils.clear_session()
    gc.collect()
