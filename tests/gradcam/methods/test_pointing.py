"""A pointing game: two shapes in each picture, a small network trained to name them, asked for one of them.

The peak of the heatmap has to lie in the box of the shape that was asked for (Zhang et al., arXiv
1608.00507). Whoever points blindly hits as often as the box is large: about .14 of the picture. Whoever
points at any shape, whatever was asked for, hits half of the time.

`pytest --log-cli-level=info` prints the figures of docs/explanation/agreement.md. The networks' weights lie
beside this file, so that it need not train them; run as a program, it trains them anew.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gradcam_worker.gradcam.imaging.resize import enlarge
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method, Network

pytestmark = pytest.mark.tensorflow
log = logging.getLogger(__name__)

Play = Callable[[str], dict[str, float]]
REQUIRED = {"pooling": 0.95, "flattening": 0.80}
BY_CLASS = sorted(set(cam.METHODS) - {"counterfactual", "eigencam", "notebook"})
PREPARED = sorted(set(cam.METHODS) - {"notebook"})  # its image is not preprocessed
both_heads = pytest.mark.parametrize("head", REQUIRED)

SIDE = 48  # pixels of a picture
SIZES = (16, 22)  # pixels of a shape's box, the second excluded
BACKGROUND, COLORS = (0, 60), (110, 256)  # levels of a channel: noise below, shapes above
SHOWN = 2  # shapes in a picture
HEADS = ("pooling", "flattening")
# Pictures and epochs that each head needs. Behind a flattening one every position learns for itself.
LESSONS = {"pooling": (3000, 5), "flattening": (4000, 8)}
BATCH, LEARNING_RATE = 64, 3e-3
PLAYED = 250  # pictures
TRAINED = Path(__file__).with_name("pointing_game.npz")  # weights of both networks


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
    import keras

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
    import keras
    from keras import layers

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
    from gradcam_worker.gradcam.models.loading import wrap_model

    return wrap_model(model, preprocessing="tf", labels=NAMES)


def hits(raw: NDArray[np.float32], scene: Scene) -> float:
    """How often the peak of the heatmap lies in the box of the shape that was asked for, in [0, 1]."""
    answers = [
        _hit(heatmap, box)
        for maps, boxes in zip(raw, scene.boxes, strict=True)
        for heatmap, box in zip(cam.heatmaps(maps), boxes, strict=True)
    ]
    return float(np.mean(answers))


def _hit(heatmap: NDArray[np.float32], box: Iterable[int]) -> bool:
    row, column = divmod(int(enlarge(heatmap, (SIDE, SIDE)).argmax()), SIDE)
    left, top, right, bottom = box
    return bool(heatmap.any() and left <= column < right and top <= row < bottom)


def saved(head: str) -> Any:
    """The network of such a head that was trained before."""
    model = _untrained(head)
    with np.load(TRAINED) as weights:
        model.set_weights(
            [weights[f"{head} {number}"].astype(np.float32) for number in range(len(model.weights))]
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


@pytest.fixture(scope="module")
def play(compute_together: Callable[..., dict[str, NDArray[np.float32]]]) -> Play:
    """Hits in [0, 1] by method, and `chance`; `named`: how often both shapes are in the top two."""

    def play(head: str) -> dict[str, float]:
        network = explainable(saved(head))
        scene = draw(PLAYED, np.random.default_rng(1))
        best = np.sort(np.argsort(-network.scores(scene.pixels), axis=1)[:, :SHOWN])
        named = float((best == np.sort(scene.classes)).all(axis=1).mean())
        maps = compute_together(network, scene.pixels, scene.classes, PREPARED)
        maps["notebook"] = network.compute(scene.pixels, scene.classes, Method("notebook")).raw
        figures = {method: hits(raw, scene) for method, raw in maps.items()}
        figures |= {"chance": scene.chance, "named": named}
        log.info("%s %s", head, figures)
        return figures

    return cache(play)


@both_heads
@pytest.mark.parametrize("name", BY_CLASS)
def test_the_peak_lies_on_the_shape_that_was_asked_for(head: str, name: str, play: Play) -> None:
    figures = play(head)
    assert figures["named"] >= 0.95, figures
    assert 0.12 <= figures["chance"] <= 0.16, figures
    assert figures[name] >= REQUIRED[head], figures


@both_heads
def test_what_speaks_against_a_shape_is_elsewhere(head: str, play: Play) -> None:
    figures = play(head)
    assert figures["counterfactual"] < 0.1, figures


@both_heads
def test_without_asking_for_a_class_one_finds_no_more_than_half(head: str, play: Play) -> None:
    """What makes the game one of classes: EigenCAM finds a shape, but which one it cannot know."""
    figures = play(head)
    assert 0.3 <= figures["eigencam"] <= 0.6, figures


def test_shapes_lie_in_their_boxes_and_do_not_overlap() -> None:
    scene = draw(50, np.random.default_rng(3))
    for pixels, classes, boxes in zip(scene.pixels, scene.classes, scene.boxes, strict=True):
        assert len(set(classes)) == 2
        covered = np.zeros((SIDE, SIDE), int)
        for left, top, right, bottom in boxes:
            covered[top:bottom, left:right] += 1
            assert (pixels[top:bottom, left:right] >= COLORS[0]).any()
        assert covered.max() == 1
        assert (pixels[covered == 0] < BACKGROUND[1]).all()


if __name__ == "__main__":
    save()
