"""Explains with every method and saves the numbers: `KERAS_BACKEND=jax python every_method.py FILE.npz`.

So one backend can be held against another: the same weights, the same pixels, whatever computes them.
"""

import sys
from typing import Any

from gradcam_worker.gradcam.models.loading import load_network, wrap_model

# isort: split
# Only now: the line above keeps TensorFlow quiet while it is loaded for the first time.
import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.methods import cam, integrated
from gradcam_worker.gradcam.network import Method, Network

PHOTO, CLASSES = "astronaut", (812, 560)
SMALL = (20, 24)  # height, width
# One method for each kind of gradient that is computed (means, all values): what is compiled, which takes
# seconds for the deep network, is the same for the others but for their formula.
KINDS = ("gradcam", "gradcam++")
DEEP = [*map(Method, KINDS)]
FEW = [*DEEP, Method("eigencam"), Method(score="probability"), Method(integrated.NAME)]
ALL = [*map(Method, cam.METHODS), *(Method(name, flip=True) for name in KINDS)]
ALL += [Method(name, score="probability") for name in KINDS]
ALL += [Method(integrated.NAME), Method(integrated.NAME, against=(4,)), Method(against=(4, 5))]


def by_hand() -> Network:
    """A small network with a skip connection around its target layer; its weights depend on no backend."""
    x = inputs = keras.Input((*SMALL, 3))
    x = skipped = layers.Conv2D(8, 3, 2, activation="relu")(x)
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="target")(x)
    x = layers.Add()([layers.MaxPooling2D()(x), layers.AveragePooling2D(2)(skipped)])
    x = layers.Conv2D(12, 3, activation="tanh")(x)
    x = layers.Flatten()(x)
    return _wrapped(keras.Model(inputs, layers.Dense(6, "softmax", name="scores")(x)))


def flattened() -> Network:
    """A small network whose target layer is pooled, written in one line and read by a dense layer."""
    inputs = keras.Input((*SMALL, 3))
    x = layers.Conv2D(8, 3, 2, activation="tanh", name="target")(inputs)
    x = layers.Flatten()(layers.MaxPooling2D(3, 2, "same")(x))
    x = layers.Dense(12, "tanh")(x)
    return _wrapped(keras.Model(inputs, layers.Dense(6, "softmax", name="scores")(x)))


def _wrapped(model: Any) -> Network:
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=one.shape, scale=0.2) for one in model.get_weights()])
    return wrap_model(model, preprocessing="tf", target_layer="target")


def computed() -> dict[str, NDArray[Any]]:
    """Name -> logits (images, classes), or heatmaps (images, k, rows, columns)."""
    photo = fit(decode((DATA / "photos" / f"{PHOTO}.jpg").read_bytes()).pixels, (224, 224))
    # In no image is a class certain, also without preprocessing: its gradient would be rounding alone.
    noise = np.random.default_rng(14).integers(0, 256, (2, *SMALL, 3), np.uint8)
    cases = {
        "efficientnet_lite0": (
            load_network("efficientnet_lite0", forward="tensorflow"),
            photo[np.newaxis],
            [CLASSES],
            DEEP,
        ),
        "by_hand": (by_hand(), noise, [(-1, -2, 3)] * 2, ALL),
        "flattened": (flattened(), noise, [(-1, -2, 3)] * 2, FEW),
    }
    found: dict[str, NDArray[Any]] = {}
    for name, (network, pixels, wishes, methods) in cases.items():
        found[f"{name} logits"] = network.scores(pixels)
        for method in methods:
            seen = network.compute(pixels, np.array(wishes, np.int32), method)
            case = f"{name} {method.name}{' flip' * method.flip}{' probability' * (method.score != 'logit')}"
            case += f" against {method.against}" * bool(method.against)
            found[f"{case} ids"] = seen.class_ids
            found[f"{case} heatmaps"] = np.stack([cam.heatmaps(raw) for raw in seen.raw])
    return found


if __name__ == "__main__":
    np.savez(sys.argv[1], allow_pickle=False, **computed())
