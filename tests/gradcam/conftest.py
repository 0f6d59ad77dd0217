"""Shared fixtures: real networks, each built once, and a function that wraps a model of a test."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for `devtools`

from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method

if TYPE_CHECKING:  # at run time only tests marked `tensorflow` load it
    from gradcam_worker.gradcam.models.keras_network import KerasNetwork

Wrap = Callable[..., "KerasNetwork"]


@pytest.fixture(scope="session")
def random_network() -> Callable[[str], "KerasNetwork"]:
    """Builds a network of the catalog with seeded random weights."""
    from gradcam_worker.gradcam.models.loading import load_network

    return cache(lambda name: load_network(name, random_seed=1, forward="tensorflow"))


@pytest.fixture(scope="session")
def lite0() -> "KerasNetwork":
    """EfficientNet-Lite0 with its shipped weights."""
    from gradcam_worker.gradcam.models.loading import load_network

    return load_network("efficientnet_lite0", forward="tensorflow")


@pytest.fixture
def build_with_keras(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
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
            builder = getattr(keras.applications, str(row.builder).split(":")[1])
            model = builder(weights="imagenet", input_shape=(*row.input_size, 3))
        model.requested_files = requested_files
        return model

    return build


@pytest.fixture(scope="session")
def compute_together() -> Callable[..., dict[str, NDArray[np.float32]]]:
    """Raw maps of several methods, (images, k, rows, columns), from one pass: their formulas alone differ.

    That a method gives the same where its own backward pass is shorter is tested in test_shortcut.
    """

    def compute_together(
        network: "KerasNetwork", pixels: NDArray[np.uint8], class_ids: NDArray[np.int32], names: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        def every(ops: Any, activations: Any, gradients: Any) -> Any:
            return ops.concatenate([cam.METHODS[name](ops, activations, gradients) for name in names], axis=1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(cam.METHODS, "every", every)
            raw = network.compute(pixels, class_ids, Method("every")).raw
        return dict(zip(names, np.split(raw, len(names), axis=1), strict=True))

    return compute_together


@pytest.fixture(scope="session")
def wrap() -> Wrap:
    """Wraps a Keras model; its input is `x / 127.5 - 1` unless `preprocessing` is given."""
    from gradcam_worker.gradcam.models.loading import wrap_model

    def wrap(model: Any, layer: str | None = None, **options: Any) -> "KerasNetwork":
        return wrap_model(
            model, **{"preprocessing": "tf", "target_layer": layer, "name": "by_hand", **options}
        )

    return wrap


@dataclass(frozen=True)
class TapedGradients:
    """Results of a model by a gradient tape, without code of the package."""

    scores: NDArray[np.float64]  # (n, classes)
    activations: NDArray[np.float64]  # (n, rows, columns, channels)
    raw: NDArray[np.float64]  # (n, classes, rows, columns): equations 1 and 2 of arXiv 1610.02391


@pytest.fixture(scope="session")
def tape_gradients() -> Callable[..., TapedGradients]:
    """Calls a Keras model under a gradient tape, while the output of one of its layers is recorded.

    The scores are the model's output, or, with `head`, the output of that layer without its activation; the
    input of `head`, if it has no weights. Of a layer that is called several times, `turn` selects the call.
    With `grid` (rows, columns), the last rows * columns tokens become a map.
    """
    import keras
    import tensorflow as tf

    def record_calls(operation: Any, calls: list[Any]) -> Callable[..., Any]:
        call = operation.call

        def recorded_call(*args: Any, **kwargs: Any) -> Any:
            calls.append((args[0], result := call(*args, **kwargs)))
            return result

        return recorded_call

    def tape_gradients(
        model: Any, inputs: Any, layer: Any, *, head: Any = None, turn: int = 0, grid: Any = None
    ) -> TapedGradients:
        head_calls: list[Any] = []
        layer_calls: list[Any] = []
        fused = isinstance(head, keras.layers.Dense | keras.layers.Conv2D)
        activation = head.activation if fused else None
        layer.call = record_calls(layer, layer_calls)
        if head is not None:
            head.call = record_calls(head, head_calls)
        try:
            if fused:
                head.activation = keras.activations.linear
            with tf.GradientTape(persistent=True) as tape:
                image = tf.constant(inputs)
                tape.watch(image)
                output = model(image, training=False)
                scores = head_calls[0][1 if fused else 0] if head_calls else output
                scores = tf.reshape(scores, (len(inputs), -1))
                class_scores = [scores[:, index] for index in range(scores.shape[1])]
        finally:
            del layer.call
            if head is not None:
                del head.call
            if fused:
                head.activation = activation
        output_of_layer = layer_calls[turn][1]
        gradients = np.stack(
            [tape.gradient(score, output_of_layer).numpy() for score in class_scores], axis=1
        )
        activations = output_of_layer.numpy()
        if grid:
            patches = grid[0] * grid[1]
            activations, gradients = (
                array[..., -patches:, :].reshape(*array.shape[:-2], *grid, array.shape[-1])
                for array in (activations, gradients)
            )
        raw = np.einsum("nkc,nhwc->nkhw", gradients.mean((2, 3), np.float64), activations)
        return TapedGradients(scores.numpy(), activations, raw)

    return tape_gradients


@pytest.fixture(scope="session")
def noise() -> Callable[..., NDArray[np.uint8]]:
    """Seeded noise, (images, height, width, 3), uint8."""
    return lambda *shape: np.random.default_rng(7).integers(0, 256, (*shape, 3), dtype=np.uint8)
