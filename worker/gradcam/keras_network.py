"""A row of the catalog -> a live network: the only import of keras."""

import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.errors import InvalidSettings, NetworkIncompatible, UnknownLayer
from worker.gradcam import cam, catalog, weights
from worker.gradcam.catalog import NetworkRow, Preprocessing
from worker.gradcam.classes import ClassIndex, imagenet
from worker.gradcam.network import GRADCAM, Computed, Method, NetworkFacts

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is imported


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """TensorFlow writes notes to stderr while it loads, before its own log level holds."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


with _silent_stderr():
    import keras
    from keras import layers

IMAGE_RANK = 4  # (images, rows, columns, channels)
MAX_GRADIENTS = 2**27  # numbers held at once: 512 MB
MAX_TRACED = 8  # each is a graph of its own: a stream of layer names must not fill the memory


def load_network(
    name: str,
    *,
    weights_dir: Path | str | None = None,
    random_seed: int | None = None,
) -> "KerasNetwork":
    """Build a network of the catalog, with its weights, ready to explain.

    Weights come from `weights_dir`, from the package where it ships them, or from Keras's own
    download. `random_seed` builds it with seeded random weights instead, for tests and benchmarks.

    Raises UnknownNetwork, WeightsUnavailable, WeightsChecksumMismatch, NetworkIncompatible.
    """
    row = catalog.find(name)
    if keras.backend.backend() != "tensorflow":
        message = f"KERAS_BACKEND is {keras.backend.backend()!r}: only 'tensorflow' is supported."
        raise InvalidSettings(message)
    module, function = row.builder.split(":")
    build = getattr(import_module(module), function)
    if random_seed is not None:
        keras.utils.set_random_seed(random_seed)
        return KerasNetwork(row, build(weights=None), weights_sha256=None)
    file = weights.locate(row, Path(weights_dir) if weights_dir else None)
    if file is None:
        with _silent_progress():
            model, file = weights.download(row, partial(build, weights="imagenet"), partial(_cached, row))
        return KerasNetwork(row, model, weights_sha256=file.sha256)
    try:
        return KerasNetwork(row, build(weights=str(file.path)), weights_sha256=file.sha256)
    except (OSError, ValueError) as error:
        message = f"{file.path} does not hold the weights of {name}: {error}"
        raise NetworkIncompatible(message) from error


def _cached(row: NetworkRow) -> Path:
    """Where Keras keeps the row's ImageNet weights, once it has downloaded them."""
    return Path(keras.utils.get_file(row.keras_files[0], origin="", cache_subdir="models"))


@contextmanager
def _silent_progress() -> Iterator[None]:
    """Keras shows a download's progress on standard output, which belongs to our own answer."""
    shown = keras.config.is_interactive_logging_enabled()
    keras.config.disable_interactive_logging()
    try:
        yield
    finally:
        if shown:
            keras.config.enable_interactive_logging()


