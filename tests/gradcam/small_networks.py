"""Parts of small networks with three classes, for several tests."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gradcam_worker.gradcam.catalog import PREPROCESSING, NetworkRow

ROWS, COLUMNS, CLASSES = 12, 16, 3
ALL_CLASSES = np.array([[0, 1, 2]] * 2, np.int32)
Wrap = Callable[..., Any]  # the fixture `wrap`


def backbone(keras: Any, name: str = "backbone", shape: tuple[Any, ...] = (ROWS, COLUMNS, 3)) -> Any:
    """Two convolutions, (rows, columns, channels) -> (5, 7, 6)."""
    layers = keras.layers
    inputs = keras.Input(shape)
    x = layers.Conv2D(4, 3, 2, activation="relu", name="stem")(inputs)
    x = layers.Conv2D(6, 3, padding="same", name="conv")(x)
    return keras.Model(inputs, layers.Activation("tanh", name="act")(x), name=name)


def add_classifier(keras: Any, x: Any, classes: int = CLASSES) -> Any:
    """Pool a feature map, and add a dense layer with a softmax."""
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.layers.Dense(classes, "softmax", bias_initializer="random_normal", name="scores")(x)


def classifier(**_: Any) -> Any:
    """A network as a row of the catalog names its builder."""
    import keras

    inner = backbone(keras)
    return keras.Model(inner.input, add_classifier(keras, inner.output))


CLASSIFIER = NetworkRow(
    name="small",
    input_size=(ROWS, COLUMNS),
    preprocessing=PREPROCESSING["tf"],
    builder=f"{__name__}:classifier",
    labels=(),
)
