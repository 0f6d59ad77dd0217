"""The hot region of a heatmap: its box, its contour, and drawing both on an image."""

import math
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.imaging.resize import (
    Heatmap,
    Pixels,
    cell_positions,
    enlarge,
    enlarge_inside,
    shrink_to_pixels,
)
from gradcam_worker.gradcam.sizing import Placement, Span, spans

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom excluded

ROUNDING = 1 - 1e-9  # factor of the peak: values at the threshold must not be excluded by rounding
FILLED = 2  # what a flood fill writes over 1
LIGHT, DARK = (255, 255, 255), (0, 0, 0)  # a light line with a dark edge is visible on any image
LINE_SHARE = 250  # a line is 1 pixel wide for each 250 pixels of a square image's side
SUBPIXELS = 4  # bits: OpenCV takes points in sixteenths of a pixel
MAX_KEPT_WEIGHTS = 2**17  # of a side's pixels and cells: 1 MB, for each of 16 sides
MAX_DEVIATION = 0.1  # of the drawn line from the contour, in pixels: the joints of short segments are visible


def hot_box(
    heatmap: Heatmap, size: tuple[int, int], threshold: float, placement: Placement | None = None
) -> Box | None:
    """Find the box around the region of a heatmap that contains its peak.

    The region consists of the pixels of the enlarged heatmap that reach the threshold and are connected with
    the peak, also across corners. Of several peaks the first in reading order counts. Zhou et al. 2016
    (arXiv:1512.04150, section 3.2) take the largest region instead.

    Args:
        heatmap: (rows, columns), float32.
        size: (height, width) of the image in pixels.
        threshold: A share of the peak, in (0, 1).
        placement: Where the heatmap lies on the image; None: on all of it.

    Returns:
        The box in pixels of the image; None where the heatmap is zero everywhere on it.
    """
    rows, columns = spans(placement, size)
    cells = shrink_to_pixels(heatmap, rows, columns).astype(np.float64)
    (down, ys), (across, xs) = _bilinear(cells.shape[0], rows), _bilinear(cells.shape[1], columns)
    values = down[ys] @ cells @ across[xs].T
    peak = float(values.max()) * ROUNDING
    if not peak:
        return None
    level = threshold * peak
    hot = values >= level
    connections = _connections(hot)
    for row, column in zip(*_saddles(hot), strict=True):
        weights = down[ys[row] : ys[row + 1] + 1], across[xs[column] : xs[column + 1] + 1]
        patch = weights[0] @ cells @ weights[1].T >= level
        connections[2 * row + 1, 2 * column + 1] = _is_connected(
            patch if hot[row, column] else patch[:, ::-1]
        )
    row, column = divmod(int((values >= peak).argmax()), len(xs))
    *_, (left, top, width, height) = cv2.floodFill(connections, None, (2 * column, 2 * row), FILLED, flags=8)
    inside = connections[::2, ::2] == FILLED
    left, right = _extent(values, inside, xs, level, (left // 2, (left + width) // 2))
    top, bottom = _extent(values.T, inside.T, ys, level, (top // 2, (top + height) // 2))
    return left + columns.first, top + rows.first, right + columns.first, bottom + rows.first


def _bilinear(cells: int, span: Span) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """The weights of the cells along a span of an image (pixels, cells), and the corners of the patches.

    An enlarged heatmap is bilinear in the patch between the centres of four cells. So it is monotonic along
    each row and column of the patch, and whatever reaches a level there is connected with a corner of the
    patch that reaches it. The first and last pixels of the patches, 30 x 30 for 14 x 14 cells, are therefore
    enough to find a region, however large the image.
    """
    is_small = cells * (span.last - span.first) <= MAX_KEPT_WEIGHTS
    return _kept_weights(cells, span) if is_small else _weights(cells, span)


def _weights(cells: int, span: Span) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """See `_bilinear`."""
    positions = cell_positions(cells, span)
    distance = np.abs(np.clip(positions, 0, cells - 1)[:, np.newaxis] - np.arange(cells))
    last = np.flatnonzero(np.diff(np.floor(positions)))  # of each patch but the last
    corners = np.unique(np.concatenate([[0], last, last + 1, [len(positions) - 1]]))
    return np.maximum(1 - distance, 0), corners


_kept_weights = lru_cache(maxsize=16)(_weights)


def _connections(hot: NDArray[np.bool_]) -> Pixels:
    """Hot corners (rows, columns) and the connections between them, (2 rows - 1, 2 columns - 1)."""
    connections = np.zeros((2 * hot.shape[0] - 1, 2 * hot.shape[1] - 1), np.uint8)
    connections[::2, ::2] = hot
    connections[1::2, ::2] = hot[:-1] & hot[1:]
    connections[::2, 1::2] = hot[:, :-1] & hot[:, 1:]
    return connections


def _saddles(hot: NDArray[np.bool_]) -> tuple[NDArray[np.intp], ...]:
    """The rows and columns of patches with two opposite hot corners: only their pixels show a connection."""
    equal = hot[:, :-1] == hot[:, 1:]
    return np.nonzero((hot[:-1, :-1] == hot[1:, 1:]) & ~(equal[:-1] | equal[1:]))


def _is_connected(patch: NDArray[np.bool_]) -> bool:
    """Whether hot pixels connect the first pixel of a patch with its last, also across corners."""
    filled = np.array(patch, np.uint8, order="C")
    cv2.floodFill(filled, None, (0, 0), FILLED, flags=8)
    return bool(filled[-1, -1] == FILLED)


def _extent(
    values: NDArray[np.float64],
    inside: NDArray[np.bool_],
    corners: NDArray[np.intp],
    level: float,
    ends: tuple[int, int],
) -> tuple[int, int]:
    """The first pixel of a region along the last axis, and the one after its last.

    `ends` are its first and last corners. Between a corner outside and the next one inside, the values rise
    linearly, and reach `level` on the way.
    """

    def pixels_to_level(outside: int, inner: int) -> int:
        """The number of pixels from the corner outside to the first hot one, in any row."""
        is_inside = inside[:, inner]
        low, high = values[is_inside, outside], values[is_inside, inner]
        share = float(((level - low) / (high - low)).min())
        return math.ceil(share * abs(int(corners[inner] - corners[outside])))

    first, last = ends
    begin = int(corners[first - 1]) + pixels_to_level(first - 1, first) if first else 0
    if last + 1 < len(corners):
        return begin, int(corners[last + 1]) - pixels_to_level(last + 1, last) + 1
    return begin, int(corners[last]) + 1


def scale_box(box: Box, size: tuple[int, int], scaled_size: tuple[int, int]) -> Box:
    """Scale a box to a smaller image.

    Args:
        box: In pixels.
        size: (height, width) of the image.
        scaled_size: (height, width) of the smaller image.

    Returns:
        The box of all pixels that it touches in the smaller image.
    """
    (height, width), (rows, columns) = size, scaled_size
    left, top, right, bottom = box
    return (
        left * columns // width,
        top * rows // height,
        -(-right * columns // width),  # rounded up
        -(-bottom * rows // height),
    )


def draw_box(pixels: Pixels, box: Box) -> Pixels:
    """Draw a frame just inside a box, so that it is visible at the edges of the image.

    Args:
        pixels: The image (height, width, 3), uint8.
        box: In pixels of the image.

    Returns:
        A copy of the image with the frame.
    """
    left, top, right, bottom = box
    line, edge = _line_width(pixels)
    drawn = pixels.copy()
    for inset, color in ((0, DARK), (edge, LIGHT), (edge + line, DARK), (2 * edge + line, None)):
        inside = np.s_[top + inset : max(bottom - inset, 0), left + inset : max(right - inset, 0)]
        drawn[inside] = pixels[inside] if color is None else color
    return drawn


def draw_contour(
    pixels: Pixels, heatmap: Heatmap, threshold: float, placement: Placement | None = None
) -> Pixels:
    """Draw the contours of a heatmap on an image.

    All regions are outlined, not only the one around the peak. At the edges of the image, or of the part of
    it on which the heatmap lies, a contour is open.

    Args:
        pixels: The image (height, width, 3), uint8.
        heatmap: (rows, columns), float32.
        threshold: The level of the contours, as a share of the peak, in (0, 1).
        placement: Where the heatmap lies on the image; None: on all of it.

    Returns:
        A copy of the image with the contours.
    """
    line, edge = _line_width(pixels)
    drawn, size = pixels.copy(), (pixels.shape[0], pixels.shape[1])
    margin = line + 2 * edge
    if placement is None:
        part, lines = drawn, contours(heatmap, size, threshold, margin=margin)
    else:
        rows, columns = spans(placement, size)
        part = drawn[rows.slice, columns.slice].copy()
        lines = _contours(enlarge_inside(heatmap, size, placement), threshold, margin)
    points = [np.rint(line * 2**SUBPIXELS).astype(np.int32) for line in lines]
    for color, width in ((DARK, margin), (LIGHT, line)):
        cv2.polylines(part, points, True, color, width, cv2.LINE_AA, SUBPIXELS)
    if placement is not None:
        drawn[rows.slice, columns.slice] = part
    return drawn


def contours(
    heatmap: Heatmap, size: tuple[int, int], threshold: float, *, margin: int = 1
) -> list[NDArray[np.float32]]:
    """Find the contours of a heatmap.

    Args:
        heatmap: (rows, columns), float32.
        size: (height, width) of the image in pixels.
        threshold: The level of the contours, as a share of the peak, in (0, 1).
        margin: Where a region touches the edge of the image, its contour runs this many pixels outside.

    Returns:
        Closed lines (points, 2) of x, y in pixels of the image; integers are the centres of pixels.
    """
    return _contours(enlarge(heatmap, size), threshold, margin)


def _contours(large: Heatmap, threshold: float, margin: int) -> list[NDArray[np.float32]]:
    """The contours of a heatmap that has been enlarged, in its pixels."""
    if not large.any():
        return []
    level = threshold * large.max()
    padded = cv2.copyMakeBorder(large, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
    hot = (padded >= level).astype(np.uint8)
    outlines, _ = cv2.findContours(hot, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    lines = [_on_level(points[:, 0], padded, level) - margin for points in outlines]
    return [cv2.approxPolyDP(line, MAX_DEVIATION, True)[:, 0] for line in lines]


def _on_level(points: NDArray[np.int32], values: Heatmap, level: float) -> NDArray[np.float32]:
    """Move the outermost hot pixels (points, 2) to the level by one Newton step of at most a pixel."""
    x, y = points.T
    height, width = values.shape
    slope = np.stack(
        [
            values[y, np.minimum(x + 1, width - 1)] - values[y, np.maximum(x - 1, 0)],
            values[np.minimum(y + 1, height - 1), x] - values[np.maximum(y - 1, 0), x],
        ],
        axis=-1,
    ) / np.float32(2)
    steepness = np.maximum(np.linalg.norm(slope, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    step = np.minimum((values[y, x] - level)[:, None] / steepness, 1)
    return np.asarray(points - step * slope / steepness, np.float32)


def _line_width(pixels: Pixels) -> tuple[int, int]:
    """The width of a line in an image of this size, and of each of its two edges, in pixels."""
    line = max(round((pixels.shape[0] * pixels.shape[1]) ** 0.5 / LINE_SHARE), 1)
    return line, max(line // 2, 1)
