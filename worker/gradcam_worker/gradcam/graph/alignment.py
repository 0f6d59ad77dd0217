"""Whether a layer's grid lies on the image as it is drawn: measured, by where spots of the image act.

A network may crop, pad, shift, turn or flip its own input in more ways than can be listed. So three pictures
that differ in one spot each go through it: at two corners, and inside, off the diagonal. Where the layer sees
the spot must be where the spot is, as far as the layer's cells and its convolutions allow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PARTS = 8  # of a side: a spot is one of them, or one cell of the layer where that is larger
GREY, CONTRAST = 128, 20  # of the picture around the spots: mean and standard deviation
DARK = 1e-9  # of the strongest spot's effect: less is none
MARGIN = 0.2  # of a side, and half a cell: a deep layer's view of an edge is drawn inwards by its padding
FINE_MARGIN = 0.05  # of a side, and a cell: of the first layer that has learned something
TINY = 1e-30  # instead of a division by nothing
LOCAL = 0.6  # of what a cell sees of three spots, a third of which is each one's where all act alike
PLACES = ((0.0, 0.0), (1.0, 1.0), (1 / 3, 2 / 3))  # of the spots, from first to last row and column

Changes = NDArray[np.float64]  # (spots, rows, columns): how much each spot changes each cell


@dataclass(frozen=True)
class Spot:
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Trial:
    """Pictures that differ in one spot each."""

    pixels: NDArray[np.uint8]  # (spots, height, width, channels)
    spots: tuple[Spot, ...]


def trial(size: tuple[int, int, int], *, grid: tuple[int, int] = (PARTS, PARTS), seed: int = 0) -> Trial:
    """Pictures of (height, width, channels) for layers of so many rows and columns, or more.

    What is left over at the end, where strides do not divide a side, is less than a cell: so large is every
    spot but that at the beginning.
    """
    random = np.random.default_rng(seed)
    around = np.clip(random.normal(GREY, CONTRAST, size), 0, 255).astype(np.uint8)
    pixels, spots = np.stack([around] * len(PLACES)), []
    for picture, place in zip(pixels, PLACES, strict=True):
        parts = [PARTS if place == PLACES[0] else min(PARTS, cells) for cells in grid]
        height, width = (math.ceil(side / count) for side, count in zip(size[:2], parts, strict=True))
        top, left = round((size[0] - height) * place[0]), round((size[1] - width) * place[1])
        spots.append(Spot(top, left, height, width))
        picture[top : top + height, left : left + width] = 255 * random.integers(
            0, 2, (height, width, size[2])
        )
    return Trial(pixels, tuple(spots))


def changes(activations: NDArray[np.float32]) -> Changes:
    """How much each spot changes each cell, of activations (spots, rows, columns, channels).

    What two pictures have in common is not the third one's spot.
    """
    values = activations / max(float(np.abs(activations).max()), TINY)
    between = {
        pair: ((values[pair[0]] - values[pair[1]]) ** 2).sum(axis=-1) for pair in ((0, 1), (0, 2), (1, 2))
    }
    of_each = [[one for pair, one in between.items() if index in pair] for index in range(len(between))]
    return np.stack([np.minimum(*pair) for pair in of_each]).astype(np.float64)


def misplaced(seen: Changes, about: Trial, *, fine: bool = False) -> str | None:
    """What speaks against the layer's grid lying on the image, in words; None where nothing does.

    `fine`: of a layer whose cells see little more than what is below them.
    """
    strongest = seen.max(initial=0)
    if not strongest > 0 or not np.isfinite(strongest):
        return None  # a layer that nothing reaches
    for change, spot in zip(seen, about.spots, strict=True):
        told = _told(change, strongest, seen.sum(axis=0), spot, about.pixels.shape[1:3], fine=fine)
        if told:
            return told
    return None


def _told(
    change: NDArray[np.float64],
    strongest: float,
    by_all: NDArray[np.float64],
    spot: Spot,
    size: tuple[int, ...],
    *,
    fine: bool,
) -> str | None:
    centre = np.array([spot.top + spot.height / 2, spot.left + spot.width / 2]) / size
    where = f"{centre[0]:.0%} from the top and {centre[1]:.0%} from the left of the input"
    measured = [axis for axis in (0, 1) if change.shape[axis] > 1]
    if change.max() <= DARK * strongest:
        return f"what is {where} does not reach it" if measured else None
    share = change / np.maximum(by_all, TINY)  # of what a cell sees of any spot
    own = change * share
    if share[own >= own.max() / 2].max() < LOCAL:
        return None  # it acts everywhere alike, as behind an attention
    cells, found = np.array(change.shape), _centre(own)
    margin = FINE_MARGIN + 1 / cells if fine else MARGIN + 0.5 / cells
    extent = np.array([spot.height, spot.width]) / size
    acts = f"what is {where} acts {found[0]:.0%} from its top and {found[1]:.0%} from its left"
    if any(abs(found[axis] - centre[axis]) > margin[axis] for axis in measured):
        return acts
    narrow = fine and any(_extent(own, axis) < extent[axis] / 2 - 1 / cells[axis] for axis in measured)
    return f"{acts}, on too small a part" if narrow else None


def _centre(change: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the cells where most is seen of a spot, as shares of the sides."""
    weights = np.where(change >= change.max() / 2, change, 0)
    places = np.indices(change.shape) + 0.5
    return np.asarray((places * weights).sum(axis=(1, 2)) / weights.sum() / change.shape)


def _extent(change: NDArray[np.float64], axis: int) -> float:
    """Of a spot, as a share of a side."""
    profile = change.sum(axis=1 - axis)
    return float((profile >= profile.max() / 4).mean())


def together(seen: Sequence[Changes]) -> Changes:
    """The changes of several trials with the same spots, each as much as the others."""
    return np.asarray(sum(one / max(one.max(), TINY) for one in seen), np.float64)
