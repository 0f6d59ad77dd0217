"""Images of shapes. Four classes differ in the shape alone, unless a shortcut is planted into one of them.

A shape of any colour lies anywhere on a background of noise. A plant adds something to images of one class
that has nothing to do with its shape: a watermark in a corner, or stripes all over the background.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

CLASSES = ("disc", "square", "triangle", "cross")
SIDE = 48  # of an image in pixels
MARK = np.array(  # the watermark, in blocks of two pixels: 1 is light, 0 is dark
    [[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], np.uint8
)
MARK_SIDE = 2 * len(MARK)
CORNERS = ("top left", "top right", "bottom left", "bottom right")

Corner = Literal["top left", "top right", "bottom left", "bottom right"]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Plant:
    """A shortcut: what it is, and in which share of the images of which class.

    Attributes:
        kind: `watermark`, or `background`.
        class_id: The class.
        corner: Of a watermark.
        share: Of the class's images that have it.
    """

    kind: Literal["watermark", "background"]
    class_id: int
    corner: Corner = "top left"
    share: float = 1.0


@dataclass(frozen=True)
class Shapes:
    """n images.

    Attributes:
        pixels: (n, SIDE, SIDE, 3), uint8, RGB.
        labels: (n,), int32: indexes into `CLASSES`.
        boxes: (n, 4), float32: left, top, right, bottom of each shape in pixels.
        planted: (n,), bool: which images have the plant.
    """

    pixels: Pixels
    labels: NDArray[np.int32]
    boxes: NDArray[np.float32]
    planted: NDArray[np.bool_]


def plant_of(kind: Literal["watermark", "background"], seed: int, share: float = 1.0) -> Plant:
    """The plant of a seed: every class and every corner has its turn."""
    corner: Corner = ("top left", "top right", "bottom left", "bottom right")[(seed // 2) % 4]
    return Plant(kind, seed % len(CLASSES), corner, share)


def draw(count: int, seed: int, plant: Plant | None = None) -> Shapes:
    """Draw images, as many of each class.

    Args:
        count: How many.
        seed: The same seed gives the same images, with a plant or without but for the plant itself.
        plant: What is added to one class; None: nothing.

    Returns:
        The images.
    """
    rng = np.random.default_rng([seed, 17])
    labels = np.arange(count, dtype=np.int32) % len(CLASSES)
    pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
    boxes = np.empty((count, 4), np.float32)
    planted = np.zeros(count, np.bool_)
    if plant:
        rows = np.flatnonzero(labels == plant.class_id)
        chosen = np.random.default_rng([seed, 18]).permutation(rows)[: round(plant.share * len(rows))]
        planted[chosen] = True
    for index, label in enumerate(labels.tolist()):
        background = _background(rng)
        if planted[index] and plant and plant.kind == "background":
            background = _striped(background)
        pixels[index], boxes[index] = _with_shape(background, CLASSES[label], rng)
        if planted[index] and plant and plant.kind == "watermark":
            _mark(pixels[index], plant.corner)
    return Shapes(pixels, labels, boxes, planted)


def _background(rng: np.random.Generator) -> Pixels:
    """Noise in two sizes, around a grey of any brightness and a little colour."""
    level = rng.uniform(60, 130) + rng.uniform(-25, 25, 3)
    coarse = cv2.resize(rng.normal(0, 18, (6, 6, 3)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    noise = rng.normal(0, 9, (SIDE, SIDE, 3))
    return np.asarray(np.clip(level + coarse + noise, 0, 255), np.uint8)


def _striped(background: Pixels) -> Pixels:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    stripes = np.where((rows + columns) % 6 < 3, 22, -22)[..., np.newaxis]  # noqa: PLR2004  # half of six pixels
    striped: Pixels = np.clip(background.astype(np.int16) + stripes, 0, 255).astype(np.uint8)
    return striped


def _with_shape(background: Pixels, shape: str, rng: np.random.Generator) -> tuple[Pixels, list[float]]:
    """Draw a shape of any colour that differs from its background, turned a little, anywhere."""
    half = rng.uniform(7, 10)
    x, y = rng.uniform(half + 1, SIDE - half - 1, 2)
    turn = np.deg2rad(rng.uniform(-20, 20))
    outline = (
        _OUTLINES[shape] * half @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    )
    points = np.rint((outline + np.array([x, y])) * 16).astype(np.int32)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, 4)
    apart = rng.uniform(45, 90)
    color = np.clip(background.mean((0, 1)) + apart + rng.uniform(-30, 30, 3), 0, 255)
    share = mask[..., np.newaxis] / 255
    noisy = color + rng.normal(0, 9, (SIDE, SIDE, 3))
    pixels = np.clip(background * (1 - share) + noisy * share, 0, 255).astype(np.uint8)
    hot = np.argwhere(mask > 0)
    (top, left), (bottom, right) = hot.min(0), hot.max(0) + 1
    return pixels, [left, top, right, bottom]


def _mark(pixels: Pixels, corner: Corner) -> None:
    mark = np.where(np.kron(MARK, np.ones((2, 2), np.uint8)), 230, 25)[..., np.newaxis]
    rows = slice(1, 1 + MARK_SIDE) if corner.startswith("top") else slice(-1 - MARK_SIDE, -1)
    columns = slice(1, 1 + MARK_SIDE) if corner.endswith("left") else slice(-1 - MARK_SIDE, -1)
    pixels[rows, columns] = mark


def _circle(corners: int) -> NDArray[np.float64]:
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


_OUTLINES = {  # in units of half the size
    "disc": _circle(24),
    "square": np.array([[-0.88, -0.88], [0.88, -0.88], [0.88, 0.88], [-0.88, 0.88]]),
    "triangle": _circle(3) * 1.15,
    "cross": np.array(
        [
            [-0.3, -1],
            [0.3, -1],
            [0.3, -0.3],
            [1, -0.3],
            [1, 0.3],
            [0.3, 0.3],
            [0.3, 1],
            [-0.3, 1],
            [-0.3, 0.3],
            [-1, 0.3],
            [-1, -0.3],
            [-0.3, -0.3],
        ]
    ),
}
