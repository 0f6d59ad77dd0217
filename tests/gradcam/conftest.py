"""What the room's tests share: real networks, each built once, and a way to wrap one made by hand."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for `devtools`

if TYPE_CHECKING:  # at run time only tests marked `tensorflow` load it
    from gradcam_worker.gradcam.models.keras_network import KerasNetwork

Wrap = Callable[..., "KerasNetwork"]


@pytest.fixture(scope="session")
def seeded() -> Callable[[str], "KerasNetwork"]:
    """A real architecture with seeded random weights, by its name in the catalog."""
    from gradcam_worker.gradcam.models.loading import load_network

    return cache(lambda name: load_network(name, random_seed=1))


@pytest.fixture(scope="session")
def lite0() -> "KerasNetwork":
    """EfficientNet-Lite0 with the weights that are shipped."""
    from gradcam_worker.gradcam.models.loading import load_network

    return load_network("efficientnet_lite0")


@pytest.fixture(scope="session")
def by_hand() -> Wrap:
    """A Keras model that a test made -> a network; inputs become `x / 127.5 - 1` unless it says otherwise."""
    from gradcam_worker.gradcam.models.loading import wrap_model

    def wrap(model: Any, layer: str | None = None, **more: Any) -> "KerasNetwork":
        return wrap_model(model, **{"preprocessing": "tf", "target_layer": layer, "name": "by_hand", **more})

    return wrap


@dataclass(frozen=True)
class Taped:
    """What a model does, seen from outside: nothing of ours is asked."""

    scores: NDArray[np.float64]  # (n, classes)
    activations: NDArray[np.float64]  # (n, rows, columns, channels)
    raw: NDArray[np.float64]  # (n, classes, rows, columns): equations 1 and 2 of arXiv 1610.02391


@pytest.fixture(scope="session")
def taped() -> Callable[..., Taped]:
    """A Keras model, called as it is under a gradient tape while what one of its layers makes is noted.

    Its scores are its output, or, with `head`, what that layer makes without its activation, or gets where
    it is nothing else. A layer that is called more than once is watched in its `turn`; tokens are shown as
    a `grid` of (rows, columns), those of the patches being the last.
    """
    import keras
    import tensorflow as tf

    def watch(operation: Any, seen: list[Any]) -> Callable[..., Any]:
        call = operation.call

        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.append((args[0], result := call(*args, **kwargs)))
            return result

        return noted

    def taped(
        model: Any, inputs: Any, layer: Any, *, head: Any = None, turn: int = 0, grid: Any = None
    ) -> Taped:
        heads: list[Any] = []
        seen: list[Any] = []
        fused = isinstance(head, keras.layers.Dense | keras.layers.Conv2D)
        activation = head.activation if fused else None
        layer.call = watch(layer, seen)
        if head is not None:
            head.call = watch(head, heads)
        try:
            if fused:
                head.activation = keras.activations.linear
            with tf.GradientTape(persistent=True) as tape:
                image = tf.constant(inputs)
                tape.watch(image)
                output = model(image, training=False)
                scores = heads[0][1 if fused else 0] if heads else output
                scores = tf.reshape(scores, (len(inputs), -1))
                single = [scores[:, one] for one in range(scores.shape[1])]
        finally:
            del layer.call
            if head is not None:
                del head.call
            if fused:
                head.activation = activation
        made = seen[turn][1]
        slopes = np.stack([tape.gradient(one, made).numpy() for one in single], axis=1)
        activations = made.numpy()
        if grid:
            patches = grid[0] * grid[1]
            activations, slopes = (
                one[..., -patches:, :].reshape(*one.shape[:-2], *grid, one.shape[-1])
                for one in (activations, slopes)
            )
        raw = np.einsum("nkc,nhwc->nkhw", slopes.mean((2, 3), np.float64), activations)
        return Taped(scores.numpy(), activations, raw)

    return taped


@pytest.fixture(scope="session")
def noise() -> Callable[..., NDArray[np.uint8]]:
    """Seeded noise, (images, height, width, 3), uint8."""
    return lambda *shape: np.random.default_rng(7).integers(0, 256, (*shape, 3), dtype=np.uint8)
