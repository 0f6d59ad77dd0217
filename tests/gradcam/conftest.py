"""What the room's tests share: real networks, each built once, and a way to wrap one made by hand."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from worker.testing import TinyNetwork

if TYPE_CHECKING:  # at run time only tests marked `tensorflow` load it
    from worker.gradcam.keras_network import KerasNetwork

Wrap = Callable[..., "KerasNetwork"]


@pytest.fixture
def tiny() -> TinyNetwork:
    return TinyNetwork()


@pytest.fixture(scope="session")
def seeded() -> Callable[[str], "KerasNetwork"]:
    """A real architecture with seeded random weights, by its name in the catalog."""
    from worker.gradcam.loading import load_network

    return cache(lambda name: load_network(name, random_seed=1))


@pytest.fixture(scope="session")
def lite0() -> "KerasNetwork":
    """EfficientNet-Lite0 with the weights that are shipped."""
    from worker.gradcam.loading import load_network

    return load_network("efficientnet_lite0")


@pytest.fixture(scope="session")
def by_hand() -> Wrap:
    """A Keras model that a test made -> a network; inputs become `x / 127.5 - 1` unless it says otherwise."""
    from worker.gradcam.loading import wrap_model

    def wrap(model: Any, layer: str | None = None, **more: Any) -> "KerasNetwork":
        return wrap_model(model, **{"preprocessing": "tf", "target_layer": layer, "name": "by_hand", **more})

    return wrap


@pytest.fixture(scope="session")
def noise() -> Callable[..., NDArray[np.uint8]]:
    """Seeded noise, (images, height, width, 3), uint8."""
    return lambda *shape: np.random.default_rng(7).integers(0, 256, (*shape, 3), dtype=np.uint8)
