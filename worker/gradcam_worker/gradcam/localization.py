"""Where the heat of a heatmap lies: inside an object, at the border of the image.

Every cell of a heatmap spreads its heat evenly over its rectangle on the image. Rectangles are cut exactly at
boxes, at the pixels of masks, and at the edges of the image, so that no image is enlarged for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.sizing import Placement, Size

Heatmap = NDArray[np.float32]
Floats = NDArray[np.float64]
Box = Sequence[float]  # left, top, right, bottom in pixels

BORDER_SHARE = 0.1  # of the shorter side: how wide the outer band of an image is
HOT_SHARE = 0.5  # of the peak: what counts as hot
HOT_CELLS = 112  # per side at least, into which a heatmap is divided to find what is hot
MAX_MASK_SIDE = 1024  # in pixels; larger masks become shares of blocks of pixels
FULL = 255  # of a rectangle that belongs to a region altogether
ROUNDING = 1 - 1e-9  # factor of the level: values at it must not be excluded by rounding


@dataclass(frozen=True)
class Localization:
    """Where the heat of one class lies.

    Attributes:
        heat_at_border: Share of the heat in the outer band of the image, of a tenth of its shorter side.
        heat_inside: Share of the heat inside the object: the energy-based pointing game of Wang et al. 2020
            (arXiv:1910.01279, section 4.3). Departure: cells are cut exactly at the object's edge, where the
            source enlarges the heatmap.
        inside_area: Share of the object in the part of the image on which the heatmap lies: what
            `heat_inside` would be if the heat were everywhere the same.
        pointing_hit: Whether the peak lies inside the object: the pointing game of Zhang et al. 2016
            (arXiv:1608.00507). Departure: there is no margin around the object.
        iou: Of the region where the enlarged heatmap has at least half of its peak, and the object:
            intersection over union. All such regions count, not only the one around the peak; their edges are
            those of sixteenths of the cells of a grid of 7 x 7, of eighths in one of 14 x 14.

    All are None where the heatmap is zero on the image, and all but the first where no object is known.
    """

    heat_at_border: float | None = None
    heat_inside: float | None = None
    inside_area: float | None = None
    pointing_hit: bool | None = None
    iou: float | None = None


NOWHERE = Localization()


@dataclass(frozen=True, eq=False)
class Region:
    """A part of an image, made of rectangles between lines.

    Attributes:
        ys: The horizontal lines, in pixels from the top, from 0 to the height of the image.
        xs: The vertical lines, in pixels from the left.
        inside: (len(ys) - 1, len(xs) - 1), uint8: how much of each rectangle belongs to it, from 0 to `FULL`.
    """

    ys: Floats
    xs: Floats
    inside: NDArray[np.uint8]

    def contains(self, x: float, y: float) -> bool:
        """Whether a point of the image lies in it."""
        row = min(int(np.searchsorted(self.ys, y, "right")), len(self.ys) - 1) - 1
        column = min(int(np.searchsorted(self.xs, x, "right")), len(self.xs) - 1) - 1
        return bool(self.inside[row, column] > FULL // 2)

    def coverage(self, ys: Floats, xs: Floats) -> Floats:
        """Its area in each rectangle of a grid of lines (len(ys) - 1, len(xs) - 1), in pixels of the image.

        What the grid has outside the image is 0.
        """
        rows = _sums_between(self.inside, self.ys, ys)
        return np.asarray(_sums_between(rows.T, self.xs, xs).T / FULL, np.float64)


def region_of_boxes(boxes: Sequence[Box], size: Size) -> Region:
    """The union of boxes.

    Args:
        boxes: Left, top, right and bottom of each, in pixels.
        size: (height, width) of the image, at whose edges they are cut.

    Returns:
        The region.
    """
    height, width = size
    limits = np.array([width, height, width, height], np.float64)
    edges = np.clip(np.array(boxes, np.float64).reshape(-1, 4), 0, limits)
    xs, ys = np.unique([0, width, *edges[:, ::2].flat]), np.unique([0, height, *edges[:, 1::2].flat])
    inside = np.zeros((len(ys) - 1, len(xs) - 1), np.uint8)
    lefts, rights = (np.searchsorted(xs, edges[:, column]) for column in (0, 2))
    tops, bottoms = (np.searchsorted(ys, edges[:, column]) for column in (1, 3))
    for left, top, right, bottom in zip(lefts, tops, rights, bottoms, strict=True):
        inside[top:bottom, left:right] = FULL
    return Region(ys.astype(np.float64), xs.astype(np.float64), inside)


def shrink_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Shrink a mask so that it can be kept in memory.

    Args:
        mask: (height, width), which pixels belong to the object.

    Returns:
        (rows, columns), uint8, from 0 to `FULL`: shares of blocks of pixels, at most `MAX_MASK_SIDE` a side.
    """
    step = -(-max(mask.shape) // MAX_MASK_SIDE)
    if step == 1:
        return mask.view(np.uint8) * np.uint8(FULL)
    starts = [np.arange(0, side, step) for side in mask.shape]
    sums = np.add.reduceat(np.add.reduceat(mask, starts[0], 0, np.uint32), starts[1], 1)
    sizes = [
        np.diff(start, append=side).astype(np.float64) for start, side in zip(starts, mask.shape, strict=True)
    ]
    return np.asarray(np.rint(sums / np.outer(*sizes) * FULL), np.uint8)


def region_of_mask(mask: NDArray[np.uint8], mask_size: Size, size: Size) -> Region:
    """The pixels of a mask.

    Args:
        mask: From `shrink_mask`. It covers the image, whatever its size.
        mask_size: (height, width) before it was shrunk.
        size: (height, width) of the image.

    Returns:
        The region.
    """
    step = -(-max(mask_size) // MAX_MASK_SIDE)
    ys, xs = (
        np.minimum(np.arange(cells + 1) * step, side) * (pixels / side)
        for cells, side, pixels in zip(mask.shape, mask_size, size, strict=True)
    )
    return Region(ys, xs, mask)


def localize(
    heatmaps: Heatmap,
    size: Size,
    placement: Placement | None,
    peaks: Sequence[tuple[int, int] | None],
    regions: Sequence[Region | None],
) -> list[Localization]:
    """Find where the heat of each class lies.

    Args:
        heatmaps: (classes, rows, columns), from 0 up.
        size: (height, width) of the image.
        placement: Where the heatmaps lie on the image; None: on all of it.
        peaks: The pixel (x, y) of each peak; None: the heatmap is zero on the image.
        regions: The object of each class; None: it is not known.

    Returns:
        What was found, for each class.
    """
    rows, columns = heatmaps.shape[1:]
    ys, xs = _cell_lines(size, placement, (rows, columns))
    on_image = np.outer(_lengths(ys, 0, size[0]), _lengths(xs, 0, size[1]))
    band = BORDER_SHARE * min(size)
    inner = np.outer(_lengths(ys, band, size[0] - band), _lengths(xs, band, size[1] - band))
    parts: _Parts | None = None
    kept: dict[int, tuple[Floats, float]] = {}  # coverage and area of regions, which classes may share
    found = []
    for heatmap, peak, region in zip(heatmaps.astype(np.float64), peaks, regions, strict=True):
        heat = float((heatmap * on_image).sum())
        if peak is None or not heat > 0:
            found.append(NOWHERE)
            continue
        at_border = 1 - float((heatmap * inner).sum()) / heat
        if region is None:
            found.append(Localization(min(max(at_border, 0.0), 1.0)))
            continue
        parts = parts or _Parts(size, placement, (rows, columns))
        if id(region) not in kept:
            whole = region.coverage(np.array([0.0, size[0]]), np.array([0.0, size[1]]))
            kept[id(region)] = region.coverage(parts.ys, parts.xs), float(whole.sum())
        covered, area = kept[id(region)]
        of_cells = covered.reshape(rows, parts.step, columns, parts.step).sum(axis=(1, 3))
        found.append(
            Localization(
                min(max(at_border, 0.0), 1.0),
                min(float((heatmap * of_cells).sum()) / heat, 1.0),
                min(float(covered.sum() / on_image.sum()), 1.0),
                region.contains(peak[0] + 0.5, peak[1] + 0.5),
                parts.iou(heatmap, covered, area),
            )
        )
    return found


class _Parts:
    """The parts of a heatmap's cells, which are so many that they follow the enlarged heatmap."""

    def __init__(self, size: Size, placement: Placement | None, cells: Size) -> None:
        self.step = max(math.ceil(HOT_CELLS / max(cells)), 1)  # parts of a cell, per side
        count = cells[0] * self.step, cells[1] * self.step
        self.ys, self.xs = _cell_lines(size, placement, count)
        self._down, self._across = _bilinear(cells[0], count[0]), _bilinear(cells[1], count[1])
        self._area = np.outer(_lengths(self.ys, 0, size[0]), _lengths(self.xs, 0, size[1]))

    def iou(self, heatmap: Floats, covered: Floats, area: float) -> float:
        """Intersection over union of the hot parts of a heatmap and a region.

        Args:
            heatmap: (rows, columns).
            covered: The region's coverage of the parts.
            area: Of the region, in pixels of the image.
        """
        values = self._down @ heatmap @ self._across.T
        hot = values >= HOT_SHARE * float(values[self._area > 0].max()) * ROUNDING
        shared = float(covered[hot].sum())
        return shared / (float(self._area[hot].sum()) + area - shared)


def _cell_lines(size: Size, placement: Placement | None, cells: Size) -> tuple[Floats, Floats]:
    """The lines between cells, in pixels of the image: horizontal ones, vertical ones."""
    height, width = size
    left, top, right, bottom = placement.box(size) if placement else (0.0, 0.0, width, height)
    return np.linspace(top, bottom, cells[0] + 1), np.linspace(left, right, cells[1] + 1)


def _lengths(lines: Floats, begin: float, end: float) -> Floats:
    """How much of each strip between lines lies from `begin` to `end`."""
    return np.asarray(np.diff(np.clip(lines, begin, max(begin, end))), np.float64)


def _bilinear(cells: int, parts: int) -> Floats:
    """Weights (parts, cells) of the values at the centres of parts of a row of cells."""
    centers = np.clip((np.arange(parts) + 0.5) * cells / parts - 0.5, 0, cells - 1)
    distance = np.abs(centers[:, np.newaxis] - np.arange(cells))
    return np.asarray(np.maximum(1 - distance, 0), np.float64)


def _sums_between(values: NDArray[np.uint8] | Floats, lines: Floats, edges: Floats) -> Floats:
    """Integrals (len(edges) - 1, ...) of values (len(lines) - 1, ...), which are constant between lines."""
    lengths = np.diff(lines)
    edges = np.clip(edges, lines[0], lines[-1])
    index = np.clip(np.searchsorted(lines, edges, "right") - 1, 0, len(lengths) - 1)
    starts, place = np.unique(np.concatenate([[0], index]), return_inverse=True)
    if np.ptp(lengths) < 1e-9 * lengths[0]:  # the pixels of a mask: not copied as larger numbers
        strips = np.add.reduceat(values, starts, axis=0, dtype=np.float64) * lengths[0]
    else:
        strips = np.add.reduceat(values * lengths[:, np.newaxis], starts, axis=0)
    before = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(strips, axis=0)[:-1]])
    until = before[place[1:]] + (edges - lines[index])[:, np.newaxis] * values[index]
    return np.asarray(np.diff(until, axis=0), np.float64)