class KerasNetwork:
    """A live Keras model and what is needed to explain it. Not thread-safe."""

    def __init__(self, row: NetworkRow, model: Any, *, weights_sha256: str | None) -> None:
        """Take the model as it is: nothing in it is changed."""
        self.labels: ClassIndex = imagenet()
        self.facts = NetworkFacts(
            name=row.name,
            input_size=row.input_size,
            preprocessing=row.preprocessing.name,
            weights_sha256=weights_sha256,
            backend=f"tensorflow {import_module('tensorflow').__version__}",
            dtype=keras.config.floatx(),
            default_layer=row.target_layer,
        )
        self._preprocessing = row.preprocessing
        self._model = model
        self._scores = scores_before_softmax(model)
        self._passes: OrderedDict[tuple[str, str, str], tuple[Any, int]] = OrderedDict()

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        """See `worker.gradcam.network.Network.compute`."""
        layer = self.facts.default_layer if method.layer is None else method.layer
        run, size = self._pass(layer, method.name, method.score)
        # An early layer has large maps: so many classes at a time that their gradients fit.
        at_once = max(MAX_GRADIENTS // (len(pixels) * size), 1)
        parts = [
            run(pixels, wanted[:, first : first + at_once]) for first in range(0, wanted.shape[1], at_once)
        ]
        scores, class_ids, raw = zip(*parts, strict=True)
        return Computed(layer, scores[0], np.concatenate(class_ids, 1), np.concatenate(raw, 1))

    def _pass(self, layer: str, method: str, score: str) -> tuple[Any, int]:
        """The traced function of one layer, method and score, and how many numbers its activations are.

        The least recently used makes room.
        """
        from worker.gradcam import gradients

        key = (layer, method, score)
        if key not in self._passes:
            activations = self._activations(layer)
            both = keras.Model(self._model.inputs, [activations, self._scores])
            preprocessing = self._preprocessing

            def forward(pixels: Any) -> Any:
                return both(preprocess(pixels, preprocessing), training=False)

            formula = partial(cam.METHODS[method], keras.ops)
            # The logarithm of the probability: its map is that of the probability, and cannot underflow.
            target = keras.ops.log_softmax if score == "probability" else keras.ops.copy
            run = gradients.one_pass(forward, formula, target)
            self._passes[key] = run, math.prod(activations.shape[1:])
            if len(self._passes) > MAX_TRACED:
                self._passes.popitem(last=False)
        self._passes.move_to_end(key)
        return self._passes[key]

    def _activations(self, layer: str) -> Any:
        """The target layer's output (None, rows, columns, channels). Raises UnknownLayer."""
        spatial = {
            candidate.name: candidate.output
            for candidate in self._model.layers
            if not isinstance(candidate, layers.InputLayer) and len(candidate.output.shape) == IMAGE_RANK
        }
        if layer not in spatial:
            exists = any(candidate.name == layer for candidate in self._model.layers)
            why = "keeps no rows and columns" if exists else "does not exist"
            last = ", ".join(list(spatial)[-5:])
            message = (
                f"Layer {layer!r} of {self.facts.name} {why}. {len(spatial)} layers can be "
                f"explained; the last of them: {last}. The default is {self.facts.default_layer}."
            )
            raise UnknownLayer(message)
        return spatial[layer]


def preprocess(pixels: Any, how: Preprocessing) -> Any:
    """RGB (n, height, width, 3) float32 in 0..255 -> network input, on the device."""
    ordered = keras.ops.take(pixels, how.order, axis=-1) if how.order != (0, 1, 2) else pixels
    return (ordered - np.asarray(how.mean, np.float32)) / np.float32(how.std)


def scores_before_softmax(model: Any) -> Any:
    """The symbolic scores (None, classes) before the softmax; the model itself is not edited.

    Raises NetworkIncompatible where the last layer is no dense layer.
    """
    last = model.layers[-1]
    if not isinstance(last, layers.Dense):
        message = f"{model.name} ends in {type(last).__name__} {last.name!r}, not in a dense layer."
        raise NetworkIncompatible(message)
    if last.activation is keras.activations.linear:
        return last.output
    return _Unactivated(last, name=f"{last.name}_scores")(last.input)


class _Unactivated(layers.Layer):  # type: ignore[misc]  # keras ships no types
    """A dense layer's own weights without its activation."""

    def __init__(self, dense: Any, name: str) -> None:
        super().__init__(name=name)
        self.dense = dense

    def call(self, inputs: Any) -> Any:
        scores = keras.ops.matmul(inputs, self.dense.kernel)
        return scores if self.dense.bias is None else scores + self.dense.bias


def efficientnet_lite0(weights: str | None) -> Any:
    """EfficientNet-Lite0: B0 (Tan and Le, arXiv 1905.11946) without squeeze-excite and with relu6.

    Input (224, 224, 3); `top_act` is (7, 7, 1280); the scores (1000,) come without a softmax. The
    layers are built in the order in which the weights file numbers them.
    """
    stages = (  # repeats, kernel, stride, expansion, channels
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def convolve(x: Any, name: str, channels: int | None, kernel: int, stride: int = 1) -> Any:
        """A convolution (depthwise where `channels` is None) and its batch normalisation."""
        options = {"strides": stride, "padding": "same", "use_bias": False, "name": f"{name}_conv"}
        if channels is None:
            x = layers.DepthwiseConv2D(kernel, **options)(x)
        else:
            x = layers.Conv2D(channels, kernel, **options)(x)
        return layers.BatchNormalization(epsilon=1e-3, name=f"{name}_bn")(x)

    inputs = keras.Input((224, 224, 3))
    x = layers.ReLU(6.0, name="stem_act")(convolve(inputs, "stem", 32, 3, 2))
    for stage, (repeats, kernel, stride, expansion, channels) in enumerate(stages, start=1):
        for repeat in range(repeats):
            name, shortcut = f"block{stage}{'abcd'[repeat]}", x
            if expansion > 1:
                x = convolve(x, f"{name}_expand", expansion * shortcut.shape[-1], 1)
                x = layers.ReLU(6.0, name=f"{name}_expand_act")(x)
            x = convolve(x, f"{name}_depthwise", None, kernel, 1 if repeat else stride)
            x = layers.ReLU(6.0, name=f"{name}_depthwise_act")(x)
            x = convolve(x, f"{name}_project", channels, 1)
            if repeat:
                x = layers.Add(name=f"{name}_add")([x, shortcut])
    x = layers.ReLU(6.0, name="top_act")(convolve(x, "top", 1280, 1))
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    x = layers.Dropout(0.2, name="dropout")(x)
    model = keras.Model(inputs, layers.Dense(1000, name="scores")(x), name="efficientnet_lite0")
    if weights:
        model.load_weights(weights)
    return model


def device_name() -> str:
    """What the networks run on: the first GPU's name, or `cpu`."""
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        return "cpu"
    return str(tf.config.experimental.get_device_details(devices[0]).get("device_name", "gpu"))
