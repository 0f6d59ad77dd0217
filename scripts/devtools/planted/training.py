"""Trains a small network on drawn shapes, in seconds on a CPU, and explains images with it."""

from typing import Any

import numpy as np

from devtools.planted.shapes import CLASSES, SIDE, Plant, draw
from gradcam_worker.gradcam import Network

TRAINING_IMAGES = 2000
EPOCHS = 8
BATCH = 50
RATE = 3e-3
TRAINING_SEED = 1000  # apart from those of the images that are audited


def train(
    seed: int, plant: Plant | None = None, *, images: int = TRAINING_IMAGES, epochs: int = EPOCHS
) -> Any:
    """Train a network.

    Args:
        seed: Of the weights, the training images and their order.
        plant: The shortcut; None: a clean training.
        images: How many it is trained on.
        epochs: How often.

    Returns:
        The Keras model: (48, 48, 3) in [0, 1] to probabilities of `CLASSES`.
    """
    import keras

    keras.utils.set_random_seed(seed)
    shapes = draw(images, TRAINING_SEED + seed, plant)
    model = untrained()
    steps = epochs * (images // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(RATE, steps)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    inputs = shapes.pixels.astype(np.float32) / 255
    model.fit(inputs, shapes.labels, BATCH, epochs, verbose=0)
    return model


def untrained() -> Any:
    """The Keras model with random weights."""
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 3)),
            *_convolution(layers, 12, 5, 2),
            *_convolution(layers, 24, 3, 2),
            *_convolution(layers, 32, 3, 1),
            *_convolution(layers, 32, 3, 1),
            layers.GlobalAveragePooling2D(),
            layers.Dense(len(CLASSES), "softmax"),
        ],
        name="shapes",
    )


def _convolution(layers: Any, channels: int, kernel: int, stride: int) -> list[Any]:
    return [
        layers.Conv2D(channels, kernel, stride, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
    ]


def wrap(model: Any) -> Network:
    """The network of a model, for `gradcam_worker.gradcam`."""
    from gradcam_worker.gradcam import wrap_model  # imports TensorFlow

    return wrap_model(model, preprocessing="unit", labels=CLASSES)
