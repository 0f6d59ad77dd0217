"""The hot region of a heatmap: its box, its contour, and both drawn on a picture."""

import math
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.imaging.overlay import Heatmap, Pixels, enlarge

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom excluded

SURELY = 1 - 1e-9  # of a level: what lies on it is not left out because of rounding
JOINED = 2  # what a fill writes over 1
LIGHT, DARK = (255, 255, 255), (0, 0, 0)  # a light line with a dark edge is seen on any picture
LINE = 250  # the side of a square picture for each pixel of a line's width
SUBPIXELS = 4  # bits: OpenCV takes points in sixteenths of a pixel
SLACK = 0.1  # pixels: longer segments than the contour has points, since the joints of short ones show


def hot_box(heatmap: Heatmap, size: tuple[int, int], threshold: float) -> Box | None:
    """Frame the region of a heatmap (rows, columns) that holds its peak, in a picture (height, width).

    At the picture's size, the region is what hangs together, also across corners, of the pixels with at
    least `threshold`, in (0, 1), of the peak; of several peaks the first in reading order counts. Zhou et al.
    2016 (arXiv:1512.04150, section 3.2) take the largest region in its place. None: the heatmap is dark.
    """
    smaller = min(heatmap.shape[0], size[0]), min(heatmap.shape[1], size[1])
    cells = (heatmap if heatmap.shape == smaller else enlarge(heatmap, smaller)).astype(np.float64)
    (down, rows), (across, columns) = _bilinear(smaller[0], size[0]), _bilinear(smaller[1], size[1])
    values = down[rows] @ cells @ across[columns].T
    peak = float(values.max()) * SURELY
    if not peak:
        return None
    level = threshold * peak
    hot = values >= level
    between = _joints(hot)
    for y, x in zip(*_saddles(hot), strict=True):
        square = down[rows[y] : rows[y + 1] + 1] @ cells @ across[columns[x] : columns[x + 1] + 1].T >= level
        between[2 * y + 1, 2 * x + 1] = _crossed(square if hot[y, x] else square[:, ::-1])
    row, column = divmod(int((values >= peak).argmax()), len(columns))
    _, _, _, (left, top, wide, high) = cv2.floodFill(between, None, (2 * column, 2 * row), JOINED, flags=8)
    inside = between[::2, ::2] == JOINED
    left, right = _reach(values, inside, columns, level, (left // 2, (left + wide) // 2))
    top, bottom = _reach(values.T, inside.T, rows, level, (top // 2, (top + high) // 2))
    return left, top, right, bottom


@lru_cache(maxsize=16)
def _bilinear(cells: int, pixels: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """What each cell weighs in each pixel along one side of a picture (pixels, cells), and the corners.

    Between the middles of four cells an enlarged heatmap is bilinear. So along each row and column of such a
    patch it rises or falls all the way, and whatever has some level there hangs together with a corner of
    the patch that has it too: the first and last pixels of the patches, 30 x 30 for 14 x 14 cells, tell what
    a region is, however large the picture.
    """
    place = (np.arange(pixels) + 0.5) * cells / pixels - 0.5
    distance = np.abs(np.clip(place, 0, cells - 1)[:, np.newaxis] - np.arange(cells))
    last = np.flatnonzero(np.diff(np.floor(place)))  # of each patch but the last
    corners = np.unique(np.concatenate([[0], last, last + 1, [pixels - 1]]))
    return np.maximum(1 - distance, 0), corners


def _joints(hot: NDArray[np.bool_]) -> Pixels:
    """Hot corners (rows, columns), and between them what joins two, (2 rows - 1, 2 columns - 1)."""
    between = np.zeros((2 * hot.shape[0] - 1, 2 * hot.shape[1] - 1), np.uint8)
    between[::2, ::2] = hot
    between[1::2, ::2] = hot[:-1] & hot[1:]
    between[::2, 1::2] = hot[:, :-1] & hot[:, 1:]
    return between


def _saddles(hot: NDArray[np.bool_]) -> tuple[NDArray[np.intp], ...]:
    """Where only two opposite corners are hot, rows and columns: pixels alone tell what lies between them."""
    level = hot[:, :-1] == hot[:, 1:]
    return np.nonzero((hot[:-1, :-1] == hot[1:, 1:]) & ~(level[:-1] | level[1:]))


def _crossed(square: NDArray[np.bool_]) -> bool:
    """Whether one can get from its first pixel to its last over hot ones, also across corners."""
    filled = np.array(square, np.uint8, order="C")
    cv2.floodFill(filled, None, (0, 0), JOINED, flags=8)
    return bool(filled[-1, -1] == JOINED)


def _reach(
    values: NDArray[np.float64],
    inside: NDArray[np.bool_],
    corners: NDArray[np.intp],
    level: float,
    ends: tuple[int, int],
) -> tuple[int, int]:
    """The first pixel of a region along the last axis, and the one behind its last.

    `ends` are its first and last corners. From a corner outside to the next one inside, values rise evenly:
    `level` is reached on the way.
    """

    def way(services: int, ending: int) -> int:
        """Pixels from the corner outside to the first that is hot, in whichever row that comes first."""
        there = inside[:, ending]
        low, high = values[there, services], values[there, ending]
        share = float(((level - low) / (high - low)).min())
        return math.ceil(share * abs(int(corners[ending] - corners[services])))

    first, last = ends
    begin = int(corners[first - 1]) + way(first - 1, first) if first else 0
    end = int(corners[last + 1]) - way(last + 1, last) if last + 1 < len(corners) else int(corners[last])
    return begin, end + 1


def shrunk(box: Box, size: tuple[int, int], smaller: tuple[int, int]) -> Box:
    """A box in a picture of `size` (height, width) -> all pixels that it touches in a smaller one."""
    (height, width), (rows, columns) = size, smaller
    left, top, right, bottom = box
    return (
        left * columns // width,
        top * rows // height,
        -(-right * columns // width),  # rounded up
        -(-bottom * rows // height),
    )


def with_box(pixels: Pixels, box: Box) -> Pixels:
    """A picture (height, width, 3) with a frame just inside a box, so that it shows at the edges too."""
    left, top, right, bottom = box
    line, edge = _line(pixels)
    drawn = pixels.copy()
    for inset, color in ((0, DARK), (edge, LIGHT), (edge + line, DARK), (2 * edge + line, None)):
        inside = np.s_[top + inset : max(bottom - inset, 0), left + inset : max(right - inset, 0)]
        drawn[inside] = pixels[inside] if color is None else color
    return drawn


def with_contour(pixels: Pixels, heatmap: Heatmap, threshold: float) -> Pixels:
    """A picture (height, width, 3) with the line where a heatmap (rows, columns) is `threshold` of its peak.

    Every region is outlined, not only the one around the peak; at the picture's edges the line is open.
    """
    line, edge = _line(pixels)
    drawn = pixels.copy()
    lines = contours(heatmap, (pixels.shape[0], pixels.shape[1]), threshold, beyond=line + 2 * edge)
    points = [np.rint(one * 2**SUBPIXELS).astype(np.int32) for one in lines]
    for color, width in ((DARK, line + 2 * edge), (LIGHT, line)):
        cv2.polylines(drawn, points, True, color, width, cv2.LINE_AA, SUBPIXELS)
    return drawn


def contours(
    heatmap: Heatmap, size: tuple[int, int], threshold: float, *, beyond: int = 1
) -> list[NDArray[np.float32]]:
    """Closed lines (points, 2) of x, y on the level `threshold` of the peak, at `size` (height, width).

    A whole number is the middle of a pixel. Where a region touches the edge of the picture its line goes
    on, `beyond` pixels outside.
    """
    large = enlarge(heatmap, size)
    if not large.any():
        return []
    level = threshold * large.max()
    wide = cv2.copyMakeBorder(large, beyond, beyond, beyond, beyond, cv2.BORDER_REPLICATE)
    hot = (wide >= level).astype(np.uint8)
    found, _ = cv2.findContours(hot, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    lines = [_on_level(points[:, 0], wide, level) - beyond for points in found]
    return [cv2.approxPolyDP(one, SLACK, True)[:, 0] for one in lines]


def _on_level(points: NDArray[np.int32], values: Heatmap, level: float) -> NDArray[np.float32]:
    """The outermost hot pixels (points, 2) -> the level itself: one step of Newton's, a pixel at most."""
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


def _line(pixels: Pixels) -> tuple[int, int]:
    """How wide a line is in a picture of this size, and each of its two edges."""
    line = max(round((pixels.shape[0] * pixels.shape[1]) ** 0.5 / LINE), 1)
    return line, max(line // 2, 1)
