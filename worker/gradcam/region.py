"""The hot region of a heatmap: its box, its contour, and both drawn on a picture."""

import cv2
import numpy as np
from numpy.typing import NDArray

from worker.gradcam.picture import Heatmap, Pixels, enlarge

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom excluded

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
    large = enlarge(heatmap, size)
    if not large.any():
        return None
    row, column = divmod(int(large.argmax()), size[1])
    hot = (large >= threshold * large.max()).astype(np.uint8)
    _, _, _, (left, top, width, height) = cv2.floodFill(hot, None, (column, row), 2, flags=8)
    return left, top, left + width, top + height


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
