"""A pointing game: two shapes in each picture, a small network trained to name them, asked for one of them.

The peak of the heatmap has to lie in the box of the shape that was asked for (Zhang et al., arXiv
1608.00507). Whoever points blindly hits as often as the box is large: about .14 of the picture. Whoever
points at any shape, whatever was asked for, hits half of the time.

The networks' weights lie beside the test, so that it need not train them. To train them anew:
`PYTHONPATH=scripts .venv/bin/python -P -m devtools.agreement.pointing_game`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from devtools import ROOT
from gradcam_worker.gradcam.models.loading import wrap_model

# isort: split
# Only now: the line above keeps TensorFlow quiet while it is loaded for the first time.
import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

from gradcam_worker.gradcam.imaging.resize import enlarge
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method, Network

SIDE = 48  # pixels of a picture
SIZES = (16, 22)  # pixels of a shape's box, the second excluded
BACKGROUND, COLORS = (0, 60), (110, 256)  # levels of a channel: noise below, shapes above
SHOWN = 2  # shapes in a picture
HEADS = ("pooling", "flattening")
# Pictures and epochs that each head needs. Behind a flattening one every position learns for itself.
LESSONS = {"pooling": (3000, 5), "flattening": (4000, 8)}
BATCH, LEARNING_RATE = 64, 3e-3
PLAYED = 250  # pictures
TRAINED = ROOT / "tests" / "gradcam" / "methods" / "pointing_game.npz"  # weights of both networks


@dataclass(frozen=True)
class Scene:
    """n pictures of shapes."""

    pixels: NDArray[np.uint8]  # (n, SIDE, SIDE, 3)
    classes: NDArray[np.int32]  # (n, SHOWN), which shapes are in them
    boxes: NDArray[np.int64]  # (n, SHOWN, 4): left, top, right, bottom; right and bottom excluded

    @property
    def chance(self) -> float:
        """How often one would hit blindly."""
        left, top, right, bottom = np.moveaxis(self.boxes, -1, 0)
        return float(((right - left) * (bottom - top)).mean() / SIDE**2)


def outlines(size: int) -> dict[str, NDArray[np.bool_]]:
    """Each shape by its name, drawn in a box (size, size)."""
    y, x = np.mgrid[:size, :size]
    middle, arm = (size - 1) / 2, size / 6
    distance = np.hypot(y - middle, x - middle)
    return {
        "square": np.ones((size, size), bool),
        "disc": distance <= size / 2,
        "ring": (distance <= size / 2) & (distance >= size / 4),
        "triangle": np.abs(x - middle) <= (y + 1) / 2,
        "cross": np.minimum(np.abs(x - middle), np.abs(y - middle)) <= arm,
        "saltire": np.minimum(np.abs(x - y), np.abs(x + y - 2 * middle)) <= 1.2 * arm,
        "frame": np.maximum(np.abs(x - middle), np.abs(y - middle)) >= size / 4,
    }


NAMES = tuple(outlines(SIZES[0]))


def draw(count: int, rng: np.random.Generator) -> Scene:
    """Pictures of two different shapes each, of any colour and size, that do not overlap."""
    pixels = rng.integers(*BACKGROUND, (count, SIDE, SIDE, 3)).astype(np.uint8)
    classes = np.stack([rng.permutation(len(NAMES))[:SHOWN] for _ in range(count)]).astype(np.int32)
    boxes = np.stack([_places(rng) for _ in range(count)])
    for index in range(count):
        for class_id, (left, top, right, bottom) in zip(classes[index], boxes[index], strict=True):
            shape = outlines(right - left)[NAMES[class_id]]
            pixels[index, top:bottom, left:right][shape] = rng.integers(*COLORS, 3)
    return Scene(pixels, classes, boxes)


def _places(rng: np.random.Generator) -> NDArray[np.int64]:
    """Boxes (SHOWN, 4) with room between them."""
    while True:
        sizes = rng.integers(*SIZES, SHOWN)
        corners = np.stack([rng.integers(0, SIDE - size + 1, 2) for size in sizes])
        apart = np.abs(np.diff(corners + sizes[:, np.newaxis] / 2, axis=0)) >= sizes.mean()
        if apart.any():
            return np.hstack([corners, corners + sizes[:, np.newaxis]])


def trained(head: str, seed: int = 0) -> Any:
    """A network of four convolutions and such a head, trained to say which shapes are there. < 1 minute."""
    keras.utils.set_random_seed(seed)
    count, epochs = LESSONS[head]
    scene = draw(count, np.random.default_rng(seed))
    present = np.zeros((count, len(NAMES)), np.float32)
    np.put_along_axis(present, scene.classes, 1, axis=1)
    model = _untrained(head)
    decay = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, epochs * count // BATCH)
    model.compile(keras.optimizers.Adam(decay), "binary_crossentropy")
    model.fit(scene.pixels / np.float32(127.5) - 1, present, BATCH, epochs, verbose=0)
    return model


def _untrained(head: str) -> Any:
    x = inputs = keras.Input((SIDE, SIDE, 3))
    for channels, halved in ((16, True), (32, True), (64, False), (64, False)):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(
            layers.BatchNormalization(momentum=0.9)(x)
        )  # slower means lag behind so short a training
        x = layers.MaxPooling2D()(x) if halved else x
    if head == "pooling":
        x = layers.GlobalAveragePooling2D()(x)
    else:
        x = layers.Dropout(0.5)(layers.Flatten()(layers.MaxPooling2D()(x)))
    return keras.Model(inputs, layers.Dense(len(NAMES), "sigmoid")(x), name=head)


def explainable(model: Any) -> Network:
    """The trained model as a network."""
    return wrap_model(model, preprocessing="tf", labels=NAMES)


def hits(network: Network, scene: Scene, method: str) -> float:
    """How often the peak of the heatmap lies in the box of the shape that was asked for, in [0, 1]."""
    raw = network.compute(scene.pixels, scene.classes, Method(method)).raw
    found = [
        _hit(heatmap, box)
        for maps, boxes in zip(raw, scene.boxes, strict=True)
        for heatmap, box in zip(cam.heatmaps(maps), boxes, strict=True)
    ]
    return float(np.mean(found))


def _hit(heatmap: NDArray[np.float32], box: Iterable[int]) -> bool:
    row, column = divmod(int(enlarge(heatmap, (SIDE, SIDE)).argmax()), SIDE)
    left, top, right, bottom = box
    return bool(heatmap.any() and left <= column < right and top <= row < bottom)


def saved(head: str) -> Any:
    """The network of such a head that was trained before."""
    model = _untrained(head)
    with np.load(TRAINED) as found:
        model.set_weights(
            [found[f"{head} {number}"].astype(np.float32) for number in range(len(model.weights))]
        )
    return model


def save() -> None:
    """Train both networks and keep their weights, in half precision."""
    weights = {
        f"{head} {number}": weight.astype(np.float16)
        for head in HEADS
        for number, weight in enumerate(trained(head).get_weights())
    }
    np.savez_compressed(TRAINED, allow_pickle=False, **weights)


def play(
    head: str, methods: Iterable[str] = tuple(cam.METHODS), build: Callable[[str], Any] = trained
) -> dict[str, float]:
    """Play on new pictures: method -> hits, and `chance`; `named`: both shapes in the top two."""
    network = explainable(build(head))
    scene = draw(PLAYED, np.random.default_rng(1))
    best = np.sort(np.argsort(-network.scores(scene.pixels), axis=1)[:, :SHOWN])
    named = float((best == np.sort(scene.classes)).all(axis=1).mean())
    found = {method: hits(network, scene, method) for method in methods}
    return {**found, "chance": scene.chance, "named": named}


if __name__ == "__main__":
    save()
